"""Prefixes on disk: restarts, damage of every kind, strangers' files, other processes, a full disk, permissions."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import stat
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from prefix_caches import CONFIG, assert_cold, cold, grow

from mlx_diffusiongemma.cache import PrefixCache
from mlx_diffusiongemma.prefix_store import Disk, fingerprint
from mlx_diffusiongemma.prefixes import Prefixes

SYSTEM = [3] * 20
QUESTION = [*SYSTEM, 4, 5, 6, 7]
ANSWER = [*QUESTION, *range(10, 30)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "prefixes"


def opened(folder: Path, mark: str = "one", max_bytes: int = 10**6) -> Prefixes:
    """Open a folder as a new process does: nothing in memory."""
    return Prefixes(0, disk=Disk(folder, mark, max_bytes))


def restored(prefixes: Prefixes, tokens: list[int], dtype: mx.Dtype = mx.float32) -> int:
    """Restore a prompt, check the cache, return its length. Any warning is an error."""
    cache = PrefixCache(CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        length = prefixes.restore(tokens, cache)
    assert cache.offset == length
    if length:
        assert_cold(cache, tokens[:length], dtype)
    return length


def save(prefixes: Prefixes, *prompts: list[int], dtype: mx.Dtype = mx.float32) -> None:
    """Save prompts, each the beginning of the next."""
    cache = PrefixCache(CONFIG)
    for prompt in prompts:
        prefixes.save(prompt, grow(cache, prompt[cache.offset :], dtype))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_prefixes_survive_a_restart(folder: Path, dtype: mx.Dtype) -> None:
    save(opened(folder), SYSTEM, QUESTION, ANSWER, dtype=dtype)
    prefixes = opened(folder)
    assert restored(prefixes, [*ANSWER, 1], dtype) == len(ANSWER)
    assert restored(prefixes, [*QUESTION, 1], dtype) == len(QUESTION)
    assert restored(prefixes, [*SYSTEM, 1, 1], dtype) == len(SYSTEM)
    assert restored(prefixes, [1, *SYSTEM], dtype) == 0


def test_what_comes_from_disk_is_in_memory_afterwards(folder: Path) -> None:
    save(opened(folder), SYSTEM, QUESTION)
    prefixes = Prefixes(disk=Disk(folder, "one"))
    assert restored(prefixes, QUESTION) == len(QUESTION)
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)
    assert restored(prefixes, QUESTION) == len(QUESTION)
    assert prefixes.counts[:3] == (2, 0, 2 * len(QUESTION))


def test_only_the_owner_may_read(folder: Path) -> None:
    save(opened(folder), SYSTEM, QUESTION)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in files(folder)] == [0o600] * 2


def test_a_folder_where_others_may_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(ValueError, match=r"others may write \(mode 777\), expected one of your own \(chmod 700\)"):
        Disk(tmp_path, "one")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file: File exists, expected a folder to write to"):
        Disk(tmp_path / "file", "one")
    with pytest.raises(ValueError, match="prefix_disk_bytes: got -1"):
        Disk(tmp_path, "one", -1)


def test_other_checkpoints_share_the_folder_and_nothing_else(folder: Path) -> None:
    save(opened(folder, "one"), SYSTEM, QUESTION)
    assert restored(opened(folder, "two"), QUESTION) == 0
    save(opened(folder, "two"), QUESTION)
    assert len(files(folder)) == 3
    assert restored(opened(folder, "one"), QUESTION) == restored(opened(folder, "two"), QUESTION) == len(QUESTION)


def test_the_fingerprint_is_of_config_weights_adapter_and_details(tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    for path in (model, adapter):
        path.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapters.safetensors").write_bytes(b"adapter")
    seen = [fingerprint([model], "float32"), fingerprint([model], "bfloat16"), fingerprint([model, adapter], "float32")]
    (model / "README.md").write_text("what is not read does not count")
    assert fingerprint([model], "float32") == seen[0]
    (model / "config.json").write_text("[]")
    seen.append(fingerprint([model], "float32"))
    os.utime(model / "model.safetensors", ns=(1, 1))
    seen.append(fingerprint([model], "float32"))
    (model / "model.safetensors").rename(model / "other.safetensors")
    seen.append(fingerprint([model], "float32"))
    assert len(set(seen)) == len(seen) == 6


# -- damage -------------------------------------------------------------------------------------------------------


def flip(place: Callable[[int], int]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[place(len(data))] ^= 1
        path.write_bytes(data)

    return damage


def flip_behind(text: bytes) -> Callable[[Path], None]:
    return lambda path: flip(lambda _: path.read_bytes().index(text) + len(text))(path)


def cut(place: Callable[[int], int]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: place(path.stat().st_size)])


def huge_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


def other_arrays(path: Path) -> None:
    """A whole file of another segment under this one's name."""
    other = next(other for other in path.parent.iterdir() if other != path)
    shutil.copy(other, path)


def no_metadata(path: Path) -> None:
    mx.save_safetensors(str(path), {"0.0": mx.zeros((1, 1, 4, 2))})


DAMAGE = {
    "cut to nothing": cut(lambda size: 0),
    "cut in the header's length": cut(lambda size: 5),
    "cut in the header": cut(lambda size: 100),
    "cut in the arrays": cut(lambda size: size - 40),
    "one byte short": cut(lambda size: size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a bit of the header's length": flip(lambda size: 0),
    "a bit of the keys": flip_behind(b'"keys":"'),
    "a bit of the checksum": flip_behind(b'"checksum":"'),
    "a bit of a shape": flip_behind(b'"shape":['),
    "a bit of the first array": flip(lambda size: size - 200),
    "a bit of the last array": flip(lambda size: size - 1),
    "text": lambda path: path.write_text("not a prefix"),
    "a huge header": huge_header,
    "another segment": other_arrays,
    "no metadata": no_metadata,
    "gone": Path.unlink,
}


@pytest.mark.parametrize("which", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("known", [False, True], ids=["unknown", "known"])
def test_a_damaged_file_is_passed_over_and_replaced(
    folder: Path, damage: Callable[[Path], None], which: int, known: bool
) -> None:
    lengths = [len(prompt) for prompt in (SYSTEM, QUESTION, ANSWER)]
    prefixes = opened(folder)
    paths: list[Path] = []
    cache = PrefixCache(CONFIG)
    for prompt in (SYSTEM, QUESTION, ANSWER):
        prefixes.save(prompt, grow(cache, prompt[cache.offset :]))
        paths += [path for path in folder.iterdir() if path not in paths]
    damage(paths[which])
    prefixes = prefixes if known else opened(folder)  # a process that has read the header before, or not
    assert restored(prefixes, ANSWER) == (lengths[which - 1] if which else 0)
    save(prefixes, SYSTEM, QUESTION, ANSWER)
    assert restored(opened(folder), ANSWER) == lengths[-1]
    assert sorted(folder.iterdir()) == sorted(paths)


@pytest.mark.parametrize("seed", range(3))
def test_any_flipped_bit(folder: Path, seed: int) -> None:
    """No bit of a file can change without the file being passed over, or what it says staying the same."""
    chance = random.Random(seed)
    save(opened(folder), QUESTION)
    [path] = folder.iterdir()
    whole = path.read_bytes()
    for _ in range(60):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        assert restored(opened(folder), QUESTION) in (0, len(QUESTION))  # `restored` compares the arrays


def test_strangers_in_the_folder_are_left_alone(folder: Path) -> None:
    save(opened(folder, max_bytes=3000), QUESTION)
    (folder / "holiday.safetensors").write_bytes(b"photos" * 1000)
    (folder / ("0" * 32 + ".safetensors")).mkdir()
    (folder / ("1" * 32 + ".safetensors")).symlink_to("/dev/zero")
    prefixes = opened(folder, max_bytes=3000)
    for branch in range(9):
        save(prefixes, [branch] * 20)
    assert restored(prefixes, [8] * 20) == 20
    assert (folder / "holiday.safetensors").read_bytes() == b"photos" * 1000


# -- the bound ----------------------------------------------------------------------------------------------------


def test_the_least_recently_used_files_go_first(folder: Path) -> None:
    branches = [[*SYSTEM, *[branch] * 200] for branch in range(4)]
    save(opened(folder), SYSTEM, branches[0])
    small, large = (path.stat().st_size for path in files(folder))
    limit = small + int(2.5 * large)  # the system turn and two branches
    for number, branch in enumerate(branches[1:], 1):
        prefixes = opened(folder, max_bytes=limit)
        cache = PrefixCache(CONFIG)
        assert prefixes.restore(branch, cache) == 20
        prefixes.save(branch, grow(cache, branch[20:]))
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
        if number == 1:
            assert restored(prefixes, branches[0]) == 220  # used, so the second branch is the oldest now
        if number == 2:
            assert restored(prefixes, branches[0]) == 220
    assert [restored(opened(folder), branch) for branch in branches] == [220, 20, 20, 220]


def test_a_prefix_too_long_for_the_bound_keeps_fewer_windows(folder: Path) -> None:
    tokens: list[int] = []
    cache = PrefixCache(CONFIG)
    prefixes = opened(folder, max_bytes=9000)
    for turn in range(8):
        tokens += [turn] * 10
        prefixes.save(tokens, grow(cache, tokens[-10:]))
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 9000
        assert restored(opened(folder), [*tokens, 99]) == len(tokens)


def test_what_is_larger_than_the_bound_is_not_written(folder: Path) -> None:
    prefixes = opened(folder, max_bytes=500)
    save(prefixes, QUESTION)
    assert files(folder) == [] and restored(prefixes, QUESTION) == 0


def test_unfinished_files_are_removed_when_nobody_can_be_writing_them(folder: Path) -> None:
    prefixes = opened(folder)
    old, new = (folder / f"{digit * 32}.{digit * 8}.part" for digit in "ab")
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    save(prefixes, QUESTION)
    assert new.exists() and not old.exists()


# -- other processes, and a disk that fails -----------------------------------------------------------------------


def test_processes_share_a_folder(folder: Path) -> None:
    one, two = opened(folder), opened(folder)
    save(one, SYSTEM, QUESTION)
    assert restored(two, ANSWER) == len(QUESTION)
    save(two, SYSTEM, QUESTION, ANSWER)
    assert restored(one, ANSWER) == len(ANSWER)
    assert len(files(folder)) == 3
    for path in folder.iterdir():  # a third one makes room
        path.unlink()
    assert restored(one, ANSWER) == 0
    save(two, ANSWER)
    assert restored(one, ANSWER) == len(ANSWER)


def test_a_full_disk_ends_caching_with_one_warning(folder: Path) -> None:
    prefixes = opened(folder)
    save(prefixes, SYSTEM)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    cache = cold(QUESTION)
    with pytest.warns(UserWarning, match="File too large; prefixes are no longer stored") as caught:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))  # the kernel refuses the rest of the file
        try:
            prefixes.save(QUESTION, cache)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        prefixes.save(QUESTION, cache)
    assert len(caught) == 1
    assert len(files(folder)) == 1  # nothing half-written
    assert restored(opened(folder), QUESTION) == len(SYSTEM)


def test_a_file_that_cannot_be_opened_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(opened(folder), QUESTION)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.warns(UserWarning, match="Too many open files; prefixes are no longer stored"):
        assert opened(folder).restore(QUESTION, PrefixCache(CONFIG)) == 0
    monkeypatch.undo()
    assert restored(opened(folder), QUESTION) == len(QUESTION)


def test_a_folder_that_is_gone_ends_caching_with_one_warning(folder: Path) -> None:
    prefixes = Prefixes(disk=Disk(folder, "one"))
    save(prefixes, SYSTEM)
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="No such file or directory; prefixes are no longer stored") as caught:
        assert prefixes.restore([*QUESTION, 1], PrefixCache(CONFIG)) == len(SYSTEM)
        save(prefixes, SYSTEM, QUESTION)
    assert len(caught) == 1
    assert restored(prefixes, QUESTION) == len(QUESTION)  # memory goes on
