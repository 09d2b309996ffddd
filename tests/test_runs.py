"""Runs as files: records, states to go on from, refusals in one line, any command line, numbers that stay."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SMALL, examples, in_long, small_data, timeless
from hypothesis import Phase, example, given
from hypothesis import strategies as st
from test_data import contents
from test_numerics import pictures
from torch import nn

import baselines
import lure
from experiments import files, runs
from experiments.command import Parser
from experiments.data import DataError

SMALL_CONFIG = dict(dataset="digits", image_size=8, limit=120, limit_test=60, mega_batches=2, epochs=1)


def recorded(forget=None, **changes):
    config = runs.Config(**SMALL_CONFIG | changes)
    return runs.recorded(config, forget or runs.method(config))


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def refused(capsys, status, *words, argv=()):
    """The call ends with the status and one line that has all the words."""
    capsys.readouterr()
    try:
        assert baselines.main([*SMALL, *argv]) == status
    except SystemExit as exit:
        assert exit.code == status
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and all(word in error for word in words), error


# ------------------------------------------------------------ The record
@pytest.mark.numerics
def test_the_two_command_lines_measure_the_same_at_one_seed():
    config = runs.Config("digits", mega_batches=2, epochs=1, method="lure", seed=3)
    *_, plain = lure.run(config, lure.load_dataset("digits"))
    rows = runs.recorded(config, runs.method(config))["mega_batches"]
    for mine, theirs in zip(timeless(plain["mega_batches"]), timeless(rows), strict=True):
        assert mine.items() <= theirs.items()


def test_the_record_says_what_was_measured_and_where_it_comes_from(tmp_path, capsys):
    out, weights = tmp_path / "new" / "x.json", tmp_path / "deep" / "x.pt"
    words = ["--method", "sp", "--set", "shrink=0.5", "--keep-momentum", "--seed", "5", "--set", "noise=0.1"]
    assert baselines.main([*SMALL, *words, "--out", str(out), "--checkpoint", str(weights)]) == 0
    record = strict(out.read_text())
    assert strict(capsys.readouterr().out) == record["totals"] == lure.totals(record["mega_batches"])
    assert [p.name for p in [*out.parent.iterdir(), *weights.parent.iterdir()]] == ["x.json", "x.pt"]
    python, script, *given = shlex.split(record["command"])
    runs.lure.add_settings(parser := Parser(), runs.Config)
    config = asdict(runs.Config(**vars(parser.parse_args(given))))
    assert (python, script, given[0]) == ("python", "baselines.py", "--dataset")
    assert strict(json.dumps(config)) == record["config"] and config["arch"] == "small"
    assert config["set"] == ("shrink=0.5", "noise=0.1") and record["settings"] == dict(shrink=0.5, noise=0.1)
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", record["git_commit"] or 40 * "0")
    assert record["versions"]["torch"] == torch.__version__ and record["processes"] == 1
    assert record["threads"] == torch.get_num_threads()
    content = b"".join(t.movedim(-1, 1).contiguous().numpy().tobytes() for t in (small_data().images,))
    content += small_data().labels.numpy().tobytes()
    content += small_data().test_images.movedim(-1, 1).contiguous().numpy().tobytes()
    content += small_data().test_labels.numpy().tobytes()
    assert record["data"] == dict(train=120, test=60, sha256=hashlib.sha256(content).hexdigest())
    assert timeless(record["mega_batches"]) == timeless(
        recorded(method="sp", set=config["set"], keep_momentum=True, seed=5)["mega_batches"]
    )


@pytest.mark.numerics
def test_the_checkpoint_gives_the_recorded_test_accuracy(tmp_path):
    path = tmp_path / "weights.pt"
    record = recorded(checkpoint=str(path), epochs=3)
    stored, data = torch.load(path, weights_only=True), small_data()
    model = lure.build_model("small", data, torch.Generator()).eval()
    model.load_state_dict(stored["weights"])
    with torch.no_grad():
        wrong = int((model(lure.to_input(data.test_images)).argmax(1) != data.test_labels).sum())
    assert record["mega_batches"][-1]["test"]["errors"] == wrong
    assert json.loads(json.dumps(stored["config"])) == record["config"] and stored["classes"] == data.classes


@pytest.mark.parametrize("keep", [0.8, 0.5, 1.0])
def test_the_rows_tell_what_share_was_redrawn(keep):
    rows = recorded(method="lure", keep=keep)["mega_batches"]
    model = lure.build_model("small", small_data(), torch.Generator())
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.ndim >= 2}
    connections, shares = sum(sizes.values()), rows[0]["redrawn_by_tensor"]
    assert rows[0]["redrawn"] == pytest.approx(1 - round(keep * connections) / connections, abs=1e-9)
    assert shares.keys() == sizes.keys()
    redrawn = sum(share * sizes[name] for name, share in shares.items())
    assert redrawn == pytest.approx(rows[0]["redrawn"] * connections)
    assert {rows[1][key] for key in ("redrawn", "redrawn_by_tensor", "forgotten", "reestimated")} == {None}


def test_what_is_forgotten_is_measured_right_after_forgetting():
    ends = []

    def forget(model, between):
        model.load_state_dict(between.fresh().state_dict())
        found = lure.evaluate(model, small_data().test_images, small_data().test_labels)
        ends.append(dict(accuracy=found["accuracy"], loss=found["loss"]))

    rows = recorded(forget, mega_batches=3)["mega_batches"]
    assert [row["forgotten"] for row in rows] == [*ends, None] and len(ends) == 2
    for row in rows[:2]:
        assert row["redrawn"] is row["redrawn_by_tensor"] is None
        assert row["forgotten"]["loss"] != row["test"]["loss"]


def test_around_forgetting_the_accuracy_is_also_measured_with_statistics_taken_anew(tmp_path, monkeypatch):
    networks, data = [], small_data()

    def forget(model, between):
        networks.append(copy.deepcopy(model))
        baselines.shrink_and_perturb_(model, between)
        networks.append(copy.deepcopy(model))

    config = runs.Config(**SMALL_CONFIG | dict(mega_batches=3, out=str(tmp_path / "x.json")))
    _, stream = lure.draw_stream(config, data)
    reestimated, sampled = runs.reestimated, []
    monkeypatch.setattr(
        runs, "reestimated", lambda model, images: sampled.append(images) or reestimated(model, images)
    )
    rows = runs.recorded(config, forget)["mega_batches"]
    assert len(networks) == len(sampled) == 4 and rows[2]["reestimated"] is None
    for i, (network, when) in enumerate(zip(networks, ("before", "after") * 2, strict=True)):
        images, _ = data.samples(stream[i // 2].new[:1000])
        assert torch.equal(sampled[i], images)
        found = lure.evaluate(reestimated(network, images), data.test_images, data.test_labels)
        assert rows[i // 2]["reestimated"][when] == {key: found[key] for key in ("accuracy", "loss")}


def test_statistics_taken_anew_are_the_mean_over_chunks_of_a_network_that_stays_as_it_was():
    model = (
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.7), nn.Dropout(0.5)).double().train()
    )
    model[1].running_mean.fill_(5)
    images = torch.rand(7, 1, 4, 4, dtype=torch.float64)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    again = runs.reestimated(model, images, chunk=3)
    assert model.training and not any(m.training for m in again.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model[1].momentum == 0.7
    outputs = [model[0](part) for part in images.split(3)]
    for found, statistic in ((again[1].running_mean, torch.mean), (again[1].running_var, torch.var)):
        torch.testing.assert_close(found, torch.stack([statistic(o, (0, 2, 3)) for o in outputs]).mean(0))


@pytest.mark.parametrize("replay", ["full", "none"])
def test_every_generation_learns_the_whole_training_set(replay, monkeypatch):
    trained, train_epoch = [], lure.train_epoch_

    def spy(model, optimizer, data, train, *rest):
        trained.append(sorted(train.tolist()))
        return train_epoch(model, optimizer, data, train, *rest)

    monkeypatch.setattr(lure, "train_epoch_", spy)
    rows = recorded(generations=True, replay=replay, mega_batches=3, label_noise=0.2)["mega_batches"]
    assert [row["image_passes"] for row in rows] == [108] * 3  # of 120, 12 are for validation
    assert trained[0] == trained[1] == trained[2] and len(set(trained[0])) == 108


def test_a_process_with_other_data_than_the_first_is_refused(monkeypatch):
    monkeypatch.setattr(runs, "by_first", lambda call: {"sha256": "other"})
    with pytest.raises(DataError, match="the data of the first process"):
        recorded()


# ------------------------------------------------------------ Files that are there
def test_a_finished_run_is_read_and_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = [*SMALL, "--out", "run.json", "--checkpoint", "run.pt"]
    assert baselines.main(call) == 0
    files, printed = contents(), capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(lure, "train_epoch_", lambda *args: pytest.fail("trained again"))
        assert baselines.main([*call, "--cache", "elsewhere", "--device", "cpu"]) == 0
        assert (
            capsys.readouterr() == (printed, "run.json: is there, nothing is run\n") and contents() == files
        )
        Path("run.json").write_text(json.dumps(strict(Path("run.json").read_text()) | {"sources": "other"}))
        assert baselines.main(call) == 0
        assert (
            "run.json: is there, nothing is run, though by other code; remove it" in capsys.readouterr().err
        )
    Path("run.pt").unlink()
    assert baselines.main(call) == 0 and Path("run.pt").exists()


def test_a_method_with_other_defaults_is_another_run(tmp_path, capsys, monkeypatch):
    call = ["--method", "sp", "--out", str(tmp_path / "run.json")]
    assert baselines.main([*SMALL, *call]) == 0
    other = lambda model, between, shrink=0.3, noise=0.001: None  # noqa: E731
    monkeypatch.setitem(baselines.METHODS, "sp", other)
    refused(capsys, 2, "settings {'shrink': 0.4, 'noise': 0.001}, not {'shrink': 0.3", argv=call)


def test_an_error_of_a_method_says_where_and_dev_mode_shows_it(tmp_path, capsys, monkeypatch):
    def broken(model, between):
        raise ValueError("no such layer")

    monkeypatch.setitem(baselines.METHODS, "sp", broken)
    refused(capsys, 2, "mega-batch 1 of 2, sp: no such layer", argv=["--method", "sp"])
    dev_mode = SimpleNamespace(flags=SimpleNamespace(dev_mode=True), stdout=sys.stdout)
    monkeypatch.setattr("experiments.command.sys", dev_mode)
    with pytest.raises(ValueError, match="no such layer"):
        baselines.main([*SMALL, "--method", "sp"])


def test_a_setting_whose_default_is_no_number_is_the_developers_to_mend(monkeypatch):
    monkeypatch.setitem(baselines.METHODS, "sp", lambda model, between, layer="fc": None)
    with pytest.raises(TypeError, match="sp: expected a number as default of layer, got fc"):
        runs.method(runs.Config(method="sp"))


def test_a_file_of_another_run_is_never_overwritten(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert baselines.main([*SMALL, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    other_data = json.dumps(record | {"data": record["data"] | {"sha256": "other"}})
    for text, words, argv in (
        (out.read_text(), "epochs 1, not 2", ["--epochs", "2"]),
        (out.read_text(), "seed 1, not 2, method warm-start, not sp", ["--seed", "2", "--method", "sp"]),
        (out.read_text(), "generations False, not True", ["--generations"]),
        (other_data, "sha256 other", []),
        ("something else", "or no file (JSONDecodeError)", []),
        ("{", "or no file (JSONDecodeError)", []),
    ):
        out.write_text(text)
        refused(capsys, 2, "run.json", words, argv=[*argv, "--out", str(out)])
        assert out.read_text() == text and list(tmp_path.iterdir()) == [out]


def test_a_record_from_before_an_option_is_of_its_default(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert baselines.main([*SMALL, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    del record["config"]["generations"]
    out.write_text(json.dumps(record))
    assert baselines.main([*SMALL, "--out", str(out)]) == 0 and json.loads(out.read_text()) == record
    refused(capsys, 2, "generations False, not True", argv=["--out", str(out), "--generations"])


def test_a_record_is_compared_by_the_precision_that_it_ran_in(tmp_path, capsys):
    out = tmp_path / "run.json"
    assert baselines.main([*SMALL, "--precision", "float32", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    ran = lure.pick_precision("auto", torch.device("cpu"))
    out.write_text(json.dumps(record | {"precision": ran}))
    assert baselines.main([*SMALL, "--out", str(out)]) == 0  # auto, which means the same
    other = "float32" if ran == "bfloat16" else "bfloat16"
    refused(capsys, 2, f"precision {ran}, not {other}", argv=["--out", str(out), "--precision", other])


# ------------------------------------------------------------ Errors
@pytest.mark.parametrize(
    "argv, words",
    [
        (["--keep", "0"], ["--keep", "(0, 1]"]),
        (["--keep", "1.1"], ["--keep", "(0, 1]"]),
        (["--keep", "nan"], ["--keep", "(0, 1]"]),
        (["--keep", "much"], ["--keep", "much"]),
        (["--epochs", "many"], ["--epochs", "many"]),
        (["--epochs", "0"], ["--epochs", "at least 1"]),
        (["--batch-size", "1"], ["--batch-size", "at least 2"]),
        (["--mega-batches", "0"], ["--mega-batches", "from 1"]),
        (["--mega-batches", "121"], ["120 samples", "121 mega-batches"]),
        (["--replay", "none", "--mega-batches", "60"], ["two training samples"]),
        (["--val-fraction", "1"], ["--val-fraction", "(0, 0.9]"]),
        (["--label-noise", "1.5"], ["--label-noise", "[0, 1]"]),
        (["--lr", "inf"], ["--lr"]),
        (["--lr", "-1"], ["--lr", "at least 0"]),
        (["--seed", "-1"], ["--seed"]),
        (["--dataset", "mnist"], ["--dataset", "mnist", "restricted-imagenet"]),
        (["--arch", "resnet19"], ["--arch", "resnet19", "wide_resnet50_2"]),
        (["--replay", "some"], ["--replay", "full", "buffer", "none"]),
        (["--method", "forget"], ["--method", *baselines.METHODS]),
        (["--arch", "vgg16_bn"], ["vgg16_bn", "16×16"]),
        (["--device", "abacus"], ["--device", "abacus"]),
        (["--device", "meta"], ["--device", "meta"]),
        (["--speed", "9"], ["--speed"]),
        (["--epoch", "9"], ["--epoch"]),  # no abbreviations
        (["stray"], ["stray"]),
    ],
)
def test_a_wrong_call_is_one_line_and_writes_nothing(argv, words, tmp_path, capsys):
    files = ["--out", f"{tmp_path}/x.json", "--checkpoint", f"{tmp_path}/x.pt"]
    refused(capsys, 2, *words, argv=[*files, *argv])
    assert not list(tmp_path.iterdir())


def test_too_many_shots_are_wrong_data_and_status_1(capsys):
    refused(capsys, 1, "--shots 1000", argv=["--shots", "1000"])


@pytest.mark.parametrize(("batch_size", "mega_batches"), [(16, 2), (64, 2), (128, 1)])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_record(batch_size, mega_batches, tmp_path, capsys):
    argv = ["--lr", "1e18", "--batch-size", batch_size, "--mega-batches", mega_batches]
    argv += ["--out", tmp_path / "x.json"]
    refused(capsys, 1, f"x mega-batch 1 of {mega_batches}: the loss is nan", argv=map(str, argv))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_later_names_its_mega_batch_and_keeps_the_state(tmp_path, monkeypatch):
    def broken(model, pixels, labels):
        if len(pixels) == 60 and (tmp_path / "x.json.state").exists():
            raise FloatingPointError("the loss is nan")
        return evaluate(model, pixels, labels)

    evaluate = lure.evaluate
    monkeypatch.setattr(lure, "evaluate", broken)
    with pytest.raises(FloatingPointError, match="x mega-batch 2 of 2: the loss is nan"):
        recorded(out=str(tmp_path / "x.json"))
    assert os.listdir(tmp_path) == ["x.json.state"]


def test_every_option_is_on_the_command_line_with_its_help(capsys):
    with pytest.raises(SystemExit) as exit:
        baselines.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for f in fields(runs.Config):
        assert f"--{f.name.replace('_', '-')} " in text and " ".join(f.metadata["help"].split()) in text


# ------------------------------------------------------------ Killed from outside
FILES = ["--out", "run.json", "--checkpoint", "run.pt"]
SLOW = ["--method", "lure", *SMALL, "--limit", "256", "--epochs", "2", "--mega-batches", "16"]
SLOW += ["--keep-momentum", *FILES]


def result(folder):
    """All that a run leaves: its record, but for times, and its weights as bytes; and nothing else."""
    assert sorted(os.listdir(folder)) == ["run.json", "run.pt"]
    weights = torch.load(folder / "run.pt", weights_only=True)["weights"]
    record = timeless(json.loads((folder / "run.json").read_text()))
    return record, {name: tensor.numpy().tobytes() for name, tensor in weights.items()}


def start(folder):
    words = [sys.executable, ROOT / "baselines.py", *SLOW]
    options = dict(cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    # What a shell starts in the background ignores SIGINT, and so would its children.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(words, **options)


def finish(process):
    """The status that the run ends with, and the lines of its errors."""
    told = process.communicate(timeout=300)[1].splitlines()
    return process.returncode, told


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    status, told = finish(start(folder))
    assert status == 0, told
    return result(folder)


def stopped(folder, how, when):
    """Start the run and, as long after as `when` says, send the signal `how`. Returns how it ends."""
    process = start(folder)
    while process.poll() is None:
        if (delay := when()) is not None:
            time.sleep(delay)
            process.send_signal(how)
            break
    return finish(process)


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
    status, told = stopped(tmp_path, signal.SIGINT, saved(tmp_path))
    assert (status, told[-1]) == (130, "baselines.py: interrupted")
    for moment in (saved, saving, saved) if in_long() else (saved, saving):
        for _ in range(5):
            status, told = stopped(tmp_path, signal.SIGKILL, moment(tmp_path))
            assert status == -signal.SIGKILL, told
            assert not (tmp_path / "run.json").exists()
            if moment is saved or list(tmp_path.glob(".run.json.state.*")):  # half of a state
                break
        else:
            pytest.fail("no kill fell into a save")
    done = len(torch.load(tmp_path / "run.json.state", weights_only=True)["mega_batches"])
    status, told = finish(start(tmp_path))
    rows = re.findall(r"mega-batch (\d+) of 16:", "\n".join(told))
    assert status == 0 and rows == [str(i) for i in range(done + 1, 17)] and done > 1
    assert result(tmp_path) == undisturbed


# ------------------------------------------------------------ Stopped from inside
THREE = [*SMALL, "--epochs", "2", "--mega-batches", "3", *FILES]


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
def test_every_method_goes_on_from_where_it_stopped(options, tmp_path, monkeypatch):
    for name in ("whole", "0", "2", "3", "4"):  # the epoch of six in which it is stopped
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name != "whole":
            with monkeypatch.context() as patch:
                stop_at(patch, int(name))
                assert baselines.main([*THREE, *options]) == 130
            assert os.listdir() == (["run.json.state"] if name != "0" else [])
        assert baselines.main([*THREE, *options]) == 0
        assert result(tmp_path / name) == result(tmp_path / "whole")


@pytest.fixture
def stopped_run(tmp_path, monkeypatch):
    """The state of a run, `THREE`, that was interrupted in its second mega-batch."""
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert baselines.main(THREE) == 130
    return tmp_path / "run.json.state"


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
    "another format": (changed("format", 0), "its format 0, not 2"),
    "another torch": (changed("versions", {}), "its versions {}, not"),
    "another commit": (changed("git_commit", "abc"), "its git_commit abc, not"),
    "another device": (changed("device", "abacus"), "its device abacus, not"),
    "another precision": (changed("precision", "int8"), "precision int8, not"),
    "other processes": (changed("processes", 2), "its processes 2, not 1"),
    "other code": (changed("sources", "abc"), "its sources abc, not"),
    "other instructions": (changed("instruction_set", "SSE"), "its instruction_set SSE, not"),
    "nonsense": (changed("config", {"epochs": torch.zeros(2)}), "expected what"),
    "other data": (changed("data", {"train": 9, "test": 9}), "train 9, not 120, test 9, not 60, sha256 None"),
}


def test_a_state_that_is_not_this_runs_is_one_line_and_loses_nothing(stopped_run, capsys):
    whole = stopped_run.read_bytes()
    for spoil, message in SPOILT.values():
        stopped_run.write_bytes(whole)
        spoil(stopped_run)
        before = stopped_run.read_bytes()
        refused(capsys, 2, "run.json.state", message, argv=THREE)
        assert os.listdir() == ["run.json.state"] and stopped_run.read_bytes() == before
    stopped_run.write_bytes(whole)
    refused(capsys, 2, "run.json.state", "seed 1, not 2", argv=[*THREE, "--seed", "2"])
    assert baselines.main(THREE) == 0 and not stopped_run.exists()  # still there for its own


def test_what_a_call_that_was_killed_at_its_very_end_left_is_removed(stopped_run, tmp_path):
    leftover = stopped_run.read_bytes()
    assert baselines.main(THREE) == 0
    stopped_run.write_bytes(leftover)
    (tmp_path / ".run.json.7.tmp").write_text("half a rec")
    (tmp_path / ".run.pt.7.tmp").write_text("half a checkpoint")
    (tmp_path / ".run.json.swp").write_text("an editor's")
    assert baselines.main(THREE) == 0
    assert sorted(os.listdir()) == [".run.json.swp", "run.json", "run.pt"]


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    script = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import baselines
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        sys.exit(baselines.main({[*SMALL, "--mega-batches", "1", *FILES]}))"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(r"\n-c: run.json.state: cannot be written \(.*too large\)\n$", done.stderr), done.stderr
    assert not os.listdir(tmp_path)


def test_two_runs_that_write_one_file_are_not_run_at_once(tmp_path, monkeypatch, capsys):
    """The second ends with one line; of one that was killed, the same call goes on."""
    first = start(tmp_path)
    told = iter(first.stderr)
    assert "mega-batch 1 of 16" in next(told)
    first.send_signal(signal.SIGSTOP)
    monkeypatch.chdir(tmp_path)
    for words, name in (
        (["--out", "run.json", "--seed", "2"], "run.json"),
        (["--out", "other.json", "--checkpoint", "run.pt", "--seed", "2"], "run.pt"),
        (FILES, "run.json"),
    ):
        told = f"{name}: expected no other run that writes it, but there is one"
        refused(capsys, 2, told, argv=words)
    first.kill()
    first.communicate()
    assert finish(start(tmp_path))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "run.pt"}


def test_where_files_cannot_be_held_another_runs_record_is_not_replaced(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError("Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    out = tmp_path / "x.json"
    other = json.dumps(recorded(seed=2))

    def forget(model, between):
        out.write_text(other)  # by another run, meanwhile

    with pytest.raises(ValueError, match=r"x.json: expected no file, or one of this run; found seed 2, "):
        recorded(forget, out=str(out), checkpoint=str(tmp_path / "x.pt"))
    assert out.read_text() == other and not (tmp_path / "x.pt").exists()
    out.unlink()
    (tmp_path / "x.json.state").unlink()
    assert recorded(out=str(out)) == json.loads(out.read_text())


def test_a_state_of_code_that_was_not_committed_is_refused(tmp_path):
    """Stopped, edited and called again, without git."""
    for name in files.SOURCES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text())
    call = [sys.executable, "baselines.py", *SMALL, "--method", "sp", "--mega-batches", "3", *FILES]
    stop = f"""if True:
        import sys, lure, baselines
        learn, done = lure.learn_, []
        def stopped(*args):
            done.append(1)
            if len(done) == 2:
                raise KeyboardInterrupt
            return learn(*args)
        lure.learn_ = stopped
        sys.exit(baselines.main({call[2:]}))"""
    done = subprocess.run([sys.executable, "-c", stop], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and (tmp_path / "run.json.state").exists(), done.stderr
    code = (tmp_path / "baselines.py").read_text()
    (tmp_path / "baselines.py").write_text(code.replace("p.mul_(shrink)", "p.mul_(shrink / 2)"))
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r".*run.json.state: .* its sources \w+, not \w+\n", done.stderr)


def test_the_code_of_a_run_is_all_that_it_imports_of_the_project():
    script = (
        "import sys, experiments.runs; from pathlib import Path\n"
        "files = [m.__file__ for m in sys.modules.values() if getattr(m, '__file__', None)]\n"
        f"print(*(Path(f).relative_to({str(ROOT)!r}) for f in files if Path(f).parent in "
        f"(Path({str(ROOT)!r}), Path({str(ROOT)!r}) / 'experiments')))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert set(done.stdout.split()) - {"experiments/__init__.py"} == set(files.SOURCES), done.stderr


def plain_call(tmp_path, **variables):
    words = [sys.executable, ROOT / "baselines.py", *SMALL]
    without = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.run(words, cwd=tmp_path, env=without | variables, capture_output=True, text=True)


def test_a_cluster_that_sets_the_number_of_processes_for_a_plain_call_is_told(tmp_path):
    done = plain_call(tmp_path, WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "WORLD_SIZE is 2 without MASTER_ADDR: start it by torchrun" in done.stderr
    assert plain_call(tmp_path, WORLD_SIZE="", RANK="").returncode == 0


def test_with_compile_the_network_is_trained_through_torch_compile(monkeypatch):
    compiled, real = [], torch.compile
    eager = lambda model, mode: compiled.append(mode) or real(model, backend="eager")  # noqa: E731
    monkeypatch.setattr(torch, "compile", eager)
    found, plain = recorded(compile=True), recorded()
    assert compiled == ["reduce-overhead"] * 2
    assert timeless(found["mega_batches"]) == timeless(plain["mega_batches"])


def test_compiling_without_a_compiler_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    refused(capsys, 2, "--compile: expected a C++ compiler", argv=["--compile"])


def test_what_an_encoding_lacks_is_printed_as_an_escape(tmp_path):
    script = (
        "from experiments.command import guarded; import sys; sys.exit(guarded('x', lambda: print('ä − β')))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True)
    assert (done.returncode, done.stdout) == (0, "ä \\u2212 \\u03b2\n".encode("latin-1"))


def test_a_run_without_a_record_leaves_no_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert baselines.main(SMALL) == 0
    assert os.listdir() == []


# ------------------------------------------------------------ Any command line
TINY = ["--dataset=digits", "--arch=small", "--limit=60", "--limit-test=20", "--mega-batches=2", "--epochs=1"]
TINY += ["--data=kept/data", "--cache=cache", "--out=out/x.json"]
GOOD = {"dataset": ["digits", "folder"], "arch": ["small"], "epochs": ["1", "2"], "device": ["cpu", "cpu:0"]}
GOOD |= {"data": ["kept/data"], "cache": ["cache/new/ä"], "set": ["shrink=0.5", "alpha=0.1", "steps=2"]}
GOOD |= {"out": ["", "out/x", "out/new/ä", "out/--"], "checkpoint": ["", "out/y", "out/new/x.pt", "out/x"]}
BAD = ["", " ", "0", "nan", "inf", "-inf", "-1", "-1e-9", "1e9", "1e30", "1e300", str(10**30), "9" * 5000]
BAD += ["ä", "-", "0x1", "1,5", "%s", "None", "kept", "/", "x\ny", "x\x1b[2J", "x" * 300, "\udcff"]
PLACES = ["out", "out/x.json/", "out/x.json.state", "out/" + "x" * 300]
PLACES += ["kept", "kept/list/x", "kept/pipe", "/proc/x"]
FOREIGN = {"list": "[]", "numbers": '{"config": 1, "data": 2}', "deep": "[" * 100_000, "empty": ""}
KEYS = ("noise", "floor", "alpha", "steps", "chunk", "keep", "")
WORST = {"cache": ["cache/" + "x" * 300, "kept/list", "kept/list/x", "/proc"], "checkpoint": PLACES}
WORST |= {"out": [*PLACES, *(f"kept/{name}" for name in FOREIGN)]}
WORST |= {"set": [f"{key}={value}" for key in KEYS for value in BAD]}


def options(values_of):
    """One option of the command line, as one word or two, with one of the values of its field."""

    def written(field):
        flag = "--" + field.name.replace("_", "-")
        return [words for v in values_of(field) for words in ([flag, v], [f"{flag}={v}"])] or [[flag]]

    quick = [field for field in fields(runs.Config) if field.name != "compile"]
    return st.sampled_from(quick).flatmap(lambda field: st.sampled_from(written(field)))


def good(field):
    """Values that are valid, at least without other options, and that take no time."""
    numbers = {int: ["2", "3", "9"], float: ["0.1", "0.5"]}.get(type(field.default), [])
    return GOOD.get(field.name) or field.metadata["choices"] or numbers


def bad(field):
    """Values at the bounds, out of them, and nonsense."""
    limits = (lure.LIMITS | runs.LIMITS).get(field.name, (0, 1e18))
    low, *large = (*(f"{limit:.15g}" for limit in limits), str(10**9), str(10**12))
    takes_its_time = field.name in ("epochs", "image_size")
    return WORST.get(field.name) or [low, *([] if takes_its_time else large), *BAD]


def ended(argv):
    """How the call ends: its status, its output and its errors, but for the lines that tell of progress."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
        signal.alarm(60)
        try:
            status = baselines.main(argv)
        except SystemExit as exit:
            status = exit.code
        finally:
            signal.alarm(0)
    err = err.getvalue().encode(errors="backslashreplace").decode()  # as of the real one
    return status, out.getvalue(), re.sub(r".* % of the test set\n", "", err)


@pytest.mark.filterwarnings("error")
@examples(40, phases=[Phase.explicit, Phase.generate])
@given(st.lists(options(good), max_size=4), st.lists(options(bad), max_size=1))
@example([["--method=sp"]], [["--set=noise=1e39"]])
@example([["--method=dash"]], [["--set=floor=1e300"]])
@example([["--method=fire"]], [[f"--set=steps={10**30}"]])
@example([["--method=fisher"]], [[f"--set=chunk={10**30}"]])
@example([["--dataset=folder"]], [["--cache=/proc"]])
@example([], [["--out=kept/numbers"]])
@example([], [["--out=kept/deep"]])
@example([], [["--out=out/x.json/"]])
@example([], [["--out=/proc/x"]])
@example([], [["--checkpoint=out/x.json"]])
@example([], [["--checkpoint=out/x.json.state"]])
@example([], [["--keep-momentum", "x\x1b[2J"]])
def test_any_command_line_works_or_is_refused_in_one_line(good, bad):
    argv = [*TINY, *(word for words in good + bad for word in words)]
    apart = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = dict(zip(apart, [*apart[1:], ""], strict=True))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        pictures(Path("kept/data"))
        Path("out").mkdir()
        Path("out/.x.swp").touch()  # an editor's
        for name, text in FOREIGN.items():
            Path("kept", name).write_text(text)
        os.mkfifo("kept/pipe")
        before = contents("out", "cache")
        status, out, err = ended(argv)
        assert contents("out", "cache") == before and [*Path().rglob(".*")] == [Path("out/.x.swp")]
        if status:
            assert status in (1, 2) and out == "" and len(err) > 1 and err[:-1].isprintable(), err
        else:
            assert err == "" and out.count("\n") == 1 and Path(given.get("--checkpoint", "")).exists()
            if given["--out"]:
                assert strict(Path(given["--out"]).read_text())["totals"] == strict(out)
                assert ended(argv) == (0, out, f"{given['--out']}: is there, nothing is run\n")
