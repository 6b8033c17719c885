"""dpo.py and ipo_kto.py: losses by hand, optima of a world that is enumerable, and whole runs on a handful of rows."""

import json
import re
import signal
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import test_training
from jax import lax
from test_enumerable import BETA, EOS, MASK, REF, REF_LOGITS, REWARDS, STATES, TOKENS, log_softmax, objective
from test_enumerable import kl as divergence
from test_enumerable import token_logprobs as table_logprobs
from test_training import Spy, leaves, log, same

import dpo
import gpt
import ipo_kto
import reward

compile_once = test_training.compile_once
CLOSE = dict(rtol=2e-5, atol=2e-5)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, float)))


dpo_loss = jax.jit(dpo.dpo_loss, static_argnames="loss")
ipo_loss, kto_loss, kto_z0 = jax.jit(ipo_kto.ipo_loss), jax.jit(ipo_kto.kto_loss), jax.jit(ipo_kto.kto_z0)


# ---------------------------------------------------------------------------------------------------- losses by hand

# log-ratios to the reference: +1 for the chosen answer, -0.5 for the rejected one, so h = 1.5 and beta h = 0.75
PAIR = [jnp.array([x]) for x in (-1.0, -2.0, -2.0, -1.5)]


@pytest.mark.parametrize(
    "options, value, slope",
    [
        (dict(), 0.386871, -0.160411),  # log(1 + e^-0.75); -0.5 sigmoid(-0.75)
        (dict(label_smoothing=0.1), 0.461871, -0.110411),  # 0.9 0.386871 + 0.1 1.136871; 0.5 (sigmoid(0.75) - 0.9)
        (dict(label_smoothing=0.1, loss="robust"), 0.293121, -0.222911),  # (0.9 0.386871 - 0.1 1.136871) / 0.8
        (dict(label_smoothing=0.0, loss="robust"), 0.386871, -0.160411),
    ],
)
def test_dpo_by_hand(options, value, slope):
    loss = lambda *pair: dpo_loss(*pair, beta=0.5, **options)[0].sum()
    np.testing.assert_allclose(loss(*PAIR), value, **CLOSE)
    np.testing.assert_allclose(np.ravel(jax.grad(loss, (0, 1))(*PAIR)), [slope, -slope], **CLOSE)
    assert loss(PAIR[1], PAIR[0], PAIR[3], PAIR[2]) > value + 0.5  # the sides swapped


def test_dpo_metrics_by_hand():
    policy_chosen, policy_rejected = jnp.array([-1.0, -4.0, -3.0]), jnp.array([-2.0, -1.0, -3.0])
    ref_chosen, ref_rejected = jnp.array([-2.0, -3.0, -3.0]), jnp.array([-1.5, -1.0, -3.0])
    losses, metrics = dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5)
    assert losses.shape == (3,)
    expected = {
        "rewards/chosen": 0.0,  # 0.5, -0.5, 0
        "rewards/rejected": -0.25 / 3,
        "rewards/margins": 0.25 / 3,  # 0.75, -0.5, 0
        "rewards/accuracies": 1 / 3,  # a margin of 0 is not won
        "logps/chosen": -8 / 3,
        "logps/rejected": -2.0,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, err_msg=name, **CLOSE)
    weighted = dpo_loss(
        policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.5, weight=jnp.array([2.0, 1.0, 0.0])
    )[1]
    np.testing.assert_allclose(weighted["rewards/margins"], 1 / 3, **CLOSE)


def test_dpo_of_a_policy_that_is_its_reference_is_ln_2_whatever_the_loss():
    same_pair = [PAIR[0], PAIR[1], PAIR[0], PAIR[1]]
    for options in (dict(), dict(label_smoothing=0.3), dict(label_smoothing=0.3, loss="robust")):
        losses, metrics = dpo_loss(*same_pair, **options)
        np.testing.assert_allclose(losses, np.log(2), rtol=1e-6)
        assert metrics["rewards/accuracies"] == 0
    half = jax.grad(lambda x: dpo_loss(x, *same_pair[1:], label_smoothing=0.5)[0].sum())(same_pair[0])
    assert half == 0  # cDPO that believes no label


def test_dpo_sees_log_ratios_alone():
    rng = np.random.default_rng(0)
    a, b, c, d, shift = rng.normal(size=(5, 4))
    np.testing.assert_allclose(dpo_loss(a + shift, b, c + shift, d)[0], dpo_loss(a, b, c, d)[0], **CLOSE)
    h = (a - c) - (b - d)
    np.testing.assert_allclose(dpo_loss(a, b, c, d, 0.7)[0], np.logaddexp(0, -0.7 * h), **CLOSE)
    np.testing.assert_allclose(dpo_loss(b, a, d, c, 0.7)[0], np.logaddexp(0, 0.7 * h), **CLOSE)


def test_cdpo_pulls_large_margins_back_and_robust_dpo_has_no_floor(x64):
    """Two losses, not two names of one."""
    e, beta = 0.1, 0.5
    edge = np.log((1 - e) / e) / beta  # beta h = logit(1 - e)
    slope = lambda h, loss: jax.grad(lambda x: dpo_loss(x, 0.0, 0.0, 0.0, beta, e, loss)[0].sum())(jnp.float64(h))
    assert slope(edge - 0.1, "dpo") < 0 < slope(edge + 0.1, "dpo")
    np.testing.assert_allclose(slope(edge, "dpo"), 0, atol=1e-12)
    assert slope(edge + 50, "robust") < -0.05  # -beta e / (1 - 2 e), for ever
    # flipping a label with probability e and averaging gives the clean loss: robust is unbiased, cDPO is not
    value = lambda h, e, loss: dpo_loss(h, 0.0, 0.0, 0.0, beta, e, loss)[0]
    for h in (-3.0, 0.4, 7.0):
        noisy = {loss: (1 - e) * value(h, e, loss) + e * value(-h, e, loss) for loss in ("dpo", "robust")}
        np.testing.assert_allclose(noisy["robust"], value(h, 0.0, "dpo"), rtol=1e-9)
        assert abs(noisy["dpo"] - value(h, 0.0, "dpo")) > 0.01


def test_dpo_does_not_overflow_and_names_an_unknown_loss():
    big = jnp.array([1e4, -1e4])
    loss = lambda x: dpo_loss(x, 0 * x, 0 * x, 0 * x, 1.0)[0]
    np.testing.assert_allclose(loss(big), [0, 1e4])
    assert np.isfinite(jax.grad(lambda x: loss(x).sum())(big)).all()
    with pytest.raises(ValueError, match="unknown loss 'cdpo': dpo or robust"):
        dpo.dpo_loss(*PAIR, loss="cdpo")


def test_ipo_by_hand():
    loss = lambda *pair: ipo_loss(*pair, tau=0.25)[0].sum()  # margin aimed at: 2 nats; h = 1.5
    np.testing.assert_allclose(loss(*PAIR), 0.25, **CLOSE)
    np.testing.assert_allclose(np.ravel(jax.grad(loss, (0, 1))(*PAIR)), [-1, 1], **CLOSE)
    np.testing.assert_allclose(loss(PAIR[1], PAIR[0], PAIR[3], PAIR[2]), 12.25, **CLOSE)
    np.testing.assert_allclose(ipo_loss(PAIR[0], PAIR[1], PAIR[0], PAIR[1])[0], 25, **CLOSE)  # 1 / (4 tau^2)
    metrics = ipo_loss(*PAIR, tau=0.25)[1]
    expected = {
        "rewards/chosen": 0.25, "rewards/rejected": -0.125, "rewards/margins": 0.375, "rewards/accuracies": 1,
        "logps/chosen": -1, "logps/rejected": -2,
    }  # fmt: skip
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def test_ipo_has_its_minimum_at_one_over_two_tau_and_pulls_back_beyond():
    slope = jax.grad(lambda h, tau: ipo_loss(h, 0.0, 0.0, 0.0, tau)[0].sum())
    for tau in (0.1, 0.5):
        assert slope(1 / (2 * tau), tau) == 0
        assert slope(1 / (2 * tau) - 0.1, tau) < 0 < slope(1 / (2 * tau) + 0.1, tau)


def test_kto_by_hand():
    policy, ref, label = jnp.array([-1.0, -1.0]), jnp.array([-2.0, -2.0]), jnp.array([1.0, 0.0])  # g = 1 for both
    loss = lambda policy: kto_loss(policy, ref, label, 0.4, 0.5, 1.0, 2.0)[0]
    np.testing.assert_allclose(loss(policy), [0.425557, 1.148885], **CLOSE)  # sigmoid(-0.3), 2 sigmoid(0.3)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(policy), [-0.122229, 0.244458], **CLOSE)
    metrics = kto_loss(policy + jnp.array([0.0, 1.0]), ref, label, 0.4, 0.5)[1]
    expected = {
        "rewards/chosen": 0.5, "logps/chosen": -1, "share/chosen": 0.5,
        "rewards/rejected": 1, "logps/rejected": 0, "share/rejected": 0.5,
    }  # fmt: skip
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(expected)


def test_kto_properties():
    x = jnp.array([-1.0, -3.0, -2.0])
    for label in (jnp.ones(3), jnp.zeros(3), jnp.array([1.0, 0.0, 1.0])):  # one class alone is no trouble
        losses, metrics = kto_loss(x, x, label, 0.0, 0.3, 1.5, 0.5)
        np.testing.assert_allclose(losses, 0.5 * np.where(label, 1.5, 0.5), **CLOSE)  # at the reference
        assert np.isfinite(list(metrics.values())).all()
    g = jnp.linspace(-4, 4, 9)
    up, down = (kto_loss(g, 0 * g, jnp.full(9, y), 0.7)[0] for y in (1.0, 0.0))
    np.testing.assert_allclose(up + down, 1, **CLOSE)  # the flipped label negates g - z0
    assert (np.diff(up) < 0).all() and (np.diff(down) > 0).all()
    far = jax.grad(lambda g: kto_loss(g, 0.0, jnp.ones(()), 0.0, 1.0)[0].sum())
    assert abs(far(50.0)) < 1e-6 and abs(far(-50.0)) < 1e-6 and far(0.0) == -0.25


def test_kto_z0_is_averaged_then_clamped_and_has_no_gradient():
    zeros = jnp.zeros(3)
    assert kto_z0(jnp.array([1.0, -2.0, 4.0]), zeros) == 1.0  # clamped one by one it would be 5/3
    assert kto_z0(jnp.array([1.0, -5.0, 1.0]), zeros) == 0.0
    np.testing.assert_allclose(kto_z0(zeros, jnp.array([-1.0, -2.0, 0.0])), 1.0)
    mismatched = jnp.array([1.0, -2.0, 4.0])

    def loss(mismatched, z0=kto_z0):
        return kto_loss(zeros, zeros, jnp.ones(3), z0(mismatched, zeros))[0].sum()

    assert (jax.grad(kto_z0)(mismatched, zeros) == 0).all()
    assert (jax.grad(loss)(mismatched) == 0).all()
    assert jax.grad(lambda z0: kto_loss(zeros, zeros, jnp.ones(3), z0)[0].sum())(1.0) == 0
    assert loss(mismatched) != loss(0 * mismatched)  # though its value counts


@pytest.mark.parametrize(
    "up, down, weights",
    [
        (100, 100, (1, 1)), (120, 100, (1, 1)), (400, 300, (1, 1)), (50, 100, (2, 1)), (10, 100, (10, 1)),
        (200, 100, (1, 1.5)), (1000, 100, (1, 7.5)), (5, 0, (1, 1)), (0, 5, (1, 1)),
    ],
)  # fmt: skip
def test_class_weights_by_the_rule(up, down, weights):
    found = ipo_kto.class_weights(up, down)
    assert found == pytest.approx(weights)
    assert min(found) == 1  # only one of the two is changed
    if up and down:
        assert 1 - 1e-9 <= found[0] * up / (found[1] * down) <= 4 / 3 + 1e-9


# ---------------------------------------------------------------------------------------------------- known optima

# Pairs y, y' are drawn from the reference and labelled by Bradley-Terry; all 85 x 85 of them are in the exact
# expectation that is minimised here over a table of logits, through the shipped losses.

REF_SUM = REF.sum(-1)  # (2, 85)
WINS = sigmoid(REWARDS[:, :, None] - REWARDS[:, None, :])  # P(first beats second)
PAIRS = np.exp(REF_SUM)[:, :, None] * np.exp(REF_SUM)[:, None, :] * 2 * WINS  # of (chosen, rejected)
BEATS_REF = (WINS * np.exp(REF_SUM)[:, None, :]).sum(-1)  # p(y beats mu), mu = ref
LENGTHS = MASK.sum(1)
UP = sigmoid(REWARDS - (np.exp(REF_SUM) * REWARDS).sum(-1, keepdims=True))  # P(thumb up)
TAU, KTO_BETA = {"sum": 0.1, "mean": 0.3}, 1.0


def responses(logits, mask, mean):
    """Log-probs of all responses (2, 85) from a table of logits: sums over `mask`, or means."""
    logps = jax.nn.log_softmax(logits)[:, STATES, TOKENS]
    total = jnp.where(mask, logps, 0.0).sum(-1)
    return jnp.where(mean, total / jnp.maximum(mask.sum(-1), 1), total)


def fit(loss, bugs, steps=400):
    """bug -> logits (2, 21, 5) that minimise loss(policy, ref, has), policy and ref giving log-probs (2, 85); all bugs
    train side by side. The first name of `bugs` is no bug."""

    def train(bug):
        has = lambda name: bug == bugs.index(name) if name in bugs else False

        def objective(logits):
            mask = jnp.where(has("EOS dropped"), MASK * (TOKENS != EOS), MASK)
            mean = has("averaged")
            policy, ref = responses(logits, mask, mean), responses(jnp.asarray(REF_LOGITS), mask, mean)
            return loss(policy, ref, has)

        optimizer = optax.adam(optax.linear_schedule(0.1, 0, steps), eps=1e-12)

        def step(carry, _):
            logits, opt_state = carry
            updates, opt_state = optimizer.update(jax.grad(objective)(logits), opt_state)
            return (optax.apply_updates(logits, updates), opt_state), None

        start = jnp.asarray(REF_LOGITS)
        return lax.scan(step, (start, optimizer.init(start)), None, steps)[0][0]

    with jax.enable_x64(True):
        tables = np.asarray(jax.jit(jax.vmap(train))(jnp.arange(len(bugs))))
    return dict(zip(bugs, tables))


def both_sides(x, flip):
    """Log-probs (2, 85) as those of the chosen and of the rejected side of all pairs (2, 85, 85)."""
    shape = (2, 85, 85)
    first, second = jnp.broadcast_to(x[:, :, None], shape), jnp.broadcast_to(x[:, None, :], shape)
    return jnp.where(flip, second, first), jnp.where(flip, first, second)


def from_table(logits):
    return table_logprobs(logits).sum(-1)


DPO_BUGS = ["none", "averaged", "EOS dropped", "chosen and rejected swapped", "reference left out"]


@pytest.fixture(scope="module")
def dpo_fits():
    def loss(policy, ref, has):
        flip = has("chosen and rejected swapped")
        (chosen, rejected), (ref_chosen, ref_rejected) = both_sides(policy, flip), both_sides(ref, flip)
        keep = jnp.where(has("reference left out"), 0.0, 1.0)
        return (PAIRS * dpo.dpo_loss(chosen, rejected, keep * ref_chosen, keep * ref_rejected, BETA)[0]).sum()

    return fit(loss, DPO_BUGS)


def best_logp():
    """pi* = ref exp(r / beta) / Z, the optimum of E[r] - beta KL: PPO's as well."""
    return log_softmax(REF_SUM + REWARDS / BETA)


def test_dpo_reaches_the_optimum(dpo_fits):
    assert (divergence(best_logp(), from_table(dpo_fits["none"])) < 0.01).all()


@pytest.mark.parametrize("bug", DPO_BUGS[1:])
def test_dpo_with_a_bug_does_not(dpo_fits, bug):
    best = (np.exp(best_logp()) * (REWARDS - BETA * (best_logp() - REF_SUM))).sum(-1)
    assert (best - objective(dpo_fits["none"]) < 0.005).all()
    assert (best - objective(dpo_fits[bug]) > 0.02).all()


IPO_BUGS = ["none", "averaged", "EOS dropped", "chosen and rejected swapped", "margin 1 / tau"]


@pytest.fixture(scope="module")
def ipo_fits():
    def loss(policy, ref, has):
        flip = has("chosen and rejected swapped")
        (chosen, rejected), (ref_chosen, ref_rejected) = both_sides(policy, flip), both_sides(ref, flip)
        tau = jnp.where(has("averaged"), TAU["mean"], jnp.where(has("margin 1 / tau"), TAU["sum"] / 2, TAU["sum"]))
        return (PAIRS * ipo_kto.ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau)[0]).sum()

    return fit(loss, IPO_BUGS)


def normalised(log_weights):
    """(2, 85) of c -> log-weights, with each prompt's c such that they sum to 1, by bisection (they rise with c)."""
    low, high = np.full((2, 1), -1e3), np.full((2, 1), 1e3)
    for _ in range(200):
        c = (low + high) / 2
        over = np.logaddexp.reduce(log_weights(c), -1, keepdims=True) > 0
        low, high = np.where(over, low, c), np.where(over, c, high)
    return log_weights(c)


def ipo_optimum(reduction, tau=None):
    tau = tau or TAU[reduction]
    if reduction == "sum":  # ref exp(p(y beats ref) / tau) / Z
        return log_softmax(REF_SUM + BEATS_REF / tau)
    return normalised(lambda c: REF_SUM + LENGTHS * (BEATS_REF / tau + c))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ipo_reaches_the_optimum_of_its_reduction_and_not_the_other_one(ipo_fits, reduction):
    found = from_table(ipo_fits["none" if reduction == "sum" else "averaged"])
    other = ipo_optimum("mean" if reduction == "sum" else "sum")
    assert (divergence(ipo_optimum(reduction), found) < 0.006).all()
    assert (divergence(other, found) > 0.03).all()


def test_the_mean_reduction_favours_length_at_the_same_loss():
    """Which is why the loss cannot tell which of the two optima is meant."""
    sums, means = ipo_optimum("sum", 0.1), ipo_optimum("mean", 0.1)
    lengths = [(np.exp(logp) * LENGTHS).sum(-1) for logp in (sums, means)]
    assert (lengths[1] > lengths[0] + 0.03).all()
    losses = []
    for logp, n in ((sums, 1), (means, LENGTHS)):
        (chosen, rejected), (ref_chosen, ref_rejected) = both_sides(logp / n, False), both_sides(REF_SUM / n, False)
        losses.append((PAIRS * ipo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1)[0]).sum((1, 2)))
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert (losses[0] < 24).all()  # 1 / (4 tau^2) = 25 at the reference


@pytest.mark.parametrize("bug", IPO_BUGS[2:])
def test_ipo_with_a_bug_does_not(ipo_fits, bug):
    assert (divergence(ipo_optimum("sum"), from_table(ipo_fits[bug])) > 0.05).all()


KTO_BUGS = ["none", "averaged", "EOS dropped", "labels swapped", "z0 not clamped"]


@pytest.fixture(scope="module")
def kto_fits():
    other = 85 * 2 * np.exp(REF_SUM)[::-1] / 2  # weights whose plain mean is E over the other prompt's responses

    def loss(policy, ref, has):
        raw = jax.lax.stop_gradient((other * (policy - ref)).mean())
        z0 = jnp.where(has("z0 not clamped"), raw, ipo_kto.kto_z0(other * policy, other * ref))
        up = jnp.where(has("labels swapped"), 1 - UP, UP)
        of = lambda label: ipo_kto.kto_loss(policy, ref, jnp.full((2, 85), label), z0, KTO_BETA)[0]
        return (np.exp(REF_SUM) * (up * of(1.0) + (1 - up) * of(0.0))).sum()

    return fit(loss, KTO_BUGS)


def kto_optimum():
    """Of the expectation at z0 = 0: sum_y ref(y) w(y) sigmoid(log u(y)) with w = 2 P(up) - 1 and u = pi / ref is
    greatest where u = max(sqrt(w / lambda) - 1, 0); lambda is such that pi sums to 1. -inf where w <= 0."""
    w = np.maximum(2 * UP - 1, 0)
    with np.errstate(divide="ignore"):
        return normalised(lambda c: REF_SUM + np.log(np.maximum(np.sqrt(w) * np.exp(np.minimum(c, 50)) - 1, 0)))


def kto_expectation(logp):
    with np.errstate(over="ignore"):
        won = 1 / (1 + np.exp(REF_SUM - logp))  # sigmoid(g)
    return (np.exp(REF_SUM) * (UP * (1 - won) + (1 - UP) * won)).sum(-1)


def kto_distance(logp):
    """KL(optimum || pi), the optimum having responses of probability 0."""
    best = kto_optimum()
    return (np.exp(best) * np.where(best > -np.inf, best - logp, 0)).sum(-1, where=best > -np.inf)


def test_kto_reaches_its_optimum(kto_fits):
    found = from_table(kto_fits["none"])
    assert (kto_distance(found) < 0.004).all()
    gap = kto_expectation(found) - kto_expectation(kto_optimum())
    assert (gap > -1e-9).all() and (gap < 0.001).all()
    assert (np.exp(found).sum(-1, where=UP < 0.5) < 0.005).all()  # what is more often down than up is given up


@pytest.mark.parametrize("bug", KTO_BUGS[1:])
def test_kto_with_a_bug_does_not(kto_fits, bug):
    assert (kto_distance(from_table(kto_fits[bug])) > 0.012).all()


# ---------------------------------------------------------------------------------------------------- batches and steps


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class World:
    """A folder with a tiny policy, and rows whose chosen answers say yes."""

    def __init__(self, root, words):
        self.root, self.words, rng = root, words, np.random.default_rng(0)
        tokenizer = gpt.load_tokenizer(words)
        shape = gpt.make_config(tokenizer.vocab_size, 32, 1, 2, 16)
        self.model = jax.jit(lambda key: jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, gpt.init(shape, key)))(
            jax.random.key(1)
        )
        self.sft = str(root / "sft")
        gpt.save(self.sft, self.model, tokenizer)
        say = lambda low, high: " " + " ".join(rng.choice(list("abcdefgh"), rng.integers(low, high)))
        prompts = [f"Human:{say(1, 4)} Assistant:" for _ in range(64)]
        answer = lambda word: f" {word}{say(1, 4)}"
        pairs = [dict(prompt=p, chosen=answer("yes"), rejected=answer("no")) for p in prompts]
        thumbs = [
            dict(prompt=p, completion=answer("yes" if i % 4 else "no"), label=i % 4 > 0) for i, p in enumerate(prompts)
        ]
        self.pairs, self.thumbs = (
            write_rows(root / f"{n}.jsonl", r) for n, r in (("pairs", pairs), ("thumbs", thumbs))
        )
        write_rows(root / "pairs-heldout.jsonl", pairs[:20])  # 16 and a part of a batch
        write_rows(root / "thumbs-heldout.jsonl", thumbs[:20])
        self.prompts = write_rows(root / "prompts.jsonl", [dict(prompt=p, id=i) for i, p in enumerate(prompts)])
        self.common = dict(init=self.sft, batch_size=16, length=40, lr=1e-2, dtype="float32", save_every=100)

    def dpo(self, name, **options) -> dpo.Config:
        return dpo.Config(**self.common | dict(data=(self.pairs,), out=self.root / name, steps=4, beta=0.5) | options)

    def ipo(self, name, **options) -> ipo_kto.Config:
        return ipo_kto.Config(**self.common | dict(data=(self.pairs,), out=self.root / name, steps=4) | options)

    def kto(self, name, **options) -> ipo_kto.Config:
        return self.ipo(name, **dict(loss="kto", data=(self.thumbs,)) | options)

    def batch(self, kind, skip=0, size=16):
        file = self.pairs if kind == "pairs" else self.thumbs
        return gpt.Batches(file, kind, gpt.load_tokenizer(self.words), size, 12, skip)(0)


@pytest.fixture(scope="module")
def world(tmp_path_factory, compile_once, words):
    with pytest.MonkeyPatch.context() as patch:
        world = World(tmp_path_factory.mktemp("world"), words)
        patch.chdir(world.root)
        yield world


row_logits = jax.jit(lambda model, ids: model.logits(model(ids)))


def by_brute_force(model, ids, scored):
    """Sum of log p of the scored tokens of one row; what stands after a row's end cannot change it."""
    logits = np.asarray(row_logits(model, np.pad(ids, (0, 24 - len(ids)))[None]))[0].astype(float)
    logp = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    return sum(logp[t - 1, ids[t]] for t in range(1, len(ids)) if scored[t])


def test_both_sides_in_one_forward_are_the_sums_of_each_alone(world):
    """The completion and its EOS, no prompt token, no padding; and the mean divides by each side's own count."""
    batch, config = world.batch("pairs"), world.dpo("x")
    found = jax.jit(partial(dpo.pair_logprobs, config=config))(world.model, batch)
    assert found.shape == (16, 2)
    sums = jax.jit(partial(ipo_kto.completion_logprobs, config=world.ipo("x")))(world.model, batch)
    means = jax.jit(partial(ipo_kto.completion_logprobs, config=world.ipo("x", reduction="mean")))(world.model, batch)
    np.testing.assert_array_equal(found, sums)
    np.testing.assert_allclose(means, sums / batch["mask"].sum(-1), **CLOSE)
    tokenizer = gpt.load_tokenizer(world.words)
    for row, side in ((0, 0), (3, 1), (7, 0)):
        n = batch["segments"][row, side].sum()
        ids, scored = batch["tokens"][row, side, :n], batch["mask"][row, side, :n]
        assert ids[-1] == tokenizer.eos_id and scored[-1] == 1 and scored[0] == 0
        np.testing.assert_allclose(found[row, side], by_brute_force(world.model, ids, scored), **CLOSE)


def test_forked_batches_hold_the_same_pairs_in_fewer_columns(world):
    tokenizer, columns, found = gpt.load_tokenizer(world.words), [0, 0], [{}, {}]
    for forked in (False, True):
        batches = gpt.Batches(world.pairs, "pairs", tokenizer, 16, 40, 0, forked=forked)
        for batch in map(batches, range(batches.steps_per_epoch)):
            columns[forked] += batch["tokens"][0].size
            for i, (_, row) in enumerate(batch["index"]):
                tokens, segments, mask = (batch[name][i] for name in ("tokens", "segments", "mask"))
                for side in (0, 1):
                    if forked:
                        real = (segments == 1) | (segments == 2 + side)
                        pair = tokens[real].tolist(), mask[real].tolist()
                    else:
                        pair = tokens[side][segments[side] > 0].tolist(), mask[side][segments[side] > 0].tolist()
                    found[forked][int(row), side] = pair
    assert len(found[0]) == 128 and found[0] == found[1] and columns[1] < 0.9 * columns[0]


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_step_with_a_shared_prefix_is_the_step_of_two_rows(world, name):
    module, config = (dpo, world.dpo("x")) if name == "dpo" else (ipo_kto, world.ipo("x", reduction="mean"))
    ref, results = jax.tree.map(lambda x: 0.9 * x, world.model), []
    for shared in (False, True):
        batches = gpt.Batches(world.pairs, "pairs", gpt.load_tokenizer(world.words), 16, 12, 0, forked=shared)
        batch, _ = next(batches.once())
        state, step = make(module, config, world.model)
        after, metrics = step(state, ref, gpt.put_batch(batch), *([0.0] if module is ipo_kto else []))
        results.append((leaves(after.policy), jax.tree.map(float, metrics)))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-4, abs=1e-5)


def test_rows_beyond_the_learned_positions_are_refused_prefix_included(world):
    shape = gpt.make_config(24, 9, 1, 2, 16, "gpt2")
    batches = gpt.Batches(world.pairs, "pairs", gpt.load_tokenizer(world.words), 16, 40, 0)
    with pytest.raises(ValueError, match="tokens > the 9 positions of the model: lower --length"):
        gpt.check_context(jax.eval_shape(partial(gpt.init, shape), jax.random.key(0)), batches)


@pytest.mark.parametrize("how", ["dpo", "precomputed", "ipo", "teacher"])
def test_a_frozen_model_with_too_few_positions_is_refused(world, tmp_path, how):
    """A forked row may be longer than the positions: only this check stands between them and clamped ones."""
    tokenizer = gpt.load_tokenizer(world.words)
    short = gpt.init(gpt.make_config(tokenizer.vocab_size, 8, 1, 2, 16, "gpt2"), jax.random.key(0))
    short = gpt.init_score_model(short, jax.random.key(1)) if how == "teacher" else short
    gpt.save(tmp_path / "short", short, tokenizer)
    folder, options = str(tmp_path / "short"), dict(data=(world.pairs,), out=tmp_path / "out", steps=1)
    run = {
        "dpo": lambda: dpo.main(world.dpo("x-dpo", ref=folder)),
        "precomputed": lambda: dpo.main(world.dpo("x-table", ref=folder, precompute_ref=True)),
        "ipo": lambda: ipo_kto.main(world.ipo("x-ipo", ref=folder)),
        "teacher": lambda: reward.main(
            reward.Config(init=world.sft, teacher=folder, suffix="", normalize_with=None, gold=None, **options)
        ),
    }[how]
    with pytest.raises(ValueError, match="tokens > the 8 positions of the model: lower --length"):
        run()


def make(module, config, model):
    """(state, train step) with plain gradient descent at rate 1: the change of the weights is the gradient."""
    optimizer = optax.sgd(1.0)
    state = module.State(jax.tree.map(jnp.array, model), optimizer.init(model))
    if module is dpo:
        return state, lambda state, ref, batch: dpo.train_step(state, None, ref, batch, optimizer, config)
    return state, lambda state, ref, batch, z0: ipo_kto.train_step(
        state, None, ref, batch | {"z0": z0}, optimizer, config
    )


def test_dpo_starts_at_ln_2_with_the_gradient_that_belongs_there(world):
    """-beta / 2 (grad log pi(y_w) - grad log pi(y_l)), mean over pairs."""
    config, batch = world.dpo("x"), gpt.put_batch(world.batch("pairs"))
    state, step = make(dpo, config, world.model)
    after, metrics = step(state, world.model, batch)
    np.testing.assert_allclose(metrics["loss"], np.log(2), atol=1e-6, rtol=0)
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0

    def mean_margin(model):
        logps = dpo.pair_logprobs(model, batch, config)
        return -0.5 * config.beta * (logps[:, 0] - logps[:, 1]).mean()

    grads = jax.jit(jax.grad(mean_margin))(world.model)
    for a, b, g in zip(leaves(world.model), leaves(after.policy), leaves(grads), strict=True):
        np.testing.assert_allclose(a - b, g, rtol=1e-4, atol=1e-6)


def test_ipo_and_kto_start_where_they_must(world):
    for config, batch, loss in (
        (world.ipo("x", tau=0.1), "pairs", 25.0),
        (world.ipo("x", tau=0.1, reduction="mean"), "pairs", 25.0),
        (world.kto("x", desirable_weight=1.0, undesirable_weight=3.0), "thumbs", None),
    ):
        batch = world.batch(batch)
        state, step = make(ipo_kto, config, world.model)
        _, metrics = step(state, world.model, gpt.put_batch(batch), 0.0)
        loss = loss or np.where(batch["label"] > 0, 0.5, 1.5).mean()
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-6)
        assert metrics["rewards/chosen"] == metrics["rewards/rejected"] == 0


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_two_micro_batches_are_one_batch(world, name):
    """Weights and gradients, and metrics, also where parts hold unequal weights and unequal shares of a class."""
    module = dpo if name == "dpo" else ipo_kto
    extra = dict(desirable_weight=1.0, undesirable_weight=2.0) if name == "kto" else {}
    batch = world.batch("thumbs" if name == "kto" else "pairs", size=8)
    batch |= dict(weight=np.array([1, 1, 2, 0.5, 1, 3, 1, 1], np.float32))
    batch |= dict(
        label=np.array([1, 0, 1, 1, 0, 0, 1, 0], np.float32), label_p=np.linspace(0.6, 1, 8, dtype=np.float32)
    )
    ref, results = jax.tree.map(lambda x: 0.9 * x, world.model), []
    for parts in (1, 2):
        config = getattr(world, name)("x", micro_batches=parts, **extra)
        state, step = make(module, config, world.model)
        after, metrics = step(state, ref, gpt.put_batch(batch), *([0.3] if module is ipo_kto else []))
        results.append((leaves(after.policy), ipo_kto.class_means(metrics) if name == "kto" else metrics))
    for a, b in zip(results[0][0], results[1][0], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    one, two = (jax.tree.map(float, metrics) for _, metrics in results)
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5)
    if name == "kto":  # means over the rows of a class, by their weights
        logps = jax.jit(partial(ipo_kto.completion_logprobs, config=config))
        rewards = config.beta * np.asarray(logps(world.model, batch) - logps(ref, batch))
        for side, which in (("chosen", batch["label"] > 0), ("rejected", batch["label"] == 0)):
            mean = np.average(rewards[which], weights=batch["weight"][which])
            np.testing.assert_allclose(one[f"rewards/{side}"], mean, rtol=1e-4)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_soft_label_is_the_pair_both_ways_round(world, name):
    module, config = (
        (dpo, world.dpo("x", loss="robust", label_smoothing=0.2)) if name == "dpo" else (ipo_kto, world.ipo("x"))
    )
    batch = dict(world.batch("pairs")) | {"ref_logps": jnp.asarray(np.random.default_rng(0).normal(-9, 1, (16, 2)))}
    turned = {name: batch[name][:, ::-1] for name in ("tokens", "segments", "mask", "ref_logps")}
    loss = jax.jit(lambda batch: module.batch_loss(world.model, batch, config)[0])
    expected = 0.7 * loss(batch) + 0.3 * loss(batch | turned)
    np.testing.assert_allclose(loss(batch | {"label_p": np.full(16, 0.7)}), expected, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- mismatched pairs


def thumbs_batch(prompts, answers, width=8, weight=None):
    """Right-padded rows as gpt.Batches has them."""
    out = {name: np.zeros((len(prompts), width), np.int32) for name in ("tokens", "segments", "mask")}
    out["weight"] = np.array([1.0] * len(prompts) if weight is None else weight, np.float32)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        n = len(prompt) + len(answer)
        out["tokens"][i, :n], out["segments"][i, :n], out["mask"][i, len(prompt) : n] = [*prompt, *answer], 1, 1
    return out


def rows_of(batch):
    """[(prompt, answer), ...] of a batch."""
    rows = zip(batch["tokens"], batch["segments"] > 0, batch["mask"] > 0)
    return [(list(map(int, t[s & ~m])), list(map(int, t[m]))) for t, s, m in rows]


def test_mismatch_takes_the_next_row_whose_prompt_differs():
    prompts, answers = [[1, 2], [1, 2], [3], [4, 5, 6], [1, 2]], [[11], [12, 12], [13], [14], [15, 15]]
    found = rows_of(ipo_kto.mismatch(thumbs_batch(prompts, answers), 16))
    assert [prompt for prompt, _ in found] == prompts
    assert [answer for _, answer in found] == [[13], [13], [14], [15, 15], [13]]  # not 12, not 11: the same prompt
    cut = rows_of(ipo_kto.mismatch(thumbs_batch(prompts, answers), 4))  # a length of 4 cuts the end
    assert cut[3] == ([4, 5, 6], [15])


def test_mismatch_of_an_odd_batch_leaves_no_row_matched():
    """Reversing a batch would leave the middle row with its own answer."""
    prompts, answers = [[i] for i in range(1, 8)], [[10 + i] for i in range(1, 8)]
    found = rows_of(ipo_kto.mismatch(thumbs_batch(prompts, answers), 8))
    assert sorted(answer for _, answer in found) == answers
    assert all(answer[0] != prompt[0] + 10 for prompt, answer in found)


def test_a_row_of_weight_0_lends_no_answer():
    prompts, answers = [[1], [2], [3], [1]], [[11], [12], [13], [14]]
    found = rows_of(ipo_kto.mismatch(thumbs_batch(prompts, answers, weight=[1, 0, 0.5, 1]), 8))
    assert [answer for _, answer in found] == [[13], [13], [14], [13]]
    with pytest.raises(ValueError, match="all prompts of a batch are equal"):  # all that count
        ipo_kto.mismatch(thumbs_batch(prompts, answers, weight=[1, 0, 0, 1]), 8)
    ipo_kto.mismatch(thumbs_batch(prompts, answers, weight=[0, 0, 1, 0]) | {"weight": np.zeros(4)}, 8)  # nothing counts


def test_a_row_of_weight_2_counts_as_the_row_twice_in_z0(world):
    """By hand r = 3, -1, 2 and weights 2, 1, 0: z0 = (2 * 3 - 1) / 3; and through the shipped step, by copies."""
    hand = kto_z0(jnp.array([3.0, -1.0, 2.0]), jnp.zeros(3), jnp.array([2.0, 1.0, 0.0]))
    assert hand == pytest.approx(5 / 3)
    assert kto_z0(jnp.array([3.0, -1.0]), jnp.zeros(2), jnp.array([1.0, 4.0])) == 0.0  # -1/5: clamped after the mean
    assert kto_z0(jnp.array([3.0]), jnp.zeros(1), jnp.zeros(1)) == 0.0
    config, ref = world.kto("unused"), jax.tree.map(lambda x: 1.3 * x, world.model)
    prompts, answers = [[2, 3], [4], [5, 6]], [[7, 8], [9], [10]]
    z0 = lambda picks, weight: ipo_kto.find_z0(
        world.model, ref, thumbs_batch([prompts[i] for i in picks], [answers[i] for i in picks], weight=weight), config
    )
    once = [float(z0([0, 1, 2], weight)) for weight in ([2, 1, 0], [2, 1, 1], [1, 1, 1])]
    again = [float(z0(*rows)) for rows in (([0, 0, 1], [1] * 3), ([0, 0, 1, 2], [1] * 4), ([0, 1, 2], [5] * 3))]
    assert len(set(once)) == 3 and min(once) > 0
    np.testing.assert_allclose(once, again, rtol=1e-4)


def test_mismatch_needs_two_prompts():
    with pytest.raises(ValueError, match="all prompts of a batch are equal.*raise --batch-size"):
        ipo_kto.mismatch(thumbs_batch([[1, 2]] * 3, [[3], [4], [5]]), 8)


# ---------------------------------------------------------------------------------------------------- whole runs


def without_clock(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log(folder)]


PAIR_METRICS = {
    "loss", "grad_norm", "lr", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected", "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def dpo_run(world):
    with pytest.MonkeyPatch.context() as patch:
        refs = Spy(patch, dpo, "evaluate", lambda policy, base, ref, *_: leaves(ref))
        config = world.dpo("dpo", steps=10, eval_every=5)
        dpo.main(config)
    return config, refs.seen


def test_dpo_learns_logs_and_writes(dpo_run, world):
    config, refs = dpo_run
    steps = log(config.out)
    assert [row["step"] for row in steps] == list(range(10))
    assert all(not PAIR_METRICS - row.keys() and np.isfinite(list(row.values())).all() for row in steps)
    np.testing.assert_allclose(steps[0]["loss"], np.log(2), atol=1e-6, rtol=0)
    assert steps[3]["rewards/margins"] > 0.5 and steps[3]["rewards/accuracies"] > 0.8
    validated = [row["step"] for row in steps if "val/loss" in row]
    assert validated == [4, 9] and steps[4]["val/rewards/accuracies"] > 0.8
    assert len(refs) == 2 and all(same(ref, leaves(world.model)) for ref in refs)  # frozen
    final, _ = gpt.load(config.out)
    assert not same(final, world.model)


def test_validation_counts_each_row_once(world):
    """20 rows in batches of 16: the 12 that fill the second batch count for nothing."""
    tokenizer, config = gpt.load_tokenizer(world.words), world.dpo("x")
    ref = jax.tree.map(lambda x: 0.9 * x, world.model)
    load = lambda size: gpt.Batches(str(world.root / "pairs-heldout.jsonl"), "pairs", tokenizer, size, 12, 0)
    found, expected = (dpo.evaluate(world.model, None, ref, load(size), None, config) for size in (16, 20))
    assert found == pytest.approx(expected, rel=1e-5)


def test_dpo_stopped_and_resumed_is_bit_identical(dpo_run, world, monkeypatch):
    stop_after(monkeypatch, dpo, 5)
    with pytest.raises(SystemExit):
        dpo.main(world.dpo("resumed", steps=10, eval_every=5))
    assert 0 < len(log(world.root / "resumed")) < 10
    monkeypatch.undo()
    monkeypatch.chdir(world.root)
    dpo.main(world.dpo("resumed", steps=10, eval_every=5, resume=True))
    assert without_clock(world.root / "resumed") == without_clock(dpo_run[0].out)
    assert same(gpt.load(world.root / "resumed")[0], gpt.load(dpo_run[0].out)[0])


def test_precomputed_reference_gives_the_metrics_of_the_frozen_copy(dpo_run, world, monkeypatch):
    """And the second run reads the file: no reference is loaded at all."""
    expected = without_clock(dpo_run[0].out)
    loads = Spy(monkeypatch, dpo, "load_ref", lambda config: config.out)
    config = world.dpo("precomputed", steps=10, eval_every=5, precompute_ref=True)
    dpo.main(config)
    found = without_clock(config.out)
    assert len(loads.seen) == 2  # pairs and held-out pairs
    assert found[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for a, b in zip(found[:4], expected):  # later on a rounding error may have grown
        assert a == pytest.approx(b, rel=2e-4, abs=2e-5)
    dpo.main(replace(config, out=world.root / "precomputed-again", steps=4))
    assert len(loads.seen) == 2
    assert without_clock(world.root / "precomputed-again")[0] == {**found[0], "lr": pytest.approx(found[0]["lr"])}


def test_precomputed_references_are_told_apart(world):
    """By model, precision, tokenizer and length: none reads another one's numbers."""
    tokenizer, other = gpt.load_tokenizer(world.words), str(world.root / "other-ref")
    gpt.save(other, jax.tree.map(lambda x: 0.9 * x, world.model), tokenizer)
    batches = lambda length: gpt.Batches(world.pairs, "pairs", tokenizer, 16, length, 0)
    config = world.dpo("x")
    first = np.array(dpo.precompute(batches(12), config)[0])
    rows = batches(12)(0)
    direct = jax.jit(partial(dpo.pair_logprobs, config=config))(world.model, rows)
    np.testing.assert_allclose(first[rows["index"][:, 1]], direct, **CLOSE)
    for length, options in ((12, dict(ref=other)), (12, dict(dtype="bfloat16")), (7, dict())):
        found = np.array(dpo.precompute(batches(length), world.dpo("x", **options))[0])
        assert found.shape == first.shape and not np.allclose(found, first, rtol=1e-4)
    np.testing.assert_array_equal(dpo.precompute(batches(12), config)[0], first)


def test_ipo_learns_and_resumes_bit_for_bit(world, monkeypatch):
    config = world.ipo("ipo", eval_every=4)
    ipo_kto.main(config)
    steps = log(config.out)
    assert all(not PAIR_METRICS - row.keys() for row in steps)
    assert steps[0]["loss"] == pytest.approx(25, rel=1e-6) and steps[-1]["loss"] < 20
    assert steps[-1]["val/rewards/accuracies"] > 0.8
    stop_after(monkeypatch, ipo_kto, 2)
    with pytest.raises(SystemExit):
        ipo_kto.main(world.ipo("ipo-resumed", eval_every=4))
    monkeypatch.undo()
    monkeypatch.chdir(world.root)
    ipo_kto.main(world.ipo("ipo-resumed", eval_every=4, resume=True))
    assert without_clock(world.root / "ipo-resumed") == without_clock(config.out)
    assert same(gpt.load(world.root / "ipo-resumed")[0], gpt.load(config.out)[0])


def stop_after(monkeypatch, module, steps):
    """Somebody asks the run to stop in its step number `steps`."""
    put, calls = gpt.put_batch, []

    def put_and_stop(batch, *args):
        calls.append(1)
        if len(calls) == steps:
            signal.raise_signal(signal.SIGTERM)
        return put(batch, *args)

    monkeypatch.setattr(module.gpt, "put_batch", put_and_stop)


def test_kto_learns_weighs_its_classes_and_resumes_bit_for_bit(world, monkeypatch, capsys):
    config = world.kto("kto", eval_every=4, beta=0.5)
    ipo_kto.main(config)
    out = capsys.readouterr().out
    assert "48 desirable and 16 undesirable answers: lambda_D 1, lambda_U 2.25" in out
    assert "= 1.333; the paper has 1 to 4/3" in out
    steps = log(config.out)
    assert all(not PAIR_METRICS - {"rewards/accuracies"} - row.keys() and row["z0"] >= 0 for row in steps)
    batch = gpt.Batches(world.thumbs, "thumbs", gpt.load_tokenizer(world.words), 16, 40, 0)(0)
    assert steps[0]["loss"] == pytest.approx(np.where(batch["label"] > 0, 0.5, 1.125).mean(), rel=1e-5)
    assert steps[0]["z0"] == 0 and steps[0]["rewards/margins"] == 0
    assert steps[-1]["rewards/margins"] > 0.3 and steps[-1]["val/rewards/margins"] > 0.3
    stop_after(monkeypatch, ipo_kto, 4)
    with pytest.raises(SystemExit):
        ipo_kto.main(world.kto("kto-resumed", eval_every=4, beta=0.5))
    monkeypatch.undo()
    monkeypatch.chdir(world.root)
    assert 0 < len(log(world.root / "kto-resumed")) < 4
    ipo_kto.main(world.kto("kto-resumed", eval_every=4, beta=0.5, resume=True))
    assert without_clock(world.root / "kto-resumed") == without_clock(config.out)


def test_kto_splits_pairs_and_z0_is_that_of_mismatched_rows(world, monkeypatch, capsys):
    """The shipped loop's z0 against a loop over rows, at a policy that is not its reference."""
    other = str(world.root / "z0-ref")
    ref = jax.tree.map(lambda x: 1.3 * x, world.model)
    gpt.save(other, ref, gpt.load_tokenizer(world.words))
    seen = Spy(monkeypatch, ipo_kto, "mismatch", lambda batch, length: batch)
    config = world.kto("kto-pairs", data=(world.pairs,), ref=other, steps=1)
    ipo_kto.main(config)
    assert "64 desirable and 64 undesirable answers: lambda_D 1, lambda_U 1" in capsys.readouterr().out
    difference = []
    for prompt, answer in rows_of(ipo_kto.mismatch(seen.seen[0], 40)):
        ids, scored = np.array(prompt + answer), [0] * len(prompt) + [1] * len(answer)
        difference.append(by_brute_force(world.model, ids, scored) - by_brute_force(ref, ids, scored))
    assert np.mean(difference) > 0.01
    assert log(config.out)[0]["z0"] == pytest.approx(np.mean(difference), abs=1e-4)


# ---------------------------------------------------------------------------------------------------- errors


@pytest.fixture(scope="module")
def strangers(world, tmp_path_factory):
    """Files and a model that do not fit."""
    spec = json.loads((world.words / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    folder = tmp_path_factory.mktemp("strangers")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer" / "tokenizer_config.json").write_bytes((world.words / "tokenizer_config.json").read_bytes())
    gpt.save(folder / "ref", world.model, gpt.load_tokenizer(folder / "tokenizer"))
    return dict(
        ref=str(folder / "ref"),
        demos=write_rows(folder / "demos.jsonl", [dict(prompt="Human: a Assistant:", completion=" b")] * 32),
        halves=write_rows(folder / "halves.jsonl", [dict(prompt="Human: a Assistant:", chosen=" b")] * 32),
        one=write_rows(
            folder / "one.jsonl",
            [dict(prompt="Human: a Assistant:", completion=f" {x}", label=x < "d") for x in "abcdefgh" * 2],
        ),
        thumbs=world.thumbs,
    )


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("dpo", dict(data="halves"), "prompt, chosen.*pairs: .prompt, chosen, rejected.*DPO learns from pairs"),
        ("dpo", dict(data="demos"), "demonstrations are for sft.py"),
        ("dpo", dict(data="thumbs"), "single answers with a label for ipo_kto.py --loss kto"),
        ("ipo", dict(data="halves"), "prompt, chosen.*pairs: .prompt, chosen, rejected.*IPO learns from pairs"),
        ("ipo", dict(data="thumbs"), "IPO learns from pairs: single answers with a label are for --loss kto"),
        ("kto", dict(data="demos"), "KTO learns from thumbs: demonstrations are for sft.py"),
        ("kto", dict(batch_size=1), "needs 2 rows at least"),
        ("kto", dict(data="one"), "all prompts of .*one.jsonl are equal.*mix in data"),
        ("dpo", dict(ref="ref"), "ref has another tokenizer than .*Give a model that has the tokenizer of"),
        ("dpo", dict(ref="ref", precompute_ref=True), "ref has another tokenizer than"),
        ("ipo", dict(ref="ref"), "ref has another tokenizer than .*Give a model that has the tokenizer of"),
        ("dpo", dict(beta=0.0), "--beta 0.0: a price above 0"),
        ("ipo", dict(tau=-0.1), "--tau -0.1: below 0 the worse answers would be learned"),
        ("kto", dict(beta=0.0), "--beta 0.0: below 0 the worse .* at 0 none"),
        ("kto", dict(undesirable_weight=-1.0), "--undesirable-weight -1.0: below 0"),
        ("dpo", dict(lr=-1e-3), "a learning rate is 0 or above, not -0.001"),
        ("dpo", dict(label_smoothing=0.5, loss="robust"), "--label-smoothing 0.5: the share of wrong labels"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_to_do(world, strangers, name, options, message):
    options = {k: strangers.get(v, v) if isinstance(v, str) else v for k, v in options.items()}
    if "data" in options:
        options["data"] = (options["data"],)
    main = dpo.main if name == "dpo" else ipo_kto.main
    with pytest.raises(ValueError, match=message):
        main(getattr(world, name)("wrong", overwrite=True, **options))


@pytest.mark.parametrize("name, rows, micro, taken", [("dpo", 5, 1, 5), ("ipo", 5, 2, 4), ("kto", 3, 1, 6)])
def test_few_rows_are_a_smaller_batch(world, tmp_path, capsys, name, rows, micro, taken):
    """Each pair is two thumbs. One step an epoch; the weights have moved."""
    prompts = [f"Human: {x} Assistant:" for x in "abcdefgh"[:rows]]
    data = write_rows(tmp_path / "few.jsonl", [dict(prompt=p, chosen=" yes", rejected=" no") for p in prompts])
    write_rows(tmp_path / "few-heldout.jsonl", [dict(prompt=prompts[0], chosen=" yes", rejected=" no")])
    config = getattr(world, name)(f"few-{name}", data=(data,), steps=None, batch_size=32, micro_batches=micro)
    (dpo if name == "dpo" else ipo_kto).main(config)
    out, err = capsys.readouterr()
    assert f"rows are fewer than --batch-size 32: a batch has {taken}" in out and len(log(config.out)) == 1
    assert ("no validation: z0 needs two prompts" in err) == (name == "kto")
    moved = re.search(r"of its 5 pairs the policy now sides with 100%, by a mean margin \(z\) of (\S+) nats", out)
    assert moved is not None and float(moved[1]) > 0 if name == "dpo" else moved is None
    assert gpt.weights_hash(config.out) != gpt.weights_hash(gpt.find_folder(world.sft))


def test_too_few_rows_or_steps_are_refused(world, tmp_path):
    data = write_rows(tmp_path / "two.jsonl", [dict(prompt="Human: a Assistant:", chosen=" b", rejected=" c")] * 2)
    for options, message in (
        (dict(data=(data,), micro_batches=4), "2 rows cannot be shared by 1 devices and 4 micro-batches"),
        (dict(steps=0), "--steps 0: a run takes 1 step at least"),
    ):
        with pytest.raises(ValueError, match=message):
            dpo.main(world.dpo("too-few", **options))
    assert not (world.root / "too-few").exists()


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_rows_that_weigh_nothing_are_refused_before_training_and_not_measured(world, tmp_path, name):
    kind = "thumbs" if name == "kto" else "pairs"
    rows = [json.loads(line) for line in open(getattr(world, kind))]
    mute = write_rows(tmp_path / f"{kind}.jsonl", [row | {"weight": 0} for row in rows[:32]])
    module, make = (dpo if name == "dpo" else ipo_kto), getattr(world, name)
    for files in (dict(data=(mute,)), dict(heldout=mute)):
        with pytest.raises(ValueError, match=f"{kind}.jsonl: all rows have weight 0: nothing can be learned"):
            module.main(make("mute", **files))
    assert not (world.root / "mute").exists()
    batch = {"weight": np.zeros(4, np.float32)}
    few = type("", (), {"once": lambda self: [(batch, 4)]})()
    assert module.heldout_means(few, lambda batch: {"loss": 1.0}) == {}


def test_thumbs_of_one_side_are_said(world, tmp_path, capsys):
    rows = [dict(prompt=f"Human: {x} Assistant:", completion=" yes", label=True) for x in "abcd"]
    ipo_kto.main(world.kto("one-side", data=(write_rows(tmp_path / "up.jsonl", rows),), steps=1))
    assert "warning: no answer is undesirable" in capsys.readouterr().err


def test_the_command_line_says_it_in_one_line(world, strangers, monkeypatch, capsys):
    command = ["ipo_kto.py", "--init", world.sft, "--data", world.thumbs, "--out", str(world.root / "cli")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as stop:
        gpt.cli(ipo_kto.main, ipo_kto.Config, ipo_kto.__doc__)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.startswith("error: ") and error.count("\n") == 1
    assert not (world.root / "cli").exists()


def test_defaults_follow_the_loss(monkeypatch):
    for loss, data, out in (("ipo", "data/toy/pairs.jsonl", "out/ipo"), ("kto", "data/toy/thumbs.jsonl", "out/kto")):
        with pytest.raises(FileNotFoundError, match=data):
            ipo_kto.resolve(ipo_kto.Config(loss=loss))
        with monkeypatch.context() as patch:
            patch.setattr(gpt, "find_kind", lambda *_: None)  # the data are not looked at
            config = ipo_kto.resolve(ipo_kto.Config(loss=loss))
        assert config.data == (data,) and str(config.out) == out
