"""The container engine through its Docker-compatible API: images, containers, their output and events.

It translates calls and errors and decides nothing. What the engine really does is in docs/engine.md.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiodocker

from mcp.adapters.docker_client import EngineClient
from mcp.adapters.docker_shapes import (
    container_config,
    container_state,
    created_state,
    engine_event,
    labels_of,
    local_image,
    name_of,
    registry_headers,
    remote_image,
)
from mcp.adapters.docker_streams import LogSplitter, PullProgress, json_lines, stream_error
from mcp.model.container import GENERATION_LABEL, HASH_LABEL, NODE_LABEL, OWNER, OWNER_LABEL, SERVICE_LABEL, read_labels
from mcp.model.errors import AdapterError
from mcp.model.messages import ContainerState, ImageFacts, LogLine
from mcp.model.ports import ContainerRequest, EngineEvent, EngineFacts, Progress

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_S = 10.0
"""For calls that a well engine answers in milliseconds; also how long it may be deaf to a ping during a long one."""

START_TIMEOUT_S = 60.0
"""Creating and starting take 0.2 s on a quiet machine, and long with huge layers or on a busy disk (docs/engine.md)."""

REGISTRY_TIMEOUT_S = 15.0
"""For the question which platforms an image has; a black-holed registry would take the engine 30 s."""

PULL_SILENCE_S = 90.0
"""A pull may take hours, but not this long without a word; the engine itself gives up on a dead registry after 30 s."""

PROGRESS_EVERY_S = 0.25

RETRY_EVENTS_S = 0.3
RETRY_EVENTS_AT_MOST_S = 5.0
STREAM_HELD_S = 1.0
"""How soon an engine that is away is asked again; an event stream that did not hold this long is asked for ever later."""

INSPECTIONS_AT_ONCE = 10
OUTPUT_BYTES = 4096

_NOT_OURS_TO_MAKE = frozenset({"", "host", "none", "bridge", "default"})


class DockerEngine:
    """Implements Images, Containers and ContainerOutput (mcp/model/ports.py) on one engine.

    `registries` has user and password by registry, as it is written in image names ("registry.example:8443"). With `node`
    only that node's containers are looked at: several agents then share one engine, as in the demo. With `arch` images are
    wanted for that architecture, whatever the engine would take by itself; one that is here for another does not count.
    """

    def __init__(
        self,
        url: str,
        registries: Mapping[str, tuple[str, str]] | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        *,
        start_timeout_s: float = START_TIMEOUT_S,
        pull_silence_s: float = PULL_SILENCE_S,
        node: str = "",
        arch: str = "",
    ) -> None:
        self._arch = arch
        self._registries = dict(registries or {})
        secrets = [password for _, password in self._registries.values()]
        self._client = EngineClient(url, request_timeout_s, secrets)
        self._start_timeout_s = start_timeout_s
        self._pull_silence_s = pull_silence_s
        self._networks: set[str] = set()
        self._making_networks = asyncio.Lock()
        self._node = node
        self._mine = [f"{OWNER_LABEL}={OWNER}", *([f"{NODE_LABEL}={node}"] if node else [])]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    # ------------------------------------------------------------------- images

    async def describe(self, image: str) -> ImageFacts:
        """Say for which platforms an image exists, without pulling (see Images)."""
        try:
            shown = await self._image(image)
            if shown is not None and self._suits(shown):
                return local_image(image, shown)
            return await self._remote_image(image)
        except AdapterError as error:
            return ImageFacts(image=image, error=error.reason)

    def _suits(self, shown: Mapping[str, Any]) -> bool:
        return not self._arch or shown.get("Architecture") in ("", None, self._arch)

    async def _image(self, image: str) -> dict[str, Any] | None:
        async with self._client.call(f"look at image {image}") as docker:
            try:
                shown: dict[str, Any] = await docker.images.inspect(image)
            except aiodocker.DockerError as error:
                if error.status in (400, 404):  # 400: no name that an image can have
                    return None
                raise
            return shown

    async def _remote_image(self, image: str) -> ImageFacts:
        what = f"ask for the platforms of {image}"
        async with self._client.call(what, REGISTRY_TIMEOUT_S, registry=True) as docker:
            # The library has no call for this endpoint.
            shown = await docker._query_json(  # noqa: SLF001
                f"distribution/{image}/json", headers=registry_headers(image, self._registries)
            )
        return remote_image(image, shown)

    async def pull(self, image: str, on_progress: Progress) -> bool:
        """Fetch an image unless it is there (see Images)."""
        shown = await self._image(image)
        if shown is not None and self._suits(shown):
            return False
        what, progress, said_s = f"pull {image}", PullProgress(), 0.0
        # Not the library's own pull: when the engine dies in the middle, that one ends as if all were well.
        async with self._client.stream(
            what,
            "images/create",
            method="POST",
            params={"fromImage": image, **({"platform": f"linux/{self._arch}"} if self._arch else {})},
            headers=registry_headers(image, self._registries),
            silence_s=self._pull_silence_s,
            registry=True,
        ) as chunks:
            async for line in json_lines(chunks):
                said, trouble = stream_error(line)
                if trouble:
                    raise aiodocker.DockerError(0, trouble)
                progress.take(said)
                if time.monotonic() - said_s >= PROGRESS_EVERY_S:
                    said_s = time.monotonic()
                    on_progress(f"{image}: {progress.status}", *progress.bytes)
        return True

    async def image_id(self, image: str) -> str:
        """Return the engine's id of an image, "" when it is not there."""
        shown = await self._image(image)
        return "" if shown is None else str(shown.get("Id", ""))

    async def load(self, archive: bytes) -> None:
        """Put the images of an archive, as `docker save` writes it, into the engine.

        Raises:
            AdapterError: the engine did not take them.
        """
        async with self._client.call("load images", self._start_timeout_s) as docker:
            await docker.images.import_image(io.BytesIO(archive))  # a stream: large bytes would hold up the loop

    # --------------------------------------------------------------- containers

    async def facts(self) -> EngineFacts:
        """Return what the engine says of itself (see Containers)."""
        async with self._client.call("ask the engine for its version") as docker:
            said = await docker.version()
        return EngineFacts(
            version=said.get("Version", ""),
            api_version=said.get("ApiVersion", ""),
            arch=said.get("Arch", ""),
            name="podman" if "Podman" in str(said.get("Components", "")) else "docker",
        )

    async def list(self, service: str = "") -> list[ContainerState]:
        """Return our containers (see Containers)."""
        labels = self._mine + ([f"{SERVICE_LABEL}={service}"] if service else [])
        async with self._client.call("list the containers") as docker:
            found = await docker.containers.list(all=True, filters={"label": labels})
        turns = asyncio.Semaphore(INSPECTIONS_AT_ONCE)

        async def look(container_id: str) -> dict[str, Any] | None:
            async with turns:
                return await self._inspect(container_id)

        # Exit codes, restarts and the reason of a failure are in an inspection only.
        shown = await asyncio.gather(*(look(each.id) for each in found))
        states = [container_state(each) for each in shown if each is not None]
        return sorted((state for state in states if state is not None), key=lambda state: state.name)

    async def label(self, service: str, generation: int, name: str) -> str:
        """Return a label of a generation's containers (see Containers)."""
        wanted = [*self._mine, f"{SERVICE_LABEL}={service}", f"{GENERATION_LABEL}={generation}"]
        async with self._client.call(f"read the labels of {service}") as docker:
            found = await docker.containers.list(all=True, filters={"label": wanted})
        return next((value for each in found if (value := str((each["Labels"] or {}).get(name, "")))), "")

    async def create(self, request: ContainerRequest) -> ContainerState:
        """Create and do not start; ours of the same name and hash is adopted (see Containers)."""
        await self._ensure_network(request.network)
        try:
            return await self._create(request)
        except AdapterError as error:
            if error.code != "name_taken":
                raise
            adopted = await self._adopt(request, error)
        return adopted or await self._create(request)

    async def _create(self, request: ContainerRequest) -> ContainerState:
        async with self._client.call(f"create container {request.name}", self._start_timeout_s) as docker:
            made = await docker.containers.create(container_config(request), name=request.name)
        return created_state(request, made.id)

    async def _adopt(self, request: ContainerRequest, taken: AdapterError) -> ContainerState | None:
        """Return our container of that name, None when it went away at this moment."""
        shown = await self._inspect(request.name)
        if shown is None:
            return None
        state = container_state(shown) if self._is_mine(shown) else None
        if state is None or state.spec_hash != request.labels.get(HASH_LABEL):
            raise AdapterError(
                f"cannot create container {request.name}: another container has that name",
                code="name_taken",
                hint=f"`docker inspect {request.name}` shows whose it is; remove or rename it.",
            ) from taken
        if shown["State"].get("Status") == "removing":
            await self._wait_until_gone(request.name)
            return None
        return state

    async def start(self, name: str) -> ContainerState:
        """Start a container (see Containers)."""
        try:
            shown = await self._start(name)
        except AdapterError as error:
            if error.code != "network_missing":
                raise
            # Somebody removed it since it was made; the container still names it.
            self._networks.clear()
            stopped = await self._inspect(name) or {}
            await self._ensure_network((stopped.get("HostConfig") or {}).get("NetworkMode", ""))
            shown = await self._start(name)
        state = container_state(shown)
        if state is None:
            raise AdapterError(f"cannot start container {name}: it is not ours", code="name_taken")
        return state

    async def _start(self, name: str) -> dict[str, Any]:
        async with self._client.call(f"start container {name}", self._start_timeout_s) as docker:
            container = docker.containers.container(name)
            await container.start()
            shown: dict[str, Any] = await container.show()
        return shown

    async def stop(self, name: str, grace_s: float) -> ContainerState | None:
        """Stop a container (see Containers); one that is not ours is left alone."""
        if await self._ours(name) is None:
            return None
        try:
            # Past the grace time the engine kills, and waits for the end of it.
            async with self._client.call(f"stop container {name}", grace_s + self._start_timeout_s) as docker:
                container = docker.containers.container(name)
                await container.stop(t=max(0, round(grace_s)))
                return container_state(await container.show())
        except AdapterError as error:
            if error.code == "container_missing":
                return None
            raise

    async def remove(self, name: str) -> bool:
        """Remove a container (see Containers); one that is not ours is left alone."""
        if await self._ours(name) is None:
            return False
        try:
            async with self._client.call(f"remove container {name}", self._start_timeout_s) as docker:
                await docker.containers.container(name).delete(force=True, v=True)
        except AdapterError as error:
            if error.code == "removal_in_progress":
                await self._wait_until_gone(name)
            elif error.code != "container_missing":
                raise
        return True

    async def _ours(self, name: str) -> dict[str, Any] | None:
        """Return a container if it is ours: an undo must not hit whoever took the name."""
        shown = await self._inspect(name)
        if shown is None or self._is_mine(shown):
            return shown
        log.warning("container left alone: it is not ours", extra={"container": name})
        return None

    def _is_mine(self, shown: Mapping[str, Any]) -> bool:
        labels = labels_of(shown)
        return read_labels(labels) is not None and (not self._node or labels.get(NODE_LABEL) == self._node)

    async def _inspect(self, name: str) -> dict[str, Any] | None:
        try:
            async with self._client.call(f"look at container {name}") as docker:
                shown: dict[str, Any] = await docker.containers.container(name).show()
        except AdapterError as error:
            if error.code == "container_missing":
                return None
            raise
        return shown

    async def _wait_until_gone(self, name: str) -> None:
        try:
            async with self._client.call(f"wait for the end of container {name}", self._start_timeout_s) as docker:
                await docker.containers.container(name).wait(condition="removed")
        except AdapterError as error:
            if error.code != "container_missing":
                raise

    async def _ensure_network(self, name: str) -> None:
        """Make the network of our containers where it is missing; looked up once."""
        if name in self._networks or name in _NOT_OURS_TO_MAKE or name.startswith("container:"):
            return
        async with self._making_networks, self._client.call(f"make network {name}", self._start_timeout_s) as docker:
            if name in self._networks:
                return
            if not await _networks_called(docker, name):
                config = {"Name": name, "Driver": "bridge", "CheckDuplicate": True, "Labels": {OWNER_LABEL: OWNER}}
                try:
                    await docker.networks.create(config)
                except aiodocker.DockerError as error:
                    if error.status != 409:  # somebody else was quicker
                        raise
            # Two that ask at the same moment both get one, and then no container can tell them apart.
            for spare in (await _networks_called(docker, name))[1:]:
                with suppress(aiodocker.DockerError):  # the other one removes the same
                    await (await docker.networks.get(spare)).delete()
        self._networks.add(name)

    # ------------------------------------------------------------------- output

    async def logs(
        self, name: str, *, follow: bool = False, tail: int = -1, since_s: float = 0.0
    ) -> AsyncIterator[LogLine]:
        """Yield whole lines with time stamps (see ContainerOutput)."""
        before = await self._inspect(name)
        if before is None:
            raise AdapterError(f"cannot read the logs of {name}: there is no such container", code="container_missing")
        params = {
            "stdout": "1",
            "stderr": "1",
            "timestamps": "1",
            "follow": str(int(follow)),
            "tail": "all" if tail < 0 else str(tail),
        }
        if since_s > 0:
            params["since"] = f"{time.time() - since_s:.9f}"  # the engine compares it with stamps of this machine
        labels = read_labels(labels_of(before))
        splitter = LogSplitter(labels.component if labels else name_of(before), name_of(before))
        what = f"read the logs of {name}"
        async with self._client.stream(what, f"containers/{name}/logs", params=params) as chunks:
            async for chunk in chunks:
                for line in splitter.feed(chunk):
                    yield line
        for line in splitter.rest():
            yield line
        if follow:
            await self._check_that_it_ended(name, before)

    async def _check_that_it_ended(self, name: str, before: Mapping[str, Any]) -> None:
        """Tell an engine that went from a container that ended: both close the stream of the log without a word."""
        after = await self._inspect(name)
        if after is None or not after["State"].get("Running"):
            return
        if after["State"].get("StartedAt") == before["State"].get("StartedAt"):
            raise AdapterError(
                f"cannot read the logs of {name} any further: the container engine went away in the middle",
                code="engine_down",
                retryable=True,
            )

    async def events(self) -> AsyncIterator[EngineEvent]:
        """Yield events for ever (see ContainerOutput); the first is an `engine-up` when the engine answers.

        A frozen engine ends nothing: what it has to tell comes when it goes on. The library's own event channel never
        yields again once the engine went away, so the stream is read here.
        """
        filters = json.dumps({"label": self._mine, "type": ["container"]})
        was_up, pause_s = True, RETRY_EVENTS_S
        while True:
            begun_s, held = time.monotonic(), True
            try:
                async with self._client.stream(
                    "hear the engine's events", "events", params={"filters": filters}, outlives_freezing=True
                ) as chunks:
                    was_up = True
                    yield EngineEvent(action="engine-up")
                    async for line in json_lines(chunks):
                        if event := engine_event(line):
                            yield event
                reason = "it ended its event stream"
                held = time.monotonic() - begun_s >= STREAM_HELD_S
            except AdapterError as error:
                reason = "" if error.code == "engine_frozen" else error.reason
            if was_up and reason:
                was_up = False
                yield EngineEvent(action="engine-down", detail=reason)
            pause_s = RETRY_EVENTS_S if held else min(2 * pause_s, RETRY_EVENTS_AT_MOST_S)
            await self._client.renew()
            await asyncio.sleep(pause_s)

    async def execute(self, name: str, cmd: Sequence[str], timeout_s: float) -> tuple[int, str]:
        """Run a command in a container (see ContainerOutput).

        Raises:
            AdapterError: code command_timeout when it did not end in time; the engine cannot end it, so it may go on.
        """
        said = b""
        async with self._client.call(f"run {cmd[0]} in {name}", timeout_s + self._client.timeout_s) as docker:
            run = await docker.containers.container(name).exec(list(cmd), stdin=False, tty=False)
            try:
                async with asyncio.timeout(timeout_s), run.start(detach=False) as stream:
                    while (message := await stream.read_out()) is not None:
                        said = (said + message.data)[:OUTPUT_BYTES]
            except TimeoutError as error:
                raise AdapterError(
                    f"cannot run {cmd[0]} in {name}: no end within {timeout_s:g} s",
                    code="command_timeout",
                    retryable=True,
                ) from error
            code = (await run.inspect()).get("ExitCode")
        return (-1 if code is None else int(code)), said.decode(errors="replace")


async def _networks_called(docker: aiodocker.Docker, name: str) -> Sequence[str]:
    """Return the ids of the networks of that name, the oldest first."""
    found = await docker.networks.list(filters={"name": [name]})  # by substring
    same = [each for each in found if each["Name"] == name]
    return [each["Id"] for each in sorted(same, key=lambda each: (each["Created"], each["Id"]))]
