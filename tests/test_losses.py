"""Losses and estimators of sft.py, reward.py, ppo.py, grpo.py against numbers by hand, brute force and enumeration."""

import inspect
import itertools
import json
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpt
import grpo
import ppo
import reward
import sft
import toy

EOS, PAD = 0, 6
CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


def bt(d):
    """-log sigmoid(d), written another way than the shipped one."""
    return np.logaddexp(0, -np.asarray(d, float))


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# compiled as a whole: one by one, their operations take longer to compile
mean_loss = jax.jit(sft.mean_loss, static_argnums=2)
bradley_terry = jax.jit(reward.bradley_terry_loss)
token_rewards, gae, whiten = jax.jit(ppo.token_rewards), jax.jit(ppo.gae), jax.jit(ppo.whiten)
policy_loss, value_loss = jax.jit(ppo.policy_loss), jax.jit(ppo.value_loss)
forward = jax.jit(ppo.policy_forward, static_argnums=2)
hidden = jax.jit(lambda model, tokens, segments=None: model(tokens, segments))
score = jax.jit(lambda model, tokens, mask: model(tokens, mask))
value_and_grad = jax.jit(gpt.gradients, static_argnums=(0, 3, 4))


def noisy(config, seed, scale=0.3):
    """A random model whose distributions are far from uniform."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(partial(gpt.init, config), jax.random.key(0))
    centre = lambda path: 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
    leaf = lambda path, x: jnp.asarray(centre(path) + scale * rng.normal(size=x.shape), jnp.float32)
    return jax.tree_util.tree_map_with_path(leaf, shapes)


# ---------------------------------------------------------------------------------------------------- sft.py


def test_sft_loss_is_a_mean_over_tokens_or_over_rows(x64):
    logprobs = jnp.array([[-1.0, -2.0, -3.0], [-4.0, -5.0, -6.0], [-7.0, -np.inf, np.nan]])
    mask = jnp.array([[1, 1, 0], [0, 0, 1], [0, 0, 0]])  # the last row has nothing scored, and must not count
    assert mean_loss(-logprobs, mask, "token") == 3.0  # (1 + 2 + 6) / 3
    assert mean_loss(-logprobs, mask, "sequence") == 3.75  # (1.5 + 6) / 2
    assert mean_loss(-logprobs, 0 * mask, "token") == 0.0


def test_sft_loss_gradient_is_minus_mask_over_count(x64):
    mask = jnp.array([[1, 1, 0], [0, 0, 1]])
    logprobs, loss = -jnp.ones((2, 3)), lambda logprobs, *rest: mean_loss(-logprobs, *rest)
    np.testing.assert_allclose(jax.grad(loss)(logprobs, mask), -mask / 3)
    np.testing.assert_allclose(jax.grad(loss)(logprobs, mask, "sequence"), -mask / np.array([[4], [2]]))


def sft_batch():
    tokens = np.random.default_rng(0).integers(1, 6, (4, 6)).astype(np.int32)
    lengths, prompts = np.array([6, 3, 5, 4]), np.array([1, 2, 2, 3])
    index = np.arange(6)
    segments = (index < lengths[:, None]).astype(np.int32)
    mask = segments * (index >= prompts[:, None])
    return dict(tokens=jnp.asarray(tokens), segments=jnp.asarray(segments), mask=jnp.asarray(mask))


def test_sft_micro_batches_of_unequal_token_counts_equal_one_big_batch():
    model, batch = noisy(gpt.make_config(7, 8, 1, 2, 16), 0), sft_batch()
    config = sft.Config(dtype="float32")
    loss_fn, count = partial(sft.batch_loss, config=config), partial(sft.count_items, config=config)
    (one, _), grads = value_and_grad(loss_fn, model, batch)
    (two, _), other = value_and_grad(loss_fn, model, batch, 2, count)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grads, other)
    assert count(batch) == batch["mask"].sum() and sft.count_items(batch, replace(config, reduction="sequence")) == 4


def test_sft_scores_the_completion_and_its_end_but_not_the_prompt():
    """What the loss reads as labels: the tokens that the mask marks, each predicted from the position before it."""
    model, batch = noisy(gpt.make_config(7, 8, 1, 2, 16), 0), sft_batch()
    loss = jax.jit(partial(sft.batch_loss, config=sft.Config(dtype="float32")))(model, batch)[0]
    total = count = 0.0
    for ids, real, scored in zip(*(np.asarray(batch[k]) for k in ("tokens", "segments", "mask"))):
        n = real.sum()
        logits = np.asarray(model.logits(hidden(model, ids[None, :n])))[0].astype(float)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total -= sum(logp[t - 1, ids[t]] for t in range(1, n) if scored[t])
        count += scored.sum()
    np.testing.assert_allclose(loss, total / count, **CLOSE)


def test_loss_on_all_scores_prompts_too_but_no_padding():
    batch, config = sft_batch(), sft.Config(loss_on="all")
    assert (batch["mask"] != batch["segments"]).any()
    np.testing.assert_array_equal(sft.set_scored(batch, "demos", config)["mask"], batch["segments"])
    assert sft.set_scored(batch, "text", config) is sft.set_scored(batch, "demos", sft.Config()) is batch


@pytest.mark.parametrize("kind, given", [("demos", [[4], [5, 6, 7]]), ("text", [[4, 1, 2, 3, 1, 2, 3, 1]] * 2)])
def test_samples_continue_a_prompt_of_any_length_or_the_first_8_tokens_of_a_text(kind, given, monkeypatch):
    tokens = np.array([[4, 1, 2, 3, 1, 2, 3, 1, 2]] * 2)
    mask = np.ones_like(tokens)
    for i, prompt in enumerate(given):
        tokens[i, : len(prompt)], mask[i, : len(prompt) if kind == "demos" else 1] = prompt, 0
    answer = lambda model, prompts, mask, key, new, **_: SimpleNamespace(tokens=prompts[:, -1:], mask=mask[:, -1:])
    monkeypatch.setattr(gpt, "generate", answer)  # says the prompt's last token again
    decode_rows = lambda tokens, mask: [ids[m > 0].tolist() for ids, m in zip(tokens, mask)]
    tokenizer, shown = SimpleNamespace(pad_id=0, end_ids=(9,), decode_rows=decode_rows), []
    run, batch = SimpleNamespace(sample=lambda step, **record: shown.append(record)), dict(tokens=tokens, mask=mask)
    sft.show_samples(run, 0, None, batch, kind, tokenizer, None, sft.Config())
    assert shown == [dict(prompt=prompt, sample=prompt[-1:]) for prompt in given]


def test_distillation_is_the_kl_from_teacher_to_student_and_zero_when_they_agree():
    shape = gpt.make_config(7, 8, 1, 2, 16)
    teacher, student, batch = noisy(shape, 0), noisy(shape, 1), sft_batch()
    config = sft.Config(dtype="float32")
    loss = jax.jit(lambda student: sft.batch_loss(student, batch, config, teacher)[0])
    assert abs(loss(teacher)) < 1e-6
    log_softmax = lambda m: np.asarray(jax.nn.log_softmax(m.logits(hidden(m, batch["tokens"], batch["segments"]))))
    p, q = log_softmax(teacher)[:, :-1], log_softmax(student)[:, :-1]
    mask = np.asarray(batch["mask"])[:, 1:]
    expected = ((np.exp(p) * (p - q)).sum(-1) * mask).sum() / mask.sum()
    np.testing.assert_allclose(loss(student), expected, **CLOSE)


# ---------------------------------------------------------------------------------------------------- reward.py

CHOSEN, REJECTED = np.array([1.0, 0.5, -2.0, 0.3]), np.array([0.0, 0.5, 1.0, -0.4])


def bt_loss(chosen, rejected, *args, **options):
    return float(bradley_terry(jnp.asarray(chosen), jnp.asarray(rejected), *args, **options)[0])


def test_bradley_terry_by_hand_and_its_metrics():
    loss, metrics = bradley_terry(jnp.asarray(CHOSEN), jnp.asarray(REJECTED))
    np.testing.assert_allclose(loss, bt(CHOSEN - REJECTED).mean(), **CLOSE)
    assert metrics["accuracy"] == 0.5  # the tie is an error
    np.testing.assert_allclose(metrics["gap"], np.mean(CHOSEN - REJECTED), **CLOSE)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean([CHOSEN, REJECTED]), **CLOSE)
    assert (metrics["min_reward"], metrics["max_reward"]) == (-2, 1)


def test_bradley_terry_margin_asks_for_a_wider_gap():
    margin = np.array([0.5, 1.0, 0.0, 2.0])
    ours = bt_loss(CHOSEN, REJECTED, jnp.asarray(margin))
    np.testing.assert_allclose(ours, bt(CHOSEN - REJECTED - margin).mean(), **CLOSE)
    assert ours > bt_loss(CHOSEN, REJECTED)
    assert abs(ours - bt(CHOSEN - REJECTED + margin).mean()) > 0.1  # what the wrong sign gives


@pytest.mark.parametrize("smoothing", [0.1, np.array([0.0, 0.3, 0.5, 1.0])])
def test_bradley_terry_label_smoothing_mixes_both_orders(smoothing):
    d = CHOSEN - REJECTED
    expected = np.mean((1 - smoothing) * bt(d) + smoothing * bt(-d))
    np.testing.assert_allclose(bt_loss(CHOSEN, REJECTED, label_smoothing=smoothing), expected, **CLOSE)


def test_bradley_terry_soft_label_has_its_optimum_at_logit_p():
    p = jnp.array([0.2, 0.5, 0.7, 0.95])
    loss = lambda d, p: bradley_terry(d, jnp.zeros_like(d), label_smoothing=1 - p)[0]
    best = jnp.log(p / (1 - p))
    np.testing.assert_allclose(jax.grad(loss)(best, p), 0, atol=1e-6)
    assert loss(best, p) < min(loss(best + 0.1, p), loss(best - 0.1, p))
    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(4), p), (sigmoid(1.0) - p) / 4, **CLOSE)


def test_bradley_terry_center_is_the_squared_sum_and_weight_weighs_pairs():
    weight, losses = np.array([1.0, 0.0, 2.0, 0.5]), bt(CHOSEN - REJECTED) + 0.01 * (CHOSEN + REJECTED) ** 2
    np.testing.assert_allclose(bt_loss(CHOSEN, REJECTED, center=0.01), losses.mean(), **CLOSE)
    ours = bt_loss(CHOSEN, REJECTED, center=0.01, weight=jnp.asarray(weight))
    np.testing.assert_allclose(ours, np.average(losses, weights=weight), **CLOSE)


def test_bradley_terry_ignores_a_shift_and_both_orders_cost_at_least_two_ln_2():
    np.testing.assert_allclose(bt_loss(CHOSEN + 7, REJECTED + 7), bt_loss(CHOSEN, REJECTED), **CLOSE)
    for c, r in zip(CHOSEN, REJECTED):
        assert bt_loss([c], [r]) + bt_loss([r], [c]) >= 2 * np.log(2) - 1e-6
    np.testing.assert_allclose(2 * bt_loss([0.4], [0.4]), 2 * np.log(2), **CLOSE)


def test_bradley_terry_gradient():
    loss = lambda c, r: bradley_terry(c, r)[0]
    to_chosen, to_rejected = jax.grad(loss, argnums=(0, 1))(jnp.asarray(CHOSEN), jnp.asarray(REJECTED))
    np.testing.assert_allclose(to_chosen, -sigmoid(REJECTED - CHOSEN) / 4, **CLOSE)
    np.testing.assert_allclose(to_rejected, sigmoid(REJECTED - CHOSEN) / 4, **CLOSE)


def test_bradley_terry_stays_finite_at_huge_differences():
    assert (bt_loss([1000.0], [0.0]), bt_loss([0.0], [1000.0])) == (0, 1000)
    grad = jax.grad(lambda c: bradley_terry(c, jnp.zeros(2), label_smoothing=0.1)[0])
    np.testing.assert_allclose(grad(jnp.array([1000.0, -1000.0])), [0.05, -0.45], **CLOSE)


def pair_batch(label_p):
    rng = np.random.default_rng(3)
    groups = []
    for lengths in ((6, 4), (3, 5), (6, 6), (4, 4)):  # two tokens of each are the prompt
        prompt = rng.integers(1, 6, 2)
        sides = [np.concatenate([prompt, rng.integers(1, 6, n - 2)]) for n in lengths]
        groups.append([(ids, (np.arange(len(ids)) > 1).astype(int)) for ids in sides])
    extras = dict(
        margin=jnp.zeros(4), weight=jnp.array([1.0, 2.0, 1.0, 0.5]), label_p=jnp.asarray(label_p, jnp.float32)
    )
    return jax.tree.map(jnp.asarray, gpt.fork(groups, 0, (12, 4))) | extras


def test_reward_loss_puts_chosen_first_and_smooths_soft_labels_evenly():
    model = gpt.init_score_model(noisy(gpt.make_config(7, 8, 1, 2, 16), 0), jax.random.key(1))
    p = np.array([1.0, 0.0, 0.5, 0.8])
    batch, e = pair_batch(p), 0.1
    config = reward.Config(dtype="float32", label_smoothing=e)
    loss = jax.jit(partial(reward.batch_loss, config=config))(model, batch)[0]
    sides = [[t[(s == 1) | (s == side)][None] for side in (2, 3)] for t, s in zip(batch["tokens"], batch["segments"])]
    d = np.array([float(jnp.subtract(*(score(model, ids, jnp.ones_like(ids))[0] for ids in pair))) for pair in sides])
    target = p * (1 - e) + (1 - p) * e  # a label that is wrong with probability e
    expected = np.average(target * bt(d) + (1 - target) * bt(-d), weights=batch["weight"])
    np.testing.assert_allclose(loss, expected, **CLOSE)


def test_reward_micro_batches_of_unequal_weights_and_lengths_equal_one_big_batch():
    model = gpt.init_score_model(noisy(gpt.make_config(7, 8, 1, 2, 16), 0), jax.random.key(1))
    loss_fn = partial(reward.batch_loss, config=reward.Config(dtype="float32"))
    count, batch = lambda batch: batch["weight"].sum(), pair_batch([1, 1, 1, 1])
    (one, _), grads = value_and_grad(loss_fn, model, batch)
    (two, _), other = value_and_grad(loss_fn, model, batch, 2, count)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), grads, other)


def test_reward_margin_scale_of_zero_ignores_the_margins():
    model = gpt.init_score_model(noisy(gpt.make_config(7, 8, 1, 2, 16), 0), jax.random.key(1))
    batch, config = pair_batch([1, 1, 1, 1]), reward.Config(dtype="float32", margin_scale=0.0)
    rated = batch | {"margin": jnp.arange(4.0)}
    np.testing.assert_allclose(reward.batch_loss(model, rated, config)[0], reward.batch_loss(model, batch, config)[0])


@pytest.mark.parametrize("members", [1, 2])
def test_reward_overwrite_leaves_nothing_of_an_earlier_ensemble_or_model(members, tmp_path):
    single = ("model.safetensors", "config.json", "report.json", "report.md", "reward.png")
    for name in ("member-0/config.json", "member-1/config.json", *single):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        reward.empty_out(reward.Config(out=tmp_path, members=members))
    reward.empty_out(reward.Config(out=tmp_path, members=members, resume=True))
    assert len(list(tmp_path.iterdir())) == 7
    reward.empty_out(reward.Config(out=tmp_path, members=members, overwrite=True))
    assert not list(tmp_path.iterdir())


def known_differences(T):
    """Score differences T times as wide as they should be: of pairs with logit u, sigmoid(u) go the right way."""
    return T * np.log([3, 3, 3, 1 / 3] + [9] * 9 + [1 / 9] + [1.0] * 4)


@pytest.mark.parametrize("T", [0.4, 1.0, 2.5])
def test_fit_temperature_recovers_the_scale(T):
    d = known_differences(T)
    found = reward.fit_temperature(d)
    np.testing.assert_allclose(found, T, rtol=1e-6)
    assert np.array_equal(d / found > 0, d > 0)  # accuracy is unchanged


def test_fit_temperature_is_capped_at_both_ends():
    assert reward.fit_temperature([1.0, 2.0]) == 0.01  # always right: as sharp as allowed
    assert reward.fit_temperature([1.0, -1.0, -2.0]) == 100.0  # worse than chance: as flat as allowed
    assert reward.fit_temperature([1.0, 2.0], low=0.5) == 0.5


def test_expected_calibration_error_by_hand_with_bins_open_below_and_closed_above():
    ece = reward.expected_calibration_error
    # (0, .1] holds .05 and .1, (.1, .2] holds .15, (.9, 1] holds 1
    np.testing.assert_allclose(ece([0.05, 0.1, 0.15, 1.0], [0, 1, 1, 1]), (2 * abs(0.5 - 0.075) + 0.85 + 0) / 4)
    np.testing.assert_allclose(ece([0.0, 1.0], [0, 1]), 0)
    np.testing.assert_allclose(ece([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 0, 0, 0, 1]), 0)  # perfectly calibrated
    np.testing.assert_allclose(ece([1.0, 1.0], [0, 0]), 1)
    np.testing.assert_allclose(ece([0.2, 0.4], [0, 1], bins=2), abs(0.5 - 0.3))


def test_reliability_rows_hold_mean_p_mean_y_and_share():
    rows = reward.reliability([0.05, 0.1, 0.95], [0, 1, 1])
    np.testing.assert_allclose(rows, [(0.075, 0.5, 2 / 3), (0.95, 1.0, 1 / 3)])


def test_calibration_presents_pairs_in_random_order():
    d = np.log(3) * np.repeat([1.0, -1.0], [7500, 2500])  # P = 0.75, right in 75%
    good, sharp = reward.calibration(d, 1.0), reward.calibration(3 * d, 1.0)
    assert good["ece"] < 0.02 < 0.15 < sharp["ece"]  # with the chosen side always first it would be 0.375
    np.testing.assert_allclose(good["nll"], bt(d).mean())
    np.testing.assert_allclose(good["brier"], 0.75 * 0.25**2 + 0.25 * 0.75**2)
    np.testing.assert_allclose(reward.calibration(3 * d, 3.0)["nll"], good["nll"])


# ---------------------------------------------------------------------------------------------------- scores as trained


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, value in toy.tokenizer_files().items():
        (folder / name).write_text(json.dumps(value))
    return gpt.load_tokenizer(folder)


JUDGE = "\n\nJudge: right"
ROWS = [  # the third prompt leaves no room for all of the first answer: it is cut, and has no EOS
    {"prompt": "what is the fox ?", "chosen": "red .", "rejected": "the fox is blue ."},
    {"prompt": "hello", "chosen": "hello , how can i help you ?", "rejected": "go away ."},
    {"prompt": "tell me where the fox lives .", "chosen": "the fox lives in the forest .", "rejected": "forest"},
]


@pytest.mark.parametrize("pool, suffix", [("last", ""), ("mean", ""), *((p, JUDGE) for p in ("last", "attention"))])
def test_scores_of_samples_equal_scores_of_training_rows(tokenizer, pool, suffix):
    suffix = tokenizer.encode(suffix)
    length = 12 + len(suffix)
    model = gpt.init_score_model(
        noisy(gpt.make_config(tokenizer.vocab_size, 32, 1, 2, 16), 0), jax.random.key(1), pool, suffix
    )
    if pool == "attention":
        model = replace(model, query=jax.random.normal(jax.random.key(2), (16,)))

    sequences = [s for row in ROWS for s in gpt.encode_row(row, "pairs", tokenizer, length, suffix)]
    tokens = np.full((len(sequences), length), tokenizer.pad_id, np.int32)
    segments = np.zeros_like(tokens)
    for i, (ids, _) in enumerate(sequences):  # as in training: padded on the right
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    trained = score(model, jnp.asarray(tokens), jnp.asarray(segments))

    Q, T = 9, 10
    prompts, responses = np.full((len(sequences), Q), tokenizer.pad_id), np.full((len(sequences), T), tokenizer.pad_id)
    prompt_mask, mask = np.zeros_like(prompts), np.zeros_like(responses)
    texts = [(row["prompt"], row[side]) for row in ROWS for side in ("chosen", "rejected")]
    cut = 0
    for i, (prompt, answer) in enumerate(texts):  # as sampled: the prompt padded on the left, the response on the right
        p, a = tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.eos_id]
        cut += len(a) > 12 - len(p)
        a = a[: 12 - len(p)]
        prompts[i, Q - len(p) :], prompt_mask[i, Q - len(p) :] = p, 1
        responses[i, : len(a)], mask[i, : len(a)] = a, 1
    args = (jnp.asarray(x, jnp.int32) for x in (prompts, prompt_mask, responses, mask))
    assert cut == 1 and len(np.unique(np.round(trained, 4))) == len(texts)
    np.testing.assert_allclose(gpt.score(model, *args, tokenizer.end_ids), trained, **CLOSE)


# ------------------------------------------------------------------------------------------------- ppo.py, estimators


def ragged(seed=0, B=6, T=5):
    """Rewards, values and a right-padded mask."""
    rng = np.random.default_rng(seed)
    mask = (np.arange(T) < rng.integers(1, T + 1, (B, 1))).astype(int)
    mask[0], mask[1] = 1, np.arange(T) < 1
    return rng.normal(size=(B, T)), rng.normal(size=(B, T)), mask


def brute_force_gae(rewards, values, mask, gamma, lam):
    out = np.zeros_like(rewards)
    for b in range(len(rewards)):
        n = mask[b].sum()
        v = [*values[b, :n], 0.0]
        delta = [rewards[b, t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            out[b, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    return out


def test_token_rewards_put_the_score_on_the_last_real_token_and_charge_for_kl(x64):
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]])  # ended early; cut at full length; a single token
    new = jnp.log(jnp.array([[0.5, 0.2, 0.9], [0.1, 0.3, 0.4], [0.6, 0.1, 0.1]]))
    ref = jnp.log(jnp.array([[0.25, 0.4, 0.1], [0.1, 0.1, 0.8], [0.3, 0.9, 0.9]]))
    ours = token_rewards(jnp.array([10.0, 20.0, 30.0]), new, ref, mask, 0.5)
    h = 0.5 * np.log(2)
    expected = [[-h, 10 + h, 0], [0, -0.5 * np.log(3), 20 + h], [30 - h, 0, 0]]
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_token_rewards_ignore_what_is_masked(x64):
    mask = jnp.array([[1, 1, 0, 0]])
    new, ref = jnp.array([[-1.0, -2.0, np.nan, -np.inf]]), jnp.array([[-1.5, -1.0, 3.0, -np.inf]])
    np.testing.assert_allclose(token_rewards(jnp.array([1.0]), new, ref, mask, 0.1), [[-0.05, 1.1, 0, 0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (0.97, 1.0)])
def test_gae_equals_the_double_sum(x64, gamma, lam):
    rewards, values, mask = ragged()
    advantages, returns = gae(*map(jnp.asarray, (rewards, values, mask)), gamma, lam)
    expected = brute_force_gae(rewards, values, mask, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, expected + values * mask, atol=1e-12)


def test_gae_at_lam_1_returns_rewards_to_go_and_at_lam_0_one_step_targets(x64):
    rewards, values, mask = ragged(1)
    run = lambda values, lam: gae(*map(jnp.asarray, (rewards, values, mask)), 1.0, lam)
    to_go = np.cumsum((rewards * mask)[:, ::-1], 1)[:, ::-1] * mask
    np.testing.assert_allclose(run(values, 1.0)[1], to_go, atol=1e-12)
    np.testing.assert_allclose(run(5 * values + 3, 1.0)[1], to_go, atol=1e-12)  # whatever the critic says
    next_values = np.pad((values * mask)[:, 1:], ((0, 0), (0, 1)))
    np.testing.assert_allclose(run(values, 0.0)[1], (rewards + next_values) * mask, atol=1e-12)


def test_gae_does_not_see_padding(x64):
    rewards, values, mask = ragged(2)
    clean = gae(*map(jnp.asarray, (rewards, values, mask)))
    junk = [jnp.asarray(np.where(mask > 0, x, 1e6)) for x in (rewards, values)]
    longer = [jnp.asarray(np.pad(x, ((0, 0), (0, 3)), constant_values=c)) for x, c in zip((*junk, mask), (7, 7, 0))]
    for ours, dirty, padded in zip(clean, gae(*junk, jnp.asarray(mask)), gae(*longer)):
        assert np.array_equal(ours, dirty)
        assert np.array_equal(np.pad(ours, ((0, 0), (0, 3))), padded)


def test_whiten_by_the_population_variance_of_real_tokens(x64):
    x, _, mask = ragged(3)
    x = 3 * x + 2
    real = x[mask > 0]
    white = np.asarray(whiten(jnp.asarray(x), jnp.asarray(mask)))
    np.testing.assert_allclose(white[mask > 0], (real - real.mean()) / real.std(), atol=1e-7)
    assert abs(white[mask > 0].std() - 1) < 1e-7 < abs(white[mask > 0].std(ddof=1) - 1)
    assert not white[mask == 0].any()
    junk = whiten(jnp.asarray(np.where(mask > 0, x, np.nan)), jnp.asarray(mask))
    assert np.array_equal(junk, white)


RATIOS, ADVANTAGES = np.array([[1.5, 0.5, 1.5, 0.5, 9.0]]), np.array([[1.0, 1.0, -1.0, -1.0, 5.0]])
FIRST_FOUR = jnp.array([[1, 1, 1, 1, 0]])


def test_policy_loss_by_hand(x64):
    old = -np.ones((1, 5))
    loss, metrics = policy_loss(jnp.asarray(old + np.log(RATIOS)), old, ADVANTAGES, FIRST_FOUR, 0.2)
    np.testing.assert_allclose(loss, (-1.2 - 0.5 + 1.5 + 0.8) / 4)
    assert metrics["policy/clipfrac_avg"] == 0.5  # the first and the last: where clipping is what counts
    r = RATIOS[0, :4]
    np.testing.assert_allclose(metrics["val/ratio"], 1.0)
    np.testing.assert_allclose(metrics["val/ratio_var"], 0.25)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], np.mean(np.log(r) ** 2) / 2)
    np.testing.assert_allclose(metrics["policy/approxkl_k3"], np.mean(r - 1 - np.log(r)))


def test_policy_loss_has_no_gradient_where_the_clip_holds(x64):
    old = -np.ones((1, 5))
    grad = jax.grad(lambda lp: policy_loss(lp, old, ADVANTAGES, FIRST_FOUR, 0.2)[0])
    np.testing.assert_allclose(grad(jnp.asarray(old + np.log(RATIOS))), [[0, -0.5 / 4, 1.5 / 4, 0, 0]])
    # at ratio 1, plain policy gradient
    np.testing.assert_allclose(grad(jnp.asarray(old)), -ADVANTAGES * np.asarray(FIRST_FOUR) / 4)


def test_policy_loss_ignores_nan_in_padding(x64):
    old = jnp.array([[-1.0, np.nan]])
    loss = lambda lp: policy_loss(lp, old, jnp.array([[2.0, 0.0]]), jnp.array([[1, 0]]))[0]
    assert loss(jnp.array([[-1.0, np.inf]])) == -2
    np.testing.assert_allclose(jax.grad(loss)(jnp.array([[-1.0, np.nan]])), [[-2, 0]])


def test_k3_never_goes_below_zero_in_fp32():
    new = jnp.float32(-1) + jnp.asarray(np.logspace(-9, 0, 60), jnp.float32)
    one = jnp.ones((1, 1))
    k3 = jax.vmap(lambda x: policy_loss(x * one, -one, one, one)[1]["policy/approxkl_k3"])
    both = k3(jnp.concatenate([new, -2 - new]))
    assert (both >= 0).all() and (both > 0).mean() > 0.5


def test_value_loss_by_hand(x64):
    values, old = jnp.array([[1.0, 0.5, 1.0, 9.0]]), jnp.array([[0.0, 0.4, 0.0, 9.0]])
    returns, mask = jnp.array([[0.5, 2.0, 1.0, -9.0]]), jnp.array([[1, 1, 1, 0]])
    # clipped values are 0.2, 0.5, 0.2: the second did not move far, the third is held where it is worse
    loss, metrics = value_loss(values, old, returns, mask, 0.2)
    np.testing.assert_allclose(loss, 0.5 * (0.25 + 2.25 + 0.64) / 3)
    np.testing.assert_allclose(metrics["val/clipfrac_avg"], 1 / 3)
    half_mse = 0.5 * (0.25 + 2.25 + 0) / 3
    np.testing.assert_allclose(value_loss(values, old, returns, mask, np.inf)[0], half_mse)
    grad = jax.grad(lambda v: value_loss(v, old, returns, mask, np.inf)[0])(values)
    np.testing.assert_allclose(grad, (values - returns) * mask / 3)


def test_combine_scores_mean_worst_and_uwo(x64):
    scores = jnp.array([[1.0, 4.0], [3.0, 4.0]])
    combine = lambda how, s=scores: np.asarray(ppo.combine_scores(s, how, 0.5))
    np.testing.assert_allclose(combine("mean"), [2, 4])
    np.testing.assert_allclose(combine("worst"), [1, 4])
    np.testing.assert_allclose(combine("uwo"), [2 - 0.5 * 1, 4])  # population variance 1, sample variance 2
    twins = jnp.stack([scores[0]] * 3)
    for how in ("mean", "worst", "uwo"):
        np.testing.assert_allclose(combine(how, twins), scores[0])


def test_explained_variance(x64):
    returns, _, mask = ragged(4)
    ev = lambda values: float(ppo.explained_variance(jnp.asarray(values), jnp.asarray(returns), jnp.asarray(mask)))
    assert ev(returns) == pytest.approx(1) and ev(returns + 5) == pytest.approx(1)
    assert ev(0 * returns + 3) == pytest.approx(0, abs=1e-6)
    assert ev(np.where(mask > 0, 0.5 * returns, 1e6)) == pytest.approx(0.75, abs=1e-6)


# ------------------------------------------------------------------------------------------------- KL, by enumeration


def test_kl_estimates_on_three_tokens(x64):
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])
    kl, reverse = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    draws = np.repeat(np.arange(3), [5, 3, 2])[:, None]  # exactly as often as p says
    lp, lq, one = jnp.log(p)[draws], jnp.log(q)[draws], jnp.ones_like(draws)
    k1 = -token_rewards(jnp.zeros(10), lp, lq, one, 1.0).mean()
    metrics = policy_loss(lq, lp, 0.0 * lp, one)[1]  # samples of p, moved to q
    np.testing.assert_allclose(k1, kl)
    np.testing.assert_allclose(metrics["policy/approxkl_k3"], kl)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], (p * np.log(p / q) ** 2).sum() / 2)
    assert min(abs(kl - reverse), abs(kl - (p * np.log(p / q) ** 2).sum() / 2)) > 1e-3  # the test can tell them apart


TINY = gpt.make_config(3, 8, 1, 2, 16)


def test_rollout_metrics_are_the_kl_and_entropy_of_the_enumerated_distribution():
    policy, ref = noisy(TINY, 0), noisy(TINY, 1)
    state = ppo.State(policy, (), gpt.init_score_model(policy, jax.random.key(0), zero=True), ())
    config = ppo.Config(dtype="float32", temperature=0.7, beta=0.3)
    prompt = dict(tokens=jnp.array([[2, 1, 2]]), mask=jnp.array([[0, 1, 1]]))
    expected = dict.fromkeys(("objective/kl", "objective/kl_k3", "objective/kl_exact", "objective/entropy"), 0.0)
    total, kl, entropy = 0.0, 0.0, 0.0
    for tokens in [(0, 2), *itertools.product((1, 2), (0, 1, 2))]:  # every response of at most two tokens
        mask = jnp.array([[1, int(tokens[0] != 0)]])
        generation = gpt.Generation(jnp.array([tokens]), mask, jnp.zeros((1, 2)))
        rollout, metrics = ppo.complete_rollout(state, None, ref, prompt, generation, jnp.zeros(1), config)
        lp, lr = (float((x * mask).sum()) for x in (rollout.logprobs, rollout.ref_logprobs))
        total, kl, entropy = total + np.exp(lp), kl + np.exp(lp) * (lp - lr), entropy - np.exp(lp) * lp
        assert metrics["objective/kl_exact"] > 0 and metrics["objective/kl_k3"] > 0
        for name in expected:
            expected[name] += np.exp(lp) * float(metrics[name])
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert kl > 0.05
    for name, value in expected.items():
        np.testing.assert_allclose(value, entropy if "entropy" in name else kl, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- ppo.py, on a model


@lru_cache
def world(temperature=1.0):
    """A tiny policy, reference and critic, a batch of left-padded prompts, samples, and the configuration."""
    shape = gpt.make_config(7, 16, 1, 2, 16)
    policy, ref, critic = noisy(shape, 0), noisy(shape, 1), gpt.init_score_model(noisy(shape, 2), jax.random.key(3))
    config = ppo.Config(dtype="float32", temperature=temperature, batch_size=8, minibatch_size=4, beta=0.1)
    rng = np.random.default_rng(0)
    segments = (np.arange(4) >= rng.integers(0, 4, (8, 1))).astype(np.int32)
    tokens = np.where(segments, rng.integers(1, 6, (8, 4)), PAD).astype(np.int32)
    batch = dict(tokens=jnp.asarray(tokens), mask=jnp.asarray(segments))
    generation = gpt.generate(
        policy, batch["tokens"], batch["mask"], jax.random.key(4), 5, ends=(EOS,), pad=PAD, temperature=temperature
    )
    assert 8 < generation.mask.sum() < 40  # some end early, some go on
    state = ppo.State(policy, SGD.init(policy), critic, SGD.init(critic))
    return state, ref, batch, generation, config


def update(state, base, rollout, rows, config):
    """One step of policy and critic on these rows; the state that is given stays as it is."""
    state = copy(state)
    critic, critic_opt, metrics = ppo.update_critic(state.critic, state.critic_opt, base, rollout, rows, SGD, config)
    policy, policy_opt, more = ppo.update_policy(state.policy, state.policy_opt, base, rollout, rows, SGD, config)
    return ppo.State(policy, policy_opt, critic, critic_opt), metrics | more


def copy(tree):  # updates donate their state
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), tree)


SGD = optax.sgd(1.0)  # the step is the gradient
SCORES = jnp.asarray(np.random.default_rng(5).normal(size=8), jnp.float32)
FOUR = np.array([6, 1, 3, 4])


def test_first_minibatch_has_ratio_one_and_the_reinforce_gradient():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    after, metrics = update(state, None, rollout, FOUR, config)
    assert metrics["val/ratio"] == 1 and metrics["policy/clipfrac_avg"] == 0
    assert metrics["policy/approxkl_avg"] < 1e-12 and metrics["val/ratio_var"] < 1e-12

    mask = generation.mask[FOUR]
    tokens = jnp.concatenate([batch["tokens"], generation.tokens], 1)[FOUR]
    segments = jnp.concatenate([batch["mask"], generation.mask], 1)[FOUR]

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def expected(policy, critic):
        logprobs = gpt.token_logprobs(policy, tokens, segments)[:, 3:]  # after 4 prompt tokens
        values = critic.values(critic.body(tokens, segments))[:, 3:-1]  # read before the token
        reinforce = -(logprobs * rollout.advantages[FOUR] * mask).sum() / mask.sum()
        half_mse = 0.5 * ((values - rollout.returns[FOUR]) ** 2 * mask).sum() / mask.sum()
        return reinforce + half_mse

    gradient = jax.tree.map(jnp.subtract, (state.policy, state.critic), (after.policy, after.critic))
    wanted = expected(state.policy, state.critic)
    assert all(max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree)) > 0.1 for tree in wanted)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), gradient, wanted)


def expected_update(objective, *models):
    """What one step of plain gradient descent with rate 1 makes of the models."""
    return jax.tree.map(jnp.subtract, models, jax.jit(jax.grad(objective, argnums=range(len(models))))(*models))


def test_adapters_on_one_base_learn_and_leave_it_alone():
    state, ref, batch, _, config = world()
    config = replace(config, lora_rank=2)
    adapter, base = gpt.trainable(state.policy, 2, config.dtype, jax.random.key(6))
    critic = replace(state.critic, body=adapter)
    lora = ppo.State(adapter, SGD.init(adapter), critic, SGD.init(critic))
    policy = gpt.attach(adapter, base)
    generation = gpt.generate(policy, batch["tokens"], batch["mask"], jax.random.key(4), 5, ends=(EOS,), pad=PAD)
    rollout, metrics = ppo.complete_rollout(lora, base, base, batch, generation, SCORES, config)
    assert metrics["objective/kl"] == 0  # the reference is the base with no adapter
    after, metrics = update(lora, base, rollout, FOUR, config)
    assert metrics["val/ratio"] == 1 and same(base, state.policy)
    # B is 0 at first: A has no gradient, and B that of A's place in the whole model
    whole, _ = update(state, None, rollout, FOUR, replace(config, lora_rank=0))
    for name, layer in after.policy.blocks.items():
        step = np.asarray(getattr(whole.policy.blocks, name).weight - getattr(state.policy.blocks, name).weight)
        a = np.asarray(adapter.blocks[name].a)
        assert same(layer.a, adapter.blocks[name].a)
        np.testing.assert_allclose(layer.b, layer.scale * a.swapaxes(1, 2) @ step, atol=2e-5)
    assert not same(after.critic.body, adapter)


def test_rollouts_are_sampled_in_the_precision_that_is_scored():
    state, ref, _, _, config = world()
    for dtype in ("float32", "bfloat16"):
        leaves = jax.tree.leaves(ppo.sampler(state.policy, None, replace(config, dtype=dtype)))
        assert {str(x.dtype) for x in leaves} == {dtype}
    assert same(state.policy, ppo.sampler(state.policy, None, config))


def test_advantages_of_a_rollout_have_mean_zero_so_the_first_loss_is_zero():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    loss, _ = policy_loss(rollout.logprobs, rollout.logprobs, rollout.advantages, rollout.mask)
    assert abs(loss) < 1e-6


def test_rollout_estimates_are_the_ones_of_the_box():
    """complete_rollout against the model's own softmax, the brute-force sum and numpy."""
    state, ref, batch, generation, config = world(0.7)
    rollout, metrics = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    mask, responses = np.asarray(generation.mask), np.asarray(generation.tokens)
    logprobs, refs, values, rewards = (np.zeros(mask.shape) for _ in range(4))
    for b in range(8):  # one row at a time, all padding on the right
        prompt = np.asarray(batch["tokens"])[b][np.asarray(batch["mask"])[b] > 0]
        n = mask[b].sum()
        row = np.full((1, 9), PAD)
        row[0, : len(prompt) + n] = [*prompt, *responses[b, :n]]
        before = len(prompt) - 1 + np.arange(n)  # where each response token is predicted
        for out, model in ((logprobs, state.policy), (refs, ref)):
            logits = np.asarray(model.logits(hidden(model, row)))[0, before].astype(float) / 0.7
            out[b, :n] = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(n), responses[b, :n]]
        values[b, :n] = np.asarray(hidden(state.critic.body, row))[0, before] @ np.asarray(state.critic.head)
        rewards[b, :n] = -0.1 * (logprobs - refs)[b, :n]
        rewards[b, n - 1] += float(SCORES[b])
    advantages = brute_force_gae(rewards, values, mask, 1.0, 0.95)
    real = advantages[mask > 0]
    white = np.where(mask > 0, (advantages - real.mean()) / real.std(), 0)
    for ours, expected in ((rollout.logprobs, logprobs), (rollout.ref_logprobs, refs), (rollout.values, values),
                           (rollout.returns, advantages + values)):  # fmt: skip
        np.testing.assert_allclose(np.asarray(ours) * mask, expected, atol=1e-4)
    np.testing.assert_allclose(rollout.advantages, white, atol=1e-3)
    kl = (logprobs - refs).sum(1).mean()
    np.testing.assert_allclose(metrics["objective/kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], -0.1 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], SCORES.mean() - 0.1 * kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["response_length"], mask.sum(1).mean())
    assert metrics["val/decode_drift"] < 1e-4  # the sampler's distribution is the one that is scored


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_policy_equal_to_reference_has_no_kl_at_any_temperature(temperature):
    state, _, batch, generation, config = world()
    config = replace(config, temperature=temperature)
    rollout, metrics = ppo.complete_rollout(state, None, copy(state.policy), batch, generation, SCORES, config)
    for name in ("objective/kl", "objective/kl_k3", "objective/kl_exact"):
        assert abs(metrics[name]) < 1e-6
    logprobs, _ = forward(state.policy, jax.tree.map(lambda x: x[FOUR], rollout), config)
    assert np.array_equal(logprobs, rollout.logprobs[FOUR])  # ratio 1 in the first minibatch, bit for bit


def test_the_lambda_of_gae_is_the_one_that_was_asked_for():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, replace(config, lam=1.0))
    mask = np.asarray(generation.mask)
    to_go = np.array(token_rewards(SCORES, rollout.logprobs, rollout.ref_logprobs, generation.mask, 0.1))
    for t in reversed(range(mask.shape[1] - 1)):
        to_go[:, t] += to_go[:, t + 1]  # what lam = 1 returns
    np.testing.assert_allclose(rollout.returns, to_go * mask, atol=1e-4)


def test_updates_leave_reference_and_rewards_alone_and_move_the_rest():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    frozen, after = copy((ref, rollout)), copy(state)
    for rows in (FOUR, FOUR[::-1]):
        after, _ = update(after, None, rollout, rows, config)
    assert same(frozen, (ref, rollout))
    assert not same(state.policy, after.policy) and not same(state.critic, after.critic)


def test_micro_batches_of_unequal_lengths_equal_one_big_batch():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    lengths = np.asarray(rollout.mask)[FOUR].sum(1)
    assert lengths[::2].sum() != lengths[1::2].sum()
    whole, ours = update(state, None, rollout, FOUR, config)
    parts, theirs = update(state, None, rollout, FOUR, replace(config, micro_batches=2))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), whole, parts)
    for name in ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "grad_norm"):
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_a_rollout_scored_in_chunks_is_the_same():
    state, ref, batch, generation, config = world()
    chunked = replace(config, micro_batches=2)
    assert ppo.chunks(chunked) == 4  # of 8 rows, in minibatches of 4
    one, metrics = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    two, more = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, chunked)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), (one, metrics), (two, more))
    args = batch["tokens"], batch["mask"], generation.tokens, generation.mask, EOS
    np.testing.assert_allclose(gpt.score(state.critic, *args, 4), gpt.score(state.critic, *args), atol=1e-5)


def test_ppos_target_kl_takes_no_step_from_too_far_away():
    state, ref, batch, generation, config = world()
    rollout, _ = ppo.complete_rollout(state, None, ref, batch, generation, SCORES, config)
    config = replace(config, target_kl=1e-9)
    near, first = update(state, None, rollout, FOUR, config)  # the sampler itself: a step is taken
    far, second = update(near, None, rollout, FOUR[::-1], config)
    assert not same(state.policy, near.policy) and same(near.policy, far.policy)
    assert not same(near.critic, far.critic)  # the critic is not bound by it
    metrics = ppo.summarize_updates([first, second], 1e-9)
    assert metrics["updates"] == 1 and metrics["stopped_early"] == 1 and metrics["val/ratio_first"] == 1
    metrics = ppo.summarize_updates([first, second], None)
    assert metrics["updates"] == 2 and metrics["stopped_early"] == 0
    np.testing.assert_allclose(metrics["val/ratio"], (first["val/ratio"] + second["val/ratio"]) / 2)


def test_the_clip_and_the_weights_are_those_that_were_asked_for(monkeypatch):
    state, _, batch, generation, config = world()
    asked, loss, rows = [], ppo.policy_loss, jnp.zeros((8, 5))
    monkeypatch.setattr(ppo, "policy_loss", lambda *args: asked.append(args[4:]) or loss(*args))
    fields = dict(logprobs=rows, ref_logprobs=rows, advantages=rows, values=rows, returns=rows, weights=rows)
    rollout = ppo.Rollout(batch["tokens"], batch["mask"], generation.tokens, generation.mask, **fields)
    step = partial(
        ppo.update_policy.__wrapped__, base=None, rows=FOUR, optimizer=SGD, config=replace(config, clip=0.07)
    )
    jax.eval_shape(lambda rollout: step(state.policy, state.policy_opt, rollout=rollout), rollout)
    assert asked[0][0] == 0.07 and asked[0][1].shape == (4, 5)


def test_importance_weights_multiply_each_tokens_loss(x64):
    old, ones = jnp.zeros((1, 3)), jnp.ones((1, 3))
    weights = ppo.importance_weights(
        jnp.log(jnp.array([[0.5, 0.6, 0.3]])), jnp.log(jnp.array([[0.25, 0.1, 0.9]])), ones
    )
    np.testing.assert_allclose(weights, [[2, 2, 1 / 3]])  # the cap is 2
    loss, _ = policy_loss(old, old, jnp.array([[1.0, 2.0, 6.0]]), ones, 0.2, weights)
    np.testing.assert_allclose(loss, -(2 * 1 + 2 * 2 + 6 / 3) / 3)


def test_a_sampler_that_is_another_model_is_weighed_by_its_own_log_probs():
    """It drew every token a third more often than the policy would."""
    state, ref, batch, generation, config = world()
    drawn = generation._replace(logprobs=generation.logprobs + np.log(4 / 3).astype(np.float32))
    rollout, metrics = ppo.complete_rollout(state, None, ref, batch, drawn, SCORES, config)
    np.testing.assert_allclose(rollout.weights, np.where(rollout.mask == 0, 1, 3 / 4), rtol=1e-4)
    assert metrics["val/importance_capped"] == 0 and metrics["val/decode_ratio_off"] == 1


# ---------------------------------------------------------------------------------------------------- ppo.py, scores


def scored(script, scores, generation, batch=None, models=(), ends=(EOS,), **options):
    """What a script makes of a function's scores, or of reward models."""
    reward, batch = (
        gpt.Reward(list(models), None if models else lambda *_: scores),
        batch or dict(tokens=None, mask=None),
    )
    rows = [{}] * len(generation.tokens)
    options |= dict(group_size=len(rows)) if script is grpo else {}
    scores, _, metrics = script.score_responses(
        reward, batch, generation, ([], []), rows, ends, script.Config(**options)
    )
    return scores.ravel(), metrics


@pytest.mark.parametrize("script", [ppo, grpo])
def test_missing_eos_rule_applies_exactly_where_the_response_has_no_eos(script):
    """Scores 1, 2, 3 of responses that end, do not end, and whose only EOS lies in the padding; then scores so low that
    a ceiling would take nothing."""
    tokens, mask = jnp.array([[3, EOS, PAD], [3, 4, 5], [3, 4, EOS]]), jnp.array([[1, 1, 0], [1, 1, 1], [1, 1, 0]])
    generation = gpt.Generation(tokens, mask, jnp.zeros((3, 3)))
    finish = lambda rule, scores=(1.0, 2.0, 3.0): scored(script, scores, generation, missing_eos=rule)
    np.testing.assert_allclose(finish(4.0)[0], [1, -4, -4])
    np.testing.assert_allclose(finish(None)[0], [1, 2, 3])
    metrics = finish(4.0)[1]
    np.testing.assert_allclose(metrics["objective/scores"], -7 / 3, **CLOSE)  # after the rule: what PPO is given
    assert metrics["val/num_eos_tokens"] == 1 and metrics["eos_rate"] == pytest.approx(1 / 3)
    scores, metrics = scored(script, [1.0, 2.0, 3.0], generation, missing_eos=4.0, ends=(EOS, 5))  # any of them
    np.testing.assert_allclose(scores, [1, 2, -4])
    assert metrics["val/num_eos_tokens"] == 2
    np.testing.assert_allclose(finish(4.0, (-9.0, -9.0, -3.0))[0], [-9, -13, -7])


def test_what_goes_wrong_is_said_once_with_what_helps():
    said = []
    watch = gpt.Watch(said.append)
    fine = {
        "response_length": 9.0, "objective/kl": 0.1, "objective/scores_std": 1.0, "eos_rate": 0.9, "special_tokens": 0.0
    }  # fmt: skip
    watch(fine)
    assert not said
    watch(fine | {"special_tokens": 0.5})
    watch(fine | {"special_tokens": 0.5})
    assert len(said) == 1 and "0.50 special tokens each that their text does not show" in said.pop()
    watch(fine | {"eos_rate": 0.4})
    assert "raise --response-length, or --missing-eos" in said.pop() and not said


def test_special_tokens_are_counted_where_text_does_not_show_them(tokenizer):
    eos, hidden = tokenizer.eos_id, tokenizer.pad_id
    tokens = jnp.array([[3, hidden, 3, eos], [3, eos, hidden, hidden], [hidden, hidden, 3, 3]])
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert gpt.special_tokens(tokenizer, gpt.Generation(tokens, mask, None)) == 1
    assert tokenizer.decode([3, hidden, 3]) == tokenizer.decode([3, 3])


@pytest.mark.parametrize("bad", [[1.0, 2.0], [1.0, 2.0, np.nan], [1.0, 2.0, np.inf], 3.0, [[1.0], [2.0], [3.0]]])
def test_reward_function_that_returns_nonsense_is_named(bad):
    generation = gpt.Generation(jnp.ones((3, 2), jnp.int32), jnp.ones((3, 2), jnp.int32), jnp.zeros((3, 2)))
    with pytest.raises(ValueError, match="must return 3 finite floats"):
        scored(ppo, bad, generation)


def test_ensemble_scores_are_combined():
    shape = gpt.make_config(7, 16, 1, 2, 16)
    members = [gpt.init_score_model(noisy(shape, i), jax.random.key(i)) for i in range(3)]
    batch = dict(tokens=jnp.array([[PAD, 1], [2, 3]]), mask=jnp.array([[0, 1], [1, 1]]))
    generation = gpt.Generation(jnp.array([[3, EOS], [4, EOS]]), jnp.ones((2, 2), jnp.int32), jnp.zeros((2, 2)))
    rows = [[1, 3, EOS], [2, 3, 4, EOS]]
    alone = np.array(
        [[float(score(m, jnp.array([ids]), jnp.ones((1, len(ids)), int))[0]) for ids in rows] for m in members]
    )
    for how, expected in (
        ("mean", alone.mean(0)),
        ("worst", alone.min(0)),
        ("uwo", alone.mean(0) - 0.5 * alone.var(0)),
    ):
        ours = scored(ppo, None, generation, batch, members, combine=how)[0]
        np.testing.assert_allclose(ours, expected, **CLOSE)


# ------------------------------------------------------------------------------------------------ copies


def test_what_ppo_and_grpo_both_write_out_is_the_same():
    """A function that stands in both files is one function: the same text."""
    for name in ("importance_weights", "sampler", "chunks"):
        assert inspect.getsource(getattr(ppo, name)) == inspect.getsource(getattr(grpo, name)), name
