"""Pictures of what was measured, from summary.json (evaluate.py), report.json (reward.py) and metrics.jsonl (every
training script) alone.

    python tools/plot.py out/report                              # all that this report can show
    python tools/plot.py frontier out/frontier-report            # one picture of it: lengths, conduct or frontier
    python tools/plot.py curves out/ppo out/dpo                  # metrics of any runs over their steps
    python tools/plot.py reward out/reward                       # how far to trust a reward model
    python tools/plot.py overoptimization out/chase-weak out/chase-strong --out out/overoptimization

    lengths          how long each model's answers are
    conduct          helpful where no harm is asked, against not complying with requests for harm
    frontier         gold against KL, a line for each method over its betas
    overoptimization reward and gold against KL along PPO runs (that logged --gold) and of best of n
                     (of the report in --out), with the curves of Gao et al. 2022 (arXiv:2210.10760) fitted to them
    curves           the main metrics of runs
    reward           reward models on held-out pairs: a reliability diagram, and accuracy by difference of length

A picture goes into its report's folder as NAME.png, or into --out, and report.md there shows it.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass(frozen=True)
class Config:
    what: tyro.conf.Positional[tuple[str, ...]] = ("out/report",)  # [picture] folders: of a report, or of runs
    out: Path | None = None  # folder of the picture (default: that of the report, or out/report for runs)


# ---------------------------------------------------------------------------------------------------- reading


def read_summary(folder) -> dict:
    path = Path(folder) / "summary.json"
    if not path.is_file():
        pictures = ", ".join(PICTURES)
        raise FileNotFoundError(f"no {path}: python evaluate.py writes one ({folder} is no picture either: {pictures})")
    try:
        report = json.loads(path.read_text())
        missing = {"models", "reference", "best_of"} - report.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): run evaluate.py again") from None
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: an older evaluate.py wrote it; run it again")
    return report


def read_reward_report(folder) -> dict:
    path = Path(folder) / "report.json"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: python reward.py --out {folder} writes it, where it has held-out pairs")
    return json.loads(path.read_text())


def read_metrics(run) -> list[dict]:
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: {run} is not the run folder of a training script")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_run(run, width: int = 1) -> dict:
    """Curves along a PPO run, means of the last `width` iterations: KL in nats a response, score (of the reward that is
    optimised), gold."""
    names = {"kl": "objective/kl_exact", "score": "objective/scores", "gold": "eval/gold"}
    rows = read_metrics(run)
    if not rows or any(name not in rows[0] for name in names.values()):
        raise ValueError(f"{run} is not a PPO run that logged gold (--gold toy:parts)")
    return {short: smooth([row[name] for row in rows], width) for short, name in names.items()}


def smooth(values, width: int = 5):
    """Running mean of the last `width` values, of fewer at the start."""
    values = np.asarray(values, float)
    return np.array([values[max(0, i - width + 1) : i + 1].mean() for i in range(len(values))])


def short_names(folders) -> dict:
    """{name: folder}: the last part of the path, more of it where two would be called the same."""
    folders = list(dict.fromkeys(str(folder).rstrip("/") for folder in folders))
    for depth in range(1, 1 + max((len(Path(f).parts) for f in folders), default=0)):
        names = ["/".join(Path(f).parts[-depth:]) for f in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders))
    return dict(zip(folders, folders))


# ---------------------------------------------------------------------------------------------------- drawing


def pyplot():
    """matplotlib without a screen."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pictures need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def finish(plt, figure, path: Path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sqrt_axis(axis):
    """KL in nats on an axis that is straight in its square root, the distance that gains are a function of."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set_xlim(left=0)
    ticks, top = [0.0], axis.get_xlim()[1]
    for tick in (0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 1000):
        if tick <= top and math.sqrt(tick) - math.sqrt(ticks[-1]) > 0.06 * math.sqrt(top):  # room for its label
            ticks.append(tick)
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.set_xlabel("KL to the reference, nats a response (square-root scale)")
    axis.grid(alpha=0.3)


def reach(at: float, low: float, high: float) -> list:
    """The arms of an error bar, as matplotlib wants them: not below 0 where an interval ends at the point itself."""
    return [[max(at - low, 0)], [max(high - at, 0)]]


def note(axis, text: str, x: float, y: float, color, above: bool):
    import matplotlib.patheffects as effects

    place = dict(xytext=(4, 5 if above else -11), textcoords="offset points", fontsize=8, color=color)
    halo = [effects.withStroke(linewidth=2, foreground="white")]  # lines may pass below it
    axis.annotate(text, (x, y), path_effects=halo, **place)


def markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


# ---------------------------------------------------------------------------------------------------- lengths, conduct


def draw_lengths(report: dict, _, path: Path):
    """How long each model's answers are: shares of the responses. `lengths` counts them by their number of tokens."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    rows = {name: row for name, row in report["models"].items() if "lengths" in row}
    longest = max(len(row["lengths"]) - 1 for row in rows.values())
    width = math.ceil(longest / 40)  # tokens a bar
    edges = np.arange(0, longest + width, width) + 0.5
    for i, (name, row) in enumerate(list(rows.items())[:8]):  # more lines than that nobody can tell apart
        counts = np.array(row["lengths"])
        shares = np.histogram(np.arange(len(counts)), edges, weights=counts)[0] / counts.sum()
        axis.stairs(shares, edges, color=f"C{i % 10}", linewidth=1.6, label=f"{name}: mean {row['length']:.1f}")
    bars = "" if width == 1 else f", bars of {width}"
    axis.set(xlabel=f"length of the response, tokens with EOS{bars}", ylabel="share of the responses", ylim=(0, None))
    axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axis.grid(alpha=0.3)
    axis.legend()
    finish(plt, figure, path)


def draw_conduct(report: dict, _, path: Path):
    """Helpful against harmless, a point a model with its 95% intervals, as in figure 2 of Bai et al. 2022."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.8), constrained_layout=True)
    for i, (name, row) in enumerate(report["models"].items()):
        if "conduct" not in row:
            continue
        shares, intervals, color = row["conduct"], row["conduct"]["intervals"], f"C{i % 10}"
        x, y = shares["helpful"], 1 - shares["complied"]
        low, high = (1 - bound for bound in intervals["complied"][::-1])
        bars = dict(xerr=reach(x, *intervals["helpful"]), yerr=reach(y, low, high))
        axis.errorbar(x, y, **bars, fmt="o", color=color, capsize=2, lw=1)
        note(axis, name, x, y, color, above=i % 2 == 0)
    axis.set(xlabel="helpful where no harm is asked", ylabel="share of requests for harm not complied with")
    axis.grid(alpha=0.3)
    finish(plt, figure, path)


# ---------------------------------------------------------------------------------------------------- the frontier


BOOKKEEPING = {  # settings that make no other method; beta and tau have an axis of their own
    "seed", "out", "overwrite", "resume", "save_every", "sample_every", "eval_every", "track", "gold", "dtype",
    "remat", "micro_batches", "buckets", "skip_bad_rows", "precompute_ref", "heldout", "beta", "tau",
}  # fmt: skip
TUPLE = "(',)"  # around a setting of several values, as config.json has it


def method_of(run: dict) -> dict:
    """{"name", "symbol", "price", "settings"} of a model's row: the algorithm, what a nat of KL costs it, and the rest
    of its settings, as far as they are known, paths without their numbers: out/seed-1 and out/seed-2 are alike."""
    if not run:
        return {}
    script = Path(run["script"]).stem
    old = {"monitor": "gold"} | ({"kind": "loss"} if script == "dpo" else {})  # names that older runs wrote
    settings = {old.get(name, name): value for name, value in run["config"].items()}
    # the loss of these scripts is the method; that of others, like grpo.py, is a setting of it
    kind = settings.pop("loss", script) if script in ("dpo", "ipo_kto") else script
    names = {"online": "online DPO", "robust": "rDPO"}
    name, symbol = names.get(kind, kind.upper()), "tau" if kind == "ipo" else "beta"
    if kind == "dpo" and float(settings.get("label_smoothing", 0)) > 0:
        name = "cDPO"
    if int(settings.get("rounds", 1)) > 1:
        name += f", {settings['rounds']} rounds"
    if kind == "ipo" and settings.get("reduction") == "mean":
        name += ", mean"
    price = {"symbol": symbol, "price": float(settings[symbol])} if symbol in settings else {}
    rest = {k: re.sub(r"\d+", "*", v) if "/" in v else v for k, v in settings.items() if k not in BOOKKEEPING}
    return {"name": name, "settings": rest} | price


def frontier_points(models: dict, names) -> dict:
    """{method: points from the smallest KL up} of the models called so. Runs that differ by their seed alone are one
    point: their mean, with bars from the lowest to the highest; a single run has its 95% interval."""
    methods = {name: method_of(models[name].get("run")) or {"name": name} for name in names}
    groups, points = {}, {}
    for name, method in methods.items():
        label = method["name"] + differences(method, [m for m in methods.values() if m["name"] == method["name"]])
        price = method.get("price"), method.get("symbol")
        groups.setdefault(label, {}).setdefault(price, []).append(models[name])
    for label, prices in groups.items():
        for (price, symbol), rows in prices.items():
            point = {"price": price, "symbol": symbol, "runs": len(rows)}
            for k in ("kl", "gold"):
                values = [row[k] for row in rows]
                low, high = rows[0]["intervals"][k] if len(rows) == 1 else (min(values), max(values))
                point |= {k: float(np.mean(values)), f"{k}_low": low, f"{k}_high": high}
            points.setdefault(label, []).append(point)
        points[label].sort(key=lambda p: p["kl"])
    return points


def frontier_of(report: dict) -> dict:
    """The points of all models that moved away from the reference; none without gold."""
    models, reference = report["models"], report["reference"]
    folder = lambda row: row.get("folder", reference["folder"])
    moved = [name for name, row in models.items() if folder(row) != reference["folder"] and "gold" in row]
    return frontier_points(models, moved) if reference["gold"] is not None else {}


def differences(method: dict, others: list[dict]) -> str:
    """The settings in which this run is unlike others of its method: ", reward out/reward-weak". Where runs differ in
    several settings, one that most of them share is not named."""
    settings = method.get("settings", {})
    values = {k: Counter(m.get("settings", {}).get(k) for m in others) for k in settings}
    unlike = [k for k in settings if len(values[k]) > 1]
    if len(unlike) > 1:
        unlike = [k for k in unlike if values[k][settings[k]] <= len(others) / 2]
    return "".join(f", {k.replace('_', '-')} {settings[k].strip(TUPLE)}" for k in unlike)


def draw_frontier(report: dict, _, path: Path):
    """Gold against KL, a line for each method over its betas: higher and further left is better."""
    points, best_of, start = frontier_of(report), report["best_of"], report["reference"]["gold"]
    several = len({p["price"] for line in points.values() for p in line}) > 1  # else no point needs its price
    if not points:
        raise ValueError("a frontier is gold against KL: it needs trained models and --gold, and this report has none")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(8.5, 5.8), layout="constrained")
    for i, (method, line) in enumerate(points.items()):
        kl, gold = ([p[k] for p in line] for k in ("kl", "gold"))
        bars = [[[p[k] - p[f"{k}_low"] for p in line], [p[f"{k}_high"] - p[k] for p in line]] for k in ("kl", "gold")]
        axis.errorbar(
            kl, gold, xerr=np.maximum(bars[0], 0), yerr=np.maximum(bars[1], 0), marker="osD^vP*X"[i % 8], markersize=5,
            linewidth=1.2, elinewidth=0.7, capsize=2, color=f"C{i % 10}",
            label=method + ({"beta": ", at β", "tau": ", at τ"}.get(line[0]["symbol"], "") if several else ""),
        )  # fmt: skip
        for p in line:
            if several and p["price"] is not None:
                note(axis, f"{p['price']:g}", p["kl"], p["gold"], f"C{i % 10}", above=i % 2 == 0)
    if best_of and "gold" in best_of:
        axis.plot(best_of["kl"], best_of["gold"], "k.--", linewidth=1, label="best of n, at n (KL: upper bound)")
        for n, kl, gold in list(zip(best_of["n"], best_of["kl"], best_of["gold"]))[1:]:
            note(axis, str(n), kl, gold, "black", above=False)
        start = best_of["gold"][0]  # the same answers, many more of them
    bar = reach(start, *(report["reference"].get("interval") or (start, start)))  # older reports have no interval
    star = dict(marker="*", markersize=13, color="0.3", linestyle="none", capsize=2, clip_on=False)
    axis.errorbar([0], [start], yerr=bar, label="reference", **star)
    axis.set(ylabel="gold", title="What a nat of KL buys")
    sqrt_axis(axis)
    if len(points) <= 8:
        axis.legend()
    else:
        figure.legend(loc="outside lower center", ncols=2)
    finish(plt, figure, path)


# ---------------------------------------------------------------------------------------------------- over-optimisation


def fit_overoptimization(distance, gain, kind: str) -> tuple[float, float]:
    """(alpha, beta) by least squares of Gao et al. 2022 (arXiv:2210.10760): with d = sqrt(KL) and
    R(d) = what was gained since d = 0,

        bon   R(d) = d (alpha - beta d)              rl   R(d) = d (alpha - beta log d)

    The two are not the same law: RL's slope at 0 is infinite, and its beta is not comparable with best-of-n's.
    """
    d, gain = np.asarray(distance, float), np.asarray(gain, float)
    d, gain = d[d > 0], gain[d > 0]
    if len(d) < 3:
        raise ValueError("a curve of two parameters needs three points away from the start")
    (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * _bend(d, kind)], 1), gain)
    return float(alpha), float(beta)


def overoptimization(distance, alpha: float, beta: float, kind: str):
    """R(d) of the fit above."""
    d = np.asarray(distance, float)
    return np.where(d > 0, d * (alpha - beta * _bend(np.where(d > 0, d, 1), kind)), 0.0)


def _bend(d, kind: str):
    return {"rl": np.log, "bon": np.asarray}[kind](d)


def fitted_peak(alpha: float, beta: float, kind: str) -> float:
    """The KL at which the fitted curve is highest: infinite where it only rises."""
    if beta <= 0:
        return math.inf
    exponent = min(alpha / beta - 1, 300.0)
    return math.exp(exponent) ** 2 if kind == "rl" else max(alpha / (2 * beta), 0.0) ** 2


def fit_curves(runs: dict, best_of: dict | None) -> dict:
    """{curve: {"proxy" or "gold": (start, alpha, beta), "kind": ..}} of PPO runs and of best-of-n. A run's gain counts
    from its first iteration, where the policy is the reference."""
    fits = {}
    curves = {name: ("rl", read_run(run)) for name, run in runs.items()}
    if best_of:
        curves["best of n"] = ("bon", {"kl": best_of["kl"], "score": best_of["reward"], "gold": best_of.get("gold")})
    for name, (kind, curve) in curves.items():
        distance = np.sqrt(np.maximum(curve["kl"], 0))
        fits[name] = {"kind": kind, "reach": float(distance.max())}
        for measure in ("score", "gold"):
            values = curve[measure]
            if values is not None and (distance > 0).sum() >= 3:
                gain = np.asarray(values) - values[0]
                fits[name][measure] = (float(values[0]), *fit_overoptimization(distance, gain, kind))
    return fits


def runs_table(runs) -> str:
    """Markdown: where each run's smoothed gold was highest and where it ended. Proxy up and gold down between the two
    is over-optimisation."""
    rows = [["run", "at", "iteration", "KL", "score", "gold"], ["---"] * 6]
    for name, run in short_names(runs).items():
        curves = read_run(run, width=5)
        ends = {"start": 0, "highest gold": int(curves["gold"].argmax()), "end": len(curves["gold"]) - 1}
        for place, i in ends.items():
            numbers = (f"{curves[k][i]:.2f}" for k in ("kl", "score", "gold"))
            rows.append([name, place, str(i), *numbers])
    return markdown(rows) if len(rows) > 2 else ""


def fits_table(fits: dict) -> str:
    """Markdown: the fitted curves, and the KL at which each would be highest."""
    rows = [["curve", "of", "form", "alpha", "beta", "highest at KL"], ["---"] * 6]
    for name, fit in fits.items():
        form = {"rl": "d (alpha - beta log d)", "bon": "d (alpha - beta d)"}[fit["kind"]]
        for measure in ("score", "gold"):
            if measure in fit:
                _, alpha, beta = fit[measure]
                peak = fitted_peak(alpha, beta, fit["kind"])
                where = f"{peak:.1f}" if math.sqrt(peak) <= fit["reach"] else "beyond this curve"
                rows.append([name, measure, form, f"{alpha:.3f}", f"{beta:.3f}", where])
    return markdown(rows) if len(rows) > 2 else ""


def draw_overoptimization(report: dict, runs, path: Path) -> list[str]:
    """Proxy and gold along PPO runs, and of best-of-n, against the distance sqrt(KL), with the fitted curves (Gao et
    al. 2022, arXiv:2210.10760, figure 1)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), layout="constrained")
    names, best_of = short_names(runs), report.get("best_of")
    fits = fit_curves(names, best_of)
    colors = dict(zip(fits, [f"C{i % 10}" for i in range(len(names))] + ["black"]))
    for axis, measure in zip(axes, ("score", "gold")):
        for name, run in names.items():
            curves = read_run(run, width=5)
            axis.plot(np.maximum(curves["kl"], 0), curves[measure], color=colors[name], alpha=0.7, label=name)
        for name, fit in fits.items():
            if measure in fit:
                start, *ab = fit[measure]
                d = np.linspace(0, fit["reach"], 200)
                fitted = start + overoptimization(d, *ab, fit["kind"])
                axis.plot(d * d, fitted, color=colors[name], linestyle="--", linewidth=1.2)
        curve = best_of and best_of.get({"score": "reward"}.get(measure, measure))
        if curve:
            axis.plot(best_of["kl"], curve, "o", color="black", markersize=4, label="best of n (KL: upper bound)")
        sqrt_axis(axis)
    axes[0].set(title="What is optimised: the reward model", ylabel="score (standard deviations of SFT's samples)")
    axes[1].set(title="What was wanted: gold", ylabel="gold")
    if any(measure in fit for fit in fits.values() for measure in ("score", "gold")):
        axes[1].plot([], [], color="0.4", linestyle="--", linewidth=1.2, label="fit of Gao et al.")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    finish(plt, figure, path)
    return [table for table in (runs_table(runs), fits_table(fits)) if table]


# ---------------------------------------------------------------------------------------------------- curves


CURVES = {  # what is worth a panel, in this order, where a run has it; and its unit
    "loss": "", "val/loss": "", "accuracy": "share of pairs", "gap": "score",
    "objective/scores": "score", "eval/gold": "gold", "objective/kl_exact": "nats a response",
    "objective/entropy": "nats a response", "response_length": "tokens", "rewards/accuracies": "share of pairs",
    "rewards/margins": "beta x nats", "logps/chosen": "nats a response", "logps/rejected": "nats a response",
    "val/rewards/accuracies": "share of pairs", "val/rewards/margins": "beta x nats", "z0": "nats a response",
    "policy/clipfrac_avg": "share of tokens", "val/explained_variance": "share of the variance",
}  # fmt: skip


def draw_curves(_, runs, path: Path):
    """The main metrics of any runs over their steps, a panel for each metric that two steps or more have."""
    plt = pyplot()
    logs = {name: read_metrics(run) for name, run in short_names(runs).items()}
    series = {}
    for metric in CURVES:
        for name, rows in logs.items():
            line = [(row["step"], row[metric]) for row in rows if metric in row and "step" in row]
            if len(line) > 1:
                series.setdefault(metric, {})[name] = np.array(line).T
    if not series:
        raise ValueError(f"the metrics of {', '.join(logs)} hold none of {', '.join(CURVES)}")
    columns = min(3, len(series))
    shape = -(-len(series) // columns), columns
    size = (4.1 * columns, 2.6 * shape[0] + 0.4)
    figure, axes = plt.subplots(*shape, figsize=size, layout="constrained", squeeze=False)
    colors = {name: f"C{i % 10}" for i, name in enumerate(logs)}
    for axis, (metric, lines) in zip(axes.flat, series.items()):
        for name, (steps, values) in lines.items():
            smoothed = smooth(values, max(1, len(values) // 50))
            axis.plot(steps, values, color=colors[name], alpha=0.2, linewidth=0.7)
            axis.plot(steps, smoothed, color=colors[name], linewidth=1.3)
        axis.set_title(metric, fontsize=10)
        axis.set_ylabel(CURVES[metric], fontsize=8)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step", fontsize=8)
    for axis in list(axes.flat)[len(series) :]:
        axis.axis("off")
    handles = [plt.Line2D([], [], color=color) for color in colors.values()]
    figure.legend(handles, list(colors), loc="outside lower center", ncols=5, frameon=False)
    finish(plt, figure, path)


# ---------------------------------------------------------------------------------------------------- reward models


def draw_reward(report: dict, _, path: Path):
    """The reliability diagram, before and after the temperature, and the accuracy by difference of length."""
    plt = pyplot()
    figure, (diagram, bars) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    diagram.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1)
    for name, color in (("before", "tab:orange"), ("after", "tab:blue")):
        confidence, accuracy, share = np.array(report["reliability"][name]).T
        label = f"{name} temperature {report['temperature']:.2f}: ECE {report[name]['ece']:.3f}"
        diagram.plot(confidence, accuracy, color=color, linewidth=1)
        diagram.scatter(confidence, accuracy, s=10 + 400 * share, color=color, alpha=0.6, label=label)
    diagram.set(xlabel="predicted P(first is preferred)", ylabel="share preferred")
    diagram.set_title("Reliability on held-out pairs")
    diagram.legend(loc="upper left")
    rows = report["accuracy_by_length_difference"]
    bars.bar(range(len(rows)), [row["accuracy"] for row in rows], color="tab:blue")
    bars.set_xticks(range(len(rows)), [f"{row['chosen_longer_by']}\n{row['pairs']} pairs" for row in rows], fontsize=8)
    bars.axhline(report["accuracy"], color="0.3", linewidth=1, label=f"all pairs: {report['accuracy']:.3f}")
    longer = report["longer_wins"]
    bars.axhline(longer, color="tab:red", linestyle=":", label=f"longer wins: {longer:.3f}")
    bars.set(xlabel="tokens by which the chosen side is longer", ylabel="accuracy", ylim=(0, 1), title="Accuracy")
    bars.legend(loc="lower right")
    finish(plt, figure, path)


# ---------------------------------------------------------------------------------------------------- main


PICTURES = {
    "lengths": draw_lengths, "conduct": draw_conduct, "frontier": draw_frontier,
    "overoptimization": draw_overoptimization, "curves": draw_curves,
    "reward": draw_reward,
}  # fmt: skip


def add_section(folder: Path, name: str, tables):
    """Show a picture in the folder's report.md, below its tables, in the place of an older one of that name."""
    report, title = folder / "report.md", name.capitalize()
    text = report.read_text() if report.is_file() else ""
    text = re.sub(rf"\n*## {title}\n.*?(?=\n\n## |\Z)", "", text, flags=re.S).rstrip("\n")
    report.write_text("\n\n".join([*filter(None, [text]), f"## {title}", *tables, f"![{name}]({name}.png)"]) + "\n")


def draw(name: str, report: dict, runs, out: Path):
    """A picture and what report.md says of it."""
    tables = PICTURES[name](report, runs, out / f"{name}.png") or []
    print("\n\n".join([*tables, f"wrote {out}/{name}.png"]))
    add_section(out, name, tables)


def shown(report: dict) -> list[str]:
    """The pictures that a report has the numbers for; of a frontier two points at least, of a curve over n four."""
    has = lambda name: any(name in row for row in report["models"].values())
    there = {
        "lengths": has("lengths"),
        "conduct": has("conduct"),
        "frontier": sum(map(len, frontier_of(report).values())) > 1,
        "overoptimization": len((report["best_of"] or {}).get("n", ())) > 3,
    }
    return [name for name, yes in there.items() if yes]


def main(config: Config):
    name, folders = (config.what[0], config.what[1:]) if config.what[0] in PICTURES else (None, config.what)
    if name in ("overoptimization", "curves"):
        out = config.out or Path("out/report")
        draw(name, read_summary(out) if (out / "summary.json").is_file() else {}, folders, out)
        return
    for folder in folders:
        report = read_reward_report(folder) if name == "reward" else read_summary(folder)
        for picture in [name] if name else shown(report):
            draw(picture, report, (), config.out or Path(folder))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
