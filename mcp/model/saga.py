"""An operation as a table of steps: do, then the next; on trouble, undo from where it stopped.

Pure: time comes in, orders go out.

Refused for certain: undo from the step before. Failed or unanswered: it may have been done in part, so undo starts with
that very step; every undo is harmless where nothing was done. An undo that fails is a leftover, told with the command that
removes it and tried again when its node returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import attrs

from mcp.model.errors import McpError
from mcp.model.fleet import Debt, Fleet
from mcp.model.messages import ContainerLog, Failed, ImageFacts, ServiceRecord
from mcp.model.operator_messages import Outcome, Step, StepState
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

RETURN_TIMEOUT_S = 60.0
"""How long an operation waits for a node that was lost in the middle, before it is undone without it."""


ANEW_LIMIT = 5
"""How often an operation asks agents again that were started anew while they had it in hand: one may be crashed by it."""


@frozen(kw_only=True)
class Order:
    """One piece of work for one agent; `idle_s` bounds the silence between its frames, `timeout_s` the whole."""

    node: str
    message: Any
    idle_s: float = 15.0
    timeout_s: float = 120.0


Certainty = Literal["nothing", "failed", "unknown"]
"""After trouble: nothing was done; the agent says it failed; or nobody can tell."""


@frozen(kw_only=True)
class Answer:
    """How an order ended: a reply, or trouble with how sure we are of it."""

    order: Order
    reply: Any = None
    failure: Failed | None = None
    certainty: Certainty = "failed"


@attrs.define(kw_only=True)
class Job:
    """What the steps of one operation know and find out."""

    op: str
    kind: str
    service: str
    operator: str
    fleet: Fleet
    spec: ServiceSpec | None = None
    wanted_node: str = ""
    world: str = ""
    node: str = ""
    generation: int = 0
    images: dict[str, dict[str, ImageFacts]] = attrs.field(factory=dict)
    record: ServiceRecord | None = None
    is_unchanged: bool = False
    reason: str = ""
    warnings: list[str] = attrs.field(factory=list)


@frozen(kw_only=True)
class StepOf:
    """One row of a table.

    `do` returns the orders (none: there is nothing to do) and may raise McpError; `then` reads their answers; `undo`
    returns the orders that take it back; `debt` says what stays to be done on a node that is away. After a step with
    `is_final` there is no way back.
    """

    name: str
    do: Callable[[Job], list[Order]]
    then: Callable[[Job, Sequence[Answer]], None] | None = None
    undo: Callable[[Job], list[Order]] | None = None
    debt: Callable[[Job, Order], Debt | None] | None = None
    is_final: bool = False
    is_question: bool = False
    """Nothing is changed, and others may answer: a node that is silent is not waited for."""


class StepFailed(McpError):
    """An order of a step failed; carries the agent's own words and the container's last lines."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.reason, hint=failed.hint, code=failed.code)
        self.failed = failed


# ------------------------------------------------------------------ what comes out


@frozen(kw_only=True)
class Send:
    """Give this order to its agent; the answer comes back under the call's name."""

    call: str
    order: Order


@frozen(kw_only=True)
class Moved:
    """A step is not what it was: tell whoever follows."""

    step: Step


@frozen(kw_only=True)
class Ended:
    """The operation is over."""


Out = Send | Moved | Ended


@attrs.define(kw_only=True)
class Operation:
    """One run of a table; feed it answers, returns of nodes and the time."""

    job: Job
    table: tuple[StepOf, ...]
    deadline_s: float
    started_s: float
    return_timeout_s: float = RETURN_TIMEOUT_S
    position: int = 0
    phase: Literal["doing", "undoing", "ended"] = "doing"
    shown: dict[str, Step] = attrs.field(factory=dict)
    ended_s: float = 0.0
    outcome: Outcome = "unknown"
    failure: Failed | None = None
    leftovers: list[str] = attrs.field(factory=list)
    debts: list[tuple[str, Debt]] = attrs.field(factory=list)
    is_cancelled: bool = False
    _calls: dict[str, Order] = attrs.field(factory=dict)
    _answers: list[Answer] = attrs.field(factory=list)
    _away: dict[str, tuple[Order, float]] = attrs.field(factory=dict)
    _lost_s: dict[str, float] = attrs.field(factory=dict)
    _forgotten: set[str] = attrs.field(factory=set)
    _times_anew: int = 0
    _step_began_s: float = 0.0
    _serial: int = 0

    # ------------------------------------------------------------------ events

    def start(self, now_s: float) -> list[Out]:
        """Begin with the step at `position`."""
        return self._do(now_s)

    def answered(self, call: str, answer: Answer, now_s: float) -> list[Out]:
        """Take the end of an order in; an unknown call is an answer that came too late and changes nothing."""
        order = self._calls.pop(call, None)
        if order is None or self.phase == "ended":
            return []
        is_lost = answer.failure and answer.certainty == "unknown"
        if is_lost and self.phase == "doing" and not self.is_cancelled and not self._step.is_question:
            return self._wait_for(call, order, answer, now_s)
        self._answers.append(answer)
        return self._settle(now_s)

    def progressed(self, call: str, detail: str, now_s: float) -> list[Out]:
        """Show what an agent is doing."""
        order = self._calls.get(call)
        if order is None:
            return []
        self._lost_s.pop(order.node, None)
        state: StepState = "undoing" if self.phase == "undoing" else "running"
        return [self._show(state, now_s, detail, node=order.node)]

    def returned(self, node: str, now_s: float, *, is_new: bool = False) -> list[Out]:
        """A node that was lost is back: ask it the same again, which is harmless and tells how it went.

        `is_new`: it is another agent process; what the one before had in hand will never be answered.
        """
        back = {call: order for call, (order, _) in self._away.items() if order.node == node}
        if is_new and self._times_anew < ANEW_LIMIT:
            lost = {call: order for call, order in self._calls.items() if order.node == node}
            self._times_anew += bool(lost)
            back |= lost
        out: list[Out] = []
        for call, order in back.items():
            self._away.pop(call, None)
            self._calls.pop(call, None)
            if self.is_cancelled and self.phase == "doing":
                self._answers.append(Answer(order=order, failure=self.failure, certainty="unknown"))
                continue
            state: StepState = "undoing" if self.phase == "undoing" else "running"
            out += [self._show(state, now_s, f"{node} is back, asking again", node=node), self._send(order)]
        return out if out or not back else self._settle(now_s)

    def forgotten(self, node: str, now_s: float) -> list[Out]:
        """A node was removed from the fleet: nothing it was asked will ever be answered, and it is asked no more."""
        self._forgotten.add(node)
        lost = [call for call, (order, _) in self._away.items() if order.node == node]
        lost += [call for call, order in self._calls.items() if order.node == node]
        for call in lost:
            order = self._calls.pop(call) if call in self._calls else self._away.pop(call)[0]
            reason = f"{node} was removed from the fleet in the middle of {self._step.name}"
            self._answers.append(Answer(order=order, failure=Failed(code="node_removed", reason=reason)))
        return self._settle(now_s) if lost else []

    def tick(self, now_s: float) -> list[Out]:
        """Give up on nodes that did not return, and on an operation past its deadline."""
        out: list[Out] = []
        if self.phase == "ended":
            return out
        for call, (order, since_s) in list(self._away.items()):
            if now_s - since_s >= self.return_timeout_s or now_s >= self.deadline_s:
                del self._away[call]
                lost = Failed(
                    code="no_answer",
                    reason=f"{order.node} was lost in the middle of {self._step.name} and did not return in time",
                    hint=f"`mcp node why {order.node}` shows the evidence.",
                )
                self._answers.append(Answer(order=order, failure=lost, certainty="unknown"))
                out += self._settle(now_s)
        return out

    def cancel(self, now_s: float) -> list[Out]:
        """Stop at the next safe point and undo.

        Raises:
            McpError: it is too late: what comes now has no way back.
        """
        if self.phase != "doing" or (self.position < len(self.table) and self._step.is_final):
            raise McpError(
                f"operation {self.job.op} can no longer be cancelled: it is {self.where}",
                hint=f"`mcp op show {self.job.op} --follow` follows it to its end.",
                code="too_late",
            )
        self.is_cancelled = True
        self.failure = Failed(code="cancelled", reason=f"cancelled during {self._step.name}")
        out: list[Out] = []
        for call, (order, _) in list(self._away.items()):
            del self._away[call]
            self._answers.append(Answer(order=order, failure=self.failure, certainty="unknown"))
        if not self._calls:
            out += self._settle(now_s)
        return out

    # ------------------------------------------------------------------- facts

    @property
    def where(self) -> str:
        """Where the operation stands, in words."""
        if self.phase == "ended":
            return "over"
        return f"at step {self._step.name}" if self.phase == "doing" else "being undone"

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for a node to return."""
        return bool(self._away)

    @property
    def busy_nodes(self) -> set[str]:
        """Nodes that have an order of this operation in hand."""
        return {order.node for order in self._calls.values()}

    def order_of(self, call: str) -> Order | None:
        """Return the order behind a call that is still open."""
        return self._calls.get(call)

    @property
    def logs(self) -> tuple[ContainerLog, ...]:
        """The failing container's last lines."""
        return self.failure.logs if self.failure else ()

    @property
    def _step(self) -> StepOf:
        return self.table[self.position]

    # ------------------------------------------------------------------- doing

    def _do(self, now_s: float) -> list[Out]:
        out: list[Out] = []
        while self.position < len(self.table):
            self._step_began_s = now_s
            self._answers = []
            self._lost_s = {}
            try:
                orders = self._step.do(self.job)
            except McpError as error:
                return out + self._fail(failed_from(error), now_s, acted=False)
            if orders:
                only = orders[0].node if len({order.node for order in orders}) == 1 else ""
                out.append(self._show("running", now_s, node=only))
                return out + [self._send(order) for order in orders]
            if self.job.is_unchanged:
                return out + self._end("unchanged", now_s)
            self.position += 1
        return out + self._end("deployed" if self.job.kind == "deploy" else "done", now_s)

    def _settle(self, now_s: float) -> list[Out]:
        """Go on when every order of the step has ended."""
        if self._calls or self._away:
            return []
        if self.phase == "undoing":
            return self._undone(now_s)
        troubles = [answer for answer in self._answers if answer.failure]
        if self.is_cancelled and self.failure:
            return self._fail(self.failure, now_s, acted=True)
        if troubles and self._step.is_final:
            return self._cannot_finish(troubles, now_s)
        if troubles and not self._step.then:
            first = troubles[0]
            assert first.failure is not None
            return self._fail(first.failure, now_s, acted=any(t.certainty != "nothing" for t in troubles))
        try:
            if self._step.then:
                self._step.then(self.job, self._answers)
        except McpError as error:
            acted = any(t.certainty != "nothing" for t in troubles) or not troubles
            return self._fail(failed_from(error), now_s, acted=acted)
        if self.job.is_unchanged:
            return [self._show("unchanged", now_s), *self._end("unchanged", now_s)]
        out: list[Out] = [self._show("done", now_s)]
        self.position += 1
        return out + self._do(now_s)

    def _wait_for(self, call: str, order: Order, answer: Answer, now_s: float) -> list[Out]:
        assert answer.failure is not None
        # Since it was lost first: one that is asked again and again, and never answers, is not waited for anew each time.
        self._away[call] = (order, self._lost_s.setdefault(order.node, now_s))
        detail = (
            f"lost {order.node} ({answer.failure.reason}); waiting up to {self.return_timeout_s:.0f} s for it to return"
        )
        return [self._show("running", now_s, detail, node=order.node)]

    def _cannot_finish(self, troubles: Sequence[Answer], now_s: float) -> list[Out]:
        """A step without a way back stopped half-way: the new state stands, what is left of the old one is named."""
        for answer in troubles:
            assert answer.failure is not None
            self._leave(answer, "remove the old copy")
        self.failure = troubles[0].failure
        return [
            self._show("leftover", now_s, troubles[0].failure.reason if troubles[0].failure else ""),
            *self._end("unknown", now_s),
        ]

    # ------------------------------------------------------------------ undoing

    def _fail(self, failure: Failed, now_s: float, *, acted: bool) -> list[Out]:
        self.failure = failure
        first = failure.reason.splitlines()[0] if failure.reason else failure.code
        out: list[Out] = [self._show("failed", now_s, first)]
        self.phase = "undoing"
        nothing_done = not acted and self.position == 0
        if not acted:
            self.position -= 1
        if nothing_done:
            return out + self._end("refused", now_s)
        return out + self._undo(now_s)

    def _undo(self, now_s: float) -> list[Out]:
        out: list[Out] = []
        while self.position >= 0:
            self._answers = []
            self._step_began_s = now_s
            orders = self._step.undo(self.job) if self._step.undo else []
            gone = [order.node for order in orders if order.node in self._forgotten]
            self.leftovers += [f"finish the undo on {node}: it was removed from the fleet" for node in gone]
            orders = [order for order in orders if order.node not in self._forgotten]
            if orders:
                out.append(self._show("undoing", now_s, node=orders[0].node))
                return out + [self._send(order) for order in orders]
            self.position -= 1
        return out + self._end("unknown" if self.leftovers else self._undone_outcome(), now_s)

    def _undone_outcome(self) -> Outcome:
        """Nothing was touched by the first step of a table that has more of them; a table of one has nothing to undo."""
        if len(self.table) == 1:
            return "failed" if self.job.kind != "plan" else "refused"
        return "undone" if len(self.shown) > 1 else "refused"

    def _undone(self, now_s: float) -> list[Out]:
        left = [answer for answer in self._answers if answer.failure]
        for answer in left:
            self._leave(answer, "finish the undo")
        out: list[Out] = [self._show("leftover" if left else "undone", now_s)]
        self.position -= 1
        return out + self._undo(now_s)

    def _leave(self, answer: Answer, what: str) -> None:
        assert answer.failure is not None
        is_gone = answer.order.node in self._forgotten
        debt = self._step.debt(self.job, answer.order) if self._step.debt and not is_gone else None
        text = f"{what} on {answer.order.node}: {answer.failure.reason}"
        if debt:
            self.debts.append((answer.order.node, debt))
            text += f" (done by itself when {answer.order.node} is back; by hand: `{debt.command}`)"
        self.leftovers.append(text)

    # ------------------------------------------------------------------ helpers

    def _send(self, order: Order) -> Send:
        self._serial += 1
        call = f"{self.job.op}-{self._serial}"
        self._calls[call] = order
        return Send(call=call, order=order)

    def _show(self, state: StepState, now_s: float, detail: str = "", *, node: str = "") -> Moved:
        name = self._step.name
        old = self.shown.get(name)
        step = Step(
            step=name,
            node=node or (old.node if old else "") or self.job.node,
            state=state,
            seconds=round(now_s - self._step_began_s, 3),
            detail=detail,
        )
        self.shown[name] = step
        return Moved(step=step)

    def _end(self, outcome: Outcome, now_s: float) -> list[Out]:
        self.phase = "ended"
        self.outcome = outcome
        self.ended_s = now_s
        return [Ended()]


def failed_from(error: McpError) -> Failed:
    """Turn one of our errors into what travels; an error that brings an agent's own words passes them on."""
    if isinstance(error, StepFailed):
        return error.failed
    return Failed(code=error.code, reason=error.reason, hint=error.hint)
