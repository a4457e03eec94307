"""The real nats-server with our configuration: who gets in, who is cut, and what a bad day does to the rest."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import ssl
import subprocess
import sys
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import attrs
import nkeys
import pytest

from mcp.bus import tls
from mcp.bus.codec import open_frame, seal
from mcp.bus.enrolment import FileEnrolment, Reloads
from mcp.bus.init import NewBus, init_bus
from mcp.bus.join_token import JoinToken, parse_token
from mcp.bus.joining import Newcomer, join
from mcp.bus.keys import KeyPair, key_of, new_key, read_key
from mcp.bus.nats_bus import BusAddress, Credential, connect
from mcp.bus.place import ServerPlace
from mcp.bus.server import ChildServer, find_binary, free_port, prepare
from mcp.bus.subjects import ConnectionRole, may_answer, speaker
from mcp.bus.system import OnDemand, System
from mcp.bus.transport import Frame, Transport
from mcp.model.errors import AdapterError, BusUnreachable, McpError, NobodyListens, NotPermitted, Refused
from mcp.model.messages import Failed, Join, Joined

WAIT_S = 10.0


class SystemClock:
    def wall_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def until(what: Callable[[], bool], wait_s: float = WAIT_S) -> float:
    """Wait for a condition; return how many seconds it took."""
    began = time.perf_counter()
    async with asyncio.timeout(wait_s):
        while not what():
            await asyncio.sleep(0.0005)
    return time.perf_counter() - began


async def hang_up(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()


class Raw:
    """A client of some 30 lines, so that nothing of nats-py or of ours stands between the test and the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.heard: list[bytes] = []
        self._task = asyncio.create_task(self._read())
        self.is_cut = False

    @classmethod
    async def open(cls, bus: NewBus, key: KeyPair | None, ca_pem: str = "") -> Raw:
        """Connect as a key; raises ConnectionError when the server does not want it."""
        context = ssl.create_default_context(cadata=ca_pem or bus.ca_pem)
        reader, writer = await asyncio.open_connection(
            bus.place.address, bus.place.port, ssl=context, server_hostname="mcp-bus"
        )
        info = json.loads((await reader.readline()).removeprefix(b"INFO "))
        options: dict[str, object] = {
            "verbose": False,
            "pedantic": False,
            "lang": "test",
            "version": "1",
            "headers": True,
        }
        if key is not None:
            signer = nkeys.from_seed(bytearray(key.seed.encode()))
            signed = base64.urlsafe_b64encode(signer.sign(info["nonce"].encode())).rstrip(b"=")
            options |= {"nkey": key.public_key, "sig": signed.decode()}
        writer.write(b"CONNECT " + json.dumps(options).encode() + b"\r\nPING\r\n")
        answer = await reader.readline()
        if not answer.startswith(b"PONG"):
            await hang_up(writer)
            raise ConnectionError(answer.decode().strip() or "closed without a word")
        return cls(reader, writer)

    async def _read(self) -> None:
        try:
            while line := await self.reader.readline():
                if line.startswith(b"PING"):
                    self.writer.write(b"PONG\r\n")
                self.heard.append(line.strip())
        except OSError:
            pass
        self.is_cut = True

    async def say(self, *lines: str) -> None:
        """Send protocol lines and wait until the server has read them."""
        count = self.heard.count(b"PONG")
        self.writer.write("".join(f"{line}\r\n" for line in (*lines, "PING")).encode())
        await until(lambda: self.heard.count(b"PONG") > count or self.is_cut)

    def refusals(self) -> list[str]:
        """What the server forbade so far."""
        return [line.decode() for line in self.heard if line.startswith(b"-ERR 'Permissions")]

    async def close(self) -> None:
        """Go, and leave no socket behind."""
        self._task.cancel()
        await hang_up(self.writer)


class Bus:
    """A fleet's bus on a port of its own, with what the tests ask of it."""

    def __init__(self, home: Path) -> None:
        self.made = init_bus(home, "127.0.0.1", free_port(), "rift", now_s=time.time())
        self.place: ServerPlace = self.made.place
        self.server = ChildServer(self.place)
        self.enrolment = FileEnrolment(self.place, SystemClock(), OnDemand(self.as_system))

    @property
    def address(self) -> BusAddress:
        return BusAddress(host=self.place.address, port=self.place.port, ca_pem=self.made.ca_pem)

    async def as_system(self) -> Transport:
        seed = read_key(self.place.key_file("system")).seed
        return await connect(
            self.address, Credential(role="system", name="system", seed=seed), forever=False, name="test"
        )

    def key(self, role: str) -> KeyPair:
        return read_key(self.place.keys / f"{role}.nkey")

    async def enrol(self, name: str) -> KeyPair:
        token, _ = await self.enrolment.invite(name, "worker")
        key = new_key()
        await self.enrolment.redeem(parse_token(token).invitation, key.public_key)
        await self.enrolment.settle(name)
        return key

    async def open(self, key: KeyPair | None) -> Raw:
        return await Raw.open(self.made, key)

    @asynccontextmanager
    async def system(self) -> AsyncIterator[System]:
        system = System(await self.as_system())
        await system.start()
        try:
            yield system
        finally:
            await system.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bus]:
    """One running bus for the tests that do it no harm."""
    bus = Bus(tmp_path_factory.mktemp("bus"))
    with bus.server:
        yield bus


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[Bus]:
    """A running bus of the test's own."""
    bus = Bus(tmp_path)
    with bus.server:
        yield bus


# ----------------------------------------------------------------- who gets in


async def test_an_enrolled_node_gets_in_and_is_held_to_its_subjects(shared: Bus) -> None:
    orion = await shared.open(await shared.enrol("orion"))
    await orion.say("PUB mcp.node.orion.heartbeat 0", "", "SUB mcp.work.orion.> 1", "SUB _INBOX.agent.orion.> 2")
    assert orion.refusals() == []
    await orion.say("PUB mcp.node.rift.heartbeat 0", "", "PUB mcp.work.rift.probe 0", "", "SUB mcp.> 3", "SUB > 4")
    assert len(orion.refusals()) == 4
    await orion.close()


@pytest.mark.parametrize(
    ("role", "publish", "subscribe"),
    [
        ("master", "mcp.node.rift.heartbeat", "_INBOX.cli.kyle.x"),
        ("answers", "mcp.work.rift.probe", "mcp.node.>"),
        ("system", "$SYS.REQ.SERVER.PING.CONFIGZ", "$SYS.>"),
    ],
)
async def test_each_part_of_the_master_is_held_to_its_subjects(
    shared: Bus, role: str, publish: str, subscribe: str
) -> None:
    part = await shared.open(shared.key(role))
    await part.say(f"PUB {publish} 0", "", f"SUB {subscribe} 1")
    assert len(part.refusals()) == 2
    await part.close()


async def test_a_grant_of_nothing_lets_nothing_through(shared: Bus) -> None:
    made = await shared.enrolment.add_operator("watcher", "debug")
    watcher = await shared.open(operator_key(made.toml))
    await watcher.say("PUB mcp.work.rift.probe 0", "", "PUB anything 0", "", "PUB mcp.event.x 0", "")
    assert len(watcher.refusals()) == 3
    await watcher.close()


async def test_the_bus_itself_refuses_what_an_operators_role_does_not_allow(shared: Bus) -> None:
    made = await shared.enrolment.add_operator("viewer", "viewer")
    viewer = await shared.open(operator_key(made.toml))
    await viewer.say("PUB mcp.cmd.viewer.get_status 0", "", "SUB _INBOX.cli.viewer.> 1", "SUB mcp.event.> 2")
    assert viewer.refusals() == []
    await viewer.say("PUB mcp.cmd.viewer.deploy_service 0", "", "PUB mcp.cmd.kyle.get_status 0", "")
    assert len(viewer.refusals()) == 2
    await viewer.close()


async def test_a_stranger_with_no_key_or_a_key_of_its_own_is_sent_away(shared: Bus) -> None:
    for key in (None, new_key()):
        with pytest.raises(ConnectionError, match="Authorization Violation"):
            await shared.open(key)


async def test_a_stranger_with_somebodys_public_key_only_is_sent_away(shared: Bus) -> None:
    rift = shared.key("agent")
    with pytest.raises(ConnectionError, match="Authorization Violation"):
        await shared.open(KeyPair(new_key().seed, rift.public_key))


async def test_a_client_in_the_clear_hears_nothing(shared: Bus) -> None:
    reader, writer = await asyncio.open_connection(shared.place.address, shared.place.port)
    writer.write(b'CONNECT {"verbose":false}\r\nPING\r\n')
    async with asyncio.timeout(WAIT_S):
        said = await reader.read()
    assert b"INFO" not in said
    assert b"PONG" not in said
    writer.close()


async def test_a_client_that_knows_another_authority_does_not_go_in(shared: Bus) -> None:
    other = tls.new_authority("other", time.time())
    with pytest.raises(ssl.SSLCertVerificationError):
        await Raw.open(shared.made, shared.key("agent"), other.pem)


async def test_tls_before_version_3_is_not_spoken(shared: Bus) -> None:
    context = ssl.create_default_context(cadata=shared.made.ca_pem)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection(shared.place.address, shared.place.port, ssl=context, server_hostname="mcp-bus")


def operator_key(toml: str) -> KeyPair:
    return key_of(tomllib.loads(toml)["operator"]["seed"])


# ------------------------------------------------------------ changes while it runs


class Timed:
    """A reload with a stop-watch."""

    def __init__(self, reloads: Reloads) -> None:
        self._reloads = reloads
        self.took_s = 0.0

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        began = time.perf_counter()
        await self._reloads.reload(digest, only_if_other=only_if_other)
        self.took_s = time.perf_counter() - began


async def test_a_removed_node_is_cut_at_once_and_nobody_else_is(bus: Bus) -> None:
    orion_key = await bus.enrol("orion")
    others = [await bus.open(bus.key(role)) for role in ("agent", "master", "answers", "system")]
    orion = await bus.open(orion_key)
    took_s: list[float] = []

    async def cut() -> None:
        began = time.perf_counter()
        await until(lambda: orion.is_cut)
        took_s.append(time.perf_counter() - began)

    waiting = asyncio.create_task(cut())
    reload = Timed(OnDemand(bus.as_system))
    await FileEnrolment(bus.place, SystemClock(), reload).remove("orion")
    await waiting
    print(f"removed and cut in {took_s[0] * 1000:.1f} ms, {reload.took_s * 1000:.1f} of them for the reload")
    assert took_s[0] < 1.0
    for other in others:
        await other.say()
        assert not other.is_cut
        await other.close()
    with pytest.raises(ConnectionError, match="Authorization Violation"):
        await bus.open(orion_key)
    async with bus.system() as system:
        assert orion_key.public_key not in await system.connections()
    assert orion_key.public_key not in "".join(path.read_text() for path in bus.place.state.rglob("*.toml"))


async def test_an_enrolled_node_can_connect_as_soon_as_enrolling_returns(bus: Bus) -> None:
    began = time.perf_counter()
    token, _ = await bus.enrolment.invite("orion", "worker")
    invited = time.perf_counter()
    key = new_key()
    await bus.enrolment.redeem(parse_token(token).invitation, key.public_key)
    redeemed = time.perf_counter()
    orion = await bus.open(key)
    print(f"invite {(invited - began) * 1000:.1f} ms, redeem {(redeemed - invited) * 1000:.1f} ms")
    await bus.enrolment.settle("orion")
    await orion.say()
    assert not orion.is_cut
    await orion.close()


async def test_an_operators_removal_cuts_only_that_operator(bus: Bus) -> None:
    kyle, eve = [operator_key((await bus.enrolment.add_operator(name, "admin")).toml) for name in ("kyle", "eve")]
    one, other = await bus.open(kyle), await bus.open(eve)
    await bus.enrolment.remove_operator("kyle")
    await until(lambda: one.is_cut)
    await other.say()
    assert not other.is_cut
    await other.close()


async def test_a_configuration_that_the_running_server_refuses_is_taken_back(bus: Bus) -> None:
    before = {path: path.read_text() for path in [*bus.place.enrolment.iterdir(), bus.place.config_file]}
    rift = await bus.open(bus.key("agent"))
    # nats-server -t takes another port, the running server does not change it: only the reload can refuse this.
    elsewhere = FileEnrolment(attrs.evolve(bus.place, port=free_port()), SystemClock(), OnDemand(bus.as_system))
    with pytest.raises(AdapterError, match=r"the bus refused its new configuration: .*Port.*; nothing was changed"):
        await elsewhere.add_operator("kyle", "admin")
    assert {path: path.read_text() for path in before} == before
    assert not (bus.place.enrolment / "operator-kyle.toml").exists()
    await rift.say()
    assert not rift.is_cut
    await rift.close()
    await bus.enrolment.add_operator("kyle", "admin")


async def test_a_renewed_certificate_is_shown_to_the_next_client_and_cuts_nobody(bus: Bus) -> None:
    rift = await bus.open(bus.key("agent"))
    await bus.enrolment.renew_certificate()
    later = await bus.open(bus.key("agent"))
    got = later.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    assert tls.fingerprint(ssl.DER_cert_to_PEM_cert(got)) == tls.fingerprint(bus.place.cert_file.read_text())
    await rift.say()
    assert not rift.is_cut
    await rift.close()
    await later.close()


async def test_a_bus_with_a_thousand_nodes_reloads_without_a_pause_that_anybody_notices(bus: Bus) -> None:
    from mcp.bus import roster

    for n in range(1000):
        node = roster.Node(name=f"n{n}", role="worker", public_key=new_key().public_key)
        (bus.place.enrolment / roster.file_name(node)).write_text(roster.to_text(node))
    await bus.enrolment.reconcile()
    rift = await bus.open(bus.key("agent"))
    began = time.perf_counter()
    await bus.enrolment.add_operator("kyle", "admin")
    print(f"one change among 1000 nodes: {(time.perf_counter() - began) * 1000:.0f} ms")
    await bus.enrolment.remove("n500")
    await rift.say()
    assert not rift.is_cut
    await rift.close()


# ----------------------------------------------------------------------- joining

NEWCOMER = Newcomer(address="100.64.0.2", arch="arm64", version="0.1.0")


class Door:
    """The master's side of joining, as thin as can be: redeem, answer."""

    def __init__(self, bus: Bus) -> None:
        self.bus = bus
        self.shown: list[Join] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Door]:
        self.hearing = await self._as("master")
        self.answers = await self._as("answers")
        await self.hearing.subscribe("mcp.join.*", self._on_join)
        await self.hearing.flush()
        try:
            yield self
        finally:
            await self.hearing.close()
            await self.answers.close()

    async def _as(self, role: ConnectionRole) -> Transport:
        me = Credential(role=role, name=role, seed=self.bus.key(role).seed)
        return await connect(self.bus.address, me, forever=False, name=role)

    def _on_join(self, frame: Frame) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(frame))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, frame: Frame) -> None:
        letter = open_frame(frame)
        self.shown.append(letter.message)
        assert may_answer(frame.subject, frame.reply)
        who = speaker(frame.subject)
        assert who is not None
        try:
            node = await self.bus.enrolment.redeem(who[1], letter.message.public_key)
        except McpError as error:
            said = seal(frame.reply, Failed(code=error.code, reason=error.reason, hint=error.hint), frame="error")
        else:
            welcome = Joined(
                node=node.name, role=node.role, ca_pem=self.bus.made.ca_pem, tls_name="mcp-bus", master="rift"
            )
            said = seal(frame.reply, welcome, frame="final")
        await self.answers.publish(said)


@pytest.fixture
async def door(bus: Bus) -> AsyncIterator[Door]:
    async with Door(bus).open() as door:
        yield door


def key_files(folder: Path) -> dict[str, Path]:
    return {"key_file": folder / "keys" / "agent.nkey", "ca_file": folder / "keys" / "bus-ca.pem"}


async def test_one_line_joins_a_node_and_its_private_key_stays_with_it(bus: Bus, door: Door, tmp_path: Path) -> None:
    token, _ = await bus.enrolment.invite("orion", "worker")
    files = key_files(tmp_path / "orion")
    began = time.perf_counter()
    joined = await join(parse_token(token), NEWCOMER, **files)
    print(f"joined in {(time.perf_counter() - began) * 1000:.0f} ms")
    assert (joined.node, joined.role, joined.master) == ("orion", "worker", "rift")
    key = read_key(files["key_file"])
    assert [shown.public_key for shown in door.shown] == [key.public_key]
    assert files["ca_file"].read_text() == bus.made.ca_pem
    assert sorted(path.name for path in (tmp_path / "orion" / "keys").iterdir()) == ["agent.nkey", "bus-ca.pem"]
    assert (tmp_path / "orion" / "keys").stat().st_mode & 0o077 == 0
    for path in bus.place.state.rglob("*"):
        assert not path.is_file() or key.seed.encode() not in path.read_bytes()
    orion = await bus.open(key)
    await bus.enrolment.settle("orion")
    await orion.say()
    assert not orion.is_cut
    await orion.close()


async def test_nodes_that_join_at_once_while_the_bus_reloads_all_get_in(bus: Bus, door: Door, tmp_path: Path) -> None:
    names = [f"n{n}" for n in range(8)]
    tokens = [parse_token((await bus.enrolment.invite(name, "worker"))[0]) for name in names]

    async def come(name: str, token: JoinToken) -> str:
        joined = await join(token, NEWCOMER, **key_files(tmp_path / name))
        await bus.enrolment.settle(name)
        return joined.node

    assert sorted(await asyncio.gather(*map(come, names, tokens))) == names
    assert [node.name for node in await bus.enrolment.nodes()] == [*names, "rift"]
    assert not list(bus.place.enrolment.glob("invitation-*"))


async def test_a_token_that_was_used_and_settled_opens_nothing(bus: Bus, door: Door, tmp_path: Path) -> None:
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    await join(token, NEWCOMER, **key_files(tmp_path / "orion"))
    with pytest.raises(Refused, match="orion has joined with this invitation"):
        await join(token, NEWCOMER, **key_files(tmp_path / "thief"))
    await bus.enrolment.settle("orion")
    with pytest.raises(Refused, match="does not know this invitation"):
        await join(token, NEWCOMER, **key_files(tmp_path / "thief"))
    assert not list((tmp_path / "thief").rglob("*.*"))
    assert [node.name for node in await bus.enrolment.nodes()] == ["orion", "rift"]


async def test_a_node_that_joins_a_second_time_is_told_so_and_keeps_its_files(
    bus: Bus, door: Door, tmp_path: Path
) -> None:
    files = key_files(tmp_path / "orion")
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    await join(token, NEWCOMER, **files)
    before = files["key_file"].read_text()
    with pytest.raises(Refused, match="in a fleet already"):
        await join(token, NEWCOMER, **files)
    assert files["key_file"].read_text() == before


async def test_a_join_whose_answer_was_lost_goes_on_with_the_same_key(bus: Bus, door: Door, tmp_path: Path) -> None:
    files = key_files(tmp_path / "orion")
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    await join(token, NEWCOMER, **files)
    files["ca_file"].unlink()  # as if the node had been killed before it wrote this
    joined = await join(token, NEWCOMER, **files)
    assert joined.node == "orion"
    assert door.shown[0] == door.shown[1]


async def test_an_expired_token_opens_nothing(bus: Bus, door: Door, tmp_path: Path) -> None:
    brief = FileEnrolment(bus.place, SystemClock(), OnDemand(bus.as_system), invitation_s=0.0)
    token = parse_token((await brief.invite("orion", "worker"))[0])
    with pytest.raises(Refused, match="the invitation has expired"):
        await join(token, NEWCOMER, **key_files(tmp_path / "orion"))
    await bus.enrolment.sweep()
    with pytest.raises(Refused, match="does not know this invitation"):
        await join(token, NEWCOMER, **key_files(tmp_path / "orion"))
    assert not list((tmp_path / "orion").rglob("*.*"))


async def test_a_token_with_the_id_of_another_invitation_opens_nothing(bus: Bus, door: Door, tmp_path: Path) -> None:
    mine = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    other = parse_token((await bus.enrolment.invite("svc", "edge"))[0])
    with pytest.raises(NotPermitted):
        await join(attrs.evolve(mine, invitation=other.invitation), NEWCOMER, **key_files(tmp_path / "orion"))
    assert door.shown == []


async def test_a_token_pins_the_certificate_and_shows_nothing_to_another_server(
    bus: Bus, door: Door, tmp_path: Path
) -> None:
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    with pytest.raises(BusUnreachable):
        await join(attrs.evolve(token, fingerprint="00" * 32), NEWCOMER, **key_files(tmp_path / "orion"))
    assert door.shown == []
    assert not list((tmp_path / "orion").rglob("*.*"))


async def test_a_join_with_no_bus_there_leaves_nothing_behind(bus: Bus, door: Door, tmp_path: Path) -> None:
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    began = time.perf_counter()
    with pytest.raises(BusUnreachable):
        await join(attrs.evolve(token, port=free_port()), NEWCOMER, **key_files(tmp_path / "orion"))
    assert time.perf_counter() - began < 5.0
    assert not list((tmp_path / "orion").rglob("*.*"))


async def test_a_join_without_a_master_says_that_nobody_listens(bus: Bus, tmp_path: Path) -> None:
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    with pytest.raises(NobodyListens):
        await join(token, NEWCOMER, **key_files(tmp_path / "orion"))


async def test_whoever_holds_a_token_may_do_nothing_but_join(bus: Bus) -> None:
    token = parse_token((await bus.enrolment.invite("orion", "worker"))[0])
    holder = await bus.open(key_of(token.seed))
    await holder.say(f"SUB _INBOX.join.{token.invitation}.> 1")
    assert holder.refusals() == []
    await holder.say(
        "SUB mcp.> 2", "SUB _INBOX.join.> 3", "PUB mcp.node.orion.register 0", "", "PUB mcp.join.00000000 0", ""
    )
    assert len(holder.refusals()) == 4
    await holder.close()


# -------------------------------------------------------------- the system account


async def test_the_master_hears_of_a_killed_connection_with_its_key_and_id(shared: Bus) -> None:
    gone: list[tuple[str, int, str]] = []
    here: list[tuple[str, int, str]] = []
    async with shared.system() as system:
        system.on_gone = lambda *said: gone.append(said)
        system.on_here = lambda *said: here.append(said)
        key = shared.key("agent")
        rift = await shared.open(key)
        await until(lambda: bool(here))
        began = time.perf_counter()
        rift.writer.transport.abort()
        await until(lambda: bool(gone))
        print(f"heard of the end after {(time.perf_counter() - began) * 1000:.1f} ms")
    assert [(who, id) for who, id, _ in gone] == [(who, id) for who, id, _ in here]
    assert gone[0][0] == key.public_key
    assert gone[0][2] == "Client Closed"


async def test_a_stranger_with_a_nodes_public_key_cannot_make_it_look_gone(shared: Bus) -> None:
    gone: list[str] = []
    refused: list[str] = []
    async with shared.system() as system:
        system.on_gone = lambda key, *_: gone.append(key)
        system.on_refused = lambda key, *_: refused.append(key)
        rift = shared.key("agent")
        with pytest.raises(ConnectionError):
            await shared.open(KeyPair(new_key().seed, rift.public_key))
        await until(lambda: bool(refused))
    assert gone == []


async def test_the_same_key_twice_shows_as_two_connections(shared: Bus) -> None:
    key = shared.key("agent")
    clones = [await shared.open(key) for _ in range(2)]
    async with shared.system() as system:
        assert len((await system.connections())[key.public_key]) == 2
    for clone in clones:
        await clone.close()


async def test_the_masters_watch_goes_on_after_the_bus_was_restarted(bus: Bus) -> None:
    seed = bus.key("system").seed
    transport = await connect(
        bus.address, Credential(role="system", name="system", seed=seed), forever=True, name="watch"
    )
    system = System(transport)
    gone: list[str] = []
    system.on_gone = lambda key, *_: gone.append(key)
    await system.start()
    first = (await system.running()).server_id
    bus.server.kill()
    await until(lambda: not transport.is_connected)
    bus.server.start()
    await until(lambda: transport.is_connected)
    assert (await system.running()).server_id != first
    rift = await bus.open(bus.key("agent"))
    await rift.close()
    await until(lambda: gone == [bus.key("agent").public_key])
    await FileEnrolment(bus.place, SystemClock(), system).add_operator("kyle", "admin")
    await system.close()


async def test_a_second_reload_of_the_same_is_not_done_when_asked_so(bus: Bus) -> None:
    async with bus.system() as system:
        digest = (await system.running()).digest
        await system.reload(digest, only_if_other=True)
        assert "Reloaded" not in bus.place.log_file.read_text()
        await system.reload(digest)
        assert "Reloaded" in bus.place.log_file.read_text()


async def test_a_configuration_other_than_the_expected_one_is_noticed(bus: Bus) -> None:
    async with bus.system() as system:
        with pytest.raises(AdapterError, match="another configuration"):
            await system.reload("sha256:" + "0" * 64)


# --------------------------------------------------------------- the process itself


async def test_a_killed_server_is_back_on_the_same_port_with_everybody_still_enrolled(bus: Bus) -> None:
    key = await bus.enrol("orion")
    os.kill(bus.server.pid, signal.SIGKILL)
    await until(lambda: bus.server.pid == 0)
    await bus.enrolment.add_operator("kyle", "admin")
    assert not bus.enrolment.is_live
    began = time.perf_counter()
    bus.server.start()
    orion = await bus.open(key)
    print(f"up again and connected after {(time.perf_counter() - began) * 1000:.0f} ms")
    await orion.close()
    await bus.enrolment.reconcile()
    assert bus.enrolment.is_live


async def test_a_server_killed_twenty_times_in_a_row_is_back_each_time(bus: Bus) -> None:
    slowest_s = 0.0
    for _ in range(20):
        bus.server.kill()
        began = time.perf_counter()
        bus.server.start()
        rift = await bus.open(bus.key("agent"))
        slowest_s = max(slowest_s, time.perf_counter() - began)
        await rift.close()
    print(f"slowest of 20: {slowest_s * 1000:.0f} ms")
    assert slowest_s < 2.0


async def test_a_frozen_server_means_nothing_was_changed_and_it_stays_so_when_it_thaws(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcp.bus.system.ANSWER_TIMEOUT_S", 0.3)
    async with bus.system() as system:
        enrolment = FileEnrolment(bus.place, SystemClock(), system)
        digest = (await system.running()).digest
        os.kill(bus.server.pid, signal.SIGSTOP)
        try:
            with pytest.raises(AdapterError, match=r"does not answer .*; nothing was changed"):
                await enrolment.add_operator("kyle", "admin")
        finally:
            os.kill(bus.server.pid, signal.SIGCONT)
        await enrolment.reconcile()
        assert (await system.running()).digest == digest
    assert not (bus.place.enrolment / "operator-kyle.toml").exists()


def test_a_child_server_dies_with_its_parent_even_when_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from mcp.bus.init import init_bus\n"
        "from mcp.bus.server import ChildServer, free_port\n"
        "made = init_bus(pathlib.Path(sys.argv[1]), '127.0.0.1', free_port(), 'rift', now_s=time.time())\n"
        "server = ChildServer(made.place)\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "home")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert str(Path(f"/proc/{child}/fd/0").readlink()) == "/dev/null"
    assert str(Path(f"/proc/{child}/fd/1").readlink()).endswith("nats-server.log")
    parent.kill()
    parent.communicate(timeout=WAIT_S)
    wait_until_gone(child)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not Path(f"/proc/{pid}/exe").exists()


RUN_BUS = (
    "import sys, time, pathlib, attrs\n"
    "from mcp.bus.place import ServerPlace\n"
    "from mcp.bus.server import run_bus\n"
    "from mcp.model.errors import McpError\n"
    "home = pathlib.Path(sys.argv[1])\n"
    "try:\n"
    "    run_bus(ServerPlace('127.0.0.1', int(sys.argv[2]), home / 'bus', home / 'keys'), time.time())\n"
    "except McpError as error:\n"
    "    sys.exit(str(error))\n"
)


def test_run_bus_becomes_the_server_itself(tmp_path: Path) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=time.time())
    process = subprocess.Popen(
        [sys.executable, "-c", RUN_BUS, str(tmp_path), str(made.place.port)], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert any("Server is ready" in line for line in lines)
        assert Path(f"/proc/{process.pid}/exe").resolve() == find_binary().resolve()
    finally:
        process.terminate()
        process.communicate(timeout=WAIT_S)
    assert process.returncode in (0, 1, -signal.SIGTERM)


def test_run_bus_on_a_taken_port_ends_with_1_in_2_s_and_names_the_culprit(shared: Bus) -> None:
    home = shared.place.state.parent
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", RUN_BUS, str(home), str(shared.place.port)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    print(f"refused after {time.perf_counter() - began:.2f} s")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"cannot listen on 127.0.0.1:{shared.place.port}: in use by pid {shared.server.pid} (nats-server)"
    )


@pytest.mark.parametrize("harm", ["damaged certificate", "damaged authority", "no enrolment", "open key"])
def test_a_bus_that_cannot_start_says_why_and_leaves_the_configuration(tmp_path: Path, harm: str) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=time.time())
    before = made.place.config_file.read_text()
    match harm:
        case "damaged certificate":
            made.place.cert_file.write_text("nonsense")
        case "damaged authority":
            made.place.cert_file.unlink()
            made.place.ca_key_file.write_text("nonsense")
        case "no enrolment":
            made.place.enrolment.rename(tmp_path / "elsewhere")
        case "open key":
            made.place.cert_file.chmod(0o644)
    with pytest.raises(McpError) as caught:
        prepare(made.place, time.time())
    assert "cannot" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert made.place.config_file.read_text() == before


def test_a_certificate_that_was_lost_is_made_anew_when_the_bus_starts(tmp_path: Path) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=time.time())
    made.place.cert_file.unlink()
    prepare(made.place, time.time())
    assert tls.is_issued_by(made.place.cert_file.read_text(), made.ca_pem)


def test_a_certificate_near_its_end_is_renewed_when_the_bus_starts(tmp_path: Path) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=time.time())
    old = made.place.cert_file.read_text()
    prepare(made.place, time.time())
    assert made.place.cert_file.read_text() == old
    prepare(made.place, time.time() + tls.SERVER_DAYS * 86400 * 0.7)
    assert made.place.cert_file.read_text() != old
    assert tls.is_issued_by(made.place.cert_file.read_text(), made.ca_pem)


def test_a_start_that_fails_shows_the_last_words_of_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=time.time())
    monkeypatch.setattr("mcp.bus.server._command", lambda binary, place: [str(binary), "-c", "/nowhere.conf"])
    with pytest.raises(AdapterError, match=r"cannot start .*nowhere\.conf"):
        ChildServer(made.place).start()
