"""prepare.py: every reason for a drop, the split, ratings, mixtures, streams, errors. Real files: REAL_DATA=folder."""

import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import pytest

import gpt
import prepare

HH = "\n\nHuman: {}\n\nAssistant:"


def write_rows(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def run(tmp_path, *sources, out="out", **options):
    """Files are written from lists of rows; a report and the kept rows come back."""
    names = [s if isinstance(s, str) else write_rows(tmp_path / f"in{i}.jsonl", s) for i, s in enumerate(sources)]
    folder = tmp_path / out
    report = prepare.main(prepare.Config(tuple(names), folder, **options))
    return report, {file.stem: rows_of(file) for file in folder.glob("*.jsonl")}


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pair(prompt, chosen=" yes", rejected=" no", **other):
    return {"prompt": HH.format(prompt), "chosen": chosen, "rejected": rejected} | other


def counts(report, group="dropped"):
    return {reason: entry["count"] for reason, entry in report[group].items()}


# ---- pairs


def test_one_call_writes_what_every_script_reads(tmp_path):
    transcripts = [
        {"chosen": HH.format(f"question {i}") + f" good {i}", "rejected": HH.format(f"question {i}") + f" bad {i}"}
        for i in range(200)
    ]
    report, rows = run(tmp_path, transcripts, heldout=0.2)
    assert rows["pairs"][0] == {"prompt": HH.format("question 0"), "chosen": " good 0", "rejected": " bad 0"}
    assert rows["prompts"][0] == {"prompt": HH.format("question 0")}
    assert rows["demos"][0] == {"prompt": HH.format("question 0"), "completion": " good 0"}
    assert report["kept"] == report["read"] == {str(tmp_path / "in0.jsonl"): 200} and report["dropped"] == {}
    for kind in ("pairs", "prompts", "demos"):
        assert len(rows[kind]) + len(rows[f"{kind}-heldout"]) == 200 and 20 <= len(rows[f"{kind}-heldout"]) <= 60
        for name in (kind, f"{kind}-heldout"):  # what the training scripts read with
            path = tmp_path / "out" / f"{name}.jsonl"
            assert [row for _, row in gpt.read_rows(path, kind)] == rows[name]
            entry = report["files"][f"{name}.jsonl"]
            assert entry["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
            assert (entry["rows"], entry["bytes"]) == (len(rows[name]), path.stat().st_size)
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    assert report["words"]["chosen"] == {"mean": 2.0, "p10": 2, "p50": 2, "p90": 2, "p99": 2, "max": 2}


def test_every_reason_is_counted_with_its_place(tmp_path):
    rows = [
        pair("one"),
        pair("two", chosen="  \n"),
        pair("  "),
        pair("three", rejected=" no\n\nHuman: and then?"),
        pair("four", chosen=" yes\n\nAssistant: yes"),
        pair("five", chosen=" x" * 2000),
        pair("six", chosen=" same", rejected=" same  \n"),
        pair("seven", chosen=" a b c d e f g h end", rejected=" a b c d e f g h stop"),
        pair("one"),
        pair("one", rejected=" never"),
        {"chosen": "no turn a", "rejected": "no turn b"},
        {"chosen": "", "rejected": HH.format("x") + " y"},
    ]
    report, written = run(tmp_path, rows, heldout=0, truncate_words=10)
    assert counts(report) == {
        "empty": 3,
        "a further turn within an answer": 2,
        "over-long": 1,
        "equal sides": 1,
        "equal sides after truncation": 1,
        "exact duplicate": 1,
        "no prompt that both sides share": 1,
    }
    assert [row["rejected"] for row in written["pairs"]] == [" no", " never"]
    assert len(written["prompts"]) == 1 and len(written["demos"]) == 1  # the same prompt and chosen twice
    places = {reason: [e["at"] for e in entry["examples"]] for reason, entry in report["dropped"].items()}
    source = str(tmp_path / "in0.jsonl")
    assert places["exact duplicate"] == [f"{source}:9"] and places["empty"] == [f"{source}:{n}" for n in (2, 3, 12)]
    assert places["equal sides after truncation"] == [f"{source}:8"]
    assert "six" in report["dropped"]["equal sides"]["examples"][0]["text"]
    assert "pairs-heldout" not in written


def test_further_messages_within_an_answer_are_counted(tmp_path):
    long = {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]}
    good = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("e")]}
    report, written = run(tmp_path, [long, good], heldout=0)
    assert counts(report) == {"a further turn within an answer": 1} and len(written["pairs"]) == 1


def test_answers_that_were_cut_stay_marked(tmp_path):
    _, written = run(tmp_path, [pair("q", truncated=["chosen"])], heldout=0)
    assert written["pairs"][0]["truncated"] == ["chosen"] and written["demos"][0]["truncated"] == ["completion"]
    _, written = run(tmp_path, [pair("q", truncated=["chosen"])], out="thumbs", heldout=0, kind="thumbs")
    assert [row.get("truncated") for row in written["thumbs"]] == [["completion"], None]


def test_at_most_three_examples(tmp_path):
    report, _ = run(tmp_path, [pair("q")] * 9, heldout=0)
    assert counts(report) == {"exact duplicate": 8} and len(report["dropped"]["exact duplicate"]["examples"]) == 3


def test_limits(tmp_path):
    rows = [pair("a b c", chosen=" d e f g", rejected=" h"), pair("a", chosen=" b", rejected=" c")]
    for options, kept in ((dict(max_words=8), 1), (dict(max_words=9), 2), (dict(limit=1), 1)):
        _, written = run(tmp_path, rows, heldout=0, overwrite=True, **options)
        assert len(written["pairs"]) == kept, options


def test_the_longer_side(tmp_path):
    rows = [pair(str(i), chosen=" a b", rejected=" c") for i in range(3)] + [pair("x", chosen=" a", rejected=" b c")]
    report, _ = run(tmp_path, [*rows, pair("y", " a", " b")], heldout=0)
    assert report["longer_side_chosen"] == 0.75


# ---- texts


@pytest.mark.parametrize(
    "raw, clean",
    [
        ("cafe\u0301", "café"),
        ("a\u200bb\ufeff c\x00d\u202e", "ab cd"),
        ("a\r\nb\rc\u2028d", "a\nb\nc\nd"),
        ("a \t\nb  \n\n  c  ", "a\nb\n\n  c"),
        ("a\u00a0b\u2009c", "a b c"),
        ("tab\tand\nline", "tab\tand\nline"),
        ("lone \ud800 half", "lone  half"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🔬",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 👩\u200d🔬",
        ),
    ],
)
def test_clean_text(raw, clean):
    repairs = set()
    assert prepare.clean_text(raw, repairs) == clean and bool(repairs) == (raw != clean)
    assert prepare.clean_text(clean, set()) == clean


def test_transcripts_keep_their_turns(tmp_path):
    prompt = "\n\nHuman: a \r\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:"
    report, rows = run(tmp_path, [{"prompt": prompt + " ", "chosen": "  e\u200b\n", "rejected": "f"}], heldout=0)
    clean = {"prompt": "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:", "chosen": " e", "rejected": " f"}
    assert rows["pairs"] == [clean]
    assert counts(report, "repaired") == {
        "control characters and odd blanks": 1,
        "blanks at the end of lines": 1,
        "not one blank after Assistant:": 1,
    }


# ---- what stands beside the turns


def talk(*contents, **more):
    roles = itertools.cycle(["user", "assistant"])
    return [{"role": role, "content": content} | more for role, content in zip(roles, contents)]


def test_transcripts_become_conversations(tmp_path, capsys):
    """HH's form: whole dialogues on both sides, whose turns become messages and whose answers the last one."""
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nHuman: I mean,\nwhy?\n\nAssistant:"
    rows = [
        {"chosen": dialogue + " So.\n\nIt is.", "rejected": dialogue + " No."},
        {"chosen": "Note." + dialogue + " x", "rejected": "Note." + dialogue + " y"},
        {"prompt": "plain", "chosen": " a ", "rejected": [{"role": "assistant", "content": "b"}]},
        {"prompt": "\n\nHuman: Go\n\nAssistant: I", "chosen": " a", "rejected": " b"},
    ]
    report, written = run(tmp_path, rows, heldout=0, chat=True)
    say = lambda role, content: {"role": role, "content": content}
    asked = [say("user", "Hi"), say("assistant", "Hello."), say("user", "Why?\n\nI mean,\nwhy?")]
    sides = {"chosen": [say("assistant", "So.\n\nIt is.")], "rejected": [say("assistant", "No.")]}
    plain = {"chosen": [say("assistant", "a")], "rejected": [say("assistant", "b")]}
    assert written["pairs"] == [{"prompt": asked} | sides, {"prompt": [say("user", "plain")]} | plain]
    assert written["demos"][0] == {"prompt": asked, "completion": sides["chosen"]}
    assert counts(report)["text before the first turn"] == 1
    assert counts(report)["the prompt ends within the assistant's turn"] == 1
    assert counts(report, "repaired")["two turns of one speaker joined"] == 1
    with pytest.raises(gpt.BadRow, match="--chat: a text has no turns"):
        run(tmp_path, [{"text": "a story"}], chat=True, out="texts")


def test_conversations_are_split_as_their_transcripts_are(tmp_path):
    rows = [{"chosen": HH.format(f"Ask {i}") + " x", "rejected": HH.format(f"Ask {i}") + " y"} for i in range(100)]
    _, plain = run(tmp_path, rows, heldout=0.2)
    _, chat = run(tmp_path, rows, heldout=0.2, chat=True, out="chat")
    asked = [row["prompt"][0]["content"] for row in chat["pairs-heldout"]]
    assert asked and [HH.format(text) for text in asked] == [row["prompt"] for row in plain["pairs-heldout"]]


@pytest.mark.parametrize("prompt", ["### Response:\n", "A: ", "def f(x):\n    "])
def test_the_seam_between_prompt_and_answer_stays(tmp_path, prompt):
    _, rows = run(tmp_path, [{"prompt": f"Go on. \n{prompt}", "chosen": "  return x", "rejected": "no"}], heldout=0)
    assert rows["pairs"][0]["prompt"] + rows["pairs"][0]["chosen"] == f"Go on.\n{prompt}  return x"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "hi", "input": "", "output": "go away", "kto_tag": False},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "go away"}], "kto_tag": False},
        {"prompt": talk("hi"), "response": [{"role": "assistant", "content": "go away"}], "kto_tag": False},
    ],
)
def test_answers_that_are_tagged_bad_become_thumbs_down(tmp_path, row, capsys):
    _, rows = run(tmp_path, [row], heldout=0)
    answer = [{"role": "assistant", "content": "go away"}]
    assert rows == {
        "thumbs": [{"prompt": talk("hi"), "completion": answer, "label": False}],
        "prompts": [{"prompt": talk("hi")}],
    }
    assert "all thumbs have label False" in capsys.readouterr().out


def test_system_and_history_open_the_prompt(tmp_path):
    pirate = [{"role": "system", "content": "a pirate"}]
    rows = [
        {"system": "a pirate", "prompt": "hi 0", "chosen": " arr", "rejected": " no"},
        {"system": "a pirate", "question": "hi 1", "chosen": "arr", "rejected": "no"},
        {
            "system": "a pirate",
            "conversations": talk("hi 2"),
            "chosen": talk("x", "arr")[1],
            "rejected": talk("x", "no")[1],
        },
    ]
    _, written = run(tmp_path, rows, heldout=0)
    assert [row["prompt"] for row in written["pairs"]] == [pirate + talk(f"hi {i}") for i in range(3)]
    assert {row["chosen"][0]["content"] for row in written["pairs"]} == {"arr"}
    alpaca = {"instruction": "go on", "output": "c", "history": [["a", "b"]], "system": "a pirate"}
    _, written = run(tmp_path, [alpaca], heldout=0, overwrite=True)
    assert written["demos"][0]["prompt"] == pirate + talk("a", "b", "go on")


def test_weights_of_turns(tmp_path):
    turns = talk("q", "rude", "r", "kind")
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    _, rows = run(tmp_path, [{"messages": turns}], heldout=0)
    assert rows["demos"] == [{"prompt": talk("q", "rude", "r"), "completion": talk("x", "kind")[1:]}]
    turns[1]["weight"], turns[3]["weight"] = 1, 0
    with pytest.raises(gpt.BadRow, match=r"in0.jsonl:1: a message has weight 0"):
        run(tmp_path, [{"messages": turns}], heldout=0, overwrite=True)


@pytest.mark.parametrize(
    "rude, kind", [({"loss": False}, {"loss": True}), ({"train": False}, {}), ({"masked": True}, {"masked": False})]
)
def test_other_words_for_what_is_learned_mean_the_same(tmp_path, rude, kind):
    turns = talk("q", "rude", "r", "kind")
    marked = [turns[0] | {"weight": 0}, turns[1] | rude, turns[2], turns[3] | kind]
    report, rows = run(tmp_path, [{"messages": marked}], heldout=0)
    assert rows["demos"] == [{"prompt": turns[:3], "completion": turns[3:]}] and not report["keys_not_read"]
    for messages, message in (
        ([*turns[:3], turns[3] | rude], "a message has weight"),
        ([turns[0] | {"train": True}, turns[1]], ".*only the assistant's turns"),
        ([turns[0], turns[1] | {"loss_mask": 1}], ".*`loss_mask`, which may mean learned or not"),
    ):
        with pytest.raises(gpt.BadRow, match=f"in0.jsonl:1: {message}"):
            run(tmp_path, [{"messages": messages}], heldout=0, overwrite=True)


def test_contents_in_parts_are_their_texts_and_other_parts_are_refused(tmp_path):
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "?"}]
    _, rows = run(tmp_path, [{"messages": [user(parts), assistant("a")]}], heldout=0)
    assert rows["demos"] == [{"messages": talk("q?", "a")}]
    for part, message in (({"type": "image_url", "image_url": {}}, "a part of type 'image_url'"), ("x", "are text")):
        with pytest.raises(gpt.BadRow, match=f"in0.jsonl:1: .*{message}"):
            run(tmp_path, [{"messages": [user([*parts, part]), assistant("a")]}], heldout=0, overwrite=True)


def test_answers_under_unknown_names_are_no_prompts_unless_asked_for(tmp_path):
    for more in ({"response_a": "x", "response_b": "y", "winner": "b"}, {"responses": ["x", "y"]}, {"Answer 1": "x"}):
        with pytest.raises(gpt.BadRow, match="in0.jsonl:1: `.*` reads like an answer.*--kind prompts"):
            run(tmp_path, [{"prompt": "q"} | more], heldout=0, overwrite=True)
        report, rows = run(tmp_path, [{"prompt": "q"} | more], heldout=0, kind="prompts", overwrite=True)
        kept = {name: value for name, value in more.items() if name == "winner"}
        assert rows["prompts"] == [{"prompt": "q"} | kept]
        assert report["keys_not_read"] == dict.fromkeys(more.keys() - kept.keys(), 1)


@pytest.mark.parametrize("name", ["score_{}", "{}_score", "{}_rating", "{}-rating", "rating_{}"])
def test_ratings_of_both_sides_have_several_spellings(tmp_path, name):
    scores = lambda chosen, rejected: {name.format("chosen"): chosen, name.format("rejected"): rejected}
    report, rows = run(tmp_path, [pair("a", **scores(4, 2.5)), pair("b", **scores(1, 5))], heldout=0)
    assert [row["margin"] for row in rows["pairs"]] == [1.5] and counts(report) == {"rated the other way round": 1}


@pytest.mark.parametrize(
    "row, message",
    [
        (pair("a", chosen_score="high", rejected_score=1), "`chosen_score` is 'high', not a number"),
        (pair("a", **{"chosen-rating": "7", "rejected-rating": 2}), "`chosen-rating` is '7', not a number"),
        ({"prompt": "q", "response": "a", "helpfulness": "4"}, "`helpfulness` is '4', not a number"),
        ({"prompt": "q", "response": 5}, "`response` is int, not text"),
        ({"problem": 5, "solution": "a"}, "`problem` is int, not text"),
        ({"query": "q", "response": 5}, "`response` is int, not text"),
        ({"input": "q", "output": 5}, "`output` is int, not text"),
        ({"question": "q", "context": 5, "response": "a"}, "`context` is int, not text"),
        ({"prompt": "q", "completion": "a", "is_truncated": "yes"}, "`is_truncated` is 'yes': true, false"),
        ({"system_prompt": 5, "query": "q", "response": "a"}, "`system_prompt` is int"),
        ({"system_prompt": "s", "messages": [{"role": "system", "content": "t"}]}, "a `system_prompt` key and"),
        ({"problem": "q", "topic": "sums"}, "the keys `problem`, `topic`; known"),
        ({"query": "q", "chosen": "a"}, r"must both be there \(found: `query`, `chosen`\)"),
        (
            {"messages": [{"role": "user", "text": "q"}]},
            r"a role and a content that are text \(found: `role`, `text`\)",
        ),
        ({"message_id": "x", "role": "prompter", "text": "q"}, "`text` with a `role` is one message of a talk"),
    ],
)
def test_errors_call_keys_as_the_file_does(tmp_path, row, message):
    with pytest.raises(gpt.BadRow, match=f"in0.jsonl:1: .*{message}"):
        run(tmp_path, [row], heldout=0)


def test_keys_that_are_not_read_are_called_as_the_file_does(tmp_path):
    rows = [pair("a", chosen_score=3, problem="p"), pair("b", rejected_rating=3)]
    report, written = run(tmp_path, rows, heldout=0)
    assert report["keys_not_read"] == dict(chosen_score=1, problem=1, rejected_rating=1)
    assert [set(row) for row in written["pairs"]] == [{"prompt", "chosen", "rejected"}] * 2
    row = {"query": "q", "response": "a", "output-tokens": 3}
    assert run(tmp_path, [row], heldout=0, out="dash")[0]["keys_not_read"] == {"output-tokens": 1}
    report, _ = run(
        tmp_path, [{"conversation": [user("q") | {"country": "x"}, assistant("a")]}], heldout=0, out="talks"
    )
    assert report["kind"] == "demos" and report["keys_not_read"] == {"conversation.country": 1}


def test_a_label_in_words_is_a_class_unless_it_may_be_a_thumb(tmp_path):
    talk = [user("q"), assistant("a")]
    for i, row in enumerate(({"messages": talk}, {"prompt": "q", "completion": "a"}, {"query": "q", "response": "a"})):
        report, written = run(tmp_path, [row | {"label": "math"}], heldout=0, out=f"class{i}")
        assert report["kind"] == "demos" and report["keys_not_read"] == {"label": 1} and len(written["demos"]) == 1
        for label in ("good", "Undesirable", 1):
            with pytest.raises(
                gpt.BadRow, match=f"in0.jsonl:1: `label` is {label!r}: of a thumb it is true.* otherwise"
            ):
                run(tmp_path, [row | {"label": label}], heldout=0, out="bad")


def test_prompts_keep_what_a_reward_function_may_want_to_see(tmp_path):
    check = {"data_source": "math", "reward_model": {"ground_truth": "4"}, "query": "q"}
    rows = [{"prompt": [user("p")], "responses": ["x"], "text": "t"} | check, {"messages": [user("q")], "truth": "4"}]
    report, written = run(tmp_path, rows, heldout=0, kind="prompts")
    assert written["prompts"] == [{"prompt": [user("p")]} | check, {"prompt": [user("q")], "truth": "4"}]
    assert report["keys_not_read"] == dict(responses=1, text=1)
    with pytest.raises(gpt.BadRow, match="in0.jsonl:2: this row holds prompts, not demos"):
        run(tmp_path, [{"messages": [user("q"), assistant("a")]}, rows[1]], heldout=0, out="mixed")


def test_what_a_server_cut_is_truncated_and_what_is_not_to_be_learned_is_dropped(tmp_path):
    demo = {"prompt": "q", "completion": "a"}
    rows = [demo | {"finish_reason": "length"}, demo | {"completion": "b", "finish_reason": "stop"}]
    rows += [demo | {"completion": "c", "is_truncated": True}, demo | {"completion": "d", "train": False}]
    report, written = run(tmp_path, rows, heldout=0)
    assert [row.get("truncated") for row in written["demos"]] == [True, None, True]
    assert counts(report) == {"weight 0": 1} and report["keys_not_read"] == {"finish_reason": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz"])
def test_marks_and_line_ends_of_other_systems_are_no_part_of_rows(tmp_path, suffix):
    rows = [pair(f"question {i}\r\nof two lines") for i in range(3)]
    lines = [json.dumps(row) for row in rows]
    text = "[\r\n" + ",\r\n".join(lines) + "\r\n]\r\n" if ".json." in f"{suffix}." else "\r\n".join(lines)
    data = text.encode("utf-8-sig")
    path = tmp_path / f"in{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    report, written = run(tmp_path, str(path), heldout=0)
    assert [row["prompt"] for row in written["pairs"]] == [HH.format(f"question {i}\nof two lines") for i in range(3)]
    if suffix.startswith(".jsonl"):  # the training scripts read it as well
        assert [row for _, row in gpt.read_rows(path, "pairs")] == rows


def test_roles_are_mapped_or_refused(tmp_path):
    spoken = [{"from": role, "value": text} for role, text in [("User", "q"), ("chatgpt", "a")]]
    _, rows = run(tmp_path, [{"conversations": spoken}], heldout=0)
    assert rows["demos"] == [{"messages": talk("q", "a")}]
    for message, word in [
        ({"role": "tool", "content": "0 degrees"}, "role 'tool'"),
        ({"role": "assistant", "content": "I look", "tool_calls": [{"id": 1}]}, "`tool_calls`"),
    ]:
        with pytest.raises(gpt.BadRow, match=f"in0.jsonl:1: .*{word}"):
            run(tmp_path, [{"messages": [*talk("q"), message, *talk("x", "a")[1:]]}], heldout=0, overwrite=True)


def test_empty_columns_are_absent_and_full_ones_are_refused(tmp_path):
    row = {"prompt": "q", "completion": "a", "tools": "[]", "images": [], "system": "", "chosen": None}
    row |= {"image": False, "functions": "null", "chat_template_kwargs": "{}"}
    report, rows = run(tmp_path, [row], heldout=0)
    assert rows["demos"] == [{"prompt": "q", "completion": "a"}] and report["keys_not_read"] == {}
    with pytest.raises(gpt.BadRow, match="`images` is not supported"):
        run(tmp_path, [row | {"images": ["x.png"]}], heldout=0, overwrite=True)


def test_flags_and_joiners_stay_and_cleaning_can_be_turned_off(tmp_path):
    scotland = "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f"
    rows = [{"prompt": "q", "completion": f"{scotland} \u0645\u06cc\u200c\u062e \U000e0041x\u200b"}]
    _, written = run(tmp_path, rows, heldout=0)
    assert written["demos"][0]["completion"] == f"{scotland} \u0645\u06cc\u200c\u062e x"
    _, written = run(tmp_path, rows, heldout=0, overwrite=True, clean=False)
    assert written["demos"][0]["completion"] == rows[0]["completion"]


def test_what_a_kept_row_should_be_known_for(tmp_path):
    rows = [pair("a"), pair("a") | {"chosen": pair("a")["rejected"], "rejected": pair("a")["chosen"]}]
    rows += [{"prompt": "<|im_start|>user\nq<|im_end|>\n", "chosen": "a", "rejected": "b"}]
    report, written = run(tmp_path, rows, heldout=0)
    assert len(written["pairs"]) == 3
    assert counts(report, "noted") == {
        "contradicts an earlier pair": 1, "holds a chat template's markers, which are read as letters": 1,
    }  # fmt: skip


def test_odd_rows_are_bad_rows_or_rows(tmp_path):
    deep = '{"prompt": "q", "chosen": "a", "rejected": "b", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    lines = [deep, json.dumps(pair("a") | {"rejected": None})]
    lines += [json.dumps(pair("b") | {"id": "\ud800x"}), json.dumps(pair("c") | {"id": [1]})]
    path = tmp_path / "odd.jsonl"
    path.write_text("\n".join(lines))
    report, rows = run(tmp_path, str(path), heldout=0, skip_bad_rows=True)
    assert counts(report) == {"bad row": 2} and [row["id"] for row in rows["pairs"]] == ["x", [1]]
    rated = {"prompt": {"a": 1}, "completion": "x", "rating": 1}
    with pytest.raises(gpt.BadRow, match="in0.jsonl:1: a message needs a role"):
        run(tmp_path, [rated], heldout=0, overwrite=True)


# ---- the split


def test_no_first_turn_on_both_sides(tmp_path):
    """Cuts of one dialogue, and prompts that differ in case and blanks only, stay together."""
    rows = []
    for i in range(300):
        rows += [pair(f"Start {i}"), pair(f"start  {i}", " other"), pair(f"Start {i}\n\nAssistant: x\n\nHuman: more")]
    _, written = run(tmp_path, rows, heldout=0.3)
    sides = [{prepare.first_turn(row) for row in written[name]} for name in ("pairs", "pairs-heldout")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 300
    assert len(written["pairs-heldout"]) == 3 * len(sides[1]) and 60 < len(sides[1]) < 120
    _, other = run(tmp_path, rows, heldout=0.3, seed=1, out="other")
    assert {prepare.first_turn(row) for row in other["pairs-heldout"]} != sides[1]


def test_first_turn_of_every_form():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " Hi  THERE"}]
    later = [*messages, {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]
    for prompt in (messages, later, HH.format("Hi\nthere"), "hi there"):
        assert prepare.first_turn({"prompt": prompt}) == "hi there"
    assert prepare.first_turn({"messages": later}) == "hi there"


def test_heldout_files(tmp_path):
    held = write_rows(tmp_path / "held.jsonl", [pair("b", " 1"), pair("c")])
    report, rows = run(tmp_path, [pair("a"), pair("B"), pair("d")], heldout_data=(held,), heldout=0.9)
    assert [row["prompt"] for row in rows["pairs"]] == [HH.format("a"), HH.format("d")]
    assert [row["prompt"] for row in rows["pairs-heldout"]] == [HH.format("b"), HH.format("c")]
    assert counts(report) == {"its prompt is in the held-out data": 1}


# ---- spellings


def test_helpfulness_of_several_answers_is_their_rating(tmp_path):
    rows = [{"prompt": "q", "response": f"a {n}", "helpfulness": n, "verbosity": 2} for n in (4, 1)]
    report, written = run(tmp_path, rows, heldout=0)
    assert written["pairs"] == [{"prompt": "q", "chosen": "a 4", "rejected": "a 1", "margin": 3}]
    assert report["keys_not_read"] == {"verbosity": 2}


def test_ratings_become_pairs_with_margins(tmp_path):
    rated = [("p", "x", 1), ("q", "u", 0.3), ("p", "y", 4), ("p", "z", 1), ("q", "v", 0.1), ("r", "w", 5)]
    rows = [{"prompt": p, "completion": c, "rating": r} for p, c, r in rated]
    report, written = run(tmp_path, rows, heldout=0)
    assert written["pairs"] == [
        {"prompt": "p", "chosen": "y", "rejected": "x", "margin": 3},
        {"prompt": "p", "chosen": "y", "rejected": "z", "margin": 3},
        {"prompt": "q", "chosen": "u", "rejected": "v", "margin": 0.2},
    ]
    assert counts(report) == {"equal ratings": 1, "one rating for its prompt": 1}


def test_one_answer_against_several_becomes_a_pair_with_each(tmp_path):
    """RewardBench 2's shape. The pairs keep what the row carries; an empty side has a reason and a line."""
    rows = [
        {"prompt": "p", "chosen": ["a"], "rejected": ["x", "y", "z"], "id": "7", "num_correct": 1},
        {"prompt": "q", "chosen": ["a", "b"], "rejected": ["x"]},
    ]
    report, written = run(tmp_path, rows, heldout=0)
    wanted = [("p", "a", "x"), ("p", "a", "y"), ("p", "a", "z"), ("q", "a", "x"), ("q", "b", "x")]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in written["pairs"]] == wanted
    assert [row.get("id") for row in written["pairs"]] == ["7"] * 3 + [None] * 2
    with pytest.raises(ValueError, match=r"jsonl:1: `chosen` and `rejected` must both hold an answer"):
        run(tmp_path, [{"prompt": "p", "chosen": ["a"], "rejected": []}], heldout=0, overwrite=True)


def test_pairs_rated_the_other_way_round_are_dropped(tmp_path):
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    rows = [
        pair | {"score_chosen": 2, "score_rejected": 1},
        pair | {"prompt": "q", "score_chosen": 1, "score_rejected": 2},
    ]
    report, written = run(tmp_path, rows, heldout=0)
    assert len(written["pairs"]) == 1 and counts(report) == {"rated the other way round": 1}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


TURN = [{"from": "human", "value": "q"}]
ASK = HH.format("q")


@pytest.mark.parametrize(
    "raw, kind, row",
    [
        (
            {"chosen": ASK + " b" + ASK + " c", "rejected": ASK + " b" + ASK + " d"},
            "pairs",
            {"prompt": ASK + " b" + ASK, "chosen": " c", "rejected": " d"},
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "pairs",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ),
        (
            {"instruction": "q", "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            "pairs",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ),
        (
            {"input": "q", "chosen": "a", "rejected": "b", "system": ""},
            "pairs",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ),
        ({"input": "q", "output": "a"}, "demos", {"prompt": [user("q")], "completion": [assistant("a")]}),
        ({"text": "t", "title": "x", "source": "s"}, "text", {"text": "t", "source": "s"}),
        ({"prompt": "q"}, "prompts", {"prompt": "q"}),
        ({"prompt": "q", "answer": "4"}, "prompts", {"prompt": "q", "answer": "4"}),
        ({"turns": ["q", "r"], "question_id": 1}, "prompts", {"prompt": [user("q")], "question_id": 1}),
        ({"input": [user("q")], "output": "a"}, "demos", {"prompt": [user("q")], "completion": "a"}),
        ({"prompt": "q", "completion": "a", "id": 7}, "demos", {"id": 7, "prompt": "q", "completion": "a"}),
        ({"messages": [user("q"), assistant("a")]}, "demos", {"messages": [user("q"), assistant("a")]}),
        (
            {"conversations": [*TURN, {"from": "gpt", "value": "a"}]},
            "demos",
            {"messages": [user("q"), assistant("a")]},
        ),
        (
            {"instruction": "do", "input": "this", "output": "a"},
            "demos",
            {"prompt": [user("do\n\nthis")], "completion": [assistant("a")]},
        ),
        (
            {"question": "q", "answer": "1+1\n#### 2"},
            "demos",
            {"prompt": [user("q")], "completion": [assistant("1+1\n#### 2")], "answer": "2"},
        ),
        (
            {"messages": [user("q"), assistant("a")], "label": False},
            "thumbs",
            {"prompt": [user("q")], "completion": [assistant("a")], "label": False},
        ),
        (
            {"conversations": TURN, "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
            "pairs",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        ),
        (
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
                "messages": [user("q"), assistant("a")],
                "score_chosen": 8.5,
                "score_rejected": 6,
            },
            "pairs",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")], "margin": 2.5},
        ),
    ],
)
def test_spellings(tmp_path, raw, kind, row):
    report, rows = run(tmp_path, [raw], heldout=0)
    assert report["kind"] == kind and rows[kind] == [row]
    assert set(rows) == {kind, *prepare.DERIVED.get(kind, ())}
    assert list(gpt.read_rows(tmp_path / "out" / f"{kind}.jsonl", kind)) == [(1, row)]


def test_prompts_of_conversations_end_before_the_last_answer(tmp_path):
    turns = [user("q"), assistant("a"), user("r"), assistant("b")]
    _, rows = run(tmp_path, [{"messages": turns}], heldout=0)
    assert rows["prompts"] == [{"prompt": turns[:3]}]


def test_dialogues_that_part_early_share_a_short_prompt():
    """The rest of both, further turns included, is left to the sides: cleaning drops such a row."""
    sides = ASK + " b" + ASK + " c", ASK + " d" + ASK + " c"
    assert prepare.split_shared(*sides) == (ASK, " b" + ASK + " c", " d" + ASK + " c")
    with pytest.raises(prepare.Dropped, match="no prompt that both sides share"):
        prepare.split_shared([user("q"), assistant("a")], [assistant("a")])


def test_null_columns_are_absent_and_keys_that_are_not_read_are_named(tmp_path, capsys):
    empty = dict.fromkeys(("chosen", "rejected", "messages", "label"))
    rows = [empty | {"prompt": "q", "completion": f"a {i}", "topic": "sums", "id": i} for i in range(3)]
    report, written = run(tmp_path, rows, heldout=0)
    assert written["demos"] == [{"id": i, "prompt": "q", "completion": f"a {i}"} for i in range(3)]
    assert report["keys_not_read"] == {"topic": 3} and "keys not read: topic (3 rows)" in capsys.readouterr().out


def test_too_few_rows_for_a_heldout_file_leave_none(tmp_path, capsys):
    report, written = run(tmp_path, [pair("a")], heldout=1e-9)
    assert set(written) == {"pairs", "prompts", "demos"} and set(report["files"]) == {f"{n}.jsonl" for n in written}
    assert "no row was held out: too few prompts differ" in capsys.readouterr().out


def test_kind_can_be_asked_for(tmp_path):
    _, rows = run(tmp_path, [pair("a")], heldout=0, kind="thumbs")
    row = {"prompt": HH.format("a")}
    assert rows["thumbs"] == [row | {"completion": " yes", "label": True}, row | {"completion": " no", "label": False}]
    _, rows = run(tmp_path, [pair("a")], heldout=0, kind="demos", out="demos")
    assert set(rows) == {"demos", "prompts"} and rows["demos"] == [row | {"completion": " yes"}]


def test_transcripts_become_text_that_is_split_like_their_pairs(tmp_path):
    rows = [pair(f"question {i}", chosen=f" answer {i}") for i in range(60)]
    _, pairs = run(tmp_path, rows, heldout=0.3)
    _, texts = run(tmp_path, rows, heldout=0.3, kind="text", out="text")
    for split in ("", "-heldout"):
        assert len(pairs["pairs" + split]) > 5
        want = [(row["prompt"] + row["chosen"]).strip() for row in pairs["pairs" + split]]
        assert [row["text"] for row in texts["text" + split]] == want
    with pytest.raises(gpt.BadRow, match="only transcripts"):
        run(tmp_path, [{"prompt": "two and two?", "completion": " four"}], kind="text", out="plain")


@pytest.mark.parametrize("gap", [2, 60_000])
def test_json_array(tmp_path, gap):
    """Also where objects lie across the borders of what is read at once."""
    rows = [{"instruction": f"do {i}", "input": "", "output": f"did {i} [}}" + " x" * gap} for i in range(30)]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    _, written = run(tmp_path, str(tmp_path / "a.json"), heldout=0, max_words=None)
    assert [row["completion"][0]["content"] for row in written["demos"]] == [row["output"] for row in rows]
    where = [place for place, _ in prepare.read_source(str(tmp_path / "a.json"))]
    assert where[:2] == [f"{tmp_path}/a.json:2", f"{tmp_path}/a.json:7"]
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1)[:-9])
    with pytest.raises(gpt.BadRow, match=r"b\.json:147: not JSON"):
        run(tmp_path, str(tmp_path / "b.json"), heldout=0, out="b", max_words=None)


@pytest.mark.parametrize(
    "text, separator, documents",
    [
        ("one\ntwo\n\n \nthree\r\n\r\nfour\n", None, ["one\ntwo", "three", "four"]),
        ("one\n\ntwo\n<|endoftext|>\nthree", None, ["one\n\ntwo", "three"]),
        ("one\ntwo\n\nthree", "\\n", ["one", "two", "three"]),
        ("one==two==", "==", ["one", "two"]),
    ],
)
def test_plain_text(tmp_path, text, separator, documents):
    with gzip.open(tmp_path / "a.txt.gz", "wb") as f:
        f.write(text.encode())
    _, rows = run(tmp_path, str(tmp_path / "a.txt.gz"), separator=separator, heldout=0)
    assert [row["text"] for row in rows["text"]] == documents


def test_text_without_a_separator_streams(tmp_path):
    (tmp_path / "a.txt").write_text("a line of text\n" * 200_000)
    rows = [row["text"] for _, row in prepare.read_source(str(tmp_path / "a.txt"))]
    assert len(rows) == 4 and max(map(len, rows)) <= prepare.DOCUMENT_LIMIT
    assert "\n".join(rows).split("\n") == ["a line of text"] * 200_000


def test_hub(tmp_path, monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return iter([pair("a"), pair("b")])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    _, rows = run(tmp_path, "hub:some/set/test/main", heldout=0)
    assert len(rows["pairs"]) == 2 and calls[0] == (("some/set", "main"), {"split": "test", "streaming": True})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"hub:some/set needs the `hub` extra: pip install datasets"):
        run(tmp_path, "hub:some/set", out="b")


# ---- mixtures, duplicates, memory


def test_mixture_has_its_proportions_at_every_point(tmp_path):
    a = write_rows(tmp_path / "a.jsonl", [pair(f"a {i % 700}") for i in range(1400)])  # every row of a twice
    b = write_rows(tmp_path / "b.jsonl", [pair(f"b {i}") for i in range(900)])
    _, rows = run(tmp_path, f"{a}:0.7", f"{b}:0.3", heldout=0)
    letters = [row["source"][-1] for row in rows["pairs"]]
    for n in range(1, len(letters) + 1):
        assert abs(letters[:n].count("a") - 0.7 * n) <= 1
    assert letters.count("a") == 700 and 299 <= letters.count("b") <= 301  # ends with the kept rows of a
    _, rows = run(tmp_path, a, b, heldout=0, out="all")
    assert [row["source"][-1] for row in rows["pairs"]] == ["a"] * 700 + ["b"] * 900


def test_near_duplicates(tmp_path):
    words = " ".join(f"word{i}" for i in range(100))
    rows = [
        pair("long", chosen=f" {words}"),
        pair("long", chosen=f" {words} indeed"),
        pair(
            "long", chosen=" " + words.replace("word9", "other")
        ),  # a tenth of the words differ, so a third of shingles
        pair("short", chosen=" I do not know"),
        pair("brief", chosen=" I do not know"),
    ]
    report, written = run(tmp_path, rows, heldout=0, near_duplicates=True)
    assert (
        counts(report) == {"near duplicate": 1} and report["dropped"]["near duplicate"]["examples"][0]["at"][-1] == "2"
    )
    assert len(written["pairs"]) == 4


def test_near_search_agrees_with_jaccard():
    """Texts of known similarity s: found well above 0.8, let through well below."""
    for kept_words, expected in ((95, True), (60, False)):
        found = 0
        for trial in range(50):
            search = prepare.NearSearch()
            search.add(" ".join(f"a{trial}x{i}" for i in range(100)))
            # a common start of n - 2 shingles and unlike ends: (n - 2) / (98 + 98 - n + 2)
            found += not search.add(" ".join(f"a{trial}x{i}" if i < kept_words else f"b{i}" for i in range(100)))
        assert (found >= 45) if expected else (found == 0), (kept_words, found)


def test_near_search_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(prepare.NearSearch, "ROWS", 10)
    search = prepare.NearSearch()
    texts = [f"text number {i} with the words a{i} b{i} c{i} d{i}" for i in range(15)]
    assert all(map(search.add, texts)) and not search.add(texts[14]) and search.add(texts[0])


def test_seen_is_a_set():
    seen, keys = prepare.Seen(), [prepare.key_of(str(i)) for i in range(20_000)]
    assert all(map(seen.add, keys)) and not any(map(seen.add, keys)) and all(key in seen for key in keys)
    assert prepare.key_of("new") not in seen and len(seen.slots) * 8 < 22 * len(keys)
    assert prepare.key_of("a", "b") != prepare.key_of("ab")


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    def source(rows):
        return lambda name, separator=None: (
            (f"{name}:{i}", pair(f"question {i}", chosen=f" {i}" * 200, rejected=" no" * 200)) for i in range(rows)
        )

    peaks = []
    for rows in (500, 5_000):
        monkeypatch.setattr(prepare, "read_source", source(rows))
        tracemalloc.start()
        prepare.main(prepare.Config(("stream",), tmp_path / str(rows)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # the texts of 4,500 rows more are 7 MB; their keys are allowed, 96 bytes a row
    assert peaks[1] - peaks[0] < 4_500 * 96 + 200_000, peaks


def test_same_input_same_bytes(tmp_path):
    rows = [pair(f"q {i % 40}", f" {i}") for i in range(100)]
    first, _ = run(tmp_path, rows, near_duplicates=True)
    second, _ = run(tmp_path, rows, near_duplicates=True, out="again")
    assert first == second


# ---- what goes wrong


@pytest.mark.parametrize(
    "line, message",
    [
        ("{broken", r"in\.jsonl:3: not JSON"),
        ("[1]", r"in\.jsonl:3: a list, not an object"),
        ('{"prompt": "q", "chosen": 3, "rejected": "b"}', r"in\.jsonl:3: .* is not a list of messages"),
        ('{"prompt": 3, "chosen": "a", "rejected": "b"}', r"in\.jsonl:3: .* is not a list of messages"),
        ('{"prompt": "q", "completion": "a"}', r"in\.jsonl:3: this row holds demos, not pairs"),
        (
            '{"completion": "a", "rejected": "b"}',
            r"in\.jsonl:3: `chosen` and `rejected` must both be there",
        ),
        ('{"chosen": "a", "rejected": [{"role": "user", "content": "b"}]}', r"in\.jsonl:3: one of `chosen` and"),
        ('{"chosen": 1, "rejected": 2}', r"in\.jsonl:3: '1' is not a list of messages"),
        ('{"question": "q", "answer": 2}', r"in\.jsonl:3: `answer` is int, not text"),
        ('{"a": 1, "b": 2}', r"in\.jsonl:3: unknown format, with the keys `a`, `b`; known are \{text\}"),
        (
            '{"prompt": "q", "chosen": "a", "rejected": "b", "margin": "x"}',
            r"in\.jsonl:3: `margin` is 'x', not a number",
        ),
        ('{"prompt": "q", "completion": "a", "rating": true}', r"in\.jsonl:3: `rating` is True, not a number"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text(f"{json.dumps(pair('a'))}\n\n{line}\n{json.dumps(pair('b'))}\n")
    with pytest.raises(gpt.BadRow, match=message + r".*\(--skip-bad-rows goes on without such rows\)"):
        run(tmp_path, str(path))
    assert list((tmp_path / "out").iterdir()) == []
    report, rows = run(tmp_path, str(path), skip_bad_rows=True, heldout=0)
    assert len(rows["pairs"]) == 2 and counts(report) == {"bad row": 1}
    assert report["dropped"]["bad row"]["examples"][0]["at"] == f"{path}:3"


def test_errors_before_any_work(tmp_path):
    one, demo = [pair("a")], [{"prompt": "q", "completion": "a"}]
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(pair("a")).encode())[:-12])
    (tmp_path / "empty.jsonl").write_text("")
    for sources, options, error, message in [
        (["missing.jsonl"], {}, FileNotFoundError, "missing.jsonl"),
        (["table.csv"], {}, ValueError, r"table\.csv: unknown format \.csv \(known: JSON lines"),
        ([str(tmp_path / "latin.txt")], {}, ValueError, "not whole UTF-8 text"),
        ([str(tmp_path / "cut.jsonl.gz")], {}, ValueError, "not whole UTF-8 text"),
        ([str(tmp_path / "empty.jsonl")], {}, ValueError, "holds no rows"),
        ([[{"a": 1}]], {}, gpt.BadRow, r"in0\.jsonl:1: unknown format, with the keys `a`;"),
        ([[{"completion": "a"}]], {}, gpt.BadRow, r"in0\.jsonl:1: unknown format, with the keys `completion`; known"),
        ([one, demo], {}, ValueError, "in0.jsonl holds pairs, .*in1.jsonl holds demos: .*--kind"),
        (["a.jsonl:0.5", "b.jsonl"], {}, ValueError, "weight above 0"),
        ([one], {"heldout": 1.5}, ValueError, "not a share"),
        ([[pair("a", " b", " b")]], {}, ValueError, "no row is left"),
    ]:
        with pytest.raises(error, match=message):
            run(tmp_path, *sources, **options)


def test_an_earlier_result_is_safe(tmp_path, monkeypatch):
    run(tmp_path, [pair("a")], heldout=0)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(tmp_path, [pair("b")], heldout=0)
    with pytest.raises(gpt.BadRow):
        run(tmp_path, [pair("b"), {"a": 1}], heldout=0, overwrite=True)

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare.Outputs, "move", killed)  # everything is written and nothing moved ...
    monkeypatch.setattr(prepare.shutil, "rmtree", lambda *_, **__: None)  # ... and nobody is left to clean up
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [pair("c")], heldout=0, overwrite=True)
    assert (tmp_path / "out/.partial/pairs.jsonl").exists()
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").glob("[!.]*")} == before
    monkeypatch.undo()
    _, rows = run(tmp_path, [{"text": "d"}], heldout=0, overwrite=True)
    assert set(rows) == {"text"} and not (tmp_path / "out/.partial").exists()


def test_command_line(tmp_path):
    source = write_rows(tmp_path / "in.jsonl", [pair(f"q {i}") for i in range(50)])
    command = [sys.executable, prepare.__file__, "--data", source, "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "pairs: 50 rows read, 50 kept" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True)
    assert (
        again.returncode == 1
        and again.stderr.count("\n") == 1
        and again.stderr.startswith("error: ")
        and "Traceback" not in again.stderr
    )


def test_help_shows_the_docstring():
    done = subprocess.run([sys.executable, prepare.__file__, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "python prepare.py --data hub:" in done.stdout and "Alpaca" in done.stdout
    assert subprocess.run([sys.executable, prepare.__file__], capture_output=True).returncode == 2  # no --data


# ---- what rows mean, and what becomes of few of them


@pytest.mark.parametrize(
    "turns, by",
    [
        (("Be kind.", "Yes.", "question {}"), "by its first two human turns"),
        (("Be {}.", "Yes.", "and so on"), None),
        (("Be kind.", "Yes.", "go on", "Yes {}.", "go on"), "by its whole prompt"),
        (("Be kind.",), "by its whole row"),
    ],
)
def test_rows_that_begin_alike_are_split_by_what_differs(tmp_path, capsys, turns, by):
    """As many as asked for; several cuts of one dialogue stay together as long as two turns tell dialogues apart."""
    fill = lambda i: [turn.format(i) for turn in turns]
    rows = [{"prompt": talk(*fill(i // 2)), "completion": [assistant(f"answer {i}")]} for i in range(400)]
    _, written = run(tmp_path, rows, heldout=0.25)
    out = capsys.readouterr().out
    assert 50 < len(written["demos-heldout"]) < 150 and (by in out if by else "second pass" not in out)
    if len(turns) > 1:
        sides = [{json.dumps(row["prompt"]) for row in written[name]} for name in ("demos", "demos-heldout")]
        assert not sides[0] & sides[1]


@pytest.mark.parametrize("seed", range(8))
def test_few_rows_hold_out_one_prompt_where_there_are_four(tmp_path, capsys, seed):
    for n in (1, 3, 4, 10, 20):
        _, written = run(tmp_path, [pair(f"question {i}") for i in range(n)], seed=seed, overwrite=True)
        held = len(written.get("pairs-heldout", []))
        assert 1 <= held <= max(n / 4, 1) if n >= 4 else held == 0
        assert len(written["pairs"]) == n - held
        assert ("no row was held out: too few prompts differ" in capsys.readouterr().out) == (n < 4)


@pytest.mark.parametrize(
    "row, kind, want",
    [
        ({"conversations": TURN + [{"from": "gpt", "value": "a"}], "label": False}, "thumbs", {"label": False}),
        ({"instruction": "q", "output": "a", "label": False}, "thumbs", {"label": False}),
        ({"instruction": "q", "output": "a", "label": "sums"}, "demos", {}),
        ({"prompt": "q", "output": "a"}, "demos", {"prompt": "q", "completion": "a"}),
        ({"prompt": "q", "completion": "a", "response": "other"}, "demos", {"prompt": "q", "completion": "a"}),
        ({"problem": "q", "solution": "a", "answer": "4"}, "demos", {"answer": "4"}),
        ({"question": "q", "response": "a", "answer": "4", "system_prompt": "s"}, "demos", {"answer": "4"}),
        ({"instruction": "q", "context": "c", "response": "a"}, "demos", {}),
        ({"prompt": "q", "chosen": "x", "rejected": "a", "label_p": 0.1}, "pairs", {"label_p": 0.1}),
    ],
)
def test_keys_that_change_what_a_row_means_are_read(tmp_path, row, kind, want):
    report, written = run(tmp_path, [row], heldout=0)
    found = written[kind][0]
    assert report["kind"] == kind and {name: found.get(name) for name in want} == want
    asked = [
        *([{"role": "system", "content": "s"}] if "system_prompt" in row else []),
        user("q\n\nc" if "context" in row else "q"),
    ]
    assert found["prompt"] == ("q" if "prompt" in row else asked)
    if kind != "thumbs":  # the better answer is the one to show
        assert prepare.flat(written["demos"][0]["completion"]) == "a"
    assert set(report["keys_not_read"]) == {"label"} & {x for x in row if kind == "demos"} | {"response"} & (
        row.keys() if "completion" in row else set()
    )


def test_what_weighs_nothing_teaches_nothing(tmp_path):
    report, written = run(tmp_path, [pair("a", weight=0), pair("b")], heldout=0)
    assert counts(report) == {"weight 0": 1} and len(written["pairs"]) == len(written["demos"]) == 1


def test_no_row_becomes_one_of_another_kind_unasked(tmp_path):
    prompts = [{"prompt": f"q {i}"} for i in range(25)]
    demos = [row | {"completion": "a"} for row in prompts]
    for rows, more, message in ((prompts, demos[0], "demos, not prompts"), (demos, pair("x"), "pairs, not demos")):
        with pytest.raises(gpt.BadRow, match=f"in0.jsonl:26: this row holds {message}: --kind says"):
            run(tmp_path, [*rows, more], heldout=0, overwrite=True)
        _, written = run(tmp_path, [*rows, more], heldout=0, kind=message.split(", not ")[1], overwrite=True)
        assert "pairs" not in written


def test_keys_of_messages_are_named_and_their_indents_stay(tmp_path):
    answer = assistant("    return x") | {"name": "bob", "weight": 1, "tool_calls": None}
    report, written = run(tmp_path, [{"messages": [user("write"), answer]}], heldout=0)
    assert report["keys_not_read"] == {"messages.name": 1}
    assert written["demos"][0]["messages"][1] == assistant("    return x")


def test_odd_values_are_bad_rows_or_kept(tmp_path):
    """What had ended in a traceback, or without file and line."""
    report, _ = run(tmp_path, [pair("a", id=[1, 2])] * 2, heldout=0)
    assert counts(report) == {"exact duplicate": 1}
    thumb = {"prompt": "q", "completion": "a", "label": True}
    report, _ = run(tmp_path, [thumb | {"label": False}, thumb], heldout=0, out="thumbs")
    assert counts(report, "noted") == {"contradicts an earlier thumb": 1}
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    for source, message in (
        (str(tmp_path / "deep.jsonl"), "deep.jsonl:1: JSON that is nested too deep"),
        ([{"instruction": "q", "output": "a", "history": [["x"]]}], "in0.jsonl:1: a value is not of the type"),
        ([{"messages": [user("q"), assistant("a") | {"train": False}]}], "in0.jsonl:1: a message has weight False"),
        ([{"instruction": "q", "output": "a", "label": "bad"}], "in0.jsonl:1: `label` is 'bad': of a thumb"),
        (
            [{"conversations": [*TURN, {"from": "gpt", "value": "a"}], "label": 0}],
            "in0.jsonl:1: `label` is 0: of a thumb",
        ),
        ([{"prompt": "q", "completion": "a", "audio": "x.wav"}], "in0.jsonl:1: `audio`"),
    ):
        with pytest.raises(gpt.BadRow, match=message):
            run(tmp_path, source, heldout=0, out="bad")
    with pytest.raises(gpt.BadRow, match="`label_p` says that the label may be wrong"):
        run(tmp_path, [pair("a", label_p=0.1)], heldout=0, kind="thumbs", out="bad")
    lines = ["{"] * 30 + [json.dumps(thumb)]
    (tmp_path / "late.jsonl").write_text("\n".join(lines))
    report, _ = run(tmp_path, str(tmp_path / "late.jsonl"), heldout=0, skip_bad_rows=True, out="late")
    assert report["kind"] == "thumbs" and counts(report) == {"bad row": 30}


# ---- real files


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA names a folder of real files")
def test_hh_rlhf(tmp_path):
    files = sorted(map(str, Path(os.environ["REAL_DATA"]).glob("preference/hh-rlhf/*/test.jsonl.gz")))
    report, rows = run(tmp_path, *files)
    assert sum(report["read"].values()) == 5803
    assert counts(report) == {"a further turn within an answer": 16, "empty": 11, "equal sides": 4}
    sides = [{prepare.first_turn(row) for row in rows[name]} for name in ("pairs", "pairs-heldout")]
    assert not sides[0] & sides[1] and len(rows["pairs"]) + len(rows["pairs-heldout"]) == 5772
    assert all(row["prompt"].endswith("\n\nAssistant:") and row["chosen"][0] == " " for row in rows["pairs"])
    report, chat = run(tmp_path, *files, out="chat", chat=True)
    assert counts(report) == {"a further turn within an answer": 16, "empty": 11, "equal sides": 4, "an empty turn": 1}
    for row in chat["pairs"]:
        roles = [message["role"] for message in row["prompt"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
