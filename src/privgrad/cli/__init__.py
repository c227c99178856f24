"""The command line: `privgrad`. One file per command."""

from __future__ import annotations

import io
import signal
import sys
from contextlib import suppress

import typer

from privgrad.cli import advise, audit, calibrate, compare, epsilon, train, verify
from privgrad.errors import PrivgradError, command
from privgrad.training.stops import InterruptedRunError

app = typer.Typer(
    name="privgrad",
    help="Train PyTorch models with differential privacy.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("train")(train.train)
app.command("epsilon")(epsilon.epsilon)
app.command("calibrate")(calibrate.calibrate)
app.command("verify")(verify.verify)
app.command("compare")(compare.compare)
app.command("advise")(advise.advise)
app.command("audit")(audit.audit)


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a check failed, 2 bad usage or input (one line), 130 stopped by the user."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a path must not lose a run
    code = run(sys.argv[1:])
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # nothing is left to stop: an impatient Ctrl-C must not change the code
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    try:
        # No command: the help is what was asked for.
        arguments = arguments or ["--help"]
        code = typer.main.get_command(app).main(arguments, prog_name=command(), standalone_mode=False)
        # typer turns a KeyboardInterrupt into this code, and says nothing.
        return _say("stopped", 130) if code == 130 else code if isinstance(code, int) else 0
    except InterruptedRunError as stop:
        return _say(str(stop), 130)
    except PrivgradError as error:
        return _say(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        return _say("stopped", 130)
    except OSError as error:
        return _say(f"{error.filename or 'a file'}: {error.strerror or error}", 2)
    except Exception as error:
        # typer brings click inside itself or beside itself, by version: a usage error is known by its shape.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        return _say(f"{message()} Try: {command()} --help", 2)


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    with suppress(OSError):  # a terminal that was closed
        print(f"privgrad: {line}", file=sys.stderr)
    return code
