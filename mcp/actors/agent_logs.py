"""Log streams at the agent: the lines of all containers of a service, merged by time, as far as the reader's credit goes."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator

import attrs

from mcp.actors.actor import Alarm
from mcp.actors.node_state import NodeState
from mcp.bus.links import AgentLink
from mcp.model.errors import AdapterError, BusError, Refused
from mcp.model.messages import ContainerState, Done, LogLine, LogLines, StreamLogs
from mcp.model.workload import short

LINES_AT_ONCE = 200
BYTES_AT_ONCE = 48 * 1024
LINE_BYTES = 16 * 1024
"""Of a longer line the rest is cut off: one line must never fill a message."""

LINE_OVERHEAD_BYTES = 200
"""What a line costs besides its text: time, names, keys."""

FLUSH_S = 0.1
"""A line is under way this soon, however few there are."""

PATIENCE_S = 0.05
"""How long the lines of one container wait for older ones of another that is followed."""

NO_CREDIT_S = 60.0
"""A reader that gave no credit for so long is gone."""

MAX_STREAMS = 32
LINES_AHEAD = 400
"""Lines read ahead of each container; then the engine waits, and costs nobody memory."""


@attrs.define(eq=False)
class _Source:
    """One container's lines on their way."""

    container: ContainerState
    lines: deque[LogLine] = attrs.field(factory=deque)
    is_over: bool = False
    note: str = ""
    quiet_since_s: float = 0.0
    room: asyncio.Event = attrs.field(factory=asyncio.Event)


@attrs.define(eq=False)
class _Stream:
    """One reader and its credit."""

    order: StreamLogs
    credit: int
    alarm: Alarm = attrs.field(factory=Alarm)
    is_ended: bool = False
    sequence: int = 0


class LogSender:
    """Every log stream that this agent has open."""

    def __init__(self, node: NodeState, link: AgentLink) -> None:
        self._node = node
        self._link = link
        self._streams: dict[str, _Stream] = {}

    def grant(self, name: str, credit: int) -> bool:
        """Allow so many more messages of a stream (0 ends it); False when there is no such stream."""
        stream = self._streams.get(name)
        if stream is None:
            return False
        stream.credit += max(0, min(credit, 10_000))
        stream.is_ended = stream.is_ended or credit <= 0
        stream.alarm.ring()
        return True

    async def send(self, order: StreamLogs) -> Done:
        """Send the lines of a service's containers; the answer says how each container ended.

        Raises:
            Refused: there is no container to read, or too many streams are open.
        """
        if len(self._streams) >= MAX_STREAMS or order.stream in self._streams:
            raise Refused(
                "busy", f"{self._node.name} has {len(self._streams)} log streams open, the limit is {MAX_STREAMS}"
            )
        self._node.engine.check()
        containers = await self._node.engine.containers.list(order.service)
        if not containers:
            raise Refused(
                "container_missing", f"{order.service} has no container on {self._node.name}: there is nothing to read"
            )
        stream = self._streams[order.stream] = _Stream(order, credit=max(1, min(order.credit, 10_000)))
        try:
            return await self._relay(stream, [_Source(container) for container in containers])
        finally:
            del self._streams[order.stream]

    async def _relay(self, stream: _Stream, sources: list[_Source]) -> Done:
        merge = _Merge(sources, is_patient=not stream.order.follow)
        async with asyncio.TaskGroup() as readers:
            tasks = [readers.create_task(self._read(stream.order, source, merge)) for source in sources]
            note = await self._send_all(stream, merge)
            for task in tasks:
                task.cancel()
        notes = [note] if note else [source.note for source in sources if source.note]
        return Done(detail="; ".join(notes))

    # -------------------------------------------------------------------- reading

    async def _read(self, order: StreamLogs, source: _Source, merge: _Merge) -> None:
        try:
            async for line in self._lines(order, source.container.name):
                await merge.put(source, line)
            source.note = await self._end_of(order, source.container)
        except AdapterError as error:
            source.note = f"{short(source.container.name)}: {error.reason}"
        merge.end(source)

    def _lines(self, order: StreamLogs, name: str) -> AsyncIterator[LogLine]:
        return self._node.engine.output.logs(name, follow=order.follow, tail=order.tail, since_s=order.since_s)

    async def _end_of(self, order: StreamLogs, container: ContainerState) -> str:
        if not order.follow:
            return ""
        found = await self._node.engine.containers.list(order.service)
        now = next((c for c in found if c.name == container.name), None)
        if now is None:
            return f"{short(container.name)} was removed"
        return "" if now.state == "running" else f"{short(container.name)} ended with exit code {now.exit_code}"

    # -------------------------------------------------------------------- sending

    async def _send_all(self, stream: _Stream, merge: _Merge) -> str:
        """Send until every container has ended; return why it ended earlier, "" when it did not."""
        while (first := await stream.alarm.unless_rung(merge.take(None))) is not None or not merge.is_over:
            if stream.is_ended:
                return "ended by its reader"
            if first is None:
                continue  # only credit came
            batch = await self._fill(merge, first)
            if why := await self._send(stream, batch):
                return why
        return ""

    async def _fill(self, merge: _Merge, first: LogLine) -> tuple[LogLine, ...]:
        batch, size = [first], size_of(first)
        deadline_s = asyncio.get_running_loop().time() + FLUSH_S
        while len(batch) < LINES_AT_ONCE and size < BYTES_AT_ONCE:
            line = await merge.take(deadline_s)
            if line is None:
                break
            batch.append(line)
            size += size_of(line)
        return tuple(batch)

    async def _send(self, stream: _Stream, lines: tuple[LogLine, ...]) -> str:
        """Send one message as soon as there is credit for it; return why not, "" when it was sent."""
        waited_from_s = self._node.clock.monotonic_s()
        while stream.credit <= 0:
            left_s = NO_CREDIT_S - (self._node.clock.monotonic_s() - waited_from_s)
            if stream.is_ended or left_s <= 0:
                return "ended by its reader" if stream.is_ended else f"its reader took nothing for {NO_CREDIT_S:g} s"
            await stream.alarm.unless_rung(self._node.clock.sleep(left_s))
        stream.credit -= 1
        message = LogLines(stream=stream.order.stream, sequence=stream.sequence, node=self._node.name, lines=lines)
        stream.sequence += 1
        try:
            await self._link.log(message)
        except BusError as error:
            return error.reason
        return ""


class _Merge:
    """Puts the lines of several containers into the order of their time stamps.

    Patient: a line goes when every other container has shown its next one. Followed containers may be silent for days:
    then the others wait a moment for it, not longer.
    """

    def __init__(self, sources: list[_Source], *, is_patient: bool) -> None:
        self._sources = sources
        self._is_patient = is_patient
        self._came = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for source in sources:
            source.quiet_since_s = self._loop.time()

    @property
    def is_over(self) -> bool:
        """Whether every container has ended and every line was taken."""
        return all(source.is_over and not source.lines for source in self._sources)

    async def put(self, source: _Source, line: LogLine) -> None:
        """Hand a line in; waits while too many are waiting already."""
        while len(source.lines) >= LINES_AHEAD:
            source.room.clear()
            await source.room.wait()
        source.lines.append(cut(line))
        self._came.set()

    def end(self, source: _Source) -> None:
        """Say that no more lines come of a container."""
        source.is_over = True
        self._came.set()

    async def take(self, deadline_s: float | None) -> LogLine | None:
        """Return the next line; None when all is over, or none came before the deadline (in the loop's time)."""
        while not self.is_over:
            ready = [source for source in self._sources if source.lines]
            wait_s = self._wait_s()
            if ready and wait_s <= 0:
                return self._pop(min(ready, key=lambda source: source.lines[0].at))
            until_s = self._loop.time() + wait_s if ready else math.inf
            until_s = min(until_s, math.inf if deadline_s is None else deadline_s)
            self._came.clear()
            try:
                async with asyncio.timeout_at(None if until_s == math.inf else until_s):
                    await self._came.wait()
            except TimeoutError:
                if deadline_s is not None and self._loop.time() >= deadline_s:
                    return None
        return None

    def _wait_s(self) -> float:
        """Return how long to wait for containers that have shown nothing yet."""
        silent = [source for source in self._sources if not source.lines and not source.is_over]
        if self._is_patient:
            return math.inf if silent else 0.0
        return max((source.quiet_since_s + PATIENCE_S - self._loop.time() for source in silent), default=0.0)

    def _pop(self, source: _Source) -> LogLine:
        line = source.lines.popleft()
        source.room.set()
        if not source.lines:
            source.quiet_since_s = self._loop.time()
        return line


def cut(line: LogLine) -> LogLine:
    """Shorten a line that is too long for a message."""
    raw = line.text.encode()
    return line if len(raw) <= LINE_BYTES else attrs.evolve(line, text=raw[:LINE_BYTES].decode(errors="ignore"))


def size_of(line: LogLine) -> int:
    """Return about how many bytes a line takes in a message."""
    return len(line.text.encode()) + LINE_OVERHEAD_BYTES
