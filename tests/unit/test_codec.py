"""What comes out of bytes is the message that went in, or one error that says where it is wrong."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import attrs
import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcp.bus.codec import MAX_CONTAINERS, decode, encode, from_plain, open_frame, seal, size_of, to_plain
from mcp.bus.transport import MAX_BODY_BYTES, Frame
from mcp.model import operator_messages as _operator_messages  # noqa: F401 - with it the catalogue is complete
from mcp.model.catalogue import CATALOGUE, Declared
from mcp.model.errors import MalformedMessage
from mcp.model.messages import EngineChanged, Failed, Heartbeat, LogLine, LogLines, Probe, Registered, Resources
from mcp.model.spec import ServiceSpec

KINDS = sorted(CATALOGUE)
COSTLY_S = 1.5
"""Of processor time, on the slowest machine of ours under load; some 5 ms where nothing else runs."""


# ------------------------------------------------------------------ any message


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Return what a field of this type may hold."""
    if attrs.has(kind):
        attrs.resolve_types(kind)
        return st.builds(kind, **{field.name: values(field.type) for field in attrs.fields(kind)})
    if isinstance(kind, UnionType):
        return st.one_of(*[values(each) for each in get_args(kind)])
    inner = get_args(kind)
    match get_origin(kind):
        case origin if origin is tuple:
            return st.lists(values(inner[0]), max_size=2).map(tuple)
        case origin if origin is dict:
            return st.dictionaries(values(inner[0]), values(inner[1]), max_size=2)
        case origin if origin is Literal:
            return st.sampled_from(inner)
    return PLAIN[kind]


PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    int: st.integers(-(2**63), 2**64 - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    type(None): st.none(),
}

MESSAGES = st.sampled_from(KINDS).flatmap(lambda kind: values(CATALOGUE[kind].cls))

RELAXED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@pytest.mark.parametrize("kind", KINDS)
@settings(RELAXED, max_examples=10)
@given(data=st.data())
def test_every_message_comes_back_as_it_was(kind: str, data: st.DataObject) -> None:
    message = data.draw(values(CATALOGUE[kind].cls))
    body = encode(message)
    assert decode(kind, body) == message
    assert size_of(message) == len(body)
    assert from_plain(type(message), to_plain(message)) == message


def is_read_or_refused(read: Callable[[], Any]) -> bool:
    """Say that it gives a message or our one error, whose text is fit for a log."""
    try:
        read()
    except MalformedMessage as error:
        return len(str(error)) < 500 and str(error).isprintable()
    return True


@RELAXED
@given(MESSAGES, st.data())
def test_a_message_that_was_tampered_with_is_read_or_refused_and_nothing_else(
    message: Any, data: st.DataObject
) -> None:
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        piece = data.draw(st.sampled_from(NASTY) | st.binary(max_size=4))
        match data.draw(st.sampled_from(["flip", "cut", "insert", "replace", "repeat"])):
            case "flip" if at < len(body):
                body[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del body[at:]
            case "insert":
                body[at:at] = piece
            case "replace":
                body[at : at + len(piece)] = piece
            case "repeat":
                body[at:at] = body[:at]
    kind = data.draw(st.sampled_from(KINDS))
    for each in (entry_of(message).kind, kind):
        assert is_read_or_refused(partial(decode, each, bytes(body)))


NASTY = (
    b"\xcb" + struct.pack(">d", float("nan")),
    b"\xcb" + struct.pack(">d", float("inf")),
    b"\xd4\x05x",  # an extension type
    b"\xd6\xff\x00\x00\x00\x00",  # a time stamp
    b"\xdf\xff\xff\xff\xff",  # a map of 4 milliard pairs
    b"\xdd\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\x91" * 20,  # nesting
    b"\xc1",  # never used
    b"\xa2\xed\xa0",  # half a character
    b"\xa3\xed\xa0\x80",  # half a surrogate pair
    b"\xc4\x01x",  # bytes
    b"\x81\x01\x01",  # a key that is no string
    b"\x82\xa1a\x01\xa1a\x02",  # a key twice
)


def entry_of(message: Any) -> Declared:
    return next(entry for entry in CATALOGUE.values() if entry.cls is type(message))


@RELAXED
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_and_nothing_else(kind: str, body: bytes) -> None:
    assert is_read_or_refused(lambda: decode(kind, body))


@RELAXED
@given(
    st.dictionaries(
        st.sampled_from(["Mcp-Kind", "Mcp-Op", "Mcp-Frame", "Mcp-Sent", "Mcp-Deadline", "Mcp-Epoch", "Traceparent"]),
        st.text(max_size=30) | st.sampled_from(["probe/1", "probe/²", "probe/999", "final", "1e999", "nan", "٣", "-1"]),
    )
)
def test_any_headers_are_read_or_refused_and_nothing_else(headers: dict[str, str]) -> None:
    assert is_read_or_refused(lambda: open_frame(Frame("mcp.work.orion.probe", encode(Probe()), headers=headers)))


# --------------------------------------------------------------- where it is wrong

SPEC: dict[str, Any] = {"name": "web", "components": [{"name": "web", "image": "web:1", "routes": [{"port": 80}, {}]}]}


def spec(**changes: Any) -> dict[str, Any]:
    component = {"name": "web", "image": "web:1"}
    component.update(changes)
    return {"spec": {"name": "web", "components": [component]}}


@pytest.mark.parametrize(
    ("kind", "plain", "said"),
    [
        (
            "deploy_service",
            spec(routes=[{"port": 80}, {"port": "81"}]),
            "$.spec.components[0].routes[1].port: expected int, got str",
        ),
        ("deploy_service", spec(routes=[{}]), "$.spec.components[0].routes[0].port: is missing"),
        ("deploy_service", spec(env={"A": 1}), "$.spec.components[0].env['A']: expected str, got int"),
        ("deploy_service", spec(cmd="ls"), "$.spec.components[0].cmd: expected array, got str"),
        ("deploy_service", spec(health=[]), "$.spec.components[0].health: expected map, got array"),
        ("deploy_service", {"spec": None}, "$.spec: expected map, got nil"),
        ("deploy_service", [], "$: expected map, got array"),
        ("deploy_service", {}, "$.spec: is missing"),
        ("registered", {"epoch": "7"}, "$.epoch: expected int, got str"),
        ("registered", {"epoch": True}, "$.epoch: expected int, got bool"),
        ("registered", {"epoch": 7.0}, "$.epoch: expected int, got float"),
        ("registered", {"epoch": 7, "heartbeat_s": True}, "$.heartbeat_s: expected float, got bool"),
        ("registered", {"epoch": 7, "heartbeat_s": float("nan")}, "$.heartbeat_s: expected a finite number"),
        ("registered", {"epoch": 7, "heartbeat_s": float("-inf")}, "$.heartbeat_s: expected a finite number"),
        ("registered", {"epoch": 7, "remove": [b"x"]}, "$.remove[0]: expected str, got bytes"),
        ("done", {"changed": 1}, "$.changed: expected bool, got int"),
        ("done", {"detail": None}, "$.detail: expected str, got nil"),
        (
            "engine_changed",
            {"incarnation": "a", "engine": "on"},
            "$.engine: expected one of up, down, frozen, none, got 'on'",
        ),
        ("no_such", {}, "$: unknown kind 'no_such'"),
    ],
)
def test_an_error_names_the_path_and_what_was_expected(kind: str, plain: Any, said: str) -> None:
    with pytest.raises(MalformedMessage) as caught:
        decode(kind, msgpack.packb(plain))
    assert str(caught.value) == said
    assert caught.value.path == said.partition(": ")[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not msgpack"),
        (b"\x80\x80", "not msgpack"),
        (b"\x81\xa5epoch", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\xa2\xed\xa0", "not msgpack"),
        (b"\xdf\xff\xff\xff\xff", "not msgpack"),
        (b"\x81\x01\x01", "expected string key, got int"),
        (b"\x82\xa5epoch\x01\xa5epoch\x02", "a key stands twice in one map"),
        (b"\x81\xa1x\xd4\x05x", "extension type 5"),
        (b"\x81\xa5epoch\xd6\xff\x00\x00\x00\x00", "expected int, got Timestamp"),
        (b"\x81\xa1x" + b"\x91" * 16 + b"\x01", "more than 16 levels of nesting"),
        (b"\x91" * 100_000, "not msgpack"),
        (
            b"\x81\xa1x\xdd" + struct.pack(">I", MAX_CONTAINERS) + b"\x80" * MAX_CONTAINERS,
            "more than 10000 arrays and maps",
        ),
        (msgpack.packb({"epoch": 1, "x": "y" * MAX_BODY_BYTES}), "the limit is 131072"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_msgpack_takes_and_we_do_not(body: bytes, said: str) -> None:
    with pytest.raises(MalformedMessage, match=said):
        decode("registered", body)


def test_sixteen_levels_are_fine() -> None:
    assert decode("registered", b"\x82\xa5epoch\x07\xa1x" + b"\x91" * 15 + b"\x01").epoch == 7


def test_a_key_that_is_not_known_is_ignored_so_that_an_older_node_reads_a_newer_message() -> None:
    assert decode("done", msgpack.packb({"detail": "x", "since": {"when": [1.5]}})).detail == "x"


def test_a_whole_number_is_fine_for_a_float_and_becomes_one() -> None:
    answer = decode("registered", msgpack.packb({"epoch": 7, "heartbeat_s": 5}))
    assert isinstance(answer.heartbeat_s, float)


def test_a_part_of_a_message_is_built_with_the_same_rules() -> None:
    with pytest.raises(MalformedMessage, match=r"\$\.components\[0\]\.routes\[1\]\.port: is missing"):
        from_plain(ServiceSpec, SPEC)


def test_half_a_surrogate_pair_travels_as_a_question_mark() -> None:
    line = LogLine(at="", component="", container="", stream="stdout", text="caf\udce9")
    lines = LogLines(stream="s", sequence=1, lines=(line,))
    assert decode("log_lines", encode(lines)).lines[0].text == "caf?"


def test_a_number_of_more_than_64_bits_is_refused_by_whoever_says_it() -> None:
    with pytest.raises(MalformedMessage, match="64 bits"):
        encode(Registered(epoch=2**64))


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("registered", b"\x81\xa6remove\xdd" + struct.pack(">I", 131_000) + b"\x01" * 131_000),
        ("registered", b"\x81\xa6remove\xdd" + struct.pack(">I", 131_000) + b"\xa0" * 131_000),
        ("registered", b"\x80" * 131_000),
        ("registered", b"\x81\xa1x\xdd" + struct.pack(">I", 131_000) + b"\x90" * 131_000),
        ("registered", b"\x81\xa1x" * 40_000),
        ("log_lines", msgpack.packb({"stream": "s", "sequence": 1, "lines": [{"at": "x"}] * 9_900})),
        ("inventory", msgpack.packb({"facts": {}, "services": [{"containers": [{}] * 99}] * 99})),
    ],
    ids=range(7),
)
def test_no_body_costs_more_than_a_moment(kind: str, body: bytes) -> None:
    from_plain(Registered, {"epoch": 1})
    began = time.process_time()
    with pytest.raises(MalformedMessage):
        decode(kind, body[:MAX_BODY_BYTES])
    assert time.process_time() - began < COSTLY_S


# ------------------------------------------------------------------------ letters


def test_a_letter_says_what_was_sealed() -> None:
    frame = seal(
        "mcp.work.orion.probe",
        Probe(),
        op="4f2c9a1b",
        reply="mcp.node.orion.reply.4f2c9a1b-1-1",
        sent_s=1790000000.125,
        deadline_s=1790000005.125,
        epoch=1790000000123,
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    letter = open_frame(frame)
    assert letter.message == Probe()
    assert (letter.kind, letter.op, letter.frame, letter.subject) == ("probe", "4f2c9a1b", "", "mcp.work.orion.probe")
    assert (letter.sent_s, letter.deadline_s, letter.epoch) == (1790000000.125, 1790000005.125, 1790000000123)
    assert letter.reply == "mcp.node.orion.reply.4f2c9a1b-1-1"
    assert letter.traceparent.startswith("00-0af7")


def test_headers_are_text_that_a_person_reads_and_empty_ones_are_left_out() -> None:
    frame = seal(
        "mcp.node.orion.event.engine_changed", EngineChanged(incarnation="a", engine="up"), message_id="orion-1"
    )
    assert frame.headers == {
        "Mcp-Kind": "engine_changed/1",
        "Nats-Msg-Id": "orion-1",
        "Content-Type": "application/msgpack",
    }


@pytest.mark.parametrize("op", ["a.b", "a b", "a>", "*", "a\r\nX: y", "é", "x" * 65])
def test_what_could_not_stand_in_a_subject_is_no_operations_id(op: str) -> None:
    with pytest.raises(MalformedMessage, match="operation's id"):
        seal("mcp.work.orion.probe", Probe(), op=op)
    sealed = seal("mcp.work.orion.probe", Probe())
    with pytest.raises(MalformedMessage, match="Mcp-Op"):
        open_frame(attrs.evolve(sealed, headers={**sealed.headers, "Mcp-Op": op}))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("Mcp-Kind", "", "has no Mcp-Kind"),
        ("Mcp-Kind", "probe", "has no Mcp-Kind"),
        ("Mcp-Kind", "probe/²", "has no Mcp-Kind"),
        ("Mcp-Kind", "probe/" + "9" * 5000, "has no Mcp-Kind"),
        ("Mcp-Kind", "probe/2", r"probe/2 is newer than ours \(1\)"),
        ("Mcp-Kind", "no_such/1", "unknown kind 'no_such'"),
        ("Mcp-Frame", "last", "unknown frame 'last'"),
        ("Mcp-Sent", "nan", "header Mcp-Sent is no time"),
        ("Mcp-Deadline", "tomorrow", "header Mcp-Deadline is no time"),
        ("Mcp-Epoch", "-1", "header Mcp-Epoch is no whole number"),
        ("Mcp-Epoch", "٣", "header Mcp-Epoch is no whole number"),
    ],
)
def test_a_header_that_is_not_what_it_should_be_is_named(name: str, text: str, said: str) -> None:
    sealed = seal("mcp.work.orion.probe", Probe())
    with pytest.raises(MalformedMessage, match=said):
        open_frame(attrs.evolve(sealed, headers={**sealed.headers, name: text}))


def test_a_message_is_not_read_as_one_of_another_kind() -> None:
    sealed = seal("mcp.node.orion.reply.x", Failed(code="x", reason="y"), frame="error")
    with pytest.raises(MalformedMessage):
        open_frame(attrs.evolve(sealed, headers={**sealed.headers, "Mcp-Kind": "registered/1"}))


def test_a_heartbeat_of_a_kilobyte_is_decoded_many_times_a_second() -> None:
    beat = Heartbeat(
        incarnation="4f2c9a1b",
        sequence=123,
        engine="up",
        resources=Resources(
            cpu_cores=8.0, memory_bytes=1 << 34, memory_free_bytes=1 << 33, disk_bytes=1 << 40, disk_free_bytes=1 << 39
        ),
        containers=12,
        inventory_version=77,
        clock_s=1790000000.25,
        problems=("something is rather wrong here, somebody should have a look at it before long",) * 11,
    )
    body = encode(beat)
    assert 1000 < len(body) < 1200
    decode("heartbeat", body)
    began = time.process_time()
    for _ in range(2000):
        decode("heartbeat", body)
    rate = 2000 / (time.process_time() - began)
    print(f"{rate:.0f} heartbeats a second")
    assert rate > 5000  # 22,700 to 28,100 on an idle machine (docs/bus.md, measured limits)
