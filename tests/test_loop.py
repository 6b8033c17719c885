"""loop.py: what a voter sends, which rounds are played again, and what the table says (not the scripts that it runs)"""

import contextlib
import json
import random
from dataclasses import replace

import numpy as np
import pytest

import evaluate
import gpt
import loop
import serve


class Fake:
    """A server that answers with the two texts it was given, and remembers what it was told."""

    def __init__(self, *texts):
        self.texts, self.said = texts, []

    def post(self, path, body):
        self.said.append((path, body))
        if path == "/v1/feedback":
            return {"id": "v"}
        return {"choices": [{"text": text, "generation_id": f"g{i}"} for i, text in enumerate(self.texts)]}


def likes_a(prompt, a, b, rng: random.Random):
    return a == " red"


def test_a_vote_names_what_was_said_by_its_id_and_equal_answers_get_none():
    server = Fake(" blue", " red")
    assert loop.vote(server, {"prompt": "p"}, 3, likes_a, 0, "round-1/3")
    (asked, ask), (told, ballot) = server.said
    assert (asked, told) == ("/v1/completions", "/v1/feedback")
    assert ask["n"] == 2 and ask["store"] is True and ask["prompt"] == "p"
    assert ask["metadata"] == {"session_id": "round-1/3"}
    assert (ballot["generation_a"], ballot["generation_b"], ballot["value"]) == ("g0", "g1", "b")
    assert ballot["consent"] is True and ballot["kind"] == "pair" and "blue" not in json.dumps(ballot)
    again, other = Fake(" blue", " red"), Fake(" blue", " red")
    loop.vote(again, {"prompt": "p"}, 3, likes_a, 0, "round-1/3")
    loop.vote(other, {"prompt": "p"}, 4, likes_a, 0, "round-1/4")
    assert again.said == server.said and other.said[0][1]["seed"] != ask["seed"]
    same = Fake(" red", " red")
    assert not loop.vote(same, {"prompt": "p"}, 3, likes_a, 0, "") and len(same.said) == 1


@pytest.fixture
def config(tmp_path, words, tiny_model):
    gpt.save(tmp_path / "sft", tiny_model, gpt.load_tokenizer(words))
    rows = [{"prompt": f"Human: {w} Assistant:", "chosen": " a", "rejected": " b"} for w in "abcdefgh"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return loop.Config(out=tmp_path / "loop", init=str(tmp_path / "sft"), labels=str(tmp_path / "pairs.jsonl"), old=5)


def play(config, number, winner="ppo"):
    """What a round leaves behind."""
    folder = config.out / f"round-{number}"
    for name in ("votes", "reward", "report"):
        (folder / name).mkdir(parents=True)
    (folder / "votes" / "pairs.jsonl").write_text("{}\n" * 10 * number)
    (folder / "reward" / "report.json").write_text('{"accuracy": 0.75}')
    won = {"gold": 0.8, "win": {"gold": {"rate": 0.6, "interval": [0.55, 0.65]}}}
    models = {"served": {"gold": 0.5}, "ppo": won, "dpo": won}
    (folder / "report" / "summary.json").write_text(json.dumps({"models": models}))
    (folder / "report" / "gate.json").write_text(json.dumps({"winner": winner}))


def test_finished_rounds_are_kept_and_one_without_a_gate_is_played_again(config, monkeypatch, capsys):
    played = []
    monkeypatch.setattr(loop, "play_round", lambda config, number: (played.append(number), play(config, number)))
    loop.main(replace(config, rounds=1))
    assert played == [1] and len((config.out / "old.jsonl").read_text().splitlines()) == 5
    assert (config.out / "served" / "model.safetensors").exists()
    loop.main(replace(config, rounds=2))
    assert played == [1, 2]
    assert "| 2 | 20 | 0.750 | 0.500 | 0.800 | 60.0% [55.0%, 65.0%] |" in capsys.readouterr().out
    (config.out / "round-2" / "report" / "gate.json").unlink()
    (config.out / "served").rename(config.out / ".served.old")  # a kill while the next model took its place
    (config.out / ".served.old" / "promoted.txt").write_text("in round 1")
    monkeypatch.setattr(loop, "play_round", lambda config, number: played.append(number))
    with pytest.raises(FileNotFoundError):
        loop.main(replace(config, rounds=2))
    assert played == [1, 2, 2] and (config.out / "served" / "promoted.txt").exists()


def test_the_table_has_its_rounds_in_order_and_goes_without_a_verdict(config):
    for number in (2, 10, 1):
        play(config, number)
    report = config.out / "round-10" / "report" / "summary.json"
    models = json.loads(report.read_text())["models"]
    models["dpo"] = {"win": {"gold": {"unjudged": 500}}}
    report.write_text(json.dumps({"models": models}))
    rows = loop.summary(config).splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2", "| 10"]
    assert rows[2].endswith("| 0.800 | 60.0% [55.0%, 65.0%] |  | no verdict | ppo |")


def test_a_script_that_fails_ends_the_loop_in_words(capfd):
    with pytest.raises(ValueError, match="prepare.py failed.*begins this round again"):
        loop.script("prepare.py", "--data", "no-such-file", "--out", "/nonexistent/x")


class Votes(Fake):
    """A server that writes into the database of votes as serve.py does, and dies after `most` questions."""

    def __init__(self, path, most):
        super().__init__(" blue", " red")
        self.path, self.most, self.asked = path, most, []

    __enter__, __exit__ = lambda self: self, lambda self, *_: None

    def write(self, table, **values):
        with contextlib.closing(serve.open_votes(self.path)) as connection, connection:
            serve.insert(connection, table, values | {"created_at": "now"})

    def post(self, path, body):
        if path == "/v1/feedback":
            names = ("kind", "generation_a", "generation_b", "value", "annotator_id", "consent")
            vote = {name: body[name] for name in names} | {"id": body["generation_a"], "schema_version": 1}
            return self.write("feedback", **vote)
        if len(self.asked) == self.most:
            raise OSError("killed")
        session, facts = body["metadata"]["session_id"], dict(model_id="served", checkpoint_sha256="c", sampling="{}")
        self.asked.append(session)
        choices = [{"text": text, "generation_id": f"{session}/{text}"} for text in self.texts]
        for row in choices:
            text = dict(prompt_messages="[]", completion=row["text"])
            self.write("generation", id=row["generation_id"], session_id=session, **text, **facts)
        return {"choices": choices}


def test_a_round_that_was_killed_does_not_ask_for_its_votes_again(config, monkeypatch, capsys):
    config.out.mkdir()
    monkeypatch.setattr(loop.gpt, "load_function", lambda name: likes_a)
    prompts = config.out.parent / "prompts.jsonl"
    prompts.write_text('{"prompt": "Human: a Assistant:"}\n' * 3)
    config = replace(config, prompts=str(prompts), votes=20, voters=1)
    servers = []

    def start(most):
        server = lambda config: servers.append(Votes(config.out / "feedback.db", most)) or servers[-1]
        monkeypatch.setattr(loop, "Server", server)

    start(7)
    with pytest.raises(OSError, match="killed"):
        loop.collect_votes(config, 1)
    start(100)
    loop.collect_votes(config, 1)
    assert "7 votes are there already" in capsys.readouterr().out
    first, second = (server.asked for server in servers)
    assert len(first) == 7 and not set(first) & set(second) and 20 <= len(first + second) < 28
    loop.collect_votes(config, 1)  # killed later, while it trained: nobody is asked
    assert len(servers) == 2
    loop.collect_votes(config, 2)  # another round asks anew
    assert len(servers) == 3 and len(servers[2].asked) >= 20


WON = {"p": 1e-4, "prompts": 250}


def won(rate, **more):
    return {"win": {"gold": {"rate": rate, "interval": [rate - 0.04, rate + 0.04]} | WON | more}, "folder": "out/x"}


def test_the_gate_needs_a_small_p_value_enough_prompts_and_a_folder():
    level = loop.level(1, 2)
    assert level == loop.LEVEL / 4 and loop.level(3, 2) == loop.LEVEL / 24
    assert sum(2 * loop.level(k, 2) for k in range(1, 10_000)) == pytest.approx(loop.LEVEL, rel=1e-3)
    assert loop.winner({"a": won(0.6), "b": won(0.7), "c": won(0.9, p=0.02)}, 1) == "b"
    assert loop.winner({"a": won(0.6, p=level), "b": {}}, 1) == "a"
    assert loop.winner({"a": won(0.6, p=loop.level(2, 1) * 1.01)}, 2) is None
    assert loop.winner({"a": won(1.0, prompts=loop.MIN_PROMPTS - 1)}, 1) is None
    best_of = {"win": won(0.99)["win"], "n": 16}
    assert (
        loop.winner({"best-of-16": best_of}, 1) is None
        and loop.winner({"best-of-16": best_of, "a": won(0.6)}, 1) == "a"
    )
    assert loop.winner({"a": {"win": {"gold": {"unjudged": 500}}, "folder": "x"}}, 1) is None
    assert loop.winner({"a": {"win": {"reward": won(0.9)["win"]["gold"]}, "folder": "x"}}, 1) is None
    with pytest.raises(ValueError, match="no p-value for a.*older evaluate.py; run it again"):
        loop.winner({"a": {"win": {"gold": {"rate": 0.6, "interval": [0.55, 0.65]}}, "folder": "x"}}, 1)
    one_won = evaluate.win_rate(np.ones(1), np.zeros(1, int))
    assert loop.winner({"a": {"win": {"gold": one_won}, "folder": "x"}}, 1) is None


def test_a_loop_promotes_an_equal_model_no_more_often_than_it_says():
    """Three rounds of two candidates that are as good as what is served, on prompts that repeat, with ties."""
    rng, loops, promoted, naive = np.random.default_rng(0), 1000, 0, 0
    for _ in range(loops):
        clusters = np.concatenate([np.arange(257), rng.integers(0, 257, 243)])
        rounds = []
        for _ in range(3):
            ease = rng.normal(0, 1, (2, 257))[:, clusters] + rng.normal(0, 1, (2, 500))
            values = np.where(np.abs(ease) < 0.3, 0.5, ease > 0)
            rounds.append(
                {str(i): {"win": {"gold": evaluate.win_rate(x, clusters)}, "folder": "x"} for i, x in enumerate(values)}
            )
        promoted += any(loop.winner(models, number) for number, models in enumerate(rounds, 1))
        naive += any(row["win"]["gold"]["p"] < 0.025 for models in rounds for row in models.values())
    assert promoted / loops <= loop.LEVEL + 0.01 and naive / loops > 0.1
    better = rng.random((200, 500)) < 0.6
    rows = [{"a": {"win": {"gold": evaluate.win_rate(x.astype(float), np.arange(500))}, "folder": "x"}} for x in better]
    assert np.mean([loop.winner(row, 3) is not None for row in rows]) > 0.9  # what is better gets through


@pytest.fixture
def gate(tmp_path):
    """What a round leaves to the gate: judge(models) -> the winner's name."""
    place, report = tmp_path / "served", tmp_path / "report"

    def judge(**rates):
        models = {"best-of-4": {"win": won(0.99)["win"]}}
        for name, rate in rates.items():
            folder = tmp_path / name
            (folder / "checkpoint").mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(name)
            models[name] = rate | {"folder": str(folder)}
        report.mkdir(exist_ok=True)
        (report / "summary.json").write_text(json.dumps({"models": models}))
        loop.pass_gate(report, place, 1)
        return json.loads((report / "gate.json").read_text())["winner"]

    judge.place, judge.report = place, report
    return judge


def test_the_winner_takes_the_place_of_what_is_served(gate, capsys):
    assert gate(good=won(0.6), better=won(0.7), unsure=won(0.8, p=0.2)) == "better"
    assert (gate.place / "config.json").read_text() == "better" and not (gate.place / "checkpoint").exists()
    said = capsys.readouterr().out
    assert (
        "better wins 0.700 of its comparisons, p = 0.0001, 0.0083 at most is needed" in said
        and "best-of-4 has no folder" in said
    )
    assert gate(few=won(0.9, prompts=20)) is None and (gate.place / "config.json").read_text() == "better"
    said = capsys.readouterr().out
    assert "fewer than 100 different prompts" in said and "stays as it is" in said
    assert gate(good=won(0.6)) == "good" and (gate.place / "config.json").read_text() == "good"
    assert [path.name for path in gate.place.parent.glob(".*")] == []


@pytest.mark.parametrize("calls", range(9))
def test_a_kill_while_a_model_is_replaced_loses_none(gate, monkeypatch, calls):
    """The process dies before the n-th change of the disk: a whole model is there at the next start, and what the gate
    decided happens."""
    gate(old=won(0.6))
    left = [calls]

    def dying(function):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(type(gate.place), "rename", dying(type(gate.place).rename))
        patch.setattr(loop.shutil, "copytree", dying(loop.shutil.copytree))
        patch.setattr(loop.gpt, "remove", dying(gpt.remove))
        patch.setattr(loop.gpt, "write_json", dying(gpt.write_json))
        with contextlib.suppress(KeyboardInterrupt):
            gate(new=won(0.7))
    loop.recover(gate.place)
    name = (gate.place / "config.json").read_text()
    decided = json.loads((gate.report / "gate.json").read_text())
    assert name == "old" or decided["winner"] == "new"
    if decided["winner"] == "new":
        loop.promote(gate.report)
        assert (gate.place / "config.json").read_text() == "new" and [*gate.place.parent.glob(".*")] == []
    assert json.loads((gate.report / "gate.json").read_text())["done"]


@pytest.mark.parametrize("name", ["rounds", "votes", "voters", "ppo_steps"])
def test_a_loop_of_nothing_is_an_error(config, name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 0: 1 at least"):
        loop.main(replace(config, **{name: 0}))
    assert not config.out.exists()
