"""A second device without a GPU: tensors that say they are on `meta` and hold their numbers on the CPU.

What a GPU refuses is refused here: operations on tensors of both devices, NumPy arrays of the other one, kernels that
add up in any order. What a GPU is waited for is counted. So the code that a GPU runs, but for its kernels, runs here,
with the CPU's numbers.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

OTHER, CPU = torch.device("meta"), torch.device("cpu")
aten = torch.ops.aten
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten.bincount.default,
}
# What --deterministic refuses on a GPU, and can be done otherwise.
UNORDERED = {aten._adaptive_avg_pool2d_backward.default, aten.nll_loss2d_forward.default, aten.histc.default}
PROJECT = f"{Path(__file__).resolve().parents[2] / 'bags'}/"
waits: Counter[str] = Counter()  # lines of this project or of torchvision -> how often the device was waited for there


class OtherTensor(torch.Tensor):
    """A tensor of the other device."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=OTHER, **layout)
        made.inner = inner
        return made

    def __repr__(self, *, tensor_contents=None):
        return f"OtherTensor({self.inner})"

    def tolist(self):
        _count()
        return self.inner.tolist()

    def numpy(self, *_, **__):
        raise TypeError("a tensor of another device has no NumPy array: use .cpu() first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Also what makes new tensors."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function, args, kwargs):
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    others = [tensor for tensor in tensors if isinstance(tensor, OtherTensor)]
    assert all(isinstance(t, OtherTensor) or not t.is_meta for t in tensors), function
    is_other = bool(others)
    if function is aten.copy_.default:
        is_other = isinstance(args[0], OtherTensor)
    elif kwargs.get("device") is not None:
        is_other = torch.device(kwargs["device"]) == OTHER
        kwargs = {**kwargs, "device": CPU}
    if others and function not in (aten.copy_.default, aten._to_copy.default):
        _check(function, args, tensors)
    if others and (not is_other or function in WAITS or _is_masked(function, args)):
        _count()
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    result = function(*_inner(args), **_inner(kwargs))
    if not is_other:
        return result
    known = {id(tensor.inner): tensor for tensor in others}  # what is changed in place stays the same tensor
    result = tree_map_only(torch.Tensor, lambda t: known[id(t)] if id(t) in known else OtherTensor(t), result)
    return return_and_correct_aliasing(function, args, kwargs, result) if others else result


def _inner(tree):
    return tree_map_only(OtherTensor, lambda tensor: tensor.inner, tree)


def _check(function, args, tensors) -> None:
    """A CPU tensor may only be a number among others, or what indexes one."""
    if function in UNORDERED:
        raise RuntimeError(f"{function} does not have a deterministic implementation")
    numbers = torch.Tag.pointwise in function.tags or function in INDEXING
    indices = args[1] if function in INDEXING and isinstance(args[0], OtherTensor) else ()
    for tensor in tensors:
        allowed = (numbers and tensor.dim() == 0) or any(tensor is index for index in indices)
        if not isinstance(tensor, OtherTensor) and not allowed:
            raise RuntimeError(f"{function}: a CPU tensor of shape {tuple(tensor.shape)} beside those of the device")


def _is_masked(function, args) -> bool:
    """Whether positions have to be found first; a number is written to where a mask says without them."""
    masks = function in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    return masks and not (len(args) > 2 and args[2].dim() == 0)


def _count() -> None:
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(PROJECT) or "/torchvision/" in frame.filename:
            name = frame.filename.removeprefix(PROJECT).rpartition("/torchvision/")
            waits[f"{name[1].strip('/')}{'/' * bool(name[1])}{name[2]}: {frame.line}"] += 1
            return
    waits["test"] += 1


def move(module: torch.nn.Module) -> torch.nn.Module:
    """`module.to(OTHER)`."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(OtherTensor(value.detach()), value.requires_grad)
        for name, value in part._buffers.items():
            part._buffers[name] = value if value is None else OtherTensor(value)
    return module


@contextlib.contextmanager
def other_device() -> Iterator[Counter[str]]:
    """The device is there meanwhile; what it was waited for is counted anew."""
    tensor, as_tensor, save, to = torch.tensor, torch.as_tensor, torch.save, torch.nn.Module.to
    autocast, scaler = torch.autocast, torch.amp.GradScaler

    def moving(function):
        """The original makes true `meta` tensors."""

        def made(data, *, device=None, **settings):
            result = function(data, **settings)
            return result if device is None else result.to(device)

        return made

    def moved_module(module, device=None, *rest, **settings):
        """The original makes true `meta` tensors of these, too."""
        return move(module) if device == OTHER else to(module, device, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", moving(tensor))
        patch.setattr(torch, "as_tensor", moving(as_tensor))
        patch.setattr(torch, "save", lambda state, *rest, **settings: save(_inner(state), *rest, **settings))
        patch.setattr(torch.nn.Module, "to", moved_module)
        patch.setattr(torch, "autocast", lambda kind, *rest, **settings: autocast("cpu", *rest, **settings))
        patch.setattr(torch.amp, "GradScaler", lambda kind, **settings: scaler("cpu", **settings))
        patch.setattr(torch._C, "_InferenceMode", lambda mode: torch.no_grad())  # it forbids views of such tensors
        waits.clear()
        with _Mode():
            yield waits
