"""What a benchmark found, as lines to read. Every speed stands beside its K, the denoising steps per canvas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .chips import Chip
from .cli import markdown_table
from .config import TextConfig
from .counting import Bits, Work
from .roofline import SCENARIOS, STEPS, Scenario, predict

BAR = 40  # characters of the longest bar


def milliseconds(seconds: float | None) -> str:
    """Return seconds as milliseconds with three digits or so."""
    if seconds is None:
        return "-"
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Return the whole report."""
    lines = measured_lines(report)
    if report["roofline"] is not None:
        lines += ["", *roofline_lines(report["roofline"])]
    if report["compare"] is not None:
        lines += ["", *comparison_lines(report["compare"])]
    return lines


def measured_lines(report: Mapping[str, Any]) -> list[str]:
    """Return everything but roofline and comparison."""
    summary = report["summary"]
    lines = [
        *_head(report),
        "",
        *_overview(report),
        "",
        *_phases(summary),
        "",
        "steps per canvas (K): canvases",
        *_bars(summary["steps_per_canvas"]["histogram"]),
        "",
        *_by_step(report),
    ]
    if report["probe"] is not None:
        lines += ["", *_experts(report["probe"]["experts"])]
    return lines


def _head(report: Mapping[str, Any]) -> list[str]:
    machine, model, workload = report["machine"], report["model"], report["workload"]
    random = ["note: random tokens are no text, and their K says nothing about text"] if workload["random"] else []
    return [
        f"model: {model['name']}, {model['dtype']}, {model['weight_bytes'] / 1e9:.3f} GB of weights, "
        f"canvas {model['canvas_length']}",
        f"machine: {machine['device']}, {machine['cores']} cores, {machine['platform']}, mlx {machine['mlx']}, "
        f"load {machine['load_average']}, {report['date']}",
        f"prompts: {workload['prompts']} of {workload['name']}, seeds {' '.join(map(str, workload['seeds']))}, "
        f"max-tokens {workload['options']['max_tokens']}, policy {workload['policy']}",
        *random,
    ]


def _overview(report: Mapping[str, Any]) -> list[str]:
    summary, achieved, probe = report["summary"], report["achieved"], report["probe"]
    steps, speed, quality = summary["steps_per_canvas"], summary["speed"], summary["quality"]
    k = f"at K = {steps['mean']:.2f}"
    rows = [
        ["load, s", f"{report['model']['load_seconds']:.2f}"],
        ["warm-up request, s", f"{report['warm_up_seconds']:.2f}"],
        ["requests, canvases, steps", f"{summary['requests']}, {summary['canvases']}, {summary['denoising_steps']}"],
        ["K: mean, median, p90", f"{steps['mean']:.2f}, {steps['median']:g}, {steps['p90']:g}"],
        ["row-steps, rows per step", f"{summary['row_steps']:,}, {summary['rows_per_step']:.1f}"],
        ["tokens per forward", f"{summary['tokens_per_forward']:.2f}"],
        ["step, ms: median, p90", ", ".join(milliseconds(summary["step_seconds"][key]) for key in ("median", "p90"))],
        [f"generation, tokens/s {k}", f"{speed['tokens_per_second']:.1f}"],
        [f"whole request, tokens/s {k}", f"{speed['tokens_per_second_whole_request']:.1f}"],
        [f"request, s, median {k}", f"{speed['median_seconds_per_request']:.3f}"],
        ["prefill, tokens/s", f"{speed['prompt_tokens_per_second']:.1f}"],
        ["first draft, ms, median", milliseconds(speed["median_first_draft_seconds"])],
        [
            "counted per step",
            f"{achieved['flops_per_step'] / 1e9:.4g} GFLOP, {achieved['bytes_per_step'] / 1e9:.4g} GB",
        ],
        [
            f"achieved in steps {k}",
            f"{achieved['flops_per_second'] / 1e12:.4g} TFLOP/s, {achieved['bytes_per_second'] / 1e9:.4g} GB/s",
        ],
        ["peak memory, MB", f"{summary['peak_memory_bytes'] / 1e6:.1f}"],
        ["pieces traced: warm-up, measured", f"{report['retraces']['warm_up']}, {report['retraces']['measured']}"],
        ["tokens equal to the one before", str(quality["repeated_tokens"])],
        ["empty answers", str(quality["empty_answers"])],
    ]
    if quality["judged"]:
        rows.append(["right answers", share(quality)])
    if probe is not None:
        temporary = probe["step_temporary_bytes"]
        rows.append(["temporaries of a step, MB", "-" if temporary is None else f"{temporary / 1e6:.2f}"])
        waits = probe["waits_per_step"]
        rows.append(["host waits per step", "-" if waits is None else f"{waits:g}"])
    return markdown_table(["measured", report["model"]["name"]], rows)


def share(quality: Mapping[str, Any]) -> str:
    """Return right answers as a share with its count; a dash where none is expected."""
    if not quality["judged"]:
        return "-"
    return f"{quality['accuracy']:.1%} ({quality['right']} of {quality['judged']})"


def _phases(summary: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            name,
            f"{each['seconds']:.3f}",
            f"{each['share']:.1%}",
            milliseconds(each["median"]),
            milliseconds(each["p90"]),
        ]
        for name, each in summary["phases"].items()
    ]
    return markdown_table(["phase", "s, all requests", "share", "ms per request, median", "p90"], rows)


def _by_step(report: Mapping[str, Any]) -> list[str]:
    summary = report["summary"]
    rows = [
        [str(number), f"{accepted:.1f}", milliseconds(seconds)]
        for number, (accepted, seconds) in enumerate(
            zip(summary["accepted_per_step"], summary["step_seconds"]["by_step"], strict=True), 1
        )
    ]
    return markdown_table(["step of a canvas", "positions accepted, mean", "ms, mean"], rows)


def _experts(experts: Mapping[str, Any]) -> list[str]:
    distinct, rows = experts["distinct"], experts["rows_per_expert"]
    return [
        f"distinct experts per layer and step: mean {distinct['mean']:.1f} of {experts['of']}, "
        f"{distinct['min']} to {distinct['max']}; by step {' '.join(f'{mean:.1f}' for mean in distinct['by_step'])}",
        f"rows per expert that has any: mean {rows['mean']:.1f}, median {rows['median']:g}, most {rows['max']}",
        *_bars(rows["histogram"]),
    ]


def _bars(histogram: Mapping[str, int]) -> list[str]:
    most = max(histogram.values())
    width = max(map(len, histogram))
    return [f"  {name:>{width}}  {'#' * round(BAR * n / most):<{BAR}}  {n}" for name, n in histogram.items()]


# -- roofline ---------------------------------------------------------------------------------------------------------


def chip_line(chip: Mapping[str, Any]) -> str:
    """Return what a chip can do at most."""
    return f"{chip['name']}: {chip['gigabytes_per_second']:.4g} GB/s, {chip['teraflops']:.4g} TFLOP/s ({chip['basis']})"


def roofline_lines(roofline: Mapping[str, Any]) -> list[str]:
    """Return predictions beside what was measured."""
    scenarios = roofline["scenarios"]
    first = scenarios[0]
    names = [each["scenario"] for each in scenarios]
    rows = [
        [
            part,
            milliseconds(seconds["measured"]),
            *(milliseconds(each["parts"][part]["predicted"]) for each in scenarios),
        ]
        for part, seconds in first["parts"].items()
    ]
    rows.append(
        [
            "step in one piece",
            milliseconds(first["step"]["measured"]),
            *(milliseconds(each["step"]["predicted"]) for each in scenarios),
        ]
    )
    rows.append(["measured / predicted", "1", *(f"{each['measured_over_predicted']:.2f}" for each in scenarios)])
    distinct = roofline["distinct_experts"]
    experts = "experts as of uniform routing" if distinct is None else f"{distinct:.1f} distinct experts per layer"
    k = first["at_measured_steps"]["steps_per_canvas"]
    at = [f"{each['at_measured_steps']['tokens_per_second']:.0f}" for each in scenarios]
    rows.append([f"tokens/s of full canvases at K = {k:.2f}", "-", *at])
    for steps in STEPS:
        values = [f"{each['tokens_per_second'][str(steps)]:.0f}" for each in scenarios]
        rows.append([f"tokens/s of full canvases at K = {steps}", "-", *values])
    return [
        f"roofline of {chip_line(roofline['chip'])}",
        f"context {roofline['context']:.0f}, {experts}; measured parts wait "
        "for one another, so their sum is more than a step in one piece",
        *markdown_table(["ms per step", "measured", *(f"predicted, {name}" for name in names)], rows),
        *scenario_lines(SCENARIOS),
    ]


def scenario_lines(scenarios: Iterable[Scenario]) -> list[str]:
    """Return what predictions take for granted."""
    return [f"{each.name}: {each.meaning}" for each in scenarios]


def work_table(work: Mapping[str, Work]) -> list[str]:
    """Return counted FLOPs and bytes by part."""
    rows = [[name, f"{part.flops / 1e9:.1f}", f"{part.nbytes / 1e9:.3f}"] for name, part in work.items()]
    whole = [sum(part[i] for part in work.values()) for i in range(2)]
    rows.append(["total", f"{whole[0] / 1e9:.1f}", f"{whole[1] / 1e9:.3f}"])
    return markdown_table(["part of a step, dense soft embedding, logits stored once", "GFLOP", "GB"], rows)


def prediction_table(
    text: TextConfig,
    canvas_length: int,
    chips: Sequence[Chip],
    scenario: Scenario,
    bits: Bits,
    context: int,
    row_share: float,
    distinct_experts: float | None,
) -> list[str]:
    """Return predicted step times and speeds, one row per chip."""
    rows = []
    for chip in chips:
        found = predict(
            text,
            canvas_length,
            chip,
            scenario,
            bits,
            context=context,
            row_share=row_share,
            distinct_experts=distinct_experts,
        )
        speeds = [f"{found.tokens_per_second(steps):.0f}" for steps in STEPS]
        rows.append([chip.name, milliseconds(found.step_seconds), milliseconds(found.encode_seconds), *speeds])
    header = ["predicted, not measured", "ms per step", "ms per encoding", *(f"tokens/s at K = {k}" for k in STEPS)]
    return markdown_table(header, rows)


# -- beside the peer --------------------------------------------------------------------------------------------------


def comparison_lines(comparison: Mapping[str, Any]) -> list[str]:
    """Return both sides, mode by mode."""
    lines = [f"{comparison['peer']} {comparison['version']} on the same weights and prompts, whole requests in turns"]
    for mode, found in comparison["modes"].items():
        sides = [found["ours"], found[comparison["peer"]]]
        rows = [
            ["seconds per request, median", *(f"{side['median_seconds']:.4f}" for side in sides)],
            ["K, mean", *(f"{side['steps_per_canvas']:.2f}" for side in sides)],
            ["row-steps", *(f"{side['row_steps']:,}" for side in sides)],
            ["tokens", *(str(side["generated_tokens"]) for side in sides)],
            ["right answers", *(share(side) for side in sides)],
        ]
        header = [f"its {mode} sampler", f"ours, {comparison['policy']}", comparison["peer"]]
        lines += ["", *markdown_table(header, rows), "", *_ratios(found["ratio"])]
    return lines


def _ratios(groups: Mapping[str, Any]) -> list[str]:
    """Return ours over theirs, for answers of one canvas and of several."""
    rows = []
    for name, group in groups.items():
        ordered = sorted(group["pairs"])
        quarter = len(ordered) // 4
        middle = f"{ordered[quarter]:.2f} to {ordered[-1 - quarter]:.2f}"
        ratios = [group["median"], group["of_totals"], group["row_steps"]]
        rows.append([name, str(len(ordered)), *(f"{ratio:.2f}" for ratio in ratios), middle])
    header = [
        "ours / theirs",
        "pairs",
        "seconds, median of pairs",
        "of totals",
        "row-steps",
        "middle half of the pairs",
    ]
    return markdown_table(header, rows)
