"""The workload actor: one service on one node. Its orders are done one after the other, each may be asked again.

An intent is on disk before anything is done for it; what was answered is on disk too, so the same order again, from the same
master or its successor, gets the same answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import attrs

from mcp.actors.actor import LATER, Actor, Envelope, Later, handles
from mcp.actors.node_state import NodeState
from mcp.bus import codec
from mcp.model.container import container_request
from mcp.model.errors import AdapterError, McpError, Refused
from mcp.model.messages import (
    CommitWorkload,
    ContainerLog,
    ContainerState,
    Done,
    DropWorkload,
    Failed,
    ImagesPulled,
    OperationRecord,
    PullImages,
    RemoveWorkload,
    RestartWorkload,
    RunWorkload,
    ServiceRecord,
    StartWorkload,
    StopWorkload,
    Working,
    WorkloadRunning,
)
from mcp.model.ports import Intent
from mcp.model.saga import StepFailed
from mcp.model.spec import ComponentSpec, ServiceSpec
from mcp.model.workload import Intents, older_than, to_do

log = logging.getLogger(__name__)

SIGN_OF_LIFE_S = 2.0
"""How often the master hears that an order is being worked on."""

LOG_LINES = 20
"""Last lines of a failing container that travel with the error."""

FIRST_CHECK_S = 0.01
"""A fast container is healthy within milliseconds: look soon, then less and less often, up to the definition's interval."""

RETRY_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Waits between attempts to bring back what should run (an address that is missing at boot, an engine that starts)."""

_JOURNALED = (RunWorkload, CommitWorkload, DropWorkload, RemoveWorkload, StopWorkload, StartWorkload, RestartWorkload)


@attrs.frozen
class Converge:
    """Bring back what should run."""

    attempt: int = 0


class WorkloadActor(Actor):
    """Everything that is done for one service on this node."""

    def __init__(self, service: str, node: NodeState) -> None:
        super().__init__(f"{node.name}/{service}")
        self.service = service
        self._node = node
        self._detail = ""
        self._abandoned: set[str] = set()
        self.is_busy = False

    def abandon(self, op: str) -> None:
        """Stop working on an operation at the next safe point."""
        self._abandoned.add(op)

    # ----------------------------------------------------------------- answers

    async def _handle(self, envelope: Envelope) -> None:
        if envelope.slot is None:
            await super()._handle(envelope)
            return
        if answered := await self._answered_before(envelope):
            await self._say_again(envelope, answered)
            return
        self.is_busy = True
        life = asyncio.ensure_future(self._sign_of_life(envelope))
        try:
            await super()._handle(envelope)
        finally:
            life.cancel()
            self.is_busy = False
            self._abandoned.discard(envelope.op)

    async def _sign_of_life(self, envelope: Envelope) -> None:
        while envelope.slot:
            await self._node.clock.sleep(SIGN_OF_LIFE_S)
            await envelope.slot.progress(Working(detail=self._detail))

    async def _show(self, detail: str, done: int = 0, total: int = 0) -> None:
        self._detail = detail
        if self.current and self.current.slot:
            await self.current.slot.progress(Working(detail=detail, done=done, total=total))

    async def on_done(self, envelope: Envelope, reply: Any) -> None:
        """Remember the answer, tell what changed, then give the answer: whoever reads it may look at the fleet next."""
        if not isinstance(reply, WorkloadRunning):
            await self._node.refresh(self.service)
        await self._remember(envelope, "final", reply, "done", "")
        await super().on_done(envelope, reply)

    async def on_failed(self, envelope: Envelope, failed: Failed) -> None:
        """Remember the failure, then tell it; one that a later try may mend is not held against it."""
        await self._node.refresh(self.service)
        if not failed.retryable:
            await self._remember(envelope, "error", failed, "failed", failed.reason)
        await super().on_failed(envelope, failed)

    async def _remember(self, envelope: Envelope, frame: str, message: Any, outcome: str, detail: str) -> None:
        if not isinstance(envelope.message, _JOURNALED):
            return
        record = OperationRecord(
            op=envelope.op,
            service=self.service,
            kind=codec.declared(type(envelope.message)).kind,
            generation=envelope.message.generation,
            outcome=outcome,
            detail=detail[:300],
            ended_at=self._node.now_text(),
        )
        kind = codec.declared(type(message)).kind
        try:
            await self._node.records.finish(record, f"{frame} {kind}\n".encode() + codec.encode(message))
        except AdapterError as error:
            # The work is done and its intent is on disk; without this note a repeated order does it again, which is harmless.
            log.warning("the end of an order could not be recorded: %s", error.reason, extra={"op": envelope.op})

    async def _answered_before(self, envelope: Envelope) -> bytes | None:
        if not envelope.op or not isinstance(envelope.message, _JOURNALED):
            return None
        key = f"{envelope.op}/{codec.declared(type(envelope.message)).kind}"
        try:
            return await self._node.records.finished(key)
        except AdapterError:
            return None  # do it again instead: every order may be asked twice

    async def _say_again(self, envelope: Envelope, answered: bytes) -> None:
        assert envelope.slot is not None
        head, _, body = answered.partition(b"\n")
        frame, kind = head.decode().split(" ")
        message = codec.decode(kind, body)
        if frame == "final":
            await envelope.slot.final(message)
        else:
            await envelope.slot.failed(message)

    # ------------------------------------------------------------------ orders

    @handles
    async def on_pull_images(self, order: PullImages) -> ImagesPulled:
        """Have the images here."""
        pulled = []
        loop = asyncio.get_running_loop()
        for image in order.images:
            await self._show(f"pulling {image}")

            def progress(detail: str, done: int, total: int) -> None:
                loop.create_task(self._show(detail, done, total))

            if await self._node.images().pull(image, progress):
                pulled.append(image)
        highest = await self._node.records.highest_generation(self.service)
        return ImagesPulled(pulled=tuple(pulled), highest_generation=highest)

    @handles
    async def on_run_workload(self, order: RunWorkload) -> WorkloadRunning:
        """Start a generation beside the one that runs and wait until it is healthy."""
        engine, intents = self._node.containers(), self._intents()
        intent = await self._accept(order, intents)
        ports = await self._node.records.ports_of(self.service, order.generation)
        containers = await engine.list(self.service)
        if order.spec.stops_first and order.spec.active:
            for old in older_than(order.generation, containers):
                await self._show(f"stopping {old.name}")
                await engine.stop(old.name, self._grace_s(old))
        await self._bring_up(intent, containers, ports)
        self._node.ready.add((self.service, order.generation))
        return WorkloadRunning(record=await self._record())

    async def _accept(self, order: RunWorkload, intents: Intents) -> Intent:
        """Write the intent and its ports down, before anything is done.

        Raises:
            Refused: something newer was accepted, or this generation was taken back.
            AdapterError: no free port, or the records could not be written: nothing was accepted.
        """
        known = next((i for i in (intents.candidate, intents.own) if i and i.generation == order.generation), None)
        if known is not None and known.spec_hash == order.spec_hash:
            return known
        highest = await self._node.records.highest_generation(self.service)
        if order.generation <= highest:
            raise Refused(
                "stale_generation",
                f"cannot run generation {order.generation} of {self.service} on {self._node.name}: {highest} was accepted before",
            )
        intent = Intent(
            service=self.service,
            op=self.current.op if self.current else "",
            generation=order.generation,
            spec=order.spec,
            spec_hash=order.spec_hash,
            desired="running" if order.spec.active else "stopped",
            is_candidate=True,
        )
        ports = await self._node.choose_ports(order.spec)
        await self._node.accept(intent, ports)
        return intent

    @handles
    async def on_commit_workload(self, order: CommitWorkload) -> Done:
        """Make the generation the service's own and remove what is older."""
        intents = self._intents()
        own, candidate = intents.own, intents.candidate
        if candidate and candidate.generation == order.generation:
            await self._node.commit(self.service, order.generation)
        elif own is None or own.generation != order.generation:
            raise Refused(
                "no_such_generation",
                f"cannot commit generation {order.generation} of {self.service} on {self._node.name}: it has "
                f"{own.generation if own else 'none'}",
            )
        old = older_than(order.generation, await self._node.containers().list(self.service))
        await self._retire(old)
        return Done(changed=bool(old) or candidate is not None)

    @handles
    async def on_drop_workload(self, order: DropWorkload) -> Done:
        """Take a candidate back; what it had to stop is started again."""
        intents, engine = self._intents(), self._node.containers()
        if intents.own and intents.own.generation == order.generation:
            raise Refused("committed", f"generation {order.generation} of {self.service} is its own now and cannot be dropped")
        containers = await engine.list(self.service)
        mine = [c for c in containers if c.generation == order.generation]
        for container in mine:
            await self._show(f"removing {container.name}")
            await engine.remove(container.name)
        await self._node.forget(self.service, order.generation, candidate_only=True)
        own = intents.own
        if own and own.desired == "running" and intents.candidate and intents.candidate.spec.stops_first:
            ports = await self._node.records.ports_of(self.service, own.generation)
            await self._bring_up(own, [c for c in containers if c not in mine], ports)
        return Done(changed=bool(mine) or intents.candidate is not None)

    @handles
    async def on_remove_workload(self, order: RemoveWorkload) -> Done:
        """Remove everything of the service up to a generation."""
        found = [c for c in await self._node.containers().list(self.service) if c.generation <= order.generation]
        await self._retire(found)
        await self._node.forget(self.service, order.generation, candidate_only=False)
        return Done(changed=bool(found))

    @handles
    async def on_stop_workload(self, order: StopWorkload) -> WorkloadRunning:
        """Stop the containers and remember that they shall stay so."""
        own = self._own(order.generation, "stop")
        await self._node.accept(attrs.evolve(own, desired="stopped"), {})
        for container in await self._node.containers().list(self.service):
            if container.generation == own.generation and container.state not in ("exited", "created"):
                await self._show(f"stopping {container.name}")
                await self._node.containers().stop(container.name, self._grace_s(container))
        return WorkloadRunning(record=await self._record())

    @handles
    async def on_start_workload(self, order: StartWorkload) -> WorkloadRunning:
        """Start the containers, made anew where they are missing, and wait until they are healthy."""
        own = self._own(order.generation, "start")
        wanted = attrs.evolve(own, desired="running")
        if own.desired != "running":
            await self._node.accept(wanted, {})
        ports = await self._node.records.ports_of(self.service, own.generation)
        await self._bring_up(wanted, await self._node.containers().list(self.service), ports)
        return WorkloadRunning(record=await self._record())

    @handles
    async def on_restart_workload(self, order: RestartWorkload) -> WorkloadRunning:
        """Restart one component after the other, waiting for health."""
        own = self._own(order.generation, "restart")
        ports = await self._node.records.ports_of(self.service, own.generation)
        for component in own.spec.components:
            containers = await self._node.containers().list(self.service)
            for container in containers:
                if container.component == component.name and container.generation == own.generation:
                    await self._show(f"stopping {container.name}")
                    await self._node.containers().stop(container.name, self._grace_s(container))
            only = attrs.evolve(own, spec=attrs.evolve(own.spec, components=(component,)))
            await self._bring_up(only, await self._node.containers().list(self.service), ports, whole=own.spec)
        return WorkloadRunning(record=await self._record())

    @handles
    async def on_converge(self, order: Converge) -> Later:
        """Bring back what should run: at boot, and when the engine is back. Tried again until it is true or no longer wanted."""
        own = self._intents().own
        if own is None or own.desired != "running":
            return LATER
        try:
            containers = await self._node.containers().list(self.service)
            ports = await self._node.records.ports_of(self.service, own.generation)
            await self._bring_up(own, containers, ports, on_request=False, wait=False)
            self._node.trouble.pop(self.service, None)
        except McpError as error:
            if error.code not in ("engine_down", "engine_frozen"):  # else the agent asks again when the engine is back
                self._node.trouble[self.service] = f"cannot be brought back: {error.reason} (trying again)"
                self.spawn(self._converge_later(order.attempt))
        await self._node.refresh(self.service)
        return LATER

    async def _converge_later(self, attempt: int) -> None:
        await self._node.clock.sleep(RETRY_S[min(attempt, len(RETRY_S) - 1)])
        self.tell(Converge(attempt=attempt + 1))

    # ------------------------------------------------------------------ helpers

    def _intents(self) -> Intents:
        return self._node.intents.get(self.service, Intents())

    def _own(self, generation: int, action: str) -> Intent:
        own = self._intents().own
        if own is None or own.generation != generation:
            has = f"generation {own.generation}" if own else "none"
            raise Refused("stale_generation", f"cannot {action} generation {generation} of {self.service} on {self._node.name}: it has {has}")
        return own

    def _grace_s(self, container: ContainerState) -> float:
        for intent in (self._intents().candidate, self._intents().own):
            for component in intent.spec.components if intent else ():
                if component.name == container.component:
                    return component.stop_grace_s
        return 10.0

    async def _record(self) -> ServiceRecord:
        record = await self._node.refresh(self.service)
        assert record is not None
        return record

    async def _retire(self, containers: list[ContainerState]) -> None:
        """Stop and remove containers, the components of one generation at the same time."""
        engine = self._node.containers()

        async def one(container: ContainerState) -> None:
            if container.state in ("running", "restarting", "paused"):
                await engine.stop(container.name, self._grace_s(container))
            await engine.remove(container.name)

        if containers:
            await self._show(f"removing {', '.join(c.name for c in containers)}")
        await _together(one(container) for container in containers)

    async def _bring_up(
        self,
        intent: Intent,
        containers: list[ContainerState],
        ports: dict[tuple[str, str], int],
        *,
        on_request: bool = True,
        wait: bool = True,
        whole: ServiceSpec | None = None,
    ) -> None:
        """Make and start what is missing, component by component; with `wait` each must be healthy before the next.

        The one way to make an intent true: for an order, again for the same order, at boot and when the engine is back.
        """
        todo = {t.component.name: t for t in to_do(intent, containers, on_request=on_request)}
        for component in intent.spec.components:
            need = todo.get(component.name)
            if need and need.action == "create":
                await self._create(intent, whole or intent.spec, component, ports)
            if intent.desired != "running":
                continue
            name = need.name if need else ""
            if need:
                await self._start(component, name, is_new=need.action == "create")
            if wait:
                await self._wait_until_healthy(intent, component, ports)

    async def _create(
        self, intent: Intent, whole: ServiceSpec, component: ComponentSpec, ports: dict[tuple[str, str], int]
    ) -> None:
        mine = {route: port for (owner, route), port in ports.items() if owner == component.name}
        request = container_request(
            whole, component, generation=intent.generation, op=intent.op, ports=mine,
            defaults=self._node.defaults, spec_json=self._node.spec_to_text(whole),
        )  # fmt: skip
        await self._show(f"creating {request.name}")
        await self._node.containers().create(request)

    async def _start(self, component: ComponentSpec, name: str, *, is_new: bool) -> None:
        await self._show(f"starting {name}")
        engine = self._node.containers()
        try:
            await engine.start(name)
        except AdapterError as error:
            if is_new and error.code not in ("engine_down", "engine_frozen"):
                await engine.remove(name)  # the engine keeps what it could not start (quirk 6)
            raise AdapterError(
                f"{component.name}: {error.reason}", retryable=error.retryable, code=error.code, hint=error.hint
            ) from error

    async def _wait_until_healthy(
        self, intent: Intent, component: ComponentSpec, ports: dict[tuple[str, str], int]
    ) -> None:
        """Return when the component is healthy.

        Raises:
            StepFailed: with the container's last lines: it exited, or was not healthy in time, or the operation was abandoned.
        """
        clock, health = self._node.clock, component.health
        name = self._node.container_name(intent, component)
        check = self._checker(component, name, ports)
        began_s = clock.monotonic_s()
        pause_s, seen, looks = FIRST_CHECK_S, "", 0
        while True:
            if self.current and self.current.op in self._abandoned:
                raise Refused("cancelled", f"{component.name}: cancelled while waiting for its health")
            seen = await check()
            if not seen:
                return
            looks += 1
            if looks % 5 == 1:
                await self._fail_if_it_ended(component, name)
            if clock.monotonic_s() - began_s >= health.timeout_s:
                raise await self._unhealthy(component, name, f"not healthy within {health.timeout_s:g} s: {seen}", "unhealthy")
            if looks == 20:
                await self._show(f"waiting for {component.name}: {seen}")
            self._detail = f"waiting for {component.name}: {seen}"
            await clock.sleep(pause_s)
            pause_s = min(pause_s * 1.5, health.interval_s)

    def _checker(
        self, component: ComponentSpec, name: str, ports: dict[tuple[str, str], int]
    ) -> Callable[[], Awaitable[str]]:
        """Return how to look whether a component is healthy: "" or what was seen."""
        health, node = component.health, self._node
        if health.cmd:
            return lambda: self._run_check(name, health.cmd)
        if component.routes:
            route = component.routes[0]
            port = ports.get((component.name, route.name), 0)
            return lambda: node.checks.check(health, node.defaults.publish_address, port, speaks_http=route.mode == "l7")
        until_s = node.clock.monotonic_s() + health.interval_s

        async def keeps_running() -> str:
            if node.clock.monotonic_s() < until_s:
                return f"no route to ask: must run for {health.interval_s:g} s"
            await self._fail_if_it_ended(component, name)
            return ""

        return keeps_running

    async def _run_check(self, name: str, cmd: tuple[str, ...]) -> str:
        try:
            code, said = await self._node.output().execute(name, cmd, 5.0)
        except AdapterError as error:
            return error.reason
        return "" if code == 0 else f"{cmd[0]} exited with {code}: {' '.join(said.split())[-120:]}"

    async def _fail_if_it_ended(self, component: ComponentSpec, name: str) -> None:
        found = next((c for c in await self._node.containers().list(self.service) if c.name == name), None)
        if found is None:
            raise await self._unhealthy(component, name, "its container was removed while it started", "removed")
        if found.out_of_memory:
            raise await self._unhealthy(component, name, "ran out of memory", "out_of_memory", found)
        if found.state in ("exited", "dead") or found.restarts > 0:
            raise await self._unhealthy(component, name, f"exited with code {found.exit_code}", "exited", found)

    async def _unhealthy(
        self, component: ComponentSpec, name: str, why: str, code: str, found: ContainerState | None = None
    ) -> StepFailed:
        lines: list[str] = []
        try:
            async with asyncio.timeout(3.0):
                async for line in self._node.output().logs(name, tail=LOG_LINES):
                    lines.append(line.text[:500])
        except (AdapterError, TimeoutError) as error:
            lines.append(f"(its log could not be read: {error})")
        shown = ContainerLog(
            component=component.name,
            container=name,
            exit_code=found.exit_code if found else None,
            out_of_memory=bool(found and found.out_of_memory),
            lines=tuple(lines[-LOG_LINES:]),
        )
        return StepFailed(Failed(code=code, reason=f"{component.name}: {why}", logs=(shown,)))


async def _together(work: Any) -> None:
    """Run coroutines at once; the first error of ours is raised as itself."""
    try:
        async with asyncio.TaskGroup() as group:
            for each in work:
                group.create_task(each)
    except ExceptionGroup as errors:
        ours, _ = errors.split(McpError)
        if ours is not None:
            raise ours.exceptions[0] from errors
        raise

