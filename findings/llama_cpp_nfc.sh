#!/usr/bin/env bash
# Guess:  llama.cpp gives a text the ids that transformers gives it: tokenizer.ggml.pre stands for all that tokenizer.json
#         does before byte pairs are joined.
# Truth:  it stands for the cutting into words only. Qwen2's tokenizer.json also brings text into Unicode's form NFC;
#         llama.cpp does not, and no key of a GGUF says so. A decomposed letter (e and a combining accent, as macOS
#         writes file names and some keyboards type Vietnamese and Korean) has other ids than in training.
# Who:    whoever serves a Qwen2, 2.5 or 3 model from a GGUF: normalise the text first, unicodedata.normalize("NFC", text).
# Seen:   llama-cpp-python 0.3.36, tokenizers 0.23.3, gguf 0.19.0, Python 3.11, on a CPU; llama-cpp-python is built from
#         source, a quarter of an hour:
#         composed letter:   tokenizers [127, 102], llama.cpp [127, 102]
#         decomposed letter: tokenizers [127, 102], llama.cpp [68, 136, 223]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  llama-cpp-python==0.3.36 gguf==0.19.0 tokenizers==0.23.3 numpy==2.3.5
cat > "$folder/nfc.py" <<'PY'
import sys
import unicodedata

import gguf
from llama_cpp import Llama
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

# the 256 bytes as tokens, and Qwen2's tokenizer around them
plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
letters = [chr(plain[i] if i < len(plain) else 256 + i - len(plain)) for i in range(256)]
theirs = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
theirs.normalizer = normalizers.NFC()
split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), to_bytes])

file = f"{sys.argv[1]}/vocabulary.gguf"
writer = gguf.GGUFWriter(file, "qwen2")
for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"):
    writer.add_uint32(f"qwen2.{key}", 8)
writer.add_layer_norm_rms_eps(1e-6)
writer.add_tokenizer_model("gpt2")
writer.add_tokenizer_pre("qwen2")
writer.add_token_list([*letters, "<|endoftext|>"])
writer.add_token_types([gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL])
writer.add_token_merges(["! !"])
writer.add_eos_token_id(256)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_ti_data_to_file()
writer.close()
llama = Llama(file, vocab_only=True, verbose=False)
found = {}
for form in ("NFC", "NFD"):
    text = unicodedata.normalize(form, "\u00e9")
    found[form] = theirs.encode(text).ids, llama.tokenize(text.encode(), add_bos=False)
    name = "composed letter:  " if form == "NFC" else "decomposed letter:"
    print(name, "tokenizers {}, llama.cpp {}".format(*found[form]))
assert found["NFC"][0] == found["NFC"][1] == found["NFD"][0] != found["NFD"][1], found
PY
"$folder/venv/bin/python" "$folder/nfc.py" "$folder"
