"""The command line: an empty application to which plugins add commands."""

import errno
import io
import os
import signal
import sys

import typer

from pilotfish import __version__
from pilotfish._internal.extras import missing_module

from .plugins.cli import strip_control_characters
from .plugins.config import ConfigError
from .plugins.contracts import Unsupported
from .plugins.manager import plugins
from .plugins.terminal import GroupedCommands


def build() -> typer.Typer:
    """Build the application with the commands of all plugins."""
    cli = typer.Typer(
        name="pilotfish",
        cls=GroupedCommands,
        help="Plugins for a stock vLLM engine, and a retrieval stack beside it.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )

    @cli.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        if version:
            typer.echo(__version__)
            raise typer.Exit

    plugins().add_commands(cli)
    return cli


def main() -> None:
    """Run a command. A mistake of the user becomes one line on standard error and exit code 2."""
    # On SIGTERM a command ends its child processes as after Ctrl-C, but with exit code 143.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal or a locale may not be able to show every character
            stream.reconfigure(errors="backslashreplace")
    try:
        code = build()(standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except (ConfigError, Unsupported) as error:
        sys.exit(_refuse(str(error)))
    except ModuleNotFoundError as error:
        message = missing_module(error, next((word for word in sys.argv[1:] if not word.startswith("-")), ""))
        if message is None:
            raise
        sys.exit(_refuse(message))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the rest of the buffer cannot be written
        sys.exit(_refuse(f"{error.filename or 'standard output'}: {error.strerror}"))
    except Exception as error:
        # Usage errors have a method for their text; their class has moved between typer's and click's modules.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        if type(error).__name__ == "NoArgsIsHelpError":  # the message is the help of a group
            typer.echo(message(), err=True)
            sys.exit(2)
        hint = "" if "PILOTFISH_LOAD_PLUGINS" not in os.environ else " (PILOTFISH_LOAD_PLUGINS is set)"
        sys.exit(_refuse(message() + hint))
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(message: str) -> int:
    """Write a message as one line to standard error, and return the exit code."""
    sys.stderr.write(f"pilotfish: {strip_control_characters(' '.join(message.split()))}\n")
    return 2


if __name__ == "__main__":
    main()
