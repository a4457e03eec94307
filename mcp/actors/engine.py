"""The container engine as an agent sees it: whether it answers, since when its events have been heard, and the ports to it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from mcp.actors.actor import Alarm
from mcp.model.errors import AdapterError, Refused
from mcp.model.messages import ContainerState, EngineState
from mcp.model.ports import Clock, ContainerOutput, Containers, EngineEvent, Images

log = logging.getLogger(__name__)

PING_S = 5.0
"""How often a silent engine is asked whether it still answers: a frozen one ends no stream."""

PING_DOWN_S = 0.5
"""How often one that is away is asked whether it is back."""

AWAY = {"engine_down": "down", "engine_frozen": "frozen"}
"""Codes of errors that say more of the engine than of what was asked."""


class Engine:
    """One engine, or none by design."""

    def __init__(self, node: str, parts: tuple[Images, Containers, ContainerOutput] | None, clock: Clock) -> None:
        self.state: EngineState = "none" if parts is None else "down"
        self.reason = "" if parts is None else "it has not answered since this agent started"
        self.version = ""
        self.has_looked = False
        """Whether our containers were ever listed."""
        self.is_heard = False
        """Whether its events are being heard."""
        self.is_followed = False
        """Whether our containers were listed and every event since was heard: then what we know is what is."""
        self.on_change: Callable[[EngineState, EngineState], None] = _unheard
        """Told the old and the new state."""
        self.on_event: Callable[[EngineEvent], None] = _unheard
        """Told what happened to a container of ours."""
        self.on_followed: Callable[[], None] = _unheard
        """Told that events are heard from now on: time to list."""
        self._node = node
        self._parts = parts
        self._clock = clock
        self._hurry = Alarm()

    # ---------------------------------------------------------------------- ports

    @property
    def images(self) -> Images:
        """What the engine knows of images."""
        return self._need()[0]

    @property
    def containers(self) -> Containers:
        """The engine's containers."""
        return self._need()[1]

    @property
    def output(self) -> ContainerOutput:
        """What the engine's containers say and do."""
        return self._need()[2]

    def _need(self) -> tuple[Images, Containers, ContainerOutput]:
        if self._parts is None:
            raise Refused("no_engine", f"{self._node} has no container engine and runs no containers: nothing was done")
        return self._parts

    def check(self) -> None:
        """Let an order pass only when the engine answers, so that it is refused at once and not after a time limit.

        Raises:
            Refused: code no_engine.
            AdapterError: code engine_down or engine_frozen.
        """
        self._need()
        if self.state != "up":
            raise AdapterError(
                f"the container engine of {self._node} is {self.state}: {self.reason}",
                retryable=True,
                code=f"engine_{self.state}",
                hint=f"`systemctl status docker` on {self._node}.",
            )

    def doubt(self, error: AdapterError) -> None:
        """Ask at once whether the engine answers, after an error that says it may not."""
        if error.code in AWAY:
            self._hurry.ring()

    async def list_all(self) -> list[ContainerState]:
        """Return all containers of ours; from then on events keep us up to date, if they are heard.

        Raises:
            AdapterError: the engine is away.
        """
        was_heard = self.is_heard
        found = await self.containers.list()
        self.has_looked = True
        self.is_followed = was_heard and self.is_heard
        return found

    # ------------------------------------------------------------------- watching

    async def watch(self) -> None:
        """Ask for ever whether the engine answers."""
        while True:
            await self.ping()
            await self._hurry.unless_rung(self._clock.sleep(PING_S if self.state == "up" else PING_DOWN_S))

    async def ping(self) -> None:
        """Ask once."""
        try:
            facts = await self.containers.facts()
        except AdapterError as error:
            # Whatever it says instead of an answer, it is of no use now.
            self._set("frozen" if error.code == "engine_frozen" else "down", error.reason)
        else:
            self.version = facts.version
            self._set("up", "")

    async def follow(self) -> None:
        """Hear events for ever."""
        while True:
            try:
                async for event in self.output.events():
                    self._hear(event)
            except AdapterError as error:
                log.warning("the engine's events broke off: %s", error.reason)
            self.is_heard = self.is_followed = False
            await self._clock.sleep(PING_DOWN_S)

    def _hear(self, event: EngineEvent) -> None:
        if event.action == "engine-down":
            self.is_heard = self.is_followed = False
            self._set("down", event.detail or "its event stream ended")
            self._hurry.ring()
        elif event.action == "engine-up":
            self.is_heard = True
            self._set("up", "")
            self.on_followed()
        else:
            self.on_event(event)

    def _set(self, state: EngineState, reason: str) -> None:
        was, self.state, self.reason = self.state, state, reason
        if was != state:
            level = logging.WARNING if self.has_looked or state != "up" else logging.INFO
            log.log(level, "container engine is %s (was %s)", state, was, extra={"node": self._node, "reason": reason})
            self.on_change(was, state)


def _unheard(*_: object) -> None:
    """Nobody wants to know."""
