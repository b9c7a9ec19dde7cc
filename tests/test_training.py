import copy
import math
import shutil
import types
from functools import partial

import pytest
import torch
from torch import nn

from common import masking
from common.errors import UserError
from common.models import build_model
from common.runtime.device import pick_device, pick_precision
from common.training import evaluate, learning_rates, train
from tests.conftest import same, sgd
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


def test_schedules_by_hand():
    assert learning_rates("cosine", 0.8, 4) == pytest.approx(
        [0.8, 0.4 * (1 + math.sqrt(0.5)), 0.4, 0.4 * (1 - math.sqrt(0.5))]
    )
    step = learning_rates("step", 0.4, 80, warmup=5)
    assert step[:6] == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4, 0.4])
    assert (
        step[29:31] == pytest.approx([0.4, 0.04])
        and step[60] == pytest.approx(0.004)
        and len(step) == 80
    )


def test_evaluation_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            return torch.tensor([[math.log(3.0), 0.0]]).repeat(
                len(x), 1
            )  # probabilities 3/4 and 1/4

    batches = [(torch.zeros(3, 1), torch.tensor([0, 0, 1])), (torch.zeros(1, 1), torch.tensor([0]))]
    loss, accuracy = evaluate(Fixed(), iter(batches))
    assert loss == pytest.approx((3 * math.log(4 / 3) + math.log(4)) / 4) and accuracy == 75

    class Ranked(nn.Module):
        def forward(self, x):
            return torch.arange(8.0).repeat(len(x), 1)  # class 7 first, then 6, ...

    batches = [
        (torch.zeros(4, 1), torch.tensor([7, 6, 3, 2])),
        (torch.zeros(1, 1), torch.tensor([0])),
    ]
    assert evaluate(Ranked(), iter(batches), top=(2, 5, 9))[1:] == [20, 40, 60, 100]


def test_one_masked_step_by_hand(tmp_path):
    """SGD with momentum 0.9 and weight decay: after two steps the kept weights are those of the
    formula, the rest 0.
    """
    data, model = (
        resident(count=4, pad=1, mean=0.1),
        nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False)),
    )
    mask = {"1.weight": torch.rand(2, 192) < 0.5}
    with torch.no_grad():
        model[1].weight.mul_(mask["1.weight"])
    weight, momentum = model[1].weight.detach().clone(), torch.zeros(2, 192)
    train(model, data, [0.1, 0.05], folder=tmp_path, mask=mask, **SETTINGS)
    for epoch, rate in enumerate([0.1, 0.05]):
        ((images, labels),) = list(data.train_batches(4, 0, epoch))
        free = weight.clone().requires_grad_()
        nn.functional.cross_entropy(images.flatten(1) @ free.T, labels).backward()
        momentum = 0.9 * momentum + free.grad + 0.01 * weight
        weight = (weight - rate * momentum) * mask["1.weight"]
    assert torch.allclose(model[1].weight, weight, rtol=1e-4, atol=1e-6)
    assert (model[1].weight[~mask["1.weight"]] == 0).all()


def test_a_leaking_mask_stops_training(tmp_path, monkeypatch):
    monkeypatch.setattr(masking.Masker, "apply", lambda self: None)
    model = tiny()
    mask = {
        name: torch.zeros_like(model.state_dict()[name], dtype=torch.bool)
        for name in masking.prunable(model)
    }
    with pytest.raises(RuntimeError, match="pruned weights"):
        train(model, resident(), [0.1], folder=tmp_path, mask=mask, **SETTINGS)


@pytest.mark.parametrize("masked, network", [(False, "mlp"), (True, "mlp"), (True, "resnet20")])
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(tmp_path, masked, network):
    def tiny(seed=0):
        return build_model(network, 1 / 64 if network == "mlp" else 0.25, 2, (3, 8, 8), seed)

    settings = SETTINGS | {"precision": "fp32" if network == "mlp" else "bf16"}
    data, rates = resident(count=32), [0.1, 0.08, 0.05, 0.02]
    mask = None
    if masked:
        mask = masking.prune_by_magnitude(
            tiny().state_dict(),
            masking.dense_mask(tiny().state_dict(), masking.prunable(tiny())),
            300,
        )
    whole = tiny()
    expected = train(
        whole, data, rates, folder=tmp_path / "whole", mask=mask, first_epoch=3, **settings
    )
    assert [row["epoch"] for row in expected] == [4, 5, 6, 7]

    class Killed(Exception):
        pass

    def kill(epoch):
        if epoch == 6:
            raise Killed

    with pytest.raises(Killed):
        train(
            tiny(),
            data,
            rates,
            folder=tmp_path / "cut",
            mask=mask,
            first_epoch=3,
            at_epoch=kill,
            **settings,
        )
    rest, calls = tiny(seed=9), []  # whatever the network holds, the resume file replaces it
    rows = train(
        rest,
        data,
        rates,
        folder=tmp_path / "cut",
        mask=mask,
        first_epoch=3,
        at_epoch=calls.append,
        **settings,
    )
    assert calls == [6, 7]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values())
    )
    without_time = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in (rows, expected)
    ]
    assert without_time[0] == without_time[1]
    other = settings | {"name": "another"}  # the resume file of another run is not taken
    assert len(train(tiny(), data, rates[:1], folder=tmp_path / "cut", **other)) == 1
    mixed = other | {"precision": "bf16" if network == "mlp" else "fp32"}
    with pytest.raises(UserError, match="was trained in"):
        train(tiny(), data, rates, folder=tmp_path / "cut", **mixed)


def test_a_network_trained_in_bf16_is_evaluated_in_fp32():
    data, network = resident(count=32), build_model("resnet20", 0.25, 2, (3, 8, 8), 0)
    row = train(network, data, [0.05] * 2, folder=None, **SETTINGS | {"precision": "bf16"})[-1]
    exact = copy.deepcopy(network).double().eval()(next(data.eval_batches())[0].double())
    loss = nn.functional.cross_entropy(exact, data.test_labels)
    assert row["test_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_resumed_run_has_the_layout_of_its_own_device(tmp_path):
    """A run may go on elsewhere, or with --compile, where convolutions lie in memory in another
    order than in its file.
    """

    def network():
        return build_model("resnet20", 0.25, 2, (3, 8, 8), 0)

    data, rates, whole, rest = resident(count=16, mean=0.1), [0.05, 0.05], network(), network()
    train(whole, data, rates, folder=tmp_path / "whole", **SETTINGS)
    train(network(), data, rates[:1], folder=tmp_path / "cut", **SETTINGS)
    state = torch.load(tmp_path / "cut/resume.pt", weights_only=True)
    changed = 0
    for kept in state["optimiser"].values():
        before = kept["momentum_buffer"]
        kept["momentum_buffer"] = before.contiguous()
        changed += before.stride() != kept["momentum_buffer"].stride()
    assert changed > 10
    torch.save(state, tmp_path / "cut/resume.pt")
    train(rest, data, rates, folder=tmp_path / "cut", **SETTINGS)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values())
    )


def test_the_state_is_written_every_so_many_seconds_and_at_the_end(tmp_path, monkeypatch):
    written, now = [], 0.0

    def clock():
        nonlocal now
        now += 0.001
        return now

    def end_of_epoch(epoch):
        nonlocal now
        now += 20

    monkeypatch.setattr(
        "common.checkpoint.save", lambda state, path: written.append(len(state["rows"]))
    )
    monkeypatch.setattr("common.runtime.resume.time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("common.runtime.resume.EVERY", 30)
    train(tiny(), resident(), [0.1] * 5, folder=tmp_path, at_epoch=end_of_epoch, **SETTINGS)
    assert written == [2, 4, 5]
    written.clear()
    train(tiny(), resident(), [0.1] * 2, folder=None, **SETTINGS)
    assert not written


OPTIMISERS = {
    "nesterov": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "adamw": partial(torch.optim.AdamW, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, centered=True),
    "no state": torch.optim.SGD,
}


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_any_optimiser_trains_and_goes_on(tmp_path, make):
    """With its own state: momenta, squares, step counts. The schedule sets its learning rate."""
    seen, data = [], resident(count=16, mean=0.1)

    def noted(parameters):
        optimiser = make(parameters, lr=9.0)
        optimiser.register_step_pre_hook(lambda *_: seen.append(optimiser.param_groups[0]["lr"]))
        return optimiser

    settings = SETTINGS | {"make_optimiser": noted}
    whole, rest = tiny(), tiny(seed=9)
    expected = train(whole, data, [0.01, 0.002, 0.005], folder=tmp_path / "whole", **settings)
    assert sorted(set(seen)) == [0.002, 0.005, 0.01] and len(seen) == 3 * data.steps(4)
    by_sgd = train(tiny(), data, [0.01, 0.002, 0.005], folder=tmp_path / "sgd", **SETTINGS)
    assert by_sgd[-1]["train_loss"] != expected[-1]["train_loss"]

    def kill(epoch):
        if epoch == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(
            tiny(), data, [0.01, 0.002, 0.005], folder=tmp_path / "cut", at_epoch=kill, **settings
        )
    rows = train(rest, data, [0.01, 0.002, 0.005], folder=tmp_path / "cut", **settings)
    assert same(whole.state_dict(), rest.state_dict()) and len(rows) == 3


def test_augmentation_is_drawn_from_seed_and_epoch_and_keeps_the_shape(tmp_path):
    data, drawn = resident(count=8), []

    def noise(images, generator):
        drawn.append(torch.rand(2, generator=generator, device=images.device).tolist())
        return images + 1

    for _ in range(2):
        train(tiny(), data, [0.01] * 2, folder=None, augment=noise, **SETTINGS)
    assert drawn[:4] == drawn[4:] and len(set(map(tuple, drawn))) == 4
    plain = train(tiny(), data, [0.01], folder=None, **SETTINGS)
    changed = train(tiny(), data, [0.01], folder=None, augment=noise, **SETTINGS)
    assert plain[0]["train_loss"] != changed[0]["train_loss"]
    with pytest.raises(ValueError, match="shrink made"):
        train(tiny(), data, [0.01], folder=None, augment=shrink, **SETTINGS)


def shrink(images, generator):
    return images[..., 1:]


def test_a_compiled_network_trains_as_the_plain_one(tmp_path, monkeypatch):
    data, plain, compiled = resident(count=16, mean=0.1), tiny(), tiny()
    expected = train(plain, data, [0.01], folder=tmp_path / "a", **SETTINGS)
    if shutil.which("g++"):
        rows = train(compiled, data, [0.01], folder=tmp_path / "b", compiled=True, **SETTINGS)
        assert rows[0]["train_loss"] == pytest.approx(expected[0]["train_loss"], rel=1e-4)
        assert compiled.state_dict().keys() == plain.state_dict().keys()
        for name, value in compiled.state_dict().items():
            assert torch.allclose(value, plain.state_dict()[name], rtol=1e-3, atol=1e-5)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        train(tiny(), data, [0.01], folder=tmp_path / "c", compiled=True, **SETTINGS)


def test_training_learns(tmp_path):
    rows = train(tiny(), resident(count=40, mean=0.1), [0.01] * 6, folder=tmp_path, **SETTINGS)
    assert rows[-1]["train_loss"] < 0.8 * rows[0]["train_loss"]


def test_a_device_that_is_not_there_is_one_line():
    for name in ("cuda:99", "abacus"):
        with pytest.raises(UserError, match="--device cpu"):
            pick_device(name)
    assert pick_precision("fp32", torch.device("cpu")) == "fp32"
