"""What a device holds when there are N of them: by the compiler's own account, by the rule of sharding for models of 7B
and 70B, and on paper (the table of docs/scale.md, with its formulas).

    python tests/test_scale.py          # the compiler's account on 1, 2, 4 and 8 devices, a line of JSON each
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt
import sft

ROOT = Path(__file__).resolve().parent.parent
MODELS = {
    "7B": gpt.Config(32000, 4096, 32, 32, 4096, 11008, 32, 128, tied=False),  # Llama 2
    "70B": gpt.Config(128256, 8192, 80, 64, 8192, 28672, 8, 128, tied=False),  # Llama 3
}


def shapes(c: gpt.Config):
    """A model's arrays without their contents."""
    return jax.eval_shape(partial(gpt.init, c), jax.random.key(0))


def device_bytes(tree, mesh) -> int:
    """Bytes that one device holds of a tree of arrays spread by `gpt.sharding`."""
    part = lambda path, x: np.prod(gpt.sharding(path, x, mesh).shard_shape(x.shape)) * x.dtype.itemsize
    return int(sum(part(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)))


# ---------------------------------------------------------------------------------------------------- the compiler

ROWS, TOKENS = 16, 128


def measure(n: int) -> dict[str, int]:
    """XLA's account of a training step (AdamW, fp32) compiled for n devices: bytes that each of them holds."""
    mesh = gpt.make_mesh(jax.devices()[:n])
    with jax.set_mesh(mesh):
        place = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpt.sharding(path, x, mesh))
        optimizer, model = gpt.adamw(1e-3), shapes(gpt.make_config(2048, TOKENS, 1, 8, 256))
        state = jax.tree_util.tree_map_with_path(place, (model, jax.eval_shape(optimizer.init, model)))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
        batch = {"tokens": jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32, sharding=rows)}

        def loss_fn(model, batch):
            hidden, targets = model(batch["tokens"], remat=True)[:, :-1], batch["tokens"][:, 1:]
            return -gpt.head_logprobs(model, hidden, targets)[0].mean(), {}

        kept = (*jax.tree.map(lambda x: x.sharding, state), None)
        step = jax.jit(partial(gpt.descend, optimizer, loss_fn), donate_argnums=(0, 1), out_shardings=kept)
        account = step.lower(*state, batch).compile().memory_analysis()
    held = account.argument_size_in_bytes - 4 * ROWS * TOKENS // n  # without the batch
    weights, optimiser = (device_bytes(tree, mesh) for tree in state)
    return dict(devices=n, weights=weights, optimiser=optimiser, held=held, activations=account.temp_size_in_bytes)


def test_the_compiler_finds_a_part_in_n_on_each_device():
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["devices"] for row in found] == [1, 2, 4, 8]
    for row in found:
        assert row["held"] == pytest.approx(row["weights"] + row["optimiser"], rel=0.01)
        assert row["held"] * row["devices"] == pytest.approx(found[0]["held"], rel=0.1)
    assert found[0]["weights"] == 4 * gpt.count_parameters(shapes(gpt.make_config(2048, TOKENS, 1, 8, 256)))
    assert found[3]["activations"] < 0.5 * found[0]["activations"]
    for row, told in zip(found, document_table("devices", 4)):
        assert [f"{row[name] / 1e6:,.2f}" for name in ("weights", "optimiser", "held")] == told[1:4]


# ---------------------------------------------------------------------------------------------------- 7B and 70B


@pytest.mark.parametrize("name, devices, tensor", [("7B", 8, 1), ("7B", 64, 1), ("70B", 8, 8), ("70B", 64, 8)])
def test_weights_and_optimiser_of_large_models_are_a_part_in_n(name, devices, tensor):
    mesh = jax.sharding.AbstractMesh((devices // tensor, tensor), ("data", "tensor"))
    model = shapes(MODELS[name])
    state = jax.eval_shape(gpt.adamw(1e-3).init, model)
    whole = 3 * 4 * gpt.count_parameters(model)
    assert whole <= (device_bytes(model, mesh) + device_bytes(state, mesh)) * devices < 1.02 * whole


def document_table(head: str, rows: int) -> list[list[str]]:
    """The cells of the table in docs/scale.md that begins with this head."""
    lines = (ROOT / "docs" / "scale.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {head} |")) + 2
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : start + rows]]


def test_sizes_on_paper_are_those_of_the_models():
    told = {name: [int(x.replace(",", "")) for x in cells] for name, *cells in document_table("size", 9)}
    told = {name.split(":")[0]: cells for name, cells in told.items()}
    for i, c in enumerate(MODELS.values()):
        model = shapes(c)
        adapter = partial(gpt.init_adapter, rank=8)
        assert told["N"][i] == gpt.count_parameters(model)
        assert told["A"][i] == gpt.count_parameters(jax.eval_shape(adapter, model, key=jax.random.key(0)))
        values = c.layers, c.dim, c.ffn, c.heads, c.kv_heads, c.head_dim, c.vocab_size
        assert [told[name][i] for name in "LDFHKEV"] == list(values)


def plan(name: str, data: int, tensor: int, adapters: bool) -> list[float]:
    """A line of the table by the formulas of docs/scale.md: GB, and GB and seconds."""
    c, n = MODELS[name], data * tensor
    N = gpt.count_parameters(shapes(c))
    A = 8 * (
        c.layers * (4 * c.dim + 2 * (c.heads + c.kv_heads) * c.head_dim + 3 * (c.dim + c.ffn))
        + 2 * (c.vocab_size + c.dim)
    )
    R, B, T, P = 32 * n, 4 * n, 1024, 512
    layer = (N - 2 * c.vocab_size * c.dim - c.dim) / c.layers
    learning, frozen, step = (24 * A, 2 * N / n + 4 * A, 8 * A) if adapters else (24 * N / n, 4 * N / n, 6 * N / n)
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    activations = 2 * c.layers * c.dim * B * T / data + 2 * B * T * (heads + 3 * c.ffn) / n + 5 * B * T**2 / data
    activations += 4 * layer / tensor + 12 * min(2**30, B * T * c.vocab_size) / n
    cache = 4 * c.layers * c.kv_heads * c.head_dim * R / n  # of one token in each row
    rollout = cache * T + 2 * N / tensor
    peak = learning + frozen + max(step + activations, rollout)

    rate, memory, nvlink = n * 0.4 * 989e12, 0.6 * 3.35e12, 0.7 * 450e9
    link = nvlink if n == 8 else 0.7 * 50e9
    ring = (data - 1) / data
    gathered, scattered = 16 * N / tensor * ring, 8 * A * ring if adapters else 16 * N / tensor * ring
    summed = 96 * c.layers * B * T * c.dim / data * (tensor - 1) / tensor
    prefill, gathering = 2 * N * R * P / rate, 2 * N / tensor * ring / link
    token = max((2 * N / tensor + cache * (P + 256)) / memory, 2 * N * R / rate)
    arithmetic = 2 * (6 if adapters else 8) * N * R * T / rate
    links = 4 * ((gathered + scattered) / link + summed / nvlink)
    sent, seconds = gathered + scattered + summed, [prefill + 512 * token + gathering, 8 * N * R * T / rate]
    gb = [x / 1e9 for x in (learning, frozen, step, activations, rollout, peak, sent)]
    return [*gb, *seconds, arithmetic, links]


def test_the_plan_on_paper_is_what_its_formulas_give():
    rows = document_table("policy", 8)
    assert len({tuple(row[:4]) for row in rows}) == 8
    for name, gpus, mesh, models, *told, update in rows:
        data, tensor = map(int, mesh.split(" x "))
        assert data * tensor == int(gpus)
        found = plan(name, data, tensor, models == "adapters")
        fits = told.pop(6)
        assert fits == ("yes" if found[5] < 0.92 * 80 else "no")
        slower, arithmetic, links = map(float, re.findall(r"[\d.]+", update))
        assert slower == max(arithmetic, links)
        told = [float(x.replace(",", "")) for x in told] + [arithmetic, links]
        for i, (a, b) in enumerate(zip(told, found, strict=True)):
            assert a == pytest.approx(b, abs=0.5 if i == 6 else 0.06), (name, gpus, models, i)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for n in (1, 2, 4, 8):
        print(json.dumps(measure(n)))


def test_an_sft_step_that_recomputes_activations_in_micro_batches_needs_little_memory():
    """By the compiler's account, of the shape of README's recipe: adapters, 4 micro-batches, --remat."""
    base = jax.eval_shape(lambda key: gpt.init(gpt.make_config(256, 128, 12, 2, 64), key), jax.random.key(0))
    adapter = jax.eval_shape(lambda base: gpt.init_adapter(base, 4, jax.random.key(0)), base)
    optimizer, ids = gpt.adamw(1e-3), jax.ShapeDtypeStruct((16, 128), jnp.int32)
    state = sft.State(adapter, jax.eval_shape(optimizer.init, adapter))

    def memory(**options):
        config = sft.Config(batch_size=16, length=128, lora_rank=4, dtype="float32", **options)
        step = sft.train_step.lower(state, base, None, dict(tokens=ids, segments=ids, mask=ids), optimizer, config)
        return step.compile().memory_analysis().temp_size_in_bytes

    small, large = memory(micro_batches=4, remat=True), memory()
    assert small < 0.12 * large, (small, large)
