"""Editing: what is not selected stays as it is, whatever the model writes; tiny mends what is wrong."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_model import bundled_checkpoint

from mlx_diffusiongemma import load
from mlx_diffusiongemma.edit import Change, check_selection, edit, edit_prompt, unified_diff
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.scheduler import Engine
from mlx_diffusiongemma.tokenizer import Tokenizer

QUICK = {"seed": 3, "max_denoising_steps": 2}
RECORD = '{"name": "Ana", "age": 31, "city": "Rome"}'
AS_JSON = "Write as JSON: Ana is 31 years old and lives in Rome."


@pytest.fixture(scope="module")
def pipeline(tiny_folder) -> Pipeline:
    return Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), end_ids=(1, 16)))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny")


def check(result, text: str) -> None:
    """Check that changes and text agree, and that everything outside of them is the old text."""
    rebuilt, rest = "", 0
    for change in result.changes:
        assert rest <= change.start <= change.stop and text[change.start : change.stop] == change.old != change.new
        rebuilt += text[rest : change.start] + change.new
        rest = change.stop
    assert result.text == rebuilt + text[rest:]


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), data=st.data())
def test_what_is_not_selected_is_untouched(pipeline, text, data):
    places = sorted(
        data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=4).filter(lambda x: len(x) != 3))
    )
    selection = list(zip(places[::2], places[1::2], strict=True))
    result = edit(pipeline, text, "Change it", selection=selection, length=[1, 2], **QUICK)
    check(result, text)
    assert len(result.holes) == len(selection)
    rest = 0
    for start, stop in selection:
        assert all(change.stop <= start or change.start >= rest for change in result.changes)
        rest = stop


@settings(max_examples=10, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=20))
def test_what_the_model_selects_is_all_that_changes(pipeline, text):
    check(edit(pipeline, text, "Change it", length=2, **QUICK), text)


def test_a_selection_of_many_canvases_of_text(pipeline):
    text = " ".join(f"word{i}" for i in range(30))
    result = edit(pipeline, text, "Change it", selection=(100, 105), length=2, **QUICK)
    check(result, text)
    [hole] = result.holes
    assert hole.stats.canvases <= 2, "what is far from the selection is in the prompt, or not needed"


def test_an_engine_edits_as_a_pipeline_does(pipeline, tiny_folder):
    with Engine(lambda: Pipeline(bundled_checkpoint(Tokenizer.load(tiny_folder), end_ids=(1, 16)))) as engine:
        there = edit(engine, "one two three", "Change it", selection=(4, 7), length=[1, 2], **QUICK)
    assert there.text == edit(pipeline, "one two three", "Change it", selection=(4, 7), length=[1, 2], **QUICK).text


@pytest.mark.parametrize(
    ("text", "messages", "selection", "changes"),
    [
        ("The capital of Peru is Rome.", "What is the capital of Peru?", (23, 27), [Change(23, 27, "Rome", "Lima")]),
        (RECORD.replace("31", "45"), AS_JSON, None, [Change(23, 25, "45", "31")]),
        (RECORD, AS_JSON, None, []),
    ],
)
def test_tiny_mends_what_is_wrong(tiny, text, messages, selection, changes):
    result = edit(tiny, text, messages=messages, selection=selection, seed=1)
    assert list(result.changes) == changes
    check(result, text)
    assert (result.diff == "") == (not changes)


def test_tiny_mends_two_canvases(tiny):
    right = ", ".join(map(str, range(1, 31)))
    wrong = right.replace("10", "11", 1).replace("30", "31")
    assert edit(tiny, wrong, messages="Count to 30.", seed=1).text == right


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("a\nb\nc\n", "a\nB\nc\n"),
        ("a\nb", "a\nc"),
        ("a", "a\n"),
        ("x\u2028y\x0cz\x85\nb", "w\u2028y\x0cz\x85\nb"),
        ("a\r\nb\rc\n", "a\r\nb\rd\n"),
    ],
)
def test_patch_reads_the_diff(tmp_path, old, new):
    path = tmp_path / "old"
    path.write_bytes(old.encode())
    given = unified_diff(old, new).encode()
    subprocess.run(["patch", "--binary", str(path)], input=given, check=True, capture_output=True)
    assert path.read_bytes() == new.encode()


def test_the_prompt_reads_like_a_sentence():
    assert edit_prompt("a cat", "Change a to the") == "Change a to the:\na cat"
    assert edit_prompt("a cat", "Change a to the. ") == "Change a to the.\n\na cat"


def test_selections():
    assert check_selection((1, 2), 3) == [(1, 2)]
    assert check_selection([[0, 1], [1, 3]], 3) == [(0, 1), (1, 3)]
    for wrong in ("12", (), (1, 2, 3), [(1,)], 5, [(0, 1), "ab"]):
        with pytest.raises(ValueError, match="selection: got"):
            check_selection(wrong, 3)
    with pytest.raises(ValueError, match="selection: stop: got 4, expected an integer <= 3"):
        check_selection((1, 4), 3)
    with pytest.raises(ValueError, match="selection: start: got 1, expected an integer >= 2"):
        check_selection([(0, 2), (1, 3)], 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": ""}, "text: got '', expected some text"),
        ({"instruction": " "}, "instruction: got ' ', expected some text"),
        ({"instruction": None}, "expected an instruction or messages, and not both"),
        ({"messages": "go"}, "expected an instruction or messages, and not both"),
        ({"length": -1}, "length: got -1"),
    ],
)
def test_what_cannot_be_edited_is_refused(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        edit(pipeline, **{"text": "one", "instruction": "Change it", **arguments})
