"""Is something answering where a container should? One connection or one HTTP GET, at most 5 seconds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from mcp.model.spec import HealthSpec

CHECK_TIMEOUT_S = 5.0
"""For one check; how often and how long it is repeated is the workload's business."""

HOLD_S = 0.25
HTTP_HOLD_S = 1.0
"""How long a connection must be held to count as accepted: the engine's port forwarder hangs up within milliseconds when
nothing listens in the container. A server that speaks HTTP answers long before the second is over."""


class NetworkChecks:
    """Implements HealthChecks (mcp/model/ports.py)."""

    async def check(self, health: HealthSpec, address: str, port: int, *, speaks_http: bool) -> str:
        """Return "" when healthy, else what was seen."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await self._look(health.path, address, port, speaks_http=speaks_http)
        except TimeoutError:
            return f"no answer within {CHECK_TIMEOUT_S:g} s"
        except ConnectionRefusedError:
            return "connection refused"
        except (ConnectionResetError, BrokenPipeError):
            return _hung_up(health.path)
        except OSError as error:
            return (error.strerror or str(error)).lower()

    async def _look(self, path: str, address: str, port: int, *, speaks_http: bool) -> str:
        reader, writer = await asyncio.open_connection(address, port)
        try:
            if path or speaks_http:
                # The whole of HTTP that a status line needs: a library would cost more memory than the agent has.
                head = f"GET {path or '/'} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: mcp\r\nConnection: close\r\n\r\n"
                writer.write(head.encode())
            if path:
                return await _status(reader)
            return await _is_held(reader, HTTP_HOLD_S if speaks_http else HOLD_S)
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


async def _is_held(reader: asyncio.StreamReader, hold_s: float) -> str:
    """Say whether the peer keeps the connection (or answers) for a moment."""
    try:
        async with asyncio.timeout(hold_s):
            return "" if await reader.read(1) else _hung_up("")
    except TimeoutError:
        return ""


async def _status(reader: asyncio.StreamReader) -> str:
    try:
        line = await reader.readline()
    except ValueError:  # longer than the reader's buffer
        return "no HTTP answer"
    if not line:
        return _hung_up("/")
    words = line.decode("latin-1").split()
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        return "no HTTP answer"
    return "" if 200 <= int(words[1]) < 400 else f"HTTP {words[1]}"


def _hung_up(path: str) -> str:
    """Say that the peer hung up: with or without a reset depends on who was quicker."""
    return "closed without an answer" if path else "closed at once"
