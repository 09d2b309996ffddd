import functools
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks gain nothing from a second thread

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import baselines
import lure
from experiments.data import load_dataset

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=30)
settings.register_profile(
    "mutants", settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent


def in_long() -> bool:
    """Whether this is `make test-long`, --hypothesis-profile=long."""
    return settings().max_examples == 2000


def examples(count: int, **more) -> settings:
    """So many examples, or all of them in the long profile; and more settings."""
    return settings(max_examples=2000 if in_long() else count, **more)


seeds = st.integers(0, 2**32 - 1)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# The smallest run there is, as a command line of baselines.py, and as what `lure.run` takes.
SMALL = ["--dataset", "digits", "--image-size", "8", "--limit", "120", "--limit-test", "60"]
SMALL += ["--mega-batches", "2", "--epochs", "1"]


@functools.cache
def small_data():
    """120 training and 60 test images of the digits, 8×8."""
    return load_dataset("digits", image_size=8, limit=120, limit_test=60)


def small_config(**changes):
    return lure.Config(**(dict(dataset="digits", mega_batches=2, epochs=1) | changes))


def timeless(value):
    """A record, or rows of one, without times."""
    if isinstance(value, dict):
        return {key: timeless(part) for key, part in value.items() if key != "seconds"}
    return [timeless(part) for part in value] if isinstance(value, list) else value


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Two methods of two seeds, one of them with another option too, with their checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    for row in ("lure", "warm-start", "warm-start+gamma=1"):
        method, *more = row.replace("+", " --").replace("=", " ").split()
        for seed in ("1", "2"):
            files = ["--out", f"{folder}/{row}-{seed}.json", "--checkpoint", f"{folder}/{row}-{seed}.pt"]
            assert baselines.main([*SMALL, "--method", method, "--seed", seed, *more, *files]) == 0
    return folder
