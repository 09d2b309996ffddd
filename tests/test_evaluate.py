import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import baselines
import evaluate
import lure

SMALL = ["--dataset", "digits", "--arch", "small", "--limit", "120", "--limit-test", "60"]
SMALL += ["--mega-batches", "2", "--epochs", "1"]


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def pictures(n=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**30))
def test_reliability_bins_are_those_of_the_calibration_error(n, classes, bins, seed):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(n, classes, generator=generator).mul(3).softmax(1)
    labels = torch.randint(classes, (n,), generator=generator)
    found = evaluate.reliability_bins(probabilities, labels, bins)
    assert found["count"].sum() == n and all(values.shape == (bins,) for values in found.values())
    confidence, prediction = probabilities.double().max(1)
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        assert found["count"][b] == inside.sum()
        if inside.any():
            assert found["accuracy"][b].item() == pytest.approx(
                (prediction == labels)[inside].double().mean().item()
            )
            assert found["confidence"][b].item() == pytest.approx(confidence[inside].mean().item())
        else:
            assert found["accuracy"][b] == found["confidence"][b] == 0
    error = (found["count"] * (found["accuracy"] - found["confidence"]).abs()).sum() / n
    assert error.item() == pytest.approx(
        lure.expected_calibration_error(probabilities, labels, bins), abs=1e-9
    )


@given(
    epsilon=st.floats(0, 0.5),
    steps=st.integers(1, 4),
    step_size=st.none() | st.floats(0, 1),
    start=st.none() | st.integers(0, 99),
    training=st.booleans(),
)
def test_attack_stays_in_ball_and_box_and_leaves_the_model(epsilon, steps, step_size, start, training):
    model, (images, labels) = network().train(training), pictures()
    model[2].train(not training)
    flags, before = (
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    original = images.clone()
    generator = None if start is None else torch.Generator().manual_seed(start)
    attacked = evaluate.pgd_attack(model, images, labels, epsilon, steps, step_size, generator)
    assert not attacked.requires_grad and attacked.shape == images.shape and torch.equal(images, original)
    assert (attacked - images).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert [m.training for m in model.modules()] == flags and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    if epsilon == 0:
        assert torch.equal(attacked, images)


def test_attack_follows_the_formula_of_one_step_and_its_default_size():
    model, (images, labels) = network().eval(), pictures()
    x = images.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), labels).backward()
    model.zero_grad()
    expected = (images + 0.01 * x.grad.sign()).clamp(0, 1)
    assert torch.allclose(evaluate.pgd_attack(model, images, labels, 0.05, 1, 0.01), expected, atol=1e-7)
    default = evaluate.pgd_attack(model, images, labels, 0.05, 10)
    assert torch.equal(default, evaluate.pgd_attack(model, images, labels, 0.05, 10, 2.5 * 0.05 / 10))


def test_attack_starts_uniformly_in_the_ball_with_a_generator():
    model, images = network(), torch.full((40, 3, 8, 8), 0.5)
    labels = torch.zeros(40, dtype=torch.int64)
    draw = lambda seed: evaluate.pgd_attack(  # noqa: E731
        model, images, labels, 0.1, 1, 0.0, torch.Generator().manual_seed(seed)
    )
    noise = (draw(1) - images) / 0.1
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert abs(noise.mean()) < 0.02 and noise.var().item() == pytest.approx(1 / 3, rel=0.05)


@given(st.integers(0, 50))
def test_attack_on_the_models_own_predictions_never_raises_its_accuracy(seed):
    model, (images, _) = network(seed).eval(), pictures(seed=seed)
    own = evaluate.predict(model, images).argmax(1)
    accuracies = [
        evaluate.accuracy(model, evaluate.pgd_attack(model, images, own, e), own) for e in (0, 0.02, 0.3)
    ]
    assert accuracies[0] == 100 and accuracies[2] < 100 and accuracies[1] <= 100


@pytest.mark.parametrize("epsilon, steps", [(-0.1, 10), (float("nan"), 10), (0.1, 0)])
def test_attack_refuses_what_cannot_be(epsilon, steps):
    with pytest.raises(ValueError, match="epsilon"):
        evaluate.pgd_attack(network(), *pictures(), epsilon, steps)


def corrupted(folder, n=6, size=8):
    """A CIFAR-10-C of n images per severity, in which severity s is the gray value 10 · s."""
    folder.mkdir(exist_ok=True)
    severity = np.repeat(np.arange(1, 6, dtype=np.uint8), n)
    for name in evaluate.CORRUPTIONS:
        np.save(
            folder / f"{name}.npy",
            np.full((5 * n, size, size, 3), 10, np.uint8) * severity[:, None, None, None],
        )
    np.save(folder / "labels.npy", np.tile(np.arange(n) % 5, 5).astype(np.uint8))
    return folder


class Gray(nn.Module):
    """Predicts class 0 up to a gray value of 25, class 1 above it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        bright = (x.mean(dim=(1, 2, 3)) > 25 / 255).long()
        return nn.functional.one_hot(bright, 5).float() + 0 * self.weight


@pytest.mark.parametrize("n", [1, 6, 10])
def test_corruption_accuracy_by_severity_for_any_size(tmp_path, n):
    found = evaluate.corruption_accuracy(Gray(), corrupted(tmp_path / "c", n))
    labels = torch.arange(n) % 5
    dark, bright = (100 * (labels == c).double().mean().item() for c in (0, 1))
    expected = [dark, dark, bright, bright, bright]
    assert found.pop("mean") == pytest.approx(sum(expected) / 5)
    assert list(found) == evaluate.CORRUPTIONS and len(found) == 19
    assert all(severities == pytest.approx(expected) for severities in found.values())


def test_corruption_folder_that_is_not_one_names_the_file(tmp_path):
    folder = corrupted(tmp_path / "c")
    for spoil, message in (
        (lambda: (folder / "fog.npy").unlink(), "fog.npy: expected an array"),
        (lambda: (folder / "fog.npy").write_text("no array"), "fog.npy: expected an array"),
        (lambda: (folder / "fog.npy").write_bytes(b""), "fog.npy: expected an array"),
        (lambda: np.save(folder / "fog.npy", np.zeros((30, 8, 8, 3))), "fog.npy: expected uint8"),
        (lambda: np.save(folder / "fog.npy", np.zeros((29, 8, 8, 3), np.uint8)), "fog.npy: expected uint8"),
        (lambda: np.save(folder / "fog.npy", np.zeros((30, 8, 8), np.uint8)), "fog.npy: expected uint8"),
    ):
        spoil()
        with pytest.raises(lure.DataError, match=message):
            evaluate.corruption_accuracy(Gray(), folder)
    for name in evaluate.CORRUPTIONS:
        np.save(folder / f"{name}.npy", np.zeros((7, 8, 8, 3), np.uint8))
    np.save(folder / "labels.npy", np.zeros(7, np.uint8))
    with pytest.raises(lure.DataError, match="five severities"):
        evaluate.corruption_accuracy(Gray(), folder)


def test_weight_noise_is_gaussian_and_the_model_is_put_back():
    model, (images, labels) = network().train(), pictures()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    hook = model[0].register_forward_pre_hook(
        lambda *_: seen.append(
            torch.cat([(p - before[n]).flatten() for n, p in model.named_parameters()]).clone()
        )
    )
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    clean, noisy = evaluate.weight_noise_accuracy(model, images, labels, [0, 0.5], 4, draw())
    hook.remove()
    assert all(module.training for module in model.modules())
    assert clean == pytest.approx(evaluate.accuracy(model, images, labels)) and 0 <= noisy <= 100
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(seen) == 8 and not any(s.any() for s in seen[:4]) and not torch.equal(seen[4], seen[5])
    noise = torch.cat(seen[4:])
    assert abs(noise.mean()) < 0.03 and noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert evaluate.weight_noise_accuracy(model, images, labels, [0, 0.5], 4, draw()) == [clean, noisy]


def test_weight_noise_puts_the_model_back_when_it_fails():
    model, (images, labels) = network(), pictures()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        evaluate.weight_noise_accuracy(model, images[:, :2], labels, [0.1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods of two seeds, and a variant, with their checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    gamma = ("warm-start-gamma1", "warm-start", ["--gamma", "1"])
    for name, method, more in (("lure", "lure", []), ("warm-start", "warm-start", []), gamma):
        for seed in ("1", "2"):
            files = ["--out", f"{folder}/{name}-{seed}.json", "--checkpoint", f"{folder}/{name}-{seed}.pt"]
            assert baselines.main([*SMALL, "--method", method, "--seed", seed, *more, *files]) == 0
    return folder


def copy(folder, tmp_path, name="digits"):
    (tmp_path / name).mkdir()
    for path in folder.glob("*.json"):
        if ".metrics." not in path.name:
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path / name


def test_report_of_a_folder(folder, tmp_path, capsys):
    runs = copy(folder, tmp_path)
    assert evaluate.main(["report", str(runs)]) == 0
    text = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")
    ]
    assert [row[0] for row in rows[2:]] == ["Warm start", "Warm start, gamma 1.0", "LURE"]
    totals = {p.stem: json.loads(p.read_text())["totals"] for p in runs.glob("*.json")}
    a, b = totals["lure-1"]["test_accuracy"], totals["lure-2"]["test_accuracy"]
    assert rows[4][1:4:1] == ["2", f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}", rows[4][3]]
    assert rows[4][3].startswith(f"{(totals['lure-1']['cer'] + totals['lure-2']['cer']) / 2:.0f} ± ")
    differences = [
        totals[f"lure-{s}"]["test_accuracy"] - totals[f"warm-start-{s}"]["test_accuracy"] for s in (1, 2)
    ]
    assert rows[4][6].startswith(f"{sum(differences) / 2:+.2f} ± ")
    assert f"{(runs / 'table.md').read_text()}\n{runs}: table.md, anytime.png\n" == text
    assert (runs / "anytime.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs / "reliability.png").exists()


def test_report_stands_beside_the_paper(folder, tmp_path):
    runs = copy(folder, tmp_path, "cifar10-like")
    assert "paper" not in evaluate.report(runs)  # a stream of two mega-batches is not in the paper
    for path in runs.glob("*.json"):
        change(path, mega_batches=8)
    text = evaluate.report(runs)
    row = next(line for line in text.splitlines() if line.startswith("| LURE"))
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    mean = float(cells[2].split()[0])
    assert cells[3] == "93.32" and float(cells[4]) == pytest.approx(mean - 93.32, abs=0.011)
    assert cells[6:8] == ["9622", "–"]  # a count over another number of test images


def change(path, **options):
    record = json.loads(path.read_text())
    record["config"] |= options
    path.write_text(json.dumps(record))


def test_report_refuses_what_cannot_be_compared(folder, tmp_path, capsys):
    def refused(name, *words):
        assert evaluate.main(["report", str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert not (tmp_path / name / "table.md").exists()

    change(copy(folder, tmp_path, "a") / "lure-2.json", epochs=7)
    refused("a", "lure-2.json", "epochs is 7, 1 in")
    for seed in (1, 2):
        path = copy(folder, tmp_path, f"b{seed}") / f"lure-{seed}.json"
        change(path, lr=0.5)
        refused(f"b{seed}", "lr is", "0.5")
    change(copy(folder, tmp_path, "c") / "warm-start-gamma1-2.json", gamma=0.5)
    refused("c", "warm-start-gamma1-2.json", "gamma is 0.5, 1.0 in")
    path = copy(folder, tmp_path, "d") / "warm-start-gamma1-1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": record["data"] | {"sha256": "0"}}))
    refused("d", "data is")
    path = copy(folder, tmp_path, "h") / "lure-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "float16"}))
    refused("h", "lure-2.json", "precision is float16")
    (copy(folder, tmp_path, "e") / "lure-3.json").write_text("{")
    refused("e", "lure-3.json: expected the record of a run")
    path = copy(folder, tmp_path, "f") / "lure-1.json"
    path.rename(path.with_name("sp-1.json"))
    refused("f", "sp-1.json", "lure")
    (tmp_path / "g").mkdir()
    refused("g", "found none")


def test_metrics_of_a_checkpoint(folder, tmp_path, capsys):
    record = json.loads((folder / "lure-1.json").read_text())
    options = ["--epsilons", "0", "8", "--sigmas", "0", "0.02"]
    assert evaluate.main(["metrics", str(folder / "lure-1.pt"), *options]) == 0
    found = json.loads((folder / "lure-1.metrics.json").read_text())
    assert found["accuracy"] == pytest.approx(record["totals"]["test_accuracy"])
    assert found["ece"] == pytest.approx(record["totals"]["ece"], abs=1e-6)
    assert (
        found["pgd"]["0/255"] == pytest.approx(found["accuracy"])
        and found["pgd"]["8/255"] <= found["accuracy"]
    )
    assert found["command"].startswith("python evaluate.py metrics") and found["command"].endswith("0 0.02")
    assert found["data"]["test"] == 60 and found["versions"]["torch"] == torch.__version__
    assert sum(found["reliability"]["count"]) == 60 and "corruptions" not in found
    everything = lure.load_dataset("digits", limit=120, limit_test=60)
    model, config = evaluate.load_checkpoint(folder / "lure-1.pt", torch.device("cpu"))
    clean = evaluate.accuracy(model, everything.images.float() / 255, everything.labels)
    assert found["weight_noise"]["0.0"] == pytest.approx(clean)
    assert config | {"set": []} == record["config"] | {"classes": list("0123456789")}
    assert "accuracy" in capsys.readouterr().out


def test_report_draws_what_metrics_measured(folder, tmp_path):
    runs = copy(folder, tmp_path)
    bins = {"count": [3.0, 5.0], "accuracy": [0.3, 0.8], "confidence": [0.4, 0.9]}
    corruptions = {name: [50.0] * 5 for name in evaluate.CORRUPTIONS} | {"mean": 50.0}
    for name in ("lure-1", "warm-start-2"):
        measured = {"reliability": bins, "ece": 0.1, "corruptions": corruptions}
        (runs / f"{name}.metrics.json").write_text(json.dumps(measured))
    evaluate.report(runs)
    assert {p.name for p in runs.glob("*.png")} == {"anytime.png", "reliability.png", "corruptions.png"}


def test_metrics_refuse_data_of_other_classes(tmp_path, capsys):
    weights = lure.build_model("small", 3, 1, (0.0,), (1.0,)).state_dict()
    torch.save(
        {
            "config": asdict(lure.Config(dataset="digits", arch="small")),
            "classes": ["a", "b", "c"],
            "weights": weights,
        },
        tmp_path / "x.pt",
    )
    assert evaluate.main(["metrics", str(tmp_path / "x.pt")]) == 1
    assert "x.pt: was trained on other classes" in capsys.readouterr().err


def test_a_methods_own_settings_are_in_its_name(tmp_path):
    out = tmp_path / "digits"
    for name, more in (("warm-start", []), ("sp-noisy", ["--set", "noise=0.1"])):
        options = ["--method", name.removesuffix("-noisy"), *more, "--out", f"{out}/{name}-1.json"]
        assert baselines.main([*SMALL, *options]) == 0
    assert "| S&P, noise 0.1 |" in evaluate.report(out)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.pt"
    if content is None:
        torch.save({"config": print}, path)  # a pickle that refers to code
    else:
        path.write_bytes(content)
    assert evaluate.main(["metrics", str(path)]) == 1
    error = capsys.readouterr().err
    assert "x.pt: expected a checkpoint" in error and error.count("\n") == 1
    assert evaluate.main(["metrics", str(tmp_path / "none.pt")]) == 1
