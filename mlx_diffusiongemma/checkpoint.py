"""From a name to a model that is ready to run: find the folder, read the configs, load the weights.

Conversion and quantisation are elsewhere; this loads what they, Google, or another MLX conversion wrote.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .config import GenerationConfig, ModelConfig, load_configs
from .memory import check_load
from .model import DiffusionGemma, unfilled_model
from .ranks import Ranks
from .sharding import Division, load_part
from .tokenizer import Tokenizer
from .weights import (
    DroppedTensor,
    fill_encoder_scalars,
    read_tensors,
    settle_vision,
)

TINY = "tiny"
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", "NOTICE*"]


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or loaded; the message is one line."""


@dataclass(frozen=True)
class LoadReport:
    """What loading took, and what it left out on purpose."""

    dropped: tuple[DroppedTensor, ...]
    seconds: float
    nbytes: int  # of the parameters

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready values."""
        return {"seconds": self.seconds, "bytes": self.nbytes, "dropped": [tensor._asdict() for tensor in self.dropped]}


@dataclass(frozen=True)
class Checkpoint:
    """Everything that a folder holds."""

    path: Path
    model: DiffusionGemma  # its `vision` is None where the folder has no vision tower
    tokenizer: Tokenizer
    config: ModelConfig  # the model's, so `vision` is None there too, whatever config.json says
    generation_config: GenerationConfig
    report: LoadReport | None = None  # None for one that was not loaded


def find_folder(model: str | Path, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a checkpoint.

    Args:
        model: "tiny" for the bundled model, a folder, or a Hub id ("owner/name").
        revision: branch, tag or commit, for a Hub id.
        weights: False leaves gigabytes on the Hub: what the configs and `hub_tensors` say is enough.

    Raises:
        CheckpointError: no such folder, or the Hub id is neither cached nor reachable.
    """
    if not str(model):
        raise CheckpointError("model: got an empty name, expected a folder, a Hub id (owner/name) or 'tiny'")
    try:
        folder = Path(__file__).parent / TINY if str(model) == TINY else Path(model).expanduser()
    except (TypeError, RuntimeError) as error:  # not a path at all, or the home of an unknown user
        raise CheckpointError(f"model {model!r}: {error}; expected a folder, a Hub id (owner/name) or 'tiny'") from None
    if folder.is_dir():
        if revision is not None:
            problem = f"revision: got {revision!r} for {str(model)!r}"
            raise CheckpointError(f"{problem}, expected none: only a Hub id has revisions")
        return folder
    looks_like_a_path = isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1
    if folder.exists() or looks_like_a_path:
        raise CheckpointError(
            f"model {str(model)!r} is not a folder; expected a folder, a Hub id (owner/name) or 'tiny'"
        )
    return _download(str(model), revision, weights)


def _download(repo_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in HUB_FILES if weights or not pattern.endswith(".safetensors")]
    with _hub_errors(repo_id, revision):
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))


def hub_tensors(repo_id: str, revision: str | None = None) -> dict[str, tuple[str, str, tuple[int, ...]]]:
    """Read the headers of a repository's safetensors files, nothing else.

    Returns:
        by tensor name: the file, the dtype as safetensors names it, the shape.

    Raises:
        CheckpointError: the Hub cannot be reached or has no such repository, or it has no safetensors files.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        with _hub_errors(repo_id, revision):
            files = HfApi().get_safetensors_metadata(repo_id, revision=revision).files_metadata
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise CheckpointError(f"model {repo_id!r} has no readable safetensors files: {_first_line(error)}") from None
    return {
        name: (file, tensor.dtype, tuple(tensor.shape))
        for file, header in files.items()
        for name, tensor in header.tensors.items()
    }


@contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's errors into `CheckpointError`."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    instead = "pass --model with a local folder, or --model tiny for the bundled model"
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(f"model {repo_id!r} is not a valid Hub id: {_first_line(error)}") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"model {repo_id!r} has no revision {revision!r} on the Hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(
            f"model {repo_id!r} is not on the Hub, or needs a login (hf auth login); {instead}"
        ) from None
    except LocalEntryNotFoundError:
        problem = "is not in the local cache and the Hub cannot be reached"
        raise CheckpointError(f"model {repo_id!r} {problem}; connect to the network once, or {instead}") from None
    except (HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"model {repo_id!r} could not be downloaded: {_first_line(error)}; {instead}") from None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def load_checkpoint(
    model: str | Path,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    dtype: str | None = None,
    memory_limit: float | None = None,
    ranks: Ranks | None = None,
) -> Checkpoint:
    """Load model, tokenizer and configs.

    Args:
        model: "tiny", a folder, or a Hub id.
        revision: branch, tag or commit, for a Hub id.
        adapter_path: folder of a LoRA adapter in mlx-lm's format.
        dtype: "float32", "bfloat16" or "float16"; None for that of the checkpoint's norms, and float32 for
            unquantised experts on the CPU back end, whose grouped matmul takes nothing else.
        memory_limit: GB (10^9 bytes) that weights and requests may take; None for what the machine has.
        ranks: that share the model, this process being one of them: it loads its own part. None for a whole model.

    Raises:
        CheckpointError: with one line that says what is wrong and what is expected.
        MemoryLimitError: weights and the shortest request do not fit; nothing was read then but headers.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
    if ranks is not None and adapter_path is not None:
        raise CheckpointError(f"adapter_path: got {str(adapter_path)!r} on {ranks.size} ranks, expected none")
    folder = find_folder(model, revision)
    start = time.perf_counter()
    try:
        config, generation_config = load_configs(folder)
        tokenizer = Tokenizer.load(folder)
        if tokenizer.largest_id >= config.text.vocab_size:
            problem = f"the tokenizer has id {tokenizer.largest_id}"
            raise CheckpointError(f"{problem}, expected ids below vocab_size = {config.text.vocab_size}")
        if ranks is not None:
            network, dropped = _open_part(folder, config, dtype, memory_limit, ranks)
        else:
            network, dropped = _open_model(folder, config, dtype)
        if adapter_path is not None:
            _load_adapter(network, Path(adapter_path))
    except ValueError as error:
        raise CheckpointError(f"cannot load {folder}: {error}") from None
    nbytes = parameter_bytes(network)
    check_load(network.config, nbytes, network.dtype.size, memory_limit)
    mx.eval(network.parameters())  # read the files now: an error belongs here, and lazy arrays are bound to this thread
    report = LoadReport(dropped, time.perf_counter() - start, nbytes)
    for unknown in config.unknown_keys + generation_config.unknown_keys:
        warnings.warn(f"{folder.name}: key {unknown} is not known and was not used", stacklevel=2)
    return Checkpoint(folder, network, tokenizer, network.config, generation_config, report)


def parameter_bytes(model: DiffusionGemma) -> int:
    """Return the bytes of the parameters, whether they have been read or not."""
    return sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())


def load_model(folder: Path, config: ModelConfig, dtype: str | None = None) -> DiffusionGemma:
    """Build the network and fill every parameter. Raise `WeightsError` or `ConfigError` when that is not possible."""
    return _open_model(folder, config, dtype)[0]


def _open_model(
    folder: Path, config: ModelConfig, dtype: str | None
) -> tuple[DiffusionGemma, tuple[DroppedTensor, ...]]:
    """Build the network on lazy arrays; also return what was dropped.

    Only the network refers to the arrays afterwards, so that evaluating it frees what was cast or joined.
    """
    tensors, dropped = read_tensors(folder)
    fill_encoder_scalars(tensors, config.text.num_hidden_layers)
    config, unused = settle_vision(tensors, config)
    model = unfilled_model(config, tensors)
    model.load_weights(list(_cast(tensors, dtype).items()))
    model.join_projections()
    model.eval()
    return model, (*dropped, *unused)


def _open_part(
    folder: Path, config: ModelConfig, dtype: str | None, memory_limit: float | None, ranks: Ranks
) -> tuple[DiffusionGemma, tuple[DroppedTensor, ...]]:
    """Build the network on this rank's part of the weights, once it is known to fit; also return what was dropped."""
    division = Division(folder, config, ranks.size, ranks.rank)
    check_load(division.config, division.nbytes, 2, memory_limit)
    return load_part(division, ranks, partial(_cast, dtype=dtype)), division.dropped


def _cast(tensors: dict[str, mx.array], dtype: str | None) -> dict[str, mx.array]:
    """Cast the floating tensors to one dtype; packed weights stay as they are.

    Some conversions keep parts in float16 beside bfloat16, and the two together would compute in float32. A bfloat16
    weight that was stored as float16 comes back as it was (from 2**-17 up). Raise `ValueError` for what MLX's CPU back
    end cannot run.
    """
    floats = set(DTYPES.values())
    weights = (array for name, array in tensors.items() if name.endswith(".weight"))
    plain_experts = any(array.ndim == 3 and array.dtype in floats for array in weights)
    float32_only = plain_experts and mx.default_device() == mx.Device(mx.cpu)
    if float32_only and dtype not in (None, "float32"):
        raise ValueError(f"dtype {dtype!r}: expected float32, unquantised experts run in nothing else on MLX's CPU")
    own = mx.float32 if float32_only else tensors["model.decoder.norm.weight"].dtype
    target = DTYPES[dtype] if dtype else own
    return {name: array.astype(target) if array.dtype in floats else array for name, array in tensors.items()}


def _load_adapter(model: DiffusionGemma, folder: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (folder / name).is_file():
            raise CheckpointError(f"adapter {folder} lacks {name}")
    try:
        load_adapters(model, str(folder))
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(f"adapter {folder} does not fit this model in mlx-lm's format ({reason})") from None
    model.eval()
