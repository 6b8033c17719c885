"""What every script shares, in three parts.

    I    the model: configuration, transformer, log-probabilities, sampling, training step. Read this one: 650 lines
    II   files: tokenizers and chat, model folders, rows, tokens on disk, batches
    III  running: devices, fast products, optimiser, adapters, rewards, the run folder

Parts II and III are for looking up. Algorithms live in their scripts; nothing here knows what PPO is.

    model, tokenizer = gpt.load("out/sft")                      # a Hugging Face folder: GPT-2, Llama, Qwen3
    logprobs = gpt.token_logprobs(model, tokens)                # (B, T) -> (B, T-1)
    out = gpt.generate(model, prompts, prompt_mask, key, 64, ends=tokenizer.end_ids)
    gpt.save("out/mine", model, tokenizer)                      # transformers, vLLM and llama.cpp read it

One alphabet of dimensions in this file, a meaning to a letter:
    B rows of a batch   T tokens of a row   D width     H heads   K key-value heads   E width of a head
    F width of the MLP  V vocabulary        L layers    S slots of a key-value cache
    P prompts, each continued by B / P rows: there Q are the tokens of a prompt, and T those of what continues it
    I inputs, O outputs of a linear layer; r rank of its adapter
Scripts keep to these letters; N are items of a list, and in grpo.py and online.py K are the answers to a prompt.
"""

import ctypes
import dataclasses
import gzip
import hashlib
import importlib
import json
import math
import os
import re
import secrets
import select
import shlex
import shutil
import signal
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from scipy.special import ndtri, stdtrit

# =====================================================================================================================
# Part I. The model: what it is, what it says of a text, how it is sampled, scored and trained
# =====================================================================================================================


# ---------------------------------------------------------------------------------------------------------------------
# 1. Configuration


@dataclass(frozen=True)
class Config:
    """The shape of a model. `family` picks layer norms, positions and MLP as the published models have them."""

    vocab_size: int
    context: int  # longest sequence: learned positions, or what the rotary ones were trained for
    layers: int
    heads: int
    dim: int
    ffn: int
    kv_heads: int
    head_dim: int
    family: str = "llama"  # gpt2: learned positions, LayerNorm, GELU. The others: RoPE, RMSNorm, SwiGLU
    norm_eps: float = 1e-5
    tied: bool = True  # the output head is the embedding
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, float] | None = None  # Llama 3: factor, low, high, original context
    known_ids: int | None = None  # the tokenizer has the ids below this one, and only they have a probability

    @property
    def gpt2(self) -> bool:
        return self.family == "gpt2"

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalised, head by head, before they are rotated."""
        return self.family == "qwen3"


FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def make_config(vocab_size: int, context: int, layers: int, heads: int, dim: int, family="llama", **other) -> Config:
    """A new model's configuration with the family's usual widths and biases."""
    if dim % heads:
        raise ValueError(f"--dim {dim} is not divisible by --heads {heads}")
    if family not in FAMILIES:
        raise ValueError(f"unknown model family {family!r}: {', '.join(FAMILIES)}")
    gpt2 = family == "gpt2"
    ffn = 4 * dim if gpt2 else -(-8 * dim // 3 // 32) * 32  # SwiGLU has three matrices, not two: two thirds
    biases = dict(qkv_bias=family in ("gpt2", "qwen2"), out_bias=gpt2, mlp_bias=gpt2)
    values = dict(ffn=ffn, kv_heads=heads, head_dim=dim // heads, family=family) | biases | other
    return Config(vocab_size=vocab_size, context=context, layers=layers, heads=heads, dim=dim, **values)


# ---------------------------------------------------------------------------------------------------------------------
# 2. The transformer
#
# What Part I calls and Part III defines, because XLA needs care there, is in plain jnp:
#
#   matmul(x, weight)            x @ weight
#   einsum(form, a, b, dtype)    jnp.einsum(form, a, b), in `dtype`
#   unembed(x, table, dtype)     x @ table.T, in `dtype`: a logit for every word
#   logprobs_of_logits(z, y)     (log_softmax(z) at y, entropy of softmax(z))
#   inverse_cdf(p, u)            the first index whose cumsum(p) exceeds u * sum(p)
#   has_flash_attention(q, k)    whether a GPU's kernel can compute this `attention`
#   flash_attention(...)         `attention` by that kernel
#   keep(x)                      x, which a loop over layers keeps for the backward pass
#   cast_layers(block, dtype)    the block, its weights in `dtype`
#   map_columns(f, width, *xs)   f(*xs), on a few of the T columns at a time: f makes `width` floats a token
#   map_chunks(f, xs, chunks)    f(xs), on one chunk of the rows after the other
#   shard_batch(x)               x, with its rows spread over the devices
#   merge(model)                 the model, with its adapter added into its weights
#
# Nothing else in Part I knows of devices. Large weights and their optimiser state are split, each along its longest
# axis that divides (`sharding`, chapter 11), and the rows of a batch are shared out; `jax.jit` then gathers a layer's
# weights where it is computed, and sums the gradients. On one device all of this is nothing.


MASKED = -1e30  # a finite "minus infinity": a row whose keys are all masked stays free of NaN


class Linear(eqx.Module):
    weight: Array  # (I, O)
    bias: Array | None  # (O,)

    def __call__(self, x):
        y = matmul(x, self.weight)
        if self.bias is None:
            return y
        # in fp32, because then the bias's gradient is summed in fp32 too: XLA:CPU takes 10 to 30 times as long in bf16
        return (y.astype(jnp.float32) + self.bias.astype(jnp.float32)).astype(y.dtype)


class Norm(eqx.Module):
    """LayerNorm where there is a bias, RMSNorm where there is none; statistics in fp32."""

    scale: Array  # (D,)
    bias: Array | None
    eps: float = eqx.field(static=True)

    def __call__(self, x):
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - y.mean(-1, keepdims=True)
        y = y * lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + self.eps) * self.scale
        return (y if self.bias is None else y + self.bias).astype(x.dtype)


def attention(q, k, v, visible, causal=False):
    """Softmax attention of q (B, H, T, E) to k and v (B, K, S, E): -> (B, H, T, E). `visible` (B or 1, T, S) is True
    where a query may look. `causal` says that no query looks ahead: a kernel may then skip half of the scores."""
    if has_flash_attention(q, k):
        return flash_attention(q, k, v, visible, causal)
    B, H, T, E = q.shape
    K = k.shape[1]
    q = q.reshape(B, K, H // K, T, E)  # H / K query heads share each key-value head
    scores = einsum("bkgte,bkse->bkgts", q, k, jnp.float32) / np.sqrt(E)
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return einsum("bkgts,bkse->bkgte", weights, v).reshape(B, H, T, E)


def rope_angles(config: Config, positions):
    """Cosines and sines (B, 1, T, E/2) of the rotary embedding (arXiv:2104.09864), with Llama 3's long-context rule."""
    E = config.head_dim
    frequency = config.rope_theta ** (-np.arange(0, E, 2) / E)
    if config.rope_scaling:  # slow waves are stretched by `factor`, fast ones kept, those between blended
        factor, low, high, original = config.rope_scaling
        turns = original * frequency / (2 * np.pi)
        keep = np.clip((turns - low) / (high - low), 0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angles = positions[:, None, :, None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x, rope):
    """Turn each pair (x_i, x_{i + E/2}) of x (B, H, T, E) by its angle: Hugging Face's "rotate half" layout."""
    cos, sin = (r.astype(x.dtype) for r in rope)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class Block(eqx.Module):
    norm1: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: Norm | None  # Qwen3's: over each head's E numbers
    k_norm: Norm | None
    norm2: Norm
    gate: Linear | None  # SwiGLU's third matrix; GPT-2 has none
    up: Linear
    down: Linear
    head_dim: int = eqx.field(static=True)

    def __call__(self, x, rope, visible, cache=None, slot=0):
        """x (B, T, D) -> (x, (keys, values)). With a `cache` (B, K, S, E) of earlier keys and values the new ones are
        written into it from `slot` on (or from each row's own slot, (B,)), and its first visible.shape[-1] slots are
        attended to."""

        def attend(q, k, v):
            if cache is None:
                return attention(q, k, v, visible, causal=True), (k, v)
            held = tuple(write_cache(old, new, slot) for old, new in zip(cache, (k, v)))
            return attention(q, *(x[:, :, : visible.shape[-1]] for x in held), visible), held

        return self.around(attend, x, rope)

    def around(self, attend, x, rope):
        """x (B, T, D) -> (x, cache), where attend(q, k, v) -> (values (B, H, T, E), cache) is the block's attention."""
        h = self.norm1(x)
        q, k, v = (self._heads(keep(linear(h))) for linear in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        a, cache = attend(q, k, v)
        x = x + keep(self.o(a.swapaxes(1, 2).reshape(*x.shape[:2], -1)))
        h = self.norm2(x)
        gate, up = self.gate and keep(self.gate(h)), keep(self.up(h))
        h = jax.nn.gelu(up) if gate is None else jax.nn.silu(gate) * up
        return x + self.down(h), cache

    def _heads(self, x):  # (B, T, H*E) -> (B, H, T, E)
        return x.reshape(*x.shape[:2], -1, self.head_dim).swapaxes(1, 2)


class GPT(eqx.Module):
    """A decoder-only transformer. Every array is a leaf, everything else is static: plain `jax.jit` takes it."""

    wte: Array  # (V, D); in its place, and the head's, may be a table with an adapter (chapter 14), or one of integers
    wpe: Array | None  # (context, D)
    blocks: Block  # every leaf stacked to (L, ...)
    norm: Norm
    head: Array | None  # (V, D); None when tied: one leaf used twice, never two that drift apart
    config: Config = eqx.field(static=True)

    def __call__(self, tokens: Int[Array, "B T"], segments=None, remat: bool = False, forked: bool = False):
        """Hidden states (B, T, D) after the last norm. `segments` (B, T) says which document each token is of, 0 is
        padding: tokens see only earlier tokens of their own segment, and positions count from 0 in each. Packing, left
        and right padding are all this one rule. `forked`: segments 2, 3, ... of a row all go on from its segment 1."""
        if segments is None:
            segments = jnp.ones(tokens.shape, jnp.int32)
        if not forked:  # a forked row has fewer positions than tokens: who makes one calls `check_context`
            self.check_length(tokens.shape[1])
        x, rope = self.embed(tokens, segment_positions(segments, forked))
        visible = causal_mask(segments, forked)
        x = self.scan_blocks(lambda x, block: shard_batch(block(x, rope, visible)[0]), x, remat)
        return self.norm(x)

    def scan_blocks(self, layer, x, remat: bool):
        """x -> layer(x, block) for one block after the other. `remat`: a layer's activations are not kept for the
        backward pass but computed there once more, which saves memory."""
        dtype = jax.tree.leaves(x)[0].dtype
        step = lambda x, block: (layer(x, cast_layers(block, dtype)), None)
        # A short stack is unrolled, for speed; not with `remat`, since XLA:CPU would then find that both computations
        # of a layer are the same one, and keep its activations after all.
        unroll = not remat and self.config.layers <= 12
        if remat:
            step = jax.checkpoint(step)
        elif not unroll and jax.default_backend() == "cpu":
            # XLA:CPU's loop writes what it keeps into large arrays, on one thread: keep the products, a third of it
            step = jax.checkpoint(step, policy=jax.checkpoint_policies.save_only_these_names("kept"))
        return lax.scan(step, x, self.blocks, unroll=unroll)[0]

    def embed(self, tokens, positions):
        """Input vectors (B, T, D), and the rotary angles where the family has them."""
        x = self.wte.look_up(tokens) if isinstance(self.wte, eqx.Module) else self.wte[tokens]
        if self.wpe is not None:
            return shard_batch(x + self.wpe[positions]), None
        return shard_batch(x), rope_angles(self.config, positions)

    def check_length(self, length: int, remedy: str = ""):
        """ValueError where rows of so many tokens have no learned positions: indexing would clamp, silently."""
        if self.config.gpt2 and length > self.config.context:
            raise ValueError(f"rows of {length} tokens > the {self.config.context} positions of the model{remedy}")

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[Array, "*rows V"]:
        """A logit for every word, in fp32 whatever the model's dtype: bf16 is too coarse for a softmax over so many.

        Published models may have more rows than their tokenizer has ids (Qwen2: 151,936 rows for 151,669 ids). No text
        can hold the rest, so where `known_ids` is set they are masked: in sampling, log-probs and training alike."""
        head = self.wte if self.head is None else self.head
        own = isinstance(head, eqx.Module)
        logits = head(hidden, jnp.float32) if own else unembed(hidden, head, jnp.float32)
        if self.config.known_ids is None:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.config.known_ids, logits, MASKED)


def segment_positions(segments: Int[Array, "B T"], forked: bool = False) -> Int[Array, "B T"]:
    """[[0, 0, 1, 1, 1, 2, 2]] -> [[0, 1, 0, 1, 2, 0, 1]]: positions restart where the segment changes. `forked`: after
    the last of segment 1, [[0, 1, 0, 1, 2, 3, 4]]."""
    index = jnp.arange(segments.shape[1])
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], 1)
    positions = index - lax.cummax(jnp.where(starts, index, 0), axis=1)
    if not forked:
        return positions
    return positions + jnp.where(segments > 1, (segments == 1).sum(1, keepdims=True), 0)


def causal_mask(segments: Int[Array, "B T"], forked: bool = False) -> Array:
    """(B, T, T): True where a token (second axis) may attend to another (third axis): to itself and to earlier ones of
    its segment, never to padding. `forked`: also to segment 1."""
    own, other = segments[:, :, None], segments[:, None, :]
    visible = (own == other) & (other > 0)
    if forked:
        visible = visible | (own > 1) & (other == 1)
    return visible & jnp.tril(jnp.ones((segments.shape[1],) * 2, bool))


def fork_sides(segments: Int[Array, "B T"], mask, sides: int) -> tuple[Array, Array]:
    """Of forked rows, where segments 2, 3, ... go on from segment 1: (whole, answer), (B, sides, T) each, True on the
    tokens that a side, 2 or 3 or ..., has read, and on those of its own whose `mask` is 1. Of NumPy's arrays, too."""
    own = segments[:, None] == np.arange(2, 2 + sides)[:, None]
    return own | (segments == 1)[:, None], own & (mask > 0)[:, None]


def init(config: Config, key) -> GPT:
    """A fresh model: normal with std 0.02, and 0.02 / sqrt(2 L) for the two projections into the residual stream, as
    GPT-2 has it."""
    D, F, E, L = config.dim, config.ffn, config.head_dim, config.layers
    keys = iter(jax.random.split(key, 10))

    def normal(*shape, std=0.02):
        return std * jax.random.normal(next(keys), shape)

    def linear(rows, columns, bias, std=0.02):
        return Linear(normal(L, rows, columns, std=std), jnp.zeros((L, columns)) if bias else None)

    def norm(*shape):
        return Norm(jnp.ones(shape), jnp.zeros(shape) if config.gpt2 else None, config.norm_eps)

    residual = 0.02 / np.sqrt(2 * L)
    blocks = Block(
        norm1=norm(L, D),
        q=linear(D, config.heads * E, config.qkv_bias),
        k=linear(D, config.kv_heads * E, config.qkv_bias),
        v=linear(D, config.kv_heads * E, config.qkv_bias),
        o=linear(config.heads * E, D, config.out_bias, residual),
        q_norm=norm(L, E) if config.qk_norm else None,
        k_norm=norm(L, E) if config.qk_norm else None,
        norm2=norm(L, D),
        gate=None if config.gpt2 else linear(D, F, config.mlp_bias),
        up=linear(D, F, config.mlp_bias),
        down=linear(F, D, config.mlp_bias, residual),
        head_dim=E,
    )
    wte = normal(config.vocab_size, D)
    wpe = normal(config.context, D, std=0.01) if config.gpt2 else None
    head = None if config.tied else 0.02 * jax.random.normal(jax.random.fold_in(key, 1), (config.vocab_size, D))
    return GPT(wte, wpe, blocks, norm(D), head, config)


class ScoreModel(eqx.Module):
    """A transformer, its body, with a scalar head: a reward model (read once a sequence) or a critic (read at every
    token)."""

    body: GPT  # or an adapter of one, which stands alone until it is attached: Part III, Adapters
    head: Array  # (D,)
    query: Array | None  # (D,): what attention pooling looks for
    bias: Array  # ()
    pool: str = eqx.field(static=True, default="last")  # the last real token; mean, attention: of all; answer: its mean
    suffix: tuple[int, ...] = eqx.field(static=True, default=())  # tokens put in EOS's place, where the score is read

    def values(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        """The head at every position, in fp32."""
        return hidden.astype(jnp.float32) @ self.head.astype(jnp.float32) + self.bias.astype(jnp.float32)

    def pooled(self, hidden: Float[Array, "B T D"], real: Array, answer=None) -> Float[Array, " B"]:
        """One score a row from its hidden states; `real` (B, T) is 1 on its tokens and 0 on padding, on either side;
        `answer` (B, T) is 1 on those of the answer."""
        T = real.shape[1]
        if self.pool == "last":
            last = T - 1 - jnp.argmax(jnp.flip(real, 1), axis=1)
            return self.values(hidden[jnp.arange(len(hidden)), last][:, None])[:, 0]
        weights = (answer if self.pool == "answer" else real).astype(jnp.float32)
        if self.pool == "attention":
            look = hidden.astype(jnp.float32) @ self.query.astype(jnp.float32) / np.sqrt(hidden.shape[-1])
            weights = jax.nn.softmax(jnp.where(real > 0, look, MASKED), axis=-1)
        weights = weights / jnp.maximum(weights.sum(1, keepdims=True), 1e-9)
        return (self.values(hidden) * weights).sum(1)

    def __call__(self, tokens: Int[Array, "B T"], real, remat: bool = False, answer=None) -> Float[Array, " B"]:
        return self.pooled(self.body(tokens, segments=real, remat=remat), real, answer)


def init_score_model(body: GPT, key, pool="last", suffix=(), zero=False) -> ScoreModel:
    """A scalar head on a body: normal with std 1/sqrt(D+1) (Ziegler et al. 2019), or zero for a critic."""
    if pool not in ("last", "mean", "attention", "answer"):
        raise ValueError(f"unknown pooling {pool!r}: last, mean, attention or answer")
    D = body.config.dim
    head = jax.random.normal(key, (D,)) / np.sqrt(D + 1) * (not zero)
    query = jnp.zeros(D) if pool == "attention" else None
    return ScoreModel(body, head, query, jnp.zeros(()), pool, tuple(suffix))


# ---------------------------------------------------------------------------------------------------------------------
# 3. Log-probabilities


def token_logprobs(model: GPT, tokens: Int[Array, "B T"], segments=None, temperature=1.0) -> Float[Array, "B T-1"]:
    """log p(tokens[:, t+1] | tokens[:, :t+1]) at every t.

    The shift by one, which every script makes alike, drawn here once on a row of three:
        tokens     a    b    c
        hidden     h0   h1   (h2)         h0 has seen a, h1 has seen a b
        targets    b    c
        result  log p(b|a)  log p(c|a b)  a mask over tokens becomes mask[:, 1:] beside it
    """
    return head_logprobs(model, model(tokens, segments)[:, :-1], tokens[:, 1:], temperature)[0]


def completion_logprobs(model: GPT, batch, remat: bool = False):
    """(log p of each completion, the number of its tokens), (...) each, from tokens, segments and mask (..., T).

    Sums over the tokens whose mask is 1, their EOS included. A batch with `answers` (B, K, A) has the K completions of
    a prompt in one row (B, T), behind it (`fork`): the prompt is computed once for them, and the sums are (B, K).
    """
    tokens, segments, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("tokens", "segments", "mask"))
    if "answers" not in batch:
        hidden, mask, shape = model(tokens, segments, remat), mask[:, 1:] > 0, batch["tokens"].shape[:-1]
        logprobs, _ = head_logprobs(model, hidden[:, :-1], tokens[:, 1:])
        return jnp.where(mask, logprobs, 0.0).sum(1).reshape(shape), mask.sum(1).reshape(shape)
    hidden, at = model(tokens, segments, remat, forked=True), batch["answers"].reshape(len(tokens), -1)
    hidden = jnp.take_along_axis(hidden, jnp.maximum(at - 1, 0)[..., None], 1)  # where each of them is predicted
    logprobs, _ = head_logprobs(model, hidden, jnp.take_along_axis(tokens, at, 1))
    sums = lambda x: jnp.where(at > 0, x, 0).reshape(batch["answers"].shape).sum(-1)
    return sums(logprobs), sums(1)


def head_logprobs(model: GPT, hidden: Float[Array, "B T D"], targets: Int[Array, "B T"], temperature=1.0):
    """(log p(targets), entropy), each (B, T), of softmax(logits / temperature), in fp32.

    log p is the target's logit minus the logsumexp of all logits, for a few columns of T at a time: the logits of a
    whole batch, (B, T, V), would often not fit the memory.
    """
    piece = lambda hidden, targets: logprobs_of_logits(model.logits(hidden) / temperature, targets)
    return map_columns(piece, model.config.vocab_size, hidden, targets)


def head_kl(model: GPT, hidden, other: GPT, other_hidden, temperature=1.0) -> Float[Array, "B T"]:
    """KL(model || other) of the next-token distributions at each position, over the whole vocabulary, in nats."""

    def piece(hidden, other_hidden):
        p = jax.nn.log_softmax(model.logits(hidden) / temperature)
        q = jax.nn.log_softmax(other.logits(other_hidden) / temperature)
        return (jnp.exp(p) * (p - q)).sum(-1)

    return map_columns(piece, 2 * model.config.vocab_size, hidden, other_hidden)


def compare_heads(model: GPT, hidden, other: GPT, other_hidden, targets, temperature=1.0):
    """(log p(targets), log q(targets), entropy of p, KL(p || q)), each (B, T), where p is by `model` and q by `other`.

    The same as `head_logprobs` of both and `head_kl`, but with one product with each head. Only log p(targets) has a
    gradient: the rest is for measuring.
    """

    def piece(hidden, other_hidden, targets):
        logits, other_logits = model.logits(hidden) / temperature, other.logits(other_hidden) / temperature
        logprobs, entropy = logprobs_of_logits(logits, targets)
        logits, old, other_logits = lax.stop_gradient((logits, logprobs, other_logits))
        other_logprobs, _ = logprobs_of_logits(other_logits, targets)
        lse = lambda x, logprobs: jnp.take_along_axis(x, targets[..., None], -1) - logprobs[..., None]
        log_p, log_q = logits - lse(logits, old), other_logits - lse(other_logits, other_logprobs)
        return logprobs, other_logprobs, lax.stop_gradient(entropy), (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    return map_columns(piece, model.config.vocab_size, hidden, other_hidden, targets)


def masked_mean(x, mask):
    """Mean of x where mask is 1; 0 where nothing is."""
    return jnp.where(mask > 0, x, 0).sum() / jnp.maximum(mask.sum(), 1)


def weighted_mean(x, weight):
    """Mean of x by weights that may be fractions; 0 where all are 0."""
    return (x * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Sampling, and the scores of samples


class Generation(NamedTuple):
    tokens: Array  # (B, T) sampled tokens, `pad` after the end
    mask: Array  # (B, T) 1 on sampled tokens including the one that ends them
    logprobs: Array  # (B, T) of the distribution sampled from, 0 where mask is 0


class SamplerState(NamedTuple):
    """The state of `generate` between two tokens."""

    t: Array  # () number of the token that is drawn next
    tokens: Array  # these three as in Generation
    mask: Array
    logprobs: Array
    done: Array  # (B,) whether a token was drawn that ends the response
    visible: Array  # (B, Q + T) slots of the cache that hold a real token
    caches: tuple  # (keys, values), each (B, K, Q + T, E), of every layer


@partial(jax.jit, static_argnames=("max_new_tokens", "ends", "pad", "temperature", "copies"))
def generate(
    model: GPT,
    prompts: Int[Array, "P Q"],
    prompt_mask: Array,
    key,
    max_new_tokens: int,
    *,
    ends: tuple[int, ...],
    pad: int = 0,
    temperature: float = 1.0,
    copies: int = 1,
    row_numbers=None,
) -> Generation:
    """Sample B = P * `copies` responses to P left-padded prompts (mask 1 on their real tokens), those to one prompt
    together, until one of the tokens `ends` or `max_new_tokens`. Each prompt is read once.

    temperature 0 is greedy. There is no top-k and no top-p: the log-probs of a rollout must be those of the whole
    softmax (serve.py has both). The noise is a function of (key, number of the row, token), so that a row's text does
    not depend on how rows are batched or on how many devices there are; `row_numbers` (B,) default to 0, 1, ...
    """
    (P, Q), T = prompts.shape, max_new_tokens
    B, each = P * copies, partial(jnp.repeat, repeats=copies, axis=0)
    if model.config.gpt2 and model.config.context < Q + T:
        raise ValueError(f"prompt {Q} + new tokens {T} > the {model.config.context} positions of the model")
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B) if row_numbers is None else row_numbers)
    lengths = each(prompt_mask.sum(1))
    # Adapters are merged in fp32. In bf16 merging would round their small changes away, and the policy that samples
    # would not be the one that is scored.
    fold = merge if jax.tree.leaves(model)[0].dtype == jnp.float32 else lambda layer: layer
    # unstacked once, before the loop: slicing stacked weights inside it would copy all of them for every token
    layers = [fold(jax.tree.map(lambda x, i=i: x[i], model.blocks)) for i in range(model.config.layers)]
    model = fold(dataclasses.replace(model, blocks=None))

    def draw(state: SamplerState, hidden) -> SamplerState:
        """Token t of every row, from the hidden states (B, D) of the token before it."""
        t = state.t
        u = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t)))(row_keys)
        token, logprob = sample_token(model.logits(hidden), u, temperature)
        column = lambda array, value: array.at[:, t].set(value.astype(array.dtype))
        return state._replace(
            t=t + 1,
            tokens=column(state.tokens, jnp.where(state.done, pad, token)),
            mask=column(state.mask, ~state.done),  # `done` is from before this draw: the end itself still counts
            logprobs=column(state.logprobs, jnp.where(state.done, 0.0, logprob)),
            done=state.done | is_end(token, ends),
        )

    def step(state: SamplerState) -> SamplerState:
        last = state.t - 1  # the token that was drawn last is read, the next one drawn
        visible = state.visible.at[:, Q + last].set(True)
        x, rope = model.embed(state.tokens[:, last, None], (lengths + last)[:, None])
        caches = []
        for layer, cache in zip(layers, state.caches):
            x, cache = layer(x, rope, visible[:, None, :], cache, slot=Q + last)
            caches.append(cache)
        return draw(state._replace(visible=visible, caches=tuple(caches)), model.norm(x[:, 0]))

    hidden, caches = prefill(model, layers, prompts, prompt_mask, Q + T)
    start = SamplerState(
        t=jnp.asarray(0),
        tokens=jnp.full((B, T), pad, prompts.dtype),
        mask=jnp.zeros((B, T), jnp.int32),
        logprobs=jnp.zeros((B, T), jnp.float32),
        done=jnp.zeros(B, bool),
        visible=jnp.pad(each(prompt_mask) > 0, ((0, 0), (0, T))),
        caches=jax.tree.map(each, caches),
    )
    unfinished = lambda state: (state.t < T) & ~state.done.all()
    end = lax.while_loop(unfinished, step, draw(start, each(hidden[:, -1])))
    return Generation(end.tokens, end.mask, end.logprobs)


def is_end(tokens, ends: tuple[int, ...]):
    """Where `tokens`, an array of any shape, are one of the ids that end a response."""
    return (tokens[..., None] == jnp.asarray(ends, tokens.dtype)).any(-1)


def has_ended(tokens: Int[Array, "B T"], mask, ends: tuple[int, ...]) -> Array:
    """(B,) whether each response came to its end: whether a token of it, where `mask` is 1, is one of `ends`."""
    return (is_end(tokens, ends) & (mask > 0)).any(1)


def prefill(model: GPT, layers, prompts, prompt_mask, slots: int):
    """Run the prompts once: hidden states (B, Q, D), and each layer's keys and values with room for `slots` tokens."""
    room = ((0, 0), (0, 0), (0, slots - prompts.shape[1]), (0, 0))
    model.check_length(prompts.shape[1])
    x, rope = model.embed(prompts, segment_positions(prompt_mask))
    caches = []
    for layer in layers:
        x, cache = layer(x, rope, causal_mask(prompt_mask))
        caches.append(tuple(jnp.pad(c, room) for c in cache))
    return model.norm(x), tuple(caches)


def write_cache(cache, new, slot):
    """cache (B, K, S, E) with new (B, K, T, E) written from `slot` on, or from each row's own slot (B,)."""
    if jnp.ndim(slot) == 0:
        return lax.dynamic_update_slice(cache, new, (0, 0, slot, 0))
    return jax.vmap(lambda old, new, slot: lax.dynamic_update_slice(old, new, (0, slot, 0)))(cache, new, slot)


def sample_token(logits: Float[Array, "B V"], u: Float[Array, " B"], temperature=1.0):
    """One token a row and its log-prob under softmax(logits / temperature): the first token at which the running sum of
    probabilities exceeds u, which is uniform in [0, 1)."""
    if temperature == 0:
        token = jnp.argmax(logits, -1)
        return token, jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
    logits = logits / temperature
    top = logits.max(-1, keepdims=True)
    p = jnp.exp(logits - top)
    token = inverse_cdf(p, u)
    chosen = jnp.take_along_axis(logits - top, token[:, None], 1)[:, 0]
    return token, chosen - jnp.log(p.sum(-1))


def score_inputs(prompts, prompt_mask, responses, mask, suffix, ends: tuple[int, ...]):
    """What a reward model reads: left-padded prompts (B, Q) and responses (B, T) as rows (B, Q + T + len(suffix)), and
    1 on their real tokens.

    The score is read at the last of them. Of a prompt p, a response x y, its end token . and a suffix s:
                            no suffix    suffix
        ended, x y .        p x y .      p x y s        the suffix takes the end's place
        cut off, x y        p x y        p x y s
    `encode_row` does the same to the rows that reward models are trained on.
    """
    room, start = len(suffix), prompts.shape[1]
    tokens = jnp.concatenate([prompts, responses, jnp.zeros((len(prompts), room), prompts.dtype)], 1)
    end = start + mask.sum(1)
    if suffix:
        end = end - has_ended(responses, mask, ends)
    index = jnp.arange(tokens.shape[1])
    for i, token in enumerate(suffix):
        tokens = jnp.where(index == end[:, None] + i, token, tokens)
    response_part = (index >= start) & (index < end[:, None] + room)
    return tokens, jnp.pad(prompt_mask > 0, ((0, 0), (0, tokens.shape[1] - start))) | response_part


@partial(jax.jit, static_argnames=("ends", "chunks"))
def score(model: ScoreModel, prompts, prompt_mask, responses, mask, ends, chunks: int = 1) -> Float[Array, " B"]:
    """One score for each sampled response: prompts (B, Q) left-padded, responses (B, T), and 1 on their real tokens in
    the two masks; `ends` as for `score_inputs`. The rows are scored in so many `chunks`, one after the other."""
    tokens, real = score_inputs(prompts, prompt_mask, responses, mask, model.suffix, ends)
    answer = real & (jnp.arange(tokens.shape[1]) >= prompts.shape[1])
    return map_chunks(lambda rows: model(*rows[:2], answer=rows[2]), (tokens, real.astype(jnp.int32), answer), chunks)


# ---------------------------------------------------------------------------------------------------------------------
# 5. The training step


def gradients(loss_fn, model, batch, micro_batches: int = 1, count=None):
    """((loss, metrics), gradients) of loss_fn(model, batch) -> (loss, metrics).

    With micro-batches the batch is computed in parts, to save memory. The loss is a mean over `count(batch)` items
    (tokens, pairs), so each part's mean is weighted by its share of the items: the plain mean of means would be wrong
    as soon as the counts differ. Loss, gradient and metrics that are means over the same items are then those of the
    whole batch; other metrics (variances, extremes) are means of the parts'. A batch in one part needs no `count`.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if micro_batches == 1:
        return value_and_grad(model, batch)
    for x in jax.tree.leaves(batch):
        if x.shape[0] % micro_batches:
            raise ValueError(f"{x.shape[0]} rows do not divide into {micro_batches} micro-batches")
    # row r of micro-batch m is row r * M + m of the batch: every device keeps a share of every micro-batch
    chunks = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    counts = jax.vmap(count)(chunks).astype(jnp.float32)
    weights = counts / jnp.maximum(counts.sum(), 1e-9)

    def add(total, part):
        chunk, weight = part
        return jax.tree.map(lambda a, b: a + weight * b, total, value_and_grad(model, chunk)), None

    first = jax.tree.map(lambda x: x[0], chunks)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, model, first))
    return lax.scan(add, zeros, (chunks, weights))[0]


def descend(optimizer, loss_fn, model, opt_state, batch, micro_batches: int = 1, count=None):
    """One optimiser step on `gradients`: (model, opt_state, metrics of loss_fn and the gradient's norm)."""
    (_, metrics), grads = gradients(loss_fn, model, batch, micro_batches, count)
    updates, opt_state = optimizer.update(grads, opt_state, model)
    return optax.apply_updates(model, updates), opt_state, metrics | {"grad_norm": optax.tree.norm(grads)}


# What sft.py, reward.py, ppo.py and dpo.py call of Parts II and III, in the order of a run:
#
#   start                                 meets the other processes, sets the devices; gives the run's random key
#   check_batch_size                      whether the devices can share a batch
#   find_kind, parse_sources              the kind of the data's rows (chapter 8); files and weights of "a:0.7 b:0.3"
#   heldout_file, open_text               the file of held-out rows beside the data, if there is one; a file, opened
#   BadRow                                the error of a row that cannot be used
#   load_policy, load_frozen              a folder as (language model, its tokenizer); a model that does not learn
#   load_reward_model, ensemble_folders   a folder as a reward model; the folders of an ensemble's members
#   load_reward, Reward, load_function    what scores responses: reward models, or a function; "module:function"
#   attach_reward, score_by_reference     its models, ready to score; scores and the reference's states by one pass
#   find_folder, weights_hash             a folder, or a name on the Hub, as a folder; a hash of its weights
#   Tokenizer, need_tokenizer             text <-> ids; the tokenizer of a folder
#   check_tokenizer_of                    an error where a model has another tokenizer
#   Batches                               batches(step): rows as arrays (table in chapter 10); `plan` says how many
#                                         steps a run takes, `stream` makes batches ahead, `once` gives every row once
#   check_context                         an error where a row has more tokens than the model has learned positions
#   trainable, Adapter, attach            (what learns, its frozen base): the model and None, or an adapter and the
#                                         model; what an adapter is; adapter and base as one model
#   compute_dtype, cast                   the precision of the forward pass; a model in that precision
#   shard, put_batch, put_array           weights, rows, an array, on the devices
#   shard_batch, map_chunks               inside jit: rows spread over the devices; rows computed a chunk at a time
#   to_numpy                              arrays from the devices to the host
#   schedule, adamw                       the learning rate of each step; the optimiser, an optax one
#   share_interval, same_prompt           95% interval of a share of answers, by prompt; which answers are to one prompt
#   own_rows, own_texts, gather_rows      the rows, and their texts, that this process gives to functions; everyone's
#   check_scores, read_gold, mean_gold    what a reward function said, checked; what a gold function said, and its mean
#   normalize_scores                      a reward model whose scores of samples have mean 0 and standard deviation 1
#   special_tokens, Watch                 what text does not show of responses; warns of what usually goes wrong in RL
#   Run, empty_out                        the run folder: restore, steps, log, checkpoint, finish; a folder made empty
#   count_parameters, progress            the number of weights; a progress bar
#   write_json, write_atomic, barrier     files that are never half written; a point at which all processes wait
#   cli                                   the command line of a dataclass, and exit codes


# =====================================================================================================================
# Part II. Files: tokenizers, model folders, rows, batches
# =====================================================================================================================


# ---------------------------------------------------------------------------------------------------------------------
# 6. Tokenizers and chat


GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""

PLAIN_TEMPLATE = (  # blanks as expressions: a line break right after a block would be trimmed
    r"{% for m in messages %}{% if m['role'] == 'user' %}{{ '\n\nHuman: ' + m['content'] }}"
    r"{% elif m['role'] == 'assistant' %}{{ '\n\nAssistant: ' + m['content'] }}{% else %}{{ m['content'] }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)

CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
OTHER_TEMPLATES = "additional_chat_templates/*.jinja"  # as transformers 5 saves those that are not the default
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}  # of whom templates know
SECRET = secrets.token_hex(8)  # special tokens are read from text by names that nobody can type


class Tokenizer:
    """Text to ids and back as transformers does it from the same files, but for one thing: the text of a special token
    becomes that token only with `special=True`, and in a chat only where the template wrote it. What a person types,
    or a data set holds, never does. Added tokens that are not special (<think>) are text like any other."""

    def __init__(self, library, settings: dict, files=None, ends=(), folder="", encode=None):
        """`library`: a tokenizers.Tokenizer. `settings`: tokenizer_config.json. `encode`: a faster way to its ids."""
        self.names = _name_special(library, settings, ends)  # what chat templates call the tokens
        tokens = library.get_added_tokens_decoder()  # id -> token
        self.special_ids = {i for i, token in tokens.items() if token.special}  # left out of text
        self.specials = {token.content: i for i, token in tokens.items()}  # all added tokens, special or not
        known = {*library.get_vocab().values(), *tokens}
        self.vocab_size = max(known) + 1
        if self.names.get("eos_token") not in self.specials:
            raise ValueError(f"{folder}: no end-of-sequence token; name `eos_token` in tokenizer_config.json")
        self.eos_id = self.specials[self.names["eos_token"]]
        ends = (i for i in ends if i in known)  # some files list -1, or an id of another tokenizer's
        self.end_ids = tuple(dict.fromkeys([self.eos_id, *ends]))  # all that end an answer; `eos_id` is the first
        first = library.encode("a")  # with what its post-processor puts before it: transformers goes by that alone
        self.bos_id = first.ids[0] if first.special_tokens_mask[:1] == [1] else None  # before every plain text
        # PAD is no end: a model that is not scored on its ends never learns to stop. Masks come from lengths, so any
        # other id will do where the files name none.
        pad = self.specials.get(self.names.get("pad_token"), -1)
        self.pad_id = next(i for i in (pad, *range(len(self.end_ids) + 1)) if i >= 0 and i not in self.end_ids)
        self.files, self.folder = files or {}, folder
        self.templates = _chat_templates(settings, self, folder)
        self.template = self.templates["default"]
        self._library, self.added = library, tokens
        kept = self.special_ids | self._turn_markers()  # no text becomes one of these
        for i in kept - self.special_ids:
            tokens[i].special = True
            library.add_special_tokens([tokens[i]])
        self._prefixes = any(token in ("▁a", "Ġa", "▁") for token in first.tokens)  # begins texts with a blank
        self._special_texts = _any_of(tokens[i].content for i in kept)
        self._end_texts = _any_of(tokens[i].content for i in self.end_ids if i in tokens)
        sides = {i: dict(lstrip=tokens[i].lstrip, rstrip=tokens[i].rstrip) for i in kept}
        library.add_tokens([type(tokens[i])(_alias(i), **sides[i], normalized=False) for i in kept])
        self._real = {library.token_to_id(_alias(i)): i for i in kept}
        self._encode = encode or (lambda text: library.encode(text, add_special_tokens=False).ids)

    def _turn_markers(self) -> set[int]:
        """Added tokens that the template writes around turns, also those that the files do not call special (R1's
        <｜User｜>). What comes in pairs (<think>, </think>) is no such marker: it belongs to an answer's text."""
        chat, written = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")], ""
        for messages in (chat, chat[1:]) if {*self.specials.values()} - self.special_ids else ():
            with suppress(ValueError):  # not all templates know a system's turn
                written += self.render(messages, True)
        closing = {text for text in self.specials if text.startswith("</")}
        single = self.specials.keys() - closing - {text.replace("/", "", 1) for text in closing}
        return {self.specials[x] for x in single if x in written and re.fullmatch(r"<.+>|\[.+\]", x)}

    def encode(self, text: str, special: bool = False, after: str = "") -> list[int]:
        """`after`: the end of the text that this one goes on from. Vocabularies that begin a text with a blank of their
        own (SentencePiece's) put none there, and some special tokens take the blanks after them."""
        text = self._aliased(text) if special else text
        if not (after and text and (self._prefixes or SECRET in after)):
            return self._read(text)
        before, joint = self._read(after), self._read(after + text)
        return joint[len(before) :] if joint[: len(before)] == before else self._read(text)

    def _read(self, text: str) -> list[int]:
        ids = self._encode(text) if text else []
        return [self._real.get(i, i) for i in ids] if SECRET in text else ids

    def _aliased(self, text: str) -> str:
        return self._special_texts.sub(lambda found: _alias(self.specials[found[0]]), text)

    def decode(self, ids) -> str:
        """Text of the ids; special tokens are left out."""
        return self._decode([i for i in map(int, ids) if i not in self.special_ids])

    def _decode(self, ids) -> str:
        """Text of all ids, special tokens too: to look at."""
        return self._library.decode(ids, skip_special_tokens=False)

    def decode_rows(self, tokens, mask) -> list[str]:
        """The text of each row of ids (B, T), without the ids whose mask is 0."""
        return [self.decode(ids[m > 0]) for ids, m in zip(*to_numpy((tokens, mask)))]

    def token_bytes(self, token_id: int) -> bytes:
        """A token's own bytes; in a byte-level vocabulary they may be only a part of a character."""
        text, decoder = self._library.id_to_token(token_id) or "", str(self._library.decoder)
        if token_id in self.added:
            return text.encode()
        if "ByteLevel" in decoder:
            return b"".join(bytes([BYTES[c]]) if c in BYTES else c.encode() for c in text)
        if "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", text):
            return bytes([int(text[3:5], 16)])
        return text.replace("▁", " ").encode()

    @cached_property
    def fingerprint(self) -> str:
        """Tokenizers with the same fingerprint give the same ids: a reward model can then score a policy's ids as they
        are."""
        probe = "The quick brown fox, 12 dogs.\n\n1. Human:  é? e\u0301 ½ i'll DO 東京🦊\r\n\t i do not know ."
        end = self.names["eos_token"]
        probes = [self.encode(probe), self.encode(f"{end}the{end} the {end}", special=True)]
        words = sorted((i, word) for word, i in self._library.get_vocab().items() if i not in self._real)
        facts = [probes, words, self.specials, sorted(self._real.values())]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def chat(self, messages: list[dict], reply: bool = True) -> list[int]:
        """Ids of a conversation; `reply` opens the assistant's next turn."""
        messages, mark = self.hide(messages)
        return self.reveal(self.render(messages, reply), mark)

    def render(self, messages: list[dict], reply: bool) -> str:
        """The messages as the template writes them. BadRow where it refuses them, with its reason."""
        given = dict(messages=messages, add_generation_prompt=reply, tools=None, documents=None)
        template = self._template
        try:
            return template.render(given | self.names)
        except Exception as error:  # somebody's code: it may fail in any way
            raise BadRow(f"the chat template refuses these messages: {str(error) or type(error).__name__}") from None

    @cached_property
    def _template(self):
        try:
            return template_environment().from_string(self.template)
        except Exception as error:
            where = f"{self.folder}: its chat template cannot be read (line {getattr(error, 'lineno', '?')}: {error})"
            raise ValueError(f"{where}; mend it, or take it out of the folder") from None

    def hide(self, messages: list[dict]) -> tuple[list[dict], str]:
        """(messages, mark): the messages with a mark, a character that they do not hold, after each character of what
        reads like a special token. `reveal` tells by it what a person wrote from what the template wrote."""
        names = [self.added[i].content for i in self._real.values()]
        for role in {message["role"] for message in messages} - ROLES:  # <|{role}|> in a template would be the token
            if found := [name for name in names if role in name]:
                raise BadRow(f"the role {role!r} is a part of the special token {found[0]}: name it otherwise")
        said = json.dumps(messages, ensure_ascii=False)
        mark = next(c for c in map(chr, range(0xF0000, 0x10FFFE)) if c not in said)
        split = lambda text: self._special_texts.sub(lambda found: "".join(c + mark for c in found[0]), text)
        return _map_texts(messages, split), mark

    def has_special(self, value) -> bool:
        """Whether a text, or one in messages, holds the text of a special token."""
        return _map_texts(value, lambda text: self._special_texts.sub("", text)) != value

    def reveal(self, text: str, mark: str, before: str = "") -> list[int]:
        """Ids of a text that the template made of messages that `hide` marked; `before`: what it wrote before that."""
        token = re.search(rf"({self._special_texts.pattern})\Z", before)
        after = before and (self._aliased(token[0]) if token else "\n")
        return self.encode(self._aliased(text).replace(mark, ""), after=after)

    def turn(self, messages: list[dict]) -> tuple[str, str]:
        """(opened, said) of the last message: the template's text up to where the message begins, and the message as
        the template writes it, up to the token that ends the turn. Some templates open a turn in one way and write a
        finished one in another (they cut its thoughts): there `said` is the bare content, without the <think> that
        the template has opened the turn with."""
        opened, finished = self.render(messages[:-1], True), self.render(messages, False)
        if finished.startswith(opened):
            said = finished.removeprefix(opened)
        else:
            tag = re.search(r"(?:<[^<>\s]+>\s*)?\Z", opened)[0]  # R1's <think>: an answer that has it too says it once
            said = messages[-1]["content"].removeprefix(tag).removeprefix(tag.strip())
        end = self._end_texts.search(said)
        return opened, said[: end.end()] if end else said


def _alias(token_id: int) -> str:
    return f"\ue000{SECRET}-{token_id}\ue001"


def _any_of(texts) -> re.Pattern:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def _map_texts(value, change):
    """A JSON value with its texts changed."""
    if isinstance(value, dict):
        return {name: _map_texts(x, change) for name, x in value.items()}
    if isinstance(value, list):
        return [_map_texts(x, change) for x in value]
    return change(value) if isinstance(value, str) else value


def _name_special(library, settings: dict, ends) -> dict[str, str]:
    """Make special the tokens that the folder's settings name ("bos_token" and the like, some of the model's own), and
    the added tokens among its ends: -> name -> text. A text that is not in the vocabulary is passed over: the model has
    no row for it."""
    import tokenizers

    declared = {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    make = lambda token: tokenizers.AddedToken(**{key: x for key, x in token.items() if key != "__type"})
    added = library.get_added_tokens_decoder()  # of which the settings have the last word
    library.add_tokens([t for i in sorted(declared) if (t := make(declared[i])) != added.get(i)])
    added = library.get_added_tokens_decoder()
    named = {name: token for name, token in settings.items() if name.endswith("_token")}
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or {}
    listed = more if isinstance(more, list) else []
    named |= (settings.get("model_specific_special_tokens") or {}) | ({} if listed else more)
    text_of = lambda token: token["content"] if isinstance(token, dict) else token
    texts = {name: text_of(token) for name, token in named.items() if token and isinstance(token, str | dict)}
    if "eos_token" not in texts and ends:  # a folder may name it by id only
        words = {i: word for word, i in library.get_vocab().items()}
        texts["eos_token"] = next((words[i] for i in ends if i in words), None)
    known = {token.content: token for token in added.values()}
    others = [added[i].content for i in ends if i in added] + [x for x in map(text_of, listed) if x not in known]
    for text in {*texts.values(), *others} - {None}:
        token = known.get(text, tokenizers.AddedToken(text, normalized=False))
        if not token.special and library.token_to_id(text) is not None:
            token.special = True
            library.add_special_tokens([token])
    return texts


def _chat_templates(settings: dict, tokenizer: Tokenizer, folder) -> dict[str, str]:
    """The folder's templates by name, of which "default" is used; where it has none, ChatML or plain text."""
    found = settings.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else {"default": found}
    if "default" not in named:
        raise ValueError(f"{folder}: none of its chat templates ({', '.join(named)}) is named default: rename one")
    ours = CHATML_TEMPLATE if {"<|im_start|>", "<|im_end|>"} <= tokenizer.specials.keys() else PLAIN_TEMPLATE
    named["default"] = named["default"] or (ours if tokenizer.bos_id is None else "{{ bos_token }}" + ours)
    return named | {Path(name).stem: text.decode() for name, text in tokenizer.files.items() if "/" in name}


@lru_cache
def template_environment():
    """Where chat templates run: a sandbox, since they are somebody's code, with what transformers offers them."""
    from jinja2 import ext, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(ext.Extension):
        """{% generation %} marks the assistant's text for training; here the roles do."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)

    def refuse(message):
        raise ValueError(message)

    tags = [Generation, ext.loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=tags)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals |= dict(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    return environment


def load_tokenizer(path) -> Tokenizer | None:
    """The tokenizer of a folder: `tokenizer.json`, or GPT-2's `vocab.json` + `merges.txt` (also under their first
    names, `encoder.json` + `vocab.bpe`). None where there is none."""
    path, encode = Path(path), None
    old_names = {"vocab.json": path / "encoder.json", "merges.txt": path / "vocab.bpe"}
    files = {name: (path / name).read_bytes() for name in TOKENIZER_FILES if (path / name).is_file()}
    files |= {name: old.read_bytes() for name, old in old_names.items() if name not in files and old.is_file()}
    files |= {f"{file.parent.name}/{file.name}": file.read_bytes() for file in path.glob(OTHER_TEMPLATES)}
    settings = json.loads(files.get("tokenizer_config.json", "{}"))
    if "added_tokens_decoder" not in settings:  # transformers reads the older file only where this is not there
        settings |= json.loads(files.get("special_tokens_map.json", "{}"))
    if "chat_template.jinja" in files:
        settings["chat_template"] = files["chat_template.jinja"].decode()
    if "tokenizer.json" in files:
        library = _read_tokenizer_json(files["tokenizer.json"], settings, path)
    elif {"vocab.json", "merges.txt"} <= set(files):
        added = {i: {"content": text} for text, i in json.loads(files.get("added_tokens.json", "{}")).items()}
        settings = {"eos_token": "<|endoftext|>"} | ({"added_tokens_decoder": added} if added else {}) | settings
        library, encode = _gpt2_tokenizer(json.loads(files["vocab.json"]), files["merges.txt"].decode().split("\n"))
        encode = None if "added_tokens_decoder" in settings else encode  # it knows none of them
    else:
        return None
    return Tokenizer(library, settings, files, _end_ids(path), path, encode)


def _end_ids(path: Path) -> list[int]:
    """The ids at which generation ends, as the model's folder lists them: one id, several, or none."""
    for name in ("generation_config.json", "config.json"):
        if (path / name).is_file():
            ids = json.loads((path / name).read_text()).get("eos_token_id")
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []


def _read_tokenizer_json(raw: bytes, settings: dict, path: Path):
    """`tokenizer.json` as the tokenizers library reads it, changed where transformers goes by the settings instead."""
    import tokenizers

    try:
        library = tokenizers.Tokenizer.from_buffer(raw)
    except Exception as error:
        raise ValueError(f"{path / 'tokenizer.json'} cannot be read: {error}") from None
    library.no_truncation()
    library.no_padding()
    library.encode_special_tokens = True  # the texts of special tokens are text
    llama = str(settings.get("tokenizer_class")).removesuffix("Fast") == "LlamaTokenizer"
    if llama and "ByteLevel" not in str(library.decoder):
        # transformers goes by the settings here: a blank before the text alone, or after special tokens as well
        where = "always" if settings.get("legacy") else "first"
        back = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
        if settings.get("add_prefix_space") is False:
            where = "never"
        else:
            back.append(tokenizers.decoders.Strip(" ", 1, 0))
        library.normalizer, library.pre_tokenizer = None, tokenizers.pre_tokenizers.Metaspace("▁", where, split=False)
        library.decoder = tokenizers.decoders.Sequence(back)
    return library


# Byte-level BPE writes each byte as a printable character: character -> byte
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


def _gpt2_tokenizer(vocab: dict, merges: list[str]):
    """GPT-2's byte pairs as a tokenizers.Tokenizer, and their ids through tiktoken, at several times its speed."""
    import tiktoken
    import tokenizers

    pairs = [tuple(line.split(" ")) for line in merges if line and not line.startswith("#version")]
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.add_special_tokens(["<|endoftext|>"])
    library.encode_special_tokens = True
    # tiktoken merges the pair of lowest rank: single bytes first, then the results of the merges in their order
    tokens = [t for t in dict.fromkeys([*BYTES, *map("".join, pairs)]) if t in vocab]
    end = library.token_to_id("<|endoftext|>")
    ids = np.array([vocab[t] for t in tokens] + [len(library.get_vocab())])  # where `library` puts the alias
    ranks = {bytes(BYTES[c] for c in t): rank for rank, t in enumerate(tokens)}
    quick = tiktoken.Encoding(
        "gpt2", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens={_alias(end): len(tokens)}
    )
    return library, lambda text: ids[quick.encode(text, allowed_special="all")].tolist()


def need_tokenizer(path) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise FileNotFoundError(
            f"no tokenizer in {path}: it takes tokenizer.json, or vocab.json and merges.txt; copy them there"
        )
    return tokenizer


def check_same_tokenizer(ours: Tokenizer, theirs: Tokenizer | None, our_name, their_name):
    if theirs is None or ours.fingerprint != theirs.fingerprint:
        raise ValueError(
            f"{their_name} has another tokenizer than {our_name}: their token ids do not mean the same. Give a model "
            f"that has the tokenizer of {our_name}"
        )


def check_tokenizer_of(folder, tokenizer: Tokenizer, ours):
    """ValueError unless a model's folder (or Hub name) has the tokenizer of `ours`, which is given."""
    check_same_tokenizer(tokenizer, need_tokenizer(find_folder(folder)), ours, folder)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Model folders, in the layout of Hugging Face


def layout(config: Config) -> list[tuple[str, str, bool]]:
    """(our leaf, Hugging Face's tensor name, transposed?) for every tensor; {i} is the layer."""
    if config.gpt2:
        head, block, transposed = "transformer.", "transformer.h.{i}.", False  # GPT-2's Conv1D is (in, out) as ours
        linears = dict(q="attn.q", k="attn.k", v="attn.v", o="attn.c_proj", up="mlp.c_fc", down="mlp.c_proj")
        names = [("wte", head + "wte.weight", False), ("wpe", head + "wpe.weight", False)]
        norms = dict(norm="ln_f", norm1="ln_1", norm2="ln_2")
    else:
        head, block, transposed = "model.", "model.layers.{i}.", True
        linears = {x: f"self_attn.{x}_proj" for x in "qkvo"} | {x: f"mlp.{x}_proj" for x in ("gate", "up", "down")}
        names = [("wte", head + "embed_tokens.weight", False)]
        norms = dict(norm="norm", norm1="input_layernorm", norm2="post_attention_layernorm")
        norms |= dict(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm") if config.qk_norm else {}
    biased = dict.fromkeys("qkv", config.qkv_bias) | dict(o=config.out_bias)
    for ours, theirs in norms.items():
        prefix, path = (head, "") if ours == "norm" else (block, "blocks.")
        names.append((f"{path}{ours}.scale", f"{prefix}{theirs}.weight", False))
        if config.gpt2:
            names.append((f"{path}{ours}.bias", f"{prefix}{theirs}.bias", False))
    for ours, theirs in linears.items():
        names.append((f"blocks.{ours}.weight", f"{block}{theirs}.weight", transposed))
        if biased.get(ours, config.mlp_bias):
            names.append((f"blocks.{ours}.bias", f"{block}{theirs}.bias", False))
    if not config.tied:
        names.append(("head", "lm_head.weight", False))
    return names


ROPE_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def config_to_hf(config: Config) -> dict:
    """`config.json` as transformers 4 and 5 both read it."""
    c = config
    if c.gpt2:
        keys = dict(n_embd=c.dim, n_layer=c.layers, n_head=c.heads, n_positions=c.context, n_inner=c.ffn)
        keys |= dict(activation_function="gelu_new", layer_norm_epsilon=c.norm_eps)
        keys |= dict(attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    else:
        keys = dict(hidden_size=c.dim, num_hidden_layers=c.layers, num_attention_heads=c.heads)
        keys |= dict(num_key_value_heads=c.kv_heads, head_dim=c.head_dim, intermediate_size=c.ffn, hidden_act="silu")
        keys |= dict(max_position_embeddings=c.context, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta)
        scaling = None
        if c.rope_scaling:
            scaling = {"rope_type": "llama3"} | dict(zip(ROPE_SCALING, c.rope_scaling))
            scaling["original_max_position_embeddings"] = int(c.rope_scaling[3])
        keys["rope_scaling"] = scaling
        keys["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta} | (scaling or {})
        keys |= dict(attention_bias=c.qkv_bias) if c.family != "qwen2" else {}
        keys |= dict(mlp_bias=c.mlp_bias) if c.family == "llama" else {}
    name = "GPT2LMHeadModel" if c.gpt2 else c.family.capitalize() + "ForCausalLM"
    common = dict(architectures=[name], model_type=c.family, vocab_size=c.vocab_size, tie_word_embeddings=c.tied)
    return common | keys | dict(torch_dtype="float32")


SHARED_DEFAULTS = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, head_dim=None,
    intermediate_size=22016, hidden_act="silu", vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
    tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
)  # fmt: skip

HF_DEFAULTS = {  # what config.json may leave out, by model_type: as the configuration classes of transformers 5.24 say
    "gpt2": dict(
        n_embd=768, n_layer=12, n_head=12, n_inner=None, n_positions=1024, vocab_size=50257, layer_norm_epsilon=1e-5,
        tie_word_embeddings=True, activation_function="gelu_new",
    ),
    "llama": SHARED_DEFAULTS | dict(
        vocab_size=32000, intermediate_size=11008, max_position_embeddings=2048, num_key_value_heads=None,
    ),
    "mistral": SHARED_DEFAULTS | dict(
        vocab_size=32000, intermediate_size=14336, max_position_embeddings=131072, num_key_value_heads=8,
        sliding_window=4096,
    ),
    "qwen2": SHARED_DEFAULTS | dict(sliding_window=4096, max_window_layers=28),
    "qwen3": SHARED_DEFAULTS | dict(head_dim=128, sliding_window=4096, max_window_layers=28),
}  # fmt: skip

COMPUTED = {  # settings of config.json that change what a model computes: the values that are computed here
    "quantization_config": (None,), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    "hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0, None), "rope_type": ("default", "llama3"),
    "is_causal": (True,),
}  # fmt: skip


def config_from_hf(hf: dict, path="config.json") -> Config:
    """A Config from `config.json` in transformers 4's spelling (rope_theta) or 5's (rope_parameters). What it leaves
    out has the default of transformers; what is not computed here is refused by name. A Mistral without sliding windows
    computes what a Llama does, and becomes one."""
    family = hf.get("model_type")
    if family not in HF_DEFAULTS:
        why = " (norms, activation and local attention of its own)" if str(family).startswith("gemma") else ""
        raise ValueError(f"{path}: model_type {family!r}{why} is not computed here, only {', '.join(HF_DEFAULTS)}")
    hf = HF_DEFAULTS[family] | hf
    _refuse_unknown(path, hf)
    return _gpt2_config(hf) if family == "gpt2" else _rotary_config(hf, path)


def _gpt2_config(hf: dict) -> Config:
    heads, dim = hf["n_head"], hf["n_embd"]
    return Config(
        vocab_size=hf["vocab_size"], context=hf["n_positions"], layers=hf["n_layer"], heads=heads, dim=dim,
        ffn=hf["n_inner"] or 4 * dim, kv_heads=heads, head_dim=dim // heads, family="gpt2",
        norm_eps=hf["layer_norm_epsilon"], tied=hf["tie_word_embeddings"], qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


def _rotary_config(hf: dict, path) -> Config:
    """Of the families with rotary positions: all but GPT-2."""
    family, heads, dim = hf["model_type"], hf["num_attention_heads"], hf["hidden_size"]
    rope = {"rope_theta": hf.get("rope_theta", 10000.0)} | (hf.get("rope_scaling") or hf.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    _refuse_unknown(path, rope | {"rope_type": kind})
    if family != "llama":  # which knows no windows
        _refuse_windows(hf, path)
    original = hf.get("original_max_position_embeddings") or rope.get(ROPE_SCALING[-1], hf["max_position_embeddings"])
    return Config(
        vocab_size=hf["vocab_size"],
        context=hf["max_position_embeddings"],
        layers=hf["num_hidden_layers"],
        heads=heads,
        dim=dim,
        ffn=hf["intermediate_size"],
        kv_heads=hf["num_key_value_heads"] or heads,
        head_dim=hf["head_dim"] or dim // heads,
        family="llama" if family == "mistral" else family,
        norm_eps=hf["rms_norm_eps"],
        tied=hf["tie_word_embeddings"],
        qkv_bias=family == "qwen2" or (family != "mistral" and hf["attention_bias"]),
        out_bias=family in ("llama", "qwen3") and hf["attention_bias"],
        mlp_bias=family == "llama" and hf["mlp_bias"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=(*(float(rope[x]) for x in ROPE_SCALING[:-1]), float(original)) if kind == "llama3" else None,
    )


def _refuse_windows(hf: dict, path):
    """ValueError where some layers see only a window of the tokens, and rows may be longer than it."""
    window, context = hf.get("sliding_window"), hf["max_position_embeddings"]
    beyond = hf.get("use_sliding_window") and hf["num_hidden_layers"] > hf["max_window_layers"]  # Qwen's later layers
    slides = hf["model_type"] == "mistral" or beyond or "sliding_attention" in (hf.get("layer_types") or ())
    if slides and window is not None and window < context:
        raise ValueError(
            f"{path}: sliding_window = {window} is not supported, since rows may be longer (max_position_embeddings = "
            f"{context}); where yours never are, write {window} there"
        )


def _refuse_unknown(path, settings: dict):
    for name, values in COMPUTED.items():
        if settings.get(name, values[0]) not in values:
            only = ", ".join(map(str, values))
            raise ValueError(f"{path}: {name} = {settings[name]!r:.60} is not supported (only {only})")


def load(path) -> tuple[GPT | ScoreModel, Tokenizer | None]:
    """A model folder (or the name of one on the Hub) as (model, tokenizer). A folder saved as a sequence classifier
    comes back as a ScoreModel. Every tensor's name and shape is checked; what is missing or left over is named."""
    path = find_folder(path)
    hf = json.loads((path / "config.json").read_text())
    config = config_from_hf(hf, path / "config.json")
    scores = hf["architectures"][0].endswith("SequenceClassification") if hf.get("architectures") else False
    tensors = read_tensors(path)
    check_head(config, tensors, path)
    if scores:
        config = dataclasses.replace(config, tied=True)  # classifiers are stored without the output head
    model = _fill(config, tensors, path, hf.get("score", {}) if scores else None)
    return model, load_tokenizer(path)


def load_policy(path, tokenizer_path=None) -> tuple[GPT, Tokenizer]:
    """A language model, and the tokenizer of its folder or of another one, for whatever writes text or learns to. Ids
    that the model has and the tokenizer lacks get no probability."""
    model, tokenizer = load(path)
    if isinstance(model, ScoreModel):
        raise ValueError(
            f"{path} is a reward model, not a language model: give a folder that sft.py or a script that trains "
            "policies wrote (evaluate.py --rewards compares reward models)"
        )
    if tokenizer_path or tokenizer is None:
        tokenizer = need_tokenizer(tokenizer_path or path)
    if tokenizer.vocab_size > model.config.vocab_size:  # indexing would clamp, silently
        raise ValueError(
            f"the tokenizer of {tokenizer_path or path} has {tokenizer.vocab_size} ids, more than the "
            f"{model.config.vocab_size} of the model in {path}: it belongs to another model"
        )
    if tokenizer.vocab_size < model.config.vocab_size:
        known = dataclasses.replace(model.config, known_ids=tokenizer.vocab_size)
        model = dataclasses.replace(model, config=known)
    return model, tokenizer


def load_frozen(path, dtype: str) -> GPT:
    """A model that does not learn (reference, teacher), in the precision of the forward pass. It is loaded once more,
    since a training step overwrites the arrays of the model that learns."""
    return shard(cast(load_policy(path)[0], compute_dtype(dtype)))


def find_folder(path) -> Path:
    """A local model folder, downloaded first where `path` is a name on the Hub."""
    folder = Path(path)
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors*")):
        return folder
    if folder.exists() or str(path).startswith((".", "/", "out/")) or str(path).count("/") > 1:
        if list(folder.glob("member-*")):
            raise FileNotFoundError(f"{path} holds an ensemble, and one model is needed here: name one of its member-*")
        if folder.suffix == ".gguf" or (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{path} is no model folder: python convert.py {path} MODEL makes one of it")
        if list(folder.glob("*.bin")):
            raise FileNotFoundError(f"{path} holds pickled weights (.bin): save them as safetensors with transformers")
        if (folder / "checkpoint").is_dir():
            raise FileNotFoundError(f"no model in {path} yet: its run has not ended, and goes on with --resume")
        raise FileNotFoundError(
            f"no model in {path} (config.json and model.safetensors). The Makefile has the command that makes each "
            "folder of the toy world, and `make demo` makes all; for your own, train it first or check the path"
        )
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "model*.safetensors", "merges.txt", "*.jinja"]
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as error:
        raise FileNotFoundError(
            f"{path} is neither a model folder here nor a model that the Hub could give ({type(error).__name__}). "
            f"Without a network, download it elsewhere and give the folder's path."
        ) from error


def ensemble_folders(path) -> list:
    """The members of an ensemble's folder; the path itself where it holds one model."""
    return sorted(Path(path).glob("member-*")) or [path]


STORED_TYPES = dict(F64=np.float64, F32=np.float32, F16=np.float16, BF16=jnp.bfloat16, U8=np.uint8, BOOL=np.bool_)


def weight_files(path: Path) -> list[Path]:
    """The files with a folder's weights: model.safetensors, or those that its index lists. Beside them may lie the same
    weights under other names (Mistral's consolidated.safetensors), or parts that an earlier save left."""
    index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    if index.is_file() and not whole.is_file():
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    return [whole] if whole.is_file() else sorted(path.glob("*.safetensors"))


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors in a folder's files by name, mapped into memory: the disk is read when they are copied."""
    from safetensors import safe_open

    tensors = {}
    for file in weight_files(path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing: model.safetensors.index.json lists it")
        try:
            with safe_open(file, "numpy"):  # checks that the file is whole, and its table of tensors right
                data = np.memmap(file, np.uint8, "r")
        except Exception as error:
            raise ValueError(f"{file} cannot be read ({error}): it is truncated or not a safetensors file") from error
        first = 8 + int.from_bytes(data[:8], "little")  # 8 bytes with the length of the table, the table, the numbers
        table = json.loads(bytes(data[8:first]))
        table.pop("__metadata__", None)
        for name, about in table.items():
            if about["dtype"] not in STORED_TYPES:
                raise ValueError(
                    f"{file}: tensor {name} is of type {about['dtype']}, only {', '.join(STORED_TYPES)} here"
                )
            start, end = about["data_offsets"]
            array = data[first + start : first + end].view(STORED_TYPES[about["dtype"]])
            tensors[name] = array.reshape(about["shape"])
    return tensors


def check_head(config: Config, tensors: dict, path):
    """ValueError where a file has a head of its own, and the configuration says that the embedding is the head."""
    name = layout(config)[0][1]
    table, head = tensors.get(name, tensors.get(name.removeprefix("transformer."))), tensors.get("lm_head.weight")
    if config.tied and table is not None and head is not None and not np.array_equal(table, head):
        raise ValueError(
            f"{path}: lm_head.weight is another table than {name}, and tie_word_embeddings = true in config.json says "
            "that they are one: write false there, or take lm_head.weight out of the file"
        )


def _fill(config: Config, tensors: dict, path, score: dict | None) -> GPT | ScoreModel:
    """The model with the file's tensors as its arrays. `score`: settings of the scalar head, if it has one."""
    tensors = _canonical_names(config, tensors)
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    filled = {}
    for ours, theirs, transposed in layout(config):
        shape, stacked = attrgetter(ours)(shapes).shape, "{i}" in theirs
        filled[ours] = _aligned(shape)
        names = [theirs.format(i=i) for i in range(config.layers)] if stacked else [theirs]
        for name, target in zip(names, filled[ours] if stacked else filled[ours][None]):
            target = target.T if transposed else target
            if name not in tensors:
                raise ValueError(f"{path}: tensor {_stored_name(name)} is missing")
            array = tensors.pop(name)
            if array.shape != target.shape:
                name, needed = _stored_name(name), target.shape
                raise ValueError(f"{path}: tensor {name} has shape {array.shape}, the configuration needs {needed}")
            target[...] = array
    model = jax.tree_util.tree_map_with_path(lambda p, _: jax.device_put(filled.pop(_path(p))), shapes)
    if score is not None:
        model = _fill_score(model, tensors, path, score)
    if tensors:
        raise ValueError(f"{path}: tensors that the configuration does not know: {', '.join(sorted(tensors)[:5])}")
    return model


def _aligned(shape) -> np.ndarray:
    """An empty fp32 array that begins at a multiple of 64 bytes: on a CPU, JAX then takes it as it is, without a
    copy."""
    memory = np.empty(math.prod(shape) + 15, np.float32)
    start = -memory.ctypes.data % 64 // 4
    return memory[start : start + math.prod(shape)].reshape(shape)


def _fill_score(body: GPT, tensors: dict, path, score: dict) -> ScoreModel:
    if "score.weight" not in tensors or tensors["score.weight"].shape != (1, body.config.dim):
        found = tensors["score.weight"].shape if "score.weight" in tensors else "no such tensor"
        raise ValueError(f"{path}: score.weight must be (1, {body.config.dim}), one label: found {found}")
    head = jnp.array(tensors.pop("score.weight")[0], jnp.float32)
    query = jnp.array(tensors.pop("score.query")) if score.get("pool") == "attention" else None
    bias = jnp.asarray(score.get("bias", 0.0), jnp.float32)
    return ScoreModel(body, head, query, bias, score.get("pool", "last"), tuple(score.get("suffix", ())))


def _canonical_names(config: Config, tensors: dict) -> dict:
    """Undo what differs between files of one family: missing prefixes, buffers, a stored tied head, fused q, k, v."""
    renamed = {}
    for name, array in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")):
            continue  # buffers: causal masks and rotary tables
        if config.gpt2 and not name.startswith(("transformer.", "lm_head.", "score.")):
            name = "transformer." + name
        if ".attn.c_attn." in name:
            parts = np.split(array, 3, axis=-1) if array.shape[-1] % 3 == 0 else [array] * 3
            renamed |= {name.replace("c_attn", x): part for x, part in zip("qkv", parts)}
        elif name == "lm_head.weight" and config.tied:
            renamed.setdefault(layout(config)[0][1], array)  # stored under either name, or both
        else:
            renamed[name] = array
    return renamed


def _stored_name(name: str) -> str:
    for x in "qkv":  # GPT-2 stores these three as one
        name = name.replace(f".attn.{x}.", f".attn.c_attn.[{x}].")
    return name


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def save(path, model: GPT | ScoreModel, tokenizer: Tokenizer | None, extra: dict | None = None, dtype=np.float32):
    """Write a model folder that transformers, vLLM and llama.cpp's converter read: config.json, model.safetensors, the
    tokenizer's files and, of a language model, generation_config.json. `extra` joins config.json. Each file is written
    aside and renamed into place."""
    from safetensors.numpy import save_file

    path, scores = Path(path), isinstance(model, ScoreModel)
    path.mkdir(parents=True, exist_ok=True)
    body = model.body if scores else model
    tensors = {}
    for ours, theirs, transposed in layout(body.config):
        array = np.asarray(to_numpy(attrgetter(ours)(body)), dtype)
        stacked = [(theirs.format(i=i), x) for i, x in enumerate(array)] if "{i}" in theirs else [(theirs, array)]
        # safetensors silently stores a transposed view in the wrong order
        tensors |= {name: np.ascontiguousarray(x.T if transposed else x) for name, x in stacked}
    for i in range(body.config.layers if body.config.gpt2 else 0):
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"transformer.h.{i}.attn.{x}.{kind}") for x in "qkv"]
            tensors[f"transformer.h.{i}.attn.c_attn.{kind}"] = np.concatenate(parts, axis=-1)
    hf = config_to_hf(body.config)
    if scores:
        tensors.pop("lm_head.weight", None)
        tensors["score.weight"] = np.asarray(to_numpy(model.head), dtype)[None]
        if model.query is not None:
            tensors["score.query"] = np.asarray(to_numpy(model.query), dtype)
        name = hf["architectures"][0].replace("LMHeadModel", "ForCausalLM")
        hf["architectures"] = [name.replace("CausalLM", "SequenceClassification")]
        hf |= dict(num_labels=1, id2label={"0": "score"}, label2id={"score": 0})
        hf["score"] = dict(pool=model.pool, bias=float(model.bias), suffix=list(model.suffix))
        hf["score_note"] = "the score is logit + bias; the suffix, if any, takes the place of the response's end token"
    if tokenizer is not None:
        hf |= dict(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id, bos_token_id=tokenizer.bos_id)
    if jax.process_index() == 0:
        write_atomic(path / "model.safetensors", lambda file: save_file(tensors, file, metadata={"format": "pt"}))
        for name, content in (tokenizer.files if tokenizer else {}).items():
            (path / name).parent.mkdir(exist_ok=True)
            write_atomic(path / name, lambda file, content=content: Path(file).write_bytes(content))
        if tokenizer is not None and not scores:
            write_json(path / "generation_config.json", generation_config(tokenizer))
        write_json(path / "config.json", hf | (extra or {}))


def generation_config(tokenizer: Tokenizer) -> dict:
    """How other programs are to generate: as the tokenizer's folder says, with its temperature and the like, until any
    of the tokenizer's ends. A PAD that is an ordinary token, as it is where the files name none, is not written: it
    would be shown as text."""
    found = json.loads(tokenizer.files.get("generation_config.json", "{}"))
    for name in ("_from_model_config", "transformers_version"):  # of whoever wrote it
        found.pop(name, None)
    ends = list(tokenizer.end_ids)
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if tokenizer.bos_id is not None:
        found["bos_token_id"] = tokenizer.bos_id
    if tokenizer.pad_id in tokenizer.special_ids:
        found["pad_token_id"] = tokenizer.pad_id
    return found


def save_adapter(path, model: "Adapter | ScoreModel", base):
    """Write an adapter, or a score model whose body is one, into the folder `path`: adapter.safetensors with each array
    under its name ("blocks.q.a" (L, I, r), "tables.wte.b" (r, D), a score's "head" (D,)), and adapter.json with the
    folder `base` of the frozen model and a hash of its weights. `convert.py` exports to PEFT."""
    from safetensors.numpy import save_file

    path, is_score = Path(path), isinstance(model, ScoreModel)
    adapter = model.body if is_score else model
    tensors = {}
    for leaf_path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = _path(leaf_path).removeprefix("body.")
        if not (is_score and name.startswith("tables.head.")):  # no score is read from the words' head
            tensors[name] = np.asarray(to_numpy(leaf), np.float32, order="C")
    layer = next(iter((adapter.blocks | adapter.tables).values()))
    about = dict(kind="reward model" if is_score else "policy", rank=layer.a.shape[-1], scale=layer.scale)
    about |= dict(pool=model.pool, suffix=model.suffix) if is_score else {}
    about |= dict(base=str(base), base_hash=weights_hash(find_folder(base)))
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / "adapter.safetensors", partial(save_file, tensors))
        write_json(path / "adapter.json", about)


def load_adapter(path, base) -> "Adapter | ScoreModel | None":
    """The adapter in PATH/adapter, to be attached to the model of the folder `base`. None where there is none, or where
    it was trained on other weights than those of `base`."""
    folder = Path(path) / "adapter"
    if not (folder / "adapter.json").is_file():
        return None
    about = json.loads((folder / "adapter.json").read_text())
    if about["base_hash"] != weights_hash(find_folder(base)):
        return None
    tensors = {name: jnp.array(x) for name, x in read_tensors(folder).items()}
    adapter = Adapter({}, {})
    for name in [name.removesuffix(".a") for name in tensors if name.endswith(".a")]:
        part, layer = name.split(".")
        correction = LoraLinear if part == "blocks" else LoraTable
        getattr(adapter, part)[layer] = correction(None, tensors[name + ".a"], tensors[name + ".b"], about["scale"])
    if about["kind"] == "policy":
        return adapter
    head, query, bias = tensors["head"], tensors.get("query"), tensors["bias"]
    return ScoreModel(adapter, head, query, bias, about["pool"], tuple(about["suffix"]))


def weights_hash(folder: Path) -> str:
    """A hash of a model folder's configuration and weights."""
    parts = [file_hash(file) for file in [folder / "config.json", *weight_files(folder)]]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:16]


def file_hash(path) -> str:
    stat = os.stat(path)
    return _file_hash(path, stat.st_mtime_ns, stat.st_size)


@lru_cache
def _file_hash(path, *state) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_atomic(path: Path, write):
    """write(temporary path), flush to disk, rename into place: a reader or a crash never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(str(temporary))
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_rows(path: Path, rows):
    """JSONL: one object a line."""
    write_atomic(Path(path), lambda file: Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows)))


def write_json(path: Path, value):
    write_atomic(Path(path), lambda file: Path(file).write_text(json.dumps(value, indent=2, default=str) + "\n"))


def remove(path: Path):
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# 8. Rows: one JSON object a line, in the formats that TRL documents


KINDS = {  # kind: the texts of a row that training reads. Demonstrations may be {messages}, and thumbs pairs
    "text": ["text"],
    "demos": ["prompt", "completion"],
    "pairs": ["prompt", "chosen", "rejected"],
    "thumbs": ["prompt", "completion"],
    "prompts": ["prompt"],
}
TEXTS = ("prompt", "completion", "chosen", "rejected", "messages", "text")  # the keys that hold text or messages
# Keys of rows and messages that change what they mean: what no text says, what `prepare.py` maps, what is learned.
NOT_TEXT = ("tools", "functions", "tool_calls", "function_call", "documents", "chat_template_kwargs")
NOT_TEXT += ("image", "images", "video", "videos", "audio", "audios")
MEANING, NOTHING = (*NOT_TEXT, "kto_tag", "system", "system_prompt", "history"), (None, "", [], {}, "[]", "{}", "null")
LEARNED, UNLEARNED = ("weight", "train", "trainable", "loss"), ("masked", "mask", "loss_mask")  # of messages


class BadRow(ValueError):
    """A row that cannot be used, with its reason."""


class Unfit(BadRow):
    """A sound row that has no place in this run: it is left out and counted. `tokens`: a length that it would fit."""

    def __init__(self, reason: str, tokens: int | None = None):
        super().__init__(reason)
        self.tokens = tokens


def open_text(path):
    path = Path(path)
    if not path.is_file():
        made = " (toy.py makes data/toy, rlaif.py data/rlaif, prepare.py rows from all other data)"
        raise FileNotFoundError(f"no data file {path}{made if 'data' in path.parts and not path.exists() else ''}")
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig")  # the mark that some editors put in front is not part of the text


def numbered_lines(path):
    """(number, line) of the lines of a text file that are not blank."""
    with open_text(path) as lines:
        try:
            yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is not whole UTF-8 text ({error})") from None


def read_rows(path, kind: str, skip_bad: bool = False):
    """Yield (line number, checked row) of a JSONL file. A bad line stops with file, line and reason; with `skip_bad` it
    is counted and the count printed."""
    bad = []
    for number, line in numbered_lines(path):
        try:
            yield from ((number, row) for row in check_row(parse_json(line), kind))
        except BadRow as error:
            if not skip_bad:
                raise BadRow(f"{path}:{number}: {error} (--skip-bad-rows goes on without such rows)") from None
            bad.append(f"{number}: {error}")
    if bad:
        print(f"{path}: {len(bad):,} bad rows skipped, for example line {bad[0]}", file=sys.stderr)


def parse_json(line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadRow(f"not JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise BadRow("JSON that is nested too deep") from None
    if not isinstance(row, dict):
        raise BadRow(f"a {type(row).__name__}, not an object")
    return row


def refuse_meaning(values: dict):
    """BadRow if one of the keys `MEANING` of a row or a message has a value that says something."""
    for name in MEANING:
        if values.get(name) not in NOTHING:
            why = "and training does not read it: `prepare.py` maps it, or says why it cannot"
            raise BadRow(f"`{name}` changes what a row means, {why}")


def check_row(row: dict, kind: str) -> list[dict]:
    """[row], or the two thumbs of a pair; BadRow where what training reads is missing or of another type, and where a
    key says something that would be lost. What is null is absent, as in tables."""
    known = (*TEXTS, *EXTRAS, "truncated")
    row = {name: value for name, value in row.items() if value is not None or name not in known}
    if kind == "thumbs" and row.get("label_p", 1) != 1:
        raise BadRow("`label_p` says that the label may be wrong, and a thumb cannot say it: dpo.py reads it, and IPO")
    if kind == "thumbs" and "chosen" in row:
        return split_pair(*check_row(row, "pairs"))
    for name in ["messages"] if kind == "demos" and "messages" in row else KINDS[kind]:
        _check_text(row, name)
    if kind != "text":
        refuse_meaning(row)
    if kind == "demos" and row.get("weight") not in (None, 1):
        raise BadRow("demonstrations have no `weight`: mix files by weight (a.jsonl:0.7 b.jsonl:0.3)")
    if kind == "demos" and row.get("label") == 0:
        raise BadRow(f"`label` is {row['label']!r}: a thumb, from which ipo_kto.py --loss kto learns, no demonstration")
    for name in ("margin", "weight", "label_p") if kind in ("pairs", "thumbs") else ():
        value, most = row.get(name, 0), 1 if name == "label_p" else sys.float_info.max
        if type(value) not in (int, float) or not 0 <= value <= most:  # NaN fails every comparison
            raise BadRow(f"`{name}` is {value!r}, not a number from 0 {'to 1' if most == 1 else 'up'}")
    sides = row.get("truncated") or []
    if sides and (
        sides is not True and not (isinstance(sides, list) and set(sides) <= row.keys()) or "messages" in row
    ):
        raise BadRow(
            f"`truncated` is {sides!r}: true, or a list of the answers that were cut, in {{prompt, completion}}"
        )
    if kind == "thumbs" and not isinstance(row.get("label"), bool):
        raise BadRow(f"`label` is {row.get('label')!r}, not true or false")
    return [row]


def _check_text(row: dict, name: str):
    """BadRow unless row[name] is a text or a list of messages that says something; an answer is one assistant turn."""
    if name not in row:
        prepare = "run `python prepare.py --data FILE --out data/NAME`, which maps other shapes to this one"
        if "chosen" in row:
            prepare += " and splits off the prompt that both sides begin with"
        raise BadRow(f"no `{name}` (found: {', '.join(row) or 'nothing'}): {prepare}")
    value, answer = row[name], name in ("completion", "chosen", "rejected")
    messages = [{"role": "assistant" if answer else "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise BadRow(f"`{name}` is {type(value).__name__}, not text or messages")
    text = lambda m: isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
    if not messages or not all(map(text, messages)):
        raise BadRow(f"`{name}` is a list, but not of {{role, content}} messages, or their content is not text")
    roles = [message["role"] for message in messages]
    if name == "messages" and "assistant" not in roles:
        raise BadRow("`messages` must be a list with at least one assistant turn")
    if answer and roles != ["assistant"]:  # only the last message would be trained on
        found = f"{len(roles)} messages" if len(roles) > 1 else f"a message of role {roles[0]!r}"
        raise BadRow(f"`{name}` holds {found}: an answer is one assistant turn; put earlier ones into the prompt")
    if not any(message["content"].strip() for message in messages):
        raise BadRow(f"`{name}` is empty")
    for message in messages:
        refuse_meaning(message)
        says = [message.get(x) for x in LEARNED if message.get(x) != 1] + [message.get(x) for x in UNLEARNED]
        if (answer or name == "messages") and any(value is not None for value in says):
            raise BadRow("messages have no `weight`, `train` or the like: `prepare.py` makes rows of what is learned")


def split_pair(row: dict) -> list[dict]:
    """A pair as two thumbs: the chosen answer with label true, the rejected one with label false."""
    rest = {name: value for name, value in row.items() if name not in ("chosen", "rejected", "truncated")}
    return [rest | completion_of(row, side) | {"label": side == "chosen"} for side in ("chosen", "rejected")]


def completion_of(row: dict, side: str) -> dict:
    """One side of a pair as {completion}, marked as truncated where that side was."""
    return {"completion": row[side]} | ({"truncated": ["completion"]} if side in truncated_sides(row) else {})


def find_kind(data, kinds, skip_bad: bool = False) -> str:
    """The first of `kinds` that the data's first row belongs to, or with `skip_bad` the first row that belongs to one;
    BadRow with the reason if there is none."""
    path, reason = parse_sources(data)[0][0], None
    for number, line in numbered_lines(path):
        reasons = []
        for kind in kinds:
            try:
                check_row(parse_json(line), kind)
                return kind
            except BadRow as error:
                reasons.append(str(error))
        # of a kind whose keys the row has, if there is one
        reason = reason or f"{path}:{number}: {min(reasons, key=lambda text: text.startswith('no `'))}"
        if not skip_bad:
            break
    raise BadRow(f"{reason or f'{path} holds no rows'}. This script reads {'; '.join(map(format_of, kinds))}")


def format_of(kind: str) -> str:
    """A kind of rows and its keys, in words."""
    more = {"demos": " or {messages}", "thumbs": " with a label, or pairs, which are split in two"}.get(kind, "")
    return f"{kind}: {{{', '.join(KINDS[kind])}}}{more}"


def heldout_file(data) -> str | None:
    """NAME-heldout.jsonl beside NAME.jsonl, where it exists."""
    path = Path(parse_sources(data)[0][0])
    name, dot, rest = path.name.partition(".")
    beside = path.with_name(f"{name}-heldout{dot}{rest}")
    return str(beside) if beside.is_file() else None


def parse_sources(data) -> list[tuple[str, float | None]]:
    """["a.jsonl:0.7", "b.jsonl:0.3"] -> [("a.jsonl", 0.7), ("b.jsonl", 0.3)]; None where no weight is given."""
    sources = []
    for item in [data] if isinstance(data, str | Path) else data:
        name, colon, weight = str(item).rpartition(":")
        try:
            sources.append((name, float(weight)) if colon and name else (str(item), None))
        except ValueError:
            sources.append((str(item), None))
    weights = [w for _, w in sources]
    if any(w is not None and not w > 0 for w in weights) or (None in weights and set(weights) != {None}):
        raise ValueError(f"--data {' '.join(map(str, data))}: give every file a weight above 0 (name:0.7), or none")
    return sources


# ---------------------------------------------------------------------------------------------------------------------
# 9. Tokens: rows as ids, cached on disk


SPECIAL_NOTE = "texts hold the text of a special token, such as a chat template's marker: it is read as letters"
EXTRAS = ("margin", "weight", "label_p", "label")  # optional numbers of a row: 0, 1, 1, 1 where absent


def encode_prompt(prompt, tokenizer: Tokenizer) -> list[int]:
    """Ids of a text or of messages. Where the last of these is the assistant's, an answer goes on with it."""
    if isinstance(prompt, str):
        return [i for i in (tokenizer.bos_id,) if i is not None] + tokenizer.encode(prompt)
    if goes_on(prompt):
        return tokenizer.chat(prompt[:-1]) + encode_opening(prompt[:-1], prompt[-1]["content"], tokenizer)
    return tokenizer.chat(prompt)


def encode_completion(completion, tokenizer: Tokenizer, prompt="", note=lambda text: None) -> list[int]:
    """Ids of the completion of `prompt`, each a text or messages, with exactly one end token: the one with which the
    chat template ends a turn, or EOS. Tokenised apart from the prompt: these are the ids that the policy would have to
    produce, whatever merges the joint text would allow."""
    if isinstance(completion, list) and isinstance(prompt, list):
        messages, mark = tokenizer.hide([*prompt, completion[-1]])
        opened, said = _go_on(messages, tokenizer) if goes_on(prompt) else tokenizer.turn(messages)
        note_thought(opened, said, note)
        return _ended(tokenizer.reveal(said, mark, opened), tokenizer)
    if isinstance(completion, list):
        completion = ("" if prompt[-1:].isspace() else " ") + completion[-1]["content"]
    return _ended(tokenizer.encode(completion, after="\n"), tokenizer)


def note_thought(opened: str, said: str, note):
    """Say it where an answer begins inside a thought that the template has opened, and never leaves it."""
    tag = re.search(r"<(think|thinking|thought|reasoning)>\s*\Z", opened)
    if tag and f"</{tag[1]}>" not in said:
        note(
            f"the chat template opens <{tag[1]}>, and no </{tag[1]}> follows: all of the answer is learned as a thought"
        )


def goes_on(prompt: list[dict]) -> bool:
    """Whether an answer to these messages goes on with the last of them, which is the assistant's."""
    return len(prompt) > 1 and prompt[-1]["role"] == "assistant"


def encode_opening(prompt: list[dict], content: str, tokenizer: Tokenizer) -> list[int]:
    """Ids with which an assistant's turn after `prompt` begins, up to the end of `content`: the turn goes on."""
    messages, mark = tokenizer.hide([*prompt, {"role": "assistant", "content": content}])
    opened, said = _begin(messages, tokenizer)
    return tokenizer.reveal(said, mark, opened)


def _begin(messages: list[dict], tokenizer: Tokenizer) -> tuple[str, str]:
    """`Tokenizer.turn`, up to the end of the last message's content."""
    opened, said = tokenizer.turn(messages)
    for text in (messages[-1]["content"], messages[-1]["content"].strip()):  # templates trim
        if text in said:
            return opened, said[: said.rfind(text) + len(text)] if text else ""
    return opened, said


def _go_on(messages: list[dict], tokenizer: Tokenizer) -> tuple[str, str]:
    """`Tokenizer.turn`, where the last message is the rest of the turn that the message before it begins."""
    *prompt, first, rest = messages
    opened, begun = _begin([*prompt, first], tokenizer)
    _, said = tokenizer.turn([*prompt, first | {"content": first["content"] + rest["content"]}])
    return opened + begun, said.removeprefix(begun) if said.startswith(begun) else rest["content"]


def _ended(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """The ids with one end token: the first of those that they end with, or EOS."""
    end = tokenizer.eos_id
    while ids and ids[-1] in tokenizer.end_ids:
        *ids, end = ids
    return [*ids, end]


def encode_messages(messages, tokenizer: Tokenizer, note=lambda text: None) -> tuple[list[int], list[int]]:
    """A conversation as (ids, mask): 1 on the assistant's tokens and the token that ends its turn. A turn that the
    template later shows otherwise (with its thoughts cut) is not trained on; `note` is told of it."""
    hidden, mark = tokenizer.hide(messages)
    ids, scored, done = [], [], ""  # done: the text so far
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            opened, said = tokenizer.turn(hidden[: i + 1])
            if not opened.startswith(done):
                note("the chat template shows earlier turns otherwise: only the answers after them are trained on")
                ids, scored, done = [], [], ""
            note_thought(opened, said, note)
            prompt = tokenizer.reveal(opened[len(done) :], mark, done)
            answer = tokenizer.reveal(said, mark, opened)
            marks = [0] * len(prompt)
            if ids and ids[-1] not in tokenizer.end_ids:  # GLM's turns end where the next one's <|user|> begins
                marks[:1] = [int(i in tokenizer.end_ids) for i in prompt[:1]]
            scored += marks + [1] * len(answer)
            ids, done = ids + prompt + answer, opened + said
    ids = _ended(ids, tokenizer)
    return ids, (scored + [1])[: len(ids)]


def truncated_sides(row: dict) -> list:
    """The row's completions that were cut while they were written ("truncated": ["rejected"], or true for all of them):
    they get no EOS."""
    sides = row.get("truncated")
    return ["completion", "chosen", "rejected"] if sides is True else sides or []


def encode_row(
    row: dict, kind: str, tokenizer: Tokenizer, max_length: int, suffix=(), note=lambda text: None
) -> list[tuple[list, list]]:
    """The row's sequences as (ids, mask) with mask 1 on scored tokens: one sequence, or chosen and rejected.

    A completion that does not fit `max_length` loses its end, EOS included: a cut answer must not teach stopping.
    `suffix` replaces the end of whole completions (where a reward model reads its score). `note` is told what should be
    known of the row. Unfit where no room is left; BadRow where the chat template refuses the row.
    """
    said = [row[name] for name in (*KINDS[kind], "messages") if name in row]
    if any(map(tokenizer.has_special, said)):
        note(SPECIAL_NOTE)
    for role in {m["role"] for x in said if isinstance(x, list) for m in x} - {"system", "user", "assistant"}:
        if f"'{role}'" not in tokenizer.template and f'"{role}"' not in tokenizer.template:
            raise BadRow(f"the chat template does not name the role {role!r}: `prepare.py` maps the spellings of roles")
    if kind == "text":
        ids = encode_prompt(row["text"], tokenizer) + [tokenizer.eos_id]
        return [(ids, [0] + [1] * (len(ids) - 1))]
    if kind == "demos" and "messages" in row:
        ids, mask = encode_messages(row["messages"], tokenizer, note)
        if 1 not in mask[:max_length]:
            raise Unfit(f"no assistant token within {max_length} tokens", mask.index(1) + 1 if 1 in mask else None)
        return [(ids[:max_length], mask[:max_length])]
    prompt = encode_prompt(row["prompt"], tokenizer)
    room = max_length - len(prompt) - len(suffix)
    if room < (kind != "prompts"):  # nothing follows a prompt alone: it may fill all of its length
        raise Unfit(f"the prompt alone fills {max_length} tokens", max_length - room + (kind != "prompts"))
    if kind == "prompts":
        return [(prompt, [0] * len(prompt))]
    sequences = []
    for name in ("chosen", "rejected") if kind == "pairs" else ("completion",):
        answer = encode_completion(row[name], tokenizer, row["prompt"], note)
        if name in truncated_sides(row):
            answer = answer[:-1]
        answer = answer[:room]
        if suffix:
            answer = answer[:-1] + list(suffix) if answer[-1] in tokenizer.end_ids else answer + list(suffix)
        sequences.append((prompt + answer, [0] * len(prompt) + [1] * len(answer)))
    if kind == "pairs" and sequences[0][0] == sequences[1][0]:
        raise Unfit("chosen and rejected are equal (after truncation)")
    return sequences


class TokenData:
    """A tokenised file, read from disk as needed (it may be larger than memory): side j of row i begins at
    starts[sides * i + j]."""

    def __init__(self, folder: Path):
        info = json.loads((folder / "info.json").read_text())
        self.folder, self.sides, self.info = folder, info["sides"], info
        self.tokens = np.memmap(folder / "tokens.bin", info["dtype"], "r")
        self.mask = np.memmap(folder / "mask.bin", np.uint8, "r")
        self.starts = np.load(folder / "starts.npy", mmap_mode="r")  # (rows * sides + 1,)
        self.extras = np.load(folder / "extras.npy", mmap_mode="r")  # (rows, len(EXTRAS))
        self.lengths = np.diff(self.starts).reshape(-1, self.sides)  # (rows, sides)
        self.scored = np.load(folder / "scored.npy", mmap_mode="r").reshape(-1, self.sides)  # tokens with mask 1
        self.row_starts = np.load(folder / "row_starts.npy", mmap_mode="r")

    def __len__(self):
        return len(self.lengths)

    def sequence(self, row: int, side: int = 0):
        start, stop = self.starts[row * self.sides + side : row * self.sides + side + 2]
        return self.tokens[start:stop], self.mask[start:stop]

    def row(self, i: int) -> dict:
        """The row as it was written, for rewards that want more than its text."""
        with open(self.folder / "rows.jsonl", "rb") as f:
            f.seek(int(self.row_starts[i]))
            return json.loads(f.readline())


def token_data(path, kind, tokenizer: Tokenizer, max_length: int, suffix=(), skip_bad=False) -> TokenData:
    """The file's tokens, from the cache beside it where file, tokenizer, kind and length are the same as before."""
    path = Path(path)
    if not path.is_file():
        open_text(path)  # says what is missing
    ids = [tokenizer.fingerprint, tokenizer.template, tokenizer.names, tokenizer.bos_id]
    ids += [tokenizer.end_ids, tokenizer.vocab_size]
    key = [file_hash(path), *ids, kind, max_length, list(suffix), skip_bad, 11]
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    cache = path.parent / ".tokens"
    if not os.access(path.parent, os.W_OK):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rlhf-tokens"
    folder = cache / f"{path.name.split('.')[0]}-{name}"
    with first_process_first("tokens"):
        if not (folder / "info.json").is_file():
            temporary = folder.with_name(f"{folder.name}.{jax.process_index()}.{os.getpid()}")
            temporary.mkdir(parents=True, exist_ok=True)
            try:
                _write_token_data(temporary, path, kind, tokenizer, max_length, suffix, skip_bad)
                if not folder.exists():
                    os.replace(temporary, folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    data = TokenData(folder)
    for text in data.info["messages"]:
        print(f"{path}: {text}", file=sys.stderr)
    if data.info["fault"]:
        raise ValueError(f"{path}: {data.info['fault']}")
    return data


def _write_token_data(folder, path, kind, tokenizer, max_length, suffix, skip_bad):
    """Tokenise the rows of `path` one by one into the files that `TokenData` reads."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths, scored, extras, row_starts, dropped, notes, truncated, long = [], [], [], [], Counter(), {}, 0, []
    bar = progress(desc=f"tokenising {path.name}", unit=" rows")
    names = ("tokens.bin", "mask.bin", "rows.jsonl")
    with ExitStack() as stack:
        tokens, masks, rows = (stack.enter_context(open(folder / name, "wb")) for name in names)
        for line, row in read_rows(path, kind, skip_bad):
            bar.update()
            found = set()
            try:
                sequences = encode_row(row, kind, tokenizer, max_length, suffix, found.add)
            except BadRow as reason:
                if not (skip_bad or isinstance(reason, Unfit)):
                    raise BadRow(f"{path}:{line}: {reason} (--skip-bad-rows goes on without such rows)") from None
                dropped[str(reason)] += 1
                long += filter(None, [getattr(reason, "tokens", None)])
                continue
            for text in found:
                count, first = notes.get(text, (0, line))
                notes[text] = (count + 1, first)
            for ids, mask in sequences:
                if kind != "text" and kind != "prompts":
                    truncated += len(ids) == max_length and ids[-1] not in tokenizer.end_ids
                lengths.append(len(ids))
                scored.append(sum(mask))
                tokens.write(np.asarray(ids, dtype).tobytes())
                masks.write(np.asarray(mask, np.uint8).tobytes())
            known = {"pairs": EXTRAS[:3], "thumbs": EXTRAS}.get(kind, ())  # "label" of a text may be anything
            extras.append([float(row[x]) if x in row and x in known else x != "margin" for x in EXTRAS])
            row_starts.append(rows.tell())
            if kind == "prompts":
                rows.write(json.dumps(row).encode() + b"\n")
    bar.close()
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64))
    np.save(folder / "scored.npy", np.asarray(scored, np.int64))
    np.save(folder / "extras.npy", np.asarray(extras, np.float32).reshape(-1, len(EXTRAS)))
    np.save(folder / "row_starts.npy", np.asarray(row_starts, np.int64))
    if not lengths:
        for name in ("tokens.bin", "mask.bin"):
            (folder / name).write_bytes(b"\0" * 4)  # an empty file cannot be mapped
    messages = [f"{count:,} rows left out: {reason}" for reason, count in dropped.items()]
    messages += [f"{count:,} rows, for example line {line}: {text}" for text, (count, line) in notes.items()]
    messages += [f"{truncated:,} sequences cut at {max_length} tokens"] if truncated else []
    fault = None if row_starts else f"no usable row ({format_of(kind)})"
    if row_starts and not any(row[EXTRAS.index("weight")] for row in extras):
        fault = "all rows have weight 0: nothing can be learned from them, or measured"
    if len(long) > len(row_starts):
        needed = int(np.quantile([0] * len(row_starts) + long, 0.9, method="higher"))
        fault = f"{len(long):,} of {len(long) + len(row_starts):,} rows do not fit {max_length} tokens; a length of "
        fault += f"{needed} keeps 90% of them (at least, where answers follow)"
    info = dict(sides=2 if kind == "pairs" else 1, dtype=np.dtype(dtype).name, messages=messages, fault=fault)
    write_json(folder / "info.json", info)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Batches: rows of a file as arrays
#
#   key                   shape    what it is
#   tokens                (B, T)   ids, and PAD where a row has no more of them; of pairs (B, 2, T), chosen first
#   mask                  (B, T)   1 on scored tokens: an answer's and its end, or all of a text but its first. Prompts
#                                  alone have none: there it is 1 on all tokens
#   segments              (B, T)   1, 2, ...: which text of its row a token is of; 0 on PAD. Not of prompts alone
#   answers            (B, 2, A)   of pairs in one row each, tokens, mask and segments (B, T): where in it the scored
#                                  tokens of each answer stand, and 0 where an answer has no more
#   weight, label_p       (B,)     of pairs and thumbs: how much one counts in the loss; P(chosen is the better one)
#   margin                (B,)     of pairs: by how much chosen was rated higher (for reward.py)
#   label                 (B,)     of thumbs: 1 for a good answer, 0 for a bad one
#   index                 (B, 2)   which file and which row of it; stays on the host. Text has none


class Batches:
    """batch(step): a pure function of (seed, step), so that a resumed run needs nothing but its step.

    Texts are packed: laid end to end in rows of `length` tokens, told apart by their segments. Prompts are padded on
    the left, to one width, since they end where the response begins. Other rows are padded on the right, to one of four
    widths; rows of similar length share a batch (they are sorted within windows of 50 batches): few compilations,
    little padding. `forked`: both answers of a pair stand in one row, behind their prompt (`fork`).
    Training calls `plan` first, which makes the batch smaller where there are fewer rows than it takes.
    """

    WINDOW = 50

    def __init__(self, data, kind, tokenizer, batch_size: int, length: int, seed: int, suffix=(), skip_bad=False,
                 forked=False):  # fmt: skip
        sources = parse_sources(data)
        self.kind, self.batch_size, self.length, self.seed = kind, batch_size, length, seed
        self.pad = tokenizer.pad_id
        self.sets = [token_data(path, kind, tokenizer, length, suffix, skip_bad) for path, _ in sources]
        self.hashes = {str(path): file_hash(Path(path)) for path, _ in sources}
        self.packs = [pack(data.lengths[:, 0], length, seed) for data in self.sets] if kind == "text" else None
        self.sizes = self.counts = [len(rows) for rows in (self.packs or self.sets)]
        weights = [weight for _, weight in sources]
        if weights[0] is not None:
            self.counts = [max(1, round(w / sum(weights) * sum(self.sizes))) for w in weights]
        self.forked = forked
        self.widths = np.concatenate([fork_widths(data) if forked else data.lengths.max(1) for data in self.sets])
        self.longest = int(self.widths.max()), max(int(data.scored.max()) for data in self.sets)  # row, and answer
        self._epochs = lru_cache(maxsize=2)(self._epoch)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.counts) // self.batch_size

    def plan(self, steps: int | None = None, micro_batches: int = 1) -> int:
        """How many steps a run takes: `steps`, or one epoch. Where there are fewer rows than --batch-size, the batch
        becomes all of them, or as many as devices and micro-batches can share. Prompts are refused instead: how many
        a rollout has decides the sizes of what follows."""
        rows, asked = sum(self.counts), self.batch_size
        if rows < asked and self.kind == "prompts":
            raise ValueError(
                f"{rows:,} prompts in {', '.join(self.hashes)}, and a batch takes {asked:,}: lower --batch-size"
            )
        if rows < asked:
            devices = data_devices()
            shares = math.lcm(devices, jax.process_count(), micro_batches)
            self.batch_size = rows // shares * shares
            if not self.batch_size:
                raise ValueError(
                    f"{rows:,} rows cannot be shared by {devices} devices and {micro_batches} micro-batches"
                )
            print(f"{rows:,} rows are fewer than --batch-size {asked:,}: a batch has {self.batch_size:,}")
        if steps is None and (left := rows % self.batch_size):
            print(f"{left:,} of {rows:,} rows do not fill a batch of {self.batch_size:,}: the epoch goes without them")
        return self.steps_per_epoch if steps is None else steps

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step, with the keys in the table above. Every process makes the whole batch: what is decided
        on the host is decided alike, and `put_batch` gives each device its rows."""
        epoch, at = divmod(step, self.steps_per_epoch)
        return self._assemble(self._epochs(epoch)[at])

    def once(self):
        """Every row once: yields (batch, how many of its rows are new), since the last batch is filled up with rows of
        the first. The order is shuffled, so that a pass that is cut short has seen every part of every file, and is
        the same every time."""
        picks = np.array([(source, row) for source, size in enumerate(self.sizes) for row in range(size)])
        picks = np.random.default_rng(0).permutation(picks)
        for start in range(0, len(picks), self.batch_size):
            # filled with other rows than its own: KTO needs two different prompts in a batch
            batch = picks[(start + np.arange(self.batch_size)) % len(picks)]
            yield self._assemble(batch), min(self.batch_size, len(picks) - start)

    def stream(self, start: int, stop: int):
        """Batches start..stop-1, made on a thread while the device works."""
        with ThreadPoolExecutor(1) as thread:
            waiting = [thread.submit(self, step) for step in range(start, min(start + 2, stop))]
            for step in range(start, stop):
                if step + 2 < stop:
                    waiting.append(thread.submit(self, step + 2))
                yield waiting.pop(0).result()

    def rows(self, batch) -> list[dict]:
        """The rows of a batch of prompts, as they were written."""
        return [self.sets[source].row(row) for source, row in batch["index"]]

    def _epoch(self, epoch: int) -> np.ndarray:
        """(steps, batch_size, 2): which (source, row) each batch of this pass over the data holds."""
        picks = []
        for source, (size, count) in enumerate(zip(self.sizes, self.counts)):
            # the next `count` rows of this source's endless stream of shuffled passes
            first, last = epoch * count // size, ((epoch + 1) * count - 1) // size
            passes = [np.random.default_rng((self.seed, source, p)).permutation(size) for p in range(first, last + 1)]
            rows = np.concatenate(passes)[epoch * count - first * size :][:count]
            picks.append(np.stack([np.full(count, source), rows], 1))
        rng = np.random.default_rng((self.seed, 1_000_003, epoch))
        picks = rng.permutation(np.concatenate(picks))[: self.steps_per_epoch * self.batch_size]
        if self.kind not in ("text", "prompts"):
            width = self.WINDOW * self.batch_size
            starts = np.concatenate([[0], np.cumsum(self.sizes)])
            windows = [picks[i : i + width] for i in range(0, len(picks), width)]
            orders = [np.argsort(self.widths[starts[w[:, 0]] + w[:, 1]], kind="stable") for w in windows]
            picks = np.concatenate([window[order] for window, order in zip(windows, orders)])
        return rng.permutation(picks.reshape(-1, self.batch_size, 2))

    def _assemble(self, picks) -> dict[str, np.ndarray]:
        if self.kind == "text":
            return self._packed(picks)
        sides = self.sets[0].sides
        rows = [self.sets[source].sequence(row, side) for source, row in picks for side in range(sides)]
        if self.kind == "prompts":
            batch = pad_rows(rows, self.longest[0], self.pad, left=True)
            batch["mask"] = batch.pop("segments")  # nothing of a prompt is scored: its mask tells tokens from padding
        elif self.forked:
            batch = fork([rows[i : i + sides] for i in range(0, len(rows), sides)], self.pad, self.longest)
        else:
            batch = pad_rows(rows, bucket(max(len(ids) for ids, _ in rows), self.length), self.pad)
            if sides > 1:
                batch = {name: x.reshape(len(picks), sides, -1) for name, x in batch.items()}
        extras = np.stack([self.sets[source].extras[row] for source, row in picks])
        return batch | dict(zip(EXTRAS, extras.T)) | dict(index=picks)

    def _packed(self, picks):
        shape = (len(picks), self.length)
        tokens = np.full(shape, self.pad, np.int32)
        mask, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, (source, row) in enumerate(picks):
            at = 0
            for segment, (document, start, size) in enumerate(self.packs[source][row], 1):
                ids, scored = self.sets[source].sequence(document)
                span = slice(at, at + size)
                tokens[i, span], segments[i, span] = ids[start : start + size], segment
                mask[i, span] = scored[start : start + size]
                mask[i, at] = 0  # a document's first token has nothing before it to predict it from
                at += size
        return dict(tokens=tokens, mask=mask, segments=segments)


def pad_rows(rows, width: int, pad: int, left: bool = False) -> dict[str, np.ndarray]:
    """tokens, mask and segments (B, width) of B rows (ids, mask), padded on the right, or on the left."""
    batch = {name: np.zeros((len(rows), width), np.int32) for name in ("tokens", "mask", "segments")}
    batch["tokens"] += pad
    for i, (ids, mask) in enumerate(rows):
        span = slice(width - len(ids), width) if left else slice(0, len(ids))
        for name, value in zip(batch, (ids, mask, 1)):
            batch[name][i, span] = value
    return batch


def fork(groups, pad: int, longest: tuple[int, int]) -> dict[str, np.ndarray]:
    """Answers to one prompt in one row, which is shorter and less work than a row for each: tokens, mask and segments
    (B, T), and answers (B, K, A), of B groups of K rows (ids, mask) that begin alike. `longest`: of any T and A.

        prompt a b c, answers x y and z       tokens    a b   c x y   c z
                                              segments  1 1   2 2 2   3 3
                                              mask      0 0   0 1 1   0 1     answers  3 4, 6 0

    The prompt's last token stands in each answer, since there the answer's first token is predicted.
    """
    rows, segments, scored = [], [], []
    for group in groups:
        at = max(int(group[0][1].argmax()) - 1, 0)  # the tokens of segment 1
        parts = [[x[:at] for x in group[0]], *([x[at:] for x in row] for row in group)]
        ids, mask = (np.concatenate(column) for column in zip(*parts))
        segment = np.repeat(np.arange(1, 2 + len(group)), [len(ids) for ids, _ in parts])
        rows.append((ids, mask))
        segments.append(segment)
        scored.append([np.flatnonzero((segment == side) & (mask > 0)) for side in range(2, 2 + len(group))])
    batch = pad_rows(rows, bucket(max(map(len, segments)), longest[0], multiple=16, widths=8), pad)
    most = bucket(max(len(at) for of_row in scored for at in of_row), longest[1], multiple=16)
    batch["answers"] = np.zeros((len(rows), len(scored[0]), most), np.int32)
    for i, segment in enumerate(segments):
        batch["segments"][i, : len(segment)] = segment
        for side, at in enumerate(scored[i]):
            batch["answers"][i, side, : len(at)] = at
    return batch


def fork_widths(data: TokenData) -> np.ndarray:
    """(rows,): how many tokens each pair has in a row of `fork`."""
    prompts = np.maximum(data.lengths[:, 0] - data.scored[:, 0] - 1, 0)
    return data.lengths.sum(1) - prompts


def bucket(longest: int, length: int, multiple: int = 8, widths: int = 4) -> int:
    """The narrowest of so many widths up to `length` that holds `longest`."""
    step = -(-length // widths // multiple) * multiple or multiple
    return int(min(-(-max(longest, 1) // step) * step, max(length, longest)))


def check_context(model: GPT, *batches: Batches | None):
    """ValueError where the longest row, its prompt included, has more tokens than the model has learned positions."""
    longest = max(int(data.lengths.max()) for some in filter(None, batches) for data in some.sets)
    model.check_length(longest, ": lower --length")


def pack(lengths: np.ndarray, size: int, seed: int, window: int = 4096) -> list[list[tuple[int, int, int]]]:
    """Documents into rows of `size` tokens: [(document, start, length), ...] a row. Longer documents are cut into whole
    rows and a rest; rests go best-fit-decreasing, in shuffled windows so that a row mixes documents from all over."""
    import bisect

    rows, rests = [], []
    for document, length in enumerate(lengths):
        end = int(length) // size * size  # of the rows that the document fills alone
        rows += [[(document, start, size)] for start in range(0, end, size)]
        if length - end >= 2:
            rests.append((document, end, int(length) - end))
    order = np.random.default_rng(seed).permutation(len(rests))
    for begin in range(0, len(order), window):
        open_rows = []  # (room left, index of the row), sorted
        for document, start, length in sorted((rests[i] for i in order[begin : begin + window]), key=lambda r: -r[2]):
            fit = bisect.bisect_left(open_rows, (length, -1))
            if fit < len(open_rows):
                room, row = open_rows.pop(fit)
            else:
                room, row = size, len(rows)
                rows.append([])
            rows[row].append((document, start, length))
            bisect.insort(open_rows, (room - length, row))
    return rows


# =====================================================================================================================
# Part III. Running: devices, fast products, optimiser, adapters, rewards, the run folder
# =====================================================================================================================


# ---------------------------------------------------------------------------------------------------------------------
# 11. Devices: one mesh, one rule, the same code on one CPU and on many hosts


def start(seed: int = 0):
    """Join the other processes, if there are any, set the mesh, and return the run's random key.

    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID say who the others
    are, under any launcher. DISTRIBUTED=1 leaves it to `jax.distributed`, which knows SLURM, Open MPI, Kubernetes and
    Cloud TPU. Without either a process is alone.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not jax.distributed.is_initialized() and (address or os.environ.get("DISTRIBUTED") == "1"):
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # CPU collectives of two programs must not overlap
        try:
            sizes = [int(os.environ[name]) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")] if address else []
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"JAX_COORDINATOR_ADDRESS wants JAX_NUM_PROCESSES and JAX_PROCESS_ID with it: {error}"
            ) from None
        jax.distributed.initialize(address, *sizes)
    keep_freed_memory()
    keep_compiled_programs()
    jax.set_mesh(make_mesh())
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all; errors are everyone's own
    return jax.random.key(seed)


def keep_freed_memory():
    """On a CPU, tell glibc to keep freed memory. XLA allocates its scratch memory at every step; glibc would return
    large blocks to the system each time, and the step would pay for thousands of page faults. With this a step is 1.2
    to 1.7 times as fast and takes up to half as much memory again. All threads share one heap (unless MALLOC_ARENA_MAX
    is set), because a thread's own heap returns blocks above 64 MB in any case; this must be set before threads start.
    """
    mallopt = sys.platform == "linux" and getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    if not mallopt:
        return
    arena_max, mmap_max, trim_threshold, top_pad = -8, -4, -1, -2  # <malloc.h>
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(arena_max, 1)
    if jax.default_backend() == "cpu":
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never
        mallopt(top_pad, 2**26)  # bytes


def keep_compiled_programs():
    """Keep compiled programs on disk, by code, shapes and compiler: the next such run starts in half the time. Set
    JAX_COMPILATION_CACHE_DIR for another folder, JAX_ENABLE_COMPILATION_CACHE=false to switch it off."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/rlhf-jax").expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def make_mesh(devices=None) -> jax.sharding.Mesh:
    """Rows of a batch go over the axis "data". TENSOR_PARALLEL=N in the environment also splits each layer's work over
    N neighbouring devices, the axis "tensor", which otherwise has size 1."""
    tensor = int(os.environ.get("TENSOR_PARALLEL", 1))
    devices = sorted(jax.devices() if devices is None else devices, key=lambda d: (d.process_index, d.id))
    if tensor < 1 or len(devices) % tensor:
        raise ValueError(f"TENSOR_PARALLEL={tensor} does not divide {len(devices)} devices")
    grid = np.array(devices).reshape(-1, tensor)
    return jax.sharding.Mesh(grid, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


def shard_batch(x, *axes):
    """Inside jit: keep the rows of x spread over the mesh's axis "data", so that devices exchange weights and not
    activations. `axes` name mesh axes for the array's axes after the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or x.shape[0] % mesh.shape["data"]:
        return x
    return lax.with_sharding_constraint(x, PartitionSpec("data", *axes, *[None] * (x.ndim - 1 - len(axes))))


# The axis of a weight that is split over "tensor" (Megatron, arXiv:1909.08053). Layers come in pairs, q k v and o, gate
# up and down: the first is split along its outputs, the second along its inputs, and devices exchange one sum for both.
TENSOR_SPLITS = {
    "q.weight": -1, "k.weight": -1, "v.weight": -1, "o.weight": -2,
    "gate.weight": -1, "up.weight": -1, "down.weight": -2, "wte": -2, "head": -2,
}  # fmt: skip


def sharding(path, leaf, mesh) -> NamedSharding:
    """Where a parameter lies (FSDP in one rule): its longest axis that divides is split over the devices; a small
    parameter stays whole. The layer axis of stacked blocks is never split, since the scan walks along it. With a
    tensor axis larger than 1, `TENSOR_SPLITS` come first."""
    name, spec = _path(path), [None] * leaf.ndim
    if mesh.size == 1 or leaf.size < 2**14:
        return NamedSharding(mesh, PartitionSpec())
    tensor = next((axis for end, axis in TENSOR_SPLITS.items() if name.endswith(end) and leaf.ndim > 1), None)
    if tensor is not None and mesh.shape["tensor"] > 1 and leaf.shape[tensor] % mesh.shape["tensor"] == 0:
        spec[tensor] = "tensor"
    rest = tuple(axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in spec)
    n = math.prod(mesh.shape[axis] for axis in rest)
    fits = [a for a in range("blocks" in name, leaf.ndim) if spec[a] is None and leaf.shape[a] % n == 0]
    if fits and rest:
        spec[max(fits, key=lambda a: leaf.shape[a])] = rest if len(rest) > 1 else rest[0]
    return NamedSharding(mesh, PartitionSpec(*spec) if any(spec) else PartitionSpec())


def shard(tree):
    """Parameters or optimiser state on the devices, each array as `sharding` says."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return tree
    return jax.tree_util.tree_map_with_path(lambda p, x: put_array(x, sharding(p, x, mesh)), tree)


def put_array(x, where: NamedSharding):
    """An array on the devices. Every process holds all of a host array and places the parts of its own devices."""
    if where.is_fully_addressable or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, where, lambda part: x[part])


def put_batch(batch: dict) -> dict:
    """Host arrays -> device arrays, rows spread over the data axis; whole on each device where they do not divide."""
    batch = {name: x for name, x in batch.items() if name != "index"}
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, batch)
    spread = lambda x: PartitionSpec() if len(x) % mesh.shape["data"] else PartitionSpec("data")
    return jax.tree.map(lambda x: put_array(x, NamedSharding(mesh, spread(x))), batch)


def to_numpy(tree):
    """Every array of the tree on this host, whole, also where other processes hold parts of it."""

    def collect(array):
        if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
            from jax.experimental.multihost_utils import process_allgather

            return process_allgather(array, tiled=True)
        return jax.device_get(array)

    return jax.tree.map(lambda x: np.asarray(collect(x)), tree)


def own_rows(rows):
    """The rows of a batch whose texts this process gives to functions (rewards, gold, judges): with several processes
    each takes its share, so that every answer is read once."""
    share = len(rows) // jax.process_count()
    return rows[jax.process_index() * share :][:share]


def gather_rows(own) -> np.ndarray:
    """Every process's `own_rows`, one after the other."""
    if jax.process_count() == 1:
        return np.asarray(own)
    from jax.experimental.multihost_utils import process_allgather

    return np.asarray(process_allgather(np.asarray(own), tiled=True))


def barrier(name: str):
    """Wait here for all processes."""
    if jax.process_count() > 1:
        from jax.experimental.multihost_utils import sync_global_devices

        sync_global_devices(name)


@contextmanager
def first_process_first(name: str):
    """with first_process_first(name): the first process runs the block before all others, which then find on disk what
    it wrote."""
    if jax.process_index() > 0:
        barrier(name)
    yield
    if jax.process_index() == 0:
        barrier(name)


def any_process(flag: bool):
    """Whether the flag is set in any process, as a device array, so that the call waits for nobody."""
    mesh = jax.sharding.get_mesh()
    own = np.full(jax.local_device_count(), flag)
    return jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec(mesh.axis_names)), own).any()


def data_devices() -> int:
    """Over how many devices the rows of a batch are spread."""
    mesh = jax.sharding.get_mesh()
    return jax.device_count() if mesh.empty else mesh.shape["data"]


def check_batch_size(batch_size: int, name="--batch-size"):
    if batch_size < 1:
        raise ValueError(f"{name} {batch_size}: a batch has 1 row at least")
    for n, what in ((data_devices(), "devices that share its rows"), (jax.process_count(), "processes")):
        if batch_size % n:
            raise ValueError(f"{name} {batch_size} is not divisible by the {n} {what}")


def device_note() -> str:
    count, rows = jax.device_count(), data_devices()
    split = f" ({rows} x {count // rows} tensor)" if rows < count else ""
    return f"{count} x {jax.devices()[0].device_kind}{split}"


# ---------------------------------------------------------------------------------------------------------------------
# 12. Precision, and products as XLA is fast at them


def cast(tree, dtype):
    """The pytree with its floating arrays in another precision, such as fp32 weights as bf16 for the forward pass."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def cast_layers(block: "Block", dtype):
    """`cast` of a block's layers; not of small integers with scales of their own."""
    own = lambda x: isinstance(x, (Linear, Norm, LoraLinear))
    return jax.tree.map(lambda x: cast(x, dtype) if own(x) else x, block, is_leaf=own)


def compute_dtype(name: str):
    """ "auto" is bf16 where the hardware multiplies it fast, fp32 on a CPU."""
    if name == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def accumulator(dtype):
    """The precision to ask XLA for, where a product is wanted in `dtype`. On a CPU a bf16 product is asked for in fp32
    and rounded afterwards: that has a fast kernel (YNNPACK), and the other takes 10 times as long."""
    return jnp.float32 if dtype == jnp.bfloat16 and jax.default_backend() == "cpu" else dtype


def dot(a, b, axes, dtype=None, precision=None):
    """The product of a and b, summed over one axis of each (`axes`), in `dtype`, or a's."""
    dtype = dtype or a.dtype
    contract = tuple((axis % x.ndim,) for x, axis in zip((a, b), axes))
    form = contract, ((), ())
    return lax.dot_general(a, b, form, precision, preferred_element_type=accumulator(dtype)).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(x, weight, dtype=None, transposed=False):
    """x (..., I) times weight (I, O), or with a `transposed` weight (O, I): -> (..., O) in `dtype`, or x's.

    The backward pass is written out for two reasons. XLA:CPU would fuse what made x and the output's gradient (GELU,
    softmax, norm) into slow strided copies that take half of a training step: a barrier prevents it. And the gradient
    of logits in fp32 is rounded to the precision of a bf16 weight, or the backward pass would multiply in fp32.
    """
    return dot(x, weight, (-1, 1 if transposed else 0), dtype)


def _matmul_forward(x, weight, dtype, transposed):
    # the input is kept only where the weight's gradient is asked for, which a frozen weight's is not
    saved = x.value if weight.perturbed else None, weight.value
    return matmul(x.value, weight.value, dtype, transposed), saved


def _matmul_backward(dtype, transposed, saved, g):
    x, weight = saved
    g, weight_grad = g.astype(weight.dtype), None
    if x is not None:
        if jax.default_backend() == "cpu":
            x, g = lax.optimization_barrier((x, g))
        flat_x, flat_g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
        weight_grad = dot_tokens(flat_g, flat_x) if transposed else dot_tokens(flat_x, flat_g)
    return dot(g, weight, (-1, 0 if transposed else 1)), weight_grad


def dot_tokens(a, b):
    """a (B T, I) and b (B T, O) -> (I, O), summed over all tokens. XLA:CPU's bf16 kernel needs a transposed in memory;
    without the barrier XLA would simplify the transposition away."""
    if a.dtype == jnp.bfloat16 and jax.default_backend() == "cpu":
        if a.shape[1] > b.shape[1]:  # the narrow one is transposed, and the product
            return lax.optimization_barrier(dot_tokens(b, a)).T
        return dot(lax.optimization_barrier(a.T.reshape(-1)).reshape(a.shape[::-1]), b, (1, 0))
    return dot(a, b, (0, 0))


matmul.defvjp(_matmul_forward, _matmul_backward, symbolic_zeros=True)


def keep(x):
    """x, marked as what `GPT.scan_blocks` keeps of a layer on a CPU. XLA:CPU up to JAX 0.10 slices no bf16 arrays: it
    would make an fp32 copy of what all layers keep. So bf16 is kept as the integers of its bits
    (findings/jax_cpu_bf16_scan.sh)."""
    in_bits = x.dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
    return keep_bits(x) if in_bits else checkpoint_name(x, "kept")


@jax.custom_jvp
def keep_bits(x):
    return x


@keep_bits.defjvp
def _keep_bits_jvp(primals, tangents):
    bits = checkpoint_name(lax.bitcast_convert_type(primals[0], jnp.uint16), "kept")
    return lax.bitcast_convert_type(bits, primals[0].dtype), tangents[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(form: str, a, b, dtype=None):
    """jnp.einsum of two arrays, in `dtype`, or a's. As in `matmul`, the backward pass multiplies in a's precision."""
    dtype = dtype or a.dtype
    return jnp.einsum(form, a, b, preferred_element_type=accumulator(dtype)).astype(dtype)


def _einsum_backward(form, dtype, saved, g):
    (a, b), (left, right, out) = saved, re.split(",|->", form)
    g = g.astype(a.dtype)
    return einsum(f"{out},{right}->{left}", g, b), einsum(f"{left},{out}->{right}", a, g)


einsum.defvjp(lambda form, a, b, dtype: (einsum(form, a, b, dtype), (a, b)), _einsum_backward)


def unembed(x, table, dtype):
    """The logits of hidden states: x (..., D) times the transposed table (V, D) -> (..., V) in `dtype`.

    On a GPU the table is padded to a multiple of 128 rows and the added logits are cut off: with GPT-2's 50,257 words
    the product takes almost three times as long as with 50,304. The copy does not pay for the few rows of a decoding
    step.
    """
    V = len(table)
    if jax.default_backend() == "gpu" and x.size // x.shape[-1] >= 512:
        table = jnp.pad(table, ((0, -V % 128), (0, 0)))
    return matmul(x, table, dtype, transposed=True)[..., :V]


@jax.custom_vjp
def logprobs_of_logits(logits: Float[Array, "*rows V"], targets: Int[Array, "*rows"]):
    """(log p(targets), entropy), each (*rows), of softmax(logits). The backward pass is written out, because JAX's own
    would compute the exponentials again and scatter into an array of zeros."""
    return _logprobs_forward(logits, targets)[0]


def _logprobs_forward(logits, targets):
    top = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(-1)
    lse = jnp.log(total) + top[..., 0]
    entropy = lse - (weights * logits).sum(-1) / total
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return (chosen - lse, entropy), (logits, targets, lse, entropy)


def _logprobs_backward(saved, g):
    logits, targets, lse, entropy = saved
    log_p = logits - lse[..., None]
    p = jnp.exp(log_p)
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    slopes = hit - p, -p * (log_p + entropy[..., None])
    return sum(x[..., None] * slope for x, slope in zip(g, slopes) if not isinstance(x, SymbolicZero)), None


logprobs_of_logits.defvjp(
    lambda *primals: _logprobs_forward(*(x.value for x in primals)), _logprobs_backward, symbolic_zeros=True
)


def inverse_cdf(p: Float[Array, "B V"], u: Float[Array, " B"]) -> Int[Array, " B"]:
    """The first index at which the running sum of p, which need not add up to 1, exceeds u times its total. It is found
    among the sums of blocks first and then inside one block: with 50,257 words on a CPU, one long running sum takes 1.5
    to 2 times as long, and Gumbel noise for every entry 20 times."""
    (B, V), block = p.shape, 256
    blocks = jnp.pad(p, ((0, 0), (0, -V % block))).reshape(B, -1, block)

    def locate(weights, target):  # first index whose running sum exceeds target, never one of weight 0
        running = jnp.cumsum(weights, -1)
        last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(weights, -1) > 0, -1)
        index = jnp.minimum((running <= target[:, None]).sum(-1), last)
        before = jnp.take_along_axis(running - weights, index[:, None], 1)[:, 0]
        return index, target - before

    totals = blocks.sum(-1)
    which, rest = locate(totals, u * totals.sum(-1))
    inside, _ = locate(blocks[jnp.arange(B), which], rest)
    return which * block + inside


def flash_attention(q, k, v, visible, causal):
    """`attention` by cuDNN, which never writes the scores (T, S) to memory. It needs even lengths, hence a token that
    is added and cut off, and q, k, v and the mask spread alike over the devices."""
    (B, _, T, _), S = q.shape, k.shape[2]
    even = lambda x: jnp.pad(shard_batch(x, "tensor"), ((0, 0), (0, 0), (0, x.shape[2] % 2), (0, 0))).swapaxes(1, 2)
    visible = jnp.pad(jnp.broadcast_to(visible, (B, T, S)), ((0, 0), (0, T % 2), (0, S % 2)))
    options = dict(mask=shard_batch(visible)[:, None], is_causal=causal, implementation="cudnn")
    return jax.nn.dot_product_attention(even(q), even(k), even(v), **options)[:, :T].swapaxes(1, 2)


def has_flash_attention(q, k) -> bool:
    """Whether cuDNN has a kernel for this attention: on NVIDIA from Ampere on, in half precision, where rows and heads
    divide among the devices. Not for the single query of a decoding step, where it would save nothing."""
    if jax.default_backend() != "gpu" or q.dtype not in (jnp.bfloat16, jnp.float16):
        return False
    device, mesh = jax.local_devices()[0], jax.sharding.get_abstract_mesh()
    if "cuda" not in device.client.platform_version or float(device.compute_capability) < 8:
        return False
    data, tensor = (1, 1) if mesh.empty else (mesh.shape["data"], mesh.shape["tensor"])
    fits = q.shape[2] > 1 and q.shape[3] % 8 == 0 and q.shape[3] <= 128
    return fits and len(q) % data == 0 and k.shape[1] % tensor == 0


def continue_prefix(model: GPT, tokens, segments, prefix, prefix_mask, remat: bool = False) -> Float[Array, "B T D"]:
    """Hidden states of rows (B, T) that continue a `prefix`, whose real tokens `prefix_mask` marks, (P, Q) both.

    The first B / P rows continue the first prefix, and so on. A prefix is computed once for its rows, which do not see
    each other. A row is one document: its `segments` are 1, and 0 on padding.
    """
    layer, start = after_prefix(model, tokens, segments, prefix, prefix_mask)
    return model.norm(model.scan_blocks(layer, start, remat)[0])


def after_prefix(model: GPT, tokens, segments, prefix, prefix_mask):
    """(layer, start) of `continue_prefix`: layer(carry, block) -> carry is one block, and a carry is (the rows' states
    (B, T, D), the prefixes' (P, Q, D))."""
    repeat = lambda x: jnp.repeat(x, len(tokens) // len(prefix), axis=0)
    room = ((0, 0), (0, 0), (0, tokens.shape[1]), (0, 0))
    prefix_visible = causal_mask(prefix_mask)
    seen = (repeat(prefix_mask)[:, None, :] > 0) & (segments[:, :, None] > 0)
    visible = jnp.concatenate([seen, causal_mask(segments)], -1)
    positions = segment_positions(segments) + repeat(prefix_mask.sum(1))[:, None]
    model.check_length(max(tokens.shape[1], prefix.shape[1]))
    prefix_x, prefix_rope = model.embed(prefix, segment_positions(prefix_mask))
    x, rope = model.embed(tokens, positions)

    def layer(carry, block):
        x, prefix_x = carry
        prefix_x, keys_values = block(prefix_x, prefix_rope, prefix_visible)
        cache = [jnp.pad(repeat(old), room) for old in keys_values]
        x, _ = block(x, rope, visible, cache, slot=prefix.shape[1])
        return shard_batch(x), shard_batch(prefix_x)

    return layer, (x, prefix_x)


HEAD_BUDGET = 2**26  # how many logits are held at a time on a CPU


def head_budget() -> int:
    """How many logits are held at a time. More than that are computed in pieces, and once more for the backward pass
    (for GPT-2 a tenth of a training step). An accelerator holds the power of two below an eighth of its memory: a power
    of two, so that processes whose memory differs by a few bytes plan alike."""
    memory = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)  # a CPU names none
    return 2 ** int(math.log2(max(HEAD_BUDGET, memory / 8 / 4)))  # 4 bytes each


def map_columns(piece, width: int, *arrays):
    """piece(*arrays) of arrays (B, T, ...), for as many of the T columns at a time as keep B * columns * width floats
    within `head_budget`. Columns and not rows, because rows may lie on different devices."""
    B, T = arrays[0].shape[:2]
    pieces = -(-B * T * width // head_budget())
    if pieces <= 1:
        return piece(*arrays)
    columns = -(-T // min(pieces, T))
    pieces = -(-T // columns)

    def split(x):  # (B, T, ...) -> (pieces, B, columns, ...), zero-padded
        x = jnp.pad(x, [(0, 0), (0, pieces * columns - T)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, pieces, columns, *x.shape[2:]).swapaxes(0, 1)

    outs = lax.map(lambda xs: jax.checkpoint(piece)(*xs), tuple(split(x) for x in arrays))
    return jax.tree.map(lambda y: y.swapaxes(0, 1).reshape(B, pieces * columns, *y.shape[3:])[:, :T], outs)


def map_chunks(f, batch, chunks: int = 1):
    """f(batch), computed on so many chunks of its rows one after the other, which takes less memory. With chunks as
    large as the micro-batches of `gradients` both have the same shapes, hence the same rounding."""
    if chunks == 1:
        return f(batch)
    split = jax.tree.map(lambda x: x.reshape(-1, chunks, *x.shape[1:]).swapaxes(0, 1), batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), lax.map(f, split))


# ---------------------------------------------------------------------------------------------------------------------
# 13. Optimiser, and intervals of shares


def schedule(lr: float, steps: int, warmup: int | None = 0, decay: str = "cosine", final: float = 0.0):
    """Linear warm-up to lr (None: of 10 steps, or an eighth of all where that is fewer), then a cosine or linear decay,
    which would reach final * lr one step after the last."""
    if not lr >= 0:
        raise ValueError(f"a learning rate is 0 or above, not {lr}")
    warmup = min(10, steps // 8) if warmup is None else warmup
    if 0 < steps <= warmup:
        print(f"warning: --warmup {warmup} in {steps} steps: the learning rate never rises to --lr", file=sys.stderr)
    rest = max(steps - warmup, 1)
    tails = dict(
        cosine=optax.cosine_decay_schedule(lr, rest, alpha=final), linear=optax.linear_schedule(lr, final * lr, rest)
    )
    return optax.join_schedules([optax.linear_schedule(lr / max(warmup, 1), lr, warmup), tails[decay]], [warmup])


def adamw(learning_rate, weight_decay=0.0, clip=1.0, b2=0.999, eps=1e-8):
    """AdamW on the global gradient clipped to norm `clip`. Weight decay acts on the matrices of linear layers alone.
    They are found by name, because a stacked norm scale has two axes as well."""
    decays = lambda params: jax.tree_util.tree_map_with_path(lambda p, _: _path(p).endswith(".weight"), params)
    adam = optax.adamw(learning_rate, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


Z = float(ndtri(0.975))  # 1.96, of 95% intervals


def same_prompt(prompts) -> np.ndarray:
    """The cluster of each answer (N,): answers to one prompt have one number, from 0 up."""
    return np.unique([str(prompt) for prompt in prompts], return_inverse=True)[1]


def effective_size(values, clusters) -> float:
    """How many answers to as many prompts know as much as these N: values (N,) in [0, 1], clusters (N,).

    n_eff = N / D by the design effect D = V_cluster / V_simple (Kish 1965), where the ratio estimator has, with the
    sums S_g of n_g answers to prompt g and the mean p,

        V_cluster = sum_g (S_g - p n_g)^2        V_simple = sum_i (v_i - p)^2

    A few events say little about D: both sums get z^2 / 4, the pseudo-observations of Wilson's interval, that in
    V_cluster times the D of prompts whose answers are all equal, sum_g n_g^2 / N. D is 1 at least, and exactly 1 where
    no prompt repeats. Few prompts: times (t_{N-1} / t_{G-1})^2 of Korn and Graubard 1998 and (G - 1) / G.
    """
    n, sizes, sums = len(values), np.bincount(clusters), np.bincount(clusters, values)
    if len(sizes) == n:
        return float(n)
    p, most = values.mean(), (sizes**2).sum() / n
    between, simple = ((sums - p * sizes) ** 2).sum(), ((values - p) ** 2).sum()
    design = max(1.0, (between + Z**2 / 4 * most) / (simple + Z**2 / 4))
    free = len(sizes) - 1  # degrees of freedom
    few = (stdtrit(n - 1, 0.975) / stdtrit(max(free, 1), 0.975)) ** 2 * free / (free + 1)
    return float(n / design * few)


def share_interval(values, clusters) -> list[float]:
    """95% interval of a share, the mean p of values (N,) in [0, 1] such as hits, or wins with ties a half.

        (n p + z^2 / 2 +- z sqrt(n s^2 + z^2 / 4)) / (n + z^2)        s^2 = mean (v - p)^2, n = `effective_size`

    Where all values are 0 or 1, s^2 = p (1 - p) and this is Wilson's interval (1927) with an effective sample size
    (Franco et al. 2019, doi:10.1093/jssam/smy019). It does not shrink to a point where nothing was seen to happen: 0 of
    500 is [0, 0.0076]. By cluster, it is about prompts that were not asked yet, not about more draws of the same ones.
    """
    values = np.asarray(values, float)
    n, p = effective_size(values, clusters), values.mean()
    middle, half = n * p + Z**2 / 2, Z * math.sqrt(n * values.var() + Z**2 / 4)
    return [max(0.0, float((middle - half) / (n + Z**2))), min(1.0, float((middle + half) / (n + Z**2)))]


# ---------------------------------------------------------------------------------------------------------------------
# 14. Adapters: what learns on a frozen model


class LoraLinear(eqx.Module):
    """A frozen linear layer and a low-rank correction that learns: y = base(x) + alpha / r (x A) B, B zero at first
    (Hu et al. 2021, arXiv:2106.09685, section 4.1)."""

    base: Linear | None  # None within an `Adapter`, which is kept apart from its base
    a: Array  # (I, r)
    b: Array  # (r, O)
    scale: float = eqx.field(static=True)  # alpha / r

    def __call__(self, x):
        return self.base(x) + self.scale * matmul(matmul(x, self.a), self.b)


class LoraTable(eqx.Module):
    """The same for an embedding or head (V, D): base + alpha / r A B, A zero at first. As an embedding its rows are
    looked up, as a head it is multiplied with hidden states."""

    base: Array | None
    a: Array  # (V, r)
    b: Array  # (r, D)
    scale: float = eqx.field(static=True)

    def look_up(self, index):
        return self.base[index] + self.scale * matmul(self.a[index], self.b)

    def __call__(self, x, dtype):
        change = unembed(matmul(x, self.b, transposed=True), self.a, dtype)
        return unembed(x, self.base, dtype) + self.scale * change


class Adapter(eqx.Module):
    """The low-rank corrections that learn, without the frozen base that they correct. Several adapters share one base:
    `attach` makes a model of the base and one of them."""

    blocks: dict[str, LoraLinear]  # by the name of their layer in `Block`; leaves stacked to (L, ...)
    tables: dict[str, LoraTable]  # "wte", which a tied head shares, and "head" of a model that is not tied


LINEARS, TABLES = ("q", "k", "v", "o", "gate", "up", "down"), ("wte", "head")

TARGETS = (*LINEARS, *TABLES)  # layers of a `Block`, and tables of a `GPT`, that may have an adapter


def init_adapter(base: GPT, rank: int, key) -> Adapter:
    """A fresh adapter on all `TARGETS`. Of its two factors, the one that reads an input of width I is uniform in
    +- 1/sqrt(I) and the other is zero, so that nothing changes at first. Alpha is twice the rank."""
    if rank < 1:
        raise ValueError(f"--lora-rank {rank}: an adapter has rank 1 or more, and 0 means none")
    adapter, scale = Adapter({}, {}), 2.0
    for i, name in enumerate(TARGETS):
        layer = getattr(base.blocks if name in LINEARS else base, name)
        if layer is None:  # GPT-2 has no gate, a tied model no head
            continue
        uniform = partial(jax.random.uniform, jax.random.fold_in(key, i), minval=-1, maxval=1)
        if name in TABLES:
            V, D = layer.shape
            adapter.tables[name] = LoraTable(None, jnp.zeros((V, rank)), uniform((rank, D)) / np.sqrt(D), scale)
        else:
            L, I, O = layer.weight.shape
            a, b = uniform((L, I, rank)) / np.sqrt(I), jnp.zeros((L, rank, O))
            adapter.blocks[name] = LoraLinear(None, a, b, scale)
    return adapter


def attach(adapter, base: GPT | None):
    """The model that an adapter makes of its base. Of a score model the body is attached. What is no adapter is a full
    model already and is returned as it is."""
    if isinstance(adapter, ScoreModel):
        return dataclasses.replace(adapter, body=attach(adapter.body, base))
    if not isinstance(adapter, Adapter):
        return adapter
    blocks = put_on(adapter.blocks, base.blocks)
    return put_on(adapter.tables, dataclasses.replace(base, blocks=blocks))


def put_on(corrections: dict, module):
    """`module` with each correction in the place of the layer of its name, and that layer as the correction's base."""
    layers = {name: dataclasses.replace(x, base=getattr(module, name)) for name, x in corrections.items()}
    return dataclasses.replace(module, **layers)


def merge(tree):
    """The same model with corrections added into its weights, W + alpha / r A B, in fp32: as fast as one without."""
    kinds = LoraLinear, LoraTable

    def plain(layer):
        if not isinstance(layer, kinds):
            return layer
        linear = isinstance(layer.base, Linear)
        weight = layer.base.weight if linear else layer.base
        change = layer.scale * (layer.a.astype(jnp.float32) @ layer.b.astype(jnp.float32))
        weight = (weight.astype(jnp.float32) + change).astype(weight.dtype)
        return dataclasses.replace(layer.base, weight=weight) if linear else weight

    return jax.tree.map(plain, tree, is_leaf=lambda x: isinstance(x, kinds))


def trainable(model: GPT, rank: int, dtype: str, key):
    """(what learns, its frozen base). With rank 0 the whole model learns and the base is None. Otherwise an adapter of
    that rank on every layer learns, and the base is the model in `compute_dtype(dtype)`."""
    if rank == 0:
        return shard(jax.tree.map(jnp.array, model)), None  # copies, since a training step overwrites them
    return shard(init_adapter(model, rank, key)), shard(cast(model, compute_dtype(dtype)))


def count_parameters(model) -> int:
    return sum(x.size for x in jax.tree.leaves(model))


# ---------------------------------------------------------------------------------------------------------------------
# 15. Rewards: what scores a sampled response


def load_reward_model(path, tokenizer, ours, dtype: str, adapters: bool = False) -> ScoreModel:
    """A frozen reward model with the tokenizer of `ours`, the policy's folder. With `adapters`, and if the reward model
    was trained as an adapter on `ours`, only its adapter and head, to be attached to that model."""
    model = load_adapter(path, ours) if adapters else None
    model, theirs = load(path) if model is None else (model, load_tokenizer(path))
    if not isinstance(model, ScoreModel):
        raise ValueError(f"{path} is a language model, not a reward model: train one with reward.py")
    check_same_tokenizer(tokenizer, theirs, ours, path)
    return shard(cast(model, compute_dtype(dtype)))


def normalize_scores(
    model: ScoreModel, base, policy: str, prompts: Batches, tokenizer: Tokenizer, key, samples: int, length: int
) -> ScoreModel:
    """The reward model with gain = 1 / std and bias = -gain * mean folded into its head: mean and std are those of its
    scores of so many `samples`, responses of at most `length` tokens to the prompts, by the model in the folder
    `policy`. `base` is what the body of `model` is an adapter on, None where it is none."""
    sampler, scorer, scores = shard(load_policy(policy)[0]), attach(model, base), []
    for i in range(-(-samples // prompts.batch_size)):
        batch = put_batch(prompts(i))
        out = generate(
            sampler, batch["tokens"], batch["mask"], jax.random.fold_in(key, i), length, ends=tokenizer.end_ids,
            pad=tokenizer.pad_id,
        )  # fmt: skip
        scores.append(score(scorer, batch["tokens"], batch["mask"], out.tokens, out.mask, tokenizer.end_ids))
    scores = np.concatenate(to_numpy(scores))[:samples]
    mean, gain = scores.mean(), 1 / max(scores.std(), 1e-6)  # population std
    print(f"scores of {len(scores)} samples of {policy}: mean {mean:.3f}, std {1 / gain:.3f} -> 0, 1")
    return dataclasses.replace(model, head=model.head * gain, bias=(model.bias - mean) * gain)


class Reward(NamedTuple):
    """What scores responses: one frozen reward model, the members of an ensemble, or a function."""

    models: list[ScoreModel]
    function: Callable | None  # (prompts, responses, rows) -> floats, one a response
    reference: GPT | None = None  # the reference, where the one model is a head on its states: `score_by_reference`


def load_reward(names, tokenizer, ours, dtype: str, ref: GPT, adapters: bool = False) -> Reward:
    """The Reward of one module:function, or of folders of reward models; an ensemble's folder means all its members.
    `ref` is the frozen reference. The rest as for `load_reward_model`, and for `attach_reward`, which comes next."""
    if len(names) == 1 and ":" in names[0]:
        return Reward([], load_function(names[0]))
    if any(":" in name for name in names):
        raise ValueError(f"--reward {' '.join(names)}: folders of reward models, or one module:function, not both")
    folders = [folder for name in names for folder in ensemble_folders(name)]
    models = [load_reward_model(folder, tokenizer, ours, dtype, adapters) for folder in folders]
    shared = len(models) == 1 and is_beginning(models[0], ref)
    if shared:
        layers = f"layer {models[0].body.config.layers} of {ref.config.layers}"
        print(f"{folders[0]} reads the reference's states after {layers}: it costs no forward pass of its own")
    for folder, model in zip(folders, models):
        if adapters and not shared and not isinstance(model.body, Adapter):
            command = f"reward.py --init {ours} --lora-rank 8"
            print(
                f"{folder} has no adapter on {ours} and stays a model of its own ({command} makes one that shares it)"
            )
    return Reward(models, None, ref if shared else None)


def is_beginning(model: ScoreModel, ref: GPT) -> bool:
    """Whether a reward model's body is the first layers of `ref`, weight for weight, and its head reads nothing before
    a response: a probe (probe.py) of the model that is the reference."""
    body = model.body
    if isinstance(body, Adapter) or model.pool not in ("last", "answer"):
        return False
    same = {name: getattr(ref.config, name) for name in ("layers", "tied", "known_ids")}  # the others tell the states
    if dataclasses.replace(body.config, **same) != ref.config:
        return False
    ours, theirs = (jax.tree.leaves((x.wte, x.wpe, x.blocks)) for x in (body, ref))
    return all(bool(jnp.array_equal(a, b[: len(a)])) for a, b in zip(ours, theirs, strict=True))


def attach_reward(reward: Reward, base) -> Reward:
    """The reward with its adapters on `base`, and without the layers that it has from the reference."""
    models = [attach(model, base) for model in reward.models]
    if reward.reference:
        body = dataclasses.replace(models[0].body, wte=None, wpe=None, blocks=None, head=None)
        models = [dataclasses.replace(models[0], body=body)]
    return reward._replace(models=models)


@partial(jax.jit, static_argnames=("ends", "chunks"))
def score_by_reference(reward: ScoreModel, ref: GPT, prompts, prompt_mask, responses, mask, ends, chunks: int = 1):
    """(`score` (B,), the reference's states where response tokens are predicted (B, T, D)), both of one pass: the body
    of the reward model is the first layers of `ref`. Prompts are (P, Q), each for the next B / P of the responses
    (B, T), and computed once for them."""
    (P, Q), T = prompts.shape, responses.shape[1]
    ref.check_length(Q + T + len(reward.suffix))

    def ask(rows):
        prompts, prompt_mask, responses, mask = rows
        K = responses.shape[1]
        last = (jnp.repeat(x[:, -1:], K, axis=0) for x in (prompts, prompt_mask))  # it predicts the first token
        tokens, real = score_inputs(*last, *(x.reshape(-1, T) for x in (responses, mask)), reward.suffix, ends)
        prefix = (jnp.pad(x, ((0, 0), (1, 0)))[:, :-1] for x in (prompts, prompt_mask))  # never of width 0
        layer, start = after_prefix(ref, tokens, real.astype(jnp.int32), *prefix)

        def layer_and_read(carry, block):
            states, read, number = carry
            states = layer(states, block)
            return states, jnp.where(number == reward.body.config.layers, states[0], read), number + 1

        (hidden, _), read, _ = ref.scan_blocks(layer_and_read, (start, start[0], jnp.int32(1)), remat=False)
        scores = reward.pooled(reward.body.norm(read), real, answer=real.at[:, 0].set(False))
        return scores.reshape(-1, K), ref.norm(hidden)[:, :T].reshape(-1, K, T, hidden.shape[-1])

    groups = prompts, prompt_mask, *(x.reshape(P, -1, T) for x in (responses, mask))
    scores, hidden = map_chunks(ask, groups, chunks)
    return scores.reshape(-1), hidden.reshape(-1, *hidden.shape[2:])


def load_function(name: str):
    """`module:function` -> the function; modules are looked up in the working directory too."""
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is not module:function")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        hint = f": write {module[:-3]}:{function}" if module.endswith(".py") else ""
        hint += "; where there is no known truth, --gold None" if module == "toy" else ""
        raise ValueError(f"cannot load {name} from here or from what is installed ({error}){hint}") from None
    finally:
        sys.path.pop(0)


def as_list(values) -> list | None:
    """What a function returned for all responses, a value each; None where that is no sequence of values."""
    return list(values) if isinstance(values, Iterable) and not isinstance(values, str | dict) else None


def check_scores(scores, n: int) -> np.ndarray:
    """What a reward function returned, as n finite floats."""
    with suppress(TypeError, ValueError):  # no numbers at all
        numbers = np.asarray(scores, np.float32)
        if numbers.shape == (n,) and np.isfinite(numbers).all():
            return numbers
    said = as_list(scores) or []
    bad = next((i for i, x in enumerate(said) if np.isnan(to_number(x))), None)
    wrong = f"{scores!r:.200}" if bad is None or len(said) != n else f"{said[bad]!r:.80} for response {bad}"
    raise ValueError(f"the reward function must return {n} finite floats, one a response; it returned {wrong}")


def to_number(value) -> float:
    """What a function said of one answer; NaN where it is no number: None, words, infinity."""
    with suppress(TypeError, ValueError):
        number = np.nan if isinstance(value, str | bytes) else float(value)
        return number if np.isfinite(number) else np.nan
    return np.nan


def read_gold(values) -> list[dict]:
    """What a gold function returned for each response, a float ("gold") or a dict of named floats, as dicts of the same
    names, NaN where it said nothing."""
    said = as_list(values)
    if said is None or any(np.ndim(value) for value in said):
        raise ValueError(f"a gold function must return a float or a dict of floats a response, not {values!r:.200}")
    rows = [value if isinstance(value, dict) else {"gold": value} for value in said]
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: to_number(row.get(name)) for name in names} for row in rows]


def mean_gold(values, prefix: str) -> dict[str, float]:
    """The mean of each named float that a gold function returned, over all processes, and how many responses lack one:
    those count for nothing."""
    rows, means = read_gold(values), {}
    for name in rows[0]:
        numbers = gather_rows([row[name] for row in rows])
        told = np.isfinite(numbers)
        means |= {prefix + name: float(np.mean(numbers[told]))} if told.any() else {}
        means |= {f"{prefix}{name}/unjudged": int((~told).sum())} if not told.all() else {}
    return means


def own_texts(tokenizer: Tokenizer, prompts: dict, generation: Generation, rows) -> tuple[list[str], list[str]]:
    """(prompts, responses) of this process's `own_rows` as text, for functions; `prompts` is the batch on the host,
    `rows` are the process's own, as they were written."""
    ids = (prompts["tokens"], prompts["mask"]), to_numpy((generation.tokens, generation.mask))
    asked, said = (tokenizer.decode_rows(*map(own_rows, pair)) for pair in ids)
    return plain_prompts(asked, rows), said


def plain_prompts(texts: list[str], rows: list[dict]) -> list[str]:
    """Prompts without the words of a chat template: of a conversation what its user said last, as it was written."""
    last = lambda messages, text: next((m["content"] for m in messages[::-1] if m["role"] == "user"), text)
    return [x if isinstance(row["prompt"], str) else last(row["prompt"], x) for x, row in zip(texts, rows)]


def special_tokens(tokenizer: Tokenizer, generation: Generation) -> float:
    """Special tokens a response, its end not counted: text does not show them, so a reward must not pay for them."""
    tokens, mask = to_numpy((generation.tokens, generation.mask))
    unseen = sorted(tokenizer.special_ids - set(tokenizer.end_ids))
    return float((np.isin(tokens, unseen) & (mask > 0)).sum(1).mean())


class Watch:
    """Says in words, once each, what usually goes wrong in reinforcement learning: watch(metrics) once a rollout."""

    def __init__(self, warn):
        self.warn, self.first_length, self.negative, self.said = warn, None, 0, set()

    def __call__(self, metrics: dict):
        length = metrics["response_length"]
        self.first_length = self.first_length or length
        self.negative = self.negative + 1 if metrics["objective/kl"] < 0 else 0
        moved = f"responses went from {self.first_length:.1f} to {length:.1f} tokens: look at the samples"
        faults = {
            "kl": (self.negative == 5, "the KL to the reference was negative for 5 iterations: policy and reference "
                   "are not scored alike (temperature, dtype, template), or the sampler does not sample the policy"),
            "shrank": (length < 0.4 * self.first_length, moved),
            "grew": (length > 2.5 * self.first_length, moved),
            "equal": (metrics["objective/scores_std"] < 1e-6, "all scores are equal: there is nothing to learn from"),
            "eos": (metrics["eos_rate"] < 0.5, "most responses do not end: raise --response-length, or "
                    "--missing-eos, which is what it costs not to end (None: nothing)"),
            "special": (metrics["special_tokens"] > 0.1, f"responses have {metrics['special_tokens']:.2f} special "
                        "tokens each that their text does not show: look at what the reward pays for them"),
        }  # fmt: skip
        for name, (wrong, text) in faults.items():
            if wrong and name not in self.said:
                self.said.add(name)
                self.warn(text)


# ---------------------------------------------------------------------------------------------------------------------
# 16. The run folder


SHOWN = {
    "loss", "lr", "val/loss", "accuracy", "gap", "objective/scores", "objective/kl", "objective/entropy",
    "val/num_eos_tokens", "response_length", "policy/clipfrac_avg", "eval/gold",
    "pairs",
}  # fmt: skip


PATIENCE = 30  # seconds after which a log file is told how far a run is; steps that last longer are saved, each
GRACE = 60  # seconds that the step under way is given to end in, after a signal


def progress(total=None, lines=True, **options):
    """A progress bar on a terminal; in a log file a line every PATIENCE seconds, with lines=False none."""
    from tqdm import tqdm

    class Lines:
        write = lambda self, text: sys.stderr.write(f"{x}\n" if (x := text.strip("\r\n ")) else "")
        flush = lambda self: sys.stderr.flush()

    if lines and not sys.stderr.isatty():
        form = "{desc}: {n_fmt}/{total_fmt} {unit}, {elapsed}"
        options |= dict(file=Lines(), mininterval=PATIENCE, delay=PATIENCE, bar_format=form)
    elif not lines:
        options |= dict(disable=None)
    silent = jax.distributed.is_initialized() and jax.process_index() > 0  # without it, no backend is started for a bar
    return tqdm(total=total, dynamic_ncols=True, **options | (dict(disable=True) if silent else {}))


SAVE_MEMORY = dict(micro_batches="raise", remat="give") | dict.fromkeys(  # what to do with which setting, if it exists
    ("batch_size", "length", "prompt_length", "response_length", "slots", "context"), "lower"
)


def cli(main, config_class, description: str):
    """Parse the command line and run. Exit codes: 0 done, 1 the run failed (one line; DEBUG=1 shows where), 2 usage."""
    import tyro

    config = tyro.cli(config_class, description=description)
    try:
        main(config)
    except KeyboardInterrupt:  # outside of `Run.steps`, which saves first
        print("interrupted", file=sys.stderr)
        raise SystemExit(1) from None
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except jax.errors.JaxRuntimeError as error:
        if os.environ.get("DEBUG") or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        known = [f"{do} --{name.replace('_', '-')}" for name, do in SAVE_MEMORY.items() if hasattr(config, name)]
        hint = f": {', or '.join(known)}" if known else ""
        print(f"error: the memory is full{hint} ({error})", file=sys.stderr)
        raise SystemExit(1) from None


def empty_out(out, resume: bool, overwrite: bool, settings: dict, *more: str):
    """Refuse a run folder in use, or with `overwrite` delete in it what runs write, and `more` (patterns of names). An
    error where another of a script's `settings` names the folder too: --init would be deleted before it is read."""
    out = Path(out)
    for name, value in settings.items() if overwrite else ():
        named = [Path(str(x)).resolve() for x in (value if isinstance(value, tuple) else [value])]
        if name != "out" and out.resolve() in named:
            raise ValueError(
                f"--{name.replace('_', '-')} is --out, {out}: --overwrite would delete it before it is read"
            )
    in_use = not resume and out.exists() and any(out.iterdir())
    if in_use and not overwrite:
        raise FileExistsError(f"{out} is not empty: --resume continues it, --overwrite starts it anew")
    barrier("empty")  # all have looked
    names = ("checkpoint", "metrics.jsonl", "samples.jsonl", "model.safetensors", "config.json", "adapter", *more)
    for path in [path for name in names for path in out.glob(name)] if in_use and jax.process_index() == 0 else ():
        remove(path)
    barrier("emptied")


class Run:
    """A training script's folder and its clock.

        run = gpt.Run(hashes, **vars(config))             # makes out/NAME, or refuses to overwrite it
        state, first = run.restore(state)                 # --resume: the last checkpoint
        for step in run.steps(first):
            state, metrics = train_step(state, ...)
            run.log(step, metrics)                        # written one step later: the device is never waited for
            run.checkpoint(step, state)                   # every --save-every steps, and when asked to stop
        run.finish(model, tokenizer)

    All settings of a script are given, for the record: `hashes` are those of its data files, `notes` what else is worth
    keeping. The folder holds config.json (the model's, with this run's under "run"), metrics.jsonl, samples.jsonl,
    checkpoint/ and, at the end, the model. Ctrl-C and SIGTERM end the step under way, save and stop. A step that does
    not end within a minute of that is given up: long steps are saved one by one, so it alone is lost.
    """

    def __init__(
        self, hashes: dict, notes: dict | None = None, *, steps: int, out, seed: int, resume: bool = False,
        overwrite: bool = False, save_every: int = 100, **settings,
    ):  # fmt: skip
        if steps < 1:
            raise ValueError(f"--steps {steps}: a run takes 1 step at least")
        self.total, self.out, self.resume, self.save_every = steps, Path(out), resume, save_every
        self.main = jax.process_index() == 0
        self.stopping, self._pending, self._bar, self._manager = None, None, None, None
        self._saved, self._saved_before, self._agreed = 0, 0, False
        self._seconds, self._asked, self._ending = 0.0, float("inf"), False  # of the last step; when a signal came
        self._learns = settings.get("lr") != 0  # a rate of 0 is meant
        empty_out(out, resume, overwrite, settings)
        self.out.mkdir(parents=True, exist_ok=True)
        self.info = dict(
            script=Path(sys.argv[0]).name,
            command=shlex.join(sys.argv),
            config={name: str(value) for name, value in {"out": out, "steps": steps, "seed": seed, **settings}.items()},
            seed=seed,
            versions={"python": sys.version.split()[0]} | {m.__name__: m.__version__ for m in (jax, eqx, optax, np)},
            devices=device_note(),
            data=hashes,
            **(notes or {}),
        )
        if self.main and not (self.out / "config.json").exists():
            write_json(self.out / "config.json", {"run": self.info})
        if self.main:
            print(f"{self.info['script']} -> {self.out} on {self.info['devices']}; {self.total:,} steps")

    @property
    def must_stop(self) -> bool:
        """Whether to stop after this step. Several processes must stop after the same one, so they wait until all know
        of a signal that one of them got."""
        return self._agreed if jax.process_count() > 1 else bool(self.stopping)

    # checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def manager(self):
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager((self.out / "checkpoint").absolute(), options=options)
        return self._manager

    def restore(self, state):
        """(state, first step): the last checkpoint with --resume, otherwise what was given and 0. The state begins with
        the model that learns."""
        self._before = fingerprint(state[0])
        if not self.resume:
            return state, 0
        import orbax.checkpoint as ocp

        step = self.manager.latest_step()
        if step is None:
            print(f"{self.out} has no checkpoint yet: starting from step 0")
            self._cut_logs(0)
            return state, 0
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        wanted = {_path(p): jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for p, x in leaves}
        try:
            found = self.manager.restore(step, args=ocp.args.StandardRestore(wanted))
        except ValueError as error:
            reason = "; ".join(self._changes()) or str(error).splitlines()[0]
            raise ValueError(f"{self.out}/checkpoint does not fit this configuration: {reason}") from None
        self._cut_logs(step)
        if step > self.total:
            raise ValueError(f"{self.out}/checkpoint is of step {step:,}: --steps {self.total:,} lies behind it")
        self._saved, self._saved_before = step, step
        print(f"continuing {self.out} at step {step:,}")
        if self.main and step < self.total and (changes := self._changes()):  # else no step is taken
            print(f"warning: this run began with other settings: {'; '.join(changes)}", file=sys.stderr)
        return jax.tree_util.tree_unflatten(tree, [found[_path(p)] for p, _ in leaves]), step

    def _changes(self) -> list[str]:
        """In words, which settings and data files differ from those with which the run began."""
        began = {"config": {}, "data": {}} | json.loads((self.out / "config.json").read_text()).get("run", {})
        news = []
        for name, new in self.info["config"].items():
            old = began["config"].get(name, new)
            if old != new and name != "out":
                news.append(f"--{name.replace('_', '-')} was {old}, is {new}")
        for name in sorted(began["config"].keys() - self.info["config"].keys()):
            news.append(f"--{name.replace('_', '-')} was {began['config'][name]}, is no option now")
        return news + [
            f"{path} has changed" for path, new in self.info["data"].items() if began["data"].get(path, new) != new
        ]

    def checkpoint(self, step: int, state):
        """Save when it is time, or when a signal asks to stop; then the process ends here."""
        done, alone = step + 1, jax.process_count() == 1
        if step == self._first or alone and self._seconds > PATIENCE:
            self.flush()  # how long did it take?
        long = alone and self._seconds > PATIENCE and not self.manager.is_saving_in_progress()
        if not (self.must_stop or done % self.save_every == 0 or done == self.total or long):
            return
        import orbax.checkpoint as ocp

        self.flush()  # a NaN is found before it is saved
        self._ending = self.must_stop
        if done == self.total:
            self._check_learned(self._before, fingerprint(state[0]))
        leaves = {_path(p): x for p, x in jax.tree_util.tree_leaves_with_path(state)}
        if done != self._saved:
            self.manager.save(done, args=ocp.args.StandardSave(leaves))
            self._saved_before, self._saved = self._saved, done
        if self.must_stop:
            self._ending = True
            self.manager.wait_until_finished()
            self.close()
            why = self.stopping or "another process"
            print(
                f"\nstopped by {why} after step {done:,}: --resume goes on from here, --resume --steps {done} makes a "
                "model folder of it as it is", file=sys.stderr,
            )  # fmt: skip
            raise SystemExit(1)

    def _check_learned(self, before, after):
        """A run whose model is at its end what it was at its start, by the fingerprints, has learned from nothing."""
        if self._learns and (before == after).all():
            raise ValueError(
                f"{self.total:,} steps have changed no weight: every gradient was 0 (rows that weigh nothing, rewards "
                "that are all alike), or --lr is too small for the weights' precision. No model was written"
            )

    def _cut_logs(self, step: int):
        """Forget what was logged after the checkpoint: those steps will be run again."""
        for name in ("metrics.jsonl", "samples.jsonl") if self.main else ():
            file = self.out / name
            if file.exists():
                lines = [line for line in file.read_text().splitlines() if _step_of(line) < step]
                write_atomic(file, lambda f, lines=lines: Path(f).write_text("".join(line + "\n" for line in lines)))

    # steps and metrics -----------------------------------------------------------------------------------------------

    def steps(self, first: int):
        """first..total-1 with a progress bar; meanwhile signals ask for a save instead of killing."""
        self._log = open(self.out / "metrics.jsonl", "a") if self.main else None
        self._bar = progress(
            total=self.total, initial=first, desc=f"{self.out.name} (compiling the first step)", unit="step",
            lines=False,
        )  # fmt: skip
        self._clock = self._said = time.perf_counter()
        self._first = self._next = first
        with self._signals():
            try:
                for step in range(first, self.total):
                    yield step
                    self._bar.update()
                self.flush()
            finally:
                self._ending = True  # a checkpoint that is being written is not given up
                self.close()

    @contextmanager
    def _signals(self):
        """Python calls its handlers between two of its own instructions, so not while it waits for the device. The
        number of a signal goes at once to a thread that reads it from a pipe (findings/jax_ctrl_c.sh)."""
        main_thread = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
        before = {number: signal.signal(number, self._note_signal) for number in numbers}
        heard, told = os.pipe()
        os.set_blocking(told, False)
        thread = threading.Thread(target=self._listen, args=(heard,), daemon=True)
        thread.start()
        other = signal.set_wakeup_fd(told, warn_on_full_buffer=False) if main_thread else None
        try:
            yield
        finally:
            if main_thread:
                signal.set_wakeup_fd(other)
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)  # None: one that Python did not set
            os.write(told, b"\0")
            thread.join()
            os.close(told), os.close(heard)

    def _note_signal(self, number, frame=None):
        self.stopping = self.stopping or signal.Signals(number).name

    def _listen(self, pipe: int):
        """On a thread: hear signals, give up a step that does not end, and tell a log file of a long one."""
        asked, said, in_a_log = False, 0.0, self._bar.disable and self.main
        while True:
            for number in os.read(pipe, 64) if select.select([pipe], [], [], min(1, PATIENCE / 8))[0] else b"":
                if number == 0:
                    return
                if number in (signal.SIGINT, signal.SIGTERM):
                    self._ask_to_stop(number, again=asked)
                    asked = True
            now = time.perf_counter()
            if now - self._asked > GRACE and not self._ending and jax.process_count() == 1:
                self._stop_at_once()  # of several processes, those that go on would wait for this one
            if in_a_log and self._next < self.total and now - max(self._clock, said) > PATIENCE:
                print(f"step {self._next:5d}/{self.total}  {now - self._clock:.0f} s so far", flush=True)
                said = now

    def _ask_to_stop(self, number: int, again: bool):
        if again:
            self._stop_at_once()
        self._note_signal(number)
        self._asked = time.perf_counter()
        # not `print`: the main thread may hold stderr
        os.write(2, f"\n{self.stopping}: this step is ended and saved; a second one stops at once\n".encode())

    def _stop_at_once(self):
        os.write(2, f"\nstopped at once. {self._last_good()}\n".encode())
        os._exit(1)  # Python's own end would wait for what XLA still computes, or abort in it

    def log(self, step: int, metrics: dict):
        """Keep this step's metrics (device arrays are fine) and write the previous step's."""
        self.flush()
        if jax.process_count() > 1:
            jax.block_until_ready(metrics)  # one collective at a time: two programs' must not cross
        stop = any_process(bool(self.stopping)) if jax.process_count() > 1 else False
        self._pending = (step, metrics, stop, when_ready(metrics))

    def flush(self):
        if self._pending is None:
            return
        (step, metrics, stop, ready), self._pending = self._pending, None
        done = ready.result()
        self._agreed |= bool(stop)
        self._clock, self._seconds, self._next = done, done - self._clock, step + 1
        metrics = {name: float(value) for name, value in to_numpy(metrics).items()} | {"seconds": self._seconds}
        if step == self._first + 1:
            self._estimate(self._seconds)
        if self._log:
            print(json.dumps({"step": step} | metrics), file=self._log, flush=True)
        bad = [name for name in ("loss", "grad_norm") if not np.isfinite(metrics.get(name, 0.0))]
        if bad:
            raise FloatingPointError(
                f"the {bad[0]} of step {step} is {metrics[bad[0]]}. {self._last_good()} "
                "Try a lower --lr, --dtype float32, or look at the batch of that step."
            )
        self._bar.set_description(self.out.name)
        short = lambda name: name if name == "val/loss" else name.split("/")[-1]  # beside the loss of the step
        shown = {short(k): f"{v:.4g}" for k, v in metrics.items() if k in SHOWN}
        self._bar.set_postfix(shown)
        due = step % max(self.total // 20, 1) == 0 or step == self.total - 1 or done - self._said > PATIENCE
        if self._bar.disable and self.main and due:
            print(f"step {step:5d}/{self.total}  " + "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
            self._said = done

    def _last_good(self) -> str:
        saving = self._manager is not None and self._manager.is_saving_in_progress()
        step = self._saved_before if saving else self._saved
        where = f"The last good state is in {self.out}/checkpoint, after step {step:,}."
        return where if step else "Nothing was saved yet."

    def _estimate(self, seconds: float):
        """Say what the run will take: the first step compiles, the second is like the others."""
        left, memory = seconds * (self.total - self._first - 2), peak_memory() / 2**30
        if self.main:
            self._bar.write(
                f"{seconds:.2g} s a step, about {left / 60:.0f} min to go; {memory:.1f} GiB of memory so far"
            )

    def sample(self, step: int, **record):
        """Keep a sample in samples.jsonl and show it."""
        if self.main:
            with open(self.out / "samples.jsonl", "a") as file:
                file.write(json.dumps({"step": step} | record) + "\n")
            lines = [
                f"  {name}: {value if isinstance(value, str) else round(value, 3)}" for name, value in record.items()
            ]
            self._bar.write(f"-- step {step}\n" + "\n".join(line.replace("\n\n", " ") for line in lines))

    def warn(self, text: str):
        if self.main:
            self._bar.write(f"warning: {text}", file=sys.stderr)

    def finish(self, model, tokenizer, base=None):
        """Wait for the last checkpoint and write the model folder. Where an adapter is what learned: merged with
        `base`, the folder that it was trained on, in fp32, and by itself in adapter/."""
        if self._manager is not None:
            self._manager.wait_until_finished()
        if isinstance(getattr(model, "body", model), Adapter):
            start, adapter = load(base)[0], model
            model = merge(attach(adapter, start))
            self._check_learned(fingerprint(start), fingerprint(getattr(model, "body", model)))
            save_adapter(self.out / "adapter", adapter, base)
        save(self.out, model, tokenizer, {"run": self.info})
        if self.main:
            print(f"wrote {self.out}")

    def close(self):
        if self._bar is not None:
            self._bar.close()
        if self._manager is not None:
            self._manager.wait_until_finished()
        if getattr(self, "_log", None):
            self._log.close()


def when_ready(tree) -> Future:
    """The time at which the arrays of a tree are computed. A thread waits, so that the main one may go on."""
    found = Future()

    def wait():
        with suppress(Exception):  # whoever reads the arrays will see it
            jax.block_until_ready(tree)
        found.set_result(time.perf_counter())

    threading.Thread(target=wait, daemon=True).start()
    return found


def peak_memory() -> int:
    """Bytes of the device's memory, or of this process on a CPU, that were in use at most."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource  # Unix

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def fingerprint(model) -> np.ndarray:
    """(arrays,) a number for each array of a model; another one when any of its numbers changes."""
    bits = lambda x: lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).sum()
    return to_numpy(jax.jit(lambda model: jnp.stack([bits(x) for x in jax.tree.leaves(model)]))(model))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")  # a line cut short by a kill
