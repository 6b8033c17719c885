"""Instructions whose truth a program knows: prompts for a real chat model, and the functions that check its answers.

    python checks.py                                             # writes data/checks: prompts, and held-out ones
    python grpo.py     --init models/smollm2 --data data/checks/prompts.jsonl --reward checks:reward --missing-eos 0 ...
    python evaluate.py --data data/checks/prompts-heldout.jsonl --gold checks:strict ...

Four kinds of instruction. A chat model of 135M parameters follows each of them in 5% to 40% of its answers, so that
there is something to reinforce and something to learn (docs/real.md has the rates):

    words    Describe foxes in at most 12 words.
    include  Write one sentence about foxes with the word "cold" in it. Use at most 12 words.
    plain    Write one short sentence about foxes without any comma. Use at most 10 words.
    list     Give me a list of exactly 3 words about foxes.

- Each check has parts, numbers in [0, 1]. An answer is a success where all parts are 1: `strict` reports that alone.
- `reward` also pays for steps on the way: 1 for a success, else half the mean of the parts. An answer that is cut off
  is no success, but a function sees text only: train with --missing-eos 0, so that it is worth 0 at most.
- Topics and words of the held-out prompts occur in no training prompt.
- A check reads the form of an answer, not its sense: "Foxes are foxes." has at most 9 words. That is what a policy
  then learns to exploit; the perplexity on other text and the samples show what it cost.
- `chance` is a control: it throws a coin for every answer, from which nothing can be learned. Give it
  --missing-eos None, or answers that end are paid more, and short answers follow more often.
"""

import random
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# fmt: off
TOPICS = [
    "foxes", "bread", "music", "winter", "trains", "bees", "mountains", "coffee", "books", "gardens", "cats", "snow",
    "bridges", "cheese", "dancing", "summer", "boats", "wolves", "islands", "tea", "films", "forests", "horses",
    "rain", "castles", "soup", "singing", "autumn", "bicycles", "owls", "deserts", "honey", "letters", "parks", "dogs",
    "wind", "towers", "pasta", "painting", "morning", "buses", "ants", "lakes", "salt", "poems", "farms", "mice",
    "fog", "roads", "rice", "chess", "holidays", "planes", "frogs", "caves", "sugar", "stories", "fields", "hens",
    "ice",
]
HELD_TOPICS = [
    "rivers", "spiders", "thunder", "libraries", "apples", "football", "spring", "lorries", "whales", "valleys",
    "pepper", "maps", "orchards", "goats", "clouds", "harbours", "onions", "drums", "midnight", "kites",
]
WORDS = [
    "old", "water", "small", "night", "green", "sweet", "bright", "slow", "tall", "loud", "happy", "quiet", "white",
    "round", "warm", "early", "strong", "deep", "gold", "long", "heavy", "soft", "red", "light", "busy", "clean",
    "dark", "free", "fresh", "gentle", "hard", "high", "new", "open", "plain", "quick", "rich", "safe", "thin", "wide",
]
HELD_WORDS = [
    "blue", "cold", "young", "sharp", "brown", "empty", "smooth", "late", "dry", "simple", "calm", "narrow", "proud",
    "sour", "rare", "mild",
]
# fmt: on
TEMPLATES = {
    "words": "Describe {topic} in at most {n} words.",
    "include": 'Write one sentence about {topic} with the word "{word}" in it. Use at most {n} words.',
    "plain": "Write one short sentence about {topic} without any comma. Use at most {n} words.",
    "list": "Give me a list of exactly {n} words about {topic}.",
}
SIZES = {"words": (10, 14), "include": (10, 14), "plain": (8, 12), "list": (3, 5)}  # n, from .. to


@dataclass(frozen=True)
class Config:
    out: Path = Path("data/checks")  # folder of the prompts
    rows: int = 640  # training prompts, 720 at most
    heldout: int = 160  # held-out prompts, 240 at most
    seed: int = 0


# ---------------------------------------------------------------------------------------------------- checks


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+(?:['’-]\w+)*", text)


def sentences(text: str) -> int:
    """How many sentences end in the text; 0 where its last one does not."""
    text = text.strip().rstrip("\"'”’)")
    return len(re.findall(r"[.!?]+(?=\s|$)", text)) if text.endswith((".", "!", "?")) else 0


def list_items(text: str) -> list[str]:
    """The items of a list, a line each or separated by commas, in lower case, without numbers and bullets."""
    lines = [line for line in text.strip().rstrip(".").lower().splitlines() if line.strip()]
    items = lines if len(lines) > 1 else re.split(r",\s*(?:and\s+)?", "".join(lines))
    return [re.sub(r"^\s*(?:\d+[.)]|[-*•])\s*", "", item).strip(" .") for item in items]


def brief(text: str, n: int) -> float:
    """1 for a text of 3 to n words, less the more words it has."""
    count = len(words_of(text))
    return min(1.0, n / count) if count >= 3 else 0.0


def parts(row: dict, response: str) -> list[float]:
    """How far each demand of the row's instruction is met, in [0, 1]: {"kind", "n", "word"} -> its numbers."""
    kind, n = row["kind"], row["n"]
    if kind == "list":
        items = list_items(response)
        short = [1 <= len(words_of(item)) <= 3 for item in items]
        return [max(0.0, 1 - abs(len(items) - n) / n), sum(short) / len(items), len(set(items)) / len(items)]
    found = [brief(response, n), float(sentences(response) == 1)]
    if kind == "include":
        found.append(float(row["word"] in [word.lower() for word in words_of(response)]))
    if kind == "plain":
        found.append(float("," not in response))
    return found


def reward(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """1 for a success, else half the mean of the parts: a reward function."""
    met = [parts(row, response) for row, response in zip(rows, responses, strict=True)]
    return [1.0 if min(x) == 1 else 0.5 * sum(x) / len(x) for x in met]


def strict(prompts: list[str], responses: list[str], rows: list[dict]) -> list[dict]:
    """1 for a success, else 0, as "gold" and under the name of the row's kind: for evaluate.py --gold."""
    met = [float(min(parts(row, response)) == 1) for row, response in zip(rows, responses, strict=True)]
    return [{"gold": success, row["kind"]: success} for row, success in zip(rows, met)]


def chance(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A control: 0 or 1, drawn anew for every answer of every batch, so that the same text scores both ways. The texts
    of the batch are the seed: a run that is resumed draws the same."""
    seed = zlib.crc32("\0".join(responses).encode())
    return np.random.default_rng(seed).integers(0, 2, len(responses)).astype(float).tolist()


# ---------------------------------------------------------------------------------------------------- prompts


def make_rows(count: int, topics: list[str], words: list[str], seed: int) -> list[dict]:
    """As many prompts of each kind, in the chat form, with what the checks need to know; no prompt twice."""
    low, high = SIZES["list"]  # the kind with the fewest prompts
    if count > (most := len(TEMPLATES) * len(topics) * (high - low + 1)):
        raise ValueError(f"{count:,} prompts are more than the {most:,} that {len(topics)} topics give")
    rng, rows, kinds = random.Random(seed), {}, list(TEMPLATES)
    while len(rows) < count:
        kind = kinds[len(rows) % len(kinds)]
        facts = {"topic": rng.choice(topics), "n": rng.randint(*SIZES[kind])}
        facts |= {"word": rng.choice(words)} if kind == "include" else {}
        text = TEMPLATES[kind].format(**facts)
        rows.setdefault(text, {"prompt": [{"role": "user", "content": text}], "kind": kind} | facts)
    return list(rows.values())


def main(config: Config):
    import gpt  # here, so that the checks alone are imported without JAX

    files = {
        "prompts": make_rows(config.rows, TOPICS, WORDS, config.seed),
        "prompts-heldout": make_rows(config.heldout, HELD_TOPICS, HELD_WORDS, config.seed + 1),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        gpt.write_rows(config.out / f"{name}.jsonl", rows)
        print(f"{config.out}/{name}.jsonl: {len(rows):,} prompts, such as {rows[1]['prompt'][0]['content']!r}")


if __name__ == "__main__":
    import gpt

    gpt.cli(main, Config, __doc__)
