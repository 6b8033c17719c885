"""probe.py: the closed form, leave-one-out without leakage, and the folder that other scripts read."""

import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpt
import grpo
import ppo
import probe
import reward

RNG = np.random.default_rng(0)


def ridge_fit(x, y, weight, ridge):
    return np.linalg.solve((x.T * weight) @ x + ridge * np.eye(x.shape[1]), (x.T * weight) @ y)


@pytest.mark.parametrize("rows, width", [(24, 5), (12, 30)])  # more rows than features, and fewer
def test_leaving_out_is_a_fit_without_the_group(rows, width):
    x, y, weight = RNG.normal(size=(rows, width)), RNG.choice([-1.0, 1.0], rows), RNG.uniform(0.5, 2, rows)
    groups, ridges = np.array([0, 0, 0, 1, 1, *range(2, rows - 3)]), (0.3, 20.0)
    found = probe.leave_out(x, y, weight, groups, ridges)
    for ridge, said in zip(ridges, found):
        for group in np.unique(groups):
            rest, own = groups != group, groups == group
            w = ridge_fit(x[rest], y[rest], weight[rest], ridge)
            np.testing.assert_allclose(said[own], x[own] @ w, rtol=1e-6)


def test_labels_that_are_noise_are_a_coin_to_pairs_left_out():
    """A fit sees through its own 60 pairs with 200 features; equal prompts that are not kept together leak."""
    x = np.repeat(RNG.normal(size=(30, 200)), 2, 0) + 0.05 * RNG.normal(size=(60, 200))
    y, groups = np.repeat(RNG.choice([-1.0, 1.0], 30), 2), np.repeat(np.arange(30), 2)
    right = lambda groups: np.mean(probe.leave_out(x, y, np.ones(60), groups, (1.0,))[0] * y > 0)
    assert right(groups) < 0.75 and right(np.arange(60)) > 0.95


def test_the_best_layer_and_pooling_are_found_and_the_head_is_the_closed_form():
    truth = RNG.normal(size=8)
    features = RNG.normal(size=(400, 3, 2, 8)) * np.arange(1, 9)  # of unlike scales
    y = np.sign(features[:, 1, 1] @ (truth / np.arange(1, 9)) + 0.5 * RNG.normal(size=400))
    weight = np.ones(400)
    head, chosen = probe.fit_probe(features.astype(np.float16), y, weight, np.arange(400))
    assert (chosen["layer"], chosen["pool"]) == (2, "answer") and chosen["accuracy"] > 0.85
    assert [row["layer"] for row in chosen["layers"]] == [1, 2, 3]
    x = features[:, 1, 1].astype(np.float16).astype(float)
    scale = np.sqrt((x**2).mean(0))
    np.testing.assert_allclose(head, ridge_fit(x / scale, y, weight, chosen["ridge"] * 400) / scale, rtol=1e-3)
    # which of the two answers stands first tells nothing
    swapped = np.where(np.arange(400) % 2, -1, 1)
    again, _ = probe.fit_probe(features * swapped[:, None, None, None], y * swapped, weight, np.arange(400))
    np.testing.assert_allclose(again, head, rtol=1e-2, atol=1e-3 * abs(head).max())


def test_a_dialogue_is_kept_together():
    found = probe.dialogues([(1, 2), (7,), (1, 2, 3), (1, 2), (1, 5), (1, 2, 3, 4)])
    assert found[0] == found[2] == found[3] == found[5] and len(set(found)) == 3


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, words):
    """A random model with a probe on 60 pairs whose chosen answer begins with `yes`."""
    folder = tmp_path_factory.mktemp("probe")
    tokenizer = gpt.load_tokenizer(words)
    model = gpt.init(gpt.make_config(tokenizer.vocab_size, context=32, layers=3, heads=2, dim=16), jax.random.key(0))
    gpt.save(folder / "base", model, tokenizer)
    for name, count in (("pairs", 60), ("pairs-heldout", 16)):
        pick = lambda: " ".join(RNG.choice(list("abcdefgh"), 3))
        rows = [{"prompt": f"{pick()}", "chosen": f" yes {pick()}", "rejected": f" no {pick()}"} for _ in range(count)]
        gpt.write_rows(folder / f"{name}.jsonl", rows)
    data = dict(data=(str(folder / "pairs.jsonl"),), length=16, dtype="float32")
    config = probe.Config(
        init=str(folder / "base"), out=folder / "out", suffix="", batch_size=20, normalize_with=None, **data
    )
    probe.main(config)
    reward.main(reward.Config(report=str(folder / "out"), gold=None, **data))
    return folder, config, tokenizer


def test_a_probe_is_a_reward_model_of_fewer_layers_that_every_script_reads(fitted, capsys):
    folder, config, tokenizer = fitted
    report, chosen = (json.loads((folder / "out" / name).read_text()) for name in ("report.json", "probe.json"))
    assert report["accuracy"] == 1 and chosen["accuracy"] > 0.95
    model = gpt.load_reward_model(folder / "out", tokenizer, config.init, "float32")
    assert (model.pool, model.body.config.layers) == (chosen["pool"], chosen["layer"])
    # the same score of a sampled response, padded on the left and right, as of a row of a pair
    prompt, answer = tokenizer.encode("a b"), [*tokenizer.encode("yes c"), tokenizer.eos_id]
    pad = lambda ids, left, right: jnp.asarray([[0] * left + ids + [0] * right])
    ones = lambda ids: [1] * len(ids)
    sampled = gpt.score(model, pad(prompt, 2, 0), pad(ones(prompt), 2, 0), pad(answer, 0, 3), pad(ones(answer), 0, 3),
                        tokenizer.end_ids)  # fmt: skip
    row = prompt + answer
    whole = model(pad(row, 0, 1), pad(ones(row), 0, 1), answer=pad([0] * len(prompt) + ones(answer), 0, 1))
    np.testing.assert_allclose(sampled, whole, rtol=1e-4)


@pytest.mark.parametrize("pool, suffix", [("answer", ()), ("last", ()), ("last", (9, 4))])
def test_score_and_states_of_the_reference_come_of_one_pass(fitted, pool, suffix):
    """Two prompts, one of them of one token, with three answers each: one that ends, one that is cut off, one of a
    token alone."""
    folder, config, tokenizer = fitted
    (ref, _), P, K, T = gpt.load_policy(config.init), 2, 3, 4
    model = replace(gpt.load(folder / "out")[0], pool=pool, suffix=suffix)
    rng = np.random.default_rng(1)
    prompts, mask = rng.integers(3, 12, (P, 5)), np.ones((P, 5), int)
    prompts[1, :4], mask[1, :4] = tokenizer.pad_id, 0
    responses, ended = rng.integers(3, 12, (P * K, T)), tokenizer.eos_id
    real = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]] * P)
    responses[::3, 2], responses[2::3, 0] = ended, ended
    repeat = lambda x: jnp.repeat(jnp.asarray(x), K, axis=0)
    wanted = gpt.score(model, repeat(prompts), repeat(mask), responses, real, tokenizer.end_ids)
    rollout = grpo.Rollout(*map(jnp.asarray, (prompts, mask, responses.reshape(P, K, T), real.reshape(P, K, T))), 0, 0)
    _, states = grpo.response_states(ref, rollout, grpo.Config(dtype="float32"))
    reward_model = gpt.attach_reward(gpt.Reward([model], None, ref), None).models[0]
    assert reward_model.body.blocks is None  # its layers are the reference's
    for chunks in (1, 2):
        inputs = map(jnp.asarray, (prompts, mask, responses, real))
        scores, hidden = gpt.score_by_reference(reward_model, ref, *inputs, tokenizer.end_ids, chunks)
        np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-5)
        seen = real[:, :, None] > 0
        np.testing.assert_allclose(jnp.where(seen, hidden, 0), jnp.where(seen, states, 0), rtol=1e-4, atol=1e-5)


def test_only_a_probe_of_the_reference_shares_its_pass(fitted):
    folder, config, _ = fitted
    (ref, _), (model, _) = gpt.load_policy(config.init), gpt.load(folder / "out")
    assert gpt.is_beginning(model, ref)
    for other in (dict(known_ids=9), dict(tied=False)):  # which tell logits, and no states
        assert gpt.is_beginning(model, replace(ref, config=replace(ref.config, **other)))
    assert not gpt.is_beginning(replace(model, pool="mean"), ref)  # which reads the prompt, too
    assert not gpt.is_beginning(model, replace(ref, wte=ref.wte.at[0, 0].add(1e-3)))
    longer = replace(ref.blocks.q, weight=ref.blocks.q.weight.at[0].multiply(1.01))
    assert not gpt.is_beginning(model, replace(ref, blocks=replace(ref.blocks, q=longer)))


def test_a_suffix_beyond_the_learned_positions_is_refused():
    ref = gpt.init(gpt.make_config(12, context=8, layers=1, heads=1, dim=8, family="gpt2"), jax.random.key(0))
    model = gpt.init_score_model(ref, jax.random.key(1), suffix=(9, 4))
    ones = jnp.ones((2, 4), int)
    assert gpt.is_beginning(model, ref)
    with pytest.raises(ValueError, match="rows of 10 tokens > the 8 positions"):
        gpt.score_by_reference(model, ref, ones, ones, ones, ones, (0,))


@pytest.mark.parametrize("script, rank", [(ppo, 0), (grpo, 2)])
def test_learning_from_a_probe_of_the_reference_asks_no_second_model(fitted, monkeypatch, capsys, script, rank):
    """The same run with the pass that the reference makes anyway, and with the probe as a model of its own."""
    folder, config, tokenizer = fitted
    gpt.write_rows(folder / "prompts.jsonl", [{"prompt": f"{a} {b}"} for a in "abcd" for b in "efgh"])
    options = dict(
        init=config.init, reward=(str(folder / "out"),), data=(str(folder / "prompts.jsonl"),), steps=2, batch_size=8,
        minibatch_size=4, micro_batches=1, response_length=3, lora_rank=rank, gold=None, dtype="float32",
        overwrite=True,
    )  # fmt: skip
    options |= {"group_size": 2} if script is grpo else {}
    out = folder / script.__name__
    run = lambda: (
        script.main(script.Config(out=out, **options))
        or [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    )
    monkeypatch.setattr(gpt, "is_beginning", lambda model, ref: False)
    apart = run()
    monkeypatch.undo()
    monkeypatch.setattr(gpt, "score", None)
    together = run()
    assert "it costs no forward pass of its own" in capsys.readouterr().out
    for name in ("objective/scores", "objective/scores_std", "objective/kl_exact", "loss", "grad_norm"):
        for one, two in zip(apart, together):
            np.testing.assert_allclose(two[name], one[name], rtol=2e-3, atol=2e-5, err_msg=name)


def test_pairs_that_weigh_nothing_say_nothing(fitted, tmp_path):
    folder, config, _ = fitted
    rows = [row for _, row in gpt.read_rows(folder / "pairs.jsonl", "pairs")]
    wrong = [row | {"chosen": row["rejected"], "rejected": row["chosen"], "weight": 0} for row in rows[:40]]
    gpt.write_rows(tmp_path / "mixed.jsonl", rows + wrong)
    config = replace(config, data=(str(tmp_path / "mixed.jsonl"),), out=tmp_path / "out")
    probe.main(config)
    assert json.loads((config.out / "probe.json").read_text())["accuracy"] > 0.95
    gpt.write_rows(tmp_path / "mute.jsonl", [row | {"label_p": 0.5} for row in rows])
    with pytest.raises(ValueError, match="no pair says which answer is better"):
        probe.main(replace(config, data=(str(tmp_path / "mute.jsonl"),), out=tmp_path / "mute"))
    assert not (tmp_path / "mute" / "model.safetensors").exists()


def test_features_are_what_the_model_says_and_are_computed_once(fitted, monkeypatch):
    folder, config, tokenizer = fitted
    features = np.load(folder / "out" / "features" / "pairs.npy")
    pairs = partial(gpt.Batches, config.data, "pairs", tokenizer, config.batch_size, config.length, config.seed)
    batch, (body, _) = pairs(forked=True)(0), gpt.load_policy(config.init)
    for pool, name in enumerate(probe.POOLS):
        for unit in (0, 9):  # a head that reads one feature of the last layer
            model = gpt.ScoreModel(body, jnp.eye(16)[unit], None, jnp.zeros(()), name)
            scores = reward.pair_scores(model, gpt.put_batch(batch))
            np.testing.assert_allclose(features[:20, 2, pool, unit], scores[:, 0] - scores[:, 1], atol=2e-3)
    monkeypatch.setattr(probe, "layer_features", None)
    probe.main(replace(config, overwrite=True))


def test_beside_the_rule_that_the_longer_answer_wins():
    """10 pairs: the rule is right in 6, the model in 7; each alone in 1 and 2."""
    longer_by = np.array([5, 5, 5, 5, 5, 5, -5, -5, -5, -5, 0])
    gaps = np.array([1, 1, 1, 1, 1, -1, 1, 1, -1, -1, 1.0])
    found = reward.compare_with_length(gaps, longer_by)
    assert (found["accuracy"], found["longer_wins"]) == (0.7, 0.6)
    assert (found["only_model_right"], found["only_longer_right"]) == (2, 1)
    assert found["p"] == 1.0 and found["balanced"] == pytest.approx((5 / 6 + 2 / 4) / 2)
    assert reward.compare_with_length(longer_by.astype(float), longer_by)["balanced"] == 0.5
    many = reward.compare_with_length(np.repeat([1.0, 1.0], [10, 9]), np.repeat([5, -5], [10, 9]))
    assert many["p"] == pytest.approx(2 / 2**9)  # nine of nine
    assert reward.compare_with_length(np.ones(3), np.ones(3)) is None


@pytest.mark.parametrize(
    ("accuracy", "interval", "temperature", "said"),
    [(0.75, [0.47, 0.91], 1.0, "NOT TOLD FROM A COIN"), (0.5, [0.44, 0.56], 1.0, "NO BETTER THAN A COIN"),
     (0.7, [0.6, 0.8], reward.MAX_TEMPERATURE, "NO BETTER THAN A COIN"), (0.7, [0.6, 0.8], 1.0, None)],
)  # fmt: skip
def test_few_pairs_are_no_verdict_on_a_reward_model(capsys, accuracy, interval, temperature, said):
    result = {"accuracy": accuracy, "accuracy_interval": interval, "temperature": temperature, "pairs": 12}
    reward.print_report(result | {"longer_wins": 0.5, "beside_length": None, "before": {}, "after": {}})
    out = capsys.readouterr().out
    assert [text for text in ("NOT TOLD FROM A COIN", "NO BETTER THAN A COIN") if text in out] == [said] * bool(said)


def test_beside_what_the_frozen_model_finds_likely(fitted):
    """Three rules by hand; and in a run's report, answer by answer."""
    logprobs = np.array([[-4.0, -6], [-9, -6], [-5, -4], [-3, -8], [-6, -6]])
    tokens, gaps = np.array([[4, 2], [9, 3], [5, 2], [3, 2], [6, 6]]), np.array([1, 1, -1, 1, 1.0])
    found = reward.compare_with_likelihood(gaps, logprobs, tokens, tokens[:, 0] - tokens[:, 1])
    assert found["sum"]["accuracy"] == 0.4 and found["mean"]["accuracy"] == 0.8  # a tie is an error
    assert (found["sum"]["only_model_right"], found["sum"]["only_rule_right"]) == (2, 0)
    assert (found["mean"]["only_model_right"], found["mean"]["only_rule_right"]) == (1, 1)
    assert found["sum"]["p"] == 0.5 and found["mean"]["p"] == 1
    assert found["sum"]["balanced"] is None  # no chosen answer is the shorter one

    folder, config, tokenizer = fitted
    said = json.loads((folder / "out" / "report.json").read_text())["beside_likelihood"]
    model, rows = gpt.load(config.init)[0], [row for _, row in gpt.read_rows(folder / "pairs-heldout.jsonl", "pairs")]
    right = []
    for row in rows:
        prompt, sides = tokenizer.encode(row["prompt"]), []
        for side in ("chosen", "rejected"):
            answer = [*tokenizer.encode(row[side]), tokenizer.eos_id]
            logprobs = gpt.token_logprobs(model, jnp.asarray([prompt + answer]))[0, len(prompt) - 1 :]
            sides.append((logprobs.sum(), logprobs.mean()))
        right.append([chosen > rejected for chosen, rejected in zip(*sides)])
    np.testing.assert_allclose([said[name]["accuracy"] for name in ("sum", "mean")], np.mean(right, 0))
