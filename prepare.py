"""Raw preference data, demonstrations or text -> clean rows in data/NAME, split by prompt; every drop is reported.

    python prepare.py --data hh-rlhf/*/train.jsonl.gz --out data/hh          # then sft.py, reward.py, ppo.py, dpo.py
    python prepare.py --data hh-rlhf/*/train.jsonl.gz --chat --out data/hh   # as messages: for a chat model's template
    python prepare.py --data hub:Anthropic/hh-rlhf --heldout-data hub:Anthropic/hh-rlhf/test --out data/hh
    python prepare.py --data helpful.jsonl:0.7 votes.jsonl:0.3 --limit 100000 --out data/mix
    python prepare.py --data TinyStories.txt.gz --out data/stories           # documents between <|endoftext|>
    python prepare.py --data reviews.txt --separator '\\n' --out data/reviews # a document a line
    python prepare.py --data feedback.db --out data/votes                    # what people voted at serve.py

Written: pairs become pairs.jsonl, prompts.jsonl and demos.jsonl (prompt + chosen); demonstrations demos and prompts;
thumbs thumbs and prompts; text text.jsonl (so do transcripts, by --kind text). Each has its NAME-heldout.jsonl, and
report.json counts what was read, kept, dropped and repaired, and the keys that were not read. Empty files are left out.
Rows of prompts alone keep their other keys, which a reward function may want to see.

Read: .jsonl, .json (also one big array) and plain text, each also as .gz; hub:ORG/NAME[/SPLIT[/CONFIG]]; and .db, the
votes of serve.py: pairs and thumbs as its view `training_rows` gives them (one of the two by --kind). Rows have the
project's formats (gpt.KINDS) or these:
    {chosen, rejected}, HH-RLHF                        pairs; the prompt is the start that both sides share
    {prompt, completion, rating}, several a prompt     pairs of every two unlike ratings, margin = their difference; so
                                                       HelpSteer's helpfulness
    {prompt, chosen, rejected, score_chosen, score_rejected}, UltraFeedback's   pairs, margin = the difference; so
                                                       chosen_rating, rejected_rating and the like
    {prompt, chosen: [text], rejected: [text, ...]}, RewardBench 2's            pairs, each of one side with each other
    {conversations: [{from, value}], chosen, rejected}, ShareGPT                pairs; without the sides: demos; so
                                                       WildChat's conversation
    {messages, label}                                  thumbs on the last message
    {instruction, input, output}, Alpaca; {input, output}   demos, as messages
    {question, answer}, GSM8K                          demos, as messages; what follows #### also as `answer`
    {turns: [...]}, MT-bench; {messages} unanswered    prompts: the first turn, or the messages
In each of them, `response`, `output` and `solution` answer a prompt, an instruction, a question or a problem as
`completion` does; a question or an instruction, with its `input` or `context`, may stand beside chosen and rejected;
`system`, `system_prompt` and `history` open the prompt; `kto_tag`, or a `label` that is true or false, makes a thumb of
a demonstration (a class, such as "math", is not read); a conversation whose assistant turns but the last have weight 0
(or `train` or `loss` false, or `masked`) teaches the last. Refused by line: tools, images, other roles and weights, and
an answer under another name where it would leave a prompt alone. Keys that are not read, of messages too, are counted.

Split. A row is held out when a hash of (seed, its FIRST human turn in lower case with single blanks) falls below
--heldout. Data sets of dialogues hold several cuts of one dialogue; all of them open with the same turn, so they stay
together. Where that holds out nothing, or far more than asked, a second pass over the data takes one prompt at least,
or goes by two turns, the whole prompt or the whole row, and says so. With --heldout-data the files decide, and training
rows whose first turn occurs in those files are dropped.

Mixing. Sources with weights are read in turn, so that at every point the rows kept so far have the given proportions;
the mixture ends where the first source ends. Sources without weights are read one after the other.

Memory. Rows stream. What stays is a 64-bit key of each row, prompt and demonstration against exact duplicates: up to 64
bytes a pair (96 while the table doubles). --near-duplicates remembers the last 131,072 rows in 50 MB, ratings wait for
others among the last 4,096 prompts, and a text document without a separator is cut after a million characters.
"""

import gzip
import hashlib
import itertools
import json
import os
import re
import shutil
import sqlite3
import unicodedata
import zlib
from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import gpt


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...]  # files or hub:ORG/NAME[/SPLIT], each with an optional weight (a.jsonl:0.7 b.jsonl:0.3)
    out: Path  # folder of the clean rows
    heldout_data: tuple[str, ...] = ()  # files whose rows are the held-out rows, instead of a share of --data
    heldout: float = 0.05  # share of prompts that is held out
    seed: int = 0  # of the split
    kind: Literal["auto", "text", "demos", "pairs", "thumbs", "prompts"] = "auto"  # auto: what the first row's keys say
    separator: str | None = None  # between plain text documents; else <|endoftext|> if the file has it, or a blank line
    limit: int | None = None  # stop after this many kept rows

    max_words: int | None = 2000  # drop rows whose prompt + answer are longer (documents of text may have any length)
    truncate_words: int | None = None  # drop pairs whose sides agree in their first so many words, prompt included
    chat: bool = False  # make messages of transcripts (HH-RLHF) and plain texts, for a model with a chat template
    clean: bool = True  # take control characters, odd blanks and blanks at the ends of lines out of the texts
    near_duplicates: bool = False  # drop rows whose 3-word shingles are 80% those of an earlier row
    skip_bad_rows: bool = False  # count rows that cannot be read instead of stopping at the first
    overwrite: bool = False  # replace the files of an earlier run


class Dropped(Exception):
    """A readable row that training should not see; the message is the reason it is counted under."""


# ------------------------------------------------------------------------------------------------------------- reading

UNREADABLE = {".csv", ".tsv", ".parquet", ".arrow", ".zip", ".xlsx", ".zst"}
DOCUMENT_LIMIT = 1_000_000  # characters of one plain-text document


def read_source(name: str, separator: str | None = None):
    """Yield ("file:line", raw row) of a file or a Hub data set."""
    if name.startswith("hub:"):
        yield from read_hub(name)
        return
    path = Path(name)
    if is_votes(name):
        yield from read_votes(path)
        return
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in UNREADABLE:
        raise ValueError(f"{name}: unknown format {suffix} (known: JSON lines, a JSON array, plain text, hub:ORG/NAME)")
    if not path.is_file():
        raise FileNotFoundError(f"no file {name}" + (" (a folder)" if path.is_dir() else ""))
    try:
        with gpt.open_text(path) as file:
            if suffix not in (".json", ".jsonl", ".ndjson"):
                yield from read_documents(file, name, separator)
            elif file.read(64).lstrip("\ufeff \t\n").startswith("["):
                file.seek(0)
                yield from read_array(file, name)
            else:
                file.seek(0)
                lines = enumerate(file, 1)
                yield from ((f"{name}:{number}", line.lstrip("\ufeff")) for number, line in lines if line.strip())
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name}: not whole UTF-8 text ({error})") from None


def is_votes(name: str) -> bool:
    return Path(name).suffix == ".db"


def read_votes(path: Path):
    """What votes teach, or why they do not, oldest first: serve.py's view, which holds the rules."""
    if not path.is_file():
        raise FileNotFoundError(f"no votes in {path}: serve.py writes them there (--feedback)")
    query = "SELECT id, kind, dropped, row FROM training_rows ORDER BY created_at, id, number"
    with closing(sqlite3.connect(path, timeout=30)) as connection:
        try:
            for vote, kind, dropped, row in connection.execute(query):
                yield f"{path}:{vote}", {"kind": kind, "dropped": dropped, "row": row}
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"{path}: no votes can be read ({error}). To a database of an older version "
                f"`python serve.py --feedback {path}` adds what is missing when it starts"
            ) from None


def read_hub(name: str):
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{name} needs the `hub` extra: pip install datasets") from None
    organisation, dataset, split, config = (name.removeprefix("hub:").split("/") + ["", ""] * 2)[:4]
    options = dict(split=split or "train", streaming=True)
    try:
        rows = datasets.load_dataset(f"{organisation}/{dataset}", config or None, **options)
    except Exception as error:  # of many kinds: no network, no such set, a configuration to choose
        raise ValueError(f"cannot read {name}: {error}") from None
    yield from ((f"{name}:{number}", dict(row)) for number, row in enumerate(rows, 1))


def read_array(file, name: str):
    """The objects of one JSON array, a megabyte at a time."""
    decoder, buffer, line, opened = json.JSONDecoder(), "", 1, False
    while chunk := file.read(1 << 20):
        buffer, position = buffer + chunk, 0
        while True:
            start = re.compile(r"[\s,]*" if opened else r"[\s\ufeff]*\[\s*").match(buffer, position).end()
            line, position, opened = line + buffer.count("\n", position, start), start, True
            try:
                row, end = decoder.raw_decode(buffer, position)
            except ValueError:  # the rest of this object is in the next chunk, or it is broken
                break
            except RecursionError:
                raise gpt.BadRow(f"{name}:{line}: JSON that is nested too deep") from None
            yield f"{name}:{line}", row
            line, position = line + buffer.count("\n", position, end), end
        buffer = buffer[position:]
        if len(buffer) > 64 << 20:
            break
    if buffer.strip() != "]":
        raise gpt.BadRow(f"{name}:{line}: not JSON (the array breaks off in {buffer[:40]!r})")


def read_documents(file, name: str, separator: str | None):
    """Plain text: {text} rows between separators."""
    buffer, line = file.read(1 << 20), 1
    if separator is None and "<|endoftext|>" in buffer:
        separator = "<|endoftext|>"
    split = re.compile(re.escape(separator.replace("\\n", "\n")) if separator else r"\n[ \t]*\n")
    while buffer:
        chunk = file.read(1 << 20)
        position = 0
        for match in split.finditer(buffer):
            yield f"{name}:{line}", {"text": buffer[position : match.start()].strip()}
            line, position = line + buffer.count("\n", position, match.end()), match.end()
        buffer = buffer[position:]
        while len(buffer) > DOCUMENT_LIMIT or (buffer and not chunk):
            end = buffer.rfind("\n", 0, DOCUMENT_LIMIT) + 1 if len(buffer) > DOCUMENT_LIMIT else len(buffer)
            end = end or DOCUMENT_LIMIT
            yield f"{name}:{line}", {"text": buffer[:end].strip()}
            line, buffer = line + buffer.count("\n", 0, end), buffer[end:]
        buffer += chunk


# ---------------------------------------------------------------------------------------- other shapes to the formats

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # what opens the turns of a transcript
ROLES = dict.fromkeys(("user", "human", "prompter"), "user")
ROLES |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "model", "ai"), "assistant")
ROLES |= {"system": "system", "developer": "system"}
SAME = {"system_prompt": "system", "system_message": "system", "problem": "question", "query": "question"}
SAME |= {f"{x}{of}": f"score_{x}" for x in ("chosen", "rejected") for of in ("_score", "_rating", "-score", "-rating")}
SAME |= {"rating_chosen": "score_chosen", "rating_rejected": "score_rejected"}
SAME |= {"is_truncated": "truncated", "conversation": "conversations", "helpfulness": "rating"}
NOTHING = (*gpt.NOTHING, False)  # of what is asked for; the `kto_tag` that training refuses may be false
BESIDE = {"score_chosen": "score_rejected", "score_rejected": "score_chosen"}  # keys that are read together or not
REPLIES = ("response", "output", "solution")  # names of what answers a prompt, an instruction or a question
CARRIED = ("id", "source", "margin", "weight", "label_p", "truncated")  # what a row keeps beside its texts
# names of answers, in rows that would otherwise become prompts alone
AN_ANSWER = re.compile(
    r"(response|completion|output|repl(y|ie)|generation|candidate|answer)s?([ _-]?([a-d]|\d|left|right))?", re.I
)


class Shape(NamedTuple):
    """A shape that rows come in. What is neither in `keys` nor in `more` nor CARRIED is left out, and counted."""

    kind: str  # of the row that it becomes; "ratings" become pairs with others of their prompt
    keys: tuple[str, ...]  # a row has this shape if it has these keys
    more: tuple[str, ...] = ()  # keys that are read where they are there
    read: Callable[[dict], dict] | None = None  # row -> the project's keys; None where `keys` are those already


def spread(raw: str | dict) -> list:
    """A row with lists of answers, one chosen and several rejected, as a row for every pair of them; else [raw]."""
    row = gpt.parse_json(raw) if isinstance(raw, str) else raw
    sides = [row.get(name) for name in ("chosen", "rejected")] if isinstance(row, dict) else []
    many = [isinstance(side, list) and all(isinstance(text, str) for text in side) for side in sides]
    if not any(many):
        return [raw]
    if not all(sides):
        raise gpt.BadRow("`chosen` and `rejected` must both hold an answer")
    sides = [side if several else [side] for side, several in zip(sides, many)]
    return [row | {"chosen": chosen, "rejected": rejected} for chosen, rejected in itertools.product(*sides)]


def convert(raw: str | dict) -> tuple[str, dict, set[str]]:
    """A line or an object -> (kind, row in the project's format, keys left out); whatever is wrong comes as BadRow, in
    the row's own names."""
    row = gpt.parse_json(raw) if isinstance(raw, str) else raw
    if not isinstance(row, dict):
        raise gpt.BadRow(f"a {type(row).__name__}, not an object")
    row = {name: value for name, value in row.items() if value is not None}  # in tables, absent values are null
    empty = lambda name: SAME.get(name, name) in (*gpt.NOT_TEXT, "system", "history") and row[name] in NOTHING
    row = {name: value for name, value in row.items() if not empty(name)}
    known = known_names(row)
    theirs = {ours: name for name, ours in known.items()}
    try:
        kind, texts, unread = convert_known({known[name]: value for name, value in row.items()})
    except gpt.BadRow as error:
        raise gpt.BadRow(re.sub(r"`(\w+)`", lambda name: f"`{theirs.get(name[1], name[1])}`", str(error))) from None
    unread = {re.sub(r"^[^.]+", lambda name: theirs.get(name[0], name[0]), name) for name in unread}
    if kind == "prompts":  # a reward function may want to see what stands beside a prompt
        seen = take(row, *sorted(name for name in unread if not AN_ANSWER.fullmatch(name) and name not in TEXTS))
        seen = {name: value for name, value in seen.items() if is_json(value)}
        texts, unread = texts | seen, unread - seen.keys()
    return kind, texts, unread


def is_json(value) -> bool:
    """Tables also hold times, images and the like."""
    try:
        return bool(ENCODE(value))
    except (TypeError, ValueError):
        return False


def known_names(row: dict) -> dict[str, str]:
    """{key of the row: its name in SHAPES}: what answers is the completion of a prompt, the output of an instruction.
    No two keys get one name: the first has it, and the other keeps its own."""
    known = {}
    for name in row:
        ours = SAME.get(name, name)
        known[name] = name if ours != name and (ours in row or ours in known.values()) else ours
    theirs = {ours: name for name, ours in known.items()}

    def call(name: str, ours: str):
        if name in theirs and ours not in theirs:
            known[theirs[name]] = ours
            theirs[ours] = theirs.pop(name)

    asked = next((name for name in ("prompt", "instruction", "question") if name in theirs), None)
    reply = next((name for name in REPLIES if name in theirs), None)
    if asked is None and (reply or "chosen" in theirs):
        asked = "prompt" if isinstance(row.get("input"), list) else "instruction"
        call("input", asked)  # alone it is what is asked
    if asked in ("instruction", "question"):
        call("context", "input")
    if reply and "chosen" not in theirs:
        call(reply, "completion" if asked == "prompt" else "output")
        if asked == "question":
            call("question", "instruction")
    return known


def unanswered(messages: list[dict]) -> tuple[str, dict]:
    """A conversation that ends with a question, as (kind, texts): a prompt where nothing was answered before."""
    answered = any(message["role"] == "assistant" for message in messages)
    return ("demos", {"messages": messages}) if answered else ("prompts", {"prompt": messages})


def named(row: dict) -> str:
    return ", ".join(f"`{name}`" for name in row) or "(none)"


def convert_known(row: dict) -> tuple[str, dict, set[str]]:
    """`convert` of a row in known names."""
    refuse_keys(row)
    if row.get("train") is False:
        row = {"weight": 0} | {name: value for name, value in row.items() if name not in ("train", "weight")}
    if row.get("finish_reason") == "length":  # of an answer that its server cut
        row = {"truncated": True} | {name: value for name, value in row.items() if name != "finish_reason"}
    if not isinstance(row.get("truncated", True), bool | list):
        raise gpt.BadRow(f"`truncated` is {row['truncated']!r}: true, false, or a list of the answers that were cut")
    unread = {name for name, other in BESIDE.items() if name in row and other not in row}
    unread |= {"label"} if isinstance(row.get("label"), str) and not is_thumb(row["label"]) else set()
    row = {name: value for name, value in row.items() if name not in unread}
    if ("chosen" in row) != ("rejected" in row):
        raise gpt.BadRow(f"`chosen` and `rejected` must both be there (found: {named(row)})")
    shape = next((shape for shape in SHAPES if row.keys() >= set(shape.keys)), None)
    if shape is None:
        known = ", ".join("{" + ", ".join(shape.keys) + "}" for shape in reversed(SHAPES))
        raise gpt.BadRow(f"unknown format, with the keys {named(row)}; known are {known}")
    if shape.kind == "text" and "role" in row:
        raise gpt.BadRow("`text` with a `role` is one message of a talk: write the talk, {messages: [{role, content}]}")
    try:
        texts = shape.read(row) if shape.read else take(row, *shape.keys)
        kind, texts, around = surround(shape.kind, row, texts)
    except gpt.BadRow:
        raise
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        raise gpt.BadRow(f"a value is not of the type that its format has ({error!r})") from None
    if kind == "demos" and {m["role"] for m in texts.get("messages", [])[-1:]} == {"user"}:
        kind, texts = unanswered(texts["messages"])
    for name in TEXTS:
        if not isinstance(texts.get(name, ""), str | list):
            raise gpt.BadRow(f"`{name}` is {type(texts[name]).__name__}, not text or messages")
    carried = ("source",) if shape.kind == "text" else CARRIED
    unread |= row.keys() - {*shape.keys, *shape.more, *carried, *around}
    return kind, take(row, *carried) | texts, unread | message_keys(take(row, *shape.keys, *shape.more))


def message_keys(values: dict) -> set[str]:
    """Keys of messages that say something and are not read, as NAME.KEY."""
    lists = {name: [value] if isinstance(value, dict) else value for name, value in values.items()}
    messages = [(name, m) for name, value in lists.items() if isinstance(value, list) for m in value]
    keys = {(name, key) for name, m in messages if isinstance(m, dict) for key in m if m[key] is not None}
    read = ("role", "from", "content", "value", *gpt.LEARNED, *gpt.UNLEARNED)
    return {f"{name}.{key}" for name, key in keys if key not in read}


def refuse_keys(row: dict):
    found = [name for name in gpt.NOT_TEXT if row.get(name) not in NOTHING]
    if found:
        raise gpt.BadRow(f"`{found[0]}` is not supported, and the row means something else without it")


def refuse_answers(unread: set[str]):
    """Raise BadRow where a row of prompts has answers that no shape reads, such as `response_a`."""
    if answers := sorted(filter(AN_ANSWER.fullmatch, unread)):
        raise gpt.BadRow(
            f"`{answers[0]}` reads like an answer, and no known format has it: write {{prompt, chosen, rejected}} or "
            "{prompt, completion}; --kind prompts takes the prompts alone"
        )


def surround(kind: str, row: dict, texts: dict) -> tuple[str, dict, set[str]]:
    """What stands beside the turns in any shape: `system` and `history` open the prompt, `kto_tag` makes a thumb of a
    demonstration. Returns (kind, texts, keys that were read)."""
    earlier = [{"role": "system", "content": text_at(row, "system")}] if "system" in row else []
    for turn in row.get("history", ()):
        earlier += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    if earlier and kind != "text":
        texts = add_earlier(texts, to_messages(earlier))
    tag = "label" if kind == "demos" and is_thumb(row.get("label")) else "kto_tag"
    if tag in row:
        if kind != "demos":
            raise gpt.BadRow(f"`{tag}` is {row[tag]!r} on a row of {kind}: it is true or false, and on demos alone")
        thumb(row, tag)
        if "messages" in texts:
            texts = {"prompt": texts["messages"][:-1], "completion": texts["messages"][-1:]}
        kind, texts = "thumbs", texts | {"label": row[tag]}
    return kind, texts, {tag} | ({"system", "history"} if kind != "text" else set())


def thumb(row: dict, name: str) -> bool:
    if not isinstance(row[name], bool):
        raise gpt.BadRow(
            f"`{name}` is {row[name]!r}: of a thumb it is true (a good answer) or false (a bad one); if it says "
            "something else, name it otherwise"
        )
    return row[name]


def add_earlier(texts: dict, earlier: list[dict]) -> dict:
    """The texts of a row with messages in front: a plain prompt and its answers become messages."""
    name = "messages" if "messages" in texts else "prompt"
    if isinstance(texts[name], str):
        if HUMAN in texts[name] or any(m["role"] != "system" for m in earlier):
            raise gpt.BadRow("`system` and `history` stand beside a plain transcript: put them into its prompt")
        answers = {
            x: [{"role": "assistant", "content": texts[x].strip()}] for x in ANSWERS if isinstance(texts.get(x), str)
        }
        texts = texts | answers | {name: [{"role": "user", "content": texts[name]}]}
    if earlier[0]["role"] == texts[name][0]["role"] == "system":
        raise gpt.BadRow("the row has a `system` key and a system message: which one holds?")
    return texts | {name: earlier + texts[name]}


def take(row: dict, *names: str) -> dict:
    return {name: row[name] for name in names if name in row}


def text_at(row: dict, name: str) -> str:
    if not isinstance(row[name], str):
        raise gpt.BadRow(f"`{name}` is {type(row[name]).__name__}, not text")
    return row[name]


def number(row: dict, name: str) -> float:
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
        raise gpt.BadRow(f"`{name}` is {value!r}, not a number")
    return value


def message_list(value) -> list[dict]:
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise gpt.BadRow(f"{str(value)[:60]!r} is not a list of messages")
    return messages


def to_messages(value) -> list[dict]:
    """{role, content} messages from those or from ShareGPT's {from, value}, also from a single one."""
    given = message_list(value)
    for message in given:
        refuse_keys(message)
        check_learned(message)
    messages = [(m.get("role", m.get("from")), text_of(m.get("content", m.get("value")))) for m in given]
    if wrong := [i for i, message in enumerate(messages) if not all(isinstance(part, str) for part in message)]:
        raise gpt.BadRow(f"a message needs a role and a content that are text (found: {named(given[wrong[0]])})")
    unknown = next((role for role, _ in messages if role.lower() not in ROLES), None)
    if unknown is not None:
        raise gpt.BadRow(f"a message of role {unknown!r}; known are {', '.join(ROLES)}")
    return [{"role": ROLES[role.lower()], "content": content} for role, content in messages]


def role_of(message: dict) -> str | None:
    return ROLES.get(str(message.get("role", message.get("from"))).lower())


def turn_weight(message: dict):
    """How much a message says that it is learned, 0 (false) to 1 (true); None where it says nothing. BadRow for `mask`,
    which may mean one or the other."""
    said = {name: message[name] for name in (*gpt.LEARNED, *gpt.UNLEARNED) if message.get(name) is not None}
    if unclear := said.keys() & {"mask", "loss_mask"}:
        raise gpt.BadRow(f"a message has `{min(unclear)}`, which may mean learned or not: write `train`, true or false")
    weights = [not value if name == "masked" else value for name, value in said.items()]
    return next((weight for weight in weights if weight != 1), 1 if weights else None)


def is_thumb(label) -> bool:
    """Whether a `label` beside an answer says that it is good or bad, and is no class of another kind."""
    words = ("good", "bad", "yes", "no", "true", "false", "up", "down", "accepted", "rejected", "chosen", "positive")
    words += ("negative", "desirable", "undesirable", "correct", "incorrect", "like", "dislike", "0", "1")
    return label.lower() in words if isinstance(label, str) else label in (0, 1)


def text_of(content):
    """The content of a message; the texts of one that comes in parts, {"type": "text", "text": ...}, joined."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    other = next((part.get("type") for part in content if not isinstance(part.get("text"), str)), None)
    if other is not None:
        raise gpt.BadRow(f"a message has a part of type {other!r}; only text is read")
    return "".join(part["text"] for part in content)


def check_learned(message: dict):
    """Raise BadRow where a message says that an assistant's turn is not learned, or that a person's is."""
    weight, assistant = turn_weight(message), role_of(message) == "assistant"
    if weight is not None and assistant and weight != 1:
        raise gpt.BadRow(
            f"a message has weight {weight!r}: every assistant turn of a conversation is learned. Only where all but "
            "the last have weight 0 (or `train`, `loss`: false), the row becomes {prompt, completion}"
        )
    if not assistant and any(message.get(name) is True for name in gpt.LEARNED):
        raise gpt.BadRow("a message that is not the assistant's is to be learned, and only the assistant's turns are")


def read_messages(name: str) -> Callable[[dict], dict]:
    """A reader of conversations under `name`. With weight 0 on all assistant turns but the last, that one is the
    completion; with no weights, all of them are learned."""

    def read(row: dict) -> dict:
        turns = message_list(row[name])
        weights = [turn_weight(m) for m in turns if role_of(m) == "assistant"]
        if weights[-1:] not in ([1], [None]) or len(weights) < 2 or any(weight != 0 for weight in weights[:-1]):
            return {"messages": to_messages(turns)}
        messages = to_messages(
            [{x: value for x, value in m.items() if x not in (*gpt.LEARNED, *gpt.UNLEARNED)} for m in turns]
        )
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    return read


def read_pair(row: dict) -> dict:
    chosen, rejected = (
        side if isinstance(side, str) else to_messages(side) for side in (row["chosen"], row["rejected"])
    )
    prompt = row.get("prompt", row.get("conversations"))
    asked = next((name for name in ("question", "instruction") if name in row), None)
    if prompt is None and asked:
        prompt = join_input(asked, row)
        if isinstance(chosen, str) and isinstance(rejected, str):
            prompt = [{"role": "user", "content": prompt}]
            chosen, rejected = ([{"role": "assistant", "content": side.strip()}] for side in (chosen, rejected))
    if prompt is not None and not isinstance(prompt, str):
        prompt = to_messages(prompt)
    if isinstance(prompt, str) and isinstance(chosen, list):  # one message answers it, several begin with it
        prompt = [{"role": "user", "content": prompt}] if len(chosen) == 1 else None
    if prompt is None:
        prompt, chosen, rejected = split_shared(chosen, rejected)
    pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if "score_chosen" not in row or "score_rejected" not in row:
        return pair
    margin = round(number(row, "score_chosen") - number(row, "score_rejected"), 6)
    if margin < 0:
        raise Dropped("rated the other way round")
    return pair | {"margin": margin}


def split_shared(chosen, rejected) -> tuple:
    """Two whole dialogues -> (prompt, chosen, rejected): the prompt is what both share, up to the last `Assistant:` of
    a transcript, or the last message, that they have in common."""
    if type(chosen) is not type(rejected):
        raise gpt.BadRow("one of `chosen` and `rejected` is text, the other messages, and there is no `prompt`")
    if not chosen or not rejected:
        raise Dropped("empty")
    if isinstance(chosen, str):
        start = chosen.rfind(ASSISTANT)
        while start >= 0 and not rejected.startswith(chosen[: start + len(ASSISTANT)]):
            start = chosen.rfind(ASSISTANT, 0, start)
        cut = start + len(ASSISTANT) if start >= 0 else 0
    else:
        shared = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected)))
        cut = min(shared, len(chosen) - 1, len(rejected) - 1)  # an answer is left on both sides
    if cut == 0:
        raise Dropped("no prompt that both sides share")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def read_rating(row: dict) -> dict:
    texts = take(row, "prompt", "completion")
    texts = {name: text if isinstance(text, str) else to_messages(text) for name, text in texts.items()}
    return texts | {"rating": number(row, "rating")}


def read_labelled_messages(row: dict) -> dict:
    messages = to_messages(row["messages"])
    return {"prompt": messages[:-1], "completion": messages[-1:], "label": thumb(row, "label")}


def read_thumb(row: dict) -> dict:
    return take(row, "prompt", "completion") | {"label": thumb(row, "label")}


def read_instruction(row: dict) -> dict:
    """`answer` beside the output is the short one, which a reward function may want to see."""
    return exchange(join_input("instruction", row), text_at(row, "output")) | take(row, "answer")


def read_question(row: dict) -> dict:
    _, marker, answer = text_at(row, "answer").rpartition("####")
    return exchange(join_input("question", row), row["answer"]) | ({"answer": answer.strip()} if marker else {})


def join_input(asked: str, row: dict) -> str:
    return "\n\n".join(filter(None, (text_at(row, name) for name in (asked, "input") if name in row)))


def exchange(question: str, answer: str) -> dict:
    user, assistant = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
    return {"prompt": [user], "completion": [assistant]}


SHAPES = (  # a row has the first of them that fits
    *(Shape("pairs", (asked, "chosen", "rejected"), tuple(BESIDE), read_pair) for asked in ("prompt", "conversations")),
    *(
        Shape("pairs", (asked, "chosen", "rejected"), ("input", *BESIDE), read_pair)
        for asked in ("question", "instruction")
    ),
    Shape("pairs", ("chosen", "rejected"), tuple(BESIDE), read_pair),
    Shape("ratings", ("prompt", "completion", "rating"), read=read_rating),
    Shape("thumbs", ("messages", "label"), read=read_labelled_messages),
    Shape("thumbs", ("prompt", "completion", "label"), read=read_thumb),
    Shape("demos", ("prompt", "completion")),
    Shape("demos", ("messages",), read=read_messages("messages")),
    Shape("demos", ("conversations",), read=read_messages("conversations")),
    Shape("demos", ("instruction", "output"), ("input", "answer"), read_instruction),
    Shape("demos", ("question", "answer"), ("input",), read_question),
    Shape("prompts", ("prompt",), ("answer", "rubric"), lambda row: take(row, "prompt", "answer", "rubric")),
    Shape("prompts", ("turns",), read=lambda row: {"prompt": [{"role": "user", "content": row["turns"][0]}]}),
    Shape("text", ("text",)),
)


def convert_vote(vote: dict, kind: str) -> list[dict]:
    """The row of a vote: of its own kind among votes, else of the kind that is wanted."""
    if vote["dropped"]:
        raise Dropped(vote["dropped"])
    if (vote["kind"], kind) == ("thumbs", "pairs"):
        raise Dropped("a thumb, not a pair")
    row = json.loads(vote["row"])
    return [row] if kind == "votes" else as_kind(vote["kind"], row, kind)


def row_kind(row: dict, kind: str) -> str:
    """Votes are pairs or thumbs, each row for itself."""
    return kind if kind != "votes" else "pairs" if "chosen" in row else "thumbs"


def as_kind(found: str, row: dict, kind: str) -> list[dict]:
    """A row of the kind `found` as rows of the kind that is wanted: two where thumbs are made of a pair."""
    if found == kind or (found, kind) == ("ratings", "pairs"):
        return [row]
    if kind == "prompts" and found != "text":
        return [prompt_row(row)]
    if (found, kind) == ("pairs", "demos"):
        return [demo_row(row)]
    if (found, kind) == ("pairs", "thumbs"):
        if row["chosen"] == row["rejected"]:
            raise Dropped("equal sides")
        if row.get("label_p", 1) != 1:
            raise gpt.BadRow("`label_p` says that the label may be wrong, and a thumb cannot say it")
        return gpt.split_pair(take(row, "prompt", "chosen", "rejected", "id", "source", "weight", "truncated"))
    if kind == "text" and found in ("pairs", "demos"):
        return [transcript(demo_row(row) if found == "pairs" else row)]
    raise gpt.BadRow(f"this row holds {found}, not {kind}")


def prompt_row(row: dict) -> dict:
    """What a policy can be asked: of a conversation, all that stands before its last answer."""
    if "messages" in row:
        last = max((i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"), default=None)
        row = row | {"prompt": row["messages"][:last]}
    return take(row, "prompt", "answer", "rubric", "id", "source")


def demo_row(row: dict) -> dict:
    better = "rejected" if row.get("label_p", 1) < 0.5 else "chosen"
    return {"prompt": row["prompt"]} | gpt.completion_of(row, better) | take(row, "id", "source")


def transcript(row: dict) -> dict:
    """A dialogue as one text, to pretrain on. Its split goes by its first human turn, as that of the dialogue does."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) or not isinstance(completion, str) or HUMAN not in prompt:
        transcripts = "transcripts (\\n\\nHuman: ... \\n\\nAssistant: ...)"
        raise gpt.BadRow(f"only {transcripts} become text; sft.py reads other rows as they are")
    return {"text": prompt + completion} | take(row, "id", "source")


RATING_WINDOW = 4096  # prompts whose ratings are held until others of the same prompt come


def pair_ratings(rows, report):
    """Rated answers -> a pair of every two answers to one prompt whose ratings differ; other rows pass through."""
    groups: dict[int, list] = {}
    for where, row in rows:
        if "rating" not in row:
            yield where, row
            continue
        groups.setdefault(key_of(flat(row["prompt"])), []).append((where, row))
        if len(groups) > RATING_WINDOW:
            yield from pairs_of(groups.pop(next(iter(groups))), report)
    for group in groups.values():
        yield from pairs_of(group, report)


def pairs_of(group: list, report):
    if len(group) == 1:
        report.count("dropped", "one rating for its prompt", *group[0])
    for (where, first), (_, second) in itertools.combinations(group, 2):
        if first["rating"] == second["rating"]:
            report.count("dropped", "equal ratings", where, second)
            continue
        low, high = sorted((first, second), key=lambda row: row["rating"])
        margin = {"margin": round(high["rating"] - low["rating"], 6)}
        sides = {"chosen": high["completion"], "rejected": low["completion"]}
        yield where, take(high, "prompt", "id", "source", "weight") | sides | margin


# ------------------------------------------------------------------------------------------------------------ cleaning

ANSWERS = ("chosen", "rejected", "completion")
TEXTS = ("prompt", *ANSWERS, "messages", "text")  # the keys of a row that hold text or messages
# Removed: controls, blanks of no width, direction marks, byte-order marks, lone surrogates, invisible tags. The two
# joiners U+200C and U+200D stay: Persian and Indic words and composed emoji are spelt with them. So do the tags that
# follow a black flag (group 1): they spell which flag it is.
INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0020-\U000e007e]+\U000e007f)|[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f"
    "\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
MARKERS = re.compile(
    r"<\|(?:im_start|im_end|start_header_id|eot_id|user|assistant|system)\|>|\[/?INST\]|<start_of_turn>"
)
LINE_BREAKS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
BLANKS = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f]")
TRAILING = re.compile(r"[ \t]+(?=\n)")


def clean_text(text: str, repairs: set, keep_end: bool = False) -> str:
    """The text without what nobody can see; `keep_end`: the blanks and line breaks at its end stay."""
    before = text
    if not text.replace("\n", " ").replace("\t", " ").isprintable():  # a fast way to see that there is nothing to do
        text = INVISIBLE.sub(lambda m: m[1] or "", BLANKS.sub(" ", LINE_BREAKS.sub("\n", text)))
        if text != before:
            repairs.add("control characters and odd blanks")
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        repairs.add("Unicode not in NFC")
    before, body = text, text.rstrip()
    end = text[len(body) :] if keep_end else ""
    if " \n" in body or "\t\n" in body:
        body = TRAILING.sub("", body)
    text = body + end
    if len(text) != len(before):
        repairs.add("blanks at the end of lines")
    return text


def clean_value(value, name: str, repairs: set):
    if isinstance(value, str):
        text = clean_text(value, repairs, keep_end=name == "prompt")  # the answer continues a prompt as it ends
        return text.lstrip("\n") if name == "text" else text
    if isinstance(value, list):
        return [m | {"content": clean_text(m["content"], repairs)} for m in to_messages(value)]
    raise gpt.BadRow(f"`{name}` is {type(value).__name__}, not text or messages")


def clean_row(row: dict, repairs: set) -> dict:
    """The row with clean texts. Answers of a transcript keep the one blank that follows `Assistant:`."""
    clean = row | {name: clean_value(row[name], name, repairs) for name in TEXTS if name in row}
    clean |= {name: clean_text(row[name], set()) for name in ("id", "source") if isinstance(row.get(name), str)}
    if isinstance(clean.get("prompt"), str) and clean["prompt"].rstrip().endswith(ASSISTANT):
        seam = {name: " " + clean[name].strip() for name in ANSWERS if isinstance(clean.get(name), str)}
        seam["prompt"] = clean["prompt"].rstrip()
        if any(clean[name] != text for name, text in seam.items()):
            repairs.add("not one blank after Assistant:")
        clean |= seam
    return clean


TURN = re.compile(f"{re.escape(HUMAN)}|{re.escape(ASSISTANT)}")


def read_turns(transcript: str, repairs: set) -> list[dict]:
    """The messages of a transcript; one that nobody opens is what a user says. Two turns of one speaker in a row become
    one, since many templates want the speakers in turn."""
    if not TURN.search(transcript):
        return [{"role": "user", "content": transcript.strip()}]
    before, *said = TURN.split(transcript)
    if before.strip():
        raise Dropped("text before the first turn")
    messages = []
    for opening, text in zip(TURN.findall(transcript), map(str.strip, said), strict=True):
        role = "user" if opening == HUMAN else "assistant"
        if not text:
            raise Dropped("an empty turn")
        if messages and messages[-1]["role"] == role:
            repairs.add("two turns of one speaker joined")
            messages[-1]["content"] += "\n\n" + text
        else:
            messages.append({"role": role, "content": text})
    return messages


def to_chat(row: dict, repairs: set) -> dict:
    """The row with messages where it has texts; its answers become the assistant's turn that follows the prompt."""
    if "text" in row:
        raise gpt.BadRow("--chat: a text has no turns; leave the option out, or prepare such data apart")
    answers = {
        name: [{"role": "assistant", "content": row[name].strip()}]
        for name in ANSWERS
        if isinstance(row.get(name), str)
    }
    if isinstance(row.get("prompt"), str):
        opened = row["prompt"].rstrip().removesuffix(ASSISTANT)
        answers["prompt"] = read_turns(opened, repairs)
        if answers["prompt"][-1]["role"] == "assistant":
            raise Dropped("the prompt ends within the assistant's turn")
    return row | answers


def flat(value) -> str:
    return value if isinstance(value, str) else "\n\n".join(message["content"] for message in value)


def texts_of(row: dict) -> dict[str, str]:
    return {name: flat(row[name]) for name in TEXTS if name in row}


def prompt_of(row: dict):
    """All that stands before the last answer, or all of a text."""
    return row["text"] if "text" in row else prompt_row(row)["prompt"] or row["messages"]


def human_turns(row: dict) -> list[str]:
    """What people say in a row's prompt (all of a text), lower case and with single blanks."""
    value = prompt_of(row)
    if isinstance(value, list):
        turns = [m["content"] for m in value if m["role"] == "user"] or [value[0]["content"]]
    elif HUMAN in "\n\n" + value:  # a text has lost the blank lines in front
        turns = [turn.partition(ASSISTANT)[0] for turn in ("\n\n" + value).split(HUMAN)[1:]]
    else:
        turns = [value]
    return [" ".join(turn.lower().split()) for turn in turns]


def first_turn(row: dict) -> str:
    return human_turns(row)[0]


def check_use(row: dict, words: dict[str, list], turn: str, config: Config):
    """Raise Dropped for a row that is no use for training; `words` are those of its texts."""
    messages = [message for name in TEXTS if isinstance(row.get(name), list) for message in row[name]]
    if row.get("weight") == 0:
        raise Dropped("weight 0")
    if not all(words.values()) or not all(m["content"] for m in messages) or ("prompt" in row and not turn):
        raise Dropped("empty")
    answers = [row[name] for name in ANSWERS if name in row]
    if any(len(x) > 1 if isinstance(x, list) else HUMAN in x or ASSISTANT in x for x in answers):
        raise Dropped("a further turn within an answer")
    prompt = len(words.get("prompt", ()))
    longest = max((len(words[name]) for name in (*ANSWERS, "messages") if name in words), default=0)
    if config.max_words is not None and prompt + longest > config.max_words:
        raise Dropped("over-long")
    if "chosen" in row and words["chosen"] == words["rejected"]:
        raise Dropped("equal sides")
    if "chosen" in row and config.truncate_words is not None:
        room = max(config.truncate_words - prompt, 0)
        if words["chosen"][:room] == words["rejected"][:room]:
            raise Dropped("equal sides after truncation")


# ---------------------------------------------------------------------------------------------------------- duplicates


def key_of(*texts: str) -> int:
    """64 bits, never 0. Ten million rows have a chance of 1 in 40,000 that two unlike ones share a key."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


class Seen:
    """A set of 64-bit keys in an open-addressing table: 11 to 21 bytes a key; a set of integers takes about 90."""

    def __init__(self):
        self.slots, self.used = array("Q", [0]) * 4096, 0

    def __contains__(self, key: int) -> bool:
        return self.slots[self._find(key)] != 0

    def add(self, key: int) -> bool:
        """True if the key is new."""
        slot = self._find(key)
        if self.slots[slot]:
            return False
        self.slots[slot] = key
        self.used += 1
        if 4 * self.used > 3 * len(self.slots):
            old, self.slots = self.slots, array("Q", [0]) * (2 * len(self.slots))
            for key in filter(None, old):
                self.slots[self._find(key)] = key
        return True

    def _find(self, key: int) -> int:
        slots, mask = self.slots, len(self.slots) - 1
        slot = key & mask
        while slots[slot] and slots[slot] != key:
            slot = (slot + 1) & mask
        return slot


class NearSearch:
    """MinHash (Broder 1997) over 3-word shingles: the share of equal minima estimates the Jaccard similarity.

    Candidates share one of 16 bands of 4 minima: at similarity 0.8 all but 0.02% do. Only the last ROWS rows are
    remembered, and a band's slot knows only its latest row: memory is fixed, and far-off duplicates can be missed.
    """

    ROWS, BANDS, PER_BAND, BITS, SIMILAR = 1 << 17, 16, 4, 18, 0.8

    def __init__(self):
        rng = np.random.default_rng(0)
        self.factors = 2 * rng.integers(1 << 63, size=self.BANDS * self.PER_BAND, dtype=np.uint64) + 1
        self.signatures = np.zeros((self.ROWS, self.BANDS * self.PER_BAND), np.uint32)
        self.tables = np.zeros((self.BANDS, 1 << self.BITS), np.int32)
        self.next = 0

    def add(self, text: str) -> bool:
        """True if no remembered text is near this one, which is then remembered."""
        words = text.lower().split()
        shingles = {zlib.crc32(" ".join(words[i : i + 3]).encode()) for i in range(max(1, len(words) - 2))}
        hashes = np.fromiter(shingles, np.uint64, len(shingles)) + 1
        minima = (hashes[:, None] * self.factors >> 32).min(0)
        bands = (minima.reshape(self.BANDS, -1) * self.factors[: self.PER_BAND]).sum(1) * self.factors[0]
        slots = (np.arange(self.BANDS), bands >> (64 - self.BITS))
        similar = (self.signatures[self.tables[slots]] == minima).mean(1)
        if similar.max() >= self.SIMILAR:
            return False
        self.signatures[self.next], self.tables[slots] = minima, self.next
        self.next = (self.next + 1) % self.ROWS
        return True


def near_text(row: dict) -> str:
    """What two comparisons must share to be near duplicates: the last human turn and the answers. With the whole
    dialogue, new answers late in a long dialogue would look like a repetition."""
    prompt = row.get("prompt", "")
    prompt = prompt[-1]["content"] if isinstance(prompt, list) else prompt.rpartition(HUMAN)[2]
    return " ".join([prompt, *(text for name, text in texts_of(row).items() if name != "prompt")])


class Split:
    """Which rows are held out: those whose hash of (seed, key) falls below a limit. `by` says what the key is: a row's
    first human turn, its first two, its prompt, or all of it. What each of them would hold out is counted, so that
    `better` knows a split for data on which this one fails."""

    BY = ("first human turn", "first two human turns", "whole prompt", "whole row")

    def __init__(self, share: float, seed: int, by: int = 0, limit: float | None = None):
        self.share, self.seed, self.by = share, seed, by
        self.limit = share * 2**64 if limit is None else limit
        self.rows, self.held, self.least = 0, [0] * 4, [(2**64, 0)] * 4  # per key; the least hash, its rows

    def __call__(self, row: dict) -> bool:
        turns, whole = human_turns(row), flat(prompt_of(row))
        keys = turns[:1], turns[:2], [whole], texts_of(row).values()
        hashes = [key_of(str(self.seed), *key) for key in keys]
        self.rows += 1
        for i, found in enumerate(hashes):
            self.held[i] += found < self.share * 2**64
            least, rows = self.least[i]
            if found <= least:
                self.least[i] = found, rows + 1 if found == least else 1
        return hashes[self.by] < self.limit

    def better(self) -> "Split | None":
        """The split by the first key that holds out some rows, and at most a quarter or twice the share: by the share,
        or where that takes nobody, of the one prompt with the least hash. Where no key does, none is held out. None
        where this split is it."""
        most = min(max(self.rows / 4, 2 * self.share * self.rows), self.rows - 1)
        best = Split(self.share, self.seed, limit=0)
        for by, (held, (least, rows)) in reversed([*enumerate(zip(self.held, self.least))]):
            if 0 < (held or rows) <= most:
                best = Split(self.share, self.seed, by, None if held else least + 1)
        same = (best.by, best.limit) == (self.by, self.limit) or not (best.limit or self.held[self.by])
        return None if same else best

    def __str__(self) -> str:
        by = f"by its {self.BY[self.by]}, since the data hardly differ before" if self.by else ""
        few = "" if self.limit == self.share * 2**64 else f"of one prompt, since {self.share:g} of the rows is less"
        return "a row is held out " + " and ".join(filter(None, (by, few))) if self.limit else "no row is held out"


# -------------------------------------------------------------------------------------------------------------- report


class Report:
    """Counts with up to three examples each; lengths as a histogram, so that percentiles are exact."""

    def __init__(self):
        self.read, self.kept = Counter(), Counter()  # by source
        self.unread = Counter()  # keys that were left out
        self.dropped, self.repaired, self.noted = {}, {}, {}  # reason -> {count, examples}
        self.lengths: dict[str, Counter] = {}
        self.longer = Counter()  # of pairs with sides of unlike length: the longer side is the chosen one, or not

    def count(self, group: str, reason: str, where: str, row):
        entry = getattr(self, group).setdefault(reason, {"count": 0, "examples": []})
        entry["count"] += 1
        if entry["count"] <= 3:
            text = " | ".join(map(shorten, row.values())) if isinstance(row, dict) else str(row)[:160]
            entry["examples"].append({"at": where, "text": text})

    def keep(self, words: dict):
        for name, value in words.items():
            self.lengths.setdefault(name, Counter())[len(value)] += 1
        if "chosen" in words and len(words["chosen"]) != len(words["rejected"]):
            self.longer[len(words["chosen"]) > len(words["rejected"])] += 1

    def as_dict(self, kind: str, files: dict) -> dict:
        by_count = lambda group: dict(sorted(group.items(), key=lambda item: -item[1]["count"]))
        return {
            "kind": kind,
            "read": dict(self.read),
            "kept": dict(self.kept),
            "dropped": by_count(self.dropped),
            "repaired": by_count(self.repaired),
            "noted": by_count(self.noted),
            "keys_not_read": dict(sorted(self.unread.items())),
            "words": {name: percentiles(counts) for name, counts in self.lengths.items()},
            "longer_side_chosen": self.longer[True] / self.longer.total() if self.longer else None,
            "files": files,
        }


def shorten(value) -> str:
    try:
        text = " ".join(flat(value).split())
    except (TypeError, KeyError):  # neither text nor messages
        text = str(value)
    return text.encode("utf-8", "replace").decode() if len(text) <= 70 else f"{text[:32]} ... {text[-32:]}"


def percentiles(counts: Counter) -> dict:
    lengths = sorted(counts)
    ends = np.cumsum([counts[length] for length in lengths])
    at = lambda share: int(lengths[np.searchsorted(ends, share * ends[-1])])
    mean = sum(length * count for length, count in counts.items()) / ends[-1]
    shares = {f"p{percent}": at(percent / 100) for percent in (10, 50, 90, 99)}
    return {"mean": round(float(mean), 1)} | shares | {"max": lengths[-1]}


def print_report(report: dict):
    print(f"{report['kind']}: {sum(report['read'].values()):,} rows read, {sum(report['kept'].values()):,} kept")
    for title in ("dropped", "repaired", "noted"):
        for reason, entry in report[title].items():
            example = entry["examples"][0]
            print(f"  {title:8} {entry['count']:>9,}  {reason:38} {example['at']}: {example['text'][:70]}")
    if report["keys_not_read"]:
        print("  keys not read: " + ", ".join(f"{key} ({n:,} rows)" for key, n in report["keys_not_read"].items()))
    for name, stats in report["words"].items():
        print(f"  words of {name:10} " + "  ".join(f"{key} {value:,}" for key, value in stats.items()))
    if report["longer_side_chosen"] is not None:
        print(f"  the longer side is the chosen one in {report['longer_side_chosen']:.1%}")
    for name, entry in report["files"].items():
        print(f"  {name:24} {entry['rows']:>9,} rows {entry['bytes'] / 1e6:10.1f} MB  sha256 {entry['sha256'][:16]}")


# -------------------------------------------------------------------------------------------------------- the pipeline


class Cleaner:
    """One pass over the sources; what it has seen is shared by all of them."""

    def __init__(self, config: Config, kind: str, split: Split | None):
        self.config, self.kind, self.report = config, kind, Report()
        self.seen, self.heldout_turns = Seen(), Seen()
        self.near = NearSearch() if config.near_duplicates else None
        self.labels = Counter()  # of thumbs
        self.split = split

    def converted(self, name: str):
        """(where, row) of the wanted kind."""
        for where, raw in read_source(name, self.config.separator):
            self.report.read[name] += 1
            try:
                for row in convert_vote(raw, self.kind) if is_votes(name) else self.convert(raw):
                    yield where, row
            except Dropped as reason:
                self.report.count("dropped", str(reason), where, raw)
            except gpt.BadRow as error:
                self.bad(where, error)

    def convert(self, raw) -> list[dict]:
        rows = []
        for found, row, unread in map(convert, spread(raw)):
            self.report.unread.update(unread)
            if self.config.kind == "auto" and found not in (self.kind, "ratings"):
                raise gpt.BadRow(f"this row holds {found}, not {self.kind}: --kind says what to make of all rows")
            if self.config.kind == "auto" and found == "prompts":
                refuse_answers(unread)
            rows += as_kind(found, row, self.kind)
        return rows

    def bad(self, where: str, error: Exception):
        if not self.config.skip_bad_rows:
            raise gpt.BadRow(f"{where}: {error} (--skip-bad-rows goes on without such rows)") from None
        self.report.count("dropped", "bad row", where, str(error))

    def rows(self, name: str, source: str | None, heldout: bool):
        """(row, held out?) of one source: the rows that are kept."""
        rows = self.converted(name)
        if self.kind == "pairs":
            rows = pair_ratings(rows, self.report)
        for where, row in rows:
            repairs = set()
            try:
                row = clean_row(row, repairs) if self.config.clean else row
                texts = texts_of(row)
                words = {field: text.split() for field, text in texts.items()}
                turn = first_turn(row)
                check_use(row, words, turn, self.config)
                row = to_chat(row, repairs) if self.config.chat else row
                gpt.check_row(row, row_kind(row, self.kind))
                self.check_duplicates(row, texts, turn, heldout, vote=str(row["id"]) if is_votes(name) else "")
            except Dropped as reason:
                self.report.count("dropped", str(reason), where, row)
                continue
            except gpt.BadRow as error:
                self.bad(where, error)
                continue
            for note in self.notes(row, texts):
                self.report.count("noted", note, where, row)
            for repair in sorted(repairs):
                self.report.count("repaired", repair, where, row)
            self.report.keep(words)
            self.report.kept[name] += 1
            held = heldout or bool(self.split and self.split(row))
            yield row | {"source": row.get("source", source)} if source else row, held

    def notes(self, row: dict, texts: dict) -> list[str]:
        """What a kept row should be known for."""
        self.labels[row.get("label")] += 1
        found = []
        if "chosen" in row and key_of("row", "None", texts["prompt"], texts["rejected"], texts["chosen"]) in self.seen:
            found.append("contradicts an earlier pair")
        if "label" in row and key_of("row", str(not row["label"]), *texts.values()) in self.seen:
            found.append("contradicts an earlier thumb")
        if any(MARKERS.search(text) for text in texts.values()):
            found.append("holds a chat template's markers, which are read as letters")
        return found

    def check_duplicates(self, row: dict, texts: dict, turn: str, heldout: bool, vote: str = ""):
        """Raise Dropped for what was there before. The same vote of two people, or of one on two answers that happen to
        be alike, counts twice: nine against one are a majority. `vote` is its id."""
        if heldout:
            self.heldout_turns.add(key_of(turn))
        elif self.config.heldout_data and key_of(turn) in self.heldout_turns:
            raise Dropped("its prompt is in the held-out data")
        fresh = self.seen.add(key_of("row", str(row.get("label")), *texts.values()))
        if vote:
            fresh = self.seen.add(key_of("vote", vote, str(row.get("label")), *texts.values()))
        if not fresh:
            raise Dropped("exact duplicate")
        if self.near and not vote and not self.near.add(near_text(row)):
            raise Dropped("near duplicate")


def mix(streams: list, weights: list):
    """Items of the streams in the given proportions until the first stream ends; without weights, one by one."""
    if None in weights:
        yield from itertools.chain(*streams)
        return
    taken = [0] * len(streams)
    while True:
        behind = min(range(len(streams)), key=lambda i: (taken[i] + 1) / weights[i])
        item = next(streams[behind], None)
        if item is None:
            return
        taken[behind] += 1
        yield item


ENCODE = json.JSONEncoder(ensure_ascii=False).encode
DERIVED = {"pairs": ("prompts", "demos"), "demos": ("prompts",), "thumbs": ("prompts",)}
FILES = {kind: (kind, *DERIVED.get(kind, ())) for kind in gpt.KINDS} | {
    "votes": ("pairs", "thumbs", "prompts", "demos")
}


class Outputs:
    """The files of OUT, written in OUT/.partial and moved into place at the end: a kill leaves the old ones alone.
    Empty ones are left out."""

    def __init__(self, out: Path, kind: str, splits: tuple[str, ...]):
        self.out, self.partial, self.counts = out, out / ".partial", Counter()
        shutil.rmtree(self.partial, ignore_errors=True)
        self.partial.mkdir(parents=True)
        names = [f"{name}{split}.jsonl" for name in FILES[kind] for split in splits]
        self.files = {name: open(self.partial / name, "wb") for name in names}

    def write(self, name: str, row: dict):
        try:
            line = ENCODE(row).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which UTF-8 cannot hold, but JSON's escapes can
            line = json.dumps(row).encode()
        self.files[name].write(line + b"\n")
        self.counts[name] += 1

    def close(self) -> dict:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        written = {name: self.partial / name for name in self.files if self.counts[name]}
        size_and_hash = lambda path: {"bytes": path.stat().st_size, "sha256": gpt.file_hash(path)}
        return {name: {"rows": self.counts[name]} | size_and_hash(path) for name, path in written.items()}

    def move(self):
        for kind, split in itertools.product(gpt.KINDS, ("", "-heldout")):
            name = f"{kind}{split}.jsonl"
            if self.counts[name]:
                (self.partial / name).replace(self.out / name)
            else:  # of an earlier run on other data
                (self.out / name).unlink(missing_ok=True)


def write_rows(rows, outputs: Outputs, kind: str, seen: Seen, limit: int | None):
    """Write each row and what follows from it; several pairs of one prompt give it once."""
    with gpt.progress(unit=" rows") as bar:
        for row, heldout in itertools.islice(rows, limit):
            split = "-heldout" if heldout else ""
            found = row_kind(row, kind)
            outputs.write(f"{found}{split}.jsonl", row)
            for name in DERIVED.get(found, ()):
                derived = prompt_row(row) if name == "prompts" else demo_row(row)
                if seen.add(key_of(name, *texts_of(derived).values())):
                    outputs.write(f"{name}{split}.jsonl", derived)
            bar.update()


def first_kind(name: str, config: Config) -> str:
    """The kind of a file: what its first rows hold. A row that lacks one of its texts looks like one of less."""
    order, found = [shape.kind for shape in SHAPES], []
    for where, raw in read_source(name, config.separator):
        if len(found) == 20:
            break
        try:
            found.append(convert(spread(raw)[0])[0])
        except Dropped:
            found.append("pairs")
        except gpt.BadRow as error:
            if not config.skip_bad_rows and not found:
                raise gpt.BadRow(f"{where}: {error} (--skip-bad-rows goes on without such rows)") from None
    if not found:
        raise ValueError(f"{name} holds no rows that can be read")
    kind = min(found, key=order.index)
    return "pairs" if kind == "ratings" else kind


def find_kind(sources: list[str], config: Config) -> str:
    """The kind that all sources' first rows agree on."""
    if config.kind != "auto":
        return config.kind
    kinds = {}
    for name in sources:
        if is_votes(name):
            kinds["votes"] = name
            continue
        kinds[first_kind(name, config)] = name
    if len(kinds) > 1:
        found = ", ".join(f"{name} holds {kind}" for kind, name in kinds.items())
        raise ValueError(f"{found}: prepare them apart, or say what to make of all of them with --kind")
    return next(iter(kinds))


def source_label(name: str) -> str:
    """What tells the rows of several sources apart: hh/helpful-base/train.jsonl.gz -> helpful-base/train."""
    if name.startswith("hub:"):
        return name.removeprefix("hub:")
    return "/".join([Path(name).absolute().parent.name, Path(name).name.split(".")[0]])


def main(config: Config) -> dict:
    if not 0 <= config.heldout < 1:
        raise ValueError(f"--heldout {config.heldout} is not a share of prompts (0 to below 1)")
    if not config.overwrite and any(config.out.glob("[!.]*")):
        raise FileExistsError(f"{config.out} is not empty: --overwrite replaces the rows in it")
    sources = gpt.parse_sources(config.data)
    heldout = [name for name, _ in gpt.parse_sources(config.heldout_data)]
    kind = find_kind([name for name, _ in sources] + heldout, config)
    split = Split(config.heldout, config.seed) if config.heldout and not heldout else None
    report, better = write_all(config, kind, sources, heldout, split)
    if better:
        print(f"a second pass: {better}")
        report, _ = write_all(config, kind, sources, heldout, better)
    gpt.write_json(config.out / "report.json", report)
    return report


def write_all(config: Config, kind: str, sources: list, heldout: list[str], split: Split | None):
    """One pass over the data: (its report, None), or ({}, a better split), where there is one; no file is then left."""
    cleaner = Cleaner(config, kind, split)
    labels = [source_label(name) if len(sources) > 1 else None for name, _ in sources]
    streams = [cleaner.rows(name, label, heldout=False) for (name, _), label in zip(sources, labels)]
    outputs = Outputs(config.out, kind, ("", "-heldout") if heldout or config.heldout else ("",))
    try:
        # held-out files come first: what is in them is then known when the training rows pass
        for name in heldout:
            write_rows(cleaner.rows(name, None, heldout=True), outputs, kind, cleaner.seen, None)
        write_rows(mix(streams, [weight for _, weight in sources]), outputs, kind, cleaner.seen, config.limit)
        report = cleaner.report.as_dict(kind, outputs.close())
        if split and (better := split.better()):
            return {}, better
        print_report(report)
        if len(cleaner.labels) == 1 and None not in cleaner.labels:
            print(f"  all thumbs have label {next(iter(cleaner.labels))}: KTO learns from both, up and down")
        if (heldout or config.heldout) and not any(name.endswith("-heldout.jsonl") for name in report["files"]):
            print("  no row was held out: too few prompts differ. --heldout-data takes the rows of another file")
        if not any(f"{name}.jsonl" in report["files"] for name in FILES[kind]):
            raise ValueError(f"no row is left for {config.out}/{FILES[kind][0]}.jsonl: see the reasons above")
        outputs.move()
    finally:
        shutil.rmtree(outputs.partial, ignore_errors=True)
    return report, None


if __name__ == "__main__":
    gpt.cli(main, Config, __doc__)
