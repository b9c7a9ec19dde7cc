"""Generated hostile inputs: flags out of range, files that are cut, swapped or foreign.

Each ends in exit code 2 and one line, and changes nothing on disk. HOSTILE=500 makes so many files.
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
from tests.conftest import call, refuse, stage1, stage2, stage3, stage4, state

COUNT = int(os.environ.get("HOSTILE", "40"))
WORDS = ["-1", "x", "", "nan", "inf", "1e999", "9" * 400]  # no flag takes one of these
TEXTS = [b"", b"hello", b"[]", b"{}", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5, b"\x89PNG\r\n"]
TEXTS += [b"PK\x05\x06" + bytes(18), bytes(1000), random.Random(0).randbytes(500)]
VALUES = [None, [], {}, 0.5, [[1]]]  # no entry that is needed is one of these


@pytest.mark.parametrize("script", ["train_dense", "prune_imp", "align_mask", "train_sparse"])
def test_no_flag_takes_a_senseless_value(script, monkeypatch):
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self) or self.exit())
        call(script)
    actions = [one for one in parsers[0]._actions if one.choices or one.type not in (None, Path)]
    assert len(actions) > 5
    for flag in (action.option_strings[-1] for action in actions):
        for word in WORDS:
            refuse((script, flag, word), f"argument {flag}: ")


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle was run')",)


EVIL = [Evil(), {"x": Evil()}]
THINGS = [*EVIL, *map(pickle.dumps, EVIL), [1], torch.nn.Linear(2, 2)]


def commands(root):
    """Commands that have something to do, and the files that each reads."""
    ends = source, target, imp = root / "dense/seed0", root / "dense/seed1", root / "imp/seed0"
    aligned, new = root / "align/activation/seed0-seed1", root / "new"
    read = [[end / "result.json", end / "epoch_0003.pt"] for end in (source, target)]
    cells = [*read[1], target / "epoch_0000.pt", target / "epoch_0001.pt"]
    chain = [imp / "round_05.pt"]
    masks, permuted = (sorted(folder.glob("mask_*.pt")) for folder in (imp, aligned))
    rounds = (source, imp, "--keep-rounds --sparsity")
    return [
        (stage1(root / "dense", "--seed 0"), [source / "arguments.json"]),
        (stage2(source, new), read[0]),
        (stage2(*rounds, 0.3), [imp / "arguments.json"]),
        (stage2(*rounds, 0.8), chain),
        (stage3(*ends, new), [*read[0], *read[1], *masks]),
        (stage3(*ends, aligned), [aligned / "arguments.json"]),
        (stage4("naive", target, imp, new), [*cells, *masks]),
        (stage4("permuted", target, aligned, new), [*cells, *permuted]),
    ]


def retyped(path, draw):
    """The content of a file, with one of the entries that are needed missing or of no use."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        places = [(content, "stage")]
    else:
        content = state(path)
        kind = "mask" if "mask" in content else "state_dict"
        places = [(content, f"model seed {kind}"), (content[kind], " ".join(content[kind]))]
        if "source_seed" in content:
            places[0] = (content, "model source_seed mask signs")
    inner, keys = draw.choice(places)
    key = draw.choice(keys.split())
    inner[key] = draw.choice(VALUES)
    if draw.random() < 0.5:
        del inner[key]
    return json.dumps(content).encode() if path.suffix == ".json" else content


def spoilt(path, root, draw):
    """What takes the place of a file: bytes, something to be saved, or None for a folder."""
    whole, others = path.read_bytes(), map(Path.read_bytes, sorted(root.rglob(f"*{path.suffix}")))
    made = [
        whole[: draw.randrange(len(whole))],
        draw.choice(TEXTS),
        draw.choice(THINGS),
        draw.choice([other for other in others if other != whole]),
        None,
    ]
    return draw.choice(made if path.name == "arguments.json" else [*made, retyped(path, draw)])


def snapshot(root):
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


@pytest.mark.parametrize("number", range(COUNT))
def test_hostile_files_change_nothing_and_end_in_one_line(runs, tmp_path, number):
    root, draw = shutil.copytree(runs, tmp_path / "runs"), random.Random(number)
    command, files = draw.choice(commands(root))
    path = draw.choice(files)
    made = spoilt(path, root, draw)
    print(path, str(made)[:99])
    path.unlink()
    if made is None:
        path.mkdir()
    elif isinstance(made, bytes):
        path.write_bytes(made)
    else:
        torch.save(made, path)
    before = snapshot(root)
    refuse(command)
    assert snapshot(root) == before
