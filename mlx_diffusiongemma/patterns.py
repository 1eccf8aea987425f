"""The strings that a JSON schema allows, as regular expressions of llguidance.

A schema's pattern is searched for anywhere in the string and comes in JavaScript's syntax; llguidance wants one that
matches from end to end, in Rust's. Classes become what Python, JavaScript and Rust agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

DATE = r"[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"  # days 29 to 31 are not in every month
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
FORMATS = {
    "date": DATE,
    "time": TIME,
    "date-time": f"{DATE}T{TIME}",
    "duration": r"P([0-9]{1,4}W|[0-9]{1,4}D(T[0-9]{1,4}[HMS])?|T[0-9]{1,4}[HMS])",
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}}){{0,2}}@{LABEL}(\.{LABEL}){{1,3}}",
    "hostname": rf"{LABEL}(\.{LABEL}){{0,3}}",
    "ipv4": rf"{BYTE}(\.{BYTE}){{3}}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "uri": rf"https?://{LABEL}(\.{LABEL}){{0,3}}(:[1-9][0-9]{{0,3}})?(/[A-Za-z0-9_.~-]*)*(\?[A-Za-z0-9_.~=&-]*)?",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}
CLASSES = {"d": "0-9", "w": "0-9A-Za-z_", "s": r" \t\n\r\f\v"}  # in JavaScript; Python and Rust allow more
WHERE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.DOTALL)  # an escape, a class, or one character


def text_terminal(schema: Mapping[str, Any], without: str) -> str:
    """Return the body of a Lark terminal for the strings of a schema that do not contain the text `without`."""
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if most != "" and least > most:
        raise ValueError(f"minLength {least} is greater than maxLength {most}")
    parts = [f"(?s:.{{{least},{most}}})" if least or most != "" else "(?s:.*)"]
    if "pattern" in schema:
        parts.append(anchored(schema["pattern"]))
    if schema.get("format") in FORMATS:  # an unknown one is an annotation
        parts.append(FORMATS[schema["format"]])
    return " & ".join(f"/{_slashed(part)}/" for part in parts) + f" & ~/(?s:.*){re.escape(without)}(?s:.*)/"


def anchored(pattern: str) -> str:
    """Rewrite a pattern that may match anywhere into one that matches the whole text.

    Raises:
        ValueError: ^ or $ anywhere but at the ends, look-around, word borders, or back references.
    """
    branches = []
    for branch in _branches(pattern):
        start = branch[:1] == ["^"]
        end = branch[start:][-1:] == ["$"]
        body = branch[start : len(branch) - end]
        if wrong := next(
            (piece for piece in body if piece in ("^", "$") or re.fullmatch(r"\\[bBkpP1-9]", piece)), None
        ):
            raise ValueError(f"pattern {pattern!r:.80} is not supported: {wrong} in its middle")
        text = "".join(map(_portable, body))
        branches.append(("" if start else "(?s:.*)") + f"({text})" + ("" if end else "(?s:.*)"))
    return "|".join(branches) if len(branches) == 1 else f"({'|'.join(branches)})"


def _branches(pattern: str) -> Iterator[list[str]]:
    """Cut at the outermost "|", into lists of escapes, classes and characters."""
    pieces, depth, branch = WHERE.findall(pattern), 0, list[str]()
    if re.search(r"\(\?(?!:)", pattern):
        raise ValueError(f"pattern {pattern!r:.80} is not supported: look-around, flags and named groups are not")
    for piece in pieces:
        depth += (piece == "(") - (piece == ")")
        if piece == "|" and depth == 0:
            yield branch
            branch = []
        else:
            branch.append(piece)
    yield branch


def _portable(piece: str) -> str:
    """Rewrite one escape or class."""
    if re.fullmatch(r"\\[dws]", piece):
        return f"[{CLASSES[piece[1]]}]"
    if piece[0] == "[" and len(piece) > 1:
        head = "[^" if piece.startswith("[^") else "["
        inner = re.sub(r"\\([dws])", lambda match: CLASSES[match[1]], piece[len(head) : -1])
        # In Rust a class may hold classes and operators.
        inner = re.sub(r"(?<!\\)\[", r"\\[", inner)
        return head + re.sub(r"([&~-])\1", r"\1\\\1", inner) + "]"
    return piece


def _slashed(pattern: str) -> str:
    """Write a pattern as it stands between the slashes of a Lark grammar."""
    pattern = re.sub(r"\\/|/", r"\\/", pattern)
    return pattern.replace("\n", r"\n").replace("\r", r"\r")
