"""Answers that later requests may refer to, in memory and bounded: the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..sources import shorten
from .errors import ApiError

MAX_ENTRIES = 1000
MAX_CHARACTERS = 128 * 2**20


@dataclass(frozen=True)
class Stored:
    """An answer as the client got it, and the conversation up to its end as OpenAI-style messages."""

    body: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]


class Store:
    """Answers by id. Belongs to the event loop's thread."""

    def __init__(self, max_entries: int = MAX_ENTRIES, max_characters: int = MAX_CHARACTERS) -> None:
        """Bound the number of answers, and the characters of their conversations together."""
        self._max_entries = max_entries
        self._max_characters = max_characters
        self._entries: OrderedDict[str, tuple[Stored, int]] = OrderedDict()
        self._characters = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, key: str, stored: Stored) -> None:
        """Keep an answer; one that alone is over the bound is not kept."""
        self.delete(key)
        size = _characters(stored.body) + _characters(stored.messages)
        self._entries[key] = stored, size
        self._characters += size
        while len(self._entries) > self._max_entries or self._characters > self._max_characters:
            self.delete(next(iter(self._entries)))

    def get(self, key: str) -> Stored | None:
        """Return an answer and make it the newest; None for one that is not here any more."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def conversation(self, key: str | None) -> Sequence[Mapping[str, Any]]:
        """Return the messages that a request with this `previous_response_id` goes on with. Raise `ApiError`."""
        stored = None if key is None else self.get(key)
        if stored is None and key is not None:
            message = f"previous_response_id: got {shorten(key)}, expected the id of a response that is remembered"
            raise ApiError(400, message, param="previous_response_id", code="previous_response_not_found")
        return () if stored is None else stored.messages

    def delete(self, key: str) -> bool:
        """Forget an answer; tell whether it was here."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._characters -= entry[1]
        return True


def _characters(value: Any) -> int:
    """Count the characters of all text in plain JSON data, and one for every other value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return 1 + sum(len(key) + _characters(item) for key, item in value.items())
    return 1 + sum(map(_characters, value)) if isinstance(value, list | tuple) else 1
