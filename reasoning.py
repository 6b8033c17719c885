"""Tasks that a program can check, from reasoning-gym: its puzzles as prompts, its scorers as a reward.

    pip install reasoning-gym
    python reasoning.py --tasks chain_sum spell_backward         # writes data/reasoning: prompts, and held-out ones
    python grpo.py     --init models/mine --data data/reasoning/prompts.jsonl --reward reasoning:score ...
    python evaluate.py --models models/mine out/grpo --data data/reasoning/prompts-heldout.jsonl \
        --gold reasoning:gold ...

A row is the puzzle, {"question", "answer", "metadata"}, with a "prompt" that asks for the result inside <answer> tags
and the task as its "kind". What stands in the last pair of tags is scored by the task's own scorer, in [0, 1]. A
function sees text only, also of an answer that is cut off: with --missing-eos 0 such an answer is worth 0 at most.

Two controls belong beside every such run. What they reach is not owed to the reward (Shao et al. 2025, "Spurious
rewards", arXiv:2506.10947: some models improve by rewards that say nothing, since training sharpens what they knew):

    --reward reasoning:chance    0 or 1 by chance
    --reward reasoning:form      1 for one pair of tags with something in it, whatever that is

- Rows pass through JSON, which turns tuples into lists and keys into text. Some scorers then give a puzzle's own answer
  less than 1 (arc_agi and rearc of 0.1.25), and some puzzles have no single answer (rubiks_cube). A puzzle whose own
  answer does not score 1 as a row is left out, and counted.
- Some scorers hand the answer to Python's eval, or to sympy, which does the same (n_queens, countdown): whatever a
  policy writes would be run as a program. Such tasks are refused.
"""

import inspect
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

ASK = "Give the result as <answer>result</answer>, with nothing but the result inside the tags."


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("chain_sum", "spell_backward", "letter_counting")  # names of reasoning-gym's data sets
    out: Path = Path("data/reasoning")  # folder of the prompts
    rows: int = 600  # training prompts, as many of each task
    heldout: int = 150  # held-out prompts, which are no training prompts
    seed: int = 0


# ---------------------------------------------------------------------------------------------------- rewards


def tagged(response: str) -> list[str]:
    """What stands between <answer> and </answer>, for each pair."""
    return [text.strip() for text in re.findall(r"<answer>(.*?)</answer>", response, re.DOTALL)]


def library():
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(f"{error}: pip install reasoning-gym") from None
    return reasoning_gym


@lru_cache
def scorer(task: str):
    """The task's function (answer, entry) -> a number in [0, 1]. One whose source evaluates the answer is refused."""
    try:
        function = library().get_score_answer_fn(task)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{task}: reasoning-gym has no scorer of that name alone ({error})") from None
    if found := re.search(r"\b(?:eval|parse_expr)\((?!entry|metadata)[^)]*\)?", inspect.getsource(function)):
        raise ValueError(f"{task}: its scorer runs the answer as Python, {found[0]}: choose another of --tasks")
    return function


def score_one(row: dict, answer: str) -> float:
    """What the task's scorer gives an answer; 0 where it cannot read it. (It could read the row: see `make_rows`.)"""
    function = scorer(row["kind"])
    try:
        return float(function(answer, row))
    except Exception:  # scorers parse texts of every kind, and fail in as many ways
        return 0.0


def score(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The score of the last tagged answer, 0 without one: a reward function."""
    found = [tagged(response) for response in responses]
    return [score_one(row, answers[-1]) if answers else 0.0 for row, answers in zip(rows, found, strict=True)]


def gold(prompts: list[str], responses: list[str], rows: list[dict]) -> list[dict]:
    """The same as "gold" and under the task's name, and whether there was one pair of tags: for evaluate.py."""
    scores, forms = score(prompts, responses, rows), form(prompts, responses, rows)
    return [{"gold": s, row["kind"]: s, "form": f} for s, f, row in zip(scores, forms, rows, strict=True)]


def form(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A control: 1 for exactly one pair of tags that is not empty."""
    return [float(len(found := tagged(response)) == 1 and found[0] != "") for response in responses]


def chance(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A control: 0 or 1, drawn anew for every answer of every batch, so that the same text scores both ways. The texts
    of the batch are the seed: a run that is resumed draws the same."""
    seed = zlib.crc32("\0".join(responses).encode())
    return np.random.default_rng(seed).integers(0, 2, len(responses)).astype(float).tolist()


# ---------------------------------------------------------------------------------------------------- prompts


def make_rows(task: str, count: int, seed: int) -> tuple[dict[str, dict], int]:
    """`count` puzzles of a task by their text, and how many were left out because their own answer does not score 1."""
    scorer(task)  # refused, if at all, before a puzzle is made
    puzzles = library().create_dataset(task, size=4 * count + 20, seed=seed)
    rows, wrong = {}, 0
    for puzzle in puzzles:
        content = f"{puzzle['question'].strip()}\n\n{ASK}"
        row = {"prompt": [{"role": "user", "content": content}], "kind": task} | puzzle
        row = json.loads(json.dumps(row, default=str))  # as it will be read
        if score_one(row, row["answer"]) != 1:
            wrong += 1
        else:
            rows.setdefault(content, row)
        if len(rows) == count:
            return rows, wrong
    raise ValueError(
        f"{task}: of {len(puzzles):,} puzzles {len(rows):,} can be used, {wrong:,} do not give their own answer 1, the "
        f"rest are repeated; {count:,} were asked for. Ask for fewer --rows, or leave the task out"
    )


def main(config: Config):
    import gpt  # here, so that the rewards alone are imported without JAX

    train, held = (n // len(config.tasks) for n in (config.rows, config.heldout))
    made = {task: make_rows(task, train + held, config.seed) for task in config.tasks}
    left_out = Counter({task: wrong for task, (_, wrong) in made.items() if wrong})
    config.out.mkdir(parents=True, exist_ok=True)
    for name, part in {"prompts": slice(train), "prompts-heldout": slice(train, None)}.items():
        rows = [row for task_rows, _ in made.values() for row in list(task_rows.values())[part]]
        gpt.write_rows(config.out / f"{name}.jsonl", rows)
        print(f"{config.out}/{name}.jsonl: {len(rows):,} prompts of {len(made)} tasks")
    for task, wrong in left_out.items():
        print(f"left out: {wrong:,} puzzles of {task}, whose own answer does not score 1")


if __name__ == "__main__":
    import gpt

    gpt.cli(main, Config, __doc__)
