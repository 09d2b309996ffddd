"""The Make rules of what is missing of the tables.

    python -m experiments.make table3 --scale narrow --data photos/cifar10-jpeg | make -f - -j2 all

Enters: the words of a call, and which files are there. Leaves: a makefile, on stdout. It needs the standard
library alone, so that `make -n` lists the runs where nothing is installed.
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

from experiments.tables import BASE, GENERATIONS, KNOWN, Run, arguments, own, planned


def where(dataset: str, asked: argparse.Namespace) -> tuple[str, str]:
    """The data set as --dataset names it, and the folder that it is in."""
    named = asked.scale in ("paper", "demo") and asked.tables != ["generations"]
    by_name = dataset in KNOWN and (asked.datasets or named)
    if dataset == "restricted-imagenet" and by_name:
        return dataset, asked.imagenet or "IMAGENET"
    if by_name:
        return dataset, asked.data or "data"
    folder = asked.data or "DATA"
    return "folder", f"{folder}/{dataset}" if asked.scale == "narrow" else folder


def command(run: Run, asked: argparse.Namespace) -> str:
    method, *options = run.row.split()
    name, folder = where(run.dataset, asked)
    three = ["mega-batches=3"] * (name == "restricted-imagenet")
    words = [f"--dataset {name} --data {shlex.quote(folder)}"]
    base = GENERATIONS if "generations" in options else BASE
    words += [f"--{option.replace('=', ' ')}" for option in (*three, *base[asked.scale].split())]
    words += [f"--method {method}", *(f"--{option}" for option in options), f"--seed {run.seed}"]
    path = run.path(asked.out)
    files = ["--out", shlex.quote(path), "--checkpoint", shlex.quote(path.replace(".json", ".pt"))]
    return " ".join([*words, *asked.args, *files])


def measured(name: str, runs: list[Run]) -> dict[Run, str]:
    """Of a table's own runs, those of which it shows more than records: the ending of the file of that."""
    endings = {"figure2": "corruptions", "figure3": "attack", "figure4": "metrics", "figure5": "metrics"}
    if name == "forgetting":
        return {run: ".metrics.json" for run in runs if run.row in ("lure", "lure replay=none")}
    return dict.fromkeys(runs, f".{endings[name]}.json") if name in endings else {}


def planned_files(asked: argparse.Namespace) -> tuple[dict[Run, str], dict[str, str]]:
    """The record of each run, and each file of what is measured of a run besides, with its checkpoint."""
    paths = {run: run.path(asked.out) for name in asked.tables for run in planned(name, asked)}
    also = {
        paths[run].replace(".json", ending): paths[run].replace(".json", ".pt")
        for name in asked.tables
        for run, ending in measured(name, own(name, asked)).items()
    }
    return paths, also


def how_many(asked: argparse.Namespace, paths: list[str]) -> str:
    """How many runs there are and how many are missing, and how long these took where they are committed."""
    missing = [path for path in paths if not os.path.exists(path)]
    runs = "1 run" if len(paths) == 1 else f"{len(paths)} runs"
    text = f"{' '.join(asked.tables)}: {runs}, {len(paths) - len(missing)} of them in {asked.out}"
    if not missing:
        return text
    text += f"; {len(missing)} to run"
    if asked.args:  # which make other runs of the committed ones
        return text
    committed = [Path("results", asked.scale, *Path(path).parts[-2:]) for path in missing]
    known = [json.loads(path.read_text()) for path in committed if path.exists()]
    if known:
        minutes = sum(record["totals"]["seconds"] for record in known) / 60
        devices = ", ".join(sorted({record["device"] for record in known}))
        text += f", of which {len(known)} took {minutes:.0f} minutes one after the other on {devices}"
    return text


def rules(asked: argparse.Namespace) -> str:
    """A makefile: `all` renders the tables, after what is missing of their runs and measurements.

    When make reads it, it tells how many runs there are and how many are missing.
    """
    paths, also = planned_files(asked)
    missing = [path for path in (*paths.values(), *also) if not os.path.exists(path)]
    python = shlex.quote(asked.python)
    number = os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // asked.jobs)
    threads = f"OMP_NUM_THREADS={number}"
    words = " ".join(map(shlex.quote, asked.words))
    prepare = f"@{python} -m experiments.prepare {words}"
    if asked.scale == "demo" and not any(map(os.path.exists, paths.values())):
        prepare = ""  # there is nothing to load, nor to compare
    rule: dict[str, tuple[list[str], str]] = {"prepare": ([], prepare)}
    for run, path in paths.items():
        call = f"{threads} {python} baselines.py {command(run, asked)}"
        rule[path] = (["prepare"], call)
        # A record may be there without its checkpoint, which is not kept in git: then the run is made again.
        checkpoint = path.replace(".json", ".pt")
        rule[checkpoint] = ([path], f"[ -e {shlex.quote(checkpoint)} ] || {call}")
    corruptions = f"--corruptions {shlex.quote(asked.cifar10c or 'CIFAR10C')} "
    how = {"corruptions": corruptions, "attack": "--attack ", "metrics": ""}
    for path, checkpoint in also.items():
        more = how[path.split(".")[-2]]
        rule[path] = ([checkpoint], f"{threads} {python} evaluate.py {more}{shlex.quote(checkpoint)}")
    to_make = [] if asked.incomplete else missing
    rule["all"] = (["prepare", *to_make], f"{python} -m experiments.report {words}")
    lines = ["equals := =", ".PHONY: all prepare"]
    if not asked.incomplete:
        told = how_many(asked, [*paths.values()]).replace("$", "$$").replace("#", "$(number)")
        lines += [r"number := \#", f"$(info {told})"]
    for path, (before, recipe) in rule.items():
        if path.endswith(".pt") or path in to_make or path in ("all", "prepare"):
            name = escaped(path)
            # Make deletes a file whose recipe it stops, but for a precious one.
            lines.append(f".PRECIOUS: {name}")
            lines.append(f"{name}: | {' '.join(map(escaped, before))}")
            lines.append("\t" + recipe.replace("$", "$$"))
    return "\n".join(lines) + "\n"


# What make can be told of a name: "=" would make a line an assignment, the others would end the name.
ESCAPES = {"=": "$(equals)", "$": "$$", " ": r"\ ", ":": r"\:", "#": r"\#"}
CARRIED = " $:#=/_-.,+@'"


def escaped(path: str) -> str:
    """The name of a file as make has to read it. ValueError for one that make cannot carry."""
    for character in path:
        if not character.isalnum() and character not in CARRIED:
            names = "letters, digits and any of " + " ".join(CARRIED.strip())
            raise ValueError(f"{path}: make cannot carry {character!r} in a name; expected {names}")
    return "".join(ESCAPES.get(character, character) for character in path)


def main(words: list[str]) -> int:
    try:
        text = rules(arguments(words))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    sys.stdout.buffer.write(os.fsencode(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
