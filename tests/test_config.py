"""`config.json` and `generation_config.json` in the dialects that exist."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from small_model import GENERATION, VISION, config_dict

from mlx_diffusiongemma.config import ConfigError, GenerationConfig, ModelConfig, VisionConfig, load_configs, read_json

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"

# What the released config.json says, by hand.
RELEASED = {
    "vocab_size": 262144, "hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
    "num_experts": 128, "top_k_experts": 8, "num_hidden_layers": 30, "num_attention_heads": 16,
    "num_key_value_heads": 8, "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512,
    "sliding_window": 1024, "max_position_embeddings": 262144, "final_logit_softcapping": 30.0,
}  # fmt: skip
RELEASED_VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "num_key_value_heads": 16, "head_dim": 72, "patch_size": 16, "pooling_kernel_size": 3, "patches_per_token": 9,
    "position_embedding_size": 10240, "rope_theta": 100.0, "standardize": True, "use_clipped_linears": False,
}  # fmt: skip


def test_released_config() -> None:
    path = REFERENCE / "config_26b.json"
    if not path.exists():
        pytest.skip(f"needs {path}: the released config.json is not part of this repository")
    config = ModelConfig.from_dict(read_json(path))
    assert {key: getattr(config.text, key) for key in RELEASED} == RELEASED
    assert [i for i, kind in enumerate(config.text.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert config.canvas_length == 256
    assert config.eos_token_ids == (1, 106)
    assert config.unknown_keys == ()
    assert config.vision is not None
    assert {key: getattr(config.vision, key) for key in RELEASED_VISION} == RELEASED_VISION
    full = config.text.attention_shape("full_attention")
    assert (full.head_dim, full.num_key_value_heads, full.rope_theta, full.rotated_dims) == (512, 2, 1e6, 128)
    sliding = config.text.attention_shape("sliding_attention")
    assert (sliding.head_dim, sliding.num_key_value_heads, sliding.rope_theta, sliding.rotated_dims) == (
        256,
        8,
        1e4,
        256,
    )


def test_released_generation_config() -> None:
    path = REFERENCE / "generation_config_26b.json"
    if not path.exists():
        pytest.skip(f"needs {path}: the released generation_config.json is not part of this repository")
    config = GenerationConfig.from_dict(read_json(path))
    assert config == GenerationConfig(
        max_new_tokens=256, max_denoising_steps=48, entropy_bound=0.1, t_min=0.4, t_max=0.8, stability_threshold=1,
        confidence_threshold=0.005, eos_token_ids=(1, 106, 50), pad_token_id=0,
    )  # fmt: skip


def test_mlx_conversion_with_folded_generation_config(tmp_path: Path) -> None:
    raw = config_dict()
    quantization = {"group_size": 64, "bits": 4, "mode": "affine", "model.decoder.embed_tokens": {"bits": 8}}
    raw |= {"quantization": quantization, "quantization_config": quantization, "generation_config": GENERATION}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, generation = load_configs(tmp_path)
    assert config.quantization == quantization
    assert config.unknown_keys == ()
    assert (generation.max_denoising_steps, generation.eos_token_ids) == (6, (1,))


def test_transformers_dialect_with_per_layer_config() -> None:
    raw = config_dict(per_layer_config={"2": {"head_dim": 64, "num_key_value_heads": 2}})
    del raw["text_config"]["global_head_dim"], raw["text_config"]["num_global_key_value_heads"]
    text = ModelConfig.from_dict(raw).text
    assert (text.global_head_dim, text.num_global_key_value_heads) == (64, 2)
    assert text.final_logit_softcapping == 30.0  # transformers leaves it out: it has no type annotation there


def test_per_layer_config_that_omits_a_number_keeps_the_sliding_one() -> None:
    raw = config_dict(per_layer_config={"2": {"head_dim": 64}})
    text = ModelConfig.from_dict(raw).text
    assert (text.global_head_dim, text.num_global_key_value_heads) == (64, 2)


@pytest.mark.parametrize("per_layer", [{"0": {"head_dim": 64}}, {"2": {"sliding_window": 3}}, {"7": {"head_dim": 64}}])
def test_per_layer_config_elsewhere_is_an_error(per_layer: dict) -> None:
    with pytest.raises(ConfigError, match=r"per_layer_config\.\d: got .* expected"):
        ModelConfig.from_dict(config_dict(per_layer_config=per_layer))


def test_null_generation_keys_take_the_reference_defaults() -> None:
    config = GenerationConfig.from_dict(
        {"max_denoising_steps": None, "sampler_config": None, "t_min": None, "return_dict_in_generate": True},
        fallback_eos=(7,),
    )
    assert (config.max_denoising_steps, config.entropy_bound, config.t_min, config.t_max) == (48, 0.1, 0.4, 0.8)
    assert config.eos_token_ids == (7,)
    assert config.unknown_keys == ()


def test_unknown_keys_are_listed() -> None:
    raw = config_dict(brand_new=1)
    raw["surprise"] = 2
    assert ModelConfig.from_dict(raw).unknown_keys == ("surprise", "text_config.brand_new")
    assert GenerationConfig.from_dict({**GENERATION, "beam": 3}).unknown_keys == ("generation_config.beam",)


def test_unknown_keys_further_down_are_listed() -> None:
    raw = config_dict(VISION | {"rope_parameters": {"rope_type": "axial", "rope_theta": 100.0, "zzz": 1}})
    full = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "scale": 2}
    raw["text_config"]["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": full,
        "global": full,
    }
    assert ModelConfig.from_dict(raw).unknown_keys == (
        "text_config.rope_parameters.full_attention.scale",
        "text_config.rope_parameters.global",
        "vision_config.rope_parameters.zzz",
    )
    sampler = GENERATION["sampler_config"] | {"foo": 2}
    found = GenerationConfig.from_dict({**GENERATION, "sampler_config": sampler}).unknown_keys
    assert found == ("generation_config.sampler_config.foo",)


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("attention_k_eq_v", False, "True or nothing"),
        ("enable_moe_block", False, "True or nothing"),
        ("num_kv_shared_layers", 5, "0 or nothing"),
        ("hidden_size_per_layer_input", 256, "0 or nothing"),
        ("use_double_wide_mlp", True, "False or nothing"),
    ],
)
def test_another_architecture_is_refused(key: str, value: object, allowed: str) -> None:
    raw = config_dict()
    raw["text_config"][key] = value
    with pytest.raises(ConfigError, match=f"text_config.{key}: got {value!r}, expected {allowed}"):
        ModelConfig.from_dict(raw)
    raw["text_config"][key] = None
    assert ModelConfig.from_dict(raw).unknown_keys == ()


def test_scaled_positions_are_refused() -> None:
    raw = config_dict()
    raw["text_config"]["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "factor": 8.0},
    }
    with pytest.raises(ConfigError, match=r"full_attention\.factor: got 8\.0, expected 1 or nothing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize("key", ["image_token_id", "boi_token_id", "eoi_token_id"])
@pytest.mark.parametrize("value", ["x", -3, 1.5, True])
def test_token_ids_are_checked(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{key}: got {value!r}, expected an integer >= 0"):
        ModelConfig.from_dict(config_dict() | {key: value})
    with pytest.raises(ConfigError, match=f"pad_token_id: got {value!r}, expected an integer >= 0"):
        GenerationConfig.from_dict({**GENERATION, "pad_token_id": value})


WRONG_TEXT = [
    ("vocab_size", 0, "integer >= 1"),
    ("hidden_size", "64", "integer >= 1"),
    ("num_experts", True, "integer >= 1"),
    ("num_key_value_heads", 3, "divisor of 4"),
    ("head_dim", 15, "even"),
    ("top_k_experts", 5, "at most num_experts = 4"),
    ("layer_types", ["sliding_attention"], "3 entries"),
    ("layer_types", ["full_attention", "linear", "full_attention"], "one of"),
    ("layer_types", ["full_attention", "full_attention", "sliding_attention"], "full_attention"),
    ("hidden_activation", "relu", "gelu_pytorch_tanh"),
    ("attention_bias", True, "false"),
    ("tie_word_embeddings", False, "true"),
    ("use_bidirectional_attention", "all", "vision"),
    ("rms_norm_eps", 0, "> 0"),
    ("final_logit_softcapping", float("nan"), "> 0"),
    ("rope_parameters", {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, "object"),
    ("rope_parameters", 3, "object"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG_TEXT, ids=[f"{k}={v}" for k, v, _ in WRONG_TEXT])
def test_wrong_text_value_names_key_value_and_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_dict(config_dict(**{key: value}))
    assert key in str(error.value)
    assert "got" in str(error.value)
    assert allowed in str(error.value)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "sliding_window", "num_experts", "max_position_embeddings"]
)
def test_missing_number_names_the_key(key: str) -> None:
    raw = config_dict()
    del raw["text_config"][key]
    with pytest.raises(ConfigError, match=f"text_config.{key}: missing or null, expected a value"):
        ModelConfig.from_dict(raw)


def vision(**values: object) -> VisionConfig | None:
    return ModelConfig.from_dict(config_dict(VISION | values)).vision


def test_vision_config_in_three_dialects() -> None:
    """Google writes rotary type "default", transformers "axial"; what has a class default may be left out."""
    rope = {"rope_theta": 100.0}
    google = vision(rope_parameters=rope | {"rope_type": "default"}, global_head_dim=32, default_output_length=280)
    saved = vision(rope_parameters=rope | {"rope_type": "axial"}, initializer_range=0.02)
    assert google is not None and saved is not None
    assert google.rope_theta == saved.rope_theta == 100.0
    assert vision() == saved
    assert (saved.rms_norm_eps, saved.standardize, saved.use_clipped_linears) == (1e-6, False, False)
    assert ModelConfig.from_dict(config_dict()).vision is None
    assert ModelConfig.from_dict(config_dict() | {"vision_config": None}).vision is None


def test_unknown_vision_keys_are_listed() -> None:
    assert ModelConfig.from_dict(config_dict(VISION | {"depth": 3})).unknown_keys == ("vision_config.depth",)


WRONG_VISION = [
    ("hidden_size", 0, "integer >= 1"),
    ("num_hidden_layers", 1.5, "integer >= 1"),
    ("patch_size", "16", "integer >= 1"),
    ("pooling_kernel_size", 1, "integer >= 2"),
    ("num_key_value_heads", 3, "divisor of 2 heads"),
    ("head_dim", 30, "multiple of 4"),
    ("hidden_activation", "relu", "gelu_pytorch_tanh"),
    ("attention_bias", True, "false"),
    ("standardize", 1, "true or false"),
    ("use_clipped_linears", "yes", "true or false"),
    ("rms_norm_eps", 0, "> 0"),
    ("rope_parameters", 3, "an object"),
    ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0}, "one of ('default', 'axial')"),
    ("rope_parameters", {"rope_type": "axial"}, "> 0"),
    ("model_type", "siglip", "'gemma4_vision'"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), WRONG_VISION, ids=[f"{k}={v}" for k, v, _ in WRONG_VISION])
def test_wrong_vision_value_names_key_value_and_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as error:
        vision(**{key: value})
    message = str(error.value)
    assert f"vision_config.{key}" in message and "got" in message and allowed in message


@pytest.mark.parametrize("key", [key for key in VISION if key != "model_type"])
def test_missing_vision_size_names_the_key(key: str) -> None:
    with pytest.raises(ConfigError, match=f"vision_config.{key}: missing or null, expected a value"):
        vision(**{key: None})


def test_vision_config_that_is_no_object() -> None:
    with pytest.raises(ConfigError, match="vision_config: got 'big', expected an object or null"):
        ModelConfig.from_dict(config_dict() | {"vision_config": "big"})


def test_unknown_model_type() -> None:
    with pytest.raises(ConfigError, match="model_type: got 'gemma4', expected 'diffusion_gemma'"):
        ModelConfig.from_dict({**config_dict(), "model_type": "gemma4"})


WRONG_GENERATION = [
    ("max_new_tokens", 0), ("max_denoising_steps", -1), ("t_max", 0.1), ("t_min", -1.0),
    ("stability_threshold", 1.5), ("confidence_threshold", 0), ("sampler_config", {"entropy_bound": -0.1}),
    ("sampler_config", {"_cls_name": "Other"}), ("eos_token_id", [-1]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), WRONG_GENERATION, ids=[f"{k}={v}" for k, v in WRONG_GENERATION])
def test_wrong_generation_value(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=r"got .* expected"):
        GenerationConfig.from_dict({**copy.deepcopy(GENERATION), key: value})


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        load_configs(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_configs(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object"):
        load_configs(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    with pytest.raises(ConfigError, match=r"generation_config\.json is missing"):
        load_configs(tmp_path)
