"""Command lines whose errors are one line."""

import argparse
import json
import os
import shutil
import sys

import torch
import torch.distributed as dist

import lure
from experiments import runs
from experiments.data import DataError
from lure import RANK, WORLD


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def printable(text) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def guarded(program: str, call) -> int:
    """Call, with one line instead of a traceback for an error that is the user's to mend.

    Returns 0; 2: a wrong call; 1: wrong data, or a loss not finite; 130: interrupted.
    """
    if hasattr(sys.stdout, "reconfigure"):  # what its encoding lacks is printed as an escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        call()
    except (ValueError, DataError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        print(f"{program}: {printable(error) or 'interrupted'}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def run(argv, description: str, settings: type[runs.Config], method) -> int:
    """The command line of `settings`; `method(config)` is what to do between mega-batches. As `guarded`."""
    parser = Parser(description=description, allow_abbrev=False)
    lure.add_settings(parser, settings)
    if WORLD > 1:
        lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if lacking:
            parser.error(f"WORLD_SIZE is {WORLD} without {lacking[0]}: start it by torchrun, or unset it")
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def check(config):  # in the first process, so that what is wrong is told once
        method(config)
        lure.pick_device(config.device)
        if config.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
            raise ValueError("--compile: expected a C++ compiler, g++ or what CXX names")

    def call():
        given = runs.by_first(lambda: vars(parser.parse_args(argv)))
        config = runs.by_first(lambda: settings(**given))
        runs.by_first(lambda: check(config))
        if WORLD > 1 and config.device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        record = runs.recorded(config, method(config))
        if RANK == 0:
            print(json.dumps(record["totals"]))
        if WORLD > 1:
            dist.destroy_process_group()

    return guarded(parser.prog, call)
