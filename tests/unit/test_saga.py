"""A saga as rows: which order is refused, failed or unanswered, and which orders follow."""

from __future__ import annotations

import attrs
import pytest

from mcp.model.errors import McpError, Refused
from mcp.model.fleet import Debt, Fleet
from mcp.model.messages import Done, Failed
from mcp.model.saga import Answer, Certainty, Ended, Job, Moved, Operation, Order, Send, StepOf


@attrs.frozen
class Do:
    """An order that says its own name, e.g. "pull" or "undo run"."""

    name: str


def step(name: str, *, undo: bool = False, is_final: bool = False) -> StepOf:
    """A row of a table whose orders are named after it."""
    return StepOf(
        name=name,
        do=lambda job: [Order(node="orion", message=Do(name))],
        undo=(lambda job: [Order(node="orion", message=Do(f"undo {name}"))]) if undo else None,
        debt=lambda job, order: Debt(service="web", generation=2, candidate_only=True, why=f"undo of {name}"),
        is_final=is_final,
    )


TABLE = (step("pull"), step("run", undo=True), step("route", undo=True), step("retire", is_final=True))


def operation(table: tuple[StepOf, ...] = TABLE) -> Operation:
    """A deploy of web on orion."""
    job = Job(op="4f2c", kind="deploy", service="web", operator="kyle", fleet=Fleet(master="rift"), node="orion")
    return Operation(job=job, table=table, started_s=0.0, deadline_s=600.0, return_timeout_s=60.0)


def play(op: Operation, trouble: dict[str, Certainty]) -> list[str]:
    """Run an operation to its end; orders named in `trouble` end in that certainty, all others well."""
    said: list[str] = []
    outs = op.start(0.0)
    for now in range(1, 50):
        sends = [out for out in outs if isinstance(out, Send)]
        said += [send.order.message.name for send in sends]
        if any(isinstance(out, Ended) for out in outs):
            return said
        outs = []
        for send in sends:
            certainty = trouble.get(send.order.message.name)
            failure = Failed(code="x", reason=f"{send.order.message.name} went wrong") if certainty else None
            answer = Answer(
                order=send.order, reply=None if failure else Done(), failure=failure, certainty=certainty or "failed"
            )
            outs += op.answered(send.call, answer, float(now))
        if not sends:
            outs = op.tick(now + 100.0)
    raise AssertionError(f"no end: {said}")


ROWS = [
    ({}, "pull, run, route, retire", "deployed"),
    ({"pull": "failed"}, "pull", "refused"),
    ({"run": "nothing"}, "pull, run", "undone"),
    ({"run": "failed"}, "pull, run, undo run", "undone"),
    ({"run": "unknown"}, "pull, run, undo run", "undone"),
    ({"route": "nothing"}, "pull, run, route, undo run", "undone"),
    ({"route": "failed"}, "pull, run, route, undo route, undo run", "undone"),
    ({"route": "failed", "undo route": "failed"}, "pull, run, route, undo route, undo run", "unknown"),
    ({"run": "failed", "undo run": "nothing"}, "pull, run, undo run", "unknown"),
    ({"retire": "failed"}, "pull, run, route, retire", "unknown"),
    ({"retire": "unknown"}, "pull, run, route, retire", "unknown"),
]


@pytest.mark.parametrize(("trouble", "orders", "outcome"), ROWS)
def test_an_operation_undoes_from_where_it_stopped(trouble: dict[str, Certainty], orders: str, outcome: str) -> None:
    """Refused: from the step before; failed or unanswered: from that very step; after the last step never."""
    op = operation()
    assert ", ".join(play(op, trouble)) == orders
    assert op.outcome == outcome


def test_what_could_not_be_undone_is_named_with_its_command_and_kept_as_a_debt() -> None:
    """An operator reads what is left and what finishes it; the master keeps it for the node's return."""
    op = operation()
    play(op, {"run": "failed", "undo run": "unknown"})
    assert op.debts == [("orion", Debt(service="web", generation=2, candidate_only=True, why="undo of run"))]
    assert "on orion" in op.leftovers[0]
    assert "`mcp deploy web`" in op.leftovers[0]


def test_a_lost_node_is_waited_for_and_asked_the_same_again() -> None:
    """An agent that restarts in the middle costs a pause, not the deploy."""
    op = operation(TABLE[:1])
    (_, send) = op.start(0.0)
    assert isinstance(send, Send)
    lost = Answer(order=send.order, failure=Failed(code="no_answer", reason="silence"), certainty="unknown")
    (moved,) = op.answered(send.call, lost, 1.0)
    assert isinstance(moved, Moved)
    assert "waiting up to 60 s" in moved.step.detail
    assert op.is_waiting
    (_, again) = op.returned("orion", 5.0)
    assert isinstance(again, Send)
    assert (again.order, again.call != send.call) == (send.order, True)


def test_what_an_agent_had_in_hand_is_asked_of_its_successor_at_once() -> None:
    """Nobody waits in silence for a process that is gone."""
    op = operation(TABLE[:1])
    (_, send) = op.start(0.0)
    assert isinstance(send, Send)
    assert op.returned("orion", 1.0) == []  # the same process still works on it
    assert op.returned("hyperborea", 1.0, is_new=True) == []
    (_, again) = op.returned("orion", 1.0, is_new=True)
    assert isinstance(again, Send)
    assert again.order == send.order
    op.answered(again.call, Answer(order=send.order, reply=Done()), 2.0)
    assert op.outcome == "deployed"


def test_an_order_that_crashes_every_agent_is_not_asked_for_ever() -> None:
    """A crash loop ends by the limits of the order."""
    op = operation(TABLE[:1])
    op.start(0.0)
    sent = [out for _ in range(20) for out in op.returned("orion", 1.0, is_new=True) if isinstance(out, Send)]
    assert len(sent) == 5


def test_what_was_cancelled_is_not_asked_of_a_successor() -> None:
    """It is undone there."""
    op = operation(TABLE[1:])
    op.start(0.0)
    op.cancel(1.0)
    outs = op.returned("orion", 2.0, is_new=True)
    assert [out.order.message.name for out in outs if isinstance(out, Send)] == ["undo run"]


def test_a_node_that_is_asked_again_and_stays_silent_is_given_up_in_time() -> None:
    """The time it has to return counts from its first silence."""
    op = operation(TABLE[:1])
    (_, send) = op.start(0.0)
    assert isinstance(send, Send)
    lost = Answer(order=send.order, failure=Failed(code="no_answer", reason="silence"), certainty="unknown")
    for now_s in (15.0, 40.0, 65.0):
        op.answered(send.call, lost, now_s)
        assert op.tick(now_s) == []
        (_, send) = op.returned("orion", now_s + 1.0)
        assert isinstance(send, Send)
    op.answered(send.call, lost, 81.0)
    op.tick(81.0)
    assert (op.outcome, op.failure and op.failure.code) == ("failed", "no_answer")


def test_a_late_answer_changes_nothing() -> None:
    """What was asked before the node was lost may still be answered; nobody listens any more."""
    op = operation(TABLE[:1])
    (_, send) = op.start(0.0)
    assert isinstance(send, Send)
    answer = Answer(order=send.order, reply=Done())
    assert op.answered(send.call, answer, 1.0)
    assert op.answered(send.call, answer, 2.0) == []


def test_a_cancelled_operation_undoes_what_it_did() -> None:
    """Cancelling waits for the order in hand, then takes everything back."""
    op = operation()
    outs = op.start(0.0)
    outs = op.answered(
        next(o for o in outs if isinstance(o, Send)).call, Answer(order=Order(node="orion", message=Do("pull"))), 1.0
    )
    run = next(o for o in outs if isinstance(o, Send))
    assert op.cancel(2.0) == []
    outs = op.answered(run.call, Answer(order=run.order, reply=Done()), 3.0)
    undo = next(o for o in outs if isinstance(o, Send))
    assert undo.order.message == Do("undo run")
    op.answered(undo.call, Answer(order=undo.order, reply=Done()), 4.0)
    assert (op.outcome, op.failure.code if op.failure else "") == ("undone", "cancelled")


def test_a_step_without_a_way_back_cannot_be_cancelled() -> None:
    """Once the old copy is being removed, cancelling would leave nothing."""
    op = operation((step("retire", is_final=True),))
    op.start(0.0)
    with pytest.raises(McpError, match="can no longer be cancelled"):
        op.cancel(1.0)


def test_a_refusal_before_anything_was_asked_is_a_refusal() -> None:
    """Nothing was done, so there is nothing to undo, and the outcome says so."""

    def no(job: Job) -> list[Order]:
        raise Refused("home_away", "cannot deploy web: orion is unreachable")

    op = operation((StepOf(name="place", do=no), *TABLE))
    assert play(op, {}) == []
    assert op.outcome == "refused"
