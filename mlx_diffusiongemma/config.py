"""Read `config.json` and `generation_config.json` into frozen, checked dataclasses.

Three dialects are accepted: Google's original files, the MLX conversions (a `quantization` block and the generation
config folded into `config.json`) and what transformers 5.23 writes (`per_layer_config` in place of `global_head_dim`
and `num_global_key_value_heads`; keys without a type annotation, such as `final_logit_softcapping`, left out; rotary
type "axial" in place of "default" in the vision tower).

Reference: transformers `configuration_diffusion_gemma.py`, `Gemma4VisionConfig` and `DiffusionGemmaGenerationConfig`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, Protocol

MODEL_TYPE = "diffusion_gemma"
VISION_MODEL_TYPE = "gemma4_vision"
LAYER_TYPES = ("sliding_attention", "full_attention")
ACTIVATIONS = ("gelu_pytorch_tanh",)

# Values of the reference's config classes for keys that its own files leave out. Sizes are never defaulted.
TEXT_DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "final_logit_softcapping": 30.0,
    "attention_bias": False,
    "use_bidirectional_attention": None,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1_000_000.0, "partial_rotary_factor": 0.25},
    },
}
VISION_DEFAULTS: dict[str, Any] = {
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_clipped_linears": False,
    "standardize": False,
    "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0},
}
VISION_ROPE_TYPES = (
    "default",
    "axial",
)  # two names for one thing: Google's files have the first, transformers' the second
SLIDING_LAYERS_PER_FULL_LAYER = 5  # the reference's pattern when `layer_types` is absent
GLOBAL_HEAD_DIM = 512  # the reference's value when neither `global_head_dim` nor `per_layer_config` is there

# Keys without a meaning for inference, or whose value is implied by the model type.
TEXT_IGNORED = frozenset(
    "model_type dtype torch_dtype initializer_range attention_dropout pad_token_id eos_token_id bos_token_id "
    "use_cache vocab_size_per_layer_input global_head_dim num_global_key_value_heads per_layer_config "
    "transformers_version architectures return_dict output_attentions output_hidden_states chunk_size_feed_forward "
    "is_encoder_decoder id2label label2id problem_type _name_or_path".split()
)
# What other Gemma 4 models can be and this one is not: the only value that means this architecture.
TEXT_FIXED: dict[str, Any] = {
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "use_double_wide_mlp": False,
}
ROPE_KEYS = frozenset({"rope_type", "rope_theta", "partial_rotary_factor"})
VISION_IGNORED = frozenset(
    "model_type dtype torch_dtype initializer_range attention_dropout max_position_embeddings global_head_dim "
    "default_output_length transformers_version architectures return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type _name_or_path".split()
)
TOP_IGNORED = frozenset(
    "architectures dtype torch_dtype initializer_range transformers_version tie_word_embeddings audio_config "
    "audio_token_id boa_token_id eoa_token_id video_token_id return_dict "
    "output_attentions output_hidden_states chunk_size_feed_forward is_encoder_decoder id2label label2id "
    "problem_type _name_or_path pad_token_id bos_token_id mlx_diffusiongemma".split()
)

# `DiffusionGemmaGenerationConfig._get_default_generation_params`: what the reference uses for a key that is unset.
GENERATION_DEFAULTS: dict[str, Any] = {
    "max_new_tokens": 256,
    "max_denoising_steps": 48,
    "entropy_bound": 0.1,
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
}
GENERATION_IGNORED = frozenset(
    "transformers_version return_dict_in_generate cache_implementation cache_config disable_compile bos_token_id "
    "max_length _from_model_config _commit_hash do_sample".split()
)


MAX_INTEGER = 2**31 - 1  # what MLX takes as a size
MAX_STEPS = 10_000  # per canvas; the stop test may remember as many canvases
MAX_NUMBER = 3.4e38  # what float32 holds; NaN is not below it either


class ConfigError(ValueError):
    """A configuration value that is missing or outside what the model allows."""


def _fail(key: str, got: Any, allowed: str) -> NoReturn:
    raise ConfigError(f"{key}: got {got!r}, expected {allowed}")


def check_integer(key: str, value: Any, minimum: int, maximum: int = MAX_INTEGER) -> None:
    """Raise `ConfigError` unless `value` is an int (not a bool) from `minimum` to `maximum`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        _fail(key, value, f"an integer >= {minimum}")
    if value > maximum:
        _fail(key, value, f"an integer <= {maximum}")


def check_number(key: str, value: Any, minimum: float, *, exclusive: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a finite real number of at least (or above) `minimum`."""
    sign = ">" if exclusive else ">="
    wrong_type = isinstance(value, bool) or not isinstance(value, int | float)
    if wrong_type or not abs(value) <= MAX_NUMBER or value < minimum or (exclusive and value == minimum):
        _fail(key, value, f"a number {sign} {minimum:g}")


# The names of `SamplerNumbers`, as command lines and requests give them.
DIFFUSION_NUMBERS = (
    "max_denoising_steps",
    "entropy_bound",
    "t_min",
    "t_max",
    "confidence_threshold",
    "stability_threshold",
)


class SamplerNumbers(Protocol):
    """What the sampler and the stop test need, in a checkpoint's defaults and in one request's options alike."""

    @property
    def max_denoising_steps(self) -> int: ...
    @property
    def entropy_bound(self) -> float: ...
    @property
    def t_min(self) -> float: ...
    @property
    def t_max(self) -> float: ...
    @property
    def stability_threshold(self) -> int: ...
    @property
    def confidence_threshold(self) -> float: ...


def check_sampler(numbers: SamplerNumbers) -> None:
    """Raise `ConfigError` for a number outside what the sampler allows."""
    check_integer("max_denoising_steps", numbers.max_denoising_steps, 1, MAX_STEPS)
    check_number("entropy_bound", numbers.entropy_bound, 0, exclusive=True)
    check_number("t_min", numbers.t_min, 0)
    check_number("t_max", numbers.t_max, 0, exclusive=True)
    if numbers.t_max < numbers.t_min:
        _fail("t_max", numbers.t_max, f"at least t_min = {numbers.t_min}")
    check_integer("stability_threshold", numbers.stability_threshold, 0)
    check_number("confidence_threshold", numbers.confidence_threshold, 0, exclusive=True)


@dataclass(frozen=True)
class AttentionShape:
    """What differs between sliding and full layers: head size, key/value heads and rotary embedding."""

    head_dim: int
    num_key_value_heads: int
    rope_theta: float
    rotated_dims: int  # dims that rotate, in pairs (i, i + head_dim / 2); the pairs after them have frequency 0


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the stack of layers that encoder and decoder share. No architecture number has a default."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k_experts: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    global_head_dim: int
    num_global_key_value_heads: int
    sliding_window: int
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    rope_parameters: Mapping[str, Mapping[str, Any]]
    rms_norm_eps: float
    final_logit_softcapping: float
    hidden_activation: str
    attention_bias: bool
    use_bidirectional_attention: str | None
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        sizes = [field.name for field in fields(self) if field.type == "int"]  # annotations are strings in this file
        for name in sizes:
            check_integer(f"text_config.{name}", getattr(self, name), 1)
        check_number("text_config.rms_norm_eps", self.rms_norm_eps, 0, exclusive=True)
        check_number("text_config.final_logit_softcapping", self.final_logit_softcapping, 0, exclusive=True)
        self._check_heads()
        self._check_layers()
        self._check_choices()

    def _check_heads(self) -> None:
        for name in ("num_key_value_heads", "num_global_key_value_heads"):
            if self.num_attention_heads % getattr(self, name):
                _fail(f"text_config.{name}", getattr(self, name), f"a divisor of {self.num_attention_heads} heads")
        for name in ("head_dim", "global_head_dim"):
            if getattr(self, name) % 2:
                _fail(f"text_config.{name}", getattr(self, name), "an even number (rotary pairs)")
        if self.top_k_experts > self.num_experts:
            _fail("text_config.top_k_experts", self.top_k_experts, f"at most num_experts = {self.num_experts}")

    def _check_layers(self) -> None:
        if len(self.layer_types) != self.num_hidden_layers:
            _fail("text_config.layer_types", list(self.layer_types), f"{self.num_hidden_layers} entries")
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                _fail(f"text_config.layer_types[{index}]", kind, f"one of {LAYER_TYPES}")
        if self.layer_types[-1] != "full_attention":  # Oracle: the reference turns any other last layer into this one
            _fail("text_config.layer_types[-1]", self.layer_types[-1], "'full_attention'")
        for kind in set(self.layer_types):
            self.attention_shape(kind)

    def _check_choices(self) -> None:
        if self.hidden_activation not in ACTIVATIONS:
            _fail("text_config.hidden_activation", self.hidden_activation, f"one of {ACTIVATIONS}")
        if self.attention_bias is not False:
            _fail("text_config.attention_bias", self.attention_bias, "false")
        if self.tie_word_embeddings is not True:
            _fail("text_config.tie_word_embeddings", self.tie_word_embeddings, "true (the head is the embedding)")
        if self.use_bidirectional_attention not in (None, "vision"):
            _fail("text_config.use_bidirectional_attention", self.use_bidirectional_attention, "'vision' or null")

    def attention_shape(self, layer_type: str) -> AttentionShape:
        """Return head sizes and rotary settings of a kind of layer. Raise `ConfigError` for an unknown rotary kind."""
        full = layer_type == "full_attention"
        head_dim = self.global_head_dim if full else self.head_dim
        rope = self.rope_parameters.get(layer_type)
        if not isinstance(rope, Mapping):
            _fail(f"text_config.rope_parameters.{layer_type}", rope, "an object with rope_type and rope_theta")
        key = f"text_config.rope_parameters.{layer_type}"
        check_number(f"{key}.rope_theta", rope.get("rope_theta"), 0, exclusive=True)
        if rope.get("factor", 1.0) != 1.0:
            _fail(f"{key}.factor", rope["factor"], "1 or nothing: positions are not scaled")
        rope_type, partial = rope.get("rope_type"), rope.get("partial_rotary_factor", 1.0)
        if rope_type not in ("default", "proportional") or (rope_type == "default" and partial != 1.0):
            _fail(key, dict(rope), "rope_type 'default' with all dims rotated, or 'proportional'")
        check_number(f"{key}.partial_rotary_factor", partial, 0, exclusive=True)
        if partial > 1:
            _fail(f"{key}.partial_rotary_factor", partial, "a factor in (0, 1]")
        # Oracle: the number of rotated pairs is floored, `int(partial * head_dim // 2)`.
        rotated_dims = 2 * int(partial * head_dim // 2)
        if rotated_dims == 0:
            _fail(f"{key}.partial_rotary_factor", partial, f"a factor that rotates a pair of the {head_dim} dims")
        kv_heads = self.num_global_key_value_heads if full else self.num_key_value_heads
        return AttentionShape(head_dim, kv_heads, float(rope["rope_theta"]), rotated_dims)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower. No size has a default."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int  # a soft token is the mean of this many patches squared
    position_embedding_size: int  # rows of each of the two position tables
    rope_parameters: Mapping[str, Any]
    rms_norm_eps: float
    hidden_activation: str
    attention_bias: bool
    use_clipped_linears: bool
    standardize: bool

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                check_integer(f"vision_config.{field.name}", getattr(self, field.name), 1)
        # Oracle: at 1 the reference mixes up padding and patches and returns no soft tokens.
        check_integer("vision_config.pooling_kernel_size", self.pooling_kernel_size, 2)
        check_number("vision_config.rms_norm_eps", self.rms_norm_eps, 0, exclusive=True)
        if self.num_attention_heads % self.num_key_value_heads:
            allowed = f"a divisor of {self.num_attention_heads} heads"
            _fail("vision_config.num_key_value_heads", self.num_key_value_heads, allowed)
        if self.head_dim % 4:
            _fail("vision_config.head_dim", self.head_dim, "a multiple of 4 (rotary pairs of columns and of rows)")
        if self.hidden_activation not in ACTIVATIONS:
            _fail("vision_config.hidden_activation", self.hidden_activation, f"one of {ACTIVATIONS}")
        if self.attention_bias is not False:
            _fail("vision_config.attention_bias", self.attention_bias, "false")
        for name in ("use_clipped_linears", "standardize"):
            if not isinstance(getattr(self, name), bool):
                _fail(f"vision_config.{name}", getattr(self, name), "true or false")
        self._check_rope()

    def _check_rope(self) -> None:
        key, rope = "vision_config.rope_parameters", self.rope_parameters
        if not isinstance(rope, Mapping):
            _fail(key, rope, "an object with rope_type and rope_theta")
        if rope.get("rope_type") not in VISION_ROPE_TYPES:
            _fail(f"{key}.rope_type", rope.get("rope_type"), f"one of {VISION_ROPE_TYPES}")
        check_number(f"{key}.rope_theta", rope.get("rope_theta"), 0, exclusive=True)

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return float(self.rope_parameters["rope_theta"])

    @property
    def patches_per_token(self) -> int:
        """How many patches make one soft token."""
        return self.pooling_kernel_size**2


@dataclass(frozen=True)
class ModelConfig:
    """`config.json`: the text stack, the vision tower, the canvas length, and what the file says beside them."""

    text: TextConfig
    canvas_length: int
    eos_token_ids: tuple[int, ...]
    image_token_id: int | None
    boi_token_id: int | None
    eoi_token_id: int | None
    vision: VisionConfig | None  # None: a model that cannot see
    vision_soft_tokens_per_image: int | None  # at most; None: the reference's default
    quantization: Mapping[str, Any] | None
    generation: Mapping[str, Any] | None  # a generation config folded into config.json by an MLX conversion
    unknown_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("canvas_length", self.canvas_length, 1, self.text.max_position_embeddings - 1)
        for name in ("image_token_id", "boi_token_id", "eoi_token_id"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 0)
        if self.vision_soft_tokens_per_image is not None:
            check_integer("vision_soft_tokens_per_image", self.vision_soft_tokens_per_image, 1)
        for name in ("quantization", "generation"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Mapping):
                _fail(f"{name} config", value, "an object")

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Build from the parsed `config.json`. Raise `ConfigError` naming key, value and what is allowed."""
        if raw.get("model_type") != MODEL_TYPE:
            _fail("model_type", raw.get("model_type"), repr(MODEL_TYPE))
        text = raw.get("text_config")
        if not isinstance(text, Mapping):
            _fail("text_config", text, "an object")
        if raw.get("tie_word_embeddings", True) is not True:
            _fail("tie_word_embeddings", raw["tie_word_embeddings"], "true (the head is the embedding)")
        known = TOP_IGNORED | set(
            "model_type text_config vision_config canvas_length eos_token_id image_token_id boi_token_id eoi_token_id "
            "quantization quantization_config generation_config vision_soft_tokens_per_image".split()
        )
        text_config, unknown_text = _text_config(text)
        vision_config, unknown_vision = _vision_config(raw.get("vision_config"))
        eos = raw["eos_token_id"] if raw.get("eos_token_id") is not None else text.get("eos_token_id")
        return cls(
            text=text_config,
            canvas_length=_required(raw, "canvas_length", ""),
            eos_token_ids=_token_ids("eos_token_id", eos),
            image_token_id=raw.get("image_token_id"),
            boi_token_id=raw.get("boi_token_id"),
            eoi_token_id=raw.get("eoi_token_id"),
            vision=vision_config,
            vision_soft_tokens_per_image=raw.get("vision_soft_tokens_per_image"),
            quantization=raw.get("quantization", raw.get("quantization_config")),
            generation=raw.get("generation_config"),
            unknown_keys=tuple(sorted(set(raw) - known)) + unknown_text + unknown_vision,
        )


def _required(raw: Mapping[str, Any], key: str, prefix: str) -> Any:
    if raw.get(key) is None:
        raise ConfigError(f"{prefix}{key}: missing or null, expected a value")
    return raw[key]


def _text_config(raw: Mapping[str, Any]) -> tuple[TextConfig, tuple[str, ...]]:
    """Return the text config and the names of the keys in `raw` that nobody reads."""
    values: dict[str, Any] = {}
    for field in fields(TextConfig):
        name = field.name
        if name in ("layer_types", "global_head_dim", "num_global_key_value_heads"):
            continue
        if name in TEXT_DEFAULTS:
            values[name] = raw[name] if raw.get(name) is not None else TEXT_DEFAULTS[name]
        else:
            values[name] = _required(raw, name, "text_config.")
    check_integer("text_config.num_hidden_layers", values["num_hidden_layers"], 1)
    layer_types = raw.get("layer_types")
    if layer_types is None:
        layer_types = _default_layer_types(values["num_hidden_layers"])
    if not isinstance(layer_types, list):
        _fail("text_config.layer_types", layer_types, "a list")
    values["layer_types"] = tuple(layer_types)
    values["global_head_dim"], values["num_global_key_value_heads"] = _full_layer_heads(raw, values)
    if not isinstance(values["rope_parameters"], Mapping):
        _fail("text_config.rope_parameters", values["rope_parameters"], "an object")
    for name, only in TEXT_FIXED.items():
        if raw.get(name) is not None and raw[name] != only:
            _fail(f"text_config.{name}", raw[name], f"{only!r} or nothing in this architecture")
    config = TextConfig(**values)
    known = TEXT_IGNORED | TEXT_FIXED.keys() | {field.name for field in fields(TextConfig)}
    unknown = _unknown(raw, known, "text_config")
    for kind, rope in config.rope_parameters.items():
        where = f"text_config.rope_parameters.{kind}"
        unknown += _unknown(rope, ROPE_KEYS | {"factor"}, where) if kind in LAYER_TYPES else (where,)
    return config, unknown


def _unknown(raw: Mapping[str, Any], known: Set[str], where: str) -> tuple[str, ...]:
    """Return the keys that nobody reads, with where they stand."""
    return tuple(f"{where}.{key}" for key in sorted(raw.keys() - known))


def _vision_config(raw: Mapping[str, Any] | None) -> tuple[VisionConfig | None, tuple[str, ...]]:
    """Return the vision config, None without one, and the names of the keys in `raw` that nobody reads."""
    if raw is None:
        return None, ()
    if not isinstance(raw, Mapping):
        _fail("vision_config", raw, "an object or null")
    if raw.get("model_type", VISION_MODEL_TYPE) != VISION_MODEL_TYPE:
        _fail("vision_config.model_type", raw["model_type"], repr(VISION_MODEL_TYPE))
    values: dict[str, Any] = {}
    for field in fields(VisionConfig):
        name = field.name
        if name in VISION_DEFAULTS:
            values[name] = raw[name] if raw.get(name) is not None else VISION_DEFAULTS[name]
        else:
            values[name] = _required(raw, name, "vision_config.")
    config = VisionConfig(**values)
    unknown = _unknown(raw, VISION_IGNORED | values.keys(), "vision_config")
    return config, unknown + _unknown(config.rope_parameters, ROPE_KEYS, "vision_config.rope_parameters")


def _default_layer_types(num_hidden_layers: int) -> list[str]:
    period = SLIDING_LAYERS_PER_FULL_LAYER + 1
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(num_hidden_layers)]
    return [*kinds[:-1], "full_attention"]  # Oracle: the last layer is always full


def _full_layer_heads(raw: Mapping[str, Any], values: Mapping[str, Any]) -> tuple[int, int]:
    """Return (head size, key/value heads) of full layers from either spelling.

    Raises:
        ConfigError: an override on a layer that is not full attention, or full layers that disagree.
    """
    per_layer = raw.get("per_layer_config")
    if per_layer is None:
        heads = raw.get("num_global_key_value_heads")
        head_dim = raw.get("global_head_dim")
        return (
            GLOBAL_HEAD_DIM if head_dim is None else head_dim,
            values["num_key_value_heads"] if heads is None else heads,
        )
    if not isinstance(per_layer, Mapping):
        _fail("text_config.per_layer_config", per_layer, "an object")
    full = [str(i) for i, kind in enumerate(values["layer_types"]) if kind == "full_attention"]
    allowed = {"head_dim", "num_key_value_heads"}
    for index, override in per_layer.items():  # transformers writes the layer numbers as strings
        if index not in full or not isinstance(override, Mapping) or set(override) - allowed:
            _fail(f"text_config.per_layer_config.{index}", override, "head_dim / num_key_value_heads of full layers")
    sizes = {"head_dim": values["head_dim"], "num_key_value_heads": values["num_key_value_heads"]}
    found = [{**sizes, **per_layer.get(index, {})} for index in full]
    if any(one != found[0] for one in found):
        _fail("text_config.per_layer_config", dict(per_layer), "the same override for every full-attention layer")
    first = found[0] if found else sizes
    return first["head_dim"], first["num_key_value_heads"]


def _token_ids(key: str, value: Any) -> tuple[int, ...]:
    """Return an id or a list of ids as a tuple; None gives ()."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token_id in ids:
        check_integer(key, token_id, 0)
    return tuple(dict.fromkeys(ids))


@dataclass(frozen=True)
class GenerationConfig:
    """`generation_config.json`: the one home of every default; a key left out has the reference's class default."""

    max_new_tokens: int
    max_denoising_steps: int
    entropy_bound: float
    t_min: float
    t_max: float
    stability_threshold: int
    confidence_threshold: float
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    unknown_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_sampler(self)
        if self.pad_token_id is not None:
            check_integer("pad_token_id", self.pad_token_id, 0)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], fallback_eos: tuple[int, ...] = ()) -> GenerationConfig:
        """Build from the parsed file. Keys that are null take the reference's class defaults, as the reference does.

        Args:
            raw: parsed `generation_config.json`.
            fallback_eos: end tokens of `config.json`, used when the file names none.

        Raises:
            ConfigError: a value outside its range, or another sampler than the entropy-bound one.
        """
        sampler = raw.get("sampler_config") or {}
        if not isinstance(sampler, Mapping):
            _fail("sampler_config", sampler, "an object")
        if sampler.get("_cls_name", "EntropyBoundSamplerConfig") != "EntropyBoundSamplerConfig":
            _fail("sampler_config._cls_name", sampler["_cls_name"], "'EntropyBoundSamplerConfig'")
        flat = {**raw, "entropy_bound": sampler.get("entropy_bound")}
        values = {
            key: flat[key] if flat.get(key) is not None else default for key, default in GENERATION_DEFAULTS.items()
        }
        eos = _token_ids("eos_token_id", raw.get("eos_token_id")) or fallback_eos
        known = GENERATION_IGNORED | set(GENERATION_DEFAULTS) | {"sampler_config", "eos_token_id", "pad_token_id"}
        unknown = _unknown(raw, known, "generation_config")
        unknown += _unknown(sampler, {"_cls_name", "entropy_bound"}, "generation_config.sampler_config")
        return cls(**values, eos_token_ids=eos, pad_token_id=raw.get("pad_token_id"), unknown_keys=unknown)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raise `ConfigError` with the path when the file is missing, not JSON, or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        _fail(str(path), type(value).__name__, "a JSON object")
    return value


def _processor_settings(folder: Path) -> dict[str, Any]:
    """Return what the reference's image processor reads from its own files and not from `config.json`."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            raw = read_json(folder / name)
            settings = raw.get("image_processor", raw)
            if isinstance(settings, Mapping) and settings.get("max_soft_tokens") is not None:
                return {"vision_soft_tokens_per_image": settings["max_soft_tokens"]}
    return {}


def load_configs(folder: Path) -> tuple[ModelConfig, GenerationConfig]:
    """Read the files of a checkpoint folder; a generation config inside `config.json` serves when its own is absent.

    Raises:
        ConfigError: a file is missing or a value is wrong.
    """
    raw_config = read_json(folder / "config.json")
    config = ModelConfig.from_dict(raw_config | _processor_settings(folder))
    path = folder / "generation_config.json"
    raw = config.generation if config.generation is not None and not path.exists() else read_json(path)
    generation = GenerationConfig.from_dict(raw, fallback_eos=config.eos_token_ids)
    for token_id in generation.eos_token_ids:
        check_integer("eos_token_id", token_id, 0, config.text.vocab_size - 1)
    return config, generation
