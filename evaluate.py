"""How good a trained network is beyond its accuracy.

python evaluate.py lure-1.pt                             # writes lure-1.metrics.json beside it
python evaluate.py lure-1.pt --attack                    # writes lure-1.attack.json
python evaluate.py lure-1.pt --corruptions CIFAR-10-C    # writes lure-1.corruptions.json
"""

import argparse
import contextlib
import json
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lure
from baselines import fisher_information, magnitudes, random_scores
from experiments import runs
from experiments.command import Parser, guarded
from experiments.data import DataError, resized_as
from experiments.files import load, provenance, write_text
from lure import Dataset, chunks, evaluating, expected_calibration_error


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
    and in [0, 1]; gradients and training flags stay as they were. ValueError for epsilon < 0, steps < 1 or
    images that are not in [0, 1], as normalised ones: a network that expects those normalises within.
    """
    if not epsilon >= 0 or steps < 1:
        raise ValueError(f"expected epsilon >= 0 and steps >= 1, got {epsilon} and {steps}")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"expected images in [0, 1], got {float(images.min())} to {float(images.max())}")
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
    with torch.no_grad(), evaluating(model):
        return torch.cat([model(part) for (part,) in chunks(chunk, images)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of float images (N, C, H, W) in [0, 1], in evaluation mode."""
    correct = int(predict(model, images).argmax(1).eq(labels).sum())
    return 100 * (correct / len(labels))


CORRUPTIONS = [
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "gaussian_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "saturate", "spatter"),
    *("elastic_transform", "pixelate", "jpeg_compression"),
]


def corruption_accuracy(model: nn.Module, directory: str | Path, resize=None) -> dict:
    """Accuracy in percent under the 19 corruptions of CIFAR-10-C (Hendrycks & Dietterich 2019).

    `directory` holds NAME.npy for each, uint8 (5 · n, H, W, 3), severity s in rows n · (s − 1) to n · s, and
    labels.npy (5 · n,), the same n integers five times, for any n. `resize`, of uint8 (N, H, W, 3), makes
    them as large as those that the network was trained on. Returns for each corruption five accuracies, by
    severity, and as "mean" the paper's mCA, over all 95 (section 6.1). DataError, before anything is
    measured, for a file that is missing or not as described, or labels that are none of the network's.
    """
    device = next(model.parameters()).device
    resize = resize or (lambda images: images)
    labels = load_labels(Path(directory) / "labels.npy")
    arrays = {name: load_array(Path(directory) / f"{name}.npy") for name in CORRUPTIONS}
    for name, images in arrays.items():
        found = f"{images.dtype} {tuple(images.shape)}"
        if images.dtype != torch.uint8 or images.shape[3:] != (3,) or len(images) != len(labels):
            wanted = f"uint8 ({len(labels)}, H, W, 3), as many as labels.npy has"
            raise DataError(f"{directory}/{name}.npy: expected {wanted}; found {found}")
    first = resize(arrays[CORRUPTIONS[0]][:1]).to(device)
    classes = predict(model, lure.to_input(first)).shape[1]
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise DataError(f"{directory}/labels.npy: expected labels of {classes} classes, found {found}")
    result: dict = {}
    for name, images in arrays.items():
        result[name] = []
        for of_severity, targets in zip(images.chunk(5), labels.chunk(5), strict=True):
            pixels = resize(of_severity).to(device)
            result[name].append(accuracy(model, lure.to_input(pixels), targets.to(device)))
    return result | {"mean": statistics.fmean(a for severities in result.values() for a in severities)}


def load_labels(path: Path) -> Tensor:
    """The labels of CIFAR-10-C, int64 (5 · n,). DataError unless they are the same n integers five times."""
    labels = load_array(path)
    if labels.is_floating_point() or labels.ndim != 1 or len(labels) == 0 or len(labels) % 5:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise DataError(f"{path}: expected integers (5n,), found {found}")
    if any(not torch.equal(part, labels[: len(labels) // 5]) for part in labels.chunk(5)):
        raise DataError(f"{path}: expected the labels of five severities, one after the other, all the same")
    return labels.long()


def load_array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise DataError(f"{path}: expected an array of CIFAR-10-C ({error})") from error


def weight_noise_accuracy(model, images, labels, sigmas, repeats=3, generator=None) -> list[float]:
    """Accuracy in percent for each σ of `sigmas`, with N(0, σ²) added to every parameter (section 7.2).

    The mean over `repeats` draws, made on the generator's device. `images` (N, C, H, W) float in [0, 1]. The
    parameters are put back bit by bit.
    """

    def noisy(sigma):
        with restored(model), torch.no_grad():
            for p in model.parameters():
                noise = torch.randn(p.shape, generator=generator, device=(generator or p).device)
                p.add_(sigma * noise.to(p))
            return accuracy(model, images, labels)

    return [statistics.fmean(noisy(sigma) for _ in range(repeats)) for sigma in sigmas]


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
    for criterion, share in product(scores, shares):
        with restored(model):
            lure.reinitialize_(model, lure.top_k_mask(scores[criterion], 1 - share), generator)
            redrawn = model if sample is None else runs.reestimated(model, sample)
            result[criterion][share] = accuracy(redrawn, images, labels)
    return result


@contextlib.contextmanager
def restored(model: nn.Module):
    """Afterwards the parameters and buffers are what they were, bit by bit."""
    tensors = [*model.parameters(), *model.buffers()]
    saved = [t.detach().clone() for t in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for t, before in zip(tensors, saved, strict=True):
                t.copy_(before)


# ------------------------------------------------------------ A checkpoint's metrics
def metrics(path: Path, args: argparse.Namespace) -> dict:
    """A checkpoint's calibration, weight noise and redrawing, or its accuracy under PGD or corruptions.

    DataError for a file that is no checkpoint of `runs.recorded`, or of other classes.
    """
    device = lure.pick_device(args.device)
    kind = "corruptions" if args.corruptions else "attack" if args.attack else "metrics"
    out = path.with_name(f"{path.name.removesuffix('.pt')}.{kind}.json")
    wrong = f"{path}: expected a checkpoint that --checkpoint wrote"
    try:
        checkpoint = load(path)
        classes, weights = checkpoint["classes"], checkpoint["weights"]
        known = {k: v for k, v in checkpoint["config"].items() if k in runs.DEFAULTS}
        config = runs.Config(**known | dict(data=args.data or known["data"], cache=args.cache))
    except Exception as error:  # a foreign file can make this raise anything
        raise DataError(f"{wrong} ({type(error).__name__})") from error
    data = runs.loaded_once(config)
    if data.classes != classes:
        raise DataError(f"{path}: expected to have been trained on the classes of {config.data}")
    result = {"config": checkpoint["config"] | {"classes": classes}}
    result |= provenance(["evaluate.py", *args.argv], device, data)
    refuse_other_data(path, checkpoint, result["data"], config.data)
    refuse_other_run(out, result)
    data = data.to(device)
    model = lure.build_model(config.arch, data, torch.Generator())
    try:
        model.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise DataError(f"{wrong} ({type(error).__name__})") from error
    if args.corruptions:
        if data.images.shape[3] != 3:
            raise DataError(f"{path}: expected a network of colour images, as those of CIFAR-10-C are")
        refuse_numbers_as_text(path, classes)
        resize = partial(resized_as, config, tuple(data.images.shape[1:3]))
        result["corruptions"] = corruption_accuracy(model, args.corruptions, resize)
        result["images_per_severity"] = len(load_array(args.corruptions / "labels.npy")) // 5
    elif args.attack:
        result["pgd"] = attacked_accuracy(model, data, args.epsilons)
    else:
        result |= clean_metrics(model, data, config, args.sigmas)
    write_text(out, json.dumps(result, indent=1) + "\n")
    return result


def refuse_other_data(path: Path, checkpoint: dict, data: dict, folder: str) -> None:
    """DataError if the run was on other data than these; an old checkpoint's are in the record beside it."""
    record = path.with_suffix(".json")
    trained_on = checkpoint.get("data")
    if trained_on is None and record.exists():
        trained_on = json.loads(record.read_text())["data"]
    if trained_on is not None and trained_on != data:
        expected = f"the data that it was trained on, sha256 {trained_on['sha256']}"
        raise DataError(f"{path}: expected {expected}; {folder} has {data['sha256']}")


def refuse_other_run(out: Path, result: dict) -> None:
    """DataError if what was measured of another run is there already."""
    if not out.exists():
        return
    try:
        there = json.loads(out.read_text())
        same = there["data"] == result["data"] and runs.alike(there["config"], result["config"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out}: expected what evaluate.py wrote, or no file ({error})") from error
    if not same:
        raise DataError(f"{out}: expected no file, or one that was measured of the same run")


def refuse_numbers_as_text(path: Path, classes: list[str]) -> None:
    """DataError for classes 0, 1, 10, 11, 2, … as folders are sorted: CIFAR-10-C's labels are numbers."""
    if all(name.isdecimal() for name in classes) and sorted(classes, key=int) != classes:
        order = f"the order of text, {', '.join(classes[:4])}, …"
        raise DataError(f"{path}: its classes are numbers in {order}; name them 00, 01, …")


def attacked_accuracy(model, data: Dataset, epsilons) -> dict[str, float]:
    """Test accuracy under PGD-10 for each radius, in 1/255."""
    images, labels, result = lure.to_input(data.test_images), data.test_labels, {}
    for epsilon in epsilons:
        batches = zip(images.split(125), labels.split(125), strict=True)
        attacked = torch.cat([pgd_attack(model, x, y, epsilon / 255) for x, y in batches])
        result[f"{epsilon:g}/255"] = accuracy(model, attacked, labels)
    return result


def clean_metrics(model, data: Dataset, config: runs.Config, sigmas) -> dict:
    """Test accuracy: clean, by confidence (ECE), after redrawing by criterion and share.

    By σ of weight noise, the accuracy on what the run trained on: the training parts of its mega-batches.
    """
    data, stream = runs.draw_stream(config, data)
    train_x, train_y = data.samples(torch.cat([batch.new for batch in dict.fromkeys(stream)]))
    test_x, test_y = lure.to_input(data.test_images), data.test_labels
    probabilities = predict(model, test_x).softmax(1)
    result: dict = {"accuracy": 100 * probabilities.argmax(1).eq(test_y).double().mean().item()}
    result["ece"] = expected_calibration_error(probabilities, test_y)
    result["reliability"] = {k: v.tolist() for k, v in reliability_bins(probabilities, test_y).items()}
    generator = torch.Generator().manual_seed(config.seed)
    noisy = weight_noise_accuracy(model, train_x, train_y, sigmas, generator=generator)
    result["weight_noise"] = {f"{s:g}": a for s, a in zip(sigmas, noisy, strict=True)}
    drawn = torch.randperm(len(train_y), generator=generator)[:1125]  # as many as the protocol's π
    pi = train_x[drawn], train_y[drawn]
    draws = generator.get_state()
    result["redrawing"] = redrawing_accuracy(model, pi, test_x, test_y, SHARES, generator)
    sample, _ = data.samples(stream[-1].new[:1000])
    generator.set_state(draws)  # so that the same weights are redrawn
    anew = redrawing_accuracy(model, pi, test_x, test_y, SHARES, generator, sample)
    result["redrawing_reestimated"] = anew
    result["accuracy_reestimated"] = accuracy(runs.reestimated(model, sample), test_x, test_y)
    return result


def summary(result: dict) -> str:
    shown = {k: result[k] for k in ("accuracy", "ece", "pgd", "weight_noise", "redrawing") if k in result}
    return json.dumps(shown or {"mca": result["corruptions"]["mean"]})


# ------------------------------------------------------------ Command line
EPSILONS, SIGMAS, SHARES = (1, 2, 4, 8), (0, 0.01, 0.02, 0.03, 0.04, 0.05), (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def main(argv=None) -> int:
    """The command line; its status is that of `guarded`."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--corruptions", type=Path, help="folder of CIFAR-10-C: measure these instead")
    parser.add_argument("--attack", action="store_true", help="measure accuracy under PGD-10 instead")
    parser.add_argument("--epsilons", nargs="*", type=float, default=EPSILONS, help="of PGD-10, in 1/255")
    parser.add_argument("--sigmas", nargs="*", type=float, default=SIGMAS, help="of the noise on the weights")
    parser.add_argument("--data", help="folder of the data set, if it has moved")
    parser.add_argument("--cache", default=".cache", help="folder for decoded images")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return guarded(parser.prog, lambda: [print(p, summary(metrics(p, args))) for p in args.paths])


if __name__ == "__main__":
    sys.exit(main())
