"""Configuration files: what they mean, what is left out, and the line and words that refuse a mistake."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.config.agent import (
    AGENT_FILE,
    AcmeConfig,
    AgentConfig,
    ProxyAccess,
    Rfc2136Config,
    load_agent,
    read_passwords,
)
from mcp.config.bus import BUS_FILE, BusConfig, load_bus
from mcp.config.cli import CLI_FILE, CliConfig, load_cli
from mcp.config.master import MASTER_FILE, MasterConfig, load_master
from mcp.config.reading import BusAccess, read_document
from mcp.model.errors import AdapterError, BadDefinition
from mcp.model.tables import MAX_FILE_BYTES, Schema

Load = Callable[[Path], Any]

MASTER = '[master]\nnode = "rift"\n'
AGENT = '[node]\nname = "orion"\n'
CLI = '[operator]\nname = "kyle"\nseed = "SUKYLE"\n'
LOADERS: dict[str, tuple[Load, str]] = {
    "bus": (load_bus, "[bus]\n"),
    "master": (load_master, MASTER),
    "agent": (load_agent, AGENT),
    "cli": (load_cli, CLI),
}

FROM_THE_DOCUMENTATION = """\
[node]
name = "orion"
role = "worker"                     # master, worker, edge
address = "100.64.0.2"
# arch = "arm64"                    # default: what the machine says
[adapters]
containers = "docker"               # none on an edge
routes = "mcproxy"                  # or "none"
internal_certificates = "local-ca"  # or "acme"
public_certificates = "acme"        # edge nodes; "local-ca" for *.localhost
names = "rfc2136"                   # or "mcns", "none"
[docker]
url = "unix:///var/run/docker.sock"
network = "mcpnet"
[registry."100.64.0.10:5001"]
username = "lab"
password_file = "/srv/mcp/registry.pass"
[proxy]
address = "unix:/run/mcp/proxy.sock"
[acme]
directory = "https://100.64.0.10:14000/dir"
ca_file = "/srv/mcp/acme-ca.pem"
email = "ops@metacircular.net"
challenge = "http-01"               # or "dns-01"
# eab_url, eab_token_file           # Metacrypt: where to fetch the external account binding
[rfc2136]
server = "100.64.0.10:53"
zone = "metacircular.net"
key_name = "mcp"
key_file = "/srv/mcp/tsig.key"
algorithm = "hmac-sha256"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file to write a configuration into."""
    return tmp_path / "mcp.toml"


def loaded(load: Load, file: Path, text: str) -> Any:
    """Load a configuration with this text."""
    file.write_text(text)
    return load(file)


def refused(load: Load, file: Path, text: str) -> BadDefinition:
    """Return the error for a configuration with this text."""
    with pytest.raises(BadDefinition) as caught:
        loaded(load, file, text)
    return caught.value


# --------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    ("load", "text", "config"),
    [
        (load_bus, "", BusConfig()),
        (load_bus, "[bus]\n", BusConfig()),
        (load_master, MASTER, MasterConfig(node="rift")),
        (load_agent, AGENT, AgentConfig(name="orion")),
        (load_cli, CLI, CliConfig(operator="kyle", seed="SUKYLE")),
    ],
)
def test_everything_but_a_name_has_a_default(load: Load, file: Path, text: str, config: Any) -> None:
    assert loaded(load, file, text) == config


def test_a_bus_access_that_says_one_thing_keeps_the_defaults_of_its_program(file: Path) -> None:
    bus = loaded(load_agent, file, AGENT + "[bus]\nport = 4333\n").bus
    assert bus == attrs.evolve(AgentConfig(name="x").bus, port=4333)
    assert bus.key_file == "/srv/mcp/keys/agent.nkey"
    assert MasterConfig(node="x").bus.key_file == "/srv/mcp/keys/master.nkey"


# ----------------------------------------------------------------- whole examples


def test_the_bus_file(file: Path) -> None:
    text = '[bus]\naddress = "100.64.0.1"\nport = 4223\nstate = "/x/bus"\nkeys = "/x/keys"\nbinary = "/usr/bin/nats-server"\n'
    assert loaded(load_bus, file, text) == BusConfig(
        address="100.64.0.1", port=4223, state="/x/bus", keys="/x/keys", binary="/usr/bin/nats-server"
    )


def test_the_masters_file(file: Path) -> None:
    text = """
[master]
node = "rift"
keys = "/x/keys"
state = "/x/master"
lock = "/x/lock"
[bus]
address = "rift.example.net"
port = 4223
tls_name = "bus"
ca_file = "/x/ca.pem"
key_file = "/x/master.nkey"
answers_key_file = "/x/answers.nkey"
system_key_file = "/x/system.nkey"
enrolment = "/x/bus"
[names]
internal_zone = "svc.example.net"
[edge]
allowed_domains = ["example.net", "localhost"]
mesh = ["100.64.0.0/10", "fd00::/8"]
[health]
heartbeat_s = 0.5
missed = 2
probe_timeout_s = 1
census_timeout_s = 2
census_grace_s = 1
clock_skew_s = 5
[limits]
max_nodes = 4
registrations_per_minute = 1
messages_per_second = 10
invitation_s = 60
[deploy]
operation_timeout_s = 600
return_timeout_s = 30
"""
    assert loaded(load_master, file, text) == MasterConfig(
        node="rift",
        keys="/x/keys",
        state="/x/master",
        lock="/x/lock",
        bus=BusAccess(
            address="rift.example.net", port=4223, tls_name="bus", ca_file="/x/ca.pem", key_file="/x/master.nkey"
        ),
        answers_key_file="/x/answers.nkey",
        system_key_file="/x/system.nkey",
        enrolment="/x/bus",
        internal_zone="svc.example.net",
        allowed_domains=("example.net", "localhost"),
        mesh=("100.64.0.0/10", "fd00::/8"),
        heartbeat_s=0.5,
        missed=2,
        probe_timeout_s=1.0,
        census_timeout_s=2.0,
        census_grace_s=1.0,
        clock_skew_s=5.0,
        max_nodes=4,
        registrations_per_minute=1,
        messages_per_second=10,
        invitation_s=60.0,
        operation_timeout_s=600.0,
        return_timeout_s=30.0,
    )


def test_the_documented_agents_file(file: Path) -> None:
    assert loaded(load_agent, file, FROM_THE_DOCUMENTATION) == AgentConfig(
        name="orion",
        address="100.64.0.2",
        routes="mcproxy",
        internal_certificates="local-ca",
        public_certificates="acme",
        names="rfc2136",
        registries={"100.64.0.10:5001": ("lab", "/srv/mcp/registry.pass")},
        proxy=ProxyAccess(address="unix:/run/mcp/proxy.sock"),
        acme=AcmeConfig(
            directory="https://100.64.0.10:14000/dir", ca_file="/srv/mcp/acme-ca.pem", email="ops@metacircular.net"
        ),
        rfc2136=Rfc2136Config(server="100.64.0.10:53", zone="metacircular.net", key_file="/srv/mcp/tsig.key"),
    )


def test_ports_engine_and_heartbeat_of_an_agent(file: Path) -> None:
    text = AGENT + (
        'role = "master"\narch = "arm64"\nstate = "/x"\n[docker]\nurl = "tcp://127.0.0.1:2375"\npublish_address = "100.64.0.2"\n'
        "is_shared = true\nrequest_timeout_s = 3\n[ports]\nfirst = 20000\nlast = 30000\n[health]\nheartbeat_s = 5\n"
    )
    assert loaded(load_agent, file, text) == AgentConfig(
        name="orion", role="master", arch="arm64", state="/x", docker_url="tcp://127.0.0.1:2375", publish_address="100.64.0.2",
        is_shared=True, request_timeout_s=3.0, first_port=20_000, last_port=30_000, heartbeat_s=5.0,
    )  # fmt: skip


def test_an_operators_file(file: Path) -> None:
    text = (
        CLI
        + '[bus]\naddress = "100.64.0.1"\nca_pem = """\nPEM"""\n[services]\nfolder = "~/defs"\n[defaults]\ntimeout_s = 5\n'
    )
    config = loaded(load_cli, file, text)
    assert (config.bus.address, config.bus.ca_pem) == ("100.64.0.1", "PEM")
    assert (config.services, config.timeout_s) == ("~/defs", 5.0)


# ------------------------------------------------------------------------- roles


def test_an_edge_has_no_engine_unless_somebody_says_so_wrongly(file: Path) -> None:
    assert loaded(load_agent, file, AGENT + 'role = "edge"\n').containers == "none"
    error = refused(load_agent, file, AGENT + 'role = "edge"\n[adapters]\ncontainers = "docker"\n')
    assert (error.key, error.line) == ("adapters.containers", 5)


@pytest.mark.parametrize("ports", ["first = 60001", "last = 9999", "first = 2\nlast = 1"])
def test_the_first_port_is_not_above_the_last(file: Path, ports: str) -> None:
    error = refused(load_agent, file, f"{AGENT}[ports]\n{ports}\n")
    assert "above the last port" in str(error)
    assert error.line == 4


# ------------------------------------------------------------------- the operator


def test_an_operators_key_may_lie_in_a_file_of_its_own(file: Path, tmp_path: Path) -> None:
    key = tmp_path / "kyle.nkey"
    key.write_text("SUKYLE\n")
    key.chmod(0o600)
    assert loaded(load_cli, file, f'[operator]\nname = "kyle"\nkey_file = "{key}"\n').seed == "SUKYLE"


def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(file: Path, tmp_path: Path) -> None:
    key = tmp_path / "kyle.nkey"
    key.write_text("SUKYLE\n")
    key.chmod(0o644)
    with pytest.raises(AdapterError, match="others can read it") as caught:
        loaded(load_cli, file, f'[operator]\nname = "kyle"\nkey_file = "{key}"\n')
    assert caught.value.hint == f"Take their rights away: chmod 600 {key}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[operator]\nname = "kyle"\n', "'seed' is missing"),
        ('[operator]\nname = "kyle"\nseed = ""\n', "'seed' is missing"),
        (CLI + 'key_file = "/x"\n', "only one of them"),
    ],
)
def test_an_operator_has_one_key(file: Path, text: str, words: str) -> None:
    assert words in str(refused(load_cli, file, text))


def test_a_seed_is_never_shown(file: Path) -> None:
    assert "SUKYLE" not in repr(loaded(load_cli, file, CLI))
    assert "SUKYLE" not in str(refused(load_cli, file, CLI + "sead = 1\n"))
    assert "SUKYLE" not in str(refused(load_cli, file, '[operator]\nname = "kyle"\nseed = ["SUKYLE"]\n'))


# --------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("load", "text", "line", "words"),
    [
        (load_master, "", 0, "'master' is missing"),
        (load_master, "[master]\n", 1, "'node' is missing"),
        (load_master, '[master]\nnode = "Rift"\n', 2, "no name"),
        (load_master, '[master]\nnode = "sys"\n', 2, "no name"),
        (load_master, "master = 1\n", 1, "expected a table"),
        (load_master, MASTER + '[names]\ninternal_zone = "Svc.net"\n', 4, "not a domain"),
        (load_master, MASTER + '[names]\ninternal_zone = ""\n', 4, "not a domain"),
        (load_master, MASTER + '[names]\ninternal_zone = "10.0.0.1"\n', 4, "not a domain"),
        (load_master, MASTER + '[edge]\nallowed_domains = "a.net"\n', 4, "expected an array of strings"),
        (load_master, MASTER + '[edge]\nallowed_domains = [\n"a.net",\n"*.net"]\n', 6, "not a domain"),
        (load_master, MASTER + '[edge]\nmesh = ["100.64.0.1/10"]\n', 4, "not a network"),
        (load_master, MASTER + "[edge]\nmesh = []\n", 4, "at least one"),
        (load_master, MASTER + "[health]\nheartbeat_s = 0\n", 4, "out of range"),
        (load_master, MASTER + "[health]\nheartbeat_s = nan\n", 4, "out of range"),
        (load_master, MASTER + '[health]\nheartbeat_s = "30"\n', 4, "expected a number"),
        (load_master, MASTER + "[health]\nmissed = 2.5\n", 4, "expected a whole number"),
        (load_master, MASTER + "[limits]\nmax_nodes = 0\n", 4, "out of range"),
        (load_master, MASTER + "[limits]\nmax_nodes = true\n", 4, "expected a whole number, got true or false"),
        (load_agent, AGENT + 'role = "agent"\n', 3, "none of master, worker, edge"),
        (load_agent, AGENT + 'address = ""\n', 3, "not an address"),
        (load_agent, AGENT + 'state = "agent"\n', 3, "not an absolute path"),
        (load_agent, AGENT + 'arch = "x86 64"\n', 3, "not an architecture"),
        (load_agent, AGENT + '[docker]\nurl = "/var/run/docker.sock"\n', 4, "not an engine"),
        (load_agent, AGENT + '[docker]\npublish_address = "localhost"\n', 4, "not an IP address"),
        (load_agent, AGENT + '[registry."h:1"]\nusername = "a"\n', 3, "'password_file' is missing"),
        (load_agent, AGENT + "[registry]\nh = 1\n", 4, "expected a table"),
        (load_agent, AGENT + '[acme]\ndirectory = "http://x"\n', 4, "https://"),
        (load_bus, "[bus]\nport = 70000\n", 2, "70000 is no port: 1 to 65535"),
        (load_bus, '[bus]\nport = "4222"\n', 2, "expected a whole number"),
        (load_bus, '[bus]\naddress = "100.64.0.999"\n', 2, "not an address"),
        (load_bus, "[bus\n", 1, "not TOML"),
    ],
)
def test_a_mistake_is_told_with_file_and_line(file: Path, load: Load, text: str, line: int, words: str) -> None:
    error = refused(load, file, text)
    assert words in str(error)
    assert str(error).startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert error.line == line


@pytest.mark.parametrize(
    ("load", "text", "key", "reason", "hint"),
    [
        (load_agent, AGENT + '[adapters]\ncontainres = "docker"\n', "adapters.containres", "[adapters] has no 'containres'",
         "did you mean 'containers'?"),
        (load_agent, AGENT + "[limits]\nmax_nodes = 3\n", "limits", "unknown key 'limits'", ""),
        (load_agent, AGENT + "heartbeat_s = 3\n", "node.heartbeat_s", "[node] has no 'heartbeat_s'", "it belongs in [health]"),
        (load_master, MASTER + "[limit]\nmax_nodes = 3\n", "limit", "unknown key 'limit'", "did you mean 'limits'?"),
        (load_bus, "[bus]\nadress = 1\n", "bus.adress", "[bus] has no 'adress'", "did you mean 'address'?"),
        (load_cli, CLI + "[default]\n", "default", "unknown key 'default'", "did you mean 'defaults'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(
    file: Path, load: Load, text: str, key: str, reason: str, hint: str
) -> None:
    error = refused(load, file, text)
    assert error.key == key
    assert reason in str(error)
    assert hint in error.hint


def test_all_mistakes_of_a_file_are_told_at_once(file: Path) -> None:
    error = refused(
        load_master, file, '[master]\nnode = "Rift"\n[health]\nmised = 1\nheartbeat_s = "1"\n[limits]\nmax_nodes = -1\n'
    )
    assert [mistake.line for mistake in error.mistakes] == [2, 4, 5, 7]


@pytest.mark.parametrize("name", LOADERS)
def test_a_file_that_cannot_be_read_is_a_mistake_of_its_own(tmp_path: Path, name: str) -> None:
    load, _ = LOADERS[name]
    with pytest.raises(BadDefinition, match="cannot be read: no such file or directory"):
        load(tmp_path / "missing.toml")
    with pytest.raises(BadDefinition, match="cannot be read: is a directory"):
        load(tmp_path)
    with pytest.raises(BadDefinition, match="cannot be read: embedded null byte"):
        load(tmp_path / "a\0b")
    (tmp_path / "latin.toml").write_bytes(b"# \xfcber\n")
    with pytest.raises(BadDefinition, match="is not UTF-8 text"):
        load(tmp_path / "latin.toml")


def test_a_file_without_an_end_is_read_only_so_far() -> None:
    with pytest.raises(BadDefinition, match="is larger than 64 KiB"):
        read_document("/dev/zero")


def test_a_character_on_the_limit_of_a_file_is_no_wrong_utf_8(file: Path) -> None:
    file.write_bytes(b"#" * MAX_FILE_BYTES + "é".encode())
    with pytest.raises(BadDefinition, match="is larger than 64 KiB"):
        read_document(file)


# ------------------------------------------------------------ every key, any value


def keys_of(schema: Schema) -> list[tuple[str, str]]:
    """Return (table, key) for each key of a file."""
    return [(table.name, key.name) for table in schema.keys if table.inner for key in table.inner.keys]


FILES = {"bus": BUS_FILE, "master": MASTER_FILE, "agent": AGENT_FILE, "cli": CLI_FILE}
ALL_KEYS = [(name, *key) for name, schema in FILES.items() for key in keys_of(schema)]

values = st.sampled_from(
    ["1", "-1", "0.5", "nan", "inf", "true", '""', '"x"', '"/x"', '"\\u0000"', "[]", '["a"]', "[1]", "{}", "{a = {}}", "07:32:00",
     "1979-05-27", "1" + "0" * 400, "0x" + "f" * 6000, '"' + "a" * 1000 + '"', '"::1"', '"a.b"', "[[[]]]", '"ü\\n"']
)  # fmt: skip


@given(st.sampled_from(ALL_KEYS), values)
def test_any_value_of_any_key_is_taken_or_refused_with_its_line(
    tmp_path_factory: pytest.TempPathFactory, key: tuple[str, str, str], value: str
) -> None:
    name, table, word = key
    load, needed = LOADERS[name]
    header = '[registry."h:1"]' if table == "registry" else f"[{table}]"
    kept = re.sub(rf"^{word} =.*\n", "", needed, flags=re.MULTILINE) if f"[{table}]" in needed else needed
    text = kept.replace(f"{header}\n", "") if f"[{table}]" in needed else f"{needed}{header}\n"
    text = f"{header}\n{word} = {value}\n{text}" if f"[{table}]" in needed else f"{text}{word} = {value}\n"
    file = tmp_path_factory.getbasetemp() / "any.toml"
    file.write_text(text)
    line = 0
    try:
        load(file)
    except BadDefinition as error:
        line = error.line
        assert str(error).startswith(str(file))  # noqa: PT017 - a value may be taken
    except AdapterError:
        assert (name, table, word) == ("cli", "operator", "key_file")  # it is read at once
    assert 0 <= line <= text.count("\n")


@pytest.mark.parametrize(
    ("schema", "cls"),
    [(BUS_FILE, BusConfig), (MASTER_FILE, MasterConfig), (AGENT_FILE, AgentConfig), (CLI_FILE, CliConfig)],
)
def test_every_key_of_a_file_is_for_an_attribute_and_every_attribute_has_a_key(schema: Schema, cls: type) -> None:
    apart = {"bus", "proxy", "acme", "rfc2136"} & {field.name for field in attrs.fields(cls)}
    parts = {"bus": BusAccess, "proxy": ProxyAccess, "acme": AcmeConfig, "rfc2136": Rfc2136Config}
    wanted = {field.name for field in attrs.fields(cls)} - apart - {"registries"}
    wanted |= {field.name for part in apart for field in attrs.fields(parts[part])}
    found = {
        key.to or key.name
        for table in schema.keys
        if table.inner and table.name != "registry"
        for key in table.inner.keys
    }
    assert found - {"operator_key_file"} == wanted


# -------------------------------------------------------------------- passwords


def test_passwords_of_registries_are_read_from_their_files(tmp_path: Path) -> None:
    (tmp_path / "pass").write_text("s3cret\n")
    assert read_passwords({"h:1": ("lab", str(tmp_path / "pass"))}) == {"h:1": ("lab", "s3cret")}


def test_a_password_that_cannot_be_read_is_told_with_its_registry(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"registry h:1 from .*pass: no such file"):
        read_passwords({"h:1": ("lab", str(tmp_path / "pass"))})
