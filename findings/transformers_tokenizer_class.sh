#!/usr/bin/env bash
# Guess:  AutoTokenizer gives the ids of the tokenizer.json that lies in the folder: `tokenizer_class` in
#         tokenizer_config.json only names the Python class.
# Truth:  in transformers 5.24 some classes build their own way of cutting text and put it in the file's place.
#         GPT2Tokenizer (also under the name GPT2TokenizerFast, as older versions wrote it) cuts as GPT-2 does: a file
#         that splits digits one by one, as SmolLM2's, no longer splits them. GPTNeoXTokenizer also drops the BOS that
#         the file puts before every text. No warning is given; the class PreTrainedTokenizerFast keeps the file's ids.
# Who:    whoever trains or evaluates a model whose tokenizer.json differs from its class's own: its numbers and line
#         breaks get other ids than in training, and other ids than in vLLM's, llama.cpp's or Rust's servers.
# Seen:   transformers 5.24.0, tokenizers 0.23.3, Python 3.11 ("12 34" and the letter a, with what is put before it):
#         tokenizer.json itself:   ['1', '2', ' ', '3', '4'] ['<s>', 'a']
#         PreTrainedTokenizerFast: ['1', '2', ' ', '3', '4'] ['<s>', 'a']
#         GPT2Tokenizer:           ['12', ' ', '34'] ['<s>', 'a']
#         GPT2TokenizerFast:       ['12', ' ', '34'] ['<s>', 'a']
#         GPTNeoXTokenizer:        ['12', ' ', '34'] ['a']
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 tokenizers==0.23.3
cat > "$folder/classes.py" <<'PY'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "34", "<s>", "</s>"]
tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("1", "2"), ("3", "4")]))
digits, to_bytes = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<s>", "</s>"])
bos = [("<s>", words.index("<s>"))]
tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
tokenizer.save(str(folder / "tokenizer.json"))
texts = lambda ids: [words[i].replace("Ġ", " ") for i in ids]
want = texts(tokenizer.encode("12 34", add_special_tokens=False).ids), texts(tokenizer.encode("a").ids)
print("tokenizer.json itself:  ", *want)
found = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "GPTNeoXTokenizer"):
    settings = {"tokenizer_class": name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = AutoTokenizer.from_pretrained(folder)
    found[name] = texts(theirs("12 34", add_special_tokens=False)["input_ids"]), texts(theirs("a")["input_ids"])
    print(f"{name}:".ljust(24), *found[name])
fast, *own = found.values()
assert fast == want and all("12" in cut for cut, _ in own) and found["GPTNeoXTokenizer"][1] == ["a"]
PY
mkdir "$folder/model"
"$folder/venv/bin/python" -W ignore "$folder/classes.py" "$folder/model"
