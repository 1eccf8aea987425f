"""Images and videos in prompts: parts of messages, lists beside them, placeholders, spans, and what is refused."""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from PIL import Image
from small_model import vision_config
from small_tokenizer import KINDS, backend, small_tokenizer
from template_cases import CASES, IMAGE, assistant, result, system, text, user
from test_prompt import TEMPLATES, TINY, expected_renders, published

from mlx_diffusiongemma import media
from mlx_diffusiongemma.media import MediaCounts, Sight, count_media
from mlx_diffusiongemma.placeholders import RESERVED, Typed
from mlx_diffusiongemma.prompt import Prompt, build_prompt
from mlx_diffusiongemma.tokenizer import SPELLINGS, Tokenizer
from mlx_diffusiongemma.video import Frame

TOWER = vision_config(position_embedding_size=200)
SIGHT = Sight(TOWER, image_tokens=70)
VIDEO = {"type": "video"}
HEAD = "<bos><|turn>user\n"
TAIL = "<turn|>\n<|turn>model\n"


def picture(color: str = "red", size: tuple[int, int] = (30, 20)) -> Image.Image:
    return Image.new("RGB", size, color)


def png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def frames(*seconds: float) -> list[tuple[Image.Image, float]]:
    return [(picture(size=(40, 40)), second) for second in seconds]


def build(messages: Any, tokenizer: Tokenizer | None = None, **options: Any) -> Prompt:
    return build_prompt(tokenizer or Tokenizer.load(TINY), messages, **{"sight": SIGHT, **options})


def shown(prompt: Prompt) -> str:
    """The text with every run of soft tokens as its length; the ids must agree with it and with the spans."""
    special = Tokenizer.load(TINY).special
    for block in prompt.blocks:
        start, stop = block.span
        assert prompt.token_ids[start - 1] == special.boi and prompt.token_ids[stop] == special.eoi
        assert set(prompt.token_ids[start:stop]) == {special.image if block.kind == "image" else special.video}
    soft = [i for i in prompt.token_ids if i in (special.image, special.video)]
    assert len(soft) == sum(block.image.soft_tokens for block in prompt.blocks)
    runs = re.compile(r"<\|image>((<\|image\|>)+|(<\|video\|>)+)<image\|>")
    return runs.sub(lambda m: f"[{len(m[1]) // 9}{'v' if m[3] else ''}]", prompt.text)


# --- what the templates render ------------------------------------------------------------------------------


@pytest.mark.parametrize("which", TEMPLATES)
@pytest.mark.parametrize("name", ["image", "tool content img", "two imgs"])
def test_prompts_equal_the_published_renders_with_placeholders_expanded(which: str, name: str) -> None:
    case, expected = CASES[name], expected_renders(which)[name].replace("x:None", "x:null").replace("<|audio|>", "")
    messages = copy.deepcopy(case.messages)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [part for part in message["content"] if part["type"] != "audio"]
    videos = [frames(0, 61)] * expected.count("<|video|>")
    images = [picture()] * expected.count("<|image|>")
    prompt = build(messages, published(which), tools=case.tools, images=images, videos=videos)
    soft = prompt.blocks[0].image.soft_tokens
    frame = "<|image>" + "<|video|>" * 64 + "<image|>"
    mark = "\0"
    expected = expected.replace("<|image|>", mark).replace("<|video|>", f"00:00 {frame} 01:01 {frame}")
    assert prompt.text == expected.replace(mark, "<|image>" + "<|image|>" * soft + "<image|>")


@pytest.mark.parametrize("which", TEMPLATES)
def test_openai_parts_equal_the_newer_template_in_both(which: str) -> None:
    """The older template drops image_url parts without a word."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture())}}, text("x")]
    assert expected_renders("A")["image_url"] == HEAD + "x" + TAIL
    run = "<|image>" + "<|image|>" * 60 + "<image|>"
    expected = expected_renders("B")["image_url"].replace("<|image|>", run)
    assert build([user(parts)], published(which)).text == expected


# --- parts and lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(picture()), "detail": "high"}},
        {"type": "image_url", "image_url": data_url(picture())},
        {"type": "input_image", "image_url": data_url(picture()), "detail": "auto"},
        {"type": "image", "image": data_url(picture())},
        {"type": "image", "url": data_url(picture()).replace("data:", "DATA:")},
        {"type": "image", "image": png(picture())},
        {"type": "image", "image": picture()},
        {"type": "image", "image": picture(), "cache_control": {"type": "ephemeral"}},
    ],
)
def test_every_way_to_write_an_image_part(part: dict[str, Any]) -> None:
    prompt = build([user([text("a"), part, text("b")])])
    assert shown(prompt) == HEAD + "a[60]b" + TAIL
    assert [block.kind for block in prompt.blocks] == ["image"]


def test_text_in_the_responses_dialect() -> None:
    image = {"type": "input_image", "image_url": data_url(picture())}
    assert shown(build([user([{"type": "input_text", "text": "a"}, image])])) == HEAD + "a[60]" + TAIL


@pytest.mark.parametrize("kind", ["video", "video_url", "input_video"])
def test_every_way_to_write_a_video_part(kind: str) -> None:
    key = kind.removeprefix("input_")
    prompt = build([user([{"type": kind, key: frames(0, 1.5, 62)}, text("b")])])
    assert shown(prompt) == HEAD + "00:00 [64v] 00:01 [64v] 01:02 [64v]b" + TAIL
    assert count_media(prompt.blocks) == MediaCounts(images=0, video_frames=3, image_tokens=192)


def test_images_go_in_front_of_the_last_user_message() -> None:
    assert shown(build("What?", images=[picture()])) == HEAD + "[60]What?" + TAIL
    assert shown(build("What?", images=picture())) == HEAD + "[60]What?" + TAIL
    assert shown(build("What?", images=[picture(size=(20, 20)), picture()])) == HEAD + "[64][60]What?" + TAIL
    assert shown(build("What?", videos=[frames(3)], images=[picture()])) == HEAD + "[60]00:03 [64v]What?" + TAIL
    chat = [user("one"), assistant("two"), user([text("three")])]
    assert shown(build(chat, images=[picture()])).endswith("<|turn>user\n[60]three" + TAIL)
    assert shown(build("", images=[picture()])) == HEAD + "[60]" + TAIL


def test_images_fill_the_parts_without_content_in_order() -> None:
    sizes = [(20, 20), (30, 20), (40, 20), (20, 60)]
    a, b, c, d = (picture(size=size) for size in sizes)
    chat = [
        user([text("1"), IMAGE, text("2"), {"type": "image", "image": b}, IMAGE]),
        assistant("ok"),
        user([IMAGE, text("3"), VIDEO]),
    ]
    prompt = build(chat, images=[a, c, d], videos=[frames(7)])
    tokens = [block.image.soft_tokens for block in prompt.blocks]
    assert tokens == [build("x", images=[image]).blocks[0].image.soft_tokens for image in (a, b, c, d)] + [64]
    assert shown(prompt) == (
        f"{HEAD}1[{tokens[0]}]2[{tokens[1]}][{tokens[2]}]<turn|>\n<|turn>model\nok<turn|>\n<|turn>user\n"
        f"[{tokens[3]}]300:07 [64v]{TAIL}"
    )
    assert [block.kind for block in prompt.blocks] == ["image"] * 4 + ["video"]


def test_a_list_of_one_kind_goes_in_front_though_there_are_parts_of_the_other() -> None:
    assert shown(build([user([VIDEO, text("x")])], videos=[frames(0)], images=[picture()])) == (
        HEAD + "[60]00:00 [64v]x" + TAIL
    )


def test_messages_are_left_as_they_were() -> None:
    chat = [user([IMAGE, text("x")]), assistant("y"), user("z")]
    before = json.dumps(chat)
    build(chat, images=[picture()])
    assert json.dumps(chat) == before


def test_paths_are_read_from_lists(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", png(picture()), data_url(picture())):
        assert shown(build("x", images=[source])) == HEAD + "[60]x" + TAIL
        assert shown(build("x", images=source)) == HEAD + "[60]x" + TAIL


@pytest.mark.parametrize("budget", [70, 140, 280, 560, 1120])
def test_every_budget(budget: int) -> None:
    [block] = build("x", images=[picture(size=(64, 64))], sight=Sight(TOWER, image_tokens=budget)).blocks
    assert budget * 0.8 < block.image.soft_tokens <= budget


def test_frames_take_seventy_tokens_whatever_the_budget() -> None:
    [block] = build("x", videos=[frames(0)], sight=Sight(TOWER, image_tokens=1120)).blocks
    assert block.image.soft_tokens == 64


# --- placeholders -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", RESERVED)
def test_typed_placeholders_are_text(kind: str, spelling: str) -> None:
    template = published("B").chat_template
    tokenizer = small_tokenizer(kind, template)
    media = {token for name, token in vars(tokenizer.special).items() if SPELLINGS[name] in RESERVED}
    messages = [
        system(f"s {spelling}"),
        user([text(f"look {spelling} here"), text(spelling)]),
        assistant("a", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {"k": f"v {spelling}"}}}]),
        result(f"r {spelling}"),
        assistant(f"b {spelling}"),
        user("c"),
    ]
    tools = [{"name": "f", "description": f"does {spelling}", "parameters": {"properties": {spelling: {}}}}]
    plain = build(messages, tokenizer, tools=tools, prefill_response=f"sure {spelling}")
    assert not media & set(plain.token_ids)
    assert plain.text.count(spelling) == 9
    assert tokenizer.detokenize(plain.token_ids) == plain.text
    messages[-1] = user([IMAGE, text("c")])
    seen = build(messages, tokenizer, tools=tools, prefill_response=f"sure {spelling}", images=[picture()])
    assert [seen.token_ids[slice(*block.span)] for block in seen.blocks] == [(tokenizer.special.image,) * 60]
    assert sum(token in media for token in seen.token_ids) == 62


def test_characters_that_stand_in_for_typed_placeholders_are_free() -> None:
    tokenizer = Tokenizer.load(TINY)
    crowd = "".join(map(chr, range(0xF0000, 0xF0010)))
    prompt = build(f"{crowd} <|image|>", tokenizer)
    assert crowd in prompt.text and "<|image|>" in prompt.text
    with pytest.raises(ValueError, match="private character"):
        Typed("".join(map(chr, range(0xF0000, 0xFFFFE))))


def test_control_tokens_that_are_no_media_stay_control_tokens() -> None:
    prompt = build("a<|think|>b")
    assert Tokenizer.load(TINY).special.think in prompt.token_ids


@pytest.mark.parametrize("spelling", SPELLINGS.values())
def test_no_control_token_can_be_typed_into_literal_messages(spelling: str) -> None:
    """The ids of control tokens are those of the same conversation without the spelling."""
    tokenizer = Tokenizer.load(TINY)

    def controls(typed: str) -> list[int]:
        messages = [
            system(f"s {typed}"),
            user([text(f"look {typed} here"), text(typed)]),
            assistant("a", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": {"k": f"v {typed}"}}}]),
            result(f"r {typed}"),
            assistant(f"b {typed}"),
            user(f"{typed}c"),
        ]
        tools = [{"name": "f", "description": f"does {typed}", "parameters": {"properties": {f"p{typed}": {}}}}]
        prompt = build(messages, tokenizer, tools=tools, prefill_response=f"sure {typed}", literal=True)
        return [token_id for token_id in prompt.token_ids if token_id in tokenizer.all_special_ids]

    assert controls(spelling) == controls("word")


@pytest.mark.parametrize("which", [*TEMPLATES, "tiny"])
@pytest.mark.parametrize(("spelling", "literal"), [("<|image|>", False), ("<image|>", True), ("<|turn>", True)])
def test_a_control_token_cannot_be_put_together(which: str, spelling: str, literal: bool) -> None:
    """Neither from two text parts, which templates trim and join, nor from both sides of a thought."""
    tokenizer = Tokenizer.load(TINY) if which == "tiny" else published(which)

    def controls(parts: list[str], answer: str) -> list[int]:
        messages = [user([text(part) for part in parts]), assistant(answer), user("b")]
        ids = build(messages, tokenizer, literal=literal).token_ids
        return [token_id for token_id in ids if token_id in tokenizer.all_special_ids]

    plain = controls(["a", "b"], "c")
    for cut in (1, len(spelling) // 2, len(spelling) - 1):
        begun, rest = spelling[:cut], spelling[cut:]
        for parts in ([begun, rest], ["a " + begun + " ", "\n" + rest + "b"], [begun, "", rest], [begun, *rest]):
            assert controls(parts, "c") == plain
        for thought in ("<|channel>thought<channel|>", "<channel|>"):
            assert controls(["a", "b"], begun + thought + rest) == plain


def test_text_parts_that_begin_a_spelling_are_shown_as_they_are() -> None:
    assert shown(build([user([text("1 <"), text("|ima <"), IMAGE, text("2 <")])], images=[picture()])) == (
        f"{HEAD}1 <|ima <[60]2 <{TAIL}"
    )


def test_thoughts_are_taken_out_of_literal_answers() -> None:
    """As the template does, which does not see their markers then."""
    answer = "<|channel>thought\nhm<channel|>yes"
    plain = build([user("a"), assistant(answer), user("b")])
    assert build([user("a"), assistant(answer), user("b")], literal=True).token_ids == plain.token_ids


def test_a_raw_prompt_has_placeholders_of_its_own() -> None:
    raw = "<bos>A <|image|> and <|video|>, <|image|>."
    prompt = build(raw, raw=True, images=[picture(), picture(size=(20, 20))], videos=[frames(0)])
    assert shown(prompt) == "<bos>A [60] and 00:00 [64v], [64]."
    assert build("A", raw=True).blocks == ()


def test_the_ids_of_an_image_are_those_of_its_spelling() -> None:
    """As in the reference, which expands the text and encodes all of it."""
    tokenizer = Tokenizer.load(TINY)
    prompt = build([user([text("What is"), IMAGE, text("this?"), VIDEO])], images=[picture()], videos=[frames(0, 1)])
    assert list(prompt.token_ids) == tokenizer.encode(prompt.text)


def test_a_tokenizer_without_a_video_token_shows_frames_as_images() -> None:
    made = tokenizers.Tokenizer.from_str(backend("byte_level").replace("<|video|>", "<|movie|>"))
    tokenizer = Tokenizer(made, chat_template=published("B").chat_template)
    assert tokenizer.special.video is None
    prompt = build("x", tokenizer, videos=[frames(0, 1)])
    [first, second] = [prompt.token_ids[slice(*block.span)] for block in prompt.blocks]
    assert first == second == (tokenizer.special.image,) * 64
    assert prompt.text.count("<|image|>") == 128 and "<|video|>" not in prompt.text


# --- what is refused ----------------------------------------------------------------------------------------

URL = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too few": ([user([IMAGE, IMAGE, text("x")])], {"images": [picture()]}, "images: got 1, expected 2, one for every"),
    "none": ([user([IMAGE, text("x")])], {}, "images: got 0, expected 1, one for every image part without content"),
    "too many": ([user([IMAGE, text("x")])], {"images": [picture()] * 3}, "images: got 3, expected 1, one for every"),
    "parts and list": (
        [user([{"type": "image", "image": picture()}, text("x")])],
        {"images": [picture()]},
        "images: got 1, expected 0, one for every image part without content",
    ),
    "videos": ([user([VIDEO, text("x")])], {"videos": []}, "videos: got 0, expected 1, one for every video part"),
    "raw, too few": ("<|image|>", {"raw": True}, "images: got 0, expected 1: the prompt has 1 <|image|>"),
    "raw, too many": ("a", {"raw": True, "images": [picture()] * 2}, "images: got 2, expected 0: the prompt has 0"),
    "raw, videos": ("<|image|>", {"raw": True, "videos": [frames(0)]}, "images: got 0, expected 1"),
    "web address": ([user([URL])], {}, "messages[0].content[0]: got the address 'https://example.org/a.png', expected"),
    "path": (
        [user([text("x"), {"type": "image_url", "image_url": {"url": "/etc/passwd"}}])],
        {},
        "messages[0].content[1]: got the address '/etc/passwd', expected a data URL: what a message names is not",
    ),
    "file address": ([user([{"type": "image", "url": "file:///etc/passwd"}])], {}, "got the address 'file:///etc/"),
    "HF path": ([user([{"type": "image", "path": "/etc/passwd"}])], {}, "[0]: got 'path', expected one of 'image', "),
    "file id": ([user([{"type": "input_image", "file_id": "x"}])], {}, "[0]: got 'file_id', expected one of 'image', "),
    "empty path": ("x", {"images": ""}, "images[0]: image: got an empty path, expected a path, bytes, a data URL or"),
    "float budget": ("x", {"sight": lambda: Sight(TOWER, image_tokens=70.0)}, "image_tokens: got 70.0, expected one"),
    "two sources": ([user([{"type": "image", "url": "u", "image": "v"}])], {}, "got 'url', 'image', expected one of"),
    "video path": ([user([{"type": "video", "video": "a.mp4"}])], {}, "[0]: got the address 'a.mp4', expected a data"),
    "frames by path": (
        [user([{"type": "video", "video": [["/etc/passwd", 0.0]]}])],
        {},
        "[0]: got the address '/etc/passwd', expected a data URL",
    ),
    "nested address": (
        [user([{"type": "image_url", "image_url": {"url": {"url": "/etc/passwd"}}}])],
        {},
        "messages[0].content[0]: image: got dict, expected a path",
    ),
    "no address": ([user([{"type": "image_url", "image_url": {}}])], {}, "messages[0].content[0]: got no address"),
    "audio": ([user([{"type": "input_audio"}])], {}, "got a part of type 'input_audio', expected text, image or video"),
    "system": ([system([IMAGE]), user()], {}, "[0]: got 'image' in a message of role 'system', expected it in user or"),
    "assistant": ([user(), assistant([IMAGE])], {}, "got 'image' in a message of role 'assistant', expected it in"),
    "nobody to show it to": ([assistant("x")], {"images": [picture()]}, "images: got 1, expected none: there is no"),
    "not a list": ("x", {"videos": 3}, "videos: got int, expected a list of videos"),
    "no file": ("x", {"images": ["/no/such.png"]}, "images[0]: image '/no/such.png' cannot be read: No such file"),
    "web address in a list": ("x", {"images": [picture(), "http://a/b"]}, "images[1]: image 'http://a/b': got a web"),
    "no image": ([user([{"type": "image", "image": b"x"}])], {}, "messages[0].content[0]: image of 1 bytes is not an"),
    "no base64": ([user([{"type": "image", "image": "data:,x"}])], {}, "messages[0].content[0]: image 'data:,x': got"),
    "no times": ("x", {"videos": [[picture()]]}, "videos[0]: "),
    "budget": ("x", {"sight": lambda: Sight(TOWER, image_tokens=100)}, "image_tokens: got 100, expected one of 70"),
    "fps": ("x", {"sight": lambda: Sight(TOWER, fps=0)}, "fps: got 0, expected a number > 0"),
    "video frames": ("x", {"sight": lambda: Sight(TOWER, video_frames=0)}, "video_frames: got 0, expected an integer"),
    "blind": ("x", {"images": [picture()], "sight": None}, "images[0]: got image, expected text alone: this model has"),
    "blind, videos": ("x", {"videos": [frames(0)], "sight": None}, "videos[0]: got video, expected text alone"),
    "more than the context": (
        "x",
        {"images": [picture()] * 9, "sight": Sight(TOWER, 70, max_soft_tokens=130)},
        "images and videos: got 180 soft tokens up to images[2], expected at most 130",
    ),
}


def test_no_more_frames_are_read_than_the_context_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    def film(source: object, **_: object) -> Iterator[Frame]:
        for second in range(32):
            given.append(second)
            yield Frame(picture(size=(40, 40)), second)

    monkeypatch.setattr(media, "iter_video", film)
    expected = "images and videos: got 192 soft tokens up to videos[0], expected at most 130"
    with pytest.raises(ValueError, match=re.escape(expected)):
        build("x", videos=["a.mp4"], sight=Sight(TOWER, 70, max_soft_tokens=130))
    assert given == [0, 1, 2]


@pytest.mark.parametrize("name", BAD)
def test_bad_media_are_named(name: str) -> None:
    messages, options, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        build(messages, **{key: value() if callable(value) else value for key, value in options.items()})
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_unknown_parts_are_named_without_their_megabytes() -> None:
    with pytest.raises(ValueError, match="must be a part like") as error:
        build([user([{"type": "file", "file_data": "data:" + "A" * 100_000}])])
    assert len(str(error.value)) < 300


def test_a_tokenizer_without_image_tokens_is_named() -> None:
    made = tokenizers.Tokenizer.from_str(backend("byte_level").replace('"<|image|>"', '"<|picture|>"'))
    tokenizer = Tokenizer(made, chat_template=published("B").chat_template)
    with pytest.raises(ValueError, match=re.escape("images: got some, expected none: this tokenizer has no token")):
        build("x", tokenizer, images=[picture()])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("<|turn>user\n{{ messages[0].content[1].text }}", "images: got 1, expected 0: the prompt has 0 <|image|>"),
        ("<|turn>user\n<|video|><|image|>x", "the chat template changes the order of media: got video, image"),
        ("<|turn>user\n<|image|><|image|><|video|>x", "images: got 1, expected 2: the prompt has 2 <|image|>"),
    ],
)
def test_templates_that_drop_or_move_media_are_named(template: str, message: str) -> None:
    tokenizer = small_tokenizer(chat_template=template)
    videos = [frames(0)] if "video" in template else None
    with pytest.raises(ValueError, match=re.escape(message)):
        build("x", tokenizer, images=[picture()], videos=videos)
