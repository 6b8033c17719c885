"""Pictures of the chat page for docs/, taken in a real browser: python tests/screenshots.py models/smollm2

What it shares with test_page.py: a server of its own for some model folders, and Chromium."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")  # nothing beside the page


@contextlib.contextmanager
def serving(models, feedback, *options):
    """The address of a server for the folders `models`, ready to answer, on a port that was free."""
    command = [sys.executable, "serve.py", "--model", *map(str, models), "--port", "0", "--feedback", str(feedback)]
    with open(f"{feedback}.log", "w+") as log:
        server = subprocess.Popen([*command, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            url = re.search(r"http://\S+?:\d+", server.stdout.readline() or Path(log.name).read_text())
            wait_until_ready(url.group())
            yield url.group()
        finally:
            server.terminate()
            server.wait(30)
            server.stdout.close()


def wait_until_ready(url, seconds=600):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(url + "/health"):
            return
        time.sleep(0.2)
    raise TimeoutError(f"{url} is not ready after {seconds} s")


@contextlib.contextmanager
def browsing():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in QUIET)]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def ask(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")
    answered(page)


def answered(page):
    """Wait until nothing is being written."""
    page.get_by_role("button", name="Send").wait_for()
    page.locator("#log[aria-busy=false]").wait_for()


def open_page(browser, url, consent=True, watch=lambda page: None, **options):
    page = browser.new_context(**options).new_page()
    watch(page)
    page.goto(url)
    page.get_by_role("heading", name=re.compile("Talk to")).wait_for()
    if consent:
        page.get_by_role("button", name="Read and decide").click()
        page.get_by_role("button", name="Agree").click()
    return page


def set_up(page, seed):
    """The seed makes the same pictures of the same models."""
    for line in (f"/seed {seed}", "/temperature 0.3", "/max 200"):
        page.get_by_label("Message").fill(line)
        page.keyboard.press("Enter")


def shoot(page, path):
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # for the count of votes
    page.locator("#note").evaluate("note => note.textContent = ''")
    page.screenshot(path=path, scale="css")
    print(path, f"{path.stat().st_size / 1000:.0f} kB")


def chat(browser, url, path, questions, seed, **options):
    page = open_page(browser, url, **options)
    page.set_default_timeout(300_000)
    set_up(page, seed)
    for question in questions:
        ask(page, question)
    page.get_by_role("button", name="Good answer").last.click()
    page.get_by_role("button", name="Undo").wait_for()
    shoot(page, path)
    page.context.close()


def compare(browser, url, path, question, seed, vote=None, **options):
    page = open_page(browser, url, **options)
    page.set_default_timeout(300_000)
    set_up(page, seed)
    page.evaluate("Math.random = () => 0.1")  # the same sides every time
    page.get_by_role("button", name="Compare").click()
    ask(page, question)
    if vote:
        page.keyboard.press(vote)
        page.get_by_role("button", name="Undo").wait_for()
    shoot(page, path)
    page.context.close()


def main(folders, out=ROOT / "docs", seed=3):
    questions = ["What is a list in Python? Show a short example.", "And how do I sort one?"]
    tips = "Give me three tips for sleeping better, as a numbered list."
    wide, narrow = {"width": 1100, "height": 720}, {"width": 390, "height": 780}
    options = ["--context", "1024", "--slots", "2"]
    with contextlib.ExitStack() as stack:
        browser, tmp = stack.enter_context(browsing()), stack.enter_context(tempfile.TemporaryDirectory())
        url = stack.enter_context(serving(folders, Path(tmp, "feedback.db"), *options))
        for scheme in ("light", "dark"):
            chat(browser, url, out / f"chat-{scheme}.png", questions, seed, viewport=wide, color_scheme=scheme)
        compare(
            browser, url, out / "compare.png", tips, seed, "2", viewport=wide | {"height": 830}, color_scheme="light"
        )
        phone = dict(viewport=narrow, is_mobile=True, has_touch=True, color_scheme="dark")
        compare(browser, url, out / "phone.png", tips, seed, **phone)


if __name__ == "__main__":
    main(sys.argv[1:])
