"""The tables of runs beside the paper's, with their figures and the paper's claims, and the overview of all.

python -m experiments.report table3 --scale small --data photos/cifar10-jpeg    # what make ends with
python -m experiments.report overview                                           # results/README.md

Enters: the records of a table's runs, results/paper.json. Leaves: <table>.md and its pictures.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

from experiments import tables
from experiments.claims import primary, verdict
from experiments.command import DataError, guarded
from experiments.figures import FIGURES
from experiments.files import write, write_text
from experiments.report_tables import (
    BASELINE_NOTE,
    COLUMNS,
    MAIN,
    MORE,
    Column,
    options_apart,
    shown_there,
    table,
)
from experiments.rows import Row, load_rows, split_measured
from experiments.runs import differing, read_record

RESULTS = Path(__file__).parent.parent / "results"
SHOWN = ("paper", "narrow", "small", "precision")  # its folders, in the overview's order
TITLES = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG copy)", "cifar100": "CIFAR-100"}
TITLES |= {"cifar10-lossless": "CIFAR-10", "cifar100-lossless": "CIFAR-100"}
TITLES |= {"restricted-imagenet": "Restricted ImageNet", "digits": "Digits"}
SUBJECTS = {
    "table1": "full replay",
    "table2": "buffered replay",
    "table3": "no replay",
    "table4": "long sequences",
    "table5": "few-shot",
    "table6": "architectures",
    "table7": "share of the weights that is kept",
    "table8": "criterion of importance",
    "table9": "noisy labels",
    "figure2": "corruptions",
    "figure3": "attack by PGD-10",
    "figure4": "reliability and calibration error",
    "figure5": "noise on the weights",
    "figure6": "learning rate and weight decay",
    "where-from": "method, schedule or choice of the epoch",
    "cost": "accuracy and errors against image passes",
    "forgetting": "accuracy before and right after forgetting, and after relearning",
    "generations": "forget and relearn on one data set",
    "precision": "of training",
    "demo": "LURE beside warm start, S&P and scratch, on digits",
}
NOTES = {  # above the tables of a scale
    ("narrow", "table1"): "LLF and S&P are not measured at this scale.",
    ("narrow", "figure2"): "All corruptions are made from the JPEG copy of CIFAR-10.",
}
NAMED = """| Named before the runs | seeds | LURE − warm start over the stream [95 %] | [97.5 %] | verdict |
| :--- | :--- | :--- | :--- | :--- |
"""
CLAIMS = """| The paper's claim | where | tested | difference [95 %] | verdict | intervals |
| :--- | :--- | :--- | :--- | :--- | ---: |
"""


# ------------------------------------------------------------ Reports
def report(out: Path, runs: list[tuple[str, Path]], scale: str, incomplete: bool = False) -> str:
    """Write `out`, a table of runs beside the paper's of its name, and its figure, NAME-DATASET.png.

    `runs`: for each its row, "METHOD OPTION=VALUE ...", and its record, in a folder named after the data set.
    If it may be incomplete, runs that are not there are named in it, and with none there nothing is written.
    Runs elsewhere than in results/ stand beside those there of the same name.
    """
    if not runs:
        raise DataError("expected records of runs; found none")
    absent = {path for _, path in runs if incomplete and not path.exists()}
    parts: list[Part] = []
    for dataset in dict.fromkeys(path.resolve().parent.name for _, path in runs if path not in absent):
        of_dataset = [run for run in runs if run[1].resolve().parent.name == dataset]
        parts += part_of(out, dataset, of_dataset, absent, scale, incomplete)
    if not parts:
        return f"nothing has been measured yet for {out.stem}"
    note = NOTES.get((scale, out.stem))
    texts = [f"{note}\n"] if note else []
    texts += [part.text for part in parts]
    texts += beside_committed([path for _, path in runs if path not in absent], RESULTS / scale)
    for head, lines in (
        (NAMED, [part.primary for part in parts]),
        (CLAIMS, [part.claims for part in parts]),
    ):
        if "".join(lines):
            texts.append(head + "".join(lines))
    text = "\n".join(texts)
    write_text(out, text)
    return text


class Part(NamedTuple):
    """Of a report: one data set's text, and its lines of the two tables of claims."""

    text: str
    primary: str
    claims: str


def part_of(
    out: Path, dataset: str, runs: list, absent: set[Path], scale: str, incomplete: bool
) -> list[Part]:
    """A data set's part of a report, whose figure it draws; none if nothing is there and that may be."""
    name = out.stem
    title = TITLES.get(dataset, dataset)
    columns = COLUMNS.get(name, MAIN)
    paper = json.loads((RESULTS / "paper.json").read_text())
    printed, notes = published(paper, name, dataset)

    # The rows that this table shows, and what is missing of it.
    rows = load_rows([run for run in runs if run[1] not in absent])
    measured, others = split_measured(rows, [column.path for column in columns])
    missing = [path for _, path in runs if path in absent]
    if name != "figure3" or not any(row.config["label_noise"] for row in others):
        missing += [record["path"] for row in others for record in row.records]
        others = []  # in figure 3 they are its other half
    if not measured and incomplete:
        return []
    if not measured:
        who = "newer runs measure" if name == "forgetting" else "evaluate.py measures"
        raise DataError(f"{missing[0]}: expected what {who}")

    # Figure, tables, notes.
    if name in FIGURES:
        also = ", and noisy labels" if others else ""
        where = f"{headline(name)}{also} ({scale}, {title})"
        draw(name, out.with_name(f"{name}-{dataset}.png"), where, measured, printed, others)
    texts = [f"{caption(title, measured, columns)}\n\n{table(measured, columns, printed)}"]
    if any(p["method"] == "warm-start" for p in shown_there(columns, printed)):
        texts.append(f"{BASELINE_NOTE}\n")
    texts += [text for more in MORE.get(name, []) if (text := more(measured))]
    if printed and notes:
        texts.append("".join(f"- In the paper, {note}.\n" for note in notes))
    if missing:
        texts.append(f"Not measured: {', '.join(f'`{path.stem}`' for path in missing)}.\n")

    # What becomes of claims.
    where = headline(name).split(":")[0]
    named = [line(f"{where}, {title}", *cells) for cells in primary(name, dataset, rows) if scale == "narrow"]
    claims = []
    for claim in paper["claims"]:
        if claim["table"] == name and (result := verdict(claim, rows)):
            claims.append(line(claim["claim"], where, f"{scale}, {title}", *map(str, result)))
    return [Part("\n".join(texts), "".join(named), "".join(claims))]


def beside_committed(paths: list[Path], folder: Path) -> list[str]:
    """A table of the runs and of those of the same name in the folder of results; none if they are these."""
    lines = []
    for path in paths:
        other = folder / path.resolve().parent.name / path.name
        if other.resolve() == path.resolve() or not other.exists():
            continue
        here = read_record(path)
        there = read_record(other)
        accuracy = here["totals"]["test_accuracy"]
        committed = there["totals"]["test_accuracy"]
        if odd := differing(there, here, ("precision",), {"precision"}):  # what it ran in, by whatever option
            told = ("–", f"not compared: {odd[0]} here")
        else:
            told = (f"{accuracy - committed:+.2f}", f"{there['device']}, {there['precision']}")
        lines.append(line(f"{path.parent.name}/{path.stem}", f"{accuracy:.2f}", f"{committed:.2f}", *told))
    if not lines:
        return []
    head = line("Run", "here, %", "committed, %", "difference", "committed on")
    text = "Your runs beside the committed ones of the same options, seed and data, by final test accuracy:"
    return [f"{text}\n\n{head}| :--- | ---: | ---: | ---: | :--- |\n{''.join(lines)}"]


def published(paper: dict, name: str, dataset: str) -> tuple[list[dict], list[str]]:
    """The paper's rows of a table that are of the data set or of what it is a copy of, and its notes."""
    source = "table9" if name == "figure3" else name  # half of that figure is that table
    there = paper["tables"].get(source, {"rows": []})
    known = next((n for n in ("cifar100", "cifar10", "restricted-imagenet") if dataset.startswith(n)), "")
    return [p for p in there["rows"] if p["dataset"] == known], there.get("notes", [])


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def draw(name: str, path: Path, title: str, *rows) -> None:
    """Draw what FIGURES has of that name, of the rows that it takes, and write it."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    bars = FIGURES[name](figure, *rows)
    figure.suptitle(f"{title}; {bars}", fontsize=9, wrap=True)
    write(path, partial(figure.savefig, format="png", dpi=130))


def pictures_of(out: Path) -> list[Path]:
    """The figures beside a report, one for each data set."""
    return sorted(out.parent.glob(f"{out.stem}-*.png"))


def headline(name: str) -> str:
    return f"{re.sub(r'(?<=e)(?=[0-9])', ' ', name).capitalize()}: {SUBJECTS.get(name, 'runs')}"


def caption(title: str, rows: list[Row], columns: list[Column]) -> str:
    records = [record for row in rows for record in row.records]
    config, data = records[0]["config"], records[0]["data"]
    same = {
        "arch": config["arch"],
        "mega_batches": f"{config['mega_batches']} mega-batches",
        "epochs": f"{config['epochs']} epoch{'s' * (config['epochs'] > 1)} each",
        "replay": f"replay {config['replay']}",
    }
    words = [text for key, text in same.items() if key not in options_apart(rows)]
    sizes = sorted({(r["data"]["train"], r["data"]["test"]) for r in records})
    words += [f"{' or '.join(str(n) for n, _ in sizes)} training and {data['test']} test images"]
    if config["image_size"]:
        words += [f"{config['image_size']}×{config['image_size']} pixels"]
    if any(column.path[0] == "corruptions" for column in columns):
        words += [
            f"{records[0]['images_per_severity']} images of CIFAR-10-C for each corruption and severity"
        ]
    machines = sorted({f"{r['device']}, {r['precision']}, torch {r['versions']['torch']}" for r in records})
    return (
        f"{title}: {', '.join(words)}; {'; '.join(machines)}. Mean ± sample standard deviation over seeds "
        "(† fewer than three); differences seed by seed, with the 95 % t interval of their mean."
    )


def overview(folder: Path) -> str:
    """Write folder/README.md: the claims, then all reports, from its subfolders, one for each scale."""
    parts = []
    named = []
    claims = []
    for scale in SHOWN:
        for name in tables.SCALES[scale]:
            path = folder / scale / f"{name}.md"
            if path.exists():
                rest, _, lines = path.read_text().partition(CLAIMS)
                claims.append(lines)
                shown_tables, _, lines = rest.partition(NAMED)
                named.append(lines.rstrip("\n"))
                shown = "".join(f"![{headline(name)}]({scale}/{i.name})\n\n" for i in pictures_of(path))
                parts.append(f"## {headline(name)} ({scale})\n\n{shown}{shown_tables.rstrip()}\n")
    if not parts:
        raise DataError(f"{folder}: expected reports in paper, narrow, small or precision; found none")
    told = "".join(claims)
    counts = [int(line.split("|")[-2]) for line in told.splitlines()]
    number = f"{len(counts)} tests of claims, by {sum(counts)} intervals."
    introduction = (Path(__file__).parent / "overview.md").read_text()
    lines = "".join(f"{of}\n" for of in named if of)
    first = f"{NAMED}{lines}" if lines else "None of their runs is there.\n"
    text = f"{introduction}\n{first}\n## The paper's claims\n\n{number}\n\n{CLAIMS}{told}\n" + "\n".join(
        parts
    )
    write_text(folder / "README.md", text)
    return text


# ------------------------------------------------------------ Command line
def main(argv=None) -> int:
    """The command line, that of experiments/tables.py; its status is that of `guarded`."""
    argv = sys.argv[1:] if argv is None else argv

    def call():
        if argv[:1] == ["overview"]:
            return overview(RESULTS)
        asked = tables.arguments(argv)
        for name in asked.tables:
            runs = [(run.row, Path(run.path(asked.out))) for run in tables.planned(name, asked)]
            out = Path(asked.out) / f"{name}.md"
            text = report(out, runs, asked.scale, asked.incomplete)
            print(text, out, *pictures_of(out), sep="\n")

    return guarded("report.py", call)


if __name__ == "__main__":
    sys.exit(main())
