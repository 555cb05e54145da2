"""The one exception type for mistakes of the user, how commands tell them, and the arguments that all of them take."""

import argparse
import errno
import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class UserError(ValueError):
    """A user's mistake, told in one line: the value, the rule it breaks, and the remedy.

    Commands print it without a traceback (``--debug`` shows one) and exit with code 2. Everything else that
    is raised is a bug of ours and keeps its traceback.
    """

    line_is_open = False  # whether a progress bar has left its line open when it is told


def one_line(error: Exception) -> str:
    """What an exception says, without its line breaks."""
    return " ".join(str(error).split())


def require_package(package: str, what: str, remedy: str) -> None:
    """Raises UserError where a package, named as it is imported, is not installed; ``what`` needs it."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what}: needs the package {package.replace('_', '-')}; {remedy}")


def command_line(program: str, description: str | None, config: str | None = None) -> argparse.ArgumentParser:
    """A command's parser, whose help is the program's docstring, with ``--debug``; where it reads a configuration also
    with ``config`` and ``overrides``, such as the one given here. Under ``lp-train`` the program and its examples go by
    that name."""
    called = Path(sys.argv[0]).name
    if called.startswith("lp-train "):
        launched = rf"(?:python(?: -m)?|accelerate launch) [\w/.]*\b{re.escape(program)}(?!\w)"
        program, description = called, re.sub(launched, called, description or "")
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=program, description=description, formatter_class=form)
    if config:
        parser.add_argument("config", help="a YAML file, e.g. configs/demo.yaml")
        parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=f"e.g. {config}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def exit_code(command: Callable[[], Any], debug: bool = False) -> int:
    """Runs a command: 0, or 2 for a mistake of the user or a full disk, told in one line; ``debug`` keeps the
    traceback instead."""
    try:
        command()
    except UserError as error:
        if debug:
            raise
        if error.line_is_open:
            print(file=sys.stderr)
        print(f"error: {error}".replace("\n", "\nerror: "), file=sys.stderr)
        return 2
    except OSError as error:
        if debug or error.errno not in NO_ROOM:
            raise
        print(f"\nerror: {error}; make room, and go on with --resume what has it", file=sys.stderr)
        return 2
    return 0
