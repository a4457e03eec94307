"""Requests into the engine's shapes and the engine's shapes into ours; no I/O.

Only what every API version has is read: Action and Actor of events, State and Config of containers (docs/engine.md).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from typing import Any, Literal

from mcp.model.container import read_labels
from mcp.model.messages import ContainerState, ImageFacts
from mcp.model.ports import ContainerRequest, EngineEvent

Action = Literal["create", "start", "die", "stop", "destroy", "oom", "health"]

_ACTIONS: Mapping[str, Action] = {
    "create": "create",
    "start": "start",
    "die": "die",
    "stop": "stop",
    "destroy": "destroy",
    "remove": "destroy",  # podman's word
    "oom": "oom",
}
_STATES = ("created", "running", "restarting", "exited", "paused", "dead")
_WORDS_OF_TROUBLE = 500


def container_config(request: ContainerRequest) -> dict[str, Any]:
    """Return the body of a create call."""
    policy, _, retries = request.restart.partition(":")
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in request.ports:
        bindings.setdefault(f"{port.container_port}/{port.protocol}", []).append(
            {"HostIp": port.address, "HostPort": str(port.host_port)}
        )
    config: dict[str, Any] = {
        "Image": request.image,
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "Labels": dict(request.labels),
        "ExposedPorts": {port: {} for port in bindings},
        "StopTimeout": max(0, round(request.stop_grace_s)),
        "HostConfig": {
            "Binds": list(request.binds),
            "PortBindings": bindings,
            "RestartPolicy": {"Name": policy, "MaximumRetryCount": int(retries or 0)},
            "Memory": request.memory_bytes,
            "NanoCpus": int(request.cpu_cores * 1e9),
        },
    }
    if request.network:
        config["HostConfig"]["NetworkMode"] = request.network
    if request.cmd:
        config["Cmd"] = list(request.cmd)
    if request.user:
        config["User"] = request.user
    return config


def created_state(request: ContainerRequest, container_id: str) -> ContainerState:
    """Return the state of a container that was made this moment; looking at it would tell nothing new."""
    labels = read_labels(request.labels)
    return ContainerState(
        service=labels.service if labels else "",
        component=labels.component if labels else "",
        name=request.name,
        container_id=container_id,
        image=request.image,
        state="created",
        spec_hash=labels.spec_hash if labels else "",
        generation=labels.generation if labels else 0,
        ports=labels.ports if labels else {},
    )


def container_state(shown: Mapping[str, Any]) -> ContainerState | None:
    """Return a container as we see it; None when it is not ours."""
    config, state = shown.get("Config") or {}, shown.get("State") or {}
    labels = read_labels(config.get("Labels") or {})
    if labels is None:
        return None
    status = state.get("Status", "")
    health = (state.get("Health") or {}).get("Status", "none")
    return ContainerState(
        service=labels.service,
        component=labels.component,
        name=name_of(shown),
        container_id=shown.get("Id", ""),
        image=config.get("Image", ""),
        state=status if status in _STATES else "dead",
        health=health if health in ("healthy", "unhealthy", "starting") else "none",
        exit_code=int(state.get("ExitCode") or 0),
        out_of_memory=bool(state.get("OOMKilled")),
        restarts=int(shown.get("RestartCount") or 0),
        started_at=_time(state.get("StartedAt", "")),
        finished_at=_time(state.get("FinishedAt", "")),
        spec_hash=labels.spec_hash,
        generation=labels.generation,
        ports=labels.ports,
        problem="" if status in ("running", "restarting") else str(state.get("Error") or "")[:_WORDS_OF_TROUBLE],
    )


def name_of(shown: Mapping[str, Any]) -> str:
    """Return a container's name as people write it."""
    return str(shown.get("Name", "")).lstrip("/")


def labels_of(shown: Mapping[str, Any]) -> Mapping[str, str]:
    """Return a container's labels."""
    labels: Mapping[str, str] = (shown.get("Config") or {}).get("Labels") or {}
    return labels


def _time(text: str) -> str:
    return "" if text.startswith("0001-") else text


def engine_event(line: bytes) -> EngineEvent | None:
    """Return one line of the event stream as we see it; None when it is nothing to us."""
    try:
        said = json.loads(line)
    except ValueError:
        return None
    attributes = (said.get("Actor") or {}).get("Attributes") or {}
    labels = read_labels(attributes)
    if labels is None:
        return None
    name = str(attributes.get("name", ""))
    word, _, rest = str(said.get("Action", "")).partition(":")
    if word == "health_status":
        return EngineEvent(action="health", name=name, service=labels.service, detail=rest.strip())
    action = _ACTIONS.get(word)
    if action is None:
        return None
    detail = f"exit code {attributes.get('exitCode')}" if action == "die" else ""
    return EngineEvent(action=action, name=name, service=labels.service, detail=detail)


def local_image(image: str, shown: Mapping[str, Any]) -> ImageFacts:
    """Return what an engine knows of an image that it has."""
    digests, arch = shown.get("RepoDigests") or [], shown.get("Architecture")
    return ImageFacts(
        image=image,
        platforms=(arch,) if arch else (),
        is_local=True,
        digest=digests[0].rpartition("@")[2] if digests else "",
    )


def remote_image(image: str, shown: Mapping[str, Any]) -> ImageFacts:
    """Return what a registry says of an image; attestations call their platform "unknown"."""
    named = (platform.get("architecture", "") for platform in shown.get("Platforms") or [])
    platforms = tuple(dict.fromkeys(arch for arch in named if arch not in ("", "unknown")))
    return ImageFacts(image=image, platforms=platforms, digest=(shown.get("Descriptor") or {}).get("digest", ""))


def registry_of(image: str) -> str:
    """Return the registry of an image by the engine's rule: the first part, when it looks like a host."""
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


def registry_headers(image: str, registries: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Return the header that lets the engine log in where the image lies; {} where nobody is to log in."""
    registry = registry_of(image)
    if registry not in registries:
        return {}
    user, password = registries[registry]
    login = {"username": user, "password": password, "serveraddress": registry}
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(login).encode()).decode("ascii")}
