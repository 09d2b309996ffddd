"""Files that are whole or not there, and where a number in them comes from.

Enters: what to write, and where. Leaves: the file, under its name only when all of it is written.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import torch
import torchvision

from experiments.ranks import WORLD
from lure import Dataset


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


def write_text(path: str | Path, text: str) -> None:
    write(path, lambda file: file.write(text.encode()))


@contextlib.contextmanager
def held(*paths: str) -> Iterator[None]:
    """While it lasts, no other process can hold these files. ValueError if one does.

    By a lock on a file beside each, which the system lets go when the process ends, however it ends. Where
    the file system has no locks, nothing is held.
    """
    with contextlib.ExitStack() as stack:
        for path in paths:
            stack.enter_context(held_alone(Path(path)))
        yield


@contextlib.contextmanager
def held_alone(path: Path) -> Iterator[None]:
    beside = path.with_name(f".{path.name}.lock")
    while True:
        with open(beside, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"{path}: expected no other run that writes it, but there is one") from error
            except OSError:  # no locks here
                yield
                return
            if not is_open_file(file, beside):  # its holder has removed it in between
                continue
            try:
                yield
            finally:
                beside.unlink()
            return


def is_open_file(file, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(path))


def load(path: str | Path, **options):
    """What torch.save wrote. Code in the file is not run: it makes this raise, as anything foreign may."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True, **options)


PROJECT = Path(__file__).resolve().parent.parent
# The code that a run consists of.
ROOMS = ("command", "data", "files", "ranks", "runs")
SOURCES = ("lure.py", "baselines.py", *(f"experiments/{room}.py" for room in ROOMS))


@functools.cache
def sources() -> str:
    """sha256 of the code that a run consists of, which may differ from the commit's."""
    return hashlib.sha256(b"".join((PROJECT / name).read_bytes() for name in SOURCES)).hexdigest()


def data_digest(data: Dataset) -> dict:
    """How many images the data have, and the sha256 of their pixels, N × C × H × W, and labels."""
    images = data.images.permute(0, 3, 1, 2)
    test_images = data.test_images.permute(0, 3, 1, 2)
    content = hashlib.sha256()
    for tensor in (images, data.labels, test_images, data.test_labels):
        content.update(tensor.contiguous().numpy().tobytes())
    return dict(train=len(data.labels), test=len(data.test_labels), sha256=content.hexdigest())


def provenance(command: list[str], device: torch.device, data: Dataset) -> dict:
    """Where a number comes from: command, git commit, code, data, versions, device."""
    git = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty"]
    call = shlex.join([*git, "--abbrev=40", "--exclude=*"])  # by a shell, since there may be no git
    commit = subprocess.run(call, shell=True, capture_output=True, text=True).stdout.strip()
    processor = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    python = ["python"] if WORLD == 1 else ["torchrun", f"--nproc-per-node={WORLD}"]
    return dict(
        command=shlex.join([*python, *command]),
        git_commit=commit or None,
        sources=sources(),
        data=data_digest(data),
        versions=dict(torch=str(torch.__version__), torchvision=torchvision.__version__),
        python=platform.python_version(),
        device=processor if device.type == "cpu" else torch.cuda.get_device_name(device),
        instruction_set=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        processes=WORLD,
    )
