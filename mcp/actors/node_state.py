"""What an agent knows of its node: intents, what really runs, and what has been told of it. Shared by its workloads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from mcp.model.container import ContainerDefaults
from mcp.model.errors import AdapterError
from mcp.model.messages import ContainerState, EngineState, ServiceRecord
from mcp.model.names import container_name
from mcp.model.ports import (
    Clock,
    ContainerOutput,
    Containers,
    HealthChecks,
    Host,
    Images,
    Intent,
    Records,
)
from mcp.model.spec import ComponentSpec, ServiceSpec
from mcp.model.views import rfc3339
from mcp.model.workload import Intents, orphans_of, record_of, sort_by_service

log = logging.getLogger(__name__)

OnChange = Callable[[str, ServiceRecord | None], None]
"""Told a service and its new record, or None when nothing of it is left."""


class NodeState:
    """One node's memory, with the records behind it and the engine beside it."""

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
    ) -> None:
        self.name = defaults.node
        self.records = records
        self.host = host
        self.clock = clock
        self.checks = checks
        self.defaults = defaults
        self.spec_to_text = spec_to_text
        self.engine_state: EngineState = "none" if engine is None else "down"
        self.intents: dict[str, Intents] = {}
        self.told: dict[str, ServiceRecord] = {}
        self.orphans: tuple[ContainerState, ...] = ()
        self.ready: set[tuple[str, int]] = set()
        self.trouble: dict[str, str] = {}
        self.version = 0
        self.on_change: OnChange = lambda service, record: None
        self._engine = engine
        self._ports = port_range
        self._next_port = port_range[0]
        self._gone: dict[str, str] = {}
        self._choosing = asyncio.Lock()
        self._reserved: set[int] = set()

    # ------------------------------------------------------------------- ports

    def images(self) -> Images:
        """Return the engine's images."""
        return self._need_engine()[0]

    def containers(self) -> Containers:
        """Return the engine's containers."""
        return self._need_engine()[1]

    def output(self) -> ContainerOutput:
        """Return what the engine's containers say."""
        return self._need_engine()[2]

    def _need_engine(self) -> tuple[Images, Containers, ContainerOutput]:
        if self._engine is None:
            raise AdapterError(f"{self.name} has no container engine and runs no containers", code="no_engine")
        return self._engine

    # ----------------------------------------------------------------- intents

    async def load(self) -> None:
        """Read the intents from the records."""
        self.intents = sort_by_service(await self.records.intents())

    async def accept(self, intent: Intent, ports: Mapping[tuple[str, str], int]) -> None:
        """Write an intent (and its ports) down.

        Raises:
            AdapterError: it was not accepted.
        """
        try:
            await self.records.accept(intent, ports)
        finally:
            self._reserved -= set(ports.values())
        old = self.intents.get(intent.service, Intents())
        self.intents[intent.service] = (
            Intents(own=old.own, candidate=intent) if intent.is_candidate else Intents(own=intent, candidate=old.candidate)
        )

    async def commit(self, service: str, generation: int) -> None:
        """Make a candidate the service's own."""
        await self.records.commit(service, generation)
        await self.load()

    async def forget(self, service: str, generation: int, *, candidate_only: bool) -> None:
        """Drop intents up to a generation."""
        await self.records.forget(service, generation, candidate_only=candidate_only)
        self.trouble.pop(service, None)
        await self.load()

    # ------------------------------------------------------------------- ports

    async def choose_ports(self, spec: ServiceSpec) -> dict[tuple[str, str], int]:
        """Return a free host port for each route; they stay reserved until the intent is accepted.

        Raises:
            AdapterError: code no_free_port.
        """
        wanted = [(component.name, route.name) for component in spec.components for route in component.routes]
        if not wanted:
            return {}
        async with self._choosing:
            taken = await self.records.ports() | self._reserved
            chosen: dict[tuple[str, str], int] = {}
            for key in wanted:
                port = self._free_port(taken)
                taken.add(port)
                chosen[key] = port
            self._reserved |= set(chosen.values())
        return chosen

    def _free_port(self, taken: set[int]) -> int:
        first, last = self._ports
        count = last - first + 1
        for i in range(count):
            port = first + (self._next_port - first + i) % count
            if port not in taken and self.host.is_port_free(self.defaults.publish_address, port):
                self._next_port = port + 1 if port < last else first
                return port
        raise AdapterError(
            f"no free port on {self.name} between {first} and {last} at {self.defaults.publish_address}",
            code="no_free_port",
            hint="Widen [ports] in mcp-agent.toml.",
        )

    # ----------------------------------------------------------------- looking

    async def refresh(self, service: str) -> ServiceRecord | None:
        """Look at a service again and tell what changed; with the engine away the last known containers stand."""
        intents = self.intents.get(service, Intents())
        if intents.is_empty:
            self._tell(service, None)
            return None
        containers = await self._look(service)
        self._note_gone(intents, containers)
        record = record_of(
            service,
            intents,
            containers,
            ready=intents.candidate is not None and (service, intents.candidate.generation) in self.ready,
            problems=[self.trouble[service]] if service in self.trouble else [],
            gone=self._gone,
        )
        self._tell(service, record)
        return record

    async def refresh_all(self) -> None:
        """Look at everything again, orphans included."""
        if self._engine is not None:
            try:
                self.orphans = orphans_of(self.intents, await self.containers().list())
            except AdapterError as error:
                log.info("containers cannot be listed: %s", error.reason)
        for service in sorted({*self.intents, *self.told}):
            await self.refresh(service)

    async def _look(self, service: str) -> list[ContainerState]:
        if self._engine is None:
            return []
        try:
            return await self.containers().list(service)
        except AdapterError:
            before = self.told.get(service)
            return [c for c in before.containers if c.state != "missing"] if before else []

    def _note_gone(self, intents: Intents, containers: list[ContainerState]) -> None:
        own = intents.own
        if own is None or self.engine_state != "up":
            return
        there = {c.name for c in containers}
        for component in own.spec.components:
            name = self.container_name(own, component)
            if name in there:
                self._gone.pop(name, None)
            else:
                self._gone.setdefault(name, self.now_text())

    def _tell(self, service: str, record: ServiceRecord | None) -> None:
        if self.told.get(service) == record:
            return
        self.version += 1
        if record is None:
            self.told.pop(service, None)
        else:
            self.told[service] = record
        self.on_change(service, record)

    @staticmethod
    def container_name(intent: Intent, component: ComponentSpec) -> str:
        """Return the name of a component's container."""
        return container_name(intent.service, component.name, intent.generation)

    def now_text(self) -> str:
        """Return the wall clock as RFC 3339 UTC."""
        return rfc3339(self.clock.wall_s())
