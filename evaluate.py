"""How good a trained network is beyond its accuracy.

python evaluate.py lure-1.pt                             # writes lure-1.metrics.json beside it
python evaluate.py lure-1.pt --attack                    # writes lure-1.attack.json
python evaluate.py lure-1.pt --corruptions CIFAR-10-C    # writes lure-1.corruptions.json
"""

import contextlib
import statistics
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lure import chunks, evaluating, to_input

progress = partial(tqdm, leave=False, disable=None)  # a bar on a terminal, nothing elsewhere


# ------------------------------------------------------------ Predictions
def predict(model: nn.Module, images: Tensor, chunk: int = 128) -> Tensor:
    """Logits (N, classes) of float images (N, C, H, W) in [0, 1], in evaluation mode."""
    with torch.no_grad(), evaluating(model):
        return torch.cat([model(part) for (part,) in chunks(chunk, images)])


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1 accuracy in percent of float images (N, C, H, W) in [0, 1], in evaluation mode.

    ValueError unless the logits are (N, classes) and the labels (N,).
    """
    logits = predict(model, images)
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        shapes = f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        raise ValueError(f"expected logits (N, classes) and labels (N,), got {shapes}")
    correct = int(logits.argmax(1).eq(labels).sum())
    return 100 * (correct / len(labels))


# ------------------------------------------------------------ Calibration (section 7.1)
def reliability_bins(probabilities: Tensor, labels: Tensor, bins: int = 15) -> dict[str, Tensor]:
    """The reliability diagram behind `expected_calibration_error`, over the same bins of top-1 confidence.

    `probabilities` (N, C), `labels` (N,) int64. Returns float64 tensors (bins,): the `count` of samples in a
    bin, and their `accuracy` and mean `confidence`, in [0, 1], both 0 where it is empty.
    """
    confidence, prediction = probabilities.double().max(dim=1)
    correct = prediction.eq(labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=labels.device)
    bin = torch.bucketize(confidence, edges[1:-1])
    in_bin = F.one_hot(bin, bins).double()  # (N, bins)
    count = in_bin.sum(dim=0)
    at_least_one = count.clamp(min=1)
    return {
        "count": count,
        "accuracy": correct @ in_bin / at_least_one,
        "confidence": confidence @ in_bin / at_least_one,
    }


# ------------------------------------------------------------ Robustness to attacks (section 6.2)
def pgd_attack(model, images, labels, epsilon, steps=10, step_size=None, generator=None) -> Tensor:
    """Projected gradient descent (Madry et al. 2017, arXiv 1706.06083; section 6.2) in an L∞ ball.

    `images` (N, C, H, W) float in [0, 1], `labels` (N,) int64, `epsilon` the radius. Takes `steps` steps of
    `step_size`, by default 2.5 · epsilon / steps, along the sign of the loss's gradient, in evaluation mode,
    from the image or, with a generator, from a uniform draw in the ball. Returns detached images in the ball
    and in [0, 1]; gradients and training flags stay as they were. ValueError for epsilon outside [0, 1],
    steps < 1 or images that are not in [0, 1], as normalised ones: a network that expects those normalises
    within.
    """
    if not 0 <= epsilon <= 1 or steps < 1:
        raise ValueError(f"expected epsilon in [0, 1] and steps >= 1, got {epsilon} and {steps}")
    if not ((images >= 0) & (images <= 1)).all():
        raise ValueError(f"expected images in [0, 1], got {float(images.min())} to {float(images.max())}")
    if step_size is None:
        step_size = 2.5 * epsilon / steps
    lower = (images - epsilon).clamp(min=0).detach()
    upper = (images + epsilon).clamp(max=1).detach()
    attacked = images.detach().clone()
    if generator is not None:
        noise = torch.empty(images.shape, dtype=images.dtype, device=generator.device)
        noise = noise.uniform_(-epsilon, epsilon, generator=generator).to(images.device)
        attacked = (attacked + noise).clamp(lower, upper)
    with evaluating(model), torch.enable_grad():
        for _ in range(steps):
            logits = model(attacked.requires_grad_())
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, attacked)
            attacked = (attacked.detach() + step_size * gradient.sign()).clamp(lower, upper)
    return attacked


# ------------------------------------------------------------ Robustness to corruptions (section 6.1)
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
    severity, and as "mean" the paper's mCA, over all 95 (section 6.1). ValueError, before anything is
    measured, for a file that is missing or not as described, or labels that are none of the network's.
    """
    device = next(model.parameters()).device
    directory = Path(directory)
    resize = resize or (lambda images: images)
    labels = load_labels(directory / "labels.npy")
    arrays = {name: load_images(directory / f"{name}.npy", len(labels)) for name in CORRUPTIONS}
    # The labels have to be of the network's classes.
    first = resize(arrays[CORRUPTIONS[0]][:1]).to(device)
    classes = predict(model, to_input(first)).shape[1]
    least = int(labels.min())
    largest = int(labels.max())
    if least < 0 or largest >= classes:
        found = f"{least} to {largest}"
        raise ValueError(f"{directory}/labels.npy: expected labels of {classes} classes, found {found}")
    result: dict = {}
    for name, images in progress(arrays.items(), "corruptions"):
        result[name] = []
        for of_severity, targets in zip(images.chunk(5), labels.chunk(5), strict=True):
            pixels = resize(of_severity).to(device)
            result[name].append(accuracy(model, to_input(pixels), targets.to(device)))
    result["mean"] = statistics.fmean(value for severities in result.values() for value in severities)
    return result


def load_labels(path: Path) -> Tensor:
    """The labels of CIFAR-10-C, int64 (5 · n,). ValueError unless they are the same n integers five times."""
    labels = load_array(path)
    if labels.is_floating_point() or labels.ndim != 1 or len(labels) == 0 or len(labels) % 5:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"{path}: expected integers (5n,), found {found}")
    first, *others = labels.chunk(5)
    if not all(torch.equal(first, part) for part in others):
        raise ValueError(f"{path}: expected the labels of five severities, one after the other, all the same")
    return labels.long()


def load_images(path: Path, number: int) -> Tensor:
    images = load_array(path)
    if images.dtype != torch.uint8 or images.shape[3:] != (3,) or len(images) != number:
        wanted = f"uint8 ({number}, H, W, 3), as many as labels.npy has"
        raise ValueError(f"{path}: expected {wanted}; found {images.dtype} {tuple(images.shape)}")
    return images


def load_array(path: Path) -> Tensor:
    try:
        return torch.from_numpy(np.lib.format.open_memmap(path, mode="c"))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"{path}: expected an array of CIFAR-10-C ({error})") from error


# ------------------------------------------------------------ Flatness: noise on the weights (section 7.2)
def weight_noise_accuracy(model, images, labels, sigmas, repeats=3, generator=None) -> list[float]:
    """Accuracy in percent for each σ of `sigmas`, with N(0, σ²) added to every parameter (section 7.2).

    The mean over `repeats` draws, made on the generator's device. `images` (N, C, H, W) float in [0, 1]. The
    parameters are put back bit by bit.
    """

    means = []
    for sigma in sigmas:
        accuracies = []
        for _ in range(repeats):
            with restored(model):
                add_noise_(model, sigma, generator)
                accuracies.append(accuracy(model, images, labels))
        means.append(statistics.fmean(accuracies))
    return means


def add_noise_(model: nn.Module, sigma: float, generator=None) -> None:
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, device=(generator or p).device)
            p.add_(sigma * noise.to(p))


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


def main(argv=None) -> int:
    """The command line, which measures checkpoints of baselines.py; its status."""
    from experiments import measure

    return measure.main(argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
