"""The one table of lanes: who a subject belongs to, and where an answer may go."""

from __future__ import annotations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from mcp.bus import subjects
from mcp.bus.subjects import grant, is_subject, matches, may_answer, operator_grant, speaker
from mcp.model import operator_messages as _operator_messages  # noqa: F401 - with it the catalogue is complete
from mcp.model.catalogue import CATALOGUE, Lane
from mcp.model.names import is_node_name

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?", fullmatch=True).filter(is_node_name)
ANYTHING = st.text(max_size=40) | st.from_regex(r"[a-zA-Z0-9_.>*-]{0,40}", fullmatch=True)


@pytest.mark.parametrize(
    ("subject", "who"),
    [
        ("mcp.cmd.kyle.get_status", ("cli", "kyle")),
        ("sealed.cmd.kyle.deploy_service", ("cli", "kyle")),
        ("mcp.node.orion.register", ("agent", "orion")),
        ("mcp.node.orion.reply.op-1", ("agent", "orion")),
        ("mcp.join.inv1", ("join", "inv1")),
        ("mcp.cmd.kyle", None),
        ("mcp.cmd.kyle.get_status.x", None),
        ("mcp.cmd.Kyle.get_status", None),
        ("mcp.node.orion", ("agent", "orion")),
        ("mcp.work.orion.probe", None),
        ("mcp.event.x", None),
        ("sealed.node.orion.x", None),
        ("mcp.join.a.b", None),
        ("mcp.join.a b", None),
        ("mcp.join.", None),
        ("_INBOX.cli.kyle.1", None),
        ("", None),
    ],
)
def test_a_subject_tells_who_speaks(subject: str, who: tuple[str, str] | None) -> None:
    assert speaker(subject) == who


@given(NAMES, NAMES)
def test_two_names_never_share_a_lane(one: str, other: str) -> None:
    assume(one != other)
    for role in ("agent", "operator"):
        mine, theirs = grant(role, one), grant(role, other)
        for pattern in mine.publish + mine.subscribe:
            if pattern == "mcp.event.>":
                continue
            inside = pattern.replace(">", "x")
            assert not any(matches(wide, inside) for wide in theirs.publish + theirs.subscribe if wide != "mcp.event.>")


@given(NAMES, ANYTHING)
@example("orion", "_INBOX.agent.orion.")
@example("orion", "_INBOX.agent.orion.>")
@example("orion", "_INBOX.agent.orion.a b")
@example("orion", "_INBOX.agent.orion.a\r\nPUB x 0")
@example("orion", "_INBOX.agent.orionx.1")
@example("orion", "_INBOX.agent.orion")
@example("orion", "mcp.work.svc.probe")
def test_an_answer_may_only_go_to_an_inbox_of_whoever_asked(node: str, reply_to: str) -> None:
    if may_answer(subjects.register(node), reply_to):
        assert reply_to.startswith(f"_INBOX.agent.{node}.")
        assert is_subject(reply_to)
        assert any(matches(pattern, reply_to) for pattern in grant("answers").publish)
        assert any(matches(pattern, reply_to) for pattern in grant("agent", node).subscribe)
    assert may_answer(subjects.register(node), f"_INBOX.agent.{node}.x1")


@given(ANYTHING, ANYTHING)
def test_what_nobody_may_say_is_never_answered(subject: str, reply_to: str) -> None:
    if speaker(subject) is None:
        assert not may_answer(subject, reply_to)


@given(st.text(max_size=30))
@example("a\x0bb")
@example("caf\u00e9")
@example("a..b")
@example(".a")
@example("a.")
@example("")
def test_a_subject_is_visible_ascii_tokens_with_dots_between(text: str) -> None:
    tokens = text.split(".")
    sound = all(token and all("!" <= c <= "~" and c not in "*>" for c in token) for token in tokens)
    assert is_subject(text) == sound


def test_a_subject_has_its_length() -> None:
    assert is_subject("x" * subjects.MAX_LENGTH)
    assert not is_subject("x" * (subjects.MAX_LENGTH + 1))


@pytest.mark.parametrize(
    ("pattern", "subject", "is_match"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("a.*.c", "a.b.c", True),
        ("a.>", "a.b", True),
        ("a.>", "a.b.c", True),
        ("a.>", "a", False),
        (">", "a", True),
        ("_INBOX_a_*.>", "_INBOX_a_b.c", False),  # a wildcard is a whole token
    ],
)
def test_wildcards_match_as_the_server_matches_them(pattern: str, subject: str, is_match: bool) -> None:  # noqa: FBT001
    assert matches(pattern, subject) is is_match


def test_every_message_has_a_lane_that_its_speaker_may_publish_on_and_its_hearer_subscribe_to() -> None:
    for kind, entry in CATALOGUE.items():
        for said_by, heard_by, subject in ways(kind, entry.lane):
            assert any(matches(p, subject) for p in grant(*said_by).publish), subject  # type: ignore[arg-type]
            assert any(matches(p, subject) for p in grant(*heard_by).subscribe), subject  # type: ignore[arg-type]


def ways(kind: str, lane: Lane) -> list[tuple[tuple[str, str], tuple[str, str], str]]:
    orion, kyle, master = ("agent", "orion"), ("operator", "kyle"), ("master", "")
    match lane:
        case Lane.COMMAND:
            return [(kyle, master, subjects.command("kyle", kind, is_sealed=sealed)) for sealed in (False, True)]
        case Lane.JOIN:
            return [(("join", "inv1"), master, subjects.join("inv1"))]
        case Lane.REGISTER:
            return [(orion, master, subjects.register("orion"))]
        case Lane.HEARTBEAT:
            return [(orion, master, subjects.heartbeat("orion"))]
        case Lane.NODE_EVENT:
            return [(orion, master, subjects.node_event("orion", kind))]
        case Lane.LOG:
            return [(orion, master, subjects.log("orion", "s1"))]
        case Lane.WORK:
            return [(master, orion, subjects.work("orion", kind, is_sealed=sealed)) for sealed in (False, True)]
        case Lane.EVENT:
            return [(master, kyle, subjects.event(kind))]
        case Lane.FRAME:
            return [
                (orion, master, subjects.reply("orion", "op-1")),
                (("answers", ""), kyle, subjects.inbox("cli", "kyle") + "1"),
                (("answers", ""), orion, subjects.inbox("agent", "orion") + "1"),
                (("answers", ""), ("join", "inv1"), subjects.inbox("join", "inv1") + "1"),
            ]


def test_the_master_can_say_nothing_that_an_agent_or_an_operator_says() -> None:
    for subject in ("mcp.node.orion.heartbeat", "mcp.node.orion.reply.x", "mcp.cmd.kyle.get_status", "mcp.join.inv1"):
        for role in ("master", "answers"):
            assert not any(matches(pattern, subject) for pattern in grant(role).publish)


def test_what_a_viewer_and_a_deployer_may_send_are_commands_that_exist() -> None:
    commands = {kind for kind, entry in CATALOGUE.items() if entry.lane is Lane.COMMAND}
    assert set(subjects.LOOKING) | set(subjects.DEPLOYING) <= commands
    assert not set(subjects.LOOKING) & set(subjects.DEPLOYING)
    assert "mcp.cmd.eve.deploy_service" not in operator_grant("viewer", "eve").publish
    assert "mcp.cmd.eve.deploy_service" in operator_grant("deployer", "eve").publish
    assert "mcp.cmd.eve.remove_node" not in operator_grant("deployer", "eve").publish
