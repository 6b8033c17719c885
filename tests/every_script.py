"""Two steps of every training script, for test_devices.py: python every_script.py WORLD OUT [NAME ...]

Plain gradient descent takes AdamW's place: what a weight moves is its gradient then, and the runs can be compared.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import optax

import dpo
import gpt
import ipo_kto
import online
import ppo
import reward
import sft

RATE = 0.1  # of every step


def lengths(prompts, responses, rows):
    """A reward function: each process asks about its own rows."""
    assert len(prompts) == len(responses) == len(rows) and all("kind" in row for row in rows)
    return [len(response) / 10 for response in responses]


def plans(world: Path, out: Path) -> dict:
    """name -> (main, config)."""
    policy, data = str(world / "sft"), lambda name: str(world / "data" / f"{name}.jsonl")
    rows = dict(init=policy, batch_size=16, seed=3)
    judge = f"{Path(__file__).stem}:lengths"
    demos = sft.Config(
        **rows, data=(data("demos"),), out=out / "sft", steps=2, length=48, micro_batches=2, eval_every=2
    )  # fmt: skip
    rl = ppo.Config(
        **rows, data=(data("prompts"),), out=out / "ppo", reward=(judge,), steps=2, minibatch_size=8, epochs=1,
        prompt_length=24, response_length=8, missing_eos=None,
    )  # fmt: skip
    return {
        "sft": (sft.main, demos),
        "sft-first-half": (sft.main, replace(demos, steps=1)),
        "sft-second-half": (sft.main, replace(demos, resume=True)),
        "reward": (reward.main, reward.Config(
            **rows, data=(data("pairs"),), out=out / "reward", steps=2, length=48, normalize_with=policy,
            normalize_data=data("prompts"), normalize_samples=16, response_length=8,
        )),
        "ppo": (ppo.main, rl),
        "lora": (ppo.main, replace(rl, out=out / "lora", lora_rank=4)),
        "dpo": (dpo.main, dpo.Config(
            **rows, data=(data("pairs"),), out=out / "dpo", steps=2, length=48, precompute_ref=True, eval_every=2,
        )),
        "online": (online.main, online.Config(
            **rows, data=(data("prompts"),), out=out / "online", steps=1, minibatch_size=8, candidates=3, reward=judge,
            prompt_length=24, response_length=8, keep_truncated=True,
        )),
        "ipo": (ipo_kto.main, ipo_kto.Config(
            **rows, loss="ipo", data=(data("pairs"),), out=out / "ipo", steps=2, length=48, eval_every=2,
        )),
        "kto": (ipo_kto.main, ipo_kto.Config(
            **rows, loss="kto", data=(data("thumbs"),), out=out / "kto", steps=2, length=48, eval_every=2,
        )),
        "sft-endless": (sft.main, replace(demos, out=out / "endless", steps=10**6, save_every=10**6, eval_every=10**6)),
    }  # fmt: skip


if __name__ == "__main__":
    gpt.adamw = lambda rate, *args, **options: optax.sgd(lambda step: RATE, momentum=0.9)
    world, out, *names = sys.argv[1:]
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    for name, (main, config) in plans(Path(world), Path(out)).items():
        if name in names or (not names and "-" not in name):
            main(replace(config, dtype="float32"))
