"""How an engine fails, in memory and for real: what tests on the one learn must hold on the other."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from mcp.adapters.docker import DockerEngine
from mcp.adapters.fake import FakeClock, FakeEngine
from tests.contract.engine_fixtures import BEHAVIOURS, Heard, Read, World, docker_world, failure, name_of
from tests.helpers import soon
from tests.live.engine import START_S, PrivateEngine, private_engine
from tests.live.engine_proxy import cutting

LIMIT_S = 1.0


@attrs.define
class Bad:
    """A world and what can befall its engine."""

    world: World
    freeze: Callable[[], None]
    thaw: Callable[[], None]
    kill: Callable[[], None]
    restart: Callable[[], Awaitable[None]]
    cut: Callable[[str], AbstractAsyncContextManager[Any]]
    """Gives an engine that loses the answer to the first such call, after it acted."""


@pytest.fixture(scope="module")
def private() -> Iterator[PrivateEngine]:
    with private_engine() as engine:
        yield engine


@pytest.fixture(params=["memory", pytest.param("docker", marks=pytest.mark.engine)])
async def bad(request: pytest.FixtureRequest) -> AsyncIterator[Bad]:
    if request.param == "memory":
        fake = FakeEngine(FakeClock(), timeout_s=LIMIT_S)
        yield in_memory(fake)
        await fake.close()
        return
    private: PrivateEngine = request.getfixturevalue("private")
    async with docker_world(private.url) as world:
        engine, world.engine = world.engine, DockerEngine(private.url, request_timeout_s=LIMIT_S)
        try:
            yield real(world, private)
        finally:
            await world.engine.close()
            world.engine = engine
            private.repair()


def in_memory(fake: FakeEngine) -> Bad:
    fake.images |= {name_of(kind): behaviour for kind, behaviour in BEHAVIOURS.items()}

    async def foreign(name: str) -> None:
        fake.foreign.add(name)

    async def restart() -> None:
        fake.come_up()

    @asynccontextmanager
    async def cut(call: str) -> AsyncIterator[FakeEngine]:
        fake.cut_next(call, after_effect=True)
        yield fake

    clock: Any = fake._clock
    world = World(engine=fake, node="n1", service="web", network="", foreign=foreign, clock=clock)
    return Bad(world=world, freeze=fake.freeze, thaw=fake.thaw, kill=fake.go_down, restart=restart, cut=cut)


def real(world: World, private: PrivateEngine) -> Bad:
    async def restart() -> None:
        private.spawn()
        await soon("the engine is up again", private.answers, START_S)

    @asynccontextmanager
    async def cut(call: str) -> AsyncIterator[DockerEngine]:
        path = {"create": b"/containers/create", "start": b"/start", "stop": b"/stop"}[call]
        with tempfile.TemporaryDirectory(prefix="mcp-") as folder:
            async with cutting(private.socket, Path(folder), path) as url:
                engine = DockerEngine(url, request_timeout_s=5 * LIMIT_S)
                try:
                    yield engine
                finally:
                    await engine.close()

    return Bad(world=world, freeze=private.freeze, thaw=private.thaw, kill=private.kill, restart=restart, cut=cut)


async def test_a_frozen_engine_answers_no_call_and_every_call_ends(bad: Bad) -> None:
    name = await bad.world.run()
    engine = bad.world.engine
    bad.freeze()
    for call in (engine.facts(), engine.list(), engine.start(name), engine.stop(name, 5.0), engine.remove(name)):
        error = await failure(bad.world.took(call))
        assert (error.code, error.retryable) == ("engine_frozen", True)
    assert "does not answer" in (await bad.world.took(engine.describe("localhost/none:v1"))).error


async def test_what_a_frozen_engine_is_asked_happens_when_nobody_waits_any_more(bad: Bad) -> None:
    request = bad.world.request(network="")
    await bad.world.engine.facts()
    bad.freeze()
    assert (await failure(bad.world.took(bad.world.engine.create(request)))).code == "engine_frozen"
    bad.thaw()

    async def is_there() -> bool:
        return bool(await bad.world.state(request.name))

    await bad.world.soon("it has happened", is_there)
    assert (await bad.world.engine.create(request)).state == "created"
    assert len(await bad.world.engine.list(bad.world.service)) == 1


async def test_events_of_a_frozen_engine_come_when_it_goes_on(bad: Bad) -> None:
    heard = Heard(bad.world.engine)
    await bad.world.soon("events are heard", lambda: heard.actions == ["engine-up"])
    bad.freeze()
    assert (await failure(bad.world.took(bad.world.engine.facts()))).code == "engine_frozen"
    bad.thaw()
    await bad.world.engine.create(bad.world.request())
    await bad.world.soon("it is heard", lambda: "create" in heard.actions)
    assert heard.actions == ["engine-up", "create"]
    await heard.stop()


async def test_a_dead_engine_fails_every_call_at_once_and_is_heard_to_go_and_to_come_back(bad: Bad) -> None:
    heard = Heard(bad.world.engine)
    await bad.world.soon("events are heard", lambda: heard.actions == ["engine-up"])
    bad.kill()
    for call in (bad.world.engine.facts(), bad.world.engine.list(), bad.world.engine.create(bad.world.request())):
        error = await failure(asyncio.wait_for(call, LIMIT_S))
        assert (error.code, error.retryable) == ("engine_down", True)
    await bad.world.soon("it is heard", lambda: heard.actions == ["engine-up", "engine-down"])
    await bad.restart()
    await bad.world.soon("it is heard", lambda: heard.actions == ["engine-up", "engine-down", "engine-up"])
    name = await bad.world.run()
    await bad.world.soon("its life is heard", lambda: heard.actions[3:] == ["create", "start"])
    assert (await bad.world.state(name)).state == "running"
    await heard.stop()


async def test_who_begins_to_listen_to_a_dead_engine_hears_that_first(bad: Bad) -> None:
    bad.kill()
    heard = Heard(bad.world.engine)
    await bad.world.soon("it is heard", lambda: heard.actions == ["engine-down"])
    assert heard.events[0].detail
    await bad.restart()
    await bad.world.soon("it is heard", lambda: heard.actions == ["engine-down", "engine-up"])
    await heard.stop()


async def test_after_a_crash_only_containers_that_are_always_to_run_come_back_by_themselves(bad: Bad) -> None:
    names = {
        policy: await bad.world.run(component=policy, restart=policy) for policy in ("always", "unless-stopped", "no")
    }
    bad.kill()
    await bad.restart()

    async def is_back() -> bool:
        return bool((await bad.world.state(names["always"])).state == "running")

    await bad.world.soon("it is back", is_back)
    assert (await bad.world.state(names["unless-stopped"])).state == "exited"
    assert (await bad.world.state(names["no"])).state == "exited"
    assert (await bad.world.engine.start(names["unless-stopped"])).state == "running"


async def test_a_followed_log_ends_with_an_error_when_the_engine_dies(bad: Bad) -> None:
    read = Read(bad.world, await bad.world.run("talker"))
    await bad.world.soon("its beginning is read", lambda: read.lines)
    bad.kill()
    assert (await failure(read.end())).code == "engine_down"


ENDS = {"create": "created", "start": "running", "stop": "exited"}
"""Not remove: the HTTP library repeats a DELETE by itself."""


@pytest.mark.parametrize("call", list(ENDS))
async def test_a_call_whose_answer_was_lost_was_carried_out_and_may_be_repeated(bad: Bad, call: str) -> None:
    request = bad.world.request()
    if call != "create":
        await bad.world.run()
    if call == "start":
        await bad.world.took(bad.world.engine.stop(request.name, 5.0))
    async with bad.cut(call) as engine:

        def doing() -> Awaitable[object]:
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "create": lambda: engine.create(request),
                "start": lambda: engine.start(request.name),
                "stop": lambda: engine.stop(request.name, 5.0),
            }
            return calls[call]()

        assert (await failure(bad.world.took(doing()))).code == "engine_down"

        async def was_carried_out() -> bool:
            state = await bad.world.state(request.name)
            return bool((state.state if state else None) == ENDS[call])

        await bad.world.soon("it is carried out", was_carried_out)
        await bad.world.took(doing())
        assert await was_carried_out()
