"""A reward model without training: a linear head on what a frozen model computes of preference pairs, a "linear probe".

    min over w of  sum_i weight_i (y_i - w . (h(x_i, chosen) - h(x_i, rejected)))^2 + ridge |w|^2

h is what one layer of the model computes, at the answer's last token or on average over its tokens; y is 2 p - 1, with
p = P(chosen is better), 1 unless a row has a soft label. Least squares on labels of +-1 has a closed form, and its
direction is that of Fisher's discriminant.

Details that matter:
1. The model reads every pair once, and its features are kept in features/ of the run folder. All layers, both readings
   and nine ridges are tried on them. Chosen are those whose heads best predict pairs that they were not fitted on.
2. Pairs of one dialogue are left out together (`dialogues`), or equal prompts would tell each other's answers. For
   least squares that is exact without a second fit (`leave_out`).
3. What is written is a reward model of the layers up to the one that was chosen: faster than the whole model, and read
   like any other by every script. Its scores are normalised as those of reward.py are.

    python probe.py                                              # out/base + data/toy/pairs.jsonl -> out/probe
    python probe.py --init models/smollm2 --data data/hh/pairs.jsonl --out out/hh-probe --length 384 --suffix ""
    python reward.py --report out/probe                          # how far to trust it: the report, on held-out pairs
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize_scalar

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/base"  # the frozen model: a folder or a Hub name
    data: tuple[str, ...] = ("data/toy/pairs.jsonl",)  # preference pairs; name:weight mixes several
    out: Path = Path("out/probe")  # run folder
    batch_size: int = 32  # pairs that are read at a time; those of an epoch that fill no batch are left out
    length: int = 48  # tokens of prompt and completion together, at most
    suffix: str = "\n\nJudge:"  # text put in EOS's place, at whose end the last token is read; "" reads at EOS

    normalize_with: str | None = "auto"  # its samples get mean 0, std 1 (auto: --init, toy: out/sft); None: leave
    normalize_data: str | None = None  # its prompts (None: prompts.jsonl beside --data)
    normalize_samples: int = 512  # how many
    response_length: int = 24  # tokens a sampled response may have

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0  # of the order of pairs, and of samples
    overwrite: bool = False  # empty --out first; features of the same pairs and weights are kept
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


# ---------------------------------------------------------------------------------------------------- features


POOLS = ("last", "answer")


@partial(jax.jit, static_argnames="dtype")
def layer_features(body: gpt.GPT, batch, dtype):
    """(B, L, 2, D): what a head could read of each of B pairs after each of L layers and the last norm, at the last
    token and on average over the answer's tokens; the chosen answer's minus the rejected one's. Both stand in one row
    behind their prompt (`gpt.fork`)."""
    body = gpt.cast(body, dtype)
    segments, rows = batch["segments"], jnp.arange(len(batch["tokens"]))[:, None]
    whole, answer = gpt.fork_sides(segments, batch["mask"], 2)
    answer = answer.astype(jnp.float32)
    last = segments.shape[1] - 1 - jnp.argmax(jnp.flip(whole, -1), -1)  # (B, 2)
    x, rope = body.embed(batch["tokens"], gpt.segment_positions(segments, forked=True))
    visible = gpt.causal_mask(segments, forked=True)

    def layer(x, block):
        x = gpt.shard_batch(block(x, rope, visible)[0])
        hidden = body.norm(x).astype(jnp.float32)
        mean = jnp.einsum("bst,btd->bsd", answer, hidden) / answer.sum(-1, keepdims=True)
        read = jnp.stack([hidden[rows, last], mean], 2)  # (B, 2, pools, D)
        return x, read[:, 0] - read[:, 1]

    return jnp.moveaxis(jax.lax.scan(layer, x, body.blocks)[1], 0, 1)


# ---------------------------------------------------------------------------------------------------- the head


RIDGES = 10.0 ** np.arange(-2, 2.5, 0.5)  # times the number of pairs


def dialogues(prompts: list[tuple]) -> np.ndarray:
    """(N,) the number of the dialogue that each prompt, a tuple of ids, belongs to: prompts that are equal, or that go
    on from one of the others, are of one dialogue."""
    found, head, number = np.zeros(len(prompts), int), None, -1
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):  # what goes on from a prompt follows it
        if head is None or prompts[i][: len(head)] != head:
            head, number = prompts[i], number + 1
        found[i] = number
    return found


def leave_out(x, y, weight, groups, ridges):
    """(len(ridges), N): what a ridge regression that was fitted without a pair's group says of it: x (N, D), y, weight,
    groups (N,).

        min over w of  sum_i weight_i (y_i - w x_i)^2 + ridge |w|^2,    H = X (X'X + ridge)^-1 X'

    with rows times sqrt(weight). Without group G its residuals are (I - H_GG)^-1 (y - H y)_G: exact, with no fit a
    group (for groups of one: Hastie, Tibshirani and Friedman, The Elements of Statistical Learning, eq. 7.64).
    """
    root = np.sqrt(weight)
    x, y = x * root[:, None], y * root
    squares, axes = np.linalg.eigh(x.T @ x)
    kept = squares > 1e-9 * squares[-1]
    u, squares = x @ axes[:, kept] / np.sqrt(squares[kept]), squares[kept]
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    several = [rows for rows in members if len(rows) > 1]
    said = []
    for ridge in ridges:
        shrink = squares / (squares + ridge)
        residuals = y - u @ (shrink * (u.T @ y))
        without = residuals / (1 - (u * u) @ shrink)
        for rows in several:
            without[rows] = np.linalg.solve(np.eye(len(rows)) - (u[rows] * shrink) @ u[rows].T, residuals[rows])
        said.append((y - without) / root)
    return np.array(said)


def fit_probe(features, y, weight, groups) -> tuple[np.ndarray, dict]:
    """(head (D,), what was chosen): features (N, L, 2, D) of pairs, y (N,) 1 where the first answer is the better one
    and -1 where it is not, weight and groups (N,) as for `leave_out`.

    Each feature is divided by its root mean square over the pairs, which is the same whichever answer is the better
    one. Layer, pooling and ridge have the least negative log-likelihood of pairs that were left out, at the
    temperature that suits these best.
    """
    N, L, pools, _ = features.shape
    rows = []
    for layer, pool in np.ndindex(L, pools):
        x, _ = scaled(features[:, layer, pool])
        for ridge, said in zip(RIDGES, leave_out(x, y, weight, groups, RIDGES * N)):
            gaps = said * np.sign(y)
            nll = least_nll(gaps)
            rows.append(dict(layer=layer + 1, pool=POOLS[pool], ridge=ridge, nll=nll, accuracy=np.mean(gaps > 0)))
    best = min(rows, key=lambda row: row["nll"])
    x, scale = scaled(features[:, best["layer"] - 1, POOLS.index(best["pool"])])
    w = np.linalg.solve((x.T * weight) @ x + best["ridge"] * N * np.eye(x.shape[1]), (x.T * weight) @ y)
    by_layer = [min((r for r in rows if r["layer"] == n + 1), key=lambda row: row["nll"]) for n in range(L)]
    return w / scale, best | {"layers": by_layer}


def scaled(x) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, D) divided by their root mean squares (D,), and these."""
    x = x.astype(np.float64)
    scale = np.sqrt((x * x).mean(0)) + 1e-6
    return x / scale, scale


def least_nll(gaps) -> float:
    """Mean -log sigmoid(gap / T) of gaps (N,), at the temperature T that suits them best. Scores of a least squares fit
    have no scale of their own."""
    loss = lambda log_t: np.mean(np.logaddexp(0, -gaps * np.exp(-log_t)))
    return float(minimize_scalar(loss, bounds=(np.log(0.01), np.log(100)), method="bounded").fun)


# ---------------------------------------------------------------------------------------------------- main


def gather_features(run: gpt.Run, body: gpt.GPT, batches: gpt.Batches, config: Config) -> np.ndarray:
    """`layer_features` of all batches of the run, kept in features/ of the run folder: a run that was stopped, or a
    later one on the same pairs and weights, does not compute them again."""
    folder, size = run.out / "features", batches.batch_size
    key = [batches.hashes, gpt.weights_hash(gpt.find_folder(config.init)), batches.length, config.suffix, config.seed]
    key += [size, run.total, config.dtype]
    shape = (run.total * size, body.config.layers, len(POOLS), body.config.dim)
    state = json.loads((folder / "state.json").read_text()) if (folder / "state.json").is_file() else {}
    done = state["done"] if state.get("key") == key else 0
    folder.mkdir(exist_ok=True)
    features = np.lib.format.open_memmap(folder / "pairs.npy", "r+" if done else "w+", np.float16, shape)
    stream = batches.stream(done, run.total)
    for step in run.steps(done):
        names = ("tokens", "segments", "mask")
        batch = {name: x for name, x in next(stream).items() if name in names}
        found = layer_features(body, gpt.put_batch(batch), gpt.compute_dtype(config.dtype))
        features[step * size : (step + 1) * size] = gpt.to_numpy(found)
        run.log(step, {"pairs": (step + 1) * size})
        features.flush()
        gpt.write_json(folder / "state.json", {"key": key, "done": step + 1})
        if run.must_stop:
            raise KeyboardInterrupt  # the same command with --overwrite goes on from here
    return features


def normalize(model: gpt.ScoreModel, tokenizer, config: Config, key, base=None) -> gpt.ScoreModel:
    """The model, so scaled and shifted that its scores of the samples of --normalize-with have mean 0 and standard
    deviation 1. `base` is what its body is an adapter on, None where it is none."""
    prompts, settings = load_prompts(config, tokenizer), (config.normalize_samples, config.response_length)
    return gpt.normalize_scores(model, base, config.normalize_with, prompts, tokenizer, key, *settings)


def load_prompts(config: Config, tokenizer) -> gpt.Batches:
    """The prompts of --normalize-data that leave room for a response."""
    longest = config.length - config.response_length
    prompts = gpt.Batches(config.normalize_data, "prompts", tokenizer, 128, longest, config.seed)
    prompts.batch_size = min(prompts.batch_size, config.normalize_samples, sum(prompts.sizes))
    return prompts


def suffix_ids(config: Config, tokenizer) -> tuple:
    return tuple(tokenizer.encode(config.suffix, after="\n")) if config.suffix else ()


def resolve(config: Config) -> Config:
    """The settings that follow others: whose samples scores are normalised on, and which prompts these answer. The
    toy's pretrained model continues texts, and cannot answer: there it is the SFT model."""
    if config.normalize_with == "auto":
        config = replace(config, normalize_with="out/sft" if config.init == Config.init else config.init)
    first = Path(gpt.parse_sources(config.data)[0][0])
    return replace(config, normalize_data=config.normalize_data or str(first.with_name("prompts.jsonl")))


def main(config: Config):
    gpt.start(config.seed)
    if jax.process_count() > 1:
        raise ValueError("probe.py fits its head in one process: start one alone")
    gpt.check_batch_size(config.batch_size)
    config = resolve(config)
    body, tokenizer = gpt.load_policy(config.init)
    suffix = suffix_ids(config, tokenizer)
    if config.normalize_with:  # what is needed after the features is there before them
        gpt.check_tokenizer_of(config.normalize_with, tokenizer, config.init)
        load_prompts(config, tokenizer)
    batches = gpt.Batches(
        config.data, "pairs", tokenizer, config.batch_size, config.length, config.seed, suffix=suffix,
        skip_bad=config.skip_bad_rows, forked=True,
    )  # fmt: skip
    gpt.check_context(body, batches)
    steps = batches.plan()
    run = gpt.Run(batches.hashes, **vars(config) | dict(steps=steps))
    # 1 what the frozen model computes of every pair
    features = gather_features(run, gpt.shard(body), batches, config)
    # 2 layer, reading and head
    rows = [batches(step) for step in range(steps)]
    column = lambda name: np.concatenate([row[name] for row in rows])
    prompts = [tuple(ids[part == 1].tolist()) for row in rows for ids, part in zip(row["tokens"], row["segments"])]
    told = column("weight") > 0  # what weighs nothing says nothing
    y, weight, groups = (x[told] for x in (2 * column("label_p") - 1, column("weight"), dialogues(prompts)))
    if not y.any():
        raise ValueError("no pair says which answer is better: all have weight 0 or label_p 1/2. No model was written")
    head, chosen = fit_probe(features[told], y, weight, groups)
    layers = chosen["layer"]
    print(f"of {len(y):,} pairs, those left out: accuracy {chosen['accuracy']:.3f} with the head on layer "
          f"{layers} of {body.config.layers}, pool {chosen['pool']}, ridge {chosen['ridge']:g}")  # fmt: skip
    gpt.write_json(config.out / "probe.json", chosen)
    # 3 a reward model of the layers below it
    blocks = jax.tree.map(lambda x: x[:layers], body.blocks)
    body = replace(body, blocks=blocks, config=replace(body.config, layers=layers))
    model = gpt.ScoreModel(body, jnp.asarray(head, jnp.float32), None, jnp.zeros(()), chosen["pool"], suffix)
    model = gpt.shard(model)
    if config.normalize_with:
        model = normalize(model, tokenizer, config, jax.random.fold_in(jax.random.key(config.seed), 1))
    run.finish(model, tokenizer)
    print(f"held-out pairs: python reward.py --report {config.out}")


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
