"""Conversion against MLX's own quantisation, the published layout, and everything that can go wrong on the way."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small_model import VISION, config_dict, random_model, save_checkpoint, save_tokenizer

from mlx_diffusiongemma import conversion
from mlx_diffusiongemma.checkpoint import load_checkpoint
from mlx_diffusiongemma.config import ConfigError, ModelConfig
from mlx_diffusiongemma.conversion import remove_leftover, write_checkpoint
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.plan import ConversionError, ConversionRequest, make_plan, plan_tensors
from mlx_diffusiongemma.recipes import RECIPES, Quantization, find_recipe, mixed, part_of, uniform
from mlx_diffusiongemma.shards import ShardWriter, StoredTensor, TensorSpec

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"
ROOT = Path(__file__).resolve().parents[1]


def request(name: str, **options) -> ConversionRequest:
    recipe, default, _ = find_recipe(name)
    return ConversionRequest(recipe, default, **options)


def convert(source: Path, target: Path, what: ConversionRequest, **options) -> dict[str, mx.array]:
    """Convert and return all tensors that were written."""
    write_checkpoint(make_plan(source, what, **options), target, "card")
    arrays: dict[str, mx.array] = {}
    for path in sorted(target.glob("*.safetensors")):
        arrays |= mx.load(str(path))
    return arrays


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- the numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dtype", [None, mx.bfloat16, mx.float16])
def test_packed_tensors_are_those_of_mx_quantize(source: Path, tmp_path: Path, monkeypatch, name: str, dtype) -> None:
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 1000)  # many chunks, none a whole tensor
    arrays = convert(source, tmp_path / "out", request(name, dtype=dtype))
    weights = dict(tree_flatten(random_model().parameters()))
    recipe = find_recipe(name).recipe
    for parameter, array in weights.items():
        path, _, last = parameter.rpartition(".")
        array = array.astype(dtype or array.dtype)
        settings = recipe(path) if last == "weight" else None
        if settings is None:
            assert mx.array_equal(arrays.pop(parameter), array), parameter
            continue
        expected = mx.quantize(array, group_size=settings.group_size, bits=settings.bits, mode=settings.mode)
        for part, values in zip(("weight", "scales", "biases"), expected, strict=False):
            got = arrays.pop(f"{path}.{part}")
            assert got.dtype == values.dtype and mx.array_equal(got, values), (path, part)
    assert not arrays


@pytest.mark.parametrize("name", ["4bit", "mxfp4", "nvfp4", "uniform-3"])
def test_dequantising_is_mx_dequantize_bit_for_bit(source: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 1000)
    packed = convert(source, tmp_path / "packed", request(name))
    arrays = convert(tmp_path / "packed", tmp_path / "floats", ConversionRequest(dequantize=True))
    recipe = find_recipe(name).recipe
    assert set(arrays) == {parameter for parameter, _ in tree_flatten(random_model().parameters())}
    for parameter, array in arrays.items():
        path = parameter.removesuffix(".weight")
        settings = recipe(path) if parameter.endswith(".weight") else None
        if settings is None:
            assert mx.array_equal(array, packed[parameter])
            continue
        parts = [packed.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        how = {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}
        assert mx.array_equal(array, mx.dequantize(*parts, **how).astype(array.dtype)), parameter
    config = json.loads((tmp_path / "floats" / "config.json").read_text())
    assert "quantization" not in config and "quantization_config" not in config
    load_checkpoint(tmp_path / "floats")


@pytest.mark.parametrize("name", RECIPES)
def test_our_folders_load(source: Path, tmp_path: Path, name: str) -> None:
    arrays = convert(source, tmp_path / "out", request(name, dtype=mx.bfloat16))
    loaded = load_checkpoint(tmp_path / "out")
    for parameter, array in tree_flatten(loaded.model.parameters()):
        assert mx.array_equal(array, arrays[parameter]), parameter


def test_copy_keeps_every_byte(source: Path, tmp_path: Path) -> None:
    arrays = convert(source, tmp_path / "out", ConversionRequest())
    expected = dict(tree_flatten(random_model().parameters()))
    assert arrays.keys() == expected.keys()
    assert all(mx.array_equal(array, expected[name]) for name, array in arrays.items())


def test_many_files_are_the_same_as_one(source: Path, tmp_path: Path) -> None:
    one = convert(source, tmp_path / "one", request("4bit"))
    many = convert(source, tmp_path / "many", request("4bit"), shard_bytes=9000)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert one.keys() == many.keys() and all(mx.array_equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files and set(index["weight_map"]) == set(many)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in many.values())
    load_checkpoint(tmp_path / "many")
    # A converted folder in several files is a source like any other.
    floats = convert(tmp_path / "many", tmp_path / "floats", ConversionRequest(dequantize=True))
    assert all(
        mx.array_equal(floats[n], a)
        for n, a in convert(tmp_path / "one", tmp_path / "f", ConversionRequest(dequantize=True)).items()
    )


def test_config_says_how_it_was_made(source: Path, tmp_path: Path) -> None:
    write_checkpoint(make_plan(source, request("4bit", notes={"recipe": "4bit"})), tmp_path / "out", "# card\n")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"]
    assert config["mlx_diffusiongemma"]["recipe"] == "4bit"
    nbytes = sum(a.nbytes for a in mx.load(str(tmp_path / "out" / "model.safetensors")).values())
    assert config["mlx_diffusiongemma"]["size_bytes"] == nbytes
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {path.name for path in source.iterdir()} | {"README.md", "model.safetensors.index.json"}


# -- the published layout -----------------------------------------------------------------------------------------


def published_sources() -> tuple[ModelConfig, dict, list[StoredTensor]]:
    """Return the 1,047 tensors of google/diffusiongemma-26B-A4B-it, names and shapes only."""
    missing = [
        name for name in ("config_26b.json", "tensor_names_bf16_original.txt") if not (REFERENCE / name).exists()
    ]
    if missing:
        pytest.skip(f"needs {REFERENCE / missing[0]}: what Google published is not part of this repository")
    raw = json.loads((REFERENCE / "config_26b.json").read_text())
    config = ModelConfig.from_dict(raw)
    shapes = {name: array.shape for name, array in tree_flatten(DiffusionGemma(config).parameters())}
    tensors = []
    for line in (REFERENCE / "tensor_names_bf16_original.txt").read_text().splitlines():
        if not line.startswith("model."):
            continue
        own = line + ".weight" if line.endswith(("experts.gate_up_proj", "experts.down_proj")) else line
        tensors.append(StoredTensor(line, TensorSpec(mx.bfloat16, tuple(shapes[own])), Path("shard"), 0))
    return config, raw, tensors


def test_4bit_is_the_layout_of_the_published_conversion() -> None:
    config, raw, tensors = published_sources()
    assert len(tensors) == 1047
    assert sum(tensor.spec.nbytes for tensor in tensors) == 51_647_562_456  # Google's total_size
    plan = plan_tensors(Path("original"), config, raw, tensors, set(), request("4bit"))
    specs = {name: spec for job in plan.jobs for name, spec in job.outputs.items()}
    listed = (REFERENCE / "tensor_names_mlx_4bit_8bit.txt").read_text().splitlines()
    assert sorted(specs) == sorted(line for line in listed if line.startswith("model."))
    assert len(specs) == 1647
    assert plan.nbytes == sum(spec.nbytes for spec in specs.values()) == 16_542_844_632  # the published total_size
    assert not plan.left_unquantized and not plan.dropped

    block = dict(plan.config["quantization"])
    assert (block.pop("group_size"), block.pop("bits"), block.pop("mode")) == (64, 4, "affine")
    assert len(block) == 236
    assert all(entry == {"group_size": 64, "bits": 8} for entry in block.values())
    counted = {part: sum(part_of(path) == part for path in block) for part in map(part_of, block)}
    assert counted == {"embedding": 1, "attention": 115, "dense MLP": 90, "router": 30}

    experts = "model.decoder.layers.0.experts.gate_up_proj"
    assert specs[f"{experts}.weight"] == TensorSpec(mx.uint32, (128, 1408, 352))
    assert specs[f"{experts}.scales"] == specs[f"{experts}.biases"] == TensorSpec(mx.bfloat16, (128, 1408, 44))
    assert specs["model.decoder.embed_tokens.weight"] == TensorSpec(mx.uint32, (262144, 704))
    tower = "model.encoder.vision_tower.encoder.layers.0.mlp.gate_proj.linear.weight"
    assert specs[tower] == TensorSpec(mx.bfloat16, (4304, 1152))
    assert max(sum(s.nbytes for j in jobs for s in j.outputs.values()) for jobs in plan.shards.values()) <= 5 << 30


def test_8bit_has_the_size_of_300_modules_with_8_bits() -> None:
    config, raw, tensors = published_sources()
    plan = plan_tensors(Path("original"), config, raw, tensors, set(), request("8bit"))
    assert plan.nbytes == 27_972_380_376  # the published files have 27,972,591,174 with their headers
    assert set(plan.config["quantization"]) == {"group_size", "bits", "mode"}


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "mxfp8"])
def test_floating_modes_say_affine_for_the_sensitive_parts(source: Path, name: str) -> None:
    block = make_plan(source, request(name)).config["quantization"]
    assert block["mode"] == name
    assert block["model.decoder.embed_tokens"] == {"group_size": 64, "bits": 8}  # no mode: affine
    assert "model.decoder.layers.0.experts.down_proj" not in block


# -- group sizes --------------------------------------------------------------------------------------------------


def test_a_smaller_group_where_the_asked_one_does_not_divide(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", moe_intermediate_size=96)
    save_tokenizer(source)
    plan = make_plan(source, request("4bit"))
    entry = plan.config["quantization"]["model.decoder.layers.0.experts.down_proj"]
    assert entry == {"group_size": 32, "bits": 4}
    assert plan.smaller_groups == {f"model.decoder.layers.{i}.experts.down_proj": 32 for i in range(3)}
    assert not plan.left_unquantized
    write_checkpoint(plan, tmp_path / "out", "")
    load_checkpoint(tmp_path / "out")


def test_a_module_that_no_group_fits_is_left_and_reported(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", intermediate_size=40)
    save_tokenizer(source)
    plan = make_plan(source, request("8bit"))
    assert plan.left_unquantized == (
        *(f"model.decoder.layers.{i}.mlp.down_proj" for i in range(3)),
        "model.decoder.self_conditioning.down_proj",
    )
    write_checkpoint(plan, tmp_path / "out", "")
    load_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((64, 7), "q-bits: got 7, expected one of 2, 3, 4, 5, 6, 8 for affine"),
        ((48, 4), "q-group-size: got 48, expected one of 32, 64, 128 for affine"),
        ((64, 4, "mxfp4"), "q-group-size: got 64, expected 32 for mxfp4"),
        ((32, 8, "mxfp4"), "q-bits: got 8, expected 4 for mxfp4"),
        ((64, 4, "int4"), "q-mode: got 'int4', expected one of affine, mxfp4, mxfp8, nvfp4"),
    ],
)
def test_impossible_settings(settings: tuple, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Quantization(*settings)
    assert str(error.value) == message


def test_unknown_recipe() -> None:
    with pytest.raises(ConfigError, match="recipe: got '4-bit', expected one of 4bit, 8bit"):
        find_recipe("4-bit")


def test_parts_that_are_never_quantised() -> None:
    for path in ("model.decoder.norm", "model.encoder.vision_tower.patch_embedder.input_proj", "lm_head"):
        assert part_of(path) is None
        assert mixed(Quantization(64, 4))(path) is uniform(Quantization(64, 4))(path) is None


# -- bad input ----------------------------------------------------------------------------------------------------


def test_not_a_model_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"config\.json"):
        make_plan(tmp_path, request("4bit"))


def test_other_model_type(source: Path) -> None:
    (source / "config.json").write_text(json.dumps({**config_dict(), "model_type": "llama"}))
    with pytest.raises(ConversionError, match="model_type: got 'llama', expected 'diffusion_gemma'"):
        make_plan(source, request("4bit"))


def test_missing_shard_and_missing_tensor(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", ConversionRequest(), shard_bytes=20000)
    index = tmp_path / "out" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(set(content["weight_map"].values()))[0]
    promised = {**content, "weight_map": {**content["weight_map"], "lm_head.weight": first}}
    index.write_text(json.dumps(promised))
    with pytest.raises(ConversionError, match=r"names lm_head\.weight, which no shard holds"):
        make_plan(tmp_path / "out", request("4bit"))
    index.write_text(json.dumps(content))
    (tmp_path / "out" / first).unlink()
    with pytest.raises(ConversionError, match=f"lacks {first}"):
        make_plan(tmp_path / "out", request("4bit"))


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.0])
def test_truncated_file(source: Path, keep: float) -> None:
    path = source / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))
    with pytest.raises(ConversionError, match="damaged or truncated"):
        make_plan(source, request("4bit"))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_tensors_of_another_model(source: Path, change: str) -> None:
    path = source / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    norm = "model.decoder.norm.weight"
    if change == "missing":
        del tensors[norm]
    elif change == "extra":
        tensors["model.decoder.norm.bias"] = tensors[norm]
    else:
        tensors[norm] = tensors[norm][:-1]
    mx.save_safetensors(str(path), tensors)
    message = {"missing": "missing tensor .*norm.weight", "extra": "unexpected tensor .*norm.bias"}
    with pytest.raises(ConversionError, match=message.get(change, r"norm.weight has shape \(63,\), expected \(64,\)")):
        make_plan(source, request("4bit"))


def test_quantising_twice_and_dequantising_floats(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", request("4bit"))
    with pytest.raises(ConversionError, match="is quantised already"):
        make_plan(tmp_path / "out", request("8bit"))
    with pytest.raises(ConversionError, match="nothing to dequantise"):
        make_plan(source, ConversionRequest(dequantize=True))


@pytest.mark.parametrize("where", ["source", "source/inside", "."])
def test_target_inside_or_around_the_source(source: Path, tmp_path: Path, where: str) -> None:
    before = contents(source)
    with pytest.raises(ConversionError, match="inside or around the source"):
        write_checkpoint(make_plan(source, request("4bit")), tmp_path / where, "")
    assert contents(source) == before


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_existing_target_is_not_touched(source: Path, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    {
        "folder": target.mkdir,
        "file": lambda: target.write_text("mine"),
        "dangling link": lambda: target.symlink_to("x"),
    }[kind]()
    with pytest.raises(ConversionError, match=r"target .* exists; remove it or name another one"):
        write_checkpoint(make_plan(source, request("4bit")), target, "")
    assert target.is_symlink() or target.exists()


def test_no_write_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # a read-only folder does not stop root, which CI may be
    with pytest.raises(ConversionError, match=r"cannot write .*target: Permission denied"):
        write_checkpoint(make_plan(source, request("4bit")), tmp_path / "target", "")


def test_too_little_space(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConversionError, match="has 1,000 bytes free, expected at least"):
        write_checkpoint(make_plan(source, request("4bit")), tmp_path / "target", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_damaged_file_of_the_hub_cache(source: Path, tmp_path: Path) -> None:
    blob = tmp_path / hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    (source / "model.safetensors").rename(blob)
    (source / "model.safetensors").symlink_to(blob)
    convert(source, tmp_path / "good", request("4bit"))
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(ConversionError, match="is damaged: its SHA-256 is"):
        convert(source, tmp_path / "bad", request("4bit"))
    assert not (tmp_path / "bad").exists() and not (tmp_path / "bad.incomplete").exists()


# -- interruption -------------------------------------------------------------------------------------------------

KILLER = """
import os, signal, sys
from pathlib import Path
import resource
from mlx_diffusiongemma import conversion, plan, shards
from mlx_diffusiongemma.recipes import find_recipe

how, source, target = sys.argv[1:]
kill = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
if how == "before the marker":
    open_ = Path.open
    Path.open = lambda self, *a, **k: kill() if self.name == conversion.MARKER else open_(self, *a, **k)
elif how == "first write":
    shards.ShardWriter.write = kill
elif how == "before the side files":
    conversion._copy_files = kill
elif how == "before the rename":
    Path.rename = kill
elif how == "after the rename":
    Path.unlink = kill
elif how == "full disk":
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))
recipe, default, _ = find_recipe("4bit")
planned = plan.make_plan(Path(source), plan.ConversionRequest(recipe, default))
print(conversion.remove_leftover(Path(target)))
conversion.write_checkpoint(planned, Path(target), "card")
"""


def run_killer(how: str, source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, how, str(source), str(target)], capture_output=True, text=True, cwd=ROOT
    )


SLOW_KILLS = [
    pytest.param(how, marks=pytest.mark.slow) for how in ("before the marker", "first write", "before the side files")
]


@pytest.mark.parametrize("how", [*SLOW_KILLS, "before the rename"])
def test_kill_leaves_nothing_that_looks_finished(source: Path, tmp_path: Path, how: str) -> None:
    target = tmp_path / "target"
    before = contents(source)
    assert run_killer(how, source, target).returncode == -signal.SIGKILL
    assert not target.exists() and contents(source) == before
    again = run_killer("", source, target)
    assert (again.returncode, again.stdout) == (0, "True\n"), again.stderr  # it tells that it cleaned up
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]
    load_checkpoint(target)


def test_full_disk(source: Path, tmp_path: Path) -> None:
    done = run_killer("full disk", source, tmp_path / "target")
    assert "ConversionError: cannot write" in done.stderr and "File too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_kill_after_the_rename_leaves_a_finished_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    assert run_killer("after the rename", source, target).returncode == -signal.SIGKILL
    load_checkpoint(target)
    with pytest.raises(ConversionError, match="exists"):
        convert(source, target, request("4bit"))


def test_a_target_that_comes_while_writing_is_not_touched(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"

    def make_target(what: str, nbytes: int) -> None:
        target.mkdir(exist_ok=True)
        (target / "mine.txt").write_text("mine")

    with pytest.raises(ConversionError, match=r"finished in .*\.incomplete, but it cannot be renamed .*exists by now"):
        write_checkpoint(make_plan(source, request("4bit")), target, "", make_target)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    load_checkpoint(tmp_path / "target.incomplete")  # hours of work are not thrown away


def test_a_source_that_goes_away_while_writing(source: Path, tmp_path: Path) -> None:
    plan = make_plan(source, request("4bit"))
    (source / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"cannot convert .*model\.safetensors cannot be read: No such file"):
        write_checkpoint(plan, tmp_path / "target", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_only_files_of_a_checkpoint_are_copied(source: Path, tmp_path: Path) -> None:
    for name in ("secrets.json", "notes.txt", "optiq_metadata.json", "chat_template.jinja", "LICENSE"):
        (source / name).write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    convert(source, tmp_path / "out", request("4bit"))
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ours = {"README.md", "config.json", "model.safetensors", "model.safetensors.index.json"}
    theirs = {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"}
    assert written == ours | theirs | {"additional_chat_templates/tools.jinja"}


def test_leftovers_are_found_once(tmp_path: Path) -> None:
    growing = tmp_path / "target.incomplete"
    assert not remove_leftover(tmp_path / "target")
    growing.mkdir()
    (growing / conversion.MARKER).touch()
    (growing / "model.safetensors").touch()
    assert remove_leftover(tmp_path / "target")
    assert not remove_leftover(tmp_path / "target")


def test_a_folder_of_the_users_is_never_removed(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "target.incomplete"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(ConversionError, match="was not made by a conversion"):
        convert(source, tmp_path / "target", request("4bit"))
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_two_conversions_to_one_target(source: Path, tmp_path: Path) -> None:
    growing = tmp_path / "target.incomplete"
    growing.mkdir()
    (growing / "model.safetensors").write_text("of the other one")
    with (growing / conversion.MARKER).open("w") as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match=r"another conversion to .* is running"):
            convert(source, tmp_path / "target", request("4bit"))
        assert (growing / "model.safetensors").read_text() == "of the other one"


def test_interrupt_removes_the_unfinished_folder(source: Path, tmp_path: Path) -> None:
    def interrupt(what: str, nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(make_plan(source, request("4bit")), tmp_path / "target", "", interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_progress_adds_up(source: Path, tmp_path: Path) -> None:
    done: list[tuple[str, int]] = []
    plan = make_plan(source, request("4bit"))
    write_checkpoint(plan, tmp_path / "out", "", lambda what, nbytes: done.append((what, nbytes)))
    assert (
        sum(nbytes for _, nbytes in done)
        == plan.source_bytes
        == (source / "model.safetensors").stat().st_size
        - 8
        - (int.from_bytes((source / "model.safetensors").read_bytes()[:8], "little"))
    )


# -- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, sys, time
from pathlib import Path
from mlx_diffusiongemma import conversion, plan
from mlx_diffusiongemma.recipes import find_recipe

recipe, default, _ = find_recipe("4bit")
planned = plan.make_plan(Path(sys.argv[1]), plan.ConversionRequest(recipe, default))
started = time.perf_counter()
conversion.write_checkpoint(planned, Path(sys.argv[2]), "card")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(peak, time.perf_counter() - started, planned.source_bytes)
"""


@pytest.mark.slow
def test_memory_with_the_tensors_of_26b(tmp_path: Path) -> None:
    """Three layers of both kinds and the whole embedding, 6.6 GB: the peak does not know the size of the checkpoint."""
    if not (REFERENCE / "config_26b.json").exists():
        pytest.skip(f"needs {REFERENCE / 'config_26b.json'}: Google's configuration is not part of this repository")
    raw = json.loads((REFERENCE / "config_26b.json").read_text())
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    raw["text_config"] |= {"num_hidden_layers": 3, "layer_types": kinds}
    raw["vision_config"]["num_hidden_layers"] = 1
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(raw))
    (source / "generation_config.json").write_text((REFERENCE / "generation_config_26b.json").read_text())
    parameters = tree_flatten(DiffusionGemma(ModelConfig.from_dict(raw)).parameters())  # never evaluated
    specs = {name: TensorSpec(mx.bfloat16, array.shape) for name, array in parameters}
    writer = ShardWriter(source / "model.safetensors", specs)  # the file has its full size and no blocks: zeros
    writer._file.close()
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), str(tmp_path / "out")], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    peak, seconds, nbytes = map(float, done.stdout.split())
    largest = max(spec.nbytes for spec in specs.values())
    print(f"peak {peak / 1e9:.2f} GB, {seconds / (nbytes / 1e9):.1f} s per GB, largest tensor {largest / 1e9:.2f} GB")
    assert nbytes > 6e9 and largest > 1.4e9
    assert peak < largest  # measured 0.45 GB alone and 1.09 GB on a busy machine; the largest tensor has 1.48 GB
    assert (tmp_path / "out" / "config.json").exists()
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"biases": None}, "lacks biases, which is not affine 4, group 64"),
        ({"scales": mx.zeros((256, 5))}, "scales has shape"),
    ],
)
def test_dequantising_what_does_not_fit_its_block(source: Path, tmp_path: Path, change: dict, message: str) -> None:
    arrays = convert(source, tmp_path / "out", request("uniform-4"))
    mx.eval(arrays)
    for kind, array in change.items():
        name = f"model.decoder.layers.0.mlp.up_proj.{kind}"
        arrays = {**arrays, name: array} if array is not None else {n: a for n, a in arrays.items() if n != name}
    mx.save_safetensors(str(tmp_path / "out" / "model.safetensors"), arrays)
    (tmp_path / "out" / "model.safetensors.index.json").unlink()
    with pytest.raises(ConversionError, match=message):
        make_plan(tmp_path / "out", ConversionRequest(dequantize=True))


def test_dequantising_what_the_block_calls_unquantised(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", request("uniform-4"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization"]["model.decoder.embed_tokens"] = False
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="the block says false but the checkpoint has"):
        make_plan(tmp_path / "out", ConversionRequest(dequantize=True))


@pytest.mark.parametrize("name", ["mxfp4", "4bit"])
def test_dequantising_keeps_the_dtype_of_the_norms(source: Path, tmp_path: Path, name: str) -> None:
    convert(source, tmp_path / "out", request(name, dtype=mx.float16))
    floats = convert(tmp_path / "out", tmp_path / "floats", ConversionRequest(dequantize=True))
    assert {array.dtype for array in floats.values()} == {mx.float16}


def test_dtype_is_written_into_every_config_that_has_one(source: Path, tmp_path: Path) -> None:
    raw = json.loads((source / "config.json").read_text())
    raw |= {"dtype": "float32", "vision_config": VISION | {"dtype": "float32"}}
    (source / "config.json").write_text(json.dumps(raw))
    plan = make_plan(source, ConversionRequest(dtype=mx.bfloat16))
    assert plan.config["dtype"] == plan.config["vision_config"]["dtype"] == "bfloat16"


def test_notes_of_the_source_are_kept(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", request("4bit", notes={"recipe": "4bit"}))
    plan = make_plan(tmp_path / "out", ConversionRequest(dequantize=True, notes={"recipe": "dequantized"}))
    notes = plan.config["mlx_diffusiongemma"]
    assert (notes["recipe"], notes["source_notes"]["recipe"]) == ("dequantized", "4bit")


def test_integers_where_weights_belong(source: Path) -> None:
    path = source / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    name = "model.decoder.norm.weight"
    mx.save_safetensors(str(path), {**tensors, name: tensors[name].astype(mx.int32)})
    with pytest.raises(ConversionError, match=r"norm\.weight has dtype mlx\.core\.int32, expected a floating one"):
        make_plan(source, request("4bit"))


# -- sources in other layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["gate and up apart", "expert by expert", "both"])
def test_experts_in_pieces_convert_to_the_same(source: Path, tmp_path: Path, layout: str) -> None:
    expected = convert(source, tmp_path / "expected", request("4bit"))
    path = source / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    for name in [name for name in tensors if ".experts." in name]:
        array, base = tensors.pop(name), name.removesuffix(".gate_up_proj").removesuffix(".down_proj")
        halves = {name.removeprefix(base): array}
        if "gate_up" in name and layout != "expert by expert":
            halves = dict(zip((".gate_proj", ".up_proj"), mx.split(array, 2, axis=1), strict=True))
        for tail, half in halves.items():
            if layout == "gate and up apart":
                tensors[base + tail] = half
            else:
                tensors |= {f"{base}.{index}{tail}.weight": expert for index, expert in enumerate(half)}
    mx.eval(tensors)
    mx.save_safetensors(str(path), tensors)
    got = convert(source, tmp_path / "got", request("4bit"))
    assert got.keys() == expected.keys() and all(mx.array_equal(got[name], expected[name]) for name in got)


STANDARDISED = VISION | {"standardize": True}


def test_vision_tensors_are_converted_and_dropped_ones_are_listed(tmp_path: Path) -> None:
    """The projection is packed, the tower is not; bounds that nobody clips by and a head are left out."""
    source = save_checkpoint(tmp_path / "source", vision=STANDARDISED)
    save_tokenizer(source)
    path = source / "model.safetensors"
    tensors = dict(mx.load(str(path)))
    mx.eval(tensors)
    bound = "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.input_max"
    mx.save_safetensors(str(path), tensors | {bound: mx.array(1.0), "lm_head.weight": mx.ones((2, 2))})
    plan = make_plan(source, request("4bit"))
    assert sorted(name for name, _ in plan.dropped) == ["lm_head.weight", bound]
    tower = [name for name in tensors if "vision_tower" in name]
    assert plan.parts["vision tower"].parameters == sum(tensors[name].size for name in tower)
    got = convert(source, tmp_path / "got", request("4bit"))
    assert all(mx.array_equal(got[name], tensors[name]) for name in tower)
    projection = "model.encoder.embed_vision.embedding_projection"
    assert f"{projection}.scales" in got
    loaded = load_checkpoint(tmp_path / "got").model
    assert loaded.vision is not None and loaded.model.encoder.embed_vision.embedding_projection.bits == 4
    floats = convert(tmp_path / "got", tmp_path / "floats", ConversionRequest(dequantize=True))
    assert floats.keys() == {name for name, _ in tree_flatten(random_model(vision=STANDARDISED).parameters())}
    packed = [got[f"{projection}.{part}"] for part in ("weight", "scales", "biases")]
    assert mx.array_equal(floats[f"{projection}.weight"], mx.dequantize(*packed, group_size=64, bits=4))
    assert load_checkpoint(tmp_path / "floats").model.vision is not None


def test_clip_bounds_are_converted(tmp_path: Path) -> None:
    """They are numbers, not vectors."""
    clipped = VISION | {"use_clipped_linears": True}
    source = save_checkpoint(tmp_path / "source", vision=clipped)
    save_tokenizer(source)
    got = convert(source, tmp_path / "got", request("4bit", dtype=mx.bfloat16))
    bound = got["model.encoder.vision_tower.encoder.layers.1.self_attn.o_proj.output_min"]
    assert (bound.item(), bound.shape, bound.dtype) == (-1, (), mx.bfloat16)
    load_checkpoint(tmp_path / "got")


def test_a_tower_inlined_under_short_names_and_packed_is_dequantised(tmp_path: Path) -> None:
    """As conversions with a quantised tower have it; entries of the block may leave the prefix out too."""
    path = save_checkpoint(tmp_path / "source", vision=VISION)
    save_tokenizer(path)
    tensors = dict(mx.load(str(path / "model.safetensors")))
    mx.eval(tensors)
    module = "vision_tower.patch_embedder.input_proj"
    weight = tensors.pop(f"model.encoder.{module}.weight")
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(weight, group_size=32, bits=8), strict=True))
    mx.save_safetensors(
        str(path / "model.safetensors"), tensors | {f"{module}.{part}": array for part, array in parts.items()}
    )
    block = {"group_size": 64, "bits": 4, "mode": "affine", module: {"group_size": 32, "bits": 8}}
    (path / "config.json").write_text(json.dumps(config_dict(VISION) | {"quantization": block}))
    assert load_checkpoint(path).model.vision.patch_embedder.input_proj.bits == 8
    floats = convert(path, tmp_path / "floats", ConversionRequest(dequantize=True))
    expected = mx.dequantize(*parts.values(), group_size=32, bits=8)
    assert mx.array_equal(floats[f"model.encoder.{module}.weight"], expected)


def test_a_text_only_source_stays_one(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source")
    save_tokenizer(source)
    (source / "config.json").write_text(json.dumps(config_dict(VISION)))
    convert(source, tmp_path / "got", request("4bit"))
    assert load_checkpoint(tmp_path / "got").model.vision is None


def test_part_of_a_tower_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", vision=VISION)
    (source / "config.json").write_text(json.dumps(config_dict(STANDARDISED)))
    with pytest.raises(ConversionError, match=r"missing tensor model\.encoder\.vision_tower\.std_bias and 1 more"):
        make_plan(source, request("4bit"))
