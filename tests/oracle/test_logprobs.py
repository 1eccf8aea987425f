"""Log-probabilities against the reference's own logits: of every step of a run, and of its encoder for scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSampler

from mlx_diffusiongemma.prompt import Prompt
from mlx_diffusiongemma.scoring import score_prompt

from .recorder import record
from .reference import Spec, build, generation_options, save
from .replay import load_without_tokenizer, replay
from .tolerances import LOGPROBS

pytestmark = pytest.mark.oracle

STEPS = 24
END_IDS = (1,)


@pytest.mark.parametrize(
    ("spec", "max_new_tokens"), [(Spec(), 24), (Spec(seed=22, embedding_std=1.0), 20)], ids=["unsettled", "settling"]
)
def test_those_of_a_run_equal_the_reference(spec: Spec, max_new_tokens: int, tmp_path: Path) -> None:
    """The reference's logits are taken where it hands them to its sampler, divided by the step's temperature."""
    seen: list[torch.Tensor] = []
    accept = EntropyBoundSampler.accept_canvas

    def keeping(sampler: Any, current: Any, denoised: Any, logits: torch.Tensor, cur_step: Any) -> Any:
        seen.append(logits[0].double())
        return accept(sampler, current, denoised, logits, cur_step)

    prompt = [3 + (7 * i + spec.seed) % 93 for i in range(11)]
    numbers = {"max_new_tokens": max_new_tokens, "max_denoising_steps": STEPS, "confidence_threshold": 0.7}
    options = generation_options(1.0, **numbers)
    reference = build(spec)
    with patch.object(EntropyBoundSampler, "accept_canvas", keeping):
        [expected] = record(reference, [prompt], spec.seed, 1.0, END_IDS, **options)
    saved = generation_options(1.0, **numbers, eos_token_id=list(END_IDS), pad_token_id=0)
    pipeline = load_without_tokenizer(save(reference, tmp_path, **saved))
    [(_, result)] = replay(pipeline, [expected], logprobs=3, logprob_candidates=(5, 9))
    assert result.logprobs is not None
    assert len(result.logprobs) == len(result.token_ids) == len(expected.kept(END_IDS, max_new_tokens)) > 8
    t_min, t_max = pipeline.generation_config.t_min, pipeline.generation_config.t_max
    worst, C, steps = 0.0, spec.canvas_length, iter(seen)
    canvases = [
        [next(steps) * (t_min + (t_max - t_min) * (STEPS - step) / STEPS) for step in range(canvas.steps)]
        for canvas in expected.canvases
    ]
    for position, entry in enumerate(result.logprobs):
        rows = [torch.log_softmax(logits[position % C], -1).numpy() for logits in canvases[position // C]]
        drafts = expected.canvases[position // C].argmax[:, position % C]
        settled = max([0] + [step + 1 for step in range(len(drafts)) if drafts[step] != drafts[-1]])
        assert (entry.token_id, entry.settled_step) == (drafts[-1], settled + 1)
        best = np.argsort(-rows[-1])[:3]
        assert [token_id for token_id, _ in entry.top] == best.tolist()
        ours = [entry.logprob, entry.settled_logprob, *(value for _, value in entry.top), *entry.candidates]
        theirs = [rows[-1][entry.token_id], rows[settled][entry.token_id], *rows[-1][best], *rows[-1][[5, 9]]]
        worst = max(worst, float(np.abs(np.array(ours) - np.array(theirs)).max()))
    print(f"worst: log-probability {worst:.1e} nats; settled in {sorted({e.settled_step for e in result.logprobs})}")
    assert worst <= LOGPROBS


@pytest.mark.parametrize("step_size", [1, 8, 2048])
def test_a_score_equals_that_of_the_reference(step_size: int, tmp_path: Path) -> None:
    """Its encoder's states, its head, its soft cap."""
    reference = build(Spec())
    prompt = [3 + 7 * i % 93 for i in range(29)]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        hidden = reference(input_ids=ids, decoder_input_ids=ids[:, :8]).encoder_last_hidden_state[0]
        cap = reference.config.text_config.final_logit_softcapping
        logits = torch.tanh(reference.lm_head(hidden).double() / cap) * cap
    rows = torch.log_softmax(logits, -1).numpy()[:-1]
    expected = rows[np.arange(28), prompt[1:]]
    model = load_without_tokenizer(save(reference, tmp_path)).model
    score = score_prompt(model, Prompt("", tuple(prompt), False), first=0, top=2, step_size=step_size)
    assert score.token_ids == tuple(prompt)
    assert score.tokens[0].logprob is None
    worst = float(np.abs(np.array([token.logprob for token in score.tokens[1:]]) - expected).max())
    print(f"worst: score {worst:.1e} nats")
    assert worst <= LOGPROBS
    assert [[i for i, _ in token.top] for token in score.tokens[1:]] == np.argsort(-rows, -1)[:, :2].tolist()
    assert score.total == pytest.approx(expected.sum(), abs=28 * LOGPROBS)
