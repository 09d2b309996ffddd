"""A run as a file: its record with where it comes from, and its state to go on from."""

import copy
import glob
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lure
from experiments.data import DATASETS, DataError, load_dataset
from experiments.files import held, load, provenance, write, write_text
from lure import RANK, WORLD, Dataset, MegaBatch, option

Method = Callable[..., dict | None]  # `lure.lure_` tells what it gets and does


@dataclass(frozen=True)
class Config(lure.Config):
    """The settings of `lure.run`, and those of the data and the files around it."""

    dataset: str = option("cifar10", "data set", DATASETS)
    cache: str = option(".cache", "folder for decoded images")
    image_size: int = option(0, "side to resize to, at most 1024; 0: as they are, folders to 32", high=1024)
    limit: int = option(0, "training images to use, a stratified choice; 0: all")
    limit_test: int = option(0, "test images to use, a stratified choice; 0: all")
    shots: int = option(0, "training images of each class to use, whatever --limit is; 0: all")
    generations: bool = option(False, "let every mega-batch be the whole training set")
    checkpoint: str = option("", "file for the final weights")


# ------------------------------------------------------------ The run
def recorded(config: Config, forget: Method) -> dict:
    """The record of a run, which is written to `config.out`; if it is there, it is read.

    After every mega-batch its state is saved beside, from where the same call goes on. Of several processes,
    the first alone reads and writes these. ValueError for settings that cannot be, DataError for data,
    FloatingPointError for a loss that is not finite, OSError for a file that cannot be written.
    """
    c, device = config, lure.pick_device(config.device)
    data = loaded_once(c)
    origin = provenance(command_line(c), device, data)
    origin["precision"] = lure.pick_precision(c.precision, device)
    record = dict(format=FORMAT, config=asdict(c), totals={}, mega_batches=[], **origin)
    record = json.loads(json.dumps(record))  # as it will be read
    if by_first(lambda: record["data"]) != record["data"]:
        raise DataError(f"{c.data}: expected the data of the first process, found others")
    if done := by_first(lambda: finished(c, record)):
        return done
    by_first(lambda: check_feasible(c, data))
    with held(*filter(None, (c.out, c.checkpoint))) if RANK == 0 else nullcontext():
        return by_first(lambda: finished(c, record)) or computed(c, forget, data, device, record)


def computed(config: Config, forget: Method, data: Dataset, device: torch.device, record: dict) -> dict:
    """The record of a run that is not finished, completed and written."""
    c, path = config, f"{config.out}.state"
    earlier = by_first(lambda: read_earlier(path, load, record, ALL_THE_SAME)) if c.out else None
    state: dict = earlier or {}
    rows = state.get("mega_batches", [])
    stem, of = f"{Path(c.out).stem} mega-batch".lstrip(), f"of {c.mega_batches}"
    data, stream = draw_stream(c, data.to(device))
    found: dict = {}
    observing = observed(forget, data, iter(stream[len(rows) :]), found)
    try:
        for state in lure.run(c, data, observing, stream, earlier):
            rows = state["mega_batches"]
            rows[-1] |= dict(redrawn=None, redrawn_by_tensor=None, forgotten=None, reestimated=None) | found
            found.clear()
            if RANK == 0:
                accuracy = f"{rows[-1]['test']['accuracy']:.2f} % of the test set"
                print(f"{stem} {len(rows)} {of}: {accuracy}", file=sys.stderr, flush=True)
            if RANK == 0 and c.out:
                write(path, partial(torch.save, record | state))
    except FloatingPointError as error:
        raise FloatingPointError(f"{stem} {len(rows) + 1} {of}: {error}") from error
    record |= dict(mega_batches=rows, totals=lure.totals(rows))
    by_first(lambda: read_earlier(c.out, read_record, record))  # another run's, where files cannot be held
    if RANK == 0 and c.checkpoint:
        weights = dict(config=asdict(c), classes=data.classes, data=record["data"], weights=state["model"])
        write(c.checkpoint, partial(torch.save, weights))
    if RANK == 0 and c.out:
        write_text(c.out, json.dumps(record, indent=1) + "\n")
        tidy(c)
    return record


def observed(forget: Method, data: Dataset, learned: Iterator[MegaBatch], found: dict) -> Method:
    """The method, which also notes what it redraws and how good the network is right after.

    That is noted with batch normalisation's running statistics as they are, and with new ones of the first
    1000 samples of the mega-batch just learned: the old ones are of weights that are no more. `learned`
    yields that mega-batch at each call. The network is not touched.
    """

    def look(model):
        seen = lure.evaluate(model, data.test_images, data.test_labels)
        return {key: seen[key] for key in ("accuracy", "loss")}

    def forget_and_look(model, *between):
        sample, _ = data.samples(next(learned).new[:1000])
        before = look(reestimated(model, sample))
        mask = forget(model, *between)
        if mask is not None:
            redrawn = {name: (~m).flatten().double() for name, m in mask.items()}
            found["redrawn"] = torch.cat([*redrawn.values()]).mean().item()
            found["redrawn_by_tensor"] = {name: r.mean().item() for name, r in redrawn.items()}
        found["forgotten"] = look(model)
        found["reestimated"] = {"before": before, "after": look(reestimated(model, sample))}
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
    c, first = config, os.environ.get("LOCAL_RANK") == "0"
    if WORLD > 1 and not first:
        dist.barrier()
    data = load_dataset(c.dataset, c.data, c.cache, c.image_size, c.limit, c.limit_test, c.shots)
    if WORLD > 1 and first:
        dist.barrier()
    return data


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
    if min(config.batch_size, *(len(batch.train) for batch in stream)) < 2 * WORLD:
        raise ValueError("--mega-batches, --batch-size: expected two training samples for every process")
    taken = map(os.path.realpath, (config.out, f"{config.out}.state"))
    if config.checkpoint and os.path.realpath(config.checkpoint) in taken:
        raise ValueError(f"--checkpoint {config.checkpoint}: expected another file than --out and its state")
    for path in filter(None, (config.out, config.out and f"{config.out}.state", config.checkpoint)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        odd = path.endswith("/") or (os.path.exists(path) and not os.path.isfile(path))
        if odd or not os.access(Path(path).parent, os.W_OK):
            raise OSError(f"{path}: expected a file that can be written")


# ------------------------------------------------------------ Record and state
FORMAT = 1  # of both
DEFAULTS = {f.name: f.default for f in fields(Config)}  # for options that an old record lacks
PATHS = {"data", "cache", "out", "checkpoint", "device"}  # where things are: no two runs differ by these
# Beside configuration and data, what has to be as it was for a run to be continued to the same result.
ALL_THE_SAME = (
    *("format", "git_commit", "sources", "versions"),
    *("processes", "device", "instruction_set"),
)


def read_earlier(path: str, read, run: dict, keys=(), but=frozenset()) -> dict | None:
    """What an earlier call of the run left at `path`, if anything. ValueError if it is not of this run.

    Beside configuration, data and precision, `keys` have to be the same; what `but` names need not be.
    """
    if not os.path.isfile(path):
        return None
    try:
        record = read(path)
        # The precision that it ran in, whatever the option's word.
        there, here = (
            {f"its {k}": r[k] for k in ("precision", *keys)} | r["data"] | DEFAULTS | r["config"]
            for r in (record, run)
        )
        free = {"precision", *PATHS, *but}
        odd = [k for k in there | here if k not in free and there.get(k) != here.get(k)]
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"{path}: expected what a call of this run wrote, or no file ({kind})") from error
    if odd:
        found = ", ".join(f"{k} {there.get(k)}, not {here.get(k)}" for k in odd)
        raise ValueError(f"{path}: expected no file, or one of this run; found {found}")
    return record


def read_record(path: str) -> dict:
    return json.loads(Path(path).read_text())


def alike(config: dict, other: dict) -> bool:
    """Whether two runs' settings are the same but for where things are; one may lack what came later."""
    both = [DEFAULTS | json.loads(json.dumps(of)) for of in (config, other)]
    return all(both[0].get(k) == both[1].get(k) for k in both[0] | both[1] if k not in PATHS)


def finished(config: Config, run: dict) -> dict | None:
    """The record at `config.out`, if it and the checkpoint are there. ValueError if it is of another run."""
    record = read_earlier(config.out, read_record, run)
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
    """The call, of the script that has these settings, that means `config`: the data first."""
    words = [os.path.basename(inspect.getfile(type(config)))]
    data = ("dataset", "data", "cache", "image_size", "limit", "limit_test", "shots")
    for f in sorted(fields(config), key=lambda f: f.name not in data):
        if (value := getattr(config, f.name)) not in (f.default, ()):
            values = [] if value is True else value if isinstance(value, (list, tuple)) else [value]
            words += ["--" + f.name.replace("_", "-"), *map(str, values)]
    return words


def by_first(call):
    """What `call` returns in the first process, in all of them."""
    result = [call() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]
