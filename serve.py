"""An OpenAI-compatible server for model folders, and a chat page whose votes become the next round's training data.

    python serve.py --model out/ppo out/dpo                          # on http://127.0.0.1:8000, as "ppo" and "dpo"
    python serve.py --quantize auto --quality data/toy/demos-heldout.jsonl   # the fastest weights that are near enough
    curl localhost:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"model": "ppo", "messages": [{"role": "user", "content": "what is the opposite of down ?"}]}'
    python serve.py --upstream http://localhost:8001 --model out/dpo  # vLLM, say, answers; page and votes are here
    python prepare.py --data feedback.db --out data/votes            # what was voted, as rows for dpo.py and reward.py

One thread owns JAX (`Engine`). Each model has a fixed number of slots, each one row of its key-value cache; requests
join and leave between tokens (continuous batching, Orca, Yu et al. 2022), and every shape is compiled before the first
request. A prompt is read in pieces, between which the others get their tokens; a slot keeps what it has read, so that
the next turn of a talk, or a second answer to one prompt, begins where it ends. As many rows are computed as are
drawing, of a few sizes. Sampling parameters are arrays with one entry for each slot. The random number of a token is a
function of (seed, choice, token), so the same seed gives the same text whatever else is in the batch, up to rounding.
The event loop only moves bytes; a second thread owns the database, and a vote is answered when its transaction is on
disk.

The file reads from top to bottom: configuration; quantised weights; what the device computes; the engine; what clients
send; what they get; votes; the server; another engine in its place; the process.
"""

import asyncio
import bisect
import collections
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import gc
import hashlib
import hmac
import itertools
import json
import logging
import math
import os
import queue
import re
import secrets
import shlex
import socket
import sqlite3
import sys
import threading
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlsplit

import equinox as eqx
import httpx2
import jax
import jax.numpy as jnp
import jinja2.meta
import msgspec
import numpy as np
import tyro
import uvicorn
from jax import lax
from jaxtyping import Array, Float, Int
from markdown_it import MarkdownIt
from msgspec import Meta, Struct
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

import gpt

LOG = logging.getLogger("serve")
HERE = Path(__file__).resolve().parent


Folders = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]


@dataclass(frozen=True)
class Config:
    model: Folders = ()  # folders: --model a b, or --model a --model b (default: out/ppo)
    port: int = 8000  # 0: any free one
    host: str = "127.0.0.1"  # address to listen at; others than this machine's need --api-key
    api_key: str | None = None  # what clients must send (None: the API_KEY variable, which `ps` does not show)
    allowed_host: tuple[str, ...] = ()  # further host names under which clients reach this server
    cors_origin: tuple[str, ...] = ()  # web sites whose pages may send requests, like https://chat.example
    insecure: bool = False  # listen to other machines without a key

    slots: int = 16  # requests a model works on at a time
    max_queue: int = 256  # requests a model lets wait; more are answered 429
    context: int | None = None  # longest prompt + answer in tokens (None: the model's, at most 2,048)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and cache
    quantize: Literal["int8", "int4", "auto"] | None = None  # of the weights; auto: the fastest in --max-kl
    quality: str | None = None  # held-out rows (text or demonstrations) on which each quantisation is measured first
    max_kl: float = 0.01  # largest KL in nats a token from the full weights to quantised ones, on --quality
    timeout: float = 300.0  # seconds from a request's arrival to its last token, at most
    drain: float = 10.0  # seconds that running requests get to end after Ctrl-C or SIGTERM

    feedback: Path = Path("feedback.db")  # where votes, and the generations they are about, are kept
    ui: bool = True  # serve the chat page at /
    examples: str | None = None  # rows of prompts; the page offers the first few to a newcomer

    upstream: str | None = None  # address of another engine with OpenAI's API: it answers, page and votes are here
    upstream_key: str | None = None  # what that engine asks for (None: the UPSTREAM_KEY variable)

    @property
    def named_folders(self) -> list[str]:
        return [folder for group in self.model for folder in group]

    @property
    def folders(self) -> list[str]:
        """Of the models that are loaded here."""
        return [] if self.upstream else self.named_folders or ["out/ppo"]


# -------------------------------------------------------------------------------------------------- quantised weights
#
# Every matrix as small integers and scales: half or a third of the memory of bf16, and int8 is faster on a CPU. The
# model stays a gpt.GPT whose layers and tables are the classes below: forward passes and `gpt.generate` take it.
# Rounding has no gradient, so it only answers. What a form costs is measured, and then one is chosen.

FORMS = ("none", "int8", "int4")  # of a model's weights
CHUNK_ROWS = 256  # of a matrix that become floats at a time, on a CPU: they stay in its cache


class Quantised(eqx.Module):
    """A matrix (O, I) held as small integers and their scales: the weight of a `QuantisedLinear`, or an embedding
    table, whose rows are the output channels of the head. Leaves may have a layer axis before these.

    (O, I), the inputs last, and not `gpt.Linear`'s (I, O): XLA:CPU's int8 product reads such rows as they lie; with
    (I, O) the product with GPT-2's head takes 2 to 8 times as long.
    """

    values: Array  # integers
    scale: Array  # what the integer 1 stands for, in the precision of the original weights

    def dense(self) -> Float[Array, "*O I"]:
        """The matrix as floats."""
        raise NotImplementedError

    def product(self, x: Float[Array, "*N I"], dtype) -> Float[Array, "*N O"]:
        """x times the transposed matrix."""
        raise NotImplementedError

    def look_up(self, index) -> Float[Array, "*N I"]:
        """Rows of the table, as floats."""
        return jax.tree.map(lambda x: x[index], self).dense()

    def __call__(self, x: Float[Array, "*N I"], dtype=None) -> Float[Array, "*N O"]:
        """The product, in x's precision or in `dtype`. The whole matrix is never in memory as floats: the barrier keeps
        XLA from converting it once before a loop over tokens, and a CPU, which would write the floats of each token to
        memory and read them back, converts CHUNK_ROWS at a time."""
        dtype = dtype or x.dtype
        if jax.default_backend() != "cpu":
            x, held = lax.optimization_barrier((x, self))
            return held.product(x, dtype)
        return jnp.moveaxis(lax.map(lambda row: row.product(x, dtype), self, batch_size=CHUNK_ROWS), 0, -1)


class Int8(Quantised):
    """Weights in int8, a scale for each output channel, scale (O,). On a CPU activations are integers too, scaled token
    by token as they come, so that the product is one of bytes, the fast one there (LLM.int8(), arXiv:2208.07339). One
    byte is too coarse for the activations of a chat model, whose largest are 100 times the others (KL 0.05 nats a token
    on SmolLM2-135M-Instruct). They get two bytes, which are multiplied as two rows."""

    row_sums: Array  # (O,) of each row's integers, see `integers`

    def dense(self):
        return self.values.astype(self.scale.dtype) * self.scale[..., None]

    def product(self, x, dtype):
        return gpt.dot(x, self.dense().astype(x.dtype), (-1, -1), dtype)

    def __call__(self, x, dtype=None):
        if jax.default_backend() != "cpu":
            return super().__call__(x, dtype)
        high, low, scale = to_two_bytes(x.astype(jnp.float32))
        high, low = self.integers(jnp.stack([high, low])).astype(jnp.float32)
        y = (256 * high + low) * scale[..., None] * self.scale.astype(jnp.float32)
        return y.astype(dtype or x.dtype)

    def integers(self, x: Int[Array, "*N I"]) -> Int[Array, "*N O"]:
        """The exact product with int8 activations. The VNNI instruction multiplies unsigned bytes by signed ones: there
        128 is added to the activations, and what this adds to the product, 128 times `row_sums`, is subtracted."""
        if not has_vnni():
            return gpt.dot(x, self.values, (-1, -1), jnp.int32)
        unsigned = (x.astype(jnp.int32) + 128).astype(jnp.uint8)
        # the precision keeps JAX from making both operands int32 because they differ
        y = gpt.dot(unsigned, self.values, (-1, -1), jnp.int32, precision=lax.DotAlgorithmPreset.DEFAULT)
        return y - 128 * self.row_sums


@lru_cache
def has_vnni() -> bool:
    """Whether arrays live on a CPU with AVX-512 VNNI. XLA:CPU's library of products (YNNPACK) has kernels for it that
    multiply uint8 by int8: 1.7 to 2.4 times as fast as int8 by int8 at 16 and 64 rows (jaxlib 0.10; 1.1 times
    in 0.11). On a CPU without, uint8 by int8 takes 7 times as long."""
    cpu = Path("/proc/cpuinfo")  # Linux only
    return jax.default_backend() == "cpu" and cpu.exists() and "avx512_vnni" in cpu.read_text()


class Int4(Quantised):
    """Weights in 4 bits, -7 to 7: values (O, I/2), where one byte's low bits hold input i and its high bits input
    I/2 + i; scale (O, 2, G), one for each of the G groups of inputs in either half."""

    def halves(self):
        """The weights of the first half of the inputs and of the second one, (O, I/2) each."""
        pairs = self.values.astype(jnp.int32)
        for half, integers in enumerate([(pairs << 28) >> 28, (pairs << 24) >> 28]):  # arithmetic: they extend the sign
            scale = self.scale[..., half, :, None]
            yield (integers.reshape(*scale.shape[:-1], -1) * scale).reshape(integers.shape)

    def dense(self):
        return jnp.concatenate(list(self.halves()), -1)

    def product(self, x, dtype):  # two products: to join the halves would take longer than to multiply by them
        return sum(gpt.dot(a, b.astype(x.dtype), (-1, -1), dtype) for a, b in zip(jnp.split(x, 2, -1), self.halves()))


class QuantisedLinear(eqx.Module):
    """Stands in for `gpt.Linear`."""

    weight: Quantised
    bias: Array | None

    def __call__(self, x):
        y = self.weight(x)
        return y if self.bias is None else y + self.bias


def to_integers(x, most: int, dtype=jnp.int8):
    """x (..., N) as integers within +-most, rounded to nearest, and the scale (...): the largest |x| becomes `most`."""
    scale = jnp.abs(x).max(-1) / most
    scale = jnp.where(scale > 0, scale, 1)
    return jnp.clip(jnp.round(x / scale[..., None]), -most, most).astype(dtype), scale


def to_int8(x):
    """x (..., I) as `Int8` holds it."""
    values, scale = to_integers(x, 127)
    return values, scale, values.sum(-1, dtype=jnp.int32)


def to_two_bytes(x):
    """x (..., I) as (256 high + low) * scale: int8, int8 and (...)."""
    values, scale = to_integers(x, 127 * 256, jnp.int32)
    high = (values + 128) >> 8
    return high.astype(jnp.int8), (values - 256 * high).astype(jnp.int8), scale


def to_int4(x, size: int = 64):
    """x (..., I) as `Int4` holds it, in the largest groups of at most `size` inputs that divide each half."""
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"int4 packs two weights in a byte: a width of {x.shape[-1]} is odd")
    size = max(n for n in range(1, size + 1) if half % n == 0)
    values, scale = to_integers(x.reshape(*x.shape[:-1], 2, -1, size), 7)
    low, high = (values[..., i, :, :].reshape(*x.shape[:-1], half) for i in range(2))
    return ((high << 4) | (low & 15)).astype(jnp.uint8), scale


@partial(jax.jit, static_argnames="how")
def quantize(model: gpt.GPT, how: str) -> gpt.GPT:
    """The model, adapters merged, with every matrix in small integers: "int8" or "int4" (the classes above).
    Norms, biases and learned positions stay; a tied embedding is one table, read both ways.

    Beside int4, embedding and head are int8: in 4 bits they alone made the KL to the unquantised model half as large
    again, or twice as large.
    """
    kinds = {"int8": (Int8, to_int8), "int4": (Int4, to_int4)}
    if how not in kinds:
        raise ValueError(f"unknown quantisation {how!r}: int8 or int4")
    model = gpt.merge(model)
    pack = lambda how, matrix: kinds[how][0](*kinds[how][1](matrix))

    def linear(layer):
        if not isinstance(layer, gpt.Linear):
            return layer
        return QuantisedLinear(pack(how, layer.weight.swapaxes(-1, -2)), layer.bias)

    blocks = jax.tree.map(linear, model.blocks, is_leaf=lambda x: isinstance(x, gpt.Linear))
    table = partial(pack, "int8" if how == "int4" else how)
    head = None if model.head is None else table(model.head)
    return dataclasses.replace(model, wte=table(model.wte), blocks=blocks, head=head)


def return_memory():
    """Give memory that was freed back to the system. glibc keeps it: 890 MB after a model of 135M became int8."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def size_in_bytes(model) -> int:
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(model))


QUALITY_ROWS = 64  # rows of --quality that are read, at most: a start should not take long
QUALITY_TOKENS = 2048  # in a batch of them
QUALITY_SECONDS = 60.0  # after which no further batch begins


def quality(model: gpt.GPT, quantised: gpt.GPT, batches, how: str = "") -> dict[str, float]:
    """What quantising costs on batches of tokens, segments and mask (B, T), over the tokens in the mask: "kl"(model ||
    quantised) in nats a token, "top1", how often both think the same token likeliest, and each one's perplexity. After
    QUALITY_SECONDS the batches so far have to do, and a warning names their number."""
    totals, start = [], time.perf_counter()
    for batch in gpt.progress(iterable=batches, desc=f"quality of {how}", leave=False):
        if totals and time.perf_counter() - start > QUALITY_SECONDS:
            LOG.warning("%s: measured on %d of %d batches, %.0f s", how, len(totals), len(batches), QUALITY_SECONDS)
            break
        found = quality_totals(model, quantised, *(batch[name] for name in ("tokens", "segments", "mask")))
        totals.append(gpt.to_numpy(found))  # waits for the device
    kl, top1, nll, nll_quantised, tokens = np.sum(totals, axis=0, dtype=float).tolist()
    if not tokens:
        raise ValueError("--quality: the rows that were read hold no token to measure on")
    means = dict(kl=kl / tokens, top1=top1 / tokens)
    return means | dict(perplexity=math.exp(nll / tokens), perplexity_quantised=math.exp(nll_quantised / tokens))


@jax.jit
def quality_totals(model, quantised, tokens, segments, mask):
    """Sums over the tokens in the mask: of KL, of agreement, of both negative log-likelihoods, of tokens."""
    hidden, other = model(tokens, segments)[:, :-1], quantised(tokens, segments)[:, :-1]
    best = lambda model, hidden: gpt.map_columns(lambda h: model.logits(h).argmax(-1), model.config.vocab_size, hidden)
    nll = lambda model, hidden: -gpt.head_logprobs(model, hidden, tokens[:, 1:])[0]
    same = best(model, hidden) == best(quantised, other)
    each = gpt.head_kl(model, hidden, quantised, other), same, nll(model, hidden), nll(quantised, other), 1.0
    return [jnp.where(mask[:, 1:] > 0, x, 0.0).sum() for x in each]


def quality_batches(path: str, tokenizer: gpt.Tokenizer, length: int) -> list[dict]:
    """The first rows of a file of held-out text or demonstrations, padded to one width: tokens, segments, mask."""
    kind, rows = gpt.find_kind([path], ("demos", "text")), []
    for _, row in itertools.islice(gpt.read_rows(path, kind), QUALITY_ROWS):
        with contextlib.suppress(gpt.BadRow):  # too long for this model
            rows += [(ids[:length], mask[:length]) for ids, mask in gpt.encode_row(row, kind, tokenizer, length)]
    if not rows:
        raise ValueError(f"--quality {path}: none of its first {QUALITY_ROWS} rows fits {length} tokens")
    width = max(len(ids) for ids, _ in rows)
    size = max(1, min(16, QUALITY_TOKENS // width))
    tokens, segments, mask = np.zeros((3, len(rows) + -len(rows) % size, width), np.int32)
    for i, (ids, scored) in enumerate(rows):
        tokens[i, : len(ids)], segments[i, : len(ids)], mask[i, : len(ids)] = ids, 1, scored
    batches = [slice(i, i + size) for i in range(0, len(tokens), size)]
    return [dict(tokens=tokens[rows], segments=segments[rows], mask=mask[rows]) for rows in batches]


class Candidate(NamedTuple):
    """A form of a model's weights, and what it costs."""

    how: str  # one of FORMS
    megabytes: float
    kl: float  # KL(unquantised model || this one) in nats a token
    top1: float  # share of tokens for which both models think the same token likeliest
    perplexity: float
    speed: float  # tokens a second, where every slot reads a prompt and draws ANSWER tokens of an answer


def choose(candidates: list[Candidate], how: str, max_kl: float) -> str:
    """The form to serve: for "auto" the fastest whose KL is at most `max_kl`, otherwise `how`; ValueError if it was
    measured and its KL is larger."""
    near = [c for c in candidates if c.kl <= max_kl]
    if how == "auto":
        return max(near, key=lambda c: c.speed).how
    for c in candidates:
        if c.how == how and c not in near:
            raise ValueError(
                f"--quantize {how} is {c.kl:.4f} nats a token away from the unquantised model, more than --max-kl "
                f"{max_kl} (top-1 agreement {c.top1:.1%}, perplexity {c.perplexity:.3f} instead of "
                f"{candidates[0].perplexity:.3f}): try another, or auto"
            )
    return how


def quality_table(models: list, max_kl: float) -> str:
    lines = ["model            weights      MB  KL/token   top-1  perplexity  tokens/s  accepted"]
    for model in models:
        for c in model.candidates:
            lines.append(
                f"{model.name:16} {c.how:7} {c.megabytes:7.2f} {c.kl:9.5f} {c.top1:7.1%} {c.perplexity:11.3f} "
                f"{c.speed:9,.0f}  {'yes' if c.kl <= max_kl else 'no'}"
            )
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ what the device computes

TOP = 20  # alternatives a token that are kept where log-probs are asked for
MOST_STEPS = 8  # tokens that one call decodes at most
ANSWER = 64  # tokens of an answer to a prompt as wide as the widest piece, by which forms of weights are compared
# each of these sizes is a program of its own: 3 to 7 s to compile and 130 MB for a model of 30 layers
PIECES = (16, 24, 64, 256)  # tokens of a prompt that one call reads: between two calls others get their tokens
PROMPTS = (1, 4)  # of the smallest piece several prompts are read in one call


class Weights(NamedTuple):
    """A GPT with unstacked blocks: slicing stacked weights inside a loop would copy all of them for every token."""

    outer: gpt.GPT  # all but the blocks: embedding, last norm, head
    layers: tuple  # the blocks


def unstack(model: gpt.GPT) -> Weights:
    layers = tuple(jax.tree.map(lambda x, i=i: x[i], model.blocks) for i in range(model.config.layers))
    return gpt.shard(Weights(dataclasses.replace(model, blocks=None), layers))


class Alternatives(NamedTuple):
    """Log-probs at temperature 1, before penalties and cuts: of the chosen token (...), of the likeliest (..., TOP)."""

    chosen: jax.Array
    top: jax.Array
    top_ids: jax.Array


def alternatives(logits, chosen, wanted) -> Alternatives:
    """logits (..., V), chosen (...) ids. Ranking costs as much as a layer: where it is not `wanted`, top is zeros."""
    k = min(TOP, logits.shape[-1])
    lse = jax.nn.logsumexp(logits, -1)
    logprob = jnp.take_along_axis(logits, chosen[..., None], -1)[..., 0] - lse
    nothing = jnp.zeros((*chosen.shape, k)), jnp.zeros((*chosen.shape, k), jnp.int32)
    top, ids = lax.cond(wanted, lambda: tuple(lax.top_k(logits, k)), lambda: nothing)
    return Alternatives(logprob, top - lse[..., None], ids)


def block_size(context: int) -> int:
    """Places of the caches that attention reads at a time: few on a CPU, which then reads no more than is in use. To
    other devices a loop costs more than the reading."""
    return min(128, context) if jax.default_backend() == "cpu" else context


def read_rows(cache, slots, start, size: int):
    """`size` places from `start` on, of some slots (R,), or of all (None): (R, K, size, E)."""
    if slots is None:
        return gpt.shard_batch(lax.dynamic_slice_in_dim(cache, start, size, 2))
    shape = 1, cache.shape[1], size, cache.shape[3]
    return jnp.concatenate([lax.dynamic_slice(cache, (slot, 0, start, 0), shape) for slot in slots])


def write_rows(cache, new, slots, starts):
    """The cache with new (R, K, T, E) in some slots (R,), or in all (None), from place `starts` (R,) on."""
    if slots is None:
        return gpt.shard_batch(gpt.write_cache(cache, new, starts))
    for row, slot, start in zip(new, slots, starts):
        cache = lax.dynamic_update_slice(cache, row[None], (slot, 0, start, 0))
    return gpt.shard_batch(cache)


def to_dtype(x, dtype):
    """x in another precision. What float16 cannot hold, beyond +-65,504, becomes the largest that it can: infinities
    would make every later token NaN."""
    if x.dtype == dtype:
        return x
    most = jnp.finfo(dtype).max.astype(jnp.float32)  # in bfloat16 it would be rounded up
    return jnp.clip(x.astype(jnp.float32), -most, most).astype(dtype)


def attend(q, cache, slots, positions, reach):
    """Attention of q (R, H, T, E), whose places are `positions` (R, T), to the keys and values (S, K, C, E) that slots
    hold up to there: -> (R, H, T, E). The cache is read block by block, as far as `reach`, the last place that a row
    needs whose answer counts, with a running maximum and sum of the softmax (arXiv:1805.02867): the room that nobody
    uses costs nothing."""
    R, H, T, E = q.shape
    K, size = cache[0].shape[1], block_size(cache[0].shape[2])
    q = gpt.shard_batch(q.reshape(R, K, H // K, T, E))

    def block(i, carry):
        top, total, out = carry
        k, v = (read_rows(x, slots, i * size, size).astype(q.dtype) for x in cache)
        scores = gpt.einsum("bkgte,bkse->bkgts", q, k, jnp.float32) / np.sqrt(E)
        visible = i * size + jnp.arange(size) <= positions[:, None, None, :, None]
        scores = jnp.where(visible, scores, gpt.MASKED)
        new_top = jnp.maximum(top, scores.max(-1))
        weights, shrink = jnp.exp(scores - new_top[..., None]), jnp.exp(top - new_top)
        found = gpt.einsum("bkgts,bkse->bkgte", weights.astype(v.dtype), v, jnp.float32)
        return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + found

    start = jnp.full(q.shape[:-1], gpt.MASKED), jnp.zeros(q.shape[:-1]), jnp.zeros(q.shape)
    blocks = reach // size + 1 if size < cache[0].shape[2] else 1
    _, total, out = lax.fori_loop(0, blocks, block, start)
    return (out / total[..., None]).astype(q.dtype).reshape(R, H, T, E)


def run_layers(weights: Weights, caches, tokens, slots, starts, counts=True):
    """The hidden states (R, T, D) of tokens (R, T), which stand in some slots (R,), or in all (None), from place
    `starts` (R,) on, and the caches with their keys and values. `counts` (R,): rows whose states are wanted."""
    positions = starts[:, None] + jnp.arange(tokens.shape[1])
    reach = jnp.where(counts, positions[:, -1], 0).max()
    x, rope = weights.outer.embed(tokens, positions)
    new_caches = []
    for block, cache in zip(weights.layers, caches):

        def attend_slots(q, k, v, cache=cache):
            cache = tuple(write_rows(old, to_dtype(new, old.dtype), slots, starts) for old, new in zip(cache, (k, v)))
            return attend(q, cache, slots, positions, reach), cache

        x, cache = block.around(attend_slots, x, rope)
        new_caches.append(cache)
    return weights.outer.norm(x), tuple(new_caches)


class Slots(NamedTuple):
    """What the device is told about each slot, or some of them: (S,) arrays in the host's memory."""

    token: np.ndarray  # the last token, whose successor is drawn next
    position: np.ndarray  # of that token
    remaining: np.ndarray  # tokens still to draw; 0: the slot is idle
    drawn: np.ndarray  # tokens drawn so far
    seed: np.ndarray
    choice: np.ndarray  # which of the request's n choices
    temperature: np.ndarray  # 0: greedy
    top_k: np.ndarray  # 0: off
    top_p: np.ndarray
    min_p: np.ndarray
    presence_penalty: np.ndarray
    frequency_penalty: np.ndarray
    endless: np.ndarray  # go on after a token that ends answers
    scored: np.ndarray  # wants the likeliest alternatives
    answer: np.ndarray  # (S, C) the tokens drawn so far, -1 behind them


def idle_slots(n: int, context: int = 0) -> Slots:
    floats = "temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"
    kinds = dict(seed=np.uint32, endless=bool, scored=bool) | dict.fromkeys(floats, np.float32)
    slots = Slots(*(np.zeros(n, kinds.get(name, np.int32)) for name in Slots._fields))
    return slots._replace(answer=np.full((n, context), -1, np.int32))


def penalized(logits, slots: Slots, new):
    """The logits (S, V) less OpenAI's penalties for tokens that the answer holds already, those of `new` (T, S) too,
    which were drawn in this call (-1: none): presence_penalty for each, frequency_penalty for each time."""

    def charge():
        S, V = logits.shape
        ids = jnp.concatenate([slots.answer, new.T], 1)
        counts = jnp.zeros((S, V)).at[jnp.arange(S)[:, None], jnp.where(ids < 0, V, ids)].add(1, mode="drop")
        return logits - slots.presence_penalty[:, None] * (counts > 0) - slots.frequency_penalty[:, None] * counts

    asked = (slots.presence_penalty != 0) | (slots.frequency_penalty != 0)
    return lax.cond(((slots.remaining > 0) & asked).any(), charge, lambda: logits)


def next_tokens(outer: gpt.GPT, hidden, slots: Slots, keys, new):
    """The tokens (S,) drawn after the hidden states (S, D) in those of the `slots` that are busy, and their log-probs.
    `keys`: `draw_keys` of the slots; `new`: see `penalized`."""
    logits = outer.logits(hidden)
    u = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, slots.drawn)
    token = draw(penalized(logits, slots, new), u, slots)
    return token, alternatives(logits, token, ((slots.remaining > 0) & slots.scored).any())


def draw_keys(slots: Slots):
    """A random key (S,) for each slot's answer."""
    return jax.vmap(lambda seed, choice: jax.random.fold_in(jax.random.key(seed), choice))(slots.seed, slots.choice)


def cond_zeros(wanted, compute):
    """What compute() returns, or zeros like that where it is not wanted, which costs nothing."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))
    return lax.cond(wanted, compute, lambda: nothing)


@partial(jax.jit, donate_argnames="caches")
def prefill(weights: Weights, caches, tokens, targets, rows, starts, last, wanted):
    """The caches with the keys and values of a piece of some prompts, tokens (R, T), whose first one is at place
    `starts` (R,) of the caches' `rows` (R,), behind what is there already; the hidden states (R, D) at the columns
    `last` (R,), where `first_tokens` draws; and if `wanted` the log-probs of `targets` (R, T), the tokens that follow
    each. The keys of padding behind a piece are overwritten by those of drawn tokens before attention reaches them."""
    outer = weights.outer
    hidden, caches = run_layers(weights, caches, tokens, rows, starts)
    columns = lambda hidden, targets: alternatives(outer.logits(hidden), targets, True)
    score = lambda: gpt.map_columns(columns, 2 * outer.config.vocab_size, hidden, targets)
    ends = jnp.take_along_axis(hidden, last[:, None, None], 1)[:, 0]
    return caches, ends, cond_zeros(wanted, score)


@jax.jit
def first_tokens(outer: gpt.GPT, ends, slots: Slots):
    """The first token of an answer (1, R), drawn in the `slots` that are busy, and its log-probs. A program apart from
    `prefill`, of which there are several: XLA keeps a copy of the head for each."""
    none = jnp.full((0, len(ends)), -1)
    return jax.tree.map(lambda x: x[None], next_tokens(outer, ends, slots, draw_keys(slots), none))


@partial(jax.jit, donate_argnums=0)
def copy_slot(caches, source, target):
    """The caches with one slot's keys and values in another slot."""
    move = lambda cache: lax.dynamic_update_slice_in_dim(cache, lax.dynamic_slice_in_dim(cache, source, 1), target, 0)
    return jax.tree.map(lambda cache: gpt.shard_batch(move(cache)), caches)


@partial(jax.jit, static_argnames="ends", donate_argnames="caches")
def decode(weights: Weights, caches, slots: Slots, rows, steps, ends: tuple[int, ...]):
    """Draw up to `steps` tokens in every busy one of some `slots`, until one of the tokens `ends`; `rows` (S,) are
    their places in the caches, or None for all in their order. Returns the caches, tokens (MOST_STEPS, S) with -1 where
    a slot was idle or had ended, and their log-probs."""
    outer, S, keys = weights.outer, len(slots.token), draw_keys(slots)

    def unfinished(carry):
        t, slots, _, _, _ = carry
        return (t < steps) & (slots.remaining > 0).any()

    def step(carry):
        t, slots, caches, tokens, logprobs = carry
        busy = slots.remaining > 0
        hidden, caches = run_layers(weights, caches, slots.token[:, None], rows, slots.position, busy)
        token, found = next_tokens(outer, hidden[:, 0], slots, keys, tokens)
        tokens = tokens.at[t].set(jnp.where(busy, token, -1))
        logprobs = jax.tree.map(lambda rows, row: rows.at[t].set(row), logprobs, found)
        left = jnp.where(gpt.is_end(token, ends) & ~slots.endless, 0, slots.remaining - 1)
        slots = slots._replace(
            token=jnp.where(busy, token, slots.token), position=slots.position + busy,
            remaining=jnp.where(busy, left, 0), drawn=slots.drawn + busy,
        )  # fmt: skip
        return t + 1, slots, caches, tokens, logprobs

    k = min(TOP, outer.config.vocab_size)
    empty = lambda *shape, dtype=jnp.float32: jnp.zeros((MOST_STEPS, S, *shape), dtype)
    logprobs = Alternatives(empty(), empty(k), empty(k, dtype=jnp.int32))
    carry = (0, slots, caches, jnp.full((MOST_STEPS, S), -1, jnp.int32), logprobs)
    _, _, caches, tokens, logprobs = lax.while_loop(unfinished, step, carry)
    return caches, tokens, logprobs


def draw(logits, u, slots: Slots):
    """One token a row, each by its own temperature, top_k, top_p and min_p, in this order: logits (S, V), u (S,)."""
    busy = slots.remaining > 0
    scaled = logits / jnp.where(slots.temperature > 0, slots.temperature, 1)[:, None]
    sampled = busy & (slots.temperature > 0)

    def cut(active, threshold, scaled):  # a pass over the vocabulary, only if some slot asks for this cut
        return lax.cond(
            (sampled & active).any(),
            lambda: jnp.where(scaled < jnp.where(active[:, None], threshold(scaled), -jnp.inf), gpt.MASKED, scaled),
            lambda: scaled,
        )

    def largest(x):
        return highest_cut(x, jnp.ones_like(x), slots.top_k[:, None])

    def nucleus(x):
        return highest_cut(x, jax.nn.softmax(x), slots.top_p[:, None])

    scaled = cut(slots.top_k > 0, largest, scaled)
    scaled = cut(slots.top_p < 1, nucleus, scaled)
    scaled = cut(slots.min_p > 0, lambda x: x.max(-1, keepdims=True) + jnp.log(slots.min_p)[:, None], scaled)
    random = lambda: gpt.inverse_cdf(jnp.exp(scaled - scaled.max(-1, keepdims=True)), u)
    greedy = first_largest(logits)
    return jnp.where(sampled, lax.cond(sampled.any(), lambda: random().astype(jnp.int32), lambda: greedy), greedy)


def first_largest(logits):
    """jnp.argmax(logits, -1) of (S, V), in two passes that XLA:CPU vectorises: 7 times as fast at 16 x 49,152."""
    index = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.where(logits == logits.max(-1, keepdims=True), index, logits.shape[-1] - 1).min(-1)


def highest_cut(logits, weights, wanted):
    """The highest threshold (S, 1) such that the `weights` (S, V) of the logits (S, V) at or above it add up to
    `wanted` (S, 1) or more. By bisection down to the last bit, which is faster than sorting a vocabulary."""

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.where(logits >= middle, weights, 0).sum(-1, keepdims=True) >= wanted
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = logits.max(-1, keepdims=True)
    return lax.fori_loop(0, 40, halve, (top - 100, jnp.nextafter(top, jnp.inf)))[0]


# ------------------------------------------------------------------------------------------------------- the engine


class TextStream:
    """Text from tokens as they come, in complete characters. Each token is decoded together with the one before it,
    since decoders put blanks between words. What ends an answer is no text."""

    def __init__(self, tokenizer: gpt.Tokenizer, before=()):
        """`before`: the last tokens of the text that is continued."""
        self.tokenizer, self.ids, self.start, self.read = tokenizer, list(before), 0, len(before)

    def add(self, ids, last: bool = False) -> str:
        self.ids += [i for i in ids if i not in self.tokenizer.end_ids]
        before = self.tokenizer.decode(self.ids[self.start : self.read])
        text = self.tokenizer.decode(self.ids[self.start :])[len(before) :]
        if text.endswith("\ufffd") and not last:
            return ""
        if text:
            self.start, self.read = self.read, len(self.ids)
        return text


class Token(NamedTuple):
    """A token, of an answer or an echoed prompt, whose log-probs were asked for."""

    id: int
    offset: int  # where it begins in the text
    logprob: float | None  # None for the first token of a prompt
    top: list  # (id, log-prob), the likeliest first


class Delta(NamedTuple):
    """What is new of a choice. The last delta of a choice has a `finish` (stop, length or abort) or an `error`."""

    choice: "Choice"
    text: str
    tokens: list
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Choice:
    """One answer to one prompt: what is asked of the engine, and what it has written so far."""

    index: int  # among all choices of the request
    ids: list  # the prompt
    limit: int  # tokens at most; 0: only the prompt is scored
    events: asyncio.Queue  # where deltas go
    deadline: float
    seed: int = 0
    number: int = 0  # among the n choices for this prompt
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stops: tuple = ()
    stop_ids: frozenset = frozenset()  # tokens that end the answer because the request names them
    endless: bool = False  # go on after a token that ends answers
    top: int | None = None  # alternatives a token; None: no log-probs
    echo: bool = False  # log-probs of the prompt, too
    stream: bool = False
    goes_on: bool = False  # the answer continues the prompt's text; otherwise it is a turn of its own
    trim: bool = False  # leave out the blank with which a turn begins
    generation_id: str | None = None

    cancelled: bool = False  # set by the event loop, read by the engine
    born: float = field(default_factory=time.monotonic)
    started: float = 0.0  # when its first token was drawn
    latest: float = 0.0  # when its last token was drawn
    prompt_scores: list = field(default_factory=list)  # of an echo: (log-prob, top, top_ids) from its second token on
    prompt_tokens: list = field(default_factory=list)  # a Token each
    filled: int = 0  # tokens of the prompt whose keys and values its slot holds
    cached: int = 0  # of these, how many the slot held, or another one, before the choice came
    ids_drawn: list = field(default_factory=list)
    logprob_sum: float = 0.0
    unread: list = field(default_factory=list)  # ids that were drawn but are not in `text` yet
    reader: TextStream | None = None
    text: str = ""
    sent: int = 0  # characters of `text` that were sent
    tokens: list = field(default_factory=list)  # a Token each, those not sent yet
    finish: str | None = None

    def add(self, ids, logprobs, tops, last: bool):
        """Take in drawn tokens; True if a stop ended the answer. Tokens are decoded one by one only where their places
        in the text matter, and not before the end where nobody waits for the text."""
        if not (self.stream or self.stops or self.top is not None or last):
            self.ids_drawn += ids
            self.unread += ids
            self.logprob_sum += sum(logprobs)
            return False
        step = 1 if self.stops or self.top is not None else max(len(ids), 1)
        for i in range(0, len(ids), step):
            before = len(self.text)
            self.ids_drawn += ids[i : i + step]
            self.logprob_sum += sum(logprobs[i : i + step])
            if self.stop_ids and ids[i] in self.stop_ids:
                self.text += self.read([], True)
                return True
            self.text += self.read(ids[i : i + step], last and i + step >= len(ids))
            if self.top is not None:
                self.tokens.append(Token(ids[i], before, logprobs[i], tops(i)[: self.top]))
            cut = find_stop(self.text, self.stops, before)
            if cut is not None:
                self.text = self.text[:cut]
                self.tokens = [token for token in self.tokens if token.offset < cut]
                return True
        return False

    def read(self, ids, last: bool) -> str:
        text = self.reader.add(self.unread + ids, last)
        self.unread = []
        if self.trim and text:
            self.trim, text = False, text.removeprefix(" ")
        return text

    def news(self) -> Delta | None:
        """What may be sent now, or None: not the last characters while they could become a stop string."""
        end = len(self.text) if self.finish else len(self.text) - held_back(self.text, self.stops)
        if not self.finish and (not self.stream or end <= self.sent):
            return None
        ready = [token for token in self.tokens if self.finish or token.offset < end]
        self.tokens = self.tokens[len(ready) :]
        text, self.sent = self.text[self.sent : end], max(end, self.sent)
        return Delta(self, text, ready, self.finish)


def find_stop(text: str, stops, start: int) -> int | None:
    """Where in the text the first complete stop string begins. Its first `start` characters are known to hold none."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, start - len(stop) + 1))
        if at >= 0:
            found.append((at + len(stop), at))
    return min(found)[1] if found else None


def held_back(text: str, stops) -> int:
    """How many of the last characters could be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-n:]) for stop in stops):
            return n
    return 0


def shared(a: list, b: list) -> int:
    """How many tokens two lists have in common at their beginnings."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def piece_size(rest: int, pieces: list[int]) -> int:
    """The size in which a prompt of which `rest` tokens are unread is read on: the smallest that holds them all if it
    is at most half as wide again, or the largest that they fill. On a CPU a call of 16 tokens takes 39 ms, of 24 46, of
    64 99 and of 256 305 (SmolLM2-135M, one core)."""
    whole = [n for n in pieces if rest <= n <= max(1.5 * rest, pieces[0])]
    return whole[0] if whole else max(n for n in pieces if n <= rest)


def fastest(call) -> float:
    """The least seconds that a call takes, of many where it is short: other programs disturb some of them."""
    call()
    seconds, until = [], time.perf_counter() + 0.2
    while len(seconds) < 5 or time.perf_counter() < until:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


class Served:
    """A model with its slots and its queue. Only the engine's thread touches what is on the device."""

    def __init__(self, name: str, path: str, config: Config):
        self.name, self.path, self.config = name, path, config
        self.created = int(time.time())
        self.waiting: collections.deque[Choice] = collections.deque()
        self.running: dict[int, Choice] = {}  # by slot; those whose prompt is not read yet are in `filling`, too
        self.filling: dict[int, Choice] = {}
        self.counts, self.finished = Counter(), Counter()
        self.first_token, self.between_tokens, self.request_time = (Histogram() for _ in range(3))

    def load(self):
        config = self.config
        model, self.tokenizer = gpt.load_policy(self.path)
        self.model = gpt.shard(gpt.cast(model, gpt.compute_dtype(config.dtype)))
        self.model_config = c = model.config
        own = c.context
        self.context = min(own, 2048) if config.context is None else config.context
        if c.gpt2 and self.context > own:
            raise ValueError(f"--context {config.context} > the {own} positions of {self.path}")
        files = gpt.weight_files(gpt.find_folder(self.path))
        self.checkpoint = hashlib.sha256("".join(map(gpt.file_hash, files)).encode()).hexdigest()
        self.sampling = sampling_defaults(self.tokenizer, self.name)
        self.examples = example_questions(config.examples) if config.examples else []
        self.code = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in ("gpt.py", "serve.py"))).hexdigest()
        # how much of a prompt is read at a time, how many slots draw together: few of each, each a program of its own
        self.pieces = sorted({min(n, self.context) for n in PIECES})
        self.slots = -(-config.slots // jax.device_count()) * jax.device_count()
        self.groups = sorted({min(n, self.slots) for n in (1, 4)}) if jax.device_count() == 1 else []
        self.state = idle_slots(self.slots, self.context)
        self.free = list(range(self.slots))  # the one that is free longest first
        self.candidates = list(self.measure()) if config.quality else []

    def make_caches(self, how: str):
        """Empty caches for weights of this form. Rounded weights compute nothing that needs more than float16's
        11 bits; keys and values of other weights stay in their precision."""
        self.caches = None
        self.held = [[] for _ in range(self.slots)]  # tokens whose keys and values a slot holds
        c, places = self.model_config, self.context + -self.context % block_size(self.context)
        dtype = gpt.compute_dtype(self.config.dtype)
        dtype = jnp.float16 if dtype == jnp.float32 and how != "none" else dtype
        # placed as the programs place them: one that is called with caches placed otherwise is compiled twice
        place = jax.jit(lambda: gpt.shard_batch(jnp.zeros((self.slots, c.kv_heads, places, c.head_dim), dtype)))
        self.caches = tuple((place(), place()) for _ in range(c.layers))

    def measure(self):
        """A Candidate for the full weights and the form that is asked for, or for every form where none or "auto" is:
        its quality on the rows of --quality, its speed at whole requests."""
        batches, wanted = quality_batches(self.config.quality, self.tokenizer, self.context), self.config.quantize
        for how in FORMS if wanted in (None, "auto") else ("none", wanted):
            try:
                model = self.model if how == "none" else quantize(self.model, how)
            except ValueError as error:  # int4 packs no odd width
                LOG.info("%s: %s", self.name, error)
                continue
            found = quality(self.model, model, batches, f"{self.name} {how}")
            self.weights = None  # those of the form before, which are freed first
            self.weights = unstack(model)
            self.make_caches(how)
            seconds = self.slots * self.read_seconds() + ANSWER * self.step_seconds(self.slots, self.context // 2)
            speed = self.slots * ANSWER / seconds
            size = size_in_bytes(model) / 1e6
            yield Candidate(how, size, found["kl"], found["top1"], found["perplexity_quantised"], speed)

    def compress(self):
        """Choose a form of the weights, and keep it alone."""
        self.quantization = choose(self.candidates, self.config.quantize or "none", self.config.max_kl)
        if self.quantization != "none" and not self.candidates:
            LOG.warning(
                "%s: %s is unmeasured: --quality FILE, held-out rows, measures how far it is from the full weights",
                self.name, self.quantization,
            )  # fmt: skip
        model, self.model, self.weights = self.model, None, None
        self.make_caches(self.quantization)
        self.weights = unstack(model if self.quantization == "none" else quantize(model, self.quantization))
        jax.block_until_ready(self.weights)
        del model
        return_memory()

    def warm_up(self):
        """Compile every shape, and find how many tokens a call draws: those of 20 ms, or a stream would look jerky."""
        for piece in self.pieces:
            for rows in self.prompt_counts(piece):
                self.read([([0] * piece, [0] * piece, 0, 0)] * rows, piece, True, idle_slots(rows, self.context))
        self.caches = copy_slot(self.caches, 0, self.slots - 1)
        self.steps = {n: int(np.clip(0.02 / self.step_seconds(n), 1, MOST_STEPS)) for n in (*self.groups, self.slots)}
        # what is made once, like the template's engine and the fingerprint, is made before the first request
        with contextlib.suppress(ApiError):
            make_job(ChatRequest(messages=[Message("user", "hello")]), self, self.config)
        self.template_hash = hashlib.sha256(self.tokenizer.template.encode()).hexdigest()
        self.tokenizer_hash = self.tokenizer.fingerprint

    def step_seconds(self, n: int, held: int = 0) -> float:
        """Seconds that it takes to draw one token in each of n slots, which hold this many tokens each."""
        busy = idle_slots(n, self.context)._replace(
            position=np.full(n, held, np.int32), remaining=np.full(n, 99, np.int32),
            endless=np.ones(n, bool),
        )  # fmt: skip
        return fastest(lambda: np.asarray(self.decode(np.arange(n), busy, MOST_STEPS)[0])) / MOST_STEPS

    def read_seconds(self) -> float:
        """Seconds that it takes to read the widest piece of a prompt, in the second half of the context."""
        size = self.pieces[-1]
        piece = [0] * size, [0] * size, 0, min(self.context // 2, self.context - size)

        def read():
            self.read([piece], size, False)
            jax.block_until_ready(self.caches)

        return fastest(read)

    def decode(self, rows, some: Slots, steps: int):
        """Tokens and log-probs that the slots `rows` draw, which are all of them, or as many as one of `groups`."""
        rows = None if len(rows) == self.slots else rows.astype(np.int32)
        self.caches, *drawn = decode(self.weights, self.caches, some, rows, steps, ends=self.tokenizer.end_ids)
        return drawn

    def read(self, pieces, size: int, wanted: bool, slots: Slots | None = None):
        """Read pieces (tokens, the tokens that follow them, slot, start) of prompts, in calls of this size: the first
        tokens that are drawn in the `slots` (None: in none), and if `wanted` the log-probs."""
        tokens, targets = (np.zeros((len(pieces), size), np.int32) for _ in range(2))
        for row, (ids, following, _, _) in enumerate(pieces):
            tokens[row, : len(ids)], targets[row, : len(following)] = ids, following
        last = np.array([len(ids) - 1 for ids, *_ in pieces], np.int32)
        rows, starts = (np.array([piece[k] for piece in pieces], np.int32) for k in (2, 3))
        self.caches, ends, scores = prefill(self.weights, self.caches, tokens, targets, rows, starts, last, wanted)
        return first_tokens(self.weights.outer, ends, slots) if slots else None, scores

    def prompt_counts(self, piece: int) -> list[int]:
        """How many prompts one call may read a piece of: several are worth while only where pieces are small."""
        return sorted({min(n, self.slots) for n in PROMPTS}) if piece == self.pieces[0] else [1]

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    def step(self, post, flush=lambda: None):
        """One turn: end what was cancelled, let waiting choices in, read as much of their prompts as the widest piece
        holds, draw some tokens for all whose prompt is read. `post` takes deltas, which `flush` sends: the first token
        of an answer does not wait for the next one."""
        self.reap(post)
        self.admit()
        room = self.pieces[-1]
        while self.filling and room > 0:
            room -= self.fill(post)
        if len(self.running) > len(self.filling):
            flush()
            self.advance(post)

    def reap(self, post):
        now = time.monotonic()
        for slot, choice in list(self.running.items()):
            if choice.cancelled or now > choice.deadline:
                self.end(choice, "abort", post, slot)
        late = [choice for choice in list(self.waiting) if choice.cancelled or now > choice.deadline]
        for choice in late:
            self.waiting.remove(choice)
            post(Delta(choice, "", [], error="the request waited too long for a free slot"))

    def admit(self):
        """Give the free slots to waiting choices, each the one that holds most of its prompt already. A choice whose
        prompt another one is being read for waits for that."""
        later = []
        while self.waiting and self.free:
            choice = self.waiting.popleft()
            slot, source, known = self.find_slot(choice)
            if slot is None:
                later.append(choice)
                continue
            self.free.remove(slot)
            if source != slot:
                self.caches = copy_slot(self.caches, source, slot)
            self.held[slot] = choice.ids[:known]
            choice.filled = choice.cached = known
            self.running[slot] = self.filling[slot] = choice
            self.counts["prompt"] += len(choice.ids)
            self.counts["cached"] += known
            choice.reader = TextStream(self.tokenizer, choice.ids[-4:] if choice.goes_on else ())
            values = dict(
                token=choice.ids[-1], position=len(choice.ids) - 1, remaining=0, drawn=0, seed=choice.seed,
                choice=choice.number, endless=choice.endless, scored=bool(choice.top), answer=-1,
                **{name: getattr(choice, name) for name in SAMPLING},
            )  # fmt: skip
            for name, value in values.items():
                getattr(self.state, name)[slot] = value
        self.waiting.extendleft(later[::-1])

    def find_slot(self, choice: Choice):
        """(a free slot, the slot to copy from, how many tokens of the prompt that holds); (None, ...) where it pays to
        wait for another choice's prompt. The log-probs of an echoed prompt are not kept: it is read anew."""
        if choice.echo:
            return self.free[0], self.free[0], 0
        prompt = choice.ids[:-1]
        known = [shared(held, prompt) for held in self.held]
        free = max(self.free, key=known.__getitem__)  # of equal ones the first, which is free longest
        best = max(range(self.slots), key=known.__getitem__)
        soon = max((shared(other.ids, prompt) for other in self.filling.values()), default=0)
        if soon > known[best] + self.pieces[0]:
            return None, None, 0
        if known[best] > known[free] + self.pieces[0]:
            return self.free[0], best, known[best]
        return free, free, known[free]

    def fill(self, post) -> int:
        """Read the next piece of one prompt, or of several where these are short; the number of tokens in the call. The
        last token of a prompt is read by the first step of decoding, which draws the answer's first token. Only where
        no other slot is drawing, so that such a step would be one more, the prompt's last piece does both."""
        for slot, choice in list(self.filling.items()):
            if choice.filled == len(choice.ids) - 1:
                self.filled(choice, slot, post)
        if not self.filling:
            return 0
        alone = not self.state.remaining.any()
        left = {slot: len(choice.ids) - (not alone) - choice.filled for slot, choice in self.filling.items()}
        short = [slot for slot, n in left.items() if n <= self.pieces[0]]
        group = short or [next(iter(left))]
        count = max(n for n in self.prompt_counts(self.pieces[0]) if n == 1 or 4 * len(group) >= 3 * n)
        group = group[:count]
        size, pieces = piece_size(left[group[0]], self.pieces), []
        rows = np.array(group + group[:1] * (count - len(group)))  # filled up with the first one again
        drawing = Slots(*(x[rows] for x in self.state)) if alone else None
        for row, slot in enumerate(group):
            choice = self.filling[slot]
            start = min(choice.filled, self.context - size)  # near the end some tokens are read once more
            ids = choice.ids[start : choice.filled + left[slot]][:size]
            pieces.append((ids, choice.ids[start + 1 :][:size], slot, start))
            if drawing and start + len(ids) == len(choice.ids):
                drawing.remaining[row] = choice.limit
        wanted = any(self.filling[slot].echo for slot in group)
        if drawing and not drawing.remaining.any():
            drawing = None
        first, scores = self.read(pieces + pieces[:1] * (count - len(group)), size, wanted, drawing)
        scores = jax.tree.map(np.asarray, scores) if wanted else None
        for row, (ids, _, slot, start) in enumerate(pieces):
            choice = self.filling[slot]
            if choice.echo:
                new = slice(choice.filled - start, len(ids))
                choice.prompt_scores += zip(*(x[row, new].tolist() for x in scores))
            choice.filled = start + len(ids)
            self.held[slot] = choice.ids[: choice.filled]
            if choice.filled >= len(choice.ids) - (not alone):
                self.filled(choice, slot, post)
        if drawing:
            self.take_drawn(rows, drawing, *first, post)
        return count * size

    def filled(self, choice: Choice, slot: int, post):
        """The prompt is read: let its slot draw. Keep the log-probs of an echoed one (its first token has none). A
        choice that draws nothing ends here."""
        del self.filling[slot]
        self.state.remaining[slot] = choice.limit
        if choice.echo:
            reader, at, k = TextStream(self.tokenizer), 0, choice.top or 0
            for token, scores in zip(choice.ids, [None, *choice.prompt_scores]):
                chosen, top, top_ids = scores or (None, [], [])
                choice.prompt_tokens.append(Token(token, at, chosen, list(zip(top_ids[:k], top[:k]))))
                at += len(reader.add([token]))
        if not choice.limit:
            self.end(choice, "length", post, slot)

    def advance(self, post):
        """Draw some tokens for all whose prompt is read: in as many rows as they need, not in all slots."""
        busy = np.flatnonzero(self.state.remaining > 0)
        n = next((n for n in self.groups if n >= len(busy)), self.slots)
        rows = np.arange(self.slots) if n == self.slots else np.resize(busy, n)  # filled up with the first ones again
        some = Slots(*(x[rows] for x in self.state))
        if n < self.slots:
            some.remaining[len(busy) :] = 0
        draws = np.minimum(some.remaining, self.steps[n])
        self.take_drawn(rows, some, *self.decode(rows, some, int(draws.max())), post)

    def take_drawn(self, rows, some: Slots, tokens, logprobs: Alternatives, post):
        """Give choices the tokens (steps, S) that were drawn in the slots `rows`, in those of `some` that were busy."""
        tokens, chosen = np.asarray(tokens), np.asarray(logprobs.chosen)
        alternatives = [np.asarray(x) for x in logprobs[1:]] if some.scored.any() else None
        now = time.monotonic()
        for row in np.flatnonzero(some.remaining).tolist():
            ids = tokens[:, row][tokens[:, row] >= 0].tolist()
            self.take(int(rows[row]), ids, chosen[: len(ids), row].tolist(), row, alternatives, now, post)

    def take(self, slot: int, ids, chosen, row: int, alternatives, now: float, post):
        """Give a choice the tokens that were drawn in its slot, which is this row of the arrays of alternatives."""
        choice, n = self.running[slot], len(ids)
        self.state.token[slot] = ids[-1]
        self.state.answer[slot, len(choice.ids_drawn) :][:n] = ids
        for array, change in ((self.state.position, n), (self.state.drawn, n), (self.state.remaining, -n)):
            array[slot] += change
        self.observe(choice, n, now)

        def tops(i):
            return list(zip(*(x[i, row].tolist() for x in alternatives[::-1]))) if alternatives else []

        ended = ids[-1] in self.tokenizer.end_ids and not choice.endless
        last = ended or self.state.remaining[slot] == 0
        try:
            stopped = choice.add(ids, chosen, tops, last)
        except Exception:  # it ends this request alone
            LOG.exception("a request failed")
            self.end(choice, "error", post, slot)
            return
        if stopped or last:
            self.end(choice, "stop" if stopped or ended else "length", post, slot)
        elif delta := choice.news():
            post(delta)

    def observe(self, choice: Choice, n: int, now: float):
        self.counts["generation"] += n
        if choice.started:
            self.between_tokens.add((now - choice.latest) / n, n)
        else:
            choice.started = now
            self.first_token.add(now - choice.born)
        choice.latest = now

    def end(self, choice: Choice, finish: str, post, slot: int | None = None):
        choice.finish = finish
        if choice.unread and finish != "error":
            choice.text += choice.read([], True)
        self.finished[finish] += 1
        self.request_time.add(time.monotonic() - choice.born)
        if slot is not None:
            del self.running[slot]
            self.free.append(slot)
            if not self.filling.pop(slot, None):  # the last token that was drawn was not read
                self.held[slot] = (choice.ids + choice.ids_drawn)[: self.state.position[slot]]
            self.state.remaining[slot] = 0
            self.state.scored[slot] = False
        delta = choice.news()
        post(delta._replace(error="the server failed at this request") if finish == "error" else delta)


class Histogram:
    """A histogram as Prometheus reads it: for each bound, how many values are at most as large."""

    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

    def __init__(self):
        self.counts, self.total = [0] * (len(self.BOUNDS) + 1), 0.0

    def add(self, value: float, times: int = 1):
        self.counts[bisect.bisect_left(self.BOUNDS, value)] += times
        self.total += value * times

    def lines(self, name: str, labels: str):
        running = 0
        for bound, count in zip((*self.BOUNDS, "+Inf"), self.counts):
            running += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {running}'
        yield f"{name}_sum{{{labels}}} {self.total}"
        yield f"{name}_count{{{labels}}} {running}"


class Engine:
    """The one thread that uses JAX: it loads the models and steps those that have work, in turn."""

    def __init__(self, models: list[Served], config: Config):
        self.models, self.config = models, config
        self.ready, self.stopping, self.failure = False, False, None
        self.wake = threading.Condition()
        self.outbox: list[Delta] = []
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop, on_ready, on_failure):
        self.loop, self.on_ready, self.on_failure = loop, on_ready, on_failure
        self.thread.start()

    def run(self):
        try:
            gpt.start()
            for model in self.models:
                model.load()
            if self.config.quality:
                print(quality_table(self.models, self.config.max_kl), flush=True)
            for model in self.models:
                model.compress()
                model.warm_up()
            return_memory()
            gc.freeze()  # a garbage collection over all that was compiled would stop every thread for a while
            self.ready = True
            self.on_ready()
            while self.wait_for_work():
                for model in self.models:
                    if model.busy:
                        model.step(self.outbox.append, self.flush)
                self.flush()
        except BaseException as error:
            self.failure = error
            loading, self.ready = not self.ready, False
            LOG.error("the engine stopped: %s", error, exc_info=not loading or bool(os.environ.get("DEBUG")))
            self.fail_all("the engine stopped")
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                self.loop.call_soon_threadsafe(self.on_failure, loading)

    def wait_for_work(self) -> bool:
        with self.wake:
            while not self.stopping and not any(model.busy for model in self.models):
                self.wake.wait()
        return not self.stopping

    def submit(self, model: Served, choices: list[Choice]) -> bool:
        """Queue all of a request's choices; False, and none, where there is no room. The event loop calls it."""
        with self.wake:
            if len(model.waiting) + len(choices) > self.config.max_queue + len(model.free) * (not model.waiting):
                return False
            model.waiting.extend(choices)
            self.wake.notify()
        return True

    def flush(self):
        """Hand the deltas so far to the event loop in one go."""
        if self.outbox:
            self.loop.call_soon_threadsafe(deliver, self.outbox.copy())
            self.outbox.clear()  # the same list: a model in the middle of its turn appends to it

    def choices(self) -> list[Choice]:
        return [choice for model in self.models for choice in (*model.running.values(), *model.waiting)]

    def fail_all(self, reason: str):
        self.outbox += [Delta(choice, "", [], error=reason) for choice in self.choices()]
        for model in self.models:
            model.running.clear()
            model.waiting.clear()
        with contextlib.suppress(RuntimeError):
            self.flush()

    def cancel_all(self):
        for choice in self.choices():
            choice.deadline = 0.0

    def stop(self):
        with self.wake:
            self.stopping = True
            self.wake.notify()
        self.thread.join(10 if self.ready else 0)  # what is being loaded or compiled is not waited for


def deliver(deltas: list[Delta]):
    for delta in deltas:
        delta.choice.events.put_nowait(delta)


# ------------------------------------------------------------------------------------------------ what clients send

MAX_BODY = 2**20  # bytes
MAX_CHOICES = 64  # answers to one request: prompts x n
CHARS_A_TOKEN = 64  # a text with more characters for each token of the context is refused before it is tokenised
BODY_SECONDS = 20.0  # seconds that a client may take to send a body

Id = Annotated[str, Meta(min_length=1, max_length=128)]
TokenId = Annotated[int, Meta(ge=0)]
Stop = Annotated[str, Meta(min_length=1, max_length=64)]
Metadata = Annotated[dict[Id, Annotated[str, Meta(max_length=512)]], Meta(max_length=16)]


NO_LIST = (False, "null")  # what else clients send for no tools
# options that would change the answer and are not here, and the values that ask for nothing, as null and empty ones do
NEUTRAL = {
    name: values
    for names, values in (
        ("min_tokens mirostat xtc_probability dry_multiplier dynatemp_range", (0,)),
        ("repetition_penalty repeat_penalty length_penalty typical_p tfs_z", (1,)),
        ("use_beam_search include_stop_str_in_output return_tokens_as_token_ids", (False,)),
        ("skip_special_tokens", (True,)),
        ("tool_choice function_call", ("none", "auto", {"type": "none"}, {"type": "auto"}, *NO_LIST)),
        ("response_format", ({"type": "text"}, "text", *NO_LIST)),
        ("modalities", (["text"],)),
        ("reasoning_effort", ("none",)),
        ("verbosity", ("medium",)),
        ("suffix guided_regex guided_grammar grammar regex ebnf", ()),
        ("logit_bias stop_token_ids bad_words allowed_token_ids truncate_prompt_tokens prompt_logprobs", ()),
        ("guided_json guided_choice structured_outputs json_schema max_new_tokens n_predict", ()),
        ("tools functions documents audio prediction web_search_options chat_template chat_template_kwargs", NO_LIST),
    )
    for name in names.split()
}
SMALLEST = 1e-5  # a temperature below it is greedy, a top_p below it is it: the device computes in single precision

Unsupported = msgspec.defstruct("Unsupported", [(name, Any, None) for name in NEUTRAL], kw_only=True)


class StreamOptions(Struct):
    include_usage: bool | None = None


class Sampling(Unsupported, kw_only=True):
    """What text and chat completions have in common. Unknown keys are ignored: clients send many. Those of NEUTRAL are
    refused where they ask for something."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    n: Annotated[int, Meta(ge=1, le=8)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    store: bool | Literal["on_vote"] | None = None  # keep the answers, so that they can be voted on: `log_generation`
    metadata: Metadata | None = None
    best_of: Any = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: str | Annotated[list[str | TokenId | Annotated[list[TokenId], Meta(min_length=1)]], Meta(min_length=1)]
    echo: bool | None = None
    add_special_tokens: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=TOP)] | None = None


class TextPart(Struct):
    type: Literal["text"]
    text: str


class Message(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    tool_calls: Any = None  # refused, as what NEUTRAL names
    function_call: Any = None
    audio: Any = None


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1, max_length=1024)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP)] | None = None
    echo: Any = None  # this and the following may only say what is done: `make_job`
    add_special_tokens: Any = None
    add_generation_prompt: Any = None
    continue_final_message: Any = None


class ResponsePart(Struct):
    type: Literal["input_text", "output_text", "text"]
    text: str


class ResponseItem(Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ResponsePart]
    type: Literal["message"] = "message"


# of the Responses API, which keeps no conversations here: the messages of one are sent again each time
NEUTRAL_RESPONSES = {
    "previous_response_id": (), "conversation": (), "prompt": (), "max_tool_calls": (),
    "include": (["reasoning.encrypted_content"],),  # there is none
    "background": (False,), "truncation": ("disabled",), "top_logprobs": (0,), "tools": NO_LIST,
    "tool_choice": NEUTRAL["tool_choice"], "reasoning": ({"effort": "none"},),
    "text": ({"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
}  # fmt: skip
UnsupportedResponses = msgspec.defstruct(
    "UnsupportedResponses", [(k, Any, None) for k in NEUTRAL_RESPONSES], kw_only=True
)


class ResponsesRequest(UnsupportedResponses, kw_only=True):
    input: str | Annotated[list[ResponseItem], Meta(min_length=1, max_length=1024)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    stream: bool | None = None
    store: bool | Literal["on_vote"] | None = None
    metadata: Metadata | None = None


class TokenizeRequest(Struct):
    prompt: str | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True
    model: str | None = None


class DetokenizeRequest(Struct):
    tokens: list[TokenId]
    model: str | None = None


class MarkdownRequest(Struct):
    texts: Annotated[list[str], Meta(max_length=64)]


class FeedbackRequest(Struct):
    kind: Literal["thumb", "pair", "edit"]
    generation_a: Id
    value: Literal["up", "down", "a", "b", "tie", "both_bad", "edited"]
    annotator_id: Id
    consent: bool
    generation_b: Id | None = None
    shown_left: Literal["a", "b"] | None = None
    reasons: Annotated[list[Annotated[str, Meta(max_length=64)]], Meta(max_length=16)] = []
    comment: Annotated[str, Meta(max_length=4096)] = ""
    edited_text: Annotated[str, Meta(max_length=32768)] | None = None
    latency_ms: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    ui_version: Annotated[str, Meta(max_length=64)] | None = None


class ApiError(Exception):
    """An error that the client is told, as a status and OpenAI's error body."""

    KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, **headers):
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = self.KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> Response:
        return reply(self.body, self.status, self.headers)


def reply(body, status: int = 200, headers=None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def read_body(request: Request, kind):
    """The request's JSON as a checked Struct of this kind."""
    return decode_body(await read_bytes(request), kind)


async def read_bytes(request: Request) -> bytes:
    """A body of JSON. Its type, its size and the time it takes are limited."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media != "application/json":  # any web page may send others across sites without asking
        raise ApiError(415, "send JSON, with the header content-type: application/json")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise ApiError(413, f"the body is longer than {MAX_BODY:,} bytes", connection="close")
    except TimeoutError:
        raise ApiError(408, "the body did not arrive in time", connection="close") from None
    return body


KNOWN = {  # what a message may hold, to whom sends more
    "role": ": known are system, developer, user and assistant, since tools are not supported",
    "type": ": only text is read, no images, sound, files or calls of tools",
}


def decode_body(body: bytes, kind):
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = re.split(r"[.\[`]", path.lstrip("."))[0] or None
        missing = re.search(r"missing required field `(\w+)`", message)
        param = missing[1] if missing and not param else param
        message += KNOWN.get(path.rpartition(".")[2].rstrip("`"), "") if "enum" in message else ""
        raise ApiError(400, f"{message} ({param})" if param else message, param) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON that can be read ({error})") from None


def refuse_unsupported(request, neutral: dict):
    """Options that would change the answer must not be ignored. `neutral`: the values of each that ask for nothing."""
    for name, values in neutral.items():
        if asks(request, name, values):
            also = "".join(f", or send {json.dumps(value)}" for value in values[:1] if values is not NO_LIST)
            raise ApiError(400, f"{name} is not supported: leave it out{also}", name, "unsupported_value")
    refuse_calls(request)
    if isinstance(request, ChatRequest) and request.logprobs is False and request.top_logprobs:
        raise ApiError(400, "top_logprobs asks for what logprobs false declines: set logprobs true", "top_logprobs")


def asks(values, name: str, neutral=NO_LIST) -> bool:
    """Whether a request or a message says something under a name, beside the values that are neutral."""
    return without_nulls(getattr(values, name)) not in (None, "", [], {}, *neutral)


def refuse_calls(request):
    for message, name in itertools.product(getattr(request, "messages", ()), ("tool_calls", "function_call", "audio")):
        if asks(message, name):
            raise ApiError(400, f"a message has {name}, which is not supported", "messages", "unsupported_value")


def without_nulls(value):
    """Objects without what is null in them: libraries write out what their user left empty."""
    if not isinstance(value, dict):
        return value
    found = {name: without_nulls(x) for name, x in value.items()}
    return {name: x for name, x in found.items() if x is not None}


SAMPLING = {  # where neither request nor model says more
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0
}  # fmt: skip
UNSAMPLED = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "typical_p": 1.0, "num_beams": 1, "penalty_alpha": 0}


def sampling_defaults(tokenizer: gpt.Tokenizer, name: str) -> dict[str, float]:
    """How a model's makers mean it to be sampled, by its generation_config.json: what a request leaves out has these
    values. What is not computed here is named in the log."""
    found = gpt.generation_config(tokenizer)
    for key, nothing in UNSAMPLED.items():
        if found.get(key) not in (None, nothing):
            LOG.warning("%s: its generation_config.json asks for %s %s, which is not done", name, key, found[key])
    return {key: found[key] for key in SAMPLING if found.get(key) is not None}


def most_tokens(request: Sampling, model: Served) -> int:
    """How many tokens an answer may have, before the context ends it: the smaller one where both names are given."""
    given = [limit for limit in (request.max_tokens, request.max_completion_tokens) if limit is not None]
    limit = min(given, default=model.context if isinstance(request, ChatRequest) else 16)
    if limit == 0 and not getattr(request, "echo", False):
        also = "" if isinstance(request, ChatRequest) else " (without echo)"
        raise ApiError(400, f"max_tokens 0 asks for nothing{also}: leave it out, or send 1 or more", "max_tokens")
    return limit


def fold_seed(seed: int | None) -> int:
    """32 bits for the device: a random number where no seed is given, 0 to 2^32 - 1 as they are, others by a hash."""
    if seed is None:
        return secrets.randbits(32)
    return seed if 0 <= seed < 2**32 else int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4])


def chat_messages(messages: list[Message]) -> list[dict]:
    """Messages whose content is one text (a list of texts is joined, null is empty) and whose developer is system."""
    text = lambda content: "".join(p.text for p in content) if isinstance(content, list) else content or ""
    role = lambda name: "system" if name == "developer" else name
    return [{"role": role(m.role), "content": text(m.content)} for m in messages]


def chat_ids(messages: list[dict], tokenizer: gpt.Tokenizer) -> list[int]:
    """The prompt's ids of a chat. If its last message is the assistant's, the answer continues it."""
    if [message["role"] for message in messages] == ["assistant"]:
        raise ApiError(400, "messages hold an assistant's turn alone: nothing is asked", "messages")
    try:
        return gpt.encode_prompt(messages, tokenizer)
    except Exception as error:  # a template is somebody's code; what it says itself is a ValueError
        reason = f"the chat template cannot render these messages ({type(error).__name__})"
        raise ApiError(400, str(error) if isinstance(error, ValueError) else reason, "messages") from None


@lru_cache
def names_in(template: str) -> set[str]:
    """The names that a chat template takes from outside."""
    return jinja2.meta.find_undeclared_variables(gpt.template_environment().parse(template))


def set_template(tokenizer: gpt.Tokenizer, model_name: str, settings: dict) -> gpt.Tokenizer:
    """The tokenizer with `chat_template_kwargs` for its chat template, under vLLM's name: {"enable_thinking": false},
    say. Refused is what the template does not read, and what could be read as a part of a special token."""
    settings = {name: value for name, value in settings.items() if value is not None}
    param = "chat_template_kwargs"
    if not settings:
        return tokenizer
    read = names_in(tokenizer.template) - {"messages", "add_generation_prompt", "tools", "documents", *tokenizer.names}
    if unknown := sorted(settings.keys() - read):
        known = f"but: {', '.join(sorted(read))}" if read else "nor any other: leave them out"
        said = f"the chat template of {model_name} does not read {unknown[0]!r} of {param}, {known}"
        raise ApiError(400, said, param, "unsupported_value")
    marks = {c for special in tokenizer.specials for c in special if not c.isalnum()}
    for name, value in settings.items():
        text = value if isinstance(value, str) else ""
        forged = marks & {*text} or tokenizer.has_special(text) or any(text and text in x for x in tokenizer.specials)
        if forged or not isinstance(value, str | bool | int | float):
            said = f"{name} of {param} is a number, true, false, or a text that holds nothing of a special token"
            raise ApiError(400, said, param)
    settled = copy.copy(tokenizer)
    settled.names = tokenizer.names | settings
    return settled


def opens_with_blank(tokenizer: gpt.Tokenizer) -> bool:
    """Whether the chat template puts a blank between the opening of the assistant's turn and its first word."""
    with contextlib.suppress(gpt.BadRow):
        return tokenizer.turn([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[1][:1] == " "
    return False


def text_ids(text: str, tokenizer: gpt.Tokenizer, bos: bool = True) -> list[int]:
    """The ids of a text prompt. Names of special tokens in it become these tokens: evaluation harnesses expect it."""
    ids = tokenizer.encode(text, special=True)
    return [tokenizer.bos_id, *ids] if bos and tokenizer.bos_id not in (None, *ids[:1]) else ids


def check_prompt(ids: list[int], model: Served, room: int) -> list[int]:
    if not ids:
        raise ApiError(400, "the prompt is empty", "prompt")
    if max(ids) >= model.tokenizer.vocab_size:
        raise ApiError(400, f"token {max(ids)} is not within the vocabulary", "prompt")
    if len(ids) + room > model.context:
        refuse_length(model, f"{len(ids)} tokens")
    return ids


def check_chars(model: Served, chars: int):
    """Refuse what is too long before it is tokenised, which would keep everyone waiting."""
    if chars > CHARS_A_TOKEN * model.context:
        refuse_length(model, f"{chars:,} characters")


def refuse_length(model: Served, found: str):
    message = f"the prompt has {found}; the context of {model.name} is {model.context} tokens, the answer's included"
    raise ApiError(400, message, "messages", "context_length_exceeded")


@dataclass
class Job:
    """A checked request: its prompts, as the client sent them and votes store them, and its choices."""

    request: Sampling
    model: Served
    chat: bool
    id: str
    created: int
    prompts: list  # each a text, a list of messages or a list of token ids
    choices: list[Choice]
    events: asyncio.Queue

    async def aclose(self):
        """Free its slots. Asynchronous as the `aclose` of another engine's answer is: see `Streamed`."""
        for choice in self.choices:
            choice.cancelled = True

    def usage(self) -> dict:
        n = self.request.n or 1
        prompt = sum(len(choice.ids) for choice in self.choices[::n])
        completion = sum(len(choice.ids_drawn) for choice in self.choices)
        cached = {"cached_tokens": sum(choice.cached for choice in self.choices[::n])}
        total = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return total | {"prompt_tokens_details": cached}


def make_job(request: Sampling, model: Served, config: Config) -> Job:
    """A request with its choices; ApiError if it asks for something that it may not."""
    chat, tokenizer, neutral = isinstance(request, ChatRequest), model.tokenizer, NEUTRAL
    goes_on = not chat or request.messages[-1].role == "assistant"
    if chat and isinstance(request.chat_template_kwargs, dict):
        neutral = {name: values for name, values in NEUTRAL.items() if name != "chat_template_kwargs"}
        tokenizer = set_template(tokenizer, model.name, request.chat_template_kwargs)
    if chat:
        turns = {"add_generation_prompt": (not goes_on,), "continue_final_message": (goes_on,)}
        neutral = neutral | {"echo": (False,), "add_special_tokens": (False,)} | turns
    refuse_unsupported(request, neutral | {"best_of": (request.n or 1,)})
    if request.store:
        check_stored(request)
    prompts = [chat_messages(request.messages)] if chat else prompt_list(request.prompt)
    n = request.n or 1
    if len(prompts) * n > MAX_CHOICES:
        raise ApiError(400, f"{len(prompts)} prompts x n {n} are more than {MAX_CHOICES} answers", "n")
    for prompt in prompts:
        check_chars(model, sum(len(m["content"]) for m in prompt) if chat else len(prompt))
    limit, echo = most_tokens(request, model), not chat and bool(request.echo)
    if chat:
        top = (request.top_logprobs or 0) if request.logprobs or request.top_logprobs else None
    else:
        top = request.logprobs
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    given = {name: getattr(request, name) for name in SAMPLING if getattr(request, name) is not None}
    sampling = SAMPLING | model.sampling | given
    temperature = sampling["temperature"] if sampling["temperature"] >= SMALLEST else 0.0
    sampling |= dict(temperature=temperature, top_k=max(sampling["top_k"], 0), top_p=max(sampling["top_p"], SMALLEST))
    options = sampling | dict(
        seed=fold_seed(request.seed), stops=stops,
        stop_ids=named_stops(stops, tokenizer), endless=bool(request.ignore_eos), top=top,
        echo=echo and (top is not None or limit == 0), stream=bool(request.stream), goes_on=goes_on,
        trim=not goes_on and opens_with_blank(tokenizer), deadline=time.monotonic() + config.timeout,
    )  # fmt: skip
    events, choices = asyncio.Queue(), []
    for prompt in prompts:
        if chat:
            ids = chat_ids(prompt, tokenizer)
        else:
            bos = request.add_special_tokens is not False
            ids = prompt if isinstance(prompt, list) else text_ids(prompt, tokenizer, bos)
        check_prompt(ids, model, room=limit > 0)
        for number in range(n):
            stored = uuid.uuid4().hex if request.store else None
            room = min(limit, model.context - len(ids))
            choice = Choice(len(choices), ids, room, events, number=number, generation_id=stored, **options)
            choices.append(choice)
    name = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
    return Job(request, model, chat, name, int(time.time()), prompts, choices, events)


def check_stored(request: Sampling):
    """Refuse to store what votes could not teach: training shows a prompt as the template has it of messages alone."""
    for name in ("chat_template_kwargs", "chat_template", "tools", "functions", "documents"):
        if asks(request, name):
            said = f"an answer to {name} is not stored, since training does not render them: leave store out"
            raise ApiError(400, said, "store")
    refuse_calls(request)


def named_stops(stops, tokenizer: gpt.Tokenizer) -> frozenset:
    """The ids of tokens that stop strings name: text shows no special tokens, so that their id is what stops."""
    for stop in stops:
        for name, token in tokenizer.specials.items():
            if name in stop and name != stop and token in tokenizer.special_ids:
                raise ApiError(
                    400, f"stop {stop!r} holds more than the special token {name}, and the text of an answer shows no "
                    f"special tokens: give {name} as a stop of its own", "stop",
                )  # fmt: skip
    return frozenset(tokenizer.specials[stop] for stop in stops if stop in tokenizer.specials)


def prompt_list(prompt) -> list:
    """The prompts of a text completion, each a text or a list of ids, from one or several."""
    kinds = {type(item) for item in prompt} if isinstance(prompt, list) else set()
    if len(kinds) > 1:
        raise ApiError(400, "prompt mixes texts, tokens and lists of tokens", "prompt")
    return prompt if kinds & {str, list} else [prompt]


# --------------------------------------------------------------------------------------------------- what they get


def token_text(tokenizer: gpt.Tokenizer, token: int) -> str:
    """The text by which log-probs name a token: of a special one its name, of an incomplete character its bytes."""
    if token in tokenizer.special_ids:
        return next(text for text, i in tokenizer.specials.items() if i == token)
    raw = tokenizer.token_bytes(token)
    text = raw.decode("utf-8", "replace")
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if "\ufffd" in text else text


def chat_logprobs(job: Job, tokens: list[Token]):
    if job.choices[0].top is None:
        return None
    tokenizer = job.model.tokenizer

    def entry(token, logprob):
        raw = b"" if token in tokenizer.special_ids else tokenizer.token_bytes(token)
        return {"token": token_text(tokenizer, token), "logprob": logprob, "bytes": list(raw)}

    return {
        "content": [
            entry(token.id, token.logprob) | {"top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }  # fmt: skip


def text_logprobs(job: Job, tokens: list[Token], start: int = 0):
    """The four parallel lists of OpenAI's completions; `start` is where the answer begins in the text."""
    if job.choices[0].top is None:
        return None
    text = partial(token_text, job.model.tokenizer)
    tops = [{text(i): logprob for i, logprob in reversed([*token.top, (token.id, token.logprob)])} for token in tokens]
    return {
        "tokens": [text(token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [None if token.logprob is None else top for token, top in zip(tokens, tops)],
        "text_offset": [start + token.offset for token in tokens],
    }


def echoed(job: Job, choice: Choice) -> str:
    if job.chat or not job.request.echo:
        return ""
    prompt = job.prompts[choice.index // (job.request.n or 1)]
    return prompt if isinstance(prompt, str) else job.model.tokenizer.decode(prompt)


def text_piece(job: Job, delta: Delta, first: bool) -> dict:
    """Text and log-probs of a delta of a text completion; the first one begins with the prompt if it is echoed."""
    before = echoed(job, delta.choice)
    logprobs = text_logprobs(job, delta.tokens, len(before))
    if first and before and logprobs:
        prompt = text_logprobs(job, delta.choice.prompt_tokens)
        logprobs = {name: prompt[name] + logprobs[name] for name in logprobs}
    return {"text": before * first + delta.text, "logprobs": logprobs}


def complete_choice(job: Job, delta: Delta) -> dict:
    """A complete choice, from its last delta: that of a choice that was not streamed holds everything."""
    if job.chat:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        body = {"message": message, "logprobs": chat_logprobs(job, delta.tokens)}
    else:
        body = text_piece(job, delta, True)
    return {"index": delta.choice.index, "finish_reason": delta.finish} | body | extras(job, delta.choice)


def extras(job: Job, choice: Choice) -> dict:
    ids = {"prompt_token_ids": choice.ids, "token_ids": choice.ids_drawn} if job.request.return_token_ids else {}
    return ids | ({"generation_id": choice.generation_id} if choice.generation_id else {})


def envelope(job: Job, choices: list, chunk: bool = False) -> dict:
    kind = "chat.completion" + ".chunk" * chunk if job.chat else "text_completion"
    return {"id": job.id, "object": kind, "created": job.created, "model": job.model.name, "choices": choices}


def chunk_choice(job: Job, delta: Delta, first: bool) -> dict:
    """The text of one delta, as a choice of a streamed chunk; its finish comes in a chunk of its own."""
    if job.chat:
        body = {"delta": {"content": delta.text}, "logprobs": chat_logprobs(job, delta.tokens)}
    else:
        body = text_piece(job, delta, first)
    return {"index": delta.choice.index} | body | {"finish_reason": None}


def frame(body) -> bytes:
    return b"data: " + msgspec.json.encode(body) + b"\n\n"


class Streamed(StreamingResponse):
    """A body as it comes, in server-sent events where no other type is named. What it comes from, with an `aclose`, is
    closed however that ends: the pieces' own `finally` would not run where the client is gone before the first one."""

    def __init__(self, source, pieces, status: int = 200, media_type: str | None = "text/event-stream"):
        super().__init__(pieces, status, {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, media_type)
        self.source = source

    async def __call__(self, scope, receive, send):
        async with contextlib.aclosing(self.source):
            await super().__call__(scope, receive, send)


PING_SECONDS = 10.0
PING = b": ping\n\n"  # keeps proxies from giving up


async def next_deltas(job: Job) -> list[Delta]:
    """What there is to send of a job, at least one delta; nothing if none comes within PING_SECONDS. Under load several
    are sent at once: each write costs."""
    deltas = []
    with contextlib.suppress(TimeoutError):
        deltas.append(await asyncio.wait_for(job.events.get(), PING_SECONDS))
    while not job.events.empty():
        deltas.append(job.events.get_nowait())
    return deltas


def failed(request_id: str) -> str:
    """What a client is told of a failure that is not its fault."""
    return f"the server failed at this request; its log knows more about {request_id}"


async def stream_job(job: Job, server: "Server"):
    """A job as server-sent events."""
    usage = bool(job.request.stream_options and job.request.stream_options.include_usage)
    chunk = lambda choice: frame(envelope(job, [choice], True) | ({"usage": None} if usage else {}))
    begun, open_choices, done = set(), len(job.choices), b"data: [DONE]\n\n"
    try:
        for choice in job.choices if job.chat else ():
            role = {"role": "assistant", "content": ""}
            yield chunk({"index": choice.index, "delta": role, "logprobs": None, "finish_reason": None})
        while open_choices:
            deltas = await next_deltas(job)
            out = b"" if deltas else PING
            for delta in deltas:
                if delta.error:
                    yield out + frame(ApiError(500, delta.error).body) + done
                    return
                first = delta.choice.index not in begun
                begun.add(delta.choice.index)
                if delta.text or delta.tokens or (first and not job.chat and job.request.echo):
                    out += chunk(chunk_choice(job, delta, first))
                if delta.finish:
                    open_choices -= 1
                    await server.log_generation(job, delta.choice)
                    end = {"delta": {}} if job.chat else {"text": ""}
                    end |= {"logprobs": None, "finish_reason": delta.finish} | extras(job, delta.choice)
                    out += chunk({"index": delta.choice.index} | end)
            if out:
                yield out
        yield (frame(envelope(job, [], True) | {"usage": job.usage()}) if usage else b"") + done
    except Exception:  # the answer could not be stored, say: the client is told within the stream that has begun
        LOG.exception("request %s failed", job.request_id)
        yield frame(ApiError(500, failed(job.request_id)).body)
        yield done


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat that a request to the Responses API is."""
    refuse_unsupported(request, NEUTRAL_RESPONSES)
    items = [ResponseItem("user", request.input)] if isinstance(request.input, str) else request.input
    text = lambda content: content if isinstance(content, str) else "".join(part.text for part in content)
    messages = [Message(item.role, text(item.content)) for item in items]
    if request.instructions:
        messages.insert(0, Message("system", request.instructions))
    names = "model temperature top_p presence_penalty frequency_penalty stream store metadata"
    same = {name: getattr(request, name) for name in names.split()}
    return ChatRequest(messages=messages, max_completion_tokens=request.max_output_tokens, **same)


STATUSES = {"stop": "completed", "length": "incomplete", "abort": "incomplete", None: "in_progress"}
REASONS = {"length": "max_output_tokens", "abort": "deadline"}  # of an incomplete response


def response_message(job: Job, text: str, finish: str | None) -> dict:
    part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    message = {"type": "message", "id": "msg_" + job.id, "role": "assistant", "content": [part]}
    known = extras(job, job.choices[0]) if finish else {}  # a client learns its id when it can be voted on
    return message | {"status": STATUSES[finish]} | known


def response_body(job: Job, text: str = "", finish: str | None = None) -> dict:
    """The answer as the Responses API has it: a response with one message; without a `finish` it is still written."""
    status, request, usage = STATUSES[finish], job.request, job.usage()
    counted = dict(
        input_tokens=usage["prompt_tokens"], input_tokens_details=usage["prompt_tokens_details"],
        output_tokens=usage["completion_tokens"], output_tokens_details={"reasoning_tokens": 0},
        total_tokens=usage["total_tokens"],
    )  # fmt: skip
    return dict(
        id="resp_" + job.id, object="response", created_at=job.created, model=job.model.name, status=status,
        output=[response_message(job, text, finish)] if finish else [], usage=counted if finish else None, error=None,
        incomplete_details={"reason": REASONS[finish]} if finish in REASONS else None,
        instructions=None, metadata=request.metadata or {}, temperature=job.choices[0].temperature,
        top_p=job.choices[0].top_p, max_output_tokens=request.max_completion_tokens, parallel_tool_calls=False,
        tool_choice="none", tools=[], text={"format": {"type": "text"}}, truncation="disabled",
        previous_response_id=None, background=False,
    )  # fmt: skip


async def stream_response(job: Job, server: "Server"):
    """A job as the events of the Responses API."""
    numbers, choice = itertools.count(), job.choices[0]
    at = {"item_id": "msg_" + job.id, "output_index": 0, "content_index": 0}

    def event(kind, **more):
        return f"event: {kind}\n".encode() + frame({"type": kind, "sequence_number": next(numbers)} | more)

    try:
        body, message = response_body(job), response_message(job, "", None)
        yield event("response.created", response=body) + event("response.in_progress", response=body)
        yield event("response.output_item.added", output_index=0, item=message | {"content": []})
        yield event("response.content_part.added", **at, part=message["content"][0])
        finish = None
        while not finish:
            deltas = await next_deltas(job)
            if not deltas:
                yield PING
            for delta in deltas:
                if delta.error:
                    raise RuntimeError(delta.error)
                if delta.text:
                    yield event("response.output_text.delta", **at, delta=delta.text, logprobs=[])
                finish = delta.finish
        await server.log_generation(job, choice)
        body = response_body(job, choice.text, choice.finish)
        message = body["output"][0]
        yield event("response.output_text.done", **at, text=choice.text, logprobs=[])
        yield event("response.content_part.done", **at, part=message["content"][0])
        yield event("response.output_item.done", output_index=0, item=message)
        yield event(f"response.{body['status']}", response=body)
    except Exception:
        LOG.exception("request %s failed", job.request_id)
        error = {"code": "server_error", "message": failed(job.request_id)}
        yield event("response.failed", response=response_body(job) | {"status": "failed", "error": error})


async def last_deltas(job: Job) -> list[Delta]:
    """The last deltas of all choices, in their order."""
    ends = []
    while len(ends) < len(job.choices):
        delta = await job.events.get()
        if delta.error:
            raise ApiError(503 if "waited" in delta.error else 500, delta.error, Retry_After="5")
        ends.append(delta)
    return sorted(ends, key=lambda delta: delta.choice.index)


async def unless_gone(request: Request, work):
    """What `work` returns; ClientDisconnect where the client hangs up first."""
    work, hangup = asyncio.ensure_future(work), asyncio.ensure_future(gone(request))
    try:
        await asyncio.wait({work, hangup}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        hangup.cancel()


async def gone(request: Request):
    """Returns when the client has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ------------------------------------------------------------------------------------------------------------ votes
#
# feedback.db holds what was asked and said (generation) and what people thought of it (feedback). Two views say what is
# to be learnt from that: the page's counter, /v1/feedback/export and prepare.py read nothing else.

TABLES = """
CREATE TABLE IF NOT EXISTS generation(id TEXT PRIMARY KEY, created_at TEXT NOT NULL, request_id TEXT, session_id TEXT,
  parent_id TEXT, prompt_messages TEXT NOT NULL CHECK(json_valid(prompt_messages)), completion TEXT NOT NULL,
  completion_token_ids TEXT, logprob_sum REAL, finish_reason TEXT, model_id TEXT NOT NULL,
  checkpoint_sha256 TEXT NOT NULL, code_version TEXT, quantization TEXT, chat_template_sha256 TEXT,
  tokenizer_sha256 TEXT, sampling TEXT NOT NULL CHECK(json_valid(sampling)), usage TEXT) STRICT;
CREATE TABLE IF NOT EXISTS feedback(id TEXT PRIMARY KEY, created_at TEXT NOT NULL, schema_version INT NOT NULL,
  kind TEXT NOT NULL CHECK(kind IN ('thumb', 'pair', 'edit')), generation_a TEXT NOT NULL REFERENCES generation(id),
  generation_b TEXT REFERENCES generation(id), shown_left TEXT,
  value TEXT NOT NULL CHECK(value IN ('up', 'down', 'a', 'b', 'tie', 'both_bad', 'edited')), edited_text TEXT,
  reasons TEXT, comment TEXT, annotator_id TEXT NOT NULL, annotator_kind TEXT NOT NULL DEFAULT 'human',
  consent INT NOT NULL, latency_ms INT, ui_version TEXT, superseded_by TEXT REFERENCES feedback(id),
  CHECK((kind = 'pair') = (generation_b IS NOT NULL))) STRICT;
CREATE UNIQUE INDEX IF NOT EXISTS one_live_vote
  ON feedback(kind, generation_a, COALESCE(generation_b, ''), annotator_id) WHERE superseded_by IS NULL;
CREATE INDEX IF NOT EXISTS of_session ON generation(session_id);
CREATE INDEX IF NOT EXISTS of_generation_a ON feedback(generation_a);
CREATE INDEX IF NOT EXISTS of_generation_b ON feedback(generation_b);
"""

BLANKS = ", ".join(str(code) for code in range(0x3001) if chr(code).isspace())  # what str.strip() takes away
AS_ANSWER = (  # in JSON: to a chat a message, of a text its continuation
    "iif(json_type(prompt_messages) = 'array', json_array(json_object('role', 'assistant', 'content', {0})), "
    "json_quote({0}))"
)
# votes: one row for each vote whose giver lets us use it, with the texts that it is about (completion_b of an edit is
# the edited text) and `dropped`, the reason why it teaches nothing, or NULL. `cut_a` and `cut_b`: the answer was ended
# by its limit (finish length), not by the model.
#
# training_rows: what each vote teaches, `row` in JSON, of `kind` pairs or thumbs. Of a pair the side a or b is chosen;
# an edit is chosen over the original; both_bad is two thumbs down (number 1 and 2). A dropped vote has one row. Answers
# that were cut are named in the row's `truncated`, so that no end token is learnt where the model wrote none. Each vote
# has rows of its own: nine votes against one are nine rows against one.
VIEWS = f"""
BEGIN IMMEDIATE;
DROP VIEW IF EXISTS training_rows;
DROP VIEW IF EXISTS votes;

CREATE VIEW votes AS
SELECT *, CASE
    WHEN superseded_by IS NOT NULL THEN 'changed later'
    WHEN value = 'tie' THEN 'a tie'
    WHEN ifnull(finish_a, 'stop') NOT IN ('stop', 'length') OR ifnull(finish_b, 'stop') NOT IN ('stop', 'length')
      THEN 'an answer was broken off'
    WHEN trim(completion_a, char({BLANKS})) = '' OR trim(completion_b, char({BLANKS})) = '' THEN 'an empty answer'
    WHEN completion_a = completion_b THEN 'equal answers'
    WHEN json_type(prompt_messages, '$[0]') = 'integer' THEN 'a prompt of token ids'
  END AS dropped
FROM (
  SELECT f.*, a.prompt_messages, a.completion AS completion_a, a.finish_reason AS finish_a, a.model_id AS model_a,
    a.checkpoint_sha256 AS checkpoint_a, ifnull(a.finish_reason = 'length', 0) AS cut_a,
    ifnull(b.finish_reason = 'length', 0) AS cut_b,
    iif(f.value = 'edited', ifnull(f.edited_text, ''), b.completion) AS completion_b, b.finish_reason AS finish_b,
    b.model_id AS model_b, b.checkpoint_sha256 AS checkpoint_b
  FROM feedback f JOIN generation a ON a.id = f.generation_a LEFT JOIN generation b ON b.id = f.generation_b
  WHERE f.consent = 1);

CREATE VIEW training_rows AS
WITH answers AS (
  SELECT *, {AS_ANSWER.format("completion_a")} AS answer_a, {AS_ANSWER.format("completion_b")} AS answer_b FROM votes),
taught AS (
SELECT id, created_at, 1 AS number, dropped, 'pairs' AS kind, json_object('prompt', json(prompt_messages), 'id', id,
    'chosen', json(iif(value = 'a', answer_a, answer_b)),
    'rejected', json(iif(value = 'a', answer_b, answer_a))) AS row,
    CASE WHEN cut_a AND cut_b THEN '["chosen", "rejected"]' WHEN iif(value = 'a', cut_a, cut_b) THEN '["chosen"]'
      WHEN cut_a OR cut_b THEN '["rejected"]' END AS cut
  FROM answers WHERE value IN ('a', 'b', 'tie', 'edited')
UNION ALL
SELECT id, created_at, 1, dropped, 'thumbs', json_object('prompt', json(prompt_messages), 'id', id,
    'completion', json(answer_a), 'label', json(iif(value = 'up', 'true', 'false'))), iif(cut_a, '["completion"]', NULL)
  FROM answers WHERE value IN ('up', 'down', 'both_bad')
UNION ALL
SELECT id, created_at, 2, dropped, 'thumbs', json_object('prompt', json(prompt_messages), 'id', id,
    'completion', json(answer_b), 'label', json('false')), iif(cut_b, '["completion"]', NULL)
  FROM answers WHERE value = 'both_bad' AND dropped IS NULL)
SELECT id, created_at, number, dropped, kind, iif(cut IS NULL, row, json_set(row, '$.truncated', json(cut))) AS row
  FROM taught;
COMMIT;
"""


def open_votes(path) -> sqlite3.Connection:
    """feedback.db, made where there is none, the views of an older one replaced. What was committed to it survives a
    kill and a crash. People's words: only the owner of the process may read it."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ValueError(f"votes cannot be kept in {path} (--feedback): {error.strerror}") from None
    connection = sqlite3.connect(path, timeout=30, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        for pragma in ("foreign_keys = on", "journal_mode = WAL", "synchronous = FULL", "secure_delete = on"):
            connection.execute(f"PRAGMA {pragma}")
        connection.executescript(TABLES + VIEWS)
        connection.execute("SELECT * FROM training_rows LIMIT 1")
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path} is not a database of votes ({error})") from None
    return connection


class Store:
    """feedback.db behind a thread of its own. All functions that wait run in one transaction, and are answered when it
    is on disk: one flush for many votes. Each has a savepoint, so that one that fails undoes itself alone."""

    def __init__(self, path: Path):
        self.path, self.work = path, queue.SimpleQueue()
        open_votes(path).close()  # finds an unusable file before anything else starts
        self.thread = threading.Thread(target=self.run, name="votes", daemon=True)
        self.thread.start()

    async def do(self, function, *args):
        """function(connection, *args) in the thread; its result, or its exception."""
        future = asyncio.get_running_loop().create_future()
        self.work.put((function, args, future))
        return await future

    def run(self):
        connection = open_votes(self.path)
        while batch := [self.work.get()]:
            with contextlib.suppress(queue.Empty):
                while len(batch) < 128 and batch[-1]:
                    batch.append(self.work.get_nowait())
            results = self.transact(connection, [item for item in batch if item])
            for (_, _, future), result in zip(batch, results):
                with contextlib.suppress(RuntimeError):  # the loop is closed already
                    future.get_loop().call_soon_threadsafe(settle, future, result)
            if batch[-1] is None:
                connection.close()
                return

    def transact(self, connection, items) -> list:
        results = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for function, args, _ in items:
                connection.execute("SAVEPOINT one")
                try:
                    results.append(function(connection, *args))
                except Exception as error:
                    connection.execute("ROLLBACK TO one")
                    results.append(error)
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except sqlite3.Error as error:  # the disk is full, say: nothing of this is kept
            LOG.exception("votes could not be written")
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            return [error] * len(items)
        return results

    def close(self):
        self.work.put(None)
        self.thread.join(10)


def settle(future: asyncio.Future, result):
    if future.cancelled():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")


def insert(connection, table: str, values: dict):
    """Add a row. Names of table and columns come from this file alone; values are never part of the statement."""
    places = ", ".join(f":{name}" for name in values)
    connection.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({places})", values)


def generation_row(job: Job, choice: Choice, request_id: str) -> dict:
    model, metadata = job.model, job.request.metadata or {}
    names = (*SAMPLING, "seed", "number", "limit", "stops", "endless")
    usage = {"prompt_tokens": len(choice.ids), "completion_tokens": len(choice.ids_drawn)}
    return dict(
        id=choice.generation_id, created_at=now(), request_id=request_id,
        session_id=metadata.get("session_id"), parent_id=metadata.get("parent_id"),
        prompt_messages=json.dumps(job.prompts[choice.index // (job.request.n or 1)]),
        completion=choice.text, completion_token_ids=json.dumps(choice.ids_drawn),
        logprob_sum=choice.logprob_sum, finish_reason=choice.finish,
        model_id=model.name, checkpoint_sha256=model.checkpoint, code_version=model.code,
        quantization=model.quantization, chat_template_sha256=model.template_hash,
        tokenizer_sha256=model.tokenizer_hash,
        sampling=json.dumps({name: getattr(choice, name) for name in names}), usage=json.dumps(usage),
    )  # fmt: skip


def add_vote(connection, vote: FeedbackRequest, held: list[dict] = ()) -> dict:
    """Store a vote, and the rows `held` of answers that were kept in memory until now. An earlier vote of the same
    person on the same answers stays, marked as superseded by it. A vote that would teach nothing is refused: the view
    `votes` says why. A tie is none, but it is an answer to the question."""
    for row in held:
        if not connection.execute("SELECT 1 FROM generation WHERE id = ?", (row["id"],)).fetchone():
            insert(connection, "generation", row)
    found = {}
    for name in ("generation_a", "generation_b"):
        wanted = getattr(vote, name)
        row = connection.execute("SELECT prompt_messages FROM generation WHERE id = ?", (wanted,)).fetchone()
        if wanted and row is None:
            raise ApiError(404, f"there is no generation {wanted!r}", name, "generation_not_found")
        found[name] = row and row["prompt_messages"]
    if vote.kind == "pair" and found["generation_a"] != found["generation_b"]:
        raise ApiError(400, "the two generations answer different prompts", "generation_b")
    live = connection.execute(
        "SELECT id FROM feedback WHERE kind = ? AND generation_a = ? AND COALESCE(generation_b, '') = ? "
        "AND annotator_id = ? AND superseded_by IS NULL",
        (vote.kind, vote.generation_a, vote.generation_b or "", vote.annotator_id),
    ).fetchone()
    row = msgspec.structs.asdict(vote) | dict(id=uuid.uuid4().hex, created_at=now(), schema_version=1)
    row |= dict(reasons=json.dumps(vote.reasons), consent=int(vote.consent))
    connection.execute("PRAGMA defer_foreign_keys = on")  # the old vote names the new one before it is there
    if live:
        connection.execute("UPDATE feedback SET superseded_by = ? WHERE id = ?", (row["id"], live["id"]))
    insert(connection, "feedback", row)
    read = connection.execute("SELECT dropped, completion_a, completion_b FROM votes WHERE id = ?", (row["id"],))
    for dropped, a, b in read:
        if dropped is None and b is not None and a.split() == b.split():
            dropped = "equal answers"
        if dropped not in (None, "a tie"):
            raise ApiError(400, f"not stored, since this vote would teach nothing: {dropped}", code="teaches_nothing")
    return {"id": row["id"], "superseded": live and live["id"]}


def check_vote(vote: FeedbackRequest):
    allowed = dict(thumb=("up", "down"), pair=("a", "b", "tie", "both_bad"), edit=("edited",))[vote.kind]
    if vote.value not in allowed:
        raise ApiError(400, f"the value of a {vote.kind} is one of {', '.join(allowed)}", "value")
    if (vote.kind == "pair") != (vote.generation_b is not None):
        raise ApiError(400, "a pair, and nothing else, has a generation_b", "generation_b")
    if vote.generation_a == vote.generation_b:
        raise ApiError(400, "a pair needs two generations", "generation_b")
    if (vote.kind == "edit") != bool(vote.edited_text and vote.edited_text.strip()):
        raise ApiError(400, "an edit, and nothing else, has an edited_text", "edited_text")


def remove_vote(connection, vote_id: str) -> dict:
    """Undo a vote: delete it and those that it superseded."""
    ids, chain = [], [vote_id]
    while chain:
        chain = [row["id"] for row in connection.execute(
            f"SELECT id FROM feedback WHERE {'superseded_by' if ids else 'id'} = ?", (chain[0],)
        )]  # fmt: skip
        ids += chain
    if not ids:
        raise ApiError(404, "there is no such vote", "id", "feedback_not_found")
    connection.execute("PRAGMA defer_foreign_keys = on")
    # a vote that superseded this one stays
    connection.executemany("DELETE FROM feedback WHERE id = ?", [(i,) for i in ids])
    return {"id": vote_id, "deleted": True}


def purge_session(connection, session_id: str) -> dict:
    """Delete what a session asked and was answered, and every vote about it."""
    mine = "(SELECT id FROM generation WHERE session_id = ?)"
    connection.execute("PRAGMA defer_foreign_keys = on")
    votes = connection.execute(
        f"DELETE FROM feedback WHERE generation_a IN {mine} OR generation_b IN {mine}", (session_id, session_id)
    )
    generations = connection.execute("DELETE FROM generation WHERE session_id = ?", (session_id,))
    return {"session_id": session_id, "generations": generations.rowcount, "feedback": votes.rowcount}


def count_votes(connection) -> dict:
    """What there is to learn: training rows from blind pairs, from corrections (edits) and from single answers
    (thumbs; `both_bad` is two); how many votes teach nothing, for each reason; the tokens of the longest of these rows,
    or 0 where another engine has not counted them; the longest corrected text; which model most rows are about."""
    query = """SELECT f.kind AS vote, t.kind, t.dropped, count(*) AS number FROM training_rows t
        JOIN feedback f ON f.id = t.id WHERE t.dropped IS NULL OR t.dropped <> 'changed later' GROUP BY 1, 2, 3"""
    rows, dropped = Counter(), Counter()
    for vote, kind, reason, number in connection.execute(query):
        if reason:
            dropped[reason] += number
        else:
            rows["edits" if vote == "edit" else kind] += number
    query = """SELECT iif(count(usage) = count(*),
          max(json_extract(usage, '$.prompt_tokens') + json_extract(usage, '$.completion_tokens')), NULL) AS tokens
        FROM generation WHERE id IN (SELECT generation_a FROM votes WHERE dropped IS NULL
        UNION ALL SELECT generation_b FROM votes WHERE dropped IS NULL)"""
    (tokens,) = connection.execute(query).fetchone()
    query = "SELECT model_a FROM votes WHERE dropped IS NULL GROUP BY 1 ORDER BY count(*) DESC, 1 LIMIT 1"
    (model,) = connection.execute(query).fetchone() or (None,)
    query = "SELECT edited_text FROM votes WHERE kind = 'edit' AND dropped IS NULL ORDER BY length(edited_text) DESC"
    (edit,) = connection.execute(query + " LIMIT 1").fetchone() or ("",)
    counts = {name: rows[name] for name in ("pairs", "edits", "thumbs")}
    return counts | {"dropped": dict(dropped), "tokens": tokens or 0, "edit": edit, "model": model}


def export_votes(connection, kind: str | None, since="", model="", checkpoint="") -> list[dict]:
    """Training rows of a kind, pairs or thumbs; without one every vote as it is, also those that teach nothing. Oldest
    first. `since` is the beginning of an ISO time; `model` and `checkpoint` want one of the two sides."""
    wanted = dict(kind=kind, since=since, model=model, checkpoint=checkpoint)
    votes = (
        "FROM votes WHERE created_at >= :since AND (:model = '' OR :model IN (model_a, model_b)) "
        "AND (:checkpoint = '' OR :checkpoint IN (checkpoint_a, checkpoint_b))"
    )
    if kind is None:
        return [dict(row) for row in connection.execute(f"SELECT * {votes} ORDER BY created_at, id", wanted)]
    query = (
        f"SELECT row FROM training_rows WHERE kind = :kind AND dropped IS NULL AND id IN (SELECT id {votes}) "
        "ORDER BY created_at, id, number"
    )
    return [json.loads(row["row"]) for row in connection.execute(query, wanted)]


# ------------------------------------------------------------------------------------------------------ the server


HELD = 256  # answers in memory that wait for a vote


class Server:
    """The routes, and what they share: the engine, its models by name, the votes."""

    def __init__(self, config: Config, store: Store):
        self.config, self.store = config, store
        names = zip(model_names(config.folders), config.folders)
        self.models = {name: Served(name, folder, config) for name, folder in names}
        self.engine = Engine(list(self.models.values()), config)
        self.held = collections.OrderedDict()  # rows of `generation` by their id, see `log_generation`
        self.draining = False
        self.on_ready, self.on_failure = lambda: None, lambda loading: None  # of the engine

    def app(self) -> Starlette:
        also_v1 = lambda path, *args, **kwargs: [Route(prefix + path, *args, **kwargs) for prefix in ("", "/v1")]
        routes = [
            Route("/", self.page),
            *also_v1("/health", self.health),
            *also_v1("/models", self.list_models),
            Route("/v1/models/{model:path}", self.show_model),
            Route("/metrics", self.metrics),
            Route("/v1/completions", partial(self.complete, kind=CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", partial(self.complete, kind=ChatRequest), methods=["POST"]),
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/markdown", self.markdown, methods=["POST"]),
            *also_v1("/tokenizer_info", self.tokenizer_info),
            *also_v1("/tokenize", self.tokenize, methods=["POST"]),
            *also_v1("/detokenize", self.detokenize, methods=["POST"]),
            Route("/v1/feedback", self.vote, methods=["POST"]),
            Route("/v1/feedback/counts", self.counts),
            Route("/v1/feedback/export", self.export),
            Route("/v1/feedback/{vote}", self.undo, methods=["DELETE"]),
            Route("/v1/sessions/{session}", self.purge, methods=["DELETE"]),
        ]

        async def refuse(request, error):  # async, or Starlette would call it in a thread
            error = error if isinstance(error, ApiError) else ApiError(error.status_code, error.detail)
            return error.response()

        handlers = dict.fromkeys((ApiError, HTTPException), refuse)
        middleware = [Middleware(Guard, config=self.config)]
        if self.config.cors_origin:
            cors = dict(allow_origins=self.config.cors_origin, allow_methods=["*"], allow_headers=["*"])
            middleware.insert(0, Middleware(CORSMiddleware, **cors))
        return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers, lifespan=self.lifespan)

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        self.engine.start(asyncio.get_running_loop(), self.on_ready, self.on_failure)
        await run_in_threadpool(
            int
        )  # imports what streams run on, or the first one would keep everyone waiting for that
        yield
        self.engine.stop()
        self.store.close()

    # models ----------------------------------------------------------------------------------------------------------

    def need_engine(self):
        if self.engine.failure:
            raise ApiError(503, "the engine has stopped", code="engine_dead")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", Retry_After="10")
        if not self.engine.ready:
            raise ApiError(503, "Loading model", code="loading", Retry_After="2")

    def find_model(self, name: str | None) -> Served:
        self.need_engine()
        if name in (None, "", "default"):
            return next(iter(self.models.values()))
        if name not in self.models:
            raise ApiError(404, f"no model {name!r} here, but: {', '.join(self.models)}", "model", "model_not_found")
        return self.models[name]

    async def health(self, request):
        self.need_engine()
        return reply({"status": "ok"})

    async def list_models(self, request):
        self.need_engine()
        return reply({"object": "list", "data": [describe(model) for model in self.models.values()]})

    async def show_model(self, request):
        return reply(describe(self.find_model(request.path_params["model"])))

    async def metrics(self, request):
        lines = [line for model in self.models.values() for line in metric_lines(model)]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    # completions -----------------------------------------------------------------------------------------------------

    async def complete(self, request: Request, kind):
        self.need_engine()
        body = await read_body(request, kind)
        job = self.submit(body, request)
        if body.stream:
            return Streamed(job, stream_job(job, self))
        deltas = await self.wait_for(job, request)
        return reply(envelope(job, [complete_choice(job, delta) for delta in deltas]) | {"usage": job.usage()})

    def submit(self, body: Sampling, request: Request) -> Job:
        """Give the engine a job, or refuse it."""
        model = self.find_model(body.model)
        job = make_job(body, model, self.config)
        job.request_id = request.state.request_id
        if not self.engine.submit(model, job.choices):
            raise ApiError(429, "the queue is full: try again later", code="queue_full", Retry_After="1")
        return job

    async def responses(self, request):
        self.need_engine()
        body = as_chat(await read_body(request, ResponsesRequest))
        job = self.submit(body, request)
        if body.stream:
            return Streamed(job, stream_response(job, self))
        (delta,) = await self.wait_for(job, request)
        return reply(response_body(job, delta.text, delta.finish))

    async def wait_for(self, job: Job, request: Request) -> list[Delta]:
        """The last deltas of all choices, stored if that is wanted, unless the client hangs up first."""
        async with contextlib.aclosing(job):
            deltas = await unless_gone(request, last_deltas(job))
            for delta in deltas:
                await self.log_generation(job, delta.choice)
        return deltas

    async def log_generation(self, job: Job, choice: Choice):
        if choice.generation_id:
            await self.keep(generation_row(job, choice, job.request_id), job.request.store)

    async def keep(self, row: dict, store):
        """Store an answer that may be voted on; awaited before the client learns the id. With store "on_vote" it stays
        in memory, where the next HELD answers push it out, until a vote on it comes with its giver's consent."""
        if store is True:
            return await self.store.do(insert, "generation", row)
        self.held[row["id"]] = row
        while len(self.held) > HELD:
            self.held.popitem(last=False)

    # tokens ----------------------------------------------------------------------------------------------------------

    async def tokenizer_info(self, request):
        tokenizer = self.find_model(request.query_params.get("model")).tokenizer
        name = lambda i: next((text for text, j in tokenizer.specials.items() if j == i), None)
        names = dict(
            eos_token=name(tokenizer.eos_id), bos_token=name(tokenizer.bos_id), pad_token=name(tokenizer.pad_id)
        )
        return reply(names | {"chat_template": tokenizer.template})

    async def tokenize(self, request):
        body = await read_body(request, TokenizeRequest)
        model = self.find_model(body.model)
        messages = chat_messages(body.messages or [])
        check_chars(model, len(body.prompt or "") + sum(len(m["content"]) for m in messages))
        if messages:
            ids = chat_ids(messages, set_template(model.tokenizer, model.name, body.chat_template_kwargs or {}))
        elif body.prompt is not None:
            ids = text_ids(body.prompt, model.tokenizer, bos=body.add_special_tokens)
        else:
            raise ApiError(400, "give a prompt or messages", "prompt")
        return reply({"tokens": ids, "count": len(ids), "max_model_len": model.context})

    async def detokenize(self, request):
        body = await read_body(request, DetokenizeRequest)
        model = self.find_model(body.model)
        if max(body.tokens, default=0) >= model.tokenizer.vocab_size:
            raise ApiError(400, "a token is not within the vocabulary", "tokens")
        return reply({"prompt": model.tokenizer.decode(body.tokens)})

    # votes -----------------------------------------------------------------------------------------------------------

    async def vote(self, request):
        vote = await read_body(request, FeedbackRequest)
        check_vote(vote)
        ids = (vote.generation_a, vote.generation_b)
        held = [self.held[name] for name in ids if name in self.held] if vote.consent else []
        answer = await self.store.do(add_vote, vote, held)
        for row in held:
            self.held.pop(row["id"], None)
        return reply(answer, 201)

    async def undo(self, request):
        return reply(await self.store.do(remove_vote, request.path_params["vote"]))

    async def purge(self, request):
        session = request.path_params["session"]
        for name in [name for name, row in self.held.items() if row["session_id"] == session]:
            del self.held[name]
        return reply(await self.store.do(purge_session, session))

    async def counts(self, request):
        counts = await self.store.do(count_votes)
        about = {name: counts.pop(name) for name in ("tokens", "edit", "model")}
        if not self.engine.ready or not any(counts[name] for name in ("pairs", "edits", "thumbs")):
            return reply(counts)
        if learner := self.learner(about["model"]):
            return reply(counts | training_commands(counts, about, learner, self.config))
        hint = "What to train is not known here: start serve.py --upstream with --model FOLDER, the model's folder."
        return reply(counts | {"hint": hint})

    def learner(self, name: str | None) -> "Learner":
        """What a command that trains on votes about this model has to know of it."""
        model = self.models.get(name) or next(iter(self.models.values()))
        size = gpt.count_parameters(model.weights)
        return Learner(model.path, size, model.model_config.context, model.tokenizer)

    async def export(self, request):
        query = request.query_params
        kinds = {"trl-preference": "pairs", "trl-unpaired": "thumbs", "raw": None}
        if query.get("format", "raw") not in kinds:
            raise ApiError(400, f"format is one of {', '.join(kinds)}", "format")
        wanted = (query.get(name, "") for name in ("since", "model", "checkpoint"))
        rows = await self.store.do(export_votes, kinds[query.get("format", "raw")], *wanted)
        lines = b"".join(msgspec.json.encode(row) + b"\n" for row in rows)
        digest = hashlib.sha256(lines).hexdigest()
        LOG.info("exported %d rows, sha256 %s", len(rows), digest)
        return Response(lines, 200, {"X-Rows": str(len(rows)), "X-SHA256": digest}, "application/jsonl")

    # page ------------------------------------------------------------------------------------------------------------

    async def markdown(self, request):
        """Answers as trees of Markdown, for the page alone."""
        body = await read_body(request, MarkdownRequest)
        if sum(map(len, body.texts)) > MOST_MARKDOWN:
            raise ApiError(413, f"these texts have more than {MOST_MARKDOWN:,} characters", "texts")
        trees = await asyncio.to_thread(lambda: [markdown_tree(text) for text in body.texts])
        return reply({"trees": trees})

    async def page(self, request):
        """The chat page: only its own script and style run, and it talks to this server alone."""
        path = HERE / "ui.html"
        if not self.config.ui or not path.is_file():
            hint = "--no-ui" if path.is_file() else "ui.html is not beside serve.py"
            return Response(f"no page here ({hint}); the API is under /v1", 404, media_type="text/plain")
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        html = path.read_text(encoding="utf-8").replace('nonce="NONCE"', f'nonce="{nonce}"')
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return Response(html, 200, headers, "text/html")


# HTML is text, images are links to click on, and links lead to the web alone
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable("image")
MARKDOWN.validateLink = re.compile("(https?|mailto):", re.I).match
MOST_MARKDOWN = 2**17  # characters in a request
MOST_NESTED = 40  # elements, each within the one before


def markdown_tree(text: str) -> list:
    """Markdown as strings and lists [tag, attributes, child, ...]. The page makes elements of a few known tags and text
    nodes of the strings: what a model writes never becomes markup of its own."""
    tree = []
    stack = [tree]
    for block in MARKDOWN.parse(text):
        for token in block.children if block.type == "inline" else [block]:
            if token.hidden:  # the paragraphs of a tight list
                continue
            if token.nesting < 0:
                stack.pop()
            elif token.nesting > 0 and len(stack) < MOST_NESTED:
                stack[-1].append([token.tag, markdown_attributes(token)])
                stack.append(stack[-1][-1])
            elif token.nesting > 0:  # no deeper: what is inside belongs to what is around it
                stack.append(stack[-1])
            elif token.type in ("fence", "code_block"):
                stack[-1].append(["pre", {}, token.content])
            elif token.type == "softbreak":
                stack[-1].append("\n")
            else:  # text, code, a rule, a line's end
                stack[-1].append([token.tag, {}, token.content] if token.tag else token.content)
    return tree


def markdown_attributes(token) -> dict:
    """Where a link leads, where a list begins, how a column is aligned."""
    kept = {name: token.attrs[name] for name in ("href", "start") if name in token.attrs}
    align = str(token.attrs.get("style", "")).removeprefix("text-align:")
    return kept | ({"class": align} if align else {})


SMALL = 10**7  # parameters, below which a model takes the toy world's rates
LEAST_STEPS = 24  # of a run on few votes: 10 of warm-up, and some at the full rate
FEW_ROWS = 100  # below which no row is held out: a handful measures nothing


class Learner(NamedTuple):
    """A model to train on votes."""

    path: str
    parameters: int
    context: int
    tokenizer: gpt.Tokenizer


def training_commands(counts: dict, about: dict, model: Learner, config: Config) -> dict:
    """{command, serve}: what trains on these votes, with lengths and rates of this model, and what then serves the
    result beside it. Few rows are taken in small batches, several times, so that they move the model."""
    pairs, thumbs = counts["pairs"] + counts["edits"], counts["thumbs"]
    rows = pairs if 2 * pairs >= thumbs else thumbs
    batch = min(32, max(2, rows // 4), rows)
    batch = -(-batch // jax.device_count()) * jax.device_count()
    length = min(1024, model.context)  # where nobody has counted the tokens
    if about["tokens"]:
        # a bound: the prompt of the longest correction is no longer than the longest row
        tokens = about["tokens"] + len(model.tokenizer.encode(about["edit"]))
        length = min(-(-(tokens + 8) // 16) * 16, model.context)
    small = model.parameters < SMALL
    quote = lambda value: shlex.quote(str(value))
    names = itertools.chain([f"votes-{rows}"], (f"votes-{rows}-{k}" for k in itertools.count(2)))
    name = next(name for name in names if not Path("out", name).exists())  # no run is overwritten
    data = f"data/votes-{rows}"
    script = (
        f"dpo.py --data {data}/pairs.jsonl" if rows == pairs else f"ipo_kto.py --loss kto --data {data}/thumbs.jsonl"
    )
    prepare = f"prepare.py --data {quote(config.feedback)} --out {data}{' --heldout 0' * (rows < FEW_ROWS)} --overwrite"
    rates = "--lr 3e-4 --beta 0.5" if small else "--lr 1e-5 --beta 0.1"
    train = f"{script} --init {quote(model.path)} --out out/{name} --length {length} {rates}"
    train += f" --batch-size {batch} --steps {max(LEAST_STEPS, -(-rows // batch))}"
    serve = f"python serve.py --model {quote(model.path)} out/{name} --feedback {quote(config.feedback)}"
    if config.upstream:
        serve = f"vllm serve out/{name} --port 8001    # or the engine that you have; then\npython serve.py --upstream "
        serve += f"http://localhost:8001 --model out/{name} --feedback {quote(config.feedback)}"
    return {"command": f"python {prepare} && python {train}", "serve": serve}


def model_names(folders: list[str]) -> list[str]:
    """The folders' names; with their parents' names before them where two are alike."""
    paths = [Path(folder).absolute().parts for folder in folders]
    for depth in (1, 2, 3):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"--model {' '.join(folders)}: two of these are the same")


def example_questions(path: str, most: int = 6) -> list[str]:
    """The first few different questions in a file of prompts: of each prompt the last human turn."""
    found = {}
    for _, row in gpt.read_rows(path, "prompts"):
        prompt = row["prompt"]
        text = prompt.rpartition("Human:")[2] if isinstance(prompt, str) else prompt[-1]["content"]
        found[text.strip().removesuffix("Assistant:").strip()] = None
        if len(found) == most:
            break
    return list(found)


def describe(model: Served) -> dict:
    about = {"id": model.name, "object": "model", "created": model.created, "owned_by": "local"}
    return about | {
        "max_model_len": model.context,
        "checkpoint_sha256": model.checkpoint,
        "quantization": model.quantization,
        "sampling": SAMPLING | model.sampling,
        "examples": model.examples,
    }


def metric_lines(model: Served):
    """The model's metrics in Prometheus's format, under vLLM's names, so that its dashboards read them."""
    escaped = model.name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    labels = f'model_name="{escaped}"'
    for name, value in (("running", len(model.running)), ("waiting", len(model.waiting))):
        yield f"vllm:num_requests_{name}{{{labels}}} {value}"
    for name in ("prompt", "generation"):
        yield f"vllm:{name}_tokens_total{{{labels}}} {model.counts[name]}"
    for reason, count in model.finished.items():
        yield f'vllm:request_success_total{{{labels},finished_reason="{reason}"}} {count}'
    yield from model.first_token.lines("vllm:time_to_first_token_seconds", labels)
    yield from model.between_tokens.lines("vllm:inter_token_latency_seconds", labels)
    yield from model.request_time.lines("vllm:e2e_request_latency_seconds", labels)


class Guard:
    """What every request passes before any route: checks of the host name, the key and the page it comes from. It also
    logs the request and answers it if an exception reaches it. A plain ASGI wrapper, since Starlette's
    BaseHTTPMiddleware buffers answers and hides disconnects."""

    OPEN = {"/", "/health", "/v1/health"}  # without a key: a browser has to get the page before it can send one
    LOCAL = {"localhost", "127.0.0.1", "::1"}
    HEADERS = (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")

    def __init__(self, app, config: Config):
        self.app, self.config = app, config
        self.hosts = self.LOCAL | {config.host.lower()} | {host.lower() for host in config.allowed_host}

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        request_id = re.sub(r"[^\w.-]", "", headers.get("x-request-id", ""), flags=re.ASCII)[:64] or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        start, status = time.monotonic(), 0

        async def answer(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                more = [(b"x-request-id", request_id.encode()), *self.HEADERS]
                message = message | {"headers": [*message["headers"], *more]}
            await send(message)

        try:
            self.check(scope, headers)
            await self.app(scope, receive, answer)
        except ApiError as error:
            await error.response()(scope, receive, answer)
        except ClientDisconnect:  # nobody is left to answer; the line below says so
            status = status or 499
        except Exception:
            LOG.exception("request %s failed", request_id)
            if status:  # the answer has begun: cut it off
                raise
            await ApiError(500, failed(request_id)).response()(scope, receive, answer)
        finally:
            # what a client wrote into its path must not begin a line of its own
            path = scope["path"].encode("unicode_escape").decode()[:200]
            level = logging.DEBUG if path in self.OPEN or path == "/markdown" else logging.INFO
            took = 1e3 * (time.monotonic() - start)
            LOG.log(level, "%s %s %d %.0f ms %s", scope["method"], path, status, took, request_id)

    def check(self, scope, headers: dict):
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname or "", origin and urlsplit(origin).netloc
        except ValueError:
            raise ApiError(400, "the header Host or Origin is no address") from None
        if name not in self.hosts:  # DNS rebinding: a page's host, this address
            raise ApiError(400, "this server is not called so: --allowed-host adds names", code="host_not_allowed")
        if self.config.api_key and scope["path"] not in self.OPEN:
            given = re.sub("^bearer +", "", headers.get("authorization", ""), flags=re.I) or headers.get(
                "x-api-key", ""
            )
            if not hmac.compare_digest(given.encode(), self.config.api_key.encode()):
                raise ApiError(401, "a valid API key is needed: Authorization: Bearer ...", code="invalid_api_key")
        if scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            site = headers.get("sec-fetch-site", "none")
            own = origin is None and site != "cross-site" or origin is not None and page == host
            if not own and origin not in self.config.cors_origin:
                raise ApiError(
                    403, "this page may not write here: --cors-origin allows pages", code="origin_not_allowed"
                )


# ------------------------------------------------------------------------------------------------------ another engine


@lru_cache
def read_learner(folder: str) -> "Learner":
    """A folder whose weights are not loaded."""
    hf = json.loads(Path(folder, "config.json").read_text())
    parameters = sum(tensor.size for tensor in gpt.read_tensors(Path(folder)).values())
    return Learner(folder, parameters, gpt.config_from_hf(hf, folder).context, gpt.need_tokenizer(folder))


class Relay(Server):
    """The server with --upstream: page, votes and their database are here, the answers come from another engine with
    OpenAI's API. Requests go there as they are, but for `store` and `metadata`, which are about votes. What such an
    engine does not say of an answer (its ids, their log-probs, the weights' hash) is left empty in the database."""

    KNOWN = ("max_model_len", "checkpoint_sha256", "quantization", "sampling")  # of a model, if its engine says it

    def __init__(self, config: Config, store: Store):
        super().__init__(config, store)
        self.url = config.upstream.rstrip("/").removesuffix("/v1")
        key = {"Authorization": f"Bearer {config.upstream_key}"} if config.upstream_key else {}
        timeout = httpx2.Timeout(config.timeout, connect=10.0)
        self.client = httpx2.AsyncClient(
            base_url=self.url, headers=key, timeout=timeout, trust_env=False, limits=httpx2.Limits()
        )
        self.examples = example_questions(config.examples) if config.examples else []

    @contextlib.asynccontextmanager
    async def lifespan(self, app):
        async with self.client, super().lifespan(app):
            yield

    async def ask(self, method: str, path: str, **options) -> httpx2.Response:
        """The engine's answer, whose body is still to be read; ApiError where it gives none or refuses."""
        self.need_engine()
        try:
            request = self.client.build_request(method, path, **options)
            response = await self.client.send(request, stream=True)
            if response.is_success:
                return response
            await response.aread()
        except httpx2.HTTPError as error:
            kind = type(error).__name__
            raise ApiError(502, f"the engine at {self.url} cannot be reached ({kind})", code="upstream_dead") from None
        if response.status_code in (401, 403):  # it is not the client's key that is wrong
            raise ApiError(502, f"the engine at {self.url} wants another key: --upstream-key", code="upstream_key")
        with contextlib.suppress(ValueError, KeyError, TypeError):
            error = response.json()["error"]
            wait = {"Retry_After": response.headers["retry-after"]} if "retry-after" in response.headers else {}
            message, code = str(error["message"]), error.get("code")
            if re.search("context (length|size)", message):  # as the page knows it
                code = "context_length_exceeded"
            raise ApiError(response.status_code, message, error.get("param"), code, **wait)
        status, said = response.status_code, response.text[:300].strip()
        raise ApiError(status if status >= 400 else 502, f"the engine at {self.url} answered {status}: {said}")

    async def read(self, response: httpx2.Response, name: str):
        """What stands under this name in the engine's answer of JSON; also the whole answer."""
        try:
            whole = json.loads(await response.aread())
            return whole[name], whole
        except (httpx2.HTTPError, ValueError, LookupError, TypeError) as error:
            said = f"the engine at {self.url} gave no answer that can be read ({type(error).__name__})"
            raise ApiError(502, said, code="upstream_dead") from None

    async def forward(self, request: Request):
        """The engine's own answer to a request that is not about votes."""
        sent = decode_body(await read_bytes(request), dict) if request.method == "POST" else {}
        if sent.pop("store", None):
            raise ApiError(400, "only chats and completions are stored behind --upstream: leave store out", "store")
        options = {"json": sent} if request.method == "POST" else {}
        asked = self.ask(request.method, request.url.path, params=str(request.url.query), **options)
        response = await unless_gone(request, asked)
        kind = response.headers.get("content-type")
        return Streamed(response, response.aiter_bytes(), response.status_code, kind)

    responses = metrics = tokenizer_info = tokenize = detokenize = forward

    async def health(self, request):
        try:
            await (await self.ask("GET", "/health")).aread()
        except ApiError as error:
            if error.status != 404:
                raise
            await self.served()  # an engine without /health
        return reply({"status": "ok"})

    async def served(self) -> dict[str, dict]:
        """The engine's models by name."""
        found, _ = await self.read(await self.ask("GET", "/v1/models"), "data")
        common = {"object": "model", "owned_by": "upstream", "examples": self.examples}
        models = {}
        for model in found:
            model.setdefault("max_model_len", (model.get("meta") or {}).get("n_ctx"))  # llama.cpp's name for it
            about = {name: model[name] for name in ("created", *self.KNOWN) if model.get(name) is not None}
            models[model["id"]] = {"id": model["id"]} | common | about
        return models

    async def list_models(self, request):
        return reply({"object": "list", "data": list((await self.served()).values())})

    async def show_model(self, request):
        name = request.path_params["model"]
        models = await self.served()
        if name not in models:
            raise ApiError(404, f"no model {name!r} here, but: {', '.join(models)}", "model", "model_not_found")
        return reply(models[name])

    def learner(self, name: str | None) -> "Learner | None":
        """As the server's, of the folder that --model names, or of the model's name where that is a folder here."""
        folders = (*self.config.named_folders, name or "")
        return next((read_learner(folder) for folder in folders if Path(folder, "config.json").is_file()), None)

    async def complete(self, request: Request, kind):
        data = await read_bytes(request)
        sent = decode_body(data, dict)
        store, named = sent.get("store"), sent.get("model")
        body = decode_body(data, kind) if store else None  # what is stored is understood; the rest is the engine's
        models = await self.served() if store or named in (None, "", "default") else {}
        if named in (None, "", "default"):
            sent["model"] = next(iter(models), None)
        if store:
            check_stored(body)
            if getattr(body, "echo", None):
                raise ApiError(400, "an answer with its prompt (echo) is not stored: leave store out", "store")
        for name in ("store", "metadata"):
            sent.pop(name, None)
        response = await unless_gone(request, self.ask("POST", request.url.path, json=sent))
        about = models.get(sent["model"], {"id": sent["model"]})
        row = partial(relayed_row, body, about, request_id=request.state.request_id)
        if sent.get("stream"):
            return Streamed(response, self.stream(response, row, store))
        async with contextlib.aclosing(response):
            choices, answer = await unless_gone(request, self.read(response, "choices"))
        for choice in choices if store else ():
            text = choice["message"]["content"] if kind is ChatRequest else choice["text"]
            await self.keep(stored := row(choice, text, answer.get("usage")), store)
            choice["generation_id"] = stored["id"]
        return reply(answer)

    async def stream(self, response: httpx2.Response, row, store):
        """The engine's events. An answer's last one waits for the usage that follows it, if it is to be stored; other
        answers in the same event, of a request for several, do not wait. Where the engine breaks off, what waited is
        passed on, not stored."""
        texts, ends, ended, usage = collections.defaultdict(str), [], set(), None

        async def finish():
            for choice in (choice for chunk in ends for choice in chunk["choices"] if choice.get("finish_reason")):
                await self.keep(stored := row(choice, texts[choice["index"]], usage), store)
                choice["generation_id"] = stored["id"]
            out = b"".join(map(frame, ends))
            ends.clear()
            return out

        try:
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith(":"):  # a sign of life
                    yield PING
                if not line.startswith("data:") or data in ("", "[DONE]"):
                    continue
                chunk = json.loads(data)
                usage, choices = chunk.get("usage") or usage, chunk.get("choices") or []
                for choice in choices:
                    piece = choice["delta"].get("content") if "delta" in choice else choice.get("text")
                    texts[choice["index"]] += piece or ""
                if store:
                    ended |= {choice["index"] for choice in choices if choice.get("finish_reason")}
                later = [choice for choice in choices if choice["index"] in ended]
                if later:
                    ends.append(chunk | {"choices": later})
                    chunk |= {"choices": [choice for choice in choices if choice["index"] not in ended]}
                if not choices or chunk["choices"]:
                    yield (b"" if choices else await finish()) + frame(chunk)
            yield await finish()
        except Exception as error:
            LOG.warning("an answer broke off: %r", error)
            who = "this server" if isinstance(error, sqlite3.Error) else f"the engine at {self.url}"
            message = f"{who} broke this answer off ({type(error).__name__})"
            yield b"".join(map(frame, ends)) + frame(ApiError(502, message, code="upstream_dead").body)
        yield b"data: [DONE]\n\n"


def relayed_row(body: Sampling, about: dict, choice: dict, text: str, usage: dict | None, request_id: str) -> dict:
    """The row of `generation` of another engine's answer."""
    n, metadata = body.n or 1, body.metadata or {}
    names = (*SAMPLING, "seed", "max_tokens", "max_completion_tokens", "stop")
    sampling = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    prompts = [chat_messages(body.messages)] if isinstance(body, ChatRequest) else prompt_list(body.prompt)
    return dict(
        id=uuid.uuid4().hex, created_at=now(), request_id=request_id, session_id=metadata.get("session_id"),
        parent_id=metadata.get("parent_id"), prompt_messages=json.dumps(prompts[choice["index"] // n]),
        completion=text or "", finish_reason=choice["finish_reason"], model_id=about["id"],
        checkpoint_sha256=about.get("checkpoint_sha256", ""), quantization=about.get("quantization"),
        sampling=json.dumps(sampling | {"number": choice["index"] % n}),
        usage=usage and json.dumps({name: usage.get(name) for name in ("prompt_tokens", "completion_tokens")}),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the process


MOST_HEADER = 2**16  # bytes of a request's line and header
HEADER_SECONDS = 10.0  # that they may take
MOST_CONNECTIONS = 512


class Connection(HttpToolsProtocol):
    """A client's connection, with limits on what it may send before any check sees it: uvicorn has none."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.begun, self.timer, self.header_bytes = time.monotonic(), None, 0
        self.expect_header()
        if len(self.connections) > MOST_CONNECTIONS:
            idle = [other for other in self.connections if other.cycle is None or other.cycle.response_complete]
            min(idle or [self], key=lambda other: other.begun).refuse(503, "too many connections")

    def expect_header(self):
        self.header_bytes = 0
        if self.timer is None:
            self.timer = self.loop.call_later(HEADER_SECONDS, self.refuse, 408, "the header did not arrive in time")

    def on_message_begin(self):
        super().on_message_begin()
        self.expect_header()

    def on_headers_complete(self):
        self.end_header()
        super().on_headers_complete()

    def end_header(self):
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def data_received(self, data: bytes):
        super().data_received(data)
        if self.timer is not None:  # still within the header
            self.header_bytes += len(data)
            if self.header_bytes > MOST_HEADER:
                self.refuse(431, f"the header is longer than {MOST_HEADER:,} bytes")

    def connection_lost(self, exc):
        self.end_header()
        super().connection_lost(exc)

    def refuse(self, status: int, message: str):
        self.end_header()
        body = msgspec.json.encode(ApiError(status, message).body)
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


class Process(uvicorn.Server):
    """Uvicorn that on a signal turns new requests away and lets running ones end, for at most --drain seconds."""

    def __init__(self, server: Server):
        config = server.config
        super().__init__(
            uvicorn.Config(
                server.app(), log_config=None, access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=30, http=Connection, timeout_graceful_shutdown=int(config.drain) + 5, lifespan="on",
            )
        )  # fmt: skip
        self.server, self.failed = server, False
        server.on_failure = self.fail

    def handle_exit(self, number, frame):
        self.drain()
        super().handle_exit(number, frame)

    def drain(self):
        self.server.draining = True
        timer = threading.Timer(self.server.config.drain, self.server.engine.cancel_all)
        timer.daemon = True  # an idle server ends at once
        timer.start()

    def fail(self, loading: bool):
        """The engine failed: while loading a model, that ends the process; later, /health answers 503."""
        if loading:
            self.failed = self.should_exit = True


def check_config(config: Config):
    local = config.host in Guard.LOCAL or config.host.startswith("127.")
    if not local and not config.api_key and not config.insecure:
        raise ValueError(f"--host {config.host} lets other machines in: give an --api-key, or say --insecure")
    if config.slots < 1 or config.max_queue < 0 or (config.context is not None and config.context < 1):
        raise ValueError("--slots and --context are 1 at least, --max-queue is not negative")
    if config.quantize == "auto" and not config.quality:
        raise ValueError("--quantize auto needs --quality FILE: held-out rows on which to measure what it costs")
    if config.quality:
        gpt.find_kind([config.quality], ("demos", "text"))
    if "*" in config.cors_origin:
        raise ValueError("--cors-origin *: name the pages that may ask")
    if config.upstream:
        check_upstream(config)
    for folder in config.folders:
        gpt.find_folder(folder)


def make_server(config: Config) -> Server:
    return (Relay if config.upstream else Server)(config, Store(config.feedback))


def check_upstream(config: Config):
    try:
        address = urlsplit(config.upstream)
    except ValueError:
        address = urlsplit("")
    if address.scheme not in ("http", "https") or not address.hostname:
        raise ValueError(f"--upstream {config.upstream} is no address like http://localhost:8001")
    if "@" in address.netloc:
        raise ValueError("--upstream names an address, which clients may see: what it asks for goes to --upstream-key")
    for name in ("quantize", "quality", "context"):
        if getattr(config, name) is not None:
            raise ValueError(f"--{name} is about a model that is served here; --upstream leaves that to its engine")
    for folder in config.named_folders:
        gpt.find_folder(folder)  # what is trained on the votes


def main(config: Config):
    env = os.environ.get
    keys = dict(api_key=config.api_key or env("API_KEY"), upstream_key=config.upstream_key or env("UPSTREAM_KEY"))
    config = dataclasses.replace(config, **keys)
    check_config(config)
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its "startup complete" comes before the model's
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line a request is enough
    sys.setswitchinterval(0.001)  # the engine's thread waits this long for the event loop to let go, not 5 ms
    listener = socket.create_server(
        (config.host, config.port), family=socket.AF_INET6 if ":" in config.host else socket.AF_INET
    )
    server = make_server(config)
    url = f"http://{'localhost' if config.host in Guard.LOCAL else config.host}:{listener.getsockname()[1]}"
    names = ", ".join(server.models) or f"what {config.upstream} serves"
    message = '{"messages": [{"role": "user", "content": "hello"}]}'
    key = " -H 'authorization: Bearer KEY'" if config.api_key else ""

    def say_ready():
        print(f"ready: {names} on {url} (chat page: {url}/, votes: {config.feedback}). Try:")
        print(f"  curl {url}/v1/chat/completions -H 'content-type: application/json'{key} -d '{message}'", flush=True)

    server.on_ready = say_ready
    print(f"loading {names} for {url}", flush=True)
    process = Process(server)
    process.run(sockets=[listener])
    if process.failed:
        full = isinstance(server.engine.failure, jax.errors.JaxRuntimeError)  # the memory is: gpt.cli says what helps
        raise server.engine.failure if full else ValueError(server.engine.failure)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
