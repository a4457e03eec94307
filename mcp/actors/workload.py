"""One service on a node: its orders one after another, each written down before it is acted on, each answered the same twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import attrs

from mcp.actors.actor import Actor, Alarm, Envelope, Failure, Reply, failed_from, handles
from mcp.actors.node_state import NodeState
from mcp.bus.codec import decode, encode
from mcp.model import workload as model
from mcp.model.catalogue import declared
from mcp.model.container import HASH_LABEL, container_request
from mcp.model.errors import AdapterError, MalformedMessage, McpError, Refused
from mcp.model.messages import (
    CommitWorkload,
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
from mcp.model.names import container_name
from mcp.model.ports import Clock, ContainerRequest, EngineEvent, Intent
from mcp.model.spec import ComponentSpec, VolumeSpec
from mcp.model.workload import Action, Await, Discard, Goal, Halt, Known, Launch, Make

log = logging.getLogger(__name__)

FIRST_CHECK_S = 0.01
CHECK_GROWTH = 0.25
"""A container is checked again after a quarter of the time it has had: so the last wait is at most that share of its start."""

CHECK_COMMAND_S = 5.0
LOOK_EVERY_S = 2.0
"""How often the engine is asked while a container comes up, in case an event was lost."""

ROUNDS = 3
ROUND_PAUSE_S = 0.2
"""After an engine's answer was lost: how often it is looked and gone on, and the first pause before (it doubles)."""

LAST_LINES = 20
LINE_LIMIT = 1000
LOG_WAIT_S = 2.0
RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0
"""Back-off of what is owed to a service (its containers after a boot, the removal of an old copy) until it works."""

RECORDED = (RunWorkload, CommitWorkload, DropWorkload, RemoveWorkload, StopWorkload, StartWorkload, RestartWorkload)
"""Orders whose answer is written down, so that the same order again gets it again."""

FORBIDDEN_PATHS = (
    "/boot", "/dev", "/etc", "/proc", "/root", "/run/containerd", "/run/docker.sock", "/sys", "/var/lib/containerd",
    "/var/lib/docker", "/var/run",
)  # fmt: skip
"""Never mounted, with all in them and all above them, not through a symlink either: each hands the machine to a container."""

READABLE_PATHS = (
    "/etc/ca-certificates",
    "/etc/hosts",
    "/etc/localtime",
    "/etc/resolv.conf",
    "/etc/ssl/certs",
    "/etc/timezone",
)
"""May be mounted read-only all the same: what containers commonly need, and nothing secret."""


class InHand:
    """An order in the agent's hands: its reply, what is being done for it, and whether it was abandoned."""

    def __init__(self, reply: Reply, message: Any, hands: dict[int, InHand], clock: Clock) -> None:
        self.op = reply.op
        self.message = message
        self.detail = "waiting for an earlier order"
        self.is_abandoned = False
        self.on_abandoned: Callable[[], None] = _nothing
        self._reply = reply
        self._hands = hands
        self._clock = clock
        self._said = ""
        self._said_s = clock.monotonic_s()
        hands[id(self)] = self

    @property
    def is_expired(self) -> bool:
        """Whether whoever asked has given up."""
        return bool(getattr(self._reply, "is_expired", False))

    def abandon(self) -> None:
        """Have it stop at the next safe point."""
        self.is_abandoned = True
        self.on_abandoned()

    async def pulse(self, every_s: float) -> None:
        """Say what is being done when that is news, or when nothing was said for a while."""
        now_s = self._clock.monotonic_s()
        if self.detail != self._said or now_s - self._said_s >= every_s:
            self._said, self._said_s = self.detail, now_s
            await self._reply.progress(Working(detail=self.detail))

    async def progress(self, message: Any) -> None:
        """Say how far it is."""
        self._said_s = self._clock.monotonic_s()
        await self._reply.progress(message)

    async def final(self, message: Any) -> None:
        """Say how it ended."""
        self._hands.pop(id(self), None)
        await self._reply.final(message)

    async def failed(self, failed: Failed) -> None:
        """Say that it failed, and why."""
        self._hands.pop(id(self), None)
        await self._reply.failed(failed)


def _nothing() -> None:
    """Nobody works on it yet."""


@attrs.frozen(kw_only=True)
class Converge:
    """Owed to a service without an order: after boot, after the engine's return, after an order that got stuck half-way."""

    goal: Goal
    only: frozenset[str] | None = None
    attempt: int = 0


class WorkloadActor(Actor):
    """All that happens to one service on this node."""

    def __init__(self, known: Known, node: NodeState) -> None:
        super().__init__(f"{known.service} on {node.name}")
        self.service = known.service
        self.known = known
        self.told: ServiceRecord | None = None
        """What the master was told last."""
        self._node = node
        self._hand: InHand | None = None
        self.is_working = False
        """Whether an order is being carried out: then what the containers are is in transit."""
        self._has_recalled = False
        self._given: dict[int, dict[tuple[str, str], int]] = {}
        self._alarm = Alarm()
        self._awaited = ""
        self._news: dict[str, str] = {}
        self._proven: dict[str, str] = {}
        self._noticed: dict[str, str] = {}
        self._died_s: dict[str, float] = {}
        self._trouble = ""
        self.owed: Converge | None = None
        """What could not be done and is tried again until it is."""
        self._retry: asyncio.Task[None] | None = None

    # -------------------------------------------------------------- what is told

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done, nothing waits and nothing is known: then nobody misses this actor."""
        known = self.known
        return not (self.is_busy or self.waiting or self.owed or known.intents or known.containers)

    def record(self) -> ServiceRecord | None:
        """Return what the master is told; None when nothing was accepted, or nothing is left."""
        known, engine = self.known, self._node.engine
        problems = [self._trouble] if self._trouble else []
        if not engine.has_looked:
            if engine.state != "none":
                problems.append(
                    "its containers have not been seen: the container engine has not answered since this agent started"
                )
        elif not self.is_working:
            known = model.with_drift(known, self._noticed)
        return model.record_of(known, problems=problems)

    @property
    def orphans(self) -> tuple[ContainerState, ...]:
        """Containers with our labels that no accepted intent explains: told, not touched."""
        return () if self.known.intents else self.known.containers

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
        self._notice()

    def hear(self, event: EngineEvent) -> None:
        """Take in an event of one of the containers; whoever waits for that container looks at once."""
        if event.action in ("die", "oom", "destroy", "health"):
            self._news[event.name] = event.detail
            if event.name == self._awaited:
                self._alarm.ring()
        if event.action == "die":
            self._died_s[event.name] = self._node.clock.monotonic_s()

    def victims(self, within_s: float) -> frozenset[str]:
        """Return the containers that ran until the engine went, those it stopped on its way out included."""
        now_s = self._node.clock.monotonic_s()
        ran = {c.name for c in self.known.containers if c.state in model.RUNNING}
        return frozenset(ran | {name for name, at_s in self._died_s.items() if now_s - at_s <= within_s})

    def _with_proof(self, container: ContainerState) -> ContainerState:
        """Say healthy where it was seen; a container that was started anew since must be seen again."""
        is_proven = self._proven.get(container.name) == container.started_at
        if container.health != "none" or container.state != "running" or not is_proven:
            return container
        return attrs.evolve(container, health="healthy")

    def _notice(self) -> None:
        wrong = set() if self.is_working else model.drifted(self.known)
        at = self._node.time_of_day()
        self._noticed = {component: self._noticed.get(component, at) for component in wrong}

    def _note(self, state: ContainerState | None) -> None:
        if state is not None:
            others = [c for c in self.known.containers if c.name != state.name]
            self.see(sorted([*others, state], key=lambda c: c.name))

    def _gone(self, name: str) -> None:
        self._proven.pop(name, None)
        self.see([c for c in self.known.containers if c.name != name])

    # ------------------------------------------------------------------- letters

    async def handle(self, envelope: Envelope) -> Any:
        """Carry one order out, unless it was answered before."""
        if not self._has_recalled:
            highest = await self._node.records.highest_generation(self.service)
            self.known = attrs.evolve(self.known, highest=max(highest, self.known.highest))
            self._has_recalled = True
        self._hand = envelope.reply if isinstance(envelope.reply, InHand) else None
        self._alarm = Alarm()
        if self._hand:
            self._hand.on_abandoned = self._alarm.ring
        self._say("at work")
        self._news.clear()
        self.is_working = True
        try:
            return await self._once(envelope)
        finally:
            self._hand, self.is_working = None, False
            self._died_s.clear()
            self._node.look_again(self.service)

    async def _once(self, envelope: Envelope) -> Any:
        message = envelope.message
        if not isinstance(message, RECORDED) or not envelope.op:
            return await super().handle(envelope)
        kind = declared(type(message)).kind
        before = await self._answered(f"{envelope.op}/{kind}", message)
        if before is not None:
            return before
        try:
            answer = await super().handle(envelope)
        except McpError as error:
            if isinstance(message, RunWorkload) and self.known.intent(message.generation):
                await self._finish(envelope.op, message, failed_from(error))
            await self._tell()
            raise
        await self._finish(envelope.op, message, answer)
        await self._tell()
        return answer

    async def _tell(self) -> None:
        """Tell the master before it hears the end of its order, so that it knows what the order led to."""
        self.is_working = False
        self._notice()
        await self._node.tell(self)

    async def _answered(self, key: str, message: Any) -> Any:
        """Return the answer this very order got before; None when it is to be carried out (again).

        Raises:
            Failure: it failed before.
        """
        body = await self._node.records.finished(key)
        if body is None:
            return None
        head, _, encoded = body.partition(b"\n")
        kind, _, about = head.decode().partition(" ")
        if about != self._about(message):
            return None  # another order under the same name
        try:
            answer = decode(kind, encoded)
        except MalformedMessage as error:
            log.warning("cannot read the recorded answer of %s: %s", key, error.reason)
            return None
        if isinstance(answer, Failed):
            raise Failure(answer)
        if isinstance(message, RunWorkload) and not await self._still_runs(message.generation):
            return None
        return answer

    def _about(self, message: Any) -> str:
        return f"{self.service} {message.generation}"

    async def _still_runs(self, generation: int) -> bool:
        """Say whether a generation is as whole as its recorded answer claims."""
        await self._look()
        goal = self.known.intent(generation)
        return goal is not None and not [
            a for a in model.converge(self.known, "run", generation) if not isinstance(a, Await)
        ]

    async def _finish(self, op: str, message: Any, answer: Any) -> None:
        kind = declared(type(message)).kind
        record = OperationRecord(
            op=op,
            service=self.service,
            kind=kind,
            generation=message.generation,
            outcome="failed" if isinstance(answer, Failed) else "done",
            detail=answer.reason if isinstance(answer, Failed) else getattr(answer, "detail", ""),
            ended_at=self._node.now(),
        )
        body = f"{declared(type(answer)).kind} {self._about(message)}\n".encode() + encode(answer)
        try:
            await self._node.records.finish(record, body)
        except AdapterError as error:
            # The work is done; only its memory is not: asked again, it would be looked at and found done.
            log.warning("cannot record the end of %s %s: %s", kind, op, error.reason)

    # -------------------------------------------------------------------- orders

    @handles
    async def on_pull(self, order: PullImages) -> ImagesPulled:
        """Have images here."""
        pulled = [image for image in order.images if await self._pull(image)]
        return ImagesPulled(pulled=tuple(pulled), highest_generation=self.known.highest)

    @handles
    async def on_run(self, order: RunWorkload) -> WorkloadRunning:
        """Start a generation beside the one that runs, and wait until it is healthy."""
        self._check_abandoned("run")
        self._node.engine.check()
        if model.check_run(self.known, order, self._node.name):
            self._check_definition(order)
            await self._see_once()
            await self._supersede()
            await self._accept(order)
        else:
            await self._look()
        mine = self.known.intent(order.generation)
        if mine is not None and mine.is_candidate:
            await self._carry_out("run", order.generation)
            if not mine.ready:
                await self._keep(attrs.evolve(mine, ready=True))
        return self._running()

    @handles
    async def on_commit(self, order: CommitWorkload) -> Done:
        """Make a generation the service's own and remove what is older; no way back, so it is finished whatever comes."""
        is_new = model.check_commit(self.known, order, self._node.name)
        if is_new:
            assert self.known.candidate is not None
            await self._node.records.commit(self.service, order.generation)
            own = attrs.evolve(self.known.candidate, is_candidate=False)
            self.known = attrs.evolve(self.known, committed=own, candidate=None)
        await self._finish_or_owe("retire", "generation {} is the service's own; the old copy cannot be removed yet")
        await self._release_ports()
        return Done(changed=is_new)

    @handles
    async def on_drop(self, order: DropWorkload) -> Done:
        """Undo a run: remove its containers, forget it, and start what was stopped for it."""
        model.check_drop(self.known, order, self._node.name)
        self._node.engine.check()
        await self._look()
        changed = await self._drop(order.generation)
        self.known = attrs.evolve(self.known, highest=max(self.known.highest, order.generation))
        await self._finish_or_owe("resume", "generation {} cannot be started again yet")
        return Done(
            changed=changed, detail="" if changed else f"there is nothing of generation {order.generation} here"
        )

    @handles
    async def on_remove(self, order: RemoveWorkload) -> Done:
        """Remove everything up to a generation; the intent says "stopped" until the containers are gone."""
        self._node.engine.check()
        await self._look()
        before = self.known
        if before.candidate and before.candidate.generation <= order.generation:
            await self._drop(before.candidate.generation)
        own = before.committed
        if own and own.generation <= order.generation and own.desired == "running":
            await self._keep(attrs.evolve(own, desired="stopped"))
        await self._carry_out("remove", order.generation)
        if own and own.generation <= order.generation:
            await self._node.records.forget(self.service, order.generation)
            self.known = attrs.evolve(self.known, committed=None)
            await self._release_ports()
        self._paid()
        changed = (before.intents, before.containers) != (self.known.intents, self.known.containers)
        self.known = attrs.evolve(self.known, highest=max(self.known.highest, order.generation))
        return Done(changed=changed, detail="" if changed else f"there is nothing of {self.service} here")

    @handles
    async def on_stop(self, order: StopWorkload) -> WorkloadRunning:
        """Stop the containers and remember that they shall stay so."""
        return await self._desire(order, "stopped", "stop")

    @handles
    async def on_start(self, order: StartWorkload) -> WorkloadRunning:
        """Start the containers, made anew where they are missing, and wait until they are healthy."""
        return await self._desire(order, "running", "start")

    @handles
    async def on_restart(self, order: RestartWorkload) -> WorkloadRunning:
        """Restart the containers one after the other."""
        return await self._desire(order, "running", "restart")

    @handles
    async def on_converge(self, order: Converge) -> None:
        """Do what is owed; what fails is told and tried again until it works."""
        if self._node.engine.state != "up":
            return  # its return brings a letter like this one
        try:
            await self._look()
            await self._carry_out(order.goal, only=order.only)
        except McpError as error:
            self._owe(attrs.evolve(order, attempt=order.attempt + 1), error.reason)
        else:
            self._paid()
        await self._tell()

    async def _desire(self, order: model.OnCommitted, desired: Any, goal: Goal) -> WorkloadRunning:
        own = model.check_committed(self.known, order, self._node.name)
        self._check_abandoned(goal)
        self._node.engine.check()
        if own.desired != desired:
            await self._keep(attrs.evolve(own, desired=desired))
        await self._look()
        await self._carry_out(goal)
        self._paid()
        return self._running()

    def _running(self) -> WorkloadRunning:
        record = model.record_of(self.known, problems=[self._trouble] if self._trouble else [])
        assert record is not None
        return WorkloadRunning(record=record)

    # ------------------------------------------------------------------- intents

    def _check_definition(self, order: RunWorkload) -> None:
        """Refuse, before anything is touched, what cannot or must not run here.

        Raises:
            Refused: forbidden_path, or port_in_use.
        """
        for component in order.spec.components:
            self._check_volumes(component)
            for port in component.ports:
                address = port.address.strip("[]") or self._node.defaults.publish_address
                if not self._node.host.is_port_free(address, port.host_port) and not self._is_own_port(port.host_port):
                    raise Refused(
                        "port_in_use",
                        f"cannot run {order.service} on {self._node.name}: port {address}:{port.host_port}"
                        f" of {component.name} is in use",
                        hint=f"`ss -ltnp sport = :{port.host_port}` on {self._node.name} shows by whom.",
                    )

    def _check_volumes(self, component: ComponentSpec) -> None:
        """Refuse paths that hand the machine to a container; asked again at each mount, for a symlink may have moved.

        Raises:
            Refused: forbidden_path.
        """
        for volume in component.volumes:
            real = self._node.host.real_path(volume.host_path)
            if self._is_forbidden(real, volume):
                via = "" if real == volume.host_path else f" (really {real})"
                raise Refused(
                    "forbidden_path",
                    f"cannot run {self.service} on {self._node.name}: {component.name} may not mount {volume.host_path}{via}",
                    hint="Whoever has it has the machine. Mount a folder of the service's own, e.g. /srv/NAME.",
                )

    def _is_forbidden(self, real: str, volume: VolumeSpec) -> bool:
        if volume.read_only and any(real == path or real.startswith(f"{path}/") for path in READABLE_PATHS):
            return False
        inside = f"{real.rstrip('/')}/"
        return any(
            inside.startswith(f"{bad}/") or f"{bad}/".startswith(inside)
            for bad in (*FORBIDDEN_PATHS, *self._node.own_paths)
        )

    def _is_own_port(self, port: int) -> bool:
        """Say whether the running copy holds a fixed port: then it is free once that copy is stopped."""
        return any(
            p.host_port == port for intent in self.known.intents for c in intent.spec.components for p in c.ports
        )

    async def _supersede(self) -> None:
        """Remove an older candidate that nobody finished, before a newer one takes its place."""
        if self.known.candidate:
            await self._carry_out("drop", self.known.candidate.generation)

    async def _accept(self, order: RunWorkload) -> None:
        """Write the intent and its ports down; nothing was done before, and nothing is done when this fails."""
        intent = Intent(
            service=self.service,
            op=self._hand.op if self._hand else "",
            generation=order.generation,
            spec=order.spec,
            spec_hash=order.spec_hash,
            desired="running" if order.spec.active else "stopped",
            is_candidate=True,
        )
        with self._taking() as taken:
            for component in order.spec.components:
                for route in component.routes:
                    taken[component.name, route.name] = self._node.ports.take()
            await self._keep(intent, taken)

    @contextmanager
    def _taking(self) -> Iterator[dict[tuple[str, str], int]]:
        """Give a place for ports that are taken now and written down inside; when that fails they are free again."""
        taken: dict[tuple[str, str], int] = {}
        are_written = False
        try:
            yield taken
            are_written = True
        finally:
            self._node.ports.settle(set(taken.values()), are_written=are_written)

    async def _keep(self, intent: Intent, ports: dict[tuple[str, str], int] | None = None) -> None:
        """Write an intent down (and ports of it), then believe it."""
        await self._node.records.accept(intent, ports)
        if ports is not None:
            self._given.setdefault(intent.generation, {}).update(ports)
        self.believe(intent)

    async def _drop(self, generation: int) -> bool:
        """Remove a candidate: first its containers, then its intent; return whether there was anything."""
        mine = self.known.candidate if self.known.candidate and self.known.candidate.generation == generation else None
        had = mine is not None or any(c.generation == generation for c in self.known.containers)
        await self._carry_out("drop", generation)
        if mine:
            await self._node.records.forget(self.service, generation, candidate_only=True)
            self.known = attrs.evolve(self.known, candidate=None)
            await self._release_ports()
        return had

    async def _release_ports(self) -> None:
        """Let go of the ports of generations that were forgotten."""
        kept = {intent.generation for intent in self.known.intents}
        self._given = {generation: ports for generation, ports in self._given.items() if generation in kept}
        await self._node.ports.load()

    # ---------------------------------------------------------------- converging

    async def _carry_out(self, goal: Goal, generation: int = 0, *, only: frozenset[str] | None = None) -> None:
        """Do what brings the service to a goal; an answer that was lost is followed by a look, not by a repetition.

        Raises:
            AdapterError: the engine or the records failed for good.
            model.WorkFailed: a container did not come up.
        """
        for turn in range(ROUNDS):
            action: Action | None = None
            try:
                if turn:
                    await self._look()
                for action in model.converge(self.known, goal, generation, only=only):
                    self._check_abandoned(goal)
                    self._say(model.describe(action, self.service))
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
                await self._await_healthy(component, generation)
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

    async def _finish_or_owe(self, goal: Goal, what: str) -> None:
        """Carry out what has no way back; when the engine is in the way it is owed, and done as soon as it can be.

        Raises:
            AdapterError: not done yet; it will be.
        """
        try:
            if model.converge(self.known, goal) or not self._node.engine.has_looked:
                self._node.engine.check()
                await self._see_once()
                await self._carry_out(goal)
        except AdapterError as error:
            generation = self.known.committed.generation if self.known.committed else 0
            reason = f"{what.format(generation)}: {error.reason}"
            self._owe(Converge(goal=goal, attempt=1), reason)
            hint = f"{self._node.name} goes on trying."
            raise AdapterError(f"{self.service}: {reason}", retryable=True, code=error.code, hint=hint) from error

    def _owe(self, debt: Converge, why: str) -> None:
        """Tell what could not be done, and try again after a while."""
        if self.owed and self.owed.goal != debt.goal:
            debt = attrs.evolve(debt, goal="settle", only=None)  # which is more than either
        self.owed, self._trouble = debt, f"{why}; it is tried again until it works"
        log.warning("%s: %s", self.service, self._trouble, extra={"service": self.service, "attempt": debt.attempt})
        if self._retry is None:
            pause_s = self._node.spread(min(RETRY_FIRST_S * 2 ** (debt.attempt - 1), RETRY_LAST_S))
            self._retry = self.spawn(self._ask_again(pause_s), name="retry")

    def _paid(self) -> None:
        self.owed, self._trouble = None, ""

    async def _ask_again(self, pause_s: float) -> None:
        await self._node.clock.sleep(pause_s)
        self._retry = None
        if self.owed:
            self.tell(self.owed)

    async def _look(self) -> None:
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

    async def _see_once(self) -> None:
        """Ask the engine, unless its events have kept us up to date."""
        if not self._node.engine.is_followed:
            await self._look()

    def _check_abandoned(self, goal: Goal | None = None) -> None:
        if self._hand and self._hand.is_abandoned and goal in (None, "run", "start", "restart"):
            raise Refused("abandoned", f"{self.service}: abandoned while {self._hand.detail}")

    def _say(self, detail: str) -> None:
        if self._hand:
            self._hand.detail = detail

    # ---------------------------------------------------------------- containers

    async def _make(self, component: ComponentSpec, generation: int) -> ContainerState:
        request = await self._request(component, generation)
        try:
            return await self._node.engine.containers.create(request)
        except AdapterError as error:
            if error.code != "image_missing":
                raise
        await self._pull(component.image)
        return await self._node.engine.containers.create(request)

    async def _request(self, component: ComponentSpec, generation: int) -> ContainerRequest:
        intent = self.known.intent(generation)
        assert intent is not None
        self._check_volumes(component)
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
        with self._taking() as taken:
            for route in component.routes:
                key = (component.name, route.name)
                if key not in given or not self._node.ports.is_free(given[key]):
                    taken[key] = self._node.ports.take()
            if taken:
                await self._keep(intent, taken)
        return {route.name: self._given[intent.generation][component.name, route.name] for route in component.routes}

    async def _launch(self, component: ComponentSpec, generation: int) -> ContainerState:
        """Start a container; when somebody was quicker at a port of a route, make it anew with another port."""
        containers = self._node.engine.containers
        name = container_name(self.service, component.name, generation)
        self._news.pop(name, None)
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

    async def _pull(self, image: str) -> bool:
        self._node.engine.check()
        self._say(f"pulling {image}")

        def progress(what: str, done: int, total: int) -> None:
            share = f" ({done / 1e6:.0f} of {total / 1e6:.0f} MB)" if total else ""
            self._say(f"pulling {what}{share}")

        pulled = await self._alarm.unless_rung(self._node.engine.images.pull(image, progress))
        self._check_abandoned()
        return bool(pulled)

    # -------------------------------------------------------------------- health

    async def _await_healthy(self, component: ComponentSpec, generation: int) -> None:
        """Wait until a container answers as its definition says; its end ends the wait at once.

        Raises:
            model.WorkFailed: it exited, or was not healthy in time; with its last lines.
        """
        began = self.known.container(generation, component.name)
        assert began is not None
        self._awaited = began.name
        try:
            await self._watch(component, began)
        finally:
            self._awaited = ""

    async def _watch(self, component: ComponentSpec, began: ContainerState) -> None:
        clock = self._node.clock
        began_s = looked_s = clock.monotonic_s()
        while True:
            self._check_abandoned()
            if began.name in self._news or clock.monotonic_s() - looked_s >= LOOK_EVERY_S:
                looked_s = clock.monotonic_s()
                if await self._is_completed(component, began, looked_s - began_s):
                    return
            seen = await self._alarm.unless_rung(self._check(component, began, clock.monotonic_s() - began_s))
            if seen is None:
                continue  # there is news: look first
            if not seen:
                self._prove(began.name)
                return
            waited_s = clock.monotonic_s() - began_s
            if waited_s >= component.health.timeout_s:
                lines = await self._last_lines(began.name)
                raise model.unhealthy(self._now(began), self._node.name, waited_s, seen, lines)
            left_s = component.health.timeout_s - waited_s
            pause_s = min(
                max(FIRST_CHECK_S, waited_s * CHECK_GROWTH), component.health.interval_s, max(left_s, FIRST_CHECK_S)
            )
            await self._alarm.unless_rung(clock.sleep(pause_s))

    async def _is_completed(self, component: ComponentSpec, began: ContainerState, after_s: float) -> bool:
        """Look at a container that comes up; say whether it has ended well already, as some are meant to.

        Raises:
            model.WorkFailed: it has ended badly, or is gone.
        """
        died = self._news.pop(began.name, "")
        await self._look()
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
        return next((c for c in self.known.containers if c.name == began.name), attrs.evolve(began, state="missing"))

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

    def _prove(self, name: str) -> None:
        now = next((c for c in self.known.containers if c.name == name), None)
        if now is not None:
            self._proven[name] = now.started_at
            self._note(now)

    async def _last_lines(self, name: str) -> list[str]:
        lines: list[str] = []
        with suppress(AdapterError, TimeoutError):  # what could be read is better than another error
            async with asyncio.timeout(LOG_WAIT_S):
                async for line in self._node.engine.output.logs(name, tail=LAST_LINES):
                    lines.append(line.text[:LINE_LIMIT])  # noqa: PERF401 - those that came before a time-out count
        return lines[-LAST_LINES:]
