"""The rig's container images, assembled byte for byte the same each time and pushed to its registry without an engine.

They consist of the static busybox and one shell script each. Most tags are manifest lists for amd64 and arm64, as a
mixed fleet's registry would hold; `amd64only:v1` is a plain amd64 manifest. The arm64 entry is a white lie: the amd64
program under another name, for this kernel runs no other in a container; /etc/image-arch tells which entry it was.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import sys
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

APPLETS = (
    "sh httpd sleep cat echo env hostname date wget nc ls ps kill mkdir rm test true false uname dd head chmod printf"
)

WEB = """#!/bin/sh
# Says what it is, on $PORT (8080).  $DELAY seconds pass before it listens.
# GET /cgi-bin/env: its environment.  GET /cgi-bin/die: it exits with 3.
trap 'echo "stopping"; exit 0' TERM INT
echo "web VERSION starting on ${MCP_NODE:-?}"
[ -z "$DELAY" ] || { sleep "$DELAY" & wait $!; }
mkdir -p /www/cgi-bin
me="node=${MCP_NODE:-} service=${MCP_SERVICE:-} host=$(hostname)"
echo "version=VERSION $me image=$(cat /etc/image-arch)" >/www/index.html
echo ok >/www/healthz
printf '#!/bin/sh\\necho; env\\n' >/www/cgi-bin/env
printf '#!/bin/sh\\necho; kill -USR1 1\\n' >/www/cgi-bin/die
chmod 755 /www/cgi-bin/*
trap 'exit 3' USR1
httpd -f -v -p "${PORT:-8080}" -h /www &
echo "web VERSION listening"
wait $!
"""
CRASHER = "#!/bin/sh\necho 'crasher up'\nsleep 2\necho 'crasher: fatal' >&2\nexit 1\n"
STUBBORN = """#!/bin/sh
trap 'echo "TERM ignored"' TERM
mkdir -p /www; echo "version=VERSION stubborn" >/www/index.html
httpd -f -p "${PORT:-8080}" -h /www &
while :; do sleep 1 & wait $!; done
"""
CHATTY = '#!/bin/sh\ni=0\nwhile :; do i=$((i+1)); echo "line $i"; echo "err $i" >&2; sleep ${EVERY:-1}; done\n'
HOG = "#!/bin/sh\necho 'eating'; x=a; while :; do x=$x$x; done\n"
SICK = """#!/bin/sh
# Healthy for $WELL seconds (5), then answers 500 to /cgi-bin/health while still serving /.
mkdir -p /www/cgi-bin; echo sick >/www/index.html; t0=$(date +%s)
printf '#!/bin/sh\\n[ $(( $(date +%%s) - %s )) -lt %s ] && s=200 || s=500\\necho "Status: $s"; echo; echo $s\\n' \
  "$t0" "${WELL:-5}" >/www/cgi-bin/health
chmod 755 /www/cgi-bin/health
trap 'exit 0' TERM
httpd -f -p "${PORT:-8080}" -h /www & wait $!
"""


@dataclass(frozen=True)
class Image:
    """What makes one tag: its script, its environment and the platforms it is offered for."""

    script: str
    env: dict[str, str] = field(default_factory=dict)
    platforms: tuple[str, ...] = ("amd64", "arm64")


IMAGES = {
    **{f"web:v{n}": Image(WEB) for n in (1, 2, 3)},
    "amd64only:v1": Image(WEB, platforms=("amd64",)),
    "slow:v1": Image(WEB, {"DELAY": "5"}),
    "crasher:v1": Image(CRASHER),
    "stubborn:v1": Image(STUBBORN),
    "chatty:v1": Image(CHATTY),
    "hog:v1": Image(HOG),
    "sick:v1": Image(SICK),
}

DOCKER = "application/vnd.docker."
MANIFEST = DOCKER + "distribution.manifest.v2+json"
MANIFEST_LIST = DOCKER + "distribution.manifest.list.v2+json"


@dataclass(frozen=True)
class Layer:
    """A gzipped tar and its two digests."""

    data: bytes
    digest: str
    diff_id: str


def digest(data: bytes) -> str:
    """Return a registry's name for some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def layer(entries: list[tuple[str, bytes, bytes | str, int]]) -> Layer:
    """Make a layer of (name, tar type, content or link target, mode)."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, kind, content, mode in entries:
            info = tarfile.TarInfo(name)
            info.mode, info.type = mode, kind
            if isinstance(content, str):
                info.linkname, content = content, b""  # noqa: PLW2901 - a link has no content
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    zipped = gzip.compress(raw.getvalue(), 6, mtime=0)
    return Layer(zipped, digest(zipped), digest(raw.getvalue()))


def base_layer() -> Layer:
    """Make the layer that all images share: busybox and an empty tree."""
    folder, file, link = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE
    busybox = shutil.which("busybox")
    assert busybox, "busybox-static is not installed"
    return layer(
        [
            *((name, folder, b"", 0o755) for name in ("bin", "etc", "proc", "sys", "dev", "root")),
            ("tmp", folder, b"", 0o1777),
            ("bin/busybox", file, Path(busybox).read_bytes(), 0o755),
            ("etc/passwd", file, b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/:/bin/sh\n", 0o644),
            *((f"bin/{applet}", link, "busybox", 0o777) for applet in APPLETS.split()),
        ]
    )


class Registry:
    """The few calls of a registry's API that a push needs."""

    def __init__(self, address: str) -> None:
        """Speak to the one at HOST:PORT, in the clear."""
        self.base = f"http://{address}/v2/"

    def call(self, method: str, path: str, body: bytes | None = None, kind: str = "application/octet-stream") -> Any:
        """Send one request; raises urllib.error.HTTPError when it is refused."""
        url = path if path.startswith("http") else self.base + path
        request = urllib.request.Request(url, body, {"Content-Type": kind}, method=method)
        return urllib.request.urlopen(request, timeout=10)

    def has(self, path: str) -> bool:
        """Say whether something is there."""
        try:
            self.call("HEAD", path)
        except urllib.error.HTTPError:
            return False
        return True

    def put_blob(self, repo: str, data: bytes) -> None:
        """Upload a blob unless it is there."""
        name = digest(data)
        if not self.has(f"{repo}/blobs/{name}"):
            where = self.call("POST", f"{repo}/blobs/uploads/", b"").headers["Location"]
            self.call("PUT", where + ("&" if "?" in where else "?") + "digest=" + name, data)

    def put_manifest(self, repo: str, tag: str, document: dict[str, Any]) -> tuple[str, int]:
        """Upload a manifest under a tag, or under its digest when that is empty; return digest and size."""
        body = json.dumps(document, indent=1).encode()
        self.call("PUT", f"{repo}/manifests/{tag or digest(body)}", body, document["mediaType"])
        return digest(body), len(body)


def config_of(image: Image, name: str, arch: str, layers: list[Layer]) -> bytes:
    """Return the configuration of one platform's entry."""
    return json.dumps(
        {
            "architecture": arch,
            "os": "linux",
            "created": "2026-01-01T00:00:00Z",
            "config": {
                "Env": ["PATH=/bin", *(f"{key}={value}" for key, value in image.env.items())],
                "Entrypoint": ["/entry"],
                "WorkingDir": "/",
                "ExposedPorts": {"8080/tcp": {}},
                "Labels": {"org.opencontainers.image.version": name.partition(":")[2]},
            },
            "rootfs": {"type": "layers", "diff_ids": [one.diff_id for one in layers]},
            "history": [{"created_by": "lab base"}, {"created_by": f"lab {name}"}],
        }
    ).encode()


def push_platform(
    registry: Registry, name: str, image: Image, arch: str, base: Layer, tag: str = ""
) -> tuple[str, int]:
    """Push what one platform needs; return its manifest's digest and size."""
    repo, _, version = name.partition(":")
    script = image.script.replace("VERSION", version).encode()
    app = layer(
        [
            ("entry", tarfile.REGTYPE, script, 0o755),
            ("etc/image-arch", tarfile.REGTYPE, arch.encode() + b"\n", 0o644),
        ]
    )
    config = config_of(image, name, arch, [base, app])
    for blob in (base.data, app.data, config):
        registry.put_blob(repo, blob)
    return registry.put_manifest(
        repo,
        tag,
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": DOCKER + "container.image.v1+json", "size": len(config), "digest": digest(config)},
            "layers": [
                {"mediaType": DOCKER + "image.rootfs.diff.tar.gzip", "size": len(one.data), "digest": one.digest}
                for one in (base, app)
            ],
        },
    )


def push(registry: Registry, name: str, image: Image, base: Layer) -> str:
    """Push one tag and return its digest: a manifest list, or a plain manifest where there is one platform only."""
    repo, _, tag = name.partition(":")
    if len(image.platforms) == 1:
        return push_platform(registry, name, image, image.platforms[0], base, tag)[0]
    entries = []
    for arch in image.platforms:
        of, size = push_platform(registry, name, image, arch, base)
        platform = {"architecture": arch, "os": "linux"}
        entries.append({"mediaType": MANIFEST, "size": size, "digest": of, "platform": platform})
    index = {"schemaVersion": 2, "mediaType": MANIFEST_LIST, "manifests": entries}
    return registry.put_manifest(repo, tag, index)[0]


def main(address: str) -> None:
    """Push every image and print its digest."""
    registry, base = Registry(address), base_layer()
    for name, image in IMAGES.items():
        print(name, push(registry, name, image, base))


if __name__ == "__main__":
    main(sys.argv[1])
