"""What a run does in every process of torch.distributed; by torchrun, or imported, in one process.

torchrun --nproc-per-node=2 tests/ranks.py FOLDER     # writes FOLDER/0.pt and FOLDER/1.pt
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
import torch.distributed as dist
from torch import nn

import baselines
import lure
from experiments import runs
from experiments.ranks import WORLD, Parallel

TINY = dict(dataset="digits", image_size=8, limit=120, limit_test=60, mega_batches=3, epochs=6, device="cpu")


def without_batch_norm(arch, data, generator):
    """A convolution and a linear layer in float64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    model.register_forward_pre_hook(lambda model, args: args[0].double() - data.mean[0])
    return model


def watched(config, method=lure.lure_):
    """A run's record, and of its mega-batches the weights at the end, mask, accuracies, samples seen."""
    found = dict(ends=[], masks=[], accuracies=[], samples=[])
    learn, train_epoch, augmented, drawn = lure.learn_, lure.train_epoch_, lure.augmented, []

    def learn_spy(model, *rest):
        row = learn(model, *rest)
        found["ends"].append({name: t.clone() for name, t in model.state_dict().items()})
        return row

    def epoch_spy(net, *rest):
        own = net.parallel if WORLD > 1 else net
        found["broadcast"] = getattr(own, "broadcast_buffers", None)
        found["samples"].append([])
        hook = own.register_forward_pre_hook(forward_spy, prepend=True)
        running = train_epoch(net, *rest)
        hook.remove()
        found["accuracies"].append(float(running))
        return running

    def augmented_spy(pixels, index, *rest):
        drawn.append(index.tolist())
        return augmented(pixels, index, *rest)

    def forward_spy(net, args):  # it gets a part of the batch that was drawn last, a view of it
        (images,) = args
        start = images.storage_offset() // images[0].numel()
        found["samples"][-1] += drawn[-1][start : start + len(images)]

    def forget(model, *rest):
        mask = method(model, *rest)
        found["masks"].append(mask)
        found["ends"].append({name: t.clone() for name, t in model.state_dict().items()})
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "learn_", learn_spy)
        patch.setattr(lure, "train_epoch_", epoch_spy)
        patch.setattr(lure, "augmented", augmented_spy)
        return found | dict(record=runs.recorded(config, forget))


def trained_on_batches(sizes=(64, 63, 65, 7)):
    """The weights after a step on each of some batches, and running statistics after the first."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        exact = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
        with_batch_norm = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10)).double()
    statistics = []
    for model in (exact, with_batch_norm):
        net = Parallel(model) if WORLD > 1 else model
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for size in sizes:
            images = torch.rand(size, 1, 8, 8, generator=generator, dtype=torch.float64)
            labels = torch.randint(10, (size,), generator=generator)
            net.train()
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            net.eval()
            statistics.append({name: t.clone() for name, t in model.named_buffers()})
    return dict(weights=exact.state_dict(), statistics=statistics[len(sizes)])


def experiments():
    with_batch_norm = watched(runs.Config(**TINY))
    other = watched(runs.Config(**TINY | dict(select="best-val", replay="none")), baselines.fisher_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "build_model", without_batch_norm)
        exact = watched(runs.Config(**TINY | dict(precision="float32", epochs=4, lr=0.05)))
    return dict(with_batch_norm=with_batch_norm, other=other, exact=exact, batches=trained_on_batches())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(experiments(), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
