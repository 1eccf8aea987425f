"""Ids by spelling, folders good and bad, incremental detokenizing, and the sandboxed chat template."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tokenizers
from small_tokenizer import KINDS, backend, small_tokenizer

import mlx_diffusiongemma
from mlx_diffusiongemma.tokenizer import SPELLINGS, Detokenizer, Tokenizer

TINY = Path(mlx_diffusiongemma.__file__).parent / "tiny"
TEXTS = ["", " ", "hello world", "  two  spaces ", "é😀日本\n\n", "thought\n", "\ufffd", "a\ufffdb", "17 + 25 = 42"]
USER = [{"role": "user", "content": "hi"}]


def make_folder(folder: Path, **files: str) -> Path:
    """Write a checkpoint folder with a tokenizer and these files, "__" standing for the dot."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(backend("byte_level"), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


# --- ids --------------------------------------------------------------------------------------------------------


def test_control_tokens_are_found_by_spelling():
    first, second = (small_tokenizer(kind) for kind in KINDS)
    for name, spelling in SPELLINGS.items():
        for tokenizer in (first, second):
            assert tokenizer.encode(spelling) == [getattr(tokenizer.special, name)]
    assert first.special != second.special
    assert first.all_special_ids == set(vars(first.special).values())


def test_a_missing_control_token_is_none():
    text = backend("byte_fallback").replace("<|video|>", "<|other|>")
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text))
    assert tokenizer.special.video is None
    assert None not in tokenizer.all_special_ids


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_adds_nothing_and_comes_back(kind):
    tokenizer = small_tokenizer(kind)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.detokenize(ids) == text
        assert not tokenizer.all_special_ids & set(ids)
    assert max(tokenizer.encode("<|video|>")) < tokenizer.vocab_size


def test_control_tokens_keep_their_spelling_when_detokenized():
    tokenizer = small_tokenizer()
    text = '<bos><|turn>model\n<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|><turn|>'
    assert tokenizer.detokenize(tokenizer.encode(text)) == text


def test_ids_outside_the_vocabulary_give_nothing():
    tokenizer = small_tokenizer()
    assert tokenizer.detokenize([tokenizer.vocab_size + 7, *tokenizer.encode("a")]) == "a"


def test_lone_surrogates_are_refused():
    with pytest.raises(ValueError, match=r"lone surrogate '\\udcff' at character 2"):
        small_tokenizer().encode("ab\udcff")


# --- incremental detokenizing -----------------------------------------------------------------------------------


def segments(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    found = []
    for token_id in ids:
        detokenizer.add_token(token_id)
        found.append(detokenizer.last_segment)
    detokenizer.finalize()
    return [*found, detokenizer.last_segment]


@pytest.mark.parametrize("kind", KINDS)
def test_segments_join_to_the_text_and_never_hold_half_a_character(kind):
    tokenizer = small_tokenizer(kind)
    for text in [text for text in TEXTS if "\ufffd" not in text]:
        found = segments(tokenizer.detokenizer(), tokenizer.encode(text))
        assert "".join(found) == text
        assert not any("\ufffd" in segment for segment in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_leading_space_is_kept(kind):
    tokenizer = small_tokenizer(kind)
    assert "".join(segments(tokenizer.detokenizer(), tokenizer.encode(" hello"))) == " hello"


@pytest.mark.parametrize("kind", KINDS)
def test_an_unfinished_last_character_is_dropped(kind):
    tokenizer = small_tokenizer(kind)
    ids = tokenizer.encode("a😀")
    for cut in (1, 2, 3):
        assert "".join(segments(tokenizer.detokenizer(), ids[:-cut])) == "a"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_character_that_was_meant_is_kept(kind):
    tokenizer = small_tokenizer(kind)
    assert "".join(segments(tokenizer.detokenizer(), tokenizer.encode("a\ufffd"))) == "a\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_detokenize_without_error_and_without_piling_up(kind):
    tokenizer = small_tokenizer(kind)
    rng = random.Random(1)
    for _ in range(30):
        detokenizer = tokenizer.detokenizer()
        for _ in range(100):
            detokenizer.add_token(rng.randrange(tokenizer.vocab_size + 3))
            assert len(detokenizer._pending) <= 7
        detokenizer.finalize()


# --- folders ----------------------------------------------------------------------------------------------------


def test_the_bundled_checkpoint_loads():
    tokenizer = Tokenizer.load(TINY)
    assert None not in vars(tokenizer.special).values()
    text = "What is 17 + 25? é😀"
    assert tokenizer.detokenize(tokenizer.encode(text)) == text
    assert tokenizer.render(USER) == "<bos><|turn>user\nhi<turn|>\n<|turn>model\n"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Tokenizer.load(tmp_path / "nowhere")


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{bad", "{}", "version https://git-lfs.github.com/spec/v1"])
def test_an_unreadable_tokenizer_is_named(tmp_path, text):
    folder = make_folder(tmp_path, tokenizer__json=text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer: \S"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    ("text", "message"), [("{bad", "is not readable JSON"), ("[]", "must hold a JSON object, got list")]
)
def test_an_unreadable_config_is_named(tmp_path, text, message):
    folder = make_folder(tmp_path, tokenizer_config__json=text)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json {message}"):
        Tokenizer.load(folder)


def test_the_template_is_found_in_every_place_it_is_kept_in(tmp_path):
    def template(**files: str) -> str | None:
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        return Tokenizer.load(make_folder(tmp_path / "x", **files)).chat_template

    def as_json(value: object) -> str:
        return json.dumps({"chat_template": value})

    assert template() is None
    assert template(chat_template__json=as_json("C")) == "C"
    assert template(chat_template__json=as_json("C"), tokenizer_config__json=as_json("B")) == "B"
    assert template(tokenizer_config__json=as_json("B"), chat_template__jinja="A") == "A"
    named = [{"name": "other", "template": "N"}, {"name": "default", "template": "D"}]
    assert template(tokenizer_config__json=as_json(named)) == "D"
    with pytest.raises(ValueError, match="chat_template must be text, got int"):
        template(tokenizer_config__json=as_json(3))


def test_token_spellings_of_the_config_reach_the_template(tmp_path):
    config = json.dumps({"bos_token": {"content": "<start>"}, "eos_token": "<stop>"})
    folder = make_folder(tmp_path, tokenizer_config__json=config, chat_template__jinja="{{bos_token}}{{eos_token}}")
    assert Tokenizer.load(folder).render(USER) == "<start><stop>"


# --- the template -----------------------------------------------------------------------------------------------


def test_without_a_template_rendering_is_refused():
    with pytest.raises(ValueError, match="no chat template"):
        small_tokenizer().render(USER)


def test_thinking_is_always_passed_and_off_by_default():
    tokenizer = small_tokenizer(chat_template="{{ enable_thinking is defined }} {{ enable_thinking }}")
    assert tokenizer.render(USER) == "True False"
    assert tokenizer.render(USER, enable_thinking=True) == "True True"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ 1 + 'a' }}", "unsupported operand"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% if %}", "not valid Jinja"),
    ],
)
def test_a_failing_template_is_a_value_error(source, message):
    with pytest.raises(ValueError, match=message):
        small_tokenizer(chat_template=source).render(USER)


def test_a_template_cannot_change_the_messages():
    messages = [{"role": "user", "content": ["a"]}]
    with pytest.raises(ValueError, match="cannot render"):
        small_tokenizer(chat_template="{{ messages[0].content.append('b') }}").render(messages)
    assert messages == [{"role": "user", "content": ["a"]}]


def test_a_template_sees_plain_data_only():
    with pytest.raises(ValueError, match="plain JSON data"):
        small_tokenizer(chat_template="x").render([{"role": "user", "content": object()}])


def test_the_helpers_of_transformers_are_there():
    source = (
        "{% generation %}{{ {'a': '<é>'} | tojson }}{% endgeneration %}{{ strftime_now('%Y') | length }}"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ extra }}"
    )
    assert small_tokenizer(chat_template=source).render(USER, extra="!") == '{"a": "<é>"}41!'


# --- start-up ---------------------------------------------------------------------------------------------------


def test_importing_loads_no_heavy_library():
    code = (
        "import sys, mlx_diffusiongemma.prompt, mlx_diffusiongemma.output;"
        "print([name for name in ('torch', 'transformers', 'mlx_lm', 'numpy') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# --- against transformers ---------------------------------------------------------------------------------------


@pytest.mark.oracle
def test_ids_of_the_bundled_checkpoint_equal_those_of_transformers():
    from transformers import PreTrainedTokenizerFast

    oracle, tokenizer = PreTrainedTokenizerFast.from_pretrained(TINY), Tokenizer.load(TINY)
    for text in [*TEXTS, "<bos><|turn>user\nWhat is 17 + 25?<turn|>\n<|turn>model\n"]:
        assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False)
    assert len(oracle) == tokenizer.vocab_size
    assert oracle.bos_token_id == tokenizer.special.bos


def test_threads_do_not_change_how_the_others_encode():
    """The backend has one setting for control tokens; a thread that spells them out must not reach the others."""
    shared = Tokenizer.load(TINY)
    text = "<|turn>user\nhi<turn|>"
    expected, wrong = shared.encode(text), []
    stop = threading.Event()

    def spell() -> None:
        while not stop.is_set():
            shared.encode_letters("what is <|image|>?")

    def read() -> None:
        wrong.extend(ids for _ in range(2000) if (ids := shared.encode(text)) != expected)

    speller, readers = threading.Thread(target=spell), [threading.Thread(target=read) for _ in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in (speller, *readers):
            thread.start()
        for thread in readers:
            thread.join()
    finally:
        sys.setswitchinterval(before)
        stop.set()
        speller.join()
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_join_to_the_text(kind):
    tokenizer = small_tokenizer(kind)
    for text in ("hello world", "Wörter: 😀 漢字", " leading", "\x00\x7f\xad tail\n", "<|turn>model"):
        ids = tokenizer.encode(text)
        assert b"".join(tokenizer.token_bytes(token_id) for token_id in ids) == text.encode()
    assert tokenizer.token_bytes(1 << 30) == b""
