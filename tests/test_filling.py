"""--prefix, --suffix and --edit of the command line."""

from __future__ import annotations

import json
from functools import partial

import pytest
from terminal import run_in_process

from mlx_diffusiongemma import generate, load
from mlx_diffusiongemma.edit import edit, edit_prompt
from mlx_diffusiongemma.infill import infill

run_main = partial(run_in_process, generate.main)
TINY = ("--model", "tiny", "--seed", "1", "--infill-length", "1", "2")
QUESTION = "What is the capital of Peru?"


@pytest.fixture(scope="module")
def alone():
    return load("tiny")


def test_a_hole(capsys, alone):
    arguments = ("--prefix", "The capital of Peru is ", "--suffix", ".", "--prompt", QUESTION, *TINY)
    assert run_main(capsys, *arguments) == (0, "Lima", "")
    code, out, _ = run_main(capsys, *arguments, "--json")
    expected = infill(alone, "The capital of Peru is ", ".", messages=QUESTION, length=[1, 2], seed=1)
    found = json.loads(out)
    assert code == 0 and found["full_text"] == expected.full_text == "The capital of Peru is Lima."
    assert found["model"] == "tiny" and len(found["candidates"]) == 2
    raw = infill(alone, "1, 2, ", ", 4, 5", length=[1, 2], seed=1)
    assert run_main(capsys, "--prefix", "1, 2, ", "--suffix", ", 4, 5", *TINY) == (0, raw.text, "")


def test_prompts_are_kept_where_the_user_says(capsys, tmp_path):
    arguments = ("--prefix", "1, 2, ", "--suffix", ", 4, 5", *TINY, "--prompt-cache-dir", str(tmp_path))
    assert run_main(capsys, *arguments)[0] == 0
    assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_an_edit(capsys, alone, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"Ana has 5 cats.\r\n")
    arguments = ("--edit", str(path), "--prompt", "Change 5 to 7", "--select", "8:9", *TINY)
    expected = edit(alone, "Ana has 5 cats.\r\n", "Change 5 to 7", selection=(8, 9), length=[1, 2], seed=1)
    code, out, err = run_main(capsys, *arguments)
    assert (code, out, err) == (0, expected.text, "")
    assert out.startswith("Ana has ") and out.endswith(" cats.\r\n")
    assert run_main(capsys, *arguments, "--diff")[1] == expected.diff
    message = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": edit_prompt("Ana has 5 cats.\r\n", "Change 5 to 7")},
    ]
    expected = edit(alone, "Ana has 5 cats.\r\n", messages=message, selection=(8, 9), length=[1, 2], seed=1)
    assert run_main(capsys, *arguments, "--system", "Be brief.")[1] == expected.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefix", "a"], "--prefix and --suffix need each other"),
        (["--suffix", "a"], "--prefix and --suffix need each other"),
        (["--edit", "f"], "--edit needs --prompt"),
        (["--edit", "-", "--prompt", "-"], "--edit and --prompt cannot both read stdin"),
        (["--edit", "f", "--prompt", "x", "--prefix", "a", "--suffix", "b"], "--edit and --prefix exclude each other"),
        (["--diff"], "--select and --diff need --edit"),
        (["--select", "1:2"], "--select and --diff need --edit"),
        (["--infill-length", "3"], "--infill-length needs --prefix and --suffix, or --edit"),
        (["--prefix", "a", "--suffix", "b", "--chat"], "--chat goes with neither --prefix nor --edit"),
        (["--edit", "f", "--prompt", "x", "--stop", "y"], "--stop goes with neither --prefix nor --edit"),
        (["--prefix", "a", "--suffix", "b", "--regex", "x"], "--regex goes with neither --prefix nor --edit"),
        (["--edit", "f", "--prompt", "x", "--choices", "a"], "--choices goes with neither --prefix nor --edit"),
        (["--prefix", "a", "--suffix", "b", "--json", "--logprobs", "0"], "--logprobs goes with neither"),
        (["--edit", "f", "--prompt", "x", "--diff", "--json"], "--diff and --json exclude each other"),
        (["--edit", "f", "--prompt", "x", "--no-guard-empty"], "--no-guard-empty goes with neither"),
        (["--edit", "f", "--prompt", "x", "--chat-template-config", '{"enable_thinking": true}'], "goes with neither"),
        (["--prefix", "a", "--suffix", "b", "--system-prompt", "x"], "--system-prompt with --prefix needs --prompt"),
        (["--prefix", "a", "--suffix", "b", "--image", "x.png"], "--image with --prefix needs --prompt"),
        (
            ["--edit", __file__, "--prompt", "x", "--select", "9:999999", "--model", "nowhere"],
            "selection: stop: got 999999",
        ),
        (["--edit", __file__, "--prompt", "x", "--max-tokens", "0", "--model", "nowhere"], "max_tokens: got 0"),
        (["--edit", "f", "--prompt", "x", "--select", "1-2"], "--select: got '1-2', expected START:STOP"),
        (["--edit", "/nowhere", "--prompt", "x", "--model", "tiny"], "--edit /nowhere: No such file or directory"),
        (["--prefix", "a", "--suffix", "b", "--infill-length", "0", "--model", "tiny"], "length: got 0"),
    ],
)
def test_errors(capsys, arguments, message):
    code, out, err = run_main(capsys, *arguments)
    assert (code, out) == (2, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
