"""SuperLoRA: Parameter-Efficient Unified Adaptation for Large Vision Models, supplement. No code.

All updates of a model are one vector, those of query and value of each layer end to end, cut into
G groups (`groups`). Each is one small tensor T_g (`folded`), and a fixed projection F (`hadamard`)
may make more numbers of it:

    [Delta W_1, Delta W_2, ..] = [F(T_1), .., F(T_G)],   W' = W + alpha Delta W      (eqs. 1 to 3)

alpha is not divided by a rank, which dense groups do not have; the supplement does not say. Its one
value, 2, is that of image generation (A.8.1).

Without a projection a tuner computes its own run of numbers only (`SuperLoRA`, on qkv). A
projection mixes all of a group, so one tuner around all blocks computes every update once a step
and runs the blocks with the sums in place of their weights (`Projected`).
"""

import copy
import re
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft.core import Tuner, WeightTuner
from peft.groups import Groups
from peft.hadamard import Projection
from peft.layers import with_weights


class SuperLoRA(WeightTuner):
    def __init__(self, base: nn.Module, groups: Groups, start: int):
        super().__init__(base)
        # Every tuner holds the same parameters, in modules of its own: `functional_call` puts other
        # tensors into a module that has two names twice, and then cannot undo it.
        shared = {id(p): p for p in groups.parameters()}
        self.groups, self.start = copy.deepcopy(groups, shared), start

    @classmethod
    def over(cls, bases: Mapping[str, nn.Module], **hparams) -> dict[str, Tuner]:
        groups = Groups(bases, **hparams)
        starts = accumulate((groups.size(base) for base in bases.values()), initial=0)
        return {path: cls(base, groups, at) for (path, base), at in zip(bases.items(), starts)}

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        numbers = self.groups.span(self.start, self.start + self.groups.size(self.base))
        return self.groups.place(weight, numbers), bias


class Projected(Tuner):
    def __init__(self, base: nn.Module, names: list[str], groups: Groups, projection: Projection):
        super().__init__(base)
        self.names, self.groups, self.projection = names, groups, projection
        self.exact_at_init = not projection.flat

    @classmethod
    def over(
        cls,
        bases: Mapping[str, nn.Module],
        inside: str,
        projection: str = "linear",
        seed: int = 0,
        **hparams,
    ) -> dict[str, Tuner]:
        """`inside`: a pattern over module paths, the layers within the base that are adapted."""
        tuners = {}
        for path, base in bases.items():
            named = {f"{path}.{name}": (name, m) for name, m in base.named_modules()}
            found = dict(pair for full, pair in named.items() if re.fullmatch(inside, full))
            if not found:
                raise ValueError(f"nothing in {path} matches {inside}")
            groups = Groups(found, exact=not projection.startswith("nonlinear"), **hparams)
            longest = max(stop - start for start, stop in groups.runs)
            fixed = Projection(projection, groups.inner(longest), longest, seed)
            tuners[path] = cls(base, list(found), groups, fixed)
        return tuners

    def weights(self) -> dict[str, Tensor]:
        """W' of every adapted layer, by its name in the base."""
        updates = []
        for group, (start, stop) in zip(self.groups.folded, self.groups.runs):
            z = group.span(0, self.groups.inner(stop - start)).to(group.tensors[0])
            updates.append(self.projection(z, stop - start))
        numbers, at, out = torch.cat(updates), 0, {}
        for name in self.names:
            layer = self.base.get_submodule(name)
            out[name] = self.groups.place(layer.weight, numbers[at : at + self.groups.size(layer)])
            at += self.groups.size(layer)
        return out

    def forward(self, x: Tensor) -> Tensor:
        weights = {f"{name}.weight": weight for name, weight in self.weights().items()}
        return functional_call(self.base, weights, (x,))

    def merge(self) -> nn.Module:
        plain = copy.deepcopy(self.base)
        for name, weight in self.weights().items():
            layer = plain.get_submodule(name)
            plain.set_submodule(name, with_weights(layer, weight, layer.bias))
        return plain
