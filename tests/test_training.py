import math
import shutil
import types
from functools import partial

import pytest
import torch
from torch import nn

from common import checkpoint, masking
from common.errors import UserError
from common.models import build_model
from common.runtime import resume
from common.training import SCHEDULES, evaluate, learning_rates, train
from tests.conftest import distance, ending_at, interrupt, same, sgd, small_resnet, state
from tests.test_data import resident

SETTINGS = {
    "name": "test",
    "seed": 0,
    "batch_size": 4,
    "make_optimiser": sgd(0.9, 0.01),
    "precision": "fp32",
}


def tiny(seed=0):
    return build_model("mlp", 1 / 64, 2, (3, 8, 8), seed)


def masked(model):
    everything = masking.dense_mask(model.state_dict(), masking.prunable(model))
    half = masking.kept(everything) // 2
    return masking.prune_by_magnitude(model.state_dict(), everything, half)


def test_schedules_by_hand(monkeypatch):
    assert learning_rates("cosine", 0.8, 3) == pytest.approx([0.8, 0.6, 0.2])
    step = learning_rates("step", 0.4, 80, warmup=5)
    warm = [0.08, 0.16, 0.24, 0.32]
    assert step == pytest.approx([*warm, *26 * [0.4], *30 * [0.04], *20 * [0.004]])
    monkeypatch.setitem(SCHEDULES, "falling", lambda epoch, epochs: 1 - epoch)
    with pytest.raises(ValueError, match="falling gives rates below 0"):
        learning_rates("falling", 0.1, 3)


def test_evaluation_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.arange(8.0).log().repeat(len(x), 1)  # class 7 first, then 6, ...

    parts = [7, 6, 3, 2], [1]
    batches = [(torch.zeros(len(part), 1), torch.tensor(part)) for part in parts]
    loss, *accuracies = evaluate(Fixed().train(), iter(batches), top=(2, 5, 9))
    assert loss == pytest.approx(math.log(28) - math.log(7 * 6 * 3 * 2) / 5)
    assert accuracies == [20, 40, 60, 100]


def test_masked_steps_by_hand():
    """SGD with momentum 0.9 and weight decay, of kept weights; the rest is 0."""
    layer, data = nn.Linear(192, 2, bias=False), resident(count=4, pad=1, mean=0.1)
    mask = torch.rand(2, 192) < 0.5
    weight, momentum = layer.weight.detach() * mask, torch.zeros(2, 192)
    network = nn.Sequential(nn.Flatten(), layer)
    train(network, data, [0.1, 0.05], folder=None, mask={"1.weight": mask}, **SETTINGS)
    for epoch, rate in enumerate([0.1, 0.05]):
        ((images, labels),) = list(data.train_batches(4, 0, epoch))
        free = weight.clone().requires_grad_()
        nn.functional.cross_entropy(images.flatten(1) @ free.T, labels).backward()
        momentum = 0.9 * momentum + free.grad + 0.01 * weight
        weight = (weight - rate * momentum) * mask
    assert torch.allclose(layer.weight, weight, rtol=1e-4, atol=1e-6)
    assert (layer.weight[~mask] == 0).all()


def test_a_leaking_mask_stops_training(monkeypatch):
    monkeypatch.setattr(masking.Masker, "apply", lambda self: None)
    with pytest.raises(RuntimeError, match="pruned weights"):
        train(tiny(), resident(), [0.1], folder=None, mask=masked(tiny()), **SETTINGS)


CASES = [
    (tiny, "fp32", sgd(0.9, 0.01)),
    (small_resnet, "bf16", sgd(0.9, 0.01)),
    (tiny, "fp32", partial(torch.optim.AdamW, weight_decay=0.1)),
    (tiny, "fp32", torch.optim.SGD),  # which has no state
]


@pytest.mark.parametrize("network, precision, optimiser", CASES)
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(tmp_path, network, precision, optimiser):
    """Also within an epoch, with any optimiser's state and with augmentation."""
    data, drawn, calls = resident(count=16, mean=0.1), [], []
    rates, steps = [0.01, 0.008, 0.005, 0.002], data.steps(4)

    def lighter(images, generator):
        drawn.append(float(torch.rand(1, generator=generator)))
        return images + drawn[-1]

    settings = SETTINGS | {"precision": precision, "make_optimiser": optimiser}
    settings |= {"augment": lighter, "mask": masked(network()), "first_epoch": 3}
    whole, rest = network(), network(9)  # whatever that holds, the file replaces it
    expected = train(whole, data, rates, folder=tmp_path / "whole", **settings)
    assert [row["epoch"] for row in expected] == [4, 5, 6, 7]
    assert len({*drawn}) == 4 * steps  # another draw in each step
    settings |= {"folder": tmp_path / "cut", "checkpoint_minutes": 0, "at_epoch": calls.append}
    for step in (0, 2, steps):  # the end of an epoch; and in the next one
        with pytest.raises(InterruptedError), ending_at(3, step, interrupt):
            train(network(), data, rates, **settings)
    rows = train(rest, data, rates, **settings)
    assert calls == [4, 5, 6, 7] and same(whole.state_dict(), rest.state_dict())
    for row, other in zip(rows, expected, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


def test_the_state_of_another_run_is_not_taken(tmp_path):
    epochs = []
    run = partial(train, data=resident(), rates=[0.1], folder=tmp_path, at_epoch=epochs.append)
    for name in ("test", "another"):
        run(tiny(), **SETTINGS | {"name": name})
    assert epochs == [1, 1]
    with pytest.raises(UserError, match="was trained in fp32 by SGD and not bf16 by SGD"):
        run(tiny(), **SETTINGS | {"name": "another", "precision": "bf16"})


def test_a_network_trained_in_bf16_is_evaluated_in_fp32():
    data, network = resident(count=32), small_resnet()
    row = train(network, data, [0.05] * 2, folder=None, **SETTINGS | {"precision": "bf16"})[-1]
    exact, rounded = (evaluate(network, data.eval_batches(), (), kind) for kind in ("fp32", "bf16"))
    assert row["test_loss"] == exact[0] != rounded[0]


def test_a_resumed_run_has_the_layout_of_its_own_device(tmp_path):
    """Elsewhere, or with --compile, convolutions lie in memory in another order than in a file."""
    data, whole, rest = resident(count=16, mean=0.1), small_resnet(), small_resnet()
    train(whole, data, [0.05] * 2, folder=None, **SETTINGS)
    train(small_resnet(), data, [0.05], folder=tmp_path, **SETTINGS)
    cut = state(tmp_path / "resume.pt")
    for kept in cut["optimiser"].values():
        kept["momentum_buffer"] = kept["momentum_buffer"].contiguous()
    torch.save(cut, tmp_path / "resume.pt")
    train(rest, data, [0.05] * 2, folder=tmp_path, **SETTINGS)
    assert same(whole.state_dict(), rest.state_dict())


def test_the_state_is_written_every_so_many_seconds_and_at_the_end(tmp_path, monkeypatch):
    written, epochs = [], []
    clock = types.SimpleNamespace(perf_counter=lambda: 20 * len(epochs))
    monkeypatch.setattr(checkpoint, "save", lambda state, path: written.append(len(state["rows"])))
    monkeypatch.setattr(resume, "time", clock)
    monkeypatch.setattr(resume, "SAVE_INTERVAL", 30)
    for folder in (tmp_path, None):
        train(tiny(), resident(), [0.1] * 5, folder=folder, at_epoch=epochs.append, **SETTINGS)
    assert written == [2, 4, 5]


def test_augmentation_that_changes_the_shape_is_named():
    def shrink(images, generator):
        return images[..., 1:]

    with pytest.raises(ValueError, match="shrink made"):
        train(tiny(), resident(), [0.1], folder=None, augment=shrink, **SETTINGS)


def test_a_compiled_network_trains_as_the_plain_one(monkeypatch):
    ends, data = [], resident(count=16, mean=0.1)
    for compiled in (False, bool(shutil.which("g++"))):
        ends.append(tiny())
        train(ends[-1], data, [0.01], folder=None, compiled=compiled, **SETTINGS)
    assert distance(*(end.state_dict() for end in ends)) < 1e-3
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        train(tiny(), data, [0.01], folder=None, compiled=True, **SETTINGS)
