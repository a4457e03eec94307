"""What all workloads of a node share: its records, its engine, its ports, and the ways to tell what became of them."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from mcp.actors.engine import Engine
from mcp.model.container import ContainerDefaults
from mcp.model.errors import AdapterError
from mcp.model.ports import Clock, ContainerOutput, Containers, HealthChecks, Host, Images, Records
from mcp.model.spec import ServiceSpec

if TYPE_CHECKING:
    from mcp.actors.workload import WorkloadActor

PORT_TRIES = 200
"""Ports that may be taken by others before it is said that none is free."""


class NodeState:
    """One node. `own_paths` are folders of the control plane itself: never mounted into a container."""

    def __init__(
        self,
        *,
        records: Records,
        host: Host,
        clock: Clock,
        checks: HealthChecks,
        defaults: ContainerDefaults,
        spec_to_text: Callable[[ServiceSpec], str],
        engine: tuple[Images, Containers, ContainerOutput] | None,
        port_range: tuple[int, int] = (10_000, 60_000),
        own_paths: tuple[str, ...] = (),
        chance: random.Random | None = None,
    ) -> None:
        self.name = defaults.node
        self.records = records
        self.host = host
        self.clock = clock
        self.checks = checks
        self.defaults = defaults
        self.spec_to_text = spec_to_text
        self.own_paths = own_paths
        self.engine = Engine(defaults.node, engine, clock)
        self.ports = PortPool(records, host, address=defaults.publish_address, port_range=port_range)
        self.tell: Callable[[WorkloadActor], Awaitable[None]] = _untold
        """Tells the master what a service is now."""
        self.look_again: Callable[[str], None] = _unseen
        """Has the engine asked about a service soon."""
        self._chance = chance or random.Random()  # noqa: S311 - spreads retries, no secret

    def spread(self, seconds: float) -> float:
        """Return about as many seconds, so that what failed together is not tried again together."""
        return seconds * self._chance.uniform(0.75, 1.25)

    def now(self) -> str:
        """Return the wall clock as RFC 3339 UTC."""
        at = datetime.fromtimestamp(self.clock.wall_s(), UTC)
        return at.isoformat(timespec="microseconds").replace("+00:00", "Z")

    def time_of_day(self) -> str:
        """Return the wall clock as people read it: 12:03:04Z."""
        return self.now()[11:19] + "Z"


async def _untold(_: WorkloadActor) -> None:
    """Nobody wants to know."""


def _unseen(_: str) -> None:
    """Nobody looks."""


class PortPool:
    """The host ports a node gives to routes: free ones, each to one generation of one service only."""

    def __init__(self, records: Records, host: Host, *, address: str, port_range: tuple[int, int]) -> None:
        self._records = records
        self._host = host
        self._address = address
        self._first, self._last = port_range
        self._next = self._first
        self._used: set[int] = set()
        self._promised: set[int] = set()
        self.is_stale = False
        """Whether generations were forgotten since the records were read."""

    async def load(self) -> None:
        """Read which ports generations have."""
        self.is_stale = False
        self._used = await self._records.ports()

    def take(self) -> int:
        """Return a port that nobody uses; it stays promised until `settle`.

        Raises:
            AdapterError: code no_port.
        """
        for _ in range(min(PORT_TRIES + len(self._used), self._last - self._first + 1)):
            port = self._next
            self._next = port + 1 if port < self._last else self._first
            if port not in self._used and port not in self._promised and self.is_free(port):
                self._promised.add(port)
                return port
        raise AdapterError(
            f"cannot find a free port from {self._first} to {self._last} on {self._address}",
            code="no_port",
            hint=f"Is {self._address} an address of this node? If it is, widen [ports] in mcp-agent.toml.",
        )

    def is_free(self, port: int) -> bool:
        """Say whether a port can be listened on now."""
        return self._host.is_port_free(self._address, port)

    def settle(self, ports: set[int], *, are_written: bool) -> None:
        """End a promise: the ports are in the records now, or free again."""
        self._promised -= ports
        if are_written:
            self._used |= ports
