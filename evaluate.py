"""Which model is better, by how much, and what it paid for it: a table, a file, and two pictures.

Every model folder answers the same held-out prompts, sampled and greedily. A judge (gold on the toy world, or any
module:function) rates the answers, KL to the reference says how far the model moved, intervals say what is noise.

    python evaluate.py                                       # out/sft and out/ppo on data/toy/prompts-heldout.jsonl
    python evaluate.py --models out/a out/b --ref out/a --data mine.jsonl --judge mine:stars --out out/mine
    python evaluate.py --runs out/ppo-weak out/ppo           # also draws proxy and gold against KL along these PPO runs
    python evaluate.py --rewards out/reward out/reward-mean  # reward models beside each other

Writes out/report: summary.json, report.md (table and samples side by side), overoptimization.png.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    models: tuple[str, ...] = ("out/sft", "out/ppo")  # model folders, a row each, named by their last part
    ref: str = "out/sft"  # reference of the KL, and the start of "distance closed"
    data: str = "data/toy/prompts-heldout.jsonl"  # prompts
    judge: str = (
        "toy:parts"  # module:function (prompts, responses, rows) -> floats, or dicts of named parts with "gold"
    )
    out: Path = Path("out/report")
    samples: int = 500  # prompts answered by each model
    batch_size: int = 125
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a response may have
    temperature: float = 1.0  # of the sampled answers (greedy ones stand beside them)
    runs: tuple[str, ...] = ()  # PPO run folders whose proxy and gold are drawn against the KL
    rewards: tuple[str, ...] = ()  # reward-model folders: only put their reports into one table
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 1


@partial(jax.jit, static_argnames=("temperature",))
def sequence_kl(model, ref, prompts, prompt_mask, responses, mask, temperature: float):
    """KL(model || ref) of each response's course, in nats a sequence (B,): the exact KL of the next-token distributions
    summed over the states that the response visits. Its mean over samples of the model is the KL of whole responses
    (chain rule), with far less noise than the sampled log-ratio."""
    tokens, segments = jnp.concatenate([prompts, responses], 1), jnp.concatenate([prompt_mask, mask], 1)
    states = slice(prompts.shape[1] - 1, -1)
    hidden, ref_hidden = model(tokens, segments)[:, states], ref(tokens, segments)[:, states]
    return (gpt.head_kl(model, hidden, ref, ref_hidden, temperature or 1.0) * mask).sum(1)


def answer(model, ref, prompts: gpt.Batches, tokenizer, judge, temperature: float, config: Config) -> dict:
    """Per-answer arrays of every measure, and the texts."""
    columns, texts = {}, []
    for i, (batch, new) in enumerate(prompts.once()):
        if i * config.batch_size >= config.samples:
            break
        new = min(new, config.samples - i * config.batch_size)
        placed = gpt.put_batch(batch)
        queries, query_mask = placed["tokens"], placed["segments"]
        out = gpt.generate(
            model, queries, query_mask, jax.random.key(config.seed), config.response_length, eos=tokenizer.eos_id,
            pad=tokenizer.pad_id, temperature=temperature, rows=jnp.arange(len(queries)) + i * config.batch_size,
        )  # fmt: skip
        kl = sequence_kl(model, ref, queries, query_mask, out.tokens, out.mask, temperature)
        tokens, mask, kl = gpt.to_numpy((out.tokens, out.mask, kl))
        questions = [tokenizer.decode(ids[m > 0]) for ids, m in zip(batch["tokens"], batch["segments"])]
        answers = [tokenizer.decode(ids[m > 0]) for ids, m in zip(tokens, mask)]
        rated = judge(questions, answers, prompts.rows(batch))
        rated = [r if isinstance(r, dict) else {"gold": float(r)} for r in rated]
        more = {"kl": kl, "length": mask.sum(1), "eos": ((tokens == tokenizer.eos_id) & (mask > 0)).any(1)}
        for name, values in more.items():
            columns.setdefault(name, []).extend(np.asarray(values, float)[:new])
        for name in rated[0]:
            columns.setdefault(name, []).extend(r[name] for r in rated[:new])
        texts += list(zip(questions, answers, (r["gold"] for r in rated)))[:new]
    return {name: np.asarray(values) for name, values in columns.items()} | {"texts": texts}


def bootstrap_interval(values, seed: int = 0, draws: int = 2000) -> list[float]:
    """95% interval of the mean by resampling."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def summarize(columns: dict) -> dict:
    """Means, counts and intervals of the measures."""
    numbers = {name: values for name, values in columns.items() if name != "texts"}
    means = {name: float(values.mean()) for name, values in numbers.items()}
    intervals = {name: bootstrap_interval(values) for name, values in numbers.items()}
    return means | {"count": len(numbers["gold"]), "intervals": intervals}


def table(summary: dict) -> str:
    """Markdown: one row a model."""
    apart = ("gold", "kl", "length", "eos", "count", "intervals", "greedy", "folder", "closed")
    parts = [name for name in first(summary) if name not in apart]  # of the judge
    head = ["model", "gold", "closed", "greedy gold", *parts, "KL", "length", "ended"]
    rows = [head, ["---"] * len(head)]
    for name, s in summary.items():
        low, high = s["intervals"]["gold"]
        closed = "" if s["closed"] is None else f"{s['closed']:.0%}"
        row = [name, f"{s['gold']:.3f} [{low:.3f}, {high:.3f}]", closed, f"{s['greedy']['gold']:.3f}"]
        row += [f"{s[p]:.3f}" for p in parts] + [f"{s['kl']:.2f}", f"{s['length']:.1f}", f"{s['eos']:.1%}"]
        rows.append(row)
    return markdown(rows)


def first(summary):
    return next(iter(summary.values()))


def samples_table(answers: dict, count: int = 8) -> str:
    """The same prompts, each model's sampled answer and its gold."""
    names = list(answers)
    lines = ["| prompt | " + " | ".join(names) + " |", "|" + " --- |" * (len(names) + 1)]
    clean = lambda text: " ".join(text.split()).replace("|", "\\|")
    for i in range(count):
        cells = [f"{clean(answers[n][i][1])} ({answers[n][i][2]:+.2f})" for n in names]
        lines.append("| " + " | ".join([clean(answers[names[0]][i][0]), *cells]) + " |")
    return "\n".join(lines)


def rewards_table(folders) -> str:
    """Markdown: what reward.py reported of each reward model, one row each."""
    names = ["reward model", "accuracy", "clear pairs", "gold correlation", "ECE", "after T", "NLL", "after T", "T"]
    rows = [names, ["---"] * len(names)]
    for folder in folders:
        path = Path(folder) / "report.json"
        if not path.exists():
            raise FileNotFoundError(f"no {path}: python reward.py --out {folder} writes it, given held-out pairs")
        r = json.loads(path.read_text())
        low, high = r["accuracy_interval"]
        gold = r.get("gold", {})
        of_gold = [f"{gold[k]:.3f}" if k in gold else "" for k in ("agreement_on_clear_pairs", "correlation")]
        numbers = [r[side][name] for name in ("ece", "nll") for side in ("before", "after")]
        row = [Path(folder).name, f"{r['accuracy']:.3f} [{low:.3f}, {high:.3f}]", *of_gold]
        rows.append([*row, *(f"{x:.3f}" for x in numbers), f"{r['temperature']:.2f}"])
    return markdown(rows)


def markdown(rows) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw_runs(runs, path: Path):
    """Proxy and gold along PPO runs against the distance sqrt(KL) (Gao et al. 2022, arXiv:2210.10760, figure 1)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.2), layout="constrained")
    for run in runs:
        curves = read_run(run)
        for axis, name in zip(axes, ("score", "gold")):
            axis.plot(np.sqrt(np.maximum(curves["kl"], 0)), curves[name], label=Path(run).name)
    axes[0].set(
        title="What the policy optimises: the reward model", ylabel="score (standard deviations of SFT's samples)"
    )
    axes[1].set(title="What people wanted: the gold judge", ylabel="gold")
    for axis in axes:
        axis.set_xlabel("distance from the reference, sqrt(KL in nats a sequence)")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def runs_table(runs) -> str:
    """Markdown: where each run's smoothed gold was highest and where it ended. Proxy up and gold down between the two
    is over-optimisation."""
    rows = [["run", "at", "iteration", "KL", "score", "gold"], ["---"] * 6]
    for run in runs:
        curves = read_run(run)
        ends = {"start": 0, "highest gold": int(curves["gold"].argmax()), "end": len(curves["gold"]) - 1}
        for name, i in ends.items():
            numbers = (f"{curves[k][i]:.2f}" for k in ("kl", "score", "gold"))
            rows.append([Path(run).name, name, str(i), *numbers])
    return markdown(rows)


def read_run(run) -> dict:
    """Smoothed curves along a PPO run: KL in nats a sequence, score (the proxy), gold."""
    names = {"kl": "objective/kl_exact", "score": "objective/scores", "gold": "eval/gold"}
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    if not rows or any(name not in rows[0] for name in names.values()):
        raise ValueError(f"{run} is not a PPO run that was watched by a judge (--monitor toy:parts)")
    return {short: smooth([row[name] for row in rows]) for short, name in names.items()}


def smooth(values, width: int = 5):
    """Running mean of the last `width` values, of fewer at the start."""
    values = np.asarray(values, float)
    return np.array([values[max(0, i - width + 1) : i + 1].mean() for i in range(len(values))])


def main(config: Config):
    if config.rewards:
        text = rewards_table(config.rewards)
        config.out.mkdir(parents=True, exist_ok=True)
        gpt.write_atomic(config.out / "rewards.md", lambda file: Path(file).write_text(text + "\n"))
        print(f"{text}\nwrote {config.out}/rewards.md")
        return
    gpt.start(config.seed)
    dtype = gpt.compute_dtype(config.dtype)
    ref, tokenizer = gpt.load(config.ref)
    ref = gpt.shard(gpt.cast(ref, dtype))
    judge = gpt.load_function(config.judge)
    size = min(config.batch_size, config.samples)
    prompts = gpt.Batches(config.data, "prompts", tokenizer, size, config.prompt_length, config.seed, buckets=1)
    summary, answers = {}, {}
    for folder in config.models:
        model, theirs = gpt.load(folder)
        gpt.check_same_tokenizer(tokenizer, theirs, config.ref, folder)
        model, name = gpt.shard(gpt.cast(model, dtype)), Path(folder).name
        sampled = answer(model, ref, prompts, tokenizer, judge, config.temperature, config)
        greedy = answer(model, ref, prompts, tokenizer, judge, 0.0, config)
        summary[name] = summarize(sampled) | {"greedy": summarize(greedy), "folder": str(folder)}
        answers[name] = sampled["texts"]
    start = summary.get(Path(config.ref).name, first(summary))["gold"]
    for s in summary.values():
        s["closed"] = (s["gold"] - start) / (1 - start) if start < 1 else None  # of the distance to a perfect 1

    config.out.mkdir(parents=True, exist_ok=True)
    gpt.write_json(config.out / "summary.json", summary)
    text = f"# {config.samples} held-out prompts, temperature {config.temperature:g}\n\n{table(summary)}\n\n"
    text += f"`closed`: share of the distance from {Path(config.ref).name} to 1. KL in nats a sequence.\n\n"
    text += f"## The same prompts\n\n{samples_table(answers, min(8, config.samples))}\n"
    if config.runs:
        text += f"\n## Along the runs\n\n![proxy and gold](overoptimization.png)\n\n{runs_table(config.runs)}\n"
        draw_runs(config.runs, config.out / "overoptimization.png")
    gpt.write_atomic(config.out / "report.md", lambda file: Path(file).write_text(text))
    print(table(summary))
    if config.runs:
        print(runs_table(config.runs))
    print(f"wrote {config.out}: summary.json, report.md" + (", overoptimization.png" if config.runs else ""))


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
