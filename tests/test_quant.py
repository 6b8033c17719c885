"""Quantised models: each product against numpy, the integers and scales themselves, bytes, and what `generate` does."""

from functools import partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt
import serve

HOWS = ("int8", "int4")
# one row of each kind: what fits, a row of zeros, and rows of very different size (a scale along the wrong axis shows)
TABLE = np.array([[1, -127, 63.4, 0], [0, 0, 0, 0], [0.02, -0.01, 0.005, 0.0149], [-3e3, 1e3, 2e3, 1]], np.float32)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def quantised(kind, integers, matrix):
    return kind(*jax.jit(integers)(jnp.asarray(matrix)))


def unpack(matrix: serve.Int4, inputs: int) -> np.ndarray:
    """Integers and scales of an Int4 read by loops, multiplied out: (O, I)."""
    values, scale = np.asarray(matrix.values), np.asarray(matrix.scale)
    out = np.zeros((len(values), inputs))
    size = inputs // 2 // scale.shape[-1]
    for row in range(len(values)):
        for i in range(inputs):
            half, place = divmod(i, inputs // 2)
            bits = values[row, place] >> 4 if half else values[row, place] & 15
            out[row, i] = (int(bits) - 16 * (bits > 7)) * scale[row, half, place // size]
    return out


# the integers ---------------------------------------------------------------------------------------------------------


def test_int8_rounds_to_nearest_with_one_scale_a_row():
    got = quantised(serve.Int8, serve.to_int8, TABLE)
    np.testing.assert_array_equal(got.values, [[1, -127, 63, 0], [0] * 4, [127, -64, 32, 95], [-127, 42, 85, 0]])
    np.testing.assert_allclose(got.scale, [1, 1, 0.02 / 127, 3e3 / 127], rtol=1e-6)
    assert got.values.dtype == jnp.int8


def test_activations_are_two_bytes_that_make_one_number():
    x = np.array([[127 * 256, 128, 127, -128, -129, 0.4, -127 * 256], [0] * 7], np.float32)
    high, low, scale = serve.to_two_bytes(x)
    assert high.dtype == low.dtype == jnp.int8
    np.testing.assert_array_equal(high, [[127, 1, 0, 0, -1, 0, -127], [0] * 7])
    np.testing.assert_array_equal(low, [[0, -128, 127, -128, 127, 0, 0], [0] * 7])
    np.testing.assert_array_equal(scale, [1, 1])
    x = normal(5, 300) * np.exp(normal(5, 1, seed=1))
    high, low, scale = (np.asarray(y, np.float64) for y in serve.to_two_bytes(x))
    assert (np.abs((256 * high + low) * scale[:, None] - x) <= np.abs(x).max(1, keepdims=True) / 65_000).all()


def test_int4_packs_both_halves_of_a_row_in_one_byte_each():
    row = np.array([[7, -7, 3, 0, -1, 14, -14, 2.9]], np.float32)  # groups of 2: scales 1, 3/7 | 2, 2
    got = quantised(serve.Int4, partial(serve.to_int4, size=2), row)
    np.testing.assert_allclose(got.scale, [[[1, 3 / 7], [2, 2]]], rtol=1e-6)
    integers = np.array([[7, -7, 7, 0], [0, 7, -7, 1]])  # low bits, high bits; -0.5 goes to the even 0
    np.testing.assert_array_equal(got.values, (integers[1:] % 16) << 4 | integers[:1] % 16)
    np.testing.assert_allclose(got.dense(), [[7, -7, 3, 0, 0, 14, -14, 2]], rtol=1e-6)


def test_error_bounds():
    matrix = normal(6, 256)
    matrix[:, 3] *= 30  # spoils the scale of all of its row in int8, of one group in int4
    largest = np.abs(matrix).max(1, keepdims=True)
    error = np.abs(quantised(serve.Int8, serve.to_int8, matrix).dense() - matrix)
    assert (error <= largest / 254 * (1 + 1e-4)).all() and error.max() > largest.max() / 300
    error = np.abs(quantised(serve.Int4, serve.to_int4, matrix).dense() - matrix)
    groups = np.abs(matrix).reshape(6, 4, 64).max(-1).repeat(64, axis=-1)
    assert (error <= groups / 14 * (1 + 1e-4)).all() and error.max() > groups.max() / 20


def test_groups_divide_the_halves_of_a_row():
    scales = lambda n: jax.eval_shape(serve.to_int4, jax.ShapeDtypeStruct((1, n), jnp.float32))[1]
    shapes = {n: scales(n).shape for n in (768, 352, 172, 64)}
    assert shapes == {768: (1, 2, 6), 352: (1, 2, 4), 172: (1, 2, 2), 64: (1, 2, 1)}
    with pytest.raises(ValueError, match="width of 7 is odd"):
        serve.to_int4(jnp.ones((1, 7)))


# products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1, 64), (3, 64), (2, 5, 64)])
@pytest.mark.parametrize("rows", [10, 2 * serve.CHUNK_ROWS + 1])
def test_products_are_those_of_the_dense_matrix(rows, shape, monkeypatch):
    matrix = normal(rows, 64) * np.exp(normal(rows, 1, seed=1))  # channels of different size
    x = normal(*shape, seed=2) * np.exp(normal(*shape[:-1], 1, seed=3))
    multiply = jax.jit(lambda matrix, x: matrix(x))

    int4 = quantised(serve.Int4, partial(serve.to_int4, size=16), matrix)
    np.testing.assert_allclose(multiply(int4, x), x @ unpack(int4, 64).T, rtol=1e-4, atol=1e-4)

    scale = np.abs(x).max(-1, keepdims=True) / (127 * 256)
    rounded = np.round(x / scale) * scale  # activations as int8 sees them
    int8 = quantised(serve.Int8, serve.to_int8, matrix)
    dense = np.asarray(int8.values, float) * np.asarray(int8.scale)[:, None]
    np.testing.assert_allclose(multiply(int8, x), rounded @ dense.T, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # where activations stay floats
    np.testing.assert_allclose(jax.jit(lambda matrix, x: matrix(x))(int8, x), x @ dense.T, rtol=1e-4, atol=1e-4)


def test_int8_of_tokens_of_zeros_is_zero():
    assert not np.asarray(quantised(serve.Int8, serve.to_int8, normal(5, 8))(jnp.zeros((3, 8)))).any()


# the two forms of the integer product: which one is taken follows the CPU, and is set here


@pytest.fixture(params=[True, False], ids=["vnni", "plain"])
def vnni(request, monkeypatch):
    monkeypatch.setattr(serve, "has_vnni", lambda: request.param)
    return request.param


@pytest.mark.parametrize("shape", [(2, 3072), (1, 5, 768), (3, 4, 33)])
def test_integer_products_are_exact(vnni, shape):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, shape).astype(np.int8)
    x[0], weights = -128, rng.integers(-127, 128, (70, shape[-1])).astype(np.int8)
    weights[:2] = [[127], [-127]]  # with the line above the largest sums there are
    int8 = serve.Int8(jnp.asarray(weights), jnp.ones(70), jnp.asarray(weights.sum(1, dtype=np.int32)))
    got = jax.jit(lambda matrix, x: matrix.integers(x))(int8, x)
    np.testing.assert_array_equal(got, x.astype(int) @ weights.T.astype(int))


def test_operands_of_the_integer_product_stay_bytes(vnni):
    """JAX would make both int32, four times the bytes and no kernel for them, if the precision were not given."""
    matrix = quantised(serve.Int8, serve.to_int8, normal(5, 8))
    text = jax.jit(lambda matrix, x: matrix(x)).lower(matrix, jnp.ones((3, 8))).as_text()
    product = next(line for line in text.splitlines() if "dot_general" in line)
    assert f"tensor<2x3x8x{'ui8' if vnni else 'i8'}>, tensor<5x8xi8>) -> tensor<2x3x5xi32>" in product


def test_vnni_is_a_flag_of_a_cpu_that_is_in_use(monkeypatch, tmp_path):
    cpu, has_vnni = tmp_path / "cpuinfo", serve.has_vnni.__wrapped__
    monkeypatch.setattr(serve, "Path", lambda name: {"/proc/cpuinfo": cpu}[name])
    assert not has_vnni()  # no such file: not Linux
    cpu.write_text("flags : fpu avx2 avx512f")
    assert not has_vnni()
    cpu.write_text("flags : fpu avx2 avx512f avx512_vnni")
    assert has_vnni()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not has_vnni()


@pytest.mark.parametrize("kind, integers", [(serve.Int8, serve.to_int8), (serve.Int4, serve.to_int4)])
def test_rows_are_those_of_the_dense_table(kind, integers):
    table = quantised(kind, integers, normal(9, 12))
    index = np.array([[3, 0, 8], [3, 1, 2]])
    np.testing.assert_array_equal(table.look_up(index), np.asarray(table.dense())[index])


# models ---------------------------------------------------------------------------------------------------------------


def dense_model(model: gpt.GPT) -> gpt.GPT:
    """The floats that a quantised model stands for, in a plain model."""
    linear = lambda x: (
        gpt.Linear(x.weight.dense().swapaxes(-1, -2), x.bias) if isinstance(x, serve.QuantisedLinear) else x
    )
    blocks = jax.tree.map(linear, model.blocks, is_leaf=lambda x: isinstance(x, serve.QuantisedLinear))
    head = None if model.head is None else model.head.dense()
    return gpt.GPT(model.wte.dense(), model.wpe, blocks, model.norm, head, model.config)


@pytest.fixture(scope="module", params=["gpt2", "llama_bias", "qwen3"])
def model(request, golden):
    return gpt.load(golden / request.param)[0]


TOKENS = np.random.default_rng(0).integers(4, 61, (2, 12)).astype(np.int32)
logits = jax.jit(lambda model, tokens: model.logits(model(tokens)))


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_forward_pass_is_that_of_the_dense_model(model, how):
    small = serve.quantize(model, how)
    want = logits(dense_model(small), TOKENS)  # its activations are floats, those of int8, also int4's head, two bytes
    np.testing.assert_allclose(logits(small, TOKENS), want, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("how, off", [("int8", 0.03), ("int4", 0.5)])
def test_logits_stay_near(model, how, off):
    want, got = logits(model, TOKENS), logits(serve.quantize(model, how), TOKENS)
    assert got.dtype == jnp.float32
    assert 0 < np.std(got - want) < off * np.std(want)


@pytest.mark.parametrize("rows", [1, 3])
def test_both_forms_of_the_integer_product_generate_the_same(tiny_model, monkeypatch, rows):
    small, prompts = serve.quantize(tiny_model, "int8"), np.random.default_rng(1).integers(4, 32, (rows, 5))
    outs = []
    for vnni in (True, False):
        monkeypatch.setattr(serve, "has_vnni", lambda vnni=vnni: vnni)
        ask = jax.jit(lambda m, p: gpt.generate.__wrapped__(m, p, p * 0 + 1, jax.random.key(0), 6, ends=()))
        outs.append(ask(small, prompts.astype(np.int32)))
    jax.tree.map(np.testing.assert_array_equal, *outs)


@pytest.mark.parametrize("how, rows", [("int8", 1), ("int8", 3), ("int4", 3)])
def test_generate_samples_the_quantised_model(tiny_model, how, rows):
    """Its log-probs are those of a forward pass of the same weights (unstacked there, scanned here)."""
    small = serve.quantize(tiny_model, how)
    prompts = np.random.default_rng(1).integers(4, 32, (rows, 5)).astype(np.int32)
    out = gpt.generate(small, prompts, np.ones_like(prompts), jax.random.key(0), 6, ends=())
    tokens = np.concatenate([prompts, out.tokens], 1)
    want = jax.jit(gpt.token_logprobs)(small, tokens)[:, 4:]
    # keys and values that differ in the last bit may round to other bytes
    np.testing.assert_allclose(out.logprobs, want, atol=5e-4 if how == "int8" else 1e-4)


def test_norms_biases_positions_and_precision_stay(golden):
    model = gpt.cast(gpt.load(golden / "gpt2")[0], jnp.bfloat16)
    small = serve.quantize(model, "int4")
    assert small.head is None
    for name in ("wpe", "norm.scale", "blocks.norm1.scale", "blocks.norm2.bias", "blocks.q.bias", "blocks.down.bias"):
        np.testing.assert_array_equal(attrgetter(name)(small), attrgetter(name)(model))
    for how in HOWS:
        small = jax.eval_shape(partial(serve.quantize, how=how), model)
        assert jax.eval_shape(gpt.GPT.__call__, small, TOKENS).dtype == jnp.bfloat16
        assert jax.eval_shape(logits, small, TOKENS).dtype == jnp.float32


def test_unknown_kind(tiny_model):
    with pytest.raises(ValueError, match="int8 or int4"):
        serve.quantize(tiny_model, "int3")


@pytest.mark.parametrize("how, most", [("int8", 0.55), ("int4", 0.36)])
def test_bytes_of_gpt2(how, most):
    config = gpt.make_config(50257, 1024, 12, 12, 768, "gpt2")
    model = jax.eval_shape(lambda key: gpt.cast(gpt.init(config, key), jnp.bfloat16), jax.random.key(0))
    assert serve.size_in_bytes(model) == 2 * 124_439_808
    small = jax.eval_shape(partial(serve.quantize, how=how), model)
    assert serve.size_in_bytes(small) <= most * serve.size_in_bytes(model)


# quality --------------------------------------------------------------------------------------------------------------


def test_quality_is_that_of_whole_softmaxes(tiny_model):
    rng = np.random.default_rng(2)
    other = serve.quantize(tiny_model, "int4")
    batches, kl, same, nll, other_nll = [], [], [], [], []
    for _ in range(2):
        tokens, mask = rng.integers(4, 32, (3, 9)).astype(np.int32), rng.integers(0, 2, (3, 9)).astype(np.int32)
        batches.append(dict(tokens=tokens, segments=np.ones_like(tokens), mask=mask))
        p, q = (np.asarray(jax.nn.log_softmax(logits(m, tokens)), float) for m in (tiny_model, other))
        for row, t in np.argwhere(mask[:, 1:]):
            a, b, token = p[row, t], q[row, t], tokens[row, t + 1]
            kl.append((np.exp(a) * (a - b)).sum())
            same.append(a.argmax() == b.argmax())
            nll.append(-a[token])
            other_nll.append(-b[token])
    got = serve.quality(tiny_model, other, batches)
    want = dict(kl=np.mean(kl), top1=np.mean(same))
    want |= dict(perplexity=np.exp(np.mean(nll)), perplexity_quantised=np.exp(np.mean(other_nll)))
    assert got == pytest.approx(want, rel=1e-3) and 0 < want["top1"] < 1


def test_measuring_quality_ends_in_time_and_says_so(tiny_model, monkeypatch, caplog):
    tokens = np.random.default_rng(3).integers(4, 32, (3, 2, 9)).astype(np.int32)
    batches = [dict(tokens=t, segments=np.ones_like(t), mask=np.ones_like(t)) for t in tokens]
    small = serve.quantize(tiny_model, "int4")
    first = serve.quality(tiny_model, small, batches[:1])
    monkeypatch.setattr(serve, "QUALITY_SECONDS", 0.0)
    assert serve.quality(tiny_model, small, batches, "toy int4") == first
    assert "toy int4: measured on 1 of 3 batches" in caplog.text
