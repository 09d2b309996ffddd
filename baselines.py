"""The methods that LURE is compared with, under the very schedule, stream and start of `lure.run`.

    python baselines.py --method sp --dataset digits --arch small --mega-batches 4 --epochs 10
    python baselines.py --method dash --set alpha=0.3 floor=0.1 --dataset cifar10 --out dash-1.json

A method is a function of the model, which it changes in place, and of a `lure.Between`, of which most use
`fresh` alone; what it returns is told by `lure.lure_`. What it takes besides are its settings, each a number
with a default (see `shrink_and_perturb_`). It works under `torch.no_grad()`, draws from `between.generator`
on the CPU, and remembers nothing from one call to the next, since a stopped run would go on without it. It
redraws by a mask, `lure.reinitialize_`, as LURE does, or whole layers, `redraw_layers_`, as a fresh
network's. To add one, append it to `METHODS`.
"""

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lure


# ------------------------------------------------------------ Everything or nothing
def warm_start(model, between) -> None:
    """Train on from where the last mega-batch ended: the paper's baseline BL (section 4)."""


def scratch_(model, between) -> None:
    """A new network, parameters and running statistics, for every mega-batch; what is frozen stays."""
    state = like(model, between.fresh()).state_dict()
    for name, p in model.named_parameters():
        if not p.requires_grad:
            state[name] = p
    model.load_state_dict(state)


# ------------------------------------------------------------ Every weight a little
def shrink_and_perturb_(model, between, shrink=0.4, noise=0.001) -> None:
    """θ ← shrink · θ + noise · θ_fresh for every parameter (Ash & Adams 2020, arXiv 1910.08475).

    θ_fresh is a newly initialised network. Defaults: LURE's (Appendix A.2); the method's own are 0.4, 0.1.
    """
    with torch.no_grad():
        for p, new in trained(model, like(model, between.fresh())):
            p.mul_(shrink).add_(new, alpha=noise)


def dash_(model, between, alpha=0.3, floor=0.3) -> None:
    """Shrink what does not point down the loss (DASH, Shin et al. 2024, arXiv 2410.23495).

    G ← (1 − alpha) · G + alpha · (−∇L), from 0, in evaluation mode, over what is trained on next, each
    mega-batch as one batch: the newest comes last and weighs most, as in the authors' code. Then each group
    w of a weight is scaled by clamp(cos(G_w, w), floor, 1): the kernel between an input and an output channel
    of a convolution, a row of a linear layer, the bias of either. The defaults are the method's.
    """
    parameters = []
    for layer in layers_of(model).values():
        parameters += [p for p in (layer.weight, layer.bias) if p is not None and p.requires_grad]
    parameters = [*dict.fromkeys(parameters)]  # a shared one once
    downhill = [torch.zeros_like(p) for p in parameters]
    for images, labels in upcoming(between):
        gradients = loss_gradient(model, parameters, images, labels)
        for g, gradient in zip(downhill, gradients, strict=True):
            g.mul_(1 - alpha).sub_(gradient, alpha=alpha)
    with torch.no_grad():
        for p, g in zip(parameters, downhill, strict=True):
            w = in_groups(p)
            tiny = torch.finfo(w.dtype).tiny  # the default of 1e-8 is more than some gradients
            cosine = F.cosine_similarity(in_groups(g), w, dim=-1, eps=tiny)
            scale = cosine.clamp(floor, 1).unsqueeze(-1)
            p.copy_((w * scale).reshape_as(p))


def in_groups(p: Tensor) -> Tensor:
    """(…, values): the kernels of a convolution, the rows of a matrix, a bias as a whole."""
    return p.flatten(start_dim=2) if p.ndim > 2 else p


def upcoming(between):
    """What is trained on next, images and labels, mega-batch by mega-batch, the newest last."""
    following = between.stream[-1]
    for batch in dict.fromkeys(between.stream):  # generations repeat one
        index = batch.new[torch.isin(batch.new, following.train)]
        if len(index) > 0:
            yield between.data.samples(index)


def fire_(model, between, steps=10) -> None:
    """Move every weight matrix towards a semi-orthogonal one (FIRE, Han et al. 2026, arXiv 2602.08040).

    X ← 1.5 · X − 0.5 · X Xᵀ X, `steps` times from X = W / ‖W‖_F (Newton–Schulz), for each linear weight W,
    out × in, and each of the k · k spatial slices of a convolution; W becomes √(out / in) / (k · k) · X.
    No data. In ten steps, the method's default, small singular values do not arrive.
    """
    weights = [layer.weight for layer in layers_of(model).values() if layer.weight.requires_grad]
    with torch.no_grad():
        for weight in weights:
            outputs, inputs = weight.shape[:2]
            w = weight.reshape(outputs, inputs, -1).permute(2, 0, 1)  # (k · k, out, in)
            norm = w.norm(dim=(1, 2), keepdim=True)
            x = w / norm.clamp(min=torch.finfo(w.dtype).tiny)
            for _ in range(steps):
                cubed = x @ x.mT @ x if outputs <= inputs else x @ (x.mT @ x)  # by the smaller square
                x = 1.5 * x - 0.5 * cubed
            scale = (outputs / inputs) ** 0.5 / len(w)
            weight.copy_((scale * x).permute(1, 2, 0).reshape(weight.shape))


# ------------------------------------------------------------ Some layers wholly
def later_layer_forgetting_(model, between) -> None:
    """Redraw the later layers (LLF, Zhou et al. 2022, arXiv 2202.00155), as a fresh network's.

    Blocks 3 and 4 of a ResNet (Appendix A.2); of VGG the last two convolution stages and the classifier.
    ValueError for another network.
    """
    features = getattr(model, "features", None)
    stages = [*features] if isinstance(features, nn.Sequential) else []
    pools = [i for i, stage in enumerate(stages) if isinstance(stage, nn.MaxPool2d)]
    if hasattr(model, "layer4"):
        later = ["layer3", "layer4"]
    elif len(pools) >= 2 and hasattr(model, "classifier"):
        later = ["classifier", *(f"features.{i}" for i in range(pools[-2], len(stages)))]
    else:
        raise ValueError(f"llf: expected a ResNet or a VGG, got {type(model).__name__}")
    redraw_layers_(model, between.fresh(), later)


def reset_classifier_(model, between) -> None:
    """Redraw the classifier alone (RIFLE, Li et al. 2020), as a fresh network's: the last linear layer."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"rifle: expected a linear layer in {type(model).__name__}, found none")
    redraw_layers_(model, between.fresh(), linear[-1:])


def redraw_layers_(model, new, layers: list[str]) -> None:
    new = like(model, new)
    with torch.no_grad():
        for layer in layers:
            for p, q in trained(model.get_submodule(layer), new.get_submodule(layer)):
                p.copy_(q)


def knowledge_evolution_(model, between, split=0.8) -> dict[str, Tensor]:
    """Redraw the same part of every layer each time (KE, Taha et al. 2021, arXiv 2103.05152).

    KELS, which is a function of the shapes alone, so that nothing has to be remembered: it keeps the kernels
    from the first ⌈split · in⌉ inputs to the first ⌈split · out⌉ outputs of a convolution, from all inputs of
    the first one, to all outputs of the classifier. (WELS would keep weights drawn at random, once for all.)
    The others are redrawn as a fresh network's; both released codes draw from U(−1/√fan_in, 1/√fan_in), whose
    deviation is smaller, up to 2.4 times. Returns the mask, True where a weight was kept.
    """
    layers = layers_of(model)
    names = [*layers]
    new = dict(like(model, between.fresh()).named_parameters())
    mask = {}
    for name, layer in layers.items():
        outputs, inputs = layer.weight.shape[:2]
        kept_outputs = outputs if name == names[-1] else math.ceil(split * outputs)
        kept_inputs = inputs if name == names[0] else math.ceil(split * inputs)
        kept = torch.zeros_like(layer.weight, dtype=torch.bool)
        kept[:kept_outputs, :kept_inputs] = True
        mask[f"{name}.weight"] = kept | (not layer.weight.requires_grad)
    with torch.no_grad():
        for name, kept in mask.items():
            p = model.get_parameter(name)
            p.copy_(torch.where(kept, p, new[name]))
    return mask


# ------------------------------------------------------------ What methods work on
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers_of(model: nn.Module) -> dict[str, Any]:
    """The convolutions and linear layers, by name, each weight once; frozen ones may be among them.

    ValueError, so that no part is left out without a word, if there is none, if another module has a weight
    of two or more dimensions that is trained, or if a weight is computed from others (a parametrization).
    """
    layers: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            if "weight" not in own:
                raise ValueError(f"{name}.weight: expected a parameter, it is computed from others")
            layers.setdefault(id(module.weight), (name, module))
        elif others := [key for key, p in own.items() if p.ndim > 1 and p.requires_grad]:
            kind = type(module).__name__
            raise ValueError(f"{name}.{others[0]}: expected convolutions, linear layers; freeze this {kind}")
    if not layers:
        raise ValueError(f"expected convolutions or linear layers in {type(model).__name__}, found none")
    return dict(layers.values())


def like(model: nn.Module, new: nn.Module) -> nn.Module:
    """The new network. ValueError if its parameters are not named and shaped as the model's."""
    own = {name: p.shape for name, p in model.named_parameters()}
    its = {name: p.shape for name, p in new.named_parameters()}
    for name in own | its:
        if own.get(name) != its.get(name):
            raise ValueError(f"{name}: fresh() has other parameters; of a compiled network pass the original")
    return new


def trained(model: nn.Module, new: nn.Module):
    """Each parameter that is not frozen, and the new network's in its place."""
    both = zip(model.parameters(), new.parameters(), strict=True)
    return ((p, q) for p, q in both if p.requires_grad)


# ------------------------------------------------------------ LURE with another criterion (Table 8)
def fisher_(model, between, keep=0.8, chunk=1) -> dict[str, Tensor]:
    """LURE with the empirical Fisher information as its criterion (FIM in Table 8)."""
    images, labels = between.pi
    scores = fisher_information(model, images, labels, chunk)
    return keep_top_(model, scores, keep, between.generator)


def magnitude_(model, between, keep=0.8) -> dict[str, Tensor]:
    """LURE with the weight's magnitude |θ| as its criterion (Table 8)."""
    return keep_top_(model, magnitudes(model), keep, between.generator)


def random_(model, between, keep=0.8) -> dict[str, Tensor]:
    """LURE with no criterion: the weights to keep are drawn at random (Appendix A.1)."""
    return keep_top_(model, random_scores(model, between.generator), keep, between.generator)


def released_(model, between, keep=0.8) -> dict[str, Tensor]:
    """LURE as the authors' code redraws: every parameter is ranked, biases and normalisation too.

    What scores at or below the threshold goes, ties
    with it; of those, what is named `weight` is redrawn (normalisation's scales from U(−1, 1)), biases stay.
    Returns the mask of what is named `weight`.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    images, labels = between.pi
    gradients = loss_gradient(model, [*parameters.values()], images, labels)
    scores = {}
    for (name, p), gradient in zip(parameters.items(), gradients, strict=True):
        scores[name] = (p.detach() * gradient).abs()
    ranked = torch.cat([s.flatten() for s in scores.values()]).sort().values
    redrawn = len(ranked) - max(1, round(keep * len(ranked)))
    threshold = ranked[redrawn - 1] if redrawn else -1
    mask = {name: s > threshold for name, s in scores.items() if name.endswith("weight")}
    lure.reinitialize_(model, mask, between.generator)
    return mask


def fisher_information(model, images, labels, chunk=1) -> dict[str, Tensor]:
    """The squared gradient by the weight of the mean loss of `chunk` samples, averaged over all samples.

    In evaluation mode; with the default of one sample, the diagonal of the empirical Fisher information.
    """
    weights = lure.connections(model)
    scores = {name: torch.zeros_like(p) for name, p in weights.items()}
    for x, y in zip(images.split(chunk), labels.split(chunk), strict=True):
        gradients = loss_gradient(model, [*weights.values()], x, y)
        for score, gradient in zip(scores.values(), gradients, strict=True):
            score.add_(gradient.square(), alpha=len(y) / len(labels))
    return scores


def magnitudes(model) -> dict[str, Tensor]:
    return {name: p.detach().abs() for name, p in lure.connections(model).items()}


def random_scores(model, generator) -> dict[str, Tensor]:
    scores = {}
    for name, p in lure.connections(model).items():
        drawn = torch.rand(p.shape, generator=generator, device=generator.device)
        scores[name] = drawn.to(p.device)
    return scores


def keep_top_(model, scores, keep, generator) -> dict[str, Tensor]:
    mask = lure.top_k_mask(scores, keep)
    lure.reinitialize_(model, mask, generator)
    return mask


def loss_gradient(model, parameters, images, labels, chunk=64) -> list[Tensor]:
    """∂L/∂θ for each of `parameters`, L the mean cross-entropy of all images, in evaluation mode.

    Labels of −100 do not count; ValueError if there is no other.
    """
    total = int((labels != -100).sum())
    if total == 0:
        raise ValueError("expected labeled images, got none")

    def share_of_mean(logits, labels):
        return F.cross_entropy(logits, labels, reduction="sum") / total

    return lure.gradient_of_sum(model, parameters, lure.chunks(chunk, images, labels), share_of_mean)


# ------------------------------------------------------------ All methods; a place is a colour in figures
METHODS: dict[str, Callable[..., dict[str, Tensor] | None]] = {
    "warm-start": warm_start,
    "llf": later_layer_forgetting_,
    "sp": shrink_and_perturb_,
    "lure": lure.lure_,
    "scratch": scratch_,
    "rifle": reset_classifier_,
    "ke": knowledge_evolution_,
    "dash": dash_,
    "fire": fire_,
    "fisher": fisher_,
    "magnitude": magnitude_,
    "random": random_,
    "released": released_,
}


def main(argv=None) -> int:
    """The command line, which keeps records and goes on with stopped runs; its status."""
    from experiments import runs

    return runs.main(argv, __doc__.split("\n")[0])


if __name__ == "__main__":
    sys.exit(main())
