"""Bodies: what is read, what is refused, and that a large one holds up nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time

import pytest

from mlx_diffusiongemma.api.bodies import MAX_DEPTH, MAX_SEPARATORS, MAX_VALUES, parse
from mlx_diffusiongemma.api.errors import ApiError
from mlx_diffusiongemma.api.service import WORKERS, Service
from mlx_diffusiongemma.api.settings import Settings
from mlx_diffusiongemma.sources import open_source
from mlx_diffusiongemma.tokenizer import Tokenizer

QUESTION = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
JSON = {"content-type": "application/json"}


def turns_of_others(work) -> int:
    """Do some work; return how often another thread had its turn meanwhile."""
    turns, over = 0, threading.Event()

    def count() -> None:
        nonlocal turns
        while not over.is_set():
            time.sleep(0.001)
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    time.sleep(0.02)
    before = turns
    work()
    during = turns - before
    over.set()
    other.join()
    return during


@pytest.mark.parametrize(
    "value", [{"a": [1, -2.5, None, True, "ü\n\u2028😀", {}]}, [], "text", 2**70, {"a\x00": {"": []}}]
)
def test_what_json_says(value):
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=1)):
        assert parse(text.encode()) == value
        assert parse(b"\xef\xbb\xbf" + text.encode()) == value, "with the mark that some editors write"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_json"),
        (b"[1,]", "invalid_json"),
        (b'{"a": 1} x', "invalid_json"),
        (b'"\xff"', "invalid_json"),
        (b'["\\ud800"]', "invalid_json"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "too_deep"),
        (b"[" * 100_000, "invalid_json"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "too_many_values"),
        (b"[" + b"{}," * MAX_VALUES + b"0]", "too_many_values"),
        (b"[" + b"0," * MAX_SEPARATORS + b"0", "too_many_values"),
    ],
)
def test_what_is_refused(body, code):
    with pytest.raises(ApiError) as caught:
        parse(body)
    assert (caught.value.status, caught.value.code) == (400, code)


def test_many_values_are_refused_before_they_are_made(client):
    body = b'{"messages": [], "x": [' + b"0," * (4 * MAX_SEPARATORS) + b"0]}"
    reply = client.post("/v1/chat/completions", content=body, headers=JSON)
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "too_many_values"
    commas = {**QUESTION, "user": "," * (MAX_VALUES + 1)}
    assert client.post("/v1/chat/completions", json=commas).status_code == 200, "commas inside of texts are no values"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_body_that_is_not_called_json(client, kind):
    reply = client.post("/v1/chat/completions", content=json.dumps(QUESTION), headers={"content-type": kind})
    assert reply.status_code == 415


def test_messages_say_what_was_got(client):
    for wrong, message in (
        ({"seed": 1.5}, "seed: got 1.5, "),
        ({"seed": "7"}, "seed: got '7', "),
        ({"stream": 1}, "got 1, "),
    ):
        reply = client.post("/v1/chat/completions", json=QUESTION | wrong)
        assert message in reply.json()["error"]["message"]


def test_a_long_text_is_encoded_while_others_work(tiny_folder):
    tokenizer = Tokenizer.load(tiny_folder)
    text = "word and more words, so many. " * 10_000
    assert turns_of_others(lambda: tokenizer.encode(text)) > 20


def test_a_large_picture_is_decoded_while_others_work():
    data = bytes(range(256)) * 2**17
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    found = []

    def read() -> None:
        found.append(open_source(url, "image", ValueError, "")[1].read())

    assert turns_of_others(read) > 5
    assert found == [data]


def test_a_text_that_is_much_too_long_is_refused_at_once(client):
    for body in (
        {**QUESTION, "messages": [{"role": "user", "content": "word and " * 2**20}]},
        {"prompt": "a " * 2**22},
    ):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        began = time.perf_counter()
        error = client.post(path, json=body).json()["error"]
        assert error["code"] == "context_length_exceeded" and "tokens or more; expected at most" in error["message"]
        assert time.perf_counter() - began < 10, "encoding it takes 20 s and more"


def test_the_first_request_finds_everything_ready():
    """It would compile the chat template while others wait, and the event loop would start threads one by one."""

    async def run() -> None:
        service = Service(Settings("tiny"))
        await service.start()
        assert "_template" in vars(service._preparer.tokenizer)
        assert sum(thread.name.startswith("prepare") for thread in threading.enumerate()) == WORKERS
        await service.close(10)

    asyncio.run(run())
