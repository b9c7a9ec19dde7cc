"""An emulated GPU: its tensors report a CUDA device but are computed on the CPU.

It checks the rules that CUDA programs must follow: tensors on different devices do not mix; a graph
capture computes nothing, and a replay reads and writes the captured memory; the host cannot
synchronise during a capture; and a stream must wait for another stream whose results it reads.
It does not emulate kernels, precision, memory or speed.
"""

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch._library.utils import zip_schema
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

GPU = torch.device("cuda", 0)  # the device that programs see
INTERNAL = torch.device("meta")  # the device that torch sees: autograd works, without memory
aten = torch.ops.aten
COPIES = (aten.copy_, aten._to_copy)
SYNCHRONISING = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select)
SYNCHRONISING += (aten.bincount, aten._unique2, aten.repeat_interleave)
INDEXING = (aten.index, aten.index_put, aten.index_put_)  # by bools, they count these


class GpuTensor(Tensor):
    """A tensor on the GPU; `cpu_tensor` holds its values."""

    device, is_cuda, is_cpu, is_meta = property(lambda self: GPU), True, False, False

    @staticmethod
    def __new__(cls, values):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        layout |= {"dtype": values.dtype, "device": INTERNAL}
        gpu = Tensor._make_wrapper_subclass(cls, values.size(), **layout)
        gpu.cpu_tensor = values
        return gpu

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, other):
        self.cpu_tensor = other.cpu_tensor

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):
        return self.cpu_tensor.__reduce_ex__(protocol)  # files are loaded onto the CPU

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError("a GPU tensor was used outside pretend_gpu()")


class Devices(TorchFunctionMode):
    """Replaces the GPU in arguments by the internal device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        args, kwargs = tree_map(_to_internal, (args, kwargs or {}))
        if function is torch.tensor and kwargs.get("device") == INTERNAL:
            return function(*args, **kwargs | {"device": "cpu"}).to(INTERNAL)
        return function(*args, **kwargs)


def _to_internal(value):
    is_gpu = isinstance(value, (str, torch.device)) and str(value) in ("cuda", "cuda:0")
    return INTERNAL if is_gpu else value


class Kernels(TorchDispatchMode):
    """Computes operators of the GPU on the CPU, and raises RuntimeError where CUDA would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = dict(kwargs or {}), function.overloadpacket
        inputs = {
            id(getattr(value, "cpu_tensor", value)): value for value in _tensors(args, kwargs)
        }
        on_cpu = [value for value in inputs.values() if not isinstance(value, GpuTensor)]
        on_gpu = len(on_cpu) < len(inputs)
        device = kwargs.get("device") or (INTERNAL if on_gpu else None)  # of the result
        if not on_gpu and device != INTERNAL:
            return function(*args, **kwargs)
        if packet in COPIES:
            synchronises = bool(on_cpu) or device != INTERNAL
        else:
            by_bools = any(value.dtype == torch.bool for value in _tensors(args[1:2], {}))
            synchronises = packet in SYNCHRONISING or packet in INDEXING and by_bools
            changed = _changed(function, args, kwargs)
            if any(value.dim() for value in on_cpu) or not all(value.is_cuda for value in changed):
                raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
        if synchronises and (thread.graph or thread.strict):
            raise RuntimeError(f"the host synchronises while a stream is capturing, in {function}")
        kwargs.pop("device", None)
        execute = thread.graph.add if thread.graph else compute
        result = execute(function, *tree_map_only(Tensor, _to_cpu, (args, kwargs)))
        if synchronises:
            synchronise(thread.stream)

        def to_gpu(value):
            return inputs[id(value)] if id(value) in inputs else GpuTensor(value)

        return tree_map_only(Tensor, to_gpu, result) if device == INTERNAL else result


def _tensors(*values):
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def _to_cpu(value):
    if isinstance(value, GpuTensor):
        return value.cpu_tensor
    # A capture copies CPU scalars.
    return value.clone() if thread.graph else value


def _changed(function, args, kwargs):
    """The tensors that an operator changes in place."""
    pairs = zip_schema(function._schema, args, kwargs)
    return _tensors([value for arg, value in pairs if arg.alias_info and arg.alias_info.is_write])


def _by_address(*values):
    return {value.untyped_storage().data_ptr(): value for value in _tensors(values)}


def _created(result, inputs):
    return [value for address, value in _by_address(result).items() if address not in inputs]


# ---------------------------------------------------------------- streams and graphs

writers = {}  # memory address -> stream that wrote there and has not been synchronised


class Stream:
    """A CUDA stream."""

    def __init__(self, device=None): ...

    def wait_stream(self, other):
        synchronise(other)


DEFAULT_STREAM = Stream()


class ThreadState(threading.local):
    """CUDA's state in each host thread."""

    stream, graph, strict = DEFAULT_STREAM, None, False


thread = ThreadState()


def set_stream(stream):
    """Called at the start of a host thread: enters the modes, which torch keeps per thread."""
    thread.stream = stream
    Devices().__enter__(), Kernels().__enter__()


def synchronise(stream):
    """Let all streams read what `stream` wrote."""
    for address, writer in list(writers.items()):
        if writer is stream:
            writers.pop(address, None)


def compute(function, args, kwargs):
    """Compute on the current stream.

    Raises RuntimeError when an input was written by another stream that has not been synchronised.
    """
    inputs = _by_address(args, kwargs)
    if any(writers.get(address, thread.stream) is not thread.stream for address in inputs):
        raise RuntimeError(f"a stream does not wait for another that writes its input: {function}")
    result = function(*args, **kwargs)
    changed = _by_address(_created(result, inputs), _changed(function, args, kwargs))
    writers.update(dict.fromkeys(changed, thread.stream))
    return result


class Generator:
    """A CUDA generator that draws nothing: its state is whether it is marked as capturing."""

    def __init__(self):
        self.state = {"capturing": False}

    graphsafe_get_state = copy.copy

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, other):
        self.state = other.state

    def draw(self):
        if self.state["capturing"] and not thread.graph:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")


DEFAULT_GENERATOR = Generator()
failed_captures = []  # torch 2.6 to 2.12 can capture nothing after a failed capture


class Graph:
    """A CUDA graph: captured operators in order, and the contents of their memory before.

    Behaves like torch 2.6 for generators and failed captures.
    """

    def __init__(self):
        self.operators, self.initial_memory, self.generator_states = [], {}, []

    def register_generator_state(self, generator):
        self.generator_states.append(generator.state)

    def add(self, function, args, kwargs):
        inputs = _by_address(args, kwargs)
        for address in inputs.keys() - self.initial_memory.keys():
            memory = inputs[address].untyped_storage()
            self.initial_memory[address] = memory, memory.clone()
        result = compute(function, args, kwargs)
        created = _created(result, inputs)
        self.operators.append((function, args, kwargs, inputs, created))
        return result

    @contextlib.contextmanager
    def capture(self, **_):
        """Capture the block, then undo its computations, which a GPU would not have done."""
        if failed_captures:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.register_generator_state(DEFAULT_GENERATOR)
        for state in self.generator_states:
            state["capturing"] = True
        thread.graph = self
        try:
            yield
            for state in self.generator_states:
                state["capturing"] = False
        except RuntimeError:
            failed_captures.append(self)
            raise
        finally:
            thread.graph = None
            for memory, contents in self.initial_memory.values():
                memory.copy_(contents)
            for *_, created in self.operators:
                for value in created:
                    value.zero_()

    @torch.no_grad()
    def replay(self):
        if any(state["capturing"] for state in self.generator_states):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        for function, args, kwargs, inputs, created in self.operators:
            result = compute(function, args, kwargs)
            for old, new in zip(created, _created(result, inputs), strict=True):
                old.copy_(new)


export = torch.export.export


def export_on_cpu(model, images, **options):
    """torch.export on the CPU, in a thread without our modes, which fake tensors do not support."""
    model, images = copy.deepcopy(model).cpu(), tuple(value.cpu() for value in images)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(export, model, images, **options).result()


@contextlib.contextmanager
def pretend_gpu():
    """Give torch a GPU within the block: a real one if available, else the emulated one."""
    if torch.cuda.is_available():
        yield
        return
    writers.clear(), failed_captures.clear()
    DEFAULT_GENERATOR.state = {"capturing": False}
    cuda = mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        is_bf16_supported=lambda **_: True,
        get_device_name=lambda _: "none",
        default_stream=lambda *_: DEFAULT_STREAM,
        current_stream=lambda *_: thread.stream,
        synchronize=lambda *_: writers.clear(),
        set_sync_debug_mode=lambda mode: setattr(thread, "strict", mode == "error"),
        Stream=Stream,
        stream=partial(mock.patch.object, thread, "stream"),
        set_stream=set_stream,
        CUDAGraph=Graph,
        graph=Graph.capture,
        default_generators=[DEFAULT_GENERATOR],
    )
    with cuda, mock.patch("torch.export.export", export_on_cpu), Devices(), Kernels():
        yield
