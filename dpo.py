"""DPO: preference pairs straight into a policy, with no reward model and no sampling.

    h = (log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l))          sums over the completion's tokens and EOS
    dpo      L = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)       e = 0: Rafailov et al. 2023
    robust   L = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e)

Rafailov et al. 2023 (arXiv:2305.18290, eq. 7); e > 0: Mitchell's note on conservative DPO (eq. 3); robust: Chowdhury et
al. 2024 (arXiv:2403.00409, eq. 12). The last two are different losses: cDPO's has its minimum where beta h is
logit(1 - e) and pulls larger margins back, the robust one estimates the clean labels' loss and has no lower bound.

Details that matter:
1. Sums, not means, over a completion's tokens: the theory is about the probability of the whole response.
2. The log-prob of the chosen answers usually falls in training; that of the rejected ones falls faster. The loss sees
   only their difference, so this is expected; both are logged (`logps/chosen`, `logps/rejected`).
3. The first step's loss is ln 2: policy and reference are the same model under the same forward pass.
4. --precompute-ref writes the reference's log-probs beside the token cache, once for each model, tokenizer, length and
   file, and the reference leaves memory.
5. Both answers continue one computation of their prompt, and the head works on the answers alone; log-probs and
   gradients are those of two whole rows (--no-share-prefix).
6. --rounds N goes on with pairs of its own: sample candidates from the current policy, have them scored, train on best
   against worst (iterative DPO, Xu et al. 2023, arXiv:2312.16682). The reference stays the first one, so that the
   KL that beta prices is to the model you started from.

    python dpo.py                                                            # out/sft + data/toy/pairs.jsonl -> out/dpo
    python dpo.py --rounds 3 --reward out/reward --out out/dpo-rounds        # then two rounds on pairs of its own
    python dpo.py --data none --rounds 4 --reward mine:judge --out out/dpo-own
    python dpo.py --init out/hh-sft --data data/hh/pairs.jsonl --out out/hh-dpo --length 512 --lr 1e-6 --beta 0.1
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    init: str = "out/sft"  # policy to start from
    ref: str | None = None  # frozen reference, of the same tokenizer (default: --init)
    data: tuple[str, ...] = ("data/toy/pairs.jsonl",)  # preference pairs; name:weight mixes several; none: rounds alone
    heldout: str | None = None  # pairs for validation (default: NAME-heldout.jsonl beside --data, if there)
    out: Path = Path("out/dpo")  # run folder
    steps: int | None = None  # optimiser steps on --data (default: one epoch)
    batch_size: int = 32  # pairs a step
    micro_batches: int = 1  # gradient accumulation: parts that a batch is computed in
    length: int = 48  # tokens of prompt and completion together, at most
    lr: float = 3e-4  # peak learning rate
    warmup: int = 10  # steps of linear warm-up; then linear to 0
    clip_norm: float = 1.0  # of the global gradient

    kind: Literal["dpo", "robust"] = "dpo"
    beta: float = 0.5  # price of one nat of KL to the reference; the larger, the closer policy and reference stay
    label_smoothing: float = 0.0  # share of labels taken to be wrong (e above)
    precompute_ref: bool = False  # reference log-probs from disk, computed there first where they are missing

    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    rounds: int = 1  # 1: --data alone. More: each further round on fresh pairs of the current policy
    reward: str = "out/reward"  # who labels them: a reward-model folder, or module:function
    prompts: str = "data/toy/prompts.jsonl"  # what the candidates answer
    round_steps: int = 60  # optimiser steps of each further round
    round_prompts: int = 2048  # prompts of each
    candidates: int = 4  # answers a prompt; the best and the worst become a pair
    prompt_length: int = 16  # longer prompts are left out, and counted
    response_length: int = 24  # tokens a candidate may have
    keep_truncated: bool = False  # candidates that did not end by then count too (for models that rarely end)

    share_prefix: bool = True  # compute a pair's prompt once for both answers
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False  # recompute activations in the backward pass
    seed: int = 0
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 100  # steps between checkpoints
    eval_every: int = 100  # steps between validations
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping
    track: Literal["wandb", "tensorboard", "trackio"] | None = None


class State(NamedTuple):
    policy: gpt.GPT | gpt.Adapter
    opt_state: tuple


# ---------------------------------------------------------------------------------------------------- loss


def dpo_loss(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0, kind: str = "dpo",
    weight=None,
):  # fmt: skip
    """The losses of the box above from summed log-probs, each (B,): -> ((B,), metrics).

    A batch's loss is the mean of its `losses`, which the caller takes; `weight` (B,) weighs the means in metrics.
    """
    chosen_rewards = beta * (policy_chosen - ref_chosen)  # implicit rewards, up to a function of the prompt
    rejected_rewards = beta * (policy_rejected - ref_rejected)
    margins = chosen_rewards - rejected_rewards
    right, wrong = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    if kind == "dpo":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif kind == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    else:
        raise ValueError(f"unknown kind {kind!r}: dpo or robust")
    mean = partial(gpt.weighted_mean, weight=jnp.ones_like(margins) if weight is None else weight)
    return losses, {
        "rewards/chosen": mean(chosen_rewards),
        "rewards/rejected": mean(rejected_rewards),
        "rewards/margins": mean(margins),
        "rewards/accuracies": mean(margins > 0),  # 0 at the first step, where all margins are 0
        "logps/chosen": mean(policy_chosen),
        "logps/rejected": mean(policy_rejected),
    }


def pair_logprobs(model, batch, config: Config):
    """log p of both completions (B, 2) of a batch of pairs, in one forward pass."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    return gpt.completion_logprobs(model, batch, config.remat)[0]


def add_ref(ref, batch, config: Config):
    """The batch with the reference's log-probs, unless they came with it."""
    return batch if ref is None else batch | {"ref_logps": pair_logprobs(ref, batch, config)}


def forward(policy, batch, config: Config):
    """(loss, metrics) of a batch of pairs with the reference's log-probs, batch["ref_logps"] (B, 2)."""
    chosen, rejected = pair_logprobs(policy, batch, config).T
    ref_chosen, ref_rejected = batch["ref_logps"].T
    options = dict(
        beta=config.beta, label_smoothing=config.label_smoothing, kind=config.kind, weight=batch["weight"]
    )  # fmt: skip
    losses, metrics = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **options)
    swapped, _ = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, **options)
    p = batch["label_p"]  # a soft label p = P(chosen is better), 1 where a row has none: the pair both ways round
    loss = gpt.weighted_mean(p * losses + (1 - p) * swapped, batch["weight"])
    return loss, metrics | {"loss": loss}


def make_train_step(optimizer, config: Config):
    @partial(jax.jit, donate_argnums=0)
    def train_step(state: State, ref, batch, base=None):
        batch = add_ref(ref, batch, config)
        count = lambda batch: batch["weight"].sum()
        loss_fn = lambda policy, batch: forward(gpt.attach(policy, base), batch, config)
        *state, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
        return State(*state), metrics

    return train_step


# ---------------------------------------------------------------------------------------------------- reference


def load_ref(config: Config, base=None):
    """The frozen reference: the model of --ref, else that of --init, which adapters hold already."""
    if base is not None and not config.ref:
        return base
    return gpt.load_frozen(config.ref or config.init, config.dtype)


def precompute(batches: gpt.Batches, config: Config) -> list[np.ndarray]:
    """The reference's log-probs of every pair, (rows, 2) for each source: computed once, kept in the token cache.

    The cache has a folder for each file, tokenizer and length; the name below says which weights and which precision.
    """
    folder = gpt.find_folder(config.ref or config.init)
    weights = gpt.weights_hash(folder)
    files = [data.folder / f"ref-{weights}-{gpt.compute_dtype(config.dtype).__name__}.npy" for data in batches.sets]
    if not all(file.exists() for file in files):
        ref, step = load_ref(config), jax.jit(partial(pair_logprobs, config=config))
        tables = [np.zeros((len(data), 2), np.float32) for data in batches.sets]
        bar = gpt.progress(total=sum(map(len, tables)), desc="reference log-probs", unit=" pairs")
        for batch, new in batches.once():
            logps = gpt.to_numpy(step(ref, place(batch, batches, None, config)))
            for (source, row), pair in zip(batch["index"][:new], logps):
                tables[source][row] = pair
            bar.update(new)
        bar.close()
        for file, table in zip(files, tables) if jax.process_index() == 0 else ():
            gpt.write_atomic(file, partial(write_array, table=table))
        gpt.barrier("reference")
    return [np.load(file, mmap_mode="r") for file in files]


def write_array(path, table):
    with open(path, "wb") as file:
        np.save(file, table)


def place(batch, batches, tables, config: Config):
    """The batch on the devices, a pair's prompt once (unless --no-share-prefix), with its rows' reference log-probs
    where they are precomputed."""
    if config.share_prefix:
        batch = gpt.split_prompt(batch, config.length, batches.pad)
    if tables is not None:
        batch = batch | {"ref_logps": np.stack([tables[source][row] for source, row in batch["index"]])}
    return gpt.put_batch(batch)


# ---------------------------------------------------------------------------------------------------- rounds


def load_labeller(config: Config, tokenizer):
    """(batch, generation, texts, rows) -> scores (B,): a reward-model folder or module:function."""
    if ":" in config.reward:
        function = gpt.load_function(config.reward)
        own = gpt.own_rows
        ask = lambda texts, rows: gpt.check_scores(function(*map(own, texts), own(rows)), len(own(rows)))
        return lambda batch, generation, texts, rows: gpt.gather_rows(ask(texts, rows))
    model = gpt.load_reward_model(config.reward, tokenizer, config.init, config.dtype)
    return lambda batch, generation, texts, rows: gpt.to_numpy(
        gpt.score(model, batch["tokens"], batch["segments"], generation.tokens, generation.mask, tokenizer.eos_id)
    )


class Candidate(NamedTuple):
    score: float
    text: str
    ended: bool


def sample_candidates(policy, tokenizer, labeller, prompts, host, key, config: Config) -> list[list[Candidate]]:
    """--candidates answers of the current policy to each prompt of a batch, scored. Left out are those that did not end
    (see --keep-truncated) and those with a special token inside, of which their text says nothing.

    Rows hold text: a byte-pair tokenizer may read an answer back as other ids than the policy sampled it in.
    """
    K = config.candidates
    asked = [row for row in prompts.rows(host) for _ in range(K)]  # row r of the batch is K rows from r * K
    batch = gpt.put_batch({name: np.repeat(host[name], K, axis=0) for name in ("tokens", "segments")})
    out = gpt.generate(
        policy, batch["tokens"], batch["segments"], key, config.response_length, eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
    )  # fmt: skip
    sampled = [ids[m > 0].tolist() for ids, m in zip(*gpt.to_numpy((out.tokens, out.mask)))]
    questions, texts = tokenizer.decode_rows(batch["tokens"], batch["segments"]), list(map(tokenizer.decode, sampled))
    scores = labeller(batch, out, (questions, texts), asked).tolist()
    groups = [[] for _ in range(len(asked) // K)]
    for i, (score, text, ids) in enumerate(zip(scores, texts, sampled)):
        ended = ids[-1] == tokenizer.eos_id
        inside = ids[:-1] if ended else ids
        # a character cut in two decodes as U+FFFD, which reads back as tokens that were never sampled
        whole = text.strip() and "\ufffd" not in text
        if whole and not tokenizer.special_ids & set(inside) and (ended or config.keep_truncated):
            groups[i // K].append(Candidate(score, text, ended))
    return groups


def best_against_worst(prompt, candidates: list[Candidate]) -> dict | None:
    """A row of the pairs' format; none where all scores are equal."""
    ranked = sorted(candidates)
    if not ranked or ranked[0].score == ranked[-1].score:
        return None
    sides = {"chosen": ranked[-1], "rejected": ranked[0]}
    row = {"prompt": prompt} | {side: c.text for side, c in sides.items()}
    row |= {f"score_{side}": c.score for side, c in sides.items()}
    return row | {"truncated": [side for side, c in sides.items() if not c.ended]}


def sample_pairs(policy, tokenizer, labeller, round: int, path: Path, config: Config):
    """Best against worst of each prompt's candidates, as the current policy writes them: rows in `path`."""
    prompts = gpt.Batches(
        config.prompts, "prompts", tokenizer, config.batch_size, config.prompt_length, config.seed + round
    )
    rows = []
    bar = gpt.progress(total=config.round_prompts, desc=f"round {round}: candidates", unit=" prompts")
    for i in range(-(-config.round_prompts // config.batch_size)):
        host, key = prompts(i), jax.random.fold_in(jax.random.key(config.seed), round * 1_000_000 + i)
        groups = sample_candidates(policy, tokenizer, labeller, prompts, host, key, config)
        pairs = (best_against_worst(row["prompt"], group) for row, group in zip(prompts.rows(host), groups))
        rows += [pair for pair in pairs if pair]
        bar.update(config.batch_size)
    bar.close()
    if len(rows) < config.batch_size:
        raise ValueError(
            f"round {round}: {len(rows)} of {config.round_prompts} prompts had two usable answers of different score, "
            f"fewer than --batch-size {config.batch_size}: raise --candidates, --round-prompts or --response-length, "
            "or --keep-truncated where the model rarely ends"
        )
    if jax.process_index() == 0:
        gpt.write_rows(path, rows)
    gpt.barrier("pairs")
    print(f"round {round}: {len(rows):,} pairs from {config.round_prompts:,} prompts -> {path}")


# ---------------------------------------------------------------------------------------------------- main


def evaluate(policy, ref, batches: gpt.Batches, tables, eval_step, config: Config, most: int = 20) -> dict:
    """The training metrics on held-out pairs, over the first `most` batches."""
    means = gpt.heldout_means(
        batches, lambda batch: eval_step(policy, ref, place(batch, batches, tables, config)), most
    )
    return {f"val/{name}": value for name, value in means.items()}


def round_at(step: int, first_round: int, config: Config) -> tuple[int, int]:
    """(round, step within it)."""
    if step < first_round:
        return 0, step
    round, at = divmod(step - first_round, config.round_steps)
    return round + 1, at


def check(config: Config):
    gpt.check_batch_size(config.batch_size)
    if not 0 <= config.label_smoothing < 0.5:
        raise ValueError(f"--label-smoothing {config.label_smoothing}: the share of wrong labels is in [0, 0.5)")
    if config.rounds > 1:
        gpt.open_text(config.prompts).close()  # missed now, and not after the first round
    if config.data == ("none",):
        if config.rounds < 2:
            raise ValueError("--data none leaves the policy's own pairs to learn from: give --rounds 2 or more")
        return
    try:
        config.skip_bad_rows or gpt.find_kind(config.data, ("pairs",))
    except gpt.BadRow as error:
        raise ValueError(
            f"{error}. DPO learns from pairs: demonstrations are for sft.py, single answers with a label for "
            "ipo_kto.py --loss kto"
        ) from None


def main(config: Config):
    gpt.start(config.seed)
    check(config)
    policy, tokenizer = gpt.load_policy(config.init)
    gpt.check_reference(tokenizer, config.init, config.ref or config.init)
    load_pairs = partial(
        gpt.Batches, kind="pairs", tokenizer=tokenizer, batch_size=config.batch_size, length=config.length,
        seed=config.seed, skip_bad=config.skip_bad_rows,
    )  # fmt: skip
    batches = None if config.data == ("none",) else load_pairs(config.data)
    heldout = config.heldout or (gpt.heldout_file(config.data) if batches else None)
    heldout = load_pairs(heldout) if heldout else None
    for pairs in filter(None, (batches, heldout)):
        gpt.check_context(policy, pairs)
    labeller = load_labeller(config, tokenizer) if config.rounds > 1 else None

    first_round = (config.steps or batches.steps_per_epoch) if batches else 0
    steps = first_round + (config.rounds - 1) * config.round_steps
    lr = gpt.schedule(config.lr, steps, config.warmup, "linear")
    optimizer = gpt.adamw(lr, clip=config.clip_norm)
    policy, base = gpt.trainable(policy, config.lora_rank, config.dtype, jax.random.key(config.seed))
    state = State(policy, gpt.shard(optimizer.init(policy)))
    train_step = make_train_step(optimizer, config)
    eval_step = jax.jit(lambda policy, ref, batch: forward(policy, add_ref(ref, batch, config), config)[1])

    run = gpt.Run(
        batches.hashes if batches else {config.prompts: gpt.file_hash(config.prompts)},
        **vars(config) | dict(steps=steps),
    )
    state, first = run.restore(state)
    if first == 0:
        for file in config.out.glob("pairs-round-*.jsonl"):  # of the run before
            file.unlink(missing_ok=True)
    ref = None if config.precompute_ref else load_ref(config, base)
    tables_of = lambda batches: precompute(batches, config) if config.precompute_ref and batches else None
    tables, heldout_tables = tables_of(batches), tables_of(heldout)
    for step in run.steps(first):
        round, at = round_at(step, first_round, config)
        if at == 0 or step == first:
            if round:
                pairs = config.out / f"pairs-round-{round}.jsonl"
                if at == 0:  # a run resumed within a round goes on with the pairs it has
                    sample_pairs(gpt.attach(state.policy, base), tokenizer, labeller, round, pairs, config)
                batches = load_pairs(pairs)
                tables = tables_of(batches)
            stream = batches.stream(at, config.round_steps if round else first_round)
        state, metrics = train_step(state, ref, place(next(stream), batches, tables, config), base)
        metrics["lr"] = lr(step)
        if heldout and ((step + 1) % config.eval_every == 0 or step + 1 == steps):
            metrics |= evaluate(gpt.attach(state.policy, base), ref, heldout, heldout_tables, eval_step, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    run.finish(state.policy, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
