"""The architecture as a test: imports go down only, and only command lines print."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import mlx_diffusiongemma

PACKAGE = Path(mlx_diffusiongemma.__file__).parent

# A module imports from lower layers only, never from its own.
LAYERS = [
    {"__main__"},
    {"benchmark", "convert", "evaluate", "generate", "server"},
    {"api"},
    {"benchmark_tables", "filling"},
    {"chat", "cli"},
    {"answer"},
    {"display"},
    {"auto"},
    {"benchmark_report", "distillation", "sensitivity"},
    {"compensation", "decisions", "measure", "peer", "probe", "quality", "team"},
    {"scheduler", "trajectories", "workload"},
    {"pipeline"},
    {"conversion", "edit", "handle", "request", "scoring"},
    {"guidance", "infill", "pacing"},
    {"checkpoint", "compaction"},
    {"denoise", "logprobs", "plan", "prefill", "prefixes", "prepare", "sharding"} | {"soft_tokens", "tasks"},
    {"constraint", "model"},
    {"divided", "endings", "events", "layers", "prefix_store", "prompt", "vision"},
    {"automaton", "output", "placeholders", "questions", "segments"},
    {"attention", "control", "holes", "jobs", "media", "memory", "messages", "roofline"},
    {"counting", "parts", "video"},
    {"cache", "calibration", "images", "lengths", "masks", "moe", "options", "quantization", "ranks", "recipes"}
    | {"fused", "pieces", "sampler", "shards", "slots", "tokenizer", "vocabulary", "weights"},
    {"grammar"},
    {"tool_grammar"},
    {"schemas"},
    {"chips", "config", "elementwise", "patterns", "plots", "policies", "sources", "tool_calls"},
]
HEIGHT = {name: height for height, names in enumerate(reversed(LAYERS)) for name in names}
COMMAND_LINES = {"__main__", "answer", "benchmark", "chat", "cli", "convert", "display", "evaluate", "filling"}
COMMAND_LINES |= {"generate", "server"}
FOLDERS = ["api"]  # packages inside of the package: one layer each
MODULES = sorted([path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__"] + FOLDERS)


def trees(module: str) -> list[ast.Module]:
    paths = sorted((PACKAGE / module).glob("*.py")) if module in FOLDERS else [PACKAGE / f"{module}.py"]
    return [ast.parse(path.read_text(encoding="utf-8")) for path in paths]


def imports(module: str) -> set[str]:
    """Return the modules of this package that a module imports, in functions and for type checking too."""
    found: set[str] = set()
    inside = 2 if module in FOLDERS else 1  # the level of imports from this package; below it a folder imports itself
    for node in (node for tree in trees(module) for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and 0 < node.level < inside:
            continue
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(PACKAGE.name)):
            base = (node.module or "").removeprefix(PACKAGE.name).strip(".")
            names = [f"{PACKAGE.name}.{base or alias.name}" for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith(f"{PACKAGE.name}.")}
    return found - {"__version__"}


def test_every_module_has_a_layer():
    assert sorted(HEIGHT) == MODULES


def test_the_readme_says_what_every_module_is_for():
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    tree = text[text.index("\nmlx_diffusiongemma/\n") : text.index("\ntools/tiny/")]
    assert sorted(re.findall(r"^  (\w+)(?:\.py|/) ", tree, flags=re.MULTILINE)) == sorted([*MODULES, "tiny"])


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    wrong = {name for name in imports(module) if HEIGHT.get(name, len(LAYERS)) >= HEIGHT[module]}
    assert not wrong, f"{module}.py may not import {sorted(wrong)}"


@pytest.mark.parametrize("module", [name for name in MODULES if name not in COMMAND_LINES])
def test_only_command_lines_print(module):
    for node in (node for tree in trees(module) for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            assert not {alias.name for alias in node.names} & {"argparse", "sys"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in ("argparse", "sys")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input")


def test_the_checker_sees_imports_in_functions_and_absolute_ones(monkeypatch):
    source = f"import {PACKAGE.name}.config\ndef f():\n    from .model import X\n    from . import cache, __version__\n"
    monkeypatch.setitem(globals(), "trees", lambda module: [ast.parse(source)])
    assert imports("any") == {"config", "model", "cache"}


def test_the_checker_sees_imports_out_of_a_folder(monkeypatch):
    source = "from .. import __version__\nfrom ..memory import X\nfrom . import openai\nfrom .errors import Y\n"
    monkeypatch.setitem(globals(), "trees", lambda module: [ast.parse(source)])
    assert imports("api") == {"memory"}
