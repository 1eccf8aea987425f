"""The web page in headless Chromium, against the real server on `tiny`. What it shows is compared with the API's words.

A browser is needed: CHROMIUM=/path/to/it, one on PATH, or the one that `playwright install chromium` fetches.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

import mlx_diffusiongemma.api.page as page_module
from mlx_diffusiongemma.output import MARKERS

from .browsing import (
    DONE,
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

WEB = page_module.FOLDER
SEEDED = {"seed": "7", "max_tokens": "192", "stability_threshold": "4"}  # more steps than `tiny` takes by itself
ENDLESS = {"max_denoising_steps": "10000", "stability_threshold": "10000"}  # denoises one canvas for minutes


# -- the files, without a browser --------------------------------------------------------------------------------------


def test_the_page_and_its_files_are_served_with_a_strict_policy(client: httpx.Client):
    for name in ["", *(f"web/{file.name}" for file in WEB.iterdir())]:
        reply = client.get(f"/{name}")
        assert reply.status_code == 200, name
        policy = dict(part.split(" ", 1) for part in reply.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data: blob:"
        assert policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
        assert reply.headers["x-content-type-options"] == "nosniff"
        again = client.get(f"/{name}", headers={"If-None-Match": reply.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/web/app.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("name", ["..%2fpage.py", "%2e%2e/page.py", "..%5cpage.py", "%2fetc%2fpasswd", "none.js", ""])
def test_nothing_else_is_served(client: httpx.Client, name: str):
    reply = client.get(f"/web/{name}")
    assert reply.status_code == 404
    assert set(reply.json()) == {"error"}


def test_the_files_name_no_other_origin_and_never_parse_text_as_html():
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")  # the name of a namespace
        assert not re.search(r"https?:|//[a-z]+\.", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b", text), (
            file.name
        )
    index = (WEB / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", index)


def test_the_page_knows_the_markers_of_control_tokens():
    [drawn] = re.findall(r'MARKERS = new Set\("(.+)"\)', (WEB / "canvas.js").read_text(encoding="utf-8"))
    [at_the_end] = re.findall(r"END_MARKERS = new Set\((\[.+\])\)", (WEB / "recording.js").read_text(encoding="utf-8"))
    markers = {*MARKERS.values(), "◦"} - {'"'}  # a quote looks like one
    assert set(drawn) == markers
    assert set(json.loads(at_the_end)) - {""} == {MARKERS["eos"], MARKERS["turn_close"], MARKERS["pad"], "◦"}


def picture(color: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (48, 32), color).save(data, "PNG")
    return data.getvalue()


# -- asking ------------------------------------------------------------------------------------------------------------


@browser_test
def test_an_answer_denoises_before_the_eyes(visit: Visit, client: httpx.Client):
    page = visit.open(**SEEDED, pace="250")
    ask(page)
    answer = page.locator(".answer")
    expect(answer.locator(".progress-text")).to_contain_text(re.compile(r"canvas 1, step \d+ of at most 48"))
    expect(answer.locator(".canvas .token").first).to_be_visible()
    expect(answer).to_have_attribute("aria-busy", "true")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    wait_for_end(page)
    frames, text, timings = recorded(client, **SEEDED)
    assert re.sub(r"\s+", " ", answer.locator(".text").inner_text()).strip() == re.sub(r"\s+", " ", text).strip()
    figures = answer.locator(".figures").inner_text()
    assert f"{timings['predicted_n']} tokens · " in figures
    assert f" · {timings['diffusion_steps']} steps · " in figures
    assert f"{timings['diffusion_tokens_per_forward']:.1f} tokens per forward" in figures
    assert "seed 7" in figures
    assert len(frames) == timings["diffusion_steps"] > 4
    expect(page.get_by_role("button", name="Send")).to_be_visible()


@browser_test
def test_the_conversation_goes_on(visit: Visit):
    page = visit.open(seed="7", max_tokens="64")
    for text in ("Hello!", "What is 17 + 25?"):
        ask(page, text)
        wait_for_end(page)
    assert [message["role"] for message in visit.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert visit.bodies[1]["messages"][1]["content"] == page.locator(".answer .text").first.inner_text().strip()
    page.get_by_role("button", name="Try again").click()
    wait_for_end(page)
    assert visit.bodies[2] == visit.bodies[1]
    expect(page.locator(".answer")).to_have_count(2)
    page.get_by_role("button", name="New chat").click()
    expect(page.get_by_role("heading", name="Watch an answer come into focus")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(0)


@browser_test
def test_stop_ends_the_answer_here_and_on_the_server(visit: Visit, client: httpx.Client):
    page = visit.open(**ENDLESS)
    ask(page)
    expect(page.locator(".progress-text")).to_contain_text("canvas 1, step")
    assert active_requests(client) == 1
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(page.locator(".canvas .token").first).to_be_visible()  # the draft stays
    expect(page.get_by_role("status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    for _ in range(100):
        if active_requests(client) == 0:
            return
        page.wait_for_timeout(100)
    raise AssertionError("the server goes on with a stopped answer")


def active_requests(client: httpx.Client) -> float:
    found = re.search(r"^mlx_diffusiongemma_requests_running(?:\{.*\})? (\S+)$", client.get("/metrics").text, re.M)
    assert found
    return float(found[1])


@browser_test
def test_images_are_sent_as_data_urls(visit: Visit, tmp_path: Path):
    page = visit.open(max_tokens="64")
    files = {name: tmp_path / name for name in ("red.png", "blue.png", "words.txt")}
    files["red.png"].write_bytes(picture("red"))
    files["blue.png"].write_bytes(picture("blue"))
    files["words.txt"].write_text("no image")
    page.locator("#files").set_input_files([files["red.png"], files["blue.png"]])
    expect(page.get_by_role("img", name="blue.png")).to_be_visible()
    page.get_by_role("button", name="Remove red.png").click()
    expect(page.locator("#attachments li")).to_have_count(1)
    page.locator("#files").set_input_files(files["words.txt"])
    expect(page.locator("#composer-error")).to_have_text("words.txt is text/plain, expected PNG, JPEG, WebP or GIF.")
    ask(page, "What is in this picture?")
    wait_for_end(page)
    url = f"data:image/png;base64,{base64.b64encode(picture('blue')).decode()}"
    assert visit.bodies[0]["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "What is in this picture?"},
            ],
        }
    ]
    expect(page.locator(".answer .error")).to_have_count(0)
    expect(page.locator(".question").get_by_role("img", name="blue.png")).to_be_visible()
    expect(page.locator("#attachments li")).to_have_count(0)


@browser_test
def test_parameters_are_sent_kept_and_reset(visit: Visit):
    page = visit.open()
    page.get_by_role("button", name="Parameters", exact=True).click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Think before answering").check()
    page.get_by_label("Tokens at most").fill("64")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Steps per canvas").fill("12")
    ask(page, "Hello!")
    wait_for_end(page)
    sent = visit.bodies[0]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (sent["enable_thinking"], sent["max_tokens"], sent["temperature"]) == (True, 64, 0.5)
    assert sent["max_denoising_steps"] == 12
    assert "seed" not in sent and "top_k" not in sent  # empty: the server's default
    stored = json.loads(page.evaluate("localStorage.getItem('diffusiongemma.parameters')"))
    assert (stored["system"], stored["enable_thinking"], stored["temperature"]) == ("Be brief.", True, "0.5")
    page.get_by_role("button", name="Reset").click()
    expect(page.get_by_label("Temperature")).to_have_value("")
    page.get_by_label("Tokens at most").fill("0")
    ask(page, "Hello!")
    assert len(visit.bodies) == 1  # what cannot be right is not sent
    expect(page.get_by_label("Tokens at most")).to_be_focused()


@browser_test
def test_thinking_is_shown_apart_from_the_answer(visit: Visit):
    page = visit.open(seed="3", max_tokens="128")
    page.get_by_role("button", name="Parameters", exact=True).click()
    page.get_by_label("Think before answering").check()
    ask(page, "What is the capital of France?")
    wait_for_end(page)
    thought = page.locator(".answer .reasoning")
    expect(thought).to_be_visible()
    thought.locator("summary").click()
    assert thought.locator(".reasoning-text").inner_text().strip()
    assert "Paris" in page.locator(".answer .text").inner_text()


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@browser_test
def test_errors_are_shown_in_the_words_of_the_server(visit: Visit, client: httpx.Client):
    page = visit.open(top_p="0")
    ask(page)
    wait_for_end(page)
    reply = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}], "top_p": 0})
    assert reply.status_code == 400
    expect(page.locator(".answer").get_by_role("alert")).to_have_text(reply.json()["error"]["message"])
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@browser_test
@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([chunk({"content": "Half"})], "The connection ended before the answer did."),
        ([chunk(), 'data: {"error": {"message": "the model failed"}}\n\n'], "the model failed"),
    ],
    ids=["cut", "failed"],
)
def test_answers_that_break_off_are_told(visit: Visit, events: list[str], expected: str):
    page = visit.open()
    answer_with(page, *events)
    ask(page)
    expect(page.locator(".answer").get_by_role("alert")).to_have_text(expected)
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer .replay")).to_be_visible()
    expect(page.locator(".answer").get_by_role("alert")).to_have_count(0)


@browser_test
def test_a_server_that_is_gone_is_told(visit: Visit):
    page = visit.open()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page)
    expect(page.locator(".answer").get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")


@browser_test
def test_text_is_text_whoever_wrote_it(visit: Visit):
    evil = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b> &amp; [a](javascript:alert(3))"
    page = visit.open()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    events = [
        frame([evil, " ", evil], [True, False, True]),
        chunk({"reasoning_content": evil}),
        chunk({"content": evil}),
    ]
    answer_with(page, *events, chunk(finish="stop"), DONE)
    ask(page, evil)
    wait_for_end(page)
    for place in (".question .text", ".answer .text", ".answer .reasoning-text"):
        assert page.locator(place).text_content() == evil
    assert page.locator("#conversation :is(img, script, b, a, iframe)").count() == 0
    rewind(page)
    assert page.locator(".canvas").text_content() == f"{evil} {evil}"
    assert page.locator("#conversation :is(img, script, b, a, iframe)").count() == 0
    assert dialogs == []


@browser_test
def test_a_key_is_asked_for_where_the_server_wants_one(browser: Browser, start_server: Any):
    server = start_server(env={"MLX_DIFFUSIONGEMMA_API_KEY": "right"})
    visit = Visit(browser, server.url)
    page = visit.page
    page.goto("/")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("API key: got none")
    for key in ("wrong", "right"):
        page.get_by_label("Key", exact=True).fill(key)
        page.keyboard.press("Enter")
        if key == "wrong":
            expect(dialog).to_contain_text("API key: got a wrong one")
    expect(dialog).to_be_hidden()
    expect(page.locator("#model option")).to_have_text(["tiny"])
    ask(page, "Hello!")
    wait_for_end(page)
    assert page.locator(".answer .text").inner_text().strip()
    assert page.evaluate("Object.values(localStorage).join()").find("right") < 0  # it is kept in the tab only
    visit.close()


# -- replay and charts -------------------------------------------------------------------------------------------------


@browser_test
def test_the_slider_replays_every_step(visit: Visit, client: httpx.Client):
    page = visit.open(**SEEDED)
    ask(page)
    wait_for_end(page)
    frames, _, timings = recorded(client, **SEEDED)
    slider = page.get_by_role("slider", name="Denoising step")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", str(len(frames)))
    expect(slider).to_have_attribute("aria-valuetext", "Finished answer")
    slider.focus()
    page.keyboard.press("Home")
    for index in range(4):
        detail = frames[index]["diffusion"]
        expect(page.locator(".where")).to_contain_text(f"Step {index + 1} of {len(frames)}")
        shown = page.locator(".canvas .token")
        assert "".join(shown.all_text_contents()) == "".join(detail["tokens"][: shown.count()])
        settled = [bool(page_class) for page_class in shown.evaluate_all("n => n.map(t => t.matches('.settled'))")]
        assert settled == detail["settled"][: len(settled)]
        page.keyboard.press("ArrowRight")
    assert timings["diffusion_steps_per_block"]
    page.keyboard.press("End")
    expect(slider).to_have_attribute("aria-valuetext", "Finished answer")
    expect(page.locator(".canvas .token")).to_have_count(0)
    page.get_by_role("button", name="Replay the denoising").click()
    expect(slider).to_have_attribute("aria-valuetext", re.compile("^Step"))
    page.get_by_role("button", name="Pause the replay").click()
    expect(page.get_by_role("button", name="Replay the denoising")).to_be_visible()


@browser_test
def test_the_charts_show_the_numbers_of_the_server(visit: Visit, client: httpx.Client):
    page = visit.open(**SEEDED)
    ask(page)
    wait_for_end(page)
    frames, _, timings = recorded(client, **SEEDED)
    steps = timings["diffusion_steps_per_block"]
    expected = f"Steps per canvas, by canvas: {', '.join(map(str, steps))}. Mean {sum(steps) / len(steps):.1f}."
    expect(page.get_by_role("img", name=expected)).to_be_visible()
    mean = f"Mean {timings['diffusion_tokens_per_forward']:.1f}."
    expect(
        page.get_by_role("img", name=re.compile(f"^Tokens per forward, by canvas: .*{re.escape(mean)}"))
    ).to_be_visible()
    settling = page.get_by_role("img", name=f"Settled positions and mean entropy over {len(frames)} steps")
    expect(settling).to_be_visible()
    assert page.locator(".charts .bar").count() == 2 * len(steps)


@browser_test
def test_tokens_are_coloured_by_entropy(visit: Visit):
    page = visit.open()
    levels = [0.0, 0.1, 0.5, 1.5, 3.0]
    detail = {"tokens": [f"w{n} " for n in range(6)], "settled": [True] + [False] * 5}
    detail |= {"entropies": [0.0, *levels], "mean_entropy": 1.0}
    answer_with(page, frame([], [], diffusion=detail), chunk({"content": "x"}), chunk(finish="stop"), DONE)
    ask(page)
    wait_for_end(page)
    rewind(page)
    expect(page.locator(".canvas .token")).to_have_count(6)
    classes = page.locator(".canvas .token").evaluate_all("nodes => nodes.map(node => node.className)")
    assert classes == ["token settled", *(f"token heat-{level}" for level in range(5))]
    page.wait_for_timeout(600)  # the transition
    colors = page.locator(".canvas .token").evaluate_all("nodes => nodes.map(node => getComputedStyle(node).color)")
    assert len(set(colors)) == 6


# -- everybody ---------------------------------------------------------------------------------------------------------


@browser_test
def test_the_keyboard_is_enough(visit: Visit):
    page = visit.open(**ENDLESS)
    prompt = page.get_by_label("Message", exact=True)
    expect(prompt).to_be_focused()
    back_to(page, "Skip to the prompt")
    page.keyboard.press("Enter")
    expect(prompt).to_be_focused()
    page.keyboard.type("Tell me")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("a story.")
    expect(prompt).to_have_value("Tell me\na story.")
    page.keyboard.press("Enter")
    expect(page.locator(".question .text")).to_have_text("Tell me\na story.")
    expect(page.locator(".progress-text")).to_contain_text("canvas 1, step")
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(page.locator(".figures")).to_contain_text("stopped")
    expect(prompt).to_be_focused()
    for name in ("Attach images", "Charts", "Denoising step", "Replay the denoising", "Try again", "Parameters"):
        back_to(page, name)
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_label("System prompt")).to_be_hidden()
    expect(page.get_by_role("button", name="Parameters", exact=True)).to_be_focused()


def back_to(page: Page, name: str) -> None:
    """Go backwards through the page until something has the focus."""
    seen = []
    while name not in seen:
        assert len(seen) < 15, f"{name} cannot be reached: {seen}"
        page.keyboard.press("Shift+Tab")
        seen.append(
            page.evaluate("(({ ariaLabel, textContent }) => ariaLabel ?? textContent.trim())(document.activeElement)")
        )


@browser_test
def test_screen_readers_hear_certain_text_once_and_no_drafts(visit: Visit, client: httpx.Client):
    page = visit.open(**SEEDED, pace="80")
    page.evaluate(
        """() => {
          window.heard = [];
          const watch = new MutationObserver((records) => {
            for (const record of records) for (const node of record.addedNodes) {
              const live = node.parentElement?.closest("[role=status], [role=log], [role=alert], [aria-live]");
              if (live && node.textContent) window.heard.push([live.role, node.textContent]);
            }
          });
          watch.observe(document.body, { childList: true, subtree: true, characterData: true });
        }"""
    )
    ask(page)
    expect(page.locator(".canvas .token").first).to_be_visible()
    expect(page.locator(".canvas")).to_have_attribute("aria-hidden", "true")
    wait_for_end(page)
    frames, text, _ = recorded(client, **SEEDED)
    expect(page.get_by_role("status")).to_have_text(f"The answer is finished, after {len(frames)} denoising steps.")
    heard = page.evaluate("window.heard")
    assert "".join(said for role, said in heard if role == "log") == text
    assert [said for role, said in heard if role != "log"] == [
        "The answer is being made.",
        f"The answer is finished, after {len(frames)} denoising steps.",
    ]


@browser_test
def test_every_control_has_a_name(visit: Visit):
    page = visit.open(seed="7", max_tokens="64")
    page.get_by_role("button", name="Parameters", exact=True).click()
    ask(page, "Hello!")
    wait_for_end(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input:not([hidden]), select, textarea, summary, [role=img]")]
          .filter((node) => !(node.ariaLabel || node.labels?.[0]?.textContent.trim() || node.textContent.trim()))
          .map((node) => node.outerHTML)"""
    )
    assert nameless == []
    for role in ("banner", "main", "complementary"):
        expect(page.get_by_role(role)).to_have_count(1)
    assert page.get_by_role("heading", level=1).inner_text().strip() == "DiffusionGemma"


@browser_test
@pytest.mark.parametrize("width", [320, 390])
def test_narrow_screens(browser: Browser, server: Any, width: int):
    visit = Visit(browser, server.url, viewport={"width": width, "height": 700}, has_touch=True)
    page = visit.open(**SEEDED)
    ask(page)
    wait_for_end(page)
    assert_fits(page, width)
    page.get_by_role("button", name="Parameters", exact=True).tap()
    expect(page.get_by_label("Temperature")).to_be_in_viewport()
    assert_fits(page, width)
    page.get_by_role("button", name="Close the parameters").tap()
    expect(page.get_by_label("Temperature")).to_be_hidden()
    page.get_by_role("slider", name="Denoising step").fill("0")
    assert_fits(page, width)
    visit.close()


@browser_test
def test_dark_and_light(visit: Visit):
    page = visit.page
    page.emulate_media(color_scheme="dark")
    visit.open()
    assert lightness(page) < 60
    page.get_by_role("button", name="Use the light theme").click()
    assert lightness(page) > 200
    page.reload()
    assert lightness(page) > 200  # the choice is kept
    page.get_by_role("button", name="Use the dark theme").click()
    page.emulate_media(color_scheme="light")  # what was chosen is what the system has: it is followed again
    assert lightness(page) > 200
    expect(page.get_by_role("button", name="Use the dark theme")).to_be_visible()


def lightness(page: Page) -> float:
    color = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


@browser_test
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_text_is_legible(visit: Visit, scheme: str):
    """Every colour of tokens has a contrast of 4.5 on its background (WCAG 2.2, AA)."""
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    visit.open()
    pairs = page.evaluate(
        """() => ["ink on paper", "soft on paper", "soft on sunken", "soft on raised", "on-accent on accent",
                  "bad on bad-wash", "ink on accent-wash", ...[0, 1, 2, 3, 4].map((n) => `heat-ink-${n} on heat-${n}`)]
          .map((pair) => {
            const [front, back] = pair.split(" on ");
            const node = document.body.appendChild(document.createElement("p"));
            node.style.color = `var(--${front})`;
            node.style.backgroundColor = `var(--${back})`;
            const { color, backgroundColor } = getComputedStyle(node);
            node.remove();
            return [pair, color, backgroundColor];
          })"""
    )
    low = [f"{pair}: {contrast(front, back):.2f}" for pair, front, back in pairs if contrast(front, back) < 4.5]
    assert low == []


def contrast(one: str, other: str) -> float:
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    shares = [float(number) / 255 for number in re.findall(r"[\d.]+", color)[:3]]
    linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@browser_test
@pytest.mark.parametrize(("motion", "moves"), [("reduce", False), ("no-preference", True)])
def test_reduced_motion_is_respected(visit: Visit, motion: str, moves: bool):
    page = visit.page
    page.emulate_media(reduced_motion=motion)
    visit.open()
    answer_with(page, frame(["one"], [False]), chunk({"content": "one"}), chunk(finish="stop"), DONE)
    ask(page)
    wait_for_end(page)
    rewind(page)
    style = page.locator(".canvas .token").first.evaluate("n => getComputedStyle(n).animationName")
    assert (style != "none") == moves
