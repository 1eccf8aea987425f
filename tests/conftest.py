"""Fixtures that several test files share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from fake_pipeline import FakePipeline, preview_of
from small_model import save_checkpoint, save_tokenizer
from terminal import environment

RunProgram = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture(scope="session")
def tiny_folder() -> Path:
    """Return the folder of the bundled checkpoint."""
    import mlx_diffusiongemma

    return Path(mlx_diffusiongemma.__file__).parent / "tiny"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return a complete small checkpoint."""
    path = save_checkpoint(tmp_path / "source")
    save_tokenizer(path)
    return path


@pytest.fixture
def run_program() -> RunProgram:
    """Run Python with arguments in a process of its own; return its exit code and what it wrote, as bytes."""

    def run(*arguments: str, stdin: bytes = b"", env: Mapping[str, str] | None = None, timeout: float = 200) -> object:
        return subprocess.run(
            [sys.executable, *arguments],
            input=stdin,
            capture_output=True,
            env=environment(**(env or {})),
            timeout=timeout,
            check=False,
        )

    return run


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakePipeline]]:
    """Make the command line of this process use a fake pipeline."""
    import mlx_diffusiongemma.answer
    import mlx_diffusiongemma.pipeline

    def install(**script: object) -> FakePipeline:
        pipeline = FakePipeline(**script)  # type: ignore[arg-type]
        monkeypatch.setattr(mlx_diffusiongemma.pipeline, "load", lambda model, **_: pipeline)
        monkeypatch.setattr(mlx_diffusiongemma.answer, "preview", preview_of(pipeline))
        return pipeline

    yield install
