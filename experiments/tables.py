"""The paper's tables and figures as data, at every scale.

A table is a list of rows, "METHOD OPTION=VALUE ...": a method of baselines.py and what differs from the
options of the scale. A run is a file, OUT/DATASET/ROW-SEED.json; tables with the same row share it.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple


class Table(NamedTuple):
    methods: tuple = ()  # each of them, or of those asked for,
    options: tuple = ("",)  # with each of these
    besides: tuple = ()  # and these rows
    also: str = ""  # and what this table has


def with_each(options: str, more: tuple) -> tuple:
    return tuple(f"{options} {o}".strip() for o in more)


PAPER = ("warm-start", "llf", "sp", "lure")
COMPARED = (*PAPER, "scratch", "rifle", "dash", "fire")
CRITERIA = ("warm-start", "fisher", "magnitude", "lure", "random")
SHARES = ("warm-start", "lure keep=0.95", "lure keep=0.9", "lure", "lure keep=0.7", "lure keep=0.6")
RECIPES = ("", "select=best-val", "gamma=1", "gamma=1 select=best-val")
NOISE = ("", "label-noise=0.2", "label-noise=0.4")


# On one data set (Zhou et al. 2022): as many passes in one schedule, and in as many schedules as generations.
FORGETTERS = ("warm-start", "ke", "rifle", "llf", "sp", "lure", "random", "dash", "fire", "scratch")


def scale(four, buffer: str, long, shots, archs, rates, epochs, besides, compared, whole: str) -> dict:
    """All tables; those in which 8 mega-batches are not needed have `four`."""
    metrics = Table(COMPARED)
    return {
        "table1": Table(COMPARED, besides=besides),
        "table2": Table(COMPARED, (buffer,)),
        "table3": Table(COMPARED, ("replay=none",)),
        "table4": Table(PAPER, long),
        "table5": Table(PAPER, shots),
        "table6": Table(compared, archs),
        "table7": Table(besides=SHARES),
        "table8": Table(CRITERIA, (four,)),
        "table9": Table(PAPER, with_each(four, NOISE)),
        "figure2": metrics,
        "figure3": metrics._replace(also="table9"),
        "figure4": metrics,
        "figure5": metrics,
        "figure6": Table(compared, with_each(four, rates)),
        "where-from": Table(("warm-start", "lure", "random", "scratch"), with_each(four, RECIPES)),
        "cost": Table(("warm-start", "lure", "sp", "scratch"), with_each(four, epochs)),
        "forgetting": Table(COMPARED, besides=("fisher", "magnitude", "random")),
        "generations": Table(FORGETTERS, ("generations",), besides=(f"warm-start generations {whole}",)),
    }


# The paper's grid of rates is not printed, but for the rate 0.005 with the decay 0.001.
GRID = [f"{lr} {decay}".strip() for decay in ("", "weight-decay=0.0005", "weight-decay=0.001") for lr in
        ("", "lr=0.05", "lr=0.01", "lr=0.005")]  # fmt: skip
PAPERS = scale(
    four="mega-batches=4",
    buffer="replay=buffer",
    long=("mega-batches=25", "mega-batches=50", "mega-batches=100"),
    shots=with_each("arch=resnet50 shots=270", ("mega-batches=30", "mega-batches=70")),
    archs=with_each("mega-batches=4", ("", "arch=resnet50", "arch=wide_resnet50_2", "arch=vgg16_bn")),
    rates=GRID,
    epochs=("epochs=5", "epochs=10", "epochs=20", ""),
    besides=("warm-start gamma=1",),
    compared=PAPER,
    whole="mega-batches=1 epochs=2200",
)
# What two CPU cores do in two or three hours. The sizes are such that epochs end with whole batches: of 284
# images 28 are for validation and 256 are four batches; 275 less 28, and 8 from the buffer, are four but one.
SMALL = scale(
    four="mega-batches=4 limit=1136",
    buffer="replay=buffer buffer-size=8 limit=2200",
    long=("limit=1420 mega-batches=10", "limit=1420 mega-batches=20"),
    shots=("shots=27 epochs=20 mega-batches=5", "shots=27 epochs=20 mega-batches=10"),
    archs=with_each("mega-batches=4 limit=568 image-size=16", tuple(
        f"arch={arch}" for arch in ("resnet18", "resnet50", "wide_resnet50_2", "vgg16_bn"))),
    rates=("", "weight-decay=0.001", "lr=0.005", "lr=0.005 weight-decay=0.001"),
    epochs=("epochs=5", "", "epochs=20"),
    besides=("warm-start gamma=1", "warm-start precision=float32"),
    compared=("warm-start", "lure"),
    whole="mega-batches=1 epochs=400",
)  # fmt: skip
# The paper's protocol but for the width of the network. A run takes an hour, so those that decide come first.
SIX = ("warm-start", "warm-start gamma=1", "lure", "llf", "sp", "scratch")
NONE = Table((*SIX, "lure gamma=1", "random", "rifle", "dash", "fire"), ("replay=none",))
NARROW = {
    "table3": NONE,
    "table1": Table(("warm-start", "lure", "warm-start gamma=1", "scratch")),
    "table2": Table(SIX, ("replay=buffer",)),
    "where-from": Table(("warm-start", "warm-start gamma=1", "lure", "lure gamma=1"), ("replay=none",)),
    **dict.fromkeys(("forgetting", "figure2", "figure3", "figure4", "figure5"), NONE),
}
SCALES = {"paper": PAPERS, "small": SMALL, "narrow": NARROW}
SCALES |= {"demo": {"demo": Table(COMPARED), "forgetting": PAPERS["forgetting"]}}
SCALES |= {"precision": {"precision": Table(besides=("warm-start", "warm-start precision=float32"))}}
BASE = {
    "paper": "",
    "small": "arch=small precision=bfloat16 limit=2272 limit-test=2000 epochs=10",
    "narrow": "arch=small precision=float32",
    "demo": "image-size=16 arch=small mega-batches=4 epochs=10",
    "precision": "precision=bfloat16 mega-batches=4 limit=1136 limit-test=1000 epochs=10",
}
# Of rows with `generations`. Zhou et al. train 224×224 images, by a cosine decay.
GENERATIONS = {
    "paper": "replay=none mega-batches=11 epochs=200 image-size=64",
    "small": "replay=none arch=small precision=float32 shots=100 mega-batches=10 epochs=40",
}
ONE_SEED = {("small", "table4"), ("small", "table6"), ("small", "figure6"), ("small", "cost")}
ONE_SEED |= {("demo", "demo"), ("demo", "forgetting")}
KNOWN = ("digits", "cifar10", "cifar100", "restricted-imagenet")  # any other data set is a folder


class Run(NamedTuple):
    row: str  # "METHOD OPTION=VALUE ..."
    dataset: str
    seed: str

    def path(self, out: str) -> str:
        """Of its record; its checkpoint and what is measured of it lie beside."""
        return f"{out}/{self.dataset}/{self.row.replace(' ', '+')}-{self.seed}.json"


def planned(name: str, asked: argparse.Namespace) -> list[Run]:
    """The runs of a table, and of the one that it also has."""
    also = SCALES[asked.scale][name].also
    return own(name, asked) + (own(also, asked) if also else [])


def own(name: str, asked: argparse.Namespace) -> list[Run]:
    """The runs of a table itself, seed by seed, each row for each data set before the next seed."""
    table = SCALES[asked.scale][name]
    methods = [method.replace("+", " ") for method in asked.methods]
    if table.methods:
        rows = [f"{m} {o}".strip() for o in table.options for m in methods or table.methods]
        rows += () if methods else table.besides
    else:
        rows = [row for row in table.besides if not methods or row.split()[0] in methods]
    seeds = asked.seeds or (["1"] if (asked.scale, name) in ONE_SEED else ["1", "2", "3"])
    return [Run(row, d, seed) for seed in seeds for d in datasets(name, asked) for row in rows]


def datasets(name: str, asked: argparse.Namespace) -> list[str]:
    if asked.datasets:
        return asked.datasets
    if asked.scale != "paper" or name == "generations":
        return ["digits"] if asked.scale == "demo" else [Path(asked.data or "DATA").resolve().name]
    if name in ("table1", "table2", "table3"):
        return ["cifar10", "cifar100", *["restricted-imagenet"] * bool(asked.imagenet)]
    return ["restricted-imagenet" if name == "table5" else "cifar10"]


def arguments(words: list[str]) -> argparse.Namespace:
    """What is asked for, on the command line. Ends with one line and status 2 if there is no such thing."""
    parser = argparse.ArgumentParser(
        prog="make", usage=argparse.SUPPRESS, description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("tables", nargs="+", help="their names, or all")
    parser.add_argument("--scale", default="paper", help=", ".join(SCALES))
    for name in ("out", "data", "imagenet", "cifar10c"):
        parser.add_argument(f"--{name}", default="")
    for name in ("datasets", "methods", "seeds", "args"):
        parser.add_argument(f"--{name}", type=str.split, default=[])
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at once")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--incomplete", action="store_true", help="render what is there, run nothing")
    asked = parser.parse_args(words)
    if asked.scale not in SCALES:
        parser.exit(2, f"SCALE: expected paper, small or narrow, not {asked.scale}\n")
    there = SCALES[asked.scale]
    if asked.tables == ["all"]:  # but generations, not the paper's, is only rendered by it
        asked.tables = [name for name in there if asked.incomplete or name != "generations"]
    if unknown := [name for name in asked.tables if name not in there]:
        parser.exit(2, f"{unknown[0]}: SCALE={asked.scale} does not have it, only {', '.join(there)}\n")
    asked.out = asked.out or ("demo" if asked.scale == "demo" else f"results/{asked.scale}")
    asked.words = words
    return asked
