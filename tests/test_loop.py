"""loop.py: what a voter sends, which rounds are played again, and what the table says (not the scripts that it runs)"""

import json
import random
from dataclasses import replace

import pytest

import gpt
import loop


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
    assert loop.vote(server, {"prompt": "p"}, 3, likes_a, 0)
    (asked, ask), (told, ballot) = server.said
    assert (asked, told) == ("/v1/completions", "/v1/feedback")
    assert ask["n"] == 2 and ask["store"] is True and ask["prompt"] == "p"
    assert (ballot["generation_a"], ballot["generation_b"], ballot["value"]) == ("g0", "g1", "b")
    assert ballot["consent"] is True and ballot["kind"] == "pair" and "blue" not in json.dumps(ballot)
    again, other = Fake(" blue", " red"), Fake(" blue", " red")
    loop.vote(again, {"prompt": "p"}, 3, likes_a, 0)
    loop.vote(other, {"prompt": "p"}, 4, likes_a, 0)
    assert again.said == server.said and other.said[0][1]["seed"] != ask["seed"]
    same = Fake(" red", " red")
    assert not loop.vote(same, {"prompt": "p"}, 3, likes_a, 0) and len(same.said) == 1


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
    monkeypatch.setattr(loop, "play_round", lambda config, number: played.append(number))
    with pytest.raises(FileNotFoundError):
        loop.main(replace(config, rounds=2))
    assert played == [1, 2, 2]


def test_a_script_that_fails_ends_the_loop_in_words(capfd):
    with pytest.raises(ValueError, match="prepare.py failed.*begins this round again"):
        loop.script("prepare.py", "--data", "no-such-file", "--out", "/nonexistent/x")


def test_the_gate_opens_only_for_a_model_that_wins_beyond_doubt(tmp_path, capsys):
    folders = {name: tmp_path / name for name in ("good", "better", "unsure")}
    for name, folder in folders.items():
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "config.json").write_text(name)
    won = lambda rate, low, high: {"win": {"gold": {"rate": rate, "interval": [low, high]}}}
    entries = {"good": won(0.6, 0.51, 0.69), "better": won(0.7, 0.6, 0.8), "unsure": won(0.75, 0.5, 0.9)}
    models = {name: entries[name] | {"folder": str(folders[name])} for name in entries}
    assert loop.winner(models) == "better"
    place, report = tmp_path / "served", tmp_path / "report"

    def judge(models):
        report.mkdir(exist_ok=True)
        (report / "summary.json").write_text(json.dumps({"models": models}))
        loop.pass_gate(report, place)
        return json.loads((report / "gate.json").read_text())["winner"]

    assert judge(models) == "better"
    assert (place / "config.json").read_text() == "better" and not (place / "checkpoint").exists()
    assert "better wins 0.700 [0.600, 0.800]" in capsys.readouterr().out
    assert judge({"unsure": models["unsure"], "start": {}}) is None
    assert (place / "config.json").read_text() == "better" and "stays as it is" in capsys.readouterr().out
    assert judge({"good": models["good"]}) == "good"
    assert (place / "config.json").read_text() == "good" and len(list(tmp_path.iterdir())) == 5
    assert judge({"start": {}, "rated": {"win": {"reward": {"rate": 0.9, "interval": [0.8, 1.0]}}}}) is None
