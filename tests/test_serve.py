"""serve.py: what its clients rely on, what it must refuse, and that no vote is lost. Real sockets, a tiny model."""

import asyncio
import contextlib
import dataclasses
import json
import logging
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import equinox as eqx
import httpx2
import jax
import jax.numpy as jnp
import load
import numpy as np
import openai
import pytest
import tokenizers
import tyro
from golden_chat import write_folder as write_family

import dpo
import gpt
import prepare
import rlaif
import serve

ROOT = Path(__file__).resolve().parents[1]
ASK = [{"role": "user", "content": "a b c"}]


@pytest.fixture(scope="module")
def folder(words, tmp_path_factory):
    """A model folder with decided opinions whose every id is a word, and a second one that disagrees."""
    tokenizer = gpt.load_tokenizer(words)
    config = gpt.make_config(tokenizer.vocab_size, context=64, layers=2, heads=2, dim=16)
    for name, seed in (("one", 0), ("two", 1)):
        model = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, gpt.init(config, jax.random.key(seed)))
        gpt.save(tmp_path_factory.getbasetemp() / "models" / name, model, tokenizer)
    return tmp_path_factory.getbasetemp() / "models"


@contextlib.contextmanager
def running(folder, database, models=("one", "two"), **options):
    """A server on a free port, in threads of this process, ready to answer."""
    paths = tuple(str(folder / name) for name in models)
    config = serve.Config(model=(paths,), feedback=database, **({"slots": 4, "max_queue": 8, "drain": 1.0} | options))
    server = serve.make_server(config)
    process, listener = serve.Process(server), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    process.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        wait_for(lambda: server.engine.ready or server.engine.failure, 180)
        yield process
    finally:
        process.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it never happened"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def live(folder, tmp_path_factory):
    with running(folder, tmp_path_factory.mktemp("votes") / "feedback.db") as process:
        yield process


@pytest.fixture(scope="module")
def http(live):
    with httpx2.Client(base_url=live.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=live.url + "/v1", api_key="unused", max_retries=0)


@pytest.fixture
def slow(live):
    """Every token takes its time, so that there is something to interrupt."""
    models = live.server.models.values()
    before = [(model, model.steps, model.decode) for model in models]
    for model, _, decode in before:
        model.steps = dict.fromkeys(model.steps, 1)
        model.decode = lambda *args, decode=decode: time.sleep(0.03) or decode(*args)
    yield
    for model, steps, _ in before:
        model.steps = steps
        del model.decode


def say(http, content="a b c", path="/v1/chat/completions", **options):
    return http.post(path, json={"messages": [{"role": "user", "content": content}]} | options)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def gauge(http, name, model="one"):
    return float(re.search(rf'^vllm:{name}{{model_name="{model}"}} (\S+)$', http.get("/metrics").text, re.M)[1])


def frames(text):
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


# ---- what the device computes


def brute_force(logits, temperature, top_k, top_p, min_p):
    """The distribution by sorting, as its definition says."""
    if temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    p = np.exp(logits / temperature - np.max(logits / temperature))
    order = np.argsort(-p)
    if top_k:
        p[order[top_k:]] = 0
    p = p / p.sum()
    if top_p < 1:
        kept = np.searchsorted(np.cumsum(p[order]), top_p) + 1
        p[order[kept:]] = 0
    p[p < min_p * p.max()] = 0
    return p / p.sum()


def test_each_row_is_drawn_by_its_own_parameters():
    cases = [
        (0, 0, 1, 0),
        (1, 0, 1, 0),
        (0.5, 3, 1, 0),
        (1, 0, 0.7, 0),
        (1.5, 0, 1, 0.2),
        (2, 12, 0.8, 0.1),
        (1, 1, 1, 0),
    ]
    n, vocabulary = 4000, 40
    logits = np.random.default_rng(0).normal(size=(len(cases), vocabulary)).astype(np.float32) * 2
    rows = np.repeat(np.arange(len(cases)), n)
    values = np.array(cases, np.float32)[rows].T
    slots = serve.idle_slots(len(rows))._replace(remaining=np.ones(len(rows), np.int32))
    slots = slots._replace(temperature=values[0], top_k=values[1].astype(np.int32), top_p=values[2], min_p=values[3])
    u = jax.random.uniform(jax.random.key(0), (len(rows),))
    drawn = np.asarray(jax.jit(serve.draw)(logits[rows], u, slots)).reshape(len(cases), n)
    for case, row, tokens in zip(cases, logits, drawn):
        expected, found = brute_force(row, *case), np.bincount(tokens, minlength=vocabulary) / n
        assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected)), case
        assert np.abs(expected - found).max() < 4 * np.sqrt(0.25 / n), case


@pytest.mark.parametrize("slots", [None, [2, 0, 2]])
@pytest.mark.parametrize("queries", [1, 3])
def test_attention_block_by_block_is_attention_to_what_a_slot_holds(monkeypatch, slots, queries):
    monkeypatch.setattr(serve, "block_size", lambda context: 4)
    rng = np.random.default_rng(0)
    cache = tuple(jnp.asarray(rng.normal(size=(3, 2, 12, 8)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.normal(size=(3, 6, queries, 8)), jnp.float32)
    positions = jnp.array([0, 3, 7])[:, None] + jnp.arange(queries)  # one block and two, or three with more queries
    rows = np.arange(3) if slots is None else np.array(slots)
    visible = np.arange(12) <= positions[..., None]
    expected = gpt.attention(q, *(x[rows] for x in cache), visible)
    attend = jax.jit(serve.attend)
    args = slots if slots is None else jnp.array(slots), positions, positions.max()
    np.testing.assert_allclose(attend(q, cache, *args), expected, atol=1e-6)
    unseen = tuple(jnp.where((np.arange(12) > 11)[:, None], jnp.nan, x) for x in cache)  # the block that nobody needs
    found = attend(q, unseen, *args) if queries == 1 else expected
    np.testing.assert_allclose(found, expected, atol=1e-6)
    unread = tuple(jnp.where((np.arange(12) > 7)[:, None], jnp.nan, x) for x in cache)
    found = attend(q, unread, *args[:-1], positions[1].max())  # the last row is idle: its long past is not read
    np.testing.assert_allclose(found[:2], expected[:2], atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_the_first_of_the_largest_is_found(seed):
    logits = np.random.default_rng(seed).integers(0, 9, (5, 50)).astype(np.float32)
    np.testing.assert_array_equal(serve.first_largest(logits), logits.argmax(-1))


def test_greedy_answers_are_those_of_generate(folder, http):
    model, tokenizer = gpt.load(folder / "one")
    texts, width = ("a b", "c d e f g h a b c d e f g h a b", "yes"), 16
    rows = [tokenizer.encode(text) for text in texts]
    prompts = jnp.array([[0] * (width - len(ids)) + ids for ids in rows])
    mask = jnp.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    out = gpt.generate(model, prompts, mask, jax.random.key(0), 12, ends=tokenizer.end_ids, temperature=0)
    body = dict(prompt=texts, temperature=0, max_tokens=12, return_token_ids=True)
    for i, choice in enumerate(http.post("/v1/completions", json=body).json()["choices"]):
        assert choice["token_ids"] == out.tokens[i][out.mask[i] > 0].tolist()
        assert choice["prompt_token_ids"] == rows[i]


@pytest.mark.parametrize("presence, frequency", [(0, 2), (2, 0), (1, 1), (-1, 0.5)])
def test_penalties_count_the_answers_own_tokens(folder, http, presence, frequency):
    """Against the definition, with a forward pass for each token. What the prompt holds costs nothing."""
    model, tokenizer = gpt.load(folder / "one")
    ids = prompt = tokenizer.encode("a b c")
    forward = jax.jit(lambda model, tokens: model.logits(model(tokens)[0]))
    for _ in range(20):
        counts = np.bincount(ids[len(prompt) :], minlength=tokenizer.vocab_size)
        logits = np.asarray(forward(model, np.array([ids + [0] * (32 - len(ids))])))[len(ids) - 1]
        ids = [*ids, int(np.argmax(logits - presence * (counts > 0) - frequency * counts))]
    body = dict(prompt=prompt, max_tokens=20, temperature=0, ignore_eos=True, return_token_ids=True)
    answer = lambda **more: http.post("/v1/completions", json=body | more).json()["choices"][0]["token_ids"]
    assert answer(presence_penalty=presence, frequency_penalty=frequency) == ids[len(prompt) :] != answer()


def test_the_same_seed_gives_the_same_text_in_any_company(http):
    ask = lambda seed, text="a b c": say(http, text, seed=seed, max_tokens=30, ignore_eos=True)
    alone = [text_of(ask(seed)) for seed in range(6)]
    assert len(set(alone)) == 6
    with ThreadPoolExecutor(8) as pool:
        noise = [pool.submit(ask, 100 + i, " ".join("abcdefgh"[: i % 8 + 1])) for i in range(3)]
        together = list(pool.map(ask, range(6)))
        assert [text_of(response) for response in together] == alone
        assert all(future.result().status_code == 200 for future in noise)
    choices = say(http, seed=3, n=3, max_tokens=30, ignore_eos=True).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["message"]["content"] == alone[3]
    assert len({choice["message"]["content"] for choice in choices}) == 3
    assert text_of(ask(2**40)) != text_of(ask(0))  # the high bits of a seed count


def test_half_precision_holds_what_is_too_large_for_it(folder):
    """Values of a million, beyond float16's 65,504, do not become infinities in its caches, and NaN from there on."""
    model, _ = gpt.load(folder / "one")
    large = eqx.tree_at(
        lambda model: (model.blocks.k.weight, model.blocks.v.weight), model, replace_fn=lambda w: 1e6 * w
    )
    shape = 1, model.config.kv_heads, 16, model.config.head_dim
    caches = tuple((jnp.zeros(shape, jnp.float16), jnp.zeros(shape, jnp.float16)) for _ in range(model.config.layers))
    tokens, slots = np.arange(8)[None], np.zeros(1, np.int32)
    busy = serve.idle_slots(1)._replace(remaining=np.ones(1, np.int32), scored=np.ones(1, bool))
    weights = serve.unstack(large)
    caches, ends, scores = serve.prefill(weights, caches, tokens, tokens, slots, slots, slots + 7, True)
    scores = scores, serve.first_tokens(weights.outer, ends, busy)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((caches, scores)))
    assert max(jnp.abs(x).max() for x in jax.tree.leaves(caches)) == 65504


def test_echoed_logprobs_are_those_of_a_forward_pass(folder, client):
    model, tokenizer = gpt.load(folder / "one")
    rows = [tokenizer.encode(text) for text in ("a b c d", "yes no", "h g f e d c b a " * 3, "a")]
    result = client.completions.create(
        model="one", prompt=rows, echo=True, logprobs=20, max_tokens=1, temperature=0, seed=1234
    )
    found = [choice.logprobs for choice in result.choices]
    drawn = [tokenizer.encode(logprobs.tokens[-1], special=True) for logprobs in found]
    padded = np.array([(ids + new + [0] * 24)[:25] for ids, new in zip(rows, drawn)])
    full = jax.jit(lambda model, tokens: jax.nn.log_softmax(model.logits(model(tokens))))(model, padded)
    expected = jax.jit(gpt.token_logprobs)(model, padded)
    for i, (ids, choice, logprobs) in enumerate(zip(rows, result.choices, found)):
        assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == len(ids) + 1
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        np.testing.assert_allclose(logprobs.token_logprobs[1:], expected[i, : len(ids)], atol=2e-5)
        for t, top in enumerate(logprobs.top_logprobs[1:]):
            assert len(top) == tokenizer.vocab_size  # 18 words: all of them
            np.testing.assert_allclose(max(top.values()), full[i, t].max(), atol=2e-5)
        assert logprobs.token_logprobs[-1] == max(logprobs.top_logprobs[-1].values())  # greedy, and the same float
        words = choice.text.split()
        assert [choice.text[at:].split()[0] for at in logprobs.text_offset[: len(words)]] == words
    nothing = client.completions.create(model="one", prompt="a b c", echo=True, logprobs=0, max_tokens=0)
    assert nothing.choices[0].text == "a b c" and nothing.usage.completion_tokens == 0
    assert len(nothing.choices[0].logprobs.tokens) == 3


def test_nothing_is_compiled_after_the_start(live, http):
    sizes = serve.decode._cache_size(), serve.prefill._cache_size()
    for n in (1, 2, 5, 17, 40):
        kinds = {}, {"temperature": 0}, {"top_p": 0.5, "top_k": 3, "min_p": 0.1}, {"logprobs": True}
        for options in (*kinds, {"presence_penalty": 1}):
            assert say(http, "a " * n, **options).status_code == 200
    assert http.post("/v1/completions", json=dict(prompt="a b", echo=True, logprobs=3)).status_code == 200
    assert (serve.decode._cache_size(), serve.prefill._cache_size()) == sizes


class Recorder:
    """A model whose device only remembers what it was asked to read: (prompts in the call, tokens a prompt, starts)."""

    def __init__(self, folder, monkeypatch, slots=20, context=64):
        self.model = model = serve.Served("one", str(folder / "one"), serve.Config())
        model.tokenizer, model.context, model.slots = gpt.load_tokenizer(folder / "one"), context, slots
        model.pieces = [16, 32]
        model.state, model.free, model.held = (
            serve.idle_slots(slots, context),
            list(range(slots)),
            [[] for _ in range(slots)],
        )
        model.caches, self.calls, self.copies, self.posted = None, [], [], []
        monkeypatch.setattr(model, "read", self.read)
        monkeypatch.setattr(serve, "copy_slot", lambda caches, source, target: self.copies.append((source, target)))

    def read(self, pieces, size, wanted, slots):
        """Every answer begins with token 0."""
        self.calls.append((len(pieces), size, pieces))
        return (np.zeros((1, len(pieces)), np.int32), serve.Alternatives(*np.zeros((3, 1, len(pieces))))), None

    def ask(self, *prompts, **options):
        choices = [serve.Choice(i, ids, 2, None, deadline=float("inf"), **options) for i, ids in enumerate(prompts)]
        self.model.waiting.extend(choices)
        return choices

    def read_all(self):
        self.model.admit()
        while self.model.filling:
            self.model.fill(self.posted.append)
            self.model.admit()

    def end(self, *choices):
        for slot, choice in list(self.model.running.items()):
            if choice in choices:
                self.model.end(choice, "stop", self.posted.append, slot)


@pytest.mark.parametrize("waiting, calls", [(1, [1]), (2, [1, 1]), (3, [4]), (5, [4, 1]), (12, [4] * 3)])
def test_prompts_that_come_in_together_are_read_in_few_calls_of_few_sizes(folder, monkeypatch, waiting, calls):
    device = Recorder(folder, monkeypatch)
    device.ask(*([i, 4, 5, 6] for i in range(waiting)))
    device.read_all()
    assert [(n, size) for n, size, _ in device.calls] == [(n, 16) for n in calls]
    read = [tuple(piece[0]) for _, _, pieces in device.calls for piece in pieces]
    first = min(calls[0], waiting)  # those of the first call draw in it, the others later, beside them
    assert set(read) == {(i, 4, 5, 6) if i < first else (i, 4, 5) for i in range(waiting)}
    assert [choice.ids_drawn for choice in device.model.running.values()] == [[0]] * first + [[]] * (waiting - first)
    left = device.model.state.remaining[list(device.model.running)]
    assert left.tolist() == [1] * first + [2] * (waiting - first)


def test_a_piece_is_about_as_wide_as_what_is_left():
    pieces = [16, 24, 64, 256]
    wanted = {1: 16, 16: 16, 17: 24, 24: 24, 25: 24, 43: 64, 64: 64, 100: 64, 171: 256, 300: 256}
    assert {rest: serve.piece_size(rest, pieces) for rest in wanted} == wanted
    assert serve.piece_size(3, [8]) == serve.piece_size(30, [8]) == 8


def test_a_long_prompt_is_read_in_pieces_and_never_past_the_context(folder, monkeypatch):
    device = Recorder(folder, monkeypatch)
    ids = list(range(100, 160))
    device.ask(ids)
    device.read_all()
    assert [(size, pieces[0][3]) for _, size, pieces in device.calls] == [(32, 0), (32, 32)]
    assert device.calls[1][2][0][0] == ids[32:] and device.calls[1][2][0][1] == ids[33:60]
    device.calls.clear()
    device.ask([*ids, 1, 2, 3])  # 60 tokens are known; a piece of 16 must end at place 64
    device.end(*device.model.running.values())
    device.read_all()
    assert [(size, pieces[0][3]) for _, size, pieces in device.calls] == [(16, 48)]
    assert device.calls[0][2][0][0] == [*ids[48:], 1, 2, 3]


def test_a_turn_reads_as_much_as_the_widest_piece_holds(folder, monkeypatch):
    device, draws = Recorder(folder, monkeypatch), []
    monkeypatch.setattr(device.model, "advance", lambda post: draws.append(len(device.calls)))
    device.ask(*(list(range(i, i + 28)) for i in (100, 200, 300)), [1, 2])
    device.model.step(device.posted.append, lambda: draws.append("sent"))  # the short one, and one of 28 tokens
    assert [size for _, size, _ in device.calls] == [16, 32] and draws == ["sent", 2]  # first tokens before others
    device.model.step(device.posted.append)
    device.model.step(device.posted.append)
    assert [size for _, size, _ in device.calls] == [16, 32, 32, 32] and draws == ["sent", 2, 3, 4]


def test_what_a_slot_holds_is_not_read_again(folder, monkeypatch):
    """The second turn of a talk, a second answer to one prompt, and another talk, which takes another slot."""
    device = Recorder(folder, monkeypatch)
    first, other = list(range(100, 130)), list(range(200, 240))
    one, two = device.ask(first, first)
    device.read_all()
    assert (one.cached, two.cached) == (0, 29) and device.copies == [(0, 1)]
    assert [size for _, size, _ in device.calls] == [32] * 1  # read once for both
    one.ids_drawn, device.model.state.position[0] = [7, 8], 31
    device.end(one, two)
    (turn,), _ = device.ask([*first, 7, 8, 9, 10]), device.calls.clear()
    device.read_all()
    assert turn.cached == 31 and device.model.running == {0: turn}
    (else_,) = device.ask(other)
    device.read_all()
    assert else_.cached == 0 and device.model.held[0][:30] == first  # the slot that is free longest, not the talk's
    (echo,) = device.ask(first, echo=True)
    assert device.model.find_slot(echo)[2] == 0  # its log-probs have to be computed


@pytest.mark.parametrize("seed", range(3))
def test_the_same_seed_gives_the_same_text_whatever_was_cached(http, seed):
    talk = [{"role": "user", "content": "a b c d e f g h " * 2}]
    for turn in "abc":
        body = dict(messages=talk, seed=seed, max_tokens=5, ignore_eos=True)
        fresh, again = (http.post("/v1/chat/completions", json=body).json() for _ in range(2))
        assert again["choices"] == fresh["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["usage"]["prompt_tokens"] - 1
        talk += [fresh["choices"][0]["message"], {"role": "user", "content": turn}]
    noise = [{"role": "user", "content": f"{x} {y} b c d e f g h a b c d e f g"} for x in "abcd" for y in "efgh"]
    for messages in noise:  # every slot holds something else now
        http.post("/v1/chat/completions", json=dict(messages=[messages], max_tokens=2))
    last = http.post("/v1/chat/completions", json=dict(messages=talk[:-2], seed=seed, max_tokens=5, ignore_eos=True))
    assert last.json()["usage"]["prompt_tokens_details"]["cached_tokens"] < 10
    assert last.json()["choices"] == fresh["choices"]


def test_a_request_leaves_out_what_the_models_makers_have_said(folder, tmp_path, caplog):
    """generation_config.json: its temperature and the like are the defaults, what a request says goes before."""
    shutil.copytree(folder / "one", tmp_path / "makers")
    about = json.loads((folder / "one" / "generation_config.json").read_text())
    about |= dict(temperature=0.25, top_k=7, repetition_penalty=1.1, do_sample=True)
    (tmp_path / "makers" / "generation_config.json").write_text(json.dumps(about))
    model = serve.Served("makers", "", serve.Config())
    model.tokenizer, model.context = gpt.load_tokenizer(tmp_path / "makers"), 64
    model.sampling = serve.sampling_defaults(model.tokenizer, "makers")
    assert "asks for repetition_penalty 1.1, which is not done" in caplog.text
    asked = lambda **options: serve.make_job(
        serve.ChatRequest(messages=[serve.Message("user", "a")], **options), model, serve.Config()
    ).choices[0]
    choice = asked()
    assert (choice.temperature, choice.top_k, choice.top_p, choice.min_p) == (0.25, 7, 1.0, 0.0)
    choice = asked(temperature=1, top_k=0, top_p=0.5)
    assert (choice.temperature, choice.top_k, choice.top_p) == (1, 0, 0.5)


# ---- text: characters, stops


def test_text_comes_in_whole_characters(tmp_path):
    bytes_alone = {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}
    (tmp_path / "vocab.json").write_text(json.dumps(bytes_alone))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = gpt.load_tokenizer(tmp_path)
    assert tokenizer.token_bytes(tokenizer.encode("é")[0]) == b"\xc3"
    text = "naïve 🙂 text, 中文 e\u0301"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # some characters take several tokens
    for size in (1, 2, 5):
        stream = serve.TextStream(tokenizer)
        pieces = [stream.add(ids[i : i + size], i + size >= len(ids)) for i in range(0, len(ids), size)]
        assert "".join(pieces) == tokenizer.decode(ids) and not any("\ufffd" in piece for piece in pieces)
    stream = serve.TextStream(tokenizer)
    cut = next(i for i in ids if "\ufffd" in tokenizer.decode([i]))
    assert stream.add([cut]) == "" and "\ufffd" in stream.add([], last=True)  # an answer may end within a character


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_stop_string_is_never_shown(words, size):
    """Over every way to split the text, what was sent is the text before the stop that is complete first."""
    tokenizer = gpt.load_tokenizer(words)
    ids = tokenizer.encode("a b c a b d yes no")
    for stops, expected in [(("b d",), "a b c a "), (("b c a b", "c a"), "a b "), (("a c",), "a b c a b d yes no")]:
        choice = serve.Choice(0, [1], 99, None, 0.0, stops=stops, stream=True)
        choice.reader, sent, stopped = serve.TextStream(tokenizer), "", False
        for i in range(0, len(ids), size):
            part = ids[i : i + size]
            stopped = choice.add(part, [0.0] * len(part), None, i + size >= len(ids))
            choice.finish = "stop" if stopped or i + size >= len(ids) else None
            delta = choice.news()
            sent += delta.text if delta else ""
            assert expected.startswith(sent)
            if stopped:
                break
        assert sent == choice.text == expected and stopped == (stops != ("a c",))


def test_stops_end_answers_and_usage_counts_what_was_drawn(http):
    whole = say(http, seed=5, max_tokens=20, ignore_eos=True).json()
    words = whole["choices"][0]["message"]["content"].split()
    stop = next(word for word in words[3:] if word not in words[:3])
    cut = say(http, seed=5, max_tokens=20, ignore_eos=True, stop=[stop, "never"], logprobs=True).json()
    choice, before = cut["choices"][0], words[: words.index(stop)]
    assert choice["message"]["content"].split() == before and choice["finish_reason"] == "stop"
    assert whole["choices"][0]["finish_reason"] == "length" and whole["usage"]["completion_tokens"] == 20
    shown = [entry["token"] for entry in choice["logprobs"]["content"]]
    assert shown[: len(before)] == before and shown[len(before) :] in ([], [stop])  # whose blank is still shown
    assert cut["usage"]["total_tokens"] == cut["usage"]["prompt_tokens"] + cut["usage"]["completion_tokens"]


def test_a_stop_that_names_a_special_token_stops_at_its_id(http):
    """The text does not show it, with and without a stream; a stop of a name and more could never match."""
    ask = lambda **options: say(http, "c d", max_tokens=40, temperature=1.5, **options)
    seed, ended = next((seed, r) for seed in range(99) if len(text_of(r := ask(seed=seed)).split()) > 3
                       and r.json()["choices"][0]["finish_reason"] == "stop")  # fmt: skip
    text, drawn = text_of(ended), ended.json()["usage"]["completion_tokens"]
    longer = ask(seed=seed, ignore_eos=True, logprobs=True).json()["choices"][0]
    assert longer["finish_reason"] == "length" and longer["message"]["content"].startswith(text)
    assert [entry["token"] for entry in longer["logprobs"]["content"]].index("<eos>") == drawn - 1
    for stop in ("<eos>", ["never", "<eos>"]):
        found = ask(seed=seed, ignore_eos=True, stop=stop, logprobs=True).json()
        assert found["choices"][0]["message"]["content"] == text
        assert found["choices"][0]["finish_reason"] == "stop" and found["usage"]["completion_tokens"] == drawn
        assert "<eos>" not in [entry["token"] for entry in found["choices"][0]["logprobs"]["content"]]
        parts = frames(ask(seed=seed, ignore_eos=True, stop=stop, stream=True).text)
        assert "".join(part["choices"][0]["delta"].get("content") or "" for part in parts) == text
    refused = ask(stop=["a", "<eos> b"])
    assert refused.status_code == 400 and "give <eos> as a stop of its own" in refused.json()["error"]["message"]
    body = dict(prompt="c d", max_tokens=40, temperature=1.5, ignore_eos=True, logprobs=0)
    complete = lambda **options: http.post("/v1/completions", json=body | options).json()
    tokens = lambda seed: complete(seed=seed)["choices"][0]["logprobs"]["tokens"]
    seed, whole = next((seed, found) for seed in range(99) if "<eos>" in (found := tokens(seed)))
    found = complete(seed=seed, stop="<eos>")
    assert found["usage"]["completion_tokens"] == whole.index("<eos>") + 1
    assert found["choices"][0]["finish_reason"] == "stop"


def test_what_the_chat_template_refuses_is_the_requests_fault_and_is_said(tmp_path):
    tokenizer = gpt.load_tokenizer(write_family("llama2", tmp_path))
    with pytest.raises(serve.ApiError) as error:
        serve.chat_ids(ASK + ASK, tokenizer)
    assert error.value.status == 400 and "roles must alternate" in error.value.body["error"]["message"]


@pytest.mark.parametrize("stop", ["</think>", "think> c", "</think> cat"])
def test_a_stop_may_name_an_added_token_or_hold_one(stop, tmp_path):
    """Of a model whose <think> is a token, and no special one: it is text like any other."""
    tokenizer = gpt.load_tokenizer(write_family("qwen3", tmp_path))
    ids = tokenizer.encode("<think>the</think> cat and")
    assert tokenizer.specials["</think>"] in ids
    for stream in (False, True):
        ends = serve.named_stops((stop,), tokenizer)
        choice = serve.Choice(0, [1], 99, None, 0.0, stops=(stop,), stop_ids=ends, stream=stream)
        choice.reader = serve.TextStream(tokenizer)
        assert choice.add(ids, [0.0] * len(ids), None, True)
        assert choice.text == "<think>the</think> cat and".partition(stop)[0]


def test_every_end_ends_an_answer_and_none_is_text(measured):
    """A greedy answer, and the same where its third token is an end too: an ordinary word here."""
    finishes = []

    def ask(**options):
        choice = serve.Choice(0, measured.tokenizer.encode("a b c"), 8, None, np.inf, temperature=0.0, **options)
        measured.waiting.append(choice)
        while measured.busy:
            measured.step(lambda delta: None)
        finishes.append(choice.finish)
        return choice

    with compressed(measured, None):
        whole, ends = ask(endless=True), measured.tokenizer.end_ids
        end = next(i for i, token in enumerate(whole.ids_drawn) if i > 1 and token not in whole.ids_drawn[:i])
        try:
            measured.tokenizer.end_ids = (*ends, whole.ids_drawn[end])
            cut, goes_on = ask(), ask(endless=True)
        finally:
            measured.tokenizer.end_ids = ends
    assert cut.ids_drawn == whole.ids_drawn[: end + 1] and goes_on.ids_drawn == whole.ids_drawn
    assert cut.text == measured.tokenizer.decode(whole.ids_drawn[:end]) and finishes == ["length", "stop", "length"]


# ---- the API through the client that everybody uses


def test_models_are_listed_and_told_apart(client, http):
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert client.models.retrieve("two").max_model_len == 64
    assert http.get("/models").json() == http.get("/v1/models").json()
    texts = {
        client.chat.completions.create(model=m, messages=ASK, seed=1).choices[0].message.content for m in ("one", "two")
    }
    assert len(texts) == 2
    assert say(http, model="default", seed=1).json()["model"] == "one"
    with pytest.raises(openai.NotFoundError, match="one, two") as error:
        client.chat.completions.create(model="three", messages=ASK)
    assert error.value.code == "model_not_found" and error.value.param == "model"


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stop": ["b"]}, {"logprobs": True, "top_logprobs": 2}])
def test_a_stream_says_what_the_whole_answer_says(client, options):
    ask = dict(model="one", messages=ASK, seed=11, max_completion_tokens=25) | options
    whole = client.chat.completions.create(**ask)
    texts, finishes, logprobs = {}, {}, {}
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (chunks[0].id, chunks[0].created, "chat.completion.chunk")
    }
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        if choice.index not in texts:
            assert choice.delta.role == "assistant" and choice.delta.content == ""
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        logprobs.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
        if choice.finish_reason is not None:
            assert choice.index not in finishes and not choice.delta.content
            finishes[choice.index] = choice.finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    for choice in whole.choices:
        assert texts[choice.index] == choice.message.content and finishes[choice.index] == choice.finish_reason
        assert logprobs[choice.index] == (choice.logprobs.content if choice.logprobs else [])


def test_completions_stream_with_echo_and_logprobs(client):
    ask = dict(model="one", prompt="a b c", seed=3, echo=True, logprobs=2, max_tokens=12)
    whole = client.completions.create(**ask).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**ask, stream=True)]
    assert "".join(chunk.text for chunk in chunks) == whole.text and whole.text.startswith("a b c")
    assert sum((chunk.logprobs.tokens for chunk in chunks if chunk.logprobs), []) == whole.logprobs.tokens
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_chats_in_every_spelling(http, folder):
    tokenizer = gpt.load_tokenizer(folder / "one")
    ids = lambda messages: http.post("/tokenize", json={"messages": messages}).json()["tokens"]
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b c"}]
    assert ids([{"role": "user", "content": parts}]) == ids(ASK) == gpt.encode_prompt(ASK, tokenizer)
    assert ids([{"role": "developer", "content": "a"}, *ASK]) == ids([{"role": "system", "content": "a"}, *ASK])
    assert (
        say(http, max_tokens=None, temperature=None, stop=None, tools=[], user="me", unknown={"x": 1}).status_code
        == 200
    )
    empty = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}, *ASK]
    assert http.post("/v1/chat/completions", json={"messages": empty}).status_code == 200
    start = [*ASK, {"role": "assistant", "content": "d e"}]  # the answer goes on from there
    prompt = gpt.encode_prompt(ASK, tokenizer) + tokenizer.encode("d e")
    assert ids(start) == prompt
    body = dict(seed=1, max_tokens=9)
    chat = http.post("/v1/chat/completions", json=body | {"messages": start}).json()["choices"][0]["message"]["content"]
    assert chat == http.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"][0]["text"]
    assert chat == " " + " ".join(chat.split())  # words of their own, not the end of the last one


def test_special_tokens_come_from_prompts_but_never_from_chats(http, folder):
    tokenizer = gpt.load_tokenizer(folder / "one")
    assert http.post("/tokenize", json={"prompt": "a <eos>"}).json()["tokens"][-1] == tokenizer.eos_id
    message = [{"role": "user", "content": "a <eos> b"}]
    assert tokenizer.eos_id not in http.post("/tokenize", json={"messages": message}).json()["tokens"]
    assert http.get("/tokenizer_info").json()["eos_token"] == "<eos>"
    assert http.post("/detokenize", json={"tokens": tokenizer.encode("a b yes")}).json() == {"prompt": "a b yes"}


def test_answers_stay_within_the_context(http):
    clamped = say(http, "a " * 50, max_tokens=1000, ignore_eos=True).json()
    assert clamped["usage"]["total_tokens"] == 64 and clamped["choices"][0]["finish_reason"] == "length"
    for text in ("a " * 63, "a" * 5000):
        error = say(http, text).json()["error"]
        assert error["code"] == "context_length_exceeded" and "64" in error["message"]


# ---- what is refused, and that the server goes on

BAD = [
    ("/v1/chat/completions", "{", None),
    ("/v1/chat/completions", "", None),
    ("/v1/chat/completions", "[]", None),
    ("/v1/chat/completions", "[" * 100_000, None),
    ("/v1/chat/completions", {"model": "one"}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "robot", "content": "a"}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "content": "a"}]}, "messages"),
    *(
        ("/v1/chat/completions", {"messages": ASK, name: value}, name)
        for name, value in [
            ("temperature", -1), ("temperature", 3), ("temperature", True), ("temperature", "hot"), ("top_p", 0),
            ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 9), ("n", True), ("max_tokens", -1),
            ("max_completion_tokens", 0), ("top_logprobs", 21), ("stop", ["a"] * 5), ("stop", "x" * 65), ("stop", [""]),
            ("seed", "one"), ("tools", [{"type": "function"}]), ("response_format", {"type": "json_schema"}),
            ("frequency_penalty", 2.5), ("presence_penalty", -3),
            ("logit_bias", {"1": 5}), ("metadata", {"session_id": 7}), ("max_tokens", 0),
            ("max_tokens", 8.0), ("max_tokens", True), ("max_tokens", "8"), ("max_completion_tokens", -1), ("n", 1.5),
            ("top_logprobs", -1), ("top_k", 2**31), ("top_k", 1.5), ("min_p", -0.1), ("seed", 2**63), ("seed", 1.5),
            ("stop", ""), ("stop", [None]), ("stop", 7), ("best_of", 2), ("repetition_penalty", 1.1),
            ("repetition_penalty", 0), ("min_tokens", 3), ("guided_json", {"type": "object"}), ("guided_regex", "a+"),
            ("guided_choice", ["a"]), ("structured_outputs", {"regex": "a"}), ("stop_token_ids", [3]),
            ("suffix", "end"), ("bad_words", ["a"]), ("truncate_prompt_tokens", 4), ("length_penalty", 2.0),
            ("use_beam_search", True), ("include_stop_str_in_output", True), ("skip_special_tokens", False),
            ("tool_choice", "required"), ("prompt_logprobs", 0), ("max_new_tokens", 5), ("n_predict", 5),
            ("chat_template_kwargs", {"enable_thinking": False}), ("chat_template_kwargs", True), ("tools", True),
            ("web_search_options", {"search_context_size": "low"}), ("verbosity", "low"), ("dry_multiplier", 0.8),
            ("echo", True), ("add_special_tokens", True), ("add_generation_prompt", False), ("regex", "a+"),
            ("continue_final_message", True), ("return_tokens_as_token_ids", True),
            ("response_format", {"type": "json_object", "schema": None}), ("suffix", "null"), ("n_predict", -1),
        ]
    ),
    ("/v1/chat/completions", {"messages": ASK, "logprobs": False, "top_logprobs": 3}, "top_logprobs"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', None),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
    ("/v1/chat/completions", '{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    ("/v1/chat/completions", {"messages": [*ASK, {"role": "assistant", "tool_calls": [{}]}, *ASK]}, "messages"),
    ("/v1/completions", {"prompt": "a", "chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ("/v1/completions", {}, "prompt"),
    ("/v1/completions", {"prompt": ""}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, "prompt"),
    ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
    ("/v1/completions", {"prompt": [-1]}, "prompt"),
    ("/v1/completions", {"prompt": [99]}, "prompt"),
    ("/v1/completions", {"prompt": [True]}, "prompt"),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "logprobs": True}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "max_completion_tokens": 0}, "max_completion_tokens"),
    ("/v1/completions", {"prompt": "a", "logprobs": -1}, "logprobs"),
    ("/v1/completions", {"prompt": "a", "best_of": 4}, "best_of"),
    ("/v1/completions", {"prompt": "a", "n": 2, "best_of": 3}, "best_of"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 1}, "min_tokens"),
    ("/v1/completions", {"prompt": ["a"] * 40, "n": 2}, "n"),
    ("/tokenize", {}, "prompt"),
    ("/detokenize", {"tokens": [99]}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, param", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_requests_get_the_error_body_of_openai(http, path, body, param):
    body = body if isinstance(body, str) else json.dumps(body)
    response = http.post(path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param, error


def test_what_asks_for_nothing_changes_nothing(http):
    """Clients send the neutral value of many options, and null for all of them."""
    body = {"prompt": "a b", "max_tokens": 6, "seed": 3}
    expected = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    nothing = {"repetition_penalty": 1.0, "length_penalty": 1, "min_tokens": 0, "frequency_penalty": 0.0, "best_of": 1}
    nothing |= {"stop_token_ids": [], "logit_bias": {}, "suffix": "", "use_beam_search": False, "guided_json": None}
    nothing |= {"skip_special_tokens": True, "response_format": {"type": "text"}, "tool_choice": "auto", "tools": []}
    nothing |= {"structured_outputs": {"json": None}, "logprobs": None, "verbosity": "medium", "tfs_z": 1.0}
    no = {"tools": "null", "functions": False, "tool_choice": "none", "function_call": {"type": "none"}, "audio": False}
    no |= {"response_format": {"type": "text", "json_schema": None}, "chat_template_kwargs": {}, "documents": "null"}
    null = dict.fromkeys(
        [
            *serve.NEUTRAL,
            "best_of",
            "n",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "stop",
            "logprobs",
            "stream",
            "store",
        ]
    )
    off = {"temperature": 1, "top_p": 1, "top_k": -1, "min_p": 0, "n": 1, "stop": []}  # whole numbers as floats
    for more in (nothing, no, null, off, {"top_k": 0}, {"top_k": 2**31 - 1}, {"max_completion_tokens": 10**30}):
        response = http.post("/v1/completions", json=body | more)
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["text"] == expected, more


THINKS = (  # reads a setting as Qwen3's template does, and a text
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}no {% endif %}<{{ mood }}{% endif %}"
)


def test_chat_template_kwargs_reach_the_template_and_nothing_else_does(http, live, words, tmp_path, monkeypatch):
    shutil.copytree(words, tmp_path / "words")
    settings = json.loads((tmp_path / "words" / "tokenizer_config.json").read_text()) | {"chat_template": THINKS}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = gpt.load_tokenizer(tmp_path / "words")
    monkeypatch.setattr(live.server.models["one"], "tokenizer", tokenizer)

    def ask(kwargs, path="/v1/chat/completions", **options):
        body = {"messages": ASK, "chat_template_kwargs": kwargs, "return_token_ids": True, "max_tokens": 2} | options
        return http.post(path, json=body)

    read = lambda response: tokenizer.decode(response.json()["choices"][0]["prompt_token_ids"])
    plain, quiet = read(ask(None)), read(ask({"enable_thinking": False}))
    assert [text.split().count("no") for text in (plain, quiet)] == [0, 1]
    assert read(ask({"enable_thinking": True})) == read(ask({})) == read(ask({"enable_thinking": None})) == plain
    assert ask({"enable_thinking": False}, "/tokenize").json()["count"] == ask({}, "/tokenize").json()["count"] + 1
    assert not ask({"mood": "mild 2"}).is_error
    for kwargs, message in (
        ({"thinking": False}, r"does not read 'thinking' of chat_template_kwargs, but: enable_thinking, mood$"),
        ({"messages": []}, "does not read 'messages'"), ({"eos_token": "a"}, "does not read 'eos_token'"),
        ({"mood": ["a"]}, "mood of chat_template_kwargs is a number"),
        *(({"mood": text}, "a text that holds nothing of a special token") for text in ("eos", "eos>", "<pad>")),
    ):  # fmt: skip
        error = ask(kwargs).json()["error"]
        assert error["param"] == "chat_template_kwargs" and re.search(message, error["message"])
    assert ask({"enable_thinking": False}, store=True).json()["error"]["param"] == "store"
    monkeypatch.undo()
    assert ask({"mood": "mild"}).json()["error"]["message"].endswith("nor any other: leave them out")


def test_requests_say_how_the_turn_opens_only_as_it_does(http):
    """vLLM's names: an answer continues the assistant's last message, and opens a turn after any other."""
    begun = [*ASK, {"role": "assistant", "content": "a"}]
    goes_on = {"add_generation_prompt": False, "continue_final_message": True}
    opens = {"add_generation_prompt": True, "continue_final_message": False, "echo": False, "add_special_tokens": False}
    for messages, wanted, other in ((ASK, opens, goes_on), (begun, goes_on, opens)):
        body = {"messages": messages, "seed": 3, "max_tokens": 4}
        plain = text_of(http.post("/v1/chat/completions", json=body))
        assert text_of(http.post("/v1/chat/completions", json=body | wanted)) == plain
        for name in goes_on:
            error = http.post("/v1/chat/completions", json=body | {name: other[name]}).json()["error"]
            assert error["param"] == name and error["message"].endswith(f"or send {json.dumps(wanted[name])}")


def test_a_text_may_come_without_the_token_before_it(http, live, monkeypatch):
    monkeypatch.setattr(live.server.models["one"].tokenizer, "bos_id", 2)
    body = {"prompt": "a b", "max_tokens": 1, "return_token_ids": True}
    ids = lambda **more: http.post("/v1/completions", json=body | more).json()["choices"][0]["prompt_token_ids"]
    assert ids() == ids(add_special_tokens=True) == [2, *ids(add_special_tokens=False)]


def test_what_a_message_may_hold_is_said(http):
    for message, said in (
        ({"role": "tool", "content": "4"}, "known are system, developer, user and assistant, since tools"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "only text is read, no images",
        ),
    ):
        error = http.post("/v1/chat/completions", json={"messages": [*ASK, message]}).json()["error"]
        assert error["param"] == "messages" and said in error["message"]


def test_limits_mean_what_they_say_at_their_ends(http):
    def tokens(path="/v1/completions", **options):
        body = {"prompt": "a b"} if path == "/v1/completions" else {"messages": ASK}
        response = http.post(path, json=body | {"ignore_eos": True} | options)
        assert response.status_code == 200, response.text
        return response.json()["usage"]["completion_tokens"]

    chat = "/v1/chat/completions"
    assert tokens() == 16 and tokens(max_tokens=1) == 1 and tokens(max_tokens=10**30) == tokens(max_tokens=64) > 50
    assert tokens(chat, max_tokens=3) == 3 and tokens(chat) == tokens(chat, max_completion_tokens=None) > 40
    # the smaller of the two where both are given
    assert (
        tokens(chat, max_tokens=3, max_completion_tokens=5) == tokens(chat, max_tokens=5, max_completion_tokens=3) == 3
    )
    assert tokens(max_completion_tokens=4) == 4 and tokens(max_tokens=0, echo=True) == 0

    say = lambda **more: http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 12, "seed": 5} | more).json()
    text = lambda **more: say(**more)["choices"][0]["text"]
    greedy = text(temperature=0)
    assert text() != greedy
    for name, value in (("top_k", 1), ("top_p", 1e-300), ("top_p", 1e-7), ("min_p", 1), ("temperature", 1e-300)):
        assert text(**{name: value}) == greedy, name
    assert text(temperature=1e-40) == text(temperature=1e-9) == greedy
    assert text(min_p=1e-300) == text(top_p=1 - 1e-12) == text()
    # every seed is one of its own, and the same one each time
    seeds = [0, -1, 1, 2**32, 2**32 - 1, -(2**63), 2**63 - 1]
    texts = [text(seed=seed) for seed in seeds]
    assert texts == [text(seed=seed) for seed in seeds] and len(set(texts)) > 5
    assert len({serve.fold_seed(seed) for seed in [*range(-50, 50), *range(2**32, 2**32 + 50)]}) == 150

    said = say(logprobs=0)["choices"][0]["logprobs"]  # of what was chosen alone
    assert [list(top) for top in said["top_logprobs"]] == [[token] for token in said["tokens"]]
    said = say(logprobs=20)["choices"][0]["logprobs"]["top_logprobs"]
    assert all(len(top) == 16 for top in said)  # there are no more words
    asked = {"messages": ASK, "max_tokens": 2, "logprobs": True}
    for top, count in ((None, 0), (0, 0), (1, 1), (20, 16)):
        said = http.post(chat, json=asked | {"top_logprobs": top}).json()["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in said] == [count] * len(said) and said
    assert http.post(chat, json=asked | {"logprobs": None, "top_logprobs": 0}).json()["choices"][0]["logprobs"] is None
    assert len(http.post("/v1/completions", json={"prompt": "a", "n": 8, "best_of": 8}).json()["choices"]) == 8


def test_every_other_refusal_has_that_body_too(http, live):
    json_type = {"content-type": "application/json"}
    cases = [
        (http.get("/nothing"), 404, "not_found_error"),
        (http.get("/v1/completions"), 405, "invalid_request_error"),
        (http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": "text/plain"}), 415, None),
        (http.post("/v1/completions", content=b'{"prompt": "a"}'), 415, None),
        (http.post("/v1/completions", content=b" " * (serve.MAX_BODY + 1), headers=json_type), 413, None),
        (http.get("/health", headers={"host": "evil.example"}), 400, "invalid_request_error"),
        (http.post("/v1/completions", json={"prompt": "a"}, headers={"origin": "http://evil.example"}), 403, None),
        (http.post("/v1/completions", json={"prompt": "a"}, headers={"sec-fetch-site": "cross-site"}), 403, None),
        (http.request("DELETE", "/v1/feedback/x", headers={"origin": "http://evil.example"}), 403, None),
    ]
    for response, status, kind in cases:
        assert response.status_code == status, response.text
        assert response.json()["error"]["type"] == (kind or "invalid_request_error")
    own = {"origin": live.url, "sec-fetch-site": "same-origin"}
    assert say(http).status_code == 200 and http.post("/tokenize", json={"prompt": "a"}, headers=own).status_code == 200


def test_a_body_without_a_length_is_bounded_and_has_to_come_in_time(http, live, monkeypatch):
    def endless():
        for _ in range(64):
            yield b" " * 2**15

    response = http.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    monkeypatch.setattr(serve, "BODY_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n")
        raw.sendall(b"content-length: 100\r\n\r\n{")
        assert raw.recv(100).startswith(b"HTTP/1.1 408")


def test_headers_and_connections_have_limits_before_any_check(http, live, monkeypatch):
    connect = lambda: socket.create_connection(("127.0.0.1", int(live.url.rpartition(":")[2])), timeout=10)
    monkeypatch.setattr(serve, "MOST_HEADER", 1000)
    with connect() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 1200)
        assert raw.recv(200).startswith(b"HTTP/1.1 431")
    monkeypatch.setattr(serve, "HEADER_SECONDS", 0.1)
    with connect() as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nhost: ")
        assert raw.recv(200).startswith(b"HTTP/1.1 408")
    monkeypatch.setattr(serve, "HEADER_SECONDS", 10.0)
    monkeypatch.setattr(serve, "MOST_CONNECTIONS", 4)
    with contextlib.ExitStack() as stack:
        waiting = [stack.enter_context(connect()) for _ in range(8)]
        with httpx2.Client(base_url=live.url) as fresh:  # those that say nothing make room
            assert fresh.get("/health").status_code == 200
        assert waiting[0].recv(200).startswith(b"HTTP/1.1 503")


def test_a_stream_that_fails_ends_in_an_error(http, live, monkeypatch):
    async def fail(*_):
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(live.server.store, "do", fail)
    text = say(http, stream=True, store=True, max_tokens=2).text
    assert "disk full" not in text and frames(text)[-1]["error"]["type"] == "server_error"


@pytest.mark.parametrize("by", ["live", "relay"])
def test_the_responses_api_says_what_the_chat_says(http, live, request, by):
    url = live.url if by == "live" else request.getfixturevalue("relay").url
    client = openai.OpenAI(base_url=url + "/v1", api_key="unused", max_retries=0)
    messages = [{"role": "system", "content": "d"}, *ASK]
    chat = http.post("/v1/chat/completions", json=dict(messages=messages, temperature=0, max_tokens=7)).json()
    asked = dict(model="one", instructions="d", input="a b c", temperature=0, max_output_tokens=7)
    whole = client.responses.create(**asked)
    assert whole.output_text == chat["choices"][0]["message"]["content"] and whole.output[0].role == "assistant"
    assert whole.status == ("incomplete" if chat["choices"][0]["finish_reason"] == "length" else "completed")
    assert whole.usage.output_tokens == chat["usage"]["completion_tokens"]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "a b c"}]}]
    assert client.responses.create(**asked | {"input": parts}).output_text == whole.output_text
    if by == "live":  # no part of that API, but what chats have here
        penalties = dict(frequency_penalty=2.0, presence_penalty=1.5)
        same = http.post("/v1/chat/completions", json=dict(messages=messages, temperature=0, max_tokens=7) | penalties)
        assert client.responses.create(**asked, extra_body=penalties).output_text == text_of(same) != whole.output_text
    with client.responses.stream(**asked) as events:
        events = list(events)
    kinds = [event.type for event in events]
    assert kinds[:4] == [f"response.{name}" for name in (
        "created", "in_progress", "output_item.added", "content_part.added")]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    last = events[-1]
    assert text == last.response.output_text == whole.output_text and last.type == f"response.{whole.status}"
    for more, name in (
        ({"previous_response_id": "x"}, "previous_response_id"), ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "json_object"}}}, "text"), ({"reasoning": {"effort": "high"}}, "reasoning"),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=name):
            client.responses.create(**asked | more)


def test_a_response_is_asked_for_nothing_in_many_ways(http):
    body = {"input": "a b c", "max_output_tokens": 5, "temperature": 0}
    text = lambda **more: http.post("/v1/responses", json=body | more).json()["output"][0]["content"][0]["text"]
    nothing = {"include": ["reasoning.encrypted_content"], "reasoning": {"effort": None, "summary": None}, "tools": []}
    nothing |= {"text": {"format": {"type": "text", "schema": None}, "verbosity": "medium"}, "tool_choice": "none"}
    nothing |= {"truncation": "disabled", "background": False, "conversation": None, "previous_response_id": ""}
    assert text(**nothing) == text() != ""


def test_a_response_is_stored_on_request_and_one_that_fails_says_so(votes, http, live, monkeypatch):
    ask = lambda **more: http.post("/v1/responses", json={"input": "a b c", "max_output_tokens": 5} | more)
    stored = ask(store=True).json()["output"][0]["generation_id"]
    assert [row["id"] for row in select(votes, "SELECT id FROM generation")] == [stored]

    async def fail(*_):
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(live.server.store, "do", fail)
    text = ask(store=True, stream=True).text
    last = json.loads(text.strip().rpartition("data: ")[2])
    assert (last["type"], last["response"]["status"]) == ("response.failed", "failed") and "disk" not in text


def test_a_long_text_is_refused_before_it_is_tokenised(http):
    for body in ({"prompt": "a " * 9000}, {"messages": [{"role": "user", "content": "a " * 9000}]}):
        response = http.post("/tokenize", json=body)
        assert response.status_code == 400 and response.json()["error"]["code"] == "context_length_exceeded"


def test_markdown_is_trees_of_known_tags_and_its_length_is_bounded(http, monkeypatch):
    texts = ["*a* <b>b</b>", "[x](javascript:y) [z](https://z.example 'title')", "![i](https://z.example)", ""]
    link = ["a", {"href": "https://z.example"}]
    assert http.post("/markdown", json={"texts": texts}).json()["trees"] == [
        [["p", {}, ["em", {}, "a"], " <b>b</b>"]], [["p", {}, "[x](javascript:y) ", [*link, "z"]]],
        [["p", {}, "!", [*link, "i"]]], [],
    ]  # fmt: skip
    monkeypatch.setattr(serve, "MOST_MARKDOWN", 10)
    assert http.post("/markdown", json={"texts": ["a" * 6] * 2}).status_code == 413
    (tree,), depth = serve.markdown_tree("*a " * 90 + "b" + "*" * 90), 0
    while not isinstance(tree, str):
        tree, depth = tree[-1], depth + 1
    assert depth < 60 and "b" in tree


def test_addresses_that_are_none_keys_in_any_case_and_labels(http):
    for headers in ({"host": "[::1"}, {"origin": "http://[::1"}):
        assert (
            ask_app(serve.Config(model=(("one",),)), "POST", "/tokenize", json={}, headers=headers).status_code == 400
        )
    response = ask_app(KEY, "GET", "/v1/models", headers={"authorization": "bearer secret"})
    assert response.json()["error"]["message"] == "Loading model"
    model = serve.Served('a"b\\c', "folder", serve.Config())
    assert next(serve.metric_lines(model)).startswith('vllm:num_requests_running{model_name="a\\"b\\\\c"}')


def test_votes_are_their_owners_alone_and_need_a_folder(tmp_path):
    serve.open_votes(tmp_path / "f.db").close()
    assert (tmp_path / "f.db").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match=r"votes cannot be kept in \S+f.db \(--feedback\): No such file"):
        serve.open_votes(tmp_path / "none" / "f.db")


def test_a_full_queue_says_when_to_come_back(http, client):
    response = http.post("/v1/completions", json={"prompt": ["a"] * 8, "n": 3})  # 24 > 4 slots + 8 waiting
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert response.json()["error"]["type"] == "rate_limit_error"
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="one", prompt=["a"] * 8, n=3)
    assert say(http).status_code == 200  # nothing of it was kept


@pytest.mark.parametrize("by", ["live", "relay"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_hangs_up_frees_the_slots(live, http, slow, stream, by, request):
    url = live.url if by == "live" else request.getfixturevalue("relay").url
    body = dict(messages=ASK, n=4, max_tokens=60, ignore_eos=True, stream=stream)
    before = live.server.models["one"].finished["abort"]
    with httpx2.Client(base_url=url, timeout=0.3) as hasty:
        if stream:
            with hasty.stream("POST", "/v1/chat/completions", json=body) as response:
                next(line for line in response.iter_lines() if "content" in line and '"content":""' not in line)
        else:
            with pytest.raises(httpx2.TimeoutException):
                hasty.post("/v1/chat/completions", json=body)
    start = time.monotonic()
    assert say(http, max_tokens=1).status_code == 200
    wait_for(lambda: gauge(http, "num_requests_running") == gauge(http, "num_requests_waiting") == 0, 1.0)
    assert time.monotonic() - start < 1.2  # the rest of the answers would have taken longer
    assert live.server.models["one"].finished["abort"] == before + 4


@pytest.mark.parametrize("by", ["live", "relay"])
def test_who_is_gone_before_a_stream_begins_frees_the_slots(live, http, slow, by, request):
    server = live.server if by == "live" else request.getfixturevalue("relay").server
    body = json.dumps(dict(messages=ASK, n=4, max_tokens=60, ignore_eos=True, stream=True)).encode()
    calls = []

    async def receive():
        calls.append(1)
        if len(calls) == 1:
            return {"type": "http.request", "body": body}
        if by == "relay" and len(calls) == 2:
            await asyncio.sleep(60)  # the client waits while the other engine is asked
        return {"type": "http.disconnect"}

    async def send(message):
        raise OSError("nobody reads this")

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = dict(type="http", asgi={"spec_version": "2.4"}, method="POST", path="/v1/chat/completions", headers=headers,
                 query_string=b"", root_path="")  # fmt: skip
    asyncio.run_coroutine_threadsafe(server.app()(scope, receive, send), server.engine.loop).result(30)
    wait_for(lambda: not live.server.models["one"].busy, 1.0)  # all of it would take 2 s


def test_a_deadline_cuts_an_answer_and_ends_a_wait(live, http, slow, monkeypatch):
    monkeypatch.setattr(live.server, "config", serve.dataclasses.replace(live.server.config, timeout=0.5))
    with ThreadPoolExecutor(2) as pool:
        long = dict(max_tokens=60, ignore_eos=True)
        first = pool.submit(say, http, n=4, **long)
        wait_for(lambda: gauge(http, "num_requests_running") == 4)
        second = pool.submit(say, http, **long)
        answers = first.result().json()["choices"]
        assert {answer["finish_reason"] for answer in answers} == {"abort"} and answers[0]["message"]["content"]
        assert second.result().status_code in (200, 503)  # let in at the last moment, or told that it waited too long


def test_health_answers_at_once_while_the_engine_works(http, slow):
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(say, http, n=4, max_tokens=40, ignore_eos=True)
        waits = []
        while not work.done():
            start = time.monotonic()
            assert http.get("/health").json() == {"status": "ok"}
            waits.append(time.monotonic() - start)
        assert len(waits) > 10 and np.median(waits) < 0.1


# ---- who may ask


def ask_app(config, method, path, **options):
    """One request to the app without an engine: what passes the guard is told that the model is loading."""
    server = serve.Server(config, None)
    transport = httpx2.ASGITransport(server.app())

    async def ask():
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


KEY = serve.Config(model=(("one",),), api_key="secret")
PATHS = [
    "/v1/models",
    "/models",
    "/metrics",
    "/v1/feedback/export",
    "/v1/feedback/counts",
    "/tokenizer_info",
    "/nothing",
]


def test_a_key_is_needed_everywhere_but_at_the_door():
    for path in PATHS:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "secrets"}, {"authorization": "secret é"}):
            response = ask_app(KEY, "GET", path, headers={k: v.encode() for k, v in headers.items()})
            assert response.status_code == 401 and response.json()["error"]["type"] == "authentication_error"
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/feedback", "/tokenize", "/detokenize"):
        assert ask_app(KEY, "POST", path, json={}).status_code == 401
    assert ask_app(KEY, "DELETE", "/v1/sessions/x").status_code == 401
    for headers in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}):
        assert ask_app(KEY, "GET", "/v1/models", headers=headers).json()["error"]["message"] == "Loading model"
    assert ask_app(KEY, "GET", "/health").status_code == 503 and ask_app(KEY, "GET", "/").status_code in (200, 404)


def test_other_pages_are_let_in_by_name_alone():
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    response = ask_app(KEY, "OPTIONS", "/v1/chat/completions", headers=preflight)
    assert "access-control-allow-origin" not in response.headers
    config = serve.dataclasses.replace(KEY, cors_origin=("https://a.example",))
    response = ask_app(config, "OPTIONS", "/v1/chat/completions", headers=preflight)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "https://a.example"
    response = ask_app(config, "OPTIONS", "/v1/chat/completions", headers=preflight | {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in response.headers
    asked = ask_app(
        config, "POST", "/tokenize", json={}, headers={"origin": "https://a.example", "x-api-key": "secret"}
    )
    assert asked.status_code == 503 and asked.headers["access-control-allow-origin"] == "https://a.example"
    assert (
        ask_app(
            config, "POST", "/tokenize", json={}, headers={"origin": "https://b.example", "x-api-key": "secret"}
        ).status_code
        == 403
    )


@pytest.mark.parametrize(
    "options, said",
    [
        ({"host": "0.0.0.0"}, "--api-key"), ({"host": "::"}, "--api-key"), ({"slots": 0}, "--slots"),
        ({"cors_origin": ("*",)}, "--cors-origin"), ({"model": (("out/none-here",),)}, "no model in"),
        ({"upstream": "localhost:8001"}, "http://localhost:8001"), ({"upstream": "http://[::1"}, "no address"),
        ({"upstream": "http://me:mine@localhost:1"}, "--upstream-key"),
        ({"upstream": "http://localhost:1", "quantize": "int8"}, "--quantize"),
    ],
)  # fmt: skip
def test_a_server_that_should_not_run_does_not_start(folder, options, said):
    with pytest.raises((ValueError, OSError), match=said):
        serve.check_config(serve.Config(**({"model": ((str(folder / "one"),),)} | options)))


def test_a_server_for_others_starts_with_a_key_or_on_request(folder):
    for options in ({"api_key": "x"}, {"insecure": True}):
        serve.check_config(serve.Config(model=((str(folder / "one"),),), host="0.0.0.0", **options))


def test_names_of_models():
    assert serve.model_names(["out/ppo", "out/dpo/"]) == ["ppo", "dpo"]
    assert serve.model_names(["a/out/ppo", "b/out/ppo"]) == ["a/out/ppo", "b/out/ppo"]
    assert serve.model_names(["r1/ppo", "r2/ppo"]) == ["r1/ppo", "r2/ppo"]
    with pytest.raises(ValueError, match="the same"):
        serve.model_names(["out/ppo", "out/ppo"])


def test_the_page_runs_only_its_own_script(tmp_path, monkeypatch, http):
    monkeypatch.setattr(serve, "HERE", tmp_path)
    config = serve.Config(model=(("one",),))
    assert "ui.html" in ask_app(config, "GET", "/").text
    (tmp_path / "ui.html").write_text('<style nonce="NONCE"></style><script nonce="NONCE"></script>')
    pages = [ask_app(config, "GET", "/") for _ in range(2)]
    nonces = [re.findall(r'nonce="([^"]+)"', page.text) for page in pages]
    assert nonces[0][0] == nonces[0][1] != nonces[1][0] and "NONCE" not in pages[0].text
    policy = pages[0].headers["content-security-policy"]
    assert policy.startswith("default-src 'none'") and f"script-src 'nonce-{nonces[0][0]}'" in policy
    assert "unsafe" not in policy and {"frame-ancestors 'none'", "form-action 'none'"} <= set(policy.split("; "))
    assert pages[0].headers["x-content-type-options"] == "nosniff"
    assert pages[0].headers["referrer-policy"] == "no-referrer"
    assert ask_app(serve.dataclasses.replace(config, ui=False), "GET", "/").status_code == 404


def test_logs_hold_no_prompts_and_no_lines_of_a_clients_making(http, caplog):
    with caplog.at_level(logging.INFO, "serve"):
        http.get("/x%0D%0A2026-01-01 GET /admin 200%1b[31m")
        response = say(http, "yes no yes", max_tokens=1)
        odd = http.get("/health", headers={"x-request-id": "mine-7 \t<b>"})
    assert not any("\n" in line or "\r" in line or "\x1b" in line for line in caplog.messages)
    assert any("/x\\r\\n2026" in line for line in caplog.messages) and "yes no" not in caplog.text
    assert odd.headers["x-request-id"] == "mine-7b" and len(response.headers["x-request-id"]) == 32


def test_a_failure_inside_says_an_id_and_nothing_else(http, live, monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("/home/secret at 0x7f00")

    with monkeypatch.context() as patch:
        patch.setattr(serve, "make_job", fail)
        response = say(http)
        assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
        assert response.headers["x-request-id"] in response.text and "secret" not in response.text
        assert "secret" in caplog.text  # for whoever runs the server
    with monkeypatch.context() as patch:  # within the engine: of this request alone
        patch.setattr(serve.Choice, "read", lambda self, *args: fail() if len(self.ids) == 3 else "fine")
        with ThreadPoolExecutor(2) as pool:
            bad = pool.submit(
                http.post, "/v1/completions", json={"prompt": "a b c", "max_tokens": 30, "ignore_eos": True}
            )
            good = http.post("/v1/completions", json={"prompt": "a b", "max_tokens": 30, "ignore_eos": True})
            assert good.status_code == 200 and bad.result().status_code == 500 and "secret" not in bad.result().text
        streamed = http.post("/v1/completions", json={"prompt": "a b c", "stream": True})
        assert frames(streamed.text)[-1]["error"]["type"] == "server_error"
    assert say(http).status_code == 200


def test_a_dead_engine_is_told_by_health(folder, tmp_path):
    with running(folder, tmp_path / "f.db", models=("one",)) as process, httpx2.Client(base_url=process.url) as http:
        model = process.server.models["one"]

        def broken(*args):
            time.sleep(0.2)
            raise RuntimeError("device lost")

        model.decode = broken
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(say, http, ignore_eos=True) for _ in range(2)]  # no first token ends them
            assert {future.result().status_code for future in waiting} <= {500, 503}
        wait_for(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json()["error"]["code"] == "engine_dead" and say(http).status_code == 503


def test_draining_lets_running_answers_end_and_admits_no_more(folder, tmp_path):
    served = running(folder, tmp_path / "f.db", models=("one",), drain=30.0)
    with served as process, httpx2.Client(base_url=process.url) as http:
        model = process.server.models["one"]
        decode, model.steps = model.decode, dict.fromkeys(model.steps, 1)
        model.decode = lambda *args: time.sleep(0.02) or decode(*args)
        with ThreadPoolExecutor(2) as pool:
            short = pool.submit(say, http, max_tokens=20, ignore_eos=True)
            wait_for(lambda: model.running)
            process.drain()
            assert say(http).json()["error"]["code"] == "shutting_down"
            assert short.result().json()["choices"][0]["finish_reason"] == "length"


# ---- votes


def stored(http, content="a b c", **options):
    """Ids and texts of two stored answers to one question, both ended by max_tokens."""
    options = {"n": 2, "store": True, "seed": 1, "max_tokens": 8, "ignore_eos": True} | options
    response = say(http, content, **options).json()
    ids = [choice["generation_id"] for choice in response["choices"]]
    texts = [choice["message"]["content"] for choice in response["choices"]]
    return ids, texts


def finish_all(database):
    """Pretend that every answer ended by itself."""
    with sqlite3.connect(database) as connection:
        connection.execute("UPDATE generation SET finish_reason = 'stop'")


def vote(http, kind, value, a, b=None, status=201, person="ann", **more):
    body = dict(kind=kind, value=value, generation_a=a, generation_b=b, annotator_id=person, consent=True) | more
    response = http.post("/v1/feedback", json=body)
    assert response.status_code == status, response.text
    return response.json()


@pytest.fixture
def votes(live, http):
    """The database, empty."""
    path = live.server.config.feedback
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM feedback")
        connection.execute("DELETE FROM generation")
    return path


def select(path, query):
    with sqlite3.connect(path) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query)]


def export(http, kind, **query):
    response = http.get("/v1/feedback/export", params={"format": kind} | query)
    assert response.status_code == 200, response.text
    rows = [json.loads(line) for line in response.text.splitlines()]
    assert int(response.headers["x-rows"]) == len(rows)
    assert response.headers["x-sha256"] == serve.hashlib.sha256(response.content).hexdigest()
    return rows


def test_answers_are_stored_only_on_request_and_exactly(votes, http, live):
    assert "generation_id" not in say(http).json()["choices"][0] and select(votes, "SELECT * FROM generation") == []
    metadata = {"session_id": "s1", "parent_id": "p1"}
    options = dict(store=True, metadata=metadata, seed=7, temperature=0.5, top_k=9, max_tokens=6)
    answer = say(http, logprobs=True, **options).json()
    (row,) = select(votes, "SELECT * FROM generation")
    choice = answer["choices"][0]
    assert row["id"] == choice["generation_id"] and row["completion"] == choice["message"]["content"]
    assert (row["session_id"], row["parent_id"], row["model_id"]) == ("s1", "p1", "one")
    assert json.loads(row["prompt_messages"]) == ASK and row["finish_reason"] == choice["finish_reason"]
    sampling = json.loads(row["sampling"])
    assert (sampling["seed"], sampling["temperature"], sampling["top_k"], sampling["limit"]) == (7, 0.5, 9, 6)
    assert row["logprob_sum"] == pytest.approx(sum(entry["logprob"] for entry in choice["logprobs"]["content"]))
    assert row["quantization"] == http.get("/v1/models").json()["data"][0]["quantization"] == "none"
    assert row["checkpoint_sha256"] == live.server.models["one"].checkpoint and row["tokenizer_sha256"]
    last = frames(say(http, stream=True, **options).text)[-1]["choices"][0]
    assert last["finish_reason"] and last["generation_id"] in {
        r["id"] for r in select(votes, "SELECT id FROM generation")
    }


def test_votes_become_rows_by_the_rules(votes, http, tmp_path):
    (a, b), (text_a, text_b) = stored(http)
    turn = lambda text: [{"role": "assistant", "content": text}]
    finish_all(votes)
    vote(http, "pair", "a", a, b, shown_left="b", reasons=["short"], comment="'; DROP TABLE feedback; --")
    vote(http, "pair", "tie", a, b, person="bob")
    vote(http, "pair", "both_bad", a, b, person="cid")
    vote(http, "thumb", "up", a)
    vote(http, "thumb", "down", a, person="dan", consent=False)
    vote(http, "edit", "edited", b, edited_text="b a")
    pairs = export(http, "trl-preference")
    assert [{k: v for k, v in row.items() if k != "id"} for row in pairs] == [
        {"prompt": ASK, "chosen": turn(text_a), "rejected": turn(text_b)},
        {"prompt": ASK, "chosen": turn("b a"), "rejected": turn(text_b)},
    ]
    thumbs = export(http, "trl-unpaired")
    assert [(row["completion"], row["label"]) for row in thumbs] == [
        (turn(text_a), False), (turn(text_b), False), (turn(text_a), True),
    ]  # fmt: skip
    raw = export(http, "raw")
    assert [row["value"] for row in raw] == ["a", "tie", "both_bad", "up", "edited"]  # no consent, no row
    assert raw[0]["shown_left"] == "b" and json.loads(raw[0]["reasons"]) == ["short"]
    counts = http.get("/v1/feedback/counts").json()
    assert (counts["pairs"], counts["thumbs"], counts["edits"], counts["dropped"]) == (1, 3, 1, {"a tie": 1})
    assert export(http, "raw", model="two") == [] and len(export(http, "raw", model="one")) == 5
    assert export(http, "raw", since="2999") == [] and http.get("/v1/feedback/export?format=x").status_code == 400

    report = prepare.main(prepare.Config((str(votes),), tmp_path / "out", heldout=0))
    lines = lambda name: [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
    assert lines("pairs") == pairs and lines("thumbs") == thumbs
    assert report["kind"] == "votes" and report["dropped"]["a tie"]["count"] == 1
    assert [row for _, row in gpt.read_rows(tmp_path / "out/pairs.jsonl", "pairs")] == pairs
    assert [row for _, row in gpt.read_rows(tmp_path / "out/thumbs.jsonl", "thumbs")] == thumbs


def test_answers_that_were_cut_are_marked_and_what_would_teach_nothing_is_refused(votes, http):
    (a, b), (text_a, text_b) = stored(http)  # ended by max_tokens
    vote(http, "pair", "b", a, b)
    vote(http, "thumb", "up", a)
    vote(http, "edit", "edited", a, edited_text="b a")
    assert [row["truncated"] for row in export(http, "trl-preference")] == [["chosen", "rejected"], ["rejected"]]
    assert [row["truncated"] for row in export(http, "trl-unpaired")] == [["completion"]]
    finish_all(votes)
    refused = lambda *args, **more: vote(http, *args, status=400, **more)["error"]["message"]
    assert "equal answers" in refused("edit", "edited", a, person="bob", edited_text=f" {text_a} ")
    with sqlite3.connect(votes) as connection:
        connection.execute("UPDATE generation SET finish_reason = 'abort' WHERE id = ?", (b,))
    assert "broken off" in refused("thumb", "up", b)
    with sqlite3.connect(votes) as connection:
        connection.execute("UPDATE generation SET finish_reason = 'stop', completion = ?", (text_a,))
    assert "equal answers" in refused("pair", "a", a, b, person="bob")
    assert len(select(votes, "SELECT * FROM feedback")) == 3


def test_an_answer_is_held_for_a_vote_and_stored_with_it(votes, http, live, monkeypatch):
    options = dict(store="on_vote", max_tokens=3, temperature=0, metadata={"session_id": "mine"})  # a draw can be empty
    ask = lambda **more: say(http, **options | more).json()["choices"][0]["generation_id"]
    name = ask()
    assert select(votes, "SELECT * FROM generation") == []
    vote(http, "thumb", "up", name, status=404, consent=False)  # no consent: it stays out of the database
    assert select(votes, "SELECT * FROM generation") == [] and name in live.server.held
    vote(http, "thumb", "up", name)
    assert [row["id"] for row in select(votes, "SELECT * FROM generation")] == [name]
    vote(http, "thumb", "down", name)
    assert name not in live.server.held and [row["label"] for row in export(http, "trl-unpaired")] == [False]
    erased = ask()
    http.delete("/v1/sessions/mine")
    vote(http, "thumb", "up", erased, status=404)
    monkeypatch.setattr(serve, "HELD", 1)
    names = [ask(), ask()]
    vote(http, "thumb", "up", names[0], status=404)
    vote(http, "thumb", "up", names[1])


def test_the_command_for_a_few_votes_fits_them_and_the_model(votes, http, live, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "command" not in http.get("/v1/feedback/counts").json()
    longest = 0
    for i in range(6):
        (a, b), _ = stored(http, "a b c " * (1 + i % 2), seed=i)
        vote(http, "pair", "a", a, b)
    tokens = [json.loads(row["usage"]) for row in select(votes, "SELECT usage FROM generation")]
    longest = max(sum(x.values()) for x in tokens)
    found = http.get("/v1/feedback/counts").json()
    prepared, trained = (command.split() for command in found["command"].split(" && "))
    args = dpo_config(trained)
    config = live.server.models["one"]
    assert longest < args.length <= config.model_config.context and args.length < longest + 24
    assert (args.init, args.lr, args.batch_size, args.steps) == (config.path, 3e-4, 2, serve.LEAST_STEPS)
    assert args.data == ("data/votes-6/pairs.jsonl",) and str(args.out) == "out/votes-6"
    assert prepared[prepared.index("--heldout") + 1] == "0" and prepared[prepared.index("--out") + 1] == "data/votes-6"
    assert found["serve"].split()[:5] == ["python", "serve.py", "--model", config.path, "out/votes-6"]
    (tmp_path / "out/votes-6").mkdir(parents=True)  # it may be what is served by now
    found = http.get("/v1/feedback/counts").json()
    assert "--out out/votes-6-2 " in found["command"] and "out/votes-6-2" in found["serve"].split()


def dpo_config(command):
    assert command[:2] == ["python", "dpo.py"]
    return tyro.cli(dpo.Config, args=command[2:])


# ---- another engine behind the page and the votes


@pytest.fixture(scope="module")
def relay(live, folder, tmp_path_factory):
    """A server whose answers come from the other one."""
    database = tmp_path_factory.mktemp("relay") / "feedback.db"
    started = running(folder, database, ["one"], upstream=live.url + "/v1/")
    with started as process, httpx2.Client(base_url=process.url, timeout=60) as http:
        http.url, http.database, http.server = process.url, database, process.server
        yield http


def test_what_another_engine_says_is_passed_on(relay, http):
    options = dict(model="two", seed=3, temperature=0.7, max_tokens=9, ignore_eos=True)
    assert text_of(say(relay, **options)) == text_of(say(http, **options))
    streamed = frames(say(relay, stream=True, stream_options={"include_usage": True}, n=2, **options).text)
    texts = ["", ""]
    for choice in (choice for chunk in streamed for choice in chunk["choices"]):
        texts[choice["index"]] += choice["delta"].get("content", "")
        assert "generation_id" not in choice
    assert texts == [c["message"]["content"] for c in say(http, n=2, **options).json()["choices"]]
    assert streamed[-1]["usage"]["completion_tokens"] == 18
    begun = [*ASK, {"role": "assistant", "content": "d e"}]
    asked = dict(messages=begun, **options)
    goes_on = [c.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"] for c in (relay, http)]
    assert goes_on[0] == goes_on[1]
    assert relay.get("/v1/models").json()["data"][1]["max_model_len"] == 64
    assert relay.get("/v1/models/two").json()["sampling"] == serve.SAMPLING
    assert relay.get("/health").json() == {"status": "ok"} and relay.get("/v1/models/three").status_code == 404
    assert (
        relay.post("/tokenize", json={"messages": ASK}).json() == http.post("/tokenize", json={"messages": ASK}).json()
    )
    assert "vllm:num_requests_running" in relay.get("/metrics").text
    stored = relay.post("/v1/responses", json={"input": "a b", "store": True})
    assert stored.status_code == 400 and "only chats and completions are stored" in stored.text


@pytest.mark.parametrize("stream", [True, False])
def test_votes_on_another_engines_answers_are_rows_here(relay, http, votes, stream):
    names = {}
    for model, store in (("one", True), ("two", "on_vote")):
        asked = dict(
            model=model, store=store, n=2, stream=stream, max_tokens=5, temperature=1.5, seed=1, ignore_eos=True
        )
        response = say(
            relay, metadata={"session_id": "s"}, stream_options={"include_usage": True} if stream else None, **asked
        )
        choices = [c for f in frames(response.text) for c in f["choices"]] if stream else response.json()["choices"]
        ends = sorted((c["index"], c["generation_id"]) for c in choices if c.get("finish_reason"))
        names[model] = [name for _, name in ends]
        assert len(names[model]) == 2
    assert select(votes, "SELECT * FROM generation") == []  # the other server stores nothing
    vote(relay, "pair", "a", *names["two"])
    rows = {row["id"]: row for row in select(relay.database, "SELECT * FROM generation")}
    assert set(names["one"] + names["two"]) <= set(rows)
    row = rows[names["two"][0]]
    expected = say(http, **asked | dict(stream=False, store=None, n=2)).json()["choices"][0]
    assert (row["completion"], row["model_id"]) == (expected["message"]["content"], "two")
    assert row["checkpoint_sha256"] == http.get("/v1/models/two").json()["checkpoint_sha256"]
    assert json.loads(row["prompt_messages"]) == ASK and row["session_id"] == "s"
    assert row["completion_token_ids"] is None and row["logprob_sum"] is None  # nobody has said them
    assert json.loads(row["usage"])["completion_tokens"] == 10  # of both
    found = relay.get("/v1/feedback/counts").json()
    args = dpo_config(found["command"].split(" && ")[1].split())
    assert args.init.endswith("one") and "--upstream" in found["serve"]  # the folder that --model named
    relay.delete("/v1/sessions/s")


def test_refusals_of_another_engine_keep_their_words(relay, http):
    for body in ({"n": 9}, {"model": "three"}, {"repetition_penalty": 2}, {"content": "a " * 70}):
        answers = [say(c, **body) for c in (relay, http)]
        assert answers[0].status_code == answers[1].status_code in (400, 404)
        assert answers[0].json() == answers[1].json()
    echo = relay.post("/v1/completions", json={"prompt": "a", "echo": True, "store": True})
    assert echo.status_code == 400 and echo.json()["error"]["param"] == "store"
    for more in ({"tools": [{"type": "function"}]}, {"chat_template_kwargs": {"x": 1}}, {"documents": ["a"]}):
        chat = relay.post("/v1/chat/completions", json={"messages": ASK, "store": True} | more)
        assert chat.status_code == 400 and chat.json()["error"]["param"] == "store"


def engine_that(script: dict):
    """An engine that answers each path with (status, body) of `script`, on a free port."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = script.get(self.path, (404, "not here"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_each_side_has_a_key_of_its_own(tmp_path, monkeypatch):
    config = serve.Config(upstream="http://localhost:1/v1", upstream_key="there", feedback=tmp_path / "f.db")
    server = serve.make_server(config)
    server.store.close()
    assert server.client.headers["authorization"] == "Bearer there" and server.url == "http://localhost:1"
    monkeypatch.setenv("UPSTREAM_KEY", "there")
    monkeypatch.setenv("API_KEY", "here")
    keys = lambda config: (config.api_key, config.upstream_key)
    monkeypatch.setattr(serve, "check_config", lambda config: (_ for _ in ()).throw(InterruptedError(*keys(config))))
    with pytest.raises(InterruptedError) as found:
        serve.main(serve.Config())
    assert found.value.args == ("here", "there")


def test_a_dead_strange_or_breaking_engine_is_told_in_words(relay, monkeypatch):
    models = (200, json.dumps({"object": "list", "data": [{"id": "m"}]}))
    piece = 'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'
    end = 'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
    chat, script = "/v1/chat/completions", {"/v1/models": models}
    engine = engine_that(script)
    point = lambda port: setattr(relay.server.client, "base_url", f"http://127.0.0.1:{port}")
    before = relay.server.client.base_url
    point(engine.server_port)
    try:
        assert set(relay.get("/v1/models").json()["data"][0]) == {"id", "object", "owned_by", "examples"}
        assert relay.get("/health").status_code == 200  # it has none, but lists its models
        script[chat] = (200, piece + end)  # without usage, and without [DONE]
        asked = dict(stream=True, store=True, metadata={"session_id": "s"})
        assert frames(say(relay, **asked).text)[-1]["choices"][0]["generation_id"]
        (row,) = select(relay.database, "SELECT * FROM generation WHERE session_id = 's'")
        assert (row["completion"], row["usage"], row["checkpoint_sha256"]) == ("a", None, "")
        vote(relay, "thumb", "up", row["id"])
        assert " --length 64 " in relay.get("/v1/feedback/counts").json()["command"]  # of the context: nobody counted
        relay.delete("/v1/sessions/s")
        first = {"index": 0, "delta": {}, "finish_reason": "stop"}, {"index": 1, "delta": {"content": "a"}}
        rest = [{"index": 1, "delta": {"content": "b"}}], [{"index": 1, "delta": {}, "finish_reason": "stop"}]
        events = [f"data: {json.dumps({'choices': choices})}\n\n" for choices in (first, *rest)]
        script[chat] = (200, "".join(events))  # the end of one answer comes with a piece of another one
        found = [choice for chunk in frames(say(relay, n=2, **asked).text) for choice in chunk["choices"]]
        assert "".join(c["delta"].get("content", "") for c in found if c["index"] == 1) == "ab"
        assert sum("generation_id" in choice for choice in found) == 2
        relay.delete("/v1/sessions/s")
        last = {"index": 0, "delta": {"content": "z"}, "finish_reason": "stop"}, first[1]
        script[chat] = (200, f"data: {json.dumps({'choices': last})}\n\ndata: {{broken\n\n")  # one had ended before
        *said, error = frames(say(relay, n=2, **asked).text)
        assert error["error"]["code"] == "upstream_dead" and select(relay.database, "SELECT * FROM generation") == []
        found = {c["index"]: c["delta"]["content"] for chunk in said for c in chunk["choices"]}
        assert found == {0: "z", 1: "a"}
        for status, body, code, word in (
            (401, "{}", 502, "--upstream-key"), (500, "<html>oh", 500, "<html>oh"), (503, '{"error": "x"}', 503, "503"),
            (200, "<html>", 502, "no answer that can be read"), (302, "", 502, "302"),
            (400, '{"error": {"message": "exceeds the context size", "code": 400}}', 400, "context size"),
        ):  # fmt: skip
            script[chat] = (status, body)
            error = say(relay)
            assert error.status_code == code and word in error.json()["error"]["message"], error.text
        assert error.json()["error"]["code"] == "context_length_exceeded"
        script[chat] = (200, piece + "data: {broken\n\n")
        last = frames(say(relay, **asked).text)[-1]
        assert last["error"]["code"] == "upstream_dead" and select(relay.database, "SELECT * FROM generation") == []
        engine.shutdown()
        engine.server_close()
        for response in (say(relay), relay.get("/v1/models"), relay.get("/health")):
            error = response.json()["error"]
            assert response.status_code == 502 and error["code"] == "upstream_dead"
            assert "cannot be reached" in error["message"]
    finally:
        relay.server.client.base_url = before


def test_a_second_thought_replaces_the_first_and_undo_takes_both_back(votes, http):
    (a, b), _ = stored(http)
    first = vote(http, "pair", "a", a, b)
    second = vote(http, "pair", "b", a, b)
    assert first["superseded"] is None and second["superseded"] == first["id"]
    assert vote(http, "pair", "a", a, b, person="bob")["superseded"] is None
    rows = select(votes, "SELECT * FROM feedback ORDER BY created_at")
    assert [row["superseded_by"] for row in rows] == [second["id"], None, None]
    finish_all(votes)
    assert len(export(http, "trl-preference")) == 2
    assert http.delete(f"/v1/feedback/{second['id']}").json() == {"id": second["id"], "deleted": True}
    assert [row["annotator_id"] for row in select(votes, "SELECT * FROM feedback")] == ["bob"]
    assert http.delete(f"/v1/feedback/{second['id']}").status_code == 404
    assert vote(http, "pair", "a", a, b)["superseded"] is None


def test_votes_that_make_no_sense_are_refused(votes, http):
    (a, b), _ = stored(http)
    (other, _), _ = stored(http, "d e")
    for kind, value, second, status in [
        ("thumb", "a", None, 400), ("thumb", "up", b, 400), ("pair", "up", b, 400), ("pair", "a", None, 400),
        ("pair", "a", a, 400), ("pair", "a", other, 400), ("pair", "a", "0" * 32, 404), ("edit", "edited", None, 400),
    ]:  # fmt: skip
        vote(http, kind, value, a, second, status=status)
    vote(http, "thumb", "up", "' OR 1=1 --", status=404)
    vote(http, "thumb", "up", a, status=400, comment="x" * 5000)
    vote(http, "thumb", "up", a, status=400, consent="yes")
    assert select(votes, "SELECT * FROM feedback") == []


def test_hostile_text_is_kept_as_it_is(votes, http):
    (a, _), _ = stored(http, metadata={"session_id": "'); DROP TABLE generation; --"})
    for i, text in enumerate(["'\"; --", "nul \x00 here", "🙂\u202e", "<script>alert(1)</script>", "%s {0} :id ?"]):
        vote(http, "thumb", "up", a, person=text, comment=text * 3)
        assert len(select(votes, "SELECT * FROM feedback")) == i + 1
    assert {row["comment"] for row in export(http, "raw")} >= {"nul \x00 here" * 3, "🙂\u202e" * 3}


def test_a_session_can_be_erased(votes, http):
    (a, b), _ = stored(http, metadata={"session_id": "mine"})
    (c, _), _ = stored(http, metadata={"session_id": "yours"})
    vote(http, "pair", "a", a, b)
    vote(http, "pair", "b", a, b)
    vote(http, "thumb", "up", c)
    assert http.delete("/v1/sessions/mine").json() == {"session_id": "mine", "generations": 2, "feedback": 2}
    assert {row["session_id"] for row in select(votes, "SELECT * FROM generation")} == {"yours"}
    assert len(select(votes, "SELECT * FROM feedback")) == 1


def test_a_failed_write_fails_alone(tmp_path):
    store = serve.Store(tmp_path / "f.db")

    def add(connection, i):
        connection.execute("CREATE TABLE IF NOT EXISTS numbers(i INT UNIQUE)")
        connection.execute("INSERT INTO numbers VALUES (?)", (i,))
        return i

    async def all_at_once():
        return await asyncio.gather(*(store.do(add, i % 5) for i in range(10)), return_exceptions=True)

    results = asyncio.run(all_at_once())
    store.close()
    assert results[:5] == list(range(5)) and all(isinstance(r, sqlite3.IntegrityError) for r in results[5:])
    assert [row["i"] for row in select(tmp_path / "f.db", "SELECT i FROM numbers")] == list(range(5))


VOTER = """
import asyncio, sys, serve
store = serve.Store(sys.argv[1])
def add(connection, i):
    connection.execute("CREATE TABLE IF NOT EXISTS numbers(i INT)")
    connection.execute("INSERT INTO numbers VALUES (?)", (i,))
    return i
async def one(i):
    print(await store.do(add, i), flush=True)
async def main():
    for i in range(0, 10**9, 8):
        await asyncio.gather(*(one(i + j) for j in range(8)))
asyncio.run(main())
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    command = [sys.executable, "-c", VOTER, tmp_path / "f.db"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        seen = [int(process.stdout.readline()) for _ in range(200)]
        process.kill()
        seen += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    kept = {row["i"] for row in select(tmp_path / "f.db", "SELECT i FROM numbers")}
    assert set(seen) <= kept and len(kept) <= len(seen) + 8


def test_an_unusable_database_is_an_error_at_the_start(tmp_path):
    (tmp_path / "f.db").write_text("not a database, but long enough to look at " * 20)
    with pytest.raises(ValueError, match="not a database"):
        serve.Store(tmp_path / "f.db")


def test_many_clients_at_once(folder, tmp_path):
    with running(folder, tmp_path / "f.db", max_queue=64) as process:
        tally = asyncio.run(load.load(process.url, load.Config(clients=12, seconds=2.0)))
        assert tally.wrong == [] and tally.acknowledged > 0 and tally.statuses[400] + tally.statuses[404] > 0
        assert load.lost_votes(tmp_path / "f.db", tally) == (0, 0)
        with httpx2.Client(base_url=process.url) as http:
            wait_for(lambda: gauge(http, "num_requests_running") == gauge(http, "num_requests_waiting") == 0)


# ---- the command


def test_the_command_serves_and_ends_when_told(folder, tmp_path):
    command = [sys.executable, ROOT / "serve.py", "--model", folder / "one", "--model", folder / "two", "--port", "0"]
    command += ["--feedback", tmp_path / "f.db", "--slots", "2"]
    log = open(tmp_path / "log", "w")
    with log, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process:
        try:
            url = re.search(r"loading one, two for (http://localhost:\d+)", process.stdout.readline())[1]
            with httpx2.Client(base_url=url, timeout=60) as http:
                assert http.get("/health").status_code in (200, 503)  # answers while it loads
                assert process.stdout.readline().startswith(f"ready: one, two on {url} (chat page")
                assert process.stdout.readline().startswith(f"  curl {url}/v1/chat/completions")
                assert http.get("/health").status_code == 200
                (a, _), _ = stored(http)
                vote(http, "thumb", "up", a)
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) in (0, -signal.SIGTERM)  # nothing is under way: --drain's 30 s are not waited for
        finally:
            process.kill()
    assert len(select(tmp_path / "f.db", "SELECT * FROM feedback")) == 1


def test_a_model_that_cannot_be_loaded_ends_the_command(folder, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (folder / "one").iterdir():
        (broken / file.name).write_bytes(file.read_bytes()[: 500 if file.suffix == ".safetensors" else None])
    with pytest.raises(ValueError, match="truncated"):
        serve.main(serve.Config(model=((str(broken),),), port=0, feedback=tmp_path / "f.db"))


# ---- quantised models


@pytest.fixture(scope="module")
def heldout(words, tmp_path_factory):
    """Demonstrations of random words, one of them too long for the models."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("heldout") / "demos.jsonl"
    texts = [" ".join(rng.choice(list("abcdefgh"), 9)) for _ in range(20)] + ["a " * 90]
    path.write_text("".join(json.dumps({"prompt": text, "completion": text[::-1]}) + "\n" for text in texts))
    return str(path)


def loaded(folder, **options):
    """A served model as the engine's thread loads it, its weights not chosen yet."""
    model = serve.Served("one", str(folder / "one"), serve.Config(slots=4, context=16, **options))
    gpt.start()
    model.load()
    return model


@pytest.fixture(scope="module")
def measured(folder, heldout):
    return loaded(folder, quality=heldout)


@contextlib.contextmanager
def compressed(model, how):
    """The model with its weights in this form, steps being taken by the test."""
    before = model.config, model.model
    model.config = serve.dataclasses.replace(model.config, quantize=how, max_kl=9.0)
    model.steps = dict.fromkeys((*model.groups, model.slots), 8)
    model.compress()
    yield model
    model.config, model.model = before


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_what_is_measured_is_what_generate_would_be(measured, folder, heldout, how):
    dense, tokenizer = gpt.load(folder / "one")
    rows = [gpt.encode_row(row, "demos", tokenizer, 16)[0] for _, row in gpt.read_rows(heldout, "demos")
            if len(row["prompt"]) < 90]  # fmt: skip
    tokens, mask = (np.array(x, np.int32) for x in zip(*rows))
    wanted = serve.quality(
        dense, serve.quantize(dense, how), [dict(tokens=tokens, segments=np.ones_like(tokens), mask=mask)]
    )
    first, *others = measured.candidates
    found = next(c for c in others if c.how == how)
    assert found[2:5] == pytest.approx((wanted["kl"], wanted["top1"], wanted["perplexity_quantised"]), rel=0.02)
    assert first[:2] == ("none", serve.size_in_bytes(dense) / 1e6) and found.megabytes < first.megabytes
    assert first[2:5] == pytest.approx((0, 1, wanted["perplexity"]), rel=1e-4, abs=1e-6) and found.speed > 0
    lines = serve.quality_table([measured], max_kl=found.kl * 0.99).splitlines()
    accepted = {line.split()[1]: line.split()[-1] for line in lines[1:]}
    assert accepted["none"] == "yes" and accepted[how] == "no" and len(lines) == 4


@pytest.mark.parametrize("how", ["int8", "int4"])
def test_greedy_answers_of_quantised_weights_are_those_of_generate(measured, folder, how):
    dense, tokenizer = gpt.load(folder / "one")
    prompts = np.array([tokenizer.encode(text) for text in ("a b c", "d e f", "h g b", "yes no a")])
    greedy = partial(gpt.generate, ends=tokenizer.end_ids, temperature=0)
    out = greedy(serve.quantize(dense, how), prompts, np.ones_like(prompts), jax.random.key(0), 12)
    choices = [serve.Choice(i, ids.tolist(), 12, None, np.inf, temperature=0.0) for i, ids in enumerate(prompts)]
    with compressed(measured, how) as model:
        model.waiting.extend(choices)
        while model.busy:
            model.step(lambda delta: None)
        assert serve.describe(model)["quantization"] == how
        assert model.model is None  # the full weights are freed
        assert model.caches[0][0].dtype == jnp.float16  # half the memory of the full weights' keys and values
    for choice, tokens, mask in zip(choices, out.tokens, out.mask):
        assert choice.ids_drawn == tokens[mask > 0].tolist()


def test_forms_are_timed_at_the_work_of_requests(folder, heldout, monkeypatch):
    """Slots that are half full, in the caches that the form will have, and the reading of prompts."""
    steps, reads = [], []
    decode, read = serve.Served.decode, serve.Served.read

    def record_step(self, rows, some, n):
        steps.append((self.caches[0][0].dtype.name, *np.unique(some.position)))
        return decode(self, rows, some, n)

    def record_read(self, pieces, *args):
        reads.append((self.caches[0][0].dtype.name, len(pieces[0][0]), pieces[0][3]))
        return read(self, pieces, *args)

    monkeypatch.setattr(serve.Served, "decode", record_step)
    monkeypatch.setattr(serve.Served, "read", record_read)
    monkeypatch.setattr(serve, "fastest", lambda call: (call(), 0.5)[1])
    model = loaded(folder, quality=heldout, quantize="int8")
    assert steps == [("float32", 8), ("float16", 8)] and reads == [("float32", 16, 0), ("float16", 16, 0)]
    assert model.candidates[0].speed == pytest.approx(4 * 64 / (4 * 0.5 + 64 * 0.5 / serve.MOST_STEPS))


@pytest.fixture
def timed(monkeypatch):
    """Seconds that it takes to draw a token: forms of the weights, in their order, take these."""
    seconds = []
    monkeypatch.setattr(serve.Served, "step_seconds", lambda self, n, held=0: seconds.pop(0) if seconds else 0.1)
    monkeypatch.setattr(serve.Served, "read_seconds", lambda self: 0.1)
    return seconds


def test_auto_takes_the_fastest_that_is_near_enough(folder, heldout, timed):
    timed += [1.0, 0.2, 0.1]  # none, int8, int4
    model = loaded(folder, quantize="auto", quality=heldout)
    _, int8, int4 = model.candidates
    assert int8.kl < int4.kl / 2
    model.config = serve.dataclasses.replace(model.config, max_kl=int4.kl / 2)
    model.compress()
    assert model.quantization == "int8"
    assert serve.choose(model.candidates, "auto", int4.kl) == "int4"
    assert serve.choose(model.candidates, "auto", int8.kl * 0.99) == "none"
    with pytest.raises(ValueError, match="int4 is .* nats a token away .* --max-kl"):
        serve.choose(model.candidates, "int4", int4.kl / 2)


def test_only_the_form_that_is_asked_for_is_measured_and_one_that_is_not_is_named(folder, heldout, timed, caplog):
    model = loaded(folder, quantize="int8", quality=heldout, max_kl=9.0)
    assert [c.how for c in model.candidates] == ["none", "int8"]
    model.compress()
    assert "unmeasured" not in caplog.text
    model = loaded(folder, quantize="int8")
    model.compress()
    assert "one: int8 is unmeasured: --quality FILE" in caplog.text


def test_quantised_weights_that_are_too_far_off_are_not_served(folder, heldout, tmp_path, capsys, timed):
    options = dict(port=0, feedback=tmp_path / "f.db", model=((str(folder / "one"),),), slots=2)
    with pytest.raises(ValueError, match=r"--quantize int4 is [\d.]+ nats .* perplexity"):
        serve.main(serve.Config(quantize="int4", quality=heldout, max_kl=1e-6, **options))
    assert "KL/token" in capsys.readouterr().out
    with pytest.raises(ValueError, match="auto needs --quality FILE"):
        serve.main(serve.Config(quantize="auto", **options))
    with pytest.raises(FileNotFoundError, match="no data file"):
        serve.main(serve.Config(quality=str(tmp_path / "none.jsonl"), **options))


def test_the_server_judges_for_rlaif_as_the_model_itself_does(live, folder, tmp_path, monkeypatch):
    """P(option) through /v1/completions and its log-probs equal those of the same folder, read in process."""
    monkeypatch.setattr(rlaif, "RETRIES", 0)
    config = rlaif.Config(judge=live.url + "/v1/completions", judge_model="one", out=tmp_path, batch_size=8)
    texts = [f"Human: {x} {y} Assistant:" for x in "abcdefgh" for y in "abcd"]
    options = [" a", " b", " c", " d"]
    found = rlaif.open_judge(config).choose(texts, options)
    expected = rlaif.open_judge(dataclasses.replace(config, judge=str(folder / "one"))).choose(texts, options)
    told = np.isfinite(found).all(1) & (found.max(1) < 1)  # certain: it chose later than with its first word
    assert told.sum() >= 8
    np.testing.assert_allclose(found[told], expected[told], atol=2e-4)
