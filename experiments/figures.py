"""The figures of the reports, drawn of measured rows, the paper's numbers and the rows not yet measured."""

import statistics

import torch

from baselines import METHODS
from evaluate import CORRUPTIONS, EPSILONS, SHARES, SIGMAS
from experiments.claims import is_of, mean_and_error, spread
from experiments.rows import NAMES, Row


def draw_line(axes, x, samples: list[list[float]], i: int, **look) -> None:
    """Mean and standard deviation of the samples against x; colour, marker and line are the i-th."""
    look = dict(color=f"C{i % 10}", marker="os^vD<>pP*Xhd"[i % 13], ls=("-", "--", ":", "-.")[i % 4]) | look
    means, errors = zip(*(mean_and_error(s) for s in samples), strict=True)
    axes.errorbar(x, means, errors, ms=4, lw=1.2, capsize=2, **look)
    axes.legend(fontsize=7)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return {row.method: [r for r in rows if r.method == row.method] for row in rows}


def anytime(figure, rows, published, others):
    axes = figure.subplots()
    axes.set(xlabel="mega-batches seen", ylabel="test accuracy, %")
    for i, row in enumerate(rows):
        x = range(1, len(row.records[0]["mega_batches"]) + 1)
        samples = [row.values("mega_batches", j - 1, "test", "accuracy") for j in x]
        draw_line(axes, x, samples, i, label=row.label)


def generations(figure, rows, published, others):
    """By generation; the level line is where one schedule as long ends."""
    anytime(figure, [row for row in rows if not row.in_one_schedule], published, others)
    (axes,) = figure.axes
    for row in rows:
        if row.in_one_schedule:
            x, ends = [1, max(r.config["mega_batches"] for r in rows)], row.values("totals", "test_accuracy")
            draw_line(axes, x, [ends, ends], 0, label=row.label, color="k")
    axes.set_xlabel("generation")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def corruption_bars(figure, rows, published, others):
    figure.set_size_inches(13, 4.5)
    axes, width, label = figure.subplots(), 0.8 / len(rows), "printed in the paper"
    for i, row in enumerate(rows):
        samples = [[statistics.fmean(s) for s in row.values("corruptions", name)] for name in CORRUPTIONS]
        samples.append(row.values("corruptions", "mean"))
        means, errors = zip(*(mean_and_error(s) for s in samples), strict=True)
        x = [place + width * (i - (len(rows) - 1) / 2) for place in range(20)]
        hatch = ("", "///", "...", "xxx", "\\\\\\", "|||", "---", "ooo")[i % 8]
        look = dict(color=f"C{i}", hatch=hatch, ec="white", lw=0.3, error_kw={"lw": 0.6})
        axes.bar(x, means, width, yerr=errors, label=row.label, **look)
        if printed := [p["mca"] for p in published if is_of(row, p)]:
            axes.plot(x[-1], printed[0], "k*", label=label)
            label = ""  # once is enough
    axes.set_xticks(range(20), [*CORRUPTIONS, "mean (mCA)"], rotation=40, ha="right", fontsize=8)
    axes.set(ylabel="accuracy, %", ymargin=0.25)  # room for the legend
    axes.legend(fontsize=8, ncols=5)


def attack_and_noise(figure, rows, published, others):
    figure.set_size_inches(10, 4)
    left, *rest = figure.subplots(1, 1 + bool(others), sharey=True, squeeze=False)[0]
    left.set(xlabel="PGD-10: radius ε, in 1/255", ylabel="test accuracy, %")
    order = [*METHODS]
    for row in rows:
        samples = [row.values("totals", "test_accuracy"), *(row.values("pgd", f"{e}/255") for e in EPSILONS)]
        draw_line(left, [0, *EPSILONS], samples, order.index(row.method), label=row.label)
    for right in rest:
        right.set(xlabel="label noise: probability that a label is redrawn")
    for method, group in by_method(others).items():
        x = [row.config["label_noise"] for row in group]
        samples = [row.values("totals", "test_accuracy") for row in group]
        draw_line(right, x, samples, order.index(method), label=NAMES[method])
        if printed := [(p["label_noise"], [p["test_acc"]]) for p in published if p["method"] == method]:
            x, samples = map(list, zip(*printed, strict=True))
            label = f"{NAMES[method]}, printed in the paper"
            draw_line(right, x, samples, order.index(method), mfc="none", ls="", label=label)


def reliability(figure, rows, published, others):
    figure.set_size_inches(10, 4.5)
    left, right = figure.subplots(1, 2)
    left.plot([0, 1], [0, 1], color="0.6", lw=1, label="calibrated")
    left.set(xlabel="confidence", ylabel="accuracy, all seeds together", xlim=(0, 1), ylim=(0, 1))
    for i, row in enumerate(rows):
        bins = [{k: torch.tensor(v) for k, v in b.items()} for b in row.values("reliability")]
        count = torch.stack([b["count"] for b in bins]).sum(0)
        sums = [torch.stack([b["count"] * b[k] for b in bins]).sum(0) for k in ("confidence", "accuracy")]
        x, y = (total / count for total in sums)
        draw_line(left, x[count > 0], [[v] for v in y[count > 0].tolist()], i, label=row.label)
        mean, error = mean_and_error(row.values("ece"))
        right.bar(i, mean, yerr=error, capsize=3, color="0.75", ec="black")
    right.set_xticks(range(len(rows)), [row.label for row in rows], rotation=30, ha="right")
    right.set_ylabel("expected calibration error, %")


def weight_noise(figure, rows, published, others):
    axes = figure.subplots()
    axes.set(xlabel="σ of the Gaussian noise on every weight", ylabel="accuracy on the training images, %")
    for i, row in enumerate(rows):
        samples = [row.values("weight_noise", f"{sigma}") for sigma in SIGMAS]
        draw_line(axes, SIGMAS, samples, i, label=row.label)


def rates(figure, rows, published, others):
    """A panel per method: test accuracy by learning rate and weight decay, the darker the higher."""
    groups = by_method(rows)
    lrs, decays = (sorted({row.config[key] for row in rows}) for key in ("lr", "weight_decay"))
    means = [statistics.fmean(row.values("totals", "test_accuracy")) for row in rows]
    figure.set_size_inches(2 + 1.4 * len(lrs) * len(groups), 1.5 + 0.9 * len(decays))
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for (method, group), axes in zip(groups.items(), panels, strict=True):
        grid = torch.full((len(decays), len(lrs)), float("nan"))
        for row in group:
            i, j = decays.index(row.config["weight_decay"]), lrs.index(row.config["lr"])
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


def cost(figure, rows, published, others):
    figure.set_size_inches(10, 4)
    keys = {"test_accuracy": "test accuracy, %", "cer": "cumulative error (CER), images"}
    for axes, (key, label) in zip(figure.subplots(1, 2), keys.items(), strict=True):
        axes.set(xlabel="image passes", ylabel=label, xscale="log")
        for i, (method, group) in enumerate(by_method(rows).items()):
            x = [row.records[0]["totals"]["image_passes"] for row in group]
            draw_line(axes, x, [row.values("totals", key) for row in group], i, label=NAMES[method])


def forgetting(figure, rows, published, others):
    """Accuracy around forgetting, and right after redrawing more or less."""
    redrawn = [row for row in rows if row.method == "lure" and row.values("redrawing")][:1]
    first, *panels = figure.subplots(1, 1 + len(redrawn), squeeze=False)[0]
    figure.set_size_inches(6 + 5 * len(panels), 5)
    series = {"before": "before", "after": "right after forgetting", "relearned": "after relearning"}
    for i, (key, label) in enumerate(series.items()):
        means, errors = zip(*(mean_and_error(row.values("forgetting", key)) for row in rows), strict=True)
        x, color = [place + 0.27 * (i - 1) for place in range(len(rows))], ("0.6", "C3", "C0")[i]
        first.bar(x, means, 0.27, yerr=errors, label=label, color=color, error_kw={"lw": 0.6})
    first.set_xticks(range(len(rows)), [row.label for row in rows], rotation=40, ha="right", fontsize=8)
    first.set(ylabel="test accuracy, %, mean over the stream", ymargin=0.2)
    first.legend(fontsize=7, ncols=3)
    for axes, row in zip(panels, redrawn, strict=True):
        axes.set(xlabel="weights redrawn, %", ylabel="test accuracy right after, %")
        axes.set_title(f"the network of {row.label}, redrawn at its end by", fontsize=8)
        for i, criterion in enumerate(CRITERIA):
            samples = [row.values("redrawing", criterion, f"{share}") for share in SHARES]
            x = [0, *(100 * share for share in SHARES)]
            clean = row.values("totals", "test_accuracy")
            draw_line(axes, x, [clean, *samples], i, label=CRITERIA[criterion])
        axes.set_ylim(bottom=0)


CRITERIA = {"lure": "SNIP (LURE)", "fisher": "Fisher", "magnitude": "magnitude", "random": "chance"}
FIGURES = {
    "demo": anytime,
    "table1": anytime,
    "table3": anytime,
    "forgetting": forgetting,
    "figure2": corruption_bars,
    "figure3": attack_and_noise,
    "figure4": reliability,
    "figure5": weight_noise,
    "figure6": rates,
    "cost": cost,
    "generations": generations,
}
