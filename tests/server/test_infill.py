"""Holes and edits over HTTP, and what a request may put on the canvas."""

from __future__ import annotations

import json

import pytest

from mlx_diffusiongemma import load
from mlx_diffusiongemma.edit import edit
from mlx_diffusiongemma.infill import infill

from .process import QUESTION

HEAD = "<|turn>user\nWhat is the capital of Peru?<turn|>\n<|turn>model\n"
BEFORE, AFTER = HEAD + "The capital of Peru is ", "."


@pytest.fixture(scope="module")
def alone():
    return load("tiny")


def test_a_suffix_makes_a_hole(ai, alone):
    options = {"suffix": AFTER, "seed": 1, "extra_body": {"infill_length": [1, 2]}}
    reply = ai.completions.create(model="tiny", prompt=BEFORE, **options)
    expected = infill(alone, BEFORE, AFTER, length=[1, 2], seed=1)
    assert reply.object == "text_completion"
    assert reply.choices[0].text == expected.text == "Lima"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens == expected.length
    chunks = list(ai.completions.create(model="tiny", prompt=BEFORE, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Lima"
    both = ai.completions.create(model="tiny", prompt=[BEFORE, BEFORE], n=2, echo=True, **options)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert both.choices[0].text == BEFORE + "Lima"


def test_infill_of_llama_cpp(client, alone):
    body = {"input_prefix": "1, 2, 3,", "input_suffix": ", 5, 6, 7, 8", "seed": 1, "infill_length": [2, 3]}
    expected = infill(alone, "1, 2, 3,", ", 5, 6, 7, 8", length=[2, 3], seed=1)
    reply = client.post("/infill", json=body).json()
    assert reply["content"] == expected.text and reply["stop"] is True
    assert reply["tokens_predicted"] == expected.length and reply["tokens"] == list(expected.token_ids)
    assert reply["model"] == "tiny" and reply["timings"]["diffusion_steps"] == expected.canvas_steps
    lines = client.post("/infill", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    assert [each["stop"] for each in events] == [False, True]
    assert "".join(each["content"] for each in events) == expected.text
    extra = client.post("/infill", json=body | {"input_extra": [{"filename": "a.txt", "text": "1, 2"}], "prompt": " "})
    assert extra.status_code == 200 and extra.json()["tokens_evaluated"] >= reply["tokens_evaluated"]


def test_an_edit(client, alone):
    wrong, question = "The capital of Peru is Rome.", "What is the capital of Peru?"
    body = {"input": wrong, "messages": [{"role": "user", "content": question}], "selection": [23, 27], "seed": 1}
    reply = client.post("/v1/edits", json=body | {"infill_length": [1, 2]}).json()
    expected = edit(alone, wrong, messages=question, selection=(23, 27), length=[1, 2], seed=1)
    [choice] = reply["choices"]
    assert reply["object"] == "edit" and choice["text"] == expected.text == "The capital of Peru is Lima."
    assert choice["diff"] == expected.diff
    assert choice["changes"] == [{"start": 23, "stop": 27, "old": "Rome", "new": "Lima"}]
    assert client.post("/v1/edits", json={"input": wrong, "instruction": "Change Rome to Lima", "seed": 1}).is_success


def test_a_seed_canvas_and_pins(client, alone):
    C = alone.config.canvas_length
    seed = alone.tokenizer.encode("The capital of Peru is Rome.")
    seed += [1] * (C - len(seed))
    body = {"messages": QUESTION, "max_tokens": 5, "seed": 1}
    options = {"max_tokens": 5, "seed": 1, "guard_empty": True, "seed_canvas": seed[:5]}
    expected = alone.generate(QUESTION, pins={0: seed[0], 2: seed[2]}, **options)
    for fields in (
        {"diffusion_seed_canvas": seed, "diffusion_pinned": [0, 2, 40]},
        {"vllm_xargs": {"diffusion_seed_canvas": seed, "diffusion_pinned": [0, 2, 40]}},
    ):
        reply = client.post("/v1/chat/completions", json=body | fields).json()
        assert reply["choices"][0]["message"]["content"] == expected.text


def test_frames_tell_what_is_pinned(client, alone):
    def frames(**fields):
        body = {"messages": QUESTION, "max_tokens": 16, "seed": 1, "stream": True, "diffusion_frames": True, **fields}
        lines = client.post("/v1/chat/completions", json=body).text.split("\n")
        chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return [chunk["diffusion"] for chunk in chunks if chunk.get("type") == "diffusion_frame"]

    free = frames()
    assert free and all(each["pinned"] == [] for each in free)
    seed = alone.tokenizer.encode("The capital of Peru is Rome.")
    seed += [1] * (alone.config.canvas_length - len(seed))
    pinned = frames(diffusion_seed_canvas=seed, diffusion_pinned=[0, 2])
    expected = [place in (0, 2) for place in range(len(seed))]
    assert pinned and all(each["pinned"] == expected for each in pinned)
    for each in frames(regex="It is [a-f]{2}"):
        forced = [token for token, is_pinned in zip(each["tokens"], each["pinned"], strict=True) if is_pinned]
        assert "".join(forced).startswith("It is")


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": "a", "suffix": "b", "infill_length": 0}, "length: got 0"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "stop": "x"}, "stop: expected none where a hole is filled"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "regex": "c"}, "regex: expected none where a hole"),
        ("/v1/edits", {"input": "a", "instruction": "b", "choices": ["c"]}, "choices: expected none where a hole"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "diffusing": True}, "diffusion_frames: got true"),
        ("/v1/completions", {"prompt": "a", "suffix": "b", "n": 1000}, "n: got 1000"),
        ("/infill", {"input_prefix": "a"}, "input_suffix: got nothing"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"text": 1}]}, "input_extra: expected"),
        ("/v1/edits", {"input": "a"}, "instruction: expected an instruction or messages"),
        ("/v1/edits", {"input": "a", "instruction": "b", "selection": [0, 5]}, "selection: stop: got 5"),
        ("/v1/edits", {"input": "a", "instruction": "b", "stream": True}, "stream: got true"),
        ("/v1/chat/completions", {"messages": QUESTION, "diffusion_seed_canvas": [1]}, "expected as many as a canvas"),
        ("/v1/chat/completions", {"messages": QUESTION, "diffusion_pinned": [1]}, "diffusion_pinned: got positions"),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "diffusion_seed_canvas": [1], "diffusion_pinned": [1]},
            "diffusion_pinned: got position 1, expected 0 to 0",
        ),
        (
            "/v1/chat/completions",
            {"messages": QUESTION, "vllm_xargs": {"diffusion_seed_canvas": "x"}},
            "expected a list of integers",
        ),
    ],
)
def test_errors(client, path, body, message):
    reply = client.post(path, json=body)
    assert reply.status_code == 400, reply.text
    assert message in reply.json()["error"]["message"]
