"""Every port of an agent in memory, under a clock that tests move; each passes the contract suite of the real thing."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Mapping

import attrs

from mcp.adapters.fake_engine import Behaviour, FakeEngine, Listener
from mcp.model.errors import AdapterError
from mcp.model.messages import OperationRecord, Resources
from mcp.model.ports import Clock, Intent
from mcp.model.spec import HealthSpec

__all__ = [
    "Behaviour",
    "CountingIds",
    "FakeClock",
    "FakeEngine",
    "FakeHealthChecks",
    "FakeHost",
    "FakeRecords",
    "Listener",
]

CHECK_TIMEOUT_S = 5.0
ANSWERS_KEPT_S = 24 * 3600.0
ANSWERS_KEPT = 1000

_TURNS_TO_SETTLE = 50
"""So many turns the event loop gets before time moves on: more than any chain of callbacks here is long."""


class FakeClock:
    """Implements Clock: time stands still until a test moves it."""

    def __init__(self, wall_s: float = 1_800_000_000.0) -> None:
        self._now_s = 0.0
        self._wall_s = wall_s
        self._serial = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def monotonic_s(self) -> float:
        """Return the seconds that the test has let pass."""
        return self._now_s

    def wall_s(self) -> float:
        """Return seconds since 1970."""
        return self._wall_s + self._now_s

    def step_wall(self, seconds: float) -> None:
        """Set the wall clock, as an administrator or NTP does; durations do not notice."""
        self._wall_s += seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until the test has let that much time pass."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._serial), waiter))
        await waiter

    async def advance(self, seconds: float) -> None:
        """Let time pass: whoever sleeps wakes in the right order, and what they then do is done before time goes on."""
        end_s = self._now_s + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end_s:
            due_s, _, waiter = heapq.heappop(self._sleepers)
            self._now_s = max(self._now_s, due_s)
            if not waiter.done():
                waiter.set_result(None)
                await settle()
        self._now_s = end_s
        await settle()

    async def advance_until(self, is_so: Callable[[], object], limit_s: float = 600.0) -> None:
        """Let time pass, from sleeper to sleeper, until something is so.

        Raises:
            AssertionError: it was not so within `limit_s` seconds, or nobody sleeps any more.
        """
        end_s = self._now_s + limit_s
        await settle()
        while not is_so():
            if not self._sleepers or self._sleepers[0][0] > end_s:
                why = f"not within {limit_s:g} s" if self._sleepers else "it never will be: nobody sleeps"
                raise AssertionError(why)
            await self.advance(self._sleepers[0][0] - self._now_s)


async def settle() -> None:
    """Let everything run that can run without time passing."""
    for _ in range(_TURNS_TO_SETTLE):
        await asyncio.sleep(0)


class CountingIds:
    """Implements IdSource: 00000001, 00000002..."""

    def __init__(self) -> None:
        self._count = itertools.count(1)

    def new_id(self) -> str:
        """Return the next id."""
        return f"{next(self._count):08x}"


class FakeHost:
    """Implements Host; everything it says may be set."""

    def __init__(self, *, arch: str = "amd64", boot_id: str = "boot-1", have: Resources | None = None) -> None:
        self.arch = arch
        self.boot_id = boot_id
        self.have = have or Resources(
            cpu_cores=4.0,
            memory_bytes=8 << 30,
            memory_free_bytes=6 << 30,
            disk_bytes=100 << 30,
            disk_free_bytes=50 << 30,
        )
        self.taken: set[tuple[str, int]] = set()
        """Addresses and ports at which somebody listens."""
        self.links: dict[str, str] = {}
        """Symlinks: path -> where it leads."""

    def resources(self) -> Resources:
        """Return what was set."""
        return self.have

    def is_port_free(self, address: str, port: int) -> bool:
        """Say whether nobody listens there."""
        return (address, port) not in self.taken

    def real_path(self, path: str) -> str:
        """Follow the symlinks that were set."""
        for link in sorted(self.links, key=len, reverse=True):
            if path == link or path.startswith(link.rstrip("/") + "/"):
                return self.links[link] + path[len(link) :]
        return path


class FakeHealthChecks:
    """Implements HealthChecks on listeners that were set, or on the containers of a fake engine."""

    def __init__(self, clock: Clock, engine: FakeEngine | None = None) -> None:
        self.listeners: dict[tuple[str, int], Listener] = {}
        self._clock = clock
        self._engine = engine

    async def check(self, health: HealthSpec, address: str, port: int, *, speaks_http: bool) -> str:
        """Return "" when healthy, else what was seen."""
        listener = self.listeners.get((address, port))
        if listener is None and self._engine is not None:
            listener = self._engine.listener(address, port)
        if listener is None:
            return "connection refused"
        if listener.hangs_up:
            return "closed without an answer" if health.path else "closed at once"
        if not health.path:
            return ""
        if listener.is_silent:
            await self._clock.sleep(CHECK_TIMEOUT_S)
            return f"no answer within {CHECK_TIMEOUT_S:g} s"
        return "" if 200 <= listener.status < 400 else f"HTTP {listener.status}"


class FakeRecords:
    """Implements Records; what is in it outlives the agent that a test stops, as a disk would.

    `trouble`, once set, is what every write raises.
    """

    def __init__(self, clock: Clock) -> None:
        self.rebuilt_reason = "there were no records"
        self.trouble: AdapterError | None = None
        self._clock = clock
        self._intents: dict[tuple[str, bool], Intent] = {}
        self._ports: dict[tuple[str, str, str, int], int] = {}
        self._answers: dict[str, tuple[float, OperationRecord, bytes]] = {}
        self._highest: dict[str, int] = {}
        self._epoch = 0

    def reopen(self, rebuilt_reason: str = "") -> None:
        """Do what a restart of the agent does; with a reason, everything is forgotten."""
        if rebuilt_reason:
            self.__init__(self._clock)  # type: ignore[misc]
        self.rebuilt_reason = rebuilt_reason

    def _write(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    async def intents(self) -> list[Intent]:
        """Return all intents."""
        return sorted(self._intents.values(), key=lambda intent: (intent.service, intent.generation))

    async def accept(self, intent: Intent, ports: Mapping[tuple[str, str], int] | None = None) -> None:
        """Write an intent in place of the one of its kind, with its ports."""
        self._write()
        self._intents[intent.service, intent.is_candidate] = intent
        for (component, route), port in (ports or {}).items():
            self._ports[intent.service, component, route, intent.generation] = port
        self._highest[intent.service] = max(intent.generation, self._highest.get(intent.service, 0))

    async def commit(self, service: str, generation: int) -> None:
        """Make the candidate of that generation the committed intent; done already is fine."""
        self._write()
        candidate = self._intents.get((service, True))
        if candidate is not None and candidate.generation == generation:
            del self._intents[service, True]
            self._intents[service, False] = attrs.evolve(candidate, is_candidate=False)
        self._ports = {key: port for key, port in self._ports.items() if key[0] != service or key[3] >= generation}

    async def forget(self, service: str, generation: int, *, candidate_only: bool = False) -> None:
        """Drop a service's intents up to a generation, and the ports of generations that nobody means any more."""
        self._write()
        for is_candidate in (True,) if candidate_only else (True, False):
            intent = self._intents.get((service, is_candidate))
            if intent is not None and intent.generation <= generation:
                del self._intents[service, is_candidate]
        meant = {intent.generation for intent in self._intents.values() if intent.service == service}
        self._ports = {
            key: port
            for key, port in self._ports.items()
            if key[0] != service or key[3] > generation or key[3] in meant
        }

    async def ports_of(self, service: str, generation: int) -> dict[tuple[str, str], int]:
        """Return the host ports of a generation."""
        return {
            (key[1], key[2]): port for key, port in self._ports.items() if (key[0], key[3]) == (service, generation)
        }

    async def ports(self) -> set[int]:
        """Return every remembered host port."""
        return set(self._ports.values())

    async def finish(self, record: OperationRecord, reply: bytes) -> None:
        """Remember the end of an order under "op/kind"; old answers go."""
        self._write()
        key = f"{record.op}/{record.kind}"
        self._answers.pop(key, None)
        self._answers[key] = (self._clock.wall_s(), record, reply)
        young = [item for item in self._answers.items() if self._is_young(item[1][0])]
        self._answers = dict(young[-ANSWERS_KEPT:])

    def _is_young(self, ended_s: float) -> bool:
        return ended_s >= self._clock.wall_s() - ANSWERS_KEPT_S

    async def finished(self, key: str) -> bytes | None:
        """Return the recorded answer of an order ("op/kind")."""
        ended_s, _, reply = self._answers.get(key, (0.0, None, None))
        return reply if self._is_young(ended_s) else None

    async def operations(self, limit: int = 50) -> list[OperationRecord]:
        """Return the youngest ends of orders."""
        return [record for _, record, _ in reversed(self._answers.values())][:limit]

    async def highest_generation(self, service: str) -> int:
        """Return the highest generation ever accepted."""
        return self._highest.get(service, 0)

    async def highest_epoch(self) -> int:
        """Return the highest epoch ever obeyed."""
        return self._epoch

    async def raise_epoch(self, epoch: int) -> None:
        """Remember an epoch; lower ones are ignored."""
        if epoch > self._epoch:
            self._write()
            self._epoch = epoch

    async def close(self) -> None:
        """Close nothing: what is remembered stays."""
