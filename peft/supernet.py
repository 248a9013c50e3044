"""The search for NOAH's sizes. Zhang et al., 2022, arXiv:2206.04673, section 3.2, in the manner of
AutoFormer (Chen et al., ICCV 2021, arXiv:2107.00651).

A sub-network has, for each kind of part, a depth and a size for every block, which counts in the
first blocks up to that depth: so does the released code. `Supernet` is trained by drawing one for
every step; `evolve` then breeds sub-networks whose score, an accuracy on the validation split, is
read out of it.

Mutation and crossover are AutoFormer's, size by size. The released code takes less: a mutation
changes at most the depths of the kinds (each with 0.2 * 0.4), and a child has each kind's sizes
whole from one parent: 0.92^3 = 0.78 of its mutants are their parents again.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft.core import Tuner
from peft.noah import KINDS, Adapter, LoRA, Prompts, stays

Gene = dict[str, tuple[int, ...]]  # by kind: the depth, then the size in every block
Net = dict[str, list[int]]  # by kind: the size in every block, 0 being none


@dataclass(frozen=True)
class Space:
    """All sub-networks: the sizes and depths to choose from, over so many blocks."""

    choices: Sequence[int]
    depths: Sequence[int]
    blocks: int

    def draw(self, dice: random.Random) -> Gene:
        sizes = {kind: [dice.choice(self.choices) for _ in range(self.blocks)] for kind in KINDS}
        return {kind: (dice.choice(self.depths), *sizes[kind]) for kind in KINDS}

    def mutated(self, gene: Gene, dice: random.Random, size: float, depth: float) -> Gene:
        """Draws each size anew with one probability, each depth with the other."""
        fresh, chances = self.draw(dice), (depth, *[size] * self.blocks)
        return {
            kind: tuple(
                new if dice.random() < chance else old
                for old, new, chance in zip(gene[kind], fresh[kind], chances)
            )
            for kind in KINDS
        }

    def crossed(self, one: Gene, other: Gene, dice: random.Random) -> Gene:
        """Each number from either parent."""
        pairs = {kind: zip(one[kind], other[kind]) for kind in KINDS}
        return {kind: tuple(dice.choice(pair) for pair in pairs[kind]) for kind in KINDS}


def expanded(gene: Gene) -> Net:
    return {
        kind: [size if i < depth else 0 for i, size in enumerate(sizes)]
        for kind, (depth, *sizes) in gene.items()
    }


def evolve(
    space: Space,
    score: Callable[[Net], float],
    params: Callable[[Net], int],
    *,
    generations: int = 15,
    population: int = 50,
    parents: int = 10,
    crossovers: int = 25,
    mutations: int = 25,
    chances: tuple[float, float] = (0.2, 0.4),
    limit: float = float("inf"),
    seed: int = 0,
    report: Callable[[int, Net, float], object] = lambda *_: None,
) -> tuple[Net, float]:
    """The best sub-network of at most `limit` parameters, and its score.

    In each generation all new ones are scored; the `parents` best ever seen breed the next. Equal
    scores go to the smaller network, then to the earlier. Follows from the seed and the scores.
    Raises ValueError where no drawn network keeps to the limit.
    """
    dice, seen, order = random.Random(seed), {}, {}
    top: list[str] = []

    def fill(pool: list[Gene], count: int, breed: Callable[[], Gene]) -> None:
        known = {str(expanded(gene)) for gene in pool} | seen.keys()
        for _ in range(20 * count):  # a small space may hold no more new ones
            if count <= 0:
                return
            gene = breed()
            name = str(expanded(gene))
            if name not in known and params(expanded(gene)) <= limit:
                known.add(name)
                pool.append(gene)
                count -= 1

    def mutant() -> Gene:
        return space.mutated(order[dice.choice(top)], dice, *chances)

    def child() -> Gene:
        return space.crossed(*(order[name] for name in dice.choices(top, k=2)), dice)

    for generation in range(generations):
        pool: list[Gene] = []
        if top:
            fill(pool, mutations, mutant)
            fill(pool, crossovers, child)
        fill(pool, population - len(pool), lambda: space.draw(dice))
        for gene in pool:
            net = expanded(gene)
            seen[str(net)], order[str(net)] = (-score(net), params(net), len(seen)), gene
        if not seen:
            raise ValueError(f"no sub-network drawn has at most {limit:,.0f} parameters")
        top[:] = sorted(seen, key=seen.get)[:parents]
        report(generation + 1, expanded(order[top[0]]), -seen[top[0]][0])
    return expanded(order[top[0]]), -seen[top[0]][0]


class Supernet(Tuner):
    """Around the chain of blocks: in training each step runs a sub-network of its own, otherwise
    the chosen one, or the largest."""

    exact_at_init = False
    alone = "each step trains a sub-network of its own"

    def __init__(self, base: nn.Module, choices: Sequence[int], depths: Sequence[float]):
        super().__init__(base)
        self.choices, self.depths, self.chosen = list(choices), list(depths), None
        if not choices or min(choices) < 1 or not depths or not all(0 < d <= 1 for d in depths):
            raise ValueError(
                f"{choices=} must be sizes of 1 or more, {depths=} parts of the depth in (0, 1]"
            )

    def parts(self) -> dict[str, list[Tuner]]:
        """The parts of each kind, block by block."""
        found = [m for m in self.base.modules() if isinstance(m, (Prompts, LoRA, Adapter))]
        return {kind: [part for part in found if part.kind == kind] for kind in KINDS}

    def space(self) -> Space:
        return Space(self.choices, [round(d * len(self.base)) for d in self.depths], len(self.base))

    def choose(self, net: Mapping[str, Sequence[int]] | None) -> None:
        """Which sub-network runs outside of training; None: the largest."""
        self.chosen = net
        self.resize(net)

    def resize(self, net: Mapping[str, Sequence[int]] | None) -> None:
        for kind, parts in self.parts().items():
            for i, part in enumerate(parts):
                part.size = part.most if net is None else net[kind][i]
                if part.size > part.most:
                    raise ValueError(
                        f"{part.size} of choices={self.choices} is above {kind}={part.most}"
                    )
        prompts = self.parts()["prompts"]
        for part, stay in zip(prompts, stays([part.size for part in prompts])):
            part.stay = stay

    def train(self, mode: bool = True) -> "Supernet":
        super().train(mode)
        if not mode:
            self.resize(self.chosen)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            # from torch's own stream, so that a resumed run draws the same; outside of vmap, whose
            # members share the step's sub-network
            with torch._C._DisableFuncTorch():
                seed = torch.randint(2**31, (), device="cpu").item()
            self.resize(expanded(self.space().draw(random.Random(seed))))
        return self.base(x)
