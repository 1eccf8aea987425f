"""The command line `convert`: flags, the plan that it prints, and its errors of one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.convert import main

ROOT = Path(__file__).resolve().parents[1]


def block(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization"]


def test_quantise_with_the_default_recipe(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    assert main(["--hf-path", str(source), "--mlx-path", str(target), "-q"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith(f"Wrote {target}\n") and not err
    assert "| embedding | 6,144 | affine 8, group 64 | 9.000 |" in out  # scales and biases in float32, as the source
    assert block(target)["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8}
    notes = json.loads((target / "config.json").read_text())["mlx_diffusiongemma"]
    assert (notes["recipe"], notes["source"], notes["source_revision"]) == ("4bit", "source", None)
    card = (target / "README.md").read_text()
    assert (
        "recipe `4bit`" in card
        and "| experts |" in card
        and card.startswith("---\n")
        and "\nlibrary_name: mlx\n" in card
    )
    load_checkpoint(target)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--recipe", "mxfp4"], {"group_size": 32, "bits": 4, "mode": "mxfp4"}),
        (["--recipe", "uniform-6"], {"group_size": 64, "bits": 6, "mode": "affine"}),
        (["-q", "--q-bits", "3"], {"group_size": 64, "bits": 3, "mode": "affine"}),
        (["-q", "--q-group-size", "32"], {"group_size": 32, "bits": 4, "mode": "affine"}),
        (["-q", "--q-mode", "nvfp4"], {"group_size": 16, "bits": 4, "mode": "nvfp4"}),
        (["-q", "--q-mode", "mxfp8"], {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
    ],
)
def test_precision_flags(source: Path, tmp_path: Path, flags: list[str], expected: dict) -> None:
    assert main(["--model", str(source), "--mlx-path", str(tmp_path / "out"), *flags]) == 0
    written = block(tmp_path / "out")
    assert {key: written[key] for key in expected} == expected
    assert ("model.decoder.embed_tokens" in written) == (flags[1] != "uniform-6")


def test_there_and_back(source: Path, tmp_path: Path) -> None:
    main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "q"), "-q", "--dtype", "bfloat16"])
    assert main(["--hf-path", str(tmp_path / "q"), "--mlx-path", str(tmp_path / "f"), "-d", "--dtype", "float32"]) == 0
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())
    load_checkpoint(tmp_path / "f")


def test_dry_run_writes_nothing(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    main(["--hf-path", str(source), "--mlx-path", str(target), "-q", "--dry-run", "--json"])
    planned = json.loads(capsys.readouterr().out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
    assert main(["--hf-path", str(source), "--mlx-path", str(target), "-q"]) == 0
    header = 8 + int.from_bytes((target / "model.safetensors").read_bytes()[:8], "little")
    assert planned["bytes"] == (target / "model.safetensors").stat().st_size - header
    assert planned["bytes"] == sum(part["bytes"] for part in planned["parts"].values())
    assert planned["estimated_memory_to_run"] > planned["bytes"]
    assert planned["bits_per_weight"] == pytest.approx(8 * planned["bytes"] / planned["parameters"])


def test_dry_run_of_an_existing_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--hf-path is missing, expected a folder or a Hub id such as google/diffusiongemma-26B-A4B-it"),
        (["--model", "tiny", "--recipe", "4bit", "--q-bits", "4"], "--recipe and --q-bits exclude each other"),
        (["--model", "tiny", "--q-bits", "4"], "--q-bits needs -q"),
        (["--model", "tiny", "-q", "-d"], "--dequantize and -q or --recipe exclude each other"),
        (["--model", "tiny", "--dry-run", "--upload-repo", "a/b"], "--dry-run and --upload-repo exclude each other"),
        (["--model", "tiny", "--recipe", "auto"], "--recipe auto and --target-bpw go together"),
        (["--model", "tiny", "-q", "--seed", "1"], "--seed needs --recipe auto"),
        (["--model", "tiny", "--recipe", "auto", "--target-bpw", "5", "--dry-run"], "--dry-run and --recipe auto"),
        (["--model", "tiny", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_flags_that_do_not_go_together(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit_code:
        main(flags)
    out, err = capsys.readouterr()
    assert exit_code.value.code == 2 and not out
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--recipe", "5-bit"], "recipe: got '5-bit', expected one of 4bit, 8bit, mxfp4, nvfp4, mxfp8, uniform-2"),
        (["-q", "--q-bits", "7"], "q-bits: got 7, expected one of 2, 3, 4, 5, 6, 8 for affine"),
        (["-q", "--q-bits", "0"], "q-bits: got 0, expected one of 2, 3, 4, 5, 6, 8 for affine"),
        (["-q", "--q-mode", "int4"], "q-mode: got 'int4', expected one of affine, mxfp4, mxfp8, nvfp4"),
        (["-q", "--q-mode", "mxfp4", "--q-bits", "8"], "q-bits: got 8, expected 4 for mxfp4"),
        (["-d"], "is not quantised: there is nothing to dequantise"),
        (["--revision", "main"], "revision: got 'main'"),
    ],
)
def test_bad_input(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_folders(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, target, message in (
        (tmp_path / "nowhere", tmp_path / "out", "is not a folder"),
        (tmp_path, tmp_path.parent / "out", "config.json"),
        (source, source / "out", "inside or around the source"),
        (source, source, "inside or around the source"),
    ):
        assert main(["--hf-path", str(folder), "--mlx-path", str(target), "-q"]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_it_says_that_it_cleaned_up(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growing = tmp_path / "out.incomplete"
    growing.mkdir()
    (growing / ".mlx_diffusiongemma_conversion").touch()
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "-q"]) == 0
    assert capsys.readouterr().err == "note: the remains of an interrupted conversion were removed\n"
    assert not growing.exists()


def test_upload(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = []

    class Api:
        def create_repo(self, repo_id: str, exist_ok: bool) -> None:
            calls.append((repo_id, exist_ok))

        def upload_folder(self, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    target = tmp_path / "out"
    flags = ["--hf-path", str(source), "--mlx-path", str(target), "-q", "--upload-repo", "me/small-4bit"]
    assert main(flags) == 0
    assert calls == [("me/small-4bit", True), ("me/small-4bit", sorted(path.name for path in target.iterdir()))]
    assert "generate --model me/small-4bit" in (target / "README.md").read_text()

    def refuse(self, repo_id: str, exist_ok: bool) -> None:
        raise OSError("no network")

    monkeypatch.setattr(Api, "create_repo", refuse)
    capsys.readouterr()
    assert main([*flags[:3], str(tmp_path / "again"), *flags[4:]]) == 1
    assert "again is finished, but the upload to me/small-4bit failed: no network" in capsys.readouterr().err
    load_checkpoint(tmp_path / "again")


def test_a_mistake_shows_before_anything_is_downloaded(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr("mlx_diffusiongemma.checkpoint.find_folder", lambda *_, **__: pytest.fail("downloaded"))
    for flags in (["--recipe", "5-bit"], ["-q", "--q-bits", "7"], ["--mlx-path", str(tmp_path), "-q"]):
        assert main(["--hf-path", "google/model", *flags]) == 2
    auto = ["--recipe", "auto", "--target-bpw", "5", "--calibration", str(tmp_path / "missing.jsonl")]
    assert main(["--hf-path", "google/model", *auto]) == 2
    assert "missing.jsonl: No such file" in capsys.readouterr().err


def test_dry_run_of_a_hub_id_reads_headers_only(source: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from types import SimpleNamespace

    import mlx.core as mx

    header = {
        name: SimpleNamespace(dtype="F32", shape=list(array.shape))
        for name, array in mx.load(str(source / "model.safetensors")).items()
    }
    (source / "model.safetensors").unlink()
    commit = source.rename(tmp_path / ("c" * 40))

    def snapshot_download(repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo_id, revision) == ("google/model", "main") and "*.safetensors" not in allow_patterns
        return str(commit)

    class Api:
        def get_safetensors_metadata(self, repo_id: str, revision: str | None) -> object:
            return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=header)})

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert main(["--hf-path", "google/model", "--revision", "main", "-q", "--dry-run"]) == 0
    assert "| all | 248,338 |" in capsys.readouterr().out


def test_the_licence_of_the_source_is_kept(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: https://x.org\nauthor: me\n---\n# x\n")
    assert main(["--hf-path", str(source), "--mlx-path", str(tmp_path / "out"), "-q"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "license_link: https://x.org" in card and "author" not in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "config.json").read_text()  # no path of this machine


def test_root_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "convert.py", "--model", "tiny", "--mlx-path", str(tmp_path / "out"), "-q", "--dry-run"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0 and "| all |" in done.stdout, done.stderr
