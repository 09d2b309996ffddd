"""How fast the loop of lure.py is beside a plain one, on whatever device is there: `make bench`.

The plain loop is written as most people write it: a torchvision data set, random crop and flip by PIL,
ToTensor, a DataLoader with workers, float32, channels first, SGD, `.item()` for the running loss. Ours is
timed in each precision that the device has, of which --precision auto takes one. All train the same network
on the same images with the same batch size, in turn (A B C A B C) and after a warm-up. A round during which
other processes took more than a tenth of the processor is measured again, as often as there are rounds; what
stays disturbed is marked.

    python -m experiments.bench --out results/bench

Leaves: DEVICE.json and DEVICE.md.
"""

import argparse
import json
import math
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import VisionDataset

import lure
from experiments.bench_tables import DISTURBED, SECTIONS, markdown
from experiments.command import Parser, guarded
from experiments.files import provenance, write_text
from experiments.runs import Config


# ------------------------------------------------------------ The plain loop
class Pictures(VisionDataset):
    """Images in memory, as in torchvision's CIFAR10: arrays, each made a PIL image when it is read."""

    def __init__(self, data: lure.Dataset):
        crop = transforms.RandomCrop(data.images.shape[1], data.padding)
        mirror = [transforms.RandomHorizontalFlip()] if data.flip else []
        super().__init__("", transform=transforms.Compose([crop, *mirror, transforms.ToTensor()]))
        self.data, self.targets = data.images.squeeze(-1).numpy(), data.labels.tolist()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def plain_epoch(model, optimizer, loader, device) -> float:
    running_loss = 0.0
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        running_loss += loss.item()
    return running_loss / len(loader)


# ------------------------------------------------------------ What is measured, each to be called
def random_data(config: Config, size: int) -> lure.Dataset:
    """Of random pixels and labels, in the shape of the data set that the configuration names."""
    digits, generator = config.dataset == "digits", torch.Generator().manual_seed(0)
    shape = size, config.image_size, config.image_size, 1 if digits else 3
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, (size,), generator=generator)
    more = dict(mean=(0.3,), std=(0.4,), padding=1, flip=False) if digits else {}
    return lure.Dataset(images, labels, images[:0], labels[:0], list("0123456789"), **more)


def build(config: Config, data: lure.Dataset) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network and the optimizer of `lure.run`."""
    model = lure.build_model(config.arch, data, torch.Generator().manual_seed(0))
    rates = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True)
    return model, torch.optim.SGD(model.parameters(), **rates)


def plain(config: Config, size: int, device: torch.device, workers: int):
    """An epoch of the plain loop."""
    data = random_data(config, size)
    options = dict(num_workers=workers, persistent_workers=workers > 0, pin_memory=device.type == "cuda")
    loader = DataLoader(Pictures(data), config.batch_size, shuffle=True, **options)
    model = lure.build_model(config.arch, data, torch.Generator().manual_seed(0))
    model.to(device, memory_format=torch.contiguous_format)
    rates = dict(lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return partial(plain_epoch, model, torch.optim.SGD(model.parameters(), **rates), loader, device)


def ours(config: Config, size: int, device: torch.device):
    """An epoch of the loop of lure.py."""
    data = random_data(config, size).to(device)
    train, generator = torch.arange(size, device=device), torch.Generator(device).manual_seed(0)
    return partial(lure.train_epoch_, *build(config, data), data, train, config, generator)


def sensitivity(config: Config, size: int, device: torch.device):
    """The connection sensitivity by `size` images."""
    data = random_data(config, size).to(device)
    return partial(lure.connection_sensitivity, build(config, data)[0], *data.samples(torch.arange(size)))


def redrawing(config: Config, device: torch.device):
    """Mask and reinitialisation, of random scores."""
    model, _ = build(config, random_data(config, 1).to(device))
    scores = {name: torch.rand_like(p) for name, p in lure.connections(model).items()}
    return lambda: lure.reinitialize_(model, lure.top_k_mask(scores, config.keep), torch.Generator())


# ------------------------------------------------------------ Measuring
def seconds(call, device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def median_seconds(call, device: torch.device, repeats: int = 3) -> float:
    """After one call that does not count."""
    return statistics.median([seconds(call, device) for _ in range(1 + repeats)][1:])


def others_share(call) -> float:
    """The share of all cores' time that other processes took during a call; 0 where Linux does not tell.

    Others are all but this process and its children, and what the host took from a virtual machine.
    """
    if not os.path.exists("/proc/stat"):
        call()
        return 0.0
    start = time.perf_counter()
    before = busy_seconds() - own_seconds()
    call()
    others = busy_seconds() - own_seconds() - before
    return max(0.0, others / (time.perf_counter() - start) / (os.cpu_count() or 1))


def busy_seconds() -> float:
    """All time that any process has had, and what the host has taken, of all cores since the start."""
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split()[1:]
    ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """The time that this process and its children have had: those that run, and those that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    total = time.process_time() + ended.ru_utime + ended.ru_stime
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        user, system = fields[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def measured_rounds(calls: dict, rounds: int, device: torch.device, what: str) -> list[tuple[float, dict]]:
    """For each round the share of others and the seconds of each call, after one that does not count.

    Of up to twice as many rounds as asked for, those with the smallest share of others; on a GPU the first.
    """
    found: list[tuple[float, dict]] = []

    def one_round():
        times.update({name: seconds(call, device) for name, call in calls.items()})

    for i in range(1 + 2 * rounds):
        quiet = [share for share, _ in found[1:] if share <= DISTURBED]
        if len(quiet) == rounds:
            break
        progress(f"{what}, round {i}; {len(quiet)} of {rounds} were undisturbed")
        times: dict = {}
        share = others_share(one_round)
        found.append((0.0 if device.type == "cuda" else share, times))
    return sorted(found[1:], key=lambda entry: entry[0])[:rounds]


def progress(text: str) -> None:
    print(f"measuring {text}", file=sys.stderr, flush=True)


def peak_memory(make, device: torch.device) -> float:
    """MiB that calling what `make` returns takes beyond weights and data, on the GPU or in this process.

    A process's peak never falls, so on the CPU a new one is measured, and not one that was spawned: Linux
    hands the peak on through exec.
    """
    if device.type == "cpu":
        with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as process:
            return process.submit(peak_of_this_process, make).result()
    call = make()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def peak_of_this_process(make) -> float:
    call, unit = make(), 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit / 2**20


def precisions(device: torch.device) -> list[str]:
    """Those that the device has instructions for."""
    has = torch.cpu.get_capabilities()
    low = has.get("avx512_bf16") or has.get("amx_bf16")
    if device.type == "cuda":
        low = lure.pick_precision("auto", device) == "bfloat16"
    return ["bfloat16", "float32"] if low else ["float32"]


SIDES = {"cpu": (1024, 2048), "cuda": (4096, 8192, 16384)}  # of matrices to multiply


def matmul_tflops(device: torch.device) -> dict[str, float]:
    """TFLOP/s of the fastest product of two square matrices, for each precision."""
    rates: dict[str, float] = {}
    for precision in precisions(device):
        for n in SIDES[device.type]:
            progress(f"the product of two matrices of side {n} in {precision}")
            a, b = torch.rand(2, n, n, device=device).to(getattr(torch, precision))
            rate = 2 * n**3 / median_seconds(partial(torch.matmul, a, b), device, 5) / 1e12
            rates[precision] = max(rates.get(precision, 0), rate)
    return rates


def compare(config: Config, size: int, rounds: int, workers: int, device: torch.device) -> dict:
    """The plain loop and ours in each precision in turn, `rounds` times, over the same `size` images."""
    makes = {p: partial(ours, replace(config, precision=p), device=device) for p in precisions(device)}
    makes["plain"] = partial(plain, config, device=device, workers=workers)
    calls = {name: make(size) for name, make in makes.items()}
    what = f"{config.arch} at {config.image_size}×{config.image_size}"
    found = measured_rounds(calls, rounds, device, what)
    with FlopCounterMode(display=False) as counter:
        sensitivity(config, 2, device)()  # forward and backward, as a step
    flops, steps = counter.get_total_flops() / 2, math.ceil(size / config.batch_size)
    result: dict = dict(arch=config.arch, image_size=config.image_size, batch_size=config.batch_size)
    result |= dict(images=size, workers=workers, gflop_per_image=flops / 1e9, loops={})
    result["auto"] = lure.pick_precision("auto", device)
    result["others_share"] = [share for share, _ in found]
    for name, make in makes.items():
        progress(f"memory, {name}")
        elapsed = [times[name] for _, times in found]
        others = [times["plain"] for _, times in found]
        ratios, median = [b / a for a, b in zip(elapsed, others, strict=True)], statistics.median(elapsed)
        result["loops"][name] = dict(
            images_per_second=size / median,
            ms_per_step=1000 * median / steps,
            tflops=size * flops / median / 1e12,
            ratio=statistics.median(others) / median,
            ratio_low=min(ratios),
            ratio_high=max(ratios),
            peak_mib=peak_memory(partial(make, 2 * config.batch_size), device),
            seconds=elapsed,
        )
    return result


def batch_size(config: Config, size: int, device: torch.device) -> dict:
    progress(f"batches of {config.batch_size}")
    size = math.ceil(size / config.batch_size) * config.batch_size
    elapsed = median_seconds(ours(config, size, device), device)
    return dict(batch_size=config.batch_size, images_per_second=size / elapsed)


def unlearning(config: Config, size: int, device: torch.device) -> dict:
    """Time of unlearning once by `size` images, and its memory, for which 64 are enough."""
    progress(f"unlearning {config.arch} by {size} images")
    result = dict(arch=config.arch, images=size)
    model, _ = build(config, random_data(config, 1))
    result["weights"] = sum(p.numel() for p in lure.connections(model).values())
    sensitivity(config, 64, device)()  # the warm-up
    result["sensitivity_seconds"] = seconds(sensitivity(config, size, device), device)
    result["sensitivity_mib"] = peak_memory(partial(sensitivity, config, 64, device), device)
    result["redrawing_seconds"] = median_seconds(redrawing(config, device), device)
    result["redrawing_mib"] = peak_memory(partial(redrawing, config, device), device)
    return result


def benchmark(args: argparse.Namespace) -> dict:
    """All that is asked for; each table is printed when it is ready."""
    device = lure.pick_device(args.device)
    size = args.images or (128 if device.type == "cpu" else 16384)
    common = dict(device=args.device, batch_size=args.batch_size, lr=0.01)
    large = Config(**common, image_size=args.image_size)
    demo = Config(**common, dataset="digits", arch="small", image_size=max(1, args.image_size // 2))
    result = provenance(["-m", "experiments.bench", *args.argv], device, random_data(large, size))
    parts = {
        "matmul_tflops": lambda: matmul_tflops(device),
        "loops": lambda: [
            compare(config, n, args.rounds, args.workers, device)
            for config, n in ((large, size), (demo, 4 * size))
        ],
        "unlearning": lambda: unlearning(large, args.pi, device),
        "batch_sizes": lambda: [
            batch_size(replace(large, batch_size=n), size, device) for n in args.batch_sizes
        ],
        "networks": lambda: [unlearning(replace(large, arch=arch), 64, device) for arch in args.networks],
    }
    for name, measure in parts.items():
        result[name] = measure()
        if name in SECTIONS and result[name]:
            print(SECTIONS[name](result), flush=True)
    return result


# ------------------------------------------------------------ Command line
def main(argv=None) -> int:
    """The command line; its status is that of `guarded`."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    count, some = dict(type=positive, metavar="N"), dict(type=positive, metavar="N", nargs="+")
    add = parser.add_argument
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto: the GPU if there is one")
    add("--rounds", default=3, **count, help="how often each loop is timed; default: 3")
    add("--images", **count, help="images of a round; default: 128, on a GPU 16384")
    add("--image-size", default=32, **count, help="their side; default: 32")
    add("--batch-size", default=64, **count, help="samples per step; default: 64")
    add("--workers", default=min(4, os.cpu_count() or 1), **count, help="of the plain loop's DataLoader")
    add("--pi", default=1125, **count, help="images to unlearn by; default: the protocol's 1125")
    add("--batch-sizes", default=[], **some, help="a table of their rates, as 32 64 128 256 512 1024")
    archs = dict(choices=lure.NETWORKS, metavar="ARCH", nargs="+")
    add("--networks", default=[], **archs, help=f"a table of unlearning: {', '.join(lure.NETWORKS)}")
    add("--out", type=Path, metavar="FOLDER", help="where to write DEVICE.json and DEVICE.md")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return guarded(parser.prog, partial(measure, args))


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def measure(args: argparse.Namespace) -> None:
    result = benchmark(args)
    if args.out:
        path = args.out / re.sub("[^a-z0-9]+", "-", f"{result['device']} {result['threads']} threads".lower())
        for suffix, content in ((".json", json.dumps(result, indent=1) + "\n"), (".md", markdown(result))):
            write_text(path.with_suffix(suffix), content)


if __name__ == "__main__":
    sys.exit(main())
