"""The model, its log-probabilities and its generation: against PyTorch's numbers and against brute force."""

import dataclasses
import gzip
import json
import os
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

import gpt
import grpo

CLOSE = dict(rtol=1e-4, atol=1e-4)
LMS = ["gpt2", "llama", "llama3", "llama_bias", "mistral", "qwen2", "qwen3", "qwen3_bias"]
CLASSIFIERS = ["gpt2_score", "llama_score", "qwen3_score"]
B, T, V, NEW = 3, 6, 61, 8


@jax.jit
def all_logits(model, tokens, segments):
    return model.logits(model(tokens, segments))


token_logprobs = jax.jit(gpt.token_logprobs)
hidden_states = jax.jit(lambda model, tokens: model(tokens))
scores_of = jax.jit(lambda model, tokens, mask: model(tokens, mask))


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3"])
def model(request, golden):
    return gpt.load(golden / request.param)[0]


@pytest.fixture(scope="module")
def llama(golden):
    return gpt.load(golden / "llama")[0]


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(4, V, (2, 12)).astype(np.int32)


@pytest.fixture(scope="module")
def prompts():
    """Left-padded prompts of 6, 4 and 1 tokens, and their mask."""
    mask = (np.arange(T) >= T - np.array([[6], [4], [1]])).astype(np.int32)
    return np.random.default_rng(1).integers(4, V, (B, T)).astype(np.int32) * mask, mask


# the model ------------------------------------------------------------------------------------------------------------


def load_spelled(folder, spelling, empty):
    """The folder's model, with one of its two configuration files."""
    shutil.copy(folder / "model.safetensors", empty)
    shutil.copy(folder / spelling, empty / "config.json")
    return gpt.load(empty)[0]


@pytest.mark.parametrize("spelling", ["config.json", "config.v4.json"])
@pytest.mark.parametrize("name", LMS)
def test_logits_are_those_of_transformers(name, spelling, golden, tmp_path):
    model = load_spelled(golden / name, spelling, tmp_path)
    want = np.load(golden / name / "logits.npz")
    got = all_logits(model, want["tokens"], np.ones_like(want["tokens"]))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want["logits"], **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_left_padded_logits_are_those_of_transformers(name, golden):
    want = np.load(golden / name / "logits.npz")
    mask = want["padded_mask"]
    got = all_logits(gpt.load(golden / name)[0], want["padded_tokens"], mask)
    np.testing.assert_allclose(got * mask[..., None], want["padded_logits"], **CLOSE)
    real = mask > 0
    np.testing.assert_array_equal(gpt.segment_positions(mask)[real], want["padded_positions"][real])


@pytest.mark.parametrize("spelling", ["config.json", "config.v4.json"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_scores_are_those_of_transformers(name, spelling, golden, tmp_path):
    model = load_spelled(golden / name, spelling, tmp_path)
    want = np.load(golden / name / "logits.npz")
    np.testing.assert_allclose(scores_of(model, want["tokens"], want["mask"]), want["scores"], **CLOSE)


def test_the_future_does_not_reach_the_past(model, tokens):
    ones = np.ones_like(tokens)
    before = all_logits(model, tokens, ones)
    changed = tokens.copy()
    changed[:, 5] = tokens[:, 5] % 50 + 5
    after = all_logits(model, changed, ones)
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before - after)[:, 5:].max(-1) > 1e-3).all()


def test_bfloat16_weights_give_float32_logits_close_to_the_float32_ones(llama, tokens):
    ones = np.ones_like(tokens)
    got = all_logits(gpt.cast(llama, jnp.bfloat16), tokens, ones)
    assert got.dtype == jnp.float32
    assert np.abs(got - all_logits(llama, tokens, ones)).mean() < 0.05


def test_learned_positions_refuse_a_longer_row(golden):
    model, _ = gpt.load(golden / "gpt2")
    with pytest.raises(ValueError, match="33.*32 positions"):
        jax.eval_shape(model, jax.ShapeDtypeStruct((1, 33), jnp.int32))


@pytest.mark.parametrize("pool", ["last", "mean", "attention"])
def test_a_score_does_not_depend_on_the_side_or_content_of_the_padding(pool, tiny_model):
    model = gpt.init_score_model(tiny_model, jax.random.key(1), pool)
    if pool == "attention":
        model = jax.tree.map(lambda x: x, model)
        object.__setattr__(model, "query", jax.random.normal(jax.random.key(2), model.query.shape))
    row = np.arange(3, 9)
    tokens, mask = np.zeros((3, 10), np.int32), np.zeros((3, 10), np.int32)
    tokens[2] = 7
    for i, start in enumerate([0, 4, 2]):
        tokens[i, start : start + 6], mask[i, start : start + 6] = row, 1
    scores = scores_of(model, tokens, mask)
    np.testing.assert_allclose(scores, np.full(3, scores[0]), rtol=1e-5)


@pytest.mark.parametrize("suffix", [(), (9,), (9, 8)])
def test_a_score_is_read_where_the_response_ends(suffix):
    eos, other, pad = 2, 3, 0
    prompts, prompt_mask = jnp.array([[0, 5, 6], [4, 5, 6], [4, 5, 6]]), jnp.array([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    responses = jnp.array([[7, eos, pad, pad], [7, 7, 7, 7], [other, pad, pad, pad]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    inputs = jax.jit(gpt.score_inputs, static_argnums=(4, 5))
    tokens, real = inputs(prompts, prompt_mask, responses, mask, suffix, (eos, other))
    ends = [list(suffix) or [eos], list(suffix), list(suffix) or [other]]
    want = [[5, 6, 7, *ends[0]], [4, 5, 6, 7, 7, 7, 7, *ends[1]], [4, 5, 6, *ends[2]]]
    assert [row[seen].tolist() for row, seen in zip(np.asarray(tokens), np.asarray(real))] == want


# log-probabilities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_are_the_log_softmax_at_the_next_token(model, tokens, temperature):
    logits = np.asarray(all_logits(model, tokens, np.ones_like(tokens)), np.float64) / temperature
    want = np.take_along_axis(log_softmax(logits, -1)[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    got = token_logprobs(model, tokens, np.ones_like(tokens), temperature)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_padding_changes_no_logprob(model, tokens):
    row = tokens[0, :7]
    places = [slice(0, 7), slice(5, 12)]
    got = []
    for pad in (3, 40):
        padded, mask = np.full((2, 12), pad, np.int32), np.zeros((2, 12), np.int32)
        for i, place in enumerate(places):
            padded[i, place], mask[i, place] = row, 1
        logprobs = np.asarray(token_logprobs(model, padded, mask, 1.0))
        got.append([line[place.start : place.stop - 1] for line, place in zip(logprobs, places)])
    np.testing.assert_array_equal(got[0], got[1])
    np.testing.assert_allclose(got[0][0], got[0][1], rtol=1e-5, atol=1e-5)


def test_other_rows_of_the_batch_change_nothing(model, tokens):
    ones = np.ones_like(tokens)
    with_itself = token_logprobs(model, tokens[[0, 0]], ones, 1.0)
    with_another = token_logprobs(model, tokens, ones, 1.0)
    np.testing.assert_array_equal(with_itself[0], with_another[0])


def head_sum(model, hidden, tokens):
    logprobs, entropy = gpt.head_logprobs(model, hidden, tokens, 0.7)
    return (logprobs * jnp.arange(12)).sum() + entropy.sum() * 0.3, (logprobs, entropy)


def test_the_head_in_pieces_is_the_head_at_once_in_value_and_gradient(llama, tokens, monkeypatch):
    hidden = hidden_states(llama, tokens)
    value = lambda: jax.jit(jax.value_and_grad(lambda *a: head_sum(*a), (0, 1), has_aux=True))(llama, hidden, tokens)
    whole = value()
    monkeypatch.setattr(gpt, "head_budget", lambda: 2 * 5 * V)  # 5 columns at most, and 12 is no multiple of them
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), value(), whole)


def equations(jaxpr):
    """All operations of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


def sizes_with(jaxpr, width):
    """Sizes of all intermediate arrays that have an axis of this width."""
    for equation in equations(jaxpr):
        yield from (v.aval.size for v in equation.outvars if width in getattr(v.aval, "shape", ()))


def test_the_head_in_pieces_never_holds_all_logits(llama, monkeypatch):
    rows, columns = 8, 64
    tokens = jnp.zeros((rows, columns), jnp.int32)
    loss = lambda m: gpt.token_logprobs(m, tokens).sum()
    largest = lambda: max(sizes_with(jax.make_jaxpr(jax.grad(lambda m: loss(m)))(llama).jaxpr, V))
    assert largest() == rows * (columns - 1) * V
    monkeypatch.setattr(gpt, "head_budget", lambda: rows * 8 * V)
    assert largest() <= rows * 8 * V


def test_an_accelerator_holds_more_logits_at_a_time(monkeypatch):
    memory = lambda size: monkeypatch.setattr(
        jax, "local_devices", lambda: [SimpleNamespace(memory_stats=lambda: size and {"bytes_limit": size})]
    )
    for size, budget in ((None, 2**26), (2**30, 2**26), (2**36, 2**31), (60_000_000_000, 2**30)):
        memory(size)
        assert gpt.head_budget() == budget


@pytest.mark.parametrize("rows", [511, 512])
def test_a_gpu_predicts_with_a_table_of_aligned_rows(rows, monkeypatch):
    """What is added to 61 words changes neither logits nor gradients, and is not copied for a few rows."""
    x, table = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(rows, 8), (V, 8)]))
    product = lambda x, table: gpt.unembed(x, table, jnp.float32)
    want = jax.jit(product)(x, table), gradients_of(product, x, table)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    product = lambda x, table: gpt.unembed(x, table, jnp.float32)
    found = jax.jit(product)(x, table), gradients_of(product, x, table)
    assert any(sizes_with(jax.make_jaxpr(product)(x, table).jaxpr, 128)) == (rows == 512)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, want)


@pytest.mark.parametrize("how, grouped", [("packed", False), ("prefix", True)])
def test_what_cudnn_is_asked_for_is_plain_attention(how, grouped, monkeypatch):
    """Padding, packing, a prefix, shared key-value heads: by the call that a GPU gets, another kernel in its place."""
    heads = dict(kv_heads=2) if grouped else {}
    model = gpt.init(gpt.make_config(V, 32, 2, 4, 32, **heads), jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, V, (4, 13)).astype(np.int32)  # odd lengths, where cuDNN has none
    segments = np.array([[0] * 3 + [1] * 10, [1] * 13, [1] * 5 + [2] * 8, [1] * 8 + [0] * 5], np.int32)
    prefix = (tokens[:2, :6], segments[:2, :6]) if how == "prefix" else None
    segments = segments if how == "packed" else np.minimum(segments[[1, 1, 3, 3]], 1)
    real = (segments[:, 1:] > 0) & (segments[:, :-1] == segments[:, 1:])

    def logprobs(model):
        if prefix is None:
            return jnp.where(real, gpt.token_logprobs(model, tokens, segments), 0)
        hidden = gpt.continue_prefix(model, tokens, segments, *prefix)
        return jnp.where(real, gpt.head_logprobs(model, hidden[:, :-1], tokens[:, 1:])[0], 0)

    want = logprobs(model), gradients_of(lambda wte: logprobs(dataclasses.replace(model, wte=wte)), model.wte)
    calls, kernel = [], jax.nn.dot_product_attention

    def stand_in(q, k, v, implementation, **options):
        calls.append((implementation, options["is_causal"]))
        assert q.shape[1] % 2 == k.shape[1] % 2 == 0
        return kernel(q, k, v, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    monkeypatch.setattr(gpt, "has_flash_attention", lambda q, k: True)
    found = logprobs(model), gradients_of(lambda wte: logprobs(dataclasses.replace(model, wte=wte)), model.wte)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), found, want)
    assert set(calls) == ({("cudnn", True), ("cudnn", False)} if prefix else {("cudnn", True)})


@pytest.mark.parametrize(
    "change, has",
    [({}, True), (dict(dtype="float32"), False), (dict(T=1), False), (dict(T=7), True), (dict(E=36), False),
     (dict(E=256), False), (dict(capability="7.5"), False), (dict(version="rocm 60000"), False),
     (dict(backend="cpu"), False), (dict(mesh=(4, 1)), True), (dict(mesh=(8, 1)), False), (dict(mesh=(1, 2)), True),
     (dict(mesh=(1, 4)), False)],
)  # fmt: skip
def test_cudnn_is_asked_where_it_has_a_kernel(change, has, monkeypatch):
    case = (
        dict(dtype="bfloat16", T=8, E=64, capability="8.0", version="cuda 13000", backend="gpu", mesh=(1, 1)) | change
    )
    device = SimpleNamespace(
        client=SimpleNamespace(platform_version=case["version"]), compute_capability=case["capability"]
    )
    monkeypatch.setattr(jax, "default_backend", lambda: case["backend"])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    mesh = jax.sharding.AbstractMesh(case["mesh"], ("data", "tensor"))
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: mesh)
    q, k = (jax.ShapeDtypeStruct((4, heads, case["T"], case["E"]), case["dtype"]) for heads in (4, 2))
    assert gpt.has_flash_attention(q, k) == has


def needs_cuda(test):
    cuda = jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version
    return pytest.mark.skipif(not cuda, reason="no NVIDIA GPU")(test)


@needs_cuda
@pytest.mark.parametrize("kv_heads, before", [(4, 0), (2, 0), (2, 9)])
def test_cudnn_computes_plain_attention(kv_heads, before, monkeypatch):
    """Packed rows with padding, grouped heads, and keys of a prefix before the own ones."""
    array = lambda i, *shape: jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
    q, k, v = array(0, 4, 4, 64, 32), array(1, 4, kv_heads, before + 64, 32), array(2, 4, kv_heads, before + 64, 32)
    segments = jnp.ones((4, 64), jnp.int32).at[:, :10].set(0).at[1:, 40:].set(2)
    mask = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((64, 64), bool))
    mask, real = mask & (segments[:, None, :] > 0), (segments > 0)[:, None, :, None]
    mask = jnp.concatenate([jnp.ones((4, 64, before), bool), mask], -1)
    ask = lambda q, k, v: jnp.where(real, gpt.attention(q, k, v, mask, causal=not before), 0).astype(jnp.float32)
    assert gpt.has_flash_attention(q, k)
    found = ask(q, k, v), gradients_of(ask, q, k, v)
    monkeypatch.setattr(gpt, "has_flash_attention", lambda q, k: False)
    want = ask(q, k, v), gradients_of(lambda q, k, v: ask(q, k, v), q, k, v)
    off = lambda a, b: np.linalg.norm(np.asarray(a - b, np.float32)) / np.linalg.norm(np.asarray(b, np.float32))
    assert max(jax.tree.leaves(jax.tree.map(off, found, want))) < 0.02


def gradients_of(f, *args):
    c = jnp.cos(jnp.arange(f(*args).size, dtype=jnp.float32)).reshape(f(*args).shape)
    return jax.jit(jax.grad(lambda *args: (jnp.sin(f(*args)) * c).sum(), tuple(range(len(args)))))(*args)


@pytest.mark.parametrize("dtype, near", [("float32", 1e-5), ("bfloat16", 0.03)])
def test_the_gradients_of_products_are_the_plain_ones(dtype, near):
    array = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    form = "bkgte,bkse->bkgts"
    cases = [
        (gpt.matmul, jnp.matmul, array(0, 2, 5, 4), array(1, 4, 3)),
        (partial(gpt.matmul, transposed=True), lambda x, w: x @ w.T, array(2, 2, 5, 4), array(3, 3, 4)),
        (
            partial(gpt.matmul, dtype=jnp.float32, transposed=True),
            lambda x, w: x @ w.T,
            array(2, 2, 5, 4),
            array(3, 3, 4),
        ),
        (partial(gpt.einsum, form), partial(jnp.einsum, form), array(4, 2, 2, 3, 5, 4), array(5, 2, 2, 6, 4)),
    ]
    for ours, plain, *args in cases:
        rounded = [x.astype(dtype) for x in args]
        got, expected = (jax.tree.map(np.float32, gradients_of(ours, *rounded)), gradients_of(plain, *args))
        for a, b in zip(got, expected):
            np.testing.assert_allclose(a, b, atol=near * np.abs(b).max())


@pytest.mark.parametrize("used", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_the_gradient_of_logprobs_and_entropy_is_that_of_a_softmax(used):
    logits, targets = 3 * jax.random.normal(jax.random.key(0), (2, 5, V)), jnp.arange(10).reshape(2, 5)

    def ours(logits):
        outs = gpt.logprobs_of_logits(logits, targets)
        return sum(share * x for share, x in zip(used, outs) if share)

    def plain(logits):
        log_p = jax.nn.log_softmax(logits)
        return used[0] * log_p[*np.indices((2, 5)), targets] - used[1] * (jnp.exp(log_p) * log_p).sum(-1)

    np.testing.assert_allclose(ours(logits), plain(logits), rtol=1e-5, atol=1e-5)
    (got,), (expected,) = gradients_of(ours, logits), gradients_of(plain, logits)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_bf16_model_multiplies_in_bf16_all_the_way_back(llama, tokens):
    """And on a CPU it asks for results in fp32, which is what there is a fast kernel for."""
    loss = lambda model: gpt.token_logprobs(gpt.cast(model, jnp.bfloat16), tokens).sum()
    products = [e for e in equations(jax.make_jaxpr(jax.grad(loss))(llama).jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) > 3 * 8  # of a layer's nine products and the head, forwards and twice backwards
    assert {v.aval.dtype.name for e in products for v in e.invars} == {"bfloat16"}
    assert {e.outvars[0].aval.dtype.name for e in products} == {"float32"}


def test_entropy_and_kl_are_the_sums_over_the_vocabulary(llama, golden, tokens, monkeypatch):
    other, _ = gpt.load(golden / "qwen2")
    ones = np.ones_like(tokens)
    p, q = (log_softmax(np.asarray(all_logits(m, tokens, ones), np.float64) / 0.7, -1) for m in (llama, other))

    @jax.jit
    def measure(a, b, x, y):
        return gpt.head_logprobs(a, x, tokens, 0.7)[1], gpt.head_kl(a, x, b, y, 0.7), gpt.head_kl(a, x, a, x, 0.7)

    hidden = hidden_states(llama, tokens), hidden_states(other, tokens)
    entropy, kl, same = measure(llama, other, *hidden)
    together = jax.jit(lambda a, b, x, y: gpt.compare_heads(a, x, b, y, tokens, 0.7))(llama, other, *hidden)
    chosen = [np.take_along_axis(x, tokens[..., None], -1)[..., 0] for x in (p, q)]
    for ours, theirs in zip(together, (*chosen, entropy, kl), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(p) * p).sum(-1), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(kl, (np.exp(p) * (p - q)).sum(-1), rtol=1e-4, atol=1e-5)
    assert kl.min() > 0
    np.testing.assert_array_equal(same, 0)
    monkeypatch.setattr(gpt, "head_budget", lambda: 2 * 5 * V)
    in_pieces = jax.jit(lambda *args: measure.__wrapped__(*args))(llama, other, *hidden)
    np.testing.assert_allclose(in_pieces[1], kl, rtol=1e-5)


# packing --------------------------------------------------------------------------------------------------------------

PACKED = np.array([[1] * 5 + [2] * 7, [0] * 12], np.int32)


def test_a_document_is_blind_to_the_one_before_it(model, tokens):
    changed = tokens.copy()
    changed[0, :5] = tokens[1, :5]
    before, after = (all_logits(model, t, PACKED)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(before[5:], after[5:])
    assert np.abs(before - after)[:5].max() > 1e-3


@partial(jax.jit, static_argnames="remat")
@partial(jax.value_and_grad, argnums=0)
def loss_and_gradient(model, tokens, segments, mask, remat=False):
    return -gpt.masked_mean(
        gpt.head_logprobs(model, model(tokens, segments, remat)[:, :-1], tokens[:, 1:])[0], mask[:, 1:]
    )


def test_packed_documents_have_the_loss_and_gradient_of_separate_ones(model, tokens):
    mask = (PACKED > 0).astype(np.int32)
    mask[0, [0, 5]] = 0
    apart, lengths = np.zeros((2, 12), np.int32), np.zeros((2, 12), np.int32)
    apart[0, :5], apart[1, :7], lengths[0, :5], lengths[1, :7] = tokens[0, :5], tokens[0, 5:], 1, 1
    packed = loss_and_gradient(model, tokens, PACKED, mask)
    separate = loss_and_gradient(model, apart, lengths, lengths * (np.arange(12) > 0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), packed, separate)


def test_no_gradient_flows_into_another_document_or_into_padding(llama):
    tokens = np.arange(10, 34, dtype=np.int32).reshape(2, 12)
    mask = (PACKED == 2) & (np.arange(12) > 5)
    grad = np.abs(loss_and_gradient(llama, tokens, PACKED, mask.astype(np.int32))[1].wte)
    assert not grad[tokens[0, :5]].any()
    assert not grad[tokens[1]].any()
    assert grad[tokens[0, 5:11]].max(1).min() > 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_loop_over_layers_keeps_what_products_made_and_no_more(dtype):
    """By the compiler's account of a layer more. Its input is in fp32, whatever the rest is in."""

    def compiled(layers, remat=False):
        shape = gpt.make_config(32, 128, layers, 2, 32)
        model = jax.eval_shape(partial(gpt.init, shape), jax.random.key(0))
        step = lambda model, tokens: jax.value_and_grad(lambda model: objective(model, tokens, remat))(model)
        return jax.jit(step).lower(model, jax.ShapeDtypeStruct((8, 128), jnp.int32)).compile(), model

    def objective(model, tokens, remat):
        return grpo.cast_outside(model, dtype)(tokens, remat=remat).astype(jnp.float32).var()

    (few, _), (more, model), (again, _) = compiled(13), compiled(26), compiled(26, True)
    bytes_kept = (more.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes) / 13
    size, tokens = jnp.dtype(dtype).itemsize, 8 * 128
    products = (
        tokens * size * sum(getattr(model.blocks, x).weight.shape[-1] for x in ("q", "k", "v", "o", "gate", "up"))
    )
    inputs = tokens * 32 * 4
    assert products < bytes_kept < 1.05 * (products + inputs)

    tokens = np.random.default_rng(0).integers(0, 32, (8, 128)).astype(np.int32)
    model = gpt.init(model.config, jax.random.key(0))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-6), more(model, tokens), again(model, tokens))


def test_rematerialisation_changes_nothing(llama, tokens):
    ones = np.ones_like(tokens)
    kept, again = (loss_and_gradient(llama, tokens, ones, ones, **how) for how in ({}, {"remat": True}))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), kept, again)


# forked rows ----------------------------------------------------------------------------------------------------------


def pairs_apart_and_forked(prompts=(5, 1, 3), answers=((4, 6), (2, 1), (5, 5))):
    """The same pairs as two rows each, and as one row with both answers: batches for `completion_logprobs`."""
    rng, B = np.random.default_rng(3), len(prompts)
    apart, groups = {name: np.zeros((B, 2, 12), np.int32) for name in ("tokens", "segments", "mask")}, []
    for i, p in enumerate(prompts):
        prompt, group = rng.integers(4, V, p), []
        for side, size in enumerate(answers[i]):
            n, ids = p + size, np.concatenate([prompt, rng.integers(4, V, size)])
            apart["tokens"][i, side, :n], apart["segments"][i, side, :n], apart["mask"][i, side, p:n] = ids, 1, 1
            group.append((ids, apart["mask"][i, side, :n]))
        groups.append(group)
    return apart, gpt.fork(groups, 0, (32, 6))


def test_a_forked_row_by_hand():
    rows = [([1, 2, 3, 8, 9], [0, 0, 0, 1, 1]), ([1, 2, 3, 7], [0, 0, 0, 1])], [([4, 5], [0, 1]), ([4, 6], [0, 1])]
    found = gpt.fork([[tuple(map(np.array, row)) for row in group] for group in rows], 0, (12, 2))
    assert {name: x.tolist() for name, x in found.items()} == {
        "tokens": [[1, 2, 3, 8, 9, 3, 7] + 5 * [0], [4, 5, 4, 6] + 8 * [0]],
        "segments": [[1, 1, 2, 2, 2, 3, 3] + 5 * [0], [2, 2, 3, 3] + 8 * [0]],
        "mask": [[0, 0, 0, 1, 1, 0, 1] + 5 * [0], [0, 1, 0, 1] + 8 * [0]],
        "answers": [[[3, 4], [6, 0]], [[1, 0], [3, 0]]],
    }
    segments = jnp.array([[1, 1, 2, 2, 3, 0]])
    assert gpt.segment_positions(segments, forked=True)[0, :5].tolist() == [0, 1, 2, 3, 2]
    assert gpt.causal_mask(segments, forked=True)[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0], [0] * 6,
    ]  # fmt: skip
    whole, own = gpt.fork_sides(segments, jnp.ones_like(segments), 2)
    assert whole[0].astype(int).tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 0]]
    assert own[0].astype(int).tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]]


@partial(jax.jit, static_argnames="remat")
@partial(jax.value_and_grad, argnums=0, has_aux=True)
def margin_and_gradient(model, batch, remat):
    logps, counts = gpt.completion_logprobs(model, batch, remat)
    return (logps[:, 0] - 0.7 * logps[:, 1]).mean(), (logps, counts)


def test_answers_in_one_row_have_the_logprobs_and_gradients_of_whole_rows(model):
    """Prompts of 5, 1 and 3 tokens, answers of different lengths; recomputed activations change nothing."""
    apart, forked = pairs_apart_and_forked()
    (_, (expected, counts)), gradient = margin_and_gradient(model, apart, remat=False)
    assert counts.tolist() == (forked["answers"] > 0).sum(-1).tolist() == [[4, 6], [2, 1], [5, 5]]
    for remat in (False,) if model.config.gpt2 else (False, True):
        (_, (found, same_counts)), same_gradient = margin_and_gradient(model, forked, remat=remat)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(same_counts, counts)
        for a, b in zip(jax.tree.leaves(same_gradient), jax.tree.leaves(gradient), strict=True):
            scale = max(np.abs(b).max(), 1)
            np.testing.assert_allclose(a / scale, b / scale, rtol=1e-5, atol=2e-5)  # in float64 they agree to 1e-14


def test_an_answer_is_blind_to_the_other_answer_and_to_padding(model):
    _, forked = pairs_apart_and_forked()
    changed = {name: x.copy() for name, x in forked.items()}
    changed["tokens"][(changed["segments"] == 2) & (changed["mask"] > 0)] = 4  # all of each chosen answer
    changed["tokens"][changed["segments"] == 0] = 7
    logps = lambda batch: np.asarray(margin_and_gradient(model, batch, remat=False)[0][1][0])
    before, after = logps(forked), logps(changed)
    np.testing.assert_array_equal(before[:, 1], after[:, 1])
    assert (before[:, 0] != after[:, 0]).all()
    changed["tokens"][0, 0] = 3 + changed["tokens"][0, 0] % 4  # the prompt itself counts
    assert (logps(changed)[0] != after[0]).all()


def test_a_forked_row_may_be_longer_than_the_learned_positions(model):
    """Its positions are those of whole rows, which fit: only these are counted."""
    _, forked = pairs_apart_and_forked()
    wpe = None if model.wpe is None else model.wpe[:12]
    short = dataclasses.replace(model, config=dataclasses.replace(model.config, context=12), wpe=wpe)
    assert forked["tokens"].shape[1] > 12
    np.testing.assert_array_equal(*(gpt.completion_logprobs(m, forked)[0] for m in (short, model)))


def test_rows_that_continue_a_prefix_have_the_states_of_whole_rows(model):
    """Two rows to each of two prefixes, the second of which is padded on the left."""
    ids = jnp.asarray(np.random.default_rng(3).integers(4, V, (6, 4)))
    prefix, rows = ids[:2], ids[2:, :3]
    mask = jnp.array([[1, 1, 1, 1], [0, 0, 1, 1]])
    found = gpt.continue_prefix(model, rows, jnp.ones_like(rows), prefix, mask)
    for i, row in enumerate(rows):
        start = prefix[i // 2][mask[i // 2] > 0]
        whole = model(jnp.concatenate([start, row])[None])[0, len(start) :]
        np.testing.assert_allclose(found[i], whole, rtol=1e-5, atol=1e-5)


# generation -----------------------------------------------------------------------------------------------------------


def test_greedy_decoding_with_a_cache_is_the_full_forward_step_by_step(model, prompts):
    out = gpt.generate(model, *prompts, jax.random.key(0), NEW, temperature=0, ends=())
    row, mask = (np.pad(x, ((0, 0), (0, NEW))) for x in prompts)
    for t in range(T, T + NEW):
        logits = np.asarray(all_logits(model, row, mask))[:, t - 1]
        row[:, t], mask[:, t] = logits.argmax(-1), 1
        best = log_softmax(logits, -1).max(-1)
        np.testing.assert_allclose(out.logprobs[:, t - T], best, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out.tokens, row[:, T:])
    assert out.mask.all()


ROWS, ENDS = np.arange(100, 160), (2, 25)


def sample(model, prompts, key, row_numbers=ROWS):
    """Each prompt twenty times, at temperature 0.7; 2 and 25 end a response."""
    tokens, mask = (np.tile(x, (20, 1))[row_numbers - 100] for x in prompts)
    return gpt.to_numpy(
        gpt.generate(model, tokens, mask, jax.random.key(key), NEW, ends=ENDS, temperature=0.7, row_numbers=row_numbers)
    )


@pytest.fixture(scope="module")
def samples(llama, prompts):
    before = gpt.generate._cache_size()
    out = [sample(llama, prompts, key) for key in (0, 0, 1)]
    assert gpt.generate._cache_size() == before + 1
    return out


def test_sampled_logprobs_are_those_of_the_training_forward(llama, prompts, samples):
    out = samples[0]
    tokens, mask = (np.concatenate([np.tile(x, (20, 1)), y], 1) for x, y in zip(prompts, out))
    logprobs = log_softmax(np.asarray(all_logits(llama, tokens, mask)) / 0.7, -1)[:, T - 1 : -1]
    want = np.take_along_axis(logprobs, out.tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(out.logprobs, want * out.mask, rtol=1e-4, atol=1e-4)


def test_nothing_follows_an_end_but_padding(samples):
    out = samples[0]
    ends = np.isin(out.tokens, ENDS)
    done = np.cumsum(ends, 1) - ends > 0
    np.testing.assert_array_equal(out.mask, ~done)
    assert (out.tokens[done] == 0).all() and (out.logprobs[done] == 0).all() and (out.logprobs[~done] < 0).all()
    np.testing.assert_array_equal(gpt.has_ended(out.tokens, out.mask, ENDS), ends.any(1))
    counts = [(out.tokens == end).any(1).sum() for end in ENDS]
    assert min(counts) > 0 and sum(counts) < len(ROWS)  # the test has seen both ends, and rows without


def test_ids_that_the_tokenizer_lacks_are_not_drawn_and_have_no_probability(golden, prompts):
    """As of a vocabulary that is padded from 20 words to 61. Both sides are log-probs of what is drawn."""
    full, _ = gpt.load(golden / "qwen3")
    model = dataclasses.replace(full, config=dataclasses.replace(full.config, known_ids=20))
    out = sample(model, prompts, 0)
    assert out.tokens.max() == 19 and sample(full, prompts, 0).tokens.max() > 19
    tokens, mask = (np.concatenate([np.tile(x, (20, 1)), y], 1) for x, y in zip(prompts, out))
    tokens = np.where(mask > 0, tokens, 0)
    own = np.asarray(all_logits(full, tokens, mask))[..., :20]
    want = np.take_along_axis(log_softmax(own / 0.7, -1)[:, T - 1 : -1], out.tokens[..., None], -1)[..., 0]
    trained = token_logprobs(model, tokens, mask, 0.7)[:, T - 1 :]
    np.testing.assert_allclose(out.logprobs, want * out.mask, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(trained * out.mask, want * out.mask, rtol=1e-4, atol=1e-4)
    hidden = hidden_states(full, tokens[:2])
    entropy = gpt.head_logprobs(model, hidden, tokens[:2])[1]
    p = log_softmax(np.asarray(full.logits(hidden), np.float64)[..., :20], -1)
    np.testing.assert_allclose(entropy, -(np.exp(p) * p).sum(-1), rtol=1e-4, atol=1e-4)


def test_the_key_decides_the_text(samples):
    same, again, other = (s.tokens for s in samples)
    np.testing.assert_array_equal(same, again)
    assert (same != other).any(1).mean() > 0.9
    assert len(np.unique(same, axis=0)) > 0.9 * len(ROWS)


def test_the_text_of_a_row_does_not_depend_on_its_batch(llama, prompts, samples):
    order = np.random.default_rng(0).permutation(len(ROWS))
    np.testing.assert_array_equal(sample(llama, prompts, 0, ROWS[order]).tokens, samples[0].tokens[order])
    others = prompts[0].copy()
    others[1:] = 9
    mixed = sample(llama, (others, prompts[1]), 0)
    np.testing.assert_array_equal(mixed.tokens[::3], samples[0].tokens[::3])


def test_decoding_stops_when_every_row_is_done(llama, prompts, monkeypatch):
    drawn = []

    def stop_at_times(logits, u, temperature):
        jax.debug.callback(lambda _: drawn.append(1), u)
        return jnp.where(u < 0.4, 2, 9), u

    monkeypatch.setattr(gpt, "sample_token", stop_at_times)
    out = gpt.generate(llama, *prompts, jax.random.key(0), 50, ends=(2,))
    jax.effects_barrier()
    lengths = out.mask.sum(1)
    assert len(drawn) == lengths.max() < 50
    assert lengths.min() < lengths.max()


DRAWS = 20_000


@partial(jax.jit, static_argnames="temperature")
def draw(logits, u, temperature=1.0):
    return gpt.sample_token(jnp.broadcast_to(logits, (len(u), len(logits))), u, temperature)


@pytest.mark.parametrize("vocab", [61, 600])
def test_sampling_frequencies_are_the_softmax(vocab):
    logits = np.random.default_rng(vocab).normal(size=vocab) * 1.5
    token, logprob = draw(jnp.float32(logits), jax.random.uniform(jax.random.key(vocab), (DRAWS,)), 0.7)
    logp = log_softmax(logits / 0.7)
    np.testing.assert_allclose(logprob, logp[token], rtol=1e-4, atol=1e-4)
    seen, expected = np.bincount(token, minlength=vocab), DRAWS * np.exp(logp)
    rare = expected < 5
    pool = lambda x: np.append(x[~rare], x[rare].sum())
    chi2 = ((pool(seen) - pool(expected)) ** 2 / pool(expected)).sum()
    assert stats.chi2.sf(chi2, (~rare).sum()) > 1e-3


@pytest.mark.parametrize("vocab", [7, 256, 700])
def test_the_inverse_cdf_is_where_the_running_sum_passes_u(vocab):
    rng = np.random.default_rng(vocab)
    p = rng.random(vocab) * (rng.random(vocab) < 0.5)
    p[[0, -1]] = 0
    u = np.append(np.linspace(0, 1, 3000, endpoint=False), np.nextafter(np.float32(1), np.float32(0)))
    got = np.asarray(jax.jit(gpt.inverse_cdf)(jnp.tile(jnp.float32(p), (len(u), 1)), jnp.float32(u)))
    assert (p[got] > 0).all()
    running = np.cumsum(p) / p.sum()
    assert ((running[got] >= u - 1e-6) & ((running - p / p.sum())[got] <= u + 1e-6)).all()


def test_temperature_zero_takes_the_likeliest():
    logits = jnp.float32([0.0, 3.0, 1.0])
    token, logprob = draw(logits, jnp.linspace(0, 1, 8, endpoint=False), 0)
    np.testing.assert_array_equal(token, 1)
    np.testing.assert_allclose(logprob, log_softmax(logits)[1], rtol=1e-5)


def test_generation_beyond_learned_positions_is_refused(golden):
    model, _ = gpt.load(golden / "gpt2")
    prompts = np.ones((1, 30), np.int32)
    with pytest.raises(ValueError, match="32 positions"):
        gpt.generate(model, prompts, prompts, jax.random.key(0), 3, ends=(2,))


# a real model ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="needs $REAL_DATA with weights and texts")
def test_a_published_model_tells_stories():
    folder = Path(os.environ["REAL_DATA"])
    model, tokenizer = gpt.load(folder / "weights" / "tinystories-656k")
    start = np.array([tokenizer.encode("<|start_story|>", special=True)], np.int32)
    assert start.shape == (1, 1)
    out = gpt.generate(model, start, np.ones_like(start), jax.random.key(0), 16, ends=tokenizer.end_ids, temperature=0)
    opening = "Once upon a time, there was a little girl named Lily."
    assert tokenizer.decode(out.tokens[0]).lstrip().startswith(opening)

    text = gzip.open(folder / "text" / "tinystories_sample_2MiB.txt.gz", "rt", encoding="utf-8").read()
    stories = [story.strip() for story in text.split("<|endoftext|>")[1:65]]
    tokens, mask = np.zeros((64, 256), np.int32), np.zeros((64, 256), np.int32)
    for i, story in enumerate(stories):
        ids = [*start[0], *tokenizer.encode(story)][:256]
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
    total = count = 0.0
    for rows in range(0, 64, 16):
        part = slice(rows, rows + 16)
        total -= (np.asarray(token_logprobs(model, tokens[part], mask[part])) * mask[part, 1:]).sum()
        count += mask[part, 1:].sum()
    assert total / count < 3.3


def test_the_older_spelling_of_a_configuration_means_the_same(golden):
    for folder in [golden / name for name in LMS + CLASSIFIERS]:
        new, old = (json.loads((folder / name).read_text()) for name in ("config.json", "config.v4.json"))
        assert gpt.config_from_hf(new) == gpt.config_from_hf(old)
