"""The health table, pair by pair, and what a node's words do to the master's view of it."""

from __future__ import annotations

from itertools import product
from typing import get_args

from mcp.model.fleet import TRANSITIONS, Fleet, HealthRules, Node, Sign
from mcp.model.operator_messages import NodeHealth

AFTER = {
    Sign.ALIVE: "healthy",
    Sign.ENGINE_DOWN: "engine-down",
    Sign.NOBODY: "unreachable",
    Sign.NO_ANSWER: "unhealthy",
    Sign.LEFT: "unreachable",
}


def node(name: str = "orion", *, health: NodeHealth = "healthy", last_seen_s: float | None = 0.0) -> Node:
    """A worker that this master has heard of."""
    return Node(name=name, role="worker", health=health, last_seen_s=last_seen_s, inventory_at_s=last_seen_s)


def test_every_pair_of_health_and_sign_is_in_the_table() -> None:
    """No sign can surprise the master."""
    assert set(TRANSITIONS) == set(product(get_args(NodeHealth), Sign))


def test_a_sign_decides_and_silence_does_not() -> None:
    """Silence or a lost connection only asks for a probe: health stays what it was."""
    for (was, sign), now in TRANSITIONS.items():
        assert now == AFTER.get(sign, was), (was, sign)


def test_a_node_is_overdue_once_three_heartbeats_are_missed() -> None:
    """30 s times 3: at 89 s nothing, at 90 s it is asked for."""
    fleet = Fleet(master="rift", nodes={"orion": node()})
    assert fleet.overdue(89.9) == []
    assert [n.name for n in fleet.overdue(90.0)] == ["orion"]


def test_a_node_that_is_being_probed_is_not_overdue_again() -> None:
    """One probe at a time."""
    quiet = node()
    quiet.is_probed = True
    assert Fleet(master="rift", nodes={"orion": quiet}).overdue(500.0) == []


def test_the_silence_limit_follows_the_configured_interval() -> None:
    """All intervals are configuration."""
    assert HealthRules(heartbeat_s=0.5, missed=3).silence_limit_s == 1.5


def test_a_change_of_health_is_told_once_with_what_it_was() -> None:
    """The same sign twice is news only the first time."""
    orion = node()
    assert orion.feel(Sign.NOBODY, 7.0) == "healthy"
    assert orion.health_since_s == 7.0
    assert orion.feel(Sign.NOBODY, 8.0) is None
    assert orion.health_since_s == 7.0
    assert [(seen.sign, seen.times) for seen in orion.evidence] == [("nobody", 2)]


def test_a_master_that_loses_most_of_its_nodes_suspects_itself() -> None:
    """Three of four at once: the fault is probably here."""
    gone = {name: node(name, health="unreachable") for name in ("a", "b", "c")}
    assert Fleet(master="rift", nodes={"rift": node("rift"), **gone}).suspects_itself()
    assert not Fleet(
        master="rift", nodes={"rift": node("rift"), "a": gone["a"], "b": node("b"), "c": node("c")}
    ).suspects_itself()


def test_nodes_that_have_never_been_heard_are_no_mass_loss() -> None:
    """Three nodes that have just joined and were not started yet."""
    joined = {name: node(name, health="unreachable", last_seen_s=None) for name in ("a", "b", "c")}
    assert not Fleet(master="rift", nodes={"rift": node("rift"), **joined}).suspects_itself()


def test_an_hour_of_heartbeats_is_one_line_of_evidence() -> None:
    """What an operator looks for must not be pushed out by what is as it should be."""
    orion = node()
    orion.feel(Sign.QUIET, 1.0, "the bus lost its connection")
    for i in range(120):
        orion.feel(Sign.ALIVE, 30.0 * i, "heartbeat")
    assert [(seen.sign, seen.times) for seen in orion.evidence] == [("quiet", 1), ("alive", 120)]
