"""Models in and out of other tools' formats. The direction follows from what SOURCE and TARGET are:

    python convert.py model.gguf out/mine                # a GGUF (llama.cpp, Ollama, LM Studio) -> a model folder
    python convert.py out/sft out/sft.gguf --type q8_0   # a model folder -> a GGUF
    python convert.py out/sft-lora out/sft-lora-peft     # a run with an adapter -> a PEFT folder
    python convert.py out/sft-lora-peft out/mine         # a PEFT folder -> a model folder, as a run leaves it

A GGUF holds weights, tokenizer, chat template and end tokens in one file. Where it differs from a model folder:
1. In the llama family the rows of q and k are in another order (`interleave`).
2. Llama 3's rotary scaling is a tensor of factors (`find_rope_scaling`).
3. How text is cut into words has a name there, and is a pattern in tokenizer.json (`SPLITS`).
4. Weights of few bits become fp32 as the gguf library reads them. Training on them starts from what llama.cpp computes,
   not from the model before it was quantised.

A run with an adapter has adapter/adapter.json. What becomes of it is read by `PeftModel.from_pretrained(base, TARGET)`.
A PEFT folder has adapter_config.json. TARGET then holds the merged model, and in adapter/ the adapter by itself. Either
way the base model is the folder that SOURCE names, or --base; one with other weights than were trained on is an error.

PEFT's layout (LoRA, Hu et al. 2021, arXiv:2106.09685): W + alpha / r B A for W (O, I), A (r, I) and B (O, r) of every
layer, where ours is W + scale a b for W (I, O), a (I, r) and b (r, O).
1. GPT-2's q, k and v are one module there, c_attn. Ours become its A one below the other, and its B as blocks on a
   diagonal.
2. The two factors of an embedding are lora_embedding_A (r, V) and lora_embedding_B (D, r).
3. A tied head changes with its embedding: PEFT keeps the same factors a second time, under lm_head. (It finds out that
   the two are tied by the names embed_tokens and lm_head: one of them has to be among the targets.) Merging would add
   them to the one table twice; the README.md that is written beside them says how to merge.
4. What a reward model has beside its head (pooling, bias, suffix) is metadata of the file, which PEFT does not read;
   README.md says it as well.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors import safe_open
from safetensors.numpy import save_file
from tyro.conf import Positional, arg

import gpt


@dataclass(frozen=True)
class Config:
    source: Annotated[Positional[str], arg(metavar="SOURCE")]  # a GGUF, a model folder, or one with an adapter
    target: Annotated[Positional[str], arg(metavar="TARGET")]  # the folder to write, new or empty, or NAME.gguf
    base: str | None = None  # folder or Hub name of the adapter's base (None: the one that SOURCE names)
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f16"  # of the matrices in a GGUF: 32, 16, 16 or 8.5 bits a weight


# ---------------------------------------------------------------------------------------------------- names


def peft_modules(config: gpt.Config) -> dict[str, str]:
    """PEFT's module for each of our layers and tables; {i} is the layer's number. "qkv" is GPT-2's fused one."""
    modules = {name.removeprefix("blocks.").removesuffix(".weight"): theirs for name, theirs, _ in gpt.layout(config)}
    modules = {name: theirs.removesuffix(".weight") for name, theirs in modules.items() if name in gpt.TARGETS}
    modules["head"] = "lm_head"  # a tied one too
    if config.gpt2:
        modules = {name: theirs for name, theirs in modules.items() if name not in ("q", "k", "v")}
        modules["qkv"] = "transformer.h.{i}.attn.c_attn"
    return modules


def fuse(layers: dict, config: gpt.Config) -> dict:
    """GPT-2's q, k and v as one layer "qkv". Of the n that are there, each a (L, D, r) and b (L, r, D), it has all a
    side by side (L, D, n r), and each b in its own rows and columns of (L, n r, 3 D), which is zero elsewhere."""
    names, D = [name for name in "qkv" if name in layers], config.dim
    if not config.gpt2 or not names:
        return layers
    a = np.concatenate([layers[name][0] for name in names], axis=-1)
    b, row = np.zeros((config.layers, a.shape[-1], 3 * D), np.float32), 0
    for name in names:
        own, column = layers[name][1], "qkv".index(name) * D
        b[:, row : row + own.shape[1], column : column + D] = own
        row += own.shape[1]
    return {name: pair for name, pair in layers.items() if name not in names} | {"qkv": (a, b)}


def split(layers: dict) -> dict:
    """What `fuse` joined, or PEFT trained as one, taken apart: q, k and v each get their columns of b, and of its rows
    (and a's columns) those that are not zero there."""
    if "qkv" not in layers:
        return layers
    a, b = layers["qkv"]
    layers = {name: pair for name, pair in layers.items() if name != "qkv"}
    for name, own in zip("qkv", np.split(b, 3, axis=-1)):
        used = np.any(own != 0, axis=(0, 2))
        if used.any():
            layers[name] = a[..., used], own[:, used]
    return layers


# ---------------------------------------------------------------------------------------------------- adapter -> PEFT


def adapter_to_peft(source: Path, target: Path, base: str | None):
    """A run folder's adapter as a PEFT folder."""
    about = json.loads((source / "adapter" / "adapter.json").read_text())
    base = base or about["base"]
    check_base(source / "adapter", base, about["base_hash"])
    write_peft(target, gpt.load_adapter(source, base), base)


def check_base(path, base: str, wanted: str):
    """Refuse a base whose weights are not those that the adapter was trained on."""
    found = gpt.weights_hash(gpt.find_folder(base))
    if found != wanted:
        raise ValueError(
            f"{path} is an adapter on another model than {base}: the weights of its base have the hash {wanted}, these "
            f"{found}. Name the right folder with --base"
        )


def write_peft(target: Path, model: gpt.Adapter | gpt.ScoreModel, base: str):
    """adapter_model.safetensors and adapter_config.json, which names the folder `base` as the model's place."""
    folder = gpt.find_folder(base)
    config = gpt.config_from_hf(json.loads((folder / "config.json").read_text()), folder / "config.json")
    is_score = isinstance(model, gpt.ScoreModel)
    adapter = model.body if is_score else model
    tensors, ranks = peft_tensors(adapter, config, tied=config.tied and not is_score)
    notes = {"format": "pt", "base": gpt.weights_hash(folder)}
    if is_score:
        tensors["score.weight"] = np.asarray(model.head)[None]
        if model.query is not None:
            tensors["score.query"] = np.asarray(model.query)
        score = dict(pool=model.pool, bias=float(model.bias), suffix=list(model.suffix))
        notes["score"] = json.dumps(score)
    layer = next(iter((adapter.blocks | adapter.tables).values()))
    rank, scale = layer.a.shape[-1], layer.scale
    others = {module: r for module, r in ranks.items() if r != rank}
    settings = dict(
        peft_type="LORA", task_type="SEQ_CLS" if is_score else "CAUSAL_LM", base_model_name_or_path=str(base), r=rank,
        lora_alpha=rank * scale, lora_dropout=0.0, bias="none", fan_in_fan_out=config.gpt2, inference_mode=True,
        target_modules=list(ranks), modules_to_save=["score"] if is_score else None, rank_pattern=others,
        alpha_pattern={module: r * scale for module, r in others.items()},
        ensure_weight_tying="lm_head.lora_A.weight" in tensors and config.tied,
    )  # fmt: skip
    # safetensors silently stores a transposed view in the wrong order
    tensors = {f"base_model.model.{name}": np.ascontiguousarray(x) for name, x in tensors.items()}
    target.mkdir(parents=True, exist_ok=True)
    gpt.write_atomic(target / "adapter_model.safetensors", partial(save_file, tensors, metadata=notes))
    gpt.write_json(target / "adapter_config.json", settings)
    if settings["ensure_weight_tying"] and "wte" in adapter.tables:
        print(f"PEFT's merge_and_unload would change the tied embedding twice: {target}/README.md says what to do")
        (target / "README.md").write_text(TIED_CARD.format(base=base, adapter=target))
    if is_score:
        (target / "README.md").write_text(SCORE_CARD.format(pool=score["pool"], **describe_end(score)))


TIED_CARD = """# An adapter on a tied model

`PeftModel.from_pretrained` reads it as it was trained. Before `merge_and_unload`, part the head from the embedding: the
adapter is on both, they are one table, and PEFT would add it there twice.

```python
model = AutoModelForCausalLM.from_pretrained("{base}")
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
model.config.tie_word_embeddings = False
merged = PeftModel.from_pretrained(model, "{adapter}").merge_and_unload()
```

The run that this adapter comes from holds the merged model as well.
"""


SCORE_CARD = """# An adapter that is a reward model

PEFT reads its weights and its head. What it does not read: pooling {pool!r} (transformers has "last" alone), the bias
{bias!r}, to be added to the logit, and what stands at the end of a row in place of its end token: {end}.
"""


def describe_end(score: dict) -> dict:
    return dict(
        bias=score["bias"], end=f"the ids {score['suffix']}" if score["suffix"] else "nothing, the end token itself"
    )


def peft_tensors(adapter: gpt.Adapter, config: gpt.Config, tied: bool) -> tuple[dict, dict[str, int]]:
    """(an adapter's arrays under PEFT's names, the rank of each of its modules). `tied`: wte is the head too."""
    modules, tensors, ranks = peft_modules(config), {}, {}
    pairs = lambda layers: {name: (np.asarray(x.a), np.asarray(x.b)) for name, x in layers.items()}
    for name, (a, b) in fuse(pairs(adapter.blocks), config).items():
        ranks[modules[name].split("{i}.")[1]] = a.shape[-1]
        for i in range(config.layers):
            module = modules[name].format(i=i)
            tensors |= {f"{module}.lora_A.weight": a[i].T, f"{module}.lora_B.weight": b[i].T}
    for name, (a, b) in pairs(adapter.tables).items():
        if name == "wte":
            ranks[modules[name].split(".")[-1]] = a.shape[-1]
            tensors |= {f"{modules[name]}.lora_embedding_A": a.T, f"{modules[name]}.lora_embedding_B": b.T}
        if name == "head" or tied:
            ranks["lm_head"] = a.shape[-1]
            tensors |= {"lm_head.lora_A.weight": b, "lm_head.lora_B.weight": a}
    return tensors, ranks


# ---------------------------------------------------------------------------------------------------- PEFT -> adapter


def peft_to_model(source: Path, target: Path, base: str | None):
    """A PEFT folder as a model folder: the base with the adapter merged into it, and the adapter by itself."""
    file = source / "adapter_config.json"
    try:
        settings = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if missing := {"r", "lora_alpha"} - settings.keys():
        raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}: is it an adapter of PEFT's LoRA?")
    base = base or settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{source} does not say which model it is an adapter on: name it with --base")
    model, tokenizer = gpt.load(base)
    if isinstance(model, gpt.ScoreModel):
        raise ValueError(f"{base} is a reward model: name the language model that the adapter is on with --base")
    adapter = read_peft(source, settings, model, base)
    gpt.save_adapter(target / "adapter", adapter, base)
    gpt.save(target, gpt.merge(gpt.attach(adapter, model)), tokenizer)


def read_peft(source: Path, settings: dict, model: gpt.GPT, base: str) -> gpt.Adapter | gpt.ScoreModel:
    """The adapter in a PEFT folder, for `model`, that of the folder `base`. A kind of adapter that is not read here is
    an error, and so is a tensor that is missing, left over, or of another shape than the base's."""
    check_settings(settings, source / "adapter_config.json")
    file = source / "adapter_model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"no {file.name} in {source}")
    tensors = {name.removeprefix("base_model.model."): x for name, x in gpt.read_tensors(source).items()}
    with safe_open(file, "numpy") as f:
        notes = f.metadata() or {}
    if "base" in notes:
        check_base(source, base, notes["base"])
    try:
        is_score = "score.weight" in tensors
        found = read_adapter(tensors, settings, model, tied=model.config.tied and not is_score)
        if is_score:
            found = read_head(tensors, found, model.config.dim, **json.loads(notes.get("score", "{}")))
        drop_copies(tensors, model)
        if tensors:
            raise ValueError(f"{base} has no place for the tensors {', '.join(sorted(tensors)[:5])}")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return found


PEFT_VALUES = dict(peft_type=("LORA",), bias=("none",), init_lora_weights=(True, "gaussian", "orthogonal", "eva"))
PEFT_PLAIN = {  # settings that change nothing of what the tensors of an adapter compute, or that are read below
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "target_parameters", "task_type", "unsloth_fixed", "use_rslora",
}  # fmt: skip


def check_settings(settings: dict, file: Path):
    """ValueError where a setting says that the adapter computes otherwise, on another base than the one it names
    (PiSSA, OLoRA, CorDA and LoftQ change it first), or only after some tokens, and where nothing is known of it."""
    for key, value in settings.items():
        if not value or key in PEFT_PLAIN or value in PEFT_VALUES.get(key, ()):
            continue
        only = f", only {' or '.join(map(repr, PEFT_VALUES[key]))}" if key in PEFT_VALUES else ""
        raise ValueError(f"{file}: {key} = {value!r:.60} is not read here{only}")


def read_adapter(tensors: dict, settings: dict, model: gpt.GPT, tied: bool) -> gpt.Adapter:
    """Take an adapter's arrays out of `tensors`. Modules of another alpha / r than the settings' get its factor in b:
    one scale holds for all of an adapter here. `tied`: embedding and head change together."""
    modules, scale = peft_modules(model.config), scaling(settings, settings["lora_alpha"], settings["r"]) or 1.0
    take = partial(take_pair, tensors, settings, scale)
    layers, tables, V, D = {}, {}, *model.wte.shape
    if f"{modules['wte']}.lora_embedding_A" in tensors:
        tables["wte"] = take(modules["wte"], "lora_embedding_{}", V, D)
    if "lm_head.lora_A.weight" in tensors:
        b, a = take("lm_head", "lora_{}.weight", D, V)
        tables["head"] = a.T, b.T
    if tied and tables:
        wte, head = tables.get("wte"), tables.pop("head", None)
        if not (wte and head and all(map(np.array_equal, wte, head))):
            raise ValueError("this model's head is its embedding: both need the same adapter (ensure_weight_tying)")
    for name, module in modules.items():
        layers_of = [f"{module.format(i=i)}.lora_A.weight" in tensors for i in range(model.config.layers)]
        if name not in gpt.TABLES and any(layers_of):
            I, O = (D, 3 * D) if name == "qkv" else getattr(model.blocks, name).weight.shape[1:]
            pairs = [take(module.format(i=i), "lora_{}.weight", I, O) for i in range(model.config.layers)]
            if len({a.shape for a, _ in pairs}) > 1:
                raise ValueError(f"{module} has another rank in some layers than in others: one is read here")
            layers[name] = tuple(map(np.stack, zip(*pairs)))
    layers = split(layers)
    if not (layers or tables):
        raise ValueError("no adapter here changes a layer of this model")
    make = lambda kind, pairs: {name: kind(None, *map(jnp.asarray, pair), scale) for name, pair in pairs.items()}
    return gpt.Adapter(make(gpt.LoraLinear, layers), make(gpt.LoraTable, tables))


def take_pair(tensors: dict, settings: dict, scale: float, module: str, form: str, I: int, O: int) -> tuple:
    """(a (I, r), b (r, O)) of a module by PEFT's (r, I) and (O, r)."""
    names = [f"{module}.{form.format(factor)}" for factor in "AB"]
    for name in names:
        if name not in tensors:
            raise ValueError(f"the tensor {name} is missing")
    a, b = (tensors.pop(name).astype(np.float32).T for name in names)
    r = a.shape[-1]
    if (a.shape, b.shape) != ((I, r), (r, O)):
        raise ValueError(f"{module} has factors {a.T.shape} and {b.T.shape}, and the base's weight is {(O, I)}")
    # as in PEFT, a key is the end of a module's name, or a regular expression for it
    patterns = settings.get("alpha_pattern") or {}
    alphas = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
    return a, b * np.float32(scaling(settings, [*alphas, settings["lora_alpha"]][0], r) / scale)


def scaling(settings: dict, alpha: float, r: int) -> float:
    """The factor of B A: alpha / r, or alpha / sqrt(r) where it is rank-stabilised (arXiv:2312.03732)."""
    return alpha / (math.sqrt(r) if settings.get("use_rslora") else r)


def drop_copies(tensors: dict, model: gpt.GPT):
    """Take out what PEFT copies into the file of embedding and head where an adapter is on them: the base's own."""
    modules, head = peft_modules(model.config), model.wte if model.head is None else model.head
    for module, table in ((modules["wte"], model.wte), (modules["head"], head)):
        for name in (f"{module}.weight", f"{module}.base_layer.weight"):
            if name in tensors and np.array_equal(tensors[name], table):
                del tensors[name]


def read_head(tensors: dict, adapter: gpt.Adapter, D: int, pool="last", bias=0.0, suffix=()) -> gpt.ScoreModel:
    """The score model of an adapter and the head that PEFT keeps beside it."""
    head, query = tensors.pop("score.weight"), tensors.pop("score.query", None)
    if head.shape != (1, D):
        raise ValueError(f"score.weight must be (1, {D}), one label: it is {head.shape}")
    head, query = (x if x is None else jnp.asarray(x, jnp.float32) for x in (head[0], query))
    return gpt.ScoreModel(adapter, head, query, jnp.float32(bias), pool, tuple(suffix))


# ---------------------------------------------------------------------------------------------------- GGUF: weights


ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")  # both llama.cpp's names and those of a folder's model_type


GGUF_NAMES = {  # our layers -> llama.cpp's
    "wte": "token_embd", "wpe": "position_embd", "norm": "output_norm", "head": "output", "norm1": "attn_norm",
    "norm2": "ffn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip


class Place(NamedTuple):
    """One tensor of a model in both of its files."""

    gguf: str  # name in the GGUF
    folder: str  # name in the folder's model.safetensors
    shape: tuple[int, ...]  # in the folder
    flipped: bool  # (in, out) in the folder: GPT-2's matrices. In a GGUF every matrix is (out, in)
    heads: int  # of q and k where a GGUF orders their rows in its own way, else 0


def places(config: gpt.Config) -> list[Place]:
    """Every tensor of a model, in the order of its layers."""
    shapes = jax.eval_shape(partial(gpt.init, config), jax.random.key(0))
    tables, layers = [], []
    for ours, folder, transposed in gpt.layout(config):
        layer, _, kind = ours.removeprefix("blocks.").partition(".")
        shape = attrgetter(ours)(shapes).shape[ours.startswith("blocks.") :]
        if config.gpt2 and layer in ("q", "k", "v"):  # one tensor, in both files
            if layer != "q":
                continue
            layer, folder, shape = "qkv", folder.replace("attn.q", "attn.c_attn"), (*shape[:-1], 3 * shape[-1])
        heads = {"q": config.heads, "k": config.kv_heads}.get(layer, 0) if config.family == "llama" else 0
        gguf = f"{GGUF_NAMES[layer]}.{'bias' if kind == 'bias' else 'weight'}"
        flipped = config.gpt2 and ours.startswith("blocks.") and len(shape) == 2
        place = Place(gguf, folder, shape[::-1] if transposed else shape, flipped, heads)
        (layers if ours.startswith("blocks.") else tables).append(place)
    numbered = lambda p, i: p._replace(gguf=f"blk.{i}.{p.gguf}", folder=p.folder.format(i=i))
    return tables + [numbered(place, i) for i in range(config.layers) for place in layers]


def interleave(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp has them for the llama family. Rotary embedding turns pairs of rows: here row j of a
    head of E rows with row j + E/2, there row 2j with row 2j + 1."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def deinterleave(x: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `interleave`."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def rope_factors(config: gpt.Config) -> np.ndarray:
    """(E/2,) by how much Llama 3's rule slows each rotary frequency. A GGUF has them as the tensor rope_freqs.weight,
    and nothing of the four numbers that they come from."""
    factor, low, high, original = config.rope_scaling
    turns = original * config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim) / (2 * np.pi)
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (keep + (1 - keep) / factor)).astype(np.float32)


def find_rope_scaling(factors: np.ndarray, config: gpt.Config) -> gpt.Config:
    """The Config whose `rope_factors` these are, of the kind that Llama 3 models have: low 1, high 4, and a power of
    two as the original context."""
    for original in [8192.0] + [2.0**k for k in range(3, 21)]:
        found = dataclasses.replace(config, rope_scaling=(float(factors.max()), 1.0, 4.0, original))
        if np.allclose(rope_factors(found), factors, rtol=1e-4):
            return found
    raise ValueError("rope_freqs.weight scales the rotary frequencies in another way than Llama 3 does")


# ---------------------------------------------------------------------------------------------------- GGUF -> folder


def gguf_to_model(source: Path, target: Path):
    """A GGUF as a model folder in fp32, one tensor in memory at a time."""
    reader, meta = open_gguf(source)
    try:
        arrays = {tensor.name: tensor for tensor in reader.tensors}
        config = read_config(meta, arrays)
        wanted = places(config)
        check_tensors(arrays, wanted)
        files, ids = read_tokenizer(meta, config)
        if left := sorted(key for key in meta if not key.startswith("GGUF.")):
            print(f"left out, since a model folder has no place for it: {', '.join(left)}")
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    target.mkdir(parents=True, exist_ok=True)
    gpt.write_atomic(target / "model.safetensors", partial(write_safetensors, wanted=wanted, arrays=arrays))
    for name, content in files.items():
        gpt.write_json(target / name, content)
    ends = ids.pop("ends")
    gpt.write_json(target / "generation_config.json", ids | dict(eos_token_id=ends))
    gpt.write_json(target / "config.json", gpt.config_to_hf(config) | ids)
    kinds = Counter(tensor.tensor_type.name for tensor in arrays.values())
    print("tensors, all written as F32:", ", ".join(f"{n} of {kind}" for kind, n in kinds.items()))


def open_gguf(file: Path):
    """(the library's reader, the metadata: key -> value)."""
    gguf = need_gguf()
    with open(file, "rb") as f:
        start = f.read(8)
    if start[:4] != b"GGUF":
        raise ValueError(f"{file} is not a GGUF: it does not start with the letters GGUF")
    version = int.from_bytes(start[4:], "little")
    if version and version & 0xFFFF == 0:
        raise ValueError(f"{file} is a big-endian GGUF: take the little-endian one that other machines read")
    if len(start) == 8 and version not in (2, 3):
        raise ValueError(f"{file} is GGUF version {version}: 2 and 3 are read. Convert the model again from its source")
    try:
        reader = gguf.GGUFReader(file)
        meta = {key: field.contents() for key, field in reader.fields.items()}
    except Exception as error:  # the library checks no length: what it stumbles over is of any kind
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}): cut short or damaged") from error
    if meta.get("split.count", 0) > 1:
        raise ValueError(f"{file} is one of {meta['split.count']} parts: join them first, llama-gguf-split --merge")
    return reader, meta


def need_gguf():
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF needs the library gguf: pip install gguf") from None
    return gguf


def read_config(meta: dict, arrays: dict) -> gpt.Config:
    """The Config that the metadata describes. What is read is taken out of `meta`, and a tensor of rotary factors out
    of `arrays`."""
    family = meta.pop("general.architecture", None)
    if family not in ARCHITECTURES:
        raise ValueError(f"its architecture is {family!r}, and one of {', '.join(ARCHITECTURES)} is read here")
    take = lambda key, *default: meta.pop(f"{family}.{key}", *default)
    if "token_embd.weight" not in arrays:
        raise ValueError("the tensor token_embd.weight is missing")
    rows = int(arrays["token_embd.weight"].shape[-1])
    take("vocab_size", None)  # the embedding's rows say it
    try:
        dim, heads, layers = (int(take(f"{x}_{y}")) for x, y in SIZES)
        hf = dict(model_type=family, vocab_size=rows, tie_word_embeddings=drop_tied_head(arrays))
        ffn, context = int(take("feed_forward_length")), int(take("context_length"))
        if family == "gpt2":
            hf |= dict(n_embd=dim, n_layer=layers, n_head=heads, n_positions=context, n_inner=ffn)
            return gpt.config_from_hf(hf | dict(layer_norm_epsilon=shortest(take("attention.layer_norm_epsilon"))))
        hf |= dict(hidden_size=dim, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=ffn)
        hf |= dict(num_key_value_heads=int(take("attention.head_count_kv", heads)), max_position_embeddings=context)
        hf |= dict(rms_norm_eps=shortest(take("attention.layer_norm_rms_epsilon")))
    except KeyError as error:
        raise ValueError(f"the metadata has no {error.args[0]}") from None
    except TypeError:
        raise ValueError("its layers differ in heads or in width, which is not read here") from None
    width = take("attention.key_length", dim // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if take(key, width) != width:
            raise ValueError(f"{family}.{key} is not the {width} of a head's width, and only that is read here")
    scaling = take("rope.scaling.type", "linear")  # llama.cpp's default; scale_linear is the factor's older name
    factors = [take(f"rope.{key}", 1.0) for key in ("scaling.factor", "scale_linear", "scaling.attn_factor")]
    if scaling != "none" and not {0.0, 1.0}.issuperset(factors):
        raise ValueError(f"{family}.rope.scaling.type = {scaling!r} is not read here")
    if not take("attention.causal", True):
        raise ValueError(f"{family}.attention.causal = false is not read here: tokens would see later ones")
    if take("attention.sliding_window", context) < context:
        raise ValueError(f"{family}.attention.sliding_window, shorter than the context, is not read here")
    hf |= dict(head_dim=int(width), rope_theta=shortest(take("rope.freq_base", 10000.0)))
    hf |= dict(attention_bias="blk.0.attn_q.bias" in arrays, mlp_bias="blk.0.ffn_up.bias" in arrays)
    config = gpt.config_from_hf(hf)
    if factors := arrays.pop("rope_freqs.weight", None):
        config = find_rope_scaling(factors.data, config)
    return config


SIZES = [("embedding", "length"), ("attention.head", "count"), ("block", "count")]


def shortest(x: float) -> float:
    """0.00001 for 9.999999747378752e-06: the shortest number that is the same one in fp32, which GGUF has."""
    return float(str(np.float32(x)))


def drop_tied_head(arrays: dict) -> bool:
    """Whether the head is the embedding. A copy of the embedding as the head is taken out."""
    head, table = arrays.get("output.weight"), arrays["token_embd.weight"]
    if head and head.tensor_type == table.tensor_type and np.array_equal(head.data, table.data):
        del arrays["output.weight"]
    return "output.weight" not in arrays


def check_tensors(arrays: dict, wanted: list[Place]):
    """Every tensor is there, has the shape that the configuration needs, and is of a kind that the library reads."""
    gguf = need_gguf()
    for place in wanted:
        if place.gguf not in arrays:
            raise ValueError(f"the tensor {place.gguf} is missing")
        found, shape = (
            tuple(map(int, arrays[place.gguf].shape[::-1])),
            place.shape[::-1] if place.flipped else place.shape,
        )
        if found != shape:
            raise ValueError(f"the tensor {place.gguf} has shape {found}, the configuration needs {shape}")
    if extra := arrays.keys() - {place.gguf for place in wanted}:
        raise ValueError(f"tensors that the configuration does not know: {', '.join(sorted(extra)[:5])}")
    for name, tensor in arrays.items():
        try:
            gguf.quants.dequantize(tensor.data[:1], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ValueError(f"the tensor {name} is of type {kind}, which the gguf library does not read") from None


def write_safetensors(file: str, wanted: list[Place], arrays: dict):
    """The tensors in fp32, written one after the other: the length of a header in JSON (8 bytes), the header with each
    tensor's type, shape and bytes, the tensors. (The safetensors library wants them all at once.)"""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for place in wanted:
        start, end = end, end + 4 * math.prod(place.shape)
        header[place.folder] = dict(dtype="F32", shape=place.shape, data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for place in wanted:
            f.write(np.ascontiguousarray(from_gguf(arrays[place.gguf], place), "<f4").data)


def from_gguf(tensor, place: Place) -> np.ndarray:
    """A tensor of a GGUF as it is in a model folder, in fp32."""
    x = need_gguf().quants.dequantize(tensor.data, tensor.tensor_type)
    x = deinterleave(x, place.heads) if place.heads else x
    return x.T if place.flipped else x


# ---------------------------------------------------------------------------------------------------- folder -> GGUF


def model_to_gguf(source: Path, target: Path, kind: str):
    """A model folder as a GGUF that llama.cpp reads, one tensor in memory at a time. Vectors, and GPT-2's positions,
    stay in fp32."""
    gguf = need_gguf()
    if (source / "adapter_config.json").is_file():
        raise ValueError(f"{source} is an adapter. Merge it first: python convert.py {source} MODEL")
    folder = gpt.find_folder(source)
    hf = json.loads((folder / "config.json").read_text())
    if any(name.endswith("SequenceClassification") for name in hf.get("architectures") or ()):
        raise ValueError(f"{source} is a reward model, and llama.cpp has no such head: name a policy")
    config = gpt.config_from_hf(hf, folder / "config.json")
    if config.family == "qwen3" and (config.qkv_bias or config.out_bias):
        raise ValueError(f"{source} has attention_bias = true, and llama.cpp's {config.family} has no biases")
    wanted, find = places(config), open_folder(folder, config)
    writer = gguf.GGUFWriter(None, config.family)
    writer.add_name(source.resolve().name)
    write_config(writer, config)
    write_tokenizer(writer, folder, config)
    type_of = lambda place: storage_type(place, kind)
    for place in wanted:
        shape = place.shape[::-1] if place.flipped else place.shape
        block, size = gguf.GGML_QUANT_SIZES[type_of(place)]
        bytes_ = math.prod(shape) * size // block
        writer.add_tensor_info(place.gguf, shape, np.dtype(np.float32), bytes_, raw_dtype=type_of(place))
    if config.rope_scaling:
        factors = rope_factors(config)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    def write(file):
        writer.write_header_to_file(Path(file))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for place in wanted:
            writer.write_tensor_data(gguf.quants.quantize(to_gguf(find(place), place), type_of(place)))
        if config.rope_scaling:
            writer.write_tensor_data(rope_factors(config))
        writer.close()

    target.parent.mkdir(parents=True, exist_ok=True)
    gpt.write_atomic(target, write)
    kinds = Counter(type_of(place).name for place in wanted)
    print("tensors:", ", ".join(f"{n} as {kind}" for kind, n in kinds.items()))


FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # llama.cpp's numbers: most of the tensors are of this type


def storage_type(place: Place, kind: str):
    """The type of a tensor in a GGUF. Rows that Q8_0's blocks of 32 do not divide are F16, as in llama.cpp."""
    gguf = need_gguf()
    if len(place.shape) == 1 or place.gguf == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType[kind.upper()]
    row = place.shape[0] if place.flipped else place.shape[-1]
    return gguf.GGMLQuantizationType.F16 if row % gguf.GGML_QUANT_SIZES[kind][0] else kind


def to_gguf(x: np.ndarray, place: Place) -> np.ndarray:
    """A tensor of a model folder in the order that it has in a GGUF, in fp32."""
    x = x.astype(np.float32, copy=False)
    x = x.T if place.flipped else x
    return np.ascontiguousarray(interleave(x, place.heads) if place.heads else x)


def open_folder(folder: Path, config: gpt.Config):
    """A function from a Place to its array in the folder's files, which are read as they are used. The names and
    shapes are checked first."""
    names = gpt.read_tensors(folder)
    gpt.check_head(config, names, folder)
    if config.gpt2:  # some files of GPT-2 leave the prefix out
        names = {n if n.startswith(("transformer.", "lm_head.")) else f"transformer.{n}": x for n, x in names.items()}
    if config.tied and "lm_head.weight" in names:  # under either name, or both
        names.setdefault(gpt.layout(config)[0][1], names["lm_head.weight"])
    unused = {n for n in names if not n.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq"))}
    unused -= {"lm_head.weight"} if config.tied else set()
    for place in places(config):
        if place.folder not in names:
            raise ValueError(f"{folder}: tensor {place.folder} is missing")
        if (shape := names[place.folder].shape) != place.shape:
            raise ValueError(
                f"{folder}: tensor {place.folder} has shape {shape}, the configuration needs {place.shape}"
            )
        unused.discard(place.folder)
    if unused:
        raise ValueError(f"{folder}: tensors that the configuration does not know: {', '.join(sorted(unused)[:5])}")
    return lambda place: names[place.folder]


def write_config(writer, config: gpt.Config):
    """The shape of the model as metadata."""
    c = config
    writer.add_block_count(c.layers)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_vocab_size(c.vocab_size)
    if c.gpt2:
        writer.add_layer_norm_eps(c.norm_eps)
        return
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.head_dim)


# ---------------------------------------------------------------------------------------------------- GGUF: tokenizers


NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # kinds of tokens


CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
MARKS_AND_BLANKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


# How text is cut into words before byte pairs are joined: llama.cpp's name -> the patterns, one after the other. These
# four and "default" are what the families here use, of some seventy names.
SPLITS = {
    "gpt-2": [GPT2 + r"|\s+"],
    "smollm": [r"\p{N}", GPT2 + r"|\s+"],
    "llama-bpe": [CONTRACTIONS + r"\p{N}{1,3}" + MARKS_AND_BLANKS],
    "qwen2": [CONTRACTIONS + r"\p{N}" + MARKS_AND_BLANKS],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}


# Other names of the same: Falcon 3's and those of distilled R1 models
SAME_SPLITS = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


# Control tokens that end an answer in llama.cpp whatever the metadata says
END_TOKENS = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>",
    "<end_of_turn>", "<｜end▁of▁sentence｜>", "<EOT>", "_<EOT>",
)  # fmt: skip


def read_tokenizer(meta: dict, config: gpt.Config) -> tuple[dict, dict]:
    """(file name -> content of a folder's tokenizer.json and tokenizer_config.json, its ids: "eos_token_id", ... and
    "ends", all ids that end an answer). What is read is taken out of `meta`."""
    take = lambda key, *default: meta.pop(f"tokenizer.ggml.{key}", *default)
    kind, words, types = take("model", None), take("tokens", None), take("token_type", None)
    if not words:
        raise ValueError("it holds no tokenizer")
    if len(words) > config.vocab_size or len(types or words) != len(words) or len(set(words)) < len(words):
        raise ValueError("its tokenizer is damaged: more tokens than the embedding has rows, other types, or one twice")
    types = types or [NORMAL] * len(words)
    if kind == "gpt2":
        name = take("pre", None)
        spec, adds_bos = byte_level(words, types, take("merges", []), name), SAME_SPLITS.get(name, name) == "llama-bpe"
    elif kind == "llama":
        take("pre", None), take("merges", None)
        spec, adds_bos = sentencepiece(words, types, take("scores", None), take("add_space_prefix", True)), True
    else:
        raise ValueError(f"a tokenizer of the kind {kind!r} is not read here: gpt2 (bytes) and llama (SentencePiece)")
    take("add_space_prefix", None)  # has no meaning for bytes
    ids = {f"{ours}_token_id": take(f"{theirs}_token_id", None) for ours, theirs in NAMES_OF_IDS.items()}
    if ids["eos_token_id"] is None:
        raise ValueError("its tokenizer names no end token (tokenizer.ggml.eos_token_id)")
    if wrong := {name: i for name, i in ids.items() if i is not None and not 0 <= i < len(words)}:
        raise ValueError(f"its tokenizer has {len(words)} tokens, and {wrong} is none of them")
    spec["added_tokens"] = added_tokens(words, types, {i for name, i in ids.items() if name != "unk_token_id"})
    adds_bos = bool(take("add_bos_token", adds_bos and ids["bos_token_id"] is not None))
    settings = {f"{x}_token": words[i] for x in ("bos", "eos", "pad", "unk") if (i := ids[f"{x}_token_id"]) is not None}
    if adds_bos:
        spec["post_processor"] = prepend(settings["bos_token"], ids["bos_token_id"])
    settings |= dict(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=adds_bos, model_max_length=config.context)
    settings |= dict(clean_up_tokenization_spaces=False, add_eos_token=bool(take("add_eos_token", False)))
    settings |= read_templates(meta)
    check_ids(spec, words, types)
    ends = [ids.pop("eos_token_id"), ids.pop("eot_token_id"), ids.pop("eom_token_id")]
    ends += [i for i, (word, kind) in enumerate(zip(words, types)) if word in END_TOKENS and kind == CONTROL]
    ends = list(dict.fromkeys(i for i in ends if i is not None))
    ids = {name: i for name, i in ids.items() if i is not None and name != "unk_token_id"}
    return {"tokenizer.json": spec, "tokenizer_config.json": settings}, ids | dict(eos_token_id=ends[0], ends=ends)


NAMES_OF_IDS = dict(bos="bos", eos="eos", pad="padding", unk="unknown", eot="eot", eom="eom")


def read_templates(meta: dict) -> dict:
    """The chat template as tokenizer_config.json has it; a list of them by name where the file holds several."""
    template = meta.pop("tokenizer.chat_template", None)
    others = meta.pop("tokenizer.chat_templates", [])
    if template is None:
        print("the file holds no chat template: messages will be written in this project's plain form")
        return {}
    if not others:
        return dict(chat_template=template)
    named = {"default": template} | {name: meta.pop(f"tokenizer.chat_template.{name}") for name in others}
    return dict(chat_template=[dict(name=name, template=text) for name, text in named.items()])


def byte_level(words: list, types: list, merges: list, name: str | None) -> dict:
    """tokenizer.json of byte pairs."""
    if name is None:
        raise ValueError(
            "its tokenizer says nothing of how text is cut into words (tokenizer.ggml.pre): the file is old"
        )
    splits = SAME_SPLITS.get(name, name)
    if splits not in SPLITS:
        raise ValueError(f"tokenizer.ggml.pre = {name!r} is not read here: {', '.join([*SPLITS, *SAME_SPLITS])}")
    split = lambda regex: dict(type="Split", pattern=dict(Regex=regex), behavior="Isolated", invert=False)
    to_bytes = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    return skeleton(
        model=dict(ignore_merges=splits == "llama-bpe", vocab=vocabulary(words, types), merges=merges),
        normalizer=dict(type="NFC") if name == "qwen2" else None,  # which llama.cpp leaves out
        pre_tokenizer=dict(type="Sequence", pretokenizers=[*map(split, SPLITS[splits]), to_bytes]),
        decoder=dict(type="ByteLevel", add_prefix_space=True, trim_offsets=True, use_regex=True),
    )


def sentencepiece(words: list, types: list, scores: list | None, prefix: bool) -> dict:
    """tokenizer.json of SentencePiece's byte pairs, as transformers writes Llama 2's."""
    if scores is None or BYTE not in types:
        raise ValueError("its tokenizer has no scores or no tokens of single bytes: not SentencePiece's byte pairs")
    unknown = next((words[i] for i, kind in enumerate(types) if kind == UNKNOWN), None)
    blank = dict(type="Replace", pattern=dict(String=" "), content="▁")
    steps = [dict(type="Prepend", prepend="▁")] * prefix + [blank]
    back = [dict(type="Replace", pattern=dict(String="▁"), content=" "), dict(type="ByteFallback"), dict(type="Fuse")]
    back += [dict(type="Strip", content=" ", start=1, stop=0)] * prefix
    vocab = vocabulary(words, types)
    joined = {word for word, i in vocab.items() if types[i] == NORMAL}
    merges = score_merges({word: scores[i] for word, i in vocab.items() if word in joined})
    return skeleton(
        model=dict(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True),
        normalizer=dict(type="Sequence", normalizers=steps),
        pre_tokenizer=None,
        decoder=dict(type="Sequence", decoders=back),
    )


def score_merges(scores: dict[str, float]) -> list[str]:
    """SentencePiece joins any two tokens whose union is one, that of the highest score first: the same as a list of
    merges, all ways of each token, in the order of scores."""
    merges = []
    for word in sorted(scores, key=scores.get, reverse=True):
        ways = [(word[:i], word[i:]) for i in range(len(word) - 1, 0, -1)]
        merges += [" ".join(way) for way in ways if all(part in scores for part in way)]
    return merges


def skeleton(model: dict, **parts) -> dict:
    """tokenizer.json with what is the same in all."""
    model = dict(type="BPE", dropout=None, unk_token=None, fuse_unk=False, byte_fallback=False) | model
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[], post_processor=None, model=model) | parts


def vocabulary(words: list, types: list) -> dict[str, int]:
    """Token -> id, without the rows that pad the embedding, and without added tokens at the end."""
    kept = [i for i, word in enumerate(words) if types[i] != UNUSED or word != f"[PAD{i}]"]
    end = 1 + max((i for i in kept if types[i] not in (CONTROL, USER)), default=-1)
    if kept != list(range(len(kept))):  # only without a gap do added tokens get their ids by themselves
        end = len(words)
    return {words[i]: i for i in kept if i < end}


def added_tokens(words: list, types: list, special_ids: set) -> list[dict]:
    """Control tokens, and those of `special_ids`, are special: only a template writes them. The user's are read from
    every text."""
    special = {i for i, kind in enumerate(types) if kind in (CONTROL, UNKNOWN)} | special_ids - {None}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    added = sorted(special | {i for i, kind in enumerate(types) if kind == USER})
    return [dict(id=i, content=words[i], special=i in special) | flags for i in added]


def prepend(token: str, token_id: int) -> dict:
    """The part of tokenizer.json that puts a token before every text."""
    parts = lambda *names: [{"SpecialToken" if x == token else "Sequence": dict(id=x, type_id=0)} for x in names]
    special = {token: dict(id=token, ids=[token_id], tokens=[token])}
    return dict(
        type="TemplateProcessing", single=parts(token, "A"), pair=parts(token, "A", "B"), special_tokens=special
    )


def check_ids(spec: dict, words: list, types: list):
    """The tokenizers library gives every token the id that it has in the GGUF."""
    found = tokenizers.Tokenizer.from_str(json.dumps(spec)).get_vocab(with_added_tokens=True)
    kept = (i for i, kind in enumerate(types) if kind != UNUSED)
    if wrong := [words[i] for i in kept if found.get(words[i]) != i]:
        raise ValueError(f"its tokenizer is damaged: the tokens {wrong[:5]} would get other ids")


def write_tokenizer(writer, folder: Path, config: gpt.Config):
    """The folder's tokenizer, chat template and end tokens as metadata."""
    tokenizer, spec = gpt.need_tokenizer(folder), read_spec(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, its model {config.vocab_size}")
    vocab = spec["model"]["vocab"] if isinstance(spec["model"].get("vocab"), dict) else {}
    added = {i: text for text, i in tokenizer.specials.items()}
    words = {i: word for word, i in vocab.items()} | added
    kinds = dict.fromkeys(words, NORMAL) | {i: CONTROL if i in tokenizer.special_ids else USER for i in added}
    if name := find_splits(spec):
        if spec.get("normalizer"):
            print("left out, since llama.cpp has no such step: bringing text into Unicode's form NFC")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges(
            [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
        )
    elif scores := find_scores(spec):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([scores.get(words.get(i), 0.0) for i in range(config.vocab_size)])
        writer.add_add_space_prefix(has_blanks(tokenizer, folder))
        kinds |= {i: BYTE for i, word in words.items() if re.fullmatch("<0x[0-9A-F]{2}>", word)}
        kinds |= {vocab[spec["model"]["unk_token"]]: UNKNOWN} if spec["model"].get("unk_token") in vocab else {}
    else:
        raise ValueError(
            f"llama.cpp has no tokenizer like that of {folder} ({spec['model'].get('type')}): it has byte pairs cut as "
            f"{', '.join(SPLITS)} do, and SentencePiece's. Models of the toy world, whose words are whole, stay here"
        )
    if own := [token.content for token in tokenizer.added.values() if has_own_rule(token, byte_pairs=bool(name))]:
        print(
            "left out, since a GGUF has no such rules: where some tokens are read, and which blanks around them they "
            f"take (lstrip, rstrip, single_word, normalized): {', '.join(own)}"
        )
    rows = range(config.vocab_size)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types([kinds.get(i, UNUSED) for i in rows])
    ids = {name: i for i, name in words.items()}
    for x, add in dict(bos=writer.add_bos_token_id, pad=writer.add_pad_token_id, unk=writer.add_unk_token_id).items():
        if tokenizer.names.get(f"{x}_token") in ids:
            add(ids[tokenizer.names[f"{x}_token"]])
    writer.add_eos_token_id(tokenizer.eos_id)
    others = [i for i in tokenizer.end_ids if i != tokenizer.eos_id]
    for i, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id)):
        add(i)
    if unsaid := [words[i] for i in others[2:] if words[i] not in END_TOKENS]:
        print(f"left out, since a GGUF names three end tokens: {', '.join(unsaid)}")
    writer.add_add_bos_token(tokenizer.bos_id is not None)
    writer.add_chat_template([dict(name=name, template=text) for name, text in tokenizer.templates.items()])


def has_own_rule(token: tokenizers.AddedToken, byte_pairs: bool) -> bool:
    """Whether an added token is read otherwise than as its text, wherever that stands. One that is not special may be
    looked for in the normalised text, which in SentencePiece's vocabularies has a blank before it."""
    normalised = token.normalized and not token.special and not byte_pairs
    return token.lstrip or token.rstrip or token.single_word or normalised


def has_blanks(tokenizer: gpt.Tokenizer, folder: Path) -> bool:
    """Whether a tokenizer of SentencePiece's kind puts a blank before the text after a special token, as all texts in a
    chat are. llama.cpp does the same before a text's first word; transformers 5 and this code may do otherwise."""
    end = tokenizer.names["eos_token"]
    spell = lambda text: b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, special=True))).decode()
    first, later = spell("a") == " a", spell(end + "a") == end + " a"
    if first and not later:
        print(
            f"left out, since llama.cpp has no such rule: {folder} begins a text with a blank, and none after a token"
        )
    return later


def read_spec(folder: Path) -> dict:
    """tokenizer.json of a folder, or what GPT-2's vocab.json and merges.txt stand for."""
    if (folder / "tokenizer.json").is_file():
        spec = json.loads((folder / "tokenizer.json").read_text())
        nothing = spec.get("normalizer") == {"type": "Sequence", "normalizers": []}  # as DeepSeek's files say it
        return spec | dict(normalizer=None) if nothing else spec
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    if not all(file.is_file() for file in files):
        files = [folder / name for name in ("encoder.json", "vocab.bpe")]
    vocab, end = json.loads(files[0].read_text()), "<|endoftext|>"
    merges = [line for line in files[1].read_text().split("\n") if line and not line.startswith("#version")]
    added = [dict(id=vocab.get(end, len(vocab)), content=end, special=True)]
    return skeleton(
        model=dict(vocab=vocab, merges=merges), normalizer=None, pre_tokenizer=dict(type="ByteLevel")
    ) | dict(added_tokens=added)


def find_splits(spec: dict) -> str | None:
    """llama.cpp's name for how a byte-level tokenizer.json cuts text into words; None where it has none."""
    pre, model = spec.get("pre_tokenizer") or {}, spec["model"]
    steps = pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]
    patterns = []
    for step in steps:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif step.get("type") == "Split" and step["behavior"] == "Isolated" and not step.get("invert"):
            patterns.append(step["pattern"].get("Regex"))
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space", False):
            patterns += [GPT2 + r"|\s+"] * step.get("use_regex", True)
        else:
            return None
    name = next((name for name, splits in SPLITS.items() if splits == patterns), None)
    plain = not spec.get("normalizer") or (name == "qwen2" and spec["normalizer"] == {"type": "NFC"})
    name = "deepseek-r1-qwen" if name == "qwen2" and not spec.get("normalizer") else name
    same = bool(model.get("ignore_merges")) == (name == "llama-bpe") and steps[-1].get("type") == "ByteLevel"
    return name if plain and same and model.get("type", "BPE") == "BPE" else None


def find_scores(spec: dict) -> dict[str, float] | None:
    """The scores by which SentencePiece joins tokens as a tokenizer.json does; None where there are none."""
    model, pre, normalizer = spec["model"], spec.get("pre_tokenizer"), str(spec.get("normalizer"))
    marked = not pre["split"] if pre and pre["type"] == "Metaspace" else not pre and "▁" in normalizer
    if model.get("type") != "BPE" or not model.get("byte_fallback") or not marked:
        return None
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    ranks = {"".join(merge): -float(i) for i, merge in reversed(list(enumerate(merges)))}
    added = {token["content"] for token in spec.get("added_tokens") or ()}
    letters = {word: -1e6 for word in model["vocab"] if word not in added and not re.fullmatch("<0x[0-9A-F]{2}>", word)}
    scores = letters | ranks
    made, found = score_merges(scores), [" ".join(merge) for merge in merges]
    joined = lambda merges: [merge.replace(" ", "", 1) for merge in merges]
    return scores if joined(made) == joined(found) and set(made) == set(found) else None


# ---------------------------------------------------------------------------------------------------- main


def find_converter(source: Path, target: Path, config: Config):
    """The function (source, target) that converts what is in `source` into what `target` names."""
    if source.is_file():
        return gguf_to_model
    if target.suffix == ".gguf":
        return partial(model_to_gguf, kind=config.type)
    if (source / "adapter" / "adapter.json").is_file():
        return partial(adapter_to_peft, base=config.base)
    if (source / "adapter_config.json").is_file():
        return partial(peft_to_model, base=config.base)
    raise FileNotFoundError(
        f"no adapter in {source}: a run with --lora-rank leaves adapter/adapter.json, PEFT adapter_config.json. For a "
        "GGUF, name a TARGET that ends with .gguf"
        if source.is_dir()
        else f"no file or folder {source}"
    )


def main(config: Config):
    source, target = Path(config.source), Path(config.target)
    convert = find_converter(source, target, config)
    if target.is_file() or target.exists() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} is there: name a new one" if target.is_file() else f"{target} is not empty: name a new folder"
        )
    convert(source, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
