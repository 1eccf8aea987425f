"""Prefix reuse in memory: the tree, its bound, the keys. Prompts through the pipeline are in test_prefix_reuse.py."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest
from prefix_caches import CONFIG, TOKEN_BYTES, WINDOW, assert_cold, cold, grow

from mlx_diffusiongemma.cache import PrefixCache
from mlx_diffusiongemma.images import ImagePatches
from mlx_diffusiongemma.media import ImageBlock
from mlx_diffusiongemma.prefixes import DEFAULT_BYTES, Prefixes
from mlx_diffusiongemma.segments import prefix_keys


def restored(prefixes: Prefixes, tokens: list[int]) -> int:
    """Restore a prompt, check the cache, return its length."""
    cache = PrefixCache(CONFIG)
    length = prefixes.restore(tokens, cache)
    assert cache.offset == length
    if length:
        assert_cold(cache, tokens[:length])
    return length


def segment_bytes(length: int) -> int:
    return TOKEN_BYTES * (length + 2 * min(length, WINDOW - 1))


def stored_bytes(prefixes: Prefixes) -> int:
    arrays = [array for segment in prefixes._by_use for arrays in segment.content.layers for array in arrays]
    assert all(segment.parent is not None and segment in segment.parent.children for segment in prefixes._by_use)
    return sum(array.nbytes for array in arrays)


@pytest.mark.parametrize("budget", [DEFAULT_BYTES, 4000, 1500])
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_prompts(budget: int, seed: int) -> None:
    """Against a list of everything that was ever saved."""
    chance, prefixes, saved = random.Random(seed), Prefixes(budget), set()
    for _ in range(60):
        prompt = [chance.randrange(2) for _ in range(chance.randrange(1, 25))]
        borders = sorted(
            {*chance.sample(range(1, len(prompt) + 1), k=min(len(prompt), chance.randrange(3))), len(prompt)}
        )
        found = [length for length in range(1, len(prompt) + 1) if tuple(prompt[:length]) in saved]
        cache = PrefixCache(CONFIG)
        length = prefixes.restore(prompt, cache)
        assert length == max(found, default=0) if budget == DEFAULT_BYTES else length in [0, *found]
        for border in borders:
            if border > cache.offset:
                grow(cache, prompt[cache.offset : border])
                prefixes.save(prompt[:border], cache)
                saved.add(tuple(prompt[:border]))
                assert prefixes.nbytes == stored_bytes(prefixes) <= budget
        assert restored(prefixes, prompt) == len(prompt) or budget < segment_bytes(len(prompt))
        assert_cold(cache, prompt)


def test_the_least_recently_used_goes_first() -> None:
    prefixes = Prefixes(2 * segment_bytes(10))
    a, b, c = ([n] * 10 for n in range(3))
    prefixes.save(a, cold(a))
    prefixes.save(b, cold(b))
    assert restored(prefixes, a) == 10
    prefixes.save(c, cold(c))
    assert [restored(prefixes, tokens) for tokens in (a, b, c)] == [10, 0, 10]
    assert prefixes.counts.evictions == 1 and prefixes.nbytes == 2 * segment_bytes(10)


def test_a_shared_beginning_outlives_its_branches_and_is_stored_once() -> None:
    system = [5] * 20
    prefixes = Prefixes(segment_bytes(20) + 2 * segment_bytes(4))
    for branch in range(6):
        cache = cold(system)
        prefixes.save(system, cache)
        prompt = system + [branch] * 4
        prefixes.save(prompt, grow(cache, prompt[20:]))
        assert prefixes.nbytes <= prefixes.max_bytes
    assert prefixes.nbytes == prefixes.max_bytes
    assert [restored(prefixes, system + [branch] * 4 + [9]) for branch in range(6)] == [20, 20, 20, 20, 24, 24]


def test_a_conversation_too_long_for_the_bound_keeps_fewer_windows() -> None:
    """Six segments hold six windows in their sliding layers; what does not fit is joined, and goes on being reused."""
    prefixes = Prefixes(4 * segment_bytes(10))
    tokens: list[int] = []
    cache = PrefixCache(CONFIG)
    for turn in range(6):
        tokens += [turn] * 10
        prefixes.save(tokens, grow(cache, tokens[-10:]))
        assert prefixes.nbytes == stored_bytes(prefixes) <= prefixes.max_bytes
        assert restored(prefixes, [*tokens, 9]) == len(tokens)
    assert restored(prefixes, tokens[:10]) == 10  # the first segment fits, so branches from it still do
    assert prefixes.counts.segments < 6


def test_what_is_larger_than_the_bound_is_not_stored() -> None:
    small, large = [1] * 5, [2] * 12
    prefixes = Prefixes(segment_bytes(12) - 1)
    prefixes.save(small, cold(small))
    prefixes.save(large, cold(large))
    assert (restored(prefixes, large), restored(prefixes, small)) == (0, 5)
    nothing = Prefixes(0)
    nothing.save(small, cold(small))
    assert restored(nothing, small) == 0 and nothing.counts.segments == 0


def test_room_is_left_when_asked_and_taken_back_later() -> None:
    prefixes, prompts = Prefixes(10_000), [[number] * 6 for number in range(3)]

    def save_all() -> None:
        for prompt in prompts:
            cache = PrefixCache(CONFIG)
            grow(cache, prompt)
            prefixes.save(prompt, cache)

    save_all()
    prefixes.limit_to(segment_bytes(6))
    assert prefixes.nbytes == segment_bytes(6) and restored(prefixes, prompts[2]) == 6
    save_all()
    assert prefixes.nbytes == segment_bytes(6)
    prefixes.limit_to(-1)
    assert prefixes.nbytes == 0
    prefixes.limit_to(10**9)
    save_all()
    assert prefixes.nbytes == 3 * segment_bytes(6)


def test_counts_and_clear() -> None:
    prefixes, tokens = Prefixes(), [1, 2, 3, 4]
    assert restored(prefixes, tokens) == 0
    prefixes.save(tokens, cold(tokens))
    prefixes.save(tokens, cold(tokens))
    assert restored(prefixes, [*tokens, 5]) == restored(prefixes, tokens) == 4
    assert prefixes.counts == (2, 1, 8, 0, 1, segment_bytes(4))
    prefixes.clear()
    assert restored(prefixes, tokens) == 0
    assert prefixes.counts == (2, 2, 8, 0, 0, 0)


def test_what_is_stored_does_not_hold_the_cache_that_it_is_of() -> None:
    """A view of two tokens would keep the 80 KB of the whole prompt."""
    system, prefixes = [0] * 5000, Prefixes()
    prefixes.save(system, cold(system))
    mx.clear_cache()
    before = mx.get_active_memory()
    for token in range(1, 21):
        prompt = [*system, token, token]
        prefixes.save(prompt, cold(prompt))
    mx.clear_cache()
    assert prefixes.counts.segments == 21
    assert mx.get_active_memory() - before < 20 * 2000


def test_errors() -> None:
    with pytest.raises(ValueError, match="the cache holds 3 tokens, expected an empty one"):
        Prefixes().restore([1, 2, 3], cold([1, 2, 3]))
    with pytest.raises(ValueError, match="got 2 keys, expected 3: one for each token in the cache"):
        Prefixes().save([1, 2], cold([1, 2, 3]))
    with pytest.raises(ValueError, match="prefix_bytes: got -1, expected an integer >= 0"):
        Prefixes(-1)


def block(start: int, seed: int, soft_tokens: int = 6) -> ImageBlock:
    patches = np.random.default_rng(seed).random((soft_tokens * 9, 12), dtype=np.float32)
    return ImageBlock("image", start, ImagePatches(patches, np.zeros((soft_tokens * 9, 2), np.int32), soft_tokens))


def test_keys_of_an_image_are_its_content() -> None:
    ids = list(range(20, 40))
    keys = prefix_keys(ids, [block(3, seed=1), block(10, seed=2)])
    assert list(keys[:3]) == ids[:3] and list(keys[9:10]) == ids[9:10] and list(keys[16:]) == ids[16:]
    assert len(set(keys[3:7])) == 4 and (keys[3:9] < 0).all()  # four words of the hash
    assert not set(keys[3:9]) & set(keys[10:16])
    np.testing.assert_array_equal(keys, prefix_keys(ids, [block(3, seed=1), block(10, seed=2)]))
    np.testing.assert_array_equal(prefix_keys(ids, [block(10, seed=1)])[10:16], keys[3:9])
    np.testing.assert_array_equal(prefix_keys(ids), ids)


def test_the_same_patches_elsewhere_in_the_picture_are_another_image() -> None:
    one = block(0, seed=1).image
    moved = ImagePatches(one.patches, one.position_ids + 1, one.soft_tokens)
    assert one.digest != moved.digest and len(one.digest) == 32
