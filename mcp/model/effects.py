"""What goes into the master's state machine and what comes out of it: events and effects, all plain data."""

from __future__ import annotations

from typing import Any, Literal

from mcp.model.messages import Failed, Role, StreamLogs
from mcp.model.saga import Certainty
from mcp.model.values import frozen

# ---------------------------------------------------------------------- events


@frozen(kw_only=True)
class Started:
    """The master begins; these nodes are enrolled."""

    nodes: tuple[tuple[str, Role], ...]
    wall_s: float


@frozen(kw_only=True)
class CommandReceived:
    """An operator asks; `asker` names the reply slot, `operator` comes from the subject only."""

    asker: str
    operator: str
    message: Any


@frozen(kw_only=True)
class RegisterReceived:
    """A node registers; the inventory may be a part."""

    asker: str
    node: str
    message: Any


@frozen(kw_only=True)
class ReportReceived:
    """A heartbeat or a node event."""

    node: str
    message: Any


@frozen(kw_only=True)
class WorkProgressed:
    """A progress frame of an order."""

    call: str
    message: Any


@frozen(kw_only=True)
class WorkEnded:
    """An order ended, in a reply or in trouble."""

    call: str
    reply: Any = None
    failure: Failed | None = None
    certainty: Certainty = "failed"
    is_nobody: bool = False
    """Nobody listens on the node's work subject."""


@frozen(kw_only=True)
class NodeDisconnected:
    """The bus server says that a node's connection is gone."""

    node: str
    reason: str = ""


@frozen(kw_only=True)
class BusBack:
    """Our own connection was lost and is back: nodes need a moment too."""


@frozen(kw_only=True)
class NodeEnrolled:
    """A node may connect from now on."""

    node: str
    role: Role


@frozen(kw_only=True)
class NodeForgotten:
    """A node may no longer connect."""

    node: str


@frozen(kw_only=True)
class FloodChanged:
    """A node says too much and was muted, or may speak again."""

    node: str
    is_flooding: bool


@frozen(kw_only=True)
class Tick:
    """Time passes."""

    wall_s: float


Event = (
    Started
    | CommandReceived
    | RegisterReceived
    | ReportReceived
    | WorkProgressed
    | WorkEnded
    | NodeDisconnected
    | BusBack
    | NodeEnrolled
    | NodeForgotten
    | FloodChanged
    | Tick
)

# --------------------------------------------------------------------- effects


@frozen(kw_only=True)
class SendWork:
    """Send an order; its end comes back as `WorkEnded` under the same call."""

    call: str
    node: str
    message: Any
    op: str
    timeout_s: float
    idle_s: float


@frozen(kw_only=True)
class Say:
    """Send a frame to whoever asked."""

    asker: str
    frame: Literal["accepted", "progress", "final", "error"]
    message: Any


@frozen(kw_only=True)
class Tell:
    """Publish an event to everybody."""

    message: Any


@frozen(kw_only=True)
class Invite:
    """Make an invitation and answer with it."""

    asker: str
    node: str
    role: Role


@frozen(kw_only=True)
class Expel:
    """Cut a node off and forget it, then answer."""

    asker: str
    node: str


@frozen(kw_only=True)
class OpenStream:
    """Have these nodes send log lines to whoever asked."""

    asker: str
    operator: str
    legs: tuple[tuple[str, StreamLogs], ...]


@frozen(kw_only=True)
class FeedStream:
    """The reader of a stream has room for more (0: it has gone)."""

    asker: str
    operator: str
    stream: str
    credit: int


Effect = SendWork | Say | Tell | Invite | Expel | OpenStream | FeedStream
