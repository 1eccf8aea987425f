"""Pinned tokens on the page, and selected text that is rewritten in place."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from .browsing import (
    DONE,
    PATIENCE,
    Visit,
    answer_with,
    ask,
    assert_fits,
    browser_test,
    chunk,
    frame,
    recorded,
    rewind,
    wait_for_end,
)

QUESTION = "What is the capital of Peru?"
WRONG, RIGHT = "The capital of Peru is Rome.", "The capital of Peru is Lima."
ROME = {"start": 23, "stop": 27, "old": "Rome", "new": "Lima"}
FORMATTED = "# Foxes 🦊\n\nA **quick brown** fox, `code` and\n- one 🦊 two\n- three"
FIND = """(word) => {
  const text = [...document.querySelectorAll(".answer .text")].at(-1);
  const walker = document.createTreeWalker(text, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const start = walker.currentNode.data.indexOf(word);
    if (start >= 0) return [walker.currentNode, start];
  }
}"""


def answered(page: Page, text: str, question: str = QUESTION) -> None:
    """Ask, and get a text for an answer whatever the model would say."""
    answer_with(page, frame(["a", "b"], [True, False]), chunk({"content": text}), chunk(finish="stop"), DONE)
    ask(page, question)
    wait_for_end(page)


def edits_with(page: Page, text: str, *changes: dict[str, Any]) -> None:
    """Let requests for an edit get this instead of the server's."""
    choice = {"index": 0, "text": text, "diff": "", "changes": changes}
    page.route("**/v1/edits", lambda route: route.fulfill(json={"object": "edit", "choices": [choice]}))


def double_click(page: Page, word: str) -> None:
    """Select a word of the last answer with the mouse."""
    x, y = page.evaluate(
        f"""(word) => {{
          const [node, start] = ({FIND})(word);
          const range = document.createRange();
          range.setStart(node, start);
          range.setEnd(node, start + word.length);
          const {{ x, y, width, height }} = range.getBoundingClientRect();
          return [x + width / 2, y + height / 2];
        }}""",
        word,
    )
    page.mouse.dblclick(x, y)


def select(page: Page, first: str, last: str) -> None:
    """Select from the beginning of one piece of the last answer to the end of another."""
    page.evaluate(
        f"""([first, last]) => {{
          const [from, start] = ({FIND})(first);
          const [to, stop] = ({FIND})(last);
          getSelection().setBaseAndExtent(from, start, to, stop + last.length);
        }}""",
        [first, last],
    )


def rewrite(page: Page) -> None:
    page.get_by_role("button", name="Rewrite selection").click()


def text_of(page: Page) -> Any:
    return page.locator(".answer .text").last


# -- rewriting ---------------------------------------------------------------------------------------------------------


@browser_test
def test_a_selection_is_rewritten_in_place(visit: Visit):
    """The answer is made up, what is wrong in it is the model's to find."""
    page = visit.open(seed="1", system="Be brief.", stop="x", max_tokens="64", enable_thinking=True)
    answered(page, WRONG)
    double_click(page, "Rome")
    rewrite(page)
    expect(text_of(page)).to_have_text(RIGHT, timeout=PATIENCE)
    sent = visit.bodies[-1]
    question = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    assert sent == {"model": "tiny", "messages": question, "input": WRONG, "selection": [[23, 27]], "seed": 1}
    expect(page.locator(".answer ins")).to_have_text(["Lima"])
    expect(page.get_by_role("status")).to_have_text("“Rome” became “Lima”.")
    expect(page.get_by_role("button", name="Rewrite selection")).to_be_hidden()
    rewind(page)
    expect(page.locator(".canvas")).to_have_text("ab")  # the replay shows what happened
    page.keyboard.press("End")
    expect(text_of(page)).to_have_text(RIGHT)
    answered(page, "No.", "Are you sure?")
    assert visit.bodies[-1]["messages"][2] == {"role": "assistant", "content": RIGHT}
    page.get_by_role("button", name="Undo the rewriting").click()
    expect(page.locator(".answer .text").first).to_have_text(WRONG)
    expect(page.locator(".answer ins")).to_have_count(0)
    expect(page.get_by_role("button", name="Undo the rewriting")).to_be_hidden()
    answered(page, "Yes.", "And now?")
    assert visit.bodies[-1]["messages"][2] == {"role": "assistant", "content": WRONG}


@browser_test
@pytest.mark.parametrize(
    ("first", "last", "chosen"),
    [
        ("Foxes", "Foxes", "Foxes"),
        ("🦊 two", " two", "🦊 two"),
        ("brown", "two", "brown** fox, `code` and\n- one 🦊 two"),
        (" fox, ", " and", "fox, `code` and"),
        ("code", "code", "code"),
    ],
)
def test_what_is_selected_is_a_part_of_the_source(visit: Visit, first: str, last: str, chosen: str):
    page = visit.open()
    answered(page, FORMATTED)
    select(page, first, last)
    start = FORMATTED.index(chosen)
    change = {"start": start, "stop": start + len(chosen), "old": chosen, "new": "🐶 new"}
    edits_with(page, FORMATTED.replace(chosen, "🐶 new", 1), change)
    rewrite(page)
    expect(page.locator(".answer ins")).to_have_text(["🐶 new"])
    sent = visit.bodies[-1]
    assert (sent["input"], sent["selection"]) == (FORMATTED, [[start, start + len(chosen)]])
    page.get_by_role("button", name="Undo the rewriting").click()
    expect(page.locator(".answer .text")).to_have_text("Foxes 🦊A quick brown fox, code andone 🦊 twothree")


@browser_test
@pytest.mark.parametrize(
    ("new", "marked", "said"),
    [
        (RIGHT, ["Lima."], "“Rome.” became “Lima.”."),
        ("The 🦊 capital of Peru is Rome.", ["🦊 "], "“🦊” was added."),
        ("The capital is Rome.", [], "“of Peru” was removed."),
        ("A town of Peru is Rome.", ["A town"], "“The capital” became “A town”."),
        ("Rome.", [], "“The capital of Peru is” was removed."),
    ],
)
def test_only_what_became_different_is_marked(visit: Visit, new: str, marked: list[str], said: str):
    page = visit.open()
    answered(page, f"🦊🦊 {WRONG}")
    select(page, "The", "Rome.")
    edits_with(page, f"🦊🦊 {new}", {"start": 3, "stop": 3 + len(WRONG), "old": WRONG, "new": new})
    rewrite(page)
    expect(text_of(page)).to_have_text(f"🦊🦊 {new}")
    expect(page.get_by_role("status")).to_have_text(said)
    assert page.locator(".answer ins").all_text_contents() == marked
    expect(page.locator(".answer .notice")).to_have_text([] if marked else [said])


@browser_test
def test_an_earlier_answer_is_rewritten_in_its_own_conversation(visit: Visit):
    page = visit.open()
    answered(page, WRONG)
    double_click(page, "Rome")
    answered(page, "No.", "Are you sure?")
    expect(page.get_by_role("button", name="Rewrite selection")).to_be_hidden()
    edits_with(page, RIGHT, ROME)
    page.get_by_role("button", name="Rewrite", exact=True).first.click()
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(page.locator(".answer .text")).to_have_text([RIGHT, "No."])
    assert visit.bodies[-1]["messages"] == [{"role": "user", "content": QUESTION}]


@browser_test
def test_the_keyboard_is_enough_to_rewrite(visit: Visit):
    page = visit.open()
    answered(page, WRONG)
    edits_with(page, RIGHT, ROME)
    begin = page.get_by_role("button", name="Rewrite", exact=True)
    bar = page.get_by_role("group", name="Selected text")
    begin.focus()
    page.keyboard.press("Enter")
    expect(bar).to_contain_text("Arrow keys choose a word")
    page.keyboard.press("Escape")
    expect(bar).to_be_hidden()
    expect(begin).to_be_focused()
    assert page.evaluate("getSelection().toString()") == ""
    page.keyboard.press("Enter")
    for keys, words in [
        (["ArrowRight"], "capital"),
        (["Shift+ArrowRight"], "capital of"),
        (["ArrowLeft"], "capital"),
        (["Shift+End"], "capital of Peru is Rome"),
        (["Home"], "The"),
        (["End", "Shift+ArrowLeft"], "is Rome"),
    ]:
        for key in keys:
            page.keyboard.press(key)
        expect(page.get_by_role("status")).to_have_text(f"Selected: {words}")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Rewrite selection")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".answer ins")).to_have_text(["Lima"])
    assert visit.bodies[-1]["selection"] == [[20, 27]]
    expect(begin).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    expect(text_of(page)).to_have_text(WRONG)
    expect(begin).to_be_focused()


@browser_test
def test_a_rewriting_that_fails_changes_nothing(visit: Visit, client: httpx.Client):
    page = visit.open(top_p="0")
    answered(page, WRONG)
    double_click(page, "Rome")
    rewrite(page)
    reply = client.post("/v1/edits", json={"input": "a", "instruction": "b", "top_p": 0})
    assert reply.status_code == 400
    expect(page.locator(".answer").get_by_role("alert")).to_have_text(reply.json()["error"]["message"])
    expect(text_of(page)).to_have_text(WRONG)
    page.route("**/v1/edits", lambda route: route.abort())
    double_click(page, "Rome")
    rewrite(page)
    expect(page.locator(".answer").get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")
    expect(page.get_by_role("button", name="Undo the rewriting")).to_be_hidden()
    edits_with(page, WRONG)
    double_click(page, "Rome")
    rewrite(page)
    expect(page.locator(".answer .notice")).to_have_text("The model would write the same again.")
    expect(page.locator(".answer").get_by_role("alert")).to_have_count(0)
    expect(text_of(page)).to_have_text(WRONG)


@browser_test
def test_escape_stops_a_rewriting(visit: Visit):
    page = visit.open()
    answered(page, WRONG)
    page.route("**/v1/edits", lambda route: None)  # is never answered
    double_click(page, "Rome")
    rewrite(page)
    expect(page.get_by_role("button", name="Rewriting…")).to_be_visible()
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_role("group", name="Selected text")).to_be_hidden()
    expect(text_of(page)).to_have_text(WRONG)


@browser_test
def test_only_text_of_one_finished_answer_can_be_rewritten(visit: Visit):
    page = visit.open()
    bar = page.get_by_role("group", name="Selected text")
    answered(page, WRONG)
    double_click(page, "Rome")
    expect(bar).to_be_visible()
    page.mouse.click(5, 400)
    expect(bar).to_be_hidden()
    rewind(page)
    for selector in (".canvas", ".question .text", ".figures"):
        page.locator(selector).dblclick()
        assert page.evaluate("getSelection().toString()").strip()
        page.wait_for_timeout(300)
        expect(bar).to_be_hidden()
    page.get_by_role("slider", name="Denoising step").press("End")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('#conversation'))")
    page.wait_for_timeout(300)
    expect(bar).to_be_hidden()


@browser_test
def test_rewritten_text_is_text(visit: Visit):
    evil = "<img src=x onerror=alert(1)><b>bold</b>"
    page = visit.open()
    answered(page, WRONG)
    edits_with(page, WRONG.replace("Rome", evil), ROME | {"new": evil})
    double_click(page, "Rome")
    rewrite(page)
    expect(page.locator(".answer ins")).to_have_text([evil])
    assert page.locator("#conversation :is(img, script, b, a, iframe)").count() == 0


@browser_test
@pytest.mark.parametrize("width", [320, 390])
def test_the_bar_fits_narrow_screens(browser: Browser, server: Any, width: int):
    visit = Visit(browser, server.url, viewport={"width": width, "height": 700}, has_touch=True)
    page = visit.open()
    answered(page, "Foxes are clever animals that live in many countries of the world, in forests and in towns.")
    bar = page.get_by_role("group", name="Selected text")
    for first, last in [("Foxes", "Foxes"), ("countries", "countries"), ("Foxes", "towns.")]:
        select(page, first, last)
        expect(bar).to_be_in_viewport()
        assert_fits(page, width)
    page.get_by_role("button", name="Rewrite", exact=True).tap()
    expect(bar).to_contain_text("Arrow keys")
    assert_fits(page, width)
    visit.close()


# -- pinned tokens -----------------------------------------------------------------------------------------------------


@browser_test
def test_pinned_tokens_are_underlined(visit: Visit):
    page = visit.open()
    detail = {"tokens": ["one ", "two ", "three"], "settled": [True, False, True], "pinned": [True, True, False]}
    detail |= {"entropies": [0.0, 0.0, 0.5], "mean_entropy": 0.2}
    frames = [frame([], [], diffusion=detail), frame(["a", "b"], [True, True], step=2)]
    answer_with(page, *frames, chunk({"content": "x"}), chunk(finish="stop"), DONE)
    ask(page)
    wait_for_end(page)
    rewind(page)
    tokens = page.locator(".canvas .token")
    expect(tokens).to_have_count(3)
    classes = tokens.evaluate_all("nodes => nodes.map(node => node.className)")
    assert classes == ["token settled pinned", "token heat-0 pinned", "token settled"]
    lines = tokens.evaluate_all("nodes => nodes.map(node => getComputedStyle(node.lastChild).textDecorationLine)")
    assert lines == ["underline", "underline", "none"]
    legend = page.locator(".replay .pin-legend")
    expect(legend).to_have_text("pinned")
    expect(legend).to_be_visible()
    expect(page.locator(".where")).to_contain_text("2 of 3 settled · 2 pinned · entropy")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".canvas .pinned")).to_have_count(0)
    expect(legend).to_be_hidden()
    expect(page.locator(".where")).not_to_contain_text("pinned")


@browser_test
def test_what_a_pattern_forces_is_pinned_while_the_answer_is_made(visit: Visit, client: httpx.Client):
    given = {"seed": "7", "max_tokens": "64", "stability_threshold": "4", "regex": r"Once there was a [a-z]{3,8}\."}
    page = visit.open(**given, pace="250")
    ask(page)
    expect(page.locator(".progress .pin-legend")).to_be_visible()
    expect(page.locator(".canvas .pinned").first).to_be_visible()
    wait_for_end(page)
    assert re.fullmatch(given["regex"], text_of(page).inner_text().strip())
    frames, _, _ = recorded(client, **given)
    rewind(page)
    for each in frames[:4]:
        expect(page.locator(".where")).to_contain_text(f"step {each['step']} of")
        shown = page.locator(".canvas .token").evaluate_all("nodes => nodes.map(node => node.matches('.pinned'))")
        expected = each["diffusion"]["pinned"][: len(shown)] or [False] * len(shown)
        assert shown == expected
        page.keyboard.press("ArrowRight")
    assert any(frames[0]["diffusion"]["pinned"])
