"""Anthropic's dialect, judged by the anthropic package: streams, tools, thinking, stop sequences, Claude Code."""

from __future__ import annotations

import base64
import io
import json

import anthropic
import pytest
from PIL import Image

from mlx_diffusiongemma.api.anthropic_input import messages_of

SUM = "What is 17 + 25?"
WEATHER = {
    "name": "get_weather",
    "description": "Get the weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


@pytest.fixture
def claude(server):
    """Return an Anthropic client of the shared server."""
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as made:
        yield made


def given(text=SUM, **options):
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "max_tokens": 64, "messages": messages, "extra_body": {"seed": 1}, **options}


def test_a_message(claude, ai):
    message = claude.messages.create(**given())
    same = ai.chat.completions.create(model="tiny", max_tokens=64, seed=1, messages=[{"role": "user", "content": SUM}])
    assert message.type == "message" and message.role == "assistant" and message.model == "tiny"
    [block] = message.content
    assert (block.type, block.text) == ("text", same.choices[0].message.content)
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == same.usage.prompt_tokens
    assert usage.output_tokens == same.usage.completion_tokens
    assert usage.output_tokens_details.thinking_tokens == 0


def test_a_stream_adds_up_to_the_message(claude):
    whole = claude.messages.create(**given("Count to 40.", max_tokens=160))
    with claude.messages.stream(**given("Count to 40.", max_tokens=160)) as stream:
        events = list(stream)
        message = stream.get_final_message()
    assert [block.text for block in message.content] == [whole.content[0].text]
    assert message.stop_reason == whole.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens
    assert message.usage.cache_read_input_tokens > 0, "the same prompt for the second time"
    assert "".join(event.text for event in events if event.type == "text") == whole.content[0].text
    assert sum(event.type == "text" for event in events) > 1, "one piece per canvas"


def test_the_order_of_events(claude):
    stream = claude.messages.create(**given(thinking={"type": "enabled", "budget_tokens": 1024}), stream=True)
    events = list(stream)
    start = events[0].message
    assert (start.type, start.role, start.content, start.stop_reason) == ("message", "assistant", [], None)
    assert start.usage.input_tokens + start.usage.cache_read_input_tokens > 10 and start.usage.output_tokens == 0
    kinds = [event.delta.type if event.type == "content_block_delta" else event.type for event in events]
    assert kinds == [
        "message_start",
        *("content_block_start", "thinking_delta", "signature_delta", "content_block_stop"),
        *("content_block_start", "text_delta", "content_block_stop"),
        *("message_delta", "message_stop"),
    ]
    assert [event.index for event in events if hasattr(event, "index")] == [0] * 4 + [1] * 3
    assert events[-2].delta.stop_reason == "end_turn"


def test_thinking_blocks(claude):
    message = claude.messages.create(**given(thinking={"type": "adaptive"}))
    thought, text = message.content
    assert thought.type == "thinking" and thought.thinking.startswith("Ones: 7 + 5 = 12.") and thought.signature
    assert text.text == "42" and message.usage.output_tokens_details.thinking_tokens > 10
    hidden = claude.messages.create(**given(thinking={"type": "adaptive", "display": "omitted"}))
    assert (hidden.content[0].thinking, hidden.content[1].text) == ("", "42")
    off = claude.messages.create(**given(thinking={"type": "disabled"}))
    assert [block.type for block in off.content] == ["text"]


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_round_trip(claude, streamed):
    question = {"role": "user", "content": "What is the weather in Paris?"}
    options = {"model": "tiny", "max_tokens": 64, "tools": [WEATHER], "extra_body": {"seed": 1}}
    if streamed:
        with claude.messages.stream(messages=[question], **options) as stream:
            asked = stream.get_final_message()
    else:
        asked = claude.messages.create(messages=[question], **options)
    assert asked.stop_reason == "tool_use"
    [call] = asked.content
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert call.id.startswith("toolu_")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "rainy, 12 degrees"}]}
    told = {"role": "assistant", "content": asked.content}
    answer = claude.messages.create(messages=[question, told, {"role": "user", "content": [result]}], **options)
    assert answer.content[0].text == "The weather in Paris is rainy, 12 degrees."
    assert answer.stop_reason == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_demanded_call_is_the_one_that_was_meant(claude, choice):
    message = claude.messages.create(**given("What is the weather in Paris?", tools=[WEATHER], tool_choice=choice))
    [call] = message.content
    assert (message.stop_reason, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})


def test_json_of_a_schema(claude):
    schema = {"type": "object", "properties": {"sum": {"enum": [42, 43]}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    wanted = {"output_config": {"format": {"type": "json_schema", "schema": schema}}}
    message = claude.messages.create(**given(extra_body={"seed": 1, **wanted}))
    assert type(json.loads(message.content[0].text)["sum"]) is int


def test_stop_sequence_across_a_canvas_border(claude):
    text = claude.messages.create(**given("Count to 40.", max_tokens=160)).content[0].text
    for stop, streamed in ((", 18, 19", False), (", 34, 35", True)):
        options = given("Count to 40.", max_tokens=160, stop_sequences=["never", stop])
        if streamed:
            with claude.messages.stream(**options) as stream:
                message = stream.get_final_message()
        else:
            message = claude.messages.create(**options)
        assert message.content[0].text == text.split(stop)[0]
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", stop)


def test_max_tokens(claude):
    message = claude.messages.create(**given("Count to 40.", max_tokens=10))
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 10)


def test_the_beginning_of_the_answer(claude):
    start = {"role": "assistant", "content": "1, 2, 3, 4, 5, 6, 7, "}
    options = given("Count to 12.")
    message = claude.messages.create(**{**options, "messages": [*options["messages"], start]})
    assert message.content[0].text.strip().startswith("8, 9")


def test_count_tokens_is_what_a_message_takes(claude):
    options = {"model": "tiny", "system": "Be brief.", "tools": [WEATHER], "messages": given()["messages"]}
    count = claude.messages.count_tokens(**options).input_tokens
    usage = claude.messages.create(**options, max_tokens=1).usage
    assert count == usage.input_tokens + usage.cache_read_input_tokens
    assert count > claude.messages.count_tokens(model="tiny", messages=options["messages"]).input_tokens


def test_an_image(claude):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(buffer.getvalue()).decode()}
    content = [{"type": "text", "text": SUM}, {"type": "image", "source": source}]
    with_image = claude.messages.create(**given(content, max_tokens=1)).usage
    without = claude.messages.create(**given(max_tokens=1)).usage
    assert with_image.input_tokens + with_image.cache_read_input_tokens > without.input_tokens + 4
    for url in ("http://169.254.169.254/a.png", "file:///etc/passwd"):
        block = {"type": "image", "source": {"type": "url", "url": url}}
        with pytest.raises(anthropic.BadRequestError, match="expected a data URL"):
            claude.messages.create(**given([block]))


def test_models(claude, client):
    [model] = claude.models.list()
    assert (model.id, model.type, model.display_name) == ("tiny", "model", "tiny")
    assert model.created_at.year > 2024
    assert claude.models.retrieve("tiny") == model
    with pytest.raises(anthropic.NotFoundError) as caught:
        claude.models.retrieve("other")
    assert caught.value.body["error"]["type"] == "not_found_error"
    assert client.get("/v1/models").json()["data"][0]["object"] == "model", "other clients get OpenAI's form"


# What Claude Code sends when it starts: a probe, then a long system text in blocks, many tools, and thinking.
HEADERS = {"anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14", "x-app": "cli"}
EPHEMERAL = {"cache_control": {"type": "ephemeral"}}


def test_claude_code(start_server):
    server = start_server("--alias", "claude-local", env={"MLX_DIFFUSIONGEMMA_API_KEY": "secret"})
    client = anthropic.Anthropic(base_url=server.url, api_key="secret", max_retries=0, default_headers=HEADERS)
    metadata = {"user_id": "user_0_account__session_1"}
    probe = client.beta.messages.create(
        model="claude-local",
        max_tokens=1,
        messages=[{"role": "user", "content": "quota"}],
        metadata=metadata,
    )
    assert (probe.usage.output_tokens, probe.stop_reason) == (1, "max_tokens")
    tools = [{**WEATHER, "name": f"tool_{number}", **(EPHEMERAL if number == 19 else {})} for number in range(20)]
    reminder = {"type": "text", "text": "<system-reminder>\nBe brief.\n</system-reminder>"}
    with client.beta.messages.stream(
        model="claude-local",
        max_tokens=32000,
        system=[
            {"type": "text", "text": "You are Claude Code.", **EPHEMERAL},
            {"type": "text", "text": "You are an interactive CLI tool.", **EPHEMERAL},
        ],
        messages=[{"role": "user", "content": [reminder, {"type": "text", "text": SUM, **EPHEMERAL}]}],
        tools=[*tools, WEATHER],
        metadata=metadata,
        thinking={"type": "enabled", "budget_tokens": 31999},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        betas=["context-management-2025-06-27"],
        extra_body={"seed": 1, "temperature": 1},
    ) as stream:
        message = stream.get_final_message()
    assert message.type == "message" and message.content and message.stop_reason is not None
    count = client.beta.messages.count_tokens(
        model="claude-local", tools=tools, messages=[{"role": "user", "content": "x"}]
    )
    assert count.input_tokens > 100
    with pytest.raises(anthropic.AuthenticationError) as caught:
        anthropic.Anthropic(base_url=server.url, api_key="wrong", max_retries=0).messages.create(**given())
    assert caught.value.body["error"]["type"] == "authentication_error"
    bearer = anthropic.Anthropic(base_url=server.url, auth_token="secret", api_key=None, max_retries=0)
    assert bearer.messages.create(**given()).content[0].text


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": "other"}, anthropic.NotFoundError, "model: got 'other', expected one of 'tiny'"),
        ({"max_tokens": -1}, anthropic.BadRequestError, "max_tokens: got -1, expected at least 0"),
        ({"messages": []}, anthropic.BadRequestError, "messages: got [], expected a list of at least one message"),
        ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "temperature: got -1"),
        ({"tool_choice": {"type": "any"}}, anthropic.BadRequestError, "a call is demanded; expected tools, got none"),
        ({"thinking": {"type": "deep"}}, anthropic.BadRequestError, "expected a type of enabled"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, anthropic.BadRequestError, "runs no tools itself"),
        ({"system": [{"type": "image"}]}, anthropic.BadRequestError, "system[0]: got {'type': 'image'}"),
        (
            {"output_config": {"format": {"type": "xml"}}},
            anthropic.BadRequestError,
            "output_config.format: got {'type': 'xml'}, expected type json_schema and a schema",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            anthropic.BadRequestError,
            "messages[0].content[0]: got a block of type 'audio', expected text, image, document or tool_result",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": "b"}]}]},
            anthropic.BadRequestError,
            "is a tool result, expected an assistant message with tool_calls before it",
        ),
    ],
)
def test_errors_by_class(claude, change, error, message):
    with pytest.raises(error) as caught:
        claude.messages.create(**{**given(), **change})
    assert caught.value.body["type"] == "error"
    kind = "not_found_error" if error is anthropic.NotFoundError else "invalid_request_error"
    assert caught.value.body["error"]["type"] == kind
    assert message in caught.value.body["error"]["message"]


def test_a_body_without_max_tokens(client):
    reply = client.post("/v1/messages", json={"model": "tiny", "messages": given()["messages"]})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("max_tokens: got nothing, expected")


@pytest.mark.parametrize(
    "change",
    [
        {"tool_choice": {"type": []}},
        {"thinking": {"type": {}}},
        {"tools": [{"name": 5, "input_schema": []}]},
        {"tools": [{"type": [], "name": "a"}]},
        {"system": [5]},
        {"messages": [{"role": [], "content": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "document", "source": 5}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": 5}}]}]},
        {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": [], "name": {}, "input": 5}]}]},
        {"n": 2},
        {"diffusion_frames": True},
        {"stop_sequences": [""]},
    ],
)
def test_odd_types_are_refused(client, change):
    body = {"model": "tiny", "max_tokens": 1, "messages": given()["messages"], **change}
    reply = client.post("/v1/messages", json=body)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error", reply.text


def test_the_server_ends_in_the_middle_of_a_stream(start_server):
    server = start_server()
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.APIStatusError) as caught:
        options = given(
            "Tell me a story about a fox.", max_tokens=4000, extra_body={"seed": 1, "max_denoising_steps": 48}
        )
        options["extra_body"] |= {"confidence_threshold": 1e-9, "stability_threshold": 1000}
        for number, _ in enumerate(client.messages.create(**options, stream=True)):
            if number == 0:
                server.process.terminate()
    assert caught.value.body["error"] == {"type": "overloaded_error", "message": "the server is shutting down"}
    assert server.wait() == 0


def test_blocks_become_messages():
    tool = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}
    body = {
        "system": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two.", **EPHEMERAL}],
        "given": [
            {"role": "user", "content": [{"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "x"}, tool]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "toolu_1", "is_error": True, "content": "no such file"},
                    {"type": "text", "text": "Try again."},
                ],
            },
            {"role": "assistant", "content": "Sure"},
        ],
    }
    call = {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert messages_of(**body) == (
        [
            {"role": "system", "content": "One.\nTwo."},
            {"role": "user", "content": [{"type": "text", "text": "Go."}]},
            {"role": "assistant", "content": "", "reasoning_content": "Hm.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "toolu_1", "content": "Error: no such file"},
            {"role": "user", "content": [{"type": "text", "text": "Try again."}]},
        ],
        "Sure",
    )
