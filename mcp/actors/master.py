"""The master actor: the thin shell around the pure master. It hears, feeds events in, does effects, brings outcomes back.

The mailbox never waits for the network: orders run as tasks, frames to askers leave through one speaker that keeps their order.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Protocol

import attrs

from mcp.actors.streams import LogStreams
from mcp.bus.calls import CallFailed
from mcp.bus.codec import size_of
from mcp.bus.links import MasterLink, Report, Request
from mcp.bus.transport import MAX_BODY_BYTES
from mcp.model.catalogue import changed
from mcp.model.effects import (
    BusBack,
    CommandReceived,
    Effect,
    Event,
    Expel,
    FeedStream,
    FloodChanged,
    Invite,
    NodeDisconnected,
    NodeEnrolled,
    NodeForgotten,
    OpenStream,
    RegisterReceived,
    ReportReceived,
    Say,
    SendWork,
    Started,
    Tell,
    Tick,
    WorkEnded,
    WorkProgressed,
)
from mcp.model.errors import (
    AdapterError,
    BusError,
    MalformedMessage,
    McpError,
    NoAnswer,
    NobodyListens,
    Refused,
)
from mcp.model.master import Master
from mcp.model.messages import Done, Failed, Join, Joined, LogLines, Register
from mcp.model.operator_messages import FleetStatus, Invited, NodeHealthChanged, OperationList, OperationRow
from mcp.model.ports import Clock, Enrolment, IdSource
from mcp.model.saga import failed_from

log = logging.getLogger(__name__)

TICK_S = 0.25
"""How often the master looks at its clock; every decision of its own is late by at most this."""

MAX_EVENTS = 10_000
"""Events waiting in the mailbox; reports beyond it are dropped (a heartbeat comes again), commands are refused."""


class Disconnects(Protocol):
    """Who tells that a node's connection is gone (the bus's system account)."""

    async def watch(self, on_gone: Callable[[str, str], None]) -> None:
        """Call back with the public key and a reason for each connection that ends."""


@attrs.frozen(kw_only=True)
class Welcome:
    """What a joining node is told besides its name: how to know the bus, and the fleet's settings."""

    ca_pem: str
    tls_name: str
    settings: dict[str, str] = attrs.field(factory=dict)


class MasterActor:
    """Runs one master until its task is cancelled."""

    def __init__(
        self,
        *,
        master: Master,
        link: MasterLink,
        enrolment: Enrolment,
        disconnects: Disconnects | None,
        clock: Clock,
        ids: IdSource,
        welcome: Welcome,
        new_stream_id: Callable[[], str] | None = None,
    ) -> None:
        self.master = master
        self._link = link
        self._enrolment = enrolment
        self._disconnects = disconnects
        self._clock = clock
        self._ids = ids
        self._welcome = welcome
        self._mailbox: asyncio.Queue[Event] = asyncio.Queue(MAX_EVENTS)
        self._outbox: asyncio.Queue[tuple[Request, str, Any]] = asyncio.Queue()
        self._askers: dict[str, Request] = {}
        self._keys: dict[str, str] = {}
        self._serial = 0
        self._tasks: asyncio.TaskGroup
        self._streams = LogStreams(link, new_stream_id or ids.new_id)
        self.dropped = 0
        self.ready = asyncio.Event()

    # -------------------------------------------------------------------- life

    async def run(self) -> None:
        """Take the census and serve until cancelled.

        Raises:
            McpError: the bus cannot be used at all.
        """
        async with asyncio.TaskGroup() as self._tasks:
            nodes = await self._enrolment.nodes()
            self._keys = {node.public_key: node.name for node in nodes}
            self._link.on_flood = self._on_flood
            self._link.on_bus_back = self._on_bus_back
            await self._link.start(self._on_command, self._on_join)
            for node in nodes:
                await self._link.watch(node.name, self._on_report)
            if self._disconnects:
                await self._disconnects.watch(self._on_gone)
            started = Started(nodes=tuple((node.name, node.role) for node in nodes), wall_s=self._clock.wall_s())
            self._mailbox.put_nowait(started)
            self._tasks.create_task(self._speak(), name="speaker")
            self._tasks.create_task(self._beat(), name="ticks")
            self._tasks.create_task(self._sweep(), name="invitations")
            self.ready.set()
            log.info(
                "master started",
                extra={"node": self.master.rules.node, "epoch": self.master.epoch, "nodes": len(nodes)},
            )
            while True:
                self._handle(await self._mailbox.get())

    def _handle(self, event: Event) -> None:
        try:
            effects = self.master.handle(event, now_s=self._clock.monotonic_s(), new_id=self._ids.new_id)
        except Exception:
            # A bug met by one event must not end the control plane; the event is in the log, and who asked is answered.
            log.exception("the master could not handle %s", type(event).__name__)
            effects = []
            asker = getattr(event, "asker", "")
            if asker:
                reason = f"the master failed on {type(event).__name__}: a bug; its log has the details"
                effects = [Say(asker=asker, frame="error", message=Failed(code="internal", reason=reason))]
        for effect in effects:
            try:
                self._do(effect)
            except Exception:
                log.exception("the master could not do %s", type(effect).__name__)  # nor may this end it

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(TICK_S)
            self._post(Tick(wall_s=self._clock.wall_s()))

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(30.0)
            with suppress(McpError):  # tried again in 30 s; an invitation that is over opens nothing
                await self._enrolment.sweep()

    # ----------------------------------------------------------------- hearing

    def _post(self, event: Event) -> bool:
        try:
            self._mailbox.put_nowait(event)
        except asyncio.QueueFull:
            self.dropped += 1
            return False
        return True

    def _ask(self, request: Request) -> str:
        self._serial += 1
        key = f"{request.who}#{self._serial}"
        self._askers[key] = request
        return key

    def _on_command(self, request: Request) -> None:
        key = self._ask(request)
        if not self._post(CommandReceived(asker=key, operator=request.who, message=request.message)):
            self._say(
                Say(
                    asker=key,
                    frame="error",
                    message=Failed(code="busy", reason="the master has too much to do; try again"),
                )
            )

    def _on_report(self, report: Report | Request) -> None:
        message = report.message
        if isinstance(message, LogLines):
            self._streams.lines(report.who, message, self._say)
        elif isinstance(report, Request):
            key = self._ask(report)
            self._post(RegisterReceived(asker=key, node=report.who, message=message))
            if isinstance(message, Register):
                self._spawn(self._settle(report.who))
        else:
            self._post(ReportReceived(node=report.who, message=message))

    def _on_flood(self, node: str, is_flooding: bool) -> None:  # noqa: FBT001 - the link's callback
        self._post(FloodChanged(node=node, is_flooding=is_flooding))

    def _on_bus_back(self) -> None:
        self._post(BusBack())

    def _on_gone(self, public_key: str, reason: str) -> None:
        node = self._keys.get(public_key)
        if node:
            # Whoever it is that comes back, perhaps at once: it goes on with no stream.
            self._streams.node_lost(node, "disconnected")
            self._post(NodeDisconnected(node=node, reason=reason))

    # ----------------------------------------------------------------- effects

    def _do(self, effect: Effect) -> None:
        match effect:
            case Say():
                self._say(effect)
            case SendWork():
                self._spawn(self._order(effect))
            case Tell():
                self._told(effect)
            case Invite():
                self._spawn(self._invite(effect))
            case Expel():
                self._spawn(self._expel(effect))
            case OpenStream():
                self._spawn(self._streams.open(effect, self._say))
            case FeedStream():
                self._spawn(self._feed(effect))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.create_task(self._guarded(work))

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """Do an effect; one that fails must not take the others and the master with it."""
        try:
            await work
        except McpError as error:
            log.warning("an effect failed: %s", error.reason)
        except Exception:
            # A bug met by one effect must not end the control plane, as in _handle.
            log.exception("an effect failed: a bug")

    def _say(self, effect: Say) -> None:
        request = self._askers.get(effect.asker)
        if request is None:
            return
        if effect.frame in ("final", "error"):
            del self._askers[effect.asker]
        for part, is_last in parts_of(effect.message):
            self._outbox.put_nowait((request, effect.frame if is_last else "progress", part))

    async def _speak(self) -> None:
        while True:
            request, frame, message = await self._outbox.get()
            say = {
                "accepted": request.accepted,
                "progress": request.progress,
                "final": request.final,
                "error": request.failed,
            }[frame]
            try:
                await say(message)
            except McpError as error:
                log.warning("cannot answer %s: %s", request.who, error.reason)

    async def _order(self, work: SendWork) -> None:
        """Send an order and post how it ended, whatever happens."""

        def progress(message: Any) -> None:
            self._post(WorkProgressed(call=work.call, message=message))

        try:
            reply = await self._link.order(
                work.node,
                work.message,
                op=work.op,
                timeout_s=work.timeout_s,
                idle_s=work.idle_s,
                on_progress=progress,
            )
            ended = WorkEnded(call=work.call, reply=reply)
        except CallFailed as error:
            ended = WorkEnded(call=work.call, failure=error.failed)
        except NobodyListens:
            reason = f"nobody listens on {work.node}: its agent is not running or not connected"
            ended = WorkEnded(
                call=work.call,
                failure=Failed(code="nobody_listens", reason=reason, hint=f"`mcp node why {work.node}`"),
                certainty="nothing",
                is_nobody=True,
            )
        except NoAnswer as error:
            ended = WorkEnded(call=work.call, failure=failed_from(error), certainty="unknown")
        except McpError as error:
            ended = WorkEnded(call=work.call, failure=failed_from(error), certainty="nothing")
        except Exception:
            # Whoever gave the order must hear of its end, or its service is held for ever.
            log.exception("an order could not be given: a bug")
            reason = f"the master failed to order {type(work.message).__name__}: a bug; its log has the details"
            ended = WorkEnded(call=work.call, failure=Failed(code="internal", reason=reason), certainty="unknown")
        await self._mailbox.put(ended)

    def _told(self, effect: Tell) -> None:
        message = effect.message
        if isinstance(message, NodeHealthChanged):
            log.warning(
                "node health changed",
                extra={
                    "node": message.node,
                    "health": message.health,
                    "was": message.was,
                    "reason": message.reason,
                },
            )
            if message.health in ("unreachable", "unhealthy"):
                self._streams.node_lost(message.node, message.health)
        self._spawn(self._publish(message))

    async def _publish(self, message: Any) -> None:
        with suppress(BusError, MalformedMessage):  # an event is news, not state: who missed it asks
            await self._link.publish(message)

    async def _feed(self, effect: FeedStream) -> None:
        await self._streams.feed(effect)
        self._say(Say(asker=effect.asker, frame="final", message=Done()))

    # --------------------------------------------------------------- enrolment

    async def _invite(self, effect: Invite) -> None:
        try:
            token, valid_s = await self._enrolment.invite(effect.node, effect.role)
        except McpError as error:
            self._say(Say(asker=effect.asker, frame="error", message=failed_from(error)))
            return
        message = Invited(node=effect.node, role=effect.role, token=token, valid_s=valid_s)
        self._say(Say(asker=effect.asker, frame="final", message=message))

    def _on_join(self, request: Request) -> None:
        self._spawn(self._join(request))

    async def _join(self, request: Request) -> None:
        """Turn an invitation into an enrolled node; the invitation's id comes from the subject only."""
        message = request.message
        try:
            if not isinstance(message, Join):
                raise Refused("unknown_message", "only join is heard here")
            enrolled = await self._enrolment.redeem(request.who, message.public_key)
            self._keys[enrolled.public_key] = enrolled.name
            await self._link.watch(enrolled.name, self._on_report)
            self._post(NodeEnrolled(node=enrolled.name, role=enrolled.role))
            await request.final(
                Joined(
                    node=enrolled.name,
                    role=enrolled.role,
                    ca_pem=self._welcome.ca_pem,
                    tls_name=self._welcome.tls_name,
                    master=self.master.rules.node,
                    settings=self._welcome.settings,
                )
            )
            log.info(
                "node joined",
                extra={"node": enrolled.name, "role": enrolled.role, "address": message.address},
            )
        except McpError as error:
            log.warning("join refused: %s", error.reason, extra={"invitation": request.who})
            with suppress(BusError):
                await request.failed(failed_from(error))

    async def _settle(self, node: str) -> None:
        try:
            await self._enrolment.settle(node)
        except AdapterError as error:
            log.warning("cannot remove the used invitation of %s: %s", node, error.reason)

    async def _expel(self, effect: Expel) -> None:
        try:
            await self._enrolment.remove(effect.node)
        except McpError as error:
            self._say(Say(asker=effect.asker, frame="error", message=failed_from(error)))
            return
        await self._link.unwatch(effect.node)
        self._keys = {key: name for key, name in self._keys.items() if name != effect.node}
        self._post(NodeForgotten(node=effect.node))
        self._say(Say(asker=effect.asker, frame="final", message=Done(detail=f"{effect.node} is removed")))
        log.info("node removed", extra={"node": effect.node})


PART_BYTES = MAX_BODY_BYTES // 2


def parts_of(message: Any) -> Iterable[tuple[Any, bool]]:
    """Yield a message in parts that fit the bus, each with whether it is the last; a list of operations is cut."""
    if isinstance(message, OperationList):
        return [(changed(message, operations=_first(message.operations)), True)]
    if not isinstance(message, FleetStatus) or size_of(message) < PART_BYTES:
        return [(message, True)]
    bare = changed(message, services=(), nodes=(), problems=(), operations=())
    parts: list[dict[str, list[Any]]] = [{}]
    size = 0
    for field in ("services", "nodes", "operations", "problems"):
        for row in getattr(message, field):
            weight = size_of(row)
            if weight > PART_BYTES:
                log.warning("a row of the status is too large to be told: %d KiB", weight // 1024)
                continue
            if size + weight > PART_BYTES:
                parts.append({})
                size = 0
            parts[-1].setdefault(field, []).append(row)
            size += weight
    count = len(parts)
    return [
        (changed(bare, part=i, parts=count, **{field: tuple(rows) for field, rows in part.items()}), i == count)
        for i, part in enumerate(parts, 1)
    ]


def _first(rows: tuple[OperationRow, ...]) -> tuple[OperationRow, ...]:
    """Return the first rows, as many as one message takes."""
    size = 0
    for i, row in enumerate(rows):
        size += size_of(row)
        if size > PART_BYTES:
            return rows[:i]
    return rows


__all__ = ["Disconnects", "MasterActor", "Welcome", "parts_of"]
