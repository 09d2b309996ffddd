"""A run that is stopped, at whatever moment, goes on by the same call and ends as if it had not been."""

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import in_long

import baselines
import lure

ROOT = Path(__file__).parent.parent
TINY = ["--dataset", "digits", "--arch", "small", "--limit", "120", "--limit-test", "60", "--epochs", "2"]
FILES = ["--out", "run.json", "--checkpoint", "run.pt"]


def timeless(value):
    """A record without its times."""
    if isinstance(value, dict):
        times = ("seconds", "images_per_second")
        return {key: timeless(part) for key, part in value.items() if key not in times}
    return [timeless(part) for part in value] if isinstance(value, list) else value


def result(folder):
    """All that a run leaves: its record, but for times, and its weights as bytes; and nothing else."""
    assert sorted(os.listdir(folder)) == ["run.json", "run.pt"]
    weights = torch.load(folder / "run.pt", weights_only=True)["weights"]
    record = timeless(json.loads((folder / "run.json").read_text()))
    return record, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


# ------------------------------------------------------------ Killed from outside
SLOW = [*TINY, "--limit", "256", "--mega-batches", "16", "--keep-momentum"]


def start(folder):
    words = [sys.executable, ROOT / "lure.py", *SLOW, *FILES]
    options = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # What a shell starts in the background ignores SIGINT, and so would its children.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder)
    assert process.wait(300) == 0, process.communicate()
    return result(folder)


def stopped(folder, how, when):
    """Start the run and, as long after as `when` says, send the signal `how`. Returns the ended process."""
    process = start(folder)
    while process.poll() is None:
        if (delay := when()) is not None:
            time.sleep(delay)
            process.send_signal(how)
            break
    process.wait(60)
    return process


def saved(folder):
    """A moment: after the next save, and so long after it that training is likely to have begun again."""
    state = folder / "run.json.state"
    before = state.stat().st_mtime_ns if state.exists() else None

    def when():
        time.sleep(0.001)
        there = state.exists() and state.stat().st_mtime_ns != before
        return random.uniform(0, 0.2) if there else None

    return when


def saving(folder):
    """A moment: while a save is going on."""
    before = set(folder.glob(".run.json.state.*"))
    return lambda: 0 if set(folder.glob(".run.json.state.*")) - before else None


@pytest.mark.parametrize("attempt", range(7 if in_long() else 1))
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(attempt, undisturbed, tmp_path):
    random.seed(attempt)
    interrupted = stopped(tmp_path, signal.SIGINT, saved(tmp_path))
    assert interrupted.returncode == 130
    assert interrupted.stderr.read().splitlines()[-1] == "lure.py: interrupted"
    for moment in (saved, saving, saved) if in_long() else (saved, saving):
        for _ in range(5):
            assert stopped(tmp_path, signal.SIGKILL, moment(tmp_path)).returncode == -signal.SIGKILL
            assert not (tmp_path / "run.json").exists()
            if moment is saved or list(tmp_path.glob(".run.json.state.*")):  # half of a state
                break
        else:
            pytest.fail("no kill fell into a save")
    done = len(torch.load(tmp_path / "run.json.state", weights_only=True)["mega_batches"])
    process = start(tmp_path)
    assert process.wait(300) == 0
    told = re.findall(r"mega-batch (\d+) of 16:", process.stderr.read())
    assert told == [str(i) for i in range(done + 1, 17)] and done > 1
    assert result(tmp_path) == undisturbed


# ------------------------------------------------------------ Stopped from inside
def stop_at(monkeypatch, epoch):
    """Let the run be interrupted in that epoch of all of its epochs."""
    train_epoch, count = lure.train_epoch_, iter(range(1000))

    def interrupted(*args):
        if next(count) == epoch:
            raise KeyboardInterrupt
        return train_epoch(*args)

    monkeypatch.setattr(lure, "train_epoch_", interrupted)


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "lure"],
        ["--method", "random", "--replay", "none", "--label-noise", "0.3"],
        ["--method", "sp", "--replay", "buffer", "--buffer-size", "9", "--keep-momentum"],
        ["--method", "scratch", "--select", "best-val"],
    ],
)
@pytest.mark.parametrize("epoch", [2, 3, 4])
def test_every_method_goes_on_from_where_it_stopped(options, epoch, tmp_path, monkeypatch):
    call = [*TINY, "--mega-batches", "3", *options, *FILES]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    assert baselines.main(call) == 0
    monkeypatch.chdir(tmp_path / "stopped")
    with monkeypatch.context() as patch:
        stop_at(patch, epoch)
        assert baselines.main(call) == 130
    assert os.listdir() == ["run.json.state"]
    assert baselines.main(call) == 0
    assert result(tmp_path / "stopped") == result(tmp_path / "whole")


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """A run that was interrupted in its second mega-batch: its call, in its folder, and its state."""
    monkeypatch.chdir(tmp_path)
    call = [*TINY, "--mega-batches", "3", *FILES]
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert lure.main(call) == 130
    return call, tmp_path / "run.json.state"


class Code:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def changed(key, value):
    def spoil(state):
        torch.save(torch.load(state, weights_only=True) | {key: value}, state)

    return spoil


SPOILT = {
    "empty": (lambda state: state.write_bytes(b""), "expected what"),
    "truncated": (lambda state: os.truncate(state, state.stat().st_size // 2), "expected what"),
    "text": (lambda state: state.write_text("state"), "expected what"),
    "a pickle with code": (lambda state: state.write_bytes(pickle.dumps(Code())), "expected what"),
    "a checkpoint with code": (lambda state: torch.save({"model": Code()}, state), "expected what"),
    "something else": (lambda state: torch.save([1, 2], state), "expected what"),
    "another format": (changed("format", 0), "its format 0, not 1"),
    "another torch": (changed("versions", {}), "its versions {}, not"),
    "another commit": (changed("git_commit", "abc"), "its git_commit abc, not"),
    "another device": (changed("device", "abacus"), "its device abacus, not"),
    "another precision": (changed("precision", "int8"), "precision int8, not"),
    "other processes": (changed("processes", 2), "its processes 2, not 1"),
    "nonsense": (changed("config", {"epochs": torch.zeros(2)}), "expected what"),
    "other data": (changed("data", {"train": 9, "test": 9}), "train 9, not 120, test 9, not 60, sha256 None"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_state_that_is_not_this_runs_is_one_line_and_loses_nothing(kind, stopped_run, tmp_path, capsys):
    call, state = stopped_run
    spoil, message = SPOILT[kind]
    spoil(state)
    before = state.read_bytes()
    capsys.readouterr()
    assert lure.main(call) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "run.json.state" in told.err and message in told.err
    assert told.out == "" and os.listdir() == ["run.json.state"] and state.read_bytes() == before


def test_a_state_of_other_options_is_one_line_and_still_there_for_its_own(stopped_run, capsys):
    call, state = stopped_run
    before = state.read_bytes()
    capsys.readouterr()
    assert lure.main([*call, "--seed", "2"]) == 2
    assert "run.json.state" in (told := capsys.readouterr().err) and "seed 1, not 2" in told
    assert state.read_bytes() == before
    assert lure.main(call) == 0 and not state.exists()


def test_what_a_call_that_was_killed_at_its_very_end_left_is_removed(stopped_run, tmp_path):
    call, state = stopped_run
    leftover = state.read_bytes()
    assert lure.main(call) == 0
    state.write_bytes(leftover)
    (tmp_path / ".run.json.7.tmp").write_text("half a rec")
    (tmp_path / ".run.pt.7.tmp").write_text("half a checkpoint")
    (tmp_path / ".run.json.swp").write_text("an editor's")
    assert lure.main(call) == 0
    assert sorted(os.listdir()) == [".run.json.swp", "run.json", "run.pt"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    script = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import lure
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        sys.exit(lure.main({[*TINY, "--mega-batches", "1", *FILES]}))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"\n-c: run.json.state: cannot be written \(.*too large\)\n$", done.stderr), done.stderr
    assert not os.listdir(tmp_path)


def test_what_is_written_is_flushed_to_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: events.append(os.fstat(file.fileno()).st_size) or fsync(file)
    )
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("renamed") or replace(*paths))
    lure.write(tmp_path / "file", lambda file: file.write(b"all of it"))
    assert events == [len("all of it"), "renamed"] and (tmp_path / "file").read_text() == "all of it"


def test_a_run_without_a_record_leaves_no_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lure.main([*TINY, "--mega-batches", "2"]) == 0
    assert os.listdir() == []
