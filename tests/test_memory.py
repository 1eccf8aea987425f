"""The memory plan: 26B by hand, small models against MLX's measured peaks, limits and refusals."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from small_model import VISION, bundled_checkpoint, config_dict, random_model, save_checkpoint, save_tokenizer
from terminal import run_in_process

from mlx_diffusiongemma import generate, memory
from mlx_diffusiongemma.cache import KeysAndValues, KVQuantization
from mlx_diffusiongemma.checkpoint import Checkpoint, load_checkpoint, parameter_bytes
from mlx_diffusiongemma.config import ModelConfig
from mlx_diffusiongemma.memory import MemoryBudget, MemoryLimitError, Wanted, kv_bytes, plan_memory, stored_tokens
from mlx_diffusiongemma.model import Tail
from mlx_diffusiongemma.pipeline import Pipeline, load
from mlx_diffusiongemma.prefill import encode
from mlx_diffusiongemma.prefix_store import DEFAULT_DISK_BYTES
from mlx_diffusiongemma.prefixes import DEFAULT_BYTES
from mlx_diffusiongemma.prepare import request_sizes
from mlx_diffusiongemma.tokenizer import Tokenizer

GB = 10**9
WEIGHTS_4BIT = 16_542_844_632
BIG = ModelConfig.from_dict(
    {
        "model_type": "diffusion_gemma",
        "canvas_length": 256,
        "eos_token_id": [1, 106],
        "text_config": {
            "vocab_size": 262_144,
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "num_experts": 128,
            "top_k_experts": 8,
            "num_hidden_layers": 30,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_global_key_value_heads": 2,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 1024,
            "max_position_embeddings": 262_144,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 5,
        },
    }
)


# -- 26B, by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "per_token"),
    [
        (None, 5 * 2 * 2 * 512 * 2),  # layers, keys and values, heads, head size, bytes: 20,480
        (KVQuantization(8, 64), 5 * 2 * 2 * (512 + 8 * 2 * 2)),  # a byte each, 8 groups with two bfloat16: 10,880
        (KVQuantization(4, 64), 5 * 2 * 2 * (256 + 8 * 2 * 2)),  # 5,760
    ],
)
def test_keys_and_values_of_26b(kv: KVQuantization | None, per_token: int) -> None:
    window = 25 * 2 * 1023 * 8 * 256 * 2  # 209,510,400
    assert kv_bytes(BIG.text, 262_144, kv) == window + 262_144 * per_token
    assert kv_bytes(BIG.text, 100, kv) == 25 * 2 * 100 * 8 * 256 * 2 + 100 * per_token


def test_what_stored_prefixes_of_26b_take() -> None:
    """The table and the counts of docs/engine.md, `prefixes.py` and `prefix_store.py`."""
    megabytes = [round(kv_bytes(BIG.text, tokens) / 1e6) for tokens in (256, 1023, 8000, 32_000)]
    assert megabytes == [58, 230, 373, 865]
    canvas = kv_bytes(BIG.text, 256)
    assert (canvas // 256, kv_bytes(BIG.text, 8001) - kv_bytes(BIG.text, 8000)) == (225_280, 20_480)
    assert (DEFAULT_BYTES // canvas, DEFAULT_BYTES // kv_bytes(BIG.text, 1000)) == (37, 9)
    assert (DEFAULT_DISK_BYTES // canvas, DEFAULT_DISK_BYTES // kv_bytes(BIG.text, 2000)) == (297, 68)


def test_temporaries_of_26b_stop_growing() -> None:
    """Scores are capped at 2^26 numbers, so four times the prompt adds nothing to a chunk."""
    some, many = (plan_memory(BIG, WEIGHTS_4BIT, [tokens]) for tokens in (65_536, 262_144))
    assert some.prefill == many.prefill
    assert many.temporaries < 1.4 * GB
    assert many.total == WEIGHTS_4BIT + many.keys_and_values + many.temporaries
    assert 23 * GB < many.total < 24 * GB
    assert many.prefill > plan_memory(BIG, WEIGHTS_4BIT, [262_144], chunk=512).prefill


def test_requests_that_run_together_add_up() -> None:
    alone, together = plan_memory(BIG, 0, [5000]), plan_memory(BIG, 0, [5000, 5000, 5000])
    assert together.keys_and_values == 3 * alone.keys_and_values
    assert together.prefill == alone.prefill
    assert together.step > 2 * alone.step


@pytest.mark.parametrize(
    ("wanted", "tokens"),
    [((10, 0), 10), ((10, 1), 10), ((10, 256), 10), ((10, 257), 266), ((10, 512), 266), ((262_000, 10_000), 262_144)],
)
def test_the_last_canvas_is_not_stored(wanted: tuple[int, int], tokens: int) -> None:
    assert stored_tokens(BIG, Wanted(*wanted)) == tokens


# -- against what MLX measures ------------------------------------------------------------------------------------


def measured_and_planned(tokens: int, chunk: int, kv: KVQuantization | None = None, **text: int) -> tuple[float, float]:
    """Return measured peak / planned total, for prefill and for one step, of a random model."""
    layers = ["full_attention", "sliding_attention", "full_attention"]  # the last one is not computed in prefill
    model = random_model(max_position_embeddings=8192, layer_types=layers, **text)
    C, D = model.config.canvas_length, model.config.text.hidden_size
    weights = parameter_bytes(model)
    plan = plan_memory(model.config, weights, [tokens], kv=kv, chunk=chunk, element_bytes=4, on_cpu=True)
    mx.clear_cache()
    before = mx.get_active_memory() - weights  # what other tests left
    mx.reset_peak_memory()
    cache = model.make_cache(kv)
    cache.reserve(tokens)
    for _ in encode(model, cache, tuple(range(2, 90)) * (tokens // 88) + (5,) * (tokens % 88), chunk):
        pass
    prefill = (mx.get_peak_memory() - before) / (weights + plan.keys_and_values + plan.prefill)
    assert cache.nbytes == plan.keys_and_values
    mx.reset_peak_memory()
    [hidden] = model.denoise([mx.zeros(C, mx.int32)], [mx.zeros((C, D))], [cache.views()], [mx.array(tokens)])
    mx.eval(model.model.decoder.embed_tokens.as_linear(hidden))
    step = (mx.get_peak_memory() - before) / (weights + plan.keys_and_values + plan.step)
    return prefill, step


@pytest.mark.parametrize("kv", [None, KVQuantization(8, 32)], ids=["plain", "packed"])
@pytest.mark.parametrize(("tokens", "chunk"), [(2000, 256), (2000, 2048)])
def test_planned_and_measured_are_close(tokens: int, chunk: int, kv: KVQuantization | None) -> None:
    """Measured: 0.55 to 0.58 of the plan in prefill, 0.90 to 0.92 in a step."""
    for ratio in measured_and_planned(tokens, chunk, kv, hidden_size=128, vocab_size=512, sliding_window=64):
        assert 1 / 3 < ratio < 1.25


@pytest.mark.parametrize("side", [24, 60])
def test_planned_and_measured_are_close_for_an_image(side: int) -> None:
    vision = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    model = random_model(vision=VISION | vision | {"intermediate_size": 128, "position_embedding_size": 128})
    weights, patches = parameter_bytes(model), side * side
    plan = plan_memory(model.config, weights, [16], element_bytes=4, on_cpu=True, patches=patches)
    positions = mx.array([[(column, row) for row in range(side) for column in range(side)]], dtype=mx.int32)
    mx.eval(model.parameters(), positions)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model.embed_images(mx.zeros((1, patches, 3 * VISION["patch_size"] ** 2)), positions))
    ratio = (mx.get_peak_memory() - before) / plan.image
    print(f"{patches} patches: measured {ratio:.2f} of the plan")
    assert 1 / 3 < ratio < 1.25


def test_a_large_image_counts() -> None:
    vision = ModelConfig.from_dict(config_dict(VISION))
    plain, seen = (plan_memory(vision, 0, [400], patches=patches) for patches in (0, 10_080))
    assert seen.image > seen.prefill > plain.prefill and plain.image == 0
    assert seen.total - plain.total == seen.image - plain.temporaries


def test_every_row_of_a_step_counts() -> None:
    layers = ["full_attention"] * 3
    model = random_model(max_position_embeddings=8192, layer_types=layers, hidden_size=64, sliding_window=8)
    C, D, tokens = model.config.canvas_length, model.config.text.hidden_size, 3000
    cache = model.make_cache()
    for _ in encode(model, cache, tuple(range(2, 90)) * 34 + (5,) * 8, 512):
        pass
    measured = []
    for rows in (1, 4):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        canvases, soft = [mx.zeros(C, mx.int32)] * rows, [mx.zeros((C, D))] * rows
        mx.eval(model.denoise(canvases, soft, [cache.views()] * rows, [mx.array(tokens)] * rows))
        measured.append(mx.get_peak_memory() - before)
    alone, together, few = (
        plan_memory(model.config, 0, [tokens] * count, element_bytes=4, on_cpu=True, rows=rows).step
        for count, rows in ((1, None), (4, None), (4, 2))
    )
    print(
        f"measured {measured[0] / 1e6:.2f}, {measured[1] / 1e6:.2f} MB, planned {alone / 1e6:.2f}, {together / 1e6:.2f}"
    )
    assert together == 2 * few
    assert few / 2 < alone < few  # a step of one canvas may encode as many tokens of the prefix along
    assert measured[1] > 2 * measured[0], "rows share their temporaries: the plan is too large"
    assert measured[1] < together


def test_a_tail_and_frozen_rows_are_in_the_plan() -> None:
    """A step of one canvas that encodes as many tokens of the prefix, and keeps what every layer sees of the canvas."""
    model = random_model(max_position_embeddings=8192, hidden_size=128, sliding_window=64)
    model.join_projections()
    C, D, tokens = model.config.canvas_length, model.config.text.hidden_size, 500
    cache = model.make_cache()
    cache.reserve(tokens + C)
    mx.eval(model.prefill(mx.arange(tokens) % 90, cache), cache.arrays())
    canvas, soft = mx.zeros(C, mx.int32), mx.zeros((C, D))
    mx.eval(canvas, soft)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seen: list[list[KeysAndValues]] = []
    mx.eval(model.encode_and_denoise(Tail(mx.arange(C), cache), canvas, soft, seen=seen), seen)
    measured = mx.get_peak_memory() - before
    kept = sum(array.nbytes for layer in seen for view in layer for array in view)
    held = mx.get_active_memory()
    seen.clear()
    assert kept <= held - mx.get_active_memory() < 1.2 * kept  # and nothing that they are slices of
    plain, freezing = (
        plan_memory(model.config, 0, [tokens + C], element_bytes=4, on_cpu=True, freezing=count).step
        for count in (0, 1)
    )
    assert freezing - plain == 2 * kept
    assert freezing / 3 < measured < freezing


def test_a_policy_that_freezes_is_seen_by_the_plan(tiny_folder: Path) -> None:
    prepare = load(tiny_folder).preparer
    for policy, freezes in (("exact", False), ("balanced", False), ("fast", True)):
        [wanted], _ = request_sizes([prepare("hello", {"policy": policy})])
        assert wanted.freezes is freezes


def test_parameters_are_counted_before_they_are_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "m")
    save_tokenizer(folder)
    loaded = load_checkpoint(folder)
    expected = sum(array.nbytes for _, array in tree_flatten(loaded.model.parameters()))
    assert loaded.report is not None
    assert parameter_bytes(loaded.model) == loaded.report.nbytes == expected


# -- limits and refusals --------------------------------------------------------------------------------------------


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.physical_memory()
    assert machine > GB / 4
    for text, expected in (("123456\n", 123_456), ("max\n", None), (str(1 << 63), None)):
        (tmp_path / "limit").write_text(text)
        monkeypatch.setattr(memory, "CGROUP_LIMITS", (str(tmp_path / "limit"), str(tmp_path / "missing")))
        found = memory.physical_memory()
        assert found == expected if expected else found >= machine


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"max_recommended_working_set_size": 11, "memory_size": 16}, 11),  # Metal
        ({"total_memory": 80}, 80),
        ({"device_name": "?"}, 7),
    ],
)
def test_the_limit_of_a_gpu(info: dict, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setattr(mx, "get_memory_limit", lambda: 7)
    assert memory.machine_limit() == expected


def test_a_checkpoint_that_cannot_fit_is_not_read(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*arrays: object) -> None:
        assert not isinstance(arrays[0], dict), "the parameters were read"
        real(*arrays)

    real = mx.eval
    monkeypatch.setattr(mx, "eval", evaluate)
    with pytest.raises(AssertionError, match="the parameters were read"):
        load_checkpoint(source)
    message = (
        r"^this checkpoint needs at least [\d.]+ MB of memory \(weights [\d.]+ MB, keys and values 0\.00 MB, "
        r"temporaries [\d.]+ MB\); expected at most 0\.10 MB; use a checkpoint with fewer bits, or another memory "
        r"limit$"
    )
    with pytest.raises(MemoryLimitError, match=message):
        load_checkpoint(source, memory_limit=1e-4)


def test_the_environment_sets_a_limit_too(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "2.5")
    assert memory.limit_bytes(None) == 2_500_000_000
    assert memory.limit_bytes(1.0) == GB  # an argument comes first
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "1e-4")
    with pytest.raises(MemoryLimitError, match=r"expected at most 0\.10 MB"):
        load_checkpoint(source)
    for wrong in ("lots", "0", "nan"):
        monkeypatch.setenv(memory.LIMIT_VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"{memory.LIMIT_VARIABLE}: got .*{wrong}.*, expected"):
            load_checkpoint(source)


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), "much"])
def test_a_limit_is_a_positive_number(limit: object, source: Path) -> None:
    with pytest.raises(ValueError, match=r"memory_limit: got .*expected"):
        load_checkpoint(source, memory_limit=limit)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def checkpoint(tiny_folder: Path) -> Checkpoint:
    """A random model behind the bundled tokenizer, with a context of 262,144."""
    return bundled_checkpoint(Tokenizer.load(tiny_folder), max_position_embeddings=262_144)


def needs(checkpoint: Checkpoint, max_tokens: int) -> int:
    budget = MemoryBudget(checkpoint.config, parameter_bytes(checkpoint.model), 4)
    prepared = Pipeline(checkpoint).prepare("go", {"max_tokens": max_tokens})
    return budget.plan(*request_sizes([prepared])).total


def test_a_request_that_cannot_fit_is_refused_before_it_begins(checkpoint: Checkpoint) -> None:
    limit = needs(checkpoint, 16) * 1.001 / GB
    pipeline = Pipeline(checkpoint, memory_limit=limit)
    assert pipeline.generate("go", max_tokens=16, seed=1).finish_reason in ("stop", "length")
    message = (
        r"^a prompt of \d+ tokens with max_tokens 100,000 needs [\d.]+ GB of memory \(weights .*, keys and values "
        r"25\.\d+ MB, .*\); expected at most [\d.]+ MB; ask for fewer tokens, or set kv_bits to 8 or 4$"
    )
    with pytest.raises(MemoryLimitError, match=message):
        pipeline.stream("go", max_tokens=100_000)
    with pytest.raises(MemoryLimitError, match=r"^3 requests of [\d,]+ tokens need .*; ask for fewer tokens, or"):
        pipeline.generate_batch(["go"] * 3, max_tokens=16)


def test_packed_keys_and_values_let_more_fit(checkpoint: Checkpoint) -> None:
    limit = (needs(checkpoint, 100_000) - 10_000_000) / GB  # of 25.6 MB of keys and values, packed 4.8 MB
    with pytest.raises(MemoryLimitError):
        Pipeline(checkpoint, memory_limit=limit).stream("go", max_tokens=100_000)
    packed = Pipeline(checkpoint, memory_limit=limit, kv_bits=4, kv_group_size=32)
    assert packed.memory.limit == int(limit * GB)
    packed.stream("go", max_tokens=100_000)
    with pytest.raises(MemoryLimitError, match=r"ask for fewer tokens$"):
        packed.stream("go", max_tokens=262_000, seed=1)


def test_the_command_line_refuses_with_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_in_process(generate.main, capsys, "--model", "tiny", "-p", "x", "--memory-limit", "0.001")
    assert (code, out) == (2, "")
    assert err.startswith("error: this checkpoint needs at least ")
    assert len(err.splitlines()) == 1


def test_the_command_line_hands_the_options_of_loading_on(
    capsys: pytest.CaptureFixture[str], fake, monkeypatch
) -> None:
    pipeline = fake(canvases=[["Hello"]])
    given: dict = {}
    monkeypatch.setattr("mlx_diffusiongemma.pipeline.load", lambda model, **options: given.update(options) or pipeline)
    arguments = (
        "-p",
        "x",
        "--kv-bits",
        "4",
        "--kv-group-size",
        "32",
        "--memory-limit",
        "12.5",
        "--no-sparse-self-conditioning",
    )
    assert run_in_process(generate.main, capsys, *arguments)[0] == 0
    assert (given["kv_bits"], given["kv_group_size"], given["memory_limit"]) == (4, 32, 12.5)
    assert given["sparse_self_conditioning"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kv-bits", "3"], "kv_bits: got 3, expected 4 or 8"),
        (
            ["--kv-bits", "8", "--kv-group-size", "128"],
            "kv_group_size: got 128 for full-attention heads of 64, expected 32 or 64",
        ),
        (["--kv-group-size", "64"], "kv_group_size: got 64 without kv_bits, expected both"),
    ],
)
def test_packing_that_cannot_be_done(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run_in_process(generate.main, capsys, "--model", "tiny", "-p", "x", *arguments)
    assert (code, err) == (2, f"error: {message}\n")
