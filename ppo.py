"""PPO from human feedback: sample, score, and take a few clipped steps towards what scored better than expected.

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Schulman et al. 2017
(arXiv:1707.06347). An iteration has four phases. The last one takes several optimiser steps (`updates` in the code);
--steps counts iterations. With t over the tokens of a response, EOS included:

    1  y ~ policy(. | x), at --temperature; score(x, y) from a reward model, an ensemble or a function
    2  log-probs of policy and reference, and the critic's value V_t, at every token of y
    3  r_t = -beta (log policy(y_t) - log ref(y_t)),  plus the score at the last token
       A_t = sum_l lam^l delta_{t+l},  delta_t = r_t + V_{t+1} - V_t,  returns R_t = A_t + V_t;  whiten A
    4  a few epochs of minibatches:  w max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = policy_new / policy_old
       and for the critic:           1/2 max((V - R)^2, (clip(V, V_old +- eps_v) - R)^2),  eps_v = 0.2

Choices where code bases disagree:
1. The KL penalty is in the reward, as log policy - log ref of the token that was sampled ("k1" among Schulman's
   estimators of a KL, joschu.net/blog/kl-approx.html). k2 or k3 in the reward hardly pull back: near the reference they
   are of second order. k1 as a term of the loss does not pull at all: its gradient is 0 on average. k3 and the exact KL
   are logged, not used.
2. The score sits on the last real token: EOS, or the last one of a response that was cut off at --response-length. That
   is an end, too: nothing is bootstrapped beyond it. The value of token t is read where t is predicted.
3. Old log-probs are not those that sampling gave. They are computed after the rollout, from the same weights, with the
   arithmetic of the new ones, at the rollout's temperature. So the ratio of the first minibatch is 1, up to rounding.
   A sampler in another precision draws some tokens too often: each token's loss has the weight w =
   min(policy_old / sampler, 2), which is about 1 in fp32.
4. Advantages are whitened over the whole rollout. Losses are means over the tokens of a minibatch. Both are taken over
   all devices and micro-batches together; variances divide by n, not by n - 1.
5. A response that does not end scores min(score, 0) - (--missing-eos). In OpenAI's code (Huang et al. 2024,
   arXiv:2403.17031, "EOS trick") a constant replaces the score: where finished responses score less than that, the
   policy is paid for never ending.
6. Four models with their own weights: policy, frozen reference, critic, frozen reward model. (A reward model whose body
   is the reference's first layers, as probe.py makes them, is read from the reference's pass.) The critic starts with
   the body of the first reward model, which already knows what is good, and with a head of zeros. (Where the reward is
   a function, or only one of policy and reward model is an adapter, it has the policy's body.) Its bias is the mean
   score of the first rollout. With V = 0 the whole mean score would look like a surprise at the last token: every EOS
   would seem to earn it.
7. With --lora-rank the policy is a low-rank adapter on a frozen base (Hydra-PPO, arXiv:2309.00754), and the base itself
   is the reference. A reward model that `reward.py --lora-rank` trained is one more adapter on it, and the critic
   starts as that one, with its rank. `gpt.attach(adapter, base)` is the model that an adapter makes; a whole model
   comes back as it is.

    python ppo.py                                                      # out/sft + out/reward -> out/ppo
    python ppo.py --lora-rank 16 --reward out/reward-lora --out out/ppo-lora   # after reward.py --lora-rank (see there)
    python ppo.py --reward mine:brevity --out out/brief                # def brevity(prompts, responses, rows) -> floats
    python ppo.py --init out/hh-sft --reward out/hh-reward --data data/hh/prompts.jsonl --out out/hh-ppo --gold None

The defaults are the toy world's: README.md has the lengths and rates for a model of your own. Metrics have TRL's names,
in which `val/` and `eval/` are no held-out data: all of it is of the rollout.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # policy to start from; its frozen copy is the reference
    reward: tuple[str, ...] = ("out/reward",)  # reward-model folders (several: an ensemble), or one module:function
    data: tuple[str, ...] = ("data/toy/prompts.jsonl",)  # prompts; name:weight mixes several
    out: Path = Path("out/ppo")  # run folder
    steps: int = 90  # iterations: a rollout, and all optimiser steps on it
    batch_size: int = 128  # prompts an iteration
    minibatch_size: int = 64  # prompts an optimiser step
    micro_batches: int = 1  # parts of a minibatch that are computed one after the other, to save memory
    epochs: int = 2  # passes over each rollout
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of rollouts and of every log-prob

    lr: float | None = None  # policy's learning rate, falling linearly to a tenth (None: 3e-4; of adapters 6e-4)
    critic_lr: float | None = None  # critic's (None: the same)
    lora_rank: int = 0  # above 0: the policy is an adapter of this rank on a frozen base

    beta: float = 0.05  # price of one nat of KL to the reference, in scores
    lam: float = 0.95  # of GAE: 1 sums all rewards to come, 0 looks one token ahead and trusts the critic for the rest
    clip: float = 0.2  # of the probability ratio
    target_kl: float | None = None  # stop an iteration's epochs when KL(old || new) a token passes this
    missing_eos: float | None = 2.0  # price of not ending: the score becomes min(score, 0) - this; None: it stays
    combine: Literal["mean", "worst", "uwo"] = "mean"  # scores of an ensemble; uwo: mean - variance / 2

    gold: str | None = "toy:parts"  # module:function that knows the truth: logged as eval/gold, never trained on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, frozen models and rollouts
    remat: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 50  # iterations between checkpoints
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


CAP = 2.0  # of importance weights, w above


class State(NamedTuple):
    """All that learns. With --lora-rank policy and critic's body are adapters, of which `gpt.attach` makes models."""

    policy: gpt.GPT | gpt.Adapter
    policy_opt: tuple
    critic: gpt.ScoreModel
    critic_opt: tuple


class Rollout(NamedTuple):
    """One iteration's episodes. B prompts, Q prompt tokens (left-padded), T response tokens (right-padded)."""

    queries: jax.Array  # (B, Q)
    query_mask: jax.Array  # (B, Q)
    responses: jax.Array  # (B, T)
    mask: jax.Array  # (B, T) 1 on response tokens including EOS
    logprobs: jax.Array | None = None  # (B, T) "old": of the policy before the updates (choice 3)
    ref_logprobs: jax.Array | None = None  # (B, T)
    values: jax.Array | None = None  # (B, T)
    advantages: jax.Array | None = None  # (B, T)
    returns: jax.Array | None = None  # (B, T)
    weights: jax.Array | None = None  # (B, T) by `importance_weights`


# ------------------------------------------------------------------------------------- 1 sample and score


def sampler(policy, base, config: Config) -> gpt.GPT:
    """The policy as rollouts are drawn from it: in the precision in which its log-probs are asked for."""
    return gpt.cast(gpt.attach(policy, base), gpt.compute_dtype(config.dtype))


def score_responses(reward: gpt.Reward, batch, generation: gpt.Generation, texts, rows, ends, config: Config):
    """(scores (B,), the reference's states (B, T, D) where they come with the scores, metrics). A function is asked
    about this process's texts and rows, models about all token ids. A response ends with one of the ids `ends`, or is
    cut off."""
    inputs = batch["tokens"], batch["mask"], generation.tokens, generation.mask, ends, chunks(config)
    ref_hidden = None
    if reward.function:
        scores = gpt.gather_rows(gpt.check_scores(reward.function(*texts, rows), len(rows)))
        scores = gpt.put_batch({"scores": scores})["scores"]
    elif reward.reference:
        scores, ref_hidden = gpt.score_by_reference(reward.models[0], reward.reference, *inputs)
    else:
        members = jnp.stack([gpt.score(model, *inputs) for model in reward.models])
        scores = combine_scores(members, config.combine)
    ended = gpt.has_ended(generation.tokens, generation.mask, ends)
    if config.missing_eos is not None:  # whatever the scale of the scores, not to end costs at least that much
        scores = jnp.where(ended, scores, jnp.minimum(scores, 0) - config.missing_eos)
    return (
        scores,
        ref_hidden,
        {
            "objective/scores": scores.mean(),
            "objective/scores_std": scores.std(),
            "val/num_eos_tokens": ended.sum(),
            "eos_rate": ended.mean(),
        },
    )


def combine_scores(scores, how: str, uwo_coef: float = 0.5):
    """(members, B) -> (B,): mean, worst case, or mean - coef * population variance (Coste et al., arXiv:2310.02743)."""
    if how == "worst":
        return scores.min(0)
    return scores.mean(0) - (uwo_coef * scores.var(0) if how == "uwo" else 0.0)


def chunks(config: Config) -> int:
    """In how many pieces a rollout is scored: of as many rows as a micro-batch, or in one without micro-batches."""
    return config.batch_size * config.micro_batches // config.minibatch_size if config.micro_batches > 1 else 1


# ------------------------------------------------------------------------------------- 2 what the models say


def join(rollout: Rollout):
    """Prompt and response as one row: tokens and segments (B, Q + T), and Q."""
    tokens = jnp.concatenate([rollout.queries, rollout.responses], 1)
    segments = jnp.concatenate([rollout.query_mask, rollout.mask], 1)  # 0 hides padding, and what follows an EOS
    return tokens, segments, rollout.queries.shape[1]


def response_states(model: gpt.GPT, rollout: Rollout, config: Config):
    """(the model in the precision it computes in, its hidden states where response tokens are predicted (B, T, D))."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    tokens, segments, Q = join(rollout)
    return model, model(tokens, segments, config.remat)[:, Q - 1 : -1]  # the prompt's last token predicts the first


def policy_forward(model: gpt.GPT, rollout: Rollout, config: Config):
    """(log-probs of the response tokens, entropy), (B, T) each."""
    return gpt.head_logprobs(*response_states(model, rollout, config), rollout.responses, config.temperature)


def critic_forward(critic: gpt.ScoreModel, rollout: Rollout, config: Config):
    """V_t (B, T), read where token t is predicted: the state before it."""
    critic = gpt.cast(critic, gpt.compute_dtype(config.dtype))
    tokens, segments, Q = join(rollout)
    return critic.values(critic.body(tokens, segments, config.remat)[:, Q - 1 : -1])


def importance_weights(logprobs, sampled_logprobs, mask, cap=CAP):
    """min(policy / sampler, cap) at each token, 1 where mask is 0: all (..., T).

    Truncated importance sampling (Ionides 2008; for rollouts: Yao et al. 2025, "Your efficient RL framework secretly
    brings you off-policy RL training"): what a sampler of another precision, or of older weights, draws too often
    counts less. `logprobs` are the policy's before the update, so that the clip of `rho` is not concerned.
    """
    return jnp.minimum(jnp.exp(jnp.where(mask > 0, logprobs - sampled_logprobs, 0.0)), cap)


# ------------------------------------------------------------------------------------- 3 rewards and advantages


def token_rewards(scores, logprobs, ref_logprobs, mask, beta):
    """r_t = -beta (logprobs_t - ref_logprobs_t), plus scores at the last token: (B,), (B, T) x 3 -> (B, T).

    Stiennon et al. 2020, eq. in section 3.4. k1 as a reward keeps E[r] - beta KL(policy || ref) the exact objective.
    """
    positions = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask > 0, positions, -1), axis=1, keepdims=True)
    penalty = -beta * jnp.where(mask > 0, logprobs - ref_logprobs, 0.0)
    return penalty + jnp.where(positions == last, scores[:, None], 0.0)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16): (B, T) x 3 -> advantages, returns, both (B, T).

    Where mask is 0, reward and value count as 0, so nothing is bootstrapped past the end. Returns use the advantages
    before any whitening.
    """
    rewards, values = jnp.where(mask > 0, rewards, 0.0), jnp.where(mask > 0, values, 0.0)
    next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
    deltas = rewards + gamma * next_values - values

    def backwards(advantage, delta):
        advantage = delta + gamma * lam * advantage
        return advantage, advantage

    _, advantages = lax.scan(backwards, jnp.zeros_like(deltas[:, 0]), deltas.T, reverse=True)
    advantages = jnp.where(mask > 0, advantages.T, 0.0)
    return advantages, advantages + values


def whiten(x, mask):
    """x (B, T) shifted and scaled to mean 0 and (population) variance 1 over the tokens whose mask is 1."""
    mean = gpt.masked_mean(x, mask)
    white = (x - mean) * lax.rsqrt(gpt.masked_mean((x - mean) ** 2, mask) + 1e-8)
    return jnp.where(mask > 0, white, 0.0)


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over the tokens whose mask is 1: 1 is a perfect critic, 0 a constant one."""
    variance = lambda x: gpt.masked_mean((x - gpt.masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(returns - values) / (variance(returns) + 1e-8)


@partial(jax.jit, static_argnames="config")
def complete_rollout(
    state: State, base, ref, batch, generation: gpt.Generation, scores, config: Config, ref_hidden=None
):
    """Phases 2 and 3: (the whole Rollout, metrics). `ref_hidden` as from `score_responses`."""
    policy, critic = gpt.attach(state.policy, base), gpt.attach(state.critic, base)

    def ask_models(rows):
        rollout, ref_hidden = rows
        ref_says = response_states(ref, rollout, config) if ref_hidden is None else (ref, ref_hidden)
        both = *response_states(policy, rollout, config), *ref_says
        said = gpt.compare_heads(*both, rollout.responses, config.temperature)
        return *said, critic_forward(critic, rollout, config)

    rollout = Rollout(batch["tokens"], batch["mask"], generation.tokens, generation.mask)
    said = gpt.map_chunks(ask_models, (rollout, ref_hidden), chunks(config))
    logprobs, ref_logprobs, entropy, exact_kl, values = said
    rewards = token_rewards(scores, logprobs, ref_logprobs, rollout.mask, config.beta)
    advantages, returns = gae(rewards, values, rollout.mask, lam=config.lam)
    advantages = whiten(advantages, rollout.mask)

    weights = importance_weights(logprobs, generation.logprobs, rollout.mask)
    rollout = Rollout(*rollout[:4], logprobs, ref_logprobs, values, advantages, returns, weights)
    metrics = rollout_metrics(rollout, generation.logprobs, entropy, exact_kl, scores, config.beta)
    return rollout, metrics | {"val/explained_variance": explained_variance(values, returns, rollout.mask)}


def rollout_metrics(rollout: Rollout, sampled_logprobs, entropy, exact_kl, scores, beta):
    """KL to the reference, entropy, and how far the sampler's log-probs are from the policy's: (B, T) x 3, (B,)."""
    mask = rollout.mask
    per_sequence = lambda x: jnp.where(mask > 0, x, 0.0).sum(1).mean()
    log_ratio = rollout.logprobs - rollout.ref_logprobs
    drift = jnp.where(mask > 0, rollout.logprobs - sampled_logprobs, 0.0)
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
        "response_length": mask.sum(1).mean(),
    }


# ------------------------------------------------------------------------------------- 4 losses and updates


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2, weights=1.0):
    """Clipped surrogate (arXiv:1707.06347, eq. 7), token mean: (B, T) x 4 -> (scalar, metrics). `weights` (B, T) are
    those of `importance_weights`.

    KL(old || new) estimates use log_ratio = new - old on samples of old: k2 = log_ratio^2 / 2, k3 = ratio - 1 -
    log_ratio (Schulman's blog), the latter through expm1, which keeps its sign near 0.
    """
    log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    loss = gpt.masked_mean(weights * jnp.maximum(unclipped, clipped), mask)
    mean_ratio = gpt.masked_mean(ratio, mask)
    metrics = {
        "loss/policy_avg": loss,
        "policy/approxkl_avg": gpt.masked_mean(0.5 * log_ratio**2, mask),
        "policy/approxkl_k3": gpt.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask),
        "policy/clipfrac_avg": gpt.masked_mean(clipped > unclipped, mask),
        "val/ratio": mean_ratio,
        "val/ratio_var": gpt.masked_mean((ratio - mean_ratio) ** 2, mask),
    }
    return loss, metrics


def value_loss(values, old_values, returns, mask, clip=0.2):
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), token mean: (B, T) x 4 -> (scalar, metrics).

    The clipping is OpenAI's 2017 implementation's; clip=inf is half the mean squared error.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * gpt.masked_mean(jnp.maximum(plain, clipped), mask)
    return loss, {"loss/value_avg": loss, "val/clipfrac_avg": gpt.masked_mean(clipped > plain, mask)}


# Two programs and not one: XLA:CPU works on what is independent side by side, and a policy's and a critic's gradients
# in one program took 1.7 times as long as one after the other.


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnums=(0, 1))
def update_policy(policy, opt_state, base, rollout: Rollout, rows, optimizer, config: Config):
    """One step of the policy's optimiser on these rows of the rollout: (policy, opt_state, metrics)."""

    def loss_fn(policy, batch: Rollout):
        logprobs, _ = policy_forward(gpt.attach(policy, base), batch, config)
        return policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip, batch.weights)

    batch = take(rollout, rows)
    *new, metrics = gpt.descend(optimizer, loss_fn, policy, opt_state, batch, config.micro_batches, count_tokens)
    if config.target_kl:  # too far from the sampler already: this step is not taken (the critic's was)
        near = metrics["policy/approxkl_k3"] <= config.target_kl
        new = jax.tree.map(partial(jnp.where, near), new, [policy, opt_state])
    return *new, metrics


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnums=(0, 1))
def update_critic(critic, opt_state, base, rollout: Rollout, rows, optimizer, config: Config):
    """One step of the critic's optimiser on these rows of the rollout: (critic, opt_state, metrics)."""

    def loss_fn(critic, batch: Rollout):
        values = critic_forward(gpt.attach(critic, base), batch, config)
        return value_loss(values, batch.values, batch.returns, batch.mask)

    batch = take(rollout, rows)
    return gpt.descend(optimizer, loss_fn, critic, opt_state, batch, config.micro_batches, count_tokens)


def take(rollout: Rollout, rows) -> Rollout:
    return jax.tree.map(lambda x: gpt.shard_batch(x[rows]), rollout)


def count_tokens(batch: Rollout):
    """What the losses are means over: by it `gpt.descend` weighs micro-batches."""
    return batch.mask.sum()


def wait_if_many(results):
    """Of several processes each must finish one program before it starts the next: the two updates do not need each
    other's results, and their exchanges over the network would cross and wait for each other for ever."""
    return jax.block_until_ready(results) if jax.process_count() > 1 else results


def minibatches(iteration: int, config: Config):
    """Rows of each optimiser step of an iteration: --epochs shuffled passes over the rollout."""
    rng = np.random.default_rng((config.seed, iteration))
    for _ in range(config.epochs):
        yield from rng.permutation(config.batch_size).reshape(-1, config.minibatch_size)


def at_update(opt_state, update: int):
    """The state of an optimiser with the learning rate of optimiser step number `update`, however many steps it has
    taken: the rest of a rollout's minibatches may be skipped, and the rate still ends where it should."""
    is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
    at = lambda count: gpt.put_array(np.asarray(update, count.dtype), count.sharding)
    move = lambda x: x._replace(count=at(x.count)) if is_schedule(x) else x
    return jax.tree.map(move, opt_state, is_leaf=is_schedule)


def summarize_updates(history: list[dict], target_kl: float | None) -> dict:
    """Means over an iteration's optimiser steps, the ratio of the first one, and whether --target-kl ended it."""
    metrics = {name: sum(losses[name] for losses in history) / len(history) for name in history[0]}
    stopped = bool(target_kl and history[-1]["policy/approxkl_k3"] > target_kl)
    metrics |= {"loss": metrics["loss/value_avg"] + metrics["loss/policy_avg"]}
    metrics |= {"val/ratio_first": history[0]["val/ratio"]}
    return metrics | {"updates": len(history) - stopped, "stopped_early": float(stopped)}


# ------------------------------------------------------------------------------------- models


def load_models(config: Config, key):
    """(policy, base, reference, tokenizer). With --lora-rank the policy is an adapter on the base, which is also the
    reference; else there is no base, and the reference is a frozen copy of the policy."""
    model, tokenizer = gpt.load_policy(config.init)
    policy, base = gpt.trainable(model, config.lora_rank, config.dtype, key)
    return policy, base, base or gpt.load_frozen(config.init, config.dtype), tokenizer


def make_critic(policy, base, reward_models: list, key):
    """(critic, what it starts from): the body of the first reward model and a head of zeros; the policy's body where
    no reward model is of its sort, adapter or whole model: rewards may be a function."""
    fits = [
        model.body for model in reward_models if isinstance(model.body, gpt.Adapter) == isinstance(policy, gpt.Adapter)
    ]
    start, name = (fits[0], "reward body") if fits else (policy, "policy body")
    body = jax.tree.map(lambda x: jnp.array(x, jnp.float32), start)  # arrays of its own: they are donated
    critic = gpt.init_score_model(gpt.attach(start, base), key, zero=True)
    return gpt.shard(replace(critic, body=body)), name


# ------------------------------------------------------------------------------------- main


def resolve(config: Config) -> Config:
    """The defaults that depend on others, and complaints about what does not go together."""
    gpt.check_batch_size(config.minibatch_size, "--minibatch-size")
    if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batches:
        raise ValueError(
            "--batch-size must be a multiple of --minibatch-size, and that of --micro-batches; "
            f"they are {config.batch_size}, {config.minibatch_size} and {config.micro_batches}"
        )
    if config.missing_eos is not None and config.missing_eos < 0:
        raise ValueError(
            f"--missing-eos {config.missing_eos}: a price, 0 or above; below 0 not to end would be paid for"
        )
    if not config.temperature > 0:
        raise ValueError(f"--temperature {config.temperature}: above 0, since log-probs are divided by it")
    if config.epochs < 1:
        raise ValueError(f"--epochs {config.epochs}: a rollout is learned from once at least")
    # Adapters have twice the rate here, not 5 to 10 times as where rows are learned from: on three seeds their
    # policy moved as far from the reference as one of whole weights, and at 1e-3 further (docs/report.md).
    lr = config.lr if config.lr is not None else 6e-4 if config.lora_rank else 3e-4
    return replace(config, lr=lr, critic_lr=config.critic_lr if config.critic_lr is not None else lr)


def main(config: Config):
    key, config = gpt.start(config.seed), resolve(config)
    policy, base, ref, tokenizer = load_models(config, key)
    reward = gpt.load_reward(config.reward, tokenizer, config.init, config.dtype, ref, adapters=config.lora_rank > 0)
    critic, critic_from = make_critic(policy, base, reward.models, key)
    reward = gpt.attach_reward(reward, base)
    gold = gpt.load_function(config.gold) if config.gold else None
    prompts = gpt.Batches(
        config.data, "prompts", tokenizer, config.batch_size, config.prompt_length, config.seed,
        skip_bad=config.skip_bad_rows,
    )  # fmt: skip

    prompts.plan(config.steps)
    updates = config.epochs * (config.batch_size // config.minibatch_size)  # optimiser steps an iteration
    lr, critic_lr = (
        gpt.schedule(x, config.steps * updates, decay="linear", final=0.1) for x in (config.lr, config.critic_lr)
    )
    policy_optimizer, critic_optimizer = (gpt.adamw(x, eps=1e-5) for x in (lr, critic_lr))
    policy_opt, critic_opt = gpt.shard((policy_optimizer.init(policy), critic_optimizer.init(critic)))
    state = State(policy, policy_opt, critic, critic_opt)

    run = gpt.Run(prompts.hashes, dict(critic=critic_from), **vars(config))
    state, first = run.restore(state)
    watch = gpt.Watch(run.warn)
    for iteration in run.steps(first):
        host_batch = prompts(iteration)
        batch = gpt.put_batch(host_batch)
        # 1 sample and score
        generation = gpt.generate(
            sampler(state.policy, base, config), batch["tokens"], batch["mask"], jax.random.fold_in(key, iteration),
            config.response_length, ends=tokenizer.end_ids, pad=tokenizer.pad_id, temperature=config.temperature,
        )  # fmt: skip
        rows = gpt.own_rows(prompts.rows(host_batch))
        texts = gpt.own_texts(tokenizer, host_batch, generation, rows)
        scores, ref_hidden, metrics = score_responses(reward, batch, generation, texts, rows, tokenizer.end_ids, config)
        metrics["special_tokens"] = gpt.special_tokens(tokenizer, generation)
        if iteration == 0:  # or every EOS would seem to earn the mean score (choice 6)
            state = state._replace(critic=replace(state.critic, bias=scores.mean()))
        # 2, 3 what the models say of every response token; rewards and advantages
        rollout, more = complete_rollout(state, base, ref, batch, generation, scores, config, ref_hidden)
        # 4 epochs of minibatches
        # an iteration has its own learning rates, also after one that --target-kl ended early
        opts, history = at_update((state.policy_opt, state.critic_opt), iteration * updates), []
        state = state._replace(policy_opt=opts[0], critic_opt=opts[1])
        for minibatch in minibatches(iteration, config):
            args = base, rollout, minibatch
            critic, critic_opt, losses = wait_if_many(
                update_critic(state.critic, state.critic_opt, *args, critic_optimizer, config)
            )
            policy, policy_opt, more_losses = wait_if_many(
                update_policy(state.policy, state.policy_opt, *args, policy_optimizer, config)
            )
            state = State(policy, policy_opt, critic, critic_opt)
            history.append(losses | more_losses)
            if config.target_kl and more_losses["policy/approxkl_k3"] > config.target_kl:
                break

        metrics = gpt.to_numpy(metrics | more | summarize_updates(history, config.target_kl))
        metrics["lr"] = float(lr(iteration * updates))
        if gold:
            metrics |= gpt.mean_gold(gold(*texts, rows), "eval/")
        if iteration % 10 == 0 or iteration == config.steps - 1:
            for prompt, response, score in list(zip(*texts, gpt.to_numpy(scores)))[:2]:
                run.sample(iteration, prompt=prompt, response=response, score=float(score))
        watch(metrics)
        run.log(iteration, metrics)
        run.checkpoint(iteration, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
