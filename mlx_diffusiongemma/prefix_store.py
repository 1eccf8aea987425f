"""Stored prefixes on disk: one safetensors file per segment, in a folder that several processes may share.

The metadata of a file say what checkpoint it is of (a fingerprint), which segment is its parent, its keys, and a
checksum of its arrays; its name is the hash of the first three. A file is written under another name and renamed, so it
is there whole or not at all. A damaged segment is deleted when it is met; what is of something else is passed over.
The least recently used files go first: the time of a file is that of its last use.

Files hold conversations. They are readable for their owner only.
"""

from __future__ import annotations

import os
import re
import secrets
import time
import warnings
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from . import __version__
from .cache import PrefixCache
from .config import check_integer
from .segments import Keys, Segment
from .shards import ShardError, ShardWriter, TensorSpec, read_header

FORMAT = "mlx_diffusiongemma prefix 1"
DEFAULT_DISK_BYTES = 16 * 2**30  # of 26B: 68 prompts of 2,000 tokens, or 297 canvases
SEGMENT_FILE = re.compile(r"[0-9a-f]{32}\.safetensors")
UNFINISHED_FILE = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{8}\.part")
MAX_BYTES = 2**63 - 1  # of a bound
ABANDONED = 3600  # seconds after which nobody is still writing a file

LayerArrays = tuple[mx.array, ...]  # of one layer, each [1, K, S, ...]


def fingerprint(folders: Iterable[Path], *details: object) -> str:
    """Return what tells the keys and values of one set-up from those of another.

    Args:
        folders: of the checkpoint, and of an adapter. Config and weight files count, by name, size and time.
        details: what else changes what the encoder computes, such as the dtype.
    """
    digest = blake2b(repr((FORMAT, __version__, version("mlx"), *details)).encode(), digest_size=16)
    for folder in folders:
        for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
            status = path.stat()
            digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
            if path.name == "config.json":
                digest.update(path.read_bytes())
    return digest.hexdigest()


def open_folder(folder: Path | str) -> Path:
    """Make a folder for prefixes if need be. Raise ValueError if that fails, or if others may write there."""
    path = Path(folder).expanduser()
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = path.stat().st_mode
    except OSError as error:
        raise ValueError(f"prefix folder {path}: {error.strerror}, expected a folder to write to") from None
    if mode & 0o022:
        got = f"got one where others may write (mode {mode & 0o7777:o})"
        raise ValueError(f"prefix folder {path}: {got}, expected one of your own (chmod 700)")
    return path


class _File(NamedTuple):
    """A file as the folder lists it: which one it is (it may be replaced), its size, its last use."""

    inode: int
    nbytes: int
    used: int  # ns


class _Header(NamedTuple):
    """What the metadata of a segment's file say."""

    parent: str  # name of its file; empty for the first segment of a prefix
    keys: Keys
    checksum: str


_Segment = Segment[str]  # the name of its file


class Disk:
    """A folder of segments."""

    def __init__(self, folder: Path | str, fingerprint: str, max_bytes: int = DEFAULT_DISK_BYTES) -> None:
        """Open a folder, and make it if need be.

        Args:
            folder: of nothing but segments, of this checkpoint and others.
            fingerprint: of the checkpoint; see `fingerprint`.
            max_bytes: of all files together.

        Raises:
            ValueError: see `open_folder`.
        """
        check_integer("prefix_disk_bytes", max_bytes, 0, MAX_BYTES)
        self._folder = open_folder(folder)
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._stopped = False
        self._headers: dict[tuple[str, int], _Header | None] = {}  # by name and inode; None for what is of no use
        self._root: _Segment = Segment(np.empty(0, np.int64), "")

    # -- reading ------------------------------------------------------------------------------------------------

    def load(self, keys: Keys, *, longer_than: int) -> tuple[int, list[list[LayerArrays]]] | None:
        """Read the longest stored prefix of `keys`.

        Args:
            keys: of a whole prompt [L].
            longer_than: tokens that are known anyway.

        Returns:
            its length, and for each segment the arrays of each layer; None where there is nothing longer.
        """
        if self._stopped:
            return None
        try:
            while True:
                path = self._index().longest(keys).path()
                if not path or path[-1].stop <= longer_than:
                    return None
                parts = []
                for segment in path:
                    layers = self._read(segment.content)
                    if layers is None:  # the file is gone now, so the next round finds a shorter prefix
                        break
                    parts.append(layers)
                else:
                    self._touch([segment.content for segment in path])
                    return path[-1].stop, parts
        except OSError as error:
            self._stop(error)
            return None

    def _list(self) -> dict[str, _File]:
        """List the segments in the folder, of every checkpoint."""
        files = {}
        with os.scandir(self._folder) as entries:
            for entry in entries:
                if not (SEGMENT_FILE.fullmatch(entry.name) or UNFINISHED_FILE.fullmatch(entry.name)):
                    continue
                try:
                    if entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        files[entry.name] = _File(status.st_ino, status.st_size, status.st_mtime_ns)
                except FileNotFoundError:  # another process was quicker
                    continue
        return files

    def _index(self) -> _Segment:
        """Return the root of the tree of this checkpoint's segments, as the folder is now."""
        present = {(name, file.inode) for name, file in self._list().items() if SEGMENT_FILE.fullmatch(name)}
        if present == self._headers.keys():
            return self._root
        self._headers = {
            (name, inode): self._headers[name, inode] if (name, inode) in self._headers else self._header(name)
            for name, inode in present
        }
        children: dict[str, list[tuple[str, Keys]]] = {}
        for (name, _), header in self._headers.items():
            if header is not None:
                children.setdefault(header.parent, []).append((name, header.keys))
        self._root = Segment(np.empty(0, np.int64), "")
        waiting = [self._root]
        while waiting:
            parent = waiting.pop()
            waiting += [Segment(keys, name, parent) for name, keys in children.get(parent.content, ())]
        return self._root

    def _header(self, name: str) -> _Header | None:
        """Read what a file says of itself; None for one that is gone, damaged or of something else."""
        path = self._folder / name
        try:
            path.open("rb").close()  # safetensors calls whatever it cannot open missing
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
            header = _Header(
                metadata["parent"],
                np.frombuffer(bytes.fromhex(metadata["keys"]), dtype="<i8").astype(np.int64),
                metadata["checksum"],
            )
        except (SafetensorError, FileNotFoundError, KeyError, ValueError):
            return None
        return header if len(header.keys) and name == self._name(header.parent, header.keys) else None

    def _name(self, parent: str, keys: Keys) -> str:
        digest = blake2b(f"{FORMAT}\n{self._fingerprint}\n{parent}\n".encode(), digest_size=16)
        digest.update(keys.astype("<i8").tobytes())
        return f"{digest.hexdigest()}.safetensors"

    def _read(self, name: str) -> list[LayerArrays] | None:
        """Read the arrays of a segment; None for one that is gone, or was damaged: it is deleted."""
        path = self._folder / name
        header = self._header(name)  # the one in the tree may be of a file that was replaced since
        try:
            arrays = {
                tensor.name: tensor.read(0, tensor.spec.rows).reshape(tensor.spec.shape) for tensor in read_header(path)
            }
        except ShardError as error:
            if isinstance(error.__context__, OSError) and not isinstance(error.__context__, FileNotFoundError):
                raise error.__context__ from None  # the file may be good: too many are open, for instance
            header = None
        if header is not None and header.checksum == _checksum(arrays):
            return _as_layers(arrays)
        path.unlink(missing_ok=True)
        return None

    def _touch(self, names: Sequence[str]) -> None:
        """Make files the last used; the first of a prefix goes last, because the others are of no use without it."""
        now = time.time_ns()
        for later, name in enumerate(reversed(names)):
            try:
                os.utime(self._folder / name, ns=(now + later, now + later))
            except FileNotFoundError:
                continue  # another process was quicker

    # -- writing ------------------------------------------------------------------------------------------------

    def save(self, keys: Keys, cache: PrefixCache) -> None:
        """Store a prefix; what is stored already is used again.

        A folder that cannot be written to, a full disk for instance, gives one warning, and ends the use of the disk.

        Args:
            keys: of the tokens in the cache [L].
            cache: not changed.
        """
        if self._stopped:
            return
        try:
            path = self._index().longest(keys).path()
            names = [segment.content for segment in path]
            self._touch(names)
            start = path[-1].stop if path else 0
            if start == len(keys):
                return
            layers = [layer.since(start) for layer in cache.layers]
            files = self._list()
            kept = sum(files[name].nbytes for name in names if name in files)
            if start and kept + _file_bytes(layers, keys[start:]) > self._max_bytes:  # as one segment it is smaller
                start, names, kept = 0, [], 0
                layers = [layer.since(0) for layer in cache.layers]
            nbytes = _file_bytes(layers, keys[start:])
            if kept + nbytes > self._max_bytes:
                return
            self._make_room(files, nbytes)
            self._touch([*names, self._write(names[-1] if names else "", keys[start:], layers)])
        except OSError as error:
            self._stop(error)

    def _write(self, parent: str, keys: Keys, layers: Sequence[LayerArrays]) -> str:
        """Write a segment; return its file's name."""
        arrays = {f"{i}.{j}": array for i, arrays in enumerate(layers) for j, array in enumerate(arrays)}
        mx.eval(arrays)
        metadata = {"parent": parent, "keys": keys.astype("<i8").tobytes().hex(), "checksum": _checksum(arrays)}
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
        name = self._name(parent, keys)
        unfinished = self._folder / name.replace("safetensors", f"{secrets.token_hex(4)}.part")
        try:
            with ShardWriter(unfinished, specs, metadata | {"format": FORMAT}, mode=0o600) as writer:
                for tensor, array in arrays.items():
                    writer.write(tensor, 0, array.reshape(-1, array.shape[-1]))
            os.replace(unfinished, self._folder / name)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        return name

    def _make_room(self, files: dict[str, _File], nbytes: int) -> None:
        """Delete the least recently used files until `nbytes` more fit, and what was never finished."""
        total = sum(file.nbytes for file in files.values())
        abandoned = time.time_ns() - ABANDONED * 10**9
        for name, file in sorted(files.items(), key=lambda item: item[1].used):
            unfinished = UNFINISHED_FILE.fullmatch(name) is not None
            goes = file.used < abandoned if unfinished else total + nbytes > self._max_bytes
            if goes:
                (self._folder / name).unlink(missing_ok=True)
                total -= file.nbytes

    def _stop(self, error: OSError) -> None:
        self._stopped = True
        warnings.warn(f"prefix folder {self._folder}: {error.strerror}; prefixes are no longer stored", stacklevel=2)


def _file_bytes(layers: Iterable[LayerArrays], keys: Keys) -> int:
    """Return how large a segment's file becomes at most."""
    arrays = [array for arrays in layers for array in arrays]
    return sum(array.nbytes for array in arrays) + 16 * len(keys) + 160 * len(arrays) + 512


def _checksum(arrays: dict[str, mx.array]) -> str:
    digest = blake2b(digest_size=32)
    for name, array in sorted(arrays.items()):
        digest.update(repr((name, str(array.dtype), tuple(array.shape))).encode())
        if array.size:
            digest.update(np.ascontiguousarray(np.asarray(array.view(mx.uint8))).data.cast("B"))
    return digest.hexdigest()


def _as_layers(arrays: dict[str, mx.array]) -> list[LayerArrays]:
    """Put arrays named `layer.number` back in order."""
    places = sorted(tuple(map(int, name.split("."))) for name in arrays)
    layers: list[list[mx.array]] = [[] for _ in range(places[-1][0] + 1)]
    for layer, number in places:
        layers[layer].append(arrays[f"{layer}.{number}"])
    return [tuple(layer) for layer in layers]
