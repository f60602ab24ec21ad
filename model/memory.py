"""How many bytes a pass through a network holds and moves, of real tensors or of fake ones, which have no memory."""

import weakref
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@contextmanager
def kept_for_backward(apart: Iterable[Tensor] = ()) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps for the backward pass, by storage, as long as they are there.

    Args:
        apart: tensors that are there anyway, such as the weights, and do not count.
    """
    known = {tensor.untyped_storage()._cdata for tensor in apart}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and storage._cdata not in kept:
            kept[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, kept.pop, storage._cdata)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that operations in the block made and that are still there, and the most at a time.

    What a kernel needs for itself, and what an allocator keeps or cannot use, is not in it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._alive:  # neither written in place nor viewed
                self._add(storage._cdata, storage)
        return result

    def _add(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class MovedBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes that operations in the block read and write, tensor by tensor, as if nothing stayed in a cache.

    Args:
        apart: operations that are not counted.
    """

    def __init__(self, apart: Container[Any] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._apart = apart
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket not in self._apart:
            given, made = _tensors((args, kwargs)), _tensors(result)
            there = {tensor.untyped_storage()._cdata for tensor in given}
            if function._schema.is_mutable or any(tensor.untyped_storage()._cdata not in there for tensor in made):
                self.total += sum(map(_bytes_read, (*given, *made)))
        return result


def _bytes_read(tensor: Tensor) -> int:
    """Of a tensor, whose elements may share memory."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [tensor.untyped_storage() for tensor in _tensors(values)]
