"""main() of sft.py, reward.py and ppo.py on a toy world of a few hundred rows: one layer, a few steps each."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import gpt
import ppo
import probe
import reward
import sft
import toy

REWARDS = '''
import signal

calls = 0


def the(prompts, responses, rows):
    """How often a response says "the"."""
    assert all(p.startswith("Human :") or "Human" in p for p in prompts) and all("kind" in row for row in rows)
    return [float(response.split().count("the")) for response in responses]


def the_and_stop(prompts, responses, rows):
    """The same, and in the third iteration somebody asks the run to stop."""
    global calls
    calls += 1
    if calls == 3:
        signal.raise_signal(signal.SIGTERM)
    return the(prompts, responses, rows)


def too_few(prompts, responses, rows):
    return [0.0]


def not_a_number(prompts, responses, rows):
    return [float("nan")] * len(responses)
'''


def leaves(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


class Spy:
    """Calls a module's function and keeps what it was given and what it gave."""

    def __init__(self, patch, module, name, keep):
        self.seen, function = [], getattr(module, name)

        def wrapped(*args, **options):
            self.seen.append(keep(*args))  # before the call: it may donate its arguments
            return function(*args, **options)

        patch.setattr(module, name, wrapped)


class World:
    def __init__(self, root: Path):
        self.root, self.sft, self.reward = root, root / "sft", root / "reward"
        self.file = lambda name: str(root / "data" / f"{name}.jsonl")

    def ppo(self, name, **options) -> ppo.Config:
        plan = dict(
            init=str(self.sft), reward=("my_rewards:the",), data=(self.file("prompts"),), out=self.root / name, steps=3,
            batch_size=32, minibatch_size=16, prompt_length=24, response_length=8, lr=3e-3, critic_lr=1e-2, beta=0.02,
            missing_eos=None, gold=None, dtype="float32",
        )  # fmt: skip
        return ppo.Config(**plan | options)


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Members of an ensemble, and runs that differ in their folder, compile the same programs: keep them."""
    wanted = dict(
        jax_compilation_cache_dir=jax.config.jax_compilation_cache_dir or str(tmp_path_factory.mktemp("jax-cache")),
        jax_persistent_cache_min_compile_time_secs=0.2,
    )
    before = {name: getattr(jax.config, name) for name in wanted}
    for values in (wanted, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is wanted:
            yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def world(tmp_path_factory, compile_once):
    """Data, an SFT model, an ensemble of two reward models, and the working directory. A length far beyond the rows'
    keeps all batches in one bucket, hence in one compiled step."""
    world = World(tmp_path_factory.mktemp("world"))
    (world.root / "my_rewards.py").write_text(REWARDS)
    sizes = dict(base=10, demos=300, pairs=300, thumbs=5, prompts=160, heldout=40)
    toy.main(toy.Config(out=world.root / "data", **sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.root)
        sft.main(
            sft.Config(
                init=None,
                tokenizer=str(world.root / "data"),
                data=(world.file("demos"),),
                out=world.sft,
                steps=40,
                batch_size=32,
                length=160,
                lr=1e-2,
                warmup=2,
                layers=1,
                heads=2,
                dim=32,
                eval_every=40,
            )  # fmt: skip
        )
        spy = Spy(patch, reward, "report", lambda members, *_: members)
        world.reward_config = reward.Config(
            init=str(world.sft), data=(world.file("pairs"),), out=world.reward, steps=10, batch_size=32, length=160,
            lr=1e-3, head_lr=1e-2, members=2, normalize_with=str(world.sft), normalize_samples=256,
            normalize_data=world.file("prompts"), response_length=8,
        )  # fmt: skip
        reward.main(world.reward_config)
        world.members = spy.seen[0]
        yield world


# ---------------------------------------------------------------------------------------------------- sft.py


def test_sft_learns_and_writes_a_folder_that_loads(world):
    steps = log(world.sft)
    assert [row["step"] for row in steps] == list(range(40))
    assert steps[0]["loss"] == pytest.approx(np.log(250), rel=0.1)  # a fresh model knows nothing
    assert steps[-1]["loss"] < 0.6 * steps[0]["loss"]
    assert steps[-1]["val/loss"] < 0.7 * steps[0]["loss"]
    np.testing.assert_allclose(steps[-1]["val/perplexity"], np.exp(steps[-1]["val/loss"]), rtol=1e-5)
    model, tokenizer = gpt.load(world.sft)
    assert isinstance(model, gpt.GPT) and tokenizer.vocab_size == model.config.vocab_size


# ---------------------------------------------------------------------------------------------------- reward.py


def test_reward_report_has_sane_values(world):
    report = json.loads((world.reward / "report.json").read_text())
    assert report["pairs"] == 40
    assert report["accuracy"] * 40 == pytest.approx(round(report["accuracy"] * 40))
    low, high = report["accuracy_interval"]
    assert 0 <= low < report["accuracy"] < high <= 1
    assert 0 <= report["longer_wins"] <= 1 and report["longer_wins_pairs"] <= 40
    rows = report["accuracy_by_length_difference"]
    assert sum(row["pairs"] for row in rows) == 40
    np.testing.assert_allclose(sum(row["pairs"] * row["accuracy"] for row in rows), 40 * report["accuracy"])
    assert 0.01 <= report["temperature"] <= 100
    for name in ("before", "after"):
        assert 0 <= report[name]["ece"] <= 1 and 0 <= report[name]["brier"] <= 1 and report[name]["nll"] > 0
        assert sum(share for _, _, share in report["reliability"][name]) == pytest.approx(1)
    assert report["score_std"] > 0 and -1 <= report["correlation_with_length"] <= 1
    gold = report["gold"]
    assert -1 <= gold["correlation"] <= 1 and 0 <= gold["agreement_on_clear_pairs"] <= 1
    assert 0.5 < gold["labels_agree_with_gold"] <= 1


def test_an_answer_must_beat_all_others_of_its_choice():
    """Two choices of four answers, one right in all three of its pairs, one in two of them; and a pair that stands
    alone. Where most pairs stand alone there is no such measure."""
    gaps, chosen = np.array([1.0, 2.0, 0.5, 1.0, 0.0, 3.0, -1.0]), list(zip("aaabbbc", "1112223"))  # prompt, answer
    found = reward.best_of(gaps, chosen)
    assert (found["choices"], found["accuracy"], found["chance"]) == (2, 0.5, 0.25)
    assert found["accuracy_interval"] == pytest.approx(gpt.share_interval([1, 0], np.arange(2)))
    again = reward.best_of(gaps, list(zip("aaaaaaa", "1112223")))  # two choices of one prompt say nothing of others
    assert again["accuracy_interval"] == [0, 1]
    assert reward.best_of(gaps[2:], list("abcde")) is None and reward.best_of(gaps[:5], list("aabcd")) is None


def test_reward_members_differ_in_head_and_in_data_order(world):
    first, second = (log(world.reward / f"member-{i}") for i in range(2))
    assert len(first) == len(second) == 10
    assert first[0]["loss"] != second[0]["loss"]
    assert not same(world.members[0].head, world.members[1].head)


def test_reward_folder_gives_the_scores_of_the_trained_model(world):
    tokens = np.random.default_rng(0).integers(0, 250, (4, 12))
    mask = (np.arange(12) < np.array([[12], [5], [8], [1]])).astype(int)
    score = jax.jit(lambda model: model(tokens, mask))
    for i, trained in enumerate(world.members):
        loaded, _ = gpt.load(world.reward / f"member-{i}")
        assert isinstance(loaded, gpt.ScoreModel) and loaded.suffix == trained.suffix != ()
        np.testing.assert_allclose(score(loaded), score(trained), rtol=1e-6, atol=1e-6)


def test_normalised_scores_of_the_reference_have_mean_0_and_std_1(world):
    """On fresh samples: as close as 256 samples can tell."""
    policy, tokenizer = gpt.load(world.sft)
    prompts = gpt.Batches(world.file("prompts"), "prompts", tokenizer, 128, 152, 1)
    scores = []
    for i in range(4):
        batch = prompts(i)
        tokens, mask = batch["tokens"], batch["mask"]
        out = gpt.generate(
            policy, tokens, mask, jax.random.key(100 + i), 8, ends=tokenizer.end_ids, pad=tokenizer.pad_id
        )
        scores.append([gpt.score(m, tokens, mask, out.tokens, out.mask, tokenizer.end_ids) for m in world.members])
    scores = np.concatenate(scores, 1)
    assert (np.abs(scores.mean(1)) < 0.25).all() and (np.abs(scores.std(1) - 1) < 0.25).all()


def test_scores_are_normalised_over_prompts_of_all_lengths(world, tmp_path, monkeypatch):
    """Scores depend on the prompt: a batch of equally long ones would be a sample of something else."""
    rows = [{"prompt": "\n\nHuman: " + "the " * (1 + 8 * (i % 2)) + "\n\nAssistant:"} for i in range(400)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spy = Spy(monkeypatch, gpt, "score", lambda model, prompts, prompt_mask, *_: prompt_mask.sum(1))
    config = replace(world.reward_config, normalize_data=str(tmp_path / "prompts.jsonl"), normalize_samples=64)
    _, tokenizer = gpt.load(world.sft)
    reward.normalize(world.members[0], tokenizer, config, jax.random.key(0))
    short, long = np.unique(spy.seen[0])
    assert long == short + 8 and 16 <= (spy.seen[0] == short).sum() <= 48


# ---------------------------------------------------------------------------------------------------- ppo.py

TRL_NAMES = [
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward", "objective/scores",
    "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg", "loss/policy_avg", "loss/value_avg",
    "val/clipfrac_avg", "val/ratio", "val/ratio_var", "val/num_eos_tokens",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(world):
    """Three iterations against the ensemble's folder."""
    with pytest.MonkeyPatch.context() as patch:
        refs = Spy(patch, ppo, "complete_rollout", lambda state, base, ref, *_: leaves((ref, state.policy)))
        models = Spy(patch, ppo, "score_responses", lambda reward, *_: leaves(reward.models))
        config = world.ppo("ppo", reward=(str(world.reward),), gold="toy:parts")
        ppo.main(config)
    return log(config.out), refs.seen, models.seen, gpt.load(config.out)[0]


def test_ppo_logs_trl_names_and_gold(trained):
    steps = trained[0]
    assert [row["step"] for row in steps] == [0, 1, 2]
    for row in steps:
        assert not set(TRL_NAMES) - row.keys()
        assert np.isfinite(list(row.values())).all()
        assert 1 <= row["response_length"] <= 8 and -1 <= row["eval/gold"] <= 1 and row["updates"] == 4
        np.testing.assert_allclose(row["objective/non_score_reward"], -0.02 * row["objective/kl"], atol=1e-6)
        np.testing.assert_allclose(
            row["objective/rlhf_reward"], row["objective/scores"] + row["objective/non_score_reward"], atol=1e-5
        )


def test_ppo_starts_at_the_reference_with_ratio_one(trained):
    first = trained[0][0]
    assert abs(first["objective/kl"]) < 1e-4 and abs(first["objective/kl_exact"]) < 1e-4
    assert all(row["val/ratio_first"] == 1.0 for row in trained[0])
    assert all(row["val/decode_drift"] < 1e-4 for row in trained[0])
    assert trained[0][-1]["objective/kl_exact"] > 1e-4


def test_ppo_moves_the_policy_and_nothing_that_is_frozen(trained, world):
    steps, refs, models, final = trained
    start = leaves(gpt.load(world.sft)[0])
    for seen in refs:
        assert same(seen[: len(start)], start)  # the reference is the SFT model throughout
    assert same(refs[0][len(start) :], start) and not same(final, start)
    assert all(same(seen, models[0]) for seen in models)
    assert same(models[0], [gpt.load(world.reward / f"member-{i}")[0] for i in range(2)])


@pytest.fixture(scope="module")
def learned(world):
    config = world.ppo("learned", steps=15)
    ppo.main(config)
    return config.out


def test_ppo_learns_to_say_a_word(learned):
    scores = [row["objective/scores"] for row in log(learned)]
    assert np.mean(scores[-3:]) > np.mean(scores[:2]) + 0.5


def test_ppo_stopped_by_a_signal_and_resumed_is_bit_identical(learned, world):
    with pytest.raises(SystemExit):
        ppo.main(world.ppo("resumed", steps=15, reward=("my_rewards:the_and_stop",)))
    assert len(log(world.root / "resumed")) == 3
    ppo.main(world.ppo("resumed", steps=15, resume=True))
    without_clock = lambda folder: [{k: v for k, v in row.items() if k != "seconds"} for row in log(folder)]
    assert without_clock(world.root / "resumed") == without_clock(learned)
    assert same(gpt.load(world.root / "resumed")[0], gpt.load(learned)[0])


def schedule_count(opt_state):
    (count,) = [x.count for x in jax.tree.leaves(opt_state, is_leaf=is_schedule) if is_schedule(x)]
    return int(count)


def is_schedule(x):
    return isinstance(x, optax.ScaleByScheduleState)


@pytest.mark.parametrize("target_kl, taken", [(None, 4), (1e-9, 1)])
def test_learning_rates_end_where_they_should_also_where_target_kl_skips_steps(world, monkeypatch, target_kl, taken):
    """4 optimiser steps in each of 3 iterations: the last one has the rate of the plan, a tenth and a bit."""
    asked = {"policy": [], "critic": []}
    for name, seen in asked.items():
        update = getattr(ppo, f"update_{name}")

        def wrapped(model, opt_state, *args, update=update, seen=seen):
            seen.append((schedule_count(opt_state), args[-2]))  # where its schedule is, and the optimiser
            return update(model, opt_state, *args)

        monkeypatch.setattr(ppo, f"update_{name}", wrapped)
    rates, schedule = [], gpt.schedule
    monkeypatch.setattr(gpt, "schedule", lambda *args, **more: rates.append(schedule(*args, **more)) or rates[-1])
    config = world.ppo(f"near-{taken}", target_kl=target_kl, epochs=2)
    ppo.main(config)
    steps = log(config.out)
    assert [row["updates"] for row in steps] == [taken] * 3 and steps[0]["stopped_early"] == (taken == 1)
    at = [4 * i + k for i in range(3) for k in range(4 if taken == 4 else 2)]  # the second step of two is not kept
    assert [count for count, _ in asked["policy"]] == [count for count, _ in asked["critic"]] == at
    plan = lambda peak, at: peak * (1 - 0.9 * at / 12)
    for rate, peak in zip(rates, (3e-3, 1e-2), strict=True):  # policy, critic
        assert [float(rate(k)) for k in (0, 8, 12)] == pytest.approx([plan(peak, k) for k in (0, 8, 12)])
    assert [row["lr"] for row in steps] == pytest.approx([plan(3e-3, 4 * i) for i in range(3)])
    assert len({id(optimizer) for seen in asked.values() for _, optimizer in seen}) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reward=("my_rewards:too_few",)), "must return 32 finite floats"),
        (
            dict(reward=("my_rewards:not_a_number",)),
            "must return 32 finite floats, one a response; it returned .* response",
        ),
        (dict(reward=("my_rewards:score", "SFT")), "folders of reward models, or one module:function, not both"),
        (dict(reward=("my_rewards.py:score",)), "write my_rewards:score"),
        (dict(reward=("my_rewards:nowhere",)), "cannot load my_rewards:nowhere"),
        (dict(reward=("SFT",)), "is a language model, not a reward model"),
        (dict(minibatch_size=10), "multiple of --minibatch-size"),
        (dict(missing_eos=-1.0), "--missing-eos -1.0: a price, 0 or above"),
        (dict(temperature=-1.0), "--temperature -1.0: above 0, since log-probs are divided by it"),
    ],
)
def test_ppo_names_what_is_wrong(world, options, message):
    if options.get("reward") == ("SFT",):
        options = dict(reward=(str(world.sft),))
    with pytest.raises(ValueError, match=message):
        ppo.main(world.ppo("wrong", overwrite=True, **options))


def test_a_learning_rate_of_zero_is_no_default():
    gpt.start()
    config = ppo.resolve(ppo.Config(lr=0.0, critic_lr=1e-3))
    assert (config.lr, config.critic_lr) == (0.0, 1e-3)
    assert ppo.resolve(ppo.Config(lr=1e-3, critic_lr=0.0)).critic_lr == 0.0
    assert ppo.resolve(ppo.Config(lr=0.0)).critic_lr == 0.0
    config = ppo.resolve(ppo.Config(lora_rank=4))
    assert config.lr == config.critic_lr == 6e-4


def test_a_run_never_deletes_what_it_starts_from(world):
    before = (world.sft / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="--init is --out.*would delete it"):
        ppo.main(world.ppo("x", out=world.sft, overwrite=True))
    config = replace(world.reward_config, out=world.sft, overwrite=True)
    with pytest.raises(ValueError, match="--init is --out.*would delete it"):
        reward.main(config)
    assert (world.sft / "model.safetensors").read_bytes() == before


def test_a_reward_model_learns_from_few_pairs_and_is_reported_on_one(world, tmp_path):
    lines = Path(world.file("pairs")).read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:12]))
    (tmp_path / "few-heldout.jsonl").write_text(lines[12])
    few = dict(data=(str(tmp_path / "few.jsonl"),), out=tmp_path / "out", steps=None, members=1, normalize_with=None)
    reward.main(replace(world.reward_config, **few))
    assert len(log(tmp_path / "out")) == 1
    report = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)  # no NaN
    assert report["pairs"] == 1


def test_no_agreement_is_reported_where_no_pair_is_clear():
    texts = [("q", "a"), ("q", "b")]
    found = lambda gold: reward.compare_with_gold(np.array([[2.0, 1.0]]), texts, lambda *_: gold)
    assert found([0.5, 0.4])["clear_pairs"] == 0 and "agreement_on_clear_pairs" not in found([0.5, 0.4])
    assert found([0.9, 0.4])["agreement_on_clear_pairs"] == 1 and found([0.4, 0.9])["agreement_on_clear_pairs"] == 0


def test_fewer_prompts_than_a_batch_stop_ppo_before_it_samples(world, tmp_path):
    lines = Path(world.file("prompts")).read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(lines[:20]))
    with pytest.raises(ValueError, match="20 prompts in .*few.jsonl, and a batch takes 32: lower --batch-size"):
        ppo.main(world.ppo("few", data=(str(tmp_path / "few.jsonl"),)))
    with pytest.raises(ValueError, match="--epochs 0"):
        ppo.main(world.ppo("few", epochs=0))
    assert not (world.root / "few").exists()


@pytest.mark.parametrize("prompts, samples", [(20, 50), (160, 200)])
def test_as_many_samples_are_normalised_on_as_were_asked_for(world, tmp_path, monkeypatch, capsys, prompts, samples):
    lines = Path(world.file("prompts")).read_text().splitlines()[:prompts]
    (tmp_path / "prompts.jsonl").write_text("".join(line + "\n" for line in lines))
    monkeypatch.setattr(gpt, "score", lambda model, prompts, *_: np.arange(len(prompts), dtype=np.float32))
    config = replace(world.reward_config, normalize_data=str(tmp_path / "prompts.jsonl"), normalize_samples=samples)
    reward.normalize(world.members[0], gpt.load(world.sft)[1], config, jax.random.key(0))
    assert f"scores of {samples} samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(length=40, response_length=40), "prompts.jsonl: 160 of 160 rows do not fit 0 tokens"),
        (dict(normalize_with="other"), "has another tokenizer than"),
        (dict(normalize_data="nowhere.jsonl"), "no data file nowhere.jsonl"),
    ],
)
def test_what_scores_are_normalised_on_is_looked_at_before_training(
    world, tmp_path, words, monkeypatch, options, message
):
    gpt.save(tmp_path / "other", gpt.load(world.sft)[0], gpt.load_tokenizer(words))
    if "normalize_with" in options:
        options = dict(normalize_with=str(tmp_path / "other"))
    monkeypatch.setattr(reward, "train_member", lambda *_: pytest.fail("trained first"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        reward.main(replace(world.reward_config, out=tmp_path / "out", **options))


def test_what_scores_are_normalised_on_follows_the_model_and_its_data():
    follow = lambda **options: reward.resolve(reward.Config(**options))
    found = follow(init="mine/model", data=("a/pairs.jsonl:0.7", "b/more.jsonl:0.3"))
    assert (found.normalize_with, found.normalize_data) == ("mine/model", "a/prompts.jsonl")
    toys = follow()  # its base continues texts and answers nobody
    assert (toys.normalize_with, toys.normalize_data) == ("out/sft", "data/toy/prompts.jsonl")
    assert follow(init="x", normalize_with=None).normalize_with is None
    assert follow(init="x", normalize_with="y", normalize_data="z.jsonl").normalize_data == "z.jsonl"


def test_the_readme_normalises_rewards_on_responses_as_long_as_ppo_samples():
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text().replace("\\\n", " ")
    mine = {
        words[1]: words
        for words in map(str.split, readme.splitlines())
        if words[:1] == ["python"] and "data/mine" in " ".join(words)
    }
    option = lambda script, name: mine[script][mine[script].index(name) + 1]
    assert option("probe.py", "--response-length") == option("ppo.py", "--response-length")
    assert probe.Config().normalize_with == "auto"  # by samples of --init
    assert option("probe.py", "--init") == option("ppo.py", "--init")
    assert reward.Config().response_length == ppo.Config().response_length


def test_gold_that_returns_no_list_is_named():
    assert gpt.read_gold([1, {"gold": 0.5}]) == [{"gold": 1.0}, {"gold": 0.5}]
    for wrong in (None, 0.5, "good", {"gold": [1.0]}, [[0.5, 0.5]]):
        with pytest.raises(ValueError, match="a gold function must return a float or a dict of floats"):
            gpt.read_gold(wrong)


def test_verdicts_that_are_no_numbers_count_for_nothing_and_are_counted():
    said = [{"gold": 1.0, "kind": True}, {"gold": "good"}, None, math.nan, {"gold": 0.0, "kind": None}, math.inf]
    found = gpt.read_gold(said)
    assert [row["gold"] for row in found if math.isfinite(row["gold"])] == [1.0, 0.0]
    assert [math.isnan(row["kind"]) for row in found] == [False] + [True] * 5
    means = {"eval/gold": 0.5, "eval/gold/unjudged": 4, "eval/kind": 1.0, "eval/kind/unjudged": 5}
    assert gpt.mean_gold(said, "eval/") == means
    assert gpt.mean_gold([0.5, 1.0], "eval/") == {"eval/gold": 0.75}
    assert gpt.mean_gold([None], "eval/") == {"eval/gold/unjudged": 1}
