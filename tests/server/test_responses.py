"""The Responses API, judged by the openai package: events, items, memory, tools, reasoning, Codex's warm-up, errors."""

from __future__ import annotations

import json

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from mlx_diffusiongemma.api.errors import ApiError
from mlx_diffusiongemma.api.responses_input import messages_of
from mlx_diffusiongemma.api.store import Store, Stored

SUM = "What is 17 + 25?"
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Get the weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
EVENT = TypeAdapter(ResponseStreamEvent)
INCLUDED = "message.output_text.logprobs"


def given(text=SUM, **options):
    return {"model": "tiny", "input": text, "max_output_tokens": 64, "extra_body": {"seed": 1}, **options}


def kinds(events):
    return [event.type.removeprefix("response.") for event in events]


def test_a_response(ai):
    response = ai.responses.create(**given(metadata={"a": "b"}, instructions="Be brief."))
    Response.model_validate(response.model_dump(), strict=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": SUM}]
    same = ai.chat.completions.create(model="tiny", max_tokens=64, seed=1, messages=messages)
    assert (response.object, response.status, response.model, response.error) == ("response", "completed", "tiny", None)
    assert response.output_text == same.choices[0].message.content
    assert (response.metadata, response.instructions, response.tool_choice) == ({"a": "b"}, "Be brief.", "auto")
    usage = response.usage
    assert (usage.input_tokens, usage.output_tokens) == (same.usage.prompt_tokens, same.usage.completion_tokens)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert response.completed_at >= response.created_at


def test_the_events_of_a_plain_answer(ai):
    events = list(ai.responses.create(**given("Count to 40.", max_output_tokens=160), stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1, "one piece per canvas"
    assert kinds(events) == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *(["output_text.delta"] * len(deltas)),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        EVENT.validate_python(event.model_dump(), strict=True)
    whole = ai.responses.create(**given("Count to 40.", max_output_tokens=160))
    final = events[-1].response
    assert final.output_text == whole.output_text == "".join(deltas)
    assert events[0].response.status == "in_progress" and events[0].response.output == []
    assert events[0].response.id == final.id and final.status == "completed"
    assert events[-2].item == final.output[0] and events[-2].item.status == "completed"


def test_the_stream_of_the_package(ai):
    with ai.responses.stream(**given(reasoning={"effort": "high"})) as stream:
        list(stream)
        response = stream.get_final_response()
    assert response.output_text == "42"


@pytest.mark.parametrize("streamed", [False, True])
def test_reasoning_items(ai, streamed):
    reply = ai.responses.create(**given(reasoning={"effort": "medium"}), stream=streamed)
    events = list(reply) if streamed else []
    response = events[-1].response if streamed else reply
    thought, message = response.output
    assert thought.type == "reasoning" and thought.content[0].text.startswith("Ones: 7 + 5 = 12.")
    assert (message.type, message.content[0].text) == ("message", "42")
    assert response.usage.output_tokens_details.reasoning_tokens > 10
    if streamed:
        part = [
            "output_item.added",
            "content_part.added",
            "{}.delta",
            "{}.done",
            "content_part.done",
            "output_item.done",
        ]
        expected = [name.format("reasoning_text") for name in part] + [name.format("output_text") for name in part]
        assert kinds(events) == ["created", "in_progress", *expected, "completed"]
        assert [event.output_index for event in events if hasattr(event, "output_index")] == [0] * 6 + [1] * 6
    off = ai.responses.create(**given(reasoning={"effort": "none"}))
    assert [item.type for item in off.output] == ["message"]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("remembered", [False, True])
def test_tools_round_trip(ai, streamed, remembered):
    question = "What is the weather in Paris?"
    reply = ai.responses.create(**given(question, tools=[WEATHER], store=remembered), stream=streamed)
    events = list(reply) if streamed else []
    first = events[-1].response if streamed else reply
    [call] = first.output
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Paris"}')
    assert first.tools[0].name == "get_weather" and first.status == "completed"
    if streamed:
        assert kinds(events)[2:-1] == [
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done"),
        ]
        assert events[2].item.arguments == "" and events[4].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rainy, 12 degrees"}
    if remembered:
        more = {"previous_response_id": first.id, "input": [result]}
    else:
        items = [item.model_dump(exclude_none=True) for item in first.output]
        more = {"input": [{"role": "user", "content": question}, *items, result]}
    second = ai.responses.create(**given(tools=[WEATHER]) | more)
    assert second.output_text == "The weather in Paris is rainy, 12 degrees."


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_demanded_call_is_the_one_that_was_meant(ai, choice):
    reply = ai.responses.create(**given("What is the weather in Paris?", tools=[WEATHER], tool_choice=choice))
    [call] = reply.output
    assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", '{"city": "Paris"}')


def test_json_of_a_schema(ai):
    schema = {"type": "object", "properties": {"sum": {"enum": [42, 43]}}, "required": ["sum"]}
    schema["additionalProperties"] = False
    wanted = {"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}}
    assert type(json.loads(ai.responses.create(**(given() | {"text": wanted})).output_text)["sum"]) is int


def test_previous_response_id_goes_on_without_the_instructions(ai):
    first = ai.responses.create(**given("My name is Mia.", instructions="Be brief."))
    second = ai.responses.create(**given("What is my name?", previous_response_id=first.id))
    assert second.output_text == "Your name is Mia." and second.previous_response_id == first.id
    messages = [
        {"role": "user", "content": "My name is Mia."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "What is my name?"},
    ]
    same = ai.chat.completions.create(model="tiny", max_tokens=64, seed=1, messages=messages)
    assert second.usage.input_tokens == same.usage.prompt_tokens
    branch = ai.responses.create(**given("Who am I?", previous_response_id=first.id))
    assert branch.output_text == "Your name is Mia."


def test_what_is_remembered(ai):
    kept = ai.responses.create(**given())
    assert ai.responses.retrieve(kept.id).model_dump() == kept.model_dump()
    streamed = list(ai.responses.create(**given(), stream=True))[-1].response
    assert ai.responses.retrieve(streamed.id).output_text == streamed.output_text
    with pytest.raises(openai.BadRequestError, match="only background responses"):
        ai.responses.cancel(kept.id)
    ai.responses.delete(kept.id)
    for call in (ai.responses.retrieve, ai.responses.delete, ai.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(kept.id)
    with pytest.raises(openai.BadRequestError) as caught:
        ai.responses.create(**given(previous_response_id=kept.id))
    assert caught.value.code == "previous_response_not_found" and caught.value.param == "previous_response_id"
    forgotten = ai.responses.create(**given(store=False))
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(forgotten.id)


def test_codex_warms_up(start_server):
    """`codex --oss` asks for the models, then for nothing at all, before its first question."""
    server = start_server("--lazy")
    with server.openai() as ai:
        [model] = ai.models.list().data
        assert model.model_extra["state"] == "not-loaded"
        response = ai.responses.create(model=model.id, input="", max_output_tokens=1)
        assert (response.status, response.output, response.usage.total_tokens) == ("completed", [], 0)
        assert ai.models.list().data[0].model_extra["state"] == "loaded"
        events = list(ai.responses.create(model=model.id, input="", max_output_tokens=1, stream=True))
        assert kinds(events) == ["created", "in_progress", "completed"]
        assert [event.sequence_number for event in events] == [0, 1, 2]


CODEX = {
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": SUM}]},
    ],
    "tools": [WEATHER, {"type": "web_search", "external_web_access": False}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0",
    "text": {"verbosity": "medium"},
}


def test_codex_asks(ai):
    events = list(ai.responses.create(model="tiny", **CODEX, max_output_tokens=100, extra_body={"seed": 1}))
    response = events[-1].response
    assert response.status in ("completed", "incomplete") and response.output
    assert [tool.name for tool in response.tools] == ["get_weather"], "what the model has, without the search"
    assert response.parallel_tool_calls is False


def test_one_token(ai):
    response = ai.responses.create(**given(max_output_tokens=1))
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.usage.output_tokens == 1 and response.output[-1].status == "incomplete"
    events = list(ai.responses.create(**given(max_output_tokens=1), stream=True))
    assert kinds(events)[-2:] == ["output_item.done", "incomplete"] and events[-2].item.status == "incomplete"


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"background": True}, "background", "got true, expected false"),
        ({"max_output_tokens": 0}, "max_output_tokens", "got 0, expected at least 1"),
        ({"conversation": "conv_1"}, "conversation", "keeps no such objects"),
        ({"tool_choice": "required"}, "tool_choice", "expected tools, got none"),
        ({"tool_choice": {"type": "function", "name": "x"}, "tools": [WEATHER]}, "tool_choice", "x"),
        ({"tools": [{"type": "code_interpreter", "container": "a"}]}, "tools[0]", "expected function"),
        ({"text": {"format": {"type": "xml"}}}, "response_format", "'xml'"),
        ({"top_logprobs": 2}, "top_logprobs", "got 2 alone, expected message.output_text.logprobs in include"),
        ({"include": [INCLUDED], "top_logprobs": 21}, "top_logprobs", "got 21, expected 0 to 20"),
        ({"extra_body": {"logprobs": True}}, "logprobs", "expected none, and message.output_text.logprobs in include"),
        ({"reasoning": {"effort": "odd"}}, "reasoning.effort", "got 'odd', expected one of none"),
        ({"temperature": -1}, "temperature", "got -1"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0]", "got an item of type 'item_reference'"),
        ({"input": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "input[0].content[0]", "'input_audio'"),
        ({"extra_body": {"diffusion_frames": True}}, "diffusion_frames", "/v1/chat/completions only"),
    ],
)
def test_what_is_refused(ai, change, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ai.responses.create(**given() | change)
    assert caught.value.param == param and message in caught.value.body["message"]


@pytest.mark.parametrize(
    "change",
    [
        {"text": {"format": "json"}},
        {"reasoning": {"effort": []}},
        {"tool_choice": {"type": []}},
        {"tool_choice": {"type": "allowed_tools", "mode": {}, "tools": [1]}},
        {"tools": [{"type": "function", "name": 5}]},
        {"input": [{"type": "reasoning", "content": 5}]},
        {"input": [{"role": [], "content": "a"}]},
        {"input": [{"role": "user", "content": [{"type": []}]}]},
        {"input": [{"type": "function_call", "call_id": [], "name": {}, "arguments": 5}]},
        {"input": [{"type": "function_call_output", "call_id": {}, "output": None}]},
        {"n": 2},
        {"max_output_tokens": "many"},
    ],
)
def test_odd_types_are_refused(client, change):
    reply = client.post("/v1/responses", json={"model": "tiny", "input": SUM, "max_output_tokens": 1, **change})
    assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text


def test_the_server_ends_in_the_middle_of_a_stream(start_server):
    server = start_server()
    slow = {"seed": 1, "confidence_threshold": 1e-9, "stability_threshold": 1000, "max_denoising_steps": 500}
    with server.openai() as ai:
        events = []
        for event in ai.responses.create(**given(extra_body=slow), stream=True):
            events.append(event)
            if len(events) == 2:
                server.process.terminate()
    assert kinds(events) == ["created", "in_progress", "failed"]
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message == "the server is shutting down"
    assert server.wait() == 0


def test_items_become_messages():
    call = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}", "id": "fc_1"}
    items = [
        {"role": "developer", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "auto"}],
        },
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        call,
        {"type": "function_call_output", "call_id": "call_1", "output": [{"type": "input_text", "text": "ok"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]},
    ]
    function = {"name": "f", "arguments": "{}"}
    assert messages_of(items) == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "ok"},
        {"role": "assistant", "content": "Done."},
    ]


def test_log_probabilities(ai):
    """The numbers are those of a chat; in a stream they come with the text that they belong to."""
    asked = given("Count to 40.", max_output_tokens=160, include=[INCLUDED], top_logprobs=2)
    messages = [{"role": "user", "content": "Count to 40."}]
    options = {"model": "tiny", "max_tokens": 160, "seed": 1, "logprobs": True, "top_logprobs": 2}
    chat = ai.chat.completions.create(messages=messages, **options).choices[0].logprobs.content
    response = ai.responses.create(**asked)
    Response.model_validate(response.model_dump(), strict=True)
    part = response.output[0].content[0]
    assert response.top_logprobs == 2
    assert [each.model_dump() for each in part.logprobs] == [each.model_dump() for each in chat]
    assert b"".join(bytes(each.bytes) for each in part.logprobs).decode() == part.text
    events = list(ai.responses.create(**asked, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1 and all(delta.logprobs for delta in deltas)
    for delta in deltas:
        EVENT.validate_python(delta.model_dump(), strict=True)
        assert "".join(each.token for each in delta.logprobs) == delta.delta
    streamed = [(each.token, each.logprob) for delta in deltas for each in delta.logprobs]
    assert streamed == [(each.token, each.logprob) for each in chat]
    [done] = [event for event in events if event.type == "response.output_text.done"]
    assert [each.token for each in done.logprobs] == [each.token for each in chat]
    assert events[-1].response.output[0].content == response.output[0].content
    plain = ai.responses.create(**given()).output[0].content[0]
    assert plain.logprobs == []


def test_the_memory_is_bounded():
    store = Store(max_entries=3, max_characters=100)
    for number in range(5):
        store.put(str(number), Stored({"text": "x" * 10}, ()))
    assert [key for key in "01234" if store.get(key)] == ["2", "3", "4"]
    store.get("2")
    store.put("5", Stored({}, ()))
    assert [key for key in "2345" if store.get(key)] == ["2", "4", "5"], "the one that was used is kept"
    store.put("large", Stored({}, [{"role": "user", "content": "x" * 80}]))
    assert [key for key in ("2", "4", "5", "large") if store.get(key)] == ["5", "large"], "100 characters in all"
    store.put("too large", Stored({"text": "x" * 200}, ()))
    assert store.get("too large") is None and len(store) == 0
    assert store.delete("none") is False
    with pytest.raises(ApiError, match="expected the id of a response that is remembered"):
        store.conversation("none")
    assert list(store.conversation(None)) == []
