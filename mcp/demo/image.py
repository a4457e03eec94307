"""Small container images, made byte for byte the same each time from the static busybox, and put into an engine.

No registry and no build tool is needed. The demo shows them, and the tests run them.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from mcp.adapters.docker import DockerEngine
from mcp.adapters.host import LinuxHost
from mcp.model.errors import AdapterError
from mcp.model.values import frozen

_APPLETS = "sh httpd sleep cat echo env hostname date nc ls ps kill mkdir rm test true false dd head tr chmod printf id"

WEB = """#!/bin/sh
# A page that says its version, on $PORT (8080), after $DELAY seconds. It goes at once when it is told to.
trap 'echo "web VERSION: told to stop"; exit 0' TERM INT
echo "web VERSION: starting"
[ -z "$DELAY" ] || { sleep "$DELAY" & wait $!; }
mkdir -p /www/cgi-bin
echo "web VERSION, service ${MCP_SERVICE:--}, node ${MCP_NODE:--}" >/www/index.html
echo ok >/www/healthz
printf '#!/bin/sh\\necho; env\\n' >/www/cgi-bin/env
chmod 755 /www/cgi-bin/env
httpd -f -p "${PORT:-8080}" -h /www &
echo "web VERSION: listening on port ${PORT:-8080}"
wait $!
"""

CRASHER = """#!/bin/sh
echo "crasher: up"
echo "crasher: fatal: no database" >&2
exit 1
"""

_NO_BUSYBOX = "Install it: `apt-get install busybox-static`."
_OF_DYNAMIC_PROGRAMS = (b"/ld-linux", b"/ld-musl", b"/ld64.so")


@frozen(kw_only=True)
class Image:
    """An image as an engine stores it: a configuration and layers (tar files, not compressed)."""

    name: str
    config: bytes
    layers: tuple[bytes, ...]

    @property
    def id(self) -> str:
        """What an engine calls the image: the digest of its configuration."""
        return digest(self.config)


def digest(data: bytes) -> str:
    """Return the digest of bytes as registries and engines write it."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def web_image(version: str) -> Image:
    """Return `localhost/web:<version>`: a page that says its version, with /healthz and /cgi-bin/env, on $PORT.

    Raises:
        AdapterError: there is no static busybox on this machine.
    """
    return script_image(f"localhost/web:{version}", WEB.replace("VERSION", version))


def crasher_image() -> Image:
    """Return `localhost/crasher:v1`, which says why and exits with 1.

    Raises:
        AdapterError: there is no static busybox on this machine.
    """
    return script_image("localhost/crasher:v1", CRASHER)


def script_image(
    name: str, script: str, env: Mapping[str, str] | None = None, *, arch: str = "", busybox: str = ""
) -> Image:
    """Return an image that runs a shell script; `arch` is this machine's unless an image is to claim another.

    Raises:
        AdapterError: there is no static busybox on this machine (or at the path that `busybox` says).
    """
    layers = (_base_layer(busybox), _tar([("entry", tarfile.REGTYPE, script.encode(), 0o755)]))
    config = {
        "architecture": arch or LinuxHost("/").arch,
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": {
            "Env": ["PATH=/bin", *(f"{key}={value}" for key, value in (env or {}).items())],
            "Entrypoint": ["/entry"],
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
        "history": [{"created_by": "busybox"}, {"created_by": name}],
    }
    return Image(name=name, config=json.dumps(config).encode(), layers=layers)


async def load(engine_url: str, images: Sequence[Image]) -> list[str]:
    """Put images into an engine and return the names of those that were not there; asked twice, nothing is sent.

    Raises:
        AdapterError: the engine does not answer, or does not take them.
    """
    engine = DockerEngine(engine_url)
    try:
        missing = [image for image in images if await engine.image_id(image.name) != image.id]
        if missing:
            await engine.load(archive(missing))
    finally:
        await engine.close()
    return [image.name for image in missing]


def archive(images: Sequence[Image]) -> bytes:
    """Return images as `docker save` writes them: layers that they share are in it once."""
    files: dict[str, bytes] = {}
    manifest = []
    for image in images:
        layers = {f"{digest(layer)[7:]}/layer.tar": layer for layer in image.layers}
        config = f"{image.id[7:]}.json"
        files |= layers | {config: image.config}
        manifest.append({"Config": config, "RepoTags": [image.name], "Layers": list(layers)})
    files["manifest.json"] = json.dumps(manifest).encode()
    return _tar([(name, tarfile.REGTYPE, content, 0o644) for name, content in files.items()])


@cache
def _base_layer(busybox: str) -> bytes:
    folder, file, link = tarfile.DIRTYPE, tarfile.REGTYPE, tarfile.SYMTYPE
    users = b"root:x:0:0:root:/:/bin/sh\napp:x:1000:1000::/:/bin/sh\n"
    return _tar(
        [
            *((name, folder, b"", 0o755) for name in ("bin", "etc", "proc", "sys", "dev")),
            ("tmp", folder, b"", 0o1777),
            ("bin/busybox", file, _busybox(busybox), 0o755),
            ("etc/passwd", file, users, 0o644),
            *((f"bin/{applet}", link, b"busybox", 0o777) for applet in _APPLETS.split()),
        ]
    )


def _busybox(path: str) -> bytes:
    found = path or shutil.which("busybox", path="/usr/local/bin:/usr/bin:/bin") or shutil.which("busybox")
    if not found or not Path(found).is_file():
        raise AdapterError(
            "cannot make images: there is no busybox on this machine", code="no_busybox", hint=_NO_BUSYBOX
        )
    program = Path(found).read_bytes()
    # A program that needs a loader says near its beginning which one.
    if any(loader in program[:4096] for loader in _OF_DYNAMIC_PROGRAMS):
        raise AdapterError(
            f"cannot make images: {found} needs shared libraries, which an image would not have",
            code="no_busybox",
            hint=_NO_BUSYBOX,
        )
    return program


def _tar(entries: Sequence[tuple[str, bytes, bytes, int]]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, kind, content, mode in entries:
            info = tarfile.TarInfo(name)
            info.type, info.mode = kind, mode
            if kind == tarfile.SYMTYPE:
                info.linkname = content.decode()
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return raw.getvalue()
