"""The figures of the reports.

Enters: a matplotlib figure, the rows that were measured, the paper's rows, and rows that are not measured.
Leaves: the figure, drawn; each function returns what its error bars are.
"""

import statistics
from functools import cache

import torch

from baselines import METHODS
from evaluate import CORRUPTIONS
from experiments.claims import is_of
from experiments.differences import interval, mean_and_error, paired, spread, warm_start_of
from experiments.measure import EPSILONS, SHARES, SIGMAS
from experiments.rows import NAMES, Row, word
from experiments.tables import SCALES

DEVIATION = "bars: ± standard deviation over seeds"
COLORS = [*(f"C{i}" for i in range(10)), "black", "gold", "navy"]
MARKERS = "os^vD<>pP*Xhd"
LINES = ("-", "--", ":", "-.")
FILLINGS = ("none", "left", "bottom", "right", "top")


@cache
def told_in_tables() -> list[tuple[str, ...]]:
    """What tells rows from others of their method, in all tables at all scales: first of all, nothing."""
    told: dict[tuple[str, ...], None] = {(): None}
    for scale in SCALES.values():
        for parts in scale.values():
            options = [row.split()[1:] for part in parts for row in part.rows]
            shared = {option for option in options[0] if all(option in other for other in options)}
            for own in options:
                told[tuple(option.replace("=", " ", 1) for option in own if option not in shared)] = None
    return [*told]


def look_of(row: Row, rows: list[Row]) -> dict:
    """Colour and marker by the method, line and filling by the options: the same in all figures."""
    i = [*METHODS].index(row.method) % len(COLORS)
    known = told_in_tables()
    told = tuple(word(*pair) for pair in row.told.items())
    if told in known:
        place = known.index(told)
    else:  # a row of the caller's
        place = [other.label for other in rows if other.method == row.method].index(row.label)
    look = dict(color=COLORS[i], marker=MARKERS[i], ls=LINES[place % len(LINES)])
    return look | ({"fillstyle": FILLINGS[place // len(LINES) % len(FILLINGS)]} if place else {})


def draw_line(axes, x, samples: list[list[float]], **look) -> None:
    """Mean and standard deviation of the samples against x."""
    means, errors = zip(*(mean_and_error(sample) for sample in samples), strict=True)
    axes.errorbar(x, means, errors, ms=4, lw=1.2, capsize=2, **look)
    axes.legend(fontsize=7)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return {row.method: [r for r in rows if r.method == row.method] for row in rows}


# ------------------------------------------------------------ Accuracy over the stream
def anytime(figure, rows, published, others):
    axes = figure.subplots()
    axes.set(xlabel="mega-batches seen", ylabel="test accuracy, %")
    axes.locator_params(axis="x", integer=True)
    for row in rows:
        x = range(1, len(row.records[0]["mega_batches"]) + 1)
        samples = [row.values("mega_batches", i - 1, "test", "accuracy") for i in x]
        draw_line(axes, x, samples, label=row.label, **look_of(row, rows))
    return DEVIATION


def generations(figure, rows, published, others):
    """By generation; the level line is where one schedule as long ends."""
    anytime(figure, [row for row in rows if not row.in_one_schedule], published, others)
    (axes,) = figure.axes
    longest = max(row.config["mega_batches"] for row in rows)
    for row in rows:
        if row.in_one_schedule:
            ends = row.values("totals", "test_accuracy")
            draw_line(axes, [1, longest], [ends, ends], label=row.label, color="black", marker="o")
    axes.set_xlabel("generation")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return DEVIATION


def cost(figure, rows, published, others):
    figure.set_size_inches(10, 4)
    keys = {"test_accuracy": "test accuracy, %", "cer": "cumulative error (CER), images"}
    for axes, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        axes.set(xlabel="image passes", ylabel=label, xscale="log")
        for method, group in by_method(rows).items():
            x = [row.records[0]["totals"]["image_passes"] for row in group]
            samples = [row.values("totals", key) for row in group]
            draw_line(axes, x, samples, label=NAMES[method], **look_of(group[0], group))
    return DEVIATION


def rates(figure, rows, published, others):
    """A panel per method: test accuracy by learning rate and weight decay, the darker the higher."""
    groups = by_method(rows)
    lrs = sorted({row.config["lr"] for row in rows})
    decays = sorted({row.config["weight_decay"] for row in rows})
    means = [statistics.fmean(row.values("totals", "test_accuracy")) for row in rows]
    figure.set_size_inches(2 + 1.4 * len(lrs) * len(groups), 1.5 + 0.9 * len(decays))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for (method, group), axes in zip(groups.items(), panels, strict=True):
        grid = torch.full((len(decays), len(lrs)), float("nan"))
        for row in group:
            i = decays.index(row.config["weight_decay"])
            j = lrs.index(row.config["lr"])
            values = row.values("totals", "test_accuracy")
            grid[i, j] = statistics.fmean(values)
            printed = [f"\n(paper: {p['test_acc']})" for p in published if is_of(row, p)]
            color = "white" if grid[i, j] > (min(means) + max(means)) / 2 else "black"
            text = spread(values, 1) + "".join(printed)
            axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
        axes.imshow(grid.numpy(), cmap="Greys", vmin=min(means), vmax=max(means), aspect="auto")
        axes.set(title=f"{NAMES[method]}: test accuracy, %", xlabel="learning rate")
        axes.set_xticks(range(len(lrs)), [f"{lr:g}" for lr in lrs])
        axes.set_yticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    panels[0].set_ylabel("weight decay")
    return "±: standard deviation over seeds"


# ------------------------------------------------------------ Robustness and calibration
def corruptions(figure, rows, published, others):
    """Under each corruption and their mean, the difference to warm start, seed by seed."""
    figure.set_size_inches(12, 4.5)
    axes = figure.subplots()
    axes.axhline(0, color="0.6", lw=1)
    axes.set(ylabel="accuracy − warm start's, points")
    axes.set_xticks(range(20), [*CORRUPTIONS, "mean (mCA)"], rotation=40, ha="right", fontsize=8)
    compared = [(row, warm) for row in rows if (warm := warm_start_of(row, rows))]
    for i, (row, warm) in enumerate(compared):
        paths = [*(("corruption", name) for name in CORRUPTIONS), ("corruptions", "mean")]
        samples = [paired(row, warm, *path) for path in paths]
        means = [statistics.fmean(sample) for sample in samples]
        offset = 0.8 * ((i + 0.5) / len(compared) - 0.5)
        x = [place + offset for place in range(20)]
        look = look_of(row, rows) | {"ls": ""}
        if len(samples[0]) > 2:  # of two seeds it is six times as wide
            ends = [interval(sample) for sample in samples]
            errors = [high - mean for (_, high), mean in zip(ends, means, strict=True)]
            axes.errorbar(x, means, errors, ms=4, lw=0.8, label=row.label, **look)
        else:
            axes.plot(x, means, ms=4, label=row.label, **look)
        gain = published_gain(row, warm, published)
        if gain is not None:
            label = f"{row.label}, in the paper, which does not tell the replay"
            axes.plot(x[-1], gain, marker="*", ls="", ms=9, mec="black", color=look["color"], label=label)
    if compared:
        figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    else:
        axes.set_title("no warm start to compare with", fontsize=8)
    return "bars: 95 % interval of the mean over seeds, of three or more"


def published_gain(row: Row, warm: Row, published: list[dict]) -> float | None:
    """The difference in mCA that the paper prints for two rows, if it does."""
    mine = [p["mca"] for p in published if is_of(row, p)]
    theirs = [p["mca"] for p in published if is_of(warm, p)]
    return mine[0] - theirs[0] if mine and theirs and row.method != "warm-start" else None


def attack_and_noise(figure, rows, published, others):
    """By radius of the attack, and if there are rows with noisy labels, by their share."""
    figure.set_size_inches(10 if others else 6, 4)
    left, *rest = figure.subplots(1, 1 + bool(others), sharey=True, squeeze=False)[0]
    left.set(xlabel="PGD-10: radius ε, in 1/255", ylabel="test accuracy, %")
    for row in rows:
        clean = row.values("totals", "test_accuracy")
        attacked = [row.values("pgd", f"{epsilon}/255") for epsilon in EPSILONS]
        draw_line(left, [0, *EPSILONS], [clean, *attacked], label=row.label, **look_of(row, rows))
    for right in rest:
        right.set(xlabel="label noise: probability that a label is redrawn")
        for method, group in by_method(others).items():
            look = look_of(group[0], group)
            x = [row.config["label_noise"] for row in group]
            samples = [row.values("totals", "test_accuracy") for row in group]
            draw_line(right, x, samples, label=NAMES[method], **look)
            printed = [p for p in published if p["method"] == method]
            if printed:
                x = [p["label_noise"] for p in printed]
                samples = [[p["test_acc"]] for p in printed]
                label = f"{NAMES[method]}, in the paper"
                draw_line(right, x, samples, label=label, **look | {"mfc": "none", "ls": ""})
    return DEVIATION


def reliability(figure, rows, published, others):
    """Accuracy by confidence, in bins that hold 1 % of the samples or more, and the calibration error."""
    figure.set_size_inches(10, 4.5)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="0.6", lw=1, label="calibrated")
    left.set(xlabel="confidence", ylabel="accuracy, all seeds together", xlim=(0, 1), ylim=(0, 1))
    for i, row in enumerate(rows):
        bins = [{k: torch.tensor(v) for k, v in of.items()} for of in row.values("reliability")]
        count = torch.stack([of["count"] for of in bins]).sum(0)
        confidence = torch.stack([of["count"] * of["confidence"] for of in bins]).sum(0) / count
        accuracy = torch.stack([of["count"] * of["accuracy"] for of in bins]).sum(0) / count
        full = count >= 0.01 * count.sum()
        look = look_of(row, rows)
        draw_line(left, confidence[full], [[a] for a in accuracy[full].tolist()], label=row.label, **look)
        mean, error = mean_and_error(row.values("ece"))
        right.errorbar(mean, i, xerr=error, capsize=3, **look)
    right.set_yticks(range(len(rows)), [row.label for row in rows])
    right.invert_yaxis()
    right.set_xlabel("expected calibration error, %")
    return DEVIATION


def weight_noise(figure, rows, published, others):
    axes = figure.subplots()
    axes.set(xlabel="σ of the Gaussian noise on every weight", ylabel="accuracy on the training images, %")
    for row in rows:
        samples = [row.values("weight_noise", f"{sigma}") for sigma in SIGMAS]
        draw_line(axes, SIGMAS, samples, label=row.label, **look_of(row, rows))
    return DEVIATION


# ------------------------------------------------------------ Forgetting
CRITERIA = {"lure": "SNIP (LURE)", "fisher": "Fisher", "magnitude": "magnitude", "random": "LURE by chance"}
AROUND: dict[tuple, tuple[str, dict]] = {
    ("before",): ("before", dict(color="0.5", marker="|", ms=12)),
    ("after",): ("right after forgetting", dict(color="C3", marker="v")),
    ("anew", "after"): (
        "right after, running statistics taken anew",
        dict(color="C3", marker="v", mfc="white"),
    ),
    ("relearned",): ("after relearning", dict(color="C0", marker="o")),
}


def forgetting(figure, rows, published, others):
    """Accuracy around forgetting, and right after redrawing more or less of LURE's network at its end."""
    redrawn = [row for row in rows if row.method == "lure" and row.values("redrawing")][:1]
    left, *rest = figure.subplots(1, 1 + len(redrawn), squeeze=False)[0]
    figure.set_size_inches(6.5 + 5.5 * len(rest), 1.5 + max(3, 0.35 * len(rows)))
    around(left, rows)
    for right, row in zip(rest, redrawn, strict=True):
        redrawing(right, row)
    return DEVIATION


def around(axes, rows: list[Row]) -> None:
    """A line for each row; what lies far below the others stands at the left edge, as a number."""
    lasting = [
        statistics.fmean(row.values("forgetting", key)) for row in rows for key in ("before", "relearned")
    ]
    edge = min(lasting) - 4
    for path, (label, look) in AROUND.items():
        for i, row in enumerate(rows):
            values = row.values("forgetting", *path)
            if not values:
                continue
            mean, error = mean_and_error(values)
            if mean < edge:
                axes.plot(edge, i, ls="", **look | {"marker": "<"})
                axes.annotate(
                    f"{mean:.0f}",
                    (edge, i),
                    (-6, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=7,
                )
            else:
                axes.errorbar(mean, i, xerr=error, ls="", **look)
        axes.plot([], [], ls="", label=label, **look)
    axes.set_xlim(edge - 2, max(lasting) + 1)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", lw=0.4)
    axes.set(xlabel="test accuracy, %, mean over the stream", ymargin=0.1)
    axes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def redrawing(axes, row: Row) -> None:
    """Test accuracy of a network right after a share of its weights has been redrawn, by criterion."""
    axes.set(xlabel="weights redrawn, %", ylabel="test accuracy right after, %")
    axes.set_title(f"the network of {row.label} at its end, redrawn by", fontsize=8)
    clean = row.values("totals", "test_accuracy")
    for i, (criterion, label) in enumerate(CRITERIA.items()):
        samples = [row.values("redrawing", criterion, f"{share}") for share in SHARES]
        x = [0, *(100 * share for share in SHARES)]
        draw_line(axes, x, [clean, *samples], label=label, color=f"C{i}", marker=MARKERS[i], ls=LINES[i])
    axes.set_ylim(bottom=0)


FIGURES = {
    "demo": anytime,
    "table1": anytime,
    "table3": anytime,
    "forgetting": forgetting,
    "figure2": corruptions,
    "figure3": attack_and_noise,
    "figure4": reliability,
    "figure5": weight_noise,
    "figure6": rates,
    "cost": cost,
    "generations": generations,
}
