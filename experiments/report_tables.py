"""Rows of runs as Markdown tables.

Enters: rows, of rows.py, and the paper's numbers. Leaves: text.
"""

from typing import NamedTuple

from experiments.claims import is_of
from experiments.differences import paired, paired_p, pooled_p, spread, warm_start_of, with_interval
from experiments.measure import EPSILONS, SIGMAS
from experiments.rows import NAMES, Row


class Column(NamedTuple):
    title: str
    path: tuple
    digits: int = 2
    printed: str = ""  # the paper's, in paper.json
    paired: bool = False  # with the differences to warm start
    signed: bool = False  # a difference itself: with its interval


ACCURACY = ("totals", "test_accuracy")
MAIN = [
    Column("Test accuracy, %", ACCURACY, printed="test_acc", paired=True),
    Column("Mean over the stream, %", ("totals", "stream_accuracy"), paired=True),
    Column("CER", ("totals", "cer"), 0, printed="cer"),
    Column("Gap, points", ("totals", "generalization_gap"), printed="gap"),
    Column("ECE, %", ("totals", "ece")),
    Column("Image passes", ("totals", "image_passes"), 0),
    Column("Training, s", ("totals", "seconds"), 0),
]
FIRST = Column("After mega-batch 1, %", ("mega_batches", 0, "test", "accuracy"), paired=True)
ATTACKS = [Column(f"At ε = {e}/255, %", ("pgd", f"{e}/255"), paired=e == 2) for e in EPSILONS]
NOISES = [Column("Without noise, %", ("weight_noise", "0"))]
NOISES += [Column(f"Drop at σ = {s}, points", ("noise_drop", f"{s}"), paired=s == 0.02) for s in SIGMAS[1:]]
COLUMNS = {
    "generations": [column for column in MAIN if column.path[1] not in ("stream_accuracy", "cer", "seconds")],
    "where-from": [FIRST, *MAIN],
    "forgetting": [
        Column("Before, %", ("forgetting", "before")),
        Column("Right after, %", ("forgetting", "after")),
        Column("Right after − before [95 %]", ("forgetting", "cost"), signed=True),
        Column("Relearned, %", ("forgetting", "relearned"), paired=True),
        Column("Training accuracy then, %", ("forgetting", "trained")),
    ],
    "figure2": [Column("mCA, %", ("corruptions", "mean"), printed="mca", paired=True)],
    "figure3": ATTACKS,
    "figure4": [Column("ECE, %", ("ece",), paired=True)],
    "figure5": NOISES,
}
BASELINE_NOTE = (
    "‡ The paper's baseline. The authors' code trains it without the decay (gamma 1) and LURE with it; the "
    'paper says of the decay that it is "of our method".'
)


def options_apart(rows: list[Row]) -> list[str]:
    """The options in which these rows differ; of all rows that were read, others may differ in more."""
    return [key for key in rows[0].options if len({str(row.options[key]) for row in rows}) > 1]


def table(rows: list[Row], columns: list[Column], published: list[dict]) -> str:
    """Markdown: the rows, the paper's numbers beside those that they fit best, then what else it has."""
    entries = with_published(rows, shown_there(columns, published))
    printed = {column for column in columns if any(column.printed in p for _, p in entries)}
    options = options_apart(rows)
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
            text = with_interval if column.signed else spread
            cells.append(text(values, column.digits) if values else "–")
            if column in printed:
                cells.append(number_of(p, column))
            if column.paired:
                warm_start = warm_start_of(row, rows)
                differences = paired(row, warm_start, *column.path) if warm_start else []
                cells.append(with_interval(differences, column.digits) if differences else "–")
        lines.append(cells)
    return markdown(head, lines)


def shown_there(columns: list[Column], published: list[dict]) -> list[dict]:
    """The rows of the paper's that print a number of these columns."""
    return [p for p in published if any(column.printed in p for column in columns)]


def with_published(rows: list[Row], published: list[dict]) -> list[tuple[Row, dict]]:
    """Each row with the paper's that it fits best, or with none; then the paper's that are beside no row.

    Beside a run of a part of the images stands none.
    """
    beside = {}
    rest = []
    for p in published:
        fitting = [row for row in rows if is_of(row, p) and not is_of_a_part(row)]
        if fitting:
            best = min(fitting, key=lambda row: len(row.named))
            tested = 3_450 if p["dataset"] == "restricted-imagenet" else 10_000
            other = {"cer"} if best.records[0]["data"]["test"] != tested else {}  # a count of other images
            beside[best.label] = {key: value for key, value in p.items() if key not in other}
        else:
            rest.append((Row(p["method"], p, {}, [], {}), p))
    return [*((row, beside.get(row.label, {})) for row in rows), *rest]


def is_of_a_part(row: Row) -> bool:
    return bool(row.config["limit"] or row.config["limit_test"])


def number_of(published: dict, column: Column) -> str:
    """What the paper prints; ‡ tells that its baseline is not of one schedule with LURE in the code."""
    number = published.get(column.printed, "–")
    if isinstance(number, str):
        return number
    return f"{number:.{column.digits}f}" + " ‡" * (published["method"] == "warm-start")


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


def one_schedule_table(rows: list[Row]) -> str:
    """Markdown: which rows differ from one schedule as long, and LURE from chance, by one error for all.

    p is two-sided, of the difference in test accuracy: by the pooled error of all rows, and by the two rows'
    own differences. Corrected is by Bonferroni for all comparisons with one schedule, or for one on top.
    """
    whole = [row for row in rows if row.in_one_schedule]
    if not whole or any(len(row.values(*ACCURACY)) < 2 for row in rows):
        return ""
    others = [row for row in rows if row is not whole[0]]
    pairs = [(row, whole[0], len(others)) for row in others]
    by_method = {row.method: row for row in others}
    if {"lure", "random"} <= by_method.keys():
        pairs.append((by_method["lure"], by_method["random"], len(others) + 1))
    lines = []
    for row, other, number in pairs:
        differences = paired(row, other, *ACCURACY)
        pooled = pooled_p(row, other, rows, *ACCURACY)
        corrected = [min(1, number * p) for p in (pooled, paired_p(differences))]
        side = "above" if sum(differences) > 0 else "below"
        word = side if corrected[0] < 0.05 else "undecided"
        ps = [f"{p:.3f}" for p in (pooled, *corrected)]
        lines.append([f"{row.label} − {other.label}", *ps, word])
    head = ["Test accuracy", "p, pooled", "corrected", "p, paired, corrected", "by the pooled p, corrected"]
    return markdown(head, lines)


def reestimated_table(rows: list[Row]) -> str:
    """Markdown: accuracy around forgetting with running statistics taken anew, of the runs that have it."""
    lines = []
    for row in rows:
        anew = row.by_seed("forgetting", "anew")
        if not anew:
            continue
        of = [row.by_seed("forgetting", key) for key in ("before", "after")]
        cells = [row.label, str(len(anew))]
        for when, there in zip(("before", "after"), of, strict=True):
            cells.append(spread([there[seed] for seed in anew]))
            cells.append(spread([values[when] for values in anew.values()]))
        costs = [values["after"] - values["before"] for values in anew.values()]
        lines.append([*cells, with_interval(costs)])
    head = ["With running statistics", "Seeds", "Before, as they are, %", "Before, taken anew, %"]
    head += ["Right after, as they are, %", "Right after, taken anew, %", "Right after − before, anew [95 %]"]
    return markdown(head, lines) if lines else ""


MORE = {
    "forgetting": [reestimated_table, shares_table],
    "generations": [differences_table, one_schedule_table, forgotten_table],
}
