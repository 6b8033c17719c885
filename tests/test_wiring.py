"""What each `main` hands on: noise, rows, learning rates, groups, models. The programs that compute are replaced by
recorders, so that nothing is compiled; what they compute is tested elsewhere."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_preferences

import dpo
import gpt
import grpo
import ipo_kto
import online
import ppo
import probe
import reward
import rlaif
import sft

SEED = 7


@pytest.fixture(autouse=True)
def same_mesh():
    """A script sets the mesh of the whole process: put the old one back."""
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory, words):
    """A tiny policy, and rows of every kind."""
    return test_preferences.World(tmp_path_factory.mktemp("wiring"), words)


def letters(prompts, responses, rows):
    """A reward function."""
    return [float(sum(map(ord, response)) % 7) for response in responses]


def first_number(tree) -> float:
    return float(jax.tree.leaves(tree)[0].ravel()[0])


def moved(tree):
    """As if it had learned."""
    return jax.tree.map(lambda x: x + 0.001, tree)


@pytest.fixture
def optimizers(monkeypatch):
    """[(learning rate, optimiser)] of every optimiser that a script makes, in order."""
    made, adamw = [], gpt.adamw

    def make(rate, *args, **options):
        made.append((rate, adamw(rate, *args, **options)))
        return made[-1][1]

    monkeypatch.setattr(gpt, "adamw", make)
    return made


@pytest.fixture
def sampled(monkeypatch):
    """What `gpt.generate` is asked for, one entry a call; it answers with letters that the key decides."""
    calls = []

    def generate(model, tokens, mask, key, new, **options):
        numbers = jax.random.key_data(key).tolist()
        calls.append(dict(model=first_number(model), tokens=np.asarray(tokens), key=numbers, new=new) | options)
        rows = len(tokens) * options.get("copies", 1)
        ids = np.random.default_rng([*numbers, len(calls)]).integers(3, 11, (rows, new))
        return gpt.Generation(jnp.asarray(ids, jnp.int32), jnp.ones_like(ids), jnp.zeros(ids.shape))

    monkeypatch.setattr(gpt, "generate", generate)
    return calls


def all_differ(values) -> bool:
    texts = [np.asarray(value).tobytes() for value in values]
    return len(set(texts)) == len(texts)


def check_noise(calls, steps: int):
    """Each iteration has its own key, a function of (seed, iteration)."""
    wanted = [jax.random.key_data(jax.random.fold_in(jax.random.key(SEED), i)).tolist() for i in range(steps)]
    each = len(calls) // steps
    assert [call["key"] for call in calls] == [key for key in wanted for _ in range(each)]


# ---------------------------------------------------------------------------------------------------- ppo.py, grpo.py


def settings(world, module, name, **options):
    plan = dict(
        init=world.sft, reward=(f"{__name__}:letters",), data=(world.prompts,), out=world.root / name, steps=3,
        batch_size=8, minibatch_size=4, epochs=2, prompt_length=6, response_length=5, temperature=0.7, lr=1e-3,
        gold=None, dtype="float32", seed=SEED,
    )  # fmt: skip
    return module.Config(**plan | options)


@pytest.fixture
def rollouts(monkeypatch):
    """What step 2 of ppo.py or grpo.py is given, as (policy, reference, scores), where the critic starts then, and what
    each optimiser step is."""
    asked, updates, levels = [], [], []
    metrics = {"response_length": 5.0, "objective/kl": 0.0}

    def complete(state, base, ref, batch, generation, scores, config, ref_hidden):
        policy = getattr(state, "policy", state)
        asked.append((first_number(policy), first_number(ref), np.asarray(scores)))
        levels.extend([float(state.critic.bias)] if hasattr(state, "critic") else [])
        return len(asked), metrics

    def update(which, losses):
        def step(model, opt_state, base, rollout, rows, optimizer, config):
            updates.append((which, rollout, np.asarray(rows), optimizer, gpt_count(opt_state)))
            return moved(model), opt_state, losses

        return step

    losses = {"loss/policy_avg": 0.0, "policy/approxkl_k3": 0.0, "val/ratio": 1.0}
    policy_step = update("policy", losses)

    def grpo_step(state, base, ref, rollout, rows, optimizer, config):
        policy, opt_state, losses = policy_step(*state, base, rollout, rows, optimizer, config)
        return grpo.State(policy, opt_state), losses

    for module in (ppo, grpo):
        monkeypatch.setattr(module, "complete_rollout", complete)
    monkeypatch.setattr(ppo, "update_critic", update("critic", {"loss/value_avg": 0.0}))
    monkeypatch.setattr(ppo, "update_policy", policy_step)
    monkeypatch.setattr(grpo, "update", grpo_step)
    return SimpleNamespace(asked=asked, updates=updates, levels=levels)


def gpt_count(opt_state) -> int:
    """Where the schedule of an optimiser is."""
    counts = [x for x in jax.tree_util.tree_leaves_with_path(opt_state) if "count" in str(x[0])]
    return int(counts[-1][1])


def check_loop(config, sampled, rollouts, optimizers, learners, peaks, rows=8):
    """Noise, models, minibatches and rates of three iterations; a rollout has so many `rows`, or groups of them."""
    check_noise(sampled, 3)
    assert {(call["new"], call["temperature"]) for call in sampled} == {(5, 0.7)}
    policies, refs, _ = zip(*rollouts.asked)
    assert [call["model"] for call in sampled] == list(policies)  # what is asked is what was sampled
    assert list(policies) == sorted(set(policies)) and set(refs) == {policies[0]}  # it learns, and the reference stays
    for learner, peak, (rate, optimizer) in zip(learners, peaks, optimizers, strict=True):
        mine = [update for update in rollouts.updates if update[0] == learner]
        assert [update[1] for update in mine] == [1] * 4 + [2] * 4 + [3] * 4  # each rollout twice, in two minibatches
        assert all(update[3] is optimizer for update in mine)
        if rows == 8:  # ppo.py sets where the schedule stands, since --target-kl may skip steps
            assert [update[4] for update in mine] == [0] * 4 + [4] * 4 + [8] * 4
        plan = lambda at, peak=peak: peak * (1 - 0.9 * at / 12)
        assert [float(rate(at)) for at in (0, 6, 12)] == pytest.approx([plan(0), plan(6), plan(12)])
        passes = [np.concatenate([mine[i][2], mine[i + 1][2]]) for i in range(0, 12, 2)]
        assert all(sorted(x) == list(range(rows)) for x in passes) and all_differ(passes)


def test_ppo_has_new_noise_prompts_and_minibatches_each_iteration_and_two_rates(world, sampled, rollouts, optimizers):
    config = settings(world, ppo, "ppo", critic_lr=5e-3)
    ppo.main(config)
    assert all_differ(call["tokens"] for call in sampled)
    check_loop(config, sampled, rollouts, optimizers, ("policy", "critic"), (1e-3, 5e-3))
    assert all(scores.shape == (8,) and (scores == -2).all() for _, _, scores in rollouts.asked)  # none has ended


def test_a_critic_starts_at_the_mean_of_the_first_scores_and_learns_from_there(world, sampled, rollouts):
    """From 0 a critic of scores around -13 would find fault with every EOS, where the score is paid: a policy then
    learns not to end. Each of the 4 updates of an iteration moves all weights by 0.001."""
    ppo.main(settings(world, ppo, "level"))
    first = rollouts.asked[0][2].mean()
    assert first != 0
    np.testing.assert_allclose(rollouts.levels, [first, first + 0.004, first + 0.008], rtol=1e-5)


def test_a_critics_rate_is_the_policys_where_none_is_given(world):
    gpt.start()
    assert ppo.resolve(settings(world, ppo, "x", lr=2e-3)).critic_lr == 2e-3


heard = []


def hears(prompts, responses, rows):
    """A reward function that keeps what it is told."""
    heard.extend(zip(prompts, responses, [row["kind"] for row in rows], strict=True))
    return [float(len(heard)) - i for i in range(len(rows))]


@pytest.mark.parametrize("module", [ppo, grpo])
def test_a_reward_function_reads_what_the_user_said_last_and_not_the_templates_words(
    world, sampled, rollouts, tmp_path, module
):
    turns = lambda *texts: [dict(role=role, content=x) for role, x in zip(("user", "assistant", "user"), texts)]
    rows = [{"prompt": turns(" a  b", "c", f" {x}\n "), "kind": "chat"} for x in "abcdefgh"]
    gpt.write_rows(tmp_path / "prompts.jsonl", rows)
    heard.clear()
    options = dict(group_size=2) if module is grpo else {}
    module.main(settings(world, module, f"hears-{module.__name__}", steps=1, data=(str(tmp_path / "prompts.jsonl"),),
                         reward=(f"{__name__}:hears",), prompt_length=16, **options))  # fmt: skip
    told = [prompt for prompt, _, _ in heard]
    assert (
        len(heard) == 8 and set(told) <= {f" {x}\n " for x in "abcdefgh"} and {kind for *_, kind in heard} == {"chat"}
    )
    if module is grpo:
        assert told[0::2] == told[1::2]
    assert all(set(response.split()) <= set("abcdefgh") for _, response, _ in heard)


@pytest.mark.parametrize("advantage", ["grpo", "rloo"])
def test_grpo_has_groups_that_answer_one_prompt_new_ones_each_iteration(
    world, sampled, rollouts, optimizers, advantage
):
    config = settings(world, grpo, f"grpo-{advantage}", advantage=advantage, group_size=2, missing_eos=None)
    grpo.main(config)
    check_loop(config, sampled, rollouts, optimizers, ("policy",), (1e-3,), rows=4)
    assert {(call["copies"], len(call["tokens"])) for call in sampled} == {(2, 4)}
    assert all_differ(call["tokens"] for call in sampled) and all_differ(sampled[0]["tokens"])
    assert all(scores.shape == (4, 2) for _, _, scores in rollouts.asked)


@pytest.mark.parametrize("module", [ppo, grpo])
def test_minibatches_are_new_in_every_pass_iteration_and_run(module):
    config = module.Config(batch_size=32, minibatch_size=32, epochs=3)
    rows = [r for seed in (0, 1) for step in (0, 1) for r in module.minibatches(step, replace(config, seed=seed))]
    n = 32 if module is ppo else 8  # groups of 4
    assert len(rows) == 12 and all_differ(rows) and all(sorted(r) == list(range(n)) for r in rows)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_critic_starts_as_the_reward_model_with_a_head_of_zeros(world, adapter):
    policy, base = gpt.trainable(world.model, 2 if adapter else 0, "float32", jax.random.key(0))
    body = moved(policy)
    scorer = gpt.init_score_model(gpt.attach(body, base), jax.random.key(1))
    critic, name = ppo.make_critic(policy, base, [replace(scorer, body=body)], jax.random.key(2))
    assert name == "reward body" and test_preferences.same(critic.body, body)
    assert not critic.head.any() and not critic.bias.any() and scorer.head.any()
    critic, name = ppo.make_critic(policy, base, [], jax.random.key(2))
    assert name == "policy body" and test_preferences.same(critic.body, policy) and not critic.head.any()


# ---------------------------------------------------------------------------------------------------- online.py


def test_online_dpo_has_new_noise_and_prompts_each_iteration_and_a_rate_that_falls(
    world, sampled, optimizers, monkeypatch
):
    steps = []

    def train_step(state, base, ref, batch, optimizer, config):
        steps.append((gpt.to_numpy(batch), first_number(state.policy), first_number(ref)))
        return online.State(moved(state.policy), state.opt_state), {"loss": 0.0, "objective/kl": 0.0}

    monkeypatch.setattr(online, "train_step", train_step)
    config = online.Config(
        init=world.sft, reward=f"{__name__}:letters", data=(world.prompts,), out=world.root / "online", steps=3,
        batch_size=16, minibatch_size=8, candidates=4, prompt_length=6, response_length=5, keep_truncated=True,
        lr=1e-2, warmup=2, gold=None, dtype="float32", seed=SEED,
    )  # fmt: skip
    online.main(config)
    assert len(sampled) == len(steps) == 6  # two minibatches in each of three iterations
    check_noise(sampled, 3)
    assert [call["row_numbers"].tolist() for call in sampled] == [list(range(32)), list(range(32, 64))] * 3
    assert all_differ(call["tokens"] for call in sampled)
    models, refs = [model for _, model, _ in steps], {ref for _, _, ref in steps}
    assert models == sorted(set(models)) and refs == {models[0]}
    assert [call["model"] for call in sampled] == [models[i] for i in (0, 0, 2, 2, 4, 4)]
    assert all_differ(batch["tokens"] for batch, _, _ in steps)
    ((rate, _),) = optimizers
    assert [float(rate(at)) for at in (0, 2, 4, 6)] == pytest.approx([0.5e-2, 1e-2, 0.5e-2, 0], abs=1e-9)


# -------------------------------------------------------------------------------- sft.py, reward.py, dpo.py, ipo_kto.py


def train(module, config, monkeypatch, result=None):
    """Which rows `main` hands to each training step: (batch size,) a step."""
    rows, placed, metrics, put_batch = [], [], {"loss": 0.0} | (result or {}), gpt.put_batch

    def put(batch):
        placed.append(batch.get("index"))
        return put_batch(batch)

    def train_step(state, *args):
        rows.append(next(index for index in reversed(placed) if index is not None)[:, 1])
        return type(state)(moved(state[0]), *state[1:]), dict(metrics)

    monkeypatch.setattr(gpt, "put_batch", put)
    monkeypatch.setattr(module, "train_step", train_step)
    monkeypatch.setattr(module, "report" if module is reward else "evaluate", lambda *_: {}, raising=False)
    for name in ("show_samples", "print_report"):
        monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    module.main(config)
    return rows


def demonstrations(world):
    rows = [dict(prompt="Human: a Assistant:", completion=" " + " ".join("abcdefgh"[: 1 + i % 8])) for i in range(64)]
    return test_preferences.write_rows(world.root / "demos.jsonl", rows)


KTO = {f"{kind}/{side}": 0.5 for kind in ("rewards", "logps", "share") for side in ("chosen", "rejected")}


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "kto", "reward"])
def test_each_step_has_rows_of_its_own_and_the_rate_rises_and_falls(world, optimizers, monkeypatch, name):
    plan = dict(init=world.sft, out=world.root / f"steps-{name}", steps=4, batch_size=16, length=40, lr=1e-2, seed=SEED)
    monkeypatch.setattr(ipo_kto, "z0_step", lambda *_: 0.0)
    module, more = {
        "sft": (sft, dict(data=(demonstrations(world),), warmup=2)),
        "dpo": (dpo, dict(data=(world.pairs,))),
        "ipo": (ipo_kto, dict(data=(world.pairs,), loss="ipo")),
        "kto": (ipo_kto, dict(data=(world.thumbs,), loss="kto")),
        "reward": (reward, dict(data=(world.pairs,), head_lr=5e-2, normalize_with=None, suffix="", gold=None)),
    }[name]
    rows = train(module, module.Config(**plan | more), monkeypatch, KTO if name == "kto" else None)
    assert len(rows) == 4 and sorted(np.concatenate(rows)) == list(range(64))  # an epoch
    last = 1e-3 if name == "sft" else 0  # a tenth, or nothing
    for (rate, _), peak in zip(optimizers, (1e-2, 5e-2) if name == "reward" else (1e-2,), strict=True):
        wanted = [peak / 2, peak, last] if name == "sft" else [peak, peak / 2, last]  # 4 steps have no warm-up unasked
        assert [float(rate(at)) for at in (0, 2, 4)] == pytest.approx(wanted, abs=1e-9)


def test_members_of_an_ensemble_see_the_pairs_in_their_own_order(world, monkeypatch):
    config = reward.Config(
        init=world.sft, data=(world.pairs,), out=world.root / "members", steps=4, batch_size=16, length=40, members=2,
        normalize_with=None, suffix="", gold=None, seed=SEED,
    )  # fmt: skip
    orders = train(reward, config, monkeypatch)
    assert len(orders) == 8 and all(sorted(np.concatenate(orders[i : i + 4])) == list(range(64)) for i in (0, 4))
    assert not any(sorted(a) == sorted(b) for a, b in zip(orders[:4], orders[4:]))
    heads = [gpt.load(world.root / "members" / f"member-{i}")[0].head for i in range(2)]
    assert all_differ(heads)


def test_body_and_head_of_a_reward_model_have_their_own_rates(world):
    """Adam's first step is the rate, whatever the gradient."""
    model = gpt.init_score_model(world.model, jax.random.key(0))
    grads = jax.tree.map(lambda x: jnp.full_like(x, 1e-3), model)
    for lr, head_lr in ((1e-4, 1e-2), (0.0, 1e-2)):
        optimizer = reward.make_optimizer(reward.Config(lr=lr, head_lr=head_lr), 100)
        state = optimizer.init(model)
        updates, _ = optimizer.update(grads, state, model)
        of = lambda tree: float(np.abs(jax.tree.leaves(tree)[0]).max())
        assert of(updates.head) == pytest.approx(head_lr / 10, rel=1e-2)  # the first of ten steps of warm-up
        assert of(updates.body) == pytest.approx(lr / 10, rel=1e-2)


def test_a_validation_loss_counts_each_row_once(world, monkeypatch):
    """64 rows in batches of 24: of the last batch 8 rows are repeats."""

    def eval_step(model, batch, config):
        count = batch["mask"].sum()
        return (batch["tokens"] * batch["mask"]).sum() / count, count

    monkeypatch.setattr(sft, "eval_step", eval_step)
    tokenizer = gpt.load_tokenizer(world.words)
    load = lambda size: gpt.Batches(demonstrations(world), "demos", tokenizer, size, 40, 0)
    found, wanted = (sft.evaluate(None, load(size), sft.Config())["val/loss"] for size in (24, 64))
    assert float(found) == pytest.approx(float(wanted), rel=1e-6)


@pytest.mark.parametrize("script", [reward, probe])
def test_rewards_are_normalised_on_new_samples_of_new_prompts(script, world, sampled, monkeypatch):
    monkeypatch.setattr(gpt, "score", lambda model, prompts, *_: jnp.arange(float(len(prompts))))
    config = script.Config(
        normalize_with=world.sft, normalize_data=world.prompts, normalize_samples=192, length=12, response_length=5,
        dtype="float32",
    )  # fmt: skip
    model = gpt.init_score_model(world.model, jax.random.key(0))
    found = script.normalize(model, gpt.load_tokenizer(world.words), config, jax.random.key(1))
    scores = np.tile(np.arange(64), 3)
    np.testing.assert_allclose(found.head, model.head / scores.std(), rtol=1e-6)
    np.testing.assert_allclose(found.bias, -scores.mean() / scores.std(), rtol=1e-6)
    assert [len(call["tokens"]) for call in sampled] == [64] * 3 and {call["new"] for call in sampled} == {5}
    assert all_differ(call["key"] for call in sampled) and all_differ(call["tokens"] for call in sampled)


def test_a_judge_writes_with_new_noise_in_every_batch_and_for_every_seed(world, sampled):
    config = rlaif.Config(judge=world.sft, batch_size=2, response_length=5, dtype="float32")
    judge = rlaif.LocalJudge(config)
    for seed in (0, 1):
        assert len(judge.write(["a b", "c", "d", "e"], ["\n"], seed)) == 4
    assert len(sampled) == 4 and all_differ(call["key"] for call in sampled)


def test_a_rows_margin_widens_the_gap_that_is_asked_for(world, monkeypatch):
    scores = jnp.array([[1.0, 0.0], [0.5, 1.0]])
    monkeypatch.setattr(reward, "pair_scores", lambda *_: scores)
    batch = dict(margin=jnp.array([0.5, 2.0]), weight=jnp.ones(2), label_p=jnp.ones(2))
    loss, _ = reward.batch_loss(jnp.zeros(()), batch, reward.Config(margin_scale=2.0, dtype="float32"))
    assert float(loss) == pytest.approx(np.logaddexp(0, -np.array([1 - 1, -0.5 - 4])).mean(), rel=1e-5)


def test_a_temperature_is_fitted_on_one_half_and_judged_on_the_other(monkeypatch):
    gaps, asked, texts = np.random.default_rng(0).normal(1, 1, 40), [], [(str(i), "") for i in range(80)]
    scores = np.stack([gaps, np.zeros(40)], 1)
    monkeypatch.setattr(reward, "score_pairs", lambda *_: (scores, None, np.ones((40, 2)), texts))
    fit, calibrate = reward.fit_temperature, reward.calibration
    monkeypatch.setattr(reward, "fit_temperature", lambda gaps: asked.append(gaps) or fit(gaps))
    monkeypatch.setattr(reward, "calibration", lambda gaps, T: asked.append(gaps) or calibrate(gaps, T))
    reward.report([], None, None, reward.Config(gold=None))
    fitted, before, after = asked
    np.testing.assert_allclose(sorted([*fitted, *before]), sorted(gaps))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("weights, lambdas", [((1, 1), (1, 1)), ((1, 3), (1, 2.25)), ((3, 1), (3, 1))])
def test_ktos_class_weights_are_those_of_the_mixture(weights, lambdas):
    """Two files of 100 thumbs, all up and all down: only the mixture says how many of each there are."""
    label = gpt.EXTRAS.index("label")
    thumbs = lambda up: SimpleNamespace(
        extras=np.where(np.arange(len(gpt.EXTRAS)) == label, up, 1.0) * np.ones((100, 1))
    )
    down, up = 200 * weights[0] // sum(weights), 200 * weights[1] // sum(weights)
    batches = SimpleNamespace(sets=[thumbs(0.0), thumbs(1.0)], counts=[down, up], sizes=[100, 100])
    config = ipo_kto.with_class_weights(ipo_kto.Config(loss="kto"), batches)
    assert (config.desirable_weight, config.undesirable_weight) == pytest.approx(lambdas)
    for data in batches.sets:  # of the rows of a file, the first half says nothing: as if it were not there
        data.extras[:50, gpt.EXTRAS.index("weight")] = 0
    batches.sets[0].extras[50:, gpt.EXTRAS.index("weight")] = 3  # and the others of one file count three times
    tripled = ipo_kto.with_class_weights(ipo_kto.Config(loss="kto"), batches)
    wanted = ipo_kto.class_weights(weights[1], 3 * weights[0])
    assert (tripled.desirable_weight, tripled.undesirable_weight) == pytest.approx(wanted)
    given = ipo_kto.with_class_weights(ipo_kto.Config(loss="kto", undesirable_weight=3.0), batches)
    assert (given.desirable_weight, given.undesirable_weight) == (1.0, 3.0)


# ---------------------------------------------------------------------------------------------------- gpt.py


def test_batches_of_like_length_come_in_no_order_and_two_files_share_them(world, words):
    tokenizer = gpt.load_tokenizer(words)
    rows = [dict(prompt="Human: a Assistant:", completion=" a" * (1 + i % 32)) for i in range(256)]
    files = [test_preferences.write_rows(world.root / f"long{i}.jsonl", rows) for i in range(2)]
    batches = gpt.Batches(files, "demos", tokenizer, 16, 64, 0)
    epochs = [[batches(32 * epoch + step) for step in range(32)] for epoch in range(2)]
    longest = [[int(batch["segments"].sum(1).max()) for batch in epoch] for epoch in epochs]
    for lengths in longest:
        assert lengths != sorted(lengths) and np.corrcoef(lengths, range(32))[0, 1] < 0.5
        assert max(int(np.ptp(batch["segments"].sum(1))) for batch in epochs[0]) <= 4  # alike within one
    assert longest[0] != longest[1]
    prompts = gpt.Batches(files, "prompts", tokenizer, 16, 64, 0)
    for batches in epochs[0], [prompts(step) for step in range(32)]:
        assert np.mean([len(set(batch["index"][:, 0])) == 2 for batch in batches]) > 0.9
    # 64 of the first file's 256 rows in an epoch of 512: which ones, the seed says
    mixture = lambda seed: gpt.Batches([f"{files[0]}:1", f"{files[1]}:7"], "prompts", tokenizer, 16, 64, seed)
    picks = [np.concatenate([mixture(seed)(step)["index"] for step in range(32)]) for seed in (0, 1)]
    first = [sorted(rows[rows[:, 0] == 0, 1]) for rows in picks]
    assert len(first[0]) == len(first[1]) == 64 and first[0] != first[1]


def test_a_fresh_model_has_smaller_weights_where_layers_add_to_the_stream():
    shape = gpt.make_config(vocab_size=64, context=8, layers=8, heads=2, dim=64)
    model = jax.jit(lambda key: gpt.init(shape, key))(jax.random.key(0))
    std = {name: float(getattr(model.blocks, name).weight.std()) for name in ("q", "k", "v", "gate", "up", "o", "down")}
    assert std == pytest.approx(dict.fromkeys(std, 0.02) | dict.fromkeys(("o", "down"), 0.02 / 4), rel=0.05)
