"""Five steps of every training script on the toy world, digit by digit: what a pure move of code must not change.

    python tests/golden_runs.py WORLD             # compare with golden/runs.json (WORLD: a folder, made where missing)
    python tests/golden_runs.py WORLD --write     # and write it anew, when a change of the numbers is meant

Digits are those of one CPU and another one may round differently: write on the commit before the move, compare after.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden" / "runs.json"
EVERY = "--overwrite --seed 0"
SHORT = f"{EVERY} --steps 5"

WORLD = {  # what the runs start from, made once
    "data/toy/demos.jsonl": "toy.py",
    "out/base/model.safetensors": f"sft.py --init None --tokenizer data/toy --data data/toy/base.jsonl --out out/base "
    f"--steps 150 --batch-size 16 --length 48 --lr 2e-3 --warmup 10 --eval-every 150 {EVERY}",
    "out/sft/model.safetensors": f"sft.py --steps 30 --warmup 10 --eval-every 30 {EVERY}",
    "out/reward/model.safetensors": f"reward.py --steps 10 --normalize-samples 128 {EVERY}",
    "out/reward-lora/adapter/adapter.json": "reward.py --init out/sft --lora-rank 8 --lr 5e-4 --out out/reward-lora "
    f"--steps 10 --normalize-samples 128 {EVERY}",
}
RL = f"--batch-size 32 --minibatch-size 16 {SHORT}"
RUNS = {  # name: command; what it leaves in out/golden/NAME is compared
    "sft-text": f"sft.py --init None --tokenizer data/toy --data data/toy/base.jsonl --batch-size 8 {SHORT}",
    "sft": f"sft.py --eval-every 5 {SHORT}",
    "sft-all": f"sft.py --loss-on all --reduction sequence --micro-batches 2 {SHORT}",
    "sft-lora": f"sft.py --lora-rank 4 {SHORT}",
    "sft-teacher": f"sft.py --init None --tokenizer data/toy --layers 1 --dim 32 --teacher out/sft {SHORT}",
    "reward": f"reward.py --normalize-samples 128 {SHORT}",
    "reward-mean": f"reward.py --pool mean --suffix= --label-smoothing 0.1 --center 0.01 "
    f"--normalize-with None --micro-batches 2 {SHORT}",
    "reward-members": f"reward.py --members 2 --normalize-with None {SHORT}",
    "reward-teacher": f"reward.py --init out/sft --teacher out/reward --normalize-with None {SHORT}",
    "ppo": f"ppo.py {RL}",
    "ppo-micro": f"ppo.py --micro-batches 2 --target-kl 0.001 {RL}",
    "ppo-lora": f"ppo.py --lora-rank 16 --reward out/reward-lora {RL}",
    "rloo": f"grpo.py --advantage rloo {RL}",
    "grpo": f"grpo.py {RL}",
    "dpo": f"dpo.py --eval-every 5 {SHORT}",
    "dpo-ref": f"dpo.py --precompute-ref --micro-batches 2 --label-smoothing 0.1 --no-share-prefix {SHORT}",
    "ipo": f"ipo_kto.py --eval-every 5 {SHORT}",
    "kto": f"ipo_kto.py --loss kto --eval-every 5 {SHORT}",
    "revise": f"rlaif.py --judge out/base --init out/sft --prompts 64 --batch-size 32 --rounds 1 {EVERY}",
    "label": f"rlaif.py --stage label --judge out/base --init out/sft --prompts 64 --batch-size 32 {EVERY}",
    "online-judge": f"RLAIF_JUDGE=out/base online.py --judge rlaif:preference --batch-size 32 {SHORT}",
    "online-reward": f"online.py --candidates 4 --batch-size 64 --minibatch-size 32 {SHORT}",
}


def run(command: str, world: Path):
    words = command.replace("''", "").split()
    variables = dict(word.split("=") for word in words if word.startswith("RLAIF_"))
    script, *arguments = words[len(variables) :]
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments], cwd=world, env=os.environ | variables, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}\n{done.stdout}{done.stderr}")


def result(folder: Path):
    """Metrics of every step but its seconds, a report without its picture, and a hash of each file of rows."""
    found = {}
    for file in sorted(folder.rglob("*.json*")):
        name = str(file.relative_to(folder))
        if file.name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
        elif file.name == "report.json":
            found[name] = json.loads(file.read_text())
        elif file.suffix == ".jsonl":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--only", nargs="*", default=list(RUNS))
    config = parser.parse_args()
    config.world.mkdir(parents=True, exist_ok=True)
    for file, command in WORLD.items():
        if not (config.world / file).exists():
            run(command, config.world)
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    wrong = []
    for name in config.only:
        run(f"{RUNS[name]} --out out/golden/{name}", config.world)
        found = json.loads(json.dumps(result(config.world / "out/golden" / name)))
        same = golden.get(name) == found
        print(f"{name:16} {'same' if same else 'written' if config.write else 'OTHER DIGITS'}", flush=True)
        if config.write:
            golden[name] = found
        elif not same:
            wrong.append(name)
            before = golden.get(name, {})
            for file in sorted(found.keys() | before.keys()):
                if found.get(file) != before.get(file):
                    print(f"  {file}\n    was {str(before.get(file))[:400]}\n    is  {str(found.get(file))[:400]}")
    if config.write:
        GOLDEN.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(config.only)} runs changed: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
