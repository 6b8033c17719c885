"""A reward model from preference pairs: Bradley-Terry, its calibration, and a report that says how far to trust it.

    L = - mean log sigmoid(r(x, y_chosen) - r(x, y_rejected) - min_gap)

Bradley and Terry 1952; for language models Stiennon et al. 2020 (arXiv:2009.01325, section 3.4). `min_gap` is 0, unless
rows have a "margin" (by how much the chosen answer was rated higher): then it is --margin-scale times that. The metric
`gap` (TRL: margin) is what the model has reached, the mean of r(x, y_chosen) - r(x, y_rejected).

The model is a pretrained or an SFT model with a scalar head, read at the last real token (--pool last), or at the last
token of a --suffix put in EOS's place, or pooled over all tokens (mean, attention). The defaults are the toy's: its
base text holds verdicts on answers after "Judge:", so --init is the pretrained model, which has read verdicts, and
--suffix asks for one. For a model of your own: --suffix "".

The order of this file is that of a run: loss, step, normalisation, calibration, report. Details that matter:
1. Scores are defined up to a shift, and their scale is what training made it. After training, gain and bias are set so
   that the samples of the reference policy (--normalize-with) have mean 0 and standard deviation 1 (Ziegler et al.,
   arXiv:1909.08593, section 2), and folded into the head: PPO's beta then means the same for each single reward model.
   It does not for an ensemble (members are normalised one by one; where they disagree, their mean has a standard
   deviation below 1), for a function as reward, and with --normalize-with None.
2. The temperature T of the report is fitted on normalised scores: P(chosen is better) = sigmoid(gap / T). It is only
   reported; scores are not divided by it.
3. Training and use share one rule for EOS and suffix (`gpt.score_inputs`). In training both answers stand in one row
   behind their prompt, which is computed once (`gpt.fork`); neither sees the other.
4. Ties count as errors in the accuracy; scores are compared in fp32.
5. One epoch: a reward model that sees its labels twice learns their noise.
6. With --teacher a small model learns the scores of a large one, or the mean of an ensemble's, and no label: the loss
   is the mean squared error of both answers' scores (regression on a teacher's logits: Ba and Caruana 2014,
   arXiv:1312.6184). The alternative, Bradley-Terry with soft labels sigmoid(teacher's gap), tells less where the
   teacher is sure, and nothing of one prompt's answers against another's.

    python reward.py                                             # out/base + data/toy/pairs.jsonl -> out/reward
    python reward.py --init out/hh-sft --data data/hh/pairs.jsonl --out out/hh-reward --lr 1e-5 --suffix "" --gold None
    python reward.py --members 4 --out out/reward-ensemble       # an ensemble: ppo.py takes the folder
    python reward.py --init out/sft --lora-rank 8 --lr 5e-4 --out out/reward-lora        # for ppo.py --lora-rank
    python reward.py --init out/small --teacher out/reward --normalize-with out/sft --lr 2e-4 --head-lr 2e-3 \\
        --out out/reward-small
    python reward.py --report out/probe                          # no training: the report of what probe.py made
    python reward.py --report out/hh-probe --data data/hh/pairs.jsonl --length 384 --gold None

Without training, a linear head on a frozen model's features: probe.py.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.stats import binomtest

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/base"  # model folder to start from: a pretrained or an SFT model
    data: tuple[str, ...] = ("data/toy/pairs.jsonl",)  # preference pairs; name:weight mixes several
    heldout: str | None = None  # pairs for the report (None: NAME-heldout.jsonl beside --data)
    out: Path = Path("out/reward")  # run folder; of an ensemble it holds member-0, member-1 and so on
    steps: int | None = None  # optimiser steps (None: one epoch)
    batch_size: int = 32  # pairs a step
    micro_batches: int = 1  # gradient accumulation: parts that a batch is computed in
    length: int = 48  # tokens of prompt and completion together: longer completions are cut
    lr: float = 5e-5  # of the body; 0 trains the head alone (in closed form: probe.py)
    head_lr: float = 1e-3  # of the head; both rise over the first steps, then fall linearly to 0

    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    pool: Literal["last", "mean", "attention"] = "last"  # what the head reads: the last token, or all of them
    suffix: str = "\n\nJudge:"  # text put in EOS's place, where the score is read; "" reads at EOS
    margin_scale: float = 1.0  # demanded gap of scores per unit of a row's margin; 0 ignores margins
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    center: float = 0.0  # weight of mean((r_chosen + r_rejected)^2), which keeps scores near 0 (0.01 is usual)
    members: int = 1  # ensemble: members differ in head init and data order

    teacher: str | None = None  # reward model or ensemble whose scores to learn, in place of the labels

    normalize_with: str | None = "auto"  # its samples get mean 0, std 1 (auto: --init, toy: out/sft); None: leave
    normalize_data: str | None = None  # its prompts (None: prompts.jsonl beside --data)
    normalize_samples: int = 512  # how many
    response_length: int = 24  # tokens a sampled response may have
    gold: str | None = "toy:parts"  # module:function that knows the truth, for the report
    report: str | None = None  # no training: report on the reward model, or ensemble, in this folder

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


class State(NamedTuple):
    model: gpt.ScoreModel  # its body may be an adapter
    opt_state: tuple


# ---------------------------------------------------------------------------------------------------- loss


def bradley_terry_loss(chosen, rejected, min_gap=0.0, label_smoothing=0.0, center=0.0, weight=None):
    """-(1-e) log sigmoid(d) - e log sigmoid(-d), d = chosen - rejected - min_gap: (B,) scores -> (scalar, metrics).

    min_gap: a number or (B,), wider where ratings differ more (Llama 2, arXiv:2307.09288, eq. 2). label_smoothing e: a
    number or (B,); a soft label p = P(chosen is better) is e = 1 - p, whose optimum is d = logit(p). center c adds
    c mean((chosen + rejected)^2), the squared sum (Eisenstein et al. 2023, arXiv:2312.09244). weight (B,) weighs pairs.
    """
    chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
    weight = jnp.ones_like(chosen) if weight is None else weight
    d = chosen - rejected - min_gap
    losses = -(1 - label_smoothing) * jax.nn.log_sigmoid(d) - label_smoothing * jax.nn.log_sigmoid(-d)
    losses = losses + center * (chosen + rejected) ** 2
    loss = gpt.weighted_mean(losses, weight)
    return loss, {"loss": loss} | score_metrics(chosen, rejected)


def distillation_loss(scores, teacher, weight=None):
    """Mean squared difference of scores and the teacher's, (B, 2) each, chosen first: -> (scalar, metrics).

    weight (B,) weighs pairs. `agreement`: in which share of the pairs both score the same answer higher.
    """
    weight = jnp.ones(len(scores)) if weight is None else weight
    loss = gpt.weighted_mean(((scores - teacher) ** 2).mean(1), weight)
    agree = (scores[:, 0] > scores[:, 1]) == (teacher[:, 0] > teacher[:, 1])
    return loss, {"loss": loss, "agreement": jnp.mean(agree)} | score_metrics(scores[:, 0], scores[:, 1])


def score_metrics(chosen, rejected) -> dict:
    """How scores (B,) of pairs agree with the labels, and their range. A pair counts once, whatever its weight in the
    loss, as in the report on held-out pairs."""
    both = jnp.concatenate([chosen, rejected])
    return {
        "accuracy": jnp.mean(chosen > rejected),  # a tie is an error
        "gap": jnp.mean(chosen - rejected),
        "mean_reward": both.mean(),
        "min_reward": both.min(),
        "max_reward": both.max(),
    }


# ---------------------------------------------------------------------------------------------------- step


def pair_scores(model: gpt.ScoreModel, batch, remat: bool = False):
    """Scores (B, 2) of a batch of pairs, chosen first, both in one row behind their prompt (`gpt.fork`)."""
    hidden = model.body(batch["tokens"], batch["segments"], remat, forked=True)
    whole, answer = gpt.fork_sides(batch["segments"], batch["mask"], 2)
    return jax.vmap(partial(model.pooled, hidden), in_axes=1, out_axes=1)(whole, answer)


def batch_loss(model: gpt.ScoreModel, batch, config: Config):
    """(loss, metrics) of a batch of pairs, as `gpt.fork` lays them out: tokens, segments and mask (B, T); weight,
    margin, label_p (B,); with --teacher its scores, "teacher" (B, 2)."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    scores = pair_scores(model, batch, config.remat)
    if config.teacher:
        return distillation_loss(scores, batch["teacher"], batch["weight"])
    # The label says "chosen" with probability p and is wrong with probability e. "rejected" is the better one where it
    # says "rejected" and is right, or says "chosen" and is wrong.
    p, e = batch["label_p"], config.label_smoothing
    rejected_better = (1 - p) * (1 - e) + p * e
    min_gap = config.margin_scale * batch["margin"]  # ratings have a scale of their own, scores another
    chosen, rejected = scores[:, 0], scores[:, 1]
    return bradley_terry_loss(chosen, rejected, min_gap, rejected_better, config.center, batch["weight"])


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnames="state")
def train_step(state: State, base, teachers, batch, optimizer, config: Config):
    """One optimiser step on a batch of pairs: -> (state, metrics). `base` is the frozen model below an adapter, None
    where the whole model learns; `teachers` are frozen reward models, none where the labels are learned."""
    if teachers:
        batch |= {"teacher": jnp.mean(jnp.stack([pair_scores(teacher, batch) for teacher in teachers]), 0)}
    loss_fn = lambda model, batch: batch_loss(gpt.attach(model, base), batch, config)
    count = lambda batch: batch["weight"].sum()
    *state, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    if config.micro_batches > 1:  # the mean of the parts' extremes is no extreme
        metrics = {name: value for name, value in metrics.items() if name not in ("min_reward", "max_reward")}
    return State(*state), metrics


def make_optimizer(config: Config, steps: int):
    """AdamW with one learning rate for the body and one for the head, both linear to 0."""
    groups = lambda model: jax.tree_util.tree_map_with_path(
        lambda path, _: "body" if "body" in jax.tree_util.keystr(path) else "head", model
    )
    rate = lambda lr: gpt.schedule(lr, steps, None, "linear")
    make = lambda lr: gpt.adamw(rate(lr)) if lr else optax.set_to_zero()
    return optax.multi_transform({"body": make(config.lr), "head": make(config.head_lr)}, groups)


# ---------------------------------------------------------------------------------------------------- normalisation


def normalize(model: gpt.ScoreModel, tokenizer, config: Config, key, base=None) -> gpt.ScoreModel:
    """The model, so scaled and shifted that its scores of the samples of --normalize-with have mean 0 and standard
    deviation 1. `base` is what its body is an adapter on, None where it is none."""
    prompts, settings = load_prompts(config, tokenizer), (config.normalize_samples, config.response_length)
    return gpt.normalize_scores(model, base, config.normalize_with, prompts, tokenizer, key, *settings)


def load_prompts(config: Config, tokenizer) -> gpt.Batches:
    """The prompts of --normalize-data that leave room for a response."""
    longest = config.length - config.response_length
    prompts = gpt.Batches(config.normalize_data, "prompts", tokenizer, 128, longest, config.seed)
    prompts.batch_size = min(prompts.batch_size, config.normalize_samples, sum(prompts.sizes))
    return prompts


# ---------------------------------------------------------------------------------------------------- calibration
# Of N pairs that were not trained on. A gap is score of chosen - score of rejected, in normalised scores.


MAX_TEMPERATURE = 100.0  # where the fit ends when scores say nothing


def fit_temperature(gaps, low: float = 0.01, high: float = MAX_TEMPERATURE) -> float:
    """The T that minimises mean -log sigmoid(gap / T) over gaps (N,) (temperature scaling: Guo et al. 2017,
    arXiv:1706.04599).

    Convex in 1/T: bisection finds where the slope, mean(gap (sigmoid(gap / T) - 1)), is 0. Where all gaps are positive
    the best T is 0, where they are no better than chance it is infinite: T is kept within [low, high].
    """
    gaps = np.asarray(gaps, np.float64)
    slope = lambda inverse: np.mean(gaps * (_sigmoid(gaps * inverse) - 1))
    a, b = 1 / high, 1 / low
    if slope(a) >= 0:
        return high
    if slope(b) <= 0:
        return low
    for _ in range(100):
        middle = np.sqrt(a * b)
        a, b = (middle, b) if slope(middle) < 0 else (a, middle)
    return float(1 / a)


def expected_calibration_error(p, y, bins: int = 10) -> float:
    """Mean |accuracy - confidence| over bins (lo, hi] of p, weighted by their counts: p (N,) = P(first is preferred),
    y (N,) whether it was (Naeini et al. 2015)."""
    return float(sum(share * abs(accuracy - confidence) for confidence, accuracy, share in reliability(p, y, bins)))


def reliability(p, y, bins: int = 10) -> list[tuple[float, float, float]]:
    """(mean p, mean y, share of rows) of every bin that holds something."""
    p, y = np.asarray(p, np.float64), np.asarray(y, np.float64)
    which = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    rows = [which == b for b in range(bins)]
    return [(p[r].mean(), y[r].mean(), r.mean()) for r in rows if r.any()]


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(x, np.float64)))  # never overflows


def present(logits, seed: int = 0):
    """Pairs in an order drawn at random: (p = P(first is preferred), whether it was), (N,) each, of the logits of
    P(chosen is preferred). With the chosen answer always first, every label would be 1."""
    swap = np.random.default_rng(seed).random(len(logits)) < 0.5
    return _sigmoid(np.where(swap, -logits, logits)), ~swap


def calibration(gaps, temperature: float) -> dict:
    """Expected calibration error, Brier score and negative log-likelihood of P(chosen is better) = sigmoid(gap / T)."""
    logits = np.asarray(gaps, np.float64) / temperature
    p, y = present(logits)
    nll = np.mean(np.logaddexp(0, -logits))
    return {"ece": expected_calibration_error(p, y), "brier": float(np.mean((p - y) ** 2)), "nll": float(nll)}


def correlation(a, b) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0


# ---------------------------------------------------------------------------------------------------- report


def report(members: list, batches: gpt.Batches, tokenizer, config: Config, teachers=(), own=None) -> dict:
    """What held-out pairs say about the reward model (of an ensemble: about the mean of its members). `own` is what
    `heldout_logprobs` gives."""
    scores, taught, lengths, texts = score_pairs(members, teachers, batches, tokenizer)
    gaps, longer_by = scores[:, 0] - scores[:, 1], lengths[:, 0] - lengths[:, 1]  # of chosen over rejected
    n, correct, unequal = len(gaps), int((gaps > 0).sum()), longer_by != 0
    order = np.random.default_rng(1).permutation(n)  # the temperature is fitted on one half and tested on the other
    temperature, rest = fit_temperature(gaps[order[: max(n // 2, 1)]]), gaps[order[n // 2 :]]
    result = {
        "pairs": n,
        "accuracy": correct / n,
        "accuracy_interval": gpt.share_interval(gaps > 0, gpt.same_prompt(prompt for prompt, _ in texts[::2])),
        "longer_wins": float(np.mean(longer_by[unequal] > 0)) if unequal.any() else 0.5,
        "longer_wins_pairs": int(unequal.sum()),
        "accuracy_by_length_difference": accuracy_by_length(gaps, longer_by),
        "beside_length": compare_with_length(gaps, longer_by),
        "gap": float(gaps.mean()),
        "temperature": temperature,
        "before": calibration(rest, 1.0),
        "after": calibration(rest, temperature),
        "reliability": {k: reliability(*present(rest / T)) for k, T in (("before", 1.0), ("after", temperature))},
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "correlation_with_length": correlation(scores.ravel(), lengths.ravel()),
    }
    if choices := best_of(gaps, texts[::2]):
        result["best_of"] = choices
    if teachers:
        result["teacher"] = compare_with_teacher(scores, taught)
    if own:
        result["beside_likelihood"] = compare_with_likelihood(gaps, *own, longer_by)
    if config.gold and jax.process_index() == 0:  # the process that writes the report
        result["gold"] = compare_with_gold(scores, texts, gpt.load_function(config.gold))
    return result


def score_pairs(members, teachers, batches: gpt.Batches, tokenizer):
    """Of all N pairs, chosen first: the members' mean scores (N, 2), the teachers' (N, 2) or None, the answers' tokens
    (N, 2), and 2 N texts (prompt, response)."""
    score = jax.jit(pair_scores)
    mean_score = lambda models, batch: np.mean([gpt.to_numpy(score(model, batch)) for model in models], 0)
    scores, taught, lengths, texts = [], [], [], []
    # the last batch is filled up with rows seen before: the first `real_rows` are new
    for batch, real_rows in shown(batches, "scores of held-out pairs"):
        on_device = gpt.put_batch({name: batch[name] for name in ("tokens", "segments", "mask")})
        scores.append(mean_score(members, on_device)[:real_rows])
        if teachers:
            taught.append(mean_score(teachers, on_device)[:real_rows])
        whole, answer = (x[:real_rows] for x in gpt.fork_sides(batch["segments"], batch["mask"], 2))
        lengths.append(answer.sum(-1))
        for tokens, *sides in zip(batch["tokens"], whole, answer):
            texts += [split_text(tokens, *side, tokenizer, members[0].suffix) for side in zip(*sides)]
    join = lambda parts: np.concatenate(parts) if parts else None
    return join(scores), join(taught), join(lengths), texts


def shown(batches: gpt.Batches, what: str):
    """`batches.once()` with a progress bar."""
    return gpt.progress(
        -(-sum(batches.sizes) // batches.batch_size), iterable=batches.once(), desc=what, unit="batches"
    )


def split_text(tokens, whole, answer, tokenizer, suffix) -> tuple[str, str]:
    """(prompt, response) of one side of a row (`gpt.fork_sides`) as text, without suffix and special tokens."""
    prompt, response = tokens[whole & ~answer], tokens[answer]
    response = response[: len(response) - len(suffix)]
    return tokenizer.decode(prompt), tokenizer.decode(response)


def accuracy_by_length(gaps, longer_by, edges=(-np.inf, -8, -3, 0, 1, 4, 9, np.inf)) -> list[dict]:
    """Accuracy of the pairs whose chosen answer is longer by lo..hi-1 tokens (negative: shorter), of each [lo, hi)."""
    rows = []
    for low, high in zip(edges, edges[1:]):
        here = (longer_by >= low) & (longer_by < high)
        if here.any():
            name = f"{'' if low == -np.inf else low}..{'' if high == np.inf else high - 1}"
            rows.append(
                {"chosen_longer_by": name, "pairs": int(here.sum()), "accuracy": float((gaps[here] > 0).mean())}
            )
    return rows


def compare_with_length(gaps, longer_by) -> dict | None:
    """Scores against the rule "the longer answer is the better one", on pairs of unlike lengths; None without such.

    p: two-sided, of McNemar's exact test: that a fair coin decided the pairs in which only one of the two is right.
    balanced: the mean of two accuracies, where the chosen answer is the longer one and where it is the shorter one. A
    score that reads length alone has 0.5 there.
    """
    unequal, right = longer_by != 0, gaps > 0
    longer, shorter = longer_by > 0, longer_by < 0
    if not (longer.any() and shorter.any()):
        return None
    model, rule, p = mcnemar(right[unequal], longer[unequal])
    return {
        "accuracy": float(right[unequal].mean()),
        "longer_wins": float(longer[unequal].mean()),
        "only_model_right": model,
        "only_longer_right": rule,
        "p": p,
        "balanced": balanced_accuracy(right, longer_by),
    }


def mcnemar(right, other) -> tuple[int, int, float]:
    """In how many pairs only the first is right, only the other one, and how likely a fair coin decides these pairs so
    unevenly or more: McNemar's exact test, two-sided. Both (N,), whether a rule is right."""
    first, second = int((right & ~other).sum()), int((~right & other).sum())
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def balanced_accuracy(right, longer_by) -> float:
    """The mean of two accuracies: of pairs whose chosen answer is the longer one, and whose chosen one is shorter."""
    return float((right[longer_by > 0].mean() + right[longer_by < 0].mean()) / 2)


def heldout_logprobs(policy: str, config: Config, heldout: str, tokenizer):
    """What the model in the folder `policy` itself says of held-out pairs, in the order of the scores: log p of both
    answers and the numbers of their tokens, end included, (N, 2) each."""
    gpt.check_tokenizer_of(policy, tokenizer, config.report)
    policy, logprobs = gpt.load_frozen(policy, config.dtype), jax.jit(gpt.completion_logprobs)
    batches, found = gpt.Batches(heldout, "pairs", tokenizer, 64, config.length, 0, forked=True), []
    gpt.check_context(policy, batches)
    for batch, real_rows in shown(batches, "log p of held-out pairs"):
        batch = {name: batch[name] for name in ("tokens", "segments", "mask", "answers")}
        found.append([x[:real_rows] for x in gpt.to_numpy(logprobs(policy, gpt.put_batch(batch)))])
    return [np.concatenate(parts) for parts in zip(*found)]


def compare_with_likelihood(gaps, logprobs, tokens, longer_by) -> dict:
    """Scores against two rules that ask the model itself and no label: the answer with the higher log p is the better
    one, or the one with the higher log p a token. logprobs, tokens (N, 2), chosen first; see `compare_with_length`."""
    rules = {"sum": logprobs, "mean": logprobs / tokens}
    found, both = {}, (longer_by > 0).any() and (longer_by < 0).any()
    for name, said in rules.items():
        right = said[:, 0] > said[:, 1]
        model, rule, p = mcnemar(gaps > 0, right)
        found[name] = {"accuracy": float(right.mean()), "only_model_right": model, "only_rule_right": rule, "p": p}
        found[name]["balanced"] = balanced_accuracy(right, longer_by) if both else None
    return found


def best_of(gaps, chosen) -> dict | None:
    """A stricter measure than pairs (RewardBench 2, arXiv:2506.01937): an answer must beat several. Pairs of one prompt
    and one chosen answer, `chosen` (N,) of both as text, are one choice; it is right where each of its gaps (N,) is
    above 0. None where fewer than half of the pairs belong to such a choice: then the data are plain pairs."""
    groups = defaultdict(list)
    for name, gap in zip(chosen, gaps):
        groups[name].append(gap)
    groups = {name: group for name, group in groups.items() if len(group) > 1}
    if 2 * sum(map(len, groups.values())) < len(gaps):
        return None
    right = [min(group) > 0 for group in groups.values()]
    return {
        "choices": len(groups),
        "accuracy": float(np.mean(right)),
        "accuracy_interval": gpt.share_interval(right, gpt.same_prompt(prompt for prompt, _ in groups)),
        "chance": float(np.mean([1 / (1 + len(group)) for group in groups.values()])),
    }


def compare_with_teacher(scores, taught) -> dict:
    """The student's and the teacher's scores, (N, 2) each."""
    taught_right, right = taught[:, 0] > taught[:, 1], scores[:, 0] > scores[:, 1]
    return {
        "accuracy": float(np.mean(taught_right)),  # the teacher's
        "agreement": float(np.mean(taught_right == right)),
        "correlation": correlation(scores.ravel(), taught.ravel()),
    }


def compare_with_gold(scores, texts, function) -> dict:
    """Scores (N, 2) and labels against the truth: `function` gives the gold of 2 N texts, a number or a dict with one.
    Pairs with a text of which it says nothing are left out and counted, "unjudged"."""
    prompts, responses = zip(*texts)
    said = gpt.read_gold(function(prompts, responses, [{}] * len(prompts)))
    gold = np.array([x["gold"] for x in said]).reshape(-1, 2)
    told = np.isfinite(gold).all(1)
    if not told.any():
        raise ValueError("--gold gave no number for any pair: what does it return?")
    scores, gold = scores[told], gold[told]
    gaps, gold_gaps = scores[:, 0] - scores[:, 1], gold[:, 0] - gold[:, 1]
    decided = np.abs(gold_gaps) > 0.2
    found = {
        "correlation": correlation(scores.ravel(), gold.ravel()),
        "clear_pairs": int(decided.sum()),
        "labels_agree_with_gold": float(np.mean((gold_gaps > 0) + 0.5 * (gold_gaps == 0))),
    }
    if decided.any():
        found["agreement_on_clear_pairs"] = float(np.mean(((gaps > 0) == (gold_gaps > 0))[decided]))
    return found | ({} if told.all() else {"unjudged": int((~told).sum())})


def print_report(result: dict):
    low, high = result["accuracy_interval"]
    print(f"held-out accuracy {result['accuracy']:.3f} [{low:.3f}, {high:.3f}] on {result['pairs']:,} pairs", end="; ")
    print(f"the longer side wins in {result['longer_wins']:.3f}")
    if beside := result["beside_length"]:
        print(
            f"  beside that rule: {beside['accuracy']:.3f} (p {beside['p']:.2g}), and {beside['balanced']:.3f} on "
            "average over pairs whose longer and whose shorter side is chosen"
        )
    for name, rule in result.get("beside_likelihood", {}).items():
        print(
            f"  beside the frozen model's own log p of the answers, {name}: {rule['accuracy']:.3f} (p {rule['p']:.2g})"
        )
    if choices := result.get("best_of"):
        share = "{:.3f} [{:.3f}, {:.3f}]".format(choices["accuracy"], *choices["accuracy_interval"])
        print(
            f"  it beats all others of its choice in {share} of {choices['choices']:,}; chance {choices['chance']:.3f}"
        )
    for name in ("before", "after"):
        print(
            f"  {name} T = {result['temperature']:.2f}: " + "  ".join(f"{k} {v:.3f}" for k, v in result[name].items())
        )
    if result["temperature"] >= MAX_TEMPERATURE or result["accuracy"] <= 0.5:
        print("  NO BETTER THAN A COIN on held-out pairs: there is nothing in these scores for a policy to learn")
    elif low <= 0.5:
        print("  NOT TOLD FROM A COIN by so few held-out pairs: hold out more before a policy learns from these scores")
    for name in [name for name in ("teacher", "gold") if name in result]:
        print(f"  {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in result[name].items()))


# ---------------------------------------------------------------------------------------------------- main


def load_teachers(config: Config, tokenizer) -> list[gpt.ScoreModel]:
    """The frozen teachers: none, one, or the members of an ensemble, whose mean counts."""
    folders = gpt.ensemble_folders(config.teacher) if config.teacher else []
    teachers = [gpt.load_reward_model(folder, tokenizer, config.init, config.dtype) for folder in folders]
    for teacher in teachers:
        if teacher.suffix != suffix_ids(config, tokenizer):
            suffix = tokenizer.decode(teacher.suffix)
            raise ValueError(
                f"--teacher {config.teacher} reads its score after {suffix!r}: give --suffix the same text"
            )
    return teachers


def train_member(member: int, out: Path, config: Config, optimizer, steps: int, teachers: list):
    """One reward model from pairs, trained, normalised, written to `out`."""
    key = jax.random.fold_in(jax.random.key(config.seed), member)
    body, tokenizer = gpt.load_policy(config.init)
    batches = load_pairs(config, tokenizer, member)
    for reader in (body, *(teacher.body for teacher in teachers)):
        gpt.check_context(reader, batches)
    model = gpt.init_score_model(body, key, config.pool, suffix_ids(config, tokenizer))
    body, base = gpt.trainable(body, config.lora_rank, config.dtype, jax.random.fold_in(key, 2))
    model = gpt.shard(replace(model, body=body))
    state = State(model, gpt.shard(optimizer.init(model)))

    run = gpt.Run(batches.hashes, dict(member=member), **vars(config) | dict(steps=steps, out=out))
    state, first = run.restore(state)
    stream = batches.stream(first, steps)
    for step in run.steps(first):
        batch = next(stream)
        del batch["answers"]  # scores are read by segment, and a program for each of its widths would be compiled
        state, metrics = train_step(state, base, teachers, gpt.put_batch(batch), optimizer, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    model = state.model
    if config.normalize_with:
        model = normalize(model, tokenizer, config, jax.random.fold_in(key, 1), base)
    run.finish(model, tokenizer, config.init)
    return gpt.attach(model, base)


def load_pairs(config: Config, tokenizer, member: int = 0) -> gpt.Batches:
    """Batches of pairs; each member of an ensemble has its own order."""
    return gpt.Batches(
        config.data, "pairs", tokenizer, config.batch_size, config.length, config.seed + 1000 * member,
        suffix=suffix_ids(config, tokenizer), skip_bad=config.skip_bad_rows, forked=True,
    )  # fmt: skip


def suffix_ids(config: Config, tokenizer) -> tuple:
    return tuple(tokenizer.encode(config.suffix, after="\n")) if config.suffix else ()


def empty_out(config: Config):
    """Refuse a folder in use, or with --overwrite empty it of a single model and of members alike: readers of the
    folder prefer the members that they find, so those of an earlier ensemble must not outlive it."""
    gpt.empty_out(config.out, config.resume, config.overwrite, vars(config), "member-*", "report.*", "reward.png")


def check_inputs(config: Config, tokenizer):
    """What is needed after training is there before it."""
    heldout = config.heldout or gpt.heldout_file(config.data)
    if config.normalize_with:
        gpt.check_tokenizer_of(config.normalize_with, tokenizer, config.init)
        load_prompts(config, tokenizer)
    if heldout:
        gpt.open_text(heldout).close()
    if heldout and config.gold:
        gpt.load_function(config.gold)


def resolve(config: Config) -> Config:
    """The settings that follow others: whose samples scores are normalised on, and which prompts these answer. The
    toy's pretrained model continues texts, and cannot answer: there it is the SFT model."""
    if config.normalize_with == "auto":
        config = replace(config, normalize_with="out/sft" if config.init == Config.init else config.init)
    first = Path(gpt.parse_sources(config.data)[0][0])
    return replace(config, normalize_data=config.normalize_data or str(first.with_name("prompts.jsonl")))


def load_members(config: Config) -> tuple[list[gpt.ScoreModel], gpt.Tokenizer]:
    """The reward model of --report, or the members of an ensemble, and their tokenizer."""
    folders = gpt.ensemble_folders(config.report)
    tokenizer = gpt.need_tokenizer(folders[0])
    return [gpt.load_reward_model(folder, tokenizer, folders[0], config.dtype) for folder in folders], tokenizer


def start_of(folder) -> str | None:
    """The model that a reward model was made from, as its run wrote down; None where it is not here any more."""
    about = json.loads((Path(folder) / "config.json").read_text()).get("run", {"config": {}})
    start = about["config"].get("init")
    return start if start and Path(start).is_dir() else None


def write_report(members, tokenizer, out: Path, config: Config, teachers=()):
    """The report on held-out pairs, printed, and as report.json in the folder `out`."""
    heldout = config.heldout or gpt.heldout_file(config.data)
    if heldout is None:
        print("no held-out pairs (--heldout): no report")
        return
    pairs = gpt.Batches(heldout, "pairs", tokenizer, 64, config.length, 0, suffix=members[0].suffix, forked=True)
    for model in (*members, *teachers):
        gpt.check_context(model.body, pairs)
    own = None
    if config.report and not members[0].suffix:  # a suffix stands where the answer's end would
        policy = start_of(gpt.ensemble_folders(config.report)[0])
        own = heldout_logprobs(policy, config, heldout, tokenizer) if policy else None
        if own is None:
            print("the model that it was made from is not here: no comparison with that model's own log p")
    result = report(members, pairs, tokenizer, config, teachers, own)
    if jax.process_index() == 0:
        gpt.write_json(out / "report.json", result)
        print_report(result)
        print(f"wrote {out}/report.json; picture: python tools/plot.py reward {out}")


def main(config: Config):
    gpt.start(config.seed)
    if config.report:
        return write_report(*load_members(config), Path(config.report), config)
    gpt.check_batch_size(config.batch_size)
    config = resolve(config)
    tokenizer = gpt.load_policy(config.init)[1]
    teachers = load_teachers(config, tokenizer)
    check_inputs(config, tokenizer)
    pairs = load_pairs(config, tokenizer)
    steps = pairs.plan(config.steps, config.micro_batches)
    config = replace(config, batch_size=pairs.batch_size)
    empty_out(config)
    optimizer = make_optimizer(config, steps)
    outs = [config.out / f"member-{i}" for i in range(config.members)] if config.members > 1 else [config.out]
    members = [train_member(i, out, config, optimizer, steps, teachers) for i, out in enumerate(outs)]
    write_report(members, tokenizer, config.out, config, teachers)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
