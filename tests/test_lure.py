import ast
import copy
import hashlib
import inspect
import json
import math
import pickle
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, fields
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, examples, same, seeded, seeds, small_config, small_data, state, timeless
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

import baselines
import lure

fractions = st.sampled_from([0.0, 0.05, 0.1, 1 / 3, 0.5, 0.9])


def exactly(a, b):
    """The same tensors and numbers, however nested."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def pictures(n=4, side=8, channels=1, classes=3, **more):
    """A data set of n training and 2 test images of noise, of which each class has as many."""
    images = torch.randint(256, (n + 2, side, side, channels), dtype=torch.uint8, generator=seeded(n))
    labels = torch.arange(n + 2) % classes
    names = [f"class {c}" for c in range(classes)]
    return lure.Dataset(images[:n], labels[:n], images[n:], labels[n:], names)._replace(**more)


# ------------------------------------------------------------ Settings
NUMBERS = [f for f in fields(lure.Config) if type(f.default) in (int, float)]
assert {f.name for f in NUMBERS} == lure.LIMITS.keys()


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_number_is_refused_outside_its_bounds_alone(field):
    kind = type(field.default)
    low, high = map(kind, lure.LIMITS[field.name])
    for value in (low, field.default, high):
        assert getattr(lure.Config(**{field.name: value}), field.name) == value
    outside = (math.nextafter(low, -1), math.nextafter(high, math.inf), math.nan, math.inf)
    for value in (low - 1, high + 1) if kind is int else outside:
        with pytest.raises(ValueError, match=f"^--{field.name.replace('_', '-')}: expected .*; got "):
            lure.Config(**{field.name: value})


def test_the_network_is_by_default_the_one_for_the_data():
    found = [lure.Config(dataset).arch for dataset in ("digits", "cifar10", "cifar100")]
    assert found == ["small", "resnet18", "resnet18"]
    assert lure.Config("digits", arch="resnet50").arch == "resnet50"
    assert {"auto", *lure.NETWORKS} - {"vgg16_bn"} == {*lure.ARCHITECTURES}  # which experiments/runs.py adds


# ------------------------------------------------------------ Stream
@st.composite
def streams(draw, replay=("full", "buffer", "none")):
    """Arguments of `mega_batches`, and the sizes that its mega-batches must have, smallest first."""
    sizes = draw(st.integers(2, 12)), draw(st.integers(1, 6))
    smallest, t = sizes
    n = smallest * t + draw(st.integers(0, t - 1))
    fraction = draw(fractions.filter(lambda f: all(round(f * s) < s for s in (smallest, -(-n // t)))))
    return n, t, draw(st.sampled_from(replay)), draw(st.integers(0, 15)), fraction


def validation_parts(stream, replay):
    """The validation part of each mega-batch itself: under full replay, `val` is of all so far."""
    if replay != "full":
        return [batch.val for batch in stream]
    starts = [0, *(len(batch.val) for batch in stream)]
    for earlier, later in pairwise(stream):
        assert torch.equal(later.val[: len(earlier.val)], earlier.val)
    return [batch.val[start:] for batch, start in zip(stream, starts, strict=False)]


@given(streams(), seeds)
def test_the_stream_is_one_division_of_all_samples(arguments, seed):
    n, t, *_, fraction = arguments
    stream = lure.mega_batches(*arguments, seeded(seed))
    vals = validation_parts(stream, arguments[2])
    sizes = [len(val) + len(b.new) for val, b in zip(vals, stream, strict=True)]
    assert len(sizes) == t and max(sizes) - min(sizes) <= 1
    assert [len(val) for val in vals] == [max(1, round(fraction * size)) for size in sizes]
    assert sorted(torch.cat([*vals, *(b.new for b in stream)]).tolist()) == list(range(n))
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
    by_sample = torch.zeros(44)
    together = 0
    for seed in range(repeats):
        stream = lure.mega_batches(44, 4, "buffer", buffer_size, 0.1, seeded(seed))
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
    assert (by_sample / repeats - 6 / 44).abs().max() < 4.5 * (6 / 44 * 38 / 44 / repeats) ** 0.5
    assert abs(together / repeats - 6 * 5 / (30 * 29)) < 0.02


@given(seeds, seeds)
def test_the_stream_is_a_function_of_the_seed(seed, other):
    def stream(seed):
        return [part.tolist() for b in lure.mega_batches(60, 3, "buffer", 7, 0.2, seeded(seed)) for part in b]

    assert stream(seed) == stream(seed)
    assert other == seed or stream(other) != stream(seed)


@pytest.mark.parametrize(
    ("samples", "mega_batches", "fraction"),
    [(10, 11, 0.1), (10, 10, 0.9), (10, 2, 1.0), (0, 1, 0.1)],
)
def test_a_stream_of_which_a_part_has_nothing_to_train_on_is_refused(samples, mega_batches, fraction):
    with pytest.raises(ValueError, match=f"{samples} samples do not make {mega_batches} mega-batches"):
        lure.mega_batches(samples, mega_batches, val_fraction=fraction)


@pytest.mark.parametrize(("replay", "size"), [("Full", 187), ("some", 187), ("buffer", -1), (None, 0)])
def test_a_replay_that_there_is_not_is_refused(replay, size):
    with pytest.raises(ValueError, match="expected replay full, buffer or none, of 0 or more; got"):
        lure.mega_batches(100, 4, replay, size)


def test_the_stream_is_by_default_the_papers():
    stream = lure.mega_batches(3000, 3, generator=seeded(1))
    assert [(len(b.val), len(b.new)) for b in stream] == [(100, 900), (200, 900), (300, 900)]
    assert [len(b.train) for b in stream] == [900, 1800, 2700]
    assert [len(b.train) for b in lure.mega_batches(3000, 3, "buffer")] == [900, 1087, 1087]


@given(st.integers(2, 30), st.integers(1, 5), fractions | st.just(1.0), st.integers(0, 2**30 - 1))
def test_noisy_labels_are_labels_and_a_function_of_the_seed(n, classes, probability, seed):
    data = pictures(n, classes=classes)
    config = lure.Config("digits", label_noise=probability, mega_batches=1, seed=seed)
    before = data.labels.clone()
    noisy, stream = lure.draw_stream(config, data)
    assert noisy.labels.dtype == torch.int64 and noisy.labels.shape == (n,)
    assert ((noisy.labels >= 0) & (noisy.labels < classes)).all()
    assert torch.equal(data.labels, before) and (probability > 0 or torch.equal(noisy.labels, before))
    exactly([noisy.images, *noisy[2:4]], [data.images, *data[2:4]])
    again, same_stream = lure.draw_stream(config, data)
    exactly([again.labels, *same_stream], [noisy.labels, *stream])


@pytest.mark.parametrize("probability", [0.2, 0.6, 1.0])
def test_noise_redraws_over_all_classes_the_true_one_among_them(probability):
    classes, n = 5, 20000
    labels = torch.randint(classes, (n,), generator=seeded(1))
    data = pictures(classes=classes, labels=labels)
    noisy = lure.draw_stream(lure.Config(label_noise=probability), data)[0].labels
    for c in range(classes):
        counts = noisy[labels == c].bincount(minlength=classes) / (labels == c).sum()
        expected = torch.full((classes,), probability / classes)
        expected[c] += 1 - probability
        assert (counts - expected).abs().max() < 0.03
    assert abs((noisy != labels).double().mean() - probability * (classes - 1) / classes) < 0.015


def test_the_stream_of_a_run_is_as_its_settings_say_and_differs_by_the_seed():
    data = pictures(60)

    def stream(**changes):
        return lure.draw_stream(lure.Config(mega_batches=3, val_fraction=0.2, **changes), data)[1]

    sizes = [(len(b.val), len(b.new), len(b.train)) for b in stream(replay="buffer", buffer_size=7)]
    assert sizes == [(4, 16, 16), (4, 16, 23), (4, 16, 23)]
    assert [len(b.train) for b in stream()] == [16, 32, 48]
    assert not torch.equal(stream(seed=1)[0].train, stream(seed=2)[0].train)


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


class Language(nn.Module):
    """A causal transformer: the logits at a place tell of the next token. Input and output share a weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        later = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], dtype=x.dtype)
        return self.head(self.layer(x, later, is_causal=True))


class Pair(nn.Module):
    """A network that returns more than its logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        features = torch.tanh(self.body(x))
        return features, self.head(features)


def of_tokens(output, labels):
    return F.cross_entropy(output.transpose(1, 2), labels, reduction="none")


def of_both(output, labels):
    features, logits = output
    return lure.cross_entropies(logits, labels) + features.square().mean(dim=1)


INPUTS = {
    mlp: lambda n: torch.randn(n, 3),
    frozen: lambda n: torch.randn(n, 3),
    Tied: lambda n: torch.randn(n, 3),
    Unused: lambda n: torch.randn(n, 3),
    convolutional: lambda n: torch.randn(n, 2, 4, 4),
    Language: lambda n: torch.randint(6, (n, 5)),
    Pair: lambda n: torch.randn(n, 3),
}
LOSSES = {Language: of_tokens, Pair: of_both}  # of the others, the default


def problem(build, n=5, seed=0, dtype=torch.float64):
    """The first arguments of `connection_sensitivity`."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model, images = build().to(dtype), INPUTS[build](n)
        labels = torch.randint(2, images.shape if build is Language else (n,))
    images = images.to(dtype) if images.is_floating_point() else images
    return model, images, labels, LOSSES.get(build, lure.cross_entropies)


@torch.no_grad()
def slow_sensitivity(model, images, labels, loss, step=1e-5):
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
                losses.append(loss(model(images), labels).mean())
            flat[j] = weight
            derivative[name].view(-1)[j] = (losses[0] - losses[1]).abs() / (2 * step)
    total = sum(d.sum() for d in derivative.values())
    return {name: d / (total if total > 0 else 1) for name, d in derivative.items()}


@pytest.mark.parametrize("build", INPUTS)
@examples(5)
@given(st.integers(1, 7), st.sampled_from([1, 3, 256]), seeds)
def test_sensitivity_is_the_derivative_by_the_mask(build, n, chunk, seed):
    model, images, labels, loss = problem(build, n, seed)
    with torch.no_grad():
        for p in model.parameters():
            p[torch.rand(p.shape, generator=seeded(seed)) < 0.1] = 0
    scores = lure.connection_sensitivity(model, images, labels, loss, chunk)
    expected = slow_sensitivity(model, images, labels, loss)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    total = sum(s.sum().item() for s in scores.values())
    assert total == pytest.approx(1 if any(s.any() for s in expected.values()) else 0)


@pytest.mark.parametrize("n, sizes", [(64, [64]), (65, [65]), (66, [64, 2]), (129, [64, 65]), (1, [1])])
def test_sensitivity_takes_64_images_at_a_time_and_never_a_last_one_alone(n, sizes):
    model, images, labels, _ = problem(mlp, n=n)
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    lure.connection_sensitivity(model, images, labels)
    assert seen == sizes
    if n > 1:
        with pytest.raises(ValueError, match=rf"as many samples in each, got \[{n}, {n - 1}\]"):
            lure.connection_sensitivity(model, images, labels[1:])


@given(st.integers(1, 40), st.integers(1, 9))
def test_chunks_are_all_samples_in_order_and_of_the_size_but_for_the_last(n, size):
    parts = [part for (part,) in lure.chunks(size, torch.arange(n))]
    assert torch.equal(torch.cat(parts), torch.arange(n))
    sizes = [len(part) for part in parts]
    assert all(s == size for s in sizes[:-1])
    assert sizes[-1] <= size + 1 and (n == 1 or size == 1 or sizes[-1] > 1)


class Adapter(nn.Linear):
    """Adds B · A to its weight in evaluation mode, and takes it away again: as adapters are merged."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.weight.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, inputs))
        self.b = nn.Parameter(torch.randn(outputs, 2))

    def train(self, mode=True):
        if mode != self.training:
            with torch.no_grad():
                self.weight += (1 if not mode else -1) * (self.b @ self.a)
        return super().train(mode)

    def forward(self, x):
        return super().forward(x) + (x @ self.a.T @ self.b.T if self.training else 0)


@st.composite
def nested(draw):
    """A network of adapters and batch normalisation, some of its modules in the other mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(draw(seeds))
        inner = nn.Sequential(Adapter(3, 3), nn.Tanh(), nn.Sequential(Adapter(3, 3), nn.BatchNorm1d(3)))
        model = nn.Sequential(inner, nn.Linear(3, 2)).double()
    for module in model.modules():
        module.train(draw(st.booleans()))
    return model


@given(nested())
def test_every_modules_mode_is_put_back_and_what_it_does_with_it(model):
    x, modes = torch.randn(4, 3).double(), [m.training for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    statistics = [b.clone() for b in model.buffers()]
    with lure.evaluating(model):
        assert not any(m.training for m in model.modules())
        model(x)
    assert [m.training for m in model.modules()] == modes
    for p, before in zip(model.parameters(), weights, strict=True):
        torch.testing.assert_close(p.detach(), before, rtol=0, atol=1e-14)
    exactly([*model.buffers()], statistics)
    adapter = [model[0][0].a, model[0][0].b]  # it has a gradient in training mode alone
    gradients = torch.autograd.grad(model(x).sum(), adapter, allow_unused=True, materialize_grads=True)
    assert any(g.any() for g in gradients) == modes[2]


def test_labels_that_do_not_count_weigh_nothing_whatever_the_chunk():
    model = nn.Conv2d(3, 4, 3).double()
    generator = seeded(1)
    images = torch.rand(130, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (130, 4, 4), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 1.2, 130)[:, None, None]] = -100
    assert (labels[-16:] == -100).all()
    expected = slow_sensitivity(model, images, labels, lure.cross_entropies)
    for chunk in (1, 16, 64, 200):
        scores = lure.connection_sensitivity(model, images, labels, chunk=chunk)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="all sensitivities are 0"):
        lure.unlearn_(model, images, torch.full_like(labels, -100))


def test_a_layer_that_refuses_one_sample_is_scored_by_65():
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.ReLU(), nn.Linear(4, 3)
    _, images, labels, _ = problem(mlp, n=65, dtype=torch.float32)
    assert lure.connection_sensitivity(nn.Sequential(*layers), images, labels)


def test_what_cannot_be_ranked_is_refused_in_words():
    _, images, labels, _ = problem(mlp, dtype=torch.float32)
    frozen_whole = mlp().requires_grad_(False)
    for model, told in (
        (frozen_whole, "^found no weight to rank"),
        (nn.BatchNorm1d(3), "^found no weight to rank"),
        (nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3)), "^expected a network whose lazy layers"),
    ):
        with pytest.raises(ValueError, match=told):
            lure.unlearn_(model, images, labels)
    with pytest.raises(ValueError, match=r"^expected samples to score the weights by, got none$"):
        lure.unlearn_(mlp(), images[:0], labels[:0])


def test_a_loss_of_all_samples_together_is_refused():
    model, images, labels, _ = problem(mlp)
    for loss in (F.cross_entropy, partial(F.cross_entropy, reduction="sum")):
        with pytest.raises(ValueError, match=r"^expected a loss of each sample, as by reduction='none'"):
            lure.unlearn_(model, images, labels, loss=loss)


def masked(output, labels):
    """The losses of those tokens alone that are to be predicted."""
    losses = of_tokens(output, labels)
    return losses[labels > 2]


def test_a_loss_may_leave_out_what_it_likes_whatever_the_chunk():
    model, images, labels, _ = problem(Language, n=9)
    labels = torch.randint(6, images.shape, generator=seeded(1))
    labels[6:] = 0  # a chunk of which none counts
    whole = lure.connection_sensitivity(model, images, labels, masked, chunk=9)
    for chunk in (1, 2, 4):
        scores = lure.connection_sensitivity(model, images, labels, masked, chunk)
        torch.testing.assert_close(scores, whole)


def test_a_network_whose_scores_are_all_zero_is_not_unlearned():
    _, images, labels, _ = problem(mlp, dtype=torch.float32)
    flat = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    nn.init.zeros_(flat[2].weight)  # a head that starts at zero
    scores = lure.connection_sensitivity(flat, images, labels)
    assert len(scores) == 2 and not any(s.any() for s in scores.values())
    for step in (unlearn_, lambda model, images, labels, loss: lure.unlearn_(model, images, labels)):
        before = state(flat)
        with pytest.raises(ValueError, match="all sensitivities are 0"):
            step(flat, images, labels, lure.cross_entropies)
        assert same(state(flat), before)
    with pytest.raises(
        FloatingPointError, match="the network cannot be unlearned: the loss depends on no weight"
    ):
        by_lure_(flat, images, labels, None)


class Auxiliary(nn.Module):
    """A network with a head that evaluation mode skips."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Linear(3, 40), nn.Linear(40, 3), nn.Linear(40, 3)

    def forward(self, x):
        x = torch.tanh(self.body(x))
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_what_the_loss_does_not_reach_goes_first_unless_it_is_frozen():
    _, images, labels, _ = problem(mlp, dtype=torch.float32)
    model = Auxiliary()
    mask = lure.unlearn_(model, images, labels, keep=2 / 3)
    assert not mask["auxiliary.weight"].any() and mask["body.weight"].all() and mask["head.weight"].all()
    model.auxiliary.requires_grad_(False)
    before = state(model)
    mask = lure.unlearn_(model, images, labels, keep=2 / 3)
    assert mask.keys() == {"body.weight", "head.weight"}
    assert torch.equal(model.auxiliary.weight, before["auxiliary.weight"])


NO_MASKS = [
    ({"0.weight": torch.zeros(3, 4).bool()}, r"torch.bool \(3, 4\)"),
    ({"_orig_mod.0.weight": torch.zeros(4, 3).bool()}, r"torch.bool \(4, 3\)"),
    ({"0.weight": torch.zeros(4, 3)}, r"torch.float32 \(4, 3\)"),
]


@pytest.mark.parametrize("wrong, found", NO_MASKS)
def test_a_mask_of_another_model_is_refused_before_anything_changes(wrong, found):
    model = mlp()
    before = state(model)
    mask = {"3.weight": torch.zeros(3, 4, dtype=torch.bool)} | wrong
    told = f"^{next(iter(wrong))}: expected bool, in the shape of a parameter of the model; got {found}$"
    with pytest.raises(ValueError, match=told):
        lure.reinitialize_(model, mask)
    assert same(state(model), before)


def test_a_weight_of_no_inputs_has_nothing_to_redraw():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(0, 4))
    mask = {
        name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters() if p.ndim > 1
    }
    before = state(model)
    lure.reinitialize_(model, mask)
    assert (model[0].weight != before["0.weight"]).all()


def test_a_network_may_keep_a_tensor_of_its_forward_pass_for_training():
    class Caching(nn.Linear):
        cached = None

        def forward(self, x):
            if self.cached is None:
                self.cached = torch.arange(3.0) * self.weight.new_ones(())
            return super().forward(x) * self.cached

    model = nn.Sequential(nn.Flatten(), Caching(64, 3))
    lure.evaluate(model, *pictures()[:2])
    model(torch.rand(2, 64)).sum().backward()  # of an inference tensor it would raise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scores_have_the_shape_of_the_weights_and_their_dtype_or_float32(dtype):
    model, *rest = problem(mlp, n=50, dtype=dtype)
    scores = lure.connection_sensitivity(model, *rest)
    weights = {name: p for name, p in model.named_parameters() if name in scores}
    at_least = torch.promote_types(dtype, torch.float32)  # half a precision cannot tell small scores
    for name, p in weights.items():
        assert scores[name].dtype == at_least and scores[name].shape == p.shape
    assert not any(s.requires_grad for s in scores.values())
    assert float(sum(s.double().sum() for s in scores.values())) == pytest.approx(1, abs=1e-3)


def test_sensitivity_leaves_model_gradients_and_random_state_alone():
    model, images, labels, _ = problem(convolutional)
    model = nn.Sequential(model, nn.Dropout(0.5)).train()
    model[0][1].eval()
    model[0][3].weight.requires_grad_(False)
    first, *others = model.parameters()
    first.grad = torch.randn_like(first)
    before, rng, gradient = state(model), torch.get_rng_state(), first.grad.clone()
    flags = [m.training for m in model.modules()]
    wanted = [p.requires_grad for p in model.parameters()]
    lure.connection_sensitivity(model, images, labels)
    assert same(state(model), before) and torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == flags and len(set(flags)) == 2
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert torch.equal(first.grad, gradient) and all(p.grad is None for p in others)
    with pytest.raises(TypeError):
        lure.connection_sensitivity(model, images, labels, None)
    assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
@pytest.mark.parametrize("build", [mlp, convolutional, Language, Pair])
def test_sensitivity_is_the_same_without_gradients_and_under_autocast(build, context):
    model, images, labels, loss = problem(build, dtype=torch.float32)
    autocast = []

    def watched(output, y):
        autocast.append(torch.is_autocast_enabled("cpu"))
        return loss(output, y)

    expected = lure.connection_sensitivity(model, images, labels, watched)
    with context():
        scores = lure.connection_sensitivity(model, images, labels, watched)
    assert same(scores, expected) and all(s.dtype == torch.float32 for s in scores.values())
    assert len(autocast) >= 2 and not any(autocast)


# ------------------------------------------------------------ Mask
shapes = st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 1, 2)])
values = st.sampled_from([0.0, 0.0, 0.25, 1.0, math.inf]) | st.floats(0, 2, width=32)
keeps = st.sampled_from([1e-12, 0.01, 0.25, 0.5, 0.8, 0.99, 1.0]) | st.floats(1e-12, 1)


@st.composite
def scored(draw):
    """Scores by name, at least one."""
    result = {}
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=4))):
        flat = draw(st.lists(values, min_size=math.prod(shape), max_size=math.prod(shape)))
        result[f"weight{9 - i}"] = torch.tensor(flat).view(shape)
    assume(any(s.numel() for s in result.values()))
    return result


@examples(200)
@given(scored(), keeps)
def test_the_mask_keeps_the_first_k_of_a_stable_sort(scores, keep):
    before = {name: s.clone() for name, s in scores.items()}
    mask = lure.top_k_mask(scores, keep)
    flat = [x for s in scores.values() for x in s.flatten().tolist()]
    k = max(1, round(keep * len(flat)))
    kept = set(sorted(range(len(flat)), key=lambda j: -flat[j])[:k])
    assert [x for m in mask.values() for x in m.flatten().tolist()] == [j in kept for j in range(len(flat))]
    assert list(mask) == list(scores) and all(mask[n].shape == s.shape for n, s in scores.items())
    assert all(m.dtype == torch.bool for m in mask.values()) and same(scores, before)


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.0001, 2, math.inf, math.nan])
def test_a_share_that_cannot_be_kept_is_refused_and_a_score_that_cannot_be_ranked(keep):
    for scores, share in (({"w": torch.rand(3)}, keep), ({"w": torch.tensor([[1.0, math.nan]])}, 0.5)):
        with pytest.raises(ValueError, match=rf"in \(0, 1\], got {share}|w: a score is NaN"):
            lure.top_k_mask(scores, share)


# ------------------------------------------------------------ Reinitialisation
def random_mask(model, share, seed):
    generator = seeded(seed)
    weights = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in weights.items()}


@pytest.mark.parametrize("build", [mlp, convolutional, Language, Tied])
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
    lure.reinitialize_(model, mask, seeded(seed))
    tied = {Tied: {"second.weight": "first.weight"}, Language: {"head.weight": "embedding.weight"}}
    twins = tied.get(build, {})
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


def unlearn_(model, images, labels, loss):
    return lure.unlearn_(model, images, labels, loss=loss)


def by_lure_(model, images, labels, loss):
    return lure.lure_(model, lure.Between((images, labels), None, None, None, None))


@pytest.mark.parametrize("build, step", [(mlp, by_lure_), (mlp, unlearn_), (Language, unlearn_)])
def test_unlearning_keeps_80_percent_and_redraws_the_others(build, step):
    model, *pi = problem(build)
    before = state(model)
    mask = step(model, *pi)
    kept = torch.cat([m.flatten() for m in mask.values()])
    assert int(kept.sum()) == round(0.8 * len(kept))
    changed = torch.cat([(model.get_parameter(name) != before[name]).flatten() for name in mask])
    assert torch.equal(changed, ~kept)


@pytest.mark.parametrize("build", INPUTS)
@examples(5)
@given(keeps, seeds)
def test_unlearning_is_score_mask_redraw(build, keep, seed):
    model, images, labels, loss = problem(build, seed=seed)
    twin = copy.deepcopy(model)
    mask = lure.unlearn_(model, images, labels, keep, seeded(seed), loss)
    expected = lure.top_k_mask(lure.connection_sensitivity(twin, images, labels, loss), keep)
    lure.reinitialize_(twin, expected, seeded(seed))
    assert same(mask, expected) and same(state(model), state(twin))


# ------------------------------------------------------------ Metrics
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8), max_size=5))
def test_cumulative_error_rate_counts_every_miss(tests):
    errors = [sum(prediction != label for prediction, label in test) for test in tests]
    expected = sum(1 for test in tests for prediction, label in test if prediction != label)
    for given_errors in (errors, torch.tensor(errors), iter(errors)):
        cer = lure.cumulative_error_rate(given_errors)
        assert cer == expected and type(cer) is int
    with pytest.raises(ValueError, match="expected counts"):
        lure.cumulative_error_rate([*errors, 0.5])


@given(st.integers(1, 60), st.integers(2, 6), st.sampled_from([1, 2, 7, 10, 15, 40]), seeds)
def test_calibration_error_agrees_with_torchmetrics(n, classes, bins, seed):
    generator = seeded(seed)
    probabilities = (3 * torch.randn(n, classes, generator=generator)).softmax(1)
    labels = torch.randint(classes, (n,), generator=generator)
    expected = multiclass_calibration_error(probabilities, labels, classes, n_bins=bins, norm="l1")
    assert lure.expected_calibration_error(probabilities, labels, bins) == pytest.approx(
        float(expected), abs=1e-5
    )


edges = st.sampled_from([i / 16 for i in range(2, 17)])  # exact, like i / bins where it is one of them


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


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: p.log(),
        lambda p: 100 * p,
        lambda p: 10 * p - 1,
        lambda p: (10 * p).clamp(0, 1),
        lambda p: torch.where(p > 0.5, math.nan, p),
    ],
)
def test_a_calibration_error_of_what_is_no_probability_is_refused(wrong):
    probabilities = (5 * torch.rand(50, 3, generator=seeded(1))).softmax(1)
    with pytest.raises(ValueError, match=r"expected probabilities, in \[0, 1\] and of sum 1"):
        lure.expected_calibration_error(wrong(probabilities), torch.zeros(50).long())


@pytest.mark.parametrize("labels", [[0], [0, 1, 3], [0, 1, -100], [[0], [1], [2]]])
def test_a_calibration_error_by_what_are_no_labels_is_refused(labels):
    with pytest.raises(ValueError, match="expected a class, from 0 to 2, for each of one or more samples"):
        lure.expected_calibration_error(torch.full((3, 3), 1 / 3), torch.tensor(labels))
    with pytest.raises(ValueError, match="expected a class"):
        lure.expected_calibration_error(torch.ones(0, 3), torch.zeros(0).long())


def test_calibration_error_has_15_bins_by_default():
    probabilities, labels = torch.rand(50, 3, generator=seeded(1)).softmax(1), torch.zeros(50).long()
    found = [lure.expected_calibration_error(probabilities, labels, *bins) for bins in ((), (15,), (16,))]
    assert found[0] == found[1] != found[2]


# ------------------------------------------------------------ Functions that lift out
SOURCE = ast.parse(Path(lure.__file__).read_text())
FUNCTIONS = [node.name for node in SOURCE.body if isinstance(node, ast.FunctionDef)]
SCORING = ["cross_entropies", "connections", "gradient_of_sum", "chunks", "evaluating"]
WITH = {"mega_batches": ["MegaBatch"], "connection_sensitivity": SCORING}
WITH["unlearn_"] = [*SCORING, "connection_sensitivity", "top_k_mask", "reinitialize_"]


def redrawn(reinitialize_):
    model, *_ = problem(mlp)
    reinitialize_(model, random_mask(model, 0.5, 1), seeded(1))
    return state(model)


USES = {
    "mega_batches": lambda f: f(20, 3, "buffer", 4, generator=seeded(1)),
    "connection_sensitivity": lambda f: f(*problem(Language)),
    "top_k_mask": lambda f: f({"w": torch.arange(5.0)}, 0.5),
    "reinitialize_": redrawn,
    "unlearn_": lambda f: f(*problem(mlp)[:3], generator=seeded(1)),
    "cumulative_error_rate": lambda f: f([3, 4]),
    "expected_calibration_error": lambda f: f(
        torch.rand(9, 3, generator=seeded(1)).softmax(1), torch.arange(9) % 3
    ),
}


@pytest.mark.parametrize("name", USES)
def test_a_core_function_works_with_nothing_but_the_imports_and_what_it_calls(name):
    imports = [node for node in SOURCE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    sources = [inspect.getsource(getattr(lure, part)) for part in (*WITH.get(name, ()), name)]
    namespace = {"__name__": "lifted"}
    exec("\n".join([ast.unparse(imports), *sources]), namespace)
    exactly(USES[name](namespace[name]), USES[name](getattr(lure, name)))


def test_those_are_all_from_unlearning_to_the_metrics():
    first, last = (FUNCTIONS.index(name) for name in ("cross_entropies", "expected_calibration_error"))
    assert set(FUNCTIONS[first : last + 1]) == {*USES, *SCORING}


def test_the_algorithm_is_read_at_a_glance_and_needs_no_other_file():
    assert len(inspect.getsource(lure.run).splitlines()) <= 50
    names = [alias.name for node in ast.walk(SOURCE) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(SOURCE) if isinstance(node, ast.ImportFrom)]
    roots = {name.split(".")[0] for name in names}
    assert "torch" in roots and not roots & {"baselines", "evaluate", "experiments"}


# ------------------------------------------------------------ Data
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


def test_augmentation_is_computed_on_the_device_of_the_images():
    pixels = torch.zeros(3, 8, 8, 1, dtype=torch.uint8, device="meta")
    index = torch.zeros(2, dtype=torch.int64, device="meta")
    assert lure.augmented(pixels, index, padding=4, flip=True, generator=None).device.type == "meta"


def test_augmentation_reaches_every_offset_and_both_mirrorings():
    pixels = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3, 1)
    views = lure.augmented(pixels, torch.zeros(400, dtype=torch.int64), 1, True, seeded(0))
    assert len(views.flatten(1).unique(dim=0)) == 2 * 3 * 3


def test_digits_are_whole_stratified_disjoint_and_twice_as_large():
    from sklearn.datasets import load_digits

    digits = lure.load_dataset("digits")
    assert digits.images.dtype == digits.test_images.dtype == torch.uint8 and len(digits.classes) == 10
    assert digits.images.shape == (1437, 16, 16, 1) and digits.test_images.shape == (360, 16, 16, 1)
    original, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    for targets in (digits.labels, digits.test_labels):
        counts = targets.bincount() / len(targets)
        assert (counts - labels.bincount() / 1797).abs().max() < 1 / len(targets)
    enlarged = F.interpolate((original.view(-1, 1, 8, 8) * 255 / 16), size=(16, 16), mode="bilinear")
    images = torch.cat([digits.images, digits.test_images]).double().flatten(1)
    distance, which = torch.cdist(images, enlarged.flatten(1), p=math.inf).min(dim=1)
    assert distance.max() <= 1 and which.sort().values.equal(torch.arange(1797))
    assert torch.equal(labels[which], torch.cat([digits.labels, digits.test_labels]))
    assert (digits.padding, digits.flip) == (1, False)
    assert float(digits.images.double().mean()) / 255 == pytest.approx(*digits.mean, abs=0.01)


@pytest.mark.parametrize(
    ("name", "key", "mean"),
    [("cifar10", "labels", (0.4914, 0.4822, 0.4465)), ("cifar100", "fine_labels", (0.5071, 0.4866, 0.4409))],
)
def test_cifar_is_read_by_torchvision(name, key, mean, tmp_path, monkeypatch):
    """A CIFAR of 20 images in the original format, with its checksums in place of the real ones."""
    source = getattr(lure.torchvision.datasets, name.upper())
    root, rows = tmp_path / source.base_folder, np.random.default_rng(0).integers(256, size=(40, 3072))
    root.mkdir()

    def stored(filename, content):
        (root / filename).write_bytes(pickle.dumps(content))
        return [filename, hashlib.md5((root / filename).read_bytes()).hexdigest()]

    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    for split, part in (("train", rows[:20]), ("test", rows[20:])):
        batch = {"data": part.astype(np.uint8), key: [i % 10 for i in range(20)]}
        monkeypatch.setattr(source, f"{split}_list", [stored(split, batch)])
    filename, digest = stored("meta", {source.meta["key"]: classes})
    monkeypatch.setattr(source, "meta", source.meta | {"filename": filename, "md5": digest})
    data = lure.load_dataset(name, str(tmp_path))
    assert data.classes == classes and data.mean == mean and (data.padding, data.flip) == (4, True)
    for part, images, labels in ((rows[:20], *data[:2]), (rows[20:], *data[2:4])):
        assert images.dtype == torch.uint8 and images.shape == (20, 32, 32, 3)
        assert torch.equal(images.permute(0, 3, 1, 2).flatten(1), torch.from_numpy(part))
        assert labels.dtype == torch.int64 and labels.tolist() == [i % 10 for i in range(20)]


def test_samples_are_inputs_of_the_network_with_their_labels():
    data = pictures(6, side=4, channels=3)
    images, labels = data.samples(torch.tensor([4, 1]))
    exactly(images, data.images[[4, 1]].permute(0, 3, 1, 2) / 255)
    assert labels.tolist() == [1, 1] and images.is_contiguous(memory_format=torch.channels_last)
    assert {tensor.device.type for tensor in data.to("meta")[:4]} == {"meta"}


# ------------------------------------------------------------ Networks
@pytest.mark.parametrize("arch", lure.NETWORKS)
def test_a_network_normalises_its_input_and_gives_logits(arch):
    mean, std = torch.tensor([0.5, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.4])
    data = pictures(channels=3, classes=7, mean=mean.tolist(), std=std.tolist())
    model = lure.build_model(arch, data, seeded(1)).eval()
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
    a, b, other = (state(lure.build_model(arch, pictures(), seeded(s))) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), rng)
    assert same(a, b) and not torch.equal(a["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(a["fc.weight"], other["fc.weight"])


def test_convolutions_start_kaiming_normal_by_fan_out():
    model = lure.build_model("small", pictures(), seeded(1))
    for m in model.modules():
        if isinstance(m, nn.Conv2d) and m.weight.numel() > 10000:
            expected = (2 / (m.out_channels * m.kernel_size[0] ** 2)) ** 0.5
            assert float(m.weight.detach().std()) == pytest.approx(expected, rel=0.05)


def test_the_small_network_is_named_like_a_resnet():
    names = [name for name, _ in lure.build_model("small", pictures(), seeded(1)).named_children()]
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
    data = pictures(padding=1, images=pixels, labels=torch.arange(n + 3) % 3)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return batches, lure.train_epoch_(model, optimizer, data, train, config, seeded(seed))


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
def test_an_epoch_returns_the_running_accuracy(n, batch_size, seed):
    batches, accuracy = epoch(n, batch_size, seed, lr=0.01)
    shown, logits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert float(accuracy) == pytest.approx(float((logits.argmax(1) == shown % 3).double().mean()))
    assert accuracy.dtype == torch.float64


@given(st.integers(1, 200), seeds)
def test_evaluation_is_of_all_samples_128_at_a_time(n, seed):
    pixels = torch.randint(256, (n, 8, 8, 1), dtype=torch.uint8, generator=seeded(seed))
    labels = torch.randint(3, (n,), generator=seeded(seed))
    model, sizes = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    found = lure.evaluate(model.train(), pixels, labels)
    assert sizes == ([129] if n == 129 else [128] * (n // 128) + [n % 128] * (n % 128 > 0))
    logits = model.eval()(pixels.view(n, 1, 8, 8) / 255).detach()
    right = int((logits.argmax(1) == labels).sum())
    assert found == dict(
        accuracy=pytest.approx(100 * right / n),
        errors=n - right,
        loss=pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5),
        ece=pytest.approx(lure.expected_calibration_error(logits.softmax(1), labels), abs=1e-6),
    )


def test_totals_are_the_sums_over_the_mega_batches_and_the_last_of_them():
    def row(train, val, test, errors, ece, passes, seconds):
        test = dict(accuracy=test, errors=errors, ece=ece)
        splits = dict(train=dict(accuracy=train), val=dict(accuracy=val), test=test)
        return splits | dict(image_passes=passes, seconds=seconds)

    rows = [row(50.0, 40.0, 30.0, 7, 0.5, 100, 1.5), row(90.0, 70.0, 60.0, 4, 0.25, 200, 2.5)]
    expected = dict(test_accuracy=60.0, cer=11, generalization_gap=20.0, ece=0.25)
    assert lure.totals(rows) == expected | dict(image_passes=300, seconds=4.0)


BEST = [([10, 90, 50], 1), ([50, 50, 10], 0), ([0, 0, 0], 0), ([0, 0, 0.5], 2)]


@pytest.mark.parametrize(
    ("select", "accuracies", "chosen"), [("last", [], 2), *(("best-val", *b) for b in BEST)]
)
def test_learning_ends_with_the_chosen_epoch_the_first_of_the_best(select, accuracies, chosen, monkeypatch):
    model, ends, seen = nn.Linear(2, 2), [], iter(accuracies)

    def train_epoch(model, *args):
        nn.init.constant_(model.weight, len(ends))
        ends.append(state(model))
        return torch.tensor(0.75)

    monkeypatch.setattr(lure, "train_epoch_", train_epoch)
    monkeypatch.setattr(lure, "evaluate", lambda *args: dict(accuracy=next(seen)))
    optimizer, index = torch.optim.SGD(model.parameters(), 0.1), torch.zeros(9, dtype=torch.int64)
    config = lure.Config("digits", select=select, epochs=3)
    start = time.perf_counter()
    batch = lure.MegaBatch(index, index, index)
    row = lure.learn_(model, optimizer, pictures(), batch, config, None)
    assert 0 < row["seconds"] < time.perf_counter() - start
    assert same(state(model), ends[chosen]) and row["image_passes"] == 27
    assert row.keys() == {"running_train_accuracy", "image_passes", "seconds"}
    assert row["running_train_accuracy"] == 75


def test_training_is_on_what_the_augmentation_of_the_data_makes_of_them():
    data, seen = pictures(6, padding=2, flip=True), []
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    optimizer, config = torch.optim.SGD(model.parameters(), 0.1), lure.Config(precision="float32")
    for now in (data, data._replace(padding=0, flip=False)):
        lure.train_epoch_(model, optimizer, now, torch.arange(6), config, seeded(0))
        generator = seeded(0)
        order = torch.randperm(6, generator=generator)
        exactly(seen.pop(), lure.augmented(data.images, order, now.padding, now.flip, generator))


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
    data, config = pictures(), lure.Config(precision=precision)
    cross_entropy, of = F.cross_entropy, set()

    def watched(logits, *more, **options):
        of.add(logits.dtype)
        return cross_entropy(logits, *more, **options)

    monkeypatch.setattr(F, "cross_entropy", watched)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    lure.train_epoch_(model, optimizer, data, torch.arange(4), config, seeded(0))
    lure.evaluate(model, *data[:2])
    assert seen == [(getattr(torch, expected), True), (torch.float32, False)]  # evaluation: always float32
    assert of == {p.dtype for p in model.parameters()} == {torch.float32}


# ------------------------------------------------------------ Algorithm 1
def nothing(model, between):
    return None


def redraw_all(model, between):
    torch.rand(1000, generator=between.generator)
    model.load_state_dict(between.fresh().state_dict())


def states(config, *rest, **more):
    """What a run yields, each as it was when it was yielded."""
    return [copy.deepcopy(now) for now in lure.run(config, small_data(), *rest, **more)]


def rows(config, *rest):
    return states(config, *rest)[-1]["mega_batches"]


def watched(config, forget=None, train_epoch=lure.train_epoch_, stream=None):
    """What a run yields, and what each of its epochs started with, was trained on and ended with."""
    epochs = []

    def spy(model, optimizer, data, train, config, generator):
        now = SimpleNamespace(start=state(model), data=data, train=train, rng=generator.get_state())
        now.rate, now.momentum = optimizer.param_groups[0]["lr"], len(optimizer.state)
        epochs.append(now)
        result = train_epoch(model, optimizer, data, train, config, generator)
        now.end = state(model)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "train_epoch_", spy)
        return states(config, forget, stream), epochs


def untrained(*args):
    return torch.tensor(0.5)


def pairs(images, labels):
    images = (images * 255).round().to(torch.uint8) if images.is_floating_point() else images
    return Counter((tuple(x), y) for x, y in zip(images.flatten(1).tolist(), labels.tolist(), strict=True))


@pytest.mark.numerics
def test_a_run_is_a_function_of_its_seed():
    first, again, other = (timeless(rows(small_config(seed=seed))) for seed in (5, 5, 6))
    assert first == again and first != other


def test_a_run_yields_after_each_mega_batch_the_rows_so_far_and_what_they_tell():
    yielded = [now["mega_batches"] for now in lure.run(small_config(seed=5), small_data())]
    assert [len(rows) for rows in yielded] == [1, 2] and yielded[0] == yielded[1][:1]
    assert [row["image_passes"] for row in yielded[1]] == [54, 108]
    for row in yielded[1]:
        assert row["test"]["accuracy"] == pytest.approx(100 * (1 - row["test"]["errors"] / 60))


RESUMED = [
    dict(),
    dict(keep_momentum=True),
    dict(select="best-val", epochs=3, replay="none"),
    dict(replay="buffer", buffer_size=9, label_noise=0.3, pi="next"),
]


@pytest.mark.parametrize("forget", [None, redraw_all])
@pytest.mark.parametrize("changes", RESUMED, ids=str)
def test_a_run_goes_on_from_any_state_as_if_it_had_not_stopped_and_leaves_the_state(changes, forget):
    config = small_config(mega_batches=3, **changes)
    whole = states(config, forget)
    for i, stopped in enumerate(whole):
        before = copy.deepcopy(stopped)
        exactly(timeless(states(config, forget, None, stopped)), timeless(whole[i + 1 :]))
        exactly(stopped, before)


def test_a_state_has_the_weights_that_the_next_mega_batch_starts_with_and_the_last_those_measured():
    config = small_config(mega_batches=3, label_noise=0.3)
    yielded, epochs = watched(config, redraw_all)
    for now, epoch in zip(yielded, epochs[1:], strict=False):
        assert same(now["model"], epoch.start)
    data, stream = lure.draw_stream(config, small_data())
    val = stream[-1].val
    model, row = lure.build_model("small", data, seeded(1)), yielded[-1]["mega_batches"][-1]
    model.load_state_dict(yielded[-1]["model"])
    for split, index in (("train", stream[-1].train), ("val", val)):
        found = lure.evaluate(model, data.images[index], data.labels[index])
        exactly(found | {"ece": 100 * found["ece"]}, row[split])
    found = lure.evaluate(model, data.test_images, data.test_labels)
    exactly(found | {"ece": 100 * found["ece"]}, row["test"])


@pytest.mark.parametrize("pi", ["learned", "seen", "next"])
def test_a_stream_of_the_callers_is_followed_on_the_data_as_they_are(pi):
    order = small_data().labels.argsort(stable=True)  # one class after the other
    parts = order.tensor_split(3)
    stream = [lure.MegaBatch(torch.cat([part[5:], order[:2]]), part[:5], part[5:]) for part in parts]
    samples, config = [], small_config(label_noise=1.0, pi=pi, mega_batches=8, pi_fraction=1.0)
    yielded, epochs = watched(config, lambda model, between: samples.append(between.pi), untrained, stream)
    assert [e.train.tolist() for e in epochs] == [batch.train.tolist() for batch in stream]
    assert all(torch.equal(e.data.labels, small_data().labels) for e in epochs) and len(yielded) == 3
    sources = dict(learned=[b.new for b in stream], seen=[b.train for b in stream])
    sources["next"] = [b.new for b in stream[1:]]
    for found, source in zip(samples, sources[pi], strict=False):
        assert pairs(*found) == pairs(small_data().images[source], small_data().labels[source])


@pytest.mark.parametrize("keep", [0.5, 0.8, 1.0])
def test_the_share_kept_is_that_of_the_configuration(keep, monkeypatch):
    masks, reinitialize_ = [], lure.reinitialize_
    spy = lambda model, mask, *rest: masks.append(mask) or reinitialize_(model, mask, *rest)  # noqa: E731
    monkeypatch.setattr(lure, "reinitialize_", spy)
    rows(small_config(keep=keep))
    (mask,) = masks
    model = lure.build_model("small", small_data(), seeded(1))
    assert list(mask) == [name for name, p in model.named_parameters() if p.ndim >= 2]
    kept = torch.cat([m.flatten() for m in mask.values()])
    assert int(kept.sum()) == round(keep * len(kept))


def test_a_loss_that_is_not_finite_on_the_test_set_alone_is_found(monkeypatch):
    def broken_network(*args):
        model = build(*args)
        model.fc.register_forward_hook(lambda m, x, out: out * math.inf if len(out) == 60 else out)
        return model

    build = lure.build_model
    monkeypatch.setattr(lure, "build_model", broken_network)
    with pytest.raises(FloatingPointError, match="the loss is nan; a smaller --lr may help"):
        next(lure.run(small_config(), small_data()))


@pytest.mark.numerics
def test_every_method_gets_the_same_stream_start_and_order():
    runs = [watched(small_config(seed=3, epochs=2), forget) for forget in (None, nothing, redraw_all)]
    (first, epochs), *others = runs
    for other, its_epochs in others:
        assert timeless(first[0]["mega_batches"]) == timeless(other[0]["mega_batches"])
        assert same(epochs[0].start, its_epochs[0].start) and len(epochs) == len(its_epochs) == 4
        for a, b in zip(epochs, its_epochs, strict=True):
            assert torch.equal(a.train, b.train) and torch.equal(a.rng, b.rng)
    assert not same(epochs[2].start, others[0][1][2].start)


def test_forgetting_happens_between_mega_batches():
    calls = []

    def forget(model, between):
        calls.append(state(model))
        with torch.no_grad():
            next(model.parameters()).zero_()

    _, epochs = watched(small_config(mega_batches=4), forget, untrained)
    assert len(calls) == 3 and len(epochs) == 4
    assert [bool(e.start["conv1.weight"].any()) for e in epochs] == [True, False, False, False]
    assert same(calls[0], epochs[0].end)


@pytest.mark.parametrize("replay", ["full", "buffer", "none"])
@pytest.mark.parametrize("pi", ["learned", "seen", "next"])
def test_pi_is_a_share_of_what_it_is_drawn_from(pi, replay):
    config = small_config(pi=pi, replay=replay, buffer_size=9, mega_batches=3, seed=8, label_noise=0.3)
    samples = []
    _, epochs = watched(config, lambda model, between: samples.append(between.pi), untrained)
    data, stream = lure.draw_stream(config, small_data())
    assert [e.train.tolist() for e in epochs] == [b.train.tolist() for b in stream]
    assert len(samples) == 2
    for i, (images, targets) in enumerate(samples):
        source = {"learned": stream[i].new, "seen": stream[i].train, "next": stream[i + 1].new}[pi]
        assert len(targets) == round(0.2 * len(source)) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert pairs(images, targets) <= pairs(data.images[source], data.labels[source])


def test_convolutions_in_float32_are_not_rounded(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    lure.build_model("small", pictures(), seeded(1))
    assert torch.backends.cudnn.allow_tf32 is False


def test_pi_is_never_empty():
    samples = []
    rows(small_config(pi_fraction=1e-6), lambda model, between: samples.append(between.pi))
    assert [len(labels) for _, labels in samples] == [1]


@pytest.mark.parametrize("replay", ["full", "buffer", "none"])
def test_a_method_gets_the_data_and_the_stream_up_to_what_is_trained_on_next(replay):
    config = small_config(replay=replay, buffer_size=9, mega_batches=4, seed=2)
    calls = []

    def forget(model, between):
        calls.append([[*baselines.upcoming(between)], [*baselines.upcoming(between)]])
        exactly(between.data[:4], lure.draw_stream(config, small_data())[0][:4])
        exactly(between.stream, lure.draw_stream(config, small_data())[1][: len(calls) + 1])

    watched(config, forget, untrained)
    data, stream = lure.draw_stream(config, small_data())
    for i, (yielded, again) in enumerate(calls):
        train = set(stream[i + 1].train.tolist())
        held = [[j for j in b.new.tolist() if j in train] for b in stream[: i + 2]]
        expected = [pairs(data.images[h], data.labels[h]) for h in held if h]
        assert [pairs(*pair) for pair in yielded] == [pairs(*pair) for pair in again] == expected
        assert replay == "buffer" or len(yielded) == {"full": i + 2, "none": 1}[replay]
        new = stream[i + 1].new
        assert pairs(*yielded[-1]) == pairs(data.images[new], data.labels[new])


def test_fresh_builds_new_networks_of_the_same_kind():
    built = []

    def forget(model, between):
        built.extend([state(model), state(between.fresh()), state(between.fresh())])

    rows(small_config(), forget)
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
        watched(small_config(replay=replay, buffer_size=9, select="best-val"), nothing, untrained)
    train = [54, {"full": 108, "buffer": 63, "none": 54}[replay]]
    first, second = validation  # by which the epoch is chosen, too
    assert sizes == [first, train[0], first, 60, second, train[1], second, 60]


@pytest.mark.parametrize("keep_momentum", [False, True])
def test_momentum_outlives_the_mega_batch_only_if_asked(keep_momentum):
    _, epochs = watched(small_config(keep_momentum=keep_momentum, epochs=2), nothing)
    tensors = len(list(lure.build_model("small", small_data(), seeded(1)).parameters()))
    assert [e.momentum for e in epochs] == [0, tensors, tensors if keep_momentum else 0, tensors]


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
    _, seen = watched(small_config(epochs=epochs, lr=0.2, gamma=0.3, keep_momentum=True), nothing, untrained)
    assert [e.rate for e in seen] == pytest.approx([0.2 * 0.3**d for d in decays] * 2)


def test_a_compiled_network_learns_the_same_in_the_same_weights():
    compiled = []
    wrap = lambda model: compiled.append(model) or torch.compile(model, backend="eager")  # noqa: E731
    config = small_config(select="best-val", seed=5)
    plain, found = states(config)[-1], states(config, wrap=wrap)[-1]
    assert len(compiled) == 2 and same(plain["model"], found["model"])
    assert timeless(plain["mega_batches"]) == timeless(found["mega_batches"])


# ------------------------------------------------------------ Command line
@pytest.fixture
def call(monkeypatch):
    """The command line on the small data."""
    data = small_data()  # which calls `load_dataset` if it is the first time
    monkeypatch.setattr(lure, "load_dataset", lambda name, folder: data)
    return lambda *words: lure.main(["--dataset=digits", "--mega-batches=2", "--epochs=1", *map(str, words)])


def refusal(capsys, call, *words, status=2):
    """The line by which the call ends."""
    with pytest.raises(SystemExit) as end:
        call(*words)
    out, err = capsys.readouterr()
    *progress, err = err.splitlines(keepends=True)
    assert end.value.code == status and err[-1] == "\n"
    assert all(line.startswith("mega-batch ") for line in progress)
    assert out == ""
    return err


def strict_json(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_the_command_line_tells_each_mega_batch_then_the_totals_and_writes_the_record(call, tmp_path, capsys):
    out = tmp_path / "record.json"
    call("--seed", 5, "--keep", 0.7, "--val-fraction", 0.2, "--keep-momentum", "--out", out)
    (last,), lines = (text.splitlines() for text in capsys.readouterr())
    config = small_config(seed=5, keep=0.7, val_fraction=0.2, keep_momentum=True, out=str(out))
    record, expected = strict_json(out.read_text()), rows(config)
    assert record.keys() == {"config", "totals", "mega_batches"} and record["config"] == asdict(config)
    assert record["totals"] == strict_json(last) == lure.totals(record["mega_batches"])
    assert timeless(record["mega_batches"]) == timeless(expected)
    accuracies = [row["test"]["accuracy"] for row in expected]
    assert lines == [f"mega-batch {i}: {a:.2f} % of the test set" for i, a in enumerate(accuracies, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["record.json"]


def test_without_a_file_for_the_record_nothing_is_written(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call()
    assert not list(tmp_path.iterdir())


def test_the_help_names_every_setting(call, capsys):
    with pytest.raises(SystemExit) as end:
        call("--help")
    told = capsys.readouterr().out
    assert end.value.code == 0
    assert all(f"--{f.name.replace('_', '-')}" in told for f in fields(lure.Config))


WRONG = {
    "--epochs=0": "--epochs: expected epochs per mega-batch, at least 1; got 0",
    "--keep=nan": "--keep: expected share of the weights that unlearning keeps, in (0, 1]; got nan",
    "--lr=inf": "--lr: expected learning rate, at least 0; got inf",
    "--mega-batches=121": "120 samples do not make 121 mega-batches to train on",
    "--device=nowhere": "--device nowhere: expected cpu",
    "--device=cuda:99": "--device cuda:99: expected cpu",
    "--val-fraction=0": "--val-fraction: expected share for validation, in (0, 0.9]; got 0.0",
    "--arch=alexnet": "--arch: invalid choice: 'alexnet'",
    "--replay=some": "--replay: invalid choice: 'some'",
    "--epochs=many": "--epochs: invalid int value: 'many'",
    "--epoch=3": "unrecognized arguments: --epoch=3",
    "stray": "unrecognized arguments: stray",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_call_is_one_line_and_status_2(words, call, capsys):
    assert WRONG[words] in refusal(capsys, call, *words.split())


UNWRITABLE = ["there.json", "folder", "missing/x.json", "there.json/x.json", "x" * 300, "/proc/x.json"]


@pytest.mark.parametrize("name", UNWRITABLE)
def test_a_record_that_could_not_be_written_is_refused_before_the_run(
    name, call, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lure, "run", lambda *args: pytest.fail("it ran"))
    (tmp_path / "there.json").write_text("kept")
    (tmp_path / "folder").mkdir()
    line = refusal(capsys, call, "--out", tmp_path / name)
    assert f"--out {tmp_path / name}: expected a new file in a folder that can be written" in line
    assert (tmp_path / "there.json").read_text() == "kept" and len(list(tmp_path.iterdir())) == 2


def test_a_record_is_whole_or_not_there(call, tmp_path, capsys, monkeypatch):
    def full(value, file, **options):
        file.write("{")
        raise OSError("No space left on device")

    monkeypatch.setattr(json, "dump", full)
    assert "No space left on device" in refusal(capsys, call, "--out", tmp_path / "x.json", status=1)
    assert not list(tmp_path.iterdir())


def test_what_is_read_from_a_pipe_and_no_further_does_not_end_the_run(tmp_path):
    script = (
        f"{sys.executable} {ROOT}/lure.py --dataset digits --mega-batches 2 --epochs 1 --out x.json | head -1"
    )
    done = subprocess.run(script, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout) == json.loads((tmp_path / "x.json").read_text())["totals"]


@pytest.mark.numerics
@pytest.mark.parametrize(("batch_size", "mega_batches"), [(16, 2), (64, 2), (128, 1)])
def test_a_loss_that_is_not_finite_ends_the_run_without_a_record(
    batch_size, mega_batches, call, tmp_path, capsys
):
    words = "--lr=1e18", f"--batch-size={batch_size}", f"--mega-batches={mega_batches}"
    assert "the loss is nan" in refusal(capsys, call, *words, f"--out={tmp_path}/x.json", status=1)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_says_which_call_goes_on(call, capsys, monkeypatch, tmp_path):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(lure, "train_epoch_", interrupted)
    line = refusal(capsys, call, f"--out={tmp_path}/x.json", status=130)
    assert "interrupted; baselines.py --method lure goes on with a stopped run" in line
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_downloaded_are_one_line_and_status_1(tmp_path, monkeypatch, capsys):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(lure.torchvision.datasets.cifar, "download_and_extract_archive", offline)
    line = refusal(capsys, lambda *words: lure.main(words), "--data", str(tmp_path), status=1)
    assert f"{tmp_path}: expected cifar-10-python.tar.gz" in line and "no route to host" in line
