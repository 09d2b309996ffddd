"""The benchmark: that it times the real loops and computes what it prints. How fast they are is no test."""

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import small_data

import lure
from experiments import bench, bench_tables
from experiments.runs import Config

CPU = torch.device("cpu")
TINY = Config(arch="small", image_size=8, batch_size=16, lr=0.01)


def test_the_benchmark_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda make, device: 1.0)  # it starts processes; see below
    monkeypatch.setattr(bench, "SIDES", {"cpu": (32, 64)})
    median = bench.median_seconds
    monkeypatch.setattr(bench, "median_seconds", lambda call, device, repeats=1: median(call, device, 1))
    argv = ["--device", "cpu", "--images", "40", "--image-size", "8", "--batch-size", "16", "--rounds", "2"]
    argv += ["--workers", "1", "--pi", "20", "--batch-sizes", "32", "--networks", "small"]
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    path, shown = sorted(tmp_path.iterdir())
    result = json.loads(path.read_text())
    assert result["command"].startswith("python -m experiments.bench --device cpu --images 40")
    assert [row["batch_size"] for row in result["batch_sizes"]] == [32]
    resnet18, small = result["loops"]
    assert (resnet18["arch"], small["arch"]) == ("resnet18", "small")
    # 33.8 PFLOP for 10.1 million passes at 32×32, and a sixteenth of that per pass at 8×8
    assert resnet18["gflop_per_image"] == pytest.approx(33.8e6 / 10.1e6 / 16, rel=0.03)
    for case in result["loops"]:
        assert [*case["loops"]] == [*bench.precisions(CPU), "plain"] and case["auto"] in case["loops"]
        plain = case["loops"]["plain"]
        for loop in case["loops"].values():
            ratios = [b / a for a, b in zip(loop["seconds"], plain["seconds"], strict=True)]
            assert len(ratios) == 2 and [loop["ratio_low"], loop["ratio_high"]] == [min(ratios), max(ratios)]
            assert loop["ratio"] == pytest.approx(loop["images_per_second"] / plain["images_per_second"])
            rate = case["images"] / statistics.median(loop["seconds"])
            assert loop["images_per_second"] == pytest.approx(rate)
            assert loop["tflops"] == pytest.approx(rate * case["gflop_per_image"] / 1000)
            steps = -(-case["images"] // 16)
            assert loop["ms_per_step"] == pytest.approx(1000 * statistics.median(loop["seconds"]) / steps)
        assert len(case["others_share"]) == 2 and all(0 <= share <= 1 for share in case["others_share"])
    printed = capsys.readouterr()
    assert printed.out == bench.markdown(result) + "\n" == shown.read_text() + "\n"
    assert "round 2; " in printed.err and printed.err.count("\n") > 10
    text = shown.read_text()
    assert text.count(f"ours, {resnet18['auto']} (auto)") == 2 == text.count("(auto) |")
    assert "| 32 |" in text and text.count("| small |") == 1


@pytest.mark.parametrize(
    ("has", "expected"),
    [
        ({}, ["float32"]),
        ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, ["bfloat16", "float32"]),
        ({"amx_bf16": True}, ["bfloat16", "float32"]),
    ],
)
def test_each_precision_that_the_processor_has_is_timed(has, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert bench.precisions(CPU) == expected


def test_by_default_the_loops_and_one_unlearning_are_measured(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(bench, "compare", lambda *args: seen.append(args[:3]) or {})
    monkeypatch.setattr(bench, "unlearning", lambda *args: seen.append(args[:2]) or {})
    monkeypatch.setattr(bench, "matmul_tflops", lambda device: {})
    monkeypatch.setattr(bench, "SECTIONS", {})
    assert bench.main(["--device", "cpu"]) == 0
    assert [(args[0].arch, *args[1:]) for args in seen] == [
        ("resnet18", 128, 3),
        ("small", 512, 3),
        ("resnet18", 1125),
    ]


def test_a_disturbed_round_is_measured_again_and_marked_if_it_stays_so(monkeypatch):
    def rounds(shares, number=2):
        called = []
        left = iter(shares)

        def share(call):
            called.append(1)
            call()
            return next(left)

        monkeypatch.setattr(bench, "others_share", share)
        found = bench.measured_rounds({"a": lambda: None}, number, CPU, "x")
        return [share for share, _ in found], len(called)

    assert rounds([0.9, 0.0, 0.1]) == ([0.0, 0.1], 3)  # the first does not count
    assert rounds([0.0, 0.5, 0.05, 0.5, 0.02]) == ([0.02, 0.05], 5)
    assert rounds([0.0, 0.5, 0.05, 0.3, 0.4]) == ([0.05, 0.3], 5)
    result = {"device": "x", "threads": 1, "versions": {"torch": "2"}, "matmul_tflops": {"float32": 1.0}}
    loop = dict(images_per_second=1, ms_per_step=1, tflops=1, peak_mib=1, ratio=1, ratio_low=1, ratio_high=1)
    case = dict(arch="small", image_size=8, batch_size=16, auto="float32", workers=1, loops={"float32": loop})
    for shares, marks in (([0.05, 0.1], 0), ([0.05, 0.3], 2)):
        text = bench_tables.loops_table(result | {"loops": [case | {"others_share": shares}]})
        assert text.count("†") == marks and ("in 1 of 2 rounds" in text) == bool(marks)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="Linux tells what processes take")
def test_what_other_processes_take_is_told_from_what_ones_own_take():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        assert bench.others_share(lambda: time.sleep(2)) > 0.5  # all cores are theirs
    finally:
        for process in busy:
            process.kill()
            process.wait()
    child = multiprocessing.get_context("fork").Process(target=work, args=(1,))
    before = bench.own_seconds()
    child.start()
    while child.is_alive() and bench.own_seconds() < before + 0.5:
        time.sleep(0.05)
    assert bench.own_seconds() >= before + 0.5  # a child's time counts while it runs,
    child.join()
    assert bench.own_seconds() >= before + 0.9  # when it has ended,
    work(0.5)
    assert bench.own_seconds() >= before + 1.3  # and one's own


def work(processor_seconds):
    end = time.process_time() + processor_seconds
    while time.process_time() < end:
        sum(range(1000))


def test_a_wrong_call_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--rounds", "0"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_both_loops_train_the_same_network_on_the_same_images():
    plain = bench.plain(TINY, 40, CPU, 0)
    ours = bench.ours(TINY, 40, CPU)
    plain_model, _, loader, _ = plain.args
    our_model, _, data, train, *_ = ours.args
    for p, q in zip(plain_model.parameters(), our_model.parameters(), strict=True):
        assert torch.equal(p, q)
    loader.dataset.transform.transforms = loader.dataset.transform.transforms[-1:]  # as they are, in order
    shown = [loader.dataset[i] for i in range(40)]
    assert torch.equal(torch.stack([image for image, _ in shown]), lure.to_input(data.images))
    assert [label for _, label in shown] == data.labels.tolist() and train.tolist() == list(range(40))
    before = [p.clone() for p in plain_model.parameters()]
    plain()
    assert not any(torch.equal(p, q) for p, q in zip(before, plain_model.parameters(), strict=True))


def layout(tensor):
    return tensor.dtype, [step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def test_what_is_timed_is_what_a_run_runs(monkeypatch):
    """The network's and the data's layout and the optimizer's settings are those of `lure.run`."""
    ran, real = [], lure.train_epoch_
    monkeypatch.setattr(lure, "train_epoch_", lambda *args: ran.append(args) or real(*args))
    config = replace(TINY, dataset="digits", mega_batches=1, epochs=1)
    assert len([*lure.run(config, small_data())]) == 1
    ((_, optimizer, data, *_),) = ran
    timed = bench.ours(config, len(data.labels), CPU).args
    assert timed[1].defaults == optimizer.defaults
    used = [[*m.parameters(), *d[:2], i] for m, _, d, i, *_ in (timed, ran[0])]
    assert [layout(tensor) for tensor in used[0]] == [layout(tensor) for tensor in used[1]]
    assert (timed[2].padding, timed[2].flip) == (data.padding, data.flip)


def test_unlearning_is_the_real_one(monkeypatch):
    scores = bench.sensitivity(TINY, 20, CPU)()
    weights = sum(s.numel() for s in scores.values())
    assert float(sum(s.sum() for s in scores.values())) == pytest.approx(1, rel=1e-4)
    masks, real = [], lure.reinitialize_
    monkeypatch.setattr(lure, "reinitialize_", lambda *args: masks.append(args[1]) or real(*args))
    bench.redrawing(TINY, CPU)()
    assert [sum(int(m.sum()) for m in mask.values()) for mask in masks] == [round(0.8 * weights)]


def holding(mebibytes):
    return partial(torch.ones, mebibytes, 2**20, dtype=torch.uint8)


def test_the_peak_of_memory_is_that_of_the_call():
    holding(1000)()  # what this process once held is not counted
    assert bench.peak_memory(partial(holding, 300), CPU) == pytest.approx(300, rel=0.1)
