# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "scikit-learn>=1.3", "tqdm>=4.60"]
# ///
"""Learn, Unlearn and Relearn (LURE, TMLR 2023), the whole method in one file.

Data arrive in mega-batches. After each, LURE measures by SNIP how much every weight matters for what was just
learned, keeps the top 80 %, redraws the others, and trains on: Algorithm 1 of the paper is `run`, below.

    python lure.py --dataset digits                        # in two minutes on two CPU cores
    python lure.py --dataset cifar10 --out lure-1.json     # the paper's protocol

The functions from `unlearn_` to `expected_calibration_error` lift out with the imports that they use.
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
def option(default, help, choices=None):
    return field(default=default, metadata=dict(help=help, choices=choices))


@dataclass(frozen=True)
class Config:
    """Every setting of a run, by default the paper's where it states one. ValueError for one out of range."""

    dataset: str = option("cifar10", "data set", ("digits", "cifar10", "cifar100"))
    data: str = option("data", "folder that the data set is in, or is downloaded to")
    label_noise: float = option(0.0, "probability that a training label is redrawn, in [0, 1]")
    arch: str = option("auto", "network; auto: small for digits, else resnet18", ARCHITECTURES)
    mega_batches: int = option(8, "number of mega-batches, from 1 to 10000")
    replay: str = option("full", "earlier samples to train on too", ("full", "buffer", "none"))
    buffer_size: int = option(187, "number of them under --replay buffer, at least 0")
    val_fraction: float = option(0.1, "share for validation, in (0, 0.9]")
    epochs: int = option(50, "epochs per mega-batch, at least 1")
    batch_size: int = option(64, "samples per step, at least 2")
    lr: float = option(0.1, "learning rate, at least 0")
    momentum: float = option(0.9, "momentum of SGD, at least 0")
    weight_decay: float = option(1e-4, "weight decay, at least 0")
    gamma: float = option(0.1, "factor on the rate after 40 and 80 percent of the epochs, at least 0")
    select: str = option("last", "epoch whose weights a mega-batch ends with", ("last", "best-val"))
    keep_momentum: bool = option(False, "let SGD's momentum outlive the mega-batch")
    keep: float = option(0.8, "share of the weights that unlearning keeps, in (0, 1]")
    pi: str = option("learned", "what pi is drawn from; Algorithm 1: seen", ("learned", "seen", "next"))
    pi_fraction: float = option(0.2, "size of pi as a share of it, in (0, 1]")
    seed: int = option(1, "seed of stream, start, order and forgetting, in [0, 2^30)")
    device: str = option("auto", "cpu, cuda, cuda:1 ...; auto: the GPU if there is one")
    precision: str = option("auto", "of training; auto: bfloat16 if fast", ("auto", "float32", "bfloat16"))
    out: str = option("", "file for the record (JSON)")

    def __post_init__(self):
        check_settings(self, LIMITS)
        if self.arch == "auto":
            object.__setattr__(self, "arch", "small" if self.dataset == "digits" else "resnet18")


# ------------------------------------------------------------ Unlearn (section 3): score, keep, redraw
def unlearn_(model, images, labels, keep=0.8, generator=None, loss=F.cross_entropy, chunk=64):
    """LURE's step on the sample π = (images, labels): redraw the weights that matter least for it.

    The arguments are those of the three functions that it calls. In place, of weights on one device; returns
    the mask, True where a weight was kept. What the loss does not reach in evaluation mode, as an auxiliary
    head, scores 0 and goes first; `requires_grad_(False)` spares a weight. Of several processes, send the
    first's weights to all afterwards. ValueError, before anything changes, also if all scores are 0.
    """
    scores = connection_sensitivity(model, images, labels, loss, chunk)
    if not any(s.any() for s in scores.values()):
        raise ValueError("the loss depends on no weight: all sensitivities are 0")
    mask = top_k_mask(scores, keep)
    reinitialize_(model, mask, generator)
    return mask


def connection_sensitivity(model, images, labels, loss=F.cross_entropy, chunk=64) -> dict[str, Tensor]:
    """SNIP's connection sensitivity s_j = |g_j| / Σ_k |g_k|, g of Eq. 2 (Lee et al. 2018, arXiv 1810.02340).

    `images` (N, …) go to the model unchanged, `chunk` at a time; `labels` (N, …). `loss(output, labels)` is a
    mean over samples, each of the same weight (of one that weighs them, pass a chunk of N); the default's
    leaves out labels of −100. L is that over all N, in evaluation mode. Returns, for each parameter of two or
    more dimensions that requires a gradient (biases and most normalisations have one dimension), scores >= 0
    of its shape, float32 at least; their sum is 1, or 0. Model and gradients stay as they were. ValueError if
    there is no such parameter, or no sample.

    Of layers that compute over a batch, as normalisation without running statistics, scores depend on the
    chunk. A row that is not trained, as `padding_idx`'s, scores 0: put it back afterwards. In float16 many
    scores are exactly 0. An LSTM on CUDA needs `torch.backends.cudnn.flags(enabled=False)`, checkpointed
    layers `use_reentrant=False`. Quantisation observers move; complex weights are not supported.
    """
    weights = connections(model)

    def counted(labels):
        return int((labels != -100).sum()) if loss is F.cross_entropy else len(labels)

    total = counted(labels)
    if total == 0:
        raise ValueError("expected samples to score the weights by, got none")

    def share_of_mean(output, labels):
        return loss(output, labels) * (counted(labels) / total)

    parts = [(x, y) for x, y in chunks(chunk, images, labels) if counted(y)]
    gradients = gradient_of_sum(model, [*weights.values()], parts, share_of_mean)
    scores = {}
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        # g is a derivative by the mask, not by the weight: the loss sees m·θ, so ∂L/∂m = θ·∂L/∂θ at m = 1.
        at_least_float32 = torch.promote_types(weight.dtype, torch.float32)
        scores[name] = (weight.detach().to(at_least_float32) * gradient).abs()
    norm = sum(float(s.cpu().sum(dtype=torch.float64)) for s in scores.values())
    return {name: s / norm if norm > 0 else s for name, s in scores.items()}


def top_k_mask(scores: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """M_j = 1[s_j >= s̃_k] (section 3): True for the k = max(1, round(keep · m)) largest of all m scores.

    Exactly k: of equal scores the earlier is kept (order of the dict, then row-major), where the paper's
    indicator would keep them all. Bool tensors, named and shaped as the scores. ValueError unless
    0 < keep <= 1 and no score is NaN.
    """
    if not 0 < keep <= 1 or any(s.isnan().any() for s in scores.values()):
        raise ValueError(f"expected keep in (0, 1] and scores without NaN; keep is {keep}")
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

    `mask`: parameter name → bool tensor of its shape. New values, as in the released code: U(−1/√fan_in,
    1/√fan_in), fan_in the product of all dimensions but the first, drawn on the generator's device.
    ValueError, before anything changes, for a mask that is not of this model's parameters.
    """
    parameters = dict(model.named_parameters())
    for name, m in mask.items():
        if name not in parameters or parameters[name].shape != m.shape:
            raise ValueError(f"{name}: the mask has it, with shape {tuple(m.shape)}, and the model has not")
    with torch.no_grad():
        for name, m in mask.items():
            p = parameters[name]
            number = int((~m).sum())
            if number == 0:
                continue
            bound = 1 / math.sqrt(math.prod(m.shape[1:]))
            drawn = torch.empty(number, dtype=p.dtype, device=(generator or p).device)
            p[~m] = drawn.uniform_(-bound, bound, generator=generator).to(p.device)


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
            gradients = [g + m for g, m in zip(gradients, more, strict=True)]
    return gradients


def chunks(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The samples of all tensors, `size` at a time; ValueError if they have not as many.

    A last sample alone, which some layers refuse, joins the chunk before.
    """
    number = len(tensors[0])
    if any(len(tensor) != number for tensor in tensors):
        raise ValueError(f"expected as many samples in each, got {[len(tensor) for tensor in tensors]}")
    starts = [*range(size, number, size)]
    if size > 1 and starts and starts[-1] == number - 1:
        starts.pop()
    return zip(*(tensor.tensor_split(starts) for tensor in tensors), strict=True)


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
    train: Tensor  # int64 indices of what to train on now, replay included
    val: Tensor  # of what to validate on now
    new: Tensor  # of its own training part

    def to(self, device) -> "MegaBatch":
        return MegaBatch(*(index.to(device) for index in self))


def mega_batches(
    num_samples: int, num_mega_batches: int, replay="full", buffer_size=187, val_fraction=0.1, generator=None
) -> list[MegaBatch]:
    """Divide the samples at random into mega-batches of one size (±1), int64 index tensors on the CPU.

    round(val_fraction · size) of it, but at least one, are for validation, and `new` is the rest. `train` is
    `new` and, of the `new` before, all (replay "full"), nothing ("none") or at most `buffer_size`, a uniform
    sample of them ("buffer": what has left it never returns). `val` is its own part; under full replay, all
    so far. ValueError for another replay, a size below 0, or where nothing would be left to train on.
    """
    if replay not in ("full", "buffer", "none") or buffer_size < 0:
        raise ValueError(f"expected replay full, buffer or none, of 0 or more; got {replay}, {buffer_size}")
    parts = torch.randperm(num_samples, generator=generator).tensor_split(num_mega_batches)
    priority = torch.randperm(num_samples, generator=generator)  # the buffer holds those that are first by it
    replayed = {"full": num_samples, "buffer": buffer_size, "none": 0}[replay]
    earlier = torch.empty(0, dtype=torch.int64)
    validation = torch.empty(0, dtype=torch.int64)
    stream = []
    for part in parts:
        val, new = part.tensor_split([max(1, round(val_fraction * len(part)))])
        if len(new) == 0:
            raise ValueError(f"{num_samples} samples do not make {num_mega_batches} mega-batches to train on")
        validation = torch.cat([validation, val]) if replay == "full" else val
        first = earlier[priority[earlier].argsort()][:replayed]
        stream.append(MegaBatch(torch.cat([new, first]), validation, new))
        earlier = torch.cat([earlier, new])
    return stream


# ------------------------------------------------------------ Metrics (sections 4 and 7.1)
def cumulative_error_rate(errors: Iterable) -> int:
    """CER (Eq. 4), a count: the misclassified test samples, `errors`, summed over the mega-batches."""
    return sum(int(e) for e in errors)


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """ECE = Σ_b (n_b/N) · |acc_b − conf_b| (Naeini et al. 2015; section 7.1), in [0, 1].

    `probabilities` (N, C) float, `labels` (N,) int64; b: the bins (i/B, (i+1)/B] of the top-1 confidence.
    ValueError for what is no probability, as a logit.
    """
    probabilities = probabilities.cpu().double()
    if not (probabilities >= 0).all() or not ((probabilities.sum(dim=1) - 1).abs() <= 0.01).all():
        raise ValueError("expected probabilities, in [0, 1] and of sum 1, not logits, logarithms or percent")
    confidence, prediction = probabilities.max(dim=1)
    correct = prediction.eq(labels.cpu()).double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin = torch.bucketize(confidence, edges[1:-1])
    # In each bin, n_b · (conf_b − acc_b) is the sum of what its samples are too confident.
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

    Convolutions start Kaiming-normal (fan-out). It normalises its input. Its weights depend on the generator
    alone.
    """
    torch.backends.cudnn.allow_tf32 = False  # so that float32 is float32
    seed = torch.randint(2**62, (), generator=generator)
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(int(seed))
        model = NETWORKS[arch](len(data.classes), data.images.shape[-1])
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    model.register_buffer("mean", torch.tensor(data.mean).view(-1, 1, 1))
    model.register_buffer("std", torch.tensor(data.std).view(-1, 1, 1))
    model.register_forward_pre_hook(lambda model, args: (args[0] - model.mean) / model.std)
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
    # Each image moves by up to `padding` pixels down and to the right, or up and to the left.
    top, left = torch.randint(-padding, padding + 1, (2, *one_each), device=device, generator=generator)
    rows = top + torch.arange(height, device=device)[:, None]  # (N, H, 1)
    columns = torch.arange(width, device=device).expand(len(index), 1, width)  # (N, 1, W)
    if flip:
        mirrored = torch.rand(one_each, device=device, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
    columns = left + columns
    # What comes from outside is black.
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)  # (N, H, W)
    rows = rows.clamp(0, height - 1)
    columns = columns.clamp(0, width - 1)
    cropped = pixels[index[:, None, None], rows, columns]  # (N, H, W, C)
    return to_input(cropped * inside[..., None])


def pick_precision(name: str, device: torch.device) -> str:
    """What to train in; auto: bfloat16 where it is the faster, on GPUs and processors that compute in it."""
    has = torch.cpu.get_capabilities()
    fast = has.get("amx_bf16") or (has.get("avx512_bf16") and "AMD" in has.get("cpu_name", ""))
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return name if name != "auto" else "bfloat16" if fast else "float32"


def train_epoch_(model, optimizer, data: Dataset, train: Tensor, config, generator) -> Tensor:
    """One epoch on the samples `train`, without a synchronisation. Returns the running accuracy, [0, 1]."""
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
    model.eval()
    return correct.double() / len(train)


def batches(train: Tensor, size: int, generator) -> list[Tensor]:
    """The samples in random order, `size` at a time; a last few, who would spoil running statistics, join."""
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
        # The rate decays after 40 and after 80 percent of the epochs: of 50, at 20 and at 40.
        decays = sum(5 * epoch >= fifths * config.epochs for fifths in (2, 4))
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
    """Accuracy (percent), errors, loss, ECE ([0, 1]), not augmented. FloatingPointError: loss not finite."""
    with torch.no_grad(), evaluating(model):
        parts = chunks(128, pixels)  # on a CPU, larger ones are half as fast: their memory is new each time
        logits = torch.cat([model(to_input(part)) for (part,) in parts])
    loss = float(F.cross_entropy(logits, labels))
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}; a smaller --lr may help")
    errors = int((logits.argmax(1) != labels).sum())
    ece = expected_calibration_error(logits.softmax(1), labels)
    return dict(accuracy=100 * (1 - errors / len(labels)), errors=errors, loss=loss, ece=ece)


# ------------------------------------------------------------ Algorithm 1: learn, unlearn, relearn
class Between(NamedTuple):
    """What a method gets, beside the model, between two mega-batches."""

    pi: tuple[Tensor, Tensor]  # the sample π: images, float (N, C, H, W) in [0, 1], and labels (N,)
    fresh: Callable[[], nn.Module]  # builds a new network
    generator: torch.Generator  # on the CPU, for all that is drawn
    data: Dataset
    stream: list[MegaBatch]  # those learned and, last, the one that is trained on next


def lure_(model, between: Between, keep=0.8) -> dict[str, Tensor]:
    """LURE as a method of `run`: it changes the model in place and returns its mask (True: kept), or None."""
    images, labels = between.pi
    try:
        return unlearn_(model, images, labels, keep, between.generator)
    except ValueError as error:
        raise FloatingPointError(f"the network cannot be unlearned: {error}") from error


STREAM, START, FORGETTING, ORDER = range(4)  # each is drawn independently of the others


def generator_of(seed: int, purpose: int, device="cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(4 * seed + purpose)


def draw_stream(config: Config, data: Dataset) -> tuple[Dataset, list[MegaBatch]]:
    """The data, with their noisy labels, and the stream of a run, by its seed, on the device of the data."""
    c = config
    device = data.labels.device
    generator = generator_of(c.seed, STREAM)
    labels = with_noise(data.labels.cpu(), len(data.classes), c.label_noise, generator)
    stream = mega_batches(len(labels), c.mega_batches, c.replay, c.buffer_size, c.val_fraction, generator)
    return data._replace(labels=labels.to(device)), [batch.to(device) for batch in stream]


def with_noise(labels: Tensor, classes: int, probability: float, generator) -> Tensor:
    """The labels, each with the probability drawn anew from all classes, its own among them (section 6.3)."""
    redrawn = torch.randint(classes, labels.shape, generator=generator)
    noisy = torch.rand(labels.shape, generator=generator) < probability
    return torch.where(noisy, redrawn, labels)


def draw_pi(config, data: Dataset, learned: MegaBatch, following: MegaBatch, generator):
    """The sample π, images and labels: a share of what was just learned, or as `config.pi` says."""
    source = learned.new
    if config.pi == "seen":
        source = learned.train
    elif config.pi == "next":
        source = following.new
    size = max(1, round(config.pi_fraction * len(source)))
    order = torch.randperm(len(source), generator=generator)
    return data.samples(source[order[:size].to(source.device)])


def totals(rows: list[dict]) -> dict:
    """The paper's metrics of a run, from its mega-batches; accuracy and gap (section 4) in percent."""
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
    """Algorithm 1, where the data are. Yields after each mega-batch the state to go on from.

    `forget(model, between)`: what to do between mega-batches, LURE by default. `stream`: as of
    `mega_batches`, for labels as they are; by default both are drawn by the seed. `state`: one that was
    yielded; its `mega_batches` are the rows measured so far, its tensors the live ones. `wrap(model)`: what
    to train the model through, as `torch.compile`. At one seed, stream, start and order are the same for
    every method. ValueError for settings that cannot be, FloatingPointError after a mega-batch whose loss is
    not finite.
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
    decay = config.weight_decay
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.momentum, weight_decay=decay, fused=True
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
            optimizer.state.clear()
        # Evaluate.
        row["train"] = evaluate(model, data.images[batch.train], data.labels[batch.train])
        row["val"] = evaluate(model, data.images[batch.val], data.labels[batch.val])
        row["test"] = evaluate(model, data.test_images, data.test_labels)
        rows = [*rows, row]
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
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type in ("cpu", "cuda"):
            return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError):
        pass
    raise ValueError(f"--device {name}: expected cpu, or cuda, cuda:1 ... of a GPU")


def add_settings(parser: argparse.ArgumentParser, settings: type[Config]) -> None:
    for f in fields(settings):
        kind: dict = dict(type=type(f.default), choices=f.metadata["choices"])
        if type(f.default) is bool:
            kind = dict(action="store_true")
        elif type(f.default) is tuple:
            kind = dict(nargs="*")
        name = f.name.replace("_", "-")
        text = f"{f.metadata['help']}; default: {f.default}"
        parser.add_argument(f"--{name}", default=f.default, help=text, **kind)


@contextmanager
def new_file(path: str) -> Iterator[TextIO]:
    """A file to write, which is whole when it gets its name, or not there. ValueError if it cannot be."""
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
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, allow_abbrev=False)
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
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2 if isinstance(error, ValueError) else 1, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
