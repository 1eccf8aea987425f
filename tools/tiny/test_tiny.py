"""Quick tests of what `tiny` is made from: `pytest tools/tiny`."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import data
import tokenizer as tiny_tokenizer

ROOT = Path(__file__).parents[2]
HI = {"role": "user", "content": "Hi"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"b": True, "a": [1, "x", {"z": 1.5}]}}}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "sunny"}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "City"},
                "days": {"type": "integer"},
                "tags": {"type": "array", "items": {"type": "string"}},
                "unit": {"type": "string", "enum": ["c", "f"]},
            },
            "required": ["city"],
        },
    },
}
DECLARATION = (
    '<|tool>declaration:get_weather{description:<|"|>Get weather<|"|>,parameters:{properties:{'
    'city:{description:<|"|>City<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>INTEGER<|"|>},'
    'tags:{items:{type:<|"|>STRING<|"|>},type:<|"|>ARRAY<|"|>},'
    'unit:{enum:[<|"|>c<|"|>,<|"|>f<|"|>],type:<|"|>STRING<|"|>}},'
    'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
USER = "<|turn>user\nHi<turn|>\n"
MODEL = "<|turn>model\n"
CALLED = '<|tool_call>call:f{a:[1,<|"|>x<|"|>,{z:1.5}],b:true}<tool_call|>'
RESPONSE = '<|tool_response>response:f{value:<|"|>sunny<|"|>}<tool_response|>'
ASSISTANT = {"role": "assistant", "content": "", "tool_calls": [CALL]}

RENDERS = {
    "plain": ([HI], {}, USER + MODEL),
    "thinking": ([HI], {"enable_thinking": True}, "<|turn>system\n<|think|>\n<turn|>\n" + USER + MODEL),
    "system": ([{"role": "system", "content": " S "}, HI], {}, "<|turn>system\nS<turn|>\n" + USER + MODEL),
    "system, thinking, tools": (
        [{"role": "system", "content": "S"}, HI],
        {"enable_thinking": True, "tools": [TOOL]},
        "<|turn>system\n<|think|>\nS" + DECLARATION + "<turn|>\n" + USER + MODEL,
    ),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}, USER + MODEL),
    "pending call": ([HI, ASSISTANT], {}, USER + MODEL + CALLED + "<|tool_response>"),
    "call and result": ([HI, ASSISTANT, RESULT], {}, USER + MODEL + CALLED + RESPONSE),
    "text, call and result": (
        [HI, {**ASSISTANT, "content": "Wait"}, RESULT],
        {},
        USER + MODEL + "Wait" + CALLED + RESPONSE,
    ),
    "answer after a result": (
        [HI, ASSISTANT, RESULT, {"role": "assistant", "content": "Sunny"}, HI],
        {},
        USER + MODEL + CALLED + RESPONSE + "Sunny<turn|>\n" + USER + MODEL,
    ),
    "old thoughts": (
        [HI, {"role": "assistant", "content": "<|channel>thought\nx\n<channel|>Yes"}, HI],
        {},
        USER + MODEL + "Yes<turn|>\n" + USER + MODEL,
    ),
}


def test_training_never_sees_held_out_prompts():
    batch = [example for step in range(50) for example in data.training_batch(0, step, 48)]
    assert not any(example.held_out for example in batch)
    trained = {repr((e.messages, e.tools, e.thinking)) for e in batch}
    held_out = [e for e in data.held_out_examples(1, 200) if e.family not in data.UNSPLIT]
    assert not any(repr((e.messages, e.tools, e.thinking)) in trained for e in held_out)


def test_examples_depend_on_seed_and_step_only():
    assert data.training_batch(3, 7, 8) == data.training_batch(3, 7, 8) != data.training_batch(3, 8, 8)


def test_unknown_family_is_named():
    with pytest.raises(ValueError, match="got 'poems'"):
        data.draw(data.Random(0), "poems")


def test_tokenizer_round_trips_and_keeps_digits_apart(tokenizer):
    text = 'Grüße 你好 🙂 \x00\t "17+25"\n'
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert not any(c.isdigit() and len(token) > 1 for token in tokenizer.get_vocab() for c in token)
    assert tokenizer.convert_ids_to_tokens(range(24)) == tiny_tokenizer.ADDED_TOKENS


@pytest.mark.parametrize("name", RENDERS)
def test_chat_template(tokenizer, name):
    messages, options, expected = RENDERS[name]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    assert text == "<bos>" + expected


def test_published_tokenizer_is_the_one_built_here(tokenizer, tmp_path):
    folder = ROOT / "mlx_diffusiongemma" / "tiny"
    tokenizer.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()
