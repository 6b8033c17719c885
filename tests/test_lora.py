"""Low-rank adapters: what they compute, what they leave alone, and the files they go into."""

import dataclasses
import json
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import dpo
import gpt
import ipo_kto
import ppo
import reward
import serve
import sft


@pytest.fixture(autouse=True)
def same_mesh():
    """A script sets the mesh of the whole process: put the old one back."""
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


def adapter_of(model, rank=3, alpha=6.0, targets=gpt.TARGETS, seed=1):
    """A fresh adapter moved off its start, where one factor is 0 and half of the arithmetic would go unseen."""
    fresh = gpt.init_adapter(model, rank, alpha, targets, jax.random.key(seed))
    noise = lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    return fresh, jax.tree.map(noise, fresh)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 9)))


def loss(part, base):
    return gpt.token_logprobs(gpt.whole(part, base), TOKENS).mean()


# what they compute ----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_a_moved_one_is_merged_without_loss(tiny_model):
    fresh, moved = adapter_of(tiny_model)
    logprobs = jax.jit(gpt.token_logprobs)
    plain = logprobs(tiny_model, TOKENS)
    np.testing.assert_array_equal(logprobs(gpt.whole(fresh, tiny_model), TOKENS), plain)
    with_adapter = logprobs(gpt.whole(moved, tiny_model), TOKENS)
    assert np.abs(with_adapter - plain).max() > 0.1
    merged = gpt.merge(gpt.whole(moved, tiny_model))
    assert jax.tree.structure(merged) == jax.tree.structure(tiny_model)
    np.testing.assert_allclose(logprobs(merged, TOKENS), with_adapter, rtol=1e-4, atol=1e-4)
    # W + alpha / r A B by hand, alpha / r = 2
    layer, lora = tiny_model.blocks.up, moved.blocks["up"]
    by_hand = np.asarray(layer.weight[1]) + 2 * np.asarray(lora.a[1]) @ np.asarray(lora.b[1])
    np.testing.assert_allclose(merged.blocks.up.weight[1], by_hand, rtol=1e-5, atol=1e-6)
    tables = {"wte", "head"} if tiny_model.head is not None else {"wte"}
    assert set(moved.tables) == tables
    for name in tables:
        by_hand = np.asarray(getattr(tiny_model, name)) + 2 * np.asarray(moved.tables[name].a) @ moved.tables[name].b
        np.testing.assert_allclose(getattr(merged, name), by_hand, rtol=1e-5, atol=1e-6)


def test_generation_is_that_of_the_merged_model(tiny_model):
    model = gpt.whole(adapter_of(tiny_model)[1], tiny_model)
    sample = lambda model: gpt.generate(model, TOKENS, jnp.ones_like(TOKENS), jax.random.key(0), 8, eos=-1)
    ours, merged = sample(model), sample(gpt.merge(model))
    np.testing.assert_array_equal(ours.tokens, merged.tokens)
    np.testing.assert_array_equal(ours.logprobs, merged.logprobs)


def test_quantised_is_the_merged_model(tiny_model):
    model = gpt.whole(adapter_of(tiny_model)[1], tiny_model)
    ours, merged = serve.quantize(model, "int8"), serve.quantize(gpt.merge(model), "int8")
    assert jax.tree.structure(ours) == jax.tree.structure(merged)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), ours, merged)


def test_gradients_are_those_of_the_product_and_exist_for_the_adapter_alone(tiny_model):
    _, adapter = adapter_of(tiny_model, targets=("q", "down", "wte", "head"))
    grads = jax.jit(jax.grad(loss))(adapter, tiny_model)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    dense = jax.jit(jax.grad(lambda model: loss(model, None)))(gpt.merge(gpt.whole(adapter, tiny_model)))
    for name, lora in adapter.blocks.items():  # W = base + 2 A B: dA = 2 dW B^T, dB = 2 A^T dW
        dw = np.asarray(getattr(dense.blocks, name).weight)
        a, b = np.asarray(lora.a), np.asarray(lora.b)
        np.testing.assert_allclose(grads.blocks[name].a, 2 * dw @ b.swapaxes(1, 2), rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(grads.blocks[name].b, 2 * a.swapaxes(1, 2) @ dw, rtol=2e-3, atol=1e-5)
    for name, lora in adapter.tables.items():  # of a tied table: from what is read and what is predicted
        dw = np.asarray(getattr(dense, name))
        np.testing.assert_allclose(grads.tables[name].a, 2 * dw @ np.asarray(lora.b).T, rtol=2e-3, atol=1e-5)
        np.testing.assert_allclose(grads.tables[name].b, 2 * np.asarray(lora.a).T @ dw, rtol=2e-3, atol=1e-5)


def test_no_gradient_of_a_frozen_weight_is_formed(tiny_model):
    """Of all products in the gradient's program none has the shape of a weight of the MLP (16 x 64 here), or of the
    embedding."""
    for shape in (tiny_model.blocks.up.weight.shape[1:], tiny_model.wte.shape):
        product = "f32[{},{}] = dot_general".format(*shape)
        formed = lambda part, base, product=product: product in str(jax.make_jaxpr(jax.grad(loss))(part, base))
        assert formed(tiny_model, None)
        assert not formed(adapter_of(tiny_model)[1], tiny_model)


def test_layers_and_ranks_that_cannot_be_are_named(tiny_model):
    for options in (dict(targets=("q", "query")), dict(rank=0)):
        with pytest.raises(ValueError, match="no adapter of rank .* on .*q, k, v, o, gate, up, down, wte, head"):
            adapter_of(tiny_model, **options)
    tied = dataclasses.replace(tiny_model, head=None)
    for targets in ((), ("head",)):
        with pytest.raises(ValueError, match="this model has no such layer"):
            adapter_of(tied, targets=targets)
    assert set(adapter_of(tied, targets=("head", "wte"))[0].tables) == {"wte"}


# files ----------------------------------------------------------------------------------------------------------------


def write(folder, name, golden, part_of, targets=gpt.TARGETS):
    """A golden model with an adapter, as a run writes it: (part, base, what is in the adapter's files)."""
    base, _ = gpt.load(golden / name)
    part = part_of(adapter_of(base, 4, 8.0, targets)[1], base)
    gpt.save_adapter(folder / "adapter", part, golden / name)
    gpt.save(folder, gpt.merge(gpt.whole(part, base)), None)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    return part, base, tensors, json.loads((folder / "adapter" / "adapter_config.json").read_text())


def policy(adapter, base):
    return adapter


def scorer(adapter, base):
    return dataclasses.replace(gpt.init_score_model(base, jax.random.key(5), "attention", (1, 2)), trunk=adapter)


@pytest.mark.parametrize("folder", ["llama", "llama3"])  # a head of its own, and a tied one
def test_a_llama_adapter_has_the_names_and_shapes_of_peft(golden, tmp_path, folder):
    part, base, tensors, settings = write(tmp_path, folder, golden, policy)
    c = base.config
    attention = {"q": c.heads * c.head_dim, "k": c.kv_heads * c.head_dim, "v": c.kv_heads * c.head_dim}
    sizes = {f"self_attn.{x}_proj": (c.dim, n) for x, n in attention.items()}
    sizes |= {"self_attn.o_proj": (attention["q"], c.dim), "mlp.down_proj": (c.ffn, c.dim)}
    sizes |= {"mlp.gate_proj": (c.dim, c.ffn), "mlp.up_proj": (c.dim, c.ffn)}
    expected = {}
    for i in range(c.layers):
        for module, (rows, columns) in sizes.items():
            name = f"base_model.model.model.layers.{i}.{module}"
            expected |= {f"{name}.lora_A.weight": (4, rows), f"{name}.lora_B.weight": (columns, 4)}
    name, V = "base_model.model.model.embed_tokens", c.vocab_size
    expected |= {f"{name}.lora_embedding_A": (4, V), f"{name}.lora_embedding_B": (c.dim, 4)}
    expected |= {"base_model.model.lm_head.lora_A.weight": (4, c.dim), "base_model.model.lm_head.lora_B.weight": (V, 4)}
    assert {name: x.shape for name, x in tensors.items()} == expected
    tables = {"embed_tokens"} if c.tied else {"embed_tokens", "lm_head"}
    assert set(settings["target_modules"]) == {*sizes, *tables} and settings["ensure_weight_tying"] == c.tied
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 8.0, "CAUSAL_LM")
    assert settings["base_model_name_or_path"] == str(golden / folder) and not settings["fan_in_fan_out"]
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.asarray(part.blocks["up"].a[1]).T)
    table, head = part.tables["wte"], part.tables["wte" if c.tied else "head"]
    np.testing.assert_array_equal(tensors["base_model.model.model.embed_tokens.lora_embedding_A"], table.a.T)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], head.a)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_A.weight"], head.b)


def test_gpt2s_q_k_v_become_one_layer_of_peft(golden, tmp_path):
    part, base, tensors, settings = write(tmp_path, "gpt2", golden, policy, ("q", "v", "o"))
    D, name = base.config.dim, "base_model.model.transformer.h.0.attn.c_attn"
    assert settings["fan_in_fan_out"] and set(settings["target_modules"]) == {"attn.c_attn", "attn.c_proj"}
    assert (settings["r"], settings["rank_pattern"], settings["alpha_pattern"]) == (
        4, {"attn.c_attn": 8}, {"attn.c_attn": 16.0},
    )  # fmt: skip
    a, b = tensors[f"{name}.lora_A.weight"].T, tensors[f"{name}.lora_B.weight"].T
    assert a.shape == (D, 8) and b.shape == (8, 3 * D)
    change = 2.0 * a @ b  # alpha / r of the fused layer
    for i, x in enumerate("qkv"):
        lora = part.blocks.get(x)
        expected = 0 * change[:, :D] if lora is None else 2.0 * np.asarray(lora.a[0]) @ np.asarray(lora.b[0])
        np.testing.assert_allclose(change[:, i * D : (i + 1) * D], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("part_of", [policy, scorer])
def test_an_adapter_reads_back_on_its_base_and_on_no_other(golden, tmp_path, name, part_of):
    part, base, tensors, settings = write(tmp_path, name, golden, part_of, ("k", "v", "down", "wte", "head"))
    back = gpt.load_adapter(tmp_path, base, golden / name)
    if part_of is scorer:  # what changes the head of a language model is not kept
        part.trunk.tables.pop("head", None)
    assert jax.tree.structure(back) == jax.tree.structure(part)
    jax.tree.map(np.testing.assert_array_equal, back, part)
    if part_of is scorer:
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
        assert tensors["base_model.model.score.weight"].shape == (1, base.config.dim)
    assert gpt.load_adapter(tmp_path, base, golden / "qwen2") is None
    assert gpt.load_adapter(golden / name, base, golden / name) is None  # a folder without one


# training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory, words):
    """A model of 16 words, demonstrations and pairs."""
    root, rng = tmp_path_factory.mktemp("lora"), np.random.default_rng(0)
    tokenizer = gpt.load_tokenizer(words)
    shape = gpt.make_config(tokenizer.vocab_size, 32, 1, 2, 16)
    loud = lambda key: jax.tree.map(lambda x: 10 * x if x.ndim > 1 else x, gpt.init(shape, key))  # learns in few steps
    gpt.save(root / "base", jax.jit(loud)(jax.random.key(0)), tokenizer)
    text = lambda n: " ".join(rng.choice(list("abcdefgh"), n))
    rows = [{"prompt": text(3), "completion": text(4) + " yes"} for _ in range(64)]
    pairs = [{"prompt": text(3), "chosen": text(3) + " yes", "rejected": text(3) + " no"} for _ in range(64)]
    for name, data in dict(demos=rows, pairs=pairs, prompts=[{"prompt": text(3)} for _ in range(64)]).items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return root


def options(world, name, data, **more):
    plan = dict(
        init=str(world / "base"), data=(str(world / f"{data}.jsonl"),), out=world / name, steps=8, batch_size=16,
        length=16, lr=2e-2, warmup=1, lora_rank=2, lora_alpha=4.0, dtype="float32",
    )  # fmt: skip
    return plan | more


def log(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def folder_tensors(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "adapter" / "adapter_model.safetensors")


def has_adapter(name):
    return "_proj" in name or "embed_tokens" in name


def stop_in_the_third_step(monkeypatch):
    write_log = gpt.Run.log

    def write_and_stop(run, step, metrics):
        write_log(run, step, metrics)
        if step == 2 and not run.config.resume:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpt.Run, "log", write_and_stop)


def test_sft_with_adapters_learns_and_resumes_bit_for_bit(world, monkeypatch):
    sft.main(sft.Config(**options(world, "sft", "demos")))
    steps = log(world / "sft")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3

    stop_in_the_third_step(monkeypatch)
    with pytest.raises(SystemExit):
        sft.main(sft.Config(**options(world, "resumed", "demos")))
    assert len(log(world / "resumed")) == 3
    sft.main(sft.Config(**options(world, "resumed", "demos", resume=True)))
    assert log(world / "resumed") == steps
    ours, resumed = folder_tensors(world / "sft"), folder_tensors(world / "resumed")
    assert ours.keys() == resumed.keys()
    jax.tree.map(np.testing.assert_array_equal, ours, resumed)


def test_what_is_saved_is_the_base_with_its_linear_layers_and_tables_moved(world):
    before, after = load_file(world / "base" / "model.safetensors"), load_file(world / "sft" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert np.array_equal(x, after[name]) != has_adapter(name), name
    base, _ = gpt.load(world / "base")
    adapter = gpt.load_adapter(world / "sft", base, world / "base")
    merged, _ = gpt.load(world / "sft")
    jax.tree.map(np.testing.assert_array_equal, gpt.merge(gpt.whole(adapter, base)), merged)


@pytest.mark.parametrize("script, loss", [(dpo, "dpo"), (ipo_kto, "ipo"), (ipo_kto, "kto")])
def test_with_adapters_the_reference_is_the_base_and_no_second_model(world, script, loss, monkeypatch):
    monkeypatch.setattr(gpt, "load_frozen", lambda *_: pytest.fail("a second model was loaded"))
    kind = {} if script is dpo else {"loss": loss}
    script.main(script.Config(**options(world, loss, "pairs", steps=4, **kind)))
    steps = log(world / loss)
    start = dict(dpo=np.log(2), ipo=25.0, kto=0.5)[loss]  # log-ratios are all 0
    assert steps[0]["loss"] == pytest.approx(start, rel=1e-5)
    assert abs(steps[-1]["loss"] - start) > 1e-3
    assert (world / loss / "adapter" / "adapter_config.json").is_file()


def test_adapters_need_a_model_to_be_on(world):
    with pytest.raises(ValueError, match="--lora-rank trains an adapter on a finished model: name one with --init"):
        sft.main(sft.Config(**options(world, "none", "demos", init="none")))


# PPO ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge(world):
    """A reward model as an adapter with a head on the same base, and its folder's merged model beside it."""
    before = jax.sharding.get_mesh()
    plan = options(world, "judge", "pairs", suffix="", head_lr=1e-2, normalize_with=None, gold=None)
    reward.main(reward.Config(**plan))
    jax.set_mesh(before)
    return world / "judge"


def ppo_options(world, name, **more):
    plan = dict(
        init=str(world / "base"), data=(str(world / "prompts.jsonl"),), out=world / name, steps=5, batch_size=16,
        minibatch_size=8, epochs=1, prompt_length=4, response_length=4, missing_eos="keep", monitor="none",
        reward=(str(world / "judge"),), lora_rank=2, dtype="float32",
    )  # fmt: skip
    return ppo.Config(**plan | more)


def test_an_adapter_of_reward_py_scores_like_its_merged_model(world, judge):
    base, tokenizer = gpt.load(world / "base")
    adapter = gpt.load_reward_model(judge, tokenizer, world / "base", "float32", (base, world / "base"))
    merged = gpt.load_reward_model(judge, tokenizer, world / "base", "float32")
    assert isinstance(adapter.trunk, gpt.Adapter) and isinstance(merged.trunk, gpt.GPT)
    score = jax.jit(lambda model: model(TOKENS % 16, jnp.ones_like(TOKENS)))
    ours = score(gpt.whole(adapter, base))
    np.testing.assert_allclose(ours, score(merged), rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0.1


def test_ppo_on_one_base_learns_and_resumes_bit_for_bit(world, judge, monkeypatch, capsys):
    ppo.main(ppo_options(world, "ppo", share="lora"))
    steps = log(world / "ppo")
    assert "a model of its own" not in capsys.readouterr().out
    assert json.loads((world / "ppo" / "config.json").read_text())["run"]["critic"] == "reward trunk"
    assert abs(steps[0]["objective/kl"]) < 1e-6 < steps[-1]["objective/kl_exact"]
    assert all(row["val/ratio_first"] == 1 and row["val/decode_drift"] < 1e-4 for row in steps)

    stop_in_the_third_step(monkeypatch)
    with pytest.raises(SystemExit):
        ppo.main(ppo_options(world, "ppo-resumed", share="lora"))
    ppo.main(ppo_options(world, "ppo-resumed", share="lora", resume=True))
    assert log(world / "ppo-resumed") == steps
    ours, resumed = folder_tensors(world / "ppo"), folder_tensors(world / "ppo-resumed")
    jax.tree.map(np.testing.assert_array_equal, ours, resumed)
    before = load_file(world / "base" / "model.safetensors")
    assert {name for name, x in before.items() if not np.array_equal(x, ours[name])} == set(filter(has_adapter, before))


def test_a_reward_model_of_its_own_stays_one_beside_adapters(world, judge, capsys):
    (world / "judge" / "adapter").rename(world / "judge" / "elsewhere")
    ppo.main(ppo_options(world, "whole", share="lora", steps=1))
    (world / "judge" / "elsewhere").rename(world / "judge" / "adapter")
    assert "judge has no adapter on" in capsys.readouterr().out
    assert json.loads((world / "whole" / "config.json").read_text())["run"]["critic"] == "policy trunk"


@pytest.mark.parametrize("how", [dict(share="trunk"), dict(advantage="grpo", group_size=4)])
def test_ppo_without_a_critic_of_its_own(world, judge, how, monkeypatch):
    asked, score = [], ppo.score_responses
    monkeypatch.setattr(ppo, "score_responses", lambda *args: asked.append(args[4]) or score(*args))
    name = "-".join(map(str, how.values()))
    ppo.main(ppo_options(world, name, steps=2, **how))
    steps = log(world / name)
    assert all(row["val/ratio_first"] == 1 for row in steps) and steps[-1]["objective/kl_exact"] > 1e-7
    assert ("loss/value_avg" in steps[0]) == ("share" in how)
    prompts, answers = asked[0]
    if "advantage" in how:  # four answers to each prompt, side by side, and not the same one
        assert all(len(set(prompts[i : i + 4])) == 1 < len(set(answers[i : i + 4])) for i in range(0, 16, 4))
    model, _ = gpt.load(world / name)
    assert isinstance(model, gpt.GPT)


@pytest.mark.parametrize(
    "how, message",
    [
        (dict(advantage="grpo", group_size=1), "--group-size is 2 or more"),
        (dict(advantage="rloo", group_size=3), "--batch-size a multiple of it"),
        (dict(share="trunk", advantage="rloo"), "--share trunk puts values on the policy's trunk"),
        (dict(share="trunk", critic_warmup=1), "--critic-warmup is for a critic of its own"),
    ],
)
def test_what_does_not_go_together_is_named(world, how, message):
    with pytest.raises(ValueError, match=message):
        ppo.main(ppo_options(world, "wrong", **how))


# a student of a reward model ------------------------------------------------------------------------------------------


def test_distillation_loss_by_hand():
    scores, teacher = jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([[2.0, 0.0], [2.0, 1.0]])
    loss, metrics = reward.distillation_loss(scores, teacher)
    np.testing.assert_allclose(loss, ((1 + 0) / 2 + (0 + 4) / 2) / 2)
    assert metrics["agreement"] == 0.5
    np.testing.assert_allclose(reward.distillation_loss(scores, teacher, jnp.array([3.0, 1.0]))[0], (3 * 0.5 + 2) / 4)


def test_a_small_student_learns_the_scores_of_its_teacher_and_no_label(world, judge, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").open()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for name, data in (("pairs", rows), ("pairs-heldout", rows), ("swapped", swapped)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    plan = options(world, "student", "pairs", init="none", teacher=str(judge), suffix="", layers=1, heads=1, dim=8,
                   steps=24, lr=2e-2, head_lr=2e-2, normalize_with=None, gold=None, lora_rank=0)  # fmt: skip
    for name in ("pairs", "swapped"):
        reward.main(reward.Config(**plan | dict(data=(str(tmp_path / f"{name}.jsonl"),), out=tmp_path / name)))
    steps, turned = log(tmp_path / "pairs"), log(tmp_path / "swapped")
    losses = [row["loss"] for row in steps]
    assert np.mean(losses[-5:]) < 0.6 * losses[0]
    report = json.loads((tmp_path / "pairs" / "report.json").read_text())["teacher"]
    assert report["correlation"] > 0.2 and 0.4 < report["agreement"] <= 1 and 0 <= report["accuracy"] <= 1
    # the labels turned round, only what is measured against them changes
    np.testing.assert_allclose([row["loss"] for row in turned], losses, rtol=1e-2)
    np.testing.assert_allclose([row["margin"] for row in turned], [-row["margin"] for row in steps], atol=1e-2)


def test_a_student_needs_its_teacher_and_reads_the_score_where_it_does(world, judge):
    with pytest.raises(ValueError, match="--init none is for a small student of --teacher"):
        reward.main(reward.Config(**options(world, "x", "pairs", init="none", lora_rank=0)))
    plan = options(world, "x", "pairs", init="none", lora_rank=0, teacher=str(judge), suffix=" Judge:")
    with pytest.raises(ValueError, match="reads its score after ''"):
        reward.main(reward.Config(**plan))


def test_a_critic_has_the_width_of_the_reward_model_that_it_starts_from():
    model = lambda dim: gpt.init(gpt.make_config(16, 8, 1, 2, dim), jax.random.key(0))
    policy, student = model(16), gpt.init_score_model(model(8), jax.random.key(1))
    critic, name = ppo.make_critic(policy, policy, [student], ppo.Config(), jax.random.key(2))
    assert critic.head.shape == (8,) and critic.trunk.config.dim == 8 and name == "reward trunk"
    critic, name = ppo.make_critic(policy, policy, [student], ppo.Config(critic_init="policy"), jax.random.key(2))
    assert critic.head.shape == (16,) and name == "policy trunk"
