"""Prompts of both published templates and of `tiny`, the defects worked round, and bad messages."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jinja2 import TemplateError
from small_tokenizer import small_tokenizer
from template_cases import CALLS, CASES, SUNNY, TOOLS, assistant, call, result, system, text, user

import mlx_diffusiongemma
from mlx_diffusiongemma.placeholders import Typed
from mlx_diffusiongemma.prompt import USUAL_LONGEST, build_prompt
from mlx_diffusiongemma.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
TEMPLATES = {"A": "chat_template_mlx4bit_a7a81407.jinja", "B": "chat_template_google_2026-07-09_from_trl.jinja"}
TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"
HEAD = "<bos><|turn>user\nHi<turn|>\n<|turn>model\n"
CALL = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2,flag:true,x:null}<tool_call|>'
RESULT = '<|tool_response>response:get_weather{value:<|"|>sunny<|"|>}<tool_response|>'
NEXT = "<turn|>\n<|turn>user\nok<turn|>\n<|turn>model\n"

MEDIA = {"image", "tool content img", "two imgs", "image_url"}  # in test_media.py
# Where a prompt differs from what the template renders by itself: each has a test of its own below.
MENDED = {
    "tool call + dict result, think": "AB",
    "tool call pending": "AB",
    "content+call+result": "AB",
    "args as string": "AB",
    "then final answer + next user": "B",
    "preserve_thinking w call": "B",
    "double assistant": "A",
    "assistant prefill no gen": "AB",  # a prompt always ends with the generation prompt
}


def read_reference(name: str) -> str:
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(
            f"{path} is missing: the published chat templates and their renders are not part of this repository"
        )
    return path.read_text(encoding="utf-8")


def published(which: str) -> Tokenizer:
    return small_tokenizer(chat_template=read_reference(TEMPLATES[which]))


def expected_renders(which: str) -> dict[str, str]:
    found = {}
    for block in re.split(r"^### ", read_reference("template_renders.txt"), flags=re.MULTILINE)[1:]:
        name, first, second = block.strip("\n").split("\n")
        shown = first if which == "A" or second == "B: same" else second
        found[name] = json.loads(shown[3:])
    return found


@pytest.fixture(params=["A", "B", "tiny"])
def tokenizer(request) -> Tokenizer:
    return Tokenizer.load(TINY) if request.param == "tiny" else published(request.param)


def end(tokenizer: Tokenizer, messages, **options) -> str:
    """The prompt after its first user message, and a check that it is encoded as it reads."""
    prompt = build_prompt(tokenizer, messages, **options)
    assert tokenizer.detokenize(prompt.token_ids) == prompt.text
    assert prompt.text.startswith(HEAD)
    return prompt.text.removeprefix(HEAD)


# --- goldens ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", TEMPLATES)
def test_renders_equal_the_published_ones(which):
    tokenizer, expected = published(which), expected_renders(which)
    assert set(expected) == set(CASES)
    for name, case in CASES.items():
        if expected[name].startswith("ERROR"):
            with pytest.raises(ValueError, match="cannot render"):
                tokenizer.render(case.messages, tools=case.tools, **case.options)
        else:
            assert tokenizer.render(case.messages, tools=case.tools, **case.options) == expected[name], name


@pytest.mark.parametrize("which", TEMPLATES)
def test_prompts_equal_the_published_renders_but_for_the_defects(which):
    tokenizer, expected = published(which), expected_renders(which)
    for name, case in CASES.items():
        if name not in MEDIA and which not in MENDED.get(name, ""):
            prompt = build_prompt(tokenizer, case.messages, tools=case.tools, template_kwargs=case.options)
            assert prompt.text == expected[name].replace("x:None", "x:null"), name


def test_renders_of_tiny_equal_the_golden_ones():
    tokenizer = Tokenizer.load(TINY)
    golden = json.loads((Path(__file__).parent / "data" / "tiny_renders.json").read_text(encoding="utf-8"))
    assert set(golden) == set(CASES) - {"args as string"}
    for name, expected in golden.items():
        case = CASES[name]
        assert tokenizer.render(case.messages, tools=case.tools, **case.options) == expected, name


@pytest.mark.oracle
def test_renders_equal_those_of_transformers(tokenizer):
    from transformers.utils.chat_template_utils import render_jinja_template

    for name, case in CASES.items():
        options = {"add_generation_prompt": True, "enable_thinking": False, "bos_token": "<bos>", **case.options}
        try:
            rendered, _ = render_jinja_template(
                [case.messages], tools=case.tools, chat_template=tokenizer.chat_template, **options
            )
        except (TemplateError, TypeError):
            with pytest.raises(ValueError, match="cannot render"):
                tokenizer.render(case.messages, tools=case.tools, **case.options)
        else:
            assert tokenizer.render(case.messages, tools=case.tools, **case.options) == rendered[0], name


# --- the defects of the templates -------------------------------------------------------------------------------


def test_text_and_calls_then_result_stays_in_the_model_turn_in_the_order_of_writing(tokenizer):
    messages = [user(), assistant("Let me look", tool_calls=CALLS["tool_calls"]), SUNNY]
    assert end(tokenizer, messages) == "Let me look" + CALL + RESULT
    messages += [assistant("It is sunny"), user("ok")]
    assert end(tokenizer, messages) == "Let me look" + CALL + RESULT + "It is sunny" + NEXT


def test_thoughts_in_the_text_of_a_calling_message_are_dropped(tokenizer):
    content = [text("<|channel>thought\nhm\n<channel|> Let me look ")]
    messages = [user(), assistant(content, tool_calls=CALLS["tool_calls"]), SUNNY]
    assert end(tokenizer, messages) == "Let me look" + CALL + RESULT


def test_a_second_round_of_calls_with_text_stays_in_the_model_turn(tokenizer):
    messages = [user()]
    for _ in range(2):
        messages += [assistant("Look", tool_calls=CALLS["tool_calls"]), SUNNY]
    assert end(tokenizer, messages) == ("Look" + CALL + RESULT) * 2


def test_an_answer_after_a_result_has_no_second_turn_header(tokenizer):
    assert end(tokenizer, [user(), CALLS, SUNNY, assistant("It is sunny"), user("ok")]) == (
        CALL + RESULT + "It is sunny" + NEXT
    )


def test_a_user_message_after_a_result_closes_the_model_turn(tokenizer):
    assert end(tokenizer, [user(), CALLS, SUNNY, user("ok")]) == CALL + RESULT + NEXT


def test_an_object_as_tool_result_becomes_json_text(tokenizer):
    shown = RESULT.replace("sunny", '{"t": 21, "sky": "é"}')
    assert end(tokenizer, [user(), CALLS, result({"t": 21, "sky": "é"})]) == CALL + shown
    assert end(tokenizer, [user(), CALLS, result(21)]) == CALL + RESULT.replace("sunny", "21")
    assert end(tokenizer, [user(), CALLS, result(None)]) == CALL + RESULT.replace("sunny", "")


@pytest.mark.parametrize(
    ("arguments", "shown"), [('{"a": {"b": [1, null]}}', "{a:{b:[1,null]}}"), ("", "{}"), (None, "{}"), ("{}", "{}")]
)
def test_arguments_as_json_text_are_parsed(tokenizer, arguments, shown):
    messages = [user(), assistant(None, tool_calls=[call("f", arguments)]), result("r")]
    after = '<|tool_response>response:f{value:<|"|>r<|"|>}<tool_response|>'
    assert end(tokenizer, messages) == f"<|tool_call>call:f{shown}<tool_call|>" + after


def test_none_among_arguments_and_responses_is_null(tokenizer):
    responses = [{"name": "get_weather", "response": {"sky": None}}]
    shown = "<|tool_response>response:get_weather{sky:null}<tool_response|>"
    assert end(tokenizer, [user(), {**CALLS, "tool_responses": responses}]) == CALL + shown


def test_two_assistant_messages_are_one_turn(tokenizer):
    messages = [user(), assistant("A "), assistant("B"), user("ok")]
    assert end(tokenizer, messages) == "AB" + NEXT
    messages = [user(), assistant("Look"), CALLS, SUNNY, assistant("Sun"), assistant("ny"), user("ok")]
    assert end(tokenizer, messages) == "Look" + CALL + RESULT + "Sunny" + NEXT


def test_calls_in_separate_messages_are_one_turn(tokenizer):
    messages = [
        user(),
        assistant(tool_calls=[call("f", {}, "1")]),
        assistant(tool_calls=[call("g", {}, "2")]),
        result("B", "2"),
        result("A", "1"),
    ]
    assert end(tokenizer, messages) == (
        "<|tool_call>call:f{}<tool_call|><|tool_call>call:g{}<tool_call|>"
        '<|tool_response>response:g{value:<|"|>B<|"|>}<tool_response|>'
        '<|tool_response>response:f{value:<|"|>A<|"|>}<tool_response|>'
    )


def test_results_without_ids_find_their_calls_by_name_or_place(tokenizer):
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("f", "g")]
    messages = [user(), assistant(tool_calls=calls), {"role": "tool", "content": "A"}, {"role": "tool", "content": "B"}]
    by_place = end(tokenizer, messages)
    assert 'response:f{value:<|"|>A<|"|>}' in by_place and 'response:g{value:<|"|>B<|"|>}' in by_place
    messages[2]["name"], messages[3]["name"] = "g", "f"
    assert 'response:g{value:<|"|>A<|"|>}' in end(tokenizer, messages)


def test_an_answer_as_last_message_is_followed_by_a_new_model_turn(tokenizer):
    assert end(tokenizer, [user(), assistant("Sure")]) == "Sure<turn|>\n<|turn>model\n"
    responses = [{"name": "get_weather", "response": {"ok": True}}]
    closed = end(tokenizer, [user(), {**CALLS, "tool_responses": responses, "content": "It is"}])
    assert closed.endswith(("<turn|>\n<|turn>model\n", "<tool_response|>"))


def test_a_tool_without_parameters_or_their_type_is_declared_with_balanced_braces(tokenizer):
    for parameters in ({}, {"properties": {"a": {"type": "string"}}}, None):
        tool = {"name": "f", "description": None, "parameters": parameters}
        shown = build_prompt(tokenizer, "Hi", tools=[tool]).text
        declaration = shown[shown.index("<|tool>") : shown.index("<tool|>")]
        assert declaration.count("{") == declaration.count("}") and "None" not in declaration
        assert declaration.endswith('type:<|"|>OBJECT<|"|>}}')


def test_a_template_that_forgets_the_generation_prompt_is_completed():
    tokenizer = small_tokenizer(chat_template="<|turn>user\n{{ messages[0].content }}")
    assert build_prompt(tokenizer, "Hi").text == "<|turn>user\nHi<turn|>\n<|turn>model\n"
    assert build_prompt(small_tokenizer(chat_template="[{{ messages[0].content }}]"), "Hi").text == "[Hi]"


# --- thinking, prefill, raw -------------------------------------------------------------------------------------


def test_thinking_is_off_unless_asked_for(tokenizer):
    assert "<|think|>" not in build_prompt(tokenizer, "Hi").text
    for options in ({"enable_thinking": True}, {"template_kwargs": {"enable_thinking": True}}):
        prompt = build_prompt(tokenizer, "Hi", **options)
        assert "<|think|>" in prompt.text
        assert not prompt.thinking_open


def test_an_open_thought_after_a_result_is_noticed():
    prompt = build_prompt(published("B"), [user(), CALLS, SUNNY], enable_thinking=True)
    assert prompt.text.endswith(RESULT + "<|channel>thought\n")
    assert prompt.thinking_open
    assert not build_prompt(published("B"), [user(), CALLS, SUNNY]).thinking_open
    assert not build_prompt(published("A"), [user(), CALLS, SUNNY], enable_thinking=True).thinking_open


def test_a_closed_thought_in_the_generation_prompt_is_not_open():
    tokenizer = small_tokenizer(chat_template="<|turn>model\n<|channel>thought\n<channel|>")
    assert not build_prompt(tokenizer, "Hi").thinking_open


def test_prefill_is_appended_as_it_is(tokenizer):
    assert end(tokenizer, "Hi", prefill_response=" Sure, ") == " Sure, "
    assert build_prompt(tokenizer, "Hi", prefill_response="<|channel>thought\nHm").thinking_open


def test_prefill_begins_the_answer_and_not_an_open_thought():
    prompt = build_prompt(published("B"), [user(), CALLS, SUNNY], enable_thinking=True, prefill_response="It is")
    assert prompt.text.endswith(RESULT + "It is")
    assert not prompt.thinking_open


def test_raw_text_is_encoded_as_it_is_behind_one_bos():
    tokenizer = small_tokenizer()  # has no template
    for given in ("Once", "<bos>Once"):
        prompt = build_prompt(tokenizer, given, raw=True)
        assert prompt.text == "<bos>Once"
        assert prompt.token_ids == (tokenizer.special.bos, *tokenizer.encode("Once"))
    assert build_prompt(tokenizer, "a", raw=True, prefill_response="b").text == "<bos>ab"


def test_developer_is_system_everywhere(tokenizer):
    for place in ([system("D", "developer"), user()], [user(), system("D", "developer"), user()]):
        twin = [system("D") if message["role"] == "developer" else message for message in place]
        assert build_prompt(tokenizer, place).text == build_prompt(tokenizer, twin).text


def test_a_bare_function_is_a_tool(tokenizer):
    wrapped = build_prompt(tokenizer, "Hi", tools=TOOLS).text
    assert build_prompt(tokenizer, "Hi", tools=[TOOLS[0]["function"]]).text == wrapped


def test_messages_are_left_as_they_were(tokenizer):
    messages = [
        system("D", "developer"),
        user(),
        assistant("T", tool_calls=[call("f", '{"a":null}')]),
        result({"b": 1}),
    ]
    before = json.dumps(messages)
    build_prompt(tokenizer, messages, tools=TOOLS)
    assert json.dumps(messages) == before


# --- bad input --------------------------------------------------------------------------------------------------

BAD = {
    "empty string": ("", "the prompt is empty: got ''"),
    "whitespace": (" \n\t", "the prompt is empty: got ' \\n\\t'"),
    "no messages": ([], "the prompt is empty: got no messages"),
    "empty message": ([user("  ")], "the prompt is empty: no message has any text"),
    "no parts": ([user([])], "the prompt is empty: no message has any text"),
    "number": (3, "messages must be a string or a list of messages, got int"),
    "one object": ({"role": "user"}, "messages must be a string or a list of messages, got dict"),
    "text as message": (["Hi"], "messages[0] must be an object with role and content, got str"),
    "unknown role": ([user(), {"role": "bot", "content": "x"}], "messages[1].role must be one of system, developer, "),
    "no content": ([{"role": "user"}], "messages[0].content must be text or a list of parts, got nothing"),
    "number as content": ([user(3)], "messages[0].content must be text or a list of parts, got 3"),
    "no content or calls": ([user(), assistant(None)], "messages[1].content must be text or a list of parts"),
    "unknown part": ([user([{"type": "smell"}])], "messages[0].content[0] must be a part like"),
    "part without text": ([user([{"type": "text"}])], "messages[0].content[0].text must be text, got NoneType"),
    "calls as text": ([user(), assistant(tool_calls="f")], "messages[1].tool_calls must be a list, got str"),
    "call without name": ([user(), assistant(tool_calls=[{}])], "messages[1].tool_calls[0] must be like"),
    "arguments no json": (
        [user(), assistant(tool_calls=[call("f", "{a")]), result("r")],
        "messages[1].tool_calls[0].function.arguments is not JSON",
    ),
    "arguments a list": (
        [user(), assistant(tool_calls=[call("f", "[1]")]), result("r")],
        "messages[1].tool_calls[0].function.arguments must be a JSON object, got [1]",
    ),
    "pending call": ([user(), CALLS], "messages[1] calls 'get_weather', expected a tool message with the result after"),
    "call then user": ([user(), CALLS, user()], "messages[1] calls 'get_weather', expected a tool message"),
    "result alone": (
        [user(), result("r")],
        "messages[1] is a tool result, expected an assistant message with tool_calls",
    ),
    "unknown call": (
        [user(), CALLS, result("r", "9")],
        "messages[2] answers no call: got tool_call_id '9', expected one of '1'",
    ),
    "foreign data": ([user(), CALLS, result({1, 2})], "messages[2].content must be text or plain JSON data"),
    "lone surrogate": ("a\udcff", "text is not valid Unicode"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_messages_are_named(name):
    messages, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build_prompt(Tokenizer.load(TINY), messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("f", "tools[0]: expected"),
        ({"type": "retrieval"}, "tools[0]: expected"),
        ({"type": "function"}, "tools[0]: expected"),
        ({"function": {"name": ""}}, "tools[0]: expected"),
        ({"name": "f", "description": 3}, "tools[0] description must be text, got int"),
        ({"name": "f", "parameters": [1]}, "tools[0] parameters must be a JSON schema object, got [1]"),
    ],
)
def test_bad_tools_are_named(tool, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_prompt(Tokenizer.load(TINY), "Hi", tools=[tool])


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([user()], {"raw": True}, "a raw prompt must be one string, got list"),
        ("Hi", {"raw": True, "tools": TOOLS}, "a raw prompt takes none"),
        (" ", {"raw": True}, "the prompt is empty"),
        ("Hi", {"prefill_response": 3}, "prefill_response must be text, got int"),
        ("Hi", {"template_kwargs": {"tools": []}}, "template_kwargs must not contain 'tools'"),
    ],
)
def test_bad_options_are_named(messages, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_prompt(Tokenizer.load(TINY), messages, **options)


def test_a_checkpoint_without_a_template_says_so():
    with pytest.raises(ValueError, match="this checkpoint has no chat template"):
        build_prompt(small_tokenizer(), "Hi")


@pytest.mark.parametrize("tools", [5, {"type": "function"}, "get_weather"])
def test_tools_are_a_list(tokenizer, tools):
    with pytest.raises(ValueError, match=f"tools: got {type(tools).__name__}, expected a list of tools"):
        build_prompt(tokenizer, "hi", tools=tools)


def test_a_text_is_cut_at_its_stand_ins_and_nowhere_else():
    typed = Typed(["\U000f0000 is in use"], reserved=["<bos>", "<eos>"])
    text = "\U000f0000a<bos><eos>\U000f1000 é <bos>"
    expected = [("\U000f0000a", False), ("<bos>", True), ("<eos>", True), ("\U000f1000 é ", False), ("<bos>", True)]
    assert typed.split(typed.hide(text)) == expected
    assert typed.split("plain") == [("plain", False)] and typed.split("") == []


@pytest.mark.parametrize("raw", [False, True])
def test_a_text_that_cannot_fit_is_not_encoded(monkeypatch, raw):
    tokenizer = small_tokenizer(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    longest, bos = max(tokenizer.longest_token, USUAL_LONGEST), tokenizer.bos_token or ""
    fits = build_prompt(tokenizer, "a" * (4 * longest - len(bos) * raw), raw=raw, max_prompt_tokens=4)
    assert len(fits.token_ids) > 4, "what it has in truth is counted by others"
    monkeypatch.setattr(tokenizer, "encode", None)
    parts = [{"role": "user", "content": [{"type": "text", "text": "a" * 9 * longest}]}]
    for messages in ["a" * (5 * longest + 1)] + [parts] * (not raw):
        with pytest.raises(ValueError, match=r"the prompt has \d+ tokens or more; expected at most 4"):
            build_prompt(tokenizer, messages, raw=raw, max_prompt_tokens=4)
