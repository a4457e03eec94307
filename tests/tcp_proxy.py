"""A wire between a client and a server that a test can cut, hold still or unplug."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self

CHUNK_BYTES = 64 * 1024


class TcpProxy:
    """Listens on 127.0.0.1 at `port` and passes bytes on to a server."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.connections = 0
        """How many were ever made through it."""
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._flows = asyncio.Event()
        self._flows.set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.plug_in()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unplug()

    async def plug_in(self) -> None:
        """Listen, on the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        """Cut everything; new connections are refused."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.cut()

    async def cut(self) -> None:
        """End the connections that are there."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._flows.set()

    def hold(self) -> None:
        """Let nothing through and say nothing about it, as a link that is down does; new connections hang."""
        self._flows.clear()

    def release(self) -> None:
        """Let everything through again."""
        self._flows.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        ours = [writer]
        try:
            await self._flows.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
            ours.append(far_writer)
            async with asyncio.TaskGroup() as group:
                there = group.create_task(self._pass_on(reader, far_writer))
                back = group.create_task(self._pass_on(far_reader, writer))
                await asyncio.wait([there, back], return_when=asyncio.FIRST_COMPLETED)
                there.cancel()
                back.cancel()
        except OSError:
            pass  # the server is not there, so the client is hung up on
        except asyncio.CancelledError:
            pass  # cut; asyncio's own server would log a task that ends like this
        finally:
            self._tasks.discard(task)
            for each in ours:
                each.transport.abort()
                with suppress(OSError):
                    await each.wait_closed()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                await self._flows.wait()
                writer.write(data)
                await writer.drain()
