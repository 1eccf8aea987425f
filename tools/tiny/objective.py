"""The block-diffusion objective on the reference's classes.

One canvas per example: the causal encoder writes the keys and values of the prompt and of the canvases before; the
canvas is corrupted with uniformly random tokens; the decoder predicts all of its tokens at once. Pictures enter as in
the reference's `generate`: the soft tokens of a picture see each other in both directions. Around a hole the canvas is
clean, and nothing is asked there; a canvas with a draft is corrupted with the draft's tokens too.
"""

from dataclasses import dataclass
from random import Random

import torch
from architecture import CANVAS_LENGTH, PICTURE_TOKENS
from data import Example
from pictures import Picture
from torch import Tensor
from tower import read_pictures
from transformers import DynamicCache, PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

PURE_NOISE_SHARE = 0.35  # generation starts from pure noise, so it must be common in training
FILL_WEIGHT = 0.1  # loss weight of the end tokens that fill the last canvas, until the last phase
ANSWER_LENGTH = 16  # a canvas of so many answer tokens gives each the loss weight 1
T_MIN, T_MAX = 0.4, 0.8  # temperatures of the self-conditioning logits, as in generation

NO_DRAFT = -1
PINNED_LOGIT = -1e4  # of all tokens but the known one

IMAGE_BLOCK = "<|image>" + "<|image|>" * PICTURE_TOKENS + "<image|>"


def render_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> list[int]:
    """Render a conversation with the chat template, with the places of its soft tokens. Returns token ids.

    Without a conversation it is the text before the canvas, as in a raw completion.

    The frames of a video are written as Gemma 4's processor writes them, but with the soft token of images, the only
    one that transformers' DiffusionGemma knows.
    """
    if example.lead is not None:
        return tokenizer(tokenizer.bos_token + example.lead, add_special_tokens=False)["input_ids"]
    text = tokenizer.apply_chat_template(
        example.messages,
        tools=example.tools or None,
        enable_thinking=example.thinking,
        add_generation_prompt=True,
        tokenize=False,
    )
    frames = " ".join(f"{seconds // 60:02d}:{seconds % 60:02d} {IMAGE_BLOCK}" for seconds in example.seconds)
    text = text.replace("<|image|>", IMAGE_BLOCK).replace("<|video|>", frames)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass
class Row:
    """One canvas of an example."""

    prefix: list[int]  # the prompt and the canvases before
    canvas: list[int]  # filled up with end tokens
    used: int  # how many of its tokens are not filling
    pictures: tuple[Picture, ...] = ()
    pinned: list[bool] | None = None  # which tokens are known
    draft: list[int] | None = None  # the canvas to begin with


@dataclass
class Canvases:
    """A batch of canvases with their left-padded prefixes."""

    prefix: Tensor  # (B, L)
    prefix_mask: Tensor  # (B, L), True where not padding
    target: Tensor  # (B, C)
    weight: Tensor  # (B, C)
    patches: Tensor | None = None  # (N, P, 3 patch²), of the N pictures of all rows
    positions: Tensor | None = None  # (N, P, 2)
    pinned: Tensor | None = None  # (B, C), True where the canvas is known and stays
    draft: Tensor | None = None  # (B, C), NO_DRAFT in the rows without one


def _whole_canvas(tokenizer: PreTrainedTokenizerBase, text: list[int], example: Example) -> list[int]:
    """End a text and fill it up to one canvas."""
    canvas = text + tokenizer(example.end_token, add_special_tokens=False)["input_ids"]
    if len(canvas) > CANVAS_LENGTH:
        raise ValueError(f"canvas of {example.family}: got {len(canvas)} tokens, expected at most {CANVAS_LENGTH}")
    return canvas + [tokenizer.eos_token_id] * (CANVAS_LENGTH - len(canvas))


def start_canvas(tokenizer: PreTrainedTokenizerBase, example: Example) -> Row:
    """Return the only canvas of an example that begins with more than noise.

    The text before a hole, the hole and the text after it are encoded each by itself: nobody knows the hole's tokens.
    """
    prompt = render_prompt(tokenizer, example)
    start, end = example.hole or (0, len(example.answer))
    before, inside, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (example.answer[:start], example.answer[start:end], example.answer[end:])
    )
    text = before + inside + after
    row = Row(prompt, _whole_canvas(tokenizer, text, example), len(text) + 1, example.pictures)
    if example.hole:
        end_known = [not example.is_open] * (CANVAS_LENGTH - len(text))
        row.pinned = [True] * len(before) + [False] * len(inside) + [True] * len(after) + end_known
    if example.draft is not None:
        draft = tokenizer(example.draft, add_special_tokens=False)["input_ids"]
        row.draft = _whole_canvas(tokenizer, draft, example)
    return row


def pick_canvas(tokenizer: PreTrainedTokenizerBase, example: Example, rng: Random) -> Row:
    """Cut one canvas out of an example."""
    if example.hole or example.draft is not None:
        return start_canvas(tokenizer, example)
    prompt = render_prompt(tokenizer, example)
    answer = tokenizer(example.answer + example.end_token, add_special_tokens=False)["input_ids"]
    start = CANVAS_LENGTH * rng.randrange(-(-len(answer) // CANVAS_LENGTH))
    canvas = answer[start : start + CANVAS_LENGTH]
    fill = [tokenizer.eos_token_id] * (CANVAS_LENGTH - len(canvas))
    return Row(prompt + answer[:start], canvas + fill, len(canvas), example.pictures)


def collate(rows: list[Row], pad_id: int, calibrated: bool, processor: Gemma4ImageProcessorPil) -> Canvases:
    """Stack canvases, pad their prefixes on the left, and cut their pictures into patches.

    `calibrated` gives the filling the weight of the answer. Less of it teaches faster, but the model then takes the end
    of an answer for less likely than it is, and counts too far.
    """
    length = max(len(row.prefix) for row in rows)
    prefix = torch.tensor([[pad_id] * (length - len(row.prefix)) + row.prefix for row in rows])
    mask = torch.tensor([[False] * (length - len(row.prefix)) + [True] * len(row.prefix) for row in rows])
    target = torch.tensor([row.canvas for row in rows])
    pinned = torch.tensor([row.pinned or [False] * CANVAS_LENGTH for row in rows])
    used = torch.tensor([row.used for row in rows])
    is_fill = torch.arange(CANVAS_LENGTH) >= used[:, None]
    asked = (~pinned & ~is_fill).sum(dim=1, keepdim=True)
    # Without the root, the few digits of a sum would count for nothing beside a story's 64 tokens.
    answer_weight = (ANSWER_LENGTH / asked).sqrt()
    fill_weight = answer_weight if calibrated else torch.tensor(FILL_WEIGHT)
    batch = Canvases(prefix, mask, target, torch.where(is_fill, fill_weight, answer_weight).masked_fill(pinned, 0.0))
    if pinned.any():
        batch.pinned = pinned
    if any(row.draft for row in rows):
        batch.draft = torch.tensor([row.draft or [NO_DRAFT] * CANVAS_LENGTH for row in rows])
    if pictures := [picture for row in rows for picture in row.pictures]:
        batch.patches, batch.positions = read_pictures(processor, pictures)
    return batch


def encode_prefix(model: DiffusionGemmaForBlockDiffusion, batch: Canvases) -> DynamicCache:
    """Run the encoder over the prefixes and return their keys and values.

    The masks are made as `generate` makes them: the encoder, given a mask of two dimensions, makes the same ones and
    drops them again, and would read pictures causally.
    """
    if batch.patches is None:
        return model.model.encoder(input_ids=batch.prefix, attention_mask=batch.prefix_mask).past_key_values
    B, L = batch.prefix.shape
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    masks = model.model.encoder.create_masks_for_generate(
        config=model.config,
        inputs_embeds=torch.empty(B, L, 0),
        attention_mask=batch.prefix_mask,
        past_key_values=cache,
        position_ids=torch.arange(L)[None],
        mm_token_type_ids=(batch.prefix == model.config.image_token_id).long(),
    )
    return model.model.encoder(
        input_ids=batch.prefix,
        pixel_values=batch.patches,
        image_position_ids=batch.positions,
        attention_mask=masks,
        past_key_values=cache,
    ).past_key_values


def corrupt(batch: Canvases, level: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Replace every token with probability `level` (B, 1) by a uniformly random one, or by the draft's. -> (B, C)"""
    target = batch.target
    noise = torch.randint(vocab_size, target.shape, generator=generator)
    replaced = torch.rand(target.shape, generator=generator) < level
    if batch.draft is not None:  # in half of the rows with a draft there is no other noise, as in the first step
        share = 2 * torch.rand(len(target), 1, generator=generator)
        drafted = torch.rand(target.shape, generator=generator) < share
        noise = torch.where(drafted & (batch.draft != NO_DRAFT), batch.draft, noise)
    if batch.pinned is not None:
        replaced &= ~batch.pinned
    return torch.where(replaced, noise, target)


def pin_logits(logits: Tensor, pinned: Tensor, token_ids: Tensor) -> Tensor:
    """Make the known tokens certain. (B, C, V), (B, C), (B, C) -> (B, C, V)"""
    certain = torch.full_like(logits, PINNED_LOGIT).scatter(-1, token_ids[..., None], 0.0)
    return torch.where(pinned[..., None], certain, logits)


def canvas_loss(
    model: DiffusionGemmaForBlockDiffusion, batch: Canvases, self_condition: bool, generator: torch.Generator
) -> Tensor:
    """Sum of the weighted cross-entropies of a batch of canvases."""
    B, C = batch.target.shape
    V = model.config.text_config.vocab_size
    level = torch.rand(B, 1, generator=generator)
    level = torch.where(torch.rand(B, 1, generator=generator) < PURE_NOISE_SHARE, 1.0, level)
    mask = torch.nn.functional.pad(batch.prefix_mask, (0, C), value=True)
    cache = encode_prefix(model, batch)

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
            conditioning = denoise(corrupt(batch, earlier, V, generator), None) / temperature
            if batch.pinned is not None:
                conditioning = pin_logits(conditioning, batch.pinned, batch.target)
    logits = denoise(corrupt(batch, level, V, generator), conditioning)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none")
    return (loss * batch.weight.flatten()).sum()
