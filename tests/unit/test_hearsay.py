"""What an agent says, within limits: lies and floods of words change at most its own rows."""

from __future__ import annotations

import attrs
import pytest

from mcp.model import hearsay
from mcp.model.fleet import Node
from mcp.model.messages import (
    Candidate,
    ContainerState,
    Heartbeat,
    Inventory,
    NodeFacts,
    OperationRecord,
    Resources,
    ServiceChanged,
    ServiceRecord,
)
from mcp.model.spec import ComponentSpec, ServiceSpec

HAVE = Resources(cpu_cores=1.0, memory_bytes=1, memory_free_bytes=1, disk_bytes=1, disk_free_bytes=1)
FACTS = NodeFacts(
    incarnation="first",
    role="worker",
    address="",
    arch="amd64",
    version="0",
    started_at="",
    engine="up",
    resources=HAVE,
)
SPEC = ServiceSpec(name="web", components=(ComponentSpec(name="web", image="web:1"),))
WEB = ServiceRecord(service="web", generation=1, spec=SPEC, spec_hash="x", desired="running")
CONTAINER = ContainerState(
    service="web", component="web", name="mcp.web.g1", image="web:1", state="running", spec_hash="x", generation=1
)


@pytest.mark.parametrize(
    "lie",
    [
        attrs.evolve(WEB, service="../../etc"),
        attrs.evolve(WEB, service="\x1b[31mred"),
        attrs.evolve(WEB, service="w" * 5000),
        attrs.evolve(WEB, generation=-1),
        attrs.evolve(WEB, generation=2**64 - 1),
        attrs.evolve(WEB, candidate=Candidate(op="a", generation=2**63, spec=SPEC, spec_hash="x")),
        attrs.evolve(WEB, containers=(attrs.evolve(CONTAINER, component="c" * 5000),)),
        attrs.evolve(WEB, containers=(attrs.evolve(CONTAINER, generation=2**63),)),
    ],
)
def test_a_record_that_cannot_be_true_is_left_out_and_told(lie: ServiceRecord) -> None:
    """The next generation of web must still be a number that travels."""
    good = attrs.evolve(WEB, service="good")
    heard = hearsay.inventory([Inventory(facts=FACTS, services=(lie, good))])
    assert list(heard.services) == ["good"]
    assert "1 services or containers that are not to be believed" in heard.problems[0]


def test_a_true_record_is_taken_in_as_it_is() -> None:
    """Limits cost an honest node nothing."""
    whole = attrs.evolve(WEB, containers=(CONTAINER,), problems=("one",))
    assert hearsay.record(whole) == whole
    assert hearsay.facts(FACTS) is FACTS


def test_long_words_are_cut() -> None:
    """One node's problems must not keep the whole status from fitting the bus."""
    node = Node(name="orion", role="worker")
    told = OperationRecord(
        op="a", service="web", kind="run", generation=1, outcome="failed", detail="d" * 9999, ended_at=""
    )
    inventory = Inventory(facts=attrs.evolve(FACTS, arch="a" * 9999), problems=("p" * 9999,) * 99, operations=(told,))
    assert node.take_inventory(inventory, 0.0)
    assert node.facts
    assert len(node.facts.arch) == hearsay.WORD_MOST
    assert len(node.problems) == 1
    beat = Heartbeat(
        incarnation="first", sequence=1, engine="up", resources=HAVE, containers=0, inventory_version=0, clock_s=0.0,
        problems=tuple(f"{i} {'p' * 9999}" for i in range(99)),
    )  # fmt: skip
    node.take_heartbeat(beat, 1.0, 1.0)
    assert len(node.problems) == hearsay.PROBLEMS_MOST
    node.take_engine("down", "r" * 99999)
    longest = max(map(len, (*node.problems, node.operations["a"].detail, node.engine_reason)))
    assert longest <= hearsay.TEXT_MOST + 3


def test_an_inventory_whose_parts_never_end_is_given_up() -> None:
    """It would fill the master's memory."""
    node = Node(name="orion", role="worker")
    kept = 0
    for part in range(1, 1000):
        assert not node.take_inventory(Inventory(facts=FACTS, part=part, parts=10**9), 0.0)
        kept = max(kept, len(node.parts))
    assert kept == hearsay.PARTS_MOST


def test_a_node_has_only_so_many_services() -> None:
    """Neither at once nor one after the other."""
    many = tuple(attrs.evolve(WEB, service=f"s{i}") for i in range(hearsay.SERVICES_MOST + 5))
    node = Node(name="orion", role="worker")
    node.take_inventory(Inventory(facts=FACTS, services=many), 0.0)
    assert len(node.services) == hearsay.SERVICES_MOST
    change = ServiceChanged(incarnation="first", inventory_version=1, record=attrs.evolve(WEB, service="more"))
    assert node.take_change(change)
    assert "more" not in node.services
