"""What a run does on every rank of torch.distributed; by torchrun, or imported, in one process.

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

TINY = dict(dataset="digits", arch="small", limit=120, limit_test=60, mega_batches=3, epochs=6, device="cpu")


def without_batch_norm(arch, num_classes, in_channels, mean, std, generator):
    """A convolution and a linear layer in float64."""
    with torch.random.fork_rng([]):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    model.register_forward_pre_hook(lambda model, args: args[0].double() - mean[0])
    return model


def watched(config, method=lure.lure_):
    """A run's rows, and of each mega-batch the weights at its end, mask, epochs' losses and samples seen."""
    found = dict(ends=[], masks=[], losses=[], samples=[])
    learn, train_epoch, augmented = lure.learn_, lure.train_epoch_, lure.augmented

    def learn_spy(model, *rest):
        found["broadcast"] = getattr(model, "broadcast_buffers", None)
        row = learn(model, *rest)
        weights = getattr(model, "module", model).state_dict()  # it is wrapped where there are several
        found["ends"].append({name: t.clone() for name, t in weights.items()})
        return row

    def epoch_spy(*args):
        found["samples"].append([])
        loss, running = train_epoch(*args)
        found["losses"].append(float(loss))
        return loss, running

    def augmented_spy(pixels, index, padding, flip, generator, share=slice(None)):
        found["samples"][-1] += index[share].tolist()
        return augmented(pixels, index, padding, flip, generator, share)

    def forget(model, *rest):
        mask = method(model, *rest)
        found["masks"].append(mask)
        found["ends"].append({name: t.clone() for name, t in model.state_dict().items()})
        return mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "learn_", learn_spy)
        patch.setattr(lure, "train_epoch_", epoch_spy)
        patch.setattr(lure, "augmented", augmented_spy)
        return found | dict(record=lure.run(config, forget))


def experiments():
    with_batch_norm = watched(lure.Config(**TINY))
    other = watched(lure.Config(**TINY | dict(select="best-val", replay="none")), baselines.fisher_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lure, "build_model", without_batch_norm)
        exact = watched(lure.Config(**TINY | dict(precision="float32", epochs=4, lr=0.05)))
    return dict(with_batch_norm=with_batch_norm, other=other, exact=exact)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(experiments(), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
