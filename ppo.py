"""PPO from human feedback: sample, score, and take a few clipped steps towards what scored better than expected.

Ziegler et al. 2019 (arXiv:1909.08593), Stiennon et al. 2020 (arXiv:2009.01325), Schulman et al. 2017
(arXiv:1707.06347). Each iteration, with t over the tokens of a response, EOS included:

    1  y ~ policy(. | x), at --temperature; score(x, y) from a reward model, an ensemble or a function
    2  r_t = -beta (log policy(y_t) - log ref(y_t)),  plus the score at the last token
    3  A_t = sum_l (gamma lam)^l delta_{t+l},  delta_t = r_t + gamma V_{t+1} - V_t,  returns R_t = A_t + V_t; whiten A
    4  a few epochs of minibatches:  max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = policy_new / policy_old
       and for the critic:           1/2 max((V - R)^2, (clip(V, V_old +- eps_v) - R)^2)

Choices where code bases disagree:
1. The KL penalty is k1 = log policy - log ref, in the reward. As a detached reward k3 gives no pull back to the
   reference, and as a differentiated loss k1 has no gradient on average; k3 and the exact KL are logged, not used.
2. The score sits on the last real token (EOS, or the last of a cut response), the value of token t is read where t is
   predicted, and a response cut at --response-length is an end: nothing is bootstrapped beyond it.
3. Old log-probs, reference log-probs and values come from one forward pass after the rollout, at the rollout's
   temperature: the ratio of the first minibatch is 1.
4. Means, variances and the early stop are over the whole (global) batch of tokens, variance by n and not n - 1.
5. Four models with their own weights: policy, frozen reference, critic (reward model's trunk, head of zeros: the first
   advantages come from rewards alone), frozen reward model. --share lora puts policy, critic and reward as low-rank
   adapters on one frozen base, which itself is the reference (Hydra-PPO, arXiv:2309.00754); --share trunk gives the
   policy a value head. What learns then is a part of a model, and `gpt.whole(part, ref)` is the model.
6. --advantage grpo | rloo has no critic: A is an answer's score against those of --group-size answers to one prompt.
   GRPO (arXiv:2402.03300) divides by their standard deviation and puts beta k3 into the loss; RLOO (arXiv:2402.14740)
   takes the mean of the others as baseline and keeps -beta k1, summed, in the score. Token means and a token's ratio in
   both, where TRL's RLOO has one ratio an answer, which is clipped far more often.

    python ppo.py                                                      # out/sft + out/reward -> out/ppo
    python ppo.py --share lora --reward out/reward-lora --out out/ppo-lora     # after reward.py --lora-rank (see there)
    python ppo.py --reward mine:brevity --out out/brief                # def brevity(prompts, responses, rows) -> floats
    python ppo.py --init out/hh-sft --reward out/hh-reward --data data/hh/prompts.jsonl --out out/hh-ppo --monitor none
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
    steps: int = 90  # iterations of rollout and update
    batch_size: int = 128  # prompts an iteration
    minibatch_size: int = 64  # prompts an optimiser step
    micro_batches: int = 1  # parts that a minibatch is computed in, to save memory; the rollout is scored in like parts
    epochs: int = 2  # passes over each rollout
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    buckets: int = 1  # widths that prompts are padded to; more save work when prompt lengths differ widely
    temperature: float = 1.0  # of rollouts and of every log-prob

    lr: float | None = None  # policy's learning rate (default: 3e-4; of adapters 6e-4)
    critic_lr: float | None = None  # (default: the same)
    final_lr: float = 0.1  # share of both left at the last step (linear)
    warmup: int = 0  # optimiser steps of linear warm-up
    clip_norm: float = 1.0  # of the global gradient
    critic_init: Literal["reward", "policy"] = "reward"  # trunk the critic starts from (the policy's, if no model)
    critic_warmup: int = 0  # first iterations in which only the critic learns

    share: Literal["none", "trunk", "lora"] = "none"  # four models; policy with a value head; adapters on one base
    vf_coef: float = 0.1  # trunk: weight of the value loss beside the policy's
    lora_rank: int = 16  # lora: rank of the adapters
    lora_alpha: float | None = None  # an adapter changes a weight by alpha / rank A B (default: twice the rank)
    lora_targets: tuple[str, ...] = gpt.TARGETS  # layers that have one
    advantage: Literal["gae", "grpo", "rloo"] = "gae"  # by a critic; by comparison within groups, without one
    group_size: int = 4  # grpo, rloo: answers a prompt, of which --batch-size and --minibatch-size count each

    beta: float = 0.05  # price of one nat of KL to the reference, in scores
    kl_target: float | None = None  # adapt beta to hold this KL (nats a sequence)
    kl_horizon: int = 10_000  # episodes over which it adapts
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2  # of the probability ratio
    clip_value: float = 0.2  # of the value's move from its old estimate
    target_kl: float | None = None  # stop an iteration's epochs when KL(old || new) a token passes this
    whiten_rewards: bool = False  # divide token rewards by their standard deviation, keeping their mean
    reward_clip: float | None = None  # clip scores to +- this, before the KL penalty
    missing_eos: Literal["replace", "subtract", "keep"] = "replace"  # score of a response that did not end
    missing_eos_value: float = 2.0  # it becomes minus this, or loses this
    combine: Literal["mean", "worst", "uwo"] = "mean"  # of an ensemble: mean, minimum, mean - uwo_coef * variance
    uwo_coef: float = 0.5

    monitor: str = "toy:parts"  # module:function logged as eval/gold, never trained on; none elsewhere
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, frozen models and rollouts
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 50  # iterations between checkpoints
    sample_every: int = 10  # iterations between printed samples
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping
    track: Literal["wandb", "tensorboard", "trackio"] | None = None

    @property
    def samples(self) -> int:
        """Answers a prompt."""
        return 1 if self.advantage == "gae" else self.group_size

    @property
    def parts(self) -> int:
        """In how many a rollout is scored: with micro-batches, parts of as many rows as one of them."""
        return self.batch_size * self.micro_batches // self.minibatch_size if self.micro_batches > 1 else 1


class State(NamedTuple):
    """All that learns: with --share lora adapters, of which `gpt.whole` makes models."""

    policy: gpt.GPT | gpt.Adapter | gpt.ScoreModel  # with --share trunk it has the value head
    policy_opt: tuple
    critic: gpt.ScoreModel | None
    critic_opt: tuple
    beta: jax.Array


class Rollout(NamedTuple):
    """One iteration's episodes. B prompts, Q prompt tokens (left-padded), T response tokens (right-padded)."""

    queries: jax.Array  # (B, Q)
    query_mask: jax.Array  # (B, Q)
    responses: jax.Array  # (B, T)
    mask: jax.Array  # (B, T) 1 on response tokens including EOS
    logprobs: jax.Array  # (B, T) of the policy that sampled
    ref_logprobs: jax.Array  # (B, T)
    values: jax.Array | None  # (B, T), none without a critic
    advantages: jax.Array  # (B, T)
    returns: jax.Array | None  # (B, T)


# ---------------------------------------------------------------------------------------------------- estimators


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

    What is masked counts as reward 0 and value 0, so nothing is bootstrapped past the end. Returns use the advantages
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


def grpo_advantages(scores, group_size: int):
    """(r - mean) / std among the answers to one prompt, which stand together: (B,) -> (B,), 0 where all are equal.

    DeepSeekMath (arXiv:2402.03300, section 4.1.2). std by n - 1, plus 1e-4, as in TRL and OpenRLHF.
    """
    groups = scores.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdims=True)
    return (centred / (groups.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)


def rloo_advantages(rewards, group_size: int):
    """r_i - mean of the others' r among the answers to one prompt, which stand together: (B,) -> (B,).

    REINFORCE leave-one-out (arXiv:2402.14740, eq. 9): the baseline does not depend on the answer, hence no bias.
    """
    groups = rewards.reshape(-1, group_size)
    return (group_size / (group_size - 1) * (groups - groups.mean(1, keepdims=True))).reshape(-1)


def whiten(x, mask, shift_mean=True):
    """x (B, T) scaled to variance 1 over the masked tokens (population variance), and to mean 0 if shift_mean."""
    mean = gpt.masked_mean(x, mask)
    white = (x - mean) * lax.rsqrt(gpt.masked_mean((x - mean) ** 2, mask) + 1e-8)
    return jnp.where(mask > 0, white if shift_mean else white + mean, 0.0)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip=0.2):
    """Clipped surrogate (arXiv:1707.06347, eq. 7), token mean: (B, T) x 4 -> (scalar, metrics).

    KL(old || new) estimates use log_ratio = new - old on samples of old: k2 = log_ratio^2 / 2, k3 = ratio - 1 -
    log_ratio (Schulman's blog), the latter through expm1, which keeps its sign near 0.
    """
    log_ratio = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
    ratio = jnp.exp(log_ratio)
    unclipped, clipped = -advantages * ratio, -advantages * jnp.clip(ratio, 1 - clip, 1 + clip)
    loss = gpt.masked_mean(jnp.maximum(unclipped, clipped), mask)
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


def kl_loss(logprobs, ref_logprobs, mask):
    """GRPO's penalty (arXiv:2402.03300, eq. 4), token mean: exp(lr) - 1 - lr, lr = ref - policy, (B, T) x 3 -> scalar.

    Differentiated, unlike the k1 in the reward: on average its gradient is that of KL(ref || policy).
    """
    log_ratio = jnp.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return gpt.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask)


def value_loss(values, old_values, returns, mask, clip=0.2):
    """1/2 max((V - R)^2, (clip(V, V_old +- clip) - R)^2), token mean: (B, T) x 4 -> (scalar, metrics).

    The clipping is OpenAI's 2017 implementation's; clip=inf is half the mean squared error.
    """
    near = jnp.clip(values, old_values - clip, old_values + clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    loss = 0.5 * gpt.masked_mean(jnp.maximum(plain, clipped), mask)
    return loss, {"loss/value_avg": loss, "val/clipfrac_avg": gpt.masked_mean(clipped > plain, mask)}


def adaptive_beta(beta, kl, n, target, horizon):
    """beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon): a proportional controller (Ziegler et al., section 2.2);
    kl in nats a sequence, n episodes seen."""
    return beta * (1 + jnp.clip(kl / target - 1, -0.2, 0.2) * n / horizon)


def combine_scores(scores, how: str, uwo_coef: float):
    """(members, B) -> (B,): mean, worst case, or mean - coef * population variance (Coste et al., arXiv:2310.02743)."""
    if how == "worst":
        return scores.min(0)
    return scores.mean(0) - (uwo_coef * scores.var(0) if how == "uwo" else 0.0)


def explained_variance(values, returns, mask):
    """1 - Var(R - V) / Var(R) over masked tokens: 1 is a perfect critic, 0 a constant one."""
    variance = lambda x: gpt.masked_mean((x - gpt.masked_mean(x, mask)) ** 2, mask)
    return 1 - variance(returns - values) / (variance(returns) + 1e-8)


# ---------------------------------------------------------------------------------------------------- forward passes


def join(rollout):
    """Prompt and response as one row: tokens and segments (B, Q + T), and Q."""
    tokens = jnp.concatenate([rollout.queries, rollout.responses], 1)
    segments = jnp.concatenate([rollout.query_mask, rollout.mask], 1)
    return tokens, segments, rollout.queries.shape[1]


def actor(policy):
    """A policy as a language model, without the value head that --share trunk puts on it."""
    return policy.trunk if isinstance(policy, gpt.ScoreModel) else policy


def policy_forward(model, rollout, config: Config):
    """(log-probs (B, T) of the response tokens, entropy (B, T), hidden states where they are predicted (B, T, D))."""
    model = gpt.cast(actor(model), gpt.compute_dtype(config.dtype))
    tokens, segments, Q = join(rollout)
    hidden = model(tokens, segments, config.remat)[:, Q - 1 : -1]  # the last prompt token predicts the first response
    return *gpt.head_logprobs(model, hidden, rollout.responses, config.temperature), hidden


def critic_forward(critic, rollout, config: Config):
    """V_t (B, T), read where token t is predicted: the state before it."""
    critic = gpt.cast(critic, gpt.compute_dtype(config.dtype))
    tokens, segments, Q = join(rollout)
    return critic.values(critic.trunk(tokens, segments, config.remat)[:, Q - 1 : -1])


def ask_models(policy, ref, critic, rollout: Rollout, config: Config):
    """What the models say of the response's tokens, (B, T) each: log-probs, the reference's, values (None without a
    critic), the policy's entropy, its KL to the reference over the whole vocabulary."""
    logprobs, entropy, hidden = policy_forward(policy, rollout, config)
    ref_logprobs, _, ref_hidden = policy_forward(ref, rollout, config)
    values = None
    if config.advantage == "gae":
        values = policy.values(hidden) if config.share == "trunk" else critic_forward(critic, rollout, config)
    exact_kl = gpt.head_kl(actor(policy), hidden, ref, ref_hidden, config.temperature)
    return logprobs, ref_logprobs, values, entropy, exact_kl


def sampler(state: State, ref, config: Config) -> gpt.GPT:
    """The policy as rollouts are drawn from it: in the precision in which its log-probs are asked for."""
    return gpt.cast(gpt.whole(actor(state.policy), ref), gpt.compute_dtype(config.dtype))


@partial(jax.jit, static_argnames="config")
def make_rollout(state: State, ref, batch, generation, scores, config: Config):
    """Steps 2 and 3 of the box: log-probs, reference log-probs, values -> rewards -> advantages, returns."""
    blank = (None,) * 5
    rollout = Rollout(batch["tokens"], batch["segments"], generation.tokens, generation.mask, *blank)
    ask = partial(ask_models, gpt.whole(state.policy, ref), ref, gpt.whole(state.critic, ref), config=config)
    logprobs, ref_logprobs, values, entropy, exact_kl = gpt.map_parts(ask, rollout, config.parts)

    rollout, mask = rollout._replace(logprobs=logprobs, ref_logprobs=ref_logprobs, values=values), rollout.mask
    advantages, returns = estimate_advantages(rollout, scores, state.beta, config)
    rollout = rollout._replace(advantages=advantages, returns=returns)

    per_sequence = lambda x: jnp.where(mask > 0, x, 0.0).sum(1).mean()
    log_ratio = ref_logprobs - logprobs
    drift = jnp.where(mask > 0, logprobs - generation.logprobs, 0.0)  # of the sampler from the policy
    kl = per_sequence(-log_ratio)
    metrics = {
        "objective/kl": kl,
        "objective/kl_k3": per_sequence(jnp.expm1(log_ratio) - log_ratio),
        "objective/kl_exact": per_sequence(exact_kl),
        "objective/entropy": per_sequence(entropy),
        "objective/non_score_reward": -state.beta * kl,
        "objective/rlhf_reward": scores.mean() - state.beta * kl,
        "policy/entropy_avg": gpt.masked_mean(entropy, mask),
        "val/decode_drift": jnp.max(jnp.abs(drift)),
        "val/decode_drift_avg": gpt.masked_mean(jnp.abs(drift), mask),
        "val/decode_ratio_off": gpt.masked_mean(jnp.abs(jnp.expm1(drift)) > 0.1, mask),  # by more than a tenth
        "response_length": mask.sum(1).mean(),
        "beta": state.beta,
    }
    if values is not None:
        metrics["val/explained_variance"] = explained_variance(values, returns, mask)
    return rollout, metrics


def estimate_advantages(rollout: Rollout, scores, beta, config: Config):
    """(advantages, returns), (B, T) each, from scores (B,) and the rest of the rollout. A group's advantages are those
    of whole answers: every token of an answer has its answer's, and there are no returns to fit."""
    mask, log_ratio = rollout.mask, rollout.logprobs - rollout.ref_logprobs
    if config.advantage == "gae":
        rewards = token_rewards(scores, rollout.logprobs, rollout.ref_logprobs, mask, beta)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = gae(rewards, rollout.values, mask, config.gamma, config.lam)
        return whiten(advantages, mask), returns
    if config.advantage == "grpo":  # KL is in the loss
        advantages = grpo_advantages(scores, config.group_size)
    else:
        rewards = scores - beta * jnp.where(mask > 0, log_ratio, 0.0).sum(1)
        advantages = rloo_advantages(rewards, config.group_size)
    return jnp.where(mask > 0, advantages[:, None], 0.0), None


# ---------------------------------------------------------------------------------------------------- update


def make_steps(policy_optimizer, critic_optimizer, config: Config):
    """(update_policy, update_critic): one optimiser step each, on the given rows of a rollout.

    Two programs and not one: XLA:CPU works on what is independent side by side, and a policy's and a critic's gradients
    in one program took 1.7 times as long as one after the other.
    """

    def policy_objective(policy, ref, beta, part: Rollout):
        policy = gpt.whole(policy, ref)
        logprobs, _, hidden = policy_forward(policy, part, config)
        loss, metrics = policy_loss(logprobs, part.logprobs, part.advantages, part.mask, config.clip)
        if config.advantage == "grpo":
            loss += beta * kl_loss(logprobs, part.ref_logprobs, part.mask)
        if config.share == "trunk":  # one loss, L_pg + c_v L_vf
            value, more = value_loss(policy.values(hidden), part.values, part.returns, part.mask, config.clip_value)
            loss, metrics = loss + config.vf_coef * value, metrics | more
        return loss, metrics

    def critic_objective(critic, ref, part: Rollout):
        values = critic_forward(gpt.whole(critic, ref), part, config)
        return value_loss(values, part.values, part.returns, part.mask, config.clip_value)

    def descend(optimizer, objective, model, opt_state, rollout, rows):
        part = jax.tree.map(lambda x: gpt.shard_batch(x[rows]), rollout)
        count = lambda part: part.mask.sum()
        return gpt.descend(optimizer, objective, model, opt_state, part, config.micro_batches, count)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update_policy(policy, opt_state, ref, beta, rollout, rows):
        objective = lambda policy, part: policy_objective(policy, ref, beta, part)
        *new, metrics = descend(policy_optimizer, objective, policy, opt_state, rollout, rows)
        if config.target_kl:  # too far from the sampler already: no step from here
            near = metrics["policy/approxkl_k3"] <= config.target_kl
            new = jax.tree.map(partial(jnp.where, near), new, [policy, opt_state])
        return *new, metrics

    @partial(jax.jit, donate_argnums=(0, 1))
    def update_critic(critic, opt_state, ref, rollout, rows):
        objective = lambda critic, part: critic_objective(critic, ref, part)
        return descend(critic_optimizer, objective, critic, opt_state, rollout, rows)

    return update_policy, update_critic


def make_update(policy_optimizer, critic_optimizer, config: Config):
    """update(state, ref, rollout, rows) -> (state, metrics): one optimiser step of policy and critic on these rows."""
    update_policy, update_critic = make_steps(policy_optimizer, critic_optimizer, config)

    def update(state: State, ref, rollout: Rollout, rows, train_policy=True):
        metrics = {}
        if state.critic is not None:
            critic, critic_opt, metrics = update_critic(state.critic, state.critic_opt, ref, rollout, rows)
            state = state._replace(critic=critic, critic_opt=critic_opt)
        if train_policy:
            args = state.policy, state.policy_opt, ref, state.beta
            policy, policy_opt, more = update_policy(*args, rollout, rows)
            state, metrics = state._replace(policy=policy, policy_opt=policy_opt), metrics | more
        return state, metrics

    return update


def policy_steps(state: State):
    """How many steps the policy's optimiser has taken, on the device: fewer than the minibatches seen where the critic
    warmed up alone or --target-kl ended an iteration early."""
    return optax.tree_utils.tree_get_all_with_path(state.policy_opt, "count")[0][1]


def update_epochs(update, state, ref, rollout, step: int, config: Config):
    """Step 4 of the box: a few shuffled passes over the rollout, cut short when the policy has moved enough."""
    history, stopped = [], False
    rng = np.random.default_rng((config.seed, step))
    for _ in range(config.epochs):
        for rows in rng.permutation(config.batch_size).reshape(-1, config.minibatch_size):
            state, metrics = update(state, ref, rollout, rows, train_policy=step >= config.critic_warmup)
            history.append(metrics)
            if config.target_kl and metrics.get("policy/approxkl_k3", 0.0) > config.target_kl:
                stopped = True
                break
        if stopped:
            break
    mean = {name: sum(m[name] for m in history) / len(history) for name in history[0]}
    first = {"val/ratio_first": history[0].get("val/ratio", 1.0)}
    loss = mean.get("loss/value_avg", 0.0) + mean.get("loss/policy_avg", 0.0)
    return state, mean | first | {"loss": loss, "updates": len(history) - stopped, "stopped_early": float(stopped)}


# ---------------------------------------------------------------------------------------------------- models


def load_policy(config: Config, key):
    """(policy, reference, tokenizer). The reference is a frozen copy, or the base that the policy is an adapter on."""
    policy, tokenizer = gpt.load_policy(config.init)
    if config.share == "lora":
        return *gpt.trainable(policy, config, key), tokenizer
    ref = gpt.shard(gpt.cast(policy, gpt.compute_dtype(config.dtype)))
    policy = gpt.shard(jax.tree.map(jnp.array, policy))  # of its own: the policy's arrays are donated
    if config.share == "trunk":
        policy = replace(gpt.init_score_model(policy, key, zero=True), trunk=policy)
    return policy, ref, tokenizer


def load_rewards(config: Config, tokenizer, ref):
    """(reward models, reward function): one of the two."""
    if len(config.reward) == 1 and ":" in config.reward[0]:
        return [], gpt.load_function(config.reward[0])
    folders = [folder for name in config.reward for folder in gpt.ensemble_folders(name)]
    base = (ref, config.init) if config.share == "lora" else None
    return [gpt.load_reward_model(folder, tokenizer, config.init, config.dtype, base) for folder in folders], None


def make_critic(policy, ref, models, config: Config, key):
    """(critic, what it starts from): the trunk (or adapter) of the first reward model or of the policy, and a head of
    zeros. None where the policy has the value head, or groups take a critic's place."""
    if config.advantage != "gae" or config.share == "trunk":
        return None, "none" if config.advantage != "gae" else "a head on the policy"
    trunks = [model.trunk for model in models] if config.critic_init == "reward" else []
    trunks = [trunk for trunk in trunks if type(trunk) is type(policy)]  # a whole model is no start for an adapter
    start, name = (trunks[0], "reward trunk") if trunks else (policy, "policy trunk")
    trunk = jax.tree.map(lambda x: jnp.array(x, jnp.float32), start)
    return gpt.shard(replace(gpt.init_score_model(gpt.whole(start, ref), key, zero=True), trunk=trunk)), name


# ---------------------------------------------------------------------------------------------------- scores


def score_responses(models, function, batch, generation, texts, rows, eos: int, config: Config):
    """(scores (B,) with the missing-EOS rule applied, metrics)."""
    if function:
        scores = gpt.gather_rows(gpt.check_scores(function(*texts, rows), len(rows)))
        scores = gpt.put_batch({"scores": scores})["scores"]
    else:
        args = batch["tokens"], batch["segments"], generation.tokens, generation.mask, eos, config.parts
        scores = combine_scores(jnp.stack([gpt.score(m, *args) for m in models]), config.combine, config.uwo_coef)
    if config.reward_clip:
        scores = jnp.clip(scores, -config.reward_clip, config.reward_clip)
    ended = jnp.any((generation.tokens == eos) & (generation.mask > 0), axis=1)
    if config.missing_eos == "replace":
        scores = jnp.where(ended, scores, -config.missing_eos_value)
    elif config.missing_eos == "subtract":
        scores = jnp.where(ended, scores, scores - config.missing_eos_value)
    metrics = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "val/num_eos_tokens": ended.sum(),
        "eos_rate": ended.mean(),
    }
    return scores, metrics


class Watch:
    """Warns, in words, of what usually goes wrong."""

    def __init__(self, warn):
        self.warn, self.first_length, self.negative, self.said = warn, None, 0, set()

    def __call__(self, metrics, config: Config):
        length = metrics["response_length"]
        self.first_length = self.first_length or length
        self.negative = self.negative + 1 if metrics["objective/kl"] < 0 else 0
        self.say(
            self.negative == 5,
            "the KL to the reference has been negative for 5 iterations: policy and reference are not scored alike "
            "(temperature, dtype, template), or the sampler does not sample the policy",
        )
        self.say(
            length < 0.4 * self.first_length, f"responses shrank from {self.first_length:.1f} to {length:.1f} tokens"
        )
        self.say(
            length > 2.5 * self.first_length, f"responses grew from {self.first_length:.1f} to {length:.1f} tokens"
        )
        self.say(metrics["objective/scores_std"] < 1e-6, "all scores are equal: there is nothing to learn from")
        self.say(
            metrics["eos_rate"] < 0.5 and config.missing_eos != "keep",
            "most responses do not end: raise --response-length or --missing-eos-value",
        )

    def say(self, wrong, text):
        if wrong and text.split(":")[0][:20] not in self.said:
            self.said.add(text.split(":")[0][:20])
            self.warn(text)


# ---------------------------------------------------------------------------------------------------- main


def resolve(config: Config) -> Config:
    """The defaults that depend on others, and complaints about what does not go together."""
    gpt.check_batch_size(config.minibatch_size, "--minibatch-size")
    if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batches:
        raise ValueError("--batch-size must be a multiple of --minibatch-size, and that of --micro-batches")
    if config.advantage != "gae" and (config.group_size < 2 or config.batch_size % config.group_size):
        raise ValueError(
            "--group-size is 2 or more, and --batch-size a multiple of it: an answer is compared with others"
        )
    if config.share == "trunk" and config.advantage != "gae":
        raise ValueError(
            f"--share trunk puts values on the policy's trunk, and --advantage {config.advantage} has none"
        )
    if config.critic_warmup and (config.share == "trunk" or config.advantage != "gae"):
        raise ValueError("--critic-warmup is for a critic of its own: --advantage gae with --share none or lora")
    lr = config.lr or (6e-4 if config.share == "lora" else 3e-4)
    return replace(config, lr=lr, critic_lr=config.critic_lr or lr)


def main(config: Config):
    key = gpt.start(config.seed)
    config = resolve(config)
    policy, ref, tokenizer = load_policy(config, key)
    models, function = load_rewards(config, tokenizer, ref)
    critic, critic_from = make_critic(policy, ref, models, config, key)
    models = [gpt.whole(model, ref) for model in models]
    monitor = gpt.load_function(config.monitor) if config.monitor != "none" else None
    prompts = gpt.Batches(
        config.data, "prompts", tokenizer, config.batch_size // config.samples, config.prompt_length, config.seed,
        skip_bad=config.skip_bad_rows, buckets=config.buckets,
    )  # fmt: skip

    per_iteration = config.epochs * (config.batch_size // config.minibatch_size)
    rate = lambda lr: gpt.schedule(lr, config.steps * per_iteration, config.warmup, "linear", config.final_lr)
    make = lambda lr: gpt.adamw(rate(lr), clip=config.clip_norm, eps=1e-5)
    policy_optimizer, critic_optimizer, lr = make(config.lr), make(config.critic_lr), rate(config.lr)
    state = State(
        policy, gpt.shard(policy_optimizer.init(policy)),
        critic, gpt.shard(critic_optimizer.init(critic)), gpt.shard(jnp.asarray(config.beta)),
    )  # fmt: skip
    update = make_update(policy_optimizer, critic_optimizer, config)
    sample = partial(gpt.generate, max_new_tokens=config.response_length, temperature=config.temperature,
                     eos=tokenizer.eos_id, pad=tokenizer.pad_id)  # fmt: skip

    run = gpt.Run(config, config.steps, prompts.hashes, critic=critic_from)
    state, first = run.restore(state)
    watch, stream = Watch(run.warn), prompts.stream(first, config.steps)
    for step in run.steps(first):
        host_batch = {name: np.repeat(x, config.samples, axis=0) for name, x in next(stream).items()}
        batch = gpt.put_batch(host_batch)
        # 1 sample responses and score them
        generation = sample(
            sampler(state, ref, config), batch["tokens"], batch["segments"], jax.random.fold_in(key, step)
        )
        both = (host_batch["tokens"], host_batch["segments"]), gpt.to_numpy((generation.tokens, generation.mask))
        texts = [tokenizer.decode_rows(*map(gpt.own_rows, part)) for part in both]
        rows = gpt.own_rows(prompts.rows(host_batch))
        scores, metrics = score_responses(models, function, batch, generation, texts, rows, tokenizer.eos_id, config)
        # 2, 3 rewards and advantages
        rollout, more = make_rollout(state, ref, batch, generation, scores, config)
        # 4 update
        rate_now = lr(policy_steps(state))  # of the first policy step below
        state, losses = update_epochs(update, state, ref, rollout, step, config)
        if config.kl_target:
            beta = adaptive_beta(
                state.beta, more["objective/kl"], config.batch_size, config.kl_target, config.kl_horizon
            )
            state = state._replace(beta=beta)

        metrics = gpt.to_numpy(metrics | more | losses | {"lr": rate_now})
        if monitor:
            metrics |= gpt.mean_parts(monitor(*texts, rows), "eval/")
        if step % config.sample_every == 0 or step == config.steps - 1:
            shown = gpt.to_numpy(scores)
            for i in range(min(2, len(rows))):
                run.sample(step, prompt=texts[0][i], response=texts[1][i], score=float(shown[i]))
        watch(metrics, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    run.finish(actor(state.policy), tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
