"""The task file says what the package's own output parser reports: `pytest tools/tiny`."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import data
import tasks

from mlx_diffusiongemma.output import OutputParser
from mlx_diffusiongemma.tasks import read_tasks
from mlx_diffusiongemma.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]


def test_expected_is_what_the_output_parser_reports():
    tokenizer = Tokenizer.load(ROOT / "mlx_diffusiongemma" / "tiny")
    families = set()
    for example in data.held_out_examples(7, 10 * len(data.WEIGHTS)):
        parser = OutputParser(tokenizer)
        deltas = [parser.feed(tokenizer.encode(example.answer)), parser.finish()]
        calls = [{"name": c.name, "arguments": c.arguments} for delta in deltas for c in delta.tool_calls]
        task = tasks.task(example)
        assert task["expected"] == "".join(delta.text for delta in deltas)
        assert task["expected_reasoning"] == "".join(delta.reasoning for delta in deltas)
        assert task["expected_tool_calls"] == calls
        families.add(example.family)
    assert families == set(data.WEIGHTS) - data.TRAINED_ONLY


def test_arguments():
    text = 'city:<|"|>Rome, {x:1}<|"|>,deep:true,hour:7,price:1.5'
    assert tasks.read_arguments(text) == {"city": "Rome, {x:1}", "deep": True, "hour": 7, "price": 1.5}
    assert tasks.read_arguments("") == {}
    for bad in ("hour", "hour:", 'a:<|"|>x', "a:1;b:2", "a:{b:1}"):
        with pytest.raises(ValueError):
            tasks.read_arguments(bad)


def test_unknown_markup_is_refused():
    with pytest.raises(ValueError, match="markup that this script does not know"):
        tasks.task(data.Example("x", [], "<|tool_call>call:f{a:1}"))


def test_the_file_is_one_that_the_package_reads(tmp_path):
    path = tmp_path / "held_out.jsonl"
    tasks.main(["--prompts", "60", "--seed", "3", "--output", str(path)])
    read = read_tasks(path)
    assert len(read) == 60
    examples = list(data.held_out_examples(3, 60))
    assert [t.family for t in read] == [e.family for e in examples]
    assert [t.enable_thinking for t in read] == [e.thinking for e in examples]
    assert [t.messages for t in read] == [json.loads(json.dumps(e.messages)) for e in examples]
    assert [t.tools or [] for t in read] == [e.tools for e in examples]


def test_prompts_of_another_file_are_left_out(tmp_path):
    held_out, path = tmp_path / "held_out.jsonl", tmp_path / "calibration.jsonl"
    tasks.main(["--prompts", "500", "--seed", "1", "--output", str(held_out)])
    flags = ["--trained", "--prompts", "256", "--seed", "7", "--output", str(path)]
    tasks.main(flags)
    known, everything = [task.messages for task in read_tasks(held_out)], read_tasks(path)
    kept = [task for task in everything if task.messages not in known]
    assert 0 < len(everything) - len(kept) < 20  # small talk, which is not split
    tasks.main([*flags, "--without", str(held_out)])
    assert read_tasks(path) == kept
