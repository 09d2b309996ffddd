import json
import math
import re
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
import torchattacks
from conftest import same, seeded, small_config, small_data, state
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_lure import Adapter
from torch import nn

import baselines
import evaluate
import lure
from experiments import measure, runs
from experiments.data import load_dataset, resized, resized_as


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def pictures(n=24, seed=0):
    generator = seeded(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(5, (n,), generator=generator)


@given(st.integers(1, 60), st.integers(2, 6), st.integers(1, 20), st.integers(0, 2**30))
def test_reliability_bins_are_those_of_the_calibration_error(n, classes, bins, seed):
    generator = seeded(seed)
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
    flags, before = [m.training for m in model.modules()], state(model)
    original = images.clone()
    generator = None if start is None else seeded(start)
    attacked = evaluate.pgd_attack(model, images, labels, epsilon, steps, step_size, generator)
    assert not attacked.requires_grad and attacked.shape == images.shape and torch.equal(images, original)
    assert (attacked - images).abs().max() <= epsilon + 1e-6
    assert attacked.min() >= 0 and attacked.max() <= 1
    assert [m.training for m in model.modules()] == flags and all(p.grad is None for p in model.parameters())
    assert same(state(model), before)
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
    draw = lambda seed: evaluate.pgd_attack(model, images, labels, 0.1, 1, 0.0, seeded(seed))  # noqa: E731
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


def test_accuracy_is_of_one_prediction_for_each_label():
    images, labels = pictures()
    for model, y in ((network(), labels[:-1]), (nn.Conv2d(3, 5, 8), labels)):  # of (N, 5), (N, 5, 1, 1)
        shapes = f"{tuple(model(images).shape)} and {tuple(y.shape)}"
        told = f"expected logits (N, classes) and labels (N,), got {shapes}"
        with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
            evaluate.accuracy(model, images, y)


def test_predictions_are_made_for_128_images_at_a_time():
    model, sizes = network(), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert evaluate.predict(model, pictures(130)[0]).shape == (130, 5) and sizes == [128, 2]
    sizes.clear()
    assert evaluate.predict(model, pictures(129)[0]).shape == (129, 5) and sizes == [129]


def test_attack_takes_the_whole_range_of_images_and_radii():
    images, labels = pictures()
    attacked = evaluate.pgd_attack(network(), images.round(), labels, epsilon=1, steps=1, step_size=1)
    assert attacked.unique().tolist() == [0, 1]


@pytest.mark.parametrize("epsilon, steps", [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.1, 0)])
def test_attack_refuses_what_cannot_be(epsilon, steps):
    with pytest.raises(ValueError, match="epsilon"):
        evaluate.pgd_attack(network(), *pictures(), epsilon, steps)


def corrupted(folder, n=6, size=8, classes=5):
    """A CIFAR-10-C of n images per severity, in which severity s is the gray value 10 · s."""
    folder.mkdir(exist_ok=True)
    severity = np.repeat(np.arange(1, 6, dtype=np.uint8), n)
    for name in evaluate.CORRUPTIONS:
        np.save(
            folder / f"{name}.npy",
            np.full((5 * n, size, size, 3), 10, np.uint8) * severity[:, None, None, None],
        )
    np.save(folder / "labels.npy", np.tile(np.arange(n) % classes, 5).astype(np.uint8))
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
            r"fog.npy: expected uint8 \(30, H, W, 3\).*found torch.uint8 \(30, 8, 8\)",
        ),
    ):
        spoil()
        with pytest.raises(ValueError, match=message):
            evaluate.corruption_accuracy(Gray(), folder)


LABELS = np.tile(np.arange(6, dtype=np.uint8) % 5, 5)


@pytest.mark.parametrize(
    "labels, message",
    [
        (LABELS[:0], r"integers \(5n,\), found torch.uint8 \(0,\)"),
        (LABELS[:7], r"integers \(5n,\), found torch.uint8 \(7,\)"),
        (LABELS[:, None], r"integers \(5n,\), found torch.uint8 \(30, 1\)"),
        (LABELS.astype(np.float32), r"integers \(5n,\), found torch.float32 \(30,\)"),
        (LABELS[:10], "the labels of five severities, one after the other, all the same"),
        (np.arange(30, dtype=np.uint8) // 6, "the labels of five severities"),
        (LABELS + 95, "labels of 5 classes, found 95 to 99"),
        (LABELS + 1, "labels of 5 classes, found 1 to 5"),
        (LABELS.astype(np.int64) - 1, "labels of 5 classes, found -1 to 3"),
    ],
)
def test_labels_that_are_none_of_five_severities_of_these_classes_are_refused(labels, message, tmp_path):
    folder = corrupted(tmp_path / "c")
    np.save(folder / "labels.npy", labels)
    with pytest.raises(ValueError, match=f"labels.npy: expected {message}"):
        evaluate.corruption_accuracy(Gray(), folder)


def test_corruptions_are_resized_as_the_images_of_the_run(tmp_path):
    for split in ("train", "test"):
        for i in range(20):
            path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(256, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
    photos = ["--dataset", "folder", "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    small = ["--arch", "small", "--mega-batches", "1", "--epochs", "1", "--image-size", "8"]
    assert baselines.main([*photos, *small, "--checkpoint", str(tmp_path / "x.pt")]) == 0
    files = sorted((tmp_path / "photos" / "test").glob("*/*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files] * 5)  # the very test images
    (tmp_path / "c").mkdir()
    for name in evaluate.CORRUPTIONS:
        np.save(tmp_path / "c" / f"{name}.npy", images)
    np.save(tmp_path / "c" / "labels.npy", np.tile(np.repeat([0, 1], 10), 5))
    words = [str(tmp_path / "x.pt"), "--cache", photos[5]]
    assert evaluate.main(words) == evaluate.main([*words, "--corruptions", f"{tmp_path}/c"]) == 0
    clean = json.loads((tmp_path / "x.metrics.json").read_text())["accuracy"]
    found = json.loads((tmp_path / "x.corruptions.json").read_text())["corruptions"]
    assert found["mean"] == pytest.approx(clean)
    config, data = runs.Config("folder", image_size=8), load_dataset("folder", *photos[3::2], 8)
    as_read = resized_as(config, (8, 8), torch.from_numpy(images[:20]))
    assert {image.numpy().tobytes() for image in as_read} == {x.numpy().tobytes() for x in data.test_images}
    digits = torch.randint(256, (4, 16, 16, 1), dtype=torch.uint8, generator=seeded(1))
    assert torch.equal(resized_as(runs.Config("digits"), (8, 8), digits), resized(digits, 8))
    assert torch.equal(resized_as(runs.Config("digits"), (16, 16), digits), digits)


def test_classes_that_are_numbers_in_the_order_of_text_are_refused_where_labels_are_numbers(tmp_path, capsys):
    names = [str(i) for i in range(12)]
    for split, name, i in product(("train", "test"), names, range(3)):
        path = tmp_path / "photos" / split / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * int(name), i, 9)).save(path)
    photos = ["--dataset", "folder", "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    small = ["--arch", "small", "--mega-batches", "1", "--epochs", "1", "--image-size", "8"]
    assert baselines.main([*photos, *small, "--checkpoint", str(tmp_path / "x.pt")]) == 0
    capsys.readouterr()
    words = [str(tmp_path / "x.pt"), "--cache", photos[5]]
    assert evaluate.main([*words, "--corruptions", str(corrupted(tmp_path / "c", 12, classes=12))]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "in the order of text, 0, 1, 10, 11, …; name them 00, 01, …" in error
    assert evaluate.main([*words, "--sigmas"]) == 0  # where labels are the folder's, the order is no matter


def test_a_network_of_grey_images_has_no_corruptions(folder, tmp_path, capsys):
    words = [str(folder / "lure-1.pt"), "--corruptions", str(corrupted(tmp_path / "c"))]
    assert evaluate.main(words) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "lure-1.pt: expected a network of colour images" in error


def test_a_checkpoint_is_measured_on_the_data_it_was_trained_on(tmp_path, capsys):
    for split, i in product(("train", "test"), range(20)):
        path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 6 * i, 250 - i)).save(path)
    photos = ["--dataset", "folder", "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    small = ["--arch", "small", "--mega-batches", "1", "--epochs", "1", "--image-size", "8"]
    files = ["--out", str(tmp_path / "x.json"), "--checkpoint", str(tmp_path / "x.pt")]
    assert baselines.main([*photos, *small, *files]) == 0
    Image.new("RGB", (8, 8), (1, 2, 3)).save(path)
    old = torch.load(tmp_path / "x.pt", weights_only=True)
    del old["data"]
    for content in (None, old):  # an old checkpoint's data are in the record
        if content:
            torch.save(content, tmp_path / "x.pt")
        capsys.readouterr()
        assert evaluate.main([str(tmp_path / "x.pt"), "--cache", photos[5]]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "x.pt: expected the data that it was trained on, sha256 " in error
        assert not (tmp_path / "x.metrics.json").exists()


def test_every_checkpoint_has_a_file_of_its_own_for_what_is_measured(folder, tmp_path, capsys):
    names = ["keep=0.5", "keep=0.9", "x.pt", "x.pth", "y.1.pt", "y.2.pt"]
    for name in names:
        (tmp_path / name).write_bytes((folder / "lure-1.pt").read_bytes())
    assert evaluate.main([*(str(tmp_path / name) for name in names), "--attack", "--epsilons", "1"]) == 0
    written = {path.name for path in tmp_path.glob("*.attack.json")}
    assert written == {f"{name.removesuffix('.pt')}.attack.json" for name in names} and len(written) == 6


def test_what_was_measured_of_another_run_is_not_written_over(folder, tmp_path, capsys):
    (tmp_path / "x.pt").write_bytes((folder / "lure-1.pt").read_bytes())
    words = [str(tmp_path / "x.pt"), "--attack", "--epsilons", "1"]
    assert evaluate.main(words) == evaluate.main(words) == 0  # the same may be measured again
    before = (tmp_path / "x.attack.json").read_bytes()
    (tmp_path / "x.pt").write_bytes((folder / "lure-2.pt").read_bytes())
    for content in (before, b"{}", b"no JSON"):
        (tmp_path / "x.attack.json").write_bytes(content)
        capsys.readouterr()
        assert evaluate.main(words) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "x.attack.json: expected" in error
        assert (tmp_path / "x.attack.json").read_bytes() == content


def test_an_array_of_corruptions_is_read_and_never_written(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, np.uint8))
    evaluate.load_array(tmp_path / "a.npy")[0] = 1
    assert not np.load(tmp_path / "a.npy").any()


def test_weight_noise_is_gaussian_and_the_model_is_put_back():
    model, (images, labels) = network().train(), pictures()
    before = state(model)
    seen = []
    hook = model[0].register_forward_pre_hook(
        lambda *_: seen.append(
            torch.cat([(p - before[n]).flatten() for n, p in model.named_parameters()]).clone()
        )
    )
    draw = lambda: seeded(3)  # noqa: E731
    clean, noisy = evaluate.weight_noise_accuracy(model, images, labels, [0, 0.5], 4, draw())
    hook.remove()
    assert all(module.training for module in model.modules())
    assert clean == pytest.approx(evaluate.accuracy(model, images, labels)) and 0 <= noisy <= 100
    assert same(state(model), before)
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


def test_weight_noise_puts_back_what_a_state_dict_leaves_out_and_leaves_adapters_as_they_were():
    class Frozen(Adapter):
        def state_dict(self, *args, **more):
            return {name: t for name, t in super().state_dict(*args, **more).items() if "weight" not in name}

    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Flatten(), Frozen(3 * 8 * 8, 5), nn.BatchNorm1d(5)).train()
    images, labels = pictures(40)
    labels = evaluate.predict(model, images).argmax(1)  # as trained to 100 %
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    clean, _ = evaluate.weight_noise_accuracy(model, images, labels, [0, 0.5])
    assert clean == 100 and all(m.training for m in model.modules())
    for t, was in zip((*model.parameters(), *model.buffers()), before, strict=True):
        assert torch.equal(t, was)
    assert all(g.any() for g in torch.autograd.grad(model(images)[:, 0].sum(), [model[1].a, model[1].b]))


@pytest.mark.parametrize("images", [pictures()[0] * 1.1, pictures()[0] * 2 - 1, pictures()[0] * math.nan])
def test_attack_refuses_images_that_are_not_in_the_box(images):
    with pytest.raises(ValueError, match=r"expected images in \[0, 1\], got "):
        evaluate.pgd_attack(network(), images, pictures()[1], 0.03)


def test_a_network_may_be_trained_after_its_predictions():
    class Caching(nn.Linear):
        cached = None

        def forward(self, x):
            if self.cached is None:
                self.cached = torch.arange(5.0) * self.weight.new_ones(())
            return super().forward(x) * self.cached

    model, (images, labels) = nn.Sequential(nn.Flatten(), Caching(3 * 8 * 8, 5)), pictures()
    evaluate.accuracy(model, images, labels)
    evaluate.weight_noise_accuracy(model, images, labels, [0.1])
    model(images).sum().backward()


def test_weight_noise_puts_the_model_back_when_it_fails():
    model, (images, labels) = network(), pictures()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError):
        evaluate.weight_noise_accuracy(model, images[:, :2], labels, [0.1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def network_of(path, data):
    """The network of a checkpoint, read without evaluate.py."""
    checkpoint = torch.load(path, weights_only=True)
    model = lure.build_model(checkpoint["config"]["arch"], data, seeded(0))
    model.load_state_dict(checkpoint["weights"])
    return model


@pytest.mark.numerics
def test_metrics_of_a_checkpoint(folder, capsys):
    record = json.loads((folder / "lure-1.json").read_text())
    options = ["--sigmas", "0", "0.02"]
    assert evaluate.main([str(folder / "lure-1.pt"), *options]) == 0
    found = json.loads((folder / "lure-1.metrics.json").read_text())
    assert found["accuracy"] == pytest.approx(record["totals"]["test_accuracy"])
    assert found["ece"] == pytest.approx(record["totals"]["ece"], abs=1e-4) and found["format"] == 2
    attack = ["--attack", "--epsilons", "0", "8"]
    assert evaluate.main([str(folder / "lure-1.pt"), *attack]) == 0
    attacked = json.loads((folder / "lure-1.attack.json").read_text())
    assert attacked["pgd"]["0/255"] == pytest.approx(found["accuracy"]) and "ece" not in attacked
    assert 0 <= attacked["pgd"]["8/255"] <= 100 and "pgd" not in found
    assert found["command"].startswith("python evaluate.py ") and found["command"].endswith("0 0.02")
    assert found["data"]["test"] == 60 and found["versions"]["torch"] == torch.__version__
    assert sum(found["reliability"]["count"]) == 60 and "corruptions" not in found
    _, stream = lure.draw_stream(small_config(), small_data())
    images, labels = small_data().samples(torch.cat([batch.new for batch in stream]))
    clean = evaluate.accuracy(network_of(folder / "lure-1.pt", small_data()), images, labels)
    assert found["weight_noise"]["0"] == pytest.approx(clean)
    assert found["config"] == record["config"] | {"classes": list("0123456789")}
    assert "accuracy" in capsys.readouterr().out


def test_metrics_of_corruptions_stand_in_a_file_of_their_own(tmp_path):
    for split in ("train", "test"):
        for i in range(40):
            path = tmp_path / "photos" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, 6 * i, 250 - i)).save(path)
    photos = ["--dataset", "folder", "--data", str(tmp_path / "photos"), "--cache", str(tmp_path / "cache")]
    size = ["--arch", "small", "--image-size", "8", "--mega-batches", "1", "--epochs", "1"]
    assert baselines.main([*photos, *size, "--checkpoint", str(tmp_path / "lure-1.pt")]) == 0
    words = ["--corruptions", str(corrupted(tmp_path / "c", classes=2)), *photos[4:]]
    assert evaluate.main([str(tmp_path / "lure-1.pt"), *words]) == 0
    assert not (tmp_path / "lure-1.metrics.json").exists()
    found = json.loads((tmp_path / "lure-1.corruptions.json").read_text())
    data = load_dataset("folder", tmp_path / "photos", tmp_path / "cache", 8)
    model = network_of(tmp_path / "lure-1.pt", data)
    assert found["corruptions"] == evaluate.corruption_accuracy(model, tmp_path / "c")
    assert found["config"]["data"] == str(tmp_path / "photos") and found["data"]["test"] == 40


def test_metrics_refuse_data_of_other_classes(tmp_path, capsys):
    config = asdict(runs.Config(dataset="digits", image_size=8))
    torch.save({"config": config, "classes": ["a", "b", "c"], "weights": {}}, tmp_path / "x.pt")
    assert evaluate.main([str(tmp_path / "x.pt")]) == 1
    assert "x.pt: expected to have been trained on the classes of data" in capsys.readouterr().err


DIGITS = asdict(runs.Config(dataset="digits", image_size=8)), [str(i) for i in range(10)]
NONE = [  # what torch saved and is no checkpoint: that refers to code, without weights, of no network
    {"config": print},
    {"config": DIGITS[0], "classes": DIGITS[1], "weights": {}},
    {"config": DIGITS[0] | {"arch": "none"}, "classes": DIGITS[1], "weights": {}},
]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", *NONE])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, capsys, content):
    path = tmp_path / "x.pt"
    if isinstance(content, dict):
        torch.save(content, path)
    else:
        path.write_bytes(content)
    assert evaluate.main([str(path)]) == 1
    error = capsys.readouterr().err
    assert "x.pt: expected a checkpoint" in error and error.count("\n") == 1
    assert evaluate.main([str(tmp_path / "none.pt")]) == 1


def test_redrawing_accuracy_is_that_of_the_methods_and_the_model_is_put_back():
    model, (images, labels) = network(1).eval(), pictures(60)
    before = state(model)
    pi, test, shares = (images[:30], labels[:30]), (images[30:], labels[30:]), [0.1, 0.5, 0.9]
    found = measure.redrawing_accuracy(model, pi, *test, shares, seeded(7))
    assert list(found) == ["lure", "fisher", "magnitude", "random"]
    assert all(list(accuracies) == shares for accuracies in found.values())
    assert same(state(model), before)
    generator = seeded(7)
    random = baselines.random_scores(model, generator)  # the first to be drawn
    for criterion, accuracies in found.items():
        for share, measured in accuracies.items():
            if criterion == "random":
                mask = lure.top_k_mask(random, 1 - share)
                lure.reinitialize_(model, mask, generator)
            else:
                between = lure.Between(pi, None, generator, None, None)
                baselines.METHODS[criterion](model, between, keep=1 - share)
            assert measured == pytest.approx(evaluate.accuracy(model, *test))
            model.load_state_dict(before)


def test_redrawing_accuracy_is_also_measured_with_statistics_taken_anew():
    model, (images, labels) = network(1).eval(), pictures(60)
    before = state(model)
    pi, test, shares = (images[:30], labels[:30]), (images[30:], labels[30:]), [0.1, 0.9]
    found = measure.redrawing_accuracy(model, pi, *test, shares, seeded(7), sample=images[:20])
    assert same(state(model), before)
    generator = seeded(7)
    baselines.random_scores(model, generator)  # the first to be drawn
    baselines.METHODS["lure"](model, lure.Between(pi, None, generator, None, None), keep=0.9)
    assert found["lure"][0.1] == evaluate.accuracy(runs.reestimated(model, images[:20]), *test)


def test_weight_noise_is_measured_on_what_was_trained_on_and_pi_is_drawn_from_it(folder, monkeypatch):
    calls = {}
    for name in ("weight_noise_accuracy", "redrawing_accuracy"):
        real = getattr(measure, name)
        spy = lambda *args, real=real, name=name, **more: calls.update({name: args}) or real(*args, **more)  # noqa: E731
        monkeypatch.setattr(measure, name, spy)
    model, data = network_of(folder / "lure-1.pt", small_data()), small_data()
    config = runs.Config(dataset="digits", mega_batches=2, label_noise=0.5)
    measure.clean_metrics(model, data, config, [0])
    noisy, stream = lure.draw_stream(config, data)
    trained = torch.cat([batch.new for batch in stream])
    assert len(trained) == 108 and not torch.equal(noisy.labels, data.labels)
    _, images, shown, _ = calls["weight_noise_accuracy"]
    assert torch.equal(images, lure.to_input(data.images[trained]))
    assert torch.equal(shown, noisy.labels[trained])
    _, pi, test_images, *_ = calls["redrawing_accuracy"]
    assert torch.equal(test_images, lure.to_input(data.test_images))
    assert sorted(pi[0].flatten(1).tolist()) == sorted(images.flatten(1).tolist())  # of fewer than 1125: all
