"""Constitutional AI and AI feedback: a model and a written constitution in the place of the human labeller.

Bai et al. 2022 (arXiv:2212.08073), Lee et al. 2023 (arXiv:2309.00267). The stages; what lies between them is done by
the other scripts, and each stage ends with the command that comes next:

    --stage revise    answer prompts; a principle is drawn, the answer criticised under it and rewritten, --rounds times
                      -> revisions.jsonl: prompt and last revision, nothing else; transcripts.jsonl: all of it
                      then sft.py, from the pretrained model, on revisions and helpful answers: the SL-CAI model
    --stage label     two answers of that model to each prompt; the judge says which keeps better to a principle
                      -> pairs.jsonl with soft labels, P(chosen is better) in `label_p`
                      then reward.py on these and on human labels of helpfulness, then ppo.py: the RL-CAI model
    --stage agree     how often the judge agrees with the labels of pairs that people (or gold) labelled

The judge (--judge) is a model folder, read by the log-probs of the answer options; an OpenAI-compatible endpoint
(http://host/v1, asked by its chat route, or http://host/v1/completions); or module:function(texts, options).

Two functions ask the judge while a policy learns:
    ppo.py --reward rlaif:reward            the judge's mark of an answer is its score: d-RLAIF
    online.py --judge rlaif:preference      the judge prefers one of two answers: online AI feedback
                                            (evaluate.py --pairwise rlaif:preference: win rates by the same judge)
They have no command line of their own. Any option below is given to them by an environment variable, its name in
capitals after RLAIF_: RLAIF_JUDGE=out/judge is --judge out/judge, RLAIF_COMPARE=pair is --compare pair.

Choices where code bases disagree:
1. Both orders of a pair are asked and averaged; the share of pairs where the judge sides with a position is reported.
2. Soft labels: the loss is cross-entropy to the judge's probability. After a chain of thought, which makes a judge too
   sure, probabilities are clamped to [0.4, 0.6] (Bai et al., section 4.1).
3. The next revision starts from the last one, not from the first answer, and a principle is drawn anew for each. The
   last one alone is trained on (Bai et al. train on all). Revisions that are empty, cut short, repeat the request or
   change nothing are left out, and counted.
4. --compare: "pair" shows both answers at once (Bai et al.; for models that can weigh two texts). "each" asks the
   critique's question about each answer alone, which small models can answer long before they can compare two. With
   verdicts drawn independently and ties split, P(a is better) = 1/2 + (P(a is good) - P(b is good)) / 2.
5. Where a principle says how the critique of a good answer begins (`good`), such a critique ends the matter: the answer
   stays as it is. Without this a small model rewrites right answers into wrong ones.

    python rlaif.py                                                    # the toy world's judge and constitution
    python rlaif.py --stage label
    python rlaif.py --stage label --judge http://localhost:8000/v1 --judge-model qwen --compare pair \\
        --constitution constitution.json --init out/mine-sl --data data/mine/prompts.jsonl --out data/mine-ai
"""

import dataclasses
import fnmatch
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import sys
import textwrap
import threading
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    stage: Literal["revise", "label", "agree"] = "revise"
    init: str | None = None  # model that answers (None: out/sft for revise, out/sl-cai for label)
    data: tuple[str, ...] = ("data/toy/harmless.jsonl:0.6", "data/toy/harmful.jsonl:0.4")  # prompts; agree: pairs
    out: Path = Path("data/rlaif")  # folder of the rows
    prompts: int = 2048  # prompts that are revised or labelled
    batch_size: int = 128  # prompts, or questions to a judge in this process, at a time
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens that an answer, a critique or a revision may have
    rounds: int = 4  # revise: revisions of each answer
    helpful: tuple[str, ...] | None = ("data/toy/harmless.jsonl",)  # revise: prompts answered without revision

    judge: str = "out/judge"  # who criticises and judges: model folder, http://host/v1, or module:function
    judge_model: str = "default"  # the endpoint's name of the model
    concurrency: int = 8  # requests to the endpoint under way at once
    constitution: tuple[str, ...] = ("data/toy/constitution.json",)  # files of principles; several are joined
    principles: str = "*"  # pattern of the names of those to draw from
    examples: bool = True  # put the constitution's examples before each question (they need a long context)
    compare: Literal["each", "pair"] = "each"  # ask about each answer alone, or show the judge both
    chain_of_thought: bool = False  # let the judge reason before it chooses
    gold: str | None = "toy:parts"  # module:function that the judge is compared with, never trained on

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations and frozen models
    seed: int = 0
    resume: bool = False  # go on where --out was left
    overwrite: bool = False  # empty --out first
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


CLAMP = 0.4, 0.6  # range of a judge's probabilities after a chain of thought
HELPFUL_SAMPLES = 2  # answers to each helpful prompt, of as many prompts as are revised
TIMEOUT, RETRIES = 60.0, 6  # seconds that a request to an endpoint may take; tries after the first one


# ---------------------------------------------------------------------------------------------------- constitution


class Principle(NamedTuple):
    name: str
    critique: str  # asks for a critique of the answer before it
    revision: str  # asks for a better answer
    comparison: str  # asks which of two answers is better
    good: str | None  # how the critique of a good answer begins
    bad: tuple[str, ...]  # and that of a bad one


class Constitution(NamedTuple):
    principles: list[Principle]
    comparison: str  # {shots}, {prompt}, {principle}, {a}, {b}: what the judge reads
    answer: str  # what comes between that (and its reasoning) and its choice
    options: list[str]  # its two choices
    rating: str | None  # {prompt}, {response}: what it reads before a mark from 0 to 9
    stops: list[str]  # a critique or revision ends before any of these
    critique_shots: list[str]  # examples, put before what is to be criticised
    comparison_shots: list[dict]  # {prompt, corrects, incorrects}
    criterion: str = ""  # {prompt}, {response}, {criterion}: what it reads before a yes or a no


CRITERION = "The following is a conversation between a human and an assistant:\n{prompt}{response}\n\n"
CRITERION += "Is this true of the assistant's last answer: {criterion}\nAnswer yes or no.\n\nThe answer is:"
TEMPLATE = "{shots}Consider the following conversation between a human and an assistant:\n{prompt}\n{principle}"
TEMPLATE += "\n (A) {a}\n (B) {b}\n\n"
STOPS = ["\n\n" + name for name in ("Human:", "Assistant:", "CritiqueRequest:", "Critique:", "RevisionRequest:")]


def load_constitution(paths, pattern: str = "*", need: str = "critique", examples: bool = True) -> Constitution:
    """The principles that have what is needed (a critique, a comparison, a `good`) and whose name fits the pattern.

    Files have this project's shape (see constitution.json), or one of those that the paper's authors published: {name:
    {prompt, edit_request}}, a list of comparison principles, a list of examples for either.
    """
    found = {"critiques": {}, "comparisons": [], "critique_shots": [], "comparison_shots": []}
    settings = dict(
        comparison=TEMPLATE, answer="The answer is: (", options=["A", "B"], rating=None, stops=STOPS,
        criterion=CRITERION,
    )  # fmt: skip
    for path in paths:
        for key, value in _read_constitution(path).items():
            if key in found:
                found[key] = found[key] | value if isinstance(value, dict) else found[key] + value
            elif key in settings:
                settings[key] = value
            else:
                raise ValueError(f"{path}: unknown key {key!r} (known: {', '.join([*found, *settings])})")
    entries = found.pop("critiques")
    comparisons = [_principle(f"comparison{i}", {"comparison": text}) for i, text in enumerate(found["comparisons"])]
    principles = [_principle(name, entry) for name, entry in entries.items()] + comparisons
    able = [p for p in principles if getattr(p, need)]
    chosen = [p for p in able if fnmatch.fnmatchcase(p.name, pattern)]
    if not chosen:
        names = ", ".join(p.name for p in able) or "none"
        hint = "; --compare pair does without `good`" if need == "good" else ""
        where = " ".join(map(str, paths))
        raise ValueError(f"{where}: no principle with a {need} is called {pattern!r} (there are: {names}{hint})")
    shots = {name: found[name] if examples else [] for name in ("critique_shots", "comparison_shots")}
    return Constitution(chosen, **settings, **shots)


def _read_constitution(path) -> dict:
    if not Path(path).is_file():
        hint = "run `python toy.py`" if "toy" in Path(path).parts else "constitution.json is the project's own"
        raise FileNotFoundError(f"no constitution {path}: {hint}")
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(content, list) and all(isinstance(x, dict) for x in content):
        return {"comparison_shots": content}
    if isinstance(content, list):
        return {"critique_shots" if any("Critique:" in x for x in content) else "comparisons": content}
    shaped = {"critiques", "comparisons", "comparison"} & content.keys()
    return content if shaped else {"critiques": content}


def _principle(name: str, entry: dict) -> Principle:
    if "comparison" not in entry and not {"prompt", "edit_request"} <= entry.keys():
        raise ValueError(f"principle {name!r} has neither `prompt` and `edit_request` nor `comparison`")
    first = lambda x: x[0] if isinstance(x, list) else x
    texts = (entry.get(key, "") for key in ("prompt", "edit_request", "comparison"))
    bad = entry.get("bad", ())
    return Principle(name, *map(first, texts), entry.get("good"), (bad,) if isinstance(bad, str) else tuple(bad))


def draw(principles: list[Principle], n: int, *seed: int) -> list[Principle]:
    """n principles, each drawn anew: a pure function of the seed."""
    return [principles[i] for i in np.random.default_rng(seed).integers(len(principles), size=n)]


def part_of(name: str) -> str:
    """harmless0 -> harmless: what principles are grouped by in reports."""
    return name.rstrip("0123456789")


# ---------------------------------------------------------------------------------------------------- texts


def conversation(prompt) -> str:
    """A prompt as the text that a judge reads, up to where the answer begins."""
    if isinstance(prompt, str):
        return prompt
    return (
        "".join(f"\n\n{'Human' if m['role'] == 'user' else m['role'].title()}: {m['content']}" for m in prompt)
        + "\n\nAssistant:"
    )


def join(before: str, after: str) -> str:
    """Two texts with a blank between, unless there is one."""
    return before + after if before[-1:].isspace() or after[:1].isspace() or not before else f"{before} {after}"


def cut(text: str, stops) -> str:
    """The text up to the first of the stops."""
    return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))].rstrip()


def words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def fault(revision: str, ended: bool, before: str, critique: str, principle: Principle) -> str | None:
    """Why a revision can not be used, or None."""
    said = words(revision)
    if principle.good and critique.strip().startswith(principle.good.strip()):
        return "no fault found"
    if not said:
        return "empty"
    if not ended:
        return "cut short"
    if said == words(before):
        return "unchanged"
    requests = [words(text.split(":", 1)[-1]) for text in (principle.critique, principle.revision)]
    if said in requests or any(len(r.split()) > 3 and r in said for r in requests) or said == words(critique):
        return "echo"
    return None


def compare_text(constitution: Constitution, prompt, a: str, b: str, principle: Principle) -> str:
    """What the judge reads before it chooses between a (the first option) and b."""
    fields = dict(prompt=conversation(prompt), a=a.strip(), b=b.strip(), principle=principle.comparison, shots="")
    if "{shots}" in constitution.comparison and constitution.comparison_shots:
        shots = []
        for i, shot in enumerate(constitution.comparison_shots):  # the right one first, then second, and so on
            sides = [shot["corrects"][0], shot["incorrects"][0]][:: 1 if i % 2 == 0 else -1]
            example = dict(prompt=shot["prompt"], a=sides[0], b=sides[1], principle=principle.comparison, shots="")
            shots.append(_fill(constitution.comparison, example) + constitution.answer + constitution.options[i % 2])
        fields["shots"] = "".join(f"{shot})\n\n" for shot in shots)
    return _fill(constitution.comparison, fields)


def _fill(template: str, fields: dict) -> str:
    """{name} -> its text, in one pass: braces within the texts stay what they are. A blank goes before an answer."""
    parts = re.split(r"{(\w+)}", template)
    text = parts[0]
    for name, rest in zip(parts[1::2], parts[2::2]):
        text = (join(text, fields[name]) if name in ("a", "b", "response") else text + fields[name]) + rest
    return text


# ---------------------------------------------------------------------------------------------------- judges
#
# A judge has two methods:
#     choose(texts, options) -> (N, K) probabilities of each option after each text; a row of NaN where it gave none
#     write(texts, stops, seed) -> [(what it writes next, whether it came to an end)]


class LocalJudge:
    """A language model of a folder."""

    def __init__(self, config: Config):
        model, self.tokenizer = gpt.load_policy(config.judge)
        self.model = gpt.shard(gpt.cast(model, gpt.compute_dtype(config.dtype)))
        self.config = config
        self.score = jax.jit(lambda model, batch: gpt.completion_logprobs(model, batch)[0])

    def encode(self, texts, more: int) -> list[list[int]]:
        """The texts' ids, with room for `more` behind each."""
        ids = [gpt.encode_prompt(text, self.tokenizer) for text in texts]
        longest, room = _width(max(map(len, ids))) + more, self.model.config.context
        if self.model.config.gpt2 and longest > room:
            raise ValueError(
                f"the judge has {room} positions, and a question with its answer needs {longest}: lower "
                "--prompt-length or --response-length, or leave out the constitution's examples (--no-examples)"
            )
        return ids

    def choose(self, texts, options):
        """Log-probs of the options, summed over their tokens and normalised over the options."""
        ends = [self.tokenizer.encode(option, after="\n") for option in options]
        ids, total = self.encode(texts, max(map(len, ends))), []
        for start in range(0, len(ids), self.config.batch_size):
            batch = self._batch(ids[start : start + self.config.batch_size], ends)
            total.append(gpt.to_numpy(self.score(self.model, gpt.put_batch(batch))))
        logprobs = np.concatenate(total)[: len(texts)]
        odds = np.exp(logprobs - logprobs.max(1, keepdims=True))
        return odds / odds.sum(1, keepdims=True)

    def _batch(self, ids, ends):
        """Each text once, with all options behind it."""
        ids = [*ids, *[ids[0]] * (self.config.batch_size - len(ids))]
        row = lambda text, end: (np.array(text + end, np.int32), np.repeat([0, 1], [len(text), len(end)]))
        longest = max(map(len, ids)) + sum(len(end) + 1 for end in ends)
        groups = [[row(text, end) for end in ends] for text in ids]
        return gpt.fork(groups, self.tokenizer.pad_id, (_width(longest), max(map(len, ends))))

    def write(self, texts, stops, seed: int):
        ids, size = self.encode(texts, self.config.response_length), self.config.batch_size
        key = jax.random.fold_in(jax.random.key(self.config.seed), seed)
        written = []
        for at in range(0, len(ids), size):
            written += self._write(ids[at : at + size], stops, jax.random.fold_in(key, at))
        return written

    def _write(self, ids, stops, key):
        n, ids = len(ids), [*ids, *[ids[0]] * (self.config.batch_size - len(ids))]
        width = _width(max(map(len, ids)))
        tokens = np.full((len(ids), width), self.tokenizer.pad_id, np.int32)
        mask = np.zeros_like(tokens)
        for row, real, text in zip(tokens, mask, ids):
            row[width - len(text) :], real[width - len(text) :] = text, 1
        batch = gpt.put_batch(dict(tokens=tokens, mask=mask))
        out = gpt.generate(
            self.model, batch["tokens"], batch["mask"], key, self.config.response_length,
            ends=self.tokenizer.end_ids, pad=self.tokenizer.pad_id,
        )  # fmt: skip
        return [finish(text, ended, stops) for text, ended in zip(*decoded(out, self.tokenizer))][:n]


def decoded(out: gpt.Generation, tokenizer):
    """(texts, whether each came to its end)."""
    ended = gpt.to_numpy(gpt.has_ended(out.tokens, out.mask, tokenizer.end_ids))
    return tokenizer.decode_rows(out.tokens, out.mask), ended.tolist()


def finish(text: str, ended: bool, stops):
    """(the text before any stop, whether it came to an end)."""
    short = cut(text, stops)
    return short, ended or len(short) < len(text.rstrip())


def _width(longest: int) -> int:
    return -(-longest // 16) * 16  # few shapes to compile


class FunctionJudge:
    """module:function(texts, options) -> (N, K) probabilities; a row that holds no numbers is no verdict."""

    def __init__(self, config: Config):
        self.name, self.function = config.judge, gpt.load_function(config.judge)

    def choose(self, texts, options):
        said, row = self.function(texts, options), len(options)
        p = np.array([[gpt.to_number(x) for x in r] if np.ndim(r) else [math.nan] * row for r in said], float)
        if p.shape != (len(texts), row) or (p < 0).any():
            raise ValueError(f"{self.name} must return ({len(texts)}, {row}) probabilities, not {said!r:.200}")
        total = p.sum(1, keepdims=True)
        return p / np.where(total > 0, total, math.nan)

    def write(self, texts, stops, seed):
        raise ValueError(f"--judge {self.name} is a function: it can choose, but not write critiques and revisions")


class EndpointJudge:
    """An OpenAI-compatible server, asked side by side, each question once: answers are kept in --out/judge-cache.jsonl
    under a hash of judge and question (which holds prompt, answers and principle). The key comes from JUDGE_API_KEY or
    OPENAI_API_KEY."""

    def __init__(self, config: Config):
        import httpx2

        self.config, self.errors = config, (httpx2.TransportError, httpx2.TimeoutException)
        key = os.environ.get("JUDGE_API_KEY") or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx2.Client(headers=headers, timeout=TIMEOUT)
        self.url = config.judge.rstrip("/")
        if not self.url.endswith("/completions"):
            self.url += "/chat/completions"
        self.chat = self.url.endswith("/chat/completions")
        self.lock, self.counts = threading.Lock(), Counter()
        self.path = Path(config.out) / "judge-cache.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.known = read_cache(self.path)
        self.file = open(self.path, "a")
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self.file.write("\n")  # after a line cut short by a kill

    def choose(self, texts, options):
        """Probabilities from the log-probs of the answer's tokens, or 0 and 1 from its text where there are none."""
        ask = {"max_tokens": 8, "temperature": 0.0}
        ask |= {"logprobs": True, "top_logprobs": 20} if self.chat else {"logprobs": 20}
        answers = self._ask_all(texts, ask, lambda choice: read_choice(choice, options), list(options))
        return np.array([[math.nan] * len(options) if answer is None else answer for answer in answers])

    def write(self, texts, stops, seed):
        ask = {"max_tokens": self.config.response_length, "temperature": 1.0, "stop": list(stops)[:4], "seed": seed}
        read = lambda choice: [*finish(text_of(choice), choice.get("finish_reason") == "stop", stops)]
        return [("", False) if answer is None else tuple(answer) for answer in self._ask_all(texts, ask, read, seed)]

    def _ask_all(self, texts, ask: dict, read, purpose):
        """read(choice) of the reply to each text, in order; None where no reply could be read. Equal texts are asked
        once, and those that the cache knows not at all."""
        who = [self.url, self.config.judge_model, ask, purpose]
        keys = [hashlib.sha256(json.dumps([*who, text]).encode()).hexdigest() for text in texts]
        new = {key: text for key, text in zip(keys, texts) if key not in self.known}
        self.counts["from the cache"] += len(texts) - len(new)
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                list(pool.map(lambda item: self._ask(*item, ask, read), new.items()))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [self.known[key] for key in keys]

    def _ask(self, key, text, ask, read):
        """Asks until an answer can be read, and keeps it; None where the server answers, but not to the question."""
        body = {"model": self.config.judge_model} | ask
        body |= {"messages": [{"role": "user", "content": text}]} if self.chat else {"prompt": text}
        reply = None  # or the error in its place
        for attempt in range(RETRIES + 1):
            if attempt:
                self.counts["retries"] += 1
                time.sleep(wait_before(attempt, reply))
            try:
                reply = self.client.post(self.url, json=body)
            except self.errors as error:
                reply = error
                continue
            if reply.status_code in (408, 409, 429) or reply.status_code >= 500:
                continue
            if reply.status_code != 200:
                raise ValueError(f"the judge at {self.config.judge} refuses ({reply.status_code}): {reply.text[:300]}")
            try:
                content = reply.json()
                answer = read(content["choices"][0])
            except (ValueError, LookupError, TypeError, AttributeError):
                continue
            return self._keep(key, answer, content.get("usage") or {})
        if getattr(reply, "status_code", 0) == 200:
            self.counts["unreadable"] += 1
            return self._keep(key, None, {})
        known = hasattr(reply, "status_code")
        why = f"{reply.status_code} {reply.text[:200]}" if known else f"{type(reply).__name__}: {reply}"
        raise ValueError(
            f"the judge at {self.config.judge} did not answer after {RETRIES + 1} tries ({why}). What it answered is "
            "kept: the same command with --resume goes on from there"
        )

    def _keep(self, key, answer, usage: dict):
        with self.lock:
            self.known[key] = answer
            self.file.write(json.dumps({"key": key, "answer": answer}) + "\n")
            self.file.flush()
            self.counts["requests"] += 1
            self.counts["tokens in"] += usage.get("prompt_tokens") or 0
            self.counts["tokens out"] += usage.get("completion_tokens") or 0

    def bill(self) -> str:
        return "judge: " + ", ".join(f"{self.counts[name]:,} {name}" for name in sorted(self.counts))


def read_cache(path: Path) -> dict:
    """key -> answer; lines cut short by a kill say nothing."""
    known = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            known[entry["key"]] = entry["answer"]
        except (ValueError, LookupError, TypeError):
            continue
    return known


def wait_before(attempt: int, reply) -> float:
    """Seconds: what the server asks for (Retry-After), else doubled each time, with a little noise so that threads that
    were refused together do not come back together."""
    asked = getattr(reply, "headers", {}).get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return min(float(asked), 60.0)
    return min(0.5 * 2 ** (attempt - 1), 30.0) * float(np.random.default_rng().uniform(0.8, 1.2))


def text_of(choice: dict) -> str:
    return choice["text"] if "text" in choice else choice["message"]["content"] or ""


def read_choice(choice: dict, options) -> list[float]:
    """Probabilities of the options from one choice of a reply, in either API's shape; ValueError if it chose none.

    The first token that decides between options is looked for: before it may stand blanks, brackets, quotes. A reply
    that begins with the article "a" has not chosen option A.
    """
    logprobs = choice.get("logprobs") or {}
    if logprobs.get("content"):
        steps = [
            (step["token"], {top["token"]: top["logprob"] for top in step["top_logprobs"]})
            for step in logprobs["content"]
        ]
    else:
        steps = list(zip(logprobs.get("tokens") or [], logprobs.get("top_logprobs") or []))
    names, said = [_bare(option) for option in options], ""
    text = text_of(choice) if {"text", "message"} & choice.keys() else "".join(token for token, _ in steps)
    if "a" in names and ARTICLE.match(_bare(text)):
        raise ValueError("the reply begins with an article, not with option A")
    for token, top in steps:
        mass = np.zeros(len(names))
        for candidate, logprob in (top or {}).items():
            reads = _bare(said + candidate)
            fits = [i for i, name in enumerate(names) if _begins(reads, name)]
            if len(fits) == 1:
                mass[fits[0]] += math.exp(logprob)
        if mass.sum() > 0.05:
            return (mass / mass.sum()).tolist()
        said += token
    fits = [i for i, name in enumerate(names) if _begins(_bare(text), name)]
    if len(fits) != 1:
        raise ValueError("no option in the reply")
    return [float(i == fits[0]) for i in range(len(names))]


# "A good answer" does not choose A; "A because", "A is better" and "A - it is kind" do
ARTICLE = re.compile(r"a[ \t]+(?!(?:because|since|as|is|was|has|does|over|seems|gives|wins)\b)\w")


def _bare(text: str) -> str:
    return text.strip(" \n\t([{\"'*`:.,)]}").lower()


def _begins(said: str, option: str) -> bool:
    """ "yes , it is" begins with "yes", "10" does not begin with "1"."""
    return re.match(re.escape(option) + r"(?!\w)", said) is not None


def open_judge(config: Config):
    if re.match(r"https?://", config.judge):
        return EndpointJudge(config)
    if ":" in config.judge:
        return FunctionJudge(config)
    return LocalJudge(config)


def start_judge(config: Config):
    """(judge, constitution) with the principles that this stage can ask about."""
    need = "critique" if config.stage == "revise" else comparison_need(config)
    return open_judge(config), load_constitution(config.constitution, config.principles, need, config.examples)


def comparison_need(config: Config) -> str:
    """What a principle must have for two answers to be compared by it."""
    return "good" if config.compare == "each" else "comparison"


# ---------------------------------------------------------------------------------------------------- judgements


def reason(judge, texts, stops, seed: int) -> list[str]:
    """Each text with the judge's chain of thought behind it (Bai et al., section 4.1)."""
    asked = [join(text, "Let's think step by step:") for text in texts]
    return [f"{join(text, thought)}\n\n" for text, (thought, _) in zip(asked, judge.write(asked, stops, seed))]


def prefer(judge, constitution: Constitution, prompts, a, b, principles, seed: int, config: Config):
    """P(a is better), NaN where the judge gave no verdict, and whether it sided with a position instead: (N,) each."""
    if config.compare == "each":
        p_a, p_b = (approval(judge, prompts, answers, principles) for answers in (a, b))
        return 0.5 + (p_a - p_b) / 2, np.zeros(len(a), bool)
    first = [compare_text(constitution, *row) for row in zip(prompts, a, b, principles)]
    second = [compare_text(constitution, *row) for row in zip(prompts, b, a, principles)]
    texts = first + second
    if config.chain_of_thought:
        texts = reason(judge, texts, constitution.stops, seed)
    texts = [text + constitution.answer for text in texts]
    p_first, p_second = np.split(judge.choose(texts, constitution.options)[:, 0], 2)
    return both_orders(p_first, p_second, CLAMP if config.chain_of_thought else (0.0, 1.0))


def both_orders(p_first, p_second, clamp=(0.0, 1.0)):
    """(P(a is better), sided with a position): from P(the first option) with a shown first, and with b shown first.

    Swapping a and b maps the result p to 1 - p, exactly."""
    p = np.clip((p_first + 1 - p_second) / 2, *clamp)
    return p, ((p_first > 0.5) == (p_second > 0.5)) & np.isfinite(p)


def approval(judge, prompts, responses, principles):
    """P(the critique says that the answer is good, and not that it is bad), (N,), each answer alone."""
    texts = [join(conversation(x), y) + p.critique for x, y, p in zip(prompts, responses, principles)]
    result = np.full(len(texts), np.nan)
    for options in {(p.good, *p.bad) for p in principles}:
        rows = [i for i, p in enumerate(principles) if (p.good, *p.bad) == options]
        result[rows] = judge.choose([texts[i] for i in rows], list(options))[:, 0]
    return result


def rate(judge, constitution: Constitution, prompts, responses) -> np.ndarray:
    """Scores in [-1, 1], each answer alone: d-RLAIF (Lee et al. 2023, section 2.3).

    With a `rating` template: s = sum_i i P(i) over the marks 0 to 9, then (s - 4.5) / 4.5. (The paper's 1 to 10 has a
    trap: where "10" is two tokens, P("1") holds P("10").) Else 2 P(good) - 1, the mean over the principles.
    """
    if constitution.rating:
        rows = [dict(prompt=conversation(x), response=y) for x, y in zip(prompts, responses)]
        texts = [_fill(constitution.rating, row) for row in rows]
        marks = judge.choose(texts, [str(i) for i in range(10)]) @ np.arange(10)
        return (marks - 4.5) / 4.5
    every = [approval(judge, prompts, responses, [p] * len(prompts)) for p in constitution.principles]
    return 2 * np.mean(every, axis=0) - 1


def rate_rubrics(judge, template: str, prompts, responses, rubrics) -> np.ndarray:
    """Scores in [0, 1] by a rubric of its own for each answer: sum_j w_j P(criterion j is met) / sum_j w_j, (N,)
    (rubrics as rewards with explicit aggregation: Gunjal et al. 2025, arXiv:2507.17746; the probability of
    "yes" is in the place of a verdict of 0 or 1). NaN where the judge gave no verdict on a criterion.

    `rubrics`: of each answer a list of {"criterion": text, "weight": a number above 0, or absent: 1}.
    """
    for rubric in rubrics:
        check_rubric(rubric)
    asked = [
        _fill(template, dict(prompt=conversation(x), response=y, criterion=item["criterion"]))
        for x, y, rubric in zip(prompts, responses, rubrics)
        for item in rubric
    ]
    met = judge.choose(asked, [" yes", " no"])[:, 0]
    ends = np.cumsum([len(rubric) for rubric in rubrics])
    weights = [[item.get("weight", 1.0) for item in rubric] for rubric in rubrics]
    return np.array([np.average(p, weights=w) for p, w in zip(np.split(met, ends[:-1]), weights)])


def check_rubric(rubric):
    """ValueError where a row's `rubric` is not a list of criteria with weights above 0."""
    if not isinstance(rubric, list) or not rubric:
        raise ValueError(f"a `rubric` must be a list with a criterion at least, not {rubric!r:.100}")
    for item in rubric:
        if not isinstance(item, dict) or not isinstance(item.get("criterion"), str):
            raise ValueError(f'a criterion of a `rubric` must be {{"criterion": text, "weight": 1}}, not {item!r:.100}')
        if unknown := item.keys() - {"criterion", "weight"}:
            raise ValueError(f"a criterion of a `rubric` has unknown keys: {', '.join(sorted(unknown))}")
        if not gpt.to_number(item.get("weight", 1.0)) > 0:
            what = f"the weight of {item['criterion']!r:.60} is {item['weight']!r}"
            raise ValueError(f"{what}: it must be above 0 (a fault becomes a criterion by saying that it is absent)")


# ---------------------------------------------------------------------------------------------------- rows, in parts


RESULTS = {"revise": "revisions", "label": "pairs"}


class Parts:
    """Work in batches that survives a kill: each batch's rows are a file of their own, written whole or not at all, and
    joined at the end. --resume goes on after the last one; a batch is a pure function of (seed, its number)."""

    def __init__(self, config: Config, batches: int):
        self.config, self.batches, self.folder = config, batches, config.out / f"parts-{config.stage}"
        settings = {f.name: str(getattr(config, f.name)) for f in dataclasses.fields(config)}
        for name in ("resume", "overwrite", "concurrency"):  # may change
            del settings[name]
        kept, done = self.folder / "settings.json", config.out / f"{RESULTS[config.stage]}.jsonl"
        if config.overwrite:
            gpt.remove(self.folder)
        elif done.exists() and not kept.exists():
            raise FileExistsError(f"{done} is there and finished: --overwrite makes it anew")
        if kept.exists():
            before = json.loads(kept.read_text())
            other = [f"--{n.replace('_', '-')} {before.get(n)}" for n in settings if before.get(n) != settings[n]]
            if not config.resume:
                raise FileExistsError(f"{self.folder} holds unfinished work: --resume goes on, --overwrite starts anew")
            if other:
                raise ValueError(f"{self.folder} was begun with {', '.join(other)}: --resume needs the same settings")
        self.folder.mkdir(parents=True, exist_ok=True)
        gpt.write_json(kept, settings)

    def __iter__(self):
        """Numbers of the batches that are still to be done."""
        done = [(self.folder / f"{i:06}.json").exists() for i in range(self.batches)]
        bar = gpt.progress(total=self.batches, initial=sum(done), desc=self.config.stage, unit="batch")
        for i in itertools.compress(range(self.batches), (not d for d in done)):
            yield i
            bar.update()
            if bar.disable and (i + 1) % max(self.batches // 5, 1) == 0:
                print(f"{self.config.stage}: {i + 1} of {self.batches} batches", flush=True)
        bar.close()

    def put(self, i: int, **files):
        """The rows of batch i, a list for each file that will be written, and `counts`."""
        gpt.write_json(self.folder / f"{i:06}.json", files)

    def join(self) -> dict:
        """Every batch's rows in order: {name: rows}, counts added up. Written to --out; the parts are removed. An error
        where nothing came of all batches: the counts say why."""
        parts = [json.loads((self.folder / f"{i:06}.json").read_text()) for i in range(self.batches)]
        counts = sum((Counter(part.pop("counts")) for part in parts), Counter())
        rows = {name: list(itertools.chain(*(part[name] for part in parts))) for name in parts[0]}
        if not rows[RESULTS[self.config.stage]]:
            why = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count)
            raise ValueError(f"no {RESULTS[self.config.stage]} came of {self.config.prompts:,} prompts: {why}")
        for name, lines in rows.items():
            gpt.write_rows(self.config.out / f"{name}.jsonl", lines)
        gpt.remove(self.folder)
        return rows | {"counts": counts}


def load_prompts(config: Config, tokenizer, data=None) -> gpt.Batches:
    prompts = gpt.Batches(
        data or config.data, "prompts", tokenizer, config.batch_size, config.prompt_length, config.seed,
        skip_bad=config.skip_bad_rows,
    )  # fmt: skip
    prompts.plan()  # refuses fewer prompts than a batch
    return prompts


def sample(policy, tokenizer, host, copies: int, key, config: Config):
    """`copies` answers to each prompt of a batch, one after the other: (texts, whether each came to its end)."""
    batch = gpt.put_batch({name: np.repeat(host[name], copies, axis=0) for name in ("tokens", "mask")})
    prompts, ends, pad = (batch["tokens"], batch["mask"]), tokenizer.end_ids, tokenizer.pad_id
    out = gpt.generate(policy, *prompts, key, config.response_length, ends=ends, pad=pad)
    return decoded(out, tokenizer)


# ---------------------------------------------------------------------------------------------------- stage: revise


def revise(judge, constitution: Constitution, prompts, responses, i: int, config: Config):
    """Transcripts of --rounds critiques and revisions: [{prompt, steps: [{text, ...}]}], and counts of faults."""
    transcripts = [{"prompt": conversation(x), "steps": [{"response": y}]} for x, y in zip(prompts, responses)]
    current, counts = list(responses), Counter()
    shots = "".join(constitution.critique_shots)
    for turn in range(config.rounds):
        principles = draw(constitution.principles, len(prompts), config.seed, i, turn)
        salt = (i * config.rounds + turn) * 2
        texts = [shots + join(conversation(x), y) + p.critique for x, y, p in zip(prompts, current, principles)]
        critiques = [text for text, _ in judge.write(texts, constitution.stops, salt)]
        texts = [join(text, critique) + p.revision for text, critique, p in zip(texts, critiques, principles)]
        revisions = judge.write(texts, constitution.stops, salt + 1)
        for j, ((revision, ended), critique, p) in enumerate(zip(revisions, critiques, principles)):
            wrong = fault(revision, ended, current[j], critique, p)
            counts[wrong or "revised"] += 1
            step = {"principle": p.name, "critique": critique.strip(), "revision": revision.strip()}
            transcripts[j]["steps"].append(step | ({"left out": wrong} if wrong else {}))
            current[j] = current[j] if wrong else revision.strip()
    return transcripts, counts


def revised_rows(prompts, transcripts) -> list[dict]:
    """Demonstrations: the prompt as it was and the last revision; nothing of the first answer, nothing of a critique.
    An answer that no revision changed makes no row."""
    rows = []
    for prompt, transcript in zip(prompts, transcripts):
        usable = [step["revision"] for step in transcript["steps"][1:] if "left out" not in step]
        rows += [demo_row(prompt, text) for text in usable[-1:]]
    return rows


def demo_row(prompt, text: str) -> dict:
    return {"prompt": prompt, "completion": " " + text}


def whole_answers(policy, tokenizer, prompts, i: int, key, copies: int, config: Config):
    """(prompts, answers) to batch i, `copies` each; those that did not end are left out."""
    host = prompts(i)
    asked = [row["prompt"] for row in prompts.rows(host) for _ in range(copies)]
    texts, ended = sample(policy, tokenizer, host, copies, jax.random.fold_in(key, i), config)
    whole = [(x, text.strip()) for x, text, end in zip(asked, texts, ended) if end and text.strip()]
    return [x for x, _ in whole], [text for _, text in whole]


def run_revise(config: Config):
    policy, tokenizer = gpt.load_policy(config.init)
    policy, prompts = gpt.shard(policy), load_prompts(config, tokenizer)
    helpful = load_prompts(config, tokenizer, config.helpful) if config.helpful else None
    judge, constitution = start_judge(config)
    keys, parts = jax.random.split(jax.random.key(config.seed)), Parts(config, -(-config.prompts // config.batch_size))
    for i in parts:
        asked, first = whole_answers(policy, tokenizer, prompts, i, keys[0], 1, config)
        transcripts, counts = revise(judge, constitution, asked, first, i, config)
        counts["answers that did not end"] += config.batch_size - len(asked)
        rows = dict(revisions=revised_rows(asked, transcripts), transcripts=transcripts)
        if helpful:
            answered = whole_answers(policy, tokenizer, helpful, i, keys[1], HELPFUL_SAMPLES, config)
            rows["helpful"] = [demo_row(*row) for row in zip(*answered)]
        parts.put(i, counts=counts, **rows)
    done = parts.join()
    print_counts(done["counts"], judge)
    files = [f"{config.out}/{name}.jsonl" for name in ("revisions", "helpful") if name in done]
    print_transcripts(done["transcripts"][:2])
    print(f"{len(done['revisions']):,} revisions in {files[0]}; transcripts of all in {config.out}/transcripts.jsonl")
    print(f"next: python sft.py --init out/base --data {' '.join(files)} --out out/sl-cai")


def print_transcripts(transcripts):
    """Prompt, answer, and each critique and revision under its principle."""
    for transcript in transcripts:
        print("=" * 100)
        print(transcript["prompt"].strip())
        for step in transcript["steps"]:
            for name, text in step.items():
                print(textwrap.fill(f"{name:>10}: {text}", 100, subsequent_indent=" " * 12))
            print()


def print_counts(counts, judge):
    print("  ".join(f"{name} {counts[name]:,}" for name in sorted(counts, key=lambda name: -counts[name])))
    if isinstance(judge, EndpointJudge):
        print(judge.bill())


# ---------------------------------------------------------------------------------------------------- stage: label


def sample_twice(policy, tokenizer, prompts, i: int, key, config: Config):
    """Two whole answers, not equal, to each prompt of batch i: (prompts, answers a, answers b, left out)."""
    host = prompts(i)
    texts, ended = sample(policy, tokenizer, host, 2, jax.random.fold_in(key, i), config)
    rows = zip((row["prompt"] for row in prompts.rows(host)), texts[::2], texts[1::2], ended[::2], ended[1::2])
    usable = [(x, a, b) for x, a, b, *ends in rows if all(ends) and a.strip() and b.strip() and a != b]
    return *([row[i] for row in usable] for i in range(3)), config.batch_size - len(usable)


def pair_row(prompt, a: str, b: str, p: float, principle: Principle) -> dict:
    """A row of the pairs' format: label_p = P(chosen is better) >= 1/2."""
    chosen, rejected = (a, b) if p >= 0.5 else (b, a)
    row = {"prompt": prompt, "chosen": " " + chosen.strip(), "rejected": " " + rejected.strip()}
    return row | {"label_p": round(max(p, 1 - p), 6), "principle": principle.name}


def run_label(config: Config):
    policy, tokenizer = gpt.load_policy(config.init)
    policy, prompts = gpt.shard(policy), load_prompts(config, tokenizer)
    judge, constitution = start_judge(config)
    key, parts = jax.random.key(config.seed + 1), Parts(config, -(-config.prompts // config.batch_size))
    for i in parts:
        *columns, left_out = sample_twice(policy, tokenizer, prompts, i, key, config)
        principles = draw(constitution.principles, len(columns[0]), config.seed, i)
        p, by_position = prefer(judge, constitution, *columns, principles, i, config)
        rows = [pair_row(*row) for row in zip(*columns, p.tolist(), principles) if math.isfinite(row[3])]
        counts = {"pairs": len(rows), "equal or unfinished answers": left_out}
        counts |= {"without a verdict": int(np.isnan(p).sum()), "sided with a position": int(by_position.sum())}
        parts.put(i, pairs=rows, counts=counts)
    done = parts.join()
    print_counts(done["counts"], judge)
    sure = np.mean([row["label_p"] for row in done["pairs"]])
    print(f"{len(done['pairs']):,} pairs in {config.out}/pairs.jsonl, mean P(chosen is better) {sure:.3f}")
    if config.compare == "pair":
        print(f"sided with a position: {done['counts']['sided with a position'] / max(len(done['pairs']), 1):.1%}")
    print_agreement(done["pairs"], config)
    print(f"next: python reward.py --data {config.out}/pairs.jsonl ... --out out/reward-ai, then ppo.py; or dpo.py")


# ---------------------------------------------------------------------------------------------------- agreement


def share_of(right, prompts) -> str:
    low, high = gpt.share_interval(right, gpt.same_prompt(prompts))
    return f"{np.mean(right):.3f} [{low:.3f}, {high:.3f}] of {len(right):,} pairs"


def agreement(rows, gold) -> dict[str, tuple[list, list]]:
    """{part: (whether the judge's choice has more of that part of gold, the prompt)} of the pairs that differ in it.

    A row is compared in the part that its principle is about, where gold has one of that name, and in gold as a whole.
    """
    found = {}
    asked = [row["prompt"] for row in rows]
    chosen, rejected = (gold(asked, [row[side] for row in rows], rows) for side in ("chosen", "rejected"))
    for row, better, worse in zip(rows, chosen, rejected):
        named = part_of(row.get("principle", ""))
        for part in {named, "gold"} & better.keys():
            if abs(better[part] - worse[part]) > 0:  # differ, and both are numbers
                right, prompts = found.setdefault(part, ([], []))
                right.append(better[part] > worse[part])
                prompts.append(row["prompt"])
    return dict(sorted(found.items()))


def print_agreement(rows, config: Config):
    if not config.gold or not rows:
        return
    function = gpt.load_function(config.gold)
    for part, found in agreement(rows, lambda *args: gpt.read_gold(function(*args))).items():
        print(f"judge agrees with {config.gold} in {part:9} {share_of(*found)}")


def run_agree(config: Config):
    """The judge against labels that are there already."""
    judge, constitution = start_judge(config)
    path = gpt.parse_sources(config.data)[0][0]
    rows = [row for _, row in gpt.read_rows(path, "pairs", config.skip_bad_rows)]
    rows = [rows[i] for i in np.random.default_rng(config.seed).permutation(len(rows))[: config.prompts]]
    side = lambda name: [row[name] if isinstance(row[name], str) else row[name][-1]["content"] for row in rows]
    principles = draw(constitution.principles, len(rows), config.seed)
    prompts = [row["prompt"] for row in rows]
    p, by_position = prefer(judge, constitution, prompts, side("chosen"), side("rejected"), principles, 0, config)
    told = np.isfinite(p)
    if not told.any():
        raise ValueError(f"{path}: the judge gave no verdict on any of its {len(rows):,} pairs")
    asked = list(itertools.compress(prompts, told))
    print(f"{path}: the judge agrees with the labels in {share_of(p[told] > 0.5, asked)}")
    print(f"without a verdict {(~told).sum():,}; sided with a position {by_position[told].mean():.1%}")
    judged = [pair_row(*row) for row in zip(prompts, side("chosen"), side("rejected"), p.tolist(), principles)]
    print_agreement(list(itertools.compress(judged, told)), config)
    if isinstance(judge, EndpointJudge):
        print(judge.bill())


# ---------------------------------------------------------------------------------------------------- for other scripts


def environment_config() -> Config:
    """The judge's settings where there is no command line: RLAIF_JUDGE=out/judge for --judge out/judge, and so on."""
    import tyro

    names = {f"RLAIF_{field.name.upper()}": field.name for field in dataclasses.fields(Config)}
    given = {key: value for key, value in os.environ.items() if key.startswith("RLAIF_")}
    if unknown := given.keys() - names.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: no setting of rlaif.py has this name: {', '.join(names)}")
    flags = [[f"--{names[key].replace('_', '-')}", *shlex.split(value)] for key, value in given.items()]
    return tyro.cli(Config, args=list(itertools.chain(*flags)), config=(tyro.conf.FlagConversionOff,))


@lru_cache(maxsize=1)
def environment_judge():
    """(config, judge), opened once."""
    config = environment_config()
    judge = open_judge(config)
    if jax.process_count() > 1 and isinstance(judge, LocalJudge):
        raise ValueError("several processes cannot share a judge in a folder: serve it, RLAIF_JUDGE=http://host/v1")
    return config, judge


def reward(prompts, responses, rows):
    """Scores of answers, in [-1, 1]: `RLAIF_JUDGE=out/judge python ppo.py --reward rlaif:reward`. An answer to a row
    with a `rubric` is scored by that, any other by the constitution."""
    config, judge = environment_judge()
    constitution = load_constitution(config.constitution, config.principles, "name", config.examples)
    prompts, scores = [row["prompt"] for row in rows], np.zeros(len(rows))
    by_rubric = np.array([row.get("rubric") is not None for row in rows])
    if by_rubric.any():
        some = lambda values: list(itertools.compress(values, by_rubric))
        rubrics = [row["rubric"] for row in some(rows)]
        scores[by_rubric] = 2 * rate_rubrics(judge, constitution.criterion, some(prompts), some(responses), rubrics) - 1
    if not by_rubric.all():
        some = lambda values: list(itertools.compress(values, ~by_rubric))
        scores[~by_rubric] = rate(judge, constitution, some(prompts), some(responses))
    told = np.isfinite(scores)
    if not told.all():
        print(f"rlaif:reward: {(~told).sum()} of {len(told)} answers without a verdict score 0", file=sys.stderr)
    return np.where(told, scores, 0.0)


def preference(prompts, a, b, rows):
    """P(a is better) of two answers to each prompt, (N,), NaN where the judge gave no verdict:
    `RLAIF_JUDGE=out/judge python online.py --judge rlaif:preference`."""
    config, judge = environment_judge()
    need = comparison_need(config)
    constitution = load_constitution(config.constitution, config.principles, need, config.examples)
    prompts = [row["prompt"] for row in rows]
    principles, seed = draw_by_text(constitution.principles, prompts, a, b), zlib.crc32(json.dumps([a, b]).encode())
    return prefer(judge, constitution, prompts, a, b, principles, seed, config)[0]


def draw_by_text(principles: list[Principle], prompts, a, b) -> list[Principle]:
    """A principle for each pair of answers, by a hash of the texts: the same in every run, whichever answer is a."""
    texts = (json.dumps([conversation(x), *sorted(answers)]) for x, *answers in zip(prompts, a, b))
    return [principles[int(hashlib.sha256(text.encode()).hexdigest(), 16) % len(principles)] for text in texts]


# ---------------------------------------------------------------------------------------------------- main


def main(config: Config):
    if jax.process_count() > 1:
        raise ValueError("rlaif.py works in one process, with all of its devices: run it on one host")
    for name, least in (("prompts", 1), ("batch_size", 1), ("rounds", config.stage == "revise")):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: 1 at least")
    gpt.start(config.seed)
    init = config.init or ("out/sft" if config.stage == "revise" else "out/sl-cai")
    {"revise": run_revise, "label": run_label, "agree": run_agree}[config.stage](dataclasses.replace(config, init=init))


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
