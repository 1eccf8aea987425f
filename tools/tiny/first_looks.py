"""Teach the tower alone, before it joins the text model: what is at each place of a picture, and which place it is.

A place is the square of patches that becomes one soft token. The linear heads that answer are thrown away; the projector
then starts as the map that best sends a place to the embeddings of the words for what is there.
"""

from dataclasses import dataclass

import torch
from architecture import PICTURE_TOKENS
from data import SIGHT_WEIGHTS, training_batch
from optimizer import Muon, learning_rate_factor
from pictures import COLOURS, SEGMENTS, SHAPES, SIDE, Picture
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm
from tower import read_pictures, standardize
from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

SIDE_TOKENS = round(PICTURE_TOKENS**0.5)
WHATS = ["", *SHAPES, *"0123456789"]
COLOUR_NAMES = ["", *COLOURS]
LOOKS = 16  # questions of a step
PLACE_WEIGHT = 0.3
EPS = 1e-6


def what_is_where(picture: Picture) -> list[tuple[int, int]]:
    """Return the indices of thing and colour at each place, in raster order; 0 where the ground is."""
    found = []
    middles = [(i + 0.5) * SIDE / SIDE_TOKENS for i in range(SIDE_TOKENS)]
    for y in middles:
        for x in middles:
            at = (0, 0)
            for mark in picture.marks:
                height = mark.size if mark.what in SHAPES else 2 * mark.size
                if abs(x - mark.x) <= mark.size and abs(y - mark.y) <= height:
                    at = WHATS.index(mark.what), COLOUR_NAMES.index(mark.colour)
            found.append(at)
    return found
