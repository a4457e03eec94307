"""Reading one TOML table strictly: types, unknown keys with a suggestion, and the path of whatever is wrong."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from mcp.model.errors import BadDefinition

T = TypeVar("T")
Path = tuple[str | int, ...]

MAX_FILE_BYTES = 64 * 1024
"""A file that people edit; the line search below would be slow on more."""

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_BYTES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d)")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)
_WORDS = {str: "a string", int: "a whole number", float: "a number", bool: "true or false", list: "an array", dict: "a table"}


class Document:
    """The text of one TOML file and where things stand in it.

    Raises:
        BadDefinition: it is too large, or no TOML.
    """

    def __init__(self, text: str, *, file: str) -> None:
        self.text = text
        self.file = file
        if len(text.encode(errors="surrogatepass")) > MAX_FILE_BYTES:
            raise BadDefinition(f"the file is larger than {MAX_FILE_BYTES // 1024} KiB", file=file)
        try:
            self.root = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
            raise BadDefinition(f"not TOML: {error}", file=file, line=_line_in(str(error))) from error

    def line_of(self, path: Path) -> int:
        """Return the line on which a key's statement begins; the line of what encloses it when it is not there.

        tomllib tells no positions. The first prefix of lines that parses and has the path ends its statement; the line
        after the last prefix that parsed without it begins it. Only run when there is an error to report.
        """
        while path:
            if line := self._line_of_exactly(path):
                return line
            path = path[:-1]
        return 0

    def _line_of_exactly(self, path: Path) -> int:
        begin, prefix = 1, ""
        for number, line in enumerate(self.text.splitlines(keepends=True), start=1):
            prefix += line
            try:
                root = tomllib.loads(prefix)
            except (tomllib.TOMLDecodeError, ValueError):
                continue
            if _has(root, path):
                return begin
            begin = number + 1
        return 0

    def error(self, reason: str, path: Path, *, hint: str = "") -> BadDefinition:
        """Make the error for a key."""
        return BadDefinition(reason, file=self.file, line=self.line_of(path), key=dotted(path), hint=hint)


def _line_in(message: str) -> int:
    found = re.search(r"at line (\d+)", message)
    return int(found[1]) if found else 0


def _has(root: Any, path: Path) -> bool:
    for key in path:
        if isinstance(key, int):
            if not isinstance(root, list) or key >= len(root):
                return False
        elif not isinstance(root, dict) or key not in root:
            return False
        root = root[key]
    return True


def dotted(path: Path) -> str:
    """Write a path for people: components[0].routes[1].port."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question with the nearest known word, or the list of known ones."""
    words = sorted(known)
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(words)}" if words else ""


class Table:
    """One table being read; every key that is read is known, and `done` complains of the rest."""

    def __init__(self, document: Document, values: Mapping[str, Any], path: Path = ()) -> None:
        self.document = document
        self.path = path
        self._values = values
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def error(self, key: str, reason: str, *, hint: str = "") -> BadDefinition:
        """Make the error for a key of this table."""
        return self.document.error(reason, (*self.path, key) if key else self.path, hint=hint)

    def get(self, key: str, kind: type[T], default: T) -> T:
        """Return a value of exactly this type, or the default."""
        self._known.add(key)
        if key not in self._values:
            return default
        value = self._values[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"expected {_WORDS[kind]}, got {_shown(value)}")
        return value  # type: ignore[no-any-return]

    def need(self, key: str, kind: type[T]) -> T:
        """Return a value that must be there."""
        if key not in self._values:
            self._known.add(key)
            raise self.document.error(f"{key!r} is missing", (*self.path, key), hint=self._hint_for_missing(key))
        return self.get(key, kind, None)  # type: ignore[arg-type]

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> str:
        """Return one of a few words."""
        value = self.get(key, str, default)
        if value not in choices:
            raise self.error(key, f"{value!r} is none of {', '.join(choices)}", hint=did_you_mean(value, choices))
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Return an array of strings."""
        values = self.get(key, list, [])
        for i, value in enumerate(values):
            if type(value) is not str:
                raise self.document.error(f"expected a string, got {_shown(value)}", (*self.path, key, i))
        return tuple(values)

    def duration_s(self, key: str, default: float) -> float:
        """Return seconds from "1s", "500ms", "2m" or a plain number of seconds."""
        self._known.add(key)
        value = self._values.get(key, default)
        if type(value) in (int, float):
            seconds = float(value)
        else:
            found = _DURATION.fullmatch(value.strip()) if type(value) is str else None
            if not found:
                raise self.error(key, f'expected a duration like "30s", "500ms" or "2m", got {_shown(value)}')
            seconds = float(found[1]) * _UNITS_S[found[2]]
        if not 0 < seconds < 1e7:
            raise self.error(key, f"{seconds:g} s is out of range")
        return seconds

    def size_bytes(self, key: str) -> int:
        """Return bytes from "256M", "1GiB" or a plain number; 0 when the key is not there."""
        self._known.add(key)
        value = self._values.get(key, 0)
        if type(value) is int:
            size = value
        else:
            found = _SIZE.fullmatch(value.strip()) if type(value) is str else None
            if not found:
                raise self.error(key, f'expected a size like "256M" or "1G", got {_shown(value)}')
            size = int(float(found[1]) * _UNITS_BYTES[found[2].lower()])
        if key in self._values and not 4096 <= size < 2**50:
            raise self.error(key, f"{size} bytes is out of range")
        return size

    def tables(self, key: str) -> list[Table]:
        """Return an array of tables."""
        self._known.add(key)
        value = self._values.get(key, [])
        if not isinstance(value, list) or any(not isinstance(item, dict) for item in value):
            raise self.error(key, f"expected [[{dotted((*(p for p in self.path if isinstance(p, str)), key))}]] tables, got {_shown(value)}")
        return [Table(self.document, item, (*self.path, key, i)) for i, item in enumerate(value)]

    def table(self, key: str) -> Table:
        """Return a table of this one, an empty one when it is not there."""
        return Table(self.document, self.get(key, dict, {}), (*self.path, key))

    def raw(self, key: str) -> Any:
        """Return a value as it is; None when it is not there."""
        self._known.add(key)
        return self._values.get(key)

    def keys(self) -> list[str]:
        """Return the keys that are there, all of them known from now on."""
        self._known.update(self._values)
        return list(self._values)

    def only(self, *known: str) -> None:
        """Complain of unknown keys before anything is read, so that a typo is told and not what follows from it."""
        self._known.update(known)
        self.done()

    def done(self) -> None:
        """Complain of the first key that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                where = f"[{dotted(self.path)}] has no" if self.path else "there is no key"
                raise self.error(key, f"{where} {key!r}", hint=did_you_mean(key, self._known))

    def _hint_for_missing(self, key: str) -> str:
        near = difflib.get_close_matches(key, [k for k in self._values if k not in self._known], n=1, cutoff=0.6)
        return f"did you mean {key!r} where it says {near[0]!r}?" if near else ""


def _shown(value: Any) -> str:
    kind = _WORDS.get(type(value), type(value).__name__)
    text = repr(value)
    return f"{kind} ({text})" if len(text) <= 40 and not isinstance(value, dict | list) else kind
