"""tools/bench.py: it runs, its formulas, and the talk with a peer, played here by a script of a few lines."""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt
import serve
import toy
from tools import bench

PEER = """
import json, sys
work = json.loads(sys.argv[1])
assert {"work", "shape", "rows", "tokens"} <= work.keys()
print(json.dumps({"versions": {"fake": "1.0"}}), flush=True)
for line in sys.stdin:
    print(json.dumps({"seconds": 100.0, "peak": 5_000_000}), flush=True)
"""


@pytest.fixture(autouse=True)
def same_mesh():
    before = jax.sharding.get_mesh()
    yield
    jax.set_mesh(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("toy")
    toy.main(toy.Config(out=out, base=200, demos=20, pairs=80, thumbs=20, prompts=20, heldout=20))
    return out


def measure(folder: Path, *only, **options) -> dict:
    bench.main(bench.Config(only=only, repeats=2, quick=True, out=folder / "bench.json", **options))
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


def test_grpo_beside_a_peer(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text(PEER)
    monkeypatch.setattr(bench, "PEERS", tmp_path / "peer.py")
    rows = measure(tmp_path, "grpo", dpo_peers=Path(sys.executable))
    whole = {name: row for name, row in rows.items() if "iteration" in name}
    assert len(whole) == 2 and all(row["times_peer"] > 10 and row["peer_memory"] == 5e6 for row in whole.values())
    parts = [row for name, row in rows.items() if any(part in name for part in ("rollout", "scoring", "update"))]
    assert len(parts) == 6 and all(row["seconds"]["min"] > 0 for row in parts)


def test_the_data_section_counts_rows_and_padding(data, tmp_path):
    files = tuple(str(data / f"{name}.jsonl") for name in ("pairs", "base"))
    rows = measure(tmp_path, "data", data=files, tokenizer=str(data), batch_size=8)
    assert all(row["rate"] > 0 and row["seconds"]["min"] > 0 for row in rows.values() if "rate" in row)
    waste = {name: row["padding"] for name, row in rows.items() if "padding" in row}
    assert 0 < waste["base.jsonl: padding"] < waste["pairs.jsonl: padding"] < 1  # text is packed


def test_padding_waste_is_what_a_count_gives(words, tmp_path):
    texts = ["a", "a b c", "a b c d e f g"]  # 2, 4 and 8 tokens with EOS
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    batches = gpt.Batches(str(tmp_path / "text.jsonl"), "text", gpt.load_tokenizer(words), 1, 8, 0)
    assert bench.padding_waste(batches) == pytest.approx(1 - (2 + 4 + 8) / (batches.steps_per_epoch * 8))


def test_ours_and_the_peer_take_turns(tmp_path, monkeypatch):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    monkeypatch.setattr(bench, "PEERS", peer)
    rows = measure(tmp_path, "ppo", trl_peers=Path(sys.executable))
    row = next(row for name, row in rows.items() if name.startswith("PPO iteration"))
    assert row["peer_seconds"]["all"] == [100.0, 100.0]
    assert row["times_peer"] == pytest.approx(100 / row["seconds"]["median"])
    parts = [rows[f"PPO {part}, toy GPT-2, 8 x (8 + 8) tokens"] for part in ("rollout", "scoring", "update")]
    parts = [part["seconds"]["all"] for part in parts]
    np.testing.assert_allclose(np.sum(parts, 0), row["seconds"]["all"])
    assert row["peer"] == {"fake": "1.0"}
    large = next(row for name, row in rows.items() if name.startswith("PPO, adapters, iteration, GPT-2 1.5B"))
    assert large["rate"] > 0 and "peer_seconds" not in large


def test_the_server_under_load_and_its_engine_beside_a_peer(data, tmp_path, monkeypatch):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    monkeypatch.setattr(bench, "PEERS", peer)
    rows = measure(tmp_path, "serve", tokenizer=str(data), peers=Path(sys.executable))
    served = {name: row for name, row in rows.items() if name.startswith("serve toy")}
    assert len(served) == 2 and all(row["rate"] > 0 and row["seconds"]["min"] > 0 for row in served.values())
    assert [name.split(": ")[1] for name in served] == ["whole", "first text"]
    engine = rows["serve GPT-2 124M, engine, 16 x (4 + 4) tokens"]
    assert engine["times_peer"] == pytest.approx(100 / engine["seconds"]["median"])
    assert rows["serve GPT-2 124M, int8, engine, 1 x (4 + 4) tokens"]["rate"] > 0


def test_a_decoded_token_reads_the_weights_and_the_cache():
    shape = gpt.make_config(64, 32, 2, 2, 16, "gpt2")
    model = gpt.init(shape, jax.random.key(0))
    weights = 4 * (gpt.count_parameters(model) - model.wpe.size)
    assert bench.decoded_bytes(model, 3, 10) == weights + 3 * 10 * (2 * 2 * 16 * 4)
    small = serve.quantize(model, "int8")
    assert bench.decoded_bytes(small, 0, 0) == serve.size_in_bytes(small) - 4 * model.wpe.size


def test_a_dpo_step_both_ways_beside_its_peer_with_memory(tmp_path, monkeypatch):
    peer = tmp_path / "peer.py"
    peer.write_text(PEER)
    monkeypatch.setattr(bench, "PEERS", peer)
    rows = [row for name, row in measure(tmp_path, "dpo", dpo_peers=Path(sys.executable)).items() if "DPO" in name]
    assert [row["name"].split(", ")[-1] for row in rows] == ["as TRL does it", "reference precomputed"] * 2
    for row in rows:
        assert row["times_peer"] == pytest.approx(100 / row["seconds"]["median"])
        assert row["memory"] > 0 and row["peer_memory"] == 5_000_000 and row["share_of_bound"] > 0
    assert rows[1]["memory"] < rows[0]["memory"]  # no reference, shorter rows


def test_forked_pairs_are_the_same_pairs_and_less_work():
    shape = bench.shapes(quick=True)["toy GPT-2"]
    model = gpt.init(shape, jax.random.key(0))
    whole, shared = (bench.random_pairs(shape, 4, 8, 6, s) for s in (False, True))
    np.testing.assert_allclose(*(gpt.completion_logprobs(model, b)[0] for b in (whole, shared)), rtol=1e-5)
    weights, head, scores = bench.multiplied_weights(model), model.wte.size, 12 * shape.layers * shape.dim
    tokens = 4 * (7 + 2 * 7)  # the prompt but its last token, and twice that token and an answer
    body = 6 * (weights - head) * tokens + 6 * head * 4 * 2 * 6
    attention = scores * 4 * (7 * 7 + 2 * 7 * (7 + 7))
    assert bench.pair_flops(model, shared, shared=True) == body + attention
    assert bench.pair_flops(model, whole, shared=False) == bench.training_flops(model, 8, 14) * 4 / 3


def test_adapters_on_one_base_hold_less_than_four_models():
    shape, config = gpt.make_config(64, 32, 1, 2, 128, "gpt2"), bench.Config(dtype="float32")
    weights = 4 * gpt.count_parameters(jax.eval_shape(partial(gpt.init, shape), jax.random.key(0)))
    start, *_ = bench.ppo_parts(shape, bench.ppo_config(config, False, 8, 8, 8))
    four = bench.size_in_bytes(jax.eval_shape(start, jax.random.key(0)))
    assert four == pytest.approx((2 * 3 + 2) * weights, rel=0.01)  # two learn, with two moments each; two are frozen
    adapters = bench.ppo_memory(shape, bench.ppo_config(config, True, 8, 8, 8))
    assert weights < adapters["resident"] < adapters["peak"] < 0.7 * four
    added = [adapters[name] for name in ("sample", "score", "estimate", "critic_step", "policy_step")]
    assert adapters["peak"] == adapters["resident"] + max(added)


def test_a_peer_that_stops_is_named(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("raise SystemExit('no torch here')")
    monkeypatch.setattr(bench, "PEERS", tmp_path / "peer.py")
    config = bench.Config(out=tmp_path / "bench.json")
    with (
        pytest.raises(ValueError, match="the peer stopped"),
        bench.start_peer(Path(sys.executable), config, "train", bench.shapes(quick=True)["toy GPT-2"], 4, 16),
    ):
        pass
    assert "no torch here" in (tmp_path / "peers.log").read_text()


def test_missing_data_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no gone.jsonl: `python toy.py` makes"):
        bench.main(bench.Config(only=("data",), data=("gone.jsonl",), out=tmp_path / "bench.json"))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_flops_of_a_training_step_are_those_of_its_matrix_products(family):
    """(n, i) by (i, o) is 2 n i o FLOPs forwards and twice that backwards; norms and biases add little."""
    rows, tokens, vocab, dim, layers = 2, 8, 64, 16, 3
    shape = gpt.make_config(vocab, 32, layers, 2, dim, family)
    model = gpt.init(shape, jax.random.key(0))
    mlp = (2 if family == "gpt2" else 3) * dim * shape.ffn
    weights = layers * (4 * dim * dim + mlp) + dim * vocab
    scores = layers * 2 * tokens * dim  # q k' and p v: a row of scores and a sum over a row, for each token
    products = 3 * 2 * rows * tokens * (weights + scores)
    vectors = bench.multiplied_weights(model) - weights
    assert 0 < vectors < 0.1 * weights
    assert bench.training_flops(model, rows, tokens) == products + 6 * rows * tokens * vectors


def test_the_copy_that_is_timed_reads_and_writes_once():
    buffers = jnp.zeros(2**12), jnp.ones(2**12)
    program = bench.copy_once.lower(*buffers).compile()
    assert " copy(" not in program.as_text() and program.memory_analysis().temp_size_in_bytes == 0
    source, target = bench.copy_once(*buffers)
    assert not source.any() and (target == 1).all()
