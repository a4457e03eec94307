"""Can this machine carry the rig, and if not, what would help?"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PROGRAMS = (
    "pebble knotd knsupdate kdig docker-registry dockerd containerd docker sshd ssh-keygen busybox openssl curl nft"
    " nsenter unshare ip"
)
PACKAGES = (
    "docker.io pebble knot knot-dnsutils docker-registry openssh-server busybox-static nftables iproute2 openssl curl"
)
"""Debian 12's names of what brings these programs."""


def obstacles() -> list[str]:
    """Return why the rig cannot run here, each with its remedy; empty when it can."""
    if os.geteuid():
        return ["needs root: namespaces, mounts and a dockerd in each node"]
    found = []
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [program for program in PROGRAMS.split() if not shutil.which(program, path=path)]:
        found.append(f"missing: {' '.join(missing)}; apt-get install -y --no-install-recommends {PACKAGES}")
    if not Path("/lib/systemd/systemd").exists():
        found.append("missing: systemd; apt-get install -y --no-install-recommends systemd")
    if not Path("/sys/fs/cgroup/systemd").is_dir():
        found.append(
            "no cgroup v1 hierarchy name=systemd under /sys/fs/cgroup: the nodes' systemd and dockerd need one;"
            " boot with systemd.unified_cgroup_hierarchy=0, or mount it"
        )
    if (
        not found
        and subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True, check=False).returncode
    ):
        found.append("unshare --mount --net is refused: this container lacks CAP_SYS_ADMIN")
    return found
