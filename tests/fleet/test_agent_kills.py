"""An agent that is killed before and after each of its calls to the world: asked again, it ends whole, with one copy and no leftover."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import attrs
import pytest

from mcp.adapters.fake import Behaviour
from mcp.bus.calls import CallFailed
from mcp.model.messages import (
    CommitWorkload,
    DropWorkload,
    PullImages,
    RemoveWorkload,
    RestartWorkload,
    RunWorkload,
    StartWorkload,
    StopWorkload,
    TakeInventory,
)
from mcp.model.spec import FixedPort, HealthSpec
from tests.agent_world import Life, World, component, run, service

pytestmark = pytest.mark.slow

STOPS_FIRST: dict[str, Any] = {"ports": (FixedPort(host_port=80, container_port=80),)}


@attrs.frozen(kw_only=True)
class Story:
    """What is there, what the master then asks for (again and again until it is answered), and how it must end."""

    asks: tuple[tuple[Any, str], ...]
    ends: dict[str, str]
    generation: int
    spec: Any
    is_never_away: bool = True
    """Whether some copy runs at every moment."""


PLAIN, FIXED = service(component()), service(component(**STOPS_FIRST))
PAIR = service(component("db"), component("api"))
SICK: dict[str, Any] = {"image": "sick:1", "health": HealthSpec(timeout_s=0.05)}
BROKEN = service(component(**SICK))
BROKEN_FIXED = service(component(**SICK, **STOPS_FIRST))

STORIES = {
    "a deploy": Story(
        spec=PLAIN,
        asks=(
            (PullImages(service="web", images=("web:1",)), "d2"), (run(2, PLAIN), "d2"), (CommitWorkload(service="web", generation=2), "d2"),
        ),
        ends={"mcp.web.g2": "running"}, generation=2,
    ),
    "a deploy of two components": Story(
        spec=PAIR, asks=((run(2, PAIR), "d2"), (CommitWorkload(service="web", generation=2), "d2")),
        ends={"mcp.web.db.g2": "running", "mcp.web.api.g2": "running"}, generation=2,
    ),
    "a deploy that stops first": Story(
        spec=FIXED, asks=((run(2, FIXED), "d2"), (CommitWorkload(service="web", generation=2), "d2")),
        ends={"mcp.web.g2": "running"}, generation=2, is_never_away=False,
    ),
    "a deploy that fails": Story(
        spec=PLAIN, asks=((run(2, BROKEN), "d2"), (DropWorkload(service="web", generation=2), "d2")),
        ends={"mcp.web.g1": "running"}, generation=1,
    ),
    "a deploy that stops first and fails": Story(
        spec=FIXED, asks=((run(2, BROKEN_FIXED), "d2"), (DropWorkload(service="web", generation=2), "d2")),
        ends={"mcp.web.g1": "running"}, generation=1, is_never_away=False,
    ),
    "a deploy that is undone although it was well": Story(
        spec=PLAIN, asks=((run(2, PLAIN), "d2"), (DropWorkload(service="web", generation=2), "d2")),
        ends={"mcp.web.g1": "running"}, generation=1,
    ),
    "a deploy in place of one that nobody finished": Story(
        spec=PLAIN, asks=((run(2, PLAIN), "d2"), (run(3, PLAIN), "d3"), (CommitWorkload(service="web", generation=3), "d3")),
        ends={"mcp.web.g3": "running"}, generation=3,
    ),
    "a removal": Story(
        spec=PAIR, asks=((RemoveWorkload(service="web", generation=1), "r1"),), ends={}, generation=0, is_never_away=False,
    ),
    "a removal in the middle of a deploy": Story(
        spec=PLAIN, asks=((run(2, PLAIN), "d2"), (RemoveWorkload(service="web", generation=2), "r1")),
        ends={}, generation=0, is_never_away=False,
    ),
    "a stop and a start": Story(
        spec=PAIR, asks=((StopWorkload(service="web", generation=1), "s1"), (StartWorkload(service="web", generation=1), "s2")),
        ends={"mcp.web.db.g1": "running", "mcp.web.api.g1": "running"}, generation=1, is_never_away=False,
    ),
    "a stop": Story(
        spec=PLAIN, asks=((StopWorkload(service="web", generation=1), "s1"),), ends={"mcp.web.g1": "exited"}, generation=1,
        is_never_away=False,
    ),
    "a restart": Story(
        spec=PLAIN, asks=((RestartWorkload(service="web", generation=1), "s1"),), ends={"mcp.web.g1": "running"}, generation=1,
        is_never_away=False,
    ),
}  # fmt: skip


class Play:
    """One story in a world where the agent dies at chosen points."""

    def __init__(self, story: Story, *deaths: int, same_master: bool = True) -> None:
        self.story = story
        self.same_master = same_master
        """Whether the master that asked asks again; a new one knows only what the inventory tells."""
        self.deaths = list(deaths)
        self.world = World()
        self.lived: list[int] = []
        """How many points each life passed."""

    async def run(self) -> None:
        """Play it to its end and look whether it ended well."""
        world = self.world
        world.engine.images["sick:1"] = Behaviour(is_local=True, ready_after_s=float("inf"))
        await world.open()
        await world.boot()
        await world.deployed(1, self.story.spec)
        await world.lives[-1].end()
        try:
            await self._live_and_die()
            if self.same_master:
                assert self.world.states() == self.story.ends
                assert [i.generation for i in await self.world.records.intents()] == [self.story.generation][
                    : len(self.story.ends)
                ]
            await self._look_at_the_end()
        finally:
            for life in world.lives:
                await life.end()

    async def _live_and_die(self) -> None:
        open_asks = list(self.story.asks)
        while open_asks:
            life = await self.world.boot(self.deaths.pop(0) if self.deaths else 0)
            script = asyncio.ensure_future(self._ask(open_asks))
            await self.world.clock.advance_until(lambda: script.done() or life.death.is_dead)  # noqa: B023 - awaited here
            if not life.death.is_dead:
                await script
            await self._bury(life, script)
            if not self.same_master:
                break
        await self.world.boot()
        await self.world.clock.advance(5)
        if not self.same_master:
            await self._take_up()

    async def _take_up(self) -> None:
        """Do what a new master does with an unfinished deploy: ask for the same again, then finish or undo it."""
        inventory = await self.world.asked(TakeInventory())
        for record in inventory.services:
            if candidate := record.candidate:
                about = {"service": record.service, "generation": candidate.generation}
                again = RunWorkload(spec=candidate.spec, spec_hash=candidate.spec_hash, **about)
                try:
                    await self.world.asked(again, op=candidate.op)
                except CallFailed:
                    await self.world.asked(DropWorkload(**about), op=candidate.op)
                else:
                    await self.world.asked(CommitWorkload(**about), op=candidate.op)

    async def _bury(self, life: Life, script: asyncio.Future[None]) -> None:
        self.lived.append(life.death.points)
        script.cancel()
        with suppress(asyncio.CancelledError):
            await script
        await self.world.kill()
        if self.story.is_never_away:
            running = [name for name, state in self.world.states().items() if state == "running"]
            assert any(
                len([n for n in running if n.endswith(f".g{g}")]) >= len(self.story.spec.components) for g in (1, 2, 3)
            )

    async def _ask(self, open_asks: list[tuple[Any, str]]) -> None:
        """Ask in order; what was answered, well or not, is not asked again."""
        while open_asks:
            message, op = open_asks[0]
            with suppress(CallFailed):
                await self.world.order(message, op)
            open_asks.pop(0)

    async def _look_at_the_end(self) -> None:
        """There is one generation or none, whole, and nothing that nobody accounts for."""
        world = self.world
        intents = await world.records.intents()
        assert len(intents) <= 1
        assert {c.generation for c in world.containers().values()} <= {i.generation for i in intents}
        for intent in intents:
            assert not intent.is_candidate
            if intent.desired == "running":
                assert list(world.states().values()) == ["running"] * len(intent.spec.components)
        ports = {p.rpartition(":")[2] for c in world.containers().values() for p in c.ports.values()}
        assert ports <= {str(port) for port in await world.records.ports()}
        assert bool(intents) == bool(await world.records.ports())
        told = await world.asked(TakeInventory())
        assert [(r.generation, r.candidate, r.problems) for r in told.services] == [
            (i.generation, None, ()) for i in intents
        ]
        assert told.orphans == ()


async def everywhere(name: str, *, same_master: bool) -> int:
    """Play a story once for each point at which the first life may end, and return how many there are."""
    at = 1
    while True:
        play = Play(STORIES[name], at, same_master=same_master)
        try:
            await play.run()
        except Exception as error:
            raise AssertionError(f"{name}, killed at point {at}: {error!r}") from error
        if play.lived[0] < at:
            return at - 1
        at += 1


TOLD_APART = (
    "a deploy",
    "a deploy that stops first and fails",
    "a deploy in place of one that nobody finished",
    "a removal in the middle of a deploy",
    "a stop and a start",
)
"""Stories in which it makes a difference who asks; the others would only be played twice."""


@pytest.mark.parametrize("name", TOLD_APART)
async def test_killed_anywhere_and_asked_again_it_ends_as_asked(name: str) -> None:
    assert await everywhere(name, same_master=True) > 15


@pytest.mark.parametrize("name", STORIES)
async def test_killed_anywhere_and_met_by_a_new_master_it_ends_whole(name: str) -> None:
    assert await everywhere(name, same_master=False) > 15


@pytest.mark.parametrize("name", ["a deploy", "a removal in the middle of a deploy"])
async def test_killed_again_while_it_recovers_it_ends_as_asked(name: str) -> None:
    at = 1
    while True:
        deaths = (at, 1 + at // 2, 1 + at // 3)
        play = Play(STORIES[name], *deaths)
        try:
            await play.run()
        except Exception as error:
            raise AssertionError(f"{name}, killed at points {deaths}: {error!r}") from error
        if play.lived[0] < at:
            return
        at += 1
