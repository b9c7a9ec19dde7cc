"""The edits of the README's table "To change X, edit Y", each made in a copy of the project."""

import contextlib
import functools
import importlib
import io
import itertools
import json
import re
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

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
SMALLER = (  # in every copy: few images, and a block a stage in ResNet20
    ("common/data/glyphs.py", "TRAIN, TEST = 10_000, 1_000", "TRAIN, TEST = 256, 100"),
    ("common/models.py", "for _ in range(2)]", "for _ in range(0)]"),
)
CHECKS = {  # of the mask file of stage 2
    "prune shortcuts too": lambda made: abs(made["sparsity"] - made["sparsity_total"]) < 1e-9,
    # Two rounds, and a weight a round is left to rounding.
    "prune layer by layer": lambda made: all(
        abs(entry.sum() - 0.7 * entry.numel()) < 3 for entry in made["mask"].values()
    ),
}
OTHER_MATCHING = "permutation.pt was made by other matching code"
NO_WAY_ON = {  # what says that a run of old code cannot be completed
    "your own similarity": OTHER_MATCHING,
    "fewer matching images": OTHER_MATCHING,
    "AdamW in the sparse stage": "was trained in fp32 by SGD and not fp32 by AdamW",
}


class Edit(NamedTuple):
    file: str
    changes: str  # the first stage whose result changes
    called_with: dict  # what else the edited project needs: model, data, or flags of a stage
    patches: list  # of each a text that the file holds once, and what takes its place


def read_edits():
    """Those of ablations.txt, by name."""
    edits = {}
    for block in (ROOT / "tests/ablations.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.splitlines()
        name, file, changes, *called_with = head.split(" | ")
        parts = itertools.groupby(lines, lambda line: line[0])
        texts = ["\n".join(line[1:] for line in part) for _, part in parts]
        patches = [*zip(texts[::2], texts[1::2])]
        edits[name] = Edit(file, changes, dict(one.split("=") for one in called_with), patches)
    return edits


EDITS = read_edits()
ROUNDING = EDITS.pop("a rule that rounds")

# ---------------------------------------------------------------- copies and their processes


def copied(folder, edit=None):
    """A copy of the project, edited; fails where a text to replace is not there once."""
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("*.pyc"))
    for script in STAGES:
        shutil.copy(ROOT / f"{script}.py", folder)
    edited = [(edit.file, *patch) for patch in edit.patches] if edit else []
    for file, old, new in (*SMALLER, *edited):
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
        (folder / file).write_text(text.replace(old, new))
    return folder


def command(stage, runs, out, model, **other):
    """A stage's command line, which reads from `runs` and writes to `out`."""
    texts = USUAL | {"runs": runs, "out": out, "model": model} | other
    return [f"{stage}.py", *f"{STAGES[stage]} {other.get(stage, '')}".format(**texts).split()]


def call_all(project, commands, cut_off):
    """The exit code and output of each command, in a process that has nothing of common/ yet."""
    sys.path.insert(0, str(project))
    torch.set_num_threads(1)
    from common import checkpoint, cli, data
    from common.runtime import resume

    save = checkpoint.save

    def save_and_stop(content, path):
        save(content, path)
        if path.name in ("resume.pt", "permutation.pt"):
            raise KeyboardInterrupt

    if cut_off:
        checkpoint.save, resume.SAVE_INTERVAL = save_and_stop, -1
    data.read_glyphs = functools.cache(data.read_glyphs)
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
    edit, stages = EDITS[name], [*STAGES]
    stage, later = edit.changes, stages[stages.index(edit.changes) :]
    model = edit.called_with.get("of", MLP)
    folder, called_with = unedited(model), {"model": model} | edit.called_with
    old, new = tmp_path / "old", tmp_path / "new"
    runs, cut = old / "runs", old / "cut"
    shutil.copytree(folder, old)
    shutil.copytree(runs, new)
    for one in later:
        shutil.rmtree(new / RESULTS[one][0].split("/")[0])
    outcomes = run(
        copied(tmp_path / "project", edit),
        *(command(one, new, new, **called_with) for one in later),
        *(command(one, runs, runs, model) for one in ("train_dense", stage)),
        command(stage, runs, cut, model),
    )
    for code, text in outcomes[: len(later)]:
        assert code == 0, text
    before, after = (content(root, stage) for root in (runs, new))
    assert after[0] != before[0] and after[1] == after[2] != before[1]
    masks = [torch.load(new / path, weights_only=True) for path in MASKS]
    for made in masks:
        entries = torch.cat([entry.flatten() for entry in made["mask"].values()])
        assert entries.sum() == round(0.7 * len(entries))
    for key, entry in made["mask"].items():  # of the sparse network
        assert not made["state_dict"][key][~entry].any()
    if name in CHECKS:
        assert CHECKS[name](masks[0])

    (_, first), (_, finished), (code, text) = outcomes[len(later) :]
    of_stage_1 = edit.file.startswith(("common/", "train_dense"))
    assert ("by other code" in first) == of_stage_1
    assert "is finished, by other code" in finished
    assert before == content(folder / "runs", stage)
    if name in NO_WAY_ON:
        assert code == 2 and NO_WAY_ON[name] in text
    else:
        assert code == 0 and "goes on under other code" in text, text
        assert content(cut, stage)[1:] == (f"{before[1]}+{after[1]}",) * 2
        arguments = cut / RESULTS[stage][0] / "arguments.json"
        assert json.loads(arguments.read_text())["code"] == [before[1], after[1]]


def test_a_pruning_rule_that_rounds_is_named_at_once(unedited, tmp_path):
    runs = unedited(MLP) / "runs"
    project = copied(tmp_path / "project", ROUNDING)
    with pytest.raises(ValueError, match="^rounding kept "):
        run(project, command("prune_imp", runs, tmp_path, MLP))
    assert not list((tmp_path / "imp").glob("*.pt"))  # not even resume.pt: nothing was trained


def test_the_readme_names_the_place_of_each_edit():
    table = (ROOT / "README.md").read_text()
    for name, edit in EDITS.items():
        place = re.search(rf"^\| {name} \| `(\w+)=?` in `([\w/.]+)`", table, re.MULTILINE)
        assert place, name
        name_there, file = place.groups()
        assert file == edit.file and name_there in (ROOT / file).read_text(), name
