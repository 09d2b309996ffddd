"""What a checkpoint's network is worth beyond the accuracy in its record.

Enters: the command line of evaluate.py, checkpoints of baselines.py. Leaves: beside each checkpoint a file
(JSON) of calibration, weight noise and redrawing, or of the accuracy under PGD or corruptions.
"""

import argparse
import json
import sys
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import nn

import lure
from baselines import fisher_information, magnitudes, random_scores
from evaluate import (
    accuracy,
    corruption_accuracy,
    load_array,
    pgd_attack,
    predict,
    progress,
    reliability_bins,
    restored,
    weight_noise_accuracy,
)
from experiments import runs
from experiments.command import DataError, Parser, guarded
from experiments.data import resized_as
from experiments.files import load, provenance, write_text
from lure import Dataset, expected_calibration_error

EPSILONS = (1, 2, 4, 8)
SIGMAS = (0, 0.01, 0.02, 0.03, 0.04, 0.05)
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


# ------------------------------------------------------------ What is measured
def clean_metrics(model, data: Dataset, config: runs.Config, sigmas) -> dict:
    """Test accuracy: clean, by confidence (ECE), after redrawing by criterion and share.

    By σ of weight noise, the accuracy on what the run trained on: the training parts of its mega-batches.
    """
    data, stream = runs.draw_stream(config, data)
    train_index = torch.cat([batch.new for batch in dict.fromkeys(stream)])  # generations repeat one
    train_x, train_y = data.samples(train_index)
    test_x, test_y = lure.to_input(data.test_images), data.test_labels
    generator = torch.Generator().manual_seed(config.seed)
    # As it is.
    probabilities = predict(model, test_x).softmax(1)
    bins = reliability_bins(probabilities, test_y)
    result: dict = {"accuracy": 100 * probabilities.argmax(1).eq(test_y).double().mean().item()}
    result["ece"] = 100 * expected_calibration_error(probabilities, test_y)
    result["reliability"] = {name: values.tolist() for name, values in bins.items()}
    # With noise on its weights.
    result["weight_noise"] = {}
    for sigma in progress(sigmas, "weight noise"):
        (noisy,) = weight_noise_accuracy(model, train_x, train_y, [sigma], generator=generator)
        result["weight_noise"][f"{sigma:g}"] = noisy
    # With a part of its weights redrawn: with the running statistics as they are, and taken anew.
    drawn = torch.randperm(len(train_y), generator=generator)[:1125]  # as many as the protocol's π
    pi = train_x[drawn], train_y[drawn]
    sample, _ = data.samples(stream[-1].new[:1000])
    draws = generator.get_state()
    result["redrawing"] = redrawing_accuracy(model, pi, test_x, test_y, SHARES, generator)
    generator.set_state(draws)  # so that the same weights are redrawn
    anew = redrawing_accuracy(model, pi, test_x, test_y, SHARES, generator, sample)
    result["redrawing_reestimated"] = anew
    result["accuracy_reestimated"] = accuracy(runs.reestimated(model, sample), test_x, test_y)
    return result


def redrawing_accuracy(
    model, pi, images, labels, shares, generator, sample=None
) -> dict[str, dict[float, float]]:
    """Criterion of Table 8 → share of the weights → accuracy in percent right after redrawing it.

    `pi`: images (N, C, H, W) float in [0, 1] and labels (N,) int64 to score the weights by; `images` and
    `labels` to measure on; `shares` in (0, 1). The parameters are put back bit by bit. With a `sample` of
    images, batch normalisation's running statistics are taken anew from it before each measurement.
    """
    scores = {
        "lure": lure.connection_sensitivity(model, *pi),
        "fisher": fisher_information(model, *pi),
        "magnitude": magnitudes(model),
        "random": random_scores(model, generator),
    }
    result: dict[str, dict[float, float]] = {criterion: {} for criterion in scores}
    for criterion, share in progress([*product(scores, shares)], "redrawing"):
        mask = lure.top_k_mask(scores[criterion], 1 - share)
        with restored(model):
            lure.reinitialize_(model, mask, generator)
            redrawn = model if sample is None else runs.reestimated(model, sample)
            result[criterion][share] = accuracy(redrawn, images, labels)
    return result


def attacked_accuracy(model, data: Dataset, epsilons) -> dict[str, float]:
    """Test accuracy under PGD-10 for each radius, in 1/255."""
    images = lure.to_input(data.test_images)
    result = {}
    for epsilon in epsilons:
        batches = [*zip(images.split(125), data.test_labels.split(125), strict=True)]
        attacked = []
        for x, y in progress(batches, f"PGD, {epsilon:g}/255"):
            attacked.append(pgd_attack(model, x, y, epsilon / 255))
        result[f"{epsilon:g}/255"] = accuracy(model, torch.cat(attacked), data.test_labels)
    return result


def corrupted_accuracy(model, data: Dataset, config: runs.Config, path: Path, folder: Path) -> dict:
    """Accuracy under the corruptions in the folder. DataError for images or classes that are not as these."""
    if data.images.shape[3] != 3:
        raise DataError(f"{path}: expected a network of colour images, as those of CIFAR-10-C are")
    refuse_numbers_as_text(path, data.classes)
    resize = partial(resized_as, config, tuple(data.images.shape[1:3]))
    try:
        by_corruption = corruption_accuracy(model, folder, resize)
    except ValueError as error:
        raise DataError(error) from error
    number = len(load_array(folder / "labels.npy")) // 5
    return {"corruptions": by_corruption, "images_per_severity": number}


# ------------------------------------------------------------ Checkpoints
def metrics(path: Path, args: argparse.Namespace) -> dict:
    """What `args` asks for of a checkpoint; it is written beside it.

    DataError for a file that is no checkpoint of `runs.recorded`, or of other classes.
    """
    device = lure.pick_device(args.device)
    checkpoint, config = read_checkpoint(path, args)
    data = runs.loaded_once(config)
    if data.classes != checkpoint["classes"]:
        raise DataError(f"{path}: expected to have been trained on the classes of {config.data}")
    settings = checkpoint["config"] | {"classes": data.classes}
    result: dict = {"format": runs.FORMAT, "config": json.loads(json.dumps(settings))}
    result |= provenance(["evaluate.py", *args.argv], device, data)
    refuse_other_data(path, checkpoint, result["data"], config.data)
    kind = "corruptions" if args.corruptions else "attack" if args.attack else "metrics"
    out = path.with_name(f"{path.name.removesuffix('.pt')}.{kind}.json")
    refuse_other_run(out, result)
    data = data.to(device)
    model = restored_model(path, checkpoint["weights"], config, data)
    if args.corruptions:
        result |= corrupted_accuracy(model, data, config, path, args.corruptions)
    elif args.attack:
        result["pgd"] = attacked_accuracy(model, data, args.epsilons)
    else:
        result |= clean_metrics(model, data, config, args.sigmas)
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


WRONG = "expected a checkpoint that --checkpoint wrote"


def read_checkpoint(path: Path, args: argparse.Namespace) -> tuple[dict, runs.Config]:
    """The checkpoint, and the settings of its run, with the folders that `args` names."""
    try:
        checkpoint = load(path)
        if not {"classes", "weights"} <= checkpoint.keys():
            raise KeyError("classes", "weights")
        known = {name: value for name, value in checkpoint["config"].items() if name in runs.DEFAULTS}
        config = runs.Config(**known | dict(data=args.data or known["data"], cache=args.cache))
    except Exception as error:  # a foreign file can make this raise anything
        raise DataError(f"{path}: {WRONG} ({type(error).__name__})") from error
    return checkpoint, config


def restored_model(path: Path, weights: dict, config: runs.Config, data: Dataset) -> nn.Module:
    model = lure.build_model(config.arch, data, torch.Generator())
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {WRONG} ({type(error).__name__})") from error
    return model


def refuse_other_data(path: Path, checkpoint: dict, data: dict, folder: str) -> None:
    """DataError if the run was on other data than these; an old checkpoint's are in the record beside it."""
    record = path.with_suffix(".json")
    trained_on = checkpoint.get("data")
    if trained_on is None and record.exists():
        trained_on = runs.read_record(record)["data"]
    if trained_on is not None and trained_on != data:
        expected = f"the data that it was trained on, sha256 {trained_on['sha256']}"
        raise DataError(f"{path}: expected {expected}; {folder} has {data['sha256']}")


def refuse_other_run(out: Path, result: dict) -> None:
    """DataError if what was measured of another run is there already."""
    if not out.exists():
        return
    try:
        odd = runs.differing(runs.read_record(out), result)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}: expected what evaluate.py wrote, or no file ({error})") from error
    if odd:
        raise DataError(f"{out}: expected no file, or one that was measured of the same run")


def refuse_numbers_as_text(path: Path, classes: list[str]) -> None:
    """DataError for classes 0, 1, 10, 11, 2, … as folders are sorted: CIFAR-10-C's labels are numbers."""
    if all(name.isdecimal() for name in classes) and sorted(classes, key=int) != classes:
        order = f"the order of text, {', '.join(classes[:4])}, …"
        raise DataError(f"{path}: its classes are numbers in {order}; name them 00, 01, …")


# ------------------------------------------------------------ Command line
def main(argv: list[str] | None, description: str) -> int:
    """The command line of evaluate.py; its status is that of `guarded`."""
    parser = Parser(description=description)
    corruptions = "measure the accuracy on corrupted images instead; the folder of CIFAR-10-C"
    attack = "measure the accuracy under PGD-10 instead"
    epsilons = f"radii of the attack, in 1/255 of the pixels' range; default: {told(EPSILONS)}"
    sigmas = f"standard deviations of the noise on the weights; default: {told(SIGMAS)}"
    parser.add_argument("paths", nargs="+", type=Path, metavar="CHECKPOINT", help="what --checkpoint wrote")
    parser.add_argument("--corruptions", type=Path, metavar="FOLDER", help=corruptions)
    parser.add_argument("--attack", action="store_true", help=attack)
    parser.add_argument("--epsilons", nargs="*", type=float, default=EPSILONS, help=epsilons)
    parser.add_argument("--sigmas", nargs="*", type=float, default=SIGMAS, help=sigmas)
    parser.add_argument("--data", help="folder of the data set, if it has moved")
    parser.add_argument("--cache", default=".cache", help="folder for decoded images")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: the GPU if there is one"
    )
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return guarded(parser.prog, lambda: measure_all(args))


def told(numbers: tuple) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def measure_all(args: argparse.Namespace) -> None:
    for path in args.paths:
        print(path, summary(metrics(path, args)))


def summary(result: dict) -> str:
    names = ("accuracy", "ece", "pgd", "weight_noise", "redrawing")
    shown = {name: result[name] for name in names if name in result}
    return json.dumps(shown or {"mca": result["corruptions"]["mean"]})
