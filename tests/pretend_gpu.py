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
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch._library.utils import zip_schema
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map, tree_map_only

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

    def __reduce_ex__(self, protocol):
        return self.held.__reduce_ex__(protocol)  # a file is read onto the CPU

    @classmethod
    def __torch_dispatch__(cls, *_):
        raise AssertionError("a tensor of the GPU was used where there is none")


class Devices(TorchFunctionMode):
    """Names the device as torch knows it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:
            return function(*args, **kwargs or {})
        args, kwargs = tree_map(_inside, (args, kwargs or {}))
        if function is torch.tensor and kwargs.get("device") == INSIDE:
            return function(*args, **kwargs | {"device": "cpu"}).to(INSIDE)
        return function(*args, **kwargs)


def _inside(value):
    named = isinstance(value, (str, torch.device)) and str(value) in ("cuda", "cuda:0")
    return INSIDE if named else value


class Kernels(TorchDispatchMode):
    """Computes on the CPU what is asked of the GPU, and raises RuntimeError where CUDA would."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = dict(kwargs or {}), function.overloadpacket
        given = {id(getattr(value, "held", value)): value for value in _tensors(args, kwargs)}
        here = [value for value in given.values() if not isinstance(value, OnGpu)]
        on_gpu = len(here) < len(given)
        device = kwargs.get("device") or (INSIDE if on_gpu else None)  # of the result
        if not on_gpu and device != INSIDE:
            return function(*args, **kwargs)
        if packet in COPIES:
            waits = bool(here) or device != INSIDE  # the host, until the GPU has finished this
        else:
            waits = packet in ASKS
            changed = _changed(function, args, kwargs)
            if any(value.dim() for value in here) or not all(value.is_cuda for value in changed):
                raise RuntimeError(f"Expected all tensors to be on the same device, in {function}")
        if waits and (thread.graph or thread.strict):
            raise RuntimeError(f"the host waits while a stream is capturing, in {function}")
        kwargs.pop("device", None)
        run = thread.graph.add if thread.graph else compute
        result = run(function, *tree_map_only(Tensor, _held, (args, kwargs)))
        if waits:
            finish(thread.stream)

        def outside(value):
            return given[id(value)] if id(value) in given else OnGpu(value)

        return tree_map_only(Tensor, outside, result) if device == INSIDE else result


def _tensors(*values):
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]


def _held(value):
    if isinstance(value, OnGpu):
        return value.held
    # A number of the host is captured as it is now.
    return value.clone() if thread.graph else value


def _changed(function, args, kwargs):
    """The tensors that an operation changes in place."""
    pairs = zip_schema(function._schema, args, kwargs)
    return _tensors([value for at, value in pairs if at.alias_info and at.alias_info.is_write])


def _by_address(*values):
    return {value.untyped_storage().data_ptr(): value for value in _tensors(values)}


def _made(result, given):
    return [value for address, value in _by_address(result).items() if address not in given]


# ---------------------------------------------------------------- streams and graphs

writers = {}  # by address of memory: the stream that wrote there, if nobody has waited for it


class Stream:
    """Work in turn, beside that of other streams."""

    def __init__(self, device=None): ...

    def wait_stream(self, other):
        finish(other)


DEFAULT = Stream()


class Thread(threading.local):
    """What CUDA keeps for each thread of the host."""

    stream, graph, strict = DEFAULT, None, False


thread = Thread()


def set_stream(stream):
    """As a thread of the host begins: torch keeps modes by thread."""
    thread.stream = stream
    Devices().__enter__(), Kernels().__enter__()


def finish(stream):
    """All may read what a stream wrote."""
    for address, writer in list(writers.items()):
        if writer is stream:
            writers.pop(address, None)


def compute(function, args, kwargs):
    """Compute on the current stream.

    Raises RuntimeError where nobody has waited for another that wrote what this reads.
    """
    given = _by_address(args, kwargs)
    if any(writers.get(address, thread.stream) is not thread.stream for address in given):
        raise RuntimeError(f"a stream does not wait for what another writes, in {function}")
    result = function(*args, **kwargs)
    changed = _by_address(_made(result, given), _changed(function, args, kwargs))
    writers.update(dict.fromkeys(changed, thread.stream))
    return result


class Generator:
    """Numbers drawn on the GPU; of what it would hold, whether it takes itself to be capturing."""

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


GENERATOR = Generator()  # the default
failed = []  # captures, after which torch 2.6 to 2.12 make no other


class Graph:
    """What was captured: the operations in turn, and what was in their memory before.

    Generators and failed captures are those of torch 2.6.
    """

    def __init__(self):
        self.work, self.before, self.states = [], {}, []

    def register_generator_state(self, generator):
        self.states.append(generator.state)

    def add(self, function, args, kwargs):
        given = _by_address(args, kwargs)
        for address in given.keys() - self.before.keys():
            memory = given[address].untyped_storage()
            self.before[address] = memory, memory.clone()
        result = compute(function, args, kwargs)
        made = _made(result, given)
        self.work.append((function, args, kwargs, given, made))
        return result

    @contextlib.contextmanager
    def captured(self, **_):
        """Undo what the capture computed, which a GPU would not have."""
        if failed:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")
        self.register_generator_state(GENERATOR)
        for state in self.states:
            state["capturing"] = True
        thread.graph = self
        try:
            yield
            for state in self.states:
                state["capturing"] = False
        except RuntimeError:
            failed.append(self)
            raise
        finally:
            thread.graph = None
            for memory, content in self.before.values():
                memory.copy_(content)
            for *_, made in self.work:
                for value in made:
                    value.zero_()

    @torch.no_grad()
    def replay(self):
        if any(state["capturing"] for state in self.states):
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        for function, args, kwargs, given, made in self.work:
            for old, new in zip(made, _made(compute(function, args, kwargs), given), strict=True):
                old.copy_(new)


export = torch.export.export


def exported(model, images, **how):
    """The graph of a network on the CPU, by a thread without modes: fake tensors have their own."""
    model, images = copy.deepcopy(model).cpu(), tuple(value.cpu() for value in images)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(export, model, images, **how).result()


@contextlib.contextmanager
def pretend_gpu():
    """Within it, torch has a GPU: the real one, where there is one."""
    if torch.cuda.is_available():
        yield
        return
    writers.clear(), failed.clear()
    GENERATOR.state = {"capturing": False}
    cuda = mock.patch.multiple(
        torch.cuda,
        is_available=lambda: True,
        is_bf16_supported=lambda **_: True,
        get_device_name=lambda _: "none",
        default_stream=lambda *_: DEFAULT,
        current_stream=lambda *_: thread.stream,
        synchronize=lambda *_: writers.clear(),
        set_sync_debug_mode=lambda mode: setattr(thread, "strict", mode == "error"),
        Stream=Stream,
        stream=partial(mock.patch.object, thread, "stream"),
        set_stream=set_stream,
        CUDAGraph=Graph,
        graph=Graph.captured,
        default_generators=[GENERATOR],
    )
    with cuda, mock.patch("torch.export.export", exported), Devices(), Kernels():
        yield
