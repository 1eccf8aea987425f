"""Which models requests may name.

Only what the operator listed and, if asked, what lies in the local Hub cache: no request makes this server read another
folder or download anything new.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import TINY, find_folder
from .errors import ApiError
from .settings import Settings

RESCAN_SECONDS = 30.0
MODEL_TYPE = "diffusion_gemma"


@dataclass(frozen=True)
class ModelEntry:
    """A model that can be served: `id` is what clients call it, `source` what `pipeline.load` takes."""

    id: str
    source: str

    @property
    def publisher(self) -> str:
        """The owner of a Hub id."""
        return self.id.split("/")[0] if "/" in self.id else "local"

    def folder(self) -> Path | None:
        """Return where it lies, None while it is not on this machine."""
        path = Path(self.source).expanduser()
        if self.source == TINY or path.is_dir():
            return find_folder(self.source)
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.source, "config.json")
        return Path(found).parent if isinstance(found, str) else None

    def config(self) -> dict[str, Any]:
        """Return its config.json; empty while it is not on this machine."""
        folder = self.folder()
        return {} if folder is None else _read_config(folder)

    def nbytes(self) -> int:
        """Return the bytes of its weight files."""
        folder = self.folder()
        return 0 if folder is None else sum(path.stat().st_size for path in folder.glob("*.safetensors"))


class Catalog:
    """Names and the models they mean. May be used from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._listed = [_entry(source) for source in dict.fromkeys((settings.model, *settings.models))]
        self._aliases = frozenset(settings.aliases)
        self._any = settings.any_model
        self._hub_models = settings.hub_models
        self._cached: list[ModelEntry] = []
        self._scanned = float("-inf")
        self._lock = threading.Lock()
        ids = [entry.id for entry in self._listed]
        if len(set(ids)) < len(ids):
            raise ValueError(f"models: got {', '.join(ids)}, expected names that differ")

    @property
    def default(self) -> ModelEntry:
        """The model of requests that name none."""
        return self._listed[0]

    def entries(self) -> list[ModelEntry]:
        """Return all models, the default first."""
        return [*self._listed, *(entry for entry in self._hub() if entry not in self._listed)]

    def find(self, name: str | None) -> ModelEntry:
        """Return the model of a name, the default's for none. Raise `ApiError` with 404."""
        if not name or name in self._aliases:
            return self.default
        for entry in self._listed:
            if name in (entry.id, entry.source):
                return entry
        found = next((entry for entry in self._hub() if entry.id == name), None)
        if found is None and self._any:
            return self.default
        if found is None:
            known = ", ".join(repr(entry.id) for entry in self.entries())
            raise ApiError(
                404, f"model: got {name[:200]!r}, expected one of {known}", param="model", code="model_not_found"
            )
        return found

    def _hub(self) -> list[ModelEntry]:
        if not self._hub_models:
            return []
        with self._lock:
            if time.monotonic() - self._scanned > RESCAN_SECONDS:
                self._cached, self._scanned = _scan_hub_cache(), time.monotonic()
            return self._cached


def _entry(source: str) -> ModelEntry:
    path = Path(source).expanduser()
    is_folder = source != TINY and path.is_dir()
    return ModelEntry(path.resolve().name if is_folder else source, source)


def _scan_hub_cache() -> list[ModelEntry]:
    """Return the checkpoints of this kind of model in the Hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    found = [
        ModelEntry(repo.repo_id, repo.repo_id)
        for repo in repos
        if repo.repo_type == "model"
        and any(_read_config(revision.snapshot_path).get("model_type") == MODEL_TYPE for revision in repo.revisions)
    ]
    return sorted(found, key=lambda entry: entry.id)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
