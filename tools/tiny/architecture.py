"""The size of `tiny`: the reference's configuration objects, filled in."""

from transformers import PreTrainedTokenizerBase
from transformers.models.diffusion_gemma.configuration_diffusion_gemma import (
    DiffusionGemmaConfig,
    DiffusionGemmaTextConfig,
)
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
    EntropyBoundSamplerConfig,
)
from transformers.models.gemma4.configuration_gemma4 import Gemma4VisionConfig

CANVAS_LENGTH = 64
SOFT_TOKENS = 70  # at most so many stand for a picture
PICTURE_TOKENS = 64  # and so many for a square one
END_TOKENS = ["<eos>", "<turn|>", "<|tool_response>"]


def build_config(tokenizer: PreTrainedTokenizerBase) -> DiffusionGemmaConfig:
    """Describe the text model of 2.9 M parameters, beside a vision tower as small as the classes allow.

    That tower is never used: `build_vision_config` describes the one that takes its place.
    """
    text = DiffusionGemmaTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_global_key_value_heads=2,
        global_head_dim=64,
        num_experts=8,
        top_k_experts=2,
        moe_intermediate_size=96,
        max_position_embeddings=4096,
        use_bidirectional_attention="vision",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision = Gemma4VisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        patch_size=8,
        position_embedding_size=64,
        pooling_kernel_size=3,
    )
    ids = {
        "boi_token_id": tokenizer.convert_tokens_to_ids("<|image>"),
        "eoi_token_id": tokenizer.convert_tokens_to_ids("<image|>"),
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image|>"),
    }
    return DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        canvas_length=CANVAS_LENGTH,
        vision_soft_tokens_per_image=SOFT_TOKENS,
        **ids,
    )


def build_vision_config() -> Gemma4VisionConfig:
    """Describe the vision tower: a square picture of 96 pixels is 24 x 24 patches and 64 soft tokens."""
    return Gemma4VisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        patch_size=4,
        position_embedding_size=512,  # enough for 1:10 at 1120 soft tokens
        pooling_kernel_size=3,
        standardize=True,
    )


def build_generation_config(tokenizer: PreTrainedTokenizerBase) -> DiffusionGemmaGenerationConfig:
    """Write the sampler's settings, the same as the 26B checkpoint's."""
    return DiffusionGemmaGenerationConfig(
        max_new_tokens=256,
        max_denoising_steps=48,
        sampler_config=EntropyBoundSamplerConfig(entropy_bound=0.1),
        t_min=0.4,
        t_max=0.8,
        stability_threshold=1,
        confidence_threshold=0.005,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in END_TOKENS],
    )
