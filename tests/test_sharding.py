"""What each rank has of a checkpoint, without any other rank. How ranks run together is in `distributed/`."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from small_model import random_model, save_checkpoint
from test_layouts import MODES, quantised, write
from test_memory import BIG

from mlx_diffusiongemma.checkpoint import load_model
from mlx_diffusiongemma.config import ModelConfig, load_configs
from mlx_diffusiongemma.model import DiffusionGemma
from mlx_diffusiongemma.ranks import Share, divide
from mlx_diffusiongemma.sharding import Cut, Division, share_heads
from mlx_diffusiongemma.shards import ShardWriter, TensorSpec
from mlx_diffusiongemma.team import checkpoint_fingerprint
from mlx_diffusiongemma.weights import WeightsError

LAYER = "model.decoder.layers.0"
FULL = "model.decoder.layers.2"  # the small model's full-attention layer


def divisions(folder: Path, size: int) -> list[Division]:
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return [Division(folder, config, size, rank) for rank in range(size)]


def test_the_first_ranks_have_the_rest():
    assert [divide("x", 33, 4, rank) for rank in range(4)] == [
        Share(0, 9, 33),
        Share(9, 17, 33),
        Share(17, 25, 33),
        Share(25, 33, 33),
    ]
    assert divide("x", 5, 2, 1).times(64) == Share(192, 320, 320)


def test_fewer_items_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"^experts: got 3 to divide among 4 ranks, expected one for each at least$"):
        divide("experts", 3, 4, 0)


@pytest.mark.parametrize(
    ("keys", "size", "expected"),
    [  # 16 query heads, as the released model has: 8 key heads in sliding layers, 2 in full ones
        (8, 2, [((0, 8), (0, 4)), ((8, 16), (4, 8))]),
        (2, 2, [((0, 8), (0, 1)), ((8, 16), (1, 2))]),
        (2, 4, [((0, 4), (0, 1)), ((4, 8), (0, 1)), ((8, 12), (1, 2)), ((12, 16), (1, 2))]),
        (8, 3, [((0, 6), (0, 3)), ((6, 12), (3, 6)), ((12, 16), (6, 8))]),
    ],
)
def test_query_heads_come_with_the_keys_that_they_look_at(keys, size, expected):
    shares = [share_heads(16, keys, size, rank) for rank in range(size)]
    assert [(tuple(q[:2]), tuple(k[:2])) for q, k in shares] == expected
    for queries, own in shares:
        assert {head * keys // 16 for head in range(*queries[:2])} == set(range(*own[:2]))


def test_heads_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match=r"^attention: got 16 heads over 2 for 3 ranks, expected as many ranks as key"):
        share_heads(16, 2, 3, 0)


def test_shares_of_packed_weights_begin_at_groups():
    cut = Cut(-1, Share(64, 128, 192))
    assert cut.of("x", 192) == slice(64, 128)
    assert cut.of("x", 24) == slice(8, 16)  # words of eight 4-bit numbers
    assert cut.of("x", 3) == slice(1, 2)  # scales of groups of 64
    with pytest.raises(WeightsError, match=r"^x cannot be divided: got 64 to 128 of 192 in 2 groups, expected whole"):
        cut.of("x", 2)


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_of_all_ranks_are_the_whole(tmp_path, size):
    folder = save_checkpoint(tmp_path / "model", vocab_size=1024, num_experts=6, intermediate_size=80)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    whole = dict(tree_flatten(load_model(folder, config).parameters()))
    ranks = divisions(folder, size)
    divided = {name.removesuffix(".weight").rpartition(".")[2] for name in whole if ranks[0].cut(name) is not None}
    assert divided == {*"embed_tokens q_proj k_proj v_proj o_proj gate_proj up_proj down_proj gate_up_proj".split()}
    for name, array in whole.items():
        cut = ranks[0].cut(name)
        parts = [each.read(name) for each in ranks]
        assert [part.shape for part in parts] == [each.part(name).shape for each in ranks]
        if cut is None or (name.startswith(FULL) and name.endswith("k_proj.weight")):
            assert all(mx.array_equal(part, array) for part in parts)
        elif name.endswith(("k_proj.weight", "v_proj.weight")) and size == 4:  # two heads, each on two ranks
            assert mx.array_equal(mx.concatenate(parts[::2], axis=cut.axis), array)
            assert mx.array_equal(parts[0], parts[1])
        else:
            assert mx.array_equal(mx.concatenate(parts, axis=cut.axis), array)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_quantised_parts_mean_the_rows_and_columns_of_the_whole(tmp_path, mode):
    how = MODES[mode] | ({"group_size": 32} if mode == "affine" else {})
    folder = write(tmp_path / "model", quantised(how), how)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    whole = dict(tree_flatten(load_model(folder, config).parameters()))

    def floats(tensors, path):
        arrays = [tensors.get(f"{path}.{kind}") for kind in ("weight", "scales", "biases")]
        return mx.dequantize(*arrays, **how).astype(mx.float32)

    ranks = divisions(folder, 2)
    for path, axis in {
        f"{LAYER}.mlp.down_proj": 1,
        f"{FULL}.self_attn.o_proj": 1,
        f"{LAYER}.experts.down_proj": 0,
    }.items():
        parts = [
            floats({name: each.read(name) for name in each.stored if name.startswith(path)}, path) for each in ranks
        ]
        assert mx.array_equal(mx.concatenate(parts, axis=axis), floats(whole, path))


def test_experts_that_are_stored_one_by_one_are_read_one_by_one(tmp_path, monkeypatch):
    tensors = {}
    for name, array in tree_flatten(random_model().parameters()):
        if ".experts." not in name:
            tensors[name] = array
            continue
        path = name.removesuffix(".weight")
        for expert, matrix in enumerate(array):
            gate, up = mx.split(matrix, 2)
            pieces = {"gate_proj": gate, "up_proj": up} if path.endswith("gate_up_proj") else {"down_proj": matrix}
            base = path.rpartition(".")[0]
            tensors |= {f"{base}.{expert}.{piece}.weight": value for piece, value in pieces.items()}
    folder = write(tmp_path / "model", tensors)
    config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
    whole = dict(tree_flatten(load_model(folder, config).parameters()))[f"{LAYER}.experts.gate_up_proj.weight"]
    [_, second] = divisions(folder, 2)
    read: list[str] = []
    kind = type(next(iter(second.stored[f"{LAYER}.experts.gate_up_proj.weight"].pieces.values())))
    plain = kind.read

    def noted(tensor, start, stop):
        read.append(tensor.name)
        return plain(tensor, start, stop)

    monkeypatch.setattr(kind, "read", noted)
    part = second.read(f"{LAYER}.experts.gate_up_proj.weight")
    assert mx.array_equal(part, whole[2:])
    assert {name.split(".experts.")[1].split(".")[0] for name in read} == {"2", "3"}


def test_a_model_that_so_many_ranks_cannot_share_is_refused(tmp_path):
    how = MODES["affine"]
    folder = write(tmp_path / "model", quantised(how), how)
    with pytest.raises(ValueError, match=r"^groups of 64 neurons of .*mlp: got 1 to divide among 2 ranks"):
        divisions(folder, 2)


def test_bytes_of_a_rank_are_those_it_reads(tiny_folder):
    config, _ = load_configs(tiny_folder)
    for division in [Division(tiny_folder, config, 4, rank) for rank in range(4)]:
        assert division.nbytes == sum(division.read(name).nbytes for name in division.stored)


def test_neurons_are_divided_by_groups_and_the_vocabulary_by_blocks(tmp_path):
    how = MODES["affine"] | {"group_size": 32}
    folder = write(tmp_path / "model", quantised(how), how)
    assert [each.part(f"{LAYER}.mlp.down_proj.scales").shape for each in divisions(folder, 2)] == [(64, 1)] * 2
    folder = save_checkpoint(tmp_path / "large", vocab_size=1536, intermediate_size=66)
    assert [each.part("model.decoder.embed_tokens.weight").shape[0] for each in divisions(folder, 2)] == [1024, 512]
    assert [each.part(f"{LAYER}.mlp.gate_proj.weight").shape[0] for each in divisions(folder, 4)] == [17, 17, 16, 16]


def test_the_released_model_in_four_bits(tmp_path):
    """Its language part as headers alone describe it, in a file without data: the table of docs/scaling.md."""
    model = DiffusionGemma(BIG)
    model.set_dtype(mx.bfloat16)
    sensitive = ("embed_tokens", "self_attn", ".mlp.", "router")
    nn.quantize(
        model,
        class_predicate=lambda path, module: (
            hasattr(module, "to_quantized")
            and {"group_size": 64, "bits": 8 if any(part in path for part in sensitive) else 4}
        ),
    )
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tree_flatten(model.parameters())}
    with pytest.raises(ValueError, match=r"of .* rows written"), ShardWriter(tmp_path / "model.safetensors", specs):
        pass
    whole = sum(spec.nbytes for spec in specs.values())
    for size, neurons in ((2, [1088, 1024]), (4, [576, 512, 512, 512])):
        ranks = [Division(tmp_path, BIG, size, rank) for rank in range(size)]
        assert [each.part(f"{LAYER}.mlp.gate_proj.weight").shape[0] for each in ranks] == neurons
        assert {each.part(f"{LAYER}.experts.down_proj.scales").shape for each in ranks} == {(128 // size, 2816, 11)}
        keys = {each.part("model.decoder.layers.5.self_attn.k_proj.weight").shape[0] for each in ranks}
        assert keys == {512}  # one of two heads of a full layer, on 4 ranks twice
        repeated = sum(each.nbytes for each in ranks) - whole
        assert 0 < repeated < 0.02 * whole
        assert max(each.nbytes for each in ranks) < whole / size * 1.02


def test_checkpoints_with_other_weights_in_the_same_shapes_are_told_apart(tmp_path: Path) -> None:
    folders = [save_checkpoint(tmp_path / name) for name in "abc"]
    tensors = mx.load(str(folders[2] / "model.safetensors"))
    mx.save_safetensors(str(folders[2] / "model.safetensors"), {name: a * 1.01 for name, a in tensors.items()})
    same, copy, tuned = map(checkpoint_fingerprint, folders)
    assert same == copy != tuned
