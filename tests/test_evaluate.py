"""evaluate.py: its measures against numbers worked out otherwise, its files, its errors."""

import dataclasses
import inspect
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_chat import write_folder as write_family
from scipy.stats import binomtest

import evaluate
import gpt
import reward
import sft

SCORES = '''
asked = []


def letters(prompts, responses, rows):
    """gold: the share of the words that are "a"; long: three words or more."""
    asked.append(list(zip(prompts, responses)))
    words = [response.split() for response in responses]
    return [{"gold": w.count("a") / max(1, len(w)), "long": float(len(w) > 2)} for w in words]


def numbers(prompts, responses, rows):
    return [row["worth"] for row in rows]


def late(prompts, responses, rows):
    """A reward: the letters of the alphabet, later ones worth more; never a tie between different texts."""
    return [sum(ord(c) * 0.7**i for i, c in enumerate(response)) for response in responses]


def manners(prompts, responses, rows):
    """A conduct: "b" does harm, "c" helps, "d" declines, "e" evades."""
    names = dict(zip("bcde", ("harmless", "helpful", "declined", "evaded")))
    return [
        {name: float((letter in r.split()) != (letter == "b")) for letter, name in names.items()}
        for r in responses
    ]


def shy(prompts, responses, rows):
    """letters, but no verdict on answers with an "e" in them."""
    found = zip(responses, letters(prompts, responses, rows))
    return [None if "e" in response else verdict for response, verdict in found]


def longer(prompts, a, b, rows):
    return [0.5 if len(x) == len(y) else float(len(x) > len(y)) for x, y in zip(a, b)]
'''


@pytest.fixture(scope="module")
def world(words, tmp_path_factory):
    """Two model folders that disagree, and 7 prompts."""
    root = tmp_path_factory.mktemp("world")
    (root / "my_scores.py").write_text(SCORES)
    tokenizer = gpt.load_tokenizer(words)
    config = gpt.make_config(vocab_size=16, context=32, layers=1, heads=2, dim=16)
    for name, seed in (("start", 0), ("trained", 1)):
        model = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, gpt.init(config, jax.random.key(seed)))
        run = {"run": {"script": "dpo.py", "config": {"beta": "0.3", "kind": "dpo", "rounds": "1"}}} if seed else {}
        gpt.save(root / name, model, tokenizer, run)
    rows = [{"prompt": f"\n\nHuman: {'a b c d'[: 2 * i + 1]}\n\nAssistant:", "worth": i / 8} for i in range(4)]
    rows += [{"prompt": f"\n\nHuman: {w}\n\nAssistant:", "worth": 0.5} for w in "efg"]
    write_rows(root / "prompts.jsonl", rows)
    write_rows(root / "demos.jsonl", [{"prompt": "Human: a", "completion": w} for w in ("b c", "d", "e f g h")])
    write_rows(root / "text.jsonl", [{"text": "a b c d e f g h"}, {"text": "yes no"}, {"text": "h a h a h"}])
    questions = [{"question": w, "choices": ["yes", "c c", "h"], "answer": i % 3} for i, w in enumerate("abcdefgh")]
    write_rows(root / "questions.jsonl", questions + [{"question": "d", "choices": ["x", "y"], "answer": 1}])
    behaviour = dict(zip(evaluate.BEHAVIOUR, (" yes", " no")))
    write_rows(root / "behaviour.jsonl", [{"question": f"{w} ?"} | behaviour for w in "abcdefgh"])
    return root


def write_rows(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def settings(world: Path, name: str, **options) -> evaluate.Config:
    plan = dict(
        models=(str(world / "start"), str(world / "trained")), ref=str(world / "start"), samples=7, batch_size=4,
        data=str(world / "prompts.jsonl"), gold="my_scores:letters", out=world / name, response_length=5,
    )  # fmt: skip
    return evaluate.Config(**plan | options)


ASKED = {"perplexity": "demos text", "questions": "questions behaviour"}


@pytest.fixture(scope="module")
def report(world):
    before = jax.sharding.get_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(world)
        files = {kind: [str(world / f"{name}.jsonl") for name in names.split()] for kind, names in ASKED.items()}
        evaluate.main(
            settings(
                world,
                "report",
                reward="my_scores:late",
                pairwise="my_scores:longer",
                best_of=(1, 2, 3, 4),
                winners=world / "winners.jsonl",
                **files,
            )  # fmt: skip
        )
    jax.set_mesh(before)
    return json.loads((world / "report" / "summary.json").read_text())["models"]


def test_every_prompt_counts_once_and_gold_is_the_mean_of_its_function(report):
    import my_scores

    assert [s["count"] for s in report.values()] == [7] * 6
    batches = iter(
        my_scores.asked[2:]
    )  # after the baseline's: two of 4 for start sampled, greedy, trained sampled, greedy
    for s in (report["start"], report["start"]["greedy"], report["trained"], report["trained"]["greedy"]):
        pairs = (next(batches) + next(batches))[:7]  # the eighth row fills the batch
        assert len({prompt for prompt, _ in pairs}) == 7
        share = [text.split().count("a") / max(1, len(text.split())) for _, text in pairs]
        assert s["gold"] == pytest.approx(np.mean(share))
        assert s["long"] == pytest.approx(np.mean([len(text.split()) > 2 for _, text in pairs]))


def test_the_reference_is_at_distance_zero_and_closes_nothing(report):
    assert abs(report["start"]["kl"]) < 1e-6 and report["start"]["closed"] == 0
    assert report["trained"]["kl"] > 0.01 and "closed" not in report["start"]["intervals"]


def test_the_start_of_closed_is_the_mean_of_several_draws(report, world):
    """Of the candidates of best-of-n, which are not drawn again, and of further ones."""
    draws = [[share_of_a(text) for _, text in judged(CANDIDATES + 2 * i)] for i in range(evaluate.START_DRAWS)]
    assert len(set(map(tuple, draws))) > 1
    start = np.mean(draws)
    summary = json.loads((world / "report" / "summary.json").read_text())
    assert summary["reference"]["gold"] == pytest.approx(start) and summary["reference"]["draws"] == len(draws)
    low, high = summary["reference"]["interval"]
    assert low < start < high
    for name in ("trained", "best-of-4"):
        row = summary["models"][name]
        assert row["closed"] == pytest.approx((row["gold"] - start) / (1 - start))
        low, high = row["intervals"]["closed"]
        assert low < row["closed"] < high and f"{row['closed']:.0%} [{low:.0%}, {high:.0%}]" in evaluate.table(report)


def test_the_interval_of_closed_is_that_of_a_ratio_of_means():
    rng = np.random.default_rng(0)
    start, gain = rng.uniform(-0.5, 0.9, 400), rng.normal(0.3, 0.2, 400)
    share, (low, high) = evaluate.closed(start + gain, start, np.arange(400))
    assert share == pytest.approx(gain.sum() / (1 - start).sum())
    deviations = (gain - share * (1 - start)) / (1 - start).mean()  # the delta method
    assert (high - low) / 2 == pytest.approx(1.96 * deviations.std() / 20, rel=0.1)
    twice = np.tile(start + gain, 2), np.tile(start, 2), np.tile(np.arange(400), 2)
    assert evaluate.closed(*twice) == (pytest.approx(share), pytest.approx([low, high]))  # nothing new was asked
    missing = np.where(np.arange(400) == 7, np.nan, start + gain)
    assert evaluate.closed(missing, start, np.arange(400))[0] == pytest.approx(share, abs=0.01)
    assert evaluate.closed(np.full(4, 1.0), np.ones(4), np.arange(4)) is None  # there was no distance


def test_the_report_holds_the_table_and_samples_of_both(report, world):
    text = (world / "report" / "report.md").read_text()
    assert evaluate.table(report) in text and "| prompt | start | trained |" in text


def test_gold_may_say_nothing_of_an_answer(world, monkeypatch, capsys):
    monkeypatch.syspath_prepend(world)
    trained = (str(world / "trained"),)
    evaluate.main(settings(world, "shy", gold="my_scores:shy", reward="my_scores:late", models=trained, best_of=(4,)))
    import my_scores

    passes = my_scores.asked[
        -2 * (1 + 2 + 4 + evaluate.START_DRAWS) :
    ]  # baseline, sampled, greedy, candidates, reference
    theirs, said = judged_of(passes, 0), judged_of(passes, 1)
    summary = json.loads((world / "shy" / "summary.json").read_text())
    row, told = summary["models"]["trained"], [text for _, text in said if "e" not in text]
    assert 0 < row["unjudged"]["gold"] == 7 - len(told) and row["gold"] == pytest.approx(
        np.mean(list(map(share_of_a, told)))
    )
    both = [share_of_a(x) - share_of_a(y) for (_, x), (_, y) in zip(said, theirs) if "e" not in x + y]
    assert row["win"]["gold"]["rate"] == pytest.approx(np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in both]))
    assert row["win"]["gold"]["unjudged"] == 7 - len(both)
    assert f"| trained | gold | {7 - len(told)} |" in capsys.readouterr().out
    assert -1 <= summary["models"]["best-of-4"]["gold"] <= 1 and summary["reference"]["gold"] <= 1
    with pytest.raises(ValueError, match="my_scores:silent gave no number for any answer of"):
        monkeypatch.setattr(my_scores, "silent", lambda p, r, rows: [None] * len(r), raising=False)
        evaluate.main(settings(world, "silent", gold="my_scores:silent"))


def test_gold_of_plain_numbers_sees_the_rows(world, monkeypatch):
    monkeypatch.syspath_prepend(world)
    evaluate.main(settings(world, "numbers", gold="my_scores:numbers", models=(str(world / "start"),)))
    summary = json.loads((world / "numbers" / "summary.json").read_text())["models"]
    assert summary["start"]["gold"] == pytest.approx((0 + 1 / 8 + 2 / 8 + 3 / 8 + 3 * 0.5) / 7)


def test_kl_of_a_sequence_is_the_sum_over_vocabulary_and_visited_states(world):
    model, ref = (gpt.load(world / name)[0] for name in ("trained", "start"))
    prompts = jnp.array([[0, 3, 4], [5, 6, 7]])
    prompt_mask = jnp.array([[0, 1, 1], [1, 1, 1]])  # left-padded
    responses, mask = jnp.array([[8, 9, 14], [10, 14, 15]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    kl = evaluate.sequence_kl(model, ref, prompts, prompt_mask, responses, mask, 0.7)
    predict = jax.jit(lambda m, tokens: jax.nn.log_softmax(m.logits(m(tokens))[0] / 0.7))
    for row, (start, length) in enumerate([(1, 3), (0, 2)]):
        tokens = jnp.concatenate([prompts[row, start:], responses[row, :length]])[None]
        p, q = (np.asarray(predict(m, tokens), np.float64) for m in (model, ref))
        states = slice(2 - start, 2 - start + length)  # the last prompt token predicts the first of the response
        np.testing.assert_allclose(kl[row], (np.exp(p) * (p - q))[states].sum(), rtol=1e-4)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = evaluate.bootstrap_interval(values)
    margin = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - margin, values.mean() + margin], atol=0.1 * margin)
    # every prompt asked five times, with the same answer each time: five times the rows know no more
    again = evaluate.bootstrap_interval(np.tile(values, 5), np.tile(np.arange(400), 5))
    np.testing.assert_allclose(again, [low, high])


def test_few_prompts_have_wide_intervals():
    rng, covered, runs = np.random.default_rng(0), 0, 400
    for _ in range(runs):
        low, high = evaluate.bootstrap_interval(rng.normal(0, 1, 8), draws=1000)
        covered += low <= 0 <= high
    assert 0.915 <= covered / runs <= 0.98  # 0.89 between the 2.5th and the 97.5th percentile
    # 3 of 6 prompts, each asked 50 times with one answer: 5 degrees of freedom, so 2.57 in the place of 1.96
    assert gpt.effective_size(np.repeat([0.0, 1.0], 150), np.repeat(np.arange(6), 50)) == pytest.approx(
        6 * (1.96793 / 2.57058) ** 2 * 5 / 6, rel=1e-4
    )


@pytest.mark.parametrize("hits, n", [(0, 500), (1, 500), (500, 500), (250, 500), (3, 7), (1, 1)])
def test_the_interval_of_a_share_is_wilsons_where_no_prompt_repeats(hits, n):
    values = np.arange(n) < hits
    found = gpt.share_interval(values.astype(float), np.arange(n))
    np.testing.assert_allclose(found, binomtest(hits, n).proportion_ci(method="wilson"), atol=1e-9)


def test_none_of_500_is_not_never():
    assert gpt.share_interval(np.zeros(500), np.arange(500)) == [0, pytest.approx(0.0076, abs=5e-5)]
    # all 500 were answers to 20 prompts: of other prompts less is known
    low, high = gpt.share_interval(np.zeros(500), np.arange(500) % 20)
    assert low == 0 and 0.1 < high < 0.2


def test_the_interval_of_wins_with_ties():
    ties = gpt.share_interval(np.full(500, 0.5), np.arange(500))
    np.testing.assert_allclose(ties, [0.5 - 0.0038, 0.5 + 0.0038], atol=1e-4)  # 0 of 500 pairs were decided
    won = np.repeat([0.0, 0.5, 1.0], [1000, 2000, 3000])
    margin = 1.96 * won.std() / np.sqrt(6000)
    expected = [won.mean() - margin, won.mean() + margin]
    np.testing.assert_allclose(gpt.share_interval(won, np.arange(6000)), expected, atol=1e-3)


def outcomes(rng, prompts: int, p: float, rho: float, n: int = 500):
    """(outcomes, clusters) of n answers to prompts of uneven sizes, whose rates are drawn around p: two answers to the
    same prompt have the correlation rho."""
    sizes = rng.multinomial(n - prompts, rng.dirichlet(np.full(prompts, 2.0))) + 1
    clusters = np.repeat(np.arange(prompts), sizes)
    rates = np.full(prompts, p) if rho == 0 else rng.beta(p * (1 - rho) / rho, (1 - p) * (1 - rho) / rho, prompts)
    return (rng.random(n) < rates[clusters]).astype(float), clusters


@pytest.mark.parametrize(
    "prompts, p, rho",
    [(500, 0.006, 0), (500, 0.7, 0), (257, 0.01, 0.9), (257, 0.7, 0.3), (24, 0.05, 0.1), (24, 0.5, 0.9)],
)
def test_intervals_of_shares_hold_the_truth_as_often_as_they_say(prompts, p, rho):
    rng, covered, naive, runs = np.random.default_rng(prompts), 0, 0, 1000
    for _ in range(runs):
        values, clusters = outcomes(rng, prompts, p, rho)
        low, high = gpt.share_interval(values, clusters)
        covered += low <= p <= high
        low, high = gpt.share_interval(values, np.arange(500))  # as if no prompt repeated
        naive += low <= p <= high
    assert 0.935 <= covered / runs <= 0.99
    assert rho < 0.1 or naive / runs < 0.93


def test_the_p_value_of_a_rate_is_that_of_its_interval():
    rng, below = np.random.default_rng(0), 0
    for rate in np.linspace(0.42, 0.62, 41):
        values, clusters = outcomes(rng, 250, rate, 0.2)
        low, high = gpt.share_interval(values, clusters)
        p = evaluate.chance_of_rate(values, clusters)
        assert (p < 0.025) == (low > 0.5) and (p > 0.975) == (high < 0.5)
        below += p < 0.025
    assert 5 < below < 36
    assert evaluate.chance_of_rate(np.full(9, 0.5), np.arange(9)) == 0.5
    assert evaluate.chance_of_rate(np.ones(1), np.zeros(1, int)) > 0.1  # one prompt won says nothing


def test_measures_are_shares_or_means_and_what_has_no_verdict_counts_for_nothing():
    prompts = [f"prompt {i}" for i in range(300)]
    numbers = {"gold": np.tile([1.0, 0.0, np.nan], 100), "kl": np.zeros(300), "length": np.ones(300)}
    numbers |= {"kind": np.full(300, np.nan), "part": np.linspace(-1, 1, 300)}
    numbers["list"] = np.where(np.arange(300) < 100, numbers["gold"], np.nan)  # concerns rows of that kind alone
    rows = [{"kind": "list"}] * 100 + [{"kind": ["a", "b"]}] * 200
    answers = evaluate.Answers(numbers, prompts, ["a"] * 300, rows, [[1]] * 300)
    row = evaluate.summarize(answers)
    assert row["gold"] == 0.5 and "kind" not in row and row["unjudged"] == {"gold": 100, "kind": 300, "list": 33}
    np.testing.assert_allclose(row["intervals"]["gold"], gpt.share_interval([0, 1] * 100, np.arange(200)), atol=1e-9)
    assert row["intervals"]["kl"] == [0, 0] and row["intervals"]["length"] == [1, 1]
    assert row["intervals"]["part"] == pytest.approx([-0.066, 0.066], abs=0.01)
    table = evaluate.unjudged_table({"mine": row | {"win": {"gold": {"rate": 0.5, "unjudged": 3}}}})
    assert "| mine | gold | 100 |" in table and "| mine | win, gold | 3 |" in table
    assert evaluate.unjudged_table({"mine": {}}) == ""
    # as JSON: no verdict is null
    rows = json.loads(json.dumps(evaluate.to_rows(answers), allow_nan=False))
    np.testing.assert_array_equal(evaluate.from_rows(rows).numbers["gold"], numbers["gold"])


def judged(start: int) -> list[tuple[str, str]]:
    """The 7 (prompt, response) of what gold was asked from batch `start` on, 2 batches of 4 a pass."""
    import my_scores

    return judged_of(my_scores.asked[start:], 0)


def judged_of(batches, number: int) -> list[tuple[str, str]]:
    """The 7 (prompt, response) of the pass of this number."""
    return [pair for batch in batches[2 * number :][:2] for pair in batch][:7]


# batches of the passes: the baseline; start and greedy; trained and greedy; 4 candidates; draws of the reference
BASELINE, START, TRAINED, CANDIDATES = 0, 2, 6, 10  # the start of "closed" goes on from the candidates


def share_of_a(text):
    return text.split().count("a") / max(1, len(text.split()))


def test_win_rates_are_counted_against_independent_answers_of_the_baseline(report, world):
    ours, theirs = judged(TRAINED), judged(BASELINE)
    assert theirs != judged(START)  # the reference's own row has other noise
    gaps = [share_of_a(x) - share_of_a(y) for (_, x), (_, y) in zip(ours, theirs)]
    found = report["trained"]["win"]
    assert found["gold"]["rate"] == pytest.approx(np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps]))
    assert found["gold"]["ties"] == pytest.approx(np.mean([gap == 0 for gap in gaps]))
    gaps = [len(x) - len(y) for (_, x), (_, y) in zip(ours, theirs)]
    assert found["pairwise"]["rate"] == pytest.approx(np.mean([(gap > 0) + 0.5 * (gap == 0) for gap in gaps]))
    assert found["pairwise"]["same_position"] == 0 and "win" not in report["start"]
    assert evaluate.wins_table(report) in (world / "report" / "report.md").read_text()


def test_both_orders_cancel_a_love_of_the_first_place():
    first = lambda prompts, a, b, rows: [0.9] * len(rows)
    won, same = evaluate.ask_both_orders(first, ["?"] * 3, ["x"] * 3, ["y"] * 3, [{}] * 3)
    assert won.tolist() == [0.5] * 3 and same == 1
    worth = {"good": 2, "fair": 1, "also fair": 1, "biased": 0}
    # a fair judge of these, but that "biased" wins wherever it stands first
    judge = lambda prompts, a, b, rows: [
        0.8 if x == "biased" else 0.5 + 0.2 * np.sign(worth[x] - worth[y]) for x, y in zip(a, b)
    ]
    ours, theirs = ["good", "fair", "fair", "biased"], ["fair", "also fair", "good", "good"]
    won, same = evaluate.ask_both_orders(judge, ["?"] * 4, ours, theirs, [{}] * 4)
    assert won.tolist() == [1, 0.5, 0, 0.5] and same == 0.25


@pytest.mark.parametrize("answer", ([0.5, 0.5], [1.5, 0.5, 0.5], [-1, np.nan, 0.5], None, 0.5))
def test_a_pairwise_judge_must_return_probabilities(answer):
    with pytest.raises(ValueError, match="--pairwise must return 3 probabilities"):
        evaluate.ask_both_orders(lambda *_: answer, "???", "aaa", "bbb", [{}] * 3)


def test_wins_count_ties_a_half_and_no_verdict_for_neither():
    assert evaluate.wins([1.0, 0.2, 0.3], [0.5, 0.2 + 1e-9, 0.9]).tolist() == [1, 0.5, 0]
    won = evaluate.wins([1.0, np.nan, 0.3, 0.1], [0.5, 0.2, np.nan, 0.9])
    np.testing.assert_array_equal(won, [1, np.nan, np.nan, 0])
    found = evaluate.win_rate(won, np.arange(4), np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found["rate"], found["unjudged"], found["prompts"]) == (0.5, 2, 2)
    assert evaluate.win_rate(won[1:3], np.arange(2)) == {"unjudged": 2}


def test_a_pairwise_judge_may_say_nothing_of_a_pair():
    said = iter([[0.9, None, 0.9, "a", 0.9], [0.1, 0.1, np.nan, 0.1, 0.9]])
    won, same = evaluate.ask_both_orders(lambda *_: next(said), "?????", "aaaaa", "bbbbb", [{}] * 5)
    np.testing.assert_array_equal(won, [1, np.nan, np.nan, np.nan, 0.5])
    assert same == 0.5  # of the two pairs that were judged in both orders


def test_where_only_length_matters_the_length_controlled_win_rate_is_a_half():
    rng = np.random.default_rng(0)
    longer = rng.normal(4, 5, 2000)  # ours are longer by four tokens on average
    won = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    assert won.mean() > 0.65
    rate, (low, high) = evaluate.length_controlled(won, longer)
    assert rate == pytest.approx(0.5, abs=0.04) and low < 0.5 < high and high - low < 0.13
    # where length does not matter the two agree, and where one side always wins nothing blows up
    fair = (rng.random(2000) < 0.7).astype(float)
    assert evaluate.length_controlled(fair, longer)[0] == pytest.approx(fair.mean(), abs=0.02)
    assert 0.98 < evaluate.length_controlled(np.ones(500), longer[:500])[0] < 1
    assert evaluate.length_controlled(won[:50], np.zeros(50))[0] == pytest.approx(won[:50].mean(), abs=0.01)


def test_weights_of_the_logistic_fit_are_repeated_rows():
    x, y = np.array([-1.0, 0.3, 0.5, 1.0]), np.array([0.0, 1.0, 0.5, 1.0])
    counts = np.array([[2, 0, 1, 1]])
    rows = np.repeat(np.arange(4), counts[0])
    repeated = evaluate.logistic_intercepts(x[rows], y[rows], np.ones((1, 4)))
    np.testing.assert_allclose(evaluate.logistic_intercepts(x, y, counts), repeated, rtol=1e-10)
    # the fit is the minimum: no point of a grid has a smaller penalised loss
    grid = np.linspace(-6, 6, 1201)
    z = grid[:, None, None] + grid[None, :, None] * x
    loss = (np.logaddexp(0, z) - y * z).sum(-1) + 0.05 * (grid[:, None] ** 2 + grid[None] ** 2)
    best = grid[np.unravel_index(loss.argmin(), loss.shape)[0]]
    assert evaluate.logistic_intercepts(x, y, np.ones((1, 4)))[0] == pytest.approx(best, abs=0.02)


def best_of_by_enumeration(scores, values, n):
    """Mean over all subsets of n of the value that the best score has; equal scores draw lots."""
    groups = [list(group) for group in itertools.combinations(range(len(scores)), n)]
    best = [[values[i] for i in group if scores[i] == max(scores[j] for j in group)] for group in groups]
    return np.mean([np.mean(b) for b in best])


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    scores, values = [0.1, 0.5, 0.9, 0.5, 0.2, 0.5], [3.0, 1.0, -2.0, 4.0, 0.5, 7.0]
    weights = evaluate.best_of_n_weights(np.array(scores), n)
    assert weights.sum() == pytest.approx(1)
    assert weights @ values == pytest.approx(best_of_by_enumeration(scores, values, n))


def test_best_of_more_than_there_is_says_so():
    with pytest.raises(ValueError, match="the best of 7 cannot be estimated from 6 samples"):
        evaluate.best_of_n_weights(np.arange(6), 7)


def test_the_kl_bound_of_best_of_n_is_exact_where_all_samples_differ():
    assert evaluate.best_of_n_kl(1) == 0 and evaluate.best_of_n_kl(4) == pytest.approx(0.63629, abs=1e-5)
    p = np.full(2000, 1 / 2000)  # hardly a tie: the i-th has probability F_i^4 - F_(i-1)^4
    best = np.diff(np.concatenate([[0], np.cumsum(p)]) ** 4)
    assert (best * np.log(best / p)).sum() == pytest.approx(evaluate.best_of_n_kl(4), abs=1e-3)
    p = np.array([0.5, 0.5])  # many ties: far below
    best = np.array([1 / 16, 15 / 16])
    assert (best * np.log(best / p)).sum() < evaluate.best_of_n_kl(4) - 0.1


def test_best_of_rows_are_expectations_over_the_candidates(report, world):
    import my_scores

    rounds = [judged(CANDIDATES + 2 * i) for i in range(4)]
    assert len(set(map(tuple, rounds))) == 4  # each of other noise
    for n in (1, 2, 3):
        expected = []
        for answers in zip(*rounds):
            texts = [text for _, text in answers]
            expected.append(best_of_by_enumeration(my_scores.late(0, texts, 0), list(map(share_of_a, texts)), n))
        row = report[f"best-of-{n}"]
        assert row["gold"] == pytest.approx(np.mean(expected))
        assert row["kl"] == evaluate.best_of_n_kl(n) and row["kl_bound"]
    assert "| best-of-2 |" in evaluate.table(report) and "<= 0.19" in evaluate.table(report)


def test_winners_are_the_best_complete_candidates_and_sft_trains_on_them(report, world, tmp_path):
    import my_scores

    rows = [json.loads(line) for line in (world / "winners.jsonl").read_text().splitlines()]
    tokenizer = gpt.load_tokenizer(world / "start")
    rounds = [judged(CANDIDATES + 2 * i) for i in range(4)]
    by_prompt = {" ".join(row["prompt"].split()): row for row in rows}
    assert 0 < len(rows) <= 7
    for answers in zip(*rounds):
        won = by_prompt.get(" ".join(answers[0][0].split()))
        if won:
            texts = [text for _, text in answers]
            assert won["completion"] in texts and len(tokenizer.encode(won["completion"])) < 5  # and its EOS
            worth = dict(zip(texts, my_scores.late(0, texts, 0)))
            # what is worth more had no EOS within its five tokens
            better = [text for text in texts if worth[text] > worth[won["completion"]]]
            assert all(len(tokenizer.encode(text)) == 5 or not text.strip() for text in better)
    assert [row["prompt"] for row in rows][0].startswith("\n\nHuman: ")  # as it was written, not as it was decoded
    mesh = jax.sharding.get_mesh()
    sft.main(
        sft.Config(
            init=str(world / "start"),
            data=(str(world / "winners.jsonl"),),
            out=tmp_path / "rejection",
            steps=2,
            batch_size=1,
            length=32,
            save_every=2,
        )  # fmt: skip
    )
    jax.set_mesh(mesh)
    assert (tmp_path / "rejection" / "model.safetensors").is_file()


def test_the_winner_is_the_candidate_that_scores_best_among_the_complete_ones(world):
    candidate = lambda text, reward, eos: evaluate.Answers(
        {"eos": [eos, 0], "reward": [reward, reward]}, ["p", "q"], [text, text], [{"prompt": "p"}, {"prompt": "q"}],
        [[3], [3]],
    )  # fmt: skip
    rounds = [candidate("a", 0.1, 1), candidate("b", 0.9, 0), candidate("c", 0.5, 1), candidate("d", 0.3, 1)]
    winners = evaluate.pick_winners(rounds, gpt.load_tokenizer(world / "start"))
    assert winners == [{"prompt": "p", "completion": "c", "reward": 0.5}]  # nobody completes an answer to q


def test_an_answer_with_a_character_cut_in_two_cannot_win(world):
    numbers = lambda reward: {"eos": [1], "reward": [reward]}
    rounds = [
        evaluate.Answers(numbers(2.0), ["q"], ["a \ufffd"], [{"prompt": "q"}], [[1]]),
        evaluate.Answers(numbers(1.0), ["q"], ["a"], [{"prompt": "q"}], [[1]]),
    ]
    (winner,) = evaluate.pick_winners(rounds, gpt.load_tokenizer(world / "start"))
    assert winner["completion"] == "a"


def test_distinct_and_repetition_by_hand():
    responses = [list("aba"), list("abab"), ["c"]]
    assert [evaluate.distinct(responses, n) for n in (1, 2, 3)] == [3 / 8, 2 / 5, 2 / 3]
    assert evaluate.repetition(list("ababab"), 2) == 1 - 2 / 5
    assert evaluate.repetition(list("abcabc")) == 1 / 4 and evaluate.repetition(list("abcab")) == 0.0
    assert evaluate.repetition(["a"]) == evaluate.distinct([["a"]], 2) == 0.0


logprobs_of_rows = jax.jit(gpt.token_logprobs)


def row_logprob(model, ids, scored):
    """log p of the last `scored` of the ids: a row alone, before padding that it cannot see."""
    logps = logprobs_of_rows(model, jnp.array([ids + [0] * (32 - len(ids))]))[0]
    return float(logps[len(ids) - 1 - scored : len(ids) - 1].sum())


def test_perplexity_is_the_exponential_of_the_mean_loss(report, world):
    model, tokenizer = gpt.load(world / "trained")
    expected = {"demos": [], "text": []}
    for name, rows in expected.items():
        for line in (world / f"{name}.jsonl").read_text().splitlines():
            [(ids, mask)] = gpt.encode_row(json.loads(line), name, tokenizer, 32)
            rows.append((row_logprob(model, ids, sum(mask)), sum(mask)))
        total, count = np.sum(rows, axis=0)
        found = report["trained"]["perplexity"][name]
        assert found["tokens"] == count and found["perplexity"] == pytest.approx(np.exp(-total / count), rel=1e-4)
        assert found["interval"][0] <= found["perplexity"] <= found["interval"][1]


def test_multiple_choice_by_log_prob(report, world):
    model, tokenizer = gpt.load(world / "trained")
    questions, expected = evaluate.read_questions(world / "questions.jsonl"), []
    for q in questions:
        prompt = gpt.encode_prompt(q["messages"], tokenizer)
        ids = [tokenizer.encode(choice) for choice in q["choices"]]
        expected.append([row_logprob(model, prompt + i, len(i)) for i in ids])
    exam = evaluate.Exam(settings(world, "x"), tokenizer, model, [], None)
    found = evaluate.choice_logprobs(exam, model, questions, 32)
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-4)
    hits = {"accuracy": [], "normalised": []}
    for q, logps in zip(questions, expected):
        sizes = [len(choice) for choice in q["choices"]]
        for name, scores in (("accuracy", logps), ("normalised", np.divide(logps, sizes))):
            # both of the last question's choices are <unk>: a tie is shared
            hits[name].append(0.5 if q["choices"] == ["x", "y"] else float(np.argmax(scores) == q["answer"]))
    found = report["trained"]["questions"]["questions"]
    assert hits["accuracy"] != hits["normalised"] and np.mean(hits["accuracy"]) != np.mean(hits["normalised"])
    assert {name: found[name] for name in hits} == pytest.approx({name: np.mean(x) for name, x in hits.items()})
    assert found["questions"] == 9 and found["chance"] == pytest.approx((8 / 3 + 1 / 2) / 9)
    text = (world / "report" / "report.md").read_text()
    assert evaluate.tax_table(report) in text and "accuracy, behaviour" in text


def test_questions_that_do_not_fit_are_left_out_and_counted(world, capsys):
    model, tokenizer = gpt.load(world / "trained")
    asked = {"mine": evaluate.read_questions(world / "questions.jsonl")}
    exam = evaluate.Exam(settings(world, "x", length=4), tokenizer, model, [], None, questions=asked)
    found = evaluate.multiple_choice(exam, model, "mine")  # "c c" is the fifth token
    assert (found["questions"], found["left_out"]) == (1, 8)
    assert "8 questions left out: more than 4 tokens" in capsys.readouterr().err
    exam = exam._replace(config=settings(world, "x", length=3))
    with pytest.raises(ValueError, match="no question fits 3 tokens: raise --length"):
        evaluate.multiple_choice(exam, model, "mine")


def test_behaviour_questions_report_the_share_that_matches(report, world):
    for name in ("start", "trained"):
        model, tokenizer = gpt.load(world / name)
        matches = []
        for word in "abcdefgh":
            prompt = gpt.encode_prompt([{"role": "user", "content": f"{word} ?"}], tokenizer)
            yes, no = (row_logprob(model, prompt + tokenizer.encode(w), 1) for w in ("yes", "no"))
            matches.append(yes > no)
        assert report[name]["questions"]["behaviour"]["accuracy"] == np.mean(matches)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "?"}, r"no `question` \(found: text\)"),
        ({"question": "?"}, "needs `choices`, a list of two texts or more, or `answer_matching_behavior` and"),
        ({"question": "?", "choices": ["a"], "answer": 0}, "needs `choices`, a list of two"),
        ({"question": "?", "choices": ["a", "b"], "answer": 2}, r"`answer` is 2, not the number of a choice \(0 to 1"),
        ({"question": "?", "choices": ["a", "b"], "answer": "b"}, "`answer` is 'b', not the number"),
        ({"question": "?", evaluate.BEHAVIOUR[0]: " (A)"}, "needs `choices`"),
        (["?"], "a list, not an object"),
    ],
)
def test_a_question_of_the_wrong_shape_is_named_by_file_and_line(row, reason, tmp_path):
    good = {"question": "?", "choices": ["a", "b"], "answer": 1}
    write_rows(tmp_path / "q.jsonl", [good, row])
    with pytest.raises(gpt.BadRow, match=rf"q\.jsonl:2: {reason}"):
        evaluate.read_questions(tmp_path / "q.jsonl")


def test_a_question_that_the_chat_template_refuses_is_named_by_file_and_line(tmp_path):
    exam = SimpleNamespace(tokenizer=gpt.load_tokenizer(write_family("llama2", tmp_path)))
    ask = {"role": "user", "content": "?"}
    good = {"question": "?", "choices": ["a", "b"], "answer": 1}
    write_rows(tmp_path / "q.jsonl", [good, good | {"question": [ask, ask]}])
    with pytest.raises(gpt.BadRow, match=r"q\.jsonl:2: the chat template refuses these messages: roles must alternate"):
        evaluate.choice_logprobs(exam, None, evaluate.read_questions(tmp_path / "q.jsonl"), 99)


def test_a_row_holds_what_pictures_need(report):
    assert report["trained"]["run"] == {"script": "dpo.py", "config": {"beta": "0.3", "kind": "dpo", "rounds": "1"}}
    assert report["start"]["run"] == {}
    lengths = report["trained"]["lengths"]
    assert sum(lengths) == 7 and np.arange(len(lengths)) @ lengths / 7 == pytest.approx(report["trained"]["length"])
    alone = evaluate.table({"trained": report["trained"]}).splitlines()  # its settings are no part of what was measured
    assert alone[0] == evaluate.table(report).splitlines()[0]


def test_what_was_measured_before_is_not_measured_again(world, monkeypatch, capsys):
    monkeypatch.syspath_prepend(world)
    import my_scores

    def asked(**options) -> int:
        """How often gold was asked, two batches a pass."""
        before, mesh = len(my_scores.asked), jax.sharding.get_mesh()
        evaluate.main(settings(world, "growing", reward="my_scores:late", **options))
        jax.set_mesh(mesh)
        return (len(my_scores.asked) - before) // 2

    read = lambda: json.loads((world / "growing" / "summary.json").read_text())
    start, trained = str(world / "start"), str(world / "trained")
    draws = evaluate.START_DRAWS  # of the reference
    assert (
        asked(models=(start,), best_of=(2,)) == 1 + 2 + draws
    )  # the baseline; sampled, greedy; two draws are best-of-2's
    first = read()
    assert asked(models=(start, trained), best_of=(2,)) == 2
    assert f"start ({world / 'start'}): nothing has changed" in capsys.readouterr().out
    second = read()
    assert list(second["models"]) == ["start", "trained", "best-of-2"]
    assert second["models"]["start"] == first["models"]["start"] and second["best_of"] == first["best_of"]
    text = (world / "growing" / "report.md").read_text()
    for path in (world / "growing" / "answers").glob("*.json"):
        path.unlink()
    assert asked(models=(start, trained), best_of=(2,)) == 5 + draws
    assert read() == second and (world / "growing" / "report.md").read_text() == text
    assert asked(models=(trained,), best_of=()) == 0 and read()["models"]["trained"] == second["models"]["trained"]
    for name in ("trained", "reference"):  # cut short by a full disk
        path = world / "growing" / "answers" / f"{name}.json"
        path.write_bytes(path.read_bytes()[:100])
    assert asked(models=(trained,), best_of=()) == 2 + draws
    assert (
        capsys.readouterr().err.count("is damaged") == 2 and read()["models"]["trained"] == second["models"]["trained"]
    )
    assert asked(models=(trained,), best_of=(), seed=2) == 3 + draws  # other settings
    model, tokenizer = gpt.load(world / "trained")
    gpt.save(world / "again" / "trained", jax.tree.map(lambda x: 1.01 * x, model), tokenizer)
    assert asked(models=(str(world / "again" / "trained"),), seed=2) == 2  # other weights
    winners = world / "growing.jsonl"
    for _ in range(2):  # a file of winners is always written
        winners.unlink(missing_ok=True)
        assert asked(models=(), best_of=(2,), seed=2, winners=winners) == 2 and winners.exists()


@pytest.mark.parametrize("damage", [b"", b'{"key": "a', b"[]", b'"text"', b"null", b'{"key": "a"}', b"\xff\xfe{"])
def test_a_damaged_file_of_answers_is_measured_again_and_named(tmp_path, capsys, damage):
    (tmp_path / "one.json").write_bytes(damage)
    assert evaluate.read_kept(tmp_path / "one.json") is None
    assert "one.json is damaged" in capsys.readouterr().err
    assert evaluate.read_kept(tmp_path / "two.json") is None and capsys.readouterr().err == ""


def test_reward_models_beside_each_other(tmp_path):
    calibrated = {"ece": 0.02, "brier": 0.125, "nll": 0.5}
    report = dict(pairs=40, accuracy=0.75, accuracy_interval=[0.7, 0.8], temperature=1.25, after=calibrated)
    report |= dict(before={"ece": 0.1, "brier": 0.25, "nll": 0.6})
    report |= dict(gold={"agreement_on_clear_pairs": 0.9, "correlation": 0.8})
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "report.json").write_text(json.dumps(report))
    evaluate.main(evaluate.Config(rewards=(str(tmp_path / "mean"),), out=tmp_path / "out"))
    text = (tmp_path / "out" / "rewards.md").read_text()
    assert (
        "| mean | 40 | 0.750 [0.700, 0.800] | 0.900 | 0.800 | 0.100 | 0.020 | 0.250 | 0.125 | 0.600 | 0.500 | 1.25"
        in text
    )
    config = evaluate.Config(rewards=(str(tmp_path / "other"),))
    with pytest.raises(FileNotFoundError, match=r"other/report.json: python reward.py --out .*other writes it"):
        evaluate.reward_reports(config)


@pytest.fixture(scope="module")
def reward_model(world):
    body, tokenizer = gpt.load(world / "trained")
    model = gpt.init_score_model(body, jax.random.key(2), suffix=(15,))
    gpt.save(world / "rm", model, tokenizer)
    return model, tokenizer


def test_the_table_of_reward_models_shows_what_reward_py_measured_on_pairs(world, reward_model, monkeypatch):
    monkeypatch.syspath_prepend(world)
    model, tokenizer = reward_model
    letters = np.random.default_rng(0).permutation([(a, b) for a in "abcdefgh" for b in "abcdefgh" if a != b])
    rows = [{"prompt": "Human: a", "chosen": a, "rejected": f"{b} {b}"} for a, b in letters.tolist()[:24]]
    write_rows(world / "pairs.jsonl", rows)
    pairs = gpt.Batches(str(world / "pairs.jsonl"), "pairs", tokenizer, 5, 32, 0, suffix=model.suffix, forked=True)
    measured = reward.report([model], pairs, tokenizer, SimpleNamespace(gold="my_scores:letters"))
    gpt.write_json(world / "rm" / "report.json", measured)
    evaluate.main(evaluate.Config(rewards=(str(world / "rm"),), out=world / "rewards"))
    found = json.loads((world / "rewards" / "rewards.json").read_text())["rm"]
    pad = lambda ids: (ids + [0] * 8)[:8]
    sequences = [s for row in rows for s, _ in gpt.encode_row(row, "pairs", tokenizer, 32, (15,))]
    tokens, mask = jnp.array([pad(s) for s in sequences]), jnp.array([pad([1] * len(s)) for s in sequences])
    scores = np.asarray(jax.jit(gpt.ScoreModel.__call__)(model, tokens, mask)).reshape(-1, 2)
    d = scores[:, 0] - scores[:, 1]
    assert found["pairs"] == 24 and found["accuracy"] == np.mean(d > 0)
    assert found["accuracy_interval"] == pytest.approx(
        gpt.share_interval(d > 0, gpt.same_prompt(row["prompt"] for row in rows))
    )
    d = d[np.random.default_rng(0).permutation(24)]  # the order of gpt.Batches.once
    judged = d[np.random.default_rng(1).permutation(24)[12:]]  # the half that the temperature was not fitted on
    assert found["before"]["nll"] == pytest.approx(np.mean(np.log1p(np.exp(-judged))), rel=1e-4)
    assert found["gold"]["clear_pairs"] == sum("a" in (row["chosen"], row["rejected"][0]) for row in rows)


def test_a_reward_model_rates_answers_beside_gold(world, reward_model, monkeypatch):
    monkeypatch.syspath_prepend(world)
    model, tokenizer = reward_model
    options = dict(models=(str(world / "start"),), samples=4, gold=None, reward=str(world / "rm"))
    evaluate.main(settings(world, "rated", **options))
    summary = json.loads((world / "rated" / "summary.json").read_text())["models"]
    assert "gold" not in summary["start"] and summary["start"]["closed"] is None
    exam = evaluate.set_exam(settings(world, "rated", **options))
    answers = evaluate.answer(exam, exam.ref, 1.0)
    expected = []
    for row, ids in zip(answers.rows, answers.tokens):
        tokens = gpt.encode_prompt(row["prompt"], tokenizer) + ids + [15]  # the suffix stands in EOS's place
        tokens, mask = tokens + [0] * (24 - len(tokens)), [1] * len(tokens) + [0] * (24 - len(tokens))
        expected.append(float(jax.jit(gpt.ScoreModel.__call__)(model, jnp.array([tokens]), jnp.array([mask]))[0]))
    np.testing.assert_allclose(answers.numbers["reward"], expected, rtol=1e-4)
    assert summary["start"]["reward"] == pytest.approx(np.mean(expected), rel=1e-4)
    options |= dict(gold=str(world / "rm"), reward="my_scores:late", models=(str(world / "start"),), best_of=(2,))
    evaluate.main(settings(world, "by-model", **options))  # the model as gold: of the best that another one picks
    judged = json.loads((world / "by-model" / "summary.json").read_text())["models"]
    assert judged["start"]["gold"] == pytest.approx(np.mean(expected), rel=1e-4) and "best-of-2" in judged
    assert judged["start"]["closed"] is None  # of a way to a perfect 1, which such scores do not have


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(best_of=(4,)), "--best-of needs --reward"),
        (dict(winners=Path("w.jsonl")), "--winners needs --best-of"),
        (dict(best_of=(0, 2), reward="out/reward"), "--best-of takes numbers from 1 up"),
        (dict(samples=0), "--samples 0: 1 at least"),
        (dict(response_length=0), "--response-length 0: 1 at least"),
        (dict(temperature=-1.0), "--temperature -1.0: 0 .greedy. or above"),
        (dict(models=()), "nothing to evaluate: give --models or --best-of"),
        (dict(questions=("data/nowhere.jsonl",)), "no data file data/nowhere.jsonl"),
        (dict(models=("out/nowhere",)), "no model in out/nowhere .*check the path"),
        (dict(ref="out/no-kto"), "no model in out/no-kto .*Makefile has the command"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_computed(options, reason):
    with pytest.raises((ValueError, OSError), match=reason):
        evaluate.main(evaluate.Config(**dict(ref="out/nowhere") | options))


def test_models_of_the_wrong_kind_are_named(world, reward_model, tmp_path):
    with pytest.raises(ValueError, match="start is a language model, not a reward model: train one with reward.py"):
        evaluate.set_exam(settings(world, "x", reward=str(world / "start")))
    exam = evaluate.set_exam(settings(world, "x", gold=None))
    with pytest.raises(ValueError, match="rm is a reward model, not a language model: give a folder.*--rewards"):
        evaluate.examine(exam, str(world / "rm"))
    spec = json.loads((world / "rm" / "tokenizer.json").read_text())
    spec["model"]["vocab"] |= {"yes": spec["model"]["vocab"]["no"], "no": spec["model"]["vocab"]["yes"]}
    gpt.save(tmp_path / "other", *reward_model)
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="other has another tokenizer than .*start"):
        evaluate.set_exam(settings(world, "x", reward=str(tmp_path / "other")))


def test_models_of_one_name_are_told_apart():
    assert evaluate.short_names(["out/a", "out/b/", "out/a"]) == {"a": "out/a", "b": "out/b"}
    assert evaluate.short_names(["one/ppo", "two/ppo"]) == {"one/ppo": "one/ppo", "two/ppo": "two/ppo"}


def test_every_flag_has_its_help():
    source = inspect.getsource(evaluate.Config)
    for field in dataclasses.fields(evaluate.Config):
        [line] = [line for line in source.splitlines() if line.strip().startswith(f"{field.name}: ")]
        assert "  # " in line, field.name


def test_conduct_counts_each_thing_on_the_prompts_that_it_is_about(world, monkeypatch, capsys):
    """Requests for harm and harmless prompts are answered apart; shares are means over the answers of one file."""
    monkeypatch.syspath_prepend(world)
    import my_scores

    seen, manners = [], my_scores.manners
    keep = lambda prompts, responses, rows: seen.append((prompts, responses)) or manners(prompts, responses, rows)
    monkeypatch.setattr(my_scores, "manners", keep)
    write_rows(world / "bad.jsonl", [{"prompt": f"Human: a {w} Assistant:"} for w in "abcdefgh"])
    write_rows(world / "good.jsonl", [{"prompt": f"Human: h {w} Assistant:"} for w in "abcdefgh"])
    files = dict(harmful=str(world / "bad.jsonl"), harmless=str(world / "good.jsonl"), conduct="my_scores:manners")
    before = jax.sharding.get_mesh()
    evaluate.main(settings(world, "conduct", models=(str(world / "trained"),), samples=8, batch_size=8, **files))
    jax.set_mesh(before)
    found = json.loads((world / "conduct" / "summary.json").read_text())["models"]["trained"]["conduct"]
    (bad, bad_said), (good, good_said) = seen
    assert all(" a " in p for p in bad) and all(" h " in p for p in good)
    share = lambda letter, said: np.mean([letter in text.split() for text in said])
    assert found["complied"] == pytest.approx(share("b", bad_said))
    assert found["declined"] == pytest.approx(share("d", bad_said))
    assert found["evaded"] == pytest.approx(share("e", bad_said))
    assert found["helpful"] == pytest.approx(share("c", good_said))
    assert found["over-refused"] == pytest.approx(share("d", good_said))
    assert found["evasive"] == pytest.approx(share("e", good_said))
    assert "| trained | " in capsys.readouterr().out.split("harm: complied")[1]
    with pytest.raises(ValueError, match="go together"):
        evaluate.check(settings(world, "conduct", harmful="x"))
    with pytest.raises(ValueError, match="says nothing of declined, evaded"):
        exam = evaluate.set_exam(settings(world, "conduct", samples=8, **files | {"conduct": "my_scores:polite"}))
        monkeypatch.setattr(
            my_scores, "polite", lambda p, r, rows: [{"harmless": 1.0, "helpful": 1.0}] * len(r), raising=False
        )
        evaluate.conduct(exam, exam.ref)
    jax.set_mesh(before)
