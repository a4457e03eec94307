"""Each trap of nats-py that docs/bus.md names, shown closed on a real nats-server."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mcp.bus import nats_bus, tls
from mcp.bus.codec import seal
from mcp.bus.keys import KeyPair, new_key, sign
from mcp.bus.links import MasterLink
from mcp.bus.nats_bus import BusAddress, Credential, NatsTransport, connect, tls_context
from mcp.bus.server import find_binary
from mcp.bus.transport import Frame
from mcp.model.errors import BusUnreachable, NotPermitted
from tests.builders import heartbeat
from tests.contract.bus_fixtures import Ear, Watch
from tests.helpers import free_port, soon
from tests.real_bus import RealBus
from tests.tcp_proxy import TcpProxy

AGENT_LIMIT_BYTES = 32 * 1024 * 1024


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBus]:
    """A server for the tests that do it no harm, or bring it back."""
    server = RealBus(tmp_path_factory.mktemp("nats"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def server(shared: RealBus) -> RealBus:
    """The server, running."""
    shared.start()
    return shared


@pytest.fixture
def quick_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notice a silent link in a second instead of fifteen."""
    monkeypatch.setattr(nats_bus, "PING_S", 0.3)


@asynccontextmanager
async def opened(server: RealBus, role: Any, name: str = "", **more: Any) -> AsyncIterator[NatsTransport]:
    transport = await server.connect(role, name, **more)
    try:
        yield transport
    finally:
        await transport.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Raw:
    """A client without manners: it sends what bytes it likes, as somebody who may connect."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    @asynccontextmanager
    async def open(cls, server: RealBus, key: KeyPair) -> AsyncIterator[Raw]:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", server.port, ssl=tls_context(server.address()), server_hostname="mcp-bus"
        )
        try:
            info = json.loads((await reader.readline()).removeprefix(b"INFO "))
            signature = base64.b64encode(sign(key.seed, info["nonce"].encode())).decode()
            options = {"verbose": False, "headers": True, "nkey": key.public_key, "sig": signature}
            writer.write(b"CONNECT " + json.dumps(options).encode() + b"\r\n")
            raw = cls(reader, writer)
            await raw.send(b"")
            yield raw
        finally:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()

    async def send(self, data: bytes) -> None:
        """Send bytes and wait until the server has read them."""
        self._writer.write(data + b"PING\r\n")
        await self._writer.drain()
        while (line := await self._reader.readline()) != b"PONG\r\n":
            if line == b"PING\r\n":
                self._writer.write(b"PONG\r\n")
            elif not line:
                raise ConnectionError("the server hung up")


# ----------------------------------------------------------- what others may send


def hpub(subject: bytes, headers: bytes, body: bytes = b"hi") -> bytes:
    return b"HPUB %s %d %d\r\n%s%s\r\n" % (subject, len(headers), len(headers) + len(body), headers, body)


@pytest.mark.parametrize(
    "said",
    [
        b"PUB mcp.node.orion.heartbeat\x0b%(sid)d 2\r\nhi\r\n",
        b"PUB mcp.node.orion.heartbeat\x0c%(sid)d 2\r\nhi\r\n",
        b"PUB mcp.node.orion.heartbeat\x0b%(sid)d x\x0b1 2\r\nhi\r\n",
        b"PUB mcp.node.orion.heartbeat\x0bzz 2\r\nhi\r\n",
        b"PUB mcp.node.orion.\xff\xfe 2\r\nhi\r\n",
        b"PUB mcp.node.orion.x \xff\xfe 2\r\nhi\r\n",
        b"PUB mcp.node.orion.x mcp.work.svc.probe 2\r\nhi\r\n",
        b"PUB mcp.node.orion." + b"x" * 3900 + b" 2\r\nhi\r\n",
        hpub(b"mcp.node.orion.x", b"NATS/1.0 \xff\xfe\xfd nonsense\r\n\r\n"),
        hpub(b"mcp.node.orion.x", b"NATS/1.0 503\r\n\r\n", b""),
        hpub(b"mcp.node.orion.x", b"NATS/1.0"),
        hpub(b"mcp.node.orion.x", b"NATS/1.0\r\n"),
        hpub(b"mcp.node.orion.x", b"12345"),
        hpub(b"mcp.node.orion.x", b"NATS/1.0\r\n\xff: \xfe\r\n: \r\nno colon\r\na\r\n b: c\r\n\r\n"),
        hpub(b"mcp.node.orion.x", b"NATS/1.0\r\n" + b"a: b\r\n" * 30_000 + b"\r\n"),
    ],
    ids=range(15),
)
async def test_no_bytes_of_one_client_end_or_misdirect_what_another_hears(server: RealBus, said: bytes) -> None:
    """nats-py 2.16 handed the first of these to the subscription of another node, and was thrown off the bus by most others."""
    async with opened(server, "master") as master, Raw.open(server, server.key("agent", "orion")) as orion:
        watch, ears = Watch(master), {name: Ear() for name in ("orion", "svc")}
        for name, ear in ears.items():
            live = await master.subscribe(f"mcp.node.{name}.>", ear)
        await master.flush()
        await orion.send(said.replace(b"%(sid)d", str(live.live._id).encode()))
        await orion.send(b"PUB mcp.node.orion.heartbeat 4\r\nlast\r\n")
        await soon("what comes next is heard", lambda: b"last" in ears["orion"].bodies)
        assert ears["svc"].frames == []
        assert len(ears["orion"].frames) == 2
        assert all(subject.startswith("mcp.node.orion.") for subject in ears["orion"].subjects)
        assert watch.states == []


# ------------------------------------------------- what nats-py takes for the end


async def is_back(transport: NatsTransport, watch: Watch) -> None:
    await soon("it is lost and back", lambda: watch.states == ["lost", "connected"] and transport.is_connected, 5.0)


@pytest.mark.parametrize(
    "line",
    [
        b"PUB mcp.node.orion.x 262145\r\n",
        b"NONSENSE\r\n",
        b"SUB a\x00..b 1\r\nPUB\r\n",
    ],
    ids=["maximum payload violation", "unknown operation", "parser error"],
)
async def test_an_error_that_is_fatal_to_the_client_costs_one_reconnect(server: RealBus, line: bytes) -> None:
    async with opened(server, "agent", "orion") as orion, opened(server, "master") as master:
        watch, ear = Watch(orion), Ear()
        await orion.subscribe("mcp.work.orion.>", ear)
        assert orion._client is not None
        orion._client._link.write(line)  # type: ignore[no-untyped-call]
        await is_back(orion, watch)
        await master.publish(Frame("mcp.work.orion.probe"))
        await ear.hears(1)


async def test_a_payload_at_the_servers_limit_plus_a_header_costs_one_reconnect(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        assert orion._client is not None
        await orion._client.publish("mcp.node.orion.heartbeat", b"x" * 256 * 1024, headers={"a": "b"})
        await is_back(orion, watch)


async def test_a_read_loop_that_died_while_the_client_looks_connected_costs_one_reconnect(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        assert orion._client is not None
        assert orion._client._reading_task is not None
        orion._client._reading_task.cancel()
        await is_back(orion, watch)


async def test_an_on_denied_that_raises_does_not_end_the_reading(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion, opened(server, "master") as master:
        watch, ear, told = Watch(orion), Ear(), list[str]()

        def raise_it(verb: str, subject: str) -> None:
            told.append(subject)
            raise RuntimeError("a bug in a handler")

        orion.on_denied = raise_it
        await orion.subscribe("mcp.work.orion.>", ear)
        await orion.publish(Frame("mcp.node.svc.heartbeat"))
        await orion.flush()
        await master.publish(Frame("mcp.work.orion.probe"))
        await ear.hears(1)
        assert told == ["mcp.node.svc.heartbeat"]
        assert watch.states == []


async def test_a_pong_that_comes_after_the_flush_gave_up_does_no_harm(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        server.freeze()
        try:
            with pytest.raises(BusUnreachable, match="does not answer"):
                await orion.flush(0.2)
        finally:
            server.thaw()
        await orion.flush()
        assert watch.states == []


async def test_a_flush_waits_for_what_was_said_before_it(server: RealBus) -> None:
    """nats-py's own lets its ping overtake what still waits to be written, and a refusal then comes after the flush."""
    async with opened(server, "agent", "orion") as orion:
        for _ in range(20):
            watch = Watch(orion)
            for i in range(50):
                await orion.publish(Frame(f"mcp.node.svc.{i}"))
            await orion.flush()
            assert len(watch.denied) == 50


# ---------------------------------------------------------------- links that die


async def test_a_silent_link_is_given_up_in_time_and_made_anew(server: RealBus, quick_pings: None) -> None:
    async with TcpProxy(server.port) as wire, opened(server, "agent", "orion", port=wire.port) as orion:
        watch, ear = Watch(orion), Ear()
        await orion.subscribe("mcp.work.orion.>", ear)
        wire.hold()
        began = time.perf_counter()
        await soon("the silence is noticed", lambda: watch.states == ["lost"], 5.0)
        print(f"noticed after {time.perf_counter() - began:.2f} s, pings every 0.3 s")
        wire.release()
        await soon("it is back", lambda: watch.states == ["lost", "connected"], 10.0)
        async with opened(server, "master") as master:
            await master.publish(Frame("mcp.work.orion.probe"))
            await ear.hears(1)


async def test_a_silent_link_with_full_buffers_is_given_up_in_time_too(server: RealBus, quick_pings: None) -> None:
    """With nats-py's own reconnecting this one never came back (nats.py#671)."""
    async with TcpProxy(server.port) as wire, opened(server, "agent", "orion", port=wire.port) as orion:
        watch = Watch(orion)
        wire.hold()
        with pytest.raises(BusUnreachable):
            await fill(orion)
        await soon("it is lost", lambda: watch.states == ["lost"], 5.0)
        wire.release()
        await soon("it is back", lambda: watch.states == ["lost", "connected"], 10.0)
        await orion.publish(Frame("mcp.node.orion.heartbeat"))
        await orion.flush()


async def test_what_waits_to_be_sent_on_a_stuck_link_is_bounded(server: RealBus) -> None:
    async with TcpProxy(server.port) as wire, opened(server, "agent", "orion", port=wire.port) as orion:
        wire.hold()
        sent = list[int]()
        filling = asyncio.ensure_future(fill(orion, sent))
        await soon("nothing moves any more", lambda: _stands_still(sent))
        print(f"{len(sent) / 10:.1f} MB were taken before the publisher had to wait")
        assert len(sent) < 400  # 2 MiB here, the rest in the kernel's buffers and the proxy's
        filling.cancel()
        wire.release()


async def fill(orion: NatsTransport, sent: list[int] | None = None) -> None:
    while True:
        await orion.publish(Frame("mcp.node.orion.log.s", b"x" * 100_000))
        if sent is not None:
            sent.append(1)


async def _stands_still(sent: list[int]) -> bool:
    before = len(sent)
    await asyncio.sleep(0.3)
    return len(sent) == before > 0


async def test_a_frozen_server_is_lost_and_back_when_it_thaws(server: RealBus, quick_pings: None) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        server.freeze()
        try:
            await soon("the silence is noticed", lambda: watch.states == ["lost"], 5.0)
        finally:
            server.thaw()
        await soon("it is back", lambda: watch.states == ["lost", "connected"], 10.0)


async def test_the_kernel_gives_up_on_unacknowledged_bytes_after_ten_seconds(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        assert orion._client is not None
        raw = orion._client._link._socket
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 10_000


async def test_many_reconnects_leave_nothing_behind(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        for pattern in ("mcp.work.orion.>", "sealed.work.orion.>", "_INBOX.agent.orion.>"):
            await orion.subscribe(pattern, Ear())
        await orion.flush()

        async def lose_and_find(times: int) -> tuple[int, int]:
            for _ in range(times):
                watch.states.clear()
                assert orion._client is not None
                orion._client._link.close()
                await soon("it is back", lambda: watch.states == ["lost", "connected"], 5.0)
            await orion.flush()
            return len(asyncio.all_tasks()), open_files()

        before = await lose_and_find(2)
        assert await lose_and_find(10) == before


async def test_a_bus_that_is_away_for_long_has_everybody_back_within_two_seconds_of_its_return(
    server: RealBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(server, "agent", "orion") as orion:
        monkeypatch.setattr(nats_bus, "FIRST_WAITS_S", ())  # as after ten minutes
        server.kill()
        await soon("it is lost", lambda: not orion.is_connected, 5.0)
        attempts: list[float] = []
        original = orion._attempt

        async def counted() -> Any:
            attempts.append(time.perf_counter())
            return await original()

        monkeypatch.setattr(orion, "_attempt", counted)
        await soon("it has tried three times", lambda: len(attempts) == 3)
        server.start()
        began = time.perf_counter()
        await soon("it is back", lambda: orion.is_connected, 2.5)
        print(f"back after {time.perf_counter() - began:.2f} s")


def test_waits_grow_with_jitter_and_are_capped() -> None:
    waits = [[nats_bus._wait_s(attempt, 30.0) for _ in range(50)] for attempt in range(40)]
    assert all(0.04 <= wait <= 0.6 for row in waits[:10] for wait in row)
    assert all(len(set(row)) > 40 for row in waits)
    assert all(15.0 <= wait <= 30.0 for wait in waits[-1])
    assert sum(max(row) for row in waits[:8]) < 3.0
    assert all(1.0 <= nats_bus._wait_s(40, 2.0) <= 2.0 for _ in range(50))


# -------------------------------------------------------------------- commands


async def test_a_command_that_finds_no_bus_says_so_at_once(server: RealBus) -> None:
    began = time.perf_counter()
    with pytest.raises(BusUnreachable, match=r"cannot connect to the bus at 127\.0\.0\.1:\d+: nothing listens there"):
        await server.connect("operator", "kyle", port=free_port(), forever=False)
    assert time.perf_counter() - began < 1.0


async def test_a_command_that_finds_a_silent_bus_gives_up_after_two_seconds(server: RealBus) -> None:
    async with TcpProxy(server.port) as wire:
        wire.hold()
        began = time.perf_counter()
        with pytest.raises(BusUnreachable, match="no answer in time"):
            await server.connect("operator", "kyle", port=wire.port, forever=False)
        assert 1.5 < time.perf_counter() - began < 2.5


async def test_a_command_that_loses_the_bus_is_closed_and_does_not_try_again(server: RealBus) -> None:
    async with TcpProxy(server.port) as wire, opened(server, "operator", "kyle", port=wire.port, forever=False) as kyle:
        watch = Watch(kyle)
        await wire.cut()
        await soon("it is closed", lambda: watch.states == ["lost", "closed"], 5.0)
        with pytest.raises(BusUnreachable, match="it was lost"):
            await kyle.publish(Frame("mcp.cmd.kyle.get_status"))
        assert wire.connections == 1


async def test_a_connection_that_is_cancelled_while_it_is_made_leaves_no_socket_behind(server: RealBus) -> None:
    async with TcpProxy(server.port) as wire:
        wire.hold()
        making = asyncio.ensure_future(server.connect("operator", "kyle", port=wire.port, forever=False))
        await soon("it has begun", lambda: wire.connections == 1)
        before = open_files()
        making.cancel()
        with pytest.raises(asyncio.CancelledError):
            await making
        await soon("the socket is gone", lambda: open_files() < before)


# ----------------------------------------------------------------- credentials


async def test_one_authorization_violation_is_not_fatal_to_an_agent(server: RealBus) -> None:
    async with opened(server, "agent", "orion") as orion:
        watch = Watch(orion)
        server.remove("agent", "orion")
        server.reload()
        await soon("it is cut", lambda: watch.states == ["lost"], 5.0)
        refused = server._said("Authorization Violation") + server._said("authentication error")
        await soon(
            "it was refused again",
            lambda: server._said("Authorization Violation") + server._said("authentication error") > refused,
        )
        server.add("agent", "orion")
        server.reload()
        await soon("it is back", lambda: watch.states == ["lost", "connected"], 5.0)


async def test_a_credential_refused_for_good_closes_the_link_and_says_why(server: RealBus) -> None:
    server.add("agent", "gone")
    server.reload()
    transport = await connect(
        server.address(), server.credential("agent", "gone"), forever=True, name="test", refusals=3, refused_for_s=0.3
    )
    watch = Watch(transport)
    server.remove("agent", "gone")
    server.reload()
    began = time.perf_counter()
    await soon("it is closed", lambda: watch.states == ["lost", "closed"], 5.0)
    assert time.perf_counter() - began > 0.25
    assert "does not accept the credential of agent gone" in transport.closed_because
    with pytest.raises(BusUnreachable, match="does not accept the credential of agent gone"):
        await transport.publish(Frame("mcp.node.gone.heartbeat"))
    await transport.close()


async def test_a_few_refusals_in_quick_succession_are_not_enough(server: RealBus) -> None:
    stranger = Credential(role="agent", name="stranger", seed=new_key().seed)
    began = time.perf_counter()
    with pytest.raises(NotPermitted, match="does not accept the credential of agent stranger"):
        await connect(server.address(), stranger, forever=True, name="test", refusals=2, refused_for_s=1.5)
    assert time.perf_counter() - began >= 1.5


async def test_a_stranger_is_told_at_once_when_it_is_a_command(server: RealBus) -> None:
    stranger = Credential(role="operator", name="mallory", seed=new_key().seed)
    with pytest.raises(NotPermitted, match="operator mallory") as caught:
        await connect(server.address(), stranger, forever=False, name="test")
    assert caught.value.hint


@pytest.mark.parametrize("seed", ["", "nonsense", "SU" + "A" * 56, new_key().public_key], ids=range(4))
async def test_a_seed_that_is_none_is_named_and_never_shown(server: RealBus, seed: str) -> None:
    credential = Credential(role="agent", name="orion", seed=seed)
    with pytest.raises(NotPermitted, match="cannot connect to the bus as agent orion: its key is not") as caught:
        await connect(server.address(), credential, forever=True, name="test")
    assert not seed or seed not in str(caught.value)
    assert not seed or seed not in repr(credential)


# ------------------------------------------------------------------------- TLS


class Listener:
    """Something that is not the bus, and remembers what is said to it."""

    def __init__(self, greeting: bytes = b"", context: ssl.SSLContext | None = None) -> None:
        self.said = b""
        self._greeting, self._context = greeting, context
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(self._greeting)
        try:
            while data := await reader.read(4096):
                self.said += data
        except OSError:
            pass
        finally:
            writer.transport.abort()


INFO = b'INFO {"server_id":"X","version":"2.15.1","max_payload":1048576,"nonce":"abc","auth_required":true}\r\n'


async def test_a_plaintext_server_is_told_nothing(server: RealBus) -> None:
    """nats-py, given tls:// and a context but no handshake first, connects to it in the clear."""
    listener = Listener(INFO)
    async with listener as port:
        with pytest.raises(BusUnreachable):
            await server.connect("operator", "kyle", port=port, forever=False)
    assert listener.said.startswith(b"\x16\x03")  # a TLS hello
    assert b"CONNECT" not in listener.said
    assert server.key("operator", "kyle").public_key.encode() not in listener.said


async def test_a_real_server_without_tls_is_refused(server: RealBus, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    with log.open("wb") as output:
        plain = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
            [find_binary(), "-a", "127.0.0.1", "-p", str(port)], stdout=output, stderr=output
        )
    try:
        await soon("it is ready", lambda: "Server is ready" in log.read_text())
        with pytest.raises(BusUnreachable, match=r"speak TLS as the bus does|hung up in the middle of the greeting"):
            await server.connect("operator", "kyle", port=port, forever=False)
    finally:
        plain.kill()
        plain.wait()


def server_context(folder: Path, authority: tls.Certificate) -> ssl.SSLContext:
    file = folder / "cert.pem"
    file.write_text(tls.new_server_certificate(authority, time.time()).text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    return context


async def test_a_server_of_another_authority_is_refused_and_told_nothing(server: RealBus, tmp_path: Path) -> None:
    listener = Listener(INFO, server_context(tmp_path, tls.new_authority("other", time.time())))
    async with listener as port:
        with pytest.raises(BusUnreachable, match="it shows another certificate than expected"):
            await server.connect("operator", "kyle", port=port, forever=False)
    assert listener.said == b""


async def test_a_server_of_another_name_is_refused(server: RealBus) -> None:
    address = BusAddress(host="127.0.0.1", port=server.port, tls_name="elsewhere", ca_pem=server.ca_pem)
    with pytest.raises(BusUnreachable, match="it shows another certificate than expected"):
        await connect(address, server.credential("operator", "kyle"), forever=False, name="test")


async def test_an_older_tls_is_refused(server: RealBus, tmp_path: Path) -> None:
    context = server_context(tmp_path, server._authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    listener = Listener(INFO, context)
    async with listener as port:
        with pytest.raises(BusUnreachable, match=r"speak TLS as the bus does|hung up in the middle of the greeting"):
            await server.connect("operator", "kyle", port=port, forever=False)
    assert listener.said == b""


async def test_a_newcomer_accepts_the_one_certificate_that_its_token_names(server: RealBus) -> None:
    pinned = BusAddress(host="127.0.0.1", port=server.port, fingerprint=tls.fingerprint(server.certificate.pem))
    transport = await connect(pinned, server.credential("join", "inv1"), forever=False, name="test")
    assert transport.is_connected
    await transport.close()


async def test_a_newcomer_refuses_any_other_certificate_and_says_nothing(server: RealBus, tmp_path: Path) -> None:
    listener = Listener(INFO, server_context(tmp_path, server._authority))
    async with listener as port:
        pinned = BusAddress(host="127.0.0.1", port=port, fingerprint=tls.fingerprint(server.certificate.pem))
        with pytest.raises(BusUnreachable, match="the certificate is not the one that the token was made for"):
            await connect(pinned, server.credential("join", "inv1"), forever=False, name="test")
    assert listener.said == b""


async def test_without_an_authority_or_a_fingerprint_nobody_is_trusted(server: RealBus) -> None:
    address = BusAddress(host="127.0.0.1", port=server.port)
    with pytest.raises(BusUnreachable, match="neither its CA nor its certificate is known"):
        await connect(address, server.credential("operator", "kyle"), forever=False, name="test")


# ---------------------------------------------------------------- floods and size


async def test_the_flood_of_one_node_leaves_the_others_heard(server: RealBus) -> None:
    flood = seal("mcp.node.orion.heartbeat", heartbeat())
    lines = b"PUB mcp.node.orion.heartbeat %d\r\n%s\r\n" % (len(flood.body), flood.body) * 500
    async with (
        opened(server, "master") as hearing,
        opened(server, "answers") as answering,
        opened(server, "agent", "svc") as svc,
        Raw.open(server, server.key("agent", "orion")) as orion,
    ):
        clock = _Clock()
        master, took, heard, states = MasterLink(hearing, answering, clock, 1), list[float](), Ear(), Watch(hearing)
        await master.watch("orion", lambda report: None)
        await master.watch("svc", lambda report: took.append(time.perf_counter() - report.message.clock_s))
        sending = asyncio.ensure_future(_for_a_while(orion, lines))
        while not sending.done():
            await svc.publish(seal("mcp.node.svc.heartbeat", heartbeat(clock_s=time.perf_counter())))
            await asyncio.sleep(0.05)
        messages = await sending * 500
        took.sort()
        print(
            f"{messages} messages; the other node: median {took[len(took) // 2] * 1000:.1f}, worst {took[-1] * 1000:.1f} ms"
        )
        assert len(took) >= 20
        assert took[int(len(took) * 0.9)] < 0.5
        assert states.states == []
        assert heard.frames == []
        await master.close()


async def _for_a_while(orion: Raw, lines: bytes) -> int:
    end = time.perf_counter() + 2.5
    count = 0
    while time.perf_counter() < end:
        await orion.send(lines)
        count += 1
    return count


class _Clock:
    def monotonic_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


AGENT = """
import asyncio, sys
from pathlib import Path
from mcp.adapters.clock import SystemClock
from mcp.bus.links import AgentLink
from mcp.bus.nats_bus import BusAddress, Credential, connect

async def main():
    port, ca, seed = sys.argv[1:]
    address = BusAddress(host="127.0.0.1", port=int(port), ca_pem=Path(ca).read_text())
    transport = await connect(address, Credential(role="agent", name="orion", seed=seed), forever=True, name="test")
    await AgentLink(transport, "orion", SystemClock()).start(lambda order: None)
    await transport.flush()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(status["VmRSS"].split()[0], *sorted(set(sys.modules) & {"aiohttp", "cryptography", "nats.js", "nkeys", "click"}))
    await transport.close()

asyncio.run(main())
"""


def test_an_agent_on_the_bus_is_small_and_loads_nothing_that_it_does_not_use(server: RealBus, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text(server.ca_pem)
    command = [sys.executable, "-c", AGENT, str(server.port), str(ca), server.key("agent", "orion").seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    resident_kib, *loaded = done.stdout.split()
    print(f"{int(resident_kib) / 1024:.1f} MiB resident")
    assert loaded == []
    assert int(resident_kib) * 1024 < AGENT_LIMIT_BYTES


def test_what_was_hidden_from_nats_py_can_be_imported_by_others() -> None:
    script = (
        "import sys, mcp.bus.nats_bus\n"
        "assert not {'aiohttp', 'nats.js', 'importlib.metadata'} & set(sys.modules), sys.modules.keys()\n"
        "import aiohttp, importlib.metadata, nats.js.api\n"
        "print(aiohttp.ClientSession, importlib.metadata.version('nats-py'), nats.js.api.Header.STATUS)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=30, capture_output=True)
