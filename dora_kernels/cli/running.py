"""One command from its arguments to its exit code; what is raised on the way becomes a line and a code here alone."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from dora_kernels.cli import arguments, streams
from dora_kernels.cli.commands import analyze, check, convert, demo, info, merge
from dora_kernels.planning import choices

COMMANDS = (info, demo, check, analyze, convert, merge)
EXIT_CODES = (
    "Exit codes: 0 all right; 1 the command's own checks failed (check, demo, merge); 2 it could not run: an argument, "
    "a file that cannot be read, an output that cannot be written, no memory; 130 Ctrl-C; 143, 129 SIGTERM, SIGHUP; "
    "141 the reader of stdout went away. One line on stderr tells why, but for 0, 1 and 141."
)


def run(argv: Sequence[str] | None) -> int:
    """Run a command, see `dora_kernels.cli.main`."""
    if sys.stdout is None:
        streams.say("dora_kernels: stdout is closed; expected somewhere to print to")
        return 2
    chosen = Namespace(command="dora_kernels", extra=None)
    with streams.lenient_stdout():
        code, line = _outcome(argv, chosen)
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            streams.drop(sys.stdout)
            code, line = (141, None) if code in (0, 1) else (code, line)
        except OSError as error:
            streams.drop(sys.stdout)
            if code in (0, 1):
                code, line = 2, f"stdout cannot be written: {error.strerror or error}"
    if line is not None:
        streams.say(line if line.startswith(f"{chosen.command}: ") else f"{chosen.command}: {line}")
    return code


def _outcome(argv: Sequence[str] | None, chosen: Namespace) -> tuple[int, str | None]:
    """The exit code and the line that says why. The parsed arguments are put into `chosen`."""
    try:
        _parse(argv, chosen)
        return chosen.run(chosen), None
    except SystemExit as error:  # argparse's, of --help
        return (error.code, None) if isinstance(error.code, int) else (2, str(error.code))
    except KeyboardInterrupt as error:  # stopping.Stopped, or Python's own
        return getattr(error, "code", 130), str(error) or "ended by SIGINT"
    except BrokenPipeError:
        return 141, None
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "dora_kernels":
            raise
        package = f"dora-kernels[{chosen.extra}]" if chosen.extra else "dora-kernels"
        what = f"the {chosen.extra} extra" if chosen.extra else "what the package requires"
        return 2, f"{error}; expected {what}: pip install '{package}'"
    except (ValueError, OSError) as error:
        return 2, str(error)
    except (MemoryError, RuntimeError) as error:
        if not _ran_out_of_memory(error):
            raise
        return 2, f"out of memory: {error}" if str(error) else "out of memory"


def _parse(argv: Sequence[str] | None, chosen: Namespace) -> None:
    """Put the arguments into `chosen`, and raise ValueError for what is wrong with them or with the environment."""
    parser = arguments.Parser(prog="python -m dora_kernels", description="Fast DoRA linear layers.", epilog=EXIT_CODES)
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for command in COMMANDS:
        command.add(commands)
    _, unknown = parser.parse_known_args(argv, chosen)
    for name, value in vars(chosen).items():
        if value == []:  # argparse takes the -- of --out=-- away
            raise ValueError(f"argument {name}: is '--'; expected a value")
    if unknown:
        raise ValueError(f"unrecognized arguments: {' '.join(unknown)}")
    if chosen.command != "info":  # which shows what the environment says
        choices.backend_of_environment()


def _ran_out_of_memory(error: BaseException) -> bool:
    """True for Python's own error and for torch's, of which the one on a CPU is a RuntimeError like any other."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
