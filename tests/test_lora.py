"""Low-rank adapters: what they compute, what they leave alone, and the files they go into."""

import dataclasses
import json
import signal
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import convert
import dpo
import gpt
import grpo
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


def adapter_of(model, rank=3, targets=gpt.TARGETS):
    """A fresh adapter moved off its start, where one factor is 0 and half of the arithmetic would go unseen."""
    fresh = jax.jit(lambda key: gpt.init_adapter(model, rank, key))(jax.random.key(1))
    kept = lambda layers: {name: layer for name, layer in layers.items() if name in targets}
    fresh = gpt.Adapter(kept(fresh.blocks), kept(fresh.tables))
    noise = lambda x: np.random.default_rng(x.size).normal(0, 0.3, x.shape).astype(np.float32)
    return fresh, jax.tree.map(lambda x: x + noise(x), fresh)


TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 9)))


def loss(adapter, base):
    return gpt.token_logprobs(gpt.attach(adapter, base), TOKENS).mean()


# what they compute ----------------------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_nothing_and_a_moved_one_is_merged_without_loss(tiny_model):
    fresh, moved = adapter_of(tiny_model)
    logprobs = jax.jit(gpt.token_logprobs)
    plain = logprobs(tiny_model, TOKENS)
    np.testing.assert_array_equal(logprobs(gpt.attach(fresh, tiny_model), TOKENS), plain)
    with_adapter = logprobs(gpt.attach(moved, tiny_model), TOKENS)
    assert np.abs(with_adapter - plain).max() > 0.1
    merged = gpt.merge(gpt.attach(moved, tiny_model))
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
    model = gpt.attach(adapter_of(tiny_model)[1], tiny_model)
    sample = lambda model: gpt.generate(model, TOKENS, jnp.ones_like(TOKENS), jax.random.key(0), 8, ends=())
    ours, merged = sample(model), sample(gpt.merge(model))
    np.testing.assert_array_equal(ours.tokens, merged.tokens)
    np.testing.assert_array_equal(ours.logprobs, merged.logprobs)


def test_in_bf16_what_is_sampled_is_what_is_scored(tiny_model):
    """Of weights of +-1 a change of 0.001 is below bf16's last digit: merged, it is lost."""
    base = gpt.cast(dataclasses.replace(tiny_model, head=jnp.sign(tiny_model.wte)), jnp.bfloat16)
    V, D = base.head.shape
    change = gpt.LoraTable(None, (-1.0) ** jnp.arange(V)[:, None], jnp.full((1, D), 0.0005), scale=2.0)
    policy = gpt.cast(gpt.attach(gpt.Adapter({}, {"head": change}), base), jnp.bfloat16)
    likeliest = lambda model: gpt.generate(
        model, TOKENS, jnp.ones_like(TOKENS), jax.random.key(0), 4, ends=(-1,), temperature=0.0
    )
    ours, before = likeliest(policy), likeliest(base)
    np.testing.assert_array_equal(ours.tokens, before.tokens)
    rows = jnp.concatenate([TOKENS, ours.tokens], 1)
    scored = [gpt.token_logprobs(model, rows)[:, TOKENS.shape[1] - 1 :] for model in (policy, base, gpt.merge(policy))]
    moved = np.asarray(scored[0] - scored[1])
    assert np.abs(moved).max() > 1e-3 and (scored[2] == scored[1]).all()
    np.testing.assert_allclose(ours.logprobs - before.logprobs, moved, atol=0.1 * np.abs(moved).max())


def test_quantised_is_the_merged_model(tiny_model):
    model = gpt.attach(adapter_of(tiny_model)[1], tiny_model)
    ours, merged = serve.quantize(model, "int8"), serve.quantize(gpt.merge(model), "int8")
    assert jax.tree.structure(ours) == jax.tree.structure(merged)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), ours, merged)


def test_gradients_are_those_of_the_product_and_exist_for_the_adapter_alone(tiny_model):
    _, adapter = adapter_of(tiny_model, targets=("q", "down", "wte", "head"))
    grads = jax.jit(jax.grad(loss))(adapter, tiny_model)
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    dense = jax.jit(jax.grad(lambda model: loss(model, None)))(gpt.merge(gpt.attach(adapter, tiny_model)))
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
        formed = lambda adapter, base, product=product: product in str(jax.make_jaxpr(jax.grad(loss))(adapter, base))
        assert formed(tiny_model, None)
        assert not formed(adapter_of(tiny_model)[1], tiny_model)


def test_a_rank_that_cannot_be_is_named_and_a_tied_head_has_no_adapter_of_its_own(tiny_model):
    with pytest.raises(ValueError, match="--lora-rank -1: an adapter has rank 1 or more"):
        gpt.trainable(tiny_model, -1, "float32", jax.random.key(0))
    assert set(adapter_of(dataclasses.replace(tiny_model, head=None))[0].tables) == {"wte"}


# files ----------------------------------------------------------------------------------------------------------------


def write(folder, name, golden, model_of, targets=gpt.TARGETS):
    """A golden model with an adapter, in folder/run as a run writes it and in folder/peft as PEFT does: (adapter or
    score model, base, PEFT's tensors and settings)."""
    base, _ = gpt.load(golden / name)
    model = model_of(adapter_of(base, 4, targets)[1], base)
    gpt.save_adapter(folder / "run" / "adapter", model, golden / name)
    gpt.save(folder / "run", gpt.merge(gpt.attach(model, base)), None)
    convert_folder(folder / "run", folder / "peft")
    tensors = load_file(folder / "peft" / "adapter_model.safetensors")
    return model, base, tensors, json.loads((folder / "peft" / "adapter_config.json").read_text())


def convert_folder(source, target, base=None):
    convert.main(convert.Config(str(source), str(target), base=base and str(base)))


def policy(adapter, base):
    return adapter


def scorer(adapter, base):
    return dataclasses.replace(gpt.init_score_model(base, jax.random.key(5), "attention", (1, 2)), body=adapter)


@pytest.mark.parametrize("folder", ["llama", "qwen3"])  # a head of its own, and a tied one
def test_a_llama_adapter_has_the_names_and_shapes_of_peft(golden, tmp_path, folder):
    model, base, tensors, settings = write(tmp_path, folder, golden, policy)
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
    assert (
        set(settings["target_modules"]) == {*sizes, "embed_tokens", "lm_head"}
        and settings["ensure_weight_tying"] == c.tied
    )
    assert settings["peft_type"] == "LORA"
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 8.0, "CAUSAL_LM")
    assert settings["base_model_name_or_path"] == str(golden / folder) and not settings["fan_in_fan_out"]
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], np.asarray(model.blocks["up"].a[1]).T)
    table, head = model.tables["wte"], model.tables["wte" if c.tied else "head"]
    np.testing.assert_array_equal(tensors["base_model.model.model.embed_tokens.lora_embedding_A"], table.a.T)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], head.a)
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_A.weight"], head.b)


def test_gpt2s_q_k_v_become_one_layer_of_peft(golden, tmp_path):
    model, base, tensors, settings = write(tmp_path, "gpt2", golden, policy, ("q", "v", "o"))
    D, name = base.config.dim, "base_model.model.transformer.h.0.attn.c_attn"
    assert settings["fan_in_fan_out"] and set(settings["target_modules"]) == {"attn.c_attn", "attn.c_proj"}
    assert (settings["r"], settings["rank_pattern"], settings["alpha_pattern"]) == (
        4, {"attn.c_attn": 8}, {"attn.c_attn": 16.0},
    )  # fmt: skip
    a, b = tensors[f"{name}.lora_A.weight"].T, tensors[f"{name}.lora_B.weight"].T
    assert a.shape == (D, 8) and b.shape == (8, 3 * D)
    change = 2.0 * a @ b  # alpha / r of the fused layer
    for i, x in enumerate("qkv"):
        lora = model.blocks.get(x)
        expected = 0 * change[:, :D] if lora is None else 2.0 * np.asarray(lora.a[0]) @ np.asarray(lora.b[0])
        np.testing.assert_allclose(change[:, i * D : (i + 1) * D], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name, model_of", [("gpt2", policy), ("gpt2", scorer), ("qwen3", policy), ("qwen3", scorer)]
    + [(name, policy) for name in ("llama", "llama3", "mistral", "qwen2")],
)  # fmt: skip
def test_an_adapter_reads_back_on_its_base_and_on_no_other(golden, tmp_path, name, model_of):
    model, base, tensors, settings = write(tmp_path, name, golden, model_of, ("k", "v", "down", "wte", "head"))
    if model_of is scorer:  # what changes the head of a language model is not kept
        model.body.tables.pop("head", None)
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"] == ["score"]
        assert tensors["base_model.model.score.weight"].shape == (1, base.config.dim)
    else:  # by this name PEFT finds that GPT-2's head is tied
        assert "lm_head" in settings["target_modules"]
    convert_folder(tmp_path / "peft", tmp_path / "again")
    for folder in (tmp_path / "run", tmp_path / "again"):
        back = gpt.load_adapter(folder, golden / name)
        assert jax.tree.structure(back) == jax.tree.structure(model)
        jax.tree.map(np.testing.assert_array_equal, back, model)
    run, again = (load_file(tmp_path / folder / "model.safetensors") for folder in ("run", "again"))
    assert run.keys() == again.keys()
    jax.tree.map(np.testing.assert_array_equal, run, again)
    assert gpt.load_adapter(tmp_path / "run", golden / "llama_bias") is None
    assert gpt.load_adapter(golden / name, golden / name) is None  # a folder without one


def test_what_peft_does_not_do_is_written_beside_the_adapter(golden, tmp_path, capsys):
    write(tmp_path, "gpt2", golden, policy, ("q", "wte"))
    text = (tmp_path / "peft" / "README.md").read_text()
    assert "lm_head.weight.detach().clone()" in text and f'from_pretrained("{golden / "gpt2"}")' in text
    assert "would change the tied embedding twice" in capsys.readouterr().out
    write(tmp_path / "score", "llama", golden, scorer, ("q",))
    text = (tmp_path / "score" / "peft" / "README.md").read_text()
    assert "pooling 'attention'" in text and "the ids [1, 2]" in text and "0.0, to be added" in text
    write(tmp_path / "head", "llama", golden, policy)  # a head of its own
    write(tmp_path / "inner", "gpt2", golden, policy, ("q",))
    assert not [folder for folder in ("head", "inner") if (tmp_path / folder / "peft" / "README.md").exists()]


def write_peft(folder, tensors, **settings):
    """A folder as PEFT writes it on its own."""
    folder.mkdir()
    plain = dict(peft_type="LORA", task_type="CAUSAL_LM", r=2, lora_alpha=3, bias="none", base_model_name_or_path=None)
    (folder / "adapter_config.json").write_text(json.dumps(plain | settings))
    tensors = {f"base_model.model.{name}": np.asarray(x, np.float32) for name, x in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def gpt2_factors(base, module, I, O, ranks):
    """Random factors A (r, I) and B (O, r) of a module in every layer, under PEFT's names."""
    rng, tensors = np.random.default_rng(0), {}
    for i, r in zip(range(base.config.layers), ranks):
        name = f"transformer.h.{i}.{module}"
        tensors |= {f"{name}.lora_A.weight": rng.normal(size=(r, I)), f"{name}.lora_B.weight": rng.normal(size=(O, r))}
    return tensors


def test_an_adapter_that_peft_trained_changes_its_base_by_alpha_over_r_b_a(golden, tmp_path):
    """q, k and v as one module of rank 2 that all three share, and an MLP's of rank 4 with an alpha of its own."""
    base, _ = gpt.load(golden / "gpt2")
    D, F = base.config.dim, base.config.ffn
    modules = {"attn.c_attn": (D, 3 * D, 2, 3 / 2), "mlp.c_fc": (D, F, 4, 5 / 4)}
    tensors = {}
    for module, (I, O, r, _) in modules.items():
        tensors |= gpt2_factors(base, module, I, O, [r] * base.config.layers)
    pattern = dict(rank_pattern={"mlp.c_fc": 4}, alpha_pattern={"h.[0-9].mlp.c_fc": 5})
    write_peft(tmp_path / "peft", tensors | {"transformer.wte.base_layer.weight": np.asarray(base.wte)}, **pattern)
    convert_folder(tmp_path / "peft", tmp_path / "model", golden / "gpt2")
    before, after = (load_file(folder / "model.safetensors") for folder in (golden / "gpt2", tmp_path / "model"))
    for name, x in before.items():
        module = next((module for module in modules if f"{module}.weight" in name), None)
        if module is None:
            np.testing.assert_array_equal(after[name], x, err_msg=name)
        else:
            A, B = (tensors[name.replace(".weight", f".lora_{factor}.weight")] for factor in "AB")
            np.testing.assert_allclose(after[name], x + modules[module][-1] * (B @ A).T, rtol=1e-4, atol=1e-5)
    # there and back again
    convert_folder(tmp_path / "model", tmp_path / "peft-again")
    convert_folder(tmp_path / "peft-again", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, x in after.items():
        np.testing.assert_allclose(again[name], x, rtol=1e-5, atol=1e-6)


def test_what_does_not_change_an_adapter_is_read_and_rank_stabilised_ones_have_their_scale(golden, tmp_path):
    """rsLoRA's scale is alpha / sqrt(r), also of a module with a rank and an alpha of its own."""
    base, _ = gpt.load(golden / "gpt2")
    D, F, L = base.config.dim, base.config.ffn, base.config.layers
    modules = {"attn.c_proj": (D, D, 2, 3), "mlp.c_fc": (D, F, 4, 5)}
    tensors = {}
    for module, (I, O, r, _) in modules.items():
        tensors |= gpt2_factors(base, module, I, O, [r] * L)
    others = dict(init_lora_weights="gaussian", unsloth_fixed=True, corda_config=None, use_dora=False, loftq_config={})
    pattern = dict(rank_pattern={"mlp.c_fc": 4}, alpha_pattern={"mlp.c_fc": 5}, use_rslora=True)
    write_peft(tmp_path / "peft", tensors, **pattern, **others)
    convert_folder(tmp_path / "peft", tmp_path / "model", golden / "gpt2")
    before, after = (load_file(folder / "model.safetensors") for folder in (golden / "gpt2", tmp_path / "model"))
    for module, (_, _, r, alpha) in modules.items():
        name = f"transformer.h.0.{module}.weight"
        A, B = (tensors[name.replace(".weight", f".lora_{factor}.weight")] for factor in "AB")
        np.testing.assert_allclose(after[name], before[name] + alpha / r**0.5 * (B @ A).T, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_converted_is_named(golden, tmp_path):
    write(tmp_path, "gpt2", golden, policy)
    base, _ = gpt.load(golden / "gpt2")
    D, L = base.config.dim, base.config.layers
    good, lopsided = (gpt2_factors(base, "attn.c_proj", D, D, [2] * (L - 1) + [r]) for r in (2, 3))
    c_attn = gpt2_factors(base, "attn.c_attn", D, 3 * D, [2] * L)
    embedding = {
        "transformer.wte.lora_embedding_A": np.ones((2, len(base.wte))),
        "transformer.wte.lora_embedding_B": np.ones((D, 2)),
    }
    first = next(iter(good))
    kinds = {
        "ia3": (good, dict(peft_type="IA3"), "peft_type = 'IA3' is not read here, only 'LORA'"),
        "dora": (good, dict(use_dora=True), "use_dora = True is not read here"),
        "pissa": (good, dict(init_lora_weights="pissa_niter_4"), "init_lora_weights = 'pissa_niter_4' is not read"),
        "alora": (good, dict(alora_invocation_tokens=[5, 6]), r"alora_invocation_tokens = \[5, 6\] is not read here$"),
        "unheard": (good, dict(use_next_lora=True), "use_next_lora = True is not read here"),
        "layers": (dict([*good.items()][2:]), {}, "h.0.attn.c_proj.lora_A.weight is missing"),
        "missing": ({name: x for name, x in good.items() if name != list(good)[-1]}, {}, "lora_B.weight is missing"),
        "moved": (
            good | {"transformer.wte.base_layer.weight": base.wte + 1},
            {},
            "no place for the tensors transformer.wte",
        ),
        "extra": (good | {"score.bias": np.ones(1)}, {}, "no place for the tensors score.bias"),
        "wide": (good | {first: np.ones((2, D + 1))}, {}, "and the base's weight is"),
        "lopsided": (lopsided, {}, "another rank in some layers than in others"),
        "zero": ({name: x * ("_A" in name) for name, x in c_attn.items()}, {}, "no adapter here changes a layer"),
        "embedding": (embedding, {}, "this model's head is its embedding: both need the same adapter"),
    }
    for name, (tensors, settings, message) in kinds.items():
        write_peft(tmp_path / name, tensors, **settings)
        with pytest.raises(ValueError, match=message):
            convert_folder(tmp_path / name, tmp_path / "out", golden / "gpt2")
    for source in ("run", "peft"):  # with the weights of another base
        with pytest.raises(ValueError, match="an adapter on another model than .*llama"):
            convert_folder(tmp_path / source, tmp_path / "out", golden / "llama")
    with pytest.raises(ValueError, match="does not say which model it is an adapter on: name it with --base"):
        convert_folder(tmp_path / "ia3", tmp_path / "out")
    with pytest.raises(ValueError, match="is a reward model"):
        convert_folder(tmp_path / "ia3", tmp_path / "out", golden / "gpt2_score")
    with pytest.raises(FileNotFoundError, match="no adapter in .*gpt2: a run with --lora-rank leaves"):
        convert_folder(golden / "gpt2", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_folder(tmp_path / "run", tmp_path / "peft")


def test_the_command_line_of_convert(golden, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["convert.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            gpt.cli(convert.main, convert.Config, convert.__doc__)
        return stop.value.code, *capsys.readouterr()

    code, out, _ = run("--help")
    assert code == 0 and "python convert.py out/sft-lora out/sft-lora-peft" in out
    assert all(word in out for word in ("SOURCE", "TARGET", "--base"))
    code, _, err = run(golden / "gpt2", tmp_path / "out")
    assert code == 1 and err.startswith("error: no adapter in")
    assert run(golden / "gpt2")[0] == 2


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
        length=16, lr=2e-2, lora_rank=2, dtype="float32",
    )  # fmt: skip
    return plan | more


def log(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def folder_tensors(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "adapter" / "adapter.safetensors")


def has_adapter(name):
    return "_proj" in name or "embed_tokens" in name


def stop_in_the_third_step(monkeypatch):
    write_log = gpt.Run.log

    def write_and_stop(run, step, metrics):
        write_log(run, step, metrics)
        if step == 2 and not run.resume:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(gpt.Run, "log", write_and_stop)


def test_sft_with_adapters_learns_and_resumes_bit_for_bit(world, monkeypatch):
    sft.main(sft.Config(**options(world, "sft", "demos", warmup=1)))
    steps = log(world / "sft")
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.3

    stop_in_the_third_step(monkeypatch)
    with pytest.raises(SystemExit):
        sft.main(sft.Config(**options(world, "resumed", "demos", warmup=1)))
    assert len(log(world / "resumed")) == 3
    sft.main(sft.Config(**options(world, "resumed", "demos", warmup=1, resume=True)))
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
    adapter = gpt.load_adapter(world / "sft", world / "base")
    merged, _ = gpt.load(world / "sft")
    jax.tree.map(np.testing.assert_array_equal, gpt.merge(gpt.attach(adapter, base)), merged)


def test_an_adapter_that_moves_no_weight_of_its_base_is_an_error(world):
    """Its own weights have changed, by too little for the sum."""
    config = dpo.Config(**options(world, "still", "pairs", steps=2) | dict(lr=1e-30))
    with pytest.raises(ValueError, match="2 steps have changed no weight.*--lr is too small"):
        dpo.main(config)
    assert not (world / "still" / "model.safetensors").exists() and not (world / "still" / "adapter").exists()


@pytest.mark.parametrize("script, loss", [(dpo, "dpo"), (ipo_kto, "ipo"), (ipo_kto, "kto")])
def test_with_adapters_the_reference_is_the_base_and_no_second_model(world, script, loss, monkeypatch):
    monkeypatch.setattr(gpt, "load_frozen", lambda *_: pytest.fail("a second model was loaded"))
    kind = {} if script is dpo else {"loss": loss}
    script.main(script.Config(**options(world, loss, "pairs", steps=4, **kind)))
    steps = log(world / loss)
    start = dict(dpo=np.log(2), ipo=25.0, kto=0.5)[loss]  # log-ratios are all 0
    assert steps[0]["loss"] == pytest.approx(start, rel=1e-5)
    assert abs(steps[-1]["loss"] - start) > 1e-3
    assert (world / loss / "adapter" / "adapter.json").is_file()


def test_adapters_need_a_model_to_be_on(world):
    with pytest.raises(ValueError, match="--lora-rank trains an adapter on a finished model: name one with --init"):
        sft.main(sft.Config(**options(world, "none", "demos", init=None)))


# PPO ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_reward(world):
    """A reward model as an adapter with a head on the same base, and its folder's merged model beside it."""
    before = jax.sharding.get_mesh()
    plan = options(world, "trained_reward", "pairs", suffix="", head_lr=1e-2, normalize_with=None, gold=None)
    reward.main(reward.Config(**plan))
    jax.set_mesh(before)
    return world / "trained_reward"


def ppo_options(world, name, **more):
    plan = dict(
        init=str(world / "base"), data=(str(world / "prompts.jsonl"),), out=world / name, steps=5, batch_size=16,
        minibatch_size=8, epochs=1, prompt_length=4, response_length=4, missing_eos=None, gold=None,
        reward=(str(world / "trained_reward"),), lora_rank=2, dtype="float32",
    )  # fmt: skip
    return ppo.Config(**plan | more)


def test_an_adapter_of_reward_py_scores_like_its_merged_model(world, trained_reward):
    base, tokenizer = gpt.load(world / "base")
    adapter = gpt.load_reward_model(trained_reward, tokenizer, world / "base", "float32", True)
    merged = gpt.load_reward_model(trained_reward, tokenizer, world / "base", "float32")
    assert isinstance(adapter.body, gpt.Adapter) and isinstance(merged.body, gpt.GPT)
    score = jax.jit(lambda model: model(TOKENS % 16, jnp.ones_like(TOKENS)))
    ours = score(gpt.attach(adapter, base))
    np.testing.assert_allclose(ours, score(merged), rtol=1e-4, atol=1e-5)
    assert np.ptp(ours) > 0.1


def test_ppo_on_one_base_learns_and_resumes_bit_for_bit(world, trained_reward, monkeypatch, capsys):
    ppo.main(ppo_options(world, "ppo"))
    steps = log(world / "ppo")
    assert "a model of its own" not in capsys.readouterr().out
    assert json.loads((world / "ppo" / "config.json").read_text())["run"]["critic"] == "reward body"
    assert abs(steps[0]["objective/kl"]) < 1e-6 < steps[-1]["objective/kl_exact"]
    assert all(row["val/ratio_first"] == 1 and row["val/decode_drift"] < 1e-4 for row in steps)

    stop_in_the_third_step(monkeypatch)
    with pytest.raises(SystemExit):
        ppo.main(ppo_options(world, "ppo-resumed"))
    ppo.main(ppo_options(world, "ppo-resumed", resume=True))
    assert log(world / "ppo-resumed") == steps
    ours, resumed = folder_tensors(world / "ppo"), folder_tensors(world / "ppo-resumed")
    jax.tree.map(np.testing.assert_array_equal, ours, resumed)
    before = load_file(world / "base" / "model.safetensors")
    assert {name for name, x in before.items() if not np.array_equal(x, ours[name])} == set(filter(has_adapter, before))


def test_a_reward_model_of_its_own_stays_one_beside_adapters(world, trained_reward, capsys):
    (world / "trained_reward" / "adapter").rename(world / "trained_reward" / "elsewhere")
    ppo.main(ppo_options(world, "whole", steps=1))
    (world / "trained_reward" / "elsewhere").rename(world / "trained_reward" / "adapter")
    assert "trained_reward has no adapter on" in capsys.readouterr().out
    assert json.loads((world / "whole" / "config.json").read_text())["run"]["critic"] == "policy body"


@pytest.mark.parametrize("rank", [0, 2])
def test_grpo_asks_for_several_answers_to_each_prompt(world, trained_reward, rank, monkeypatch):
    asked, ask = [], grpo.score_responses
    monkeypatch.setattr(grpo, "score_responses", lambda *args: asked.append(args[3]) or ask(*args))
    plan = vars(ppo_options(world, f"grpo-{rank}", steps=2, lora_rank=rank))
    plan = {name: plan[name] for name in (plan.keys() & vars(grpo.Config())) - {"clip"}}
    grpo.main(grpo.Config(**plan, group_size=4))
    steps = log(world / f"grpo-{rank}")
    assert all(row["val/ratio_first"] == 1 for row in steps) and steps[-1]["objective/kl_exact"] > 1e-7
    prompts, answers = asked[0]
    # four answers to each prompt, side by side, and not the same one
    assert all(len(set(prompts[i : i + 4])) == 1 < len(set(answers[i : i + 4])) for i in range(0, 16, 4))
    model, _ = gpt.load(world / f"grpo-{rank}")
    assert isinstance(model, gpt.GPT)


# a student of a reward model ------------------------------------------------------------------------------------------


def test_distillation_loss_by_hand():
    scores, teacher = jnp.array([[1.0, 0.0], [2.0, 3.0]]), jnp.array([[2.0, 0.0], [2.0, 1.0]])
    loss, metrics = reward.distillation_loss(scores, teacher)
    np.testing.assert_allclose(loss, ((1 + 0) / 2 + (0 + 4) / 2) / 2)
    assert metrics["agreement"] == 0.5
    np.testing.assert_allclose(reward.distillation_loss(scores, teacher, jnp.array([3.0, 1.0]))[0], (3 * 0.5 + 2) / 4)


def test_a_small_student_learns_the_scores_of_its_teacher_and_no_label(world, trained_reward, tmp_path):
    rows = [json.loads(line) for line in (world / "pairs.jsonl").open()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    for name, data in (("pairs", rows), ("pairs-heldout", rows), ("swapped", swapped)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    _, tokenizer = gpt.load(world / "base")
    shape = gpt.make_config(tokenizer.vocab_size, 16, layers=1, heads=1, dim=8)
    gpt.save(tmp_path / "small", jax.jit(partial(gpt.init, shape))(jax.random.key(0)), tokenizer)
    plan = options(world, "student", "pairs", init=str(tmp_path / "small"), teacher=str(trained_reward), suffix="",
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
    np.testing.assert_allclose([row["gap"] for row in turned], [-row["gap"] for row in steps], atol=1e-2)


def test_a_student_reads_the_score_where_its_teacher_does(world, trained_reward):
    plan = options(world, "x", "pairs", lora_rank=0, teacher=str(trained_reward), suffix=" Judge:")
    with pytest.raises(ValueError, match="reads its score after ''"):
        reward.main(reward.Config(**plan))


def test_a_critic_has_the_width_of_the_reward_model_that_it_starts_from():
    model = lambda dim: gpt.init(gpt.make_config(16, 8, 1, 2, dim), jax.random.key(0))
    policy, student = model(16), gpt.init_score_model(model(8), jax.random.key(1))
    critic, name = ppo.make_critic(policy, policy, [student], jax.random.key(2))
    assert critic.head.shape == (8,) and critic.body.config.dim == 8 and name == "reward body"
    critic, name = ppo.make_critic(policy, policy, [], jax.random.key(2))
    assert critic.head.shape == (16,) and name == "policy body"


@pytest.mark.parametrize(
    "text, message", [("{", "adapter_config.json is not JSON"), ('{"r": 2}', "adapter_config.json has no lora_alpha")]
)
def test_an_adapter_config_that_cannot_be_read_is_named(tmp_path, text, message):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        convert.main(convert.Config(tmp_path, tmp_path / "out"))
