"""Generated hostile inputs: flags out of range, files that are cut, swapped or foreign.

Each ends in exit code 2 and one line, and changes nothing on disk. HOSTILE=500 makes so many.
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
from tests.conftest import call, stage1, stage2, stage3, stage4, state

COUNT = int(os.environ.get("HOSTILE", "40"))
WORDS = ["-1", "x", "", "nan", "inf", "1e999", "9" * 400]  # no flag takes one of these
PLACES = ["/nowhere", "/dev/null", "", "."]
ODD_WORDS = {"--device": ["x", "-1", "cuda:99", "meta"], "--out": ["/dev/null/x"]}
TEXTS = [b"", b"hello", b"[]", b"{}", b"null", b'"x"', b"\xff\xfe", b"[" * 10**5, b"\x89PNG\r\n"]
TEXTS += [b"PK\x05\x06" + bytes(18), bytes(1000)]
VALUES = [None, "x", [], {}, -1, 0.5, [[1]]]  # no entry that is needed is one of these


class Evil:
    """Would run code where it is unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of a pickle was run')",)


def commands(root):
    """Commands that have something to do, and the files that each reads."""
    ends = source, target, imp = root / "dense/seed0", root / "dense/seed1", root / "imp/seed0"
    aligned, new = root / "align/activation/seed0-seed1", root / "new"
    read = [[end / "result.json", end / "epoch_0003.pt"] for end in (source, target)]
    cells = [*read[1], target / "epoch_0000.pt", target / "epoch_0001.pt"]
    chain = [*imp.glob("round_*.pt"), imp / "chain.pt"]
    masks, permuted = (sorted(folder.glob("mask_*.pt")) for folder in (imp, aligned))
    rounds = (source, imp, "--keep-rounds", "--sparsity")
    return [
        (stage1(new), []),
        (stage1(root / "dense", "--seed", 0), [source / "arguments.json"]),
        (stage2(source, new), read[0]),
        (stage2(*rounds, 0.3), [imp / "arguments.json"]),
        (stage2(*rounds, 0.8), chain),
        (stage3(*ends, new), [*read[0], *read[1], *masks]),
        (stage3(*ends, aligned), [aligned / "arguments.json"]),
        (stage4("naive", target, imp, new), [*cells, *masks]),
        (stage4("permuted", target, aligned, new), [*cells, *permuted]),
    ]


def hostile_flags(command, draw, monkeypatch):
    """More words for a command, that make no sense."""
    parsers = []
    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_args", lambda self: parsers.append(self) or self.exit())
        call(*command)
    action = draw.choice([action for action in parsers[0]._actions if action.option_strings])
    flag = action.option_strings[-1]
    if action.nargs == 0:
        return draw.choice([[f"{flag}=1"], ["stray"], [f"{flag}~"]])
    if flag in ODD_WORDS or action.type is Path:
        return [flag, draw.choice(ODD_WORDS.get(flag, PLACES))]
    if action.choices or action.type:
        return [flag, draw.choice(WORDS)]
    return [flag]


def retyped(path, draw):
    """The content of a file, with one of the entries that are needed missing or of no use."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        places = [(content, "stage arguments precision"), (content["arguments"], "epochs seed")]
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


def spoil(path, others, draw):
    """Put something else in the place of a file; returns what, in a word."""
    kinds = ["cut", "text", "folder", "pickle", "swapped"]
    kinds += ["retyped"] * (path.name != "arguments.json")
    kind, whole = draw.choice(kinds), path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
        return kind
    path.write_bytes(whole)
    things = [Evil(), {"x": Evil()}, [1], {"x": 1}, torch.nn.Linear(2, 2)]
    made = {
        "cut": lambda: whole[: draw.randrange(len(whole))],
        "text": lambda: draw.choice([*TEXTS, draw.randbytes(500)]),
        "pickle": lambda: draw.choice([*things, pickle.dumps(draw.choice(things[:2]))]),
        "swapped": lambda: draw.choice(others).read_bytes(),
        "retyped": lambda: retyped(path, draw),
    }[kind]()
    path.write_bytes(made) if isinstance(made, bytes) else torch.save(made, path)
    return kind


def snapshot(root):
    found = {path: path.stat() for path in root.rglob("*")}
    return {path: (stat.st_size, stat.st_mtime_ns, stat.st_ino) for path, stat in found.items()}


@pytest.fixture(scope="module")
def victim(runs, tmp_path_factory):
    return shutil.copytree(runs, tmp_path_factory.mktemp("victim") / "runs")


def others(root, path):
    """Files that must not be taken for one: not those of its own chain, which are as good."""
    kept = path.read_bytes()
    found = sorted(root.rglob(f"*{path.suffix}"))
    if path.name.startswith(("chain", "round")):
        found = [other for other in found if other.parent != path.parent]
    return [other for other in found if other.read_bytes() != kept]


@pytest.mark.parametrize("number", range(COUNT))
def test_hostile_inputs_change_nothing_and_end_in_one_line(victim, number, monkeypatch):
    draw, of_files = random.Random(number), number % 5 < 3
    command, files = draw.choice([one for one in commands(victim) if one[1] or not of_files])
    what, path, kept = [], None, b""
    if of_files:
        path = draw.choice(files)
        kept = path.read_bytes()
        what = [spoil(path, others(victim, path), draw), str(path)]
    more = [] if of_files else hostile_flags(command, draw, monkeypatch)
    before = snapshot(victim)
    outcome, after = call(*command, *more), snapshot(victim)
    if of_files:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(kept)
    told = command[0], what or more, outcome
    assert outcome.code == 2 and outcome.err.count("\n") == 1, told
    assert after == before, told
