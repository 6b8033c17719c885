"""What votes teach: the views of feedback.db against the rules written out in Python, and who reads the views."""

import json
import random
import sqlite3
from collections import Counter

import pytest

import prepare
import serve

CHAT = [{"role": "user", "content": "a 🙂 colour?"}]
TEXTS = ("red", "blue", " blue", "gr\x00een", "🙂\u202e", "", " \n", "\u3000\x1f", '"quoted\\" {}', "%s ' --")


def fill(path, number: int = 3000):
    """A database of random votes of all kinds; (vote, generation a, generation b or None) for each, in no order."""
    rng = random.Random(0)
    connection = serve.open_votes(path)
    connection.execute("BEGIN")
    connection.execute("PRAGMA defer_foreign_keys = on")
    votes, names = [], [f"{rng.getrandbits(64):016x}" for _ in range(number)]
    for i, name in enumerate(names):
        kind, values = rng.choice(
            [("pair", ("a", "b", "tie", "both_bad")), ("thumb", ("up", "down")), ("edit", ("edited",))]
        )
        prompt = rng.choice(["Human: a colour?\n\nAssistant:", CHAT])
        sides = []
        for side in "ab"[: 1 + (kind == "pair")]:
            sides.append(dict(
                id=f"{i}{side}", created_at="", prompt_messages=json.dumps(prompt), completion=rng.choice(TEXTS),
                finish_reason=rng.choice(["stop"] * 8 + [None, "length", "abort"]), model_id=rng.choice(["one", "two"]),
                checkpoint_sha256="c", sampling="{}",
            ))  # fmt: skip
            serve.insert(connection, "generation", sides[-1])
        vote = dict(
            id=name, created_at=f"2027-01-{rng.randint(1, 28):02}", schema_version=1, kind=kind, generation_a=f"{i}a",
            generation_b=f"{i}b" if kind == "pair" else None, value=rng.choice(values), annotator_id="p",
            edited_text=rng.choice(TEXTS) if kind == "edit" else None, consent=int(rng.random() < 0.9),
            superseded_by=rng.choice(names) if rng.random() < 0.1 else None,
        )  # fmt: skip
        serve.insert(connection, "feedback", vote)
        votes.append((vote, sides[0], sides[1] if kind == "pair" else None))
    connection.execute("COMMIT")
    connection.close()
    return votes


def taught(vote, a, b):
    """The rules, one vote at a time: a reason to drop it, or (kind, row) of each row that it teaches."""
    if vote["superseded_by"] is not None:
        return "changed later"
    if vote["value"] == "tie":
        return "a tie"
    for side in (a, b):
        if side is not None and side["finish_reason"] not in (None, "stop", "length"):
            return "an answer was broken off"
    texts = [a["completion"]]
    if b is not None:
        texts.append(b["completion"])
    if vote["value"] == "edited":
        texts.append(vote["edited_text"])
    if any(text.strip() == "" for text in texts):
        return "an empty answer"
    if len(texts) == 2 and len(set(texts)) == 1:
        return "equal answers"
    prompt = json.loads(a["prompt_messages"])
    answers = [[{"role": "assistant", "content": text}] if prompt == CHAT else text for text in texts]
    about = {"prompt": prompt, "id": vote["id"]}
    cut = [side is not None and side["finish_reason"] == "length" for side in (a, b)]

    def marked(row, **sides):
        names = [name for name, is_cut in sides.items() if is_cut]
        return about | row | ({"truncated": names} if names else {})

    if vote["value"] in ("a", "b", "edited"):
        won = int(vote["value"] != "a")
        row = {"chosen": answers[won], "rejected": answers[1 - won]}
        return [("pairs", marked(row, chosen=cut[won], rejected=cut[1 - won]))]
    label = vote["value"] == "up"
    return [("thumbs", marked({"completion": x, "label": label}, completion=c)) for x, c in zip(answers, cut)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A database of 3,000 random votes, the rows that they teach, oldest first, and how many are dropped for what."""
    path = tmp_path_factory.mktemp("votes") / "feedback.db"
    votes = sorted((v for v in fill(path) if v[0]["consent"]), key=lambda v: (v[0]["created_at"], v[0]["id"]))
    found = [taught(*vote) for vote in votes]
    rows = [row for rows in found if isinstance(rows, list) for row in rows]
    return path, votes, rows, Counter(reason for reason in found if isinstance(reason, str))


def test_the_view_holds_the_rows_that_the_rules_give_in_their_order(world):
    path, _, rows, reasons = world
    with sqlite3.connect(path) as connection:
        view = connection.execute("SELECT * FROM training_rows ORDER BY created_at, id, number").fetchall()
    found = [(kind, json.loads(row)) for _, _, _, dropped, kind, row in view if not dropped]
    assert found == rows and len(rows) > 600
    assert [list(row) for _, row in found] == [list(row) for _, row in rows]  # keys in their order, too
    assert Counter(dropped for _, _, _, dropped, _, _ in view if dropped) == reasons
    assert set(reasons) == {"changed later", "a tie", "an answer was broken off", "an empty answer", "equal answers"}
    assert min(reasons.values()) > 20


def test_export_counter_and_prepare_read_the_same(world, tmp_path):
    path, votes, rows, reasons = world
    connection = serve.open_votes(path)
    for kind in ("pairs", "thumbs"):
        assert serve.export_votes(connection, kind) == [row for found, row in rows if found == kind]
    of_one = {vote["id"] for vote, a, b in votes if "one" in (a["model_id"], b and b["model_id"])}
    since = serve.export_votes(connection, "pairs", since="2027-01-15", model="one")
    late = {vote["id"] for vote, _, _ in votes if vote["created_at"] >= "2027-01-15"}
    assert since == [row for kind, row in rows if kind == "pairs" and row["id"] in late & of_one]
    raw = serve.export_votes(connection, None)
    assert [row["id"] for row in raw] == [vote["id"] for vote, _, _ in votes]
    assert Counter(row["dropped"] for row in raw if row["dropped"]) == reasons
    found = serve.count_votes(connection)
    corrections = {vote["id"] for vote, _, _ in votes if vote["kind"] == "edit"}
    what = Counter("edits" if row["id"] in corrections else kind for kind, row in rows)
    assert {name: found[name] for name in ("pairs", "edits", "thumbs")} == what
    assert found["dropped"] == {reason: n for reason, n in reasons.items() if reason != "changed later"}
    connection.close()

    read = [vote for _, vote in prepare.read_votes(path)]
    assert [(v["kind"], json.loads(v["row"])) for v in read if not v["dropped"]] == rows
    report = prepare.main(prepare.Config((str(path),), tmp_path / "out", heldout=0))
    assert {reason: report["dropped"][reason]["count"] for reason in reasons} == reasons
    assert report["read"] == {str(path): len(rows) + reasons.total()}


def test_a_tie_alone_is_no_pair_to_train_on(tmp_path):
    connection = serve.open_votes(tmp_path / "f.db")
    add(connection, "pair", "tie", "p", "x", "y")
    found = serve.count_votes(connection)
    assert (found["pairs"], found["edits"], found["thumbs"], found["dropped"]) == (0, 0, 0, {"a tie": 1})


def test_a_majority_of_nine_against_one_is_nine_rows_against_one(tmp_path):
    path = tmp_path / "f.db"
    connection = serve.open_votes(path)
    add(connection, "pair", "b", "p", "x", "y")
    for i in range(9):
        vote = dict(id=str(i), created_at="2027", schema_version=1, kind="pair", generation_a="a", generation_b="b")
        serve.insert(connection, "feedback", vote | dict(value="a", annotator_id=str(i), consent=1))
    assert serve.count_votes(connection)["pairs"] == 10
    prepare.main(prepare.Config((str(path),), tmp_path / "out", heldout=0))
    rows = [json.loads(line) for line in (tmp_path / "out/pairs.jsonl").read_text().splitlines()]
    assert Counter(row["chosen"] for row in rows) == {"x": 9, "y": 1}
    assert rows == serve.export_votes(connection, "pairs")
    report = prepare.main(prepare.Config((str(path), str(path)), tmp_path / "twice", heldout=0))
    assert report["dropped"]["exact duplicate"]["count"] == 10  # the same votes, read twice


def add(connection, kind, value, prompt, *completions):
    for side, text in zip("ab", completions):
        row = dict(id=side, created_at="2027", prompt_messages=json.dumps(prompt), completion=text)
        serve.insert(connection, "generation", row | dict(model_id="m", checkpoint_sha256="c", sampling="{}"))
    vote = dict(id="v", created_at="2027", schema_version=1, kind=kind, generation_a="a", value=value)
    vote |= dict(generation_b="b" if kind == "pair" else None, annotator_id="p", consent=1)
    serve.insert(connection, "feedback", vote)


def test_a_prompt_of_token_ids_teaches_nothing(tmp_path):
    connection = serve.open_votes(tmp_path / "f.db")
    add(connection, "thumb", "up", [5, 6], "x")
    assert [row["dropped"] for row in serve.export_votes(connection, None)] == ["a prompt of token ids"]
    assert serve.export_votes(connection, "thumbs") == []


def test_an_older_database_gets_its_views_from_serve(tmp_path):
    """Written before there were views, or with other ones."""
    path = tmp_path / "f.db"
    connection = serve.open_votes(path)
    add(connection, "thumb", "up", "p", "x")
    connection.executescript("DROP VIEW training_rows; DROP VIEW votes; CREATE VIEW votes AS SELECT 1 AS one;")
    connection.close()
    with pytest.raises(ValueError, match=r"no such table: training_rows.*serve.py --feedback \S+f.db` adds"):
        list(prepare.read_votes(path))
    serve.open_votes(path).close()
    ((where, vote),) = prepare.read_votes(path)
    assert where == f"{path}:v" and json.loads(vote["row"]) == {
        "prompt": "p",
        "id": "v",
        "completion": "x",
        "label": True,
    }
    with pytest.raises(FileNotFoundError, match="no votes in"):
        list(prepare.read_votes(tmp_path / "none.db"))
    (tmp_path / "text.db").write_text("not a database, but long enough to look at " * 20)
    with pytest.raises(ValueError, match="not a database"):
        list(prepare.read_votes(tmp_path / "text.db"))
