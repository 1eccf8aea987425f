"""Long prompts: bounded temporaries, no dead zone at chunk borders, positions up to 262,144, packed keys and values.

The default tests use a small window and short prompts; the slow ones the window and the pattern of the 26B model and
a prompt of 4,096 tokens (`benchmarks/long_context.py`).
"""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest
from small_model import bundled_checkpoint, config_dict, random_model

from mlx_diffusiongemma import masks
from mlx_diffusiongemma.attention import canvas_attention
from mlx_diffusiongemma.cache import FullCache, KeysAndValues, KVQuantization, PrefixCache, SlidingCache
from mlx_diffusiongemma.checkpoint import Checkpoint
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.denoise import Denoiser, StepInput, StepRules, first_state
from mlx_diffusiongemma.layers import Attention
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.pipeline import Pipeline
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.request import Request
from mlx_diffusiongemma.sampler import noise
from mlx_diffusiongemma.tokenizer import Tokenizer
from mlx_diffusiongemma.vocabulary import DrawShape

ROOT = Path(__file__).parents[1]
LAYERS = ["sliding_attention", "full_attention"] * 2  # prefill never computes what the last layer attends to
LONG = {
    "max_position_embeddings": 8192,
    "sliding_window": 16,
    "num_hidden_layers": len(LAYERS),
    "layer_types": LAYERS,
}
CANVAS = 2e-4  # of canvas logits between chunk sizes: 1.5e-4 with OpenBLAS, 0 with the reference BLAS; logits reach 7


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_context", ROOT / "benchmarks" / "long_context.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prompt(tokens: int, changed: int | None = None) -> tuple[int, ...]:
    ids = np.random.default_rng(0).integers(2, 95, tokens)
    if changed is not None:
        ids[changed] += 1 if ids[changed] < 94 else -1
    return tuple(ids.tolist())


def filled(model: DiffusionGemma, ids: tuple[int, ...], chunk: int, kv: KVQuantization | None = None) -> PrefixCache:
    cache = model.make_cache(kv)
    cache.reserve(len(ids))
    for _ in encode(model, cache, ids, chunk):
        pass
    return cache


def canvas_logits(model: DiffusionGemma, cache: PrefixCache) -> np.ndarray:
    """Return what a fixed canvas behind the prefix gives; [C, V]."""
    canvas, offset = mx.arange(8, dtype=mx.int32), mx.array(cache.offset, dtype=mx.int32)
    [hidden] = model.denoise([canvas], [mx.zeros((8, 64))], [cache.views()], [offset])
    return np.array(model.model.decoder.embed_tokens.as_linear(hidden))


# -- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [None, KVQuantization(8, 32), KVQuantization(4, 32)], ids=["plain", "8 bit", "4 bit"])
def test_every_chunk_size_gives_the_same_canvas(kv: KVQuantization | None) -> None:
    """Packed keys too: a chunk attends to its own keys as they are stored."""
    model, ids = random_model(**LONG), prompt(150)
    whole = canvas_logits(model, filled(model, ids, 150, kv))
    for chunk in (16, 50, 128):
        np.testing.assert_allclose(canvas_logits(model, filled(model, ids, chunk, kv)), whole, atol=CANVAS)


@pytest.mark.parametrize("changed", [0, 10, 49, 50, 51, 100, 149])
def test_no_token_is_in_a_dead_zone(changed: int) -> None:
    """Each token of the prompt moves the canvas, those at chunk borders and far behind the window too."""
    model = random_model(**LONG)
    plain, other = (canvas_logits(model, filled(model, prompt(150, at), 50)) for at in (None, changed))
    assert np.abs(plain - other).max() > 100 * CANVAS


def test_temporaries_do_not_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four times the prompt: the peak grows by its keys and values, and by less than a quarter of them beside."""
    monkeypatch.setattr(masks, "MAX_SCORES", 4 * 16 * 1024)
    monkeypatch.setattr(masks, "MIN_QUERY_BLOCK", 4)
    model = random_model(**LONG)
    measured = []
    for tokens in (1024, 4096):
        mx.clear_cache()
        active = mx.get_active_memory()
        mx.reset_peak_memory()
        cache = filled(model, prompt(tokens), 256)
        measured.append((cache.nbytes, mx.get_peak_memory() - active))
        del cache
    (few_kept, few), (many_kept, many) = measured
    assert many_kept - few_kept == 3072 * 2 * 2 * 32 * 4
    assert many - few < 1.25 * (many_kept - few_kept)


# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    """A random model behind the bundled tokenizer."""
    return bundled_checkpoint(Tokenizer.load(tiny_folder))


def test_nobody_holds_a_view_when_a_canvas_is_encoded(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that is held makes MLX copy the keys of the whole prefix."""
    held: list[int] = []
    encode_canvas = Request.encode_canvas

    def looked_at(request: Request) -> None:
        gc.collect()
        found = [thing for thing in gc.get_objects() if isinstance(thing, KeysAndValues)]
        held.append(sum(view.keys.shape[-1] == 32 for view in found))  # the head size of full layers
        encode_canvas(request)

    monkeypatch.setattr(Request, "encode_canvas", looked_at)
    Pipeline(checkpoint).generate("go", max_tokens=24, max_denoising_steps=2, extra_eos_tokens=[], seed=3)
    assert held == [0, 0]


def test_room_for_prompt_and_answer_is_reserved_at_once(checkpoint: Checkpoint) -> None:
    pipeline = Pipeline(checkpoint)
    prepared = pipeline.prepare("go", {"max_tokens": 30})
    request = pipeline.open(prepared)
    list(request.prefill())
    [full] = [layer for layer in request._cache.layers if isinstance(layer, FullCache)]
    stored = len(prepared.prompt.token_ids) + 3 * 8  # all canvases but the last
    assert full.nbytes == stored * 2 * 32 * 4


@pytest.mark.parametrize("compiled", [False, True])
def test_packed_prefixes_of_one_batch(checkpoint: Checkpoint, compiled: bool) -> None:
    """Rows with packed prefixes of different lengths give what each gives alone."""
    pipeline = Pipeline(checkpoint, compiled=compiled, kv_bits=8, kv_group_size=32)
    prompts = ["go", "tell me a long story about a fox and a hen"]
    options = {"max_tokens": 16, "max_denoising_steps": 3}
    together = pipeline.generate_batch(prompts, seed=[1, 2], **options)
    alone = [pipeline.generate(text, seed=seed, **options) for text, seed in zip(prompts, (1, 2), strict=True)]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]
    assert len(together[0].token_ids) == 16


def test_eight_bits_change_little_and_four_change_more() -> None:
    model, ids = random_model(**LONG), prompt(150)
    plain = canvas_logits(model, filled(model, ids, 50))
    eight, four = (
        np.abs(canvas_logits(model, filled(model, ids, 50, KVQuantization(b, 32))) - plain).mean() for b in (8, 4)
    )
    assert 0 < eight < four / 4
    assert four < plain.std() / 2


def test_a_compiled_step_takes_packed_prefixes() -> None:
    model, ids = random_model(**LONG), prompt(60)
    views = filled(model, ids, 50, KVQuantization(4, 32)).views()
    rules = StepRules(0.1, 0.005, DrawShape())
    draws = noise(1, 0, 1, 8, 96)
    row = StepInput(first_state(model, draws.token_ids, 1), draws, mx.array(0.8), views, mx.array(60, dtype=mx.int32))
    [plain], [compiled] = (Denoiser(model, compiled=c)([row], [rules]) for c in (False, True))
    assert plain.argmax.tolist() == compiled.argmax.tolist()
    np.testing.assert_allclose(float(plain.mean_entropy.item()), float(compiled.mean_entropy.item()), atol=1e-5)


# -- positions ------------------------------------------------------------------------------------------------------

CONTEXT = 262_144
ROPE = {"head_dim": 256, "global_head_dim": 512, "num_attention_heads": 2, "num_key_value_heads": 2}


def reference_rotation(layer_type: str, position: int, vector: np.ndarray) -> np.ndarray:
    """Rotate a vector [H] as transformers does, in float32: inverse frequency times position, cosine and sine."""
    H = len(vector)
    base, rotated = (10_000.0, H) if layer_type == "sliding_attention" else (1_000_000.0, H // 4)
    inverse = (1 / base ** (np.arange(0, rotated, 2, dtype=np.float32) / np.float32(H))).astype(np.float32)
    inverse = np.concatenate([inverse, np.zeros((H - rotated) // 2, np.float32)])
    angle = inverse * np.float32(position)
    angle = np.concatenate([angle, angle])
    half = np.concatenate([-vector[H // 2 :], vector[: H // 2]])
    return vector * np.cos(angle) + half * np.sin(angle)


@pytest.mark.parametrize("layer_type", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("position", [1, 1000, 131_071, CONTEXT - 1])
@pytest.mark.parametrize("as_array", [False, True], ids=["encoder", "decoder"])
def test_rotation_is_the_references_up_to_the_last_position(layer_type: str, position: int, as_array: bool) -> None:
    """Angles reach 262,143 and float32 has 24 bits, so two ways to round the frequency differ by up to 2^-4 there;
    0.012 (2^-6.4) was measured."""
    config = ModelConfig.from_dict(config_dict(max_position_embeddings=CONTEXT, **ROPE)).text
    attention = Attention(config, layer_type)
    H = attention.head_dim
    vector = np.random.default_rng(0).normal(size=H).astype(np.float32)
    offset = mx.array([position], dtype=mx.int32) if as_array else position
    rotated = np.array(attention.rope(mx.array(vector)[None, None, None], offset=offset)).flatten()
    expected = reference_rotation(layer_type, position, vector)
    np.testing.assert_allclose(rotated, expected, atol=max(1e-5, 2.0**-22 * position) * np.abs(vector).max())


def test_a_canvas_behind_a_long_prefix_scores_one_block_at_a_time() -> None:
    N, C, S, H = 4, 256, 4096, 8
    queries, keys, values = (mx.random.normal((1, N, length, H)) for length in (C, S, S))
    canvas = KeysAndValues(*(mx.random.normal((1, N, C, H)) for _ in range(2)))
    mx.eval(queries, keys, values, canvas)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "MAX_SCORES", N * 32 * (S + C))  # eight blocks
        peaks, outputs = [], []
        for lazy in (True, False):
            mx.clear_cache()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            outputs.append(canvas_attention(queries, KeysAndValues(keys, values), canvas, lazy=lazy))
            mx.eval(outputs[-1])
            peaks.append(mx.get_peak_memory() - before)
        block = 4 * N * 32 * (S + C)
        print(f"peaks in blocks: {peaks[0] / block:.1f} lazy, {peaks[1] / block:.1f} one by one")
        assert mx.array_equal(*outputs)
        assert peaks[1] < 4 * block  # scores, their softmax, and what joins the parts


def test_the_last_canvas_of_the_longest_context() -> None:
    """A cache that ends at 262,136 takes a canvas of 8."""
    model = random_model(max_position_embeddings=CONTEXT, sliding_window=8)
    cache = filled(model, prompt(64), 64)
    far = model.make_cache()
    for layer, source in zip(far.layers, cache.layers, strict=True):
        part = source.since(0)
        whole = [part] * ((CONTEXT - 8) // 64) + [tuple(array[:, :, :56] for array in part)]
        spans = [part] if isinstance(source, SlidingCache) else whole
        layer.restore(spans, CONTEXT - 8)
    assert far.offset == CONTEXT - 8
    assert [layer.offset for layer in far.layers] == [CONTEXT - 8] * 3
    assert np.isfinite(canvas_logits(model, far)).all()


# -- the real window --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(benchmark: ModuleType) -> Iterator[DiffusionGemma]:
    yield benchmark.make_model()


def check(benchmark: ModuleType, model: DiffusionGemma, tokens: int, chunks: tuple[int, ...]) -> list:
    runs = [benchmark.measure(model, benchmark.make_prompt(tokens), chunk) for chunk in chunks]
    for run in runs[1:]:
        assert benchmark.difference(runs[0], run) < CANVAS * 10
    changed = benchmark.measure(model, benchmark.make_prompt(tokens, 10), chunks[0])
    assert benchmark.difference(runs[0], changed) > CANVAS * 100
    return runs


def test_the_benchmark_runs(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(["--tokens", "1100", "--chunks", "512", "1024"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:4]] == [[" 1,100 ", " 512 "], [" 1,100 ", " 1,024 "]]
    assert lines[4].startswith("1,100 tokens, largest difference of canvas logits: ")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_chunk_size_reads_a_long_prompt_alike(benchmark: ModuleType, wide: DiffusionGemma) -> None:
    """With the real window; longer prompts take minutes and are left to the benchmark."""
    runs = check(benchmark, wide, 4_096, (512, 1024, 2048, 4_096))
    assert runs[-1].prefill_bytes < 3 * runs[0].prefill_bytes  # one block of scores at a time
