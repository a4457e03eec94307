"""The tree of commands: each module is loaded when one of its commands is called, and the help of the rest stands here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from mcp.cli import exits
from mcp.cli.settings import Settings

COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("deploy", "Show what a deploy would do, and why there."),
    "deploy": ("deploy", "Put services on the right nodes, healthy, or leave all as it was."),
    "undeploy": ("deploy", "Remove a service and everything of it."),
    "start": ("deploy", "Start a stopped service."),
    "stop": ("deploy", "Stop a service; it stays deployed."),
    "restart": ("deploy", "Restart a service's containers, one component after the other."),
    "status": ("status", "The whole fleet on one screen: problems first, then services, then nodes."),
    "ps": ("status", "The containers of the fleet."),
    "logs": ("logs", "What a service's containers print, merged, wherever they run."),
    "node": ("node", "The nodes: list, show, why, invite, remove."),
    "op": ("op", "The operations: list, show, cancel."),
    "init": ("init", "Make this machine the first node: bus, authority, master and agent."),
    "operator": ("operator", "Who may give commands: add, list, remove. On the master's machine."),
    "login": ("init", "Take an operator's file as your way into the fleet."),
    "bus": ("bus", "The bus itself: run."),
    "tap": ("tap", "Watch the decoded bus: orders paired with their answers."),
    "demo": ("demo", "A whole fleet on this machine in about half a minute, and gone again."),
    "completion": ("completion", "Print the script that makes Tab complete commands and live names."),
}
"""Command -> its module and its line in `mcp --help`; a test holds the lines against the commands themselves."""

SECTIONS = {
    "Services": ("plan", "deploy", "undeploy", "start", "stop", "restart", "status", "ps", "logs"),
    "Fleet": ("node", "op", "operator", "tap"),
    "Setting up": ("init", "login", "bus", "demo", "completion"),
}

EXAMPLE = """\
Example:
  mcp demo                       a whole fleet on this machine, shown and removed again
  mcp plan web.toml              what would happen
  mcp deploy web.toml            make it so
  mcp status                     the fleet on one screen
"""


FIELDS = {"config": "config", "json": "is_json", "quiet": "is_quiet", "timeout": "timeout_s"}
"""Global option -> where it is kept."""


def remember(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    """Keep a global option, wherever on the command line it stood."""
    source = ctx.get_parameter_source(param.name or "")
    if source is None or source.name != "COMMANDLINE":
        return
    settings = settings_of(ctx)
    if param.name == "no_color":
        settings.has_colour = False
    else:
        setattr(settings, FIELDS[str(param.name)], value)


def settings_of(ctx: click.Context) -> Settings:
    """Return the settings of this run of the program."""
    root = ctx.find_root()
    if not isinstance(root.obj, Settings):
        root.obj = Settings()
    return root.obj


def global_options(*, is_hidden: bool) -> list[click.Parameter]:
    """Return the options that every command takes."""

    def option(*names: str, help: str, **more: Any) -> click.Option:
        return click.Option(
            names, help=help, expose_value=False, is_eager=True, callback=remember, hidden=is_hidden, **more
        )

    return [
        option("--config", metavar="FILE", help="Your way into the fleet.  [~/.config/mcp/mcp.toml]"),
        option("--json", is_flag=True, help="Print the result for scripts."),
        option("--quiet", is_flag=True, help="No progress and no notes, only results and errors."),
        option("--no-color", is_flag=True, help="No colours (NO_COLOR does the same)."),
        option("--timeout", type=Seconds(), metavar="SECONDS", help="How long to wait for the answer."),
    ]


class Seconds(click.ParamType[float]):
    """A positive number of seconds."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = 0.0
        if not 0 < number < 1e7:
            self.fail(f"{value!r} is no number of seconds above 0", param, ctx)
        return number


class Command(click.Command):
    """A command with examples, that takes the global options too."""

    examples: Sequence[str] = ()

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        own = {param.name for param in self.params}
        self.params += [param for param in global_options(is_hidden=True) if param.name not in own]

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and where the rest is."""
        formatter.write("\nExample:\n")
        for example in self.examples:
            formatter.write(f"  {example}\n")
        formatter.write("\nGlobal options (--config, --json, --quiet, --no-color, --timeout): mcp --help\n")


class Group(click.Group):
    """A noun with its verbs."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.params += global_options(is_hidden=True)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first example of each verb."""
        formatter.write("\nExample:\n")
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if isinstance(command, Command):
                formatter.write(f"  {command.examples[0]}\n")


class Root(click.Group):
    """`mcp` itself: loads a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return every command, without loading one."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        import importlib

        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mcp.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or say which one was probably meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"there is no command {args[0][:60]!r}{meant(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section, from the table."""
        for section, names in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, COMMANDS[name][1]) for name in names])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write examples and exit codes."""
        formatter.write(f"\n{EXAMPLE}\nExit codes:\n")
        formatter.write_dl([(str(code), meaning) for code, meaning in exits.MEANINGS.items()])


def meant(word: str, known: Any) -> str:
    """Return a suggestion for a mistyped word, or nothing."""
    import difflib

    close = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {close[0]!r}?" if close else ""


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


@click.group(cls=Root, params=global_options(is_hidden=False), context_settings=CONTEXT)
@click.version_option(package_name="metacircular-mcp", message="mcp %(version)s")
def mcp() -> None:
    """The Metacircular Control Plane: containers on your own machines, from one command."""


def command(
    name: str, *, examples: Sequence[str], group: click.Group | None = None
) -> Callable[[Callable[..., Any]], Command]:
    """Make a function a command with examples; its docstring is the help."""

    def make(function: Callable[..., Any]) -> Command:
        made = click.command(name, cls=Command)(function)
        made.examples = tuple(examples)
        if group is not None:
            group.add_command(made)
        return made

    return make
