"""A run as a file: its record, which says where it comes from, and its state to go on from.

Enters: the command line of baselines.py. Leaves: a record (JSON), a checkpoint, and until they are there a
state after each mega-batch; the same call goes on from it.
"""

import argparse
import copy
import glob
import inspect
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import baselines
import lure
from experiments.command import DataError, Parser, guarded
from experiments.data import LOADERS, load_dataset
from experiments.files import held, load, provenance, write, write_text
from experiments.ranks import RANK, WORLD, Parallel, by_first, first_before_others, join, leave, take_gpu
from lure import Dataset, MegaBatch, option

Method = Callable[..., dict | None]  # `lure.lure_` tells what it gets and does


def vgg16_bn(classes: int, channels: int) -> nn.Module:
    """torchvision's for Table 6, without the fifth max-pool, with average pooling and one linear layer."""
    model = torchvision.models.vgg16_bn(num_classes=classes, init_weights=False)
    model.features[0] = nn.Conv2d(channels, 64, 3, padding=1)
    model.features[-1] = nn.Identity()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, classes)
    return model


lure.NETWORKS["vgg16_bn"] = vgg16_bn


# ------------------------------------------------------------ Settings
class More(argparse.Action):
    """An option that adds to what it was given before."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), *values))


SET = "the method's own settings, as in --set shrink=0.4 noise=0.1"


@dataclass(frozen=True)
class Config(lure.Config):
    """The settings of `lure.run`, and those of the method, of the data and of the files around it."""

    dataset: str = option("cifar10", "data set", LOADERS)
    arch: str = option("auto", "network; auto: small for digits, else resnet18", ("auto", *lure.NETWORKS))
    cache: str = option(".cache", "folder for decoded images")
    image_size: int = option(0, "side to resize to, at most 1024; 0: as they are, folders to 32")
    limit: int = option(0, "training images to use, a stratified choice; 0: all")
    limit_test: int = option(0, "test images to use, a stratified choice; 0: all")
    shots: int = option(0, "training images of each class to use, whatever --limit is; 0: all")
    generations: bool = option(False, "let every mega-batch be all training images", action="store_true")
    compile: bool = option(False, "train through torch.compile, on a GPU by CUDA graphs", action="store_true")
    checkpoint: str = option("", "file for the final weights")
    method: str = option("warm-start", "what to do between mega-batches", baselines.METHODS)
    set: tuple[str, ...] = option((), SET, nargs="*", action=More)

    def __post_init__(self):
        super().__post_init__()
        lure.check_settings(self, LIMITS)


LIMITS = dict(image_size=(0, 1024), limit=(0, 1e18), limit_test=(0, 1e18), shots=(0, 1e18))


def method(config: Config) -> partial:
    """The method that is configured, with its settings. ValueError for a setting that it has not.

    Settings are what it takes beside model and between, each a number with a default. What may be given is
    from 1 on for an int, from 0 on for a float; `keep` is given by an option of its own.
    """
    function = baselines.METHODS[config.method]
    own = defaults_of(config.method)
    given: dict = {}
    if own.pop("keep", None):
        given["keep"] = config.keep
    for setting in config.set:
        key, _, text = setting.partition("=")
        if key == "keep" and key in given:
            raise ValueError(f"--set {setting}: keep is an option of its own, --keep {text}")
        if key not in own:
            raise ValueError(f"--set {setting}: {config.method} has {', '.join(own) or 'no settings'}")
        kind = type(own[key])
        try:
            given[key] = kind(text)
        except ValueError as error:
            raise ValueError(f"--set {setting}: expected {key}=<{kind.__name__}>") from error
        least = 1 if kind is int else 0
        if not least <= given[key] <= 1e9:
            raise ValueError(f"--set {setting}: expected a number from {least} to 1e9")
    return partial(function, **given)


def defaults_of(name: str) -> dict[str, float]:
    """The settings of a method and their defaults. TypeError for a default that is no number."""
    _model, _between, *parameters = inspect.signature(baselines.METHODS[name]).parameters.values()
    own = {parameter.name: parameter.default for parameter in parameters}
    for key, default in own.items():
        if type(default) not in (int, float):
            raise TypeError(f"{name}: expected a number as default of {key}, got {default}")
    return own


def settings_of(config: Config) -> dict[str, float]:
    """All settings of the configured method, given or by default."""
    return defaults_of(config.method) | method(config).keywords


def methods_and_settings() -> str:
    """One line for each method: its name, what it is, its settings with their defaults."""
    lines = ["methods, and what --set gives them:"]
    for name, function in baselines.METHODS.items():
        own = [f"{key}={default}" for key, default in defaults_of(name).items() if key != "keep"]
        what = (inspect.getdoc(function) or "").split("\n")[0]
        lines.append(f"  {name:12}{what} {' '.join(own)}".rstrip())
    return "\n".join(lines)


def check_machine(config: Config) -> None:
    """ValueError for what this machine has not."""
    lure.pick_device(config.device)
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if config.compile and not any(map(shutil.which, compilers)):
        raise ValueError("--compile: expected a C++ compiler, g++ or what CXX names")


def main(argv: list[str] | None, description: str) -> int:
    """The command line of baselines.py, in each process. Its status is that of `guarded`."""
    usage = "%(prog)s [--method METHOD] [--OPTION VALUE ...]"
    parser = Parser(usage=usage, description=description, epilog=methods_and_settings(), allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lure.add_settings(parser, Config)

    def call():
        join()
        # What is wrong is told once, by the first process.
        given = by_first(lambda: vars(parser.parse_args(argv)))
        config = by_first(lambda: Config(**given))
        by_first(lambda: method(config))
        by_first(lambda: check_machine(config))
        take_gpu(config.device)
        record = recorded(config, method(config))
        if RANK == 0:
            print(json.dumps(record["totals"]))
        leave()

    return guarded(parser.prog, call)


# ------------------------------------------------------------ The run
def recorded(config: Config, forget: Method) -> dict:
    """The record of a run, which is written to `config.out`; if it is there, it is read.

    After every mega-batch its state is saved beside, from where the same call goes on. Of several processes,
    the first alone reads and writes these. ValueError for settings that cannot be, DataError for data,
    FloatingPointError for a loss that is not finite, OSError for a file that cannot be written.
    """
    device = lure.pick_device(config.device)
    data = loaded_once(config)
    record = new_record(config, data, device)
    if by_first(lambda: record["data"]) != record["data"]:
        raise DataError(f"{config.data}: expected the data of the first process, found others")
    if done := by_first(lambda: finished(config, record)):
        return done
    by_first(lambda: check_feasible(config, data))
    files = [path for path in (config.out, config.checkpoint) if path]
    with held(*files) if RANK == 0 else nullcontext():
        # Another call may have finished it in between.
        return by_first(lambda: finished(config, record)) or computed(config, forget, data, device, record)


def new_record(config: Config, data: Dataset, device: torch.device) -> dict:
    """The record of a run that is to begin, as it will be read."""
    record = dict(format=FORMAT, config=asdict(config), totals={}, mega_batches=[])
    record |= provenance(command_line(config), device, data)
    record["precision"] = lure.pick_precision(config.precision, device)
    record["settings"] = settings_of(config)
    return json.loads(json.dumps(record))


def computed(config: Config, forget: Method, data: Dataset, device: torch.device, record: dict) -> dict:
    """The record of a run that is not finished, completed and written."""
    state_path = f"{config.out}.state"
    earlier = None
    if config.out:
        earlier = by_first(lambda: read_earlier(state_path, load, record, ALL_THE_SAME))
    state: dict = earlier or {}
    rows = state.get("mega_batches", [])
    data, stream = draw_stream(config, data.to(device))
    found: dict = {}
    observing = observed(forget, found)
    try:
        for state in lure.run(config, data, observing, stream, earlier, wrapper(config)):
            rows = state["mega_batches"]
            rows[-1] |= NOTHING_FORGOTTEN | found
            found.clear()
            if RANK == 0:
                accuracy = f"{rows[-1]['test']['accuracy']:.2f} % of the test set"
                print(f"{place(config, len(rows))}: {accuracy}", file=sys.stderr, flush=True)
            if RANK == 0 and config.out:
                write(state_path, partial(torch.save, record | state))
    except FloatingPointError as error:
        raise FloatingPointError(f"{place(config, len(rows) + 1)}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{place(config, len(rows) + 1)}, {config.method}: {error}") from error
    record["mega_batches"] = rows
    record["totals"] = lure.totals(rows)
    by_first(lambda: read_earlier(config.out, read_record, record))  # another run's, where nothing is held
    if RANK == 0 and config.checkpoint:
        checkpoint = dict(config=asdict(config), classes=data.classes, data=record["data"])
        checkpoint["weights"] = state["model"]
        write(config.checkpoint, partial(torch.save, checkpoint))
    if RANK == 0 and config.out:
        write_text(config.out, json.dumps(record, indent=1) + "\n")
        tidy(config)
    return record


def place(config: Config, number: int) -> str:
    """Where a run is, as its lines say."""
    return f"{Path(config.out).stem} mega-batch {number} of {config.mega_batches}".lstrip()


def wrapper(config: Config) -> Callable[[nn.Module], nn.Module]:
    """What a network is trained through."""

    def wrap(model):
        if config.compile:
            model = torch.compile(model, mode="reduce-overhead")
        return Parallel(model) if WORLD > 1 else model

    return wrap


NOTHING_FORGOTTEN = dict(redrawn=None, redrawn_by_tensor=None, forgotten=None, reestimated=None)


def observed(forget: Method, found: dict) -> Method:
    """The method, which also notes in `found` what it redraws and how good the network is right after.

    That is noted with batch normalisation's running statistics as they are, and with new ones of the first
    1000 samples of the mega-batch just learned: the old ones are of weights that are no more. The network is
    not touched.
    """

    def look(model, data):
        seen = lure.evaluate(model, data.test_images, data.test_labels)
        return {key: seen[key] for key in ("accuracy", "loss")}

    def forget_and_look(model, between):
        data = between.data
        *_, learned, _following = between.stream
        sample, _ = data.samples(learned.new[:1000])
        before = look(reestimated(model, sample), data)
        mask = forget(model, between)
        if mask is not None:
            redrawn = {name: (~kept).flatten().double() for name, kept in mask.items()}
            found["redrawn"] = torch.cat([*redrawn.values()]).mean().item()
            found["redrawn_by_tensor"] = {name: share.mean().item() for name, share in redrawn.items()}
        found["forgotten"] = look(model, data)
        found["reestimated"] = {"before": before, "after": look(reestimated(model, sample), data)}
        return mask

    return forget_and_look


def reestimated(model: nn.Module, images: Tensor, chunk: int = 125) -> nn.Module:
    """A copy, in evaluation mode, whose batch normalisation has the running statistics of `images` alone.

    They are the mean of those of chunks, in order. `images`: float (N, C, H, W), as the model takes them.
    """
    model = copy.deepcopy(model).eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # a cumulative mean
            module.train()
    with torch.no_grad():
        for part in images.split(chunk):
            model(part)
    return model.eval()


def loaded_once(config: Config) -> Dataset:
    """The data, which the first process of each machine loads before the others, and so fills the cache."""
    c = config
    part = (c.image_size, c.limit, c.limit_test, c.shots)
    return first_before_others(lambda: load_dataset(c.dataset, c.data, c.cache, *part))


def draw_stream(config: Config, data: Dataset) -> tuple[Dataset, list[MegaBatch]]:
    """That of `lure`, or, for generations, one of which each mega-batch is all of the data."""
    if not config.generations:
        return lure.draw_stream(config, data)
    data, (whole,) = lure.draw_stream(replace(config, mega_batches=1), data)
    return data, [whole] * config.mega_batches


def check_feasible(config: Config, data: Dataset) -> None:
    """What would otherwise be found out when the work is done. ValueError or OSError."""
    _, stream = draw_stream(config, data)
    if config.arch == "vgg16_bn" and min(data.images.shape[1:3]) < 16:
        raise ValueError("--arch vgg16_bn: expected images of at least 16×16 pixels, for its four max-pools")
    # The last samples of an epoch are at least half a batch, or else they join the batch before.
    fewest = min(len(batch.train) for batch in stream)
    if fewest < 2 * WORLD or config.batch_size < (4 * WORLD if WORLD > 1 else 2):
        raise ValueError(
            "--mega-batches, --batch-size: expected two training samples of a batch for every process"
        )
    state_path = f"{config.out}.state" if config.out else ""
    taken = [os.path.realpath(path) for path in (config.out, state_path)]
    if config.checkpoint and os.path.realpath(config.checkpoint) in taken:
        raise ValueError(f"--checkpoint {config.checkpoint}: expected another file than --out and its state")
    for path in filter(None, (config.out, state_path, config.checkpoint)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        odd = path.endswith("/") or (os.path.exists(path) and not os.path.isfile(path))
        if odd or not os.access(Path(path).parent, os.W_OK):
            raise OSError(f"{path}: expected a file that can be written")


# ------------------------------------------------------------ Record and state
FORMAT = 2  # of both; before, ECE was a fraction
DEFAULTS = {f.name: f.default for f in fields(Config)}  # for options that an old record lacks
PATHS = {"data", "cache", "out", "checkpoint", "device"}  # where things are: no two runs differ by these
# Beside configuration and data, what has to be as it was for a run to be continued to the same result.
ALL_THE_SAME = (
    *("format", "git_commit", "sources", "versions"),
    *("processes", "device", "instruction_set"),
)


def differing(there: dict, here: dict, keys=(), but=frozenset()) -> list[str]:
    """In which data, settings and `keys` two records differ, in words; what `but` names does not count."""

    def told(record):
        return record["data"] | DEFAULTS | record["config"] | {f"its {key}": record[key] for key in keys}

    old = told(there)
    new = told(here)
    if "settings" in there and "settings" in here:  # with the method's defaults; old records have none
        old["settings"] = there["settings"]
        new["settings"] = here["settings"]
    free = {*PATHS, *but}
    odd = [name for name in old | new if name not in free and old.get(name) != new.get(name)]
    return [f"{name} {old.get(name)}, not {new.get(name)}" for name in odd]


def read_earlier(path: str, read, run: dict, keys=(), but=frozenset()) -> dict | None:
    """What an earlier call of the run left at `path`, if anything. ValueError if it is not of this run.

    Beside configuration, data and the precision that it ran in, whatever the option's word, `keys` have to be
    the same; what `but` names need not be.
    """
    if not os.path.isfile(path):
        return None
    try:
        record = read(path)
        odd = differing(record, run, ("precision", *keys), {"precision", *but})
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{path}: expected what a call of this run wrote, or no file ({kind})") from error
    if odd:
        found = ", ".join(odd)
        raise ValueError(f"{path}: expected no file, or one of this run; found {found}")
    return record


def read_record(path: str | Path) -> dict:
    return json.loads(Path(path).read_text())


def finished(config: Config, run: dict) -> dict | None:
    """The record at `config.out`, if it and the checkpoint are there. ValueError if it is of another run."""
    record = read_earlier(config.out, read_record, run)
    if not record or (config.checkpoint and not os.path.exists(config.checkpoint)):
        return None
    other = record.get("sources") != run["sources"]
    why = ", though by other code; remove it to run it again" if other else ""
    print(f"{config.out}: is there, nothing is run{why}", file=sys.stderr)
    tidy(config)
    return record


def tidy(config: Config) -> None:
    """Remove what a run that is done may have left: its state, temporary files of killed calls."""
    Path(f"{config.out}.state").unlink(missing_ok=True)
    for path in map(Path, filter(None, (config.out, config.checkpoint))):
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            temporary.unlink(missing_ok=True)


def command_line(config: Config) -> list[str]:
    """The call that means `config`, the data first."""
    words = ["baselines.py"]
    data = ("dataset", "data", "cache", "image_size", "limit", "limit_test", "shots")
    for f in sorted(fields(config), key=lambda f: f.name not in data):
        value = getattr(config, f.name)
        if value in (f.default, ()):
            continue
        words.append("--" + f.name.replace("_", "-"))
        if isinstance(value, (list, tuple)):
            words += value
        elif value is not True:
            words.append(str(value))
    return words
