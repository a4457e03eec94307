"""The fleet that the rig builds: its nodes, networks and addresses, and what each node boots with."""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "metacircular.net"
INTERNAL_ZONE = f"mcp.{DOMAIN}"
"""The DNS zone that holds the services' internal names (svc.mcp...) and the nodes'."""

NETWORKS = {"ts": "100.64.0.", "pub": "203.0.113."}
"""ts stands for the tailnet, pub for the Internet; each is a bridge in a namespace of its own."""

MTU = {"ts": 1280, "pub": 1500}
"""A tailnet's is 1280."""


@dataclass(frozen=True)
class Node:
    """One machine of the rig; without units it runs no systemd."""

    host: int
    """The last part of its addresses."""
    networks: tuple[str, ...]
    units: tuple[str, ...] = ()
    is_nixos: bool = False
    """Units cannot be written at run time, as on NixOS."""

    @property
    def has_engine(self) -> bool:
        """Whether it runs a dockerd of its own."""
        return "docker" in self.units

    def address(self, network: str = "ts") -> str:
        """Return its address in a network."""
        return f"{NETWORKS[network]}{self.host}"


NODES = {
    "infra": Node(10, ("ts", "pub"), ("ssh", "knot", "docker-registry", "registry-auth", "pebble")),
    "rift": Node(1, ("ts",), ("ssh", "docker"), is_nixos=True),
    "orion": Node(2, ("ts",), ("ssh", "docker"), is_nixos=True),
    "hyperborea": Node(3, ("ts",), ("ssh", "docker")),
    "svc": Node(4, ("ts", "pub"), ("ssh",)),
    "op": Node(20, ("ts",)),
    "world": Node(66, ("pub",)),
}
"""op is the operator's workstation, world a stranger who sees the public side only."""

REGISTRY = f"{NODES['infra'].address()}:5000"
REGISTRY_WITH_PASSWORD = f"{NODES['infra'].address()}:5001"
REGISTRY_USER, REGISTRY_PASSWORD = "lab", "lab-secret"
