"""Every published layout of weights: the same tensors in another arrangement give the same model.

The small model is written as each layout and compared with the plain one, bit for bit where the packing is the same.
What is refused, and loading in general, is in `test_checkpoint.py`; here only what is wrong with a layout itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_model import VISION, config_dict, random_model, save_checkpoint, save_tokenizer

from mlx_diffusiongemma.checkpoint import CheckpointError, load_checkpoint, load_model
from mlx_diffusiongemma.config import ConfigError, ModelConfig
from mlx_diffusiongemma.denoise import first_state
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.quantization import quantization_predicate
from mlx_diffusiongemma.vocabulary import CanvasReading, DrawShape, read_canvas
from mlx_diffusiongemma.weights import WeightsError, find_target, module_path, read_tensors

Tensors = dict[str, mx.array]
Vision = dict[str, Any] | None
CPU = mx.default_device() == mx.Device(mx.cpu)
EMBEDDING = "model.decoder.embed_tokens"
EXPERTS = "model.decoder.layers.0.experts"
PROJECTION = "model.encoder.embed_vision.embedding_projection"
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj"
MODES: dict[str, dict[str, Any]] = {
    "affine": {"group_size": 64, "bits": 4, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
AFFINE_8 = {"group_size": 64, "bits": 8}  # as the published overrides have it, without a mode


def quantised(
    settings: dict[str, Any] | Callable[[str], Any], dtype: mx.Dtype = mx.bfloat16, vision: Vision = None
) -> Tensors:
    """Return the tensors of the small model, packed; a function gives the settings of each module, or False."""
    model = random_model(vision=vision)
    model.set_dtype(dtype)
    of = settings if callable(settings) else lambda path: settings
    nn.quantize(model, class_predicate=lambda path, module: hasattr(module, "to_quantized") and of(path))
    tensors = dict(tree_flatten(model.parameters()))
    mx.eval(tensors)
    return tensors


def plain(dtype: mx.Dtype = mx.float32, vision: Vision = None) -> Tensors:
    return {name: array.astype(dtype) for name, array in tree_flatten(random_model(vision=vision).parameters())}


def write(folder: Path, tensors: Tensors, block: dict[str, Any] | None = None, vision: Vision = None) -> Path:
    """Write a checkpoint folder with these tensors and this quantization block."""
    save_checkpoint(folder)
    save_tokenizer(folder)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    config = config_dict(vision) | ({} if block is None else {"quantization": block})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, dtype: str | None = None) -> DiffusionGemma:
    return load_model(folder, ModelConfig.from_dict(json.loads((folder / "config.json").read_text())), dtype)


def parameters(model: DiffusionGemma) -> Tensors:
    return dict(tree_flatten(model.parameters()))


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert got[name].dtype == array.dtype, name
        assert mx.array_equal(got[name], array), name


# -- experts in pieces ------------------------------------------------------------------------------------------------


def separate(tensors: Tensors) -> Tensors:
    """Store gate and up apart, each for all experts."""
    result: Tensors = {}
    for name, array in tensors.items():
        if ".experts.gate_up_proj" in name:
            for half, part in zip(("gate", "up"), mx.split(array, 2, axis=1), strict=True):
                result[name.replace("gate_up", half)] = mx.contiguous(part)
        else:
            result[name] = array
    return result


def one_by_one(tensors: Tensors) -> Tensors:
    """Store every expert's gate, up and down apart."""
    result: Tensors = {}
    for name, array in separate(tensors).items():
        if ".experts." in name:
            result |= {name.replace(".experts.", f".experts.{e}."): mx.contiguous(a) for e, a in enumerate(array)}
        else:
            result[name] = array
    return result


def bare(tensors: Tensors) -> Tensors:
    """Store every expert apart, without `.weight` at the end."""
    return {re.sub(r"(\.experts\..*)\.weight$", r"\1", name): array for name, array in one_by_one(tensors).items()}


@pytest.mark.parametrize("mode", ["plain", *MODES])
@pytest.mark.parametrize("layout", [separate, one_by_one, bare])
def test_experts_in_pieces(tmp_path: Path, layout: Callable[[Tensors], Tensors], mode: str) -> None:
    whole = plain() if mode == "plain" else quantised(MODES[mode])
    pieces = layout(whole)
    assert len(pieces) > len(whole)
    folder = write(tmp_path, pieces, MODES.get(mode))
    assert_same_bits(parameters(load(folder)), whole)


def test_pieces_may_lie_in_several_shards(tmp_path: Path) -> None:
    whole = plain()
    folder = write(tmp_path, {})
    (folder / "model.safetensors").unlink()
    pieces = one_by_one(whole)
    shards = [f"model-0000{i + 1}-of-00003.safetensors" for i in range(3)]
    weight_map = {name: shards[i % 3] for i, name in enumerate(sorted(pieces))}
    for shard in shards:
        mx.save_safetensors(str(folder / shard), {n: pieces[n] for n in pieces if weight_map[n] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_bits(parameters(load(folder)), whole)


def test_pieces_are_read_lazily(tmp_path: Path) -> None:
    folder = write(tmp_path, one_by_one(plain()))
    before = mx.get_active_memory()
    model = load(folder)
    grown = mx.get_active_memory() - before
    size = sum(array.nbytes for array in parameters(model).values())
    assert grown < size / 100  # measured 64 bytes of 993,352: what RoPE precomputes
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before >= size


@pytest.mark.parametrize("layout", [separate, one_by_one])
def test_gate_without_up(tmp_path: Path, layout: Callable[[Tensors], Tensors]) -> None:
    pieces = {n: a for n, a in layout(plain()).items() if not (n.startswith(EXPERTS) and "up_proj" in n)}
    of = "all experts" if layout is separate else "expert 0"
    with pytest.raises(WeightsError, match=rf"{EXPERTS}\.gate_up_proj\.weight lacks its piece: up of {of}$"):
        load(write(tmp_path, pieces))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("2.down_proj.weight", r"down_proj\.weight lacks its piece: expert 2$"),
        ("2.gate_proj.weight", r"gate_up_proj\.weight lacks its piece: gate of expert 2$"),
        ("3.up_proj.weight", r"gate_up_proj\.weight lacks its piece: up of expert 3$"),
        ("3.down_proj.weight", r"down_proj\.weight has shape \(3, 64, 64\), expected \(4, 64, 64\)$"),
    ],
)
def test_an_expert_is_missing(tmp_path: Path, missing: str, message: str) -> None:
    pieces = one_by_one(plain())
    del pieces[f"{EXPERTS}.{missing}"]
    with pytest.raises(WeightsError, match=message):
        load(write(tmp_path, pieces))


def test_scales_of_an_expert_are_missing(tmp_path: Path) -> None:
    pieces = one_by_one(quantised(MODES["mxfp4"]))
    del pieces[f"{EXPERTS}.1.up_proj.scales"]
    with pytest.raises(WeightsError, match=r"gate_up_proj\.scales lacks its piece: up of expert 1$"):
        load(write(tmp_path, pieces, MODES["mxfp4"]))


def test_one_parameter_in_two_layouts(tmp_path: Path) -> None:
    whole = plain()
    both = whole | {n: a for n, a in separate(whole).items() if n.endswith("0.experts.gate_proj.weight")}
    with pytest.raises(WeightsError, match=r"gate_up_proj\.weight is stored in two layouts: .*(gate of )?all experts"):
        load(write(tmp_path, both))


def test_pieces_that_do_not_fit_together(tmp_path: Path) -> None:
    pieces = separate(plain())
    pieces[f"{EXPERTS}.up_proj.weight"] = mx.zeros((4, 32, 64))
    with pytest.raises(WeightsError, match=r"up of all experts: got .*float32 \(4, 32, 64\), expected .*\(4, 64, 64\)"):
        load(write(tmp_path / "shape", pieces))
    pieces[f"{EXPERTS}.up_proj.weight"] = mx.zeros((4, 64, 64), mx.float16)
    with pytest.raises(WeightsError, match=r"got mlx\.core\.float16 .*, expected mlx\.core\.float32 .* as the others"):
        load(write(tmp_path / "dtype", pieces))


# -- what is quantised, and how -------------------------------------------------------------------------------------


def dequantised(tensors: Tensors, settings: dict[str, Any]) -> Tensors:
    """Return the values that packed tensors stand for, in float32."""
    result: Tensors = {}
    for name, array in tensors.items():
        path, _, last = name.rpartition(".")
        scales, biases = tensors.get(f"{path}.scales"), tensors.get(f"{path}.biases")
        if scales is None:
            result[name] = array.astype(mx.float32)
        elif last == "weight":
            floats = (a if a is None or a.dtype == mx.uint8 else a.astype(mx.float32) for a in (scales, biases))
            result[name] = mx.dequantize(array, *floats, **settings).astype(mx.float32)
    return result


def two_steps(model: DiffusionGemma) -> tuple[mx.array, mx.array, mx.array, CanvasReading]:
    """Prefill 11 tokens and denoise twice.

    Returns:
        hidden states of the prefill [1, L, D], of the first and of the second step [C, D], reading of the second.
    """
    cache = model.make_cache()
    prefilled = model.prefill(mx.arange(11) * 7 % 96, cache)
    state = first_state(model, mx.arange(8) * 5, 1)
    soft, steps = state.soft_embeddings, []
    for _ in range(2):
        steps += model.denoise([state.canvas], [soft], [cache.views()], [mx.array(cache.offset)])
        table, uniforms = model.model.decoder.embed_tokens, mx.linspace(0.05, 0.95, 8)
        reading = read_canvas(steps[-1], table, 30.0, mx.array(0.8), uniforms, DrawShape())
        assert reading.soft_embeddings.dtype == soft.dtype == steps[-1].dtype == model.dtype
        soft = reading.soft_embeddings
    return prefilled, *steps, reading


def errors(got: mx.array, expected: mx.array) -> np.ndarray:
    """Return the largest error of each row, relative to the row's largest number."""
    rows, exact = (np.array(a.astype(mx.float32)).reshape(-1, a.shape[-1]) for a in (got, expected))
    return np.abs(rows - exact).max(-1) / np.abs(exact).max(-1)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_computes_what_its_weights_say(tmp_path: Path, mode: str) -> None:
    """Everything packed (lookup, head, soft embeddings, experts) against the same values unpacked."""
    tensors, settings = quantised(MODES[mode]), MODES[mode]
    folder = write(tmp_path / "packed", tensors, settings)
    model, exact = load(folder, "float32"), load(write(tmp_path / "exact", dequantised(tensors, settings)))
    table, experts = model.model.decoder.embed_tokens, model.layers[0].experts.gate_up_proj
    for module in (table, experts):
        assert {"group_size": module.group_size, "bits": module.bits, "mode": module.mode} == settings
    *hidden, reading = two_steps(model)
    *expected_hidden, expected = two_steps(exact)
    for got, want in zip(hidden, expected_hidden, strict=True):
        assert errors(got, want).max() < 1e-4  # measured 2.4e-5 (mxfp4), 0 for affine
    assert errors(reading.soft_embeddings, expected.soft_embeddings).max() < 1e-4  # measured 3.4e-5 (mxfp4)
    np.testing.assert_allclose(np.array(reading.entropy), np.array(expected.entropy), atol=1e-4)  # measured 3.5e-5
    assert reading.argmax.tolist() == expected.argmax.tolist()
    assert reading.draw.tolist() == expected.draw.tolist()

    # As stored, in bfloat16. The median: one token whose router changes its mind is off by much more than rounding.
    model = load(folder)
    assert model.dtype == mx.bfloat16
    prefilled, first, _, _ = two_steps(model)
    assert np.median(errors(prefilled, expected_hidden[0])) < 0.05  # measured 0.018 (mxfp8) to 0.035 (affine)
    assert np.median(errors(first, expected_hidden[1])) < 0.1  # measured 0.036 (mxfp4) to 0.070 (affine)


MIXED: dict[str, dict[str, Any]] = {
    "4bit": {"group_size": 64, "bits": 4, "mode": "affine"},
    **{mode: MODES[mode] for mode in ("mxfp4", "mxfp8", "nvfp4")},
}


@pytest.mark.parametrize("default", MIXED.values(), ids=MIXED)
def test_published_block(tmp_path: Path, default: dict[str, Any]) -> None:
    """Experts, self-conditioning and vision projection by the default, the rest by overrides without a mode: affine."""

    def by_default(path: str) -> bool:
        return ".experts." in path or ".self_conditioning." in path or path == PROJECTION

    def settings(path: str) -> Any:
        return False if "vision_tower" in path else default if by_default(path) else {**AFFINE_8, "mode": "affine"}

    tensors = quantised(settings, vision=VISION)
    paths = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    assert PROJECTION in paths  # the tower itself is left in bfloat16
    model = load(write(tmp_path, tensors, default | {path: AFFINE_8 for path in paths if not by_default(path)}, VISION))
    assert_same_bits(parameters(model), tensors)
    modes = {path: module.mode for path, module in model.named_modules() if hasattr(module, "mode")}
    assert modes == {path: default["mode"] if by_default(path) else "affine" for path in paths}
    assert two_steps(model)[0].dtype == look(model).dtype == mx.bfloat16


def test_false_and_true_overrides(tmp_path: Path) -> None:
    default = MODES["mxfp8"]
    tensors = quantised(lambda path: False if path in (EMBEDDING, Q_PROJ) else default)
    model = load(write(tmp_path, tensors, default | {EMBEDDING: False, Q_PROJ: False, f"{EXPERTS}.down_proj": True}))
    assert_same_bits(parameters(model), tensors)
    assert isinstance(model.model.decoder.embed_tokens, nn.Embedding)
    assert model.layers[0].experts.down_proj.mode == "mxfp8"


def test_overrides_of_experts_in_pieces(tmp_path: Path) -> None:
    """Overrides are looked up under the names of the file, gate and up apart or expert by expert."""
    eight = {**AFFINE_8, "mode": "affine"}
    tensors = quantised(lambda path: eight if path.startswith(EXPERTS) else MODES["affine"])
    halves = {f"{EXPERTS}.{name}_proj": AFFINE_8 for name in ("gate", "up", "down")}
    assert_same_bits(parameters(load(write(tmp_path / "halves", separate(tensors), MODES["affine"] | halves))), tensors)
    single = {f"{EXPERTS}.{e}.{name}_proj": AFFINE_8 for name in ("gate", "up", "down") for e in range(4)}
    assert_same_bits(
        parameters(load(write(tmp_path / "single", one_by_one(tensors), MODES["affine"] | single))), tensors
    )
    single[f"{EXPERTS}.2.up_proj"] = MODES["mxfp4"]
    with pytest.raises(
        ConfigError, match=r"experts\.2\.up_proj: got .*mxfp4.*, expected .*affine.* as for the rest of"
    ):
        quantization_predicate(MODES["affine"] | single, set(), module_path)


@pytest.mark.parametrize(
    ("stored", "override", "message"),
    [
        ("affine", {"group_size": 64, "bits": 8}, r"q_proj\.weight has shape \(64, 8\), expected \(64, 16\)"),
        ("affine", {"group_size": 32, "bits": 4}, r"q_proj\.(bias|scal)es has shape \(64, 1\), expected \(64, 2\)"),
        ("affine", MODES["mxfp4"], r"unexpected tensor .*q_proj\.biases"),
        ("mxfp4", {"group_size": 32, "bits": 4}, r"missing tensor .*q_proj\.biases"),
        ("mxfp4", MODES["nvfp4"], r"q_proj\.scales has shape \(64, 2\), expected \(64, 4\)"),
    ],
)
def test_override_that_does_not_fit_the_tensors(tmp_path: Path, stored: str, override: dict, message: str) -> None:
    tensors = quantised(lambda path: MODES[stored] if path == Q_PROJ else False)
    folder = write(tmp_path, tensors, MODES[stored] | {Q_PROJ: override})
    with pytest.raises(WeightsError, match=rf"{message}; config\.json's quantization block does not fit this module$"):
        load(folder)


# -- dtypes ---------------------------------------------------------------------------------------------------------


def vmlx(dtype: mx.Dtype) -> Tensors:
    """Return experts, attention and MLP packed in MXFP8, table and self-conditioning as floats."""
    return quantised(lambda path: False if path == EMBEDDING or "self_cond" in path else MODES["mxfp8"], dtype)


def test_float16_passes_through(tmp_path: Path) -> None:
    tensors = vmlx(mx.float16)
    block = MODES["mxfp8"] | {EMBEDDING: False, "model.encoder.vision_tower.encoder.layers.0.mlp.up_proj.linear": False}
    model = load(write(tmp_path, tensors, block))
    assert_same_bits(parameters(model), tensors)
    hidden, _, _, reading = two_steps(model)
    assert hidden.dtype == model.dtype == model.embedding_scale.dtype == mx.float16
    assert np.isfinite(np.array(reading.entropy)).all()


def test_float16_beside_bfloat16_becomes_bfloat16(tmp_path: Path) -> None:
    original = vmlx(mx.bfloat16)
    mixed = {n: a.astype(mx.float16) if "embed" in n or "self_cond" in n else a for n, a in original.items()}
    loaded = parameters(load(write(tmp_path, mixed, MODES["mxfp8"])))
    assert {a.dtype for a in loaded.values()} == {mx.bfloat16, mx.uint8, mx.uint32}
    for name, array in original.items():
        got, expected = (np.array(a.astype(mx.float32)) for a in (loaded[name], array))
        changed = got != expected
        assert (np.abs(expected[changed]) < 2.0**-17).all(), name  # float16 has fewer bits down there


@pytest.mark.skipif(not CPU, reason="a GPU runs experts in half precision")
def test_a_quantised_checkpoint_with_plain_experts_is_float32_on_the_cpu(tmp_path: Path) -> None:
    folder = write(tmp_path, quantised(lambda path: path == EMBEDDING and MODES["mxfp4"]), MODES["mxfp4"])
    model = load(folder)
    assert model.dtype == mx.float32
    assert two_steps(model)[0].dtype == mx.float32
    with pytest.raises(ValueError, match="dtype 'float16': expected float32, unquantised experts"):
        load(folder, "float16")


# -- the vision tower -------------------------------------------------------------------------------------------------

TOWER = "model.encoder.vision_tower"
UP_PROJ = f"{TOWER}.encoder.layers.0.mlp.up_proj"


def look(model: DiffusionGemma) -> mx.array:
    """Return the soft tokens [1, 4, D] of an image of 6 x 6 patches."""
    positions = mx.array([[[i % 6, i // 6] for i in range(36)]], mx.int32)
    return model.embed_images(mx.abs(mx.sin(mx.arange(36 * 192.0))).reshape(1, 36, 192), positions)


def in_vision(tensors: Tensors) -> Tensors:
    return {name: array for name, array in tensors.items() if name.startswith((TOWER, PROJECTION))}


def split_vision(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Return the text tensors and the vision tensors."""
    return {name: array for name, array in tensors.items() if name not in in_vision(tensors)}, in_vision(tensors)


@pytest.mark.parametrize("prefix", ["model.encoder.", ""])
def test_vision_tower_inside_the_shards(tmp_path: Path, prefix: str) -> None:
    tensors = plain(vision=VISION)
    text, vision = split_vision(tensors)
    assert len(vision) == 2 + 2 * 13 + 1
    named = {prefix + name.removeprefix("model.encoder."): array for name, array in vision.items()}
    loaded = load_checkpoint(write(tmp_path, text | named, vision=VISION))
    assert_same_bits(parameters(loaded.model), tensors)
    assert loaded.report is not None and loaded.report.dropped == ()
    assert loaded.model.vision is not None and loaded.config.vision is not None
    assert mx.array_equal(look(loaded.model), look(random_model(vision=VISION)))


def test_half_precision_towers_follow_the_text_model(tmp_path: Path) -> None:
    """A bfloat16 tower beside float32, and a float16 one beside packed bfloat16: one dtype, that of the norms."""
    floats = {name: array.astype(mx.bfloat16) for name, array in plain(vision=VISION).items()}
    model = load(write(tmp_path / "floats", floats, vision=VISION))
    assert look(model).dtype == model.dtype == (mx.float32 if CPU else mx.bfloat16)
    text, vision = split_vision(quantised(lambda path: "vision" not in path and MODES["mxfp4"], vision=VISION))
    halves = {name: array.astype(mx.float16) for name, array in vision.items()}
    model = load(write(tmp_path / "packed", text | halves, MODES["mxfp4"], VISION))
    assert look(model).dtype == model.dtype == mx.bfloat16


def test_a_text_only_conversion_of_a_model_that_sees(tmp_path: Path) -> None:
    """config.json still speaks of a tower; the model says that it has none."""
    loaded = load_checkpoint(write(tmp_path, plain(), vision=VISION))
    assert loaded.model.vision is None and loaded.config.vision is None
    assert loaded.report is not None and loaded.report.dropped == ()
    assert_same_bits(parameters(loaded.model), plain())
    with pytest.raises(ValueError, match="images: got some, expected none: this model has no vision tower"):
        look(loaded.model)


@pytest.mark.parametrize("name", [f"{PROJECTION}.weight", f"{TOWER}.std_bias", f"{UP_PROJ}.linear.weight"])
def test_a_part_of_the_tower_is_missing(tmp_path: Path, name: str) -> None:
    standardised = VISION | {"standardize": True}
    tensors = plain(vision=standardised)
    del tensors[name]
    with pytest.raises(WeightsError, match=rf"^missing tensor {re.escape(name)}$"):
        load(write(tmp_path, tensors, vision=standardised))


def test_a_tower_of_another_shape(tmp_path: Path) -> None:
    folder = write(tmp_path, plain(vision=VISION), vision=VISION | {"position_embedding_size": 32})
    with pytest.raises(WeightsError, match=r"position_embedding_table has shape \(2, 64, 64\), expected \(2, 32, 64\)"):
        load(folder)
    folder = write(tmp_path, plain(vision=VISION | {"standardize": True}), vision=VISION)
    with pytest.raises(WeightsError, match=r"unexpected tensor .*std_bias and 1 more"):
        load(folder)


@pytest.mark.parametrize("mode", MODES)
def test_quantised_tower(tmp_path: Path, mode: str) -> None:
    """Every linear layer of tower and projector packed, the one of the patches too, as an OptiQ conversion has it."""
    settings = MODES[mode]
    tensors = quantised(lambda path: settings if "vision" in path else False, vision=VISION)
    assert sum(name.endswith(".scales") for name in tensors) == 1 + 2 * 7 + 1
    model = load(write(tmp_path / "packed", tensors, settings, VISION), "float32")
    assert model.vision is not None
    up_proj = model.vision.encoder.layers[0].mlp.up_proj.linear
    assert {"group_size": up_proj.group_size, "bits": up_proj.bits, "mode": up_proj.mode} == settings
    exact = load(write(tmp_path / "exact", dequantised(tensors, settings), vision=VISION))
    assert errors(look(model), look(exact)).max() < 1e-4


def test_clip_bounds(tmp_path: Path) -> None:
    """Parameters where the config says that layers clip, dropped where it says that they do not."""
    clipped = VISION | {"use_clipped_linears": True}
    tensors = plain(vision=clipped)
    bounds = {name for name in tensors if name.endswith(("_min", "_max"))}
    assert len(bounds) == 2 * 7 * 4 and f"{UP_PROJ}.input_max" in bounds
    model = load(write(tmp_path / "clipped", tensors, vision=clipped))
    assert_same_bits(parameters(model), tensors)
    loaded = load_checkpoint(write(tmp_path / "dropped", tensors, vision=VISION))
    assert loaded.report is not None
    assert dict(loaded.report.dropped) == dict.fromkeys(bounds, "no linear layer of this model clips")
    assert not mx.allclose(look(model), look(loaded.model))
    del tensors[f"{UP_PROJ}.input_max"]
    with pytest.raises(WeightsError, match=r"missing tensor .*mlp\.up_proj\.input_max$"):
        load(write(tmp_path / "missing", tensors, vision=clipped))


def test_optiq_keeps_the_vision_tower_in_a_folder_of_its_own(tmp_path: Path) -> None:
    def settings(path: str) -> Any:
        return False if "vision" in path else {**AFFINE_8, "mode": "affine"} if ".router." in path else MODES["affine"]

    tensors = quantised(settings, vision=VISION)
    text, vision = split_vision(tensors)
    routers = {n.removesuffix(".scales"): AFFINE_8 for n in text if n.endswith("router.proj.scales")}
    folder = write(tmp_path, text, MODES["affine"] | routers, VISION)
    names = ["model.safetensors", "optiq/optiq_vision.safetensors"]
    (folder / "optiq").mkdir()
    mx.save_safetensors(str(folder / names[1]), vision)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(text, names[0])}))
    loaded = load_checkpoint(folder)
    assert loaded.report is not None and loaded.report.dropped == ()
    assert_same_bits(parameters(loaded.model), tensors)
    assert look(loaded.model).dtype == mx.bfloat16

    index.write_text(json.dumps({"weight_map": dict.fromkeys(text, names[0]) | dict.fromkeys(vision, names[1])}))
    assert_same_bits(read_tensors(folder).parameters, tensors)  # named by the index as well: read once

    content = (folder / names[1]).read_bytes()
    (folder / names[1]).write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"optiq_vision\.safetensors is damaged or truncated"):
        load_checkpoint(folder)


# -- what is not read -------------------------------------------------------------------------------------------------

UNSEEN = "config.json has no vision_config"
ROTARY = "rotary frequencies are computed"
UNREAD = {
    f"{TOWER}.std_bias": UNSEEN,
    f"{UP_PROJ}.linear.weight": UNSEEN,
    f"{UP_PROJ}.input_max": UNSEEN,
    f"{PROJECTION}.weight": UNSEEN,
    f"{TOWER}.encoder.rotary_emb.inv_freq": ROTARY,
    "model.decoder.rotary_emb.full_attention_inv_freq": ROTARY,
    "model.encoder.language_model.layers.0.mlp.up_proj.weight": "the encoder shares these with the decoder",
    "lm_head.weight": "the head is the embedding",
    "lm_head.scales": "the head is the embedding",
}


def test_every_tensor_is_used_or_listed(tmp_path: Path) -> None:
    """A tower without a config, duplicates and buffers."""
    loaded = load_checkpoint(write(tmp_path, plain() | {name: mx.ones((2,)) for name in UNREAD}))
    assert loaded.report is not None
    assert dict(loaded.report.dropped) == UNREAD
    assert len(loaded.report.dropped) == len(UNREAD)
    assert loaded.report.nbytes == sum(array.nbytes for array in plain().values())
    assert 0 < loaded.report.seconds < 60
    assert_same_bits(parameters(loaded.model), plain())


def test_clip_buffers_of_the_text_model_are_not_dropped() -> None:
    assert find_target(f"{Q_PROJ}.input_max").parameter == f"{Q_PROJ}.input_max"  # left over, so an error


def test_paths_of_the_block() -> None:
    assert module_path(Q_PROJ) == Q_PROJ
    assert module_path(f"{EXPERTS}.gate_up_proj") == module_path(f"{EXPERTS}.7.gate_proj") == f"{EXPERTS}.gate_up_proj"
    assert module_path(f"{EXPERTS}.7.down_proj") == f"{EXPERTS}.down_proj"
    assert module_path("lm_head") is None
    assert module_path("bits") is None
