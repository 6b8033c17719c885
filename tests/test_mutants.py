"""Every mutant of mutants.txt still applies: its line stands once in its file, what is put there is Python, and the
tests that should find it exist."""

import ast
import re
import shlex

import pytest
from mutants import MUTANTS, ROOT, mutate


def test_there_are_mutants_of_every_algorithm():
    files = [mutant.file for mutant in MUTANTS]
    assert len(MUTANTS) >= 60 and len(set(MUTANTS)) == len(MUTANTS)
    wanted = [
        "gpt", "sft", "reward", "ppo", "grpo", "dpo", "ipo_kto", "online", "rlaif", "prepare", "evaluate", "reasoning",
        "checks", "probe",
    ]  # fmt: skip
    assert {f"{name}.py" for name in wanted} == set(files)


@pytest.mark.parametrize("file", sorted({mutant.file for mutant in MUTANTS}))
def test_each_mutant_is_one_line_in_the_place_of_one(file):
    source = (ROOT / file).read_text()
    for mutant in (m for m in MUTANTS if m.file == file):
        assert mutant.instead.strip() != mutant.line
        ast.parse(mutate(source, mutant))


def test_the_tests_of_each_mutant_exist():
    for mutant in MUTANTS:
        file, *rest = shlex.split(mutant.tests)
        source = (ROOT / "tests" / file).read_text()
        words = re.findall(r"[\w]+", " ".join(rest[1:])) if rest else []
        assert rest[:1] in ([], ["-k"]) and all(word in source for word in words if word not in ("and", "or")), mutant
