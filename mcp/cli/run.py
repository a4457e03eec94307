"""Runs one command line and turns whatever happens into a line of text and an exit code; a traceback is never shown."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from mcp.cli import exits
from mcp.cli.app import mcp
from mcp.cli.output import Output, safe
from mcp.cli.settings import Settings
from mcp.model.errors import McpError


def run(args: Sequence[str]) -> int:
    """Run a command line and return its exit code."""
    settings = Settings()
    settings.is_json = "--json" in args  # so that even a wrong command line is answered as asked for
    _write_anything()
    try:
        return _answered(list(args), settings)
    except BrokenPipeError:
        return exits.OUTPUT_CLOSED
    except OSError:
        return exits.FAILED  # not even the error can be printed


def _answered(args: list[str], settings: Settings) -> int:
    try:
        return _command(args, settings)
    except McpError as error:
        return _tell(error, settings)
    except click.ClickException as error:
        return _usage(error, settings)
    except (click.Abort, KeyboardInterrupt):
        return exits.INTERRUPTED
    except BrokenPipeError:
        raise
    except OSError as error:
        return _system(error, settings)
    except Exception as error:  # noqa: BLE001
        # The last resort: whatever it was, an operator gets one line and not a page.
        return _bug(error, settings)


def _command(args: list[str], settings: Settings) -> int:
    """Run it without click's own main, which has ideas of its own about closed outputs."""
    if (wanted := os.environ.get("_MCP_COMPLETE")) is not None:
        from click.shell_completion import shell_complete

        return shell_complete(mcp, {}, "mcp", "_MCP_COMPLETE", wanted)
    try:
        with mcp.make_context("mcp", args, obj=settings) as ctx:
            code = mcp.invoke(ctx)
    except click.exceptions.Exit as leaving:
        code = leaving.exit_code
    if sys.stdout is not None:
        sys.stdout.flush()
    return code if isinstance(code, int) else exits.DONE


def _tell(error: McpError, settings: Settings) -> int:
    Output(settings).error(error)
    return exits.code_of(error)


def _usage(error: click.ClickException, settings: Settings) -> int:
    ctx = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        if settings.is_json:
            return _tell(exits.Usage("a command is missing", hint="`mcp --help` lists them."), settings)
        sys.stderr.write(error.format_message() + "\n")
        return exits.USAGE
    where = ctx.command_path if ctx is not None else "mcp"
    said = exits.Usage(_lower(error.format_message()), hint=f"`{where} --help` shows how, with an example.")
    return _tell(said, settings)


def _lower(text: str) -> str:
    text = safe(text).removesuffix(".")
    return text[:1].lower() + text[1:]


def _system(error: OSError, settings: Settings) -> int:
    """A file or a stream failed where no part of ours expected it."""
    what = f" {error.filename}" if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    if error.errno == errno.ENOSPC and not error.filename:
        what = " the output"
    if os.environ.get("MCP_DEBUG") == "1":
        raise error
    return _tell(McpError(f"cannot use{what}: {reason}", code="system"), settings)


def _bug(error: Exception, settings: Settings) -> int:
    if os.environ.get("MCP_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    name = type(error).__name__
    return _tell(
        McpError(
            f"this is a bug of mcp: {name}: {safe(error)[:200]}",
            hint="Run it again with MCP_DEBUG=1 in the environment for the details that a report needs.",
            code="bug",
        ),
        settings,
    )


def _write_anything() -> None:
    """Let no character that a terminal does not know end the command."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure: Any = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def leave(code: int) -> NoReturn:
    """End the process with this code; what cannot be flushed any more is let go without a word.

    At once: the interpreter would take every module apart before it ends, a quarter of a command's whole time.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except BrokenPipeError:
            code = exits.OUTPUT_CLOSED if stream is sys.stdout else code
        except (OSError, ValueError):
            code = (code or exits.FAILED) if stream is sys.stdout else code
    os._exit(code)
