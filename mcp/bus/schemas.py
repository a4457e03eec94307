"""Writes schemas/ from the messages: `python -m mcp.bus.schemas` (or --write), with --check for the tests.

For each message a JSON Schema, for whoever reads the bus in another language, and golden frames: what a peer sent when the
frame was written. A golden frame is never changed. When a message gains a field, a new frame is put before the old ones, and
all of them must still be read: that is what "an older peer" means here.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import attrs
import msgpack

from mcp.bus import subjects
from mcp.bus.codec import FrameKind, decode, seal, to_plain
from mcp.bus.transport import Frame
from mcp.model import messages as _messages  # noqa: F401 - importing both fills the catalogue
from mcp.model import operator_messages as _operator_messages  # noqa: F401
from mcp.model.catalogue import CATALOGUE, Declared, Lane

FOLDER = Path(__file__).parents[2] / "schemas"

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"type": "number"},
    bool: {"type": "boolean"},
    type(None): {"type": "null"},
}
_SAMPLES: dict[Any, Any] = {int: 7, float: 1.5, bool: True}


# --------------------------------------------------------------------- schemas


def schema(entry: Declared) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a message's body, as the codec reads it."""
    parts: dict[str, dict[str, Any]] = {}
    top = _object(entry.cls, parts)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"{entry.kind}/{entry.version}",
        "title": entry.cls.__name__,
        "x-lane": str(entry.lane),
        "x-subject": _pattern(entry),
        **({"x-reply": _kind_of(entry.reply)} if entry.reply else {}),
        **top,
        **({"$defs": dict(sorted(parts.items()))} if parts else {}),
    }


def _kind_of(cls: type) -> str:
    return next(entry.kind for entry in CATALOGUE.values() if entry.cls is cls)


def _object(cls: type, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    said = _field_docs(cls)
    properties = {}
    for field in _fields(cls):
        made = _of(field.type, parts)
        if field.name in said:
            made = {**made, "description": said[field.name]}
        if field.default is not attrs.NOTHING:
            made = {**made, "default": to_plain(_default(field))}
        properties[field.name] = made
    return {
        "description": inspect.cleandoc(cls.__doc__ or ""),
        "type": "object",
        "properties": properties,
        "required": [field.name for field in _fields(cls) if field.default is attrs.NOTHING],
    }


def _of(kind: Any, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the schema of one type; classes are put into `parts` and referred to."""
    if attrs.has(kind):
        if kind.__name__ not in parts:
            parts[kind.__name__] = {}  # its place, should it contain itself
            parts[kind.__name__] = _object(kind, parts)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if isinstance(kind, UnionType):
        return {"anyOf": [_of(each, parts) for each in get_args(kind)]}
    inner = get_args(kind)
    match get_origin(kind):
        case origin if origin is tuple:
            return {"type": "array", "items": _of(inner[0], parts)}
        case origin if origin is dict:
            return {"type": "object", "additionalProperties": _of(inner[1], parts)}
        case origin if origin is Literal:
            return {"enum": list(inner)}
    return dict(_PLAIN[kind])


def _fields(cls: type) -> tuple[Any, ...]:
    attrs.resolve_types(cls)
    return tuple(attrs.fields(cls))


def _default(field: Any) -> Any:
    default = field.default
    return default.factory() if isinstance(default, attrs.Factory) else default  # type: ignore[arg-type]


def _field_docs(cls: type) -> dict[str, str]:
    """Return the docstrings that stand below fields."""
    return _docs_in(cls.__module__).get(cls.__name__, {})


@functools.cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """Return what a module says of the fields of its classes: class -> field -> text."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: dict(_said(node)) for node in tree.body if isinstance(node, ast.ClassDef)}


def _said(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for field, below in zip(node.body, node.body[1:], strict=False):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                yield name, " ".join(text.split())


# --------------------------------------------------------------- golden frames


def samples(entry: Declared) -> Iterator[Frame]:
    """Return frames of a message: one with every field, one with none but those that must be there."""
    whole = _frame(entry, _sample(entry.cls, entry.kind))
    yield whole
    least = msgpack.packb(_least(entry.cls, entry.kind))
    if least != whole.body:
        yield attrs.evolve(whole, body=least)


def _sample(kind: Any, name: str) -> Any:
    """Return a value of a type with everything set to something else than the default; strings are what they mean."""
    if attrs.has(kind):
        return kind(**{field.name: _sample(field.type, field.name) for field in _fields(kind)})
    if isinstance(kind, UnionType):
        return _sample(get_args(kind)[0], name)
    inner = get_args(kind)
    match get_origin(kind):
        case origin if origin is tuple:
            return (_sample(inner[0], name),)
        case origin if origin is dict:
            return {"key": _sample(inner[1], name)}
        case origin if origin is Literal:
            return inner[-1]
    return _SAMPLES.get(kind, name)


def _least(cls: type, name: str) -> dict[str, Any]:
    """Return the plain form of a message that says only what it must."""
    required = {field.name: field.type for field in _fields(cls) if field.default is attrs.NOTHING}
    return {name: _least_of(kind, name) for name, kind in required.items()}


def _least_of(kind: Any, name: str) -> Any:
    if attrs.has(kind):
        return _least(kind, name)
    return to_plain(_sample(kind, name)) if get_origin(kind) is not tuple else []


def _frame(entry: Declared, message: Any) -> Frame:
    subject, reply, frame = _way(entry)
    return seal(
        subject,
        message,
        op="4f2c9a1b" if reply or frame else "",
        frame=frame,
        reply=reply,
        sent_s=1790000000.25 if entry.lane is Lane.WORK else None,
        deadline_s=1790000005.25 if entry.lane is Lane.WORK else None,
        epoch=1790000000000 if entry.lane is Lane.WORK else 0,
        message_id="orion-4f2c9a1b-1" if entry.lane is Lane.NODE_EVENT else "",
    )


def _way(entry: Declared) -> tuple[str, str, FrameKind]:
    """Return where such a message goes in the examples, where its answer goes, and which frame it is."""
    orders_reply = subjects.reply("orion", "4f2c9a1b-1-1")
    match entry.lane:
        case Lane.COMMAND:
            return subjects.command("kyle", entry.kind), subjects.inbox("cli", "kyle") + "1", ""
        case Lane.JOIN:
            return subjects.join("3f2a9c11"), subjects.inbox("join", "3f2a9c11") + "1", ""
        case Lane.REGISTER:
            return subjects.register("orion"), subjects.inbox("agent", "orion") + "1", ""
        case Lane.HEARTBEAT:
            return subjects.heartbeat("orion"), "", ""
        case Lane.NODE_EVENT:
            return subjects.node_event("orion", entry.kind), "", ""
        case Lane.LOG:
            return subjects.log("orion", "stream"), "", ""
        case Lane.WORK:
            return subjects.work("orion", entry.kind), orders_reply, ""
        case Lane.EVENT:
            return subjects.event(entry.kind), "", ""
        case Lane.FRAME:
            to_agent = entry.kind == "registered"
            asked = any(e.reply is entry.cls and e.lane is Lane.WORK for e in CATALOGUE.values())
            to_operator = subjects.inbox("cli", "kyle") + "1"
            inbox = subjects.inbox("agent", "orion") + "1" if to_agent else to_operator
            return (orders_reply if asked else inbox), "", _FRAMES.get(entry.kind, "final")


_FRAMES: dict[str, FrameKind] = {
    "failed": "error",
    "operation_accepted": "accepted",
    "operation_progress": "progress",
    "working": "progress",
}


def _pattern(entry: Declared) -> str:
    """Return the subject with the names that vary in angle brackets."""
    if entry.lane is Lane.FRAME:
        return "the reply subject of what it answers"
    subject = _way(entry)[0]
    for name, what in (("orion", "<node>"), ("kyle", "<user>"), ("3f2a9c11", "<invitation>"), ("stream", "<stream>")):
        tokens = [what if token == name else token for token in subject.split(".")]
        subject = ".".join(tokens)
    return subject


def golden(entry: Declared, known: str = "") -> str:
    """Return a message's page of golden frames: those of the page as it is (`known`), with new ones before them."""
    old = json.loads(known)["frames"] if known else []
    told = [msgpack.unpackb(bytes.fromhex(shown["body"])) for shown in old]  # the order of fields says nothing
    new = [_shown(entry.kind, frame) for frame in samples(entry) if msgpack.unpackb(frame.body) not in told]
    frames = [*new, *old]
    return _text({"kind": f"{entry.kind}/{entry.version}", "lane": str(entry.lane), "frames": frames})


def _shown(kind: str, frame: Frame) -> dict[str, Any]:
    shown = {"subject": frame.subject, "reply": frame.reply, "headers": dict(frame.headers), "body": frame.body.hex()}
    return {**{key: value for key, value in shown.items() if value}, "message": to_plain(decode(kind, frame.body))}


def frames_in(page: str) -> Iterator[tuple[Frame, Any]]:
    """Return the frames of a page, each with the plain form of the message that it was when it was written."""
    for shown in json.loads(page)["frames"]:
        frame = Frame(shown["subject"], bytes.fromhex(shown["body"]), shown["headers"], shown.get("reply", ""))
        yield frame, shown["message"]


# ------------------------------------------------------------------- the folder


def pages(folder: Path) -> dict[Path, str]:
    """Return every file of the folder as it should be."""
    made = {}
    for kind, entry in CATALOGUE.items():
        frames = folder / "frames" / f"{kind}.json"
        made[folder / f"{kind}.json"] = _text(schema(entry))
        made[frames] = golden(entry, frames.read_text(encoding="utf-8") if frames.exists() else "")
    return made


def strangers(folder: Path) -> list[Path]:
    """Return the files there that belong to no message."""
    there = [*folder.glob("*.json"), *folder.glob("frames/*.json")]
    return sorted(path for path in there if path.stem not in CATALOGUE)


def _text(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the files, or with --check say whether they are as they should be (exit code 1: they are not)."""
    folders = [Path(argument) for argument in arguments if argument not in ("--check", "--write")]
    folder = folders[0] if folders else FOLDER
    stale = {path: text for path, text in pages(folder).items() if not _is(path, text)}
    if "--check" not in arguments:
        (folder / "frames").mkdir(parents=True, exist_ok=True)
        for path, text in stale.items():
            path.write_text(text, encoding="utf-8")
        return 0
    for path in stale:
        _say(f"{path} is stale: python -m mcp.bus.schemas writes it anew")
    for path in strangers(folder):
        _say(f"{path} belongs to no message: remove it")
    return 1 if stale or strangers(folder) else 0


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201 - a program


def _is(path: Path, text: str) -> bool:
    return path.exists() and path.read_text(encoding="utf-8") == text


__all__ = ["frames_in", "golden", "main", "pages", "samples", "schema", "strangers"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
