"""Which model is better, by how much, and what it paid for it: tables and files of numbers.

Every model folder answers the same held-out prompts, sampled and greedily. Gold, what counts as the truth, rates the
answers; KL to the reference says how far the model moved, and intervals say what is noise.

    python evaluate.py                                       # out/sft and out/ppo on data/toy/prompts-heldout.jsonl
    python evaluate.py --models out/a out/b --ref out/a --data mine.jsonl --gold mine:stars --out out/mine
    python evaluate.py --best-of 4 16 64 --reward out/reward # and what no training at all would have given
    python evaluate.py --models --best-of 16 --reward out/reward --data data/toy/prompts.jsonl --samples 4000 \\
        --winners data/toy/winners.jsonl                     # rejection sampling: sft.py --data takes them
    python evaluate.py --models out/sft out/rlaif --harmful data/toy/harmful-heldout.jsonl \\
        --harmless data/toy/harmless-heldout.jsonl           # who helps with harm, who refuses without need
    python evaluate.py --perplexity wiki.jsonl --questions evals/*.jsonl --gold None  # what training cost elsewhere
    python evaluate.py --rewards out/reward out/reward-mean  # reward models beside each other

Writes out/report: summary.json (every number), report.md (tables and samples side by side) and answers/NAME.json (what
each model said). tools/plot.py draws pictures of them. The same command with more models measures only the new ones:
answers/ keeps what an earlier run measured with the same settings, files, weights and functions.
The file reads from top to bottom: answers, statistics, win rates, best of n, text and questions, conduct, reward
models, tables, main.
"""

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import ndtr, stdtrit

import gpt


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("out/sft", "out/ppo")  # model folders, a row each, named by their last part
    ref: str = "out/sft"  # reference of the KL, source of best-of-n, and the start of "distance closed"
    baseline: str | None = None  # model folder that the win rates are against (None: --ref)
    data: str = "data/toy/prompts-heldout.jsonl"  # prompts
    gold: str | None = "toy:parts"  # what counts as the truth: module:function -> floats or dicts, or a reward model
    reward: str | None = None  # rates answers beside gold: reward-model folder (or ensemble), or module:function
    pairwise: str | None = None  # module:function (prompts, a, b, rows) -> P(a is better), asked in both orders
    out: Path = Path("out/report")  # folder of the report
    samples: int = 500  # prompts answered by each model
    batch_size: int = 125  # rows that are computed at a time
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of the sampled answers (greedy ones stand beside them)

    best_of: tuple[int, ...] = ()  # rows for the best of n answers of --ref by --reward, for each of these n
    winners: Path | None = None  # write the best candidate of each prompt there: demonstrations for sft.py --data

    harmful: str | None = None  # prompts that ask for harm, answered by each model beside --harmless ones
    harmless: str | None = None  # prompts that do not
    conduct: str = "toy:conduct"  # module:function that rates those: dicts of harmless, helpful, declined, evaded

    perplexity: tuple[str, ...] = ()  # text or demonstrations: each model's perplexity on these files
    questions: tuple[str, ...] = ()  # multiple choice: {question, choices, answer}, or model-written evaluations
    length: int | None = None  # tokens a row of --perplexity and --questions may have (None: context, max 512)

    rewards: tuple[str, ...] = ()  # reward-model folders: only put their reports into one table
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations
    seed: int = 1  # of the sampled answers


# ---------------------------------------------------------------------------------------------------- answers


class Prompts(NamedTuple):
    """A batch of B prompts, read once and answered by every model."""

    tokens: jax.Array  # (B, T) left-padded
    mask: jax.Array  # (B, T) 1 on real tokens
    texts: list  # what the tokens say
    rows: list  # as they stand in the file
    count: int  # how many count; the rest fills the batch


class Answers(NamedTuple):
    """One answer to each of P prompts."""

    numbers: dict  # name of a measure -> (P,)
    prompts: list
    responses: list
    rows: list  # of the prompts, as they stand in the file
    tokens: list  # ids of the responses without EOS


class Exam(NamedTuple):
    """What every model is asked, and who rates its answers."""

    config: Config
    tokenizer: gpt.Tokenizer
    ref: gpt.GPT
    prompts: list[Prompts]
    gold: Callable  # (Prompts, Generation, responses) -> dicts of named numbers
    reward: Callable | None = None  # (Prompts, Generation, responses) -> scores (B,)
    pairwise: Callable | None = None  # (prompts, a, b, rows) -> P(a is better)
    harmful: list[Prompts] = ()
    harmless: list[Prompts] = ()
    texts: dict = {}  # name -> gpt.Batches, for the perplexity
    questions: dict = {}  # name -> checked rows
    baseline: Answers | None = None  # answers that win rates are against
    candidates: list[Answers] | None = None  # the reference's that are drawn already: `sample_candidates`


@partial(jax.jit, static_argnames=("temperature",))
def sequence_kl(model, ref, prompts, prompt_mask, responses, mask, temperature: float):
    """KL(model || ref) along each response, in nats a response (B,): the exact KL of the next-token distributions,
    summed over the states that the response visits. Its mean over samples of the model is the KL of whole responses
    (chain rule), with far less noise than the sampled log-ratio."""
    tokens, segments = jnp.concatenate([prompts, responses], 1), jnp.concatenate([prompt_mask, mask], 1)
    states = slice(prompts.shape[1] - 1, -1)
    hidden, ref_hidden = model(tokens, segments)[:, states], ref(tokens, segments)[:, states]
    return (gpt.head_kl(model, hidden, ref, ref_hidden, temperature or 1.0) * mask).sum(1)


def answer(exam: Exam, model, temperature: float, stream: int = 0, kl: bool = False) -> Answers:
    """The model's answers and every measure of them. `stream` numbers the sampling noise: models compared row by row
    share one, candidates of a prompt and the two sides of a win rate do not."""
    key = jax.random.key(exam.config.seed)
    key = jax.random.fold_in(key, stream) if stream else key
    batches, bar = [], gpt.progress(iterable=exam.prompts, desc="answers", unit="batches", leave=False)
    for i, prompts in enumerate(bar):
        size = len(prompts.texts)
        out = gpt.generate(
            model, prompts.tokens, prompts.mask, key, exam.config.response_length, ends=exam.tokenizer.end_ids,
            pad=exam.tokenizer.pad_id, temperature=temperature, row_numbers=jnp.arange(size) + i * size,
        )  # fmt: skip
        sequence = prompts.tokens, prompts.mask, out.tokens, out.mask
        distance = sequence_kl(model, exam.ref, *sequence, temperature) if kl else None
        batches.append(measure(exam, prompts, out, distance))
    column = lambda name: [b.numbers.get(name, np.full(len(b.responses), np.nan)) for b in batches]
    numbers = {name: np.concatenate(column(name)) for name in dict.fromkeys(itertools.chain(*(b[0] for b in batches)))}
    return Answers(numbers, *(list(itertools.chain(*lists)) for lists in zip(*(b[1:] for b in batches))))


def measure(exam: Exam, prompts: Prompts, out: gpt.Generation, kl) -> Answers:
    """The answers to one batch, measured and rated."""
    tokens, mask = gpt.to_numpy((out.tokens, out.mask))
    ids = [row[m > 0] for row, m in zip(tokens, mask)]
    responses = [exam.tokenizer.decode(row) for row in ids]
    ended = gpt.to_numpy(gpt.has_ended(out.tokens, out.mask, exam.tokenizer.end_ids))
    bare = [(row[:-1] if end else row).tolist() for row, end in zip(ids, ended)]
    numbers = {
        "length": mask.sum(1),
        "eos": ended,
        "repetition": [repetition(row) for row in bare],
    }
    if kl is not None:
        numbers["kl"] = gpt.to_numpy(kl)
    if exam.reward:
        numbers["reward"] = exam.reward(prompts, out, responses)
    truths = exam.gold(prompts, out, responses)
    numbers |= {name: [truth[name] for truth in truths] for name in truths[0]}
    numbers = {name: np.asarray(values, float)[: prompts.count] for name, values in numbers.items()}
    return Answers(numbers, *(x[: prompts.count] for x in (prompts.texts, responses, prompts.rows, bare)))


def load_gold(name: str | None, tokenizer, config: Config) -> Callable:
    """(Prompts, Generation, responses) -> dicts of named numbers with "gold"; empty ones without --gold. A function is
    called with (prompts, responses, rows) and returns floats or dicts; a reward model's scores are "gold"."""
    if name is None:
        return lambda prompts, out, responses: [{} for _ in responses]
    if ":" in name:
        function = gpt.load_function(name)
        return lambda prompts, out, responses: gpt.read_gold(function(prompts.texts, responses, prompts.rows))
    rate = load_reward(name, tokenizer, config)
    return lambda prompts, out, responses: gpt.read_gold(rate(prompts, out, responses))


def load_reward(name: str | None, tokenizer, config: Config) -> Callable | None:
    """(Prompts, Generation, responses) -> scores (B,) of a reward model (the mean of an ensemble's members) or of a
    module:function, as they are: no rule for answers that did not end, no KL penalty."""
    if name is None:
        return None
    if ":" in name:
        function = gpt.load_function(name)
        return lambda prompts, out, texts: gpt.check_scores(function(prompts.texts, texts, prompts.rows), len(texts))
    folders = gpt.ensemble_folders(name)
    members = [gpt.load_reward_model(folder, tokenizer, config.ref, config.dtype) for folder in folders]

    def rate(prompts, out, texts):
        sequence = prompts.tokens, prompts.mask, out.tokens, out.mask
        return np.mean(gpt.to_numpy([gpt.score(member, *sequence, tokenizer.end_ids) for member in members]), 0)

    return rate


def load_policy(folder: str, tokenizer, config: Config) -> gpt.GPT:
    """A model that the reference is compared with, of the same tokenizer."""
    gpt.check_tokenizer_of(folder, tokenizer, config.ref)
    return gpt.load_frozen(folder, config.dtype)


def read_prompts(path: str, tokenizer, config: Config) -> list[Prompts]:
    """The first --samples prompts of a file, in an order that is the same every time."""
    size, batches = min(config.batch_size, config.samples), []
    file = gpt.Batches(path, "prompts", tokenizer, size, config.prompt_length, config.seed)
    for batch, new in itertools.islice(file.once(), math.ceil(config.samples / size)):
        placed, rows = gpt.put_batch(batch), file.rows(batch)
        texts = gpt.plain_prompts(tokenizer.decode_rows(batch["tokens"], batch["mask"]), rows)
        count = min(new, config.samples - size * len(batches))
        batches.append(Prompts(placed["tokens"], placed["mask"], texts, rows, count))
    return batches


def to_rows(answers: Answers) -> list[dict]:
    """Answers as JSON, an object a prompt; `from_rows` reads them, but for the tokens."""
    number = lambda x: float(x) if np.isfinite(x) else None  # no verdict
    numbers = [dict(zip(answers.numbers, map(number, values))) for values in zip(*answers.numbers.values())]
    columns = zip(answers.prompts, answers.responses, numbers, answers.rows)
    return [dict(zip(("prompt", "response", "numbers", "row"), values)) for values in columns]


def from_rows(rows: list[dict]) -> Answers:
    numbers = {name: np.array([row["numbers"][name] for row in rows], float) for name in rows[0]["numbers"]}
    return Answers(numbers, *([row[name] for row in rows] for name in ("prompt", "response", "row")), tokens=[])


# ---------------------------------------------------------------------------------------------------- statistics


def chance_of_rate(values, clusters) -> float:
    """One-sided p-value: how likely a mean of values (N,) in [0, 1] this high or higher is where the true one is 1/2.

    The z at which the lower end of `gpt.share_interval` reaches 1/2, d = p - 1/2: z^2 = 2 n (sqrt(s^4 + d^2) - s^2).
    """
    n, d, variance = gpt.effective_size(values, clusters), values.mean() - 0.5, values.var()
    z = math.sqrt(max(0.0, 2 * n * (math.hypot(variance, d) - variance)))
    return float(ndtr(-math.copysign(z, d)))


def bootstrap_interval(values, clusters=None, weights=None, seed: int = 0, draws: int = 2000) -> list[float]:
    """95% interval of the mean of values (N,), or of sum(values) / sum(weights), by resampling; with clusters (N,)
    whole prompts are resampled with all of their answers.

    The percentiles are those of the t distribution, a little further out than 2.5 and 97.5, since G prompts resampled
    vary less than G new ones do ("expanded percentile" of Hesterberg 2015, arXiv:1411.5279). One prompt alone has no
    interval: both ends are the mean.
    """
    clusters = np.arange(len(values)) if clusters is None else clusters
    sums, sizes = np.bincount(clusters, values), np.bincount(clusters, weights)
    rng, n, means = np.random.default_rng(seed), len(sums), []
    at_once = max(1, 2**22 // n)  # resamples held in memory
    for start in range(0, draws, at_once):
        picks = rng.integers(0, n, (min(at_once, draws - start), n))
        means.append(sums[picks].sum(1) / sizes[picks].sum(1))
    tail = ndtr(math.sqrt(n / (n - 1)) * stdtrit(n - 1, 0.025)) if n > 1 else 0.0
    return [float(x) for x in np.quantile(np.concatenate(means), [tail, 1 - tail])]


def mean_interval(values, clusters, share: bool = True) -> tuple[float, list[float]] | None:
    """(mean, 95% interval) of the values (N,) that are numbers: what has no verdict counts for nothing. None where
    nothing has one. Outcomes 0, 1/2 and 1 are a `share`, if they may be; all else is resampled."""
    told = np.isfinite(values)
    values, clusters = values[told], gpt.same_prompt(clusters[told])
    if not told.any():
        return None
    interval = gpt.share_interval if share and np.isin(values, (0, 0.5, 1)).all() else bootstrap_interval
    return float(values.mean()), interval(values, clusters)


def ngrams(tokens, n: int) -> list[tuple]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def distinct(responses, n: int) -> float:
    """Distinct n-grams over all n-grams of all responses (Li et al. 2016, arXiv:1510.03055). It falls with the number
    of responses and their length: compare models on the same prompts, and look at the lengths. No interval: resampled
    responses repeat each other, which is what is measured."""
    grams = [gram for tokens in responses for gram in ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(tokens, n: int = 3) -> float:
    """Share of a response's n-grams that it has already said (seq-rep-n of Welleck et al. 2019, arXiv:1908.04319)."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def unjudged(told: dict, rows: list[dict]) -> dict[str, int]:
    """How many answers lack a measure, where there are any: told[measure] (P,) says which have it. A measure that is
    called like a "kind" of rows concerns these rows alone (checks.strict)."""
    concerned = {name: np.array([row.get("kind") == name for row in rows]) for name in told}
    missing = {name: ~x & (concerned[name] | ~concerned[name].any()) for name, x in told.items()}
    return {name: int(x.sum()) for name, x in missing.items() if x.any()}


def summarize(answers: Answers) -> dict:
    """Means, counts and intervals of the measures; lengths[n]: how many responses have n tokens; and `unjudged`."""
    clusters, found = gpt.same_prompt(answers.prompts), {}
    for name, values in answers.numbers.items():
        found[name] = mean_interval(values, clusters, share=name not in ("kl", "length"))
    told = {name: np.isfinite(values) for name, values in answers.numbers.items()}
    lengths = np.bincount(answers.numbers["length"].astype(int)).tolist()
    variety = {str(n): distinct(answers.tokens, n) for n in (1, 2, 3)}
    row = {name: x[0] for name, x in found.items() if x} | {"distinct": variety, "lengths": lengths}
    row |= {"count": len(answers.responses), "intervals": {name: x[1] for name, x in found.items() if x}}
    return row | {"unjudged": unjudged(told, answers.rows)}


def closed(golds, start, clusters) -> tuple[float, list[float]] | None:
    """(share of the distance from the start to a perfect 1 that a model closed, its 95% interval); None where there is
    no distance.

    golds and start (P,): the model's gold and the start's mean over several draws, for the same prompts. Both sums of
    sum(gold - start) / sum(1 - start) are over prompts, and prompts are resampled.
    """
    told = np.isfinite(golds) & np.isfinite(start)
    gain, distance, clusters = (golds - start)[told], (1 - start)[told], gpt.same_prompt(clusters[told])
    if not told.any() or distance.sum() <= 0:
        return None
    return float(gain.sum() / distance.sum()), bootstrap_interval(gain, clusters, weights=distance)


# ---------------------------------------------------------------------------------------------------- win rates


def wins(ours, theirs):
    """1 where ours is above, 0 where it is below, 1/2 for a tie, NaN where one of the two is no number."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    won = np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)  # equal texts in different batches differ in the last bits
    return np.where(np.isnan(gap), np.nan, won)


def ask_both_orders(judge: Callable, prompts, ours, theirs, rows):
    """(wins (P,), share of pairs where the judge sided with a position instead of an answer). NaN: no verdict in one of
    the orders.

    Judges prefer what stands first, or last: each pair is shown in both orders and the two verdicts are averaged. The
    share is the "same-position rate" of Lee et al. 2023 (arXiv:2309.00267).
    """
    first = wins(check_probabilities(judge(prompts, ours, theirs, rows), len(rows)), 0.5)
    second = wins(check_probabilities(judge(prompts, theirs, ours, rows), len(rows)), 0.5)
    won = (first + 1 - second) / 2
    same_position = (first == second)[np.isfinite(won)] & (first != 0.5)[np.isfinite(won)]
    return won, float(same_position.mean()) if len(same_position) else 0.0


def check_probabilities(said, n: int):
    """What a judge returned, as n numbers in [0, 1], NaN where it says None, NaN or words."""
    p = np.array([gpt.to_number(x) for x in said]) if np.ndim(said) == 1 else np.zeros(0)
    if p.shape != (n,) or ((p < 0) | (p > 1)).any():
        raise ValueError(f"--pairwise must return {n} probabilities that a is better; it returned {said!r:.200}")
    return p


def length_controlled(won, longer, clusters=None, draws: int = 500, seed: int = 0) -> tuple[float, list[float]]:
    """(win rate at equal length, its 95% interval): logistic regression of the win on the difference in length,
    P(win) = sigmoid(a + b tanh(longer / std)), read where the difference is 0. Prompts are resampled, as in
    `bootstrap_interval`.

    Length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475) without its term for how hard each
    instruction is, and with b fitted to this pair of models alone: there is no leaderboard here to share it with.
    Where one side is always the longer one this is an extrapolation, and the interval is wide.
    """
    spread = np.std(longer)
    x = np.tanh(longer / spread) if spread > 0 else np.zeros(len(won))
    clusters = np.arange(len(won)) if clusters is None else clusters
    n = clusters.max() + 1
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)[:, clusters]
    rates = _sigmoid(logistic_intercepts(x, won, np.concatenate([np.ones((1, len(won))), counts])))
    return float(rates[0]), [float(r) for r in np.percentile(rates[1:], [2.5, 97.5])]


def logistic_intercepts(x, y, weights, ridge: float = 0.1, steps: int = 30):
    """a of P(y) = sigmoid(a + b x) fitted by Newton's method, once for each row of weights (R, N). A little ridge keeps
    the fit finite where one side always wins."""
    a = b = np.zeros(len(weights))
    for _ in range(steps):
        p = _sigmoid(a[:, None] + b[:, None] * x)
        wrong, curve = weights * (p - y), weights * p * (1 - p)
        slope_a, slope_b = wrong.sum(1) + ridge * a, wrong @ x + ridge * b
        aa, ab, bb = curve.sum(1) + ridge, curve @ x, curve @ (x * x) + ridge
        det = aa * bb - ab * ab
        a = a - np.clip((bb * slope_a - ab * slope_b) / det, -2, 2)
        b = b - np.clip((aa * slope_b - ab * slope_a) / det, -2, 2)
    return a


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(0.5 * x))  # never overflows


def win_rates(ours: Answers, theirs: Answers, pairwise: Callable | None = None) -> dict:
    """Win rates of one model's answers against another's, by everything that scores them."""
    by = {name: wins(ours.numbers[name], theirs.numbers[name]) for name in ("gold", "reward") if name in ours.numbers}
    bias = {}
    if pairwise:
        by["pairwise"], same = ask_both_orders(pairwise, ours.prompts, ours.responses, theirs.responses, ours.rows)
        bias = {"pairwise": {"same_position": same}}
    longer, clusters = ours.numbers["length"] - theirs.numbers["length"], gpt.same_prompt(ours.prompts)
    return {name: win_rate(won, clusters, longer) | bias.get(name, {}) for name, won in by.items()}


def win_rate(won, clusters, longer=None) -> dict:
    """The rate and its interval; p: see `chance_of_rate`; prompts: how many different ones; unjudged: pairs without a
    verdict, which count for neither side. Without any verdict that is all that there is."""
    told = np.isfinite(won)
    if not told.any():
        return {"unjudged": len(won)}
    won, clusters = won[told], gpt.same_prompt(clusters[told])
    row = {"rate": float(won.mean()), "interval": gpt.share_interval(won, clusters), "p": chance_of_rate(won, clusters)}
    row |= {"prompts": int(clusters.max()) + 1, "unjudged": int((~told).sum())}
    if longer is not None:
        controlled, interval = length_controlled(won, longer[told], clusters)
        row |= {"ties": float(np.mean(won == 0.5)), "length_controlled": controlled}
        row |= {"length_controlled_interval": interval}
    return row


# ---------------------------------------------------------------------------------------------------- best of n


def best_of_n_weights(scores, n: int):
    """Probability of each of N samples (N,) to be the best of n drawn from them without replacement.

    C(i-1, n-1) / C(N, n) for the i-th lowest score; equal scores share theirs. The weighted mean of any measure is the
    unbiased estimate of its expectation under best-of-n from all N samples, with far less noise than one group of n.
    """
    N = len(scores)
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} cannot be estimated from {N} samples: sample more")
    weights = np.empty(N)
    weights[np.argsort(scores)] = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    _, group = np.unique(scores, return_inverse=True)
    return (np.bincount(group, weights) / np.bincount(group))[group]


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: what KL(best of n || model) is at most, and is where no two samples are alike (Beirami et al.
    2024, arXiv:2401.01879). A model that repeats itself stays far below."""
    return math.log(n) - (n - 1) / n


def best_of(exam: Exam, folder: str, *sizes) -> dict:
    """{"rows": a row of the summary for each of the sizes n, "curve": reward and gold over n, "golds": of each row, by
    prompt} of the reference's answers; winners are written on the way."""
    rounds = sample_candidates(exam, max(sizes))
    powers = {2**k for k in range(len(rounds).bit_length())}
    rows, golds = best_of_rows(rounds, exam.baseline, sorted(powers.union(sizes)))
    if exam.config.winners:
        write_winners(rounds, exam)
    names = [f"best-of-{n}" for n in sizes]
    shown, golds = {name: rows[name] for name in names}, {name: golds[name] for name in names if name in golds}
    return {"rows": shown, "curve": best_of_curve(rows), "golds": golds}


def sample_candidates(exam: Exam, n: int) -> list[Answers]:
    """n answers of the reference to every prompt. Best-of-n and the start of "closed" begin with the same ones."""
    drawn = exam.candidates
    for i in gpt.progress(iterable=range(len(drawn), n), desc="candidates", unit=" a prompt"):
        drawn.append(answer(exam, exam.ref, exam.config.temperature, stream=2 + i))
    return drawn[:n]


def best_of_rows(rounds: list[Answers], theirs: Answers, sizes) -> tuple[dict, dict]:
    """A row of the summary for each n, expectations under best-of-n with intervals over prompts, and each row's golds
    (P,)."""
    stacked = {name: np.stack([r.numbers[name] for r in rounds], 1) for name in rounds[0].numbers}  # (P, N)
    won = {k: wins(stacked[k], theirs.numbers[k][:, None]) for k in ("gold", "reward") if k in stacked}
    clusters, rows, golds = gpt.same_prompt(rounds[0].prompts), {}, {}
    for n in sizes:
        weights = np.stack([best_of_n_weights(scores, n) for scores in stacked["reward"]])
        values = {name: weighted_mean(x, weights) for name, x in stacked.items()}
        found = {name: mean_interval(x, clusters, share=name != "length") for name, x in values.items()}
        bound, name = best_of_n_kl(n), f"best-of-{n}"
        rows[name] = {k: x[0] for k, x in found.items() if x} | {"kl": bound, "kl_bound": True, "n": n}
        rows[name] |= {"win": {k: win_rate(weighted_mean(x, weights), clusters) for k, x in won.items()}}
        intervals = {k: x[1] for k, x in found.items() if x} | {"kl": [bound, bound]}
        told = {k: np.isfinite(x).any(1) for k, x in stacked.items()}  # by a candidate at least
        rows[name] |= {"count": len(weights), "intervals": intervals, "unjudged": unjudged(told, rounds[0].rows)}
        golds |= {name: values["gold"].tolist()} if "gold" in values else {}
    return rows, golds


def weighted_mean(values, weights):
    """(P,) of (P, N): the mean over candidates by their weights, of those that have a number; NaN where none has."""
    told = np.isfinite(values)
    total = (weights * told).sum(1)
    mean = (weights * np.where(told, values, 0)).sum(1) / np.where(total > 0, total, 1)
    return np.where(total > 0, mean, np.nan)


def best_of_curve(rows: dict) -> dict:
    """Reward and gold of best-of-n rows over n, beside the bound on the KL."""
    rows = sorted(rows.values(), key=lambda row: row["n"])
    return {name: [row[name] for row in rows] for name in ("n", "kl", "reward", "gold") if name in rows[0]}


def pick_winners(rounds: list[Answers], tokenizer) -> list[dict]:
    """The candidate of each prompt that the reward model likes best, as demonstrations (rejection sampling)."""
    winners = []
    for i, row in enumerate(rounds[0].rows):
        complete = [r for r in rounds if r.numbers["eos"][i] and usable(r.responses[i], r.tokens[i], tokenizer)]
        if complete:
            best = max(complete, key=lambda r: r.numbers["reward"][i])
            reward = float(best.numbers["reward"][i])
            winners.append({"prompt": row["prompt"], "completion": best.responses[i], "reward": reward})
    return winners


def usable(text: str, ids: list[int], tokenizer) -> bool:
    """Does the text say what was sampled and scored? Not with a special token inside, which texts leave out, nor with a
    character cut in two (U+FFFD), nor where it is empty."""
    return bool(text.strip()) and "\ufffd" not in text and not tokenizer.special_ids & set(ids)


def write_winners(rounds: list[Answers], exam: Exam):
    rows, path = pick_winners(rounds, exam.tokenizer), exam.config.winners
    path.parent.mkdir(parents=True, exist_ok=True)
    gpt.write_rows(path, rows)
    missing = len(rounds[0].rows) - len(rows)
    print(f"wrote {path}: {len(rows)} winners" + f"; {missing} prompts had no usable answer" * (missing > 0))


# ---------------------------------------------------------------------------------------------------- text, questions


@jax.jit
def row_logprobs(model, tokens, segments, mask):
    """(sum of the scored tokens' log-probs, their number) of each row, (B,) each."""
    scored = mask[:, 1:] > 0
    return jnp.where(scored, gpt.token_logprobs(model, tokens, segments), 0).sum(1), scored.sum(1)


def row_length(model, config: Config) -> int:
    return config.length or min(model.config.context, 512)


def perplexity(model, batches: gpt.Batches) -> dict:
    """Held-out loss in nats a token, as sft.py computes it, and its exponential with an interval over rows."""
    logprobs, counts = [], []
    for batch, new in batches.once():
        batch = gpt.put_batch(batch)
        totals, scored = gpt.to_numpy(row_logprobs(model, batch["tokens"], batch["segments"], batch["mask"]))
        logprobs, counts = [*logprobs, totals[:new]], [*counts, scored[:new]]
    losses, counts = -np.concatenate(logprobs).astype(np.float64), np.concatenate(counts)
    interval = np.exp(bootstrap_interval(losses, weights=counts)).tolist()
    loss = float(losses.sum() / counts.sum())
    return {"loss": loss, "perplexity": math.exp(loss), "interval": interval, "tokens": int(counts.sum())}


BEHAVIOUR = ("answer_matching_behavior", "answer_not_matching_behavior")


def read_questions(path: str) -> list[dict]:
    """Checked rows {"messages", "choices", "answer", "line"} of a JSONL file."""
    questions = []
    for number, line in gpt.numbered_lines(path):
        try:
            questions.append(check_question(gpt.parse_json(line)) | {"line": f"{path}:{number}"})
        except gpt.BadRow as error:
            raise gpt.BadRow(f"{path}:{number}: {error}") from None
    if not questions:
        raise ValueError(f"{path} holds no question")
    return questions


def check_question(row: dict) -> dict:
    """{question, choices, answer}, or the model-written evaluations of Perez et al. 2022 (arXiv:2212.09251), where the
    "right" answer is the one that shows the behaviour asked about."""
    if BEHAVIOUR[0] in row:
        row = row | {"choices": [row.get(name) for name in BEHAVIOUR], "answer": 0}
    question, choices, right = (row.get(name) for name in ("question", "choices", "answer"))
    if not question or not isinstance(question, str | list):
        raise gpt.BadRow(f"no `question` (found: {', '.join(row) or 'nothing'})")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise gpt.BadRow(f"needs `choices`, a list of two texts or more, or `{BEHAVIOUR[0]}` and `{BEHAVIOUR[1]}`")
    if type(right) is not int or not 0 <= right < len(choices):
        raise gpt.BadRow(f"`answer` is {right!r}, not the number of a choice (0 to {len(choices) - 1})")
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return {"messages": messages, "choices": choices, "answer": right}


def multiple_choice(exam: Exam, model, name: str) -> dict:
    """Share of questions whose right answer has the highest log-prob after the question; `normalised`: log-prob a byte
    of the answer, so that long answers are not the less likely ones (as lm-evaluation-harness does)."""
    questions, length = exam.questions[name], row_length(exam.ref, exam.config)
    logprobs = choice_logprobs(exam, model, questions, length)
    left_out = sum(logps is None for logps in logprobs)
    if left_out:
        print(f"{name}: {left_out} questions left out: more than {length} tokens", file=sys.stderr)
    kept = [(q, logps) for q, logps in zip(questions, logprobs) if logps is not None]
    if not kept:
        raise ValueError(f"{name}: no question fits {length} tokens: raise --length")
    sizes = [np.array([len(choice.strip().encode()) for choice in q["choices"]]) for q, _ in kept]
    plain = np.array([chosen(logps, q["answer"]) for q, logps in kept])
    normalised = np.array([chosen(logps / size, q["answer"]) for (q, logps), size in zip(kept, sizes)])
    clusters = gpt.same_prompt([q["messages"] for q, _ in kept])
    return {
        "accuracy": float(plain.mean()),
        "interval": gpt.share_interval(plain, clusters),
        "normalised": float(normalised.mean()),
        "normalised_interval": gpt.share_interval(normalised, clusters),
        "chance": float(np.mean([1 / len(size) for size in sizes])),
        "questions": len(kept),
        "left_out": left_out,
    }


def choice_logprobs(exam: Exam, model, questions: list[dict], length: int) -> list:
    """log p(choice | question) of each question's choices; None for a question that does not fit `length` tokens."""
    sequences, places = [], []
    for q in questions:
        try:
            prompt = gpt.encode_prompt(q["messages"], exam.tokenizer)
            # without EOS: whether a model stops after its answer is not the question
            ids = [gpt.encode_opening(q["messages"], c.strip(), exam.tokenizer) for c in q["choices"]]
        except gpt.BadRow as error:  # the chat template's
            raise gpt.BadRow(f"{q['line']}: {error}") from None
        if len(prompt) + max(map(len, ids)) > length:
            places.append(None)
            continue
        places.append(slice(len(sequences), len(sequences) + len(ids)))
        sequences += [(prompt + i, [0] * len(prompt) + [1] * len(i)) for i in ids]
    logprobs = sequence_logprobs(exam, model, sequences, length)
    return [None if place is None else logprobs[place] for place in places]


def chosen(scores, right: int) -> float:
    """1 if `right` scores highest; answers that the tokenizer cannot tell apart share it."""
    best = scores >= scores.max() - 1e-6
    return float(best[right] / best.sum())


def sequence_logprobs(exam: Exam, model, sequences, length: int) -> np.ndarray:
    """Log-prob of the scored tokens of each (ids, mask), in batches of similar length."""
    size, result = exam.config.batch_size, np.zeros(len(sequences))
    order = np.argsort([len(ids) for ids, _ in sequences], kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        width = gpt.bucket(len(sequences[rows[-1]][0]), length)
        tokens, mask, segments = (np.zeros((size, width), np.int32) for _ in range(3))
        for i, row in enumerate(rows):
            ids, scored = sequences[row]
            tokens[i, : len(ids)], mask[i, : len(ids)], segments[i, : len(ids)] = ids, scored, 1
        batch = gpt.put_batch(dict(tokens=tokens, segments=segments, mask=mask))
        logprobs, _ = gpt.to_numpy(row_logprobs(model, batch["tokens"], batch["segments"], batch["mask"]))
        result[rows] = logprobs[: len(rows)]
    return result


# ---------------------------------------------------------------------------------------------------- conduct


def conduct(exam: Exam, model) -> dict:
    """How a model deals with requests for harm, and what that costs those who ask for none: each a share of answers,
    with its interval.

    `complied`, `declined`, `evaded` of --harmful prompts; `helpful`, `over-refused`, `evasive` of --harmless ones.
    Declining and evading are different things: the constitutional models of Bai et al. 2022 (section 4.4) are to say no
    and why, and not to dodge.
    """
    exam = exam._replace(gold=load_gold(exam.config.conduct, exam.tokenizer, exam.config), reward=None)
    asked = (exam.harmful, exam.harmless)
    bad, good = (answer(exam._replace(prompts=p), model, exam.config.temperature) for p in asked)
    harm, no_harm = bad.numbers, good.numbers
    missing = {"harmless", "helpful", "declined", "evaded"} - (harm.keys() & no_harm.keys())
    if missing:
        raise ValueError(f"--conduct {exam.config.conduct} says nothing of {', '.join(sorted(missing))}")
    shares = {"complied": 1 - harm["harmless"], "declined": harm["declined"], "evaded": harm["evaded"]}
    found = {name: mean_interval(x, gpt.same_prompt(bad.prompts)) for name, x in shares.items()}
    others = {"helpful": no_harm["helpful"], "over-refused": no_harm["declined"], "evasive": no_harm["evaded"]}
    found |= {name: mean_interval(x, gpt.same_prompt(good.prompts)) for name, x in others.items()}
    if silent := [name for name, x in found.items() if not x]:
        raise ValueError(f"--conduct {exam.config.conduct} gives no number for {', '.join(silent)}")
    unjudged = {name: int((~np.isfinite(x)).sum()) for name, x in (shares | others).items()}
    row = {name: x[0] for name, x in found.items()} | {"intervals": {name: x[1] for name, x in found.items()}}
    return row | {"unjudged": {name: n for name, n in unjudged.items() if n}}


# ---------------------------------------------------------------------------------------------------- reward models


def compare_rewards(config: Config):
    """--rewards: one table of reward models, and nothing else."""
    reports = reward_reports(config)
    text = rewards_table(reports)
    config.out.mkdir(parents=True, exist_ok=True)
    gpt.write_json(config.out / "rewards.json", reports)
    write_text(config.out / "rewards.md", text)
    print(f"{text}\nwrote {config.out}: rewards.md, rewards.json")


def reward_reports(config: Config) -> dict:
    """The report that reward.py left in each reward model's folder."""
    reports = {}
    for name, folder in short_names(config.rewards).items():
        path = Path(folder) / "report.json"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: python reward.py --out {folder} writes it, given held-out pairs")
        reports[name] = json.loads(path.read_text())
    return reports


def rewards_table(reports: dict) -> str:
    """Markdown: reward models beside each other. T is the temperature fitted on one half of the pairs; ECE, Brier score
    and NLL are of the other half, before and after it."""
    names = ["reward model", "pairs", "accuracy", "clear pairs", "gold correlation"]
    names += ["ECE", "after T", "Brier", "after T", "NLL", "after T", "T"]
    rows = [names, ["---"] * len(names)]
    for name, r in reports.items():
        gold = r.get("gold", {})
        of_gold = [f"{gold[k]:.3f}" if k in gold else "" for k in ("agreement_on_clear_pairs", "correlation")]
        numbers = [r[side][measure] for measure in ("ece", "brier", "nll") for side in ("before", "after")]
        row = [name, str(r["pairs"]), with_interval(r["accuracy"], r["accuracy_interval"]), *of_gold]
        rows.append([*row, *(f"{x:.3f}" for x in numbers), f"{r['temperature']:.2f}"])
    return markdown(rows)


# ---------------------------------------------------------------------------------------------------- tables


def markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_interval(value: float, interval, digits: int = 3) -> str:
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def percent(value: float, interval=None, digits: int = 1) -> str:
    """ "72.4% [68.2%, 76.1%]", without an interval where there is none."""
    bounds = f" [{interval[0]:.{digits}%}, {interval[1]:.{digits}%}]" if interval else ""
    return f"{value:.{digits}%}{bounds}"


def short_names(folders) -> dict:
    """{name: folder}: the last part of the path, more of it where two would be called the same."""
    folders = list(dict.fromkeys(str(folder).rstrip("/") for folder in folders))
    for depth in range(1, 1 + max((len(Path(f).parts) for f in folders), default=0)):
        names = ["/".join(Path(f).parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders))
    return dict(zip(folders, folders))


APART = {"gold", "kl", "length", "eos", "reward", "repetition", "closed"}  # columns of their own


def table(summary: dict) -> str:
    """Markdown: one row a model."""
    more = [name for name, x in first(summary).items() if name not in APART and isinstance(x, float)]
    scored = any("reward" in s for s in summary.values())
    head = ["model", "gold", "closed", "greedy gold", *more, "KL", "length", "ended", "win", "win, equal length"]
    head += ["distinct-1/2/3", "repeats"] + ["reward"] * scored
    rows = [head, ["---"] * len(head)]
    for model, s in summary.items():
        gold = with_interval(s["gold"], s["intervals"]["gold"]) if "gold" in s else ""
        closed = "" if s.get("closed") is None else percent(s["closed"], s["intervals"].get("closed"), 0)
        row = [model, gold, closed, f"{s['greedy']['gold']:.3f}" if "gold" in s.get("greedy", {}) else ""]
        row += [f"{s[name]:.3f}" if name in s else "" for name in more]
        row += [("<= " if "kl_bound" in s else "") + f"{s['kl']:.2f}", f"{s['length']:.1f}", f"{s['eos']:.1%}"]
        won = s.get("win", {}).get("gold", {})
        row += [f"{won[k]:.1%}" if k in won else "" for k in ("rate", "length_controlled")]
        row.append(" / ".join(f"{x:.2f}" for x in s["distinct"].values()) if "distinct" in s else "")
        row.append(f"{s['repetition']:.1%}")
        rows.append(row + [f"{s['reward']:.2f}" if "reward" in s else ""] * scored)
    return markdown(rows)


def first(summary):
    return next(iter(summary.values()))


def wins_table(summary: dict) -> str:
    """Markdown: win rates by everything that scores answers, one row a model and a score; "" where there is none."""
    rows = [["model", "by", "win rate", "at equal length", "ties", "same position"], ["---"] * 6]
    for name, s in summary.items():
        for name_of_score, won in s.get("win", {}).items():
            if "rate" not in won:
                continue
            equal = "length_controlled" in won
            row = [name, name_of_score, percent(won["rate"], won["interval"])]
            row.append(percent(won["length_controlled"], won["length_controlled_interval"]) if equal else "")
            rows.append(row + [f"{won[k]:.1%}" if k in won else "" for k in ("ties", "same_position")])
    return markdown(rows) if len(rows) > 2 else ""


def conduct_table(summary: dict) -> str:
    """Markdown: requests for harm, then harmless ones."""
    rows = {name: s["conduct"] for name, s in summary.items() if "conduct" in s}
    if not rows:
        return ""
    head = ["model", "harm: complied", "declined", "evaded", "no harm: helpful", "over-refused", "evasive"]
    names = ["complied", "declined", "evaded", "helpful", "over-refused", "evasive"]
    body = [[name, *(with_interval(x[n], x["intervals"][n]) for n in names)] for name, x in rows.items()]
    return markdown([head, ["---"] * len(head), *body])


def tax_table(summary: dict) -> str:
    """Markdown: perplexity on texts and accuracy on questions, one row a model; "" where nothing was asked."""
    models = {name: s for name, s in summary.items() if "perplexity" in s or "questions" in s}
    if not models:
        return ""
    texts, questions = (list(first(models).get(k, {})) for k in ("perplexity", "questions"))
    head = ["model", *(f"perplexity, {t}" for t in texts)]
    head += [h for q in questions for h in (f"accuracy, {q}", "a byte")]
    rows = [head, ["---"] * len(head)]
    for name, s in models.items():
        row = [with_interval(p["perplexity"], p["interval"], 2) for p in s.get("perplexity", {}).values()]
        for q in s.get("questions", {}).values():
            row += [with_interval(q["accuracy"], q["interval"]), f"{q['normalised']:.3f}"]
        rows.append([name, *row])
    return markdown(rows)


def unjudged_table(summary: dict) -> str:
    """Markdown: answers and pairs without a number, which count for nothing and neither side; "" where
    there are none."""
    rows = [["model", "measure", "without a verdict"], ["---"] * 3]
    for name, s in summary.items():
        missing = s.get("unjudged", {}) | {f"win, {k}": won.get("unjudged") for k, won in s.get("win", {}).items()}
        missing |= {f"greedy {k}": n for k, n in s.get("greedy", {}).get("unjudged", {}).items()}
        missing |= s.get("conduct", {}).get("unjudged", {})
        rows += [[name, measure, str(n)] for measure, n in missing.items() if n]
    return markdown(rows) if len(rows) > 2 else ""


def samples_table(answers: dict, count: int = 8) -> str:
    """The same prompts, each model's sampled answer and its gold."""
    clean = lambda text: " ".join(text.split()).replace("|", "\\|")
    rows = [["prompt", *answers], ["---"] * (len(answers) + 1)]
    for said in itertools.islice(zip(*answers.values()), count):
        golds = [x["numbers"].get("gold") for x in said]
        gold = ["" if g is None else f" ({g:+.2f})" for g in golds]
        rows.append([clean(said[0]["prompt"]), *(clean(x["response"]) + g for x, g in zip(said, gold))])
    return markdown(rows)


def write_report(config: Config, summary: dict, answers: dict):
    """summary.json and report.md; the tables are printed too."""
    out, models = config.out, summary["models"]
    shown = {name: answers[name] for name in list(answers)[:8]}  # more columns than that nobody reads
    count, against = first(models)["count"], Path(summary["baseline"]).name
    tables = [
        (f"{count} held-out prompts, temperature {config.temperature:g}", table(models)),
        (f"Win rates against {against}", wins_table(models)),
        ("Asked for harm, and not", conduct_table(models)),
        ("What it cost elsewhere", tax_table(models)),
        ("Without a verdict", unjudged_table(models)),
    ]
    tables = [(title, body) for title, body in tables if body]
    print("\n" + "\n\n".join(f"{title}\n{body}" for title, body in tables))
    samples = [("The same prompts", samples_table(shown))] if shown else []
    sections = [tables[0], ("How to read this", reading(summary["reference"], against)), *tables[1:], *samples]
    gpt.write_json(out / "summary.json", summary)
    write_text(out / "report.md", "\n\n".join(f"## {title}\n\n{body}" for title, body in sections)[1:])
    print(f"\nwrote {out}: summary.json, report.md, answers/; pictures: python tools/plot.py {out}")


def reading(reference: dict, against: str) -> str:
    ref, start = Path(reference["folder"]).name, ""
    if reference["gold"] is not None:
        gold = with_interval(reference["gold"], reference["interval"])
        drawn = f"{ref}'s gold is the mean of {reference['draws']} draws here, {gold}"
        start = f"`closed`: share of the distance from {ref} to 1. {drawn}. "
    return (
        f"{start}KL to {ref} in nats a sequence (best of n: an upper "
        f"bound). `win`: against {against}, by gold, ties a half; `win, equal length`: the same where both answers are "
        "equally long, by a logistic regression. `distinct-n`: distinct n-grams over all n-grams of all responses. "
        "`repeats`: share of 3-grams said before in the same response. Intervals: 95%, by prompt; of shares Wilson's, "
        "of other means by bootstrap. Answers without a verdict count for nothing."
    )


def write_text(path: Path, text: str):
    gpt.write_atomic(path, lambda file: Path(file).write_text(text + "\n"))


# ---------------------------------------------------------------------------------------------------- measured before


UNRELATED = ("models", "best_of", "winners", "rewards", "out")  # settings that no model's row depends on
CODE = [gpt.file_hash(file) for file in (__file__, gpt.__file__)]  # as it was when it was loaded


def remember(exam: Exam, name: str, measure: Callable, *what):
    """measure(exam, *what), or what out/answers/NAME.json says of it, if everything that it depends on is the same."""
    path = exam.config.out / "answers" / f"{name.replace('/', '-')}.json"
    key = fingerprint(exam, measure.__name__, *what)
    unwritten = exam.config.winners if measure is best_of else None  # a file that only measuring writes
    kept = read_kept(path)
    if kept and kept["key"] == key and not unwritten:
        print(f"{name} ({what[0]}): nothing has changed, taken from {path}")
        return kept["value"]
    start, value = time.monotonic(), measure(exam, *what)
    path.parent.mkdir(parents=True, exist_ok=True)
    gpt.write_json(path, {"key": key, "value": value})
    print(f"{name} ({what[0]}): measured in {time.monotonic() - start:.1f} s", flush=True)
    return value


def read_kept(path: Path) -> dict | None:
    """{"key", "value"} of a file in answers/; None where there is none, or where it is damaged, which is said."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text())
        return {"key": kept["key"], "value": kept["value"]}
    except (ValueError, LookupError, TypeError) as error:
        print(f"{path} is damaged ({type(error).__name__}: {error}): measured again", file=sys.stderr)
        return None


def fingerprint(exam: Exam, *what) -> str:
    """A hash of what a measurement depends on: settings, prompts and other files, weights, the code of the functions
    that score, of this file and of gpt.py. What lies behind a function (an endpoint, other modules) it cannot see."""
    config = exam.config
    settings = {name: value for name, value in asdict(config).items() if name not in UNRELATED}
    functions = [config.gold, config.pairwise, config.reward, config.conduct if config.harmful else None]
    functions = [name for name in functions if name and ":" in name]
    modules = [sys.modules[gpt.load_function(name).__module__] for name in functions]
    files = [module.__file__ for module in modules if getattr(module, "__file__", None)]
    files += filter(None, [config.data, config.harmful, config.harmless, *config.perplexity, *config.questions])
    folders = [config.ref, config.baseline or config.ref, *(x for x in what[1:] if isinstance(x, str))]
    scorers = [name for name in (config.gold, config.reward) if name and ":" not in name]
    folders += itertools.chain(*map(gpt.ensemble_folders, scorers))
    hashes = [gpt.file_hash(file) for file in files]
    hashes += [gpt.weights_hash(gpt.find_folder(folder)) for folder in folders]
    everything = [settings, CODE, hashes, what, exam.tokenizer.fingerprint, jax.default_backend()]
    return hashlib.sha256(json.dumps(everything, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------- main


def check(config: Config):
    """What cannot work, in words, before anything is loaded."""
    if config.best_of and not config.reward:
        raise ValueError("--best-of needs --reward, who picks the best: a reward-model folder, or module:function")
    if config.winners and not config.best_of:
        raise ValueError("--winners needs --best-of: of how many answers is the best one to be written?")
    if config.best_of and min(config.best_of) < 1:
        raise ValueError("--best-of takes numbers from 1 up")
    for name, value in (("samples", config.samples), ("response-length", config.response_length)):
        if value < 1:
            raise ValueError(f"--{name} {value}: 1 at least")
    if config.temperature < 0:
        raise ValueError(f"--temperature {config.temperature}: 0 (greedy) or above")
    if bool(config.harmful) != bool(config.harmless):
        raise ValueError("--harmful and --harmless go together: a model that refuses everything does no harm")
    if not (config.models or config.best_of or config.rewards):
        raise ValueError("nothing to evaluate: give --models or --best-of")


def set_exam(config: Config) -> Exam:
    """Everything that is read once: files, reference, what scores."""
    bare = lambda file: file.removesuffix(".gz").removesuffix(".jsonl")
    questions = {bare(name): read_questions(file) for name, file in short_names(config.questions).items()}
    kinds = {file: gpt.find_kind(file, ("text", "demos")) for file in config.perplexity}
    ref, tokenizer = gpt.load_policy(config.ref)
    ref = gpt.shard(gpt.cast(ref, gpt.compute_dtype(config.dtype)))
    gpt.check_batch_size(min(config.batch_size, config.samples))
    read = lambda path: read_prompts(path, tokenizer, config) if path else []
    rows = lambda file, kind: gpt.Batches(file, kind, tokenizer, config.batch_size, row_length(ref, config), 0)
    return Exam(
        config, tokenizer, ref, read(config.data), load_gold(config.gold, tokenizer, config),
        reward=load_reward(config.reward, tokenizer, config),
        pairwise=gpt.load_function(config.pairwise) if config.pairwise else None,
        harmful=read(config.harmful), harmless=read(config.harmless),
        texts={bare(name): rows(file, kinds[file]) for name, file in short_names(config.perplexity).items()},
        questions=questions, candidates=[],
    )  # fmt: skip


def examine(exam: Exam, folder: str) -> dict:
    """All about one model: {"row": its row of the summary, "answers": what it said}."""
    model = load_policy(folder, exam.tokenizer, exam.config)
    sampled = answer(exam, model, exam.config.temperature, kl=True)
    row = summarize(sampled) | {"greedy": summarize(answer(exam, model, 0.0))}
    row |= {"folder": folder, "run": training_run(folder)}
    if exam.texts:
        row["perplexity"] = {name: perplexity(model, batches) for name, batches in exam.texts.items()}
    if exam.questions:
        row["questions"] = {name: multiple_choice(exam, model, name) for name in exam.questions}
    if exam.harmful:
        row["conduct"] = conduct(exam, model)
    if Path(folder) != Path(exam.config.baseline or exam.config.ref):
        row["win"] = win_rates(sampled, exam.baseline, exam.pairwise)
    return {"row": row, "answers": to_rows(sampled)}


def training_run(folder: str) -> dict:
    """{"script", "config"} of the command that trained a model, as far as its folder knows."""
    path = gpt.find_folder(folder) / "config.json"
    run = json.loads(path.read_text()).get("run") or {}
    return {name: run[name] for name in ("script", "config") if name in run}


def answer_as_baseline(exam: Exam, folder: str) -> list[dict]:
    """The baseline's answers, of noise that no model shares: a win rate compares independent answers."""
    model = exam.ref if folder == exam.config.ref else load_policy(folder, exam.tokenizer, exam.config)
    return to_rows(answer(exam, model, exam.config.temperature, stream=1))


START_DRAWS = 8  # answers to each prompt that the start of "closed" is the mean of


def start_golds(exam: Exam, folder: str) -> list:
    """The reference's gold for each prompt, the mean over START_DRAWS samples (those that best-of-n begins with)."""
    draws = sample_candidates(exam, START_DRAWS)
    if "gold" not in draws[0].numbers:
        raise ValueError(f'--gold {exam.config.gold} must return floats, or dicts with a "gold"')
    golds = np.stack([draw.numbers["gold"] for draw in draws], 1)  # (P, draws)
    golds = weighted_mean(golds, np.ones_like(golds))
    return [gold if np.isfinite(gold) else None for gold in golds.tolist()]


def add_closed(rows: dict, golds: dict, start, clusters, ref: str):
    """Into the rows "closed" and its interval, from golds[name] (P,) and the start's (P,). The reference closes 0."""
    for name, row in rows.items():
        found = closed(np.array(golds[name], float), start, clusters) if name in golds else None
        if Path(row.get("folder", "")) == Path(ref):
            row["closed"] = 0.0
        elif found:
            row["closed"], row["intervals"]["closed"] = found


def main(config: Config):
    check(config)
    gpt.start(config.seed)
    if config.rewards:
        return compare_rewards(config)
    exam = set_exam(config)
    baseline = config.baseline or config.ref
    for folder in (*config.models, baseline):
        gpt.find_folder(folder)  # what is missing is named before the others are measured
    exam = exam._replace(baseline=from_rows(remember(exam, "baseline", answer_as_baseline, baseline)))

    rows, answers, golds, curve = {}, {}, {}, None
    for name, folder in short_names(config.models).items():
        found = remember(exam, name, examine, folder)
        rows[name], answers[name] = found["row"], found["answers"]
        golds[name] = [row["numbers"].get("gold") for row in found["answers"]]
    if config.best_of:
        found = remember(exam, "best-of", best_of, config.ref, *config.best_of)
        rows, curve, golds = rows | found["rows"], found["curve"], golds | found["golds"]
    rows = {name: row | {"closed": None} for name, row in rows.items()}
    reference = {"folder": config.ref, "gold": None}
    if config.gold and ":" in config.gold:  # a reward model's scores have no perfect 1
        start = np.array(remember(exam, "reference", start_golds, config.ref), float)
        clusters = gpt.same_prompt(exam.baseline.prompts)
        if not np.isfinite(start).any():
            raise ValueError(
                f"--gold {config.gold} gave no number for any answer of {config.ref}: what does it return?"
            )
        add_closed(rows, golds, start, clusters, config.ref)
        gold, interval = mean_interval(start, clusters, share=False)
        reference |= {"gold": gold, "interval": interval, "draws": START_DRAWS}
    summary = {"reference": reference, "baseline": baseline, "models": rows, "best_of": curve}
    write_report(config, summary, answers)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
