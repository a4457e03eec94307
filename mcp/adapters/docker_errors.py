"""The engine's errors in our words: three shapes of DockerError, plus what aiohttp and the clock raise."""

from __future__ import annotations

import re

import aiodocker
import aiohttp

from mcp.model.errors import AdapterError

_RULES: tuple[tuple[str, str, bool, str], ...] = (
    # what the engine's text has, our code, whether a later try may do better, what to do
    (r"no such image|manifest unknown|not found: manifest|name unknown|repository does not exist|manifest .* not found",
     "image_missing", False, "Check the image's name and tag, and that it was pushed."),
    (r"no matching manifest|does not match the (specified|expected) platform|no match for platform",
     "platform_missing", False, "Build the image for that architecture, or pin the service to another node."),
    (r"unauthorized|no basic auth|authentication required|access .*denied|incorrect username or password",
     "auth_failed", False, "Set the registry's user and password file in mcp-agent.toml, [registry]."),
    (r"port is already allocated|address already in use|bind for .* failed",
     "port_in_use", False, "`ss -ltnp` on the node shows who listens there."),
    (r"cannot assign requested address",
     "address_missing", True, "The node has not this address (yet): is the mesh up?"),
    (r"no space left on device", "no_space", True, "Free disk space on the node: `docker system df`."),
    (r"is already in use by container|name .* is already in use", "name_taken", False, ""),
    (r"removal of container .* is already in progress", "removal_in_progress", True, ""),
    (r"invalid mount|bind source path does not exist|mounts denied|not a directory.*mount|error mounting",
     "bad_mount", False, "Check `volumes` and that the path exists on that node."),
    (r"executable file not found|exec format error|no such file or directory.*exec|unable to start container process|oci runtime",
     "bad_command", False, "Check `cmd` and the image's entry point."),
    (r"unable to find user|no matching entries in passwd", "bad_user", False, "Check `user`."),
    (r"network .* not found", "network_missing", True, ""),
    (r"no such container", "container_missing", False, ""),
    (r"server gave http response to https client|x509|tls:", "registry_tls", False,
     "Add the registry to the engine's insecure-registries, or give it a certificate that the engine trusts."),
    (r"connection refused|no such host|i/o timeout|context deadline exceeded|connection reset|no route to host|request canceled|eof",
     "registry_unreachable", True, "Is the registry up and reachable from that node?"),
)  # fmt: skip

_SECRET = re.compile(r"//[^/@\s:]+:[^/@\s]+@")


def translate(error: Exception, what: str, limit_s: float | None) -> AdapterError:
    """Return our error for one of the engine's; `what` is what could not be done."""
    if isinstance(error, aiodocker.DockerError) and error.status != 900:
        return _said(error, what)
    if isinstance(error, TimeoutError):
        # An engine that accepts and never answers; the call may have been carried out: look before acting again.
        shown = f" within {limit_s:g} s" if limit_s else ""
        return AdapterError(
            f"cannot {what}: the container engine does not answer{shown}",
            retryable=True,
            code="engine_frozen",
            hint="`systemctl status docker` on the node.",
        )
    if isinstance(error, aiohttp.ClientPayloadError):
        return AdapterError(f"cannot {what}: the container engine went away in the middle", retryable=True, code="engine_down")
    return AdapterError(
        f"cannot {what}: the container engine is not running ({_brief(error)})",
        retryable=True,
        code="engine_down",
        hint="`systemctl start docker` on the node.",
    )


def _said(error: aiodocker.DockerError, what: str) -> AdapterError:
    text = clean(error.message)
    lowered = text.lower()
    for pattern, code, retryable, hint in _RULES:
        if re.search(pattern, lowered):
            return AdapterError(f"cannot {what}: {text}", retryable=retryable, code=code, hint=hint)
    if error.status == 404:
        return AdapterError(f"cannot {what}: {text}", code="container_missing" if "container" in what else "image_missing")
    if error.status == 409:
        return AdapterError(f"cannot {what}: {text}", code="conflict", retryable=True)
    return AdapterError(f"cannot {what}: {text}", code="engine_error", retryable=error.status >= 500)


def clean(text: object) -> str:
    """Return an engine's text on one line, short, and without a credential in a URL."""
    line = " ".join(str(text).split())
    return _SECRET.sub("//", line)[:400]


def _brief(error: Exception) -> str:
    text = clean(error)
    found = re.search(r"\[(.*?)\]$", text)
    return found[1].lower() if found else text[:120].lower() or type(error).__name__
