"""The RAG page in a browser: uploads, streamed answers, citations, keyboard navigation, and narrow screens."""

import contextlib
import shutil
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from language_server import LanguageServer, serving
from playwright.sync_api import expect, sync_playwright

from pilotfish.integrations.rag.answering import Answerer
from pilotfish.integrations.rag.server import create_rag_app
from pilotfish.retrieval import Index

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

FILES = {
    "sharks.txt": "Pilot fish travel with sharks. They eat what sharks leave over, and keep their skin clean.",
    "bread.md": "# Bread\n\nBread is baked from flour and water. The oven has to be hot.",
    "moon.html": "<h1>Moon</h1><p>The moon goes around the earth in a month.</p><script>document.title = 'no'</script>",
}
NASTY = "Prices <img src=x onerror=\"document.title='taken'\"> are <b>bold</b> in the shop of horrors."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Start headless Chromium."""
    with sync_playwright() as playwright:
        expect.set_options(timeout=60_000)  # a busy machine is slow
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, language: LanguageServer) -> Iterator[str]:
    """Serve the page for an empty index with the embedded encoder."""
    with Index.create(tmp_path_factory.mktemp("rag") / "index") as index:
        answerer = Answerer(index, language.url, "by-rule", threshold=0.3)
        with serving(create_rag_app(index, answerer)) as served:
            yield served


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Any]:
    """Open the page, and fail the test on any console error or warning."""
    errors: list[str] = []
    contexts: list[Any] = []

    def opened(refusals: bool = False, **options: Any) -> Any:
        """Open a page; with ``refusals``, ignore console messages about status 4xx."""
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        unexpected = lambda m: m.type in ("error", "warning") and not (refusals and "status of 4" in m.text)  # noqa: E731
        page.on("console", lambda m: errors.append(m.text) if unexpected(m) else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        expect(page.locator("#status")).to_contain_text("by-rule")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def ask(page: Any, question: str) -> str:
    """Type a question, and return the complete answer."""
    page.fill("#question", question)
    page.press("#question", "Enter")
    page.wait_for_selector("#figures dt")
    return page.inner_text("#answer")


def test_upload_ask_and_open_citation(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    assert "0 passages" in page.inner_text("#status") and "rasd" in page.inner_text("#status")
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    page.set_input_files("#files", [str(tmp_path / name) for name in FILES])
    expect(page.locator("#status")).to_contain_text("3 passages")
    assert page.locator("#uploads li").all_inner_texts() == [f"{name}: 1 passage added" for name in FILES]

    page.fill("#question", "slow: whom do pilot fish travel with?")
    page.click("#send")
    expect(page.locator("#answer")).to_contain_text("Pilot")
    assert page.get_attribute("#answer", "aria-busy") == "true", "the answer is shown while it is streamed"
    assert page.inner_text("#answer") != "Pilot fish travel with sharks [1]."
    page.wait_for_selector("#figures dt")
    assert page.get_attribute("#answer", "aria-busy") == "false"
    assert page.inner_text("#answer") == "Pilot fish travel with sharks [1]."
    assert "The answer cites [1]" in page.inner_text("#grounds")
    figures = page.inner_text("#figures")
    assert "draft tokens accepted" in figures and "time to first token" in figures and "40 of the prompt" in figures

    page.click("#answer .cite")
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#passage-id").startswith("sharks.txt")
    marks = " ".join(page.locator("#passage-text mark").all_inner_texts()).lower()
    assert "pilot" in marks and "travel" in marks
    assert "sharks.txt" in page.inner_text("#passage-metadata")
    page.keyboard.press("Escape")
    page.wait_for_selector("dialog[open]", state="detached")
    assert page.title() == "Pilotfish"


def test_keyboard_navigation(open_page: Any) -> None:
    page = open_page()
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("what is bread baked from?")
    page.keyboard.press("Enter")
    page.wait_for_selector("#answer .cite")
    for _ in range(12):  # to the citation, which follows the form
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.className") == "cite":
            break
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Passage 1"
    page.keyboard.press("Enter")
    page.wait_for_selector("dialog[open]")
    assert page.evaluate("document.activeElement.closest('dialog') !== null"), "the focus is in the dialog"
    page.keyboard.press("Enter")  # the first button closes the dialog
    page.wait_for_selector("dialog[open]", state="detached")
    assert page.evaluate("document.activeElement.className") == "cite", "the focus returns to the citation"


def test_narrow_screen(open_page: Any) -> None:
    page = open_page(viewport={"width": 320, "height": 640}, has_touch=True, is_mobile=True)
    assert ask(page, "how long does the moon take around the earth?").endswith("[1].")
    page.tap("#answer .cite")
    page.wait_for_selector("dialog[open]")
    widths = page.evaluate("[document.documentElement.scrollWidth, document.getElementById('passage').scrollWidth]")
    assert max(widths) <= 320, "nothing is cut off"


def test_abstention_filter_and_server_error(open_page: Any) -> None:
    page = open_page()
    assert "do not know" in ask(page, "zzz qqq xxx?")
    assert page.locator("#passages li").count() == 0
    page.click("summary")
    page.fill("#where", "source = 'bread.md'")
    ask(page, "what is baked?")
    assert all("bread" in text for text in page.locator("#passages button").all_inner_texts())
    page.fill("#question", "broken pilot fish?")
    page.fill("#where", "")
    page.press("#question", "Enter")
    page.wait_for_selector("#problem:not([hidden])")
    assert "the engine has died" in page.inner_text("#problem")
    assert page.is_enabled("#send")


def test_html_in_documents_is_escaped(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    (tmp_path / "<i>nasty.txt").write_text(NASTY)
    page.set_input_files("#files", str(tmp_path / "<i>nasty.txt"))
    expect(page.locator("#uploads")).to_contain_text("1 passage added")
    assert "<img src=x" in ask(page, "what is bold in the shop of horrors?").replace("&lt;", "<")
    page.locator("#passages button").first.click()
    page.wait_for_selector("dialog[open]")
    assert page.inner_text("#passage-text") == NASTY
    assert page.locator("main img, main i, main b, dialog img, dialog i, dialog b").count() == 0
    assert page.title() == "Pilotfish"


def test_uploads_are_queued(open_page: Any, tmp_path: Path) -> None:
    page = open_page()
    for name in ("one.txt", "two.txt", "three.txt"):
        (tmp_path / name).write_text(f"This is {name}.")
    page.route("**/documents?*", lambda route: (time.sleep(0.3), route.continue_()))
    page.set_input_files("#files", [str(tmp_path / "one.txt"), str(tmp_path / "two.txt")])
    page.set_input_files("#files", str(tmp_path / "three.txt"))
    expect(page.locator("#uploads li")).to_have_text([f"{n}.txt: 1 passage added" for n in ("one", "two", "three")])
    page.set_input_files("#files", str(tmp_path / "one.txt"))
    expect(page.locator("#uploads li")).to_have_count(4)
    expect(page.locator("#uploads li").last).to_have_text("one.txt: 1 passage added")


@pytest.mark.parametrize("token", ["a+b/c=&d%", "50%", "plain"])
def test_page_accepts_any_token(browser: Any, tmp_path: Path, language: LanguageServer, token: str) -> None:
    with Index.create(tmp_path / "index", "bm25") as index:
        app = create_rag_app(index, Answerer(index, language.url, "by-rule"), token)
        with serving(app) as served, contextlib.closing(browser.new_context()) as context:
            page = context.new_page()
            page.goto(f"{served}/#token=wrong")
            expect(page.locator("#problem")).to_contain_text("send the token")
            page.evaluate("hash => { location.hash = hash }", f"token={token}")  # without a reload
            expect(page.locator("#status")).to_contain_text("by-rule")
            expect(page.locator("#problem")).to_be_hidden()
            context.close()
            other = browser.new_context()
            page = other.new_page()
            page.goto(f"{served}/#token={urllib.parse.quote(token, safe='')}")
            expect(page.locator("#status")).to_contain_text("by-rule")
            other.close()


def test_refused_uploads_are_reported(open_page: Any, tmp_path: Path) -> None:
    page = open_page(refusals=True)
    (tmp_path / "empty.txt").write_text("")
    page.set_input_files("#files", str(tmp_path / "empty.txt"))
    expect(page.locator("#uploads .bad")).to_have_text("empty.txt: the file contains no text")
