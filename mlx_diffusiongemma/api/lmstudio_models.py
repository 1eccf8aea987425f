"""What LM Studio's REST API says about a model, from its files and from what the engine holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .catalog import ModelEntry
from .errors import refuse


def model_v0(entry: ModelEntry, *, is_loaded: bool) -> dict[str, Any]:
    """Return a model as `/api/v0/models` lists it. Zed's parser wants every field up to `state`."""
    config = entry.config()
    context = context_length(config)
    model: dict[str, Any] = {
        "id": entry.id,
        "object": "model",
        "type": "vlm" if has_vision(config) else "llm",
        "publisher": entry.publisher,
        "arch": architecture(config),
        "compatibility_type": "mlx",
        "quantization": quantization_name(config),
        "state": "loaded" if is_loaded else "not-loaded",
        "max_context_length": context,
        "capabilities": ["tool_use", "vision"] if has_vision(config) else ["tool_use"],
    }
    return model | ({"loaded_context_length": context} if is_loaded else {})


def model_v1(entry: ModelEntry, *, is_loaded: bool, parallel: int, thinks_by_default: bool) -> dict[str, Any]:
    """Return a model as `/api/v1/models` lists it; `parallel` is how many requests share it."""
    config = entry.config()
    context = context_length(config)
    bits = _quantization(config).get("bits")
    instance = {"id": entry.id, "config": {"context_length": context, "parallel": parallel}}
    return {
        "type": "llm",
        "publisher": entry.publisher,
        "key": entry.id,
        "display_name": entry.id.rsplit("/", 1)[-1],
        "architecture": architecture(config),
        "quantization": {"name": quantization_name(config), "bits_per_weight": bits},
        "size_bytes": entry.nbytes(),
        "params_string": None,
        "loaded_instances": [instance] if is_loaded else [],
        "max_context_length": context,
        "format": "mlx",
        "capabilities": {
            "vision": has_vision(config),
            "trained_for_tool_use": True,
            "reasoning": {"allowed_options": ["off", "on"], "default": "on" if thinks_by_default else "off"},
        },
        "description": None,
    }


def architecture(config: Mapping[str, Any]) -> str | None:
    """Return the type of a model."""
    return config.get("model_type")


def has_vision(config: Mapping[str, Any]) -> bool:
    """Tell whether a model can see."""
    return bool(config.get("vision_config"))


def context_length(config: Mapping[str, Any]) -> int:
    """Return the tokens that prompt and answer may have together; 0 where the files are not here."""
    return int((config.get("text_config") or {}).get("max_position_embeddings", 0))


def check_context_length(wanted: int | None, context: int) -> None:
    """Raise `ApiError` for a context that the model does not have; 0 for a model whose context is not known."""
    if wanted is not None and not 1 <= wanted <= (context or wanted):
        raise refuse("context_length", f"got {wanted}, expected 1 to {context}")


def quantization_name(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation as LM Studio writes it, such as 4bit; the type of the weights without one."""
    bits = _quantization(config).get("bits")
    return f"{bits}bit" if bits else config.get("dtype") or config.get("torch_dtype")


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return config.get("quantization") or config.get("quantization_config") or {}
