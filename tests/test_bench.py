"""The benchmark: that it times the real loops and computes what it prints. How fast they are is no test."""

import json
import statistics
from dataclasses import replace
from functools import partial

import pytest
import torch

import bench
import lure

CPU = torch.device("cpu")
SMALL = lure.Config(dataset="cifar10", arch="small", image_size=8, batch_size=16, device="cpu", lr=0.01)


def test_the_benchmark_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "peak_memory", lambda make, device: 1.0)  # it starts processes; see below
    argv = ["--device", "cpu", "--images", "40", "--image-size", "8", "--batch-size", "16", "--rounds", "2"]
    argv += ["--workers", "1", "--pi", "20", "--batch-sizes", "32", "--networks", "small"]
    assert bench.main([*argv, "--out", str(tmp_path)]) == 0
    path, shown = sorted(tmp_path.iterdir())
    result = json.loads(path.read_text())
    assert result["command"].startswith("python bench.py --device cpu --images 40")
    assert [row["batch_size"] for row in result["batch_sizes"]] == [32]
    resnet18, small = result["loops"]
    assert (resnet18["arch"], small["arch"]) == ("resnet18", "small")
    # 33.8 PFLOP for 10.1 million passes at 32×32, and a sixteenth of that per pass at 8×8
    assert resnet18["gflop_per_image"] == pytest.approx(33.8e6 / 10.1e6 / 16, rel=0.03)
    for case in result["loops"]:
        pairs = zip(case["plain"]["seconds"], case["ours"]["seconds"], strict=True)
        ratios = [plain / ours for plain, ours in pairs]
        assert len(ratios) == 2 and [case["ratio_low"], case["ratio_high"]] == [min(ratios), max(ratios)]
        rates = (case[name]["images_per_second"] for name in ("ours", "plain"))
        assert case["ratio"] == pytest.approx(next(rates) / next(rates))
        for name in ("ours", "plain"):
            rate = case["images"] / statistics.median(case[name]["seconds"])
            assert case[name]["images_per_second"] == pytest.approx(rate)
            assert case[name]["tflops"] == pytest.approx(rate * case["gflop_per_image"] / 1000)
    assert resnet18["ours"]["ms_per_step"] == pytest.approx(
        1000 * statistics.median(resnet18["ours"]["seconds"]) / 3  # 40 images are three steps
    )
    assert capsys.readouterr().out == bench.markdown(result) + "\n" == shown.read_text() + "\n"


def test_a_wrong_call_is_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(["--rounds", "0"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_both_loops_train_the_same_network_on_the_same_images():
    plain = bench.plain(SMALL, 40, CPU, 0)
    ours = bench.ours(SMALL, 40, CPU)
    plain_model, _, loader, _ = plain.args
    our_model, _, pixels, labels, train, *_ = ours.args
    for p, q in zip(plain_model.parameters(), our_model.parameters(), strict=True):
        assert torch.equal(p, q)
    loader.dataset.transform.transforms = loader.dataset.transform.transforms[-1:]  # as they are, in order
    shown = [loader.dataset[i] for i in range(40)]
    assert torch.equal(torch.stack([image for image, _ in shown]), lure.to_input(pixels))
    assert [label for _, label in shown] == labels.tolist() and train.tolist() == list(range(40))
    before = [p.clone() for p in plain_model.parameters()]
    first, second = plain(), plain()
    assert second < first  # it learns
    assert not any(torch.equal(p, q) for p, q in zip(before, plain_model.parameters(), strict=True))


def test_what_is_timed_is_what_a_run_runs(monkeypatch):
    """The network's and the data's layout and the optimizer's settings are those of `lure.run`."""
    ran, real = [], lure.train_epoch_
    monkeypatch.setattr(lure, "train_epoch_", lambda *args: ran.append(args) or real(*args))
    config = replace(SMALL, dataset="digits", limit=60, limit_test=20, mega_batches=1, epochs=1)
    lure.run(config)
    ((model, optimizer, pixels, labels, train, *_),) = ran
    timed = bench.ours(config, 60, CPU).args
    assert timed[1].defaults == optimizer.defaults
    for p, q in zip(timed[0].parameters(), model.parameters(), strict=True):
        assert p.stride() == q.stride() and p.dtype == q.dtype
    assert [x.stride() for x in timed[2:5]] == [x.stride() for x in (pixels, labels, train)]
    assert [x.dtype for x in timed[2:5]] == [x.dtype for x in (pixels, labels, train)]


def test_unlearning_is_the_real_one():
    scores = bench.sensitivity(SMALL, 20, CPU)()
    weights = sum(s.numel() for s in scores.values())
    assert float(sum(s.sum() for s in scores.values())) == pytest.approx(1, rel=1e-4)
    assert bench.redrawing(SMALL, CPU)() == weights - round(0.8 * weights)


def holding(mebibytes):
    return partial(torch.ones, mebibytes, 2**20, dtype=torch.uint8)


def test_the_peak_of_memory_is_that_of_the_call():
    holding(1000)()  # what this process once held is not counted
    assert bench.peak_memory(partial(holding, 300), CPU) == pytest.approx(300, rel=0.1)
