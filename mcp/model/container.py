"""From a spec to what an engine is asked for, and back: labels from which an agent can rebuild what it has forgotten."""

from __future__ import annotations

import json
from collections.abc import Mapping

import attrs

from mcp.model.names import container_name, is_service_name
from mcp.model.ports import ContainerRequest, PortBinding
from mcp.model.spec import ComponentSpec, ServiceSpec, spec_hash

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


@attrs.frozen(kw_only=True)
class ContainerDefaults:
    """What a node decides for its containers (mcp-agent.toml, [docker])."""

    node: str
    network: str = "mcpnet"
    publish_address: str = "127.0.0.1"


def port_variable(route: str) -> str:
    """Return the variable that tells a container its port: PORT, or PORT_<NAME> for a named route."""
    return "PORT" if not route else "PORT_" + route.upper().replace("-", "_")


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
    env = {
        "MCP_SERVICE": service.name,
        "MCP_COMPONENT": component.name,
        "MCP_NODE": defaults.node,
        **component.env,
        **{port_variable(route): str(port) for route, port in ports.items()},
    }
    if len(ports) == 1:
        env.setdefault("PORT", str(next(iter(ports.values()))))
    network = component.network or defaults.network
    bindings = [
        PortBinding(address=defaults.publish_address, host_port=port, container_port=port) for port in ports.values()
    ]
    bindings += [
        PortBinding(
            address=fixed.address.strip("[]") or defaults.publish_address,
            host_port=fixed.host_port,
            container_port=fixed.container_port,
            protocol=fixed.protocol,
        )
        for fixed in component.ports
    ]
    return ContainerRequest(
        name=container_name(service.name, component.name, generation),
        image=component.image,
        cmd=component.cmd,
        env=env,
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
        binds=tuple(
            f"{v.host_path}:{v.container_path}{':ro' if v.read_only else ''}" for v in component.volumes
        ),
        network=network,
        user=component.user,
        restart=component.restart,
        ports=() if network == "host" else tuple(bindings),
        memory_bytes=component.memory_bytes,
        cpu_cores=component.cpu_cores,
        stop_grace_s=component.stop_grace_s,
    )


@attrs.frozen(kw_only=True)
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
    service, component = labels.get(SERVICE_LABEL, ""), labels.get(COMPONENT_LABEL, "")
    generation = labels.get(GENERATION_LABEL, "")
    if not (is_service_name(service) and is_service_name(component)):
        return None
    if not (generation.isascii() and generation.isdigit() and 0 < len(generation) < 12):
        return None
    try:
        ports = json.loads(labels.get(PORTS_LABEL, "{}"))
    except ValueError:
        ports = {}
    if not isinstance(ports, dict) or not all(isinstance(v, str) for v in ports.values()):
        ports = {}
    return Labels(
        service=service,
        component=component,
        generation=int(generation),
        spec_hash=labels.get(HASH_LABEL, "")[:64],
        op=labels.get(OP_LABEL, "")[:64],
        ports=ports,
        spec_json=labels.get(SPEC_LABEL, ""),
    )
