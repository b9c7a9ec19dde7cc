"""The emulated GPU raises errors where a real one would."""

import pytest
import torch

from common.runtime.device import pick_device
from tests.pretend_gpu import pretend_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is available")


@pytest.fixture(autouse=True)
def gpu():
    with pretend_gpu():
        yield


def expect_errors(*calls):
    for call in calls:
        with pytest.raises((RuntimeError, TypeError)):
            call()


def test_tensors_of_two_devices_do_not_mix():
    on_cpu, on_gpu = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert on_gpu.device == torch.device("cuda:0") and torch.equal(on_gpu.cpu(), on_cpu)
    assert (on_gpu * torch.tensor(2.0)).tolist() == [0, 2, 4]
    expect_errors(lambda: on_cpu + on_gpu, lambda: on_cpu[0].add_(on_gpu[0]), on_gpu.numpy)


def test_a_captured_graph_computes_only_on_replay():
    total, ones = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    graph, factor = torch.cuda.CUDAGraph(), torch.tensor(2.0)
    with torch.cuda.graph(graph):
        total.add_(ones * factor)
        expect_errors(lambda: float(total[0]), total.cpu, lambda: ones[ones > 0])
    assert total.tolist() == [0, 0]
    ones.fill_(3)
    factor.fill_(5)  # a CPU scalar keeps its captured value
    for count in (6, 12):
        graph.replay()
        assert total.tolist() == [count] * 2


def test_a_stream_must_wait_for_another_that_writes_its_input():
    ones, side = torch.ones(2, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(side):
        expect_errors(lambda: ones + 1)
        side.wait_stream(torch.cuda.default_stream())
        twos = ones + 1
    expect_errors(lambda: twos.add_(1))
    torch.cuda.synchronize()
    assert (twos + 1).tolist() == [3, 3]


def test_the_selected_gpu_becomes_the_current_device(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:0") == torch.device("cuda:0") and current == [torch.device("cuda:0")]
    assert pick_device(None).type == "cuda" and len(current) == 1
