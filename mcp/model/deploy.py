"""The tables of steps for everything that is done to a service; read each from top to bottom."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from mcp.model import placement
from mcp.model.errors import McpError, Refused
from mcp.model.fleet import Debt, Node
from mcp.model.messages import (
    CommitWorkload,
    DescribeImages,
    DropWorkload,
    ImagesDescribed,
    ImagesPulled,
    PullImages,
    RemoveWorkload,
    RestartWorkload,
    RunWorkload,
    ServiceRecord,
    StartWorkload,
    StopWorkload,
    WorkloadRunning,
)
from mcp.model.saga import Answer, Job, Order, StepFailed, StepOf
from mcp.model.spec import ServiceSpec, spec_hash

IMAGE_QUESTION_S = 20.0
"""A registry may take its time to say which platforms it has; the engine's own limit lies below."""

PULL_IDLE_S = 60.0
"""Silence of a pull: agents say every 2 s that they live, so this is a dead agent, not a slow registry."""

PULL_TIMEOUT_S = 3600.0
"""There is never one timeout around a pull: this only ends an operation that nobody looks after."""


# --------------------------------------------------------------------- placing


def wish_of(job: Job) -> placement.Wish:
    """Return what the job asks of placement."""
    assert job.spec is not None
    return placement.Wish(spec=job.spec, fleet=job.fleet, node=job.wanted_node)


def ask_for_images(job: Job) -> list[Order]:
    """Ask the nodes that would do for the platforms of the images; nothing at all when nothing would change."""
    if job.node:
        return []
    wish = wish_of(job)
    check_home_is_there(job, wish)
    if job.kind == "deploy" and is_unchanged(job):
        job.is_unchanged = True
        return []
    return [
        Order(
            node=node,
            message=DescribeImages(images=wish.spec.images),
            timeout_s=IMAGE_QUESTION_S,
            idle_s=IMAGE_QUESTION_S,
        )
        for node in placement.candidates(wish)
    ]


def check_home_is_there(job: Job, wish: placement.Wish) -> None:
    """Refuse to start a second copy only because the node of the first one cannot be heard."""
    home = job.fleet.home(job.service)
    if home is None or home[0].health == "healthy":
        return
    node = home[0]
    if wish.pin and wish.pin != node.name:
        job.warnings.append(
            f"an older copy may still run on {node.name}, which is {node.health}: it is removed when {node.name} is back"
        )
        return
    raise Refused(
        "home_away",
        f"cannot deploy {job.service}: it runs on {node.name}, which is {node.health}",
        hint=f"`mcp node why {node.name}` shows the evidence; `mcp deploy {job.service} --node OTHER` moves it anyway.",
    )


def choose_node(job: Job, answers: Sequence[Answer]) -> None:
    """Choose from what the candidates said of the images."""
    for answer in answers:
        if isinstance(answer.reply, ImagesDescribed):
            job.images[answer.order.node] = {facts.image: facts for facts in answer.reply.images}
    wish = wish_of(job)
    if not job.images:
        first = next(a.failure for a in answers if a.failure)
        raise McpError(
            f"cannot place {job.service}: no node could say what its images are: {first.reason}",
            hint=first.hint,
        )
    job.node = placement.choose(wish, job.images)
    job.generation = job.fleet.highest_generation(job.service) + 1
    if job.world and job.world != world_of(job):
        raise Refused(
            "world_changed",
            f"cannot deploy {job.service} as planned: the fleet or the definition has changed since the plan",
            hint=f"Look again: `mcp plan {job.service}`.",
        )


def is_unchanged(job: Job) -> bool:
    """Say whether the very same definition runs, whole and healthy, on a node that it may be on."""
    assert job.spec is not None
    home = job.fleet.home(job.service)
    if home is None or len(job.fleet.where(job.service)) != 1:
        return False
    node, record = home
    wish = wish_of(job)
    if any(rule(wish, node) for rule in (placement.fits_pin, placement.fits_role)) and wish.pin:
        return False
    if record.candidate or record.spec_hash != spec_hash(job.spec):
        return False
    if not is_whole(record, active=job.spec.active):
        return False
    job.node, job.generation, job.record = node.name, record.generation, record
    return True


def is_whole(record: ServiceRecord, *, active: bool) -> bool:
    """Say whether every component has its container in the state that the definition asks for."""
    if record.desired != ("running" if active else "stopped"):
        return False
    current = {c.component: c for c in record.containers if c.generation == record.generation}
    for component in record.spec.components:
        container = current.get(component.name)
        if container is None or container.health == "unhealthy":
            return False
        if active != (container.state == "running"):
            return False
    return True


def world_of(job: Job) -> str:
    """Return 8 hex digits for all that a plan rests on: the definition, where it would go, what runs now."""
    home = job.fleet.home(job.service)
    facts = [
        job.service,
        spec_hash(job.spec) if job.spec else "",
        job.node,
        [home[0].name, home[1].generation, home[1].spec_hash] if home else [],
        sorted((node.name, node.health) for node in job.fleet.nodes.values()),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


# ----------------------------------------------------------------- the new copy


def pull_images(job: Job) -> list[Order]:
    """Have the images on the node."""
    assert job.spec is not None
    message = PullImages(service=job.service, images=job.spec.images)
    return [Order(node=job.node, message=message, idle_s=PULL_IDLE_S, timeout_s=PULL_TIMEOUT_S)]


def raise_generation(job: Job, answers: Sequence[Answer]) -> None:
    """Number the new copy above everything its node has ever accepted."""
    check(answers)
    for answer in answers:
        if isinstance(answer.reply, ImagesPulled):
            job.generation = max(job.generation, answer.reply.highest_generation + 1)


def stop_elsewhere(job: Job) -> list[Order]:
    """Stop the copy on another node first, where two may not run at once."""
    assert job.spec is not None
    if not any(c.update == "stop-first" for c in job.spec.components):
        return []
    return [
        Order(node=node.name, message=StopWorkload(service=job.service, generation=record.generation))
        for node, record in copies_elsewhere(job)
    ]


def start_elsewhere(job: Job) -> list[Order]:
    """Take that back."""
    return [
        Order(node=order.node, message=StartWorkload(service=job.service, generation=order.message.generation))
        for order in stop_elsewhere(job)
    ]


def run_workload(job: Job) -> list[Order]:
    """Start the new copy beside the old one and wait until it is healthy."""
    assert job.spec is not None
    wait_s = sum(component.health.timeout_s + component.stop_grace_s for component in job.spec.components)
    message = RunWorkload(service=job.service, generation=job.generation, spec=job.spec, spec_hash=spec_hash(job.spec))
    return [Order(node=job.node, message=message, timeout_s=wait_s + 60.0)]


def drop_workload(job: Job) -> list[Order]:
    """Take the new copy away again; the old one serves on."""
    return [Order(node=job.node, message=DropWorkload(service=job.service, generation=job.generation))]


def keep_record(job: Job, answers: Sequence[Answer]) -> None:
    """Remember what runs now."""
    check(answers)
    for answer in answers:
        if isinstance(answer.reply, WorkloadRunning):
            job.record = answer.reply.record


def candidate_debt(job: Job, _: Order) -> Debt:
    """What stays to be done when the node of a failed copy is away."""
    return Debt(service=job.service, generation=job.generation, candidate_only=True, why=f"undo of operation {job.op}")


def retire_others(job: Job) -> list[Order]:
    """Make the new copy the service's own and remove all older ones, wherever they are."""
    commit = Order(
        node=job.node, message=CommitWorkload(service=job.service, generation=job.generation), timeout_s=180.0
    )
    removals = [
        Order(
            node=node.name,
            message=RemoveWorkload(service=job.service, generation=highest(record)),
            timeout_s=180.0,
        )
        for node, record in copies_elsewhere(job)
    ]
    return [commit, *removals]


def removal_debt(job: Job, order: Order) -> Debt | None:
    """What stays to be done when the node of an old copy is away."""
    if not isinstance(order.message, RemoveWorkload):
        return None
    return Debt(
        service=job.service,
        generation=order.message.generation,
        candidate_only=False,
        why=f"operation {job.op}",
    )


def copies_elsewhere(job: Job) -> list[tuple[Node, ServiceRecord]]:
    """Return the copies on other nodes than the job's."""
    return [pair for pair in job.fleet.where(job.service) if pair[0].name != job.node]


def highest(record: ServiceRecord) -> int:
    """Return the newest generation a record speaks of, committed or not."""
    return max(record.generation, record.candidate.generation if record.candidate else 0)


def check(answers: Sequence[Answer]) -> None:
    """Raise the first trouble among answers, as the agent told it."""
    for answer in answers:
        if answer.failure:
            raise StepFailed(answer.failure)


DEPLOY = (
    StepOf(name="place", do=ask_for_images, then=choose_node, is_question=True),
    StepOf(name="pull", do=pull_images, then=raise_generation),
    StepOf(name="stop", do=stop_elsewhere, undo=start_elsewhere),
    StepOf(name="run", do=run_workload, then=keep_record, undo=drop_workload, debt=candidate_debt),
    StepOf(name="retire", do=retire_others, debt=removal_debt, is_final=True),
)
"""Put a service on its node: after `retire` there is no way back."""

PLAN = (StepOf(name="place", do=ask_for_images, then=choose_node, is_question=True),)
"""Find out where a service would go; nothing is changed."""


# ------------------------------------------------------- what is there already


def at_home(job: Job, action: str) -> tuple[Node, ServiceRecord]:
    """Return where a service runs.

    Raises:
        Refused: it is not deployed.
    """
    home = job.fleet.home(job.service)
    if home is None:
        raise not_deployed(job, action)
    return home


def not_deployed(job: Job, action: str) -> Refused:
    """Make the refusal for a service that nobody has."""
    known = ", ".join(job.fleet.service_names()) or "none"
    return Refused(
        "not_deployed",
        f"cannot {action} {job.service}: it is not deployed (deployed: {known})",
        hint="`mcp status`",
    )


def remove_everywhere(job: Job) -> list[Order]:
    """Remove a service from every node that has it, orphaned containers included."""
    newest = {node.name: highest(record) for node, record in job.fleet.where(job.service)}
    for node in job.fleet.nodes.values():
        left = [orphan.generation for orphan in node.orphans if orphan.service == job.service]
        if left:
            newest[node.name] = max([newest.get(node.name, 0), *left])
    if not newest:
        raise not_deployed(job, "undeploy")
    job.node = next(iter(newest))
    return [
        Order(node=node, message=RemoveWorkload(service=job.service, generation=generation), timeout_s=180.0)
        for node, generation in newest.items()
    ]


def stop_workload(job: Job) -> list[Order]:
    """Stop the service's containers."""
    node, record = at_home(job, "stop")
    job.node, job.generation = node.name, record.generation
    if is_whole(record, active=False):
        job.is_unchanged = True
        return []
    return [
        Order(
            node=node.name,
            message=StopWorkload(service=job.service, generation=record.generation),
            timeout_s=180.0,
        )
    ]


def start_workload(job: Job) -> list[Order]:
    """Start the service's containers."""
    node, record = at_home(job, "start")
    job.node, job.generation = node.name, record.generation
    if is_whole(record, active=True):
        job.is_unchanged = True
        return []
    return [
        Order(
            node=node.name,
            message=StartWorkload(service=job.service, generation=record.generation),
            timeout_s=180.0,
        )
    ]


def restart_workload(job: Job) -> list[Order]:
    """Restart the service's containers."""
    node, record = at_home(job, "restart")
    if record.desired == "stopped":
        raise Refused("stopped", f"cannot restart {job.service}: it is stopped", hint=f"`mcp start {job.service}`")
    job.node, job.generation = node.name, record.generation
    return [
        Order(
            node=node.name,
            message=RestartWorkload(service=job.service, generation=record.generation),
            timeout_s=300.0,
        )
    ]


UNDEPLOY = (StepOf(name="remove", do=remove_everywhere, debt=removal_debt, is_final=True),)
STOP = (StepOf(name="stop", do=stop_workload),)
START = (StepOf(name="start", do=start_workload),)
RESTART = (StepOf(name="restart", do=restart_workload),)

TABLES = {
    "deploy": DEPLOY,
    "plan": PLAN,
    "undeploy": UNDEPLOY,
    "stop": STOP,
    "start": START,
    "restart": RESTART,
}
"""Every kind of operation and its steps."""


def downtime(spec: ServiceSpec, record: ServiceRecord | None) -> str:
    """Say why the service would be away for a moment during an update; "" when it would not."""
    if record is None or not spec.stops_first:
        return ""
    fixed = [f"{c.name} publishes fixed port {c.ports[0].host_port}" for c in spec.components if c.ports]
    asked = [f'{c.name} says update = "stop-first"' for c in spec.components if c.update == "stop-first"]
    return f"the old copy stops before the new one starts: {'; '.join([*asked, *fixed])}"
