"""How much memory a checkpoint and its requests need, estimated before anything is computed.

    weights + keys and values of every request + the largest of: one chunk of prefill, one image, one denoising step

Keys and values are exact. The temporaries count the arrays that exist at one time where most do, and are compared with
measured peaks by the tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from .cache import KVQuantization
from .config import ModelConfig, TextConfig, VisionConfig, check_number
from .masks import fits_at_once, query_block
from .options import DEFAULT_PREFILL_STEP_SIZE
from .vocabulary import CHUNK_ELEMENTS_CPU, CHUNK_ELEMENTS_GPU, MIN_CHUNK_ROWS

GB = 10**9
SCORE_ARRAYS = 2  # of one block: scores and their softmax
BLOCKS_AT_ONCE = 2  # MLX hands out memory for the next block while the one before is still being computed
FROZEN_ARRAYS = 2  # of a canvas: what the last step saw of all rows, and what the next one takes of it
VOCABULARY_ARRAYS = 5  # float32 arrays of one chunk of the vocabulary pass
LIMIT_VARIABLE = "MLX_DIFFUSIONGEMMA_MEMORY_LIMIT"  # GB, for command lines without --memory-limit
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class MemoryLimitError(ValueError):
    """A checkpoint or a request that does not fit; the message is one line with the numbers."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes, by what needs them."""

    weights: int
    keys_and_values: int
    prefill: int  # temporaries of one chunk
    step: int  # temporaries of one denoising step
    image: int = 0  # temporaries of the largest image in the vision tower

    @property
    def temporaries(self) -> int:
        """What one thread does comes one after the other."""
        return max(self.prefill, self.step, self.image)

    @property
    def total(self) -> int:
        """Everything that is needed at one time."""
        return self.weights + self.keys_and_values + self.temporaries

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("keys and values", self.keys_and_values),
            ("temporaries", self.temporaries),
        )
        return ", ".join(f"{name} {gigabytes(nbytes)}" for name, nbytes in parts)


class Wanted(NamedTuple):
    """What one request asks for."""

    prompt_tokens: int
    max_tokens: int
    patches: int = 0  # of the largest image
    freezes: bool = False  # whether its policy keeps keys and values of rows of the canvas


def gigabytes(nbytes: int) -> str:
    """Return bytes as text, in units of 10^9."""
    return f"{nbytes / GB:.2f} GB" if nbytes >= GB / 10 else f"{nbytes / 1e6:.2f} MB"


def stored_tokens(config: ModelConfig, wanted: Wanted) -> int:
    """Return how many tokens the cache of a request holds at most: the prompt and every canvas but the last."""
    C = config.canvas_length
    canvases = max(0, -(-wanted.max_tokens // C) - 1)
    return min(wanted.prompt_tokens + canvases * C, config.text.max_position_embeddings)


def kv_bytes(text: TextConfig, tokens: int, kv: KVQuantization | None = None, element_bytes: int = 2) -> int:
    """Return the bytes of the keys and values of one sequence.

    Args:
        text: the stack.
        tokens: in the sequence; a sliding layer keeps the last `sliding_window - 1` of them.
        kv: how full-attention layers pack theirs; None for not at all.
        element_bytes: of the model's dtype.
    """
    nbytes = 0
    for kind in text.layer_types:
        shape = text.attention_shape(kind)
        heads, H = shape.num_key_value_heads, shape.head_dim
        if kind == "sliding_attention":
            nbytes += 2 * min(tokens, text.sliding_window - 1) * heads * H * element_bytes
        else:
            per_head = H * element_bytes if kv is None else H * kv.bits // 8 + 2 * element_bytes * (H // kv.group_size)
            nbytes += 2 * tokens * heads * per_head
    return nbytes


def plan_memory(
    config: ModelConfig,
    weight_bytes: int,
    lengths: Sequence[int],
    *,
    kv: KVQuantization | None = None,
    chunk: int = DEFAULT_PREFILL_STEP_SIZE,
    element_bytes: int = 2,
    on_cpu: bool = False,
    patches: int = 0,
    rows: int | None = None,
    freezing: int = 0,
) -> MemoryPlan:
    """Estimate what requests that run together need.

    Args:
        config: of the model.
        weight_bytes: of the weights.
        lengths: tokens in the cache of each request at the end.
        kv: how full-attention layers pack keys and values.
        chunk: tokens of a prompt encoded at a time, one prompt after the other.
        element_bytes: of the model's dtype.
        on_cpu: whether MLX's CPU back end runs the model; it reads the vocabulary in smaller chunks.
        patches: of the largest image; images go through the tower one by one.
        rows: canvases of one step; None for one of every request.
        freezing: how many of the requests keep keys and values of rows of their canvases.
    """
    text, C = config.text, config.canvas_length
    longest = max(lengths)
    together = sorted(lengths)[-rows:] if rows else lengths  # the longest ones, in the worst case
    canvases = len(together)
    chunk = min(chunk, longest)
    prefill = _activations(text, chunk) + _window_copies(text, chunk) + _scores(text, chunk, longest)
    if patches:
        prefill += chunk * text.hidden_size  # soft tokens
    context = text.max_position_embeddings
    if len(together) == 1 and fits_at_once(text.num_attention_heads, C, together[0] + C):
        together = [*together, *together]  # a step of one canvas may encode as many tokens of the prefix along
    scores = sum(_scores(text, C, min(length + C, context)) for length in together)
    step = len(together) * (_activations(text, C) + _window_copies(text, C)) + scores
    elements = max(CHUNK_ELEMENTS_CPU if on_cpu else CHUNK_ELEMENTS_GPU, MIN_CHUNK_ROWS * text.vocab_size)
    vocabulary = VOCABULARY_ARRAYS * 4 * min(elements, C * text.vocab_size)
    return MemoryPlan(
        weights=weight_bytes,
        keys_and_values=sum(kv_bytes(text, tokens, kv, element_bytes) for tokens in lengths),
        prefill=prefill * element_bytes,
        step=step * element_bytes
        + canvases * vocabulary
        + FROZEN_ARRAYS * freezing * kv_bytes(text, C, None, element_bytes),
        image=_image(config.vision, patches) * element_bytes if config.vision is not None else 0,
    )


def _activations(text: TextConfig, tokens: int) -> int:
    """Return how many elements one layer holds at a time: the stream, and attention or the experts."""
    shapes = [text.attention_shape(kind) for kind in set(text.layer_types)]
    D, N = text.hidden_size, text.num_attention_heads
    attention = max(3 * N * shape.head_dim + 4 * shape.num_key_value_heads * shape.head_dim for shape in shapes)
    routed = text.top_k_experts * (3 * D + 5 * text.moe_intermediate_size)  # rows in, gate and up, GeGLU, out, in order
    return tokens * (4 * D + max(attention, 3 * text.intermediate_size + routed))


def _window_copies(text: TextConfig, tokens: int) -> int:
    """Return how many elements the arrays hold in which new keys and values join those that a sliding layer keeps."""
    shape = text.attention_shape("sliding_attention")
    return 2 * 2 * (text.sliding_window + tokens) * shape.num_key_value_heads * shape.head_dim


def _scores(text: TextConfig, queries: int, keys: int) -> int:
    """Return how many elements the scores of a full-attention layer hold, and the keys that join a canvas's."""
    N = text.num_attention_heads
    shape = text.attention_shape("full_attention")
    joined = 2 * keys * shape.num_key_value_heads * shape.head_dim if fits_at_once(N, queries, keys) else 0
    block = query_block(N, keys)
    arrays = SCORE_ARRAYS * (BLOCKS_AT_ONCE if queries > block else 1)
    return arrays * N * min(queries, block) * keys + joined


def _image(vision: VisionConfig, patches: int) -> int:
    """Return how many elements one layer of the tower holds: the stream, attention or the MLP, one block of scores."""
    D, N = vision.hidden_size, vision.num_attention_heads
    pixels = 2 * 3 * vision.patch_size**2  # as they come and stretched
    attention = 4 * N * vision.head_dim + D
    return patches * (2 * D + max(pixels, attention, 3 * vision.intermediate_size)) + SCORE_ARRAYS * N * patches * min(
        patches, query_block(N, patches)
    )


# -- limits -----------------------------------------------------------------------------------------------------------


def physical_memory() -> int:
    """Return the bytes of memory that this process may use: those of the machine, or of its container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in map(Path, CGROUP_LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        total = min(total, int(text)) if text.isdigit() else total
    return total


def machine_limit() -> int:
    """Return the bytes that the default device can use: Metal's working set, the GPU's memory, or that of the CPU."""
    if mx.default_device() == mx.Device(mx.cpu):
        return physical_memory()
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if key in info:
            return int(info[key])
    return int(mx.get_memory_limit())  # CUDA: MLX sets it to what the device has


def limit_bytes(memory_limit: float | None) -> int:
    """Return the limit: the argument in GB, else that of the environment, else the machine's.

    Raises:
        ValueError: a limit that is not a positive number.
    """
    name = "memory_limit"
    given: object = memory_limit
    if memory_limit is None and LIMIT_VARIABLE in os.environ:
        name, given = LIMIT_VARIABLE, os.environ[LIMIT_VARIABLE]
        with suppress(ValueError):
            given = float(os.environ[LIMIT_VARIABLE])
    if given is None:
        return machine_limit()
    check_number(name, given, 0, exclusive=True)
    assert isinstance(given, int | float)
    return int(given * GB)


def _check(plan: MemoryPlan, limit: int, subject: str, remedy: str) -> None:
    if plan.total > limit:
        raise MemoryLimitError(
            f"{subject} {gigabytes(plan.total)} of memory ({plan}); expected at most {gigabytes(limit)}; {remedy}"
        )


def check_load(config: ModelConfig, weight_bytes: int, element_bytes: int, memory_limit: float | None) -> None:
    """Raise `MemoryLimitError` when weights and the shortest request do not fit; `memory_limit` is in GB."""
    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    plan = plan_memory(config, weight_bytes, [1], element_bytes=element_bytes, on_cpu=on_cpu)
    remedy = "use a checkpoint with fewer bits, or another memory limit"
    _check(plan, limit_bytes(memory_limit), "this checkpoint needs at least", remedy)


class MemoryBudget:
    """What the requests of one loaded model may use."""

    def __init__(
        self,
        config: ModelConfig,
        weight_bytes: int,
        element_bytes: int,
        kv: KVQuantization | None = None,
        memory_limit: float | None = None,
    ) -> None:
        """Take the numbers of a model; `memory_limit` is in GB, None for the machine's."""
        self._config = config
        self._weight_bytes = weight_bytes
        self._element_bytes = element_bytes
        self._kv = kv
        self._on_cpu = mx.default_device() == mx.Device(mx.cpu)
        self.limit = limit_bytes(memory_limit)

    def plan(
        self, requests: Sequence[Wanted], chunk: int = DEFAULT_PREFILL_STEP_SIZE, rows: int | None = None
    ) -> MemoryPlan:
        """Estimate what requests that run together need; `rows` of them share a step, None for all."""
        return plan_memory(
            self._config,
            self._weight_bytes,
            [stored_tokens(self._config, wanted) for wanted in requests],
            kv=self._kv,
            chunk=chunk,
            element_bytes=self._element_bytes,
            on_cpu=self._on_cpu,
            patches=max(wanted.patches for wanted in requests),
            freezing=sum(wanted.freezes for wanted in requests),
            rows=rows,
        )

    def fits(self, requests: Sequence[Wanted], chunk: int = DEFAULT_PREFILL_STEP_SIZE, rows: int | None = None) -> bool:
        """Tell whether requests that run together, one at least, fit; `rows` of them share a step, None for all."""
        return self.plan(requests, chunk, rows).total <= self.limit

    def check(self, requests: Sequence[Wanted], chunk: int = DEFAULT_PREFILL_STEP_SIZE) -> None:
        """Raise `MemoryLimitError` when requests that run together, one at least, do not fit."""
        if len(requests) == 1:
            [wanted] = requests
            subject = f"a prompt of {wanted.prompt_tokens:,} tokens with max_tokens {wanted.max_tokens:,} needs"
        else:
            tokens = sum(stored_tokens(self._config, wanted) for wanted in requests)
            subject = f"{len(requests)} requests of {tokens:,} tokens need"
        remedy = "ask for fewer tokens" + ("" if self._kv is not None else ", or set kv_bits to 8 or 4")
        _check(self.plan(requests, chunk), self.limit, subject, remedy)
