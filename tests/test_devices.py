"""Several devices and several processes: every training script does what it does on one device."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import gpt
import toy

ROOT = Path(__file__).resolve().parent.parent
RATE = 0.1  # as in every_script.py: what a weight moves is so many times its gradient
SCRIPTS = ("sft", "reward", "ppo", "lora", "dpo", "online", "ipo", "kto")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Toy data, and a fresh model with matrices large enough to be split and opinions strong enough to differ."""
    world = tmp_path_factory.mktemp("world")
    toy.main(toy.Config(out=world / "data", base=10, demos=64, pairs=64, thumbs=64, prompts=64, heldout=24))
    tokenizer = gpt.load_tokenizer(world / "data")
    shape = gpt.make_config(tokenizer.vocab_size, 64, layers=1, heads=4, dim=128)
    model = jax.jit(partial(gpt.init, shape))(jax.random.key(0))
    gpt.save(world / "sft", jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, model), tokenizer)
    return world


def begin(world, out, *names, devices=1, **env):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "every_script.py"), str(world), str(out), *names],
        cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "DEBUG": "1"} | env,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def end(*processes, code=0):
    for process in processes:
        _, errors = process.communicate(timeout=400)
        assert process.returncode == code, errors[-3000:]


def begin_pair(world, out, *names):
    """Two processes with two devices each; the operating system names a free port."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        address = f"localhost:{listener.getsockname()[1]}"
    env = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    return [begin(world, out, *names, devices=2, JAX_PROCESS_ID=str(i), **env) for i in range(2)]


@pytest.fixture(scope="module")
def one(world, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("one")
    end(begin(world, out))
    return out


def rows(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def moved(world, folder) -> dict[str, np.ndarray]:
    """Two steps' gradients, by the way that the weights went."""
    before, after = (load_file(f / "model.safetensors") for f in (world / "sft", folder))
    return {name: (x - before[name]) / RATE for name, x in after.items() if name in before}


def check_same(world, one, other, *names):
    """Metrics to 1e-5, gradients to 3e-5 of the largest, text to the letter."""
    for name in names:
        ours, theirs = rows(one / name / "metrics.jsonl"), rows(other / name / "metrics.jsonl")
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs):
            for noise in ("seconds", "rewards/accuracies"):  # at the first step all margins are 0, to a rounding error
                a.pop(noise, 0), b.pop(noise, 0)
            assert b == pytest.approx(a, rel=3e-5, abs=1e-5), name
        ours, theirs = moved(world, one / name), moved(world, other / name)
        largest = max(np.abs(x).max() for x in ours.values())
        assert largest > 1e-3
        gap = 3e-5 * max(1, largest)  # IPO's gradients are in the hundreds
        for weight, x in ours.items():
            np.testing.assert_allclose(theirs[weight], x, atol=gap, err_msg=f"{name} {weight}")
    for file in ("sft/samples.jsonl", "ppo/samples.jsonl", "online/samples.jsonl"):
        if file.split("/")[0] in names:
            ours, theirs = rows(one / file), rows(other / file)
            texts = [[{k: v for k, v in row.items() if isinstance(v, str)} for row in side] for side in (ours, theirs)]
            assert texts[0] == texts[1] and texts[0]
    if "reward" in names:
        ours, theirs = (json.loads((out / "reward" / "report.json").read_text()) for out in (one, other))
        for key in ("pairs", "accuracy", "longer_wins", "gap", "score_mean", "score_std"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4, abs=1e-5), key


def test_eight_devices_do_in_every_script_what_one_does(world, one, tmp_path):
    end(begin(world, tmp_path, devices=8))
    check_same(world, one, tmp_path, *SCRIPTS)


def test_two_processes_do_what_one_does_and_stop_together(world, one, tmp_path):
    pair = begin_pair(world, tmp_path, *SCRIPTS, "sft-endless")
    log = tmp_path / "endless" / "metrics.jsonl"
    while all(process.poll() is None for process in pair) and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGTERM)  # one of the two: both save the same step and stop
    end(*pair, code=1)
    assert len(os.listdir(tmp_path / "endless" / "checkpoint")) == 1
    check_same(world, one, tmp_path, *SCRIPTS)


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_tensor_axis_changes_nothing(world, one, tmp_path, tensor):
    end(begin(world, tmp_path, "sft", "ppo", "lora", devices=8, TENSOR_PARALLEL=str(tensor)))
    check_same(world, one, tmp_path, "sft", "ppo", "lora")
    assert f"{8 // tensor} x {tensor} tensor" in (tmp_path / "ppo" / "config.json").read_text()


def test_a_run_resumes_on_another_number_of_devices(world, one, tmp_path):
    end(begin(world, tmp_path, "sft-first-half", devices=4))
    end(begin(world, tmp_path, "sft-second-half", devices=2))
    losses = [[row["loss"] for row in rows(out / "sft" / "metrics.jsonl")] for out in (one, tmp_path)]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], abs=1e-5)
    for weight, x in moved(world, one / "sft").items():
        np.testing.assert_allclose(moved(world, tmp_path / "sft")[weight], x, atol=1e-5, err_msg=weight)


def test_weights_go_over_the_tensor_axis_in_pairs_and_all_else_over_all_devices():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    key = jax.tree_util.GetAttrKey

    def spec(path, *shape):
        path = tuple(map(key, path.split(".")))
        return tuple(gpt.sharding(path, jax.ShapeDtypeStruct(shape, jnp.float32), mesh).spec)

    assert spec("blocks.q.weight", 6, 64, 128) == (None, "data", "tensor")
    assert spec("mu.blocks.down.weight", 6, 128, 64) == (None, "tensor", "data")
    assert spec("wte", 512, 64) == ("tensor", "data")
    assert spec("wpe", 512, 64) == (("data", "tensor"), None)
    assert spec("wte", 509, 64) == (None, ("data", "tensor"))  # a vocabulary that does not divide
    assert spec("blocks.norm1.scale", 6, 64) == ()


ADDRESS = dict(JAX_COORDINATOR_ADDRESS="a:1")
SLURM = dict(SLURM_JOB_ID="7", SLURM_PROCID="1", SLURM_STEP_NUM_TASKS="8")


@pytest.mark.parametrize(
    "env, told",
    [
        ({}, None),
        (SLURM, None),  # an allocation alone does not say that its other tasks run this script
        (SLURM | {"DISTRIBUTED": "1"}, (None,)),  # jax.distributed finds the others
        (ADDRESS | dict(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1"), ("a:1", 2, 1)),
    ],
)
def test_a_process_joins_those_that_it_is_told_of(env, told, monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "DISTRIBUTED"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    calls, before = [], jax.sharding.get_mesh()
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    gpt.start()
    jax.set_mesh(before)
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    assert calls == ([] if told is None else [told])


def test_half_a_description_of_the_other_processes_is_an_error(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES and JAX_PROCESS_ID"):
        gpt.start()
    jax.config.update("jax_cpu_enable_async_dispatch", True)
