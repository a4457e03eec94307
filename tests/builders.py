"""Builders of what tests are about: a test names the part it cares for, the rest is as usual.

service(image="web:v2", node="orion")
heartbeat(memory_free_bytes=4)
inventory(record(generation=3), node=node_facts(role="edge"))
"""

from __future__ import annotations

from typing import Any

import attrs

from mcp.model.messages import (
    ContainerState,
    Heartbeat,
    Inventory,
    NodeFacts,
    Register,
    Resources,
    ServiceRecord,
)
from mcp.model.names import container_name
from mcp.model.spec import ComponentSpec, RouteSpec, ServiceSpec, spec_hash

MIB = 1024**2
GIB = 1024**3

_OF_A_SERVICE = {field.name for field in attrs.fields(ServiceSpec)}
_OF_RESOURCES = {field.name for field in attrs.fields(Resources)}


def route(name: str = "", port: int = 8443, **more: Any) -> RouteSpec:
    """An internal route."""
    return RouteSpec(name=name, port=port, **more)


def component(name: str = "web", image: str = "web:v1", **more: Any) -> ComponentSpec:
    """A container."""
    return ComponentSpec(name=name, image=image, **more)


def service(name: str = "web", image: str = "web:v1", *components: ComponentSpec, **more: Any) -> ServiceSpec:
    """A service; of one component unless some are given: `more` may be of either."""
    of_service = {key: value for key, value in more.items() if key in _OF_A_SERVICE}
    of_component = {key: value for key, value in more.items() if key not in _OF_A_SERVICE}
    return ServiceSpec(name=name, components=components or (component(name, image, **of_component),), **of_service)


def resources(**more: Any) -> Resources:
    """A machine of 4 cores and 8 GiB, half of it free."""
    usual = Resources(
        cpu_cores=4.0,
        memory_bytes=8 * GIB,
        memory_free_bytes=4 * GIB,
        disk_bytes=100 * GIB,
        disk_free_bytes=50 * GIB,
    )
    return attrs.evolve(usual, **more)


def node_facts(**more: Any) -> NodeFacts:
    """What a worker says of itself."""
    usual = NodeFacts(
        incarnation="first",
        role="worker",
        address="100.64.0.2",
        arch="amd64",
        version="0.1",
        started_at="2026-01-01T00:00:00Z",
        boot_id="boot-1",
        engine="up",
        engine_version="27.0",
        resources=resources(),
    )
    return attrs.evolve(usual, **more)


def container(spec: ServiceSpec | None = None, generation: int = 1, **more: Any) -> ContainerState:
    """The running container of a service's first component."""
    spec = spec or service()
    first = spec.components[0]
    usual = ContainerState(
        service=spec.name,
        component=first.name,
        name=container_name(spec.name, first.name, generation),
        container_id="c0ffee",
        image=first.image,
        state="running",
        started_at="2026-01-01T00:00:00Z",
        spec_hash=spec_hash(spec),
        generation=generation,
    )
    return attrs.evolve(usual, **more)


def record(spec: ServiceSpec | None = None, generation: int = 1, **more: Any) -> ServiceRecord:
    """A service that runs, as its node tells of it."""
    spec = spec or service()
    usual = ServiceRecord(
        service=spec.name,
        op="op-1",
        generation=generation,
        spec=spec,
        spec_hash=spec_hash(spec),
        desired="running",
        containers=(container(spec, generation),),
    )
    return attrs.evolve(usual, **more)


def inventory(*services: ServiceRecord, node: NodeFacts | None = None, **more: Any) -> Inventory:
    """Everything a node knows."""
    return Inventory(facts=node or node_facts(), services=services, **more)


def register(*services: ServiceRecord, **more: Any) -> Register:
    """A node enters the fleet; `more` is of its inventory."""
    return Register(inventory=inventory(*services, **more))


def heartbeat(**more: Any) -> Heartbeat:
    """A sign of life; `more` may be of its resources too."""
    of_resources = {key: value for key, value in more.items() if key in _OF_RESOURCES}
    of_heartbeat = {key: value for key, value in more.items() if key not in _OF_RESOURCES}
    usual: dict[str, Any] = {"incarnation": "first", "sequence": 1, "engine": "up", "containers": 0}
    usual |= {"inventory_version": 0, "clock_s": 0.0, "resources": resources(**of_resources)}
    return Heartbeat(**{**usual, **of_heartbeat})
