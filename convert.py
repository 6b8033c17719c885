"""Models in and out of other tools' formats. The direction follows from what SOURCE is:

    python convert.py out/sft-lora out/sft-lora-peft     # a run with an adapter -> a PEFT folder
    python convert.py out/sft-lora-peft out/mine         # a PEFT folder -> a model folder, as a run leaves it

A run with an adapter has adapter/adapter.json. What becomes of it is read by `PeftModel.from_pretrained(base, TARGET)`.
A PEFT folder has adapter_config.json. TARGET then holds the merged model, and in adapter/ the adapter by itself. Either
way the base model is the folder that SOURCE names, or --base; one with other weights than were trained on is an error.

PEFT's layout (LoRA, Hu et al. 2021, arXiv:2106.09685): W + alpha / r B A for W (O, I), A (r, I) and B (O, r) of every
layer, where ours is W + scale a b for W (I, O), a (I, r) and b (r, O).
1. GPT-2's q, k and v are one module there, c_attn. Ours become its A one below the other, and its B as blocks on a
   diagonal.
2. The two factors of an embedding are lora_embedding_A (r, V) and lora_embedding_B (D, r).
3. A tied head changes with its embedding: PEFT keeps the same factors a second time, under lm_head. (It finds out that
   the two are tied by the names embed_tokens and lm_head: one of them has to be among the targets.)
4. What a reward model has beside its head (pooling, bias, suffix) is metadata of the file, which PEFT does not read.
"""

import json
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tyro.conf import Positional, arg

import gpt


@dataclass(frozen=True)
class Config:
    source: Annotated[Positional[str], arg(metavar="SOURCE")]  # a run folder with an adapter, or a PEFT folder
    target: Annotated[Positional[str], arg(metavar="TARGET")]  # the folder to write, new or empty
    base: str | None = None  # folder or Hub name of the adapter's base (default: the one that SOURCE names)


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
    for key, wanted in dict(peft_type="LORA", bias="none", use_dora=False, use_rslora=False).items():
        if settings.get(key, wanted) != wanted:
            raise ValueError(
                f"{source}/adapter_config.json: {key} = {settings[key]!r} is not read here, only {wanted!r}"
            )
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


def read_adapter(tensors: dict, settings: dict, model: gpt.GPT, tied: bool) -> gpt.Adapter:
    """Take an adapter's arrays out of `tensors`. Modules of another alpha / r than the settings' get its factor in b:
    one scale holds for all of an adapter here. `tied`: embedding and head change together."""
    modules, scale = peft_modules(model.config), settings["lora_alpha"] / settings["r"]
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
        if name not in gpt.TABLES and f"{module.format(i=0)}.lora_A.weight" in tensors:
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
    return a, b * np.float32([*alphas, settings["lora_alpha"]][0] / r / scale)


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


# ---------------------------------------------------------------------------------------------------- main


def find_converter(source: Path):
    """The function (source, target, base) that converts what is in `source`."""
    if (source / "adapter" / "adapter.json").is_file():
        return adapter_to_peft
    if (source / "adapter_config.json").is_file():
        return peft_to_model
    raise FileNotFoundError(
        f"no adapter in {source}: a run with --lora-rank leaves adapter/adapter.json, PEFT adapter_config.json"
    )


def main(config: Config):
    source, target = Path(config.source), Path(config.target)
    convert = find_converter(source)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty: name a new folder")
    convert(source, target, config.base)
    print(f"wrote {target}")


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
