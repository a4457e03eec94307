"""The operator's end of the bus in plain values: what a command that shall take 0.2 s can afford.

The classes of the messages and their codec cost a third of a command's start (bench/), and a command mostly prints what it
gets. What it sends is checked against the classes by a test (tests/unit/test_cli_asks.py), what it gets by the master's codec.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import msgpack

from mcp.bus import subjects
from mcp.bus.transport import MAX_BODY_BYTES, Frame, LinkState, Transport
from mcp.model.errors import (
    BusUnreachable,
    MalformedMessage,
    McpError,
    NoAnswer,
    NobodyListens,
    NotPermitted,
    Refused,
)

Plain = dict[str, Any]
OnPlain = Callable[[str, Plain], None]
"""Told the kind and the body of each frame before the final one, in order; never raises."""

Got = tuple[str, str, Plain] | McpError


class Declined(Refused):
    """The master sent an error frame; `body` has all of it (see messages.Failed)."""

    def __init__(self, body: Plain) -> None:
        super().__init__(str(body.get("code", "internal")), str(body.get("reason", "")), hint=str(body.get("hint", "")))
        self.body = body


class PlainLink:
    """Asks the master and follows the frames of its answers; several questions may be open at once."""

    def __init__(self, transport: Transport, user: str) -> None:
        self.transport = transport
        self.user = user
        self._open: dict[str, tuple[str, asyncio.Queue[Got]]] = {}
        self._serial = 0
        # Several commands of one operator may run at once: each hears only its own answers.
        self._inbox = f"{subjects.inbox('cli', user)}{secrets.token_hex(6)}."

    async def start(self) -> None:
        """Hear answers.

        Raises:
            BusUnreachable: not connected.
        """
        self.transport.on_state = self._on_state
        self.transport.on_denied = self._on_denied
        await self.transport.subscribe(f"{self._inbox}>", self._deliver)

    async def ask(
        self,
        kind: str,
        body: Plain,
        *,
        timeout_s: float,
        idle_s: float,
        on_frame: OnPlain | None = None,
        is_sealed: bool = False,
    ) -> Plain:
        """Ask the master and return the body of its final frame.

        `idle_s` bounds the silence between two frames, `timeout_s` the whole. `is_sealed`: the body carries a secret, so it
        travels outside `mcp.>`, which others may watch.

        Raises:
            NobodyListens, BusUnreachable, NotPermitted: nothing was done.
            Declined: the master said no, or failed.
            NoAnswer: silence, or the bus was lost in the middle: it may have been done.
        """
        frame = self._frame(kind, body, is_sealed=is_sealed)
        queue: asyncio.Queue[Got] = asyncio.Queue()
        self._open[frame.reply] = (frame.subject, queue)
        try:
            await self.transport.publish(frame)
            return await self._collect(queue, kind, timeout_s, idle_s, on_frame)
        finally:
            del self._open[frame.reply]

    async def tell(self, kind: str, body: Plain) -> None:
        """Say something whose answer nobody waits for.

        Raises:
            BusUnreachable: not connected.
        """
        await self.transport.publish(self._frame(kind, body))

    async def close(self) -> None:
        """Leave."""
        await self.transport.close()

    def _frame(self, kind: str, body: Plain, *, is_sealed: bool = False) -> Frame:
        self._serial += 1
        subject = subjects.command(self.user, kind)
        if is_sealed:
            subject = "sealed." + subject.partition(".")[2]
        packed: bytes = msgpack.packb(body)
        if len(packed) > MAX_BODY_BYTES:
            raise MalformedMessage(
                f"{kind} is too large for the bus: {len(packed)} bytes, the limit is {MAX_BODY_BYTES}"
            )
        headers = {"Mcp-Kind": f"{kind}/1", "Content-Type": "application/msgpack"}
        return Frame(subject=subject, body=packed, headers=headers, reply=f"{self._inbox}{self._serial}")

    async def _collect(
        self, queue: asyncio.Queue[Got], kind: str, timeout_s: float, idle_s: float, on_frame: OnPlain | None
    ) -> Plain:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            wait_s = min(idle_s, deadline - loop.time())
            try:
                async with asyncio.timeout(max(wait_s, 0)):
                    got = await queue.get()
            except TimeoutError:
                limit = idle_s if wait_s >= idle_s else timeout_s
                raise NoAnswer(
                    f"the master did not answer to {kind} within {limit:g} s: it may have been done"
                ) from None
            if isinstance(got, McpError):
                raise got
            part, what, body = got
            if part == "error":
                raise Declined(body)
            if part not in ("accepted", "progress"):
                return body
            if on_frame:
                on_frame(what, body)

    def _deliver(self, frame: Frame) -> None:
        subject, queue = self._open.get(frame.subject, ("", None))
        if queue is None:
            return  # the answer to something that was only told, or one that comes too late
        if frame.status == "503":
            queue.put_nowait(NobodyListens(f"nobody listens on {subject}: nothing was done"))
            return
        try:
            queue.put_nowait(_opened(frame))
        except ValueError:
            return  # rubbish is no answer: the question goes on, and ends by its own limits

    def _on_state(self, state: LinkState) -> None:
        if state != "connected":
            for _, queue in self._open.values():
                queue.put_nowait(NoAnswer("the bus was lost while waiting for the answer: it may have been done"))

    def _on_denied(self, _verb: str, subject: str) -> None:
        for asked, queue in self._open.values():
            if asked == subject:
                queue.put_nowait(
                    NotPermitted(
                        f"operator {self.user} may not do this ({subject.rpartition('.')[2]}): nothing was sent",
                        subject=subject,
                        hint="Ask for the right on the master's machine: `mcp operator add NAME --role deployer|admin`.",
                    )
                )


def _opened(frame: Frame) -> tuple[str, str, Plain]:
    """Return part, kind and body of an answer.

    Raises:
        ValueError: it is none.
    """
    part = frame.headers.get("Mcp-Frame", "")
    kind = frame.headers.get("Mcp-Kind", "").partition("/")[0]
    body = msgpack.unpackb(frame.body)
    if not isinstance(body, dict) or not kind:
        raise ValueError("no message")
    return part, kind, body


__all__ = ["BusUnreachable", "Declined", "OnPlain", "Plain", "PlainLink"]
