"""How `tiny` reads pictures, in training as in the reference's `generate`: `pytest -m oracle tools/tiny`."""

import dataclasses
import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import architecture
import data
import evaluate
import first_looks
import objective
import pictures
import sights
import tower
import train

from mlx_diffusiongemma import images, load
from mlx_diffusiongemma.config import ModelConfig

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="module")
def model(tokenizer):
    """Build a model with random weights once; its images are loud enough to be heard."""
    model = train.build_model(tokenizer, 0)
    with torch.no_grad():
        model.model.encoder.embed_vision.embedding_projection.weight.mul_(10)
    return model


def some(family, count):
    """Draw examples of a family."""
    rng = Random(f"test/{family}")
    return [data.draw(rng, family) for _ in range(count)]


def batch_of(tokenizer, processor, examples):
    """Collate canvases of examples."""
    rows = [objective.pick_canvas(tokenizer, example, Random(0)) for example in examples]
    return objective.collate(rows, tokenizer.pad_token_id, True, processor)


def test_patches_are_those_of_the_package(processor, model):
    picture = some("picture_counts", 1)[0].pictures[0]
    patches, positions = tower.read_pictures(processor, [picture])
    config = ModelConfig.from_dict(json.loads(model.config.to_json_string())).vision
    ours = images.cut_image(pictures.paint(picture), config, architecture.SOFT_TOKENS)
    assert ours.soft_tokens == architecture.PICTURE_TOKENS
    assert np.array_equal(patches[0].numpy(), ours.patches)
    assert np.array_equal(positions[0].numpy(), ours.position_ids)


def test_prompt_with_a_picture(tokenizer):
    example = next(e for e in some("picture_digits", 20) if e.messages[0]["content"][0]["type"] == "image")
    text = tokenizer.decode(objective.render_prompt(tokenizer, example))
    block = "<|image>" + "<|image|>" * 64 + "<image|>"
    assert text == f"<bos><|turn>user\n{block}{evaluate.question_of(example)}<turn|>\n<|turn>model\n"


def test_prompt_with_a_video(tokenizer):
    example = data.Example(
        "video_moves",
        [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Hi"}]}],
        "",
        seconds=(59, 61),
    )
    text = tokenizer.decode(objective.render_prompt(tokenizer, example))
    block = "<|image>" + "<|image|>" * 64 + "<image|>"
    assert text == f"<bos><|turn>user\n00:59 {block} 01:01 {block}Hi<turn|>\n<|turn>model\n"


def test_soft_tokens_see_their_whole_picture_and_no_later_one(tokenizer, processor, model):
    """As in the reference's `generate`: both directions within a picture on all layers, causal beyond it."""
    example = some("video_moves", 1)[0]
    batch = batch_of(tokenizer, processor, [example])
    starts = [i for i, token in enumerate(batch.prefix[0].tolist()) if token == model.config.boi_token_id]

    @torch.no_grad()
    def keys(patches):
        batch.patches = patches
        return [layer.keys for layer in objective.encode_prefix(model, batch).layers if not layer.is_sliding]

    before = batch.patches
    changed = [before.clone(), before.clone()]
    changed[0][0, 300:] += 0.2  # the lower half of the first frame
    changed[1][1] += 0.2  # the second frame
    plain, lower, second = keys(before), keys(changed[0]), keys(changed[1])
    for layer in range(2):
        start, end, later = (
            slice(0, starts[0] + 1),
            slice(starts[0] + 1, starts[0] + 9),  # the first row of the first frame
            slice(starts[1] + 1, None),
        )
        for changed_layer, same, different in ((lower[layer], start, end), (second[layer], slice(0, starts[1]), later)):
            assert torch.allclose(plain[layer][:, :, same], changed_layer[:, :, same], atol=1e-5)
            assert not torch.allclose(plain[layer][:, :, different], changed_layer[:, :, different], atol=1e-3)


def test_training_encodes_as_generate_does(tokenizer, processor, model, monkeypatch):
    examples = some("picture_contents", 2) + some("video_moves", 1)
    batch = batch_of(tokenizer, processor, examples)
    caches = []
    prepare = type(model)._prepare_denoiser_inputs

    def spy(self, *args, **kwargs):
        caches.append([(layer.keys.clone(), layer.values.clone()) for layer in kwargs["past_key_values"].layers])
        return prepare(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "_prepare_denoiser_inputs", spy)
    evaluate.answer_batch(model, tokenizer, processor, examples)
    with torch.no_grad():
        layers = objective.encode_prefix(model, batch).layers
    valid = batch.prefix_mask
    for layer, (keys, values) in zip(layers, caches[0], strict=True):
        S = layer.keys.shape[2]
        for ours, theirs in ((layer.keys, keys), (layer.values, values)):
            error = (ours - theirs).abs().amax(dim=(1, 3))[valid[:, -S:]].max()
            assert error < 1e-5


def test_text_weights_do_not_depend_on_the_tower(tokenizer, model, monkeypatch):
    small = architecture.build_vision_config()
    small.num_hidden_layers = 1
    monkeypatch.setattr(train, "build_vision_config", lambda: small)
    other = dict(train.build_model(tokenizer, 0).named_parameters())
    names = [name for name, _ in model.named_parameters() if "vision" not in name]
    assert len(names) > 100
    assert all(torch.equal(other[name], param) for name, param in model.named_parameters() if name in names)


def test_first_looks_say_what_is_where():
    mark = pictures.Mark("7", "red", (255, 0, 0), 50.0, 40.0, 8.0)
    found = first_looks.what_is_where(pictures.Picture((mark,), (255, 255, 255)))
    expected = [(0, 0)] * 64
    expected[3 * 8 + 4] = first_looks.WHATS.index("7"), first_looks.COLOUR_NAMES.index("red")
    assert found == expected


def test_first_looks_leave_standardized_features(tokenizer, processor):
    model = train.build_model(tokenizer, 1)
    before = model.model.encoder.embed_vision.embedding_projection.weight.clone()
    first_looks.teach_tower(model.model.encoder.vision_tower, processor, 0, 2, 3e-3, 6e-3)
    first_looks.aim_projector(model, tokenizer, processor, 0)
    rng = Random(5)
    patches, positions = tower.read_pictures(processor, [sights.counts_among(rng).pictures[0] for _ in range(16)])
    with torch.no_grad():
        features = model.model.encoder.vision_tower(patches, positions).last_hidden_state
    assert features.mean(0).abs().mean() < 0.15
    assert (features.std(0) - 1).abs().mean() < 0.15
    assert not torch.equal(before, model.model.encoder.embed_vision.embedding_projection.weight)


def small_run(folder, steps):
    """Make the training of a few tiny steps: two of text, then two with pictures."""
    rounds = "1 1" + (len(train.ROUNDS) - 2) * " 0"
    options = f"--output {folder} --steps 2 --rounds {rounds} --looks 2 --decay 1 --warmup 1"
    training = train.Training(train.parse_arguments(options.split()))
    for step in range(steps):
        training.step(step)
    return training


def test_resumed_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    small = train.Batch(text=2, short=1, pictures=2, videos=1, starts=2)
    monkeypatch.setattr(train, "TEXT_BATCH", train.Batch(text=2, short=1))
    monkeypatch.setattr(train, "ROUNDS", tuple(dataclasses.replace(each, batch=small) for each in train.ROUNDS))
    whole = small_run(tmp_path, 4)
    for done in (1, 2, 3):
        small_run(tmp_path, done).save(tmp_path / "state.pt", done)
        resumed = small_run(tmp_path, 0)
        assert resumed.load(tmp_path / "state.pt") == done
        for step in range(done, 4):
            resumed.step(step)
        for name, param in resumed.model.named_parameters():
            assert torch.equal(param, dict(whole.model.named_parameters())[name]), name
        assert all(torch.equal(weight, whole.average.weights[name]) for name, weight in resumed.average.weights.items())
    tower_name = "model.encoder.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"
    before = dict(small_run(tmp_path, 2).model.named_parameters())[tower_name]
    assert torch.equal(before, dict(small_run(tmp_path, 0).model.named_parameters())[tower_name])
    assert not torch.equal(before, dict(whole.model.named_parameters())[tower_name])

    whole.export(tmp_path / "checkpoint")
    assert sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir()) < 12e6
    assert json.loads((tmp_path / "checkpoint" / "preprocessor_config.json").read_text())["max_soft_tokens"] == 70
    load(tmp_path / "checkpoint")
