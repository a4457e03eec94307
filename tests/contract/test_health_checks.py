"""What HealthChecks, Host, Clock and IdSource promise, in memory and for real."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest

from mcp.adapters.clock import RandomIds, SystemClock
from mcp.adapters.fake import CountingIds, FakeClock, FakeHealthChecks, FakeHost, Listener
from mcp.adapters.health import NetworkChecks
from mcp.adapters.host import LinuxHost
from mcp.model.ports import Clock, HealthChecks, Host, IdSource
from mcp.model.spec import HealthSpec
from tests.helpers import free_port

ADDRESS = "127.0.0.1"
HTTP = HealthSpec(path="/healthz")
TCP = HealthSpec(tcp=True)


@attrs.define
class Place:
    """Where checks look, and a way to have something listen there."""

    checks: HealthChecks
    listen: Callable[[Listener], Awaitable[int]]
    took: Callable[[Awaitable[str]], Awaitable[str]]
    """Waits for a check on the clock of the place."""

    async def check(self, health: HealthSpec, port: int, *, speaks_http: bool = False) -> str:
        """Check and wait for the end of it."""
        return await self.took(self.checks.check(health, ADDRESS, port, speaks_http=speaks_http))


@pytest.fixture(params=["memory", "network"])
async def place(request: pytest.FixtureRequest) -> AsyncIterator[Place]:
    if request.param == "memory":
        yield in_memory()
        return
    servers: list[asyncio.Server] = []
    at_work: set[asyncio.Task[None]] = set()

    async def listen(listener: Listener) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            at_work.add(asyncio.current_task())  # type: ignore[arg-type]
            with suppress(ConnectionError):
                await answer(listener, reader, writer)
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

        servers.append(await asyncio.start_server(serve, ADDRESS, 0))
        port: int = servers[-1].sockets[0].getsockname()[1]
        return port

    async def took(check: Awaitable[str]) -> str:
        return await check

    yield Place(checks=NetworkChecks(), listen=listen, took=took)
    for server in servers:
        server.close()
    for task in at_work:
        task.cancel()
    await asyncio.gather(*at_work, return_exceptions=True)


async def answer(listener: Listener, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    if listener.hangs_up:
        return
    with suppress(asyncio.IncompleteReadError):
        asked = await reader.readuntil(b"\r\n\r\n")
        if listener.is_silent:
            await reader.read()
        elif asked.startswith((b"GET /healthz HTTP/1.1\r\n", b"GET / HTTP/1.1\r\n")):
            writer.write(f"HTTP/1.1 {listener.status} Whatever\r\nContent-Length: 0\r\n\r\n".encode())
            await writer.drain()


def in_memory() -> Place:
    clock = FakeClock()
    checks = FakeHealthChecks(clock)

    async def listen(listener: Listener) -> int:
        port = 10_000 + len(checks.listeners)
        checks.listeners[ADDRESS, port] = listener
        return port

    async def took(check: Awaitable[str]) -> str:
        task = asyncio.ensure_future(check)
        while not task.done():
            await clock.advance(0.5)
        return await task

    return Place(checks=checks, listen=listen, took=took)


# ----------------------------------------------------------------- health checks


@pytest.mark.parametrize("health", [HTTP, TCP, HealthSpec()])
async def test_where_nobody_listens_the_connection_is_refused(place: Place, health: HealthSpec) -> None:
    assert await place.check(health, free_port()) == "connection refused"


@pytest.mark.parametrize("status", [200, 204, 301])
async def test_a_good_answer_is_healthy(place: Place, status: int) -> None:
    assert await place.check(HTTP, await place.listen(Listener(status=status))) == ""


@pytest.mark.parametrize("status", [404, 500, 503])
async def test_a_bad_answer_is_told_by_its_number(place: Place, status: int) -> None:
    assert await place.check(HTTP, await place.listen(Listener(status=status))) == f"HTTP {status}"


@pytest.mark.parametrize("speaks_http", [False, True])
async def test_without_a_path_any_answer_and_any_silence_will_do(place: Place, speaks_http: bool) -> None:  # noqa: FBT001
    for listener in (Listener(), Listener(status=500), Listener(is_silent=True)):
        assert await place.check(TCP, await place.listen(listener), speaks_http=speaks_http) == ""


@pytest.mark.parametrize("speaks_http", [False, True])
async def test_who_hangs_up_at_once_is_not_healthy(place: Place, speaks_http: bool) -> None:  # noqa: FBT001
    port = await place.listen(Listener(hangs_up=True))
    assert await place.check(TCP, port, speaks_http=speaks_http) == "closed at once"
    assert await place.check(HTTP, port, speaks_http=speaks_http) == "closed without an answer"


async def test_a_check_of_something_silent_ends_after_5_seconds(place: Place) -> None:
    begun_s = time.monotonic()
    assert await place.check(HTTP, await place.listen(Listener(is_silent=True))) == "no answer within 5 s"
    assert time.monotonic() - begun_s < 7


async def test_a_network_without_a_way_is_told_and_not_raised() -> None:
    seen = await NetworkChecks().check(TCP, "255.255.255.255", 80, speaks_http=False)
    assert seen
    assert seen == seen.lower()


async def test_what_speaks_something_else_gives_no_http_answer() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, ADDRESS, 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await NetworkChecks().check(HTTP, ADDRESS, port, speaks_http=True) == "no HTTP answer"


async def test_a_line_that_never_ends_is_no_http_answer() -> None:
    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            for _piece in range(100):
                writer.write(b"x" * 10_000)
                await writer.drain()
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async with await asyncio.start_server(serve, ADDRESS, 0) as server:
        port = server.sockets[0].getsockname()[1]
        assert await NetworkChecks().check(HTTP, ADDRESS, port, speaks_http=True) == "no HTTP answer"


# -------------------------------------------------------------------------- host


@pytest.fixture(params=["memory", "linux"])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Host:
    return FakeHost() if request.param == "memory" else LinuxHost(str(tmp_path))


def test_a_host_knows_its_size_and_what_is_free(host: Host) -> None:
    have = host.resources()
    assert have.cpu_cores >= 1
    assert 0 < have.memory_free_bytes <= have.memory_bytes
    assert 0 < have.disk_free_bytes <= have.disk_bytes
    assert have.cpu_load >= 0


def test_a_host_names_its_architecture_as_images_do_and_its_boot(host: Host) -> None:
    assert host.arch in ("amd64", "arm64")
    assert host.boot_id


def test_a_port_is_free_unless_somebody_listens_at_that_address(host: Host) -> None:
    with socket.socket() as holder:
        holder.bind((ADDRESS, 0))
        holder.listen()
        port = holder.getsockname()[1]
        if isinstance(host, FakeHost):
            host.taken.add((ADDRESS, port))
        assert not host.is_port_free(ADDRESS, port)
        assert host.is_port_free("127.0.1.1", port)
    if isinstance(host, FakeHost):
        host.taken.clear()
    assert host.is_port_free(ADDRESS, port)


def test_a_path_is_followed_through_symlinks(host: Host, tmp_path: Path) -> None:
    (tmp_path / "target" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "target")
    if isinstance(host, FakeHost):
        host.links[str(tmp_path / "link")] = str(tmp_path / "target")
    assert host.real_path(str(tmp_path / "link" / "inner")) == str(tmp_path / "target" / "inner")
    assert host.real_path(str(tmp_path / "target")) == str(tmp_path / "target")


def test_an_address_that_the_machine_has_not_has_no_free_port(tmp_path: Path) -> None:
    assert not LinuxHost(str(tmp_path)).is_port_free("192.0.2.1", 8080)


def test_a_host_measures_the_disk_of_its_own_folder(tmp_path: Path) -> None:
    measured = os.statvfs(tmp_path)
    assert LinuxHost(str(tmp_path)).resources().disk_bytes == measured.f_blocks * measured.f_frsize


def test_an_architecture_may_be_said_by_the_configuration(tmp_path: Path) -> None:
    assert LinuxHost(str(tmp_path), arch="arm64").arch == "arm64"


# ------------------------------------------------------------------ clocks and ids


@pytest.fixture(params=["memory", "system"])
def clock(request: pytest.FixtureRequest) -> Clock:
    return FakeClock() if request.param == "memory" else SystemClock()


async def test_a_sleep_lasts_as_long_as_it_says(clock: Clock) -> None:
    begun_s = clock.monotonic_s()
    sleeping = asyncio.create_task(clock.sleep(0.05))
    if isinstance(clock, FakeClock):
        await clock.advance(0.05)
    await sleeping
    assert clock.monotonic_s() - begun_s >= 0.05
    assert clock.wall_s() > 1_700_000_000


async def test_sleepers_wake_in_order_and_see_their_own_time() -> None:
    clock = FakeClock()
    woke: list[tuple[str, float]] = []

    async def sleep(name: str, *seconds: float) -> None:
        for each in seconds:
            await clock.sleep(each)
            woke.append((name, clock.monotonic_s()))

    async with asyncio.TaskGroup() as sleepers:
        sleepers.create_task(sleep("a", 1, 2))
        sleepers.create_task(sleep("b", 2, 2))
        await clock.advance(10)
    assert woke == [("a", 1), ("b", 2), ("a", 3), ("b", 4)]
    assert clock.monotonic_s() == 10


async def test_a_sleep_that_is_cancelled_wakes_nobody() -> None:
    clock = FakeClock()
    sleeping = asyncio.create_task(clock.sleep(5))
    await clock.advance(1)
    sleeping.cancel()
    await clock.advance(10)
    assert sleeping.cancelled()


async def test_waiting_for_what_never_comes_fails_and_does_not_hang() -> None:
    with pytest.raises(AssertionError, match="nobody sleeps"):
        await FakeClock().advance_until(lambda: False)


@pytest.mark.parametrize("ids", [CountingIds(), RandomIds()])
def test_ids_are_8_hex_digits_and_never_the_same(ids: IdSource) -> None:
    made: list[Any] = [ids.new_id() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert all(len(each) == 8 and int(each, 16) >= 0 for each in made)
