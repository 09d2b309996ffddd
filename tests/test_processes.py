"""The same experiment by several processes, started by torchrun as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from conftest import ROOT, same, seeded, seeds
from hypothesis import given
from hypothesis import strategies as st
from test_runs import result
from torch import nn

from experiments import ranks as processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def torchrun(*words, cwd):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*TORCHRUN, *map(str, words)], cwd=cwd, **pipes)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What each of two processes saw."""
    folder = tmp_path_factory.mktemp("ranks")
    process = torchrun(ROOT / "tests" / "ranks.py", folder, cwd=folder)
    assert process.wait(300) == 0, process.communicate()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one():
    """What one process, without torch.distributed, sees."""
    return ranks.experiments()


NAMES = ["with_batch_norm", "other", "exact"]


@pytest.mark.parametrize("name", NAMES)
def test_all_processes_hold_the_same_bits_after_every_mega_batch(name, two):
    first, second = (rank[name] for rank in two)
    assert len(first["ends"]) == 5 and len(first["masks"]) == 2  # three times learned, twice unlearned
    for mine, theirs in zip(first["ends"] + first["masks"], second["ends"] + second["masks"], strict=True):
        assert same(mine, theirs)
    assert first["accuracies"] == second["accuracies"]
    assert first["broadcast"] is False  # which would replace the statistics of the second by the first's


@pytest.mark.parametrize("name", NAMES)
def test_together_they_see_each_sample_once_an_epoch_and_the_whole_batch_in_order(name, two, one):
    assert len(one[name]["samples"]) == len(two[0][name]["samples"])
    for mine, theirs, all_of_it in zip(*(x[name]["samples"] for x in (*two, one)), strict=True):
        assert sorted(mine + theirs) == sorted(all_of_it) and len(set(all_of_it)) == len(all_of_it)
        assert abs(len(mine) - len(theirs)) <= -(-len(all_of_it) // 64)
        starts = range(0, max(len(all_of_it) - 31, 1), 64)  # what would start later joins the batch before
        for start in starts:  # both halves of every batch of 64
            batch = all_of_it[start : None if start == starts[-1] else start + 64]
            half = len(batch) // 2
            assert mine[start // 2 : start // 2 + half] == batch[:half]


def test_without_batch_norm_the_accuracies_and_masks_are_those_of_one_process(two, one):
    expected = one["exact"]
    for rank in two:
        found = rank["exact"]
        assert found["accuracies"] == pytest.approx(expected["accuracies"], abs=1e-6)
        for mine, other in zip(
            found["record"]["mega_batches"], expected["record"]["mega_batches"], strict=True
        ):
            for split in ("train", "val", "test"):
                assert mine[split]["loss"] == pytest.approx(other[split]["loss"], abs=1e-6)
            assert mine["running_train_accuracy"] == pytest.approx(other["running_train_accuracy"])
        assert all(same(a, b) for a, b in zip(found["masks"], expected["masks"], strict=True))


def test_batches_that_do_not_divide_move_the_weights_as_in_one_process(two, one):
    for rank in two:
        for name, expected in one["batches"]["weights"].items():
            torch.testing.assert_close(rank["batches"]["weights"][name], expected, rtol=0, atol=1e-14)


def test_running_statistics_become_the_mean_over_the_processes(two, one):
    expected = one["batches"]["statistics"]
    for rank in two:
        found = rank["batches"]["statistics"]  # after one batch of two equal parts, whose means have its mean
        torch.testing.assert_close(found["1.running_mean"], expected["1.running_mean"], rtol=0, atol=1e-14)
        torch.testing.assert_close(found["1.running_var"], expected["1.running_var"], rtol=0.1, atol=0)
        assert found["1.num_batches_tracked"] == 1


class Alone(nn.Module):
    """In place of DistributedDataParallel."""

    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, images):
        self.seen = images
        return self.module(images)


@given(st.integers(2, 4), st.integers(8, 40), seeds)
def test_each_process_computes_a_part_and_their_mean_gradient_is_that_of_the_batch(world, n, seed):
    model = Alone(nn.Linear(5, 3, dtype=torch.float64))
    images = torch.rand(n, 5, generator=seeded(seed), dtype=torch.float64)
    labels = torch.randint(3, (n,), generator=seeded(seed))
    whole = model(images)
    (expected,) = torch.autograd.grad(nn.functional.cross_entropy(whole, labels), model.module.weight)
    parts, gradients = [], []
    for rank in range(world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "RANK", rank)
            patch.setattr(processes, "WORLD", world)
            patch.setattr(nn.parallel, "DistributedDataParallel", lambda model: model)
            patch.setattr(processes.dist, "all_reduce", lambda logits: logits.copy_(whole.detach()))
            logits = processes.Parallel(model)(images)
            loss = nn.functional.cross_entropy(logits, labels)
            gradients += torch.autograd.grad(loss, model.module.weight)
        torch.testing.assert_close(logits, whole)
        parts.append(model.seen)
    assert torch.equal(torch.cat(parts), images)
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    torch.testing.assert_close(sum(gradients) / world, expected)


TINY = [word for key, value in ranks.TINY.items() for word in (f"--{key.replace('_', '-')}", str(value))]
CALL = [ROOT / "baselines.py", "--method", "lure", *TINY, "--out", "run.json", "--checkpoint", "run.pt"]


def workers(process):
    """Their numbers: the children of torchrun that run the script."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"baselines.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_a_process_that_dies_ends_the_run_which_then_goes_on(two, tmp_path):
    process = torchrun(*CALL, cwd=tmp_path)
    while not (tmp_path / "run.json.state").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(workers(process)[1], signal.SIGKILL)
    assert process.wait(60) != 0
    assert "run.json.state" in os.listdir(tmp_path) and "run.json" not in os.listdir(tmp_path)
    process = torchrun(*CALL, cwd=tmp_path)
    assert process.wait(300) == 0, process.communicate()
    record, weights = result(tmp_path)
    lines = process.stdout.read().splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["cer"] == record["totals"]["cer"]
    told = process.stderr.read()
    assert told.count("mega-batch 3 of 3") == 1 and "mega-batch 1 of 3" not in told
    assert record["processes"] == 2 and record["command"].startswith(
        "torchrun --nproc-per-node=2 baselines.py "
    )
    last = two[0]["with_batch_norm"]["ends"][-1]
    assert weights == {name: tensor.numpy().tobytes() for name, tensor in last.items()}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--epochs=0"], "--epochs: expected epochs per mega-batch, at least 1; got 0"),
        (["--method=sp", "--set=alpha=1"], "--set alpha=1: sp has shrink, noise"),
        pytest.param(
            ["--device=cuda"],
            "--device cuda: expected cpu, or cuda, cuda:1 ... of a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--mega-batches=121"], "120 samples do not make 121 mega-batches to train on"),
    ],
)
def test_a_wrong_call_is_told_once(wrong, message, tmp_path):
    process = torchrun(*CALL, *wrong, cwd=tmp_path)
    out, told = process.communicate(timeout=120)
    assert process.returncode != 0 and out == "" and not os.listdir(tmp_path)
    lines = [line for line in told.splitlines() if line.startswith("baselines.py: ")]
    assert lines == [f"baselines.py: {message}"]
