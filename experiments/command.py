"""Command lines whose errors are one line."""

import argparse
import sys

from experiments.data import DataError


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def printable(text) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def guarded(program: str, call) -> int:
    """Call and return the exit status. An error that is the user's to mend is one line, not a traceback."""
    try:
        call()
    except (ValueError, DataError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        print(f"{program}: {printable(error) or 'interrupted'}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0
