"""One engine for a contract test, in memory or real, with the same images and the same way to wait."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import attrs
import pytest

from mcp.adapters.docker import DockerEngine
from mcp.adapters.fake import Behaviour, FakeClock, FakeEngine
from mcp.demo.image import CRASHER, WEB, Image, load, script_image
from mcp.model.container import (
    COMPONENT_LABEL,
    GENERATION_LABEL,
    HASH_LABEL,
    NODE_LABEL,
    OWNER,
    OWNER_LABEL,
    PORTS_LABEL,
    SERVICE_LABEL,
)
from mcp.model.errors import AdapterError
from mcp.model.messages import LogLine
from mcp.model.ports import ContainerRequest, EngineEvent
from tests.helpers import soon
from tests.live.engine import machine_engine_url, private_engine

T = TypeVar("T")

TALKER = """#!/bin/sh
trap 'exit 0' TERM
echo "first"
sleep 0.2
echo "second" >&2
sleep 0.2
echo "third"
sleep 1000 & wait $!
"""
ONCE = "#!/bin/sh\necho done\nexit 7\n"
STUBBORN = "#!/bin/sh\ntrap '' TERM\necho up\nwhile :; do sleep 1; done\n"
HOG = "#!/bin/sh\nx=aaaaaaaaaaaaaaaa; while :; do x=$x$x; done\n"

IMAGES: dict[str, Image] = {}
"""Filled when first needed: they take a busybox."""

SCRIPTS = {"web": WEB, "crasher": CRASHER, "talker": TALKER, "once": ONCE, "stubborn": STUBBORN, "hog": HOG}

ECHO = ("sh", "-c", "echo out; echo err >&2; exit 3")
LONG = ("sh", "-c", "dd if=/dev/zero bs=1000 count=10 2>/dev/null | tr '\\0' x")
SLEEP = ("sleep", "30")

BEHAVIOURS = {
    "web": Behaviour(
        is_local=True,
        says=("web: starting",),
        commands={ECHO: (3, "out\nerr\n"), LONG: (0, "x" * 10_000), ("true",): (0, "")},
    ),
    "crasher": Behaviour(
        is_local=True, says=("crasher: up", "!crasher: fatal: no database"), exits_after_s=0.01, exit_code=1
    ),
    "talker": Behaviour(is_local=True, says=("first", "!second", "third")),
    "once": Behaviour(is_local=True, says=("done",), exits_after_s=0.5, exit_code=7),
    "stubborn": Behaviour(is_local=True, says=("up",), ignores_term=True, command_s=30.0),
    "hog": Behaviour(is_local=True, exits_after_s=0.1, exit_code=137, out_of_memory=True),
}


def name_of(kind: str) -> str:
    """Return the name of a test image."""
    return f"localhost/mcp-test-{kind}:v1"


@attrs.define
class World:
    """An engine under test. `service` is this test's own, for other tests may use the engine too."""

    engine: Any
    node: str
    service: str
    network: str
    foreign: Callable[[str], Awaitable[None]]
    """Makes a container that is not ours."""
    clock: FakeClock | None = None

    def request(
        self, kind: str = "web", *, generation: int = 1, component: str = "", **changes: Any
    ) -> ContainerRequest:
        """Return what model/container.py would ask for."""
        component = component or self.service
        request = ContainerRequest(
            name=f"mcp.{self.service}.{component}.g{generation}",
            image=name_of(kind),
            labels={
                OWNER_LABEL: OWNER,
                NODE_LABEL: self.node,
                SERVICE_LABEL: self.service,
                COMPONENT_LABEL: component,
                GENERATION_LABEL: str(generation),
                HASH_LABEL: "hash-1",
                PORTS_LABEL: '{"": "127.0.0.1:10001"}',
            },
            network=self.network,
            restart="no",
        )
        return attrs.evolve(request, **changes)

    async def run(self, kind: str = "web", **changes: Any) -> str:
        """Create and start a container and return its name."""
        request = self.request(kind, **changes)
        await self.engine.create(request)
        await self.engine.start(request.name)
        return request.name

    async def soon(self, what: str, look: Callable[[], Any], within_s: float = 20.0) -> Any:
        """Wait for a condition, moving the clock where there is one to move."""
        if self.clock is None:
            return await soon(what, look, within_s)
        for _ in range(round(within_s / 0.05)):
            seen = look()
            if seen := await seen if asyncio.iscoroutine(seen) else seen:
                return seen
            await self.clock.advance(0.05)
        raise AssertionError(what)

    async def state(self, name: str) -> Any:
        """Return what the engine shows of one container, None when there is none."""
        return next((c for c in await self.engine.list(self.service) if c.name == name), None)

    async def took(self, doing: Awaitable[T]) -> T:
        """Wait for something that takes time on the engine's clock."""
        task = asyncio.ensure_future(doing)
        while self.clock is not None and not task.done():
            await self.clock.advance(0.05)
        return await task

    async def lines(self, name: str, **how: Any) -> list[LogLine]:
        """Return the whole log."""
        return [line async for line in self.engine.logs(name, **how)]


class Read:
    """Follows a log in the background; `end` waits for the end of it."""

    def __init__(self, world: World, name: str) -> None:
        self.lines: list[LogLine] = []
        self._world = world
        self._task = asyncio.create_task(self._read(name))

    async def _read(self, name: str) -> None:
        async for line in self._world.engine.logs(name, follow=True):
            self.lines.append(line)

    @property
    def texts(self) -> list[str]:
        """What was read so far."""
        return [line.text for line in self.lines]

    async def end(self) -> None:
        """Wait for the end, and raise what it ended with."""
        await self._world.took(asyncio.wait_for(self._task, 20))


class Heard:
    """Collects the events of an engine in the background."""

    def __init__(self, engine: Any) -> None:
        self.events: list[EngineEvent] = []
        self._task = asyncio.create_task(self._listen(engine))

    async def _listen(self, engine: Any) -> None:
        async for event in engine.events():
            self.events.append(event)

    @property
    def actions(self) -> list[str]:
        """What happened, in order."""
        return [event.action for event in self.events]

    async def stop(self) -> None:
        """Stop listening."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@pytest.fixture(scope="session")
def engine_url() -> Iterator[str]:
    """The machine's own engine when one answers, else a private one."""
    if url := machine_engine_url():
        yield url
        return
    with private_engine() as engine:
        yield engine.url


@pytest.fixture(params=["memory", pytest.param("docker", marks=pytest.mark.engine)])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """The engine in memory and the real one, each with our images."""
    service = f"t{secrets.token_hex(4)}"
    if request.param == "memory":
        clock = FakeClock()
        fake = FakeEngine(clock, timeout_s=0.5)
        fake.images |= {name_of(kind): behaviour for kind, behaviour in BEHAVIOURS.items()}
        fake.missing_addresses.add("192.0.2.1")

        async def foreign(name: str) -> None:
            fake.foreign.add(name)

        yield World(engine=fake, node="n1", service=service, network="", foreign=foreign, clock=clock)
        await fake.close()
        return
    url = request.getfixturevalue("engine_url")
    async with docker_world(url, service) as made:
        yield made


class docker_world:  # noqa: N801 - used like a function
    """A world on a real engine; what a test leaves is removed."""

    def __init__(self, url: str, service: str = "") -> None:
        self._url = url
        self._service = service or f"t{secrets.token_hex(4)}"
        self._foreign: list[str] = []

    async def __aenter__(self) -> World:
        if not IMAGES:
            IMAGES.update({kind: script_image(name_of(kind), script) for kind, script in SCRIPTS.items()})
        await load(self._url, list(IMAGES.values()))
        node = f"test-{os.getpid()}"
        self._engine = DockerEngine(self._url, node=node)
        return World(
            engine=self._engine, node=node, service=self._service, network=f"mcp-test-{os.getpid()}", foreign=self._make_foreign
        )  # fmt: skip

    async def _make_foreign(self, name: str) -> None:
        async with self._engine._client.call("make a foreign container") as docker:
            await docker.containers.create({"Image": name_of("web")}, name=name)
        self._foreign.append(name)

    async def __aexit__(self, *_: object) -> None:
        for state in await self._engine.list(self._service):
            await self._engine.remove(state.name)
        async with self._engine._client.call("clear up") as docker:
            for name in self._foreign:
                await docker.containers.container(name).delete(force=True)
            for network in await docker.networks.list(filters={"name": [f"mcp-test-{os.getpid()}"]}):
                await (await docker.networks.get(network["Id"])).delete()
        await self._engine.close()


async def failure(doing: Awaitable[object]) -> AdapterError:
    """Return the error that something ends with."""
    with pytest.raises(AdapterError) as caught:
        await doing
    return caught.value
