"""The edits of the README's table "To change X, edit Y", each made in a copy of the project."""

import contextlib
import functools
import importlib
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

# Nothing of common/ is imported here: the processes below take it from the copy that they test.
ROOT = Path(__file__).parents[1]
STAGES = {
    "train_dense": "--model {model} --dataset {data} --image-size 8 --limit-train 128 --epochs 2 "
    "--seed 0 1 --out {out}/dense {how}",
    "prune_imp": "--dense {runs}/dense/seed0 --sparsity 0.3 --epochs 1 --out {out}/imp {how}",
    "align_mask": "--source {runs}/dense/seed0 --target {runs}/dense/seed1 --masks {runs}/imp "
    "--device cpu --out {out}/align",
    "train_sparse": "--arm permuted --weights {runs}/dense/seed1 --masks {runs}/align "
    "--sparsity 0.3 --rewind 0 --out {out}/sparse {how}",
}
USUAL = {"data": "glyphs", "how": "--batch-size 64 --precision fp32 --device cpu"}
RESULTS = {  # a stage's result: folder, file, and what in the file an edit changes
    "train_dense": ("dense/seed0", "epoch_0002.pt", "state_dict"),
    "prune_imp": ("imp", "mask_0.30.pt", "mask"),
    "align_mask": ("align", "permutation.pt", "permutation"),
    "train_sparse": ("sparse/s0.30_k000", "final.pt", "state_dict"),
}
MASKS = ("imp/mask_0.30.pt", "align/mask_0.30.pt", "sparse/s0.30_k000/final.pt")
MLP = "mlp --width 0.03125"
FEW_IMAGES = ("common/data/glyphs.py", "TRAIN, TEST = 10_000, 1_000", "TRAIN, TEST = 256, 100")

# ---------------------------------------------------------------- the edits

LAYERWISE = """\
def layerwise(weights, mask, keep):
    pruned, left = {}, masking.kept(mask)
    for name, entry in mask.items():
        count = int(entry.sum())
        share = keep * count // left  # so that the last layer makes the sum exact
        pruned |= masking.prune_by_magnitude(weights, {name: entry}, share)
        keep, left = keep - share, left - count
    return pruned


def prune_chain("""

ROUNDING = """\
def rounding(weights, mask, keep):
    share = keep / masking.kept(mask)
    return {
        name: masking.prune_by_magnitude(weights, {name: entry}, int(share * entry.sum()))[name]
        for name, entry in mask.items()
    }


def prune_chain("""

SMALL = """\
def small(width, classes, input_shape):
    hidden = channels(8, width)
    convolution = nn.Conv2d(input_shape[0], hidden, 3, bias=False)
    features = [convolution, nn.BatchNorm2d(hidden), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return initialise(nn.Sequential(*features, nn.Flatten(), nn.Linear(hidden, classes)))


MODELS = {"small": small, """

CUTOUT = """\
def cutout(images, generator):
    size, device = images.shape[-1], images.device
    low = torch.randint(size - 3, (2, len(images), 1, 1, 1), generator=generator, device=device)
    place = torch.arange(size, device=device)
    rows, columns = (low <= place) & (place < low + 4)
    return images.masked_fill(rows.mT & columns, 0.0)


def main() -> None:"""

BOTH_ACTIVE = """\
def both_active(target, source):
    return (target > 0).float().T @ (source > 0).float()


SIMILARITIES["both-active"] = both_active


def new_similarity("""

BRIGHTNESS = """\
def brightness(data_dir, image_size):
    def images(count):
        labels = torch.arange(count) % 3
        pixels = torch.arange(count * 3 * image_size**2).view(count, 3, image_size, image_size)
        return (pixels * 7919 % 80 + 80 * labels.view(-1, 1, 1, 1)).byte(), labels

    return *images(300), *images(60), ["dark", "grey", "bright"], None


SMALL_IMAGES["brightness"] = brightness
DATASETS ="""


class Edit(NamedTuple):
    changes: str  # the first stage whose result changes
    patches: tuple  # of each a file, a text that it holds once, and what takes its place
    model: str = MLP
    check: Callable = lambda mask: True  # of the content of the mask file of stage 2
    called_with: Any = ()  # what else the edited project needs: model, data, or flags of a stage


PRUNE = "masking.prune_exactly(masking.prune_by_magnitude,"


def pruned_by(function: str, name: str) -> tuple:
    """`function` before the stage's own, and by its name in place of the argument."""
    new = f"masking.prune_exactly({name},"
    return ("prune_imp.py", "def prune_chain(", function), ("prune_imp.py", PRUNE, new)


SGD = "partial(torch.optim.SGD, lr=0.0, momentum=momentum, weight_decay=decay, fused=True)"
ADAMW = "partial(torch.optim.AdamW, lr=0.0, weight_decay=decay)"
EDITS = {
    "prune shortcuts too": Edit(
        "prune_imp",
        (("common/masking.py", 'SHORTCUTS = {"shortcut", "downsample"}', "SHORTCUTS = set()"),),
        model="resnet20 --width 0.25",
        check=lambda mask: mask["sparsity"] == mask["sparsity_total"],
    ),
    "prune layer by layer": Edit(
        "prune_imp",
        pruned_by(LAYERWISE, "layerwise"),
        check=lambda mask: all(  # two rounds, and a weight a round is left to rounding
            abs(int(entry.sum()) - 0.7 * entry.numel()) < 3 for entry in mask["mask"].values()
        ),
    ),
    "AdamW in the sparse stage": Edit("train_sparse", (("train_sparse.py", SGD, ADAMW),)),
    "a new model": Edit(
        "train_dense", (("common/models.py", "MODELS = {", SMALL),), called_with={"model": "small"}
    ),
    "cutout": Edit(
        "train_dense",
        (
            ("train_dense.py", "def main() -> None:", CUTOUT),
            ("train_dense.py", "augment=None", "augment=cutout"),
        ),
    ),
    "an own similarity": Edit(
        "align_mask",
        (("common/align/matching.py", "def new_similarity(", BOTH_ACTIVE),),
        called_with={"align_mask": " --statistic both-active"},
    ),
    "an own schedule": Edit(
        "train_dense",
        (
            (
                "common/training.py",
                '    "step": ',
                '    "parabola": lambda epoch, epochs: (1 - epoch / epochs) ** 2,\n    "step": ',
            ),
        ),
        called_with={"train_dense": " --schedule parabola"},
    ),
    "an own data set": Edit(
        "train_dense",
        (("common/data/__init__.py", "\nDATASETS =", f"\n\n{BRIGHTNESS}"),),
        called_with={"data": "brightness"},
    ),
    "fewer matching images": Edit(
        "align_mask", (("common/cli.py", "MATCH_IMAGES = (None,", "MATCH_IMAGES = (20,"),)
    ),
}

# ---------------------------------------------------------------- copies and their processes


def copied(folder, *patches):
    """A copy of the project with `patches`; fails where the text to replace is not there once."""
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("*.pyc"))
    for script in STAGES:
        shutil.copy(ROOT / f"{script}.py", folder)
    for file, old, new in (FEW_IMAGES, *patches):
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
        (folder / file).write_text(text.replace(old, new))
    return folder


def command(stage, runs, out, model, **other):
    """A stage's command line, which reads from `runs` and writes to `out`."""
    texts = USUAL | {"runs": runs, "out": out, "model": model} | other
    return [f"{stage}.py", *(STAGES[stage] + other.get(stage, "")).format(**texts).split()]


def call_all(project, commands, cut_off):
    """The exit code and output of each command, in a process that has nothing of common/ yet."""
    sys.path.insert(0, str(project))
    torch.set_num_threads(1)
    from common import checkpoint, cli
    from common.data import glyphs
    from common.runtime import resume

    save = checkpoint.save

    def save_and_stop(content, path):
        save(content, path)
        if path.name in ("resume.pt", "permutation.pt"):
            raise KeyboardInterrupt

    if cut_off:
        checkpoint.save, resume.EVERY = save_and_stop, -1
    glyphs.glyphs = functools.cache(glyphs.glyphs)
    outcomes = []
    for sys.argv in commands:
        text, code = io.StringIO(), 0
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            try:
                cli.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
            except SystemExit as error:
                code = error.code
        outcomes.append((code, text.getvalue()))
    return outcomes


def run(project, *commands, cut_off=False):
    """Call stages of `project` in a new process, forked from one that has only imported torch."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pandas", "scipy.optimize", "matplotlib"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(call_all, project, commands, cut_off).result()


def content(out, stage):
    """What a stage made, and the code that result.json and the file say made it."""
    folder, name, key = RESULTS[stage]
    file = torch.load(out / folder / name, weights_only=True)
    result = json.loads((out / folder / "result.json").read_text())
    made = {name: value.tolist() for name, value in file[key].items()}
    return made, result["code"], file["code"]


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    """Of a model: a folder with `runs`, the four stages, and `cut`, each of them cut off."""

    @functools.cache
    def of(model):
        folder = tmp_path_factory.mktemp("unedited")
        project, runs = copied(folder / "project"), folder / "runs"
        for code, text in run(project, *(command(s, runs, runs, model) for s in STAGES)):
            assert code == 0, text
        cut = [command(stage, runs, folder / "cut", model) for stage in STAGES]
        assert [code for code, _ in run(project, *cut, cut_off=True)] == [130] * 4
        return folder

    return of


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_its_stage_and_no_old_run_is_taken_for_the_new_one(
    name, unedited, tmp_path
):
    edit = EDITS[name]
    folder, called_with = unedited(edit.model), {"model": edit.model} | dict(edit.called_with)
    shutil.copytree(folder / "runs", tmp_path / "runs")
    shutil.copytree(folder / "cut", tmp_path / "cut")
    runs, new, cut = (tmp_path / part for part in ("runs", "new", "cut"))
    outcomes = run(
        copied(tmp_path / "project", *edit.patches),
        *(command(stage, new, new, **called_with) for stage in STAGES),
        *(command(stage, runs, runs, edit.model) for stage in STAGES),
        command(edit.changes, runs, cut, edit.model),
    )
    files = [file for file, *_ in edit.patches]
    other_code = {stage: f"{stage}.py" in files or "common/" in "".join(files) for stage in STAGES}

    changed = False
    for stage, (code, text) in zip(STAGES, outcomes):
        assert code == 0, text
        before, after = content(folder / "runs", stage), content(new, stage)
        changed |= stage == edit.changes
        if not changed or stage == edit.changes:
            assert (after[0] != before[0]) == changed, stage
        assert after[1] == after[2] and (after[1] != before[1]) == other_code[stage]
    for path in MASKS:
        mask = torch.load(new / path, weights_only=True)
        kept = [int(entry.sum()) for entry in mask["mask"].values()]
        size = sum(entry.numel() for entry in mask["mask"].values())
        assert sum(kept) == round(0.7 * size)
    for key, entry in mask["mask"].items():  # of the sparse network
        assert not mask["state_dict"][key][~entry].any()
    assert edit.check(torch.load(new / MASKS[0], weights_only=True))

    for stage, (code, text) in zip(STAGES, outcomes[4:]):
        assert code == 0 and all("is finished" in line for line in text.splitlines()), text
        assert ("by other code" in text) == other_code[stage], text
        assert content(runs, stage) == content(folder / "runs", stage)

    code, text = outcomes[-1]
    if edit.changes == "align_mask":
        assert code == 2 and "permutation.pt was made of another code" in text
    elif "AdamW" in name:
        assert code == 2 and "was trained in fp32 by SGD and not fp32 by AdamW" in text
    else:
        assert code == 0 and "goes on under other code" in text, text
        then, now = content(runs, edit.changes)[1], content(new, edit.changes)[1]
        assert content(cut, edit.changes)[1:] == (f"{then}+{now}",) * 2
        arguments = cut / RESULTS[edit.changes][0] / "arguments.json"
        assert json.loads(arguments.read_text())["code"] == [then, now]


def test_a_pruning_rule_that_rounds_is_named_at_once(unedited, tmp_path):
    runs = unedited(MLP) / "runs"
    project = copied(tmp_path / "project", *pruned_by(ROUNDING, "rounding"))
    with pytest.raises(ValueError, match="^rounding kept "):
        run(project, command("prune_imp", runs, tmp_path, MLP))
    assert not list((tmp_path / "imp").glob("*.pt"))  # not even resume.pt: nothing was trained


def test_the_readme_names_the_place_of_each_edit():
    table = (ROOT / "README.md").read_text()
    for name, edit in EDITS.items():
        place = re.search(rf"^\| {name} \| `(\w+)=?` in `([\w/.]+)`", table, re.MULTILINE)
        assert place, name
        name_there, file = place.groups()
        assert {file} == {file for file, *_ in edit.patches}, name
        assert name_there in (ROOT / file).read_text(), name
