"""What a bus is to us: frames of bytes between subjects. Two of them pass one contract suite: memory and NATS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import attrs

from mcp.bus.subjects import is_subject
from mcp.model.errors import MalformedMessage
from mcp.model.values import frozen

MAX_BODY_BYTES = 128 * 1024
"""Our own limit, below the server's max_payload of 256 KB: at that one, a payload plus a header closes the client for good."""

MAX_HEADER_BYTES = 4 * 1024
"""Headers of one message, names and values; ours have some 200 bytes."""

LinkState = Literal["connected", "lost", "closed"]


@frozen
class Frame:
    """One message on the wire. `status` is "503" when the server says that nobody listens to a request."""

    subject: str
    body: bytes = b""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    reply: str = ""
    status: str = ""


def check_frame(frame: Frame) -> None:
    """Refuse what the bus would not carry, or would punish with the end of the connection.

    Raises:
        MalformedMessage: it is too large, or a subject is none: empty, with blanks, control characters or wildcards.
    """
    if len(frame.body) > MAX_BODY_BYTES:
        raise MalformedMessage(f"{len(frame.body)} bytes for {frame.subject}, the limit is {MAX_BODY_BYTES}")
    if sum(len(name) + len(value) for name, value in frame.headers.items()) > MAX_HEADER_BYTES:
        raise MalformedMessage(f"headers of more than {MAX_HEADER_BYTES} bytes for {frame.subject}")
    for subject in (frame.subject, frame.reply) if frame.reply else (frame.subject,):
        if not is_subject(subject):
            raise MalformedMessage(f"{subject[:80]!r} is no subject to publish on")


OnFrame = Callable[[Frame], object]
"""Called on the event loop, one frame at a time, in order; it only enqueues and never raises."""


class Subscription(Protocol):
    """A live subscription."""

    async def close(self) -> None:
        """Hear no more; closing twice is fine."""


class Transport(Protocol):
    """One connection to the bus, with the rights of its credential."""

    on_state: Callable[[LinkState], None]
    """Told about every change; never raises. `lost` means we try again by ourselves, `closed` that we do not."""

    on_denied: Callable[[str, str], None]
    """Told ("publish" or "subscribe", subject) when the bus refused one of ours, some milliseconds after the call.

    The subject is in lower case, whatever it was: the client library tells it so.
    """

    @property
    def is_connected(self) -> bool:
        """Whether a publish would leave now."""

    async def publish(self, frame: Frame) -> None:
        """Send a frame. With `reply` set and nobody subscribed, a frame with status "503" comes to the reply subject.

        Raises:
            BusUnreachable: not connected; nothing was sent, nothing is kept for later.
            MalformedMessage: it cannot be carried (see check_frame).
        """

    async def subscribe(self, pattern: str, on_frame: OnFrame) -> Subscription:
        """Hear all frames of a pattern; lives through reconnects.

        Raises:
            BusUnreachable: not connected.
        """

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Return when the server has taken all that was said before, refusals included.

        Raises:
            BusUnreachable: it did not in time.
        """

    async def close(self) -> None:
        """Leave; closing twice is fine."""
