"""IPO on preference pairs and KTO on single answers with a thumb up or down: policies without a reward model.

    ipo   h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))
          L = (h - 1 / (2 tau))^2                                              mean over pairs

    kto   g = log pi(y|x) - log ref(y|x)
          z0 = max(0, mean_i [log pi(y_j|x_i) - log ref(y_j|x_i)])             y_j: an answer to another prompt
          L = lambda_D (1 - sigmoid(beta (g - z0)))    where the thumb is up   mean over answers
              lambda_U (1 - sigmoid(beta (z0 - g)))    where it is down

pi is the policy, ref the frozen reference, y_w the chosen answer ("won") and y_l the rejected one ("lost").
Log-probs of answers are sums over their tokens and EOS.

IPO: Azar et al. 2023 (arXiv:2310.12036, eq. 17). KTO: Ethayarajh et al. 2024 (arXiv:2402.01306, section 4).

Details that matter:
1. IPO's paper takes log-probs of whole answers, sums over tokens; TRL and HALOs divide them by the number of tokens
   (--reduction mean). These are two algorithms (see `completion_logprobs`). KTO has sums.
2. IPO pulls margins beyond 1 / (2 tau) back. Its tau and DPO's beta cannot be compared.
3. z0 is one number a step: averaged over the whole batch by the rows' weights, then clamped at 0, without gradient. It
   is no estimate of the KL, since y_j was not sampled from the policy. It may stay at 0 for long; that is what the
   clamp is for.
4. For z0 a prompt never gets an answer of its own; where pairs are split into thumbs, the data has two of those.
5. lambda_D n_D / (lambda_U n_U) should be in [1, 4/3] (arXiv:2402.01306v1, eq. 8): the rarer thumb weighs more.
   `class_weights` computes it from the counts n of the data and changes only one of the two.

    python ipo_kto.py                                      # out/sft + data/toy/pairs.jsonl -> out/ipo
    python ipo_kto.py --loss kto                           # out/sft + data/toy/thumbs.jsonl -> out/kto
    python ipo_kto.py --loss kto --data data/toy/pairs.jsonl --out out/kto-pairs
    python ipo_kto.py --init out/hh-sft --data data/hh/pairs.jsonl --out out/hh-ipo --length 512 --lr 1e-6
    python ipo_kto.py --loss kto --init out/hh-sft --data data/hh/pairs.jsonl --length 512 --lr 1e-6 --beta 0.1
"""

import itertools
import sys
from collections import Counter
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
    loss: Literal["ipo", "kto"] = "ipo"  # from pairs; from single answers with a label (pairs are split in two)
    init: str = "out/sft"  # policy to start from
    ref: str | None = None  # frozen reference, of the same tokenizer (None: --init)
    data: tuple[str, ...] | None = None  # default: data/toy/pairs.jsonl or thumbs.jsonl; name:weight mixes several
    heldout: str | None = None  # validation (None: NAME-heldout.jsonl beside --data, if there)
    out: Path | None = None  # run folder (None: out/ipo or out/kto)
    steps: int | None = None  # optimiser steps (None: one epoch)
    batch_size: int = 32  # pairs (ipo) or answers (kto) a step
    micro_batches: int = 1  # gradient accumulation: parts that a batch is computed in
    length: int = 48  # tokens of prompt and completion together, at most
    lr: float = 3e-4  # peak learning rate; 10 steps of warm-up, an eighth of all at most, then linear to 0

    tau: float = 0.1  # ipo: price of the KL; the margin aimed at is 1 / (2 tau) nats
    reduction: Literal["sum", "mean"] = "sum"  # ipo: over tokens; mean wants a tau about length times as large
    beta: float = 1.0  # kto: how soon an answer counts as won or lost, per nat of log-ratio
    desirable_weight: float | None = None  # kto: lambda_D (None: by the rule above, from the data)
    undesirable_weight: float | None = None  # kto: lambda_U; where one of the two is given the other one is 1

    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    share_prefix: bool = True  # ipo: compute a pair's prompt once for both answers
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 100  # steps between checkpoints
    eval_every: int = 100  # steps between validations
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter
    opt_state: tuple


# ---------------------------------------------------------------------------------------------------- losses


def ipo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, tau=0.1, weight=None):
    """IPO's losses from log-probs in nats, sums or means over tokens, each (B,): -> ((B,), metrics).

    A batch's loss is the mean of its losses, which the caller takes; `weight` (B,) weighs the means in metrics.
    """
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected  # log-ratios
    losses = (chosen - rejected - 1 / (2 * tau)) ** 2  # eq. 17
    mean = partial(gpt.weighted_mean, weight=jnp.ones_like(losses) if weight is None else weight)
    return losses, {
        "rewards/chosen": mean(tau * chosen),  # in units where the margin aimed at is 1/2
        "rewards/rejected": mean(tau * rejected),
        "rewards/margins": mean(tau * (chosen - rejected)),
        "rewards/accuracies": mean(chosen > rejected),  # 0 while policy and reference are the same
        "logps/chosen": mean(policy_chosen),
        "logps/rejected": mean(policy_rejected),
    }


def kto_z0(policy_mismatched, ref_mismatched, weight=None):
    """KTO's reference point, from summed log-probs (B,) of answers to other prompts (`mismatch`): -> scalar >= 0, nats.

    The mean over the whole batch first, then the clamp; no gradient ("we do not back-propagate through the KL term").
    A row of weight w counts as w rows do, here as in the loss: with r_i = log pi - log ref of row i's prompt,

        z0 = max(0, sum_i w_i r_i / sum_i w_i)
    """
    weight = jnp.ones_like(policy_mismatched) if weight is None else weight
    return jax.lax.stop_gradient(jnp.maximum(gpt.weighted_mean(policy_mismatched - ref_mismatched, weight), 0.0))


def kto_loss(policy, ref, label, z0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0, weight=None):
    """KTO's losses from summed log-probs (B,) in nats, label (B,) 1 (thumb up) or 0, and z0 (): -> ((B,), metrics).

    Metrics are means over the answers with label 1 (chosen) and over those with label 0 (rejected), 0 where a batch has
    none. `share/...` is how much of the batch they are; `weight` (B,) weighs all of these.
    """
    z0 = jax.lax.stop_gradient(z0)
    up, rewards = label > 0, beta * (policy - ref)
    desirable = desirable_weight * (1 - jax.nn.sigmoid(rewards - beta * z0))
    undesirable = undesirable_weight * (1 - jax.nn.sigmoid(beta * z0 - rewards))
    weight = jnp.ones_like(policy) if weight is None else weight
    metrics = {}
    for name, side in (("chosen", up), ("rejected", ~up)):
        metrics[f"rewards/{name}"] = gpt.weighted_mean(rewards, weight * side)
        metrics[f"logps/{name}"] = gpt.weighted_mean(policy, weight * side)
        metrics[f"share/{name}"] = gpt.weighted_mean(side, weight)
    return jnp.where(up, desirable, undesirable), metrics


def class_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """(lambda_D, lambda_U) from counts n_D and n_U, such that lambda_D n_D / (lambda_U n_U) is in [1, 4/3]: at most one
    of the two is raised above 1."""
    if not desirable or not undesirable:
        return 1.0, 1.0
    ratio = desirable / undesirable
    return max(1.0, 1 / ratio), max(1.0, ratio / (4 / 3))


# ---------------------------------------------------------------------------------------------------- the step


def completion_logprobs(model, batch, config: Config):
    """log p of each completion, (B,) of thumbs or (B, 2) of pairs (chosen first), in one forward pass.

    For pairs: which algorithm IPO is, is decided here. In the paper pi(y|x) is the probability of the whole
    response, hence the sum, and the optimum is ref(y) exp(p(y beats ref) / tau) / Z. TRL and HALOs take the mean over
    the response's tokens: tau then prices a token, and the optimum is ref(y) exp(|y| (p(y beats ref) / tau + c)), which
    favours long responses where p is high. The loss has the same value at both optima: it cannot tell them apart.
    """
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    logprobs, counts = gpt.completion_logprobs(model, batch, config.remat)
    if config.loss == "ipo" and config.reduction == "mean":
        logprobs = logprobs / jnp.maximum(counts, 1)  # each response by its own count, prompt tokens not in it
    return logprobs


def batch_loss(policy, batch, config: Config):
    """(loss, metrics) of a batch `with_ref`: pairs in one row (`gpt.fork`) or two, (B, 2, T); or thumbs, (B, T)."""
    logps, ref, weight = completion_logprobs(policy, batch, config), batch["ref_logps"], batch["weight"]
    if config.loss == "kto":
        lambdas = config.desirable_weight, config.undesirable_weight
        losses, metrics = kto_loss(logps, ref, batch["label"], batch["z0"], config.beta, *lambdas, weight)
        loss = gpt.weighted_mean(losses, weight)
        return loss, class_sums(metrics) | {"loss": loss, "z0": gpt.weighted_mean(batch["z0"], weight)}
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.T, ref.T
    losses, metrics = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, config.tau, weight)
    swapped, _ = ipo_loss(rejected, chosen, ref_rejected, ref_chosen, config.tau)
    p = batch["label_p"]  # a soft label p = P(chosen is better), 1 where a row has none: the pair both ways round
    loss = gpt.weighted_mean(p * losses + (1 - p) * swapped, weight)
    return loss, metrics | {"loss": loss}


def class_sums(metrics):
    """Metrics of kto_loss, each mean over a class times the class's share of the batch: sums over the class divided by
    the size of the whole batch. Those of micro-batches may be averaged; means over a class may not."""
    share = lambda name: 1.0 if name.startswith("share") else metrics["share/" + name.rpartition("/")[2]]
    return {name: value * share(name) for name, value in metrics.items()}


def class_means(metrics):
    """The way back from `class_sums` to means over a class, once the micro-batches are averaged."""
    share = lambda name: metrics.get("share/" + name.rpartition("/")[2], 1.0)
    means = {name: v / jnp.maximum(share(name), 1e-9) for name, v in metrics.items() if not name.startswith("share")}
    return means | {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnames="state")
def train_step(state: State, base, ref, batch, optimizer, config: Config):
    """One optimiser step on a batch with "z0": -> (state, metrics). `base` is the frozen model below an adapter, None
    where the whole policy learns."""
    batch = with_ref(ref, batch, config)
    loss_fn = lambda policy, batch: batch_loss(gpt.attach(policy, base), batch, config)
    count = lambda batch: batch["weight"].sum()
    *state, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    return State(*state), metrics


@partial(jax.jit, static_argnames="config")
def eval_step(policy, ref, batch, config: Config):
    return batch_loss(policy, with_ref(ref, batch, config), config)[1]


@partial(jax.jit, static_argnames="config")
def z0_step(policy, ref, mismatched, config: Config):
    logps, ref_logps = (completion_logprobs(model, mismatched, config) for model in (policy, ref))
    return kto_z0(logps, ref_logps, mismatched["weight"])


def find_z0(policy, ref, batch, config: Config):
    """KTO's reference point for a batch as `gpt.Batches` makes it; 0 for IPO, which has none."""
    if config.loss == "ipo":
        return 0.0
    return z0_step(policy, ref, gpt.put_batch(mismatch(batch, config.length)), config)


def with_ref(ref, batch, config: Config):
    """The batch with the reference's log-probs, "ref_logps", and with "z0", a scalar, in every row: what is known of
    the whole batch before it is cut into micro-batches."""
    z0 = jnp.broadcast_to(batch["z0"], batch["weight"].shape)
    return batch | {"ref_logps": completion_logprobs(ref, batch, config), "z0": z0}


def mismatch(batch, length: int) -> dict[str, np.ndarray]:
    """The prompts of a batch of thumbs with other prompts' answers: row i has that of the next row with another prompt.

    tokens, segments and mask (B, T), right-padded, and weight (B,) -> the same, (B, T'). Rows of more than `length`
    tokens lose their end, as rows of the data do. A row of weight 0 is as good as absent: nobody gets its answer.
    """
    rows = list(zip(batch["tokens"], batch["segments"] > 0, batch["mask"] > 0))
    prompts = [tokens[real & ~scored] for tokens, real, scored in rows]
    answers = [tokens[scored] for tokens, _, scored in rows]
    joined = []
    for i, prompt in enumerate(prompts):
        others = (j % len(rows) for j in range(i + 1, i + len(rows)) if batch["weight"][j % len(rows)] > 0)
        own = None if batch["weight"][i] > 0 else i  # what counts for nothing may keep its answer
        j = next((j for j in others if not np.array_equal(prompts[j], prompt)), own)
        if j is None:
            raise ValueError(
                "all prompts of a batch are equal, and KTO's z0 needs answers to other prompts: raise --batch-size, or "
                "mix in data with other prompts"
            )
        joined.append((len(prompt), np.concatenate([prompt, answers[j]])[:length]))
    shape = len(rows), gpt.bucket(max(len(ids) for _, ids in joined), length)
    out = {name: np.zeros(shape, np.int32) for name in ("tokens", "segments", "mask")}
    for i, (start, ids) in enumerate(joined):
        out["tokens"][i, : len(ids)], out["segments"][i, : len(ids)], out["mask"][i, start : len(ids)] = ids, 1, 1
    return out | {"weight": batch["weight"]}


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


def evaluate(policy, ref, batches: gpt.Batches, config: Config, most: int = 20) -> dict:
    """The training metrics on held-out rows, over the first `most` batches."""
    step = lambda batch: eval_step(policy, ref, put_rows(policy, ref, batch, config), config)
    metrics = heldout_means(batches, step, most)
    if config.loss == "kto" and metrics:
        metrics = class_means(metrics)
    return {f"val/{name}": value for name, value in metrics.items()}


def put_rows(policy, ref, batch, config: Config):
    """The batch on the devices, with KTO's z0."""
    return gpt.put_batch(batch) | {"z0": find_z0(policy, ref, batch, config)}


# ---------------------------------------------------------------------------------------------------- main


def resolve(config: Config) -> Config:
    """The defaults that depend on the loss, and complaints about what does not go together."""
    kind = {"ipo": "pairs", "kto": "thumbs"}[config.loss]
    out = config.out or Path("out") / config.loss
    config = replace(config, data=config.data or (f"data/toy/{kind}.jsonl",), out=out)
    gpt.check_batch_size(config.batch_size)
    for name in ("tau",) if config.loss == "ipo" else ("beta", "desirable_weight", "undesirable_weight"):
        value = getattr(config, name)
        if value is not None and not (value > 0 or value == 0 and name.endswith("weight")):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: below 0 the worse answers would be learned, at 0 none"
            )
    if config.loss == "kto" and config.batch_size < 2:
        raise ValueError(
            f"--batch-size {config.batch_size}: KTO's z0 comes from prompts with other rows' answers, so a batch needs "
            "2 rows at least; 32 and more are usual"
        )
    try:
        gpt.find_kind(config.data, (kind,), config.skip_bad_rows)
    except gpt.BadRow as error:
        hint = {"pairs": "single answers with a label are for --loss kto", "thumbs": "demonstrations are for sft.py"}
        raise ValueError(f"{error}. {config.loss.upper()} learns from {kind}: {hint[kind]}") from None
    return config


def with_class_weights(config: Config, batches: gpt.Batches) -> Config:
    """The config with KTO's lambdas: those that are given, or else by the rule from the counts of thumbs. A row of
    weight w counts as w rows do, here as in the loss."""
    at, counts = gpt.EXTRAS.index, []
    for data, count in zip(batches.sets, batches.counts):
        weight, label = (data.extras[:, at(name)].astype(np.float64) for name in ("weight", "label"))
        counts.append([count * np.mean(weight * side) for side in (label, 1 - label)])
    up, down = np.sum(counts, 0).round(6).tolist()
    given = config.desirable_weight, config.undesirable_weight
    weights = class_weights(up, down) if given == (None, None) else tuple(1.0 if w is None else w for w in given)
    ratio = weights[0] * up / max(weights[1] * down, 1e-9)
    print(
        f"{up:,.0f} desirable and {down:,.0f} undesirable answers: lambda_D {weights[0]:.4g}, lambda_U {weights[1]:.4g}"
    )
    print(f"  lambda_D n_D / (lambda_U n_U) = {ratio:.4g}; the paper has 1 to 4/3")
    if not up or not down:
        print(
            f"warning: no answer is {'undesirable' if up else 'desirable'}: KTO learns from one side alone",
            file=sys.stderr,
        )
    return replace(config, desirable_weight=weights[0], undesirable_weight=weights[1])


def check_prompts(batches: gpt.Batches, heldout: gpt.Batches | None) -> gpt.Batches | None:
    """Refuse thumbs on answers to one prompt alone, from which z0 cannot be had; held-out ones are done without."""
    if one_prompt(batches):
        raise ValueError(
            f"all prompts of {', '.join(batches.hashes)} are equal, and KTO's z0 needs answers to other prompts: mix "
            "in data with other prompts"
        )
    if heldout and one_prompt(heldout):
        print(f"no validation: z0 needs two prompts, and {', '.join(heldout.hashes)} has one", file=sys.stderr)
        return None
    return heldout


def one_prompt(batches: gpt.Batches) -> bool:
    rows = (data.sequence(row) for data in batches.sets for row in range(len(data)))
    prompts = (ids[scored == 0].tolist() for ids, scored in rows)
    first = next(prompts)
    return all(prompt == first for prompt in prompts)


def main(config: Config):
    gpt.start(config.seed)
    config = resolve(config)
    kto = config.loss == "kto"
    policy, tokenizer = gpt.load_policy(config.init)
    gpt.check_tokenizer_of(config.ref or config.init, tokenizer, config.init)
    load_rows = partial(
        gpt.Batches, kind="thumbs" if kto else "pairs", tokenizer=tokenizer, batch_size=config.batch_size,
        length=config.length, seed=config.seed, skip_bad=config.skip_bad_rows,
        forked=config.share_prefix and not kto,
    )  # fmt: skip
    batches = load_rows(config.data)
    heldout = config.heldout or gpt.heldout_file(config.data)
    heldout = load_rows(heldout) if heldout else None
    gpt.check_context(policy, batches, heldout)
    steps = batches.plan(config.steps, config.micro_batches)
    if kto:
        config, heldout = with_class_weights(config, batches), check_prompts(batches, heldout)
    lr = gpt.schedule(config.lr, steps, None, "linear")
    optimizer = gpt.adamw(lr)
    policy, base = gpt.trainable(policy, config.lora_rank, config.dtype, jax.random.key(config.seed))
    if base is not None and not config.ref:
        ref = base  # an adapter's base is the model of --init
    else:
        ref = gpt.load_frozen(config.ref or config.init, config.dtype)
        gpt.check_context(ref, batches, heldout)
    state = State(policy, gpt.shard(optimizer.init(policy)))

    run = gpt.Run(batches.hashes, **vars(config) | dict(steps=steps))
    state, first = run.restore(state)
    stream = batches.stream(first, steps)
    for step in run.steps(first):
        batch = put_rows(gpt.attach(state.policy, base), ref, next(stream), config)
        state, metrics = train_step(state, base, ref, batch, optimizer, config)
        metrics = (class_means(metrics) if kto else metrics) | {"lr": lr(step)}
        if heldout and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
            metrics |= evaluate(gpt.attach(state.policy, base), ref, heldout, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
