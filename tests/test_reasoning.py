"""reasoning.py with a stand-in for reasoning-gym, which has its two functions: puzzles as rows, scores, controls."""

import json
import sys
from types import SimpleNamespace

import pytest

import reasoning


class Sums:
    """a + b = ?, with a tuple among what is known of it, which JSON turns into a list."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i >= self.size:
            raise IndexError
        a, b = (self.seed + i) % 50, i // 2
        return {"question": f"{a} + {b} = ?", "answer": str(a + b), "metadata": {"parts": (a, b)}}

    @staticmethod
    def score_answer(answer, entry):
        return 1.0 if int(answer) == int(entry["answer"]) else 0.25

    @staticmethod
    def as_lists(answer, entry):
        """A scorer that compares with a tuple."""
        return 1.0 if isinstance(entry["metadata"]["parts"], tuple) else 0.05

    @staticmethod
    def run(answer, entry):
        return float(eval(answer) == eval(entry["answer"]))


SCORERS = {"sums": Sums.score_answer, "tuples": Sums.as_lists, "programs": Sums.run}


@pytest.fixture(autouse=True)
def gym(monkeypatch):
    def find(name):
        if name not in SCORERS:
            raise ValueError(f"Dataset {name!r} not registered")
        return SCORERS[name]

    library = SimpleNamespace(create_dataset=lambda task, size, seed: Sums(size, seed), get_score_answer_fn=find)
    monkeypatch.setitem(sys.modules, "reasoning_gym", library)
    reasoning.scorer.cache_clear()
    yield
    reasoning.scorer.cache_clear()


def made(tmp_path, **options):
    reasoning.main(reasoning.Config(tasks=("sums",), out=tmp_path, **options))
    read = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    return read("prompts"), read("prompts-heldout")


def test_puzzles_become_rows_whose_own_answers_score_1(tmp_path):
    train, held = made(tmp_path, rows=20, heldout=6)
    assert (len(train), len(held)) == (20, 6)
    contents = [row["prompt"][0]["content"] for row in train + held]
    assert len(set(contents)) == 26 and contents[0].startswith("0 + 0 = ?") and reasoning.ASK in contents[0]
    texts = [f"It is 3, no: <answer>{row['answer']}</answer>." for row in train]
    assert reasoning.score(contents, texts, train) == [1.0] * 20


def test_the_last_tagged_answer_counts_and_what_cannot_be_read_scores_0(tmp_path):
    row = made(tmp_path, rows=20, heldout=6)[0][4]
    answer = row["answer"]
    texts = {
        f"<answer> {answer}\n</answer>": 1, f"<answer>99</answer> <answer>{answer}</answer>": 1,
        f"<answer>{answer}</answer> <answer>99</answer>": 0.25, answer: 0, f"<answer>{answer}": 0,
        "<answer>three</answer>": 0, "<answer></answer>": 0, "": 0,
    }  # fmt: skip
    rows = [row] * len(texts)
    assert reasoning.score([""] * len(texts), list(texts), rows) == list(texts.values())
    judged = reasoning.gold([""] * len(texts), list(texts), rows)
    assert [x["gold"] for x in judged] == [x["sums"] for x in judged] == list(texts.values())
    assert [x["form"] for x in judged] == [1, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    "task, message",
    [
        ("tuples", "0 can be used, 44 do not give their own answer 1"),
        ("programs", r"runs the answer as Python, eval\(answer\)"),
        ("riddles", "no scorer of that name"),
    ],
)
def test_a_task_that_cannot_be_a_reward_is_refused(task, message):
    with pytest.raises(ValueError, match=message):
        reasoning.make_rows(task, 6, seed=0)


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="pip install reasoning-gym"):
        reasoning.make_rows("sums", 6, seed=0)


def test_chance_pays_the_same_text_both_ways_and_a_resumed_run_the_same():
    texts = ["the same"] * 400
    rewards = reasoning.chance(texts, texts, [{}] * 400)
    assert set(rewards) == {0.0, 1.0} and 150 < sum(rewards) < 250
    assert rewards == reasoning.chance(texts, texts, [{}] * 400)
    assert rewards[1:] != reasoning.chance(texts, ["another", *texts[1:]], [{}] * 400)[1:]
