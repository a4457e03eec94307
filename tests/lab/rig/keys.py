"""The rig's own keys and certificates, made once and kept in its cache: ssh, the ACME server's, the DNS key."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from rig.shell import sh
from rig.table import DOMAIN, NODES

EC_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "3650")


def make_keys(cache: Path) -> None:
    """Make what is missing; what is there stays as it is."""
    if not (cache / "ssh" / "id_ed25519").exists():
        make_ssh_keys(cache / "ssh")
    if not (cache / "pebble" / "server.pem").exists():
        make_acme_certificates(cache / "pebble")
    if not (cache / "tsig").exists():
        (cache / "tsig").write_text(base64.b64encode(os.urandom(32)).decode())
    (cache / "registry").mkdir(exist_ok=True)


def make_ssh_keys(folder: Path) -> None:
    """Make a host key for each node, and last the operator's, which opens them all."""
    folder.mkdir(exist_ok=True)
    for name in (*(f"host_{node}" for node in NODES), "id_ed25519"):
        (folder / name).unlink(missing_ok=True)
        sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@lab", "-f", folder / name)


def make_acme_certificates(folder: Path) -> None:
    """Make the authority and the certificate of the ACME server's own HTTPS."""
    folder.mkdir(exist_ok=True)
    infra = NODES["infra"]
    names = f"DNS:acme.{DOMAIN},DNS:infra,IP:{infra.address()},IP:{infra.address('pub')}"
    ca_key, ca = folder / "ca.key", folder / "ca.pem"
    sh("openssl", "req", "-x509", *EC_KEY, "-subj", "/CN=lab acme root", "-keyout", ca_key, "-out", ca)
    sh(
        *("openssl", "req", "-x509", *EC_KEY, "-subj", "/CN=acme", "-CA", ca, "-CAkey", ca_key),
        *("-addext", f"subjectAltName={names}", "-addext", "basicConstraints=critical,CA:FALSE"),
        *("-keyout", folder / "server.key", "-out", folder / "server.pem"),
    )
