"""Fuzzing: flags out of range, and files that are truncated, swapped or foreign.

Each ends in exit code 2 and one line, and changes nothing on disk. HOSTILE=500 tests 500 files.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch

from common import cli
from tests.conftest import call, refuse, snapshot, stage1, stage2, stage3, stage4, state

COUNT = int(os.environ.get("HOSTILE", "40"))
WORDS = ["-1", "x", "", "nan", "inf", "1e999", "9" * 400]  # invalid for every typed flag
TEXTS = [b"", b"hello", b"[]", b"{}", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5, b"\x89PNG\r\n"]
TEXTS += [b"PK\x05\x06" + bytes(18), bytes(1000), random.Random(0).randbytes(500)]
VALUES = [None, [], {}, 0.5, [[1]]]  # invalid for every entry that the stages need


@pytest.mark.parametrize("script", ["train_dense", "prune_imp", "align_mask", "train_sparse"])
def test_flags_refuse_invalid_values(script, monkeypatch):
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self) or self.exit())
        call(script)
    actions = [a for a in parsers[0]._actions if a.choices or a.type not in (None, Path)]
    assert len(actions) > 5
    for flag in (action.option_strings[-1] for action in actions):
        for word in WORDS:
            refuse((script, flag, word), f"argument {flag}: ")


class Malicious:
    """Runs code if it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle was run')",)


MALICIOUS = [Malicious(), {"x": Malicious()}]
OBJECTS = [*MALICIOUS, *map(pickle.dumps, MALICIOUS), [1], torch.nn.Linear(2, 2)]


def commands(root):
    """List commands that have work to do, each with the files that it reads."""
    inputs = source, target, imp = root / "dense/seed0", root / "dense/seed1", root / "imp/seed0"
    aligned, new = root / "align/activation/seed0-seed1", root / "new"
    source_files, target_files = (
        [run / "result.json", run / "epoch_0003.pt"] for run in (source, target)
    )
    weights = [*target_files, target / "epoch_0000.pt", target / "epoch_0001.pt"]
    masks, permuted = (sorted(folder.glob("mask_*.pt")) for folder in (imp, aligned))
    rounds = (source, imp, "--keep-rounds --sparsity")
    return [
        (stage1(root / "dense", "--seed 0"), [source / "arguments.json"]),
        (stage2(source, new), source_files),
        (stage2(*rounds, 0.3), [imp / "arguments.json"]),
        (stage2(*rounds, 0.8), [imp / "round_05.pt"]),
        (stage3(*inputs, new), [*source_files, *target_files, *masks]),
        (stage3(*inputs, aligned), [aligned / "arguments.json"]),
        (stage4("naive", target, imp, new), [*weights, *masks]),
        (stage4("permuted", target, aligned, new), [*weights, *permuted]),
    ]


def corrupt_entry(path, rng):
    """Return the content of a file, with one necessary entry missing or of the wrong type."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        choices = [(content, ["stage"])]
    else:
        content = state(path)
        tensors = "mask" if "mask" in content else "state_dict"
        keys = ["model", "seed", tensors]
        if "source_seed" in content:
            keys = ["model", "source_seed", "mask", "signs"]
        choices = [(content, keys), (content[tensors], [*content[tensors]])]
    entries, keys = rng.choice(choices)
    key = rng.choice(keys)
    entries[key] = rng.choice(VALUES)
    if rng.random() < 0.5:
        del entries[key]
    return json.dumps(content).encode() if path.suffix == ".json" else content


def corrupt(path, root, rng):
    """Return what replaces a file: bytes, an object to be saved, or None for a folder."""
    original = path.read_bytes()
    others = map(Path.read_bytes, sorted(root.rglob(f"*{path.suffix}")))
    replacements = [
        original[: rng.randrange(len(original))],
        rng.choice(TEXTS),
        rng.choice(OBJECTS),
        rng.choice([other for other in others if other != original]),
        None,
    ]
    if path.name != "arguments.json":
        replacements.append(corrupt_entry(path, rng))
    return rng.choice(replacements)


@pytest.mark.parametrize("seed", range(COUNT))
def test_hostile_files_change_nothing_and_end_in_one_line(runs, tmp_path, seed):
    root, rng = shutil.copytree(runs, tmp_path / "runs"), random.Random(seed)
    command, files = rng.choice(commands(root))
    path = rng.choice(files)
    content = corrupt(path, root, rng)
    print(path, str(content)[:99])
    path.unlink()
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    before = snapshot(root)
    refuse(command)
    assert snapshot(root) == before
