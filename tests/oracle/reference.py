"""Small random models of the reference (transformers on torch), and the way from them to ours: a saved folder.

The weights are of a size that makes the sampler work: entropies from nearly 0 to nearly log(V), so that a step
accepts some positions and refuses others, canvases settle after several steps, and end tokens turn up.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

try:
    import torch
    import transformers
    from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
    from transformers.models.diffusion_gemma.generation_diffusion_gemma import EntropyBoundSamplerConfig
except ImportError as error:  # an oracle run without its oracle must fail, not skip
    raise RuntimeError("oracle tests need torch and transformers >= 5.23: pip install '.[test]'") from error

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # the models are too small to gain from more

S, F = "sliding_attention", "full_attention"
VISION: dict[str, Any] = {  # the class insists on a tower
    "model_type": "gemma4_vision",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "patch_size": 2,
    "position_embedding_size": 4,
}
TOWER: dict[str, Any] = VISION | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "position_embedding_size": 40,
}
TEXT: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_hidden_layers": 4,
    "layer_types": [S, F, S, F],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "sliding_window": 8,
    "max_position_embeddings": 2048,
    "use_bidirectional_attention": "vision",
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Spec:
    """One random model: what differs from `TEXT`, the canvas, the seed, and two sizes of weights.

    `attention_gain` multiplies the query and key norms. At 1 a random model's self-conditioning loop is chaotic: a
    rounding error of 1e-6 grows to 1 within twenty steps, in the reference too, and integers part ways. At 0.5 the
    loop contracts, as a trained model's does.
    """

    text: dict[str, Any] = field(default_factory=dict)
    canvas_length: int = 8
    seed: int = 0
    embedding_std: float = 0.6
    attention_gain: float = 0.5
    vision: dict[str, Any] = field(default_factory=lambda: VISION)


def build(spec: Spec) -> DiffusionGemmaForBlockDiffusion:
    """Return a float32 model in which no norm, scale or layer scalar is 1, and encoder and decoder scalars differ."""
    torch.manual_seed(spec.seed)
    config = DiffusionGemmaConfig(
        text_config={**TEXT, **spec.text}, vision_config=spec.vision, canvas_length=spec.canvas_length
    )
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "scale" in name:
                gain = spec.attention_gain if "q_norm" in name or "k_norm" in name else 1.0
                parameter.copy_(gain * (1 + 0.3 * torch.randn_like(parameter)))
            else:
                std = spec.embedding_std if "embed_tokens" in name else 0.15
                parameter.copy_(torch.randn_like(parameter) * std)
        for name, buffer in model.named_buffers():
            if "layer_scalar" in name:
                buffer.copy_(0.5 + torch.rand_like(buffer))
    return model


def generation_options(entropy_bound: float = 0.1, **options: Any) -> dict[str, Any]:
    """Return keyword arguments of the reference's generate; `entropy_bound` goes where the reference wants it."""
    return {"sampler_config": EntropyBoundSamplerConfig(entropy_bound=entropy_bound), **options}


def save(model: DiffusionGemmaForBlockDiffusion, folder: Path, **options: Any) -> Path:
    """Write model and generation config as transformers does; return the folder."""
    model.generation_config.update(**options)
    model.save_pretrained(folder)
    return folder
