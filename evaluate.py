"""How good a trained network is beyond its accuracy, and the tables and figures of a folder of runs.

python evaluate.py metrics lure-1.pt --corruptions CIFAR-10-C    # writes lure-1.metrics.json beside it
python evaluate.py report results/table1/cifar10                 # writes table.md and figures there
"""

import argparse
import json
import re
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lure
from baselines import METHODS, evaluating
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


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, chunk: int = 128) -> Tensor:
    """Logits (N, classes) of float images (N, C, H, W) in [0, 1], in evaluation mode."""
    with evaluating(model):
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


@torch.no_grad()
def weight_noise_accuracy(model, images, labels, sigmas, repeats=3, generator=None) -> list[float]:
    """Accuracy in percent for each σ of `sigmas`, with N(0, σ²) added to every parameter (section 7.2).

    The mean over `repeats` draws, made on the generator's device. `images` (N, C, H, W) float in [0, 1]. The
    parameters are put back bit by bit.
    """
    saved, results = [p.clone() for p in model.parameters()], []
    try:
        for sigma in sigmas:
            runs = []
            for _ in range(repeats):
                for p, original in zip(model.parameters(), saved, strict=True):
                    noise = torch.randn(p.shape, generator=generator, device=(generator or p).device)
                    p.copy_(original + sigma * noise.to(p))
                runs.append(accuracy(model, images, labels))
            results.append(statistics.fmean(runs))
    finally:
        for p, original in zip(model.parameters(), saved, strict=True):
            p.copy_(original)
    return results


# ------------------------------------------------------------ A checkpoint's metrics
def load_checkpoint(path: Path, device: torch.device) -> tuple[nn.Module, dict]:
    """The network and the configuration of a checkpoint that `lure.run` wrote. DataError if it is none."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config, classes = checkpoint["config"], checkpoint["classes"]
        mean, std, *_ = lure.PREPROCESSING[config["dataset"]]
        model = lure.build_model(config["arch"], len(classes), len(mean), mean, std)
        model.load_state_dict(checkpoint["weights"])
    except Exception as error:  # a foreign file can make unpickling raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: expected a checkpoint that --checkpoint wrote ({reason})") from error
    return model.to(device, memory_format=torch.channels_last), config | {"classes": classes}


def metrics(path: Path, args: argparse.Namespace) -> dict:
    """A checkpoint's calibration, PGD, weight noise and, given a folder, corruptions; written beside it."""
    device = lure.pick_device(args.device)
    model, config = load_checkpoint(path, device)
    sizes = {key: config[key] for key in ("image_size", "limit", "limit_test", "shots")}
    data = lure.load_dataset(config["dataset"], args.data or config["data"], args.cache, **sizes)
    if data.classes != config["classes"]:
        raise DataError(f"{path}: was trained on other classes than those of {args.data or config['data']}")
    train_x, test_x = (
        lure.to_input(x.permute(0, 2, 3, 1).to(device)) for x in (data.images, data.test_images)
    )
    train_y, test_y = data.labels.to(device), data.test_labels.to(device)
    probabilities = predict(model, test_x).softmax(1)
    origin = lure.provenance(["evaluate.py", *args.argv], device, data)
    result = {"config": config, **origin, "accuracy": accuracy(model, test_x, test_y)}
    result["ece"] = expected_calibration_error(probabilities, test_y)
    result["reliability"] = {k: v.tolist() for k, v in reliability_bins(probabilities, test_y).items()}
    result["pgd"] = {}
    for epsilon in args.epsilons:
        batches = zip(test_x.split(125), test_y.split(125), strict=True)
        attacked = torch.cat([pgd_attack(model, x, y, epsilon / 255) for x, y in batches])
        result["pgd"][f"{epsilon:g}/255"] = accuracy(model, attacked, test_y)
    generator = torch.Generator().manual_seed(config["seed"])
    noisy = weight_noise_accuracy(model, train_x, train_y, args.sigmas, generator=generator)
    result["weight_noise"] = dict(zip(args.sigmas, noisy, strict=True))
    if args.corruptions:
        result["corruptions"] = corruption_accuracy(model, args.corruptions)
    text = json.dumps(result, indent=1) + "\n"
    lure.write(path.with_suffix(".metrics.json"), lambda file: file.write_text(text))
    return result


def summary(result: dict) -> str:
    mca = {"mca": result["corruptions"]["mean"]} if "corruptions" in result else {}
    return json.dumps({k: result[k] for k in ("accuracy", "ece", "pgd", "weight_noise")} | mca)


# ------------------------------------------------------------ A folder's report

NAMES = {"warm-start": "Warm start", "sp": "S&P", "llf": "LLF", "lure": "LURE", "scratch": "Scratch"}
NAMES |= {"rifle": "RIFLE", "dash": "DASH", "fire": "FIRE"}
NAMES |= {"fisher": "LURE by Fisher", "magnitude": "LURE by magnitude", "random": "LURE by chance"}
TITLES = {"cifar10": "CIFAR-10", "cifar10-jpeg": "CIFAR-10 (JPEG copy)", "cifar100": "CIFAR-100"}
TITLES |= {"restricted-imagenet": "Restricted ImageNet", "digits": "Digits"}
IN_PAPER = {"warm-start": "BL", "llf": "LLF", "sp": "S&P", "lure": "LURE"}


def load_runs(folder: Path) -> tuple[dict[str, list[dict]], dict[str, dict]]:
    """The records of a folder by row: METHOD-SEED.json, or METHOD-VARIANT-SEED.json with other options.

    Returns row → records, and row → its method's own settings and a variant's options. DataError for a file
    that is no record, and for rows that cannot be compared: other data, or other options and no variant.
    """
    runs: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".metrics.json"):
            continue
        try:
            record = json.loads(path.read_text()) | {"path": path}
            options = {"method": "lure", "set": []} | record["config"]
            options |= {"data": record["data"]["sha256"], "precision": record["precision"]}  # what they were
            row, seed = re.fullmatch(r"(.+)-(\d+)", path.stem).groups()
            if int(seed) != options["seed"] or not row.startswith(options["method"]):
                raise ValueError(f"it is of {options['method']}, seed {options['seed']}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: expected the record of a run, METHOD-SEED.json ({error})") from error
        runs.setdefault(row, []).append(record | {"config": options})
    if not runs:
        raise DataError(f"{folder}: expected records of runs, METHOD-SEED.json; found none")
    order = sorted(runs, key=lambda row: ([*METHODS].index(runs[row][0]["config"]["method"]), row))
    reference = next((runs[row][0] for row in order if row in METHODS), runs[order[0]][0])
    variants = {}
    for row in order:
        for record in runs[row]:
            compare(record, runs[row][0], apart={"seed"})
        apart = {"seed", "method", "set"}
        variants[row] = {} if row in METHODS else differences(runs[row][0], reference, apart | {"data"})
        compare(runs[row][0], reference, apart | variants[row].keys())
        own = dict(setting.split("=") for setting in runs[row][0]["config"]["set"])
        variants[row] = own | variants[row]
    return {row: runs[row] for row in order}, variants


def differences(record: dict, other: dict, apart: set) -> dict:
    """The options of `record`, but those `apart`, that the other has otherwise; `data` is the data's hash."""
    mine, theirs = record["config"], other["config"]
    apart = apart | lure.PATHS - {"data"}
    return {k: mine.get(k) for k in mine | theirs if k not in apart and mine.get(k) != theirs.get(k)}


def compare(record: dict, other: dict, apart: set) -> None:
    for name, value in differences(record, other, apart).items():
        there = f"{other['config'].get(name)} in {other['path'].name}"
        raise DataError(f"{record['path']}: cannot be compared: {name} is {value}, {there}")


def report(folder: Path) -> str:
    """A folder's runs as a Markdown table, beside the paper's if it has any. Writes it and figures there."""
    runs, variants = load_runs(folder)
    names = {}
    for row, options in variants.items():
        method = runs[row][0]["config"]["method"]
        names[row] = ", ".join([NAMES.get(method, method), *(f"{k} {v}" for k, v in options.items())])
    everything = [record for records in runs.values() for record in records]
    config, data, dataset = everything[0]["config"], everything[0]["data"], folder.resolve().name
    title = TITLES.get(dataset, dataset)
    machines = {f"{r['device']}, {r['precision']}, torch {r['versions']['torch']}" for r in everything}
    caption = (
        f"{title}: {config['arch']}, {config['mega_batches']} mega-batches of {config['epochs']} epochs, "
        f"replay {config['replay']}, {data['train']} training and {data['test']} test images; "
        f"{'; '.join(sorted(machines))}. Mean ± sample standard deviation over seeds."
    )
    text = f"{caption}\n\n{table(dataset, runs, names)}"
    for name, figure in figures(title, runs, names).items():
        lure.write(folder / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
    lure.write(folder / "table.md", lambda path: path.write_text(text))
    return text


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Mean ± sample standard deviation, the latter from two values on."""
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return mean + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def table(dataset: str, runs: dict, names: dict) -> str:
    config, data = (next(iter(runs.values()))[0][key] for key in ("config", "data"))
    published = json.loads((Path(__file__).parent / "results" / "paper.json").read_text())["tables"]
    published = published[{"full": "table1", "buffer": "table2", "none": "table3"}[config["replay"]]]["rows"]
    known = next((n for n in ("cifar100", "cifar10", "restricted-imagenet") if dataset.startswith(n)), None)
    t, tested = (3, 3_450) if known == "restricted-imagenet" else (8, 10_000)  # of the paper's Tables 1 to 3
    paper = {r["method"]: r for r in published if r["dataset"] == known and config["mega_batches"] == t}
    beside = ["paper", "difference"] if paper else []
    head = ["Method", "Seeds", "Test accuracy, %", *beside, "CER", *beside, "Gap, points", *beside, "ECE, %"]
    lines = [[*head, "Accuracy − warm start's", "Image passes", "Training, s"]]
    lines.append([":---"] + ["---:"] * (len(lines[0]) - 1))
    baseline = {r["config"]["seed"]: r["totals"]["test_accuracy"] for r in runs.get("warm-start", [])}
    columns = (("test_accuracy", "test_acc", 2), ("cer", "cer", 0), ("generalization_gap", "gap", 2))
    for row, records in runs.items():
        totals, cells = [r["totals"] for r in records], [names[row], str(len(records))]
        for key, column, digits in columns:
            values = [t[key] for t in totals if t[key] is not None]
            cells.append(spread(values, digits) if values else "–")
            if paper:
                printed = paper.get(IN_PAPER.get(row), {}).get(column)
                cells.append("–" if printed is None else f"{printed:.{digits}f}")
                like = printed is not None and (key != "cer" or data["test"] == tested)
                cells.append(f"{statistics.fmean(values) - printed:+.{digits}f}" if like and values else "–")
        pairs = [(r["totals"]["test_accuracy"], baseline.get(r["config"]["seed"])) for r in records]
        paired = [own - other for own, other in pairs if other is not None and row != "warm-start"]
        cells += [spread([100 * t["ece"] for t in totals]), spread(paired, sign="+") if paired else "–"]
        cells += [f"{totals[0]['image_passes']:,}", spread([t["seconds"] for t in totals], 0)]
        lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def figures(title: str, runs: dict, names: dict) -> dict:
    """Anytime curves and, from the *.metrics.json beside records, reliability diagram and corruption bars."""
    from matplotlib.figure import Figure

    def axes_of(name, what, size):
        drawn[name] = Figure(figsize=size, layout="constrained")
        return drawn[name].subplots(subplot_kw={"title": f"{title}: {what}"})

    drawn, measured = {}, {}
    style = {
        row: {"marker": "os^vD<>pP*Xhd"[i % 13], "ls": ("-", "--", ":")[i % 3]} for i, row in enumerate(runs)
    }
    axes = axes_of("anytime", "error at any time", (6.4, 4.4))
    for row, records in runs.items():
        errors = torch.tensor([[100 - m["test"]["accuracy"] for m in r["mega_batches"]] for r in records])
        seen, mean = range(1, errors.shape[1] + 1), errors.mean(dim=0)
        (line,) = axes.plot(seen, mean, label=names[row], ms=4, **style[row])
        if len(records) > 1:
            low, high = mean - errors.std(dim=0), mean + errors.std(dim=0)
            axes.fill_between(seen, low, high, alpha=0.12, color=line.get_color())
        paths = [r["path"].with_suffix(".metrics.json") for r in records]
        if found := [json.loads(path.read_text()) for path in paths if path.exists()]:
            measured[row] = found
    axes.set(xlabel="mega-batches seen", ylabel="test error, %")
    axes.legend(fontsize=8)

    if measured:
        axes = axes_of("reliability", "reliability", (5, 5))
        axes.plot([0, 1], [0, 1], color="grey", lw=1, label="calibrated")
        for row, found in measured.items():
            bins = [{k: torch.tensor(v) for k, v in m["reliability"].items()} for m in found]
            count = sum(b["count"] for b in bins)
            x, y = (sum(b["count"] * b[k] for b in bins) / count for k in ("confidence", "accuracy"))
            ece = spread([100 * m["ece"] for m in found], 1)
            axes.plot(x[count > 0], y[count > 0], label=f"{names[row]}: ECE {ece} %", ms=4, **style[row])
        axes.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
        axes.legend(fontsize=8)

    corrupted = {row: [m for m in found if "corruptions" in m] for row, found in measured.items()}
    if corrupted := {row: found for row, found in corrupted.items() if found}:
        axes = axes_of("corruptions", "corruptions, mean of five severities", (12, 4.5))
        width = 0.8 / len(corrupted)
        for i, (row, found) in enumerate(corrupted.items()):
            bars = [
                statistics.fmean(a for m in found for a in m["corruptions"][name]) for name in CORRUPTIONS
            ]
            bars.append(statistics.fmean(m["corruptions"]["mean"] for m in found))
            x = [place + width * (i - (len(corrupted) - 1) / 2) for place in range(len(bars))]
            axes.bar(
                x, bars, width, label=names[row], hatch=("", "///", "...", "xxx")[i % 4], ec="white", lw=0.3
            )
        axes.set_xticks(range(20), [*CORRUPTIONS, "mean (mCA)"], rotation=40, ha="right", fontsize=8)
        axes.set(ylabel="accuracy, %", ymargin=0.2)  # room for the legend
        axes.legend(fontsize=8, ncols=5)
    return drawn


# ------------------------------------------------------------ Command line
def main(argv=None) -> int:
    """The command line; its status is that of `lure.main`."""
    parser = lure.Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("report", help="table and figures of folders of runs")
    command.add_argument("paths", nargs="+", type=Path, metavar="FOLDER")
    command.set_defaults(run=lambda path, args: print(f"{report(path)}\n{path}: table.md, anytime.png"))
    command = commands.add_parser(
        "metrics", help="calibration, attack, weight noise, corruptions of checkpoints"
    )
    command.add_argument("paths", nargs="+", type=Path, metavar="CHECKPOINT")
    command.add_argument("--corruptions", type=Path, help="folder of CIFAR-10-C")
    command.add_argument(
        "--epsilons", nargs="*", type=float, default=[1, 2, 4, 8], help="of PGD-10, in 1/255"
    )
    command.add_argument("--sigmas", nargs="*", type=float, default=[0, 0.01, 0.02, 0.03, 0.04, 0.05])
    command.add_argument("--data", help="folder of the data set, if it has moved")
    command.add_argument("--cache", default=".cache", help="folder for decoded images")
    command.add_argument("--device", default="auto")
    command.set_defaults(run=lambda path, args: print(path, summary(metrics(path, args))))
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return lure.guarded(parser.prog, lambda: [args.run(path, args) for path in args.paths])


if __name__ == "__main__":
    sys.exit(main())
