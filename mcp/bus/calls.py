"""The call mux: one subscription feeds it, each reply subject belongs to one call; frames until the final one.

`nc.request` would wait its whole timeout when the bus is lost, takes one answer only, and cannot tell silence from work.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from mcp.bus.codec import Letter, open_frame
from mcp.bus.transport import Frame, Transport
from mcp.model.errors import MalformedMessage, McpError, NoAnswer, NobodyListens, NotPermitted, Refused
from mcp.model.messages import Failed

OnLetter = Callable[[Letter], None]

QUEUE_LIMIT = 1000
"""Frames waiting for a caller that is busy; a flood of progress beyond it is dropped, never a final frame."""


class CallFailed(Refused):
    """The other side sent an error frame; `failed` has all of it."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.code, failed.reason, hint=failed.hint)
        self.failed = failed


class Calls:
    """Every call that is open on one connection."""

    def __init__(self) -> None:
        self._open: dict[str, asyncio.Queue[Letter | McpError]] = {}
        self._asked: dict[str, str] = {}
        self.strays: Counter[str] = Counter()
        """Frames that nobody waited for, by why: late or foreign ones, and malformed ones."""

    async def call(
        self,
        transport: Transport,
        frame: Frame,
        *,
        timeout_s: float,
        idle_s: float,
        on_frame: OnLetter | None = None,
    ) -> Any:
        """Send a request and return the message of its final frame.

        `idle_s` bounds the silence between two frames, `timeout_s` the whole.

        Raises:
            NobodyListens: nothing was done.
            BusUnreachable: not connected; nothing was sent.
            NotPermitted: the bus refused it; nothing was sent.
            CallFailed: the other side said no, or failed.
            NoAnswer: silence, or the bus was lost in the middle: it may have been done.
        """
        queue: asyncio.Queue[Letter | McpError] = asyncio.Queue(QUEUE_LIMIT)
        self._open[frame.reply] = queue
        self._asked[frame.reply] = frame.subject
        try:
            await transport.publish(frame)
            return await self._collect(queue, frame, timeout_s=timeout_s, idle_s=idle_s, on_frame=on_frame)
        finally:
            del self._open[frame.reply]
            del self._asked[frame.reply]

    async def _collect(
        self,
        queue: asyncio.Queue[Letter | McpError],
        frame: Frame,
        *,
        timeout_s: float,
        idle_s: float,
        on_frame: OnLetter | None,
    ) -> Any:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            wait_s = min(idle_s, deadline - loop.time())
            try:
                async with asyncio.timeout(max(wait_s, 0)):
                    got = await queue.get()
            except TimeoutError:
                limit = f"{idle_s:g} s of silence" if wait_s >= idle_s else f"{timeout_s:g} s"
                raise NoAnswer(f"no answer to {frame.subject} after {limit}: it may have been done") from None
            if isinstance(got, McpError):
                raise got
            if got.frame == "error":
                failed = got.message
                raise CallFailed(failed if isinstance(failed, Failed) else Failed(code="internal", reason=str(failed)))
            if got.frame in ("accepted", "progress"):
                if on_frame:
                    on_frame(got)
                continue
            return got.message

    def deliver(self, frame: Frame) -> bool:
        """Hand a frame to the call it belongs to; False when nobody waits for it."""
        queue = self._open.get(frame.subject)
        if queue is None:
            self.strays["late or foreign"] += 1
            return False
        if frame.status == "503":
            self._put(queue, NobodyListens(f"nobody listens on {self._asked[frame.subject]}: nothing was done"))
            return True
        try:
            letter = open_frame(frame)
        except MalformedMessage as error:
            # A rubbish frame is no answer: the call goes on, and ends by its own limits.
            self.strays[f"malformed: {error.reason}"] += 1
            return True
        self._put(queue, letter)
        return True

    def lost(self) -> None:
        """The bus is gone: every call that is open fails at once, its outcome unknown."""
        for reply, queue in self._open.items():
            self._put(queue, NoAnswer(f"the bus was lost while waiting for {self._asked[reply]}: it may have been done"))

    def denied(self, subject: str) -> None:
        """The bus refused a publish: the calls that asked there fail."""
        for reply, queue in self._open.items():
            if self._asked[reply] == subject:
                self._put(queue, NotPermitted(f"the bus does not permit {subject}: nothing was sent", subject=subject))

    def _put(self, queue: asyncio.Queue[Letter | McpError], got: Letter | McpError) -> None:
        if queue.full():
            if isinstance(got, Letter) and got.frame in ("accepted", "progress"):
                self.strays["too many progress frames"] += 1
                return
            queue.get_nowait()
        queue.put_nowait(got)



