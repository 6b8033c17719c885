"""grpo.py: advantages, losses, penalties and weights against numbers by hand, brute force and enumeration; groups."""

import itertools
import json
from dataclasses import replace
from functools import partial

import golden_trl
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_losses import EOS, PAD, copy, expected_update, noisy, same

import gpt
import grpo

SGD = optax.sgd(1.0)  # the step is the gradient
K = 4
SCORES = jnp.asarray(np.random.default_rng(5).normal(size=(2, K)), jnp.float32)
BOTH = np.array([1, 0])  # groups


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# ---------------------------------------------------------------------------------------------------- advantages


def test_grpo_compares_within_a_group_by_the_sample_standard_deviation():
    ours = grpo.grpo_advantages(jnp.array([[1.0, 3.0, 8.0], [5.0, 5.0, 5.0]]))  # squares 9 + 1 + 16 over n - 1 = 2
    np.testing.assert_allclose(ours[0], np.array([-3, -1, 4]) / (np.sqrt(13) + 1e-4), rtol=1e-6)
    assert (ours[1] == 0).all()  # all alike: nothing to learn, and no division by 0


def test_without_the_division_a_narrow_group_counts_less():
    """Dr. GRPO: the same order of answers, ten times nearer together."""
    wide, narrow = grpo.centred_advantages(jnp.array([[0.0, 1.0, 5.0], [0.0, 0.1, 0.5]]))
    np.testing.assert_allclose(wide, [-2, -1, 3])
    np.testing.assert_allclose(narrow, [-0.2, -0.1, 0.3], rtol=1e-6)
    divided = grpo.grpo_advantages(jnp.array([[0.0, 1.0, 5.0], [0.0, 0.1, 0.5]]))
    np.testing.assert_allclose(divided[0], divided[1], rtol=1e-3)


def test_rloo_leaves_the_answer_itself_out_of_its_baseline():
    ours = grpo.rloo_advantages(jnp.array([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    by_hand = [[1 - (2 + 6) / 2, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2], [-1.5, -1.5, 3.0]]
    np.testing.assert_allclose(ours, by_hand, rtol=1e-6)


def test_the_expected_rloo_gradient_is_that_of_the_expected_reward():
    """All pairs of answers out of three, weighed by their probability."""
    logits, rewards = jnp.array([0.3, -0.2, 1.0]), jnp.array([1.0, -2.0, 0.5])
    p = np.asarray(jax.nn.softmax(logits))
    score = np.eye(3) - p  # row y: gradient of log p(y)
    total = 0.0
    for pair in itertools.product(range(3), repeat=2):
        (advantages,) = np.asarray(grpo.rloo_advantages(rewards[jnp.array([pair])]))
        total = total + p[list(pair)].prod() * np.mean([a * score[y] for a, y in zip(advantages, pair)], axis=0)
    exact = jax.grad(lambda z: jax.nn.softmax(z) @ rewards)(logits)
    np.testing.assert_allclose(total, exact, atol=1e-6)


def test_kl_in_the_reward_is_that_of_the_whole_answer():
    scores, mask = jnp.array([[1.0, 2.0]]), jnp.array([[[1, 1, 0], [1, 1, 1]]])
    logprobs = jnp.array([[[-1.0, -2.0, 9.0], [-1.0, -1.0, -1.0]]])
    ref = jnp.array([[[-2.0, -2.0, 0.0], [-1.5, -0.5, -2.0]]])
    ours = grpo.advantages(scores, logprobs, ref, mask, "rloo", 0.5)
    gap = (2 - 0.5 * 1) - (1 - 0.5 * 1)  # KL 1 and 1: what is masked does not count
    np.testing.assert_allclose(ours, gap * np.array([[[-1, -1, 0], [1, 1, 1]]]), rtol=1e-6)
    free = grpo.advantages(scores, logprobs, ref, mask, "centred")
    np.testing.assert_allclose(free[:, :, 0], [[-0.5, 0.5]])


# ---------------------------------------------------------------------------------------------------- losses


def test_a_token_beyond_the_clip_has_no_gradient_and_the_two_sides_are_apart():
    """DAPO's clip-higher: 0.2 below, 0.28 above."""
    slope = jax.vmap(jax.grad(lambda ratio, a: grpo.clipped_surrogate(ratio, a, (0.2, 0.28))))
    ratios, signs = jnp.array([0.79, 0.81, 1.27, 1.29]), jnp.array([1.0, -1.0])
    up, down = (np.asarray(slope(ratios, jnp.full(4, sign))) for sign in signs)
    np.testing.assert_allclose(up, [-1, -1, -1, 0])  # a good token may rise to 1.28
    np.testing.assert_allclose(down, [0, 1, 1, 1])  # a bad one may fall to 0.8
    value = grpo.clipped_surrogate(jnp.array([1.5, 0.5]), jnp.array([2.0, -2.0]), (0.2, 0.28))
    np.testing.assert_allclose(value, [-2 * 1.28, 2 * 0.8], rtol=1e-6)


def test_cispo_clips_the_weight_and_keeps_every_gradient():
    def slope(logprob, old, advantage):
        return jax.grad(lambda x: grpo.cispo_surrogate(jnp.exp(x - old), x, advantage, (0.2, 0.5)))(logprob)

    np.testing.assert_allclose(slope(-1.0, -1.1, 2.0), -2 * np.exp(0.1), rtol=1e-5)
    np.testing.assert_allclose(slope(-1.0, -3.0, 2.0), -2 * 1.5, rtol=1e-5)  # ratio 7.4: the weight of the clip
    np.testing.assert_allclose(slope(-3.0, -1.0, -2.0), 2 * np.exp(-2), rtol=1e-5)  # no lower clip


def test_gspo_has_one_ratio_an_answer_the_geometric_mean_of_its_tokens():
    log_ratio, mask = jnp.array([[0.3, -0.1, 5.0], [0.2, 0.2, 0.2]]), jnp.array([[1, 1, 0], [1, 1, 1]])
    np.testing.assert_allclose(grpo.sequence_log_ratio(log_ratio, mask), [[0.1, 0.1, 0], [0.2, 0.2, 0.2]], rtol=1e-5)
    new, old, ones = jnp.log(jnp.array([[0.5, 0.9]])), jnp.log(jnp.array([[0.4, 0.5]])), jnp.ones((1, 2))
    ratio = np.sqrt(0.5 / 0.4 * 0.9 / 0.5)  # 1.5: clipped for both tokens, though the first alone would not be
    loss, metrics = grpo.policy_loss(new, old, 2 * ones, ones, ones, (0.3, 0.3), "gspo")
    np.testing.assert_allclose([loss, metrics["val/ratio"]], [-2 * 1.3, ratio], rtol=1e-6)
    assert metrics["policy/clipfrac_avg"] == 1
    by_token = grpo.policy_loss(new, old, 2 * ones, ones, ones, (0.3, 0.3), "token")[1]
    assert by_token["policy/clipfrac_avg"] == 0.5


def test_three_means_and_what_they_do_to_long_answers():
    """A bad answer of four tokens beside a good one of two, T = 4."""
    mask = jnp.array([[[1, 1, 0, 0], [1, 1, 1, 1]]])
    x = jnp.array([[[1.0, 2.0, 9.0, 9.0], [3.0, 4.0, 5.0, 6.0]]])
    mean = lambda loss: float(grpo.aggregate(x, mask, loss))
    assert mean("token") == mean("cispo") == pytest.approx((3 + 18) / 6)
    assert mean("sequence") == mean("gspo") == pytest.approx((1.5 + 4.5) / 2)
    assert mean("constant") == pytest.approx((3 + 18) / (2 * 4))
    weight = lambda loss: np.asarray(jax.grad(lambda x: grpo.aggregate(x, mask, loss))(x))[0, :, 0]
    np.testing.assert_allclose(weight("token"), [1 / 6, 1 / 6], rtol=1e-6)
    np.testing.assert_allclose(weight("sequence"), [1 / 4, 1 / 8], rtol=1e-6)  # a long answer's token counts half
    np.testing.assert_allclose(weight("constant"), [1 / 8, 1 / 8], rtol=1e-6)
    longer = jnp.ones_like(mask)  # the short answer grows: the other's tokens must not notice
    grown = lambda loss: np.asarray(jax.grad(lambda x: grpo.aggregate(x, longer, loss))(x))[0, 1, 0]
    assert grown("constant") == weight("constant")[1] and grown("token") != weight("token")[1]


@pytest.mark.parametrize("loss", ["token", "sequence", "constant", "gspo", "cispo"])
def test_an_answer_without_tokens_counts_for_nothing(loss):
    mask = jnp.array([[[1, 1, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]])
    x = jnp.arange(12.0).reshape(2, 2, 3)
    assert grpo.aggregate(x, mask, loss) == grpo.aggregate(x[:1], mask[:1], loss)
    assert grpo.counted(mask, loss) == (3 if loss in ("token", "cispo") else 2)
    assert grpo.aggregate(x[1:], mask[1:], loss) == 0


def test_kl_penalties_and_their_gradients_by_enumeration(x64):
    """Three tokens. Samples of `old`, whose probabilities are not differentiated; `policy` has moved on from it."""
    old, p, q = np.array([0.3, 0.3, 0.4]), np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.4, 0.2])
    z, one = jnp.log(jnp.asarray(p)), jnp.ones(3)
    log_old, log_q = jnp.log(jnp.asarray(old)), jnp.log(jnp.asarray(q))
    plain = lambda z: p @ grpo.kl_k3(jax.nn.log_softmax(z), log_q, one)
    corrected = lambda z: old @ grpo.kl_corrected(jax.nn.log_softmax(z), log_old, log_q, one)
    reverse = lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - log_q)).sum()
    np.testing.assert_allclose([plain(z), corrected(z)], reverse(z))  # the same value
    np.testing.assert_allclose(jax.grad(plain)(z), p - q)  # the gradient of KL(ref || policy)
    np.testing.assert_allclose(jax.grad(corrected)(z), jax.grad(reverse)(z), atol=1e-12)
    assert np.abs(jax.grad(reverse)(z) - (p - q)).max() > 0.03
    assert (grpo.kl_k3(z, log_q, 0 * one) == 0).all() and (grpo.kl_corrected(z, log_old, log_q, 0 * one) == 0).all()


def test_importance_weights_are_truncated_ratios_of_policy_and_sampler():
    logprobs, sampled = jnp.log(jnp.array([[0.5, 0.6, 0.3]])), jnp.log(jnp.array([[0.25, 0.1, 0.9]]))
    weights = grpo.importance_weights(logprobs, sampled, jnp.array([[1, 1, 0]]), cap=3.0)
    np.testing.assert_allclose(weights, [[2, 3, 1]], rtol=1e-5)
    old, ones = jnp.zeros((1, 3)), jnp.ones((1, 3))
    for loss in ("token", "sequence", "cispo"):
        weigh = lambda w, loss=loss: grpo.policy_loss(logprobs, logprobs, ones, ones, w, loss=loss)[0]
        slopes = jax.grad(lambda w, weigh=weigh: weigh(w))(ones)
        np.testing.assert_allclose(weigh(weights), (slopes * weights).sum(), rtol=1e-5)  # linear in them
        assert weigh(weights) != weigh(ones) and (old == 0).all()


def test_on_average_distillation_has_the_gradient_of_the_kl_to_the_teacher(x64):
    p, teacher = np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.4, 0.1])
    z, one = jnp.log(jnp.asarray(p)), jnp.ones(3)
    advantages = grpo.distillation_advantages(z, jnp.log(teacher), one)
    surrogate = lambda z: -p @ (advantages * jax.nn.log_softmax(z))
    reverse = lambda z: (jax.nn.softmax(z) * (jax.nn.log_softmax(z) - jnp.log(teacher))).sum()
    np.testing.assert_allclose(jax.grad(surrogate)(z), jax.grad(reverse)(z), atol=1e-12)
    assert (grpo.distillation_advantages(z, jnp.log(teacher), 0 * one) == 0).all()


@pytest.mark.parametrize("name", golden_trl.VARIANTS)
def test_losses_and_gradients_are_those_of_trl(name, x64):
    """What TRL 1.16 has for the same log-probs, to the last digits (golden_trl.py)."""
    x = {key: jnp.asarray(value) for key, value in golden_trl.inputs().items()}
    _, _, corrected, low, high = golden_trl.VARIANTS[name]
    loss, mask = name.split(",")[0], x["mask"]
    clip = (low, high - 1 if loss == "cispo" else high)
    advantages = jnp.where(mask > 0, x["advantages"][:, None], 0.0)

    def ours(new):
        value, _ = grpo.policy_loss(new, x["old"], advantages, mask, jnp.ones(mask.shape), clip, loss)
        k3 = grpo.kl_corrected(new, x["old"], x["ref"], mask) if corrected else grpo.kl_k3(new, x["ref"], mask)
        return value + golden_trl.BETA * grpo.aggregate(k3, mask, loss)

    value, gradient = jax.value_and_grad(ours)(x["new"])
    wanted = json.loads(golden_trl.GOLDEN.read_text())[name]
    np.testing.assert_allclose(value, wanted["loss"], rtol=1e-9)
    np.testing.assert_allclose(gradient, wanted["gradient"], atol=1e-12)


# ---------------------------------------------------------------------------------------------------- on a model


def world(**options):
    """A tiny policy and reference, two left-padded prompts with four samples each, and the configuration."""
    shape = gpt.make_config(7, 16, 1, 2, 16)
    policy, ref = noisy(shape, 0), noisy(shape, 1)
    settings = dict(dtype="float32", batch_size=8, minibatch_size=8, group_size=K, beta=0.1, response_length=5)
    config = grpo.resolve(grpo.Config(**settings | options))
    tokens, segments = jnp.array([[PAD, PAD, PAD, 3], [1, 2, 5, 4]]), jnp.array([[0, 0, 0, 1], [1, 1, 1, 1]])
    batch = dict(tokens=tokens, mask=segments)
    return policy, ref, batch, sample(policy, batch, config), config


def sample(policy, batch, config, copies=K):
    return gpt.generate(
        policy, batch["tokens"], batch["mask"], jax.random.key(4), 5, ends=(EOS,), pad=PAD, copies=copies,
        temperature=config.temperature,
    )  # fmt: skip


def plain_logprobs(model, rollout, temperature=1.0):
    """Log-probs (P, K, T) with each answer behind its own copy of the prompt."""
    K, Q = rollout.responses.shape[1], rollout.queries.shape[1]
    behind = lambda first, then: jnp.concatenate([jnp.repeat(first, K, 0), then.reshape(-1, then.shape[-1])], 1)
    tokens, segments = behind(rollout.queries, rollout.responses), behind(rollout.query_mask, rollout.mask)
    logprobs = gpt.token_logprobs(model, tokens, segments, temperature)[:, Q - 1 :]
    return logprobs.reshape(rollout.mask.shape) * rollout.mask


def test_several_answers_to_a_prompt_are_those_to_its_copies():
    policy, _, batch, generation, config = world(temperature=0.7)
    assert 8 < generation.mask.sum() < 40  # some end early, some go on
    twins = {name: jnp.repeat(x, K, axis=0) for name, x in batch.items()}
    other = sample(policy, twins, config, copies=1)
    np.testing.assert_array_equal(generation.tokens, other.tokens)
    np.testing.assert_array_equal(generation.mask, other.mask)
    np.testing.assert_allclose(generation.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_prompt_that_is_computed_once_gives_the_log_probs_of_its_copies(temperature):
    """Also a prompt of one token, which has nothing before the answer's first row."""
    policy, ref, batch, generation, config = world(temperature=temperature)
    rollout, metrics = grpo.complete_rollout(policy, None, ref, batch, generation, SCORES, config)
    for model, found in ((policy, rollout.logprobs), (ref, rollout.ref_logprobs)):
        np.testing.assert_allclose(found * rollout.mask, plain_logprobs(model, rollout, temperature), atol=1e-5)
    assert metrics["val/decode_drift"] < 1e-4 and metrics["val/importance_capped"] == 0
    np.testing.assert_allclose(rollout.weights, 1, atol=1e-4)
    narrow = rollout._replace(queries=rollout.queries[:, -1:], query_mask=rollout.query_mask[:, -1:])
    logprobs = jax.jit(lambda *args: grpo.policy_logprobs(*grpo.response_states(*args, config), args[1], config))(
        policy, narrow
    )
    np.testing.assert_allclose(logprobs * narrow.mask, plain_logprobs(policy, narrow, temperature), atol=1e-5)


def test_a_sampler_that_is_another_model_is_weighed_by_its_own_log_probs():
    """Half of all tokens were drawn a third more often than the policy would, the others four times less often."""
    policy, ref, batch, generation, config = world()
    more = np.log(np.where(np.arange(40).reshape(8, 5) % 2, 4 / 3, 1 / 4))
    drawn = generation._replace(logprobs=generation.logprobs + more)
    rollout, metrics = grpo.complete_rollout(policy, None, ref, batch, drawn, SCORES, config)
    mask, often = np.asarray(rollout.mask), more.reshape(2, K, 5) > 0
    np.testing.assert_allclose(rollout.weights, np.where(mask == 0, 1, np.where(often, 3 / 4, 2)), rtol=1e-4)
    np.testing.assert_allclose(metrics["val/importance_capped"], (mask * ~often).sum() / mask.sum(), rtol=1e-5)
    k3 = np.where(often, 3 / 4 - 1 - np.log(3 / 4), 4 - 1 - np.log(4)) * mask
    np.testing.assert_allclose(metrics["val/sampler_kl"], k3.sum() / 8, rtol=1e-3)


VARIANTS = [
    ("grpo", "token", "loss"), ("rloo", "token", "reward"), ("centred", "constant", "loss-uncorrected"),
    ("grpo", "gspo", "reward"), ("rloo", "cispo", "loss"), ("grpo", "sequence", "loss"),
]  # fmt: skip


@pytest.mark.parametrize("advantage, loss, kl", VARIANTS)
def test_the_first_step_is_the_gradient_of_its_definition(advantage, loss, kl):
    policy, ref, batch, generation, config = world(advantage=advantage, loss=loss, kl=kl)
    rollout, _ = grpo.complete_rollout(policy, None, ref, batch, generation, SCORES, config)
    mask, log_ratio = rollout.mask, (rollout.logprobs - rollout.ref_logprobs) * rollout.mask
    scores = np.asarray(SCORES - (0.1 * log_ratio.sum(-1) if kl == "reward" else 0.0))
    rows = scores - scores.mean(1, keepdims=True)
    if advantage == "rloo":
        rows = np.stack([[g[i] - np.delete(g, i).mean() for i in range(K)] for g in scores])
    if advantage == "grpo":
        rows = rows / (scores.std(1, ddof=1, keepdims=True) + 1e-4)
    np.testing.assert_allclose(rollout.advantages, rows[..., None] * mask, atol=1e-4)

    start = copy(policy)
    after, metrics = grpo.update(grpo.State(start, SGD.init(start)), None, ref, rollout, BOTH, SGD, config)
    np.testing.assert_allclose(metrics["val/ratio"], 1, rtol=1e-6)
    lengths = mask.sum(-1, keepdims=True)
    weight = {"sequence": mask / lengths / 8, "constant": mask / (8 * 5)}.get(loss, mask / mask.sum())
    answers = mask / lengths / 8  # of GSPO every token has its answer's mean log-ratio

    def objective(policy):
        logprobs = plain_logprobs(policy, rollout)
        ratio = jnp.exp(jnp.where(mask, rollout.ref_logprobs - logprobs, 0.0))
        k3 = ratio - 1 - jnp.log(ratio)
        if kl == "loss":
            k3 = jnp.exp(logprobs - jax.lax.stop_gradient(logprobs)) * k3
        share = answers if loss == "gspo" else weight
        price = 0.0 if kl == "reward" else 0.1
        return (-logprobs * rollout.advantages * share + price * k3 * share).sum()

    (wanted,) = expected_update(objective, policy)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), after.policy, wanted)


def test_the_clip_the_weights_and_the_loss_are_those_that_were_asked_for(monkeypatch):
    policy, ref, batch, generation, config = world(clip=(0.07, 0.3), loss="gspo")
    asked, loss, rows = [], grpo.policy_loss, jnp.zeros((2, K, 5))
    monkeypatch.setattr(grpo, "policy_loss", lambda *args: asked.append(args[4:]) or loss(*args))
    sampled = (x.reshape(2, K, 5) for x in generation)
    rollout = grpo.Rollout(*batch.values(), *sampled, SCORES, rows, rows, rows, rows)
    step = partial(grpo.update.__wrapped__, base=None, ref=ref, rows=BOTH, optimizer=SGD, config=config)
    jax.eval_shape(lambda policy: step(grpo.State(policy, SGD.init(policy)), rollout=rollout), policy)
    weights, clip, loss = asked[0]
    assert weights.shape == (2, K, 5) and (clip, loss) == ((0.07, 0.3), "gspo")


@pytest.mark.parametrize(
    "ways",
    [
        dict(advantage="rloo", loss="sequence", kl="reward", filter_groups=True),
        dict(loss="cispo", kl="loss", temperature=0.7),
        dict(teacher="out/ppo", kl="loss"),
    ],
)
def test_one_step_on_a_rollout_asks_the_policy_once_and_learns_the_same(ways):
    """Also the metrics, and where the sampler is another model than the policy."""
    policy, ref, batch, generation, several = world(**ways)
    generation = generation._replace(logprobs=generation.logprobs + 0.3)
    scores, found = SCORES.at[0].set(0.5), []
    for config in (several, replace(several, epochs=1)):
        rollout, metrics = grpo.complete_rollout(policy, None, ref, batch, generation, scores, config)
        start = copy(policy)
        state, more = grpo.update(grpo.State(start, SGD.init(start)), None, ref, rollout, BOTH, SGD, config)
        found.append((state.policy, metrics | more))
    assert rollout.logprobs is None  # the policy was asked in the update alone
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), *found)


def learned(policy, ref, rollout, rows, config):
    start = copy(policy)
    return grpo.update(grpo.State(start, SGD.init(start)), None, ref, rollout, rows, SGD, config)[0].policy


@pytest.mark.parametrize("loss", ["token", "sequence", "constant"])
def test_micro_batches_of_unequal_lengths_equal_one_big_batch(loss):
    policy, ref, batch, generation, config = world(loss=loss)
    rollout, _ = grpo.complete_rollout(policy, None, ref, batch, generation, SCORES, config)
    assert rollout.mask[0].sum() != rollout.mask[1].sum()
    whole, parts = (learned(policy, ref, rollout, BOTH, replace(config, micro_batches=n)) for n in (1, 2))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), parts, whole)
    parts, _ = grpo.complete_rollout(policy, None, ref, batch, generation, SCORES, replace(config, micro_batches=2))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), parts, rollout)


def test_groups_without_spread_are_counted_and_left_out_where_asked():
    policy, ref, batch, generation, config = world()
    scores = SCORES.at[0].set(0.5)
    rollout, metrics = grpo.complete_rollout(policy, None, ref, batch, generation, scores, config)
    assert metrics["frac_reward_zero_std"] == 0.5 and rollout.mask[0].any() and not rollout.advantages[0].any()
    config = replace(config, filter_groups=True)
    filtered, same_metrics = grpo.complete_rollout(policy, None, ref, batch, generation, scores, config)
    assert not filtered.mask[0].any() and same(filtered.mask[1], rollout.mask[1]) and same(metrics, same_metrics)
    both, one = (learned(policy, ref, filtered, rows, config) for rows in (BOTH, BOTH[:1]))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), both, one)  # as if it had not been sampled
    assert not same(both, learned(policy, ref, rollout, BOTH, config))  # where it stays, its KL is paid


def test_a_student_equal_to_its_teacher_learns_nothing_and_another_comes_nearer():
    policy, teacher, batch, generation, config = world(teacher="out/ppo", kl="loss")
    scores = jnp.zeros((2, K))
    step = lambda ref: grpo.complete_rollout(policy, None, ref, batch, generation, scores, config)
    rollout, metrics = step(copy(policy))
    assert metrics["objective/kl_exact"] == pytest.approx(0, abs=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-5), learned(policy, policy, rollout, BOTH, config), policy)
    rollout, metrics = step(teacher)
    np.testing.assert_allclose(metrics["objective/scores"], -metrics["objective/kl"], rtol=1e-5)
    small = optax.sgd(0.1)
    for kl in ("loss", "reward"):
        start = grpo.State(copy(policy), small.init(policy))
        way = replace(config, kl=kl)
        rollout, _ = grpo.complete_rollout(policy, None, teacher, batch, generation, scores, way)
        after = grpo.update(start, None, teacher, rollout, BOTH, small, way)[0].policy
        _, moved = grpo.complete_rollout(after, None, teacher, batch, generation, scores, way)
        assert moved["objective/kl_exact"] < metrics["objective/kl_exact"]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(group_size=1), "--group-size is 2 or more"),
        (dict(minibatch_size=6), "--minibatch-size a multiple of it"),
        (dict(batch_size=12), "--batch-size must be a multiple of --minibatch-size"),
        (dict(micro_batches=4), "--micro-batches x --group-size"),
        (dict(missing_eos=-1.0), "--missing-eos -1.0: a price, 0 or above"),
        (dict(temperature=0.0), "--temperature 0.0: above 0, since log-probs are divided by it"),
        (dict(epochs=0), "--epochs 0: a rollout is learned from once at least"),
        (dict(teacher="out/ppo", kl="loss-uncorrected"), "--teacher goes with --kl loss"),
        (dict(teacher="out/ppo", filter_groups=True), "no scores by which --filter-groups could choose"),
    ],
)
def test_what_does_not_go_together_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        world(**options)


def test_the_kl_is_paid_where_the_paper_has_it_unless_told_otherwise():
    where = lambda **options: world(**options)[-1].kl
    assert (where(), where(advantage="rloo"), where(advantage="rloo", kl="loss")) == ("loss", "reward", "loss")
