"""Does llama.cpp say of a GGUF what we say of its model folder?

    python convert.py out/sft out/sft.gguf --type f32
    python tests/gguf_logits.py out/sft.gguf out/sft

It wants llama-cpp-python beside the packages of requirements.txt (pip builds it from source in a quarter of an hour).
It compares the ids of texts, the log-probs of all words after every token of a text, and the greedy answers to ten
questions: llama.cpp's chat, and `serve.py --model FOLDER` through the openai client and, where there is a Chromium, the
chat page. Exit code 1 where ids differ, where the log-probs of the tokens differ by more than --tolerance nats on
average, or where an F32 file's answers are not ours.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import openai
from llama_cpp import Llama
from screenshots import CHROMIUM, answered, ask, browsing, open_page, serving  # beside this file

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
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write one sentence about the sea.",
    "How many legs has a spider?",
    "Translate 'good morning' into Spanish.",
    "What is 7 + 5?",
    "Who wrote Romeo and Juliet?",
    "Give me a Python function that adds two numbers.",
    "List three fruits.",
    "Why is the sky blue?",
]
TOLERANCE = {"F32": 1e-3, "F16": 0.02, "BF16": 0.05}  # nats by a file's type; others are of 8 bits or less: 0.2
FILE_TYPES = {"0": "F32", "1": "F16", "32": "BF16"}


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


def compare_answers(llama, folder, length=40) -> int:
    """Prints greedy answers of at most so many tokens that differ between llama.cpp and serve.py; their number."""
    tokenizer, name, differ = gpt.need_tokenizer(folder), Path(folder).name, 0
    options = dict(temperature=0, max_tokens=length)
    with tempfile.TemporaryDirectory() as scratch, serving([folder], f"{scratch}/votes.db") as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            ours = client.chat.completions.create(model=name, messages=messages, **options).choices[0].message.content
            theirs = llama.create_chat_completion(messages, **options)["choices"][0]["message"]["content"]
            if ours != theirs:
                differ += 1
                shared = os.path.commonprefix([tokenizer.encode(ours), tokenizer.encode(theirs)])
                print(f"{question}: {len(shared)} tokens equal\n  here:      {ours!r}\n  llama.cpp: {theirs!r}")
            if question == QUESTIONS[0] and CHROMIUM:
                shown = answer_on_page(url, question, length)
                print(f"the page shows what the client got: {shown == ours}" + f" ({shown!r})" * (shown != ours))
    print(f"answers: {len(QUESTIONS) - differ} of {len(QUESTIONS)} equal")
    return differ


def answer_on_page(url, question, length) -> str:
    with browsing() as browser:
        page = open_page(browser, url, consent=False)
        for command in ("/temperature 0", f"/max {length}"):
            page.get_by_label("Message").fill(command)
            page.keyboard.press("Enter")
        ask(page, question)
        answered(page)
        return page.get_by_role("article", name="Answer", exact=True).locator(".text").inner_text()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf")
    parser.add_argument("folder")
    parser.add_argument("--tolerance", type=float, help="default: by the file's type, 0.001 for F32")
    options = parser.parse_args()
    model, tokenizer = gpt.load(options.folder)
    # keys and values in fp32: by default they are fp16 there
    llama = Llama(options.gguf, n_ctx=512, logits_all=True, verbose=False, n_threads=2, type_k=0, type_v=0)
    kind = FILE_TYPES.get(llama.metadata.get("general.file_type"))
    tolerance = TOLERANCE.get(kind, 0.2) if options.tolerance is None else options.tolerance
    differ = compare_ids(llama, tokenizer)
    ids = tokenizer.encode("\n".join(TEXTS[:4]) * 3)[: min(160, model.config.context)]
    wrong = compare_logprobs(llama, model, ids)
    others = compare_answers(llama, options.folder)
    return differ > 0 or wrong > tolerance or (kind == "F32" and others > 0)


if __name__ == "__main__":
    raise SystemExit(main())
