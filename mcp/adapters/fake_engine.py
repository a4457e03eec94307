"""A container engine in memory: what its images do is told beforehand, and it can be slow, frozen, dead, or cut in mid-answer."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Literal, TypeVar

import attrs

from mcp.model.container import GENERATION_LABEL, HASH_LABEL, NODE_LABEL, SERVICE_LABEL, read_labels
from mcp.model.errors import AdapterError
from mcp.model.messages import ContainerState, ImageFacts, LogLine
from mcp.model.ports import Clock, ContainerRequest, EngineEvent, EngineFacts, Progress
from mcp.model.values import frozen

T = TypeVar("T")

FIRST_RESTART_S = 0.1
LONGEST_RESTART_S = 60.0
"""An engine waits before it restarts a container, twice as long each time."""

KILLED = 137
TERMINATED = 0
_NOT_FOUND = (126, "executable file not found in $PATH\n")


@frozen(kw_only=True)
class Listener:
    """What is met at an address and port: it answers HTTP, or hangs up, or accepts and stays silent."""

    status: int = 200
    hangs_up: bool = False
    is_silent: bool = False


@frozen(kw_only=True)
class Behaviour:
    """How the pull of an image goes, and what its containers do."""

    platforms: tuple[str, ...] = ("amd64",)
    is_local: bool = False
    pull_s: float = 0.0
    pull_bytes: int = 1_000_000
    pull_error: AdapterError | None = None
    start_error: AdapterError | None = None
    says: tuple[str, ...] = ()
    """Lines to stdout at each start; those that begin with "!" go to stderr."""
    ready_after_s: float = 0.0
    """When it begins to listen; infinity: never."""
    listener: Listener = Listener()
    exits_after_s: float | None = None
    exit_code: int = 0
    out_of_memory: bool = False
    ignores_term: bool = False
    commands: Mapping[tuple[str, ...], tuple[int, str]] = attrs.field(factory=dict)
    """What `execute` gets: exit code and output."""
    command_s: float = 0.0


@attrs.define(eq=False)
class _Container:
    request: ContainerRequest
    id: str
    behaviour: Behaviour
    state: Literal["created", "running", "restarting", "exited"] = "created"
    exit_code: int = 0
    out_of_memory: bool = False
    restarts: int = 0
    started_s: float | None = None
    """On the monotonic clock."""
    started_at: str = ""
    finished_at: str = ""
    problem: str = ""
    log: list[tuple[float, LogLine]] = attrs.field(factory=list)
    life: asyncio.Task[None] | None = None
    changed: asyncio.Event = attrs.field(factory=asyncio.Event)

    def wake(self) -> None:
        """Let those go on who follow the log."""
        self.changed.set()
        self.changed = asyncio.Event()

    @property
    def policy(self) -> str:
        return self.request.restart.partition(":")[0]


class FakeEngine:
    """Implements Images, Containers and ContainerOutput. `images` and the other public sets may be changed at any time."""

    def __init__(self, clock: Clock, *, arch: str = "amd64", timeout_s: float = 10.0, node: str = "") -> None:
        self.images: dict[str, Behaviour] = {}
        self.taken: set[tuple[str, int]] = set()
        """Addresses and ports at which other programs of the machine listen."""
        self.missing_addresses: set[str] = set()
        self.foreign: set[str] = set()
        """Names of containers that are not ours."""
        self.latency_s = 0.0
        self.state: Literal["up", "down", "frozen"] = "up"
        self.calls: list[str] = []
        """What was asked, e.g. "start mcp.web.g1"."""
        self._clock = clock
        self._arch = arch
        self._timeout_s = timeout_s
        self._node = node
        self._local: set[str] = set()
        self._containers: dict[str, _Container] = {}
        self._serial = itertools.count(1)
        self._cuts: list[tuple[str, bool]] = []
        self._late: list[Callable[[], object]] = []
        self._hearers: list[asyncio.Queue[EngineEvent]] = []
        self._held_back: list[EngineEvent] = []

    async def close(self) -> None:
        """End the lives of its containers."""
        for container in self._containers.values():
            _end_life(container)

    # -------------------------------------------------------------- what tests do

    def go_down(self, *, live_restore: bool = False) -> None:
        """Die as dockerd does by SIGKILL: without live-restore the containers end, and those with `always` come back later."""
        self.state = "down"
        self._tell(EngineEvent(action="engine-down", detail="the container engine went away"))
        for container in self._containers.values():
            container.wake()
            if not live_restore and container.state in ("running", "restarting"):
                self._end(container, TERMINATED)

    def come_up(self) -> None:
        """Start again."""
        self.state = "up"
        self._tell(EngineEvent(action="engine-up"))
        for container in self._containers.values():
            if container.state == "exited" and container.policy == "always":
                self._run(container)

    def freeze(self) -> None:
        """Accept every call and answer none; what is asked meanwhile is done at `thaw`, when nobody waits any more."""
        self.state = "frozen"

    def thaw(self) -> None:
        """Go on, with what was asked meanwhile."""
        self.state = "up"
        held_back, self._held_back = self._held_back, []
        for event in held_back:
            self._tell(event)
        late, self._late = self._late, []
        for effect in late:
            try:
                effect()
            except AdapterError:  # nobody is left to hear it
                continue

    def cut_next(self, call: str, *, after_effect: bool) -> None:
        """Break the connection of the next such call ("create", "start", "stop"...), before or after its effect."""
        self._cuts.append((call, after_effect))

    def die_by_hand(self, name: str, exit_code: int = KILLED) -> None:
        """End a container as `docker kill` does."""
        self._end(self._containers[name], exit_code)

    def remove_by_hand(self, name: str) -> None:
        """Remove a container as `docker rm -f` does."""
        self._remove(name)

    def listener(self, address: str, port: int) -> Listener | None:
        """Return what a health check would meet there."""
        for container in self._containers.values():
            if container.state == "running" and (address, port) in _addresses(container):
                return container.behaviour.listener if self._is_ready(container) else None
        return None

    def _is_ready(self, container: _Container) -> bool:
        ready_s = (container.started_s or 0.0) + container.behaviour.ready_after_s
        return self._clock.monotonic_s() >= ready_s

    # --------------------------------------------------------------------- images

    async def describe(self, image: str) -> ImageFacts:
        """Say for which platforms an image exists (see Images)."""
        try:
            return await self._do("describe", image, lambda: self._describe(image))
        except AdapterError as error:
            return ImageFacts(image=image, error=error.reason)

    def _describe(self, image: str) -> ImageFacts:
        found = self.images.get(image)
        if found is None:
            raise _no_image(f"ask for the platforms of {image}")
        is_local = self._has(image)
        return ImageFacts(image=image, platforms=(self._arch,) if is_local else found.platforms, is_local=is_local)

    def _has(self, image: str) -> bool:
        return image in self._local or (image in self.images and self.images[image].is_local)

    async def pull(self, image: str, on_progress: Progress) -> bool:
        """Fetch an image unless it is there (see Images)."""
        if await self._do("look", image, lambda: self._has(image)):
            return False
        found = self.images.get(image)
        if found is None:
            raise _no_image(f"pull {image}")
        for quarter in range(4):
            on_progress(f"{image}: downloading", found.pull_bytes * quarter // 4, found.pull_bytes)
            await self._clock.sleep(found.pull_s / 4)
        await self._do("pull", image, lambda: self._pulled(image, found))
        return True

    def _pulled(self, image: str, found: Behaviour) -> None:
        if found.pull_error is not None:
            raise found.pull_error
        if self._arch not in found.platforms:
            raise AdapterError(
                f"cannot pull {image}: no matching manifest for linux/{self._arch}", code="platform_missing"
            )
        self._local.add(image)

    # ----------------------------------------------------------------- containers

    async def facts(self) -> EngineFacts:
        """Return what the engine says of itself."""
        return await self._do(
            "facts", "", lambda: EngineFacts(version="0", api_version="0", arch=self._arch, name="fake")
        )

    async def list(self, service: str = "") -> list[ContainerState]:
        """Return our containers (see Containers)."""
        return [*await self._do("list", service, lambda: self._list(service))]

    def _list(self, service: str) -> Sequence[ContainerState]:
        mine = [
            c for c in self._containers.values() if self._is_mine(c) and service in ("", self._label(c, SERVICE_LABEL))
        ]
        return sorted((_shown(container) for container in mine), key=lambda state: state.name)

    async def label(self, service: str, generation: int, name: str) -> str:
        """Return a label of a generation's containers (see Containers)."""
        wanted = {SERVICE_LABEL: service, GENERATION_LABEL: str(generation)}

        def look() -> str:
            mine = (c.request.labels for c in self._containers.values() if self._is_mine(c))
            found = (labels.get(name, "") for labels in mine if wanted.items() <= labels.items())
            return next(filter(None, found), "")

        return await self._do("label", service, look)

    async def create(self, request: ContainerRequest) -> ContainerState:
        """Create and do not start (see Containers)."""
        return await self._do("create", request.name, lambda: self._create(request))

    def _create(self, request: ContainerRequest) -> ContainerState:
        there = self._containers.get(request.name)
        is_same = there and self._is_mine(there) and self._label(there, HASH_LABEL) == request.labels.get(HASH_LABEL)
        if request.name in self.foreign or (there and not is_same):
            raise AdapterError(
                f"cannot create container {request.name}: another container has that name", code="name_taken"
            )
        if there:
            return _shown(there)
        if not self._has(request.image):
            raise _no_image(f"create container {request.name}")
        made = _Container(request=request, id=f"{next(self._serial):064x}", behaviour=self.images[request.image])
        self._containers[request.name] = made
        self._happened("create", made)
        return _shown(made)

    async def start(self, name: str) -> ContainerState:
        """Start a container (see Containers)."""
        return await self._do("start", name, lambda: self._start(name))

    def _start(self, name: str) -> ContainerState:
        container = self._containers.get(name)
        if container is None:
            raise AdapterError(f"cannot start container {name}: no such container", code="container_missing")
        if container.state not in ("running", "restarting"):
            if trouble := self._trouble(container):
                container.problem = trouble.reason
                raise trouble
            container.restarts = 0
            self._run(container)
        return _shown(container)

    def _trouble(self, container: _Container) -> AdapterError | None:
        what = f"cannot start container {container.request.name}"
        running = (c for c in self._containers.values() if c.state in ("running", "restarting"))
        taken = self.taken.union(*(_addresses(other) for other in running))
        for address, port in _addresses(container):
            if address in self.missing_addresses:
                text = f"{what}: listen {address}:{port}: cannot assign requested address"
                return AdapterError(text, code="address_missing", retryable=True)
            if (address, port) in taken:
                return AdapterError(f"{what}: {address}:{port}: address already in use", code="port_in_use")
        return container.behaviour.start_error

    async def stop(self, name: str, grace_s: float) -> ContainerState | None:
        """Stop a container (see Containers)."""
        container = await self._do("stop", name, lambda: self._begin_stop(name))
        if container is not None and container.state == "running":
            await self._clock.sleep(grace_s)
            self._stopped(container, KILLED)
        return _shown(container) if container else None

    def _begin_stop(self, name: str) -> _Container | None:
        container = self._mine(name)
        if container and not (container.state == "running" and container.behaviour.ignores_term):
            self._stopped(container, TERMINATED)
        return container

    def _stopped(self, container: _Container, exit_code: int) -> None:
        if container.state in ("running", "restarting"):
            self._end(container, exit_code)
            self._happened("stop", container)

    async def remove(self, name: str) -> bool:
        """Remove a container (see Containers)."""
        return await self._do("remove", name, lambda: self._mine(name) is not None and self._remove(name))

    def _remove(self, name: str) -> bool:
        container = self._containers[name]
        if container.state in ("running", "restarting"):
            self._end(container, KILLED)
        del self._containers[name]
        container.wake()
        self._happened("destroy", container)
        return True

    def _mine(self, name: str) -> _Container | None:
        container = self._containers.get(name)
        return container if container and self._is_mine(container) else None

    def _is_mine(self, container: _Container) -> bool:
        is_ours = read_labels(container.request.labels) is not None
        return is_ours and self._node in ("", self._label(container, NODE_LABEL))

    @staticmethod
    def _label(container: _Container, name: str) -> str:
        return container.request.labels.get(name, "")

    # ---------------------------------------------------------------------- lives

    def _run(self, container: _Container) -> None:
        self._begin(container)
        if container.behaviour.exits_after_s is not None:
            container.life = asyncio.create_task(self._live(container, container.behaviour.exits_after_s))

    async def _live(self, container: _Container, life_s: float) -> None:
        while True:
            await self._clock.sleep(life_s)
            self._fall(container)
            if not _is_restarted(container):
                return
            container.state = "restarting"
            await self._clock.sleep(min(FIRST_RESTART_S * 2**container.restarts, LONGEST_RESTART_S))
            container.restarts += 1
            self._begin(container)

    def _begin(self, container: _Container) -> None:
        container.state, container.problem = "running", ""
        container.exit_code, container.out_of_memory = 0, False
        container.started_s, container.started_at = self._clock.monotonic_s(), self._stamp()
        container.finished_at = ""
        for text in container.behaviour.says:
            self._say(container, text)
        container.wake()
        self._happened("start", container)

    def _say(self, container: _Container, text: str) -> None:
        labels = read_labels(container.request.labels)
        line = LogLine(
            at=self._stamp(),
            component=labels.component if labels else container.request.name,
            container=container.request.name,
            stream="stderr" if text.startswith("!") else "stdout",
            text=text.removeprefix("!"),
        )
        container.log.append((self._clock.monotonic_s(), line))

    def _fall(self, container: _Container) -> None:
        container.exit_code, container.out_of_memory = container.behaviour.exit_code, container.behaviour.out_of_memory
        container.state, container.finished_at = "exited", self._stamp()
        if container.out_of_memory:
            self._happened("oom", container)
        self._happened("die", container, f"exit code {container.exit_code}")
        container.wake()

    def _end(self, container: _Container, exit_code: int) -> None:
        """End it from outside: no restart policy applies."""
        _end_life(container)
        container.state, container.exit_code, container.finished_at = "exited", exit_code, self._stamp()
        self._happened("die", container, f"exit code {exit_code}")
        container.wake()

    def _stamp(self) -> str:
        return datetime.fromtimestamp(self._clock.wall_s(), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

    # --------------------------------------------------------------------- output

    async def logs(
        self, name: str, *, follow: bool = False, tail: int = -1, since_s: float = 0.0
    ) -> AsyncIterator[LogLine]:
        """Yield whole lines with time stamps (see ContainerOutput)."""
        container = await self._do("logs", name, lambda: self._containers.get(name))
        if container is None:
            raise AdapterError(f"cannot read the logs of {name}: there is no such container", code="container_missing")
        oldest_s = self._clock.monotonic_s() - since_s if since_s > 0 else -1.0
        young = [line for at_s, line in container.log if at_s >= oldest_s]
        at = len(container.log)
        for line in young if tail < 0 else young[len(young) - min(tail, len(young)) :]:
            yield line
        started_s = container.started_s
        while follow and container.state == "running" and container.started_s == started_s:
            await container.changed.wait()
            if self.state == "down":
                raise _engine_down(f"read the logs of {name} any further")
            for _, line in container.log[at:]:
                yield line
            at = len(container.log)

    def say(self, name: str, text: str) -> None:
        """Have a container say a line, to stderr when it begins with "!"."""
        container = self._containers[name]
        self._say(container, text)
        container.wake()

    async def events(self) -> AsyncIterator[EngineEvent]:
        """Yield events for ever (see ContainerOutput); the first says whether the engine is there."""
        queue: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self._hearers.append(queue)
        try:
            if self.state == "down":
                yield EngineEvent(action="engine-down", detail="the container engine is not running")
            elif self.state == "up":
                yield EngineEvent(action="engine-up")
            else:
                self._held_back.append(EngineEvent(action="engine-up"))
            while True:
                yield await queue.get()
        finally:
            self._hearers.remove(queue)

    async def execute(self, name: str, cmd: Sequence[str], timeout_s: float) -> tuple[int, str]:
        """Run a command in a container (see ContainerOutput)."""
        container = await self._do("execute", name, lambda: self._containers.get(name))
        what = f"cannot run {cmd[0]} in {name}"
        if container is None:
            raise AdapterError(f"{what}: no such container", code="container_missing")
        if container.state != "running":
            raise AdapterError(f"{what}: container {name} is not running", code="not_running")
        await self._clock.sleep(min(container.behaviour.command_s, timeout_s))
        if container.behaviour.command_s > timeout_s:
            raise AdapterError(f"{what}: no end within {timeout_s:g} s", code="command_timeout", retryable=True)
        code, said = container.behaviour.commands.get(tuple(cmd), _NOT_FOUND)
        return code, said[:4096]

    def _happened(self, action: str, container: _Container, detail: str = "") -> None:
        if not self._is_mine(container):
            return
        service = self._label(container, SERVICE_LABEL)
        self._tell(EngineEvent(action=action, name=container.request.name, service=service, detail=detail))  # type: ignore[arg-type]

    def _tell(self, event: EngineEvent) -> None:
        if self.state == "frozen":
            self._held_back.append(event)
        elif self.state == "up" or event.action == "engine-down":
            for hearer in self._hearers:
                hearer.put_nowait(event)

    # ---------------------------------------------------------------------- calls

    async def _do(self, call: str, target: str, effect: Callable[[], T]) -> T:
        """Make one call: the engine may be slow, frozen or away, and its answer may be lost although it acted."""
        self.calls.append(f"{call} {target}".rstrip())
        what = f"{call} {target}".rstrip()
        if self.latency_s:
            await self._clock.sleep(self.latency_s)
        if self.state == "frozen":
            self._late.append(effect)
            await self._clock.sleep(self._timeout_s)
            raise AdapterError(
                f"cannot {what}: the container engine does not answer (waited {self._timeout_s:g} s)",
                code="engine_frozen",
                retryable=True,
            )
        if self.state == "down":
            raise _engine_down(what)
        self._cut(call, target, after_effect=False)
        done = effect()
        self._cut(call, target, after_effect=True)
        return done

    def _cut(self, call: str, target: str, *, after_effect: bool) -> None:
        if (call, after_effect) in self._cuts:
            self._cuts.remove((call, after_effect))
            text = f"cannot {call} {target}: the container engine went away in the middle"
            raise AdapterError(text, code="engine_down", retryable=True)


def _is_restarted(container: _Container) -> bool:
    policy, _, most = container.request.restart.partition(":")
    if policy == "on-failure":
        return container.exit_code != 0 and (not most or container.restarts < int(most))
    return policy in ("always", "unless-stopped")


def _end_life(container: _Container) -> None:
    life, container.life = container.life, None
    if life is not None:
        life.cancel()


def _addresses(container: _Container) -> set[tuple[str, int]]:
    return {(port.address, port.host_port) for port in container.request.ports}


def _shown(container: _Container) -> ContainerState:
    labels = read_labels(container.request.labels)
    return ContainerState(
        service=labels.service if labels else "",
        component=labels.component if labels else "",
        name=container.request.name,
        container_id=container.id,
        image=container.request.image,
        state=container.state,
        exit_code=container.exit_code,
        out_of_memory=container.out_of_memory,
        restarts=container.restarts,
        started_at=container.started_at,
        finished_at=container.finished_at,
        spec_hash=labels.spec_hash if labels else "",
        generation=labels.generation if labels else 0,
        ports=labels.ports if labels else {},
        problem=container.problem,
    )


def _engine_down(what: str) -> AdapterError:
    return AdapterError(f"cannot {what}: the container engine is not running", code="engine_down", retryable=True)


def _no_image(what: str) -> AdapterError:
    return AdapterError(f"cannot {what}: no such image", code="image_missing")
