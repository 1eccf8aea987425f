"""A grammar compiled for a vocabulary: llguidance's matcher behind the few questions that a walk asks.

Compiling a vocabulary takes seconds where it has 262,144 tokens, and a large schema tenths of a second, so both are
kept: the vocabulary as long as its tokenizer lives, the last few grammars with it.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import numpy.typing as npt

from .grammar import Grammar, one_line
from .tokenizer import REPLACEMENT, Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher

Mask = npt.NDArray[np.bool_]
Ids = npt.NDArray[np.int64]

KEPT_GRAMMARS = 32  # compiled, per tokenizer
BRACKETS = b"}])"
QUOTES = b"\"'"
SEPARATORS = b',: "'
CONTROL_MARK = b"\xff"  # before the name of a control token in what llguidance forces
# JSON text that escapes nothing which can be written plainly, with what has begun of an escape at its end.
PLAIN_JSON = re.compile(rb"(?:[^\\]|\\[^u]|\\u00(?:0[0-7bef]|1[0-9a-f]|7f))*(\\(?:u(?:0(?:0[017]?)?)?)?)?", re.DOTALL)
LITERALS = (b"0", b"1", b"5", b"{}", b"[]", b'""', b"null", b"true", b"false", b"a", b" ")


class Vocabulary:
    """The tokens of a tokenizer, sorted by what they are good for, and the grammars compiled for them.

    Attributes:
        size: how many ids there are; masks have this length.
        special: ids of control tokens.
        hidden: ids that the matcher takes for the end, whatever the checkpoint ends with; it is never shown them.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from llguidance import LLTokenizer

        self._compiler = LLTokenizer(tokenizer.to_json(), n_vocab=tokenizer.largest_id + 1)
        self._grammars: OrderedDict[Grammar, Automaton] = OrderedDict()
        self._lock = threading.Lock()
        self._escapes: dict[bytes, Mask] = {}
        self.size: int = self._compiler.vocab_size
        self._tokenizer = ref(tokenizer)  # weak: the vocabulary lives as long as the tokenizer does
        self.special = frozenset(tokenizer.all_special_ids)
        special = tokenizer.special
        markers = (special.tool_call_close, special.quote, special.channel_close)
        self._markers = [token_id for token_id in markers if token_id is not None]
        self.hidden = frozenset([self._compiler.eos_token])

    def compile(self, grammar: Grammar) -> Automaton:
        """Return an automaton in front of everything; to be copied, not used up.

        Raises:
            ValueError: the grammar does not fit the vocabulary, is too complex, or allows nothing.
        """
        with self._lock:
            if grammar in self._grammars:
                self._grammars.move_to_end(grammar)
                return self._grammars[grammar]
        automaton = Automaton.start(self, grammar, self._compiler)
        with self._lock:
            self._grammars[grammar] = automaton
            while len(self._grammars) > KEPT_GRAMMARS:
                self._grammars.popitem(last=False)
        return automaton

    def recut(self, token_ids: Sequence[int]) -> list[int]:
        """Return ids of the same text as the tokenizer would cut it; the ids as they are if it is no whole text."""
        tokenizer = self._tokenizer()
        text = REPLACEMENT if tokenizer is None else tokenizer.detokenize(token_ids)
        return list(token_ids) if tokenizer is None or REPLACEMENT in text else tokenizer.encode(text)

    def spell(self, text: str) -> list[int]:
        """Return ids of a text, none of them a control token."""
        tokenizer = self._tokenizer()
        return [] if tokenizer is None else list(tokenizer.encode_letters(text))

    def plain_json(self, begun: bytes, token_id: int) -> bytes | None:
        """Return what a token leaves of an escape that has begun before it or in it; None if it escapes needlessly."""
        spelling = self._spellings[token_id]
        if not begun and b"\\" not in spelling:
            return b""
        match = PLAIN_JSON.fullmatch(begun + spelling)
        return None if match is None else match[1] or b""

    def allowed_escapes(self, begun: bytes) -> Mask:
        """Return the tokens that escape nothing needlessly behind what has begun of an escape [V]."""
        if begun not in self._escapes:
            kept = [self.plain_json(begun, token_id) is not None for token_id in range(self.size)]
            self._escapes[begun] = np.array(kept, dtype=np.bool_)
        return self._escapes[begun]

    @cached_property
    def control(self) -> Ids:
        """Control tokens."""
        return np.array(sorted(i for i in self.special if i < self.size), dtype=np.int64)

    @cached_property
    def brackets(self) -> Ids:
        """Tokens that close what is open: control tokens, then those that begin with a bracket, the longest first."""
        return np.array([*self._markers, *self._closing(BRACKETS)], dtype=np.int64)

    @cached_property
    def quotes(self) -> Ids:
        """Tokens that close a text: control tokens, then those that begin with a quote, the longest first."""
        return np.array([*self._markers, *self._closing(QUOTES)], dtype=np.int64)

    def _closing(self, first: bytes) -> list[int]:
        found = [i for i, text in self._punctuation.items() if text[:1] in first and not text.strip(BRACKETS + QUOTES)]
        return sorted(found, key=lambda i: -len(self._punctuation[i]))

    @cached_property
    def separators(self) -> Ids:
        """Tokens that separate two values, the longest first."""
        found = [i for i, text in self._punctuation.items() if text[:1] in b",:" and not text.strip(SEPARATORS)]
        return np.array(sorted(found, key=lambda i: -len(self._punctuation[i])), dtype=np.int64)

    @cached_property
    def literals(self) -> Ids:
        """Tokens that are a JSON value."""
        return self._spelled(LITERALS)

    @cached_property
    def opens(self) -> Mask:
        """Tokens that end in an opening bracket [V]."""
        return np.array([spelling[-1:] in (b"{", b"[", b"(") for spelling in self._spellings], dtype=np.bool_)

    @cached_property
    def letter(self) -> int | None:
        """A token that is a letter: where it is allowed, text is."""
        return next(iter(self._spelled([b"a"]).tolist()), None)

    @cached_property
    def characters(self) -> Ids:
        """One token for each character of ASCII."""
        return self._spelled([bytes([code]) for code in range(128)])

    @cached_property
    def digits(self) -> frozenset[int]:
        """Those of the characters that are digits."""
        return frozenset(int(i) for i in self.characters if self._spellings[i].isdigit())

    @cached_property
    def by_length(self) -> Ids:
        """All tokens of text, those of the most bytes first."""
        lengths = np.array([len(spelling) for spelling in self._spellings])
        return np.argsort(-lengths, kind="stable")[: int((lengths > 0).sum())]

    def _spelled(self, texts: Sequence[bytes]) -> Ids:
        """Return the lowest id of each text that is a token."""
        wanted: dict[bytes, int | None] = dict.fromkeys(texts)
        for token_id, text in enumerate(self._spellings):
            if text in wanted and wanted[text] is None:
                wanted[text] = token_id
        return np.array([token_id for token_id in wanted.values() if token_id is not None], dtype=np.int64)

    @cached_property
    def _spellings(self) -> list[bytes]:
        """Bytes of every token; nothing for control tokens."""
        return [b"" if i in self.special else self._compiler.decode_bytes([i]) for i in range(self.size)]

    @cached_property
    def _punctuation(self) -> dict[int, bytes]:
        return {
            i: text for i, text in enumerate(self._spellings) if text and not text.strip(BRACKETS + QUOTES + SEPARATORS)
        }


_vocabularies: WeakKeyDictionary[Tokenizer, Vocabulary] = WeakKeyDictionary()
_making = threading.Lock()


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """Return the vocabulary of a tokenizer, made once."""
    with _making:
        if tokenizer not in _vocabularies:
            _vocabularies[tokenizer] = Vocabulary(tokenizer)
        return _vocabularies[tokenizer]


class Automaton:
    """A state of a grammar. Control tokens only match where the grammar names them; end tokens never.

    JSON of a schema has one way to write each character: llguidance tells keys apart as they are written, and a key
    that is escaped, "\\u0061" in place of "a", would get around what the schema says of it.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher, begun: bytes | None = None) -> None:
        self.vocabulary = vocabulary
        self._matcher = matcher
        self._begun = begun  # of an escape; None where any may be used

    @classmethod
    def start(cls, vocabulary: Vocabulary, grammar: Grammar, compiler: Any) -> Automaton:
        """Compile a grammar; see `Vocabulary.compile`."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        begun = b"" if grammar.kind == "json_schema" else None
        automaton = cls(vocabulary, LLMatcher(compiler, grammar.source, log_level=0, limits=limits), begun)
        automaton._check()
        if not (automaton.accepts or automaton.allowed().any()):
            raise ValueError(f"{grammar.kind.replace('_', ' ')} allows no answer at all")
        return automaton

    def copy(self) -> Automaton:
        """Return a second automaton in the same state."""
        return Automaton(self.vocabulary, self._matcher.deep_copy(), self._begun)

    def take(self, token_ids: Sequence[int]) -> int:
        """Go on over the tokens while they are allowed; return how many were."""
        size, hidden = self.vocabulary.size, self.vocabulary.hidden
        known = next((i for i, t in enumerate(token_ids) if not 0 <= t < size or t in hidden), len(token_ids))
        begun = self._escapes(token_ids[:known])
        taken = self._matcher.try_consume_tokens(list(token_ids[: known if begun is None else len(begun)]))
        self._check()
        if begun is not None and taken:
            self._begun = begun[taken - 1]
        return taken

    def _escapes(self, token_ids: Sequence[int]) -> list[bytes] | None:
        """Return what has begun of an escape behind each token, up to one that escapes needlessly."""
        if self._begun is None:
            return None
        found = [self._begun]
        for token_id in token_ids:
            begun = self.vocabulary.plain_json(found[-1], token_id)
            if begun is None:
                break
            found.append(begun)
        return found[1:]

    def forced(self) -> list[int]:
        """Return the tokens that must come next, as the tokenizer would cut them; none where there is a choice."""
        tokens = [] if self.accepts else self._matcher.compute_ff_tokens()
        if self.vocabulary.special.isdisjoint(tokens):
            return tokens
        return tokens[: self.copy().take(tokens)] or self._forced_letters()

    def _forced_letters(self) -> list[int]:
        """Return what must come next, spelled in letters where it reads like a control token.

        llguidance cuts it as it would cut a prompt, gives the control token, and then refuses that itself.
        """
        text = self._matcher.compute_ff_bytes().split(CONTROL_MARK)[0]
        return self.vocabulary.spell(text.decode("utf-8", "ignore"))

    def allowed(self) -> Mask:
        """Return which tokens may come next [V]."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.get_error().startswith("NoExtensionBias"):  # a dead end that only shows here
            return np.zeros(self.vocabulary.size, dtype=np.bool_)
        self._check()
        mask = np.unpackbits(bits, bitorder="little", count=self.vocabulary.size).astype(np.bool_)
        mask[list(self.vocabulary.hidden)] = False
        if self._begun is not None:
            mask &= self.vocabulary.allowed_escapes(self._begun)
        control = self.vocabulary.control
        mask[[i for i in control[mask[control]].tolist() if self._matcher.validate_tokens([i]) == 0]] = False
        if not mask.any() and not self.accepts:
            mask[self._forced_letters()[:1]] = True
        return mask

    @property
    def accepts(self) -> bool:
        """Whether the text so far is complete."""
        return self._matcher.is_accepting()

    @property
    def is_stopped(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed: {one_line(self._matcher.get_error())}")
