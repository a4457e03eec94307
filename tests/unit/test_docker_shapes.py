"""What engines of several versions say, put into our words: shapes, streams, errors. No engine is needed."""

from __future__ import annotations

import json
import struct
from collections.abc import AsyncIterator, Iterable
from typing import Any

import aiodocker
import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcp.adapters.docker_errors import clean, translate
from mcp.adapters.docker_shapes import (
    container_config,
    container_state,
    engine_event,
    local_image,
    registry_headers,
    registry_of,
    remote_image,
)
from mcp.adapters.docker_streams import MAX_LINE_BYTES, LogSplitter, PullProgress, json_lines, stream_error
from mcp.model.messages import LogLine
from mcp.model.ports import ContainerRequest, EngineEvent

OURS = {
    "net.metacircular.mcp.owner": "mcp",
    "net.metacircular.mcp.service": "web",
    "net.metacircular.mcp.component": "api",
    "net.metacircular.mcp.generation": "3",
    "net.metacircular.mcp.spec-hash": "abc123",
    "net.metacircular.mcp.ports": '{"": "127.0.0.1:10001"}',
}
STAMP = b"2026-01-01T00:00:00.123456789Z"


def shown(**state: Any) -> dict[str, Any]:
    """Return an inspection as API 1.41 gives it."""
    return {
        "Id": "f" * 64,
        "Name": "/mcp.web.api.g3",
        "RestartCount": 2,
        "Image": "sha256:" + "e" * 64,
        "Config": {"Image": "web:v1", "Labels": OURS, "Env": ["A=b"]},
        "State": {
            "Status": "running",
            "Running": True,
            "ExitCode": 0,
            "OOMKilled": False,
            "Error": "",
            "StartedAt": "2026-01-01T00:00:00.123456789Z",
            "FinishedAt": "0001-01-01T00:00:00Z",
            **state,
        },
        "NetworkSettings": {"IPAddress": "172.17.0.2"},
    }


# ------------------------------------------------------------------------ shapes


def test_a_container_is_read_from_state_and_labels() -> None:
    state = container_state(shown())
    assert state is not None
    assert (state.service, state.component, state.generation, state.spec_hash) == ("web", "api", 3, "abc123")
    assert (state.name, state.image, state.state, state.restarts) == ("mcp.web.api.g3", "web:v1", "running", 2)
    assert (state.started_at, state.finished_at) == ("2026-01-01T00:00:00.123456789Z", "")
    assert state.ports == {"": "127.0.0.1:10001"}


def test_a_newer_engine_that_leaves_fields_out_is_read_the_same() -> None:
    newer = shown()
    del newer["NetworkSettings"]["IPAddress"]
    del newer["State"]["OOMKilled"], newer["State"]["Error"], newer["State"]["ExitCode"], newer["RestartCount"]
    state = container_state(newer)
    assert state is not None
    assert (state.state, state.exit_code, state.out_of_memory, state.restarts) == ("running", 0, False, 0)


@pytest.mark.parametrize("labels", [None, {}, {"owner": "mcp"}, OURS | {"net.metacircular.mcp.service": "../etc"}])
def test_what_has_not_our_labels_is_not_ours(labels: dict[str, str] | None) -> None:
    foreign = shown()
    foreign["Config"]["Labels"] = labels
    assert container_state(foreign) is None


def test_health_and_the_end_of_a_container_are_read() -> None:
    sick = container_state(shown(Health={"Status": "unhealthy"}))
    assert sick is not None
    assert sick.health == "unhealthy"
    killed = container_state(shown(Status="exited", ExitCode=137, OOMKilled=True, Error="out of memory"))
    assert killed is not None
    assert (killed.state, killed.exit_code, killed.out_of_memory, killed.problem) == (
        "exited",
        137,
        True,
        "out of memory",
    )
    assert container_state(shown(Status="removing")).state == "dead"  # type: ignore[union-attr]


def event(action: str, **more: Any) -> bytes:
    said = {"Type": "container", "Action": action, "Actor": {"Attributes": OURS | {"name": "mcp.web.api.g3"} | more}}
    return json.dumps(said).encode()


def test_events_are_read_alike_from_old_and_new_engines() -> None:
    old = json.loads(event("die", exitCode="1")) | {
        "id": "f" * 64,
        "status": "die",
        "from": "web:v1",
        "time": 1,
        "timeNano": 2,
    }
    expected = EngineEvent(action="die", name="mcp.web.api.g3", service="web", detail="exit code 1")
    assert engine_event(json.dumps(old).encode()) == engine_event(event("die", exitCode="1")) == expected


def test_podmans_remove_is_a_destroy_and_health_comes_with_its_word() -> None:
    removed, sick = engine_event(event("remove")), engine_event(event("health_status: unhealthy"))
    assert removed is not None
    assert sick is not None
    assert (removed.action, sick.action, sick.detail) == ("destroy", "health", "unhealthy")


@pytest.mark.parametrize(
    "line", [b"", b"{", b"{}", b'{"Actor": null}', event("exec_start: sh"), event("rename"), event("init")]
)
def test_events_that_are_nothing_to_us_are_left_out(line: bytes) -> None:
    assert engine_event(line) is None


def test_platforms_of_a_registry_have_no_attestations_and_no_doubles() -> None:
    said = {
        "Descriptor": {"digest": "sha256:1"},
        "Platforms": [
            {"architecture": "amd64", "os": "linux"},
            {"architecture": "arm64", "os": "linux", "variant": "v8"},
            {"architecture": "amd64", "os": "linux"},
            {"architecture": "unknown", "os": "unknown"},
        ],
    }
    facts = remote_image("r.example/web:1", said)
    assert (facts.platforms, facts.digest, facts.is_local) == (("amd64", "arm64"), "sha256:1", False)


def test_a_local_image_is_known_by_its_repositorys_digest_not_by_its_id() -> None:
    facts = local_image("web:1", {"Id": "sha256:9", "RepoDigests": ["r.example/web@sha256:1"], "Architecture": "arm64"})
    assert (facts.platforms, facts.digest, facts.is_local) == (("arm64",), "sha256:1", True)
    assert local_image("web:1", {"RepoDigests": None}).digest == ""


@pytest.mark.parametrize(
    ("image", "registry"),
    [
        ("web:v1", "docker.io"),
        ("kyle/web:v1", "docker.io"),
        ("localhost/web:v1", "localhost"),
        ("r.example/web", "r.example"),
        ("r.example:8443/a/web@sha256:1", "r.example:8443"),
        ("127.0.0.1:5000/web:v1", "127.0.0.1:5000"),
    ],
)
def test_the_registry_of_an_image_is_its_host_and_port(image: str, registry: str) -> None:
    assert registry_of(image) == registry


def test_a_login_goes_to_its_own_registry_only() -> None:
    logins = {"r.example:8443": ("kyle", "secret")}
    assert list(registry_headers("r.example:8443/web:1", logins)) == ["X-Registry-Auth"]
    assert registry_headers("r.example/web:1", logins) == {}
    assert registry_headers("r.example:8443.evil.example/web:1", logins) == {}


def test_a_request_without_limits_sets_none() -> None:
    config = container_config(ContainerRequest(name="x", image="web:1", restart="on-failure:5", stop_grace_s=2.4))
    assert (config["HostConfig"]["Memory"], config["HostConfig"]["NanoCpus"], config["StopTimeout"]) == (0, 0, 2)
    assert config["HostConfig"]["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 5}
    assert not {"Cmd", "User"} & set(config)


# ----------------------------------------------------------------------- streams


def frame(stream: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(payload)) + payload


def split(data: bytes, cuts: Iterable[int]) -> list[LogLine]:
    splitter, lines, at = LogSplitter("api", "mcp.web.api.g3"), [], 0
    for cut in sorted({min(cut, len(data)) for cut in cuts} | {len(data)}):
        lines += splitter.feed(data[at:cut])
        at = cut
    return lines + splitter.rest()


TEXTS = st.text(st.characters(exclude_characters="\n\r", codec="utf-8"), max_size=40)


@given(st.lists(st.tuples(st.sampled_from([1, 2]), TEXTS), max_size=20), st.lists(st.integers(0, 3000), max_size=30))
def test_a_log_is_the_same_wherever_its_stream_is_cut(said: list[tuple[int, str]], cuts: list[int]) -> None:
    data = b"".join(frame(stream, STAMP + b" " + text.encode() + b"\n") for stream, text in said)
    lines = split(data, cuts)
    assert [(line.stream, line.text) for line in lines] == [
        ("stderr" if s == 2 else "stdout", text) for s, text in said
    ]
    assert {line.at for line in lines} <= {STAMP.decode()}


def test_pieces_of_a_long_line_are_joined_and_the_other_stream_may_come_between() -> None:
    data = (
        frame(1, STAMP + b" " + b"a" * 16384) + frame(2, STAMP + b" err\n") + frame(1, STAMP + b" " + b"b" * 10 + b"\n")
    )
    assert [(line.stream, line.text) for line in split(data, [])] == [
        ("stderr", "err"),
        ("stdout", "a" * 16384 + "b" * 10),
    ]


def test_a_line_without_end_is_handed_on_in_pieces() -> None:
    data = frame(1, STAMP + b" " + b"a" * 16384) * 5
    texts = [line.text for line in split(data, [])]
    assert "".join(texts) == "a" * 16384 * 5
    assert max(map(len, texts)) <= MAX_LINE_BYTES + 16384


def test_bytes_that_are_no_text_and_a_line_that_never_ended_are_shown() -> None:
    assert [line.text for line in split(frame(1, STAMP + b" \xff\xfe") + frame(2, b""), [])] == ["\ufffd\ufffd", ""]


async def of(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece


async def test_lines_of_json_are_whole_wherever_the_pieces_end() -> None:
    assert [line async for line in json_lines(of(b'{"a"', b':1}\r\n{"b":2}\n\n{"c', b'":3}'))] == [
        b'{"a":1}\r',
        b'{"b":2}',
        b'{"c":3}',
    ]


def test_the_progress_of_a_pull_adds_up_and_never_runs_backwards() -> None:
    progress, seen = PullProgress(), []
    for status, layer, current in [
        ("Pulling from web", "v1", 0),
        ("Downloading", "a", 10),
        ("Downloading", "b", 20),
        ("Download complete", "a", 0),
        ("Extracting", "a", 5),
        ("Downloading", "b", 90),
        ("Pull complete", "a", 0),
        ("Download complete", "b", 0),
        ("Extracting", "b", 1),
    ]:
        progress.take(
            {"status": status, "id": layer, "progressDetail": {"current": current, "total": 100} if current else {}}
        )
        seen.append(progress.bytes)
    assert [done for done, _ in seen] == [0, 10, 30, 120, 120, 190, 190, 200, 200]
    assert seen[-1] == (200, 200)
    assert progress.status == "extracting"


def test_an_error_in_mid_stream_is_found_in_every_shape() -> None:
    assert stream_error(b'{"errorDetail": {"message": "denied"}, "error": "denied"}')[1] == "denied"
    assert stream_error(b'{"error": "denied"}')[1] == "denied"
    assert stream_error(b'{"errorDetail": {}, "error": "denied"}')[1] == "denied"
    assert stream_error(b'{"status": "Downloading"}')[1] == ""


# ------------------------------------------------------------------------ errors


def said(status: int, text: str) -> aiodocker.DockerError:
    return aiodocker.DockerError(status, text)


@pytest.mark.parametrize(
    ("error", "code", "is_retryable"),
    [
        (said(500, "driver failed ...: Bind for 127.0.0.1:80 failed: port is already allocated"), "port_in_use", False),
        (said(500, "listen tcp4 100.64.0.1:80: bind: cannot assign requested address"), "address_missing", True),
        (said(409, 'Conflict. The container name "/x" is already in use by container "f"'), "name_taken", False),
        (said(500, "creating container storage: the container name x is already in use by f"), "name_taken", False),
        (said(404, "No such container: x"), "container_missing", False),
        (said(404, "No such image: web:1"), "image_missing", True),
        (said(404, "network mcpnet not found"), "network_missing", True),
        (said(409, "removal of container x is already in progress"), "removal_in_progress", True),
        (said(500, "write /var/lib/docker/x: no space left on device"), "no_space", True),
        (said(400, 'exec: "nope": executable file not found in $PATH: unknown'), "bad_command", False),
        (said(500, "something nobody has ever seen"), "engine_error", True),
        (said(400, "something nobody has ever seen"), "bad_request", False),
        (
            said(900, "Cannot connect to Docker Engine via unix:///x [Cannot connect [Connection refused]]"),
            "engine_down",
            True,
        ),
        (said(900, "Cannot connect to Docker Engine via unix:///x [Permission denied]"), "engine_denied", False),
        (TimeoutError(), "engine_frozen", True),
        (aiohttp.ClientPayloadError("Response payload is not completed"), "engine_down", True),
        (aiohttp.ServerDisconnectedError(), "engine_down", True),
        (ConnectionResetError(104, "Connection reset by peer"), "engine_down", True),
        (json.JSONDecodeError("Expecting value", "x", 0), "engine_error", False),
    ],
)
def test_every_shape_of_error_has_a_code(error: Exception, code: str, is_retryable: bool) -> None:  # noqa: FBT001
    told = translate(error, "start container x", 10.0)
    assert (told.code, told.retryable) == (code, is_retryable)
    assert told.reason.startswith("cannot start container x: ")
    assert "\n" not in told.reason


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("manifest for r.example/web:9 not found: manifest unknown: manifest unknown", "image_missing"),
        ("pull access denied for web, repository does not exist or may require 'docker login'", "auth_failed"),
        ('Head "https://r.example/v2/web/manifests/1": unauthorized: authentication required', "auth_failed"),
        ("no matching manifest for linux/arm64/v8 in the manifest list entries", "platform_missing"),
        ('Get "https://r.example/v2/": dial tcp 192.0.2.1:443: i/o timeout', "registry_unreachable"),
        ('Get "https://r.example/v2/": net/http: TLS handshake timeout', "registry_unreachable"),
        ('Get "https://r.example/v2/": http: server gave HTTP response to HTTPS client', "registry_tls"),
        ('Get "https://r.example/v2/": x509: certificate signed by unknown authority', "registry_tls"),
        ("filesystem layer verification failed for digest sha256:1", "image_damaged"),
        ("unexpected EOF", "registry_unreachable"),
        ("write /var/lib/docker/tmp/x: no space left on device", "no_space"),
        ("toomanyrequests: you have reached your pull rate limit", "registry_refused"),
        ("received unexpected HTTP status: 503 Service Unavailable", "registry_unreachable"),
    ],
)
def test_what_a_registry_says_has_a_code_in_the_answer_and_in_mid_stream(text: str, code: str) -> None:
    for status in (500, 404, 0):
        assert translate(said(status, text), "pull r.example/web:1", 90.0, registry=True).code == code


def test_no_secret_is_left_in_an_error() -> None:
    text = 'Get "https://kyle:hunter2@r.example/v2/": unauthorized, sent s3cret'
    told = translate(said(500, text), "pull r.example/web:1", 90.0, ["s3cret"], registry=True)
    assert "hunter2" not in told.reason
    assert "s3cret" not in told.reason
    assert 'https://r.example/v2/"' in told.reason


def test_an_engines_layers_of_words_are_left_out() -> None:
    text = (
        "failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: "
        'error during container init: error mounting "/tmp" to rootfs at "/etc/passwd": mount /tmp:/etc/passwd (via '
        "/proc/self/fd/6), flags: 0x5000: not a directory: unknown: Are you trying to mount a directory onto a file?"
    )
    assert translate(said(400, text), "start container x", 60.0).reason == (
        'cannot start container x: error mounting "/tmp" to rootfs at "/etc/passwd": mount /tmp:/etc/passwd: not a directory'
    )


def test_an_engines_text_is_one_line_and_not_endless() -> None:
    assert clean("a\n  b\tc") == "a b c"
    assert len(clean("x" * 10_000)) == 600
