"""The containers of one service on a node, and the way from what they are to what they shall be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import attrs

from mcp.actors.actor import Alarm
from mcp.actors.in_hand import InHand
from mcp.actors.node_state import NodeState
from mcp.actors.readiness import Readiness
from mcp.model import workload as model
from mcp.model.admission import check_volumes
from mcp.model.container import HASH_LABEL, container_request
from mcp.model.errors import AdapterError, Refused
from mcp.model.messages import ContainerState
from mcp.model.names import container_name
from mcp.model.ports import ContainerRequest, EngineEvent, Intent
from mcp.model.spec import ComponentSpec
from mcp.model.workload import Action, Await, Discard, Goal, Halt, Known, Launch, Make

log = logging.getLogger(__name__)

ROUNDS = 3
ROUND_PAUSE_S = 0.2
"""After an engine's answer was lost: how often it is looked and gone on, and the first pause before (it doubles)."""


class Converger:
    """What is known of a service, and what is done about it for one order at a time."""

    def __init__(self, known: Known, node: NodeState) -> None:
        self.service = known.service
        self.known = known
        self.hand: InHand | None = None
        """The order that is being carried out, if somebody waits for it."""
        self.is_working = False
        """Whether anything is being carried out: then what the containers are is in transit."""
        self.alarm = Alarm()
        """Cuts waits short: the order was abandoned, or the container that is waited for has news."""
        self.awaited: frozenset[str] = frozenset()
        """Containers whose news end a wait."""
        self.news: dict[str, str] = {}
        self.noticed: dict[str, str] = {}
        """Since when components are not as they should be."""
        self.died_s: dict[str, float] = {}
        self._node = node
        self._readiness = Readiness(self, node)
        self._given: dict[int, dict[tuple[str, str], int]] = {}
        self._proven: dict[str, str] = {}

    def begin(self, hand: InHand | None) -> None:
        """Begin with an order."""
        self.hand, self.alarm, self.is_working = hand, Alarm(), True
        self.news.clear()
        if hand:
            hand.on_abandoned = self.alarm.ring
        self.say("at work")

    def end(self) -> None:
        """Be done with it."""
        self.hand, self.is_working = None, False
        self.died_s.clear()

    def believe(self, intent: Intent) -> None:
        """Take in an intent that is in the records."""
        known = attrs.evolve(self.known, highest=max(self.known.highest, intent.generation))
        if intent.is_candidate:
            self.known = attrs.evolve(known, candidate=intent)
        else:
            self.known = attrs.evolve(known, committed=intent)

    def see(self, containers: list[ContainerState]) -> None:
        """Take in what the engine shows of this service."""
        containers = [self._with_proof(c) for c in containers]
        highest = max([self.known.highest, *(c.generation for c in containers)])
        self.known = attrs.evolve(self.known, containers=tuple(containers), highest=highest)
        self.notice()

    def hear(self, event: EngineEvent) -> None:
        """Take in an event of one of the containers; whoever waits for that container looks at once."""
        if event.action in ("die", "oom", "destroy", "health"):
            self.news[event.name] = event.detail
            if event.name in self.awaited:
                self.alarm.ring()
        if event.action == "die":
            self.died_s[event.name] = self._node.clock.monotonic_s()

    def _with_proof(self, container: ContainerState) -> ContainerState:
        """Say healthy where it was seen; a container that was started anew since must be seen again."""
        if container.health == "none" and self.is_as_proven(container):
            return attrs.evolve(container, health="healthy")
        return container

    def notice(self) -> None:
        """Note since when components are not as they should be; while something is being done, none is."""
        wrong = set() if self.is_working else model.drifted(self.known)
        at = self._node.time_of_day()
        self.noticed = {component: self.noticed.get(component, at) for component in wrong}

    def _note(self, state: ContainerState | None) -> None:
        if state is not None:
            others = [c for c in self.known.containers if c.name != state.name]
            self.see(sorted([*others, state], key=lambda c: c.name))

    def _gone(self, name: str) -> None:
        self._proven.pop(name, None)
        self.see([c for c in self.known.containers if c.name != name])

    def is_as_proven(self, container: ContainerState) -> bool:
        """Say whether a container still runs as it did when it was seen healthy."""
        return container.state == "running" and self._proven.get(container.name) == container.started_at

    def prove(self, name: str) -> None:
        """Note that a container was seen healthy."""
        now = next((c for c in self.known.containers if c.name == name), None)
        if now is not None:
            self._proven[name] = now.started_at
            self._note(now)

    async def look(self) -> None:
        """Ask the engine what is there; asking changes nothing, so an answer that was lost is asked for again."""
        for turn in range(ROUNDS):
            try:
                found = await self._node.engine.containers.list(self.service)
            except AdapterError as error:
                self._node.engine.doubt(error)
                if error.code != "engine_down" or turn == ROUNDS - 1:
                    raise
                await self._node.clock.sleep(ROUND_PAUSE_S * 2**turn)
            else:
                self.see(found)
                return

    async def see_once(self) -> None:
        """Ask the engine, unless its events have kept us up to date."""
        if not self._node.engine.is_followed:
            await self.look()

    async def carry_out(self, goal: Goal, generation: int = 0, *, only: frozenset[str] | None = None) -> None:
        """Do what brings the service to a goal; an answer that was lost is followed by a look, not by a repetition.

        Raises:
            AdapterError: the engine or the records failed for good.
            model.WorkFailed: a container did not come up.
        """
        for turn in range(ROUNDS):
            action: Action | None = None
            try:
                if turn:
                    await self.look()
                for action in model.converge(self.known, goal, generation, only=only):
                    self.check_abandoned(goal)
                    self.say(model.describe(action, self.service))
                    await self._do(action)
                return
            except AdapterError as error:
                self._node.engine.doubt(error)
                is_hopeless = turn == ROUNDS - 1 or (turn > 0 and error.code == "engine_frozen")
                if is_hopeless or not error.retryable:
                    if goal == "run" and isinstance(action, Make | Launch):
                        await self._clear_half(action)
                    raise
                log.info("looking again after %s: %s", goal, error.reason, extra={"service": self.service})
            await self._node.clock.sleep(ROUND_PAUSE_S * 2**turn)

    async def _do(self, action: Action) -> None:
        containers = self._node.engine.containers
        match action:
            case Make(component, generation):
                self._note(await self._make(component, generation))
            case Launch(component, generation):
                self._note(await self._launch(component, generation))
            case Await(component, generation):
                await self._readiness.wait(component, generation)
            case Halt(name, grace_s):
                self._note(await containers.stop(name, grace_s))
            case Discard(name):
                await containers.remove(name)
                self._gone(name)

    async def _clear_half(self, action: Make | Launch) -> None:
        """Remove the container that could not be created or started: the rest goes with the undo."""
        name = container_name(self.service, action.component.name, action.generation)
        with suppress(AdapterError):  # the first error is the one to tell
            await self._node.engine.containers.remove(name)
            self._gone(name)

    def check_abandoned(self, goal: Goal | None = None) -> None:
        """Stop here when the order was abandoned, unless the goal is one that must be reached all the same.

        Raises:
            Refused: code abandoned.
        """
        if self.hand and self.hand.is_abandoned and goal in (None, "run", "start", "restart"):
            raise Refused("abandoned", f"{self.service}: abandoned while {self.hand.detail}")

    def say(self, detail: str) -> None:
        """Say what is being done, for whoever follows the order."""
        if self.hand:
            self.hand.detail = detail

    async def keep(self, intent: Intent, ports: dict[tuple[str, str], int] | None = None) -> None:
        """Write an intent down (and ports of it), then believe it."""
        await self._node.records.accept(intent, ports)
        if ports is not None:
            self._given.setdefault(intent.generation, {}).update(ports)
        self.believe(intent)

    @contextmanager
    def taking(self) -> Iterator[dict[tuple[str, str], int]]:
        """Give a place for ports that are taken now and written down inside; when that fails they are free again."""
        taken: dict[tuple[str, str], int] = {}
        are_written = False
        try:
            yield taken
            are_written = True
        finally:
            self._node.ports.settle(set(taken.values()), are_written=are_written)

    def release_ports(self) -> None:
        """Let go of the ports of generations that were forgotten; others may have them a moment later."""
        kept = {intent.generation for intent in self.known.intents}
        self._given = {generation: ports for generation, ports in self._given.items() if generation in kept}
        self._node.ports.is_stale = True

    async def _make(self, component: ComponentSpec, generation: int) -> ContainerState:
        request = await self._request(component, generation)
        try:
            return await self._node.engine.containers.create(request)
        except AdapterError as error:
            if error.code != "image_missing":
                raise
        await self.pull(component.image)
        return await self._node.engine.containers.create(request)

    async def _request(self, component: ComponentSpec, generation: int) -> ContainerRequest:
        intent = self.known.intent(generation)
        assert intent is not None
        check_volumes(
            self.service,
            component,
            self._node.name,
            real_path=self._node.host.real_path,
            own_paths=self._node.own_paths,
        )
        request = container_request(
            intent.spec,
            component,
            generation=generation,
            op=intent.op,
            ports=await self._ports(intent, component),
            defaults=self._node.defaults,
            spec_json=self._node.spec_to_text(intent.spec),
        )
        # A newer master may hash fields that we do not know: its word counts.
        return attrs.evolve(request, labels={**request.labels, HASH_LABEL: intent.spec_hash})

    async def _ports(self, intent: Intent, component: ComponentSpec) -> dict[str, int]:
        """Return the host port of each route: the remembered one while it is free, else another, written down first."""
        given = self._given.get(intent.generation)
        if given is None:
            given = self._given[intent.generation] = await self._node.records.ports_of(self.service, intent.generation)
        with self.taking() as taken:
            for route in component.routes:
                key = (component.name, route.name)
                if key not in given or not self._node.ports.is_free(given[key]):
                    taken[key] = self._node.ports.take()
            if taken:
                await self.keep(intent, taken)
        return {route.name: self._given[intent.generation][component.name, route.name] for route in component.routes}

    async def _launch(self, component: ComponentSpec, generation: int) -> ContainerState:
        """Start a container; when somebody was quicker at a port of a route, make it anew with another port."""
        containers = self._node.engine.containers
        name = container_name(self.service, component.name, generation)
        self.news.pop(name, None)
        self._proven.pop(name, None)
        for _ in range(ROUNDS):
            try:
                return await containers.start(name)
            except AdapterError as error:
                if error.code != "port_in_use" or component.ports or not component.routes:
                    raise
                await containers.remove(name)
                for route in component.routes:
                    self._given.get(generation, {}).pop((component.name, route.name), None)
                self._note(await self._make(component, generation))
        return await containers.start(name)

    async def pull(self, image: str) -> bool:
        """Have an image here; return whether it had to be fetched."""
        self._node.engine.check()
        self.say(f"pulling {image}")

        def progress(what: str, done: int, total: int) -> None:
            share = f" ({done / 1e6:.0f} of {total / 1e6:.0f} MB)" if total else ""
            self.say(f"pulling {what}{share}")

        pulled = await self.alarm.unless_rung(self._node.engine.images.pull(image, progress))
        self.check_abandoned()
        return bool(pulled)
