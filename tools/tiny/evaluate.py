"""Measure a checkpoint on held-out prompts with transformers' own `generate`.

An answer is right when its text, up to the end token, is exactly the expected one. Prompts of one family are
generated together with the reference's left padding; `--check` compares padded logits with those of single prompts.
Pictures go through the checkpoint's own image processor. transformers' DiffusionGemma has no video input: the two
frames of a video are given to it as two images with their times, which is what the model sees of a video. Nor does it
know holes: a logits processor makes the text around a hole certain, which holds it in the canvas and in the
self-conditioning of every step.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from architecture import END_TOKENS
from data import SIGHTS, STARTS, WEIGHTS, Example, held_out_examples, held_out_sights, held_out_starts
from objective import Row, pin_logits, render_prompt, start_canvas
from tower import read_pictures
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.models.diffusion_gemma import DiffusionGemmaForBlockDiffusion
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil

MAX_NEW_TOKENS = 384


@dataclass
class Answer:
    """What the model wrote for one example, and what it cost."""

    family: str
    prompt: str
    expected: str
    got: str
    steps: int
    canvases: int

    @property
    def right(self) -> bool:
        """Tell whether the answer is exactly the expected one."""
        return self.got == self.expected


def pad_prompts(prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad prompts on the left. Returns ids and mask, both (B, L)."""
    length = max(map(len, prompts))
    ids = torch.tensor([[pad_id] * (length - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def question_of(example: Example) -> str:
    """Return the text of the last message."""
    if example.lead is not None:
        return example.lead
    content = example.messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


class Pins(LogitsProcessor):
    """Makes the known tokens of a batch of canvases certain in every step."""

    def __init__(self, rows: list[Row]):
        self.token_ids = torch.tensor([row.canvas for row in rows])  # (B, C)
        self.pinned = torch.tensor([row.pinned or [False] * len(row.canvas) for row in rows])  # (B, C)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, C, V) of a step with the known tokens' made certain."""
        return pin_logits(scores, self.pinned, self.token_ids)

    def first_canvas(self, rows: list[Row], vocab_size: int) -> torch.Tensor:
        """Return what the canvases begin with, (B, C): the known tokens or the draft, else noise."""
        noise = torch.randint(vocab_size, self.token_ids.shape)
        canvas = torch.where(self.pinned, self.token_ids, noise)
        for index, row in enumerate(rows):
            if row.draft is not None:
                canvas[index] = torch.tensor(row.draft)
        return canvas


def answer_batch(
    model: DiffusionGemmaForBlockDiffusion,
    tokenizer: PreTrainedTokenizerBase,
    processor: Gemma4ImageProcessorPil,
    examples: list[Example],
) -> list[Answer]:
    """Generate the answers of a batch of examples."""
    prompts = [render_prompt(tokenizer, example) for example in examples]
    ids, mask = pad_prompts(prompts, tokenizer.pad_token_id)
    seen: dict[str, Any] = {}
    if pictures := [picture for example in examples for picture in example.pictures]:
        seen["pixel_values"], seen["image_position_ids"] = read_pictures(processor, pictures)
        seen["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
    length = MAX_NEW_TOKENS
    if examples[0].family in STARTS:
        rows = [start_canvas(tokenizer, example) for example in examples]
        pins = Pins(rows)
        seen["logits_processor"] = LogitsProcessorList([pins])
        seen["decoder_input_ids"] = pins.first_canvas(rows, model.config.text_config.vocab_size)
        length = model.config.canvas_length
    output = model.generate(ids, attention_mask=mask, max_new_tokens=length, **seen)
    ends = set(tokenizer.convert_tokens_to_ids(END_TOKENS))
    answers = []
    for row, example in enumerate(examples):
        new = output.sequences[row, ids.shape[1] :].tolist()
        stop = next((i for i, token in enumerate(new) if token in ends), len(new))
        end = tokenizer.decode(new[stop : stop + 1])
        text = tokenizer.decode(new[:stop]) + ("" if end == example.end_token else end)
        written = sum(token != tokenizer.pad_token_id for token in new)
        steps = round(written / float(output.tokens_per_forward[row]))
        canvases = -(-(stop + 1) // model.config.canvas_length)
        answers.append(Answer(example.family, question_of(example), example.answer, text, steps, canvases))
    return answers


@torch.no_grad()
def padding_error(
    model: DiffusionGemmaForBlockDiffusion, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> float:
    """Largest difference between the logits of padded prompts and of the same prompts alone."""
    prompts = [render_prompt(tokenizer, example) for example in examples]
    C = model.config.canvas_length
    canvas = torch.randint(model.config.text_config.vocab_size, (len(prompts), C))

    def logits(rows: list[list[int]], canvas: torch.Tensor) -> torch.Tensor:
        ids, mask = pad_prompts(rows, tokenizer.pad_token_id)
        decoder_mask = torch.nn.functional.pad(mask, (0, C), value=1)
        return model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=canvas, decoder_attention_mask=decoder_mask
        ).logits

    together = logits(prompts, canvas)
    alone = torch.cat([logits([prompt], canvas[i : i + 1]) for i, prompt in enumerate(prompts)])
    return float((together - alone).abs().max())


def summarize(answers: list[Answer]) -> dict[str, dict[str, float]]:
    """Count right answers and mean denoising steps per canvas, by family and overall, text, sights and starts apart."""
    rows: dict[str, list[Answer]] = {}
    for answer in answers:
        rows.setdefault(answer.family, []).append(answer)
    apart = {"pictures overall": SIGHTS, "holes and drafts overall": STARTS}
    kinds = {family: name for name, families in apart.items() for family in families}
    for name in ("text overall", *apart):
        if group := [answer for answer in answers if kinds.get(answer.family, "text overall") == name]:
            rows[name] = group
    return {
        name: {
            "prompts": len(group),
            "right": sum(answer.right for answer in group),
            "exact_match": round(sum(answer.right for answer in group) / len(group), 4),
            "steps_per_canvas": round(sum(a.steps for a in group) / sum(a.canvases for a in group), 2),
        }
        for name, group in rows.items()
    }


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """Print the summary as a Markdown table."""
    print("| family | prompts | exact match | steps per canvas |\n|---|---:|---:|---:|")
    for name, row in summary.items():
        print(f"| {name} | {row['prompts']} | {row['exact_match']:.1%} | {row['steps_per_canvas']:.1f} |")


def main(argv: list[str] | None = None) -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--prompts", type=int, default=500, help="of the text families")
    parser.add_argument("--sights", type=int, default=500, help="questions about pictures and videos")
    parser.add_argument("--starts", type=int, default=200, help="holes, and edits that begin with the old text")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out prompts and of the generation")
    parser.add_argument("--families", nargs="*", help="only these")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write summary and wrong answers here")
    parser.add_argument("--check", action="store_true", help="compare padded with single prompts first")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = Gemma4ImageProcessorPil.from_pretrained(args.model)
    examples = [
        *held_out_examples(args.seed, args.prompts),
        *held_out_sights(args.seed, args.sights),
        *held_out_starts(args.seed, args.starts),
    ]
    if args.families:
        examples = [example for example in examples if example.family in args.families]
    if args.check:
        texts = [example for example in examples if example.family in WEIGHTS][:24]
        print(f"padded and single logits differ by at most {padding_error(model, tokenizer, texts):.1e}")
    by_family: dict[str, list[Example]] = {}
    for example in examples:
        by_family.setdefault(example.family, []).append(example)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    answers = [answer for group in by_family.values() for answer in answer_batch(model, tokenizer, processor, group)]
    summary = summarize(answers)
    print_table(summary)
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}, weights of {args.model.name} as float32")
    if args.json:
        wrong = [asdict(answer) for answer in answers if not answer.right]
        args.json.write_text(json.dumps({"seed": args.seed, "summary": summary, "wrong": wrong}, indent=1) + "\n")


if __name__ == "__main__":
    main()
