# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "scikit-learn>=1.3", "tqdm>=4.60"]
# ///
"""Learn, Unlearn and Relearn (LURE, TMLR 2023), the whole method in one file.

Data arrive in mega-batches. Between two of them, LURE measures how much every weight matters for what was
just learned, keeps the weights that matter most and redraws the others. Algorithm 1 of the paper is `run`:

    for each mega-batch of the stream                          mega_batches
        train on it, and on what is replayed                   learn_
        measure accuracy and calibration                       evaluate
        on π, a sample of what was just learned:               unlearn_
            s = |θ · ∂L/∂θ| / Σ |θ · ∂L/∂θ|                    connection_sensitivity
            M = the top 80 % of the weights by s               top_k_mask
            redraw the weights that are not in M               reinitialize_

    python lure.py --dataset digits                        # in two minutes on two CPU cores
    python lure.py --dataset cifar10 --out lure-1.json     # the paper's protocol

The functions from `cross_entropies` to `expected_calibration_error` can be copied out, with their imports.
"""

import argparse
import copy
import json
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import NamedTuple, TextIO

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from tqdm import tqdm

ARCHITECTURES = ("auto", "resnet18", "resnet50", "wide_resnet50_2", "small")


# ------------------------------------------------------------ Settings: this dataclass is the command line
def option(default, help, choices=None, **words):
    """A setting; `words` are what argparse gets in place of its type and choices."""
    return field(default=default, metadata=dict(help=help, choices=choices, words=words))


@dataclass(frozen=True)
class Config:
    """Every setting of a run, by default the paper's where it states one. ValueError for one out of range."""

    dataset: str = option("cifar10", "data set", ("digits", "cifar10", "cifar100"))
    data: str = option("data", "folder that the data set is in, or is downloaded to")
    label_noise: float = option(0.0, "probability that a training label is redrawn, in [0, 1]")
    arch: str = option("auto", "network; auto: small for digits, else resnet18", ARCHITECTURES)
    mega_batches: int = option(8, "number of mega-batches, from 1 to 10000")
    replay: str = option("full", "earlier samples to train on too", ("full", "buffer", "none"))
    buffer_size: int = option(187, "size of the buffer under --replay buffer, at least 0")
    val_fraction: float = option(0.1, "share for validation, in (0, 0.9]")
    epochs: int = option(50, "epochs per mega-batch, at least 1")
    batch_size: int = option(64, "samples per step, at least 2")
    lr: float = option(0.1, "learning rate, at least 0")
    momentum: float = option(0.9, "momentum of SGD, at least 0")
    weight_decay: float = option(1e-4, "weight decay, at least 0")
    gamma: float = option(0.1, "factor on the rate after 40 and 80 percent of the epochs, at least 0")
    select: str = option("last", "epoch whose weights a mega-batch ends with", ("last", "best-val"))
    keep_momentum: bool = option(False, "let SGD's momentum outlive the mega-batch", action="store_true")
    keep: float = option(0.8, "share of the weights that unlearning keeps, in (0, 1]")
    pi: str = option("learned", "what pi is drawn from; Algorithm 1: seen", ("learned", "seen", "next"))
    pi_fraction: float = option(0.2, "size of pi as a share of what it is drawn from, in (0, 1]")
    seed: int = option(1, "seed of stream, start, order and forgetting, in [0, 2^30)")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: the GPU if there is one")
    precision: str = option("auto", "number format; auto: the faster", ("auto", "float32", "bfloat16"))
    out: str = option("", "file for the record (JSON)")

    def __post_init__(self):
        check_settings(self, LIMITS)
        if self.arch == "auto":
            arch = "small" if self.dataset == "digits" else "resnet18"
            object.__setattr__(self, "arch", arch)  # the one way, since it is frozen


# ------------------------------------------------------------ Unlearn (section 3): score, keep, redraw
def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each label; of a label of −100, 0."""
    return F.cross_entropy(logits, labels, reduction="none")


def unlearn_(model, images, labels, keep=0.8, generator=None, loss=cross_entropies, chunk=64):
    """LURE's step on the sample π: redraw the weights of the model that matter least for it, in place.

    images, labels: π, tensors of N samples, as the network takes them, on the device of its weights.
    keep: share of the weights to keep, in (0, 1].
    generator: draws the new values, on its device; by default the global one of the weights' device.
    loss: loss(output, labels) → the losses of the samples, neither their mean nor their sum.
    chunk: how many samples pass the network at a time; it changes memory and time alone.

    Returns the mask, True where a weight was kept. Weights on which the loss does not depend score 0 and go
    first: those of a head that evaluation mode skips, the rows of an embedding that π has no token of or that
    are its padding. To spare a weight, `requires_grad_(False)` during the call. With several processes, send
    the weights of one to all afterwards. ValueError, before anything changes, if one of the three functions
    that it calls raises it, or if all scores are 0.
    """
    scores = connection_sensitivity(model, images, labels, loss, chunk)
    if not any(s.any() for s in scores.values()):
        raise ValueError("the loss depends on no weight: all sensitivities are 0")
    mask = top_k_mask(scores, keep)
    reinitialize_(model, mask, generator)
    return mask


def connection_sensitivity(model, images, labels, loss=cross_entropies, chunk=64) -> dict[str, Tensor]:
    """SNIP's connection sensitivity s_j = |g_j| / Σ_k |g_k|, g of Eq. 2 (Lee et al. 2018, arXiv 1810.02340).

    The arguments are those of `unlearn_`. L of Eq. 2 is the mean of all losses, in evaluation mode, without
    autocast. Returns, for each parameter of two or more dimensions that requires a gradient (biases and most
    normalisations have one), scores >= 0 of its shape, float32 at least; the sum of all is 1, or 0. Model and
    gradients stay as they were. ValueError if there is no such parameter or no sample, or for another loss.

    With layers that compute over a batch, such as normalisation without running statistics, scores depend on
    the chunk. In float16 many scores are exactly 0. An LSTM on CUDA needs
    `torch.backends.cudnn.flags(enabled=False)`, checkpointed layers `use_reentrant=False`. Observers of
    quantisation count this pass too. Complex weights are not supported.
    """
    weights = connections(model)
    if len(labels) == 0:
        raise ValueError("expected samples to score the weights by, got none")

    def share_of_mean(output, y):
        losses = loss(output, y)
        if losses.ndim == 0:
            raise ValueError("expected a loss of each sample, as by reduction='none'; got their mean or sum")
        mean_of_chunk = losses.sum() / len(y)
        return mean_of_chunk * (len(y) / len(labels))

    gradients = gradient_of_sum(model, [*weights.values()], chunks(chunk, images, labels), share_of_mean)
    scores = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        # g is a derivative by the mask, not by the weight: the loss sees M·θ, so ∂L/∂M = θ·∂L/∂θ at M = 1.
        at_least_float32 = torch.promote_types(weight.dtype, torch.float32)
        scores[name] = (weight.detach().to(at_least_float32) * gradient).abs()
    norm = sum(float(s.cpu().sum(dtype=torch.float64)) for s in scores.values())
    if not norm > 0:  # the loss depends on no weight
        return scores
    return {name: s / norm for name, s in scores.items()}


def top_k_mask(scores: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """M_j = 1[s_j >= s̃_k] (section 3): True for the k = max(1, round(keep · m)) largest of all m scores.

    Exactly k: of equal scores the earlier is kept (order of the dict, then row-major), where the paper's
    indicator would keep them all. Bool tensors, named and shaped as the scores. ValueError unless
    0 < keep <= 1 and no score is NaN.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"expected keep in (0, 1], got {keep}")
    for name, s in scores.items():
        if s.isnan().any():
            raise ValueError(f"{name}: a score is NaN, so the loss or a weight is not finite")
    flat = torch.cat([s.flatten() for s in scores.values()])
    k = max(1, round(keep * len(flat)))
    best_first = flat.sort(descending=True, stable=True).indices
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[best_first[:k]] = True
    parts = kept.split([s.numel() for s in scores.values()])
    mask = {}
    for (name, s), part in zip(scores.items(), parts, strict=True):
        mask[name] = part.view_as(s)
    return mask


def reinitialize_(model: nn.Module, mask: dict[str, Tensor], generator=None) -> None:
    """Redraw in place the weights whose mask is False (Eq. 3); no other value changes.

    `mask`: parameter name → bool tensor of its shape. New values are uniform, U(−1/√fan_in, 1/√fan_in), as in
    the authors' code, whatever distribution the layer started from; fan_in is the product of all dimensions
    but the first. They are drawn on the generator's device. ValueError, before anything changes, for a mask
    that is not of this model's parameters.
    """
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        shape = parameters[name].shape if name in parameters else None
        if kept.shape != shape or kept.dtype != torch.bool:
            found = f"{kept.dtype} {tuple(kept.shape)}"
            raise ValueError(f"{name}: expected bool, in the shape of a parameter of the model; got {found}")
    with torch.no_grad():
        for name, kept in mask.items():
            p = parameters[name]
            number = int((~kept).sum())
            if number == 0:
                continue
            bound = 1 / math.sqrt(math.prod(p.shape[1:]))
            device = p.device if generator is None else generator.device
            drawn = torch.empty(number, dtype=p.dtype, device=device)
            drawn.uniform_(-bound, bound, generator=generator)
            p[~kept] = drawn.to(p.device)


def connections(model: nn.Module) -> dict[str, Tensor]:
    """The weights that unlearning ranks: parameters of two or more dimensions that require a gradient."""
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("expected a network whose lazy layers have been called once")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights: dict[str, Tensor] = {name: p for name, p in trained.items() if p.ndim >= 2}
    if not weights:
        raise ValueError("found no weight to rank, of two or more dimensions and with a gradient")
    return weights


def gradient_of_sum(model, parameters, parts, loss) -> list[Tensor]:
    """∂/∂θ, for each of `parameters`, of Σ loss(model(x), y) over the parts (x, y), in evaluation mode."""
    gradients = [torch.zeros_like(p) for p in parameters]
    device = parameters[0].device.type
    with evaluating(model), torch.enable_grad(), torch.autocast(device, enabled=False):
        for x, y in parts:
            more = torch.autograd.grad(loss(model(x), y), parameters, materialize_grads=True)
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
    return gradients


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in chunks of `size` samples. ValueError if they are not of one length.

    A last chunk of one sample, which some layers refuse, is joined to the chunk before.
    """
    number = len(tensors[0])
    if any(len(tensor) != number for tensor in tensors):
        raise ValueError(f"expected as many samples in each, got {[len(tensor) for tensor in tensors]}")
    cuts = [*range(size, number, size)]
    if size > 1 and cuts and cuts[-1] == number - 1:
        cuts.pop()
    return zip(*(tensor.tensor_split(cuts) for tensor in tensors), strict=True)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then every module's mode as it was, by its own `train`, parents first."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            if module.training != mode:
                module.train(mode)


# ------------------------------------------------------------ Stream (section 3)
class MegaBatch(NamedTuple):
    train: Tensor  # int64 indices of the samples to train on: `new`, and what is replayed
    val: Tensor  # of the samples to validate on
    new: Tensor  # of the training samples that have just arrived

    def to(self, device) -> "MegaBatch":
        return MegaBatch(*(index.to(device) for index in self))


def mega_batches(
    num_samples: int, num_mega_batches: int, replay="full", buffer_size=187, val_fraction=0.1, generator=None
) -> list[MegaBatch]:
    """Divide the samples at random into mega-batches of one size (±1), int64 index tensors on the CPU.

    Of each, round(val_fraction · its size), but at least one, are for validation, and the rest is `new`.
    `train` is `new` and a replay of the `new` of earlier mega-batches: all of it (replay "full"), nothing
    ("none"), or at most `buffer_size`, a uniform sample ("buffer"; what has left the buffer never returns).
    `val` is what this mega-batch has for validation; under full replay, that of the earlier ones too.
    ValueError for another replay, a size below 0, or where nothing would be left to train on.
    """
    if replay not in ("full", "buffer", "none") or buffer_size < 0:
        raise ValueError(f"expected replay full, buffer or none, of 0 or more; got {replay}, {buffer_size}")
    parts = torch.randperm(num_samples, generator=generator).tensor_split(num_mega_batches)
    rank = torch.randperm(num_samples, generator=generator)  # those of lowest rank are a uniform sample
    limit = {"full": num_samples, "buffer": buffer_size, "none": 0}[replay]
    earlier = torch.empty(0, dtype=torch.int64)
    validation = torch.empty(0, dtype=torch.int64)
    stream = []
    for part in parts:
        val, new = part.tensor_split([max(1, round(val_fraction * len(part)))])
        if len(new) == 0:
            raise ValueError(f"{num_samples} samples do not make {num_mega_batches} mega-batches to train on")
        validation = torch.cat([validation, val]) if replay == "full" else val
        by_rank = earlier[rank[earlier].argsort()]
        train = torch.cat([new, by_rank[:limit]])
        stream.append(MegaBatch(train, validation, new))
        earlier = torch.cat([earlier, new])
    return stream


# ------------------------------------------------------------ Metrics (sections 4 and 7.1)
def cumulative_error_rate(errors: Iterable) -> int:
    """CER (Eq. 4), a count: the misclassified test samples, `errors`, summed over the mega-batches.

    ValueError for what is no count, such as a rate.
    """
    counts = [float(number) for number in errors]
    if not all(count.is_integer() for count in counts):
        raise ValueError(f"expected counts, got {counts}")
    return int(sum(counts))


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE = Σ_b (n_b/N) · |acc_b − conf_b| (Naeini et al. 2015; section 7.1), in [0, 1].

    `probabilities` (N, C) float, `labels` (N,) int64; the bins b are the intervals (i/bins, (i+1)/bins] of
    the top-1 confidence. ValueError for what is no probability, such as a logit, or no class, such as −100.
    """
    probabilities = probabilities.cpu().double()
    labels = labels.cpu()
    number, classes = probabilities.shape
    if labels.shape != (number,) or number == 0 or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"expected a class, from 0 to {classes - 1}, for each of one or more samples")
    if not (probabilities >= 0).all() or not ((probabilities.sum(dim=1) - 1).abs() <= 0.01).all():
        raise ValueError("expected probabilities, in [0, 1] and of sum 1, not logits, logarithms or percent")
    confidence, prediction = probabilities.max(dim=1)
    correct = prediction.eq(labels).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin = torch.bucketize(confidence, edges[1:-1])
    # n_b · (conf_b − acc_b) is the sum of (confidence − correct) over the samples of bin b.
    excess = torch.zeros_like(edges)
    excess.index_add_(0, bin, confidence - correct)
    return float(excess.abs().sum() / len(labels))


# ------------------------------------------------------------ Data, on the device from the start
class Dataset(NamedTuple):
    images: Tensor  # uint8 (N, H, W, C)
    labels: Tensor  # int64 (N,)
    test_images: Tensor
    test_labels: Tensor
    classes: list[str]
    mean: tuple = (0.4914, 0.4822, 0.4465)  # of the channels, in [0, 1]; these are CIFAR-10's
    std: tuple = (0.2470, 0.2435, 0.2616)
    padding: int = 4  # of the random crop
    flip: bool = True

    def to(self, device) -> "Dataset":
        return self._replace(
            images=self.images.to(device),
            labels=self.labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )

    def samples(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return to_input(self.images[index]), self.labels[index]


def load_dataset(name: str, folder="data") -> Dataset:
    """CIFAR-10 or -100, from the folder or downloaded to it (OSError), or scikit-learn's digits at 16×16."""
    return load_digits() if name == "digits" else load_cifar(name, folder)


def load_digits() -> Dataset:
    from sklearn import datasets, model_selection

    values, digits = datasets.load_digits(return_X_y=True)  # values from 0 to 16
    pixels = torch.from_numpy(values * 255 / 16).round().to(torch.uint8).view(-1, 1, 8, 8)
    images = torchvision.transforms.functional.resize(pixels, [16, 16])  # 8×8 are too few for `small`
    images = images.view(-1, 16, 16, 1)
    labels = torch.from_numpy(digits)
    split = dict(test_size=0.2, stratify=labels, random_state=0)
    train, test = model_selection.train_test_split(range(len(labels)), **split)
    data = Dataset(images[train], labels[train], images[test], labels[test], list("0123456789"))
    return data._replace(mean=(0.3053,), std=(0.3762,), padding=1, flip=False)  # a mirrored 2 is no 2


def load_cifar(name: str, folder: str) -> Dataset:
    source = getattr(torchvision.datasets, name.upper())
    try:
        train = source(folder, train=True, download=True)
        test = source(folder, train=False, download=True)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{folder}: expected {source.filename}, cannot download it ({error})") from error
    images, test_images = torch.from_numpy(train.data), torch.from_numpy(test.data)
    labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
    data = Dataset(images, labels, test_images, test_labels, train.classes)
    if name == "cifar100":
        data = data._replace(mean=(0.5071, 0.4866, 0.4409), std=(0.2673, 0.2564, 0.2762))
    return data


# ------------------------------------------------------------ Networks
def build_model(arch: str, data: Dataset, generator: torch.Generator) -> nn.Module:
    """One of `NETWORKS`, on the device of the data: float (N, C, H, W) in [0, 1] → logits (N, classes).

    The network normalises its input. Its convolutions start Kaiming-normal (fan-out); its weights depend on
    the generator alone.
    """
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is float32
    seed = torch.randint(2**62, (), generator=generator)
    with torch.random.fork_rng([]):  # layers draw their weights from the global generator
        torch.default_generator.manual_seed(int(seed))
        model = NETWORKS[arch](len(data.classes), data.images.shape[-1])
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.register_buffer("mean", torch.tensor(data.mean).view(-1, 1, 1))
    model.register_buffer("std", torch.tensor(data.std).view(-1, 1, 1))
    model.register_forward_pre_hook(lambda network, inputs: (inputs[0] - network.mean) / network.std)
    return model.to(data.images.device).to(memory_format=torch.channels_last)


def resnet(make: Callable, classes: int, channels: int) -> nn.Module:
    """One of torchvision's, for small images: a 3×3 stem of stride 1 and no max-pool."""
    model = make(num_classes=classes)
    model.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def small_resnet(classes: int, channels: int) -> nn.Module:
    """ResNet18 of a quarter of the width, its layers named as torchvision's."""
    layers: dict[str, nn.Module] = dict(conv1=conv3x3(channels, 16), bn1=nn.BatchNorm2d(16))
    layers["relu"] = nn.ReLU(inplace=True)
    inputs = 16
    for i, outputs in enumerate((16, 32, 64, 128), start=1):
        stride = outputs // inputs
        shortcut = None
        if stride > 1:
            shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))
        first = BasicBlock(inputs, outputs, stride, shortcut)
        layers[f"layer{i}"] = nn.Sequential(first, BasicBlock(outputs, outputs))
        inputs = outputs
    layers |= dict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(128, classes))
    return nn.Sequential(OrderedDict(layers))


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "resnet18": partial(resnet, torchvision.models.resnet18),
    "resnet50": partial(resnet, torchvision.models.resnet50),
    "wide_resnet50_2": partial(resnet, torchvision.models.wide_resnet50_2),
    "small": small_resnet,
}


# ------------------------------------------------------------ Learn: the loop, all of it on the device
def to_input(pixels: Tensor) -> Tensor:
    """uint8 (N, H, W, C) → float32 (N, C, H, W) in [0, 1], channels last in memory."""
    return pixels.permute(0, 3, 1, 2).float() / 255


def augmented(pixels: Tensor, index: Tensor, padding: int, flip: bool, generator) -> Tensor:
    """Gather, crop and flip pixels[index] at random, in one indexing of the uint8 data set (N, H, W, C)."""
    _, height, width, _ = pixels.shape
    one_each = (len(index), 1, 1)
    device = pixels.device
    # Where each crop begins, beside the image: from −padding to padding, down and to the right.
    top, left = torch.randint(-padding, padding + 1, (2, *one_each), device=device, generator=generator)
    rows = top + torch.arange(height, device=device)[:, None]  # (N, H, 1)
    columns = torch.arange(width, device=device)  # (W,)
    if flip:
        mirrored = torch.rand(one_each, device=device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)  # (N, 1, W)
    columns = left + columns  # (N, 1, W)
    # What comes from outside is black.
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (N, H, W)
    rows = rows.clamp(0, height - 1)
    columns = columns.clamp(0, width - 1)
    cropped = pixels[index[:, None, None], rows, columns]  # (N, H, W, C)
    return to_input(cropped * inside[..., None])


def pick_precision(name: str, device: torch.device) -> str:
    """What to train in; auto: bfloat16 where it is the faster, on GPUs and processors that compute in it."""
    if name != "auto":
        return name
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16") or (has.get("avx512_bf16") and "AMD" in has.get("cpu_name", ""))
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bfloat16" if fast else "float32"


def train_epoch_(model, optimizer, data: Dataset, train: Tensor, config, generator) -> Tensor:
    """One epoch on the samples `train`, not waiting for the device. Returns the running accuracy, [0, 1]."""
    device = train.device
    bfloat16 = pick_precision(config.precision, device) == "bfloat16"
    correct = torch.zeros((), dtype=torch.int64, device=device)
    model.train()
    for index in batches(train, config.batch_size, generator):
        images = augmented(data.images, index, data.padding, data.flip, generator)
        target = data.labels[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct += (logits.argmax(1) == target).sum()
    model.eval()  # tells what `wrap` may have made of it that training ends
    return correct.double() / len(train)


def batches(train: Tensor, size: int, generator) -> list[Tensor]:
    """The samples in random order, `size` at a time.

    A last batch of less than half the size, which would spoil running statistics, is joined to the one
    before.
    """
    order = train[torch.randperm(len(train), device=train.device, generator=generator)]
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) < max(size / 2, 2):
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def learn_(model, optimizer, data: Dataset, batch: MegaBatch, config, generator, wrap=None) -> dict:
    """Train on a mega-batch; its validation samples are for best-val. Returns accuracy and cost."""
    start = time.perf_counter()
    net = wrap(model) if wrap else model
    best_accuracy = -1.0
    best_weights = None
    for epoch in tqdm(range(config.epochs), "epochs", leave=False, disable=None):
        # The rate decays after two and after four fifths of the epochs: of 50, at 20 and at 40.
        decays = int(5 * epoch >= 2 * config.epochs) + int(5 * epoch >= 4 * config.epochs)
        optimizer.param_groups[0]["lr"] = config.lr * config.gamma**decays
        running_accuracy = train_epoch_(net, optimizer, data, batch.train, config, generator)
        if config.select == "best-val":
            accuracy = evaluate(model, data.images[batch.val], data.labels[batch.val])["accuracy"]
            if accuracy > best_accuracy:
                best_accuracy = accuracy
                best_weights = copy.deepcopy(model.state_dict())
    if best_weights:
        model.load_state_dict(best_weights)
    row = dict(running_train_accuracy=100 * float(running_accuracy))  # waits for the device
    row["image_passes"] = config.epochs * len(batch.train)
    row["seconds"] = time.perf_counter() - start
    return row


def evaluate(model: nn.Module, pixels: Tensor, labels: Tensor) -> dict:
    """Accuracy (percent), errors, loss and ECE ([0, 1]). FloatingPointError for a loss that is not finite."""
    with torch.no_grad(), evaluating(model):
        parts = chunks(128, pixels)  # on a CPU, larger ones are half as fast: each takes new memory
        logits = torch.cat([model(to_input(part)) for (part,) in parts])
    loss = float(F.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; a smaller --lr may help")
    errors = int((logits.argmax(1) != labels).sum())
    ece = expected_calibration_error(logits.softmax(1), labels)
    return dict(accuracy=100 * (1 - errors / len(labels)), errors=errors, loss=loss, ece=ece)


# ------------------------------------------------------------ Algorithm 1: learn, unlearn, relearn
class Between(NamedTuple):
    """What `forget` gets, beside the model, between two mega-batches. LURE uses the first and the third."""

    pi: tuple[Tensor, Tensor]  # the sample π: images, float (N, C, H, W) in [0, 1], and labels (N,)
    fresh: Callable[[], nn.Module]  # builds a new network
    generator: torch.Generator  # on the CPU, for all that is drawn
    data: Dataset
    stream: list[MegaBatch]  # the mega-batches so far and, last, the one that is trained on next


def lure_(model, between: Between, keep=0.8) -> dict[str, Tensor]:
    """LURE (section 3), as the `forget` of `run`: redraw the weights of the smallest connection sensitivity.

    Returns its mask, parameter name → bool tensor of its shape (True: kept), which is for records alone.
    """
    images, labels = between.pi
    try:
        return unlearn_(model, images, labels, keep, between.generator)
    except ValueError as error:
        raise FloatingPointError(f"the network cannot be unlearned: {error}") from error


STREAM, START, FORGETTING, ORDER = range(4)  # what is drawn, each by a generator of its own


def generator_of(seed: int, purpose: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(4 * seed + purpose)


def draw_stream(config: Config, data: Dataset) -> tuple[Dataset, list[MegaBatch]]:
    """The data with noisy labels, and the stream of a run, both drawn by its seed."""
    device = data.labels.device
    generator = generator_of(config.seed, STREAM)
    labels = with_noise(data.labels.cpu(), len(data.classes), config.label_noise, generator)
    stream = mega_batches(
        len(labels),
        config.mega_batches,
        config.replay,
        config.buffer_size,
        config.val_fraction,
        generator,
    )
    noisy = data._replace(labels=labels.to(device))
    return noisy, [batch.to(device) for batch in stream]


def with_noise(labels: Tensor, classes: int, probability: float, generator) -> Tensor:
    """The labels, each with the probability drawn anew from all classes, its own among them (section 6.3)."""
    redrawn = torch.randint(classes, labels.shape, generator=generator)
    drawn = torch.rand(labels.shape, generator=generator)
    noisy = drawn < probability
    return torch.where(noisy, redrawn, labels)


def draw_pi(config, data: Dataset, batch: MegaBatch, next_batch: MegaBatch, generator):
    """The sample π, images and labels: `config.pi_fraction` of the samples that have just been learned.

    They are the new ones of the mega-batch (section 3, Appendix A.2); with `config.pi` "seen" all that it was
    trained on, replay included (Algorithm 1, line 8); with "next" the new ones of the mega-batch to come.
    """
    source = batch.new
    if config.pi == "seen":
        source = batch.train
    elif config.pi == "next":
        source = next_batch.new
    size = max(1, round(config.pi_fraction * len(source)))
    order = torch.randperm(len(source), generator=generator)
    return data.samples(source[order[:size].to(source.device)])


def in_percent(measured: dict) -> dict:
    """What `evaluate` returns, as records have it: ECE in percent."""
    return measured | dict(ece=100 * measured["ece"])


def totals(rows: list[dict]) -> dict:
    """The paper's metrics of a run, accuracy, gap (section 4) and ECE in percent, and its cost."""
    last = rows[-1]
    return dict(
        test_accuracy=last["test"]["accuracy"],
        cer=cumulative_error_rate(row["test"]["errors"] for row in rows),
        generalization_gap=last["train"]["accuracy"] - last["val"]["accuracy"],
        ece=last["test"]["ece"],
        image_passes=sum(row["image_passes"] for row in rows),
        seconds=sum(row["seconds"] for row in rows),
    )


def run(config: Config, data: Dataset, forget=None, stream=None, state=None, wrap=None) -> Iterator[dict]:
    """Algorithm 1, on the device of the data.

    Yields, after each mega-batch and the unlearning that follows it, the state to go on from; its rows were
    measured before the unlearning.

    `forget(model, between)`: what to do between mega-batches, LURE by default. `stream`: what the function
    `mega_batches` returns; labels are then used as they are. By default the seed decides stream and label
    noise. `state`: one that was yielded, to go on from; its entry "mega_batches" has the rows so far, and its
    tensors are no copies. `wrap(model)`: what to train the model through, such as `torch.compile`. At one
    seed, stream, start and order are the same for every method. ValueError for impossible settings,
    FloatingPointError after a mega-batch whose loss is not finite.
    """
    forget = forget or partial(lure_, keep=config.keep)
    if stream is None:
        data, stream = draw_stream(config, data)
    start_rng = generator_of(config.seed, START)
    forget_rng = generator_of(config.seed, FORGETTING)
    order_rng = generator_of(config.seed, ORDER, data.images.device)
    rngs = [start_rng, forget_rng, order_rng]
    model = build_model(config.arch, data, start_rng)
    fresh = partial(build_model, config.arch, data, forget_rng)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=config.weight_decay, fused=True
    )
    rows: list[dict] = []
    if state:
        rows = state["mega_batches"]
        restore_(model, optimizer, rngs, state)
    for i in range(len(rows), len(stream)):
        batch = stream[i]
        # Learn; from the second mega-batch on, relearn.
        row = learn_(model, optimizer, data, batch, config, order_rng, wrap)
        if not config.keep_momentum:
            optimizer.state.clear()  # the momentum
        # Evaluate.
        row["train"] = in_percent(evaluate(model, data.images[batch.train], data.labels[batch.train]))
        row["val"] = in_percent(evaluate(model, data.images[batch.val], data.labels[batch.val]))
        row["test"] = in_percent(evaluate(model, data.test_images, data.test_labels))
        rows = [*rows, row]  # a new list: the yielded states keep theirs
        # Unlearn, if anything follows.
        if i + 1 < len(stream):
            pi = draw_pi(config, data, batch, stream[i + 1], forget_rng)
            forget(model, Between(pi, fresh, forget_rng, data, stream[: i + 2]))
        yield snapshot(rows, model, optimizer, rngs)


def snapshot(rows, model, optimizer, rngs) -> dict:
    generators = [rng.get_state() for rng in rngs]
    return dict(
        mega_batches=rows,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        generators=generators,
    )


def restore_(model, optimizer, rngs, state: dict) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    for rng, its_state in zip(rngs, state["generators"], strict=True):
        rng.set_state(its_state)


# ------------------------------------------------------------ Command line
LIMITS = dict(  # the least and the largest value
    label_noise=(0, 1),
    mega_batches=(1, 10000),
    buffer_size=(0, 1e18),
    val_fraction=(1e-12, 0.9),
    epochs=(1, 1e18),
    batch_size=(2, 1e18),
    lr=(0, 1e18),
    momentum=(0, 1e18),
    weight_decay=(0, 1e18),
    gamma=(0, 1e18),
    keep=(1e-12, 1),
    pi_fraction=(1e-12, 1),
    seed=(0, 2**30 - 1),
)


def check_settings(config: Config, limits: dict) -> None:
    """ValueError for a setting that is none of its choices or beyond its limits."""
    for f in fields(config):
        value = getattr(config, f.name)
        choices = f.metadata["choices"] or [value]
        least, largest = limits.get(f.name, (value, value))
        if value not in choices or not least <= value <= largest:
            name = f.name.replace("_", "-")
            raise ValueError(f"--{name}: expected {f.metadata['help']}; got {value}")


def pick_device(name: str) -> torch.device:
    """The device of that name; auto: the GPU if there is one. ValueError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise ValueError(f"--device {name}: expected cpu, or cuda, cuda:1 ... of a GPU")


def add_settings(parser: argparse.ArgumentParser, settings: type[Config]) -> None:
    for f in fields(settings):
        words = f.metadata["words"] or dict(type=type(f.default), choices=f.metadata["choices"])
        name = f.name.replace("_", "-")
        text = f"{f.metadata['help']}; default: {f.default}" if f.default else f.metadata["help"]
        parser.add_argument(f"--{name}", default=f.default, help=text, **words)


@contextmanager
def new_file(path: str) -> Iterator[TextIO]:
    """A file to write, which gets its name when it is complete. ValueError if that cannot be."""
    part = f"{path}.part"
    try:
        if os.path.exists(path):
            raise FileExistsError(path)
        file = open(part, "x")  # noqa: SIM115
    except OSError as error:
        raise ValueError(f"--out {path}: expected a new file in a folder that can be written") from error
    try:
        with file:
            yield file
        os.rename(part, path)
    except BaseException:
        os.remove(part)
        raise


def main(argv=None) -> None:
    """The command line: a line for each mega-batch on stderr, then the totals. An error is one line."""
    about = (__doc__ or "").split("\n")[0] + " Usage: python lure.py [--OPTION VALUE ...]"
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description=about, allow_abbrev=False)
    add_settings(parser, Config)
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        parser.error("for several processes: torchrun baselines.py --method lure")
    try:
        c = Config(**vars(parser.parse_args(argv)))
        with new_file(c.out) if c.out else nullcontext() as file:
            data = load_dataset(c.dataset, c.data).to(pick_device(c.device))
            for state in run(c, data):
                rows = state["mega_batches"]
                accuracy = rows[-1]["test"]["accuracy"]
                print(f"mega-batch {len(rows)}: {accuracy:.2f} % of the test set", file=sys.stderr)
            record = dict(config=asdict(c), totals=totals(rows), mega_batches=rows)
            if file:
                json.dump(record, file, indent=1)
        print(json.dumps(record["totals"]))
    except KeyboardInterrupt:
        parser.exit(
            130, f"{parser.prog}: interrupted; baselines.py --method lure goes on with a stopped run\n"
        )
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
