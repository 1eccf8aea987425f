"""Quick tests of the prompts for structured output, edits, decisions and holes: `pytest tools/tiny`."""

import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random

import jsonschema
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import controls
import data
from words import CAPITALS, CATEGORIES, DAYS, MONTHS

from mlx_diffusiongemma.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
SAYS = {
    "name": re.compile(r"(\w+) (?:is|lives|arrives|has|likes)"),
    "age": re.compile(r"is (\d+) years old"),
    "city": re.compile(r"lives in (\w+)"),
    "day": re.compile(r"arrives on (\w+)"),
    "pet": re.compile(r"has a (\w+)"),
    "likes": re.compile(r"likes (\w+(?: and \w+)*)"),
    "member": re.compile(r"is (not )?a member"),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Load the published tokenizer once."""
    return Tokenizer.load(ROOT / "mlx_diffusiongemma" / "tiny")


def some(family, count):
    """Draw examples of a family."""
    rng = Random(f"test/{family}")
    return [data.draw(rng, family) for _ in range(count)]


def question(example):
    """Return the text of the last message."""
    return example.messages[-1]["content"]


def said(prompt, key):
    """Read from the sentence at the end of a prompt what it says about somebody."""
    sentence = re.split(r"[:\n] ?(?=[A-Z]\w+ )", prompt)[-1]
    found = SAYS[key].search(sentence)
    if key == "member":
        return found[1] is None
    return int(found[1]) if key == "age" else found[1].split(" and ") if key == "likes" else found[1]


def asked_keys(prompt):
    """Read from a prompt which keys the object shall have."""
    if schema := re.search(r'\{"type".*\}(?=[:\n])', prompt):
        return list(json.loads(schema[0])["properties"])
    if like := re.search(r"like \{(.*?)\}", prompt):
        return re.findall(r'"(\w+)":', like[1])
    return re.search(r"(?:keys|with) ([a-z]+(?:, [a-z]+)*):", prompt)[1].split(", ")


def test_json_has_the_keys_asked_for_and_what_the_sentence_says():
    forms = Counter()
    for example in some("json_schemas", 500):
        prompt = question(example)
        record = json.loads(example.answer)
        assert json.dumps(record) == example.answer
        assert list(record) == asked_keys(prompt)
        assert record == {key: said(prompt, key) for key in record}
        jsonschema.validate(record, json.loads(controls.json_schema(list(record))))
        if schema := re.search(r'\{"type".*\}(?=[:\n])', prompt):
            jsonschema.validate(record, json.loads(schema[0]))
            forms["schema"] += 1
        forms.update(record.keys())
    assert set(forms) == {*controls.TYPES, "schema"}


def follows(text):
    """Tell whether a text without a gap is one that has a right to be asked about."""
    if capital := re.fullmatch(r"The capital of (.+) is (.+)\.", text):
        return CAPITALS[capital[1]] == capital[2]
    if total := re.fullmatch(r"(\d+) ([+-]) (\d+) = (\d+)", text):
        a, b, result = int(total[1]), int(total[3]), int(total[4])
        return result == (a + b if total[2] == "+" else a - b)
    items = text.split(", ")
    if items[0].isdigit():
        numbers = list(map(int, items))
        return len(numbers) > 3 and len({b - a for a, b in pairwise(numbers)}) == 1
    names = DAYS if items[0] in DAYS else MONTHS
    start = names.index(items[0])
    return len(items) > 2 and names[start : start + len(items)] == items


def test_gaps_are_filled_rightly():
    for example in some("gaps", 500):
        text = question(example).split(": ", 1)[1]
        assert follows(re.sub("_+", example.answer, text, count=1))
        assert "_" not in re.sub("_+", "", text, count=1)


def test_edits_change_what_was_asked():
    changed = Counter()
    for example in some("edits", 500):
        prompt, ask = question(example), re.search(r"(Change|Replace) (the )?(.*?) (?:to|by) (\w+)", question(example))
        sentence = prompt.replace(ask[0], "", 1).strip(":. \n") + "."
        old = ask[3]
        if ask[2]:
            at = re.search(re.escape(example.answer).replace(ask[4], r"(\w+)", 1), sentence)
            old = at[1]
            changed[ask[3]] += 1
        assert old != ask[4] and sentence.count(old) == 1
        assert sentence.replace(old, ask[4]) == example.answer
    assert set(changed) == {"number", "name", "colour", "city", "day"}
    assert changed["number"] > sum(changed.values()) / 2


def is_true(ask):
    """Answer a yes-or-no question by looking things up."""
    if found := re.fullmatch(r"Is (\d+) (greater|less) than (\d+)\?", ask):
        a, b = int(found[1]), int(found[3])
        return a > b if found[2] == "greater" else a < b
    if found := re.fullmatch(r"Is (\d+) (even|odd)\?", ask):
        return int(found[1]) % 2 == ["even", "odd"].index(found[2])
    if found := re.fullmatch(r"Does (\w+) begin with (?:the letter )?(\w)\?", ask):
        return found[1].startswith(found[2])
    if found := re.fullmatch(r"Is (\w+) in this list: (.*)\?", ask):
        return found[1] in found[2].split(", ")
    if found := re.fullmatch(r"Is (.+) the capital of (.+)\?", ask):
        return CAPITALS[found[2]] == found[1]
    found = re.fullmatch(r"Is (\w+) one of the (\w+)\?", ask)
    return found[1] in CATEGORIES[found[2]]


def test_decisions_are_right_balanced_and_made_by_the_first_token(tokenizer):
    answers = {}
    for example in some("yes_no", 3000):
        ask = question(example).removeprefix("Yes or no: ").removesuffix(" Answer yes or no.")
        assert example.answer == ("Yes." if is_true(ask) else "No.")
        kind = " ".join(word for word in ask.split()[:4] if word in {"greater", "less", "even", "odd", "in", "the"})
        answers.setdefault(kind, []).append(example.answer)
    for kind, found in answers.items():
        if len(found) > 100:
            assert 0.35 < found.count("Yes.") / len(found) < 0.65, kind
    assert tokenizer.encode("Yes.")[0] != tokenizer.encode("No.")[0]


@pytest.mark.parametrize("family", [name for name in data.STARTS if name.startswith("holes")])
def test_holes_are_in_the_answer_and_fit_one_canvas(tokenizer, family):
    opens = Counter()
    for example in some(family, 400):
        start, end = example.hole
        assert 0 <= start < end <= len(example.answer)
        pieces = [example.answer[:start], example.answer[start:end], example.answer[end:]]
        ids = [tokenizer.encode(piece) for piece in pieces]
        assert "".join(map(tokenizer.detokenize, ids)) == example.answer and ids[1]
        assert sum(map(len, ids)) < 64
        opens[example.is_open] += 1
        if family != "holes_in_answers":
            text = (example.lead or "") + example.answer
            if not re.match(r"My name|\w+ (lives|bought|is a) ", text):
                assert follows(text)
    assert 120 < opens[True] < 280


def test_warm_edits_begin_with_the_old_sentence():
    for example in some("warm_edits", 200):
        assert example.draft in question(example) and example.draft != example.answer
        assert example.hole is None


def test_training_never_sees_held_out_starts():
    weights = data.START_WEIGHTS | dict.fromkeys(data.LATE, 1.0)
    batch = [e for step in range(100) for e in data.training_batch(0, step, 30, weights)]
    assert not any(example.held_out for example in batch)
    held_out = list(data.held_out_starts(1, 100))
    assert all(example.held_out for example in held_out)
    assert not {e.key for e in batch} & {e.key for e in held_out}
    assert {e.family for e in batch} == set(weights)
    assert {e.family for e in held_out} == set(data.STARTS)


def test_where_the_hole_is_does_not_make_another_prompt():
    """Or a held-out text would be trained with another of its words missing."""
    message = [{"role": "user", "content": "Fill in."}]
    texts = [data.Example("holes_in_texts", message, "3, 4, 5, 6", hole=hole) for hole in ((0, 1), (3, 4))]
    raw = [
        data.Example("holes_in_completions", [], "3, 4, 5, 6", lead="", hole=(3, 4)),
        data.Example("holes_in_completions", [], " 4, 5, 6", lead="3,", hole=(0, 2)),
    ]
    other = data.Example("holes_in_texts", message, "3, 5, 7, 9", hole=(0, 1))
    assert texts[0].key == texts[1].key != other.key
    assert raw[0].key == raw[1].key != texts[0].key
    answer = data.Example("holes_in_answers", message, "x", hole=(0, 1))
    assert answer.key == data.Example("edits", message, "x").key == data.Example("warm_edits", message, "x").key
