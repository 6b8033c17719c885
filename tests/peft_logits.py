"""Does PEFT read an adapter as it was trained? A run folder holds it merged into the model, a PEFT folder by itself.

    python convert.py out/lora out/lora-peft
    python tests/peft_logits.py out/lora out/lora-peft   # a Python with torch, transformers and peft

Loads the base that out/lora-peft names, puts the adapter on it with PEFT, and compares its logits with those of the
merged model in out/lora (a reward model's: its score). Prints the largest difference; exit code 1 where it exceeds 1e-4
or where the adapter changes nothing.
"""

import sys
from pathlib import Path

import torch
import transformers
from peft import PeftConfig, PeftModel


def main(folder: Path, adapter: Path):
    settings = PeftConfig.from_pretrained(adapter)
    scores = settings.task_type == "SEQ_CLS"
    kind = transformers.AutoModelForSequenceClassification if scores else transformers.AutoModelForCausalLM
    options = dict(dtype=torch.float32) | (dict(num_labels=1) if scores else {})
    load = lambda path: kind.from_pretrained(path, **options).eval()
    ask = lambda model: torch.cat([model(row[None]).logits for row in tokens])  # row by row: no padding in the way
    merged, base = load(folder), load(settings.base_model_name_or_path)
    tokens = torch.randint(0, base.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, plain = ask(merged), ask(base)
        theirs = ask(PeftModel.from_pretrained(base, adapter).eval())
    wrong, moved = (ours - theirs).abs().max().item(), (ours - plain).abs().max().item()
    print(f"{folder}: PEFT and merged model differ by {wrong:.1e}; the adapter moves logits by {moved:.1e}")
    return wrong > 1e-4 or moved < 10 * wrong


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:])))
