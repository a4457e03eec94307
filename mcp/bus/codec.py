"""Bytes to messages and back: msgpack on the wire, strict cattrs hooks between, one exception out.

What is refused, and why (docs/bus.md, Frames): msgpack itself takes duplicate keys, NaN, extension types and 600 levels of
nesting. Unknown keys are ignored, so an older node reads a newer message; a missing required key is an error.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import attrs
import msgpack
from cattrs import Converter

from mcp.bus.transport import MAX_BODY_BYTES, Frame
from mcp.model import messages as _messages  # noqa: F401 - importing it fills the catalogue
from mcp.model.catalogue import CATALOGUE, declared
from mcp.model.errors import MalformedMessage
from mcp.model.values import frozen

MAX_DEPTH = 16
"""Levels of nesting in a message; ours have at most seven."""

MAX_CONTAINERS = 10_000
"""Arrays and maps in one message: 250 KB of empty maps would otherwise become 18 MB of memory."""

FrameKind = Literal["", "accepted", "progress", "final", "error"]

_FRAME_KINDS: Mapping[str, FrameKind] = {kind: kind for kind in get_args(FrameKind)}
_KIND = re.compile(r"([a-z_]{1,60})/([0-9]{1,4})")
_OP = re.compile(r"[A-Za-z0-9_-]{0,64}")
"""An operation's id: it becomes part of a subject."""


@frozen(kw_only=True)
class Letter:
    """A decoded message with what its headers say; times are in the master's clock, which never steps."""

    message: Any
    kind: str
    subject: str
    reply: str = ""
    op: str = ""
    frame: FrameKind = ""
    sent_s: float | None = None
    deadline_s: float | None = None
    epoch: int = 0
    answers: str = ""
    """The reply subject of the order whose refusal led to this one (see links.AgentLink)."""
    traceparent: str = ""


# ------------------------------------------------------------------- structure


Hook = Callable[[Any, Any], Any]


@functools.cache
def converter() -> Converter:
    """Return the one strict converter; it makes its code for a class when that class is first met.

    It stops at the first thing that is wrong and does not say where: `_explain` does, off the path of good messages.
    """
    made = Converter(forbid_extra_keys=False, detailed_validation=False)
    for kind in (str, int, bool):
        made.register_structure_hook(kind, _only(kind))
    made.register_structure_hook(float, _to_float)
    made.register_structure_hook_factory(_is(tuple), _strict_tuple)
    made.register_structure_hook_factory(_is(dict), _strict_dict)
    made.register_structure_hook_factory(_is(Literal), _strict_literal)
    made.register_structure_hook_factory(attrs.has, _strict_class)
    return made


def _is(origin: Any) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _only(kind: type) -> Hook:
    def take(value: Any, _: Any) -> Any:
        if type(value) is not kind:  # bool is an int to isinstance, and "7" is no int
            raise _unexpected(kind.__name__, value)
        return value

    return take


def _unexpected(wanted: str, value: Any) -> TypeError:
    return TypeError(f"expected {wanted}, got {_NAMES.get(type(value), type(value).__name__)}")


_NAMES = {dict: "map", list: "array", type(None): "nil"}


def _to_float(value: Any, _: Any) -> float:
    if type(value) is not float and type(value) is not int:
        raise _unexpected("float", value)
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def _strict_literal(kind: Any, _: Converter) -> Hook:
    choices = get_args(kind)

    def take(value: Any, _: Any) -> Any:
        for choice in choices:
            if value == choice and type(value) is type(choice):
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, choices))}, got {str(value)[:40]!r}")

    return take


def _strict_tuple(kind: Any, made: Converter) -> Hook:
    item_kind = get_args(kind)[0]
    item = made.get_structure_hook(item_kind)

    def take(value: Any, _: Any) -> Any:
        if type(value) is not list and type(value) is not tuple:  # cattrs would take any iterable, a string too
            raise _unexpected("array", value)
        return tuple([item(each, item_kind) for each in value])

    return take


def _strict_dict(kind: Any, made: Converter) -> Hook:
    item_kind = get_args(kind)[1]
    item = made.get_structure_hook(item_kind)

    def take(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise _unexpected("map", value)
        return {key: item(each, item_kind) for key, each in value.items()}

    return take


def _strict_class(cls: type, made: Converter) -> Hook:
    lenient: Hook = made.gen_structure_attrs_fromdict(cls)

    def take(value: Any, kind: Any) -> Any:
        if type(value) is not dict:
            raise _unexpected("map", value)
        return lenient(value, kind)

    return take


def from_plain(cls: type, plain: Any) -> Any:
    """Build a message (or a part of one) from plain values.

    Raises:
        MalformedMessage: with the path of what is wrong.
    """
    try:
        return converter().structure(plain, cls)
    except Exception as error:
        # Hooks raise TypeError and ValueError, a missing key is a KeyError, and validators of a class may raise anything.
        path, reason = _explain(cls, plain, "$") or ("$", str(error))
        raise MalformedMessage(reason, path=path) from error


def _explain(kind: Any, value: Any, path: str) -> tuple[str, str] | None:
    """Return path and reason of the first thing that is wrong; None when nothing is."""
    try:
        converter().structure(value, kind)
    except Exception as error:  # noqa: BLE001 - as in from_plain; here it becomes a text
        for inner_kind, inner, step in _parts(kind, value):
            if inner is attrs.NOTHING:
                return path + step, "is missing"
            if found := _explain(inner_kind, inner, path + step):
                return found
        return path, str(error) or type(error).__name__
    return None


def _parts(kind: Any, value: Any) -> list[tuple[Any, Any, str]]:
    """Return what a value consists of: kind, value (NOTHING where it must be and is not), step of the path."""
    if isinstance(kind, UnionType):
        kind = get_args(kind)[0]  # ours are all "something or None"
    if type(value) is dict and attrs.has(kind):
        attrs.resolve_types(kind)
        return [
            (field.type, value.get(field.name, attrs.NOTHING), f".{field.name}")
            for field in attrs.fields(kind)
            if field.name in value or field.default is attrs.NOTHING
        ]
    if type(value) is dict and get_origin(kind) is dict:
        return [(get_args(kind)[1], each, f"[{key[:40]!r}]") for key, each in value.items()]
    if type(value) in (list, tuple) and get_origin(kind) is tuple:
        return [(get_args(kind)[0], each, f"[{i}]") for i, each in enumerate(value)]
    return []


def to_plain(value: Any) -> Any:
    """Return plain dicts, lists, strings and numbers for a message (or a part of one)."""
    return converter().unstructure(value)


# ----------------------------------------------------------------------- bytes


def encode(message: Any) -> bytes:
    """Return the msgpack body of a message.

    Half a surrogate pair (a file name that is not UTF-8, read by Python) becomes a question mark: it cannot travel.

    Raises:
        MalformedMessage: a number in it has more than 64 bits.
    """
    try:
        body: bytes = msgpack.packb(to_plain(message), unicode_errors="replace")
    except OverflowError as error:
        raise MalformedMessage("a number has more than 64 bits") from error
    return body


def size_of(message: Any) -> int:
    """Return how many bytes the body of a message has."""
    return len(encode(message))


def decode(kind: str, body: bytes) -> Any:
    """Return the message of a kind from its body.

    Raises:
        MalformedMessage: the bytes are not that message.
    """
    entry = CATALOGUE.get(kind)
    if entry is None:
        raise MalformedMessage(f"unknown kind {kind[:60]!r}")
    return from_plain(entry.cls, unpack(body))


def unpack(body: bytes) -> Any:
    """Return the plain value of a msgpack body within our limits.

    Raises:
        MalformedMessage: too large, too deep, not msgpack, or something msgpack takes and we do not.
    """
    if len(body) > MAX_BODY_BYTES:
        raise MalformedMessage(f"{len(body)} bytes, the limit is {MAX_BODY_BYTES}")
    guard = _Guard()
    try:
        value = msgpack.unpackb(
            body, object_pairs_hook=guard.map, list_hook=guard.array, ext_hook=guard.extension, strict_map_key=False
        )
    except MalformedMessage:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise MalformedMessage(f"not msgpack: {type(error).__name__}") from error
    if _is_too_deep(value):
        raise MalformedMessage(f"more than {MAX_DEPTH} levels of nesting")
    return value


class _Guard:
    """Refuses while msgpack reads: keys that are no strings or stand twice, extensions, and too many containers."""

    def __init__(self) -> None:
        self._left = MAX_CONTAINERS

    def map(self, pairs: list[tuple[Any, Any]]) -> dict[str, Any]:
        """Make a map of its pairs."""
        self._count()
        made = {}
        for key, value in pairs:
            if type(key) is not str:
                raise MalformedMessage(f"expected string key, got {type(key).__name__}")
            made[key] = value
        if len(made) != len(pairs):
            raise MalformedMessage("a key stands twice in one map")
        return made

    def array(self, items: list[Any]) -> list[Any]:
        """Let an array pass."""
        self._count()
        return items

    def extension(self, code: int, _: bytes) -> Any:
        """Refuse an extension type (time stamps are one too)."""
        raise MalformedMessage(f"extension type {code}")

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise MalformedMessage(f"more than {MAX_CONTAINERS} arrays and maps")


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for each in level
            if type(each) in (dict, list)
            for inner in (each.values() if type(each) is dict else each)
            if type(inner) in (dict, list)
        ]
        if not level:
            return False
    return True


# --------------------------------------------------------------------- letters


def seal(
    subject: str,
    message: Any,
    *,
    op: str = "",
    frame: FrameKind = "",
    reply: str = "",
    sent_s: float | None = None,
    deadline_s: float | None = None,
    epoch: int = 0,
    answers: str = "",
    message_id: str = "",
    traceparent: str = "",
) -> Frame:
    """Return the frame that carries a message; its headers are text, so that a plain `nats sub` can be read.

    Raises:
        MalformedMessage: it cannot be said like this: `op` is not letters, digits, `-` and `_`, or see encode.
    """
    if not _OP.fullmatch(op):
        raise MalformedMessage(f"{op[:80]!r} is no operation's id")
    entry = declared(type(message))
    headers = {
        "Mcp-Kind": f"{entry.kind}/{entry.version}",
        "Mcp-Op": op,
        "Mcp-Frame": frame,
        "Mcp-Sent": "" if sent_s is None else f"{sent_s:.6f}",
        "Mcp-Deadline": "" if deadline_s is None else f"{deadline_s:.6f}",
        "Mcp-Epoch": str(epoch) if epoch else "",
        "Mcp-Answers": answers,
        "Nats-Msg-Id": message_id,
        "Traceparent": traceparent,
        "Content-Type": "application/msgpack",
    }
    return Frame(
        subject=subject,
        body=encode(message),
        headers={name: value for name, value in headers.items() if value},
        reply=reply,
    )


def open_frame(frame: Frame) -> Letter:
    """Return what a frame says.

    Raises:
        MalformedMessage: its headers or its body are not what they should be.
    """
    said = frame.headers
    kind = _kind(said.get("Mcp-Kind", ""))
    part = _FRAME_KINDS.get(said.get("Mcp-Frame", ""))
    if part is None:
        raise MalformedMessage(f"unknown frame {said['Mcp-Frame'][:20]!r}")
    op = said.get("Mcp-Op", "")
    if not _OP.fullmatch(op):
        raise MalformedMessage("header Mcp-Op is no operation's id")
    return Letter(
        message=decode(kind, frame.body),
        kind=kind,
        subject=frame.subject,
        reply=frame.reply,
        op=op,
        frame=part,
        sent_s=_time(said, "Mcp-Sent"),
        deadline_s=_time(said, "Mcp-Deadline"),
        epoch=_whole(said, "Mcp-Epoch"),
        answers=said.get("Mcp-Answers", ""),
        traceparent=said.get("Traceparent", ""),
    )


def _kind(header: str) -> str:
    """Read "heartbeat/1"; a newer version than ours may mean something else, so it is not read at all."""
    found = _KIND.fullmatch(header)
    if found is None:
        raise MalformedMessage("has no Mcp-Kind header like heartbeat/1")
    kind, version = found[1], int(found[2])
    if kind not in CATALOGUE:
        raise MalformedMessage(f"unknown kind {kind!r}")
    if version > CATALOGUE[kind].version:
        raise MalformedMessage(f"{kind}/{version} is newer than ours ({CATALOGUE[kind].version})")
    return kind


def _time(headers: Mapping[str, str], name: str) -> float | None:
    if name not in headers:
        return None
    try:
        value = float(headers[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MalformedMessage(f"header {name} is no time")
    return value


def _whole(headers: Mapping[str, str], name: str) -> int:
    text = headers.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedMessage(f"header {name} is no whole number")
    return int(text)
