"""The paper's tables and figures as data, at every scale.

A table is a list of parts, and a part a list of rows, "METHOD OPTION=VALUE ...": a method of baselines.py
and what differs from the options of the scale. A run is a file, OUT/DATASET/ROW-SEED.json; tables with the
same row share it.

Enters: the words of a call. Leaves: the runs that it asks for.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple


class Part(NamedTuple):
    """Of a table: rows, the seeds of each, and the data set that they are for."""

    methods: tuple = ()  # each of them, or of those asked for,
    options: tuple = ("",)  # with each of these
    besides: tuple = ()  # and these rows
    seeds: str = "123"
    dataset: str = ""  # a folder in DATA=; without: whatever data set the table is asked for
    also: str = ""  # and the runs of this table

    @property
    def rows(self) -> list[str]:
        return [*joined(self.methods, self.options), *self.besides]


def joined(methods, options) -> list[str]:
    return [f"{method} {more}".strip() for more in options for method in methods]


def with_each(options: str, more: tuple) -> tuple:
    return tuple(f"{options} {o}".strip() for o in more)


Tables = dict[str, tuple[Part, ...]]


PAPER = ("warm-start", "llf", "sp", "lure")
COMPARED = (*PAPER, "scratch", "rifle", "dash", "fire")
CRITERIA = ("warm-start", "fisher", "magnitude", "lure", "random")
SHARES = ("warm-start", "lure keep=0.95", "lure keep=0.9", "lure", "lure keep=0.7", "lure keep=0.6")
RECIPES = ("", "select=best-val", "gamma=1", "gamma=1 select=best-val")
NOISE = ("", "label-noise=0.2", "label-noise=0.4")


# On one data set (Zhou et al. 2022): as many passes in one schedule, and in as many schedules as generations.
FORGETTERS = ("warm-start", "ke", "rifle", "llf", "sp", "lure", "random", "dash", "fire", "scratch")


def scale(shorter, buffer: str, long, shots, archs, rates, epochs, besides, compared, whole: str) -> Tables:
    """All tables, of one part each; `shorter`: options of those of which fewer mega-batches are enough."""
    measured = Part(COMPARED)
    tables = {
        "table1": Part(COMPARED, besides=besides),
        "table2": Part(COMPARED, (buffer,)),
        "table3": Part(COMPARED, ("replay=none",)),
        "table4": Part(PAPER, long),
        "table5": Part(PAPER, shots),
        "table6": Part(compared, archs),
        "table7": Part(besides=SHARES),
        "table8": Part(CRITERIA, (shorter,)),
        "table9": Part(PAPER, with_each(shorter, NOISE)),
        "figure2": measured,
        "figure3": measured._replace(also="table9"),
        "figure4": measured,
        "figure5": measured,
        "figure6": Part(compared, with_each(shorter, rates)),
        "where-from": Part(("warm-start", "lure", "random", "scratch"), with_each(shorter, RECIPES)),
        "cost": Part(("warm-start", "lure", "sp", "scratch"), with_each(shorter, epochs)),
        "forgetting": Part(COMPARED, besides=("fisher", "magnitude", "random")),
        "generations": Part(FORGETTERS, ("generations",), besides=(f"warm-start generations {whole}",)),
    }
    return {name: (part,) for name, part in tables.items()}


# The paper's grid of rates is not printed, but for the rate 0.005 with the decay 0.001.
GRID = [f"{lr} {decay}".strip() for decay in ("", "weight-decay=0.0005", "weight-decay=0.001") for lr in
        ("", "lr=0.05", "lr=0.01", "lr=0.005")]  # fmt: skip
PAPERS = scale(
    shorter="mega-batches=4",
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
    shorter="mega-batches=4 limit=1136",
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
for name in ("table4", "table6", "figure6", "cost"):
    SMALL[name] = (SMALL[name][0]._replace(seeds="1"),)

# The paper's protocol but for the width of the network; a run takes one to three hours. AS_RELEASED: the
# baseline and LURE as the authors' code trains them, and that baseline with LURE's schedule.
HOW = "select=best-val keep-momentum"
AS_RELEASED = (f"warm-start gamma=1 {HOW}", f"warm-start {HOW}", f"released {HOW} pi=next pi-fraction=0.0178")
JPEG = Part(options=("replay=none",), dataset="cifar10-jpeg")
CIFAR100 = Part(options=("replay=none",), dataset="cifar100-lossless")
FULL = Part(("warm-start", "lure", "scratch"), dataset="cifar10-lossless")
WITH_METRICS = (JPEG._replace(methods=("warm-start", "warm-start gamma=1", "lure")), FULL)
UNSEEN = JPEG._replace(methods=("warm-start", "lure"), seeds="4567")
NONE = (
    JPEG._replace(methods=("warm-start", "warm-start gamma=1", "lure", "llf", "sp", "scratch")),
    JPEG._replace(methods=("lure gamma=1", *AS_RELEASED)),
    UNSEEN,
    JPEG._replace(methods=("llf", "sp"), seeds="45"),
)
NARROW: Tables = {
    "table1": (FULL,),
    "table3": (*NONE, CIFAR100._replace(methods=("warm-start", "warm-start gamma=1", "lure"))),
    "where-from": (
        JPEG._replace(methods=("warm-start", "warm-start gamma=1", "lure", "lure gamma=1", *AS_RELEASED)),
    ),
    "forgetting": (*NONE, FULL),
    "figure2": WITH_METRICS,
    "figure3": WITH_METRICS,
    "figure4": (*WITH_METRICS, UNSEEN._replace(methods=("lure",))),
    "figure5": (*WITH_METRICS, UNSEEN._replace(methods=("lure",))),
}
SCALES = {"paper": PAPERS, "small": SMALL, "narrow": NARROW}
SCALES["demo"] = {
    "demo": (Part(("warm-start", "sp", "lure", "scratch"), seeds="1"),),  # two runs for each of two cores
    "forgetting": (PAPERS["forgetting"][0]._replace(seeds="1"),),
}
SCALES["precision"] = {"precision": (Part(besides=("warm-start", "warm-start precision=float32")),)}
BASE = {
    "paper": "",
    "small": "arch=small precision=bfloat16 limit=2272 limit-test=2000 epochs=10",
    "narrow": "arch=small precision=float32",
    "demo": "image-size=16 arch=small mega-batches=4 epochs=5",
    "precision": "precision=bfloat16 mega-batches=4 limit=1136 limit-test=1000 epochs=10",
}
# Of rows with `generations`. Zhou et al. train 224×224 images, by a cosine decay.
GENERATIONS = {
    "paper": "replay=none mega-batches=11 epochs=200 image-size=64",
    "small": "replay=none arch=small precision=float32 shots=100 mega-batches=10 epochs=40",
}
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
    also = SCALES[asked.scale][name][0].also
    return own(name, asked) + (own(also, asked) if also else [])


def own(name: str, asked: argparse.Namespace) -> list[Run]:
    """The runs of a table itself, seed by seed, each row for each data set before the next seed."""
    runs = []
    for dataset in datasets(name, asked):
        parts = parts_of(name, dataset, asked)
        for row in rows_of(parts, asked):
            seeds = [seed for part in parts if row in part.rows for seed in part.seeds]
            runs += [Run(row, dataset, seed) for seed in asked.seeds or seeds or parts[0].seeds]
    order = asked.seeds or sorted({run.seed for run in runs})
    return sorted(runs, key=lambda run: order.index(run.seed))


def rows_of(parts: list[Part], asked: argparse.Namespace) -> list[str]:
    """The rows of the parts, each once; of asked methods, each with the options of every part."""
    methods = [method.replace("+", " ") for method in asked.methods]
    rows: list[str] = []
    for part in parts:
        if not methods:
            rows += part.rows
        elif part.methods:
            rows += joined(methods, part.options)
        else:
            rows += [row for row in part.besides if row.split()[0] in methods]
    return [*dict.fromkeys(rows)]


def parts_of(name: str, dataset: str, asked: argparse.Namespace) -> list[Part]:
    """The parts of a table for a data set.

    Those that name it; if there are none, those that name a copy of it, as cifar10-jpeg is one of cifar10;
    else those of the data set that comes first.
    """
    parts = SCALES[asked.scale][name]
    for fits in (
        lambda part: part.dataset == dataset,
        lambda part: part.dataset.split("-")[0] == dataset,
    ):
        if found := [part for part in parts if fits(part)]:
            return found
    return [part for part in parts if part.dataset == parts[0].dataset]


def datasets(name: str, asked: argparse.Namespace) -> list[str]:
    if asked.datasets:
        return asked.datasets
    if named := [part.dataset for part in SCALES[asked.scale][name] if part.dataset]:
        return [*dict.fromkeys(named)]
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
        parser.exit(2, f"SCALE: expected {', '.join(SCALES)}, not {asked.scale}\n")
    there = SCALES[asked.scale]
    if asked.tables == ["all"]:  # but generations, not the paper's, is only rendered by it
        asked.tables = [name for name in there if asked.incomplete or name != "generations"]
    if unknown := [name for name in asked.tables if name not in there]:
        parser.exit(2, f"{unknown[0]}: SCALE={asked.scale} does not have it, only {', '.join(there)}\n")
    narrowing = ["methods", "seeds", "args"]
    if asked.scale in ("paper", "narrow"):  # which name their data sets; at the others DATASETS= does
        narrowing.append("datasets")
    narrowed = [name for name in narrowing if getattr(asked, name)]
    if asked.incomplete and narrowed and not asked.out:
        parser.exit(
            2, f"{narrowed[0].upper()}: expected OUT=<folder> too, or the tables in results/ would shrink\n"
        )
    by_default = f"results/{asked.scale}" if asked.incomplete else f"runs/{asked.scale}"
    asked.out = asked.out or ("demo" if asked.scale == "demo" else by_default)
    asked.words = words
    return asked
