"""Command lines whose errors are one line.

Enters: a call. Leaves: its status, and for an error that is the user's to mend one line on stderr.
"""

import argparse
import sys
from collections.abc import Callable


class DataError(Exception):
    """The data are not as they should be; the message names the file and says what was expected."""


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def printable(text) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def guarded(program: str, call: Callable[[], object]) -> int:
    """Call, with one line instead of a traceback for an error that is the user's to mend.

    Returns 0; 2: a wrong call; 1: wrong data, or a loss not finite; 130: interrupted. With `python -X dev`
    the traceback is shown.
    """
    if hasattr(sys.stdout, "reconfigure"):  # what its encoding lacks is printed as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        call()
    except (ValueError, DataError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        if sys.flags.dev_mode:  # python -X dev
            raise
        print(f"{program}: {printable(error) or 'interrupted'}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            return 130
        return 2 if isinstance(error, ValueError) else 1
    return 0
