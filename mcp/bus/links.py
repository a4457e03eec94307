"""What each kind of peer says and hears: the agent's, the master's, the operator's and the newcomer's end of the bus.

Identity comes from subjects only. Time on the wire is the master's clock, which never steps: its wall clock at its start plus
the monotonic seconds since. An agent learns the offset to its own monotonic clock from what the master sends.
"""

from __future__ import annotations

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
from mcp.bus.link_parts import Drops, MasterClock, MasterTime, Tasks
from mcp.bus.transport import Frame, LinkState, Subscription, Transport
from mcp.model.catalogue import Declared, Lane, declared
from mcp.model.errors import BusError, BusUnreachable, MalformedMessage
from mcp.model.messages import Failed, Join, Joined, LogLines, Register, Registered
from mcp.model.ports import Clock
from mcp.model.values import frozen

log = logging.getLogger(__name__)

FLOOD_LIMIT = 50
"""Messages a second of one node beyond which it is not heard for a while (docs/bus.md, traps)."""

FLOOD_BURST = 200
"""Messages a node may send at once before the limit bites: an inventory in parts, a page of log lines."""

FLOOD_REST_S = 5.0

CLOSE_WITHIN_S = 1.0

REFUSALS_KEPT = 64

_SERIALS = 1_000_000


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
        if failed.code == "expired" and not self._is_over:
            self._link.note_expired(self._reply)
        await self._end("error", failed)

    async def _end(self, frame: FrameKind, message: Any) -> None:
        if self._is_over:
            return
        self._is_over = True
        try:
            await self._say(frame, message)
        except MalformedMessage as error:
            await self._say("error", _too_large(self.kind, error))

    async def _say(self, frame: FrameKind, message: Any) -> None:
        with suppress(BusError):  # what was done is in the records; the master asks again
            await self._link.transport.publish(seal(self._reply, message, op=self.op, frame=frame))


def _too_large(kind: str, error: MalformedMessage) -> Failed:
    return Failed(
        code="too_large", reason=f"the answer to {kind} cannot be sent, what it tells has happened: {error.reason}"
    )


class AgentLink:
    """An agent's end: it registers, beats, tells, and hears orders."""

    def __init__(self, transport: Transport, node: str, clock: Clock) -> None:
        self.transport = transport
        self.node = node
        self.clock = clock
        self.on_back: Callable[[], None] = _ignored
        """Called when the bus is back after it was lost."""
        self.on_closed: Callable[[], None] = _ignored
        """Called when the bus will not have us any more."""
        self.epoch = 0
        """The highest epoch heard or remembered: set it from the records before `start`."""
        self._calls = Calls()
        self._drops = Drops("order", clock)
        self._tasks = Tasks()
        self._time = MasterTime()
        self._expired: dict[str, float] = {}
        self._serial = 0
        self._on_order: Callable[[Order], None] = _ignored
        self._was_lost = False

    @property
    def dropped(self) -> Counter[str]:
        """Orders that were not carried out, by why: "malformed", "out of place", "no reply lane", "stale epoch", "expired"."""
        return self._drops.counts

    @property
    def strays(self) -> Counter[str]:
        """Answers that nobody waited for (see Calls)."""
        return self._calls.strays

    async def start(self, on_order: Callable[[Order], None]) -> None:
        """Hear orders from now on; `on_order` only enqueues.

        Raises:
            BusUnreachable: not connected.
        """
        self._on_order = on_order
        self.transport.on_state = self._on_state
        self.transport.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self.transport.subscribe(subjects.work_pattern(self.node), self._hear)
        await self.transport.subscribe(subjects.work_pattern(self.node, is_sealed=True), self._hear)
        await self.transport.subscribe(f"{subjects.inbox('agent', self.node)}>", self._calls.deliver)

    async def register(self, message: Register, *, timeout_s: float) -> Registered:
        """Send a registration and return the master's answer.

        Raises:
            BusError: see Calls.call; CallFailed when the master refuses.
        """
        self._serial += 1
        reply = f"{subjects.inbox('agent', self.node)}register-{self._serial}"
        frame = seal(subjects.register(self.node), message, reply=reply)
        asked_s = self.clock.monotonic_s()
        letter = await self._calls.ask(self.transport, frame, timeout_s=timeout_s, idle_s=timeout_s, expects=Registered)
        answer: Registered = letter.message
        self.epoch = max(self.epoch, answer.epoch)
        if letter.sent_s is not None and answer.epoch == self.epoch:
            self._time.learn(letter.sent_s, answer.epoch, self.clock.monotonic_s(), asked_s)
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

    async def close(self) -> None:
        """Say what is still to be said; the connection stays."""
        await self._tasks.end(CLOSE_WITHIN_S)

    def note_expired(self, reply: str) -> None:
        """Remember that an order was refused as expired: should the master know better, it says what it answers."""
        self._expired[reply] = self.clock.monotonic_s()
        while len(self._expired) > REFUSALS_KEPT:
            del self._expired[next(iter(self._expired))]

    def _hear(self, frame: Frame) -> None:
        try:
            letter = open_frame(frame)
        except MalformedMessage as error:
            self._drops.add("malformed", error.reason)
            return
        kind = declared(type(letter.message))
        if kind.lane is not Lane.WORK or not _is_about(kind, letter.subject):
            self._drops.add("out of place", f"{letter.kind} on {letter.subject!r}")
            return
        if not letter.reply.startswith(subjects.reply(self.node, "")) or not subjects.is_subject(letter.reply):
            # The master asks for answers on this node's own reply lane, and we may publish nowhere else.
            self._drops.add("no reply lane", f"{letter.kind} wants its answer on {letter.reply!r}")
            return
        self._judge(letter)

    def _judge(self, letter: Letter) -> None:
        """Refuse what comes from a deposed master or too late; the rest is for the agent."""
        if letter.epoch < self.epoch:
            self._drops.add("stale epoch", f"{letter.kind} of epoch {letter.epoch}, ours is {self.epoch}")
            order = Order(self, letter, None)
            reason = f"{self.node} obeys a newer master (epoch {self.epoch}, this one is {letter.epoch})"
            self._tasks.start(order.failed(Failed(code="stale_epoch", reason=reason)))
            return
        self.epoch = letter.epoch
        if letter.sent_s is not None:
            asked_s = self._expired.pop(letter.answers, None)
            self._time.learn(letter.sent_s, letter.epoch, self.clock.monotonic_s(), asked_s)
        order = Order(self, letter, self._time.here(letter.deadline_s))
        if order.is_expired:
            self._drops.add("expired", letter.kind)
            reason = f"{letter.kind} came to {self.node} after its deadline: nothing was done"
            self._tasks.start(order.failed(Failed(code="expired", reason=reason)))
            return
        self._on_order(order)


def _refuse_out_of_place(letter: Letter, lane: Lane) -> None:
    """Refuse a command that is not what its subject says: a viewer may publish on mcp.cmd.<viewer>.get_status only."""
    kind = declared(type(letter.message))
    if kind.lane is not lane or (lane is Lane.COMMAND and not _is_about(kind, letter.subject)):
        raise MalformedMessage(f"{letter.kind} does not belong on {letter.subject}")


def _is_about(kind: Declared, subject: str) -> bool:
    """Say whether a message is what its subject says: permissions are about subjects, not about bodies."""
    return subject.rpartition(".")[2] == kind.kind


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
        try:
            await self._say(frame, message)
        except MalformedMessage as error:
            await self._say("error", _too_large(self.kind, error))
        self.is_open = False

    async def _say(self, frame: FrameKind, message: Any) -> None:
        if self.is_open:
            await self._link.answer(self._reply, message, op=self.op, frame=frame)


@frozen(kw_only=True)
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
    """The master's end: one connection hears and orders, the other may only answer (docs/bus.md, the confused deputy)."""

    def __init__(
        self, hearing: Transport, answering: Transport, clock: Clock, epoch: int, *, flood_limit: int = FLOOD_LIMIT
    ) -> None:
        self.hearing = hearing
        self.answering = answering
        self.epoch = epoch
        self.on_flood: Callable[[str, bool], None] = _ignored
        """Called with a node and whether it floods (True) or may speak again (False)."""
        self.on_bus_back: Callable[[], None] = _ignored
        self.on_closed: Callable[[], None] = _ignored
        """Called when the bus will not have one of the two connections any more."""
        self._drops = Drops("message", clock)
        self._tasks = Tasks()
        self._clock = clock
        self._time = MasterClock(clock)
        self._flood_limit = flood_limit
        self._calls = Calls()
        self._nodes: dict[str, _Watched] = {}
        self._commands: dict[str, deque[float]] = {}
        """When each operator asked last; the bus lets nobody speak under another name, so these are few."""
        self._serial = 0
        self._was_lost = False
        self._on_command: Callable[[Request], None] = _ignored
        self._on_join: Callable[[Request], None] = _ignored

    @property
    def dropped(self) -> Counter[str]:
        """What was not let through, by why and whose: "malformed from orion", "out of place from kyle"."""
        return self._drops.counts

    @property
    def strays(self) -> Counter[str]:
        """Answers that nobody waited for (see Calls)."""
        return self._calls.strays

    async def start(self, on_command: Callable[[Request], None], on_join: Callable[[Request], None]) -> None:
        """Hear operators and newcomers.

        Raises:
            BusUnreachable: not connected.
        """
        self._on_command, self._on_join = on_command, on_join
        self.hearing.on_state = self._on_state
        self.answering.on_state = self._on_answering
        self.hearing.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self.hearing.subscribe("mcp.cmd.>", self._hear_command)
        await self.hearing.subscribe("sealed.cmd.>", self._hear_command)
        await self.hearing.subscribe("mcp.join.*", self._hear_join)

    async def watch(self, node: str, on_report: Callable[[Report | Request], None]) -> None:
        """Hear one enrolled node; watched already is fine.

        Raises:
            BusUnreachable: not connected; it is not watched.
        """
        if node in self._nodes:
            return
        watched = self._nodes[node] = _Watched(None, on_report)
        try:
            await self._subscribe(node, watched)
        except BusUnreachable:
            del self._nodes[node]
            raise

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
        is_sealed: bool = False,
    ) -> Any:
        """Give an agent an order and return the message of its final frame (see Calls.call for what is raised).

        `is_sealed`: the body carries a secret, so it travels outside `mcp.>`, which others may watch.
        """
        deadline_s = self._time.now_s() + timeout_s
        draft = _Draft(node=node, message=message, op=op, deadline_s=deadline_s, is_sealed=is_sealed)
        pass_on: OnLetter | None = (lambda letter: on_progress(letter.message)) if on_progress else None
        frame = self._write(draft)
        try:
            return await self._send(frame, draft, timeout_s, idle_s, pass_on)
        except CallFailed as error:
            left_s = deadline_s - self._time.now_s()
            if error.code != "expired" or left_s <= 0:
                raise
        # It cannot have come too late, for its answer did not: our clock and the agent's have moved apart, and this tells it.
        log.info("an order was refused as late and was not: sent again", extra={"node": node, "op": op})
        again = self._write(draft, answers=frame.reply)
        return await self._send(again, draft, left_s, idle_s, pass_on)

    def _write(self, draft: _Draft, answers: str = "") -> Frame:
        self._serial += 1
        serial = f"{self.epoch % 100_000}-{self._serial}"
        return seal(
            subjects.work(draft.node, declared(type(draft.message)).kind, is_sealed=draft.is_sealed),
            draft.message,
            op=draft.op,
            reply=subjects.reply(draft.node, f"{draft.op}-{serial}"),
            sent_s=self._time.now_s(),
            deadline_s=draft.deadline_s,
            epoch=self.epoch,
            answers=answers,
        )

    async def _send(
        self, frame: Frame, draft: _Draft, timeout_s: float, idle_s: float, on_frame: OnLetter | None
    ) -> Any:
        return await self._calls.call(
            self.hearing,
            frame,
            timeout_s=timeout_s,
            idle_s=idle_s,
            expects=declared(type(draft.message)).reply,
            on_frame=on_frame,
        )

    async def publish(self, message: Any) -> None:
        """Tell everybody.

        Raises:
            BusUnreachable: not connected.
        """
        await self.hearing.publish(seal(subjects.event(declared(type(message)).kind), message))

    async def answer(self, reply: str, message: Any, *, op: str = "", frame: FrameKind = "final") -> None:
        """Say something to whoever asked; Request is what checks that it may go there.

        Raises:
            BusUnreachable: not connected.
        """
        sealed = seal(reply, message, op=op, frame=frame, sent_s=self._time.now_s(), epoch=self.epoch)
        await self.answering.publish(sealed)

    async def close(self) -> None:
        """Say what is still to be said; the connections stay."""
        for node in list(self._nodes):
            await self.unwatch(node)
        await self._tasks.end(CLOSE_WITHIN_S)

    # ------------------------------------------------------------------ hearing

    async def _subscribe(self, node: str, watched: _Watched) -> None:
        watched.subscription = await self.hearing.subscribe(
            subjects.node_pattern(node), lambda frame: self._hear_node(node, watched, frame)
        )
        if self._nodes.get(node) is not watched:  # removed while we asked
            await watched.subscription.close()

    def _hear_command(self, frame: Frame) -> None:
        # Before anything is decoded: one operator's runaway script must not keep the others from being heard.
        if (who := subjects.speaker(frame.subject)) and self._asks_too_often(who[1]):
            self._drops.add(f"too many from {who[1]}", f"more than {self._flood_limit} a second")
            return
        if request := self._open(frame, "cli", Lane.COMMAND):
            self._on_command(request)

    def _asks_too_often(self, operator: str) -> bool:
        now_s = self._clock.monotonic_s()
        recent = self._commands.setdefault(operator, deque(maxlen=FLOOD_BURST))
        if len(recent) == FLOOD_BURST and now_s - recent[0] < FLOOD_BURST / self._flood_limit:
            return True
        recent.append(now_s)
        return False

    def _hear_join(self, frame: Frame) -> None:
        if request := self._open(frame, "join", Lane.JOIN):
            self._on_join(request)

    def _open(self, frame: Frame, role: str, lane: Lane) -> Request | None:
        """Decode what an operator or a newcomer sent; rubbish is answered, for a person waits."""
        who = subjects.speaker(frame.subject)
        if who is None or who[0] != role:
            self._drops.add("from nobody", f"on {frame.subject!r}")
            return None
        try:
            letter = open_frame(frame)
            _refuse_out_of_place(letter, lane)
        except MalformedMessage as error:
            self._drops.add(f"malformed from {who[1]}", error.reason)
            self._tasks.start(self._answer_rubbish(frame, error))
            return None
        return Request(self, letter, who[1])

    async def _answer_rubbish(self, frame: Frame, error: MalformedMessage) -> None:
        if not subjects.may_answer(frame.subject, frame.reply):
            return
        failed = Failed(
            code="malformed_message",
            reason=f"the master cannot read this command: {error.reason}",
            hint="The CLI may be newer than the master: compare `mcp --version` with `mcp node list`.",
        )
        with suppress(BusError):
            await self.answer(frame.reply, failed, frame="error")

    def _hear_node(self, node: str, watched: _Watched, frame: Frame) -> None:
        if self._floods(node, watched):
            return
        if subjects.speaker(frame.subject) != ("agent", node):
            self._drops.add(f"out of place from {node}", f"on {frame.subject!r}")
            return
        lane, *rest = frame.subject.split(".")[3:]
        if lane == "reply":
            self._calls.deliver(frame)
            return
        try:
            letter = open_frame(frame)
        except MalformedMessage as error:
            self._drops.add(f"malformed from {node}", error.reason)
            return
        if not _belongs(letter.message, node, lane, rest):
            self._drops.add(f"out of place from {node}", f"{letter.kind} on {frame.subject!r}")
        elif lane == "register":
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
        log.warning(
            "node floods the bus and is muted", extra={"node": node, "limit": self._flood_limit, "rest_s": FLOOD_REST_S}
        )
        self.on_flood(node, True)
        self._tasks.start(self._mute(node, watched))
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

    def _on_state(self, state: LinkState) -> None:
        if state in ("lost", "closed"):
            self._was_lost = True
            self._calls.lost()
            if state == "closed":
                self.on_closed()
        elif self._was_lost:
            self._was_lost = False
            self.on_bus_back()

    def _on_answering(self, state: LinkState) -> None:
        if state == "closed":
            self.on_closed()


@frozen(kw_only=True)
class _Draft:
    """An order that is to be sent, perhaps twice."""

    node: str
    message: Any
    op: str
    deadline_s: float
    is_sealed: bool


_LANES = {
    "register": Lane.REGISTER,
    "heartbeat": Lane.HEARTBEAT,
    "event": Lane.NODE_EVENT,
    "log": Lane.LOG,
}


def _belongs(message: Any, node: str, lane: str, rest: list[str]) -> bool:
    """Say whether a node may say this there, in its own name."""
    kind = declared(type(message))
    told = {Lane.NODE_EVENT: kind.kind, Lane.LOG: getattr(message, "stream", "")}.get(kind.lane)
    return (
        kind.lane is _LANES.get(lane)
        and rest == ([] if told is None else [told])
        and getattr(message, "node", node) in ("", node)
    )


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
        self,
        message: Any,
        *,
        timeout_s: float,
        idle_s: float,
        on_frame: OnLetter | None = None,
        op: str = "",
        is_sealed: bool = False,
    ) -> Any:
        """Ask the master and return the message of its final frame (see Calls.call for what is raised).

        `is_sealed`: the body carries a secret, so it travels outside `mcp.>`, which others may watch.
        """
        frame = self._seal(message, op=op, is_sealed=is_sealed)
        expects = declared(type(message)).reply
        return await self._calls.call(
            self.transport, frame, timeout_s=timeout_s, idle_s=idle_s, expects=expects, on_frame=on_frame
        )

    async def tell(self, message: Any) -> None:
        """Ask for something whose answer nobody waits for.

        Raises:
            BusUnreachable: not connected.
        """
        await self.transport.publish(self._seal(message))

    async def close(self) -> None:
        """Leave."""
        await self.transport.close()

    def _seal(self, message: Any, *, op: str = "", is_sealed: bool = False) -> Frame:
        self._serial += 1
        subject = subjects.command(self.user, declared(type(message)).kind, is_sealed=is_sealed)
        return seal(subject, message, op=op, reply=f"{self._inbox}{self._serial}")

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
        self._transport.on_state = lambda state: None if state == "connected" else self._calls.lost()
        self._transport.on_denied = lambda verb, subject: self._calls.denied(subject)
        await self._transport.subscribe(f"{prefix}>", self._calls.deliver)
        frame = seal(subjects.join(self._invitation), message, reply=f"{prefix}1")
        answer: Joined = await self._calls.call(
            self._transport, frame, timeout_s=timeout_s, idle_s=timeout_s, expects=Joined
        )
        return answer


__all__ = [
    "AgentLink",
    "CallFailed",
    "JoinLink",
    "MasterClock",
    "MasterLink",
    "OperatorLink",
    "Order",
    "Report",
    "Request",
]
