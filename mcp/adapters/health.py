"""Is something answering where a container should? One connection or one HTTP GET, at most 5 seconds."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from mcp.model.spec import HealthSpec

CHECK_TIMEOUT_S = 5.0
"""For one check; how often and how long it is repeated is the workload's business."""


class NetworkChecks:
    """Implements HealthChecks (mcp/model/ports.py)."""

    async def check(self, health: HealthSpec, address: str, port: int) -> str:
        """Return "" when healthy, else what was seen."""
        try:
            async with asyncio.timeout(CHECK_TIMEOUT_S):
                return await self._look(health.path, address, port)
        except TimeoutError:
            return f"no answer within {CHECK_TIMEOUT_S:g} s"
        except ConnectionRefusedError:
            return "connection refused"
        except OSError as error:
            return (error.strerror or str(error)).lower()

    async def _look(self, path: str, address: str, port: int) -> str:
        reader, writer = await asyncio.open_connection(address, port)
        try:
            if not path:
                return ""
            # The whole of HTTP that a status line needs: a library would cost more memory than the agent has.
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {address}\r\nUser-Agent: mcp\r\nConnection: close\r\n\r\n".encode())
            return _status(await reader.readline())
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


def _status(line: bytes) -> str:
    words = line.decode("latin-1").split()
    if len(words) < 2 or not words[0].startswith("HTTP/") or not words[1].isdigit():
        return "closed without an answer" if not line else "no HTTP answer"
    return "" if 200 <= int(words[1]) < 400 else f"HTTP {words[1]}"
