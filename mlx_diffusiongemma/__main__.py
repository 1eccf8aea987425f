"""`python -m mlx_diffusiongemma SUB-COMMAND ...`, also installed as `mlx_diffusiongemma`.

Each sub-command is a module of this package with `main(argv)`; only the one that is named is imported.
"""

import importlib
import sys
from collections.abc import Sequence

from . import __version__

SUBCOMMANDS = {
    "benchmark": "measure speed: phases, steps per canvas, roofline, beside mlx-vlm",
    "convert": "convert and quantise a checkpoint",
    "evaluate": "measure a checkpoint, alone or against another one",
    "generate": "generate text from a prompt, or chat in the terminal",
    "server": "serve a model over HTTP",
}


def usage() -> str:
    """Return the text of `-h`."""
    lines = [f"  {name:<10} {gloss}" for name, gloss in SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: mlx_diffusiongemma SUB-COMMAND [options]",
            "",
            *lines,
            "",
            "options: -h, --help   --version",
            "mlx_diffusiongemma SUB-COMMAND --help lists the options of a sub-command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command named first in argv; return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else None
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(__version__)
        return 0
    if name not in SUBCOMMANDS:
        got = "no sub-command" if name is None else f"unknown sub-command {name!r}"
        print(f"error: {got}, expected one of: {', '.join(SUBCOMMANDS)} (see --help)", file=sys.stderr)
        return 2
    exit_code: int = importlib.import_module(f"{__package__}.{name}").main(arguments[1:])
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
