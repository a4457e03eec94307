"""The commands against a master that answers from a table: real links, frames and codec on the in-memory bus."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from mcp.adapters.clock import SystemClock
from mcp.bus.links import MasterLink, Request
from mcp.bus.memory import MemoryBroker
from mcp.bus.transport import Transport
from mcp.cli import run as cli
from mcp.cli import session
from mcp.model.errors import BusUnreachable, NotPermitted
from mcp.model.messages import ContainerLog, ContainerState, Done, Failed, LogLine, LogLines
from mcp.model.operator_messages import (
    CancelOperation,
    DeployService,
    Evidence,
    ExplainNode,
    FleetStatus,
    FollowLogs,
    FollowOperation,
    GetStatus,
    GrantReaderCredit,
    Invited,
    InviteNode,
    ListOperations,
    LogsEnded,
    NodeEvidence,
    NodeRow,
    OperationAccepted,
    OperationEnded,
    OperationList,
    OperationProgress,
    OperationRow,
    PlacementRow,
    Plan,
    PlanService,
    RemoveNode,
    RestartService,
    RouteRow,
    ServiceRow,
    StartService,
    Step,
    StopService,
    UndeployService,
)

WEB = """\
name = "web"
[[components]]
name = "web"
image = "localhost/web:v1"
"""
CONFIG = """\
[bus]
address = "127.0.0.1"
port = 4222
ca_pem = "none"
[operator]
name = "kyle"
seed = "none"
"""

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
"""What a hostile container would print to take over a terminal."""

CONTAINER = ContainerState(
    service="web",
    component="web",
    name="mcp.web.g1",
    container_id="abc",
    image="localhost/web:v1",
    state="running",
    health="healthy",
    started_at="2026-01-01T00:00:00Z",
    spec_hash="aaaaaaaaaaaa",
    generation=1,
    ports={"": "127.0.0.1:12345"},
)
ROUTE = RouteRow(hostname="web.svc", public=False, mode="l7", listener=":8443", node="orion", backend="127.0.0.1:12345")
SERVICE = ServiceRow(
    name="web",
    tier="worker",
    node="orion",
    state="running",
    spec_hash="aaaaaaaaaaaa",
    generation=1,
    version="v1",
    components=(CONTAINER,),
    routes=(ROUTE,),
    seen_s=4.2,
    source="heartbeat",
)
ORION = NodeRow(
    name="orion",
    role="worker",
    address="100.64.0.2",
    arch="amd64",
    version="0.1",
    incarnation="beef",
    health="healthy",
    health_since="2026-01-01T00:00:00Z",
    last_seen_s=4.2,
    last_seen_by="heartbeat",
    engine="up",
    engine_version="20.10",
    containers=1,
    cpu_cores=4.0,
    cpu_load=0.5,
    memory_bytes=8 << 30,
    memory_free_bytes=6 << 30,
    disk_free_bytes=5 << 30,
)
NEVER = NodeRow(name="ghost", role="worker", health="unknown", problems=(f"ghost: never heard {ESCAPE}",))
STATUS = FleetStatus(master="rift", epoch=7, services=(SERVICE,), nodes=(ORION, NEVER), problems=(f"bad {ESCAPE}",))
STEP = Step(step="run", node="orion", state="done", seconds=0.4, detail=f"generation 1 {ESCAPE}")
ENDED = OperationEnded(
    op="4f2c",
    service="web",
    kind="deploy",
    node="orion",
    outcome="deployed",
    steps=(STEP,),
    seconds=1.2,
    warnings=("careful",),
)
ROW = OperationRow(
    op="4f2c", service="web", kind="deploy", node="orion", operator="kyle", state="running", steps=(STEP,)
)
PLAN = Plan(
    service="web",
    changes=True,
    world="1a2b3c4d",
    node="orion",
    steps=(Step(step="pull", node="orion", state="waiting", detail="localhost/web:v1"),),
    placement=(
        PlacementRow(node="orion", fits=True, score=1.0),
        PlacementRow(node="svc", fits=False, reasons=("is an edge node and runs no containers",)),
    ),
    differences=("components[0].image: a -> b",),
)

Answer = Callable[[Request], Awaitable[None]]


class Master:
    """Answers each kind of message as the test says; everything it hears is kept."""

    def __init__(self) -> None:
        self.answers: dict[type, Answer] = {}
        self.heard: list[Any] = []
        self.is_there = True
        self.refuses: Exception | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._links: list[MasterLink] = []
        self.transport: Transport | None = None

    def finally_says(self, kind: type, *messages: Any) -> None:
        """Answer with these frames; the last one is final, or an error."""

        async def answer(request: Request) -> None:
            for message in messages[:-1]:
                await (request.accepted if isinstance(message, OperationAccepted) else request.progress)(message)
            last = messages[-1]
            await (request.failed if isinstance(last, Failed) else request.final)(last)

        self.answers[kind] = answer

    async def connect(self, *_: Any, **__: Any) -> Transport:
        """Take the place of nats_bus.connect: a broker with us on it, in the command's own loop."""
        if self.refuses:
            raise self.refuses
        broker = MemoryBroker()
        operator = broker.connect("operator", "kyle")
        if self.is_there:
            link = MasterLink(broker.connect("master"), broker.connect("answers"), SystemClock(), 7)
            await link.start(self._on_command, self._on_command)
            self._links.append(link)
        self.transport = operator
        return operator

    def _on_command(self, request: Request) -> None:
        self.heard.append(request.message)
        answer = self.answers.get(type(request.message))
        if answer is not None:
            task: asyncio.Task[None] = asyncio.ensure_future(_run(answer(request)))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)


async def _run(work: Awaitable[None]) -> None:
    await work


@pytest.fixture
def master(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Master:
    folder = tmp_path / "mcp"
    (folder / "services").mkdir(parents=True)
    (folder / "mcp.toml").write_text(CONFIG)
    (folder / "services" / "web.toml").write_text(WEB)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    made = Master()
    monkeypatch.setattr(session, "connect", made.connect)
    made.finally_says(GetStatus, STATUS)
    made.finally_says(
        ExplainNode,
        NodeEvidence(
            node=ORION,
            explanation="orion is healthy: it beats",
            evidence=(
                Evidence(at="2026-01-01T00:00:00Z", age_s=4.0, sign="BEAT", health="healthy", detail=f"x{ESCAPE}"),
            ),
        ),
    )
    made.finally_says(ListOperations, OperationList(operations=(ROW,)))
    made.finally_says(FollowOperation, ENDED)
    made.finally_says(CancelOperation, Done(detail="4f2c is being undone"))
    made.finally_says(InviteNode, Invited(node="orion", role="worker", token="mcpj1_x", valid_s=300.0))
    made.finally_says(RemoveNode, Done(detail="orion is removed"))
    made.finally_says(PlanService, OperationProgress(op="p"), PLAN)
    for kind in (DeployService, UndeployService, StopService, StartService, RestartService):
        made.finally_says(
            kind,
            OperationAccepted(op="4f2c", service="web", kind="deploy"),
            OperationProgress(op="4f2c"),
            OperationProgress(op="4f2c", step=STEP),
            ENDED,
        )
    return made


LOOKING = (
    ("status",),
    ("status", "web"),
    ("ps",),
    ("ps", "--node", "orion"),
    ("node", "list"),
    ("node", "show", "orion"),
    ("node", "why", "orion"),
    ("op", "list"),
    ("op", "show", "4f2c"),
    ("op", "show", "4f2c", "--follow"),
)
CHANGING = (
    ("deploy", "web"),
    ("undeploy", "web"),
    ("start", "web"),
    ("stop", "web"),
    ("restart", "web"),
    ("op", "cancel", "4f2c"),
    ("node", "invite", "orion"),
    ("node", "remove", "orion"),
)


@pytest.mark.parametrize("args", LOOKING + CHANGING, ids=" ".join)
def test_a_command_prints_its_result_and_never_an_escape_code_of_somebody_else(
    args: tuple[str, ...], master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(args) == 0
    said = capsys.readouterr()
    assert said.out.strip()
    assert "\x1b" not in said.out + said.err
    assert "\x07" not in said.out + said.err


@pytest.mark.parametrize("args", LOOKING + CHANGING, ids=" ".join)
@pytest.mark.parametrize("where", ["before", "after"])
def test_json_is_one_document_wherever_the_option_stands(
    args: tuple[str, ...], where: str, master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--json", *args) if where == "before" else (*args, "--json")
    assert cli.run(words) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)


def asked(master: Master, capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> Any:
    assert cli.run((*args, "--json")) == code
    return json.loads(capsys.readouterr().out)


def test_the_keys_of_the_contract_are_there(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = asked(master, capsys, "node", "list")["nodes"]
    assert set(nodes[0]) >= {
        "name", "role", "address", "arch", "version", "incarnation", "health", "health_since", "last_seen_s", "containers",
        "cpu_cores", "memory_bytes", "memory_free_bytes", "disk_free_bytes", "problems",
    }  # fmt: skip
    containers = asked(master, capsys, "ps")["containers"]
    assert set(containers[0]) >= {
        "service", "component", "node", "container", "image", "state", "health", "started_at", "spec_hash", "generation",
    }  # fmt: skip
    assert (containers[0]["container"], containers[0]["node"]) == ("mcp.web.g1", "orion")
    status = asked(master, capsys, "status")
    assert set(status) >= {"services", "nodes", "problems"}
    assert set(status["services"][0]) >= {
        "name", "tier", "node", "state", "spec_hash", "generation", "components", "routes", "problems",
    }  # fmt: skip
    assert set(status["services"][0]["routes"][0]) >= {"hostname", "public", "mode", "listener", "node", "certificate"}
    plan = asked(master, capsys, "plan", "web", code=10)
    assert set(plan) >= {"changes", "world", "steps", "placement"}
    assert set(plan["placement"][0]) == {"node", "fits", "score", "reasons"}
    result = asked(master, capsys, "deploy", "web")["results"][0]
    assert set(result) >= {"op", "service", "node", "outcome", "reason", "steps"}
    assert set(result["steps"][0]) == {"step", "node", "state", "seconds", "detail"}


def test_status_puts_its_parts_together(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    master.finally_says(
        GetStatus,
        FleetStatus(master="rift", services=(SERVICE,), part=1, parts=2),
        FleetStatus(master="rift", nodes=(ORION,), part=2, parts=2),
    )
    status = asked(master, capsys, "status")
    assert (len(status["services"]), len(status["nodes"])) == (1, 1)


# --------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("outcome", "code"),
    [("deployed", 0), ("unchanged", 0), ("undone", 1), ("failed", 1), ("refused", 3), ("unknown", 5)],
)
def test_the_outcome_decides_the_exit_code(
    outcome: Any, code: int, master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    log = ContainerLog(component="web", container="mcp.web.g2", exit_code=1, lines=("no database", ESCAPE))
    master.finally_says(
        DeployService,
        OperationAccepted(op="4f2c", service="web", kind="deploy"),
        OperationEnded(
            op="4f2c",
            service="web",
            kind="deploy",
            outcome=outcome,
            reason="it exited",
            logs=(log,),
            leftovers=("a thing",),
        ),
    )
    assert cli.run(("deploy", "web")) == code
    said = capsys.readouterr()
    assert "a thing" in said.err
    assert "\x1b" not in said.err
    if code in (1, 5):
        assert "no database" in said.err
    result = asked(master, capsys, "deploy", "web", code=code)
    assert result["results"][0]["outcome"] == outcome
    assert ("error" in result) == (code != 0)


@pytest.mark.parametrize("args", [("deploy", "web"), ("status",), ("node", "list"), ("plan", "web"), ("stop", "web")])
def test_no_bus_no_master_and_a_wrong_credential_are_told_apart(
    args: tuple[str, ...], master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for refuses, is_there, code, name in (
        (
            BusUnreachable("cannot connect to the bus at 127.0.0.1:4222: nothing listens there"),
            True,
            4,
            "bus_unreachable",
        ),
        (None, False, 4, "no_master"),
        (NotPermitted("does not accept the credential", subject=""), True, 3, "wrong_credential"),
    ):
        master.refuses, master.is_there = refuses, is_there
        assert cli.run(args) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert 2 <= len(said.err.strip().splitlines()) <= 3, "what, why, and the next thing to do"
        texts.append(said.err)
        assert asked(master, capsys, *args, code=code)["error"]["code"] == name
    assert len(set(texts)) == 3


def test_a_busy_service_is_refused_with_who_holds_it(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    master.finally_says(DeployService, Failed(code="busy", reason="operation 4f2c by alice holds it", hint="wait"))
    assert cli.run(("deploy", "web")) == 3
    assert "by alice" in capsys.readouterr().err
    told = asked(master, capsys, "deploy", "web", code=3)
    assert told["results"][0]["outcome"] == "refused"
    assert told["error"]["code"] == "busy"


def test_a_bad_definition_sends_nothing(master: Master, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text('name = "web"\nnetwerk = "x"\n')
    assert cli.run(("deploy", "web", "./bad.toml")) == 2
    assert "bad.toml:2" in capsys.readouterr().err
    assert master.heard == []


def test_several_services_are_deployed_in_order_and_the_first_failure_gives_the_code(
    master: Master, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "api.toml").write_text(WEB.replace('name = "web"', 'name = "api"'))

    async def answer(request: Request) -> None:
        name = request.message.spec.name
        outcome: Any = "undone" if name == "api" else "deployed"
        await request.final(OperationEnded(op=name, service=name, kind="deploy", outcome=outcome, reason="no"))

    master.answers[DeployService] = answer
    told = asked(master, capsys, "deploy", "api.toml", "web", code=1)
    assert [(row["service"], row["outcome"]) for row in told["results"]] == [("api", "undone"), ("web", "deployed")]


def test_a_plan_that_nobody_can_take_exits_3_and_one_without_changes_0(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    master.finally_says(
        PlanService,
        Plan(
            service="web",
            changes=False,
            world="w",
            can_place=False,
            reason="cannot place web: no node fits\n  orion  memory",
            hint="Free memory.",
        ),
    )
    assert cli.run(("plan", "web")) == 3
    assert "  orion  memory" in capsys.readouterr().err
    master.finally_says(PlanService, Plan(service="web", changes=False, world="w", node="orion"))
    assert cli.run(("plan", "web")) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_plan_ends_with_the_command_that_carries_it_out(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(("plan", "web", "--node", "orion")) == 10
    said = capsys.readouterr().out
    assert "mcp deploy web --node orion --world 1a2b3c4d" in said
    assert "is an edge node and runs no containers" in said


def test_what_a_viewer_may_not_do_is_refused(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    async def deny(request: Request) -> None:
        assert master.transport is not None
        master.transport.on_denied("publish", "mcp.cmd.kyle.stop_service")

    master.answers[StopService] = deny
    assert cli.run(("stop", "web")) == 3
    assert "may not do this" in capsys.readouterr().err


# ------------------------------------------------------------ when the master goes


def test_a_master_that_is_still_learning_is_asked_again_without_a_word(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    async def answer(request: Request) -> None:
        calls.append(1)
        if len(calls) < 3:
            await request.failed(Failed(code="still_learning", reason="still asking"))
        else:
            await request.final(ENDED)

    master.answers[DeployService] = answer
    assert cli.run(("deploy", "web")) == 0
    assert "still asking" not in capsys.readouterr().err


def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the waits for a master that went away be short."""
    from mcp.cli import operation

    monkeypatch.setattr(operation, "SILENCE_S", 0.1)
    monkeypatch.setattr(operation, "LOST_S", 0.4)
    monkeypatch.setattr(operation, "FORGOTTEN_S", 0.1)
    monkeypatch.setattr(operation, "AGAIN_S", 0.01)


async def accept_and_fall_silent(request: Request) -> None:
    await request.accepted(OperationAccepted(op="4f2c", service="web", kind="deploy"))
    await request.progress(OperationProgress(op="4f2c", step=STEP))


def test_an_operation_whose_master_falls_silent_is_asked_for_and_found(
    master: Master, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    master.answers[DeployService] = accept_and_fall_silent
    assert cli.run(("deploy", "web")) == 0
    assert FollowOperation(op="4f2c", wait=True) in master.heard


def test_an_operation_that_nobody_can_tell_of_ends_unknown_with_its_id(
    master: Master, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick(monkeypatch)
    master.answers[DeployService] = accept_and_fall_silent
    master.finally_says(FollowOperation, Failed(code="no_such_operation", reason="there is no operation 4f2c"))
    assert cli.run(("deploy", "web")) == 5
    assert "mcp op show 4f2c" in capsys.readouterr().err
    del master.answers[FollowOperation]
    told = asked(master, capsys, "deploy", "web", code=5)
    assert told["results"][0] | {"op": "4f2c", "outcome": "unknown"} == told["results"][0]
    assert told["results"][0]["steps"][0]["step"] == "run"


def test_a_time_limit_ends_the_waiting_and_not_the_operation(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    master.answers[DeployService] = accept_and_fall_silent
    told = asked(master, capsys, "deploy", "web", "--timeout", "0.2", code=5)
    assert told["results"][0]["op"] == "4f2c"


def test_detached_ends_when_the_master_has_taken_it_on(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    master.answers[DeployService] = accept_and_fall_silent
    assert cli.run(("deploy", "web", "--detach")) == 0
    assert "op 4f2c" in capsys.readouterr().out
    assert asked(master, capsys, "deploy", "web", "--detach")["results"][0]["op"] == "4f2c"


def test_a_question_without_an_answer_started_nothing(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    del master.answers[GetStatus]
    assert cli.run(("status", "--timeout", "0.1")) == 4
    assert "nothing was started" in capsys.readouterr().err


# --------------------------------------------------------------------------- logs


def line(at: str, text: str, component: str = "web") -> LogLine:
    return LogLine(at=at, component=component, container=f"mcp.{component}.g1", stream="stdout", text=text)


def two_components() -> FleetStatus:
    other = ContainerState(
        service="web", component="db", name="mcp.web.db.g1", image="db:1", state="running", spec_hash="a", generation=1
    )
    row = ServiceRow(
        name="web",
        tier="worker",
        node="orion",
        state="running",
        spec_hash="a",
        generation=1,
        components=(CONTAINER, other),
    )
    return FleetStatus(master="rift", services=(row,))


def test_logs_are_merged_by_their_time_stamps_with_the_component_in_front(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    master.finally_says(GetStatus, two_components())
    master.finally_says(
        FollowLogs,
        LogLines(
            stream="s",
            sequence=1,
            lines=(line("2026-01-01T00:00:01Z", "one"), line("2026-01-01T00:00:03Z", f"three{ESCAPE}")),
        ),
        LogLines(stream="s", sequence=2, lines=(line("2026-01-01T00:00:01.5Z", "two", "db"),)),
        LogsEnded(notes=("web: exited with code 3",)),
    )
    assert cli.run(("logs", "web", "-n", "5", "--since", "10m")) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == ["web | one", "db | two", "web | three\\x1b]0;owned\\x07\\x1b[31m"]
    assert "exited with code 3" in said.err
    asked_for = next(message for message in master.heard if isinstance(message, FollowLogs))
    assert (asked_for.tail, asked_for.since_s, asked_for.follow) == (5, 600.0, False)


def test_logs_as_json_are_one_object_per_line(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    master.finally_says(
        FollowLogs,
        LogLines(stream="s", sequence=1, node="orion", lines=(line("2026-01-01T00:00:01Z", "one"),)),
        LogsEnded(),
    )
    assert cli.run(("logs", "web", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "one"


def test_a_reader_pays_for_what_it_has_printed(master: Master, capsys: pytest.CaptureFixture[str]) -> None:
    paid = asyncio.Event()

    async def answer(request: Request) -> None:
        for i in range(16):
            await request.progress(LogLines(stream="s", sequence=i, lines=(line("2026-01-01T00:00:01Z", str(i)),)))
        await paid.wait()
        await request.final(LogsEnded())

    async def feed(request: Request) -> None:
        paid.set()
        await request.final(Done())

    master.answers[FollowLogs] = answer
    master.answers[GrantReaderCredit] = feed
    assert cli.run(("logs", "web", "-f")) == 0
    assert [m.credit for m in master.heard if isinstance(m, GrantReaderCredit)] == [16]
    assert capsys.readouterr().out.split() == [str(i) for i in range(16)]


def test_a_lost_node_makes_the_logs_incomplete_and_the_exit_code_says_so(
    master: Master, capsys: pytest.CaptureFixture[str]
) -> None:
    master.finally_says(FollowLogs, LogsEnded(notes=("lost orion",)))
    assert cli.run(("logs", "web")) == 4
    assert "lost orion" in capsys.readouterr().err
