"""One bus for a contract test, in memory or real, with the same ways to connect, to lose a link and to lose the server."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from mcp.adapters.clock import SystemClock
from mcp.bus.links import AgentLink, MasterLink, OperatorLink
from mcp.bus.memory import MemoryBroker, MemoryTransport
from mcp.bus.subjects import ConnectionRole
from mcp.bus.transport import Frame, LinkState, Transport
from tests.helpers import soon
from tests.real_bus import RealBus
from tests.tcp_proxy import TcpProxy

EPOCH = 1_790_000_000_000


class Ear:
    """Collects what a subscription hears."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []

    def __call__(self, frame: Frame) -> None:
        self.frames.append(frame)

    @property
    def bodies(self) -> list[bytes]:
        return [frame.body for frame in self.frames]

    @property
    def subjects(self) -> list[str]:
        return [frame.subject for frame in self.frames]

    async def hears(self, count: int) -> list[Frame]:
        """Wait for so many frames."""
        await soon(f"{count} frames", lambda: len(self.frames) >= count)
        return self.frames


class Watch:
    """Collects what a transport tells of itself."""

    def __init__(self, transport: Transport) -> None:
        self.states: list[LinkState] = []
        self.denied: list[tuple[str, str]] = []
        transport.on_state = self.states.append
        transport.on_denied = lambda verb, subject: self.denied.append((verb, subject))


class TestBus(ABC):
    """What a contract test does to a bus."""

    __test__ = False

    def __init__(self) -> None:
        self.stack = AsyncExitStack()
        self.clock = SystemClock()

    @abstractmethod
    async def connect(self, role: ConnectionRole, name: str = "") -> Transport:
        """Connect as somebody; closed when the test ends."""

    @abstractmethod
    async def cut(self, transport: Transport) -> None:
        """Take one connection's way to the bus away."""

    @abstractmethod
    async def heal(self, transport: Transport) -> None:
        """Give it back."""

    @abstractmethod
    async def stop(self) -> None:
        """Kill the server."""

    @abstractmethod
    async def start(self) -> None:
        """Start it again."""

    async def master(self, **more: Any) -> MasterLink:
        """Connect as the master, with its two connections."""
        link = MasterLink(await self.connect("master"), await self.connect("answers"), self.clock, EPOCH, **more)
        self.stack.push_async_callback(link.close)
        return link

    async def agent(self, node: str) -> AgentLink:
        """Connect as a node's agent."""
        link = AgentLink(await self.connect("agent", node), node, self.clock)
        self.stack.push_async_callback(link.close)
        return link

    async def operator(self, user: str) -> OperatorLink:
        """Connect as an operator."""
        link = OperatorLink(await self.connect("operator", user), user)
        await link.start()
        return link


class InMemory(TestBus):
    """The bus of tests and simulations."""

    def __init__(self) -> None:
        super().__init__()
        self.broker = MemoryBroker()

    async def connect(self, role: ConnectionRole, name: str = "") -> Transport:
        transport = self.broker.connect(role, name)
        self.stack.push_async_callback(transport.close)
        return transport

    async def cut(self, transport: Transport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.broker.cut(transport)

    async def heal(self, transport: Transport) -> None:
        assert isinstance(transport, MemoryTransport)
        self.broker.heal(transport)

    async def stop(self) -> None:
        self.broker.stop()

    async def start(self) -> None:
        self.broker.start()


class OnNats(TestBus):
    """The real one, each connection through a wire of its own."""

    def __init__(self, server: RealBus) -> None:
        super().__init__()
        self.server = server
        self._wires: dict[int, TcpProxy] = {}

    async def connect(self, role: ConnectionRole, name: str = "") -> Transport:
        wire = await self.stack.enter_async_context(TcpProxy(self.server.port))
        transport = await self.server.connect(role, name, port=wire.port)
        self.stack.push_async_callback(transport.close)
        self._wires[id(transport)] = wire
        return transport

    async def cut(self, transport: Transport) -> None:
        await self._wires[id(transport)].unplug()
        await soon("the loss is noticed", lambda: not transport.is_connected)

    async def heal(self, transport: Transport) -> None:
        await self._wires[id(transport)].plug_in()
        await soon("it is back", lambda: transport.is_connected)

    async def stop(self) -> None:
        await asyncio.to_thread(self.server.kill)

    async def start(self) -> None:
        await asyncio.to_thread(self.server.start)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBus]:
    """One real server for all tests of a run."""
    server = RealBus(tmp_path_factory.mktemp("nats"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(params=["memory", "nats"])
async def bus(request: pytest.FixtureRequest) -> AsyncIterator[TestBus]:
    """The bus that a contract is about: each test runs on both."""
    made: TestBus
    if request.param == "memory":
        made = InMemory()
    else:
        server = request.getfixturevalue("nats_server")
        server.start()
        made = OnNats(server)
    async with made.stack:
        yield made
