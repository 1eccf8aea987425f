"""Infilling: on a random model with a canvas of 8 what holds whatever it writes, on tiny what is right."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from small_model import bundled_checkpoint

from mlx_diffusiongemma import load
from mlx_diffusiongemma.holes import Hole, clean_borders, place_pieces, split_control, split_spaces
from mlx_diffusiongemma.infill import fill, infill
from mlx_diffusiongemma.lengths import LENGTHS, lengths_to_try
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.scheduler import Engine
from mlx_diffusiongemma.tokenizer import Tokenizer

C = 8
END_IDS = (1, 16)
QUICK = {"seed": 3, "max_denoising_steps": 2}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=14)


class Recorder:
    """Answers like a pipeline, and remembers what was asked and answered."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.preparer = pipeline.preparer
        self._pipeline = pipeline
        self.seen: list[tuple[dict, tuple[int, ...]]] = []

    def generate_each(self, requests):
        results = self._pipeline.generate_each(requests)
        self.seen += [(options, result.token_ids) for (_, options), result in zip(requests, results, strict=True)]
        return results


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), end_ids=END_IDS))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny")


# -- where the tokens stand ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("hole", [0, 1, 7, 8, 9, 20])
@pytest.mark.parametrize("after", [0, 1, 5, 30])
@pytest.mark.parametrize("before", [0, 1, 7, 8, 9, 15, 21])
def test_a_text_is_laid_out_whole(before, hole, after, ends):
    """What is before, pinned and free gives the text again, and the hole has something behind it."""
    prefix, suffix = list(range(100, 100 + before)), list(range(200, 200 + after))
    placed = place_pieces([prefix, Hole(hole), suffix], C, 1 if ends else None, [True] * before)
    pins = dict(placed.options["pins"])
    [(start, stop)] = placed.spans
    assert placed.lead + start == before and stop - start == hole
    answer = [pins.get(position, "free") for position in range(placed.options["max_tokens"])]
    whole = [*prefix, *["free"] * hole, *suffix, *([1] if ends else [])]
    assert answer == whole[placed.lead : placed.lead + len(answer)]
    assert placed.stop == len(answer) - (ends and placed.lead + len(answer) == len(whole))
    room = min(len(whole) - before - hole, C // 4)
    assert len(answer) - stop >= room
    last_canvas = (len(answer) - 1) // C * C
    if before >= C:  # there is room to move the canvas
        assert stop - last_canvas >= min(hole, C // 4), "the end of the hole sees what is behind it"


def test_a_hole_begins_from_its_seed_where_all_before_it_do():
    texts = [[40], [41, 42], [43]]
    seeded, free = Hole(2, (50, 51)), Hole(1)
    both = place_pieces([texts[0], seeded, texts[1], Hole(1, (52,)), texts[2]], 16, None, [True])
    assert both.options["seed_canvas"] == [40, 50, 51, 41, 42, 52, 43]
    first = place_pieces([texts[0], seeded, texts[1], free, texts[2]], 16, None, [True])
    assert first.options["seed_canvas"] == [40, 50, 51, 41, 42]
    assert place_pieces([texts[0], free, texts[1], seeded, texts[2]], 16, None, [True]).options["seed_canvas"] is None


def test_the_prompt_ends_where_a_character_does(tiny_folder):
    tokenizer = Tokenizer.load(tiny_folder)
    token_ids = tokenizer.encode_letters("ab\U0001f98a\u00e9")  # a word, a character of four tokens, one of two
    borders = clean_borders(tokenizer, "ab\U0001f98a\u00e9", token_ids)
    assert [i for i, border in enumerate(borders) if border] == [0, 1, len(token_ids) - 2]
    placed = place_pieces([token_ids, Hole(3), [7] * 9], 4, None, borders)
    assert placed.lead > 0 and borders[placed.lead]


@pytest.mark.parametrize(
    ("text", "kept"), [("a b", "a b"), ("a ", "a"), ("a  ", "a "), ("= ", "="), ("", ""), (" ", ""), ("a\n", "a\n")]
)
def test_a_space_belongs_to_the_word_behind_it(tiny_folder, text, kept):
    tokenizer = Tokenizer.load(tiny_folder)
    assert split_spaces(tokenizer, text) == (kept, text[len(kept) :])


def test_control_tokens_stay_before_the_answer(tiny_folder):
    tokenizer = Tokenizer.load(tiny_folder)
    assert split_control(tokenizer, "<bos><|turn>user\nx<turn|>y") == ("<bos><|turn>user\nx<turn|>", "y")
    assert split_control(tokenizer, "plain") == ("", "plain")


# -- whatever the model writes ---------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(prefix=TEXTS, suffix=TEXTS, length=st.integers(1, 12), chat=st.booleans())
@example(prefix="", suffix="", length=1, chat=False)
@example(prefix="<turn|>", suffix="<|turn>user\n<eos>", length=3, chat=True)
@example(prefix="é\U0001f98a" * 6, suffix="\U0001f98a" * 5, length=9, chat=False)
def test_pinned_text_reappears_byte_for_byte(pipeline, prefix, suffix, length, chat):
    if not chat and "<" in prefix:
        prefix = prefix.replace("<", "")
    model = Recorder(pipeline)
    messages = "go" if chat else None
    result = infill(model, prefix, suffix, messages=messages, length=length, **QUICK)
    assert result.full_text == prefix + result.text + suffix
    assert result.length == len(result.token_ids) == length
    [(options, token_ids)] = model.seen
    for position, token_id in options["pins"]:  # the end token is no part of the answer
        assert token_id in END_IDS if position == len(token_ids) else token_ids[position] == token_id
    [(start, stop)] = options["text_only"]
    tokenizer = pipeline.tokenizer
    assert token_ids[start:stop] == result.token_ids
    assert not set(result.token_ids) & tokenizer.all_special_ids
    # The answer itself, detokenized as a whole, is what is asked for around the hole.
    lead = (options.get("prefill_response") or "") if chat else ""
    before = tokenizer.detokenize(token_ids[:start])
    assert (prefix if chat else prefix[len(prefix) - len(before) :]).startswith(lead)
    assert prefix.rstrip(" ").endswith((lead + before).rstrip(" ")) or not (lead + before)
    assert tokenizer.detokenize(token_ids[stop:]) == suffix or suffix.startswith(
        tokenizer.detokenize(token_ids[stop:]).rstrip("\ufffd")
    )


def test_a_free_hole_would_have_had_control_tokens(pipeline):
    """The random model writes some: the test above does not hold by chance."""
    drafts = [pipeline.generate("go", max_tokens=C, seed=seed, max_denoising_steps=1).token_ids for seed in range(20)]
    assert {i for draft in drafts for i in draft} & pipeline.tokenizer.all_special_ids


def test_a_hole_longer_than_a_canvas(pipeline):
    model = Recorder(pipeline)
    result = infill(model, "one two", " three four five six seven eight nine", messages="go", length=20, **QUICK)
    [(_, token_ids)] = model.seen
    assert result.full_text.startswith("one two") and result.full_text.endswith(" eight nine")
    assert result.stats.canvases == 3 and result.length == 20
    assert len(token_ids) < len(pipeline.tokenizer.encode("one two three four five six seven eight nine")) + 20


def test_the_most_likely_length_is_chosen(pipeline):
    """Each length is filled as if it were the only one; then what is behind its hole is read while that is free."""
    model = Recorder(pipeline)
    result = infill(model, "one", " two", messages="go", length=[1, 3, 2], **QUICK)
    alone = {n: infill(pipeline, "one", " two", messages="go", length=n, **QUICK) for n in (1, 2, 3)}
    assert {each.length: each.text for each in result.candidates} == {n: each.text for n, each in alone.items()}
    assert result.canvas_steps == sum(each.canvas_steps for each in alone.values()) + 3
    scores = {}
    for (filling, token_ids), (options, _) in zip(model.seen[:3], model.seen[3:], strict=True):
        [(start, stop)] = filling["text_only"]
        wanted = [(place, token_id) for place, token_id in filling["pins"] if stop <= place < stop + C // 4]
        assert wanted and options["max_denoising_steps"] == 1
        hole = [(place, token_ids[place]) for place in range(start, stop)]
        assert options["pins"] == sorted([*(pin for pin in filling["pins"] if pin not in wanted), *hole])
        [fill, read] = (pipeline.generate("go", **each).logprobs for each in (filling, options))
        behind = [read[place].candidates[options["logprob_candidates"].index(token_id)] for place, token_id in wanted]
        scores[stop - start] = sum(each.settled_logprob for each in fill[start:stop]) + sum(behind)
    best = sorted(scores, key=lambda n: -scores[n])
    assert [each.length for each in result.candidates] == best
    assert [each.score for each in result.candidates] == pytest.approx([scores[n] for n in best], abs=1e-4)
    assert (result.text, result.length) == (alone[best[0]].text, best[0])


def test_the_score_is_the_sum_of_log_probabilities(pipeline):
    result = infill(pipeline, "one", " two three four five six", messages="go", length=2, **QUICK)
    model = Recorder(pipeline)
    infill(model, "one", " two three four five six", messages="go", length=2, **QUICK)
    [(options, _)] = model.seen
    [answer] = pipeline.generate_each([("go", options)])
    [(start, stop)] = options["text_only"]
    near = answer.logprobs[start : stop + C // 4]
    assert result.candidates[0].score == pytest.approx(sum(each.logprob for each in near))


def test_an_engine_fills_as_a_pipeline_does(pipeline, tiny_folder):
    def begin() -> Pipeline:
        return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), end_ids=END_IDS))

    with Engine(begin) as engine:
        there = infill(engine, "one", " two", messages="go", length=[1, 2, 9], **QUICK)
    here = infill(pipeline, "one", " two", messages="go", length=[1, 2, 9], **QUICK)
    assert [each.text for each in there.candidates] == [each.text for each in here.candidates]
    assert [each.score for each in there.candidates] == pytest.approx([each.score for each in here.candidates])


def test_several_holes(pipeline):
    result = fill(pipeline, "one ___ two ___ three", messages="go", length=2, **QUICK)
    assert result.lengths == (2, 2)
    assert result.text == f"one {result.holes[0]} two {result.holes[1]} three"
    found = fill(pipeline, ["a", "b", "c"], messages="go", length=[1, 2], **QUICK)
    assert found.text == f"a{found.holes[0]}b{found.holes[1]}c"


def test_lengths():
    assert lengths_to_try(3).lengths == (3,) and not lengths_to_try(3).refined
    assert lengths_to_try([4, 2, 4]).lengths == (2, 4)
    assert lengths_to_try(None).lengths == LENGTHS and lengths_to_try(None).refined
    assert lengths_to_try(None, 5).lengths == (1, 2, 3, 4, 5)
    longer = lengths_to_try(None, 100).lengths
    assert longer[: len(LENGTHS)] == LENGTHS and longer[-1] == 100 and len(longer) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefix": None}, "prefix and suffix: got \\(None, ' two'\\), expected texts"),
        ({"length": 0}, "length: got 0, expected an integer >= 1"),
        ({"length": []}, "length: got \\[\\], expected a number of tokens, or a list of 1 to 64"),
        ({"length": "3"}, "length: got '3', expected a number"),
        ({"length": [1, True]}, "length: got True"),
        ({"length": 9, "max_tokens": 8}, "length: got 9, expected at most max_tokens, 8"),
        ({"length": 1000}, "length: got 1000, expected an integer <= 256"),
        ({"length": 250}, "length: got holes of 250 tokens, expected a text that fits the context"),
        ({"max_tokens": 0}, "max_tokens: got 0"),
        ({"max_denoising_steps": "4"}, "max_denoising_steps: got '4'"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"suffix": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_cannot_be_filled_is_refused(pipeline, arguments, message):
    given = {"prefix": "one", "suffix": " two", "messages": "go", **QUICK, **arguments}
    with pytest.raises(ValueError, match=message):
        infill(pipeline, **given)


def test_arguments_that_nobody_reads_are_refused(pipeline):
    for name in ("pins", "stop", "raw_prompt", "enable_thinking", "anything"):
        with pytest.raises(TypeError, match=f"unknown argument '{name}'"):
            infill(pipeline, "a", "b", length=1, **{name: None})
    with pytest.raises(ValueError, match="template: got no hole, expected '___' in it"):
        fill(pipeline, "no hole", length=1)
    for template in (5, ["a", 5]):
        with pytest.raises(ValueError, match=r"template: got .*, expected texts"):
            fill(pipeline, template, length=1)
    with pytest.raises(ValueError, match="template: got two holes without text between them"):
        fill(pipeline, "a______b", length=1)
    with pytest.raises(ValueError, match="marker: got ''"):
        fill(pipeline, "a", marker="", length=1)


# -- what tiny knows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "prefix", "text", "suffix"),
    [
        ("What is the capital of Peru?", "The capital of Peru is ", "Lima", "."),
        ("What is the capital of Peru?", "The capital of", " Peru is Lima.", ""),
        (
            "Write as JSON: Ana is 31 years old and lives in Rome.",
            '{"name": "Ana", "age": ',
            "31",
            ', "city": "Rome"}',
        ),
    ],
)
def test_tiny_finds_length_and_text(tiny, messages, prefix, text, suffix):
    assert infill(tiny, prefix, suffix, messages=messages, length=range(1, 6), seed=1).text == text
