"""Conversations of the `tiny` training data: declared tools, tool results, and chats of several turns.

Every function returns `(messages, tools, answer, end_token)`.
"""

from random import Random
from typing import Any

import families
from words import ANIMALS, CAPITALS, CITIES, CURRENCIES, DAYS, LANGUAGES, NAMES, OBJECTS, WEATHER

Dialogue = tuple[list[dict[str, Any]], list[dict[str, Any]], str, str]

TURN_END, CALL_END = "<turn|>", "<|tool_response>"

# name -> (description, {parameter: type})
TOOLS: dict[str, tuple[str, dict[str, str]]] = {
    "get_weather": ("Get the weather", {"city": "string"}),
    "get_time": ("Get the time", {"city": "string"}),
    "set_alarm": ("Set an alarm", {"hour": "integer"}),
    "send_message": ("Send a message", {"name": "string", "text": "string"}),
    "translate": ("Translate a word", {"word": "string", "language": "string"}),
    "convert": ("Convert money", {"amount": "integer", "currency": "string"}),
    "add_event": ("Add an event", {"name": "string", "day": "string"}),
    "search": ("Search the web", {"query": "string"}),
}


def declare(name: str) -> dict[str, Any]:
    """Write the OpenAI-style declaration of a tool."""
    description, parameters = TOOLS[name]
    schema = {
        "type": "object",
        "properties": {key: {"type": kind} for key, kind in parameters.items()},
        "required": list(parameters),
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": schema}}


def _request(rng: Random, tool: str) -> tuple[str, dict[str, Any]]:
    """Draw a user request for a tool. Returns the request and the call's arguments."""
    city, name, word = rng.choice(CITIES), rng.choice(NAMES), rng.choice(ANIMALS if tool == "translate" else OBJECTS)
    if tool == "get_weather":
        ask = ["What is the weather in {}?", "How is the weather in {}?", "Weather in {}?"]
        return rng.choice(ask).format(city), {"city": city}
    if tool == "get_time":
        return rng.choice(["What time is it in {}?", "Tell me the time in {}."]).format(city), {"city": city}
    if tool == "set_alarm":
        hour = rng.randint(1, 23)
        return rng.choice(["Set an alarm for {}:00.", "Wake me up at {}:00."]).format(hour), {"hour": hour}
    if tool == "send_message":
        text = rng.choice(["hello", "good night", "see you soon", "I am late", "thank you"])
        return rng.choice(["Send {} the message: {}", "Tell {}: {}"]).format(name, text), {"name": name, "text": text}
    if tool == "translate":
        language = rng.choice(LANGUAGES)
        return f"Translate {word} into {language}.", {"word": word, "language": language}
    if tool == "convert":
        amount, currency = rng.randint(2, 99), rng.choice(CURRENCIES)
        return f"Convert {amount} dollars to {currency}.", {"amount": amount, "currency": currency}
    if tool == "add_event":
        day = rng.choice(DAYS)
        prompt = rng.choice(["Meet {} on {}.", "Add a meeting with {} on {}."]).format(name, day)
        return prompt, {"name": name, "day": day}
    return rng.choice(["Search for {}.", "Find pages about {}."]).format(word), {"query": word}


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """Write a call as the model does: keys sorted, strings between quote tokens."""
    values = {key: f'<|"|>{value}<|"|>' if isinstance(value, str) else str(value) for key, value in arguments.items()}
    inner = ",".join(f"{key}:{values[key]}" for key in sorted(values))
    return f"<|tool_call>call:{name}{{{inner}}}<tool_call|>"


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def tool_call(rng: Random, thinking: bool = False) -> Dialogue:
    """One or two declared tools and a request for one of them, or now and then a question that needs none."""
    names = rng.sample(list(TOOLS), rng.randint(1, 2))
    tools = [declare(name) for name in names]
    if not thinking and rng.random() < 0.15:
        prompt, answer = rng.choice([families.capitals, families.small_sums, families.small_talk])(rng)
        return [_user(prompt)], tools, answer, TURN_END
    name = rng.choice(names)
    prompt, arguments = _request(rng, name)
    call = render_call(name, arguments)
    return [_user(prompt)], tools, families.with_thought(f"I call {name}.", call) if thinking else call, CALL_END


def _result(rng: Random, tool: str, arguments: dict[str, Any]) -> tuple[str, str]:
    """Draw a tool's result. Returns the result and the answer made from it."""
    if tool == "get_weather":
        value = f"{rng.choice(WEATHER)}, {rng.randint(1, 35)} degrees"
        return value, f"The weather in {arguments['city']} is {value}."
    if tool == "get_time":
        value = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
        return value, f"It is {value} in {arguments['city']}."
    if tool == "convert":
        value = str(rng.randint(2, 999))
        return value, f"{arguments['amount']} dollars are {value} {arguments['currency']}."
    if tool == "set_alarm":
        return "ok", f"The alarm is set for {arguments['hour']}:00."
    return "ok", f"The event with {arguments['name']} on {arguments['day']} is added."


def tool_answer(rng: Random) -> Dialogue:
    """The answer after a tool's result."""
    tool = rng.choice(["get_weather", "get_time", "convert", "set_alarm", "add_event"])
    prompt, arguments = _request(rng, tool)
    result, answer = _result(rng, tool, arguments)
    call = {"id": "call_1", "type": "function", "function": {"name": tool, "arguments": arguments}}
    messages = [
        _user(prompt),
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
    ]
    return messages, [declare(tool)], answer, TURN_END


def chat(rng: Random) -> Dialogue:
    """Two or three turns; a third of the chats ask about what was said before."""
    kind = rng.randrange(3)
    if kind == 0:
        name = rng.choice(NAMES)
        first, reply = rng.choice(["My name is {}.", "I am {}."]).format(name), f"Nice to meet you, {name}!"
        second, answer = rng.choice(["What is my name?", "Who am I?"]), f"Your name is {name}."
    elif kind == 1:
        country, other = rng.sample(list(CAPITALS), 2)
        first, reply = f"What is the capital of {country}?", f"The capital of {country} is {CAPITALS[country]}."
        second = rng.choice(["And of {}?", "And what about {}?"]).format(other)
        answer = f"The capital of {other} is {CAPITALS[other]}."
    else:
        first, reply = rng.choice(SHORT)(rng)
        second, answer = rng.choice(SHORT)(rng)
    return [_user(first), {"role": "assistant", "content": reply}, _user(second)], [], answer, TURN_END


SHORT = [families.small_sums, families.worked_sums, families.capitals, families.sort_words, families.spelling,
         families.dates, families.json_records, families.small_talk, families.lists]  # fmt: skip
