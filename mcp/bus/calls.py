"""The call mux: one subscription feeds it, each reply subject belongs to one call; frames until the final one.

`nc.request` would wait its whole timeout when the bus is lost, takes one answer only, and cannot tell silence from work.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import attrs

from mcp.bus.codec import Letter, open_frame
from mcp.bus.transport import Frame, Transport
from mcp.model.errors import MalformedMessage, McpError, NoAnswer, NobodyListens, NotPermitted, Refused
from mcp.model.messages import Failed

log = logging.getLogger(__name__)

OnLetter = Callable[[Letter], None]
"""Called with each frame before the final one, in order; it only enqueues and never raises."""

QUEUE_LIMIT = 1000
"""Frames waiting for a caller that is busy; a flood of progress beyond it is dropped, never a final frame."""


class CallFailed(Refused):
    """The other side sent an error frame; `failed` has all of it."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code, failed.reason, hint=failed.hint)
        self.failed = failed


@attrs.frozen(eq=False)
class _Call:
    subject: str
    queue: asyncio.Queue[Letter | McpError]


class Calls:
    """Every call that is open on one connection."""

    def __init__(self) -> None:
        self._open: dict[str, _Call] = {}
        self.strays: Counter[str] = Counter()
        """Frames that no call could use, by why: "late or foreign", "malformed", "too many progress frames"."""

    async def call(
        self,
        transport: Transport,
        frame: Frame,
        *,
        timeout_s: float,
        idle_s: float,
        expects: type | None = None,
        on_frame: OnLetter | None = None,
    ) -> Any:
        """Send a request and return the message of its final frame.

        `idle_s` bounds the silence between two frames, `timeout_s` the whole.

        Raises:
            NobodyListens: nothing was done.
            BusUnreachable: not connected; nothing was sent.
            MalformedMessage: too large for the bus; nothing was sent.
            NotPermitted: the bus refused it; nothing was sent.
            CallFailed: the other side said no, or failed.
            NoAnswer: silence, or the bus was lost in the middle, or the answer is none of those that `expects` names: it may
                have been done.
        """
        letter = await self.ask(
            transport, frame, timeout_s=timeout_s, idle_s=idle_s, expects=expects, on_frame=on_frame
        )
        return letter.message

    async def ask(
        self,
        transport: Transport,
        frame: Frame,
        *,
        timeout_s: float,
        idle_s: float,
        expects: type | None = None,
        on_frame: OnLetter | None = None,
    ) -> Letter:
        """Do as `call` does, and return the whole final letter."""
        call = self._open[frame.reply] = _Call(frame.subject, asyncio.Queue(QUEUE_LIMIT))
        try:
            await transport.publish(frame)
            letter = await self._final(call, timeout_s, idle_s, on_frame)
        finally:
            del self._open[frame.reply]
        if expects and not isinstance(letter.message, expects):
            raise NoAnswer(
                f"{frame.subject} was answered with a {letter.kind}, which is no answer: it may have been done"
            )
        return letter

    async def _final(self, call: _Call, timeout_s: float, idle_s: float, on_frame: OnLetter | None) -> Letter:
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        while True:
            got = await self._next(call, deadline_s, timeout_s, idle_s)
            if isinstance(got, McpError):
                raise got
            match got.frame:
                case "final":
                    return got
                case "error":
                    raise CallFailed(_failed(got.message))
                case _ if on_frame:
                    on_frame(got)

    async def _next(self, call: _Call, deadline_s: float, timeout_s: float, idle_s: float) -> Letter | McpError:
        left_s = deadline_s - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(idle_s, left_s))):
                return await call.queue.get()
        except TimeoutError:
            limit = f"{idle_s:g} s of silence" if idle_s <= left_s else f"{timeout_s:g} s"
            raise NoAnswer(f"no answer to {call.subject} after {limit}: it may have been done") from None

    # ------------------------------------------------------------- what comes in

    def deliver(self, frame: Frame) -> bool:
        """Hand a frame to the call it belongs to; False when nobody waits for it."""
        call = self._open.get(frame.subject)
        if call is None:
            self.strays["late or foreign"] += 1
            log.debug("a frame on %r that nobody waits for", frame.subject)
            return False
        if frame.status == "503":
            self._put(call, NobodyListens(f"nobody listens on {call.subject}: nothing was done"))
            return True
        try:
            letter = _answer_in(frame)
        except MalformedMessage as error:
            # A rubbish frame is no answer: the call goes on, and ends by its own limits.
            self.strays["malformed"] += 1
            log.debug("a frame on %r is no answer: %s", frame.subject, error.reason)
            return True
        self._put(call, letter)
        return True

    def lost(self) -> None:
        """The bus is gone: every call that is open fails at once, its outcome unknown."""
        for call in self._open.values():
            self._put(call, NoAnswer(f"the bus was lost while waiting for {call.subject}: it may have been done"))

    def denied(self, subject: str) -> None:
        """The bus refused a publish: the calls that asked there fail."""
        for call in self._open.values():
            if call.subject.lower() == subject.lower():
                reason = f"the bus does not permit {call.subject}: nothing was sent"
                self._put(call, NotPermitted(reason, subject=call.subject))

    def _put(self, call: _Call, got: Letter | McpError) -> None:
        if call.queue.full():
            if isinstance(got, Letter) and got.frame in ("accepted", "progress"):
                self.strays["too many progress frames"] += 1
                return
            call.queue.get_nowait()
        call.queue.put_nowait(got)


def _answer_in(frame: Frame) -> Letter:
    letter = open_frame(frame)
    if not letter.frame:
        raise MalformedMessage("has no Mcp-Frame header")
    return letter


def _failed(message: Any) -> Failed:
    if isinstance(message, Failed):
        return message
    return Failed(
        code="internal", reason=f"the other side failed and sent a {type(message).__name__} instead of a reason"
    )
