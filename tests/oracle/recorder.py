"""Run the reference's own `generate`, unmodified, and write down what it draws and decides.

Functions are wrapped, never replaced: every wrapper calls the original and keeps a copy of what goes in or comes out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationMixin,
    EntropyBoundSampler,
)

from mlx_diffusiongemma.media import ImageBlock

from .records import CanvasRecord, SequenceRecord

RARE = 1e-6  # an accepted token rarer than this has a bin too narrow to hit with float32 sums of another order


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy on the host; ids as int32."""
    array = tensor.detach().cpu().numpy().copy()
    return array.astype(np.int32) if array.dtype == np.int64 else array


def midpoint_uniforms(probabilities: torch.Tensor, draw: torch.Tensor) -> np.ndarray:
    """Return for each drawn id [..] the middle of its bin in the float64 CDF of probabilities [.., V]; float32."""
    wide = probabilities.double()
    cdf = wide.cumsum(-1) / wide.sum(-1, keepdim=True)
    upper = cdf.gather(-1, draw[..., None])[..., 0]
    own = (wide / wide.sum(-1, keepdim=True)).gather(-1, draw[..., None])[..., 0]
    return _numpy((upper - own / 2).float())


class Recorder:
    """Collects the steps of one `generate` call. Arrays are [B, ...]; rows are taken apart at the end."""

    def __init__(self, entropy_bound: float) -> None:
        self._bound = entropy_bound
        self._noise: list[np.ndarray] = []  # since the last step or canvas
        self._step: dict[str, Any] = {}
        self.canvases: list[dict[str, Any]] = []  # {"first": [B, C], "steps": [...]}

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Wrap the reference's functions while inside."""
        with ExitStack() as stack:
            for owner, name, wrapper in (
                (EntropyBoundSampler, "initialize_canvas", self._wrap_noise),
                (EntropyBoundSampler, "accept_canvas", self._wrap_accept),
                (torch, "multinomial", self._wrap_draw),
                (DiffusionGemmaGenerationMixin, "_prepare_denoiser_inputs", self._wrap_canvas),
                (DiffusionGemmaGenerationMixin, "_denoising_step", self._wrap_step),
            ):
                stack.enter_context(patch.object(owner, name, wrapper(getattr(owner, name))))
            yield

    def _wrap_noise(self, original: Any) -> Any:
        def initialize_canvas(*args: Any, **kwargs: Any) -> torch.Tensor:
            canvas = original(*args, **kwargs)
            self._noise.append(_numpy(canvas))
            return canvas

        return initialize_canvas

    def _wrap_canvas(self, original: Any) -> Any:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            self._noise.clear()
            inputs = original(*args, **kwargs)
            self.canvases.append({"first": self._noise[-1], "steps": []})
            return inputs

        return prepare

    def _wrap_draw(self, original: Any) -> Any:
        def multinomial(probabilities: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            draw = original(probabilities, *args, **kwargs)
            self._step.update(probabilities=probabilities, draw=draw[:, 0])
            return draw

        return multinomial

    def _wrap_accept(self, original: Any) -> Any:
        def accept_canvas(sampler: Any, current: Any, denoised: Any, logits: torch.Tensor, cur_step: Any) -> Any:
            canvas = original(sampler, current, denoised, logits, cur_step)
            best = logits.topk(2, dim=-1).values
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            ascending = entropy.sort(-1).values
            before = ascending.cumsum(-1) - ascending
            self._step.update(
                accepted=_numpy(sampler.accepted_token_mask),
                mean_entropy=_numpy(entropy.mean(-1)),
                accept_margin=_numpy((before - self._bound).abs().min(-1).values),
                argmax_margin=_numpy((best[..., 0] - best[..., 1]).min(-1).values),
            )
            return canvas

        return accept_canvas

    def _wrap_step(self, original: Any) -> Any:
        def denoising_step(*args: Any, **kwargs: Any) -> Any:
            self._noise.clear()
            self._step = {"frozen": _numpy(kwargs["finished_denoising"])}  # the step changes it in place
            outputs = original(*args, **kwargs)
            B, C = outputs[0].shape
            step, probabilities, draw = self._step, self._step.pop("probabilities"), self._step.pop("draw")
            step["draw"] = _numpy(draw.view(B, C))
            step["uniforms"] = midpoint_uniforms(probabilities, draw).reshape(B, C)
            step["drawn_probability"] = _numpy(probabilities.gather(-1, draw[:, None]).view(B, C))
            step["noise"] = self._noise[-1]
            step["canvas"], step["argmax"] = (_numpy(ids) for ids in outputs[:2])
            step["finished"] = _numpy(outputs[3])
            self.canvases[-1]["steps"].append(step)
            return outputs

        return denoising_step


def record(
    model: DiffusionGemmaForBlockDiffusion,
    prompts: Sequence[Sequence[int]],
    seed: int,
    entropy_bound: float,
    end_ids: Sequence[int],
    blocks: Sequence[Sequence[ImageBlock]] = (),
    **options: Any,
) -> list[SequenceRecord]:
    """Generate for a batch of prompts, padded on the left where lengths differ; return one record per prompt.

    `blocks` has the images and frames of each prompt.
    """
    longest = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    options |= image_inputs(model, input_ids, [longest - len(prompt) for prompt in prompts], blocks)
    input_ids, mask = input_ids.to(model.device), mask.to(model.device)
    masked = {} if bool(mask.all()) else {"attention_mask": mask}
    recorder = Recorder(entropy_bound)
    torch.manual_seed(seed)
    with recorder.recording():
        output = model.generate(input_ids, eos_token_id=list(end_ids), pad_token_id=0, **masked, **options)
    answers = output.sequences[:, longest:].tolist()
    rows = [_row(recorder, row, tuple(p), tuple(answers[row]), end_ids) for row, p in enumerate(prompts)]
    _check_passes(rows, output, answers)
    return rows


def image_inputs(
    model: DiffusionGemmaForBlockDiffusion,
    input_ids: torch.Tensor,
    padding: Sequence[int],
    blocks: Sequence[Sequence[ImageBlock]],
) -> dict[str, torch.Tensor]:
    """Write the image token into input ids [B, L] where images stand; return what `generate` takes beside them.

    Frames of a video get the image token too, the only one that the reference replaces, and type 2 as its Gemma 4
    processor writes it. `padding` has the number of padding tokens on the left of each row.
    """
    if not any(blocks):
        return {}
    types = torch.zeros_like(input_ids)
    for row, places in enumerate(blocks):
        for block in places:
            span = slice(*(padding[row] + place for place in block.span))
            input_ids[row, span] = model.config.image_token_id
            types[row, span] = 1 if block.kind == "image" else 2
    images = [block.image for places in blocks for block in places]
    longest = max(len(image.patches) for image in images)
    pixels = torch.zeros((len(images), longest, images[0].patches.shape[1]))
    positions = torch.full((len(images), longest, 2), -1)
    for index, image in enumerate(images):
        pixels[index, : len(image.patches)] = torch.from_numpy(image.patches)
        positions[index, : len(image.patches)] = torch.from_numpy(image.position_ids)
    return {"pixel_values": pixels, "image_position_ids": positions, "mm_token_type_ids": types}


def _row(
    recorder: Recorder, row: int, prompt: tuple[int, ...], answer: tuple[int, ...], end_ids: Sequence[int]
) -> SequenceRecord:
    canvases = []
    for batch in recorder.canvases:
        canvases.append(_canvas(batch, row))
        if set(canvases[-1].committed.tolist()) & set(end_ids):
            break  # later canvases of this row are thrown away by the reference
    return SequenceRecord(prompt, tuple(canvases), answer)


def _canvas(batch: dict[str, Any], row: int) -> CanvasRecord:
    steps = [step for step in batch["steps"] if not step["frozen"][row]]
    arrays = {
        key: np.stack([step[key][row] for step in steps])
        for key in (
            "uniforms noise draw accepted argmax canvas mean_entropy accept_margin argmax_margin drawn_probability"
        ).split()
    }
    rarest = arrays.pop("drawn_probability")[arrays["accepted"]].min()
    if rarest < RARE:
        raise ValueError(f"the reference accepted a token of probability {rarest:.1e}; take another seed")
    return CanvasRecord(batch["first"][row], **arrays, finished=bool(steps[-1]["finished"][row]))


def _check_passes(rows: list[SequenceRecord], output: Any, answers: list[list[int]]) -> None:
    """Compare our count of steps with the reference's own tokens per forward."""
    for row, answer, rate in zip(rows, answers, output.tokens_per_forward.tolist(), strict=True):
        steps = sum(canvas.steps for canvas in row.canvases)
        if abs(sum(token != 0 for token in answer) / steps - rate) > 1e-5:
            raise RuntimeError(f"recorded {steps} steps, but the reference reports {rate} tokens per forward")
