"""Sockets that stand before an engine, or pretend to be one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(path: Path, handle: Handler) -> AsyncIterator[str]:
    """Yield the URL of a socket; every connection to it is closed in the end, however its handler ends."""
    at_work: set[asyncio.Future[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of its own to cancel: streams complain of a cancelled callback.
        task = asyncio.ensure_future(handle(reader, writer))
        at_work.add(task)
        with suppress(ConnectionError, asyncio.CancelledError):
            await task
        await hang_up(writer)

    server = await asyncio.start_unix_server(serve, path)
    try:
        yield f"unix://{path}"
    finally:
        server.close()
        for task in at_work:
            task.cancel()
        await server.wait_closed()


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()


def cutting(engine: Path, folder: Path, path: bytes) -> AbstractAsyncContextManager[str]:
    """Give a proxy that passes everything on, except the answer to the first request for a path."""
    uncut = [path]

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, up = await asyncio.open_unix_connection(engine)
        is_cut = asyncio.Event()

        async def pass_up() -> None:
            while data := await reader.read(65536):
                if uncut and uncut[0] in data.split(b"\r\n", 1)[0]:
                    uncut.clear()
                    is_cut.set()
                up.write(data)
            up.write_eof()

        passing = asyncio.create_task(pass_up())
        try:
            while (data := await above.read(65536)) and not is_cut.is_set():
                writer.write(data)
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
            await hang_up(up)

    return serving(folder / "p.sock", handle)
