"""evaluate.py: its measures against numbers worked out otherwise, its files, its errors."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import evaluate
import gpt

JUDGE = '''
asked = []


def letters(prompts, responses, rows):
    """gold: the share of the words that are "a"; long: three words or more."""
    asked.append(list(zip(prompts, responses)))
    words = [response.split() for response in responses]
    return [{"gold": w.count("a") / max(1, len(w)), "long": float(len(w) > 2)} for w in words]


def numbers(prompts, responses, rows):
    return [row["worth"] for row in rows]
'''


@pytest.fixture(scope="module")
def world(words, tmp_path_factory):
    """Two model folders that disagree, and 7 prompts."""
    root = tmp_path_factory.mktemp("world")
    (root / "my_judge.py").write_text(JUDGE)
    tokenizer = gpt.load_tokenizer(words)
    config = gpt.make_config(vocab_size=16, context=32, layers=1, heads=2, dim=16)
    for name, seed in (("start", 0), ("trained", 1)):
        model = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, gpt.init(config, jax.random.key(seed)))
        gpt.save(root / name, model, tokenizer)
    rows = [{"prompt": f"\n\nHuman: {'a b c d'[: 2 * i + 1]}\n\nAssistant:", "worth": i / 8} for i in range(4)]
    rows += [{"prompt": f"\n\nHuman: {w}\n\nAssistant:", "worth": 0.5} for w in "efg"]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def settings(world: Path, name: str, **options) -> evaluate.Config:
    plan = dict(
        models=(str(world / "start"), str(world / "trained")), ref=str(world / "start"), samples=7, batch_size=4,
        data=str(world / "prompts.jsonl"), judge="my_judge:letters", out=world / name, response_length=5,
    )  # fmt: skip
    return evaluate.Config(**plan | options)


@pytest.fixture(scope="module")
def report(world):
    before = jax.sharding.get_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(world)
        evaluate.main(settings(world, "report"))
    jax.set_mesh(before)
    return json.loads((world / "report" / "summary.json").read_text())


def test_every_prompt_counts_once_and_gold_is_the_mean_of_the_judge(report):
    import my_judge

    assert [s["count"] for s in report.values()] == [7, 7]
    batches = iter(my_judge.asked)  # two batches of 4 for each of: start sampled, greedy, trained sampled, greedy
    for s in (report["start"], report["start"]["greedy"], report["trained"], report["trained"]["greedy"]):
        pairs = (next(batches) + next(batches))[:7]  # the eighth row fills the batch
        assert len({prompt for prompt, _ in pairs}) == 7
        share = [text.split().count("a") / max(1, len(text.split())) for _, text in pairs]
        assert s["gold"] == pytest.approx(np.mean(share))
        assert s["long"] == pytest.approx(np.mean([len(text.split()) > 2 for _, text in pairs]))


def test_the_reference_is_at_distance_zero_and_closes_nothing(report):
    assert abs(report["start"]["kl"]) < 1e-6 and report["start"]["closed"] == 0
    assert report["trained"]["kl"] > 0.01
    expected = (report["trained"]["gold"] - report["start"]["gold"]) / (1 - report["start"]["gold"])
    assert report["trained"]["closed"] == pytest.approx(expected)


def test_the_report_holds_the_table_and_samples_of_both(report, world):
    text = (world / "report" / "report.md").read_text()
    assert evaluate.table(report) in text and "| prompt | start | trained |" in text


def test_a_judge_of_plain_numbers_sees_the_rows(world, monkeypatch):
    monkeypatch.syspath_prepend(world)
    evaluate.main(settings(world, "numbers", judge="my_judge:numbers", models=(str(world / "start"),)))
    summary = json.loads((world / "numbers" / "summary.json").read_text())
    assert summary["start"]["gold"] == pytest.approx((0 + 1 / 8 + 2 / 8 + 3 / 8 + 3 * 0.5) / 7)


def test_kl_of_a_sequence_is_the_sum_over_vocabulary_and_visited_states(world):
    model, ref = (gpt.load(world / name)[0] for name in ("trained", "start"))
    prompts = jnp.array([[0, 3, 4], [5, 6, 7]])
    prompt_mask = jnp.array([[0, 1, 1], [1, 1, 1]])  # left-padded
    responses, mask = jnp.array([[8, 9, 14], [10, 14, 15]]), jnp.array([[1, 1, 1], [1, 1, 0]])
    kl = evaluate.sequence_kl(model, ref, prompts, prompt_mask, responses, mask, 0.7)
    for row, (start, length) in enumerate([(1, 3), (0, 2)]):
        tokens = jnp.concatenate([prompts[row, start:], responses[row, :length]])[None]
        p, q = (np.asarray(jax.nn.log_softmax(m.logits(m(tokens))[0] / 0.7), np.float64) for m in (model, ref))
        states = slice(2 - start, 2 - start + length)  # the last prompt token predicts the first of the response
        np.testing.assert_allclose(kl[row], (np.exp(p) * (p - q))[states].sum(), rtol=1e-4)


def test_the_bootstrap_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = evaluate.bootstrap_interval(values)
    margin = 1.96 * values.std() / 20
    np.testing.assert_allclose([low, high], [values.mean() - margin, values.mean() + margin], atol=0.1 * margin)


def write_run(folder: Path, gold, **more):
    folder.mkdir()
    names = {"objective/kl_exact": 0.25, "objective/scores": 0.1}
    rows = [{name: i * x for name, x in names.items()} | {"eval/gold": g} | more for i, g in enumerate(gold)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_runs_table_finds_the_peak_of_gold(tmp_path):
    write_run(tmp_path / "hill", [0.0] * 5 + [1.0] * 5 + [-1.0] * 10)
    table = evaluate.runs_table([tmp_path / "hill"]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    # means of the last five: gold is 1 over iterations 5-9, where the KL is 0.25 x 7 and the score 0.1 x 7
    assert cells[1] == ["hill", "highest gold", "9", "1.75", "0.70", "1.00"]
    assert cells[2] == ["hill", "end", "19", "4.25", "1.70", "-1.00"]


def test_runs_are_drawn(tmp_path):
    write_run(tmp_path / "a", [0.1, 0.5, 0.2])
    evaluate.draw_runs([tmp_path / "a"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_nobody_watched_is_named(tmp_path):
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "metrics.jsonl").write_text('{"objective/kl_exact": 0.0, "objective/scores": 1.0}\n')
    with pytest.raises(ValueError, match=r"blind is not a PPO run that was watched by a judge \(--monitor"):
        evaluate.runs_table([tmp_path / "blind"])


def test_reward_models_beside_each_other(tmp_path):
    calibrated = {"ece": 0.02, "nll": 0.5}
    report = dict(accuracy=0.75, accuracy_interval=[0.7, 0.8], temperature=1.25, after=calibrated)
    report |= dict(before={"ece": 0.1, "nll": 0.6}, gold={"agreement_on_clear_pairs": 0.9, "correlation": 0.8})
    (tmp_path / "mean").mkdir()
    (tmp_path / "mean" / "report.json").write_text(json.dumps(report))
    evaluate.main(evaluate.Config(rewards=(str(tmp_path / "mean"),), out=tmp_path / "out"))
    text = (tmp_path / "out" / "rewards.md").read_text()
    assert "| mean | 0.750 [0.700, 0.800] | 0.900 | 0.800 | 0.100 | 0.020 | 0.600 | 0.500 | 1.25 |" in text
    with pytest.raises(FileNotFoundError, match=r"other/report.json: python reward.py --out .*other writes it"):
        evaluate.rewards_table([tmp_path / "other"])
