"""The chat page in headless Chromium, driven by its keyboard and its buttons. Needs llmjax[browser] and a Chromium of the machine's own (`chromium` or
`google-chrome` on the path); passed over without."""
import re
import shutil
import time

import pytest
import serving

from llmjax import decode

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.fixture(scope="module")
def web():
    web = serving.Web(serving.make_model(context=1024))
    yield web
    web.close()


@pytest.fixture(scope="module")
def browser():
    driver = pytest.importorskip("playwright.sync_api")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, web):
    """The page, with ann's key, greedy answers of at most 12 tokens; what the page logs as an error fails the test."""
    web.engine.delay = 0.0
    context = browser.new_context(viewport=dict(width=1200, height=800))
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(web.base + "/")
    for name, value in dict(key="k-ann", temperature="0", max_tokens="12").items():
        page.fill("#" + name, value)
        page.dispatch_event("#" + name, "change")
    page.wait_for_function("() => document.getElementById('model').textContent === 'tiny'")
    yield page
    context.close()
    assert not wrong


def said(page, role="assistant"):
    return [box.locator("div").last.inner_text() for box in page.locator(f"article.{role}").all()]


def ended(page):
    page.wait_for_function("() => document.getElementById('stop').disabled && !document.getElementById('send').disabled")


def greedy(web, *turns):
    """What the model says, offline, to turns of user and assistant."""
    messages = [dict(role=role, content=text) for role, text in zip(["user", "assistant"] * len(turns), turns)]
    tokenizer = web.engine.tokenizer
    ids = list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    return decode.complete(web.engine.model, web.engine.params, tokenizer, [ids], max_new_tokens=12)[0].text


def test_a_conversation_by_keyboard(page, web):
    page.focus("#text")
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    ended(page)
    first = said(page)
    assert said(page, "user") == ["One\ntwo"] and [x.strip() for x in first] == [greedy(web, "One\ntwo").strip()]
    assert re.fullmatch(r"[\d.]+ tokens/s", page.inner_text("#speed"))
    assert page.evaluate("() => document.activeElement.id") == "text", "the next message can be typed at once"
    page.keyboard.type("Three")
    page.keyboard.press("Enter")
    ended(page)
    assert len(said(page)) == 2 and said(page, "user")[1] == "Three"
    stored = page.evaluate("() => JSON.parse(localStorage.getItem('llmjax.talks'))[0].messages.map(m => m.content)")
    assert stored[:2] == ["One\ntwo", stored[1]] and said(page)[1].strip() == greedy(web, *stored[:3]).strip(), "the second turn carries the first"


def test_history_outlives_the_page_and_is_deleted(page):
    page.fill("#text", "Remember this")
    page.click("#send")
    ended(page)
    page.reload()
    page.wait_for_function("() => document.getElementById('model').textContent === 'tiny'")
    assert page.evaluate("() => localStorage.getItem('llmjax.key')") is None, "the key is kept in this tab alone"
    page.click("#list li button:first-child")
    assert said(page, "user") == ["Remember this"] and len(said(page)) == 1
    page.keyboard.press("Alt+n")
    assert said(page, "user") == []
    page.click("#list li button[aria-label^=Delete]")
    assert page.locator("#list li").count() == 0


def test_stop_keeps_what_was_said_and_frees_the_engine(page, web):
    web.engine.delay = 0.05
    page.fill("#max_tokens", "600")
    page.dispatch_event("#max_tokens", "change")
    for way in (lambda: page.click("#stop"), lambda: page.keyboard.press("Escape")):
        page.fill("#text", "Go on")
        page.click("#send")
        page.wait_for_function("() => document.querySelectorAll('article.assistant').length && document.querySelector('article.assistant:last-of-type div').textContent.length > 3")
        assert page.is_enabled("#stop") and page.is_disabled("#send")
        way()
        ended(page)
        assert len(said(page)[-1]) > 3
        until = time.monotonic() + 30
        while web.engine.pages.used and time.monotonic() < until:
            time.sleep(0.05)
        assert web.engine.pages.used == 0
        page.click("#new")


def test_errors_are_shown_in_words(page):
    page.fill("#key", "wrong")
    page.dispatch_event("#key", "change")
    page.wait_for_function("() => document.getElementById('model').textContent.includes('key')")
    page.fill("#text", "Hello")
    page.click("#send")
    page.wait_for_selector("article.error")
    assert "key" in said(page, "error")[0]
    ended(page)
    page.fill("#key", "k-ann")
    page.dispatch_event("#key", "change")
    page.fill("#top_p", "7")
    page.fill("#text", "Again")
    page.click("#send")
    page.wait_for_function("() => document.querySelector('article.error')?.textContent.includes('top_p')")


def test_markup_in_an_answer_is_text(page):
    page.fill("#text", "<img src=x onerror=\"document.title='broken'\">")
    page.click("#send")
    ended(page)
    assert page.locator("article img").count() == 0 and page.title() == "llmjax chat" and said(page, "user")[0].startswith("<img")


def test_on_a_phone(browser, web):
    context = browser.new_context(viewport=dict(width=360, height=640), has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(web.base + "/")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360, "nothing to scroll sideways"
    assert page.is_hidden("#side") and page.get_attribute("#more", "aria-expanded") == "false"
    page.tap("#more")
    assert page.is_visible("#temperature") and page.get_attribute("#more", "aria-expanded") == "true"
    page.tap("#more")
    for name in ("send", "stop", "more"):
        box = page.locator("#" + name).bounding_box()
        assert box["height"] >= 44 and box["x"] + box["width"] <= 360, "a finger hits it (WCAG 2.5.5: 44 pixels)"
    assert float(page.evaluate("() => parseFloat(getComputedStyle(document.getElementById('text')).fontSize)")) >= 16, "a phone does not zoom in on it"
    context.close()
