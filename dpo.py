"""DPO: preference pairs straight into a policy, with no reward model and no sampling.

    z = beta [(log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))]       sums over an answer's tokens and EOS
    dpo      L = -(1 - e) log sigmoid(z) - e log sigmoid(-z)
    robust   L = (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e)       means over pairs

pi is the policy, ref the frozen reference, y_w the chosen answer ("won") and y_l the rejected one ("lost"), e the share
of labels taken to be wrong (--label-smoothing). z is what is logged as `rewards/margins`.

    dpo, e = 0    Rafailov et al. 2023 (arXiv:2305.18290, eq. 7)
    dpo, e > 0    conservative DPO, Mitchell's note (eq. 3): lowest at z = logit(1 - e), larger margins are pulled back
    robust        Chowdhury et al. 2024 (arXiv:2403.00409, eq. 12): an unbiased estimate of the loss on clean labels,
                  without a lower bound

Details that matter:
1. Sums, not means, over a completion's tokens: the theory is about the probability of the whole response.
2. The log-prob of the chosen answers usually falls in training; that of the rejected ones falls faster. The loss sees
   only their difference, so this is expected; both are logged (`logps/chosen`, `logps/rejected`).
3. Without --ref the reference is the model of --init, so z is 0 at the first step, and the loss ln 2.
4. --precompute-ref writes the reference's log-probs beside the token cache, once for each model, tokenizer, length and
   file, and the reference leaves memory.
5. Both answers stand in one row behind their prompt, which is computed once, and the head works on the answers alone;
   log-probs and gradients are those of two whole rows (--no-share-prefix).
6. A soft label p = P(chosen is better), `label_p` on a row, is the pair both ways round: p L(z) + (1 - p) L(-z).

Pairs of the policy's own answers, made as it learns: online.py.

    python dpo.py                                                            # out/sft + data/toy/pairs.jsonl -> out/dpo
    python dpo.py --init out/hh-sft --data data/hh/pairs.jsonl --out out/hh-dpo --length 512 --lr 1e-6 --beta 0.1
"""

import itertools
from collections import Counter
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
    init: str = "out/sft"  # policy to start from
    ref: str | None = None  # frozen reference, of the same tokenizer (None: --init)
    data: tuple[str, ...] = ("data/toy/pairs.jsonl",)  # preference pairs; name:weight mixes several
    heldout: str | None = None  # pairs for validation (None: NAME-heldout.jsonl beside --data, if there)
    out: Path = Path("out/dpo")  # run folder
    steps: int | None = None  # optimiser steps (None: one epoch)
    batch_size: int = 32  # pairs a step
    micro_batches: int = 1  # gradient accumulation: parts that a batch is computed in
    length: int = 48  # tokens of prompt and completion together: longer completions are cut, and have no EOS then
    lr: float = 3e-4  # peak learning rate; 10 steps of warm-up, an eighth of all at most, then linear to 0

    loss: Literal["dpo", "robust"] = "dpo"  # the box above; robust: unbiased where labels are wrong by chance
    beta: float = 0.5  # price of one nat of KL to the reference; the larger, the closer policy and reference stay
    label_smoothing: float = 0.0  # share of labels taken to be wrong (e above)
    precompute_ref: bool = False  # reference log-probs from disk, computed there first where they are missing

    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    share_prefix: bool = True  # compute a pair's prompt once for both answers
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 100  # steps between checkpoints
    eval_every: int = 100  # steps between validations
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


FEW = 60  # pairs, up to which a run ends by saying how far it moved the policy on them


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter
    opt_state: tuple


# ---------------------------------------------------------------------------------------------------- loss


def dpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, loss: str = "dpo",
    label_p=1.0, weight=None,
):  # fmt: skip
    """The losses of the box above from summed log-probs in nats, each (B,): -> ((B,), metrics).

    `label_p` (B,) is P(chosen is better), where labels are soft. A batch's loss is the mean of its losses, which the
    caller takes; `weight` (B,) weighs the means in metrics.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)  # implicit rewards, up to a function of the prompt
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    margins = chosen_rewards - rejected_rewards  # z
    e, log_sigmoid = label_smoothing, jax.nn.log_sigmoid
    if loss == "dpo":
        one_way = lambda z: -(1 - e) * log_sigmoid(z) - e * log_sigmoid(-z)
    elif loss == "robust":
        one_way = lambda z: (-(1 - e) * log_sigmoid(z) + e * log_sigmoid(-z)) / (1 - 2 * e)
    else:
        raise ValueError(f"unknown loss {loss!r}: dpo or robust")
    losses = label_p * one_way(margins) + (1 - label_p) * one_way(-margins)
    mean = partial(gpt.weighted_mean, weight=jnp.ones_like(margins) if weight is None else weight)
    return losses, {
        "rewards/chosen": mean(chosen_rewards),
        "rewards/rejected": mean(rejected_rewards),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(margins > 0),  # 0 while policy and reference are the same
        "logps/chosen": mean(policy_chosen),
        "logps/rejected": mean(policy_rejected),
    }


# ---------------------------------------------------------------------------------------------------- the step


def pair_logprobs(model, batch, config: Config):
    """Summed log-probs (B, 2) of the completions of a batch of pairs, chosen first, in one forward pass."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    return gpt.completion_logprobs(model, batch, config.remat)[0]


def with_ref(ref, batch, config: Config):
    """The batch with the reference's log-probs, "ref_logps" (B, 2); without a `ref` they are in it already."""
    return batch if ref is None else batch | {"ref_logps": pair_logprobs(ref, batch, config)}


def batch_loss(policy, batch, config: Config):
    """(loss, metrics) of pairs with "ref_logps", chosen first: in one row each (`gpt.fork`), or two, (B, 2, T)."""
    chosen, rejected = pair_logprobs(policy, batch, config).T
    ref_chosen, ref_rejected = batch["ref_logps"].T
    losses, metrics = dpo_loss(
        chosen, rejected, ref_chosen, ref_rejected, config.beta, config.label_smoothing, config.loss,
        batch["label_p"], batch["weight"],
    )  # fmt: skip
    loss = gpt.weighted_mean(losses, batch["weight"])
    return loss, metrics | {"loss": loss}


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnames="state")
def train_step(state: State, base, ref, batch, optimizer, config: Config):
    """One optimiser step on a batch of pairs: -> (state, metrics). `base` is the frozen model below an adapter, None
    where the whole policy learns; `ref` is the reference, None where its log-probs are in the batch."""
    batch = with_ref(ref, batch, config)
    loss_fn = lambda policy, batch: batch_loss(gpt.attach(policy, base), batch, config)
    count = lambda batch: batch["weight"].sum()
    *state, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    return State(*state), metrics


@partial(jax.jit, static_argnames="config")
def eval_step(policy, base, ref, batch, config: Config):
    return batch_loss(gpt.attach(policy, base), with_ref(ref, batch, config), config)[1]


# ---------------------------------------------------------------------------------------------------- reference


def load_ref(config: Config, base=None):
    """The frozen reference: the model of --ref, else that of --init, which is the `base` of an adapter."""
    if base is not None and not config.ref:
        return base
    return gpt.load_frozen(config.ref or config.init, config.dtype)


def precompute(batches: gpt.Batches, config: Config) -> list[np.ndarray]:
    """The reference's log-probs of every pair, (rows, 2) for each data file: computed once, kept in the token cache.

    The cache has a folder for each file, tokenizer and length; the name below says which weights and which precision.
    """
    folder = gpt.find_folder(config.ref or config.init)
    weights = gpt.weights_hash(folder)
    files = [data.folder / f"ref-{weights}-{gpt.compute_dtype(config.dtype).__name__}.npy" for data in batches.sets]
    if not all(file.exists() for file in files):
        ref, step = load_ref(config), jax.jit(partial(pair_logprobs, config=config))
        gpt.check_context(ref, batches)
        tables = [np.zeros((len(data), 2), np.float32) for data in batches.sets]
        bar = gpt.progress(total=sum(map(len, tables)), desc="reference log-probs", unit=" pairs")
        # the last batch is filled up with rows seen before: the first `real_rows` are new
        for batch, real_rows in batches.once():
            logps = gpt.to_numpy(step(ref, put_pairs(batch, None)))
            for (source, row), pair in zip(batch["index"][:real_rows], logps):
                tables[source][row] = pair
            bar.update(real_rows)
        bar.close()
        if jax.process_index() == 0:
            for file, table in zip(files, tables):
                gpt.write_atomic(file, partial(write_array, table=table))
        gpt.barrier("reference")
    return [np.load(file, mmap_mode="r") for file in files]


def write_array(path, table: np.ndarray):
    with open(path, "wb") as file:
        np.save(file, table)


def put_pairs(batch, tables):
    """The batch on the devices, with the reference's log-probs of its rows where `tables` hold them."""
    if tables is not None:
        batch = batch | {"ref_logps": np.stack([tables[source][row] for source, row in batch["index"]])}
    return gpt.put_batch(batch)


# ---------------------------------------------------------------------------------------------------- validation


def heldout_means(batches: gpt.Batches, eval_step, most: int = 20) -> dict[str, float]:
    """Mean metrics of eval_step(batch) over the rows of the first `most` batches, by their weights; none where all of
    these are 0."""
    total, count = Counter(), 0.0
    for batch, real_rows in itertools.islice(batches.once(), most):
        batch["weight"][real_rows:] = 0  # the last batch is filled up with rows seen before
        n = float(batch["weight"].sum())
        total.update({name: n * float(value) for name, value in gpt.to_numpy(eval_step(batch)).items()})
        count += n
    return {name: value / count for name, value in total.items()} if count else {}


def evaluate(policy, base, ref, batches: gpt.Batches, tables, config: Config, most: int = 20) -> dict:
    """The training metrics on held-out pairs, over the first `most` batches."""
    step = lambda batch: eval_step(policy, base, ref, put_pairs(batch, tables), config)
    return {f"val/{name}": value for name, value in heldout_means(batches, step, most).items()}


def learnt(found: dict, count: int) -> str:
    """What a run on few pairs did to them, from `evaluate`'s means. At the start the margin is 0."""
    share, margin = (found[f"val/rewards/{name}"] for name in ("accuracies", "margins"))
    return f"of its {count} pairs the policy now sides with {share:.0%}, by a mean margin (z) of {margin:.3g} nats"


# ---------------------------------------------------------------------------------------------------- main


def check(config: Config):
    """Complain of what cannot work, before anything is loaded."""
    gpt.check_batch_size(config.batch_size)
    if not config.beta > 0:
        raise ValueError(f"--beta {config.beta}: a price above 0; below it the rejected answers would be learned")
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"--label-smoothing {config.label_smoothing}: the share of wrong labels is in [0, 0.5)")
    try:
        gpt.find_kind(config.data, ("pairs",), config.skip_bad_rows)
    except gpt.BadRow as error:
        raise ValueError(
            f"{error}. DPO learns from pairs: demonstrations are for sft.py, single answers with a label for "
            "ipo_kto.py --loss kto"
        ) from None


def main(config: Config):
    key = gpt.start(config.seed)
    check(config)
    policy, tokenizer = gpt.load_policy(config.init)
    gpt.check_tokenizer_of(config.ref or config.init, tokenizer, config.init)
    load_pairs = partial(
        gpt.Batches, kind="pairs", tokenizer=tokenizer, batch_size=config.batch_size, length=config.length,
        seed=config.seed, skip_bad=config.skip_bad_rows, forked=config.share_prefix,
    )  # fmt: skip
    pairs, heldout = load_pairs(config.data), config.heldout or gpt.heldout_file(config.data)
    heldout = load_pairs(heldout) if heldout else None
    gpt.check_context(policy, pairs, heldout)

    steps = pairs.plan(config.steps, config.micro_batches)
    lr = gpt.schedule(config.lr, steps, None, "linear")
    optimizer = gpt.adamw(lr)
    policy, base = gpt.trainable(policy, config.lora_rank, config.dtype, key)
    state = State(policy, gpt.shard(optimizer.init(policy)))

    run = gpt.Run(pairs.hashes, **vars(config) | dict(steps=steps))
    state, first = run.restore(state)
    ref = tables = heldout_tables = None  # the reference is a model, or tables of its log-probs of each pair
    if config.precompute_ref:
        tables = precompute(pairs, config)
        if heldout:
            heldout_tables = precompute(heldout, config)
    else:
        ref = load_ref(config, base)
        gpt.check_context(ref, pairs, heldout)
    stream = pairs.stream(first, steps)
    for step in run.steps(first):
        batch = put_pairs(next(stream), tables)
        state, metrics = train_step(state, base, ref, batch, optimizer, config)
        metrics["lr"] = lr(step)
        if heldout and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
            metrics |= evaluate(state.policy, base, ref, heldout, heldout_tables, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    if sum(pairs.counts) <= FEW:
        print(learnt(evaluate(state.policy, base, ref, pairs, tables, config), sum(pairs.counts)))
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
