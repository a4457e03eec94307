"""Service definitions as rows: what is written, what it means, or the line and the words that refuse it."""

from __future__ import annotations

import datetime as dt
import json
import re
import time
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcp.model.definition import (
    SCHEMAS,
    Defaults,
    Parsed,
    differences,
    parse_service,
    parse_with_warnings,
    render_service,
)
from mcp.model.errors import BadDefinition
from mcp.model.spec import ComponentSpec, FixedPort, HealthSpec, RouteSpec, ServiceSpec, VolumeSpec, spec_hash
from mcp.model.tables import MAX_FILE_BYTES, MISTAKES_SHOWN, decode
from tests.builders import GIB, MIB, component, route, service

EXAMPLES = Path(__file__).parents[2] / "examples"
PAGE = Path(__file__).parents[2] / "docs" / "service-definition.md"
FLEET = Defaults(internal_zone="svc.mcp.metacircular.net", allowed_domains=("metacircular.net", "wntrmute.net"))

PLATFORM = """
name   = "mcq"
tier   = "worker"
active = true
version = "v0.4.0"

[[components]]
name    = "mcq"
image   = "mcr.svc.mcp.metacircular.net:8443/mcq:v0.4.0"
volumes = ["/srv/mcq:/srv/mcq"]
cmd     = ["server", "--config", "/srv/mcq/mcq.toml"]
env     = ["LEVEL=info"]
network = "mcpnet"
user    = "0:0"
restart = "unless-stopped"
ports   = ["127.0.0.1:28443:8443"]
memory  = "256M"
cpu     = 0.5
[components.health]
path = "/healthz"
interval = "1s"
timeout  = "30s"

[[components.routes]]
name = "internal"
port = 8443
mode = "l7"

[[components.routes]]
name     = "public"
port     = 8443
mode     = "l7"
hostname = "mcq.metacircular.net"
public   = true
"""


def parsed(text: str, *, file: str = "web.toml") -> ServiceSpec:
    """Read a definition with the platform's defaults."""
    return parse_service(text, file=file, defaults=FLEET)


def web(line: str = "", *, above: str = "", image: str = 'image = "web:v1"', below: str = "") -> ServiceSpec:
    """Read a service of one component, with a line in it."""
    return parsed(f'name = "web"\n{above}\n[[components]]\nname = "web"\n{image}\n{line}\n{below}\n')


def first(line: str, **more: str) -> ComponentSpec:
    """Return the component of such a service."""
    return web(line, **more).components[0]


def refused(text: str, **more: Any) -> BadDefinition:
    """Return the error for a definition."""
    with pytest.raises(BadDefinition) as caught:
        parse_service(text, **{"file": "web.toml", "defaults": FLEET, **more})
    return caught.value


def refused_line(line: str, *, above: str = "", image: str = 'image = "web:v1"', below: str = "") -> BadDefinition:
    """Return the error for a line in a component; it must be told with its file and a line."""
    error = refused(f'name = "web"\n{above}\n[[components]]\nname = "web"\n{image}\n{line}\n{below}\n')
    assert str(error).startswith("web.toml:")
    assert error.line > 0
    return error


def test_the_platforms_own_example_means_what_it_says() -> None:
    assert parsed(PLATFORM) == ServiceSpec(
        name="mcq",
        version="v0.4.0",
        components=(
            ComponentSpec(
                name="mcq",
                image="mcr.svc.mcp.metacircular.net:8443/mcq:v0.4.0",
                volumes=(VolumeSpec(host_path="/srv/mcq", container_path="/srv/mcq"),),
                cmd=("server", "--config", "/srv/mcq/mcq.toml"),
                env={"LEVEL": "info"},
                network="mcpnet",
                user="0:0",
                ports=(FixedPort(address="127.0.0.1", host_port=28443, container_port=8443),),
                memory_bytes=256 * MIB,
                cpu_cores=0.5,
                health=HealthSpec(path="/healthz"),
                routes=(
                    RouteSpec(name="internal", port=8443),
                    RouteSpec(name="public", port=8443, hostname="mcq.metacircular.net", public=True),
                ),
            ),
        ),
    )


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_every_example_parses_without_a_warning(file: Path) -> None:
    found = parse_with_warnings(file.read_text(), file=str(file))
    assert found.warnings == ()
    assert found.spec.name == file.stem


# --------------------------------------------------------------------- the page


def rows_of_the_page() -> dict[str, dict[str, str]]:
    """Return the row of each key, by the table it is in."""
    rows: dict[str, dict[str, str]] = {}
    for part in PAGE.read_text().split("\n## ")[1:]:
        header = re.match(r".*?\(`\[+([a-z.]+)\]+`\)|The service", part)
        if header:
            rows[header[1] or ""] = {
                row[1]: row[0] for row in re.finditer(r"^\| `([a-z_]+)` \|.*$", part, re.MULTILINE)
            }
    return rows


@pytest.mark.parametrize("table", SCHEMAS)
def test_the_page_explains_every_key_and_no_other(table: str) -> None:
    assert list(rows_of_the_page()[table]) == [key.name for key in SCHEMAS[table].keys]


@pytest.mark.parametrize(("table", "key"), [(table, key) for table, rows in rows_of_the_page().items() for key in rows])
def test_an_example_of_the_page_is_taken(table: str, key: str) -> None:
    example = rows_of_the_page()[table][key].rpartition("`")[0].rpartition("`")[2]
    usual = {
        "": ['name = "web"'],
        "components": ['name = "web"', 'image = "web:v1"'],
        "components.health": [],
        "components.routes": ['hostname = "web.example.net"', "port = 8443"],
    }
    lines = []
    for each, written in usual.items():
        header = f"[[{each}]]" if each in ("components", "components.routes") else f"[{each}]"
        lines += [header] if each else []
        kept = [line for line in written if (each, line.split(" ")[0]) != (table, key)]
        lines += [example, *kept] if each == table and not example.startswith("[") else written
    assert (key in example.split(" ")[0]) or example.strip("[]").endswith(key)
    assert parse_service("\n".join(lines), file="web.toml").components[0].routes


def test_the_page_shows_mistakes_as_they_are_told() -> None:
    text = 'name = "web"\n\n[[components]]\nname = "web"\nimage = "web"\nmemroy = "1G"\n'
    error = refused(text)
    assert f"{error}\n{error.hint}\n" in PAGE.read_text()


# ------------------------------------------------------------------------ where


@pytest.mark.parametrize(
    ("above", "tier", "node"),
    [
        ("", "worker", ""),
        ('tier = "worker"', "worker", ""),
        ('tier = "core"', "core", ""),
        ('node = "rift"', "worker", "rift"),
        ('tier = "core"\nnode = "orion"', "core", "orion"),
    ],
)
def test_tier_and_pin(above: str, tier: str, node: str) -> None:
    spec = web(above=above)
    assert (spec.tier, spec.node) == (tier, node)


def test_a_service_is_active_unless_it_says_otherwise() -> None:
    assert web().active
    assert not web(above="active = false").active


@pytest.mark.parametrize(
    ("above", "words"),
    [
        ('tier = "cor"', "did you mean 'core'?"),
        ('tier = "edge"', "none of core, worker"),
        ('node = "Rift"', "not a node's name"),
        ('node = "rift.lan"', "not a node's name"),
        ('node = "master"', "not a node's name"),
        ('active = "yes"', "expected true or false, got a string ('yes')"),
        ("active = 1", "expected true or false, got a whole number (1)"),
        ('version = "a b"', "not an image tag"),
        ('version = "latest"', "versions are pinned"),
    ],
)
def test_what_a_service_may_not_say(above: str, words: str) -> None:
    error = refused_line("", above=above)
    assert words in f"{error} {error.hint}"
    assert error.line == 2


# ------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    "name", ["Web", "web_1", "web.net", "-web", "web-", "a" * 41, "", "wéb", "web\\n", "../etc", "*", ">"]
)
def test_a_name_that_is_none_is_refused(name: str) -> None:
    error = refused(f'name = "{name}"\n[[components]]\nname = "a"\nimage = "web:v1"')
    assert (error.key, error.line) == ("name", 1)
    assert "lower-case" in str(error)
    error = refused(f'name = "a"\n[[components]]\nname = "{name}"\nimage = "web:v1"')
    assert (error.key, error.line) == ("components[0].name", 3)


def test_a_wrong_name_is_answered_with_one_that_would_do() -> None:
    assert refused('name = "My Web_Page"\n[[components]]\nname = "a"\nimage = "web:v1"').hint == 'Like "my-web-page".'


def test_a_service_needs_a_component() -> None:
    assert "'components' is missing" in str(refused('name = "web"'))
    assert "at least one component" in str(refused('name = "web"\ncomponents = []'))


def test_two_components_may_not_have_one_name() -> None:
    one = '[[components]]\nname = "a"\nimage = "web:v1"\n'
    error = refused(f'name = "web"\n{one}{one}')
    assert (error.key, error.line) == ("components[1].name", 6)


# ----------------------------------------------------------------------- images

DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    "image",
    [
        "web:v1",
        "web:1",
        "library/web:v1",
        "host:8443/web:v1",
        "mcr.svc.mcp.metacircular.net:8443/team/web_page:v1.2.3-rc.1",
        "localhost/web:v1",
        "[fd00::1]:5000/web:v1",
        f"web@{DIGEST}",
        f"host:8443/web@{DIGEST}",
        f"web:latest@{DIGEST}",
        f"web:v1@{DIGEST}",
    ],
)
def test_an_image_with_a_version_or_a_digest_is_taken_as_it_is(image: str) -> None:
    assert first("", image=f'image = "{image}"').image == image
    assert first("", image=f'image = "{image}"', above='version = "v9"').image == image


@pytest.mark.parametrize(
    ("image", "words", "instead"),
    [
        ("web", "has no tag", '"web:v1"'),
        ("host:8443/web", "has no tag", '"host:8443/web:v1"'),
        ("web:latest", "is tagged latest", '"web:v1"'),
        ("host:8443/web:latest", "is tagged latest", '"host:8443/web:v1"'),
    ],
)
def test_an_image_that_is_not_pinned_is_refused_with_what_to_write_instead(
    image: str, words: str, instead: str
) -> None:
    error = refused_line("", image=f'image = "{image}"')
    assert words in str(error)
    assert instead in error.hint
    assert (error.key, error.line) == ("components[0].image", 5)


def test_the_services_version_is_the_tag_of_images_without_one() -> None:
    assert first("", image='image = "host:8443/web"', above='version = "v2"').image == "host:8443/web:v2"
    assert "is tagged latest" in str(refused_line("", image='image = "web:latest"', above='version = "v2"'))


def test_a_component_without_an_image_is_called_like_its_image() -> None:
    text = 'name = "web"\nversion = "v2"\n[[components]]\nname = "api"'
    found = parse_with_warnings(text, file="web.toml")
    assert found.spec.components[0].image == "api:v2"
    assert "api:v2 is used" in found.warnings[0]
    assert "'image' is missing" in str(refused('name = "web"\n[[components]]\nname = "api"'))


@pytest.mark.parametrize(
    "image",
    ["", " ", "web:", "web: v1", "Web:v1/x:v1", "web:v1:v2", "web@sha256:12", "web@", ":v1", "a//b:v1", "web;rm:v1", "-web:v1",
     "--privileged:v1", "host:٣/web:v1", "web:v1\\n", "a" * 300 + ":v1", "web:" + "a" * 129, f"web@md5:{'0' * 32}"],
)  # fmt: skip
def test_what_is_no_image_is_refused(image: str) -> None:
    assert refused_line("", image=f'image = "{image}"').key == "components[0].image"


# ------------------------------------------------------------------ environment


@pytest.mark.parametrize(
    ("line", "env"),
    [
        ('env = ["A=1", "B=x=y", "C="]', {"A": "1", "B": "x=y", "C": ""}),
        ('env = { A = "1", B = 2, C = true, D = false }', {"A": "1", "B": "2", "C": "true", "D": "false"}),
        ('env = ["E=\\U0001F600 \\t"]', {"E": "😀 \t"}),
        ("env = []", {}),
    ],
)
def test_variables_are_a_list_or_a_table(line: str, env: dict[str, str]) -> None:
    assert first(line).env == env


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ('env = "A=1"', "env", "an array of"),
        ('env = ["A=1", "B"]', "env[1]", 'expected "KEY=VALUE"'),
        ("env = [1]", "env[0]", 'expected "KEY=VALUE"'),
        ('env = ["A=1", "A=2"]', "env[1]", "A is set twice"),
        ('env = ["1A=1"]', "env[0]", "no name of a variable"),
        ('env = ["=1"]', "env[0]", "no name of a variable"),
        ('env = ["A=1\\n2"]', "env[0]", "line break"),
        ('env = { A = "\\u0000" }', "env.A", "line break or NUL"),
        ("env = { A = 1.10 }", "env.A", "expected a string"),
        ("env = { A = 1979-05-27 }", "env.A", "expected a string"),
        ("env = { A = [1] }", "env.A", "expected a string"),
        ('env = { "A.B" = 1 }', "env.'A.B'", "no name of a variable"),
        ('env = ["MCP_NODE=moon"]', "env[0]", "set by the agent"),
        ("env = { A = 0x" + "f" * 6000 + " }", "env.A", "expected a string"),
    ],
)
def test_what_is_no_variable_is_refused(line: str, key: str, words: str) -> None:
    error = refused_line(line)
    assert error.key == f"components[0].{key}"
    assert words in str(error)


def test_no_error_ever_shows_the_value_of_a_variable() -> None:
    for line in (
        'env = ["s3cret"]',
        'env = ["A=s3cret\\n"]',
        'env = { "A B" = "s3cret" }',
        'env = ["A=s3cret", "A=s3cret"]',
    ):
        error = refused_line(line)
        assert "s3cret" not in f"{error} {error.hint}"


# ------------------------------------------------------------- volumes and ports


@pytest.mark.parametrize(
    ("text", "volume"),
    [
        ("/srv/a:/a", VolumeSpec(host_path="/srv/a", container_path="/a")),
        ("/srv/a:/a:ro", VolumeSpec(host_path="/srv/a", container_path="/a", read_only=True)),
        ("/srv/a b/ü:/x", VolumeSpec(host_path="/srv/a b/ü", container_path="/x")),
    ],
)
def test_a_volume_has_two_absolute_paths(text: str, volume: VolumeSpec) -> None:
    assert first(f'volumes = ["{text}"]').volumes == (volume,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/a",
        "a:/b",
        "/a:b",
        "data:/b",
        "/a:/b:rw",
        "/a:/b:ro:ro",
        "/a:/b:",
        "/srv/../etc:/b",
        "/a:/b/..",
        "/a:/",
        "/a\\n:/b",
        ":",
    ],
)
def test_what_is_no_volume_is_refused_on_its_own_line(text: str) -> None:
    error = refused_line(f'volumes = [\n  "/ok:/ok",\n  "{text}",\n]')
    assert (error.key, error.line) == ("components[0].volumes[1]", 8)


def test_two_volumes_may_not_be_mounted_at_one_place() -> None:
    assert "mounted at '/x'" in str(refused_line('volumes = ["/a:/x", "/b:/x/"]'))


@pytest.mark.parametrize(
    ("text", "port"),
    [
        ("127.0.0.1:28443:8443", FixedPort(address="127.0.0.1", host_port=28443, container_port=8443)),
        ("53:5353/udp", FixedPort(host_port=53, container_port=5353, protocol="udp")),
        ("80:8080/tcp", FixedPort(host_port=80, container_port=8080)),
        ("[::1]:80:8080", FixedPort(address="[::1]", host_port=80, container_port=8080)),
    ],
)
def test_a_fixed_port(text: str, port: FixedPort) -> None:
    assert first(f'ports = ["{text}"]').ports == (port,)
    assert web(f'ports = ["{text}"]').stops_first


@pytest.mark.parametrize(
    "text",
    [
        "80",
        "0:80",
        "80:0",
        "80:65536",
        "1.2.3:80:80",
        "999.1.1.1:80:80",
        "host:80:80",
        "80:80/sctp",
        "٣:80",
        "",
        "80-90:80-90",
    ],
)
def test_what_is_no_port_is_refused(text: str) -> None:
    assert refused_line(f'ports = ["{text}"]').key == "components[0].ports[0]"


@pytest.mark.parametrize("other", ["80:1", "127.0.0.1:80:81"])
def test_one_host_port_may_not_be_claimed_twice(other: str) -> None:
    everywhere = '"0.0.0.0:80:80"' if ":80:" in other else '"80:80"'
    second = f'[[components]]\nname = "b"\nimage = "web:v1"\nports = ["{other}"]'
    error = refused_line(f"ports = [{everywhere}]", below=second)
    assert "claimed twice, also by web" in str(error)
    assert error.key == "components[1].ports[0]"


def test_one_number_may_be_a_tcp_and_a_udp_port() -> None:
    assert len(first('ports = ["53:53", "53:53/udp", "127.0.0.1:54:53", "127.0.0.2:54:53"]').ports) == 4


# ------------------------------------------------------------- sizes, times, words


@pytest.mark.parametrize(
    ("value", "size_bytes"),
    [
        ('"256M"', 256 * MIB),
        ('"256m"', 256 * MIB),
        ('"512MiB"', 512 * MIB),
        ('"1G"', GIB),
        ('"1.5 GB"', 1536 * MIB),
        ('"16384k"', 16 * MIB),
        ('"8388608"', 8 * MIB),
        ("8388609", 8 * MIB + 1),
        ('"9007199254740.5k"', None),
    ],
)
def test_memory(value: str, size_bytes: int | None) -> None:
    if size_bytes is None:
        assert "out of range" in str(refused_line(f"memory = {value}"))
    else:
        assert first(f"memory = {value}").memory_bytes == size_bytes


@pytest.mark.parametrize(
    "value",
    [
        "256",
        '"1M"',
        '"-1M"',
        "0",
        '""',
        '"M"',
        '"1P"',
        "1.5",
        "true",
        '"1e9"',
        '"٣G"',
        "0x" + "f" * 6000,
        f'"{"9" * 500}"',
    ],
)
def test_what_is_no_memory_is_refused(value: str) -> None:
    assert refused_line(f"memory = {value}").key == "components[0].memory"


def test_a_memory_that_forgot_its_unit_is_asked_for_it() -> None:
    assert refused_line("memory = 256").hint == 'Did you mean "256M"?'


@pytest.mark.parametrize("value", ["0.5", "2", "0.01"])
def test_cpu(value: str) -> None:
    assert first(f"cpu = {value}").cpu_cores == float(value)


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", '"1"', "true", "2000", "0x" + "f" * 6000, "1" + "0" * 400])
def test_what_is_no_cpu_is_refused(value: str) -> None:
    assert refused_line(f"cpu = {value}").key == "components[0].cpu"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [('"1s"', 1), ('"500ms"', 0.5), ('"2m"', 120), ('"1.5 h"', 5400), ("7", 7), ("0.25", 0.25), ('"0s"', 0)],
)
def test_durations(value: str, seconds: float) -> None:
    assert first(f"stop_grace = {value}").stop_grace_s == seconds


@pytest.mark.parametrize(
    "value",
    ['"1"', '"1 week"', '"-1s"', "-1", "nan", "true", '"٣s"', '""', f'"{"9" * 500}s"', "1" + "0" * 400, "07:32:00"],
)
def test_what_is_no_duration_is_refused(value: str) -> None:
    assert refused_line(f"stop_grace = {value}").key == "components[0].stop_grace"


@pytest.mark.parametrize("policy", ["no", "always", "unless-stopped", "on-failure", "on-failure:3"])
def test_dockers_restart_policies_are_taken(policy: str) -> None:
    assert first(f'restart = "{policy}"').restart == policy


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('restart = "allways"', "did you mean 'always'?"),
        ('restart = "on-failure:x"', "none of no, always"),
        ("restart = true", "expected a string"),
        ('update = "stop"', "none of start-first, stop-first"),
        ('network = "a b"', "not a network's name"),
        ('network = "container:other"', "not a network's name"),
        ('user = "a b"', "not a user"),
        ('user = "--privileged"', "not a user"),
        ('cmd = "server --x"', "expected an array of strings, got a string"),
        ('cmd = ["a", 1]', "expected a string, got a whole number (1)"),
        ('cmd = ["\\u0000"]', "NUL"),
        ("health = 3", "expected a table"),
        ("routes = 3", "expected [[components.routes]] tables"),
        ("routes = [3]", "expected [[components.routes]] tables"),
    ],
)
def test_what_a_component_may_not_say(line: str, words: str) -> None:
    error = refused_line(line)
    assert words in f"{error} {error.hint}"
    assert error.line == 6


# ----------------------------------------------------------------------- health

ROUTE = "[[components.routes]]\nport = 8443"


@pytest.mark.parametrize(
    ("line", "health"),
    [
        ('path = "/healthz?x=1"', HealthSpec(path="/healthz?x=1")),
        ("tcp = true", HealthSpec(tcp=True)),
        ('cmd = ["/bin/check", "-x"]', HealthSpec(cmd=("/bin/check", "-x"))),
        ('interval = "500ms"\ntimeout = "2m"', HealthSpec(interval_s=0.5, timeout_s=120)),
        ("", HealthSpec()),
    ],
)
def test_health(line: str, health: HealthSpec) -> None:
    assert first("", below=f"[components.health]\n{line}\n{ROUTE}").health == health


@pytest.mark.parametrize(
    ("line", "key", "words"),
    [
        ('path = "healthz"', "path", "begins with /"),
        ('path = "/a b"', "path", "begins with /"),
        ('path = "/a\\r\\nHost: x"', "path", "begins with /"),
        ('path = "/a"\ntcp = true', "tcp", "only one of path, tcp and cmd"),
        ('path = "/a"\ncmd = ["x"]', "cmd", "only one of path, tcp and cmd"),
        ('interval = "0s"', "interval", "out of range"),
        ('http = "/a"', "http", "known: cmd, interval, path, tcp, timeout"),
        ("port = 8443", "port", "it belongs in [[components.routes]]"),
    ],
)  # fmt: skip
def test_what_is_no_health_check_is_refused(line: str, key: str, words: str) -> None:
    error = refused_line("", below=f"[components.health]\n{line}\n{ROUTE}")
    assert error.key == f"components[0].health.{key}"
    assert words in f"{error} {error.hint}"


@pytest.mark.parametrize("way", ['path = "/"', "tcp = true"])
def test_a_port_can_be_asked_only_where_there_is_one(way: str) -> None:
    assert "neither a route nor a fixed one" in str(
        refused_line('ports = ["53:53/udp"]', below=f"[components.health]\n{way}")
    )
    assert first('ports = ["80:80"]', below=f"[components.health]\n{way}").ports


# ----------------------------------------------------------------------- routes


def with_routes(*routes: str) -> str:
    """Write a service with routes; the first begins in line 5."""
    head = 'name = "web"\n[[components]]\nname = "web"\nimage = "web:v1"\n'
    return head + "".join(f"[[components.routes]]\n{each}\n" for each in routes)


def test_a_route_is_internal_and_l7_unless_it_says_otherwise() -> None:
    assert parsed(with_routes("port = 8443")).components[0].routes == (RouteSpec(port=8443),)


@pytest.mark.parametrize(
    ("written", "key", "words"),
    [
        ('name = "a"', "port", "'port' is missing"),
        ("port = 0", "port", "0 is no port: 1 to 65535"),
        ("port = 65536", "port", "65536 is no port"),
        ('port = "8443"', "port", "expected a whole number"),
        ("port = true", "port", "expected a whole number"),
        ("port = 8443.0", "port", "expected a whole number"),
        ('port = 1\nmode = "l5"', "mode", "none of l4, l7"),
        ('port = 1\nname = "A_b"', "name", "not a route's name"),
        ('port = 1\nhostname = "Web.example.net"', "hostname", "not a host name"),
        ('port = 1\nhostname = "web"', "hostname", "not a host name"),
        ('port = 1\nhostname = "web.example.net."', "hostname", "not a host name"),
        ('port = 1\nhostname = "*.example.net"', "hostname", "not a host name"),
        ('port = 1\nhostname = "10.0.0.1"', "hostname", "not a host name"),
        ('port = 1\nhostname = "a_b.example.net"', "hostname", "not a host name"),
        ('port = 1\nhostname = "wéb.example.net"', "hostname", "not a host name"),
        (f'port = 1\nhostname = "{"a" * 64}.example.net"', "hostname", "not a host name"),
        (f'port = 1\nhostname = "{"a." * 130}net"', "hostname", "not a host name"),
        ("port = 1\npublic = true", "public", "needs a hostname"),
        ('port = 1\npublic = true\nhostname = "evilmetacircular.net"', "hostname", "in no allowed domain"),
        (
            'port = 1\npublic = true\nhostname = "web.example.net"',
            "hostname",
            "(allowed: metacircular.net, wntrmute.net)",
        ),
        ('port = 1\npublic = true\nhostname = "web.svc.mcp.metacircular.net"', "hostname", "internal name"),
        ('port = 1\npublic = true\nhostname = "svc.mcp.metacircular.net"', "hostname", "internal name"),
        ("prot = 1", "prot", "did you mean 'port'?"),
    ],
)
def test_what_is_no_route_is_refused(written: str, key: str, words: str) -> None:
    error = refused(with_routes("port = 2\nname = 'ok'", written))
    assert error.key == f"components[0].routes[1].{key}"
    assert words in f"{error} {error.hint}"
    assert error.line >= 8


@pytest.mark.parametrize(
    "name", ["metacircular.net", "web.metacircular.net", "a.b.wntrmute.net", "evilsvc.mcp.metacircular.net"]
)
def test_public_names_lie_in_an_allowed_domain_by_whole_labels(name: str) -> None:
    assert parsed(with_routes(f'port = 1\npublic = true\nhostname = "{name}"')).components[0].routes[0].hostname == name


def test_without_a_list_of_domains_every_public_name_may_be_written() -> None:
    text = with_routes('port = 1\npublic = true\nhostname = "evilmetacircular.net"')
    assert parse_service(text, file="web.toml").components[0].routes[0].public


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ('name = "a"\nport = 1', 'name = "b"\nport = 1'),
        ('name = "a"\nport = 1\nhostname = "x.example.net"', 'name = "b"\nport = 1\nhostname = "x.example.net"'),
        ('name = "a"\nport = 1', 'name = "b"\nport = 1\nhostname = "web.svc.mcp.metacircular.net"'),
    ],
)
def test_two_routes_may_not_claim_one_name_on_one_port(one: str, other: str) -> None:
    error = refused(with_routes(one, other))
    assert "claimed twice, also by route a of web" in str(error)
    assert error.key == "components[0].routes[1].port"


def test_two_routes_may_share_a_hostname_on_different_ports() -> None:
    host = 'hostname = "x.metacircular.net"'
    spec = parsed(with_routes(f'name = "a"\nport = 1\n{host}', f'name = "b"\nport = 2\n{host}'))
    assert [route.port for route in spec.components[0].routes] == [1, 2]


def test_routes_of_a_component_have_names_of_their_own() -> None:
    assert "called 'a'" in str(refused(with_routes('name = "a"\nport = 1', 'name = "a"\nport = 2')))
    assert "without a name" in str(refused(with_routes("port = 1", "port = 2")))


# -------------------------------------------------------------- files and mistakes


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 0, "defines nothing"),
        ("# nothing\n", 0, "defines nothing"),
        ('name = "web"\nname = "web"\n', 2, "line 2, column"),
        ("name = \n", 1, "line 1, column"),
        ('name = "web"\n[[components]\n', 2, "not TOML"),
        ('name = "web"\n\ntext = """\nnever ends\n\n\n', 4, "not TOML"),
        ('[components]\nname = "a"', 1, "expected [[components]] tables"),
        ("a = " + "[" * 5000, 0, "nested too deeply"),
        ("a = 1" + "0" * 5000, 0, "a number is too long"),
        ("name = '\ud800'", 0, "not Unicode"),
        ('x = "' + "a" * 1_000_000 + '"', 0, "larger than 64 KiB"),
    ],
)
def test_a_file_that_is_no_definition_is_refused(text: str, line: int, words: str) -> None:
    error = refused(text)
    assert words in str(error)
    assert error.line == line or error.mistakes


def test_bytes_that_are_no_utf_8_are_told_with_their_line() -> None:
    with pytest.raises(BadDefinition, match=r"web\.toml:2: is not UTF-8 text: byte 0xff"):
        decode(b'name = "web"\n# \xff', file="web.toml")


def test_a_byte_order_mark_is_no_mistake() -> None:
    assert decode(b'\xef\xbb\xbfname = "web"', file="web.toml") == 'name = "web"'


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        ('naem = "web"\n[[components]]\nname = "a"\nimage = "web:v1"', 1, "naem", "did you mean 'name'?"),
        ('name = "web"\n[[components]]\nname = "a"\nimgae = "web:v1"', 4, "components[0].imgae", "did you mean 'image'?"),
        ('name = "web"\n[[component]]\nname = "a"\nimage = "web:v1"', 2, "component", "did you mean 'components'?"),
        (
            'name = "web"\n[[components]]\nname = "a"\nimage = "web:v1"\nnode = "rift"', 5, "components[0].node",
            "it belongs above the first [[components]]",
        ),
        (
            'name = "web"\n[[components]]\nname = "a"\nimage = "web:v1"\nprivileged = true', 5, "components[0].privileged",
            "known: cmd, cpu, env, health, image, memory, name, network, ports, restart, routes, stop_grace, update, user, volumes",
        ),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_once_with_what_was_meant(text: str, line: int, key: str, hint: str) -> None:
    error = refused(text)
    assert (error.file, error.line, error.key, error.hint, error.mistakes) == ("web.toml", line, key, hint, ())


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file() -> None:
    error = refused('name = "Web"\ntier = "cor"\n[[components]]\nname = "web"\nimage = "web"\nmemory = "1"\ncpus = 1\n')
    assert [mistake.key for mistake in error.mistakes] == [
        "name", "tier", "components[0].image", "components[0].memory", "components[0].cpus",
    ]  # fmt: skip
    lines = str(error).splitlines()
    assert [line.split()[0] for line in lines] == [
        "web.toml:1:",
        "web.toml:2:",
        "web.toml:5:",
        "web.toml:6:",
        "web.toml:7:",
    ]
    assert lines[1].endswith("; did you mean 'core'?")
    assert (error.line, error.key) == (1, "name")
    assert error.hint == "5 mistakes; nothing of the file was used."


def test_of_many_mistakes_the_first_are_shown_and_the_others_counted() -> None:
    error = refused('name = "web"\n' + "".join(f"x{i} = 1\n" for i in range(20)))
    assert len(error.mistakes) == 21  # and no components
    lines = str(error).splitlines()
    assert len(lines) == MISTAKES_SHOWN + 1
    assert lines[-1] == "... and 16 more"


def test_a_file_full_of_mistakes_is_answered_in_a_moment() -> None:
    begin_s = time.monotonic()
    refused("".join(f"key{i} = {i}\n" for i in range(4000)))
    assert time.monotonic() - begin_s < 5.0


# --------------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("/x/api.toml", with_routes("port = 1"), "defines web"),
        ("web.toml", 'node = "orion"\ntier = "core"\n' + with_routes(), "overrides tier"),
        ("web.toml", with_routes("port = 1").replace("[[components.r", 'env = ["PORT=80"]\n[[components.r'), "PORT"),
        ("web.toml", with_routes() + 'ports = ["80:80"]\nupdate = "start-first"\n', "stopped first"),
        (
            "web.toml",
            with_routes(*(f'name = "r{i}"\nport = {i}\npublic = true\nhostname = "x.example.net"' for i in (1, 2))),
            "public more than once",
        ),
    ],
)
def test_what_works_and_was_probably_not_meant_is_a_warning(file: str, text: str, words: str) -> None:
    found = parse_with_warnings(text, file=file)
    assert len(found.warnings) == 1
    assert words in found.warnings[0]


@pytest.mark.parametrize("file", ["web.toml", "/a/b/web.toml", "-", "/dev/stdin", "standard input"])
def test_a_definition_in_its_own_file_or_in_none_gives_no_warning(file: str) -> None:
    assert parse_with_warnings(with_routes("port = 1"), file=file) == Parsed(spec=parsed(with_routes("port = 1")))


# ----------------------------------------------------------- writing, differences

names = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?", fullmatch=True)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n\r"), max_size=12)
ports_ = st.integers(1, 65535)
paths = st.from_regex(r"(/[A-Za-z0-9 _-]{1,6}){1,3}", fullmatch=True)
seconds = st.floats(0.01, 80_000) | st.integers(1, 80_000).map(float)


@st.composite
def components(draw: st.DrawFn, name: str) -> ComponentSpec:
    """Any component that may be written."""
    routes = draw(st.lists(st.builds(route, name=names, port=ports_, mode=st.sampled_from(["l4", "l7"])), max_size=3))
    routes = list({r.name: r for r in routes}.values())
    cmd = tuple(draw(st.lists(texts, max_size=3)))
    way: dict[str, Any] = draw(
        st.sampled_from([{}, {"cmd": cmd}, *([{"path": "/x"}, {"tcp": True}] if routes else [])])
    )
    volumes = draw(
        st.lists(st.builds(VolumeSpec, host_path=paths, container_path=paths, read_only=st.booleans()), max_size=3)
    )
    return component(
        name,
        draw(st.sampled_from(["web:v1", "host:8443/web:v1", f"web@{DIGEST}"])),
        cmd=cmd,
        env=draw(st.dictionaries(st.from_regex(r"[A-Z_][A-Z0-9]{0,5}", fullmatch=True), texts, max_size=3)),
        volumes=tuple({v.container_path: v for v in volumes}.values()),
        network=draw(st.sampled_from(["", "mcpnet", "host"])),
        user=draw(st.sampled_from(["", "0:0", "app"])),
        restart=draw(st.sampled_from(["no", "always", "unless-stopped", "on-failure:3"])),
        ports=tuple(draw(st.lists(st.builds(FixedPort, host_port=ports_, container_port=ports_), max_size=1))),
        memory_bytes=draw(st.just(0) | st.integers(6 * MIB, 2**50) | st.integers(6, 9000).map(lambda m: m * MIB)),
        cpu_cores=draw(st.just(0.0) | st.floats(0.01, 1024)),
        stop_grace_s=draw(st.just(0.0) | seconds),
        update=draw(st.sampled_from(["start-first", "stop-first"])),
        health=HealthSpec(interval_s=draw(seconds), timeout_s=draw(seconds), **way),
        routes=tuple(routes),
    )


@st.composite
def services(draw: st.DrawFn) -> ServiceSpec:
    """Any service that may be written, with two components at most."""
    found = [draw(components(name)) for name in draw(st.lists(names, min_size=1, max_size=2, unique=True))]
    listeners: set[int] = set()
    fixed: set[int] = set()
    for i, each in enumerate(found):
        routes = tuple(r for r in each.routes if r.port not in listeners and not listeners.add(r.port))  # type: ignore[func-returns-value]
        health = each.health if routes or not (each.health.path or each.health.tcp) else HealthSpec()
        ports = tuple(p for p in each.ports if p.host_port not in fixed)
        fixed |= {p.host_port for p in ports}
        found[i] = attrs.evolve(each, routes=routes, health=health, ports=ports)
    return service(
        draw(names),
        "",
        *found,
        tier=draw(st.sampled_from(["core", "worker"])),
        node=draw(st.sampled_from(["", "rift"])),
        active=draw(st.booleans()),
        version=draw(st.sampled_from(["", "v1"])),
    )


@given(services())
def test_what_is_written_is_read_back(spec: ServiceSpec) -> None:
    text = render_service(spec)
    assert parse_service(text, file="x") == spec
    assert spec_hash(parse_service(text, file="x")) == spec_hash(spec)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda file: file.stem)
def test_an_example_written_anew_means_the_same(file: Path) -> None:
    spec = parse_service(file.read_text(), file=str(file))
    assert parse_service(render_service(spec), file=str(file)) == spec


def test_a_definition_is_written_as_people_write_it() -> None:
    text = render_service(
        service(memory_bytes=256 * MIB, stop_grace_s=30.0, routes=(route("public", hostname="x.net", public=True),))
    )
    for line in ('memory = "256M"', 'stop_grace = "30s"', "[[components.routes]]", "public = true"):
        assert line in text.splitlines()
    assert "restart" not in text  # as by default


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (service(), service(), ()),
        (service(), service(image="web:v2"), ("components[0].image: web:v1 -> web:v2",)),
        (service(), service(node="rift", active=False), ('node: "" -> rift', "active: true -> false")),
        (service(), service(cmd=("a b",)), ('components[0].cmd: [] -> ["a b"]',)),
        (service(), service("web", "", component(), component("db")), ("components: web -> web, db",)),
        (
            service(routes=(route("a"),)), service(routes=(route("a", 9443),)), ("components[0].routes[0].port: 8443 -> 9443",),
        ),
        (service(health=HealthSpec(path="/a")), service(), ('components[0].health.path: /a -> ""',)),
    ],
)  # fmt: skip
def test_differences_are_told_by_key(old: ServiceSpec, new: ServiceSpec, lines: tuple[str, ...]) -> None:
    assert differences(old, new) == lines


def test_differences_never_show_what_a_variable_holds() -> None:
    old, new = (
        service(env={"A": "s3cret", "B": "s3cret", "D": "1"}),
        service(env={"A": "s3cret2", "C": "s3cret", "D": "1"}),
    )
    lines = differences(old, new)
    assert lines == ("components[0].env.A: changed", "components[0].env.B: removed", "components[0].env.C: added")


@settings(max_examples=25)
@given(services(), services())
def test_two_services_differ_exactly_when_they_are_not_equal(one: ServiceSpec, other: ServiceSpec) -> None:
    assert bool(differences(one, other)) == (one != other)


# ---------------------------------------------------------------- for any TOML text

KEYS = [
    "name", "tier", "node", "active", "version", "components", "image", "cmd", "env", "volumes", "network", "user", "restart",
    "ports", "memory", "cpu", "stop_grace", "update", "health", "routes", "port", "mode", "hostname", "public", "path", "tcp",
    "interval", "timeout", "privileged", "",
]  # fmt: skip
WORDS = [
    "web",
    "web:v1",
    "core",
    "orion",
    "8443",
    "256M",
    "1s",
    "/srv:/srv",
    "80:80",
    "A=1",
    "l7",
    "x.example.net",
    "/",
]


def toml(value: Any) -> str:
    """Write any value as TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(k))} = {toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (dt.date, dt.time)):
        return value.isoformat()
    return str(value).lower()


scalars = (
    st.sampled_from(WORDS)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.booleans()
    | st.integers()
    | st.integers(2**70, 2**900)
    | st.floats()
    | st.dates()
    | st.times()
    | st.datetimes()
)
keys = st.sampled_from(KEYS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A text that looks like a definition: known and unknown tables, keys and values of any kind, sometimes broken."""
    lines = []
    for _ in range(draw(st.integers(0, 6))):
        lines.append(draw(st.sampled_from(
            ["", "[[components]]", "[[components]]", "[components.health]", "[[components.routes]]", "[components]", "[x.y]", "[[routes]]"]
        )))  # fmt: skip
        found = draw(st.dictionaries(keys, values, max_size=5))
        lines += [f"{toml(key)} = {toml(value)}" for key, value in found.items()]
    text = "\n".join(lines)
    cut = draw(st.none() | st.integers(0, len(text)))
    return text if cut is None else text[:cut] + draw(st.text(max_size=3))


def parsed_or_refused(text: str) -> None:
    """Any text is a service or one error that says where; and what is read can be written."""
    error = None
    try:
        spec = parse_service(text, file="x.toml", defaults=FLEET)
    except BadDefinition as caught:
        error = caught
    if error is None:
        assert parse_service(render_service(spec), file="x.toml", defaults=FLEET) == spec
        return
    assert str(error).startswith("x.toml")
    assert len(str(error).splitlines()) <= MISTAKES_SHOWN + 1
    assert 0 <= error.line <= text.count("\n") + 1
    assert len(str(error)) < 3000


@settings(max_examples=60)
@given(documents())
def test_any_document_is_a_service_or_one_error(text: str) -> None:
    parsed_or_refused(text)


@given(st.text(max_size=200))
def test_any_text_is_a_service_or_one_error(text: str) -> None:
    parsed_or_refused(text)


@given(st.data())
def test_a_definition_with_one_value_changed_is_a_service_or_one_error(data: st.DataObject) -> None:
    lines = PLATFORM.strip().splitlines()
    at = data.draw(st.sampled_from([i for i, line in enumerate(lines) if "=" in line]))
    key = lines[at].partition("=")[0]
    lines[at] = f"{key} = {toml(data.draw(values))}"
    parsed_or_refused("\n".join(lines))


@given(st.binary(max_size=100))
def test_any_bytes_are_text_or_one_error(data: bytes) -> None:
    try:
        assert decode(data, file="x.toml").encode() == data.removeprefix("\ufeff".encode())
    except BadDefinition as error:
        line = error.line
    else:
        line = 1
    assert 1 <= line <= data.count(b"\n") + 1


def test_a_key_is_told_briefly_and_in_one_line() -> None:
    error = refused_line('"a\\nb" = 1\n"\\u001b[2J" = 1\n' + "x" * 50_000 + " = 1")
    assert len(str(error)) < 1000
    assert "\x1b" not in str(error)
    assert len(str(error).splitlines()) == 3


def test_the_size_of_a_file_is_counted_in_bytes() -> None:
    assert "64 KiB" in str(refused("# " + "é" * (MAX_FILE_BYTES // 2)))
