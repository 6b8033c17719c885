"""serve.py beside llama.cpp's server: the same weights, the same requests, in turns on the same machine.

    python tests/beside.py --model models/smollm2 --llama-server ~/llama.cpp/build/bin/llama-server \\
        --pairs none:smollm2-f32.gguf int8:smollm2-q8_0.gguf

A pair is a form of `serve.py --quantize` ("none": as they are) and the GGUF file to set beside it. Both servers of a
pair run with as many slots and threads; one waits while the other is asked. In each of --turns turns either server
answers, greedily and past the ends of answers, so that both compute as much:

    one          tokens/s of one answer of 64 tokens to a short question
    sixteen      tokens/s of --slots such answers at once, each to a question of its own
    prompt       ms until the first token of a conversation that opens with about 430 tokens that no slot has read
    turn five    ms until the first token of that conversation's fifth turn, about 20 tokens after all that was said

Reported are the medians, the ratio of ours to theirs (above 1 we are better, in ms and MB too), and the memory that
each server's process holds at the end and held at most.
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

SERVE = Path(__file__).resolve().parents[1] / "serve.py"
TOKENS = 64  # of an answer
FIGURES = {"one": "tokens/s", "sixteen": "tokens/s", "prompt": "ms", "turn five": "ms"}


@dataclass(frozen=True)
class Config:
    model: Path  # folder that serve.py serves
    llama_server: Path  # llama.cpp's program
    pairs: tuple[str, ...]  # FORM:FILE.gguf each
    turns: int = 5
    slots: int = 16
    context: int = 2048  # of a slot
    seed: int = 0  # of the numbers in the questions, which make each a new one


class Server:
    """A server as a process of its own, on a free port."""

    def __init__(self, name: str, command: list, port: int):
        self.name, self.port, self.log = name, port, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen([str(part) for part in command], stdout=self.log, stderr=self.log)
        while True:
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            if self.process.poll() is not None:
                self.log.seek(0)
                raise SystemExit(f"{name} ended at its start:\n{self.log.read()[-2000:]}")
            time.sleep(0.2)

    def ask(self, method: str, path: str, body=None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(method, path, body and json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()

    def chat(self, messages: list, tokens: int) -> tuple[str, float]:
        """The answer, of this many tokens, and the seconds that it took."""
        start = time.perf_counter()
        body = dict(messages=messages, max_tokens=tokens, temperature=0, ignore_eos=True)
        status, answer = self.ask("POST", "/v1/chat/completions", body)
        seconds, answer = time.perf_counter() - start, json.loads(answer)
        if status != 200 or answer["usage"]["completion_tokens"] != tokens:
            raise SystemExit(f"{self.name}: {status} {answer}")
        return answer["choices"][0]["message"]["content"], seconds

    def megabytes(self) -> tuple[float, float]:
        """What the process holds, and held at most."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return tuple(int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1e3 for name in ("VmRSS", "VmHWM"))

    def stop(self):
        self.process.terminate()
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ours(config: Config, form: str, folder: str) -> Server:
    port = free_port()
    command = [sys.executable, SERVE, "--model", config.model, "--port", port, "--feedback", f"{folder}/feedback.db"]
    command += ["--slots", config.slots, "--context", config.context]
    return Server(f"serve.py {form}", command + (["--quantize", form] if form != "none" else []), port)


def theirs(config: Config, file: str) -> Server:
    port, threads = free_port(), len(os.sched_getaffinity(0))
    command = [config.llama_server, "-m", file, "--port", port, "-t", threads, "-tb", threads]
    return Server(f"llama.cpp {file}", command + ["-np", config.slots, "-c", config.slots * config.context], port)


def question(n: int) -> list:
    return [{"role": "user", "content": f"{n} is the number of foxes here. Tell me about them."}]


def measure(server: Server, config: Config, numbers) -> dict[str, float]:
    """One turn: each of FIGURES, once."""
    _, alone = server.chat(question(next(numbers)), TOKENS)
    start = time.perf_counter()
    with ThreadPoolExecutor(config.slots) as pool:
        list(pool.map(lambda n: server.chat(question(n), TOKENS), [next(numbers) for _ in range(config.slots)]))
    together = time.perf_counter() - start
    talk, waits = [{"role": "user", "content": f"{next(numbers)} words: " + "word " * 390}], []
    for _ in range(5):
        answer, seconds = server.chat(talk, 1)
        waits.append(1e3 * seconds)
        talk += [{"role": "assistant", "content": answer}]
        talk += [{"role": "user", "content": "Go on with some more words, please."}]
    figures = TOKENS / alone, config.slots * TOKENS / together, waits[0], waits[4]
    return dict(zip(FIGURES, figures))


def compare(config: Config, form: str, file: str, numbers):
    with tempfile.TemporaryDirectory() as folder:
        servers = []
        try:
            servers += [ours(config, form, folder)]
            servers += [theirs(config, file)]
            for server in servers:
                measure(server, config, numbers)  # whatever is done once is done here
            found = [[], []]
            for turn in range(config.turns):
                for server, figures in zip(servers, found):
                    figures.append(measure(server, config, numbers))
                    rounded = {name: round(value, 1) for name, value in figures[-1].items()}
                    print(f"turn {turn + 1} of {config.turns}, {server.name}: {rounded}", flush=True)
            memory = [server.megabytes() for server in servers]
        finally:
            for server in servers:
                server.stop()
    load = os.getloadavg()[2]
    print(f"serve.py {form} beside {Path(file).name}, medians of {config.turns} in turns, load average {load:.1f}")
    for name, unit in FIGURES.items():
        a, b = (np.median([figures[name] for figures in side]) for side in found)
        print(f"  {name:10} {a:8.1f} {b:8.1f} {unit:9} {a / b if unit == 'tokens/s' else b / a:5.2f}x")
    for name, a, b in zip(("memory", "peak"), *memory):
        print(f"  {name:10} {a:8.0f} {b:8.0f} MB        {b / a:5.2f}x", flush=True)


def main(config: Config):
    numbers = iter(np.random.default_rng(config.seed).permutation(np.arange(10_000, 100_000)).tolist())
    for pair in config.pairs:
        form, _, file = pair.partition(":")
        compare(config, form, file, numbers)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
