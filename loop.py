"""The loop of RLHF on one machine: serve, collect votes, refresh the reward model, train, and let the winner be served.

Each round:
    1 serve   out/loop/served answers over HTTP (serve.py), and voters choose between two of its answers (blind pairs)
    2 rows    prepare.py turns the votes in feedback.db into preference pairs
    3 reward  reward.py, from the pretrained model, on all labels so far: the old ones and every round's votes
    4 train   ppo.py against that reward model, and dpo.py on the same pairs, both from the SFT model
    5 gate    evaluate.py's win rates: the better of the two is served from now on, if it beats what is served beyond
              doubt: a loop, however long, promotes a model that is no better with a chance of 5% at most (`level`)

A round that was killed is begun again, but for its votes: what was voted is not asked again.

Here a voter is a program that prefers as the toy world's people do (`toy.prefer`: by gold, noisily, a little too fond
of long answers); the page at / collects the same votes from people. docs/loop.md says how to do a round by hand.

    python loop.py                                # three rounds on the toy world, after `make demo`
    python loop.py --rounds 1 --votes 200
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import gpt


@dataclass(frozen=True)
class Config:
    out: Path = Path("out/loop")  # folder of the loop: feedback.db, served/, and a folder a round
    base: str = "out/base"  # model that reward models start from
    init: str = "out/sft"  # model that policies start from, and the first that is served
    labels: str = "data/toy/pairs.jsonl"  # labels that are there before the first vote
    old: int = 500  # how many of them are used
    prompts: str = "data/toy/prompts.jsonl"  # what voters ask, and what PPO practises on
    heldout: str = "data/toy/pairs-heldout.jsonl"  # labels that the reward models are measured on
    voter: str = "toy:prefer"  # module:function (prompt, a, b, rng) -> does the voter prefer a?
    rounds: int = 3
    votes: int = 1000  # votes a round
    voters: int = 16  # who ask at the same time
    ppo_steps: int = 45  # iterations of PPO a round
    port: int = 8017
    seed: int = 0
    overwrite: bool = False  # start anew; otherwise the rounds that are finished are kept, and the next one begins


def script(name: str, *options) -> None:
    """Run one of the scripts, as on a command line."""
    command = [sys.executable, str(Path(__file__).with_name(name)), *map(str, options)]
    print("\n$ " + " ".join(["python", name, *map(str, options)]), flush=True)
    if subprocess.run(command).returncode:
        raise ValueError(f"{name} failed: its message is above; `python loop.py` begins this round again")


# ---------------------------------------------------------------------------------------------------- votes


class Server:
    """serve.py in a process of its own, for as long as votes are collected."""

    def __init__(self, config: Config):
        self.url = f"http://127.0.0.1:{config.port}"
        command = [sys.executable, str(Path(__file__).with_name("serve.py")), "--model", config.out / "served"]
        command += ["--port", config.port, "--feedback", config.out / "feedback.db", "--max-queue", 4 * config.voters]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)

    def __enter__(self):
        for _ in range(1200):
            if self.process.poll() is not None:
                raise ValueError("serve.py did not start: its message is above")
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=5) as reply:
                    if reply.status == 200:
                        return self
            except OSError:
                time.sleep(0.1)
        raise ValueError(f"{self.url} did not become ready within two minutes")

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def post(self, path: str, body: dict) -> dict:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, data, headers), timeout=60) as reply:
            return json.load(reply)


def vote(server: Server, row: dict, number: int, voter, seed: int, session: str) -> bool:
    """One blind pair: two answers of the served model, and which one this voter prefers. False where they are equal.
    The database keeps the answers under the name of the session."""
    rng = random.Random(f"{seed}/{number}")
    ask = {"prompt": row["prompt"], "n": 2, "max_tokens": 24, "seed": rng.randrange(2**31), "store": True}
    ask["metadata"] = {"session_id": session}
    a, b = server.post("/v1/completions", ask)["choices"]
    if a["text"] == b["text"]:
        return False
    better = "a" if voter(row["prompt"], a["text"], b["text"], rng) else "b"
    server.post("/v1/feedback", {
        "kind": "pair", "generation_a": a["generation_id"], "generation_b": b["generation_id"], "value": better,
        "shown_left": rng.choice("ab"), "annotator_id": f"voter-{number % 7}", "consent": True,
    })  # fmt: skip
    return True


def voted(database: Path) -> set[str]:
    """The sessions of all votes so far."""
    if not database.exists():
        return set()
    query = "SELECT session_id FROM generation JOIN feedback ON generation.id = feedback.generation_a"
    with closing(sqlite3.connect(database)) as connection:
        return {session for (session,) in connection.execute(query)}


def collect_votes(config: Config, number: int):
    """--votes votes on answers to random prompts; those that an earlier start of this round collected are kept."""
    voter, rows = gpt.load_function(config.voter), [row for _, row in gpt.read_rows(config.prompts, "prompts")]
    rng = random.Random(f"{config.seed}/{number}")
    asked = [(f"round-{number}/{i}", i, rng.choice(rows)) for i in range(2 * config.votes)]
    there = voted(config.out / "feedback.db")
    open_jobs, given = [job for job in asked if job[0] not in there], sum(job[0] in there for job in asked)
    if given:
        print(f"round {number}: {given} votes are there already")
    if given >= config.votes:
        return
    bar = gpt.progress(total=config.votes, initial=given, desc=f"round {number}: votes", unit=" votes")
    with Server(config) as server, ThreadPoolExecutor(config.voters) as pool:
        one = lambda job: vote(server, job[2], job[1], voter, config.seed + 1000 * number, job[0])
        for start in range(0, len(open_jobs), 4 * config.voters):
            count = sum(pool.map(one, open_jobs[start : start + 4 * config.voters]))
            given += count
            bar.update(count)
            if given >= config.votes:
                break
    bar.close()
    print(f"round {number}: {given} votes")


# ---------------------------------------------------------------------------------------------------- a round


def play_round(config: Config, number: int):
    folder, common = config.out / f"round-{number}", ["--seed", config.seed + number, "--overwrite"]
    served, votes = config.out / "served", folder / "votes"
    collect_votes(config, number)
    script("prepare.py", "--data", config.out / "feedback.db", "--out", votes, "--overwrite")
    labels = ["--data", config.out / "old.jsonl", votes / "pairs.jsonl", "--heldout", config.heldout, *common]
    script("reward.py", "--init", config.base, "--out", folder / "reward", "--normalize-with", config.init, *labels)
    practice = ["--data", config.prompts, "--steps", config.ppo_steps, *common]
    script("ppo.py", "--init", config.init, "--reward", folder / "reward", "--out", folder / "ppo", *practice)
    script("dpo.py", "--init", config.init, "--out", folder / "dpo", *labels)
    candidates = ["--models", served, folder / "ppo", folder / "dpo", "--ref", config.init]
    script("evaluate.py", *candidates, "--baseline", served, "--out", folder / "report", "--seed", config.seed + number)
    pass_gate(folder / "report", served, number)


# ---------------------------------------------------------------------------------------------------- the gate


LEVEL = 0.05  # chance that a loop ever promotes a model that is no better than what it served
MIN_PROMPTS = 100  # different ones, below which no win rate is believed


def level(number: int, count: int) -> float:
    """The p-value that one of `count` candidates needs in this round: LEVEL / (number (number + 1)) / count.

    1 / (k (k + 1)) adds up to 1 over all rounds k = 1, 2, ..., so that by the union bound all candidates of all rounds,
    however many are played, stay below LEVEL together.
    """
    return LEVEL / (number * (number + 1)) / count


def candidates(models: dict) -> dict:
    """{name: its win rate by gold} of the models that could be served: those with a folder, and a verdict."""
    won = {name: row.get("win", {}).get("gold", {}) for name, row in models.items() if "folder" in row}
    return {name: win for name, win in won.items() if "rate" in win}


def winner(models: dict, number: int) -> str | None:
    """The model that beats what is served by most, if one does beyond doubt: the p-value of its win rate by gold, on
    MIN_PROMPTS different prompts or more, is below this round's level. `models` are the rows of summary.json; those
    without a folder, such as best of n, cannot be served."""
    won = candidates(models)
    if old := [name for name, win in won.items() if "p" not in win]:
        raise ValueError(f"no p-value for {', '.join(old)}: this summary.json is of an older evaluate.py; run it again")
    most = level(number, max(len(won), 1))
    sure = {name: win["rate"] for name, win in won.items() if win["p"] <= most and win["prompts"] >= MIN_PROMPTS}
    return max(sure, key=sure.get, default=None)


def pass_gate(report: Path, served: Path, number: int):
    """Put the winner's folder in the place of what is served; without a winner that stays. gate.json says which."""
    models = json.loads((report / "summary.json").read_text())["models"]
    name = winner(models, number)
    for other in [other for other, row in models.items() if "folder" not in row]:
        print(f"gate: {other} has no folder: it cannot be served")
    won = candidates(models)
    for other, win in won.items():
        few = f"; fewer than {MIN_PROMPTS} different prompts" if win["prompts"] < MIN_PROMPTS else ""
        needed = f"p = {win['p']:.2g}, {level(number, len(won)):.2g} at most is needed"
        print(f"gate: {other} wins {win['rate']:.3f} of its comparisons, {needed}{few}")
    if name is None:
        print(f"gate: none of them beats {served} beyond doubt: it stays as it is")
    gate = {"winner": name, "served": str(served), "done": name is None}
    gpt.write_json(report / "gate.json", gate | ({"folder": models[name]["folder"]} if name else {}))
    promote(report)


def promote(report: Path):
    """What gate.json decided happens, if it has not; a kill on the way leaves it to the next start."""
    gate = json.loads((report / "gate.json").read_text())
    if not gate.get("done", True):
        replace_folder(Path(gate["served"]), gate["folder"])
        gpt.write_json(report / "gate.json", gate | {"done": True})
        print(f"gate: {gate['winner']} is now {gate['served']}")


def replace_folder(old: Path, new):
    """A copy of the model folder `new` where `old` was; at no time is there half a model, and after a kill at any time
    `recover` finds a whole one."""
    fresh, past = beside(old)
    recover(old)
    gpt.remove(fresh)
    gpt.remove(past)
    shutil.copytree(new, fresh, ignore=shutil.ignore_patterns("checkpoint"))
    if old.exists():
        old.rename(past)
    fresh.rename(old)
    gpt.remove(past)


def recover(old: Path):
    """After a kill between the two renames of `replace_folder` the old model is back in its place."""
    _, past = beside(old)
    if past.exists() and not old.exists():
        past.rename(old)


def beside(folder: Path) -> tuple[Path, Path]:
    """Where the next model is prepared, and where the last one waits until the next is in place."""
    return folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")


# ---------------------------------------------------------------------------------------------------- the table


def summary(config: Config) -> str:
    """Markdown: what each round brought."""
    rows = [["round", "votes", "reward model", "served: gold", "PPO: gold", "wins", "DPO: gold", "wins", "served next"]]
    rows.append(["---"] * len(rows[0]))
    for folder in sorted(config.out.glob("round-*"), key=lambda folder: int(folder.name.removeprefix("round-"))):
        models = json.loads((folder / "report" / "summary.json").read_text())["models"]
        accuracy = json.loads((folder / "reward" / "report.json").read_text())["accuracy"]
        count = sum(1 for _ in open(folder / "votes" / "pairs.jsonl"))
        row = [folder.name.split("-")[1], str(count), f"{accuracy:.3f}", f"{models['served']['gold']:.3f}"]
        for name in ("ppo", "dpo"):
            won, gold = models[name]["win"].get("gold", {}), models[name].get("gold")
            row.append("" if gold is None else f"{gold:.3f}")
            row.append(
                "{:.1%} [{:.1%}, {:.1%}]".format(won["rate"], *won["interval"]) if "rate" in won else "no verdict"
            )
        gate = json.loads((folder / "report" / "gate.json").read_text())
        rows.append([*row, gate["winner"] or "the same"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(config: Config):
    for name in ("rounds", "votes", "voters", "ppo_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: 1 at least")
    if config.overwrite and config.out.exists():
        gpt.remove(config.out)
    config.out.mkdir(parents=True, exist_ok=True)
    served = config.out / "served"
    recover(served)
    if not served.exists():
        old = [row for _, row in gpt.read_rows(config.labels, "pairs")][: config.old]
        gpt.write_rows(config.out / "old.jsonl", old)
        fresh, _ = beside(served)
        gpt.save(fresh, *gpt.load_policy(config.init))
        fresh.rename(served)
    for number in range(1, config.rounds + 1):
        report = config.out / f"round-{number}" / "report"
        if (report / "gate.json").exists():
            promote(report)
        else:
            play_round(config, number)
    table = summary(config)
    (config.out / "report.md").write_text(table + "\n")
    print(f"\n{table}\nwrote {config.out}: report.md, served/ (python serve.py --model {config.out}/served)")


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # this process holds the device while scripts train
    gpt.cli(main, Config, __doc__)
