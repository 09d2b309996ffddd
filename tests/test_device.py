"""Runs on a second device (tests/device_double.py), with which a processor stands in for a GPU."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

import baselines

try:
    import device_double
except ImportError as error:
    pytest.skip(f"this version of torch has no device in Python: {error}", allow_module_level=True)


@pytest.fixture(scope="module")
def told():
    """What the runs showed, in a process of their own."""
    command = [sys.executable, "tests/device_double.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("run", [*baselines.METHODS, "resumed", "without float64"])
def test_on_another_device_than_the_processor_a_run_has_the_same_bits(run, told):
    assert told["equal"][run]


def test_within_an_epoch_nothing_waits_for_the_device_and_learning_waits_once_at_its_end(told):
    print(json.dumps(told["waits"], indent=1))  # of one run with each method
    assert not [place for place in told["waits"] if "train_epoch_" in place]
    assert told["waits"]["run/learn_"] == len(baselines.METHODS) * 2


@pytest.mark.parametrize("mistake", device_double.MISTAKES)
def test_what_the_processor_has_or_reads_by_mistake_is_noticed(mistake, told):
    assert device_double.MISTAKES[mistake][-1] in told["mistakes"][mistake]
