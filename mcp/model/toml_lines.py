"""Where a key stands in a TOML text: tomllib tells values, and no positions."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from mcp.model.values import frozen

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


@frozen
class Statement:
    """One statement of a TOML text: a header, or a key with its value; offsets in characters."""

    begin: int
    end: int
    elements: tuple[int, ...] = ()
    """Where the elements of its value begin, when the value is an array."""


class TomlLines:
    """Finds lines in a text that tomllib has parsed; only made when there is an error to report.

    The text is cut into statements, which is safe because it is known to be TOML. Each is parsed by itself, which tells the
    keys it writes; the headers before it tell the table that they are in.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._newlines = [found.start() for found in re.finditer("\n", text)]
        self._begins: dict[Path, int] = {}
        self._tables_in: dict[Path, int] = {}
        """How many [[tables]] an array has so far."""
        table: Path = ()
        for statement in statements(text):
            table = self._index(statement, table)

    def line_of(self, path: Path) -> int:
        """Return the line (from 1) on which a key's statement begins, or an element of its array.

        Where the key is not there, it is the line of what encloses it; 0 when that is the file itself.
        """
        while path and path not in self._begins:
            path = path[:-1]
        return bisect_right(self._newlines, self._begins[path] - 1) + 1 if path else 0

    def _index(self, statement: Statement, table: Path) -> Path:
        """Remember where a statement's keys are; return the table that the next statement is in."""
        keys, value = _key_and_value(tomllib.loads(self._text[statement.begin : statement.end]))
        if self._text[statement.begin] == "[":
            is_array = self._text.startswith("[[", statement.begin)
            return self._note(keys, (), statement.begin, is_array=is_array)
        path = self._note(keys, table, statement.begin)
        if isinstance(value, list) and len(value) == len(statement.elements):
            self._begins.update({(*path, i): begin for i, begin in enumerate(statement.elements)})
        return table

    def _note(self, keys: list[str], path: Path, begin: int, *, is_array: bool = False) -> Path:
        for depth, key in enumerate(keys, start=1):
            path = (*path, key)
            self._begins.setdefault(path, begin)
            if is_array and depth == len(keys):
                self._tables_in[path] = self._tables_in.get(path, 0) + 1
            if count := self._tables_in.get(path):  # keys below an array of tables are about its last one
                path = (*path, count - 1)
                self._begins.setdefault(path, begin)
        return path


def _key_and_value(statement: dict[str, Any]) -> tuple[list[str], Any]:
    """Part `{"a": {"b": 1}}` into a.b and 1; a table written within the line has the line of its statement anyway."""
    keys: list[str] = []
    here: Any = statement
    while isinstance(here, dict) and len(here) == 1:
        key, here = next(iter(here.items()))
        keys.append(key)
    return keys, here


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
