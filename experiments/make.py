"""The Make rules of what is missing of the tables.

    python -m experiments.make table3 --scale narrow --data photos/cifar10-jpeg | make -f - -j2 all

Only the standard library is needed, so that `make -n` lists the runs where nothing is installed.
"""

import argparse
import os
import re
import shlex
import sys

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
    return " ".join([*words, *asked.args, "--out", path, "--checkpoint", path.replace(".json", ".pt")])


def measured(name: str, runs: list[Run]) -> dict[Run, str]:
    """Of a table's own runs, those of which it shows more than records: the ending of the file of that."""
    endings = {"figure2": "corruptions", "figure3": "attack", "figure4": "metrics", "figure5": "metrics"}
    if name == "forgetting":
        return {run: ".metrics.json" for run in runs if run.row in ("lure", "lure replay=none")}
    return dict.fromkeys(runs, f".{endings[name]}.json") if name in endings else {}


def needed(runs: dict, missing: list[str], asked: argparse.Namespace) -> list[str]:
    """Before the runs: the shell's lines that say what was not given, or load each data set once."""
    coming = {d: where(d, asked) for d in dict.fromkeys(run.dataset for run in runs)}
    lack = []
    if not asked.data and "folder" in (name for name, _ in coming.values()):
        each = f" with {', '.join(coming)}, each" if asked.scale == "narrow" else ""
        lack.append(f"DATA: expected DATA=<folder{each} with train/<class>/ and test/<class>/ of images>")
    if not asked.imagenet and "restricted-imagenet" in (name for name, _ in coming.values()):
        lack.append("IMAGENET: expected IMAGENET=<folder with train/ and val/>")
    if not asked.cifar10c and any(path.endswith(".corruptions.json") for path in missing):
        lack.append("CIFAR10C: expected CIFAR10C=<folder of CIFAR-10-C>")
    if lack:
        return [f"@echo {shlex.quote(lack[0])} >&2; exit 2"]
    sizes = {"0", *re.findall(r"--image-size[ =](\d+)", " ".join(command(run, asked) for run in runs))}
    load = "sys.exit(guarded(sys.argv[2], lambda: load_dataset(*sys.argv[1:4], int(sys.argv[4]))))"
    modules = "import sys; from experiments.data import load_dataset; from experiments.command import guarded"
    call = f"{asked.python} -c {shlex.quote(f'{modules}; {load}')}"
    places = [place for place in coming.values() if place[0] != "digits"]
    return [
        f"{call} {n} {shlex.quote(folder)} .cache {size}" for n, folder in places for size in sorted(sizes)
    ]


def rules(asked: argparse.Namespace) -> str:
    """A makefile: `all` renders the tables, after what is missing of their runs and measurements."""
    paths = {run: run.path(asked.out) for name in asked.tables for run in planned(name, asked)}
    also = {
        paths[run].replace(".json", ending): paths[run].replace(".json", ".pt")
        for name in asked.tables
        for run, ending in measured(name, own(name, asked)).items()
    }
    missing = [path for path in (*paths.values(), *also) if not os.path.exists(path)]
    threads = f"OMP_NUM_THREADS={max(1, (os.cpu_count() or 1) // asked.jobs)}"
    rule = {"prepare": ("", needed(paths, missing, asked))}
    for run, path in paths.items():
        call = f"{threads} {asked.python} baselines.py {command(run, asked)}"
        rule[path] = ("prepare", [call])
        # A record may be there without its checkpoint, which is not kept in git: then the run is made again.
        rule[path.replace(".json", ".pt")] = (path, [f"[ -e $@ ] || {call}"])
    corruptions = f"--corruptions {shlex.quote(asked.cifar10c or 'CIFAR10C')} "
    how = {"corruptions": corruptions, "attack": "--attack ", "metrics": ""}
    for path, checkpoint in also.items():
        more = how[path.split(".")[-2]]
        rule[path] = (checkpoint, [f"{threads} {asked.python} evaluate.py {more}{checkpoint}"])
    reports = [f"{asked.python} -m experiments.report {' '.join(map(shlex.quote, asked.words))}"]
    missing = [] if asked.incomplete else missing
    rule["all"] = (" ".join(missing), reports)
    lines = ["equals := =", ".PHONY: all prepare"]
    for path, (before, recipe) in rule.items():
        if path.endswith(".pt") or path in missing or path in ("all", "prepare"):
            # Make would take a line with "=" for an assignment, and delete a file whose recipe it stops.
            head = f".PRECIOUS: {path}\n{path}: | {before}".replace("=", "$(equals)")
            lines += [head, *(f"\t{line}" for line in recipe)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(rules(arguments(sys.argv[1:])), end="")
