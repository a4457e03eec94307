"""Who may connect: tokens, invitations, and that every change is made whole or not at all."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.bus import enrolment as enrolment_module
from mcp.bus import roster
from mcp.bus.enrolment import FileEnrolment
from mcp.bus.init import NewBus, init_bus
from mcp.bus.join_token import JoinToken, parse_token
from mcp.bus.keys import key_of, new_key, seed_of
from mcp.bus.server import find_binary, free_port
from mcp.bus.system import NoBus
from mcp.model.errors import AdapterError, NoAnswer, Refused
from mcp.model.ports import Enrolment

NOW_S = 1_800_000_000.0
TOKEN = JoinToken(
    address="100.64.0.1", port=4222, invitation="3f2a9c11", seed=seed_of(bytes(range(32))), fingerprint="ab" * 32
)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def wall_s(self) -> float:
        return self.now_s

    def monotonic_s(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class FakeBus:
    """Takes every configuration, until it is told to fail."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.fail: Exception | None = None

    async def reload(self, digest: str, *, only_if_other: bool = False) -> None:
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        if not (only_if_other and self.loaded[-1:] == [digest]):
            self.loaded.append(digest)


class Fleet:
    """One new bus, its enrolment, and a clock to move."""

    def __init__(self, home: Path) -> None:
        self.made: NewBus = init_bus(home, "127.0.0.1", free_port(), "rift", now_s=NOW_S)
        self.place = self.made.place
        self.clock, self.bus = FakeClock(), FakeBus()
        self.enrolment = self.again()
        self.port: Enrolment = self.enrolment

    def again(self, **limits: float) -> FileEnrolment:
        return FileEnrolment(self.place, self.clock, self.bus, **limits)  # type: ignore[arg-type]

    def files(self) -> dict[str, str]:
        paths = [*self.place.enrolment.iterdir(), self.place.config_file]
        return {path.name: path.read_text() for path in paths}

    async def names(self) -> list[str]:
        return [node.name for node in await self.port.nodes()]

    async def joined(self, name: str) -> tuple[str, str]:
        """Invite and redeem; return the invitation and the node's public key."""
        token, _ = await self.enrolment.invite(name, "worker")
        key = new_key().public_key
        await self.enrolment.redeem(parse_token(token).invitation, key)
        return parse_token(token).invitation, key


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


pytestmark = pytest.mark.filterwarnings("error")


# ----------------------------------------------------------------------- tokens


def test_a_token_is_118_characters_and_comes_back() -> None:
    assert len(TOKEN.text()) == 118
    assert TOKEN.text().startswith("mcpj1_100.64.0.1:4222_")
    assert parse_token(TOKEN.text()) == TOKEN


@given(
    st.sampled_from(["100.64.0.1", "rift.example.net", "fd7a:115c::1"]),
    st.integers(1, 65535),
    st.binary(min_size=4, max_size=4),
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
)
def test_every_token_comes_back(address: str, port: int, id: bytes, seed: bytes, print_: bytes) -> None:
    token = JoinToken(address=address, port=port, invitation=id.hex(), seed=seed_of(seed), fingerprint=print_.hex())
    assert parse_token(token.text()) == token


def test_a_token_that_a_terminal_broke_over_lines_is_read() -> None:
    text = TOKEN.text()
    assert parse_token(f"  {text[:40]}\n  {text[40:80]}\r\n{text[80:]}\n") == TOKEN


def test_a_token_does_not_show_its_seed() -> None:
    assert TOKEN.seed not in repr(TOKEN)


@pytest.mark.parametrize("length", range(118))
def test_a_token_that_is_cut_off_anywhere_is_told_so(length: int) -> None:
    with pytest.raises(Refused, match=r"cut off|begins with mcpj1_") as caught:
        parse_token(TOKEN.text()[:length])
    assert caught.value.code == "bad_token"
    assert "mcp node invite" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hello", "a token begins with mcpj1_"),
        (TOKEN.text().replace("mcpj1", "mcpj2"), "of version 2, this agent knows version 1"),
        (TOKEN.text() + "AAAA", "something was added"),
        (TOKEN.text()[:60] + "é" + TOKEN.text()[61:], "its character 61 is 'é'"),
        (TOKEN.text().replace("100.64.0.1", "100.64.0.2"), "a character of it was changed"),
        (TOKEN.text().replace(":4222_", ":4223_"), "a character of it was changed"),
    ],
)
def test_a_token_that_is_wrong_says_how(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        parse_token(text)


@given(st.integers(0, 117), st.sampled_from("ABCxyz019-_.:"))
def test_no_changed_character_gets_through_or_shows_the_token(position: int, character: str) -> None:
    text = TOKEN.text()
    changed = text[:position] + character + text[position + 1 :]
    if changed != text:
        with pytest.raises(Refused) as caught:
            parse_token(changed)
        assert text[40:60] not in str(caught.value)


@given(st.text(max_size=200))
def test_no_text_makes_the_token_reader_fail_in_another_way(text: str) -> None:
    with pytest.raises(Refused):
        parse_token("mcpj1_" + text)


# ---------------------------------------------------------------------- joining


async def test_an_invitation_enrols_one_node_under_its_name_and_role(fleet: Fleet) -> None:
    token, valid_s = await fleet.enrolment.invite("svc", "edge")
    assert valid_s == 300
    key = new_key().public_key
    node = await fleet.enrolment.redeem(parse_token(token).invitation, key)
    assert (node.name, node.role, node.public_key) == ("svc", "edge", key)
    assert await fleet.names() == ["rift", "svc"]
    assert f"nkey: {key}" in fleet.place.config_file.read_text()


async def test_the_seed_of_an_invitation_is_nowhere_on_disk(fleet: Fleet) -> None:
    token, _ = await fleet.enrolment.invite("orion", "worker")
    seed = parse_token(token).seed
    written = "".join(fleet.files().values())
    assert seed not in written
    assert token not in written
    assert key_of(seed).public_key in written


async def test_a_node_that_asks_again_with_its_own_key_gets_the_same_answer(fleet: Fleet) -> None:
    invitation, key = await fleet.joined("orion")
    again = await fleet.enrolment.redeem(invitation, key)
    assert again.name == "orion"


async def test_an_invitation_serves_one_key_only(fleet: Fleet) -> None:
    invitation, _ = await fleet.joined("orion")
    with pytest.raises(Refused, match="orion has joined with this invitation") as caught:
        await fleet.enrolment.redeem(invitation, new_key().public_key)
    assert caught.value.code == "invitation_used"


async def test_an_invitation_that_is_settled_serves_nobody(fleet: Fleet) -> None:
    invitation, key = await fleet.joined("orion")
    assert f"join {invitation}" in fleet.place.config_file.read_text()
    await fleet.enrolment.settle("orion")
    assert "join" not in fleet.place.config_file.read_text().replace("mcp.join", "").replace("INBOX.join", "")
    with pytest.raises(Refused, match="no such invitation"):
        await fleet.enrolment.redeem(invitation, key)
    assert await fleet.names() == ["orion", "rift"]


async def test_an_invitation_expires_to_the_second(fleet: Fleet) -> None:
    token, valid_s = await fleet.enrolment.invite("orion", "worker")
    fleet.clock.now_s += valid_s
    with pytest.raises(Refused, match="the invitation has expired"):
        await fleet.enrolment.redeem(parse_token(token).invitation, new_key().public_key)
    await fleet.enrolment.sweep()
    assert sorted(fleet.files()) == sorted(
        ["nats-server.conf", "node-rift.toml", "part-answers.toml", "part-master.toml", "part-system.toml"]
    )


async def test_a_new_invitation_for_a_name_voids_the_one_before(fleet: Fleet) -> None:
    first, _ = await fleet.enrolment.invite("orion", "worker")
    second, _ = await fleet.enrolment.invite("orion", "worker")
    with pytest.raises(Refused, match="no such invitation"):
        await fleet.enrolment.redeem(parse_token(first).invitation, new_key().public_key)
    await fleet.enrolment.redeem(parse_token(second).invitation, new_key().public_key)


@pytest.mark.parametrize(
    ("name", "role", "code"),
    [
        ("rift", "worker", "name_taken"),
        ("master", "worker", "bad_name"),
        ("all", "worker", "bad_name"),
        ("Orion", "worker", "bad_name"),
        ("a.b", "worker", "bad_name"),
        ("a/b", "worker", "bad_name"),
        ("*", "worker", "bad_name"),
        ("", "worker", "bad_name"),
        ("x" * 33, "worker", "bad_name"),
        ("orion", "master", "bad_role"),
        ("orion", "king", "bad_role"),
    ],
)
async def test_an_invitation_that_cannot_be_is_refused(fleet: Fleet, name: str, role: str, code: str) -> None:
    before = fleet.files()
    with pytest.raises(Refused) as caught:
        await fleet.enrolment.invite(name, role)
    assert caught.value.code == code
    assert fleet.files() == before
    assert fleet.bus.loaded == []


async def test_the_fleet_has_a_limit_that_counts_open_invitations_and_is_named(fleet: Fleet) -> None:
    small = fleet.again(max_nodes=3)
    await small.invite("orion", "worker")
    await small.invite("hyperborea", "worker")
    with pytest.raises(Refused, match="has 3 nodes, open invitations included, and the limit is 3") as caught:
        await small.invite("svc", "edge")
    assert "max_nodes" in caught.value.hint
    fleet.clock.now_s += 300
    await small.invite("svc", "edge")


async def test_a_key_that_somebody_has_is_refused(fleet: Fleet) -> None:
    _, key = await fleet.joined("orion")
    token, _ = await fleet.enrolment.invite("svc", "edge")
    parsed = parse_token(token)
    for bad in (key, key_of(parsed.seed).public_key, "U" + "A" * 55, "", '"] }'):
        with pytest.raises(Refused, match="the key that was shown"):
            await fleet.enrolment.redeem(parsed.invitation, bad)


@pytest.mark.parametrize("id", ["00000000", "", "../../etc/passwd", "*", "x" * 300])
async def test_an_unknown_invitation_is_refused(fleet: Fleet, id: str) -> None:
    with pytest.raises(Refused, match="no such invitation"):
        await fleet.enrolment.redeem(id, new_key().public_key)


# ---------------------------------------------------------------------- leaving


async def test_a_removed_node_leaves_no_ghost(fleet: Fleet) -> None:
    before = fleet.files()
    _, key = await fleet.joined("orion")
    await fleet.enrolment.remove("orion")
    assert fleet.files() == before
    assert key not in "".join(fleet.files().values())
    with pytest.raises(Refused, match=r"no such node is enrolled \(enrolled: rift\)"):
        await fleet.enrolment.remove("orion")


async def test_removing_a_name_that_is_only_invited_voids_the_invitation(fleet: Fleet) -> None:
    await fleet.enrolment.invite("orion", "worker")
    await fleet.enrolment.remove("orion")
    assert not list(fleet.place.enrolment.glob("invitation-*"))


async def test_the_masters_own_node_cannot_be_removed(fleet: Fleet) -> None:
    with pytest.raises(Refused, match="the master's own node"):
        await fleet.enrolment.remove("rift")


# -------------------------------------------------------------------- operators


async def test_an_operators_file_is_all_that_the_command_line_needs(fleet: Fleet) -> None:
    import tomllib

    made = await fleet.enrolment.add_operator("kyle", "admin")
    table = tomllib.loads(made.toml)
    assert table["bus"]["ca_pem"] == fleet.made.ca_pem
    assert (table["bus"]["address"], table["bus"]["port"]) == ("127.0.0.1", fleet.place.port)
    assert key_of(table["operator"]["seed"]).public_key in fleet.place.config_file.read_text()
    assert table["operator"]["seed"] not in "".join(fleet.files().values())
    assert table["operator"]["seed"] not in repr(made)


@pytest.mark.parametrize(
    ("name", "role", "code"),
    [("kyle", "admin", "name_taken"), ("cli", "admin", "bad_name"), ("eve", "root", "bad_role")],
)
async def test_an_operator_that_cannot_be_is_refused(fleet: Fleet, name: str, role: str, code: str) -> None:
    await fleet.enrolment.add_operator("kyle", "viewer")
    with pytest.raises(Refused) as caught:
        await fleet.enrolment.add_operator(name, role)
    assert caught.value.code == code


async def test_an_operator_goes_without_a_trace(fleet: Fleet) -> None:
    before = fleet.files()
    await fleet.enrolment.add_operator("kyle", "debug")
    assert [operator.role for operator in await fleet.enrolment.operators()] == ["debug"]
    await fleet.enrolment.remove_operator("kyle")
    assert fleet.files() == before
    with pytest.raises(Refused, match=r"enrolled: none"):
        await fleet.enrolment.remove_operator("kyle")


# ------------------------------------------------------------ whole, or not at all


@pytest.mark.parametrize(
    "failure", [AdapterError("line 3: nonsense", code="bad_bus_config"), NoAnswer("the bus does not answer")]
)
async def test_a_change_that_the_bus_does_not_take_is_undone_and_the_bus_told_to_keep_the_old(
    fleet: Fleet, failure: Exception
) -> None:
    invitation, key = await fleet.joined("orion")
    before = fleet.files()
    running = fleet.bus.loaded[-1]
    for change in (
        lambda: fleet.enrolment.invite("svc", "edge"),
        lambda: fleet.enrolment.settle("orion"),
        lambda: fleet.enrolment.remove("orion"),
        lambda: fleet.enrolment.add_operator("kyle", "admin"),
    ):
        fleet.bus.fail = failure
        with pytest.raises(AdapterError, match=f"cannot change who may connect: {failure}; nothing was changed"):
            await change()
        assert fleet.files() == before
        assert fleet.bus.loaded[-1] == running
        assert fleet.enrolment.is_live
    assert (await fleet.enrolment.redeem(invitation, key)).name == "orion"


async def test_a_configuration_that_does_not_pass_the_check_never_reaches_the_bus(fleet: Fleet) -> None:
    before = fleet.files()
    fleet.place.cert_file.rename(fleet.place.cert_file.with_suffix(".gone"))
    with pytest.raises(AdapterError, match=r"line \d+: .*no such file"):
        await fleet.enrolment.add_operator("kyle", "admin")
    assert fleet.files() == before
    assert fleet.bus.loaded == []
    assert not list(fleet.place.state.glob(".*"))


async def test_a_disk_that_fills_up_in_the_middle_undoes_the_change(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fleet.files()

    def full(draft: Path, path: Path) -> None:
        raise AdapterError(f"cannot write {path}: no space left on device", code="disk_full")

    monkeypatch.setattr(enrolment_module, "publish", full)
    with pytest.raises(AdapterError, match="no space left"):
        await fleet.enrolment.add_operator("kyle", "admin")
    assert fleet.files() == before


async def test_with_the_bus_down_the_change_stands_and_is_known_to_wait(fleet: Fleet) -> None:
    offline = FileEnrolment(fleet.place, fleet.clock, NoBus())
    await offline.add_operator("kyle", "admin")
    assert not offline.is_live
    assert "operator kyle admin" in fleet.place.config_file.read_text()


async def test_a_damaged_file_is_said_once_and_keeps_nobody_else_out(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    (fleet.place.enrolment / "node-orion.toml").write_text("name = ")
    assert await fleet.names() == ["rift"]
    await fleet.enrolment.add_operator("kyle", "admin")
    assert [record.getMessage() for record in caplog.records].count(
        "an enrolment file is damaged; who is in it cannot connect"
    ) == 1


async def test_a_crash_between_the_files_and_the_configuration_is_mended_at_the_next_start(fleet: Fleet) -> None:
    left = fleet.place.enrolment / "node-orion.toml"
    left.write_text(roster.to_text(roster.Node(name="orion", role="worker", public_key=new_key().public_key)))
    await fleet.enrolment.reconcile()
    assert "agent orion" in fleet.place.config_file.read_text()
    assert len(fleet.bus.loaded) == 1
    await fleet.enrolment.reconcile()
    assert len(fleet.bus.loaded) == 1


async def test_a_change_is_checked_by_the_server_that_runs_wherever_that_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "elsewhere" / "nats-server"
    binary.parent.mkdir()
    binary.symlink_to(find_binary())
    made = init_bus(tmp_path / "home", "127.0.0.1", free_port(), "rift", now_s=NOW_S, binary=str(binary))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setattr("sys.prefix", "/nowhere")
    unaware = FileEnrolment(attrs.evolve(made.place, binary=""), FakeClock(), FakeBus())
    await unaware.add_operator("kyle", "admin")
    assert made.place.binary_link.readlink() == binary


async def test_an_enrolment_that_is_gone_is_never_taken_for_an_empty_one(fleet: Fleet) -> None:
    for path in fleet.place.enrolment.iterdir():
        path.unlink()
    with pytest.raises(AdapterError, match="not even the master"):
        await fleet.enrolment.add_operator("kyle", "admin")
    fleet.place.enrolment.rmdir()
    with pytest.raises(AdapterError, match="cannot read the enrolment"):
        await fleet.enrolment.add_operator("kyle", "admin")
    fleet.place.state.rename(fleet.place.state.with_name("gone"))
    with pytest.raises(AdapterError, match=r"cannot change who may connect: .*no such file") as caught:
        await fleet.enrolment.add_operator("kyle", "admin")
    assert "master's machine" in caught.value.hint


def test_the_master_and_the_agents_do_not_pay_for_the_certificate_library() -> None:
    code = (
        "import sys, mcp.bus.enrolment, mcp.bus.joining, mcp.bus.system\n"
        "assert not {'cryptography', 'nacl', 'ctypes'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


async def test_nothing_is_reloaded_when_nothing_changes(fleet: Fleet) -> None:
    await fleet.enrolment.sweep()
    await fleet.enrolment.settle("rift")
    assert fleet.bus.loaded == []


async def test_changes_at_the_same_time_all_count(fleet: Fleet) -> None:
    other = fleet.again()
    await asyncio.gather(
        *(who.add_operator(f"op-{n}", "viewer") for n in range(4) for who in [fleet.enrolment if n % 2 else other])
    )
    assert len(await fleet.enrolment.operators()) == 4
    assert fleet.place.config_file.read_text().count("# operator op-") == 4


async def test_a_change_that_waits_too_long_for_another_command_says_which_file_is_held(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolment_module, "LOCK_TIMEOUT_S", 0.05)
    handle = os.open(fleet.place.lock_file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(AdapterError, match=r"another command holds .*enrolment\.lock"):
            await fleet.enrolment.sweep()
    finally:
        os.close(handle)


async def test_a_renewed_certificate_is_loaded_and_a_refused_one_taken_back(fleet: Fleet) -> None:
    first = fleet.place.cert_file.read_text()
    await fleet.enrolment.renew_certificate()
    second = fleet.place.cert_file.read_text()
    assert first != second
    assert len(fleet.bus.loaded) == 1
    fleet.bus.fail = NoAnswer("the bus does not answer")
    with pytest.raises(AdapterError, match="nothing was changed"):
        await fleet.enrolment.renew_certificate()
    assert fleet.place.cert_file.read_text() == second
