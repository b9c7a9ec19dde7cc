"""Apply the edits of README's table "To change X, edit Y" to copies of the project."""

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

# Import nothing from common/ here: the processes below import it from the copy that they test.
ROOT = Path(__file__).parents[1]
STAGES = {
    "train_dense": "--model {model} --dataset {data} --image-size 8 --limit-train 128 --epochs 2 "
    "--seed 0 1 --out {out}/dense {options}",
    "prune_imp": "--dense {runs}/dense/seed0 --sparsity 0.3 --epochs 1 --out {out}/imp {options}",
    "align_mask": "--source {runs}/dense/seed0 --target {runs}/dense/seed1 --masks {runs}/imp "
    "--device cpu --out {out}/align",
    "train_sparse": "--arm permuted --weights {runs}/dense/seed1 --masks {runs}/align "
    "--sparsity 0.3 --rewind 0 --out {out}/sparse {options}",
}
DEFAULTS = {"data": "glyphs", "options": "--batch-size 64 --precision fp32 --device cpu"}
RESULTS = {  # of each stage: run folder, file, and the key in it that an edit changes
    "train_dense": ("dense/seed0", "epoch_0002.pt", "state_dict"),
    "prune_imp": ("imp", "mask_0.30.pt", "mask"),
    "align_mask": ("align", "permutation.pt", "permutation"),
    "train_sparse": ("sparse/s0.30_k000", "final.pt", "state_dict"),
}
MASKS = ("imp/mask_0.30.pt", "align/mask_0.30.pt", "sparse/s0.30_k000/final.pt")
MLP = "mlp --width 0.03125"
SMALLER = (  # in every copy: few images, and one block per stage in ResNet20
    ("common/data/glyphs.py", "TRAIN, TEST = 10_000, 1_000", "TRAIN, TEST = 256, 100"),
    ("common/models.py", "for _ in range(2)]", "for _ in range(0)]"),
)
CHECKS = {  # of the mask file of stage 2
    "prune shortcuts too": lambda info: abs(info["sparsity"] - info["sparsity_total"]) < 1e-9,
    # Each of the two rounds rounds by up to one weight.
    "prune layer by layer": lambda info: all(
        abs(kept.sum() - 0.7 * kept.numel()) < 3 for kept in info["mask"].values()
    ),
}
OTHER_MATCHING = "permutation.pt was made by other matching code"
CANNOT_RESUME = {  # the error when the edited code resumes a run of the original code
    "your own similarity": OTHER_MATCHING,
    "fewer matching images": OTHER_MATCHING,
    "AdamW in the sparse stage": "was trained in fp32 by SGD and not fp32 by AdamW",
}


class Edit(NamedTuple):
    file: str
    stage: str  # the first stage whose result changes
    settings: dict  # what else the edited project needs: model, data, or flags of a stage
    patches: list  # pairs: a text that occurs once in the file, and its replacement


def read_edits():
    """Read the edits of ablations.txt, by name."""
    edits = {}
    for block in (ROOT / "tests/ablations.txt").read_text().split("\n\n")[1:]:
        head, *lines = block.splitlines()
        name, file, stage, *settings = head.split(" | ")
        groups = itertools.groupby(lines, lambda line: line[0])
        texts = ["\n".join(line[1:] for line in group) for _, group in groups]
        patches = [*zip(texts[::2], texts[1::2])]
        edits[name] = Edit(file, stage, dict(pair.split("=") for pair in settings), patches)
    return edits


EDITS = read_edits()
ROUNDING = EDITS.pop("a rule that rounds")

# ---------------------------------------------------------------- copies and their processes


def copy_project(folder, edit=None):
    """Copy the project and apply an edit; fails unless its texts occur exactly once."""
    shutil.copytree(ROOT / "common", folder / "common", ignore=shutil.ignore_patterns("*.pyc"))
    for script in STAGES:
        shutil.copy(ROOT / f"{script}.py", folder)
    patches = [(edit.file, *patch) for patch in edit.patches] if edit else []
    for file, old, new in (*SMALLER, *patches):
        text = (folder / file).read_text()
        assert text.count(old) == 1, f"{text.count(old)} times in {file}: {old}"
        (folder / file).write_text(text.replace(old, new))
    return folder


def command(stage, runs, out, model, **settings):
    """Return the command line of a stage that reads from `runs` and writes to `out`."""
    values = DEFAULTS | {"runs": runs, "out": out, "model": model} | settings
    return [f"{stage}.py", *f"{STAGES[stage]} {settings.get(stage, '')}".format(**values).split()]


def call_all(project, commands, interrupt):
    """Return exit code and output of each command; common/ must not be imported yet."""
    sys.path.insert(0, str(project))
    torch.set_num_threads(1)
    from common import checkpoint, cli, data
    from common.runtime import resume

    save = checkpoint.save

    def save_and_interrupt(content, path):
        save(content, path)
        if path.name in ("resume.pt", "permutation.pt"):
            raise KeyboardInterrupt

    if interrupt:
        checkpoint.save, resume.SAVE_INTERVAL = save_and_interrupt, -1
    data.read_glyphs = functools.cache(data.read_glyphs)
    outcomes = []
    for sys.argv in commands:
        output, code = io.StringIO(), 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                cli.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
            except SystemExit as error:
                code = error.code
        outcomes.append((code, output.getvalue()))
    return outcomes


def run(project, *commands, interrupt=False):
    """Call stages of `project` in a new process, forked from one with imported packages only."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "pandas", "scipy.optimize", "matplotlib"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(call_all, project, commands, interrupt).result()


def content(out, stage):
    """Return the result of a stage, and the code digests in result.json and in its file."""
    folder, name, key = RESULTS[stage]
    file = torch.load(out / folder / name, weights_only=True)
    result = json.loads((out / folder / "result.json").read_text())
    tensors = {name: value.tolist() for name, value in file[key].items()}
    return tensors, result["code"], file["code"]


@pytest.fixture(scope="module")
def unedited(tmp_path_factory):
    """Return a function that runs all stages of the original code with a model.

    It returns a folder with `runs`, the finished stages, and `interrupted`, the interrupted ones.
    """

    @functools.cache
    def run_stages(model):
        folder = tmp_path_factory.mktemp("unedited")
        project, runs = copy_project(folder / "project"), folder / "runs"
        for code, output in run(project, *(command(s, runs, runs, model) for s in STAGES)):
            assert code == 0, output
        commands = [command(stage, runs, folder / "interrupted", model) for stage in STAGES]
        assert [code for code, _ in run(project, *commands, interrupt=True)] == [130] * 4
        return folder

    return run_stages


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_its_stage_and_old_runs_stay_apart_from_new_ones(name, unedited, tmp_path):
    edit, stages = EDITS[name], [*STAGES]
    stage, rerun = edit.stage, stages[stages.index(edit.stage) :]
    model = edit.settings.get("of", MLP)
    folder, settings = unedited(model), {"model": model} | edit.settings
    old, new = tmp_path / "old", tmp_path / "new"
    runs, interrupted = old / "runs", old / "interrupted"
    shutil.copytree(folder, old)
    shutil.copytree(runs, new)
    for s in rerun:
        shutil.rmtree(new / RESULTS[s][0].split("/")[0])
    outcomes = run(
        copy_project(tmp_path / "project", edit),
        *(command(s, new, new, **settings) for s in rerun),
        *(command(s, runs, runs, model) for s in ("train_dense", stage)),
        command(stage, runs, interrupted, model),
    )
    for code, output in outcomes[: len(rerun)]:
        assert code == 0, output
    before, after = (content(root, stage) for root in (runs, new))
    assert after[0] != before[0] and after[1] == after[2] != before[1]
    masked = [torch.load(new / path, weights_only=True) for path in MASKS]
    for saved in masked:
        flat = torch.cat([kept.flatten() for kept in saved["mask"].values()])
        assert flat.sum() == round(0.7 * len(flat))
    for key, kept in saved["mask"].items():  # the sparse network is the last
        assert not saved["state_dict"][key][~kept].any()
    if name in CHECKS:
        assert CHECKS[name](masked[0])

    (_, dense_output), (_, stage_output), (code, output) = outcomes[len(rerun) :]
    changes_stage_1 = edit.file.startswith(("common/", "train_dense"))
    assert ("by other code" in dense_output) == changes_stage_1
    assert "is finished, by other code" in stage_output
    assert before == content(folder / "runs", stage)
    if name in CANNOT_RESUME:
        assert code == 2 and CANNOT_RESUME[name] in output
    else:
        assert code == 0 and "resumes under other code" in output, output
        assert content(interrupted, stage)[1:] == (f"{before[1]}+{after[1]}",) * 2
        arguments = interrupted / RESULTS[stage][0] / "arguments.json"
        assert json.loads(arguments.read_text())["code"] == [before[1], after[1]]


def test_a_pruning_rule_that_rounds_is_refused_at_once(unedited, tmp_path):
    runs = unedited(MLP) / "runs"
    project = copy_project(tmp_path / "project", ROUNDING)
    with pytest.raises(ValueError, match="^rounding kept "):
        run(project, command("prune_imp", runs, tmp_path, MLP))
    # Not even resume.pt: it stops before any training.
    assert not list((tmp_path / "imp").glob("*.pt"))


def test_the_readme_names_file_and_identifier_of_each_edit():
    readme = (ROOT / "README.md").read_text()
    for name, edit in EDITS.items():
        match = re.search(rf"^\| {name} \| `(\w+)=?` in `([\w/.]+)`", readme, re.MULTILINE)
        assert match, name
        identifier, file = match.groups()
        assert file == edit.file and identifier in (ROOT / file).read_text(), name
