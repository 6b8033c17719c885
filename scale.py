"""What a training step takes on each of N devices: measured by the compiler on small models, planned for large ones.

    measured   a step of next-token training (AdamW, fp32) compiled for 1, 2, 4 and 8 devices; XLA's own account of the
               bytes that each device holds: weights and optimiser, which must be 1/N of the whole, and activations
    planned    PPO with a 7B and a 70B policy on 8 and 64 GPUs. Weights and optimiser come from the same shapes and the
               same rule (`gpt.sharding`) that a run would have, without one byte allocated; activations, traffic and
               time from the formulas below, at rates that are stated and not reached by themselves

Nothing here needs several devices: a CPU stands in for eight. docs/scale.md explains the columns and how to start runs.

    python scale.py
    python scale.py --devices 1 8 --only measured
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    only: tuple[Literal["measured", "planned"], ...] = ("measured", "planned")  # tables
    devices: tuple[int, ...] = (1, 2, 4, 8)  # of the measured table
    layers: int = 4  # its model: layers, heads, width, vocabulary
    heads: int = 8
    dim: int = 512
    vocab: int = 4096
    rows: int = 16  # its batch: rows and tokens
    tokens: int = 256
    out: Path = Path("out/scale/scale.json")  # the figures


MODELS = {
    "7B": gpt.Config(32000, 4096, 32, 32, 4096, 11008, 32, 128, tied=False),  # Llama 2
    "70B": gpt.Config(128256, 8192, 80, 64, 8192, 28672, 8, 128, tied=False),  # Llama 3
}
GPU = dict(  # H100 SXM, as its maker states them
    memory=80e9,  # bytes
    flops=989e12,  # bf16, dense
    bandwidth=3.35e12,  # bytes a second from its memory
    nvlink=450e9,  # bytes a second out to the 7 others of its host
    network=50e9,  # bytes a second out of the host: one 400 Gb/s port a GPU
)
MATRIX_SHARE, MEMORY_SHARE, LINK_SHARE = 0.4, 0.6, 0.7  # of these rates that the plan counts on


class Work(NamedTuple):
    """One PPO iteration: answers to `rows` prompts and `epochs` passes over them in optimiser steps of `step_rows`,
    each computed in parts of `part_rows`."""

    rows: int = 256
    step_rows: int = 128
    part_rows: int = 32
    prompt: int = 512
    response: int = 512
    epochs: int = 1
    lora_rank: int = 8


# ---------------------------------------------------------------------------------------------------- shapes and bytes


def parameters(c: gpt.Config) -> int:
    """Weights of a Llama: embedding and head; a layer's q, k, v, o, three matrices of its MLP and two norms; a norm."""
    attention = c.dim * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    return c.vocab_size * c.dim * (1 if c.tied else 2) + c.layers * (attention + 3 * c.dim * c.ffn + 2 * c.dim) + c.dim


def adapter_parameters(c: gpt.Config, rank: int) -> int:
    """A (I, r) and B (r, O) on each of a layer's seven matrices, on the embedding and on a head of its own."""
    wide, narrow = c.heads * c.head_dim, c.kv_heads * c.head_dim
    widths = 2 * (c.dim + wide) + 2 * (c.dim + narrow) + 3 * (c.dim + c.ffn)
    tables = (1 if c.tied else 2) * (c.vocab_size + c.dim)
    return rank * (c.layers * widths + tables)


def shapes(c: gpt.Config, dtype=jnp.float32):
    """A model's arrays without their contents."""
    model = jax.eval_shape(partial(gpt.init, c), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model)


def device_bytes(tree, mesh) -> int:
    """Bytes of one device where a tree of shapes is spread by `gpt.sharding`."""
    part = lambda path, x: np.prod(gpt.sharding(path, x, mesh).shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
    return int(sum(part(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree)))


def state_bytes(c: gpt.Config, mesh, share: str, rank: int) -> dict[str, float]:
    """Bytes a device: what learns (fp32 weights, Adam's two moments), what is frozen (bf16), and the gradients and the
    bf16 copy of one learning model, which live during its step.

        none    policy and critic learn; reference and reward model are frozen
        trunk   one model learns, with two heads; reference and reward model are frozen
        lora    adapters of policy and critic learn; one base is frozen, with the reward model's adapter
    """
    model, frozen = device_bytes(shapes(c), mesh), device_bytes(shapes(c, jnp.bfloat16), mesh)
    if share == "lora":  # adapters are small and may stay whole: counted so
        adapter = 4 * adapter_parameters(c, rank)
        return dict(learning=2 * 3 * adapter, frozen=frozen + adapter, step=2 * adapter)
    return dict(learning=(2 if share == "none" else 1) * 3 * model, frozen=2 * frozen, step=model + frozen)


def activation_bytes(c: gpt.Config, work: Work, data: int, tensor: int) -> float:
    """Bytes a device during one part of a step with --remat, bf16: the input of every layer; inside one layer q, k, v
    and the MLP; attention's mask, as a bias and with the gradient that cuDNN gives it (no scores are written); one
    gathered layer and its neighbour; a piece of the head's logits, three times, in fp32."""
    rows, tokens = work.part_rows / data, work.prompt + work.response
    inputs = c.layers * rows * tokens * c.dim * 2
    heads = (c.heads + 2 * c.kv_heads) * c.head_dim
    inside = rows * tokens * 2 * (heads + 3 * c.ffn) / tensor + 5 * rows * tokens**2
    gathered = 2 * 2 * parameters_a_layer(c) / tensor
    budget = gpt.head_budget(0.75 * GPU["memory"])  # what JAX takes of it
    head = 3 * 4 * min(budget, work.part_rows * tokens * c.vocab_size) / data / tensor
    return inputs + inside + gathered + head


def rollout_bytes(c: gpt.Config, work: Work, data: int, tensor: int) -> float:
    """Bytes a device of a rollout's keys and values, and of its copy of the weights, both bf16, gathered over the data
    axis before the token loop: gathered in it, they would cross the links for every token."""
    caches = 2 * 2 * c.layers * c.kv_heads * c.head_dim * work.rows / data * (work.prompt + work.response)
    return caches / min(tensor, c.kv_heads) + 2 * parameters(c) / tensor


def parameters_a_layer(c: gpt.Config) -> int:
    return (parameters(c) - parameters(replace(c, layers=0))) // c.layers


# ---------------------------------------------------------------------------------------------------- traffic and time


def traffic(c: gpt.Config, work: Work, data: int, tensor: int, share: str) -> dict[str, tuple[int, float]]:
    """(how many, bytes that a device sends in all) of each collective in one optimiser step of one model.

    A ring over n devices sends (n - 1) / n of the array in an all-gather or a reduce-scatter, and twice that in an
    all-reduce. Weights are gathered in bf16, forward and backward, for every part of the step; gradients are scattered
    once, in fp32; of adapters they are all-reduced whole. Over the tensor axis go two sums of activations a layer,
    forward, in the recomputation and backward.
    """
    parts, ring = work.step_rows // work.part_rows, lambda n: (n - 1) / n
    rows = work.part_rows / data * (work.prompt + work.response)
    matrices = 9 * c.layers + 2  # leaves that are gathered
    learning = adapter_parameters(c, work.lora_rank) if share == "lora" else parameters(c) / tensor
    sums = 6 * c.layers * parts if tensor > 1 else 0
    return {
        "all-gather": (2 * matrices * parts, 2 * parts * 2 * parameters(c) / tensor * ring(data)),
        "reduce-scatter": (matrices * parts, 4 * learning * ring(data) * (2 if share == "lora" else parts)),
        "all-reduce": (sums, sums * 2 * ring(tensor) * rows * c.dim * 2),
    }


def iteration_seconds(c: gpt.Config, work: Work, hosts: int, data: int, tensor: int, share: str) -> dict[str, float]:
    """Seconds of one PPO iteration: arithmetic or links, whichever is slower, in the update; arithmetic in scoring; the
    prompt's arithmetic, the gathering of weights, and memory or arithmetic for each token in the rollout."""
    n, tokens = data * tensor, work.prompt + work.response
    flops, memory = n * GPU["flops"] * MATRIX_SHARE, GPU["bandwidth"] * MEMORY_SHARE
    link = (GPU["network"] if hosts > 1 else GPU["nvlink"]) * LINK_SHARE
    N, learners = parameters(c), 1 if share == "trunk" else 2
    forward = 2 * N * work.rows * tokens
    scoring = (learners + 2) * forward / flops  # policy, critic, reference, reward model
    # forward, its recomputation, and twice as much backward: once as much where no weight of the base wants a gradient
    arithmetic = learners * work.epochs * (3 if share == "lora" else 4) * forward / flops
    sent = {name: size for name, (_, size) in traffic(c, work, data, tensor, share).items()}
    steps = learners * work.epochs * work.rows // work.step_rows
    sums = sent.pop("all-reduce") / (GPU["nvlink"] * LINK_SHARE)  # a tensor group is on one host
    links = steps * (sum(sent.values()) / link + sums)
    cache = 2 * 2 * c.layers * c.kv_heads * c.head_dim * work.rows / data * (work.prompt + work.response / 2)
    weights = 2 * parameters(c) / tensor
    token = max((weights + cache / min(tensor, c.kv_heads)) / memory, 2 * N * work.rows / flops)
    gathering = weights * (data - 1) / data / link
    rollout = 2 * N * work.rows * work.prompt / flops + work.response * token + gathering
    return dict(rollout=rollout, scoring=scoring, arithmetic=arithmetic, links=links, update=max(arithmetic, links))


def plan(name: str, devices: int, tensor: int, share: str, work: Work) -> dict:
    """One line of the table."""
    c, data = MODELS[name], devices // tensor
    mesh = jax.sharding.AbstractMesh((data, tensor), ("data", "tensor"))
    state = state_bytes(c, mesh, share, work.lora_rank)
    activations, rollout = activation_bytes(c, work, data, tensor), rollout_bytes(c, work, data, tensor)
    peak = state["learning"] + state["frozen"] + max(state["step"] + activations, rollout)
    time = iteration_seconds(c, work, -(-devices // 8), data, tensor, share)
    row = dict(model=name, devices=devices, mesh=f"{data}x{tensor}", share=share, activations=activations)
    row |= state | dict(rollout=rollout, peak=peak, fits=peak < 0.92 * GPU["memory"], seconds=time)
    return row | dict(traffic=traffic(c, work, data, tensor, share))


# ---------------------------------------------------------------------------------------------------- the compiler


def measure(n: int, config: Config) -> dict[str, int]:
    """XLA's account of one compiled training step: bytes of a device, of the first n."""
    mesh = gpt.make_mesh(jax.devices()[:n])
    with jax.set_mesh(mesh):
        c = gpt.make_config(config.vocab, config.tokens, config.layers, config.heads, config.dim)
        place = lambda path, x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=gpt.sharding(path, x, mesh))
        spread = lambda tree: jax.tree_util.tree_map_with_path(place, tree)
        optimizer = gpt.adamw(1e-3)
        model = shapes(c)
        state = spread(model), spread(jax.eval_shape(optimizer.init, model))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
        batch = {"tokens": jax.ShapeDtypeStruct((config.rows, config.tokens), jnp.int32, sharding=rows)}

        def loss_fn(model, batch):
            return -gpt.token_logprobs(model, batch["tokens"], remat=True).mean(), {}

        kept = (*jax.tree.map(lambda x: x.sharding, state), None)
        step = jax.jit(partial(gpt.descend, optimizer, loss_fn), donate_argnums=(0, 1), out_shardings=kept)
        account = step.lower(*state, batch).compile().memory_analysis()
    weights, moments = (device_bytes(tree, mesh) for tree in state)
    held = account.argument_size_in_bytes - 4 * config.rows * config.tokens // n
    return dict(devices=n, weights=weights, optimiser=moments, held=held, activations=account.temp_size_in_bytes)


# ---------------------------------------------------------------------------------------------------- tables


def print_measured(rows: list[dict]):
    print("| devices | weights MB | optimiser MB | both by the compiler | x N, of one device | activations MB |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        mb = [f"{row[name] / 1e6:,.2f}" for name in ("weights", "optimiser", "held", "activations")]
        share = row["held"] * row["devices"] / (rows[0]["held"] * rows[0]["devices"])
        print(f"| {row['devices']} | {mb[0]} | {mb[1]} | {mb[2]} | {share:.3f} | {mb[3]} |")


def print_planned(rows: list[dict]):
    print("| policy | GPUs | data x tensor | share | learning | frozen | step | activations | rollout | peak GB | fits "
          "| sent a step | rollout s | scoring s | update s (arithmetic, links) |")  # fmt: skip
    print("| --- " * 4 + "| ---: " * 11 + "|")
    for row in rows:
        gb = [f"{row[k] / 1e9:.1f}" for k in ("learning", "frozen", "step", "activations", "rollout", "peak")]
        sent = sum(size for _, size in row["traffic"].values()) / 1e9
        t = {name: f"{seconds:,.1f}" for name, seconds in row["seconds"].items()}
        cells = [row["model"], row["devices"], row["mesh"], row["share"], *gb, "yes" if row["fits"] else "no"]
        cells += [f"{sent:.0f} GB", t["rollout"], t["scoring"], f"{t['update']} ({t['arithmetic']}, {t['links']})"]
        print("| " + " | ".join(map(str, cells)) + " |")


def main(config: Config):
    jax.config.update("jax_num_cpu_devices", max(config.devices))
    figures = {}
    if "measured" in config.only:
        figures["measured"] = [measure(n, config) for n in config.devices]
        print_measured(figures["measured"])
    if "planned" in config.only:
        meshes = [("7B", 8, 1), ("7B", 64, 1), ("70B", 8, 8), ("70B", 64, 8)]
        work = lambda n: Work(rows=32 * n, step_rows=16 * n, part_rows=4 * n)  # as many a GPU, however many there are
        cases = [(*mesh, share) for mesh in meshes for share in ("none", "trunk", "lora")]
        figures["planned"] = [plan(*case, work(case[1])) for case in cases]
        print_planned(figures["planned"])
    config.out.parent.mkdir(parents=True, exist_ok=True)
    gpt.write_json(config.out, figures)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
