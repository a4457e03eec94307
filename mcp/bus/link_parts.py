"""What the links are made of: the master's time at both ends, a count of what is dropped, and tasks of their own."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from mcp.model.ports import Clock

log = logging.getLogger(__name__)

DROPS_LOGGED_EVERY_S = 60.0

ANSWER_WITHIN_S = 1.0
"""How long an answer that corrects our idea of the master's time may have been under way, at most."""


class MasterClock:
    """Seconds since 1970 that never step: what Mcp-Sent and Mcp-Deadline are measured in."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_s = clock.wall_s() - clock.monotonic_s()

    def now_s(self) -> float:
        """Return the master's time."""
        return self._clock.monotonic_s() + self._offset_s


class MasterTime:
    """Translates the master's time into this machine's monotonic one, so that no step of a clock here changes anything.

    Every message with Mcp-Sent shows how far the clocks are apart, plus how long it was under way (or lay unread here, while
    this process was frozen). The smallest of these differences is the best estimate: what lies above it came late. It goes
    wrong in one way only, for good, when the master's clock stands still for a while (a suspended machine) or runs slower.
    Then everything seems late. The proof of that is an answer: what the master said after it had heard us cannot have been
    sent before we spoke.
    """

    def __init__(self) -> None:
        self._offset_s: float | None = None
        self._epoch = 0

    def learn(self, sent_s: float, epoch: int, now_s: float, asked_s: float | None = None) -> None:
        """Learn from a message; `asked_s` is when we said what it answers, if it answers anything."""
        seen_s = now_s - sent_s
        if self._offset_s is None or epoch != self._epoch:
            self._offset_s, self._epoch = seen_s, epoch
        elif asked_s is not None and self._offset_s < asked_s - sent_s:
            self._offset_s = min(seen_s, asked_s - sent_s + ANSWER_WITHIN_S)
        else:
            self._offset_s = min(self._offset_s, seen_s)

    def here(self, master_s: float | None) -> float | None:
        """Return a time of the master's in our monotonic seconds."""
        return None if master_s is None or self._offset_s is None else master_s + self._offset_s


class Drops:
    """Counts what is not let through, and logs each kind of it once a minute at most: a flood must not fill a disk."""

    def __init__(self, what: str, clock: Clock) -> None:
        self.counts: Counter[str] = Counter()
        self._what = what
        self._clock = clock
        self._next_s: dict[str, float] = {}

    def add(self, why: str, detail: str = "") -> None:
        """Count one; `why` is one of few, `detail` anything."""
        self.counts[why] += 1
        now_s = self._clock.monotonic_s()
        if now_s >= self._next_s.get(why, now_s):
            self._next_s[why] = now_s + DROPS_LOGGED_EVERY_S
            log.warning("%s dropped, %s: %s (%d so far)", self._what, why, detail, self.counts[why])


class Tasks:
    """What a link has under way by itself: callbacks of a transport cannot wait."""

    def __init__(self) -> None:
        self._running: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside; the loop itself keeps only weak references."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def end(self, within_s: float) -> None:
        """Wait for what is under way, then cancel it."""
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=within_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
