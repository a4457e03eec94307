"""The bus inside one process: the same frames, rights, limits and silences as the real one, for tests and simulations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from mcp.bus import subjects
from mcp.bus.subjects import ConnectionRole, Grant
from mcp.bus.transport import Frame, LinkState, OnFrame, check_frame
from mcp.model.errors import BusUnreachable

log = logging.getLogger(__name__)


def _quiet_state(_: LinkState) -> None:
    """Nobody wants to know."""


def _quiet_denial(_: str, __: str) -> None:
    """Nobody wants to know."""


class MemoryBroker:
    """What connects memory transports; `is_up` is False while the "server" is down."""

    def __init__(self) -> None:
        self.is_up = True
        self.frames: list[Frame] = []
        """Everything that was published, for tests to look at."""
        self._links: list[MemoryTransport] = []

    def connect(self, role: ConnectionRole, name: str = "") -> MemoryTransport:
        """Return a connection with the rights of a role.

        Raises:
            BusUnreachable: the broker is down.
        """
        if not self.is_up:
            raise BusUnreachable("the bus does not answer")
        link = MemoryTransport(self, subjects.grant(role, name))
        self._links.append(link)
        return link

    def stop(self) -> None:
        """Lose every connection, as when the server dies."""
        self.is_up = False
        for link in list(self._links):
            link.set_state("lost")

    def start(self) -> None:
        """Come back; every connection that was lost returns with its subscriptions."""
        self.is_up = True
        for link in list(self._links):
            link.set_state("connected")

    def cut(self, link: MemoryTransport) -> None:
        """Lose one connection."""
        link.set_state("lost")

    def heal(self, link: MemoryTransport) -> None:
        """Bring it back."""
        link.set_state("connected")

    def expel(self, link: MemoryTransport) -> None:
        """End a connection for good, as when its credential is removed."""
        link.set_state("closed")
        self.drop(link)

    def drop(self, link: MemoryTransport) -> None:
        """Forget a connection."""
        if link in self._links:
            self._links.remove(link)

    def route(self, sender: MemoryTransport, frame: Frame) -> None:
        """Deliver a frame to everybody who hears its subject."""
        self.frames.append(frame)
        heard = sum([link.deliver(frame) for link in list(self._links)])
        if frame.reply and not heard:
            sender.deliver(Frame(subject=frame.reply, status="503"))


class MemorySubscription:
    """A pattern and who hears it."""

    def __init__(self, owner: MemoryTransport, pattern: str, on_frame: OnFrame) -> None:
        self._owner = owner
        self.pattern = pattern
        self.on_frame = on_frame

    async def close(self) -> None:
        """Hear no more."""
        self._owner.forget(self)


class MemoryTransport:
    """One connection to a memory broker."""

    def __init__(self, broker: MemoryBroker, grant: Grant) -> None:
        self.on_state: Callable[[LinkState], None] = _quiet_state
        self.on_denied: Callable[[str, str], None] = _quiet_denial
        self._broker = broker
        self._grant = grant
        self._state: LinkState = "connected"
        self._subscriptions: list[MemorySubscription] = []

    @property
    def is_connected(self) -> bool:
        """Whether a publish would leave now."""
        return self._state == "connected"

    def set_state(self, state: LinkState) -> None:
        """Change the state and tell whoever wants to know."""
        if self._state not in (state, "closed"):
            self._state = state
            self.on_state(state)

    async def publish(self, frame: Frame) -> None:
        """Send a frame (see Transport)."""
        check_frame(frame)
        self._check_connected()
        if not any(subjects.matches(pattern, frame.subject) for pattern in self._grant.publish):
            asyncio.get_running_loop().call_soon(self.on_denied, "publish", frame.subject.lower())
            return
        self._broker.route(self, frame)

    async def subscribe(self, pattern: str, on_frame: OnFrame) -> MemorySubscription:
        """Hear a pattern (see Transport)."""
        self._check_connected()
        subscription = MemorySubscription(self, pattern, on_frame)
        if not any(_covers(allowed, pattern) for allowed in self._grant.subscribe):
            asyncio.get_running_loop().call_soon(self.on_denied, "subscribe", pattern.lower())
        else:
            self._subscriptions.append(subscription)
        return subscription

    async def flush(self, timeout_s: float = 5.0) -> None:
        """Let everything that was said be heard, refusals included."""
        self._check_connected()
        async with asyncio.timeout(timeout_s):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Leave; closing twice is fine."""
        self.set_state("closed")
        self._broker.drop(self)

    def deliver(self, frame: Frame) -> bool:
        """Hand a frame to the subscriptions that hear it, in a later turn of the loop; return whether any does."""
        if not self.is_connected:
            return False
        heard = [s for s in self._subscriptions if subjects.matches(s.pattern, frame.subject)]
        for subscription in heard:
            asyncio.get_running_loop().call_soon(self._hand_over, subscription, frame)
        return bool(heard)

    def forget(self, subscription: MemorySubscription) -> None:
        """End a subscription; ended already is fine."""
        if subscription in self._subscriptions:
            self._subscriptions.remove(subscription)

    def _hand_over(self, subscription: MemorySubscription, frame: Frame) -> None:
        if self.is_connected and subscription in self._subscriptions:
            try:
                subscription.on_frame(frame)
            except (Exception, asyncio.CancelledError):
                # As on the real one: the next frame is heard all the same.
                log.exception("a frame on %r could not be taken in", frame.subject)

    def _check_connected(self) -> None:
        if not self.is_connected:
            raise BusUnreachable(f"the connection to the bus is {self._state}")


def _covers(allowed: str, pattern: str) -> bool:
    """Say whether all that a pattern hears is allowed, as the server decides it for subscriptions."""
    want, have = allowed.split("."), pattern.split(".")
    for i, word in enumerate(want):
        if word == ">":
            return len(have) > i
        if i >= len(have) or have[i] == ">" or word not in ("*", have[i]):
            return False
    return len(want) == len(have)
