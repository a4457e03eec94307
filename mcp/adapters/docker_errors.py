"""The engine's errors in our words: three shapes of DockerError, plus what aiohttp and the clock raise.

Codes: engine_down, engine_frozen, engine_denied, engine_error, no_space; image_missing, image_damaged, platform_missing,
auth_failed, registry_tls, registry_unreachable, registry_refused; name_taken, removal_in_progress, container_missing,
network_missing, not_running; port_in_use, address_missing, bad_mount, bad_command, bad_user, bad_request.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import aiodocker
import aiohttp

from mcp.model.errors import AdapterError

_LIBRARY_COULD_NOT_CONNECT = 900

_Rules = tuple[tuple[str, str, bool, str], ...]
"""What the engine's text has (lower case), our code, whether a later try may do better, what to do."""

_EVERYWHERE: _Rules = (
    ("no space left on device", "no_space", True, "Free disk space on the node: `docker system df`."),
)

_OF_REGISTRIES: _Rules = (
    ("no matching manifest|does not match the (specified|expected) platform|no match for platform",
     "platform_missing", False, "Build the image for that architecture, or pin the service to another node."),
    ("unauthorized|no basic auth|authentication required|access .*denied|\\b401\\b|403 forbidden",
     "auth_failed", False, "Set the registry's user and password in mcp-agent.toml, [registry]."),
    ("manifest unknown|name unknown|repository does not exist|not found|no such image",
     "image_missing", False, "Check the image's name and tag, and that it was pushed."),
    ("http response to https client|x509|certificate|tls:",
     "registry_tls", False, "Give the registry a certificate that the engine trusts, or name it in its insecure-registries."),
    ("filesystem layer verification failed|digest|checksum|invalid tar|gzip",
     "image_damaged", True, "Push the image again if it happens twice."),
    ("toomanyrequests|too many requests", "registry_refused", True, "Wait, or give the registry a user with a higher limit."),
    ("connection refused|no such host|timeout|deadline exceeded|timed out|connection reset|unreachable|eof|dial |http status",
     "registry_unreachable", True, "Is the registry up and reachable from that node?"),
)  # fmt: skip

_OF_CONTAINERS: _Rules = (
    ("is already in use by container|name .* is already in use|name .* in use", "name_taken", False, ""),
    ("removal of container .* is already in progress|marked for removal", "removal_in_progress", True, ""),
    ("no such container", "container_missing", False, ""),
    ("no such image", "image_missing", True, "It was removed after it was pulled: deploy again."),
    ("network .* (not found|is ambiguous)", "network_missing", True, ""),
    ("port is already allocated|address already in use", "port_in_use", False,
     "`ss -ltnp` on the node shows who listens there."),
    ("cannot assign requested address", "address_missing", True, "The node has not this address (yet): is the mesh up?"),
    ("executable file not found|exec format error|stat .*: no such file|exec: .*permission denied|no command specified",
     "bad_command", False, "Check `cmd` and the image's entry point; is the image for this architecture?"),
    ("mount|bind source path|invalid volume|local volume name", "bad_mount", False,
     "Check `volumes` and what is at that path on that node."),
    ("unable to find user|unable to find group|no matching entries in passwd", "bad_user", False, "Check `user`."),
    ("is not running", "not_running", False, ""),
    ("failed to create (shim )?task|oci runtime|unable to start container process", "bad_command", False,
     "Check `cmd` and the image's entry point."),
)  # fmt: skip

_NOISE = (
    re.compile(r"driver failed programming external connectivity on endpoint \S+ \(\w+\): "),
    re.compile(r"Error starting userland proxy: "),
    re.compile(r"(failed to create (shim )?task: )?OCI runtime \w+ failed: (\w+ (create|exec) failed: )?"),
    re.compile(r"unable to start container process: (error during container init: )?"),
    re.compile(r"(: unknown)?: Are you trying to mount .*"),
    re.compile(r" \(via /proc/self/fd/\d+\), flags: 0x\w+"),
    re.compile(r": unknown$"),
)
_SAID_TWICE = re.compile(r"([\w ]{4,}): \1$")
_LONG_ID = re.compile(r"(?<!sha256:)\b([0-9a-f]{12})[0-9a-f]{52}\b")
_SECRET = re.compile(r"//[^/@\s:]+:[^/@\s]+@")


def translate(
    error: Exception, what: str, limit_s: float, secrets: Iterable[str] = (), *, registry: bool = False
) -> AdapterError:
    """Return our error for one of the engine's, the connection's or the clock's; `what` completes "cannot ...".

    `registry` says that the engine may be repeating a registry's words. No secret is left in the text.
    """
    if isinstance(error, TimeoutError) and registry:
        return AdapterError(
            f"cannot {what}: the registry does not answer (waited {limit_s:g} s)",
            retryable=True,
            code="registry_unreachable",
            hint="Is the registry up and reachable from that node?",
        )
    if isinstance(error, TimeoutError):
        # It accepts and never answers. The call may still be carried out: the caller looks before it acts again.
        return AdapterError(
            f"cannot {what}: the container engine does not answer (waited {limit_s:g} s)",
            retryable=True,
            code="engine_frozen",
            hint="`systemctl status docker` on the node; what was asked may still happen.",
        )
    if isinstance(error, aiodocker.DockerError) and error.status != _LIBRARY_COULD_NOT_CONNECT:
        return _said(error, what, secrets, registry=registry)
    if isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ServerDisconnectedError)):
        return AdapterError(
            f"cannot {what}: the container engine went away in the middle",
            retryable=True,
            code="engine_down",
            hint="`systemctl status docker` on the node.",
        )
    return _no_connection(error, what, secrets)


def _no_connection(error: Exception, what: str, secrets: Iterable[str]) -> AdapterError:
    text = clean(error, secrets)
    if "Permission denied" in text or "Errno 13" in text:
        return AdapterError(
            f"cannot {what}: this user may not use the container engine's socket",
            code="engine_denied",
            hint="Add the agent's user to the group that owns the socket (docker), and restart the agent.",
        )
    if isinstance(error, (ValueError, aiohttp.ClientResponseError)):
        return AdapterError(
            f"cannot {what}: what answers there is no container engine ({text[:120]})", code="engine_error"
        )
    if "disconnected" in text.lower():
        why = "it closed the connection"
    else:
        found = re.search(r"\[([^\[\]]*)\]\]?$", text)
        why = (found[1] if found else text[:120]).lower() or type(error).__name__
    return AdapterError(
        f"cannot {what}: the container engine is not running ({why})",
        retryable=True,
        code="engine_down",
        hint="`systemctl start docker` on the node.",
    )


def _said(error: aiodocker.DockerError, what: str, secrets: Iterable[str], *, registry: bool) -> AdapterError:
    text = clean(error.message, secrets)
    for pattern, code, retryable, hint in _EVERYWHERE + (_OF_REGISTRIES if registry else _OF_CONTAINERS):
        if re.search(pattern, text.lower()):
            return AdapterError(f"cannot {what}: {_brief(text)}", retryable=retryable, code=code, hint=hint)
    if error.status == 400:
        return AdapterError(f"cannot {what}: {_brief(text)}", code="bad_request")
    return AdapterError(f"cannot {what}: {_brief(text)}", code="engine_error", retryable=error.status >= 500)


def _brief(text: str) -> str:
    """Return an engine's text without the layers of it that it went through."""
    for noise in _NOISE:
        text = noise.sub("", text)
    text = _SAID_TWICE.sub(r"\1", text)
    return _LONG_ID.sub(r"\1", text)


def clean(text: object, secrets: Iterable[str] = ()) -> str:
    """Return an engine's text on one line of at most 600 characters, without a credential."""
    line = _SECRET.sub("//", " ".join(str(text).split()))
    for secret in secrets:
        line = line.replace(secret, "***")
    return line[:600]
