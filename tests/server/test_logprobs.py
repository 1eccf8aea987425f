"""Log-probabilities over HTTP, judged by the openai package: chats and text completions, whole and streamed."""

from __future__ import annotations

import math

import openai
import pytest

from mlx_diffusiongemma import load

from .process import QUESTION, WEATHER

CALL = [{"role": "user", "content": "What is the weather in Paris?"}]
LONG = [{"role": "user", "content": "Count to 40."}]


@pytest.fixture(scope="module")
def alone():
    """Return the pipeline itself: over HTTP nothing may be different."""
    return load("tiny")


def ask(ai, messages=QUESTION, **options):
    given = {"model": "tiny", "messages": messages, "max_tokens": 128, "seed": 1, "logprobs": True, **options}
    return ai.chat.completions.create(**given)


def text(entries):
    return b"".join(bytes(entry.bytes) for entry in entries).decode()


def test_a_chat_has_those_of_its_visible_tokens(ai, alone):
    expected = alone.generate(QUESTION, max_tokens=128, seed=1, guard_empty=True, logprobs=3)
    [choice] = ask(ai, top_logprobs=3).choices
    entries = choice.logprobs.content
    assert choice.logprobs.refusal is None
    assert text(entries) == choice.message.content == expected.text
    assert [entry.logprob for entry in entries] == pytest.approx([entry.logprob for entry in expected.logprobs])
    for entry, own in zip(entries, expected.logprobs, strict=True):
        assert [each.logprob for each in entry.top_logprobs] == pytest.approx([logprob for _, logprob in own.top])
        assert all(bytes(each.bytes).decode(errors="ignore") in (each.token, "") for each in entry.top_logprobs)


def test_without_alternatives(ai):
    [choice] = ask(ai).choices
    assert text(choice.logprobs.content) == choice.message.content
    assert all(entry.top_logprobs == [] for entry in choice.logprobs.content)


def test_those_of_a_stream_come_with_their_text(ai):
    [whole] = ask(ai, LONG, top_logprobs=1).choices
    parts = []
    for chunk in ask(ai, LONG, top_logprobs=1, stream=True):
        [choice] = chunk.choices
        if choice.delta.content:
            assert text(choice.logprobs.content) == choice.delta.content
            parts += choice.logprobs.content
        else:
            assert choice.logprobs is None
    assert len(parts) > 64  # more than a canvas
    assert parts == whole.logprobs.content


def test_a_stop_string_ends_them_where_it_ends_the_text(ai):
    [choice] = ask(ai, LONG, stop=["17, 18"]).choices
    assert choice.message.content
    assert text(choice.logprobs.content) == choice.message.content


def test_thoughts_and_calls_have_none(ai):
    [choice] = ask(ai, CALL, tools=[WEATHER]).choices
    assert choice.message.tool_calls
    assert text(choice.logprobs.content) == (choice.message.content or "")
    [choice] = ask(ai, reasoning_effort="high", max_tokens=256).choices
    assert choice.message.model_extra["reasoning_content"]
    assert text(choice.logprobs.content).strip() == choice.message.content.strip()


def test_choices_have_their_own(ai):
    reply = ask(ai, n=2)
    for choice in reply.choices:
        assert text(choice.logprobs.content) == choice.message.content


def complete(ai, prompt="The sum of 2 and 3 is", **options):
    return ai.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 24, "seed": 2, **options})


def check_offsets(whole, logprobs):
    """Every token stands in the text where its offset says."""
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert whole[offset : offset + len(token)] == token
    assert len(logprobs.token_logprobs) == len(logprobs.top_logprobs) == len(logprobs.tokens)


def test_a_text_completion(ai, alone):
    options = {"max_tokens": 24, "seed": 2, "guard_empty": True, "raw_prompt": True, "logprobs": 2}
    expected = alone.generate("The sum of 2 and 3 is", **options)
    [choice] = complete(ai, logprobs=2).choices
    assert choice.text == expected.text
    assert choice.text
    assert "".join(choice.logprobs.tokens) == choice.text
    check_offsets(choice.text, choice.logprobs)
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    visible = [entry.logprob for entry in expected.logprobs][: len(choice.logprobs.tokens)]
    if len(visible) == len(expected.logprobs):
        assert choice.logprobs.token_logprobs == pytest.approx(visible)


def test_a_prompt_is_scored_where_it_is_repeated(ai, alone):
    prompt = "Wörter 😀 and more"
    [choice] = complete(ai, prompt, echo=True, logprobs=1, max_tokens=0).choices
    assert choice.text == prompt
    expected = alone.score(prompt)
    assert choice.logprobs.token_logprobs == pytest.approx([token.logprob for token in expected.tokens[1:]])
    check_offsets(prompt, choice.logprobs)
    assert math.isclose(sum(choice.logprobs.token_logprobs), expected.total, rel_tol=1e-5)
    [plain] = complete(ai, prompt, logprobs=1).choices
    [both] = complete(ai, prompt, echo=True, logprobs=1).choices
    assert both.text == prompt + plain.text
    assert both.logprobs.tokens == choice.logprobs.tokens + plain.logprobs.tokens
    check_offsets(both.text, both.logprobs)


def test_a_stream_of_a_text_completion(ai):
    [whole] = complete(ai, echo=True, logprobs=1).choices
    parts = [chunk.choices[0] for chunk in complete(ai, echo=True, logprobs=1, stream=True)]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        found = [value for part in parts if part.logprobs is not None for value in getattr(part.logprobs, name)]
        assert found == getattr(whole.logprobs, name)


def test_a_wrong_number_is_refused(ai):
    with pytest.raises(openai.BadRequestError, match="expected an integer <= 20"):
        complete(ai, logprobs=21)
    with pytest.raises(openai.BadRequestError, match="their number in top_logprobs"):
        ask(ai, logprobs=3)


@pytest.mark.parametrize("path", ["/v1/messages", "/api/v1/chat"])
def test_other_dialects_say_where_they_are_given(client, path):
    body = {"model": "tiny", "input": "x", "messages": QUESTION, "max_tokens": 8, "top_logprobs": 2}
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    assert "/v1/chat/completions" in reply.text
