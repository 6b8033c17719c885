"""Online DPO: pairs of the policy's own answers, labelled while it learns by a reward model, a function or a judge.

Each iteration:

    1  y_1 ... y_K ~ policy(. | x),  K = --candidates
    2  a pair a, b of them and p = P(a is better):
           --reward    a scores best of the K, b scores worst, p = 1
           --judge     K = 2, and p is what the judge says
    3  L = -p log sigmoid(beta h) - (1 - p) log sigmoid(-beta h),   h = log policy(a)/ref(a) - log policy(b)/ref(b)
       one pass over the pairs, an optimiser step for each --minibatch-size of them

The loss is that of Rafailov et al. 2023 (arXiv:2305.18290, eq. 7). Labeller and --batch-size make of it
    online AI feedback (Guo et al. 2024, arXiv:2402.04792): a judge labels each batch, one step is taken on it;
    iterative DPO (Xu et al. 2023, arXiv:2312.16682): a reward model labels a round, a --batch-size of thousands, which
        is trained on in small minibatches: `dpo.py` first, then `online.py --init out/dpo --ref out/sft`.

Details that matter:
1. The reference is one model from beginning to end (--ref), so that the KL that beta prices is to the model you started
   from.
2. The loss is about the ids that were sampled. Their text, read back, may be other ids.
3. A prompt has no pair, and its weight is 0, where an answer is empty, did not end (see --keep-truncated), holds a
   special token or a character cut in two, where both answers or all scores are equal, and where the judge is silent.
4. Answers are sampled at temperature 1, of the whole softmax: of the distribution that the loss is about.

    python online.py                                                 # out/sft + out/reward -> out/online
    python online.py --reward mine:brevity --gold None            # def brevity(prompts, responses, rows) -> floats
    python online.py --judge mine:prefer --gold None              # def prefer(prompts, a, b, rows) -> P(a is better)
    RLAIF_JUDGE=out/judge python online.py --init out/sl-cai --judge rlaif:preference       # see rlaif.py
    python online.py --init out/dpo --ref out/sft --batch-size 2048 --minibatch-size 32 --candidates 4 --steps 3
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # policy to start from
    ref: str | None = None  # frozen reference, of the same tokenizer (None: --init)
    reward: str = "out/reward"  # who labels: a reward-model folder, or module:function
    judge: str | None = None  # in its place: module:function (prompts, a, b, rows) -> P(a is better), or NaN
    data: tuple[str, ...] = ("data/toy/prompts.jsonl",)  # prompts; name:weight mixes several
    out: Path = Path("out/online")  # run folder
    steps: int = 100  # iterations: a rollout, and all optimiser steps on it
    batch_size: int = 128  # prompts an iteration
    minibatch_size: int | None = None  # pairs an optimiser step, and prompts answered at a time (None: --batch-size)
    micro_batches: int = 1  # gradient accumulation: parts that a minibatch is computed in
    candidates: int = 2  # answers a prompt
    keep_truncated: bool = False  # answers that did not end count too (for models that rarely end)
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens an answer may have

    beta: float = 0.1  # price of one nat of KL to the reference; the larger, the closer policy and reference stay
    lr: float = 3e-4  # peak learning rate
    warmup: int | None = None  # optimiser steps of warm-up (None: 10, an eighth of all at most); then linear to 0
    clip_norm: float = 1.0  # of the global gradient
    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    gold: str | None = "toy:parts"  # module:function that knows the truth: logged as eval/gold, never trained on
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, frozen models and sampling
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 50  # iterations between checkpoints
    sample_every: int = 25  # iterations between printed samples
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter
    opt_state: tuple


class Rollout(NamedTuple):
    """K answers to each of B prompts. Items b K to b K + K - 1 belong to prompt b; ids are those that were sampled."""

    queries: np.ndarray  # (B K, Q), left-padded
    query_mask: np.ndarray  # (B K, Q)
    responses: np.ndarray  # (B K, T), right-padded
    mask: np.ndarray  # (B K, T) 1 on sampled tokens, EOS included
    prompts: list[str]  # B K texts
    answers: list[str]
    rows: list[dict]  # of the prompts, as they were written


class Pairs(NamedTuple):
    items: np.ndarray  # (B, 2) of the rollout: answers a and b to each prompt
    p: np.ndarray  # (B,) P(a is better)
    weight: np.ndarray  # (B,) 1, or 0 where a prompt has no two answers to learn from


# ---------------------------------------------------------------------------------------------------- loss and step


def soft_dpo_loss(logprobs, ref_logprobs, p, weight, beta=0.1):
    """Cross-entropy of p = P(a is better) and sigmoid(beta h), h = log-ratio of a - log-ratio of b, mean by weight.

    Summed log-probs (B, 2) of a and b, p and weight (B,) -> (scalar, metrics). arXiv:2305.18290, eq. 7, with a
    probability in the place of a label.
    """
    log_ratio = logprobs - ref_logprobs
    margins = beta * (log_ratio[:, 0] - log_ratio[:, 1])
    losses = -p * jax.nn.log_sigmoid(margins) - (1 - p) * jax.nn.log_sigmoid(-margins)
    loss = gpt.weighted_mean(losses, weight)
    return loss, {
        "loss": loss,
        "rewards/accuracies": gpt.weighted_mean((margins > 0) == (p > 0.5), weight),
        "rewards/margins": gpt.weighted_mean(jnp.where(p > 0.5, margins, -margins), weight),
        "objective/kl": gpt.weighted_mean(log_ratio.mean(1), weight),  # an estimate, if a and b are all the answers
    }


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnames="state")
def train_step(state: State, base, ref, batch, optimizer, config: Config):
    """(state, metrics) after an optimiser step on pairs. `base` is the frozen model below adapters, else None."""

    def logprobs(model, batch):
        model = gpt.cast(model, gpt.compute_dtype(config.dtype))
        return gpt.completion_logprobs(model, batch, config.remat)[0]

    def objective(policy, batch):
        ours = logprobs(gpt.attach(policy, base), batch)
        return soft_dpo_loss(ours, batch["ref_logprobs"], batch["p"], batch["weight"], config.beta)

    batch = batch | {"ref_logprobs": logprobs(ref, batch)}
    count = lambda batch: batch["weight"].sum()
    *state, metrics = gpt.descend(optimizer, objective, *state, batch, config.micro_batches, count)
    return State(*state), metrics


# ---------------------------------------------------------------------------------------------------- answers


def sample(policy, tokenizer, prompts: gpt.Batches, batch, key, config: Config) -> Rollout:
    """--candidates answers to each prompt, to as many prompts at a time as a minibatch has."""
    queries, query_mask = (np.repeat(batch[name], config.candidates, axis=0) for name in ("tokens", "mask"))
    policy = gpt.cast(policy, gpt.compute_dtype(config.dtype))
    answers = []
    for items in np.arange(len(queries)).reshape(-1, config.minibatch_size * config.candidates):
        x = gpt.put_batch({"queries": queries[items], "mask": query_mask[items]})
        out = gpt.generate(
            policy, x["queries"], x["mask"], key, config.response_length, ends=tokenizer.end_ids, pad=tokenizer.pad_id,
            row_numbers=items,
        )  # fmt: skip
        answers.append(gpt.to_numpy((out.tokens, out.mask)))
    responses, mask = map(np.concatenate, zip(*answers))
    rows = [row for row in prompts.rows(batch) for _ in range(config.candidates)]
    asked = gpt.plain_prompts(tokenizer.decode_rows(queries, query_mask), rows)
    return Rollout(queries, query_mask, responses, mask, asked, tokenizer.decode_rows(responses, mask), rows)


def is_usable(ids, text: str, tokenizer, keep_truncated: bool) -> bool:
    """Whether an answer may be trained on: it ended, and its text, which is judged, says all that is in its ids."""
    ended = ids[-1] in tokenizer.end_ids
    special = tokenizer.special_ids & set((ids[:-1] if ended else ids).tolist())
    cut = "\ufffd" in text  # a character cut in two
    return bool(text.strip()) and not special and not cut and bool(ended or keep_truncated)


# ---------------------------------------------------------------------------------------------------- labels


def make_pairs(reward, judge, rollout: Rollout, tokenizer, config: Config):
    """Step 2 of the box: (pairs, metrics)."""
    ids = (tokens[mask > 0] for tokens, mask in zip(rollout.responses, rollout.mask))
    usable = np.array([is_usable(*x, tokenizer, config.keep_truncated) for x in zip(ids, rollout.answers)])
    if judge:
        items, metrics = np.arange(len(usable)).reshape(-1, 2), {}
    else:
        scores = ask_reward(reward, rollout, tokenizer.end_ids, config)
        items, metrics = best_against_worst(scores, usable, config.candidates), {"objective/scores": scores.mean()}
    known = usable[items].all(1) & [rollout.answers[a] != rollout.answers[b] for a, b in items]
    p = ask_judge(judge, rollout, items, known) if judge else np.ones(len(items), np.float32)
    known &= np.isfinite(p)
    p = np.where(known, p, np.float32(0.5))
    if judge:
        metrics["judge/sure"] = np.maximum(p, 1 - p)[known].mean() if known.any() else 0.5
    return Pairs(items, p, known.astype(np.float32)), metrics | {"usable": known.mean()}


def best_against_worst(scores, usable, candidates: int) -> np.ndarray:
    """The best- and the worst-scored usable answer to each prompt, scores and usable (B K,): -> items (B, 2). Twice the
    same one where all scores are equal or fewer than two answers are usable."""
    scores, usable = scores.reshape(-1, candidates), usable.reshape(-1, candidates)
    best, worst = np.where(usable, scores, -np.inf).argmax(1), np.where(usable, scores, np.inf).argmin(1)
    return np.stack([best, worst], 1) + candidates * np.arange(len(scores))[:, None]


def ask_reward(reward, rollout: Rollout, ends, config: Config) -> np.ndarray:
    """Scores (B K,) by a reward model, or by a function: each process asks it about its own items."""
    if isinstance(reward, gpt.ScoreModel):
        arrays = gpt.put_batch(dict(enumerate(rollout[:4])))  # queries, query_mask, responses, mask
        return gpt.to_numpy(gpt.score(reward, *arrays.values(), ends, config.batch_size // config.minibatch_size))
    own = [gpt.own_rows(x) for x in (rollout.prompts, rollout.answers, rollout.rows)]
    return gpt.gather_rows(gpt.check_scores(reward(*own), len(own[0])))


def ask_judge(judge, rollout: Rollout, items, known) -> np.ndarray:
    """P(a is better) (B,) of the pairs `items` (B, 2) that are `known` (B,), NaN for the others. Each process asks for
    its own share."""
    own, asked = gpt.own_rows(items), gpt.own_rows(known)
    p = np.full(len(own), np.nan, np.float32)
    if asked.any():
        a, b = own[asked].T
        pick = lambda values, items: [values[i] for i in items]
        said = judge(
            pick(rollout.prompts, a), pick(rollout.answers, a), pick(rollout.answers, b), pick(rollout.rows, a)
        )
        p[asked] = check_probabilities(said, len(a))
    return gpt.gather_rows(p)


def check_probabilities(said, n: int) -> np.ndarray:
    """What a judge returned, as n numbers in [0, 1], NaN where it says None, NaN or words."""
    p = np.array([gpt.to_number(x) for x in said], np.float32) if np.ndim(said) == 1 else np.zeros(0)
    if p.shape != (n,) or ((p < 0) | (p > 1)).any():
        raise ValueError(f"--judge must return {n} probabilities that a is better; it returned {said!r:.200}")
    return p


def pair_batch(rollout: Rollout, pairs: Pairs) -> dict[str, np.ndarray]:
    """Pairs as `gpt.fork` lays them out, padding included: the prompt but its last token as segment 1, then that token
    and an answer, twice, as segments 2 and 3: within each a token is predicted by the one before it."""
    (a, b), T = pairs.items.T, rollout.mask.shape[1]
    queries, last = rollout.queries[a, :-1], rollout.queries[a, -1:]
    one, none = np.ones_like(last), np.zeros_like(queries)
    mask, row = rollout.mask, lambda *parts: np.concatenate(parts, 1)
    return dict(
        tokens=row(queries, last, rollout.responses[a], last, rollout.responses[b]),
        segments=row(rollout.query_mask[a, :-1], 2 * one, 2 * mask[a], 3 * one, 3 * mask[b]),
        mask=row(none, 0 * one, mask[a], 0 * one, mask[b]),
        answers=mask[pairs.items] * (queries.shape[1] + np.array([[1], [2 + T]]) + np.arange(T)),
        p=pairs.p,
        weight=pairs.weight,
    )


# ---------------------------------------------------------------------------------------------------- main


def resolve(config: Config) -> Config:
    """The defaults that depend on others, and complaints about what does not go together."""
    config = replace(config, minibatch_size=config.minibatch_size or config.batch_size)
    gpt.check_batch_size(config.minibatch_size, "--minibatch-size")
    if config.batch_size % config.minibatch_size or config.minibatch_size % config.micro_batches:
        raise ValueError(
            "--batch-size must be a multiple of --minibatch-size, and that of --micro-batches; "
            f"they are {config.batch_size}, {config.minibatch_size} and {config.micro_batches}"
        )
    if not config.beta > 0:
        raise ValueError(f"--beta {config.beta}: a price above 0; below it the worse answers would be learned")
    if config.candidates < 2 or (config.judge and config.candidates > 2):
        raise ValueError(
            f"--candidates {config.candidates}: a pair needs 2 answers at least, and a judge compares just 2"
        )
    return config


def load_reward(config: Config, tokenizer):
    """A reward model, or the function that --reward names; None where a judge labels."""
    if config.judge:
        return None
    if ":" in config.reward:
        return gpt.load_function(config.reward)
    return gpt.load_reward_model(config.reward, tokenizer, config.init, config.dtype)


def main(config: Config):
    key = gpt.start(config.seed)
    config = resolve(config)
    policy, tokenizer = gpt.load_policy(config.init)
    gpt.check_tokenizer_of(config.ref or config.init, tokenizer, config.init)
    reward, judge = load_reward(config, tokenizer), gpt.load_function(config.judge) if config.judge else None
    gold = gpt.load_function(config.gold) if config.gold else None
    prompts = gpt.Batches(
        config.data, "prompts", tokenizer, config.batch_size, config.prompt_length, config.seed,
        skip_bad=config.skip_bad_rows,
    )  # fmt: skip

    prompts.plan(config.steps)
    updates = config.batch_size // config.minibatch_size
    lr = gpt.schedule(config.lr, config.steps * updates, config.warmup, "linear")
    optimizer = gpt.adamw(lr, clip=config.clip_norm)
    policy, base = gpt.trainable(policy, config.lora_rank, config.dtype, key)
    ref = gpt.load_frozen(config.ref or config.init, config.dtype) if base is None or config.ref else base
    ref.check_length(config.prompt_length + config.response_length, ": lower --prompt-length or --response-length")
    state = State(policy, gpt.shard(optimizer.init(policy)))

    run = gpt.Run(prompts.hashes, **vars(config))
    state, first = run.restore(state)
    stream = prompts.stream(first, config.steps)
    for iteration in run.steps(first):
        batch = next(stream)
        # 1 answers to each prompt, of the policy as it is now
        sampler = gpt.attach(state.policy, base)
        rollout = sample(sampler, tokenizer, prompts, batch, jax.random.fold_in(key, iteration), config)
        # 2 a pair of them, and how likely its first answer is the better one
        pairs, metrics = make_pairs(reward, judge, rollout, tokenizer, config)
        if iteration == 0 and not pairs.weight.any():
            raise ValueError(
                f"none of {config.batch_size} prompts had two usable answers of different score: raise --candidates or "
                "--response-length, or --keep-truncated where the model rarely ends (or the judge gave no verdict)"
            )
        # 3 an optimiser step on each minibatch of pairs
        train, history = pair_batch(rollout, pairs), []
        for rows in np.arange(config.batch_size).reshape(updates, -1):
            minibatch = gpt.put_batch({name: x[rows] for name, x in train.items()})
            state, losses = train_step(state, base, ref, minibatch, optimizer, config)
            history.append(losses)

        metrics |= {name: sum(losses[name] for losses in history) / updates for name in history[0]}
        # of the first minibatch alone, when the policy was still the one that wrote the answers
        metrics |= {"objective/kl": history[0]["objective/kl"], "lr": lr(iteration * updates)}
        if gold:
            own = [gpt.own_rows(x[:: config.candidates]) for x in (rollout.prompts, rollout.answers, rollout.rows)]
            metrics |= gpt.mean_gold(gold(*own), "eval/")
        if iteration % config.sample_every == 0 or iteration == config.steps - 1:
            a, b = (rollout.answers[i] for i in pairs.items[0])
            run.sample(iteration, prompt=rollout.prompts[0], a=a, b=b, p=float(pairs.p[0]))
        run.log(iteration, metrics)
        run.checkpoint(iteration, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
