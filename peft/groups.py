"""How SuperLoRA cuts the updates of many weights into groups (supplement, A.2 and A.5).

The updates of the adapted weights lie end to end as one vector of N numbers: the row blocks `parts`
of the first layer, row by row, then those of the second. `groups` is a number G of equal runs of
ceil(N / G) numbers, whose boundaries may cut through a weight (the last run is padded), or "layer"
or "weight", which follow the boundaries. Each group of N_g numbers is one `Folded` tensor:

    reshape=True    of `order` M equal sides q = ceil(N_g^(1/M)); the excess is cut off
    reshape=False   its weights, of one height d_1, side by side as a matrix (d_1, sum d_2); here
                    transposed, and each weight with it, so that a weight stays a run of numbers

Behind a projection a group has only ceil(ratio N_g) numbers of its own.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from peft.folded import Folded


class Groups(nn.Module):
    """The groups over some layers, and how their numbers fall on the row blocks `parts` of `of`."""

    def __init__(
        self,
        bases: Mapping[str, nn.Module],
        groups: int | str = 1,
        parts: Sequence[int] = (0, 2),
        of: int = 3,
        alpha: float = 2.0,
        reshape: bool = True,
        order: int = 2,
        ratio: float = 1.0,
        **form,
    ):
        super().__init__()
        if not 0 < ratio <= 1:
            raise ValueError(f"{ratio=} must lie above 0 and not above 1: rho of a group's numbers")
        if order < 2 and form.get("form") != "dense":
            raise ValueError(f"{order=} must be at least 2, a matrix; form=dense is of order 1")
        self.parts, self.of, self.alpha = tuple(parts), of, alpha
        self.reshape, self.ratio = reshape, ratio
        shapes = []
        for path, base in bases.items():
            rows, columns = base.weight.flatten(1).shape
            if rows % of:
                raise ValueError(f"{path}: {rows} rows do not divide into {of} parts")
            shapes += [(rows // of, columns)] * len(parts)
        ends = [0, *accumulate(rows * columns for rows, columns in shapes)]
        if groups in {"weight", "layer"}:
            self.runs = list(pairwise(ends[:: 1 if groups == "weight" else len(parts)]))
        else:
            size = -(-ends[-1] // groups) if isinstance(groups, int) and groups > 0 else 0
            if size == 0 or (groups - 1) * size >= ends[-1]:
                raise ValueError(f"{groups=} leaves a group without any of {ends[-1]} numbers")
            self.runs = [(start, start + size) for start in range(0, groups * size, size)]
        self.folded = nn.ModuleList()
        for run in self.runs:
            numbers = self.inner(run[1] - run[0])
            q = round(numbers ** (1 / order))
            q += q**order < numbers
            sides = (numbers,) if form.get("form") == "dense" else (q,) * order
            if not reshape:
                heights = {shape[0] for at, shape in zip(ends, shapes) if run[0] <= at < run[1]}
                if order != 2 or ratio != 1 or len(heights) != 1 or not {*run} <= {*ends}:
                    raise ValueError(
                        f"reshape=false takes order=2, ratio=1 and groups of whole weights of one "
                        f"height; here are {order=}, {ratio=}, heights {heights}, a group from "
                        f"number {run[0]} to {run[1]}, and weights that end at {ends[1:]}"
                    )
                sides = (numbers // min(heights), min(heights))
            self.folded.append(Folded(sides, **form))

    def inner(self, numbers: int) -> int:
        """How many numbers a group has before the projection."""
        return math.ceil(round(self.ratio * numbers, 6))

    def span(self, start: int, stop: int) -> Tensor:
        """Numbers `start` to `stop` of all updates end to end, where there is no projection."""
        cuts = [
            (f, max(start, a) - a, min(stop, b) - a) for f, (a, b) in zip(self.folded, self.runs)
        ]
        return torch.cat([f.span(first, last) for f, first, last in cuts if first < last])

    def size(self, layer: nn.Module) -> int:
        """How many numbers fall on a layer."""
        return layer.weight.numel() // self.of * len(self.parts)

    def place(self, weight: Tensor, numbers: Tensor) -> Tensor:
        """W + alpha Delta W from the numbers that fall on one layer."""
        blocks = list(weight.chunk(self.of))
        for part, update in zip(self.parts, numbers.chunk(len(self.parts))):
            rows, columns = blocks[part].flatten(1).shape
            update = update.view(rows, columns) if self.reshape else update.view(columns, rows).T
            blocks[part] = blocks[part] + self.alpha * update.reshape(blocks[part].shape)
        return torch.cat(blocks)
