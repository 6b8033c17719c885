"""Other people's clients against serve.py: lm-evaluation-harness, the `llm` command line, LangChain's ChatOpenAI.

    python3 -m venv ~/clients && ~/clients/bin/pip install torch lm-eval llm langchain-openai
    python tests/clients.py --model out/ppo --clients ~/clients/bin          # starts a server of its own

They want an environment of their own, so this is no part of the test suite. lm-evaluation-harness reads two small
tasks from files that are written here: multiple choice by log-likelihood and answers by greedy generation; its
log-likelihoods must be those of `gpt.token_logprobs` on the same tokens, its answers those of `gpt.generate`.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import load  # beside this file: the server as a process
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import gpt  # noqa: E402

PAIRS = {"down": "up", "hot": "cold", "wet": "dry", "big": "small", "fast": "slow", "day": "night"}
QUESTIONS = [
    {
        "question": f"\n\nHuman: what is the opposite of {a} ?\n\nAssistant:",
        "choices": [f" {b} .", f" {a} ."],
        "gold": 0,
    }
    for pair in PAIRS.items()
    for a, b in (pair, pair[::-1])
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
CHOICE = 'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\nmetric_list: [{metric: acc}]\n'
GENERATE = """doc_to_target: "the answer is{{choices[0]}}"
generation_kwargs: {until: ["\\n\\nHuman:"], do_sample: false, max_gen_toks: 12}
metric_list: [{metric: exact_match, ignore_case: true}]
"""


@dataclass(frozen=True)
class Config:
    model: Path = Path("out/ppo")  # folder to serve and to compare with
    clients: Path = Path("~/clients/bin")  # where lm_eval, llm and python are


def command(config: Config, name: str, *arguments, **environment) -> str:
    """Run a client; its output, or the end of it and an exit."""
    program = config.clients.expanduser() / name
    offline = {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "unused", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, env=os.environ | offline | environment
    )
    if run.returncode:
        raise SystemExit(f"{name} failed:\n{(run.stdout + run.stderr)[-3000:]}")
    return run.stdout


def harness(config: Config, url: str, folder: Path):
    """Both tasks, and what the model says about the same rows without any server."""
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, kind, rest in (("choose", "multiple_choice", CHOICE), ("answer", "generate_until", GENERATE)):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=data, kind=kind) + rest)
    arguments = f"model={config.model.name},base_url={url}/v1/completions,tokenizer_backend=remote,num_concurrent=4"
    options = ["--model", "local-completions", "--model_args", arguments, "--tasks", "choose,answer"]
    command(config, "lm_eval", *options, "--include_path", folder, "--log_samples", "--output_path", folder / "out")
    samples = {name: read_samples(folder / "out", name) for name in ("choose", "answer")}
    model, tokenizer = gpt.load_policy(config.model)
    worst = 0.0
    for sample in samples["choose"]:
        for answer, (found, greedy) in zip(sample["doc"]["choices"], sample["filtered_resps"]):
            expected, likeliest = loglikelihood(model, tokenizer, sample["doc"]["question"], answer)
            worst = max(worst, abs(float(found) - expected))
            assert str(greedy) == str(likeliest), (sample["doc"], answer)
    assert worst < 1e-3, f"log-likelihoods differ by {worst}"
    for sample in samples["answer"]:
        expected = greedy_answer(model, tokenizer, sample["doc"]["question"])
        assert sample["filtered_resps"][0].strip() == expected, (sample["filtered_resps"], expected)
    accuracy = np.mean([sample["acc"] for sample in samples["choose"]])
    exact = np.mean([sample["exact_match"] for sample in samples["answer"]])
    print(f"lm-evaluation-harness: {len(QUESTIONS)} rows each; accuracy {accuracy:.3f}, exact match {exact:.3f}; its")
    print(f"  log-likelihoods are those of gpt.token_logprobs within {worst:.1e}, its answers those of gpt.generate")


def read_samples(folder: Path, task: str) -> list[dict]:
    (file,) = folder.rglob(f"samples_{task}_*.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def loglikelihood(model, tokenizer, question: str, answer: str) -> tuple[float, bool]:
    """Of the answer's tokens after the question's, and whether each is the likeliest one."""
    prompt = tokenizer.encode(question)
    ids = prompt + tokenizer.encode(answer)
    logprobs = gpt.token_logprobs(model, jnp.array([ids]))[0, len(prompt) - 1 :]
    likeliest = jnp.argmax(model.logits(model(jnp.array([ids]))[0]), -1)[len(prompt) - 1 : -1]
    return float(logprobs.sum()), bool((likeliest == jnp.array(ids[len(prompt) :])).all())


def greedy_answer(model, tokenizer, question: str) -> str:
    ids = jnp.array([tokenizer.encode(question)])
    key = jax.random.key(0)
    out = gpt.generate(model, ids, jnp.ones_like(ids), key, 12, ends=tokenizer.end_ids, temperature=0)
    return tokenizer.decode_rows(out.tokens, out.mask)[0].partition("\n\nHuman:")[0].strip()


def llm(config: Config, url: str, folder: Path):
    """The command line: a chat, streamed and not, and a conversation that goes on."""
    (folder / "llm").mkdir()
    entry = [{"model_id": "mine", "model_name": config.model.name, "api_base": f"{url}/v1"}]
    (folder / "llm" / "extra-openai-models.yaml").write_text(json.dumps(entry))  # JSON is YAML
    ask = ["-m", "mine", "-o", "temperature", "0", "what is the opposite of down ?"]
    user = dict(LLM_USER_PATH=str(folder / "llm"))
    streamed, whole = command(config, "llm", *ask, **user), command(config, "llm", "--no-stream", *ask, **user)
    assert streamed.strip() == whole.strip() != "", (streamed, whole)
    goes_on = command(config, "llm", "-c", "which ?", **user)
    print(f"llm: {streamed.strip()!r}, streamed and whole; continued: {goes_on.strip()!r}")


LANGCHAIN = """
import sys
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model=sys.argv[2], base_url=sys.argv[1] + "/v1", api_key="unused", temperature=0, max_tokens=20)
question = [("system", "be brief"), ("human", "what is the opposite of down ?")]
whole = chat.invoke(question)
pieces = list(chat.stream(question, stream_usage=True))
text = "".join(piece.content for piece in pieces)
assert text == whole.content and whole.usage_metadata["output_tokens"] > 0, (text, whole)
n = whole.usage_metadata["output_tokens"]
assert sum(piece.usage_metadata["output_tokens"] for piece in pieces if piece.usage_metadata) == n
assert [answer.content for answer in chat.batch([question] * 4)] == [text] * 4
scored = chat.bind(logprobs=True, top_logprobs=2).invoke(question)
assert len(scored.response_metadata["logprobs"]["content"]) == n
print(text)
"""


def langchain(config: Config, url: str):
    text = command(config, "python", "-c", LANGCHAIN, url, config.model.name)
    print(f"LangChain's ChatOpenAI: {text.strip()!r}, whole, streamed, four at once and with log-probs")


def main(config: Config):
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = load.Process(folder, load.Config(model=config.model))
        try:
            asyncio.run(server.ready())
            harness(config, server.url, folder)
            llm(config, server.url, folder)
            langchain(config, server.url)
        finally:
            server.stop()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
