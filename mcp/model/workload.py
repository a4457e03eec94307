"""What an agent decides about one service: which orders it takes, what is to be done next, and how it is told. Pure.

There is one way from what is to what shall be, `converge`: orders, boot, the return of the engine and every retry use it,
so doing a thing twice, or half and then again, ends the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Literal

import attrs

from mcp.model.errors import McpError, Refused
from mcp.model.messages import (
    Candidate,
    CommitWorkload,
    ContainerLog,
    ContainerState,
    DropWorkload,
    Failed,
    RestartWorkload,
    RunWorkload,
    ServiceRecord,
    StartWorkload,
    StopWorkload,
)
from mcp.model.names import container_name, is_service_name
from mcp.model.ports import Intent
from mcp.model.spec import ComponentSpec, ServiceSpec
from mcp.model.values import frozen

RUNNING = ("running", "restarting")

DEFAULT_GRACE_S = 10.0
"""For a container whose definition nobody remembers."""

UNPROVEN_GRACE_S = 2.0
"""For a container that was never healthy: it serves nobody, and its undo should not take long."""

LOST_WITH_THE_MACHINE = 255
"""The exit code that Docker writes for a container whose machine lost its power."""


@frozen(kw_only=True)
class Known:
    """What an agent knows of one service: its accepted intents, and the containers the engine showed last."""

    service: str
    committed: Intent | None = None
    candidate: Intent | None = None
    containers: tuple[ContainerState, ...] = ()
    highest: int = 0
    """The highest generation this node must not go back to: accepted once, dropped, or seen on a container."""

    @property
    def intents(self) -> tuple[Intent, ...]:
        """What was accepted, the newest first."""
        return tuple(intent for intent in (self.candidate, self.committed) if intent)

    def intent(self, generation: int) -> Intent | None:
        """Return the intent of a generation."""
        return next((intent for intent in self.intents if intent.generation == generation), None)

    def container(self, generation: int, component: str) -> ContainerState | None:
        """Return the container of a component."""
        return next((c for c in self.containers if (c.generation, c.component) == (generation, component)), None)


# ---------------------------------------------------------------- which orders

OnCommitted = StopWorkload | StartWorkload | RestartWorkload


def check_run(known: Known, order: RunWorkload, node: str) -> bool:
    """Say whether this generation is new (False: it was accepted before, and is asked for again).

    Raises:
        Refused: stale_generation, or bad_name.
    """
    names = [order.service, *(component.name for component in order.spec.components)]
    bad = [name for name in names if not is_service_name(name)]
    if bad or order.spec.name != order.service:
        name = (bad or [order.spec.name])[0][:60]
        raise Refused("bad_name", f"cannot run {order.service[:60]!r}: a name in its definition is not legal: {name!r}")
    mine = known.intent(order.generation)
    if mine and mine.spec_hash == order.spec_hash:
        return False
    if order.generation <= known.highest:
        raise stale(known, order.generation, node)
    return True


def check_commit(known: Known, order: CommitWorkload, node: str) -> bool:
    """Say whether there is something to commit (False: it is committed already).

    Raises:
        Refused: stale_generation, not_here, or not_ready.
    """
    mine = known.intent(order.generation)
    if mine is None:
        raise missing_generation(known, order.generation, node)
    if mine.is_candidate and not mine.ready:
        raise Refused(
            "not_ready",
            f"cannot commit generation {order.generation} of {known.service} on {node}: it was never seen whole and healthy",
        )
    return mine.is_candidate


def check_committed(known: Known, order: OnCommitted, node: str) -> Intent:
    """Return the intent that an order to stop, start or restart is about.

    Raises:
        Refused: stale_generation, or not_here.
    """
    if known.committed is None or known.committed.generation != order.generation:
        raise missing_generation(known, order.generation, node)
    return known.committed


def check_drop(known: Known, order: DropWorkload, node: str) -> None:
    """Let an undo pass; one of a generation that is not here (any more) finds nothing to do.

    Raises:
        Refused: committed; the service's own generation is removed only by RemoveWorkload.
    """
    if known.committed and known.committed.generation == order.generation:
        raise Refused(
            "committed",
            f"cannot drop generation {order.generation} of {known.service} on {node}: it is the service's own by now",
        )


def missing_generation(known: Known, generation: int, node: str) -> Refused:
    """Make the refusal of an order about a generation that is not here."""
    if generation < known.highest:
        return stale(known, generation, node)
    have = ", ".join(str(intent.generation) for intent in known.intents) or "none"
    return Refused("not_here", f"generation {generation} of {known.service} is not on {node} (there: {have})")


def stale(known: Known, generation: int, node: str) -> Refused:
    """Make the refusal of an order that comes too late."""
    return Refused(
        "stale_generation",
        f"{node} has accepted generation {known.highest} of {known.service} already;"
        f" an order for generation {generation} comes too late",
        hint=f"`mcp status {known.service}` shows what runs; deploy again if it is not what you want.",
    )


# ----------------------------------------------------------------- what to do

Selector = Callable[[ContainerState], bool]


@frozen
class Make:
    """Create the container of a component."""

    component: ComponentSpec
    generation: int


@frozen
class Launch:
    """Start a container that is there."""

    component: ComponentSpec
    generation: int


@frozen
class Await:
    """Wait until a container is healthy."""

    component: ComponentSpec
    generation: int


@frozen
class Halt:
    """Stop a container."""

    name: str
    grace_s: float


@frozen
class Discard:
    """Remove a container."""

    name: str


Action = Make | Launch | Await | Halt | Discard

Goal = Literal["run", "retire", "drop", "resume", "remove", "stop", "start", "restart", "settle"]
"""run: the candidate up beside the committed one. retire: nothing older than the committed one. drop: nothing of a
generation. resume: the committed one up that was stopped for a candidate. remove: nothing up to a generation. stop, start,
restart: the committed one. settle: what boot and the return of the engine owe the committed one; a candidate is left for
the master to finish or undo.
"""


def converge(known: Known, goal: Goal, generation: int = 0, *, only: Collection[str] | None = None) -> list[Action]:
    """Return what is to be done, in order, to get from what is to what the goal asks; nothing when it is reached.

    `generation` is needed for run, drop and remove. `only` are names of containers that settle may touch (None: all).
    """
    match goal:
        case "run":
            return _run(known, generation)
        case "drop":
            return _discard(known, lambda c: c.generation == generation)
        case "resume":
            return _resume(known)
        case "remove":
            return _discard(known, lambda c: c.generation <= generation)
        case "retire":
            return _retire(known)
        case "stop":
            return _halt(known, known.committed)
        case "start":
            return _up(known, known.committed)
        case "restart":
            return _restart(known)
        case "settle":
            return _retire(known) + _settle(known, only)


def _run(known: Known, generation: int) -> list[Action]:
    mine = known.intent(generation)
    if mine is None:
        return []
    have = {c.component for c in known.containers if c.generation == generation}
    made: list[Action] = [Make(c, generation) for c in mine.spec.components if c.name not in have]
    halted = _halt(known, known.committed) if mine.is_candidate and mine.spec.stops_first else []
    if not mine.spec.active:
        return made + halted
    if not halted:
        return _up(known, mine)
    # What can go wrong in creating goes wrong before the old copy is touched, and it is away for a shorter time.
    return made + halted + [action for action in _up(known, mine) if action not in made]


def _up(known: Known, intent: Intent | None) -> list[Action]:
    actions: list[Action] = []
    for component in intent.spec.components if intent else ():
        assert intent is not None
        actions += _raise(known, intent, component)
        actions.append(Await(component, intent.generation))
    return actions


def _raise(known: Known, intent: Intent, component: ComponentSpec) -> list[Action]:
    """Return how a component's container comes to run, from whatever state it is in."""
    container = known.container(intent.generation, component.name)
    make: list[Action] = [Make(component, intent.generation), Launch(component, intent.generation)]
    if container is None:
        return make
    if container.state in RUNNING:
        return []
    if container.state in ("created", "exited"):
        return make[1:]
    return [Discard(container.name), *make]  # paused or dead: neither starts


def _restart(known: Known) -> list[Action]:
    actions: list[Action] = []
    for component in known.committed.spec.components if known.committed else ():
        assert known.committed is not None
        container = known.container(known.committed.generation, component.name)
        if container and container.state in RUNNING:
            actions += [Halt(container.name, component.stop_grace_s), Launch(component, container.generation)]
        else:
            actions += _raise(known, known.committed, component)
        actions.append(Await(component, known.committed.generation))
    return actions


def _settle(known: Known, only: Collection[str] | None) -> list[Action]:
    mine = known.committed
    if mine is None or mine.desired == "stopped":
        return []
    if known.candidate and known.candidate.spec.stops_first:
        return []  # the old copy was stopped for the candidate's sake: together they would fight for a port or a volume
    actions: list[Action] = []
    for component in mine.spec.components:
        name = container_name(known.service, component.name, mine.generation)
        container = known.container(mine.generation, component.name)
        if only is not None and name not in only:
            continue
        if container and (container.state == "paused" or (only is None and not _comes_back(component, container))):
            continue
        actions += _raise(known, mine, component)
    return actions


def _comes_back(component: ComponentSpec, container: ContainerState) -> bool:
    """Say whether a stopped container of this restart policy is to be started at boot."""
    if container.state != "exited":
        return True
    policy = component.restart.partition(":")[0]
    if policy == "no":
        return container.exit_code == LOST_WITH_THE_MACHINE
    return policy != "on-failure" or container.exit_code != 0


def _resume(known: Known) -> list[Action]:
    mine = known.committed
    if mine is None or mine.desired == "stopped" or (known.candidate and known.candidate.spec.stops_first):
        return []
    stopped = {
        c.component for c in known.containers if c.generation == mine.generation and c.state in ("created", "exited")
    }
    return [Launch(c, mine.generation) for c in mine.spec.components if c.name in stopped]


def _retire(known: Known) -> list[Action]:
    mine, kept = known.committed, {intent.generation for intent in known.intents}
    if mine is None:
        return []
    return _discard(known, lambda c: c.generation < mine.generation and c.generation not in kept)


def _halt(known: Known, intent: Intent | None) -> list[Action]:
    if intent is None:
        return []
    up = [c for c in known.containers if c.generation == intent.generation and c.state in (*RUNNING, "paused")]
    return [Halt(c.name, grace_s(known, c)) for c in _last_first(known, up)]


def _discard(known: Known, which: Selector) -> list[Action]:
    actions: list[Action] = []
    for container in _last_first(known, [c for c in known.containers if which(c)]):
        if container.state in RUNNING:
            actions.append(Halt(container.name, grace_s(known, container)))
        actions.append(Discard(container.name))
    return actions


def _last_first(known: Known, containers: Iterable[ContainerState]) -> list[ContainerState]:
    """Sort so that what was started last goes first; the order of the components is the order of starting."""
    order = [component.name for intent in known.intents for component in intent.spec.components]
    place = {name: order.index(name) for name in order}
    return sorted(containers, key=lambda c: (-place.get(c.component, -1), c.name))


def grace_s(known: Known, container: ContainerState) -> float:
    """Return how long a container may take to stop, in seconds."""
    mine = known.intent(container.generation)
    for intent in (mine, *known.intents):
        for component in intent.spec.components if intent else ():
            if component.name == container.component:
                is_unproven = mine is not None and mine.is_candidate and not mine.ready
                return min(component.stop_grace_s, UNPROVEN_GRACE_S) if is_unproven else component.stop_grace_s
    return DEFAULT_GRACE_S


def describe(action: Action, service: str) -> str:
    """Say what an action does, for whoever follows the operation."""
    match action:
        case Make(component, generation):
            return f"creating {short(container_name(service, component.name, generation))}"
        case Launch(component, generation):
            return f"starting {short(container_name(service, component.name, generation))}"
        case Await(component, generation):
            return f"waiting until {short(container_name(service, component.name, generation))} is healthy"
        case Halt(name, grace):
            return f"stopping {short(name)} (up to {grace:g} s)"
        case Discard(name):
            return f"removing {short(name)}"


def short(name: str) -> str:
    """Return a container's name as people see it: web.g3."""
    return name.removeprefix("mcp.")


# ------------------------------------------------------------------ how it is told


def record_of(known: Known, *, problems: Iterable[str] = ()) -> ServiceRecord | None:
    """Return what the master is told of a service; None when there is no intent."""
    main = known.committed or known.candidate
    if main is None:
        return None
    candidate = known.candidate
    return ServiceRecord(
        service=known.service,
        op=main.op,
        generation=known.committed.generation if known.committed else 0,
        spec=main.spec,
        spec_hash=main.spec_hash,
        desired=main.desired,
        candidate=Candidate(
            op=candidate.op,
            generation=candidate.generation,
            spec=candidate.spec,
            spec_hash=candidate.spec_hash,
            ready=candidate.ready,
        )
        if candidate
        else None,
        containers=known.containers,
        problems=tuple(problems),
    )


def with_drift(known: Known, noticed: Mapping[str, str]) -> Known:
    """Return the same with a problem on each container that is not as it should be, and an entry for each missing one.

    `noticed` says since when, by component ("12:03:04Z"). Drift is told and not repaired: somebody did it on purpose.
    """
    own = _own(known)
    wrong = {c.name: _text(text, c.component, noticed) for c in own if (text := drift_of(known, c))}
    containers = [attrs.evolve(c, problem=wrong[c.name]) if c.name in wrong else c for c in known.containers]
    return attrs.evolve(known, containers=(*containers, *_missing(known, noticed)))


def _own(known: Known) -> list[ContainerState]:
    mine = known.committed
    return [c for c in known.containers if mine and c.generation == mine.generation]


def _missing(known: Known, noticed: Mapping[str, str]) -> list[ContainerState]:
    mine = known.committed
    have = {c.component for c in _own(known)}
    if mine is None or mine.desired == "stopped":
        return []
    return [
        ContainerState(
            service=known.service,
            component=component.name,
            name=container_name(known.service, component.name, mine.generation),
            image=component.image,
            state="missing",
            spec_hash=mine.spec_hash,
            generation=mine.generation,
            problem=_text(f"removed outside{{}}; `mcp start {known.service}` makes it anew", component.name, noticed),
        )
        for component in mine.spec.components
        if component.name not in have
    ]


def _text(template: str, component: str, noticed: Mapping[str, str]) -> str:
    at = noticed.get(component, "")
    return template.format(f" at {at}" if at else "")


def drift_of(known: Known, container: ContainerState) -> str:
    """Say what is wrong with a container of the committed generation, `{}` standing for since when; "" when nothing is."""
    mine = known.committed
    component = next((c for c in mine.spec.components if c.name == container.component), None) if mine else None
    if mine is None or component is None:
        return ""
    is_up = container.state in RUNNING
    if mine.desired == "stopped":
        return f"started outside{{}}; `mcp stop {known.service}` stops it" if is_up else ""
    if container.state == "running" or is_completed(component, container):
        return ""
    start = f"`mcp start {known.service}` starts it"
    if container.state == "restarting":
        how = f"exit code {container.exit_code}, {container.restarts} times"
        return f"restarts again and again ({how}); `mcp logs {known.service}` may say why"
    if container.out_of_memory:
        return f"ran out of memory{{}} and is down; raise `memory`, then {start}"
    if container.state == "paused":
        return "paused outside{}; `docker unpause` on the node wakes it"
    policy = component.restart.partition(":")[0]
    if policy in ("always", "unless-stopped"):  # the engine itself would have restarted what merely ended
        return f"stopped outside{{}} (exit code {container.exit_code}); {start}"
    return f"ended{{}} with exit code {container.exit_code}; `mcp logs {known.service}`, then {start}"


def drifted(known: Known) -> set[str]:
    """Return the components of the committed generation that are not as they should be."""
    wrong = {c.component for c in _own(known) if drift_of(known, c)}
    return wrong | {c.component for c in _missing(known, {})}


def is_completed(component: ComponentSpec, container: ContainerState) -> bool:
    """Say whether a container has done its work: it ended well, was not to be restarted, and has nothing to serve."""
    ends = component.restart.partition(":")[0] in ("no", "on-failure")
    serves = bool(component.routes or component.health.path or component.health.tcp or component.health.cmd)
    return ends and not serves and container.state == "exited" and container.exit_code == 0


# ---------------------------------------------------------------- what went wrong


class WorkFailed(McpError):
    """A container did not come to run healthily; `failed` is the frame for the master, with its last lines."""

    def __init__(self, code: str, reason: str, *, hint: str, log: ContainerLog) -> None:
        super().__init__(reason, hint=hint, code=code)
        self.failed = Failed(code=code, reason=reason, hint=hint, logs=(log,))


def exited(container: ContainerState, node: str, after_s: float, lines: Iterable[str]) -> WorkFailed:
    """Make the failure of a container that ended before it was healthy."""
    log = _log(container, lines)
    if container.state == "missing":
        reason = f"{short(container.name)} on {node} was removed outside while it came up"
        return WorkFailed("removed", reason, hint="", log=log)
    ended = "ran out of memory" if container.out_of_memory else f"exited with code {container.exit_code}"
    hint = "Raise `memory` in its definition." if container.out_of_memory else "Its last lines are below."
    reason = f"{short(container.name)} on {node} {ended} after {after_s:.1f} s, before the service was healthy"
    return WorkFailed("exited", reason, hint=hint, log=log)


def unhealthy(container: ContainerState, node: str, after_s: float, seen: str, lines: Iterable[str]) -> WorkFailed:
    """Make the failure of a container that runs and was not healthy in time; `seen` is the last check's finding."""
    log = attrs.evolve(_log(container, lines), exit_code=None)
    must_listen = "The container must listen on the port in $PORT, on all addresses."
    hint = must_listen if "refused" in seen or "closed" in seen else "Its last lines are below."
    reason = f"{short(container.name)} on {node} was not healthy within {after_s:.0f} s: {seen}"
    return WorkFailed("unhealthy", reason, hint=hint, log=log)


def _log(container: ContainerState, lines: Iterable[str]) -> ContainerLog:
    return ContainerLog(
        component=container.component,
        container=container.name,
        exit_code=container.exit_code,
        out_of_memory=container.out_of_memory,
        lines=tuple(lines),
    )


# -------------------------------------------------------------- lost and found


def adopt(found: Iterable[tuple[ContainerState, ServiceSpec, str]]) -> list[Intent]:
    """Return the intents that containers and their labels (definition, operation) tell of, after the records were lost.

    Two generations of a service are a deploy that was under way: the newest is a candidate that the master finishes or
    undoes. A service of which nothing runs was stopped by somebody, and stays so.
    """
    services: dict[str, dict[int, list[tuple[ContainerState, ServiceSpec, str]]]] = {}
    for each in found:
        services.setdefault(each[0].service, {}).setdefault(each[0].generation, []).append(each)
    intents: list[Intent] = []
    for service, generations in services.items():
        newest = sorted(generations, reverse=True)[:2]
        for generation in newest:
            container, spec, op = generations[generation][0]
            is_candidate = generation == newest[0] and len(newest) > 1
            runs = any(state.state in RUNNING for state, _, _ in generations[generation])
            intents.append(
                Intent(
                    service=service,
                    op=op,
                    generation=generation,
                    spec=spec,
                    spec_hash=container.spec_hash,
                    desired="running" if runs or (is_candidate and spec.active) else "stopped",
                    is_candidate=is_candidate,
                    ready=not is_candidate,
                )
            )
    return intents


def ports_of(containers: Iterable[ContainerState]) -> dict[tuple[str, str], int]:
    """Return the host port of each (component, route), as the containers' labels tell it."""
    found = {}
    for container in containers:
        for route, bound in container.ports.items():
            port = bound.rpartition(":")[2]
            if port.isascii() and port.isdigit():
                found[container.component, route] = int(port)
    return found
