import copy
import json
import math
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import examples
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn
from torchmetrics.functional.classification import multiclass_calibration_error

import lure

seeds = st.integers(0, 2**32 - 1)
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
    by_sample = torch.zeros(40)
    together = 0
    for seed in range(repeats):
        stream = list(lure.mega_batches(40, 4, "buffer", buffer_size, 0.0, seeded(seed)))
        new = torch.cat([b.new for b in stream])
        for i, batch in enumerate(stream):
            included[i] += torch.isin(new, batch.train)
        by_sample[stream[3].train] += 1 - torch.isin(stream[3].train, stream[3].new).float()
        together += int(torch.isin(new[[0, 29]], stream[3].train).all())
    for i in (1, 2, 3):
        p = buffer_size / (10 * i)
        error = (p * (1 - p) / repeats) ** 0.5
        assert (included[i, : 10 * i] / repeats - p).abs().max() < 4.5 * error
        groups = included[i, : 10 * i].view(i, 10).sum(1) / (repeats * buffer_size)
        assert (groups - 1 / i).abs().max() < 0.02
    assert (by_sample / repeats - 6 / 40).abs().max() < 4.5 * (0.15 * 0.85 / repeats) ** 0.5
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
    with pytest.raises(ValueError, match=r"cannot be|samples do not allow"):
        lure.mega_batches(**(dict(num_samples=10, num_mega_batches=2) | arguments))


def test_the_stream_is_by_default_the_papers():
    stream = list(lure.mega_batches(3000, 3, generator=seeded(1)))
    assert [(len(b.val), len(b.new), len(b.train)) for b in stream] == [
        (100, 900, 900 * i) for i in (1, 2, 3)
    ]
    assert [len(b.train) for b in lure.mega_batches(3000, 3, "buffer")] == [900, 1087, 1087]


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
@examples(5)
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


def test_sensitivity_takes_64_images_at_a_time_and_as_many_labels():
    model, images, labels = problem(mlp, n=65)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    lure.connection_sensitivity(model, images, labels)
    assert sizes == [64, 1]
    with pytest.raises(ValueError):
        lure.connection_sensitivity(model, images, labels[:64])


@pytest.mark.parametrize("build", INPUTS)
def test_sensitivity_is_computed_in_the_precision_of_the_weights(build):
    model, images, labels = problem(build, n=20)
    expected = lure.connection_sensitivity(model, images, labels)
    if images.is_floating_point():
        images = images.float()
    scores = lure.connection_sensitivity(model.float(), images, labels)
    torch.testing.assert_close({n: s.double() for n, s in scores.items()}, expected, rtol=1e-3, atol=1e-6)


def test_scores_of_low_precision_sum_to_one():
    model, images, labels = problem(mlp, n=50, dtype=torch.bfloat16)
    scores = lure.connection_sensitivity(model, images, labels)
    assert float(sum(s.double().sum() for s in scores.values())) == pytest.approx(1, abs=1e-3)


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
    for model in (flat, Cut(3, 2), nn.Sequential(nn.Linear(3, 3), flat)):
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


@examples(200)
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
    with pytest.raises(ValueError, match=f"keep is {keep}"):
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
@examples(10)
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


def test_the_bound_of_redrawn_values_is_one_for_a_single_input():
    model = nn.Linear(1, 200)
    lure.reinitialize_(model, {"weight": torch.zeros(200, 1, dtype=torch.bool)}, seeded(3))
    assert 0.9 < model.weight.abs().max() <= 1


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
    with pytest.raises(ValueError, match=r"no parameter '3\.weights?' of shape \([34]"):
        lure.reinitialize_(model, {name: m.bool() for name, m in mask.items()})
    assert same(state(model), before)


@pytest.mark.parametrize("step", [lure.unlearn_, lambda model, *pi: lure.lure_(model, pi, *[None] * 3)])
def test_unlearning_keeps_80_percent(step):
    mask = torch.cat([m.flatten() for m in step(*problem(mlp)).values()])
    assert int(mask.sum()) == round(0.8 * len(mask))


@pytest.mark.parametrize("build", INPUTS)
@examples(5)
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
    assert lure.expected_calibration_error(probabilities, labels, bins) == pytest.approx(
        float(expected), abs=1e-5
    )


edges = st.sampled_from(
    [i / 16 for i in range(2, 17)]
)  # exact in binary, like i / bins where it is one of them


@examples(100)
@given(
    st.lists(st.tuples(edges | st.floats(0.101, 1), st.booleans()), min_size=1, max_size=20),
    st.sampled_from([*range(1, 21), 32]),
)
def test_calibration_error_has_bins_closed_on_the_right(samples, bins):
    rows, sums = [], {}
    for confidence, correct in samples:
        exact, place = Fraction(confidence) * bins, confidence * bins
        assume(exact.denominator == 1 or abs(place - round(place)) > 1e-12)  # on an edge, or not near one
        rows.append([confidence] + [(1 - confidence) / 9] * 9)
        bin = math.ceil(exact) - 1  # (bin / bins, (bin + 1) / bins]
        sums[bin] = sums.get(bin, 0) + confidence - correct
    labels = torch.tensor([0 if correct else 1 for _, correct in samples])
    ece = lure.expected_calibration_error(torch.tensor(rows, dtype=torch.float64), labels, bins)
    assert ece == pytest.approx(sum(abs(s) for s in sums.values()) / len(samples), abs=1e-12)
    assert type(ece) is float


def test_calibration_error_has_15_bins_by_default():
    probabilities, labels = torch.rand(50, 3, generator=seeded(1)).softmax(1), torch.zeros(50).long()
    found = [lure.expected_calibration_error(probabilities, labels, *bins) for bins in ((), (15,), (16,))]
    assert found[0] == found[1] != found[2]


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
        found.update((tuple(x), y) for x, y in zip(images.flatten(1).tolist(), targets.tolist(), strict=True))
    pixels = torch.tensor(original * (255 / original.max())).round().int().tolist()
    expected = Counter((tuple(x), y) for x, y in zip(pixels, labels.tolist(), strict=True))
    assert found == expected


def test_images_of_any_data_set_are_resized(digits):
    large = lure.load_dataset("digits", image_size=16)
    assert large.images.shape == (len(digits.images), 1, 16, 16) and large.images.dtype == torch.uint8
    assert large.test_images.shape[2:] == (16, 16) and torch.equal(large.labels, digits.labels)
    shrunk = nn.functional.avg_pool2d(large.images.float(), 2)
    assert (shrunk - digits.images).abs().mean() < 20  # of 255: the same pictures, a little smoother
    same = lure.load_dataset("digits", image_size=8)
    assert torch.equal(same.images, digits.images)


def test_limits_choose_among_the_images_of_the_split(digits):
    part = lure.load_dataset("digits", limit=100, limit_test=50)
    assert (
        len(part.images) == len(part.labels) == 100 and len(part.test_images) == len(part.test_labels) == 50
    )
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
            assert float(m.weight.detach().std()) == pytest.approx(expected, rel=0.05)


def test_the_small_network_is_named_like_a_resnet():
    names = [name for name, _ in lure.build_model("small", 10, 1, (0.5,), (0.5,)).named_children()]
    wanted = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [name for name in names if name in wanted] == wanted


# ------------------------------------------------------------ Learning


def epoch(n, batch_size, seed, model_seed=0, lr=0.0):
    """One epoch on images that show their own number. Returns (numbers, logits) by batch, and the result."""
    train = torch.arange(n)[torch.randperm(n, generator=seeded(n))] + 3
    pixels = torch.arange(n + 3, dtype=torch.uint8)[:, None, None, None].expand(-1, 8, 8, 1).contiguous()
    with torch.random.fork_rng([]):
        torch.manual_seed(model_seed)
        model, batches = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []

    def note(module, args, logits):
        batches.append(((args[0][:, 0, 4, 4] * 255).round().long(), logits.detach()))

    model.register_forward_hook(note)
    config = lure.Config(dataset="digits", batch_size=batch_size, precision="float32")
    optimizer = torch.optim.SGD(model.parameters(), lr)
    labels = torch.arange(n + 3) % 3
    return batches, lure.train_epoch_(model, optimizer, pixels, labels, train, config, seeded(seed))


def numbers(batches):
    return [shown.tolist() for shown, _ in batches]


@given(st.integers(1, 40), st.integers(2, 9), seeds)
@example(5, 4, 0)
@example(5, 2, 0)
@example(10, 8, 0)
@example(12, 8, 0)
@example(3, 8, 0)
def test_an_epoch_visits_every_sample_once_and_no_batch_but_an_only_one_is_small(n, batch_size, seed):
    batches = numbers(epoch(n, batch_size, seed)[0])
    expected = [batch_size] * (n // batch_size) + [n % batch_size] * (n % batch_size > 0)
    if len(expected) > 1 and (expected[-1] == 1 or expected[-1] < batch_size / 2):
        expected[-2:] = [batch_size + n % batch_size]
    assert [len(b) for b in batches] == expected
    assert sorted(i for b in batches for i in b) == list(range(3, n + 3))


@given(seeds, seeds)
def test_the_order_of_an_epoch_depends_on_the_generator_alone(seed, other):
    first = numbers(epoch(30, 7, seed)[0])
    with torch.random.fork_rng([]):
        torch.manual_seed(other)
        assert numbers(epoch(30, 7, seed, model_seed=1, lr=0.01)[0]) == first
    assert other == seed or numbers(epoch(30, 7, other)[0]) != first


@given(st.integers(1, 30), st.integers(2, 9), seeds)
def test_an_epoch_returns_running_mean_loss_and_accuracy(n, batch_size, seed):
    batches, (loss, accuracy) = epoch(n, batch_size, seed, lr=0.01)
    shown, logits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert float(loss) == pytest.approx(float(nn.functional.cross_entropy(logits, shown % 3)), rel=1e-4)
    assert float(accuracy) == pytest.approx(float((logits.argmax(1) == shown % 3).double().mean()))
    assert loss.dtype == accuracy.dtype == torch.float64


@given(st.integers(1, 200), seeds)
def test_evaluation_is_of_all_samples_128_at_a_time(n, seed):
    pixels = torch.randint(256, (n, 8, 8, 1), dtype=torch.uint8, generator=seeded(seed))
    labels = torch.randint(3, (n,), generator=seeded(seed))
    model, sizes = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = lure.evaluate(model.train(), pixels, labels)
    assert sizes == [128] * (n // 128) + [n % 128] * (n % 128 > 0)
    logits = model.eval()(pixels.view(n, 1, 8, 8) / 255).detach()
    right = int((logits.argmax(1) == labels).sum())
    assert found == dict(
        accuracy=pytest.approx(100 * right / n),
        errors=n - right,
        loss=pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-5),
        ece=pytest.approx(lure.expected_calibration_error(logits.softmax(1), labels), abs=1e-6),
    )


def test_evaluation_of_no_samples_is_of_nothing():
    nothing = lure.evaluate(nn.Flatten(), torch.zeros(0, 8, 8, 1, dtype=torch.uint8), torch.zeros(0))
    assert nothing == dict(accuracy=None, errors=0, loss=None, ece=None)


def test_totals_are_the_sums_over_the_mega_batches_and_the_last_of_them():
    def row(train, val, test, errors, ece, passes, seconds):
        test = dict(accuracy=test, errors=errors, ece=ece)
        splits = dict(train=dict(accuracy=train), val=dict(accuracy=val), test=test)
        return splits | dict(image_passes=passes, seconds=seconds)

    rows = [row(50.0, 40.0, 30.0, 7, 0.5, 100, 1.5), row(90.0, 70.0, 60.0, 4, 0.25, 200, 2.5)]
    expected = dict(test_accuracy=60.0, cer=11, generalization_gap=20.0, ece=0.25)
    assert lure.totals(rows) == expected | dict(image_passes=300, seconds=4.0)
    rows[1]["val"]["accuracy"] = None
    assert lure.totals(rows)["generalization_gap"] is None


@pytest.mark.parametrize(
    ("accuracies", "chosen"), [([10, 90, 50], 1), ([50, 50, 10], 0), ([0, 0, 0], 0), ([0, 0, 0.5], 2)]
)
def test_learning_ends_with_the_first_of_the_best_epochs_and_tells_its_speed(accuracies, chosen, monkeypatch):
    model, ends, seen = nn.Linear(2, 2), [], iter(accuracies)

    def train_epoch(model, *args):
        nn.init.constant_(model.weight, len(ends))
        ends.append(state(model))
        return torch.tensor(1.0), torch.tensor(0.75)

    monkeypatch.setattr(lure, "train_epoch_", train_epoch)
    monkeypatch.setattr(lure, "evaluate", lambda *args: dict(accuracy=next(seen)))
    bar = SimpleNamespace(desc="", done=0)
    bar.update = lambda n: setattr(bar, "done", bar.done + n)
    config = lure.Config("digits", select="best-val", epochs=3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    row = lure.learn_(model, optimizer, *[torch.zeros(9, dtype=torch.int64)] * 4, config, None, bar)
    assert same(state(model), ends[chosen]) and bar.done == row["image_passes"] == 27
    assert row.keys() == {"running_train_accuracy", "image_passes", "seconds", "images_per_second"}
    assert row["running_train_accuracy"] == 75 and 0 < row["seconds"] < 60
    assert row["images_per_second"] == pytest.approx(27 / row["seconds"])


@pytest.mark.parametrize("dataset", lure.DATASETS)
def test_training_pads_by_four_and_flips_but_for_digits(dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(lure, "augmented", lambda *args: seen.append(args[2:4]) or torch.zeros(4, 1, 8, 8))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    pixels, labels = torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.arange(4) % 3
    optimizer, config = torch.optim.SGD(model.parameters(), 0.1), lure.Config(dataset, precision="float32")
    lure.train_epoch_(model, optimizer, pixels, labels, torch.arange(4), config, seeded(0))
    assert seen == [(1, False) if dataset == "digits" else (4, True)]


# ------------------------------------------------------------ Several processes, as each of them sees it
# test_processes.py starts real ones.


@pytest.mark.parametrize("world", [2, 3, 4])
def test_the_average_is_the_mean_over_the_processes_in_place(world, monkeypatch):
    tensors = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
    lure.average_(tensors)
    assert [t.tolist() for t in tensors] == [[1, 2], 3]
    monkeypatch.setattr(lure.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(lure.dist, "get_world_size", lambda: world)
    monkeypatch.setattr(lure.dist, "all_reduce", lambda tensor: tensor.mul_(10))  # the sum
    before = [t.clone() for t in tensors]
    lure.average_(tensors)
    for now, then in zip(tensors, before, strict=True):
        torch.testing.assert_close(now, then * 10 / world)


def seen_by(rank, world, n, batch_size, seed):
    """The samples, loss and accuracy of an epoch as one of several processes sees it, and its gradients."""
    gradients = []
    step = torch.optim.SGD.step

    def noting(optimizer, *args):
        gradients.append(optimizer.param_groups[0]["params"][0].grad.clone())
        return step(optimizer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "ranks", lambda: (rank, world))
        patch.setattr(torch.optim.SGD, "step", noting)
        batches, (loss, accuracy) = epoch(n, batch_size, seed)
    return numbers(batches), torch.stack([loss, accuracy]), gradients


@given(st.integers(2, 4), st.integers(8, 40), st.integers(8, 15), seeds)
def test_the_mean_over_the_processes_is_what_one_computes(world, n, batch_size, seed):
    parts = [seen_by(rank, world, n, batch_size, seed) for rank in range(world)]
    for batch in zip(*(samples for samples, _, _ in parts), strict=True):
        sizes = [len(share) for share in batch]
        assert min(sizes) >= 2 and max(sizes) - min(sizes) <= 1
    if n % batch_size == 0 or n % batch_size >= 2 * world or n < batch_size:
        samples, result, gradients = seen_by(0, 1, n, batch_size, seed)
        together = [
            [i for share in batch for i in share] for batch in zip(*(part[0] for part in parts), strict=True)
        ]
        assert together == samples
        torch.testing.assert_close(sum(part[1] for part in parts) / world, result, rtol=1e-5, atol=1e-6)
        for i, gradient in enumerate(gradients):
            together = sum(part[2][i] for part in parts) / world
            torch.testing.assert_close(together, gradient, rtol=1e-4, atol=1e-6)


def test_running_statistics_and_sums_are_averaged_after_the_epoch(monkeypatch):
    averaged = []
    monkeypatch.setattr(lure, "average_", lambda tensors: averaged.append([*tensors]))
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    pixels, labels = torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.arange(4) % 3
    config = lure.Config("digits", precision="float32")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lure.train_epoch_(model, optimizer, pixels, labels, torch.arange(4), config, seeded(0))
    ((_, *statistics),) = averaged
    assert [id(s) for s in statistics] == [id(model[1].running_mean), id(model[1].running_var)]


PROCESSORS = [  # what torch tells of one, and whether bfloat16 is faster there
    ({}, False),
    ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, False),
    ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, True),
    ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, False),
    ({"avx512_bf16": True, "amx_bf16": True, "cpu_name": "Intel(R) Xeon(R) Processor"}, True),
    ({"avx512_bf16": True}, False),
]


@pytest.mark.parametrize(("has", "fast"), PROCESSORS)
@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16"])
def test_training_is_in_the_precision_asked_for_or_the_processors_own(precision, has, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    expected = precision if precision != "auto" else "bfloat16" if fast else "float32"
    assert lure.pick_precision(precision, torch.device("cpu")) == expected
    model, seen = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), []
    model.register_forward_hook(
        lambda module, args, logits: seen.append((logits.dtype, torch.is_grad_enabled()))
    )
    pixels, labels = torch.zeros(4, 8, 8, 1, dtype=torch.uint8), torch.arange(4) % 3
    optimizer, config = torch.optim.SGD(model.parameters(), 0.1), lure.Config("digits", precision=precision)
    lure.train_epoch_(model, optimizer, pixels, labels, torch.arange(4), config, seeded(0))
    lure.evaluate(model, pixels, labels)
    assert seen == [(getattr(torch, expected), True), (torch.float32, False)]  # evaluation: always float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------ Algorithm 1

TINY = dict(dataset="digits", arch="small", limit=120, limit_test=60, mega_batches=2, epochs=1, device="cpu")


def tiny(**changes):
    return lure.Config(**(TINY | changes))


def nothing(model, pi, upcoming, fresh, generator):
    return None


def redraw_all(model, pi, upcoming, fresh, generator):
    torch.rand(1000, generator=generator)
    model.load_state_dict(fresh().state_dict())


def learned(row):
    """A row without its times and what came after learning."""
    after = ("seconds", "images_per_second", "redrawn", "redrawn_by_tensor", "forgotten")
    return {k: v for k, v in row.items() if k not in after}


def row_without_times(row):
    return {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}


def without_times(record):
    record = copy.deepcopy(record)
    del record["totals"]["seconds"]
    record["mega_batches"] = [row_without_times(row) for row in record["mega_batches"]]
    return record


def watched(config, forget=lure.lure_, train_epoch=lure.train_epoch_):
    """The record of a run, and what each of its epochs started with, was trained on and ended with."""
    epochs = []

    def spy(model, optimizer, pixels, labels, train, config, generator):
        rate, steps = optimizer.param_groups[0]["lr"], len(optimizer.state)
        now = SimpleNamespace(start=state(model), train=train, rng=generator.get_state())
        now.rate, now.momentum, now.optimizer = rate, steps, optimizer
        epochs.append(now)
        result = train_epoch(model, optimizer, pixels, labels, train, config, generator)
        now.end = state(model)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "train_epoch_", spy)
        return lure.run(config, forget), epochs


def untrained(model, optimizer, pixels, labels, train, config, generator):
    return torch.tensor(1.0), torch.tensor(0.5)


def streamed(config):
    """The data of a tiny run, its (noisy) labels and its stream, by the seed of the stream."""
    data = lure.load_dataset("digits", limit=config.limit, limit_test=config.limit_test)
    rng = seeded(4 * config.seed)
    labels = lure.corrupt_labels(data.labels, 10, config.label_noise, rng)
    arguments = config.mega_batches, config.replay, config.buffer_size, config.val_fraction
    return data, labels, list(lure.mega_batches(len(labels), *arguments, rng))


def pairs(images, labels):
    images = (images * 255).round().to(torch.uint8) if images.is_floating_point() else images
    return Counter((tuple(x), y) for x, y in zip(images.flatten(1).tolist(), labels.tolist(), strict=True))


@pytest.fixture(scope="module")
def record():
    return lure.run(tiny(seed=5))


def test_a_run_is_a_function_of_its_seed(record):
    assert without_times(lure.run(tiny(seed=5))) == without_times(record)
    other = without_times(lure.run(tiny(seed=6)))
    assert other["mega_batches"] != without_times(record)["mega_batches"]


def test_totals_are_those_of_the_rows(record):
    rows, totals = record["mega_batches"], record["totals"]
    assert len(rows) == 2 and record["config"] == asdict(tiny(seed=5))
    assert totals["cer"] == sum(r["test"]["errors"] for r in rows)
    assert totals["test_accuracy"] == rows[-1]["test"]["accuracy"]
    assert totals["ece"] == rows[-1]["test"]["ece"]
    assert [r["image_passes"] for r in rows] == [54, 108] and totals["image_passes"] == 162
    gap = rows[-1]["train"]["accuracy"] - rows[-1]["val"]["accuracy"]
    assert totals["generalization_gap"] == pytest.approx(gap)
    for row in rows:
        assert row["test"]["accuracy"] == pytest.approx(100 * (1 - row["test"]["errors"] / 60))
    model = lure.build_model("small", 10, 1, (0.5,), (0.5,))
    connections = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    assert rows[0]["redrawn"] == pytest.approx(1 - round(0.8 * connections) / connections)
    shares = rows[0]["redrawn_by_tensor"]
    assert shares.keys() == {name for name, p in model.named_parameters() if p.ndim >= 2}
    redrawn = sum(share * model.get_parameter(name).numel() for name, share in shares.items())
    assert redrawn == pytest.approx(rows[0]["redrawn"] * connections)
    assert rows[1]["redrawn"] is rows[1]["redrawn_by_tensor"] is rows[1]["forgotten"] is None


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_the_share_kept_is_that_of_the_configuration(keep):
    assert lure.run(tiny(keep=keep))["mega_batches"][0]["redrawn"] == pytest.approx(1 - keep, abs=1e-5)


def test_a_loss_that_is_not_finite_on_the_test_set_alone_is_found(tmp_path, monkeypatch):
    def broken_network(*args):
        model = build(*args)
        model.fc.register_forward_hook(lambda m, x, out: out * math.inf if len(out) == 60 else out)
        return model

    build = lure.build_model
    monkeypatch.setattr(lure, "build_model", broken_network)
    with pytest.raises(FloatingPointError, match="mega-batch 1 of 2"):
        lure.run(tiny(out=str(tmp_path / "x.json")))
    assert not list(tmp_path.iterdir())


def test_every_method_gets_the_same_stream_start_and_order():
    runs = [watched(tiny(seed=3, epochs=2), forget) for forget in (lure.lure_, nothing, redraw_all)]
    (first, epochs), *others = runs
    for other, its_epochs in others:
        assert learned(first["mega_batches"][0]) == learned(other["mega_batches"][0])
        assert same(epochs[0].start, its_epochs[0].start) and len(epochs) == len(its_epochs) == 4
        for a, b in zip(epochs, its_epochs, strict=True):
            assert torch.equal(a.train, b.train) and torch.equal(a.rng, b.rng)
    assert not same(epochs[2].start, others[0][1][2].start)


def test_forgetting_happens_between_mega_batches():
    calls = []

    def forget(model, pi, upcoming, fresh, generator):
        calls.append(state(model))
        with torch.no_grad():
            next(model.parameters()).zero_()

    _, epochs = watched(tiny(mega_batches=4), forget, untrained)
    assert len(calls) == 3 and len(epochs) == 4
    assert [bool(e.start["conv1.weight"].any()) for e in epochs] == [True, False, False, False]
    assert same(calls[0], epochs[0].end)


@pytest.mark.parametrize("replay", ["full", "buffer", "none"])
@pytest.mark.parametrize("pi", ["learned", "seen", "next"])
def test_pi_is_a_share_of_what_it_is_drawn_from(pi, replay):
    config = tiny(pi=pi, replay=replay, buffer_size=9, mega_batches=3, seed=8, label_noise=0.3)
    samples = []
    _, epochs = watched(config, lambda model, pi, *rest: samples.append(pi), untrained)
    data, labels, stream = streamed(config)
    assert [e.train.tolist() for e in epochs] == [b.train.tolist() for b in stream]
    assert len(samples) == 2
    for i, (images, targets) in enumerate(samples):
        source = {"learned": stream[i].new, "seen": stream[i].train, "next": stream[i + 1].new}[pi]
        assert len(targets) == round(0.2 * len(source)) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert pairs(images, targets) <= pairs(data.images[source], labels[source])


def test_without_validation_there_is_no_gap():
    record = lure.run(tiny(val_fraction=0))
    nothing = dict(accuracy=None, errors=0, loss=None, ece=None)
    assert [row["val"] for row in record["mega_batches"]] == [nothing] * 2
    assert record["totals"]["generalization_gap"] is None


def test_a_process_with_other_data_than_the_first_is_refused(monkeypatch):
    monkeypatch.setattr(lure, "by_first", lambda call: {"sha256": "other"})
    with pytest.raises(lure.DataError, match="the data of the first process"):
        lure.run(tiny())


def test_what_is_forgotten_is_measured_right_after_forgetting():
    ends = []

    def forget(model, *rest):
        redraw_all(model, *rest)
        data = lure.load_dataset("digits", limit=120, limit_test=60)
        logits = model.eval()(data.test_images / 255).detach()
        loss = float(nn.functional.cross_entropy(logits, data.test_labels))
        ends.append((float((logits.argmax(1) == data.test_labels).double().mean()), loss))

    rows = lure.run(tiny(mega_batches=3), forget)["mega_batches"]
    assert rows[2]["forgotten"] is None and len(ends) == 2
    for row, (accuracy, loss) in zip(rows, ends, strict=False):
        assert row["forgotten"] == dict(accuracy=pytest.approx(100 * accuracy), loss=pytest.approx(loss))
        assert row["redrawn_by_tensor"] is None and row["forgotten"]["loss"] != row["test"]["loss"]


def test_convolutions_in_float32_are_not_rounded(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    lure.run(tiny(mega_batches=1, epochs=1))
    assert torch.backends.cudnn.allow_tf32 is False


def test_pi_is_never_empty():
    samples = []
    lure.run(tiny(pi_fraction=1e-6), lambda model, pi, *rest: samples.append(pi))
    assert [len(labels) for _, labels in samples] == [1]


@pytest.mark.parametrize("replay", ["full", "buffer", "none"])
def test_upcoming_yields_what_is_trained_on_next_and_the_newest_last(replay):
    config = tiny(replay=replay, buffer_size=9, mega_batches=4, seed=2)
    calls = []

    def forget(model, pi, upcoming, *rest):
        calls.append([list(upcoming()), list(upcoming())])

    watched(config, forget, untrained)
    data, labels, stream = streamed(config)
    for i, (yielded, again) in enumerate(calls):
        train = set(stream[i + 1].train.tolist())
        held = [[j for j in b.new.tolist() if j in train] for b in stream[: i + 2]]
        expected = [pairs(data.images[h], labels[h]) for h in held if h]
        assert [pairs(*pair) for pair in yielded] == [pairs(*pair) for pair in again] == expected
        assert replay == "buffer" or len(yielded) == {"full": i + 2, "none": 1}[replay]
        new = stream[i + 1].new
        assert pairs(*yielded[-1]) == pairs(data.images[new], labels[new])


def test_fresh_builds_new_networks_of_the_same_kind():
    built = []

    def forget(model, pi, upcoming, fresh, generator):
        built.extend([state(model), state(fresh()), state(fresh())])

    lure.run(tiny(), forget)
    trained, a, b = built
    assert [(k, v.shape) for k, v in a.items()] == [(k, v.shape) for k, v in trained.items()]
    assert not torch.equal(a["conv1.weight"], b["conv1.weight"])
    assert not a["bn1.running_mean"].any() and trained["bn1.running_mean"].any()


@pytest.mark.parametrize(("replay", "validation"), [("full", [6, 12]), ("buffer", [6, 6]), ("none", [6, 6])])
def test_validation_is_of_all_mega_batches_so_far_under_full_replay_alone(replay, validation):
    real, sizes = lure.evaluate, []

    def spy(model, pixels, labels):
        sizes.append(len(labels))
        return real(model, pixels, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "evaluate", spy)
        watched(tiny(replay=replay, buffer_size=9), nothing, untrained)
    train = [54, {"full": 108, "buffer": 63, "none": 54}[replay]]
    assert sizes == [train[0], validation[0], 60, 60, train[1], validation[1], 60]  # forgotten: 60 again


@pytest.mark.parametrize(("select", "chosen"), [("last", 2), ("best-val", 1)])
def test_a_mega_batch_ends_with_the_weights_of_the_chosen_epoch(select, chosen, tmp_path):
    evaluate, train_epoch, done, ends = lure.evaluate, lure.train_epoch_, [], []

    def scripted(model, pixels, labels):
        return evaluate(model, pixels, labels) | dict(accuracy=[10, 90, 50][(len(done) - 1) % 3])

    def counted(*args):
        done.append(1)
        return train_epoch(*args)

    path = tmp_path / "weights.pt"
    config = tiny(select=select, epochs=3, batch_size=16, checkpoint=str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "evaluate", scripted)
        _, epochs = watched(config, lambda model, *rest: ends.append(state(model)), counted)
    ends.append(torch.load(path, weights_only=True)["weights"])
    for i, end in enumerate(ends):
        agrees = [same(end, e.end) for e in epochs[3 * i : 3 * i + 3]]
        assert agrees == [j == chosen for j in range(3)]


def test_the_checkpoint_gives_the_recorded_test_accuracy(tmp_path):
    path = tmp_path / "deep" / "weights.pt"
    record = lure.run(tiny(checkpoint=str(path), epochs=3))
    stored = torch.load(path, weights_only=True)
    mean, std, *_ = lure.PREPROCESSING["digits"]
    model = lure.build_model("small", 10, 1, mean, std).eval()
    model.load_state_dict(stored["weights"])
    data = lure.load_dataset("digits", limit=120, limit_test=60)
    with torch.no_grad():
        wrong = int((model(data.test_images / 255).argmax(1) != data.test_labels).sum())
    assert record["mega_batches"][-1]["test"]["errors"] == wrong
    assert stored["config"] == record["config"] and stored["classes"] == data.classes


@pytest.mark.parametrize("keep_momentum", [False, True])
def test_momentum_outlives_the_mega_batch_only_if_asked(keep_momentum):
    _, epochs = watched(tiny(keep_momentum=keep_momentum, epochs=2), nothing)
    tensors = len(list(lure.build_model("small", 10, 1, (0.5,), (0.5,)).parameters()))
    assert [e.momentum for e in epochs] == [0, tensors, tensors if keep_momentum else 0, tensors]
    assert (epochs[0].optimizer is epochs[2].optimizer) == keep_momentum


@pytest.mark.parametrize(
    ("epochs", "decays"),
    [
        (1, [0]),
        (2, [0, 1]),
        (5, [0, 0, 1, 1, 2]),
        (10, [0] * 4 + [1] * 4 + [2] * 2),
        (50, [0] * 20 + [1] * 20 + [2] * 10),
    ],
)
def test_the_rate_decays_after_40_and_80_percent_of_the_epochs(epochs, decays):
    _, seen = watched(tiny(epochs=epochs, lr=0.2, gamma=0.3, keep_momentum=True), nothing, untrained)
    assert [e.rate for e in seen] == pytest.approx([0.2 * 0.3**d for d in decays] * 2)


# ------------------------------------------------------------ Command line


def arguments(**changes):
    return [x for k, v in (TINY | changes).items() for x in (f"--{k.replace('_', '-')}", str(v))]


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_the_command_line_runs_writes_the_record_and_prints_the_totals(record, tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    assert lure.main(arguments(seed=5, out=out)) == 0
    written = strict_json(out.read_text())
    assert strict_json(capsys.readouterr().out) == written["totals"]
    assert without_times(written)["mega_batches"] == without_times(record)["mega_batches"]
    assert [path.name for path in out.parent.iterdir()] == ["record.json"]


def test_a_finished_run_is_not_repeated_and_not_overwritten(tmp_path, capsys):
    out = tmp_path / "record.json"
    assert lure.main(arguments(out=out)) == 0
    content, printed = out.read_bytes(), capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "train_epoch_", lambda *args: pytest.fail("trained again"))
        assert lure.main(arguments(out=out)) == 0
        assert capsys.readouterr().out == printed
        assert lure.main(arguments(out=out, seed=9)) == 2
        assert "seed 1, not 9" in capsys.readouterr().err
    assert out.read_bytes() == content
    out.write_text("{")
    assert lure.main(arguments(out=out)) == 2 and out.read_text() == "{"


@pytest.mark.parametrize(
    ("batch_size", "mega_batches"),
    [(16, 2), (64, 2), (128, 1)],  # the last two make one step, on a loss that is still finite
)
def test_a_loss_that_is_not_finite_ends_the_run_without_a_record(batch_size, mega_batches, tmp_path, capsys):
    changes = dict(lr=1e18, batch_size=batch_size, mega_batches=mega_batches, out=tmp_path / "record.json")
    assert lure.main(arguments(**changes)) == 1
    message = capsys.readouterr().err
    assert f"mega-batch 1 of {mega_batches}" in message and "epoch 1" in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_error_of_a_loss_that_is_not_finite_names_mega_batch_and_epoch():
    def failing(model, optimizer, pixels, labels, train, config, generator):
        return torch.tensor(math.inf if len(train) > 54 else 1.0), torch.tensor(0.5)

    with pytest.raises(FloatingPointError, match=r"mega-batch 2 of 2.*epoch 1\b"):
        watched(tiny(), nothing, failing)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", 0),
        ("--keep", 0),
        ("--keep", 1.1),
        ("--keep", "nan"),
        ("--lr", -1),
        ("--lr", "inf"),
        ("--batch-size", 1),
        ("--val-fraction", 1),
        ("--arch", "alexnet"),
        ("--replay", "some"),
        ("--mega-batches", 121),
        ("--device", "nowhere"),
        ("--seed", -1),
        ("--label-noise", 1.5),
    ],
)
def test_a_value_out_of_range_is_one_line_and_status_2(flag, value, capsys):
    assert lure.main([*arguments(), flag, str(value)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert flag in captured.err or flag == "--mega-batches"


def test_best_val_without_validation_is_refused(capsys):
    assert lure.main(arguments(select="best-val", val_fraction=0)) == 2
    assert "--val-fraction" in capsys.readouterr().err


def test_too_many_shots_are_wrong_data_and_status_1(capsys):
    assert lure.main(arguments(shots=1000)) == 1
    assert "--shots 1000" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--no-such-flag"], ["--epochs", "many"], ["stray"]])
def test_the_parser_refuses_what_it_does_not_know(wrong, capsys):
    with pytest.raises(SystemExit) as refusal:
        lure.main(wrong)
    assert refusal.value.code == 2 and wrong[-1] in capsys.readouterr().err
