"""LM Studio's dialect: v0 read as strictly as Zed reads it, v1 with its events, loading and unloading."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from pydantic import BaseModel, ConfigDict

from .process import WEATHER, metric, wait_until

SUM = "What is 17 + 25?"
U32 = 2**32


class Strict(BaseModel):
    """Zed's structures: fields without a default must be there, types are not converted, more fields do no harm."""

    model_config = ConfigDict(strict=True)


class ZedModel(Strict):
    id: str
    object: str
    type: Literal["llm", "embeddings", "vlm"]
    publisher: str
    arch: str | None = None
    compatibility_type: Literal["gguf", "mlx"]
    quantization: str | None = None
    state: Literal["loaded", "loading", "not-loaded"]
    max_context_length: int | None = None
    loaded_context_length: int | None = None
    capabilities: list[str] = []


class ZedFunction(Strict):
    name: str | None = None
    arguments: str | None = None


class ZedCall(Strict):
    index: int
    id: str | None = None
    function: ZedFunction | None = None


class ZedDelta(Strict):
    role: Literal["user", "assistant", "system", "tool"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ZedCall] | None = None


class ZedChoice(Strict):
    index: int
    delta: ZedDelta
    finish_reason: str | None = None


class ZedUsage(Strict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ZedChunk(Strict):
    created: int
    model: str
    object: str
    choices: list[ZedChoice]
    usage: ZedUsage | None = None


def zed_chunks(reply):
    """Read a stream as Zed does: only lines that begin with `data: `, space included."""
    assert reply.status_code == 200
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [ZedChunk.model_validate_json(line) for line in lines[:-1]]


def test_zed_lists_the_models(client):
    reply = client.get("/api/v0/models").json()
    assert reply["object"] == "list"
    [model] = [ZedModel.model_validate(each) for each in reply["data"]]
    assert (model.id, model.type, model.state, model.publisher) == ("tiny", "vlm", "loaded", "local")
    assert (model.arch, model.max_context_length, model.loaded_context_length) == ("diffusion_gemma", 4096, 4096)
    assert "tool_use" in model.capabilities and "vision" in model.capabilities
    assert client.get("/api/v0/models/tiny").json() == reply["data"][0]
    assert client.get("/api/v0/models/other").status_code == 404


def test_zed_streams_a_tool_call(client):
    body = {
        "model": "tiny",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is the weather in Paris?"}]},
        ],
        "stream": True,
        "max_tokens": 64,
        "stop": [],
        "temperature": 1.0,
        "tools": [WEATHER],
        "tool_choice": "auto",
        "seed": 1,
    }
    reply = client.post("/api/v0/chat/completions", json=body)
    chunks = zed_chunks(reply)
    assert all(0 <= chunk.created < U32 for chunk in chunks)
    calls = [call for chunk in chunks for choice in chunk.choices for call in choice.delta.tool_calls or ()]
    assert calls[0].function.name == "get_weather" and calls[0].id
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Paris"}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    last = json.loads(reply.text.split("data: ")[-2])
    assert last["stats"]["stop_reason"] == "toolCalls"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 64}, "eosFound"),
        ({"max_tokens": -1, "stop": ["="]}, "stopStringFound"),
        ({"max_tokens": 5}, "maxPredictedTokensReached"),
    ],
)
def test_v0_chat_with_statistics(client, options, reason):
    body = {"model": "tiny", "messages": [{"role": "user", "content": SUM}], "seed": 1, **options}
    reply = client.post("/api/v0/chat/completions", json=body).json()
    same = client.post("/v1/chat/completions", json=body).json()
    assert reply["choices"] == same["choices"] and reply["object"] == "chat.completion"
    stats = reply["stats"]
    assert set(stats) == {"tokens_per_second", "time_to_first_token", "generation_time", "stop_reason"}
    assert stats["stop_reason"] == reason
    assert stats["time_to_first_token"] > 0 and stats["generation_time"] > 0 and stats["tokens_per_second"] > 0
    info = {"arch": "diffusion_gemma", "quant": "bfloat16", "format": "mlx", "context_length": 4096}
    assert reply["model_info"] == info
    assert reply["runtime"]["name"] == "mlx_diffusiongemma" and reply["runtime"]["supported_formats"] == ["mlx"]
    chunks = client.post("/api/v0/chat/completions", json={**body, "stream": True}).text.split("data: ")
    assert json.loads(chunks[-2])["stats"]["stop_reason"] == reason


def test_v0_no_token_at_all_is_a_limit_that_was_kept(client):
    body = {"model": "tiny", "messages": [{"role": "user", "content": SUM}], "max_tokens": 0}
    reply = client.post("/api/v0/chat/completions", json=body).json()
    assert reply["usage"]["completion_tokens"] == 0 and reply["stats"]["stop_reason"] == "maxPredictedTokensReached"


def test_v0_completions(client):
    body = {"model": "tiny", "prompt": "What is", "max_tokens": 1, "seed": 1}
    reply = client.post("/api/v0/completions", json=body).json()
    same = client.post("/v1/completions", json=body).json()
    assert reply["choices"] == same["choices"] and reply["stats"]["stop_reason"] == "maxPredictedTokensReached"
    *chunks, end = client.post("/api/v0/completions", json={**body, "stream": True}).text.strip().split("\n\n")
    last = json.loads(chunks[-1].removeprefix("data: "))
    assert end == "data: [DONE]" and last["choices"][0]["finish_reason"] == "length"
    assert (
        last["stats"].keys() == reply["stats"].keys() and last["stats"]["stop_reason"] == reply["stats"]["stop_reason"]
    )
    assert (last["model_info"], last["runtime"]) == (reply["model_info"], reply["runtime"])
    assert not [chunk for chunk in chunks[:-1] if '"stats"' in chunk]


def chat(client, **options):
    return client.post("/api/v1/chat", json={"model": "tiny", "input": SUM, "seed": 1, **options})


def events_of(reply):
    """Return the data of named events; every one repeats its name as `type`."""
    assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in reply.text.strip().split("\n\n"):
        if block.startswith(":"):
            continue
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_v1_chat(client):
    reply = chat(client, max_output_tokens=64, reasoning="on").json()
    assert reply["model_instance_id"] == "tiny" and reply["response_id"].startswith("resp_")
    thought, message = reply["output"]
    assert thought["type"] == "reasoning" and thought["content"].startswith("Ones: 7 + 5 = 12.")
    assert message == {"type": "message", "content": "42"}
    stats = reply["stats"]
    assert stats["total_output_tokens"] > stats["reasoning_output_tokens"] > 10 < stats["input_tokens"]
    assert stats["tokens_per_second"] > 0 < stats["time_to_first_token_seconds"]
    off = chat(client, reasoning="off", store=False).json()
    assert [item["type"] for item in off["output"]] == ["message"] and "response_id" not in off


def test_v1_chat_streams_events(client):
    events = events_of(chat(client, stream=True, reasoning="on"))
    kinds = [event["type"] for event in events if event["type"] != "prompt_processing.progress"]
    assert kinds == [
        *("chat.start", "prompt_processing.start", "prompt_processing.end"),
        *("reasoning.start", "reasoning.delta", "reasoning.end", "message.start", "message.delta", "message.end"),
        "chat.end",
    ]
    progress = [event["progress"] for event in events if event["type"] == "prompt_processing.progress"]
    assert progress == sorted(progress) and progress[-1] == 1
    whole = chat(client, reasoning="on").json()
    result = events[-1]["result"]
    assert result["output"] == whole["output"] and set(result) == set(whole)
    text = "".join(event["content"] for event in events if event["type"] == "message.delta")
    assert text == result["output"][-1]["content"]


def test_v1_chat_goes_on(client):
    first = chat(client, input="My name is Mia.", system_prompt="Be brief.").json()
    second = chat(client, input="What is my name?", previous_response_id=first["response_id"]).json()
    assert second["output"][-1]["content"] == "Your name is Mia."
    parts = [{"type": "text", "content": "Who am I?"}]
    third = chat(client, input=parts, previous_response_id=first["response_id"]).json()
    assert third["output"][-1]["content"] == "Your name is Mia."
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "My name is Mia."},
        {"role": "assistant", "content": first["output"][-1]["content"]},
        {"role": "user", "content": "What is my name?"},
    ]
    same = client.post("/v1/chat/completions", json={"messages": messages, "seed": 1}).json()
    assert second["stats"]["input_tokens"] == same["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "status", "kind", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"input": [{"type": "image", "data_url": 5}]}, 400, "invalid_request", "input[0]"),
        ({"integrations": ["mcp/playwright"]}, 400, "invalid_request", "integrations"),
        ({"repeat_penalty": 1.1}, 400, "invalid_request", "repeat_penalty"),
        ({"reasoning": "hard"}, 400, "invalid_request", "reasoning"),
        ({"context_length": 100000}, 400, "invalid_request", "context_length"),
        ({"context_length": 5}, 400, "invalid_request", "context_length"),
        ({"previous_response_id": "resp_1"}, 400, "invalid_request", "previous_response_id"),
        ({"model": None}, 400, "invalid_request", "model"),
        ({"input": [{"type": "image", "data_url": "http://169.254.169.254/"}]}, 400, "invalid_request", None),
    ],
)
def test_v1_errors(client, options, status, kind, param):
    for streamed in (False, True):
        reply = chat(client, stream=streamed, **options)
        error = reply.json()["error"]
        assert (reply.status_code, error["type"]) == (status, kind) and error["message"]
        assert param is None or error["param"] == param


def test_models_are_loaded_and_unloaded(start_server):
    server = start_server("--lazy")
    with server.client() as client:
        [model] = client.get("/api/v1/models").json()["models"]
        assert (model["key"], model["type"], model["format"], model["loaded_instances"]) == ("tiny", "llm", "mlx", [])
        assert model["max_context_length"] == 4096 and model["size_bytes"] > 1e6
        assert model["quantization"] == {"name": "bfloat16", "bits_per_weight": None}
        assert model["capabilities"]["vision"] and model["capabilities"]["trained_for_tool_use"]
        assert client.post("/api/v1/models/unload", json={"instance_id": "tiny"}).status_code == 404
        assert client.post("/api/v1/models/load", json={"model": "tiny", "context_length": 0}).status_code == 400
        loaded = client.post("/api/v1/models/load", json={"model": "tiny", "echo_load_config": True}).json()
        assert (loaded["instance_id"], loaded["status"], loaded["type"]) == ("tiny", "loaded", "llm")
        assert loaded["load_time_seconds"] > 0 and loaded["load_config"] == {"context_length": 4096}
        [model] = client.get("/api/v1/models").json()["models"]
        assert model["loaded_instances"] == [{"id": "tiny", "config": {"context_length": 4096, "parallel": 4}}]
        assert client.post("/api/v1/models/unload", json={"instance_id": "tiny"}).json() == {"instance_id": "tiny"}
        assert client.get("/api/v0/models").json()["data"][0]["state"] == "not-loaded"
        events = events_of(chat(client, stream=True))
        shares = [event["progress"] for event in events if event["type"] == "model_load.progress"]
        assert shares == sorted(shares) and shares[0] > 0 and shares[-1] == 1
        events = [event for event in events if event["type"] != "model_load.progress"]
        kinds = [event["type"] for event in events]
        assert kinds[:4] == ["chat.start", "model_load.start", "model_load.end", "prompt_processing.start"]
        assert events[2]["load_time_seconds"] > 0
        assert events[-1]["result"]["stats"]["model_load_time_seconds"] == events[2]["load_time_seconds"]


def test_loading_a_model_that_was_unloaded_for_want_of_requests(start_server):
    server = start_server()
    with server.client() as client:
        chat(client, ttl=0.0, max_output_tokens=1)
        wait_until(lambda: client.get("/api/v0/models").json()["data"][0]["state"] == "not-loaded")
        loads = metric(client, "mlx_diffusiongemma_model_loads_total")
        assert client.post("/api/v1/models/load", json={"model": "tiny"}).json()["load_time_seconds"] > 0.001
        assert metric(client, "mlx_diffusiongemma_model_loads_total") == loads + 1


def test_an_error_in_a_stream_still_ends_the_chat(start_server):
    server = start_server("--lazy")
    with server.client() as client:
        events = events_of(chat(client, stream=True, temperature=-1))
    kinds = list(dict.fromkeys(event["type"] for event in events))  # how often progress is told is up to the clock
    assert kinds == [
        "chat.start",
        "model_load.start",
        "model_load.progress",
        "model_load.end",
        "error",
        "chat.end",
    ]
    assert events[-2]["error"]["type"] == "invalid_request" and events[-2]["error"]["param"] == "temperature"


def test_it_does_not_pretend_to_be_lm_studio(client):
    assert client.get("/lmstudio-greeting").status_code == 404
