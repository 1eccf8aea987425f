"""Google's block-diffusion language model DiffusionGemma on MLX.

    from mlx_diffusiongemma import load

    pipeline = load("tiny")
    print(pipeline.generate("What is 17 + 25?").text)

Importing the package imports nothing heavy: `load` is fetched from `pipeline.py` when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import load

__all__ = ["__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `load` on first use (PEP 562)."""
    if name == "load":
        from .pipeline import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
