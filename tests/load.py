"""Many clients at once against serve.py, for some seconds: what it answers, how fast, and whether it forgets a vote.

    python tests/load.py --model out/ppo --clients 64 --seconds 60            # starts a server of its own, with no page
    python tests/load.py --model out/ppo --kill                               # kill -9 under load, start again, count
    python tests/load.py --model out/ppo --clients 16 --seconds 20 --only plain "--server=--slots 1" # one at a time

Each client draws its next request from a mixture: chats and completions of mixed lengths, streamed or not; requests
that it gives up half-way; bad ones, which must get their 4xx; answers that are stored and voted on, some twice.
Reported: requests and tokens a second, answers by status, median and 99th percentile of /health, the server's memory
after a tenth of the time and at the end, votes acknowledged, and those that are lost or doubled in the database.
"""

import asyncio
import json
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
WORDS = ("what", "is", "the", "opposite", "of", "down", "?", "which", "animal", "eats", "corn", "and", "where")
BAD = [  # (path, body, the status that is promised)
    ("/v1/chat/completions", b"{", 400),
    ("/v1/chat/completions", b'{"messages": []}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "model": "no such"}', 404),
    ("/v1/completions", b'{"prompt": [999999999]}', 400),
    ("/v1/completions", b'{"prompt": "a", "n": 99}', 400),
    ("/v1/feedback", b'{"kind": "thumb"}', 400),
    ("/v1/nothing", b"{}", 404),
]


@dataclass(frozen=True)
class Config:
    model: Path = Path("out/ppo")  # folder to serve
    clients: int = 64  # at once
    seconds: float = 60.0
    only: Literal["all", "plain", "streams"] = "all"  # plain, streams: no cancels, bad requests or votes; full length
    tokens: int = 24  # of the longest answer asked for
    kill: bool = False  # kill -9 the server half-way, and start it again
    server: str = ""  # further options of serve.py
    figures: Path | None = None  # write the speed there as JSON
    seed: int = 0


class Connection:
    """HTTP/1.1 over one socket that stays open, as far as this server needs it: a full client would take more of the
    machine than the server does, and both share it."""

    def __init__(self, url: str):
        self.host, self.port = url.removeprefix("http://").split(":")
        self.writer = None

    async def send(self, method: str, path: str, body=None) -> int:
        """The status; headers are kept, the body is read by `read` or `lines`."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(self.host, self.port)
        body = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\ncontent-type: application/json\r\n"
        self.writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self.headers = dict(line.lower().split(": ", 1) for line in lines if line)
        return int(status.split()[1])

    async def pieces(self):
        """The body as it comes."""
        if "content-length" in self.headers:
            yield await self.reader.readexactly(int(self.headers["content-length"]))
            return
        while size := int(await self.reader.readline(), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        await self.reader.readexactly(2)

    async def ask(self, method: str, path: str, body=None) -> tuple[int, bytes]:
        status = await self.send(method, path, body)
        return status, b"".join([piece async for piece in self.pieces()])

    def hang_up(self):
        if self.writer:
            self.writer.close()
        self.writer = None


BROKEN = (OSError, EOFError, ValueError)  # what a server that is killed does to its clients


@dataclass
class Tally:
    statuses: Counter = field(default_factory=Counter)
    wrong: list = field(default_factory=list)  # answers that were not what was promised
    tokens: int = 0
    health: list = field(default_factory=list)  # seconds
    late: list = field(default_factory=list)  # seconds that the process which asks for /health overslept
    waits: list = field(default_factory=list)  # seconds of whole answers
    first: list = field(default_factory=list)  # seconds to the first text of a streamed one
    votes: dict = field(default_factory=dict)  # (kind, generation, person) -> value acknowledged last
    pending: dict = field(default_factory=dict)  # the same of votes under way: kept or not, both are right
    acknowledged: int = 0
    down: tuple = (float("inf"), float("inf"))  # when the server was killed, and back

    def down_since(self, begun: float) -> bool:
        """Was the server away at some time since then?"""
        return self.down[0] <= time.monotonic() and begun <= self.down[1]


class Client:
    """One person in a hurry."""

    def __init__(self, number: int, url: str, config: Config, tally: Tally):
        self.name, self.http, self.config, self.tally = f"client {number}", Connection(url), config, tally
        self.random = random.Random(config.seed * 1000 + number)

    async def live(self, until: float):
        kinds = [self.whole, self.stream, self.give_up, self.bad, self.vote]
        weights = dict(all=[5, 4, 1, 1, 3], plain=[1, 0, 0, 0, 0], streams=[0, 1, 0, 0, 0])[self.config.only]
        while time.monotonic() < until:
            begun = time.monotonic()
            try:
                await self.random.choices(kinds, weights)[0]()
            except BROKEN as error:
                self.http.hang_up()
                if not self.tally.down_since(begun):
                    self.tally.wrong.append(repr(error))
                await asyncio.sleep(0.1)
        self.http.hang_up()

    def body(self, **more) -> dict:
        rng, tokens = self.random, self.config.tokens
        text = " ".join(rng.choices(WORDS, k=rng.randint(1, 12)))
        messages = dict(messages=[{"role": "user", "content": text}])
        if self.config.only != "all":
            return messages | dict(max_tokens=tokens, ignore_eos=True) | more
        sampling = dict(temperature=rng.choice([0, 0.7, 1]), top_p=rng.choice([1, 0.9]), seed=rng.randint(0, 2**40))
        return messages | sampling | dict(max_tokens=rng.randint(1, tokens)) | more

    def count(self, status: int, answer: bytes, *promised: int) -> bool:
        """True where the answer is the first of those that are promised."""
        self.tally.statuses[status] += 1
        if status not in promised and not (status == 503 and self.tally.down_since(time.monotonic() - 1)):
            self.tally.wrong.append(f"{status} instead of {promised}: {answer[:200]!r}")
        return status == promised[0]

    async def whole(self, **more):
        start = time.monotonic()
        status, answer = await self.http.ask("POST", "/v1/chat/completions", self.body(**more))
        if not self.count(status, answer, 200, 429):
            await asyncio.sleep(float(self.http.headers.get("retry-after", 1)))
            return None
        self.tally.waits.append(time.monotonic() - start)
        answer = json.loads(answer)
        self.tally.tokens += answer["usage"]["completion_tokens"]
        return answer

    async def stream(self, most: float = 1e9):
        """Read a streamed answer: it ends as promised, unless left after `most` frames."""
        start, begun = time.monotonic(), False
        body = self.body(stream=True, stream_options={"include_usage": True})
        status, frames = await self.http.send("POST", "/v1/chat/completions", body), []
        async for piece in self.http.pieces():
            frames += [frame.removeprefix(b"data: ") for frame in piece.split(b"\n\n") if frame]
            if not begun and b'"delta":{"content"' in piece:  # the first frame of all has a role and no text
                begun = True
                self.tally.first.append(time.monotonic() - start)
            if len(frames) >= most:
                self.tally.statuses["given up"] += 1
                return self.http.hang_up()
        if not self.count(status, frames[0], 200, 429):
            return
        if frames[-1:] != [b"[DONE]"] or b'"usage":{' not in frames[-2]:
            self.tally.wrong.append(f"a stream ended with {frames[-2:]}")
            return
        self.tally.tokens += json.loads(frames[-2])["usage"]["completion_tokens"]

    async def give_up(self):
        if self.random.random() < 0.5:
            return await self.stream(most=2)
        try:
            await asyncio.wait_for(self.http.ask("POST", "/v1/chat/completions", self.body()), 0.02)
        except TimeoutError:
            self.tally.statuses["given up"] += 1
            self.http.hang_up()

    async def bad(self):
        path, body, promised = self.random.choice(BAD)
        self.count(*await self.http.ask("POST", path, body), promised)

    async def vote(self):
        answer = await self.whole(store=True, n=2)
        if answer is None:
            return
        texts = [choice["message"]["content"].split() for choice in answer["choices"]]
        if not all(texts) or texts[0] == texts[1]:  # such a vote would teach nothing, and is refused
            return
        a, b = (choice["generation_id"] for choice in answer["choices"])
        for _ in range(self.random.choice([1, 1, 2])):  # some change their mind
            pair = self.random.random() < 0.5
            values = ("a", "b", "tie", "both_bad") if pair else ("up", "down")
            vote = dict(kind="pair" if pair else "thumb", generation_a=a, generation_b=b if pair else None)
            vote |= dict(value=self.random.choice(values), annotator_id=self.name, consent=True)
            key = (vote["kind"], a, self.name)
            self.tally.pending[key] = vote["value"]
            if self.count(*await self.http.ask("POST", "/v1/feedback", vote), 201):
                self.tally.acknowledged += 1
                self.tally.votes[key] = self.tally.pending.pop(key)


WATCH = """
import http.client, json, sys, time
until, found = time.monotonic() + float(sys.argv[2]), []
connection = http.client.HTTPConnection(sys.argv[1], timeout=30)
while time.monotonic() < until:
    start, status = time.monotonic(), None
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        status = response.status
        response.read()
    except (OSError, http.client.HTTPException):
        connection.close()
    end = time.monotonic()
    time.sleep(0.1)
    found.append((start, end, status, time.monotonic() - end - 0.1))
print(json.dumps(found))
"""


async def watch_health(url: str, tally: Tally, seconds: float):
    """/health as a process of its own sees it, which does not wait for the clients here; beside it, how much later than
    asked for the machine wakes that process from a sleep: no server can answer quicker than that."""
    command = [sys.executable, "-c", WATCH, url.removeprefix("http://"), str(seconds)]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    for start, end, status, late in json.loads((await process.communicate())[0]):
        tally.late.append(late)
        if end < tally.down[0] or start > tally.down[1]:
            tally.health.append(end - start)
            if status != 200:
                tally.wrong.append(f"/health: {status}")


async def load(url: str, config: Config, restart=None) -> Tally:
    """All clients for the whole time; `restart`, a coroutine function, is called half-way."""
    tally, until = Tally(), time.monotonic() + config.seconds

    async def kill():
        await asyncio.sleep(config.seconds / 2)
        tally.down = (time.monotonic(), float("inf"))
        await restart()
        tally.down = (tally.down[0], time.monotonic())

    work = [Client(i, url, config, tally).live(until) for i in range(config.clients)]
    await asyncio.gather(*work, watch_health(url, tally, config.seconds), *([kill()] if restart else []))
    return tally


def lost_votes(database: Path, tally: Tally) -> tuple[int, int]:
    """(votes acknowledged that are not live in the database with their last value, votes that are there twice)."""
    with sqlite3.connect(database) as connection:
        query = "SELECT kind, generation_a, annotator_id, value FROM feedback WHERE superseded_by IS NULL"
        rows = connection.execute(query).fetchall()
    live = {(kind, generation, person): value for kind, generation, person, value in rows}
    lost = sum(live.get(key) not in (value, tally.pending.get(key, value)) for key, value in tally.votes.items())
    return lost, len(rows) - len(live)


def resident(pid: int) -> float:
    """Megabytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class Process:
    """serve.py on a port of its own."""

    def __init__(self, folder: Path, config: Config):
        self.folder, self.config, self.port = folder, config, 0
        self.start()

    def start(self):
        options = ["--model", self.config.model, "--port", str(self.port), "--feedback", self.folder / "feedback.db"]
        options += ["--max-queue", "1024", *shlex.split(self.config.server)]
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, SERVE, *map(str, options)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit((self.folder / "log").read_text())
        self.url = line.split(" for ")[1].strip()
        self.port = int(self.url.rpartition(":")[2])

    async def ready(self):
        http = Connection(self.url)
        while (await http.ask("GET", "/health"))[0] != 200:
            await asyncio.sleep(0.2)
        http.hang_up()

    async def kill(self):
        self.process.kill()
        self.process.wait()
        self.start()
        await self.ready()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def report(config: Config, tally: Tally, memory: list, lost: int, doubled: int):
    requests = sum(tally.statuses.values())

    def spread(seconds) -> str:
        ms = 1e3 * np.array(seconds)
        return f"median {np.median(ms):.1f} ms, p99 {np.quantile(ms, 0.99):.1f} ms, worst {ms.max():.1f} ms"

    print(f"{config.clients} clients, {config.seconds:.0f} s: {requests:,} requests, {tally.tokens:,} tokens")
    print(f"  {tally.tokens / config.seconds:,.0f} tokens/s, {requests / config.seconds:,.1f} requests/s")
    print(f"  by status: {dict(sorted(tally.statuses.items(), key=str))}")
    for name, seconds in (("whole answers", tally.waits), ("first text", tally.first)):
        if seconds:
            print(f"  {name}: {spread(seconds)}")
    print(f"  /health: {spread(tally.health)}; its watcher overslept {spread(tally.late)}")
    print(f"  memory: {memory[0]:.0f} MB after a tenth of the time, {memory[1]:.0f} MB at the end")
    print(f"  votes: {tally.acknowledged:,} acknowledged, {lost} lost, {doubled} doubled")
    print(f"  broken promises: {len(tally.wrong)} {tally.wrong[:3]}")
    if config.figures:
        speed = dict(tokens_per_second=tally.tokens / config.seconds, first=tally.first, waits=tally.waits)
        config.figures.write_text(json.dumps(speed | dict(wrong=tally.wrong)))


async def run(config: Config, folder: Path) -> int:
    server = Process(folder, config)
    try:
        await server.ready()
        memory = []

        async def early():
            await asyncio.sleep(config.seconds / 10)
            memory.append(resident(server.process.pid))

        tally, _ = await asyncio.gather(load(server.url, config, server.kill if config.kill else None), early())
        memory.append(resident(server.process.pid))
    finally:
        server.stop()
    lost, doubled = lost_votes(folder / "feedback.db", tally)
    report(config, tally, memory, lost, doubled)
    return int(bool(tally.wrong or lost or doubled))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(asyncio.run(run(tyro.cli(Config, description=__doc__), Path(folder))))
