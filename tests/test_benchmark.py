"""The benchmark command line: a run on tiny, its JSON and its page, what is counted, bad input."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from terminal import run_in_process

from mlx_diffusiongemma import __main__, benchmark, peer, plots
from mlx_diffusiongemma.benchmark_tables import comparison_lines
from mlx_diffusiongemma.config import load_configs
from mlx_diffusiongemma.counting import Pass, parameters, step_work, total
from mlx_diffusiongemma.denoise import Denoiser
from mlx_diffusiongemma.events import DenoisingStep
from mlx_diffusiongemma.measure import TimedRequest, describe_steps, mean_by_step, model_bits, repeated, summarise
from mlx_diffusiongemma.peer import Answer, TokenSink
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.probe import PART_NAMES, counted_waits, probe
from mlx_diffusiongemma.workload import own_prompts, read_prompts, runs_of_random_tokens, runs_of_tasks

run_main = partial(run_in_process, benchmark.main)
PROMPTS = [
    "What is 7 - 3?",
    '"Spell\\ncat."',
    '[{"role": "user", "content": "What is 17 + 25?"}]',
    '{"messages": [{"role": "user", "content": "What is the capital of Peru?"}], "expected": "no", "family": "a"}',
]


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny", prefix_bytes=0)


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("benchmark") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def report(prompt_file, tmp_path_factory) -> dict:
    """Run it once with everything but the peer."""
    folder = tmp_path_factory.mktemp("report")
    flags = ["--model", "tiny", "--prompts", str(prompt_file), "-g", "80", "-n", "2", "--seed", "5", "--probe", "2"]
    outputs = ["--json", str(folder / "report.json"), "--report", str(folder / "report.html")]
    assert benchmark.main([*flags, *outputs, "--roofline", "M3 Max"]) == 0
    return {**json.loads((folder / "report.json").read_text()), "page": (folder / "report.html").read_text()}


# -- the report -------------------------------------------------------------------------------------------------------


def test_counts_add_up(report):
    summary, requests = report["summary"], report["requests"]
    assert len(requests) == summary["requests"] == 8
    assert [(request["prompt"], request["seed"]) for request in requests] == [
        (n, s) for s in (5, 6) for n in (1, 2, 3, 4)
    ]
    steps = [count for request in requests for count in request["steps"]]
    assert summary["canvases"] == len(steps) and summary["denoising_steps"] == sum(steps)
    assert summary["row_steps"] == 64 * sum(steps) and summary["rows_per_step"] == 64
    assert summary["steps_per_canvas"]["mean"] == pytest.approx(np.mean(steps))
    assert sum(summary["steps_per_canvas"]["histogram"].values()) == len(steps)
    assert summary["generated_tokens"] == sum(request["generated_tokens"] for request in requests) > 0
    assert summary["tokens_per_forward"] == pytest.approx(summary["generated_tokens"] / sum(steps))
    assert [len(canvas) for request in requests for canvas in request["step_seconds"]] == steps
    assert [len(canvas) for request in requests for canvas in request["accepted"]] == steps
    assert all(0 <= n <= 64 for request in requests for canvas in request["accepted"] for n in canvas)
    assert len(summary["accepted_per_step"]) == len(summary["step_seconds"]["by_step"]) == max(steps)
    assert (summary["quality"]["judged"], summary["quality"]["right"]) == (2, 0)


def test_phases_make_up_the_whole(report):
    for request in report["requests"]:
        phases = [request[f"{name}_seconds"] for name in ("prefill", "denoising", "encode", "rest")]
        assert sum(phases) == pytest.approx(request["total_seconds"], rel=1e-6)
        assert request["denoising_seconds"] == pytest.approx(sum(map(sum, request["step_seconds"])))
        assert all(seconds > 0 for canvas in request["step_seconds"] for seconds in canvas)
    assert sum(phase["share"] for phase in report["summary"]["phases"].values()) == pytest.approx(1)


def test_every_speed_has_its_steps_per_canvas(report):
    mean = report["summary"]["steps_per_canvas"]["mean"]
    assert report["summary"]["speed"]["steps_per_canvas"] == mean
    assert report["achieved"]["steps_per_canvas"] == mean
    for scenario in report["roofline"]["scenarios"]:
        assert scenario["at_measured_steps"]["steps_per_canvas"] == mean


def test_achieved_is_what_was_counted_over_the_time_it_took(report, pipeline):
    text, bits = pipeline.config.text, report["model"]["bits_per_weight"]
    distinct = report["probe"]["experts"]["distinct"]["mean"]
    flops = nbytes = 0.0
    for request in report["requests"]:
        assert request["contexts"] == [request["prompt_tokens"] + 64 * index for index in range(len(request["steps"]))]
        for index, steps in enumerate(request["steps"]):
            how = Pass(64, request["prompt_tokens"] + 64 * index, bits, distinct, element_bytes=4)
            flops += steps * total(step_work(text, how)).flops
            nbytes += steps * total(step_work(text, how)).nbytes
    seconds = sum(request["denoising_seconds"] for request in report["requests"])
    assert report["achieved"]["flops_per_second"] == pytest.approx(flops / seconds)
    assert report["achieved"]["bytes_per_second"] == pytest.approx(nbytes / seconds)


def test_roofline_stands_beside_the_measurement(report):
    roofline = report["roofline"]
    assert roofline["chip"]["name"] == "M3 Max"
    names = [scenario["scenario"] for scenario in roofline["scenarios"]]
    assert names == ["floor", "sparse floor", "attainable", "eager"]
    for scenario in roofline["scenarios"]:
        assert set(scenario["parts"]) == set(PART_NAMES)
        assert all(part["predicted"] >= 0 and part["measured"] >= 0 for part in scenario["parts"].values())
        assert scenario["step"]["measured"] == report["summary"]["step_seconds"]["median"]
        assert list(scenario["tokens_per_second"]) == ["12", "16", "24", "48"]


def test_what_else_the_report_says(report):
    assert report["compare"] is None
    assert report["machine"]["mlx"] and report["machine"]["device"]
    assert report["model"]["load_seconds"] > 0 and report["warm_up_seconds"] > 0
    assert report["workload"]["prompts"] == 4 and report["workload"]["seeds"] == [5, 6]
    assert report["workload"]["options"]["max_tokens"] == 80
    assert report["workload"]["options"]["entropy_bound"] == 0.1
    if mx.default_device() == mx.Device(mx.cpu):
        assert report["retraces"] == {"warm_up": 0, "measured": 0}
    assert report["probe"]["waits_per_step"] == 1
    assert 0 < report["probe"]["step_temporary_bytes"] < report["summary"]["peak_memory_bytes"]


def test_page_is_whole_and_loads_nothing(report):
    page = report["page"]
    assert page.startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert page.count("<svg") == page.count("</svg>") == 12  # 5 of the run, 3 of the experts, 4 scenarios
    assert "Steps per canvas (K)" in page and "Distinct experts of 8" in page
    assert 'src="' not in page and "<script" not in page and "<link" not in page


def test_text_names_every_speed_with_its_k(capsys, prompt_file):
    code, out, err = run_main(
        capsys, "--model", "tiny", "--prompts", str(prompt_file), "--limit", "1", "-g", "8", "--probe", "0"
    )
    assert (code, err) == (0, "")
    rows = [line for line in out.splitlines() if "tokens/s" in line and "prefill" not in line]
    assert len(rows) == 2 and all(" at K = " in row for row in rows)
    assert "| step of a canvas | positions accepted, mean | ms, mean |" in out
    assert "distinct experts" not in out


def test_json_on_standard_output_is_all_there_is(capsys, prompt_file):
    flags = ["--model", "tiny", "--prompts", str(prompt_file), "--limit", "1", "-g", "8", "--probe", "0", "--json", "-"]
    code, out, err = run_main(capsys, *flags)
    assert (code, err) == (0, "")
    assert json.loads(out)["probe"] is None
    assert out.count("\n") == 1


def test_policies_compute_fewer_rows(capsys, prompt_file):
    flags = ["--model", "tiny", "--prompts", str(prompt_file), "-g", "80", "--probe", "1", "--policy", "fast"]
    code, out, err = run_main(capsys, *flags, "--json", "-")
    assert (code, err) == (0, "")
    report = json.loads(out)
    summary = report["summary"]
    assert report["workload"]["policy"] == "fast"
    assert summary["row_steps"] < 64 * summary["denoising_steps"]
    assert summary["row_steps"] == sum(
        rows for each in report["requests"] for canvas in each["rows"] for rows in canvas
    )


# -- what is measured -------------------------------------------------------------------------------------------------


def test_probe_sees_what_the_router_says(pipeline):
    """Rows per expert against a second count, from the router's own output; and the model is as before."""
    before = [name for name, _ in tree_flatten(pipeline.model.parameters())]
    [run] = runs_of_tasks(pipeline, read_one("What is 7 - 3?"), [0], {"max_tokens": 8})
    findings = probe(pipeline, [run])
    [result] = pipeline.run_batch([run.prepared])
    assert len(findings.routed) == sum(result.stats.denoising_steps) == len(findings.part_seconds)
    text = pipeline.config.text
    for routed in findings.routed:
        assert routed.shape == (text.num_hidden_layers, text.num_experts)
        assert (routed.sum(axis=-1) == 64 * text.top_k_experts).all()
        assert routed.max() <= 64
    assert [name for name, _ in tree_flatten(pipeline.model.parameters())] == before
    router = pipeline.model.layers[0].router
    seen = []

    class Spy:
        def __call__(self, h):
            indices, weights = router(h)
            seen.append(np.array(indices))
            return indices, weights

    pipeline.model.layers[0]["router"] = Spy()
    try:
        events = list(pipeline.stream_prepared(run.prepared))
    finally:
        pipeline.model.layers[0]["router"] = router
    steps = sum(isinstance(event, DenoisingStep) for event in events)
    counts = [[(indices[-64:] == expert).sum() for expert in range(text.num_experts)] for indices in seen[-steps:]]
    assert counts == [routed[0].tolist() for routed in findings.routed]


def read_one(prompt: str):
    from mlx_diffusiongemma.tasks import make_task

    return [make_task({"messages": [{"role": "user", "content": prompt}]})]


def test_probed_answers_are_the_measured_ones(pipeline):
    [run] = runs_of_tasks(pipeline, read_one("Tell me a story about a fox."), [3], {"max_tokens": 70})
    first = pipeline.run_batch([run.prepared])[0].token_ids
    probe(pipeline, [run])
    assert pipeline.run_batch([run.prepared])[0].token_ids == first


def test_waits_are_counted_and_the_functions_come_back():
    calls: list[str] = []
    original = mx.eval
    with counted_waits(calls):
        mx.eval(mx.ones(3) + 1)
        mx.eval(mx.ones(3) + 1)
        mx.synchronize()
    assert calls == ["eval", "eval", "synchronize"]
    assert mx.eval is original


def test_retraces_are_counted(pipeline):
    """The first request traces every piece; the next one nothing, though its prompt is longer."""
    compiled = Pipeline(pipeline._checkpoint, compiled=True)
    short, long = runs_of_tasks(compiled, [*read_one("What is 7 - 3?"), *read_one("Spell cat, then dog.")], [0], {})
    list(compiled.stream_prepared(short.prepared))
    traced = compiled.retraces
    assert traced >= pipeline.config.text.num_hidden_layers
    list(compiled.stream_prepared(long.prepared))
    assert compiled.retraces == traced
    assert Denoiser(pipeline.model, compiled=False).retraces == 0


def test_bits_of_a_loaded_model(pipeline):
    bits = model_bits(pipeline.model)
    assert bits.keys() == parameters(pipeline.config.text).keys()
    expected = 8 * pipeline.model.dtype.size
    assert bits == dict.fromkeys(bits, expected)


def test_random_prompts_have_text_tokens_and_ignore_ends(pipeline):
    runs = runs_of_random_tokens(pipeline, 50, [1, 2], {"max_tokens": 70})
    first, second = (run.prepared.prompt.token_ids for run in runs)
    assert len(first) == len(second) == 50 and first != second
    assert not set(first) & set(pipeline.tokenizer.all_special_ids)
    assert pipeline.run_batch([runs[0].prepared])[0].stats.generated_tokens == 70
    assert runs_of_random_tokens(pipeline, 50, [1], {"max_tokens": 70})[0].prepared.prompt.token_ids == first
    with pytest.raises(ValueError, match=r"^prompt-tokens: got 4033, expected at most 4032, the context less one"):
        runs_of_random_tokens(pipeline, 4033, [1], {"max_tokens": 70})


def test_statistics_by_hand():
    assert describe_steps([2, 2, 4, 10]) == {
        "mean": 4.5,
        "median": 3.0,
        "p90": pytest.approx(8.2),
        "histogram": {"2": 2, "4": 1, "10": 1},
    }
    assert mean_by_step([[1, 2, 3], [3], [5, 4]]) == [3.0, 3.0, 3.0]
    assert repeated([1, 1, 2, 2, 2, 1]) == 3 and repeated([]) == 0


def test_summary_by_hand():
    request = TimedRequest(
        prompt=1,
        seed=0,
        prompt_tokens=10,
        generated_tokens=12,
        finish_reason="stop",
        right=True,
        is_empty=False,
        repeated_tokens=1,
        steps=(2, 1),
        contexts=(10, 18),
        rows=((8, 4), (8,)),
        accepted=((4, 8), (8,)),
        step_seconds=((1.0, 2.0), (3.0,)),
        prefill_seconds=0.5,
        encode_seconds=2.0,
        rest_seconds=1.5,
        total_seconds=10.0,
        first_draft_seconds=1.5,
        peak_memory_bytes=7,
    )
    summary = summarise([request])
    assert (summary["row_steps"], summary["rows_per_step"], summary["tokens_per_forward"]) == (20, 20 / 3, 4.0)
    assert summary["accepted_per_step"] == [6.0, 8.0]
    assert summary["step_seconds"] == {"median": 2.0, "p90": pytest.approx(2.8), "by_step": [2.0, 2.0]}
    assert summary["speed"] == {
        "steps_per_canvas": 1.5,
        "tokens_per_second": 1.5,
        "tokens_per_second_whole_request": 1.2,
        "prompt_tokens_per_second": 20.0,
        "median_seconds_per_request": 10.0,
        "median_first_draft_seconds": 1.5,
    }
    assert summary["phases"]["denoising"] == {"seconds": 6.0, "share": 0.6, "median": 6.0, "p90": 6.0}
    assert summary["quality"] == {"right": 1, "judged": 1, "accuracy": 1.0, "repeated_tokens": 1, "empty_answers": 0}


# -- prompts ----------------------------------------------------------------------------------------------------------


def test_prompt_files(prompt_file):
    tasks = read_prompts(prompt_file)
    assert [task.messages[-1]["content"] for task in tasks] == [
        "What is 7 - 3?",
        "Spell\ncat.",
        "What is 17 + 25?",
        "What is the capital of Peru?",
    ]
    assert [task.expected for task in tasks] == [None, None, None, "no"]


def test_a_checkpoint_may_bring_its_prompts(tmp_path):
    tasks, name = own_prompts(tmp_path)
    assert (len(tasks), name) == (12, "the built-in prompts")
    (tmp_path / "tasks.jsonl").write_text(PROMPTS[3])
    tasks, name = own_prompts(tmp_path)
    assert (len(tasks), name) == (1, "the checkpoint's tasks.jsonl")


def test_tiny_brings_prompts_with_right_answers(tiny_folder):
    tasks, _ = own_prompts(tiny_folder)
    assert len(tasks) == 100
    assert len({task.family for task in tasks}) >= 15
    assert all(task.expected is not None for task in tasks)


# -- beside mlx-vlm ---------------------------------------------------------------------------------------------------


def test_without_the_peer_one_line_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(peer, "peer_version", lambda: None)
    code, out, err = run_main(capsys, "--model", "tiny", "--compare", "mlx-vlm")
    assert (code, out) == (2, "")
    assert err == f"error: --compare mlx-vlm needs mlx-vlm: {peer.HOW_TO_INSTALL}\n"


def test_the_sink_keeps_tokens_up_to_the_end():
    sink = TokenSink(frozenset({1}))
    for token_id in (7, 8, 9):
        sink.detokenizer.add_token(token_id, skip_special_token_ids=[])
    assert sink.token_ids == [7, 8, 9]
    assert sink.stopping_criteria(1) and not sink.stopping_criteria(7)


def test_the_peer_gets_the_weights_and_a_config_that_leaves_nothing_open(pipeline, tiny_folder):
    with peer.readable_folder(tiny_folder, pipeline.config) as folder:
        assert (folder / "model.safetensors").resolve() == (tiny_folder / "model.safetensors").resolve()
        config = json.loads((folder / "config.json").read_text())
        assert config["text_config"]["global_head_dim"] == 64 and config["vision_config"] is None
        assert config["text_config"]["num_global_key_value_heads"] == 2
        kept = load_configs(folder)[0].text
        assert kept == pipeline.config.text
    assert not folder.exists()


def test_pairs_by_hand():
    short = Answer(1.0, 2, 1, 128, 10, True), Answer(2.0, 2, 1, 256, 11, False)
    long = Answer(9.0, 6, 3, 384, 150, None), Answer(3.0, 5, 2, 320, 128, None)
    found = peer.describe_pairs([short, long])
    assert found["ours"]["steps_per_canvas"] == 2.0 and found["mlx-vlm"]["steps_per_canvas"] == 7 / 3
    assert (found["ours"]["right"], found["mlx-vlm"]["right"], found["ours"]["judged"]) == (1, 0, 1)
    ratio = found["ratio"]
    assert ratio["all"] == {"median": 1.75, "of_totals": 2.0, "row_steps": 512 / 576, "pairs": [0.5, 3.0]}
    assert ratio["one canvas"] == {"median": 0.5, "of_totals": 0.5, "row_steps": 0.5, "pairs": [0.5]}
    assert ratio["several canvases"] == {"median": 3.0, "of_totals": 3.0, "row_steps": 1.2, "pairs": [3.0]}
    lines = comparison_lines({"peer": "mlx-vlm", "version": "1", "policy": "fast", "modes": {"exact": found}})
    assert "| several canvases | 1 | 3.00 | 3.00 | 1.20 | 3.00 to 3.00 |" in lines
    assert "| its exact sampler | ours, fast | mlx-vlm |" in lines


@pytest.mark.interop
def test_the_peer_answers_the_same_prompts(pipeline, tiny_folder, capsys, prompt_file):
    flags = ["--model", "tiny", "--prompts", str(prompt_file), "-g", "32", "--probe", "0", "--compare", "mlx-vlm"]
    code, out, err = run_main(capsys, *flags, "--json", "-")
    assert (code, err) == (0, "")
    comparison = json.loads(out)["compare"]
    assert list(comparison["modes"]) == ["exact", "default"]
    for found in comparison["modes"].values():
        assert len(found["ratio"]["all"]["pairs"]) == 4
        for side in (found["ours"], found["mlx-vlm"]):
            assert side["judged"] == 1 and side["row_steps"] % 64 == 0
            assert side["steps_per_canvas"] >= 1 and side["generated_tokens"] > 0


# -- predictions alone, and errors ------------------------------------------------------------------------------------


def test_dry_run_of_26b(capsys):
    code, out, err = run_main(capsys, "--roofline", "M3 Max", "--dry-run", "--recipe", "uniform-4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "DiffusionGemma 26B-A4B, recipe uniform-4, context 1024, 256 of 256 rows per step"
    assert lines[1].startswith("predictions, not measurements")
    rows = [line for line in lines if line.startswith("| M3 Max |")]
    assert rows == [
        "| M3 Max | 178 | 124 | 113 | 86 | 58 | 30 |",
        "| M3 Max | 151 | 124 | 133 | 101 | 68 | 35 |",
        "| M3 Max | 252 | 213 | 79 | 60 | 41 | 21 |",
        "| M3 Max | 405 | 298 | 50 | 38 | 26 | 13 |",
    ]


def test_dry_run_of_a_checkpoint_reads_no_weights(capsys, tiny_folder, tmp_path):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    flags = ["--roofline", "all", "--dry-run", "--row-share", "0.5", "--distinct-experts", "4", "--context", "100"]
    code, out, err = run_main(capsys, *flags, "--model", str(tmp_path), "--recipe", "bfloat16")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"{tmp_path}, bfloat16, context 100, 32 of 64 rows per step"
    assert out.count("| M1 Max |") == 4


BAD = [
    ([], "--model is missing, expected 'tiny', a folder or a Hub id"),
    (["--model", "/no/such/folder"], "model '/no/such/folder' is not a folder"),
    (["--model", "tiny", "--prompts", "/no/such/file"], "/no/such/file: No such file or directory"),
    (["--model", "tiny", "--prompts", "x", "-p", "5"], "not allowed with argument --prompts"),
    (["--model", "tiny", "-p", "5000"], "prompt-tokens: got 5000, expected at most 4032"),
    (["--model", "tiny", "-n", "0"], "got '0', expected an integer of at least 1"),
    (["--model", "tiny", "--probe", "-1"], "--probe: got -1, expected an integer of at least 0"),
    (["--model", "tiny", "--seed", "-1"], "seed: got -1"),
    (["--model", "tiny", "--entropy-bound", "0"], "entropy_bound: got 0.0, expected a number > 0"),
    (["--model", "tiny", "--context", "5"], "--context needs --dry-run: what runs is measured"),
    (["--model", "tiny", "--roofline", "M9"], "chip: got 'M9', expected one of M1, M1 Pro, "),
    (
        ["--model", "tiny", "--json", "/no/such/folder/x.json"],
        "--json /no/such/folder/x.json: the folder does not exist",
    ),
    (["--model", "tiny", "--report", "/no/such/folder/x"], "--report /no/such/folder/x: the folder does not exist"),
    (["--model", "tiny", "--compare", "other"], "invalid choice: 'other'"),
    (["--dry-run", "--roofline", "M9"], "chip: got 'M9', expected one of M1, M1 Pro, "),
    (["--dry-run", "--json", "-"], "--dry-run runs nothing, so it excludes --json"),
    (["--dry-run", "--recipe", "x"], "recipe: got 'x', expected bfloat16 or one of 4bit, 8bit, "),
    (["--dry-run", "--row-share", "1.5"], "row-share: got 1.5, expected a number above 0 and at most 1"),
    (
        ["--dry-run", "--distinct-experts", "129"],
        "distinct-experts: got 129, expected a number above 0 and at most 128",
    ),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(capsys, argv, message):
    code, out, err = run_main(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2", "not JSON, as a line that begins with [ must be: "),
        ('{"expected": "x"}', "messages: got null, expected a list of messages"),
        ("[]", "the prompt is empty"),
    ],
)
def test_bad_prompt_line(capsys, tmp_path, line, message):
    path = tmp_path / "prompts.txt"
    path.write_text(f"fine\n{line}\n")
    code, _, err = run_main(capsys, "--model", "tiny", "--prompts", str(path))
    assert code == 2 and err.startswith(f"error: {path} line 2: {message}") and err.count("\n") == 1


def test_a_prompt_that_the_checkpoint_cannot_take(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("fine\n" + "word " * 5000 + "\n")
    code, _, err = run_main(capsys, "--model", "tiny", "--prompts", str(path))
    assert code == 2 and err.startswith("error: prompt 2: the prompt has ")


def test_without_matplotlib_one_line_says_how_to_get_it(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(plots, "is_available", lambda: False)
    code, out, err = run_main(capsys, "--model", "tiny", "--report", str(tmp_path / "x.html"))
    assert (code, out) == (2, "")
    assert err == f"error: --report needs matplotlib: {plots.HOW_TO_INSTALL}\n"


def test_is_a_sub_command(capsys):
    code, out, _ = run_in_process(__main__.main, capsys, "benchmark", "--help")
    assert code == 0 and "--compare" in out and "--roofline" in out


def test_help_is_quick(run_program):
    """It imports neither MLX nor matplotlib."""
    code = "import sys; from mlx_diffusiongemma import benchmark; benchmark.setup_parser(); print(*sys.modules)"
    done = run_program("-c", code)
    assert done.returncode == 0
    assert not {b"mlx.core", b"matplotlib", b"numpy"} & set(done.stdout.split())


def test_predictions_in_the_documentation_are_the_commands(capsys):
    """Every row of the counted work and of the tables for all chips stands in docs/performance.md as it is printed."""
    code, out, _ = run_main(capsys, "--dry-run", "--roofline", "all")
    assert code == 0
    _, floor, _, attainable, _ = re.split(r"^(?:floor|sparse floor|attainable|eager): .*$", out, flags=re.MULTILINE)
    document = (Path(__file__).parents[1] / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = [line for line in (out[: out.index("floor")] + floor + attainable).splitlines() if line.startswith("|")]
    assert len(rows) > 50
    assert [row for row in rows if row not in document] == []
