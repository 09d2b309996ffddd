"""A second device, "card", that computes on the processor while its tensors stay apart from the processor's.

python tests/device_double.py     # prints, as JSON, how runs on it went

It stands in for a GPU: where tensors and generators are, and what the processor waits for, does not depend on
who computes. The registration lasts as long as the process, so this has a process of its own.

Misplaced is a tensor of the processor in an operation of the device that is no copy, and a generator of one
in a draw on the other. As on a GPU, a tensor without dimensions may join a pointwise operation; an index may
not, though a GPU takes it, by a copy each time. The processor waits for copies between the devices, either
way, and for results that it reads or whose shape depends on values, as torch's tags tell, indexing by a mask
among them. What a GPU waits for within an operation (`isin`) is not seen, nor is autocast, which does
nothing here.
"""

import inspect
import json
import sys
import threading
from collections import Counter
from typing import ClassVar

import torch
from conftest import small_config, small_data, timeless
from torch import Tag, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import baselines
import evaluate
import lure
from experiments import runs

CARD, HostGenerator, aten = "card", torch.Generator, torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


# ------------------------------------------------------------ The device
class Misplaced(Exception):
    pass


class Card(Tensor):
    """A tensor of the device; `held` has its values."""

    refused: ClassVar[torch.dtype | None] = None  # what the device cannot compute in
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        if held.dtype == cls.refused:
            raise TypeError(f"there is no {held.dtype} on this device")
        like = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        return cls._make_wrapper_subclass(cls, held.shape, **like, device=f"{CARD}:0")

    def __init__(self, held):
        self.held = held

    def tolist(self):  # torch's refuses a tensor of this kind
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: there is no such device outside of Watch")


class Generator(HostGenerator):
    """A generator of the processor that may say that it is the device's."""

    devices: ClassVar = {}  # by address, since an operation gets it as another Python object

    def __new__(cls, device="cpu"):
        new = super().__new__(cls)
        cls.devices[new._cdata] = torch.device(device)
        return new

    @property
    def device(self):
        return self.devices[self._cdata]


class Watch(TorchDispatchMode):
    """Where there is the device. `waits`: how often the processor waits, by the functions that it is in."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        cards = [x for x in leaves if isinstance(x, Card)]
        hosts = [x for x in leaves if isinstance(x, Tensor) and not isinstance(x, Card)]
        device = kwargs["device"].type if kwargs.get("device") else CARD if cards else "cpu"
        if any(Generator.devices[x._cdata].type != device for x in leaves if isinstance(x, HostGenerator)):
            raise Misplaced(f"{func}: a generator")
        if func in COPIES:
            waits = any(x.device.type != device for x in cards + hosts)
        else:
            if cards and hosts and not joins(func, args, hosts):
                raise Misplaced(f"{func}: a tensor")
            waits = cards and depends_on_values(func, args)
        if waits and (place := place_of_main_thread()):
            self.waits[place] += 1
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if device == "cpu":
            return result
        known = {id(held(x)): x for x in cards + hosts}  # what an operation changes in place stays itself
        wrapped = lambda x: known[id(x)] if id(x) in known else Card(x)  # noqa: E731
        return tree_map_only(Tensor, wrapped, result)


def joins(func, args, hosts) -> bool:
    """Whether an operation of the device takes these tensors of the processor."""
    written = func._schema.is_mutable and args[0] is hosts[0]
    return Tag.pointwise in func.tags and not written and not any(x.ndim for x in hosts)


def depends_on_values(func, args) -> bool:
    if func in INDEXING:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return Tag.data_dependent_output in func.tags or Tag.dynamic_output_shape in func.tags


def held(x):
    if isinstance(x, Card):
        assert (x.shape, x.stride()) == (x.held.shape, x.held.stride()), "something changed one of the two"
        return x.held
    return torch.device("cpu") if isinstance(x, torch.device) else x


def place_of_main_thread() -> str:
    """The functions of lure.py and baselines.py that it is in; a backward pass has a thread of its own."""
    frame, names = sys._current_frames()[threading.main_thread().ident], []
    while frame:
        code, frame = frame.f_code, frame.f_back
        if code.co_filename in (lure.__file__, baselines.__file__) and not code.co_name.startswith("<"):
            names.insert(0, code.co_name)
    return "/".join(names)


# ------------------------------------------------------------ The runs
MISTAKES = {  # function, what it says, what it would say, what is noticed then
    "order": (lure.batches, "device=train.device, generator=generator)]", ")]", "index.Tensor: a tensor"),
    "its generator": (lure.run, "ORDER, data.images.device)", "ORDER)", "randperm.generator: a generator"),
    "labels": (lure.draw_stream, "labels=labels.to(device)", "labels=labels", "index.Tensor: a tensor"),
    "new weights": (lure.reinitialize_, ".to(p.device)", "", "index_put_.default: a tensor"),
}
READS = (
    "loss.item() bool(loss) float(loss) int(loss) loss.tolist() loss.nonzero().sum() loss.cpu().to(device)"
)
for read in [*READS.split(), "loss.to('cpu').to(device)", "logits.detach()[logits > 0].sum()"]:
    MISTAKES[read] = (
        lure.train_epoch_,
        "loss.backward()",
        f"loss.backward(), {read}",
        "run/learn_/train_epoch_",
    )


def states(data, method="lure", state=None, **changes):
    """Copies, on the processor, of what a run yields."""
    config = small_config(precision="float32", **changes)
    run = lure.run(config, data, runs.method(runs.Config(method=method)), state=state)
    return [tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), timeless(state)) for state in run]


def lifted(data) -> list:
    """What functions that people copy give on the device of the data."""
    model = lure.build_model("small", data, torch.Generator().manual_seed(1))
    images, labels = data.samples(torch.arange(40, device=data.labels.device))
    mask = lure.unlearn_(model, images, labels, generator=torch.Generator().manual_seed(2))
    probabilities = evaluate.predict(model, images).softmax(1)
    ece = lure.expected_calibration_error(probabilities, labels)
    kept = {name: m.cpu() for name, m in mask.items()}
    return [kept, ece, evaluate.accuracy(model, images, labels)]


def without_float64(data) -> bool:
    """Whether they do on a device that has none, as Apple's MPS."""
    with Watch():
        Card.refused = torch.float64
        try:
            data.to(CARD).images.double()
        except TypeError:
            return equal(lifted(data.to(CARD)), lifted(data))
        finally:
            Card.refused = None
    return False


def equal(a, b) -> bool:
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def noticed(data, function, right, wrong, _) -> str:
    """What is noticed of a run in which the function says something wrong."""
    (lines, first), names = inspect.getsourcelines(function), vars(lure).copy()
    source = "".join(lines)
    assert source.count(right) == 1, f"{function.__name__} says {right} no more"
    exec(compile("\n" * (first - 1) + source.replace(right, wrong), lure.__file__, "exec"), vars(lure))
    try:
        with Watch() as watch:
            states(data.to(CARD))
    except Misplaced as error:
        return str(error)
    finally:
        vars(lure).update(names)
    return " ".join(place for place in watch.waits if "train_epoch_" in place)


def main():
    module = _DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # for torch.autocast, even if not enabled
    _setup_privateuseone_for_python_backend(CARD, module)
    torch.Generator = Generator
    torch.inference_mode = torch.no_grad  # within it, views of these tensors fail
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # `p.data = …` would leave `held` behind
    data = small_data()._replace(flip=True)
    with Watch() as watch:
        there = {method: states(data.to(CARD), method) for method in baselines.METHODS}
    result = {method: equal(there[method], states(data, method)) for method in baselines.METHODS}
    more = dict(select="best-val", keep_momentum=True, epochs=2)
    whole = states(data, **more)
    with Watch():
        result["resumed"] = equal(states(data.to(CARD), state=whole[0], **more), whole[1:])
    result["without float64"] = without_float64(data)
    mistakes = {name: noticed(data, *mistake) for name, mistake in MISTAKES.items()}
    print(json.dumps(dict(equal=result, waits=watch.waits, mistakes=mistakes), indent=1))


if __name__ == "__main__":
    main()
