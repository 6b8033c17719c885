"""ui.html in a real browser, against a real server: what a person does with it, and what a hostile model may not do."""

import json
import re
import time
import urllib.request

import equinox as eqx
import jax
import numpy as np
import pytest
from screenshots import CHROMIUM, ROOT, answered, ask, browsing, open_page, serving

import gpt

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
LETTERS = {"vowels": {"a", "e"}, "consonants": {"b", "c", "d", "f"}}  # what each of the two models can say
HOSTILE = (
    "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script></script> "
    "[click](javascript:window.hacked=1) [safe](https://example.com/) ![pixel](https://example.com/p.png)\n\n"
    "```html\n<b>bold</b>\n```\n\n- **one**\n- `two`"
)


def bigram_model(tokenizer, says: set[str]) -> gpt.GPT:
    """A GPT that says each of these words and <eos> with equal chance, and never nothing: attention and MLP add zero,
    one-hot embeddings meet a head of log-probs."""
    V = tokenizer.vocab_size
    config = gpt.make_config(vocab_size=V, context=2048, layers=1, heads=1, dim=V, tied=False)
    logits = np.full((V, V), -9.0)
    words = [tokenizer.encode(word)[0] for word in says]
    logits[[*words, tokenizer.eos_id], :] = 0
    logits[tokenizer.eos_id, tokenizer.encode("Assistant:")] = -9
    where = lambda m: (m.wte, m.head, m.blocks.o.weight, m.blocks.down.weight)
    model = gpt.init(config, jax.random.key(0))
    return eqx.tree_at(where, model, (np.eye(V), logits, 0 * model.blocks.o.weight, 0 * model.blocks.down.weight))


@pytest.fixture(scope="module")
def url(words, tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("served"), gpt.load_tokenizer(words)
    for name, says in LETTERS.items():
        gpt.save(folder / name, bigram_model(tokenizer, says), tokenizer)
    questions = [{"prompt": "\n\nHuman: a b\n\nAssistant:"}, {"prompt": [{"role": "user", "content": "c d"}]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    options = ["--slots", "4", "--examples", str(folder / "prompts.jsonl")]
    with serving([folder / name for name in LETTERS], folder / "feedback.db", *options) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with browsing() as browser:
        yield browser


@pytest.fixture
def visit(browser, url):
    """Opens the page as a new person. Whatever happens there, no script fails, no policy is violated, and nothing is
    asked of another host."""
    problems, pages = [], []

    def watch(page):
        pages.append(page)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: m.type in ("error", "warning") and problems.append(m.text))
        page.on("request", lambda r: r.url.startswith((url, "blob:")) or problems.append(f"asked for {r.url}"))

    yield lambda consent=True, **options: open_page(browser, url, consent, watch, **options)
    for page in pages:
        page.context.close()
    assert [p for p in problems if not p.startswith("Failed to load resource: the server responded with")] == []


def said(page) -> set[str]:
    """The words of the last answer."""
    return set(answers(page).last.locator(".text").inner_text().split())


def answers(page):
    return page.get_by_role("article", name="Answer", exact=True)


def press(page, name, **which):
    page.get_by_role("button", name=name, exact=True, **which).last.click()


def get(url, path):
    with urllib.request.urlopen(url + path) as response:
        return response.read().decode()


def counts(url):
    found = json.loads(get(url, "/v1/feedback/counts"))
    return found["pairs"], found["thumbs"], found["edits"]


def export(page, name, path):
    """What the person gets who presses the button, as a file."""
    page.get_by_role("button", name=re.compile("export or train")).click()
    with page.expect_download() as download:
        press(page, name)
    download.value.save_as(path)
    page.keyboard.press("Escape")
    return path


def running(url):
    return sum(float(n) for n in re.findall(r"^vllm:num_requests_running\S* (\S+)$", get(url, "/metrics"), re.M))


def until(condition, seconds=2.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def sent(page):
    """The bodies of the completion requests from here on."""
    bodies = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("/completions") else None)
    return bodies


def canned(page, *texts, status=200, body=None):
    """Answer the next questions in the model's place."""
    frame = lambda choice: f"data: {json.dumps({'choices': [dict(index=0, **choice)]})}\n\n"
    stream = "".join(frame({"delta": {"content": text}, "finish_reason": None}) for text in texts)
    stream += frame({"delta": {}, "finish_reason": "stop"}) + "data: [DONE]\n\n"
    page.route("**/completions", lambda route: route.fulfill(status=status, body=stream if body is None else body))


# a person's round -----------------------------------------------------------------------------------------------------


@needs_browser
def test_a_newcomer_is_offered_questions(visit):
    page = visit()
    assert page.locator(".examples button").all_inner_texts() == ["a b", "c d"]
    press(page, "c d")
    answered(page)
    assert said(page) <= LETTERS["vowels"]


@needs_browser
@pytest.mark.parametrize("pause, shown", [(0, False), (0.5, True)])
def test_speed_is_that_of_a_stream_not_of_an_answer_in_one_piece(visit, pause, shown):
    page = visit()
    usage = '{"choices": [], "usage": {"completion_tokens": 40}}'
    page.evaluate(
        """([pause, usage]) => { window.fetch = async () => new Response(new ReadableStream({ async start(stream) {
          const send = data => stream.enqueue(new TextEncoder().encode(`data: ${data}\\n\\n`))
          send('{"choices": [{"index": 0, "delta": {"content": "a"}}]}')
          await new Promise(done => setTimeout(done, 1000 * pause))
          send('{"choices": [{"index": 0, "delta": {"content": " e"}, "finish_reason": "stop"}]}')
          send(usage), send("[DONE]"), stream.close()
        } })) }""",
        [pause, usage],
    )
    ask(page, "a b")
    text = answers(page).inner_text()
    assert "40 tokens" in text and bool(re.search(r"40 tokens · \d+ tokens/s", text)) == shown


@needs_browser
def test_a_chat_without_consent_stores_nothing_and_survives_a_reload(visit, url):
    raw = lambda: get(url, "/v1/feedback/export?format=raw")
    page, before = visit(consent=False), (counts(url), raw())
    bodies = sent(page)
    ask(page, "a b")
    text = answers(page).inner_text()
    assert said(page) <= LETTERS["vowels"] and re.search(r"vowels · \d+ tokens?", text)
    assert bodies[0]["store"] == "on_vote"  # in memory alone, until there is a vote with consent
    press(page, "Good answer")  # explains why not, instead of voting
    assert page.get_by_role("dialog").get_by_text("If not, you can chat as before and nothing is stored.").is_visible()
    press(page, "Do not store")
    assert (counts(url), raw()) == before
    page.get_by_label("Message").fill("half a thought")
    page.reload()
    answers(page).wait_for()
    assert answers(page).inner_text() == text and page.get_by_label("Message").input_value() == "half a thought"
    ask(page, "a")
    roles = [message["role"] for message in bodies[1]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert set(bodies[1]["messages"][1]["content"].split()) <= LETTERS["vowels"]


@needs_browser
def test_stop_keeps_the_text_and_frees_the_slot(visit, url):
    page = visit()
    endless = lambda route: route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))
    page.route("**/completions", endless)
    for stop in (lambda: page.keyboard.press("Escape"), lambda: press(page, "Stop")):
        page.get_by_label("Message").fill("a")
        page.keyboard.press("Enter")
        assert until(lambda: any(len(text.split()) > 9 for text in page.locator(".streaming").all_inner_texts()))
        assert running(url) == 1
        stop()
        answered(page)
        assert "stopped" in answers(page).last.inner_text() and said(page) == LETTERS["vowels"]
        assert until(lambda: running(url) == 0)
    page.unroute("**/completions")
    ask(page, "b")
    assert answers(page).count() == 3

    page.route("**/completions", endless)
    page.get_by_label("Message").fill("a")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Stop").wait_for()
    page.keyboard.press("Control+Shift+O")  # a new chat ends what was being written in the last one
    answered(page)
    assert answers(page).count() == 0 and until(lambda: running(url) == 0)


@needs_browser
def test_another_answer_and_an_edited_message_are_branches(visit):
    page = visit()
    bodies = sent(page)
    ask(page, "a b")
    first = answers(page).inner_text()
    press(page, "Another answer")
    answered(page)
    assert answers(page).count() == 1 and "2/2" in answers(page).inner_text()
    press(page, "Earlier version")
    assert answers(page).inner_text().splitlines()[0] == first.splitlines()[0]
    page.get_by_label("Message").press("ArrowUp")
    page.get_by_label("New text").fill("c d")
    page.keyboard.press("Enter")
    answered(page)
    assert [m["content"] for m in bodies[-1]["messages"]] == ["c d"]  # beside the first question, not after it
    assert page.get_by_role("article", name="You").inner_text().startswith("c d")
    press(page, "Earlier version")
    assert page.get_by_role("article", name="You").inner_text().startswith("a b")
    assert "1/2" in page.get_by_role("article", name="You").inner_text()


@needs_browser
def test_thumbs_reasons_corrections_and_undo(visit, url, tmp_path):
    page, (pairs, thumbs, edits) = visit(), counts(url)
    ask(page, "a b")
    press(page, "Bad answer")
    press(page, "too long")
    page.get_by_role("button", name="too long", pressed=True).wait_for()
    assert counts(url) == (pairs, thumbs + 1, edits)  # the vote with a reason replaced the one without
    export(page, "Everything", tmp_path / "raw.jsonl")
    assert '["too long"]' in (tmp_path / "raw.jsonl").read_text().replace("\\", "")
    press(page, "Undo")
    page.get_by_role("button", name="Bad answer", pressed=False).wait_for()
    assert counts(url) == (pairs, thumbs, edits)

    press(page, "Correct this answer")
    page.get_by_label("New text").fill("yes")
    press(page, "Store correction")
    page.get_by_text("corrected by you").wait_for()
    assert counts(url) == (pairs, thumbs, edits + 1)
    press(page, "Undo")
    page.get_by_text("corrected by you").wait_for(state="detached")
    assert counts(url) == (pairs, thumbs, edits) and answers(page).count() == 1
    press(page, "Correct this answer")
    page.get_by_label("New text").fill("yes")
    press(page, "Store correction")
    page.get_by_text("corrected by you").wait_for()
    page.get_by_role("button", name="Earlier version").click()
    press(page, "Good answer")
    page.get_by_role("button", name="Undo").wait_for()
    rows = [row for _, row in gpt.read_rows(export(page, "Preferences", tmp_path / "pairs.jsonl"), "pairs")]
    assert "yes" in [row["chosen"][0]["content"] for row in rows]
    rows = [row for _, row in gpt.read_rows(export(page, "Thumbs", tmp_path / "thumbs.jsonl"), "thumbs")]
    liked = [m["content"] for row in rows for m in row["completion"] if row["label"]]
    assert any(set(text.split()) == said(page) for text in liked)


@needs_browser
@pytest.mark.parametrize("by", ["keyboard", "button"])
def test_a_blind_vote_is_revealed_stored_and_undone(by, visit, url, tmp_path):
    page, (pairs, thumbs, edits) = visit(), counts(url)
    bodies, votes = sent(page), []
    page.on("request", lambda r: votes.append(r.post_data_json) if r.url.endswith("/v1/feedback") else None)
    page.evaluate("Math.random = () => 0.9")  # a stands on the right, where a mistaken side would show
    press(page, "Compare two answers")
    held = []
    page.route("**/completions", lambda route: held.append(route))  # until both are let go, there is nothing to vote on
    page.get_by_label("Message").fill("a b")
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Answer B").wait_for()
    ballot = page.get_by_role("group", name="Which answer is better?").get_by_role("button")
    assert ballot.count() == 4 and all(button.is_disabled() for button in ballot.all())
    page.keyboard.press("1")
    for route in held:
        route.continue_()
    page.unroute("**/completions")
    answered(page)
    assert votes == [] and {body["model"] for body in bodies} == set(LETTERS)
    assert not any(name in page.locator("body").inner_text() for name in LETTERS)  # blind

    side = lambda name: page.get_by_role("region", name=f"Answer {name}").inner_text().split()
    winner = next(name for name, says in LETTERS.items() if set(side("B")[1:]) <= says)
    page.get_by_label("Message").press("2") if by == "keyboard" else press(page, "B is better")
    page.get_by_text("B is better. Stored.").wait_for()
    assert side("B")[1] == winner and {side("A")[1], winner} == set(LETTERS)
    assert (votes[0]["value"], votes[0]["shown_left"]) == ("a", "b")
    assert votes[0]["consent"] and votes[0]["latency_ms"] >= 0 and counts(url) == (pairs + 1, thumbs, edits)

    rows = [row for _, row in gpt.read_rows(export(page, "Preferences", tmp_path / "pairs.jsonl"), "pairs")]
    ours = [row for row in rows if row["chosen"][0]["content"].split() == side("B")[2:]]
    assert ours and ours[0]["prompt"] == [{"role": "user", "content": "a b"}]
    assert ours[0]["rejected"][0]["content"].split() == side("A")[2:]

    press(page, "Compare two answers")
    ask(page, "c")  # the winner's answer goes on
    assert bodies[-1]["messages"][1]["content"].split() == side("B")[2:]
    press(page, "Undo")
    page.get_by_role("button", name="Tie").wait_for()
    assert counts(url) == (pairs, thumbs, edits)
    page.get_by_label("Message").press("3")
    page.get_by_text("Tie. Stored.").wait_for()
    assert votes[-1]["value"] == "tie" and votes[-1]["reasons"] == ["revealed"]  # and never passes for a blind one


@needs_browser
def test_the_vote_that_raises_the_question_of_consent_is_kept(visit, url):
    page, (pairs, thumbs, edits) = visit(consent=False), counts(url)
    ask(page, "a b")
    press(page, "Good answer")
    press(page, "Agree")
    page.get_by_role("button", name="Good answer", pressed=True).wait_for()
    assert counts(url) == (pairs, thumbs + 1, edits)

    page = visit(consent=False)
    press(page, "Compare two answers")
    ask(page, "a b")
    press(page, "A is better")
    assert counts(url) == (pairs, thumbs + 1, edits)
    press(page, "Agree")
    page.get_by_text("A is better. Stored.").wait_for()
    assert counts(url) == (pairs + 1, thumbs + 1, edits)


@needs_browser
def test_after_settings_one_writes_and_a_message_may_begin_with_a_slash(visit):
    page = visit()
    bodies = sent(page)
    press(page, "Settings")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.activeElement.id === 'input'")
    page.keyboard.type("/etc a")
    page.keyboard.press("Enter")
    page.get_by_text("begin with //").wait_for()
    ask(page, "//etc a")
    assert [body["messages"][-1]["content"] for body in bodies] == ["/etc a"]


@needs_browser
def test_a_wrong_key_is_said_to_be_wrong(visit):
    page = visit(consent=False)
    refused = {"error": {"message": "a valid API key is needed"}}
    page.route("**/completions", lambda route: route.fulfill(status=401, json=refused))
    page.get_by_label("Message").fill("a")
    page.keyboard.press("Enter")
    for said in ("", "The server did not accept this key."):
        page.get_by_label("API key").fill("guess")
        assert page.locator("#key-wrong").inner_text() == said
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)


@needs_browser
def test_the_page_waits_for_an_engine_that_cannot_be_reached(visit):
    page, dead = visit(consent=False), []
    error = {"error": {"message": "the engine at http://localhost:8001 cannot be reached", "code": "upstream_dead"}}

    def refuse(route):
        dead.append(route)
        route.fulfill(status=502, json=error, headers={"retry-after": "1"}) if len(dead) < 2 else route.continue_()

    page.route("**/v1/models", refuse)
    page.reload()
    page.get_by_text("No model yet").wait_for()
    page.get_by_text("http://localhost:8001 cannot be reached").wait_for()
    page.get_by_role("heading", name="Talk to").wait_for()
    assert page.locator("#note").inner_text() == ""
    canned(page, status=502, body=json.dumps(error))
    ask(page, "a")
    page.locator(".error", has_text="http://localhost:8001 cannot be reached").get_by_text("Retry").wait_for()


@needs_browser
def test_old_turns_are_left_out_and_it_is_said(visit):
    page = visit()
    ask(page, "a b")
    page.wait_for_function("() => document.querySelector('#checkpoint').textContent.includes('% full')")
    for _ in range(3):
        ask(page, "c d " * 250)
    assert "earlier messages left out" not in page.locator("#log").inner_text()
    page.evaluate("models.forEach(model => { model.max_model_len = 1000 })")
    bodies = sent(page)
    ask(page, "a")
    assert "6 earlier messages left out" in answers(page).last.inner_text()
    assert [m["role"] for m in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    page.evaluate("models.forEach(model => { model.max_model_len = 100 })")
    ask(page, "b")  # too small for conversations: each question stands alone
    assert len(bodies[-1]["messages"]) == 1


@needs_browser
def test_two_tabs_of_one_chat_keep_the_newer_state(visit):
    page = visit()
    ask(page, "a b")
    chat = page.evaluate("chat.id")
    page.evaluate(
        """id => { const newer = stored.get("chat:" + id)
        newer.version += 5; newer.nodes[0].text = "c d"; stored.set("chat:" + id, newer); save() }""",
        chat,
    )
    assert page.get_by_role("article", name="You").inner_text().startswith("c d")
    assert page.evaluate("id => stored.get('chat:' + id).nodes[0].text", chat) == "c d"


@needs_browser
def test_equal_answers_are_no_choice_and_a_digit_is_text(visit):
    page = visit()
    canned(page, "the same")
    press(page, "Compare two answers")
    ask(page, "a b")
    page.get_by_text("Both answers are the same").wait_for()
    assert page.get_by_role("button", name="A is better").count() == 0
    page.get_by_label("Message").press("1")
    assert page.get_by_label("Message").input_value() == "1"


@needs_browser
def test_the_sides_are_random(visit):
    page = visit(consent=False)
    first = page.evaluate("Array.from({length: 60}, () => drawTwo()[0])")
    assert set(first) == set(LETTERS)
    press(page, "Compare two answers")
    seen = set()
    while len(seen) < 2:
        ask(page, "a")
        seen.add(page.evaluate("pendingDuel().left"))
        press(page, "New chat")


@needs_browser
def test_deleting_a_chat_erases_it_on_the_server(visit, url, tmp_path):
    page, before = visit(), counts(url)
    ask(page, "a b")
    press(page, "Good answer")
    page.get_by_role("button", name="Undo").wait_for()
    press(page, "Earlier chats")
    with page.expect_download() as download:
        press(page, "Save to a file")
    download.value.save_as(tmp_path / "chats.json")
    page.on("dialog", lambda dialog: dialog.accept())
    press(page, "Delete a b")
    page.get_by_text("None yet.").wait_for()
    assert counts(url) == before
    page.locator("#file").set_input_files(tmp_path / "chats.json")
    page.locator("#past").get_by_role("button", name="a b", exact=True).click()
    assert answers(page).count() == 1
    circle = [{"id": "x", "leaf": 1, "nodes": [{"parent": 1, "text": ""}, {"parent": 0, "text": ""}]}]
    (tmp_path / "chats.json").write_text(json.dumps(circle))
    press(page, "Earlier chats")
    page.locator("#file").set_input_files(tmp_path / "chats.json")
    page.get_by_text("That file holds no chats of this page.").wait_for()


@needs_browser
def test_commands_and_settings_reach_the_server(visit):
    page = visit()
    bodies = sent(page)
    for line in ("/temperature 0.5", "/max 3", "/seed 7", "/topk 2", "/topp 0.9", "/system yes no"):
        page.get_by_label("Message").fill(line)
        page.keyboard.press("Enter")
    page.get_by_label("Message").fill("/temperature hot")
    page.keyboard.press("Enter")
    assert "needs a number" in page.locator("#note").inner_text()
    ask(page, "a")
    wanted = dict(temperature=0.5, max_tokens=3, seed=7, top_k=2, top_p=0.9)
    assert {name: bodies[0][name] for name in wanted} == wanted and bodies[0]["messages"][0]["content"] == "yes no"
    press(page, "Settings")
    assert page.get_by_label("Seed").input_value() == "7"


@needs_browser
def test_settings_show_what_a_blank_means_and_give_the_focus_back(visit):
    page = visit(consent=False)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    shown = [page.locator(f'[data-setting="{name}"]').get_attribute("placeholder") for name in ("temperature", "top_p")]
    assert shown == ["1", "off"]
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.activeElement.id === 'input'")
    page.keyboard.type("a b")  # the blank must not open the settings again
    assert page.locator("#input").input_value() == "a b" and not page.locator("#settings").is_visible()


@needs_browser
def test_an_answer_that_was_cut_goes_on(visit):
    page = visit()
    bodies = sent(page)
    page.get_by_label("Message").fill("/max 1")
    page.keyboard.press("Enter")
    ask(page, "a")
    assert "cut at the limit" in answers(page).inner_text()
    first = answers(page).inner_text().split()[0]
    press(page, "Continue")
    answered(page)
    assert bodies[1]["messages"][-1]["role"] == "assistant" and bodies[1]["messages"][-1]["content"].split() == [first]
    assert bodies[0]["store"] and "store" not in bodies[1]  # no vote can be about two generations
    assert answers(page).inner_text().startswith(first)


# hostile, broken, small -----------------------------------------------------------------------------------------------


@needs_browser
def test_what_a_model_says_stays_text(visit):
    page = visit()
    canned(page, *re.findall(r"[\s\S]{1,7}", HOSTILE))
    ask(page, HOSTILE)  # and what a person types
    log = page.locator("#log")
    assert log.locator("img, script").count() == 0 and page.evaluate("window.hacked") is None
    assert log.locator("a").evaluate_all("links => links.map(a => [a.href, a.rel])") == [
        ["https://example.com/", "noopener noreferrer nofollow"],
        ["https://example.com/p.png", "noopener noreferrer nofollow"],  # to click on, not to load
    ]
    text = answers(page).inner_text()
    for piece in ("<img src=x onerror='window.hacked=1'>", "</script></script>", "[click](javascript:window.hacked=1)"):
        assert piece in text
    assert log.locator("pre code").inner_text().strip() == "<b>bold</b>"
    page.evaluate("navigator.clipboard.writeText = async text => { window.copied = text }")
    press(page, "Copy code")
    assert page.evaluate("window.copied").strip() == "<b>bold</b>"
    assert log.locator("li strong").inner_text() == "one" and log.locator("li code").inner_text() == "two"


MARKDOWN = """# Title

1. one
   - inner
     - deep

   ```py
   a < b
   ```
2. two

4. **four** `x` ~~no~~

| name | age |
|---|--:|
| <b>Ann</b> | 7 |

> said

a & b &lt; [mail](mailto:a@b.example) [here](/v1/models) [data](data:text/html,x) <https://e.example>
next line

---
```html
<i>open</i>"""


@needs_browser
def test_markdown_is_drawn_by_its_rules(visit):
    page = visit()
    canned(page, *re.findall(r"[\s\S]{1,9}", MARKDOWN))
    ask(page, "a")
    text = answers(page).locator(".text")
    count = lambda selector: text.locator(selector).count()
    assert text.locator("h1").inner_text() == "Title" and count("ol") == 1 and count("ol > li") == 3
    assert count("ol > li > ul > li > ul > li") == 1 and count("ol > li:first-child pre") == 1
    assert text.locator("pre").all_inner_texts() == ["a < b\n", "<i>open</i>"]
    assert text.locator("td").all_inner_texts() == ["<b>Ann</b>", "7"] and count("td.right") == 1
    assert text.locator("blockquote").inner_text() == "said" and count("hr") == 1 and count("s") == 1
    links = text.locator("a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert links == ["mailto:a@b.example", "https://e.example"] and count("b, i, img, script") == 0
    assert "a & b < mail [here](/v1/models) [data](data:text/html,x) https://e.example\nnext line" in text.inner_text()
    page.reload()
    answers(page).locator("h1").wait_for()  # an earlier chat is drawn so, too


@needs_browser
def test_what_is_being_written_is_shown_at_once_and_without_a_server_as_text(visit):
    page = visit()
    page.evaluate("""() => {
      const ask = window.fetch, encoder = new TextEncoder()
      const chunk = choice => encoder.encode(`data: ${JSON.stringify({ choices: [choice] })}\\n\\n`)
      const stream = new ReadableStream({ start(stream) {
        window.more = content => { stream.enqueue(chunk({ delta: { content } })) }
        window.end = () => { stream.enqueue(chunk({ delta: {}, finish_reason: "stop" })); stream.close() }
      } })
      window.fetch = (path, options) => path.endsWith("completions") ? new Response(stream) : ask(path, options)
    }""")
    page.get_by_label("Message").fill("a")
    page.keyboard.press("Enter")
    page.evaluate("more('- **one**\\n')")
    text = page.locator(".streaming")
    text.locator("li strong").wait_for()  # a complete line is drawn before the answer ends
    page.evaluate("more('\\n```\\nx = 1\\n')")
    text.locator("pre").wait_for()
    page.evaluate("more('y = 2')")
    page.wait_for_function(
        "() => document.querySelector('.streaming pre').innerText.includes('y = 2')"
    )  # within the code
    page.route("**/markdown", lambda route: route.fulfill(status=500, json={}))
    page.evaluate("more('\\n```\\n**two**\\n'), end()")
    answered(page)
    assert "**two**" in answers(page).inner_text()


@needs_browser
def test_errors_are_text_lose_nothing_and_can_be_retried(visit):
    page = visit()
    error = lambda message: json.dumps({"error": {"message": message, "type": "server_error", "code": None}})
    first = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    for status, body, shown in (
        (500, error("<img src=x onerror='window.hacked=1'>"), "<img src=x"),
        (502, "<html>bad gateway</html>", "<html>bad gateway</html>"),
        (200, first + f"data: {error('the engine died')}\n\n", "the engine died"),
        (200, first, "The connection ended within the answer."),
    ):
        canned(page, status=status, body=body)
        page.get_by_role("button", name="Retry").or_(page.get_by_label("Message")).first.wait_for()
        if page.get_by_role("button", name="Retry").count():
            press(page, "Retry")
        else:
            ask(page, "a b")
        page.locator(".error", has_text=shown).wait_for()
        assert page.get_by_role("article", name="You").inner_text().startswith("a b")
        assert page.locator("#log img").count() == 0 and page.evaluate("window.hacked") is None
        page.unroute("**/completions")
    press(page, "Retry")
    answered(page)
    assert page.locator(".error").count() == 0 and said(page) <= LETTERS["vowels"]


@needs_browser
def test_a_key_is_asked_for_once_and_sent(visit, url):
    page = visit()
    keys = []

    def guard(route):
        keys.append(route.request.headers.get("authorization"))
        denied = dict(status=401, body='{"error": {"message": "who are you?"}}')
        route.continue_() if keys[-1] == "Bearer open sesame" else route.fulfill(**denied)

    page.route("**/v1/**", guard)
    page.get_by_label("Message").fill("a b")
    page.keyboard.press("Enter")
    page.get_by_label("API key").fill("open sesame")
    page.keyboard.press("Enter")
    answers(page).wait_for()
    answered(page)
    assert said(page) <= LETTERS["vowels"] and keys[0] is None


@needs_browser
def test_a_stream_may_be_cut_anywhere(visit):
    page = visit(consent=False)
    found = page.evaluate("""async () => {
      const text = ': ping\\n\\ndata: {"a": "é🦊"}\\r\\n\\r\\ndata: {"a": "中"}\\n\\ndata: [DONE]\\n\\ndata: {}\\n\\n'
      const bytes = [...new TextEncoder().encode(text)]
      const pull = c => bytes.length ? c.enqueue(new Uint8Array([bytes.shift()])) : c.close()
      const stream = new ReadableStream({ pull })
      const found = []
      for await (const frame of frames(stream)) found.push(frame.a)
      return found
    }""")
    assert found == ["é🦊", "中"]


NAMELESS = """() => [...document.querySelectorAll('button, input, select, textarea')].filter(e => e.offsetParent)
    .filter(e => !(e.ariaLabel || e.labels?.[0]?.innerText.trim() || (e.tagName === 'BUTTON' && e.innerText.trim())))
    .map(e => e.outerHTML)"""
SMALL = """() => [...document.querySelectorAll('button, select, textarea')].filter(e => e.offsetParent)
    .filter(e => Math.min(e.getBoundingClientRect().width, e.getBoundingClientRect().height) < 43.5)
    .map(e => e.outerHTML)"""


@needs_browser
def test_a_phone_scrolls_only_down_and_everything_has_a_name(visit):
    page = visit(viewport={"width": 360, "height": 640}, is_mobile=True, has_touch=True)

    def check():
        assert page.evaluate("[document.documentElement.scrollWidth, scroller.scrollWidth]") == [360, 360]
        assert page.evaluate(NAMELESS) == [] and page.evaluate(SMALL) == []

    check()
    canned(page, "w" * 400, "\n\n```\n", "x" * 400, "\n```")
    ask(page, "v" * 400)
    check()
    page.unroute("**/completions")
    press(page, "Compare two answers")
    ask(page, "a")
    check()
    page.get_by_role("button", name="A is better").click()
    page.get_by_role("button", name="Undo").wait_for()
    check()
    for name in ("Earlier chats", "Settings", re.compile("export or train")):
        page.get_by_role("button", name=name).click()
        check()
        page.keyboard.press("Escape")


NAME_OF_FOCUS = """() => {
  const at = document.activeElement, name = at.ariaLabel || at.labels?.[0]?.innerText || at.innerText
  return [name.trim(), getComputedStyle(at).outlineStyle]
}"""


def tab_to(page, name, key="Tab"):
    """Press Tab until the focus is on what has this name, and is seen there."""
    for _ in range(40):
        page.keyboard.press(key)
        found, outline = page.evaluate(NAME_OF_FOCUS)
        if re.fullmatch(name, found):
            assert outline != "none" or found == "Message", f"the focus on {found} is not seen"
            return
    raise AssertionError(f"{name} cannot be reached with {key}")


@needs_browser
def test_the_keyboard_alone_chats_votes_sets_and_compares(visit, url):
    page, (pairs, thumbs, edits) = visit(consent=False), counts(url)
    bodies, type_ = sent(page), page.keyboard.type

    def press_keys(*keys):
        for key in keys:
            page.keyboard.press(key)

    tab_to(page, "Read and decide")
    press_keys("Enter")
    tab_to(page, "Agree")
    press_keys("Enter")
    page.wait_for_function("() => document.activeElement.id === 'input'")
    type_("a b")
    press_keys("Enter")
    answered(page)
    tab_to(page, "Good answer", "Shift+Tab")
    press_keys("Space")
    page.get_by_role("button", name="Good answer", pressed=True).wait_for()
    tab_to(page, "helpful")
    press_keys("Enter")
    page.get_by_role("button", name="helpful", pressed=True).wait_for()
    tab_to(page, "Correct this answer", "Shift+Tab")
    press_keys("Enter")
    page.wait_for_function("() => document.activeElement.ariaLabel === 'New text'")
    type_("yes")  # after what is there
    press_keys("Enter")
    page.get_by_text("corrected by you").wait_for()
    assert counts(url) == (pairs, thumbs + 1, edits + 1)

    tab_to(page, "Settings", "Shift+Tab")
    press_keys("Enter")
    tab_to(page, "Temperature")
    type_("0.5")
    press_keys("Escape")
    page.wait_for_function("() => document.activeElement.id === 'input'")
    tab_to(page, "Compare two answers", "Shift+Tab")
    press_keys("Enter")
    page.wait_for_function("() => document.activeElement.id === 'input'")
    type_("c")
    press_keys("Enter")
    answered(page)
    press_keys("2")
    page.get_by_text("B is better. Stored.").wait_for()
    assert counts(url) == (pairs + 1, thumbs + 1, edits + 1) and bodies[-1]["temperature"] == 0.5
    press_keys("Control+Shift+O")  # a new chat, where one writes at once
    type_("d")
    assert page.get_by_label("Message").input_value() == "d" and answers(page).count() == 0


@needs_browser
def test_a_screen_reader_hears_the_end_once_and_focus_stays(visit):
    page = visit()
    log = page.get_by_role("log")
    assert log.get_attribute("aria-live") == "off"
    ask(page, "a")
    assert page.locator("#announcer").inner_text().startswith("Answer: ")
    assert page.evaluate("document.activeElement.id") == "input"
    press(page, "Good answer")
    page.get_by_role("button", name="Good answer", pressed=True).wait_for()
    assert page.evaluate("document.activeElement.ariaLabel") == "Good answer"  # though the log was drawn anew


def test_the_page_is_one_file_without_html_from_strings():
    text = (ROOT / "ui.html").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\son\w+=|\sstyle=|\ssrc=", text)
    assert text.count('nonce="NONCE"') == 2 and not re.search(r"https?://(?!www\.w3\.org/2000/svg)[a-z]", text)


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(2 * c for c in digits) if len(digits) == 3 else digits
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_of_text_is_readable_in_light_and_dark():
    text = (ROOT / "ui.html").read_text()
    colours = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", text)}
    for ink, *papers in (
        ("text", "page", "raised", "tint"), ("quiet", "page", "raised", "tint"), ("accent", "page", "soft"),
        ("bad", "page", "raised"), ("on-accent", "accent"),
    ):  # fmt: skip
        for paper in papers:
            for theme in (0, 1):
                low, high = sorted(luminance(colours[name][theme]) for name in (ink, paper))
                assert (high + 0.05) / (low + 0.05) >= 4.5, (ink, paper, theme)
