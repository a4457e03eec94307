"""Where a key stands in a TOML text: tomllib tells values, and no positions."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import Any

import attrs

Path = tuple[str | int, ...]
"""A way into a document: ("components", 0, "routes", 1, "port")."""

_WORD = re.compile(
    r'"""(?:[^\\]|\\.)*?"{3,5}'  # a text of several lines may end with two quotes of its own
    r"|'''.*?'{3,5}"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'"
    r"|\#[^\n]*"
    r"|[\[\]{},=\n]",
    re.DOTALL,
)


@attrs.frozen
class Statement:
    """One statement of a TOML text: a header, or a key with its value; offsets in characters."""

    begin: int
    end: int
    elements: tuple[int, ...] = ()
    """Where the elements of its value begin, when the value is an array."""


class TomlLines:
    """Finds lines in a text that tomllib has parsed; only made when there is an error to report.

    The text is cut into statements, which is safe because it is known to be TOML. Then the first statements, as many as
    are needed, are parsed until the key is there: the last of them is the one that wrote it.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._statements = list(statements(text))
        self._newlines = [found.start() for found in re.finditer("\n", text)]

    def line_of(self, path: Path) -> int:
        """Return the line (from 1) on which a key's statement begins, or an element of its array.

        Where the key is not there, it is the line of what encloses it; 0 when that is the file itself.
        """
        while path:
            if self._has(len(self._statements), path):
                statement = self._statements[self._writer(path) - 1]
                return self._line_at(self._offset(statement, path))
            path = path[:-1]
        return 0

    def _writer(self, path: Path) -> int:
        """Return the number of the statement that wrote a key; statements only ever add keys, so halving finds it."""
        return bisect_left(range(len(self._statements)), 1, lo=1, key=lambda count: self._has(count, path))

    def _has(self, count: int, path: Path) -> bool:
        if count < 1:
            return False
        here: Any = tomllib.loads(self._text[: self._statements[count - 1].end])
        for key in path:
            try:
                here = here[key]
            except (KeyError, IndexError, TypeError):
                return False
        return True

    def _offset(self, statement: Statement, path: Path) -> int:
        last = path[-1]
        if not isinstance(last, int) or last >= len(statement.elements):
            return statement.begin
        key = ""
        value: Any = tomllib.loads(self._text[statement.begin : statement.end])
        while isinstance(value, dict) and len(value) == 1:
            key, value = next(iter(value.items()))
        is_it = isinstance(value, list) and len(value) == len(statement.elements) and path[-2:-1] == (key,)
        return statement.elements[last] if is_it else statement.begin

    def _line_at(self, offset: int) -> int:
        return bisect_right(self._newlines, offset - 1) + 1


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a text that is TOML, in order; blank lines and comments between them belong to none."""
    begin, depth = _skip_blank(text, 0), 0
    elements: list[int] = []
    is_value = False
    for found in _WORD.finditer(text, begin):
        word, at = found[0], found.start()
        if at < begin:  # a blank line, or a comment
            continue
        if word == "\n" and depth == 0:
            yield Statement(begin, at + 1, tuple(elements))
            begin, elements, is_value = _skip_blank(text, at + 1), [], False
        elif word == "=" and depth == 0:
            is_value = True
        elif word in ("[", "{"):
            depth += 1
            if is_value and depth == 1:
                elements.append(_skip_blank(text, at + 1))
        elif word in ("]", "}"):
            depth -= 1
            if is_value and depth == 0 and elements[-1] == at:  # an empty array, or a comma after the last element
                elements.pop()
        elif word == "," and is_value and depth == 1:
            elements.append(_skip_blank(text, at + 1))
    if begin < len(text):
        yield Statement(begin, len(text), tuple(elements))


_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")


def _skip_blank(text: str, at: int) -> int:
    """Return where the next thing begins that is neither blank nor a comment."""
    found = _BLANK.match(text, at)
    return found.end() if found else at
