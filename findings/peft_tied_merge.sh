#!/usr/bin/env bash
# Guess:  where PeftModel computes an adapter rightly, merge_and_unload gives the same model.
# Truth:  not where the adapter is on the embedding and on the head of a model that ties them. Either way of writing such
#         an adapter fails in PEFT 0.21.2: on both modules, or on the embedding alone with ensure_weight_tying=True, it is
#         right before the merge, and the merge adds the change to the one table twice. Parting the head from the
#         embedding first merges rightly. No warning says so for a folder that is loaded.
# Who:    whoever merges an adapter that reaches a tied embedding (Llama 3.2, SmolLM2, Qwen, GPT-2), for a GGUF or vLLM.
# Seen:   peft 0.21.2, transformers 5.24.0, torch 2.14.1, Python 3.11, on a CPU (largest error of a logit):
#         llama, both modules: before 1.5e-05, merged 9.7e+01, parted and merged 0.0e+00
#         gpt2, both modules: before 1.5e-05, merged 9.0e+01, parted and merged 0.0e+00
#         llama, embedding with ensure_weight_tying: before 1.5e-05, merged 9.7e+01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.14.1 transformers==5.24.0 peft==0.21.2 numpy==2.3.5
cat > "$folder/merge.py" <<'PY'
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

tokens = torch.arange(12)[None]
A, B = torch.randn(4, 50, generator=torch.manual_seed(1)), torch.randn(16, 4, generator=torch.manual_seed(2))


def model_of(name):
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
        return GPT2LMHeadModel(config).eval()
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True)).eval()


def errors(name, targets, parted):
    """Largest errors of logits, before and after the merge."""
    right, model = model_of(name), model_of(name)
    right.get_input_embeddings().weight += 2 * (B @ A).T  # alpha / r is 2, and the two are one table
    if parted:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, ensure_weight_tying=True)).eval()
    factors = {"lora_embedding_A": A, "lora_embedding_B": B, "lora_A": B.T, "lora_B": A.T}
    for key, weight in adapted.named_parameters():
        for factor, x in factors.items():
            if f"{factor}." in key and weight.shape == x.shape:
                weight.copy_(x)
    error = lambda model: (model(tokens).logits - right(tokens).logits).abs().max().item()
    return error(adapted), error(adapted.merge_and_unload())


with torch.no_grad():
    for name, embedding in (("llama", "embed_tokens"), ("gpt2", "wte")):
        (before, merged), (_, parted) = (errors(name, [embedding, "lm_head"], parted) for parted in (False, True))
        print(f"{name}, both modules: before {before:.1e}, merged {merged:.1e}, parted and merged {parted:.1e}")
        assert before < 1e-3 < 1 < merged and parted < 1e-3
    before, merged = errors("llama", ["embed_tokens"], False)
    print(f"llama, embedding with ensure_weight_tying: before {before:.1e}, merged {merged:.1e}")
    assert before < 1e-3 < 1 < merged
PY
"$folder/venv/bin/python" -W ignore "$folder/merge.py"
