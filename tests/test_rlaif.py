"""rlaif.py: constitutions, critique and revision, judges in one process and behind an endpoint, labels."""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest

import gpt
import online
import rlaif
import toy

ROOT = Path(__file__).resolve().parent.parent
NICE = rlaif.Principle("nice0", " Judge: a b", " Judge: c d Assistant:", " Judge: e", " yes", (" no",))
DULL = rlaif.Principle("dull0", " Judge: f g h", " Judge: g Assistant:", " Judge: h", " yes", (" no",))


@pytest.fixture(scope="module")
def world(tmp_path_factory, words):
    """A folder with a model (all of its 18 words about equally likely), prompts and a constitution in its words."""
    path = tmp_path_factory.mktemp("ai")
    shape = gpt.make_config(vocab_size=18, context=64, layers=1, heads=2, dim=16)
    gpt.save(path / "model", jax.jit(lambda key: gpt.init(shape, key))(jax.random.key(0)), gpt.load_tokenizer(words))
    rows = [{"prompt": f"Human: {x} {y} Assistant:"} for x in "abcdefgh" for y in "abcd"]
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entry = lambda p: dict(
        prompt=[p.critique], edit_request=p.revision, comparison=p.comparison, good=p.good, bad=p.bad
    )
    content = {"critiques": {p.name: entry(p) for p in (NICE, DULL)}, "stops": ["Judge:", "Human:", "Assistant:"]}
    content |= {"comparison": "{prompt}{a} Assistant:{b}{principle}", "answer": "", "options": [" a", " b"]}
    (path / "constitution.json").write_text(json.dumps(content))
    return path


@pytest.fixture
def config(world, tmp_path):
    return rlaif.Config(
        init=str(world / "model"), judge=str(world / "model"), constitution=(str(world / "constitution.json"),),
        data=(str(world / "prompts.jsonl"),), helpful=None, out=tmp_path / "out", prompts=16, batch_size=8,
        prompt_length=8, response_length=24, rounds=2, gold=None,
    )  # fmt: skip


def read(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------- constitutions


def test_the_projects_constitution_is_whole():
    for need, least in (("critique", 12), ("comparison", 12)):
        constitution = rlaif.load_constitution([ROOT / "constitution.json"], need=need)
        assert len(constitution.principles) >= least
    for principle in rlaif.load_constitution([ROOT / "constitution.json"]).principles:
        assert principle.critique.endswith("Critique:") and principle.revision.endswith("Revision:")
    text = rlaif.compare_text(constitution, "\n\nHuman: {a}?\n\nAssistant:", " X", " Y", constitution.principles[0])
    assert text.count(" (A) ") == 4 and "Human: {a}?" in text  # three examples, and braces of the prompt stay
    assert text.endswith(" (A) X\n (B) Y\n\n") and text.count("Options:\n") == 4
    assert "(B) I won't help with reading" not in text and text.count("The answer is: (A)") == 2  # the place alternates


def test_constitutions_in_the_shapes_that_others_publish(tmp_path):
    files = {
        "critiques": {"harmful0": {"prompt": ["\n\nCritiqueRequest: x\n\nCritique:"], "edit_request": "\n\nRevision:"}},
        "principles": ["\nChoose well. Options:", "\nChoose better. Options:"],
        "shots": ["\n\nHuman: a\n\nAssistant: b\n\nCritiqueRequest: x\n\nCritique: y\n\nRevision: z\n\n"],
        "pairs": [{"prompt": "\n\nHuman: a\n\nAssistant:", "corrects": ["good"], "incorrects": ["bad"]}],
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    paths = [tmp_path / name for name in files]
    constitution = rlaif.load_constitution(paths)
    assert [p.name for p in constitution.principles] == ["harmful0"]
    assert constitution.critique_shots == files["shots"]
    compare = rlaif.load_constitution(paths, need="comparison")
    assert [p.comparison for p in compare.principles] == files["principles"]
    assert " (A) good\n (B) bad\n\nThe answer is: (A)" in rlaif.compare_text(
        compare, "p", "x", "y", compare.principles[0]
    )


@pytest.mark.parametrize(
    "content, pattern, need, message",
    [
        ('{"critiques": {"x0": {"prompt": "p", "edit_request": "r"}}}', "y*", "critique", "called 'y\\*'.*x0"),
        ('{"critiques": {"x0": {"prompt": "p", "edit_request": "r"}}}', "*", "good", "--compare pair does without"),
        ('{"critiques": {"x0": {"prompt": "p"}}}', "*", "critique", "'x0' has neither"),
        ('{"critiques": {}, "rules": []}', "*", "critique", "unknown key 'rules'"),
        ("{", "*", "critique", "is not JSON"),
        (None, "*", "critique", "no constitution"),
    ],
)
def test_a_constitution_that_can_not_be_used_is_refused_in_words(tmp_path, content, pattern, need, message):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        rlaif.load_constitution([path], pattern, need)


def test_the_toy_worlds_constitution_speaks_its_words_and_names_parts_of_gold(tmp_path):
    path = tmp_path / "constitution.json"
    path.write_text(json.dumps(toy.constitution()))
    vocabulary = set(toy.tokenizer_files()["tokenizer.json"]["model"]["vocab"])
    principles = rlaif.load_constitution([path], need="good").principles
    assert {rlaif.part_of(p.name) for p in principles} == {"harmless", "honest", "polite"}
    for principle in principles:
        assert set(" ".join([*principle[1:5], *principle.bad]).split()) <= vocabulary


def test_principles_are_drawn_uniformly_and_anew_for_each_row_and_step():
    sixteen = [NICE._replace(name=f"p{i}") for i in range(16)]
    names = [p.name for step in range(40) for p in rlaif.draw(sixteen, 100, 0, step)]
    counts = np.array(list(Counter(names).values()))
    assert len(counts) == 16
    assert ((counts - 250) ** 2 / 250).sum() < 37.7  # chi-squared, 15 degrees of freedom, p = 0.001
    assert names[:100] != names[100:200]
    assert rlaif.draw(sixteen, 5, 0, 3) == rlaif.draw(sixteen, 5, 0, 3)


# ---------------------------------------------------------------------------------------------------- revisions


@pytest.mark.parametrize(
    "revision, ended, critique, expected",
    [
        ("e f", True, "no it is bad", None),
        ("", True, "no", "empty"),
        (" ?! ", True, "no", "empty"),
        ("e f", False, "no", "cut short"),
        ("Before it .", True, "no", "unchanged"),
        ("c d Assistant", True, "no", "echo"),  # the wish for a revision, said back
        ("no , it is bad .", True, "no it is bad", "echo"),  # the critique, said again
        ("e f", True, "yes , all is well", "no fault found"),
    ],
)
def test_what_is_wrong_with_a_revision(revision, ended, critique, expected):
    assert rlaif.fault(revision, ended, "before it", critique, NICE) == expected


def test_texts_end_before_the_next_turn():
    assert rlaif.finish("a b\n\nHuman: c", False, rlaif.STOPS) == ("a b", True)
    assert rlaif.finish("a b", False, rlaif.STOPS) == ("a b", False)
    assert rlaif.finish("a b ", True, rlaif.STOPS) == ("a b", True)
    assert rlaif.join("Assistant:", "yes") == "Assistant: yes" and rlaif.join("A\n", "yes") == "A\nyes"


class Scribe:
    """A judge that writes what the script says, and remembers what it read."""

    def __init__(self, *script):
        self.script, self.seen = list(script), []

    def write(self, texts, stops, seed):
        self.seen.append(texts)
        return [(self.script.pop(0), True) for _ in texts]


def test_each_round_starts_from_the_last_revision_and_rows_hold_prompt_and_revision_alone(config):
    constitution = rlaif.Constitution([NICE], "", "", [], None, [], ["SHOTS "], [])
    judge = Scribe("no 1", "no 2", "better 1", "worse 2", "no 3", "no 4", "best 1", "worse 2")
    prompts = ["Human: p Assistant:", [{"role": "user", "content": "q"}]]
    transcripts, counts = rlaif.revise(judge, constitution, prompts, ["first 1", "first 2"], 0, config)
    assert judge.seen == [
        ["SHOTS Human: p Assistant: first 1 Judge: a b", "SHOTS \n\nHuman: q\n\nAssistant: first 2 Judge: a b"],
        [
            "SHOTS Human: p Assistant: first 1 Judge: a b no 1 Judge: c d Assistant:",
            "SHOTS \n\nHuman: q\n\nAssistant: first 2 Judge: a b no 2 Judge: c d Assistant:",
        ],
        ["SHOTS Human: p Assistant: better 1 Judge: a b", "SHOTS \n\nHuman: q\n\nAssistant: worse 2 Judge: a b"],
        [
            "SHOTS Human: p Assistant: better 1 Judge: a b no 3 Judge: c d Assistant:",
            "SHOTS \n\nHuman: q\n\nAssistant: worse 2 Judge: a b no 4 Judge: c d Assistant:",
        ],
    ]
    assert counts == {"revised": 3, "unchanged": 1}
    last = rlaif.revised_rows(prompts, transcripts)
    assert last == [{"prompt": p, "completion": c} for p, c in zip(prompts, (" best 1", " worse 2"))]


def test_the_revise_stage_writes_demonstrations_and_shows_transcripts(config, world, capsys):
    config = replace(config, helpful=config.data)
    rlaif.main(config)
    assert not list(config.out.glob("parts-*"))
    transcripts = read(config.out / "transcripts.jsonl")
    revisions = [row for _, row in gpt.read_rows(config.out / "revisions.jsonl", "demos")]
    assert transcripts and all(set(row) == {"prompt", "completion"} for row in revisions)
    usable = [t for t in transcripts if any("left out" not in step for step in t["steps"][1:])]
    assert len(revisions) == len(usable)
    assert all(row["prompt"].startswith("Human:") for row in read(config.out / "helpful.jsonl"))
    said = capsys.readouterr().out
    assert "next: python sft.py" in said and "unchanged" in said or "revised" in said
    assert said.count("=" * 100) == 2 and "principle: " in said and "critique: " in said


# ---------------------------------------------------------------------------------------------------- judges


def test_a_model_chooses_by_the_summed_logprobs_of_whole_options(config):
    judge = rlaif.LocalJudge(config)
    texts = ["Human: a b Assistant: c Judge:", "Human: a Assistant:"] + ["Human: b Assistant:"] * 8
    options = [" yes", " no a", " no b"]
    found = judge.choose(texts, options)
    for text, p in zip(texts, found):
        scores = []
        for option in options:
            ids, end = judge.tokenizer.encode(text), judge.tokenizer.encode(option)
            row = np.array([(ids + end + [0] * 20)[:20]])  # one width: what follows does not matter
            logprobs = jax.jit(gpt.token_logprobs)(judge.model, row)[0]
            scores.append(float(logprobs[len(ids) - 1 : len(ids + end) - 1].sum()))
        np.testing.assert_allclose(p, np.exp(scores) / np.exp(scores).sum(), rtol=1e-4)
    assert found.shape == (10, 3) and np.abs(found[0] - found[1]).max() > 1e-3


def favour(texts, options):
    """P(the first option), by the letters of the text."""
    p = np.array([(text.count("c") + 1) / 10 for text in texts])
    return np.stack([p, 1 - p], 1)


def test_a_function_judges_and_bad_ones_are_named(config):
    judge = rlaif.open_judge(replace(config, judge="test_rlaif:favour"))
    np.testing.assert_allclose(judge.choose(["c c", "a"], [" yes", " no"]), [[0.3, 0.7], [0.1, 0.9]])
    with pytest.raises(ValueError, match="can choose, but not write"):
        judge.write(["x"], [], 0)
    judge.function = lambda texts, options: [[0.5] * 3]
    with pytest.raises(ValueError, match=r"must return \(2, 2\) probabilities"):
        judge.choose(["a", "b"], [" yes", " no"])


def test_each_answer_alone_ties_are_split(config):
    judge = rlaif.open_judge(replace(config, judge="test_rlaif:favour"))
    p, by_position = rlaif.prefer(judge, None, ["p", "p"], ["c c c", "a"], ["a", "a"], [NICE, DULL], 0, config)
    # P(good) is 0.4 against 0.1; equal answers leave it open
    np.testing.assert_allclose(p, [0.5 + (0.4 - 0.1) / 2, 0.5])
    assert not by_position.any()


def test_both_orders_cancel_the_place_and_swapping_answers_turns_p_around(config, world):
    constitution = rlaif.load_constitution(config.constitution, need="comparison")

    def half(texts, options):  # likes the first place, and the letter h
        first, second = (np.array([t.split(" Assistant: ")[i].count("h") for t in texts]) for i in (1, 2))
        p = 1 / (1 + np.exp(-(0.7 + first - second)))
        return np.stack([p, 1 - p], 1)

    judge = rlaif.open_judge(replace(config, judge="test_rlaif:favour"))
    judge.function = half
    pair, a, b = replace(config, compare="pair"), ["h h h", "a"], ["a", "a"]
    p, by_position = rlaif.prefer(judge, constitution, ["Human: x Assistant:"] * 2, a, b, [NICE, DULL], 0, pair)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    np.testing.assert_allclose(p, [(sigmoid(3.7) + 1 - sigmoid(-2.3)) / 2, 0.5])
    assert by_position.tolist() == [False, True]
    swapped, _ = rlaif.prefer(judge, constitution, ["Human: x Assistant:"] * 2, b, a, [NICE, DULL], 0, pair)
    np.testing.assert_allclose(p + swapped, 1, rtol=1e-12)
    clamped, _ = rlaif.both_orders(np.array([0.99, 0.05, 0.5]), np.array([0.02, 0.9, 0.5]), (0.4, 0.6))
    np.testing.assert_allclose(clamped, [0.6, 0.4, 0.5])


def test_a_chain_of_thought_stands_between_question_and_choice(config):
    constitution = rlaif.Constitution([NICE], "{prompt}{a}|{b}{principle}\n", "So: (", ["A", "B"], None, [], [], [])
    judge = Scribe("hm one", "hm two")
    judge.choose = lambda texts, options: (judge.seen.append(texts), np.array([[0.99, 0.01], [0.01, 0.99]]))[1]
    options = replace(config, compare="pair", chain_of_thought=True)
    p, _ = rlaif.prefer(judge, constitution, ["P:"], ["x"], ["y"], [NICE], 0, options)
    assert judge.seen[0] == [f"P: {t} Judge: e\nLet's think step by step:" for t in ("x| y", "y| x")]
    assert judge.seen[1][0] == "P: x| y Judge: e\nLet's think step by step: hm one\n\nSo: ("
    np.testing.assert_allclose(p, [0.6])  # clamped: reasoning makes a judge too sure


def test_ratings_are_expected_marks_and_without_a_template_mean_approval(config):
    class Marks:
        def choose(self, texts, options):
            assert options == list("0123456789") and texts == ["ask p r", "ask p c"]
            return np.array([np.eye(10)[9], np.full(10, 0.1)])

    constitution = rlaif.Constitution([], "", "", [], "ask {prompt}{response}", [], [], [])
    np.testing.assert_allclose(rlaif.rate(Marks(), constitution, ["p", "p"], ["r", "c"]), [1, 0], atol=1e-12)
    judge = rlaif.open_judge(replace(config, judge="test_rlaif:favour"))
    plain = constitution._replace(rating=None, principles=[NICE, DULL])
    np.testing.assert_allclose(rlaif.rate(judge, plain, ["p"], ["c c"]), [2 * 0.3 - 1])


class Yes:
    """A judge who says yes with a probability that stands in the criterion."""

    def choose(self, texts, options):
        assert options == [" yes", " no"]
        p = np.array([float(text.split()[-1]) for text in texts])
        return np.stack([p, 1 - p], 1)


def test_a_rubric_is_the_weighted_mean_of_its_criteria():
    rubrics = [
        [{"criterion": "names it 0.8", "weight": 3}, {"criterion": "is short 0.2"}],
        [{"criterion": "is kind 0.5", "weight": 0.1}],
        [{"criterion": "x 1.0"}, {"criterion": "y nan"}],
    ]
    scores = rlaif.rate_rubrics(Yes(), "{prompt}{response} ? {criterion}", ["p"] * 3, ["r"] * 3, rubrics)
    np.testing.assert_allclose(scores, [(3 * 0.8 + 0.2) / 4, 0.5, np.nan])


@pytest.mark.parametrize(
    "rubric, message",
    [
        ([], "with a criterion at least"),
        ("be kind", "with a criterion at least"),
        (["be kind"], '{"criterion": text, "weight": 1}'),
        ([{"criterion": "x", "points": 2}], "unknown keys: points"),
        ([{"criterion": "is rude", "weight": -1}], "it must be above 0"),
        ([{"criterion": "x", "weight": None}], "it must be above 0"),
    ],
)
def test_a_rubric_that_means_nothing_is_refused(rubric, message):
    with pytest.raises(ValueError, match=message):
        rlaif.rate_rubrics(Yes(), "{criterion}", ["p"], ["r"], [rubric])


@pytest.fixture
def environment(world, monkeypatch):
    """A judge and a constitution for the functions that have no command line."""
    monkeypatch.setenv("RLAIF_JUDGE", "test_rlaif:favour")
    monkeypatch.setenv("RLAIF_CONSTITUTION", str(world / "constitution.json"))
    rlaif.environment_judge.cache_clear()
    yield monkeypatch
    rlaif.environment_judge.cache_clear()


def test_the_judge_is_a_reward_for_ppo(environment):
    scores = gpt.load_function("rlaif:reward")(["p", "p"], ["c", "a"], [{"prompt": "p"}] * 2)
    np.testing.assert_allclose(scores, [2 * 0.2 - 1, 2 * 0.1 - 1])


def test_the_judge_rates_by_the_rows_own_rubric_where_it_has_one(environment):
    rubric = [{"criterion": "c c", "weight": 2}, {"criterion": "b", "weight": 1}]
    rows = [{"prompt": "p"}, {"prompt": "p", "rubric": rubric}]
    template = rlaif.CRITERION.count("c") - 1  # the letters that `favour` counts, less that of {criterion}
    first, second = gpt.load_function("rlaif:reward")(["p", "p"], ["c", "a"], rows)
    met = [(template + more + 1) / 10 for more in (2, 0)]
    np.testing.assert_allclose([first, second], [2 * 0.2 - 1, 2 * (2 * met[0] + met[1]) / 3 - 1])


def test_the_judge_is_a_preference_by_a_principle_that_the_texts_draw(environment, monkeypatch):
    drawn = []
    prefer = rlaif.prefer
    monkeypatch.setattr(rlaif, "prefer", lambda *args: (drawn.append([p.name for p in args[5]]), prefer(*args))[1])
    preference, rows = gpt.load_function("rlaif:preference"), [{"prompt": f"p {i}"} for i in range(40)]
    a, b, prompts = ["c c c"] * 40, ["a"] * 40, [""] * 40
    p = preference(prompts, a, b, rows)
    np.testing.assert_allclose(p, 0.5 + (0.4 - 0.1) / 2)
    np.testing.assert_allclose(p + preference(prompts, b, a, rows), 1)
    preference(prompts[:7], a[:7], b[:7], rows[:7])
    assert drawn[0] == drawn[1] and drawn[2] == drawn[0][:7]  # the same for the same pair, in any order and company
    assert 8 <= drawn[0].count("nice0") <= 32 and set(drawn[0]) == {"nice0", "dull0"}


def test_the_environment_has_the_settings_of_the_command_line(environment):
    more = dict(COMPARE="pair", EXAMPLES="False", CONSTITUTION="a.json 'b c.json'", BATCH_SIZE="7", GOLD="None")
    for name, value in more.items():
        environment.setenv(f"RLAIF_{name}", value)
    assert rlaif.environment_config() == rlaif.Config(
        judge="test_rlaif:favour", compare="pair", examples=False, constitution=("a.json", "b c.json"), batch_size=7,
        gold=None,
    )  # fmt: skip
    environment.setenv("RLAIF_JUGDE", "out/judge")
    with pytest.raises(ValueError, match="RLAIF_JUGDE: no setting of rlaif.py has this name: .*RLAIF_JUDGE"):
        rlaif.environment_config()


def test_several_processes_do_not_share_a_judge_in_a_folder(environment, world):
    environment.setenv("RLAIF_JUDGE", str(world / "model"))
    environment.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="serve it, RLAIF_JUDGE=http"):
        rlaif.environment_judge()


# ---------------------------------------------------------------------------------------------------- endpoint


def chat_step(**top):
    return {
        "token": max(top, key=top.get),
        "top_logprobs": [{"token": t, "logprob": math.log(p)} for t, p in top.items()],
    }


@pytest.mark.parametrize(
    "choice, options, expected",
    [
        ({"logprobs": {"content": [chat_step(**{" yes": 0.6, "Yes": 0.1, " no": 0.2})]}}, [" yes", " no"],
         [7 / 9, 2 / 9]),
        ({"logprobs": {"content": [chat_step(**{"(": 1.0}), chat_step(A=0.2, B=0.6)]}}, ["A", "B"], [0.25, 0.75]),
        ({"logprobs": {"tokens": [" A"], "top_logprobs": [{" A": math.log(0.9), " B": math.log(0.1)}]}}, ["A", "B"],
         [0.9, 0.1]),
        ({"logprobs": {"content": [chat_step(**{"10": 0.5, "1": 0.5})]}}, ["1", "10"], [0.5, 0.5]),
        ({"message": {"content": " (B) because"}}, ["A", "B"], [0, 1]),  # no log-probs: the text decides
        ({"text": "No, it is not."}, [" yes", " no"], [0, 1]),
        ({"message": {"content": "Nobody can say"}}, [" yes", " no"], None),
        ({"message": {"content": None}}, ["A", "B"], None),
        ({"message": {"content": "A good answer would say no."}}, ["A", "B"], None),  # an article
        ({"text": " A\tbetter one is B", "logprobs": {"tokens": [" A"], "top_logprobs": [{" A": 0.0}]}}, ["A", "B"],
         None),
        ({"logprobs": {"content": [chat_step(A=0.9, B=0.1), chat_step(**{" good": 1.0})]}}, ["A", "B"], None),
        ({"message": {"content": "A and B are equal"}}, ["A", "B"], None),
        ({"message": {"content": "A\nThe first one"}}, ["A", "B"], [1, 0]),
        ({"message": {"content": "A because it is kind"}}, ["A", "B"], [1, 0]),
        ({"message": {"content": "(A) good and kind"}}, ["A", "B"], [1, 0]),
        ({"message": {"content": "B good and kind"}}, ["A", "B"], [0, 1]),
    ],
)  # fmt: skip
def test_choices_of_an_endpoint_are_read_by_logprobs_or_text(choice, options, expected):
    if expected is None:
        with pytest.raises(ValueError):
            rlaif.read_choice(choice, options)
    else:
        np.testing.assert_allclose(rlaif.read_choice(choice, options), expected, rtol=1e-6)


class Endpoint(ThreadingHTTPServer):
    """An OpenAI-compatible server whose replies are scripted: faults first, then answers; it counts questions."""

    def __init__(self, faults=(), hang_after=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.hang_after = list(faults), hang_after
        self.answered, self.bodies, self.lock, self.freed = Counter(), [], threading.Lock(), threading.Event()
        self.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append((self.path, body, self.headers.get("Authorization")))
            fault = self.server.faults.pop(0) if self.server.faults else None
            text = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            hangs = self.server.hang_after is not None and sum(self.server.answered.values()) >= self.server.hang_after
            if fault is None and not hangs:
                self.server.answered[text] += 1
        if hangs or fault == "slow":
            self.server.freed.wait(3 if fault else 60)
            return
        if isinstance(fault, int):
            return self.reply(fault, {"error": {"message": "later"}}, {"Retry-After": "0"})
        if fault == "garbage":
            return self.reply(200, "not what was asked for")
        word = "yes" if text.count("c") % 2 else "no"
        step = chat_step(**{word: 0.8, {"yes": "no", "no": "yes"}[word]: 0.2})
        message = {"message": {"role": "assistant", "content": word}, "logprobs": {"content": [step]}}
        usage = {"prompt_tokens": 10, "completion_tokens": 2}
        self.reply(200, {"choices": [message | {"finish_reason": "stop"}], "usage": usage})

    def reply(self, status, content, headers=None):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rlaif, "wait_before", lambda attempt, why: 0.01)


def test_an_endpoint_is_asked_once_through_refusals_and_nonsense(config, quick, monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    server = Endpoint(faults=[429, 500, "garbage", "slow", 503])
    monkeypatch.setattr(rlaif, "TIMEOUT", 1.0)
    options = replace(config, judge=server.url, concurrency=3)
    judge = rlaif.open_judge(options)
    texts = ["a", "c", "a", "c c", "d"]
    p = judge.choose(texts, [" yes", " no"])
    np.testing.assert_allclose(p, [[0.2, 0.8], [0.8, 0.2], [0.2, 0.8], [0.2, 0.8], [0.2, 0.8]], rtol=1e-6)
    assert server.answered == {"a": 1, "c": 1, "c c": 1, "d": 1}  # equal questions once, each answered once
    path, body, key = server.bodies[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["temperature"] == 0.0 and body["logprobs"]
    assert "4 requests" in judge.bill() and "40 tokens in, 8 tokens out" in judge.bill() and "5 retries" in judge.bill()
    # another process with the same cache asks nothing
    again = rlaif.open_judge(options)
    np.testing.assert_array_equal(again.choose(texts, [" yes", " no"]), p)
    assert sum(server.answered.values()) == 4
    assert again.choose(["a"], ["A", "B"]) is not None  # other options are another question
    assert server.answered["a"] == 2 or math.isnan(again.known.popitem()[1] or math.nan)


def test_a_judge_that_never_answers_the_question_leaves_no_verdict_and_one_that_is_gone_stops_the_run(
    config, quick, monkeypatch
):
    server = Endpoint(faults=["garbage"] * 3)
    monkeypatch.setattr(rlaif, "RETRIES", 2)
    judge = rlaif.open_judge(replace(config, judge=server.url, concurrency=1))
    assert np.isnan(judge.choose(["a"], [" yes", " no"])).all() and "1 unreadable" in judge.bill()
    server.faults = [500] * 3
    with pytest.raises(ValueError, match="did not answer after 3 tries \\(500.*--resume"):
        judge.choose(["b"], [" yes", " no"])
    server.faults = [401]
    with pytest.raises(ValueError, match="refuses \\(401\\).*later"):
        judge.choose(["d"], [" yes", " no"])


def test_waiting_doubles_or_follows_the_server():
    class Reply:
        headers = {"retry-after": "7"}

    assert rlaif.wait_before(1, Reply()) == 7.0
    assert 0.4 <= rlaif.wait_before(1, "") <= 0.6 and 1.6 <= rlaif.wait_before(3, "") <= 2.4
    assert rlaif.wait_before(30, "") <= 36


def label_command(config):
    names = ("stage", "init", "judge", "out", "prompts", "batch_size", "prompt_length", "response_length", "gold")
    flags = {name: getattr(config, name) for name in (*names, "concurrency", "rounds")}
    flags |= dict(constitution=config.constitution[0], data=config.data[0], helpful=None)
    pieces = [[f"--{name.replace('_', '-')}", str(value)] for name, value in flags.items()]
    return [sys.executable, str(ROOT / "rlaif.py"), *sum(pieces, [])]


def test_a_kill_in_the_middle_of_labelling_loses_no_row_and_asks_nothing_twice(config, tmp_path):
    """kill -9 while the endpoint is silent; then --resume gives the file that an undisturbed run gives."""
    whole = Endpoint()
    config = replace(config, stage="label", prompts=16, concurrency=2)
    rlaif.main(replace(config, judge=whole.url))
    expected = read(config.out / "pairs.jsonl")
    assert len(expected) > 4 and max(whole.answered.values()) == 1

    server = Endpoint(hang_after=sum(whole.answered.values()) * 2 // 3)
    config = replace(config, out=tmp_path / "killed", judge=server.url)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(label_command(config), env=environment, stdout=subprocess.DEVNULL)
    cache, deadline = config.out / "judge-cache.jsonl", time.time() + 100
    while not (cache.exists() and len(rlaif.read_cache(cache)) == server.hang_after) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sum(server.answered.values()) == server.hang_after and not (config.out / "pairs.jsonl").exists()
    server.hang_after = None
    with pytest.raises(FileExistsError, match="--resume goes on"):
        rlaif.main(config)
    with pytest.raises(ValueError, match="begun with --seed 0"):
        rlaif.main(replace(config, resume=True, seed=1))
    rlaif.main(replace(config, resume=True))
    assert read(config.out / "pairs.jsonl") == expected
    assert server.answered == whole.answered


def test_a_cache_line_cut_short_is_forgotten_and_the_next_one_is_whole(config):
    path = config.out / "judge-cache.jsonl"
    path.parent.mkdir()
    path.write_text('{"key": "a", "answer": [1.0, 0.0]}\n{"key": "b", "ans')
    server = Endpoint()
    judge = rlaif.open_judge(replace(config, judge=server.url))
    assert judge.known == {"a": [1.0, 0.0]}
    judge.choose(["c"], [" yes", " no"])
    assert len(rlaif.read_cache(path)) == 2


# ---------------------------------------------------------------------------------------------------- labels


def test_labels_are_soft_and_read_by_the_trainers(config):
    rlaif.main(replace(config, stage="label", judge="test_rlaif:favour"))
    rows = [row for _, row in gpt.read_rows(config.out / "pairs.jsonl", "pairs")]
    with pytest.raises(FileExistsError, match="--overwrite makes it anew"):
        rlaif.main(replace(config, stage="label", judge="test_rlaif:favour", resume=True))
    assert rows and all(0.5 <= row["label_p"] <= 1 for row in rows) and any(row["label_p"] > 0.5 for row in rows)
    for row in rows:
        gap = (row["chosen"].count("c") - row["rejected"].count("c")) / 20
        assert row["label_p"] == pytest.approx(0.5 + gap, abs=1e-6) and row["principle"] in ("nice0", "dull0")


def test_agreement_counts_the_part_that_the_principle_is_about(capsys):
    rows = [
        dict(prompt="p", chosen="aa", rejected="b", principle="a0"),  # more of a, as asked
        dict(prompt="p", chosen="b", rejected="a", principle="a1"),  # less
        dict(prompt="p", chosen="b", rejected="c", principle="a0"),  # equal in a: does not count there
    ]
    gold = lambda prompts, answers, rows: [{"a": x.count("a"), "gold": len(x)} for x in answers]
    assert rlaif.agreement(rows, gold) == {"a": ([True, False], ["p", "p"]), "gold": ([True], ["p"])}
    silent = lambda *args: [x | ({"gold": math.nan} if x["a"] == 2 else {}) for x in gold(*args)]
    # gold says nothing of the one pair that differed in it
    assert rlaif.agreement(rows, silent) == {"a": ([True, False], ["p", "p"])}
    np.testing.assert_allclose(
        gpt.share_interval([1] * 8 + [0] * 2, np.arange(10)), (0.4902, 0.9433), atol=1e-4
    )  # Wilson


def test_what_is_no_verdict_sides_with_nobody_and_is_counted(config, monkeypatch, capsys):
    p, by_position = rlaif.both_orders(np.array([0.9, np.nan, 0.9]), np.array([0.2, 0.2, np.nan]))
    np.testing.assert_allclose(p, [0.85, np.nan, np.nan])
    assert by_position.tolist() == [False] * 3
    monkeypatch.setattr(rlaif.gpt, "load_function", lambda name: lambda texts, options: said)
    judge = rlaif.FunctionJudge(config)
    said = [[3, 1], None, [np.nan, 1], "A", [0, 0], [None, None]]
    np.testing.assert_allclose(judge.choose(["?"] * 6, "AB"), [[0.75, 0.25]] + [[np.nan] * 2] * 5)
    said = [[1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match=r"must return \(1, 2\) probabilities"):
        judge.choose(["?"], "AB")
    monkeypatch.setattr(rlaif, "environment_judge", lambda: (config, None))
    monkeypatch.setattr(rlaif, "rate", lambda *_: np.array([0.5, np.nan, -1.0]))
    assert rlaif.reward("???", "abc", [{"prompt": "?"}] * 3).tolist() == [0.5, 0, -1]
    assert "1 of 3 answers without a verdict score 0" in capsys.readouterr().err


def test_the_agree_stage_compares_the_judge_with_labels(config, tmp_path, capsys):
    rows = [dict(prompt=f"Human: {x} Assistant:", chosen=" c c", rejected=" a") for x in "abd"]
    rows += [dict(prompt="Human: c Assistant:", chosen=" a", rejected=" c")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rlaif.main(replace(config, stage="agree", judge="test_rlaif:favour", data=(str(tmp_path / "pairs.jsonl"),)))
    assert "agrees with the labels in 0.750 [0.301, 0.954] of 4 pairs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(prompts=0), "--prompts 0: 1 at least"),
        (dict(batch_size=0), "--batch-size 0: 1 at least"),
        (dict(rounds=0), "--rounds 0: 1 at least"),
        (dict(stage="label", judge="test_rlaif:silent"), "no pairs came of 16 prompts: .*without a verdict"),
        (dict(stage="agree", judge="test_rlaif:silent"), "the judge gave no verdict on any of its 2 pairs"),
    ],
)
def test_a_stage_that_makes_no_row_is_an_error_with_the_reason(config, tmp_path, options, message):
    if options.get("stage") == "agree":
        rows = [dict(prompt=f"Human: {x} Assistant:", chosen=" c", rejected=" a") for x in "ab"]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = options | dict(data=(str(tmp_path / "pairs.jsonl"),))
    with pytest.raises(ValueError, match=message):
        rlaif.main(replace(config, **options))
    assert not (config.out / "pairs.jsonl").exists()


def silent(texts, options):
    return [None] * len(texts)


# ---------------------------------------------------------------------------------------------------- online


def letters(prompts, responses, rows):
    return [float(response.count("c")) for response in responses]


def test_online_learns_what_the_judge_likes(config, environment):
    online.main(online.Config(
        init=config.init, data=config.data, out=config.out, judge="rlaif:preference", gold="test_rlaif:letters",
        steps=20, batch_size=16, prompt_length=8, response_length=24, lr=2e-2, beta=0.1, warmup=10, save_every=20,
    ))  # fmt: skip
    counts = [row["eval/gold"] for row in read(config.out / "metrics.jsonl")]
    assert np.mean(counts[-5:]) > np.mean(counts[:5]) + 0.2
