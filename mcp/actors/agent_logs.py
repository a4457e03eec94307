"""Log streams at the agent: lines of all containers of a service, as far as the reader's credit goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import attrs

from mcp.actors.actor import Slot
from mcp.actors.node_state import NodeState
from mcp.bus.links import AgentLink
from mcp.model.errors import AdapterError, BusError, McpError
from mcp.model.messages import ContainerState, Done, LogLine, LogLines, StreamLogs
from mcp.model.saga import failed_from

LINES_AT_ONCE = 200
BYTES_AT_ONCE = 48 * 1024
LINE_BYTES = 16 * 1024
"""A longer line is cut: one line must never fill a message."""

FLUSH_S = 0.1
"""A line that comes alone is sent this soon."""

NO_CREDIT_S = 60.0
"""A reader that gave no credit for so long is gone."""

_END = object()


@attrs.define
class _Stream:
    credit: asyncio.Semaphore
    is_ended: bool = False


class LogSender:
    """Every log stream this agent has open."""

    def __init__(self, node: NodeState, link: AgentLink) -> None:
        self._node = node
        self._link = link
        self._streams: dict[str, _Stream] = {}

    def grant(self, stream: str, credit: int) -> bool:
        """Allow so many more messages of a stream, 0 ends it; False when there is no such stream."""
        found = self._streams.get(stream)
        if found is None:
            return False
        if credit <= 0:
            found.is_ended = True
        for _ in range(max(1, min(credit, 1000))):
            found.credit.release()
        return True

    async def send(self, order: StreamLogs, slot: Slot) -> None:
        """Send the lines of a service's containers and answer when they have ended."""
        stream = self._streams[order.stream] = _Stream(asyncio.Semaphore(max(1, min(order.credit, 1000))))
        try:
            containers = await self._containers(order.service)
            notes = await self._relay(order, stream, containers)
            await slot.final(Done(detail="; ".join(notes)))
        except McpError as error:
            await slot.failed(failed_from(error))
        finally:
            del self._streams[order.stream]

    async def _containers(self, service: str) -> list[ContainerState]:
        found = await self._node.containers().list(service)
        if not found:
            raise AdapterError(f"{service} has no container on {self._node.name}", code="container_missing")
        return found

    async def _relay(self, order: StreamLogs, stream: _Stream, containers: list[ContainerState]) -> list[str]:
        queue: asyncio.Queue[LogLine | object] = asyncio.Queue(LINES_AT_ONCE * 2)
        async with asyncio.TaskGroup() as readers:
            tasks = [readers.create_task(self._read(order, container, queue)) for container in containers]
            await self._send_all(order, stream, queue, len(tasks))
            for task in tasks:
                task.cancel()
        return [task.result() for task in tasks if not task.cancelled()]

    async def _read(self, order: StreamLogs, container: ContainerState, queue: asyncio.Queue[LogLine | object]) -> str:
        lines: AsyncIterator[LogLine] = self._node.output().logs(
            container.name, follow=order.follow, tail=order.tail, since_s=order.since_s
        )
        try:
            async for line in lines:
                await queue.put(attrs.evolve(line, text=line.text[:LINE_BYTES]))
            return await self._how_it_ended(order, container)
        except AdapterError as error:
            return error.reason
        finally:
            queue.put_nowait(_END) if not queue.full() else await queue.put(_END)

    async def _how_it_ended(self, order: StreamLogs, container: ContainerState) -> str:
        if not order.follow:
            return ""
        now = next((c for c in await self._node.containers().list(order.service) if c.name == container.name), None)
        if now is None:
            return f"{container.name} was removed"
        return f"{container.name} {now.state} with exit code {now.exit_code}" if now.state != "running" else ""

    async def _send_all(
        self, order: StreamLogs, stream: _Stream, queue: asyncio.Queue[LogLine | object], readers: int
    ) -> None:
        sequence = 0
        while readers and not stream.is_ended:
            batch: list[LogLine] = []
            size = 0
            first = await queue.get()
            deadline = asyncio.get_running_loop().time() + FLUSH_S
            item: LogLine | object | None = first
            while item is not None:
                if isinstance(item, LogLine):
                    batch.append(item)
                    size += len(item.text) * 2 + 120
                else:
                    readers -= 1
                full = len(batch) >= LINES_AT_ONCE or size >= BYTES_AT_ONCE or not readers
                item = None if full else await _next(queue, deadline)
            if batch and not await self._send(order, stream, sequence, batch):
                return
            sequence += 1

    async def _send(self, order: StreamLogs, stream: _Stream, sequence: int, batch: list[LogLine]) -> bool:
        try:
            async with asyncio.timeout(NO_CREDIT_S):
                await stream.credit.acquire()
        except TimeoutError:
            return False
        if stream.is_ended:
            return False
        try:
            await self._link.log(LogLines(stream=order.stream, sequence=sequence, node=self._node.name, lines=tuple(batch)))
        except BusError:
            return False
        return True


async def _next(queue: asyncio.Queue[LogLine | object], deadline: float) -> LogLine | object | None:
    """Return what comes before the deadline (on the loop's clock), else None."""
    try:
        async with asyncio.timeout_at(deadline):
            return await queue.get()
    except TimeoutError:
        return None
