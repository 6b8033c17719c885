"""scale.py: its formulas beside shapes that a run would have, and beside the compiler's account."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import gpt
import scale

ROOT = Path(__file__).resolve().parent.parent
SHAPES = {**scale.MODELS, "grouped": gpt.make_config(96, 32, 2, 4, 32, kv_heads=2, head_dim=16, ffn=64)}


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_model(name):
    c = SHAPES[name]
    model = jax.eval_shape(partial(gpt.init, c), jax.random.key(0))
    assert scale.parameters(c) == gpt.count_parameters(model)
    layer = sum(x.size for x in jax.tree.leaves(model.blocks)) // c.layers
    assert scale.parameters_a_layer(c) == layer
    adapter = jax.eval_shape(partial(gpt.init_adapter, rank=3), model, key=jax.random.key(0))
    assert scale.adapter_parameters(c, 3) == gpt.count_parameters(adapter)
    assert len(jax.tree.leaves(model.blocks)) == 9  # what `traffic` counts


@pytest.mark.parametrize("name, devices, tensor", [("7B", 8, 1), ("7B", 64, 1), ("70B", 8, 8), ("70B", 64, 8)])
def test_weights_and_optimiser_of_large_models_are_a_part_in_n(name, devices, tensor):
    c, mesh = scale.MODELS[name], jax.sharding.AbstractMesh((devices // tensor, tensor), ("data", "tensor"))
    model = scale.shapes(c)
    state = jax.eval_shape(gpt.adamw(1e-3).init, model)
    whole = 4 * 3 * scale.parameters(c)
    held = scale.device_bytes(model, mesh) + scale.device_bytes(state, mesh)
    assert whole <= held * devices < 1.02 * whole
    assert scale.state_bytes(c, mesh, "none", 8)["learning"] == pytest.approx(2 * held, rel=1e-6)
    base = scale.state_bytes(c, mesh, "lora", 8)["frozen"] - 4 * scale.adapter_parameters(c, 8)
    assert base == pytest.approx(2 * scale.parameters(c) / devices, rel=0.02)


def test_traffic_of_one_layer_by_hand():
    """7B, 8 devices, FSDP: each of 4 parts gathers 13.5 GB twice, of which a ring sends 7/8, and scatters 27 GB."""
    work, c = scale.Work(step_rows=256, part_rows=64), scale.MODELS["7B"]
    found = scale.traffic(c, work, 8, 1, "none")
    assert found["all-gather"][1] == pytest.approx(4 * 2 * 2 * 6738415616 * 7 / 8)
    assert found["reduce-scatter"][1] == pytest.approx(4 * 4 * 6738415616 * 7 / 8)
    assert found["all-reduce"] == (0, 0)
    # tensor alone: nothing is gathered; a sum of 64 x 1024 x 4096 bf16 numbers, 6 a layer, sends 2 x 7/8 of them
    found = scale.traffic(c, work, 1, 8, "none")
    assert found["all-gather"][1] == found["reduce-scatter"][1] == 0
    assert found["all-reduce"][1] == pytest.approx(6 * 32 * 4 * 2 * 7 / 8 * 64 * 1024 * 4096 * 2)


def test_a_plan_adds_up_and_sharing_saves():
    rows = {share: scale.plan("7B", 8, 1, share, scale.Work()) for share in ("none", "trunk", "lora")}
    for row in rows.values():
        held = row["learning"] + row["frozen"] + max(row["step"] + row["activations"], row["rollout"])
        assert row["peak"] == held and row["fits"] == (held < 0.92 * 80e9)
    assert rows["lora"]["peak"] < rows["trunk"]["peak"] < rows["none"]["peak"]
    time = rows["none"]["seconds"]
    assert time["update"] == max(time["arithmetic"], time["links"])
    # 256 rows of 1,024 tokens, two models, 8 N FLOPs a token, at 40% of 8 x 989 TFLOP/s
    assert time["arithmetic"] == pytest.approx(2 * 8 * 6738415616 * 256 * 1024 / (8 * 989e12 * 0.4))


def test_the_compiler_finds_a_part_in_n_on_each_device(tmp_path):
    out = tmp_path / "scale.json"
    command = [sys.executable, "scale.py", "--only", "measured", "--out", str(out), "--layers", "1", "--dim", "128"]
    done = subprocess.run([*command, "--tokens", "64"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["measured"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row["held"] == pytest.approx(row["weights"] + row["optimiser"], rel=0.01)
        assert row["held"] * row["devices"] == pytest.approx(rows[0]["held"], rel=0.1)
    assert rows[3]["activations"] < 0.5 * rows[0]["activations"]
    c = gpt.make_config(4096, 64, 1, 8, 128)
    assert rows[0]["weights"] == jnp.dtype(jnp.float32).itemsize * scale.parameters(c)
