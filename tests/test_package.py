"""What a wheel holds, and the two commands of the README."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from terminal import environment

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Build the wheel without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_the_package_and_tiny_and_nothing_else(wheel):
    names = wheel.namelist()
    package = {name for name in names if name.startswith("mlx_diffusiongemma/")}
    files = {f"mlx_diffusiongemma/{path.name}" for path in (ROOT / "mlx_diffusiongemma").glob("*.py")}
    assert files | {"mlx_diffusiongemma/py.typed"} <= package
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert f"mlx_diffusiongemma/tiny/{name}" in package
    assert all(name in package or ".dist-info/" in name for name in names)


def test_wheel_is_small(wheel):
    assert sum(info.file_size for info in wheel.infolist() if "/tiny/" in info.filename) <= 10e6


def test_scripts_point_at_functions_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for target in project["scripts"].values():
        module, function = target.split(":")
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert f"def {function}(" in path.read_text()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("python", "message"),
    [
        ("no-such-python", "error: Python 3.11 or newer is needed, but PYTHON=no-such-python does not run"),
        ("OLD", "error: Python 3.11 or newer is needed, but PYTHON=OLD is Python 3.10.1"),
        ("BARE", "error: BARE lacks venv or ensurepip (on Debian and Ubuntu: apt install python3-venv)"),
        ("", "error: Python 3.11 or newer is needed; none of"),
    ],
)
def test_make_without_a_fit_python_says_so(tmp_path, python, message):
    """Stand-ins for interpreters answer as an old one, or as one without ensurepip, would."""
    for name, body in {
        "OLD": 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.10.1;; esac',
        "BARE": 'case "$*" in *ensurepip*) exit 1;; esac',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    make = shutil.which("make") or ""
    path = str(tmp_path) if not python else f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [make, "demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", "SHELL=/bin/sh"],
        cwd=ROOT,
        env={"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith(message)
    assert not (tmp_path / "venv").exists()


@pytest.mark.slow
def test_python_examples_of_the_readme_run(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, env=environment(), cwd=tmp_path, capture_output=True)
