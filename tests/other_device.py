"""A device beside the CPU, for machines without a GPU: it computes on the CPU, and refuses what a GPU refuses.

It refuses tensors of both in one operation, and numpy of its own. Only the place of tensors is pretended: neither
autocast nor a kernel of a GPU can be tried so. Once it is there, its process has it for good: use `elsewhere`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "other"
COPIES = ("aten::copy_", "aten::_to_copy")
INDEXING = (
    "aten::index.",
    "aten::index_put",
    "aten::_index_put_impl_",
    "aten::_unsafe_index",
)  # whose indices may lie on the CPU
# What torch calls below the level at which a tensor is asked to dispatch itself.
MADE_FROM_NOTHING = (
    *("empty.memory_format", "empty_strided", "copy_", "_copy_from"),
    *("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m"),
)
SIZED_BY_VALUES = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::repeat_interleave")
waits: list[str] = []  # operations for which a program would wait until a GPU has computed all that was asked before
_registered: list[torch.library.Library] = []


class _Module(_DummyBackendModule):
    """What torch asks a kind of device; checkpointed layers ask for autocast, enabled or not."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


class There(Tensor):
    """A tensor on the other device. `here` is the one on the CPU that holds its values."""

    here: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        layout = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made: There = torch.Tensor._make_wrapper_subclass(cls, here.shape, device=torch.device(NAME, 0), **layout)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, *args, **(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(f"expected a tensor on the CPU to make numpy's of, found one on {NAME}")


def device() -> torch.device:
    """Return the device, which this process has from now on."""
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        others, named = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        others.fallback(_computed, "PrivateUse1")
        for name in MADE_FROM_NOTHING:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(torch.ops.aten, packet), overload or "default")
            named.impl(name, partial(_computed, func), "PrivateUse1")
        _registered.extend((others, named))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay themselves when a model moves
    return torch.device(NAME, 0)


def _computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what the operation makes of the tensors' values, on the CPU or there as a GPU would have it."""
    name = f"{func._schema.name}.{func._schema.overload_name}"
    there = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, There)]
    _refuse_mixture(name, args, kwargs)
    device = kwargs.get("device")
    is_there = torch.device(device).type == NAME if device is not None else bool(there)
    if name.startswith("aten::copy_"):
        is_there = isinstance(args[0], There)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = pytree.tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    result = func(*args, **kwargs)
    assert all(x.shape == x.here.shape for x in there), f"{name} resized a tensor"
    if there and (not is_there or not isinstance(result, Tensor | tuple | list) or name.startswith(SIZED_BY_VALUES)):
        waits.append(name)
    known = {id(x.here): x for x in there}  # what works in place returns what it was given
    return pytree.tree_map(lambda x: _there(x, known) if is_there and isinstance(x, Tensor) else x, result)


def _there(x: Tensor, known: dict[int, There]) -> There:
    return known[id(x)] if id(x) in known else There(x)


def _refuse_mixture(name: str, args: Any, kwargs: Any) -> None:
    if name.startswith(COPIES):
        return
    if name.startswith(INDEXING) and isinstance(args[0], There):
        args = (args[0], *args[2:])
    tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [tuple(x.shape) for x in tensors if not isinstance(x, There) and x.dim()]
    there = [tuple(x.shape) for x in tensors if isinstance(x, There)]
    if here and there:
        raise RuntimeError(f"{name}: expected tensors on one device, found {there} on {NAME} and {here} on the CPU")


@contextmanager
def elsewhere() -> Iterator[Callable[..., Any]]:
    """Give a function that calls another in a process that may have the device, and returns what that returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda function, *args: pool.submit(function, *args).result()
