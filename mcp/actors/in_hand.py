"""An order in an agent's hands: who asked, what is being done for it, and whether it was abandoned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mcp.actors.actor import Reply
from mcp.model.messages import Failed, Working
from mcp.model.ports import Clock


class InHand:
    """An order in the agent's hands: its reply, what is being done for it, and whether it was abandoned."""

    def __init__(self, reply: Reply, message: Any, hands: dict[int, InHand], clock: Clock) -> None:
        self.op = reply.op
        self.message = message
        self.detail = "waiting for an earlier order"
        self.is_abandoned = False
        self.on_abandoned: Callable[[], None] = _nothing
        self._reply = reply
        self._hands = hands
        self._clock = clock
        self._said = ""
        self._said_s = clock.monotonic_s()
        hands[id(self)] = self

    @property
    def is_expired(self) -> bool:
        """Whether whoever asked has given up."""
        return bool(getattr(self._reply, "is_expired", False))

    def abandon(self) -> None:
        """Have it stop at the next safe point."""
        self.is_abandoned = True
        self.on_abandoned()

    async def pulse(self, every_s: float) -> None:
        """Say what is being done when that is news, or when nothing was said for a while."""
        now_s = self._clock.monotonic_s()
        if self.detail != self._said or now_s - self._said_s >= every_s:
            self._said, self._said_s = self.detail, now_s
            await self._reply.progress(Working(detail=self.detail))

    async def progress(self, message: Any) -> None:
        """Say how far it is."""
        self._said_s = self._clock.monotonic_s()
        await self._reply.progress(message)

    async def final(self, message: Any) -> None:
        """Say how it ended."""
        self._hands.pop(id(self), None)
        await self._reply.final(message)

    async def failed(self, failed: Failed) -> None:
        """Say that it failed, and why."""
        self._hands.pop(id(self), None)
        await self._reply.failed(failed)


def _nothing() -> None:
    """Nobody works on it yet."""
