"""A GPU that is not there: its tensors say that they are on CUDA, and are computed on the CPU.

It keeps to what differs for a program, not for its numbers: tensors of two devices do not mix; what is captured is not
computed until it is replayed, from and into the same memory; the host can ask for no value meanwhile; and a stream that
reads what another wrote has to wait for it. Kernels, memory and speed of a real GPU are beyond it. `python -m tests.pretend_gpu train_dense.py ...` runs a script on it.
"""

import contextlib
import runpy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)  # where a program finds a tensor
INSIDE = torch.device("meta")  # and where torch does: a device that knows autograd and owns no memory
BF16 = (torch.conv2d, F.linear)  # of what autocast computes in it
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
ASKS = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2)
INDEXED = (aten.index, aten.index_put, aten.index_put_)


class OnGpu(Tensor):
    """A tensor on the GPU; `held` has its values."""

    device, is_cuda, is_cpu, is_meta = property(lambda self: GPU), True, False, False
    held: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "OnGpu":
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        gpu = Tensor._make_wrapper_subclass(cls, values.size(), **layout, dtype=values.dtype, device=INSIDE)
        gpu.held = values
        return gpu

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, OnGpu):  # CUDA would take it, and fail later
            raise RuntimeError("a tensor of the GPU becomes one of the CPU")
        self.held = other.held

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __format__(self, form: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self.cpu()), form)

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> None:
        raise AssertionError("a tensor of the GPU was used where there is none")


class Stream:
    """Work in turn; `seen` counts, for each stream, the work that is done before this one goes on."""

    def __init__(self, device: torch.device | None = None):
        self.seen: Counter[Stream] = Counter()

    def wait_stream(self, other: "Stream") -> None:
        self.seen |= other.seen


DEFAULT = Stream()
done: Counter[Stream] = Counter()  # as the host knows, because it waited
writers: dict[int, tuple[Stream, int]] = {}  # of memory, by address: the stream and which of its works it was
one_at_a_time = threading.Lock()  # for these


class Thread(threading.local):
    """What CUDA keeps for each thread of the host."""

    stream, graph, inside, waits = DEFAULT, None, False, 0


thread = Thread()


class Devices(TorchFunctionMode):
    """Names the device as torch knows it, and casts what autocast would."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        args, kwargs = tuple(map(_inside, args)), {name: _inside(value) for name, value in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return function(*args, **kwargs | {"device": "cpu"}).to(INSIDE)
        if function in BF16 and torch.is_autocast_enabled("cuda"):
            args = tuple(value.bfloat16() if isinstance(value, OnGpu) else value for value in args)
        return function(*args, **kwargs)


def _inside(value: Any) -> Any:
    if not isinstance(value, (str, torch.device)) or not str(value).startswith("cuda"):
        return value
    if str(value) not in ("cuda", "cuda:0"):
        raise RuntimeError("invalid device ordinal")
    return INSIDE


class Kernels(TorchDispatchMode):
    """Computes on the CPU what is asked of the GPU, and raises RuntimeError where CUDA would."""

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        gpu = {id(value.held): value for value in tensors if isinstance(value, OnGpu)}
        device = kwargs.get("device") or (INSIDE if gpu else None)  # of the result
        if not gpu and device != INSIDE:
            return function(*args, **kwargs)
        waits = _waits(function, args, kwargs, device)
        if waits and thread.graph:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        args, kwargs = tree_map(_held, (args, kwargs))
        if thread.graph:
            result = thread.graph.add(function, args, kwargs)
        else:
            result = compute(function, args, kwargs)
        if waits:
            thread.waits += 1
            done.update(thread.stream.seen - done)
        if function.overloadpacket is aten.copy_:
            return tensors[0]

        def outside(value: Any) -> Any:
            if not isinstance(value, Tensor) or device != INSIDE:
                return value
            return gpu[id(value)] if id(value) in gpu else OnGpu(value)

        return tree_map(outside, result)


def _held(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.held
    return value.clone() if isinstance(value, Tensor) and thread.graph else value  # a number of the host, as it is now


def _waits(function: Any, args: tuple, kwargs: dict, device: torch.device) -> bool:
    """Whether the host waits until the GPU has finished this; raises RuntimeError for tensors that do not go together."""
    packet = function.overloadpacket
    here = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor) and not isinstance(value, OnGpu)]
    if packet in COPIES:
        return bool(here) or device != INSIDE
    indices = [value for value in tree_iter(args[1]) if isinstance(value, Tensor)] if packet in INDEXED else []
    numbers = [value for value in here if not any(value is index for index in indices)]  # of the host
    if any(value.dim() for value in numbers) or not all(
        isinstance(value, OnGpu) for value in _written(function, args, kwargs)
    ):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
    return packet in ASKS or any(not index.is_cuda or index.dtype == torch.bool for index in indices)


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation changes in place."""
    schema = function._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args)} | kwargs
    changed = [given.get(argument.name) for argument in schema if argument.alias_info and argument.alias_info.is_write]
    return [value for value in tree_iter(changed) if isinstance(value, Tensor)]


def compute(function: Any, args: tuple, kwargs: dict) -> Any:
    """Compute on the current stream; raises RuntimeError where it has not waited for another that wrote what this reads."""
    stream = thread.stream
    given = {_address(value): value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
    with one_at_a_time:
        stream.seen |= done
        for writer, turn in (writers[address] for address in given.keys() & writers.keys()):
            if stream.seen[writer] < turn:
                raise RuntimeError(f"a stream does not wait for what another writes, in {function}")
    result = function(*args, **kwargs)
    with one_at_a_time:
        stream.seen[stream] += 1
        for value in (*_made(result, given), *_written(function, args, kwargs)):
            writers[_address(value)] = stream, stream.seen[stream]
    return result


def synchronize(device: torch.device | None = None) -> None:
    with one_at_a_time:
        for stream in {stream for stream, _ in writers.values()}:
            done.update(stream.seen - done)


class Graph:
    """What was captured: the operations in turn, with the tensors that they read and those that they made."""

    def __init__(self) -> None:
        self.work: list[tuple] = []
        self.made: dict[int, Tensor] = {}  # by address
        self.before: dict[int, tuple] = {}  # memory from before the capture, and what was in it

    def add(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        given = {_address(value): value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)}
        for address in given.keys() - self.made.keys() - self.before.keys():
            memory = given[address].untyped_storage()
            self.before[address] = memory, memory.clone()
        result = function(*args, **kwargs)
        made = _made(result, given)
        self.made |= {_address(value): value for value in made}
        self.work.append((function, args, kwargs, given, made))
        return result

    @contextlib.contextmanager
    def captured(self, **_: Any) -> Iterator[None]:
        """Undo what the capture computed, which a GPU would not have."""
        thread.graph = self
        try:
            yield
        finally:
            thread.graph = None
            for memory, content in self.before.values():
                memory.copy_(content)
            for value in self.made.values():
                value.fill_(torch.nan if value.is_floating_point() else 0)

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, given, made in self.work:
            for old, new in zip(made, _made(compute(function, args, kwargs), given), strict=True):
                old.copy_(new)


def _address(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


def _made(result: Any, given: dict[int, Tensor]) -> list[Tensor]:
    return [value for value in tree_iter(result) if isinstance(value, Tensor) and _address(value) not in given]


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    before, thread.stream = thread.stream, stream
    try:
        yield
    finally:
        thread.stream = before


def set_stream(stream: Any) -> None:
    thread.stream = stream
    if not thread.inside:  # torch keeps modes by thread
        Devices().__enter__(), Kernels().__enter__()
        thread.inside = True


@contextlib.contextmanager
def pretend_gpu() -> Iterator[Thread]:
    """Within it, torch has a GPU."""

    def does(value: Any = None) -> Callable:  # each its own function, as torch's compiler wants
        return lambda *_, **__: value

    cuda = {
        "is_available": does(True), "is_bf16_supported": does(True), "device_count": does(1), "get_device_name": does("none"),
        "_lazy_init": does(), "set_device": does(), "synchronize": synchronize, "max_memory_allocated": does(0), "reset_peak_memory_stats": does(),
        "Stream": Stream, "stream": on_stream, "set_stream": set_stream, "default_stream": does(DEFAULT),
        "current_stream": lambda *_: thread.stream, "CUDAGraph": Graph, "graph": Graph.captured,
    }  # fmt: skip
    new_parameters = mock.patch("torch.__future__.get_overwrite_module_params_on_conversion", does(True))
    thread.inside, thread.waits = True, 0
    try:
        with mock.patch.multiple(torch.cuda, **cuda), new_parameters, Devices(), Kernels():
            yield thread
    finally:
        thread.inside = False
        for counts in (writers, done, DEFAULT.seen):
            counts.clear()


if __name__ == "__main__":
    del sys.argv[0]
    from tests import pretend_gpu as this  # the same module under its own name

    with this.pretend_gpu():
        if sys.argv[0] == "-m":
            del sys.argv[0]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
