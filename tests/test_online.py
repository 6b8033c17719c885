"""online.py: its loss by hand, its choice of pairs, and whole runs on a tiny policy by each kind of labeller."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_preferences
import test_training
from test_preferences import CLOSE, by_brute_force, sigmoid, without_clock
from test_training import Spy, leaves, log, same

import dpo
import gpt
import online

compile_once, world_of_pairs = test_training.compile_once, test_preferences.world

LABELLERS = '''
import signal

calls, judged = 0, []


def likes(text):
    return text.split().count("yes") - text.split().count("no")


def yes(prompts, responses, rows):
    """How often a response says yes, less often how often it says no."""
    assert prompts == [row["prompt"] for row in rows] and all("id" in row for row in rows)
    return [likes(r) + 0.01 * len(r.split()) for r in responses]


def yes_and_stop(prompts, responses, rows):
    """The same, and in the second iteration somebody asks the run to stop."""
    global calls
    calls += 1
    if calls == 2:
        signal.raise_signal(signal.SIGTERM)
    return yes(prompts, responses, rows)


def equal(prompts, responses, rows):
    return [0.0] * len(responses)


def prefers_yes(prompts, a, b, rows):
    """P(a is better) by the same taste, without a verdict where a begins with c."""
    assert prompts == [row["prompt"] for row in rows] and len(a) == len(b) == len(rows)
    p = [float("nan") if x.split()[0] == "c" else min(max(0.5 + (likes(x) - likes(y)) / 4, 0), 1) for x, y in zip(a, b)]
    judged.extend(zip(a, b, p))
    return p


def two(prompts, a, b, rows):
    return [2.0] * len(a)
'''


@pytest.fixture(scope="module")
def world(world_of_pairs):
    (world_of_pairs.root / "my_labels.py").write_text(LABELLERS)
    return world_of_pairs


def settings(world, name, **options) -> online.Config:
    plan = dict(
        init=world.sft, data=(world.prompts,), out=world.root / name, reward="my_labels:yes", steps=3, batch_size=32,
        minibatch_size=16, candidates=6, prompt_length=6, response_length=10, beta=0.5, lr=1e-2, warmup=1, gold=None,
        dtype="float32", save_every=100,
    )  # fmt: skip
    return online.Config(**plan | options)


# ---------------------------------------------------------------------------------------------------- the loss


def test_soft_dpo_by_hand():
    logprobs, ref = jnp.array([[-1.0, -2.0], [-3.0, -3.0]]), jnp.array([[-2.0, -1.5], [-3.0, -3.0]])
    loss = lambda p, weight: online.soft_dpo_loss(logprobs, ref, jnp.array(p), jnp.array(weight), 0.5)
    # h = 1 + 0.5 = 1.5, beta h = 0.75: 0.8 log(1 + e^-0.75) + 0.2 log(1 + e^0.75) = 0.536871
    value, metrics = loss([0.8, 0.5], [1.0, 0.0])
    np.testing.assert_allclose(value, 0.536871, **CLOSE)
    np.testing.assert_allclose(metrics["rewards/margins"], 0.75, **CLOSE)
    np.testing.assert_allclose(metrics["objective/kl"], 0.25, **CLOSE)  # mean of 1 and -0.5
    np.testing.assert_allclose(loss([0.8, 0.5], [1.0, 1.0])[0], (0.536871 + math.log(2)) / 2, **CLOSE)
    # the gradient: beta (sigmoid(beta h) - p) = 0.5 (0.679179 - 0.8) for a, the opposite for b, 0 where the weight is 0
    slope = lambda p, weight: jax.grad(lambda x: online.soft_dpo_loss(x, ref, jnp.array(p), jnp.array(weight), 0.5)[0])(
        logprobs
    )
    np.testing.assert_allclose(slope([0.8, 0.5], [1.0, 0.0]), [[-0.060411, 0.060411], [0, 0]], **CLOSE)
    # at the judge's own probability there is nothing to learn
    np.testing.assert_allclose(slope([float(sigmoid(0.75)), 0.5], [1.0, 1.0]), 0, atol=1e-6)


def test_the_loss_is_that_of_dpo_with_soft_labels():
    logprobs, ref = np.random.default_rng(0).normal(-9, 2, (2, 8, 2))
    p, weight = np.linspace(0, 1, 8), np.array([1, 1, 0, 1, 1, 0, 1, 1.0])
    losses, _ = dpo.dpo_loss(*logprobs.T, *ref.T, beta=0.3, label_p=p)
    found, _ = online.soft_dpo_loss(logprobs, ref, p, weight, 0.3)
    np.testing.assert_allclose(found, np.average(losses, weights=weight), **CLOSE)


# ---------------------------------------------------------------------------------------------------- pairs


def test_best_against_worst_among_what_is_usable():
    scores = np.array([[1, 3, 2], [5, 4, 9], [2, 2, 2], [7, 1, 3], [1, 2, 3], [1, 2, 2]], float)
    usable = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 1, 0], [0, 0, 0], [0, 1, 1]], bool)
    found = online.best_against_worst(scores.ravel(), usable.ravel(), 3)
    assert found[:2].tolist() == [[1, 0], [3 + 0, 3 + 1]]
    assert (found[2:, 0] == found[2:, 1]).all()  # equal scores, one usable answer, none, equal scores of two: no pair


@pytest.mark.parametrize(
    "ids, text, cut_too, expected",
    [
        ("a yes <eos>", "a yes", False, True),
        ("a yes", "a yes", False, False),
        ("a yes", "a yes", True, True),
        ("<eos>", "", False, False),
        ("a <pad> <eos>", "a", False, False),  # a special token that the text does not show
        ("a <pad>", "a", True, False),
        ("a yes <eos>", "a \ufffd", True, False),  # a character cut in two
    ],
)
def test_answers_that_may_be_trained_on(words, ids, text, cut_too, expected):
    tokenizer = gpt.load_tokenizer(words)
    numbers = [tokenizer.specials[w] if w in tokenizer.specials else tokenizer.encode(w)[0] for w in ids.split()]
    assert online.is_usable(np.array(numbers), text, tokenizer, cut_too) is expected
    if ids == "a <pad>":
        tokenizer.end_ids = (*tokenizer.end_ids, tokenizer.specials["<pad>"])
        assert online.is_usable(np.array(numbers), text, tokenizer, False)


def test_each_process_asks_about_its_own_pairs(monkeypatch):
    texts = [f"{x}{i}" for i in range(4) for x in "ab"]
    rollout = online.Rollout(*[None] * 4, prompts=[f"p{i // 2}" for i in range(8)], answers=texts, rows=list(range(8)))
    items, known, asked = np.arange(8).reshape(4, 2), np.array([True, False, True, True]), []

    def judge(*columns):
        asked.append(columns)
        return [0.25] * len(columns[0])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(gpt, "gather_rows", lambda own: own)
    found = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(online.ask_judge(judge, rollout, items, known))
    np.testing.assert_array_equal(np.concatenate(found), [0.25, np.nan, 0.25, 0.25])
    assert asked == [(["p0"], ["a0"], ["b0"], [0]), (["p2", "p3"], ["a2", "a3"], ["b2", "b3"], [4, 6])]


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def watched(world):
    """A run's settings, and what each of its steps was given and each of its samples gave."""
    with pytest.MonkeyPatch.context() as patch:
        steps = Spy(patch, online, "train_step", lambda state, base, ref, batch, *_: (leaves(ref), gpt.to_numpy(batch)))
        generate, answers = gpt.generate, []

        def generate_and_keep(policy, tokens, mask, *args, **options):
            out = generate(policy, tokens, mask, *args, **options)
            real = lambda tokens, mask: [tuple(t[m > 0].tolist()) for t, m in zip(np.asarray(tokens), np.asarray(mask))]
            answers.append(list(zip(real(tokens, mask), real(out.tokens, out.mask))))
            return out

        patch.setattr(gpt, "generate", generate_and_keep)
        config = settings(world, "watched")
        online.main(config)
    return config, steps.seen, answers


def pairs_of(batch):
    """[(prompt, answer a, answer b)] of a batch, in ids, where its weight is 1."""
    found = []
    for i in np.flatnonzero(batch["weight"]):
        tokens, segments, scored = (batch[name][i] for name in ("tokens", "segments", "mask"))
        a, b = (tokens[(segments == side) & (scored == 0)].tolist() for side in (2, 3))
        assert a == b and len(a) == 1  # the prompt's last token
        sides = [tuple(tokens[(segments == side) & (scored > 0)].tolist()) for side in (2, 3)]
        assert [tuple(tokens[at[at > 0]].tolist()) for at in batch["answers"][i]] == sides
        found.append(((*tokens[segments == 1].tolist(), *a), *sides))
    return found


def test_each_minibatch_is_best_against_worst_in_the_ids_that_were_sampled(world, watched):
    config, steps, answers = watched
    assert len(steps) == len(answers) == 6  # two minibatches in each of three iterations
    tokenizer = gpt.load_tokenizer(world.words)
    eos, special = tokenizer.eos_id, tokenizer.special_ids
    says = lambda ids, word: tokenizer.decode(ids).split().count(word)
    score = lambda ids: says(ids, "yes") - says(ids, "no") + 0.01 * (len(ids) - 1)
    for (ref, batch), sampled in zip(steps, answers):
        assert len(sampled) == 16 * 6
        pairs = pairs_of(batch)
        assert len(pairs) >= 4 and (batch["p"][batch["weight"] > 0] == 1).all()
        for prompt, best, worst in pairs:
            groups = [sampled[i : i + 6] for i in range(0, 96, 6)]
            group = next(g for g in groups if g[0][0] == prompt and {best, worst} <= {ids for _, ids in g})
            whole = [ids for _, ids in group if ids[-1] == eos and not special & set(ids[:-1]) and len(ids) > 1]
            assert score(best) == max(map(score, whole)) > min(map(score, whole)) == score(worst)
        assert same(ref, leaves(world.model))  # frozen


def test_logprobs_are_those_of_whole_rows(world, watched):
    batch = watched[1][0][1]
    found = jax.jit(lambda model, batch: gpt.completion_logprobs(model, batch)[0])(world.model, batch)
    for i in np.flatnonzero(batch["weight"])[:3]:
        prompt, *sides = pairs_of({name: x[i : i + 1] for name, x in batch.items()})[0]
        for side, ids in enumerate(sides):
            scored = [0] * len(prompt) + [1] * len(ids)
            np.testing.assert_allclose(
                found[i, side], by_brute_force(world.model, np.array(prompt + ids), scored), **CLOSE
            )


def test_the_policy_learns_what_scores_better(world, watched):
    config, steps, _ = watched
    metrics = log(config.out)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert all(np.isfinite(list(row.values())).all() for row in metrics)
    # the reference is the first policy: ln 2 in the first minibatch, and further away ever after
    assert metrics[0]["loss"] > 0.5 * np.log(2) and metrics[0]["usable"] == np.mean([b["weight"] for _, b in steps[:2]])
    assert metrics[2]["objective/scores"] > metrics[0]["objective/scores"] + 0.1
    final, _ = gpt.load(config.out)
    ask = jax.jit(lambda model, batch: gpt.completion_logprobs(model, batch)[0])
    batch = steps[0][1]
    h = np.asarray(ask(final, batch) - ask(world.model, batch))[batch["weight"] > 0]
    assert (h[:, 0] - h[:, 1]).mean() > 0.5  # the preferred answers became likelier beside the others
    assert (config.out / "samples.jsonl").read_text().count("\n") == 2


def test_a_run_stopped_and_resumed_is_bit_identical(world, watched):
    config = watched[0]
    with pytest.raises(SystemExit):
        online.main(settings(world, "resumed", reward="my_labels:yes_and_stop"))
    assert len(log(world.root / "resumed")) == 2
    online.main(settings(world, "resumed", resume=True))
    assert without_clock(world.root / "resumed") == without_clock(config.out)
    assert same(gpt.load(world.root / "resumed")[0], gpt.load(config.out)[0])


def test_a_judges_probabilities_are_the_labels_and_what_it_cannot_compare_counts_for_nothing(world, monkeypatch):
    steps = Spy(monkeypatch, online, "train_step", lambda state, base, ref, batch, *_: gpt.to_numpy(batch))
    config = settings(world, "judged", judge="my_labels:prefers_yes", candidates=2, steps=1, minibatch_size=None)
    online.main(replace(config, keep_truncated=True))
    (batch,) = steps.seen
    tokenizer, judged = gpt.load_tokenizer(world.words), gpt.load_function("my_labels:judged")
    sides = [[ids[at[at > 0]] for at in answers] for ids, answers in zip(batch["tokens"], batch["answers"])]
    a, b = (list(map(tokenizer.decode, side)) for side in zip(*sides))
    inside = lambda ids: ids[:-1] if tokenizer.eos_id in ids else ids
    special = lambda ids: bool(tokenizer.special_ids & set(inside(ids).tolist()))
    bad = [any(map(special, pair)) for pair in sides]
    usable = [bool(x.strip() and y.strip() and x != y and not b) for x, y, b in zip(a, b, bad)]
    assert [pair[:2] for pair in judged] == [(x, y) for x, y, good in zip(a, b, usable) if good]  # no other was asked
    verdicts = iter(judged)
    p = np.array([next(verdicts)[2] if good else np.nan for good in usable], np.float32)
    assert np.isnan(p[usable]).any() and 0 < np.isfinite(p).sum() < 32  # some pairs without a verdict
    np.testing.assert_array_equal(batch["weight"], np.isfinite(p))
    np.testing.assert_array_equal(batch["p"], np.where(np.isfinite(p), p, 0.5))
    (metrics,) = log(config.out)
    assert metrics["loss"] == pytest.approx(np.log(2), abs=1e-6) and metrics["objective/kl"] == 0
    assert metrics["usable"] == np.isfinite(p).mean()
    assert metrics["judge/sure"] == pytest.approx(np.nanmean(np.maximum(p, 1 - p)), rel=1e-6)


def test_answers_that_did_not_end_are_trained_on_without_an_end(world, monkeypatch):
    """The policy of `world` hardly ever ends within two tokens."""
    steps = Spy(monkeypatch, online, "train_step", lambda state, base, ref, batch, *_: gpt.to_numpy(batch))
    online.main(settings(world, "cut", steps=1, response_length=2, keep_truncated=True))
    eos, answers = gpt.load_tokenizer(world.words).eos_id, []
    for batch in steps.seen:
        answers += [ids for _, *sides in pairs_of(batch) for ids in sides]
    assert sum(ids[-1] != eos for ids in answers) > len(answers) / 2
    assert all(len(ids) == 2 for ids in answers if ids[-1] != eos)


def test_micro_batches_are_one_batch(world, watched):
    """Also where parts hold unequal weights."""
    batch = gpt.put_batch(watched[1][0][1] | {"weight": np.arange(16, dtype=np.float32) % 3})
    ref, results = jax.tree.map(lambda x: 0.9 * x, world.model), []
    optimizer = gpt.adamw(1e-2)
    for parts in (1, 2):
        state = online.State(jax.tree.map(jnp.array, world.model), optimizer.init(world.model))
        config = settings(world, "x", micro_batches=parts)
        results.append(online.train_step(state, None, ref, batch, optimizer, config)[1])
    one, two = (jax.tree.map(float, metrics) for metrics in results)
    assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


def test_adapters_learn_from_their_base_and_another_reference_is_taken_where_it_is_named(world, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(gpt, "load_frozen", lambda *_: pytest.fail("a second model was loaded"))
        online.main(settings(world, "adapters", steps=1, minibatch_size=32, lora_rank=2))
    (metrics,) = log(world.root / "adapters")
    assert metrics["loss"] == pytest.approx(np.log(2), rel=1e-5) and metrics["grad_norm"] > 0
    assert (world.root / "adapters" / "adapter" / "adapter.json").is_file()
    other = str(world.root / "other-reference")
    gpt.save(other, jax.tree.map(lambda x: 0.9 * x, world.model), gpt.load_tokenizer(world.words))
    online.main(settings(world, "elsewhere", ref=other, steps=1, minibatch_size=32))
    assert abs(log(world.root / "elsewhere")[0]["rewards/margins"]) > 1e-3


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reward="sft"), "is a language model, not a reward model: train one with reward.py"),
        (dict(reward="my_labels:nowhere"), "cannot load my_labels:nowhere"),
        (dict(beta=-0.1), "--beta -0.1: a price above 0"),
        (dict(gold="toy:nowhere"), "cannot load toy:nowhere .*where there is no known truth, --gold None"),
        (dict(reward="my_labels:equal"), "none of 32 prompts had.*raise --candidates"),
        (dict(judge="my_labels:two", candidates=2), r"--judge must return \d+ probabilities"),
        (dict(judge="my_labels:prefers_yes"), "--candidates 6: .* a judge compares just 2"),
        (dict(candidates=1), "--candidates 1: a pair needs 2 answers"),
        (dict(minibatch_size=12), "--batch-size must be a multiple of --minibatch-size"),
        (dict(ref="strange"), "ref has another tokenizer than .*Give a model that has the tokenizer of"),
    ],
)
def test_what_is_wrong_is_named_with_what_to_do(world, strangers, options, message):
    options = {name: strangers["ref"] if value == "strange" else value for name, value in options.items()}
    with pytest.raises(ValueError, match=message):
        online.main(settings(world, "wrong", overwrite=True, **options))


strangers = test_preferences.strangers
