"""Placement as rows: a fleet, a wish, the node it goes to or the reason an operator reads."""

from __future__ import annotations

import attrs
import pytest

from mcp.model import placement
from mcp.model.errors import NoNodeFits
from mcp.model.fleet import Fleet, Node
from mcp.model.messages import ImageFacts, NodeFacts, Resources, Role, ServiceRecord
from mcp.model.placement import GIB, MIB, Wish
from mcp.model.spec import ComponentSpec, ServiceSpec, spec_hash


def web(*, memory_bytes: int = 0, cpu_cores: float = 0.0, **more: object) -> ServiceSpec:
    """A service of one component."""
    component = ComponentSpec(name="web", image="web:1", memory_bytes=memory_bytes, cpu_cores=cpu_cores)
    return ServiceSpec(name="web", components=(component,), **more)  # type: ignore[arg-type]


def resources(*, free_bytes: int = 4 * GIB, memory_bytes: int = 8 * GIB, disk_free_bytes: int = 50 * GIB) -> Resources:
    """What a node has."""
    return Resources(
        cpu_cores=4.0,
        memory_bytes=memory_bytes,
        memory_free_bytes=free_bytes,
        disk_bytes=100 * GIB,
        disk_free_bytes=disk_free_bytes,
    )


def node(name: str, role: Role = "worker", *, arch: str = "amd64", containers: int = 0, **more: object) -> Node:
    """A healthy node."""
    facts = NodeFacts(
        incarnation="a", role=role, address="100.64.0.1", arch=arch, version="1", started_at="2026-01-01T00:00:00Z",
        engine="up", resources=resources(),
    )  # fmt: skip
    made = Node(
        name=name, role=role, health="healthy", facts=facts, resources=resources(), containers=containers,
        engine="none" if role == "edge" else "up",
    )  # fmt: skip
    for key, value in more.items():
        setattr(made, key, value)
    return made


def fleet(*nodes: Node) -> Fleet:
    """The platform's four nodes, any of them replaced."""
    usual = {
        n.name: n
        for n in (node("rift", "master"), node("orion"), node("hyperborea", arch="arm64"), node("svc", "edge"))
    }
    return Fleet(master="rift", nodes={**usual, **{n.name: n for n in nodes}})


def has(*platforms: str) -> dict[str, ImageFacts]:
    """An image for these platforms."""
    return {"web:1": ImageFacts(image="web:1", platforms=platforms)}


def chosen(wish: Wish, **images: dict[str, ImageFacts]) -> str:
    """Ask the candidates (both architectures unless said otherwise) and choose."""
    both = has("amd64", "arm64")
    return placement.choose(wish, {name: images.get(name, both) for name in placement.candidates(wish)})


def test_core_goes_to_the_masters_node() -> None:
    """Whatever it has to carry."""
    crowded = fleet(node("rift", "master", containers=50))
    assert chosen(Wish(spec=web(tier="core"), fleet=crowded)) == "rift"


def test_a_worker_service_goes_where_the_fewest_containers_are_and_ties_go_by_name() -> None:
    """hyperborea before orion when both are empty."""
    assert chosen(Wish(spec=web(), fleet=fleet())) == "hyperborea"
    assert chosen(Wish(spec=web(), fleet=fleet(node("hyperborea", containers=3)))) == "orion"


def test_a_pin_overrides_the_tier_and_the_operators_flag_overrides_the_pin() -> None:
    """`--node` > `node =` > tier."""
    assert chosen(Wish(spec=web(node="orion", tier="core"), fleet=fleet())) == "orion"
    assert chosen(Wish(spec=web(node="orion"), fleet=fleet(), node="rift")) == "rift"


def test_a_service_stays_where_it_is_while_that_node_fits() -> None:
    """A redeploy is no reason to move."""
    record = ServiceRecord(service="web", generation=1, spec=web(), spec_hash=spec_hash(web()), desired="running")
    here = node("orion", containers=9, services={"web": record})
    assert chosen(Wish(spec=web(), fleet=fleet(here))) == "orion"


def test_the_masters_node_takes_worker_services_only_in_a_fleet_without_workers() -> None:
    """A newcomer with one machine must be able to deploy."""
    alone = Fleet(master="rift", nodes={"rift": node("rift", "master")})
    assert chosen(Wish(spec=web(), fleet=alone)) == "rift"
    assert "rift" not in placement.candidates(Wish(spec=web(), fleet=fleet()))


REASONS = [
    (node("orion", health="unhealthy"), web(), "is unhealthy"),
    (node("orion", health="unreachable"), web(), "is unreachable"),
    (node("orion", health="unknown"), web(), "is unknown: not heard from yet"),
    (node("orion", health="engine-down"), web(), "engine-down: the container engine does not answer"),
    (node("orion", is_draining=True), web(), "is draining"),
    (
        node("orion", resources=resources(free_bytes=11 * GIB // 10)),
        web(memory_bytes=2 * GIB),
        "memory: needs 2.0 GiB, 1.1 GiB free",
    ),
    (node("orion", resources=resources(disk_free_bytes=100 * MIB)), web(), "disk: 100 MiB free, 512 MiB kept back"),
    (node("orion"), web(cpu_cores=6), "cpu: needs 6 cores, 4 of 4 left"),
]


@pytest.mark.parametrize(("orion", "spec", "reason"), REASONS)
def test_a_node_that_may_not_take_it_says_why(orion: Node, spec: ServiceSpec, reason: str) -> None:
    """One line per node, in the operator's words."""
    with pytest.raises(NoNodeFits) as caught:
        placement.candidates(Wish(spec=attrs.evolve(spec, node="orion"), fleet=fleet(orion)))
    assert caught.value.reasons["orion"] == reason


def test_reserved_memory_counts_even_while_it_is_free() -> None:
    """Two services of 5 GiB do not fit in 8, however idle the first one is."""
    other = ServiceRecord(
        service="db",
        generation=1,
        spec=attrs.evolve(web(memory_bytes=5 * GIB), name="db"),
        spec_hash="x",
        desired="running",
    )
    busy = node("orion", resources=resources(free_bytes=7 * GIB), services={"db": other})
    with pytest.raises(NoNodeFits, match=r"memory: needs 5.0 GiB, 3.0 GiB free"):
        placement.candidates(Wish(spec=web(memory_bytes=5 * GIB, node="orion"), fleet=fleet(busy)))


def test_an_image_without_the_nodes_architecture_is_not_placed_there() -> None:
    """hyperborea would be first by name, but is arm64."""
    assert chosen(Wish(spec=web(), fleet=fleet()), orion=has("amd64"), hyperborea=has("amd64")) == "orion"


def test_nobody_fitting_is_explained_node_by_node() -> None:
    """The text an operator sees when a deploy cannot be placed."""
    wish = Wish(spec=web(), fleet=fleet(node("orion", health="unhealthy")))
    with pytest.raises(NoNodeFits) as caught:
        chosen(wish, hyperborea=has("amd64"))
    assert str(caught.value).splitlines() == [
        "cannot place web: no node fits",
        "  hyperborea  web:1: image has no arm64 variant (has: amd64)",
        "  orion       is unhealthy",
        '  rift        is the master\'s node: takes tier = "core" and pinned services',
        "  svc         is an edge node and runs no containers",
    ]
    assert caught.value.hint


def test_a_pin_to_a_node_that_does_not_exist_names_those_that_do() -> None:
    """A typo is answered with the list."""
    with pytest.raises(NoNodeFits, match=r"no such node \(node = \"orino\"\); known: hyperborea, orion, rift, svc"):
        placement.candidates(Wish(spec=web(node="orino"), fleet=fleet()))


def test_an_edge_node_runs_no_containers_even_when_pinned() -> None:
    """Pinning to svc is refused with the reason."""
    with pytest.raises(NoNodeFits, match="is an edge node and runs no containers"):
        placement.candidates(Wish(spec=web(node="svc"), fleet=fleet()))
