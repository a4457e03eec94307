"""What an agent says is taken in within limits: a node that lies or rambles must not hide the rest of the fleet."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from mcp.model.messages import ContainerState, Inventory, NodeFacts, OperationRecord, ServiceRecord
from mcp.model.names import is_service_name
from mcp.model.values import frozen

PARTS_MOST = 64
"""Parts of one inventory: 6 MiB of records."""

SERVICES_MOST = 1000
"""Services of one node, and as many orphaned containers and ended operations."""

PROBLEMS_MOST = 10
TEXT_MOST = 300
WORD_MOST = 64

NEWEST_GENERATION = 10**12
"""Far above what anybody deploys, and far below where numbers end on the bus."""


def text(said: str) -> str:
    """Return a text for people, cut where it gets long."""
    return said if len(said) <= TEXT_MOST else f"{said[:TEXT_MOST]}..."


def texts(said: Iterable[str]) -> tuple[str, ...]:
    """Return problems: the first few of them, none of them long."""
    return tuple(text(each) for each in tuple(said)[:PROBLEMS_MOST])


def facts(said: NodeFacts) -> NodeFacts:
    """Return what a node says of itself, in words of a sensible length."""
    words = ("incarnation", "address", "arch", "version", "started_at", "boot_id", "engine_version")
    long = {word: value[:WORD_MOST] for word in words if len(value := getattr(said, word)) > WORD_MOST}
    return attrs.evolve(said, **long) if long else said


def record(said: ServiceRecord) -> ServiceRecord | None:
    """Return a service's record; None when it cannot be one."""
    numbers = [said.generation, *([said.candidate.generation] if said.candidate else [])]
    if not is_service_name(said.service) or not all(0 <= number <= NEWEST_GENERATION for number in numbers):
        return None
    if not all(map(_is_sane, said.containers)):
        return None
    containers = tuple(attrs.evolve(c, problem=text(c.problem)) if c.problem else c for c in said.containers)
    return attrs.evolve(said, containers=containers, problems=texts(said.problems))


def _is_sane(container: ContainerState) -> bool:
    names = (container.service, container.component)
    return all(map(is_service_name, names)) and 0 <= container.generation <= NEWEST_GENERATION


@frozen(kw_only=True)
class Heard:
    """A whole inventory, put together from its parts."""

    services: dict[str, ServiceRecord]
    operations: dict[str, OperationRecord]
    orphans: tuple[ContainerState, ...]
    problems: tuple[str, ...]


def inventory(parts: Iterable[Inventory]) -> Heard:
    """Put the parts of an inventory together; what cannot be true is left out and told as a problem."""
    parts = tuple(parts)
    told = [each for part in parts for each in part.services]
    records = [good for each in told if (good := record(each))][:SERVICES_MOST]
    orphans = [each for part in parts for each in part.orphans]
    sane = [each for each in orphans if _is_sane(each)][:SERVICES_MOST]
    operations = [each for part in parts for each in part.operations if len(each.op) <= WORD_MOST]
    problems = list(dict.fromkeys(problem for part in parts for problem in part.problems))
    if left_out := len(told) - len(records) + len(orphans) - len(sane):
        problems.insert(0, f"it tells of {left_out} services or containers that are not to be believed, or too many")
    return Heard(
        services={each.service: each for each in records},
        # The youngest come first: the last order of an operation is what tells how it ended.
        operations={
            each.op: attrs.evolve(each, detail=text(each.detail)) for each in reversed(operations[:SERVICES_MOST])
        },
        orphans=tuple(sane),
        problems=texts(problems),
    )
