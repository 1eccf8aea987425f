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
END_TOKENS = ["<eos>", "<turn|>", "<|tool_response>"]


def build_config(tokenizer: PreTrainedTokenizerBase) -> DiffusionGemmaConfig:
    """Describe a 2.9 M parameter model and a vision tower as small as the classes allow (it is not trained)."""
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
    return DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=CANVAS_LENGTH, **ids)


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
