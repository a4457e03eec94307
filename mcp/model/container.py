"""From a spec to what an engine is asked for, and back: labels from which an agent can rebuild what it has forgotten."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from mcp.model.names import container_name, is_service_name, port_variable
from mcp.model.ports import ContainerRequest, PortBinding
from mcp.model.spec import ComponentSpec, ServiceSpec, spec_hash
from mcp.model.values import frozen

LABEL = "net.metacircular.mcp."
OWNER_LABEL = LABEL + "owner"
OWNER = "mcp"
SERVICE_LABEL = LABEL + "service"
COMPONENT_LABEL = LABEL + "component"
GENERATION_LABEL = LABEL + "generation"
HASH_LABEL = LABEL + "spec-hash"
OP_LABEL = LABEL + "op"
NODE_LABEL = LABEL + "node"
SPEC_LABEL = LABEL + "spec"
PORTS_LABEL = LABEL + "ports"

_GENERATION = re.compile(r"[0-9]{1,11}")
_HOST_PORT = re.compile(r"[0-9A-Fa-f:.\[\]]{1,47}:[0-9]{1,5}")
_SHORT = 64
"""Longer than any hash or operation id of ours."""


@frozen(kw_only=True)
class ContainerDefaults:
    """What a node decides for its containers (mcp-agent.toml, [docker])."""

    node: str
    network: str = "mcpnet"
    publish_address: str = "127.0.0.1"


def container_request(
    service: ServiceSpec,
    component: ComponentSpec,
    *,
    generation: int,
    op: str,
    ports: Mapping[str, int],
    defaults: ContainerDefaults,
    spec_json: str,
) -> ContainerRequest:
    """Return what the engine is asked for.

    `ports` has the host port of each route; the container is told to listen on the same number, so one number is
    all that anybody has to know. `spec_json` is the whole spec, for the label.
    """
    network = component.network or defaults.network
    return ContainerRequest(
        name=container_name(service.name, component.name, generation),
        image=component.image,
        cmd=component.cmd,
        env=_environment(service, component, ports, defaults),
        labels={
            OWNER_LABEL: OWNER,
            SERVICE_LABEL: service.name,
            COMPONENT_LABEL: component.name,
            GENERATION_LABEL: str(generation),
            HASH_LABEL: spec_hash(service),
            OP_LABEL: op,
            NODE_LABEL: defaults.node,
            PORTS_LABEL: json.dumps({route: f"{defaults.publish_address}:{port}" for route, port in ports.items()}),
            SPEC_LABEL: spec_json,
        },
        binds=tuple(f"{v.host_path}:{v.container_path}{':ro' if v.read_only else ''}" for v in component.volumes),
        network=network,
        user=component.user,
        restart=component.restart,
        ports=() if network == "host" else _bindings(component, ports, defaults),
        memory_bytes=component.memory_bytes,
        cpu_cores=component.cpu_cores,
        stop_grace_s=component.stop_grace_s,
    )


def _environment(
    service: ServiceSpec, component: ComponentSpec, ports: Mapping[str, int], defaults: ContainerDefaults
) -> dict[str, str]:
    env = {**component.env, **{port_variable(route): str(port) for route, port in ports.items()}}
    if len(ports) == 1:  # programs know PORT, whatever the route is called
        env.setdefault("PORT", str(next(iter(ports.values()))))
    return {**env, "MCP_SERVICE": service.name, "MCP_COMPONENT": component.name, "MCP_NODE": defaults.node}


def _bindings(
    component: ComponentSpec, ports: Mapping[str, int], defaults: ContainerDefaults
) -> tuple[PortBinding, ...]:
    routes = (PortBinding(address=defaults.publish_address, host_port=p, container_port=p) for p in ports.values())
    fixed = (
        PortBinding(
            address=port.address.strip("[]") or defaults.publish_address,
            host_port=port.host_port,
            container_port=port.container_port,
            protocol=port.protocol,
        )
        for port in component.ports
    )
    return (*routes, *fixed)


@frozen(kw_only=True)
class Labels:
    """What the labels of one of our containers say."""

    service: str
    component: str
    generation: int
    spec_hash: str
    op: str
    ports: dict[str, str]
    spec_json: str


def read_labels(labels: Mapping[str, str]) -> Labels | None:
    """Return what labels say; None when they are not ours or make no sense (anybody can label a container)."""
    if labels.get(OWNER_LABEL) != OWNER:
        return None
    text = {name: value for name, value in labels.items() if isinstance(value, str)}
    service, component = text.get(SERVICE_LABEL, ""), text.get(COMPONENT_LABEL, "")
    generation = text.get(GENERATION_LABEL, "")
    if not (is_service_name(service) and is_service_name(component) and _GENERATION.fullmatch(generation)):
        return None
    return Labels(
        service=service,
        component=component,
        generation=int(generation),
        spec_hash=text.get(HASH_LABEL, "")[:_SHORT],
        op=text.get(OP_LABEL, "")[:_SHORT],
        ports=_ports_in(text.get(PORTS_LABEL, "")),
        spec_json=text.get(SPEC_LABEL, ""),
    )


def _ports_in(text: str) -> dict[str, str]:
    """Read the ports of routes; what nobody of us wrote counts as no ports at all."""
    try:
        ports = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    is_ours = isinstance(ports, dict) and all(isinstance(v, str) and _HOST_PORT.fullmatch(v) for v in ports.values())
    return ports if is_ours else {}
