"""A benchmark's findings as one self-contained HTML page: tables as text, plots as SVG. Needs matplotlib.

Nothing in the page is loaded from elsewhere.
"""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOW_TO_INSTALL = "pip install matplotlib (or this project's extra: pip install '.[bench]')"
SIZE = (6.4, 3.2)  # inches
STYLE = "body{font:15px/1.4 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em}pre{overflow-x:auto}"
Draw = Callable[["Axes"], None]


def is_available() -> bool:
    """Tell whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def html_page(report: Mapping[str, Any], lines: Sequence[str]) -> str:
    """Return the page: the lines as they are, then every plot that the report has numbers for."""
    title = html.escape(f"Benchmark of {report['model']['name']}")
    figures = "\n".join(f"<figure>{svg(draw)}</figure>" for draw in plots(report))
    text = html.escape("\n".join(lines))
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{title}</title>\n<style>{STYLE}</style>\n'
        f"<h1>{title}</h1>\n<pre>{text}</pre>\n{figures}\n</html>\n"
    )


def svg(draw: Draw) -> str:
    """Return a plot as an `<svg>` element."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # "none" keeps letters as text; a fixed salt gives the same ids for the same numbers.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "benchmark"}):
        figure = Figure(figsize=SIZE, layout="constrained")
        draw(figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plots(report: Mapping[str, Any]) -> list[Draw]:
    """Return what to draw."""
    summary, probe = report["summary"], report["probe"]
    seconds = [1000 * s for request in report["requests"] for canvas in request["step_seconds"] for s in canvas]
    phases = {name: each["seconds"] for name, each in summary["phases"].items()}
    found = [
        bars_by_number("Steps per canvas (K)", "steps", "canvases", summary["steps_per_canvas"]["histogram"]),
        curve("Positions accepted", "step of a canvas", "mean", summary["accepted_per_step"]),
        histogram("Time of a step", "ms", "steps", seconds),
        curve("Time of a step", "step of a canvas", "ms, mean", [1000 * s for s in summary["step_seconds"]["by_step"]]),
        bars("Time of all requests", "phase", "s", phases),
    ]
    if probe is not None:
        experts = probe["experts"]
        of = experts["of"]
        found += [
            curve(f"Distinct experts of {of}", "layer", "mean over steps", experts["distinct"]["by_layer"]),
            curve(f"Distinct experts of {of}", "step of a canvas", "mean", experts["distinct"]["by_step"]),
            bars("Rows per expert", "rows", "experts of all layers and steps", experts["rows_per_expert"]["histogram"]),
        ]
    if report["roofline"] is not None:
        found += [beside(scenario) for scenario in report["roofline"]["scenarios"]]
    if report["compare"] is not None:
        peer, modes = report["compare"]["peer"], report["compare"]["modes"]
        found += [
            histogram(
                f"Our time / {peer}'s {mode} sampler", "ratio of a pair", "requests", each["ratio"]["all"]["pairs"]
            )
            for mode, each in modes.items()
        ]
    return found


def bars(title: str, x: str, y: str, values: Mapping[str, float]) -> Draw:
    """Return a bar chart of named values."""

    def draw(axes: Axes) -> None:
        axes.bar(list(values), list(values.values()))
        axes.set(title=title, xlabel=x, ylabel=y)

    return draw


def bars_by_number(title: str, x: str, y: str, values: Mapping[str, float]) -> Draw:
    """Return a bar chart whose names are whole numbers, each at its place."""

    def draw(axes: Axes) -> None:
        axes.bar([int(name) for name in values], list(values.values()))
        axes.locator_params(axis="x", integer=True)
        axes.set(title=title, xlabel=x, ylabel=y)

    return draw


def curve(title: str, x: str, y: str, values: Sequence[float]) -> Draw:
    """Return a curve over 1, 2, 3."""

    def draw(axes: Axes) -> None:
        axes.plot(range(1, len(values) + 1), values, marker=".")
        axes.locator_params(axis="x", integer=True)
        axes.set(title=title, xlabel=x, ylabel=y, ylim=(0, None))

    return draw


def histogram(title: str, x: str, y: str, values: Sequence[float]) -> Draw:
    """Return a histogram of numbers."""

    def draw(axes: Axes) -> None:
        axes.hist(values, bins="auto")
        axes.set(title=title, xlabel=x, ylabel=y)

    return draw


def beside(scenario: Mapping[str, Any]) -> Draw:
    """Return predicted and measured times of the parts side by side."""
    parts = scenario["parts"]

    def draw(axes: Axes) -> None:
        for offset, kind in ((-0.2, "predicted"), (0.2, "measured")):
            places = [index + offset for index in range(len(parts))]
            axes.barh(places, [1000 * (each[kind] or 0) for each in parts.values()], height=0.4, label=kind)
        axes.set_yticks(range(len(parts)), list(parts))
        axes.invert_yaxis()
        axes.legend()
        axes.set(title=f"Parts of a step beside the prediction: {scenario['scenario']}", xlabel="ms")

    return draw
