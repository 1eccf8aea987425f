"""A random model of a few thousand parameters, and its checkpoint folder, made with MLX alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import tokenizers
from mlx.utils import tree_flatten

import mlx_diffusiongemma
from mlx_diffusiongemma.checkpoint import Checkpoint
from mlx_diffusiongemma.config import GenerationConfig, ModelConfig, VisionConfig
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.tokenizer import Tokenizer

BUNDLED = Path(mlx_diffusiongemma.__file__).parent / "tiny"
TEXT: dict[str, Any] = {
    "model_type": "diffusion_gemma_text",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "top_k_experts": 2,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "use_bidirectional_attention": "vision",
}

VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "patch_size": 8,
    "pooling_kernel_size": 3,
    "position_embedding_size": 64,
}


def vision_config(**numbers: Any) -> VisionConfig:
    """Return the config of the small tower; keyword arguments replace its numbers."""
    return VisionConfig(
        rope_parameters={"rope_type": "axial", "rope_theta": 100.0},
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        use_clipped_linears=False,
        standardize=False,
        **{name: value for name, value in (VISION | numbers).items() if name != "model_type"},
    )


def config_dict(vision: dict[str, Any] | None = None, **text: Any) -> dict[str, Any]:
    """Return a `config.json` of the small model; keyword arguments replace text values."""
    config = {
        "model_type": "diffusion_gemma",
        "canvas_length": 8,
        "eos_token_id": [1],
        "tie_word_embeddings": True,
        "text_config": {**TEXT, **text},
    }
    return config if vision is None else config | {"vision_config": vision}


GENERATION: dict[str, Any] = {
    "max_new_tokens": 16,
    "max_denoising_steps": 6,
    "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
    "t_min": 0.4,
    "t_max": 0.8,
    "stability_threshold": 1,
    "confidence_threshold": 0.005,
    "eos_token_id": [1],
    "pad_token_id": 0,
}


def random_array(name: str, shape: tuple[int, ...]) -> mx.array:
    """Return values of a size that makes a layer matter, and clip bounds that bite."""
    if not shape:
        return mx.array(-1.0 if name.endswith("_min") else 1.0)
    return mx.random.uniform(0.5, 1.5, shape) if len(shape) == 1 else mx.random.normal(shape) * 0.2


def random_model(seed: int = 0, vision: dict[str, Any] | None = None, **text: Any) -> DiffusionGemma:
    """Return the small model with weights large enough that its layers matter."""
    mx.random.seed(seed)
    model = DiffusionGemma(ModelConfig.from_dict(config_dict(vision, **text)))
    model.load_weights([(name, random_array(name, array.shape)) for name, array in tree_flatten(model.parameters())])
    mx.eval(model.parameters())
    return model


def bundled_checkpoint(
    tokenizer: Tokenizer, vision: dict[str, Any] | None = None, end_ids: tuple[int, ...] = (1,), **text: Any
) -> Checkpoint:
    """Return a random model behind the bundled tokenizer: canvas 8, context 256, 6 steps unless told otherwise."""
    text = {"vocab_size": tokenizer.vocab_size, **text}
    model = random_model(vision=vision, **text)
    generation = GenerationConfig.from_dict(GENERATION | {"eos_token_id": list(end_ids)})
    config = ModelConfig.from_dict(config_dict(vision, **text))
    return Checkpoint(BUNDLED, model, tokenizer, config, generation)


def save_checkpoint(
    folder: Path, model: DiffusionGemma | None = None, vision: dict[str, Any] | None = None, **text: Any
) -> Path:
    """Write the small model as a checkpoint folder without a tokenizer, under the original tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model or random_model(vision=vision, **text)
    tensors = {
        name.replace("gate_up_proj.weight", "gate_up_proj").replace("experts.down_proj.weight", "experts.down_proj"): a
        for name, a in tree_flatten(model.parameters())
    }
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    (folder / "config.json").write_text(json.dumps(config_dict(vision, **text)))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer that fits the small model: control tokens and the letters, one token each."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", *"abcdefghijklmnopqrstuvwxyz "]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.add_special_tokens(words[:6])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
