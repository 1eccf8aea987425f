"""The walk over a canvas: a second implementation token by token, ends, thoughts, repairs, room and token borders."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
import pytest
from canvases import C, best_of, constrain, end_ids, write
from grammar_cases import closed
from small_tokenizer import KINDS, small_tokenizer

from mlx_diffusiongemma.automaton import vocabulary
from mlx_diffusiongemma.constraint import Constraint
from mlx_diffusiongemma.grammar import Grammar
from mlx_diffusiongemma.output import OutputParser

PERSON = closed({"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150}})
BYTES = small_tokenizer("byte_level")
ENDS = sorted(end_ids(BYTES))
PAD = BYTES.special.pad
THOUGHT = [BYTES.special.channel_open, *BYTES.encode("thought\n"), BYTES.special.channel_close]


def never(position, allowed):
    raise AssertionError(f"asked for a token at {position}")


def first(position, allowed):
    return int(np.flatnonzero(allowed)[0])


def canvas(ids, length=C, filler=PAD):
    return [*ids, *[filler] * (length - len(ids))]


def person() -> Constraint:
    return constrain(Grammar.from_json_schema(PERSON), BYTES)


@cache
def plain_tokenizer():
    from llguidance import LLTokenizer

    return LLTokenizer(BYTES.to_json())


def matcher_behind(grammar: Grammar, tokens: list[int]):
    """Take the tokens one by one from the very beginning, by llguidance itself; return the matcher, None if refused."""
    from llguidance import LLMatcher

    matcher = LLMatcher(plain_tokenizer(), grammar.source, log_level=0)
    return matcher if all(matcher.consume_token(token) for token in tokens) else None


def naive_walk(grammar, committed, proposal, logits, repairs):
    """Walk token by token, with a fresh matcher for every question; room is not looked at.

    What is forced behind a repair belongs to it, and behind the last one the walk ends.
    """
    path: list[int] = []
    behind_repair = False
    for at, token in enumerate(proposal):
        matcher = matcher_behind(grammar, committed + path)
        complete = matcher.is_accepting()
        if complete and token in ENDS and not (behind_repair and not repairs):
            return path, token
        choices = [t for t in range(BYTES.vocab_size) if t not in ENDS and matcher.validate_tokens([t]) == 1]
        if complete and not choices:
            return path, token if token in ENDS else max(ENDS, key=lambda t: logits[at, t])
        if behind_repair and len(choices) == 1 and not complete:
            path += choices
            continue
        if behind_repair and not repairs:
            return path, None
        behind_repair = False
        if token in choices:
            path.append(token)
            continue
        if not repairs:
            return path, None
        repairs -= 1
        behind_repair = True
        choices += ENDS if complete else []
        chosen = max(choices, key=lambda t: logits[at, t])
        if chosen in ENDS:
            return path, chosen
        path.append(chosen)
    return path, None


@pytest.mark.parametrize("repairs", [0, 1, 3, 100])
@pytest.mark.parametrize("seed", range(4))
def test_walk_equals_a_naive_one(seed, repairs):
    """On a grammar of single letters, where what is forced is one token."""
    grammar = Grammar.from_regex("(a[bc]|d[0-3]{1,2}e)+z?")
    rng = np.random.default_rng(seed)
    constraint = constrain(grammar, BYTES)
    committed: list[int] = []
    letters = BYTES.encode("abcde0123z") + ENDS[:1]
    for _ in range(2):
        proposal = rng.choice(letters, 6).tolist()
        logits = rng.random((6, BYTES.vocab_size))
        logits[:, THOUGHT[0]] = -1  # an empty thought is no matter of the grammar
        expected = naive_walk(grammar, committed, proposal, logits, repairs)
        walk = constraint.walk(proposal, best_of(logits), repairs=repairs, room=10**6)
        assert (list(walk.token_ids), walk.end_id) == expected
        constraint.commit(walk.token_ids)
        committed += walk.token_ids
        if walk.ended or not walk.token_ids:
            break


@pytest.mark.parametrize("seed", range(6))
def test_every_path_is_a_prefix_of_the_grammar(seed):
    grammar, constraint = Grammar.from_json_schema(PERSON), person()
    rng = np.random.default_rng(seed)
    logits = rng.random((C, BYTES.vocab_size))
    logits[:, THOUGHT[0]] = -1
    walk = constraint.walk(rng.integers(24, 324, C).tolist(), best_of(logits), repairs=3, room=500)
    assert matcher_behind(grammar, list(walk.token_ids)) is not None


def test_a_valid_proposal_stays_as_it_is():
    ids = BYTES.encode('{"name": "Ann", "age": 7}')
    walk = person().walk(canvas([*ids, ENDS[0]], 40), never, repairs=0, room=40)
    assert walk == (tuple(ids), ENDS[0], True, 0, {})


def test_forced_tokens_and_repairs():
    constraint = person()
    assert BYTES.detokenize(constraint.forced()) == '{"name": "'
    assert constraint.walk([PAD] * C, never, repairs=0, room=500).token_ids == ()
    walk = constraint.walk([PAD] * C, never, repairs=1, room=500)
    assert walk.token_ids == constraint.forced() and walk.repairs == 1
    assert walk.pins == dict(enumerate(walk.token_ids)) and not walk.ended
    quote = BYTES.encode('"')[0]
    walk = constraint.walk([PAD] * 40, lambda at, allowed: quote, repairs=2, room=500)
    assert BYTES.detokenize(walk.token_ids) == '{"name": "", "age": ' and walk.repairs == 2


def test_repairs_are_taken_back_when_the_proposal_changes():
    constraint = person()
    wrong = BYTES.encode('{"name": "Ann"}')
    walk = constraint.walk(canvas(wrong, 40), first, repairs=1, room=500)
    assert BYTES.detokenize(walk.token_ids).startswith('{"name": "Ann", "age": ')
    right = BYTES.encode('{"name": "Bo", "age": 3}')
    assert constraint.walk(canvas([*right, ENDS[0]], 40), never, repairs=0, room=500).pins == {}


def test_where_the_proposal_wants_to_end_the_short_way_is_gone():
    """It needs no repair, and takes the likelier token where that makes it no longer."""
    constraint = person()
    proposal = canvas(BYTES.encode('{"name": "Ann'), 60, filler=ENDS[1])
    seven = BYTES.encode("7")[0]
    walk = constraint.walk(
        proposal, lambda at, allowed: seven if allowed[seven] else first(at, allowed), repairs=0, room=500
    )
    assert BYTES.detokenize(walk.token_ids) == '{"name": "Ann", "age": 7}'
    assert (walk.end_id, walk.ended, walk.repairs) == (ENDS[1], True, 0)


def test_an_end_only_where_the_grammar_accepts():
    constraint = constrain(Grammar.from_regex("[0-9]{2,4}"), BYTES)
    digits = BYTES.encode("1234")
    for count in (0, 1):
        walk = constraint.walk(canvas(digits[:count], filler=ENDS[1]), best_of(np.eye(C, 324)), repairs=9, room=500)
        assert len(walk.token_ids) >= 2 and walk.pins
    for count in (2, 3, 4):
        walk = constraint.walk(canvas(digits[:count], filler=ENDS[1]), never, repairs=0, room=500)
        assert (walk.token_ids, walk.end_id, walk.ended) == (tuple(digits[:count]), ENDS[1], True)
    masks = []
    constraint.walk(canvas(digits[:1]), lambda at, allowed: masks.append(allowed) or digits[0], repairs=1, room=500)
    constraint.walk(canvas(digits[:2]), lambda at, allowed: masks.append(allowed) or ENDS[0], repairs=1, room=500)
    assert [mask[ENDS].tolist() for mask in masks] == [[False] * 3, [True] * 3]


def test_an_end_is_required_where_nothing_can_follow():
    asked = []
    constraint = constrain(Grammar.from_choices(["ab"]), BYTES)

    def choose(at, allowed):
        asked.append((at, np.flatnonzero(allowed).tolist()))
        return ENDS[1]

    walk = constraint.walk(canvas(BYTES.encode("abba")), choose, repairs=0, room=500)
    assert walk == (tuple(BYTES.encode("ab")), ENDS[1], True, 0, {2: ENDS[1]}) and asked == [(2, ENDS)]
    one = Constraint(Grammar.from_choices(["ab"]), BYTES, [ENDS[2]], thinking=False)
    assert one.walk(canvas(BYTES.encode("abba")), never, repairs=0, room=500).end_id == ENDS[2]


def test_a_canvas_that_is_full_at_the_end():
    constraint = constrain(Grammar.from_choices(["abcd"]), BYTES)
    walk = constraint.walk(BYTES.encode("abcd"), never, repairs=0, room=500)
    assert (walk.ended, walk.end_id) == (False, None)
    assert not constraint.can_end
    constraint.commit(walk.token_ids)
    assert constraint.is_complete and constraint.can_end
    walk = constraint.walk([PAD] * 4, lambda at, allowed: ENDS[0], repairs=0, room=496)
    assert (walk.token_ids, walk.end_id, walk.pins) == ((), ENDS[0], {0: ENDS[0]})


def test_complete_exactly_at_max_tokens():
    constraint = constrain(Grammar.from_regex("[a-d]+"), BYTES)
    walk = constraint.walk(BYTES.encode("abcdabcd"), never, repairs=0, room=5)
    assert walk == (tuple(BYTES.encode("abcda")), None, True, 0, {})


@pytest.mark.parametrize("room", range(20, 60))
def test_an_ending_that_fits_the_room(room):
    """The name is as long as the room allows, give or take a token, and the object is complete."""
    ids = BYTES.encode('{"name": "' + "x" * 100)
    constraint = person()
    shortest = constraint.shortest
    assert shortest == len(BYTES.encode('{"name": "", "age": 0}'))
    walk = constraint.walk(canvas(ids, 64), first, repairs=0, room=room)
    assert walk.ended == (room >= shortest)
    if walk.ended:
        assert room - 1 <= len(walk.token_ids) <= room
        jsonschema_person(BYTES.detokenize(walk.token_ids))


def jsonschema_person(text: str) -> None:
    import jsonschema

    jsonschema.validate(json.loads(text), PERSON)


def test_no_room_for_any_ending():
    walk = person().walk([PAD] * C, first, repairs=99, room=4)
    assert (walk.ended, walk.end_id) == (False, None)
    assert len(walk.token_ids) == 4


def test_an_ending_that_reaches_into_the_next_canvas():
    """From the first canvas on the plan is kept, however much noise the later ones bring."""
    for seed in range(20):
        for room in (26, 31, 40, 55):
            written = write(person(), seed, max_tokens=room, steps=1)
            assert written.complete
            jsonschema_person(BYTES.detokenize(written.token_ids).removeprefix("<|channel>thought\n<channel|>"))


def test_deep_nesting_is_closed_in_time():
    constraint = constrain(Grammar.from_json_schema({"type": "array", "items": {"$ref": "#"}}), BYTES)
    opening = BYTES.encode("[")
    for room in (1, 2, 10, 30):
        walk = constraint.walk(opening * 40, first, repairs=0, room=room)
        text = BYTES.detokenize(walk.token_ids)
        assert walk.ended == (room > 1)
        assert room == 1 or json.loads(text) is not None
        assert len(walk.token_ids) == room - room % 2 or room == 1


# -- thoughts ------------------------------------------------------------------------------------------------------


def test_a_thought_is_free_and_the_answer_is_not():
    constraint = constrain(Grammar.from_choices(["yes", "no"]), BYTES, thinking=True)
    assert constraint.forced() == ()
    thought = [THOUGHT[0], *BYTES.encode("thought\nmaybe {no} yes"), THOUGHT[-1]]
    walk = constraint.walk(canvas([*thought, *BYTES.encode("no"), ENDS[0]], 60), never, repairs=0, room=500)
    assert walk.pins == {} and walk.ended
    constraint.commit(thought)
    assert not constraint.can_end
    constraint.commit(BYTES.encode("yes"))
    assert constraint.is_complete


def test_an_answer_needs_no_thought():
    constraint = constrain(Grammar.from_choices(["yes", "no"]), BYTES, thinking=True)
    walk = constraint.walk(canvas([*BYTES.encode("yes"), ENDS[0]]), never, repairs=0, room=500)
    assert walk.pins == {} and walk.ended


@pytest.mark.parametrize("inside", [ENDS[0], BYTES.special.tool_call_open, BYTES.special.turn_open, -1, 10**6])
def test_no_end_and_no_tool_call_in_a_thought(inside):
    constraint = constrain(Grammar.from_regex(".*"), BYTES, thinking=True, thinking_open=True)
    assert not constraint.can_end
    word = BYTES.encode("so")
    closing = THOUGHT[-1]
    walk = constraint.walk(
        canvas([*word, inside]),
        lambda at, allowed: closing if allowed[closing] else first(at, allowed),
        repairs=1,
        room=500,
    )
    assert list(walk.token_ids[: len(word) + 1]) == [*word, THOUGHT[-1]] and walk.pins[len(word)] == THOUGHT[-1]


def test_a_thought_over_several_canvases():
    constraint = constrain(Grammar.from_choices(["yes"]), BYTES, thinking=True)
    words = [THOUGHT[0], *BYTES.encode("thought\n" + "hm " * 40)]
    for start in range(0, 48, C):
        part = words[start : start + C]
        walk = constraint.walk(part, never, repairs=0, room=500)
        assert walk.token_ids == tuple(part) and not walk.ended
        constraint.commit(walk.token_ids)
    walk = constraint.walk(canvas([THOUGHT[-1]]), lambda at, allowed: ENDS[0], repairs=1, room=400)
    assert BYTES.detokenize(walk.token_ids) == "<channel|>yes" and walk.ended


@pytest.mark.parametrize("room", range(1, 30))
def test_a_thought_is_closed_where_the_room_ends(room):
    constraint = constrain(Grammar.from_choices(["yes"]), BYTES, thinking=True)
    ids = [THOUGHT[0], *BYTES.encode("thought\n" + "hm " * 40)]
    walk = constraint.walk(ids[:C], first, repairs=9, room=room)
    shortest = len(BYTES.encode("yes"))
    if shortest + 1 < room <= C:
        parser = OutputParser(BYTES)
        assert parser.feed(walk.token_ids).text + parser.finish().text == "yes"
        assert walk.ended and len(walk.token_ids) == room


def test_without_thinking_only_the_empty_thought():
    answer = BYTES.encode("yes")
    for ids in ([*THOUGHT, *answer, ENDS[0]], [*answer, ENDS[0]]):
        constraint = constrain(Grammar.from_choices(["yes"]), BYTES)
        walk = constraint.walk(canvas(ids), never, repairs=0, room=500)
        assert walk.pins == {} and walk.ended
    constraint = constrain(Grammar.from_choices(["yes"]), BYTES)
    walk = constraint.walk(
        canvas([THOUGHT[0], *BYTES.encode("oh no")]), lambda at, allowed: ENDS[0], repairs=9, room=500
    )
    assert list(walk.token_ids) == [*THOUGHT, *answer]
    constraint.commit(THOUGHT[:2])  # cut anywhere
    assert not constraint.can_end and constraint.forced() == tuple(THOUGHT[2:])


# -- token borders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_character_whose_bytes_lie_in_several_tokens_and_canvases(kind):
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode('{"name": "a😀日é", "age": 3}')
    assert len(ids) > len('{"name": "a😀日é", "age": 3}') - 8
    for size in (1, 2, 3, 5, 7):
        constraint = constrain(Grammar.from_json_schema(PERSON), tokenizer)
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            walk = constraint.walk(part, never, repairs=0, room=500)
            assert walk.token_ids == tuple(part) and not walk.pins
            constraint.commit(part)
        assert constraint.is_complete


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_character_is_repaired(kind):
    """Behind the first byte of an emoji only bytes that go on with it are allowed."""
    tokenizer = small_tokenizer(kind)
    head = tokenizer.encode('{"name": "')
    emoji = tokenizer.encode("😀")
    letter = tokenizer.encode("b")[-1]
    seen = []

    def choose(at, allowed):
        seen.append(np.flatnonzero(allowed))
        return int(seen[-1][0])

    constraint = constrain(Grammar.from_json_schema(PERSON), tokenizer)
    walk = constraint.walk([*head, emoji[0], letter, letter, letter], choose, repairs=9, room=500)
    assert len(seen) == 3 and letter not in seen[0] and emoji[1] in seen[0]
    assert "\ufffd" not in tokenizer.detokenize(walk.token_ids)


def merged_tokenizer():
    """A byte-level vocabulary that also has tokens over the borders of JSON's grammar."""
    import tokenizers
    from small_tokenizer import backend

    from mlx_diffusiongemma.tokenizer import Tokenizer

    data = json.loads(backend("byte_level"))
    vocabulary, merges = data["model"]["vocab"], data["model"]["merges"]
    vocabulary |= {token["content"]: token["id"] for token in data["added_tokens"]}  # so that they keep their ids
    size = len(vocabulary)
    for left, right in (('"', "}"), ('"', ","), ('",', "Ġ"), ("{", '"'), ('"', ":"), ("x", '"'), ('x"', "}")):
        vocabulary[left + right] = size
        merges.append([left, right])
        size += 1
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(data)))


def test_tokens_that_span_borders():
    tokenizer = merged_tokenizer()
    schema = closed({"a": {"type": "string"}, "b": {"type": "string"}})
    text = '{"a": "y", "b": "x"}'
    ids = tokenizer.encode(text)
    spelled = [tokenizer.detokenize([token]) for token in ids]
    assert {'{"', '":', '",', '"}'} <= set(spelled)
    walk = constrain(Grammar.from_json_schema(schema), tokenizer).walk(canvas(ids), first, repairs=0, room=500)
    assert walk.token_ids == tuple(ids) and walk.ended
    for room in range(len(ids), 30):
        proposal = canvas(tokenizer.encode('{"a": "' + "x" * 50), 40)[:40]
        walk = constrain(Grammar.from_json_schema(schema), tokenizer).walk(proposal, first, repairs=9, room=room)
        assert walk.ended
        assert set(json.loads(tokenizer.detokenize(walk.token_ids))) == {"a", "b"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["a <|channel> b", "<turn|>", "<eos> x", "<|tool_call>call:f{}<tool_call|>", "x<bos>"])
def test_control_tokens_that_a_grammar_spells_are_letters(kind, text):
    """What the grammar forces is text: neither a control token nor an end takes its place, whatever is likely."""
    tokenizer = small_tokenizer(kind)
    for grammar in (
        Grammar.from_choices([text]),
        Grammar.from_regex(re.escape(text)),
        Grammar.from_choices(["y", text]),
    ):
        constraint = constrain(grammar, tokenizer)
        assert not set(constraint.forced()) & tokenizer.all_special_ids
        written = write(constraint, 1, max_tokens=80, text_ids=tokenizer.encode_letters(text), noise=0.3)
        assert written.complete
        ids = written.token_ids
        thought = [i for i in ids if i in tokenizer.all_special_ids]  # an empty one may stand in front
        assert len(thought) in (0, 2)
        answer = tokenizer.detokenize(ids[ids.index(thought[1]) + 1 :] if thought else ids)
        assert answer in ("y", text)


def test_control_tokens_that_a_schema_spells_are_letters():
    schema = closed({"<eos>": {"enum": ["<turn|>", "a<|channel>"]}})
    for seed in range(5):
        written = write(constrain(Grammar.from_json_schema(schema), BYTES), seed)
        assert written.complete
        text = BYTES.detokenize(written.token_ids).removeprefix("<|channel>thought\n<channel|>")
        assert json.loads(text)["<eos>"] in ("<turn|>", "a<|channel>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_written_in_one_way(kind):
    """llguidance alone takes another spelling of a key that the schema knows, with a value of another type."""
    tokenizer = small_tokenizer(kind)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b\n": {"type": "integer"}, "\x01": {"type": "integer"}},
        "required": ["\x01"],
    }
    start = vocabulary(tokenizer).compile(Grammar.from_json_schema(schema))

    def takes(text):
        automaton, ids = start.copy(), tokenizer.encode_letters(text)
        for at, token_id in enumerate(ids):
            assert automaton.allowed()[token_id] == (automaton.copy().take(ids[at:]) > 0)
            if not automaton.take([token_id]):
                return False
        return automaton.accepts

    assert takes(r'{"\u0001": 1}') and takes(r'{"a": 1, "\u0001": 1, "c\\u0061\u001f\n": "\""}')
    for key in (r"\u0061", r"b\u000a", r"b\u000A", r"x\\\u0061", r"\u00e9", r"\u001F"):
        assert not takes(f'{{"\\u0001": 1, "{key}": "x"}}')


# -- misuse --------------------------------------------------------------------------------------------------------


def test_errors():
    with pytest.raises(ValueError, match=r"^a constraint needs at least one end token, got none$"):
        Constraint(Grammar.from_regex("a"), BYTES, [], thinking=False)
    with pytest.raises(ValueError, match=r"^the grammar does not allow token \d+ at position 1 of the canvas$"):
        constrain(Grammar.from_regex("ab"), BYTES).commit(BYTES.encode("aa"))
    with pytest.raises(ValueError, match=r"^position 0 was given token \d+, which the grammar does not allow there$"):
        wrong = BYTES.encode("x")[0]
        constrain(Grammar.from_regex("[ab]"), BYTES).walk([PAD], lambda at, allowed: wrong, repairs=1, room=9)
    with pytest.raises(ValueError, match=r"^lark allows no answer at all$"):
        constrain(Grammar.from_lark("start: A\nA: /a/ & /b/\n"), BYTES)
    with pytest.raises(ValueError, match=re.escape("unknown special token")) as caught:
        constrain(Grammar.from_lark("start: <|nothing|>\n"), BYTES)
    assert "\n" not in str(caught.value)


def test_grammars_are_compiled_once():
    from mlx_diffusiongemma.automaton import KEPT_GRAMMARS, vocabulary

    words = vocabulary(BYTES)
    assert vocabulary(BYTES) is words and vocabulary(small_tokenizer("byte_fallback")) is not words
    grammar = Grammar.from_regex("once")
    start = words.compile(grammar)
    assert words.compile(Grammar.from_regex("once")) is start
    for number in range(KEPT_GRAMMARS):
        words.compile(Grammar.from_regex(f"other {number}"))
    assert words.compile(grammar) is not start
