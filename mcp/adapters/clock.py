"""Time and ids from the real world."""

from __future__ import annotations

import asyncio
import secrets
import time


class SystemClock:
    """Implements Clock (mcp/model/ports.py)."""

    def monotonic_s(self) -> float:
        """Return seconds that only grow."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await asyncio.sleep(seconds)


class RandomIds:
    """Implements IdSource: 8 hex digits from the system's randomness."""

    def new_id(self) -> str:
        """Return a fresh id."""
        return secrets.token_hex(4)
