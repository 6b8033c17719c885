"""checks.py: which answers are a success, what a step on the way is paid, and what is kept apart for the report."""

import pytest

import checks
import gpt

WORDS = {"kind": "words", "n": 6}
INCLUDE = {"kind": "include", "n": 8, "word": "cold"}
PLAIN = {"kind": "plain", "n": 6}
LIST = {"kind": "list", "n": 3}


@pytest.mark.parametrize("row, answer, success", [
    (WORDS, "Foxes are small and quick.", True),
    (WORDS, "Foxes don't like well-lit places.", True),  # five words
    (WORDS, 'A fox said: "I am quick."', True),
    (WORDS, "Foxes are small and quick red animals.", False),  # seven
    (WORDS, "Foxes are small and quick", False),  # cut off
    (WORDS, "Foxes run. They are", False),  # cut off in the second
    (WORDS, "Foxes.", False),
    (WORDS, "", False),
    (WORDS, "Foxes are red. Foxes run.", False),  # two sentences
    (INCLUDE, "The Cold wind blows over the hills.", True),
    (INCLUDE, "The colder wind blows over the hills.", False),
    (INCLUDE, "The cold wind blows over all the green and old hills.", False),
    (PLAIN, "Foxes run over the hills.", True),
    (PLAIN, "Foxes, hens, and owls run.", False),
    (LIST, "1. Fox\n2. Red\n3. Quick tail", True),
    (LIST, "- fox\n- red\n\n- quick", True),
    (LIST, "fox, red, and quick.", True),
    (LIST, "1. Fox\n2. Fox\n3. Fox", False),
    (LIST, "1. Fox\n2. Red", False),
    (LIST, "Here is a list of words:\n1. Fox\n2. Red\n3. Quick", False),
    (LIST, "1. A fox is a quick animal\n2. Red\n3. Quick", False),
    (LIST, "1.\n2.\n3.", False),
    (LIST, "", False),
])  # fmt: skip
def test_truth_table(row, answer, success):
    assert checks.strict([""], [answer], [row]) == [{"gold": float(success), row["kind"]: float(success)}]
    paid = checks.reward([""], [answer], [row])[0]
    assert paid == 1 if success else 0 <= paid < 0.5


@pytest.mark.parametrize("row, worse, better", [
    (WORDS, "It is a very long text about a quick fox.", "It is a text about a quick fox."),
    (INCLUDE, "The wind blows over the hills.", "The cold wind blows over all the green and old hills."),
    (LIST, "1. Fox", "1. Fox\n2. Red"),
])  # fmt: skip
def test_a_step_on_the_way_is_paid_and_is_no_success(row, worse, better):
    low, high = checks.reward(["", ""], [worse, better], [row, row])
    assert low < high < 1


def test_every_kind_has_as_many_prompts_and_none_shares_topic_or_word_with_the_held_out_ones(tmp_path, capsys):
    checks.main(checks.Config(out=tmp_path, rows=64, heldout=16))
    rows, held = ([r for _, r in gpt.read_rows(tmp_path / f"{n}.jsonl", "prompts")] for n in
                  ("prompts", "prompts-heldout"))  # fmt: skip
    for part, size in ((rows, 16), (held, 4)):
        assert {kind: sum(row["kind"] == kind for row in part) for kind in checks.TEMPLATES} == dict.fromkeys(
            checks.TEMPLATES, size
        )
        assert len({row["prompt"][0]["content"] for row in part}) == len(part)
    for name in ("topic", "word"):
        assert not {row.get(name) for row in rows} & {row.get(name) for row in held} - {None}
    with pytest.raises(ValueError, match="more than the 720"):
        checks.make_rows(800, checks.TOPICS, checks.WORDS, 0)


def test_the_control_pays_for_nothing_that_can_be_learned():
    rows = checks.make_rows(640, checks.TOPICS, checks.WORDS, 0)
    prompts, answers = [row["prompt"][0]["content"] for row in rows], ["Foxes are quick."] * len(rows)
    paid = checks.chance(prompts, answers, rows)
    assert paid == checks.chance(prompts, answers, rows) and 0.45 < sum(paid) / len(paid) < 0.55
    by_kind = {kind: [x for x, row in zip(paid, rows) if row["kind"] == kind] for kind in checks.TEMPLATES}
    assert all(0.38 < sum(x) / len(x) < 0.62 for x in by_kind.values())
