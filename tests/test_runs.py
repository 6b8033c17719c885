"""Run folders, interruptions, several devices, and the command lines."""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate
import gpt
import sft

ROOT = Path(__file__).resolve().parent.parent
STEPS = 300


@pytest.fixture(autouse=True)
def same_mesh():
    """A script sets the mesh of the whole process: put the old one back."""
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


def start_python(*args, **env):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, env=env, **pipes)


def run_python(*args, **env):
    process = start_python(*args, **env)
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


# the folder -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    out: Path
    resume: bool = False
    overwrite: bool = False
    save_every: int = 2
    seed: int = 0
    steps: int = 6


class Count(NamedTuple):
    count: jax.Array
    more: jax.Array | None = None


def count_up(config, stop=6, loss=float, by=1, **more):
    """A run whose state counts its steps; returns the state at the end and the first step."""
    run = gpt.Run({}, **vars(config), **more)
    state, first = run.restore(Count(jnp.zeros(3)))
    for step in run.steps(first):
        if step == stop:
            raise InterruptedError
        state = jax.tree.map(lambda x: x + by, state)
        run.log(step, {"loss": loss(step)})
        run.checkpoint(step, state)
    return state.count.tolist(), first


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_goes_on_with_other_settings_or_data_says_so(tmp_path, capsys):
    def go_on(seed, digest, **more):
        run = gpt.Run({"a.jsonl": digest}, **vars(Config(tmp_path, seed=seed, **more)))
        run.restore(Count(jnp.zeros(3)))
        return capsys.readouterr().err

    with pytest.raises(InterruptedError):
        count_up(Config(tmp_path), stop=5)
    info = json.loads((tmp_path / "config.json").read_text())
    gpt.write_json(tmp_path / "config.json", info | {"run": info["run"] | {"data": {"a.jsonl": "1"}}})
    assert go_on(0, "1", resume=True) == ""  # --resume itself is no news
    assert "warning: this run began with other settings: --seed was 0, is 7" in go_on(7, "1", resume=True)
    assert "a.jsonl has changed" in go_on(0, "2", resume=True)
    config = info["run"]["config"] | {"gone_since": "7"}
    gpt.write_json(tmp_path / "config.json", info | {"run": info["run"] | {"config": config}})
    assert "--gone-since was 7, is no option now" in go_on(0, "1", resume=True)


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path):
    with pytest.raises(InterruptedError):
        count_up(Config(tmp_path), stop=5)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # what a kill leaves behind
    assert count_up(Config(tmp_path, resume=True)) == ([6, 6, 6], 4)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == list(range(6))
    assert count_up(Config(tmp_path, resume=True)) == ([6, 6, 6], 6)


def test_resuming_where_nothing_was_saved_starts_at_the_beginning(tmp_path):
    with pytest.raises(InterruptedError):
        count_up(Config(tmp_path), stop=1)
    assert count_up(Config(tmp_path, resume=True)) == ([6, 6, 6], 0)
    assert [row["step"] for row in read_lines(tmp_path / "metrics.jsonl")] == list(range(6))


def test_a_full_folder_is_kept_unless_overwriting_is_asked_for(tmp_path):
    count_up(Config(tmp_path))
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(FileExistsError, match="--resume.*--overwrite"):
        gpt.Run({}, **vars(Config(tmp_path)))
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert count_up(Config(tmp_path, overwrite=True)) == ([6, 6, 6], 0)
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 6


def test_a_checkpoint_of_another_shape_is_a_clear_error(tmp_path):
    count_up(Config(tmp_path))
    with pytest.raises(ValueError, match="does not fit this configuration: --seed was 0, is 7"):
        run = gpt.Run({}, **vars(Config(tmp_path, seed=7, resume=True)))
        run.restore(Count(jnp.zeros(4), jnp.zeros(2)))


def test_a_nan_stops_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="step 3 is nan.*lower --lr"):
        count_up(Config(tmp_path), loss=lambda step: float("nan") if step == 3 else 1.0)
    assert os.listdir(tmp_path / "checkpoint") == ["2"]
    with pytest.raises(FloatingPointError, match="step 0 is nan. Nothing was saved yet"):
        count_up(Config(tmp_path / "at-once"), loss=lambda step: float("nan"))


def test_a_run_that_changes_no_weight_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="6 steps have changed no weight"):
        count_up(Config(tmp_path / "still"), by=0)
    assert count_up(Config(tmp_path / "meant"), by=0, lr=0.0)[0] == [0, 0, 0]
    assert count_up(Config(tmp_path / "little"), by=1e-30)[0] != [0, 0, 0]
    assert count_up(Config(tmp_path / "meant", resume=True), by=0)[1] == 6  # a finished run has nothing left to learn
    with pytest.raises(InterruptedError):
        count_up(Config(tmp_path / "resumed"), by=0, stop=4)
    with pytest.raises(ValueError, match="6 steps have changed no weight"):
        count_up(Config(tmp_path / "resumed", resume=True), by=0)


def test_a_run_that_is_to_end_where_it_stands_takes_no_step_and_warns_of_nothing(tmp_path, capsys):
    with pytest.raises(InterruptedError):
        count_up(Config(tmp_path), stop=5)
    assert count_up(Config(tmp_path, resume=True, steps=4, seed=7)) == ([4, 4, 4], 4)
    assert capsys.readouterr().err == ""
    with pytest.raises(ValueError, match="checkpoint is of step 4: --steps 3 lies behind it"):
        count_up(Config(tmp_path, resume=True, steps=3))


class Slow:
    """A number that a device has computed after so many seconds, as an array that is asked for before it is there."""

    def __init__(self, seconds):
        self.ready = time.perf_counter() + seconds

    def block_until_ready(self):
        time.sleep(max(0.0, self.ready - time.perf_counter()))
        return self

    def __array__(self, dtype=None, copy=None):
        self.block_until_ready()
        return np.ones((), dtype)


def test_seconds_are_those_of_the_step_and_not_of_its_dispatch(tmp_path, capsys):
    """Steps 1 and 3 compute for long; the host is busy before step 2, for 0.3 s longer than step 1 computes."""
    run = gpt.Run({}, **vars(Config(tmp_path, steps=4)))
    for step in run.steps(0):
        time.sleep(0.9 if step == 2 else 0.0)
        run.log(step, {"loss": Slow({1: 0.6, 3: 0.9}.get(step, 0.0))})
    seconds = [row["seconds"] for row in read_lines(tmp_path / "metrics.jsonl")]
    assert seconds == pytest.approx([0, 0.6, 0.3, 0.9], abs=0.25)
    assert "s a step, about 0 min to go" in capsys.readouterr().out


def test_a_log_file_hears_of_a_long_step_and_of_many_short_ones(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpt, "PATIENCE", 0.2)
    run = gpt.Run({}, **vars(Config(tmp_path, steps=200)))
    for step in run.steps(0):
        if step == 12:
            time.sleep(0.4)
        run.log(step, {"loss": Slow(0.7 * (step == 5))})
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("step     5/200  ") and line.endswith("s so far") for line in said) >= 2
    assert any(line.startswith("step    12/200  loss") for line in said)  # not one of every tenth


def test_a_log_file_hears_of_long_work_and_not_of_short(capsys, monkeypatch):
    monkeypatch.setattr(gpt, "PATIENCE", 0.2)
    for seconds, heard in ((0.6, True), (0.0, False)):
        for _ in gpt.progress(10, iterable=range(10), desc="scores", unit="batches"):
            time.sleep(seconds / 10)
        said = capsys.readouterr().err.splitlines()
        assert bool(said) == heard and all(line.startswith("scores: ") and "/10 batches, 00:0" in line for line in said)


def busy(seconds: float):
    """Keep the main thread outside of Python, where its signal handlers are not called, as a rollout's arrays do."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # another thread gets it, else it would end the sleep
    ctypes.CDLL(None).usleep(int(1e6 * seconds))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def interrupt_in(seconds: float):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


@pytest.mark.parametrize("wait", [busy, time.sleep])
def test_a_signal_is_heard_while_the_device_computes(tmp_path, capsys, monkeypatch, wait):
    heard = []
    monkeypatch.setattr(gpt.Run, "_ask_to_stop", lambda run, number, again: heard.append((time.perf_counter(), again)))
    run, begin = gpt.Run({}, **vars(Config(tmp_path, steps=2))), None
    for step in run.steps(0):
        if step == 0:
            begin = time.perf_counter()
            interrupt_in(0.2), interrupt_in(0.5)
            wait(1.5)
        run.log(step, {"loss": 1.0})
    assert [again for _, again in heard] == [False, True] and heard[1][0] - begin < 1.2


def test_a_step_that_does_not_end_is_given_up_and_the_ones_before_it_were_saved(tmp_path, monkeypatch):
    """Steps of 0.3 s are long ones here, and a signal's minute is 0.3 s: the step that lasts 3 s is not waited for."""
    monkeypatch.setattr(gpt, "PATIENCE", 0.2)
    monkeypatch.setattr(gpt, "GRACE", 0.3)
    given_up, begin = [], time.perf_counter()
    monkeypatch.setattr(gpt.Run, "_stop_at_once", lambda run: given_up.append((time.perf_counter(), run._last_good())))
    run = gpt.Run({}, **vars(Config(tmp_path, steps=4, save_every=100)))
    state, first = run.restore((jnp.zeros(()),))
    with pytest.raises(SystemExit):  # it ended after all, since nothing here really stops
        for step in run.steps(first):
            if step == 2:
                run.manager.wait_until_finished()
                begin = time.perf_counter()
                interrupt_in(0.1)
                busy(3)
            run.log(step, {"loss": Slow(0.3)})
            run.checkpoint(step, state)
    assert given_up[0][0] - begin < 2 and "after step 2." in given_up[0][1]


def test_a_step_that_ends_after_a_signal_is_saved_however_long_that_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "GRACE", 0.2)
    monkeypatch.setattr(gpt.Run, "_stop_at_once", lambda run: pytest.fail("given up"))
    run = gpt.Run({}, **vars(Config(tmp_path, steps=4, save_every=100)))
    state, first = run.restore((jnp.zeros(()),))
    save = run.manager.save
    monkeypatch.setattr(run.manager, "save", lambda *args, **more: (busy(1.5), save(*args, **more)))
    with pytest.raises(SystemExit):
        for step in run.steps(first):
            os.kill(os.getpid(), signal.SIGINT)
            run.log(step, {})
            run.checkpoint(step, state)
    assert run.manager.latest_step() == 1


def test_a_stopped_run_becomes_a_model_folder_without_more_steps(config, tmp_path, capsys):
    """As far as it came: --resume --steps with the steps that are done."""
    config = dataclasses.replace(config, out=tmp_path / "stopped", save_every=3)
    run_steps = gpt.Run.steps

    def stops(run, first):
        for step in run_steps(run, first):
            run.stopping = "SIGINT" if step == 4 else None
            yield step

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(gpt.Run, "steps", stops)
        sft.main(config)
    assert "--resume --steps 5 makes a model folder" in capsys.readouterr().err
    sft.main(dataclasses.replace(config, resume=True, steps=5))
    model, _ = gpt.load(config.out)
    assert gpt.count_parameters(model) and len(read_lines(config.out / "metrics.jsonl")) == 5


# training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    letters = "abcdefgh"
    rng = np.random.default_rng(0)
    starts, lengths = rng.integers(0, 8, 80), rng.integers(2, 12, 80)
    texts = [" ".join(letters[(s + i) % 8] for i in range(n)) for s, n in zip(starts, lengths)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def config(text, words):
    return sft.Config(
        init=None, tokenizer=str(words), data=(str(text),), steps=STEPS, batch_size=4, length=16, lr=3e-3,
        layers=1, heads=2, dim=16, save_every=40,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """An uninterrupted run: its folder and how many programs its train step became."""
    out = tmp_path_factory.mktemp("whole")
    before, programs = jax.sharding.get_mesh(), sft.train_step._cache_size()
    sft.main(dataclasses.replace(config, out=out))
    jax.set_mesh(before)
    return out, sft.train_step._cache_size() - programs


def test_the_train_step_is_compiled_once(whole):
    assert whole[1] == 1


def test_metrics_have_a_row_a_step_and_the_loss_falls(whole):
    rows = read_lines(whole[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert {"loss", "lr", "grad_norm", "seconds"} <= rows[0].keys()
    assert abs(rows[0]["loss"] - np.log(16)) < 0.1  # a fresh model knows nothing
    assert np.mean([row["loss"] for row in rows[-20:]]) < 0.8


def test_the_final_folder_is_a_model_that_knows_its_run(whole, config):
    model, tokenizer = gpt.load(whole[0])
    assert model.config.dim == 16 and tokenizer.eos_id == 14
    prompt = np.array([tokenizer.encode("c d e")], np.int32)
    out = gpt.generate(model, prompt, np.ones_like(prompt), jax.random.key(0), 2, ends=tokenizer.end_ids, temperature=0)
    assert tokenizer.decode(out.tokens[0]) in ("f g", "f", "")
    run = json.loads((whole[0] / "config.json").read_text())["run"]
    assert run["config"]["lr"] == "0.003" and run["parameters"] == gpt.count_parameters(model)
    assert list(run["data"].values()) == [gpt.file_hash(config.data[0])]


def flags(config, *more):
    """The command line of the changed fields."""
    changed = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    changed = {k: v for k, v in changed.items() if v != getattr(sft.Config(), k)}
    words = [[f"--{k.replace('_', '-')}", *(v if isinstance(v, tuple) else [v])] for k, v in changed.items()]
    return [str(word) for group in words for word in group] + list(more)


def wait_for_rows(process, file, rows):
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        if file.exists() and file.read_bytes().count(b"\n") >= rows:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"no {rows} rows in {file}: {process.communicate()[1]}")


@pytest.fixture(scope="module")
def interrupted(config, tmp_path_factory):
    """The same run, stopped by SIGTERM, continued, killed by SIGKILL, and continued to its end."""
    config = dataclasses.replace(config, out=tmp_path_factory.mktemp("interrupted"))
    metrics = config.out / "metrics.jsonl"
    process = start_python("sft.py", *flags(config))
    wait_for_rows(process, metrics, 60)
    process.send_signal(signal.SIGTERM)
    stopped = (process.wait(100), process.communicate()[1], metrics.read_text())
    process = start_python("sft.py", *flags(config, "--resume"))
    wait_for_rows(process, metrics, 140)
    process.send_signal(signal.SIGKILL)
    killed = (process.wait(100), metrics.read_text(), (config.out / "model.safetensors").exists())
    process.communicate()
    before = jax.sharding.get_mesh()
    sft.main(dataclasses.replace(config, resume=True))
    jax.set_mesh(before)
    return config.out, stopped, killed


def test_sigterm_saves_and_exits_with_1(interrupted):
    code, err, metrics = interrupted[1]
    assert code == 1
    rows = metrics.count("\n")
    assert 60 <= rows < STEPS
    assert f"stopped by SIGTERM after step {rows}: --resume" in err


def test_a_killed_run_left_its_checkpoint_and_no_model(interrupted):
    code, metrics, model = interrupted[2]
    assert code == -signal.SIGKILL and not model
    assert 140 <= metrics.count("\n") < STEPS


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(interrupted, whole):
    one, other = (read_lines(folder / "metrics.jsonl") for folder in (interrupted[0], whole[0]))
    for row in one + other:
        del row["seconds"]
    assert one == other
    assert (interrupted[0] / "model.safetensors").read_bytes() == (whole[0] / "model.safetensors").read_bytes()


def test_a_diverging_run_stops_with_advice(config, tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(config, out=tmp_path / "out", lr=1e30, steps=20)
    monkeypatch.setattr(sys, "argv", ["sft.py", *flags(config)])
    with pytest.raises(SystemExit) as stop:
        gpt.cli(sft.main, sft.Config, "")
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(("error: the loss of step", "error: the grad_norm of step")) and "Try a lower --lr" in error
    assert not (config.out / "model.safetensors").exists()


@pytest.mark.parametrize(
    "script, hint", [(sft, "raise --micro-batches, or give --remat"), (evaluate, "lower --batch-size")]
)
def test_a_full_memory_is_said_with_what_to_do(monkeypatch, capsys, script, hint):
    def main(config):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 27.45GiB")

    monkeypatch.setattr(sys, "argv", ["any.py"])
    with pytest.raises(SystemExit) as stop:
        gpt.cli(main, script.Config, "")
    error = capsys.readouterr().err
    assert stop.value.code == 1 and f"the memory is full: {hint}" in error and "27.45GiB" in error
    fields = {field.name for field in dataclasses.fields(script.Config)}
    assert {name.replace("-", "_") for name in re.findall(r"--([\w-]+)", error)} <= fields  # each one is an option here


def test_a_run_on_demonstrations_reports_heldout_loss_and_samples(config, tmp_path):
    rows = [{"prompt": f"{a} {b}", "completion": f" {b} {a}"} for a in "abcd" for b in "efgh"]
    for name in ("demos", "demos-heldout"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    sft.main(dataclasses.replace(config, data=(str(tmp_path / "demos.jsonl"),), out=out, steps=2, eval_every=1))
    assert [row["val/loss"] > 0 for row in read_lines(out / "metrics.jsonl")] == [True, True]
    samples = read_lines(out / "samples.jsonl")
    assert {row["step"] for row in samples} == {0, 1} and all(row["prompt"] for row in samples)


# devices --------------------------------------------------------------------------------------------------------------

EIGHT = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import gpt

assert jax.device_count() == 8
config = gpt.make_config(vocab_size=256, context=64, layers=1, heads=2, dim=64, family="gpt2")
model = jax.jit(partial(gpt.init, config))(jax.random.key(0))
model = jax.tree.map(lambda x: 5 * x if x.ndim > 2 else x, model)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 256, (16, 10)).astype(np.int32)
mask = (np.arange(10) < rng.integers(2, 11, (16, 1))).astype(np.int32)
prompts = dict(tokens=tokens, mask=mask[:, ::-1])

def loss_fn(model, batch):
    loss = -gpt.masked_mean(gpt.token_logprobs(model, batch["tokens"]), batch["mask"][:, 1:])
    return loss, {"loss": loss}

def compute(model):
    optimizer = gpt.adamw(0.01, weight_decay=0.1, eps=1e-3)
    opt_state = gpt.shard(optimizer.init(model))

    @jax.jit
    def step(model, opt_state, batch):
        count = lambda batch: batch["mask"][:, 1:].sum()
        (loss, _), grads = gpt.gradients(loss_fn, model, batch, 2, count)
        updates, opt_state = optimizer.update(grads, opt_state, model)
        return loss, grads, jax.tree.map(jnp.add, model, updates)

    loss, grads, after = step(model, opt_state, gpt.put_batch(dict(tokens=tokens, mask=mask)))
    place, numbers = gpt.put_batch(prompts), np.arange(16)
    out = gpt.generate(model, place["tokens"], place["mask"], jax.random.key(1), 8, ends=(2,), row_numbers=numbers)
    return gpt.to_numpy((loss, grads, out)), after, opt_state

(loss, grads, out), after, _ = compute(model)
key = gpt.start(0)
sharded = gpt.shard(model)
(loss8, grads8, out8), after8, state8 = compute(sharded)
gap = lambda a, b: max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))
share = lambda tree: [
    [gpt._path(p), x.nbytes, x.addressable_shards[0].data.nbytes] for p, x in jax.tree_util.tree_leaves_with_path(tree)
]
print(json.dumps(dict(
    loss=float(abs(loss - loss8)), grads=gap(grads, grads8), size=float(np.abs(grads.wte).max()),
    logprobs=gap(out.logprobs, out8.logprobs), same=bool((out.tokens == out8.tokens).all()),
    texts=len(np.unique(out.tokens, axis=0)), share=share(sharded), state=share(state8),
    after=gap(gpt.to_numpy(after), gpt.to_numpy(after8)), back=gap(gpt.to_numpy(sharded), gpt.to_numpy(model)),
    after_share=share(after8),
)))
"""


@pytest.fixture(scope="module")
def eight():
    code, out, err = run_python("-c", EIGHT, JAX_NUM_CPU_DEVICES="8")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_eight_devices_give_the_loss_gradients_and_update_of_one(eight):
    assert eight["size"] > 1e-3
    assert eight["loss"] < 1e-5 and eight["grads"] < 1e-5 and eight["after"] < 1e-5


def test_eight_devices_give_the_text_of_one(eight):
    assert eight["same"] and eight["logprobs"] < 1e-4
    assert eight["texts"] == 16


def test_large_arrays_are_spread_over_the_devices(eight):
    assert eight["back"] == 0
    for tree in ("share", "state", "after_share"):
        large = [(name, whole, part) for name, whole, part in eight[tree] if whole >= 4 * 2**14]
        assert any("wte" in name for name, *_ in large) and any("blocks" in name for name, *_ in large)
        assert all(part * 8 == whole for _, whole, part in large)


def test_a_leaf_is_split_along_its_longest_axis_but_never_along_its_layers():
    mesh = jax.sharding.AbstractMesh((8, 1), ("data", "tensor"))
    blocks, leaf = (jax.tree_util.GetAttrKey("blocks"),), jax.ShapeDtypeStruct
    spec = lambda path, *shape: tuple(gpt.sharding(path, leaf(shape, jnp.float32), mesh).spec)
    assert spec(blocks, 512, 64, 128) == (None, None, "data")
    assert spec((), 512, 64) == ("data", None)
    assert spec((), 509, 64) == (None, "data")
    assert spec((), 16, 16) == spec((), 509, 63) == ()
    assert spec((*blocks, jax.tree_util.GetAttrKey("q_norm"), jax.tree_util.GetAttrKey("scale")), 28, 128) == ()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_kept_for_the_next_step():
    """Four threads take a block ten times over, one thread after the other; it is larger than the heap that a thread
    would have for itself (64 MB). The system hands out a few."""
    code = """
import ctypes, resource, threading, gpt
gpt.start()
size = 128 << 20
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
turn, together = threading.Lock(), threading.Barrier(4)
def use_memory():
    libc.free(libc.malloc(2000))  # from here on the thread has its heap
    together.wait()
    for _ in range(10):
        with turn:
            block = libc.malloc(size)
            libc.memset(block, 1, size)
            libc.free(block)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
threads = [threading.Thread(target=use_memory) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults * resource.getpagesize() / size)
"""
    env = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4, done.stdout


def test_a_batch_that_does_not_divide_over_the_devices_is_refused(monkeypatch):
    monkeypatch.setattr(jax.sharding, "get_mesh", lambda: jax.sharding.AbstractMesh((8,), ("data",)))
    gpt.check_batch_size(16)
    with pytest.raises(ValueError, match="--batch-size 12 .*8 devices"):
        gpt.check_batch_size(12)
    with pytest.raises(ValueError, match="--batch-size 0: a batch has 1 row at least"):
        gpt.check_batch_size(0)


# command lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["sft", "reward", "ppo", "prepare", "toy"])
def test_help_explains_every_option(script):
    code, out, _ = run_python(f"{script}.py", "--help", COLUMNS="200")
    assert code == 0
    assert "--out" in out and "default" in out


def test_usage_errors_exit_with_2_and_failures_with_1(tmp_path):
    assert run_python("sft.py", "--no-such-option", "1")[0] == 2
    code, _, err = run_python("sft.py", "--init", tmp_path / "base", "--data", ROOT / "tests" / "test_runs.py")
    assert code == 1
    assert err.startswith("error: ") and "test_runs.py:1: not JSON" in err


def test_a_missing_model_is_one_line_that_says_where_models_come_from(text, tmp_path):
    code, _, err = run_python("sft.py", "--init", tmp_path / "sft", "--data", text, "--out", tmp_path / "out")
    assert code == 1
    assert err.count("\n") == 1 and f"no model in {tmp_path / 'sft'}" in err and "Makefile has the command" in err
    assert not (tmp_path / "out").exists()


COMPILE = """
import jax, gpt
gpt.start()
model = jax.jit(lambda key: gpt.init(gpt.make_config(32, 32, 2, 2, 16), key))(jax.random.key(0))
prompts = jax.numpy.ones((2, 4), int)
gpt.generate(model, prompts, prompts, jax.random.key(0), 4, ends=(0,))
"""


def test_compiled_programs_are_kept_in_the_home_folder_or_where_the_environment_says(tmp_path):
    def kept(**more):
        env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_ENABLE_COMP")}
        env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}  # what is compiled in a moment is not kept
        subprocess.run([sys.executable, "-c", COMPILE], check=True, env=env | {"HOME": str(tmp_path)} | more, cwd=ROOT)
        return {path.name for path in tmp_path.rglob("*-cache")}

    assert not kept(JAX_ENABLE_COMPILATION_CACHE="false")
    first = kept()
    assert any(name.startswith("jit_generate") for name in first)
    assert kept() == first  # found again, not compiled again
    elsewhere = tmp_path / "elsewhere"
    kept(JAX_COMPILATION_CACHE_DIR=str(elsewhere), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    assert any(elsewhere.glob("jit_generate*-cache"))


TWICE = """
import os, signal, sys, time
import jax.numpy as jnp
import gpt

run = gpt.Run({}, steps=9, out=sys.argv[1], seed=0, save_every=2)
state, first = run.restore((jnp.zeros(()),))
for step in run.steps(first):
    run.log(step, {})
    run.checkpoint(step, state)
    if step == int(sys.argv[2]):
        run.manager.wait_until_finished()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
"""


@pytest.mark.parametrize("step, good", [("0", "Nothing was saved yet."), ("2", "The last good state is in ")])
def test_a_second_signal_stops_at_once_and_says_what_is_left(tmp_path, step, good):
    code, _, err = run_python("-c", TWICE, tmp_path / "run", step)
    assert code == 1 and "a second one stops at once" in err and f"stopped at once. {good}" in err
