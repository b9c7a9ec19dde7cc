"""Finding the permutation axes of a network: which channels move together, read off its ATen graph.

Every index along every dimension of a parameter or buffer is a channel of its own at first. Walking
the graph, the rules of common/align/rules.py say which channels are the same, which form a block
whose inner order is free, and which must stay in order. Channels that are tied everywhere in the
same way may trade places: they are an axis. An operator without a rule pins what it reads, with the
reason.
"""

import functools
import operator
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from common.align.channels import SLOT, Channels, Value, along, only, plain
from common.align.graph import Graph, export, where
from common.align.permutation import Axes, BlockGroup, Layout, Readout
from common.align.rules import CONTRACTIONS, PASSING, POINTWISE, RULES, pointwise

Places = Callable[[Tensor], dict[str, Tensor]]


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError when torch.export cannot follow the forward pass.
    """
    walk = Walk()
    walk.run(export(model, (2, *input_shape)))
    root, channels = settle(walk)
    sizes, groups, pinned = name_axes(walk, channels)
    names, (axis, rank) = [*sizes], channels[["axis", "rank"]].to_numpy().T

    def places(label: Tensor) -> dict[str, Tensor]:
        """The positions along a label of the channels of every axis that is there as a whole."""
        here, found = root[(label % SLOT).flatten().numpy()], {}
        for number in sorted({*axis[here].tolist()} - {-1}):
            at = np.flatnonzero(axis[here] == number)
            at = at[np.argsort(rank[here[at]], kind="stable")]
            many = np.bincount(rank[here[at]], minlength=sizes[names[number]])
            if (many == many[0]).all():
                found[names[number]] = torch.from_numpy(at).view(len(many), -1)
        return found

    state = model.state_dict(keep_vars=True)
    multiplied = {id(state[name]) for name in walk.weights}
    weights = tuple(name for name, value in state.items() if id(value) in multiplied)
    readouts = find_readouts(walk, names, places)
    return Axes(lay_out(walk, state, places), sizes, groups, readouts, pinned, weights)


class Walk:
    """Follows channels through a graph, one operator after the other."""

    def __init__(self) -> None:
        self.channels = Channels()
        self.parameters: dict[str, Value] = {}
        self.names: dict[int, str] = {}  # of the vectors of channels along parameters
        self.makers: dict[int, int] = {}  # of these, the operators that compute channels by them
        self.env: dict[fx.Node, Any] = {}
        self.tables: dict[fx.Node, dict] = {}  # where the rule of an operator was found
        self.computed: dict[fx.Node, set[str]] = {}  # from these parameters, and no image
        self.weights: set[str] = set()  # the parameters that contractions multiply with

    def run(self, graph: Graph) -> None:
        inputs = iter(graph.inputs)
        for position, node in enumerate(graph.module.graph.nodes):
            self.channels.where, shapes = where(node), shapes_of(node.meta.get("val"))
            if node.op == "placeholder":
                given = next(inputs)
                self.env[node] = self.input(given if node.users else None, shapes)
                if given is not None:
                    self.computed[node] = {given} if isinstance(given, str) else set()
            elif node.op == "output":
                fx.node.map_arg(
                    node.args, lambda one: self.channels.pin_all(self.env[one], "is the output")
                )
            else:
                self.env[node] = self.call(node, shapes) if node.op == "call_function" else None
            parts = [self.computed.get(one) for one in node.all_input_nodes]
            if parts and None not in parts:
                self.computed[node] = set().union(*parts)
            if self.tables.get(node) is CONTRACTIONS:
                self.weights.update(*filter(None, parts))
                read = {*map(self.channels.vector, self.env[node.all_input_nodes[0]].labels)}
                for vector in {*map(self.channels.vector, self.env[node].labels)} - read:
                    self.makers.setdefault(vector, position)

    def input(self, given: str | Tensor | None, shape: Any) -> Any:
        """Every index along a parameter is a channel of its own; constants may be uniform."""
        if isinstance(given, Tensor) and not given.is_meta:
            varying = [
                1 if torch.equal(given, given.narrow(dim, 0, 1).expand_as(given)) else size
                for dim, size in enumerate(shape)
            ]
            return self.channels.expand(Value(tuple(varying)), shape)
        if not isinstance(given, str):
            return plain(shape)
        large, labels = [dim for dim, size in enumerate(shape) if size > 1], []
        layer = re.sub(r"[._](parametrizations\.)?weight(_v|_orig|\.original\d*)?$", "", given)
        for dim in large:
            name = layer if dim == 0 or len(large) == 1 else f"{given}.{dim}"
            self.names[len(self.channels.starts) - 1] = name
            labels.append(self.channels.fresh(only({dim}, shape)))
        self.parameters[given] = Value(shape, tuple(labels))
        return self.parameters[given]

    def call(self, node: fx.Node, shapes: Any) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.env.get)
        if node.target is operator.getitem:
            return args[0][args[1]]
        result = None
        if isinstance(node.target, torch._ops.OpOverload):
            name = node.target.name().partition("::")[2].partition(".")[0].rstrip("_")
            functional = getattr(getattr(torch.ops.aten, name, None), "default", node.target)
            tagged = torch.Tag.pointwise in {*node.target.tags, *functional.tags}
            default = (pointwise, POINTWISE) if tagged else (lambda channels, a: None, PASSING)
            rule, self.tables[node] = RULES.get(name, default)
            given = {one.name: one.default_value for one in node.target._schema.arguments}
            given |= dict(zip(given, args)) | kwargs
            first, *rest = given or [None]
            call = functools.partial(node.target, **{key: given[key] for key in rest})
            a = SimpleNamespace(**given, given=given, out=shapes, name=name, call=call)
            a.x = given.get(first)
            result = rule(self.channels, a)
        if result is None:
            self.channels.pin_all((args, kwargs), "keeps its order")
            self.tables[node] = PASSING
            return plain(shapes)
        if isinstance(shapes, list) and isinstance(result, Value):  # pooling, with indices
            return [result._replace(shape=shape) for shape in shapes]
        return result


def shapes_of(value: Any) -> Any:
    """The shapes of a node's output."""
    if isinstance(value, (list, tuple)):
        return [shapes_of(one) for one in value]
    return tuple(value.shape) if isinstance(value, Tensor) else None


def scramble(*columns: np.ndarray) -> np.ndarray:
    """A random-looking 64-bit number for every row of integers, the same for equal rows."""
    rows = pd.DataFrame(dict(enumerate(columns)))
    # A copy, because pandas 3 gives out arrays that are read-only.
    return pd.util.hash_pandas_object(rows, index=False).to_numpy(copy=True).view(np.int64)


def settle(walk: Walk) -> tuple[np.ndarray, pd.DataFrame]:
    """The channel that each label stands for in the end, and a table of these channels.

    colour: channels of one colour may trade places. They may when every tie of one is a tie of the
    other: exchanging them, with all their entries in order, then takes ties to ties. block: the
    channel that stands for the block that it is in, or -1. reason: the number of the reason why it
    is pinned, or -1. source: the vector that names it. lead: its place among all channels, in the
    order in which operators make them. entries: of it in that vector. front: the first lead of its
    block.
    """
    known = walk.channels
    vector = np.repeat(np.arange(len(known.starts) - 1), np.diff(known.starts))
    edges, members = (torch.cat(rows, 1).numpy() for rows in (known.edges, known.members))
    links, count = edges[:2], len(vector)
    while True:  # a channel is in one block, so blocks that share one are the same
        link = coo_matrix((np.ones(links.shape[1]), tuple(links)), (count, count))
        classes, root = connected_components(link, directed=False)
        first = np.unique(root, return_index=True)[1]
        channel, block = np.unique(root[members[::-1]], axis=1)
        again = np.flatnonzero(channel[1:] == channel[:-1])
        if not len(again):
            break
        links = np.concatenate([links, first[np.stack([block[again], block[again + 1]])]], 1)
    inside, reason = np.full((2, classes), -1)
    inside[channel] = block
    reason[np.intersect1d(channel, block)] = len(known.pins)  # no blocks of blocks
    for number, (label, _) in reversed([*enumerate(known.pins)]):
        reason[root[label.flatten().numpy()]] = number
    code = scramble(vector, pd.Series(vector).groupby([root, vector]).cumcount().to_numpy())
    colour = scramble(np.where(reason < 0, -1, np.arange(classes)))
    np.add.at(colour, root, code)
    np.add.at(colour, root[edges[0]], scramble(code[edges[0]], code[edges[1]], *edges[2:]))
    role, ends, before = scramble(*code[members]), root[members], 0
    while before < (before := len(np.unique(colour))):
        seen = colour.copy()
        for here, there in (ends, ends[::-1]):
            np.add.at(colour, here, scramble(role, seen[there]))
    # What no parameter has comes last.
    made = np.full(len(known.starts) - 1, len(walk.env) + 1)
    made[[*walk.names]] = [walk.makers.get(one, len(walk.env)) for one in walk.names]
    order = np.argsort(made[vector], kind="stable")
    table = pd.DataFrame({"block": inside, "reason": reason, "colour": colour})
    table["lead"] = np.unique(root[order], return_index=True)[1]
    table["source"] = source = vector[order[table["lead"]]]
    table["entries"] = np.bincount(root[vector == source[root]], minlength=classes)
    unit = np.where(inside < 0, table.index, inside)
    table["front"] = table.groupby(unit)["lead"].transform("min")
    return root, table


def name_axes(
    walk: Walk, channels: pd.DataFrame
) -> tuple[dict[str, int], tuple[BlockGroup, ...], dict[str, tuple[int, str]]]:
    """Sizes, groups and what is pinned, as in Axes; adds to `channels` the number of their axis,
    or -1, and their rank along it.
    """
    channels["axis"], channels["rank"] = -1, 0
    live = channels[channels["source"].isin(walk.names)].sort_values("lead")
    live["name"] = live["source"].map(walk.names)
    tied = (live["entries"] > 1) & ~live["colour"].duplicated(keep=False)
    stuck = (live["reason"] >= 0) | tied
    reasons = [why for _, why in walk.channels.pins]
    reasons += ["its blocks are in larger blocks", "it is tied to itself"]
    pinned = {
        name: (int(rows["entries"].sum()), reasons[rows["reason"].iloc[0]])
        for name, rows in live[stuck & live["source"].isin(walk.makers)].groupby("name", sort=False)
    }
    holders = {*channels["block"]}
    sizes: dict[str, int] = {}
    groups: dict[Any, tuple[list[str], int]] = {}
    for colour, same in live[~stuck].groupby("colour", sort=False):
        name = same["name"].iloc[0]
        while name in sizes:
            name = f"{name}.{len(sizes)}"
        same = same.sort_values(["front", "lead"])
        channels.loc[same.index, "axis"] = len(sizes)
        channels.loc[same.index, "rank"] = np.arange(len(same))
        sizes[name], blocks = len(same), same["block"].nunique()
        if blocks > 1:
            colour = channels["colour"].iloc[same["block"].iloc[0]]
        elif same.index[0] in holders:
            blocks = len(same)
        groups.setdefault(colour, ([], blocks))[0].append(name)
    return sizes, tuple(BlockGroup(tuple(axes), blocks) for axes, blocks in groups.values()), pinned


def lay_out(
    walk: Walk, state: dict[str, Tensor], places: Places
) -> dict[str, tuple[Layout | None, ...]]:
    """What lies along every dimension of the tensors of `state`."""
    known = walk.channels
    used = {id(state[name]): value for name, value in walk.parameters.items()}
    dims = {}
    for name, value in state.items():
        layouts: list[Layout | None] = [None] * value.dim()
        for label in used.get(id(value), Value(())).labels:
            whole = known.columns.get(known.vector(label), label)
            found = places(whole)
            layouts[min(along(label))] = Layout(whole.numel(), found) if found else None
        dims[name] = tuple(layouts)
    return dims


def find_readouts(walk: Walk, names: list[str], places: Places) -> dict[str, tuple[Readout, ...]]:
    """The tensors that layers read each axis from, in graph order."""
    readouts: dict[str, list[Readout]] = {name: [] for name in names}
    pointwise = {node for node, table in walk.tables.items() if table is POINTWISE}
    for node, table in walk.tables.items():
        if table is PASSING or all(user in pointwise for user in node.users):
            continue
        before = node
        while before in pointwise and (len(before.all_input_nodes) == 1 or "prelu" in before.name):
            before = before.all_input_nodes[0]
        for label in walk.env[node].labels:
            for axis, at in places(label).items() if len(along(label)) == 1 else ():
                readouts[axis].append(Readout(node.name, before.name, *along(label), at))
    return {axis: tuple(several) for axis, several in readouts.items()}
