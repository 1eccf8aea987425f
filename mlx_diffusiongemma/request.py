"""One request on its way through the loop: prefix, canvas, committed tokens, counts and times.

The loop itself is in `pipeline.py`; what it does to one request is here, under the same numbers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np

from . import sampler
from .cache import KVQuantization, View
from .constraint import Constraint
from .denoise import (
    CanvasState,
    StepInput,
    StepOutcome,
    StepResult,
    StepRules,
    complete,
    first_state,
    place,
    plain_outcome,
)
from .events import CanvasCommitted, DenoisingStep, FinishReason, PrefillProgress, Result, Stats, TokenLogprob
from .guidance import Guide
from .logprobs import CanvasLogprobs
from .masks import chunks, fits_at_once
from .media import ImageBlock, count_media
from .memory import Wanted, stored_tokens
from .model import DiffusionGemma, Tail
from .options import Options
from .output import OutputDelta, OutputParser, ToolCall
from .pacing import Pacer
from .policies import EXACT, Policy, find_policy
from .prefill import EmbedImage, encode
from .prefixes import Prefixes
from .segments import prefix_keys
from .vocabulary import DrawShape, TextOnly

MAX_WIDE_SHARE = 0.25  # of the positions of a canvas, up to which sparse soft embeddings are worth a try
WIDE_ENTROPY = 1.0  # nats: above it a position probably needs more tokens than a sparse sum takes
RESERVED_ANSWER = 4096  # tokens of the answer that get room at once; longer answers are rare


class Request:
    """State of one request. Ends when `finish_reason` is set."""

    def __init__(
        self,
        model: DiffusionGemma,
        prompt_ids: tuple[int, ...],
        options: Options,
        seed: int,
        end_ids: frozenset[int],
        parser: OutputParser,
        blocks: Sequence[ImageBlock] = (),
        embed_image: EmbedImage | None = None,
        system_tokens: int = 0,
        prefixes: Prefixes | None = None,
        kv: KVQuantization | None = None,
        constraint: Constraint | None = None,
        control: mx.array | None = None,
        sparse: bool = False,
    ) -> None:
        """Hold what a request needs; nothing is computed yet.

        Args:
            model: the network.
            prompt_ids: [L], at least one, that fit the context with a canvas behind them.
            options: of this request.
            seed: of its random numbers.
            end_ids: tokens that end the answer.
            parser: of the answer.
            blocks: images among the prompt's tokens.
            embed_image: gives their soft tokens.
            system_tokens: length of the system turn, at the start of the prompt.
            prefixes: what is known of earlier prompts; None reuses nothing.
            kv: how full-attention layers pack keys and values; None for not at all.
            constraint: what the answer must satisfy; None for nothing.
            control: [V] bool, the tokens that are not text; needed where positions may only take text.
            sparse: whether steps may sum up soft embeddings sparsely, once few positions are undecided.
        """
        self.options = options
        self.finish_reason: FinishReason | None = None if options.max_tokens else "length"
        self._model = model
        self._prompt_ids = prompt_ids
        self._seed = seed
        self._end_ids = end_ids
        self._parser = parser
        self._blocks = tuple(blocks)
        self._embed_image = embed_image
        self._media = count_media(blocks)
        self._system_tokens = system_tokens
        self._prefixes = prefixes
        self._keys = prefix_keys(prompt_ids, blocks) if prefixes is not None else None
        self._cached_tokens = 0
        self._cache = model.make_cache(kv)
        self._state: CanvasState | None = None
        self._noise_ids: mx.array | None = None  # [C] int32 of the step under way
        self._prefix: list[View] = []
        self._offset = mx.array(0)
        self._tail: tuple[int, ...] = ()  # tokens of the prefix that the next step encodes
        self._is_saved = True  # what a step encoded
        self._pins: mx.array | None = None  # [C] int32 of this canvas, -1 where it is free
        self._pinned: tuple[bool, ...] = ()  # [C], where it is not free; empty without pins
        self._guide = (
            Guide(model, constraint, self._remembered, options.confidence_threshold) if constraint is not None else None
        )
        self._pacer = Pacer(model, self.policy, end_ids) if self.policy != EXACT else None
        self._control = control
        self._text_only: TextOnly | None = None  # of this canvas
        self._sparse = sparse
        self._may_be_sparse = self._is_sparse = False  # the steps of this canvas, its next step
        self._row: StepInput | None = None  # of the step under way, without its prefix
        self._argmax: tuple[int, ...] = ()
        self._steps: list[int] = []  # per canvas
        self._row_steps = 0  # rows of the canvas, summed over its steps
        self._token_ids: list[int] = []
        self._canvas_logprobs: CanvasLogprobs | None = None  # of this canvas, where asked for
        self._logprobs: list[TokenLogprob] | None = None if options.logprobs is None else []  # of `_token_ids`
        self._end_logprob: TokenLogprob | None = None
        self._answer = _Answer()
        self._started = self._lap = time.perf_counter()
        self._prefill_seconds = self._denoising_seconds = 0.0
        self._first_draft_seconds: float | None = None
        self._canvas_seconds: list[float] = []
        self._row_count = 0  # over all steps, of the batches that this request was part of
        self.canvas_is_done = False
        self.submitted: float | None = None  # on the clock of `time.perf_counter`, set by who let it wait

    # -- 1. prefix ----------------------------------------------------------------------------------------------

    def prefill(self) -> Iterator[PrefillProgress]:
        """Encode the prompt chunk by chunk, from where what is known of it ends; a short last one is left to a step."""
        total = len(self._prompt_ids)
        self._cache.reserve(
            min(stored_tokens(self._model.config, Wanted(total, self.options.max_tokens)), total + RESERVED_ANSWER)
        )
        self._started = time.perf_counter()
        self._start_lap()
        if self._prefixes is not None and self._keys is not None:
            self._cached_tokens = self._prefixes.restore(self._keys, self._cache)
        self._prefill_seconds += self._seconds_of_lap()
        yield PrefillProgress(self._cached_tokens, total)
        self._start_lap()
        for border in self._borders():
            start = self._cache.offset
            stop = self._start_of_tail(start) if border == total else border
            for processed in self._encode(self._prompt_ids[start:stop], self._blocks):
                if start + processed == border:
                    self._save()
                self._prefill_seconds += self._seconds_of_lap()
                yield PrefillProgress(start + processed, total)
                self._start_lap()
            self._tail = self._prompt_ids[stop:border]
        if self._tail:
            yield PrefillProgress(total, total)
        self._blocks = ()  # patches weigh more than soft tokens, and nobody needs them any more

    def _borders(self) -> list[int]:
        """Return where encoding stops to save: behind the system turn, and at the end of the prompt.

        A pass of its own is worth it for a system turn that is longer than a canvas. It does not depend on whether
        prefixes are reused, so that the answer does not either.
        """
        system = self._system_tokens if self._system_tokens > self._model.config.canvas_length else 0
        return [border for border in (system, len(self._prompt_ids)) if border > self._cache.offset]

    def _start_of_tail(self, start: int) -> int:
        """Return where the part of the prompt begins that the first step encodes: its last chunk, if that is short."""
        total, spans = len(self._prompt_ids), [block.span for block in self._blocks]
        *_, (first, _) = chunks(start, total, self.options.prefill_step_size, spans)
        has_images = any(stop > first for _, stop in spans)
        return first if not has_images and self._may_share_a_pass(total - first, total) else total

    def _may_share_a_pass(self, tokens: int, total: int) -> bool:
        """Tell whether so many tokens, the last of `total`, may go through the layers together with a canvas."""
        C, heads = self._model.config.canvas_length, self._model.config.text.num_attention_heads
        return tokens <= C and fits_at_once(heads, C, total + C)

    def _save(self) -> None:
        """Remember what is in the cache, for prompts that begin so."""
        if self._prefixes is not None and self._keys is not None:
            self._prefixes.save(self._keys[: self._cache.offset], self._cache)
        self._is_saved = True

    def _start_lap(self) -> None:
        """Start the clock. It runs while the model works, not while the caller looks at an event."""
        self._lap = time.perf_counter()

    def _seconds_of_lap(self) -> float:
        return time.perf_counter() - self._lap

    def _encode(self, token_ids: tuple[int, ...], blocks: Sequence[ImageBlock] = ()) -> Iterator[int]:
        step_size = self.options.prefill_step_size
        return encode(self._model, self._cache, token_ids, step_size, blocks, self._embed_image)

    # -- 2.a, 2.b: canvas and step ---------------------------------------------------------------------------

    @property
    def has_canvas(self) -> bool:
        """Whether a canvas is being denoised."""
        return self._state is not None

    def start_canvas(self) -> None:
        """Begin a canvas of uniform noise, or of the tokens it is given, with no self-conditioning signal."""
        self._prefix = [] if self._tail else self._cache.views()
        self._offset = mx.array(self._cache.offset + len(self._tail), dtype=mx.int32)
        rows = self._pacer.start_canvas(self._room) if self._pacer is not None else self._model.config.canvas_length
        canvas = self._noise(len(self._steps), step=0).token_ids[:rows]
        if (seeds := self._of_canvas(enumerate(self.options.seed_canvas))) is not None:
            canvas = place(seeds, canvas)
        forced = self._guide.start_canvas() if self._guide is not None else ()
        self._pins = self._of_canvas([*self.options.pins, *enumerate(forced, len(self._token_ids))])
        if self._pins is not None:
            canvas = place(self._pins, canvas)
        self._pinned = () if self._pins is None else tuple((np.array(self._pins) >= 0).tolist())
        self._text_only = self._text_only_of_canvas()
        if self.options.logprobs is not None:
            self._canvas_logprobs = CanvasLogprobs(self._model, self.options.logprobs, self.options.logprob_candidates)
        self._state = first_state(self._model, canvas, self._remembered)
        self._may_be_sparse, self._is_sparse = self._sparse, False
        self._steps.append(0)  # last: a start that failed can be repeated
        self._canvas_seconds.append(0.0)
        self.canvas_is_done = False

    @property
    def _remembered(self) -> int:
        """Canvases that the stop test compares. A threshold of all steps or more can never be met."""
        return min(self.options.stability_threshold, self.options.max_denoising_steps)

    def _of_canvas(self, tokens: Iterable[tuple[int, int]]) -> mx.array | None:
        """Return which of some (position in the answer, token id) lie in this canvas; [C] int32 with -1 elsewhere."""
        start, C = len(self._token_ids), self._model.config.canvas_length
        here = [(position - start, token_id) for position, token_id in tokens if start <= position < start + C]
        if not here:
            return None
        placed = np.full(C, -1, np.int32)
        for index, token_id in here:
            placed[index] = token_id
        return mx.array(placed)

    def _text_only_of_canvas(self) -> TextOnly | None:
        start, C = len(self._token_ids), self._model.config.canvas_length
        positions = np.zeros(C, np.bool_)
        for first, stop in self.options.text_only:
            positions[max(0, first - start) : max(0, stop - start)] = True
        if not positions.any():
            return None
        assert self._control is not None
        return TextOnly(mx.array(positions), self._control)

    @property
    def policy(self) -> Policy:
        """The policy that this request gets."""
        options = self.options
        is_free = not (options.pins or options.seed_canvas or options.text_only) and options.logprobs is None
        return find_policy(options.policy) if is_free and self._guide is None else EXACT

    @property
    def _room(self) -> int:
        """Tokens that the answer may still get."""
        return self.options.max_tokens - len(self._token_ids)

    def _noise(self, canvas_index: int, step: int) -> sampler.Noise:
        config = self._model.config
        return sampler.noise(self._seed, canvas_index, step, config.canvas_length, config.text.vocab_size)

    def step_input(self) -> StepInput:
        """Return the inputs of the next denoising step."""
        self._start_lap()
        options, step = self.options, self._steps[-1] + 1
        assert self._state is not None  # the loop starts a canvas first
        noise_proportion = sampler.noise_proportion(step, options.max_denoising_steps)
        temperature = sampler.temperature(noise_proportion, options.t_min, options.t_max)
        temperature *= options.temperature or 1.0  # 0 proposes the argmax; the plain schedule still shapes the rest
        noise, rows = self._noise(len(self._steps) - 1, step), len(self._state.canvas)
        self._noise_ids = noise.token_ids
        row = StepInput(
            self._state,
            noise if rows == len(noise.token_ids) else sampler.Noise(*(array[:rows] for array in noise)),
            mx.array(temperature, dtype=mx.float32),
            self._prefix,
            self._offset,
            self._pins if self._pacer is None else self._pacer.pins(rows),
            self._text_only,
            Tail(mx.array(self._tail, dtype=mx.int32), self._cache) if self._tail else None,
        )
        if self._pacer is not None:
            row = self._pacer.narrowed(row)
        self._row = row._replace(prefix=[], tail=None, frozen=None)  # a view that is held would make MLX copy the cache
        return row

    def rules(self) -> StepRules:
        """Return the constants of the step; the ban on an early end holds for the first canvas only."""
        options = self.options
        has_start = len(self._steps) == 1 and (self._pacer is None or self._pacer.computes_first)
        return StepRules(
            options.entropy_bound,
            options.confidence_threshold,
            DrawShape(
                options.top_k, options.top_p, options.min_p, greedy=options.temperature == 0 or self.policy.greedy
            ),
            tuple(sorted(self._end_ids)) if options.guard_empty and has_start else (),
            self._is_sparse,
        )

    def absorb(self, result: StepResult, batch_size: int = 1) -> DenoisingStep:
        """Take over an evaluated step of a batch of so many rows. Its time counts for every row.

        Raises:
            FloatingPointError: the step's entropy is not a finite number.
        """
        self._row_count += batch_size
        mean_entropy = float(result.mean_entropy.item())  # type: ignore[arg-type]
        if not math.isfinite(mean_entropy):
            raise FloatingPointError(f"the model computed {mean_entropy} in step {self._steps[-1] + 1}: bad weights?")
        step = self._outcome(self._completed(result))
        self._state, self._argmax = step.state, step.token_ids[: step.committed]
        self._steps[-1] += 1
        self._row_steps += len(result.argmax)
        if self._canvas_logprobs is not None:
            self._canvas_logprobs.absorb(result.hidden, np.array(step.token_ids))
        seconds = self._seconds_of_lap()
        if self._tail:
            share = seconds * len(self._tail) / (len(self._tail) + len(result.argmax))
            seconds -= share
            self._note_tail()
            self._add_encoding(share)
        self._denoising_seconds += seconds
        self._canvas_seconds[-1] += seconds
        if self._first_draft_seconds is None:
            self._first_draft_seconds = time.perf_counter() - self._started
        self.canvas_is_done = step.finished or self._steps[-1] == self.options.max_denoising_steps
        return DenoisingStep(
            canvas_index=len(self._steps) - 1,
            step=self._steps[-1],
            max_steps=self.options.max_denoising_steps,
            token_ids=step.token_ids,
            accepted=step.accepted,
            mean_entropy=sum(step.entropies) / len(step.entropies) if self._guide or self._pacer else mean_entropy,
            finished=step.finished,
            entropies=step.entropies,
            pinned=step.pinned,
            rows=len(result.argmax),
            seconds=seconds,
        )

    def _completed(self, result: StepResult) -> StepResult:
        """Return an evaluated step with every soft embedding, and guess whether a sparse sum serves the next one.

        A position that needs the dense sum after all costs two passes over the table instead of one, so a canvas that
        has too many of them once stays dense.
        """
        assert self._row is not None  # the step had an input
        few = MAX_WIDE_SHARE * len(result.argmax)
        if self._is_sparse:
            result = result._replace(state=complete(self._model, self._row, self.rules(), result))
            self._may_be_sparse = np.array(result.wide).sum() <= few
        self._is_sparse = self._may_be_sparse and (np.array(result.entropy) > WIDE_ENTROPY).sum() <= few
        return result

    def _outcome(self, result: StepResult) -> StepOutcome:
        """Return an evaluated step as numbers, after the constraint or the policy if there is one."""
        chooser = self._guide or self._pacer
        if chooser is None:
            return plain_outcome(result, self._pinned)
        assert self._noise_ids is not None  # the step has been asked for
        return chooser.absorb(result, self._noise_ids, self._room)

    # -- 2.c, 2.d: commit and encode -------------------------------------------------------------------------

    def commit(self) -> CanvasCommitted:
        """Append the argmax of the last step to the answer.

        It is cut at the first end token and at `max_tokens`, and a constraint may have cut it before; when that ends
        the request the parser gives up what it held back; and a stop string met on the way cuts again, perhaps inside
        an earlier canvas.
        """
        room = self._room
        if self._guide is not None:
            self._argmax = self._guide.commit()
            if self._canvas_logprobs is not None:
                self._canvas_logprobs.amend(self._argmax)
        end = next((i for i, token_id in enumerate(self._argmax) if token_id in self._end_ids), None)
        has_ended = end is not None and end < room
        kept = self._argmax[: min(room, len(self._argmax) if end is None else end)]
        delta = self._parser.feed(kept)
        committed = len(self._token_ids)
        self._token_ids.extend(kept)
        if self._logprobs is not None and self._canvas_logprobs is not None:
            self._logprobs.extend(self._canvas_logprobs.finish(len(kept) + has_ended))
            self._end_logprob = self._logprobs.pop() if has_ended else None
            self._canvas_logprobs = None
        if has_ended or (self._guide is not None and self._guide.constraint.is_complete):
            self.finish_reason = "stop"
        elif len(self._token_ids) >= self.options.max_tokens or not self._fits_another_canvas():
            self.finish_reason = "length"
        if self.finish_reason is not None or delta.stopped is not None:
            delta += self._parser.finish()
        if delta.stopped is not None:  # the stop string may have begun in an earlier canvas
            self.finish_reason = "stop"
            del self._token_ids[self._parser.token_count_at_stop :]
            if self._logprobs is not None:
                del self._logprobs[self._parser.token_count_at_stop :]
        self._answer.add(delta)
        self._state = None
        self._prefix = []  # a view that is held would make MLX copy the cache when the canvas is encoded
        kept = tuple(self._token_ids[committed:])
        logprobs = None if self._logprobs is None else tuple(self._logprobs[committed:])
        return CanvasCommitted(len(self._steps) - 1, kept, self._steps[-1], delta, logprobs)

    def _fits_another_canvas(self) -> bool:
        C = self._model.config.canvas_length
        return self._cache.offset + len(self._argmax) + C <= self._model.config.text.max_position_embeddings

    def encode_canvas(self) -> None:
        """Write the committed canvas into the prefix, with the first step of the canvas that follows if that may be."""
        self._tail = self._argmax
        if self._keys is not None:
            self._keys = np.concatenate([self._keys, prefix_keys(self._argmax)])
        if not self._may_share_a_pass(len(self._tail), self._cache.offset + len(self._tail)):
            self._encode_tail()

    @property
    def has_tail(self) -> bool:
        """Whether the end of the prefix is still to be encoded."""
        return bool(self._tail)

    @property
    def is_saved(self) -> bool:
        """Whether what a step encoded is remembered, for prompts that begin so."""
        return self._is_saved

    def save(self) -> None:
        """Remember what a step encoded. This waits for a copy, so it is no part of taking the step over."""
        if not self._is_saved:
            self._start_lap()
            self._save()
            self._add_encoding(self._seconds_of_lap())

    def encode_tail(self) -> None:
        """Encode the end of the prefix by itself, if it is still to be: a step of several canvases cannot do that."""
        if self._tail:
            self._encode_tail()

    def _encode_tail(self) -> None:
        self._start_lap()
        for _ in self._encode(self._tail):
            pass
        self._note_tail()
        self._save()
        self._add_encoding(self._seconds_of_lap())

    def _note_tail(self) -> None:
        """Take over that the end of the prefix is encoded and evaluated."""
        self._tail = ()
        self._is_saved = False
        if self._state is not None:
            self._prefix = self._cache.views()

    def _add_encoding(self, seconds: float) -> None:
        """Count time in which the prompt, or a canvas, was encoded or remembered."""
        if len(self._prompt_ids) == self._cache.offset:
            self._prefill_seconds += seconds
        else:
            self._denoising_seconds += seconds

    # -- 3. answer -------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """End here; what was committed stays."""
        if self.finish_reason is None:
            self.finish_reason = "cancelled"
            self._answer.add(self._parser.finish())

    def result(self) -> Result:
        """Return the answer of a request that has ended."""
        assert self.finish_reason is not None
        reason = self.finish_reason
        if reason == "stop" and self._answer.tool_calls:
            reason = "tool_calls"
        return Result(
            text=self._answer.text,
            reasoning=self._answer.reasoning or None,
            tool_calls=tuple(self._answer.tool_calls),
            token_ids=tuple(self._token_ids),
            finish_reason=reason,
            seed=self._seed,
            note=self._guide.missing if self._guide is not None else None,
            stats=self._stats(),
            logprobs=None if self._logprobs is None else tuple(self._logprobs),
            end_logprob=self._end_logprob,
        )

    def _stats(self) -> Stats:
        total = time.perf_counter() - self._started
        denoising = self._denoising_seconds
        steps, generated = sum(self._steps), len(self._token_ids)
        encoded = max(0, min(self._cache.offset, len(self._prompt_ids)) - self._cached_tokens)
        return Stats(
            prompt_tokens=len(self._prompt_ids),
            images=self._media.images,
            video_frames=self._media.video_frames,
            image_tokens=self._media.image_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=generated,
            canvases=len(self._steps),
            denoising_steps=tuple(self._steps),
            row_steps=self._row_steps,
            policy=self.policy.name,
            tokens_per_forward=generated / steps if steps else 0.0,
            prefill_seconds=self._prefill_seconds,
            denoising_seconds=denoising,
            canvas_seconds=tuple(self._canvas_seconds),
            queue_seconds=0.0 if self.submitted is None else self._started - self.submitted,
            first_draft_seconds=self._first_draft_seconds,
            total_seconds=total,
            prompt_tokens_per_second=encoded / self._prefill_seconds if self._prefill_seconds else 0.0,
            tokens_per_second=generated / denoising if denoising else 0.0,
            steps_per_second=steps / denoising if denoising else 0.0,
            batch_size=self._row_count / steps if steps else 0.0,
            peak_memory_gb=mx.get_peak_memory() / 1e9,
        )


class _Answer:
    """The deltas of a request, joined."""

    def __init__(self) -> None:
        self.text = ""
        self.reasoning = ""
        self.tool_calls: list[ToolCall] = []

    def add(self, delta: OutputDelta) -> None:
        self.text += delta.text
        self.reasoning += delta.reasoning
        self.tool_calls.extend(delta.tool_calls)
