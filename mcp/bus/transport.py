"""What a bus is to us: frames of bytes between subjects. Two of them pass one contract suite: memory and NATS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import attrs

MAX_BODY_BYTES = 128 * 1024
"""Our own limit, below the server's max_payload of 256 KB: at that one, a payload plus a header closes the client for good."""

LinkState = Literal["connected", "lost", "closed"]


@attrs.frozen
class Frame:
    """One message on the wire. `status` is "503" when the server says that nobody listens to a request."""

    subject: str
    body: bytes = b""
    headers: Mapping[str, str] = attrs.field(factory=dict)
    reply: str = ""
    status: str = ""


OnFrame = Callable[[Frame], None]
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
    """Told ("publish" or "subscribe", subject) when the bus refused one of ours, some milliseconds after the call."""

    @property
    def is_connected(self) -> bool:
        """Whether a publish would leave now."""

    async def publish(self, frame: Frame) -> None:
        """Send a frame. With `reply` set and nobody subscribed, a frame with status "503" comes to the reply subject.

        Raises:
            BusUnreachable: not connected; nothing was sent, nothing is kept for later.
            MalformedMessage: the body is over MAX_BODY_BYTES.
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
