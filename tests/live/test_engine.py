"""A real engine on its bad days: dead, frozen, restarted, silent, cut off in mid-answer; and registries on theirs."""

from __future__ import annotations

import asyncio
import http.client
import json
import secrets
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from mcp.adapters.docker import DockerEngine
from mcp.demo.image import WEB, load, script_image
from mcp.model.errors import AdapterError
from mcp.model.ports import PortBinding
from tests.contract.engine_fixtures import Heard, Read, World, docker_world, failure
from tests.helpers import free_port, soon
from tests.live.engine import REGISTRY_USER, START_S, PrivateEngine, Registry, private_engine, registry
from tests.live.engine_proxy import cutting, hang_up, serving

pytestmark = pytest.mark.engine

LIMIT_S = 1.0
"""How long the engine may be silent in these tests."""


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateEngine]:
    with private_engine() as engine:
        yield engine


@pytest.fixture
async def world(private: PrivateEngine) -> AsyncIterator[World]:
    """A world on the private engine; whatever a test did to it, it is up again afterwards."""
    async with docker_world(private.url) as made:
        engine, made.engine = (
            made.engine,
            DockerEngine(private.url, request_timeout_s=LIMIT_S, pull_silence_s=3 * LIMIT_S),
        )
        try:
            yield made
        finally:
            await made.engine.close()
            made.engine = engine
            private.repair()


@pytest.fixture(scope="module")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("registry")) as made:
        yield made


@pytest.fixture(scope="module")
def closed_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with registry(tmp_path_factory.mktemp("closed-registry"), login=True) as made:
        yield made


async def start(engine: PrivateEngine) -> None:
    """Start it and go on listening meanwhile. Not in a thread: the daemon would end with that thread."""
    engine.spawn()
    await soon("a private dockerd", engine.answers, START_S)


def image_of(tag: str, arch: str = "") -> tuple[str, str]:
    """Return the name and script of an image that no other test has."""
    return tag, WEB.replace("VERSION", tag) + f"# {secrets.token_hex(8)}\n"


def quiet(*_: object) -> None:
    """Hear no progress."""


# -------------------------------------------------------------- deaf, dead, alive


@pytest.mark.timeout(120)
async def test_no_call_to_a_frozen_engine_lasts_longer_than_twice_its_limit(
    world: World, private: PrivateEngine
) -> None:
    name = await world.run()
    new = world.request(generation=2)
    private.freeze()
    engine = world.engine
    calls = {
        "facts": engine.facts(),
        "list": engine.list(),
        "label": engine.label("web", 1, "x"),
        "create": engine.create(new),
        "start": engine.start(name),
        "stop": engine.stop(name, 30.0),
        "remove": engine.remove(name),
        "pull": engine.pull("127.0.0.1:1/none:v1", quiet),
        "logs": anext(engine.logs(name)),
        "execute": engine.execute(name, ("true",), 30.0),
    }
    begun_s = time.monotonic()
    errors = await asyncio.gather(*calls.values(), return_exceptions=True)
    assert time.monotonic() - begun_s < 2 * LIMIT_S + 1.0
    for call, error in zip(calls, errors, strict=True):
        assert isinstance(error, AdapterError), call
        assert (error.code, error.retryable) == ("engine_frozen", True), f"{call}: {error}"
        assert "does not answer" in error.reason
    facts = await engine.describe("127.0.0.1:1/none:v1")
    assert "the container engine does not answer" in facts.error


async def test_a_pull_that_hangs_on_a_frozen_engine_ends(
    world: World, private: PrivateEngine, open_registry: Registry
) -> None:
    tag, script = image_of("hanging:v1")
    whole = open_registry.push(tag, script_image(tag, script))
    open_registry.freeze()
    try:
        pulling = asyncio.create_task(world.engine.pull(whole, quiet))
        await soon("the engine asks the registry", lambda: _connections_to(open_registry.port) > 0)
        private.freeze()
        assert (await failure(pulling)).code == "engine_frozen"
    finally:
        open_registry.stop()
        open_registry.start()


def _connections_to(port: int) -> int:
    wanted = f":{port:04X} "
    return sum(wanted in line and " 01 " in line for line in Path("/proc/net/tcp").read_text().splitlines())


async def test_a_killed_engine_is_known_at_once_and_its_calls_fail_at_once(
    world: World, private: PrivateEngine
) -> None:
    heard = Heard(world.engine)
    await soon("events are heard", lambda: heard.actions == ["engine-up"])
    private.kill()
    begun_s = time.monotonic()
    await soon("it is heard", lambda: heard.actions == ["engine-up", "engine-down"], 1.0)
    for call in (
        world.engine.facts(),
        world.engine.list(),
        world.engine.create(world.request()),
        world.engine.start("x"),
    ):
        error = await failure(call)
        assert (error.code, error.retryable) == ("engine_down", True)
    assert time.monotonic() - begun_s < 1.0
    await heard.stop()


async def test_events_are_heard_again_after_a_crash_and_after_a_restart(world: World, private: PrivateEngine) -> None:
    heard = Heard(world.engine)
    await soon("events are heard", lambda: heard.actions == ["engine-up"])
    for end in (private.kill, private.stop):
        del heard.events[:]
        await asyncio.to_thread(end)
        await soon("it is heard", lambda: heard.actions == ["engine-down"], 2.0)
        await start(private)
        await soon("it is back", lambda: heard.actions == ["engine-down", "engine-up"])
    name = await world.run()
    await soon("its life is heard", lambda: heard.actions[2:] == ["create", "start"])
    await world.engine.remove(name)
    await heard.stop()


async def test_an_engine_that_is_away_from_the_start_is_told_once_and_heard_when_it_comes(
    world: World, private: PrivateEngine
) -> None:
    private.kill()
    private.socket.unlink()
    heard = Heard(world.engine)
    await soon("it is heard", lambda: heard.actions == ["engine-down"])
    assert "no such file" in heard.events[0].detail
    await start(private)
    await soon("it is back", lambda: heard.actions == ["engine-down", "engine-up"])
    await heard.stop()


@pytest.mark.timeout(120)
async def test_a_followed_log_tells_a_restart_of_the_engine_from_the_end_of_a_container() -> None:
    with private_engine("--live-restore") as engine:
        async with docker_world(engine.url) as world:
            name = await world.run("talker")
            read = Read(world, name)
            await soon("its beginning is read", lambda: read.lines)
            stopping = asyncio.create_task(asyncio.to_thread(engine.stop))
            assert (await failure(read.end())).code == "engine_down"
            await stopping
            await start(engine)
            assert (await world.state(name)).state == "running"


async def test_calls_under_way_survive_that_the_event_stream_begins_anew(world: World) -> None:
    name = await world.run("stubborn")
    stopping = asyncio.create_task(world.engine.stop(name, 1.0))
    await asyncio.sleep(0)
    await world.engine._client.renew()
    assert (await stopping).exit_code == 137


# ------------------------------------------------------------- things like engines


def listening(folder: Path, answer: bytes | None) -> AbstractAsyncContextManager[str]:
    """Give a socket that accepts and then answers always the same, or nothing."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            if answer is not None:
                writer.write(answer)
                return

    return serving(folder / "s.sock", handle)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mcp-") as folder:
        yield Path(folder)


async def told_by(url: str) -> AdapterError:
    engine = DockerEngine(url, request_timeout_s=LIMIT_S)
    try:
        return await failure(engine.facts())
    finally:
        await engine.close()


async def test_a_socket_that_accepts_and_never_answers_is_a_frozen_engine(short_folder: Path) -> None:
    async with listening(short_folder, None) as url:
        assert (await told_by(url)).code == "engine_frozen"


async def test_a_socket_that_hangs_up_is_an_engine_that_went_away(short_folder: Path) -> None:
    async with listening(short_folder, b"") as url:
        assert (await told_by(url)).code == "engine_down"


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"])
async def test_what_is_no_engine_is_called_that(short_folder: Path, answer: bytes) -> None:
    async with listening(short_folder, answer) as url:
        error = await told_by(url)
        assert error.code == "engine_error"
        assert "no container engine" in error.reason


async def test_a_missing_socket_is_an_engine_that_is_down(short_folder: Path) -> None:
    error = await told_by(f"unix://{short_folder}/none.sock")
    assert (error.code, "no such file" in error.reason) == ("engine_down", True)


async def test_a_pull_that_is_cut_is_not_taken_for_done(
    world: World, private: PrivateEngine, open_registry: Registry, short_folder: Path
) -> None:
    tag, script = image_of("cut:v1")
    whole = open_registry.push(tag, script_image(tag, script))
    async with cutting(private.socket, short_folder, b"/images/create") as url:
        engine = DockerEngine(url, request_timeout_s=LIMIT_S)
        assert (await failure(engine.pull(whole, quiet))).code == "engine_down"
        await engine.close()


# ---------------------------------------------------------------------- containers


def get(address: str, port: int) -> str:
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


async def test_a_port_is_bound_to_its_one_address(world: World) -> None:
    port = free_port()
    await world.run(ports=(PortBinding(address="127.0.1.7", host_port=port, container_port=8080),))
    await soon("it serves", lambda: _answers("127.0.1.7", port))
    assert get("127.0.1.7", port).startswith("web VERSION")
    for address in ("127.0.0.1", "127.0.1.8"):
        with pytest.raises(ConnectionRefusedError):
            get(address, port)


def _answers(address: str, port: int) -> bool:
    try:
        return bool(get(address, port))
    except (OSError, http.client.HTTPException):
        return False


async def test_one_port_serves_on_two_addresses_for_two_containers(world: World) -> None:
    port = free_port()
    for component, address in (("a", "127.0.1.1"), ("b", "127.0.1.2")):
        await world.run(component=component, ports=(PortBinding(address=address, host_port=port, container_port=8080),))
    for address in ("127.0.1.1", "127.0.1.2"):
        await soon(f"{address} serves", partial(_answers, address, port))


async def test_a_port_that_a_program_holds_is_named_with_what_to_do(world: World) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        request = world.request(ports=(PortBinding(address="127.0.0.1", host_port=port, container_port=8080),))
        await world.engine.create(request)
        error = await failure(world.engine.start(request.name))
    assert error.code == "port_in_use"
    assert (
        error.reason
        == f"cannot start container {request.name}: listen tcp4 127.0.0.1:{port}: bind: address already in use"
    )
    assert "ss -ltnp" in error.hint


async def test_memory_cpu_environment_user_and_command_reach_the_container(
    world: World, private: PrivateEngine
) -> None:
    request = world.request(
        memory_bytes=32 << 20, cpu_cores=0.5, env={"LEVEL": "info"}, user="1000:1000", cmd=("a", "b c"), stop_grace_s=7.0,
        restart="on-failure:3", binds=("/etc:/mnt:ro",),
    )  # fmt: skip
    await world.engine.create(request)
    [shown] = json.loads(private.docker("inspect", request.name))
    host, config = shown["HostConfig"], shown["Config"]
    assert (host["Memory"], host["NanoCpus"], host["Binds"]) == (32 << 20, 500_000_000, ["/etc:/mnt:ro"])
    assert host["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    assert (config["User"], config["Cmd"], config["StopTimeout"]) == ("1000:1000", ["a", "b c"], 7)
    assert "LEVEL=info" in config["Env"]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"binds": ("relative/path:/data",)}, "bad_mount"),
        ({"binds": ("/etc/passwd:/bin",)}, "bad_mount"),
        ({"binds": ("/proc/none/such:/data",)}, "bad_mount"),
        ({"user": "nobody-such"}, "bad_user"),
        ({"memory_bytes": 1024}, "bad_request"),
        ({"cpu_cores": 4096.0}, "bad_request"),
        ({"restart": "sometimes"}, "bad_request"),
    ],
)
async def test_what_an_engine_refuses_has_a_code_and_the_reason(
    world: World, changes: dict[str, Any], code: str
) -> None:
    request = world.request(**changes)

    async def make() -> None:
        await world.engine.create(request)
        await world.engine.start(request.name)

    error = await failure(make())
    assert error.code == code
    assert not error.retryable
    assert error.reason.startswith(
        f"cannot {'start' if await world.state(request.name) else 'create'} container {request.name}: "
    )
    assert "OCI runtime" not in error.reason
    await world.engine.remove(request.name)
    assert await world.engine.list(world.service) == []


async def test_a_program_that_is_not_in_the_image_is_a_bad_command(world: World, private: PrivateEngine) -> None:
    broken = script_image(f"localhost/mcp-test-broken-{secrets.token_hex(4)}:v1", WEB)
    broken = attrs.evolve(broken, config=broken.config.replace(b'"/entry"', b'"/no-entry"'))
    await load(private.url, [broken])
    request = world.request(image=broken.name)
    await world.engine.create(request)
    error = await failure(world.engine.start(request.name))
    assert (error.code, error.retryable) == ("bad_command", False)


async def test_a_network_that_somebody_removed_is_made_again(world: World, private: PrivateEngine) -> None:
    first = world.request(component="a")
    await world.engine.create(first)
    private.docker("network", "rm", world.network)
    assert (await world.engine.start(first.name)).state == "running"
    assert world.network in private.docker("network", "ls", "--format", "{{.Name}}").split()


async def test_agents_that_need_one_network_at_the_same_moment_end_with_one(
    world: World, private: PrivateEngine
) -> None:
    engines = [DockerEngine(private.url) for _ in range(8)]
    await asyncio.gather(*(engine._ensure_network(world.network) for engine in engines))
    assert private.docker("network", "ls", "--format", "{{.Name}}").split().count(world.network) == 1
    await asyncio.gather(*(engine.close() for engine in engines))


async def test_a_slow_start_runs_before_it_serves(world: World) -> None:
    port = free_port()
    name = await world.run(
        env={"DELAY": "1"}, ports=(PortBinding(address="127.0.0.1", host_port=port, container_port=8080),)
    )
    assert (await world.state(name)).state == "running"
    assert not _answers("127.0.0.1", port)
    await soon("it serves", lambda: _answers("127.0.0.1", port))


async def test_ten_containers_start_at_once(world: World) -> None:
    await asyncio.gather(*(world.run(component=f"c{n}") for n in range(10)))
    assert [c.state for c in await world.engine.list(world.service)] == ["running"] * 10


async def test_a_long_line_arrives_whole_and_a_longer_one_in_pieces(world: World, private: PrivateEngine) -> None:
    script = "#!/bin/sh\nfor n in 20000 100000; do dd if=/dev/zero bs=$n count=1 2>/dev/null | tr '\\0' x; echo; done\nprintf end\n"
    talker = script_image(f"localhost/mcp-test-long-{secrets.token_hex(4)}:v1", script)
    await load(private.url, [talker])
    name = await world.run(image=talker.name)
    read = Read(world, name)
    await read.end()
    texts = [line.text for line in await world.lines(name)]
    assert texts[0] == "x" * 20000
    assert "".join(texts[1:-1]) == "x" * 100000
    assert max(map(len, texts)) < 64 * 1024
    assert texts[-1] == "end"


async def test_agents_that_share_an_engine_do_not_see_one_another(world: World, private: PrivateEngine) -> None:
    one, other = (DockerEngine(private.url, node=node) for node in ("n1", "n2"))
    request = world.request()
    request = attrs.evolve(request, labels=request.labels | {"net.metacircular.mcp.node": "n1"})
    await one.create(request)
    assert await other.list(world.service) == []
    assert await other.remove(request.name) is False
    assert (await failure(other.create(request))).code == "name_taken"
    assert len(await one.list(world.service)) == 1
    await one.close()
    await other.close()


async def test_creating_and_starting_takes_three_requests_and_no_more(
    world: World, private: PrivateEngine, short_folder: Path
) -> None:
    asked: list[str] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, up = await asyncio.open_unix_connection(private.socket)

        async def pass_up() -> None:
            while data := await reader.read(65536):
                if data.startswith((b"GET ", b"POST ", b"DELETE ")):
                    asked.append(data.split(b"\r\n", 1)[0].decode())
                up.write(data)

        passing = asyncio.create_task(pass_up())
        try:
            while data := await above.read(65536):
                writer.write(data)
        finally:
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
            await hang_up(up)

    async with serving(short_folder / "p.sock", handle) as url:
        engine = DockerEngine(url)
        await engine.create(world.request(component="first"))  # which asks for version and network too
        asked.clear()
        second = world.request(component="second")
        await engine.create(second)
        assert (await engine.start(second.name)).state == "running"
        await engine.close()
    assert [request.split("?")[0].split()[1].rpartition("/")[2] for request in asked] == ["create", "start", "json"]


async def test_images_that_are_made_here_are_loaded_once(private: PrivateEngine) -> None:
    images = [script_image(f"localhost/mcp-test-{secrets.token_hex(4)}:v1", WEB) for _ in range(2)]
    assert await load(private.url, images) == [image.name for image in images]
    assert await load(private.url, images) == []
    changed = attrs.evolve(images[0], config=script_image(images[0].name, WEB, {"NEW": "1"}).config)
    assert await load(private.url, [changed, images[1]]) == [changed.name]


async def test_images_cannot_be_loaded_into_an_engine_that_is_away(short_folder: Path) -> None:
    image = script_image("localhost/mcp-test-nowhere:v1", WEB)
    assert (await failure(load(f"unix://{short_folder}/none.sock", [image]))).code == "engine_down"


# ---------------------------------------------------------------------- registries


async def test_a_pull_fetches_once_and_tells_its_progress(world: World, open_registry: Registry) -> None:
    tag, script = image_of("web:v1")
    whole = open_registry.push_list(tag, script_image(tag, script), script_image(tag, script, arch="arm64"))
    facts = await world.engine.describe(whole)
    assert (facts.platforms, facts.is_local, facts.error) == (("amd64", "arm64"), False, "")
    said: list[tuple[str, int, int]] = []
    assert await world.engine.pull(whole, lambda *step: said.append(step)) is True
    assert said
    assert all(text.startswith(f"{whole}: ") and done <= total for text, done, total in said)
    assert await world.engine.pull(whole, quiet) is False
    local = await world.engine.describe(whole)
    assert (local.is_local, local.digest) == (True, facts.digest)


async def test_an_image_for_other_machines_is_known_before_and_refused_by_the_pull(
    world: World, open_registry: Registry
) -> None:
    tag, script = image_of("armonly:v1")
    whole = open_registry.push_list(tag, script_image(tag, script, arch="arm64"))
    assert (await world.engine.describe(whole)).platforms == ("arm64",)
    error = await failure(world.engine.pull(whole, quiet))
    assert (error.code, error.retryable) == ("platform_missing", False)
    assert "linux/amd64" in error.reason


@pytest.mark.parametrize("name", ["web:v99", "nothing:v1"])
async def test_a_tag_or_an_image_that_a_registry_has_not_is_missing(
    world: World, open_registry: Registry, name: str
) -> None:
    whole = f"{open_registry.address}/{name}"
    error = await failure(world.engine.pull(whole, quiet))
    assert (error.code, error.retryable) == ("image_missing", False)
    assert whole in error.reason
    assert whole in (await world.engine.describe(whole)).error


async def test_a_registry_that_wants_a_password_gets_it_and_no_error_has_it(
    private: PrivateEngine, closed_registry: Registry, world: World
) -> None:
    tag, script = image_of("secret:v1")
    whole = closed_registry.push_list(tag, script_image(tag, script))
    wrong = "not-the-password-8f7a"
    for logins in ({}, {closed_registry.address: ("tester", wrong)}):
        engine = DockerEngine(private.url, logins)
        error = await failure(engine.pull(whole, quiet))
        facts = await engine.describe(whole)
        await engine.close()
        assert (error.code, error.retryable) == ("auth_failed", False)
        assert wrong not in f"{error} {error.hint} {facts}"
        assert whole in facts.error
        assert facts.platforms == ()
    engine = DockerEngine(private.url, {closed_registry.address: REGISTRY_USER})
    assert (await engine.describe(whole)).platforms == ("amd64",)
    assert await engine.pull(whole, quiet) is True
    await engine.close()


async def test_a_damaged_layer_is_told_and_the_image_is_not_there(world: World, open_registry: Registry) -> None:
    tag, script = image_of("damaged:v1")
    before = set(open_registry.blobs())
    whole = open_registry.push(tag, script_image(tag, script))
    for blob in set(open_registry.blobs()) - before:
        data = bytearray(blob.read_bytes())
        if data[:2] == b"\x1f\x8b":
            data[len(data) // 2] ^= 0xFF
            blob.write_bytes(data)
    error = await failure(world.engine.pull(whole, quiet))
    assert (error.code, error.retryable) == ("image_damaged", True)
    assert (await failure(world.engine.create(world.request(image=whole)))).code == "image_missing"


async def test_a_registry_that_is_down_is_told_at_once(world: World, open_registry: Registry) -> None:
    open_registry.stop()
    try:
        begun_s = time.monotonic()
        error = await failure(world.engine.pull(f"{open_registry.address}/web:v5", quiet))
        assert (error.code, error.retryable) == ("registry_unreachable", True)
        assert "connection refused" in error.reason
        assert time.monotonic() - begun_s < 2.0
    finally:
        open_registry.start()


@pytest.mark.timeout(120)
async def test_a_registry_that_never_answers_is_not_mistaken_for_a_frozen_engine(
    world: World, open_registry: Registry
) -> None:
    open_registry.freeze()
    try:
        error = await failure(world.engine.pull(f"{open_registry.address}/web:v6", quiet))
        assert (error.code, error.retryable) == ("registry_unreachable", True)
        assert "the registry does not answer" in error.reason
    finally:
        open_registry.stop()
        open_registry.start()


async def test_a_pull_that_is_given_up_leaves_no_image(world: World, open_registry: Registry) -> None:
    tag, script = image_of("given-up:v1")
    whole = open_registry.push(tag, script_image(tag, script))
    open_registry.freeze()
    try:
        pulling = asyncio.create_task(world.engine.pull(whole, quiet))
        await soon("the engine asks the registry", lambda: _connections_to(open_registry.port) > 0)
        pulling.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pulling
    finally:
        open_registry.stop()
        open_registry.start()
    assert await world.engine.image_id(whole) == ""
