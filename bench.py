"""Speed beside the physical limit: the machine first, then training, generation, PPO, DPO and the data path.

Every row of the table is the median of --repeats timings with their minimum and maximum:

    machine    copy: GB/s of a large array read and another one written. matrix: GFLOP/s of one large product
    train      one optimiser step of sft.py (`sft.make_train_step`: forward, backward, clipping, AdamW). Its bound is
               the matrix rate on 6 N + 12 L T D FLOPs a token: N weights that multiply each token (all but the
               position table; a tied embedding counts once, as the head), and scores over whole rows of T tokens
    generate   `gpt.generate` with no EOS, prompt included in the time, new tokens in the rate; from full weights, and
               on a CPU from int8 ones with int8 activations (`serve.quantize`, w8a8). Its bound: the copy rate on the
               weights and the keys and values that a token reads. Reads alone can be faster than a copy: above 100% is
               no error
    serve      serve.py: the toy over HTTP, one client and many, each asking again as soon as it is answered
               (tests/load.py; they share the machine with the server): tokens/s of all together, ms until a whole
               answer or until a stream's first text. And the engine alone with 124M, beside the peer's `generate`
    ppo        one iteration of ppo.py: rollout (`gpt.generate`), scoring (reward model, log-probs, reference, values,
               advantages), update (`ppo.update_epochs`); four models with their own weights, responses of full length;
               then --share trunk and lora. On a GPU also GPT-2 1.5B with adapters
    memory     what PPO holds at its peak under each --share, beside SFT on the rows of one PPO step: by the compiler's
               analysis of every program of an iteration, nothing is allocated. Whatever stays between the programs
               (weights, optimisers, frozen models) is there during each of them
    dpo        one optimiser step of dpo.py, `as TRL does it` (two rows a pair, the head on every position, the frozen
               reference asked in the step) and as dpo.py can (the prompt once for both, reference from disk)
    data       rows a second from JSONL (parse, check, tokenise) and from the token cache (finished batches); and the
               share of an epoch's tokens that is padding: one width, buckets, packing

With --peers (a Python that has torch and transformers), --trl-peers (one that has TRL with its PPOTrainer, 0.24) and
--dpo-peers (TRL 1.16) the same shapes run there too, in tests/peers.py. Ours and the peer take turns, repeat by repeat,
so that both see the same machine, in the same precision. "times peer" is the peer's median time over ours: above 1 we
are faster. MB is what the compiled step holds at its peak, weights and optimiser included, or on a GPU a PPO iteration;
the peer's is by how much its process has grown since its libraries were loaded. "first s" is the first call, most of
which is compilation.

    python bench.py                                              # the table, and out/bench/bench.json
    python bench.py --only train generate --repeats 7 --peers ~/peers/bin/python
"""

import dataclasses
import datetime
import importlib
import itertools
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import gpt

# What is timed is what these scripts ship, and not a copy of it; loaded at run time, like every module:function.
dpo, ppo, serve, sft = (importlib.import_module(name) for name in ("dpo", "ppo", "serve", "sft"))

PEERS, LOAD = (Path(__file__).resolve().parent / "tests" / name for name in ("peers.py", "load.py"))


@dataclass(frozen=True)
class Config:
    only: tuple[Literal["train", "generate", "serve", "ppo", "memory", "dpo", "data"], ...] = (
        "train", "generate", "serve", "ppo", "memory", "dpo", "data",
    )  # sections  # fmt: skip
    repeats: int = 5  # timings of each row
    models: tuple[str, ...] = ()  # of the sections train and generate: those named so ("GPT-2 124M"); all by default
    quick: bool = False  # models of a few thousand weights: does everything run? (the figures mean nothing)
    peers: Path | None = None  # a Python with torch and transformers, timed beside us
    trl_peers: Path | None = None  # a Python with TRL 0.24, timed beside ppo
    dpo_peers: Path | None = None  # a Python with TRL 1.16, timed beside dpo
    data: tuple[str, ...] = ("data/toy/pairs.jsonl", "data/toy/base.jsonl")  # files of the data section
    tokenizer: str = "data/toy"  # folder whose tokenizer reads them, and is served
    length: int = 48  # tokens a row at most, there
    batch_size: int = 32  # rows a batch, there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, and of weights that only generate
    out: Path = Path("out/bench/bench.json")  # the figures, with machine and versions
    seed: int = 0


# ---------------------------------------------------------------------------------------------------- clock and table


def timed(work, calls: int = 1):
    """A function that runs `work` a few times and returns the seconds of one; warmed up (compiled) beforehand."""
    start = time.perf_counter()
    jax.block_until_ready(work())
    first = time.perf_counter() - start
    jax.block_until_ready(work())

    def seconds():
        start = time.perf_counter()
        for _ in range(calls):
            result = work()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    seconds.first = first  # with compilation
    return seconds


def race(ours, repeats: int, peer=None):
    """Seconds of ours and of the peer, taking turns: two lists, the second empty without a peer."""
    turns = [(ours(), peer() if peer else None) for _ in range(repeats)]
    return [a for a, _ in turns], [b for _, b in turns if b is not None]


@contextmanager
def start_peer(python: Path | None, config: Config, **work):
    """A function that has the peer do `work` once and returns its seconds; None where there is no peer. Between its
    turns the peer is stopped, so that no thread of it can take a core from us."""
    if python is None:
        yield None
        return
    log = config.out.with_name("peers.log")
    work |= dict(device=jax.default_backend(), dtype=gpt.compute_dtype(config.dtype).__name__)
    on_cpu = {"CUDA_VISIBLE_DEVICES": ""} if work["device"] == "cpu" else {}
    with open(log, "a") as errors:
        process = subprocess.Popen(
            [python, PEERS, json.dumps(work)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | on_cpu,
        )  # fmt: skip

    def answer():
        line = process.stdout.readline()
        if not line:
            raise ValueError(f"the peer stopped: {python} {PEERS} {shlex.quote(json.dumps(work))}; see {log}")
        return json.loads(line)

    def seconds():
        process.send_signal(signal.SIGCONT)
        print("go", file=process.stdin, flush=True)
        reply = answer()
        process.send_signal(signal.SIGSTOP)
        seconds.peak = reply.get("peak", 0)
        return reply["seconds"]

    try:
        seconds.versions = answer()["versions"]
        process.send_signal(signal.SIGSTOP)
        yield seconds
    finally:
        process.kill()
        process.communicate()


class Table:
    """Rows as they come: printed as Markdown, kept as JSON."""

    def __init__(self, config: Config):
        self.path, self.rows = config.out, []
        self.info = dict(
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
            machine=machine_info(),
            versions={"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (jax, np)},
            config={name: str(value) for name, value in vars(config).items()},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name("peers.log").unlink(missing_ok=True)
        head = ("work", "ms", "min - max", "rate", "of bound", "peer ms", "min - max", "times peer", "MB", "peer MB")
        head += ("first s",)
        print_row(head)
        print_row(["---"] + ["---:"] * (len(head) - 1))

    def add(self, name, seconds=(), amount=0.0, unit="", work=0.0, limit=0.0, theirs=(), peer=None, **more):
        """`amount` of `unit` a call give the rate; `work` (FLOPs or bytes) a call and the machine's `limit` a second
        give the share of the bound; `theirs` are the peer's seconds. What else is measured comes by keyword."""
        row = {"name": name} | more
        if len(seconds):
            row |= {"seconds": spread(seconds), "rate": more.get("rate", amount / np.median(seconds)), "unit": unit}
        if limit:
            row["share_of_bound"] = work / np.median(seconds) / limit
        if len(theirs):
            row |= {"peer_seconds": spread(theirs), "times_peer": float(np.median(theirs) / np.median(seconds))}
            row["peer"] = peer.versions  # the sections' peers live in environments of their own
            if peer.peak:
                row["peer_memory"] = peer.peak
        self.rows.append(row)
        gpt.write_json(self.path, self.info | {"rows": self.rows})
        rate = f"{row['rate']:,.{0 if row['rate'] >= 100 else 1}f} {unit}" if len(seconds) else ""
        if "padding" in row:
            rate = f"{row['padding']:.1%} padding"
        share = f"{row['share_of_bound']:.0%}" if limit else ""
        times = f"{row['times_peer']:.2f}" if len(theirs) else ""
        memory = (f"{row[key] / 1e6:,.0f}" if key in row else "" for key in ("memory", "peer_memory"))
        first = f"{row['first']:.1f}" if "first" in row else ""
        print_row([name, *milliseconds(seconds), rate, share, *milliseconds(theirs), times, *memory, first])
        return row.get("rate")


def spread(seconds) -> dict:
    median, low, high = (float(f(seconds)) for f in (np.median, np.min, np.max))
    return {"median": median, "min": low, "max": high, "all": [float(s) for s in seconds]}


def milliseconds(seconds):
    """The cells "median" and "min - max"."""
    if not len(seconds):
        return "", ""
    digits = 0 if min(seconds) > 1 else 1 if min(seconds) > 0.01 else 3
    median, low, high = (f"{1000 * f(seconds):,.{digits}f}" for f in (np.median, np.min, np.max))
    return median, f"{low} - {high}"


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def machine_info() -> dict:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return dict(
        system=platform.platform(),
        cpu=locals().get("cpu", platform.processor()),
        cores=os.cpu_count(),
        devices=f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        load=os.getloadavg() if hasattr(os, "getloadavg") else None,  # what else the machine did when this began
    )


# ---------------------------------------------------------------------------------------------------- shapes


def shapes(quick: bool) -> dict[str, gpt.Config]:
    """Model configurations: two small ones of the toy's size, and the smallest and largest GPT-2."""
    if quick:
        llama, gpt2 = (gpt.make_config(64, 32, 1, 2, 16, family) for family in ("llama", "gpt2"))
        return {"toy Llama": llama, "toy GPT-2": gpt2, "GPT-2 124M": gpt2, "GPT-2 1.5B": gpt2}
    return {
        "toy Llama": gpt.make_config(1024, 64, 4, 2, 128),
        "toy GPT-2": gpt.make_config(1024, 64, 4, 4, 128, "gpt2"),
        "GPT-2 124M": gpt.make_config(50257, 1024, 12, 12, 768, "gpt2"),
        "GPT-2 1.5B": gpt.make_config(50257, 1024, 48, 25, 1600, "gpt2"),
    }


def wanted_shapes(config: Config) -> dict[str, gpt.Config]:
    """Those of --models; on a CPU never the largest: 28 GB in fp32, and minutes a step."""
    found = {name: shape for name, shape in shapes(config.quick).items() if name in (config.models or (name,))}
    if jax.default_backend() == "cpu":
        found.pop("GPT-2 1.5B", None)
    return found


def make_model(shape: gpt.Config, key):
    return gpt.shard(jax.jit(partial(gpt.init, shape))(key))


def multiplied_weights(model: gpt.GPT) -> int:
    """How many weights multiply each token: not the position table, and the embedding only where it is the head."""
    return gpt.count_parameters(model) - gpt.count_parameters(looked_up(model))


def looked_up(model: gpt.GPT) -> list:
    """Tables of which a token reads one row."""
    return [model.wpe] + [model.wte] * (model.head is not None)


def training_flops(model: gpt.GPT, rows: int, tokens: int) -> float:
    """6 N + 12 L T D a token: each weight and each score is used once forwards and twice backwards."""
    c = model.config
    attention = 12 * c.layers * tokens * c.heads * c.head_dim
    return rows * tokens * (6 * multiplied_weights(model) + attention)


def random_tokens(shape: gpt.Config, rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocab_size, (rows, tokens), np.int32)


# ---------------------------------------------------------------------------------------------------- sections


@partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
def copy_once(source, target):
    """The first array plus one in the second one's place: no fresh memory is asked of the system. Results in the other
    order would swap places, and take a second copy."""
    return source, source + 1


def measure_machine(table: Table, config: Config) -> dict:
    """The limits, in bytes and FLOPs a second: {"copy": ..., "float32": ..., "bfloat16": ...}."""
    on_cpu = jax.default_backend() == "cpu"
    size = 2**18 if config.quick else 2**26 if on_cpu else 2**28
    buffers = jnp.zeros(size), jnp.zeros(size)

    def copy():
        nonlocal buffers
        buffers = copy_once(*buffers)
        return buffers

    seconds, _ = race(timed(copy, 3), config.repeats)
    limits = {"copy": 1e9 * table.add(f"copy, {4 * size >> 20:,} MB", seconds, 8 * size / 1e9, "GB/s")}
    del buffers

    n = 128 if config.quick else 2048 if on_cpu else 8192
    for dtype in ("float32",) if on_cpu and config.dtype != "bfloat16" else ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
        multiply = jax.jit(partial(gpt.dot, axes=(1, 0)))
        seconds, _ = race(timed(partial(multiply, a, a), 3), config.repeats)
        limits[dtype] = 1e9 * table.add(f"matrix, {n:,} squared, {dtype}", seconds, 2 * n**3 / 1e9, "GFLOP/s")
    return limits


def measure_train(table: Table, config: Config, limits: dict):
    dtype = gpt.compute_dtype(config.dtype).__name__
    on_cpu = jax.default_backend() == "cpu"
    for name, shape in wanted_shapes(config).items():
        rows, tokens, calls = (4, 256, 1) if name.startswith("GPT-2") else (16, 48, 10)
        if not on_cpu and name.startswith("GPT-2"):
            rows, tokens, calls = 16 if name == "GPT-2 124M" else 8, 1024, 5
        if config.quick:
            rows, tokens, calls = 4, 16, 1
        settings = sft.Config(dtype=config.dtype)
        lr = gpt.schedule(settings.lr, settings.steps, settings.warmup, settings.schedule, settings.final_lr)
        optimizer = gpt.adamw(lr, settings.weight_decay, b2=settings.b2)
        model = make_model(shape, jax.random.key(config.seed))
        flops, state = training_flops(model, rows, tokens), sft.State(model, gpt.shard(optimizer.init(model)))
        ones = np.ones((rows, tokens), np.int32)
        batch = gpt.put_batch(dict(tokens=random_tokens(shape, rows, tokens), mask=ones, segments=ones))
        step = repeated(sft.make_train_step(optimizer, settings), state, batch)
        del model, state  # the step holds them, and donates them

        work = dict(work="train", shape=dataclasses.asdict(shape), rows=rows, tokens=tokens, calls=calls)
        beside = config.peers if name != "GPT-2 1.5B" else None  # two of these fit no GPU
        with start_peer(beside, config, **work) as peer:
            clock = timed(step, calls)
            ours, theirs = race(clock, config.repeats, peer)
            name, bound = f"train {name}, {rows} x {tokens} tokens", (flops, limits[dtype])
            table.add(name, ours, rows * tokens, "tokens/s", *bound, theirs, peer, first=clock.first)


def repeated(train_step, state, batch):
    """A call without arguments that trains on the same batch again and returns the metrics."""

    def step():
        nonlocal state
        state, metrics = train_step(state, batch)
        return metrics

    return step


def measure_generate(table: Table, config: Config, limits: dict):
    ways = ("full", "w8a8") if jax.default_backend() == "cpu" else ("full",)
    for name, batches in {"GPT-2 124M": (1, 16, 64), "GPT-2 1.5B": (1,)}.items():
        if name in wanted_shapes(config):
            measure_decoding(table, config, limits, name, list(itertools.product(batches, ways)))


def measure_decoding(table: Table, config: Config, limits: dict, name: str, cases: list):
    shape, prompt, new = shapes(config.quick)[name], 16, 8 if config.quick else 64
    dtype = gpt.compute_dtype(config.dtype)
    full = gpt.cast(make_model(shape, jax.random.key(config.seed)), dtype)
    for rows, how in cases:
        temperature = float(rows > 1)
        model = full if how == "full" else serve.quantize(full, how)
        prompts = jnp.asarray(random_tokens(shape, rows, prompt))
        keys = map(partial(jax.random.fold_in, jax.random.key(config.seed)), itertools.count())
        sample = partial(gpt.generate, max_new_tokens=new, eos=-1, temperature=temperature)
        ask = lambda m=model, p=prompts, k=keys, s=sample: s(m, p, jnp.ones_like(p), next(k)).tokens
        work = dict(work="generate", shape=dataclasses.asdict(shape), rows=rows, tokens=prompt, new=new,
                    temperature=temperature)  # fmt: skip
        with start_peer(config.peers if how == "full" else None, config, **work) as peer:
            clock = timed(ask)
            ours, theirs = race(clock, config.repeats, peer)
            bound = dict(work=new * decoded_bytes(model, rows, prompt + new / 2), limit=limits["copy"])
            title = f"generate {name}{', w8a8' if how != 'full' else ''}, batch {rows}, {prompt} + {new} tokens"
            table.add(title, ours, rows * new, "tokens/s", theirs=theirs, peer=peer, first=clock.first, **bound)


def decoded_bytes(model: gpt.GPT, rows: int, seen: float) -> float:
    """Bytes that one token of decoding reads: every weight that multiplies, and the keys and values of `seen` tokens a
    row, on average."""
    c = model.config
    weights = serve.size_in_bytes(model) - serve.size_in_bytes(looked_up(model))
    cached = 2 * c.layers * c.kv_heads * c.head_dim * model.norm.scale.dtype.itemsize
    return weights + rows * seen * cached


def measure_serve(table: Table, config: Config, limits: dict):
    tokenizer, tokens = gpt.load_tokenizer(config.tokenizer), 8 if config.quick else 32
    toy, gpt2 = (shapes(config.quick)[name] for name in ("toy Llama", "GPT-2 124M"))
    toy = dataclasses.replace(toy, vocab_size=tokenizer.vocab_size)
    gpt2 = dataclasses.replace(gpt2, vocab_size=max(gpt2.vocab_size, tokenizer.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        gpt.save(folder, make_model(toy, jax.random.key(config.seed)), tokenizer)
        for clients, slots in ((2, 2),) if config.quick else ((1, 16), (32, 1), (32, 16), (64, 32)):
            who = f"serve toy Llama, clients {clients}, slots {slots}"
            for only, kind, what in (("plain", "waits", "whole"), ("streams", "first", "first text")):
                found = load_server(Path(folder), clients, 1.0 if config.quick else 6.0, only, tokens, slots)
                table.add(f"{who}: {what}", found[kind], rate=found["tokens_per_second"], unit="tokens/s")
    with tempfile.TemporaryDirectory() as folder:
        gpt.save(folder, make_model(gpt2, jax.random.key(config.seed)), tokenizer)
        for how in (None, "w8a8"):
            measure_engine(table, config, folder, gpt2, how)


def measure_engine(table: Table, config: Config, folder: str, shape: gpt.Config, how: str | None):
    """16 prompts at once and one alone, without HTTP."""
    rows, prompt, new = 16, *((4, 4) if config.quick else (64, 32))
    settings = serve.Config(slots=rows, context=prompt + new, quantize=how, dtype=config.dtype)
    model = serve.Served("gpt2", folder, settings)
    model.load()
    model.compress()
    model.warm_up()
    work = dict(work="generate", shape=dataclasses.asdict(shape), rows=rows, tokens=prompt, new=new, temperature=1.0)
    prompts = random_tokens(shape, rows, prompt).tolist()
    with start_peer(None if how else config.peers, config, **work) as peer:
        for n in (rows, 1):
            beside = peer if n == rows else None  # the peer does the whole batch
            ours, theirs = race(timed(partial(answer_all, model, prompts[:n], new)), config.repeats, beside)
            name = f"serve GPT-2 124M{', w8a8' if how else ''}, engine, {n} x ({prompt} + {new}) tokens"
            table.add(name, ours, n * new, "tokens/s", theirs=theirs, peer=peer)


def load_server(folder: Path, clients: int, seconds: float, only: str, tokens: int, slots: int) -> dict:
    """The speed of serve.py under tests/load.py, a program of its own."""
    figures = folder / "figures.json"
    command = [sys.executable, LOAD, "--model", folder, "--clients", clients, "--seconds", seconds, "--only", only]
    command += ["--tokens", tokens, "--figures", figures, f"--server=--slots {slots}"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    found = json.loads(figures.read_text()) if figures.is_file() else {"wrong": [done.stderr[-500:]]}
    if done.returncode or found["wrong"]:
        raise ValueError(f"the server under load: {found['wrong'][:3]}")
    return found


def answer_all(model, prompts: list, new: int):
    """Have an engine answer all prompts at once, with `new` tokens each."""
    for i, ids in enumerate(prompts):
        model.waiting.append(serve.Choice(i, ids, new, None, deadline=float("inf"), seed=i, endless=True))
    while model.busy:
        model.step(lambda delta: None)


def measure_ppo(table: Table, config: Config, limits: dict):
    """An iteration of the toy, in parts: four models, a value head on the policy, adapters on one base; TRL's peer has
    four models each time. On a GPU the largest GPT-2 too, with adapters."""
    shape = shapes(config.quick)["toy GPT-2"]
    rows, prompt, new = (8, 8, 8) if config.quick else (64, 16, 32)
    work = dict(work="ppo", shape=dataclasses.asdict(shape), rows=rows, tokens=prompt, new=new)
    with start_peer(config.trl_peers, config, **work) as peer:
        for share in ("none", "trunk", "lora"):
            settings = ppo.Config(
                batch_size=rows, minibatch_size=rows // 4, epochs=4, prompt_length=prompt, response_length=new,
                missing_eos="keep", dtype=config.dtype, seed=config.seed, share=share,
            )  # fmt: skip
            add_ppo_rows(table, config, "toy GPT-2", settings, "4 x 4 minibatches", peer)
    if config.quick or jax.default_backend() != "cpu":
        settings = large_ppo("lora", config)
        add_ppo_rows(table, config, "GPT-2 1.5B", settings, "2 x 4 minibatches of 4 micro-batches, remat, bf16")


def add_ppo_rows(table: Table, config: Config, name: str, settings: ppo.Config, how: str, peer=None):
    rows, prompt, new = settings.batch_size, settings.prompt_length, settings.response_length
    iteration, peak = ppo_iteration(shapes(config.quick)[name], settings), device_peak()
    first = iteration()
    iteration()
    ours, theirs = race(iteration, config.repeats, peer)
    who = "PPO" if settings.share == "none" else f"PPO --share {settings.share}"
    at = f"{name}, {rows} x ({prompt} + {new}) tokens"
    for part_name, part, compiled in zip(("rollout", "scoring", "update"), np.transpose(ours), first):
        table.add(f"{who} {part_name}, {at}", part, rows * new, "response tokens/s", first=compiled)
    more = {"memory": device_peak()} if device_peak() > peak else {}  # or what ran before had a higher one
    title = f"{who} iteration, {at}, {how}"
    table.add(title, np.sum(ours, 1), rows, "episodes/s", theirs=theirs, peer=peer, **more)


def device_peak() -> int:
    """The most bytes that this process has held on a GPU so far; 0 on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def large_ppo(share: str, config: Config) -> ppo.Config:
    """What the largest GPT-2 is trained with on one GPU: bf16, activations recomputed, 64 answers an iteration, 4 rows
    at a time."""
    length, rows = (8, 8) if config.quick else (128, 64)
    return ppo.Config(
        batch_size=rows, minibatch_size=rows // 4, micro_batches=rows // 16 or 1, prompt_length=length,
        response_length=length, dtype="bfloat16", remat=True, share=share, seed=config.seed,
    )  # fmt: skip


def ppo_iteration(shape: gpt.Config, settings: ppo.Config):
    """A function that does another iteration and returns the seconds of rollout, scoring and update."""
    settings, key = ppo.resolve(settings), jax.random.key(settings.seed)
    optimizers = ppo_optimizers(settings)
    started = jax.jit(partial(start_ppo, shape, settings, optimizers))(key)
    state, ref, reward = gpt.shard(jax.tree.map(jnp.copy, started))  # the state is donated: nothing twice in it
    update, reward = ppo.make_update(*optimizers, settings), gpt.attach(reward, ref)
    prompts = random_tokens(shape, settings.batch_size, settings.prompt_length)
    batch = gpt.put_batch(dict(tokens=prompts, segments=np.ones_like(prompts)))
    sample = partial(gpt.generate, max_new_tokens=settings.response_length, eos=-1)
    counter = itertools.count()

    def iteration():
        nonlocal state
        step, times = next(counter), [time.perf_counter()]
        noise = jax.random.fold_in(key, step)
        generation = sample(ppo.sampler(state, ref, settings), batch["tokens"], batch["segments"], noise)
        times.append(finished(generation))
        scores, _ = ppo.score_responses([reward], None, batch, generation, None, None, -1, settings)
        rollout, _ = ppo.make_rollout(state, ref, batch, generation, scores, settings)
        times.append(finished(rollout))
        state, losses = ppo.update_epochs(update, state, ref, rollout, step, settings)
        times.append(finished((state, losses)))
        return np.diff(times)

    return iteration


def ppo_optimizers(settings: ppo.Config):
    return [gpt.adamw(lr, clip=settings.clip_norm, eps=1e-5) for lr in (settings.lr, settings.critic_lr)]


def start_ppo(shape: gpt.Config, settings: ppo.Config, optimizers, key):
    """(state, reference, reward model) as --share has them: under lora the reward model is an adapter on the base."""
    dtype = gpt.compute_dtype(settings.dtype)
    policy = model = gpt.init(shape, key)
    if settings.share == "lora":
        policy = gpt.init_adapter(model, settings.lora_rank, key)
    reward = dataclasses.replace(gpt.init_score_model(model, key), body=policy if settings.share == "lora" else model)
    scores = dataclasses.replace(gpt.init_score_model(model, key, zero=True), body=policy)
    if settings.share == "trunk":
        policy = scores
    critic = scores if settings.advantage == "gae" and settings.share != "trunk" else None
    opt_states = [optimizer.init(part) for optimizer, part in zip(optimizers, (policy, critic))]
    state = ppo.State(policy, opt_states[0], critic, opt_states[1], jnp.asarray(settings.beta))
    return state, gpt.cast(model, dtype), gpt.cast(reward, dtype)


def measure_memory(table: Table, config: Config, limits: dict):
    sizes = {"toy GPT-2": (64, 16, 32, (1, 4)), "GPT-2 124M": (16, 64, 64, (1, 4))}
    for name, (rows, prompt, new, parts) in sizes.items():
        if config.quick:
            rows, prompt, new, parts = 8, 8, 8, (1,)
        for micro_batches in parts:
            settings = partial(
                ppo.Config, batch_size=rows, minibatch_size=rows // 4, prompt_length=prompt, response_length=new,
                micro_batches=micro_batches, dtype=config.dtype,
            )  # fmt: skip
            options = dict(micro_batches=micro_batches, dtype=config.dtype)
            shape, at = shapes(config.quick)[name], f"{name}, {rows // 4} x {prompt + new} tokens in {micro_batches}"
            for title, rank in (("SFT", 0), ("SFT, adapters", 8)):
                sizes_of = sft_memory(shape, rows // 4, prompt + new, sft.Config(lora_rank=rank, **options))
                table.add(f"memory {title}, {at}", memory=sizes_of["peak"], programs=sizes_of)
            for share, advantage in (("none", "gae"), ("trunk", "gae"), ("none", "rloo"), ("lora", "gae")):
                sizes_of = ppo_memory(shape, settings(share=share, advantage=advantage))
                title = f"memory PPO --share {share} --advantage {advantage}, {at}"
                table.add(title, memory=sizes_of["peak"], programs=sizes_of)
    for share in ("none", "lora"):  # does the largest GPT-2 fit one GPU?
        settings = large_ppo(share, config)
        rows, length = settings.batch_size, settings.prompt_length
        sizes_of = ppo_memory(shapes(config.quick)["GPT-2 1.5B"], settings)
        title = f"memory PPO --share {share} --remat, GPT-2 1.5B, {rows} x 2 x {length} tokens, bf16"
        table.add(title, memory=sizes_of["peak"], programs=sizes_of)


def ppo_memory(shape: gpt.Config, settings: ppo.Config) -> dict[str, int]:
    """Bytes: "resident" between the programs of an iteration, what each program adds while it runs, and their "peak".
    From shapes alone. The reward model comes as --share has it: under lora an adapter on the base."""
    settings, key = ppo.resolve(settings), jax.random.key(0)
    optimizers = ppo_optimizers(settings)
    state, ref, reward = jax.eval_shape(partial(start_ppo, shape, settings, optimizers), key)
    B, Q, T = settings.batch_size, settings.prompt_length, settings.response_length
    ints = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
    floats = lambda *size: jax.ShapeDtypeStruct(size, jnp.float32)
    batch, generation = (
        dict(tokens=ints(B, Q), segments=ints(B, Q)),
        gpt.Generation(ints(B, T), ints(B, T), floats(B, T)),
    )
    policy = jax.eval_shape(partial(ppo.sampler, config=settings), state, ref)
    rows = ints(settings.minibatch_size)
    programs = dict(
        rollout=gpt.generate.lower(policy, *batch.values(), key, T, eos=0),
        scores=gpt.score.lower(
            gpt.attach(reward, ref), *batch.values(), generation.tokens, generation.mask, 0, settings.parts
        ),
        estimates=ppo.make_rollout.lower(state, ref, batch, generation, floats(B), settings),
    )
    rollout, _ = programs["estimates"].out_info
    update_policy, update_critic = ppo.make_steps(*optimizers, settings)
    programs["policy step"] = update_policy.lower(state.policy, state.policy_opt, ref, state.beta, rollout, rows)
    if state.critic is not None:
        programs["critic step"] = update_critic.lower(state.critic, state.critic_opt, ref, rollout, rows)
    resident = serve.size_in_bytes((state, ref, reward))
    more = {name: added_memory(program.compile()) for name, program in programs.items()}
    more["rollout"] += sampler_copy(policy, ref, settings)
    return {"resident": resident} | more | {"peak": resident + max(more.values())}


def sampler_copy(policy: gpt.GPT, ref: gpt.GPT, settings: ppo.Config) -> int:
    """Bytes of `ppo.sampler`'s model that are neither the state's nor the reference's: none in fp32."""
    if gpt.compute_dtype(settings.dtype) == jnp.float32:
        return 0
    return serve.size_in_bytes(policy) - (serve.size_in_bytes(ref) if settings.share == "lora" else 0)


def sft_memory(shape: gpt.Config, rows: int, tokens: int, settings: sft.Config) -> dict[str, int]:
    """The same of one SFT step."""
    optimizer = gpt.adamw(settings.lr, settings.weight_decay, b2=settings.b2)

    def start(key):
        model, base = gpt.init(shape, key), None
        if settings.lora_rank:
            base = gpt.cast(model, gpt.compute_dtype(settings.dtype))
            model = gpt.init_adapter(model, settings.lora_rank, key)
        return sft.State(model, optimizer.init(model)), base

    state, base = jax.eval_shape(lambda: start(jax.random.key(0)))
    batch = dict.fromkeys(("tokens", "mask", "segments"), jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    step = sft.make_train_step(optimizer, settings).lower(state, batch, None, base).compile()
    resident, more = serve.size_in_bytes((state, base)), added_memory(step)
    return {"resident": resident, "step": more, "peak": resident + more}


def added_memory(compiled) -> int:
    """Bytes that a compiled function takes beyond its arguments: scratch, and results that have no donated argument's
    place."""
    m = compiled.memory_analysis()
    return int(m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes)


def measure_dpo(table: Table, config: Config, limits: dict):
    dtype = gpt.compute_dtype(config.dtype)
    for name, (rows, prompt, new) in {"toy GPT-2": (32, 16, 32), "GPT-2 124M": (4, 64, 64)}.items():
        shape, calls = shapes(config.quick)[name], 10 if name == "toy GPT-2" else 1
        if config.quick:
            rows, prompt, new, calls = 4, 8, 8, 1
        work = dict(work="dpo", shape=dataclasses.asdict(shape), rows=rows, tokens=prompt, new=new)
        for how, shared in (("as TRL does it", False), ("prefix shared, reference precomputed", True)):
            settings = dpo.Config(dtype=config.dtype, share_prefix=shared, precompute_ref=shared)
            model = make_model(shape, jax.random.key(config.seed))
            batch, ref = gpt.put_batch(random_pairs(shape, rows, prompt, new, shared)), gpt.cast(model, dtype)
            if shared:
                logps = jax.jit(partial(dpo.pair_logprobs, config=settings))(ref, batch)
                batch, ref = batch | {"ref_logps": logps}, None
            else:
                ref = jax.tree.map(jnp.copy, ref)  # in fp32 a cast copies nothing, and the policy is donated
            flops = pair_flops(model, batch, shared)
            optimizer = gpt.adamw(settings.lr, clip=settings.clip_norm)
            state = dpo.State(model, gpt.shard(optimizer.init(model)))
            start = time.perf_counter()
            compiled = dpo.train_step.lower(state, None, ref, batch, optimizer, settings).compile()
            first = time.perf_counter() - start
            step = repeated(lambda state, batch, c=compiled, ref=ref: c(state, None, ref, batch), state, batch)
            memory = peak_memory(compiled)
            del model, state, ref
            with start_peer(config.dpo_peers, config, **work) as peer:
                ours, theirs = race(timed(step, calls), config.repeats, peer)
                title = f"DPO step, {name}, {rows} pairs x ({prompt} + {new}) tokens, {how}"
                bound = flops, limits[dtype.__name__]
                table.add(title, ours, rows, "pairs/s", *bound, theirs, peer, memory=memory, first=first)


def random_pairs(shape: gpt.Config, rows: int, prompt: int, new: int, shared: bool) -> dict:
    """A batch of pairs of full length, as gpt.Batches makes them."""
    tokens = random_tokens(shape, 2 * rows, prompt + new).reshape(rows, 2, -1)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    mask = np.zeros_like(tokens)
    mask[..., prompt:] = 1
    batch = dict(tokens=tokens, mask=mask, segments=np.ones_like(tokens))
    if shared:
        before = tokens[:, 0, : prompt - 1]
        batch = {name: x[..., prompt - 1 :] for name, x in batch.items()}
        batch |= dict(prefix=before, prefix_mask=np.ones_like(before))
    ones = np.ones(rows, np.float32)
    return batch | dict(weight=ones, label_p=ones)


def pair_flops(model: gpt.GPT, batch: dict, shared: bool) -> float:
    """Of one step. As `training_flops`, with no head on a prefix, which is seen by all tokens of both rows; a reference
    that is asked in the step is a third more."""
    rows, tokens = batch["tokens"].size // batch["tokens"].shape[-1], batch["tokens"].shape[-1]
    if not shared:
        return training_flops(model, rows, tokens) * 4 / 3
    B, P = batch["prefix"].shape
    score = 12 * model.config.layers * model.config.heads * model.config.head_dim  # of one token with another one
    body = training_flops(model, B, P) - 6 * B * P * model.wte.size
    return training_flops(model, rows, tokens) + body + rows * tokens * P * score


def peak_memory(compiled) -> int:
    """Bytes that a compiled function holds, its arguments included."""
    return int(compiled.memory_analysis().argument_size_in_bytes) + added_memory(compiled)


def finished(tree) -> float:
    jax.block_until_ready(tree)
    return time.perf_counter()


def measure_data(table: Table, config: Config, limits: dict):
    tokenizer = gpt.load_tokenizer(config.tokenizer)
    for path in config.data:
        kind = gpt.find_kind([path], ("text", "pairs", "demos", "thumbs", "prompts"))
        load = partial(gpt.Batches, path, kind, tokenizer, config.batch_size, config.length, config.seed)
        name, rows = Path(path).name, min(sum(1 for _ in gpt.read_rows(path, kind)), 5000)

        def read_raw(path=path, kind=kind, rows=rows):
            for _, row in itertools.islice(gpt.read_rows(path, kind), rows):
                with suppress(gpt.BadRow):  # no room for its answer: training leaves it out too
                    gpt.encode_row(row, kind, tokenizer, config.length)

        seconds, _ = race(timed(read_raw), config.repeats)
        table.add(f"{name}: from JSONL", seconds, rows, "rows/s")
        batches = load()
        steps = min(batches.steps_per_epoch, 200)
        seconds, _ = race(timed(lambda b=batches, n=steps: sum(1 for _ in b.stream(0, n))), config.repeats)
        table.add(f"{name}: from the token cache", seconds, steps * config.batch_size, "rows/s")
        table.add(f"{name}: one width", padding=padding_waste(load(buckets=1)))
        table.add(f"{name}: {batches.buckets} buckets", padding=padding_waste(batches))
        if kind == "text":  # what sft.py packs
            table.add(f"{name}: packed", padding=padding_waste(load(packed=True)))


def padding_waste(batches: gpt.Batches, most: int = 500) -> float:
    """Share of the tokens in an epoch's batches (the first `most`) that are padding."""
    batches_of_an_epoch = map(batches, range(min(batches.steps_per_epoch, most)))
    real, total = np.sum([((b["segments"] > 0).sum(), b["segments"].size) for b in batches_of_an_epoch], axis=0)
    return float(1 - real / total)


# ---------------------------------------------------------------------------------------------------- main


def main(config: Config):
    missing = [path for path in config.data if not Path(path).is_file()] if "data" in config.only else []
    if missing:
        raise FileNotFoundError(f"no {missing[0]}: `python toy.py` makes the toy's files; or name others by --data")
    if config.peers or config.trl_peers or config.dpo_peers:
        # a GPU's memory is theirs too; to be said before JAX looks for one
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        if jax.default_backend() not in ("cpu", "gpu"):
            raise ValueError(f"no peer runs on this backend: {jax.default_backend()}")
    known = wanted_shapes(dataclasses.replace(config, models=()))
    if unknown := set(config.models) - set(known):
        raise ValueError(f"--models {', '.join(unknown)}: on this machine they are {', '.join(known)}")
    jax.config.update("jax_enable_compilation_cache", False)  # first calls are to be first ones
    gpt.start(config.seed)
    table = Table(config)
    limits = measure_machine(table, config)
    sections = dict(
        train=measure_train, generate=measure_generate, serve=measure_serve, ppo=measure_ppo, memory=measure_memory,
        dpo=measure_dpo, data=measure_data,
    )  # fmt: skip
    for name in config.only:
        sections[name](table, config, limits)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
