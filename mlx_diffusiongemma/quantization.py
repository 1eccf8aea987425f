"""What a checkpoint says is quantised, and how.

The `quantization` block of an MLX conversion holds a default (`group_size`, `bits`, `mode`) and overrides by module
path. An override without `mode` means affine whatever the default mode is, and `false` means not quantised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.nn as nn

from .config import ConfigError

MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
Predicate = Callable[[str, nn.Module], bool | dict[str, Any]]


def _settings(path: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    mode = raw.get("mode", "affine")
    if mode not in MODES:
        raise ConfigError(f"quantization {path}: mode is {mode!r}, expected one of {MODES}")
    for key in ("group_size", "bits"):
        if isinstance(raw.get(key), bool) or not isinstance(raw.get(key), int):
            raise ConfigError(f"quantization {path}: {key} is {raw.get(key)!r}, expected an integer")
    return {"group_size": raw["group_size"], "bits": raw["bits"], "mode": mode}


def quantization_predicate(quantization: Mapping[str, Any], tensor_names: set[str]) -> Predicate:
    """Return the `class_predicate` for `mlx.nn.quantize`.

    Args:
        quantization: the block of `config.json`.
        tensor_names: names after the weight map; a module is quantised when its `.scales` are there.

    Raises:
        ConfigError: from the predicate, for a module whose tensors and whose entry in the block disagree.
    """
    default = _settings("default", quantization)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        has_scales = f"{path}.scales" in tensor_names
        override = quantization.get(path)
        if override is False and has_scales:
            raise ConfigError(f"quantization {path}: the block says false but the checkpoint has {path}.scales")
        if isinstance(override, Mapping) and not has_scales:
            raise ConfigError(f"quantization {path}: the block says {dict(override)} but {path}.scales is missing")
        if not has_scales:
            return False
        return _settings(path, override) if isinstance(override, Mapping) else default

    return predicate
