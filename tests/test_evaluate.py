"""The evaluation command line: end to end on tiny and a quantised copy of it, tables, JSON, errors."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from small_model import save_checkpoint, save_tokenizer
from terminal import run_in_process

from mlx_diffusiongemma import __main__, evaluate
from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.tasks import PROMPTS, make_task

PARTS = ["embedding", "attention", "dense MLP", "router", "experts", "self-conditioning"]
TASKS = [
    {"messages": [{"role": "user", "content": "What is the capital of France?"}], "expected": "no", "family": "b"},
    {"messages": [{"role": "user", "content": "Spell cat."}], "expected": "no", "family": "a"},
    {"messages": [{"role": "user", "content": "Hello"}], "enable_thinking": True},
]


run_main = partial(run_in_process, evaluate.main)


def changed_copy(source: Path, target: Path, **values: object) -> Path:
    """Copy a checkpoint folder and replace values of its `config.json`."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **values}))
    return target


@pytest.fixture(scope="module")
def quantised_tiny(tiny_folder, tmp_path_factory) -> str:
    """Write `tiny` in 4 bits."""
    settings = {"group_size": 32, "bits": 4}
    folder = changed_copy(tiny_folder, tmp_path_factory.mktemp("evaluate") / "tiny-4bit", quantization=settings)
    model = load_checkpoint(tiny_folder).model
    nn.quantize(
        model, **settings, class_predicate=lambda path, each: hasattr(each, "to_quantized") and ".encoder." not in path
    )
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return str(folder)


@pytest.fixture
def task_file(tmp_path) -> str:
    """Write three tasks; two of them with an answer that the model does not give."""
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    return str(path)


# -- output -------------------------------------------------------------------------------------------------------


def test_json_against_a_reference(capsys, quantised_tiny, task_file):
    flags = ["--tasks", task_file, "--max-tokens", "32", "--trajectories", "1", "--seed", "3", "--json"]
    code, out, err = run_main(capsys, "--model", quantised_tiny, "--reference", "tiny", *flags)
    assert (code, err) == (0, "")
    assert len(out.splitlines()) == 1
    result = json.loads(out)
    assert (result["model"], result["reference"]) == (quantised_tiny, "tiny")
    assert (result["tasks"], result["seed"]) == (3, 3)
    assert [part["part"] for part in result["weights"]["parts"]] == PARTS
    assert all(0.01 < part["relative_error"] <= part["worst_error"] < 0.2 for part in result["weights"]["parts"])
    modules = {module["path"] for module in result["weights"]["modules"]}
    assert len(modules) == sum(part["modules"] for part in result["weights"]["parts"])
    assert "model.decoder.layers.0.experts.gate_up_proj" in modules
    agreement = result["agreement"]
    assert agreement["positions"] == 64 * agreement["steps"] > 0
    assert 0 < agreement["mean_kl"] < agreement["max_kl"]
    assert 0 < agreement["argmax_agreement"] <= 1 and 0 < agreement["accepted_agreement"] <= 1
    assert list(result["generation"]) == ["reference", "candidate"]
    for statistics in result["generation"].values():
        assert statistics["tasks"] == statistics["canvases"] == 3
        assert statistics["accuracy"] == {"right": 0, "tasks": 2, "exact_match": 0.0}
        assert list(statistics["families"]) == ["a", "b"]


def test_tables_against_a_reference(capsys, task_file):
    """Of a model with itself: exact zeros, and every row there."""
    flags = ["--tasks", task_file, "--max-tokens", "16", "--trajectories", "1", "--limit", "2"]
    code, out, err = run_main(capsys, "--model", "tiny", "--reference", "tiny", *flags)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:5] == [
        "candidate: tiny",
        "reference: tiny",
        f"tasks: 2 from {task_file}, seed 0",
        "",
        "weights: the candidate has no quantised module",
    ]
    assert lines[6].startswith("| the reference's canvases (1 tasks, 1 canvases, ")
    assert lines[7:13] == [
        "|---|---:|",
        "| mean KL(reference, candidate), nats | 0.000e+00 |",
        "| max KL(reference, candidate), nats | 0.000e+00 |",
        "| same argmax | 100.00% |",
        "| same decision to accept | 100.00% |",
        "| mean entropy difference, nats | 0.000e+00 |",
    ]
    assert lines[14:17] == ["| generation | reference | candidate |", "|---|---:|---:|", "| canvases | 2 | 2 |"]
    rows = [line.strip("| ").split(" | ") for line in lines[17:]]
    assert [row[0] for row in rows] == [
        "steps per canvas, mean",
        "steps per canvas, median",
        "steps per canvas, 90th percentile",
        "tokens per forward",
        "exact match, overall",
        "exact match, a",
        "exact match, b",
    ]
    assert all(row[1] == row[2] for row in rows)
    assert rows[4][1] == "0.0% (0 of 2)"


def test_table_of_the_weights():
    from mlx_diffusiongemma.quality import PartError

    part = PartError("router", 30, 1000, ("4-bit affine, group 64", "8-bit affine, group 64"), 0.0123, 0.2, "x")
    assert evaluate.weights_table([part])[2:] == [
        "| router | 30 | 4-bit affine, group 64; 8-bit affine, group 64 | 1.23e-02 | 2.00e-01 |"
    ]


def test_without_a_reference_steps_and_accuracy_are_measured(capsys):
    code, out, err = run_main(capsys, "--model", "tiny", "--limit", "1", "--max-tokens", "8")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[:2] == ["candidate: tiny", "tasks: 1 from the built-in prompts, seed 0"]
    assert lines[3:5] == ["| generation | candidate |", "|---|---:|"]
    assert lines[-1] == "| exact match, overall | - |"
    code, out, _ = run_main(capsys, "--model", "tiny", "--limit", "1", "--max-tokens", "8", "--json")
    result = json.loads(out)
    assert (code, result["reference"], result["weights"], result["agreement"]) == (0, None, None, None)
    assert list(result["generation"]) == ["candidate"]


def test_built_in_prompts_are_tasks_without_one_answer():
    tasks = [make_task(values) for values in PROMPTS]
    assert len(tasks) == 12
    assert any(task.enable_thinking for task in tasks) and any(task.tools for task in tasks)
    assert all(task.expected is None and task.expected_tool_calls is None for task in tasks)


# -- errors -------------------------------------------------------------------------------------------------------


BAD = [
    ([], "the following arguments are required: --model"),
    (["--model", "/no/such/folder"], "model '/no/such/folder' is not a folder"),
    (["--model", "tiny", "--reference", "/no/such/folder"], "model '/no/such/folder' is not a folder"),
    (["--model", "tiny", "--tasks", "/no/such/file.jsonl"], "/no/such/file.jsonl: No such file or directory"),
    (["--model", "tiny", "--limit", "0"], "argument --limit: got '0', expected an integer of at least 1"),
    (["--model", "tiny", "--trajectories", "x"], "argument --trajectories: got 'x', expected an integer of at least 1"),
    (["--model", "tiny", "--max-tokens", "-1"], "argument --max-tokens/-m: got '-1', expected an integer of at least"),
    (["--model", "tiny", "--seed", "-1"], "seed: got -1"),
    (["--model", "tiny", "loose"], "unrecognized arguments: loose"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run_main(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_bad_task_file(capsys, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"messages": []}\n')
    code, out, err = run_main(capsys, "--model", "tiny", "--tasks", str(path))
    assert (code, out) == (2, "")
    assert err == f"error: {path} line 1: the prompt is empty: got no messages, expected at least one\n"


def test_prompt_longer_than_the_context(capsys, tmp_path):
    path = tmp_path / "tasks.jsonl"
    long = {"messages": [{"role": "user", "content": "word " * 5000}]}
    path.write_text(json.dumps(TASKS[0]) + "\n" + json.dumps(long) + "\n")
    code, out, err = run_main(capsys, "--model", "tiny", "--tasks", str(path))
    assert (code, out) == (2, "")
    assert err.startswith("error: task 2 does not suit the candidate: the prompt has ")
    assert err.count("\n") == 1


def test_candidate_with_another_vocabulary(capsys, tmp_path):
    folder = save_checkpoint(tmp_path / "small")
    save_tokenizer(folder)
    code, out, err = run_main(capsys, "--model", str(folder), "--reference", "tiny")
    assert (code, out) == (2, "")
    assert err.startswith("error: the candidate has vocab_size 96, expected ")
    assert err.endswith(" as in the reference\n")


def test_candidate_with_another_canvas_length(capsys, tmp_path, tiny_folder):
    folder = changed_copy(tiny_folder, tmp_path / "tiny-32", canvas_length=32)
    code, out, err = run_main(capsys, "--model", str(folder), "--reference", "tiny")
    assert (code, out) == (2, "")
    assert err == "error: the candidate has canvas_length 32, expected 64 as in the reference\n"


def test_ctrl_c_is_quiet(monkeypatch, capsys):
    import mlx_diffusiongemma.quality

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mlx_diffusiongemma.quality, "generation_statistics", interrupted)
    assert run_main(capsys, "--model", "tiny") == (130, "", "")


# -- entry points -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [["-m", "mlx_diffusiongemma.evaluate"], ["-m", "mlx_diffusiongemma", "evaluate"]], ids=" ".join
)
def test_every_way_to_start(run_program, command):
    done = run_program(*command, "--help")
    assert done.returncode == 0
    assert done.stdout.startswith(b"usage: mlx_diffusiongemma.evaluate")
    assert done.stderr == b""


def test_help_imports_nothing_heavy(run_program):
    heavy = ("mlx", "mlx_lm", "numpy", "tokenizers", "rich", "jinja2")
    code = f"import sys, mlx_diffusiongemma.evaluate; print(sorted(set(sys.modules) & set({heavy})))"
    assert run_program("-c", code).stdout == b"[]\n"


def test_it_is_a_subcommand(capsys):
    assert __main__.main(["--help"]) == 0
    assert "evaluate" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        __main__.main(["evaluate", "--limit", "0"])
    assert capsys.readouterr().err.startswith("error: argument --limit")
