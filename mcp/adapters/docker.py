"""The container engine through its Docker-compatible API: images, containers, their output and events.

It translates calls and errors and decides nothing. What the engine really does is in docs/engine.md; the numbers in
comments below are the quirks listed there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import struct
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import aiodocker
import aiohttp

from mcp.adapters.docker_errors import translate
from mcp.model.container import GENERATION_LABEL, HASH_LABEL, OWNER, OWNER_LABEL, SERVICE_LABEL, read_labels
from mcp.model.errors import AdapterError
from mcp.model.messages import ContainerState, ImageFacts, LogLine
from mcp.model.ports import ContainerRequest, EngineEvent, EngineFacts, Progress

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
"""For calls that a well engine answers in milliseconds."""

START_TIMEOUT_S = 60.0
"""Creating and starting take 0.2 s on a quiet machine; an image with huge layers or a busy disk takes long."""

REGISTRY_TIMEOUT_S = 15.0
"""For the question which platforms an image has; a black-holed registry would take the engine 30 s."""

PULL_SILENCE_S = 90.0
"""A pull may take hours, but not this long without a word; the engine itself gives up on a dead registry after 30 s."""

PROGRESS_EVERY_S = 0.25
RETRY_EVENTS_S = 0.3

_NO_NETWORK_OF_OURS = frozenset({"host", "none", "bridge", "default"})
_EVENTS: Mapping[str, Literal["create", "start", "die", "stop", "destroy", "oom", "health"]] = {
    "create": "create", "start": "start", "die": "die", "stop": "stop", "destroy": "destroy", "remove": "destroy", "oom": "oom",
}  # fmt: skip


class DockerEngine:
    """Implements Images, Containers and ContainerOutput (mcp/model/ports.py) on one engine."""

    def __init__(
        self,
        url: str,
        *,
        registries: Mapping[str, tuple[str, str]] | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
    ) -> None:
        self._url = url
        self._registries = dict(registries or {})
        self._timeout_s = request_timeout_s
        self._client: aiodocker.Docker | None = None
        self._networks: set[str] = set()

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.session.close()

    # ------------------------------------------------------------------- images

    async def describe(self, image: str) -> ImageFacts:
        """Say for which platforms an image exists, without pulling (see Images)."""
        try:
            local = await self._local_image(image)
            if local is not None:
                return local
            return await self._remote_image(image)
        except AdapterError as error:
            return ImageFacts(image=image, error=error.reason)

    async def _local_image(self, image: str) -> ImageFacts | None:
        try:
            async with self._call(f"look at image {image}") as docker:
                found = await docker.images.inspect(image)
        except AdapterError as error:
            if error.code == "image_missing":
                return None
            raise
        digests = found.get("RepoDigests") or []
        return ImageFacts(
            image=image,
            platforms=(found.get("Architecture", ""),) if found.get("Architecture") else (),
            is_local=True,
            digest=digests[0].rpartition("@")[2] if digests else "",
        )

    async def _remote_image(self, image: str) -> ImageFacts:
        headers = {}
        if auth := self._auth(image):
            headers["X-Registry-Auth"] = aiodocker.utils.compose_auth_header(auth, _registry_of(image))
        async with self._call(f"ask for the platforms of {image}", REGISTRY_TIMEOUT_S) as docker:
            found = await docker._query_json(f"distribution/{image}/json", headers=headers)  # noqa: SLF001 - no public call
        platforms = tuple(dict.fromkeys(p["architecture"] for p in found.get("Platforms") or [] if p.get("architecture") not in ("", "unknown")))
        return ImageFacts(image=image, platforms=platforms, digest=found.get("Descriptor", {}).get("digest", ""))

    async def pull(self, image: str, on_progress: Progress) -> bool:
        """Fetch an image unless it is there (see Images)."""
        if await self._local_image(image) is not None:
            return False
        layers: dict[str, tuple[int, int]] = {}
        said_s = 0.0
        loop = asyncio.get_running_loop()
        async with self._call(f"pull {image}", None) as docker:
            stream = docker.images.pull(image, auth=self._auth(image), stream=True)
            while True:
                try:
                    async with asyncio.timeout(PULL_SILENCE_S):
                        item = await anext(stream)
                except StopAsyncIteration:
                    return True
                detail = item.get("progressDetail") or {}
                if item.get("id") and detail.get("total"):
                    layers[item["id"]] = (int(detail.get("current", 0)), int(detail["total"]))
                if loop.time() - said_s >= PROGRESS_EVERY_S:
                    said_s = loop.time()
                    done, total = (sum(each) for each in zip(*layers.values(), strict=True)) if layers else (0, 0)
                    on_progress(f"{image}: {item.get('status', '').lower()}", done, total)

    def _auth(self, image: str) -> dict[str, str] | None:
        known = self._registries.get(_registry_of(image))
        return {"username": known[0], "password": known[1]} if known else None

    # --------------------------------------------------------------- containers

    async def facts(self) -> EngineFacts:
        """Return what the engine says of itself (see Containers)."""
        async with self._call("ask the engine for its version") as docker:
            said = await docker.version()
        return EngineFacts(
            version=said.get("Version", ""),
            api_version=said.get("ApiVersion", ""),
            arch=said.get("Arch", ""),
            name="podman" if "Podman" in str(said.get("Components", "")) else "docker",
        )

    async def list(self, service: str = "") -> list[ContainerState]:
        """Return our containers (see Containers)."""
        labels = [f"{OWNER_LABEL}={OWNER}"] + ([f"{SERVICE_LABEL}={service}"] if service else [])
        async with self._call("list the containers") as docker:
            found = await docker.containers.list(all=True, filters={"label": labels})
            states = []
            for each in found:
                try:
                    states.append(_state(await each.show()))
                except aiodocker.DockerError as error:
                    if error.status != 404:  # gone since it was listed
                        raise
        return sorted((state for state in states if state), key=lambda s: s.name)

    async def label(self, service: str, generation: int, name: str) -> str:
        """Return a label of a generation's containers (see Containers)."""
        wanted = [f"{OWNER_LABEL}={OWNER}", f"{SERVICE_LABEL}={service}", f"{GENERATION_LABEL}={generation}"]
        async with self._call(f"read the labels of {service}") as docker:
            for each in await docker.containers.list(all=True, filters={"label": wanted}):
                if value := (each["Labels"] or {}).get(name):
                    return str(value)
        return ""

    async def create(self, request: ContainerRequest) -> ContainerState:
        """Create and do not start; ours of the same name and hash is adopted (see Containers)."""
        await self._ensure_network(request.network)
        try:
            async with self._call(f"create container {request.name}", START_TIMEOUT_S) as docker:
                made = await docker.containers.create(_config(request), name=request.name)
                return _created(request, made.id)
        except AdapterError as error:
            if error.code == "network_missing":
                self._networks.discard(request.network)
            if error.code != "name_taken":
                raise
            return await self._adopt(request, error)

    async def _adopt(self, request: ContainerRequest, taken: AdapterError) -> ContainerState:
        raw = await self._inspect(request.name)
        state = _state(raw) if raw else None
        if state is None or state.spec_hash != request.labels.get(HASH_LABEL):
            raise AdapterError(
                f"cannot create container {request.name}: another container has that name",
                code="name_taken",
                hint=f"`docker inspect {request.name}` shows whose it is; remove or rename it.",
            ) from taken
        return state

    async def start(self, name: str) -> ContainerState:
        """Start a container (see Containers)."""
        async with self._call(f"start container {name}", START_TIMEOUT_S) as docker:
            container = docker.containers.container(name)
            await container.start()
            state = _state(await container.show())
        if state is None:
            raise AdapterError(f"cannot start container {name}: it is not ours", code="name_taken")
        return state

    async def stop(self, name: str, grace_s: float) -> ContainerState | None:
        """Stop a container (see Containers)."""
        try:
            async with self._call(f"stop container {name}", grace_s + self._timeout_s) as docker:
                container = docker.containers.container(name)
                await container.stop(t=max(0, round(grace_s)))
                return _state(await container.show())
        except AdapterError as error:
            if error.code == "container_missing":
                return None
            raise

    async def remove(self, name: str) -> bool:
        """Remove a container (see Containers)."""
        try:
            async with self._call(f"remove container {name}", START_TIMEOUT_S) as docker:
                await docker.containers.container(name).delete(force=True, v=True)
        except AdapterError as error:
            if error.code == "container_missing":
                return False
            if error.code != "removal_in_progress":
                raise
        return True

    async def labels(self, name: str) -> Mapping[str, str]:
        """Return the labels of a container, {} when there is none (see Containers)."""
        raw = await self._inspect(name)
        found: Mapping[str, str] = (raw or {}).get("Config", {}).get("Labels") or {}
        return found

    async def _inspect(self, name: str) -> dict[str, Any] | None:
        try:
            async with self._call(f"look at container {name}") as docker:
                shown: dict[str, Any] = await docker.containers.container(name).show()
                return shown
        except AdapterError as error:
            if error.code == "container_missing":
                return None
            raise

    async def _ensure_network(self, name: str) -> None:
        """Make the network of our containers where it is missing; looked up once for each life of the client."""
        if not name or name in self._networks or name in _NO_NETWORK_OF_OURS or name.startswith("container:"):
            return
        async with self._call(f"make network {name}") as docker:
            found = await docker.networks.list(filters={"name": [name]})
            if not any(each["Name"] == name for each in found):
                config = {"Name": name, "Driver": "bridge", "CheckDuplicate": True, "Labels": {OWNER_LABEL: OWNER}}
                try:
                    await docker.networks.create(config)
                except aiodocker.DockerError as error:
                    if error.status != 409:  # somebody else was quicker
                        raise
        self._networks.add(name)

    # ------------------------------------------------------------------- output

    async def logs(
        self, name: str, *, follow: bool = False, tail: int = -1, since_s: float = 0.0
    ) -> AsyncIterator[LogLine]:
        """Yield whole lines with time stamps (see ContainerOutput)."""
        params = {
            "stdout": "1", "stderr": "1", "timestamps": "1", "follow": "1" if follow else "0",
            "tail": "all" if tail < 0 else str(tail),
        }  # fmt: skip
        if since_s > 0:
            params["since"] = f"{time.time() - since_s:.9f}"  # compared with stamps of the same machine
        component = await self._component_of(name)
        splitter = _Lines(component, name)
        # The stream may be silent for days, so there is no limit on it; the head of the answer has one.
        limits = aiohttp.ClientTimeout(sock_connect=self._timeout_s)
        async with self._call(f"read the logs of {name}", None) as docker:
            query = docker._query(f"containers/{name}/logs", params=params, timeout=limits)  # noqa: SLF001 - raw frames wanted
            async with query as response:
                async for chunk in response.content.iter_any():
                    for line in splitter.feed(chunk):
                        yield line
        for line in splitter.rest():
            yield line

    async def _component_of(self, name: str) -> str:
        raw = await self._inspect(name)
        if raw is None:
            raise AdapterError(f"cannot read the logs of {name}: there is no such container", code="container_missing")
        labels = read_labels(raw.get("Config", {}).get("Labels") or {})
        return labels.component if labels else name

    async def events(self) -> AsyncIterator[EngineEvent]:
        """Yield events for ever, with engine-down and engine-up in between (see ContainerOutput)."""
        is_up: bool | None = None
        while True:
            try:
                async for event in self._event_stream():
                    if is_up is False or (is_up is None and event.action == "engine-up"):
                        yield EngineEvent(action="engine-up")
                    is_up = True
                    if event.action != "engine-up":
                        yield event
                reason = "its event stream ended"
            except AdapterError as error:
                reason = error.reason
            if is_up is not False:
                is_up = False
                yield EngineEvent(action="engine-down", detail=reason)
            await self._renew()
            await asyncio.sleep(RETRY_EVENTS_S)

    async def _event_stream(self) -> AsyncIterator[EngineEvent]:
        """Yield `engine-up` when the engine answers, then its events until the stream ends.

        aiodocker's own event channel never yields again after the engine went away (quirk 3), so the stream is read here.
        """
        filters = json.dumps({"label": [f"{OWNER_LABEL}={OWNER}"], "type": ["container"]})
        await self.facts()
        limits = aiohttp.ClientTimeout(sock_connect=self._timeout_s)
        async with self._call("hear the engine's events", None) as docker:
            query = docker._query("events", params={"filters": filters}, timeout=limits)  # noqa: SLF001 - see above
            async with query as response:
                yield EngineEvent(action="engine-up")
                async for line in response.content:
                    if event := _event(line):
                        yield event

    async def execute(self, name: str, cmd: Sequence[str], timeout_s: float) -> tuple[int, str]:
        """Run a command in a container (see ContainerOutput)."""
        said = b""
        async with self._call(f"run {cmd[0]!r} in {name}", timeout_s) as docker:
            run = await docker.containers.container(name).exec(list(cmd), stdin=False, tty=False)
            async with run.start(detach=False) as stream:
                while (message := await stream.read_out()) is not None:
                    said = (said + message.data)[:4096]
            code = (await run.inspect()).get("ExitCode")
        return (-1 if code is None else int(code)), said.decode(errors="replace")

    # ------------------------------------------------------------------ helpers

    @asynccontextmanager
    async def _call(self, what: str, timeout_s: float | None = 0.0) -> AsyncIterator[aiodocker.Docker]:
        """Give a client for one call, with a deadline (0: the usual one, None: none), and our errors for the engine's."""
        limit = self._timeout_s if timeout_s == 0.0 else timeout_s
        try:
            async with asyncio.timeout(limit):
                yield self._docker()
        except (aiodocker.DockerError, aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise translate(error, what, limit) from error

    def _docker(self) -> aiodocker.Docker:
        if self._client is None:
            limits = aiohttp.ClientTimeout(sock_connect=self._timeout_s)
            self._client = aiodocker.Docker(url=self._url, timeout=limits)
        return self._client

    async def _renew(self) -> None:
        """Begin with a new client: the engine may come back as another version (quirk 9)."""
        self._networks.clear()
        await self.close()


# ------------------------------------------------------------------ translation


def _config(request: ContainerRequest) -> dict[str, Any]:
    policy, _, count = request.restart.partition(":")
    exposed = {f"{p.container_port}/{p.protocol}": {} for p in request.ports}
    bindings: dict[str, list[dict[str, str]]] = {}
    for port in request.ports:
        bindings.setdefault(f"{port.container_port}/{port.protocol}", []).append(
            {"HostIp": port.address, "HostPort": str(port.host_port)}
        )
    host: dict[str, Any] = {
        "Binds": list(request.binds),
        "PortBindings": bindings,
        "RestartPolicy": {"Name": policy, "MaximumRetryCount": int(count or 0)},
    }
    if request.network:
        host["NetworkMode"] = request.network
    if request.memory_bytes:
        host["Memory"] = request.memory_bytes
    if request.cpu_cores:
        host["NanoCpus"] = int(request.cpu_cores * 1e9)
    config: dict[str, Any] = {
        "Image": request.image,
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "Labels": dict(request.labels),
        "ExposedPorts": exposed,
        "HostConfig": host,
        "StopTimeout": max(0, round(request.stop_grace_s)),
    }
    if request.cmd:
        config["Cmd"] = list(request.cmd)
    if request.user:
        config["User"] = request.user
    return config


def _created(request: ContainerRequest, container_id: str) -> ContainerState:
    labels = read_labels(request.labels)
    assert labels is not None
    return ContainerState(
        service=labels.service,
        component=labels.component,
        name=request.name,
        container_id=container_id,
        image=request.image,
        state="created",
        spec_hash=labels.spec_hash,
        generation=labels.generation,
        ports=labels.ports,
    )


def _state(raw: Mapping[str, Any]) -> ContainerState | None:
    """Return a container as we see it; None when it is not ours."""
    config, state = raw.get("Config") or {}, raw.get("State") or {}
    labels = read_labels(config.get("Labels") or {})
    if labels is None:
        return None
    status = state.get("Status", "")
    known = ("created", "running", "restarting", "exited", "paused", "dead")
    health = (state.get("Health") or {}).get("Status", "none")
    return ContainerState(
        service=labels.service,
        component=labels.component,
        name=str(raw.get("Name", "")).lstrip("/"),
        container_id=raw.get("Id", ""),
        image=config.get("Image", ""),
        state=status if status in known else "dead",
        health=health if health in ("healthy", "unhealthy", "starting") else "none",
        exit_code=int(state.get("ExitCode") or 0),
        out_of_memory=bool(state.get("OOMKilled")),
        restarts=int(raw.get("RestartCount") or 0),
        started_at=_time(state.get("StartedAt", "")),
        finished_at=_time(state.get("FinishedAt", "")),
        spec_hash=labels.spec_hash,
        generation=labels.generation,
        ports=labels.ports,
        problem=str(state.get("Error") or "")[:500] if status not in ("running", "restarting") else "",
    )


def _time(text: str) -> str:
    return "" if text.startswith("0001-") else text


def _event(line: bytes) -> EngineEvent | None:
    try:
        said = json.loads(line)
    except ValueError:
        return None
    action, actor = str(said.get("Action", "")), said.get("Actor") or {}
    attributes = actor.get("Attributes") or {}
    labels = read_labels(attributes)
    if labels is None:
        return None
    if action.startswith("health_status"):
        kind, detail = "health", action.partition(":")[2].strip()
    elif action in _EVENTS:
        kind, detail = _EVENTS[action], f"exit code {attributes.get('exitCode')}" if action == "die" else ""
    else:
        return None
    return EngineEvent(action=kind, name=attributes.get("name", ""), service=labels.service, detail=detail)  # type: ignore[arg-type]


def _registry_of(image: str) -> str:
    first, slash, _ = image.partition("/")
    return first if slash and ("." in first or ":" in first or first == "localhost") else "docker.io"


class _Lines:
    """Splits the multiplexed stream of a container's log into lines.

    Each frame has an 8-byte head (stream, length); frames are pieces of at most 16 KiB, not lines, and a long line is
    several frames, each with a time stamp of its own.
    """

    def __init__(self, component: str, container: str) -> None:
        self._component = component
        self._container = container
        self._buffer = b""
        self._open: dict[str, tuple[str, bytes]] = {}

    def feed(self, chunk: bytes) -> list[LogLine]:
        """Take bytes in and return the lines they complete."""
        self._buffer += chunk
        lines: list[LogLine] = []
        while len(self._buffer) >= 8:
            kind, length = struct.unpack(">BxxxL", self._buffer[:8])
            if len(self._buffer) < 8 + length:
                break
            payload, self._buffer = self._buffer[8 : 8 + length], self._buffer[8 + length :]
            lines += self._take("stderr" if kind == 2 else "stdout", payload)
        return lines

    def rest(self) -> list[LogLine]:
        """Return what was begun and never ended with a line break."""
        left, self._open = self._open, {}
        return [self._line(stream, at, text) for stream, (at, text) in left.items()]

    def _take(self, stream: str, payload: bytes) -> list[LogLine]:
        stamp, _, text = payload.partition(b" ")
        at, before = self._open.pop(stream, (stamp.decode(errors="replace"), b""))
        whole = before + text
        if not whole.endswith(b"\n") and len(whole) < 64 * 1024:
            self._open[stream] = (at, whole)
            return []
        return [self._line(stream, at, whole.rstrip(b"\r\n"))]

    def _line(self, stream: str, at: str, text: bytes) -> LogLine:
        return LogLine(
            at=at,
            component=self._component,
            container=self._container,
            stream=stream,  # type: ignore[arg-type]
            text=text.decode(errors="replace"),
        )
