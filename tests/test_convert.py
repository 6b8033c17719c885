"""GGUF: what goes in and out, against files that the gguf library writes and against formulas written out here."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import added, write_tokenizer
from safetensors.numpy import load_file, save_file

import convert
import gpt

gguf = pytest.importorskip("gguf", reason="GGUF needs the library gguf: pip install gguf")

V = 270  # 256 bytes, four joined tokens, four added ones, and rows that pad the embedding
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte-level BPE writes these as themselves
LETTERS = [chr(BYTES[i] if i < len(BYTES) else 256 + i - len(BYTES)) for i in range(256)]
JOINED, MERGES = ["he", "ll", "hell", "hello"], ["h e", "l l", "he ll", "hell o"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
ADDED = {"<|endoftext|>": 260, "<|im_start|>": 261, "<|im_end|>": 262, "<think>": 263}
TEXTS = ["hello Hello hell", "it's 12345, don't\n\n  go", " é 日本 🙂", "<think>a</think> <|im_end|>"]


def byte_level(splits=None, **model):
    """tokenizer.json of 260 byte pairs and four added tokens, of which <think> is no special one."""
    split = lambda regex: {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not splits}
    vocab = {word: i for i, word in enumerate(LETTERS + JOINED)}
    return {
        "version": "1.0",
        "added_tokens": [token | {"special": token["content"] != "<think>"} for token in added(ADDED)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(split, splits or ()), to_bytes]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": MERGES} | model,
    } | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))


def tokenizer_folder(folder, spec=None, **settings):
    names = dict(eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|im_start|>", chat_template=TEMPLATE)
    return write_tokenizer(folder, spec or byte_level(), **names | dict(add_bos_token=False) | settings)


def config_of(family, **other):
    return gpt.make_config(V, 64, 2, 4, 32, family, **other)


FAMILIES = {
    "gpt2": lambda: config_of("gpt2"),
    "llama": lambda: config_of("llama", kv_heads=2, tied=False),
    "llama3": lambda: config_of("llama", kv_heads=2, head_dim=16, rope_scaling=(8.0, 1.0, 4.0, 32.0)),
    "biased": lambda: config_of("llama", qkv_bias=True, out_bias=True, mlp_bias=True),
    "qwen2": lambda: config_of("qwen2", kv_heads=2, rope_theta=1e6),
    "qwen3": lambda: config_of("qwen3", kv_heads=2, head_dim=16),
}


def random_model(config):
    """Random weights, without a compilation."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(gpt.init, config), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape).astype(np.float32)), shapes)


def saved(folder, config, spec=None, **settings):
    """A model folder, as a run leaves it."""
    tokenizer = gpt.load_tokenizer(tokenizer_folder(folder, spec, **settings))
    gpt.save(folder, random_model(config), tokenizer)
    return folder


def run(source, target, **options):
    convert.main(convert.Config(str(source), str(target), **options))
    return target


def metadata(file):
    return {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


# there and back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_comes_back_from_a_gguf(tmp_path, family):
    try:
        config = FAMILIES[family]()
    except ValueError as error:
        pytest.skip(str(error))
    folder = saved(tmp_path / "model", config)
    back = run(run(folder, tmp_path / "f32.gguf", type="f32"), tmp_path / "back")
    before, after = load_file(folder / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model, tokenizer = gpt.load(back)
    assert model.config == config
    ours = gpt.load_tokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == ours.encode(text) and tokenizer.encode(text, True) == ours.encode(text, True)
    messages = [{"role": "user", "content": "hello"}]
    assert tokenizer.chat(messages) == ours.chat(messages) == [261, 259, 262]
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (262, 261, None)
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [262, 260]


@pytest.mark.parametrize("kind, error", [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", None)])
def test_fewer_bits_stay_within_their_error(tmp_path, kind, error):
    folder = saved(tmp_path / "model", FAMILIES["gpt2"]())
    back = run(run(folder, tmp_path / "model.gguf", type=kind), tmp_path / "back")
    after = load_file(back / "model.safetensors")
    changed = 0
    for name, x in load_file(folder / "model.safetensors").items():
        if x.ndim == 1 or "wpe" in name:
            np.testing.assert_array_equal(after[name], x, err_msg=name)
            continue
        changed += 1
        # of Q8_0: half a step, a step being 1/127 of the block's largest number, itself in fp16
        bound = np.abs(x) * error if error else largest_of_blocks(x, "wte" in name) * (0.5 / 127 + 2**-11)
        assert np.all(np.abs(after[name] - x) <= bound + 2**-25) and not np.array_equal(after[name], x), name
    assert changed == 9


def largest_of_blocks(x, table):
    """The largest number of each block of 32 along a row of a GGUF, as an array of the shape of x."""
    rows = x if table else x.T  # GPT-2's matrices are (in, out)
    largest = np.abs(rows).reshape(len(rows), -1, 32).max(-1).repeat(32, axis=-1).reshape(rows.shape)
    return largest if table else largest.T


def test_rows_that_blocks_do_not_divide_are_f16(tmp_path, capsys):
    folder = saved(tmp_path / "model", gpt.make_config(V, 64, 1, 2, 48))
    found = tensors_of(run(folder, tmp_path / "model.gguf", type="q8_0"))
    assert found["blk.0.attn_q.weight"].tensor_type.name == found["token_embd.weight"].tensor_type.name == "F16"
    assert found["blk.0.ffn_down.weight"].tensor_type.name == "Q8_0"  # 128 in a row
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    assert "7 as F16, 3 as F32, 1 as Q8_0" in capsys.readouterr().out


# against formulas and files of others ---------------------------------------------------------------------------------


def test_the_rows_of_q_and_k_alternate_between_the_halves_of_a_head(tmp_path):
    folder = saved(tmp_path / "model", config_of("llama", kv_heads=2, qkv_bias=True, out_bias=True))
    before, found = load_file(folder / "model.safetensors"), tensors_of(run(folder, tmp_path / "x.gguf", type="f32"))
    E = 8
    for ours, theirs, heads in (("q", "attn_q", 4), ("k", "attn_k", 2)):
        for kind in ("weight", "bias"):
            x, y = before[f"model.layers.1.self_attn.{ours}_proj.{kind}"], found[f"blk.1.{theirs}.{kind}"].data
            for head in range(heads):
                for j in range(E // 2):
                    np.testing.assert_array_equal(y[head * E + 2 * j], x[head * E + j])
                    np.testing.assert_array_equal(y[head * E + 2 * j + 1], x[head * E + j + E // 2])
    np.testing.assert_array_equal(found["blk.1.attn_v.weight"].data, before["model.layers.1.self_attn.v_proj.weight"])


def test_llama_3s_factors_slow_each_frequency_as_the_model_does(tmp_path):
    config = FAMILIES["llama3"]()
    found = tensors_of(run(saved(tmp_path / "model", config), tmp_path / "x.gguf", type="f32"))
    angle = lambda c: np.arctan2(*np.asarray(gpt.rope_angles(c, jnp.ones((1, 1))))[::-1]).ravel()
    plain = angle(dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_allclose(plain / found["rope_freqs.weight"].data, angle(config), rtol=1e-5)
    assert found["rope_freqs.weight"].data.max() == 8


def test_what_a_gguf_says_of_the_model(tmp_path):
    config = FAMILIES["llama"]()
    said = metadata(run(saved(tmp_path / "mine", config), tmp_path / "x.gguf", type="q8_0"))
    assert said["general.architecture"] == "llama" and said["general.name"] == "mine"
    assert said["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    sizes = dict(block_count=2, context_length=64, embedding_length=32, feed_forward_length=96, vocab_size=V)
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8}
    sizes |= {"attention.value_length": 8, "rope.dimension_count": 8, "rope.freq_base": 10000.0}
    assert {key: said[f"llama.{key}"] for key in sizes} == sizes
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = {key.removeprefix("tokenizer.ggml."): value for key, value in said.items() if "ggml." in key}
    assert (tokens["model"], tokens["pre"], tokens["merges"]) == ("gpt2", "gpt-2", MERGES)
    assert tokens["tokens"] == LETTERS + JOINED + list(ADDED) + [f"[PAD{i}]" for i in range(264, V)]
    kinds = gguf.TokenType
    assert (
        tokens["token_type"] == [kinds.NORMAL] * 260 + [kinds.CONTROL] * 3 + [kinds.USER_DEFINED] + [kinds.UNUSED] * 6
    )
    assert [tokens[f"{x}_token_id"] for x in ("eos", "bos", "padding")] == [262, 261, 261]
    assert tokens["add_bos_token"] is False and said["tokenizer.chat_template"] == TEMPLATE


def test_what_tokenizer_config_says_of_tokens_is_what_a_gguf_says(tmp_path):
    """It goes before tokenizer.json in transformers, too."""
    thought = dict(content="<think>", special=True) | dict.fromkeys(
        ("lstrip", "rstrip", "single_word", "normalized"), False
    )
    more = {"263": thought, "264": thought | {"content": "<tool>", "special": False}}
    folder = saved(tmp_path / "model", config_of("llama"), added_tokens_decoder=more)
    said = metadata(run(folder, tmp_path / "x.gguf"))
    kinds = gguf.TokenType
    assert said["tokenizer.ggml.tokens"][263:265] == ["<think>", "<tool>"]
    assert said["tokenizer.ggml.token_type"][263:265] == [kinds.CONTROL, kinds.USER_DEFINED]
    ours, back = gpt.load_tokenizer(folder), gpt.load_tokenizer(run(tmp_path / "x.gguf", tmp_path / "back"))
    for text in (*TEXTS, "<tool>"):
        assert back.encode(text, True) == ours.encode(text, True)
    assert back.decode([263, 259, 264]) == ours.decode([263, 259, 264]) == "hello<tool>"


def test_templates_that_are_not_the_default_go_along(tmp_path):
    named = [dict(name="default", template=TEMPLATE), dict(name="tool_use", template="a")]
    folder = saved(tmp_path / "model", config_of("llama"), chat_template=named)
    (folder / "additional_chat_templates").mkdir()  # where transformers 5 saves them
    (folder / "additional_chat_templates" / "rag.jinja").write_text("b")
    model, tokenizer = gpt.load(folder)
    gpt.save(tmp_path / "saved", model, tokenizer)
    wanted = {"default": TEMPLATE, "tool_use": "a", "rag": "b"}
    assert gpt.load_tokenizer(tmp_path / "saved").templates == wanted
    back = run(run(tmp_path / "saved", tmp_path / "x.gguf"), tmp_path / "back")
    assert gpt.load_tokenizer(back).templates == wanted


def write_gguf(file, arch="llama", kind=None, drop=(), more=None, width=32, keys=None, **metadata_):
    """A one-layer model by the gguf library alone. `keys`: what its metadata says besides."""
    writer = gguf.GGUFWriter(file, arch)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": width, "feed_forward_length": 64}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2}
    for key, value in sizes.items():
        if key not in drop:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    kinds = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array, bool: writer.add_bool}
    kinds[float] = writer.add_float32
    for key, value in (keys or {}).items():
        kinds[type(value)](key, value)
    tokens = LETTERS + JOINED + list(ADDED)
    types = [1] * 260 + [3, 3, 3, 4]
    plain = dict(model="gpt2", pre="gpt-2", tokens=tokens, token_type=types, merges=MERGES)
    plain |= dict(eos_token_id=262, bos_token_id=261)
    for key, value in (plain | metadata_).items():
        if value is not None:
            kinds[type(value)](f"tokenizer.ggml.{key}", value)
    shapes = dict(attn_norm=32, ffn_norm=32, attn_q=(32, 32), attn_k=(16, 32), attn_v=(16, 32), attn_output=(32, 32))
    shapes |= dict(ffn_gate=(64, 32), ffn_up=(64, 32), ffn_down=(32, 64))
    shapes = {f"blk.0.{name}": shape for name, shape in shapes.items()}
    shapes |= {"token_embd": (264, 32), "output_norm": 32} | (more or {})
    for i, (name, shape) in enumerate(shapes.items()):
        x = np.random.default_rng(i).normal(0, 1, shape).astype(np.float32)
        if name not in drop:
            quantised = kind is not None and x.ndim > 1
            x = gguf.quants.quantize(x, kind) if quantised else x
            writer.add_tensor(f"{name}.weight", x, raw_dtype=kind if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_gguf_of_others_becomes_a_model_folder(tmp_path, capsys):
    file = write_gguf(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType.Q4_1, eot_token_id=260, add_bos_token=True)
    folder = run(file, tmp_path / "model")
    model, tokenizer = gpt.load(folder)
    assert model.config.tied and model.config.norm_eps == 1e-6 and model.config.kv_heads == 2
    found, x = tensors_of(file), load_file(folder / "model.safetensors")
    read = lambda name: gguf.quants.dequantize(found[name].data, found[name].tensor_type)
    np.testing.assert_array_equal(x["model.embed_tokens.weight"], read("token_embd.weight"))
    np.testing.assert_array_equal(x["model.layers.0.mlp.down_proj.weight"], read("blk.0.ffn_down.weight"))
    q, E = read("blk.0.attn_q.weight"), 8
    order = [h * E + 2 * (j % 4) + j // 4 for h in range(4) for j in range(E)]
    np.testing.assert_array_equal(x["model.layers.0.self_attn.q_proj.weight"], q[order])
    assert tokenizer.bos_id == 261 and tokenizer.encode("hello") == [259]
    added_tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert {t["content"]: (t["id"], t["special"]) for t in added_tokens} == {
        text: (i, text != "<think>") for text, i in ADDED.items()
    }
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [262, 260]
    out = capsys.readouterr().out
    assert "no chat template" in out and "8 of Q4_1" in out and "3 of F32" in out


# tokenizers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", convert.SPLITS)
def test_how_text_is_cut_has_a_name_and_comes_back(tmp_path, capsys, name):
    spec = byte_level(convert.SPLITS[name], ignore_merges=name == "llama-bpe")
    spec["normalizer"] = {"type": "NFC"} if name == "qwen2" else None
    folder = saved(tmp_path / "model", gpt.make_config(V, 8, 1, 1, 8), spec)
    file = run(folder, tmp_path / "x.gguf")
    assert metadata(file)["tokenizer.ggml.pre"] == name
    assert ("form NFC" in capsys.readouterr().out) == (name == "qwen2")
    ours, back = gpt.load_tokenizer(folder), gpt.load_tokenizer(run(file, tmp_path / "back"))
    assert [ours.encode(text) for text in TEXTS] == [back.encode(text) for text in TEXTS]


@pytest.mark.parametrize("name, same", convert.SAME_SPLITS.items())
def test_names_for_the_same_cut(tmp_path, name, same):
    """A distilled R1 model's files are those of a Qwen2 without its NFC, which they say by an empty list."""
    folder = run(write_gguf(tmp_path / "x.gguf", pre=name), tmp_path / "model")
    spec = json.loads((folder / "tokenizer.json").read_text())
    said = name if name == "deepseek-r1-qwen" else same
    assert spec["normalizer"] is None and convert.find_splits(spec) == said
    assert gpt.load_tokenizer(folder).bos_id == (261 if same == "llama-bpe" else None)
    spec["normalizer"] = {"type": "Sequence", "normalizers": []}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    assert metadata(run(folder, tmp_path / "y.gguf"))["tokenizer.ggml.pre"] == said


def test_smollms_digits_are_its_splits():
    spec = byte_level()
    spec["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    assert convert.find_splits(spec) == "smollm"
    spec["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    assert convert.find_splits(spec) is None
    assert convert.find_splits(byte_level() | {"normalizer": {"type": "NFC"}}) is None


WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁abcd", "ab", "▁ab", "cd", "bc", "▁abcd"]
SCORES = [0.0] * 264 + [-1.0, -2.0, -4.0, -3.0, -5.0]


def sentencepiece_gguf(file):
    """SentencePiece joins "bc" before "cd", and "ab" before both."""
    types = [2, 3, 3] + [6] * 256 + [1] * (len(WORDS) - 259)
    plain = dict(model="llama", pre="default", tokens=WORDS, scores=SCORES, token_type=types, merges=None)
    ids = dict(eos_token_id=2, bos_token_id=1, unknown_token_id=0)
    return write_gguf(file, more={"token_embd": (len(WORDS), 32)}, **plain | ids)


def join_by_scores(text):
    """SentencePiece's rule by hand: join the neighbours whose union has the best score, until none has one."""
    scores, tokens = dict(zip(WORDS, SCORES)), list("▁" + text.replace(" ", "▁"))
    while pairs := [(scores[a + b], -i) for i, (a, b) in enumerate(zip(tokens, tokens[1:])) if a + b in scores]:
        i = -max(pairs)[1]
        tokens[i : i + 2] = ["".join(tokens[i : i + 2])]
    bytes_ = lambda token: [f"<0x{b:02X}>" for b in token.encode()] if token not in scores else [token]
    return [WORDS.index(x) for token in tokens for x in bytes_(token)]


def test_sentencepiece_joins_by_scores_there_and_back(tmp_path):
    file = sentencepiece_gguf(tmp_path / "x.gguf")
    folder = run(file, tmp_path / "model")
    tokenizer = gpt.load_tokenizer(folder)
    assert tokenizer.bos_id == 1 and tokenizer.eos_id == 2
    for text in ("abcd", "ab cd bcd", "dbc é", "abcdabcd"):
        assert tokenizer.encode(text) == join_by_scores(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    again = run(folder, tmp_path / "again.gguf", type="f32")
    said, first = metadata(again), metadata(file)
    for key in ("tokens", "token_type", "model"):
        assert said[f"tokenizer.ggml.{key}"] == first[f"tokenizer.ggml.{key}"]
    back = gpt.load_tokenizer(run(again, tmp_path / "back"))
    assert back.encode("ab cd bcd é") == tokenizer.encode("ab cd bcd é")
    assert said["tokenizer.ggml.add_space_prefix"]
    # merges that no scores make
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][1:]
    assert convert.find_scores(spec) is None


@pytest.mark.parametrize("settings, blanks", [(dict(legacy=True), True), (dict(legacy=False), False),
                                              (dict(legacy=True, add_prefix_space=False), False)])  # fmt: skip
@pytest.mark.parametrize("saved_by_5", [False, True])
def test_blanks_after_special_tokens_are_as_the_model_reads_them(tmp_path, capsys, settings, blanks, saved_by_5):
    """The class LlamaTokenizer goes by its settings, whatever tokenizer.json says. llama.cpp has one rule for all."""
    folder = run(sentencepiece_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    config = json.loads((folder / "tokenizer_config.json").read_text()) | dict(tokenizer_class="LlamaTokenizer")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | settings))
    if saved_by_5:
        spec = json.loads((folder / "tokenizer.json").read_text())
        spec |= dict(
            normalizer=None, pre_tokenizer=dict(type="Metaspace", replacement="▁", prepend_scheme="first", split=False)
        )
        (folder / "tokenizer.json").write_text(json.dumps(spec))
    capsys.readouterr()
    out = run(folder, tmp_path / "y.gguf")
    assert metadata(out)["tokenizer.ggml.add_space_prefix"] is blanks
    assert ("begins a text with a blank" in capsys.readouterr().out) == (settings == dict(legacy=False))
    ours, back = gpt.load_tokenizer(folder), gpt.load_tokenizer(run(out, tmp_path / "back"))
    for text in ("<s>ab cd</s>bcd d", "<s>d", "<s>"):
        assert back.encode(text, True) == ours.encode(text, True)


def test_tokens_with_rules_of_their_own_are_named(tmp_path, capsys):
    """llama.cpp reads a token wherever its text stands, and no blanks with it."""
    folder = run(sentencepiece_gguf(tmp_path / "x.gguf"), tmp_path / "model")
    spec = json.loads((folder / "tokenizer.json").read_text())
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    rules = {"<|u|>": dict(rstrip=True, special=True), "<s2>": dict(normalized=True, special=True), "<t>": {},
             "<n>": dict(normalized=True), "<w>": dict(single_word=True)}  # fmt: skip
    end = 1 + max(token["id"] for token in spec["added_tokens"] + [{"id": max(spec["model"]["vocab"].values())}])
    spec["added_tokens"] += [plain | dict(id=end + i, content=x) | rules[x] for i, x in enumerate(rules)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    model = gpt.init(dataclasses.replace(gpt.load(folder)[0].config, vocab_size=end + len(rules)), jax.random.key(0))
    gpt.save(tmp_path / "more", model, gpt.load_tokenizer(folder))
    run(tmp_path / "more", tmp_path / "y.gguf")
    assert "(lstrip, rstrip, single_word, normalized): <|u|>, <n>, <w>\n" in capsys.readouterr().out


def test_words_that_are_cut_before_they_are_joined_have_no_scores():
    spec = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {"▁": 0}, "merges": []}}
    blanks = dict(type="Metaspace", replacement="▁", prepend_scheme="always")
    assert convert.find_scores(spec | {"pre_tokenizer": blanks | {"split": False}}) == {"▁": -1e6}
    assert convert.find_scores(spec | {"pre_tokenizer": blanks | {"split": True}}) is None


# what cannot be -------------------------------------------------------------------------------------------------------


def test_a_file_cut_short_is_named_wherever_it_is_cut(tmp_path):
    whole = write_gguf(tmp_path / "x.gguf").read_bytes()
    for size in [*range(8, 400, 23), len(whole) // 3, len(whole) - 40_000, len(whole) - 100]:
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut.gguf cannot be read .*cut short or damaged"):
            run(tmp_path / "cut.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "start, message",
    [
        (b"PK\x03\x04....", "x.gguf is not a GGUF"),
        (b"GGUF\x01\0\0\0", "GGUF version 1: 2 and 3 are read"),
        (b"GGUF\0\0\0\x03", "big-endian"),
        (b"", "is not a GGUF"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, start, message):
    (tmp_path / "x.gguf").write_bytes(start)
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "x.gguf", tmp_path / "out")


BAD = {
    "its architecture is 'gemma3', and one of llama, qwen2, qwen3, gpt2": dict(arch="gemma3"),
    "the metadata has no llama.block_count": dict(drop=("block_count",)),
    "its layers differ in heads": dict(
        drop=("attention.head_count_kv",), keys={"llama.attention.head_count_kv": [2, 4]}
    ),
    "llama.rope.scaling.type = 'yarn' is not read": dict(
        keys={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}
    ),
    "llama.rope.scaling.type = 'linear' is not read": dict(keys={"llama.rope.scale_linear": 2.0}),
    "llama.attention.causal = false is not read": dict(keys={"llama.attention.causal": False}),
    "llama.attention.sliding_window, shorter than the context": dict(keys={"llama.attention.sliding_window": 8}),
    "llama.rope.dimension_count is not the 8 of a head's width": dict(keys={"llama.rope.dimension_count": 4}),
    "tensor blk.0.attn_k.weight is missing": dict(drop=("blk.0.attn_k",)),
    r"token_embd.weight has shape \(264, 32\), the configuration needs \(264, 64\)": dict(width=64),
    "configuration does not know: blk.0.ffn_gate_inp.weight": dict(more={"blk.0.ffn_gate_inp": (4, 32)}),
    "rope_freqs.weight scales the rotary frequencies in another way": dict(more={"rope_freqs": 4}),
    "pre = 'gpt-4o' is not read here: gpt-2, smollm, llama-bpe": dict(pre="gpt-4o"),
    "says nothing of how text is cut": dict(pre=None),
    "a tokenizer of the kind 't5' is not read": dict(model="t5"),
    "holds no tokenizer": dict(tokens=None),
    "names no end token": dict(eos_token_id=None),
    "'bos_token_id': 999} is none of them": dict(bos_token_id=999),
    "or one twice": dict(tokens=["a"] * 264),
    "no scores or no tokens of single bytes": dict(model="llama"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_is_wrong_with_a_gguf_is_said(tmp_path, message):
    file = write_gguf(tmp_path / "x.gguf", **BAD[message])
    with pytest.raises(ValueError, match=f"x.gguf: .*{message}"):
        run(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_that_changes_nothing_is_read_and_the_rest_is_named(tmp_path, capsys):
    keys = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0, "llama.attention.causal": True}
    keys |= {"llama.rope.scale_linear": 1.0, "llama.attention.sliding_window": 64, "general.author": "me"}
    folder = run(write_gguf(tmp_path / "x.gguf", keys=keys), tmp_path / "out")
    assert gpt.load(folder)[0].config.rope_scaling is None
    assert "left out, since a model folder has no place for it: general.author\n" in capsys.readouterr().out


def test_a_part_of_a_gguf_is_named(tmp_path):
    with pytest.raises(ValueError, match="x.gguf is one of 3 parts: join them first, llama-gguf-split --merge"):
        run(write_gguf(tmp_path / "x.gguf", keys={"split.count": 3}), tmp_path / "out")


def test_a_quantisation_that_the_library_does_not_read_is_named(tmp_path, monkeypatch):
    file = write_gguf(tmp_path / "x.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    monkeypatch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(ValueError, match="the tensor .* is of type Q8_0, which the gguf library does not read"):
        run(file, tmp_path / "out")


def test_a_folder_that_llama_cpp_cannot_have_is_refused(tmp_path, golden, words):
    tokenizer = gpt.load_tokenizer(words)
    config = gpt.make_config(tokenizer.vocab_size, 8, 1, 1, 8)
    gpt.save(tmp_path / "words", random_model(config), tokenizer)
    out = tmp_path / "out.gguf"
    with pytest.raises(ValueError, match="llama.cpp has no tokenizer like that of .*words.*WordLevel"):
        run(tmp_path / "words", out)
    with pytest.raises(ValueError, match="is a reward model, and llama.cpp has no such head"):
        run(golden / "llama_score", out)
    with pytest.raises(ValueError, match="biased has attention_bias = true, and llama.cpp's qwen3 has no biases"):
        run(saved(tmp_path / "biased", config_of("qwen3", qkv_bias=True, out_bias=True)), out)
    with pytest.raises(ValueError, match="few: its tokenizer has 264 ids, its model 260"):
        run(saved(tmp_path / "few", gpt.make_config(260, 64, 1, 2, 16)), out)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="is an adapter. Merge it first: python convert.py"):
        run(tmp_path / "peft", out)
    folder = saved(tmp_path / "model", config_of("llama"))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.extra.weight": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="does not know: model.extra.weight"):
        run(folder, out)
    save_file(tensors | {"model.norm.weight": np.ones(2, np.float32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(2,\), the configuration needs \(32,\)"):
        run(folder, out)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="model.norm.weight is missing"):
        run(folder, out)
    assert not out.exists()
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="out.gguf is there"):
        run(folder, out)
    with pytest.raises(FileNotFoundError, match="no file or folder .*nowhere"):
        run(tmp_path / "nowhere", tmp_path / "new")
