"""Where a service goes: filters that explain, then the choice.

`core` goes to the master's node, `worker` to a healthy worker with capacity, `node =` pins and overrides the tier. A
service stays where it is while that node still fits. Among the rest: fewest containers, ties by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mcp.model.errors import NoNodeFits
from mcp.model.fleet import Fleet, Node
from mcp.model.messages import ImageFacts
from mcp.model.operator_messages import PlacementRow
from mcp.model.spec import ServiceSpec
from mcp.model.values import frozen

GIB = 1024**3
MIB = 1024**2

DISK_RESERVE_BYTES = 512 * MIB
"""A node with less free disk than this takes nothing new: an image pull would fill it."""


def size(amount: int) -> str:
    """Write bytes for people: 1.5 GiB, 256 MiB."""
    return f"{amount / GIB:.1f} GiB" if amount >= GIB else f"{amount / MIB:.0f} MiB"


@frozen(kw_only=True)
class Wish:
    """What is asked of placement."""

    spec: ServiceSpec
    fleet: Fleet
    node: str = ""
    """The operator's `--node`; overrides the definition."""

    @property
    def pin(self) -> str:
        """The one node the service may go to, or ""."""
        if self.node or self.spec.node:
            return self.node or self.spec.node
        return self.fleet.master if self.spec.tier == "core" else ""

    @property
    def pinned_by(self) -> str:
        """Where the pin comes from, for the reason."""
        if self.node:
            return f"--node {self.node}"
        return f"node = {self.spec.node!r}".replace("'", '"') if self.spec.node else 'tier = "core"'


Filter = Callable[[Wish, Node], str]
"""Returns why the node may not take the service, or ""."""


def fits_pin(wish: Wish, node: Node) -> str:
    """A pinned service goes to its node only."""
    return f"not the node of {wish.pinned_by}" if wish.pin and node.name != wish.pin else ""


def fits_role(wish: Wish, node: Node) -> str:
    """Edge nodes run no containers; the master's node takes worker services only where there is no worker."""
    if node.role == "edge":
        return "is an edge node and runs no containers"
    has_worker = any(other.role == "worker" for other in wish.fleet.nodes.values())
    if not wish.pin and node.role == "master" and has_worker:
        return 'is the master\'s node: takes tier = "core" and pinned services'
    return ""


def is_well(_: Wish, node: Node) -> str:
    """Only a healthy node with an engine gets something new."""
    match node.health:
        case "healthy":
            return "has no container engine" if node.engine == "none" else ""
        case "unknown":
            return "is unknown: not heard from yet"
        case "engine-down":
            return f"engine-down: {node.engine_reason or 'the container engine does not answer'}"
        case health:
            return f"is {health}"


def is_not_draining(_: Wish, node: Node) -> str:
    """A draining node gets nothing new."""
    return "is draining" if node.is_draining else ""


def has_memory(wish: Wish, node: Node) -> str:
    """What is reserved must fit in what the node has, and what is needed in what is free now."""
    need, have = wish.spec.memory_bytes, node.resources
    if not need or have is None:
        return ""
    reserved, _ = node.reserved(without=wish.spec.name)
    left = min(have.memory_bytes - reserved, have.memory_free_bytes)
    return "" if need <= left else f"memory: needs {size(need)}, {size(max(left, 0))} free"


def has_cpu(wish: Wish, node: Node) -> str:
    """What is reserved must fit in the node's cores."""
    need, have = wish.spec.cpu_cores, node.resources
    if not need or have is None:
        return ""
    _, reserved = node.reserved(without=wish.spec.name)
    left = have.cpu_cores - reserved
    return "" if need <= left + 1e-9 else f"cpu: needs {need:g} cores, {max(left, 0):g} of {have.cpu_cores:g} left"


def has_disk(_: Wish, node: Node) -> str:
    """A nearly full disk takes nothing new."""
    have = node.resources
    if have is None or have.disk_free_bytes >= DISK_RESERVE_BYTES:
        return ""
    return f"disk: {size(have.disk_free_bytes)} free, {size(DISK_RESERVE_BYTES)} kept back"


FILTERS: tuple[Filter, ...] = (fits_pin, fits_role, is_well, is_not_draining, has_memory, has_cpu, has_disk)
"""In the order of what an operator would want to hear first; images come after, since they have to be asked for."""


def reasons(wish: Wish, node: Node) -> tuple[str, ...]:
    """Return everything that speaks against a node; nothing more is said of a node that the pin or the role rules out."""
    for rule in (fits_pin, fits_role):
        if why := rule(wish, node):
            return (why,)
    return tuple(why for rule in FILTERS[2:] if (why := rule(wish, node)))


def candidates(wish: Wish) -> list[str]:
    """Return the nodes whose image facts are worth asking for: all that pass every filter.

    Raises:
        NoNodeFits: none does.
    """
    if wish.pin and wish.pin not in wish.fleet.nodes:
        known = ", ".join(sorted(wish.fleet.nodes)) or "none"
        raise NoNodeFits(
            wish.spec.name,
            {wish.pin: f"no such node ({wish.pinned_by}); known: {known}"},
            hint="`mcp node list` shows the nodes; `mcp node invite NAME` adds one.",
        )
    found = [node.name for node in by_preference(wish) if not reasons(wish, node)]
    if not found:
        raise no_node(wish, {})
    return found


def by_preference(wish: Wish) -> list[Node]:
    """Return all nodes, the one to be chosen first: where the service runs, then fewest containers, then by name."""
    home = wish.fleet.home(wish.spec.name)
    here = home[0].name if home else ""
    return sorted(wish.fleet.nodes.values(), key=lambda n: (n.name != here, n.containers, n.name))


def image_reason(node: Node, facts: Mapping[str, ImageFacts]) -> str:
    """Say why the images do not suit a node; "" when they do."""
    arch = node.facts.arch if node.facts else ""
    for image in facts.values():
        if image.error:
            return image.error
        if image.platforms and arch not in image.platforms:
            return f"{image.image}: image has no {arch} variant (has: {', '.join(image.platforms)})"
    return ""


def choose(wish: Wish, images: Mapping[str, Mapping[str, ImageFacts]]) -> str:
    """Return the node for a service; `images` has what each candidate said of the images.

    Raises:
        NoNodeFits: with one reason for each node.
    """
    for node in by_preference(wish):
        if node.name in images and not reasons(wish, node) and not image_reason(node, images[node.name]):
            return node.name
    raise no_node(wish, images)


def rows(wish: Wish, images: Mapping[str, Mapping[str, ImageFacts]]) -> tuple[PlacementRow, ...]:
    """Return what placement thinks of every node, the best first."""
    made = []
    for node in by_preference(wish):
        against = reasons(wish, node)
        if not against and node.name in images and (why := image_reason(node, images[node.name])):
            against = (why,)
        notes = against or (("runs here now",) if wish.spec.name in node.services else ())
        made.append(PlacementRow(node=node.name, fits=not against, score=float(node.containers), reasons=notes))
    return tuple(sorted(made, key=lambda row: not row.fits))


def no_node(wish: Wish, images: Mapping[str, Mapping[str, ImageFacts]]) -> NoNodeFits:
    """Make the error that explains every node, and the way out."""
    why = {row.node: "; ".join(row.reasons) for row in sorted(rows(wish, images), key=lambda row: row.node)}
    if not why:
        why = {"(none)": "no node is enrolled"}
    return NoNodeFits(wish.spec.name, why, hint=way_out(wish, why))


def way_out(wish: Wish, why: Mapping[str, str]) -> str:
    """Say what would help, from the reasons that stand in the way."""
    text = " ".join(why.values())
    hints = []
    if "memory:" in text or "cpu:" in text:
        hints.append("free memory or CPU, or lower `memory`/`cpu` in the definition")
    if "variant" in text:
        hints.append("build the image for that architecture, or pin the service to a node that it suits")
    if "unreachable" in text or "unhealthy" in text or "engine-down" in text:
        hints.append("`mcp node why NODE` shows the evidence")
    if "cannot ask for the platforms" in text or "image_missing" in text or "cannot find image" in text:
        hints.append("check the image's name and tag, and that its registry answers from those nodes")
    if not wish.pin and not hints:
        hints.append("pin it with `node =`, or add a worker with `mcp node invite NAME`")
    joined = "; ".join(hints)
    return f"{joined[:1].upper()}{joined[1:]}." if joined else ""
