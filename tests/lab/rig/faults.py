"""What can go wrong in a fleet, made to happen: cuts, lost packets, dead and frozen engines, power cuts."""

from __future__ import annotations

import os
import re
import signal
from typing import Literal

from rig.lab import Lab
from rig.shell import LabError, sh, start_ticks, wait_for
from rig.table import NODES

Mode = Literal["drop", "carrier", "down"]
Way = Literal["both", "in", "out"]
How = Literal["crash", "hang", "stop"]

# ------------------------------------------------------------------- network


def partition(
    lab: Lab, node: str, *, peer: str = "", way: Way = "both", mode: Mode = "drop", network: str = "ts", loss: int = 100
) -> None:
    """Cut a node off, from everybody or from one peer.

    "drop" is a silent black hole: TCP sees neither reset nor unreachable, from either side, while ARP still answers.
    "carrier" pulls the cable, "down" switches the node's own card off (there it gets "network unreachable" at once).
    `loss` drops only so many packets of a hundred.
    """
    port = f"p-{network}-{node}"
    if mode == "carrier":
        sh(*lab.inside("switch", "ip", "link", "set", port, "down"))
        return
    if mode == "down":
        sh(*lab.inside(node, "ip", "link", "set", card(node, network), "down"))
        return
    sides = {"out": [("iifname", "oifname")], "in": [("oifname", "iifname")]}
    for mine, other in sides["out"] + sides["in"] if way == "both" else sides[way]:
        far = f'{other} "p-{network}-{peer}"' if peer else ""
        some = f"numgen random mod 100 < {loss}" if loss < 100 else ""
        rule = f'{mine} "{port}" {far} ether type {{ ip, ip6 }} {some} counter drop comment "{node}"'
        sh(*lab.inside("switch", "nft", "add", "rule", "bridge", "lab", "cut", rule))


def rules(lab: Lab) -> list[tuple[str, str, str]]:
    """Return each cut: its text, the node it was made for, its handle."""
    out = sh(*lab.inside("switch", "nft", "-a", "list", "chain", "bridge", "lab", "cut"))
    return re.findall(r'^\s*(.*comment "(\S+)") # handle (\d+)', out, re.MULTILINE)


def heal(lab: Lab, node: str = "") -> None:
    """Undo every cut of a node, or of all."""
    for _, owner, handle in rules(lab):
        if node in (owner, ""):
            sh(*lab.inside("switch", "nft", "delete", "rule", "bridge", "lab", "cut", "handle", handle))
    for name in [node] if node else [name for name in NODES if name in lab.pids()]:
        for network in NODES[name].networks:
            sh(*lab.inside("switch", "ip", "link", "set", f"p-{network}-{name}", "up"))
            sh(*lab.inside(name, "ip", "link", "set", card(name, network), "up"))


def card(node: str, network: str) -> str:
    """Return what a node calls its card in a network."""
    return f"eth{NODES[node].networks.index(network)}"


def give_address(lab: Lab, node: str) -> None:
    """Let the tailnet come up on a node that was booted without its address; it has it already: nothing."""
    sh(*lab.inside(node, "ip", "addr", "replace", f"{NODES[node].address()}/24", "dev", card(node, "ts")))


# --------------------------------------------------------------------- power


def crash(lab: Lab, node: str) -> None:
    """Pull the power cord: everything on the node dies at once; its files survive."""
    pid = lab.pid(node)
    os.kill(pid, signal.SIGKILL)
    wait_for(f"{node}'s end", lambda: node not in lab.pids() and start_ticks(pid) is None, 10)


def boot(lab: Lab, node: str, *, has_address: bool = True) -> None:
    """Start a crashed node and wait until it is up; see Lab.boot for `has_address`."""
    if node in lab.pids():
        raise LabError(f"{node} is running")
    lab.boot(node, has_address=has_address)
    lab.wait_until_ready(node)


# ------------------------------------------------------------------- engines


def kill_engine(lab: Lab, node: str, how: How = "crash") -> None:
    """End a node's dockerd.

    crash: SIGKILL, and systemd starts it again at once as in production, its socket accepting all the while.
    hang: SIGSTOP, so that connections are accepted and never answered. stop: it stays away, with no socket.
    """
    if how == "stop":
        sh(*lab.inside(node, "systemctl", "stop", "docker.socket", "docker.service"))
        (lab.root(node) / "run/docker.sock").unlink(missing_ok=True)
    else:
        signal_engine(lab, node, "KILL" if how == "crash" else "STOP")


def start_engine(lab: Lab, node: str) -> None:
    """Start or thaw a node's dockerd and wait until it answers."""
    signal_engine(lab, node, "CONT", check=False)
    sh(*lab.inside(node, "systemctl", "start", "docker.socket", "docker.service"), timeout_s=90)
    lab.wait_for_engine(node)


def signal_engine(lab: Lab, node: str, name: str, *, check: bool = True) -> None:
    """Send dockerd itself a signal, and nothing else of its unit."""
    sh(*lab.inside(node, "systemctl", "kill", f"--signal={name}", "--kill-who=main", "docker.service"), check=check)
