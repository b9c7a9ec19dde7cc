import math
import shutil
import types
from functools import partial

import pytest
import torch
from torch import nn

from common import checkpoint, masking, training
from common.errors import UserError
from common.models import build_model
from common.runtime import distributed, resume
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


def half_mask(model):
    """Keep the larger half of the weights."""
    full = masking.dense_mask(model.state_dict(), masking.prunable(model))
    return masking.prune_by_magnitude(model.state_dict(), full, masking.num_kept(full) // 2)


def test_schedules_by_hand(monkeypatch):
    assert learning_rates("cosine", 0.8, 3) == pytest.approx([0.8, 0.6, 0.2])
    step = learning_rates("step", 0.4, 80, warmup=5)
    warmup = [0.08, 0.16, 0.24, 0.32]
    assert step == pytest.approx([*warmup, *26 * [0.4], *30 * [0.04], *20 * [0.004]])
    monkeypatch.setitem(SCHEDULES, "falling", lambda epoch, epochs: 1 - epoch)
    with pytest.raises(ValueError, match="falling gives rates below 0"):
        learning_rates("falling", 0.1, 3)


def test_evaluation_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            assert not self.training
            return torch.arange(8.0).log().repeat(len(x), 1)  # ranks class 7 first, then 6, ...

    labels = [7, 6, 3, 2], [1]  # of two batches
    batches = [(torch.zeros(len(batch), 1), torch.tensor(batch)) for batch in labels]
    loss, *accuracies = evaluate(Fixed().train(), iter(batches), topk=(2, 5, 9))
    assert loss == pytest.approx(math.log(28) - math.log(7 * 6 * 3 * 2) / 5)
    assert accuracies == [20, 40, 60, 100]


def test_masked_steps_by_hand():
    """SGD with momentum 0.9 and weight decay on the kept weights; pruned weights are 0."""
    layer, data = nn.Linear(192, 2, bias=False), resident(count=4, pad=1, mean=0.1)
    mask = torch.rand(2, 192) < 0.5
    weight, momentum = layer.weight.detach() * mask, torch.zeros(2, 192)
    model = nn.Sequential(nn.Flatten(), layer)
    train(model, data, [0.1, 0.05], folder=None, mask={"1.weight": mask}, **SETTINGS)
    for epoch, rate in enumerate([0.1, 0.05]):
        ((images, labels),) = list(data.train_batches(4, 0, epoch))
        leaf = weight.clone().requires_grad_()
        nn.functional.cross_entropy(images.flatten(1) @ leaf.T, labels).backward()
        momentum = 0.9 * momentum + leaf.grad + 0.01 * weight
        weight = (weight - rate * momentum) * mask
    assert torch.allclose(layer.weight, weight, rtol=1e-4, atol=1e-6)
    assert (layer.weight[~mask] == 0).all()


def test_a_leaking_mask_stops_training(monkeypatch):
    monkeypatch.setattr(masking.Masker, "apply", lambda self: None)
    with pytest.raises(RuntimeError, match="pruned weights"):
        train(tiny(), resident(), [0.1], folder=None, mask=half_mask(tiny()), **SETTINGS)


CASES = [
    (tiny, "fp32", sgd(0.9, 0.01)),
    (small_resnet, "bf16", sgd(0.9, 0.01)),
    (tiny, "fp32", partial(torch.optim.AdamW, weight_decay=0.1)),
    (tiny, "fp32", torch.optim.SGD),  # without momentum it has no state
]


@pytest.mark.parametrize("make_model, precision, optimiser", CASES)
def test_an_interrupted_run_ends_with_the_same_numbers(tmp_path, make_model, precision, optimiser):
    """Also within an epoch, with any optimiser's state and with augmentation."""
    data, offsets, epochs = resident(count=16, mean=0.1), [], []
    rates, steps = [0.01, 0.008, 0.005, 0.002], data.steps(4)

    def brighten(images, generator):
        offsets.append(float(torch.rand(1, generator=generator)))
        return images + offsets[-1]

    settings = SETTINGS | {"precision": precision, "make_optimiser": optimiser}
    settings |= {"augment": brighten, "mask": half_mask(make_model()), "first_epoch": 3}
    model, resumed = make_model(), make_model(9)  # the file replaces the weights of seed 9
    expected = train(model, data, rates, folder=tmp_path / "whole", **settings)
    assert [row["epoch"] for row in expected] == [4, 5, 6, 7]
    assert len({*offsets}) == 4 * steps  # every step draws anew
    settings |= {"folder": tmp_path / "cut", "checkpoint_minutes": 0, "at_epoch": epochs.append}
    for step in (0, 2, steps):  # at the end of an epoch, and within the next one
        with pytest.raises(InterruptedError), ending_at(3, step, interrupt):
            train(make_model(), data, rates, **settings)
    rows = train(resumed, data, rates, **settings)
    assert epochs == [4, 5, 6, 7] and same(model.state_dict(), resumed.state_dict())
    for row, expected_row in zip(rows, expected, strict=True):
        assert row | {"seconds": 0} == expected_row | {"seconds": 0}


def test_the_state_of_another_run_is_not_loaded(tmp_path):
    epochs = []
    run = partial(train, data=resident(), rates=[0.1], folder=tmp_path, at_epoch=epochs.append)
    for name in ("test", "another"):
        run(tiny(), **SETTINGS | {"name": name})
    assert epochs == [1, 1]
    with pytest.raises(UserError, match="was trained in fp32 by SGD and not bf16 by SGD"):
        run(tiny(), **SETTINGS | {"name": "another", "precision": "bf16"})


def test_a_network_trained_in_bf16_is_evaluated_in_fp32():
    data, model = resident(count=32), small_resnet()
    row = train(model, data, [0.05] * 2, folder=None, **SETTINGS | {"precision": "bf16"})[-1]
    fp32, bf16 = (evaluate(model, data.eval_batches(), (), dtype) for dtype in ("fp32", "bf16"))
    assert row["test_loss"] == fp32[0] != bf16[0]


def test_a_resumed_run_has_the_memory_format_of_its_own_device(tmp_path):
    """The file may hold another one, from another device or a run without --compile."""
    data, model, resumed = resident(count=16, mean=0.1), small_resnet(), small_resnet()
    train(model, data, [0.05] * 2, folder=None, **SETTINGS)
    train(small_resnet(), data, [0.05], folder=tmp_path, **SETTINGS)
    saved = state(tmp_path / "resume.pt")
    for buffers in saved["optimiser"].values():
        buffers["momentum_buffer"] = buffers["momentum_buffer"].contiguous()
    torch.save(saved, tmp_path / "resume.pt")
    train(resumed, data, [0.05] * 2, folder=tmp_path, **SETTINGS)
    assert same(model.state_dict(), resumed.state_dict())


def test_the_state_is_saved_at_intervals_and_at_the_end(tmp_path, monkeypatch):
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


def test_each_process_draws_its_own_augmentation(monkeypatch):
    draws = []

    def augment(images, generator):
        draws.append(float(torch.rand((), generator=generator)))
        return images

    for rank in (0, 1):
        patched = types.SimpleNamespace(**vars(distributed) | {"RANK": rank})
        monkeypatch.setattr(training, "distributed", patched)
        train(tiny(), resident(), [0.1], folder=None, augment=augment, **SETTINGS)
    assert len({*draws}) == len(draws) == 2


def test_a_compiled_network_trains_as_the_plain_one(monkeypatch):
    models, data = [], resident(count=16, mean=0.1)
    for compiled in (False, bool(shutil.which("g++"))):
        models.append(tiny())
        train(models[-1], data, [0.01], folder=None, compiled=compiled, **SETTINGS)
    assert distance(*(model.state_dict() for model in models)) < 1e-3
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        train(tiny(), data, [0.01], folder=None, compiled=True, **SETTINGS)
