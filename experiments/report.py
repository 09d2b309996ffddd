"""The tables of runs beside the paper's, with their figures and the paper's claims, and the overview of all.

python -m experiments.report table3 --scale small --data photos/cifar10-jpeg    # what make ends with
python -m experiments.report overview                                           # results/README.md
"""

import json
import re
import sys
from functools import partial
from pathlib import Path

from experiments import tables
from experiments.claims import verdict
from experiments.command import guarded
from experiments.data import DataError
from experiments.figures import FIGURES
from experiments.files import write, write_text
from experiments.report_tables import COLUMNS, MAIN, MORE, Column, differing, table
from experiments.rows import Row, load_rows, split_measured

RESULTS = Path(__file__).parent.parent / "results"
SCALES = ("paper", "narrow", "small", "precision")  # its folders, in the overview's order
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
    "figure3": "attack by PGD-10, and noisy labels",
    "figure4": "reliability and calibration error",
    "figure5": "noise on the weights",
    "figure6": "learning rate and weight decay",
    "where-from": "method, schedule or choice of the epoch",
    "cost": "accuracy and errors against image passes",
    "forgetting": "accuracy before and right after forgetting, and after relearning",
    "generations": "forget and relearn on one data set",
    "precision": "of training",
    "demo": "all methods",
}
CLAIMS = """| The paper's claim | where | tested | difference [95 %] | | intervals |
| :--- | :--- | :--- | :--- | :--- | ---: |
"""


# ------------------------------------------------------------ Reports
def report(out: Path, runs: list[tuple[str, Path]], incomplete: bool = False) -> str:
    """Write `out`, a table of runs beside the paper's of its name, and its figure, NAME-DATASET.png.

    `runs`: for each its row, "METHOD OPTION=VALUE ...", and its record, in a folder named after the data set.
    If it may be incomplete, runs that are not there are named in it, and with none there nothing is written.
    """
    name, scale = out.stem, out.resolve().parent.name
    paper = json.loads((RESULTS / "paper.json").read_text())
    source = "table9" if name == "figure3" else name  # half of that figure is that table
    printed_there = paper["tables"].get(source, {"rows": []})
    published, notes = printed_there["rows"], printed_there.get("notes", [])
    columns, parts, lines = COLUMNS.get(name, MAIN), [], []
    absent = [path for _, path in runs if incomplete and not path.exists()]
    if not runs:
        raise DataError("expected records of runs; found none")
    for dataset in dict.fromkeys(path.resolve().parent.name for _, path in runs if path not in absent):
        here = [run for run in runs if run[1].resolve().parent.name == dataset]
        rows = load_rows([run for run in here if run[1] not in absent])
        known = next((n for n in ("cifar100", "cifar10", "restricted-imagenet") if dataset.startswith(n)), "")
        printed, title = [p for p in published if p["dataset"] == known], TITLES.get(dataset, dataset)
        measured, others = split_measured(rows, [column.path for column in columns])
        missing = [path for _, path in here if path in absent]
        if name != "figure3" or not any(row.config["label_noise"] for row in others):
            missing += [record["path"] for row in others for record in row.records]
            others = []  # in figure 3 they are its other half
        if not measured and incomplete:
            continue
        if not measured:
            who = "newer runs measure" if name == "forgetting" else "evaluate.py measures"
            raise DataError(f"{missing[0]}: expected what {who}")
        if name in FIGURES:
            where = f"({scale}, {title})"
            draw(name, out.with_name(f"{name}-{dataset}.png"), where, measured, printed, others)
        parts.append(f"{caption(title, measured, columns)}\n\n{table(measured, columns, printed)}")
        parts += [more(measured) for more in MORE.get(name, [])]
        parts += ["".join(f"- In the paper, {note}.\n" for note in notes)] * bool(printed and notes)
        parts += [f"Not measured: {', '.join(f'`{path.stem}`' for path in missing)}.\n"] * bool(missing)
        for claim in paper["claims"]:
            if claim["table"] == name and (result := verdict(claim, rows)):
                cells = [claim["claim"], headline(name).split(":")[0], f"{scale}, {title}", *map(str, result)]
                lines.append(f"| {' | '.join(cells)} |\n")
    text = "\n".join(parts) + (f"\n{CLAIMS}{''.join(lines)}" if lines else "")
    if text:
        write_text(out, text)
    return text or f"nothing has been measured yet for {name}"


def draw(name: str, path: Path, where: str, *rows) -> None:
    """Draw what FIGURES has of that name, of the rows that it takes, and write it."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FIGURES[name](figure, *rows)
    figure.suptitle(f"{headline(name)} {where}", fontsize=9)
    write(path, partial(figure.savefig, format="png", dpi=130))


def headline(name: str) -> str:
    return f"{re.sub(r'(?<=e)(?=[0-9])', ' ', name).capitalize()}: {SUBJECTS.get(name, 'runs')}"


def caption(title: str, rows: list[Row], columns: list[Column]) -> str:
    records = [record for row in rows for record in row.records]
    config, data = records[0]["config"], records[0]["data"]
    same = {
        "arch": config["arch"],
        "mega_batches": f"{config['mega_batches']} mega-batches",
        "epochs": f"{config['epochs']} epochs each",
        "replay": f"replay {config['replay']}",
    }
    words = [text for key, text in same.items() if key not in differing(rows)]
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
    parts, claims = [], []
    for scale in SCALES:
        for name in tables.SCALES[scale]:
            path = folder / scale / f"{name}.md"
            if path.exists():
                shown_tables, _, lines = path.read_text().partition(CLAIMS)
                claims.append(lines)
                images = sorted(path.parent.glob(f"{name}-*.png"))
                shown = "".join(f"![{headline(name)}]({scale}/{i.name})\n\n" for i in images)
                parts.append(f"## {headline(name)} ({scale})\n\n{shown}{shown_tables.rstrip()}\n")
    if not parts:
        raise DataError(f"{folder}: expected reports in paper, narrow, small or precision; found none")
    told = "".join(claims)
    counts = [int(line.split("|")[-2]) for line in told.splitlines()]
    number = f"{len(counts)} tests of claims, by {sum(counts)} intervals."
    introduction = (Path(__file__).parent / "overview.md").read_text()
    text = f"{introduction}\n{number}\n\n{CLAIMS}{told}\n" + "\n".join(parts)
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
            print(report(out, runs, asked.incomplete), out, sep="\n")

    return guarded("report.py", call)


if __name__ == "__main__":
    sys.exit(main())
