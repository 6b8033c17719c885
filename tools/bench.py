"""Speed beside the limits of the machine, and beside PyTorch, transformers and TRL.

Every row of the table is the median of --repeats timings, with the smallest and the largest:

    machine    copy: GB/s of reading one large array and writing another. matrix: GFLOP/s of one large matrix product
    train      one optimiser step of sft.py. Bound: the matrix rate, at 6 N + 12 L T D FLOPs a token. N counts the
               weights that multiply a token: not the position table, and a tied embedding once, as the head
    generate   `gpt.generate` without an end token. The time includes the prompt, the rate counts new tokens only. On a
               CPU also from int8 weights. Bound: the copy rate, at the bytes of weights, keys and values that a
               token reads; reading alone can be faster than copying, so over 100% is possible
    serve      serve.py with the toy model over HTTP, under tests/load.py on the same machine: tokens/s of all clients,
               ms until a whole answer or until a stream's first text. Then its engine without HTTP
    ppo        one iteration of ppo.py: rollout; scoring (rewards, log-probs, values, advantages); update. With four
               models, and with adapters on one base; on a GPU also GPT-2 1.5B with adapters
    grpo       one iteration of grpo.py in SmolLM2-135M's shape: 8 prompts of 40 tokens, 4 answers of 48 to each, one
               optimiser step; all weights, and adapters. "MB" is what the process has grown by at its peak
    memory     the most that PPO holds, by the compiler's analysis: weights, optimisers and frozen models, and what the
               largest program of an iteration adds. Nothing is allocated
    dpo        one optimiser step of dpo.py: as TRL does it (two rows a pair, the reference asked in the step), and with
               the prompt computed once for both answers and the reference's log-probs computed in advance
    against    this checkout beside another one, --against FOLDER, in turns, each in a process of its own: seconds a
               step, as rows of metrics.jsonl arrive, and peak memory, and both as shares of the other's. From --model,
               a chat model's folder, and --pairs, whose prompts are plain text. The other is run as 2b243d5 was
    data       rows/s from JSONL (parse, check, tokenise) and from the token cache (finished batches); the share of an
               epoch's tokens that is padding

--peers (a Python with torch and transformers), --trl-peers (one with TRL 0.24, which still has PPOTrainer) and
--dpo-peers (TRL 1.16 and PEFT, for grpo, dpo and against) run the same shapes in the same precision in tests/peers.py.
Ours and the peer take turns, so that both see the same machine. "times peer" is the peer's median time divided by ours:
above 1 we are faster. "MB" is the most that our programs hold, weights and optimiser included; "peer MB" is what the
peer's process has grown by since it loaded its libraries. Compilation is not timed.

    python tools/bench.py                                              # the table, and out/bench/bench.json
    python tools/bench.py --only train generate --repeats 7 --peers ~/peers/bin/python
    python tools/bench.py --only against --against ../old --model models/smollm2 --pairs data/hh/pairs.jsonl
"""

import dataclasses
import datetime
import gc
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
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

import dpo
import gpt
import grpo
import ppo
import serve
import sft

PEERS, LOAD = (Path(__file__).resolve().parent.parent / "tests" / name for name in ("peers.py", "load.py"))
SECTIONS = ("train", "generate", "serve", "ppo", "grpo", "memory", "dpo", "data", "against")


@dataclass(frozen=True)
class Config:
    only: tuple[Literal[SECTIONS], ...] = SECTIONS  # sections
    repeats: int = 5  # timings of each row
    models: tuple[str, ...] = ()  # of train and generate, by name ("GPT-2 124M"); all of them by default
    quick: bool = False  # models of a few thousand weights: does everything run? (the figures mean nothing)
    peers: Path | None = None  # a Python with torch and transformers, timed beside us
    trl_peers: Path | None = None  # a Python with TRL 0.24, timed beside ppo
    dpo_peers: Path | None = None  # a Python with TRL 1.16, timed beside grpo, dpo, against
    against: Path | None = None  # folder of another checkout, timed beside this one
    model: str = "models/smollm2"  # what both start from
    pairs: str = "data/hh/pairs.jsonl"  # and learn from
    data: tuple[str, ...] = ("data/toy/pairs.jsonl", "data/toy/base.jsonl")  # files of the data section
    tokenizer: str = "data/toy"  # folder whose tokenizer reads them, and is served
    length: int = 48  # tokens a row at most, there
    batch_size: int = 32  # rows a batch, there
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations, and of weights that only generate
    out: Path = Path("out/bench/bench.json")  # the figures, with machine and versions
    seed: int = 0


# ---------------------------------------------------------------------------------------------------- clock and peers


def warm(work, calls: int = 1):
    """A function that returns the seconds of one call of `work`, the mean of several; compiled and run before."""

    def seconds():
        start = time.perf_counter()
        for _ in range(calls):
            result = work()
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    for _ in range(2):
        jax.block_until_ready(work())
    return seconds


def race(ours, repeats: int, peer=None):
    """Seconds of ours and of the peer, taking turns: two lists, the second one empty without a peer."""
    turns = [(ours(), peer.seconds() if peer else None) for _ in range(repeats)]
    return [a for a, _ in turns], [b for _, b in turns if b is not None]


class Peer:
    """tests/peers.py in an environment of its own, warm inside `with`. It is stopped between its turns, so that none of
    its threads takes a core from us."""

    def __init__(self, python: Path, config: Config, **work):
        work |= dict(device=jax.default_backend(), dtype=gpt.compute_dtype(config.dtype).__name__)
        on_cpu = {"CUDA_VISIBLE_DEVICES": ""} if work["device"] == "cpu" else {}
        self.command, self.log = [str(python), str(PEERS), json.dumps(work)], config.out.with_name("peers.log")
        with open(self.log, "a") as errors:
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            self.process = subprocess.Popen(self.command, env=os.environ | on_cpu, **pipes)

    def __enter__(self):
        self.versions, self.peak = self.answer()["versions"], 0
        self.process.send_signal(signal.SIGSTOP)
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def seconds(self) -> float:
        """Of the work done once; `peak` is then how many bytes its process has grown by."""
        self.process.send_signal(signal.SIGCONT)
        print("go", file=self.process.stdin, flush=True)
        reply = self.answer()
        self.process.send_signal(signal.SIGSTOP)
        self.peak = reply.get("peak", 0)
        return reply["seconds"]

    def answer(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise ValueError(f"the peer stopped: {shlex.join(self.command)}; see {self.log}")
        return json.loads(line)


def start_peer(python: Path | None, config: Config, work: str, shape: gpt.Config, rows: int, tokens: int, **more):
    """A `Peer` for this work, or a context of None where no Python is named."""
    if python is None:
        return nullcontext()
    return Peer(python, config, work=work, shape=dataclasses.asdict(shape), rows=rows, tokens=tokens, **more)


# ---------------------------------------------------------------------------------------------------- table

COLUMNS = ("work", "ms", "min - max", "rate", "of bound", "peer ms", "times peer", "MB", "peer MB")


class Table:
    """Rows as they come: printed as Markdown, kept as JSON."""

    def __init__(self, config: Config):
        self.path, self.repeats, self.rows = config.out, config.repeats, []
        self.info = dict(
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(sys.argv),
            machine=machine_info(),
            versions={"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
            config={name: str(value) for name, value in vars(config).items()},
        )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_name("peers.log").unlink(missing_ok=True)
        print_row(COLUMNS)
        print_row(["---"] + ["---:"] * (len(COLUMNS) - 1))

    def measure(self, name: str, work, amount: float, unit: str, calls: int = 1, peer=None, **more) -> float:
        """Time `work`, which does `amount` of `unit` a call, beside the peer; add the row and return its rate."""
        ours, theirs = race(warm(work, calls), self.repeats, peer)
        return self.add(name, ours, amount, unit, theirs=theirs, peer=peer, **more)

    def add(self, name: str, ours=(), amount=0.0, unit="", bound=None, theirs=(), peer=None, **more) -> float | None:
        """A row, and its rate. `ours` and `theirs` are seconds; `bound` is (FLOPs or bytes a call, the machine's rate
        of them). Whatever else was measured comes by keyword."""
        row = {"name": name} | more
        if len(ours):
            row = {"rate": amount / np.median(ours), "unit": unit, "seconds": spread(ours)} | row
        if bound:
            row["share_of_bound"] = bound[0] / np.median(ours) / bound[1]
        if len(theirs):
            row |= {"peer": peer.versions, "peer_seconds": spread(theirs), "peer_memory": peer.peak}
            row["times_peer"] = float(np.median(theirs) / np.median(ours))
        self.rows.append(row)
        gpt.write_json(self.path, self.info | {"rows": self.rows})
        print_row(cells(row))
        return row.get("rate")


def spread(seconds) -> dict:
    median, low, high = (float(f(seconds)) for f in (np.median, np.min, np.max))
    return {"median": median, "min": low, "max": high, "all": [float(s) for s in seconds]}


def cells(row: dict) -> list[str]:
    """A row as text, in the order of COLUMNS."""
    cell = lambda key, form, scale=1: format(row[key] * scale, form) if row.get(key) else ""
    median = low_high = ""
    if "seconds" in row:
        low, high = row["seconds"]["min"], row["seconds"]["max"]
        digits = 0 if low > 1 else 1 if low > 0.01 else 3
        median, low_high = (
            f"{1000 * row['seconds']['median']:,.{digits}f}",
            f"{1000 * low:,.{digits}f} - {1000 * high:,.{digits}f}",
        )
    rate = cell("padding", ".1%") + " padding" if "padding" in row else ""
    if "rate" in row:
        rate = cell("rate", ",.0f" if row["rate"] >= 100 else ",.1f") + " " + row["unit"]
    theirs = f"{1000 * row['peer_seconds']['median']:,.1f}" if "peer_seconds" in row else ""
    memory = [cell(key, ",.0f", 1e-6) for key in ("memory", "peer_memory")]
    return [
        row["name"],
        median,
        low_high,
        rate,
        cell("share_of_bound", ".0%"),
        theirs,
        cell("times_peer", ".2f"),
        *memory,
    ]


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def machine_info() -> dict:
    cpu = platform.processor()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    devices, load = f"{jax.device_count()} x {jax.devices()[0].device_kind}", os.getloadavg()  # before the first row
    return dict(system=platform.platform(), cpu=cpu, cores=os.cpu_count(), devices=devices, load=load)


# ---------------------------------------------------------------------------------------------------- shapes and counts


SMOL = "SmolLM2-135M"


def shapes(quick: bool) -> dict[str, gpt.Config]:
    """Model configurations: two small ones of the toy's size, SmolLM2, and the smallest and largest GPT-2."""
    if quick:
        llama, gpt2 = (gpt.make_config(64, 32, 1, 2, 16, family) for family in ("llama", "gpt2"))
        return {"toy Llama": llama, "toy GPT-2": gpt2, SMOL: llama, "GPT-2 124M": gpt2, "GPT-2 1.5B": gpt2}
    return {
        "toy Llama": gpt.make_config(1024, 64, 4, 2, 128),
        "toy GPT-2": gpt.make_config(1024, 64, 4, 4, 128, "gpt2"),
        SMOL: gpt.Config(
            vocab_size=49152,
            context=8192,
            layers=30,
            heads=9,
            dim=576,
            ffn=1536,
            kv_heads=3,
            head_dim=64,
            family="llama",
            norm_eps=1e-5,
            tied=True,
            qkv_bias=False,
            out_bias=False,
            mlp_bias=False,
        ),  # fmt: skip
        "GPT-2 124M": gpt.make_config(50257, 1024, 12, 12, 768, "gpt2"),
        "GPT-2 1.5B": gpt.make_config(50257, 1024, 48, 25, 1600, "gpt2"),
    }


def wanted_shapes(config: Config) -> dict[str, gpt.Config]:
    """Those of --models; on a CPU never the largest: 28 GB in fp32, and minutes a step."""
    found = {name: shape for name, shape in shapes(config.quick).items() if name in (config.models or (name,))}
    if jax.default_backend() == "cpu":
        found.pop("GPT-2 1.5B", None)
    return found


def make_model(shape: gpt.Config, seed: int) -> gpt.GPT:
    return gpt.shard(jax.jit(partial(gpt.init, shape))(jax.random.key(seed)))


def random_tokens(shape: gpt.Config, rows: int, tokens: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, shape.vocab_size, (rows, tokens), np.int32)


def size_in_bytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def looked_up(model: gpt.GPT) -> list:
    """Tables of which a token reads one row: positions, and the embedding unless it is the head too."""
    return [model.wpe] + [model.wte] * (model.head is not None)


def multiplied_weights(model: gpt.GPT) -> int:
    """How many weights multiply each token."""
    return gpt.count_parameters(model) - gpt.count_parameters(looked_up(model))


def training_flops(model: gpt.GPT, rows: int, tokens: int) -> float:
    """6 N + 12 L T D a token: each weight and each score is used once forwards and twice backwards."""
    c = model.config
    attention = 12 * c.layers * tokens * c.heads * c.head_dim
    return rows * tokens * (6 * multiplied_weights(model) + attention)


def decoded_bytes(model: gpt.GPT, rows: int, seen: float) -> float:
    """Bytes that one token of decoding reads: every weight that multiplies, and the keys and values of `seen` tokens a
    row, on average."""
    c = model.config
    weights = size_in_bytes(model) - size_in_bytes(looked_up(model))
    cached = 2 * c.layers * c.kv_heads * c.head_dim * model.norm.scale.dtype.itemsize
    return weights + rows * seen * cached


# ---------------------------------------------------------------------------------------------------- machine


@partial(jax.jit, donate_argnums=(0, 1), keep_unused=True)
def copy_once(source, target):
    """`source`, and source + 1 in `target`'s place: no fresh memory is asked of the system. The other way round the two
    would swap places, which costs a second copy."""
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

    limits = {"copy": 1e9 * table.measure(f"copy, {4 * size >> 20:,} MB", copy, 8 * size / 1e9, "GB/s", calls=3)}
    del buffers

    n = 128 if config.quick else 2048 if on_cpu else 8192
    for dtype in ("float32",) if on_cpu and config.dtype != "bfloat16" else ("float32", "bfloat16"):
        a = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
        multiply = partial(jax.jit(partial(gpt.dot, axes=(1, 0))), a, a)
        name = f"matrix, {n:,} squared, {dtype}"
        limits[dtype] = 1e9 * table.measure(name, multiply, 2 * n**3 / 1e9, "GFLOP/s", calls=3)
    return limits


# ---------------------------------------------------------------------------------------------------- train, generate


def measure_train(table: Table, config: Config, limits: dict):
    dtype = gpt.compute_dtype(config.dtype).__name__
    sizes = {
        SMOL: (16, 1024, 5),
        "GPT-2 124M": (16, 1024, 5),
        "GPT-2 1.5B": (8, 1024, 5),
    }  # rows, tokens, calls a timing
    if jax.default_backend() == "cpu":
        sizes = {SMOL: (4, 256, 1), "GPT-2 124M": (4, 256, 1)}
    for name, shape in wanted_shapes(config).items():
        rows, tokens, calls = (4, 16, 1) if config.quick else sizes.get(name, (16, 48, 10))
        settings = sft.Config(dtype=config.dtype)
        optimizer = gpt.adamw(settings.lr, weight_decay=0.01, b2=0.98)
        model = make_model(shape, config.seed)
        bound, state = (
            (training_flops(model, rows, tokens), limits[dtype]),
            sft.State(model, gpt.shard(optimizer.init(model))),
        )
        ones = np.ones((rows, tokens), np.int32)
        batch = gpt.put_batch(dict(tokens=random_tokens(shape, rows, tokens), mask=ones, segments=ones))
        train = partial(sft.train_step, base=None, teacher=None, optimizer=optimizer, config=settings)
        step = repeated(train, state, batch)
        del model, state  # the step holds them, and donates them
        beside = config.peers if name != "GPT-2 1.5B" else None  # two of these fit no GPU
        with start_peer(beside, config, "train", shape, rows, tokens, calls=calls) as peer:
            title = f"train {name}, {rows} x {tokens} tokens"
            table.measure(title, step, rows * tokens, "tokens/s", calls, peer, bound=bound)


def repeated(train_step, state, batch):
    """A call without arguments that trains on the same batch again and returns the metrics."""

    def step():
        nonlocal state
        state, metrics = train_step(state, batch=batch)
        return metrics

    return step


def measure_generate(table: Table, config: Config, limits: dict):
    prompt, new, key = 16, 8 if config.quick else 64, jax.random.key(config.seed)
    forms = ("", ", int8") if jax.default_backend() == "cpu" else ("",)
    for name, batches in {SMOL: (1, 16, 64), "GPT-2 124M": (1, 16, 64), "GPT-2 1.5B": (1,)}.items():
        shape = wanted_shapes(config).get(name)
        if shape is None:
            continue
        full = gpt.cast(make_model(shape, config.seed), gpt.compute_dtype(config.dtype))
        for rows, form in itertools.product(batches, forms):
            model, temperature = serve.quantize(full, "int8") if form else full, float(rows > 1)
            prompts = jnp.asarray(random_tokens(shape, rows, prompt))
            sample = partial(
                gpt.generate, model, prompts, jnp.ones_like(prompts), key, new, temperature=temperature, ends=()
            )
            python, more = None if form else config.peers, dict(new=new, temperature=temperature)
            with start_peer(python, config, "generate", shape, rows, prompt, **more) as peer:
                title = f"generate {name}{form}, batch {rows}, {prompt} + {new} tokens"
                bound = new * decoded_bytes(model, rows, prompt + new / 2), limits["copy"]
                table.measure(title, sample, rows * new, "tokens/s", peer=peer, bound=bound)


# ---------------------------------------------------------------------------------------------------- serve


def measure_serve(table: Table, config: Config, limits: dict):
    tokenizer, tokens = gpt.load_tokenizer(config.tokenizer), 8 if config.quick else 32
    toy, gpt2 = (shapes(config.quick)[name] for name in ("toy Llama", "GPT-2 124M"))
    toy = dataclasses.replace(toy, vocab_size=tokenizer.vocab_size)
    gpt2 = dataclasses.replace(gpt2, vocab_size=max(gpt2.vocab_size, tokenizer.vocab_size))
    with tempfile.TemporaryDirectory() as folder:
        gpt.save(folder, make_model(toy, config.seed), tokenizer)
        for clients, slots in ((2, 2),) if config.quick else ((1, 16), (32, 1), (32, 16), (64, 32)):
            who = f"serve toy Llama, clients {clients}, slots {slots}"
            for only, kind, what in (("plain", "waits", "whole"), ("streams", "first", "first text")):
                found = load_server(Path(folder), clients, 1.0 if config.quick else 6.0, only, tokens, slots)
                table.add(f"{who}: {what}", found[kind], rate=found["tokens_per_second"], unit="tokens/s")
    with tempfile.TemporaryDirectory() as folder:
        gpt.save(folder, make_model(gpt2, config.seed), tokenizer)
        for options in ({}, {"quantize": "int8"}):
            measure_engine(table, config, folder, gpt2, options)


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


def measure_engine(table: Table, config: Config, folder: str, shape: gpt.Config, options: dict):
    """16 prompts at once and one alone, without HTTP."""
    rows, prompt, new = 16, *((4, 4) if config.quick else (64, 32))
    model = serve.Served("gpt2", folder, serve.Config(slots=rows, context=prompt + new, dtype=config.dtype, **options))
    model.load()
    model.compress()
    model.warm_up()

    def answer_all(prompts):
        model.held = [[] for _ in model.held]  # each time as if the prompts were new
        for i, ids in enumerate(prompts):
            model.waiting.append(serve.Choice(i, ids, new, None, deadline=float("inf"), seed=i, endless=True))
        while model.busy:
            model.step(lambda delta: None)

    prompts, more = random_tokens(shape, rows, prompt).tolist(), dict(new=new, temperature=1.0)
    with start_peer(None if options else config.peers, config, "generate", shape, rows, prompt, **more) as peer:
        for n in (rows, 1):
            name = f"serve GPT-2 124M{', int8' if options else ''}, engine, {n} x ({prompt} + {new}) tokens"
            beside = peer if n == rows else None  # the peer does the whole batch
            table.measure(name, partial(answer_all, prompts[:n]), n * new, "tokens/s", peer=beside)


# ---------------------------------------------------------------------------------------------------- ppo and memory


def ppo_config(config: Config, adapters: bool, rows: int, prompt: int, new: int, **options) -> ppo.Config:
    """Four models or adapters; four minibatches a pass."""
    return ppo.resolve(ppo.Config(
        batch_size=rows, minibatch_size=rows // 4, prompt_length=prompt, response_length=new, missing_eos=None,
        seed=config.seed, lora_rank=16 if adapters else 0, **{"dtype": config.dtype} | options,
    ))  # fmt: skip


def large_ppo(config: Config, adapters: bool) -> ppo.Config:
    """What the largest GPT-2 is trained with on one GPU: bf16, activations recomputed, 64 answers an iteration, 4 rows
    at a time."""
    length, rows = (8, 8) if config.quick else (128, 64)
    options = dict(micro_batches=rows // 16 or 1, dtype="bfloat16", remat=True)
    return ppo_config(config, adapters, rows, length, length, **options)


def ppo_parts(shape: gpt.Config, settings: ppo.Config):
    """The programs of an iteration of ppo.py as functions of arrays, which can be called or only compiled:

    start(key)                                           -> (state, reference, reward model), with random weights
    sample(state, ref, prompts, key)                     -> generation
    score(reward, ref, prompts, generation)              -> scores
    estimate(state, ref, prompts, generation, scores)    -> (rollout, metrics)
    critic_step, policy_step(state, ref, rollout, rows)  -> state, after one optimiser step on these rows
    """
    optimizers = [gpt.adamw(lr, eps=1e-5) for lr in (settings.lr, settings.critic_lr)]
    base_of = lambda ref: ref if settings.lora_rank else None

    def start(key):
        base = gpt.init(shape, key)
        policy = gpt.init_adapter(base, settings.lora_rank, key) if settings.lora_rank else base
        reward = dataclasses.replace(gpt.init_score_model(base, key), body=policy)
        critic = dataclasses.replace(gpt.init_score_model(base, key, zero=True), body=policy)
        opt_states = [optimizer.init(model) for optimizer, model in zip(optimizers, (policy, critic))]
        state = ppo.State(policy, opt_states[0], critic, opt_states[1])
        return state, *gpt.cast((base, reward), gpt.compute_dtype(settings.dtype))

    def sample(state, ref, prompts, key):
        policy, new = ppo.sampler(state.policy, base_of(ref), settings), settings.response_length
        return gpt.generate(policy, prompts, jnp.ones_like(prompts), key, new, ends=())

    def score(reward, ref, prompts, generation):
        answers, model = (generation.tokens, generation.mask), gpt.attach(reward, base_of(ref))
        return gpt.score(model, prompts, jnp.ones_like(prompts), *answers, -1, ppo.chunks(settings))

    def estimate(state, ref, prompts, generation, scores):
        batch = dict(tokens=prompts, mask=jnp.ones_like(prompts))
        return ppo.complete_rollout(state, base_of(ref), ref, batch, generation, scores, settings)

    def critic_step(state, ref, rollout, rows):
        args = state.critic, state.critic_opt, base_of(ref), rollout, rows, optimizers[1], settings
        critic, opt_state, _ = ppo.update_critic(*args)
        return state._replace(critic=critic, critic_opt=opt_state)

    def policy_step(state, ref, rollout, rows):
        args = state.policy, state.policy_opt, base_of(ref), rollout, rows, optimizers[0], settings
        policy, opt_state, _ = ppo.update_policy(*args)
        return state._replace(policy=policy, policy_opt=opt_state)

    return start, sample, score, estimate, critic_step, policy_step


def ppo_iteration(shape: gpt.Config, settings: ppo.Config):
    """A function that does another iteration and returns the seconds of rollout, scoring and update."""
    (start, sample, score, estimate, *steps), key = ppo_parts(shape, settings), jax.random.key(settings.seed)
    state, ref, reward = gpt.shard(jax.tree.map(jnp.copy, jax.jit(start)(key)))  # donated: nothing twice in the state
    prompts = random_tokens(shape, settings.batch_size, settings.prompt_length)
    prompts = gpt.put_batch({"tokens": prompts})["tokens"]
    minibatches = np.arange(settings.batch_size).reshape(-1, settings.minibatch_size)

    def iteration():
        nonlocal state
        times = [time.perf_counter()]
        generation = sample(state, ref, prompts, key)
        times.append(finished(generation))
        rollout, _ = estimate(state, ref, prompts, generation, score(reward, ref, prompts, generation))
        times.append(finished(rollout))
        for rows, step in itertools.product([*minibatches] * settings.epochs, steps):
            state = step(state, ref, rollout, rows)
        times.append(finished(state))
        return np.diff(times)

    return iteration


def finished(arrays) -> float:
    """The time at which these arrays are computed."""
    jax.block_until_ready(arrays)
    return time.perf_counter()


def measure_ppo(table: Table, config: Config, limits: dict):
    """TRL's peer has four models each time."""
    shape, (rows, prompt, new) = shapes(config.quick)["toy GPT-2"], (8, 8, 8) if config.quick else (64, 16, 32)
    with start_peer(config.trl_peers, config, "ppo", shape, rows, prompt, new=new) as peer:
        for who, adapters in ("PPO", False), ("PPO, adapters,", True):
            settings = ppo_config(config, adapters, rows, prompt, new, epochs=4)
            add_ppo_rows(table, config, who, "toy GPT-2", settings, "4 x 4 minibatches", peer)
    if config.quick or jax.default_backend() != "cpu":
        settings, how = large_ppo(config, adapters=True), "2 x 4 minibatches of 4 micro-batches, remat, bf16"
        add_ppo_rows(table, config, "PPO, adapters,", "GPT-2 1.5B", settings, how)


def add_ppo_rows(table: Table, config: Config, who: str, name: str, settings: ppo.Config, how: str, peer=None):
    rows, prompt, new = settings.batch_size, settings.prompt_length, settings.response_length
    iteration, peak = ppo_iteration(shapes(config.quick)[name], settings), device_peak()
    for _ in range(2):
        iteration()
    ours, theirs = race(iteration, config.repeats, peer)
    at = f"{name}, {rows} x ({prompt} + {new}) tokens"
    for part, seconds in zip(("rollout", "scoring", "update"), np.transpose(ours)):
        table.add(f"{who} {part}, {at}", seconds, rows * new, "response tokens/s")
    more = {"memory": device_peak()} if device_peak() > peak else {}  # or what ran before had a higher one
    title = f"{who} iteration, {at}, {how}"
    table.add(title, np.sum(ours, 1), rows, "episodes/s", theirs=theirs, peer=peer, **more)


def measure_grpo(table: Table, config: Config, limits: dict):
    shape = shapes(config.quick)[SMOL]
    prompts, prompt, new = (2, 4, 4) if config.quick else (8, 40, 48)
    for who, rank in ("GRPO", 0), ("GRPO, adapters,", 16):
        settings = grpo.resolve(grpo.Config(
            batch_size=4 * prompts, minibatch_size=4 * prompts, epochs=1, prompt_length=prompt, response_length=new,
            missing_eos=None, seed=config.seed, lora_rank=rank, dtype=config.dtype,
        ))  # fmt: skip
        options = dict(new=new, group=4, rank=rank, beta=settings.beta)
        with start_peer(config.dpo_peers, config, "grpo", shape, 4 * prompts, prompt, **options) as peer:
            before = gpt.peak_memory()
            iteration = grpo_iteration(shape, settings)
            for _ in range(2):
                iteration()
            ours, theirs = race(iteration, config.repeats, peer)
            at, dtype = f"{SMOL}, {prompts} x 4 x ({prompt} + {new}) tokens", config.dtype
            for part, seconds in zip(("rollout", "scoring", "update"), np.transpose(ours)):
                table.add(f"{who} {part}, {at}, {dtype}", seconds, 4 * prompts * new, "response tokens/s")
            title, memory = f"{who} iteration, {at}, {dtype}", gpt.peak_memory() - before
            table.add(title, np.sum(ours, 1), 4 * prompts, "episodes/s", theirs=theirs, peer=peer, memory=memory)
        gc.collect()


def grpo_iteration(shape: gpt.Config, settings: grpo.Config):
    """A function that does another iteration and returns the seconds of rollout, scoring and update."""
    key, K = jax.random.key(settings.seed), settings.group_size
    model = jax.jit(partial(gpt.init, shape))(key)
    policy, base = gpt.trainable(model, settings.lora_rank, settings.dtype, key)
    ref = base or gpt.shard(gpt.cast(model, gpt.compute_dtype(settings.dtype)))
    if base:
        del model
    optimizer = gpt.adamw(settings.lr, eps=1e-5)
    state = grpo.State(policy, gpt.shard(optimizer.init(policy)))
    tokens = random_tokens(shape, settings.batch_size // K, settings.prompt_length)
    batch = gpt.put_batch(dict(tokens=tokens, mask=np.ones_like(tokens)))
    rng = np.random.default_rng(settings.seed)
    scores = jnp.asarray(rng.normal(size=(len(tokens), K)), jnp.float32)

    def iteration():
        nonlocal state
        times = [time.perf_counter()]
        generation = gpt.generate(
            grpo.sampler(state.policy, base, settings), batch["tokens"], batch["mask"], key,
            settings.response_length, ends=(), copies=K,
        )  # fmt: skip
        times.append(finished(generation))
        rollout, _ = grpo.complete_rollout(state.policy, base, ref, batch, generation, scores, settings)
        times.append(finished(rollout))
        for rows in grpo.minibatches(0, settings):
            state, _ = grpo.update(state, base, ref, rollout, rows, optimizer, settings)
        times.append(finished(state))
        return np.diff(times)

    return iteration


def device_peak() -> int:
    """The most bytes that this process has held on a GPU so far; 0 on a CPU."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def measure_memory(table: Table, config: Config, limits: dict):
    ways, cases = {"": False, ", adapters": True}.items(), []
    for name, size in {"toy GPT-2": (64, 16, 32), "GPT-2 124M": (16, 64, 64)}.items():
        for micro_batches, (how, adapters) in itertools.product((1,) if config.quick else (1, 4), ways):
            rows, prompt, new = (8, 8, 8) if config.quick else size
            at = f"{name}, {rows // 4} x {prompt + new} tokens in {micro_batches}"
            cases.append((name, how, at, ppo_config(config, adapters, rows, prompt, new, micro_batches=micro_batches)))
    for how, adapters in ways.items():  # does the largest GPT-2 fit one GPU?
        settings = large_ppo(config, adapters)
        at = f"GPT-2 1.5B, {settings.batch_size} x 2 x {settings.prompt_length} tokens, remat, bf16"
        cases.append(("GPT-2 1.5B", how, at, settings))
    for name, how, at, settings in cases:
        found = ppo_memory(shapes(config.quick)[name], settings)
        table.add(f"memory PPO{how}, {at}", memory=found["peak"], programs=found)


def ppo_memory(shape: gpt.Config, settings: ppo.Config) -> dict[str, int]:
    """Bytes of one iteration, from shapes alone: "resident" between its programs, what each adds while it runs, and the
    "peak"."""
    (start, sample, score, estimate, *steps), key = ppo_parts(shape, settings), jax.random.key(0)
    kept = state, ref, reward = jax.eval_shape(start, key)
    ints = lambda *size: jax.ShapeDtypeStruct(size, jnp.int32)
    prompts, rows = ints(settings.batch_size, settings.prompt_length), ints(settings.minibatch_size)
    sample = jax.jit(sample).lower(state, ref, prompts, key)
    score = jax.jit(score).lower(reward, ref, prompts, sample.out_info)
    estimate = jax.jit(estimate).lower(state, ref, prompts, sample.out_info, score.out_info)
    steps = [jax.jit(step, donate_argnums=0).lower(state, ref, estimate.out_info[0], rows) for step in steps]
    programs = dict(sample=sample, score=score, estimate=estimate, critic_step=steps[0], policy_step=steps[1])
    resident, more = size_in_bytes(kept), {name: added_memory(program.compile()) for name, program in programs.items()}
    return {"resident": resident} | more | {"peak": resident + max(more.values())}


def added_memory(compiled) -> int:
    """Bytes that a program takes beyond its arguments: temporaries, and results that no donated argument makes room
    for."""
    m = compiled.memory_analysis()
    return int(m.temp_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes)


# ---------------------------------------------------------------------------------------------------- dpo


def measure_dpo(table: Table, config: Config, limits: dict):
    dtype = gpt.compute_dtype(config.dtype).__name__
    for name, (rows, prompt, new) in {"toy GPT-2": (32, 16, 32), "GPT-2 124M": (4, 64, 64)}.items():
        shape, calls = shapes(config.quick)[name], 10 if name == "toy GPT-2" else 1
        if config.quick:
            rows, prompt, new, calls = 4, 8, 8, 1
        for how, shared in (("as TRL does it", False), ("prefix shared, reference precomputed", True)):
            step, flops, memory = dpo_step(shape, rows, prompt, new, shared, config)
            with start_peer(config.dpo_peers, config, "dpo", shape, rows, prompt, new=new) as peer:
                title = f"DPO step, {name}, {rows} pairs x ({prompt} + {new}) tokens, {how}"
                table.measure(title, step, rows, "pairs/s", calls, peer, bound=(flops, limits[dtype]), memory=memory)


def dpo_step(shape: gpt.Config, rows: int, prompt: int, new: int, shared: bool, config: Config):
    """A call that trains on the same pairs again, its FLOPs, and the bytes that it holds."""
    settings = dpo.Config(dtype=config.dtype, share_prefix=shared, precompute_ref=shared)
    model, dtype = make_model(shape, config.seed), gpt.compute_dtype(config.dtype)
    batch, ref = gpt.put_batch(random_pairs(shape, rows, prompt, new, shared)), gpt.cast(model, dtype)
    if shared:
        batch["ref_logps"] = jax.jit(partial(dpo.pair_logprobs, config=settings))(ref, batch)
        ref = None
    else:
        ref = jax.tree.map(jnp.copy, ref)  # in fp32 a cast copies nothing, and the policy is donated
    flops, optimizer = pair_flops(model, batch, shared), gpt.adamw(settings.lr)
    state = dpo.State(model, gpt.shard(optimizer.init(model)))
    compiled = dpo.train_step.lower(state, None, ref, batch, optimizer=optimizer, config=settings).compile()
    memory = int(compiled.memory_analysis().argument_size_in_bytes) + added_memory(compiled)
    return repeated(lambda state, batch: compiled(state, None, ref, batch), state, batch), flops, memory


def random_pairs(shape: gpt.Config, rows: int, prompt: int, new: int, shared: bool) -> dict:
    """A batch of pairs of full length, as gpt.Batches makes them."""
    tokens = random_tokens(shape, 2 * rows, prompt + new).reshape(rows, 2, -1)
    tokens[:, 1, :prompt] = tokens[:, 0, :prompt]
    mask = np.zeros_like(tokens)
    mask[..., prompt:] = 1
    batch = dict(tokens=tokens, mask=mask, segments=np.ones_like(tokens))
    if shared:
        batch = gpt.fork([list(zip(*pair)) for pair in zip(tokens, mask)], 0, (prompt - 1 + 2 * (new + 1), new))
    ones = np.ones(rows, np.float32)
    return batch | dict(weight=ones, label_p=ones)


def pair_flops(model: gpt.GPT, batch: dict, shared: bool) -> float:
    """FLOPs of one step, counted as in `training_flops`. Asking the reference in the step is a third more. A shared
    prompt needs no head, and the tokens of both answers attend to it, and not to each other."""
    if not shared:
        return training_flops(model, 2 * len(batch["tokens"]), batch["tokens"].shape[-1]) * 4 / 3
    B, prompt, answer = len(batch["tokens"]), *(int((batch["segments"][0] == part).sum()) for part in (1, 2))
    score = 12 * model.config.layers * model.config.heads * model.config.head_dim  # of one token with another one
    rows = training_flops(model, B, prompt) + training_flops(model, 2 * B, answer)
    headless = (batch["segments"] > 0).sum() - batch["mask"].sum()  # tokens that predict nothing
    return rows + 2 * B * answer * prompt * score - 6 * int(headless) * model.wte.size


# ---------------------------------------------------------------------------------------------------- data


def measure_data(table: Table, config: Config, limits: dict):
    tokenizer = gpt.load_tokenizer(config.tokenizer)
    for path in config.data:
        kind = gpt.find_kind([path], ("text", "pairs", "demos", "thumbs", "prompts"))
        name, rows = Path(path).name, min(sum(1 for _ in gpt.read_rows(path, kind)), 5000)

        def read_raw(path=path, kind=kind, rows=rows):
            for _, row in itertools.islice(gpt.read_rows(path, kind), rows):
                with suppress(gpt.BadRow):  # no room for its answer: training leaves it out too
                    gpt.encode_row(row, kind, tokenizer, config.length)

        table.measure(f"{name}: from JSONL", read_raw, rows, "rows/s")
        batches = gpt.Batches(
            path, kind, tokenizer, config.batch_size, config.length, config.seed, forked=kind == "pairs"
        )
        steps = min(batches.steps_per_epoch, 200)
        read_cache = lambda batches=batches, steps=steps: sum(1 for _ in batches.stream(0, steps))
        table.measure(f"{name}: from the token cache", read_cache, steps * config.batch_size, "rows/s")
        table.add(f"{name}: padding", padding=padding_waste(batches))


def padding_waste(batches: gpt.Batches, most: int = 500) -> float:
    """Share of the tokens in an epoch's batches (the first `most`) that are padding."""
    batches_of_an_epoch = map(batches, range(min(batches.steps_per_epoch, most)))
    real = [batch.get("segments", batch["mask"]) for batch in batches_of_an_epoch]  # of prompts alone, the mask
    real, total = np.sum([((x > 0).sum(), x.size) for x in real], axis=0)
    return float(1 - real / total)


# ---------------------------------------------------------------------------------------------------- another checkout

ADAPTERS = "--lora-rank 8 --dtype bfloat16 --overwrite"
ROLLOUT = f"""--data prompts.jsonl --reward bench_reward:words {ADAPTERS} --batch-size 48 --minibatch-size 24 --epochs 1
    --prompt-length 56 --response-length 24 --steps 9"""
PAIRS = f"--data pairs.jsonl {ADAPTERS} --lr 1e-4 --batch-size 8 --length 256"
RECIPE = "--data demos.jsonl --length 512 --lora-rank 8 --lr 2e-4 --batch-size 32 --micro-batches 4 --remat --overwrite"
# work: (our command, the other's, steps of ours and of the other's that make up the work (None: the whole process),
#        and of TRL: trainer, rows, whether in bf16, optimiser steps that make up the work)
COMMANDS = {
    "RLOO iteration, 12 x 4 x (56 + 24) tokens, adapters, bf16": (
        f"grpo.py {ROLLOUT} --advantage rloo --missing-eos None --gold None",
        f"ppo.py {ROLLOUT} --advantage rloo --share lora --missing-eos keep --monitor none",
        (1, 1),
        ("grpo", "prompts", True, 2),
    ),
    "reward model, 1,000 pairs, adapters, bf16": (
        f"reward.py {PAIRS} --steps 125 --normalize-with None --gold None",
        f"reward.py {PAIRS} --steps 12 --normalize-with none --gold none",
        (None, 125),
        ("reward", "pairs", True, 125),
    ),
    "reward model by probe, 1,000 pairs": (
        "probe.py --data pairs.jsonl --dtype bfloat16 --batch-size 8 --length 256 --suffix '' --overwrite",
        f"reward.py {PAIRS} --steps 12 --normalize-with none --gold none",
        (None, 125),
        None,
    ),
    "SFT step of README's recipe": (
        f"sft.py {RECIPE} --steps 9",
        f"sft.py {RECIPE} --steps 9",
        (1, 1),
        ("sft", "demos", False, 1),
    ),
}


def measure_against(table: Table, config: Config, limits: dict):
    """Seconds and peak bytes of each command, ours and the other's in turns; shares of the other's below 1 are good."""
    if config.against is None:
        return
    here, turns = Path(__file__).resolve().parent.parent, 1 if config.quick else config.repeats
    with tempfile.TemporaryDirectory() as folder:
        write_bench_rows(config.pairs, Path(folder))
        for name, (ours, theirs, steps, trl) in COMMANDS.items():
            found = []
            for _ in range(turns):
                both = zip((here, config.against.resolve()), (ours, theirs), steps)
                found.append([run_command(*one, Path(folder), config) for one in both])
            seconds, peaks = np.moveaxis(np.array(found), -1, 0)
            table.add(
                f"{name}, against", seconds[:, 0], 1, "times/s", memory=float(np.median(peaks[:, 0])),
                other_seconds=spread(seconds[:, 1]), other_memory=float(np.median(peaks[:, 1])),
            )  # fmt: skip
            time_share, memory_share = (np.median(x[:, 0]) / np.median(x[:, 1]) for x in (seconds, peaks))
            print(f"  of the other's: time {time_share:.2f}, peak memory {memory_share:.2f}", flush=True)
            if trl and config.dpo_peers:
                took, peak = trl_script(config, Path(folder), *trl)
                print(f"  TRL: {took:.2f} s, {peak / 1e9:.2f} GB", flush=True)


def trl_script(config: Config, folder: Path, script: str, rows: str, bf16: bool, steps: int) -> tuple[float, int]:
    """(seconds, peak bytes) of the same work by TRL's trainer: so many optimiser steps, from the mean of a few."""
    work = dict(script=script, rows=str(folder / f"{rows}.jsonl"), model=str(Path(config.model).resolve()), bf16=bf16)
    with Peer(config.dpo_peers, config, work="script", **work) as peer:
        seconds = [peer.seconds() for _ in range(2 if script == "sft" else 6)]
        return steps * float(np.mean(seconds)), resident_peak(peer.process.pid)


def write_bench_rows(pairs: str, folder: Path):
    """prompts.jsonl (short ones), demos.jsonl and pairs.jsonl of 1,000 rows, and a reward function, for both."""
    with gpt.open_text(pairs) as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, 1000)]
    if any(isinstance(row["prompt"], list) for row in rows):
        raise ValueError(f"{pairs}: its prompts are conversations; make plain text of them, prepare.py without --chat")
    short = [{"prompt": row["prompt"]} for row in rows if len(row["prompt"].split()) <= 35]
    gpt.write_rows(folder / "pairs.jsonl", rows)
    gpt.write_rows(folder / "prompts.jsonl", short)
    gpt.write_rows(folder / "demos.jsonl", [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows])
    code = "def words(prompts, responses, *_):\n    return [float(len(set(text.split()))) for text in responses]\n"
    (folder / "bench_reward.py").write_text(code)


def run_command(checkout: Path, command: str, steps: int | None, folder: Path, config: Config) -> tuple[float, int]:
    """(seconds of so many steps, peak bytes) of a script of that checkout; without `steps`, of the whole process. A
    step's time is the median interval at which metrics.jsonl grows, but for the first two: of seven steps, or of as
    many as three minutes hold (four at least). Then it is ended."""
    script, *options = shlex.split(command)
    options = [str(folder / name) if name.endswith(".jsonl") else name for name in options]
    out = folder / f"out-{time.monotonic_ns()}"
    command = [sys.executable, str(checkout / script), "--init", str(Path(config.model).resolve()), *options]
    environment = os.environ | {"PYTHONPATH": f"{folder}:{checkout}", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    start, arrivals, peak, metrics = time.perf_counter(), [], 0, out / "metrics.jsonl"
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen([*command, "--out", str(out)], cwd=checkout, env=environment, stdout=log, stderr=log)
        enough = lambda: len(arrivals) >= 7 or (len(arrivals) >= 4 and arrivals[-1] - arrivals[0] > 180)
        while process.poll() is None and (steps is None or not enough()):
            time.sleep(0.02)
            peak = max(peak, resident_peak(process.pid))
            lines = metrics.read_text().count('"seconds"') if metrics.exists() else 0
            arrivals += [time.perf_counter()] * (lines - len(arrivals))
        process.kill()
        code = process.wait()
        if code > 0 or (steps and len(arrivals) < 4):
            log.seek(0)
            raise ValueError(f"{shlex.join(command)} ended with {code} in {checkout}:\n{log.read()[-2000:]}")
    if steps is None:
        return time.perf_counter() - start, peak
    return steps * float(np.median(np.diff(arrivals)[2:])), peak


def resident_peak(pid: int) -> int:
    """The most bytes that a process has had in memory; 0 where it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


# ---------------------------------------------------------------------------------------------------- main


def check(config: Config):
    """Complain before anything is measured."""
    missing = [path for path in config.data if not Path(path).is_file()] if "data" in config.only else []
    if missing:
        raise FileNotFoundError(f"no {missing[0]}: `python toy.py` makes the toy's files; or name others by --data")
    if (config.peers or config.trl_peers or config.dpo_peers) and jax.default_backend() not in ("cpu", "gpu"):
        raise ValueError(f"no peer runs on this backend: {jax.default_backend()}")
    known = wanted_shapes(dataclasses.replace(config, models=()))
    if unknown := set(config.models) - set(known):
        raise ValueError(f"--models {', '.join(unknown)}: on this machine they are {', '.join(known)}")


def main(config: Config):
    if config.peers or config.trl_peers or config.dpo_peers:  # they want memory of the same GPU
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # read when JAX looks for devices
    check(config)
    jax.config.update("jax_enable_compilation_cache", False)  # first calls are to be first ones
    gpt.start(config.seed)
    table = Table(config)
    limits = measure_machine(table, config)
    sections = (
        measure_train, measure_generate, measure_serve, measure_ppo, measure_grpo, measure_memory, measure_dpo,
        measure_data, measure_against,
    )  # fmt: skip
    for name, measure in zip(SECTIONS, sections):
        if name in config.only:
            measure(table, config, limits)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
