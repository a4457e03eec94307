"""What each kind of peer says and hears: the agent's, the master's, the operator's and the newcomer's end of the bus.

Identity comes from subjects only. Time on the wire is the master's clock, which never steps: its wall clock at its start plus
the monotonic seconds since. An agent learns the offset to its own monotonic clock from what the master sends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import attrs

from mcp.bus import subjects
from mcp.bus.calls import CallFailed, Calls, OnLetter
from mcp.bus.codec import FrameKind, Letter, open_frame, seal
from mcp.bus.transport import Frame, LinkState, Subscription, Transport
from mcp.model.catalogue import Lane, declared
from mcp.model.errors import BusError, BusUnreachable, MalformedMessage, McpError
from mcp.model.messages import Failed, Join, Joined, LogLines, Register, Registered
from mcp.model.ports import Clock

log = logging.getLogger(__name__)

FLOOD_LIMIT = 50
"""Messages a second of one node beyond which it is not heard for a while (BUS.md, traps)."""

FLOOD_BURST = 200
"""Messages a node may send at once before the limit bites: an inventory in parts, a page of log lines."""

FLOOD_REST_S = 5.0

_SERIALS = 1_000_000


class MasterClock:
    """Seconds since 1970 that never step: what Mcp-Sent and Mcp-Deadline are measured in."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s = clock.wall_s() - clock.monotonic_s()

    def now_s(self) -> float:
        """Return the master's time."""
        return self._clock.monotonic_s() + self._offset_s


def _ignored(*_: Any) -> None:
    """Nobody wants to know."""


# ----------------------------------------------------------------------- agents


class Order:
    """One order of the master in an agent's hands; the first end that is said counts."""

    def __init__(self, link: AgentLink, letter: Letter, deadline_s: float | None) -> None:
        self.message = letter.message
        self.kind = letter.kind
        self.op = letter.op
        self.epoch = letter.epoch
        self.deadline_s = deadline_s
        """In this agent's own monotonic seconds; None: no deadline."""
        self.call = letter.reply.rpartition(".")[2]
        self._link = link
        self._reply = letter.reply
        self._is_over = False

    @property
    def is_expired(self) -> bool:
        """Whether whoever asked has given up by now."""
        return self.deadline_s is not None and self._link.clock.monotonic_s() > self.deadline_s

    async def progress(self, message: Any) -> None:
        """Say how far it is; a lost link drops it."""
        if not self._is_over:
            await self._say("progress", message)

    async def final(self, message: Any) -> None:
        """Say how it ended."""
        await self._end("final", message)

    async def failed(self, failed: Failed) -> None:
        """Say that it failed, and why."""
        await self._end("error", failed)

    async def _end(self, frame: FrameKind, message: Any) -> None:
        if not self._is_over:
            self._is_over = True
            await self._say(frame, message)

    async def _say(self, frame: FrameKind, message: Any) -> None:
        with suppress(BusError):  # what was done is in the records; the master asks again
            await self._link.transport.publish(seal(self._reply, message, op=self.op, frame=frame))


class AgentLink:
    """An agent's end: it registers, beats, tells, and hears orders."""

    def __init__(self, transport: Transport, node: str, clock: Clock) -> None:
        self.transport = transport
        self.node = node
        self.clock = clock
        self.dropped: Counter[str] = Counter()
        """Orders that were not carried out, by why."""
        self.on_back: Callable[[], None] = _ignored
        """Called when the bus is back after it was lost."""
        self.on_closed: Callable[[], None] = _ignored
        """Called when the bus will not have us any more."""
        self.epoch = 0
        """The highest epoch heard or remembered: set it from the records before `start`."""
        self._calls = Calls()
        self._offset_s: float | None = None
        self._offset_epoch = 0
        self._serial = 0
        self._on_order: Callable[[Order], None] = _ignored
        self._was_lost = False

    async def start(self, on_order: Callable[[Order], None]) -> None:
        """Hear orders from now on; `on_order` only enqueues.

        Raises:
            BusUnreachable: not connected.
        """
        self._on_order = on_order
        self.transport.on_state = self._on_state
        self.transport.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self.transport.subscribe(subjects.work_pattern(self.node), self._hear)
        await self.transport.subscribe(f"sealed.work.{self.node}.>", self._hear)
        await self.transport.subscribe(f"{subjects.inbox('agent', self.node)}>", self._calls.deliver)

    async def register(self, message: Register, *, timeout_s: float) -> Registered:
        """Send a registration and return the master's answer.

        Raises:
            BusError: see Calls.call; CallFailed when the master refuses.
        """
        self._serial += 1
        reply = f"{subjects.inbox('agent', self.node)}register-{self._serial}"
        frame = seal(subjects.register(self.node), message, reply=reply)
        answer = await self._calls.call(self.transport, frame, timeout_s=timeout_s, idle_s=timeout_s)
        if not isinstance(answer, Registered):
            raise MalformedMessage(f"expected registered, got {type(answer).__name__}")
        self.epoch = max(self.epoch, answer.epoch)
        return answer

    async def heartbeat(self, message: Any) -> None:
        """Beat.

        Raises:
            BusUnreachable: not connected; a heartbeat that is not sent is not kept.
        """
        await self.transport.publish(seal(subjects.heartbeat(self.node), message))

    async def event(self, message: Any) -> None:
        """Tell what happened here.

        Raises:
            BusUnreachable: not connected; the master will see it in the inventory.
        """
        self._serial = (self._serial + 1) % _SERIALS
        kind = declared(type(message)).kind
        message_id = f"{self.node}-{getattr(message, 'incarnation', '')}-{self._serial}"
        await self.transport.publish(seal(subjects.node_event(self.node, kind), message, message_id=message_id))

    async def log(self, message: LogLines) -> None:
        """Send lines of a log stream.

        Raises:
            BusUnreachable: not connected.
        """
        await self.transport.publish(seal(subjects.log(self.node, message.stream), message))

    def _on_state(self, state: LinkState) -> None:
        if state == "lost":
            self._was_lost = True
            self._calls.lost()
        elif state == "closed":
            self._calls.lost()
            self.on_closed()
        elif self._was_lost:
            self._was_lost = False
            self.on_back()

    def _hear(self, frame: Frame) -> None:
        try:
            letter = open_frame(frame)
        except MalformedMessage as error:
            self._drop(f"malformed: {error.reason}")
            return
        if not letter.reply.startswith(f"mcp.node.{self.node}.reply."):
            # The master asks for answers on this node's own reply lane, and we may publish nowhere else.
            self._drop("no reply lane")
            return
        order = Order(self, letter, self._own_deadline(letter))
        if letter.epoch < self.epoch:
            self._drop("stale epoch")
            self._refuse(order, "stale_epoch", f"{self.node} obeys a newer master (epoch {self.epoch}, this one is {letter.epoch})")
            return
        self.epoch = letter.epoch
        if order.is_expired:
            self._drop("expired")
            self._refuse(order, "expired", f"{letter.kind} came to {self.node} after its deadline: nothing was done")
            return
        self._on_order(order)

    def _own_deadline(self, letter: Letter) -> float | None:
        """Translate a deadline into this agent's monotonic clock.

        The smallest difference ever seen between an order's time of sending and its arrival is the offset of the clocks
        plus the shortest way; what lies above it was under way (or unread here) for that long. So a clock that steps on
        this node changes nothing, and what a frozen agent reads late counts as late.
        """
        if letter.sent_s is None:
            return None
        seen_s = self.clock.monotonic_s() - letter.sent_s
        if self._offset_s is None or letter.epoch != self._offset_epoch:
            self._offset_s, self._offset_epoch = seen_s, letter.epoch
        self._offset_s = min(self._offset_s, seen_s)
        return None if letter.deadline_s is None else letter.deadline_s + self._offset_s

    def _drop(self, why: str) -> None:
        self.dropped[why] += 1
        if self.dropped[why] in (1, 10, 100) or self.dropped[why] % 1000 == 0:
            log.warning("order dropped: %s (%d so far)", why, self.dropped[why])

    def _refuse(self, order: Order, code: str, reason: str) -> None:
        task = asyncio.ensure_future(order.failed(Failed(code=code, reason=reason)))
        _KEPT.add(task)
        task.add_done_callback(_KEPT.discard)


_KEPT: set[asyncio.Future[Any]] = set()
"""The loop keeps only weak references to its tasks."""


# ----------------------------------------------------------------------- master


class Request:
    """What somebody asked of the master, with the slot for the answers."""

    def __init__(self, link: MasterLink, letter: Letter, who: str) -> None:
        self.message = letter.message
        self.kind = letter.kind
        self.op = letter.op
        self.who = who
        """The operator, the node or the invitation: from the subject only."""
        self.is_open = subjects.may_answer(letter.subject, letter.reply)
        """Whether there is somewhere the answer may go."""
        self._link = link
        self._reply = letter.reply

    async def accepted(self, message: Any) -> None:
        """Say that it was taken on."""
        await self._say("accepted", message)

    async def progress(self, message: Any) -> None:
        """Say how far it is."""
        await self._say("progress", message)

    async def final(self, message: Any) -> None:
        """Say how it ended."""
        await self._end("final", message)

    async def failed(self, failed: Failed) -> None:
        """Say no, or that it failed."""
        await self._end("error", failed)

    async def _end(self, frame: FrameKind, message: Any) -> None:
        await self._say(frame, message)
        self.is_open = False

    async def _say(self, frame: FrameKind, message: Any) -> None:
        if self.is_open:
            await self._link.answering.publish(seal(self._reply, message, op=self.op, frame=frame))


@attrs.frozen(kw_only=True)
class Report:
    """What a node told: a heartbeat, an event, lines of a log."""

    who: str
    message: Any
    kind: str


@attrs.define
class _Watched:
    subscription: Subscription | None
    on_report: Callable[[Report | Request], None]
    recent: deque[float] = attrs.field(factory=lambda: deque(maxlen=FLOOD_BURST))
    is_muted: bool = False


class MasterLink:
    """The master's end: one connection hears and orders, the other may only answer (BUS.md, the confused deputy)."""

    def __init__(
        self, hearing: Transport, answering: Transport, clock: Clock, epoch: int, *, flood_limit: int = FLOOD_LIMIT
    ) -> None:
        self.hearing = hearing
        self.answering = answering
        self.epoch = epoch
        self.on_flood: Callable[[str, bool], None] = _ignored
        """Called with a node and whether it floods (True) or may speak again (False)."""
        self.on_bus_back: Callable[[], None] = _ignored
        self.dropped: Counter[str] = Counter()
        self._clock = clock
        self._time = MasterClock(clock)
        self._flood_limit = flood_limit
        self._calls = Calls()
        self._nodes: dict[str, _Watched] = {}
        self._serial = 0
        self._was_lost = False
        self._on_command: Callable[[Request], None] = _ignored
        self._on_join: Callable[[Request], None] = _ignored

    async def start(self, on_command: Callable[[Request], None], on_join: Callable[[Request], None]) -> None:
        """Hear operators and newcomers.

        Raises:
            BusUnreachable: not connected.
        """
        self._on_command, self._on_join = on_command, on_join
        self.hearing.on_state = self._on_state
        self.hearing.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self.hearing.subscribe("mcp.cmd.>", self._hear_command)
        await self.hearing.subscribe("sealed.cmd.>", self._hear_command)
        await self.hearing.subscribe("mcp.join.*", self._hear_join)

    async def watch(self, node: str, on_report: Callable[[Report | Request], None]) -> None:
        """Hear one enrolled node; watched already is fine."""
        if node not in self._nodes:
            watched = self._nodes[node] = _Watched(None, on_report)
            await self._subscribe(node, watched)

    async def unwatch(self, node: str) -> None:
        """Hear a node no more."""
        watched = self._nodes.pop(node, None)
        if watched and watched.subscription:
            await watched.subscription.close()

    async def order(
        self,
        node: str,
        message: Any,
        *,
        op: str,
        timeout_s: float,
        idle_s: float,
        on_progress: Callable[[Any], None] | None = None,
    ) -> Any:
        """Give an agent an order and return the message of its final frame (see Calls.call for what is raised)."""
        self._serial += 1
        entry = declared(type(message))
        sent_s = self._time.now_s()
        frame = seal(
            subjects.work(node, entry.kind),
            message,
            op=op,
            reply=subjects.reply(node, f"{op}-{self.epoch % 100_000}-{self._serial}"),
            sent_s=sent_s,
            deadline_s=sent_s + timeout_s,
            epoch=self.epoch,
        )
        pass_on: OnLetter | None = (lambda letter: on_progress(letter.message)) if on_progress else None
        return await self._calls.call(self.hearing, frame, timeout_s=timeout_s, idle_s=idle_s, on_frame=pass_on)

    async def publish(self, message: Any) -> None:
        """Tell everybody.

        Raises:
            BusUnreachable: not connected.
        """
        await self.hearing.publish(seal(subjects.event(declared(type(message)).kind), message))

    # ------------------------------------------------------------------ hearing

    async def _subscribe(self, node: str, watched: _Watched) -> None:
        watched.subscription = await self.hearing.subscribe(
            subjects.node_pattern(node), lambda frame: self._hear_node(node, watched, frame)
        )

    def _hear_command(self, frame: Frame) -> None:
        who = subjects.speaker(frame.subject)
        letter = self._open(frame, Lane.COMMAND)
        if letter and who and who[0] == "cli":
            self._on_command(Request(self, letter, who[1]))

    def _hear_join(self, frame: Frame) -> None:
        who = subjects.speaker(frame.subject)
        letter = self._open(frame, Lane.JOIN)
        if letter and who and who[0] == "join":
            self._on_join(Request(self, letter, who[1]))

    def _open(self, frame: Frame, lane: Lane) -> Letter | None:
        """Decode what an operator or a newcomer sent; rubbish is answered, for a person waits."""
        try:
            letter = open_frame(frame)
            if declared(type(letter.message)).lane is not lane:
                raise MalformedMessage(f"{letter.kind} does not belong here")
        except MalformedMessage as error:
            self._drop(f"malformed on {frame.subject}: {error.reason}")
            self._answer_rubbish(frame, error)
            return None
        return letter

    def _answer_rubbish(self, frame: Frame, error: McpError) -> None:
        if not subjects.may_answer(frame.subject, frame.reply):
            return
        failed = Failed(
            code="malformed_message",
            reason=f"the master cannot read this command: {error.reason}",
            hint="The CLI may be newer than the master: compare `mcp --version` with `mcp node list`.",
        )
        answer = seal(frame.reply, failed, frame="error")

        async def send() -> None:
            with suppress(BusError):
                await self.answering.publish(answer)

        task = asyncio.ensure_future(send())
        _KEPT.add(task)
        task.add_done_callback(_KEPT.discard)

    def _hear_node(self, node: str, watched: _Watched, frame: Frame) -> None:
        if self._floods(node, watched):
            return
        tokens = frame.subject.split(".")
        lane = tokens[3]
        if lane == "reply":
            self._calls.deliver(frame)
            return
        try:
            letter = open_frame(frame)
        except MalformedMessage as error:
            self._drop(f"malformed from {node}: {error.reason}")
            return
        expected = {
            "register": Lane.REGISTER,
            "heartbeat": Lane.HEARTBEAT,
            "event": Lane.NODE_EVENT,
            "log": Lane.LOG,
        }.get(lane)
        if declared(type(letter.message)).lane is not expected or (lane == "log" and letter.message.stream != tokens[-1]):
            self._drop(f"{letter.kind} from {node} on lane {lane}")
            return
        if lane == "register":
            watched.on_report(Request(self, letter, node))
        else:
            watched.on_report(Report(who=node, message=letter.message, kind=letter.kind))

    def _floods(self, node: str, watched: _Watched) -> bool:
        """Count a message; beyond the limit the node's subscription goes for a while, so that the others are heard."""
        if watched.is_muted:
            return True
        now_s = self._clock.monotonic_s()
        recent = watched.recent
        recent.append(now_s)
        if len(recent) < FLOOD_BURST or now_s - recent[0] >= FLOOD_BURST / self._flood_limit:
            return False
        watched.is_muted = True
        recent.clear()
        log.warning("node floods the bus and is muted", extra={"node": node, "limit": self._flood_limit, "rest_s": FLOOD_REST_S})
        self.on_flood(node, True)
        task = asyncio.ensure_future(self._mute(node, watched))
        _KEPT.add(task)
        task.add_done_callback(_KEPT.discard)
        return True

    async def _mute(self, node: str, watched: _Watched) -> None:
        subscription, watched.subscription = watched.subscription, None
        if subscription:
            await subscription.close()
        await self._clock.sleep(FLOOD_REST_S)
        while self._nodes.get(node) is watched:
            try:
                await self._subscribe(node, watched)
            except BusUnreachable:
                await self._clock.sleep(FLOOD_REST_S)
                continue
            watched.is_muted = False
            self.on_flood(node, False)
            return

    def _drop(self, why: str) -> None:
        self.dropped[why] += 1
        if self.dropped[why] in (1, 10, 100) or self.dropped[why] % 1000 == 0:
            log.warning("message dropped: %s (%d so far)", why, self.dropped[why])

    def _on_state(self, state: LinkState) -> None:
        if state in ("lost", "closed"):
            self._was_lost = True
            self._calls.lost()
        elif self._was_lost:
            self._was_lost = False
            self.on_bus_back()


# ------------------------------------------------------- operators and newcomers


class OperatorLink:
    """A command's end: it asks, follows the frames, and leaves."""

    def __init__(self, transport: Transport, user: str) -> None:
        self.transport = transport
        self.user = user
        self._calls = Calls()
        self._serial = 0
        # Several commands of one operator may run at once: each hears only its own answers.
        self._inbox = f"{subjects.inbox('cli', user)}{secrets.token_hex(6)}."

    async def start(self) -> None:
        """Hear answers.

        Raises:
            BusUnreachable: not connected.
        """
        self.transport.on_state = self._on_state
        self.transport.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self.transport.subscribe(f"{self._inbox}>", self._calls.deliver)

    async def call(
        self, message: Any, *, timeout_s: float, idle_s: float, on_frame: OnLetter | None = None
    ) -> Any:
        """Ask the master and return the message of its final frame (see Calls.call for what is raised)."""
        frame = self._seal(message, reply=self._reply())
        return await self._calls.call(self.transport, frame, timeout_s=timeout_s, idle_s=idle_s, on_frame=on_frame)

    async def tell(self, message: Any) -> None:
        """Ask for something whose answer nobody waits for.

        Raises:
            BusUnreachable: not connected.
        """
        await self.transport.publish(self._seal(message, reply=self._reply()))

    async def close(self) -> None:
        """Leave."""
        await self.transport.close()

    def _reply(self) -> str:
        self._serial += 1
        return f"{self._inbox}{self._serial}"

    def _seal(self, message: Any, *, reply: str) -> Frame:
        return seal(subjects.command(self.user, declared(type(message)).kind), message, reply=reply)

    def _on_state(self, state: LinkState) -> None:
        if state != "connected":
            self._calls.lost()


class JoinLink:
    """A newcomer's end: it may say one thing, once."""

    def __init__(self, transport: Transport, invitation: str) -> None:
        self._transport = transport
        self._invitation = invitation
        self._calls = Calls()

    async def join(self, message: Join, *, timeout_s: float) -> Joined:
        """Show the node's key and return the master's welcome.

        Raises:
            BusError: see Calls.call; CallFailed when the master refuses.
        """
        prefix = subjects.inbox("join", self._invitation)
        self._transport.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self._transport.subscribe(f"{prefix}>", self._calls.deliver)
        frame = seal(subjects.join(self._invitation), message, reply=f"{prefix}1")
        answer = await self._calls.call(self._transport, frame, timeout_s=timeout_s, idle_s=timeout_s)
        if not isinstance(answer, Joined):
            raise MalformedMessage(f"expected joined, got {type(answer).__name__}")
        return answer


__all__ = ["AgentLink", "CallFailed", "JoinLink", "MasterClock", "MasterLink", "OperatorLink", "Order", "Report", "Request"]
