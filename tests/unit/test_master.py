"""The pure master: events in, effects out; a little world of agents answers its orders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import pytest

from mcp.model.catalogue import changed
from mcp.model.effects import (
    BusBack,
    CommandReceived,
    Effect,
    Expel,
    Invite,
    NodeDisconnected,
    NodeEnrolled,
    NodeForgotten,
    OpenStream,
    RegisterReceived,
    ReportReceived,
    Say,
    SendWork,
    Started,
    Tell,
    Tick,
    WorkEnded,
    WorkProgressed,
)
from mcp.model.master import Master, MasterRules
from mcp.model.messages import (
    Candidate,
    CommitWorkload,
    ContainerLog,
    ContainerState,
    DescribeImages,
    Done,
    DropWorkload,
    EngineChanged,
    Failed,
    Heartbeat,
    ImageFacts,
    ImagesDescribed,
    ImagesPulled,
    Inventory,
    NodeFacts,
    NodeLeaving,
    OperationRecord,
    Probe,
    ProbeAnswer,
    PullImages,
    Register,
    Registered,
    RemoveWorkload,
    Resources,
    Role,
    RunWorkload,
    ServiceChanged,
    ServiceRecord,
    StopWorkload,
    TakeInventory,
    WorkloadRunning,
)
from mcp.model.operator_messages import (
    DeployService,
    ExplainNode,
    FollowLogs,
    FollowOperation,
    GetStatus,
    InviteNode,
    ListOperations,
    NodeHealthChanged,
    OperationEnded,
    Plan,
    PlanService,
    RemoveNode,
    StopService,
    UndeployService,
)
from mcp.model.spec import ComponentSpec, ServiceSpec, spec_hash

GIB = 1024**3
HAVE = Resources(
    cpu_cores=4.0, memory_bytes=8 * GIB, memory_free_bytes=6 * GIB, disk_bytes=99 * GIB, disk_free_bytes=50 * GIB
)
ROLES: dict[str, Role] = {"rift": "master", "orion": "worker", "hyperborea": "worker", "svc": "edge"}


def web(image: str = "web:1", **more: Any) -> ServiceSpec:
    """A service of one component."""
    return ServiceSpec(name="web", components=(ComponentSpec(name="web", image=image),), **more)


def facts(node: str, incarnation: str = "first", started_at: str = "2026-01-01T00:00:00Z") -> NodeFacts:
    """What a node says of itself."""
    return NodeFacts(
        incarnation=incarnation,
        role=ROLES[node],
        address="100.64.0.2",
        arch="arm64" if node == "hyperborea" else "amd64",
        version="0.1",
        started_at=started_at,
        engine="none" if node == "svc" else "up",
        resources=HAVE,
    )


def container(spec: ServiceSpec, generation: int, state: Any = "running") -> ContainerState:
    """The container of a service's only component."""
    return ContainerState(
        service=spec.name,
        component=spec.components[0].name,
        name=f"mcp.{spec.name}.g{generation}",
        image=spec.components[0].image,
        state=state,
        spec_hash=spec_hash(spec),
        generation=generation,
    )


def record(spec: ServiceSpec, generation: int = 1, *, state: Any = "running", **more: Any) -> ServiceRecord:
    """A service as its node tells of it."""
    made = ServiceRecord(
        service=spec.name,
        generation=generation,
        spec=spec,
        spec_hash=spec_hash(spec),
        desired="running",
        containers=(container(spec, generation, state),) if generation else (),
    )
    return attrs.evolve(made, **more)


class World:
    """Four agents that do what they are told, a clock, and everything the master said."""

    def __init__(self, **rules: Any) -> None:
        self.master = Master(rules=MasterRules(node="rift", **rules), epoch=7)
        self.now_s = 1000.0
        self.version = 1
        self.services: dict[str, dict[str, ServiceRecord]] = {name: {} for name in ROLES}
        self.journal: dict[str, tuple[OperationRecord, ...]] = {}
        self.away: set[str] = set()
        self.stuck: set[str] = set()
        self.answers: dict[tuple[str, type], Callable[[Any], Any]] = {}
        self.held: list[SendWork] = []
        self.hold: set[type] = set()
        self.orders: list[tuple[str, Any]] = []
        self.said: dict[str, list[Say]] = {}
        self.told: list[Any] = []
        self.others: list[Effect] = []
        self._ids = 0
        self._askers = 0

    def new_id(self) -> str:
        """op1, op2..."""
        self._ids += 1
        return f"op{self._ids}"

    def feed(self, event: Any) -> None:
        """Give the master an event and play everything that follows."""
        for effect in self.master.handle(event, now_s=self.now_s, new_id=self.new_id):
            match effect:
                case Say():
                    self.said.setdefault(effect.asker, []).append(effect)
                case Tell():
                    self.told.append(effect.message)
                case SendWork():
                    self.orders.append((effect.node, effect.message))
                    if type(effect.message) in self.hold:
                        self.held.append(effect)
                    else:
                        self.answer(effect)
                case _:
                    self.others.append(effect)

    def answer(self, work: SendWork) -> None:
        """Answer an order as its node would."""
        if work.node in self.away:
            gone = Failed(code="nobody_listens", reason=f"nobody listens on {work.node}")
            self.feed(WorkEnded(call=work.call, failure=gone, certainty="nothing", is_nobody=True))
        elif work.node in self.stuck:
            self.feed(
                WorkEnded(call=work.call, failure=Failed(code="no_answer", reason="silence"), certainty="unknown")
            )
        else:
            special = self.answers.get((work.node, type(work.message)))
            reply = special(work.message) if special else self.obey(work.node, work.message)
            if isinstance(reply, Failed):
                self.feed(WorkEnded(call=work.call, failure=reply))
            else:
                self.feed(WorkEnded(call=work.call, reply=reply))

    def obey(self, node: str, order: Any) -> Any:
        """Do what is asked, as a well-behaved agent."""
        mine = self.services[node]
        match order:
            case TakeInventory():
                return self.inventory(node)
            case Probe():
                return ProbeAnswer(incarnation="first", engine=facts(node).engine, inventory_version=self.version)
            case DescribeImages():
                known = tuple(ImageFacts(image=i, platforms=("amd64", "arm64")) for i in order.images)
                return ImagesDescribed(images=known)
            case PullImages():
                return ImagesPulled()
            case RunWorkload():
                running = record(order.spec, order.generation)
                old = mine.get(order.service)
                candidate = Candidate(op="op1", generation=order.generation, spec=order.spec, spec_hash=order.spec_hash)
                mine[order.service] = attrs.evolve(old or attrs.evolve(running, generation=0), candidate=candidate)
                return WorkloadRunning(record=running)
            case CommitWorkload():
                mine[order.service] = record(mine[order.service].candidate.spec, order.generation)  # type: ignore[union-attr]
                self.changed(node, order.service)
                return Done()
            case RemoveWorkload():
                mine.pop(order.service, None)
                return Done()
            case _:
                return Done()

    def inventory(self, node: str, incarnation: str = "first", **more: Any) -> Inventory:
        """Everything a node knows."""
        return Inventory(
            facts=facts(node, incarnation, **more),
            services=tuple(self.services[node].values()),
            operations=self.journal.get(node, ()),
            version=self.version,
        )

    def changed(self, node: str, service: str) -> None:
        """A node tells of a change."""
        self.version += 1
        news = ServiceChanged(incarnation="first", inventory_version=self.version, record=self.services[node][service])
        for each in self.master.fleet.nodes.values():
            each.inventory_version = max(each.inventory_version, self.version - 1)
        self.feed(ReportReceived(node=node, message=news))

    def start(self) -> World:
        """Let the master take its census."""
        self.feed(Started(nodes=tuple(ROLES.items()), wall_s=1_800_000_000.0))
        return self

    def tick(self, seconds: float, *, beats: tuple[str, ...] = ()) -> None:
        """Let time pass; the named nodes beat first."""
        self.now_s += seconds
        for node in beats:
            self.beat(node)
        self.feed(Tick(wall_s=1_800_000_000.0 + self.now_s))

    def beat(self, node: str, incarnation: str = "first", **more: Any) -> None:
        """One heartbeat."""
        beat = Heartbeat(
            incarnation=incarnation, sequence=1, engine=facts(node).engine, resources=HAVE, containers=0,
            inventory_version=self.version, clock_s=1_800_000_000.0 + self.now_s - 1000.0,
        )  # fmt: skip
        self.feed(ReportReceived(node=node, message=changed(beat, **more)))

    def ask(self, message: Any, operator: str = "kyle") -> str:
        """An operator asks; returns the asker's key."""
        self._askers += 1
        key = f"{operator}#{self._askers}"
        self.feed(CommandReceived(asker=key, operator=operator, message=message))
        return key

    def end(self, asker: str) -> Any:
        """The last frame an asker got: its message."""
        return self.said[asker][-1].message

    def health(self, node: str) -> str:
        """What the master believes."""
        return self.master.fleet.nodes[node].health

    def kinds(self, *, but: tuple[type, ...] = (TakeInventory, Probe)) -> list[str]:
        """The orders so far, without the master's own questions."""
        return [f"{node}:{type(m).__name__}" for node, m in self.orders if not isinstance(m, but)]


@pytest.fixture
def world() -> World:
    """A fleet whose census is done."""
    return World().start()


# --------------------------------------------------------------------- census


def test_a_new_master_has_the_whole_view_from_its_agents() -> None:
    """Without any state of its own."""
    world = World()
    world.services["orion"]["web"] = record(web(), 4)
    world.start()
    status = world.end(world.ask(GetStatus()))
    assert not status.is_learning
    assert [(row.name, row.node, row.state, row.generation) for row in status.services] == [
        ("web", "orion", "running", 4)
    ]
    assert {row.name: row.health for row in status.nodes} == dict.fromkeys(ROLES, "healthy")


def test_a_master_that_is_still_learning_refuses_changes_and_says_whom_it_asks() -> None:
    """Never place on a half-known fleet."""
    world = World()
    world.hold = {TakeInventory}
    world.start()
    refusal = world.end(world.ask(DeployService(spec=web())))
    assert refusal.code == "still_learning"
    assert "orion" in refusal.reason
    assert world.end(world.ask(GetStatus())).is_learning


def test_a_node_that_nobody_hears_is_given_a_grace_to_reconnect() -> None:
    """After a common restart of bus and master, agents need a moment."""
    world = World()
    world.away = {"orion"}
    world.start()
    assert world.master.is_learning
    world.tick(0.5)
    world.away = set()
    world.tick(0.5)
    assert not world.master.is_learning
    assert world.health("orion") == "healthy"


def test_a_silent_node_does_not_hold_the_census_for_ever() -> None:
    """It is told as unreachable and the master gets to work."""
    world = World()
    world.away = {"orion"}
    world.start()
    for _ in range(12):
        world.tick(0.25)
    assert not world.master.is_learning
    assert world.health("orion") == "unreachable"


def test_one_service_on_two_nodes_is_a_conflict_that_is_shown_and_left_alone() -> None:
    """Silently resolving it could remove the wrong one."""
    world = World()
    world.services["orion"]["web"] = record(web(), 4)
    world.services["hyperborea"]["web"] = record(web(), 3)
    world.start()
    status = world.end(world.ask(GetStatus()))
    assert any("conflict: also on hyperborea (generation 3, here 4)" in p for p in status.problems)
    assert world.kinds() == []


# --------------------------------------------------------------------- health


def test_three_missed_heartbeats_cause_one_probe_and_the_probe_decides(world: World) -> None:
    """90 s of silence is a question, not an answer."""
    world.orders.clear()
    world.stuck = {"orion"}
    for _ in range(3):
        world.tick(30.0, beats=("rift", "hyperborea", "svc"))
    assert [node for node, m in world.orders if isinstance(m, Probe)] == ["orion"]
    assert world.health("orion") == "unhealthy"
    assert world.health("hyperborea") == "healthy"


def test_a_late_heartbeat_heals(world: World) -> None:
    """Whatever was believed before."""
    world.stuck = {"orion"}
    for _ in range(3):
        world.tick(30.0, beats=("rift", "hyperborea", "svc"))
    world.stuck = set()
    world.beat("orion")
    assert world.health("orion") == "healthy"
    told = [(m.was, m.health) for m in world.told if isinstance(m, NodeHealthChanged) and m.node == "orion"]
    assert told[-2:] == [("healthy", "unhealthy"), ("unhealthy", "healthy")]


def test_a_lost_connection_is_probed_at_once(world: World) -> None:
    """Shown within a second, not after 90."""
    world.away = {"orion"}
    world.feed(NodeDisconnected(node="orion"))
    assert world.health("orion") == "unreachable"
    evidence = world.end(world.ask(ExplainNode(node="orion"))).evidence
    assert [e.sign for e in evidence[:2]] == ["nobody", "quiet"]


def test_nobody_is_judged_in_the_first_moments_after_the_bus_came_back(world: World) -> None:
    """Everybody is nobody for up to a second then."""
    world.feed(BusBack())
    world.away = {"orion"}
    world.feed(NodeDisconnected(node="orion"))
    assert world.health("orion") == "healthy"
    world.tick(2.1, beats=("rift", "hyperborea", "svc"))
    assert world.health("orion") == "unreachable"


def test_an_agent_that_says_goodbye_is_unreachable_and_its_services_are_kept_in_view(world: World) -> None:
    """Control-plane trouble never stops a workload."""
    world.services["orion"]["web"] = record(web())
    world.changed("orion", "web")
    world.feed(ReportReceived(node="orion", message=NodeLeaving(incarnation="first")))
    status = world.end(world.ask(GetStatus()))
    assert [(row.name, row.state) for row in status.services] == [("web", "unknown")]
    assert world.kinds() == []


def test_the_newest_incarnation_wins_and_the_older_ones_words_are_ignored(world: World) -> None:
    """A late goodbye of the old agent does not take the new one down."""
    newer = Register(inventory=world.inventory("orion", "second", started_at="2026-01-01T01:00:00Z"))
    world.feed(RegisterReceived(asker="orion#1", node="orion", message=newer))
    assert isinstance(world.end("orion#1"), Registered)
    world.feed(ReportReceived(node="orion", message=NodeLeaving(incarnation="first")))
    assert world.health("orion") == "healthy"
    older = Register(inventory=world.inventory("orion", "third", started_at="2025-01-01T01:00:00Z"))
    world.feed(RegisterReceived(asker="orion#2", node="orion", message=older))
    assert world.end("orion#2").code == "stale_incarnation"


def test_a_second_live_agent_with_the_same_key_is_told(world: World) -> None:
    """A cloned disk or a stolen key."""
    world.beat("orion")
    world.beat("orion", "clone")
    assert any("a second agent uses its key" in p for p in world.end(world.ask(GetStatus())).problems)


def test_an_agent_in_a_crash_loop_is_refused_with_the_limit_named(world: World) -> None:
    """A registration storm must not drown the master."""
    for i in range(13):
        started = f"2026-01-01T01:00:{i:02d}Z"
        message = Register(inventory=world.inventory("orion", f"life{i}", started_at=started))
        world.feed(RegisterReceived(asker=f"orion#{i}", node="orion", message=message))
    assert isinstance(world.end("orion#11"), Registered)
    assert world.end("orion#12").code == "rate_limited"
    assert "at most 12 times a minute" in world.end("orion#12").reason


def test_a_clock_that_is_off_is_a_warning_only(world: World) -> None:
    """Deadlines do not depend on it."""
    world.beat("orion", clock_s=1_800_000_000.0 + 3600.0)
    status = world.end(world.ask(GetStatus()))
    assert any("its clock is off by +3600 s" in p for p in status.problems)
    assert world.health("orion") == "healthy"


def test_a_missed_change_makes_the_master_ask_for_the_inventory(world: World) -> None:
    """A heartbeat repeats the inventory's version."""
    world.orders.clear()
    world.services["orion"]["web"] = record(web())
    world.version += 5
    world.beat("orion")
    assert ("orion", TakeInventory()) in world.orders
    assert world.end(world.ask(GetStatus(service="web"))).services[0].node == "orion"


# -------------------------------------------------------------------- deploys


def test_a_deploy_is_placed_pulled_run_and_committed(world: World) -> None:
    """One line per step, in order."""
    asker = world.ask(DeployService(spec=web(node="orion")))
    assert world.kinds() == ["orion:DescribeImages", "orion:PullImages", "orion:RunWorkload", "orion:CommitWorkload"]
    end = world.end(asker)
    assert (end.outcome, end.node) == ("deployed", "orion")
    assert [step.step for step in end.steps] == ["place", "pull", "run", "retire"]
    assert world.said[asker][0].frame == "accepted"


def test_the_same_definition_again_is_unchanged_and_touches_nothing(world: World) -> None:
    """No order leaves the master."""
    world.ask(DeployService(spec=web(node="orion")))
    world.orders.clear()
    assert world.end(world.ask(DeployService(spec=web(node="orion")))).outcome == "unchanged"
    assert world.kinds() == []


def test_a_new_version_gets_the_next_generation_and_stays_on_its_node(world: World) -> None:
    """hyperborea would be the first choice for a new service."""
    world.ask(DeployService(spec=web(node="orion")))
    world.orders.clear()
    world.ask(DeployService(spec=web("web:2")))
    run = next(m for _, m in world.orders if isinstance(m, RunWorkload))
    assert run.generation == 2
    assert {kind.split(":")[0] for kind in world.kinds(but=(DescribeImages, Probe, TakeInventory))} == {"orion"}


def test_a_generation_is_above_everything_its_node_has_ever_accepted(world: World) -> None:
    """Even when the service was undeployed and the master restarted since."""
    world.answers["orion", PullImages] = lambda _: ImagesPulled(highest_generation=41)
    world.ask(DeployService(spec=web(node="orion")))
    assert next(m for _, m in world.orders if isinstance(m, RunWorkload)).generation == 42


def test_a_copy_that_never_gets_healthy_is_undone_and_its_last_lines_are_shown(world: World) -> None:
    """The old one still serves."""
    log = ContainerLog(component="web", container="mcp.web.g1", exit_code=1, lines=("fatal: no database",))
    world.answers["orion", RunWorkload] = lambda _: Failed(code="exited", reason="web exited with 1", logs=(log,))
    end = world.end(world.ask(DeployService(spec=web(node="orion"))))
    assert (end.outcome, end.logs, end.reason) == ("undone", (log,), "web exited with 1")
    assert world.kinds()[-1] == "orion:DropWorkload"


def test_an_undo_that_cannot_reach_its_node_is_told_and_done_when_it_returns(world: World) -> None:
    """Exit 5 now, no ghost later."""

    def die(_: Any) -> Any:
        world.away = {"orion"}
        return Failed(code="exited", reason="web exited with 1")

    world.answers["orion", RunWorkload] = die
    end = world.end(world.ask(DeployService(spec=web(node="orion"))))
    assert end.outcome == "unknown"
    assert "orion" in end.leftovers[0]
    world.feed(NodeDisconnected(node="orion"))
    world.orders.clear()
    world.away = set()
    world.beat("orion")
    assert ("orion", DropWorkload(service="web", generation=1)) in world.orders
    assert world.master.fleet.nodes["orion"].debts == []


def test_an_agent_lost_in_the_middle_is_asked_again_when_it_is_back(world: World) -> None:
    """A kill -9 of the agent costs a pause, not the deploy."""
    world.hold = {RunWorkload}
    asker = world.ask(DeployService(spec=web(node="orion")))
    lost = world.held.pop()
    world.feed(WorkEnded(call=lost.call, failure=Failed(code="no_answer", reason="silence"), certainty="unknown"))
    world.hold = set()
    again = Register(inventory=world.inventory("orion", "second", started_at="2026-01-01T01:00:00Z"))
    world.feed(RegisterReceived(asker="orion#1", node="orion", message=again))
    assert world.end(asker).outcome == "deployed"


def test_an_agent_that_was_started_anew_is_asked_at_once_for_what_its_predecessor_had_in_hand(world: World) -> None:
    """Without waiting for the silence of a process that is gone."""
    world.hold = {RunWorkload}
    asker = world.ask(DeployService(spec=web(node="orion")))
    world.hold = set()
    again = Register(inventory=world.inventory("orion", "second", started_at="2026-01-01T01:00:00Z"))
    world.feed(RegisterReceived(asker="orion#1", node="orion", message=again))
    assert world.end(asker).outcome == "deployed"


def test_an_answer_that_was_lost_with_the_bus_is_asked_for_when_the_node_beats_again(world: World) -> None:
    """Its health never changed, so nothing else would tell."""
    world.hold = {RunWorkload}
    asker = world.ask(DeployService(spec=web(node="orion")))
    lost = world.held.pop()
    world.feed(WorkEnded(call=lost.call, failure=Failed(code="no_answer", reason="lost"), certainty="unknown"))
    world.hold = set()
    world.beat("orion")
    assert world.end(asker).outcome == "deployed"


def test_an_operation_ends_when_its_node_is_removed_in_the_middle(world: World) -> None:
    """At once, and without a promise that anything is done by itself there."""
    world.hold = {RunWorkload}
    asker = world.ask(DeployService(spec=web(node="orion")))
    world.orders.clear()
    world.feed(NodeForgotten(node="orion"))
    end = world.end(asker)
    assert (end.outcome, end.code) == ("unknown", "node_removed")
    assert end.leftovers == ("finish the undo on orion: it was removed from the fleet",)
    assert world.kinds() == []


def test_placing_does_not_wait_for_a_node_that_is_silent(world: World) -> None:
    """Others may take the service."""
    world.stuck = {"hyperborea"}
    end = world.end(world.ask(DeployService(spec=web())))
    assert (end.outcome, end.node) == ("deployed", "orion")


def test_a_debt_that_one_node_pays_stays_due_on_another(world: World) -> None:
    """Two copies of one generation (a conflict) are two things to remove."""
    for name in ("orion", "hyperborea"):
        world.services[name]["web"] = record(web(), 3)
        world.changed(name, "web")
    world.away = {"orion", "hyperborea"}
    assert world.end(world.ask(UndeployService(service="web"))).outcome == "unknown"
    world.orders.clear()
    for name in ("orion", "hyperborea"):
        world.feed(NodeDisconnected(node=name))
    for name in ("orion", "hyperborea"):
        world.away -= {name}
        world.beat(name)
        assert (name, RemoveWorkload(service="web", generation=3)) in world.orders
        assert world.master.fleet.nodes[name].debts == []


def test_an_agent_whose_clock_was_set_back_while_it_was_down_is_let_in(world: World) -> None:
    """A machine without a battery for its clock starts in the past."""
    world.away = {"orion"}
    world.feed(NodeDisconnected(node="orion"))
    back = Register(inventory=world.inventory("orion", "second", started_at="1970-01-01T00:00:09Z"))
    world.feed(RegisterReceived(asker="orion#1", node="orion", message=back))
    assert isinstance(world.end("orion#1"), Registered)
    assert world.health("orion") == "healthy"


def test_a_part_of_the_inventory_of_a_removed_node_is_nobodys(world: World) -> None:
    """What comes late must not be a bug."""
    world.hold = {TakeInventory}
    world.beat("orion", inventory_version=99)
    (held,) = world.held
    world.feed(NodeForgotten(node="orion"))
    world.feed(WorkProgressed(call=held.call, message=world.inventory("orion")))
    assert "orion" not in world.master.fleet.nodes


def test_a_master_finishes_what_an_earlier_one_began() -> None:
    """The candidate in the inventory is all it needs."""
    world = World()
    new = web("web:2")
    candidate = Candidate(op="4f2c", generation=2, spec=new, spec_hash=spec_hash(new), ready=True)
    world.services["orion"]["web"] = record(web(), 1, candidate=candidate)
    world.start()
    assert world.kinds() == ["orion:RunWorkload", "orion:CommitWorkload"]
    end = world.end(world.ask(FollowOperation(op="4f2c")))
    assert (end.op, end.outcome) == ("4f2c", "deployed")


def test_a_master_undoes_what_an_earlier_one_began_when_it_does_not_work() -> None:
    """Old or new, whole: never half of each."""
    world = World()
    candidate = Candidate(op="4f2c", generation=2, spec=web("web:2"), spec_hash="x")
    world.services["orion"]["web"] = record(web(), 1, candidate=candidate)
    world.answers["orion", RunWorkload] = lambda _: Failed(code="unhealthy", reason="never answered")
    world.start()
    assert world.kinds() == ["orion:RunWorkload", "orion:DropWorkload"]


def test_a_service_has_one_operation_at_a_time_and_the_second_hears_who_holds_it(world: World) -> None:
    """The lock names its holder and its age."""
    world.hold = {PullImages}
    world.ask(DeployService(spec=web()), "alice")
    refusal = world.end(world.ask(StopService(service="web"), "kyle"))
    assert refusal.code == "busy"
    assert "operation op1 (deploy by alice) holds it since 2027-" in refusal.reason


def test_a_move_removes_the_old_copy_after_the_new_one_is_committed(world: World) -> None:
    """At no moment is there none."""
    world.ask(DeployService(spec=web(node="orion")))
    world.orders.clear()
    world.ask(DeployService(spec=web(node="rift")))
    kinds = world.kinds()
    assert kinds.index("rift:RunWorkload") < kinds.index("rift:CommitWorkload") < kinds.index("orion:RemoveWorkload")


def test_no_second_copy_is_started_only_because_the_first_ones_node_is_away(world: World) -> None:
    """The operator may insist with --node."""
    world.ask(DeployService(spec=web(node="orion")))
    world.away = {"orion"}
    world.feed(NodeDisconnected(node="orion"))
    end = world.end(world.ask(DeployService(spec=web("web:2"))))
    assert (end.outcome, end.code) == ("refused", "home_away")
    assert "--node OTHER" in end.hint
    moved = world.end(world.ask(DeployService(spec=web("web:2"), node="rift")))
    assert moved.outcome == "unknown"
    assert "remove the old copy on orion" in moved.leftovers[0]
    assert any("an older copy may still run on orion" in w for w in moved.warnings)


def test_a_service_whose_engine_is_down_is_neither_called_unchanged_nor_moved(world: World) -> None:
    """Nobody can see its container."""
    world.ask(DeployService(spec=web(node="orion")))
    world.feed(ReportReceived(node="orion", message=EngineChanged(incarnation="first", engine="down", reason="gone")))
    for spec in (web(), web("web:2")):
        end = world.end(world.ask(DeployService(spec=spec)))
        assert (end.outcome, end.code) == ("refused", "home_away")
        assert "orion, which is engine-down" in end.reason


def test_a_node_that_has_only_joined_is_told_to_be_started(world: World) -> None:
    """It is no failure that its agent was never heard."""
    world.feed(NodeEnrolled(node="fifth", role="worker"))
    world.away = {"fifth"}
    world.feed(NodeDisconnected(node="fifth"))
    (problem,) = world.end(world.ask(GetStatus())).problems
    assert problem == "fifth: is enrolled and has not been heard by this master; on fifth: `systemctl start mcp-agent`"


def test_operations_from_before_this_master_are_told_in_the_operators_words() -> None:
    """An agent's journal has orders; the operator knows deploys."""
    world = World()
    journal = [
        OperationRecord(
            op="4f2c", service="web", kind=kind, generation=2, outcome="done", ended_at=f"2026-01-01T00:00:0{i}Z"
        )
        for i, kind in ((2, "commit_workload"), (1, "run_workload"))
    ]
    world.journal["orion"] = tuple(journal)
    world.start()
    (row,) = world.end(world.ask(ListOperations())).operations
    assert (row.op, row.kind, row.outcome) == ("4f2c", "deploy", "deployed")


def test_an_image_that_exists_for_no_node_is_refused_with_every_reason(world: World) -> None:
    """Exit 3: nothing was done."""
    only = lambda m: ImagesDescribed(images=(ImageFacts(image="web:1", platforms=("riscv64",)),))  # noqa: E731
    world.answers["orion", DescribeImages] = world.answers["hyperborea", DescribeImages] = only
    end = world.end(world.ask(DeployService(spec=web())))
    assert end.outcome == "refused"
    assert "image has no arm64 variant (has: riscv64)" in end.reason


def test_undeploy_removes_every_copy(world: World) -> None:
    """And nothing is left to see."""
    world.ask(DeployService(spec=web(node="orion")))
    assert world.end(world.ask(UndeployService(service="web"))).outcome == "done"
    assert world.orders[-1] == ("orion", RemoveWorkload(service="web", generation=1))


def test_a_command_for_a_service_that_nobody_has_names_those_that_are(world: World) -> None:
    """A typo is answered with the list."""
    world.ask(DeployService(spec=web(node="orion")))
    end = world.end(world.ask(StopService(service="wbe")))
    assert (end.outcome, end.reason) == ("refused", "cannot stop wbe: it is not deployed (deployed: web)")


def test_stop_asks_the_node_that_has_it(world: World) -> None:
    """And only that one."""
    world.ask(DeployService(spec=web(node="orion")))
    world.ask(StopService(service="web"))
    assert world.orders[-1] == ("orion", StopWorkload(service="web", generation=1))


# ---------------------------------------------------------------------- plans


def test_a_plan_says_where_and_why_and_changes_nothing(world: World) -> None:
    """The fleet is as it was."""
    plan = world.end(world.ask(PlanService(spec=web())))
    assert isinstance(plan, Plan)
    assert (plan.changes, plan.node, plan.can_place) == (True, "hyperborea", True)
    assert [row.node for row in plan.placement if row.fits] == ["hyperborea", "orion"]
    assert set(world.kinds()) == {"orion:DescribeImages", "hyperborea:DescribeImages"}


def test_a_plan_for_what_runs_says_that_nothing_would_change(world: World) -> None:
    """Exit 0 of `mcp plan`."""
    world.ask(DeployService(spec=web()))
    assert not world.end(world.ask(PlanService(spec=web()))).changes


def test_a_deploy_of_a_plan_whose_world_has_changed_is_refused(world: World) -> None:
    """What was planned is what is done, or nothing."""
    plan = world.end(world.ask(PlanService(spec=web())))
    world.ask(DeployService(spec=web("web:2")))
    end = world.end(world.ask(DeployService(spec=web(), world=plan.world)))
    assert (end.outcome, end.code) == ("refused", "world_changed")


def test_a_plan_that_cannot_be_placed_explains_every_node(world: World) -> None:
    """Exit 3 of `mcp plan`."""
    plan = world.end(world.ask(PlanService(spec=web(node="svc"))))
    assert not plan.can_place
    assert "runs no containers" in plan.reason


# ------------------------------------------------------- nodes, logs, the rest


def test_a_node_with_services_is_not_removed_without_force(world: World) -> None:
    """They would go on unmanaged."""
    world.ask(DeployService(spec=web(node="orion")))
    assert world.end(world.ask(RemoveNode(node="orion"))).code == "has_services"
    world.ask(RemoveNode(node="orion", force=True))
    assert [e.node for e in world.others if isinstance(e, Expel)] == ["orion"]


def test_names_that_are_taken_illegal_or_too_many_are_not_invited() -> None:
    """Each with its own reason."""
    world = World(max_nodes=4).start()
    assert world.end(world.ask(InviteNode(node="orion"))).code == "name_taken"
    assert world.end(world.ask(InviteNode(node="No.Such"))).code == "bad_name"
    assert world.end(world.ask(InviteNode(node="fifth"))).code == "limit"
    assert not [e for e in world.others if isinstance(e, Invite)]


def test_logs_are_asked_of_every_node_that_has_the_service(world: World) -> None:
    """One instance today, but a conflict shows both."""
    world.ask(DeployService(spec=web(node="orion")))
    world.ask(FollowLogs(service="web", follow=True, tail=10))
    (stream,) = [e for e in world.others if isinstance(e, OpenStream)]
    assert [(node, order.service, order.tail) for node, order in stream.legs] == [("orion", "web", 10)]


def test_operations_are_listed_running_ones_first(world: World) -> None:
    """With their operators."""
    world.ask(DeployService(spec=web(node="orion")))
    world.hold = {PullImages}
    world.ask(DeployService(spec=web("web:2")), "alice")
    rows = world.end(world.ask(ListOperations())).operations
    assert [(row.op, row.state, row.operator) for row in rows] == [
        ("op2", "running", "alice"),
        ("op1", "ended", "kyle"),
    ]


def test_whoever_follows_an_operation_hears_that_it_lives_and_how_it_ends(world: World) -> None:
    """So that a CLI notices the loss of its master."""
    world.hold = {PullImages}
    world.ask(DeployService(spec=web()))
    follower = world.ask(FollowOperation(op="op1"))
    world.tick(1.5)
    assert world.said[follower][-1].frame == "progress"
    world.hold = set()
    world.answer(world.held.pop())
    assert isinstance(world.end(follower), OperationEnded)


def test_an_inventory_in_parts_counts_when_it_is_whole() -> None:
    """A node with many services does not fit in one message."""
    world = World()
    spec = web()
    for i in range(3):
        world.services["orion"][f"web{i}"] = attrs.evolve(record(spec), service=f"web{i}")
    world.start()
    whole = world.inventory("orion", "second", started_at="2026-01-01T01:00:00Z")
    for i, each in enumerate(whole.services):
        part = changed(whole, services=(each,), part=i + 1, parts=3)
        world.feed(RegisterReceived(asker="orion#1", node="orion", message=Register(inventory=part)))
    assert sorted(world.master.fleet.nodes["orion"].services) == ["web0", "web1", "web2"]
    assert world.master.fleet.nodes["orion"].incarnation == "second"
