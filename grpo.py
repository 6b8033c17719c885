"""The critic-free family: RLOO, GRPO and what came after. K answers to one prompt are each other's baseline.

RLOO: Ahmadian et al. 2024 (arXiv:2402.14740). GRPO: Shao et al. 2024 (arXiv:2402.03300). Each iteration, with r_i the
score of answer i to a prompt, t over its tokens, EOS included, and rho = policy_new / policy_old:

    1  y_1 .. y_K ~ policy(. | x), at --temperature; r_i from a reward model, an ensemble or a function
    2  log-probs of policy and reference at every token
    3  A_i = (r_i - mean) / std      --advantage grpo; every token of an answer has its answer's advantage
             r_i - mean              --advantage centred
             r_i - mean of others    --advantage rloo
    4  epochs of minibatches: mean over tokens of  max(-A rho, -A clip(rho, 1 - low, 1 + high)) + beta KL

What came after is a switch each; docs/grpo.md has the table of names:

    --loss       token: mean over all tokens (DAPO). sequence: mean over answers of their means (GRPO's paper).
                 constant: sum over tokens / (answers x --response-length) (Dr. GRPO). gspo: one ratio an answer.
                 cispo: the ratio is clipped as a weight, so that every token keeps its gradient
    --kl         reward: r_i - beta sum_t (log policy - log ref), as in PPO; the default of rloo.
                 loss: beta rho k3 in the loss, k3 = exp(lr) - 1 - lr, lr = log ref - log policy; the default otherwise.
                 loss-uncorrected: beta k3, as GRPO's paper has it
    --clip       low and high: 0.2 0.28 is DAPO's clip-higher
    --filter-groups  leaves out groups whose answers all score alike (DAPO)
    --teacher    on-policy distillation (arXiv:2306.13649): the teacher's log-probs in place of reward and reference;
                 --advantage, --beta and --missing-eos are not used then

Choices where code bases disagree:
1. k3 without rho has on average the gradient of KL(ref || policy), and misses the optimum of E[r] - beta KL(policy ||
   ref). With rho it is the KL of each token, which still does not see what a token does to the states after it: only
   --kl reward has the optimum exactly (tests/test_enumerable.py).
2. The sampler may be another model than the one that is trained (precision, cached keys): a token counts
   min(policy_old / sampler, 2) times (truncated importance weights). All log-probs are at the rollout's temperature.
3. Minibatches are whole groups: a group's prompt is computed once, in sampling, scoring and update.
4. A response that does not end is scored as in ppo.py.
5. With --lora-rank the policy is a low-rank adapter on a frozen base, which itself is the reference.
6. A reward model whose body is the reference's first layers (probe.py makes such) is read from the reference's pass.

    python grpo.py                                            # out/sft + out/reward -> out/grpo, by GRPO
    python grpo.py --advantage rloo --out out/rloo
    python grpo.py --advantage centred --loss constant --kl reward --out out/dr-grpo
    python grpo.py --teacher out/ppo --out out/distilled      # the student is --init
    python grpo.py --reward mine:brevity --out out/brief      # def brevity(prompts, responses, rows) -> floats
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # policy to start from; its frozen copy is the reference
    reward: tuple[str, ...] = ("out/reward",)  # reward-model folders (several: their mean), or one module:function
    teacher: str | None = None  # model whose log-probs are the reward, in the place of --reward and of the reference
    data: tuple[str, ...] = ("data/toy/prompts.jsonl",)  # prompts; name:weight mixes several
    out: Path = Path("out/grpo")  # run folder
    advantage: Literal["grpo", "centred", "rloo"] = "grpo"  # how an answer is compared with the others to its prompt
    loss: Literal["token", "sequence", "constant", "gspo", "cispo"] = "token"  # what is averaged, what has a ratio
    kl: Literal["reward", "loss", "loss-uncorrected"] | None = None  # where it is paid (None: see above)
    filter_groups: bool = False  # leave out groups whose answers all score alike
    group_size: int = 4  # answers to each prompt
    steps: int = 90  # iterations: a rollout, and all optimiser steps on it
    batch_size: int = 128  # answers an iteration, to --batch-size / --group-size prompts
    minibatch_size: int = 64  # answers an optimiser step, whole groups
    micro_batches: int = 1  # parts of a minibatch that are computed one after the other, to save memory
    epochs: int = 2  # passes over each rollout
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of rollouts and of every log-prob

    lr: float | None = None  # falling linearly to a tenth (None: 3e-4; of adapters 6e-4)
    lora_rank: int = 0  # above 0: the policy is an adapter of this rank on a frozen base

    beta: float = 0.05  # price of one nat of KL to the reference, in scores
    clip: tuple[float, float] = (0.2, 0.2)  # how far below and above 1 a probability ratio counts
    missing_eos: float | None = 2.0  # price of not ending: the score becomes min(score, 0) - this; None: it stays

    gold: str | None = "toy:parts"  # module:function that knows the truth: logged as eval/gold, never trained on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, frozen models and rollouts
    remat: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first


CAP = 2.0  # of importance weights
SAVE_EVERY = 50  # iterations between checkpoints


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter  # with --lora-rank an adapter, of which `gpt.attach` makes a model
    policy_opt: tuple


class Rollout(NamedTuple):
    """One iteration's episodes: K answers to each of P prompts. Q prompt tokens (left-padded), T response tokens
    (right-padded)."""

    queries: jax.Array  # (P, Q)
    query_mask: jax.Array  # (P, Q)
    responses: jax.Array  # (P, K, T)
    mask: jax.Array  # (P, K, T) 1 on response tokens including EOS
    sampled_logprobs: jax.Array  # (P, K, T) of the sampler
    scores: jax.Array  # (P, K)
    logprobs: jax.Array | None = None  # (P, K, T) "old": of the policy before the update, by `compare`
    ref_logprobs: jax.Array | None = None  # (P, K, T)
    advantages: jax.Array | None = None  # (P, K, T)
    weights: jax.Array | None = None  # (P, K, T) by `importance_weights`
    ref_hidden: jax.Array | None = None  # (P, K, T, D) the reference's states, where `update` asks its head


# ------------------------------------------------------------------------------------- 1 sample and score


def sampler(policy, base, config: Config) -> gpt.GPT:
    """The policy as rollouts are drawn from it: in the precision in which its log-probs are asked for."""
    return gpt.cast(gpt.attach(policy, base), gpt.compute_dtype(config.dtype))


def score_responses(reward: gpt.Reward, batch, generation: gpt.Generation, texts, rows, ends, config: Config):
    """(scores (P, K), the reference's states (P, K, T, D) where they come with these, metrics). A function is asked
    about this process's texts and rows, models about all token ids; with a teacher there are neither, and all scores
    are 0. A response ends with one of the ids `ends`, or is cut off."""
    prompts, responses = (batch["tokens"], batch["mask"]), (generation.tokens, generation.mask, ends, chunks(config))
    by_group = lambda x: x.reshape(-1, config.group_size, *x.shape[1:])
    scores, ref_hidden = jnp.zeros(len(generation.tokens)), None
    if reward.function:
        scores = gpt.gather_rows(gpt.check_scores(reward.function(*texts, rows), len(rows)))
        scores = gpt.put_batch({"scores": scores})["scores"]
    elif reward.reference:
        scores, ref_hidden = gpt.score_by_reference(reward.models[0], reward.reference, *prompts, *responses)
        ref_hidden = by_group(ref_hidden)
    elif reward.models:
        copies = [jnp.repeat(x, config.group_size, axis=0) for x in prompts]
        scores = jnp.stack([gpt.score(model, *copies, *responses) for model in reward.models]).mean(0)
    ended = gpt.has_ended(generation.tokens, generation.mask, ends)
    if config.missing_eos is not None:  # whatever the scale of the scores, not to end costs at least that much
        scores = jnp.where(ended, scores, jnp.minimum(scores, 0) - config.missing_eos)
    return (
        by_group(scores),
        ref_hidden,
        {
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(),
            "val/num_eos_tokens": ended.sum(),
            "eos_rate": ended.mean(),
        },
    )


def chunks(config: Config) -> int:
    """In how many pieces a rollout is scored: of as many rows as a micro-batch, or in one without micro-batches."""
    return config.batch_size * config.micro_batches // config.minibatch_size if config.micro_batches > 1 else 1


# ------------------------------------------------------------------------------------- 2 what policy and reference say


def cast_outside(model: gpt.GPT, dtype) -> gpt.GPT:
    """`gpt.cast`, on a CPU of all but the blocks: `gpt.GPT.scan_blocks` casts each of these in its turn, without a
    copy of all of them. Devices that share weights would send each other twice the bytes that way."""
    if jax.default_backend() != "cpu":
        return gpt.cast(model, dtype)
    return replace(gpt.cast(replace(model, blocks=None), dtype), blocks=model.blocks)


def response_states(model: gpt.GPT, rollout: Rollout, config: Config):
    """(the model in the precision it computes in, its hidden states where response tokens are predicted (P K, T, D)). A
    group's prompt is computed once: its last token predicts the first of each response."""
    P, K, T = rollout.responses.shape
    flat = lambda x: x.reshape(P * K, T)
    model = cast_outside(model, gpt.compute_dtype(config.dtype))
    before = lambda first, then: jnp.concatenate([jnp.repeat(first[:, -1:], K, axis=0), flat(then)[:, :-1]], 1)
    tokens, segments = before(rollout.queries, rollout.responses), before(rollout.query_mask, rollout.mask)
    prefix, prefix_mask = (jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in rollout[:2])  # never of width 0
    return model, gpt.continue_prefix(model, tokens, segments, prefix, prefix_mask, config.remat)


def policy_logprobs(model: gpt.GPT, hidden, rollout: Rollout, config: Config):
    """Log-probs (P, K, T) of the response tokens, of a model's `response_states`."""
    responses = rollout.responses.reshape(len(hidden), -1)
    return gpt.head_logprobs(model, hidden, responses, config.temperature)[0].reshape(rollout.responses.shape)


def importance_weights(logprobs, sampled_logprobs, mask, cap=CAP):
    """min(policy / sampler, cap) at each token, 1 where mask is 0: all (..., T).

    Truncated importance sampling (Ionides 2008; for rollouts: Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"): what a sampler of another precision, or of older weights, draws too often
    counts less. `logprobs` are the policy's before the update, so that the clip of `rho` is not concerned.
    """
    return jnp.minimum(jnp.exp(jnp.where(mask > 0, logprobs - sampled_logprobs, 0.0)), cap)


# ------------------------------------------------------------------------------------- 3 advantages


def grpo_advantages(scores):
    """(r - mean) / std among the K answers to a prompt: (P, K) -> (P, K), 0 where all are equal.

    DeepSeekMath (arXiv:2402.03300, section 4.1.2). std by K - 1, plus 1e-4, as in TRL and OpenRLHF.
    """
    return centred_advantages(scores) / (scores.std(1, ddof=1, keepdims=True) + 1e-4)


def centred_advantages(scores):
    """r - mean: (P, K) -> (P, K). Without the division a prompt whose answers score nearly alike does not weigh as much
    as one that they part on (Dr. GRPO, arXiv:2503.20783, section 3.2)."""
    return scores - scores.mean(1, keepdims=True)


def rloo_advantages(scores):
    """r_i - mean of the others' r: (P, K) -> (P, K).

    REINFORCE leave-one-out (arXiv:2402.14740, eq. 9): the baseline does not depend on the answer, hence no bias. It is
    K / (K - 1) times `centred_advantages`.
    """
    K = scores.shape[1]
    return K / (K - 1) * centred_advantages(scores)


ADVANTAGES = {"grpo": grpo_advantages, "centred": centred_advantages, "rloo": rloo_advantages}


def advantages(scores, logprobs, ref_logprobs, mask, how: str, beta: float = 0.0):
    """An answer's advantage at each of its tokens: (P, K), (P, K, T) x 3 -> (P, K, T). `beta` is the price of a nat of
    KL in the reward, r - beta sum_t (log policy - log ref), and 0 where the loss has that term."""
    kl = jnp.where(mask > 0, logprobs - ref_logprobs, 0.0).sum(-1)
    return jnp.where(mask > 0, ADVANTAGES[how](scores - beta * kl)[..., None], 0.0)


def distillation_advantages(logprobs, teacher_logprobs, mask):
    """log teacher - log policy at each token, its own reward and no other's: (P, K, T) x 3 -> (P, K, T).

    On average over samples, -A grad log policy is the gradient of KL(policy || teacher) at each state that the policy
    visits: on-policy distillation (Agarwal et al. 2024, arXiv:2306.13649, with the reverse KL).
    """
    return jnp.where(mask > 0, teacher_logprobs - logprobs, 0.0)


@partial(jax.jit, static_argnames="config")
def complete_rollout(policy, base, ref, batch, generation: gpt.Generation, scores, config: Config, ref_hidden=None):
    """Phases 2 and 3: (the whole Rollout, metrics). `ref_hidden` as from `score_responses`. Where one optimiser step
    learns from it, the policy is not asked here: `update` computes its states in any case, and does what is left of
    both phases."""
    tokens, mask, sampled_logprobs = (x.reshape(*scores.shape, -1) for x in generation)
    rollout = Rollout(batch["tokens"], batch["mask"], tokens, mask, sampled_logprobs, scores)
    once, flat = learned_once(config), lambda x: x.reshape(-1, *x.shape[2:])  # (P, K, ...) -> (P K, ...)

    def ask_models(rows):
        rollout, ref_hidden = rows
        policy_says = None if once else response_states(gpt.attach(policy, base), rollout, config)
        ref_says = response_states(ref, rollout, config) if ref_hidden is None else (ref, flat(ref_hidden))
        said = None if once else compare(*policy_says, *ref_says, rollout, config)
        return said, ref_says[1].reshape(*rollout.mask.shape, -1)

    said, ref_hidden = gpt.map_chunks(ask_models, (rollout, ref_hidden), chunks(config))
    if once or (config.teacher and config.kl == "loss"):
        rollout = rollout._replace(ref_hidden=ref_hidden)
    return (rollout, {}) if once else weigh(rollout, said, config)


def learned_once(config: Config) -> bool:
    """Whether a rollout has one optimiser step, before which the policy is the one that sampled it."""
    return config.epochs == 1 and config.batch_size == config.minibatch_size and config.micro_batches == 1


def compare(policy: gpt.GPT, hidden, ref: gpt.GPT, ref_hidden, rollout: Rollout, config: Config):
    """`gpt.compare_heads` of the response tokens, (P, K, T) each, from both models' `response_states`."""
    responses = rollout.responses.reshape(len(hidden), -1)
    said = gpt.compare_heads(policy, hidden, ref, ref_hidden, responses, config.temperature)
    return tuple(x.reshape(rollout.mask.shape) for x in said)


def weigh(rollout: Rollout, said, config: Config):
    """Step 3: (the rollout with advantages and importance weights, metrics), of what `compare` says of it."""
    logprobs, ref_logprobs, entropy, kl = said
    scores, mask = rollout.scores, rollout.mask
    if config.teacher:
        by_token = distillation_advantages(logprobs, ref_logprobs, mask)
    else:
        beta = config.beta if config.kl == "reward" else 0.0
        by_token = advantages(scores, logprobs, ref_logprobs, mask, config.advantage, beta)
    weights = importance_weights(logprobs, rollout.sampled_logprobs, mask)
    rollout = rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, advantages=by_token, weights=weights)
    metrics = rollout_metrics(rollout, entropy, kl, config.beta)
    spread = jnp.ptp(scores, axis=1) > 0
    metrics["frac_reward_zero_std"] = 1 - spread.mean()
    if config.filter_groups:  # a group without spread has nothing to say, and takes no part in any mean
        rollout = rollout._replace(mask=jnp.where(spread[:, None, None], rollout.mask, 0))
    if config.teacher:  # the score of an answer is what it lacks to the teacher
        lacks = rollout.advantages.sum(-1)
        metrics |= {"objective/scores": lacks.mean(), "objective/scores_std": lacks.std()}
    return rollout, metrics


def rollout_metrics(rollout: Rollout, entropy, exact_kl, beta):
    """KL to the reference, entropy, and how far sampler and policy are apart: (P, K, T) x 2."""
    mask, scores = rollout.mask, rollout.scores
    per_sequence = lambda x: jnp.where(mask > 0, x, 0.0).sum(-1).mean()
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    drift = jnp.where(mask > 0, rollout.logprobs - rollout.sampled_logprobs, 0.0)
    kl = per_sequence(log_ratio)
    return {
        "objective/kl": kl,
        "objective/kl_k3": per_sequence(jnp.expm1(-log_ratio) + log_ratio),
        "objective/kl_exact": per_sequence(exact_kl),
        "objective/entropy": per_sequence(entropy),
        "objective/non_score_reward": -beta * kl,
        "objective/rlhf_reward": scores.mean() - beta * kl,
        "policy/entropy_avg": gpt.masked_mean(entropy, mask),
        "val/decode_drift": jnp.max(jnp.abs(drift)),
        "val/decode_drift_avg": gpt.masked_mean(jnp.abs(drift), mask),
        "val/decode_ratio_off": gpt.masked_mean(jnp.abs(jnp.expm1(drift)) > 0.1, mask),  # by more than a tenth
        "val/sampler_kl": per_sequence(jnp.expm1(drift) - drift),  # KL(sampler || policy), by k3
        "val/importance_capped": gpt.masked_mean(drift > np.log(CAP), mask),
        "response_length": mask.sum(-1).mean(),
    }


# ------------------------------------------------------------------------------------- 4 losses and updates


def clipped_surrogate(ratio, advantages, clip=(0.2, 0.2)):
    """max(-A rho, -A clip(rho, 1 - low, 1 + high)), elementwise (arXiv:1707.06347, eq. 7; clip-higher, high > low:
    DAPO, arXiv:2503.14476, eq. 8). A token beyond the clip has no gradient."""
    low, high = clip
    return jnp.maximum(-advantages * ratio, -advantages * jnp.clip(ratio, 1 - low, 1 + high))


def cispo_surrogate(ratio, logprobs, advantages, clip=(0.2, 0.2)):
    """-min(rho, 1 + high) A log policy with the weight held constant, elementwise (MiniMax-M1, arXiv:2506.13585, eq.
    4-5): a token whose ratio is large keeps its gradient, at the weight of the clip. There is no lower clip."""
    return -lax.stop_gradient(jnp.minimum(ratio, 1 + clip[1])) * advantages * logprobs


def sequence_log_ratio(log_ratio, mask):
    """The mean over an answer's tokens, at each of them: log of GSPO's ratio (policy(y) / old(y))^(1 / |y|)
    (arXiv:2507.18071, eq. 7): (..., T) x 2 -> (..., T)."""
    mean = jnp.where(mask > 0, log_ratio, 0.0).sum(-1, keepdims=True) / jnp.maximum(mask.sum(-1, keepdims=True), 1)
    return jnp.where(mask > 0, mean, 0.0)


def aggregate(x, mask, loss: str):
    """One number of a loss at each token: (..., T) x 2 -> scalar. What it does to long answers:

    token, cispo     sum over all tokens / their number: each token counts the same, a long answer more than a short one
    sequence, gspo   mean over answers of the mean over their tokens (arXiv:2402.03300, eq. 3): each answer counts the
                     same, so that a token of a long bad answer is punished less
    constant         sum over all tokens / (answers x T) (Dr. GRPO, arXiv:2503.20783, section 3.2): as token, but what a
                     token counts does not depend on how long the other answers of its batch are
    """
    answers = mask.max(-1) > 0
    if loss in ("token", "cispo"):
        return gpt.masked_mean(x, mask)
    each = jnp.where(mask > 0, x, 0.0).sum(-1)
    length = mask.shape[-1] if loss == "constant" else jnp.maximum(mask.sum(-1), 1)
    return gpt.masked_mean(each / length, answers)


def counted(mask, loss: str):
    """What `aggregate` is a mean over, tokens or answers: by it `gpt.descend` weighs micro-batches."""
    return mask.sum() if loss in ("token", "cispo") else (mask.max(-1) > 0).sum()


def policy_loss(logprobs, old_logprobs, advantages, mask, weights, clip=(0.2, 0.2), loss: str = "token"):
    """The surrogate, weighted and averaged: (..., T) x 5 -> (scalar, metrics).

    KL(old || new) estimates use log_ratio = new - old on samples of old: k2 = log_ratio^2 / 2, k3 = ratio - 1 -
    log_ratio (Schulman's blog), the latter through expm1, which keeps its sign near 0.
    """
    log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(sequence_log_ratio(log_ratio, mask) if loss == "gspo" else log_ratio)
    if loss == "cispo":
        terms = cispo_surrogate(ratio, jnp.where(mask > 0, logprobs, 0.0), advantages, clip)
    else:
        terms = clipped_surrogate(ratio, advantages, clip)
    value = aggregate(weights * terms, mask, loss)
    mean_ratio = gpt.masked_mean(ratio, mask)
    beyond = jnp.where(advantages > 0, ratio > 1 + clip[1], (ratio < 1 - clip[0]) & (loss != "cispo"))
    return value, {
        "loss/policy_avg": value,
        "policy/approxkl_avg": gpt.masked_mean(0.5 * log_ratio**2, mask),
        "policy/approxkl_k3": gpt.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "policy/clipfrac_avg": gpt.masked_mean(beyond & (advantages != 0), mask),
        "val/ratio": mean_ratio,
        "val/ratio_var": gpt.masked_mean((ratio - mean_ratio) ** 2, mask),
    }


def kl_k3(logprobs, ref_logprobs, mask):
    """GRPO's penalty (arXiv:2402.03300, eq. 4) at each token: exp(lr) - 1 - lr, lr = ref - policy, (..., T) x 3.

    Differentiated on samples of the policy, its gradient is on average that of KL(ref || policy).
    """
    log_ratio = jnp.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return jnp.expm1(log_ratio) - log_ratio


def kl_corrected(logprobs, old_logprobs, ref_logprobs, mask):
    """The same, weighted by policy / old, (..., T) x 4: value and gradient are on average those of KL(policy || ref) at
    each state (DeepSeek-V3.2, arXiv:2512.02556; arXiv:2512.21852)."""
    ratio = jnp.exp(jnp.where(mask > 0, logprobs - old_logprobs, 0.0))
    return ratio * kl_k3(logprobs, ref_logprobs, mask)


def rollout_loss(policy: gpt.GPT, hidden, logprobs, batch: Rollout, ref, config: Config):
    """(loss, metrics) of a weighed rollout, from the policy's states and log-probs: surrogate and KL."""
    mask, weights, kl = batch.mask, batch.weights, None
    loss, metrics = policy_loss(logprobs, batch.logprobs, batch.advantages, mask, weights, config.clip, config.loss)
    if config.teacher and config.kl == "loss":  # the teacher's whole distribution instead
        theirs = batch.ref_hidden.reshape(hidden.shape)
        kl = gpt.head_kl(policy, hidden, ref, theirs, config.temperature).reshape(mask.shape)
        loss = aggregate(weights * kl, mask, config.loss)
        return loss, metrics | {"loss/policy_avg": loss}
    if config.kl == "loss":
        kl = kl_corrected(logprobs, batch.logprobs, batch.ref_logprobs, mask)
    if config.kl == "loss-uncorrected":
        kl = kl_k3(logprobs, batch.ref_logprobs, mask)
    return loss + (0.0 if kl is None else config.beta * aggregate(weights * kl, mask, config.loss)), metrics


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnums=0)
def update(state: State, base, ref, rollout: Rollout, rows, optimizer, config: Config):
    """One optimiser step on the groups `rows` of the rollout: (state, metrics)."""

    def loss_fn(policy, batch: Rollout):
        policy, hidden = response_states(gpt.attach(policy, base), batch, config)
        if batch.logprobs is None:  # nobody has asked the policy yet: before this step it is the old one too
            said = compare(policy, hidden, ref, batch.ref_hidden.reshape(hidden.shape), batch, config)
            batch, metrics = weigh(batch, lax.stop_gradient(said), config)
            logprobs = said[0]
        else:
            logprobs, metrics = policy_logprobs(policy, hidden, batch, config), {}
        loss, more = rollout_loss(policy, hidden, logprobs, batch, ref, config)
        return loss, metrics | more

    batch = jax.tree.map(lambda x: gpt.shard_batch(x[rows]), rollout)
    count = lambda batch: counted(batch.mask, config.loss)
    *new, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    return State(*new), metrics


def minibatches(iteration: int, config: Config):
    """Groups of each optimiser step of an iteration: --epochs shuffled passes over the rollout."""
    rng = np.random.default_rng((config.seed, iteration))
    for _ in range(config.epochs):
        groups = rng.permutation(config.batch_size // config.group_size)
        yield from groups.reshape(-1, config.minibatch_size // config.group_size)


def summarize_updates(history: list[dict]) -> dict:
    """Means over an iteration's optimiser steps, and the ratio of the first one."""
    metrics = {name: sum(losses[name] for losses in history) / len(history) for name in history[0]}
    return metrics | {"loss": metrics["loss/policy_avg"], "val/ratio_first": history[0]["val/ratio"]}


# ------------------------------------------------------------------------------------- models


def load_models(config: Config, key):
    """(policy, base, reference, tokenizer). With --lora-rank the policy is an adapter on the base, which is also the
    reference; else there is no base, and the reference is a frozen copy of the policy. With --teacher the reference is
    the teacher."""
    model, tokenizer = gpt.load_policy(config.init)
    policy, base = gpt.trainable(model, config.lora_rank, config.dtype, key)
    if config.teacher:
        gpt.check_tokenizer_of(config.teacher, tokenizer, config.init)
        return policy, base, gpt.load_frozen(config.teacher, config.dtype), tokenizer
    return policy, base, base or gpt.load_frozen(config.init, config.dtype), tokenizer


def load_reward(config: Config, tokenizer, base, ref) -> gpt.Reward:
    """What scores answers: nothing where a teacher does."""
    if config.teacher:
        return gpt.Reward([], None)
    adapters = config.lora_rank > 0
    return gpt.attach_reward(gpt.load_reward(config.reward, tokenizer, config.init, config.dtype, ref, adapters), base)


# ------------------------------------------------------------------------------------- main


def resolve(config: Config) -> Config:
    """The defaults that depend on others, and complaints about what does not go together."""
    K = config.group_size
    if K < 2 or config.minibatch_size % K:
        raise ValueError(
            "--group-size is 2 or more, and --minibatch-size a multiple of it: an answer is compared with others"
        )
    if config.batch_size % config.minibatch_size or config.minibatch_size % (config.micro_batches * K):
        raise ValueError(
            "--batch-size must be a multiple of --minibatch-size, and that of --micro-batches x --group-size; "
            f"they are {config.batch_size}, {config.minibatch_size} and {config.micro_batches} x {K}"
        )
    gpt.check_batch_size(config.minibatch_size // K, "--minibatch-size / --group-size")
    if config.missing_eos is not None and config.missing_eos < 0:
        raise ValueError(
            f"--missing-eos {config.missing_eos}: a price, 0 or above; below 0 not to end would be paid for"
        )
    if not config.temperature > 0:
        raise ValueError(f"--temperature {config.temperature}: above 0, since log-probs are divided by it")
    if config.epochs < 1:
        raise ValueError(f"--epochs {config.epochs}: a rollout is learned from once at least")
    if config.teacher and config.kl == "loss-uncorrected":
        raise ValueError(
            "--teacher goes with --kl loss (its whole distribution) or reward (its log-probs of the tokens)"
        )
    if config.teacher and config.filter_groups:
        raise ValueError("--teacher gives no scores by which --filter-groups could choose: leave one of them out")
    # the rate of adapters is that of ppo.py, where it was measured
    lr = config.lr if config.lr is not None else 6e-4 if config.lora_rank else 3e-4
    kl = config.kl or ("reward" if config.advantage == "rloo" else "loss")
    return replace(config, lr=lr, kl=kl)


def main(config: Config):
    key, config = gpt.start(config.seed), resolve(config)
    policy, base, ref, tokenizer = load_models(config, key)
    reward = load_reward(config, tokenizer, base, ref)
    gold = gpt.load_function(config.gold) if config.gold else None
    K = config.group_size
    prompts = gpt.Batches(
        config.data, "prompts", tokenizer, config.batch_size // K, config.prompt_length, config.seed
    )  # fmt: skip

    prompts.plan(config.steps)
    updates = config.epochs * (config.batch_size // config.minibatch_size)  # optimiser steps an iteration
    lr = gpt.schedule(config.lr, config.steps * updates, decay="linear", final=0.1)
    optimizer = gpt.adamw(lr, eps=1e-5)
    state = State(policy, gpt.shard(optimizer.init(policy)))

    run = gpt.Run(prompts.hashes, save_every=SAVE_EVERY, **vars(config))
    state, first = run.restore(state)
    watch = gpt.Watch(run.warn)
    for iteration in run.steps(first):
        host_batch = prompts(iteration)
        batch = gpt.put_batch(host_batch)
        # 1 sample and score
        generation = gpt.generate(
            sampler(state.policy, base, config), batch["tokens"], batch["mask"], jax.random.fold_in(key, iteration),
            config.response_length, ends=tokenizer.end_ids, pad=tokenizer.pad_id, temperature=config.temperature,
            copies=K,
        )  # fmt: skip
        asked = {name: np.repeat(x, K, axis=0) for name, x in host_batch.items()}
        rows = gpt.own_rows(prompts.rows(asked))
        texts = gpt.own_texts(tokenizer, asked, generation, rows)
        scores, ref_hidden, metrics = score_responses(reward, batch, generation, texts, rows, tokenizer.end_ids, config)
        metrics["special_tokens"] = gpt.special_tokens(tokenizer, generation)
        # 2, 3 what policy and reference say of every response token; advantages
        rollout, more = complete_rollout(state.policy, base, ref, batch, generation, scores, config, ref_hidden)
        # 4 epochs of minibatches
        history = []
        for minibatch in minibatches(iteration, config):
            state, losses = update(state, base, ref, rollout, minibatch, optimizer, config)
            history.append(losses)

        metrics = gpt.to_numpy(metrics | more | summarize_updates(history))
        metrics["lr"] = float(lr(iteration * updates))
        if gold:
            metrics |= gpt.mean_gold(gold(*texts, rows), "eval/")
        if iteration % 10 == 0 or iteration == config.steps - 1:
            for prompt, response, score in list(zip(*texts, gpt.to_numpy(scores).ravel()))[:2]:
                run.sample(iteration, prompt=prompt, response=response, score=float(score))
        watch(metrics)
        run.log(iteration, metrics)
        run.checkpoint(iteration, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
