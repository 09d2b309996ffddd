import json
import re
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torchattacks
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
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


def test_a_reliability_bin_is_closed_on_the_right_in_double_precision():
    edges = torch.linspace(0, 1, 16, dtype=torch.float64)[2:-1]
    for confidence, shift in ((edges, 1), (torch.nextafter(edges, torch.ones(())), 2)):
        probabilities = torch.cat(
            [confidence[:, None], (1 - confidence)[:, None] / torch.full((13, 20), 20.0)], 1
        )
        count = evaluate.reliability_bins(probabilities, torch.zeros(13, dtype=torch.int64))["count"]
        assert count.tolist() == [float(shift <= b < shift + 13) for b in range(15)]


def test_attack_follows_the_formula_of_one_step_and_its_default_size():
    model, (images, labels) = network().eval(), pictures()
    x = images.clone().requires_grad_()
    nn.functional.cross_entropy(model(x), labels).backward()
    model.zero_grad()
    expected = (images + 0.01 * x.grad.sign()).clamp(0, 1)
    assert torch.allclose(evaluate.pgd_attack(model, images, labels, 0.05, 1, 0.01), expected, atol=1e-7)
    default = evaluate.pgd_attack(model, images, labels, 0.05, 10)
    assert torch.equal(default, evaluate.pgd_attack(model, images, labels, 0.05, 10, 2.5 * 0.05 / 10))
    assert torch.equal(default, evaluate.pgd_attack(model, images, labels, 0.05))


@given(st.sampled_from([1, 4, 16]), st.integers(1, 10), st.floats(0.1, 1), st.integers(0, 99))
def test_attack_finds_the_images_that_torchattacks_finds(epsilon, steps, share, seed):
    model, (images, labels) = network(seed).eval(), pictures(seed=seed)
    radius, step = epsilon / 255, share * epsilon / 255
    theirs = torchattacks.PGD(model, eps=radius, alpha=step, steps=steps, random_start=False)(images, labels)
    ours = evaluate.pgd_attack(model, images, labels, radius, steps, step)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert (ours - images).abs().max() > 0.9 * step


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


def test_predictions_are_made_for_128_images_at_a_time():
    model, sizes = network(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert evaluate.predict(model, pictures(129)[0]).shape == (129, 5) and sizes == [128, 1]


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
        (
            lambda: np.save(folder / "fog.npy", np.zeros((30, 8, 8), np.uint8)),
            r"fog.npy: expected uint8.*found torch.uint8 \(30, 8, 8\) and \(30,\) in labels.npy",
        ),
    ):
        spoil()
        with pytest.raises(lure.DataError, match=message):
            evaluate.corruption_accuracy(Gray(), folder)
    for n in (0, 7):
        for name in evaluate.CORRUPTIONS:
            np.save(folder / f"{name}.npy", np.zeros((n, 8, 8, 3), np.uint8))
        np.save(folder / "labels.npy", np.zeros(n, np.uint8))
        with pytest.raises(lure.DataError, match=f"five severities, found {n} images"):
            evaluate.corruption_accuracy(Gray(), folder)


def test_an_array_of_corruptions_is_read_and_never_written(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, np.uint8))
    evaluate.load_array(tmp_path / "a.npy")[0] = 1
    assert not np.load(tmp_path / "a.npy").any()


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
    generator, sizes = draw(), [p.shape for p in model.parameters()]
    drawn = [torch.cat([torch.randn(s, generator=generator).flatten() for s in sizes]) for _ in range(8)]
    torch.testing.assert_close(noise, 0.5 * torch.cat(drawn[4:]), rtol=0, atol=1e-6)
    assert evaluate.weight_noise_accuracy(model, images, labels, [0, 0.5], 4, draw()) == [clean, noisy]


def test_weight_noise_is_by_default_the_mean_of_three_draws():
    model, (images, labels) = network().eval(), pictures()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    evaluate.weight_noise_accuracy(model, images, labels, [0.1])
    assert len(calls) == 3


def test_weight_noise_puts_the_model_back_when_it_fails():
    model, (images, labels) = network(), pictures()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        evaluate.weight_noise_accuracy(model, images[:, :2], labels, [0.1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two methods of two seeds, one of them with another option too, with their checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    for row in ("lure", "warm-start", "warm-start+gamma=1"):
        method, *more = row.replace("+", " --").replace("=", " ").split()
        for seed in ("1", "2"):
            files = ["--out", f"{folder}/{row}-{seed}.json", "--checkpoint", f"{folder}/{row}-{seed}.pt"]
            assert baselines.main([*SMALL, "--method", method, "--seed", seed, *more, *files]) == 0
    return folder


def copy(folder, tmp_path, name="digits"):
    (tmp_path / name).mkdir(parents=True)
    for path in folder.glob("*-?.json"):
        (tmp_path / name / path.name).write_bytes(path.read_bytes())
    return tmp_path / name


def change(path, name=None, totals=None, **options):
    """Change a record's options and totals; under another name, beside it."""
    record = json.loads(path.read_text())
    record["config"] |= options
    record["totals"] |= totals or {}
    (path.with_name(name) if name else path).write_text(json.dumps(record))


def rows_of(text):
    """The cells of a report's table; its claims are left out."""
    lines = [line for line in text.split(evaluate.CLAIMS)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_report_of_runs(folder, tmp_path, capsys):
    runs, out = copy(folder, tmp_path), tmp_path / "demo.md"
    names = [f"{row}-{seed}.json" for seed in "12" for row in ("warm-start", "warm-start+gamma=1", "lure")]
    assert evaluate.main(["report", "--out", str(out), *(str(runs / name) for name in names)]) == 0
    text = capsys.readouterr().out
    head, _, *rows = rows_of(text)
    assert head[:4] == ["Method", "gamma", "Seeds", "Test accuracy, %"] and "paper" not in head
    assert [row[:3] for row in rows] == [
        ["Warm start", "0.1", "2 †"],
        ["Warm start", "1", "2 †"],
        ["LURE", "0.1", "2 †"],
    ]
    totals = {p.stem: json.loads(p.read_text())["totals"] for p in runs.glob("*.json")}
    a, b = totals["lure-1"]["test_accuracy"], totals["lure-2"]["test_accuracy"]
    assert rows[2][3] == f"{(a + b) / 2:.2f} ± {abs(a - b) / 2**0.5:.2f}"
    c, d = totals["warm-start-1"]["test_accuracy"], totals["warm-start-2"]["test_accuracy"]
    mean, half = ((a - c) + (b - d)) / 2, 12.7062 * abs((a - c) - (b - d)) / 2  # t of one degree of freedom
    shown = [float(x) for x in rows[2][4].replace("[", "").replace("]", "").replace(",", "").split()]
    assert shown == pytest.approx([mean, mean - half, mean + half], abs=0.01)
    assert [row[4] == "–" for row in rows] == [True, False, False]  # warm start itself has no difference
    assert rows[2][5].startswith(f"{(totals['lure-1']['cer'] + totals['lure-2']['cer']) / 2:.0f} ± ")
    assert f"{out.read_text()}\n{out}\n" == text
    assert (tmp_path / "demo-digits.png").read_bytes().startswith(b"\x89PNG")


def test_report_of_a_folder_takes_all_its_runs(folder, tmp_path):
    runs = copy(folder, tmp_path)
    assert len(rows_of(evaluate.report(tmp_path / "table.md", [runs]))) == 2 + 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits", "table.md"]  # no figure goes with it


def test_report_stands_beside_the_paper(folder, tmp_path):
    runs = copy(folder, tmp_path, "small/cifar10-like")
    files, out = sorted(runs.glob("*.json")), tmp_path / "small" / "table1.md"
    printed = [row[0] for row in rows_of(evaluate.report(out, [runs])) if row[2] == "–"]
    assert printed == ["Warm start", "LLF", "S&P", "LURE"]  # ours, of two mega-batches, are not in the paper
    for path in files:
        change(path, mega_batches=8)
    head, _, *rows = rows_of(
        evaluate.report(out, [runs])
    )  # in the order of the names, so gamma=1 comes first
    where = [i for i, title in enumerate(head) if title == "paper"]
    by_name = {(row[0], row[1]): [row[i] for i in where] for row in rows}
    # CER is a count, of other test images here; where nothing of ours stands beside it, it is shown
    assert by_name["LURE", "0.1"] == ["93.32", "–", "6.60"]
    assert by_name["Warm start", "0.1"] == ["89.47", "–", "8.98"]
    assert by_name["Warm start", "1"] == ["–", "–", "–"]  # a number of the paper's stands there once
    assert by_name["LLF", "–"] == ["91.43", "10103", "7.22"]
    assert "| small, cifar10-like |" in out.read_text() and "| not decided |" in out.read_text()
    for path in files:
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"data": record["data"] | {"test": 10_000}}))
    assert "| 9622 |" in evaluate.report(out, [runs])


@pytest.mark.parametrize(
    "name, rows",
    [
        ("figure6", ["warm-start", "warm-start+lr=0.5", "lure", "lure+lr=0.5+weight-decay=0.01"]),
        ("cost", ["warm-start", "warm-start+epochs=5", "lure", "lure+epochs=5"]),
        ("where-from", ["warm-start+select=best-val", "lure+keep-momentum"]),
    ],
)
def test_reports_whose_rows_differ_by_options(folder, tmp_path, name, rows):
    runs = copy(folder, tmp_path)
    for row in rows:
        method, *pairs = row.split("+")
        options = {k.replace("-", "_"): v for k, _, v in (pair.partition("=") for pair in pairs)}
        options = {k: True if v == "" else v if k == "select" else float(v) for k, v in options.items()}
        for seed in (1, 2):
            change(runs / f"{method}-{seed}.json", f"{row}-{seed}.json", **options)
    files = [runs / f"{row}-{seed}.json" for row in rows for seed in (1, 2)]
    found = rows_of(evaluate.report(tmp_path / f"{name}.md", files))[2:]
    assert len(found) == len(rows) and (tmp_path / f"{name}-digits.png").exists() == (
        name in evaluate.FIGURES
    )
    for cells, row in zip(found, rows, strict=True):
        method, *pairs = row.split("+")
        values = {pair.partition("=")[2] or "True" for pair in pairs}
        assert cells[0] == evaluate.NAMES[method] and values <= set(cells[1:4])


def test_figures_of_what_metrics_measured(folder, tmp_path, capsys):
    runs = copy(folder, tmp_path, "digits")
    files = [runs / f"{method}-{seed}.json" for method in ("warm-start", "lure") for seed in (1, 2)]
    names = ("figure2", "figure3", "figure4", "figure5")
    for name in names:
        assert evaluate.main(["report", "--out", f"{tmp_path}/{name}.md", *map(str, files)]) == 1
        error = capsys.readouterr().err
        assert (
            "warm-start-1.json: expected what evaluate.py metrics writes" in error and error.count("\n") == 1
        )
    for path in files:
        checkpoint = path.with_suffix(".pt")
        checkpoint.write_bytes((folder / checkpoint.name).read_bytes())
        assert evaluate.main(["metrics", str(checkpoint)]) == 0
        measured = json.loads(path.with_suffix(".metrics.json").read_text())
        shade = 30.0 + int(path.stem[-1])  # the colour that CIFAR-10-C has, digits have not
        corruptions = {name: [shade] * 5 for name in evaluate.CORRUPTIONS} | {"mean": shade}
        measured |= {"corruptions": corruptions, "images_per_severity": 7}
        path.with_suffix(".corruptions.json").write_text(json.dumps(measured))
    more, rows = [runs / "lure+label-noise=0.2+mega-batches=4-3.json"], {}  # the other half of figure 3
    change(runs / "lure-1.json", more[0].name, seed=3, label_noise=0.2, mega_batches=4)
    for name in names:
        text = evaluate.report(tmp_path / f"{name}.md", files + more * (name == "figure3"))
        rows[name] = rows_of(text)
        assert [row[0] for row in rows[name]][2:4] == ["Warm start", "LURE"]
        assert (tmp_path / f"{name}-digits.png").stat().st_size > 10_000
        assert "| The paper's claim |" in text
        assert "small, 2 mega-batches" in text and "label-noise" not in rows[name][0]  # what the shown have
    assert rows["figure2"][3][1:3] == ["2 †", "31.50 ± 0.71"] and "7 images of CIFAR-10-C" in evaluate.report(
        tmp_path / "figure2.md", files
    )
    of = [json.loads((runs / f"lure-{seed}.metrics.json").read_text()) for seed in (1, 2)]
    ece, attack, clean, noisy = (
        [100 * m["ece"] for m in of],
        [m["pgd"]["2/255"] for m in of],
        [m["weight_noise"]["0"] for m in of],
        [m["weight_noise"]["0.01"] for m in of],
    )
    assert rows["figure4"][3][2] == evaluate.spread(ece)
    head, cells = rows["figure3"][0], rows["figure3"][3]
    assert cells[head.index("At ε = 2/255, %")] == evaluate.spread(attack)
    head, cells = rows["figure5"][0], rows["figure5"][3]
    drop = [a - b for a, b in zip(clean, noisy, strict=True)]
    assert cells[head.index("Without noise, %")] == evaluate.spread(clean)
    assert cells[head.index("Drop at σ = 0.01, points")] == evaluate.spread(drop)
    published = [{"dataset": "cifar10", "method": "lure", "label_noise": 0.2, "test_acc": 86.79}]
    shown, others = evaluate.load_rows(files), evaluate.load_rows(more)
    for draw, printed in (
        (evaluate.corruption_bars, [published[0] | {"label_noise": 0, "mca": 74}] * 2),
        (evaluate.attack_and_noise, published),
    ):
        draw(figure := Figure(), shown, printed, others)
        legends = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
        assert any("printed in the paper" in text for text in legends), legends


def test_the_measurements_of_another_run_are_refused(folder, tmp_path):
    runs = copy(folder, tmp_path)
    for seed in (1, 2):
        (runs / f"lure-{seed}.pt").write_bytes((folder / f"lure-{seed}.pt").read_bytes())
    assert evaluate.main(["metrics", str(runs / "lure-2.pt"), "--epsilons", "1", "--sigmas", "0"]) == 0
    (runs / "lure-2.metrics.json").rename(runs / "lure-1.metrics.json")
    with pytest.raises(lure.DataError, match=r"lure-1.metrics.json: .*it is of another run"):
        evaluate.report(tmp_path / "table.md", [runs])


def test_report_refuses_what_cannot_be_compared(folder, tmp_path, capsys):
    def refused(name, *words):
        out = tmp_path / name / "table.md"
        assert evaluate.main(["report", "--out", str(out), str(tmp_path / name)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert not out.exists()

    change(copy(folder, tmp_path, "a") / "lure-2.json", epochs=7)
    refused("a", "cannot be compared: epochs is", "7")
    change(copy(folder, tmp_path, "c") / "warm-start+gamma=1-2.json", gamma=0.5)
    refused("c", "warm-start+gamma=1-2.json", "it is of gamma 0.5")
    path = copy(folder, tmp_path, "d") / "warm-start+gamma=1-1.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"data": record["data"] | {"sha256": "0"}}))
    refused("d", "data is")
    path = copy(folder, tmp_path, "h") / "lure-2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"precision": "float16"}))
    refused("h", "precision is", "float16")
    (copy(folder, tmp_path, "e") / "lure-3.json").write_text("{")
    refused("e", "lure-3.json: expected the record of the run")
    path = copy(folder, tmp_path, "f") / "lure-1.json"
    path.rename(path.with_name("sp-1.json"))
    refused("f", "sp-1.json", "it is of method lure")
    path = copy(folder, tmp_path, "i") / "lure-1.json"
    path.rename(path.with_name("lure-7.json"))
    refused("i", "lure-7.json", "it is of seed 1")
    (copy(folder, tmp_path, "k") / "lure-1.metrics.json").write_text("{")
    refused("k", "lure-1.metrics.json: expected")
    runs = copy(folder, tmp_path, "l")
    (runs / "lure+keep=0.8-1.json").write_bytes((runs / "lure-1.json").read_bytes())
    refused("l", "expected one run of each kind", "lure-1.json")
    (tmp_path / "g").mkdir()
    refused("g", "expected records of runs")


def row(method, accuracies, **options):
    """A row of a table with these accuracies, of seeds 1, 2, 3 and so on."""
    records = [
        {"config": {"method": method, "seed": i, **options}, "totals": {"test_accuracy": a, "cer": 10 * a}}
        for i, a in enumerate(accuracies, start=1)
    ]
    return evaluate.Row(method, options, options, records)


ACCURACY = {"metrics": [["totals", "test_accuracy"]], "higher": True}
LURE, WARM = {"method": "lure"}, {"method": "warm-start"}


@pytest.mark.parametrize(
    "lure_, higher, word",
    [
        ([51, 52.1, 53.2], True, "held"),
        ([51, 52.1, 53.2], False, "not held"),
        ([49, 50.1, 51.2], True, "not held"),
        ([51, 52, 50], True, "not decided"),
        ([51, 52.1], True, "not decided"),  # of two seeds only
        ([51], True, "not decided"),
    ],
)
def test_a_claim_is_decided_by_its_interval_alone(lure_, higher, word):
    rows = [row("warm-start", [50, 51, 52]), row("lure", lure_)]
    claim = ACCURACY | {"better": LURE, "than": WARM, "higher": higher}
    assert evaluate.verdict(claim, rows)[1] == word


def test_a_claim_of_several_rows_compares_what_belongs_together():
    rows = [row("warm-start", [50, 50, 50], t=10), row("lure", [52, 52, 52.1], t=10)]
    rows += [row("warm-start", [60, 60, 60], t=20), row("lure", [61, 61, 61.1], t=20)]
    claim = ACCURACY | {"better": LURE, "than": WARM}
    text, word = evaluate.verdict(claim, rows)
    assert word == "held" and text == "t 10: +2.03 [+1.89, +2.18]<br>t 20: +1.03 [+0.89, +1.18]"
    rows[-1] = row("lure", [60, 61, 59], t=20)
    assert evaluate.verdict(claim, rows)[1] == "not decided"
    rows[-1] = row("lure", [55, 55.1, 55], t=20)
    assert evaluate.verdict(claim, rows)[1] == "not held"
    only = claim | {"better": LURE | {"t": [10]}, "than": WARM | {"t": [10]}}
    assert evaluate.verdict(only, rows)[0] == "+2.03 [+1.89, +2.18]"
    best = ACCURACY | {"better": LURE | {"t": 10}, "than": LURE | {"t": [20]}}  # as that of Table 7
    assert evaluate.verdict(best, rows)[0].startswith("-3.0")
    assert evaluate.verdict(claim | {"than": {"method": "sp"}}, rows) is None
    several = [row("warm-start", [50, 50, 50]), row("lure", [52, 52, 52.1]), row("fisher", [49, 49, 49.1])]
    text, word = evaluate.verdict(
        ACCURACY | {"better": {"method": ["lure", "fisher"]}, "than": WARM}, several
    )
    assert word == "not held" and re.findall("([A-Za-z ]+):", text) == ["LURE", "LURE by Fisher"]


def test_what_does_not_differ_at_all_has_no_say_in_a_claim():
    claim = {
        "better": LURE,
        "than": WARM,
        "higher": True,
        "metrics": [["totals", "cer"], ["totals", "floor"]],
    }
    rows = [row("warm-start", [50, 50, 50]), row("lure", [52, 52, 52.1])]
    for r in rows:
        for record in r.records:
            record["totals"]["floor"] = 0
    assert evaluate.verdict(claim, rows)[1] == "held"
    assert evaluate.verdict(claim | {"metrics": [["totals", "floor"]]}, rows)[1] == "not decided"


def test_what_warm_start_a_row_is_compared_with():
    plain, noisy = row("warm-start", [50]), row("warm-start", [40], label_noise=0.2)
    rows = [plain, noisy, row("lure", [41], label_noise=0.2, keep=0.9), row("lure", [52], keep=0.9)]
    found = [evaluate.warm_start_of(r, rows) for r in rows]
    assert found[0] is None and found[1] is plain and found[2] is noisy and found[3] is plain
    assert evaluate.warm_start_of(row("lure", [41], gamma=1), rows) is None  # that of gamma 1 is not there


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_interval_is_students(values):
    low, high = evaluate.interval(values)
    n, mean = len(values), sum(values) / len(values)
    deviation = (sum((v - mean) ** 2 for v in values) / (n - 1)) ** 0.5
    quantile = [12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010][
        n - 2
    ]
    assert (low + high) / 2 == pytest.approx(mean, abs=1e-9)
    assert (high - low) / 2 == pytest.approx(quantile * deviation / n**0.5, rel=1e-4, abs=1e-9)


def test_overview_has_every_report_that_is_there(folder, tmp_path):
    runs = copy(folder, tmp_path / "small", "cifar10")
    for path in runs.glob("*.json"):
        change(path, mega_batches=8)
    for name in ("table8", "table1"):
        evaluate.report(tmp_path / "small" / f"{name}.md", [runs / "lure-1.json", runs / "warm-start-1.json"])
    assert evaluate.main(["overview", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert (
        text.index("The paper's claims")
        < text.index("## Table 1: full replay (small)")
        < text.index("## Table 8")
    )
    assert text.count("CIFAR-10: small, 8 mega-batches") == 2 and text.count(evaluate.CLAIMS) == 1
    assert "Full replay: LURE is more accurate" in text.split("## Table 1")[0]
    assert "](small/table1-cifar10.png)" in text


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
    _, stream = lure.draw_stream(lure.Config(limit=120, mega_batches=2), everything)
    trained = torch.cat([batch.new for batch in stream])
    clean = evaluate.accuracy(model, everything.images[trained] / 255, everything.labels[trained])
    assert found["weight_noise"]["0"] == pytest.approx(clean)
    assert config | {"set": []} == record["config"] | {"classes": list("0123456789")}
    assert "accuracy" in capsys.readouterr().out


def test_metrics_of_corruptions_stand_in_a_file_of_their_own(tmp_path):
    for split in ("train", "test"):
        for i in range(40):
            path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 6 * i, 250 - i)).save(path)
    photos = ["--dataset", "folder", "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    size = ["--arch", "small", "--image-size", "8", "--mega-batches", "1", "--epochs", "1"]
    assert lure.main([*photos, *size, "--checkpoint", str(tmp_path / "lure-1.pt")]) == 0
    words = ["--corruptions", str(corrupted(tmp_path / "c")), *photos[4:]]
    assert evaluate.main(["metrics", str(tmp_path / "lure-1.pt"), *words]) == 0
    assert not (tmp_path / "lure-1.metrics.json").exists()
    found = json.loads((tmp_path / "lure-1.corruptions.json").read_text())
    model, _ = evaluate.load_checkpoint(tmp_path / "lure-1.pt", torch.device("cpu"))
    assert found["corruptions"] == evaluate.corruption_accuracy(model, tmp_path / "c")
    assert found["config"]["data"] == str(tmp_path / "photos") and found["data"]["test"] == 40


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
    for name, more in (("warm-start", []), ("sp+set=noise=0.1", ["--set", "noise=0.1"])):
        options = ["--method", name.split("+")[0], *more, "--out", f"{out}/{name}-1.json"]
        assert baselines.main([*SMALL, *options]) == 0
    assert "| S&P | ['noise=0.1'] |" in evaluate.report(tmp_path / "table.md", [out])
    (out / "sp+set=noise=0.1-1.json").rename(out / "sp-1.json")
    with pytest.raises(lure.DataError, match="set is"):
        evaluate.report(tmp_path / "table.md", [out])


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


def test_redrawing_accuracy_is_that_of_the_methods_and_the_model_is_put_back():
    model, (images, labels) = network(1).eval(), pictures(60)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pi, test, shares = (images[:30], labels[:30]), (images[30:], labels[30:]), [0.1, 0.5, 0.9]
    found = evaluate.redrawing_accuracy(model, pi, *test, shares, torch.Generator().manual_seed(7))
    assert list(found) == ["lure", "fisher", "magnitude", "random"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    generator = torch.Generator().manual_seed(7)
    random = baselines.random_scores(model, generator)  # the first to be drawn
    for criterion, accuracies in found.items():
        for share, measured in zip(shares, accuracies, strict=True):
            if criterion == "random":
                mask = lure.top_k_mask(random, 1 - share)
                lure.reinitialize_(model, mask, generator)
            else:
                baselines.METHODS[criterion](model, pi, None, None, generator, keep=1 - share)
            assert measured == pytest.approx(evaluate.accuracy(model, *test))
            model.load_state_dict(before)


def test_weight_noise_is_measured_on_what_was_trained_on_and_pi_is_drawn_from_it(folder, monkeypatch):
    calls = {}
    for name in ("weight_noise_accuracy", "redrawing_accuracy"):
        real = getattr(evaluate, name)
        spy = lambda *args, real=real, name=name, **more: calls.update({name: args}) or real(*args, **more)  # noqa: E731
        monkeypatch.setattr(evaluate, name, spy)
    model, config = evaluate.load_checkpoint(folder / "lure-1.pt", torch.device("cpu"))
    data = lure.load_dataset("digits", limit=120, limit_test=60)
    config["label_noise"] = 0.5
    evaluate.clean_metrics(model, data, config, [1], [0])
    of_run = lure.Config(dataset="digits", limit=120, limit_test=60, mega_batches=2, label_noise=0.5)
    labels, stream = lure.draw_stream(of_run, data)
    trained = torch.cat([batch.new for batch in stream])
    assert len(trained) == 108 and not torch.equal(labels, data.labels)
    _, images, shown, _ = calls["weight_noise_accuracy"]
    assert torch.equal(images, data.images[trained].float() / 255) and torch.equal(shown, labels[trained])
    _, pi, test_images, *_ = calls["redrawing_accuracy"]
    assert torch.equal(test_images, data.test_images.float() / 255)
    assert sorted(pi[0].flatten(1).tolist()) == sorted(images.flatten(1).tolist())  # of fewer than 1125: all


def test_forgetting_is_reported_around_each_forgetting_and_by_tensor(folder, tmp_path, capsys):
    runs = copy(folder, tmp_path)
    out = tmp_path / "forgetting.md"
    for seed in (1, 2):
        name = f"lure-{seed}.pt"
        (runs / name).write_bytes((folder / name).read_bytes())
        assert evaluate.main(["metrics", str(runs / name), "--epsilons", "--sigmas"]) == 0
    text = evaluate.report(out, [runs / f"{m}-{s}.json" for m in ("warm-start", "lure") for s in (1, 2)])
    head, _, warm, ours, shares_head, _, *shares = rows_of(text)
    rows = [json.loads((runs / f"lure-{s}.json").read_text())["mega_batches"] for s in (1, 2)]
    shown = [
        [r[0]["test"]["accuracy"] for r in rows],
        [r[0]["forgotten"]["accuracy"] for r in rows],
        [r[1]["test"]["accuracy"] for r in rows],
    ]
    assert head[2:5] == ["Before, %", "Right after, %", "Relearned, %"]
    assert ours[2:5] == [evaluate.spread(values) for values in shown]
    assert warm[2] == warm[3]  # nothing was forgotten
    assert shares_head == ["Redrawn of, %", "LURE"]
    by_tensor = [[100 * r[0]["redrawn_by_tensor"]["layer4.1.conv1.weight"] for r in rows]]
    assert ["layer4.1.conv1", *(evaluate.spread(values, 1) for values in by_tensor)] in shares
    assert len(shares) == len(rows[0][0]["redrawn_by_tensor"])
    figure = Figure()
    evaluate.forgetting(figure, evaluate.load_rows([*runs.glob("*-?.json")]), [], [])
    assert len(figure.axes) == 3
    redrawn = json.loads((runs / "lure-1.metrics.json").read_text())["redrawing"]
    lines = [line for line in figure.axes[1].get_lines() if line.get_linestyle() != "None"]
    assert list(lines[0].get_xdata()) == [0, 5, 10, 20, 40, 60, 80] and len(lines) == 4
    both = [json.loads((runs / f"lure-{s}.metrics.json").read_text())["redrawing"] for s in (1, 2)]
    mean = sum(r["random"]["0.8"] for r in both) / 2
    assert lines[3].get_ydata()[-1] == pytest.approx(mean) and set(redrawn) == set(evaluate.CRITERIA)
    path = runs / "warm-start-1.json"  # an old record does not say what was forgotten
    record = json.loads(path.read_text())
    for row in record["mega_batches"]:
        del row["forgotten"], row["redrawn_by_tensor"]
    path.write_text(json.dumps(record))
    text = evaluate.report(out, [path, runs / "lure-1.json"])
    assert "Not measured: `warm-start-1`." in text
    with pytest.raises(lure.DataError, match=r"warm-start-1.json: expected a record that says what was forg"):
        evaluate.report(out, [path])


def test_an_incomplete_report_renders_what_is_there_and_names_what_is_not(folder, tmp_path, capsys):
    runs, out = copy(folder, tmp_path), tmp_path / "table3.md"
    files = [str(runs / f"{m}-{s}.json") for m in ("warm-start", "lure", "fire") for s in (1, 2)]
    (runs / "lure-2.json").unlink()
    assert evaluate.main(["report", "--out", str(out), *files]) == 1
    assert "lure-2.json" in capsys.readouterr().err and not out.exists()
    assert evaluate.main(["report", "--incomplete", "--out", str(out), *files]) == 0
    text = out.read_text()
    assert [row[:2] for row in rows_of(text)[2:4]] == [["Warm start", "2 †"], ["LURE", "1 †"]]
    assert "\nNot measured: `lure-2`, `fire-1`, `fire-2`.\n" in text
    assert (tmp_path / "table3-digits.png").exists()
    out.unlink()
    assert evaluate.main(["report", "--incomplete", "--out", str(out), files[-1]]) == 0
    figure4 = tmp_path / "figure4.md"  # the runs are there, what it shows of them is not
    assert evaluate.main(["report", "--incomplete", "--out", str(figure4), *files]) == 0
    told = capsys.readouterr().out
    assert "nothing has been measured yet for table3" in told and "for figure4" in told
    assert not out.exists() and not figure4.exists()
