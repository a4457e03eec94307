"""What an agent decides about a service: orders taken or refused, what is to be done from every state, how drift is told."""

from __future__ import annotations

from typing import Any

import attrs
import pytest

from mcp.model import workload
from mcp.model.errors import Refused
from mcp.model.messages import (
    CommitWorkload,
    ContainerState,
    DropWorkload,
    RunWorkload,
    StartWorkload,
    StopWorkload,
)
from mcp.model.names import container_name
from mcp.model.ports import Intent
from mcp.model.spec import ComponentSpec, FixedPort, HealthSpec, RouteSpec, ServiceSpec, spec_hash
from mcp.model.workload import Await, Discard, Halt, Known, Launch, Make, converge


def spec(*components: str, **more: Any) -> ServiceSpec:
    """A service "web" of components that take 7 s to stop."""
    parts = tuple(
        ComponentSpec(name=name, image=f"{name}:1", stop_grace_s=7.0, **more) for name in components or ("web",)
    )
    return ServiceSpec(name="web", components=parts)


def intent(generation: int, of: ServiceSpec | None = None, **more: Any) -> Intent:
    """An accepted generation, healthy unless told otherwise."""
    made = of or spec()
    facts: dict[str, Any] = {"op": f"op{generation}", "desired": "running", "ready": True, **more}
    return Intent(service="web", generation=generation, spec=made, spec_hash=spec_hash(made), **facts)


def candidate(generation: int, of: ServiceSpec | None = None, **more: Any) -> Intent:
    """A generation that is not the service's own yet."""
    return intent(generation, of, is_candidate=True, **more)


def container(generation: int, component: str = "web", state: Any = "running", **more: Any) -> ContainerState:
    """A container of the service."""
    facts = {
        "service": "web", "component": component, "name": container_name("web", component, generation),
        "image": f"{component}:1", "state": state, "spec_hash": spec_hash(spec()), "generation": generation,
    }  # fmt: skip
    return ContainerState(**{**facts, **more})


def known(
    committed: Intent | None = None, new: Intent | None = None, *containers: ContainerState, highest: int = 0
) -> Known:
    """What an agent knows."""
    newest = max([highest, *(i.generation for i in (committed, new) if i)])
    return Known(service="web", committed=committed, candidate=new, containers=containers, highest=newest)


def shown(actions: list[workload.Action]) -> list[str]:
    """Actions in short: "make web.g2", "halt web.g1 7"."""
    texts = []
    for action in actions:
        match action:
            case Make(component, generation) | Launch(component, generation) | Await(component, generation):
                name = container_name("web", component.name, generation)
                texts.append(f"{type(action).__name__.lower()} {workload.short(name)}")
            case Halt(name, grace_s):
                texts.append(f"halt {workload.short(name)} {grace_s:g}")
            case Discard(name):
                texts.append(f"discard {workload.short(name)}")
    return texts


# -------------------------------------------------------------------- converging

TWO = spec("db", "app")
STOPS_FIRST = attrs.evolve(spec(), components=(attrs.evolve(spec().components[0], update="stop-first"),))
FIXED = attrs.evolve(
    spec(), components=(attrs.evolve(spec().components[0], ports=(FixedPort(host_port=80, container_port=80),)),)
)
ASLEEP = attrs.evolve(spec(), active=False)
JOB = spec(restart="no")
TRIES = spec(restart="on-failure:3")

ROWS: list[tuple[str, Known, str, int, list[str]]] = [
    # what is, the goal, its generation, what is to be done
    ("run: nothing is there", known(None, candidate(1, ready=False)), "run", 1, ["make web.g1", "launch web.g1", "await web.g1"]),
    ("run: created, the answer was lost", known(None, candidate(1), container(1, state="created")), "run", 1, ["launch web.g1", "await web.g1"]),
    ("run: it runs already", known(None, candidate(1), container(1)), "run", 1, ["await web.g1"]),
    ("run: it has exited", known(None, candidate(1), container(1, state="exited")), "run", 1, ["launch web.g1", "await web.g1"]),
    ("run: dead ones do not start", known(None, candidate(1), container(1, state="dead")), "run", 1,
     ["discard web.g1", "make web.g1", "launch web.g1", "await web.g1"]),
    ("run: beside the old one", known(intent(1), candidate(2), container(1)), "run", 2, ["make web.g2", "launch web.g2", "await web.g2"]),
    ("run: components in order", known(None, candidate(1, TWO)), "run", 1,
     ["make web.db.g1", "launch web.db.g1", "await web.db.g1", "make web.app.g1", "launch web.app.g1", "await web.app.g1"]),
    ("run: half of the components is there", known(None, candidate(1, TWO), container(1, "db")), "run", 1,
     ["await web.db.g1", "make web.app.g1", "launch web.app.g1", "await web.app.g1"]),
    ("run: stop-first makes, then stops, then starts", known(intent(1), candidate(2, STOPS_FIRST), container(1)), "run", 2,
     ["make web.g2", "halt web.g1 7", "launch web.g2", "await web.g2"]),
    ("run: a fixed port is stop-first too", known(intent(1, FIXED), candidate(2, FIXED), container(1)), "run", 2,
     ["make web.g2", "halt web.g1 7", "launch web.g2", "await web.g2"]),
    ("run: the old one is stopped already", known(intent(1), candidate(2, STOPS_FIRST), container(1, state="exited"), container(2, state="created")),
     "run", 2, ["launch web.g2", "await web.g2"]),
    ("run: inactive is made and not started", known(None, candidate(1, ASLEEP)), "run", 1, ["make web.g1"]),
    ("run: inactive and made", known(None, candidate(1, ASLEEP), container(1, state="created")), "run", 1, []),
    ("run: not accepted", known(intent(1), None, container(1)), "run", 2, []),
    ("retire: the old copy goes", known(intent(2), None, container(1), container(2)), "retire", 0, ["halt web.g1 7", "discard web.g1"]),
    ("retire: stopped ones need no stop", known(intent(2), None, container(1, state="exited"), container(2)), "retire", 0, ["discard web.g1"]),
    ("retire: last started, first stopped", known(intent(2, TWO), None, container(1, "db"), container(1, "app"), container(2, "db")), "retire", 0,
     ["halt web.app.g1 7", "discard web.app.g1", "halt web.db.g1 7", "discard web.db.g1"]),
    ("retire: all of the past goes", known(intent(5), None, container(1, state="exited"), container(3, state="exited")), "retire", 0,
     ["discard web.g1", "discard web.g3"]),
    ("retire: a candidate stays", known(intent(2), candidate(3), container(2), container(3)), "retire", 0, []),
    ("retire: nothing committed", known(None, candidate(3), container(2)), "retire", 0, []),
    ("retire: nothing left", known(intent(2), None, container(2)), "retire", 0, []),
    ("drop: the candidate goes, quickly when unproven", known(intent(1), candidate(2, ready=False), container(1), container(2)), "drop", 2,
     ["halt web.g2 2", "discard web.g2"]),
    ("drop: a proven one may take its time", known(intent(1), candidate(2), container(1), container(2)), "drop", 2, ["halt web.g2 7", "discard web.g2"]),
    ("drop: nothing was done", known(intent(1), None, container(1)), "drop", 2, []),
    ("resume: what was stopped for a candidate", known(intent(1, FIXED), None, container(1, state="exited")), "resume", 0, ["launch web.g1"]),
    ("resume: it was never stopped", known(intent(1), None, container(1)), "resume", 0, []),
    ("resume: it shall be stopped", known(intent(1, desired="stopped"), None, container(1, state="exited")), "resume", 0, []),
    ("resume: another candidate has its port", known(intent(1), candidate(3, FIXED), container(1, state="exited")), "resume", 0, []),
    ("resume: a missing one is no part of an undo", known(intent(1), None), "resume", 0, []),
    ("remove: everything up to the generation", known(intent(1), candidate(2), container(1), container(2, state="created")), "remove", 2,
     ["halt web.g1 7", "discard web.g1", "discard web.g2"]),
    ("remove: nothing newer", known(intent(2), None, container(1, state="exited"), container(2)), "remove", 1, ["discard web.g1"]),
    ("remove: what no intent names", known(None, None, container(7)), "remove", 7, ["halt web.g7 10", "discard web.g7"]),
    ("stop: what runs, last first", known(intent(1, TWO), None, container(1, "db"), container(1, "app")), "stop", 0,
     ["halt web.app.g1 7", "halt web.db.g1 7"]),
    ("stop: stopped already", known(intent(1), None, container(1, state="exited")), "stop", 0, []),
    ("start: stopped", known(intent(1), None, container(1, state="exited")), "start", 0, ["launch web.g1", "await web.g1"]),
    ("start: missing", known(intent(1), None), "start", 0, ["make web.g1", "launch web.g1", "await web.g1"]),
    ("restart: one after the other", known(intent(1, TWO), None, container(1, "db"), container(1, "app")), "restart", 0,
     ["halt web.db.g1 7", "launch web.db.g1", "await web.db.g1", "halt web.app.g1 7", "launch web.app.g1", "await web.app.g1"]),
    ("restart: a missing one is made", known(intent(1), None), "restart", 0, ["make web.g1", "launch web.g1", "await web.g1"]),
    ("settle: it runs, it is not touched", known(intent(1), None, container(1)), "settle", 0, []),
    ("settle: the power was cut", known(intent(1), None, container(1, state="exited", exit_code=255)), "settle", 0, ["launch web.g1"]),
    ("settle: it never started", known(intent(1), None, container(1, state="created")), "settle", 0, ["launch web.g1"]),
    ("settle: it is missing", known(intent(1), None), "settle", 0, ["make web.g1", "launch web.g1"]),
    ("settle: the engine restarts it itself", known(intent(1), None, container(1, state="restarting")), "settle", 0, []),
    ("settle: it shall be stopped", known(intent(1, desired="stopped"), None, container(1, state="exited")), "settle", 0, []),
    ("settle: stopped with the service, and missing", known(intent(1, desired="stopped"), None), "settle", 0, []),
    ("settle: somebody has paused it", known(intent(1), None, container(1, state="paused")), "settle", 0, []),
    ("settle: a commit that was cut is finished", known(intent(2), None, container(1), container(2)), "settle", 0, ["halt web.g1 7", "discard web.g1"]),
    ("settle: a candidate is the master's", known(intent(1), candidate(2), container(1), container(2, state="created")), "settle", 0, []),
    ("settle: the old one comes back beside a candidate", known(intent(1), candidate(2), container(1, state="exited")), "settle", 0, ["launch web.g1"]),
    ("settle: a stop-first candidate has its place", known(intent(1), candidate(2, FIXED), container(1, state="exited")), "settle", 0, []),
    ("settle: only a candidate", known(None, candidate(1), container(1, state="exited")), "settle", 0, []),
    ("settle: a job that is done stays so", known(intent(1, JOB), None, container(1, state="exited")), "settle", 0, []),
    ("settle: a job that failed stays so", known(intent(1, JOB), None, container(1, state="exited", exit_code=1)), "settle", 0, []),
    ("settle: a job that lost its machine", known(intent(1, JOB), None, container(1, state="exited", exit_code=255)), "settle", 0, ["launch web.g1"]),
    ("settle: on-failure, and it failed", known(intent(1, TRIES), None, container(1, state="exited", exit_code=1)), "settle", 0, ["launch web.g1"]),
    ("settle: on-failure, and it did not", known(intent(1, TRIES), None, container(1, state="exited")), "settle", 0, []),
]  # fmt: skip


@pytest.mark.parametrize(
    ("have", "goal", "generation", "expected"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
def test_what_is_to_be_done(have: Known, goal: Any, generation: int, expected: list[str]) -> None:
    assert shown(converge(have, goal, generation)) == expected


def test_after_the_engines_return_only_its_victims_come_back() -> None:
    have = known(intent(1, TWO), None, container(1, "db", "exited"), container(1, "app", "exited"))
    assert shown(converge(have, "settle", only={"mcp.web.db.g1"})) == ["launch web.db.g1"]


def test_a_victim_comes_back_whatever_its_restart_policy() -> None:
    have = known(intent(1, JOB), None, container(1, state="exited"))
    assert shown(converge(have, "settle", only={"mcp.web.g1"})) == ["launch web.g1"]


def after(have: Known, actions: list[workload.Action]) -> Known:
    """Carry actions out on what is known, as an engine that always obeys."""
    for action in actions:
        there = {c.name: c for c in have.containers}
        match action:
            case Make(component, generation):
                made = container(generation, component.name, "created")
                there.setdefault(made.name, made)
            case Launch(component, generation):
                name = container_name("web", component.name, generation)
                there[name] = attrs.evolve(there[name], state="running")
            case Halt(name, _):
                there[name] = attrs.evolve(there[name], state="exited")
            case Discard(name):
                del there[name]
        have = attrs.evolve(have, containers=tuple(there.values()))
    return have


STATES = [row for row in ROWS if row[2] != "restart"]
"""The goal of a restart is no state: restarting twice restarts twice."""


@pytest.mark.parametrize(("have", "goal", "generation"), [row[1:4] for row in STATES], ids=[row[0] for row in STATES])
def test_cut_anywhere_and_begun_again_it_ends_the_same(have: Known, goal: Any, generation: int) -> None:
    actions = converge(have, goal, generation)
    end = after(have, actions)
    assert [a for a in converge(end, goal, generation) if not isinstance(a, Await)] == []
    for cut in range(len(actions)):
        half = after(have, actions[:cut])
        again = after(half, converge(half, goal, generation))
        assert {(c.name, c.state) for c in again.containers} == {(c.name, c.state) for c in end.containers}


@pytest.mark.parametrize(("have", "goal", "generation"), [row[1:4] for row in ROWS], ids=[row[0] for row in ROWS])
def test_no_component_ever_has_two_copies_of_one_generation(have: Known, goal: Any, generation: int) -> None:
    names = [c.name for c in after(have, converge(have, goal, generation)).containers]
    assert len(names) == len(set(names))


# ------------------------------------------------------------------------ orders


def run(generation: int, of: ServiceSpec | None = None, **more: Any) -> RunWorkload:
    """An order to run a generation."""
    made = of or spec()
    return RunWorkload(
        **{"service": "web", "generation": generation, "spec": made, "spec_hash": spec_hash(made), **more}
    )


def refusal(check: Any, *arguments: Any) -> str:
    """Return the code with which an order is refused."""
    with pytest.raises(Refused) as caught:
        check(*arguments, "orion")
    return caught.value.code


def test_a_newer_generation_is_new() -> None:
    assert workload.check_run(known(intent(3), None, highest=3), run(4), "orion") is True


def test_the_same_generation_is_asked_again() -> None:
    assert workload.check_run(known(None, candidate(4)), run(4), "orion") is False
    assert workload.check_run(known(intent(4)), run(4), "orion") is False


@pytest.mark.parametrize(
    ("have", "order"),
    [
        (known(intent(3)), run(2)),
        (known(intent(3), candidate(4)), run(3, spec("other"))),
        (known(None, candidate(4)), run(4, spec("other"))),
        (known(highest=9), run(9)),
        (known(highest=9), run(8)),
    ],
    ids=["older", "older than a candidate", "another definition", "dropped before", "older than what was removed"],
)
def test_a_run_that_comes_too_late_is_refused(have: Known, order: RunWorkload) -> None:
    assert refusal(workload.check_run, have, order) == "stale_generation"


@pytest.mark.parametrize("name", ["../../etc", "Web", "", "a" * 41, "web.db", "web\n"])
def test_a_name_that_is_not_legal_is_refused_wherever_it_stands(name: str) -> None:
    assert refusal(workload.check_run, known(), run(1, spec(name))) == "bad_name"
    assert refusal(workload.check_run, known(), run(1, service=name)) == "bad_name"


def test_a_definition_of_another_service_is_refused() -> None:
    assert refusal(workload.check_run, known(), run(1, service="api")) == "bad_name"


def test_what_may_be_committed() -> None:
    order = CommitWorkload(service="web", generation=4)
    assert workload.check_commit(known(intent(3), candidate(4)), order, "orion") is True
    assert workload.check_commit(known(intent(4)), order, "orion") is False
    assert refusal(workload.check_commit, known(intent(3), candidate(4, ready=False)), order) == "not_ready"
    assert refusal(workload.check_commit, known(intent(3)), order) == "not_here"
    assert refusal(workload.check_commit, known(intent(5)), order) == "stale_generation"


def test_what_may_be_stopped() -> None:
    order = StopWorkload(service="web", generation=4)
    assert workload.check_committed(known(intent(4)), order, "orion").generation == 4
    assert refusal(workload.check_committed, known(None, candidate(4)), order) == "not_here"
    assert refusal(workload.check_committed, known(intent(5)), order) == "stale_generation"
    assert refusal(workload.check_committed, known(), StartWorkload(service="web", generation=1)) == "not_here"


def test_the_services_own_generation_cannot_be_dropped() -> None:
    assert refusal(workload.check_drop, known(intent(4)), DropWorkload(service="web", generation=4)) == "committed"
    workload.check_drop(known(intent(4)), DropWorkload(service="web", generation=5), "orion")


# ------------------------------------------------------------------- how it is told


def test_a_service_is_told_with_its_candidate() -> None:
    told = workload.record_of(known(intent(1), candidate(2, ready=False), container(1)))
    assert told is not None
    assert (told.generation, told.op, told.desired) == (1, "op1", "running")
    assert told.candidate is not None
    assert (told.candidate.generation, told.candidate.op, told.candidate.ready) == (2, "op2", False)


def test_with_only_a_candidate_the_generation_is_nought() -> None:
    told = workload.record_of(known(None, candidate(2)))
    assert told is not None
    assert (told.generation, told.op) == (0, "op2")
    assert told.candidate is not None


def test_nothing_accepted_is_nothing_told() -> None:
    assert workload.record_of(known(None, None, container(1))) is None


@pytest.mark.parametrize(
    ("own", "state", "expected"),
    [
        (intent(3), container(3), ""),
        (intent(3), container(3, state="exited", exit_code=137), "stopped outside at 12:03:04Z (exit code 137); `mcp start web` starts it"),
        (intent(3), container(3, state="exited", out_of_memory=True), "ran out of memory at 12:03:04Z and is down; raise `memory`, then `mcp start web` starts it"),
        (intent(3), container(3, state="paused"), "paused outside at 12:03:04Z; `docker unpause` on the node wakes it"),
        (intent(3), container(3, state="restarting", exit_code=1, restarts=4),
         "restarts again and again (exit code 1, 4 times); `mcp logs web` may say why"),
        (intent(3, JOB), container(3, state="exited", exit_code=2), "ended at 12:03:04Z with exit code 2; `mcp logs web`, then `mcp start web` starts it"),
        (intent(3, JOB), container(3, state="exited"), ""),
        (intent(3, desired="stopped"), container(3, state="exited"), ""),
        (intent(3, desired="stopped"), container(3), "started outside at 12:03:04Z; `mcp stop web` stops it"),
    ],
)  # fmt: skip
def test_drift_of_a_container_is_told_with_its_remedy(own: Intent, state: ContainerState, expected: str) -> None:
    (seen,) = workload.with_drift(known(own, None, state), {"web": "12:03:04Z"}).containers
    assert seen.problem == expected
    assert workload.drifted(known(own, None, state)) == ({"web"} if expected else set())


def test_a_container_that_was_removed_is_told_as_missing() -> None:
    (seen,) = workload.with_drift(known(intent(3)), {"web": "12:03:04Z"}).containers
    assert (seen.name, seen.state) == ("mcp.web.g3", "missing")
    assert seen.problem == "removed outside at 12:03:04Z; `mcp start web` makes it anew"
    assert workload.drifted(known(intent(3))) == {"web"}


def test_nothing_is_missing_of_a_stopped_service() -> None:
    assert workload.with_drift(known(intent(3, desired="stopped")), {}).containers == ()


def test_the_engines_own_words_on_a_container_are_kept_when_it_is_as_it_should_be() -> None:
    stopped = container(3, state="exited", problem="driver failed")
    (seen,) = workload.with_drift(known(intent(3, desired="stopped"), None, stopped), {}).containers
    assert seen.problem == "driver failed"


@pytest.mark.parametrize(
    ("component", "expected"),
    [
        (ComponentSpec(name="web", image="web:1", restart="no"), True),
        (ComponentSpec(name="web", image="web:1", restart="on-failure:3"), True),
        (ComponentSpec(name="web", image="web:1"), False),
        (ComponentSpec(name="web", image="web:1", restart="no", routes=(RouteSpec(port=443),)), False),
        (ComponentSpec(name="web", image="web:1", restart="no", health=HealthSpec(cmd=("true",))), False),
    ],
)
def test_a_container_that_ended_well_is_done_only_when_it_has_nothing_to_serve(
    component: ComponentSpec, *, expected: bool
) -> None:
    assert workload.is_completed(component, container(1, state="exited")) is expected


def test_failures_say_what_where_and_why() -> None:
    gone = workload.exited(container(4, state="exited", exit_code=3), "orion", 0.34, ["boom"])
    assert str(gone) == "web.g4 on orion exited with code 3 after 0.3 s, before the service was healthy"
    assert gone.failed.logs[0].lines == ("boom",)
    assert gone.failed.logs[0].exit_code == 3
    sick = workload.unhealthy(container(4), "orion", 30.2, "connection refused", [])
    assert str(sick) == "web.g4 on orion was not healthy within 30 s: connection refused"
    assert "$PORT" in sick.hint
    full = workload.exited(container(4, state="exited", exit_code=137, out_of_memory=True), "orion", 1.0, [])
    assert "ran out of memory" in str(full)


# ---------------------------------------------------------------- lost and found


def found(generation: int, component: str = "web", state: Any = "running") -> tuple[ContainerState, ServiceSpec, str]:
    """A container with labels, found without a record."""
    made = spec("db", "app") if component != "web" else spec()
    return container(generation, component, state, spec_hash=spec_hash(made)), made, f"op{generation}"


def test_records_are_made_anew_from_labels() -> None:
    (made,) = workload.adopt([found(3, "db"), found(3, "app", "exited")])
    assert (made.generation, made.op, made.desired, made.is_candidate, made.ready) == (3, "op3", "running", False, True)


def test_a_service_that_was_stopped_stays_so_without_its_record() -> None:
    (made,) = workload.adopt([found(3, state="exited")])
    assert made.desired == "stopped"


def test_two_generations_are_a_deploy_that_the_master_ends() -> None:
    new, old = workload.adopt([found(3), found(4, state="created"), found(1)])
    assert (old.generation, old.is_candidate) == (3, False)
    assert (new.generation, new.is_candidate, new.ready, new.desired) == (4, True, False, "running")


def test_ports_are_read_from_what_containers_say() -> None:
    states = [container(1, ports={"": "127.0.0.1:10001", "admin": "[::1]:10002", "bad": "nonsense"})]
    assert workload.ports_of(states) == {("web", ""): 10001, ("web", "admin"): 10002}
