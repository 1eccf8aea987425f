"""The strings that a JSON schema allows, as regular expressions of llguidance.

A schema's pattern is searched for anywhere in the string and comes in JavaScript's syntax; llguidance wants one that
matches from end to end, in Rust's. Classes become what Python, JavaScript and Rust agree on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

YEAR = "([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"  # Python's years begin with 1
FOURTH = "(0[48]|[2468][048]|[13579][26])"
LEAP_YEAR = f"([0-9]{{2}}{FOURTH}|{FOURTH}00)"
DAYS = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
DATE = f"({YEAR}-({DAYS})|{LEAP_YEAR}-02-29)"
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
# What the formats of JSON schemas have to match besides: llguidance's know no leap years, but leap seconds.
NARROWER = {
    "date": f"^{DATE}$",
    "time": "^[0-9]{2}:[0-9]{2}:[0-5]",
    "date-time": f"^{DATE}.[0-9]{{2}}:[0-9]{{2}}:[0-5]",
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


def portable(pattern: str) -> str:
    """Rewrite a pattern of a JSON schema so that llguidance, which searches for it too, means what a schema means.

    Raises:
        ValueError: a flag or an escape that only Rust knows so.
    """
    if wrong := re.search(r"\(\?[a-zA-Z]*[xURu]|(?<!\\)(?:\\\\)*\\[AzZG]", pattern):
        raise ValueError(f"pattern {pattern!r:.80} is not supported: {wrong[0]} in it")
    return "".join(map(_portable, WHERE.findall(pattern)))


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
        inner = re.sub(r"\\(.)(-?)", _in_class, piece[len(head) : -1], flags=re.DOTALL)
        # In Rust a class may hold classes and operators.
        inner = re.sub(r"(?<!\\)\[", r"\\[", inner)
        return head + re.sub(r"([&~-])\1", r"\1\\\1", inner) + "]"
    return piece


def _in_class(match: re.Match[str]) -> str:
    """Write one escape inside of a class; a dash behind \\d, \\w or \\s is a dash."""
    known = CLASSES.get(match[1])
    return match[0] if known is None else known + (r"\-" if match[2] else "")


def _slashed(pattern: str) -> str:
    """Write a pattern as it stands between the slashes of a Lark grammar."""
    pattern = re.sub(r"\\/|/", r"\\/", pattern)
    return pattern.replace("\n", r"\n").replace("\r", r"\r")
