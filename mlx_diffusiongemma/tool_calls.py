"""The text of a tool call -> name and arguments.

Gemma 4 writes `call:name{key:value,...}`: bare keys, strings between quote tokens, JSON otherwise. mlx-lm's parser
reads the arguments; here the calls are told apart, and what that parser cannot read although its meaning is clear is
rewritten for it first. Finding the calls among the generated ids is the work of `output.py`.
"""

from __future__ import annotations

import re
from typing import Any

QUOTE = '<|"|>'  # the quote token as it is spelled
MAX_DEPTH = 64  # of braces; a deeper call counts as malformed
STRING = re.compile(re.escape(QUOTE) + ".*?" + re.escape(QUOTE), re.DOTALL)
CALL = re.compile(r"\s*call:\s*([^\s{}\0]+)\s*(?=\{)")


def parse_tool_calls(text: str) -> list[tuple[str, dict[str, Any]]] | None:
    """Read one or several calls, quote tokens as spelled, into names and arguments; None if malformed."""
    # Heavy (the whole of mlx_lm) and needed by few answers, so not at the top.
    from mlx_lm.tool_parsers.gemma4 import parse_tool_call

    calls = _split_calls(text)
    if calls is None:
        return None
    parsed = []
    for name, arguments in calls:
        for candidate in (arguments, _tidy(arguments)):
            try:
                result = parse_tool_call(f"call:f{candidate}")
            except (ValueError, RecursionError):
                continue
            parsed.append((name, result["arguments"]))
            break
        else:
            return None
    return parsed


def _split_calls(text: str) -> list[tuple[str, str]] | None:
    """Cut at the outer braces, blind to what is inside strings: mlx-lm's parser would find calls quoted in a string."""
    masked = STRING.sub(lambda match: "\0" * len(match[0]), text)
    calls, at = [], 0
    while match := CALL.match(masked, at):
        at, depth = match.end(), 0
        for at in range(match.end(), len(masked)):  # leaves `at` at the closing brace
            depth += {"{": 1, "}": -1}.get(masked[at], 0)
            if depth == 0 or depth > MAX_DEPTH:
                break
        if depth != 0:
            return None
        at += 1
        calls.append((match[1], text[match.end() : at]))
    return calls if calls and not masked[at:].strip(" \n\t,;}") else None


def _tidy(arguments: str) -> str:
    """Rewrite Python's None, True and False, and keys with spaces around or other characters than \\w in them."""
    pieces = re.split(f"({STRING.pattern})", arguments, flags=re.DOTALL)
    for index in range(0, len(pieces), 2):  # the odd ones are strings
        piece = re.sub(r"\bNone(?=\s*[,}\]])", "null", pieces[index])
        piece = re.sub(r"\b(True|False)(?=\s*[,}\]])", lambda match: match[1].lower(), piece)
        pieces[index] = re.sub(r'([{,])\s*([^\s{}\[\],:"<][^{}\[\],:"<]*?)\s*:', rf"\1{QUOTE}\2{QUOTE}:", piece)
    return "".join(pieces)
