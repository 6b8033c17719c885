"""Does llama.cpp say of a GGUF what we say of its model folder?

    python convert.py out/sft out/sft.gguf --type f32
    python tests/gguf_logits.py out/sft.gguf out/sft

It wants llama-cpp-python beside the packages of requirements.txt (pip builds it from source in a quarter of an hour).
It compares the ids of texts and of a chat, the log-probs of all words after every token of a text, and the tokens of
greedy answers, and prints the differences. Exit code 1 where ids differ, or where the log-probs of the tokens differ by
more than --tolerance nats on average.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from llama_cpp import Llama

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gpt  # noqa: E402

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "It's 1234567 o'clock; they'LL pay $3.50 (or 10%)!",
    "  two blanks,\ttabs\nand\r\n\n\nbreaks  ",
    "def f(x):\n    return x ** 2  # naïve café",
    "日本語のテキスト、한국어 и русский 🙂👩‍👩‍👧",
    "<|im_end|> typed by a person, </s> too",
    " e\u0301 and \u00e9",
]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]


def compare_ids(llama, tokenizer) -> int:
    """Prints texts whose ids differ; their number."""
    differ = 0
    for text in TEXTS:
        theirs, ours = llama.tokenize(text.encode(), add_bos=False, special=False), tokenizer.encode(text)
        if theirs != ours:
            differ += 1
            print(f"ids of {text!r}: llama.cpp {theirs}, here {ours}")
    print(f"ids: {len(TEXTS) - differ} of {len(TEXTS)} texts equal")
    return differ


def log_softmax(z):
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def compare_logprobs(llama, model, ids) -> float:
    """Mean difference of the log-probs of the tokens that the text has, in nats."""
    llama.reset()
    llama.eval(ids)
    theirs = log_softmax(llama.scores[: len(ids)])[:-1]
    logits = jax.jit(lambda model, tokens: model.logits(model(tokens)))(model, jnp.asarray([ids]))
    ours = log_softmax(logits[0])[:-1]
    rows = np.arange(len(ids) - 1), np.asarray(ids[1:])
    differences = np.abs(theirs[rows] - ours[rows])
    kl = (np.exp(ours) * (ours - theirs)).sum(-1).mean()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    print(
        f"log-probs of {len(differences)} tokens: mean difference {differences.mean():.1e}, largest "
        f"{differences.max():.1e}, KL {kl:.1e}, likeliest token the same in {same:.0%}"
    )
    return differences.mean()


def compare_answers(llama, model, tokenizer, length=40):
    for question in QUESTIONS:
        ids = tokenizer.chat([{"role": "user", "content": question}])
        theirs, stops = [], set(tokenizer.end_ids)
        llama.reset()
        for token in llama.generate(ids, temp=0.0, repeat_penalty=1.0):
            if token in stops or len(theirs) == length:
                break
            theirs.append(token)
        prompt, mask = jnp.asarray([ids]), jnp.ones((1, len(ids)), jnp.int32)
        answer = gpt.generate(model, prompt, mask, jax.random.key(0), length, ends=tokenizer.end_ids, temperature=0.0)
        ours = [int(i) for i, m in zip(answer.tokens[0], answer.mask[0]) if m > 0 and int(i) not in stops]
        shared = next(
            (i for i, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), min(len(ours), len(theirs))
        )
        print(f"{question}\n  llama.cpp {len(theirs)} tokens, here {len(ours)}, the first {shared} equal")
        print(f"  here:      {tokenizer.decode(ours)!r}")
        if ours != theirs:
            print(f"  llama.cpp: {tokenizer.decode(theirs)!r}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("folder")
    parser.add_argument("--tolerance", type=float, default=0.02)
    options = parser.parse_args()
    model, tokenizer = gpt.load(options.folder)
    # keys and values in fp32: by default they are fp16 there
    llama = Llama(options.gguf, n_ctx=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0)
    differ = compare_ids(llama, tokenizer)
    ids = tokenizer.encode("\n".join(TEXTS[:4]) * 3)[: min(160, model.config.context)]
    wrong = compare_logprobs(llama, model, ids)
    compare_answers(llama, model, tokenizer)
    return differ > 0 or wrong > options.tolerance


if __name__ == "__main__":
    raise SystemExit(main())
