"""The programs that stay: mcp-master and mcp-agent; and how a node joins. They load no click: an agent shall be small."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mcp.cli.settings import home_folder
from mcp.model.errors import McpError, NobodyListens

if TYPE_CHECKING:
    import argparse

    from mcp.bus.join_token import JoinToken

STOP_PATIENCE_S = 10
"""How long a daemon that was told to stop may take: its goodbye takes a second at most."""

JOIN_EXAMPLE = """\
example:
  mcp-agent join mcpj1_100.64.0.1:4222_...      the line that `mcp node invite NAME` prints
"""


def master() -> NoReturn:
    """Run the master: `mcp-master [--config FILE]`."""
    example = "example:\n  mcp-master --config /srv/mcp/mcp-master.toml\n"
    config = _config_file("mcp-master", "The master: one for each fleet.", example)

    def begin() -> Coroutine[Any, Any, None]:
        from mcp.config.master import load_master
        from mcp.wiring import run_master

        return run_master(load_master(config))

    _leave(_daemon(begin))


def agent() -> NoReturn:
    """Run the agent: `mcp-agent [--config FILE]`; or join a fleet: `mcp-agent join TOKEN`."""
    if sys.argv[1:2] == ["join"]:
        _leave(_guarded(lambda: _join(sys.argv[2:])))
    config = _config_file(
        "mcp-agent",
        "The agent: one for each node. `mcp-agent join TOKEN` makes this machine a node first.",
        "example:\n  mcp-agent --config /srv/mcp/mcp-agent.toml\n  mcp-agent join TOKEN --help\n",
    )

    def begin() -> Coroutine[Any, Any, None]:
        from mcp.config.agent import load_agent
        from mcp.wiring import run_agent

        return run_agent(load_agent(config))

    _leave(_daemon(begin))


def _config_file(name: str, what: str, epilog: str) -> str:
    """Return the configuration that the command line names; what it says otherwise is answered, and ends the program."""
    default = str(home_folder() / f"{name}.toml")
    match sys.argv[1:]:
        case []:
            return default
        case ["--config", file] if not file.startswith("-"):
            return file
    parser = _parser(name, what, epilog)
    parser.add_argument("--config", metavar="FILE", default=default, help="its configuration (default: %(default)s)")
    return str(parser.parse_args().config)


def _parser(name: str, what: str, epilog: str) -> argparse.ArgumentParser:
    import argparse  # it takes 1.1 MiB: an agent that was started as its unit does needs none of it

    return argparse.ArgumentParser(
        prog=name,
        description=what,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


# ------------------------------------------------------------------------ running


def _daemon(begin: Callable[[], Coroutine[Any, Any, None]]) -> int:
    """Run until a signal says stop; stopping in an orderly way is success."""
    _log_to_stderr()

    async def run() -> None:
        task = asyncio.ensure_future(begin())
        loop = asyncio.get_running_loop()

        def stop(patience: int = STOP_PATIENCE_S) -> None:
            """Cancel once a second; whoever does not end in time is ended: a supervisor must not have to wait for it."""
            if patience <= 0:
                logging.getLogger(__name__).error("did not end in time and is ended; services go on")
                os._exit(0)
            if not task.done():
                task.cancel()
                loop.call_later(1.0, stop, patience - 1)

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        await task

    def work() -> int:
        try:
            asyncio.run(run())
        except asyncio.CancelledError:
            return 0
        except BaseExceptionGroup as group:
            ours = group.subgroup(McpError)
            if ours is None:
                raise
            raise _first(ours) from group
        return 0

    return _guarded(work)


def _first(group: BaseExceptionGroup[McpError]) -> McpError:
    for each in group.exceptions:
        return _first(each) if isinstance(each, BaseExceptionGroup) else each
    return McpError("nothing")


def _guarded(work: Callable[[], int]) -> int:
    """Turn whatever happens into one line and an exit code."""
    from mcp.cli import exits

    try:
        return work()
    except McpError as error:
        _say(error.reason, error.hint)
        return exits.code_of(error)
    except KeyboardInterrupt:
        _say("interrupted")
        return exits.INTERRUPTED
    except Exception as error:
        # The last resort: a supervisor starts us again, and its journal gets the reason in one line.
        if os.environ.get("MCP_DEBUG") == "1":
            logging.getLogger(__name__).exception("this is a bug of mcp")
        reason = f"this is a bug of mcp: {type(error).__name__}: {error}"
        _say(reason, "With MCP_DEBUG=1 in the environment it tells where.")
        return exits.FAILED


def _say(reason: str, hint: str = "") -> None:
    sys.stderr.write(reason + "\n" + (hint + "\n" if hint else ""))


def _leave(code: int) -> NoReturn:
    raise SystemExit(code)


def _log_to_stderr() -> None:
    """Info is the operator's story; MCP_LOG=debug shows the wire."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_WithFacts(has_time="JOURNAL_STREAM" not in os.environ))
    level = os.environ.get("MCP_LOG", "info").upper()
    logging.basicConfig(level=level if level in logging.getLevelNamesMapping() else "INFO", handlers=[handler])
    logging.getLogger("asyncio").setLevel("WARNING")


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class _WithFacts(logging.Formatter):
    """Writes the event, then its facts: `node joined node=orion role=worker`."""

    def __init__(self, *, has_time: bool) -> None:
        super().__init__()
        self._has_time = has_time

    def format(self, record: logging.LogRecord) -> str:
        """Return one line (and a traceback, where a bug brought one)."""
        facts = "".join(f" {key}={value}" for key, value in vars(record).items() if key not in _STANDARD)
        when = f"{self.formatTime(record, '%Y-%m-%dT%H:%M:%S')} " if self._has_time else ""
        line = f"{when}{record.levelname.lower()} {record.getMessage()}{facts}"
        return "\n".join([_one_line(line), *([self.formatException(record.exc_info)] if record.exc_info else [])])


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# ------------------------------------------------------------------------ joining


def _join(words: list[str]) -> int:
    parser = _parser("mcp-agent join", "Make this machine a node of a fleet.", JOIN_EXAMPLE)
    parser.add_argument("token", metavar="TOKEN", help="what `mcp node invite NAME` printed")
    parser.add_argument(
        "--home", metavar="DIR", default=str(home_folder()), help="where everything will lie (default: %(default)s)"
    )
    parser.add_argument(
        "--address", default="", metavar="IP", help="this machine's address in the mesh (default: what reaches the bus)"
    )
    parser.add_argument("--arch", default="", help="amd64, arm64 (default: what the machine says)")
    parser.add_argument(
        "--docker-url", default="", metavar="URL", help="the container engine (default: unix:///var/run/docker.sock)"
    )
    parser.add_argument("--no-systemd", action="store_true", help="write no unit; print the command instead")
    args = parser.parse_args(words)
    return asyncio.run(_joined(args))


async def _joined(args: argparse.Namespace) -> int:
    from mcp import __version__
    from mcp.bus.files import write_whole
    from mcp.bus.init import agent_toml
    from mcp.bus.join_token import parse_token
    from mcp.bus.joining import Newcomer, join
    from mcp.cli import units
    from mcp.cli.init import agent_tables, check_mesh_address
    from mcp.cli.output import Output
    from mcp.cli.settings import Settings

    token = parse_token(args.token)
    address = args.address or _own_address(token.address, token.port)
    check_mesh_address(address)
    home = Path(args.home).absolute()
    ca_file = home / "keys" / "bus-ca.pem"
    newcomer = Newcomer(address=address, arch=args.arch or own_arch(), version=__version__)
    made = [folder for folder in (ca_file.parent, home) if not folder.exists()]
    try:
        joined = await join(token, newcomer, key_file=home / "keys" / "agent.nkey", ca_file=ca_file)
    except McpError as error:
        _remove_empty(made)
        if isinstance(error, NobodyListens):
            raise _no_master(token) from error
        raise
    tables = agent_tables(joined.role, args.docker_url)
    if "heartbeat_s" in joined.settings:
        tables["health"] = {"heartbeat_s": float(joined.settings["heartbeat_s"])}  # type: ignore[dict-item]
    text = agent_toml(home, joined.node, joined.role, address, bus=(token.address, token.port), tables=tables)
    if args.arch:
        text = text.replace("[node]\n", f'[node]\narch = "{args.arch}"\n', 1)
    try:
        write_whole(home / "mcp-agent.toml", text)
    except McpError:
        ca_file.unlink(missing_ok=True)  # so that the same line can be run once more
        raise
    out = Output(Settings())
    left = units.set_up(("mcp-agent",), home, has_systemd=not args.no_systemd)
    what = "an edge" if joined.role == "edge" else "a worker"
    out.say(f"This machine is {joined.node}, {what} of the fleet of {joined.master}.")
    for each in left:
        out.say(each)
    out.say(f"\nNext, where you work: mcp node show {joined.node}")
    return 0


def _no_master(token: JoinToken) -> NobodyListens:
    return NobodyListens(
        f"cannot join: no master answers on the bus at {token.address}:{token.port}; nothing was changed",
        hint="Start mcp-master there and run this line again: it stays valid until 5 minutes after it was made.",
        code="no_master",
    )


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that a join made in vain; one that something lies in stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _own_address(host: str, port: int) -> str:
    """Return the address from which this machine reaches the bus; nothing is sent."""
    import socket

    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(where)
            found: str = probe.getsockname()[0]
            return found
    except OSError as error:
        raise McpError(
            f"cannot tell this machine's address in the mesh: {(error.strerror or str(error)).lower()}",
            hint="Is the mesh up? Else give it: --address IP.",
            code="no_address",
        ) from error


def own_arch() -> str:
    """Return this machine's architecture in Docker's words."""
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(machine, machine)


if __name__ == "__main__":
    which = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    {"master": master, "agent": agent}.get(which, agent)()
