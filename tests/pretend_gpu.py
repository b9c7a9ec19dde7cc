"""A GPU that is not there: its tensors say that they are on CUDA, and are computed on the CPU.

It keeps to what differs for a program, not for its numbers: tensors of two devices do not mix; what
is captured is not computed until it is replayed, from and into the same memory; the host can ask
for no value meanwhile; and a stream that reads what another wrote has to wait for it. Kernels,
precisions, memory and speed of a real GPU are beyond it.
"""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

GPU = torch.device("cuda", 0)  # where a program finds a tensor
INSIDE = torch.device("meta")  # and where torch does: it knows autograd and owns no memory
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
ASKS = (aten._local_scalar_dense, aten.equal, aten.nonzero)


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
        self.held = other.held

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError("a tensor of the GPU was used where there is none")


known = {}  # by address of memory: the streams that may read what was last written there
one_at_a_time = threading.Lock()  # for that


class Stream:
    """Work in turn, beside that of other streams."""

    def __init__(self, device=None): ...

    def wait_stream(self, other):
        with one_at_a_time:
            for streams in known.values():
                if other in streams:
                    streams.add(self)


DEFAULT = Stream()


class Thread(threading.local):
    """What CUDA keeps for each thread of the host."""

    stream, graph, inside, strict = DEFAULT, None, False, False


thread = Thread()


class Devices(TorchFunctionMode):
    """Names the device as torch knows it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        args, kwargs = tuple(map(_inside, args)), {k: _inside(v) for k, v in kwargs.items()}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == INSIDE:
            return function(*args, **kwargs | {"device": "cpu"}).to(INSIDE)
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
        if waits and (thread.graph or thread.strict):
            raise RuntimeError(f"the host waits while a stream is capturing, in {function}")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        run = thread.graph.add if thread.graph else compute
        result = run(function, *tree_map(_held, (args, kwargs)))
        if waits:
            _share(lambda streams: thread.stream in streams)
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
    written = _written(function, args, kwargs)
    if any(value.dim() for value in here) or any(not value.is_cuda for value in written):
        raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
    return packet in ASKS


def _written(function, args, kwargs):
    """The tensors that an operation changes in place."""
    schema = function._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, args)} | kwargs
    changed = [arg.name for arg in schema if arg.alias_info and arg.alias_info.is_write]
    return _tensors([given.get(name) for name in changed])


def _by_address(*values):
    return {value.untyped_storage().data_ptr(): value for value in _tensors(values)}


def _made(result, given):
    return [value for address, value in _by_address(result).items() if address not in given]


def _share(which=lambda streams: True):
    """Any stream may read what has been written where `which` holds, because the host waited."""
    with one_at_a_time:
        for address in [address for address, streams in known.items() if which(streams)]:
            del known[address]


def compute(function, args, kwargs):
    """Compute on the current stream.

    Raises RuntimeError where it has not waited for another that wrote what this reads.
    """
    stream, given = thread.stream, _by_address(args, kwargs)
    with one_at_a_time:
        if any(stream not in known.get(address, (stream,)) for address in given):
            raise RuntimeError(f"a stream does not wait for what another writes, in {function}")
    result = function(*args, **kwargs)
    with one_at_a_time:
        changed = _by_address(_made(result, given), _written(function, args, kwargs))
        known.update((address, {stream}) for address in changed)
    return result


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


export = torch.export.export


def exported(model, images, **how):
    """The graph of a network on the CPU, by a thread without modes: fake tensors have their own."""
    model, images = copy.deepcopy(model).cpu(), tuple(value.cpu() for value in images)
    without = mock.patch.object(torch.cuda, "is_available", lambda: False)
    with ThreadPoolExecutor(1) as pool, without:
        return pool.submit(export, model, images, **how).result()


@contextlib.contextmanager
def pretend_gpu():
    """Within it, torch has a GPU."""

    def does(value=None):  # each its own function, as torch's compiler wants
        return lambda *_, **__: value

    cuda = {name: does() for name in ("_lazy_init", "set_device", "reset_peak_memory_stats")}
    cuda |= {
        "is_available": does(True),
        "is_bf16_supported": does(True),
        "device_count": does(1),
        "max_memory_allocated": does(0),
        "get_device_name": does("none"),
        "default_stream": does(DEFAULT),
        "current_stream": lambda *_: thread.stream,
        "synchronize": lambda *_: _share(),
        "set_sync_debug_mode": lambda mode: setattr(thread, "strict", mode == "error"),
        "Stream": Stream,
        "stream": on_stream,
        "set_stream": set_stream,
        "CUDAGraph": Graph,
        "graph": Graph.captured,
    }
    overwrite = "torch.__future__.get_overwrite_module_params_on_conversion"
    thread.inside = True
    try:
        with mock.patch.multiple(torch.cuda, **cuda), mock.patch(overwrite, does(True)):
            with mock.patch("torch.export.export", exported), Devices(), Kernels():
                yield
    finally:
        thread.inside = thread.strict = False
        known.clear()
