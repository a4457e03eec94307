"""What a service is: the frozen form of a service definition, and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import attrs

from mcp.model.values import frozen

Tier = Literal["core", "worker"]
RouteMode = Literal["l4", "l7"]
Update = Literal["start-first", "stop-first"]


@frozen(kw_only=True)
class HealthSpec:
    """When a component counts as healthy: an HTTP GET, an accepted connection, or a command's exit 0.

    With none of the three, the first route's port must accept a connection; without a route, the container must
    keep running for `interval_s`.
    """

    path: str = ""
    tcp: bool = False
    cmd: tuple[str, ...] = ()
    interval_s: float = 1.0
    timeout_s: float = 30.0


@frozen(kw_only=True)
class RouteSpec:
    """One listener on a proxy; `hostname` is empty for the internal default name."""

    name: str = ""
    port: int
    mode: RouteMode = "l7"
    hostname: str = ""
    public: bool = False


@frozen(kw_only=True)
class FixedPort:
    """An old-style published port: host address and port, container port."""

    address: str = ""
    host_port: int
    container_port: int
    protocol: Literal["tcp", "udp"] = "tcp"


@frozen(kw_only=True)
class VolumeSpec:
    """A host path mounted into the container."""

    host_path: str
    container_path: str
    read_only: bool = False


@frozen(kw_only=True)
class ComponentSpec:
    """One container of a service; memory_bytes and cpu_cores are reservation and limit, 0 means none."""

    name: str
    image: str
    cmd: tuple[str, ...] = ()
    env: dict[str, str] = attrs.field(factory=dict)
    volumes: tuple[VolumeSpec, ...] = ()
    network: str = ""
    user: str = ""
    restart: str = "unless-stopped"
    ports: tuple[FixedPort, ...] = ()
    memory_bytes: int = 0
    cpu_cores: float = 0.0
    stop_grace_s: float = 10.0
    update: Update = "start-first"
    health: HealthSpec = attrs.field(factory=HealthSpec)
    routes: tuple[RouteSpec, ...] = ()


@frozen(kw_only=True)
class ServiceSpec:
    """A whole service definition, validated; `node` pins it and overrides `tier`."""

    name: str
    tier: Tier = "worker"
    node: str = ""
    active: bool = True
    version: str = ""
    components: tuple[ComponentSpec, ...]

    @property
    def memory_bytes(self) -> int:
        """What placement reserves for the whole service."""
        return sum(component.memory_bytes for component in self.components)

    @property
    def cpu_cores(self) -> float:
        """What placement reserves for the whole service."""
        return sum(component.cpu_cores for component in self.components)

    @property
    def images(self) -> tuple[str, ...]:
        """Every image, each once, in the order of the components."""
        return tuple(dict.fromkeys(component.image for component in self.components))

    @property
    def stops_first(self) -> bool:
        """Whether the old copy must be gone before the new one can start (a fixed port, or the definition says so)."""
        return any(c.update == "stop-first" or c.ports for c in self.components)


def spec_hash(spec: ServiceSpec) -> str:
    """Return 12 hex digits that change whenever anything of the definition does.

    Where a service runs is not part of it: `node`, `tier` and `active` say where and whether, not what.
    """
    plain = attrs.asdict(attrs.evolve(spec, node="", tier="worker", active=True))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
