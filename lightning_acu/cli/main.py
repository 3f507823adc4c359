"""``lightning-acu``: help, version, and the choice of a command. Imports neither torch nor Lightning, to be quick."""

from __future__ import annotations

import os
import sys
from typing import Any

from .. import __version__
from ..choices import did_you_mean
from .commands import COMMANDS, run_command
from .errors import fail, short_errors

__all__ = ["main"]

_HEAD = """\
usage: lightning-acu COMMAND [OPTIONS]
       lightning-acu COMMAND --help

Train networks whose convolutions learn their shape, look at them, and bring them elsewhere.

commands:
"""

_TAIL = """
options:
  -h, --help   this text
  --version    the version of lightning_acu
  --debug      after a command: a traceback instead of a short error

Modules in the current folder can be named: fit --model my_module.MyModel. More: docs/command-line.md
"""


def main(args: Any = None) -> None:
    """Run ``lightning-acu`` with ``args`` (default: those of the command line).

    Args:
        args: a list of words; or a dict or namespace of options for LightningCLI.

    Raises:
        SystemExit: after an error, with 2 if what was asked for is wrong, and 1 if it could not be done.
    """
    if args is not None and not isinstance(args, list):
        from .training import run_lightning

        run_lightning(args)
        return
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m` does the same
    if not words or words[0] in ("-h", "--help"):
        print(_help(), end="")
        sys.exit(None if words else 2)
    if words[0] == "--version":
        print(f"lightning-acu {__version__}")
        return
    with short_errors("lightning-acu" if words[0].startswith("-") else f"lightning-acu {words[0]}", debug):
        if words[0] in COMMANDS:
            run_command(words)
        elif words[0].startswith("-"):  # options of LightningCLI before its command
            from .training import run_lightning

            run_lightning(words)
        else:
            fail("lightning-acu", f"there is no command {words[0]!r}{did_you_mean(words[0], COMMANDS)}")


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = []
    for name, (summary, example) in COMMANDS.items():
        lines += [f"  {name:{width}}  {summary}", f"  {'':{width}}  $ lightning-acu {example}"]
    return _HEAD + "\n".join(lines) + "\n" + _TAIL
