"""Waiting until a container is healthy: soon when it is quick, at once when it ends, never for ever."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from mcp.actors.node_state import NodeState
from mcp.model import workload as model
from mcp.model.errors import AdapterError
from mcp.model.messages import ContainerState
from mcp.model.spec import ComponentSpec

if TYPE_CHECKING:
    from mcp.actors.converger import Converger

FIRST_CHECK_S = 0.01
CHECK_GROWTH = 0.25
"""A container is checked again after a quarter of the time it has had: so the last wait is at most that share of its start."""

CHECK_COMMAND_S = 5.0
LOOK_EVERY_S = 2.0
"""How often the engine is asked while a container comes up, in case an event was lost."""

LAST_LINES = 20
LINE_LIMIT = 1000
LOG_WAIT_S = 2.0


class Readiness:
    """The health of the containers of one service while they come up."""

    def __init__(self, body: Converger, node: NodeState) -> None:
        self._body = body
        self._node = node

    async def wait(self, component: ComponentSpec, generation: int) -> None:
        """Wait until a container answers as its definition says; its end, or that of one before it, ends the wait at once.

        Raises:
            model.WorkFailed: it exited, or was not healthy in time; with its last lines.
        """
        began = self._body.known.container(generation, component.name)
        assert began is not None
        self._body.awaited = frozenset(c.name for c in self._body.known.containers if c.generation == generation)
        try:
            await self._watch(component, began)
        finally:
            self._body.awaited = frozenset()

    async def _watch(self, component: ComponentSpec, began: ContainerState) -> None:
        """Check again and again, and look whenever there is news."""
        clock = self._node.clock
        began_s = looked_s = clock.monotonic_s()
        while True:
            self._body.check_abandoned()
            if self._body.awaited & self._body.news.keys() or clock.monotonic_s() - looked_s >= LOOK_EVERY_S:
                looked_s = clock.monotonic_s()
                news = dict(self._body.news)
                self._body.news.clear()
                await self._body.look()
                await self._check_others(component, began, looked_s - began_s)
                if await self._is_completed(component, began, looked_s - began_s, news.get(began.name, "")):
                    return
            seen = await self._body.alarm.unless_rung(self._check(component, began, clock.monotonic_s() - began_s))
            if seen is None:
                continue  # there is news: look first
            if not seen:
                self._body.prove(began.name)
                return
            waited_s = clock.monotonic_s() - began_s
            if waited_s >= component.health.timeout_s:
                lines = await self._last_lines(began.name)
                raise model.unhealthy(self._now(began), self._node.name, waited_s, seen, lines)
            left_s = component.health.timeout_s - waited_s
            pause_s = min(
                max(FIRST_CHECK_S, waited_s * CHECK_GROWTH), component.health.interval_s, max(left_s, FIRST_CHECK_S)
            )
            await self._body.alarm.unless_rung(clock.sleep(pause_s))

    async def _check_others(self, component: ComponentSpec, began: ContainerState, after_s: float) -> None:
        """See that the components before this one still run.

        Raises:
            model.WorkFailed: one has ended.
        """
        intent = self._body.known.intent(began.generation)
        for other in intent.spec.components if intent else ():
            if other.name == component.name:
                return
            container = self._body.known.container(began.generation, other.name)
            if container and not self._body.is_as_proven(container) and not model.is_completed(other, container):
                raise model.exited(container, self._node.name, after_s, await self._last_lines(container.name))

    async def _is_completed(self, component: ComponentSpec, began: ContainerState, after_s: float, died: str) -> bool:
        """Say whether the container has ended well already, as some are meant to; `died` is what its last event said.

        Raises:
            model.WorkFailed: it has ended badly, or is gone.
        """
        now = self._now(began)
        if now.state == "running" and (now.started_at, now.restarts) == (began.started_at, began.restarts):
            return False
        if model.is_completed(component, now):
            return True
        code = died.rpartition(" ")[2]
        if now.state == "running" and code.isdigit():  # the engine has restarted it already
            now = attrs.evolve(now, exit_code=int(code))
        raise model.exited(now, self._node.name, after_s, await self._last_lines(began.name))

    def _now(self, began: ContainerState) -> ContainerState:
        return next(
            (c for c in self._body.known.containers if c.name == began.name), attrs.evolve(began, state="missing")
        )

    async def _check(self, component: ComponentSpec, container: ContainerState, waited_s: float) -> str:
        health = component.health
        if health.cmd:
            return await self._check_command(health.cmd, container.name)
        target = self._target(component, container)
        if target:
            speaks_http = bool(component.routes) and component.routes[0].mode == "l7"
            return await self._node.checks.check(health, *target, speaks_http=speaks_http)
        own = self._now(container).health
        if own in ("starting", "unhealthy"):
            return f"the image's own check says {own}"
        return "" if own == "healthy" or waited_s >= health.interval_s else f"it has run for {waited_s:.1f} s"

    async def _check_command(self, cmd: tuple[str, ...], name: str) -> str:
        try:
            code, said = await self._node.engine.output.execute(name, cmd, CHECK_COMMAND_S)
        except AdapterError as error:
            return error.reason
        return "" if code == 0 else f"{cmd[0]} exited with code {code}: {said.strip()[:200]}"

    def _target(self, component: ComponentSpec, container: ContainerState) -> tuple[str, int] | None:
        """Return where to knock: the first route's port, else the first fixed one."""
        if component.routes and (bound := container.ports.get(component.routes[0].name)):
            address, _, port = bound.rpartition(":")
            return address.strip("[]"), int(port)
        for fixed in component.ports:
            if fixed.protocol == "tcp":
                address = fixed.address.strip("[]") or self._node.defaults.publish_address
                return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address), fixed.host_port  # noqa: S104 - not bound here
        return None

    async def _last_lines(self, name: str) -> list[str]:
        lines: list[str] = []
        with suppress(AdapterError, TimeoutError):  # what could be read is better than another error
            async with asyncio.timeout(LOG_WAIT_S):
                async for line in self._node.engine.output.logs(name, tail=LAST_LINES):
                    lines.append(line.text[:LINE_LIMIT])  # noqa: PERF401 - those that came before a time-out count
        return lines[-LAST_LINES:]
