"""One service on a node: its orders one after another, each written down before it is acted on, each answered the same twice."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import attrs

from mcp.actors.actor import Actor, Envelope, Failure, failed_from, handles
from mcp.actors.converger import Converger
from mcp.actors.in_hand import InHand
from mcp.actors.node_state import NodeState
from mcp.bus.codec import decode, encode, size_of
from mcp.model import workload as model
from mcp.model.admission import check_ports, check_volumes
from mcp.model.catalogue import declared
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
    WorkloadRunning,
)
from mcp.model.ports import Intent
from mcp.model.values import frozen
from mcp.model.workload import Await, Goal, Known

log = logging.getLogger(__name__)

RETRY_FIRST_S = 1.0
RETRY_LAST_S = 30.0
"""Back-off of what is owed to a service (its containers after a boot, the removal of an old copy) until it works."""

DEFINITION_LIMIT_BYTES = 40 * 1024
"""Two of them, the old and the new, and all that is told of their containers must fit into one message."""

RECORDED = (RunWorkload, CommitWorkload, DropWorkload, RemoveWorkload, StopWorkload, StartWorkload, RestartWorkload)
"""Orders whose answer is written down, so that the same order again gets it again."""


@frozen(kw_only=True)
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
        self.body = Converger(known, node)
        self.told: ServiceRecord | None = None
        """What the master was told last."""
        self.owed: Converge | None = None
        """What could not be done and is tried again until it is."""
        self._node = node
        self._has_recalled = False
        self._trouble = ""
        self._retry: asyncio.Task[None] | None = None

    # -------------------------------------------------------------- what is told

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being done, nothing waits and nothing is known: then nobody misses this actor."""
        known = self.body.known
        return not (self.is_busy or self.waiting or self.owed or known.intents or known.containers)

    def record(self) -> ServiceRecord | None:
        """Return what the master is told; None when nothing was accepted, or nothing is left."""
        known, engine = self.body.known, self._node.engine
        problems = [self._trouble] if self._trouble else []
        if not engine.has_looked:
            if engine.state != "none":
                problems.append(
                    "its containers have not been seen: the container engine has not answered since this agent started"
                )
        elif not self.body.is_working:
            known = model.with_drift(known, self.body.noticed)
        return model.record_of(known, problems=problems)

    @property
    def orphans(self) -> tuple[ContainerState, ...]:
        """Containers with our labels that no accepted intent explains: told, not touched."""
        return () if self.body.known.intents else self.body.known.containers

    def victims(self, within_s: float) -> frozenset[str]:
        """Return the containers that ran until the engine went, those it stopped on its way out included."""
        now_s = self._node.clock.monotonic_s()
        ran = {c.name for c in self.body.known.containers if c.state in model.RUNNING}
        return frozenset(ran | {name for name, at_s in self.body.died_s.items() if now_s - at_s <= within_s})

    # ------------------------------------------------------------------- letters

    async def handle(self, envelope: Envelope) -> Any:
        """Carry one order out, unless it was answered before."""
        if not self._has_recalled:
            await self._recall()
        self.body.begin(envelope.reply if isinstance(envelope.reply, InHand) else None)
        try:
            return await self._once(envelope)
        finally:
            self.body.end()
            self._node.look_again(self.service)

    async def _recall(self) -> None:
        """Remember, once in a life, what only the records know."""
        highest = await self._node.records.highest_generation(self.service)
        self.body.known = attrs.evolve(self.body.known, highest=max(highest, self.body.known.highest))
        mine = self.body.known.candidate
        if mine and not mine.ready:
            about = CommitWorkload(service=self.service, generation=mine.generation)
            answer = await self._recorded(f"{mine.op}/{declared(RunWorkload).kind}", about)
            if isinstance(answer, WorkloadRunning):
                self._believe_ready(mine.generation)
        self._has_recalled = True

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
            if isinstance(message, RunWorkload) and self.body.known.intent(message.generation):
                await self._finish(envelope.op, message, failed_from(error))
            await self._tell()
            raise
        await self._finish(envelope.op, message, answer)
        await self._tell()
        return answer

    async def _tell(self) -> None:
        """Tell the master before it hears the end of its order, so that it knows what the order led to."""
        self.body.is_working = False
        self.body.notice()
        await self._node.tell(self)

    async def _answered(self, key: str, message: Any) -> Any:
        """Return the answer this very order got before; None when it is to be carried out (again).

        Raises:
            Failure: it failed before.
        """
        if isinstance(message, RunWorkload) and message.generation > self.body.known.highest:
            return None  # never accepted, so never answered: a new deploy need not wait for the disk here
        answer = await self._recorded(key, message)
        if isinstance(answer, Failed):
            raise Failure(answer)
        if isinstance(answer, WorkloadRunning) and isinstance(message, RunWorkload):
            if not await self._still_runs(message.generation):
                return None
            self._believe_ready(message.generation)
        return answer

    async def _recorded(self, key: str, message: Any) -> Any:
        """Return what was answered under a key about the same generation; None when nothing was, or it cannot be read."""
        body = await self._node.records.finished(key)
        if body is None:
            return None
        head, _, encoded = body.partition(b"\n")
        kind, _, about = head.decode().partition(" ")
        if about != self._about(message):
            return None  # another order under the same name
        try:
            return decode(kind, encoded)
        except MalformedMessage as error:
            log.warning("cannot read the recorded answer of %s: %s", key, error.reason)
            return None

    def _about(self, message: Any) -> str:
        return f"{self.service} {message.generation}"

    async def _still_runs(self, generation: int) -> bool:
        """Say whether a generation is as whole as its recorded answer claims."""
        await self.body.look()
        goal = self.body.known.intent(generation)
        return goal is not None and not [
            a for a in model.converge(self.body.known, "run", generation) if not isinstance(a, Await)
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
        pulled = [image for image in order.images if await self.body.pull(image)]
        return ImagesPulled(pulled=tuple(pulled), highest_generation=self.body.known.highest)

    @handles
    async def on_run(self, order: RunWorkload) -> WorkloadRunning:
        """Start a generation beside the one that runs, and wait until it is healthy."""
        self.body.check_abandoned("run")
        self._node.engine.check()
        if model.check_run(self.body.known, order, self._node.name):
            self._admit(order)
            await self.body.see_once()
            await self._supersede()
            await self._accept(order)
        else:
            await self.body.look()
        mine = self.body.known.intent(order.generation)
        if mine is not None and mine.is_candidate:
            await self.body.carry_out("run", order.generation)
            self._believe_ready(order.generation)
        return self._running()

    @handles
    async def on_commit(self, order: CommitWorkload) -> Done:
        """Make a generation the service's own and remove what is older; no way back, so it is finished whatever comes."""
        is_new = model.check_commit(self.body.known, order, self._node.name)
        if is_new:
            assert self.body.known.candidate is not None
            await self._node.records.commit(self.service, order.generation)
            own = attrs.evolve(self.body.known.candidate, is_candidate=False)
            self.body.known = attrs.evolve(self.body.known, committed=own, candidate=None)
        await self._finish_or_owe("retire", "generation {} is the service's own; the old copy cannot be removed yet")
        self.body.release_ports()
        return Done(changed=is_new)

    @handles
    async def on_drop(self, order: DropWorkload) -> Done:
        """Undo a run: remove its containers, forget it, and start what was stopped for it."""
        model.check_drop(self.body.known, order, self._node.name)
        self._node.engine.check()
        await self.body.look()
        changed = await self._drop(order.generation)
        self.body.known = attrs.evolve(self.body.known, highest=max(self.body.known.highest, order.generation))
        await self._finish_or_owe("resume", "generation {} cannot be started again yet")
        return Done(
            changed=changed, detail="" if changed else f"there is nothing of generation {order.generation} here"
        )

    @handles
    async def on_remove(self, order: RemoveWorkload) -> Done:
        """Remove everything up to a generation; the intent says "stopped" until the containers are gone."""
        self._node.engine.check()
        await self.body.look()
        before = self.body.known
        if before.candidate and before.candidate.generation <= order.generation:
            await self._drop(before.candidate.generation)
        own = before.committed
        if own and own.generation <= order.generation and own.desired == "running":
            await self.body.keep(attrs.evolve(own, desired="stopped"))
        await self.body.carry_out("remove", order.generation)
        if own and own.generation <= order.generation:
            await self._node.records.forget(self.service, order.generation)
            self.body.known = attrs.evolve(self.body.known, committed=None)
            self.body.release_ports()
        self._paid()
        changed = (before.intents, before.containers) != (self.body.known.intents, self.body.known.containers)
        self.body.known = attrs.evolve(self.body.known, highest=max(self.body.known.highest, order.generation))
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
            await self.body.look()
            await self.body.carry_out(order.goal, only=order.only)
        except McpError as error:
            self._owe(attrs.evolve(order, attempt=order.attempt + 1), error.reason)
        else:
            self._paid()
        await self._tell()

    async def _desire(self, order: model.OnCommitted, desired: Any, goal: Goal) -> WorkloadRunning:
        own = model.check_committed(self.body.known, order, self._node.name)
        self.body.check_abandoned(goal)
        self._node.engine.check()
        if own.desired != desired:
            await self.body.keep(attrs.evolve(own, desired=desired))
        await self.body.look()
        await self.body.carry_out(goal)
        self._paid()
        return self._running()

    def _believe_ready(self, generation: int) -> None:
        """Take a candidate for ready; in memory only, for its recorded answer says the same and is looked at first."""
        mine = self.body.known.intent(generation)
        if mine and mine.is_candidate:
            self.body.believe(attrs.evolve(mine, ready=True))

    def _running(self) -> WorkloadRunning:
        record = model.record_of(self.body.known, problems=[self._trouble] if self._trouble else [])
        assert record is not None
        return WorkloadRunning(record=record)

    # ------------------------------------------------------------------- intents

    def _admit(self, order: RunWorkload) -> None:
        """Refuse, before anything is touched, what cannot or must not run here.

        Raises:
            Refused: too_large, forbidden_path, or port_in_use.
        """
        node = self._node
        size = size_of(order.spec)
        if size > DEFINITION_LIMIT_BYTES:
            raise Refused(
                "too_large",
                f"cannot run {self.service}: its definition takes {size // 1024} KiB on the bus,"
                f" the limit is {DEFINITION_LIMIT_BYTES // 1024} KiB",
                hint="Move large values of `env` or `cmd` into a file that is mounted.",
            )
        for component in order.spec.components:
            check_volumes(self.service, component, node.name, real_path=node.host.real_path, own_paths=node.own_paths)
        check_ports(
            order.spec,
            node.name,
            default_address=node.defaults.publish_address,
            is_free=node.host.is_port_free,
            running=self.body.known.intents,
        )

    async def _supersede(self) -> None:
        """Remove an older candidate that nobody finished, before a newer one takes its place."""
        if self.body.known.candidate:
            await self.body.carry_out("drop", self.body.known.candidate.generation)

    async def _accept(self, order: RunWorkload) -> None:
        """Write the intent and its ports down; nothing was done before, and nothing is done when this fails."""
        intent = Intent(
            service=self.service,
            op=self.body.hand.op if self.body.hand else "",
            generation=order.generation,
            spec=order.spec,
            spec_hash=order.spec_hash,
            desired="running" if order.spec.active else "stopped",
            is_candidate=True,
        )
        with self.body.taking() as taken:
            for component in order.spec.components:
                for route in component.routes:
                    taken[component.name, route.name] = self._node.ports.take()
            await self.body.keep(intent, taken)

    async def _drop(self, generation: int) -> bool:
        """Remove a candidate: first its containers, then its intent; return whether there was anything."""
        candidate = self.body.known.candidate
        mine = candidate if candidate and candidate.generation == generation else None
        had = mine is not None or any(c.generation == generation for c in self.body.known.containers)
        await self.body.carry_out("drop", generation)
        if mine:
            await self._node.records.forget(self.service, generation, candidate_only=True)
            self.body.known = attrs.evolve(self.body.known, candidate=None)
            self.body.release_ports()
        return had

    # ---------------------------------------------------------------- converging

    async def _finish_or_owe(self, goal: Goal, what: str) -> None:
        """Carry out what has no way back; when the engine is in the way it is owed, and done as soon as it can be.

        Raises:
            AdapterError: not done yet; it will be.
        """
        try:
            if model.converge(self.body.known, goal) or not self._node.engine.has_looked:
                self._node.engine.check()
                await self.body.see_once()
                await self.body.carry_out(goal)
        except AdapterError as error:
            generation = self.body.known.committed.generation if self.body.known.committed else 0
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

    # ---------------------------------------------------------------- containers

    # -------------------------------------------------------------------- health
