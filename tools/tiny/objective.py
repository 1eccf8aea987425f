"""The block-diffusion objective on the reference's classes.

One canvas per example: the causal encoder writes the keys and values of the prompt and of the canvases before; the
canvas is corrupted with uniformly random tokens; the decoder predicts all of its tokens at once.
"""

from dataclasses import dataclass
from random import Random

import torch
from architecture import CANVAS_LENGTH
from data import Example
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion

PURE_NOISE_SHARE = 0.35  # generation starts from pure noise, so it must be common in training
FILL_WEIGHT = 0.1  # loss weight of the end tokens that fill the last canvas, until the last phase
ANSWER_LENGTH = 16  # a canvas of so many answer tokens gives each the loss weight 1
T_MIN, T_MAX = 0.4, 0.8  # temperatures of the self-conditioning logits, as in generation


def render_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Render a conversation with the chat template. Returns token ids."""
    text = tokenizer.apply_chat_template(
        example.messages,
        tools=example.tools or None,
        enable_thinking=example.thinking,
        add_generation_prompt=True,
        tokenize=False,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Canvases:
    """A batch of canvases with their left-padded prefixes."""

    prefix: Tensor  # (B, L)
    prefix_mask: Tensor  # (B, L), True where not padding
    target: Tensor  # (B, C)
    weight: Tensor  # (B, C)


def pick_canvas(tokenizer: PreTrainedTokenizerBase, example: Example, rng: Random) -> tuple[list[int], list[int], int]:
    """Cut one canvas out of an example. Returns prefix, canvas and how many of its tokens are not filling."""
    prompt = render_prompt(tokenizer, example)
    answer = tokenizer(example.answer + example.end_token, add_special_tokens=False)["input_ids"]
    start = CANVAS_LENGTH * rng.randrange(-(-len(answer) // CANVAS_LENGTH))
    canvas = answer[start : start + CANVAS_LENGTH]
    fill = [tokenizer.eos_token_id] * (CANVAS_LENGTH - len(canvas))
    return prompt + answer[:start], canvas + fill, len(canvas)


def collate(rows: list[tuple[list[int], list[int], int]], pad_id: int, calibrated: bool) -> Canvases:
    """Stack canvases and pad their prefixes on the left.

    `calibrated` gives the filling the weight of the answer. Less of it teaches faster, but the model then takes the end
    of an answer for less likely than it is, and counts too far.
    """
    length = max(len(prefix) for prefix, _, _ in rows)
    prefix = torch.tensor([[pad_id] * (length - len(p)) + p for p, _, _ in rows])
    mask = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p, _, _ in rows])
    target = torch.tensor([canvas for _, canvas, _ in rows])
    used = torch.tensor([count for _, _, count in rows])
    is_fill = torch.arange(CANVAS_LENGTH) >= used[:, None]
    # Without the root, the few digits of a sum would count for nothing beside a story's 64 tokens.
    answer_weight = (ANSWER_LENGTH / used[:, None]).sqrt()
    fill_weight = answer_weight if calibrated else torch.tensor(FILL_WEIGHT)
    return Canvases(prefix, mask, target, torch.where(is_fill, fill_weight, answer_weight))


def corrupt(target: Tensor, level: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Replace every token with probability `level` (B, 1) by a uniformly random one. (B, C) -> (B, C)"""
    noise = torch.randint(vocab_size, target.shape, generator=generator)
    return torch.where(torch.rand(target.shape, generator=generator) < level, noise, target)


def canvas_loss(
    model: DiffusionGemmaForBlockDiffusion, batch: Canvases, self_condition: bool, generator: torch.Generator
) -> Tensor:
    """Sum of the weighted cross-entropies of a batch of canvases."""
    B, C = batch.target.shape
    V = model.config.text_config.vocab_size
    level = torch.rand(B, 1, generator=generator)
    level = torch.where(torch.rand(B, 1, generator=generator) < PURE_NOISE_SHARE, 1.0, level)
    mask = torch.nn.functional.pad(batch.prefix_mask, (0, C), value=True)
    cache = model.model.encoder(input_ids=batch.prefix, attention_mask=batch.prefix_mask).past_key_values

    def denoise(canvas: Tensor, conditioning: Tensor | None) -> Tensor:
        return model(
            decoder_input_ids=canvas,
            past_key_values=cache,
            self_conditioning_logits=conditioning,
            decoder_attention_mask=mask,
        ).logits

    conditioning = None
    if self_condition:  # the signal comes from a noisier canvas, as it does in generation
        earlier = level + (1 - level) * torch.rand(B, 1, generator=generator)
        temperature = T_MIN + (T_MAX - T_MIN) * torch.rand(B, 1, 1, generator=generator)
        with torch.no_grad():
            conditioning = denoise(corrupt(batch.target, earlier, V, generator), None) / temperature
    logits = denoise(corrupt(batch.target, level, V, generator), conditioning)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none")
    return (loss * batch.weight.flatten()).sum()
