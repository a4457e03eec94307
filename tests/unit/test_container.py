"""What an engine is asked for, and what labels say of a container whose agent has forgotten it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.bus.codec import from_plain, to_plain
from mcp.model.container import (
    COMPONENT_LABEL,
    GENERATION_LABEL,
    HASH_LABEL,
    OWNER,
    OWNER_LABEL,
    PORTS_LABEL,
    SERVICE_LABEL,
    SPEC_LABEL,
    ContainerDefaults,
    container_request,
    read_labels,
)
from mcp.model.definition import SET_BY_THE_AGENT
from mcp.model.names import port_variable
from mcp.model.ports import ContainerRequest, PortBinding
from mcp.model.spec import FixedPort, ServiceSpec, VolumeSpec, spec_hash
from tests.builders import component, route, service

ORION = ContainerDefaults(node="orion")


def request(spec: ServiceSpec | None = None, *, ports: dict[str, int] | None = None, **more: Any) -> ContainerRequest:
    """Ask for the first component of a service, as orion does."""
    spec = spec or service()
    usual: dict[str, Any] = {"generation": 3, "op": "op-1", "defaults": ORION, "spec_json": json.dumps(to_plain(spec))}
    return container_request(spec, spec.components[0], ports=ports or {}, **{**usual, **more})


def test_a_containers_name_is_made_of_service_component_and_generation() -> None:
    assert request().name == "mcp.web.g3"
    assert request(service("notes", "", component("db"))).name == "mcp.notes.db.g3"


def test_what_the_component_says_is_asked_for_as_it_is() -> None:
    spec = service(
        cmd=("a", "b"), user="1:1", restart="always", memory_bytes=5, cpu_cores=0.5, stop_grace_s=7.0, network="other",
        volumes=(VolumeSpec(host_path="/a", container_path="/b"), VolumeSpec(host_path="/c", container_path="/d", read_only=True)),
    )  # fmt: skip
    asked = request(spec)
    assert (asked.image, asked.cmd, asked.user, asked.restart) == ("web:v1", ("a", "b"), "1:1", "always")
    assert (asked.memory_bytes, asked.cpu_cores, asked.stop_grace_s, asked.network) == (5, 0.5, 7.0, "other")
    assert asked.binds == ("/a:/b", "/c:/d:ro")


def test_what_the_component_leaves_open_is_as_the_node_says() -> None:
    node = ContainerDefaults(node="orion", network="mesh", publish_address="100.64.0.2")
    asked = request(service(ports=(FixedPort(host_port=80, container_port=8080),)), ports={"": 10_001}, defaults=node)
    assert asked.network == "mesh"
    assert {binding.address for binding in asked.ports} == {"100.64.0.2"}


# ------------------------------------------------------------------------ ports


@pytest.mark.parametrize(
    ("name", "variable"),
    [("", "PORT"), ("public", "PORT_PUBLIC"), ("my-api-2", "PORT_MY_API_2"), ("port", "PORT_PORT")],
)
def test_the_variable_of_a_route(name: str, variable: str) -> None:
    assert port_variable(name) == variable


@pytest.mark.parametrize(
    ("ports", "env"),
    [
        ({}, {}),
        ({"": 10_001}, {"PORT": "10001"}),
        ({"public": 10_001}, {"PORT": "10001", "PORT_PUBLIC": "10001"}),
        ({"a-b": 10_001, "c": 10_002}, {"PORT_A_B": "10001", "PORT_C": "10002"}),
        ({"": 10_001, "c": 10_002}, {"PORT": "10001", "PORT_C": "10002"}),
    ],
)
def test_a_container_is_told_the_port_of_each_route(ports: dict[str, int], env: dict[str, str]) -> None:
    told = request(ports=ports).env
    assert {name: value for name, value in told.items() if name.startswith("PORT")} == env


def test_a_container_listens_on_the_number_that_the_host_publishes() -> None:
    asked = request(ports={"a": 10_001, "b": 10_002})
    assert asked.ports == tuple(
        PortBinding(address="127.0.0.1", host_port=p, container_port=p) for p in (10_001, 10_002)
    )


def test_a_fixed_port_is_published_where_it_says() -> None:
    fixed = (
        FixedPort(address="0.0.0.0", host_port=53, container_port=5353, protocol="udp"),
        FixedPort(address="[::1]", host_port=80, container_port=8080),
    )
    assert request(service(ports=fixed)).ports == (
        PortBinding(address="0.0.0.0", host_port=53, container_port=5353, protocol="udp"),
        PortBinding(address="::1", host_port=80, container_port=8080),
    )


def test_in_the_hosts_own_network_nothing_is_published_and_the_port_is_told_all_the_same() -> None:
    asked = request(service(network="host"), ports={"": 10_001})
    assert asked.ports == ()
    assert asked.env["PORT"] == "10001"


# ------------------------------------------------------------------ environment


def test_a_container_is_told_where_it_is() -> None:
    env = request(service("notes", "", component("db"))).env
    assert {name: env[name] for name in SET_BY_THE_AGENT} == {
        "MCP_SERVICE": "notes",
        "MCP_COMPONENT": "db",
        "MCP_NODE": "orion",
    }


def test_a_definition_cannot_claim_another_node_or_port() -> None:
    env = request(service(env={"MCP_NODE": "moon", "PORT": "1", "OWN": "x"}), ports={"": 10_001}).env
    assert (env["MCP_NODE"], env["PORT"], env["OWN"]) == ("orion", "10001", "x")


# ----------------------------------------------------------------------- labels


def test_labels_say_all_that_an_agent_may_have_forgotten() -> None:
    spec = service(routes=(route("public", hostname="web.example.net", public=True),), env={"A": "ü\n"})
    told = read_labels(request(spec, ports={"public": 10_001}).labels)
    assert told is not None
    assert (told.service, told.component, told.generation, told.op) == ("web", "web", 3, "op-1")
    assert told.spec_hash == spec_hash(spec)
    assert told.ports == {"public": "127.0.0.1:10001"}
    assert from_plain(ServiceSpec, json.loads(told.spec_json)) == spec


OURS = request(ports={"": 10_001}).labels


@pytest.mark.parametrize(
    "change",
    [
        {OWNER_LABEL: "somebody"},
        {OWNER_LABEL: None},
        {SERVICE_LABEL: "../etc"},
        {SERVICE_LABEL: None},
        {COMPONENT_LABEL: "A"},
        {COMPONENT_LABEL: 5},
        {GENERATION_LABEL: ""},
        {GENERATION_LABEL: "-1"},
        {GENERATION_LABEL: "1.0"},
        {GENERATION_LABEL: "٣"},
        {GENERATION_LABEL: "9" * 12},
        {GENERATION_LABEL: "1\n"},
    ],
)
def test_labels_that_make_no_sense_are_nobodys(change: dict[str, Any]) -> None:
    assert read_labels({**OURS, **change}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[" * 100_000,
        "[]",
        "3",
        '{"": 5}',
        '{"": "x"}',
        '{"": "1.2.3.4"}',
        '{"": "host:80"}',
        '{"": "::1:"}',
        "NaN",
    ],
)
def test_ports_that_make_no_sense_are_no_ports(text: str) -> None:
    told = read_labels({**OURS, PORTS_LABEL: text})
    assert told is not None
    assert told.ports == {}


def test_hashes_and_operations_of_any_length_are_cut() -> None:
    told = read_labels({**OURS, HASH_LABEL: "x" * 10_000})
    assert told is not None
    assert len(told.spec_hash) == 64


_rubbish = (
    st.text(max_size=10)
    | st.sampled_from([OWNER, "web", "1", "{}", '{"": "127.0.0.1:80"}'])
    | st.none()
    | st.integers()
)


@given(st.dictionaries(st.sampled_from([*OURS, "other"]), _rubbish), st.sets(st.sampled_from(sorted(OURS))))
def test_any_labels_are_ours_or_nobodys(change: dict[str, Any], gone: set[str]) -> None:
    labels = {name: value for name, value in {**OURS, **change}.items() if name not in gone}
    told = read_labels(labels)
    assert told is None or (told.generation >= 0 and labels[OWNER_LABEL] == OWNER)
    assert told is None or told.spec_json == (labels.get(SPEC_LABEL) if isinstance(labels.get(SPEC_LABEL), str) else "")
