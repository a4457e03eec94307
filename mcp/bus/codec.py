"""Bytes to messages and back: msgpack on the wire, strict cattrs hooks between, one exception out.

What is refused and why is FAULTS.md section 1: msgpack itself takes duplicate keys, NaN, extension types and 600 levels of
nesting. Unknown keys are ignored, so an older node reads a newer message; a missing required key is an error.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

import attrs
import msgpack
from cattrs import Converter, transform_error

from mcp.bus.transport import MAX_BODY_BYTES, Frame
from mcp.model import messages as _messages  # noqa: F401 - importing it fills the catalogue
from mcp.model.catalogue import CATALOGUE, declared
from mcp.model.errors import MalformedMessage

MAX_DEPTH = 16
"""Levels of nesting in a message; ours have at most seven."""

MAX_CONTAINERS = 10_000
"""Arrays and maps in one message: 250 KB of empty maps would otherwise become 18 MB of memory."""

FrameKind = Literal["", "accepted", "progress", "final", "error"]


@attrs.frozen(kw_only=True)
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


# ------------------------------------------------------------------- structure


@functools.cache
def converter() -> Converter:
    """Return the one strict converter; it makes its code for a class when that class is first met."""
    made = Converter(forbid_extra_keys=False)
    for kind in (str, int, bool):
        made.register_structure_hook(kind, _only(kind))
    made.register_structure_hook(float, _to_float)
    made.register_structure_hook_factory(lambda kind: get_origin(kind) is tuple, _strict_tuple)
    made.register_structure_hook_factory(lambda kind: get_origin(kind) is dict, _strict_dict)
    made.register_structure_hook_factory(lambda kind: get_origin(kind) is Literal, _strict_literal)
    made.register_structure_hook_factory(attrs.has, _strict_class)
    return made


def _only(kind: type) -> Any:
    def take(value: Any, _: Any) -> Any:
        if type(value) is not kind:  # bool is an int to isinstance, and "7" is no int
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return take


def _to_float(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"expected float, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    return float(value)


def _strict_literal(kind: Any, _: Converter) -> Any:
    choices = get_args(kind)

    def take(value: Any, _: Any) -> Any:
        for choice in choices:
            if type(value) is type(choice) and value == choice:
                return choice
        raise ValueError(f"expected one of {', '.join(map(str, choices))}, got {str(value)[:40]!r}")

    return take


def _strict_tuple(kind: Any, made: Converter) -> Any:
    lenient = made.get_structure_hook(list[get_args(kind)[0]])

    def take(value: Any, _: Any) -> Any:
        if type(value) is not list:  # cattrs would take any iterable, a string too
            raise TypeError(f"expected array, got {type(value).__name__}")
        return tuple(lenient(value, list))

    return take


def _strict_dict(kind: Any, made: Converter) -> Any:
    item, item_kind = made.get_structure_hook(get_args(kind)[1]), get_args(kind)[1]

    def take(value: Any, _: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(f"expected map, got {type(value).__name__}")
        return {key: item(each, item_kind) for key, each in value.items()}

    return take


def _strict_class(cls: type, made: Converter) -> Any:
    lenient = made.gen_structure_attrs_fromdict(cls)

    def take(value: Any, kind: Any) -> Any:
        if type(value) is not dict:
            raise TypeError(f"expected map, got {type(value).__name__}")
        return lenient(value, kind)

    return take


def from_plain(cls: type, plain: Any) -> Any:
    """Build a message (or a part of one) from plain values.

    Raises:
        MalformedMessage: with the path of what is wrong.
    """
    try:
        return converter().structure(plain, cls)
    except MalformedMessage:
        raise
    except Exception as error:
        # cattrs raises groups of whatever the hooks and the classes' own validators raise.
        said = transform_error(error, path="$", format_exception=_explain)
        reason, _, path = said[0].rpartition(" @ ")
        raise MalformedMessage(reason, path=path) from error


def _explain(error: BaseException, kind: type | None) -> str:
    if isinstance(error, KeyError):
        return "is missing"
    return str(error) or type(error).__name__


def to_plain(value: Any) -> Any:
    """Return plain dicts, lists, strings and numbers for a message (or a part of one)."""
    return converter().unstructure(value)


# ----------------------------------------------------------------------- bytes


def encode(message: Any) -> bytes:
    """Return the msgpack body of a message."""
    body: bytes = msgpack.packb(to_plain(message))
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
    message_id: str = "",
    traceparent: str = "",
) -> Frame:
    """Return the frame that carries a message; its headers are text, so that a plain `nats sub` can be read."""
    entry = declared(type(message))
    headers = {
        "Mcp-Kind": f"{entry.kind}/{entry.version}",
        "Mcp-Op": op,
        "Mcp-Frame": frame,
        "Mcp-Sent": "" if sent_s is None else f"{sent_s:.6f}",
        "Mcp-Deadline": "" if deadline_s is None else f"{deadline_s:.6f}",
        "Mcp-Epoch": str(epoch) if epoch else "",
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
    kind, _, version = frame.headers.get("Mcp-Kind", "").partition("/")
    if not version.isdigit():
        raise MalformedMessage("has no Mcp-Kind header like heartbeat/1")
    part = frame.headers.get("Mcp-Frame", "")
    if part not in ("", "accepted", "progress", "final", "error"):
        raise MalformedMessage(f"unknown frame {part[:20]!r}")
    message = decode(kind, frame.body)
    if int(version) > CATALOGUE[kind].version:
        raise MalformedMessage(f"{kind}/{version[:6]} is newer than ours ({CATALOGUE[kind].version})")
    return Letter(
        message=message,
        kind=kind,
        subject=frame.subject,
        reply=frame.reply,
        op=frame.headers.get("Mcp-Op", "")[:64],
        frame=part,  # type: ignore[arg-type]
        sent_s=_time(frame.headers, "Mcp-Sent"),
        deadline_s=_time(frame.headers, "Mcp-Deadline"),
        epoch=_whole(frame.headers, "Mcp-Epoch"),
    )


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
