"""Log streams through the master: agents send lines as far as their credit goes, the reader's credit is passed on.

The pure master decides who is asked; the lines themselves never pass through its mailbox.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

import attrs

from mcp.bus.calls import CallFailed
from mcp.bus.links import MasterLink
from mcp.model.catalogue import changed
from mcp.model.effects import FeedStream, OpenStream, Say
from mcp.model.errors import McpError, NobodyListens
from mcp.model.messages import Done, GrantLogCredit, LogLines, StreamLogs, Working
from mcp.model.operator_messages import LogsEnded

log = logging.getLogger(__name__)

STREAM_LIMIT_S = 24 * 3600.0
"""A `logs -f` that was forgotten ends after a day; an agent ends it earlier when no credit comes for a minute."""

ALIVE_S = 2.0
"""How often a reader hears that its stream lives, so that it notices the loss of its master."""

OnSay = Callable[[Say], None]


@attrs.define(kw_only=True)
class _Stream:
    asker: str
    operator: str
    legs: dict[str, asyncio.Task[str]] = attrs.field(factory=dict)


class LogStreams:
    """Every stream that is open, by its id."""

    def __init__(self, link: MasterLink, new_id: Callable[[], str]) -> None:
        self._link = link
        self._new_id = new_id
        self._open: dict[str, _Stream] = {}

    async def open(self, effect: OpenStream, say: OnSay) -> None:
        """Ask every node for its lines and end with a note on how each one ended."""
        name = self._new_id()
        stream = _Stream(asker=effect.asker, operator=effect.operator)
        self._open[name] = stream
        alive = asyncio.ensure_future(self._say_alive(effect.asker, say))
        try:
            async with asyncio.TaskGroup() as group:
                for node, order in effect.legs:
                    stream.legs[node] = group.create_task(self._leg(node, changed(order, stream=name)))
        finally:
            alive.cancel()
            del self._open[name]
        notes = [f"lost {node}" if leg.cancelled() else leg.result() for node, leg in stream.legs.items()]
        say(
            Say(
                asker=effect.asker,
                frame="final",
                message=LogsEnded(notes=tuple(note for note in notes if note)),
            )
        )

    async def _say_alive(self, asker: str, say: OnSay) -> None:
        """Let the reader know that its master lives: followed containers may be silent for days."""
        while True:
            await asyncio.sleep(ALIVE_S)
            say(Say(asker=asker, frame="progress", message=Working()))

    async def _leg(self, node: str, order: StreamLogs) -> str:
        try:
            done = await self._link.order(node, order, op=order.stream, timeout_s=STREAM_LIMIT_S, idle_s=STREAM_LIMIT_S)
        except NobodyListens:
            return f"{node}: nobody listens there: its agent is not running or not connected"
        except CallFailed as error:
            return f"{node}: {error.reason}"
        except McpError as error:
            return f"lost {node}: {error.reason}"
        return done.detail if isinstance(done, Done) else ""

    def lines(self, node: str, message: LogLines, say: OnSay) -> None:
        """Pass lines on to the reader; from a node that was not asked they are dropped."""
        stream = self._open.get(message.stream)
        if stream and node in stream.legs:
            say(Say(asker=stream.asker, frame="progress", message=changed(message, node=node)))

    async def feed(self, effect: FeedStream) -> None:
        """Pass the reader's credit on; only the operator who opened a stream may feed it."""
        stream = self._open.get(effect.stream)
        if stream is None or stream.operator != effect.operator:
            return
        for node in stream.legs:
            order = GrantLogCredit(stream=effect.stream, credit=effect.credit)
            with suppress(McpError):  # the leg itself tells how it ended
                await self._link.order(node, order, op=effect.stream, timeout_s=5.0, idle_s=5.0)

    def node_lost(self, node: str, health: str) -> None:
        """End the legs of a node that went away: a reader must not wait for a silent link."""
        for stream in self._open.values():
            if (task := stream.legs.get(node)) and not task.done():
                log.info("log stream lost its node", extra={"node": node, "health": health})
                task.cancel()
