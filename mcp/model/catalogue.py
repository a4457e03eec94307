"""How a message is declared: one decorator that says its lane; everything else follows from the catalogue."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeVar, dataclass_transform

import attrs

from mcp.model.values import frozen


class Lane(StrEnum):
    """Who may say a message to whom (docs/bus.md lanes; subjects and grants are in mcp/bus/subjects.py)."""

    COMMAND = "command"  # operator -> master, a request
    JOIN = "join"  # joining node -> master, a request, once
    REGISTER = "register"  # agent -> master, a request
    HEARTBEAT = "heartbeat"  # agent -> master, published
    NODE_EVENT = "node-event"  # agent -> master, published
    LOG = "log"  # agent -> master, published, credit-limited
    WORK = "work"  # master -> agent, an order
    EVENT = "event"  # master -> everybody
    FRAME = "frame"  # an answer, or one of the frames before it


@frozen(kw_only=True)
class Declared:
    """One catalogue entry: what the codec, the schemas, the subjects and the grants are made from."""

    kind: str
    cls: type
    lane: Lane
    reply: type | None = None
    version: int = 1


CATALOGUE: dict[str, Declared] = {}
"""Every message by its kind, e.g. "deploy_service"."""

_BY_CLASS: dict[type, Declared] = {}


def kind_of(name: str) -> str:
    """Turn a class name into a kind: DeployService -> deploy_service."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def declared(cls: type) -> Declared:
    """Return the entry of a message class.

    Raises:
        KeyError: it was never declared.
    """
    return _BY_CLASS[cls]


T = TypeVar("T")


def _declare(cls: type[T], lane: Lane, reply: type | None) -> type[T]:
    made: type[T] = frozen(kw_only=True)(cls)
    entry = Declared(kind=kind_of(cls.__name__), cls=made, lane=lane, reply=reply)
    if entry.kind in CATALOGUE:
        raise ValueError(f"message {entry.kind} is declared twice")
    CATALOGUE[entry.kind] = entry
    _BY_CLASS[made] = entry
    return made


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def command(*, reply: type) -> Callable[[type[T]], type[T]]:
    """Declare what an operator asks of the master; `reply` is the final frame."""
    return lambda cls: _declare(cls, Lane.COMMAND, reply)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def work(*, reply: type) -> Callable[[type[T]], type[T]]:
    """Declare an order of the master to one agent; `reply` is the final frame."""
    return lambda cls: _declare(cls, Lane.WORK, reply)


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(attrs.field,))
def message(lane: Lane, *, reply: type | None = None) -> Callable[[type[T]], type[T]]:
    """Declare a message of any other lane: join, register, heartbeat, node event, log, event, frame."""
    return lambda cls: _declare(cls, lane, reply)


def changed(message: T, **fields: Any) -> T:
    """Return a message with some fields changed: attrs.evolve, whose types do not know what the decorators above make."""
    return attrs.evolve(message, **fields)  # type: ignore[misc]
