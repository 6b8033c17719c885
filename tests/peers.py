"""The peer that tools/bench.py times: the same work in PyTorch, by transformers or by TRL's PPOTrainer, GRPOTrainer and
DPOTrainer.

Run by it in an environment of its own (torch and transformers; for ppo also TRL 0.24 and datasets, for grpo and dpo TRL
1.16 and PEFT); nothing of this project is imported. argv[1] is the work as JSON. One JSON line says {"versions": ...}
when all is warm; then each line on stdin has the work done once, and a line {"seconds": ..., "peak": ...} answers: the
bytes by which the process's memory (resident, or PyTorch's on a GPU) has grown, at its peak, since its libraries were
loaded.

What is equal: sizes and family of the model, batch, precision, number of threads, what a step does (forward, backward,
clipping, AdamW), sampling from the whole vocabulary, and in PPO four models with their own weights, 4 epochs of 4
minibatches with an optimiser step each, responses of full length. In DPO a frozen reference that is asked in the step;
metrics are computed, not logged. Weights are random on both sides. What is not: TRL's trainers own their loop, so their
seconds include a data loader and a collator (of rows already tokenised); ours have a batch that is on the device.
"""

import json
import os
import sys
import tempfile
import time

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402

WARM_UP = 2  # times that the work is done before it counts, as bench.py does
DEVICE = "cpu"  # or "cuda", where bench.py has a GPU


def say(**answer):
    print(json.dumps(answer), file=ANSWERS, flush=True)


def model_config(shape: dict, **more):
    if shape["family"] == "gpt2":
        return transformers.GPT2Config(
            vocab_size=shape["vocab_size"], n_positions=shape["context"], n_embd=shape["dim"], n_layer=shape["layers"],
            n_head=shape["heads"], n_inner=shape["ffn"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            tie_word_embeddings=shape["tied"], bos_token_id=0, eos_token_id=0, **more,
        )  # fmt: skip
    return transformers.LlamaConfig(
        vocab_size=shape["vocab_size"], max_position_embeddings=shape["context"], hidden_size=shape["dim"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"], head_dim=shape["head_dim"],
        num_key_value_heads=shape["kv_heads"], intermediate_size=shape["ffn"], tie_word_embeddings=shape["tied"],
        bos_token_id=0, eos_token_id=0, **more,
    )  # fmt: skip


def language_model(shape: dict):
    model = transformers.AutoModelForCausalLM.from_config(model_config(shape), attn_implementation="sdpa")
    return model.to(DEVICE)


def random_tokens(work: dict):
    return torch.randint(0, work["shape"]["vocab_size"], (work["rows"], work["tokens"]), device=DEVICE)


def finish():
    """Wait for a GPU, whose work goes on after the call."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def prepare_train(work: dict):
    model, tokens = language_model(work["shape"]).train(), random_tokens(work)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    bf16 = work["dtype"] == "bfloat16"

    def step():
        for _ in range(work["calls"]):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return step


def prepare_generate(work: dict):
    model = language_model(work["shape"]).eval().to(getattr(torch, work["dtype"]))
    prompts, new = random_tokens(work), work["new"]
    sampling = dict(do_sample=True, temperature=work["temperature"], top_k=0) if work["temperature"] else {}
    model.generation_config.eos_token_id = None  # responses of full length

    @torch.inference_mode()
    def generate():
        mask = torch.ones_like(prompts)
        out = model.generate(prompts, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **sampling)
        assert out.shape[1] == work["tokens"] + new

    return generate


class Clock(transformers.TrainerCallback):
    """TRL's trainers own the loop: at the end of each iteration this reports its seconds and waits."""

    def __init__(self):
        self.done, self.start, self.loaded = 0, 0.0, memory_peak()

    def on_step_end(self, args, state, control, **_):
        self.done += 1
        if self.done == WARM_UP:
            say(versions=versions())
        elif self.done > WARM_UP:
            finish()
            say(seconds=time.perf_counter() - self.start, peak=memory_peak() - self.loaded)
        if self.done >= WARM_UP and not sys.stdin.readline():
            os._exit(0)
        self.start = time.perf_counter()


def word_tokenizer(shape: dict):
    import tokenizers

    words = {f"w{i}": i for i in range(shape["vocab_size"])} | {"<pad>": shape["vocab_size"]}  # <pad> never occurs
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<pad>")


def run_ppo(work: dict):
    import datasets
    import trl

    trainer, clock = trl.PPOTrainer, Clock()
    shape, rows, tokenizer = work["shape"], work["rows"], word_tokenizer(work["shape"])
    classifier = lambda: transformers.AutoModelForSequenceClassification.from_config(
        model_config(shape, num_labels=1, pad_token_id=shape["vocab_size"]), attn_implementation="sdpa"
    )
    policy, ref = language_model(shape), language_model(shape)
    ref.load_state_dict(policy.state_dict())
    prompts = datasets.Dataset.from_dict({"input_ids": random_tokens(work).tolist() * 4})
    settings = trl.PPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        num_mini_batches=4, num_ppo_epochs=4, local_rollout_forward_batch_size=rows, response_length=work["new"],
        stop_token=None, missing_eos_penalty=None, temperature=1.0, total_episodes=10_000 * rows,
        num_sample_generations=0, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, use_cpu=DEVICE == "cpu",
        bf16=work["dtype"] == "bfloat16", gradient_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip

    trainer(
        args=settings, processing_class=tokenizer, model=policy, ref_model=ref, reward_model=classifier(),
        value_model=classifier(), train_dataset=prompts, eval_dataset=prompts, callbacks=[clock],
        data_collator=lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])},
    ).train()  # fmt: skip


def run_dpo(work: dict):
    import datasets
    import trl

    class Trainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):  # it is tokenised already
            return dataset

    clock = Clock()
    rows, policy, ref = work["rows"], language_model(work["shape"]), language_model(work["shape"])
    ref.load_state_dict(policy.state_dict())
    draw = lambda size: torch.randint(0, work["shape"]["vocab_size"], (4 * rows, size)).tolist()
    pairs = dict(prompt_ids=draw(work["tokens"]), chosen_ids=draw(work["new"]), rejected_ids=draw(work["new"]))
    settings = trl.DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        max_steps=10_000, max_length=None, precompute_ref_log_probs=False, max_grad_norm=1.0, optim="adamw_torch_fused",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=DEVICE == "cpu", bf16=work["dtype"] == "bfloat16", gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(
        args=settings, processing_class=word_tokenizer(work["shape"]), model=policy, ref_model=ref,
        train_dataset=datasets.Dataset.from_dict(pairs), callbacks=[clock],
    ).train()  # fmt: skip


def run_grpo(work: dict):
    """One optimiser step on a rollout, KL to the reference in the loss. Prompts are texts of the word tokenizer, and
    nothing ends an answer."""
    clock, tokenizer, rows = Clock(), word_tokenizer(work["shape"]), work["rows"]
    model = language_model(work["shape"])
    model.resize_token_embeddings(len(tokenizer))  # for <pad>
    model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as folder:  # the trainer reads its reference from there
        model.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="sdpa", dtype=torch.float32
        )
        run_grpo_from(model.to(DEVICE), work, tokenizer, rows, clock)


def run_grpo_from(model, work: dict, tokenizer, rows: int, clock: Clock):
    import datasets
    import peft
    import trl

    def score(completions, **_):
        return [len(set(text.split())) + 0.1 * i for i, text in enumerate(completions)]

    work = work | dict(rows=4 * rows)
    prompts = [" ".join(f"w{i}" for i in ids) for ids in random_tokens(work).tolist()]
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, gradient_accumulation_steps=1,
        num_generations=work["group"], num_iterations=1, max_completion_length=work["new"], beta=work["beta"],
        temperature=1.0, top_k=0, max_steps=10_000, learning_rate=1e-4, max_grad_norm=1.0, optim="adamw_torch_fused",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=DEVICE == "cpu", bf16=work["dtype"] == "bfloat16", gradient_checkpointing=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    adapters = peft.LoraConfig(r=work["rank"], lora_alpha=2 * work["rank"], target_modules="all-linear")
    trl.GRPOTrainer(
        model=model, args=settings, processing_class=tokenizer, callbacks=[clock],
        reward_funcs=score,
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}), peft_config=adapters if work["rank"] else None,
    ).train()  # fmt: skip


def run_script(work: dict):
    """A script of this project by TRL's trainer, on the same model folder and rows, with adapters of rank 8: grpo.py
    (groups of four, two optimiser steps an iteration), reward.py, or sft.py as the README has it."""
    import datasets
    import peft
    import trl

    clock, name = Clock(), dict(grpo="GRPO", reward="Reward", sft="SFT")[work["script"]]
    more = {
        "grpo": dict(
            per_device_train_batch_size=24, steps_per_generation=2, num_generations=4, max_completion_length=24,
            beta=0.05, temperature=1.0, top_k=0,
        ),
        "reward": dict(per_device_train_batch_size=8, max_length=256),
        "sft": dict(per_device_train_batch_size=8, gradient_accumulation_steps=4, max_length=512),
    }[work["script"]]  # fmt: skip
    settings = getattr(trl, f"{name}Config")(
        output_dir=tempfile.mkdtemp(), max_steps=10_000, learning_rate=1e-4, max_grad_norm=1.0,
        optim="adamw_torch_fused", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=DEVICE == "cpu", bf16=work["bf16"], dataloader_pin_memory=False,
        gradient_checkpointing=work["script"] == "sft", **more,
    )  # fmt: skip
    words = lambda completions, **_: [float(len(set(text.split()))) for text in completions]
    adapters = peft.LoraConfig(
        r=8, lora_alpha=8, target_modules="all-linear",
        task_type="SEQ_CLS" if work["script"] == "reward" else "CAUSAL_LM",
    )  # fmt: skip
    with open(work["rows"]) as lines:
        rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    getattr(trl, f"{name}Trainer")(
        model=work["model"], args=settings, train_dataset=rows, peft_config=adapters, callbacks=[clock],
        processing_class=transformers.AutoTokenizer.from_pretrained(work["model"]),
        **(dict(reward_funcs=words) if work["script"] == "grpo" else {}),
    ).train()  # fmt: skip


def memory_peak() -> int:
    """Bytes: of the GPU, or resident ones. Not getrusage's: on Linux a new program inherits there what the one that
    started it had."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as lines:
            return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    except OSError:
        return 0


def versions() -> dict:
    names = ("torch", "transformers", "trl")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules} | {
        "torch threads": torch.get_num_threads()
    }


def main(work: dict):
    global DEVICE
    DEVICE = {"cpu": "cpu", "gpu": "cuda"}[work["device"]]
    if DEVICE == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("this PyTorch sees no GPU, and bench.py does")
        torch.set_float32_matmul_precision("high")  # fp32 products as JAX has them there
    torch.manual_seed(0)
    trainers = {"ppo": run_ppo, "grpo": run_grpo, "dpo": run_dpo, "script": run_script}
    if work["work"] in trainers:
        return trainers[work["work"]](work)
    once = {"train": prepare_train, "generate": prepare_generate}[work["work"]](work)
    for _ in range(WARM_UP):
        once()
    finish()
    say(versions=versions())
    for _ in sys.stdin:
        start = time.perf_counter()
        once()
        finish()
        say(seconds=(time.perf_counter() - start) / work.get("calls", 1))


if __name__ == "__main__":
    ANSWERS, sys.stdout = sys.stdout, sys.stderr  # what libraries print does not go between the answers
    main(json.loads(sys.argv[1]))
