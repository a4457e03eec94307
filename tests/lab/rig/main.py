"""The command line of the rig: `lab up`, `lab exec`, `lab partition`..., described in docs/lab.md."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from rig import faults
from rig.binds import parse_bind, with_python
from rig.lab import CERT_SECONDS, HERE, NODE_ENV, Lab
from rig.shell import LabError, sh
from rig.table import NETWORKS, NODES


def parser() -> argparse.ArgumentParser:
    """Return what the command line understands."""
    top = argparse.ArgumentParser(prog="lab", description="A four-node fleet of real parts on this machine.")
    top.add_argument(
        "--state",
        type=Path,
        default=Path(os.environ.get("LAB_STATE", "/var/tmp/mcp-lab")),
        help="folder of this lab's state; two labs with two folders do not meet ($LAB_STATE, else %(default)s)",
    )
    verbs = top.add_subparsers(dest="verb", required=True)
    up = verbs.add_parser("up", help="start everything and wait until it answers")
    up.add_argument(
        "--bind",
        action="append",
        default=[],
        metavar="DIR[:NODEDIR]",
        help="show a folder of this machine, live, in every node, with the Python of its .venv",
    )
    up.add_argument(
        "--seed",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="lay DIR/all and DIR/NODE over the nodes' files before they boot",
    )
    up.add_argument(
        "--cert-seconds", type=int, default=CERT_SECONDS, help="how long the ACME server's certificates last"
    )
    verbs.add_parser("down", help="end everything and leave nothing but the cache")
    verbs.add_parser("status", help="what runs, as JSON")
    verbs.add_parser("arm64", help="fetch what makes hyperborea's python3 an arm64 one from the next `up` on")
    add_node_verbs(verbs)
    add_fault_verbs(verbs)
    return top


def add_node_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add what looks into one node."""
    run = verbs.add_parser("exec", help="run a command in a node: lab exec NODE -- CMD...")
    run.add_argument("node", choices=[*NODES, "switch"])
    run.add_argument("cmd", nargs=argparse.REMAINDER)
    texts = {
        "pid": "a node's first process, as this machine numbers it",
        "root": "a node's file system, as seen from this machine",
        "crash": "cut a node's power",
        "give-address": "let the tailnet of a node booted without its address come up",
    }
    for verb, text in texts.items():
        verbs.add_parser(verb, help=text).add_argument("node", choices=NODES)
    boot = verbs.add_parser("boot", help="start a crashed node again")
    boot.add_argument("node", choices=NODES)
    boot.add_argument("--no-address", action="store_true", help="its tailnet is not up yet (see give-address)")


def add_fault_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add cuts and engines."""
    cut = verbs.add_parser("partition", help="cut a node off; without options a silent black hole")
    cut.add_argument("node", choices=NODES)
    cut.add_argument("--peer", choices=NODES, default="", help="only between these two")
    cut.add_argument("--way", choices=["both", "in", "out"], default="both")
    cut.add_argument("--mode", choices=["drop", "carrier", "down"], default="drop")
    cut.add_argument("--net", choices=NETWORKS, default="ts")
    cut.add_argument("--loss", type=int, default=100, metavar="PERCENT", help="drop only so many packets")
    verbs.add_parser("heal", help="undo partitions").add_argument("node", choices=NODES, nargs="?", default="")
    engines = [name for name, node in NODES.items() if node.has_engine]
    kill = verbs.add_parser("kill-docker", help="end a node's dockerd")
    kill.add_argument("node", choices=engines)
    kill.add_argument("--how", choices=["crash", "stop", "hang"], default="crash")
    verbs.add_parser("start-docker", help="start or thaw it").add_argument("node", choices=engines)


def carry_out(lab: Lab, asked: argparse.Namespace) -> None:
    """Do what was asked."""
    match asked.verb:
        case "up":
            up(lab, asked)
        case "down":
            print(f"down in {lab.down():.1f} s")
        case "status":
            status = lab.status()
            print(
                json.dumps(
                    status | {"cut": [text for text, _, _ in faults.rules(lab)] if status["up"] else []}, indent=1
                )
            )
        case "arm64":
            shutil.rmtree(lab.cache / "arm64", ignore_errors=True)
            print(sh(HERE / "arm64.sh", lab.cache / "arm64", timeout_s=600), end="")
        case "exec":
            cmd = asked.cmd[1:] if asked.cmd[:1] == ["--"] else asked.cmd
            env = NODE_ENV | {key: os.environ[key] for key in ("TERM",) if key in os.environ}
            os.execvpe("nsenter", lab.inside(asked.node, *(cmd or ["bash"])), env)
        case "pid":
            print(lab.pid(asked.node))
        case "root":
            print(lab.root(asked.node))
        case _:
            do_harm(lab, asked)


def do_harm(lab: Lab, asked: argparse.Namespace) -> None:
    """Make a fault, or mend one."""
    match asked.verb:
        case "crash":
            faults.crash(lab, asked.node)
        case "boot":
            faults.boot(lab, asked.node, has_address=not asked.no_address)
        case "give-address":
            faults.give_address(lab, asked.node)
        case "partition":
            faults.partition(
                lab, asked.node, peer=asked.peer, way=asked.way, mode=asked.mode, network=asked.net, loss=asked.loss
            )
        case "heal":
            faults.heal(lab, asked.node)
        case "kill-docker":
            faults.kill_engine(lab, asked.node, asked.how)
        case "start-docker":
            faults.start_engine(lab, asked.node)


def up(lab: Lab, asked: argparse.Namespace) -> None:
    """Bring the rig up and say how long it took, or where to look."""
    lab.binds = with_python([parse_bind(text) for text in asked.bind])
    lab.seed_trees, lab.cert_seconds = asked.seed, asked.cert_seconds
    try:
        took_s = lab.up()
    except BaseException:
        if lab.pids():
            print(
                f"up failed; logs are in {lab.run}; clear away with: lab --state {lab.run.parent} down", file=sys.stderr
            )
        raise
    print(f"up in {took_s:.1f} s; state in {lab.run.parent}")


def main() -> None:
    """Run the command line; trouble of the rig is one line and exit 1."""
    asked = parser().parse_args()
    try:
        carry_out(Lab(asked.state), asked)
    except LabError as error:
        sys.exit(f"lab: {error}")
