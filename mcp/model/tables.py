"""Reading TOML tables strictly: types, unknown keys with a suggestion, and all mistakes of a file at once.

A table's keys are declared, each with the function that reads it. What a key may be left out as is not said here: it is
the default of the attrs class that the values are for.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mcp.model.errors import BadDefinition
from mcp.model.values import frozen

if TYPE_CHECKING:
    from mcp.model.toml_lines import Path, TomlLines

T = TypeVar("T")

MAX_FILE_BYTES = 64 * 1024
"""A file that people edit; a message could not carry much more (docs/architecture.md, limits of the bus)."""

MISTAKES_SHOWN = 5
LONGEST_SHOWN = 60
"""Characters of a key that an error shows."""

_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_UNITS_BYTES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(ms|s|min|m|h|d)")
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kmgt]?)i?b?", re.IGNORECASE)
_WORDS: Mapping[type, str] = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "an array",
    dict: "a table",
}


def decode(data: bytes, *, file: str) -> str:
    """Return the text of a file; a byte order mark, as some editors write, is left out.

    Raises:
        BadDefinition: it is not UTF-8, with the line of the first wrong byte.
    """
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        wrong = f"byte 0x{data[error.start]:02x}"
        raise BadDefinition(f"is not UTF-8 text: {wrong}", file=file, line=line, hint="Save it as UTF-8.") from error


def document_of(data: bytes, *, file: str) -> Document:
    """Return a TOML file.

    Raises:
        BadDefinition: as `decode` and `Document`.
    """
    if len(data) > MAX_FILE_BYTES:  # before its text: it may have been read in part only
        raise too_large(file)
    return Document(decode(data, file=file), file=file)


def too_large(file: str) -> BadDefinition:
    """Make the error for a file that nobody wrote by hand."""
    reason, hint = f"is larger than {MAX_FILE_BYTES // 1024} KiB", "Put data into a file of its own, and mount it."
    return BadDefinition(reason, file=file, hint=hint)


class Document:
    """One TOML file: its values, where they stand, and the mistakes found so far.

    Raises:
        BadDefinition: it is too large, empty, or no TOML.
    """

    def __init__(self, text: str, *, file: str) -> None:
        self.file = file
        self.mistakes: list[BadDefinition] = []
        self.schemas: tuple[Schema, ...] = ()
        self._text = text
        self._lines: TomlLines | None = None
        self.root = self._parsed()

    def _parsed(self) -> dict[str, Any]:
        try:
            size = len(self._text.encode())
        except UnicodeEncodeError as error:
            raise BadDefinition("is not Unicode text", file=self.file) from error
        if size > MAX_FILE_BYTES:
            raise too_large(self.file)
        try:
            return tomllib.loads(self._text)
        except tomllib.TOMLDecodeError as error:
            raise BadDefinition(f"not TOML: {error}", file=self.file, line=self._line_in(str(error))) from error
        except (RecursionError, ValueError) as error:  # a thousand brackets; a number of thousands of digits
            why = "nested too deeply" if isinstance(error, RecursionError) else "a number is too long"
            raise BadDefinition(f"not TOML that anybody writes: {why}", file=self.file) from error

    def _line_in(self, message: str) -> int:
        if found := re.search(r"at line ([0-9]+)", message):
            return int(found[1])
        return self._text.rstrip().count("\n") + 1  # "at end of document"

    def line_of(self, path: Path) -> int:
        """Return the line of a key, or of what encloses it; 0 when only the file does."""
        from mcp.model.toml_lines import TomlLines  # only a file with mistakes needs it

        try:
            self._lines = self._lines or TomlLines(self._text)
            return self._lines.line_of(path)
        except RecursionError:  # nested so deeply that it was parsed with the last frame
            return 0

    def error(self, reason: str, path: Path, *, hint: str = "") -> BadDefinition:
        """Make the error for a key."""
        return BadDefinition(reason, file=self.file, line=self.line_of(path), key=dotted(path), hint=hint)

    def note(self, mistake: BadDefinition) -> None:
        """Remember a mistake, and go on reading."""
        self.mistakes.append(mistake)

    def read(self, schema: Schema) -> dict[str, Any]:
        """Return the values of the whole file by attribute.

        Raises:
            BadDefinition: all that is wrong with it.
        """
        self.schemas = tuple(schema.all())
        values = Table(self, self.root).read(schema)
        self.check()
        return values or {}

    def check(self) -> None:
        """Raise the mistakes that were noted, if any: one as it is, several as one error.

        Raises:
            BadDefinition: `mistakes` has each of several.
        """
        if self.mistakes:
            # Those of the file as a whole come last: they often follow from another.
            raise _together(sorted(self.mistakes, key=lambda mistake: mistake.line or MAX_FILE_BYTES + 1))


def _together(mistakes: list[BadDefinition]) -> BadDefinition:
    first = mistakes[0]
    if len(mistakes) == 1:
        return first
    more = len(mistakes) - MISTAKES_SHOWN
    lines = [str(mistake) + _as_clause(mistake.hint) for mistake in mistakes[:MISTAKES_SHOWN]]
    lines += [f"... and {more} more"] if more > 0 else []
    whole = BadDefinition(first.reason, file=first.file, line=first.line, key=first.key)
    whole.args = ("\n".join(lines),)
    whole.reason = whole.args[0]
    whole.hint = f"{len(mistakes)} mistakes; nothing of the file was used."
    whole.mistakes = tuple(mistakes)
    return whole


def _as_clause(hint: str) -> str:
    return f"; {hint[:1].lower()}{hint[1:].removesuffix('.')}" if hint else ""


def dotted(path: Path) -> str:
    """Write a path for people: components[0].routes[1].port; a key that is no plain word is in quotes, as in the file."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{_quoted(key)}" if text else _quoted(key)
    return text


def _quoted(key: str) -> str:
    is_plain = key.isascii() and key.replace("-", "").replace("_", "").isalnum()
    return (key if is_plain else ascii(key))[:LONGEST_SHOWN]


def nearest(word: str, known: Sequence[str]) -> list[str]:
    """Return the known word that was probably meant, if there is one."""
    import difflib  # only a mistake needs it

    return difflib.get_close_matches(word, known, n=1, cutoff=0.6)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a question with the nearest known word, or the list of known ones."""
    words = sorted(known)
    near = nearest(word, words)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(words)}" if words else ""


def shown(value: object) -> str:
    """Say what a value is, and the value itself where that is short."""
    kind = _WORDS.get(type(value), type(value).__name__)
    if isinstance(value, int) and value.bit_length() > 128:
        return "a whole number far out of range"
    text = repr(value)
    return f"{kind} ({text})" if len(text) <= 40 and not isinstance(value, dict | list) else kind


# ------------------------------------------------------------------ declarations


@frozen
class Key:
    """One key that a table may have; `to` is the attribute that its value is for, where that is called otherwise.

    `read` returns the value or raises BadDefinition.
    """

    name: str
    read: Callable[[Table, str], Any]
    to: str = ""
    required: str = ""
    """For a key that must be there: an example of it."""
    inner: Schema | None = None
    """What the table may have that is the key's value."""


@frozen
class Schema:
    """The keys that a table may have, and where such a table stands, for people."""

    where: str
    keys: tuple[Key, ...]

    def all(self) -> Iterator[Schema]:
        """Yield this schema and those of the tables within."""
        yield self
        for key in self.keys:
            if key.inner:
                yield from key.inner.all()


class Table:
    """One table being read."""

    def __init__(self, document: Document, values: Mapping[str, Any], path: Path = ()) -> None:
        self.document = document
        self.path = path
        self.values = values

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def error(self, key: str | int, reason: str, *, hint: str = "", within: str = "") -> BadDefinition:
        """Make the error for a key of this table, or for an element of the array `within`."""
        path = (*self.path, within, key) if within else (*self.path, key)
        return self.document.error(reason, path, hint=hint)

    def read(self, schema: Schema) -> dict[str, Any] | None:
        """Return the values that are there by attribute; None when there was a mistake, which is noted."""
        before = len(self.document.mistakes)
        meant = self._note_unknown(schema)
        made: dict[str, Any] = {}
        for key in schema.keys:
            try:
                if key.name in self.values:
                    made[key.to or key.name] = key.read(self, key.name)
                elif key.required and key.name not in meant:
                    raise self.error(key.name, f"{key.name!r} is missing", hint=f"Like {key.required}")
            except BadDefinition as mistake:
                self.document.note(mistake)
        return made if len(self.document.mistakes) == before else None

    def _note_unknown(self, schema: Schema) -> set[str]:
        """Note unknown keys; return the keys that were probably meant, so that they are not called missing too."""
        known = [key.name for key in schema.keys]
        free = [name for name in known if name not in self.values]
        meant: set[str] = set()
        for name in self.values:
            if name in known:
                continue
            near = nearest(name, free)
            meant.update(near)
            self.document.note(self._unknown(name, _hint_for_unknown(name, near, known, self.document.schemas)))
        return meant

    def _unknown(self, name: str, hint: str) -> BadDefinition:
        here = dotted(self.path)
        is_nested = any(isinstance(part, int) for part in self.path)
        told = repr(name[:LONGEST_SHOWN])
        reason = f"{here if is_nested else f'[{here}]'} has no {told}" if here else f"unknown key {told}"
        path = (*self.path, name)
        unknown = BadDefinition(reason, file=self.document.file, line=self.document.line_of(path), hint=hint)
        unknown.key = dotted(path)
        return unknown

    def value(self, key: str, kind: type[T]) -> T:
        """Return a value of exactly this type; a whole number counts as a number.

        Raises:
            BadDefinition: it is of another type.
        """
        value = self.values[key]
        if kind is float and type(value) is int and value.bit_length() < 1024:
            value = float(value)
        if type(value) is not kind:
            raise self.error(key, f"expected {_WORDS[kind]}, got {shown(value)}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """Return an array of strings without NUL.

        Raises:
            BadDefinition: it is something else.
        """
        if type(value := self.values[key]) is str:
            example = f"Write {key} = [...], with each in quotes of its own."
            raise self.error(key, "expected an array of strings, got a string", hint=example)
        for i, text in enumerate(self.value(key, list)):
            if type(text) is not str:
                raise self.error(i, f"expected a string, got {shown(text)}", within=key)
            if "\0" in text:
                raise self.error(i, "a NUL character", within=key)
        return tuple(value)

    def table(self, key: str) -> Table:
        """Return a table of this one.

        Raises:
            BadDefinition: it is something else.
        """
        return Table(self.document, self.value(key, dict), (*self.path, key))

    def tables(self, key: str) -> list[Table]:
        """Return an array of tables.

        Raises:
            BadDefinition: it is something else.
        """
        value = self.values[key]
        if not isinstance(value, list) or any(not isinstance(item, dict) for item in value):
            header = dotted((*(part for part in self.path if isinstance(part, str)), key))
            raise self.error(key, f"expected [[{header}]] tables, got {shown(value)}")
        return [Table(self.document, item, (*self.path, key, i)) for i, item in enumerate(value)]


def _hint_for_unknown(name: str, near: list[str], known: list[str], elsewhere: Iterable[Schema]) -> str:
    if near:
        return f"did you mean {near[0]!r}?"
    for schema in elsewhere:
        if schema.where and any(key.name == name for key in schema.keys):
            return f"it belongs {schema.where}"
    return did_you_mean(name, known)


# ----------------------------------------------------------------------- readers


def string(table: Table, key: str) -> str:
    """Read a string without NUL."""
    value = table.value(key, str)
    if "\0" in value:
        raise table.error(key, "a NUL character")
    return value


def flag(table: Table, key: str) -> bool:
    """Read true or false."""
    return table.value(key, bool)


def strings(table: Table, key: str) -> tuple[str, ...]:
    """Read an array of strings."""
    return table.strings(key)


def matching(fits: Callable[[str], object], what: str, *, or_empty: bool = False) -> Callable[[Table, str], str]:
    """Make a reader of strings that fit, or are empty where that says as much as no key at all."""

    def read(table: Table, key: str) -> str:
        value = string(table, key)
        if not fits(value) and (value or not or_empty):
            raise table.error(key, f"{value[:80]!r} is not {what}")
        return value

    return read


def choice(*words: str) -> Callable[[Table, str], str]:
    """Make a reader of one of a few words."""

    def read(table: Table, key: str) -> str:
        value = table.value(key, str)
        if value not in words:
            raise table.error(key, f"{value[:40]!r} is none of {', '.join(words)}", hint=_near(value, words))
        return value

    return read


def _near(word: str, known: tuple[str, ...]) -> str:
    near = nearest(word, known)
    return f"did you mean {near[0]!r}?" if near else ""


def integer(low: int, high: int, what: str = "") -> Callable[[Table, str], int]:
    """Make a reader of whole numbers in a range."""

    def read(table: Table, key: str) -> int:
        value = table.value(key, int)
        if not low <= value <= high:
            text = str(value) if value.bit_length() <= 64 else "the number"
            raise table.error(key, f"{text} is {what or 'out of range'}: {low} to {high}")
        return value

    return read


port = integer(1, 65535, "no port")


def number(low: float, high: float, what: str) -> Callable[[Table, str], float]:
    """Make a reader of numbers in a range; `what` is their unit."""

    def read(table: Table, key: str) -> float:
        value = table.value(key, float)
        if not low <= value <= high:  # not a number is in no range
            raise table.error(key, f"{value:g} {what} is out of range: {low:g} to {high:g}")
        return value

    return read


def duration(low_s: float, high_s: float) -> Callable[[Table, str], float]:
    """Make a reader of seconds from "1s", "500ms", "2m" or a plain number."""

    def read(table: Table, key: str) -> float:
        value = table.values[key]
        if type(value) in (int, float):
            seconds = table.value(key, float)
        elif found := _DURATION.fullmatch(value.strip()) if type(value) is str else None:
            seconds = float(found[1]) * _UNITS_S[found[2]]
        else:
            raise table.error(key, f'expected a duration like "30s", "500ms" or "2m", got {shown(value)}')
        if not low_s <= seconds <= high_s:
            raise table.error(key, f"{seconds:g} s is out of range: {low_s:g} to {high_s:g} s")
        return seconds

    return read


def size(low_bytes: int, high_bytes: int) -> Callable[[Table, str], int]:
    """Make a reader of bytes from "256M", "1GiB" (of 1024) or a plain number of bytes."""

    def read(table: Table, key: str) -> int:
        value = table.values[key]
        if type(value) is int:
            bytes_ = value
        elif found := _SIZE.fullmatch(value.strip()) if type(value) is str else None:
            unit = _UNITS_BYTES[found[2].lower()]
            bytes_ = int(found[1]) * unit if found[1].isdigit() else math.floor(float(found[1]) * unit)
        else:
            raise table.error(key, f'expected a size like "256M" or "1G", got {shown(value)}')
        if not low_bytes <= bytes_ <= high_bytes:
            text = f"{bytes_} bytes" if bytes_.bit_length() <= 64 else "the size"
            hint = f'Did you mean "{bytes_}M"?' if 0 < bytes_ < 2**16 else ""
            raise table.error(key, f"{text} is out of range: {low_bytes} to {high_bytes}", hint=hint)
        return bytes_

    return read
