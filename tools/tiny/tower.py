"""The vision tower of `tiny`: its fresh weights, and what it reads."""

from random import Random

import torch
from architecture import PICTURE_TOKENS
from pictures import Picture, paint
from sights import contents, counts_among
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

POSITION_STD = 0.3
QUERY_NORM = 0.5  # of queries and keys; at 1, attention that is not divided by the head size starts out too sharp
SAMPLE = 64  # pictures from which the pooled features' mean and spread are taken


def build_image_processor(config: Gemma4VisionConfig, soft_tokens: int) -> Gemma4ImageProcessorPil:
    """Make the image processor that belongs to the tower."""
    return Gemma4ImageProcessorPil(
        patch_size=config.patch_size, pooling_kernel_size=config.pooling_kernel_size, max_soft_tokens=soft_tokens
    )


def read_pictures(processor: Gemma4ImageProcessorPil, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
    """Paint pictures and cut them into patches. Returns patches (N, P, 3 patch²) and their positions (N, P, 2)."""
    outputs = processor.preprocess([paint(picture) for picture in pictures], return_tensors="pt")
    used = PICTURE_TOKENS * processor.pooling_kernel_size**2  # behind them the processor pads to the budget
    return outputs["pixel_values"][:, :used], outputs["image_position_ids"][:, :used]


@torch.no_grad()
def give_tower(model: DiffusionGemmaForBlockDiffusion, config: Gemma4VisionConfig, seed: int) -> None:
    """Put a tower with seeded random weights and its projector in place of the model's own.

    The text weights are drawn before and beside another tower, so they do not depend on the size of this one.
    """
    torch.manual_seed(seed)
    encoder = model.model.encoder
    encoder.vision_tower = AutoModel.from_config(config)
    encoder.embed_vision = DiffusionGemmaMultimodalEmbedder(config, model.config.text_config)
    model.config.vision_config = config
    embedder = encoder.vision_tower.patch_embedder
    nn.init.normal_(embedder.input_proj.weight, std=embedder.input_proj.in_features**-0.5)
    nn.init.normal_(embedder.position_embedding_table, std=POSITION_STD)
    nn.init.normal_(encoder.embed_vision.embedding_projection.weight, std=config.initializer_range)
    for name, param in encoder.vision_tower.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(param, QUERY_NORM)


@torch.no_grad()
def standardize(tower: nn.Module, processor: Gemma4ImageProcessorPil, seed: int) -> None:
    """Set the tower's shift and scale so that its features of some pictures have mean 0 and spread 1."""
    rng = Random(f"standardize/{seed}")
    pictures = [rng.choice([contents, counts_among])(rng).pictures[0] for _ in range(SAMPLE)]
    patches, positions = read_pictures(processor, pictures)
    tower.std_bias.zero_()
    tower.std_scale.fill_(1)
    features = tower(pixel_values=patches, pixel_position_ids=positions).last_hidden_state
    tower.std_bias.copy_(features.mean(0))
    tower.std_scale.copy_(1 / features.std(0))
