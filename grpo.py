"""RLOO and GRPO: reinforcement learning without a critic. K answers to one prompt are each other's baseline.

RLOO: Ahmadian et al. 2024 (arXiv:2402.14740). GRPO: Shao et al. 2024 (arXiv:2402.03300). Each iteration, with r_i the
score of answer i and t over its tokens, EOS included:

    1  y_1 .. y_K ~ policy(. | x), at --temperature; r_i from a reward model, an ensemble or a function
    2  log-probs of policy and reference at every token
    3  rloo   A_i = r'_i - mean of the others' r',   r'_i = r_i - beta sum_t (log policy(y_t) - log ref(y_t))
       grpo   A_i = (r_i - mean) / std               every token of an answer has its answer's advantage
    4  a few epochs of minibatches:  max(-A rho, -A clip(rho, 1 - eps, 1 + eps)),  rho = policy_new / policy_old
       grpo adds to the loss         beta k3,  k3 = exp(lr) - 1 - lr,  lr = log ref - log policy

Choices where code bases disagree:
1. Both losses are token means with one ratio a token; TRL's RLOO has one an answer, which is clipped far more often.
2. GRPO's k3, differentiated, has on average the gradient of KL(ref || policy), not of KL(policy || ref): its optimum is
   another one than PPO's and RLOO's (tests/test_enumerable.py).
3. Old and reference log-probs come from one forward pass after the rollout, at the rollout's temperature: the ratio of
   the first minibatch is 1.
4. A response that does not end scores -(--missing-eos) at most, as in ppo.py.
5. With --lora-rank the policy is a low-rank adapter on a frozen base, which itself is the reference.

    python grpo.py                                            # out/sft + out/reward -> out/grpo, by GRPO
    python grpo.py --advantage rloo --out out/rloo
    python grpo.py --reward mine:brevity --out out/brief      # def brevity(prompts, responses, rows) -> floats
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # policy to start from; its frozen copy is the reference
    reward: tuple[str, ...] = ("out/reward",)  # reward-model folders (several: an ensemble), or one module:function
    data: tuple[str, ...] = ("data/toy/prompts.jsonl",)  # prompts; name:weight mixes several
    out: Path = Path("out/grpo")  # run folder
    advantage: Literal["grpo", "rloo"] = "grpo"  # how an answer is compared with the others to its prompt
    group_size: int = 4  # answers to each prompt
    steps: int = 90  # iterations of rollout and update
    batch_size: int = 128  # answers an iteration, to --batch-size / --group-size prompts
    minibatch_size: int = 64  # answers an optimiser step
    micro_batches: int = 1  # parts of a minibatch that are computed one after the other, to save memory
    epochs: int = 2  # passes over each rollout
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of rollouts and of every log-prob

    lr: float | None = None  # falling linearly to a tenth (default: 3e-4; of adapters 6e-4)
    lora_rank: int = 0  # above 0: the policy is an adapter of this rank on a frozen base

    beta: float = 0.05  # price of one nat of KL to the reference, in scores
    clip: float = 0.2  # of the probability ratio
    target_kl: float | None = None  # stop an iteration's epochs when KL(old || new) a token passes this
    missing_eos: float | None = 2.0  # price of not ending: such a response scores this below its own and below 0
    combine: Literal["mean", "worst", "uwo"] = "mean"  # scores of an ensemble; uwo: mean - variance / 2

    monitor: str | None = "toy:parts"  # module:function logged as eval/gold, never trained on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, frozen models and rollouts
    remat: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 50  # iterations between checkpoints
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping
    track: Literal["wandb", "tensorboard", "trackio"] | None = None  # also log there


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter  # with --lora-rank an adapter, of which `gpt.attach` makes a model
    policy_opt: tuple


class Rollout(NamedTuple):
    """One iteration's episodes. B answers, those to one prompt together; Q prompt tokens (left-padded), T response
    tokens (right-padded)."""

    queries: jax.Array  # (B, Q)
    query_mask: jax.Array  # (B, Q)
    responses: jax.Array  # (B, T)
    mask: jax.Array  # (B, T) 1 on response tokens including EOS
    logprobs: jax.Array | None = None  # (B, T) "old": of the policy that sampled, by `policy_forward`
    ref_logprobs: jax.Array | None = None  # (B, T)
    advantages: jax.Array | None = None  # (B, T)


# ------------------------------------------------------------------------------------- 1 sample and score


def sampler(policy, base, config: Config) -> gpt.GPT:
    """The policy as rollouts are drawn from it: in the precision in which its log-probs are asked for."""
    return gpt.cast(gpt.attach(policy, base), gpt.compute_dtype(config.dtype))


def score_responses(reward: gpt.Reward, batch, generation: gpt.Generation, texts, rows, ends, config: Config):
    """(scores (B,), metrics). A function is asked about this process's texts and rows, models about all token ids. A
    response ends with one of the ids `ends`, or is cut off."""
    if reward.function:
        scores = gpt.gather_rows(gpt.check_scores(reward.function(*texts, rows), len(rows)))
        scores = gpt.put_batch({"scores": scores})["scores"]
    else:
        inputs = batch["tokens"], batch["segments"], generation.tokens, generation.mask, ends, chunks(config)
        members = jnp.stack([gpt.score(model, *inputs) for model in reward.models])
        scores = combine_scores(members, config.combine)
    ended = gpt.has_ended(generation.tokens, generation.mask, ends)
    if config.missing_eos is not None:  # whatever the scale of the scores, not to end costs at least that much
        scores = jnp.where(ended, scores, jnp.minimum(scores, 0) - config.missing_eos)
    return scores, {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "val/num_eos_tokens": ended.sum(),
        "eos_rate": ended.mean(),
    }


def combine_scores(scores, how: str, uwo_coef: float = 0.5):
    """(members, B) -> (B,): mean, worst case, or mean - coef * population variance (Coste et al., arXiv:2310.02743)."""
    if how == "worst":
        return scores.min(0)
    return scores.mean(0) - (uwo_coef * scores.var(0) if how == "uwo" else 0.0)


def chunks(config: Config) -> int:
    """A rollout is scored in one piece, or with micro-batches in pieces of as many rows as one of them: how many."""
    return config.batch_size * config.micro_batches // config.minibatch_size if config.micro_batches > 1 else 1


# ------------------------------------------------------------------------------------- 2 what policy and reference say


def join(rollout: Rollout):
    """Prompt and response as one row: tokens and segments (B, Q + T), and Q."""
    tokens = jnp.concatenate([rollout.queries, rollout.responses], 1)
    segments = jnp.concatenate([rollout.query_mask, rollout.mask], 1)  # 0 hides padding, and what follows an EOS
    return tokens, segments, rollout.queries.shape[1]


def policy_forward(model: gpt.GPT, rollout: Rollout, config: Config):
    """(log-probs (B, T) of the response tokens, entropy (B, T), hidden states where they are predicted (B, T, D))."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    tokens, segments, Q = join(rollout)
    hidden = model(tokens, segments, config.remat)[:, Q - 1 : -1]  # the last prompt token predicts the first response
    return *gpt.head_logprobs(model, hidden, rollout.responses, config.temperature), hidden


# ------------------------------------------------------------------------------------- 3 advantages


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


def advantages(scores, logprobs, ref_logprobs, mask, how: str, group_size: int, beta: float):
    """An answer's advantage at each of its tokens: (B,), (B, T) x 3 -> (B, T). GRPO has its KL penalty in the loss,
    RLOO in the reward."""
    if how == "grpo":
        answers = grpo_advantages(scores, group_size)
    else:
        kl = jnp.where(mask > 0, logprobs - ref_logprobs, 0.0).sum(1)
        answers = rloo_advantages(scores - beta * kl, group_size)
    return jnp.where(mask > 0, answers[:, None], 0.0)


@partial(jax.jit, static_argnames="config")
def complete_rollout(policy, base, ref, batch, generation: gpt.Generation, scores, config: Config):
    """Steps 2 and 3: (the whole Rollout, metrics)."""
    policy = gpt.attach(policy, base)

    def ask_models(rollout):
        logprobs, entropy, hidden = policy_forward(policy, rollout, config)
        ref_logprobs, _, ref_hidden = policy_forward(ref, rollout, config)
        exact_kl = gpt.head_kl(policy, hidden, ref, ref_hidden, config.temperature)
        return logprobs, ref_logprobs, entropy, exact_kl

    rollout = Rollout(batch["tokens"], batch["segments"], generation.tokens, generation.mask)
    logprobs, ref_logprobs, entropy, exact_kl = gpt.map_chunks(ask_models, rollout, chunks(config))
    how = config.advantage, config.group_size, config.beta
    by_token = advantages(scores, logprobs, ref_logprobs, rollout.mask, *how)
    rollout = Rollout(*rollout[:4], logprobs, ref_logprobs, by_token)
    return rollout, rollout_metrics(rollout, generation.logprobs, entropy, exact_kl, scores, config.beta)


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
        "response_length": mask.sum(1).mean(),
    }


# ------------------------------------------------------------------------------------- 4 losses and updates


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

    Differentiated, unlike a KL penalty in the reward: on average its gradient is that of KL(ref || policy).
    """
    log_ratio = jnp.where(mask > 0, ref_logprobs - logprobs, 0.0)
    return gpt.masked_mean(jnp.expm1(log_ratio) - log_ratio, mask)


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnums=0)
def update(state: State, base, rollout: Rollout, rows, optimizer, config: Config):
    """One optimiser step on these rows of the rollout: (state, metrics)."""

    def loss_fn(policy, batch: Rollout):
        logprobs, _, _ = policy_forward(gpt.attach(policy, base), batch, config)
        loss, metrics = policy_loss(logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip)
        if config.advantage == "grpo":
            loss += config.beta * kl_loss(logprobs, batch.ref_logprobs, batch.mask)
        return loss, metrics

    batch = jax.tree.map(lambda x: gpt.shard_batch(x[rows]), rollout)
    count = lambda batch: batch.mask.sum()
    *new, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    if config.target_kl:  # too far from the sampler already: this step is not taken
        near = metrics["policy/approxkl_k3"] <= config.target_kl
        new = jax.tree.map(partial(jnp.where, near), new, list(state))
    return State(*new), metrics


def minibatches(step: int, config: Config):
    """Rows of each optimiser step of an iteration: --epochs shuffled passes over the rollout."""
    rng = np.random.default_rng((config.seed, step))
    for _ in range(config.epochs):
        yield from rng.permutation(config.batch_size).reshape(-1, config.minibatch_size)


def summarize_updates(history: list[dict], target_kl: float | None) -> dict:
    """Means over an iteration's optimiser steps, the ratio of the first one, and whether --target-kl ended it."""
    metrics = {name: sum(losses[name] for losses in history) / len(history) for name in history[0]}
    stopped = bool(target_kl and history[-1]["policy/approxkl_k3"] > target_kl)
    metrics |= {"loss": metrics["loss/policy_avg"]}
    metrics |= {"val/ratio_first": history[0]["val/ratio"]}
    return metrics | {"updates": len(history) - stopped, "stopped_early": float(stopped)}


# ------------------------------------------------------------------------------------- models


def load_models(config: Config, key):
    """(policy, base, reference, tokenizer). With --lora-rank the policy is an adapter on the base, which is also the
    reference; else there is no base, and the reference is a frozen copy of the policy."""
    model, tokenizer = gpt.load_policy(config.init)
    policy, base = gpt.trainable(model, config.lora_rank, config.dtype, key)
    return policy, base, base or gpt.load_frozen(config.init, config.dtype), tokenizer


# ------------------------------------------------------------------------------------- main


def check(config: Config):
    gpt.check_batch_size(config.minibatch_size, "--minibatch-size")
    if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batches:
        raise ValueError("--batch-size must be a multiple of --minibatch-size, and that of --micro-batches")
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise ValueError(
            "--group-size is 2 or more, and --batch-size a multiple of it: an answer is compared with others"
        )


def main(config: Config):
    key = gpt.start(config.seed)
    check(config)
    policy, base, ref, tokenizer = load_models(config, key)
    reward = gpt.load_reward(config.reward, tokenizer, config.init, config.dtype, adapters=config.lora_rank > 0)
    reward = reward._replace(models=[gpt.attach(model, base) for model in reward.models])
    monitor = gpt.load_function(config.monitor) if config.monitor else None
    prompts = gpt.Batches(
        config.data, "prompts", tokenizer, config.batch_size // config.group_size, config.prompt_length, config.seed,
        skip_bad=config.skip_bad_rows,
    )  # fmt: skip

    prompts.plan(config.steps)
    updates = config.epochs * (config.batch_size // config.minibatch_size)  # optimiser steps an iteration
    peak = config.lr if config.lr is not None else 6e-4 if config.lora_rank else 3e-4
    lr = gpt.schedule(peak, config.steps * updates, kind="linear", final=0.1)
    optimizer = gpt.adamw(lr, eps=1e-5)
    state = State(policy, gpt.shard(optimizer.init(policy)))

    run = gpt.Run(prompts.hashes, **vars(config))
    state, first = run.restore(state)
    watch = gpt.Watch(run.warn)
    for step in run.steps(first):
        queries = {name: np.repeat(x, config.group_size, axis=0) for name, x in prompts(step).items()}
        batch = gpt.put_batch(queries)
        # 1 sample and score
        generation = gpt.generate(
            sampler(state.policy, base, config), batch["tokens"], batch["segments"], jax.random.fold_in(key, step),
            config.response_length, ends=tokenizer.end_ids, pad=tokenizer.pad_id, temperature=config.temperature,
        )  # fmt: skip
        texts, rows = gpt.own_texts(tokenizer, queries, generation), gpt.own_rows(prompts.rows(queries))
        scores, metrics = score_responses(reward, batch, generation, texts, rows, tokenizer.end_ids, config)
        metrics["special_tokens"] = gpt.special_tokens(tokenizer, generation)
        # 2, 3 what policy and reference say of every response token; advantages
        rollout, more = complete_rollout(state.policy, base, ref, batch, generation, scores, config)
        # 4 epochs of minibatches
        # an iteration has its own learning rate, also after one that --target-kl ended early
        state, history = state._replace(policy_opt=gpt.at_step(state.policy_opt, step * updates)), []
        for minibatch in minibatches(step, config):
            state, losses = update(state, base, rollout, minibatch, optimizer, config)
            history.append(losses)
            if config.target_kl and losses["policy/approxkl_k3"] > config.target_kl:
                break

        metrics = gpt.to_numpy(metrics | more | summarize_updates(history, config.target_kl))
        metrics["lr"] = float(lr(step * updates))
        if monitor:
            metrics |= gpt.mean_judgements(monitor(*texts, rows), "eval/")
        if step % 10 == 0 or step == config.steps - 1:
            for prompt, response, score in list(zip(*texts, gpt.to_numpy(scores)))[:2]:
                run.sample(step, prompt=prompt, response=response, score=float(score))
        watch(metrics)
        run.log(step, metrics)
        run.checkpoint(step, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
