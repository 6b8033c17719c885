"""Tiny random models in the Hugging Face layout, with the logits PyTorch computes from them.

The folders beside this file were made once, with torch 2.13.0 (CPU), transformers 5.23.0, safetensors 0.8.0 and
numpy 2.4.6, in an environment of their own (the project itself needs neither torch nor transformers); those named
qwen3 and mistral with torch 2.14.1 and transformers 5.24.0:

    python3 -m venv peer
    peer/bin/pip install torch==2.13.0 transformers==5.23.0 safetensors==0.8.0 numpy==2.4.6
    peer/bin/python tests/golden/make.py               # all of them, or those that are named

Each folder NAME/ holds
    config.json        as transformers 5 writes it (`rope_parameters`, `dtype`)
    config.v4.json     the same model as older files spell it (`rope_theta`, `rope_scaling`, `torch_dtype`; `head_dim`
                       and `layer_types` left out where they are the default)
    model.safetensors  as `save_pretrained` writes it, in the dtype the config names
    logits.npz         `tokens` (2, 12) int32 and `logits` (2, 12, vocabulary) float32, computed in float32; gpt2, llama
                       and qwen3 also `padded_tokens`, `padded_mask`, `padded_positions`, `padded_logits`: row 0 is the
                       first 7 tokens behind 5 pads, row 1 is whole; logits at pads are stored as 0.
Classifiers (NAME ends in _score) hold instead `tokens`, `mask` and `scores` (3,): row 0 whole, row 1 with 5 pads on
the right, row 2 the same 7 tokens with the 5 pads on the left (its positions count from the first real token).

Weights are normal with deviation 0.3, biases included, and norm scales are 1 + 0.3 normal, so that a missing bias, a
transposed matrix or a wrong rotation shows in the first digit.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

HERE = Path(__file__).resolve().parent
VOCAB, TIME, SHORT = 61, 12, 7
GPT2 = {
    "vocab_size": VOCAB,
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
# Head dimension 16 has wavelengths 6.3, 19.9, 62.8, ...; an original context of 32 puts one in each of the three
# branches of the rule: kept (below 32 / 4), blended, divided by 8 (above 32 / 1).
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SMALL = {"hidden_size": 16, "intermediate_size": 32}
QWEN3 = LLAMA | SMALL | {"head_dim": 8, "rms_norm_eps": 1e-6, "eos_token_id": 2}  # 4 heads of 8 on a width of 16
MODELS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config(**GPT2), "float16"),
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA), "float32"),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(
            **LLAMA
            | {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}
            | {"max_position_embeddings": 256, "eos_token_id": [2, 3]}
        ),
        "bfloat16",
    ),
    "llama_bias": (LlamaForCausalLM, LlamaConfig(**LLAMA | SMALL, attention_bias=True, mlp_bias=True), "float32"),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(
            **LLAMA
            | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True}
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
        ),
        "bfloat16",
    ),
    "gpt2_score": (
        GPT2ForSequenceClassification,
        GPT2Config(**GPT2 | {"n_embd": 16, "n_layer": 1}, num_labels=1, pad_token_id=0),
        "float32",
    ),
    "llama_score": (
        LlamaForSequenceClassification,
        LlamaConfig(**LLAMA | SMALL, num_labels=1, pad_token_id=0),
        "float32",
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**QWEN3, tie_word_embeddings=True), "bfloat16"),
    "qwen3_bias": (Qwen3ForCausalLM, Qwen3Config(**QWEN3, attention_bias=True), "float32"),
    "qwen3_score": (Qwen3ForSequenceClassification, Qwen3Config(**QWEN3, num_labels=1, pad_token_id=0), "float32"),
    "mistral": (MistralForCausalLM, MistralConfig(**LLAMA | SMALL | {"head_dim": 8}, sliding_window=None), "bfloat16"),
}


def randomise(model, seed):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "weight" in name and p.ndim == 1
            p.copy_(0.3 * torch.randn(p.shape, generator=rng) + norm)


def older(config):
    """The spelling of config.json before transformers 5."""
    c = dict(config)
    c["torch_dtype"] = c.pop("dtype")
    if rope := c.pop("rope_parameters", None):
        rope = dict(rope)
        c["rope_theta"] = rope.pop("rope_theta")
        c["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    if "hidden_size" in c and c.get("head_dim") == c["hidden_size"] // c["num_attention_heads"]:
        del c["head_dim"]
    c.pop("layer_types", None)
    c["transformers_version"] = "4.43.0"
    return dict(sorted(c.items()))


def read(cls, config, folder, spelling):
    """The model from its files, in float32. (Casting a model in memory would round its rotary frequencies too.)"""
    config = type(config).from_dict(json.loads((folder / spelling).read_text()))
    config._attn_implementation = "eager"
    return cls.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def forward(model, tokens, mask=None):
    tokens = torch.tensor(tokens, dtype=torch.long)
    extra = {}
    if mask is not None:
        extra = {"attention_mask": torch.tensor(mask), "position_ids": torch.tensor(positions(mask))}
    with torch.no_grad():
        return model(tokens, use_cache=False, **extra).logits.numpy()


def positions(mask):
    return np.maximum(np.cumsum(mask, -1) - 1, 0).astype(np.int32)


def pad(rows):
    """Rows as (tokens, pads on the left): padded with 0 to TIME."""
    tokens, mask = np.zeros((len(rows), TIME), np.int32), np.zeros((len(rows), TIME), np.int32)
    for i, (row, at) in enumerate(rows):
        tokens[i, at : at + len(row)] = row
        mask[i, at : at + len(row)] = 1
    return tokens, mask


def main():
    transformers.logging.disable_progress_bar()
    for seed, (name, (cls, config, dtype)) in enumerate(MODELS.items()):
        if name not in (sys.argv[1:] or MODELS):
            continue
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        model = cls(config)
        randomise(model, seed)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        saved = json.loads((folder / "config.json").read_text())
        (folder / "config.v4.json").write_text(json.dumps(older(saved), indent=2) + "\n")
        model = read(cls, config, folder, "config.json")

        tokens = np.random.default_rng(seed).integers(4, VOCAB, (2, TIME)).astype(np.int32)
        if name.endswith("_score"):
            tokens, mask = pad([(tokens[0], 0), (tokens[1, :SHORT], 0), (tokens[1, :SHORT], TIME - SHORT)])
            out = {"tokens": tokens, "mask": mask, "scores": forward(model, tokens, mask)[:, 0]}
            np.testing.assert_allclose(out["scores"][1], out["scores"][2], rtol=1e-4)
            check = lambda m: (forward(m, tokens, mask)[:, 0], out["scores"])  # noqa: B023
        else:
            out = {"tokens": tokens, "logits": forward(model, tokens)}
            if name in ("gpt2", "llama", "qwen3"):
                padded, mask = pad([(tokens[0, :SHORT], TIME - SHORT), (tokens[1], 0)])
                logits = forward(model, padded, mask) * mask[..., None].astype(np.float32)
                np.testing.assert_allclose(logits[0, TIME - SHORT :], out["logits"][0, :SHORT], atol=1e-4)
                out |= {
                    "padded_tokens": padded,
                    "padded_mask": mask,
                    "padded_positions": positions(mask),
                    "padded_logits": logits,
                }
            check = lambda m: (forward(m, tokens), out["logits"])  # noqa: B023
        assert all(v.dtype in (np.float32, np.int32) for v in out.values())
        np.savez(folder / "logits.npz", **out)

        # The older spelling describes the same model.
        np.testing.assert_array_equal(*check(read(cls, config, folder, "config.v4.json")))
        size = sum(f.stat().st_size for f in folder.iterdir())
        values = out.get("logits", out.get("scores"))
        print(f"{name:12s} {dtype:9s} {size:7,d} bytes, deviation of the outputs {values.std():.2f}")
    print(f"{sum(f.stat().st_size for f in HERE.glob('*/*')):,d} bytes in all")


if __name__ == "__main__":
    main()
