"""What is laid over a node's files before its first boot: identity, ssh, units, on infra the servers."""

from __future__ import annotations

import hashlib
import json
import textwrap
from pathlib import Path

from rig.table import (
    DOMAIN,
    INTERNAL_ZONE,
    NETWORKS,
    NODES,
    REGISTRY,
    REGISTRY_PASSWORD,
    REGISTRY_USER,
    REGISTRY_WITH_PASSWORD,
)

Files = dict[str, str | Path]
"""Path in the node to content; a Path is a symlink to it."""

UNITS = "/etc/systemd/system/"
STOCK = "/lib/systemd/system/"

MASKED_UNITS = """
  systemd-udevd.service systemd-udev-trigger.service systemd-udevd-control.socket
  systemd-udevd-kernel.socket systemd-timesyncd.service systemd-resolved.service
  systemd-networkd.service systemd-sysctl.service systemd-binfmt.service
  systemd-modules-load.service kmod-static-nodes.service systemd-firstboot.service
  systemd-remount-fs.service systemd-random-seed.service systemd-repart.service
  systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-machine-id-commit.service
  systemd-logind.service systemd-ask-password-console.path systemd-journald-audit.socket
  systemd-sysusers.service getty.target systemd-ask-password-wall.path systemd-user-sessions.service
  systemd-update-utmp-runlevel.service systemd-update-utmp.service systemd-tmpfiles-clean.timer
  proc-sys-fs-binfmt_misc.automount proc-sys-fs-binfmt_misc.mount dev-hugepages.mount dev-mqueue.mount
  sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount sys-fs-fuse-connections.mount
"""
"""Units of a stock Debian that would touch the machine's kernel or only cost time here."""

REGISTRY_CONFIG = """\
version: 0.1
log: {{level: warn}}
storage:
  filesystem: {{rootdirectory: /var/lib/docker-registry}}
  delete: {{enabled: true}}
http: {{addr: ":{port}"}}
"""

# bcrypt of REGISTRY_PASSWORD at its cheapest: the usual cost would be seconds a pull.
HTPASSWD = f"{REGISTRY_USER}:$2b$04$rUeTDx9cF3vFQUtb9ubHfusunFgoJQgeOWxVS6SKhQ/lktB4dBKHO\n"


def files_of(name: str, cache: Path, cert_seconds: int) -> Files:
    """Return everything a node of that name gets; `cert_seconds` is how long the ACME server's certificates last."""
    node = NODES[name]
    files = identity(name, cache) | base_units() | wanted(*node.units)
    if node.has_engine:
        files |= engine_files()
    if name == "hyperborea" and (cache / "arm64").is_dir():
        files |= arm64_files()
    if name == "op":
        files["/root/.ssh/id_ed25519"] = (cache / "ssh" / "id_ed25519").read_text()
        files["/root/.ssh/config"] = "Host *\n  User root\n"
    if name == "infra":
        files |= registry_files() | dns_files(cache) | acme_files(cache, cert_seconds)
    return files


def identity(name: str, cache: Path) -> Files:
    """A node's names, its neighbours' and its ssh keys."""
    node, ssh = NODES[name], cache / "ssh"
    hosts = "127.0.0.1 localhost\n" + "".join(
        f"{other.address(other.networks[0])} {neighbour}\n"
        for neighbour, other in NODES.items()
        if set(other.networks) & set(node.networks)
    )
    known_hosts = "".join(
        f"{neighbour},{other.address()} {public_key(ssh / f'host_{neighbour}.pub')}\n"
        for neighbour, other in NODES.items()
        if "ts" in other.networks
    )
    return {
        "/etc/hostname": name + "\n",
        "/etc/machine-id": hashlib.sha256(name.encode()).hexdigest()[:32] + "\n",
        "/etc/hosts": hosts,
        "/etc/resolv.conf": f"nameserver {NODES['infra'].address(node.networks[0])}\noptions timeout:1 attempts:2\n",
        "/etc/fstab": "",
        "/etc/ssh/sshd_config.d/lab.conf": "UsePAM no\nHostKey /etc/ssh/lab_host_key\n",
        "/etc/ssh/lab_host_key": (ssh / f"host_{name}").read_text(),
        "/root/.ssh/authorized_keys": (ssh / "id_ed25519.pub").read_text(),
        "/root/.ssh/known_hosts": known_hosts,
    }


def public_key(file: Path) -> str:
    """Return type and key without the comment."""
    return " ".join(file.read_text().split()[:2])


def base_units() -> Files:
    """What systemd is told on every node."""
    files: Files = {
        UNITS + "default.target": Path(STOCK + "multi-user.target"),
        "/etc/systemd/system.conf.d/lab.conf": "[Manager]\nDefaultTimeoutStopSec=15s\nLogLevel=notice\n",
        "/etc/systemd/journald.conf.d/lab.conf": (
            "[Journal]\nStorage=persistent\nSystemMaxUse=64M\nRateLimitIntervalSec=0\nForwardToSyslog=no\n"
        ),
        # It says that /tmp is emptied at boot, and a folder bound into a node may lie below /tmp.
        "/etc/tmpfiles.d/tmp.conf": Path("/dev/null"),
    }
    files |= {UNITS + unit: Path("/dev/null") for unit in MASKED_UNITS.split()}
    # Among them is what would start this machine's own installed services.
    generators = Path("/lib/systemd/system-generators")
    files |= {f"/etc/systemd/system-generators/{one.name}": Path("/dev/null") for one in generators.iterdir()}
    return files


def wanted(*units: str) -> Files:
    """Have units of these names start at boot."""
    return {f"{UNITS}multi-user.target.wants/{unit}.service": Path(f"{STOCK}{unit}.service") for unit in units}


def engine_files() -> Files:
    """Debian's dockerd, allowed to use the rig's plain registry and to be killed often."""
    return {
        "/etc/docker/daemon.json": json.dumps({"insecure-registries": [NETWORKS["ts"] + "0/24"]}),
        f"{UNITS}multi-user.target.wants/docker.socket": Path(STOCK + "docker.socket"),
        UNITS + "docker.service.d/lab.conf": "[Unit]\nStartLimitIntervalSec=0\n",
    }


def arm64_files() -> Files:
    """Stand-ins for python3 and uname that say aarch64 (arm64.sh)."""
    return {
        f"{folder}/{name}": Path("/opt/arm64") / name.removesuffix(".11")
        for name in ("python3", "python3.11", "uname")
        for folder in ("/usr/bin", "/usr/local/bin")
    }


def registry_files() -> Files:
    """One store, served openly and with a password."""
    return {
        "/etc/docker/registry/config.yml": REGISTRY_CONFIG.format(port=5000),
        "/etc/docker/registry/auth.yml": REGISTRY_CONFIG.format(port=5001)
        + "auth:\n  htpasswd: {realm: lab, path: /etc/docker/registry/htpasswd}\n",
        "/etc/docker/registry/htpasswd": HTPASSWD,
        # Its folder is the rig's cache, which belongs to root.
        UNITS + "docker-registry.service.d/lab.conf": "[Service]\nUser=root\n",
        UNITS + "registry-auth.service": (
            "[Service]\nExecStart=/usr/bin/docker-registry serve /etc/docker/registry/auth.yml\n"
        ),
        UNITS + "multi-user.target.wants/registry-auth.service": Path(UNITS + "registry-auth.service"),
    }


def zones() -> dict[str, str]:
    """Return the zones and what is in them: the public one, and the internal one with the nodes."""
    head = "@ 60 SOA ns hostmaster 1 60 60 3600 5\n@ 60 NS ns\nns 60 A {}\n"
    infra = NODES["infra"]
    nodes = "".join(f"{name} 60 A {node.address()}\n" for name, node in NODES.items() if "ts" in node.networks)
    return {
        DOMAIN: head.format(infra.address("pub")) + f"acme 60 A {infra.address('pub')}\n",
        INTERNAL_ZONE: head.format(infra.address()) + nodes,
    }


def dns_files(cache: Path) -> Files:
    """Knot, with a key that may update both zones."""
    config = textwrap.dedent(f"""\
        server:
          rundir: "/run/knot"
          listen: 0.0.0.0@53
        log:
          - target: stderr
            any: info
        database:
          storage: "/var/lib/knot"
        key:
          - id: lab
            algorithm: hmac-sha256
            secret: {(cache / "tsig").read_text()}
        acl:
          - id: update
            key: lab
            action: [update, transfer]
        template:
          - id: default
            storage: "/var/lib/knot"
            file: "%s.zone"
            acl: update
        zone:
        """) + "".join(f"  - domain: {zone}\n" for zone in zones())
    files: Files = {"/etc/knot/knot.conf": config, "/etc/default/knot": ""}
    files |= {f"/var/lib/knot/{zone}.zone": text for zone, text in zones().items()}
    return files


def acme_files(cache: Path, cert_seconds: int) -> Files:
    """Pebble, which asks the rig's own DNS whom to validate."""
    pebble = {
        "listenAddress": "0.0.0.0:14000",
        "managementListenAddress": "0.0.0.0:15000",
        "certificate": "/etc/pebble/server.pem",
        "privateKey": "/etc/pebble/server.key",
        "httpPort": 80,
        "tlsPort": 443,
        "ocspResponderURL": "",
        "externalAccountBindingRequired": False,
        "certificateValidityPeriod": cert_seconds,
    }
    return {
        UNITS + "pebble.service": (
            "[Service]\nEnvironment=PEBBLE_VA_NOSLEEP=1 PEBBLE_WFE_NONCEREJECT=0\n"
            f"ExecStart=/usr/bin/pebble -config /etc/pebble.json -dnsserver {NODES['infra'].address()}:53\n"
        ),
        UNITS + "multi-user.target.wants/pebble.service": Path(UNITS + "pebble.service"),
        "/etc/pebble.json": json.dumps({"pebble": pebble}),
        # Copies, readable by the service's own user whoever owns the cache.
        "/etc/pebble/server.pem": (cache / "pebble" / "server.pem").read_text(),
        "/etc/pebble/server.key": (cache / "pebble" / "server.key").read_text(),
    }


def facts(cache: Path) -> dict[str, object]:
    """Return what a test needs to know: /lab/lab.json in every node."""
    infra = NODES["infra"].address()
    return {
        "nodes": {name: {net: node.address(net) for net in node.networks} for name, node in NODES.items()},
        "registry": REGISTRY,
        "registry_auth": {"address": REGISTRY_WITH_PASSWORD, "user": REGISTRY_USER, "password": REGISTRY_PASSWORD},
        "dns": {
            "server": infra,
            "key": "lab",
            "algorithm": "hmac-sha256",
            "secret": (cache / "tsig").read_text(),
            "zones": list(zones()),
        },
        "acme": {
            "directory": f"https://{infra}:14000/dir",
            "ca": "/lab/acme-ca.pem",
            "roots": f"https://{infra}:15000/roots/0",
        },
        "ssh_key": "/lab/id_ed25519",
    }


def write_files(files: Files, folder: Path) -> None:
    """Write files below a folder, private keys readable by root only."""
    for path, content in files.items():
        file = folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            file.symlink_to(content)
            continue
        file.write_text(content)
        file.chmod(0o600 if path.endswith(("id_ed25519", "_key", "authorized_keys")) else 0o644)
