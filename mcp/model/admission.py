"""What a node does not let a definition have, whatever the master says: paths that hand the machine over, ports in use. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mcp.model.errors import Refused
from mcp.model.ports import Intent
from mcp.model.spec import ComponentSpec, ServiceSpec, VolumeSpec

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


def check_volumes(
    service: str, component: ComponentSpec, node: str, *, real_path: Callable[[str], str], own_paths: Iterable[str]
) -> None:
    """Refuse paths that hand the machine to a container; asked again at each mount, for a symlink may have moved.

    Raises:
        Refused: forbidden_path.
    """
    for volume in component.volumes:
        real = real_path(volume.host_path)
        if is_forbidden(real, volume, own_paths):
            via = "" if real == volume.host_path else f" (really {real})"
            raise Refused(
                "forbidden_path",
                f"cannot run {service} on {node}: {component.name} may not mount {volume.host_path}{via}",
                hint="Whoever has it has the machine. Mount a folder of the service's own, e.g. /srv/NAME.",
            )


def is_forbidden(real: str, volume: VolumeSpec, own_paths: Iterable[str]) -> bool:
    """Say whether a path (symlinks followed) lies in a forbidden one, or has one in it."""
    if volume.read_only and any(real == path or real.startswith(f"{path}/") for path in READABLE_PATHS):
        return False
    inside = f"{real.rstrip('/')}/"
    return any(inside.startswith(f"{bad}/") or f"{bad}/".startswith(inside) for bad in (*FORBIDDEN_PATHS, *own_paths))


def check_ports(
    spec: ServiceSpec,
    node: str,
    *,
    default_address: str,
    is_free: Callable[[str, int], bool],
    running: Iterable[Intent],
) -> None:
    """Refuse a fixed port that somebody else has; one of the running copy is free once that copy is stopped.

    Raises:
        Refused: port_in_use.
    """
    own = {port.host_port for intent in running for component in intent.spec.components for port in component.ports}
    for component in spec.components:
        for port in component.ports:
            address = port.address.strip("[]") or default_address
            if port.host_port not in own and not is_free(address, port.host_port):
                raise Refused(
                    "port_in_use",
                    f"cannot run {spec.name} on {node}: port {address}:{port.host_port} of {component.name} is in use",
                    hint=f"`ss -ltnp sport = :{port.host_port}` on {node} shows by whom.",
                )
