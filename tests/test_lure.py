import copy
import json
import math
from collections import Counter
from dataclasses import asdict
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

import lure

seeds = st.integers(0, 2**32)
fractions = st.sampled_from([0.0, 0.05, 0.1, 1 / 3, 0.5, 0.9])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def state(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------ Stream


@st.composite
def streams(draw, replay=("full", "buffer", "none")):
    """Arguments of `mega_batches`, and the sizes that its mega-batches must have, smallest first."""
    sizes = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    smallest, t = sizes
    n = smallest * t + draw(st.integers(0, t - 1))
    fraction = draw(fractions.filter(lambda f: all(round(f * s) < s for s in (smallest, -(-n // t)))))
    return n, t, draw(st.sampled_from(replay)), draw(st.integers(0, 15)), fraction


@given(streams(), seeds)
def test_the_stream_is_one_division_of_all_samples(arguments, seed):
    n, t, *_, fraction = arguments
    stream = list(lure.mega_batches(*arguments, seeded(seed)))
    sizes = [len(b.val) + len(b.new) for b in stream]
    assert len(sizes) == t and max(sizes) - min(sizes) <= 1
    assert [len(b.val) for b in stream] == [round(fraction * size) for size in sizes]
    assert sorted(torch.cat([torch.cat([b.val, b.new]) for b in stream]).tolist()) == list(range(n))
    assert all(part.dtype == torch.int64 and part.device.type == "cpu" for b in stream for part in b)


@given(streams(), seeds)
def test_replay_adds_what_its_policy_says_and_nothing_twice(arguments, seed):
    _, _, replay, buffer_size, _ = arguments
    earlier, validation = set(), set()
    for batch in lure.mega_batches(*arguments, seeded(seed)):
        new, train = set(batch.new.tolist()), set(batch.train.tolist())
        validation |= set(batch.val.tolist())
        assert len(train) == len(batch.train) and new <= train and not train & validation
        assert train - new <= earlier
        expected = {"full": len(earlier), "none": 0, "buffer": min(buffer_size, len(earlier))}[replay]
        assert len(train - new) == expected
        earlier |= new


@given(streams(replay=["buffer"]), seeds)
def test_what_has_left_the_buffer_never_returns(arguments, seed):
    left = set()
    held = set()
    for batch in lure.mega_batches(*arguments, seeded(seed)):
        replayed = set(batch.train.tolist()) - set(batch.new.tolist())
        assert not replayed & left
        left |= held - replayed
        held = replayed | set(batch.new.tolist())


def test_the_buffer_is_a_uniform_sample_of_all_earlier_training_samples():
    repeats, buffer_size = 2000, 6
    included = torch.zeros(4, 40)
    together = 0
    for seed in range(repeats):
        stream = list(lure.mega_batches(40, 4, "buffer", buffer_size, 0.0, seeded(seed)))
        new = torch.cat([b.new for b in stream])
        for i, batch in enumerate(stream):
            included[i] += torch.isin(new, batch.train)
        together += int(torch.isin(new[[0, 29]], stream[3].train).all())
    for i in (1, 2, 3):
        p = buffer_size / (10 * i)
        error = (p * (1 - p) / repeats) ** 0.5
        assert (included[i, : 10 * i] / repeats - p).abs().max() < 4.5 * error
        groups = included[i, : 10 * i].view(i, 10).sum(1) / (repeats * buffer_size)
        assert (groups - 1 / i).abs().max() < 0.02
    assert abs(together / repeats - 6 * 5 / (30 * 29)) < 0.02


@given(seeds, seeds)
def test_the_stream_is_a_function_of_the_seed(seed, other):
    def stream(seed):
        return [part.tolist() for b in lure.mega_batches(60, 3, "buffer", 7, 0.2, seeded(seed)) for part in b]

    assert stream(seed) == stream(seed)
    assert other == seed or stream(other) != stream(seed)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(num_mega_batches=0),
        dict(num_mega_batches=-1),
        dict(num_mega_batches=11),
        dict(num_mega_batches=10, val_fraction=0.9),
        dict(num_samples=0),
        dict(replay="some"),
        dict(val_fraction=1.0),
        dict(val_fraction=-0.1),
        dict(val_fraction=math.nan),
        dict(buffer_size=-1),
    ],
)
def test_a_stream_that_cannot_be_is_refused_at_the_call(arguments):
    with pytest.raises(ValueError):
        lure.mega_batches(**(dict(num_samples=10, num_mega_batches=2) | arguments))


# ------------------------------------------------------------ Connection sensitivity


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.idle, self.used = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3))


def frozen():
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def convolutional():
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2, bias=False), nn.Flatten()
    )
    for buffer in (model[1].running_mean, model[1].running_var):
        buffer.uniform_(0.5, 1.5)
    return model


def transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Embedding(6, 4), layer, nn.Flatten(), nn.Linear(12, 3))


INPUTS = {
    mlp: lambda n: torch.randn(n, 3),
    frozen: lambda n: torch.randn(n, 3),
    Tied: lambda n: torch.randn(n, 3),
    Unused: lambda n: torch.randn(n, 3),
    convolutional: lambda n: torch.randn(n, 2, 4, 4),
    transformer: lambda n: torch.randint(6, (n, 3)),
}


def problem(build, n=5, seed=0, dtype=torch.float64):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model, images, labels = build().to(dtype), INPUTS[build](n), torch.randint(2, (n,))
    return model, images.to(dtype) if images.is_floating_point() else images, labels


@torch.no_grad()
def slow_sensitivity(model, images, labels, step=1e-5):
    """Eq. 2 by central differences, one connection's m at a time."""
    model = copy.deepcopy(model).eval()
    derivative = {}
    for name, p in model.named_parameters():
        if p.ndim < 2 or not p.requires_grad:
            continue
        flat, derivative[name] = p.view(-1), torch.zeros_like(p)
        for j, weight in enumerate(flat.tolist()):
            losses = []
            for m in (1 + step, 1 - step):
                flat[j] = weight * m
                losses.append(nn.functional.cross_entropy(model(images), labels))
            flat[j] = weight
            derivative[name].view(-1)[j] = (losses[0] - losses[1]).abs() / (2 * step)
    total = sum(d.sum() for d in derivative.values())
    return {name: d / (total if total > 0 else 1) for name, d in derivative.items()}


@pytest.mark.parametrize("build", INPUTS)
@settings(max_examples=5)
@given(st.integers(1, 7), st.sampled_from([1, 3, 256]), seeds)
def test_sensitivity_is_the_derivative_by_the_mask(build, n, chunk, seed):
    model, images, labels = problem(build, n, seed)
    with torch.no_grad():
        for p in model.parameters():
            p[torch.rand(p.shape, generator=seeded(seed)) < 0.1] = 0
    scores = lure.connection_sensitivity(model, images, labels, chunk)
    expected = slow_sensitivity(model, images, labels)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    total = sum(s.sum().item() for s in scores.values())
    assert total == pytest.approx(1 if any(s.any() for s in expected.values()) else 0)


def test_sensitivity_covers_each_trainable_weight_once():
    def names(build):
        return list(lure.connection_sensitivity(*problem(build)))

    assert names(Tied) == ["first.weight", "head.weight"]
    assert names(frozen) == ["3.weight"]
    assert names(convolutional) == ["0.weight", "3.weight"]
    idle = lure.connection_sensitivity(*problem(Unused))["idle.weight"]
    assert idle.shape == (3, 3) and not idle.any()


@pytest.mark.parametrize("build", [mlp, convolutional, transformer])
def test_sensitivity_does_not_depend_on_the_chunk(build):
    model, images, labels = problem(build, n=7)
    expected = lure.connection_sensitivity(model, images, labels, chunk=7)
    for chunk in (1, 3, 256):
        torch.testing.assert_close(lure.connection_sensitivity(model, images, labels, chunk), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_have_the_dtype_and_shape_of_the_weights(dtype):
    model, images, labels = problem(mlp, dtype=dtype)
    scores = lure.connection_sensitivity(model, images, labels)
    weights = {name: p for name, p in model.named_parameters() if name in scores}
    assert all(scores[name].dtype == dtype and scores[name].shape == p.shape for name, p in weights.items())
    assert not any(s.requires_grad for s in scores.values())


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Failure(nn.Module):
    def forward(self, x):
        raise RuntimeError("no forward")


def mixed(last):
    model, images, labels = problem(convolutional)
    model = nn.Sequential(model, nn.Dropout(0.5), last).double().train()
    model[0][1].eval()
    model[1].eval()
    model[0][3].weight.requires_grad_(False)
    model[0][0].weight.grad = torch.randn_like(model[0][0].weight)
    return model, images, labels


@pytest.mark.parametrize("last", [Noise, Failure, nn.Identity])
def test_sensitivity_leaves_model_gradients_and_random_state_alone(last):
    model, images, labels = mixed(last())
    before, rng = state(model), torch.get_rng_state()
    gradient = model[0][0].weight.grad.clone()
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    if last is Failure:
        with pytest.raises(RuntimeError, match="no forward"):
            lure.connection_sensitivity(model, images, labels)
    else:
        lure.connection_sensitivity(model, images, labels)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2
    assert [p.requires_grad for p in model.parameters()] == wanted
    first, *others = model.parameters()
    assert torch.equal(first.grad, gradient) and all(p.grad is None for p in others)


def test_a_loss_that_reaches_no_weight_gives_zeros():
    class Cut(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    flat = nn.Linear(3, 2)
    nn.init.zeros_(flat.weight)
    for model in (flat, Cut(3, 2), nn.Sequential(nn.Linear(3, 4), flat)):
        scores = lure.connection_sensitivity(model, torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
        assert scores and all(torch.equal(s, torch.zeros_like(s)) for s in scores.values())
    assert lure.connection_sensitivity(nn.Flatten(), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])) == {}


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("build", [mlp, convolutional, transformer])
def test_sensitivity_is_the_same_without_gradients_and_under_autocast(build, context):
    arguments = problem(build, dtype=torch.float32)
    expected = lure.connection_sensitivity(*arguments)
    with context():
        scores = lure.connection_sensitivity(*arguments)
    assert same(scores, expected) and all(s.dtype == torch.float32 for s in scores.values())


# ------------------------------------------------------------ Mask

shapes = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 1, 2)])
values = st.sampled_from([0.0, 0.0, 0.25, 1.0, math.inf]) | st.floats(0, 2, width=32)
keeps = st.sampled_from([1e-12, 0.01, 0.25, 0.5, 0.8, 0.99, 1.0]) | st.floats(1e-12, 1)


@st.composite
def scored(draw):
    result = {}
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
        result[f"weight{9 - i}"] = torch.tensor(flat).view(shape)
    return result


@settings(max_examples=200)
@given(scored(), keeps)
def test_the_mask_keeps_the_first_k_of_a_stable_sort(scores, keep):
    before = {name: s.clone() for name, s in scores.items()}
    mask = lure.top_k_mask(scores, keep)
    flat = [x for s in scores.values() for x in s.flatten().tolist()]
    kept = set(sorted(range(len(flat)), key=lambda j: -flat[j])[: round(keep * len(flat))])
    assert [x for m in mask.values() for x in m.flatten().tolist()] == [j in kept for j in range(len(flat))]
    assert list(mask) == list(scores) and all(mask[n].shape == s.shape for n, s in scores.items())
    assert all(m.dtype == torch.bool for m in mask.values()) and same(scores, before)


def test_the_number_kept_is_rounded_as_python_rounds():
    for keep, m, k in [(0.5, 1, 0), (0.5, 3, 2), (0.5, 5, 2), (0.8, 10, 8), (0.04, 10, 0), (1.0, 7, 7)]:
        assert int(lure.top_k_mask({"w": torch.zeros(m)}, keep)["w"].sum()) == k


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.0001, 2, math.inf, math.nan])
def test_a_share_that_cannot_be_kept_is_refused(keep):
    with pytest.raises(ValueError):
        lure.top_k_mask({"w": torch.rand(3)}, keep)


@pytest.mark.parametrize("keep", [1e-12, 0.5, 1.0])
def test_scores_with_nan_are_refused(keep):
    with pytest.raises(ValueError):
        lure.top_k_mask({"v": torch.rand(3), "w": torch.tensor([[1.0, math.nan]])}, keep)


# ------------------------------------------------------------ Reinitialisation


def random_mask(model, share, seed):
    generator = seeded(seed)
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in weights.items()}


@pytest.mark.parametrize("build", [mlp, convolutional, transformer, Tied])
@settings(max_examples=10)
@given(st.sampled_from([0.0, 0.3, 0.8, 1.0]), seeds, st.booleans())
def test_only_what_the_mask_drops_is_redrawn_within_the_bound(build, share, seed, channels_last):
    model, *_ = problem(build, seed=seed, dtype=torch.float32)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10)
    before, mask = state(model), random_mask(model, share, seed)
    count = lure.reinitialize_(model, mask, seeded(seed))
    assert count == sum(int((~m).sum()) for m in mask.values()) and type(count) is int
    twins = {"second.weight": "first.weight"} if build is Tied else {}
    for name, now in model.state_dict().items():
        kept = mask.get(twins.get(name, name), torch.ones_like(now, dtype=torch.bool))
        assert torch.equal(now[kept], before[name][kept])
        if not kept.all():
            bound = (now.numel() / len(now)) ** -0.5
            assert now[~kept].abs().max() <= bound * (1 + 1e-6)
            assert (now[~kept] != before[name][~kept]).all()


@given(seeds, seeds)
def test_redrawn_values_are_a_function_of_the_generator(seed, other):
    model, *_ = problem(mlp)
    mask, states = random_mask(model, 0.5, 1), []
    rng = torch.get_rng_state()
    for s in (seed, seed, other):
        again = copy.deepcopy(model)
        lure.reinitialize_(again, mask, seeded(s))
        states.append(state(again))
    assert same(states[0], states[1]) and (seed == other or not same(states[0], states[2]))
    assert torch.equal(torch.get_rng_state(), rng)


def test_redrawn_values_are_uniform():
    model = nn.Conv2d(10, 200, 5)
    lure.reinitialize_(model, {"weight": torch.zeros(200, 10, 5, 5, dtype=torch.bool)}, seeded(3))
    values = model.weight.detach().double().flatten().sort().values * 250**0.5
    n = len(values)
    ranks = torch.arange(n) / n
    distance = ((values + 1) / 2 - ranks).abs().max()  # Kolmogorov-Smirnov; 1.95: a level of 0.1 %
    assert distance < 1.95 / n**0.5 + 1 / n


@pytest.mark.parametrize(
    "wrong", [{"3.weights": torch.zeros(3, 4)}, {"3.weight": torch.zeros(4, 3)}, {"3.weight": torch.zeros(4)}]
)
def test_a_mask_that_does_not_fit_is_refused_and_nothing_changes(wrong):
    model, *_ = problem(mlp)
    before = state(model)
    mask = {"0.weight": torch.zeros(4, 3)} | wrong
    with pytest.raises(ValueError):
        lure.reinitialize_(model, {name: m.bool() for name, m in mask.items()})
    assert same(state(model), before)


@pytest.mark.parametrize("build", INPUTS)
@settings(max_examples=5)
@given(keeps, seeds)
def test_unlearning_is_score_mask_redraw(build, keep, seed):
    model, images, labels = problem(build, seed=seed)
    twin = copy.deepcopy(model)
    mask = lure.unlearn_(model, images, labels, keep, seeded(seed))
    expected = lure.top_k_mask(lure.connection_sensitivity(twin, images, labels), keep)
    redrawn = lure.reinitialize_(twin, expected, seeded(seed))
    assert same(mask, expected) and same(state(model), state(twin))
    m = sum(x.numel() for x in mask.values())
    assert redrawn / m == pytest.approx(1 - round(keep * m) / m)


# ------------------------------------------------------------ Metrics


@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8), max_size=5))
def test_cumulative_error_rate_counts_every_miss(tests):
    errors = [sum(prediction != label for prediction, label in test) for test in tests]
    expected = sum(1 for test in tests for prediction, label in test if prediction != label)
    for given_errors in (errors, torch.tensor(errors), iter(errors)):
        cer = lure.cumulative_error_rate(given_errors)
        assert cer == expected and type(cer) is int


@given(st.floats(0, 100), st.floats(0, 100))
def test_generalization_gap_is_train_minus_validation(train, val):
    assert lure.generalization_gap(train, val) == train - val


@given(st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 2, 7, 10, 15, 40]), seeds)
def test_calibration_error_agrees_with_torchmetrics(n, classes, bins, seed):
    generator = seeded(seed)
    probabilities = (3 * torch.randn(n, classes, generator=generator)).softmax(1)
    labels = torch.randint(classes, (n,), generator=generator)
    expected = multiclass_calibration_error(probabilities, labels, classes, n_bins=bins, norm="l1")
    assert lure.expected_calibration_error(probabilities, labels, bins) == pytest.approx(float(expected), abs=1e-5)


edges = st.sampled_from([i / 16 for i in range(2, 17)])  # exact in binary, like i / bins where it is one of them


@settings(max_examples=100)
@given(
    st.lists(st.tuples(edges | st.floats(0.101, 1), st.booleans()), min_size=1, max_size=20),
    st.sampled_from([*range(1, 21), 32]),
)
def test_calibration_error_has_bins_closed_on_the_right(samples, bins):
    rows, sums = [], {}
    for confidence, correct in samples:
        rows.append([confidence] + [(1 - confidence) / 9] * 9)
        bin = math.ceil(Fraction(confidence) * bins) - 1  # (bin / bins, (bin + 1) / bins]
        sums[bin] = sums.get(bin, 0) + confidence - correct
    labels = torch.tensor([0 if correct else 1 for _, correct in samples])
    ece = lure.expected_calibration_error(torch.tensor(rows, dtype=torch.float64), labels, bins)
    assert ece == pytest.approx(sum(abs(s) for s in sums.values()) / len(samples), abs=1e-12)
    assert type(ece) is float


# ------------------------------------------------------------ Data


@given(st.integers(0, 30), st.integers(1, 5), fractions | st.just(1.0), seeds)
def test_corrupted_labels_are_labels_and_a_function_of_the_generator(n, classes, probability, seed):
    labels = torch.randint(classes, (n,), generator=seeded(1))
    before = labels.clone()
    noisy = lure.corrupt_labels(labels, classes, probability, seeded(seed))
    assert noisy.dtype == torch.int64 and noisy.shape == labels.shape and torch.equal(labels, before)
    assert ((noisy >= 0) & (noisy < classes)).all()
    assert torch.equal(noisy, lure.corrupt_labels(labels, classes, probability, seeded(seed)))
    assert probability > 0 or torch.equal(noisy, labels)


@pytest.mark.parametrize("probability", [0.2, 0.6, 1.0])
def test_noise_redraws_over_all_classes_the_true_one_among_them(probability):
    classes, n = 5, 20000
    labels = torch.randint(classes, (n,), generator=seeded(1))
    noisy = lure.corrupt_labels(labels, classes, probability, seeded(2))
    for c in range(classes):
        counts = noisy[labels == c].bincount(minlength=classes) / (labels == c).sum()
        expected = torch.full((classes,), probability / classes)
        expected[c] += 1 - probability
        assert (counts - expected).abs().max() < 0.03
    assert abs((noisy != labels).double().mean() - probability * (classes - 1) / classes) < 0.015


@given(
    st.tuples(st.integers(1, 5), st.integers(2, 6), st.integers(2, 6), st.sampled_from([1, 3])),
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
    st.integers(0, 4),
    st.booleans(),
    seeds,
)
def test_augmentation_pads_crops_and_flips_each_image(shape, chosen, padding, flip, seed):
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=seeded(0))
    n, height, width, channels = shape
    index = torch.tensor([i % n for i in chosen])
    generator = seeded(seed)
    top, left = torch.randint(-padding, padding + 1, (2, len(index), 1, 1), generator=generator)
    mirrored = torch.rand((len(index), 1, 1), generator=generator) < 0.5
    expected = []
    for i, image in enumerate(pixels[index].permute(0, 3, 1, 2)):
        padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding)
        padded[:, padding : padding + height, padding : padding + width] = image / 255
        y, x = padding + int(top[i]), padding + int(left[i])
        crop = padded[:, y : y + height, x : x + width]
        expected.append(crop.flip(-1) if flip and mirrored[i] else crop)
    result = lure.augmented(pixels, index, padding, flip, seeded(seed))
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=0)
    assert result.min() >= 0 and result.max() <= 1
    assert result.is_contiguous(memory_format=torch.channels_last)
    if padding == 0 and not flip:
        assert torch.equal(result, lure.to_input(pixels[index]))


def test_augmentation_reaches_every_offset_and_both_mirrorings():
    pixels = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1)
    views = lure.augmented(pixels, torch.zeros(400, dtype=torch.int64), 1, True, seeded(0))
    assert len(views.flatten(1).unique(dim=0)) == 2 * 3 * 3


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.data())
def test_a_stratified_sample_is_in_proportion_and_always_the_same(sizes, data):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(len(labels)))]
    size = data.draw(st.integers(1, len(labels)))
    sample = lure.stratified(labels, size)
    assert len(set(sample.tolist())) == len(sample) == size
    assert torch.equal(sample, lure.stratified(labels, size))
    for c, of_class in enumerate(sizes):
        share = of_class / len(labels)
        slack = (1 + len(sizes) * share) / 2  # one where the classes are of one size
        assert abs(int((labels[sample] == c).sum()) - size * share) <= slack + 1e-6


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 4))
def test_a_stratified_sample_of_equal_classes_is_within_one(classes, of_class, size, extra):
    labels = torch.arange(classes).repeat(of_class + extra)
    size = min(size, len(labels))
    counts = labels[lure.stratified(labels, size)].bincount(minlength=classes)
    assert (counts - size / classes).abs().max() < 1


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_an_equal_sample_has_as_many_of_every_class(sizes, each):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sample = lure.stratified(labels, each * len(sizes), equal=True)
    assert labels[sample].bincount().tolist() == [each] * len(sizes)
    assert len(set(sample.tolist())) == len(sample)


@pytest.fixture(scope="module")
def digits():
    return lure.load_dataset("digits")


def test_digits_are_whole_stratified_and_disjoint(digits):
    from sklearn.datasets import load_digits

    assert digits.images.dtype == digits.test_images.dtype == torch.uint8
    assert digits.images.shape[1:] == digits.test_images.shape[1:] == (1, 8, 8)
    assert len(digits.images) == len(digits.labels) and len(digits.test_images) == len(digits.test_labels)
    assert len(digits.labels) + len(digits.test_labels) == 1797 and len(digits.classes) == 10
    assert abs(len(digits.test_labels) - 0.2 * 1797) <= 1
    original, labels = load_digits(return_X_y=True)
    found = Counter()
    for images, targets in (digits[:2], digits[2:4]):
        counts = targets.bincount() / len(targets)
        assert (counts - torch.tensor(labels).bincount() / 1797).abs().max() < 1 / len(targets)
        found.update(
            (tuple(x), y) for x, y in zip(images.flatten(1).tolist(), targets.tolist(), strict=True)
        )
    pixels = torch.tensor(original * (255 / original.max())).round().int().tolist()
    expected = Counter((tuple(x), y) for x, y in zip(pixels, labels.tolist(), strict=True))
    assert found == expected


def test_limits_choose_among_the_images_of_the_split(digits):
    part = lure.load_dataset("digits", limit=100, limit_test=50)
    assert len(part.images) == len(part.labels) == 100 and len(part.test_images) == len(part.test_labels) == 50
    assert (part.labels.bincount() - 10).abs().max() <= 1
    whole = {(x.numpy().tobytes(), int(y)) for x, y in zip(*digits[:2], strict=True)}
    assert {(x.numpy().tobytes(), int(y)) for x, y in zip(*part[:2], strict=True)} <= whole


def test_shots_are_so_many_of_every_class_or_an_error():
    few = lure.load_dataset("digits", shots=7)
    assert few.labels.bincount().tolist() == [7] * 10
    with pytest.raises(lure.DataError, match="--shots 150"):
        lure.load_dataset("digits", shots=150)


# ------------------------------------------------------------ Networks


@pytest.mark.parametrize("arch", lure.ARCHITECTURES)
def test_a_network_normalises_its_input_and_gives_logits(arch):
    mean, std = torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    model = lure.build_model(arch, 7, 3, mean.tolist(), std.tolist(), seeded(1)).eval()
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    inputs = []
    first.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    images = torch.stack([mean, mean + std])[:, :, None, None].expand(2, 3, 32, 32)
    with torch.no_grad():
        assert model(images).shape == (2, 7)
    assert not inputs[0][0].any()
    torch.testing.assert_close(inputs[0][1], torch.ones(3, 32, 32))
    pools = sum(isinstance(m, nn.MaxPool2d) for m in model.modules())
    assert (first.kernel_size, first.stride, first.padding) == ((3, 3), (1, 1), (1, 1))
    assert pools == (4 if arch == "vgg16_bn" else 0)


@pytest.mark.parametrize("arch", ["small", "resnet18"])
def test_the_start_is_a_function_of_the_generator(arch):
    rng = torch.get_rng_state()
    a, b, other = (state(lure.build_model(arch, 4, generator=seeded(s))) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(a, b) and not torch.equal(a["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(a["fc.weight"], other["fc.weight"])


def test_one_generator_gives_one_network_after_another():
    generator = seeded(1)
    a, b = (state(lure.build_model("small", 4, generator=generator)) for _ in range(2))
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])


def test_convolutions_start_kaiming_normal_by_fan_out():
    model = lure.build_model("small", 10, generator=seeded(1))
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 10000:
            expected = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** 0.5
            assert m.weight.std() == pytest.approx(expected, rel=0.05)


def test_the_small_network_is_named_like_a_resnet():
    names = [name for name, _ in lure.build_model("small", 10, 1, (0.5,), (0.5,)).named_children()]
    wanted = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [name for name in names if name in wanted] == wanted


# ------------------------------------------------------------ Learning


def epoch(n, batch_size, seed, model_seed=0, lr=0.0):
    """One epoch on images that show their own number: batches as lists of numbers, and what it returns."""
    train = torch.arange(n)[torch.randperm(n, generator=seeded(n))] + 3
    pixels = torch.arange(n + 3, dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 1).contiguous()
    labels = torch.arange(n + 3) % 3
    with torch.random.fork_rng([]):
        torch.manual_seed(model_seed)
        model, batches = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []
    model.register_forward_pre_hook(lambda m, args: batches.append((args[0][:, 0, 4, 4] * 255).round().int().tolist()))
    config = lure.Config(dataset="digits", batch_size=batch_size)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    returned = lure.train_epoch_(model, optimizer, pixels, labels, train, config, seeded(seed))
    return batches, returned, train


@given(st.integers(1, 40), st.integers(2, 9), seeds)
def test_an_epoch_visits_every_sample_once_and_no_batch_is_of_one(n, batch_size, seed):
    batches, _, train = epoch(n, batch_size, seed)
    sizes = [len(b) for b in batches]
    expected = [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    if len(expected) > 1 and expected[-1] == 1:
        expected[-2:] = [batch_size + 1]
    assert sizes == expected
    assert sorted(i for b in batches for i in b) == sorted(train.tolist())


@given(seeds, seeds)
def test_the_order_of_an_epoch_depends_on_the_generator_alone(seed, other):
    first = epoch(30, 7, seed)[0]
    with torch.random.fork_rng([]):
        torch.manual_seed(other)
        assert epoch(30, 7, seed, model_seed=1, lr=0.01)[0] == first
    assert other == seed or epoch(30, 7, other)[0] != first


def test_an_epoch_returns_mean_loss_and_accuracy_over_its_samples():
    whole = epoch(9, 9, 1)
    for batch_size in (2, 4, 5):
        for a, b in zip(epoch(9, batch_size, 1)[1], whole[1], strict=True):
            assert float(a) == pytest.approx(float(b), abs=0.3)
