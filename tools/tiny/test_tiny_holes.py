"""How canvases that begin with more than noise are trained and measured: `pytest -m oracle tools/tiny`."""

import sys
from pathlib import Path
from random import Random

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import architecture
import data
import evaluate
import objective
import train

pytestmark = pytest.mark.oracle

C = architecture.CANVAS_LENGTH
ASK = [{"role": "user", "content": "Fill in."}]
CLOSED = data.Example("holes_in_texts", ASK, "The capital of Peru is Lima.", hole=(22, 27))
OPEN = data.Example("holes_in_texts", ASK, "3, 4, 5, 6", hole=(2, 7), is_open=True)
WARM = data.Example("warm_edits", ASK, "Ana has 12 pens.", draft="Ana has 7 pens.")
PLAIN = data.Example("small_sums", ASK, "12")


def batch_of(tokenizer, processor, *examples):
    """Collate canvases of examples."""
    rows = [objective.pick_canvas(tokenizer, example, Random(0)) for example in examples]
    return objective.collate(rows, tokenizer.pad_token_id, True, processor)


def known(tokenizer, example):
    """Return the tokens of a canvas, None where they are not given."""
    row = objective.start_canvas(tokenizer, example)
    tokens = tokenizer.convert_ids_to_tokens(row.canvas)
    return [token if pin else None for token, pin in zip(tokens, row.pinned, strict=True)]


def test_what_is_known_of_a_canvas(tokenizer):
    end = ["<turn|>"] + ["<eos>"] * C
    assert known(tokenizer, CLOSED) == (["The", "Ġcapital", "Ġof", "ĠPeru", "Ġis", None, ".", *end])[:C]
    assert known(tokenizer, OPEN) == ["3", ",", *[None] * 5, ",", "Ġ", "6", *[None] * (C - 10)]
    raw = data.Example("holes_in_completions", [], " Lima.", "<eos>", lead="Peru:", hole=(0, 5))
    assert known(tokenizer, raw) == [None, ".", *["<eos>"] * (C - 2)]
    assert tokenizer.decode(objective.render_prompt(tokenizer, raw)) == "<bos>Peru:"


def test_a_canvas_that_is_too_long_is_refused(tokenizer):
    with pytest.raises(ValueError, match="canvas of holes_in_texts: got 81 tokens, expected at most 64"):
        objective.start_canvas(tokenizer, data.Example("holes_in_texts", ASK, "1" * 80, hole=(0, 1)))


def test_nothing_is_asked_of_what_is_known(tokenizer, processor):
    batch = batch_of(tokenizer, processor, CLOSED, OPEN, PLAIN)
    expected = torch.zeros(3, C)
    expected[0, 5] = 4.0  # (16 / 1 token of the hole) ** 0.5
    expected[1, 2:7] = expected[1, 10:] = (16 / 6) ** 0.5  # the hole, the end token, and the filling
    expected[2] = (16 / 3) ** 0.5
    assert torch.allclose(batch.weight, expected)
    assert batch_of(tokenizer, processor, PLAIN).pinned is None


def test_noise_leaves_what_is_known_and_brings_the_draft(tokenizer, processor):
    batch = batch_of(tokenizer, processor, CLOSED, OPEN, WARM, PLAIN)
    V, generator = len(tokenizer), torch.Generator().manual_seed(0)
    canvases = torch.stack([objective.corrupt(batch, torch.ones(4, 1), V, generator) for _ in range(200)])
    changed = (canvases != batch.target).float().mean(0)  # (4, C)
    assert (changed[batch.pinned] == 0).all()
    assert (changed[[0, 1, 3]][~batch.pinned[[0, 1, 3]]] > 0.97).all()
    drafted = (canvases[:, 2] == batch.draft[2]).all(dim=1).float().mean()
    assert 0.4 < drafted < 0.6
    assert torch.equal(objective.corrupt(batch, torch.zeros(4, 1), V, generator), batch.target)


def test_plain_batches_are_corrupted_as_before(tokenizer, processor):
    batch = batch_of(tokenizer, processor, PLAIN, PLAIN)
    level = torch.tensor([[0.3], [0.9]])
    got = objective.corrupt(batch, level, 1633, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(1633, (2, C), generator=generator)
    replaced = torch.rand(2, C, generator=generator) < level
    assert torch.equal(got, torch.where(replaced, noise, batch.target))


def test_pinned_logits_are_certain():
    logits = torch.randn(1, 3, 5)
    pinned, ids = torch.tensor([[True, False, True]]), torch.tensor([[4, 0, 2]])
    got = objective.pin_logits(logits, pinned, ids)
    assert torch.equal(got[0, 1], logits[0, 1])
    assert got.softmax(-1)[0, 0].tolist() == [0, 0, 0, 0, 1] and got.softmax(-1)[0, 2].tolist() == [0, 0, 1, 0, 0]


def test_evaluation_keeps_what_is_known_and_starts_from_the_draft(tokenizer, processor, monkeypatch):
    """In every step of transformers' `generate`, with random weights, so that nothing else would keep it."""
    model = train.build_model(tokenizer, 0)
    model.generation_config.max_denoising_steps = 3
    seen = []
    forward = type(model).forward

    def spy(self, *args, **kwargs):
        seen.append((kwargs["decoder_input_ids"], kwargs["self_conditioning_logits"]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spy)
    examples = [CLOSED, OPEN, WARM]
    rows = [objective.start_canvas(tokenizer, example) for example in examples]
    answers = evaluate.answer_batch(model, tokenizer, processor, examples)
    assert len(seen) == 3 and seen[0][1] is None
    for row, example in enumerate((CLOSED, OPEN)):
        target = torch.tensor(rows[row].canvas)
        pinned = torch.tensor(rows[row].pinned)
        for canvas, conditioning in seen:
            assert torch.equal(canvas[row][pinned], target[pinned])
            assert not torch.equal(canvas[row], target)
            if conditioning is not None:
                certain = conditioning[row].softmax(-1)[pinned].gather(-1, target[pinned][:, None])
                assert (certain == 1).all()
        assert answers[row].expected == example.answer
    assert answers[0].got.startswith("The capital of Peru is") and answers[0].got.endswith(".")
    assert seen[0][0][2].tolist() == rows[2].draft and seen[1][0][2].tolist() != rows[2].draft
