"""Rows of runs as Markdown tables."""

from typing import NamedTuple

from evaluate import EPSILONS, SIGMAS
from experiments.claims import is_of, paired, spread, warm_start_of, with_interval
from experiments.rows import NAMES, Row


class Column(NamedTuple):
    title: str
    path: tuple
    digits: int = 2
    printed: str = ""  # the paper's, in paper.json
    paired: bool = False  # with the differences to warm start


MAIN = [
    Column("Test accuracy, %", ("totals", "test_accuracy"), printed="test_acc", paired=True),
    Column("CER", ("totals", "cer"), 0, printed="cer"),
    Column("Gap, points", ("totals", "generalization_gap"), printed="gap"),
    Column("ECE, %", ("totals", "ece")),
    Column("Image passes", ("totals", "image_passes"), 0),
    Column("Training, s", ("totals", "seconds"), 0),
]
ATTACKS = [Column(f"At ε = {e}/255, %", ("pgd", f"{e}/255"), paired=e == 2) for e in EPSILONS]
NOISES = [Column("Without noise, %", ("weight_noise", "0"))]
NOISES += [Column(f"Drop at σ = {s}, points", ("noise_drop", f"{s}"), paired=s == 0.02) for s in SIGMAS[1:]]
COLUMNS = {
    "generations": [column for column in MAIN if column.path[1] not in ("cer", "seconds")],
    "forgetting": [
        Column("Before, %", ("forgetting", "before")),
        Column("Right after, %", ("forgetting", "after")),
        Column("Relearned, %", ("forgetting", "relearned"), paired=True),
        Column("Training accuracy then, %", ("forgetting", "trained")),
    ],
    "figure2": [Column("mCA, %", ("corruptions", "mean"), printed="mca", paired=True)],
    "figure3": ATTACKS,
    "figure4": [Column("ECE, %", ("ece",), paired=True)],
    "figure5": NOISES,
}


def differing(rows: list[Row]) -> list[str]:
    """The options in which these rows differ; of all rows that were read, others may differ in more."""
    return [key for key in rows[0].options if len({str(row.options[key]) for row in rows}) > 1]


def table(rows: list[Row], columns: list[Column], published: list[dict]) -> str:
    """Markdown: the rows, the paper's numbers beside those that they fit best, then what else it has."""
    published = [p for p in published if any(column.printed in p for column in columns)]
    beside, rest = {}, []
    for p in published:
        if fitting := [row for row in rows if is_of(row, p)]:
            best = min(fitting, key=lambda row: len(row.named))
            tested = 3_450 if p["dataset"] == "restricted-imagenet" else 10_000
            other = {"cer"} if best.records[0]["data"]["test"] != tested else {}  # a count of other images
            beside[best.label] = {key: value for key, value in p.items() if key not in other}
        else:
            rest.append((Row(p["method"], p, {}, []), p))
    entries = [*((row, beside.get(row.label, {})) for row in rows), *rest]
    printed = {column for column in columns if any(column.printed in p for _, p in entries)}

    options = differing(rows)
    head = ["Method", *(key.replace("_", "-") for key in options), "Seeds"]
    for column in columns:
        head += [column.title] + ["paper"] * (column in printed)
        head += [f"{column.title.split(',')[0]} − warm start's [95 %]"] * column.paired
    lines = []
    for row, p in entries:
        n, shown = len(row.records), [row.options.get(key) for key in options]
        cells = [
            NAMES[row.method],
            *("–" if v is None else f"{v:g}" if type(v) is float else str(v) for v in shown),
            f"{n}{' †' * (n < 3)}" if n else "–",
        ]
        for column in columns:
            values = row.values(*column.path)
            cells.append(spread(values, column.digits) if values else "–")
            if column in printed:
                number = p.get(column.printed, "–")
                cells.append(number if isinstance(number, str) else f"{number:.{column.digits}f}")
            if column.paired:
                warm_start = warm_start_of(row, rows)
                differences = paired(row, warm_start, *column.path) if warm_start else []
                cells.append(with_interval(differences, column.digits) if differences else "–")
        lines.append(cells)
    return markdown(head, lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    rule = [":---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, rule, *lines))


def shares_table(rows: list[Row]) -> str:
    """Markdown: the share of each weight tensor that was redrawn, for the rows that redraw by a mask."""
    rows = [row for row in rows if row.values("shares")]
    if not rows:
        return ""
    lines = [
        [name.removesuffix(".weight"), *(spread(row.values("shares", name), 1) for row in rows)]
        for name in rows[0].values("shares")[0]
    ]
    return markdown(["Redrawn of, %", *(row.label for row in rows)], lines)


def forgotten_table(rows: list[Row]) -> str:
    """Markdown: the test accuracy right after each forgetting, for the rows that forget."""
    rows = [row for row in rows if row.values("mega_batches", 0, "forgotten", "accuracy")]
    times = range(max((len(row.records[0]["mega_batches"]) for row in rows), default=1) - 1)
    lines = [
        [row.label, *(spread(row.values("mega_batches", i, "forgotten", "accuracy"), 1) for i in times)]
        for row in rows
    ]
    return markdown(["Right after forgetting, %", *(f"after generation {i + 1}" for i in times)], lines)


def differences_table(rows: list[Row]) -> str:
    """Markdown: the test accuracy minus that of LURE by chance and of one schedule, where they are."""
    others = [row for row in rows if row.method == "random" or row.in_one_schedule]
    head, lines = ["Test accuracy", *(f"− {row.label}'s [95 %]" for row in others)], []
    for row in rows:
        differences = [paired(row, o, "totals", "test_accuracy") if o is not row else [] for o in others]
        lines.append([row.label, *(with_interval(d) if d else "–" for d in differences)])
    return markdown(head, lines) if others else ""


MORE = {"forgetting": [shares_table], "generations": [differences_table, forgotten_table]}
