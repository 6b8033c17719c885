"""What the tests share: JAX on the CPU, and tiny models with decided opinions."""

import json
import os
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda for the tests of a GPU: pytest -k cudnn
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # tests leave no files in the home folder

# Tests compile much and compute little: the quickest compiler serves them best, and halves the suite's time. With
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 XLA_FLAGS= they run on what a user's run is compiled to.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# products on a CPU may round otherwise in a batch of 4 rows than in one of 8; tests compare such rows bit for bit
FLAGS = ["--xla_cpu_experimental_ynn_fusion_type="]
if version("jaxlib").startswith("0.10."):  # XLA ends the process where it does not know a flag
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

import gpt  # noqa: E402

GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folders of tiny random models in the Hugging Face layout, with PyTorch's outputs (golden/make.py)."""
    return GOLDEN


@pytest.fixture(scope="session")
def tiny_model() -> gpt.GPT:
    """A fresh Llama of 2 layers, width 16 and 32 words; matrices scaled up so that predictions are far from uniform."""
    config = gpt.make_config(vocab_size=32, context=32, layers=2, heads=2, dim=16)
    return jax.jit(lambda key: jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, gpt.init(config, key)))(
        jax.random.key(0)
    )


def write_tokenizer(folder, spec, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec) if isinstance(spec, dict) else spec)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def added(ids: dict[str, int]):
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": text} | flags for text, i in ids.items()]


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder with a whole-word tokenizer: plain chat, <eos> and <pad> outside the vocabulary."""
    vocabulary = ["<unk>", "Human:", "Assistant:", *"abcdefgh", "yes", "no", "Judge:"]
    spec = {
        "version": "1.0",
        "added_tokens": added({"<eos>": len(vocabulary), "<pad>": len(vocabulary) + 1}),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(vocabulary)}, "unk_token": "<unk>"},
    } | dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder"))
    return write_tokenizer(tmp_path_factory.mktemp("words"), spec, eos_token="<eos>", pad_token="<pad>")
