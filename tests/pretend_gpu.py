"""A GPU that is not there: its tensors say that they are on CUDA, and are computed on the CPU.

It keeps to what differs for a program, not for its numbers: tensors of two devices do not mix; what
is captured is not computed until it is replayed, from and into the same memory; the host can ask
for no value meanwhile; and a stream that reads what another wrote has to wait for it. Kernels,
memory and speed of a real GPU are beyond it.
"""

import contextlib
import threading
from collections import Counter
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)  # where a program finds a tensor
INSIDE = torch.device("meta")  # and where torch does: it knows autograd and owns no memory
BF16 = (torch.conv2d, F.linear)  # of what autocast computes in it
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
ASKS = (aten._local_scalar_dense, aten.equal, aten.nonzero)
INDEXED = (aten.index, aten.index_put, aten.index_put_)


class OnGpu(Tensor):
    """A tensor on the GPU; `held` has its values."""

    device, is_cuda, is_cpu, is_meta = property(lambda self: GPU), True, False, False

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        layout |= {"dtype": values.dtype, "device": INSIDE}
        gpu = Tensor._make_wrapper_subclass(cls, values.size(), **layout)
        gpu.held = values
        return gpu

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        if not isinstance(other, OnGpu):  # CUDA would take it, and fail later
            raise RuntimeError("a tensor of the GPU becomes one of the CPU")
        self.held = other.held

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError("a tensor of the GPU was used where there is none")


class Stream:
    """Work in turn; `seen` counts, by stream, the work that is done before this one goes on."""

    def __init__(self, device=None):
        self.seen = Counter()

    def wait_stream(self, other):
        self.seen |= other.seen


DEFAULT = Stream()
done = Counter()  # as the host knows, because it waited
writers = {}  # of memory, by address: the stream and which of its works it was
one_at_a_time = threading.Lock()  # for these


class Thread(threading.local):
    """What CUDA keeps for each thread of the host."""

    stream, graph, inside, waits = DEFAULT, None, False, 0


thread = Thread()


class Devices(TorchFunctionMode):
    """Names the device as torch knows it, and casts what autocast would."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        args, kwargs = tuple(map(_inside, args)), {k: _inside(v) for k, v in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return function(*args, **kwargs | {"device": "cpu"}).to(INSIDE)
        if function in BF16 and torch.is_autocast_enabled("cuda"):
            args = tuple(arg.bfloat16() if isinstance(arg, OnGpu) else arg for arg in args)
        return function(*args, **kwargs)


def _inside(value):
    if not isinstance(value, (str, torch.device)) or not str(value).startswith("cuda"):
        return value
    if str(value) not in ("cuda", "cuda:0"):
        raise RuntimeError("invalid device ordinal")
    return INSIDE


def _tensors(*values):
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


class Kernels(TorchDispatchMode):
    """Computes on the CPU what is asked of the GPU, and raises RuntimeError where CUDA would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, tensors = dict(kwargs or {}), _tensors(args, kwargs)
        gpu = {id(value.held): value for value in tensors if isinstance(value, OnGpu)}
        device = kwargs.get("device") or (INSIDE if gpu else None)  # of the result
        if not gpu and device != INSIDE:
            return function(*args, **kwargs)
        waits = _waits(function, args, kwargs, device)
        if waits and thread.graph:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        run = thread.graph.add if thread.graph else compute
        result = run(function, *tree_map(_held, (args, kwargs)))
        if waits:
            thread.waits += 1
            done.update(thread.stream.seen - done)
        if function.overloadpacket is aten.copy_:
            return tensors[0]

        def outside(value):
            if not isinstance(value, Tensor) or device != INSIDE:
                return value
            return gpu[id(value)] if id(value) in gpu else OnGpu(value)

        return tree_map(outside, result)


def _held(value):
    if isinstance(value, OnGpu):
        return value.held
    # A number of the host is captured as it is now.
    return value.clone() if isinstance(value, Tensor) and thread.graph else value


def _waits(function, args, kwargs, device):
    """Whether the host waits until the GPU has finished this.

    Raises RuntimeError for tensors that do not go together.
    """
    packet = function.overloadpacket
    here = [value for value in _tensors(args, kwargs) if not isinstance(value, OnGpu)]
    if packet in COPIES:
        return bool(here) or device != INSIDE
    indices = _tensors(args[1]) if packet in INDEXED else []
    numbers = [value for value in here if not any(value is index for index in indices)]
    written = _written(function, args, kwargs)
    if any(value.dim() for value in numbers) or any(not value.is_cuda for value in written):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
    masks = any(not index.is_cuda or index.dtype == torch.bool for index in indices)
    return packet in ASKS or masks


def _written(function, args, kwargs):
    """The tensors that an operation changes in place."""
    schema = function._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args)} | kwargs
    changed = [arg.name for arg in schema if arg.alias_info and arg.alias_info.is_write]
    return _tensors([given.get(name) for name in changed])


def _address(value):
    return value.untyped_storage().data_ptr()


def _by_address(*values):
    return {_address(value): value for value in _tensors(values)}


def _made(result, given):
    return [value for value in _tensors(result) if _address(value) not in given]


def compute(function, args, kwargs):
    """Compute on the current stream.

    Raises RuntimeError where it has not waited for another that wrote what this reads.
    """
    stream, given = thread.stream, _by_address(args, kwargs)
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


def synchronize(device=None):
    with one_at_a_time:
        for stream in {stream for stream, _ in writers.values()}:
            done.update(stream.seen - done)


class Graph:
    """What was captured: the operations in turn, the tensors that they read and those they made."""

    def __init__(self):
        self.work = []
        self.made = {}  # by address
        self.before = {}  # memory from before the capture, and what was in it

    def add(self, function, args, kwargs):
        given = _by_address(args, kwargs)
        for address in given.keys() - self.made.keys() - self.before.keys():
            memory = given[address].untyped_storage()
            self.before[address] = memory, memory.clone()
        result = function(*args, **kwargs)
        made = _made(result, given)
        self.made |= _by_address(made)
        self.work.append((function, args, kwargs, given, made))
        return result

    @contextlib.contextmanager
    def captured(self, **_):
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
    def replay(self):
        for function, args, kwargs, given, made in self.work:
            for old, new in zip(made, _made(compute(function, args, kwargs), given), strict=True):
                old.copy_(new)


@contextlib.contextmanager
def on_stream(stream):
    before, thread.stream = thread.stream, stream
    try:
        yield
    finally:
        thread.stream = before


def set_stream(stream):
    thread.stream = stream
    if not thread.inside:  # torch keeps modes by thread
        Devices().__enter__(), Kernels().__enter__()
        thread.inside = True


@contextlib.contextmanager
def pretend_gpu():
    """Within it, torch has a GPU."""

    def does(value=None):  # each its own function, as torch's compiler wants
        return lambda *_, **__: value

    idle = ("_lazy_init", "set_device", "reset_peak_memory_stats")
    cuda = {name: does() for name in idle} | {
        "max_memory_allocated": does(0),
        "get_device_name": does("none"),
        "is_available": does(True),
        "is_bf16_supported": does(True),
        "device_count": does(1),
        "default_stream": does(DEFAULT),
        "current_stream": lambda *_: thread.stream,
        "synchronize": synchronize,
        "Stream": Stream,
        "stream": on_stream,
        "set_stream": set_stream,
        "CUDAGraph": Graph,
        "graph": Graph.captured,
    }
    overwrite = "torch.__future__.get_overwrite_module_params_on_conversion"
    thread.inside, thread.waits = True, 0
    try:
        with mock.patch.multiple(torch.cuda, **cuda), mock.patch(overwrite, does(True)):
            with Devices(), Kernels():
                yield thread
    finally:
        thread.inside = False
        for counts in (writers, done, DEFAULT.seen):
            counts.clear()
