"""The agent on the in-memory bus with every port faked: its life, its orders, its engine's troubles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import attrs
import pytest

from mcp.adapters.fake import Behaviour
from mcp.bus.calls import CallFailed
from mcp.model.container import ContainerDefaults, container_request
from mcp.model.errors import AdapterError
from mcp.model.messages import (
    AbandonWork,
    CommitWorkload,
    DescribeImages,
    Done,
    DropWorkload,
    EngineChanged,
    Failed,
    Heartbeat,
    ImagesPulled,
    NodeLeaving,
    Probe,
    PullImages,
    Registered,
    RemoveWorkload,
    RestartWorkload,
    RunWorkload,
    ServiceChanged,
    StartWorkload,
    StopWorkload,
    StreamLogs,
    TakeInventory,
    Working,
    WorkloadRunning,
)
from mcp.model.spec import FixedPort, HealthSpec, RouteSpec, VolumeSpec
from tests.agent_world import NODE, World, a_world, component, run, service


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """A node whose agent has registered."""
    async with a_world() as made:
        yield made


async def failure(world: World, message: Any, op: str = "") -> Failed:
    """Give an order that must fail, and return how it did."""
    with pytest.raises(CallFailed) as caught:
        await world.asked(message, op)
    return caught.value.failed


# -------------------------------------------------------------------- its own life


async def test_an_agent_registers_with_all_it_knows(world: World) -> None:
    await world.deployed(3)
    await world.kill()
    await world.boot()
    inventory = world.registrations[-1].inventory
    assert inventory.facts.incarnation == "life2"
    assert (inventory.facts.engine, inventory.facts.arch, inventory.facts.boot_id) == ("up", "amd64", "boot-1")
    (record,) = inventory.services
    assert (record.generation, record.containers[0].state, record.problems) == (3, "running", ())
    assert [o.kind for o in inventory.operations] == ["run_workload", "commit_workload"]


async def test_without_a_master_it_asks_again_until_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    life = await world.boot(wait=False)
    await world.clock.advance(300)
    complaints = [r for r in caplog.records if "not registered yet" in r.getMessage()]
    assert 3 <= len(complaints) <= 6
    await world.open()
    await world.clock.advance_until(life.agent.is_registered.is_set, 15.0)
    await life.end()


async def test_a_refused_registration_is_tried_again_later() -> None:
    world = World()
    await world.open()
    world.answer = Failed(code="rate_limited", reason="registers too often")
    life = await world.boot(wait=False)
    await world.clock.advance(3.7)
    assert len(world.registrations) == 1
    world.answer = Registered(epoch=7)
    await world.clock.advance_until(life.agent.is_registered.is_set, 3.0)
    await life.end()


async def test_it_beats_as_often_as_the_master_wants(world: World) -> None:
    before = len(world.heard(Heartbeat))
    await world.clock.advance(300)
    beats = world.heard(Heartbeat)
    assert len(beats) - before == 10
    assert [b.sequence for b in beats] == sorted(b.sequence for b in beats)
    assert (beats[-1].engine, beats[-1].epoch, beats[-1].incarnation) == ("up", 7, "life1")


async def test_it_beats_at_once_when_the_bus_is_back(world: World) -> None:
    await world.clock.advance(7)
    world.broker.stop()
    await world.clock.advance(3)
    before = len(world.heard(Heartbeat))
    world.broker.start()
    await world.clock.advance(0.01)
    assert len(world.heard(Heartbeat)) == before + 1


async def test_what_happened_while_the_bus_was_away_shows_in_the_version(world: World) -> None:
    await world.deployed(1)
    version = world.heard(ServiceChanged)[-1].inventory_version
    world.broker.stop()
    world.engine.die_by_hand("mcp.web.g1")
    await world.clock.advance(2)
    world.broker.start()
    await world.clock.advance(0.01)
    assert world.heard(Heartbeat)[-1].inventory_version > version
    inventory = await world.asked(TakeInventory())
    assert inventory.version == world.heard(Heartbeat)[-1].inventory_version
    assert "stopped outside" in inventory.services[0].containers[0].problem


async def test_a_probe_is_answered_while_an_image_is_being_pulled(world: World) -> None:
    world.engine.images["big:1"] = Behaviour(pull_s=300.0)
    pull = world.order(PullImages(service="web", images=("big:1",)), op="deploy9")
    await world.clock.advance(10)
    probe = world.order(Probe())
    await world.clock.advance(0)
    assert probe.result().busy == ("deploy9",)
    assert not pull.done()
    answer = await world.ended(pull)
    assert answer.pulled == ("big:1",)


async def test_beats_and_probes_go_on_while_the_engine_is_frozen(world: World) -> None:
    world.engine.freeze()
    running = world.order(run(1))
    await world.clock.advance(95)
    assert len(world.heard(Heartbeat)) >= 3
    assert world.heard(Heartbeat)[-1].engine == "frozen"
    probe = world.order(Probe())
    await world.clock.advance(0)
    assert probe.result().engine == "frozen"
    with pytest.raises(CallFailed) as caught:
        await world.ended(running)
    assert caught.value.code == "engine_frozen"


async def test_a_newer_master_is_obeyed_and_the_older_one_no_more(world: World) -> None:
    await world.open(epoch=9)
    assert (await world.asked(Probe())).incarnation == "life1"
    await world.open(epoch=8)
    assert (await failure(world, Probe())).code == "stale_epoch"
    await world.kill()
    world.answer = Registered(epoch=9)
    await world.boot()
    assert (await failure(world, Probe())).code == "stale_epoch"


async def test_a_deposed_masters_welcome_is_not_taken() -> None:
    world = World()
    await world.open()
    await world.records.raise_epoch(10)
    life = await world.boot(wait=False)
    await world.clock.advance(30)
    assert not life.agent.is_registered.is_set()
    world.answer = Registered(epoch=11)
    await world.clock.advance_until(life.agent.is_registered.is_set, 15.0)
    await life.end()


async def test_it_says_goodbye_and_leaves_its_services_running(world: World) -> None:
    await world.deployed(1)
    await world.lives[-1].end()
    await world.clock.advance(0)
    assert [m.incarnation for m in world.heard(NodeLeaving)] == ["life1"]
    assert world.states() == {"mcp.web.g1": "running"}


async def test_orders_in_hand_are_answered_when_it_stops(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    first, second = world.order(run(1)), world.order(StopWorkload(service="web", generation=1))
    await world.clock.advance(1)
    await world.lives[-1].end()
    await world.clock.advance(0)
    for order in (first, second):
        assert isinstance(order.exception(), CallFailed)
        assert order.exception().code == "stopping"  # type: ignore[union-attr]


async def test_an_inventory_that_is_too_large_for_the_bus_comes_in_parts(world: World) -> None:
    for name in (f"s{i}" for i in range(6)):
        fat = service(component("web", env={"FAT": "x" * 20_000}), name=name)
        await world.deployed(1, fat)
    parts: list[Any] = []
    last = await world.ended(world.order(TakeInventory(), on_progress=parts.append))
    assert [p.part for p in [*parts, last]] == list(range(1, last.parts + 1))
    assert last.parts > 1
    told = [record.service for part in [*parts, last] for record in part.services]
    assert told == [f"s{i}" for i in range(6)]
    await world.kill()
    await world.boot()
    assert world.registrations[-1].inventory.parts == last.parts


async def test_what_was_removed_while_it_was_away_is_removed_when_it_returns(world: World) -> None:
    await world.deployed(4)
    await world.deployed(2, service(name="api"))
    await world.kill()
    world.answer = Registered(epoch=8, remove=("web@4", "api@1", "rubbish", "../x@1"))
    await world.boot()
    await world.clock.advance_until(lambda: "mcp.web.g4" not in world.states(), 30.0)
    assert world.states() == {"mcp.api.g2": "running"}
    assert world.told("web") is None


# --------------------------------------------------------------- nodes without engine


async def test_an_edge_has_no_engine_and_refuses_containers() -> None:
    async with a_world(engine=False, role="edge") as world:
        assert world.registrations[-1].inventory.facts.engine == "none"
        for order in (run(1), PullImages(service="web", images=("web:1",)), DescribeImages(images=("web:1",))):
            failed = await failure(world, order)
            assert failed.code == "no_engine"
            assert NODE in failed.reason
        assert (await world.asked(Probe())).engine == "none"
        assert (await failure(world, StreamLogs(stream="s1", service="web"))).code == "no_engine"


# -------------------------------------------------------------------------- orders


async def test_a_service_is_run_and_committed(world: World) -> None:
    said: list[Any] = []
    answer = await world.ended(world.order(run(1), op="deploy1", on_progress=said.append))
    assert isinstance(answer, WorkloadRunning)
    candidate = answer.record.candidate
    assert candidate is not None
    assert (candidate.op, candidate.generation, candidate.ready) == ("deploy1", 1, True)
    assert answer.record.containers[0].health == "healthy"
    assert answer.record.generation == 0
    done = await world.asked(CommitWorkload(service="web", generation=1), op="deploy1")
    assert done == Done(changed=True)
    told = world.told()
    assert told is not None
    assert (told.generation, told.candidate, told.desired, told.op) == (1, None, "running", "deploy1")
    assert told.containers[0].ports == {"": "127.0.0.1:20000"}


async def test_the_master_hears_of_a_change_before_the_end_of_its_order(world: World) -> None:
    await world.asked(run(1))
    assert world.told() is not None
    kinds = [f.subject.split(".")[3] for f in world.broker.frames if f.subject.startswith(f"mcp.node.{NODE}.")]
    assert kinds[-2:] == ["event", "reply"]


async def test_the_new_copy_runs_beside_the_old_one_until_it_is_committed(world: World) -> None:
    await world.deployed(1)
    await world.asked(run(2))
    assert world.states() == {"mcp.web.g1": "running", "mcp.web.g2": "running"}
    await world.asked(CommitWorkload(service="web", generation=2))
    assert world.states() == {"mcp.web.g2": "running"}
    assert world.containers()["mcp.web.g2"].ports != {"": "127.0.0.1:20000"}


async def test_the_intent_and_its_ports_are_on_disk_before_anything_is_made(world: World) -> None:
    world.engine.latency_s = 1.0
    order = world.order(run(1))
    await world.clock.advance(0.5)
    assert world.states() == {}
    assert [i.generation for i in await world.records.intents()] == [1]
    assert await world.records.ports() == {20000}
    await world.ended(order)


async def test_nothing_is_touched_when_the_disk_is_full(world: World) -> None:
    world.records.trouble = AdapterError("cannot write the records: disk full", code="disk_full", retryable=True)
    calls = list(world.engine.calls)
    failed = await failure(world, run(1))
    assert failed.code == "disk_full"
    assert [c for c in world.engine.calls[len(calls) :] if not c.startswith(("list", "facts"))] == []
    assert world.told() is None
    world.records.trouble = None
    assert isinstance(await world.asked(run(1)), WorkloadRunning)


async def test_a_nearly_full_disk_is_told_by_heartbeat(world: World) -> None:
    world.host.have = attrs.evolve(world.host.have, disk_free_bytes=4096)
    await world.clock.advance(31)
    (problem,) = world.heard(Heartbeat)[-1].problems
    assert problem.startswith("disk full: 4 KiB left")


async def test_a_port_that_somebody_uses_is_not_given_out(world: World) -> None:
    world.host.taken = {("127.0.0.1", 20000), ("127.0.0.1", 20002)}
    spec = service(component(routes=(RouteSpec(name="a", port=1), RouteSpec(name="b", port=2))))
    answer = await world.asked(run(1, spec))
    assert answer.record.containers[0].ports == {"a": "127.0.0.1:20001", "b": "127.0.0.1:20003"}


async def test_when_somebody_is_quicker_at_a_port_another_one_is_taken(world: World) -> None:
    world.engine.taken = {("127.0.0.1", 20000)}  # as yet only the engine knows
    world.host.taken = set()
    order = world.order(run(1))
    await world.clock.advance_until(lambda: "start mcp.web.g1" in world.engine.calls)
    answer = await world.ended(order)
    assert answer.record.containers[0].ports == {"": "127.0.0.1:20001"}
    assert await world.records.ports_of("web", 1) == {("web", ""): 20001}


async def test_components_start_in_order_each_healthy_before_the_next(world: World) -> None:
    world.engine.images["db:1"] = Behaviour(is_local=True, ready_after_s=2.0)
    order = world.order(run(1, service(component("db"), component("api"))))
    await world.clock.advance(1.9)
    assert world.states() == {"mcp.web.db.g1": "running"}
    answer = await world.ended(order)
    assert [c.component for c in answer.record.containers] == ["api", "db"]


async def test_a_fast_container_costs_no_needless_wait(world: World) -> None:
    for ready_s in (0.0, 0.013, 0.1, 0.4):
        world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=ready_s)
        began_s = world.clock.monotonic_s()
        await world.asked(run(int(ready_s * 1000) + 1))
        assert world.clock.monotonic_s() - began_s <= ready_s * 1.25 + 0.01


async def test_checks_come_no_more_seldom_than_the_interval(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=60.0)
    spec = service(component(health=HealthSpec(timeout_s=90.0, interval_s=2.0)))
    began_s = world.clock.monotonic_s()
    await world.asked(run(1, spec))
    assert 60.0 <= world.clock.monotonic_s() - began_s <= 62.0


async def test_a_container_that_exits_fails_at_once_with_its_last_lines(world: World) -> None:
    says = tuple(f"line {i}" for i in range(30))
    world.engine.images["web:1"] = Behaviour(
        is_local=True, ready_after_s=float("inf"), exits_after_s=0.3, exit_code=3, says=says
    )
    began_s = world.clock.monotonic_s()
    failed = await failure(world, run(1))
    assert world.clock.monotonic_s() - began_s < 0.5
    assert failed.code == "exited"
    assert "exited with code 3 after 0.3 s" in failed.reason
    (log,) = failed.logs
    assert (log.component, log.exit_code, log.lines) == ("web", 3, says[-20:])


async def test_a_container_out_of_memory_says_so(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(
        is_local=True, ready_after_s=float("inf"), exits_after_s=0.3, exit_code=137, out_of_memory=True
    )
    failed = await failure(world, run(1, service(component(restart="no"))))
    assert "ran out of memory" in failed.reason
    assert failed.logs[0].out_of_memory


async def test_a_container_that_is_never_healthy_fails_when_its_time_is_over(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"), says=("waiting for the moon",))
    began_s = world.clock.monotonic_s()
    failed = await failure(world, run(1))
    assert 5.0 <= world.clock.monotonic_s() - began_s <= 5.5
    assert (failed.code, failed.logs[0].lines, failed.logs[0].exit_code) == (
        "unhealthy",
        ("waiting for the moon",),
        None,
    )
    assert "connection refused" in failed.reason
    assert "$PORT" in failed.hint


async def test_a_failed_copy_stays_for_its_undo_and_the_old_one_serves(world: World) -> None:
    await world.deployed(1)
    world.engine.images["web:2"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    await failure(world, run(2, service(component(image="web:2"))))
    assert world.states() == {"mcp.web.g1": "running", "mcp.web.g2": "running"}
    assert await world.asked(DropWorkload(service="web", generation=2)) == Done(changed=True)
    assert world.states() == {"mcp.web.g1": "running"}
    told = world.told()
    assert told is not None
    assert (told.generation, told.candidate) == (1, None)
    assert await world.records.ports() == {20000}


async def test_what_the_engine_cannot_start_leaves_no_half_container(world: World) -> None:
    trouble = AdapterError("cannot start: bad command", code="bad_command", hint="Check `cmd`.")
    world.engine.images["web:1"] = Behaviour(is_local=True, start_error=trouble)
    failed = await failure(world, run(1))
    assert (failed.code, failed.hint) == ("bad_command", "Check `cmd`.")
    assert world.states() == {}


async def test_an_image_that_is_gone_is_fetched_again(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(pull_s=4.0)
    assert isinstance(await world.asked(run(1)), WorkloadRunning)


@pytest.mark.parametrize("kind", ["fixed port", "asked for"])
async def test_stop_first_stops_the_old_copy_and_an_undo_starts_it_again(world: World, kind: str) -> None:
    more: dict[str, Any] = (
        {"ports": (FixedPort(host_port=80, container_port=80),)} if kind == "fixed port" else {"update": "stop-first"}
    )
    await world.deployed(1, service(component(**more)))
    world.host.taken = {("127.0.0.1", 80)}  # held by the old copy
    world.engine.images["web:2"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    await failure(world, run(2, service(component(image="web:2", **more))))
    assert world.states() == {"mcp.web.g1": "exited", "mcp.web.g2": "running"}
    await world.asked(DropWorkload(service="web", generation=2))
    assert world.states() == {"mcp.web.g1": "running"}


async def test_a_fixed_port_in_use_is_refused_before_the_old_copy_is_touched(world: World) -> None:
    await world.deployed(1)
    world.host.taken = {("127.0.0.1", 80)}
    failed = await failure(world, run(2, service(component(ports=(FixedPort(host_port=80, container_port=80),)))))
    assert failed.code == "port_in_use"
    assert "ss -ltnp" in failed.hint
    assert world.states() == {"mcp.web.g1": "running"}
    assert [i.generation for i in await world.records.intents()] == [1]


@pytest.mark.parametrize(
    "path", ["/", "/etc", "/etc/shadow", "/var/run/docker.sock", "/run", "/proc", "/srv/mcp/keys", "/srv", "/srv/link"]
)
async def test_a_path_that_hands_the_machine_over_is_refused(world: World, path: str) -> None:
    world.host.links = {"/srv/link": "/etc"}
    volume = VolumeSpec(host_path=path, container_path="/data", read_only=path == "/etc/shadow")
    failed = await failure(world, run(1, service(component(volumes=(volume,)))))
    assert failed.code == "forbidden_path"
    assert await world.records.intents() == []


@pytest.mark.parametrize(
    ("path", "read_only"), [("/srv/web", False), ("/etc/localtime", True), ("/etcetera", False), ("/home/x", False)]
)
async def test_other_paths_are_mounted(world: World, path: str, *, read_only: bool) -> None:
    volume = VolumeSpec(host_path=path, container_path="/data", read_only=read_only)
    assert isinstance(await world.asked(run(1, service(component(volumes=(volume,))))), WorkloadRunning)


async def test_a_definition_that_could_not_be_told_is_refused(world: World) -> None:
    fat = component(env={f"V{i}": "x" * 100 for i in range(400)})
    failed = await failure(world, run(1, service(fat)))
    assert failed.code == "too_large"
    assert "the limit is 40 KiB" in failed.reason


async def test_an_inactive_service_is_made_and_not_started(world: World) -> None:
    answer = await world.asked(run(1, service(active=False)))
    assert world.states() == {"mcp.web.g1": "created"}
    assert answer.record.desired == "stopped"
    await world.asked(CommitWorkload(service="web", generation=1))
    told = world.told()
    assert told is not None
    assert [c.problem for c in told.containers] == [""]


async def test_a_component_without_a_route_must_keep_running_for_its_interval(world: World) -> None:
    spec = service(component(routes=(), health=HealthSpec(interval_s=3.0)))
    began_s = world.clock.monotonic_s()
    await world.asked(run(1, spec))
    assert 3.0 <= world.clock.monotonic_s() - began_s < 3.6


async def test_a_job_that_ends_well_counts_as_healthy(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, exits_after_s=0.5, exit_code=0)
    spec = service(component(routes=(), restart="no", health=HealthSpec(interval_s=3.0)))
    await world.deployed(1, spec)
    told = world.told()
    assert told is not None
    assert (told.containers[0].state, told.containers[0].problem) == ("exited", "")


async def test_a_health_command_is_run_in_the_container(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(
        is_local=True, commands={("check",): (0, ""), ("sick",): (2, "no database\n")}
    )
    assert isinstance(await world.asked(run(1, service(component(health=HealthSpec(cmd=("check",)))))), WorkloadRunning)
    failed = await failure(world, run(2, service(component(health=HealthSpec(cmd=("sick",), timeout_s=2.0)))))
    assert "sick exited with code 2: no database" in failed.reason


async def test_pulling_tells_how_far_it_is_and_what_generation_comes_next(world: World) -> None:
    await world.deployed(5)
    await world.asked(RemoveWorkload(service="web", generation=5))
    world.engine.images["big:1"] = Behaviour(pull_s=40.0, pull_bytes=40_000_000)
    said: list[Any] = []
    pull = world.order(PullImages(service="web", images=("web:1", "big:1")), on_progress=said.append)
    answer = await world.ended(pull)
    assert answer == ImagesPulled(pulled=("big:1",), highest_generation=5)
    assert "pulling big:1: downloading (10 of 40 MB)" in [s.detail for s in said]


async def test_a_sign_of_life_comes_every_two_seconds_even_from_a_queue(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    spec = service(component(health=HealthSpec(timeout_s=60.0)))
    said: list[list[tuple[float, Working]]] = [[], []]
    for order, mine in ((run(1, spec), said[0]), (StopWorkload(service="web", generation=1), said[1])):
        world.order(order, on_progress=lambda m, mine=mine: mine.append((world.clock.monotonic_s(), m)))  # type: ignore[misc]
    await world.clock.advance(30)
    for mine in said:
        times = [at for at, _ in mine]
        assert len(times) > 10
        assert max(b - a for a, b in pairwise(times)) <= 2.5
    assert said[0][-1][1].detail == "waiting until web.g1 is healthy"
    assert said[1][-1][1].detail == "waiting for an earlier order"


async def test_services_do_not_wait_for_one_another(world: World) -> None:
    world.engine.images["big:1"] = Behaviour(pull_s=300.0)
    pull = world.order(PullImages(service="web", images=("big:1",)))
    assert isinstance(await world.asked(run(1, service(name="api")), limit_s=5.0), WorkloadRunning)
    assert not pull.done()
    pull.cancel()


async def test_the_same_order_again_gets_the_same_answer_and_does_nothing(world: World) -> None:
    first = await world.asked(run(1), op="deploy1")
    calls = len(world.engine.calls)
    assert await world.asked(run(1), op="deploy1") == first
    assert not [c for c in world.engine.calls[calls:] if c.startswith(("create", "start"))]
    await world.asked(CommitWorkload(service="web", generation=1), op="deploy1")
    await world.kill()
    await world.boot()
    assert await world.asked(CommitWorkload(service="web", generation=1), op="deploy1") == Done(changed=True)


async def test_an_order_of_the_same_name_for_another_service_is_another_order(world: World) -> None:
    await world.asked(run(1), op="deploy1")
    await world.asked(run(1, service(name="api")), op="deploy1")
    assert world.states() == {"mcp.web.g1": "running", "mcp.api.g1": "running"}


async def test_two_of_the_same_order_at_once_make_one_copy(world: World) -> None:
    first, second = world.order(run(1), op="deploy1"), world.order(run(1), op="deploy1")
    assert await world.ended(first) == await world.ended(second)
    assert world.engine.calls.count("create mcp.web.g1") == 1


async def test_a_failure_is_remembered_too(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    failed = await failure(world, run(1), op="deploy1")
    began_s = world.clock.monotonic_s()
    assert await failure(world, run(1), op="deploy1") == failed
    assert world.clock.monotonic_s() - began_s < 0.1


async def test_a_remembered_success_is_checked_before_it_is_told_again(world: World) -> None:
    await world.asked(run(1), op="deploy1")
    world.engine.remove_by_hand("mcp.web.g1")
    await world.asked(run(1), op="deploy1")
    assert world.states() == {"mcp.web.g1": "running"}


async def test_an_order_for_an_older_generation_is_refused(world: World) -> None:
    await world.deployed(5)
    for order in (run(4), CommitWorkload(service="web", generation=4), StopWorkload(service="web", generation=4)):
        assert (await failure(world, order)).code == "stale_generation"
    await world.asked(RemoveWorkload(service="web", generation=5))
    assert (await failure(world, run(5), op="late")).code == "stale_generation"
    assert world.states() == {}


async def test_a_run_that_comes_after_its_undo_is_refused(world: World) -> None:
    assert await world.asked(DropWorkload(service="web", generation=1)) == Done(
        changed=False, detail="there is nothing of generation 1 here"
    )
    assert (await failure(world, run(1))).code == "stale_generation"


async def test_a_newer_candidate_takes_the_place_of_one_that_nobody_finished(world: World) -> None:
    await world.deployed(1)
    await world.asked(run(2))
    await world.asked(run(3))
    assert world.states() == {"mcp.web.g1": "running", "mcp.web.g3": "running"}
    await world.asked(CommitWorkload(service="web", generation=3))
    assert world.states() == {"mcp.web.g3": "running"}


async def test_work_is_abandoned_at_the_next_safe_point(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    order = world.order(run(1, service(component(health=HealthSpec(timeout_s=60.0)))), op="deploy1")
    await world.clock.advance(3)
    assert await world.asked(AbandonWork(target_op="deploy1")) == Done(changed=True)
    await world.clock.advance(0.1)
    assert order.exception().code == "abandoned"  # type: ignore[union-attr]
    assert await world.asked(DropWorkload(service="web", generation=1), op="deploy1") == Done(changed=True)
    assert world.states() == {}
    assert await world.asked(AbandonWork(target_op="deploy1")) == Done(changed=False)


async def test_a_pull_is_abandoned_too(world: World) -> None:
    world.engine.images["big:1"] = Behaviour(pull_s=300.0)
    order = world.order(PullImages(service="web", images=("big:1",)), op="deploy1")
    await world.clock.advance(3)
    await world.asked(AbandonWork(target_op="deploy1"))
    await world.clock.advance(0.1)
    assert order.exception().code == "abandoned"  # type: ignore[union-attr]


async def test_an_undo_does_not_wait_for_the_health_of_what_it_undoes(world: World) -> None:
    world.engine.images["web:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    order = world.order(run(1, service(component(health=HealthSpec(timeout_s=60.0)))), op="deploy1")
    await world.clock.advance(3)
    began_s = world.clock.monotonic_s()
    await world.asked(DropWorkload(service="web", generation=1), op="undo1")
    assert world.clock.monotonic_s() - began_s < 3
    assert order.exception().code == "abandoned"  # type: ignore[union-attr]


async def test_stop_start_and_restart(world: World) -> None:
    await world.deployed(1, service(component("db"), component("api")))
    stopped = await world.asked(StopWorkload(service="web", generation=1))
    assert stopped.record.desired == "stopped"
    assert set(world.states().values()) == {"exited"}
    stops = [c for c in world.engine.calls if c.startswith("stop")]
    assert stops == ["stop mcp.web.api.g1", "stop mcp.web.db.g1"]
    world.engine.remove_by_hand("mcp.web.db.g1")
    started = await world.asked(StartWorkload(service="web", generation=1))
    assert started.record.desired == "running"
    assert set(world.states().values()) == {"running"}
    before = {name: c.started_at for name, c in world.containers().items()}
    await world.clock.advance(1)
    await world.asked(RestartWorkload(service="web", generation=1))
    assert all(c.started_at > before[name] for name, c in world.containers().items())
    told = world.told()
    assert told is not None
    assert {c.health for c in told.containers} == {"healthy"}


async def test_a_service_is_removed_with_all_its_generations(world: World) -> None:
    await world.deployed(1)
    await world.asked(run(2))
    assert await world.asked(RemoveWorkload(service="web", generation=2)) == Done(changed=True)
    assert world.states() == {}
    assert world.told() is None
    assert await world.records.intents() == []
    assert await world.records.ports() == set()
    await world.clock.advance(1)
    assert world.agent._workloads == {}
    assert (await world.asked(RemoveWorkload(service="web", generation=2))).changed is False


async def test_names_that_are_not_legal_are_refused(world: World) -> None:
    for name in ("../../etc", "a.b", "", "x" * 99):
        assert (await failure(world, StopWorkload(service=name, generation=1))).code == "bad_name"
    bad = attrs.evolve(service(), components=(component("../db"),))
    assert (await failure(world, run(1, bad))).code == "bad_name"


async def test_images_are_described_without_pulling(world: World) -> None:
    world.engine.images["far:1"] = Behaviour(platforms=("amd64", "arm64"))
    answer = await world.asked(DescribeImages(images=("web:1", "far:1", "none:1")))
    assert [(i.image, i.platforms, i.is_local) for i in answer.images] == [
        ("web:1", ("amd64",), True), ("far:1", ("amd64", "arm64"), False), ("none:1", (), False),
    ]  # fmt: skip
    assert "no such image" in answer.images[2].error


# ---------------------------------------------------------------- the engine's troubles


async def test_a_container_that_is_removed_by_hand_is_told_and_left_alone(world: World) -> None:
    await world.deployed(3)
    await world.clock.advance(5)
    world.engine.remove_by_hand("mcp.web.g3")
    await world.clock.advance(1)
    told = world.told()
    assert told is not None
    (gone,) = told.containers
    at = f"{world.agent.node.time_of_day()[:6]}"
    assert gone.state == "missing"
    assert gone.problem.startswith(f"removed outside at {at}")
    assert "`mcp start web`" in gone.problem
    await world.clock.advance(600)
    assert world.states() == {}
    await world.asked(StartWorkload(service="web", generation=3))
    assert world.states() == {"mcp.web.g3": "running"}
    healed = world.told()
    assert healed is not None
    assert [c.problem for c in healed.containers] == [""]


async def test_a_container_that_is_stopped_by_hand_is_told_and_left_alone(world: World) -> None:
    await world.deployed(3)
    world.engine.die_by_hand("mcp.web.g3")
    await world.clock.advance(1)
    told = world.told()
    assert told is not None
    assert "stopped outside at" in told.containers[0].problem
    await world.clock.advance(600)
    assert world.states() == {"mcp.web.g3": "exited"}


async def test_our_containers_without_an_intent_are_told_and_not_touched(world: World) -> None:
    spec = service(name="ghost")
    world.engine.images["ghost:1"] = Behaviour(is_local=True)
    request = container_request(
        spec, spec.components[0], generation=4, op="old", ports={}, defaults=ContainerDefaults(node=NODE), spec_json=""
    )
    version = world.agent.version
    await world.engine.create(request)
    await world.engine.start(request.name)
    await world.clock.advance(31)
    assert world.heard(Heartbeat)[-1].inventory_version > version
    inventory = await world.asked(TakeInventory())
    assert [o.name for o in inventory.orphans] == ["mcp.ghost.g4"]
    assert inventory.services == ()
    assert world.states() == {"mcp.ghost.g4": "running"}
    await world.asked(RemoveWorkload(service="ghost", generation=4))
    assert world.states() == {}
    assert (await world.asked(TakeInventory())).orphans == ()


async def test_an_engine_that_goes_is_told_within_a_second_and_orders_are_refused_at_once(world: World) -> None:
    world.engine.go_down()
    await world.clock.advance(0.9)
    assert [(e.engine, e.incarnation) for e in world.heard(EngineChanged)] == [("down", "life1")]
    began_s = world.clock.monotonic_s()
    failed = await failure(world, run(1))
    assert world.clock.monotonic_s() - began_s < 1
    assert failed.code == "engine_down"
    assert failed.retryable


async def test_a_frozen_engine_is_told(world: World) -> None:
    world.engine.freeze()
    await world.clock.advance(16)
    assert world.heard(EngineChanged)[-1].engine == "frozen"
    world.engine.thaw()
    await world.clock.advance(12)
    assert world.heard(EngineChanged)[-1].engine == "up"


async def test_what_a_killed_engine_took_down_comes_back_with_it(world: World) -> None:
    await world.deployed(1)
    await world.deployed(1, service(name="api"))
    await world.deployed(1, service(component("db"), name="idle"))
    await world.asked(StopWorkload(service="idle", generation=1))
    world.engine.die_by_hand("mcp.api.g1")
    await world.clock.advance(60)
    world.engine.go_down()
    await world.clock.advance(20)
    world.engine.come_up()
    await world.clock.advance(2)
    assert world.states() == {"mcp.web.g1": "running", "mcp.api.g1": "exited", "mcp.idle.db.g1": "exited"}
    told = world.told()
    assert told is not None
    assert told.containers[0].problem == ""


async def test_a_container_that_never_ended_is_not_started_again_when_the_engine_is_back(world: World) -> None:
    await world.deployed(1)
    before = world.containers()["mcp.web.g1"].started_at
    world.engine.go_down(live_restore=True)
    await world.clock.advance(20)
    world.engine.come_up()
    await world.clock.advance(2)
    assert world.containers()["mcp.web.g1"].started_at == before


async def test_an_answer_that_is_cut_is_followed_by_a_look(world: World) -> None:
    for number, (call, after_effect) in enumerate([(c, a) for c in ("create", "start") for a in (False, True)], 1):
        world.engine.cut_next(call, after_effect=after_effect)
        assert isinstance(await world.asked(run(number)), WorkloadRunning)
        world.engine.cut_next("list", after_effect=after_effect)
        assert isinstance(await world.asked(run(number)), WorkloadRunning)
        await world.asked(CommitWorkload(service="web", generation=number))
    for number, (call, after_effect) in enumerate([(c, a) for c in ("stop", "remove") for a in (False, True)], 5):
        await world.asked(run(number))
        world.engine.cut_next(call, after_effect=after_effect)
        await world.asked(CommitWorkload(service="web", generation=number))
        assert world.states() == {f"mcp.web.g{number}": "running"}


async def test_a_commit_that_the_engine_interrupts_is_finished_when_it_is_back(world: World) -> None:
    await world.deployed(1)
    await world.asked(run(2), op="deploy2")
    world.engine.go_down(live_restore=True)
    failed = await failure(world, CommitWorkload(service="web", generation=2), op="deploy2")
    assert failed.code == "engine_down"
    told = world.told()
    assert told is not None
    assert told.generation == 2
    assert "cannot be removed yet" in told.problems[0]
    world.engine.come_up()
    await world.clock.advance_until(lambda: world.states() == {"mcp.web.g2": "running"}, 60.0)
    await world.clock.advance(1)
    healed = world.told()
    assert healed is not None
    assert healed.problems == ()
    assert await world.asked(CommitWorkload(service="web", generation=2), op="deploy2") == Done(changed=False)


async def test_an_old_copy_that_cannot_be_started_again_yet_is_tried_until_it_can(world: World) -> None:
    fixed: dict[str, Any] = {"ports": (FixedPort(host_port=80, container_port=80),)}
    await world.deployed(1, service(component(**fixed)))
    world.engine.images["web:2"] = Behaviour(is_local=True, ready_after_s=float("inf"))
    await failure(world, run(2, service(component(image="web:2", **fixed))))
    world.engine.cut_next("start", after_effect=False)
    world.engine.missing_addresses = {"127.0.0.1"}
    failed = await failure(world, DropWorkload(service="web", generation=2))
    assert "cannot be started again yet" in failed.reason
    assert [i.generation for i in await world.records.intents()] == [1]
    await world.clock.advance(20)
    world.engine.missing_addresses = set()
    await world.clock.advance_until(lambda: world.states() == {"mcp.web.g1": "running"}, 60.0)


# ---------------------------------------------------------------------------- boot


async def test_a_restarted_agent_touches_nothing_that_runs(world: World) -> None:
    await world.deployed(1)
    calls = len(world.engine.calls)
    before = world.containers()
    await world.kill()
    await world.boot()
    await world.clock.advance(60)
    assert world.containers() == before
    assert {c.split()[0] for c in world.engine.calls[calls:]} <= {"list", "facts"}


async def test_after_a_power_cut_what_is_down_is_started_and_what_is_gone_is_made(world: World) -> None:
    await world.deployed(1)
    await world.deployed(1, service(component("db"), component("api"), name="shop"))
    await world.kill()
    world.engine.die_by_hand("mcp.web.g1", 255)
    world.engine.remove_by_hand("mcp.shop.db.g1")
    await world.boot()
    await world.clock.advance(2)
    assert set(world.states().values()) == {"running"}
    assert len(world.states()) == 3


async def test_a_stopped_service_stays_stopped_over_a_boot(world: World) -> None:
    await world.deployed(1)
    await world.asked(StopWorkload(service="web", generation=1))
    await world.kill()
    await world.boot()
    await world.clock.advance(60)
    assert world.states() == {"mcp.web.g1": "exited"}


async def test_an_engine_that_is_down_at_boot_is_told_and_waited_for(world: World) -> None:
    await world.deployed(1)
    await world.kill()
    world.engine.go_down()
    await world.boot()
    inventory = world.registrations[-1].inventory
    assert inventory.facts.engine == "down"
    assert "have not been seen" in inventory.services[0].problems[0]
    assert inventory.services[0].containers == ()
    await world.clock.advance(120)
    world.engine.come_up()
    await world.clock.advance_until(lambda: world.states() == {"mcp.web.g1": "running"}, 5.0)
    await world.clock.advance(1)
    told = world.told()
    assert told is not None
    assert told.problems == ()


async def test_an_address_that_is_missing_at_boot_is_told_and_tried_until_it_is_there(world: World) -> None:
    await world.deployed(1)
    await world.kill()
    world.engine.die_by_hand("mcp.web.g1", 128)
    world.engine.missing_addresses = {"127.0.0.1"}
    await world.boot()
    await world.clock.advance(90)
    told = world.told()
    assert told is not None
    assert "cannot assign requested address" in told.problems[0]
    assert "tried again" in told.problems[0]
    tries = world.engine.calls.count("start mcp.web.g1")
    assert 5 < tries < 60
    world.engine.missing_addresses = set()
    await world.clock.advance_until(lambda: world.states() == {"mcp.web.g1": "running"}, 40.0)
    await world.clock.advance(1)
    healed = world.told()
    assert healed is not None
    assert healed.problems == ()


async def test_lost_records_are_made_anew_from_labels(world: World) -> None:
    await world.deployed(3)
    await world.deployed(2, service(component("db"), component("api"), name="shop"))
    before = world.containers()
    await world.kill()
    world.records.reopen("there were no records")
    await world.boot()
    await world.clock.advance(5)
    inventory = world.registrations[-1].inventory
    assert inventory.problems == ("state rebuilt from labels: 3 containers (there were no records)",)
    assert [(r.service, r.generation, r.op) for r in inventory.services] == [
        ("shop", 2, "deploy2"),
        ("web", 3, "deploy3"),
    ]
    assert inventory.services[1].spec == service()
    assert world.containers() == before
    assert await world.records.ports() == {20000, 20001, 20002}
    await world.deployed(4)
    assert world.states()["mcp.web.g4"] == "running"
    assert world.containers()["mcp.web.g4"].ports == {"": "127.0.0.1:20003"}


async def test_a_new_node_has_nothing_to_rebuild() -> None:
    world = World()
    world.records.rebuilt_reason = "there were no records"
    await world.open()
    life = await world.boot()
    assert world.registrations[-1].inventory.problems == ()
    await life.end()


async def test_a_deploy_that_was_under_way_is_left_for_the_master_at_boot(world: World) -> None:
    await world.deployed(1)
    world.engine.images["web:2"] = Behaviour(is_local=True, ready_after_s=30.0)
    spec = service(component(image="web:2", health=HealthSpec(timeout_s=60.0)))
    world.order(run(2, spec), op="deploy2")
    await world.clock.advance(5)
    await world.kill()
    await world.boot()
    record = world.registrations[-1].inventory.services[0]
    assert record.candidate is not None
    assert (record.candidate.op, record.candidate.ready) == ("deploy2", False)
    await world.clock.advance(3)
    assert world.states() == {"mcp.web.g1": "running", "mcp.web.g2": "running"}
    answer = await world.asked(run(2, spec), op="deploy2")
    assert answer.record.candidate.ready
    assert world.engine.calls.count("create mcp.web.g2") == 1
    await world.asked(CommitWorkload(service="web", generation=2), op="deploy2")
    assert world.states() == {"mcp.web.g2": "running"}


async def test_an_unknown_order_is_refused_by_name(world: World) -> None:
    world.agent.handlers = {k: v for k, v in world.agent.handlers.items() if k is not RunWorkload}  # type: ignore[misc]
    assert (await failure(world, run(1))).code == "unknown_message"


async def test_a_bug_in_one_order_is_told_and_the_agent_lives_on(world: World) -> None:
    world.host.is_port_free = None  # type: ignore[method-assign, assignment]
    failed = await failure(world, run(1), op="4f2c9a1b")
    assert failed.code == "internal"
    assert "4f2c9a1b" in failed.reason
    assert (await world.asked(Probe())).busy == ()


async def test_orders_of_a_deposed_master_that_wait_in_the_mailbox_are_refused(world: World) -> None:
    order = world.order(Probe())
    world.agent._epoch = 99
    await world.clock.advance(0)
    assert order.exception().code == "stale_epoch"  # type: ignore[union-attr]
    await asyncio.sleep(0)


async def test_a_component_that_ends_while_a_later_one_comes_up_fails_the_service_at_once(world: World) -> None:
    world.engine.images["db:1"] = Behaviour(is_local=True, exits_after_s=2.0, exit_code=9, says=("no space",))
    world.engine.images["api:1"] = Behaviour(is_local=True, ready_after_s=4.0)
    began_s = world.clock.monotonic_s()
    failed = await failure(world, run(1, service(component("db"), component("api"))))
    assert world.clock.monotonic_s() - began_s < 2.1
    assert failed.code == "exited"
    assert "web.db.g1 on orion exited with code 9" in failed.reason
    assert failed.logs[0].lines == ("no space",)


async def test_a_deploy_asks_a_warm_engine_for_nothing_but_what_must_be_done(world: World) -> None:
    await world.deployed(1)
    await world.clock.advance(1)
    calls = len(world.engine.calls)
    await world.asked(run(2))
    assert world.engine.calls[calls : calls + 3] == [
        "create mcp.web.g2",
        "start mcp.web.g2",
        "list web",
    ]  # the list comes after the answer
    await world.clock.advance(1)
    calls = len(world.engine.calls)
    await world.asked(CommitWorkload(service="web", generation=2))
    assert world.engine.calls[calls : calls + 2] == ["stop mcp.web.g1", "remove mcp.web.g1"]


async def test_a_candidate_that_was_healthy_is_known_as_such_after_a_restart(world: World) -> None:
    await world.asked(run(1), op="deploy1")
    await world.kill()
    await world.boot()
    await world.clock.advance(1)
    told = world.told()
    assert told is not None
    assert told.candidate is not None
    assert told.candidate.ready
    assert await world.asked(CommitWorkload(service="web", generation=1), op="deploy1") == Done(changed=True)


async def test_a_deploy_waits_for_the_disk_twice(world: World) -> None:
    writes: list[str] = []
    for name in ("accept", "commit", "finish"):
        real = getattr(world.records, name)

        async def write(*arguments: Any, name: str = name, real: Any = real) -> None:
            writes.append(name)
            await real(*arguments)

        setattr(world.records, name, write)
    await world.asked(run(1))
    assert writes == ["accept", "finish"]
    await world.asked(CommitWorkload(service="web", generation=1))
    assert writes == ["accept", "finish", "commit", "finish"]
