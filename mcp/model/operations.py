"""The operations in hand: one at a time for each service, each followed by whoever wants to know. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import attrs

from mcp.model import deploy
from mcp.model.effects import Effect, Say, Tell
from mcp.model.fleet import Fleet, Node
from mcp.model.operator_messages import DeploymentFinished, OperationEnded, OperationProgress
from mcp.model.saga import Answer, Ended, Job, Moved, Operation, Order, Out, Send

OPERATIONS_KEPT = 200
"""Ended operations a master remembers for `mcp op list`."""

KEEPALIVE_S = 1.0
"""How often followers of an operation hear that it lives, so that a CLI notices the loss of its master."""

SendOrder = Callable[[str, Order, str], Effect]
"""Makes the effect for an order: the operation's id, the order, the name of the call."""

PlanOf = Callable[[Operation], Any]
"""Makes the answer of an operation that only plans."""


@attrs.define(kw_only=True)
class Desk:
    """Where operations lie until they are done, and for a while after."""

    fleet: Fleet
    send: SendOrder
    plan_of: PlanOf
    timeout_s: float
    return_timeout_s: float
    running: dict[str, Operation] = attrs.field(factory=dict)
    ended: deque[Operation] = attrs.field(factory=lambda: deque(maxlen=OPERATIONS_KEPT))
    _followers: dict[str, set[str]] = attrs.field(factory=dict)
    _alive_said_s: float = 0.0

    def holder(self, service: str) -> Operation | None:
        """Return the operation that holds a service; plans hold nothing."""
        for operation in self.running.values():
            if operation.job.service == service and operation.job.kind != "plan":
                return operation
        return None

    def begin(self, job: Job, now_s: float, *, asker: str = "", first_step: str = "") -> list[Effect]:
        """Take a job on, followed by whoever asked; with `first_step`, go on from there."""
        table = deploy.TABLES[job.kind]
        operation = Operation(
            job=job,
            table=table,
            started_s=now_s,
            deadline_s=now_s + self.timeout_s,
            return_timeout_s=self.return_timeout_s,
        )
        if first_step:
            operation.position = next(i for i, step in enumerate(table) if step.name == first_step)
        self.running[job.op] = operation
        self._followers[job.op] = {asker} if asker else set()
        return self._carry_out(operation, operation.start(now_s), now_s)

    def follow(self, op: str, asker: str) -> list[Effect]:
        """Let somebody follow a running operation, beginning with what it has done so far."""
        self._followers[op].add(asker)
        steps = self.running[op].shown.values()
        return [Say(asker=asker, frame="progress", message=OperationProgress(op=op, step=step)) for step in steps]

    def cancel(self, op: str, now_s: float) -> list[Effect]:
        """Stop an operation at the next safe point and undo it.

        Raises:
            McpError: it is too late.
        """
        operation = self.running[op]
        return self._carry_out(operation, operation.cancel(now_s), now_s)

    def progressed(self, op: str, call: str, detail: str, now_s: float) -> list[Effect]:
        """Show what an agent is doing."""
        operation = self.running.get(op)
        return self._carry_out(operation, operation.progressed(call, detail, now_s), now_s) if operation else []

    def answered(self, op: str, call: str, now_s: float, **how: Any) -> list[Effect]:
        """Take the end of an order in."""
        operation = self.running.get(op)
        order = operation.order_of(call) if operation else None
        if operation is None or order is None:
            return []
        return self._carry_out(operation, operation.answered(call, Answer(order=order, **how), now_s), now_s)

    def returned(self, node: Node, now_s: float, *, is_new: bool = False) -> list[Effect]:
        """A node is back: operations that waited for it go on; `is_new`: its agent was started anew."""
        effects: list[Effect] = []
        for operation in list(self.running.values()):
            effects += self._carry_out(operation, operation.returned(node.name, now_s, is_new=is_new), now_s)
        return effects

    def forgotten(self, node: str, now_s: float) -> list[Effect]:
        """A node was removed: operations that are at work there stop waiting for it."""
        effects: list[Effect] = []
        for operation in list(self.running.values()):
            effects += self._carry_out(operation, operation.forgotten(node, now_s), now_s)
        return effects

    def tick(self, now_s: float) -> list[Effect]:
        """Let time pass; followers hear that their operation lives."""
        effects: list[Effect] = []
        for operation in list(self.running.values()):
            effects += self._carry_out(operation, operation.tick(now_s), now_s)
        if now_s - self._alive_said_s >= KEEPALIVE_S:
            self._alive_said_s = now_s
            for op in self.running:
                effects += self._say_all(op, "progress", OperationProgress(op=op))
        return effects

    def _carry_out(self, operation: Operation, outs: list[Out], now_s: float) -> list[Effect]:
        """Turn what an operation says into effects: orders, news for its followers, its end."""
        op, effects = operation.job.op, list[Effect]()
        for out in outs:
            match out:
                case Send(call=call, order=order):
                    effects.append(self.send(op, order, call))
                case Moved(step=step):
                    effects += self._say_all(op, "progress", OperationProgress(op=op, step=step))
                case Ended():
                    effects += self._end(operation)
        return effects

    def _say_all(self, op: str, frame: Any, message: Any) -> list[Effect]:
        return [Say(asker=asker, frame=frame, message=message) for asker in sorted(self._followers.get(op, ()))]

    def _end(self, operation: Operation) -> list[Effect]:
        job = operation.job
        del self.running[job.op]
        for name, debt in operation.debts:
            if (node := self.fleet.nodes.get(name)) and debt not in node.debts:
                node.debts.append(debt)
        answer = self.plan_of(operation) if job.kind == "plan" else ended_message(operation)
        effects = self._say_all(job.op, "final", answer)
        del self._followers[job.op]
        if job.kind == "plan":
            return effects
        self.ended.append(operation)
        reason = operation.failure.reason if operation.failure else ""
        finished = DeploymentFinished(
            op=job.op,
            service=job.service,
            kind=job.kind,
            node=job.node,
            outcome=operation.outcome,
            reason=reason,
        )
        return [*effects, Tell(message=finished)]


def ended_message(operation: Operation) -> OperationEnded:
    """Return the final frame of an operation (or how it stands, while it runs)."""
    job, failure = operation.job, operation.failure
    return OperationEnded(
        op=job.op,
        service=job.service,
        kind=job.kind,
        node=job.node,
        outcome=operation.outcome,
        reason=failure.reason if failure else job.reason,
        code=failure.code if failure else "",
        hint=failure.hint if failure else "",
        steps=tuple(operation.shown.values()),
        logs=operation.logs,
        leftovers=tuple(operation.leftovers),
        warnings=tuple(job.warnings),
        seconds=round((operation.ended_s or operation.started_s) - operation.started_s, 3),
    )
