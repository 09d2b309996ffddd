# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "scikit-learn>=1.3", "tqdm>=4.60"]
# ///
"""Learn, Unlearn and Relearn (LURE, TMLR 2023), the whole method in one file.

Data arrive in mega-batches. After each, LURE measures by SNIP how much every weight matters for what was just
learned, keeps the top 80 %, redraws the others, and trains on: Algorithm 1 of the paper is `run`, below.

    python lure.py --dataset digits --image-size 16 --arch small --mega-batches 4 --epochs 10    # on a laptop
    python lure.py --dataset cifar10 --out lure-1.json                             # the paper's protocol
    torchrun --nproc-per-node=2 lure.py --dataset cifar10 --out lure-1.json        # the same on two GPUs

The functions from `mega_batches` to `expected_calibration_error` lift out with the imports that they use.
"""

import argparse
import copy
import glob
import hashlib
import inspect
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn


# ------------------------------------------------------------ Settings: this dataclass is the command line
def option(default, help, choices=(), low=0, high=1e18):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))


DATASETS = ("digits", "cifar10", "cifar100", "folder", "restricted-imagenet")
ARCHITECTURES = ("resnet18", "resnet50", "wide_resnet50_2", "vgg16_bn", "small")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Config:
    """Every setting of a run, by default the paper's (section 3, A.2). ValueError for one out of range."""

    dataset: str = option("cifar10", "data set", DATASETS)
    data: str = option("data", "folder that the data set is in, or is downloaded to")
    cache: str = option(".cache", "folder for decoded images")
    image_size: int = option(0, "side to resize to, at most 1024; 0: folders to 32, others not", high=1024)
    limit: int = option(0, "training images to use, a stratified choice; 0: all")
    limit_test: int = option(0, "test images to use, a stratified choice; 0: all")
    shots: int = option(0, "training images of each class to use, whatever --limit is; 0: all")
    label_noise: float = option(0.0, "probability that a training label is redrawn, in [0, 1]", high=1)
    arch: str = option("resnet18", "network", ARCHITECTURES)
    mega_batches: int = option(8, "number of mega-batches, at least 1", low=1)
    replay: str = option("full", "earlier samples to train on too", ("full", "buffer", "none"))
    buffer_size: int = option(187, "number of them under --replay buffer, at least 0")
    val_fraction: float = option(0.1, "share of a mega-batch for validation, in [0, 0.9]", high=0.9)
    epochs: int = option(50, "epochs per mega-batch, at least 1", low=1)
    batch_size: int = option(64, "samples per step, at least 2", low=2)
    lr: float = option(0.1, "learning rate, at least 0")
    momentum: float = option(0.9, "momentum of SGD, at least 0")
    weight_decay: float = option(1e-4, "weight decay, at least 0")
    gamma: float = option(0.1, "factor on the rate after 40 and 80 percent of the epochs, at least 0")
    select: str = option("last", "epoch whose weights a mega-batch ends with", ("last", "best-val"))
    keep_momentum: bool = option(False, "let SGD's momentum outlive the mega-batch")
    keep: float = option(0.8, "share of the weights that unlearning keeps, in (0, 1]", low=1e-12, high=1)
    pi: str = option("learned", "mega-batch to draw the sample pi from", ("learned", "seen", "next"))
    pi_fraction: float = option(0.2, "size of pi as a share of it, in (0, 1]", low=1e-12, high=1)
    seed: int = option(1, "seed of stream, start, order and forgetting, in [0, 2^30)", high=2**30 - 1)
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: the GPU if there is one")
    precision: str = option("auto", "of training; auto: bfloat16 where it is fast", PRECISIONS)
    out: str = option("", "file for the record (JSON)")
    checkpoint: str = option("", "file for the final weights")

    def __post_init__(self):
        for f in fields(self):
            value, meta, flag = getattr(self, f.name), f.metadata, "--" + f.name.replace("_", "-")
            if value == [] and f.default != ():  # what argparse makes of --flag=--
                raise ValueError(f"{flag}: expected {meta['help']}; got nothing")
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(f"{flag}: there is no {value!r}; choose from {', '.join(meta['choices'])}")
            if isinstance(value, (int, float)) and not meta["low"] <= value <= meta["high"]:
                raise ValueError(f"{flag}: expected {meta['help']}; got {value}")


class DataError(Exception):
    """The data are not as they should be; the message names the file and says what was expected."""


# ------------------------------------------------------------ Stream (section 3)
class MegaBatch(NamedTuple):
    train: Tensor  # int64 indices of what to train on now, replay included
    val: Tensor  # this mega-batch's validation part
    new: Tensor  # this mega-batch's training part


def mega_batches(
    num_samples: int, num_mega_batches: int, replay="full", buffer_size=187, val_fraction=0.1, generator=None
) -> Iterator[MegaBatch]:
    """Divide the samples at random into a stream of mega-batches, int64 index tensors on the CPU.

    Sizes differ by at most one; `val` is round(val_fraction · size) of it; all `val` and `new` are disjoint.
    Of the earlier training samples, `train` adds to `new` all (replay "full"), none ("none") or at most
    `buffer_size`, a uniform sample ("buffer": a true one, what has left it never returns). ValueError for an
    argument out of range, and where a mega-batch would have nothing to train on.
    """
    if replay not in ("full", "buffer", "none") or not 0 <= val_fraction < 1 or buffer_size < 0:
        raise ValueError(f"replay {replay!r}, buffer {buffer_size} or val_fraction {val_fraction} cannot be")
    count = min(max(num_mega_batches, 1), num_samples + 1)  # with one more, a part is empty
    parts = torch.randperm(num_samples, generator=generator).tensor_split(count)
    if num_mega_batches < 1 or any(round(val_fraction * len(part)) >= len(part) for part in parts):
        raise ValueError(f"{num_samples} samples do not allow {num_mega_batches} mega-batches to train on")
    priority = torch.randperm(num_samples, generator=generator)  # the buffer holds those that are first by it
    stream, earlier = [], torch.empty(0, dtype=torch.int64)
    for part in parts:
        val, new = part.tensor_split([round(val_fraction * len(part))])
        replayed = {"full": len(earlier), "buffer": buffer_size, "none": 0}[replay]
        stream.append(MegaBatch(torch.cat([new, earlier[priority[earlier].argsort()][:replayed]]), val, new))
        earlier = torch.cat([earlier, new])
    return iter(stream)


# ------------------------------------------------------------ Unlearn: sensitivity, mask, reinitialisation
def connection_sensitivity(model: nn.Module, images: Tensor, labels: Tensor, chunk=64) -> dict[str, Tensor]:
    """SNIP's connection sensitivity s_j = |g_j| / Σ_k |g_k| (Eq. 2; Lee et al. 2018, arXiv 1810.02340).

    `images` (N, …) go to the model unchanged, `chunk` at a time; `labels` (N,) int64; L is the mean
    cross-entropy over all N, in evaluation mode. Returns scores >= 0, of the weight's shape and dtype, for a
    parameter of two or more dimensions that requires a gradient (a connection, not a bias or normalisation).
    Together they sum to 1, or are 0 if L reaches none. Model, gradients and random state stay as they were.
    """
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}
    gradients = [torch.zeros_like(p) for p in weights.values()]
    training = {module: module.training for module in model.modules()}
    cuda = {p.device for p in weights.values() if p.is_cuda}
    with torch.random.fork_rng(cuda), torch.enable_grad(), torch.autocast(labels.device.type, enabled=False):
        model.eval()
        try:
            for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
                loss = F.cross_entropy(model(x), y, reduction="sum") / len(labels)
                if weights and loss.requires_grad:
                    parts = torch.autograd.grad(loss, [*weights.values()], materialize_grads=True)
                    gradients = [g + part for g, part in zip(gradients, parts, strict=True)]
        finally:
            for module, flag in training.items():
                module.training = flag
    # g is a derivative by the mask, not by the weight: the loss sees m·θ, so ∂L/∂m = θ·∂L/∂θ at m = 1.
    scores = {name: (p.detach() * g).abs() for (name, p), g in zip(weights.items(), gradients, strict=True)}
    total = sum(s.sum(dtype=torch.float64) for s in scores.values())
    return {name: s / total if total > 0 else s for name, s in scores.items()}


def top_k_mask(scores: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """M_j = 1[s_j >= s̃_k] (section 3): True for the k = round(keep · m) largest of all m scores together.

    Exactly k: of equal scores the earlier is kept (order of the dict, then row-major), where the paper's
    indicator would keep them all. Bool tensors of the scores' names and shapes, in time linear in m.
    ValueError unless 0 < keep <= 1 and no score is NaN.
    """
    if not 0 < keep <= 1 or any(s.isnan().any() for s in scores.values()):
        raise ValueError(f"expected keep in (0, 1] and scores without NaN; keep is {keep}")
    sizes = [s.numel() for s in scores.values()]
    if (k := round(keep * sum(sizes))) == 0:
        return {name: torch.zeros_like(s, dtype=torch.bool) for name, s in scores.items()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    threshold = flat.kthvalue(len(flat) - k + 1).values  # s̃_k, the k-th largest
    mask = flat > threshold
    mask[(flat == threshold).nonzero().flatten()[: k - int(mask.sum())]] = True
    return {name: part.view_as(scores[name]) for name, part in zip(scores, mask.split(sizes), strict=True)}


def reinitialize_(model: nn.Module, mask: dict[str, Tensor], generator: torch.Generator | None = None) -> int:
    """Redraw in place the weights whose mask is False (Eq. 3), no other value changes. Returns how many.

    New values: U(−1/√fan_in, 1/√fan_in), fan_in the product of all dimensions but the first, drawn on the
    generator's device. `mask`: parameter name → bool tensor of its shape. ValueError, with nothing changed,
    for a name or a shape that the model does not have.
    """
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, m in mask.items():
            if name not in parameters or parameters[name].shape != m.shape:
                raise ValueError(f"mask: the model has no parameter {name!r} of shape {tuple(m.shape)}")
        for name, m in mask.items():
            p, bound = parameters[name], 1 / math.sqrt(max(1, math.prod(m.shape[1:])))
            drawn = torch.empty(int((~m).sum()), dtype=p.dtype, device=(generator or p).device)
            p[~m] = drawn.uniform_(-bound, bound, generator=generator).to(p.device)
        return sum(int((~m).sum()) for m in mask.values())


def average_(tensors: Iterable[Tensor]) -> None:
    """Each of the tensors becomes, in place, its mean over the processes of torch.distributed, if any."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()


def unlearn_(model: nn.Module, images: Tensor, labels: Tensor, keep=0.8, generator=None) -> dict[str, Tensor]:
    """LURE's step on the sample π = (images, labels): score, keep, redraw, as in the three above.

    In place; returns the mask, True where a weight was kept. ValueError unless 0 < keep <= 1.
    Scores are averaged over the processes of torch.distributed: at one generator state all redraw the same.
    """
    scores = connection_sensitivity(model, images, labels)
    average_(scores.values())
    mask = top_k_mask(scores, keep)
    reinitialize_(model, mask, generator)
    return mask


# ------------------------------------------------------------ Metrics (sections 4 and 7.1)
def cumulative_error_rate(errors: Iterable) -> int:
    """CER (Eq. 4), a count: the misclassified test samples, `errors`, summed over the mega-batches."""
    return sum(int(e) for e in errors)


def generalization_gap(train_accuracy: float, val_accuracy: float) -> float:
    """Train minus validation accuracy (section 4), in percentage points, from percent."""
    return train_accuracy - val_accuracy


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE = Σ_b (n_b/N) · |acc_b − conf_b| (Naeini et al. 2015; section 7.1), in [0, 1].

    `probabilities` (N, C) float, `labels` (N,) int64; b: the bins (i/B, (i+1)/B] of the top-1 confidence.
    """
    confidence, prediction = probabilities.double().max(dim=1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=labels.device)
    bin, excess = torch.bucketize(confidence, edges[1:-1]), confidence - prediction.eq(labels).double()
    return float(torch.zeros_like(edges).index_add_(0, bin, excess).abs().sum() / len(labels))


# ------------------------------------------------------------ Data

CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
# Mean and standard deviation of the channels, padding of the random crop, whether to flip.
PREPROCESSING = dict.fromkeys(DATASETS, (*CIFAR10, 4, True)) | {
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), 4, True),
    "digits": ((0.3053,), (0.3762,), 1, False),  # a mirrored digit is another digit
}
RESTRICTED_IMAGENET = {  # balanced; inclusive ranges of the index of the 1000 sorted class folders
    "bird": (10, 14), "turtle": (33, 37), "lizard": (42, 46), "spider": (72, 76), "crab": (118, 122),
    "dog": (200, 204), "cat": (281, 285), "big cat": (286, 290), "beetle": (302, 306),
    "butterfly": (322, 326), "monkey": (371, 374), "fish": (393, 397), "fruit": (948, 952),
    "fungus": (992, 996),
}  # fmt: skip


class Dataset(NamedTuple):
    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]


def load_dataset(
    name: str, data="data", cache=".cache", image_size=0, limit=0, limit_test=0, shots=0
) -> Dataset:
    """Load one of `DATASETS` from the folder `data`, where torchvision also downloads the CIFARs to.

    Images become squares of side `image_size`; 0: those of folders of side 32, the others stay as they are.
    `limit`, `limit_test`: a stratified sample of so many images; `shots`: of so many training images of each
    class; 0: all. The choice is the same every time. DataError if the data are not as they should be.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = (torch.from_numpy(x) for x in load_digits(return_X_y=True))
        images = (pixels * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
        test, train = stratified(labels, len(labels)).tensor_split([round(0.2 * len(labels))])
        loaded = Dataset(images[train], labels[train], images[test], labels[test], list("0123456789"))
    elif name in ("cifar10", "cifar100"):
        source = getattr(torchvision.datasets, name.upper())
        try:
            train, test = (source(data, train, download=True) for train in (True, False))
        except (OSError, RuntimeError) as error:
            raise DataError(f"{data}: expected {source.filename}, cannot download it ({error})") from error
        images, test_images = (torch.from_numpy(s.data).permute(0, 3, 1, 2) for s in (train, test))
        labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
        loaded = Dataset(images, labels, test_images, test_labels, train.classes)
    else:
        loaded = load_folders(name, Path(data), Path(cache), image_size or 32)
    images, labels, test_images, test_labels, classes = loaded
    if (fewest := int(labels.bincount(minlength=len(classes)).min())) < shots:
        raise DataError(f"--shots {shots}: a class of {name} has only {fewest} training images")
    train = stratified(labels, shots * len(classes) or limit or len(labels), equal=shots > 0)
    test = stratified(test_labels, limit_test or len(test_labels))
    images, test_images = images[train], test_images[test]
    if image_size and images.shape[2:] != (image_size, image_size):
        resize = torchvision.transforms.functional.resize
        images, test_images = (resize(x, [image_size, image_size]) for x in (images, test_images))
    return Dataset(images, labels[train], test_images, test_labels[test], classes)


def stratified(labels: Tensor, size: int, equal: bool = False) -> Tensor:
    """Indices of a fixed random sample, the classes in proportion to their sizes, or in `equal` numbers."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty(len(labels))
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = (torch.arange(len(members)) + 0.5) / (1 if equal else len(members))
    return rank.argsort(stable=True)[:size]


def load_folders(name: str, root: Path, cache: Path, image_size: int) -> Dataset:
    """Read root/<split>/<class>/<image>, decoded once and cached by the files' names, sizes and times."""
    from PIL import Image
    from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
    from tqdm import tqdm

    samples, classes = [], []
    for split in ("train", "test") if name == "folder" else ("train", "val"):
        try:
            folders, label_of = find_classes(root / split)
            if name == "restricted-imagenet":
                if len(folders) != 1000:
                    raise OSError(f"{root / split} has {len(folders)} class folders, not ImageNet's 1000")
                ranges = enumerate(RESTRICTED_IMAGENET.values())
                label_of = {f: label for label, (a, b) in ranges for f in folders[a : b + 1]}
                folders = list(RESTRICTED_IMAGENET)
            refuse_loops(root / split / folder for folder in label_of)
            samples.append(make_dataset(root / split, label_of, IMG_EXTENSIONS))
        except OSError as error:
            source = "" if name == "folder" else ", ILSVRC 2012 from image-net.org"
            raise DataError(f"{error}; expected {root}/{split}/<class>/<image>{source}") from error
        classes.append(folders)
    if odd := sorted(set(classes[0]) ^ set(classes[1])):
        raise DataError(f"{root}: expected every class in both splits, {odd[0]!r} is in one only")
    sizes, (paths, labels) = [len(s) for s in samples], zip(*samples[0], *samples[1], strict=True)
    below, stats = len(str(root / "x")) - 1, map(os.stat, paths)
    content = [(p[below:], s.st_size, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
    digest = hashlib.sha256(json.dumps([2, image_size, content]).encode()).hexdigest()  # 2: of `decode_image`
    stored = cache / f"{root.resolve().name}-{image_size}-{digest[:16]}.pt"
    if not stored.exists():
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:  # more would be slower
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a huge image
            images = pool.map(partial(decode_image, size=image_size), paths)
            decoded = torch.stack(list(tqdm(images, f"decode {root}", len(paths), disable=None)))
        write(stored, partial(torch.save, decoded))
    try:
        decoded = load(stored, mmap=True)
        if decoded.dtype != torch.uint8 or decoded.shape != (len(paths), 3, image_size, image_size):
            raise ValueError
    except Exception as error:
        raise DataError(f"{stored}: expected decoded images; remove it ({type(error).__name__})") from error
    train, test = decoded.split(sizes)
    train_labels, test_labels = torch.tensor(labels).split(sizes)
    return Dataset(train, train_labels, test, test_labels, classes[0])


def refuse_loops(folders: Iterable[Path]) -> None:
    """DataError for a folder that a link leads to again: its images would be read twice, or for ever."""
    reached = set()
    for path, *_ in (step for folder in folders for step in os.walk(folder, followlinks=True)):
        if (real := os.path.realpath(path)) in reached:
            raise DataError(f"{path}: expected a folder of its own, found {real} again")
        reached.add(real)


def decode_image(path: str, size: int) -> Tensor:
    from PIL import Image

    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no file")
        with Image.open(path, formats=("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")) as file:
            # Of 16 bits, which is mode I, `convert` would cut off what is above 255.
            image = file.convert("I").point(lambda value: value / 257) if file.mode[0] == "I" else file
            resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a foreign file can make a decoder raise anything
        raise DataError(f"{path}: expected an image, cannot decode it ({error})") from error
    return torchvision.transforms.functional.pil_to_tensor(resized)


def corrupt_labels(labels: Tensor, num_classes: int, probability: float, generator=None) -> Tensor:
    """Each label (int64) redrawn, with `probability`, over all classes, its own among them (section 6.3)."""
    redrawn = torch.randint(num_classes, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < probability, redrawn, labels)


def draw_stream(config: Config, data: Dataset) -> tuple[Tensor, list[MegaBatch]]:
    """The training labels, with their noise, and the stream of a run, both by its seed."""
    generator, c = torch.Generator().manual_seed(4 * config.seed), config
    labels = corrupt_labels(data.labels, len(data.classes), c.label_noise, generator)
    sizes = c.mega_batches, c.replay, c.buffer_size, c.val_fraction
    return labels, list(mega_batches(len(labels), *sizes, generator))


def write(path: str | Path, save: Callable[[BinaryIO], object]) -> None:
    """Let `save` write a temporary file beside `path`, then rename it: `path` is whole or it is as before."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(path).with_name(f".{Path(path).name}.{platform.node()}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(file)
            file.flush()
            os.fsync(file)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides the first in the second
        raise OSError(f"{path}: cannot be written ({error.__context__ or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, **options):
    """What torch.save wrote. Code in the file is not run: it makes this raise, as anything foreign may."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, **options)


# ------------------------------------------------------------ Networks
def build_model(arch, num_classes, in_channels=3, mean=CIFAR10[0], std=CIFAR10[1], generator=None):
    """One of `ARCHITECTURES` for small images: float (N, C, H, W) in [0, 1] → logits (N, num_classes).

    torchvision's ResNets with a 3×3 stem of stride 1 and no max-pool; its VGG16-BN without the fifth max-pool
    but with global average pooling and one linear layer; small: ResNet18 at width 16. Convolutions start
    Kaiming-normal (fan-out). It normalises its input. With a generator, its weights depend on that alone.
    """
    with torch.random.fork_rng([], enabled=generator is not None):
        if generator is not None:
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        if arch == "small":
            model = small_resnet(num_classes, in_channels)
        elif arch == "vgg16_bn":
            model = torchvision.models.vgg16_bn(num_classes=num_classes, init_weights=False)
            model.features = model.features[:-1]
            model.features[0] = nn.Conv2d(in_channels, 64, 3, padding=1)
            model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
        else:
            model = getattr(torchvision.models, arch)(num_classes=num_classes)
            model.conv1, model.maxpool = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False), nn.Identity()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
    model.register_buffer("std", torch.tensor(std).view(-1, 1, 1))
    model.register_forward_pre_hook(lambda model, args: (args[0] - model.mean) / model.std)
    return model


def small_resnet(num_classes: int, in_channels: int) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3

    model = nn.Sequential()  # of what is assigned to it, in that order
    model.conv1, model.bn1, model.relu = conv3x3(in_channels, 16), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
    for i, (a, b) in enumerate(((16, 16), (16, 32), (32, 64), (64, 128)), start=1):
        shortcut = nn.Sequential(conv1x1(a, b, 2), nn.BatchNorm2d(b)) if a < b else None
        setattr(model, f"layer{i}", nn.Sequential(BasicBlock(a, b, b // a, shortcut), BasicBlock(b, b)))
    model.avgpool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(128, num_classes)
    return model


# ------------------------------------------------------------ Learn: the loop, all of it on the device
def to_input(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, C) → float32 (N, C, H, W) in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def augmented(pixels: Tensor, index: Tensor, padding, flip, generator, share=slice(None)) -> Tensor:
    """Gather, crop and flip index[share] at random, in one indexing of the uint8 data set (N, H, W, C)."""
    (_, height, width, _), shape, device = pixels.shape, (len(index), 1, 1), pixels.device
    offsets = torch.randint(-padding, padding + 1, (2, *shape), device=device, generator=generator)
    index, (top, left) = index[share], offsets[:, share]  # a sample is the same whatever else is in the share
    rows = top + torch.arange(height, device=device)[:, None]
    columns = torch.arange(width, device=device).expand(len(index), 1, width)
    if flip:
        mirrored = torch.rand(shape, device=device, generator=generator)[share] < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    columns = left + columns
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # the padding is black
    cropped = pixels[index[:, None, None], rows.clamp(0, height - 1), columns.clamp(0, width - 1)]
    return to_input(cropped * inside[..., None])


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    lr, momentum, decay = config.lr, config.momentum, config.weight_decay
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=decay, fused=True)


def train_epoch_(model, optimizer, pixels, labels, train, config, generator) -> tuple[Tensor, Tensor]:
    """One epoch on the samples `train`, without a synchronisation. Returns running mean loss and accuracy."""
    rank, world = ranks()
    *_, padding, flip = PREPROCESSING[config.dataset]
    low = pick_precision(config.precision, train.device) == "bfloat16"
    order = train[torch.randperm(len(train), device=train.device, generator=generator)]
    batches = list(order.split(config.batch_size))
    if len(batches) > 1 and len(batches[-1]) < max(config.batch_size / 2, 2 * world):
        batches[-2:] = [torch.cat(batches[-2:])]  # a batch of a few would spoil the running statistics
    total_loss, correct = sums = torch.zeros(2, dtype=torch.float64, device=train.device)
    model.train()
    for index in batches:
        share = slice(rank * len(index) // world, (rank + 1) * len(index) // world)  # this process's
        with torch.autocast(train.device.type, torch.bfloat16, enabled=low):
            logits = model(augmented(pixels, index, padding, flip, generator, share))
        target = labels[index[share]]
        loss = F.cross_entropy(logits.float(), target, reduction="sum") / (len(index) / world)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total_loss += loss.detach() * len(index)
        correct += (logits.argmax(1) == target).sum() * world
    average_([sums, *(b for name, b in model.named_buffers() if "running_" in name)])
    return total_loss / len(train), correct / len(train)


def learn_(model, optimizer, pixels, labels, train, val, config, generator, bar) -> dict:
    """Train on the samples `train` for a mega-batch. Returns the last running accuracy and the speed."""
    best, weights, start = -1.0, None, time.perf_counter()
    for epoch in range(config.epochs):
        decays = (5 * epoch >= 2 * config.epochs) + (5 * epoch >= 4 * config.epochs)  # of 50, at 20 and at 40
        optimizer.param_groups[0]["lr"] = config.lr * config.gamma**decays
        loss, running = train_epoch_(model, optimizer, pixels, labels, train, config, generator)
        if not loss.isfinite():
            raise FloatingPointError(f"{bar.desc}in epoch {epoch + 1}, the loss is {float(loss)}")
        if config.select == "best-val":
            accuracy = by_first(lambda: evaluate(model, pixels[val], labels[val])["accuracy"])
            if accuracy > best:
                best, weights = accuracy, copy.deepcopy(model.state_dict())
        bar.update(len(train))
    if weights:
        model.load_state_dict(weights)
    passes, seconds = config.epochs * len(train), time.perf_counter() - start
    speed = dict(image_passes=passes, seconds=seconds, images_per_second=passes / seconds)
    return dict(running_train_accuracy=100 * float(running), **speed)


def evaluate(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict:
    """Accuracy (percent), errors (count), loss and ECE ([0, 1]): evaluation mode, float32, not augmented."""
    with torch.inference_mode():
        if len(labels) == 0:
            return dict(accuracy=None, errors=0, loss=None, ece=None)
        model.eval()
        parts = pixels.split(128)  # on a CPU, larger ones are half as fast: their memory is new each time
        logits = torch.cat([model(to_input(part)) for part in parts])
        errors, loss = int((logits.argmax(1) != labels).sum()), float(F.cross_entropy(logits, labels))
        ece = expected_calibration_error(logits.softmax(1), labels)
        return dict(accuracy=100 * (1 - errors / len(labels)), errors=errors, loss=loss, ece=ece)


# ------------------------------------------------------------ Algorithm 1: learn, unlearn, relearn
def lure_(model, pi, upcoming, fresh, generator, keep=0.8) -> dict[str, Tensor]:
    """LURE as a method of `run`: `unlearn_` on π."""
    images, labels = pi
    return unlearn_(model, images, labels, keep, generator)


Method = Callable[..., dict[str, Tensor] | None]  # `run` says what it gets and does


def run(config: Config, forget: Method = lure_) -> dict:
    """Algorithm 1. Returns the record of the run, and writes it to `config.out`; if it is there, it is read.

    After every mega-batch its state is saved beside `config.out`, from where the same call goes on. Under
    torch.distributed the processes train on a part of each batch, and the first alone reads and writes these.

    `forget(model, pi, upcoming, fresh, generator)` changes the model in place between mega-batches, returns a
    mask (True: kept) or None. `pi` is the sample π, (images, labels); `upcoming()` yields what is trained on
    next in such pairs, one per mega-batch, the new one last (without replay: alone); images are float in
    [0, 1], not augmented; `fresh()` builds a newly initialised network; `keep`, where it is a parameter, is
    the configuration's. At one seed, data, order and start are the same for every `forget`. `forgotten` in a
    mega-batch's row is measured right after `forget`. ValueError for settings that cannot be,
    DataError for data, FloatingPointError for a loss that is not finite, OSError for a file that cannot be
    written.
    """
    from tqdm import tqdm

    c, device = config, pick_device(config.device)
    if "keep" in inspect.signature(forget).parameters:
        forget = partial(forget, keep=c.keep)  # what the record says
    rngs = [torch.Generator(d) for d in ("cpu", "cpu", device)]
    start_rng, forget_rng, order_rng = (g.manual_seed(4 * c.seed + i) for i, g in enumerate(rngs, start=1))
    (rank, world), leads = ranks(), os.environ.get("LOCAL_RANK") in ("0", None)
    if world > 1 and not leads:
        dist.barrier()  # until the first process of this machine has filled the cache
    data = load_dataset(c.dataset, c.data, c.cache, c.image_size, c.limit, c.limit_test, c.shots)
    if world > 1 and leads:
        dist.barrier()
    origin = provenance(command_line(c), device, data) | dict(precision=pick_precision(c.precision, device))
    record = dict(format=FORMAT, config=asdict(c), totals={}, mega_batches=[], **origin)
    record = json.loads(json.dumps(record))  # as it will be read
    if by_first(lambda: record["data"]) != record["data"]:
        raise DataError(f"{c.data}: expected the data of the first process, found others")
    if done := by_first(lambda: finished(c, record)):
        return done
    pixels, test_pixels = (x.permute(0, 2, 3, 1).contiguous().to(device) for x in data[:4:2])
    labels, stream = by_first(lambda: draw_stream(c, data))
    labels, test_labels = labels.to(device), data.test_labels.to(device)
    stream = [MegaBatch(*(index.to(device) for index in batch)) for batch in stream]
    by_first(lambda: check_feasible(c, pixels, stream))

    def build(generator):
        mean, std, *_ = PREPROCESSING[c.dataset]
        model = build_model(c.arch, len(data.classes), data.images.shape[1], mean, std, generator)
        return model.to(device, memory_format=torch.channels_last)

    def sample(index):
        return to_input(pixels[index]), labels[index]

    model, rows = build(start_rng), record["mega_batches"]
    optimizer = build_optimizer(model, c)
    if c.out and (state := by_first(lambda: read_earlier(f"{c.out}.state", load, record, ALL_THE_SAME))):
        rows += state["mega_batches"]
        model.load_state_dict(state["model"])
        for generator, its_state in zip(rngs, state["generators"], strict=True):
            generator.set_state(its_state)
        if c.keep_momentum:
            optimizer.load_state_dict(state["optimizer"])
    net = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    net.broadcast_buffers = False  # running statistics are each process's own, until they are averaged
    total = c.epochs * sum(len(batch.train) for batch in stream[len(rows) :])
    with tqdm(total=total, unit="img", unit_scale=True, disable=rank > 0 or None) as bar:
        for i, batch in list(enumerate(stream))[len(rows) :]:
            bar.set_description(f"{Path(c.out).stem} mega-batch {i + 1} of {len(stream)}".lstrip())
            val = torch.cat([b.val for b in stream[: i + 1]]) if c.replay == "full" else batch.val
            if not c.keep_momentum:
                optimizer = build_optimizer(model, c)
            row = learn_(net, optimizer, pixels, labels, batch.train, val, c, order_rng, bar)  # or relearn
            row["train"] = evaluate(model, pixels[batch.train], labels[batch.train])
            row["val"] = evaluate(model, pixels[val], labels[val])
            row["test"] = evaluate(model, test_pixels, test_labels)
            if not all(math.isfinite(row[split]["loss"] or 0) for split in ("train", "val", "test")):
                raise FloatingPointError(f"{bar.desc}after epoch {c.epochs}, the loss is not finite")
            rows.append(row | dict(redrawn=None, redrawn_by_tensor=None, forgotten=None))
            if rank == 0:
                bar.write(f"{bar.desc}{row['test']['accuracy']:.2f} % of the test set", file=sys.stderr)
            if i + 1 < len(stream):
                source = dict(learned=batch.new, seen=batch.train, next=stream[i + 1].new)[c.pi]  # unlearn
                size = max(1, round(c.pi_fraction * len(source)))
                pi = sample(source[torch.randperm(len(source), generator=forget_rng)[:size].to(device)])
                parts = (b.new[torch.isin(b.new, stream[i + 1].train)] for b in stream[: i + 2])
                upcoming = partial(map, sample, [part for part in parts if len(part)])
                mask = forget(model, pi, upcoming, partial(build, forget_rng), forget_rng)
                if mask is not None:
                    redrawn = {name: (~m).flatten().double() for name, m in mask.items()}
                    rows[-1]["redrawn"] = torch.cat([*redrawn.values()]).mean().item()
                    rows[-1]["redrawn_by_tensor"] = {name: r.mean().item() for name, r in redrawn.items()}
                forgotten = evaluate(model, test_pixels, test_labels)
                rows[-1]["forgotten"] = {key: forgotten[key] for key in ("accuracy", "loss")}
            if rank == 0 and c.out:
                state = record | dict(model=model.state_dict(), generators=[g.get_state() for g in rngs])
                state["optimizer"] = optimizer.state_dict() if c.keep_momentum else None
                write(f"{c.out}.state", partial(torch.save, state))
    record["totals"] = totals(rows)
    if rank == 0 and c.checkpoint:
        state = dict(config=asdict(c), classes=data.classes, weights=model.state_dict())
        write(c.checkpoint, partial(torch.save, state))
    if rank == 0 and c.out:
        write(c.out, lambda file: file.write(f"{json.dumps(record, indent=1)}\n".encode()))
        tidy(c)
    return record


# ------------------------------------------------------------ Checks, record, state
def pick_device(name: str) -> torch.device:
    """The device to run on. From now on float32 is float32. ValueError if there is none of that name."""
    torch.backends.cudnn.allow_tf32 = False  # which is the default and rounds to 10 bits of mantissa
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if name == "cuda" and dist.is_initialized():
            name = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(name)
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise ValueError(f"--device {name}: expected cpu, or cuda or cuda:N where there is such a GPU")


def pick_precision(name: str, device: torch.device) -> str:
    """What to train in, "float32" or "bfloat16": auto is the latter where it is known to be the faster.

    That is on GPUs that have it, and on processors with AMX or by AMD: Intel's without AMX convert it slowly.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        has = torch.cpu.get_capabilities()
        native = has.get("amx_bf16") or (has.get("avx512_bf16") and "AMD" in has.get("cpu_name", ""))
    return "bfloat16" if native else "float32"


def check_feasible(config: Config, pixels: Tensor, stream: list[MegaBatch]) -> None:
    """What would otherwise be found out when the work is done. ValueError or OSError."""
    if config.arch == "vgg16_bn" and min(pixels.shape[1:3]) < 16:
        raise ValueError("--arch vgg16_bn: expected images of at least 16×16 pixels, for its four max-pools")
    if config.select == "best-val" and not all(len(batch.val) for batch in stream):
        raise ValueError("--select best-val: expected validation samples; --val-fraction leaves none")
    if min(config.batch_size, *(len(batch.train) for batch in stream)) < 2 * ranks()[1]:
        raise ValueError("--mega-batches, --batch-size: expected two training samples for every process")
    taken = map(os.path.realpath, (config.out, f"{config.out}.state"))
    if config.checkpoint and os.path.realpath(config.checkpoint) in taken:
        raise ValueError(f"--checkpoint {config.checkpoint}: expected another file than --out and its state")
    for path in filter(None, (config.out, config.out and f"{config.out}.state", config.checkpoint)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        odd = path.endswith("/") or (os.path.exists(path) and not os.path.isfile(path))
        if odd or not os.access(Path(path).parent, os.W_OK):
            raise OSError(f"{path}: expected a file that can be written")


def totals(rows: list[dict]) -> dict:
    """The paper's metrics of a run, from its mega-batches."""
    last, cer = rows[-1], cumulative_error_rate(row["test"]["errors"] for row in rows)
    train, val, test = (last[split]["accuracy"] for split in ("train", "val", "test"))
    gap = None if val is None else generalization_gap(train, val)
    final = dict(test_accuracy=test, cer=cer, generalization_gap=gap, ece=last["test"]["ece"])
    return final | {name: sum(row[name] for row in rows) for name in ("image_passes", "seconds")}


FORMAT = 1  # of the record and of the state
PATHS = {"data", "cache", "out", "checkpoint", "device"}  # where things are: no two runs differ by these
# Beside configuration and data, what has to be as it was for a run to be continued to the same result.
ALL_THE_SAME = ("format", "git_commit", "versions", "processes", "device")


def read_earlier(path: str, read, run: dict, keys=()) -> dict | None:
    """What an earlier call of the run left at `path`, if anything. ValueError if it is not of this run."""
    if not os.path.isfile(path):
        return None
    try:
        record = read(path)
        there, here = (
            {f"its {k}": r[k] for k in keys} | r["data"] | r["config"] | {"precision": r["precision"]}
            for r in (record, run)  # the precision that it ran in, whatever the option's word
        )
        odd = [k for k in there | here if k not in PATHS and there.get(k) != here.get(k)]
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{path}: expected what a call of this run wrote, or no file ({kind})") from error
    if odd:
        found = ", ".join(f"{k} {there.get(k)}, not {here.get(k)}" for k in odd)
        raise ValueError(f"{path}: expected no file, or one of this run; found {found}")
    return record


def finished(config: Config, run: dict) -> dict | None:
    """The record at `config.out`, if it and the checkpoint are there. ValueError if it is of another run."""
    record = read_earlier(config.out, lambda path: json.loads(Path(path).read_text()), run)
    if not record or (config.checkpoint and not os.path.exists(config.checkpoint)):
        return None
    tidy(config)
    return record


def tidy(config: Config) -> None:
    """Remove what a run that is done may have left: its state, temporary files of killed calls."""
    Path(f"{config.out}.state").unlink(missing_ok=True)
    for path in map(Path, filter(None, (config.out, config.checkpoint))):
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            temporary.unlink(missing_ok=True)


def command_line(config: Config) -> list[str]:
    """The call of this script, or of the one that extends `Config`, that means `config`."""
    words = [os.path.basename(inspect.getfile(type(config)))]
    for f in fields(config):
        if (value := getattr(config, f.name)) != f.default:
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += ["--" + f.name.replace("_", "-"), *map(str, values)]
    return words


def provenance(command: list[str], device: torch.device, data: Dataset) -> dict:
    """Where a number comes from: command, git commit, data, versions, device."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), "describe", "--always", "--dirty"]
    call = shlex.join([*git, "--abbrev=40", "--exclude=*"])  # by a shell, since there may be no git
    commit = subprocess.run(call, shell=True, capture_output=True, text=True).stdout.strip()
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    content = hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in data[:4]))
    python = ["python"] if (n := ranks()[1]) == 1 else ["torchrun", f"--nproc-per-node={n}"]
    return dict(
        command=shlex.join([*python, *command]),
        git_commit=commit or None,
        data=dict(train=len(data.labels), test=len(data.test_labels), sha256=content.hexdigest()),
        versions=dict(torch=str(torch.__version__), torchvision=torchvision.__version__),
        python=platform.python_version(),
        device=processor if device.type == "cpu" else torch.cuda.get_device_name(device),
        threads=torch.get_num_threads(),
        processes=n,
    )


# ------------------------------------------------------------ Several processes, by torchrun
def ranks() -> tuple[int, int]:
    """This process's number and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def by_first(call):
    """What `call` returns in the first process, in all of them."""
    result = [call() if ranks()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(result)
    return result[0]


# ------------------------------------------------------------ Command line
class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"{self.prog}: {printable(message)}\n")


def printable(text) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def guarded(program: str, call) -> int:
    """Call and return the exit status. An error that is the user's to mend is one line, not a traceback."""
    try:
        call()
    except (ValueError, DataError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        print(f"{program}: {printable(error) or 'interrupted'}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def main(argv=None, options=Config, method=lambda config: lure_) -> int:
    """The command line. Returns 0; 2: a wrong call; 1: wrong data, or a loss not finite; 130: interrupted."""
    if dist.is_torchelastic_launched():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    for f in fields(options):
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        kind = dict(action="store_true") if f.default is False else dict(type=type(f.default), metavar="X")
        kind = dict(nargs="*", metavar="KEY=VALUE") if f.default == () else kind
        text = f"{f.metadata['help']}{choices}; default: {f.default}"
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default, help=text, **kind)

    def check(config):
        method(config)
        pick_device(config.device)

    def call():
        config = by_first(lambda: options(**vars(parser.parse_args(argv))))
        by_first(lambda: check(config))  # so that what is wrong is told once
        record = run(config, method(config))
        if ranks()[0] == 0:
            print(json.dumps(record["totals"]))
        if dist.is_initialized():
            dist.destroy_process_group()

    return guarded(parser.prog, call)


if __name__ == "__main__":
    sys.exit(main())
