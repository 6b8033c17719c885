"""Which model is better, by how much, and what it paid for it: tables, files and pictures.

Every model folder answers the same held-out prompts, sampled and greedily. A judge (gold on the toy world, or any
module:function) rates the answers, KL to the reference says how far the model moved, intervals say what is noise.

    python evaluate.py                                       # out/sft and out/ppo on data/toy/prompts-heldout.jsonl
    python evaluate.py --models out/a out/b --ref out/a --data mine.jsonl --judge mine:stars --out out/mine
    python evaluate.py --best-of 4 16 64 --reward out/reward # and what no training at all would have given
    python evaluate.py --models --best-of 16 --reward out/reward --data data/toy/prompts.jsonl --samples 4000 \\
        --winners data/toy/winners.jsonl                     # rejection sampling: sft.py --data takes them
    python evaluate.py --models out/new --baseline out/served --gate out/served      # replace it only if it is beaten
    python evaluate.py --frontier "out/beta/*"               # each method over several betas: gold against KL
    python evaluate.py --runs out/ppo-weak out/ppo           # proxy and gold against KL along these PPO runs
    python evaluate.py --models out/sft out/rlaif --harmful data/toy/harmful-heldout.jsonl \\
        --harmless data/toy/harmless-heldout.jsonl           # who helps with harm, who refuses without need
    python evaluate.py --perplexity wiki.jsonl --questions evals/*.jsonl --judge none  # what training cost elsewhere
    python evaluate.py --rewards out/reward out/reward-mean --pairs pairs.jsonl        # reward models beside each other

Writes out/report: summary.json, report.md (tables and samples side by side), and the pictures that were asked for.
The file reads from top to bottom: answers, statistics, win rates, best of n, text and questions, conduct, reward
models, fits, tables, pictures, main.
"""

import glob
import importlib.util
import itertools
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("out/sft", "out/ppo")  # model folders, a row each, named by their last part
    ref: str = "out/sft"  # reference of the KL, source of best-of-n, and the start of "distance closed"
    baseline: str | None = None  # model folder that the win rates are against (default: --ref)
    gate: Path | None = None  # copy the model there that beats --baseline by most, if the whole interval is above 1/2
    data: str = "data/toy/prompts-heldout.jsonl"  # prompts
    judge: str = "toy:parts"  # module:function (prompts, responses, rows) -> floats, or dicts with "gold"; or none
    reward: str | None = None  # rates answers beside the judge: reward-model folder (or ensemble), or module:function
    pairwise: str | None = None  # module:function (prompts, a, b, rows) -> P(a is better), asked in both orders
    out: Path = Path("out/report")  # folder of the report
    samples: int = 500  # prompts answered by each model
    batch_size: int = 125  # rows that are computed at a time
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of the sampled answers (greedy ones stand beside them)

    best_of: tuple[int, ...] = ()  # rows for the best of n answers of --ref by --reward, for each of these n
    candidates: int | None = None  # answers a prompt that best-of-n is estimated from (default: the largest n)
    winners: Path | None = None  # write the best candidate of each prompt there: demonstrations for sft.py --data

    harmful: str | None = None  # prompts that ask for harm, answered by each model beside --harmless ones
    harmless: str | None = None  # prompts that do not
    conduct: str = "toy:conduct"  # module:function that rates those: dicts of harmless, helpful, declined, evaded

    perplexity: tuple[str, ...] = ()  # text or demonstrations: each model's perplexity on these files
    questions: tuple[str, ...] = ()  # multiple choice: {question, choices, answer}, or model-written evaluations
    length: int | None = None  # tokens a row of --perplexity, --questions, --pairs may have (default: context, max 512)

    frontier: tuple[str, ...] = ()  # model folders (or a quoted pattern of them) drawn as gold against KL, by method
    runs: tuple[str, ...] = ()  # PPO run folders whose proxy and gold are drawn against the KL
    curves: tuple[str, ...] = ()  # run folders of any script whose metrics are drawn over the steps
    rewards: tuple[str, ...] = ()  # reward-model folders: only put them into one table
    pairs: str | None = None  # judge --rewards on these pairs (default: the reports that reward.py wrote)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and activations
    seed: int = 1  # of the sampled answers


# ---------------------------------------------------------------------------------------------------- answers


class Exam(NamedTuple):
    """What every model sits: the same prompts, measured alike."""

    config: Config
    tokenizer: gpt.Tokenizer
    ref: gpt.GPT
    prompts: gpt.Batches
    judge: Callable  # (prompts, responses, rows) -> dicts of named parts
    reward: Callable | None  # (batch, generation, prompts, responses, rows) -> scores (B,)


class Answers(NamedTuple):
    """One answer to each of P prompts."""

    numbers: dict  # name of a measure -> (P,)
    prompts: list
    texts: list
    tokens: list  # ids without EOS
    rows: list  # of the prompts, as they were written


@partial(jax.jit, static_argnames=("temperature",))
def sequence_kl(model, ref, prompts, prompt_mask, responses, mask, temperature: float):
    """KL(model || ref) of each response's course, in nats a sequence (B,): the exact KL of the next-token distributions
    summed over the states that the response visits. Its mean over samples of the model is the KL of whole responses
    (chain rule), with far less noise than the sampled log-ratio."""
    tokens, segments = jnp.concatenate([prompts, responses], 1), jnp.concatenate([prompt_mask, mask], 1)
    states = slice(prompts.shape[1] - 1, -1)
    hidden, ref_hidden = model(tokens, segments)[:, states], ref(tokens, segments)[:, states]
    return (gpt.head_kl(model, hidden, ref, ref_hidden, temperature or 1.0) * mask).sum(1)


def answer(exam: Exam, model, temperature: float, stream: int = 0, kl: bool = True) -> Answers:
    """The model's answers and every measure of them. Another `stream` is other noise: models compared row by row share
    one, candidates of a prompt and the two sides of a win rate do not."""
    config, size, parts = exam.config, exam.prompts.batch_size, []
    key = jax.random.fold_in(jax.random.key(config.seed), stream) if stream else jax.random.key(config.seed)
    for i, (batch, new) in enumerate(exam.prompts.once()):
        if i * size >= config.samples:
            break
        placed = gpt.put_batch(batch)
        prompts = placed["tokens"], placed["segments"]
        out = gpt.generate(
            model, *prompts, key, config.response_length, eos=exam.tokenizer.eos_id, pad=exam.tokenizer.pad_id,
            temperature=temperature, rows=jnp.arange(size) + i * size,
        )  # fmt: skip
        distance = sequence_kl(model, exam.ref, *prompts, out.tokens, out.mask, temperature) if kl else None
        parts.append(measure(exam, batch, placed, out, distance, min(new, config.samples - i * size)))
    numbers = {name: np.concatenate([p.numbers[name] for p in parts]) for name in parts[0].numbers}
    return Answers(numbers, *(list(itertools.chain(*lists)) for lists in zip(*(p[1:] for p in parts))))


def measure(exam: Exam, batch, placed, out: gpt.Generation, kl, new: int) -> Answers:
    """The first `new` answers of a batch, measured, rated and judged."""
    tokenizer, (tokens, mask) = exam.tokenizer, gpt.to_numpy((out.tokens, out.mask))
    prompts = tokenizer.decode_rows(batch["tokens"], batch["segments"])
    ids = [row[m > 0] for row, m in zip(tokens, mask)]
    texts, rows = [tokenizer.decode(row) for row in ids], exam.prompts.rows(batch)
    bare = [row[row != tokenizer.eos_id].tolist() for row in ids]
    numbers = {
        "length": mask.sum(1),
        "eos": [tokenizer.eos_id in row for row in ids],
        "repetition": [repetition(row) for row in bare],
    }
    if kl is not None:
        numbers["kl"] = gpt.to_numpy(kl)
    if exam.reward:
        numbers["reward"] = exam.reward(placed, out, prompts, texts, rows)
    judged = exam.judge(prompts, texts, rows)
    numbers |= {name: [parts[name] for parts in judged] for name in judged[0]}
    numbers = {name: np.asarray(values, float)[:new] for name, values in numbers.items()}
    return Answers(numbers, *(x[:new] for x in (prompts, texts, bare, rows)))


def load_judge(name: str) -> Callable:
    """(prompts, responses, rows) -> dicts of named parts, with "gold"; of nothing for "none"."""
    if name == "none":
        return lambda prompts, responses, rows: [{} for _ in responses]
    function = gpt.load_function(name)
    return lambda prompts, responses, rows: gpt.parts_of(function(prompts, responses, rows))


def load_reward(name: str | None, tokenizer, config: Config) -> Callable | None:
    """(batch, generation, prompts, responses, rows) -> scores (B,) of a reward model (the mean of an ensemble's
    members) or of a module:function, as they are: no rule for answers that did not end, no KL penalty."""
    if name is None:
        return None
    if ":" in name:
        function = gpt.load_function(name)
        return lambda batch, out, prompts, texts, rows: gpt.check_scores(function(prompts, texts, rows), len(rows))
    members, theirs = load_members(name, config)
    gpt.check_same_tokenizer(tokenizer, theirs, config.ref, name)

    def score(batch, out, *texts):
        inputs = batch["tokens"], batch["segments"], out.tokens, out.mask, tokenizer.eos_id
        return np.mean(gpt.to_numpy([gpt.score(member, *inputs) for member in members]), 0)

    return score


def load_members(folder: str, config: Config):
    """(the reward model of a folder, or the members of an ensemble, as a list; their tokenizer)."""
    members = []
    for path in gpt.ensemble_folders(folder):
        member, tokenizer = gpt.load(path)
        if not isinstance(member, gpt.ScoreModel):
            raise ValueError(f"{path} is a language model, not a reward model: train one with reward.py")
        members.append(gpt.shard(gpt.cast(member, gpt.compute_dtype(config.dtype))))
    return members, tokenizer


def load_policy(folder: str, tokenizer, config: Config) -> gpt.GPT:
    """A language model that shares the reference's tokenizer."""
    model, theirs = gpt.load_policy(folder)
    gpt.check_same_tokenizer(tokenizer, theirs, config.ref, folder)
    return gpt.shard(gpt.cast(model, gpt.compute_dtype(config.dtype)))


# ---------------------------------------------------------------------------------------------------- statistics


def bootstrap_interval(values, seed: int = 0, draws: int = 2000, weights=None) -> list[float]:
    """95% interval of the mean (with weights: of sum(values) / sum(weights)) by resampling."""
    rng, n, means = np.random.default_rng(seed), len(values), []
    at_once = max(1, 2**22 // n)  # resamples held in memory
    for start in range(0, draws, at_once):
        picks = rng.integers(0, n, (min(at_once, draws - start), n))
        means.append(values[picks].mean(1) if weights is None else values[picks].sum(1) / weights[picks].sum(1))
    return [float(x) for x in np.percentile(np.concatenate(means), [2.5, 97.5])]


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


def summarize(answers: Answers) -> dict:
    """Means, counts and intervals of the measures."""
    means = {name: float(values.mean()) for name, values in answers.numbers.items()}
    intervals = {name: bootstrap_interval(values) for name, values in answers.numbers.items()}
    variety = {str(n): distinct(answers.tokens, n) for n in (1, 2, 3)}
    return means | {"distinct": variety, "count": len(answers.texts), "intervals": intervals}


# ---------------------------------------------------------------------------------------------------- win rates


def wins(ours, theirs):
    """1 where ours is above, 0 where it is below, 1/2 for a tie."""
    gap = np.asarray(ours, float) - np.asarray(theirs, float)
    return np.where(np.abs(gap) < 1e-6, 0.5, gap > 0)  # equal texts in different batches differ in the last bits


def ask_both_orders(judge: Callable, prompts, ours, theirs, rows):
    """(wins (P,), share of pairs where the judge sided with a position instead of an answer).

    Judges prefer what stands first, or last: each pair is shown in both orders and the two verdicts are averaged. The
    share is the "same-position rate" of Lee et al. 2023 (arXiv:2309.00267).
    """
    first = wins(_probabilities(judge(prompts, ours, theirs, rows), len(rows)), 0.5)
    second = wins(_probabilities(judge(prompts, theirs, ours, rows), len(rows)), 0.5)
    same_position = (first == second) & (first != 0.5)
    return (first + 1 - second) / 2, float(same_position.mean())


def _probabilities(p, n: int):
    p = np.asarray(p, float)
    if p.shape != (n,) or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"--pairwise must return {n} probabilities that a is better; it returned {p!r:.200}")
    return p


def length_controlled(won, longer, draws: int = 500, seed: int = 0) -> tuple[float, list[float]]:
    """(win rate at equal length, its 95% interval): logistic regression of the win on the difference in length,
    P(win) = sigmoid(a + b tanh(longer / std)), read where the difference is 0.

    Length-controlled AlpacaEval (Dubois et al. 2024, arXiv:2404.04475) without its term for how hard each
    instruction is, and with b fitted to this pair of models alone: there is no leaderboard here to share it with.
    Where one side is always the longer one this is an extrapolation, and the interval is wide.
    """
    spread = np.std(longer)
    x = np.tanh(longer / spread) if spread > 0 else np.zeros(len(won))
    counts = np.random.default_rng(seed).multinomial(len(won), np.full(len(won), 1 / len(won)), draws)
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
    """Win rates of one model's answers against another's, by every judge that there is."""
    by = {name: wins(ours.numbers[name], theirs.numbers[name]) for name in ("gold", "reward") if name in ours.numbers}
    bias = {}
    if pairwise:
        by["pairwise"], same = ask_both_orders(pairwise, ours.prompts, ours.texts, theirs.texts, ours.rows)
        bias = {"pairwise": {"same_position": same}}
    longer = ours.numbers["length"] - theirs.numbers["length"]
    return {name: win_rate(won, longer) | bias.get(name, {}) for name, won in by.items()}


def win_rate(won, longer) -> dict:
    controlled, interval = length_controlled(won, longer)
    result = {"rate": float(won.mean()), "interval": bootstrap_interval(won), "ties": float(np.mean(won == 0.5))}
    return result | {"length_controlled": controlled, "length_controlled_interval": interval}


# ---------------------------------------------------------------------------------------------------- best of n


def best_of_n_weights(scores, n: int):
    """Probability of each of N samples (N,) to be the best of n drawn from them without replacement.

    C(i-1, n-1) / C(N, n) for the i-th lowest score; equal scores share theirs. The weighted mean of any measure is the
    unbiased estimate of its expectation under best-of-n from all N samples, with far less noise than one group of n.
    """
    N = len(scores)
    if not 1 <= n <= N:
        raise ValueError(f"the best of {n} cannot be estimated from {N} samples: raise --candidates")
    weights = np.empty(N)
    weights[np.argsort(scores)] = [math.comb(i, n - 1) / math.comb(N, n) for i in range(N)]
    _, group = np.unique(scores, return_inverse=True)
    return (np.bincount(group, weights) / np.bincount(group))[group]


def best_of_n_kl(n: int) -> float:
    """log n - (n-1)/n: what KL(best of n || model) is at most, and is where no two samples are alike (Beirami et al.
    2024, arXiv:2401.01879). A model that repeats itself stays far below."""
    return math.log(n) - (n - 1) / n


def best_of_rows(rounds: list[Answers], theirs: Answers, sizes) -> dict:
    """A row of the summary for each n: expectations under best-of-n, intervals over prompts."""
    stacked = {name: np.stack([r.numbers[name] for r in rounds], 1) for name in rounds[0].numbers}  # (P, N)
    won = {k: wins(stacked[k], theirs.numbers[k][:, None]) for k in ("gold", "reward") if k in stacked}
    rows = {}
    for n in sizes:
        weights = np.stack([best_of_n_weights(scores, n) for scores in stacked["reward"]])
        values = {name: (weights * x).sum(1) for name, x in stacked.items()}
        bound = best_of_n_kl(n)
        row = {name: float(x.mean()) for name, x in values.items()} | {"kl": bound, "kl_bound": True, "n": n}
        intervals = {name: bootstrap_interval(x) for name, x in values.items()} | {"kl": [bound, bound]}
        rates = {name: (weights * x).sum(1) for name, x in won.items()}
        row["win"] = {k: {"rate": float(x.mean()), "interval": bootstrap_interval(x)} for k, x in rates.items()}
        rows[f"best-of-{n}"] = row | {"count": len(weights), "intervals": intervals}
    return rows


def best_of_curve(rows: dict) -> dict:
    """Reward and gold of best-of-n rows over n, beside the bound on the KL."""
    rows = sorted(rows.values(), key=lambda row: row["n"])
    return {name: [row[name] for row in rows] for name in ("n", "kl", "reward", "gold") if name in rows[0]}


def pick_winners(rounds: list[Answers], tokenizer) -> list[dict]:
    """The candidate of each prompt that the reward model likes best, as demonstrations (rejection sampling).

    A candidate that did not end, or with a special token inside, of which its text says nothing, or with a character
    cut in two (U+FFFD), would teach something that was never scored: it cannot win.
    """
    winners = []
    for i, row in enumerate(rounds[0].rows):
        usable = [r for r in rounds if r.numbers["eos"][i] and r.texts[i].strip()]
        usable = [r for r in usable if not tokenizer.special_ids & set(r.tokens[i]) and "\ufffd" not in r.texts[i]]
        if usable:
            best = max(usable, key=lambda r: r.numbers["reward"][i])
            winner = {"prompt": row["prompt"], "completion": best.texts[i]}
            winners.append(winner | {"reward": float(best.numbers["reward"][i])})
    return winners


# ---------------------------------------------------------------------------------------------------- text, questions


@jax.jit
def row_logprobs(model, tokens, segments, mask):
    """(sum of the scored tokens' log-probs, their number) of each row, (B,) each."""
    scored = mask[:, 1:] > 0
    return jnp.where(scored, gpt.token_logprobs(model, tokens, segments), 0).sum(1), scored.sum(1)


def row_length(model, config: Config) -> int:
    return config.length or min(model.config.context, 512)


def perplexity(exam: Exam, model, path: str) -> dict:
    """Held-out loss in nats a token, as sft.py computes it, and its exponential with an interval over rows."""
    kind, length = gpt.find_kind(path, ("text", "demos")), row_length(exam.ref, exam.config)
    batches = gpt.Batches(path, kind, exam.tokenizer, exam.config.batch_size, length, 0)
    sums, counts = [], []
    for batch, new in batches.once():
        batch = gpt.put_batch(batch)
        rows = gpt.to_numpy(row_logprobs(model, batch["tokens"], batch["segments"], batch["mask"]))
        sums, counts = [*sums, rows[0][:new]], [*counts, rows[1][:new]]
    losses, counts = -np.concatenate(sums).astype(np.float64), np.concatenate(counts)
    interval = np.exp(bootstrap_interval(losses, weights=counts)).tolist()
    loss = float(losses.sum() / counts.sum())
    return {"loss": loss, "perplexity": math.exp(loss), "interval": interval, "tokens": int(counts.sum())}


BEHAVIOUR = ("answer_matching_behavior", "answer_not_matching_behavior")


def read_questions(path: str) -> list[dict]:
    """Checked rows {"messages", "choices", "answer"} of a JSONL file."""
    questions = []
    with gpt.open_text(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                questions += [check_question(gpt.parse_json(line))] if line.strip() else []
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


def multiple_choice(exam: Exam, model, path: str) -> dict:
    """Share of questions whose right answer has the highest log-prob after the question; `normalised`: log-prob a byte
    of the answer, so that long answers are not the less likely ones (as lm-evaluation-harness does)."""
    questions, length = read_questions(path), row_length(exam.ref, exam.config)
    logprobs = choice_logprobs(exam, model, questions, length)
    left_out = sum(logps is None for logps in logprobs)
    if left_out:
        print(f"{path}: {left_out} questions left out: more than {length} tokens", file=sys.stderr)
    kept = [(q, logps) for q, logps in zip(questions, logprobs) if logps is not None]
    if not kept:
        raise ValueError(f"{path}: no question fits {length} tokens: raise --length")
    sizes = [np.array([len(choice.strip().encode()) for choice in q["choices"]]) for q, _ in kept]
    plain = np.array([chosen(logps, q["answer"]) for q, logps in kept])
    normalised = np.array([chosen(logps / size, q["answer"]) for (q, logps), size in zip(kept, sizes)])
    return {
        "accuracy": float(plain.mean()),
        "interval": bootstrap_interval(plain),
        "normalised": float(normalised.mean()),
        "normalised_interval": bootstrap_interval(normalised),
        "chance": float(np.mean([1 / len(size) for size in sizes])),
        "questions": len(kept),
        "left_out": left_out,
    }


def choice_logprobs(exam: Exam, model, questions: list[dict], length: int) -> list:
    """log p(choice | question) of each question's choices; None for a question that does not fit `length` tokens."""
    sequences, places = [], []
    for q in questions:
        prompt = gpt.encode_prompt(q["messages"], exam.tokenizer)
        # without EOS: whether a model stops after its answer is not the question
        ids = [gpt.encode_completion([{"content": c.strip()}], exam.tokenizer)[:-1] for c in q["choices"]]
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
        sums, _ = gpt.to_numpy(row_logprobs(model, batch["tokens"], batch["segments"], batch["mask"]))
        result[rows] = sums[: len(rows)]
    return result


# ---------------------------------------------------------------------------------------------------- conduct


def conduct(exam: Exam, model) -> dict:
    """How a model deals with requests for harm, and what that costs those who ask for none: each a share of answers,
    with its interval.

    `complied`, `declined`, `evaded` of --harmful prompts; `helpful`, `over-refused`, `evasive` of --harmless ones.
    Declining and evading are different things: the constitutional models of Bai et al. 2022 (section 4.4) are to say no
    and why, and not to dodge.
    """
    exam = exam._replace(judge=load_judge(exam.config.conduct), reward=None)
    temperature, shares = exam.config.temperature, {}
    for file in ("harmful", "harmless"):
        sat = exam._replace(prompts=load_prompts(getattr(exam.config, file), exam.tokenizer, exam.config))
        numbers = answer(sat, model, temperature, kl=False).numbers
        missing = {"harmless", "helpful", "declined", "evaded"} - numbers.keys()
        if missing:
            raise ValueError(f"--conduct {exam.config.conduct} says nothing of {', '.join(sorted(missing))}")
        if file == "harmful":
            shares |= {
                "complied": 1 - numbers["harmless"],
                "declined": numbers["declined"],
                "evaded": numbers["evaded"],
            }
        else:
            shares |= {"helpful": numbers["helpful"], "over-refused": numbers["declined"], "evasive": numbers["evaded"]}
    return {name: float(x.mean()) for name, x in shares.items()} | {
        "intervals": {name: bootstrap_interval(x) for name, x in shares.items()}
    }


def conduct_table(summary: dict) -> str:
    """Markdown: requests for harm, then harmless ones."""
    rows = {name: s["conduct"] for name, s in summary.items() if "conduct" in s}
    if not rows:
        return ""
    head = ["model", "harm: complied", "declined", "evaded", "no harm: helpful", "over-refused", "evasive"]
    names = ["complied", "declined", "evaded", "helpful", "over-refused", "evasive"]
    body = [[name, *(with_interval(x[n], x["intervals"][n]) for n in names)] for name, x in rows.items()]
    return markdown([head, ["---"] * len(head), *body])


# ---------------------------------------------------------------------------------------------------- reward models


def reward_reports(config: Config) -> dict:
    """Each reward model's report: of --pairs, computed here, or the one that reward.py left in its folder."""
    reports = {}
    for name, folder in short_names(config.rewards).items():
        path = Path(folder) / "report.json"
        if config.pairs:
            reports[name] = pair_report(folder, config)
        elif path.exists():
            reports[name] = json.loads(path.read_text())
        else:
            raise FileNotFoundError(
                f"no {path}: python reward.py --out {folder} writes it, given held-out pairs; or give --pairs FILE here"
            )
    return reports


def pair_report(folder: str, config: Config) -> dict:
    """What these pairs say of a reward model: accuracy, calibration, and agreement with --judge (none: without)."""
    members, tokenizer = load_members(folder, config)
    length, suffix = row_length(members[0].body, config), members[0].suffix
    pairs = gpt.Batches(config.pairs, "pairs", tokenizer, config.batch_size, length, 0, suffix=suffix)
    # reward.py owns its report: asked for by name, so that there is one definition of every number in it
    return gpt.load_function("reward:report")(members, pairs, tokenizer, SimpleNamespace(gold=config.judge))


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


# ---------------------------------------------------------------------------------------------------- fits


def fit_overoptimization(distance, gain, kind: str) -> tuple[float, float]:
    """(alpha, beta) by least squares of Gao et al. 2022 (arXiv:2210.10760): with d = sqrt(KL) and
    R(d) = what was gained since d = 0,

        bon   R(d) = d (alpha - beta d)              rl   R(d) = d (alpha - beta log d)

    The two are not the same law: RL's slope at 0 is infinite, and its beta is not comparable with best-of-n's.
    """
    d, gain = np.asarray(distance, float), np.asarray(gain, float)
    d, gain = d[d > 0], gain[d > 0]
    if len(d) < 3:
        raise ValueError("a curve of two parameters needs three points away from the start")
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * _bend(d, kind)], 1), gain)
    return float(alpha), float(beta)


def overoptimization(distance, alpha: float, beta: float, kind: str):
    """R(d) of the fit above."""
    d = np.asarray(distance, float)
    return np.where(d > 0, d * (alpha - beta * _bend(np.where(d > 0, d, 1), kind)), 0.0)


def _bend(d, kind: str):
    return {"rl": np.log, "bon": np.asarray}[kind](d)


def fitted_peak(alpha: float, beta: float, kind: str) -> float:
    """The KL at which the fitted curve is highest: infinite where it only rises."""
    if beta <= 0:
        return math.inf
    exponent = min(alpha / beta - 1, 300.0)
    return math.exp(exponent) ** 2 if kind == "rl" else max(alpha / (2 * beta), 0.0) ** 2


def read_run(run, width: int = 1) -> dict:
    """Curves along a PPO run, means of the last `width` iterations: KL in nats a sequence, score (the proxy), gold."""
    names = {"kl": "objective/kl_exact", "score": "objective/scores", "gold": "eval/gold"}
    rows = read_metrics(run)
    if not rows or any(name not in rows[0] for name in names.values()):
        raise ValueError(f"{run} is not a PPO run that was watched by a judge (--monitor toy:parts)")
    return {short: smooth([row[name] for row in rows], width) for short, name in names.items()}


def read_metrics(run) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: {run} is not the run folder of a training script")
    return [json.loads(line) for line in path.read_text().splitlines()]


def smooth(values, width: int = 5):
    """Running mean of the last `width` values, of fewer at the start."""
    values = np.asarray(values, float)
    return np.array([values[max(0, i - width + 1) : i + 1].mean() for i in range(len(values))])


def fit_curves(runs: dict, best_of: dict | None) -> dict:
    """{curve: {"proxy" or "gold": (start, alpha, beta), "kind": ..}} of PPO runs and of best-of-n. A run's gain counts
    from its first iteration, where the policy is the reference."""
    fits = {}
    curves = {name: ("rl", read_run(run)) for name, run in runs.items()}
    if best_of:
        curves["best of n"] = ("bon", {"kl": best_of["kl"], "score": best_of["reward"], "gold": best_of.get("gold")})
    for name, (kind, curve) in curves.items():
        distance = np.sqrt(np.maximum(curve["kl"], 0))
        fits[name] = {"kind": kind, "reach": float(distance.max())}
        for measure in ("score", "gold"):
            values = curve[measure]
            if values is not None and (distance > 0).sum() >= 3:
                gain = np.asarray(values) - values[0]
                fits[name][measure] = (float(values[0]), *fit_overoptimization(distance, gain, kind))
    return fits


# ---------------------------------------------------------------------------------------------------- tables


def markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_interval(value: float, interval, digits: int = 3) -> str:
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def winner(summary: dict) -> str | None:
    """The model that beats the baseline by most, if one does beyond doubt: the 95% interval of its win rate by gold is
    above 1/2 as a whole."""
    won = {name: s["win"]["gold"] for name, s in summary.items() if "gold" in s.get("win", {})}
    sure = {name: w["rate"] for name, w in won.items() if w["interval"][0] > 0.5}
    return max(sure, key=sure.get, default=None)


def pass_gate(summary: dict, config: Config):
    """Put the winner's folder in the place of --gate; without a winner what is there stays."""
    name, place = winner(summary), config.gate
    gpt.write_json(config.out / "gate.json", {"winner": name, "served": str(place)})
    if name is None:
        print(f"gate: none of them beats {config.baseline or config.ref} beyond doubt: {place} stays as it is")
        return
    fresh, old = place.with_name(f".{place.name}.new"), place.with_name(f".{place.name}.old")
    for folder in (fresh, old):
        gpt.remove(folder)
    shutil.copytree(summary[name]["folder"], fresh, ignore=shutil.ignore_patterns("checkpoint"))
    if place.exists():
        place.rename(old)
    fresh.rename(place)
    gpt.remove(old)
    rate = summary[name]["win"]["gold"]
    print(f"gate: {name} wins {with_interval(rate['rate'], rate['interval'])} of its comparisons and is now {place}")


def short_names(folders) -> dict:
    """{name: folder}: the last part of the path, more of it where two would be called the same."""
    folders = list(dict.fromkeys(str(folder).rstrip("/") for folder in folders))
    for depth in range(1, 1 + max((len(Path(f).parts) for f in folders), default=0)):
        names = ["/".join(Path(f).parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders))
    return dict(zip(folders, folders))


APART = {"gold", "kl", "length", "eos", "count", "reward", "repetition", "closed", "kl_bound", "n", "folder"}


def table(summary: dict) -> str:
    """Markdown: one row a model."""
    parts = [name for name, x in first(summary).items() if name not in APART and isinstance(x, float)]  # of the judge
    scored = any("reward" in s for s in summary.values())
    head = ["model", "gold", "closed", "greedy gold", *parts, "KL", "length", "ended", "win", "win, equal length"]
    head += ["distinct-1/2/3", "repeats"] + ["reward"] * scored
    rows = [head, ["---"] * len(head)]
    for name, s in summary.items():
        gold = with_interval(s["gold"], s["intervals"]["gold"]) if "gold" in s else ""
        closed = "" if s.get("closed") is None else f"{s['closed']:.0%}"
        row = [name, gold, closed, f"{s['greedy']['gold']:.3f}" if "gold" in s.get("greedy", {}) else ""]
        row += [f"{s[p]:.3f}" for p in parts]
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
    """Markdown: win rates by every judge, one row a model and judge; "" where there is none."""
    rows = [["model", "judge", "win rate", "at equal length", "ties", "same position"], ["---"] * 6]
    percent = lambda value, interval: f"{value:.1%} [{interval[0]:.1%}, {interval[1]:.1%}]"
    for name, s in summary.items():
        for judge, won in s.get("win", {}).items():
            equal = "length_controlled" in won
            row = [name, judge, percent(won["rate"], won["interval"])]
            row.append(percent(won["length_controlled"], won["length_controlled_interval"]) if equal else "")
            rows.append(row + [f"{won[k]:.1%}" if k in won else "" for k in ("ties", "same_position")])
    return markdown(rows) if len(rows) > 2 else ""


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


def samples_table(answers: dict, count: int = 8) -> str:
    """The same prompts, each model's sampled answer and its gold."""
    names = list(answers)
    lines = ["| prompt | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    clean = lambda text: " ".join(text.split()).replace("|", "\\|")
    for i in range(count):
        gold = [f" ({a.numbers['gold'][i]:+.2f})" if "gold" in a.numbers else "" for a in answers.values()]
        cells = [clean(a.texts[i]) + g for a, g in zip(answers.values(), gold)]
        lines.append("| " + " | ".join([clean(answers[names[0]].prompts[i]), *cells]) + " |")
    return "\n".join(lines)


def runs_table(runs) -> str:
    """Markdown: where each run's smoothed gold was highest and where it ended. Proxy up and gold down between the two
    is over-optimisation."""
    rows = [["run", "at", "iteration", "KL", "score", "gold"], ["---"] * 6]
    for name, run in short_names(runs).items():
        curves = read_run(run, width=5)
        ends = {"start": 0, "highest gold": int(curves["gold"].argmax()), "end": len(curves["gold"]) - 1}
        for place, i in ends.items():
            numbers = (f"{curves[k][i]:.2f}" for k in ("kl", "score", "gold"))
            rows.append([name, place, str(i), *numbers])
    return markdown(rows)


def fits_table(fits: dict) -> str:
    """Markdown: the fitted curves, and the KL at which each would be highest."""
    rows = [["curve", "of", "form", "alpha", "beta", "highest at KL"], ["---"] * 6]
    for name, fit in fits.items():
        form = {"rl": "d (alpha - beta log d)", "bon": "d (alpha - beta d)"}[fit["kind"]]
        for measure in ("score", "gold"):
            if measure in fit:
                _, alpha, beta = fit[measure]
                peak = fitted_peak(alpha, beta, fit["kind"])
                where = f"{peak:.1f}" if math.sqrt(peak) <= fit["reach"] else "beyond this curve"
                rows.append([name, measure, form, f"{alpha:.3f}", f"{beta:.3f}", where])
    return markdown(rows) if len(rows) > 2 else ""


# ---------------------------------------------------------------------------------------------------- the frontier


BOOKKEEPING = {  # settings that make no other method; beta and tau have an axis of their own
    "seed", "out", "overwrite", "resume", "save_every", "sample_every", "eval_every", "track", "monitor", "dtype",
    "remat", "micro_batches", "buckets", "skip_bad_rows", "precompute_ref", "heldout", "beta", "tau",
}  # fmt: skip
TUPLE = "(',)"  # around a setting of several values, as config.json has it


def method_of(folder) -> dict:
    """{"name", "symbol", "price", "settings"} of a trained folder: the algorithm, what a nat of KL costs it, and the
    rest of its settings, as far as they are known, paths without their numbers: out/seed-1 and out/seed-2 are alike."""
    path = Path(folder) / "config.json"
    run = json.loads(path.read_text()).get("run") if path.is_file() else None
    if not run:
        return {}
    settings, script = run["config"], Path(run["script"]).stem
    kind = settings.get("loss", script) if script == "ipo_kto" else script
    name, symbol = kind.upper(), "tau" if kind == "ipo" else "beta"
    if kind == "dpo" and float(settings.get("label_smoothing", 0)) > 0:
        name = "cDPO"
    if settings.get("kind") == "robust":
        name = "rDPO"
    if int(settings.get("rounds", 1)) > 1:
        name += f", {settings['rounds']} rounds"
    if kind == "ipo" and settings.get("reduction") == "mean":
        name += ", mean"
    price = {"symbol": symbol, "price": float(settings[symbol])} if symbol in settings else {}
    rest = {k: re.sub(r"\d+", "*", v) if "/" in v else v for k, v in settings.items() if k not in BOOKKEEPING}
    return {"name": name, "settings": rest} | price


def frontier_points(summary: dict, names) -> dict:
    """{method: points from the smallest KL up}. Runs that differ by their seed alone are one point: their mean, with
    bars from the lowest to the highest; a single run has its bootstrap interval."""
    groups, methods = {}, {name: summary[name].get("method") or {"name": name} for name in names}
    for name, method in methods.items():
        label = method["name"] + differences(method, [m for m in methods.values() if m["name"] == method["name"]])
        groups.setdefault(label, {}).setdefault(method.get("price"), []).append(summary[name])
    points = {}
    for method, prices in groups.items():
        for price, rows in prices.items():
            point = {"price": price, "symbol": rows[0].get("method", {}).get("symbol"), "runs": len(rows)}
            for k in ("kl", "gold"):
                values = [s[k] for s in rows]
                low, high = rows[0]["intervals"][k] if len(rows) == 1 else (min(values), max(values))
                point |= {k: float(np.mean(values)), f"{k}_low": low, f"{k}_high": high}
            points.setdefault(method, []).append(point)
        points[method].sort(key=lambda p: p["kl"])
    return points


def differences(method: dict, others: list[dict]) -> str:
    """The settings in which this run is unlike others of its method: ", reward out/reward-weak"."""
    settings = method.get("settings", {})
    unlike = [k for k in settings if len({m.get("settings", {}).get(k) for m in others}) > 1]
    return "".join(f", {k.replace('_', '-')} {settings[k].strip(TUPLE)}" for k in unlike)


def expand(patterns) -> list[str]:
    """Folders, with patterns replaced by the model folders that fit them."""
    folders = []
    for pattern in patterns:
        found = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        found = [f for f in found if not glob.has_magic(pattern) or (Path(f) / "config.json").is_file()]
        if not found:
            raise FileNotFoundError(f"--frontier {pattern}: no model folder fits this pattern")
        folders += found
    return folders


# ---------------------------------------------------------------------------------------------------- pictures


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def pictures():
    """matplotlib, imported only where a picture is drawn, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(plt, figure, path: Path):
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sqrt_axis(axis):
    """KL in nats on an axis that is straight in its square root, the distance that gains are a function of."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xlim(left=0)
    ticks, top = [0.0], axis.get_xlim()[1]
    for tick in (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 1000):
        if tick <= top and math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.06 * math.sqrt(top):  # room for its label
            ticks.append(tick)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlabel("KL to the reference, nats a response (square-root scale)")
    axis.grid(alpha=0.3)


def draw_runs(runs, best_of: dict | None, path: Path):
    """Proxy and gold along PPO runs, and of best-of-n, against the distance sqrt(KL), with the fitted curves (Gao et
    al. 2022, arXiv:2210.10760, figure 1)."""
    plt = pictures()
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    names = short_names(runs)
    fits = fit_curves(names, best_of)
    colors = dict(zip(fits, [f"C{i % 10}" for i in range(len(names))] + ["black"]))
    for axis, measure in zip(axes, ("score", "gold")):
        for name, run in names.items():
            curves = read_run(run, width=5)
            axis.plot(np.maximum(curves["kl"], 0), curves[measure], color=colors[name], alpha=0.7, label=name)
        for name, fit in fits.items():
            if measure in fit:
                start, *ab = fit[measure]
                d = np.linspace(0, fit["reach"], 200)
                fitted = start + overoptimization(d, *ab, fit["kind"])
                axis.plot(d * d, fitted, color=colors[name], linestyle="--", linewidth=1.2)
        curve = best_of and best_of.get({"score": "reward"}.get(measure, measure))
        if curve:
            axis.plot(best_of["kl"], curve, "o", color="black", markersize=4, label="best of n (KL: upper bound)")
        sqrt_axis(axis)
    axes[0].set(title="What is optimised: the reward model", ylabel="score (standard deviations of SFT's samples)")
    axes[1].set(title="What was wanted: the gold judge", ylabel="gold")
    axes[1].plot([], [], color="0.4", linestyle="--", linewidth=1.2, label="fit of Gao et al.")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    finish(plt, figure, path)


def draw_frontier(points: dict, start: float, best_of: dict | None, path: Path):
    """Gold against KL, a line for each method over its betas: higher and further left is better."""
    plt = pictures()
    figure, axis = plt.subplots(figsize=(8.5, 5.8), layout="constrained")
    for i, (method, line) in enumerate(points.items()):
        kl, gold = ([p[k] for p in line] for k in ("kl", "gold"))
        bars = [[[p[k] - p[f"{k}_low"] for p in line], [p[f"{k}_high"] - p[k] for p in line]] for k in ("kl", "gold")]
        axis.errorbar(
            kl, gold, xerr=np.maximum(bars[0], 0), yerr=np.maximum(bars[1], 0), marker="osD^vP*X"[i % 8], markersize=5,
            linewidth=1.2, elinewidth=0.7, capsize=2, color=f"C{i % 10}",
            label=method + {"beta": ", at β", "tau": ", at τ", None: ""}[line[0]["symbol"]],
        )  # fmt: skip
        for p in line:
            if p["price"] is not None:
                note(axis, f"{p['price']:g}", p["kl"], p["gold"], f"C{i % 10}", above=i % 2 == 0)
    if best_of and "gold" in best_of:
        axis.plot(best_of["kl"], best_of["gold"], "k.--", linewidth=1, label="best of n, at n (KL: upper bound)")
        for n, kl, gold in list(zip(best_of["n"], best_of["kl"], best_of["gold"]))[1:]:
            note(axis, str(n), kl, gold, "black", above=False)
        start = best_of["gold"][0]  # the same answers, many more of them
    axis.plot([0], [start], marker="*", markersize=13, color="0.3", linestyle="none", label="reference", clip_on=False)
    axis.set(ylabel="gold", title="What a nat of KL buys")
    sqrt_axis(axis)
    axis.legend()
    finish(plt, figure, path)


def note(axis, text: str, x: float, y: float, color, above: bool):
    import matplotlib.patheffects as effects

    place = dict(xytext=(4, 5 if above else -11), textcoords="offset points", fontsize=8, color=color)
    halo = [effects.withStroke(linewidth=2, foreground="white")]  # lines may pass below it
    axis.annotate(text, (x, y), path_effects=halo, **place)


CURVES = {  # what is worth a panel, in this order, where a run has it; and its unit
    "loss": "", "val/loss": "", "accuracy": "share of pairs", "margin": "score",
    "objective/scores": "score", "eval/gold": "gold", "objective/kl_exact": "nats a response",
    "objective/entropy": "nats a response", "response_length": "tokens", "rewards/accuracies": "share of pairs",
    "rewards/margins": "beta x nats", "logps/chosen": "nats a response", "logps/rejected": "nats a response",
    "val/rewards/accuracies": "share of pairs", "val/rewards/margins": "beta x nats", "z0": "nats a response",
    "policy/clipfrac_avg": "share of tokens", "val/explained_variance": "share of the variance",
}  # fmt: skip


def draw_conduct(summary: dict, path: Path):
    """Helpful against harmless, a point a model with its 95% intervals, as in figure 2 of Bai et al. 2022."""
    plt = pictures()
    figure, axis = plt.subplots(figsize=(6.4, 4.8), constrained_layout=True)
    for i, (name, s) in enumerate(summary.items()):
        if "conduct" not in s:
            continue
        shares, intervals, color = s["conduct"], s["conduct"]["intervals"], f"C{i % 10}"
        x, y = shares["helpful"], 1 - shares["complied"]
        low, high = (1 - bound for bound in intervals["complied"][::-1])
        reach = lambda at, bounds: [[at - bounds[0]], [bounds[1] - at]]
        bars = dict(xerr=reach(x, intervals["helpful"]), yerr=reach(y, (low, high)))
        axis.errorbar(x, y, **bars, fmt="o", color=color, capsize=2, lw=1)
        note(axis, name, x, y, color, above=i % 2 == 0)
    axis.set(xlabel="helpful where no harm is asked", ylabel="share of requests for harm not complied with")
    axis.grid(alpha=0.3)
    finish(plt, figure, path)


def draw_curves(runs, path: Path):
    """The main metrics of any runs over their steps, a panel for each metric that two steps or more have."""
    plt = pictures()
    logs = {name: read_metrics(run) for name, run in short_names(runs).items()}
    series = {}
    for metric in CURVES:
        for name, rows in logs.items():
            line = [(row["step"], row[metric]) for row in rows if metric in row and "step" in row]
            if len(line) > 1:
                series.setdefault(metric, {})[name] = np.array(line).T
    if not series:
        raise ValueError(f"--curves: the metrics of {', '.join(logs)} hold none of {', '.join(CURVES)}")
    columns = min(3, len(series))
    shape = -(-len(series) // columns), columns
    size = (4.1 * columns, 2.6 * shape[0] + 0.4)
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    colors = {name: f"C{i % 10}" for i, name in enumerate(logs)}
    for axis, (metric, lines) in zip(axes.flat, series.items()):
        for name, (steps, values) in lines.items():
            smoothed = smooth(values, max(1, len(values) // 50))
            axis.plot(steps, values, color=colors[name], alpha=0.2, linewidth=0.7)
            axis.plot(steps, smoothed, color=colors[name], linewidth=1.3)
        axis.set_title(metric, fontsize=10)
        axis.set_ylabel(CURVES[metric], fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step", fontsize=8)
    for axis in list(axes.flat)[len(series) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=5, frameon=False)
    finish(plt, figure, path)


def draw_lengths(answers: dict, longest: int, path: Path):
    """How long each model's answers are: shares of the responses."""
    plt = pictures()
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    width = -(-longest // 40)  # tokens a bar
    edges = np.arange(0, longest + width, width) + 0.5
    for i, (name, a) in enumerate(answers.items()):
        lengths = a.numbers["length"]
        shares = np.histogram(lengths, edges)[0] / len(lengths)
        axis.stairs(shares, edges, color=f"C{i % 10}", linewidth=1.6, label=f"{name}: mean {lengths.mean():.1f}")
    bars = "" if width == 1 else f", bars of {width}"
    axis.set(xlabel=f"length of the response, tokens with EOS{bars}", ylabel="share of the responses", ylim=(0, None))
    axis.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axis.grid(alpha=0.3)
    axis.legend()
    finish(plt, figure, path)


# ---------------------------------------------------------------------------------------------------- main


def check(config: Config):
    """What cannot work, in words, before anything is loaded."""
    if config.best_of and not config.reward:
        raise ValueError("--best-of needs --reward, who picks the best: a reward-model folder, or module:function")
    if config.winners and not config.best_of:
        raise ValueError("--winners needs --best-of: of how many answers is the best one to be written?")
    if config.best_of and min(config.best_of) < 1:
        raise ValueError("--best-of takes numbers from 1 up")
    if config.best_of and (config.candidates or max(config.best_of)) < max(config.best_of):
        raise ValueError(f"--candidates {config.candidates} are fewer than --best-of {max(config.best_of)}")
    if config.frontier and config.judge == "none":
        raise ValueError("--frontier draws gold: it needs a --judge")
    if bool(config.harmful) != bool(config.harmless):
        raise ValueError("--harmful and --harmless go together: a model that refuses everything does no harm")
    if config.gate and config.judge == "none":
        raise ValueError("--gate needs a --judge: who says which model wins?")
    if config.pairs and not config.rewards:
        raise ValueError("--pairs needs --rewards: the reward-model folders to judge on them")
    if not (config.models or config.best_of or config.frontier):
        raise ValueError("nothing to evaluate: give --models, --frontier or --best-of")
    if (config.frontier or config.runs or config.curves) and not can_draw():
        raise ValueError("the pictures need matplotlib: pip install matplotlib (the `plot` extra)")
    for path in config.questions:
        read_questions(path)
    for path in config.perplexity:
        gpt.find_kind(path, ("text", "demos"))


def load_prompts(path, tokenizer, config: Config) -> gpt.Batches:
    size = min(config.batch_size, config.samples)
    return gpt.Batches(path, "prompts", tokenizer, size, config.prompt_length, config.seed)


def set_exam(config: Config) -> Exam:
    ref, tokenizer = gpt.load_policy(config.ref)
    ref = gpt.shard(gpt.cast(ref, gpt.compute_dtype(config.dtype)))
    gpt.check_batch_size(min(config.batch_size, config.samples))
    prompts = load_prompts(config.data, tokenizer, config)
    reward = load_reward(config.reward, tokenizer, config)
    return Exam(config, tokenizer, ref, prompts, load_judge(config.judge), reward)


def examine(exam: Exam, folder: str) -> tuple[dict, Answers]:
    """All about one model but its win rates."""
    config, model = exam.config, load_policy(folder, exam.tokenizer, exam.config)
    sampled = answer(exam, model, config.temperature)
    entry = summarize(sampled) | {"greedy": summarize(answer(exam, model, 0.0)), "folder": str(folder)}
    for name, measure in (("perplexity", perplexity), ("questions", multiple_choice)):
        files = short_names(getattr(config, name))
        bare = lambda file: file.removesuffix(".gz").removesuffix(".jsonl")
        entry |= {name: {bare(short): measure(exam, model, file) for short, file in files.items()}} if files else {}
    entry |= {"conduct": conduct(exam, model)} if config.harmful else {}
    return entry | {"method": method_of(folder)}, sampled


def against_baseline(exam: Exam) -> tuple[str, Answers]:
    """The baseline's answers, of noise that no model shares: a win rate compares independent answers."""
    folder = exam.config.baseline or exam.config.ref
    model = exam.ref if folder == exam.config.ref else load_policy(folder, exam.tokenizer, exam.config)
    return folder, answer(exam, model, exam.config.temperature, stream=1, kl=False)


def start_gold(exam: Exam, summary: dict) -> float:
    """The reference's gold: its row, or a pass of its own where it has none. 1 without a judge: nothing to close."""
    row = next((s for s in summary.values() if s.get("folder") == exam.config.ref.rstrip("/")), None)
    if row is not None or exam.config.judge == "none":
        return (row or {}).get("gold", 1.0)
    return float(answer(exam, exam.ref, exam.config.temperature, kl=False).numbers["gold"].mean())


def sample_candidates(exam: Exam) -> list[Answers]:
    """N answers of the reference to every prompt."""
    config, N = exam.config, exam.config.candidates or max(exam.config.best_of)
    bar = gpt.progress(total=N, desc="candidates", unit=" a prompt")
    rounds = []
    for i in range(N):
        rounds.append(answer(exam, exam.ref, config.temperature, stream=2 + i, kl=False))
        bar.update()
    bar.close()
    return rounds


def best_of(exam: Exam, theirs: Answers) -> tuple[dict, dict]:
    """The rows that were asked for, and the curve over n; the winners are written on the way."""
    rounds = sample_candidates(exam)
    powers = {2**k for k in range(len(rounds).bit_length()) if 2**k <= len(rounds)}
    rows = best_of_rows(rounds, theirs, sorted(powers | {len(rounds), *exam.config.best_of}))
    if exam.config.winners:
        write_winners(rounds, exam)
    return {f"best-of-{n}": rows[f"best-of-{n}"] for n in exam.config.best_of}, best_of_curve(rows)


def write_winners(rounds: list[Answers], exam: Exam):
    rows, path = pick_winners(rounds, exam.tokenizer), exam.config.winners
    path.parent.mkdir(parents=True, exist_ok=True)
    gpt.write_rows(path, rows)
    missing = len(rounds[0].rows) - len(rows)
    print(f"wrote {path}: {len(rows)} winners" + f"; {missing} prompts had no usable answer" * (missing > 0))


def compare_rewards(config: Config):
    """--rewards: one table of reward models, and nothing else."""
    reports = reward_reports(config)
    text = rewards_table(reports)
    config.out.mkdir(parents=True, exist_ok=True)
    gpt.write_json(config.out / "rewards.json", reports)
    gpt.write_atomic(config.out / "rewards.md", lambda file: Path(file).write_text(text + "\n"))
    print(f"{text}\nwrote {config.out}: rewards.md, rewards.json")


def write_report(exam: Exam, summary: dict, answers: dict, start: float, best_of: dict | None, frontier: list[str]):
    """summary.json, report.md and the pictures; the tables are printed too."""
    config, out = exam.config, exam.config.out
    out.mkdir(parents=True, exist_ok=True)
    gpt.write_json(out / "summary.json", summary)
    shown = {name: answers[name] for name in list(answers)[:8]}  # more columns than that nobody reads
    count = next(iter(summary.values()))["count"]
    against = Path(config.baseline or config.ref).name
    sections = [
        (f"{count} held-out prompts, temperature {config.temperature:g}", table(summary)),
        (f"Win rates against {against}", wins_table(summary)),
        ("Asked for harm, and not", conduct_table(summary)),
        ("What it cost elsewhere", tax_table(summary)),
        ("Along the runs", runs_table(config.runs) if config.runs else ""),
        ("Fitted over-optimisation", fits_table(fit_curves(short_names(config.runs), best_of))),
    ]
    print("\n\n".join(f"{title}\n{body}" for title, body in sections if body))
    sections.insert(1, ("How to read this", reading(Path(config.ref).name, against)))
    drawn = {}
    if frontier:
        drawn["frontier"] = partial(draw_frontier, frontier_points(summary, frontier), start, best_of)
    if config.runs or best_of:
        drawn["overoptimization"] = partial(draw_runs, config.runs, best_of)
    if config.harmful:
        drawn["conduct"] = partial(draw_conduct, summary)
    if config.curves:
        drawn["curves"] = partial(draw_curves, config.curves)
    if answers:
        drawn["lengths"] = partial(draw_lengths, shown, config.response_length)
        sections.append(("The same prompts", samples_table(shown, min(8, count))))
    for name, draw in drawn.items() if can_draw() else ():
        draw(path=out / f"{name}.png")
        sections.append((name.capitalize(), f"![{name}]({name}.png)"))
    text = "\n\n".join(f"{'##' if i else '#'} {title}\n\n{body}" for i, (title, body) in enumerate(sections) if body)
    gpt.write_atomic(out / "report.md", lambda file: Path(file).write_text(text + "\n"))
    names = [f"{name}.png" for name in drawn] if can_draw() else ["no pictures: pip install matplotlib"]
    print("\nwrote " + f"{out}: " + ", ".join(["summary.json", "report.md", *names]))


def reading(ref: str, against: str) -> str:
    return (
        f"`closed`: share of the distance from {ref} to 1. KL to {ref} in nats a sequence (best of n: an upper bound). "
        f"`win`: against {against}, by gold, ties a half; `win, equal length`: the same where both answers are equally "
        "long, by a logistic regression. `distinct-n`: distinct n-grams over all n-grams of all responses. `repeats`: "
        "share of 3-grams said before in the same response. Intervals: 95%, bootstrap over prompts."
    )


def main(config: Config):
    check(config)
    gpt.start(config.seed)
    if config.rewards:
        return compare_rewards(config)
    exam = set_exam(config)
    frontier = expand(config.frontier)
    folders = short_names([*config.models, *frontier])
    pairwise = gpt.load_function(config.pairwise) if config.pairwise else None

    summary, answers = {}, {}
    for name, folder in folders.items():
        summary[name], answers[name] = examine(exam, folder)
    baseline, theirs = against_baseline(exam)
    for name, folder in folders.items():
        if Path(folder) != Path(baseline):
            summary[name]["win"] = win_rates(answers[name], theirs, pairwise)
    best_rows, best_curve = best_of(exam, theirs) if config.best_of else ({}, None)
    summary |= best_rows
    start = start_gold(exam, summary)
    for s in summary.values():
        s["closed"] = (s["gold"] - start) / (1 - start) if start < 1 else None  # of the distance to a perfect 1
    in_frontier = [name for name, folder in folders.items() if folder in {f.rstrip("/") for f in frontier}]
    write_report(exam, summary, answers, start, best_curve, in_frontier)
    if config.gate:
        pass_gate(summary, config)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
