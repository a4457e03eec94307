"""What Images, Containers and ContainerOutput promise, on the engine in memory and on a real one."""

# ruff: noqa: F811 - a test names a fixture that is imported: that is how it asks for it

from __future__ import annotations

import asyncio
import re
from contextlib import aclosing

import attrs

from mcp.model.container import HASH_LABEL
from mcp.model.ports import PortBinding
from tests.contract.engine_fixtures import (
    ECHO,
    LONG,
    SLEEP,
    Heard,
    Read,
    World,
    engine_url,  # noqa: F401 - a fixture
    failure,
    name_of,
    world,  # noqa: F401 - a fixture
)
from tests.helpers import free_port

STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")


def bound(port: int, address: str = "127.0.0.1") -> tuple[PortBinding, ...]:
    return (PortBinding(address=address, host_port=port, container_port=8080),)


# ------------------------------------------------------------------------ images


async def test_an_image_that_is_there_is_described_without_a_registry(world: World) -> None:
    facts = await world.engine.describe(name_of("web"))
    assert (facts.is_local, facts.platforms, facts.error) == (True, ((await world.engine.facts()).arch,), "")


async def test_an_image_that_nobody_has_is_described_by_its_trouble(world: World) -> None:
    facts = await world.engine.describe("localhost/mcp-test-nothing:v1")
    assert (facts.is_local, facts.platforms) == (False, ())
    assert "localhost/mcp-test-nothing:v1" in facts.error


async def test_what_is_there_is_not_pulled(world: World) -> None:
    said: list[tuple[str, int, int]] = []
    assert await world.engine.pull(name_of("web"), lambda *step: said.append(step)) is False
    assert said == []


async def test_pulling_what_nobody_has_fails(world: World) -> None:
    error = await failure(world.engine.pull("localhost/mcp-test-nothing:v1", lambda *_: None))
    assert error.code in ("image_missing", "registry_unreachable")
    assert error.reason.startswith("cannot pull localhost/mcp-test-nothing:v1: ")


# -------------------------------------------------------------------- containers


async def test_a_created_container_does_not_run(world: World) -> None:
    request = world.request()
    made = await world.engine.create(request)
    assert (made.state, made.name, made.service, made.generation) == ("created", request.name, world.service, 1)
    [listed] = await world.engine.list(world.service)
    assert (listed.state, listed.container_id) == ("created", made.container_id)


async def test_a_started_container_runs_and_says_where(world: World) -> None:
    name = await world.run()
    state = await world.state(name)
    assert (state.state, state.health, state.problem) == ("running", "none", "")
    assert state.ports == {"": "127.0.0.1:10001"}
    assert STAMP.fullmatch(state.started_at)
    assert state.finished_at == ""


async def test_a_container_is_started_once_however_often_that_is_asked(world: World) -> None:
    name = await world.run()
    before = await world.state(name)
    assert await world.engine.start(name) == before


async def test_the_same_container_is_adopted_and_not_made_twice(world: World) -> None:
    made = await world.engine.create(world.request())
    again = await world.engine.create(world.request())
    assert again.container_id == made.container_id
    await world.engine.start(made.name)
    assert (await world.engine.create(world.request())).state == "running"
    assert len(await world.engine.list(world.service)) == 1


async def test_a_container_of_ours_with_another_spec_is_not_taken_over(world: World) -> None:
    request = world.request()
    await world.engine.create(request)
    error = await failure(world.engine.create(attrs.evolve(request, labels=request.labels | {HASH_LABEL: "hash-2"})))
    assert error.code == "name_taken"
    assert [c.spec_hash for c in await world.engine.list(world.service)] == ["hash-1"]


async def test_somebody_elses_container_is_neither_taken_over_nor_removed_nor_stopped(world: World) -> None:
    request = world.request()
    await world.foreign(request.name)
    error = await failure(world.engine.create(request))
    assert (error.code, error.retryable) == ("name_taken", False)
    assert await world.engine.remove(request.name) is False
    assert await world.engine.stop(request.name, 1.0) is None
    assert (await failure(world.engine.create(request))).code == "name_taken"
    assert await world.engine.list(world.service) == []


async def test_no_container_is_made_of_an_image_that_is_not_there(world: World) -> None:
    error = await failure(world.engine.create(world.request(image="localhost/mcp-test-nothing:v1")))
    assert error.code == "image_missing"
    assert await world.engine.list(world.service) == []


async def test_starting_what_is_not_there_fails(world: World) -> None:
    assert (await failure(world.engine.start("mcp.nothing.g1"))).code == "container_missing"


async def test_a_taken_port_is_named_and_leaves_a_container_that_can_be_removed(world: World) -> None:
    port = free_port()
    await world.run(ports=bound(port), component="a")
    second = world.request(ports=bound(port), component="b")
    await world.engine.create(second)
    error = await failure(world.engine.start(second.name))
    assert (error.code, error.retryable) == ("port_in_use", False)
    assert f"127.0.0.1:{port}" in error.reason
    left = await world.state(second.name)
    assert left.state == "created"
    assert left.problem
    assert await world.engine.remove(second.name) is True
    assert len(await world.engine.list(world.service)) == 1


async def test_an_address_that_the_node_has_not_may_come_later(world: World) -> None:
    request = world.request(ports=bound(free_port(), "192.0.2.1"))
    await world.engine.create(request)
    error = await failure(world.engine.start(request.name))
    assert (error.code, error.retryable) == ("address_missing", True)


async def test_a_container_that_is_told_to_stop_stops_at_once(world: World) -> None:
    name = await world.run()
    stopped = await world.took(world.engine.stop(name, 10.0))
    assert (stopped.state, stopped.exit_code) == ("exited", 0)
    assert STAMP.fullmatch(stopped.finished_at)
    assert (await world.engine.stop(name, 10.0)).state == "exited"


async def test_a_container_that_will_not_stop_is_killed_after_its_grace_time(world: World) -> None:
    name = await world.run("stubborn")
    stopped = await world.took(world.engine.stop(name, 1.0))
    assert (stopped.state, stopped.exit_code) == ("exited", 137)


async def test_stopping_what_is_not_there_is_done_already(world: World) -> None:
    assert await world.engine.stop("mcp.nothing.g1", 1.0) is None


async def test_a_stopped_container_starts_again_as_it_was(world: World) -> None:
    name = await world.run()
    before = await world.took(world.engine.stop(name, 10.0))
    after = await world.engine.start(name)
    assert (after.state, after.container_id, after.exit_code) == ("running", before.container_id, 0)


async def test_a_container_is_removed_running_or_not_and_only_once(world: World) -> None:
    running, created = await world.run(component="a"), world.request(component="b")
    await world.engine.create(created)
    assert await world.engine.remove(running) is True
    assert await world.engine.remove(created.name) is True
    assert await world.engine.remove(running) is False
    assert await world.engine.list(world.service) == []


async def test_many_removals_of_one_container_at_once_end_well(world: World) -> None:
    name = await world.run()
    assert any(await asyncio.gather(*(world.engine.remove(name) for _ in range(5))))
    assert await world.engine.list(world.service) == []


async def test_a_container_that_exits_keeps_its_exit_code(world: World) -> None:
    name = await world.run("once")

    async def has_exited() -> bool:
        return bool((await world.state(name)).state == "exited")

    await world.soon("it exits", has_exited)
    state = await world.state(name)
    assert (state.exit_code, state.restarts, state.out_of_memory) == (7, 0, False)


async def test_a_crash_loop_shows_in_the_number_of_restarts(world: World) -> None:
    name = await world.run("crasher", restart="unless-stopped")

    async def has_restarted_twice() -> bool:
        return bool((await world.state(name)).restarts >= 2)

    await world.soon("it is restarted twice", has_restarted_twice)
    said = [line.text for line in await world.lines(name)]
    assert said.count("crasher: fatal: no database") >= 2


async def test_a_crash_loop_can_be_stopped(world: World) -> None:
    name = await world.run("crasher", restart="unless-stopped")
    await world.took(world.engine.stop(name, 5.0))
    assert (await world.state(name)).state == "exited"


async def test_running_out_of_memory_is_told_from_other_ends(world: World) -> None:
    name = await world.run("hog", memory_bytes=16 << 20)

    async def has_exited() -> bool:
        return bool((await world.state(name)).state == "exited")

    await world.soon("it runs out of memory", has_exited)
    state = await world.state(name)
    assert (state.out_of_memory, state.exit_code) == (True, 137)


async def test_a_list_has_the_containers_of_a_service_by_name(world: World) -> None:
    for component in ("c", "a", "b"):
        await world.engine.create(world.request(component=component))
    listed = await world.engine.list(world.service)
    assert [state.component for state in listed] == ["a", "b", "c"]
    assert {state.name for state in listed} <= {state.name for state in await world.engine.list()}
    assert await world.engine.list("nothing") == []


async def test_labels_of_a_generation_can_be_read_back(world: World) -> None:
    await world.engine.create(world.request())
    assert await world.engine.label(world.service, 1, HASH_LABEL) == "hash-1"
    assert await world.engine.label(world.service, 2, HASH_LABEL) == ""
    assert await world.engine.label(world.service, 1, "no.such.label") == ""


# ------------------------------------------------------------------------ output


async def test_a_log_has_whole_lines_in_order_with_streams_and_times(world: World) -> None:
    name = await world.run("talker")

    async def has_said_all() -> bool:
        return len(await world.lines(name)) == 3

    await world.soon("it has said all", has_said_all)
    lines = await world.lines(name)
    assert [(line.stream, line.text) for line in lines] == [
        ("stdout", "first"),
        ("stderr", "second"),
        ("stdout", "third"),
    ]
    assert all(STAMP.fullmatch(line.at) for line in lines)
    assert {(line.component, line.container) for line in lines} == {(world.service, name)}
    assert [line.text for line in await world.lines(name, tail=1)] == ["third"]
    assert await world.lines(name, tail=0) == []
    assert len(await world.lines(name, since_s=3600.0)) == 3


async def test_a_followed_log_ends_with_its_container(world: World) -> None:
    name = await world.run("talker")
    read = Read(world, name)
    await world.soon("its beginning is read", lambda: read.lines)
    await world.took(world.engine.stop(name, 5.0))
    await read.end()
    assert read.texts[0] == "first"


async def test_a_followed_log_ends_when_its_container_is_removed(world: World) -> None:
    name = await world.run("talker")
    read = Read(world, name)
    await world.soon("its beginning is read", lambda: read.lines)
    await world.engine.remove(name)
    await read.end()


async def test_the_log_of_nothing_is_an_error(world: World) -> None:
    assert (await failure(world.lines("mcp.nothing.g1"))).code == "container_missing"


async def test_who_stops_reading_a_log_leaves_nothing_behind(world: World) -> None:
    name = await world.run("talker")
    await world.soon("it runs", lambda: world.lines(name))
    async with aclosing(world.engine.logs(name, follow=True)) as lines:
        assert (await anext(lines)).text == "first"
    assert await world.engine.remove(name) is True


async def test_the_life_of_a_container_is_heard_in_order(world: World) -> None:
    heard = Heard(world.engine)
    await world.soon("events are heard", lambda: heard.actions == ["engine-up"])
    name = await world.run()
    await world.took(world.engine.stop(name, 5.0))
    await world.engine.remove(name)
    await world.soon("all of it is heard", lambda: "destroy" in heard.actions)
    await heard.stop()
    assert heard.actions == ["engine-up", "create", "start", "die", "stop", "destroy"]
    assert {(event.name, event.service) for event in heard.events[1:]} == {(name, world.service)}
    assert heard.events[3].detail == "exit code 0"


async def test_what_happens_to_other_peoples_containers_is_not_heard(world: World) -> None:
    heard = Heard(world.engine)
    await world.soon("events are heard", lambda: heard.actions == ["engine-up"])
    await world.foreign(f"mcp.{world.service}.other.g1")
    await world.engine.create(world.request())
    await world.soon("our own is heard", lambda: "create" in heard.actions)
    await heard.stop()
    assert heard.actions == ["engine-up", "create"]


async def test_a_command_in_a_container_returns_its_exit_code_and_output(world: World) -> None:
    name = await world.run()
    code, said = await world.engine.execute(name, ECHO, 10.0)
    assert (code, sorted(said.split())) == (3, ["err", "out"])


async def test_of_a_commands_output_the_first_4_kib_are_kept(world: World) -> None:
    name = await world.run()
    assert await world.engine.execute(name, LONG, 10.0) == (0, "x" * 4096)


async def test_a_command_that_is_not_there_fails_by_its_exit_code(world: World) -> None:
    name = await world.run()
    code, said = await world.engine.execute(name, ("no-such-command",), 10.0)
    assert code in (126, 127)
    assert "not found" in said


async def test_a_command_that_does_not_end_is_given_up(world: World) -> None:
    name = await world.run("stubborn")
    error = await failure(world.took(world.engine.execute(name, SLEEP, 0.3)))
    assert error.code == "command_timeout"


async def test_no_command_runs_in_a_container_that_does_not_run(world: World) -> None:
    request = world.request()
    await world.engine.create(request)
    assert (await failure(world.engine.execute(request.name, ("true",), 5.0))).code == "not_running"
    assert (await failure(world.engine.execute("mcp.nothing.g1", ("true",), 5.0))).code == "container_missing"
