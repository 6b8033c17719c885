"""Next-token training: from scratch on text, or fine-tuning on demonstrations, or distillation from a larger model.

    L = - sum_t m_t log p(x_t | x_<t) / sum_t m_t        over all tokens t of the batch; the scored ones have m_t = 1

Text: documents are packed end to end into rows; positions restart in each document, and none attends to another. Every
token is scored except the first one of each document, which nothing predicts.
Demonstrations: the completion and its EOS are scored (Ouyang et al. 2022, arXiv:2203.02155, section 3.5).
With --teacher the loss is the mean of KL(teacher || student) at the same tokens (Hinton et al. 2015, arXiv:1503.02531).

Where this differs from common practice:
1. The mean is over all scored tokens of the batch, also across micro-batches and devices. A mean of the parts' means
   would give more weight to the tokens of a part that has few.
2. Prompt and completion are tokenised separately, as at generation time.
3. PAD is never EOS.

    python sft.py --init None --tokenizer data/toy --data data/toy/base.jsonl --out out/base --steps 4200 \
        --batch-size 16 --length 48 --lr 2e-3                    # a model from scratch
    python sft.py --init out/base --out out/sft                  # fine-tune it on data/toy/demos.jsonl
"""

import itertools
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
    init: str | None = "out/base"  # model folder or Hub name to start from; None: a fresh model
    data: tuple[str, ...] = ("data/toy/demos.jsonl",)  # text or demonstrations; name:weight mixes several
    heldout: str | None = None  # rows for the validation loss (None: NAME-heldout.jsonl beside --data, if there)
    out: Path = Path("out/sft")  # run folder
    steps: int = 80  # optimiser steps
    batch_size: int = 64  # rows a step, over all devices and micro-batches
    micro_batches: int = 1  # gradient accumulation: parts that a batch is computed in
    length: int = 64  # tokens a row at most: longer completions are cut and lose their EOS; a new model's context
    lr: float = 4e-4  # peak learning rate, falling by a cosine to a tenth
    warmup: int | None = None  # steps of linear warm-up (None: 10, an eighth of all at most)
    loss_on: Literal["completion", "all"] = "completion"  # of demonstrations: or the prompt's tokens too
    reduction: Literal["token", "sequence"] = "token"  # mean over all tokens, or mean of each row's mean

    teacher: str | None = None  # distil this model folder: same tokenizer, any size

    lora_rank: int = 0  # above 0: low-rank adapters learn, on a frozen base; they want 5 to 10 times the --lr

    tokenizer: str | None = None  # folder with tokenizer files (None: --init's)
    family: Literal["gpt2", "llama", "qwen2", "qwen3"] = "llama"  # a fresh model's family, layers, heads, width
    layers: int = 4
    heads: int = 2
    dim: int = 128

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; weights stay float32
    remat: bool = False  # recompute activations in the backward pass: less memory, a third more time
    seed: int = 0  # of weights, data order and samples
    resume: bool = False  # continue from the last checkpoint in --out
    overwrite: bool = False  # empty --out first
    save_every: int = 500  # steps between checkpoints
    eval_every: int = 200  # steps between validation losses and samples
    skip_bad_rows: bool = False  # count and report unusable rows instead of stopping


class State(NamedTuple):
    model: gpt.GPT | gpt.Adapter
    opt_state: tuple


def mean_loss(losses, mask, reduction: str = "token"):
    """Mean of the tokens' losses where mask is 1, both (B, T): -> scalar, nats a token.

    "token": mean over all scored tokens. "sequence": each row's mean first, then the mean over rows that have one.
    """
    if reduction == "token":
        return gpt.masked_mean(losses, mask)
    row_means = jnp.where(mask > 0, losses, 0).sum(1) / jnp.maximum(mask.sum(1), 1)
    return gpt.masked_mean(row_means, mask.any(1))


def batch_loss(model, batch, config: Config, teacher=None):
    """(loss, metrics) of a batch with tokens, segments and mask, each (B, T). `model` learns, `teacher` is frozen."""
    model = gpt.cast(model, gpt.compute_dtype(config.dtype))
    tokens, segments, mask = batch["tokens"], batch["segments"], batch["mask"][:, 1:]
    hidden = model(tokens, segments, config.remat)[:, :-1]
    if teacher is not None:
        # the teacher's whole distribution at each token is the label, not the token in the data alone
        teacher_hidden = jax.lax.stop_gradient(teacher(tokens, segments)[:, :-1])
        kl = gpt.head_kl(teacher, teacher_hidden, model, hidden)
        loss = mean_loss(kl, mask, config.reduction)
        return loss, {"loss": loss}
    logprobs, entropy = gpt.head_logprobs(model, hidden, tokens[:, 1:])
    loss = mean_loss(-logprobs, mask, config.reduction)
    return loss, {"loss": loss, "entropy": gpt.masked_mean(entropy, mask)}


def count_items(batch, config: Config):
    """The denominator of the loss: scored tokens, or with --reduction sequence rows that have some."""
    mask = batch["mask"][:, 1:]
    return mask.sum() if config.reduction == "token" else mask.any(1).sum()


@partial(jax.jit, static_argnames=("optimizer", "config"), donate_argnames="state")
def train_step(state: State, base, teacher, batch, optimizer, config: Config):
    """One optimiser step on a batch: -> (state, metrics). `base` is the frozen model below an adapter, None where the
    whole model learns; `teacher` is None where the data's tokens are the labels."""
    loss_fn = lambda model, batch: batch_loss(gpt.attach(model, base), batch, config, teacher)
    count = lambda batch: count_items(batch, config)
    *state, metrics = gpt.descend(optimizer, loss_fn, *state, batch, config.micro_batches, count)
    return State(*state), metrics


@partial(jax.jit, static_argnames="config")
def eval_step(model, batch, config: Config):
    return batch_loss(model, batch, config)[0], count_items(batch, config)


def set_scored(batch: dict, kind: str, config: Config) -> dict:
    """The batch with the mask that --loss-on asks for: that of demonstrations may include the prompt. Text is always
    scored whole."""
    if kind == "demos" and config.loss_on == "all":
        return batch | {"mask": batch["segments"].copy()}  # 1 on every token, 0 on padding
    return batch


def evaluate(model, batches: gpt.Batches, config: Config, most: int = 50) -> dict:
    """Held-out loss in nats a token over the first `most` batches, and perplexity: of the data's tokens, also with
    --teacher, where the training loss is a KL."""
    total = count = 0.0
    # the last batch is filled up with rows seen before: `real_rows` at its start are new, the others count for nothing
    for batch, real_rows in itertools.islice(batches.once(), most):
        batch = set_scored(batch, batches.kind, config)
        batch["mask"][real_rows:] = 0
        loss, items = gpt.to_numpy(eval_step(model, gpt.put_batch(batch), config))
        total, count = total + loss * items, count + items
    return {"val/loss": total / count, "val/perplexity": np.exp(total / count)}


def make_model(config: Config, key):
    """The model to start from and its tokenizer."""
    if config.init:
        return gpt.load_policy(config.init, config.tokenizer)
    if config.lora_rank:
        raise ValueError("--lora-rank trains an adapter on a finished model: name one with --init")
    if not config.tokenizer:
        raise ValueError("--init None needs --tokenizer: a folder with tokenizer.json (toy.py writes data/toy)")
    tokenizer = gpt.need_tokenizer(config.tokenizer)
    shape = gpt.make_config(
        tokenizer.vocab_size, config.length, config.layers, config.heads, config.dim, config.family
    )  # fmt: skip
    return jax.jit(partial(gpt.init, shape))(key), tokenizer


def load_teacher(config: Config, tokenizer) -> gpt.GPT:
    gpt.check_tokenizer_of(config.teacher, tokenizer, config.init)
    return gpt.load_frozen(config.teacher, config.dtype)


def show_samples(run, step, model, batch, kind: str, tokenizer, key, config: Config):
    """Print how the model continues two rows of a held-out batch: a demonstration from its prompt, a text from its
    first 8 tokens."""
    tokens, scored = batch["tokens"][:2], batch["mask"][:2]
    given = scored.argmax(1) if kind == "demos" else np.full(len(tokens), 8)  # how many tokens the model gets of each
    width = int(given.max())
    prompts, mask = np.full((len(tokens), width), tokenizer.pad_id, np.int32), np.zeros((len(tokens), width), np.int32)
    for i, n in enumerate(given):  # padded on the left, since they end where the answer begins
        prompts[i, width - n :], mask[i, width - n :] = tokens[i, :n], 1
    new = max(config.length - width, 1)
    out = gpt.generate(model, prompts, mask, key, new, ends=tokenizer.end_ids, pad=tokenizer.pad_id)
    texts = tokenizer.decode_rows(prompts, mask), tokenizer.decode_rows(out.tokens, out.mask)
    for prompt, sample in zip(*texts):
        run.sample(step, prompt=prompt, sample=sample)


def main(config: Config):
    key = gpt.start(config.seed)
    gpt.check_batch_size(config.batch_size)
    kind = gpt.find_kind(config.data, ("text", "demos"), config.skip_bad_rows)
    model, tokenizer = make_model(config, jax.random.fold_in(key, 0))
    load_batches = partial(
        gpt.Batches, kind=kind, tokenizer=tokenizer, length=config.length, skip_bad=config.skip_bad_rows,
    )  # fmt: skip
    batches = load_batches(config.data, batch_size=config.batch_size, seed=config.seed)
    batches.plan(config.steps, config.micro_batches)
    heldout = config.heldout or gpt.heldout_file(config.data)
    heldout = load_batches(heldout, batch_size=min(config.batch_size, 32), seed=0) if heldout else None

    teacher = load_teacher(config, tokenizer) if config.teacher else None

    lr = gpt.schedule(config.lr, config.steps, config.warmup, final=0.1)
    optimizer = gpt.adamw(lr, weight_decay=0.01, b2=0.98)
    # what learns, and what it is on, are spread over the devices here
    model, base = gpt.trainable(model, config.lora_rank, config.dtype, jax.random.fold_in(key, 1))
    state = State(model, gpt.shard(optimizer.init(model)))

    run = gpt.Run(batches.hashes, dict(parameters=gpt.count_parameters(model)), **vars(config))
    state, first = run.restore(state)
    stream = batches.stream(first, config.steps)
    for step in run.steps(first):
        batch = gpt.put_batch(set_scored(next(stream), kind, config))
        state, metrics = train_step(state, base, teacher, batch, optimizer, config)
        metrics["lr"] = lr(step)
        if heldout and ((step + 1) % config.eval_every == 0 or step + 1 == config.steps):
            model = gpt.attach(state.model, base)
            metrics |= evaluate(model, heldout, config)
            batch, sample_key = next(heldout.once())[0], jax.random.fold_in(key, step)
            show_samples(run, step, model, batch, kind, tokenizer, sample_key, config)
        run.log(step, metrics)
        run.checkpoint(step, state)
    run.finish(state.model, tokenizer, config.init)


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
