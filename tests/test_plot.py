"""tools/plot.py: fits against curves written out, points of the frontier, every picture, its errors."""

import ast
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gpt
from tools import plot


@pytest.mark.parametrize("kind, peak", [("rl", math.exp(1.2 / 0.5 - 1)), ("bon", 1.2 / (2 * 0.5))])
def test_the_fit_recovers_its_coefficients_and_the_other_form_does_not(kind, peak):
    d = np.linspace(0, 5, 60)
    gain = d * (1.2 - 0.5 * (np.log(np.maximum(d, 1e-9)) if kind == "rl" else d))  # Gao et al., written out
    np.testing.assert_allclose(plot.fit_overoptimization(d, gain, kind), (1.2, 0.5), rtol=1e-9)
    np.testing.assert_allclose(plot.overoptimization(d, 1.2, 0.5, kind), gain, atol=1e-9)
    other = {"rl": "bon", "bon": "rl"}[kind]
    wrong = plot.overoptimization(d, *plot.fit_overoptimization(d, gain, other), other)
    assert np.abs(wrong - gain).max() > 0.2
    assert plot.fitted_peak(1.2, 0.5, kind) == pytest.approx(peak**2)
    dense = np.linspace(0.01, 6, 60_000)
    assert dense[plot.overoptimization(dense, 1.2, 0.5, kind).argmax()] == pytest.approx(peak, abs=1e-3)
    assert plot.fitted_peak(1.2, -0.1, kind) == math.inf


def test_fits_count_the_gain_from_the_start_of_the_curve(tmp_path):
    kl = np.arange(9) * 0.5
    gold = 0.3 + np.sqrt(kl) * (0.8 - 0.2 * np.log(np.maximum(np.sqrt(kl), 1e-9)))
    write_run(tmp_path / "run", gold, scale=2)
    curve = {"kl": kl, "reward": 1 + np.sqrt(kl) * (0.9 - 0.1 * np.sqrt(kl))}
    fits = plot.fit_curves({"run": tmp_path / "run"}, curve)
    np.testing.assert_allclose(fits["run"]["gold"], (0.3, 0.8, 0.2), rtol=1e-6)
    np.testing.assert_allclose(fits["best of n"]["score"], (1, 0.9, 0.1), rtol=1e-6)
    assert "gold" not in fits["best of n"] and "d (alpha - beta log d) | 0.800 | 0.200 |" in plot.fits_table(fits)


@pytest.mark.parametrize(
    "script, settings, expected",
    [
        ("ppo.py", {"beta": "0.05"}, {"name": "PPO", "symbol": "beta", "price": 0.05}),
        ("dpo.py", {"beta": "0.5", "loss": "dpo"}, {"name": "DPO", "symbol": "beta", "price": 0.5}),
        ("dpo.py", {"beta": "1", "label_smoothing": "0.1"}, {"name": "cDPO", "symbol": "beta", "price": 1.0}),
        (
            "dpo.py",
            {"beta": "1", "label_smoothing": "0.1", "loss": "robust", "rounds": "3"},
            {"name": "rDPO, 3 rounds", "symbol": "beta", "price": 1.0},
        ),
        (
            "ipo_kto.py",
            {"loss": "ipo", "tau": "0.1", "beta": "1.0", "reduction": "sum"},
            {"name": "IPO", "symbol": "tau", "price": 0.1},
        ),
        (
            "ipo_kto.py",
            {"loss": "ipo", "tau": "1", "reduction": "mean"},
            {"name": "IPO, mean", "symbol": "tau", "price": 1.0},
        ),
        (
            "ipo_kto.py",
            {"loss": "kto", "tau": "0.1", "beta": "0.3"},
            {"name": "KTO", "symbol": "beta", "price": 0.3},
        ),
        ("sft.py", {}, {"name": "SFT"}),
    ],
)
def test_a_run_names_its_method_and_price(script, settings, expected):
    found = plot.method_of({"script": script, "config": settings})
    assert {k: v for k, v in found.items() if k != "settings"} == expected
    assert plot.method_of({}) == plot.method_of(None) == {}
    older = {
        {"gold": "monitor", "loss": "kind" if script == "dpo.py" else "loss"}.get(k, k): settings[k] for k in settings
    }
    assert plot.method_of({"script": script, "config": older | {"monitor": "toy:parts"}}) == found


def entry(beta, kl, gold, **more):
    """A row of summary.json."""
    run = {"script": "dpo.py", "config": {"beta": str(beta), "loss": "dpo"}}
    intervals = {"kl": [kl - 1, kl + 1], "gold": [0, 1]}
    return dict(folder=f"out/{kl}", run=run, kl=kl, gold=gold, intervals=intervals) | more


def test_seeds_of_one_price_are_one_point_of_the_frontier():
    models = {"a": entry(0.1, 4.0, 0.5), "b": entry(0.5, 2.0, 0.6), "c": entry(0.1, 6.0, 0.9)}
    cheap, dear = plot.frontier_points(models, ["b", "a", "c"])["DPO"][::-1]
    assert (cheap["kl"], cheap["kl_low"], cheap["kl_high"], cheap["runs"]) == (5.0, 4.0, 6.0, 2)
    assert (cheap["gold"], cheap["gold_low"], cheap["gold_high"]) == (pytest.approx(0.7), 0.5, 0.9)
    assert (dear["price"], dear["kl_low"], dear["gold_high"], dear["runs"]) == (0.5, 1.0, 1, 1)


def test_runs_that_differ_by_more_than_a_seed_are_lines_of_their_own():
    models = {}
    for i, reward_model in enumerate(["('out/seed-1/weak',)", "('out/seed-2/weak',)", "('out/seed-1/strong',)"]):
        config = {"beta": "0.1", "reward": reward_model, "lr": "0.001", "seed": str(i), "out": f"out/{i}"}
        run = {"script": "ppo.py", "config": config}
        models[str(i)] = dict(run=run, kl=float(i), gold=0.5, intervals={"kl": [0, 4], "gold": [0, 1]})
    points = plot.frontier_points(models, models)
    assert {label: [p["runs"] for p in line] for label, line in points.items()} == {
        "PPO, reward out/seed-*/weak": [2],
        "PPO, reward out/seed-*/strong": [1],
    }


def test_of_many_settings_a_line_is_called_by_those_that_most_runs_do_not_share():
    variants = [{}, {"kl": "reward"}, {"kl": "reward", "advantage": "rloo"}, {"clip": "(0.2, 0.28)"}, {"loss": "gspo"}]
    models = {}
    for i, variant in enumerate(variants):
        config = {"beta": "0.1", "advantage": "grpo", "loss": "token", "kl": "loss", "clip": "(0.2, 0.2)"} | variant
        run = {"script": "grpo.py", "config": config}
        models[str(i)] = dict(run=run, kl=float(i), gold=0.5, intervals={"kl": [0, 4], "gold": [0, 1]})
    assert list(plot.frontier_points(models, models)) == [
        "GRPO", "GRPO, kl reward", "GRPO, advantage rloo, kl reward", "GRPO, clip 0.2, 0.28", "GRPO, loss gspo",
    ]  # fmt: skip


@pytest.fixture
def report(tmp_path):
    """A report of a reference, two models of one method and best of n."""
    shares = dict.fromkeys(("complied", "declined", "evaded", "helpful", "over-refused", "evasive"), 0.5)
    shares["intervals"] = {name: [0.4, 0.6] for name in shares}
    more = dict(length=2.5, lengths=[0, 1, 2, 3], conduct=shares)
    best_of = {"n": [1, 2, 4, 8], "kl": [0, 0.2, 0.6, 1.2], "reward": [0, 1, 2, 3], "gold": [0.4, 0.5, 0.6, 0.6]}
    models = {
        "start": entry(1, 0.0, 0.4, **more) | {"folder": "out/start", "run": {}},
        "a": entry(0.1, 4.0, 0.5, **more),
    }
    models |= {"b": entry(0.5, 2.0, 0.6, **more), "best-of-2": {"n": 2, "kl": 0.2, "gold": 0.5}}
    summary = {"reference": {"folder": "out/start", "gold": 0.4}, "models": models, "best_of": best_of}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "report" / "report.md").write_text("# A table\n\n| a |\n\n## Samples\n\n| b |\n")
    return tmp_path / "report"


def names(*folders) -> plot.Config:
    return plot.Config(what=tuple(map(str, folders)))


def test_every_picture_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", [0.1, 0.5, 0.7, 0.6, 0.5])
    plot.main(names(report))
    assert {path.stem for path in report.glob("*.png")} == {"frontier", "overoptimization", "conduct", "lengths"}
    for picture in ("overoptimization", "curves"):
        plot.main(replace(names(picture, tmp_path / "run"), out=report))
    for _ in range(2):  # drawn again, it stands there once
        plot.main(names("frontier", report))
    pictures = {path.stem for path in report.glob("*.png")}
    assert pictures == {"frontier", "overoptimization", "conduct", "curves", "lengths"}
    text = (report / "report.md").read_text()
    assert text.startswith("# A table\n\n| a |\n\n## Samples\n\n| b |\n\n## Lengths\n\n![lengths](lengths.png)\n")
    assert text.count("\n\n## ") == text.count("## ") == 6  # the samples and five pictures
    for name in pictures:
        assert text.count(f"({name}.png)") == 1
        assert (report / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "| run | highest gold |" in text and "| best of n | score | d (alpha - beta d) |" in text


def test_reports_old_and_new_are_drawn_or_refused_in_words(report):
    pytest.importorskip("matplotlib")
    path = report / "summary.json"
    summary = json.loads(path.read_text())
    summary["reference"] |= {"interval": [0.35, 0.45], "draws": 8}
    summary["models"]["mute"] = {k: v for k, v in entry(0.2, 3.0, 0.5).items() if k != "gold"}  # no verdict at all
    shares = summary["models"]["a"]["conduct"]  # Wilson's intervals end where the share is, but for the last bit
    shares |= {"helpful": 1.0, "complied": 0.0}
    shares["intervals"] |= {"helpful": [0.99, 1 - 1e-16], "complied": [1e-18, 0.0076]}
    path.write_text(json.dumps(summary))
    assert [len(line) for line in plot.frontier_of(summary).values()] == [2]
    plot.main(names("frontier", report))
    plot.main(names("conduct", report))
    for text, said in (
        ("{", "summary.json is damaged.*run evaluate.py again"),
        ("[]", "summary.json is damaged"),
        ('{"models": {}}', "summary.json has no best_of, reference: an older evaluate.py wrote it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            plot.main(names("frontier", report))


def test_the_report_of_a_reward_model_is_drawn_into_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    with pytest.raises(FileNotFoundError, match="no .*/report.json: python reward.py --out .* writes it"):
        plot.main(names("reward", tmp_path))
    rows = [{"chosen_longer_by": "..-9", "pairs": 3, "accuracy": 0.25}]
    rows += [{"chosen_longer_by": "0..0", "pairs": 5, "accuracy": 0.75}]
    points = {"before": [[0.2, 0.3, 0.5], [0.9, 0.7, 0.5]], "after": [[0.3, 0.3, 0.4], [0.8, 0.7, 0.6]]}
    report = dict(reliability=points, accuracy_by_length_difference=rows, before={"ece": 0.15}, after={"ece": 0.05})
    report |= dict(temperature=1.5, accuracy=0.6, longer_wins=0.4)
    (tmp_path / "report.json").write_text(json.dumps(report))
    seen = {"scatter": [], "bar": []}
    for name, drawn in seen.items():
        draw = getattr(Axes, name)
        keep = lambda *args, draw=draw, drawn=drawn, **kw: (drawn.append([*map(list, args[1:3])]), draw(*args, **kw))[1]
        monkeypatch.setattr(Axes, name, keep)
    plot.main(names("reward", tmp_path))
    assert seen["scatter"] == [[[0.2, 0.9], [0.3, 0.7]], [[0.3, 0.8], [0.3, 0.7]]]
    assert seen["bar"] == [[[0, 1], [0.25, 0.75]]]
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert "![reward](reward.png)" in (tmp_path / "report.md").read_text()


def test_a_report_shows_what_it_has_the_numbers_for():
    row = entry(0.1, 1.0, 0.5)
    bare = {"reference": {"folder": "out/start", "gold": 0.4}, "models": {"a": row}, "best_of": None}
    assert plot.shown(bare) == []  # one point is no comparison
    assert plot.shown(bare | {"models": {"a": row, "b": entry(0.5, 2.0, 0.6)}}) == ["frontier"]
    assert plot.shown(bare | {"best_of": {"n": [1, 2, 4]}}) == []  # and three no curve
    assert plot.shown(bare | {"best_of": {"n": [1, 2, 4, 8]}}) == ["overoptimization"]
    unjudged = bare | {"reference": {"folder": "out/start", "gold": None}}
    with pytest.raises(ValueError, match="it needs trained models and --gold"):
        plot.draw_frontier(unjudged, (), Path("frontier.png"))


def test_bars_of_the_lengths_are_shares_of_the_responses(report, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    drawn, stairs = [], Axes.stairs
    monkeypatch.setattr(Axes, "stairs", lambda *args, **kw: (drawn.append(args[1:]), stairs(*args, **kw))[1])
    plot.draw_lengths(json.loads((report / "summary.json").read_text()), (), tmp_path / "lengths.png")
    assert len(drawn) == 3  # best of n is an estimate and has no answers of its own
    np.testing.assert_allclose(drawn[0][0], [1 / 6, 2 / 6, 3 / 6])
    np.testing.assert_allclose(drawn[0][1], [0.5, 1.5, 2.5, 3.5])


def test_what_is_missing_is_said_in_words(report, tmp_path, monkeypatch):
    with pytest.raises(
        FileNotFoundError, match="no .*nowhere/summary.json: .*evaluate.py writes one .*no picture either: lengths"
    ):
        plot.main(names(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="no .*nowhere/metrics.jsonl: .* is not the run folder of a training"):
        plot.main(replace(names("curves", tmp_path / "nowhere"), out=tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pictures need matplotlib: pip install matplotlib"):
        plot.main(names(report))


def test_it_imports_no_module_of_the_project():
    tree = ast.walk(ast.parse(Path(plot.__file__).read_text()))
    imported = {name.name for node in tree if isinstance(node, ast.Import) for name in node.names}
    assert "tyro" in imported and not imported & {path.stem for path in Path(gpt.__file__).parent.glob("*.py")}


def write_run(folder: Path, gold, scale=1, **more):
    """metrics.jsonl of a PPO run whose gold was watched."""
    folder.mkdir()
    names = {"objective/kl_exact": 0.25 * scale, "objective/scores": 0.1, "step": 1}
    rows = [{name: i * x for name, x in names.items()} | {"eval/gold": g} | more for i, g in enumerate(gold)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_runs_table_finds_the_peak_of_gold(tmp_path):
    write_run(tmp_path / "hill", [0.0] * 5 + [1.0] * 5 + [-1.0] * 10)
    table = plot.runs_table([tmp_path / "hill"]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    # means of the last five: gold is 1 over iterations 5-9, where the KL is 0.25 x 7 and the score 0.1 x 7
    assert cells[1] == ["hill", "highest gold", "9", "1.75", "0.70", "1.00"]
    assert cells[2] == ["hill", "end", "19", "4.25", "1.70", "-1.00"]


def test_a_run_that_nobody_watched_is_named(tmp_path):
    (tmp_path / "blind").mkdir()
    (tmp_path / "blind" / "metrics.jsonl").write_text('{"objective/kl_exact": 0.0, "objective/scores": 1.0}\n')
    with pytest.raises(ValueError, match=r"blind is not a PPO run that logged gold \(--gold"):
        plot.runs_table([tmp_path / "blind"])
