"""Token ids of chats as transformers has them, for small tokenizers and templates of the shapes that people load.

pip install transformers==5.24.0 jinja2      # in an environment of its own
python tests/golden_chat.py                  # writes golden/chat.json; test_chat.py compares
"""

import json
import tempfile
from pathlib import Path

GOLDEN = Path(__file__).resolve().parent / "golden" / "chat.json"
TEXTS = [
    "the other cat", " the cat\n\n1. and 12  the\n", "the<think> a</think>b", "Ünï e\u0301 東京 🦊", "", "a\tb \n c",
    "</s> <|im_end|> <mask> a",
]  # fmt: skip
ASK = {"role": "user", "content": "the cat and 12?"}
SYSTEM = {"role": "system", "content": "the other"}
SAID = {"role": "assistant", "content": "\n the\n\n1. cat "}
THOUGHT = {"role": "assistant", "content": "<think>\nthe\n</think>\n\nthe cat"}
AGAIN = {"role": "user", "content": " and \n<think>the</think>"}
CHATS = [
    [ASK], [SYSTEM, ASK], [ASK, SAID, AGAIN], [ASK, THOUGHT, AGAIN], [SYSTEM, ASK, THOUGHT, AGAIN, SAID], [ASK, SAID],
    [ASK, THOUGHT], [ASK, AGAIN],
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe a cat"
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = """{%- if tools %}{{- raise_exception('no tools here') }}{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and message.content is string %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if '</think>' in content %}
            {%- set thoughts = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}{%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = false %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if loop.index0 == 0 and system != false %}
{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] %}
{% else %}{% set content = m['content'] %}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif m['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% generation %}{% set content = m['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + eos_token }}{% endgeneration %}{% else %}{{ m['content'] | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)
MERGES = [
    "t h",
    "th e",
    "{} the",
    "{} a",
    "a n",
    "{}a nd",
    "{} c",
    "{}c at",
    "a t",
    "e r",
    "o th",
    "oth er",
    "1 2",
    "n d",
]


def byte_level(specials, others=(), split=None, nfc=False, sides=(), bos=None):
    """A byte-level tokenizer.json: `split` is what goes before the byte-level step; `sides`: tokens that eat blanks."""
    printable = [*map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)])]
    letters = printable + [chr(256 + i) for i in range(256 - len(printable))]
    merges = [*(merge.format("Ġ") for merge in MERGES), "Ċ Ċ", "Ġ Ġ"]
    step = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": split is None or split == DIGITS,
    }
    return spec(
        letters + [merge.replace(" ", "") for merge in merges], merges, specials, others, sides, bos,
        normalizer={"type": "NFC"} if nfc else None, decoder=step,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [split, step]} if split else step,
    )  # fmt: skip


def pieces(specials, others=(), prefix=True, bos=None, first=("<unk>", "<s>", "</s>")):
    """A tokenizer.json as converted from SentencePiece: blanks as ▁, one put in front, bytes as a last way out."""
    merges = [merge.format("▁") for merge in MERGES]
    letters = [*first, *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefghijklmnopqrstuvwxyzBSINTY12?.<>[]/|:"]
    steps = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "▁"})
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return spec(
        letters + [merge.replace(" ", "") for merge in merges], merges, specials, others, (), bos,
        normalizer={"type": "Sequence", "normalizers": steps}, decoder={"type": "Sequence", "decoders": back},
        pre_tokenizer=None, model=dict(unk_token="<unk>", byte_fallback=True, fuse_unk=True),
    )  # fmt: skip


def spec(words, merges, specials, others, sides, bos, model=None, **steps):
    vocab = {word: i for i, word in enumerate(dict.fromkeys(words))}
    new = [text for text in [*specials, *others] if text not in vocab]
    ids = vocab | {text: len(vocab) + i for i, text in enumerate(new)}
    token = lambda text: dict(
        id=ids[text], content=text, single_word=False, lstrip=False, rstrip=text in sides,
        normalized=text in others, special=text in specials,
    )  # fmt: skip
    post = bos and {
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
        "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {bos: {"id": bos, "ids": [ids[bos]], "tokens": [bos]}},
    }  # fmt: skip
    model = {"type": "BPE", "vocab": vocab, "merges": [merge.split(" ") for merge in merges]} | (model or {})
    added = sorted(map(token, [*specials, *others]), key=lambda token: token["id"])
    return (
        {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "model": model}
        | steps
        | {"post_processor": post}
    )


DIGITS = {"type": "Digits", "individual_digits": True}
WORDS = {
    "type": "Split", "behavior": "Isolated", "invert": False,
    "pattern": {"Regex": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"},
}  # fmt: skip
TURNS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
ROLES = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
FAST, LLAMA = (
    {"tokenizer_class": "PreTrainedTokenizerFast"},
    {"tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>"},
)
PIECES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
ADDS = {"add_bos_token": True, "add_eos_token": False}  # which transformers 5 passes over, next to a tokenizer.json
TOKEN = {"__type": "AddedToken"} | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
WIDE = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
HEADERS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
FAMILIES = {  # name: (tokenizer.json, tokenizer_config.json, chat template)
    "smollm2": (byte_level(TURNS, split=DIGITS), FAST | {"bos_token": TURNS[1], "eos_token": TURNS[2]}, CHATML),
    "qwen3": (
        byte_level(TURNS, ["<think>", "</think>"], split=WORDS, nfc=True),
        FAST | {"eos_token": TURNS[2], "pad_token": TURNS[0], "add_bos_token": False}, QWEN3,
    ),
    "qwen2": (
        byte_level(TURNS, split=WORDS, nfc=True), FAST | {"eos_token": TURNS[2], "pad_token": TURNS[0]}, CHATML,
    ),
    "mistral": (pieces(["<unk>", "<s>", "</s>"], bos="<s>"), LLAMA | PIECES | {"legacy": False}, MISTRAL),
    "llama3": (
        byte_level(HEADERS, split=WORDS, bos=HEADERS[0]),
        FAST | {"bos_token": HEADERS[0], "eos_token": HEADERS[4]}, [{"name": "default", "template": LLAMA3}],
    ),
    "r1": (
        byte_level(WIDE[:2], [*WIDE[2:], "<think>", "</think>"], split=WORDS),
        FAST | {f"{x}_token": TOKEN | {"content": text} for x, text in zip(("bos", "eos"), WIDE)} | ADDS, R1,
    ),
    "phi": (
        byte_level(["<s>", "<|endoftext|>", *ROLES], split=WORDS, sides=ROLES),
        FAST | {"bos_token": "<s>", "eos_token": "<|endoftext|>"}, PHI,
    ),
    "llama2": (
        pieces(["<unk>", "<s>", "</s>"], bos="<s>"),
        LLAMA | PIECES | ADDS | {"legacy": False}, LLAMA2,
    ),
    "tinyllama": (pieces(["<unk>", "<s>", "</s>"], bos="<s>"), LLAMA | PIECES | {"legacy": True}, ZEPHYR),
    "zephyr": (pieces(["<unk>", "<s>", "</s>"], bos="<s>"), FAST | PIECES, ZEPHYR),
    "gemma": (
        pieces(["<unk>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], prefix=False, bos="<bos>",
               first=("<unk>", "<bos>", "<eos>")),
        FAST | {"bos_token": "<bos>", "eos_token": "<eos>"}, GEMMA,
    ),
    "edited": (  # tokenizer_config.json says of tokens what tokenizer.json does not
        byte_level(TURNS, ["<tool>"], split=WORDS),
        FAST | {"bos_token": TURNS[1], "eos_token": TURNS[2], "extra_special_tokens": {"tool_token": "<tool>"}}
        | {"added_tokens_decoder": {"274": TOKEN | {"content": TURNS[2], "special": True, "rstrip": True},
                                    "276": TOKEN | {"content": "<mask>", "special": True}}},
        "{{ tool_token }}" + CHATML,
    ),
    "mapped": (  # special_tokens_map.json goes before tokenizer_config.json
        byte_level(TURNS, ["<tool>"], split=WORDS), FAST | {"eos_token": TURNS[0], "call_token": "<tool>"},
        "{{ call_token }}{{ pad_token }}" + CHATML,
    ),
    "bare": (
        pieces(["<unk>", "<s>", "</s>"], bos="<s>"), LLAMA | PIECES | {"legacy": False, "add_prefix_space": False},
        ZEPHYR,
    ),
}  # fmt: skip
MAPS = {"mapped": {"eos_token": TURNS[2], "pad_token": TOKEN | {"content": "<tool>"}}, "edited": {"pad_token": "a"}}
ENDS = {  # generation_config.json
    "gemma": ["<eos>", "<end_of_turn>"], "llama3": ["<|end_of_text|>", "<|eot_id|>"],
    "phi": ["<|endoftext|>", "<|end|>"], "qwen2": ["<|im_end|>", "<|endoftext|>"],
    "qwen3": ["<|im_end|>", "<|endoftext|>"],
}  # fmt: skip


def write_folder(name: str, root: Path) -> Path:
    """The family's files in a folder of its name."""
    words, settings, template = FAMILIES[name]
    folder = root / name
    folder.mkdir()
    files = {"tokenizer.json": words, "tokenizer_config.json": settings | {"chat_template": template}}
    if name in ENDS:
        ids = {token["content"]: token["id"] for token in words["added_tokens"]}
        files["generation_config.json"] = {"eos_token_id": [ids[text] for text in ENDS[name]]}
    if name in MAPS:
        files["special_tokens_map.json"] = MAPS[name]
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value, ensure_ascii=False))
    return folder


def measure(folder: Path) -> dict:
    """What transformers makes of the texts and chats: ids, text read back, or None for a chat that is refused."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def chat(messages, reply):
        try:
            return tokenizer.apply_chat_template(messages, add_generation_prompt=reply)["input_ids"]
        except Exception:  # the template's own
            return None

    texts = [tokenizer(text)["input_ids"] for text in TEXTS]
    return {
        "texts": texts, "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in texts],
        "opened": [chat(messages, True) for messages in CHATS], "whole": [chat(messages, False) for messages in CHATS],
    }  # fmt: skip


if __name__ == "__main__":
    import transformers

    with tempfile.TemporaryDirectory() as root:
        found = {name: measure(write_folder(name, Path(root))) for name in FAMILIES}
    GOLDEN.write_text(json.dumps({"transformers": transformers.__version__} | found, separators=(",", ":")) + "\n")
    print(f"{GOLDEN}: {len(found)} families, transformers {transformers.__version__}")
