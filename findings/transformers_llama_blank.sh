#!/usr/bin/env bash
# Guess:  a Llama 2 folder gives the same ids in transformers 4 and 5: tokenizer.json has not changed.
# Truth:  in transformers 5.24 the class LlamaTokenizer (the name that Llama 2, TinyLlama and early Mistral folders
#         hold) puts its own rule for blanks in the place of the file's. With legacy = false, as these folders say, the
#         text after a special token gets no blank: <s>[INST] is "[", where 4.57, the file itself and llama.cpp have
#         "▁[". And a text's own first blank is lost: " hi" has the ids of "hi". The class PreTrainedTokenizerFast
#         keeps the file's ids in both.
# Who:    whoever goes on with such a model in transformers 5, or serves it by llama.cpp: the first token of every turn
#         is another one than the model was trained on.
# Seen:   tokenizers 0.22.2 and 0.23.3, Python 3.11 ("<s>[INST] hi", " hi"):
#         transformers 4.57.1, LlamaTokenizer:          ['<s>', '▁[', 'INST', ']', '▁hi'] ['▁', '▁hi']
#         transformers 4.57.1, PreTrainedTokenizerFast: ['<s>', '▁[', 'INST', ']', '▁hi'] ['▁', '▁hi']
#         transformers 5.24.0, LlamaTokenizer:          ['<s>', '[', 'INST', ']', '▁hi'] ['▁hi']
#         transformers 5.24.0, PreTrainedTokenizerFast: ['<s>', '▁[', 'INST', ']', '▁hi'] ['▁', '▁hi']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/write.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *"▁[]INSThi", "▁[", "IN", "ST", "INST", "hi", "▁hi"]
merges = [("▁", "["), ("I", "N"), ("S", "T"), ("IN", "ST"), ("h", "i"), ("▁", "hi")]
vocab = {word: i for i, word in enumerate(words)}
tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # as Llama 2's
tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in words[:3]])
for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
    path = Path(sys.argv[1], name)
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": name, "legacy": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
PY
cat > "$folder/read.py" <<'PY'
import sys

import transformers

for name in ("LlamaTokenizer", "PreTrainedTokenizerFast"):
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{name}")
    ids = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    found = [tokenizer.convert_ids_to_tokens(ids(text)) for text in ("<s>[INST] hi", " hi")]
    print(f"transformers {transformers.__version__}, {name}:".ljust(45), *found)
    changed = transformers.__version__.startswith("5.") and name == "LlamaTokenizer"
    assert found == [["<s>", "[" if changed else "▁[", "INST", "]", "▁hi"], ["▁hi"] if changed else ["▁", "▁hi"]], found
PY
for version in 4.57.1 5.24.0; do
    python3 -m venv "$folder/venv-$version"
    "$folder/venv-$version/bin/pip" install --quiet --disable-pip-version-check "transformers==$version"
    [ -d "$folder/model" ] || { mkdir "$folder/model"; "$folder/venv-$version/bin/python" "$folder/write.py" "$folder/model"; }
    "$folder/venv-$version/bin/python" -W ignore "$folder/read.py" "$folder/model"
done
