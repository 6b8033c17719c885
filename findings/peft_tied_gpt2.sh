#!/usr/bin/env bash
# Guess:  a LoRA adapter on the embedding of a model with a tied head changes the head as well, when PEFT is asked to
#         keep the two tied (ensure_weight_tying=True), whatever the model calls them.
# Truth:  PEFT 0.21.2 does so for Llama, whose embedding is called embed_tokens, and not for GPT-2, whose embedding is
#         called wte: there the input changes and the output head stays the base's. transformers itself says that both
#         models are tied, and no warning is given.
# Who:    whoever trains adapters that reach a tied embedding (RLHF on one base does: a policy that cannot move its head
#         learns less) and hands them on in PEFT's layout: the same adapter is another model for another family. Naming
#         lm_head among the target modules as well makes it whole.
# Seen:   peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11, on a CPU:
#         llama: input moves True, head moves True
#         gpt2: input moves True, head moves False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
cat > "$folder/tied.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
models = {
    "llama": (LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
              num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)), "embed_tokens"),
    "gpt2": (GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2,
             bos_token_id=None, eos_token_id=None)), "wte"),
}
found = {}
for name, (model, embedding) in models.items():
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # tied
    base_in = model.get_input_embeddings()(torch.arange(50)).detach().clone()
    x = torch.randn(4, 16)
    base_out = model.get_output_embeddings()(x).detach().clone()
    config = LoraConfig(r=4, target_modules=[embedding], ensure_weight_tying=True, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    with torch.no_grad():  # an adapter that does something: both factors away from zero
        for key, weight in adapted.named_parameters():
            if "lora_" in key:
                weight.normal_()
    moves = lambda new, old: bool((new - old).abs().max() > 1e-3)
    inside = adapted.base_model.model
    found[name] = (moves(inside.get_input_embeddings()(torch.arange(50)), base_in),
                   moves(inside.get_output_embeddings()(x), base_out))
    print(f"{name}: input moves {found[name][0]}, head moves {found[name][1]}")
assert found == {"llama": (True, True), "gpt2": (True, False)}, found
PY
"$folder/venv/bin/python" -W ignore "$folder/tied.py"
