"""Finding the permutation axes of a network: which channels move together, read off its ATen graph.

1. Every index along every dimension of a parameter or buffer is a channel of its own (Walk.value).
2. The graph is walked in order; what each operator does to channels says one table
   (common/align/rules.py): which are the same, which form a block whose inner order is free, and
   which must stay in order. An operator without a rule pins what it reads, with the reason.
3. Channels that are the same make a class. Classes to which the same happens everywhere may trade
   places (settle): they are an axis, named after the first parameter along which it lies.

Take `fc(relu(conv(image)))`, with 8 filters and means over space. `conv.weight` has channels 0 to 7
along its first dimension and 8 to 10 along its second. The convolution sums over the second: there
they meet the image's colours, which nothing may move, so 8 to 10 are pinned. Its value has channels
0 to 7 along its second dimension, relu keeps them, and `fc`, which sums over them, ties them to the
8 channels along the second dimension of `fc.weight`. So there are 8 classes of two channels, alike
but for the index: the axis `conv` lies along `conv.weight`'s first and `fc.weight`'s second
dimension. The channels along `fc.weight`'s first dimension are the output, and pinned.
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

from common.align.channels import ENTRY, Channels, Value, along, only
from common.align.graph import Graph, export, where
from common.align.permutation import Axes, BlockGroup, Place
from common.align.rules import CONTRACTIONS, PASSING, POINTWISE, RULES, expand, pointwise


def find_axes(model: nn.Module, input_shape: tuple[int, ...]) -> Axes:
    """Derive the axes of `model` for inputs of `input_shape` (without the batch dimension).

    Raises UserError when torch.export cannot follow the forward pass.
    """
    walk = Walk(export(model, (2, *input_shape)))
    channels, classes = settle(walk.channels)
    sizes, groups, pinned = name_axes(walk, channels, classes)
    names, (axis, rank) = [*sizes], classes.loc[channels["class"], ["axis", "rank"]].to_numpy().T

    def places(tensor: str, label: Tensor, whole: Tensor) -> list[Place]:
        """Where along a label axes are as a whole."""
        here, found = (whole % ENTRY).flatten().numpy(), []
        for number in sorted({*axis[here].tolist()} - {-1}):
            at = np.flatnonzero(axis[here] == number)
            at = at[np.argsort(rank[here[at]], kind="stable")]
            many = np.bincount(rank[here[at]], minlength=sizes[names[number]])
            if (many == many[0]).all() and len(along(label)) == 1:
                about = names[number], torch.from_numpy(at).view(len(many), -1)
                found.append(Place(tensor, *along(label), *about, len(here) // label.numel()))
        return found

    state = model.state_dict(keep_vars=True)
    used = {id(state[name]): name for name in walk.parameters}  # one name of what is tied
    dims: dict[str, list[Place]] = {name: [] for name in state}
    for name, value in state.items():
        for label in walk.parameters.get(used.get(id(value)), Value(())).labels:
            columns = walk.channels.columns.get(walk.channels.vector(label), label)
            dims[name] += places(name, label, columns)
    weights = tuple(name for name, value in state.items() if used.get(id(value)) in walk.weights)
    readouts: dict[str, list[Place]] = {name: [] for name in names}
    before: dict[str, str] = {}
    for node, table in walk.tables.items():
        inputs, activation = node.all_input_nodes, table is POINTWISE
        activation = activation and (len(inputs) == 1 or "prelu" in node.name)
        before[node.name] = before.get(inputs[0].name, inputs[0].name) if activation else node.name
        read = not all(walk.tables.get(user) is POINTWISE for user in node.users)
        for label in walk.values[node].labels if read and table is not PASSING else ():
            for place in places(node.name, label, label):
                readouts[place.axis].append(place)
    return Axes(dims, sizes, groups, readouts, before, pinned, weights)


class Walk:
    """Follows channels through a graph, one operator after the other."""

    def __init__(self, graph: Graph) -> None:
        self.channels = Channels()
        self.parameters: dict[str, Value] = {}
        self.names: dict[int, str] = {}  # of the vectors of channels along parameters
        self.values: dict[fx.Node, Any] = {}
        self.tables: dict[fx.Node, dict] = {}  # where the rule of an operator was found
        self.weights: set[str] = set()  # the parameters that contractions multiply with
        self.made: set[int] = set()  # vectors of channels that come out of contractions
        nodes = graph.module.graph.nodes
        self.given = dict(zip((node for node in nodes if node.op == "placeholder"), graph.inputs))
        # Of what is computed from no image, the parameters that it is computed from.
        known = {
            node: None if given is None else {given} if isinstance(given, str) else set()
            for node, given in self.given.items()
        }
        for node in nodes:
            if node in self.given:
                continue
            self.channels.where = where(node)
            before = [known[one] for one in node.all_input_nodes]
            known[node] = None if None in before else set().union(*before)
            if node.op == "output":
                self.channels.pin(fx.node.map_arg(node.args, self.value), "is the output")
            if node.op == "call_function":
                self.values[node] = self.call(node)
            if self.tables.get(node) is CONTRACTIONS:
                self.weights.update(*filter(None, before))
                read, made = (
                    {*map(self.channels.vector, self.value(one).labels)}
                    for one in (node.all_input_nodes[0], node)
                )
                self.made |= made - read

    def value(self, node: fx.Node) -> Any:
        """Every index along a parameter is a channel of its own, from where it is first read."""
        if node in self.values:
            return self.values[node]
        given, shape = self.given.get(node), shapes_of(node.meta.get("val"))
        if isinstance(given, Tensor):
            return self.channels.constant(shape, [] if given.is_meta else same_along(given))
        if not isinstance(given, str):
            return Value(shape)
        layer = re.sub(r"[._](parametrizations\.)?weight(_v|_orig|\.original\d*)?$", "", given)
        large, labels = [dim for dim, size in enumerate(shape) if size > 1], []
        for dim in large:
            name = layer if dim == 0 or len(large) == 1 else f"{given}.{dim}"
            self.names[len(self.channels.starts) - 1] = name
            labels.append(self.channels.fresh(only({dim}, shape)))
        self.values[node] = self.parameters[given] = Value(shape, tuple(labels))
        return self.values[node]

    def call(self, node: fx.Node) -> Any:
        """The value that an operator makes, by its rule."""
        name, rule, self.tables[node] = find_rule(node.target)
        value = self.unexpanded if rule is pointwise else self.value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        if node.target is operator.getitem:
            return args[0][args[1]]
        out, result = shapes_of(node.meta.get("val")), None
        if rule:
            given = {one.name: one.default_value for one in node.target._schema.arguments}
            given |= dict(zip(given, args)) | kwargs
            first, *rest = given
            call = functools.partial(node.target, **{key: given[key] for key in rest})
            about = {"given": given, "x": given[first], "out": out, "name": name, "call": call}
            result = rule(self.channels, SimpleNamespace(**given | about))
        if result is None:
            self.channels.pin((args, kwargs), "keeps its order")
            result = Value(())
        if isinstance(result, list):
            return result
        if isinstance(out, list):  # pooling gives indices, too
            return [result._replace(shape=shape) for shape in out]
        return result._replace(shape=out)

    def unexpanded(self, node: fx.Node) -> Any:
        """For what broadcasts by itself, so that expanding says nothing."""
        while find_rule(node.target)[1] is expand:
            node = node.args[0]
        return self.value(node)


def find_rule(target: Any) -> tuple[str, Callable | None, dict]:
    """The name of an operator, its rule if there is one, and the table that it is in."""
    if not isinstance(target, torch._ops.OpOverload):
        return str(target), None, PASSING
    name = target.overloadpacket.__name__.rstrip("_")
    tagged = torch.Tag.pointwise in target.tags
    return name, *RULES.get(name, (pointwise, POINTWISE) if tagged else (None, PASSING))


def same_along(constant: Tensor) -> list[int]:
    """The dimensions along which all entries of a tensor are the same."""
    return [d for d in range(constant.dim()) if (constant == constant.narrow(d, 0, 1)).all()]


def shapes_of(value: Any) -> Any:
    """The shapes of a node's output."""
    if isinstance(value, (list, tuple)):
        return [shapes_of(one) for one in value]
    return tuple(getattr(value, "shape", ()))


# ---------------------------------------------------------------- what the walk has found


def components(count: int, *links: np.ndarray) -> np.ndarray:
    """The connected component of each of `count` nodes, from (2, n) arrays of their links."""
    ends = np.concatenate(links, 1)
    graph = coo_matrix((np.ones(ends.shape[1]), tuple(ends)), (count, count))
    return connected_components(graph, directed=False)[1]


def scramble(*columns: np.ndarray) -> np.ndarray:
    """A random-looking 64-bit number for every row of integers, the same for equal rows."""
    rows = pd.DataFrame(dict(enumerate(columns)))
    # A copy, because pandas 3 gives out arrays that are read-only.
    return pd.util.hash_pandas_object(rows, index=False).to_numpy(copy=True).view(np.int64)


def settle(known: Channels) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The class of channels that are the same that each channel is in, and a table of the classes.

    unit: the block that it is in, or itself. holds: whether it is a block. reason: why it is
    pinned. colour: of one colour are those that may trade places. They may when every tie of one is
    a tie of the other, by the same operators: exchanging them, with all their entries in order,
    then takes ties to ties.
    """
    vector = np.repeat(np.arange(len(known.starts) - 1), np.diff(known.starts))
    ties, members = (torch.cat(rows, 1).numpy() for rows in (known.ties, known.members))
    # A channel is in one block, so blocks that share one are the same.
    held = components(len(vector), ties[:2])[members[1]]
    _, first, which = np.unique(held, return_index=True, return_inverse=True)
    same = np.stack([members[0], members[0][first[which]]])
    root = components(len(vector), ties[:2], same)
    blocks, inside = root[members]
    unit, reason = np.arange(root.max() + 1), np.full(root.max() + 1, None)
    unit[inside] = blocks
    nested = torch.from_numpy(members[1][np.isin(inside, blocks)])
    for label, why in reversed([*known.pins, (nested, "its blocks are in larger blocks")]):
        reason[root[label.flatten().numpy()]] = why
    code = scramble(vector, pd.Series(vector).groupby([root, vector]).cumcount())
    colour = scramble(np.where(pd.isna(reason), -1, np.arange(len(unit))))
    np.add.at(colour, root, code)
    np.add.at(colour, root[ties[0]], scramble(code[ties[0]], code[ties[1]], *ties[2:]))
    # What is in a block tells it apart, and then the block what is in it.
    role = scramble(*code[members])
    np.add.at(colour, blocks, scramble(role, colour[inside]))
    np.add.at(colour, inside, scramble(role, colour[blocks]))
    holds = np.isin(np.arange(len(unit)), blocks)
    classes = {"unit": unit, "reason": reason, "colour": colour, "holds": holds}
    return pd.DataFrame({"class": root, "vector": vector}), pd.DataFrame(classes)


def name_axes(
    walk: Walk, channels: pd.DataFrame, classes: pd.DataFrame
) -> tuple[dict[str, int], tuple[BlockGroup, ...], dict[str, tuple[int, str]]]:
    """Sizes, groups and what is pinned, as in Axes; adds to `classes` the number of their axis,
    or -1, and their rank along it.
    """
    # A class is named after the parameter that is the first to have it.
    named = channels[channels["vector"].isin(walk.names)].groupby(["class", "vector"], sort=False)
    live = named.size().rename("entries").reset_index().drop_duplicates("class")
    live = live.join(classes, on="class").assign(name=live["vector"].map(walk.names))
    live["front"] = np.arange(len(live))
    live["front"] = live.groupby("unit")["front"].transform("min")
    tied = (live["entries"] > 1) & ~live["colour"].duplicated(keep=False)
    live["reason"] = live["reason"].mask(tied & live["reason"].isna(), "it is tied to itself")
    stuck = live["reason"].notna()
    pinned = {
        name: (int(rows["entries"].sum()), rows["reason"].iloc[0])
        for name, rows in live[stuck & live["vector"].isin(walk.made)].groupby("name", sort=False)
    }
    classes["axis"], classes["rank"] = -1, 0
    sizes: dict[str, int] = {}
    groups: dict[int, tuple[list[str], int]] = {}
    for colour, same in live[~stuck].groupby("colour", sort=False):
        name, unit = same["name"].iloc[0], classes.loc[same["unit"].iloc[0]]
        while name in sizes:
            name = f"{name}.{len(sizes)}"
        order = same.sort_values("front", kind="stable")["class"]
        classes.loc[order, "axis"], classes.loc[order, "rank"] = len(sizes), np.arange(len(order))
        sizes[name], blocks = len(order), same["unit"].nunique() if unit["holds"] else 1
        # All axes that lie in the same blocks move with them.
        key = unit["colour"] if blocks > 1 else colour
        groups.setdefault(key, ([], blocks))[0].append(name)
    return sizes, tuple(BlockGroup(tuple(axes), blocks) for axes, blocks in groups.values()), pinned
