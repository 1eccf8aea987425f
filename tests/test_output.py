"""Reasoning, tool calls, stop strings and text out of generated ids, however they are cut into canvases."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from small_tokenizer import KINDS, small_tokenizer

from mlx_diffusiongemma.output import OutputParser, ToolCall, preview
from mlx_diffusiongemma.tokenizer import SPELLINGS
from mlx_diffusiongemma.tool_calls import parse_tool_calls

THOUGHT, END = "<|channel>thought\n", "<channel|>"
CALL, CALLED = "<|tool_call>", "<tool_call|>"
PARIS = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>'


@dataclass
class Answer:
    """The deltas of an answer, joined."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    stopped: str | None = None
    count: int | None = None


def read(given: str | list[int], *, kind: str = "byte_level", cuts: tuple[int, ...] = (), **options: Any) -> Answer:
    """Feed a text's ids, cut into canvases at `cuts`, and join what comes out."""
    tokenizer = small_tokenizer(kind)
    numbers = itertools.count()
    parser = OutputParser(tokenizer, new_call_id=lambda: f"call_{next(numbers)}", **options)
    ids = tokenizer.encode(given) if isinstance(given, str) else given
    borders = [0, *cuts, len(ids)]
    deltas = [parser.feed(ids[a:b]) for a, b in itertools.pairwise(borders)]
    deltas += [parser.finish(), parser.finish()]
    calls = [item for delta in deltas for item in delta.tool_calls]
    assert [item.id for item in calls] == [f"call_{number}" for number in range(len(calls))]
    stopped = [delta.stopped for delta in deltas if delta.stopped is not None]
    assert len(stopped) <= 1
    places = [place for delta in deltas for place in delta.text_tokens]
    assert places == sorted(set(places))
    assert all(
        place < (len(ids) if parser.token_count_at_stop is None else parser.token_count_at_stop) for place in places
    )
    return Answer(
        "".join(delta.text for delta in deltas),
        "".join(delta.reasoning for delta in deltas),
        [(item.name, item.arguments) for item in calls],
        stopped[0] if stopped else None,
        parser.token_count_at_stop,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", range(40))
def test_the_tokens_of_the_text_are_told(kind: str, cut: int) -> None:
    """Thoughts, calls and what stands behind a stop string have no part; characters of several tokens have all."""
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode(f"{THOUGHT}secret{END}He said 😀 ö!{PARIS} So be it. END more")
    parser = OutputParser(tokenizer, stop=["END"])
    deltas = [parser.feed(ids[:cut]), parser.feed(ids[cut:]), parser.finish()]
    told = [b"".join(tokenizer.token_bytes(ids[place]) for place in delta.text_tokens).decode() for delta in deltas]
    assert told == [delta.text for delta in deltas]
    assert "".join(told) == "He said 😀 ö! So be it. "


# --- what is recognised -----------------------------------------------------------------------------------------

WEATHER = ("get_weather", {"city": "Paris", "days": 2})
ANSWERS = {
    "nothing": ("", Answer()),
    "plain text": ("Hello é😀\n", Answer("Hello é😀\n")),
    "leading space": (" Hello", Answer(" Hello")),
    "thought and text": (f"{THOUGHT}hm\nso\n{END}Hello", Answer("Hello", "hm\nso")),
    "empty thought": (f"{THOUGHT}{END}Hello", Answer("Hello")),
    "blank thought": (f"{THOUGHT}\n\n{END}Hello", Answer("Hello")),
    "thought without its header line": (f"<|channel>hm{END}Hello", Answer("Hello", "hm")),
    "thought of nothing but the header": (f"<|channel>thought{END}Hello", Answer("Hello")),
    "channel of another name": (f"<|channel>plan\nfirst{END}Hello", Answer("Hello", "plan\nfirst")),
    "two thoughts": (f"{THOUGHT}a\n{END}x{THOUGHT}b{END}y", Answer("xy", "a\nb")),
    "two thoughts, the first empty": (f"{THOUGHT}{END}x{THOUGHT}b{END}y", Answer("xy", "b")),
    "thought only": (f"{THOUGHT}hm\n{END}", Answer("", "hm")),
    "unclosed thought": (f"{THOUGHT}hm\nso", Answer("", "hm\nso")),
    "unclosed header": ("<|channel>tho", Answer()),
    "thought inside a thought": (f"{THOUGHT}a{THOUGHT}b{END}x", Answer("x", "a\nb")),
    "call": (PARIS, Answer(calls=[WEATHER])),
    "text and call": (f"Look: {PARIS}", Answer("Look: ", calls=[WEATHER])),
    "thought, text, two calls, text": (
        f"{THOUGHT}hm{END}Look{PARIS}{PARIS}!",
        Answer("Look!", "hm", [WEATHER, WEATHER]),
    ),
    "two calls in one block": (f"{CALL}call:f{{}}call:g{{a:1}}{CALLED}", Answer(calls=[("f", {}), ("g", {"a": 1})])),
    "call in an unclosed thought": (f"{THOUGHT}hm{PARIS}x", Answer("x", "hm", [WEATHER])),
    "braces and a call in a string": (
        f'{CALL}call:f{{a:<|"|>}}{{call:g{{}}<|"|>}}{CALLED}',
        Answer(calls=[("f", {"a": "}{call:g{}"})]),
    ),
    "broken call": (f'{CALL}call:f{{a:<|"|>x<|"|>{CALLED}!', Answer('call:f{a:"x"!')),
    "call that is none": (f"a{CALL}hello{CALLED}b", Answer("ahellob")),
    "empty call": (f"a{CALL}{CALLED}b", Answer("ab")),
    "unclosed call": (f"a{CALL}call:f{{a:1", Answer("acall:f{a:1")),
    "call cut off by another": (f"{CALL}call:f{{{PARIS}", Answer("call:f{", calls=[WEATHER])),
    "stray markers": ("a<|turn>b<turn|><pad>c<bos><|image|><image|><|video|><eos><|think|>d", Answer("abcd")),
    "stray closing markers": (f"a{END}b{CALLED}c<|tool_response>d<tool_response|>e", Answer("abcde")),
    "stray quote": ('a<|"|>b', Answer("ab")),
    "markers inside a thought": (f"{THOUGHT}a<turn|>b<|image|>c{END}d", Answer("d", "abc")),
    "markers inside a call": (f"{CALL}call:f{{<pad>a:<turn|>1}}{CALLED}", Answer(calls=[("f", {"a": 1})])),
    "turn header": ("<|turn>model\nHello", Answer("Hello")),
    "turn header before a thought": (f"<|turn>model\n{THOUGHT}hm{END}x", Answer("x", "hm")),
    "leaked header": ("thought\nHello", Answer("Hello")),
    "leaked thought": (f"thought\nhm\n{END}Hello", Answer("Hello", "hm")),
    "leaked empty thought": (f"thought\n{END}Hello", Answer("Hello")),
    "leaked header, then a thought": (f"thought\n{THOUGHT}hm{END}Hello", Answer("Hello", "hm")),
    "the word alone": ("thought", Answer("thought")),
    "the word in a sentence": ("thoughtful\nmodel\n", Answer("thoughtful\nmodel\n")),
    "the word later on": (f"{THOUGHT}{END}thought\nmodel\n", Answer("thought\nmodel\n")),
    "replacement character": ("a\ufffd", Answer("a\ufffd")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANSWERS)
def test_answers_are_read(kind, name):
    given, expected = ANSWERS[name]
    assert read(given, kind=kind) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ANSWERS)
def test_a_canvas_border_anywhere_changes_nothing(kind, name):
    given, expected = ANSWERS[name]
    length = len(small_tokenizer(kind).encode(given))
    for border in range(length + 1):
        assert read(given, kind=kind, cuts=(border,)) == expected
    assert read(given, kind=kind, cuts=tuple(range(length))) == expected


def test_a_thought_that_the_prompt_has_opened():
    assert read(f"hm\n{END}Hello", thinking_open=True) == Answer("Hello", "hm")
    assert read(f"thought\nhm\n{END}Hello", thinking_open=True) == Answer("Hello", "hm")
    assert read(f"{THOUGHT}hm\n{END}Hello", thinking_open=True) == Answer("Hello", "hm")
    assert read("hm", thinking_open=True) == Answer("", "hm")


def test_call_ids_are_unique():
    tokenizer = small_tokenizer()
    ids = [item.id for _ in range(2) for item in OutputParser(tokenizer).feed(tokenizer.encode(PARIS * 3)).tool_calls]
    assert len(set(ids)) == 6
    assert all(call_id.startswith("call_") for call_id in ids)


def test_deltas_come_as_soon_as_they_are_certain():
    tokenizer = small_tokenizer()
    parser = OutputParser(tokenizer, stop=["stop"])
    assert parser.feed(tokenizer.encode("hello st")).text == "hello "
    assert parser.feed(tokenizer.encode("art")).text == "start"
    assert parser.feed(tokenizer.encode(THOUGHT + "hm")).reasoning == "hm"
    delta = parser.feed(tokenizer.encode(END + PARIS + "x"))
    assert delta.text == "x" and isinstance(delta.tool_calls[0], ToolCall)


# --- half characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_never_shown(kind):
    tokenizer = small_tokenizer(kind)
    for given in ("é😀日本", f"{THOUGHT}😀{END}日", f'{CALL}call:f{{a:<|"|>😀'):
        ids = tokenizer.encode(given)
        for end in range(len(ids) + 1):
            parser = OutputParser(tokenizer)
            for token_id in ids[:end]:
                delta = parser.feed([token_id])
                assert "\ufffd" not in delta.text + delta.reasoning
            delta = parser.finish()
            assert "\ufffd" not in delta.text + delta.reasoning


# --- stop strings -----------------------------------------------------------------------------------------------

STOPS = {
    "in the middle": ("hello stop world", ["stop"], "hello ", "stop"),
    "at the start": ("stop", ["stop"], "", "stop"),
    "absent": ("hello world", ["stop"], "hello world", None),
    "begun and not finished": ("hello sto", ["stop"], "hello sto", None),
    "begun twice": ("sstop", ["stop"], "s", "stop"),
    "overlapping itself": ("aabaaab!", ["aaab"], "aab", "aaab"),
    "complete first": ("abcd", ["abcd", "c"], "ab", "c"),
    "longest of two that end together": ("xab", ["b", "ab"], "x", "ab"),
    "not in the reasoning": (f"{THOUGHT}stop{END}a stop", ["stop"], "a ", "stop"),
    "not in a call": (f'{CALL}call:f{{a:<|"|>stop<|"|>}}{CALLED}a stop', ["stop"], "a ", "stop"),
    "in a call shown as text": (f"{CALL}stop{CALLED}b", ["stop"], "", "stop"),
    "across a stray marker": ("st<turn|>op", ["stop"], "", "stop"),
    "across a thought": (f"st{THOUGHT}hm{END}op", ["stop"], "", "stop"),
    "newline": ("a\n\nb", ["\n\n"], "a", "\n\n"),
    "behind a leaked header": ("thought\nstop", ["stop"], "", "stop"),
    "with characters of several bytes": ("a😀é!", ["😀é"], "a", "😀é"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STOPS)
def test_stop_strings_end_the_visible_text(kind, name):
    given, stop, text, stopped = STOPS[name]
    whole = read(given, kind=kind, stop=stop)
    assert (whole.text, whole.stopped) == (text, stopped)
    for border in range(len(small_tokenizer(kind).encode(given)) + 1):
        assert read(given, kind=kind, stop=stop, cuts=(border,)) == whole


def test_nothing_comes_after_a_stop_string():
    tokenizer = small_tokenizer()
    parser = OutputParser(tokenizer, stop=["stop"])
    assert parser.feed(tokenizer.encode("stop" + PARIS)).stopped == "stop"
    for delta in (parser.feed(tokenizer.encode("hello" + PARIS)), parser.finish()):
        assert (delta.text, delta.reasoning, delta.tool_calls, delta.stopped) == ("", "", (), None)


def test_ids_before_the_stop_string_are_counted():
    tokenizer = small_tokenizer("byte_fallback")  # "hello" and "▁w" are one token each, the other letters are single
    assert tokenizer.detokenize(tokenizer.encode("hello")[:1]) == "hello"
    for given, stop, count in [
        ("ab!cd", "!", 2),
        ("!cd", "!", 0),
        ("ab<turn|>!", "!", 3),  # the marker lies before
        ("hello", "lo", 1),  # begins in the middle of a token: a part of that token is in the answer
        ("ahello", "hello", 1),
        ("ab😀!", "!", 6),
        ("ab😀!", "😀", 2),
        (f"<|channel>hm{END}ab!", "!", 6),
        ("abab!", "b!", 3),
    ]:
        for cuts in ((), tuple(range(len(tokenizer.encode(given))))):
            assert read(given, kind="byte_fallback", stop=[stop], cuts=cuts).count == count, (given, stop)
    assert read("ab", stop=["!"]).count is None


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_bad_stop_strings_are_refused(stop):
    if stop == "":
        stop = [stop]
    with pytest.raises(ValueError, match="stop must be one or more non-empty strings, got"):
        OutputParser(small_tokenizer(), stop=stop)


def test_one_stop_string_need_not_be_in_a_list():
    assert read("a stop", stop="stop").text == "a "


# --- properties -------------------------------------------------------------------------------------------------


def random_ids(rng: random.Random, kind: str) -> list[int]:
    """Ids as a confused model might write them: snippets, markers, bytes of characters, anything."""
    tokenizer = small_tokenizer(kind)
    snippets = [
        THOUGHT,
        END,
        PARIS,
        CALL,
        CALLED,
        "call:f{a:1}",
        "stop",
        "st",
        "thought\n",
        "hello",
        "\n",
        "é😀",
        *SPELLINGS.values(),
    ]
    ids: list[int] = []
    for _ in range(rng.randrange(1, 12)):
        if rng.random() < 0.7:
            ids += tokenizer.encode(rng.choice(snippets))
        else:
            ids += [rng.randrange(tokenizer.vocab_size + 2) for _ in range(rng.randrange(1, 6))]
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_gives_what_one_feed_gives(kind):
    rng = random.Random(7)
    for _ in range(200):
        ids = random_ids(rng, kind)
        options = {"stop": rng.choice([[], ["stop"], ["op", "\n"]]), "thinking_open": rng.random() < 0.3}
        cuts = tuple(sorted(rng.choices(range(len(ids) + 1), k=rng.randrange(1, 6))))
        assert read(ids, kind=kind, cuts=cuts, **options) == read(ids, kind=kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_token_ever_leaks(kind):
    rng = random.Random(8)
    tokenizer = small_tokenizer(kind)
    plain = [i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids]
    letters = [i for i in plain if tokenizer.detokenize([i]).isalnum()]
    for _ in range(200):
        ids = [rng.choice(letters if rng.random() < 0.5 else sorted(tokenizer.all_special_ids)) for _ in range(30)]
        answer = read(ids, kind=kind)
        assert not set("<|>") & set(answer.text + answer.reasoning)


@pytest.mark.parametrize("kind", KINDS)
def test_without_markers_the_text_is_what_detokenizing_gives(kind):
    tokenizer = small_tokenizer(kind)
    rng = random.Random(9)
    for _ in range(100):
        text = "".join(rng.choice("abc é😀日\n.") for _ in range(rng.randrange(30)))
        ids = tokenizer.encode(text)
        assert read(ids, kind=kind).text == tokenizer.detokenize(ids) == text


def test_the_stop_string_is_where_a_search_in_the_whole_text_finds_it():
    rng = random.Random(10)
    for _ in range(300):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 25)))
        stop = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 5)))
        answer = read(text, kind="byte_fallback", stop=[stop])  # one token a letter
        assert answer.text == text.split(stop)[0]
        assert answer.count == (text.index(stop) if stop in text else None)


# --- tool calls -------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "{}": {},
    '{a:<|"|>x<|"|>,b:-1.5e3,c:true,d:null}': {"a": "x", "b": -1500.0, "c": True, "d": None},
    '{k:[1,<|"|>two<|"|>,{z:1.5}]}': {"k": [1, "two", {"z": 1.5}]},
    "{a:None,b:[True,False],c:{d:None}}": {"a": None, "b": [True, False], "c": {"d": None}},
    '{content-type:1,X-Id:<|"|>None}<|"|>,$ref:2,größe:3,a b:4}': {
        "content-type": 1,
        "X-Id": "None}",
        "$ref": 2,
        "größe": 3,
        "a b": 4,
    },
    "{ a : 1 , b : { c : [ ] } }": {"a": 1, "b": {"c": []}},
    '{"a": 1, "b": "x"}': {"a": 1, "b": "x"},
    '{<|"|>a-b<|"|>:1}': {"a-b": 1},
    '{a:<|"|>line\n"quoted" \\ back<|"|>}': {"a": 'line\n"quoted" \\ back'},
    '{a:<|"|><|"|>}': {"a": ""},
}


@pytest.mark.parametrize("written", ARGUMENTS)
def test_arguments_are_read(written):
    assert parse_tool_calls(f"call:f{written}") == [("f", ARGUMENTS[written])]


@pytest.mark.parametrize("name", ["f", "get_weather", "a-b", "server.tool", "ns:tool", "größe"])
def test_names_are_read(name):
    assert parse_tool_calls(f"call:{name}{{a:1}}") == [(name, {"a": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "call:",
        "call:f",
        "call:{}",
        "f{}",
        "x call:f{}",
        "call:f{",
        "call:f{a}",
        "call:f{a:}",
        "call:f{a:x}",
        "call:f{a:12:30}",
        "call:f{}} and more",
        "call:f{}call:g{",
        'call:f{a:<|"|>x}',
        'call:f{a:<|"|>call:g{}<|"|>',
    ],
)
def test_malformed_calls_are_none(text):
    assert parse_tool_calls(text) is None


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "text", ["call:f" + "{" * 3000, "call:f" + "{a:" * 3000 + "1" + "}" * 3000, "call:f{" + "a:1," * 5000]
)
def test_long_malformed_calls_are_none_at_once(text):
    assert parse_tool_calls(text) is None


def test_calls_are_read_to_a_depth_of_64_braces():
    for depth in (64, 65):
        written = "{a:" * (depth - 1) + "{}" + "}" * (depth - 1)
        assert (parse_tool_calls(f"call:f{written}") is not None) == (depth == 64)


def test_closing_braces_too_many_are_forgiven():
    assert parse_tool_calls("call:f{a:1}}\n") == [("f", {"a": 1})]


# --- drafts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_has_one_string_for_every_id(kind):
    tokenizer = small_tokenizer(kind)
    rng = random.Random(11)
    for _ in range(50):
        ids = random_ids(rng, kind)
        shown = preview(tokenizer, ids)
        assert len(shown) == len(ids)
        for token_id, text in zip(ids, shown, strict=True):
            if token_id in tokenizer.all_special_ids:
                assert len(text) == 1 and text not in "<|>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_preview_reads_as_the_text_with_short_markers(kind):
    tokenizer = small_tokenizer(kind)
    given = f'{THOUGHT}hm{END}a😀 é{CALL}call:f{{a:<|"|>x<|"|>}}{CALLED}<turn|><eos><pad><|image|>'
    assert "".join(preview(tokenizer, tokenizer.encode(given))) == '⟨thought\nhm⟩a😀 é⟦call:f{a:"x"}⟧∎∎·◦'
