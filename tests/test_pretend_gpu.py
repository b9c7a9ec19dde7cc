"""The pretended GPU itself: it refuses what a real one would."""

import pytest
import torch

from common.runtime.device import pick_device
from tests.pretend_gpu import pretend_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is here")


@pytest.fixture(autouse=True)
def gpu():
    with pretend_gpu():
        yield


def refused(*asked):
    for ask in asked:
        with pytest.raises((RuntimeError, TypeError)):
            ask()


def test_tensors_of_two_devices_do_not_mix():
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    assert there.device == torch.device("cuda:0") and torch.equal(there.cpu(), here)
    assert (there * torch.tensor(2.0)).tolist() == [0, 2, 4]
    refused(lambda: here + there, lambda: here[0].add_(there[0]), there.numpy)


def test_what_is_captured_is_computed_when_replayed():
    total, ones = torch.zeros(2, device="cuda"), torch.ones(2, device="cuda")
    graph, factor = torch.cuda.CUDAGraph(), torch.tensor(2.0)
    with torch.cuda.graph(graph):
        total.add_(ones * factor)
        refused(lambda: float(total[0]), total.cpu)
    assert total.tolist() == [0, 0]
    ones.fill_(3)
    factor.fill_(5)  # a number of the host is captured as it was
    for count in (6, 12):
        graph.replay()
        assert total.tolist() == [count] * 2


def test_a_stream_waits_for_what_another_writes():
    ones, other = torch.ones(2, device="cuda"), torch.cuda.Stream()
    with torch.cuda.stream(other):
        refused(lambda: ones + 1)
        other.wait_stream(torch.cuda.default_stream())
        twos = ones + 1
    refused(lambda: twos.add_(1))
    torch.cuda.synchronize()
    assert (twos + 1).tolist() == [3, 3]


def test_the_gpu_that_is_named_is_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:0") == torch.device("cuda:0") and current == [torch.device("cuda:0")]
    assert pick_device(None).type == "cuda" and len(current) == 1
