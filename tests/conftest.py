import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny networks gain nothing from a second thread

import pytest
from hypothesis import Phase, settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import baselines

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None, max_examples=30)
settings.register_profile(
    "mutants", settings.get_profile("repeatable"), phases=[Phase.explicit, Phase.generate]
)
settings.register_profile("long", deadline=None, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")


def in_long() -> bool:
    """Whether this is `make test-long`, --hypothesis-profile=long."""
    return settings().max_examples == 2000


def examples(count: int, **more) -> settings:
    """So many examples, or all of them in the long profile; and more settings."""
    return settings(max_examples=2000 if in_long() else count, **more)


SMALL = ["--dataset", "digits", "--arch", "small", "--limit", "120", "--limit-test", "60"]
SMALL += ["--mega-batches", "2", "--epochs", "1"]


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
