"""One run by several processes, which torchrun starts: to the loop of lure.py they are one network.

Enters: a network; RANK and WORLD_SIZE, by torchrun. Leaves: a network of which each process computes a part.
"""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lure

RANK = int(os.environ.get("RANK") or 0)
WORLD = int(os.environ.get("WORLD_SIZE") or 1)
Result = TypeVar("Result")


class Parallel(nn.Module):
    """A network of which each process computes a part of every batch, by DistributedDataParallel.

    Every process gives it the whole batch and gets all logits; those of others carry no gradient. Batch
    normalisation uses the statistics of each part; when training mode ends, the running ones become the mean
    over the processes.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parallel = nn.parallel.DistributedDataParallel(model)  # sends all that the first process has
        self.parallel.broadcast_buffers = False  # from now on, statistics are each process's own

    def forward(self, images: Tensor) -> Tensor:
        start = RANK * len(images) // WORLD
        end = (RANK + 1) * len(images) // WORLD
        own = self.parallel(images[start:end])
        # DistributedDataParallel takes the mean of the processes' gradients; the loss needs their sum.
        own.register_hook(lambda gradient: gradient * WORLD)
        logits = own.new_zeros(len(images), *own.shape[1:])
        logits[start:end] = own.detach()
        dist.all_reduce(logits)
        return torch.cat([logits[:start], own, logits[end:]])

    def train(self, mode: bool = True) -> "Parallel":
        if self.training and not mode:
            for name, statistic in self.named_buffers():
                if "running_" in name:
                    dist.all_reduce(statistic)
                    statistic /= WORLD
        return super().train(mode)


def join() -> None:
    """Meet the other processes, of which the first alone shows how far it is. ValueError without torchrun."""
    if WORLD == 1:
        return
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if lacking:
        raise ValueError(f"WORLD_SIZE is {WORLD} without {lacking[0]}: start it by torchrun, or unset it")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if RANK > 0:
        lure.tqdm = lambda epochs, *words, **options: epochs


def leave() -> None:
    if WORLD > 1:
        dist.destroy_process_group()


def take_gpu(device: str) -> None:
    """Where every process has a GPU of its own, use it."""
    if WORLD > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))


def by_first(call: Callable[[], Result]) -> Result:
    """What `call` returns in the first process, in all of them."""
    result: list = [call() if RANK == 0 else None]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def first_before_others(call: Callable[[], Result]) -> Result:
    """What `call` returns; the first process of each machine calls before the others, and fills caches."""
    if WORLD == 1:
        return call()
    first = os.environ.get("LOCAL_RANK") == "0"
    if not first:
        dist.barrier()
    result = call()
    if first:
        dist.barrier()
    return result
