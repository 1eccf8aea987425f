"""Teach the tower alone, before it joins the text model: what is at each place of a picture, and which place it is.

A place is the square of patches that becomes one soft token. The linear heads that answer are thrown away; the
projector then starts as the map that best sends a place to the embeddings of the words for what is there.
"""

import torch
from architecture import PICTURE_TOKENS
from data import training_batch
from optimizer import Muon, learning_rate_factor
from pictures import COLOURS, SHAPES, SIDE, Picture
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm
from tower import read_pictures, standardize
from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

SIDE_TOKENS = round(PICTURE_TOKENS**0.5)
WHATS = ["", *SHAPES, *"0123456789"]
COLOUR_NAMES = ["", *COLOURS]
MIXTURE = {"picture_contents": 1.0, "picture_counts_among": 2.0, "picture_digits": 6.0}  # digits are learned last
LOOKS, WARMUP = 16, 20  # questions whose pictures make a step; steps over which the learning rate rises
PLACE_WEIGHT = 0.3
EPS = 1e-6
AIMED_STEPS = 16  # whose pictures show where the projector has to point
RIDGE = 1e-3


def what_is_where(picture: Picture) -> list[tuple[int, int]]:
    """Return the indices of thing and colour at each place, in raster order.

    A thing is at the place of its centre, so that one soft token can stand for it; everywhere else is ground, 0.
    """
    found = [(0, 0)] * PICTURE_TOKENS
    for mark in picture.marks:
        column, row = (int(at * SIDE_TOKENS / SIDE) for at in (mark.x, mark.y))
        found[row * SIDE_TOKENS + column] = WHATS.index(mark.what), COLOUR_NAMES.index(mark.colour)
    return found


class Heads(nn.Module):
    """Linear heads that say what is at a place, in which colour, and which column and row the place is in."""

    def __init__(self, width: int):
        super().__init__()
        self.what = nn.Linear(width, len(WHATS))
        self.colour = nn.Linear(width, len(COLOUR_NAMES))
        self.column = nn.Linear(width, SIDE_TOKENS)
        self.row = nn.Linear(width, SIDE_TOKENS)

    def loss(self, features: Tensor, found: Tensor) -> Tensor:
        """Sum the heads' losses. (N, places, width), (N, places, 2) -> ()"""
        features = rms_norm(features, features.shape[-1:], eps=EPS)  # as the projector does
        is_ground = found[..., 0] == 0
        place = torch.arange(PICTURE_TOKENS).expand(is_ground.shape)
        total = PLACE_WEIGHT * mean_loss(self.column(features), place % SIDE_TOKENS)
        total = total + PLACE_WEIGHT * mean_loss(self.row(features), place // SIDE_TOKENS)
        for logits, target in ((self.what(features), found[..., 0]), (self.colour(features), found[..., 1])):
            for part in (is_ground, ~is_ground):  # of equal weight, though most places are ground
                total = total + mean_loss(logits[part], target[part])
        return total


def mean_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy over places. (..., classes), (...) -> ()"""
    return cross_entropy(logits.flatten(0, -2), target.flatten())


def draw_pictures(seed: int, step: int) -> list[Picture]:
    """Draw the pictures of a step; no held-out ones."""
    examples = training_batch(seed, step, LOOKS, MIXTURE)
    return [picture for example in examples for picture in example.pictures]


def teach_tower(
    tower: nn.Module, processor: Gemma4ImageProcessorPil, seed: int, steps: int, lr: float, muon_lr: float
) -> None:
    """Train the tower on what is where, with Muon and AdamW as the text model is."""
    torch.manual_seed(seed)
    standardize(tower, processor, seed)
    heads = Heads(tower.config.hidden_size)
    named = dict(tower.named_parameters())
    matrices = [param for name, param in named.items() if param.ndim >= 2 and "embed" not in name]
    rest = [param for name, param in named.items() if not (param.ndim >= 2 and "embed" not in name)]
    rest += heads.parameters()
    adam = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0, foreach=True)
    optimizers = [(adam, lr), (Muon(matrices, lr=muon_lr), muon_lr)]
    for step in range(steps):
        factor = learning_rate_factor(step, steps, WARMUP, steps // 2)
        pictures = draw_pictures(seed, step)
        patches, positions = read_pictures(processor, pictures)
        features = tower(pixel_values=patches, pixel_position_ids=positions).last_hidden_state
        found = torch.tensor([what_is_where(picture) for picture in pictures])
        heads.loss(features.view(len(pictures), PICTURE_TOKENS, -1), found).backward()
        torch.nn.utils.clip_grad_norm_(matrices + rest, 1.0)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    standardize(tower, processor, seed)


@torch.no_grad()
def aim_projector(
    model: DiffusionGemmaForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    processor: Gemma4ImageProcessorPil,
    seed: int,
) -> None:
    """Set the projector to the least-squares map from features to the embeddings of what is there.

    A place is the sum of the words of the thing, for its colour and its shape, and of the words for how far it is to
    the right or left and to the bottom or top; ground has the image token in place of the thing.
    """
    tower, projector = model.model.encoder.vision_tower, model.model.encoder.embed_vision
    embed = model.get_input_embeddings()

    def word(text: str) -> Tensor:
        return embed(torch.tensor(tokenizer(text)["input_ids"])).mean(0)

    ground = embed(torch.tensor(model.config.image_token_id))
    whats = torch.stack([ground, *(word(f" {name}" if name in SHAPES else name) for name in WHATS[1:])])
    colours = torch.stack([torch.zeros_like(ground), *(word(f" {name}") for name in COLOURS)])
    across, down = (word(f" {end}") - word(f" {start}") for start, end in (("left", "right"), ("top", "bottom")))
    pictures = [picture for step in range(AIMED_STEPS) for picture in draw_pictures(seed, step)]
    patches, positions = read_pictures(processor, pictures)
    features = projector.embedding_pre_projection_norm(tower(patches, positions).last_hidden_state)
    found = torch.tensor([what_is_where(picture) for picture in pictures]).flatten(0, 1)
    place = torch.arange(PICTURE_TOKENS).repeat(len(pictures))[:, None]
    targets = whats[found[:, 0]] + colours[found[:, 1]]
    targets += (place % SIDE_TOKENS / (SIDE_TOKENS - 1) - 0.5) * across
    targets += (place // SIDE_TOKENS / (SIDE_TOKENS - 1) - 0.5) * down
    is_ground = found[:, :1] == 0
    weight = torch.where(is_ground, 1.0, is_ground.sum() / (~is_ground).sum())  # most places are ground
    gram = features.T @ (weight * features)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    projector.embedding_projection.weight.add_(torch.linalg.solve(gram, features.T @ (weight * targets)).T)
