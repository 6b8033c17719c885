#!/usr/bin/env bash
# Guess:  a LoRA adapter that is saved and loaded again by PEFT is the same model.
# Truth:  not where two keys of alpha_pattern (or rank_pattern) fit one module. PEFT 0.21.2 takes the first key that
#         fits, in the order in which they were given, and writes adapter_config.json with its keys sorted: after loading
#         the other key comes first, and the module's alpha is another one. No warning. Of two ranks the tensors do not
#         fit any more, and that is an error; of two alphas nothing is noticed.
# Who:    whoever gives a general key first and one for some layers after it, as in {"q_proj": 4, "layers.1.*q_proj": 32},
#         or the other way round: only an order that happens to be that of the alphabet survives. What is merged before
#         it is saved is what was trained.
# Seen:   peft 0.21.2, transformers 5.24.0, torch 2.14.1, Python 3.11, on a CPU:
#         alpha of layer 1's q_proj as trained: 4, as loaded: 32
#         largest difference of a logit: 2.8e-01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
cat > "$folder/order.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM


def base():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


def alpha(model):
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    return round(layer.scaling["default"] * layer.r["default"])


tokens, folder = torch.arange(12)[None], sys.argv[1]
config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                    alpha_pattern={"q_proj": 4, "layers.1.self_attn.q_proj": 32})
trained = get_peft_model(base(), config).eval()
with torch.no_grad():  # an adapter that does something: both factors away from zero
    for key, weight in trained.named_parameters():
        if "lora_" in key:
            weight.normal_()
    trained.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(base(), folder).eval()
    difference = (trained(tokens).logits - loaded(tokens).logits).abs().max().item()
print(f"alpha of layer 1's q_proj as trained: {alpha(trained)}, as loaded: {alpha(loaded)}")
print(f"largest difference of a logit: {difference:.1e}")
assert (alpha(trained), alpha(loaded)) == (4, 32) and difference > 1e-3, "the behaviour has changed"
PY
"$folder/venv/bin/python" -W ignore "$folder/order.py" "$folder/adapter"
