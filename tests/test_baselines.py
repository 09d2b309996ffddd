import copy
import json
import math
from functools import partial
from itertools import product

import pytest
import torch
import torchvision
from conftest import SMALL, examples, same, seeded, seeds, small_config, small_data, state, timeless
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import baselines
import lure
from experiments import runs


def net(seed, dtype=torch.float64):
    """Convolutions with and without bias, a batch norm with statistics of its own, two linear layers."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False),
            nn.BatchNorm2d(3),
            nn.Tanh(),
            nn.Conv2d(3, 4, 2),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(16, 5),
            nn.Tanh(),
            nn.Linear(5, 3, bias=False),
        )
        for tensor in (*model[1].parameters(), model[1].running_mean, model[1].running_var):
            tensor.data.uniform_(0.5, 1.5)
    return model.to(dtype)


def batch(seed, n=5, dtype=torch.float64):
    generator = seeded(seed)
    images = torch.rand(n, 2, 3, 3, generator=generator, dtype=dtype)
    return images, torch.randint(3, (n,), generator=generator)


class Pairs:
    """Data that are pairs of images and labels, one for each mega-batch."""

    def __init__(self, pairs):
        self.pairs = pairs

    def samples(self, index):
        return self.pairs[int(index)]


def apply(method, model, pi=None, upcoming=(), fresh=None, seed=0, **own):
    """Call a method between two mega-batches; `upcoming`: what is trained on next, by mega-batch."""
    parts = torch.arange(len(upcoming)).split(1)
    stream = [lure.MegaBatch(torch.arange(len(upcoming)), part, part) for part in parts]
    return method(model, lure.Between(pi, fresh, seeded(seed), Pairs(upcoming), stream), **own)


# ------------------------------------------------------------ Everything or nothing


def test_warm_start_changes_nothing():
    model = net(1).train()
    before = state(model)
    assert apply(baselines.warm_start, model, batch(1), [batch(1)], partial(net, 2)) is None
    assert same(state(model), before) and model.training


def test_scratch_gives_the_fresh_network_with_its_statistics():
    model = net(1)
    identities = [id(p) for p in model.parameters()]
    assert apply(baselines.scratch_, model, fresh=partial(net, 2)) is None
    assert same(state(model), state(net(2))) and not torch.equal(
        net(1)[1].running_mean, net(2)[1].running_mean
    )
    assert [id(p) for p in model.parameters()] == identities


# ------------------------------------------------------------ Every weight a little


@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_shrink_and_perturb_mixes_every_parameter_with_a_fresh_one(seed, shrink, noise):
    model, new = net(seed), net(seed ^ 1)
    expected = state(model)
    for name, p in new.named_parameters():
        expected[name] = shrink * expected[name] + noise * p.detach()
    arguments = dict(shrink=shrink, noise=noise)
    assert apply(baselines.shrink_and_perturb_, model, fresh=partial(net, seed ^ 1), **arguments) is None
    torch.testing.assert_close(state(model), expected)
    assert same(dict(model.named_buffers()), dict(net(seed).named_buffers()))


def test_a_fresh_network_of_another_kind_is_refused():
    with pytest.raises(ValueError):
        apply(baselines.shrink_and_perturb_, net(1), fresh=lambda: net(2)[:4])


def test_shrink_and_perturb_has_the_constants_of_the_paper():
    model, new = net(1), net(2)
    apply(baselines.shrink_and_perturb_, model, fresh=partial(net, 2))
    for p, old, q in zip(model.parameters(), net(1).parameters(), new.parameters(), strict=True):
        torch.testing.assert_close(p, 0.4 * old + 0.001 * q)


def slow_dash(model, batches, alpha, floor):
    """DASH by loops over the kernels of a convolution and the rows of a linear layer; returns parameters."""
    model = copy.deepcopy(model).eval()
    names = [n for n, _ in model.named_parameters() if not n.startswith("1.")]
    parameters = dict(model.named_parameters())
    ascent = {n: torch.zeros_like(parameters[n]) for n in names}
    for images, labels in batches:
        model.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        for n in names:
            ascent[n] = (1 - alpha) * ascent[n] + alpha * -parameters[n].grad
    result = {n: p.detach().clone() for n, p in parameters.items()}
    for n in names:
        w, g = result[n], ascent[n]
        if w.ndim == 4:
            groups = [(o, i) for o in range(w.shape[0]) for i in range(w.shape[1])]
        else:
            groups = list(range(w.shape[0])) if w.ndim == 2 else [...]
        for group in groups:
            dot = sum(
                a * b for a, b in zip(w[group].flatten().tolist(), g[group].flatten().tolist(), strict=True)
            )
            norms = math.sqrt(float(w[group].square().sum() * g[group].square().sum()))
            cosine = dot / norms if norms > 0 else 0.0
            w[group] = w[group] * min(max(cosine, floor), 1.0)
    return result


@examples(20)
@given(
    seeds,
    st.floats(0.01, 1),
    st.sampled_from([0.0, 0.1, 0.3, 1.0]),
    st.lists(st.integers(1, 6), max_size=3),
)
def test_dash_shrinks_each_group_by_its_cosine_with_the_descent(seed, alpha, floor, sizes):
    model = net(seed).train()
    batches = [batch(seed + i, n) for i, n in enumerate(sizes)]
    expected = slow_dash(model, batches, alpha, floor)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    assert apply(baselines.dash_, model, upcoming=batches, alpha=alpha, floor=floor) is None
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, expected)
    assert same(dict(model.named_buffers()), buffers) and model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("layer", [nn.Conv1d(3, 2, 4), nn.Conv3d(2, 3, 2), nn.Linear(4, 3)])
def test_dash_scales_the_kernels_of_any_dimension_rows_and_the_bias(layer, monkeypatch):
    layer = copy.deepcopy(layer).double()
    before = [p.detach().clone() for p in layer.parameters()]
    gradients = [torch.randn(p.shape, generator=seeded(1), dtype=torch.float64) for p in before]
    monkeypatch.setattr(baselines, "upcoming", lambda between: [(None, None)])
    monkeypatch.setattr(baselines, "loss_gradient", lambda *args: gradients)
    baselines.dash_(layer, None, floor=0.1)
    weight, bias = before
    cosine = lambda w, g: max(0.1, float((w * -g).sum() / (w.norm() * g.norm())))  # noqa: E731
    groups = [*product(range(len(weight)), range(weight.shape[1]))] if weight.ndim > 2 else range(len(weight))
    for group in groups:
        w, g = weight[group], gradients[0][group]
        torch.testing.assert_close(layer.weight[group], w * cosine(w, g))
    torch.testing.assert_close(layer.bias, bias * cosine(bias, gradients[1]))


def test_dash_has_the_constants_of_the_method():
    model, batches = net(1), [batch(1), batch(2)]
    expected = slow_dash(model, batches, 0.3, 0.3)
    apply(baselines.dash_, model, upcoming=batches)
    torch.testing.assert_close({n: p.detach() for n, p in model.named_parameters()}, expected)


@pytest.mark.parametrize("scale", [1e-2, 1e-6, 1e-9])
def test_dash_looks_at_the_direction_of_a_gradient_not_at_its_length(scale):
    model, (images, labels) = nn.Linear(3, 3, bias=False).double(), batch(1, 8)
    images = images.flatten(1)[:, :3]
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 3, generator=seeded(1)) / 1000)
    expected = copy.deepcopy(model)
    apply(baselines.dash_, model, upcoming=[(scale * images, labels)], floor=0.0)
    expected = slow_dash(expected, [(scale * images, labels)], 0.3, 0.0)
    torch.testing.assert_close(model.weight.detach(), expected["weight"], rtol=1e-6, atol=0)


def svd_fire(matrix, steps):
    """The Newton-Schulz polynomial on the singular values alone, then FIRE's factor for a linear layer."""
    u, s, v = torch.linalg.svd(matrix / torch.linalg.matrix_norm(matrix), full_matrices=False)
    for _ in range(steps):
        s = 1.5 * s - 0.5 * s**3
    return (matrix.shape[0] / matrix.shape[1]) ** 0.5 * u @ torch.diag(s) @ v


@given(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(0, 12))
def test_fire_maps_the_singular_values_of_a_linear_weight(seed, rows, columns, steps):
    model = nn.Linear(columns, rows).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(rows, columns, generator=seeded(seed)))
    before = state(model)
    assert apply(baselines.fire_, model, steps=steps) is None
    torch.testing.assert_close(model.weight.detach(), svd_fire(before["weight"], steps))
    assert torch.equal(model.bias, before["bias"])


@examples(15)
@given(
    seeds, st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2, 3]), st.integers(1, 12), st.booleans()
)
def test_fire_maps_each_spatial_slice_of_a_convolution(seed, out, inputs, k, steps, channels_last):
    model = nn.Conv2d(inputs, out, k).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(out, inputs, k, k, generator=seeded(seed)))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    before = state(model)
    apply(baselines.fire_, model, steps=steps)
    for i in range(k):
        for j in range(k):
            expected = svd_fire(before["weight"][:, :, i, j], steps) / k**2
            torch.testing.assert_close(model.weight.detach()[:, :, i, j], expected)
    assert torch.equal(model.bias, before["bias"])


@pytest.mark.parametrize(("rows", "columns"), [(6, 4), (4, 6), (5, 5)])
def test_fire_ends_at_a_semi_orthogonal_matrix(rows, columns):
    model = nn.Linear(columns, rows).double()
    u, _, v = torch.linalg.svd(torch.randn(rows, columns, generator=seeded(0)).double(), full_matrices=False)
    with torch.no_grad():
        model.weight.copy_(u @ torch.diag(torch.linspace(1, 3, 4 if rows != columns else 5).double()) @ v)
    apply(baselines.fire_, model, steps=30)
    torch.testing.assert_close(model.weight.detach(), (rows / columns) ** 0.5 * u @ v)


def test_fire_takes_ten_steps_spares_batch_norms_and_bears_zeros():
    model = net(1)
    with torch.no_grad():
        model[6].weight.zero_()
        model[8].weight[1:] *= 1e-3  # small singular values, which arrive after more steps
    before = model[8].weight.detach().clone()
    apply(baselines.fire_, model)
    torch.testing.assert_close(model[8].weight.detach(), svd_fire(before, 10))
    assert same(state(model[1]), state(net(1)[1])) and not model[6].weight.any()


# ------------------------------------------------------------ Some layers wholly


def build(arch, seed):
    none = torch.empty(0, 8, 8, 3)
    return lure.build_model(arch, lure.Dataset(none, none, none, none, [*"abcd"]), seeded(seed))


def changed(method, arch):
    """Names of the parameters that the method takes from the fresh network; the rest must not move at all."""
    model, new = build(arch, 1), build(arch, 2)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # no value is what a fresh network starts with
            if tensor.is_floating_point():
                tensor.add_(0.125)
    before = state(model)
    assert apply(method, model, fresh=lambda: new) is None
    names, fresh = set(), state(new)
    for name, now in model.state_dict().items():
        if torch.equal(now, before[name]):
            continue
        assert torch.equal(now, fresh[name])
        names.add(name)
    assert names <= dict(model.named_parameters()).keys()
    return names, model


def test_llf_redraws_blocks_3_and_4_of_a_resnet():
    names, model = changed(baselines.later_layer_forgetting_, "small")
    assert names == {n for n, _ in model.named_parameters() if n.split(".")[0] in ("layer3", "layer4")}
    assert len(names) == 30


def test_llf_redraws_the_last_two_stages_and_the_classifier_of_a_vgg():
    names, model = changed(baselines.later_layer_forgetting_, "vgg16_bn")
    convolutions = [int(n.split(".")[1]) for n, p in model.named_parameters() if p.ndim == 4]
    late = convolutions[7:]
    layers = [f"features.{i}" for c in late for i in (c, c + 1)] + ["classifier"]
    assert len(convolutions) == 13 and names == {f"{n}.{kind}" for n in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("pools", [2, 5])
def test_llf_redraws_the_last_two_stages_of_a_vgg_of_any_depth(pools):
    def build():
        stages = [layer for _ in range(pools) for layer in (nn.Conv2d(2, 2, 1), nn.MaxPool2d(1))]
        vgg = nn.Module()
        vgg.features = nn.Sequential(*stages, nn.Conv2d(2, 2, 1))
        vgg.classifier = nn.Linear(2, 3)
        return vgg

    model = build()
    before = state(model)
    apply(baselines.later_layer_forgetting_, model, fresh=build)
    redrawn = {
        name.rpartition(".")[0] for name in before if not torch.equal(state(model)[name], before[name])
    }
    first = 2 * pools - 2  # the convolution after the last pool but one
    assert redrawn == {"classifier", f"features.{first}", f"features.{first + 2}"}


def test_llf_refuses_another_network_and_leaves_it():
    model = net(1)
    with pytest.raises(ValueError, match="Sequential"):
        apply(baselines.later_layer_forgetting_, model, fresh=partial(net, 2))
    assert same(state(model), state(net(1)))


@pytest.mark.parametrize(("arch", "layer"), [("small", "fc"), ("vgg16_bn", "classifier")])
def test_rifle_redraws_the_last_linear_layer(arch, layer):
    assert changed(baselines.reset_classifier_, arch)[0] == {f"{layer}.weight", f"{layer}.bias"}


def test_rifle_redraws_the_last_of_several_linear_layers():
    model = net(1)
    apply(baselines.reset_classifier_, model, fresh=partial(net, 2))
    assert same(state(model), state(net(1)) | {"8.weight": net(2)[8].weight.detach()})


@given(seeds, st.sampled_from([0.1, 0.5, 0.8, 1.0]) | st.floats(0.01, 1))
def test_ke_redraws_what_no_first_input_leads_to_a_first_output(seed, split):
    model, expected, new = net(seed), state(net(seed)), state(net(seed ^ 1))
    mask = apply(baselines.knowledge_evolution_, model, fresh=partial(net, seed ^ 1), split=split)
    for layer in ("0", "3", "6", "8"):
        weight, fresh = (tensors[f"{layer}.weight"] for tensors in (expected, new))
        outputs, inputs = weight.shape[:2]
        for o, i in product(range(outputs), range(inputs)):
            kept = (layer == "8" or o < split * outputs) and (layer == "0" or i < split * inputs)
            assert (mask[f"{layer}.weight"][o, i] == kept).all()
            weight[o, i] = weight[o, i] if kept else fresh[o, i]
    assert same(state(model), expected) and len(mask) == 4


def test_ke_splits_by_default_at_80_percent():
    masks = [
        apply(baselines.knowledge_evolution_, net(1), fresh=partial(net, 2), **s)
        for s in ({}, {"split": 0.8})
    ]
    assert same(*masks)


# ------------------------------------------------------------ LURE with another criterion


def slow_fisher(model, images, labels, chunk):
    model = copy.deepcopy(model).eval()
    scores = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.ndim >= 2}
    for i in range(0, len(labels), chunk):
        model.zero_grad()
        x, y = images[i : i + chunk], labels[i : i + chunk]
        nn.functional.cross_entropy(model(x), y).backward()
        for n, p in model.named_parameters():
            if n in scores:
                scores[n] += p.grad**2 * len(y) / len(labels)
    return scores


def check_redrawn(mask, model, before):
    for name, now in model.state_dict().items():
        dropped = ~mask[name] if name in mask else torch.zeros_like(now, dtype=torch.bool)
        assert torch.equal(now[~dropped], before[name][~dropped])
        assert (now[dropped] != before[name][dropped]).all()
        assert not dropped.any() or now[dropped].abs().max() <= (now.numel() / len(now)) ** -0.5


def check_mask(mask, scores, keep, model, before):
    """Exactly the top k by the scores are kept, the others redrawn. The scores have no ties but zeros."""
    flat = [s for t in scores.values() for s in t.flatten().tolist()]
    kept = set(sorted(range(len(flat)), key=lambda j: -flat[j])[: max(1, round(keep * len(flat)))])
    found = torch.cat([m.flatten() for m in mask.values()]).nonzero().flatten().tolist()
    assert set(found) == kept and list(mask) == list(scores)
    check_redrawn(mask, model, before)


shares = st.sampled_from([0.001, 0.2, 0.5, 0.8, 1.0]) | st.floats(0.01, 1)


@examples(15)
@given(seeds, shares, st.sampled_from([1, 2, 3, 256]), st.integers(1, 5))
def test_fisher_keeps_the_largest_mean_squared_gradients(seed, keep, chunk, n):
    model, pi = net(seed).train(), batch(seed, n)
    before, scores = state(model), slow_fisher(model, *pi, chunk)
    mask = apply(baselines.fisher_, model, pi, seed=seed, keep=keep, chunk=chunk)
    check_mask(mask, scores, keep, model, before)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_fisher_is_by_default_over_single_samples():
    model, pi = net(1), batch(1)
    before, scores = state(model), slow_fisher(model, *pi, chunk=1)
    check_mask(apply(baselines.fisher_, model, pi), scores, 0.8, model, before)
    with pytest.raises(ValueError):
        apply(baselines.fisher_, model, (pi[0], pi[1][:4]))


CRITERIA = [baselines.fisher_, baselines.magnitude_, baselines.random_]


@pytest.mark.parametrize("method", CRITERIA)
def test_every_criterion_keeps_80_percent_and_redraws_by_the_generator_alone(method):
    ends = []
    for seed in (1, 2):
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            model = net(1)
            mask = torch.cat([m.flatten() for m in apply(method, model, batch(1)).values()])
        assert int(mask.sum()) == round(0.8 * len(mask))
        ends.append(state(model))
    assert same(*ends)


@given(seeds, shares)
def test_magnitude_keeps_the_largest_weights(seed, keep):
    model = net(seed)
    before = state(model)
    scores = {n: p.detach().abs().clone() for n, p in model.named_parameters() if p.ndim >= 2}
    check_mask(apply(baselines.magnitude_, model, keep=keep, seed=seed), scores, keep, model, before)


@given(seeds, shares, seeds)
def test_random_keeps_a_share_by_the_generator_alone(seed, keep, other):
    model, again, elsewhere = (net(1) for _ in range(3))
    mask = apply(baselines.random_, model, seed=seed, keep=keep)
    flat = torch.cat([m.flatten() for m in mask.values()])
    assert mask.keys() == {n for n, p in model.named_parameters() if p.ndim >= 2}
    assert int(flat.sum()) == max(1, round(keep * len(flat)))
    assert same(mask, apply(baselines.random_, again, seed=seed, keep=keep))
    assert same(state(model), state(again))
    check_redrawn(mask, model, state(net(1)))
    different = apply(baselines.random_, elsewhere, seed=other, keep=keep)
    assert other == seed or not 0.1 < keep < 0.9 or not same(mask, different)


@examples(15)
@given(seeds, st.sampled_from([0.001, 0.3, 0.8, 0.95, 1.0]), st.booleans())
def test_released_redraws_what_is_named_weight_of_all_that_scores_at_the_threshold_or_below(seed, keep, dead):
    model, (images, labels) = net(seed), batch(seed)
    if dead:  # ties: more exact zeros than are to be redrawn, at keep of 0.95 and 1.0
        model[6].weight.data.zero_()
    before = state(model)
    model.eval()
    nn.functional.cross_entropy(model(images), labels).backward()
    scores = {name: (p * p.grad).abs().detach() for name, p in model.named_parameters()}
    flat = torch.cat([s.flatten() for s in scores.values()])
    model.zero_grad()
    mask = apply(baselines.released_, model.train(), (images, labels), keep=keep, seed=seed)
    assert mask.keys() == {name for name in scores if name.endswith("weight")} and "1.weight" in mask
    number = len(flat) - max(1, round(keep * len(flat)))
    threshold = flat.sort().values[number - 1] if number else -math.inf
    for name, s in scores.items():
        p = model.get_parameter(name)
        if name in mask:
            assert torch.equal(mask[name], s > threshold)
            bound = 1 if p.ndim == 1 else p[0].numel() ** -0.5
            assert (p[~mask[name]].abs() <= bound).all()
            assert torch.equal(p == before[name], mask[name])
        else:
            assert torch.equal(p, before[name])  # biases stay
    assert model.training and all(p.grad is None for p in model.parameters())
    again = net(seed)
    again.load_state_dict(before)
    assert same(apply(baselines.released_, again, (images, labels), keep=keep, seed=seed), mask)
    assert same(state(again), state(model))  # by the seed


def test_released_keeps_80_percent_by_default():
    model, pi = net(1), batch(1)
    default, explicit = (
        apply(baselines.released_, copy.deepcopy(model), pi, **k) for k in ({}, {"keep": 0.8})
    )
    assert same(default, explicit)


def test_random_keeps_every_weight_equally_often():
    kept = sum(
        torch.cat([m.flatten() for m in apply(baselines.random_, net(1), seed=s, keep=0.7).values()]).double()
        for s in range(400)
    )
    assert (kept / 400 - 0.7).abs().max() < 4.5 * (0.21 / 400) ** 0.5


def test_criteria_leave_frozen_weights_alone():
    for method in CRITERIA:
        model = net(1)
        model[0].weight.requires_grad_(False)
        mask = apply(method, model, batch(1), keep=0.1)
        assert set(mask) == {"3.weight", "6.weight", "8.weight"}
        assert torch.equal(model[0].weight, net(1)[0].weight)


@examples(10)
@given(seeds, st.integers(1, 6), st.sampled_from([1, 2, 256]), st.booleans())
def test_the_loss_gradient_is_of_the_mean_loss_in_evaluation_mode(seed, n, chunk, training):
    model, (images, labels) = net(seed).train(training), batch(seed, n)
    before = state(model)
    found = baselines.loss_gradient(model, [*model.parameters()], images, labels, chunk)
    assert same(state(model), before) and model.training == training
    assert all(m.training == training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    nn.functional.cross_entropy(model(images), labels).backward()
    for g, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad)


def test_the_loss_gradient_takes_64_images_at_a_time_as_many_labels_and_idle_parameters():
    model, (images, labels) = net(1), batch(1, n=65)
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    parameters = [*model.parameters(), nn.Parameter(torch.ones(2))]
    assert not baselines.loss_gradient(model, parameters, images, labels)[-1].any() and sizes == [65]
    with pytest.raises(ValueError, match="as many samples in each"):
        baselines.loss_gradient(model, parameters, images, labels[:64])


def test_the_loss_gradient_is_of_labels_that_count():
    model, (images, labels) = net(1).eval(), batch(1, n=70)
    labels[:64] = -100
    found = baselines.loss_gradient(model, [*model.parameters()], images, labels)
    expected = baselines.loss_gradient(model, [*model.parameters()], images[64:], labels[64:])
    for g, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(g, wanted)
    with pytest.raises(ValueError, match=r"^expected labeled images, got none$"):
        baselines.loss_gradient(model, [*model.parameters()], images[:64], labels[:64])


# ------------------------------------------------------------ Networks that are not plain
INITIALISED = {  # methods that change a network by another, and by themselves
    "scratch": baselines.scratch_,
    "sp": baselines.shrink_and_perturb_,
    "rifle": baselines.reset_classifier_,
    "ke": baselines.knowledge_evolution_,
    "dash": baselines.dash_,
    "fire": baselines.fire_,
}


def data_of(images, classes=3):
    return images, torch.arange(len(images)) % classes


def call(method, model, images, fresh=None):
    pi = data_of(images)
    return apply(method, model, pi, [pi], fresh or (lambda: copy.deepcopy(model)))


@pytest.mark.parametrize("name", [*INITIALISED, "llf"])
def test_what_is_frozen_stays(name):
    small, generator = small_data(), seeded(1)
    model = lure.build_model("small", small, generator).requires_grad_(False)
    model.fc.requires_grad_(True)
    before = state(model)
    method = INITIALISED.get(name, baselines.later_layer_forgetting_)
    apply(
        method,
        model,
        None,
        [small.samples(torch.arange(20))],
        partial(lure.build_model, "small", small, generator),
    )
    after = state(model)
    changed = {key for key, p in model.named_parameters() if not torch.equal(after[key], before[key])}
    assert changed <= {"fc.weight", "fc.bias"}
    assert changed or name == "llf"  # which redraws blocks 3 and 4 alone


def normed(norm):
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(12, 3)))


@pytest.mark.parametrize("name", ["dash", "fire", "ke"])
@pytest.mark.parametrize(
    "norm",
    [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm],
    ids=["weight_norm", "spectral_norm", "old weight_norm"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_is_refused_before_anything_changes(name, norm):
    model = normed(norm)
    before = state(model)
    with pytest.raises(ValueError, match=r"1.weight: expected a parameter, it is computed from others"):
        call(INITIALISED[name], model, torch.rand(6, 12))
    assert same(state(model), before)


class Twice(nn.Module):
    """Two linear layers with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_weight_that_is_there_twice_is_worked_on_once():
    model, images = Twice(), torch.rand(6, 4)
    weight = model.first.weight.detach().clone()
    call(partial(baselines.dash_, alpha=0.5, floor=0.3), model, images)
    shares = (model.first.weight / weight).detach()
    assert (shares >= 0.3 - 1e-6).all() and (shares <= 1 + 1e-6).all()
    mask = call(baselines.knowledge_evolution_, model, images, Twice)
    assert set(mask) == {"first.weight", "head.weight"}
    call(baselines.fire_, model, images)


OTHERS = {  # with the weight that is of another kind, and an input
    "lstm": (lambda: Recurrent(), "lstm.weight_ih_l0", torch.rand(6, 5, 4)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Flatten()), "0.weight", None),
    "embedding": (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 3)), "0.weight", None),
}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize("name", ["dash", "fire", "ke"])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_weight_of_another_kind_is_named_and_nothing_changes_unless_it_is_frozen(name, kind):
    build, weight, images = OTHERS[kind]
    model = build()
    before = state(model)
    kind_of_layer = type(model.get_submodule(weight.rpartition(".")[0])).__name__
    told = f"^{weight}: expected convolutions, linear layers; freeze this {kind_of_layer}$"
    with pytest.raises(ValueError, match=told):
        call(INITIALISED[name], model, torch.rand(6, 2) if images is None else images)
    assert same(state(model), before)
    if kind == "lstm":
        model.lstm.requires_grad_(False)
        call(INITIALISED[name], model, images)
        assert all(torch.equal(p, before[f"lstm.{key}"]) for key, p in model.lstm.named_parameters())


@pytest.mark.parametrize("name", ["dash", "fire", "ke"])
def test_without_a_layer_of_its_kind_a_method_says_so(name):
    with pytest.raises(ValueError, match="expected convolutions or linear layers in Sequential, found none"):
        call(INITIALISED[name], nn.Sequential(nn.BatchNorm1d(3)), torch.rand(6, 3))


@pytest.mark.parametrize("dimensions, convolution", [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)])
def test_convolutions_of_one_and_three_dimensions_are_as_those_of_two(dimensions, convolution):
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(convolution(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)).double()
    images = torch.rand(6, 2, *[3] * dimensions, dtype=torch.float64, generator=seeded(1))
    before = model[0].weight.detach().clone()
    call(partial(baselines.dash_, floor=0), model, images)
    shares = (model[0].weight.detach() / before).flatten(2)
    assert torch.allclose(shares, shares[..., :1]) and ((shares >= 0) & (shares <= 1)).all()
    mask = call(partial(baselines.knowledge_evolution_, split=0.5), model, images)["0.weight"]
    assert mask[:2].all() and not mask[2:].any()
    call(partial(baselines.fire_, steps=40), model, images)
    slices = model[0].weight.detach().flatten(2).permute(2, 0, 1) * 3**dimensions / 2**0.5
    torch.testing.assert_close(slices.mT @ slices, torch.eye(2).double().expand(3**dimensions, 2, 2))


@pytest.mark.parametrize("name", [name for name in INITIALISED if name not in ("dash", "fire")])
def test_a_fresh_network_of_other_parameters_is_refused_before_anything_changes(name):
    model, other = net(1), nn.Sequential(net(1))  # of which a compiled network's names are like
    before = state(model)
    with pytest.raises(ValueError, match="has other parameters; of a compiled network pass the original"):
        apply(INITIALISED[name], model, batch(1), [batch(1)], lambda: other)
    assert same(state(model), before)


@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v2", "convnext_tiny"])
def test_llf_names_a_network_that_it_is_not_for(arch):
    with torch.device("meta"):
        model = getattr(torchvision.models, arch)(num_classes=5)
    with pytest.raises(ValueError, match=f"llf: expected a ResNet or a VGG, got {type(model).__name__}"):
        apply(baselines.later_layer_forgetting_, model, fresh=lambda: model)


def test_rifle_names_a_network_without_a_linear_layer():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten())
    with pytest.raises(ValueError, match="rifle: expected a linear layer in Sequential, found none"):
        apply(baselines.reset_classifier_, model, fresh=lambda: model)


# ------------------------------------------------------------ Settings, command line


@pytest.mark.parametrize(
    ("name", "given_settings", "expected"),
    [
        ("sp", ["shrink=0.5", "noise=0.1"], dict(shrink=0.5, noise=0.1)),
        ("sp", ["shrink=0"], dict(shrink=0.0)),
        ("dash", ["floor=0.1"], dict(floor=0.1)),
        ("fire", ["steps=3"], dict(steps=3)),
        ("fisher", ["chunk=2"], dict(chunk=2, keep=0.6)),
        ("magnitude", [], dict(keep=0.6)),
        ("random", [], dict(keep=0.6)),
        ("lure", [], dict(keep=0.6)),
        ("warm-start", [], {}),
    ],
)
def test_a_method_is_given_its_settings_and_the_share_to_keep_if_it_has_one(name, given_settings, expected):
    method = runs.method(runs.Config(method=name, set=tuple(given_settings), keep=0.6))
    assert method.func is baselines.METHODS[name] and method.keywords == expected and method.args == ()
    assert all(type(method.keywords[k]) is type(v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("name", "setting", "told"),
    [
        ("sp", "alpha=0.3", "sp has shrink, noise"),
        ("dash", "shrink=0.3", "dash has alpha, floor"),
        ("fire", "keep=0.5", "fire has steps"),
        ("fisher", "keep=0.5", "keep is an option of its own, --keep 0.5"),
        ("lure", "keep=0.5", "keep is an option of its own, --keep 0.5"),
        ("warm-start", "shrink=0.3", "warm-start has no settings"),
        ("sp", "shrink", "expected shrink=<float>"),
        ("sp", "shrink=", "expected shrink=<float>"),
        ("sp", "shrink=much", "expected shrink=<float>"),
        ("fire", "steps=2.5", "expected steps=<int>"),
        ("sp", "shrink=-0.1", "expected a number from 0 to 1e9"),
        ("sp", "noise=nan", "expected a number from 0 to 1e9"),
        ("sp", "noise=inf", "expected a number from 0 to 1e9"),
        ("fire", "steps=-1", "expected a number from 1 to 1e9"),
        ("fisher", "chunk=0", "expected a number from 1 to 1e9"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_line(name, setting, told, tmp_path, capsys):
    call = ["--method", name, "--set", setting, "--out", str(tmp_path / "record.json")]
    assert baselines.main([*SMALL, *call]) == 2
    message = capsys.readouterr().err
    assert message.endswith(f": --set {setting}: {told}\n") and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_method_is_refused_with_the_names_of_all(capsys):
    with pytest.raises(SystemExit, match="2"):
        baselines.main([*SMALL, "--method", "forget-it"])
    message = capsys.readouterr().err
    assert all(name in message for name in baselines.METHODS) and message.count("\n") == 1


KEEP = ["--keep", "0.1"]  # of 8×8 pixels, most scores are zero: a larger share is the same by any criterion


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The record of one run of every method."""
    folder = tmp_path_factory.mktemp("records")
    for name in baselines.METHODS:
        assert baselines.main([*SMALL, *KEEP, "--method", name, "--out", str(folder / f"{name}.json")]) == 0
    refuse = lambda name: pytest.fail(f"{name} in JSON")  # noqa: E731
    files = {name: (folder / f"{name}.json").read_text() for name in baselines.METHODS}
    return {name: json.loads(text, parse_constant=refuse) for name, text in files.items()}


@pytest.mark.numerics
@pytest.mark.parametrize("name", baselines.METHODS)
def test_every_method_runs_and_redraws_its_share(records, name):
    assert records[name]["config"]["method"] == name
    assert {"test_accuracy", "cer", "generalization_gap"} <= records[name]["totals"].keys()
    unlearning = ("lure", "fisher", "magnitude", "random", "released")
    share = 0.9 if name in unlearning else 0.348 if name == "ke" else 0
    found = [row["redrawn"] or 0 for row in records[name]["mega_batches"]]
    assert found == pytest.approx([share, 0], abs=1e-3)


def learned(record):
    """Its rows without times and without what came after learning."""
    after = ("redrawn", "redrawn_by_tensor", "forgotten", "reestimated")
    return [{k: v for k, v in row.items() if k not in after} for row in timeless(record["mega_batches"])]


@pytest.mark.numerics
def test_every_method_has_the_first_mega_batch_of_warm_start_and_then_its_own(records):
    first, second = zip(*map(learned, records.values()), strict=True)
    assert all(row == first[0] for row in first)
    assert len({json.dumps(row) for row in second}) == len(baselines.METHODS)


def test_lure_among_the_methods_is_what_lure_runs_by_itself(records):
    *_, last = lure.run(small_config(keep=0.1), small_data())
    assert learned(records["lure"]) == timeless(last["mega_batches"])
