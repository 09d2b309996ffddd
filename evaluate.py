"""How good a trained network is beyond its accuracy, and the tables and figures of runs.

python evaluate.py metrics lure-1.pt                               # writes lure-1.metrics.json beside it
python evaluate.py metrics lure-1.pt --corruptions CIFAR-10-C      # writes lure-1.corruptions.json
python evaluate.py report --out table9.md cifar10/*-[123].json     # a table of these runs, beside the paper's
"""

import argparse
import contextlib
import inspect
import json
import math
import re
import statistics
import sys
from dataclasses import fields
from functools import partial
from itertools import compress, pairwise, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lure
from baselines import METHODS, evaluating, fisher_information, magnitudes, random_scores
from lure import DataError, expected_calibration_error


# ------------------------------------------------------------ Metrics (sections 6 and 7)
def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """The reliability diagram behind `expected_calibration_error`, over the same bins of top-1 confidence.

    `probabilities` (N, C), `labels` (N,) int64. Returns float64 tensors (bins,): the `count` of samples in a
    bin, and their `accuracy` and mean `confidence`, in [0, 1], both 0 where it is empty.
    """
    confidence, prediction = probabilities.double().max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=labels.device)
    member = F.one_hot(torch.bucketize(confidence, edges[1:-1]), bins).double()
    count = member.sum(dim=0)
    means = [x @ member / count.clamp(min=1) for x in (prediction.eq(labels).double(), confidence)]
    return {"count": count, "accuracy": means[0], "confidence": means[1]}


def pgd_attack(model, images, labels, epsilon, steps=10, step_size=None, generator=None) -> Tensor:
    """Projected gradient descent (Madry et al. 2017, arXiv 1706.06083; section 6.2) in an L∞ ball.

    `images` (N, C, H, W) float in [0, 1], `labels` (N,) int64, `epsilon` the radius. Takes `steps` steps of
    `step_size`, by default 2.5 · epsilon / steps, along the sign of the loss's gradient, in evaluation mode,
    from the image or, with a generator, from a uniform draw in the ball. Returns detached images in the ball
    and in [0, 1]; gradients and training flags stay as they were. ValueError for epsilon < 0 or steps < 1.
    """
    if not epsilon >= 0 or steps < 1:
        raise ValueError(f"expected epsilon >= 0 and steps >= 1, got {epsilon} and {steps}")
    step_size = 2.5 * epsilon / steps if step_size is None else step_size
    lower, upper = (images - epsilon).clamp(0, 1).detach(), (images + epsilon).clamp(0, 1).detach()
    attacked = images.detach().clone()
    if generator is not None:
        noise = torch.empty(images.shape, dtype=images.dtype, device=generator.device)
        noise = noise.uniform_(-epsilon, epsilon, generator=generator).to(images.device)
        attacked = (attacked + noise).clamp(lower, upper)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            loss = F.cross_entropy(model(attacked.requires_grad_()), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, attacked)
            attacked = (attacked.detach() + step_size * gradient.sign()).clamp(lower, upper)
    return attacked


def predict(model: nn.Module, images: Tensor, chunk: int = 128) -> Tensor:
    """Logits (N, classes) of float images (N, C, H, W) in [0, 1], in evaluation mode."""
    with torch.inference_mode(), evaluating(model):
        return torch.cat([model(part) for part in images.split(chunk)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of float images (N, C, H, W) in [0, 1], in evaluation mode."""
    return 100 * predict(model, images).argmax(1).eq(labels).double().mean().item()


CORRUPTIONS = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "saturate", "spatter"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
]


def corruption_accuracy(model: nn.Module, directory: str | Path) -> dict:
    """Accuracy in percent under the 19 corruptions of CIFAR-10-C (Hendrycks & Dietterich 2019).

    `directory` holds NAME.npy for each, uint8 (5 · n, H, W, 3), severity s in rows n · (s − 1) to n · s, and
    labels.npy (5 · n,), for any n. Returns for each corruption five accuracies, by severity, and as "mean"
    the paper's mCA, over all 95 (section 6.1). DataError, before anything is measured, for a file that is
    missing or not as described.
    """
    arrays = {name: load_array(Path(directory) / f"{name}.npy") for name in ("labels", *CORRUPTIONS)}
    labels, device = arrays.pop("labels").long(), next(model.parameters()).device
    for name, images in arrays.items():
        if images.dtype != torch.uint8 or images.shape[3:] != (3,) or labels.shape != images.shape[:1]:
            found = f"{images.dtype} {tuple(images.shape)} and {tuple(labels.shape)} in labels.npy"
            raise DataError(
                f"{directory}/{name}.npy: expected uint8 (N, H, W, 3) and N labels, found {found}"
            )
        if len(images) == 0 or len(images) % 5:
            raise DataError(f"{directory}/{name}.npy: expected five severities, found {len(images)} images")
    result: dict = {}
    for name, images in arrays.items():
        severities = zip(images.chunk(5), labels.chunk(5), strict=True)
        result[name] = [accuracy(model, lure.to_input(x.to(device)), y.to(device)) for x, y in severities]
    return result | {"mean": statistics.fmean(a for severities in result.values() for a in severities)}


def load_array(path: Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"{path}: expected an array of CIFAR-10-C ({error})") from error


def weight_noise_accuracy(model, images, labels, sigmas, repeats=3, generator=None) -> list[float]:
    """Accuracy in percent for each σ of `sigmas`, with N(0, σ²) added to every parameter (section 7.2).

    The mean over `repeats` draws, made on the generator's device. `images` (N, C, H, W) float in [0, 1]. The
    parameters are put back bit by bit.
    """
    results = []
    for sigma in sigmas:
        runs = []
        for _ in range(repeats):
            with restored(model), torch.no_grad():
                for p in model.parameters():
                    noise = torch.randn(p.shape, generator=generator, device=(generator or p).device)
                    p.add_(sigma * noise.to(p))
                runs.append(accuracy(model, images, labels))
        results.append(statistics.fmean(runs))
    return results


def redrawing_accuracy(model, pi, images, labels, shares, generator) -> dict[str, list[float]]:
    """Accuracy in percent right after redrawing each share of the weights, by each criterion of Table 8.

    `pi`: images (N, C, H, W) float in [0, 1] and labels (N,) int64 to score the weights by; `images` and
    `labels` to measure on; `shares` in (0, 1). The parameters are put back bit by bit.
    """
    scores = {
        "lure": lure.connection_sensitivity(model, *pi),
        "fisher": fisher_information(model, *pi),
        "magnitude": magnitudes(model),
        "random": random_scores(model, generator),
    }
    result: dict[str, list[float]] = {criterion: [] for criterion in scores}
    for criterion, share in product(scores, shares):
        with restored(model):
            lure.reinitialize_(model, lure.top_k_mask(scores[criterion], 1 - share), generator)
            result[criterion].append(accuracy(model, images, labels))
    return result


@contextlib.contextmanager
def restored(model: nn.Module):
    """Afterwards the parameters are what they were, bit by bit."""
    saved = [p.detach().clone() for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(model.parameters(), saved, strict=True):
                p.copy_(original)


# ------------------------------------------------------------ A checkpoint's metrics
def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network and the configuration of a checkpoint that `lure.run` wrote. DataError if it is none."""
    try:
        checkpoint = lure.load(path)
        config, classes = checkpoint["config"], checkpoint["classes"]
        mean, std, *_ = lure.PREPROCESSING[config["dataset"]]
        model = lure.build_model(config["arch"], len(classes), len(mean), mean, std)
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:
        kind = type(error).__name__
        raise DataError(f"{path}: expected a checkpoint that --checkpoint wrote ({kind})") from error
    return model.to(device, memory_format=torch.channels_last), config | {"classes": classes}


def metrics(path: Path, args: argparse.Namespace) -> dict:
    """A checkpoint's calibration, PGD, weight noise and redrawing, or its accuracy under corruptions."""
    device = lure.pick_device(args.device)
    model, config = load_checkpoint(path, device)
    sizes = {key: config[key] for key in ("image_size", "limit", "limit_test", "shots")}
    data = lure.load_dataset(config["dataset"], args.data or config["data"], args.cache, **sizes)
    if data.classes != config["classes"]:
        raise DataError(f"{path}: was trained on other classes than those of {args.data or config['data']}")
    result = {"config": config, **lure.provenance(["evaluate.py", *args.argv], device, data)}
    if args.corruptions:
        result["corruptions"] = corruption_accuracy(model, args.corruptions)
        result["images_per_severity"] = len(load_array(args.corruptions / "labels.npy")) // 5
        target = path.with_suffix(".corruptions.json")
    else:
        result |= clean_metrics(model, data, config, args.epsilons, args.sigmas)
        target = path.with_suffix(".metrics.json")
    text = json.dumps(result, indent=1) + "\n"
    lure.write(target, lambda file: file.write(text.encode()))
    return result


def clean_metrics(model, data: lure.Dataset, config: dict, epsilons, sigmas) -> dict:
    """Test accuracy: clean, by confidence (ECE), under PGD-10 by ε, after redrawing by criterion and share.

    By σ of weight noise, the accuracy on what the run trained on: the training parts of its mega-batches.
    """
    device, seed = next(model.parameters()).device, config["seed"]
    of_run = lure.Config(**{f.name: config[f.name] for f in fields(lure.Config)})
    train_y, stream = lure.draw_stream(of_run, data)
    trained = torch.cat([batch.new for batch in stream])
    train_x, test_x = (
        lure.to_input(x.permute(0, 2, 3, 1).to(device)) for x in (data.images[trained], data.test_images)
    )
    train_y, test_y = train_y[trained].to(device), data.test_labels.to(device)
    probabilities = predict(model, test_x).softmax(1)
    result: dict = {"accuracy": 100 * probabilities.argmax(1).eq(test_y).double().mean().item()}
    result["ece"] = expected_calibration_error(probabilities, test_y)
    result["reliability"] = {k: v.tolist() for k, v in reliability_bins(probabilities, test_y).items()}
    result["pgd"] = {}
    for epsilon in epsilons:
        batches = zip(test_x.split(125), test_y.split(125), strict=True)
        attacked = torch.cat([pgd_attack(model, x, y, epsilon / 255) for x, y in batches])
        result["pgd"][f"{epsilon:g}/255"] = accuracy(model, attacked, test_y)
    generator = torch.Generator().manual_seed(seed)
    noisy = weight_noise_accuracy(model, train_x, train_y, sigmas, generator=generator)
    result["weight_noise"] = {f"{s:g}": a for s, a in zip(sigmas, noisy, strict=True)}
    drawn = torch.randperm(len(trained), generator=generator)[:1125]  # as many as the protocol's π
    redrawn = redrawing_accuracy(model, (train_x[drawn], train_y[drawn]), test_x, test_y, SHARES, generator)
    return result | {
        "redrawing": {
            criterion: {f"{s:g}": a for s, a in zip(SHARES, by_share, strict=True)}
            for criterion, by_share in redrawn.items()
        }
    }


def summary(result: dict) -> str:
    shown = {
        key: result[key] for key in ("accuracy", "ece", "pgd", "weight_noise", "redrawing") if key in result
    }
    return json.dumps(shown or {"mca": result["corruptions"]["mean"]})


# ------------------------------------------------------------ Reports: rows, tables, claims

NAMES = {method: method for method in METHODS}
NAMES |= {"warm-start": "Warm start", "sp": "S&P", "llf": "LLF", "lure": "LURE", "scratch": "Scratch"}
NAMES |= {"rifle": "RIFLE", "dash": "DASH", "fire": "FIRE"}
NAMES |= {"fisher": "LURE by Fisher", "magnitude": "LURE by magnitude", "random": "LURE by chance"}
TITLES = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG copy)", "cifar100": "CIFAR-100"}
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
    "precision": "of training",
    "demo": "all methods",
}


class Row(NamedTuple):
    """Runs that differ by their seed alone."""

    method: str
    options: dict  # those in which the rows of a table differ, and their values
    named: dict  # those in the names of its files, and their values
    records: list[dict]

    def by_seed(self, *path) -> dict:
        """Seed → what the path leads to in the record, where it was measured."""
        found = {}
        for record in self.records:
            value: Any = record
            for key in path:
                value = value.get(key) if isinstance(value, dict) else value[key]
                if value is None:
                    break
            else:
                found[record["config"]["seed"]] = value
        return found

    def values(self, *path) -> list:
        return [*self.by_seed(*path).values()]

    @property
    def config(self) -> dict:
        return self.records[0]["config"]

    @property
    def label(self) -> str:
        return ", ".join([NAMES[self.method], *(f"{k} {v}" for k, v in self.named.items())])


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


def load_record(path: Path) -> dict:
    """A run's record, METHOD+OPTION=VALUE+…-SEED.json, with what `metrics` wrote beside it.

    Adds its `path`, the options in its name (`named`) and all that may set it apart from others (`options`).
    DataError for a file that is no record, or not of what its name says.
    """

    def load(file: Path) -> dict:
        record = json.loads(file.read_text())
        config = {"method": "lure", "set": []} | record["config"]
        apart = lure.PATHS | {"method", "seed", "classes", "precision"}
        options = {k: v for k, v in config.items() if k not in apart}
        options |= {"data": record["data"]["sha256"]}
        return record | {"config": config, "options": options}

    file = path
    try:
        record = load(path)
        config, named = record["config"], {}
        name, seed = path.stem.rsplit("-", 1)
        method, *pairs = name.split("+")
        for key, _, text in (pair.partition("=") for pair in pairs):
            key = key.replace("-", "_")
            named[key] = [text] if key == "set" else type(config[key])(text or True)
        for key, value in {"method": method, "seed": int(seed), **named}.items():
            if config[key] != value:
                raise ValueError(f"it is of {key} {config[key]}")
        for suffix, keys in MEASURED.items():
            file = path.with_suffix(suffix)
            if file.exists():
                measured = load(file)
                if measured["options"] != record["options"] or measured["config"]["seed"] != config["seed"]:
                    raise ValueError("it is of another run")
                record |= {key: measured[key] for key in keys if key in measured}
        file = path
        for part in (record["totals"], record):
            if "ece" in part:
                part["ece"] *= 100
        if noisy := record.get("weight_noise"):
            record["noise_drop"] = {s: noisy["0"] - a for s, a in noisy.items() if s != "0"}
        record |= forgetting_of(record["mega_batches"])
        record["options"]["precision"] = record["precision"]  # that it ran in, whatever the option's word
        if "keep" not in inspect.signature(METHODS[method]).parameters:
            record["options"]["keep"] = None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no entry {error}" if isinstance(error, KeyError) else error
        raise DataError(f"{file}: expected the record of the run that its name says ({reason})") from error
    return record | {"path": path, "named": named}


def forgetting_of(rows: list[dict]) -> dict:
    """What forgetting did, the mean over all times; of an old record, which lacks it, nothing."""
    pairs = [(a, b) for a, b in pairwise(rows) if a.get("forgotten")]
    if not pairs:
        return {}
    of = {
        "before": [a["test"]["accuracy"] for a, _ in pairs],
        "after": [a["forgotten"]["accuracy"] for a, _ in pairs],
        "relearned": [b["test"]["accuracy"] for _, b in pairs],
    }
    masks = [a["redrawn_by_tensor"] for a, _ in pairs if a["redrawn_by_tensor"]]
    shares = {name: statistics.fmean(100 * mask[name] for mask in masks) for name in (masks or [{}])[0]}
    return {"forgetting": {k: statistics.fmean(v) for k, v in of.items()}, "shares": shares or None}


MEASURED = {
    ".metrics.json": ("ece", "reliability", "pgd", "weight_noise", "redrawing"),
    ".corruptions.json": ("corruptions", "images_per_severity"),
}


def load_rows(paths: list[Path]) -> list[Row]:
    """The rows of a table, in the order of the files. DataError for those that cannot be compared.

    Two runs may differ in their seed, their method and the options that the name of one of them tells.
    """
    records = [load_record(path) for path in paths]
    apart: dict = {}
    for key in records[0]["options"]:
        having = [r for r in records if r["options"].get(key) is not None]
        for record in having:
            value, other = (r["options"][key] for r in (record, having[0]))
            free = {*record["named"], *having[0]["named"]}
            if value != other and not free & {key, *(SIZES if key == "data" else ())}:
                where = f"{other} in {having[0]['path'].name}"
                raise DataError(f"{record['path']}: cannot be compared: {key} is {value}, {where}")
            if value != other and key != "data":
                apart[key] = None
    rows: dict[str, Row] = {}
    for record in records:
        method, options = record["config"]["method"], {key: record["options"][key] for key in apart}
        row = rows.setdefault(json.dumps([method, options]), Row(method, options, record["named"], []))
        if twice := [r for r in row.records if r["config"]["seed"] == record["config"]["seed"]]:
            raise DataError(
                f"{record['path']}: expected one run of each kind, {twice[0]['path'].name} is it too"
            )
        row.records.append(record)
    return [*rows.values()]


SIZES = ("limit", "limit_test", "shots", "image_size")  # these change the data


def paired(row: Row, other: Row, *path) -> list[float]:
    """Differences to another row, seed by seed."""
    mine, theirs = row.by_seed(*path), other.by_seed(*path)
    return [mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())]


def interval(values: list[float]) -> tuple[float, float]:
    """95 % t interval of the mean of two or more values."""
    from scipy.stats import t

    mean, n = statistics.fmean(values), len(values)
    half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return mean - half, mean + half


def with_interval(differences: list[float], digits: int = 2) -> str:
    numbers = [statistics.fmean(differences), *(interval(differences) if len(differences) > 1 else ())]
    mean, *ends = [f"{x:+.{digits}f}" for x in numbers]
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± sample standard deviation, the latter from two values on that are not all the same."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if error else "")


def warm_start_of(row: Row, rows: list[Row]) -> Row | None:
    """The warm start that a row is compared with: of the same options, or else of most of them and no other.

    What a method has besides may only be of forgetting; what a warm start has besides may be anything.
    """
    own = {"keep", "pi", "pi_fraction", "set"} if row.method != "warm-start" else row.named.keys()
    fitting = [
        other
        for other in rows
        if other.method == "warm-start" and other is not row
        if other.named.items() <= row.named.items() and row.named.keys() - other.named.keys() <= own
    ]
    return max(fitting, key=lambda other: len(other.named), default=None)


def fits(row: Row, wanted: dict) -> bool:
    return all(row.config[k] in (v if isinstance(v, list) else [v]) for k, v in wanted.items())


def is_of(row: Row, published: dict) -> bool:
    shared = published.keys() & row.config.keys() - {"dataset"}
    return fits(row, {key: published[key] for key in shared})


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
    lines = [head, [":---"] + ["---:"] * (len(head) - 1)]
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
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def verdict(claim: dict, rows: list[Row]) -> tuple[str, str] | None:
    """What became of a claim: the differences that it is about, with their intervals, and a word.

    `better` and `than` say which rows are compared; in what they do not say, the two have the same options.
    Held: each interval excludes zero on the claim's side; not held: one does on the other side. What does
    not differ at all, as under an attack that nothing withstands, has no say. None without such rows.
    """
    better, than = claim["better"], claim["than"]
    free = {key for key in better | than if better.get(key) != than.get(key)}
    found = []
    for a, b in product((r for r in rows if fits(r, better)), (r for r in rows if fits(r, than))):
        if all(a.options[key] == b.options[key] for key in a.options.keys() - free):
            what = [
                NAMES[a.method],
                NAMES[b.method],
                *(f"{key.replace('_', '-')} {v}" for key, v in b.options.items()),
            ]
            for path in claim["metrics"]:
                if differences := paired(a, b, *path):
                    text = with_interval(differences, 0 if path[-1] == "cer" else 2)
                    found.append(([*what, str(path[-1])], text, differences))
    if not found:
        return None
    telling = [len({*words}) > 1 for words in zip(*(what for what, *_ in found), strict=True)]
    texts, words = [], set()
    for what, text, differences in found:
        label = ", ".join(compress(what, telling))
        texts.append(f"{label}: {text}" if label else text)
        low, high = interval(differences) if len(differences) > 2 else (-math.inf, math.inf)
        low, high = (low, high) if claim["higher"] else (-high, -low)
        if any(differences):
            words.add("held" if low > 0 else "not held" if high < 0 else "not decided")
    word = "not held" if "not held" in words else "held" if words == {"held"} else "not decided"
    return "<br>".join(texts), word


CLAIMS = (
    "| The paper's claim | where | tested | difference [95 %] | |\n| :--- | :--- | :--- | :--- | :--- |\n"
)


def report(out: Path, paths: list[Path], incomplete: bool = False) -> str:
    """Write `out`, a table of runs beside the paper's of its name, and its figure, NAME-DATASET.png.

    If it may be incomplete, runs that are not there are named in it, and with none there nothing is written.
    """
    from matplotlib.figure import Figure

    name, scale = out.stem, out.resolve().parent.name
    paper = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())
    source = "table9" if name == "figure3" else name  # half of that figure is that table
    published = paper["tables"].get(source, {"rows": []})["rows"]
    columns, draw = FIGURES.get(name, (MAIN, None))
    parts, lines = [], []
    paths = [p for path in paths for p in (sorted(path.glob("*-*.json")) if path.is_dir() else [path])]
    paths = [path for path in dict.fromkeys(paths) if not path.name.endswith(tuple(MEASURED))]
    absent = [path for path in paths if incomplete and not path.exists()]
    if not paths:
        raise DataError("expected records of runs, METHOD+OPTION=VALUE+…-SEED.json; found none")
    for dataset in dict.fromkeys(path.resolve().parent.name for path in paths if path not in absent):
        here = [path for path in paths if path.resolve().parent.name == dataset]
        rows = load_rows([path for path in here if path not in absent])
        known = next((n for n in ("cifar100", "cifar10", "restricted-imagenet") if dataset.startswith(n)), "")
        printed, title = [p for p in published if p["dataset"] == known], TITLES.get(dataset, dataset)
        measured, others = split_measured(rows, [column.path for column in columns])
        missing = [path for path in here if path in absent]
        if name != "figure3" or not any(row.config["label_noise"] for row in others):
            missing += [record["path"] for row in others for record in row.records]
            others = []  # in figure 3 they are its other half
        if not measured and incomplete:
            continue
        if not measured:
            raise DataError(f"{missing[0]}: {EXPECTED.get(columns[0].path[0], WROTE)}")
        if draw:
            figure = Figure(layout="constrained")
            draw(figure, measured, printed, others)
            figure.suptitle(f"{headline(name)} ({scale}, {title})", fontsize=9)
            save = partial(figure.savefig, format="png", dpi=130)
            lure.write(out.with_name(f"{name}-{dataset}.png"), save)
        parts.append(f"{caption(title, measured, columns)}\n\n{table(measured, columns, printed)}")
        parts += [shares_table(measured)] * (name == "forgetting")
        parts += [f"Not measured: {', '.join(f'`{path.stem}`' for path in missing)}.\n"] * bool(missing)
        for claim in paper["claims"]:
            if claim["table"] == name and (result := verdict(claim, rows)):
                cells = [claim["claim"], headline(name).split(":")[0], f"{scale}, {title}", *result]
                lines.append(f"| {' | '.join(cells)} |\n")
    text = "\n".join(parts) + (f"\n{CLAIMS}{''.join(lines)}" if lines else "")
    if text:
        lure.write(out, lambda file: file.write(text.encode()))
    return text or f"nothing has been measured yet for {name}"


WROTE = "expected what evaluate.py metrics writes beside it"
EXPECTED = {"forgetting": "expected a record that says what was forgotten, as newer ones do"}


def split_measured(rows: list[Row], paths: list[tuple]) -> tuple[list[Row], list[Row]]:
    """The rows with the records in which all that the paths lead to was measured, and with the others."""
    seeds = [set.intersection(*({*row.by_seed(*path)} for path in paths)) for row in rows]
    split: tuple[list[Row], list[Row]] = [], []
    for row, having in zip(rows, seeds, strict=True):
        for part, there in zip(split, (True, False), strict=True):
            if records := [r for r in row.records if (r["config"]["seed"] in having) == there]:
                part.append(row._replace(records=records))
    return split


def shares_table(rows: list[Row]) -> str:
    """Markdown: the share of each weight tensor that was redrawn, for the rows that redraw by a mask."""
    rows = [row for row in rows if row.values("shares")]
    lines = [["Redrawn of, %", *(row.label for row in rows)], [":---"] + ["---:"] * len(rows)]
    for name in rows[0].values("shares")[0] if rows else ():
        lines.append([name.removesuffix(".weight"), *(spread(row.values("shares", name), 1) for row in rows)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines) if rows else ""


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


# ------------------------------------------------------------ Figures
# Each draws the rows that were measured, given the numbers that the paper prints and the other rows.
def draw_line(axes, x, samples: list[list[float]], i: int, **look) -> None:
    """Mean and standard deviation of the samples against x; colour, marker and line are the i-th."""
    look = {
        "color": f"C{i % 10}",
        "marker": "os^vD<>pP*Xhd"[i % 13],
        "ls": ("-", "--", ":", "-.")[i % 4],
    } | look
    means, errors = zip(*(mean_and_error(s) for s in samples), strict=True)
    axes.errorbar(x, means, errors, ms=4, lw=1.2, capsize=2, **look)
    axes.legend(fontsize=7)


def by_method(rows: list[Row]) -> dict[str, list[Row]]:
    return {
        method: [r for r in rows if r.method == method] for method in dict.fromkeys(r.method for r in rows)
    }


def anytime(figure, rows, published, others):
    axes = figure.subplots()
    axes.set(xlabel="mega-batches seen", ylabel="test accuracy, %")
    for i, row in enumerate(rows):
        seen = range(len(row.records[0]["mega_batches"]))
        samples = [row.values("mega_batches", j, "test", "accuracy") for j in seen]
        draw_line(axes, [j + 1 for j in seen], samples, i, label=row.label)


def corruption_bars(figure, rows, published, others):
    figure.set_size_inches(13, 4.5)
    axes, width, label = figure.subplots(), 0.8 / len(rows), "printed in the paper"
    for i, row in enumerate(rows):
        samples = [[statistics.fmean(s) for s in row.values("corruptions", name)] for name in CORRUPTIONS]
        samples.append(row.values("corruptions", "mean"))
        means, errors = zip(*(mean_and_error(s) for s in samples), strict=True)
        x = [place + width * (i - (len(rows) - 1) / 2) for place in range(20)]
        look = {"color": f"C{i}", "hatch": ("", "///", "...", "xxx", "\\\\\\", "|||", "---", "ooo")[i % 8]}
        axes.bar(
            x, means, width, yerr=errors, label=row.label, error_kw={"lw": 0.6}, ec="white", lw=0.3, **look
        )
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
        x, y = (
            torch.stack([b["count"] * b[k] for b in bins]).sum(0) / count for k in ("confidence", "accuracy")
        )
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
    """Accuracy around forgetting; right after redrawing more or less; the shares of the tensors redrawn."""
    redrawn = [row for row in rows if row.method == "lure" and row.values("redrawing")][:1]
    masked = [row for row in rows if row.values("shares")]
    panels = figure.subplots(1, 1 + bool(redrawn) + bool(masked), squeeze=False)[0]
    figure.set_size_inches(1 + 5 * len(panels), 5)
    first, *panels = panels
    series = {"before": "before", "after": "right after forgetting", "relearned": "after relearning"}
    for i, (key, label) in enumerate(series.items()):
        means, errors = zip(*(mean_and_error(row.values("forgetting", key)) for row in rows), strict=True)
        x, color = [place + 0.27 * (i - 1) for place in range(len(rows))], ("0.6", "C3", "C0")[i]
        first.bar(x, means, 0.27, yerr=errors, label=label, color=color, error_kw={"lw": 0.6})
    first.set_xticks(range(len(rows)), [row.label for row in rows], rotation=40, ha="right", fontsize=8)
    first.set(ylabel="test accuracy, %, mean over the stream", ymargin=0.2)
    first.legend(fontsize=7, ncols=3)
    for row in redrawn:
        axes, *panels = panels
        axes.set(xlabel="weights redrawn, %", ylabel="test accuracy right after, %")
        axes.set_title(f"the network of {row.label}, redrawn at its end by", fontsize=8)
        for i, criterion in enumerate(CRITERIA):
            samples = [row.values("redrawing", criterion, f"{share}") for share in SHARES]
            x = [0, *(100 * share for share in SHARES)]
            clean = row.values("totals", "test_accuracy")
            draw_line(axes, x, [clean, *samples], i, label=CRITERIA[criterion])
        axes.set_ylim(bottom=0)
    for axes in panels:
        names = [*masked[0].values("shares")[0]]
        axes.set(ylabel="redrawn of a tensor, %")
        for i, row in enumerate(masked):
            samples = [row.values("shares", name) for name in names]
            draw_line(axes, range(len(names)), samples, i, label=row.label)
        short = [name.removesuffix(".weight") for name in names]
        axes.set_xticks(range(len(names)), short, rotation=90, fontsize=6)


CRITERIA = {"lure": "SNIP (LURE)", "fisher": "Fisher", "magnitude": "magnitude", "random": "chance"}
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
EPSILONS, SIGMAS = (1, 2, 4, 8), (0, 0.01, 0.02, 0.03, 0.04, 0.05)
ATTACKS = [Column(f"At ε = {e}/255, %", ("pgd", f"{e}/255"), paired=e == 2) for e in EPSILONS]
NOISES = [Column("Without noise, %", ("weight_noise", "0"))]
NOISES += [Column(f"Drop at σ = {s}, points", ("noise_drop", f"{s}"), paired=s == 0.02) for s in SIGMAS[1:]]
FORGETTING = [
    Column("Before, %", ("forgetting", "before")),
    Column("Right after, %", ("forgetting", "after")),
    Column("Relearned, %", ("forgetting", "relearned"), paired=True),
]
FIGURES = {  # its columns, and how it is drawn
    "demo": (MAIN, anytime),
    "table1": (MAIN, anytime),
    "table3": (MAIN, anytime),
    "forgetting": (FORGETTING, forgetting),
    "figure2": ([Column("mCA, %", ("corruptions", "mean"), printed="mca", paired=True)], corruption_bars),
    "figure3": (ATTACKS, attack_and_noise),
    "figure4": ([Column("ECE, %", ("ece",), paired=True)], reliability),
    "figure5": (NOISES, weight_noise),
    "figure6": (MAIN, rates),
    "cost": (MAIN, cost),
}


INTRODUCTION = """# Results

Written by `make overview` from the reports in `paper`, `narrow`, `small` and `precision`, as far as they have
been measured; the speed of the loop is in [`bench`](bench). Every run is a file,
`SCALE/DATASET/ROW-SEED.json`.

## The paper's claims

Held: every 95 % t interval of the differences, over at least three seeds, lies on the claim's side of zero;
not held: one lies on the other side (each is an interval by itself: of twenty, one may do so by chance). What
is tested at the small scale says what happens there, and refutes nothing beyond it. The paper's numbers stand
beside ours wherever it prints any, whatever the scale; Figure 6's grid of rates is ours.
"""


def overview(folder: Path) -> str:
    """Write folder/README.md: the claims, then all reports, from its subfolders, one for each scale."""
    parts, claims = [], []
    for scale in ("paper", "narrow", "small", "precision"):
        for name in SUBJECTS:
            path = folder / scale / f"{name}.md"
            if path.exists():
                tables, _, lines = path.read_text().partition(CLAIMS)
                claims.append(lines)
                images = sorted(path.parent.glob(f"{name}-*.png"))
                shown = "".join(f"![{headline(name)}]({scale}/{i.name})\n\n" for i in images)
                parts.append(f"## {headline(name)} ({scale})\n\n{shown}{tables.rstrip()}\n")
    if not parts:
        raise DataError(f"{folder}: expected reports in paper, narrow, small or precision; found none")
    text = f"{INTRODUCTION}\n{CLAIMS}{''.join(claims)}\n" + "\n".join(parts)
    lure.write(folder / "README.md", lambda file: file.write(text.encode()))
    return text


# ------------------------------------------------------------ Command line
def main(argv=None) -> int:
    """The command line; its status is that of `lure.main`."""
    parser = lure.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("report", help="a table or figure of runs, beside the paper's")
    command.add_argument("paths", nargs="+", type=Path, metavar="RECORD", help="or a folder of them")
    out = "file to write, table.md by default; its name, as in table9.md, says what it is beside"
    command.add_argument("--out", type=Path, help=out, default=Path("table.md"))
    command.add_argument("--incomplete", action="store_true", help="name the runs that are not there")
    command.set_defaults(
        call=lambda args: print(report(args.out, args.paths, args.incomplete), args.out, sep="\n")
    )
    command = commands.add_parser("overview", help="README.md of a folder of reports")
    command.add_argument("folder", type=Path)
    command.set_defaults(call=lambda args: overview(args.folder))
    command = commands.add_parser(
        "metrics", help="calibration, attack, weight noise, redrawing, corruptions of checkpoints"
    )
    command.add_argument("paths", nargs="+", type=Path, metavar="CHECKPOINT")
    command.add_argument("--corruptions", type=Path, help="folder of CIFAR-10-C: measure these instead")
    command.add_argument("--epsilons", nargs="*", type=float, default=EPSILONS, help="of PGD-10, in 1/255")
    command.add_argument("--sigmas", nargs="*", type=float, default=SIGMAS)
    command.add_argument("--data", help="folder of the data set, if it has moved")
    command.add_argument("--cache", default=".cache", help="folder for decoded images")
    command.add_argument("--device", default="auto")
    command.set_defaults(call=lambda args: [print(p, summary(metrics(p, args))) for p in args.paths])
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return lure.guarded(parser.prog, lambda: args.call(args))


if __name__ == "__main__":
    sys.exit(main())
