"""What a service on a node should look like, and what to do about it: pure, for orders, boot and retries alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import attrs

from mcp.model.messages import Candidate, ContainerState, ServiceRecord
from mcp.model.names import container_name
from mcp.model.ports import Intent
from mcp.model.spec import ComponentSpec

MAX_DETAIL = 300


@attrs.frozen(kw_only=True)
class Intents:
    """The one or two intents of a service: its own, and a candidate for its place."""

    own: Intent | None = None
    candidate: Intent | None = None

    @classmethod
    def of(cls, found: Iterable[Intent]) -> Intents:
        """Sort them out."""
        listed = list(found)
        return cls(
            own=next((i for i in listed if not i.is_candidate), None),
            candidate=next((i for i in listed if i.is_candidate), None),
        )

    @property
    def is_empty(self) -> bool:
        """Whether nothing was accepted."""
        return self.own is None and self.candidate is None

    @property
    def generations(self) -> set[int]:
        """The generations that may have containers."""
        return {intent.generation for intent in (self.own, self.candidate) if intent}


def sort_by_service(found: Iterable[Intent]) -> dict[str, Intents]:
    """Return the intents of each service."""
    listed = list(found)
    return {name: Intents.of(i for i in listed if i.service == name) for name in sorted({i.service for i in listed})}


# ----------------------------------------------------------------------- record


def record_of(
    service: str,
    intents: Intents,
    containers: Sequence[ContainerState],
    *,
    ready: bool,
    problems: Sequence[str],
    gone: Mapping[str, str],
) -> ServiceRecord | None:
    """Return what there is to tell of a service; None when nothing was accepted.

    `gone` has, for a container that was there and is not, when that was noticed (RFC 3339).
    """
    own, candidate = intents.own, intents.candidate
    shown = own or candidate
    if shown is None:
        return None
    mine = [c for c in containers if c.service == service and c.generation in intents.generations]
    if own is not None:
        mine += missing(own, mine, gone)
    return ServiceRecord(
        service=service,
        op=shown.op,
        generation=own.generation if own else 0,
        spec=shown.spec,
        spec_hash=shown.spec_hash,
        desired=shown.desired,
        candidate=Candidate(
            op=candidate.op,
            generation=candidate.generation,
            spec=candidate.spec,
            spec_hash=candidate.spec_hash,
            ready=ready,
        )
        if candidate
        else None,
        containers=tuple(sorted(mine, key=lambda c: (c.component, c.generation))),
        problems=tuple(problems),
    )


def missing(own: Intent, containers: Sequence[ContainerState], gone: Mapping[str, str]) -> list[ContainerState]:
    """Return a row for each component that should have a container and has none."""
    there = {c.component for c in containers if c.generation == own.generation}
    rows = []
    for component in own.spec.components:
        if component.name in there:
            continue
        name = container_name(own.service, component.name, own.generation)
        when = f" (noticed {gone[name]})" if name in gone else ""
        rows.append(
            ContainerState(
                service=own.service,
                component=component.name,
                name=name,
                image=component.image,
                state="missing",
                spec_hash=own.spec_hash,
                generation=own.generation,
                problem=f"{name} was removed outside of MCP{when}; `mcp start {own.service}` makes it anew",
            )
        )
    return rows


def orphans_of(intents: Mapping[str, Intents], containers: Iterable[ContainerState]) -> tuple[ContainerState, ...]:
    """Return our containers that belong to no accepted intent."""
    return tuple(
        c for c in containers if c.service not in intents or c.generation not in intents[c.service].generations
    )


# --------------------------------------------------------------------- converge


@attrs.frozen(kw_only=True)
class Todo:
    """What is missing for a component to run: make its container, start it, or nothing."""

    component: ComponentSpec
    name: str
    action: str  # "create" or "start"


def to_do(intent: Intent, containers: Sequence[ContainerState], *, on_request: bool) -> list[Todo]:
    """Return what is missing for an intent to be true, in the order of its components.

    Without a request (boot, the engine is back) a container that ended by itself, and whose policy does not bring it back,
    is left alone: it has done its work.
    """
    todo = []
    for component in intent.spec.components:
        name = container_name(intent.service, component.name, intent.generation)
        container = next((c for c in containers if c.name == name), None)
        if container is None:
            todo.append(Todo(component=component, name=name, action="create"))
        elif container.state in ("running", "restarting"):
            continue
        elif on_request or not has_done_its_work(component, container):
            todo.append(Todo(component=component, name=name, action="start"))
    return todo


def has_done_its_work(component: ComponentSpec, container: ContainerState) -> bool:
    """Say whether a stopped container ended by itself and shall stay so."""
    if container.state == "created" or container.problem:
        return False
    if component.restart == "no":
        return True
    return component.restart.startswith("on-failure") and container.exit_code == 0


def older_than(generation: int, containers: Iterable[ContainerState]) -> list[ContainerState]:
    """Return the containers that a commit of this generation makes superfluous."""
    return [c for c in containers if c.generation < generation]


# ------------------------------------------------------------------------- boot


@attrs.frozen(kw_only=True)
class Found:
    """What the labels of one generation of a service say."""

    service: str
    generation: int
    op: str
    spec_hash: str
    is_running: bool


def from_labels(found: Sequence[Found]) -> list[tuple[Found, bool]]:
    """Return the intents that an agent without records must have accepted: each with whether it is a candidate.

    With two generations, the older one served and the newer one was not committed: the master finishes or undoes it.
    """
    kept: list[tuple[Found, bool]] = []
    for service in sorted({f.service for f in found}):
        mine = sorted((f for f in found if f.service == service), key=lambda f: f.generation)
        kept.append((mine[0] if len(mine) > 1 else mine[-1], False))
        if len(mine) > 1:
            kept.append((mine[-1], True))
    return kept
