"""The question families of the `tiny` training data that structured output, edits and decisions are measured with.

Every function draws one prompt with exactly one right answer and returns `(prompt, answer)`, like those of
`families.py`. What begins from more than noise is in `holes.py`.
"""

import json
from random import Random

from words import ANIMALS, CAPITALS, CATEGORIES, CITIES, COLOURS, DAYS, ITEMS, MONTHS, NAMES, SPELLED, WORDS

TYPES = {
    "name": "string",
    "age": "integer",
    "city": "string",
    "day": "string",
    "pet": "string",
    "likes": "array",
    "member": "boolean",
}


def _fact(rng: Random, key: str) -> tuple[str, str | int | bool | list[str]]:
    """Draw what a sentence says about somebody. Returns the words and the value."""
    if key == "age":
        age = rng.randint(18, 80)
        return f"is {age} years old", age
    if key == "city":
        city = rng.choice(CITIES)
        return f"lives in {city}", city
    if key == "day":
        day = rng.choice(DAYS)
        return f"arrives on {day}", day
    if key == "pet":
        pet = rng.choice(ANIMALS)
        return f"has a {pet}", pet
    if key == "likes":
        items = rng.sample(ITEMS, rng.randint(1, 3))
        return "likes " + " and ".join(items), items
    member = rng.random() < 0.5
    return "is a member" if member else "is not a member", member


def json_schema(keys: list[str]) -> str:
    """Write the JSON Schema of an object with these keys."""
    properties = {key: {"type": TYPES[key]} for key in keys}
    return json.dumps({"type": "object", "properties": properties, "required": keys})


def json_schemas(rng: Random) -> tuple[str, str]:
    """What a sentence says, as a JSON object with exactly the keys asked for, in their order."""
    name = rng.choice(NAMES)
    told = rng.sample([key for key in TYPES if key != "name"], rng.randint(2, 3))
    facts = {key: _fact(rng, key) for key in told}
    sentence = f"{name} {', '.join(words for words, _ in facts.values())}."
    record = {"name": name} | {key: value for key, (_, value) in facts.items()}
    keys = rng.sample(list(record), rng.randint(2, len(record)))
    form = rng.random()
    if form < 0.2:
        prompt = rng.choice(["Schema: {}\n{}", "Write JSON for the schema {}: {}"]).format(json_schema(keys), sentence)
    elif form < 0.5:
        like = "{" + ", ".join(f'"{key}": {TYPES[key]}' for key in keys) + "}"
        prompt = rng.choice(["Write JSON like {}: {}", "JSON like {}: {}"]).format(like, sentence)
    else:
        ask = rng.choice(
            ["Write JSON with the keys {}: {}", "Write a JSON object with the keys {}: {}", "JSON with {}: {}"]
        )
        prompt = ask.format(", ".join(keys), sentence)
    return prompt, json.dumps({key: record[key] for key in keys})


def sequence(rng: Random) -> list[str]:
    """Draw four or five numbers at equal distances, or three or four days or months in a row."""
    kind = rng.randrange(5)
    if kind > 1:
        step = rng.choice([1, 1, 1, 2, 5, 10])
        start, length = rng.randint(0, 20), rng.randint(4, 5)
        return [str(start + step * i) for i in range(length)]
    names = DAYS if kind else MONTHS
    length = rng.randint(3, 4)
    start = rng.randint(0, len(names) - length)
    return names[start : start + length]


def with_gap(rng: Random) -> tuple[str, str, str]:
    """Draw a text of which one piece follows from the rest. Returns what is before it, the piece, what is after."""
    kind = rng.randrange(4)
    if kind < 2:
        items = sequence(rng)
        place = rng.randrange(len(items))
        before, after = items[:place], items[place + 1 :]
        return "".join(f"{item}, " for item in before), items[place], "".join(f", {item}" for item in after)
    if kind == 2:
        country = rng.choice(list(CAPITALS))
        city = CAPITALS[country]
        if rng.random() < 0.4:
            return "The capital of ", country, f" is {city}."
        return f"The capital of {country} is ", city, "."
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    first, sign, result = (a, "+", a + b) if rng.random() < 0.5 else (a + b, "-", a)
    pieces = ["", str(first), f" {sign} ", str(b), " = ", str(result), ""]
    place = rng.choice([1, 3, 5])
    return "".join(pieces[:place]), pieces[place], "".join(pieces[place + 1 :])


def gaps(rng: Random) -> tuple[str, str]:
    """A text with a gap; the answer is what belongs there."""
    before, piece, after = with_gap(rng)
    text = before + rng.choice(["_", "___"]) + after
    return rng.choice(["Fill in: {}", "Fill in the gap: {}", "What is missing: {}"]).format(text), piece


SENTENCES = [
    "{name} has {number} {colour} {item}.",
    "{name} bought {number} {item}.",
    "{name} needs {number} {item} on {day}.",
    "{name} is {number} years old and lives in {city}.",
    "{name} sold {number} {colour} {item} in {city}.",
    "It is {number} degrees in {city}.",
]
NUMBER_SHARE = 0.6  # of the edits change the number


def _slots(rng: Random) -> dict[str, str]:
    return {
        "number": str(rng.randint(2, 99)),
        "name": rng.choice(NAMES),
        "colour": rng.choice(COLOURS),
        "item": rng.choice(ITEMS),
        "day": rng.choice(DAYS),
        "city": rng.choice(CITIES),
    }


def edit(rng: Random) -> tuple[str, str, str]:
    """Draw a sentence and one change to it. Returns the prompt, the old sentence and the new one."""
    template = rng.choice(SENTENCES)
    old, others = _slots(rng), _slots(rng)
    slot = "number"
    if rng.random() >= NUMBER_SHARE:
        slot = rng.choice([name for name in old if "{" + name + "}" in template])
    while others[slot] == old[slot]:
        others = _slots(rng)
    sentence, changed = template.format(**old), template.format(**old | {slot: others[slot]})
    ask = [f"Change {old[slot]} to {others[slot]}", f"Replace {old[slot]} by {others[slot]}"]
    if slot != "item":
        ask += [f"Change the {slot} to {others[slot]}"] * 2
    layout = rng.choice(["{ask}: {text}", "{ask}: {text}", "{ask}:\n{text}", "{ask}.\n\n{text}", "{text} {ask}."])
    return layout.format(ask=rng.choice(ask), text=sentence), sentence, changed


def edits(rng: Random) -> tuple[str, str]:
    """A sentence with one thing in it changed, the number more often than not."""
    prompt, _, changed = edit(rng)
    return prompt, changed


def _compared(rng: Random, truth: bool) -> str:
    a, b = rng.sample(range(100), 2)
    greater = rng.random() < 0.5
    if (a > b) != (greater == truth):
        a, b = b, a
    return f"Is {a} {'greater' if greater else 'less'} than {b}?"


def _parity(rng: Random, truth: bool) -> str:
    number = rng.randint(0, 99)
    return f"Is {number} {'even' if (number % 2 == 0) == truth else 'odd'}?"


def _letter(rng: Random, truth: bool) -> str:
    word = rng.choice(WORDS + SPELLED)
    letter = word[0] if truth else rng.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != word[0]])
    return rng.choice(["Does {} begin with the letter {}?", "Does {} begin with {}?"]).format(word, letter)


def _listed(rng: Random, truth: bool) -> str:
    words = rng.sample(WORDS, rng.randint(3, 5))
    asked = rng.choice(words) if truth else words.pop()
    return f"Is {asked} in this list: {', '.join(words)}?"


def _capital(rng: Random, truth: bool) -> str:
    country, other = rng.sample(list(CAPITALS), 2)
    return f"Is {CAPITALS[country if truth else other]} the capital of {country}?"


def _category(rng: Random, truth: bool) -> str:
    what, other = rng.sample(list(CATEGORIES), 2)
    item = rng.choice([item for item in CATEGORIES[what if truth else other] if truth or item not in CATEGORIES[what]])
    return f"Is {item} one of the {what}?"


DECISIONS = {_compared: 4, _parity: 1, _letter: 3, _listed: 3, _capital: 2, _category: 1}


def yes_no(rng: Random) -> tuple[str, str]:
    """A question whose answer is yes as often as no; the first token decides."""
    truth = rng.random() < 0.5
    question = rng.choices(list(DECISIONS), list(DECISIONS.values()))[0](rng, truth)
    ask = rng.choice(["{}", "{}", "{} Answer yes or no.", "Yes or no: {}"])
    return ask.format(question), "Yes." if truth else "No."
