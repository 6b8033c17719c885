"""Short pure functions that stand in several scripts, since none imports another, do the same."""

import ast
import inspect
from collections import Counter

import numpy as np
import pytest

import checks
import dpo
import evaluate
import gpt
import grpo
import ipo_kto
import ppo
import probe
import reasoning
import reward
import rlaif
from tools import plot


@pytest.mark.parametrize("module", [checks, dpo, evaluate, gpt, grpo, ipo_kto, ppo, probe, reward, rlaif])
def test_no_name_of_a_file_is_given_twice(module):
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names += [getattr(node, "name", "")] + [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)]
    assert [name for name, count in Counter(filter(None, names)).items() if count > 1] == []


def test_sigmoids():
    x = np.linspace(-800, 800, 3201)
    with np.errstate(over="raise"):
        np.testing.assert_array_equal(evaluate._sigmoid(x), reward._sigmoid(x))
    small = x[np.abs(x) < 30]
    np.testing.assert_allclose(reward._sigmoid(small), 1 / (1 + np.exp(-small)), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "folders",
    [
        [],
        ["out/a"],
        ["out/a", "out/b/", "out/a"],
        ["one/ppo", "two/ppo"],
        ["x/1/a", "x/2/a", "y/1/a"],
        ["a", "./a", "/a"],
    ],
)
def test_short_names(folders):
    assert evaluate.short_names(folders) == plot.short_names(folders)


def test_markdown():
    rows = [["a", "b"], ["---", "---"], ["1", ""]]
    assert evaluate.markdown(rows) == plot.markdown(rows) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_the_control_that_pays_by_chance():
    assert inspect.getsource(checks.chance) == inspect.getsource(reasoning.chance)


@pytest.mark.parametrize("name", ["importance_weights", "sampler", "chunks"])
def test_how_rollouts_are_sampled_and_weighed(name):
    assert inspect.getsource(getattr(ppo, name)) == inspect.getsource(getattr(grpo, name)) and ppo.CAP == grpo.CAP


def test_what_learns_from_rows_against_a_reference():
    assert inspect.getsource(dpo.heldout_means) == inspect.getsource(ipo_kto.heldout_means)


@pytest.mark.parametrize("name", ["normalize", "load_prompts", "suffix_ids", "resolve"])
def test_what_scores_are_normalised_on(name):
    assert inspect.getsource(getattr(probe, name)) == inspect.getsource(getattr(reward, name))
