"""What a checkpoint says is quantised, and how.

The `quantization` block of an MLX conversion holds a default (`group_size`, `bits`, `mode`) and overrides by module
path. An override without `mode` means affine whatever the default mode is, `false` means not quantised and `true` as
the default. Which modules are quantised, the tensors say; that the numbers fit them, `weights.check_tensors` checks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

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


def quantization_predicate(
    quantization: Mapping[str, Any], tensor_names: set[str], module_path: Callable[[str], str | None] = str
) -> Predicate:
    """Return the `class_predicate` for `mlx.nn.quantize`.

    Args:
        quantization: the block of `config.json`.
        tensor_names: names after the weight map; a module is quantised when its `.scales` are there.
        module_path: from a path in the block to the model's module, None for a module that is not read.

    Raises:
        ConfigError: a wrong block; and from the predicate, for a module whose tensors and whose override disagree.
    """
    default, overrides = read_block(quantization, module_path)

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        has_scales = f"{path}.scales" in tensor_names
        override = overrides.get(path)
        if override is False and has_scales:
            raise ConfigError(f"quantization {path}: the block says false but the checkpoint has {path}.scales")
        if override and not has_scales:
            raise ConfigError(f"quantization {path}: the block says {override} but {path}.scales is missing")
        return (override or default) if has_scales else False

    return predicate


def read_block(
    quantization: Mapping[str, Any], module_path: Callable[[str], str | None] = str
) -> tuple[dict[str, Any], dict[str, dict[str, Any] | Literal[False]]]:
    """Return the default settings, and those of every module that the block names; False means left as it is.

    Args:
        quantization: the block of `config.json`.
        module_path: from a path in the block to the model's module, None for a module that is not read.

    Raises:
        ConfigError: a mode that MLX lacks, a missing number, or two entries for one module that disagree.
    """
    default = _settings("default", quantization)
    overrides: dict[str, dict[str, Any] | Literal[False]] = {}
    for key, entry in quantization.items():
        path = module_path(key) if isinstance(entry, Mapping | bool) else None
        if path is None:
            continue
        settings: dict[str, Any] | Literal[False] = default if entry else False
        if isinstance(entry, Mapping):
            settings = _settings(key, entry)
        if overrides.setdefault(path, settings) != settings:  # experts that are stored in pieces
            rest = f"{overrides[path]} as for the rest of {path}"
            raise ConfigError(f"quantization {key}: got {settings}, expected {rest}")
    return default, overrides
