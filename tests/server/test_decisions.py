"""Typed decisions over HTTP, judged by the pipeline itself and by the openai package."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import openai
import pytest
from PIL import Image

from mlx_diffusiongemma import load
from mlx_diffusiongemma.decisions import decide
from mlx_diffusiongemma.questions import Choice, Extract, Score, YesNo

CAPITAL = "What is the capital of France?"
SENTENCE = "The capital of France is {}."
CITIES = {"Rome": None, "Paris": None, "Madrid": None}
STATE_BODY = {
    "model": "tiny",
    "state": CAPITAL,
    "questions": {
        "city": {"type": "choice", "criteria": CITIES, "answer": SENTENCE, "show_options": False},
        "in_europe": {
            "type": "noul",
            "instructions": "Is it in Europe?",
            "criteria": {"true": "It is.", "false": None},
        },
        "size": {"type": "score", "instructions": {"rate": "size"}, "criteria": ["a village", ["a", "city"]]},
        "name": {"type": "text", "answer": SENTENCE, "max_tokens": 4},
    },
}


@pytest.fixture(scope="module")
def expected():
    """Return what the pipeline itself decides."""
    questions = {
        "city": Choice(options=CITIES, answer=SENTENCE, show_options=False),
        "in_europe": YesNo("Is it in Europe?", criteria=("It is.", None)),
        "size": Score('{"rate": "size"}', levels={"0": "a village", "1": '["a", "city"]'}),
        "name": Extract(answer=SENTENCE, max_tokens=4),
    }
    return decide(load("tiny"), questions, CAPITAL)


@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/decisions"])
def test_questions_about_a_state(client, expected, path):
    reply = client.post(path, json=STATE_BODY).raise_for_status().json()
    answers = reply["answers"]
    assert reply["model"] == "tiny" and list(answers) == list(STATE_BODY["questions"])
    city = answers["city"]
    assert (city["type"], city["choice"]) == ("choice", "Paris")
    assert city["confidence"] == pytest.approx(expected["city"].probability, rel=1e-4)
    assert city["probabilities"] == pytest.approx(expected["city"].probabilities, rel=1e-4)
    europe = answers["in_europe"]
    assert europe["type"] == "noul" and europe["noul"] == pytest.approx(expected["in_europe"].expected, rel=1e-4)
    assert "confidence" not in europe
    size = answers["size"]
    assert size["legend"] == {"0": "a village", "1": ["a", "city"]}
    assert size["score"] == pytest.approx(expected["size"].expected, rel=1e-4)
    assert size["probabilities"] == pytest.approx(expected["size"].probabilities, rel=1e-4)
    assert answers["name"]["text"] == expected["name"].value == "Paris"
    assert reply["usage"]["input_tokens"] == sum(each.stats[0].prompt_tokens for each in expected.values())
    assert reply["timings"]["forwards"] == 1 and reply["timings"]["rows"] == sum(e.rows for e in expected.values())


def test_questions_about_an_input_by_the_openai_package(ai, expected):
    reply = ai.decisions.create(
        model="tiny",
        input=CAPITAL,
        questions=[
            {
                "type": "choice",
                "name": "city",
                "instructions": "",
                "choices": [{"value": city} for city in CITIES],
                "answer": SENTENCE,
                "show_options": False,
            },
            {"type": "predicate", "instructions": "Is it in Europe?"},
            {"type": "choice", "instructions": "In Europe?", "choices": [{"value": True}, {"value": False}]},
            {"type": "score", "instructions": "Size?", "levels": [{"label": "small"}, {"label": "big"}]},
        ],
    )
    city, europe, truth, size = reply.answers
    assert (city.type, city.name, city.choice) == ("choice", "city", "Paris")
    assert {each.value: each.probability for each in city.probabilities} == pytest.approx(
        expected["city"].probabilities, rel=1e-4
    )
    assert europe.type == "predicate" and 0 < europe.probability < 1 and europe.name is None
    assert truth.choice in (True, False) and [each.value for each in truth.probabilities] == [True, False]
    assert [(each.value, each.label) for each in size.probabilities] == [(0, "small"), (1, "big")]
    assert size.score == pytest.approx(size.probabilities[1].probability)
    assert reply.usage.total_tokens == reply.usage.input_tokens + reply.usage.output_tokens


def test_a_conversation_and_items_are_the_same_state(client):
    question = {"type": "choice", "criteria": CITIES, "answer": SENTENCE, "show_options": False}
    conversation = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": CAPITAL},
    ]
    told = client.post("/v1/systemone", json={"state": conversation, "questions": {"q": question}}).json()
    listed = {
        "type": "choice",
        "choices": [{"value": city, "description": what} for city, what in CITIES.items()],
        "answer": SENTENCE,
        "show_options": False,
    }
    items = client.post("/v1/decisions", json={"input": conversation, "questions": [listed]}).json()
    chances = {each["value"]: each["probability"] for each in items["answers"][0]["probabilities"]}
    assert chances == told["answers"]["q"]["probabilities"]


def test_an_image_beside_the_state(client):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 96), "red").save(buffer, "png")
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    questions = {"count": {"type": "choice", "criteria": {"1": None, "2": None}, "show_options": False}}
    state = "How many red squares?"
    body = {"state": state, "images": [url], "questions": questions}
    alone = client.post("/v1/decisions", json=body).raise_for_status().json()
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": state}]
    body = {"state": [{"role": "user", "content": parts}], "questions": questions}
    assert client.post("/v1/decisions", json=body).json()["answers"] == alone["answers"]
    without = client.post("/v1/decisions", json={"state": state, "questions": questions}).json()
    assert without["usage"]["input_tokens"] < alone["usage"]["input_tokens"]


def test_many_rows_pass_through_a_short_queue(start_server):
    """More rows than the queue holds wait for one another; nothing is refused."""
    server = start_server("--max-queue", "3", "--max-batch", "2")
    criteria = {f"{first}{second}": None for first in "abcdef" for second in "xyz"}
    with server.client() as client:
        body = {"state": "Which?", "questions": {"q": {"type": "choice", "criteria": criteria}}}
        reply = client.post("/v1/systemone", json=body).raise_for_status().json()
    assert reply["timings"]["rows"] > 4
    assert sum(reply["answers"]["q"]["probabilities"].values()) == pytest.approx(1)


NOUL = {"type": "noul", "instructions": "Is it?"}


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/v1/systemone", {"questions": {"q": NOUL}}, "state", "state: got nothing"),
        ("/v1/systemone", {"state": "x", "questions": {}}, "questions", "at least 1 item"),
        ("/v1/systemone", {"state": "x", "questions": {"q": {"type": "box"}}}, "questions", "'box'"),
        (
            "/v1/systemone",
            {"state": "x", "questions": {"q": NOUL}, "forwards": 5},
            "forwards",
            "less than or equal to 4",
        ),
        ("/v1/systemone", {"state": "x", "questions": {"q": NOUL}, "seed": -1}, "seed", "seed: got -1"),
        (
            "/v1/systemone",
            {"state": "x", "questions": {"q": {"type": "choice", "criteria": {"a": None}}}},
            "questions.q",
            "questions.q: options: got 1, expected 2 to 255 labels",
        ),
        (
            "/v1/systemone",
            {"state": "x", "questions": {"q": {**NOUL, "answer": "Yes"}}},
            "questions.q",
            "questions.q: answer: got 'Yes', expected text with one {} in it",
        ),
        ("/v1/decisions", {"input": "x", "questions": {"q": NOUL}}, "state", "state: got nothing, expected a state"),
        (
            "/v1/decisions",
            {"state": "x", "questions": [{"type": "predicate", "instructions": "?"}]},
            "input",
            "input: got nothing, expected an input",
        ),
        (
            "/v1/systemone",
            {"state": [{"role": "user", "content": 5}], "questions": {"q": NOUL}},
            "messages[0].content",
            "messages[0].content must be",
        ),
        (
            "/v1/systemone",
            {"state": "", "questions": {"q": {**NOUL, "instructions": "", "show_options": False}}},
            None,
            "the question is empty: got neither a state nor instructions",
        ),
        (
            "/v1/decisions",
            {"state": {"a": 1}, "images": ["data:image/png;base64,"], "questions": {"q": NOUL}},
            "images",
            "images: go with a state that is text",
        ),
    ],
)
def test_what_cannot_be_is_refused(client, path, body, param, message):
    reply = client.post(path, json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_the_openai_package_sees_a_bad_request(ai):
    with pytest.raises(openai.BadRequestError, match="levels: got a label twice"):
        levels = [{"label": "a"}, {"label": "a"}]
        ai.decisions.create(
            model="tiny", input="x", questions=[{"type": "score", "instructions": "?", "levels": levels}]
        )


def test_the_document_has_both_paths(client):
    document = client.get("/openapi.json").json()
    for path in ("/v1/systemone", "/v1/decisions"):
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["content"]["application/json"]["schema"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert {"NoulQuestion", "ListedChoice", "StateReply", "ListedReply"} <= document["components"]["schemas"].keys()


def test_the_examples_of_the_document_run(client, server, capsys):
    text = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8").partition("### Over HTTP")[2]
    body = json.loads(re.search(r"/v1/systemone [^']*'[^']*' -d '(.*?)'\n```", text, re.S)[1])
    reply = client.post("/v1/systemone", json=body).raise_for_status().json()
    assert reply["answers"]["capital"]["choice"] == "Paris"
    code = re.search(r"```python\n(from openai .*?)```", text, re.S)[1]
    exec(code.replace("http://127.0.0.1:1234", server.url), {})
    choice, confidence = capsys.readouterr().out.split()
    assert choice == "Paris" and float(confidence) == pytest.approx(reply["answers"]["capital"]["confidence"], rel=1e-4)
