"""Loading: what is accepted, and one clear line for everything that is not."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_model import GENERATION, VISION, config_dict, random_model, save_checkpoint, save_tokenizer

import mlx_diffusiongemma
from mlx_diffusiongemma.checkpoint import CheckpointError, find_folder, load_checkpoint, load_model
from mlx_diffusiongemma.config import ConfigError, ModelConfig
from mlx_diffusiongemma.quantization import quantization_predicate
from mlx_diffusiongemma.weights import WEIGHT_MAP, WeightsError, parameter_name

TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete small checkpoint."""
    path = save_checkpoint(tmp_path / "model")
    save_tokenizer(path)
    return path


def rewrite(folder: Path, change) -> None:
    """Apply `change` to the dict of tensors and write them again."""
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


def test_round_trip(folder: Path) -> None:
    loaded = load_checkpoint(folder)
    for (name, array), (other, expected) in zip(
        tree_flatten(loaded.model.parameters()), tree_flatten(random_model().parameters()), strict=True
    ):
        assert name == other
        assert mx.array_equal(array, expected), name


def test_both_spellings_of_expert_tensors(folder: Path) -> None:
    def add_weight(tensors: dict) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            tensors[name + ".weight"] = tensors.pop(name)

    rewrite(folder, add_weight)
    load_checkpoint(folder)


def test_weight_map_applied_twice_equals_once(folder: Path) -> None:
    names = set(mx.load(str(folder / "model.safetensors")))
    once = {parameter_name(name) for name in names}
    assert {parameter_name(name) for name in once if name} == once
    assert any(name not in once for name in names)  # the map does something


def test_every_dropped_row_has_a_reason() -> None:
    assert all(bool(why) == (target is None) for _, target, why in WEIGHT_MAP)


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.decoder.rotary_emb.full_attention_inv_freq",
        "model.encoder.language_model.layers.3.self_attn.q_proj.weight",
        "model.encoder.language_model.embed_tokens.weight",
        "model.encoder.vision_tower.encoder.rotary_emb.inv_freq",
    ],
)
def test_dropped_on_purpose(name: str) -> None:
    assert parameter_name(name) is None


PUBLISHED = {
    "tensor_names_bf16_original.txt": 1047,
    "tensor_names_mlx_bf16.txt": 1047,
    "tensor_names_mlx_4bit_8bit.txt": 1647,
}


@pytest.mark.parametrize(("file", "count"), PUBLISHED.items())
def test_published_names_fill_every_parameter(file: str, count: int) -> None:
    reference = Path(__file__).resolve().parents[2] / "shared" / "reference" / file
    if not reference.exists():
        pytest.skip(f"needs {reference}: the lists of published tensor names are not part of this repository")
    names = [line.split()[0] for line in reference.read_text().splitlines() if line.startswith("model.")]
    assert len(names) == count
    kept = {parameter_name(name) for name in names} - {None}
    layer_types = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(30)]
    vision = VISION | {"num_hidden_layers": 27, "standardize": True}
    model = random_model(vision=vision, num_hidden_layers=30, layer_types=layer_types)
    if count == 1647:
        nn.quantize(model, class_predicate=lambda path, _: f"{path}.scales" in kept)
    assert kept == {name for name, _ in tree_flatten(model.parameters())}


def test_encoder_scalars_fall_back_to_the_decoders(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.encoder.language_model")])
    model = load_checkpoint(folder).model
    for own, shared in zip(model.model.encoder.language_model.layers, model.model.decoder.layers, strict=True):
        assert own.layer_scalar.item() == shared.layer_scalar.item()


def test_a_float_checkpoint_is_float32_on_the_cpu(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({n: a.astype(mx.bfloat16) for n, a in t.items()}))
    dtypes = {a.dtype for _, a in tree_flatten(load_checkpoint(folder).model.parameters())}
    assert dtypes == {mx.float32 if mx.default_device() == mx.Device(mx.cpu) else mx.bfloat16}


@pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="a GPU runs experts in half precision")
def test_half_precision_experts_do_not_run_on_the_cpu(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'bfloat16': expected float32, unquantised experts"):
        load_checkpoint(folder, dtype="bfloat16")


def test_shards(folder: Path) -> None:
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    mx.eval(tensors)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        mx.save_safetensors(str(folder / shard), {n: tensors[n] for n in names if weight_map[n] == shard})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    load_checkpoint(folder)

    index.write_text(json.dumps({"weight_map": {**weight_map, "lm_head.weight": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight, which no shard holds"):
        load_checkpoint(folder)
    index.write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-00002-of-00002\.safetensors \(1 of 2 shards missing\)"):
        load_checkpoint(folder)
    for wrong in ("[]", "{", '{"weight_map": {"a": 1}}', '{"weight_map": 5}'):
        index.write_text(wrong)
        with pytest.raises(CheckpointError, match="not a safetensors index"):
            load_checkpoint(folder)


# -- bad input ------------------------------------------------------------------------------------------------------


def test_missing_folder() -> None:
    with pytest.raises(
        CheckpointError, match=r"model '\./nowhere' is not a folder; expected a folder, a Hub id .* 'tiny'"
    ):
        load_checkpoint("./nowhere")


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_checkpoint(path)


def test_hub_id_without_network_names_tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"'owner/name' is not in the local cache .* --model tiny") as error:
        find_folder("owner/name")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["owner/na me", "owner/--", "owner/name.git"])
def test_invalid_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a valid Hub id"):
        find_folder(name)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: expected model\.safetensors"):
        load_checkpoint(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_truncated_file(folder: Path, keep: float) -> None:
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or truncated"):
        load_checkpoint(folder)


def test_missing_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.decoder.norm.weight"))
    with pytest.raises(CheckpointError, match=r"missing tensor model\.decoder\.norm\.weight$"):
        load_checkpoint(folder)


def test_extra_tensor(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.decoder.layers.9.layer_scalar": mx.ones((1,))}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.decoder\.layers\.9\.layer_scalar$"):
        load_checkpoint(folder)


def test_tensor_of_another_model(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.q_proj.weight": mx.ones((1,))}))
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\.0\.q_proj\.weight: no row"):
        load_checkpoint(folder)


def test_two_tensors_for_one_parameter(folder: Path) -> None:
    name = "model.decoder.layers.0.experts.down_proj"
    rewrite(folder, lambda t: t.update({f"{name}.weight": t[name]}))
    with pytest.raises(CheckpointError, match="is a second tensor for"):
        load_checkpoint(folder)


def test_wrong_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.decoder.norm.weight": mx.ones((63,))}))
    with pytest.raises(CheckpointError, match=r"model\.decoder\.norm\.weight has shape \(63,\), expected \(64,\)"):
        load_checkpoint(folder)


def test_wrong_dtype(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.decoder.norm.weight": mx.ones((64,), mx.int32)}))
    with pytest.raises(CheckpointError, match=r"model\.decoder\.norm\.weight has dtype mlx\.core\.int32, expected"):
        load_checkpoint(folder)


def test_end_token_outside_the_vocabulary(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({**GENERATION, "eos_token_id": [1, 1_000_000]}))
    with pytest.raises(CheckpointError, match="eos_token_id: got 1000000, expected an integer <= 95"):
        load_checkpoint(folder)


def test_tokenizer_of_another_model(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TINY / name, folder / name)
    with pytest.raises(CheckpointError, match=r"the tokenizer has id \d+, expected ids below vocab_size = 96"):
        load_checkpoint(folder)


@pytest.mark.parametrize("model", ["~nosuchuser/x", None, 5])
def test_not_a_model_name(model: object) -> None:
    with pytest.raises(CheckpointError, match="expected a folder, a Hub id"):
        load_checkpoint(model)


def test_unknown_model_type(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**config_dict(), "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="model_type: got 'llama', expected 'diffusion_gemma'"):
        load_checkpoint(folder)


@pytest.mark.parametrize("local", ["tiny", "folder"])
def test_revision_of_something_local(folder: Path, local: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"revision: got 'main' for .*, expected none: only a Hub id has revisions"
    ):
        load_checkpoint(folder if local == "folder" else local, revision="main")


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="dtype 'int4' is unknown; expected one of float32, bfloat16, float16"):
        load_checkpoint(folder, dtype="int4")


def test_unknown_keys_warn(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({**config_dict(), "surprise": 1}))
    with pytest.warns(UserWarning, match="key surprise is not known"):
        load_checkpoint(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (folder / "config.json").write_text(json.dumps(config_dict()))
        load_checkpoint(folder)


# -- quantised checkpoints ------------------------------------------------------------------------------------------


def quantised_folder(tmp_path: Path, block: dict, bits: dict[str, dict | bool]) -> Path:
    """Write the small model with chosen modules quantised and `block` as its quantization entry."""
    model = random_model()
    nn.quantize(model, class_predicate=lambda path, _: bits.get(path, False))
    path = save_checkpoint(tmp_path / "q", model)
    (path / "config.json").write_text(json.dumps({**config_dict(), "quantization": block}))
    return path


def test_quantised_with_overrides(tmp_path: Path) -> None:
    embedding, experts = "model.decoder.embed_tokens", "model.decoder.layers.0.experts.gate_up_proj"
    q_proj = "model.decoder.layers.0.self_attn.q_proj"
    eight, four = {"group_size": 64, "bits": 8, "mode": "affine"}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}
    block = {**four, embedding: {"group_size": 64, "bits": 8}, q_proj: False}  # an override without mode is affine
    path = quantised_folder(tmp_path, block, {embedding: eight, experts: four})
    model = load_model(path, ModelConfig.from_dict(json.loads((path / "config.json").read_text())))
    table = model.model.decoder.embed_tokens
    assert (table.bits, table.group_size, table.mode) == (8, 64, "affine")
    expert = model.model.decoder.layers[0].experts.gate_up_proj
    assert (expert.bits, expert.group_size, expert.mode) == (4, 32, "mxfp4")
    assert isinstance(model.model.decoder.layers[0].self_attn.q_proj, nn.Linear)

    plain = random_model()
    tokens = mx.arange(12)
    hidden = np.array(model.prefill(tokens, model.make_cache()).astype(mx.float32))
    exact = np.array(plain.prefill(tokens, plain.make_cache()))
    assert 0 < np.abs(hidden - exact).mean() < 0.3 * np.abs(exact).mean()


def test_scales_without_a_block(tmp_path: Path) -> None:
    path = quantised_folder(
        tmp_path, {}, {"model.decoder.embed_tokens": {"group_size": 64, "bits": 8, "mode": "affine"}}
    )
    (path / "config.json").write_text(json.dumps(config_dict()))
    with pytest.raises(WeightsError, match="no quantization block"):
        load_model(path, ModelConfig.from_dict(config_dict()))


def test_false_override_with_scales() -> None:
    predicate = quantization_predicate({"group_size": 64, "bits": 4, "a": False}, {"a.scales"})
    with pytest.raises(ConfigError, match=r"says false but the checkpoint has a\.scales"):
        predicate("a", nn.Linear(64, 64))


def test_override_without_scales() -> None:
    predicate = quantization_predicate({"group_size": 64, "bits": 4, "a": {"group_size": 64, "bits": 8}}, set())
    with pytest.raises(ConfigError, match=r"but a\.scales is missing"):
        predicate("a", nn.Linear(64, 64))


@pytest.mark.parametrize(
    "block", [{"group_size": 64}, {"group_size": 64, "bits": "4"}, {"group_size": 64, "bits": 4, "mode": "x"}]
)
def test_wrong_quantization_block(block: dict) -> None:
    with pytest.raises(ConfigError, match="quantization default"):
        quantization_predicate(block, set())


def write_adapter(folder: Path, tensors: dict[str, mx.array]) -> Path:
    """Write a rank-2 LoRA on the query projections in mlx-lm's format."""
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    settings = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": parameters}
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    return folder


def test_adapter(folder: Path, tmp_path: Path) -> None:
    """A LoRA adapter adds scale x (x a) b."""
    a, b = mx.random.normal((64, 2)), mx.random.normal((2, 64))
    path = "model.decoder.layers.0.self_attn.q_proj"
    adapter = write_adapter(tmp_path / "adapter", {f"{path}.lora_a": a, f"{path}.lora_b": b})
    adapted = load_checkpoint(folder, adapter_path=adapter).model.layers[0].self_attn.q_proj
    plain = load_checkpoint(folder).model.layers[0].self_attn.q_proj
    x = mx.random.normal((1, 64))
    np.testing.assert_allclose(np.array(adapted(x)), np.array(plain(x) + 3.0 * (x @ a) @ b), rtol=1e-4, atol=1e-4)


def test_wrong_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks adapter_config\.json"):
        load_checkpoint(folder, adapter_path=tmp_path)
    foreign = write_adapter(tmp_path / "foreign", {"model.layers.0.mlp.lora_a": mx.ones((2, 2))})
    with pytest.raises(CheckpointError, match=r"does not fit this model.*model\.layers\.0\.mlp\.lora_a"):
        load_checkpoint(folder, adapter_path=foreign)
    (foreign / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not fit this model in mlx-lm's format"):
        load_checkpoint(folder, adapter_path=foreign)
