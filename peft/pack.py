"""Several runs at once over one frozen backbone.

Members of a pack see the same batches through the same frozen weights and differ in what trains: K
sets of tensors, stacked in the forward pass and mapped over by `torch.func.vmap`. What comes before
the first tuner is computed once for all; frozen layers see K times the batch; layers with weights
of their own become batched products. What trains stays in leaves of its own, one vector a member
and parameter group, so that the optimiser is a library's, with a learning rate and a weight decay
a member. A pack of one is the model itself, without any of this.

A member's numbers are those of its solo run up to the rounding of stacked kernels. Members of one
seed draw one dropout mask, that of the solo run; members of several seeds draw one mask each, out
of the first one's stream: equal to their solo runs in distribution only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from peft.batching import Batching
from peft.core import penalty, tuners
from peft.record import MACHINE, flat
from peft.state import adapter_state, load_adapter_state

Nested = Sequence[Sequence[Sequence[Tensor]]]  # by member, parameter group, leaf

# What may differ between the members of a pack, beside the numbers that tuners multiply with.
STACKED = {
    "seed",
    "optim.lr",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.warmup_epochs",
    "optim.clip_norm",
}


NUMBERS = {"scale", "alpha", "strength"}


class Unstackable(ValueError):
    """These runs can only be trained one at a time."""


def why_not(configs: Sequence[Mapping]) -> str | None:
    """The key because of which runs cannot be stacked, with the reason; None where they can.

    configs: resolved configurations of runs, with or without the keys of the machine.
    """
    kept = [{k: v for k, v in config.items() if k not in MACHINE} for config in configs]
    leaves = [flat(config) for config in kept]
    if len(leaves) < 2:
        return None
    first, absent = leaves[0], object()
    different = [
        key
        for key in dict.fromkeys(key for other in leaves for key in other)
        if any(other.get(key, absent) != first.get(key, absent) for other in leaves)
    ]
    for key in different:
        number = key.startswith("method.") and key.rpartition(".")[2] in NUMBERS
        if key not in STACKED and not number:
            return f"{key} differs"
    if "seed" in different and not first.get("backbone.pretrained", True):
        return "seed differs, and draws the weights of a backbone that is not pre-trained"
    if first.get("precision") == "fp16":
        return "precision is fp16, whose loss scale would be one for all"
    return None


def numbers_of(model: nn.Module) -> dict[tuple[str, str], float]:
    """The plain numbers that tuners hold, by path and attribute."""
    return {
        (path, name): value
        for path, tuner in tuners(model).items()
        for name, value in vars(tuner).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class Scored(nn.Module):
    """A network with its regulariser: (logits, penalty), in one call for vmap, DDP and compile."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.net(x), torch.zeros((), device=x.device) + penalty(self.net)


class Pack:
    """K members: one network, K sets of the tensors that train.

    model: carries the method. net: what runs, the model or what of it follows cached features.
    starts: the `adapter_state` of each member at its start.
    split: says of a parameter, by name, whether it is spared weight decay.
    numbers: of each member the `numbers_of` its tuners in which members differ.
    same_draws: all members draw one dropout mask. ema: keep moving `averages` of the leaves.
    `leaves[k][g]`: what the optimiser trains for member k, g = 0 with weight decay and 1 without.
    Raises Unstackable for a network whose running statistics train along.
    """

    def __init__(
        self,
        model: nn.Module,
        net: nn.Module,
        starts: Sequence[Mapping[str, Tensor]],
        split: Callable[[str, Tensor], bool],
        numbers: Sequence[Mapping[tuple[str, str], float]] | None = None,
        same_draws: bool = True,
        ema: bool = False,
    ):
        self.model, self.net, self.scored = model, net, Scored(net)
        self.members = list(range(len(starts)))  # those that still train
        self.solo = len(starts) == 1
        names = {id(p): name for name, p in model.named_parameters()}
        trained = {name: p for name, p in self.scored.named_parameters() if p.requires_grad}
        groups: tuple[dict, dict] = {}, {}
        for name, p in trained.items():
            groups[split(names[id(p)], p)][name] = p
        self.groups = groups
        self.averages = self.shared = None
        numbers = numbers or [{} for _ in starts]
        places = [p for p in numbers[0] if any(own[p] != numbers[0][p] for own in numbers)]
        self.numbers = [  # what members have of their own beside tensors
            {(model.get_submodule(path), name): own[path, name] for path, name in places}
            for own in numbers
        ]
        self.given: list[Tensor] | None = None  # the same of those that still train, by place
        if self.solo:
            load_adapter_state(model, starts[0])
            self.leaves, self.forward = [[list(group.values()) for group in groups]], self.scored
        else:
            self._stack(starts)
            randomness = "same" if same_draws else "different"
            self.mapped = vmap(self._one, (0, 0, None), randomness=randomness)
            self.forward = self._all
        self.plain, self.mode = self.forward, False  # the mode of torch.compile, once compiled
        if ema:
            self.averages = [
                [[leaf.detach().clone() for leaf in group] for group in member]
                for member in self.leaves
            ]

    def _stack(self, starts: Sequence[Mapping[str, Tensor]]) -> None:
        for path, module in self.net.named_modules():
            if module.training and getattr(module, "track_running_stats", False):
                raise Unstackable(f"the running statistics of {path} train along, one set for all")
        self.leaves = []
        for start in starts:
            load_adapter_state(self.model, start)
            filled = [[p.detach().flatten() for p in group.values()] for group in self.groups]
            self.leaves.append([[torch.cat(f).requires_grad_()] if f else [] for f in filled])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (K, B, classes) and penalties (K,) of the members that still train."""
        if self.solo:
            logits, extra = self.forward(images)
            return logits[None], extra[None]
        if self.given is None:
            values = [[self.numbers[k][place] for k in self.members] for place in self.numbers[0]]
            self.given = [torch.tensor(v).to(images.device, non_blocking=True) for v in values]
        return self.forward([self.leaves[k] for k in self.members], self.given, images)

    def _all(
        self, leaves: Nested, numbers: Sequence[Tensor], images: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.mapped(self.stacks(leaves), numbers, images)

    def _one(
        self, own: Mapping[str, Tensor], numbers: Sequence[Tensor], images: Tensor
    ) -> tuple[Tensor, Tensor]:
        places = self.numbers[0]
        for (module, name), value in zip(places, numbers, strict=True):
            setattr(module, name, value)
        try:
            with Batching():
                return functional_call(self.scored, own, (images,))
        finally:
            for (module, name), value in places.items():
                setattr(module, name, value)

    def share(self, device: torch.device) -> None:
        """Shares the batches of a pack of one with the other processes of its group. Raises
        ValueError for a method that cannot."""
        for tuner in tuners(self.model).values():
            if tuner.alone:
                kind = type(tuner).__name__
                raise ValueError(f"a {kind} takes one process: {tuner.alone}")
        ids = [device.index] if device.type == "cuda" else None
        self.shared = DistributedDataParallel(self.scored, device_ids=ids)
        self.forward = self.plain = self.shared

    def quiet(self, last: bool) -> AbstractContextManager:
        """Around all parts of a batch but the last: gradients are exchanged once a step."""
        return self.shared.no_sync() if self.shared and not last else nullcontext()

    def compile(self, mode: bool | str, images: Tensor, autocast: torch.autocast) -> str | None:
        """Compiles the forward pass and tries it on a batch, or a part of one. Returns why that
        failed, after which the pack is as it was, or None. `mode` then says how it is compiled."""
        self.uncompile()
        torch._inductor.config.fallback_random = True  # draws dropout as plain steps do
        few, failure = len(images), None
        # a pack that is not one graph would run as it is, and nobody would be told
        # nor would a graph for any size of batch do: in vmap some of its operators want numbers
        graph = torch.compile(
            self.plain,
            fullgraph=not self.solo,
            dynamic=False,
            mode=None if mode is True else mode,
        )

        def forward(*given) -> tuple[Tensor, Tensor]:
            # parts of a batch differ by one image; the smaller last batch pays for no graph
            return (graph if few <= len(given[-1]) <= few + 1 else self.plain)(*given)

        self.forward, self.mode = forward, mode
        with self.trial(images, autocast) as step:
            try:
                for _ in range(3):  # CUDA graphs are recorded at the second, and replayed then
                    step()
            except Exception as error:
                failure = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        if failure:
            self.uncompile()
        return failure

    def uncompile(self) -> None:
        """Goes on with plain steps, and frees what graphs hold."""
        self.forward, self.mode = self.plain, False
        torch.compiler.reset()  # nor does it compile more than some networks in one process

    @contextmanager
    def trial(self, images: Tensor, autocast: torch.autocast) -> Iterator[Callable[[], None]]:
        """A step forth and back, as often as one likes: none leaves a trace."""
        leaves = [leaf for k in self.members for leaf in self.trained(k)]

        def step() -> None:
            with autocast:
                logits, extra = self(images)
            (logits.float().sum() + extra.sum()).backward()
            clear()

        def clear() -> None:
            for leaf in leaves:
                leaf.grad = None

        start = {name: t.clone() for name, t in adapter_state(self.model).items()}
        try:
            with torch.random.fork_rng([images.device] if images.device.type == "cuda" else []):
                yield step
        finally:
            clear()
            load_adapter_state(self.model, start)

    def stacks(self, leaves: Nested) -> dict[str, Tensor]:
        """The tensors that train by name, (K, *shape)."""
        found = {}
        for g, group in enumerate(self.groups):
            if group:
                flat = torch.stack([own[g][0] for own in leaves])
                parts = flat.split([p.numel() for p in group.values()], 1)
                found |= {
                    name: part.unflatten(1, p.shape) if p.dim() else part[:, 0]
                    for (name, p), part in zip(group.items(), parts, strict=True)
                }
        return found

    def trained(self, k: int) -> list[Tensor]:
        """What the optimiser trains for member k."""
        return [leaf for leaves in self.leaves[k] for leaf in leaves]

    @contextmanager
    def shown(self, k: int) -> Iterator[None]:
        """The model carries what member k is judged by: its tensors, or with EMA their averages."""
        if self.solo and not self.averages:  # trains in the model itself
            yield
            return
        kept = [[p.detach().clone() for p in group.values()] for group in self.groups]
        for (module, name), value in self.numbers[k].items():
            setattr(module, name, value)
        self._carry((self.averages or self.leaves)[k])
        try:
            yield
        finally:
            self._carry(kept, whole=True)

    @torch.no_grad()
    def _carry(self, leaves: Sequence[Sequence[Tensor]], whole: bool = False) -> None:
        for group, own in zip(self.groups, leaves, strict=True):
            parts = own if whole or self.solo else _parts(group, own)
            for p, part in zip(group.values(), parts, strict=True):
                p.copy_(part.view_as(p))

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """A step of the moving averages, which start where training starts."""
        pairs = [
            (average, leaf)
            for k in self.members
            for averages, leaves in zip(self.averages[k], self.leaves[k], strict=True)
            for average, leaf in zip(averages, leaves, strict=True)
        ]
        get_ema_multi_avg_fn(decay)(*map(list, zip(*pairs, strict=True)), None)

    @torch.no_grad()
    def load(self, leaves: Nested, averages: Nested | None) -> None:
        """Goes on from the `leaves` and `averages` of a checkpoint."""
        for ours, theirs in ((self.leaves, leaves), (self.averages, averages)):
            for mine, its in zip(_flat(ours), _flat(theirs), strict=True):
                mine.copy_(its)

    def drop(self, k: int, optimizer: torch.optim.Optimizer) -> None:
        """Leaves a member out from here on, with plain steps: a smaller pack is another graph."""
        self.uncompile()
        self.members.remove(k)
        self.given = None
        kept = [group for group in optimizer.param_groups if group["member"] != k]
        for group in optimizer.param_groups:
            if group["member"] == k:
                for leaf in group["params"]:
                    optimizer.state.pop(leaf, None)
        optimizer.param_groups[:] = kept


def _flat(nested: Nested | None) -> list[Tensor]:
    return [leaf for member in nested or () for group in member for leaf in group]


def _parts(group: Mapping[str, Tensor], flat: Sequence[Tensor]) -> Sequence[Tensor]:
    return flat[0].split([p.numel() for p in group.values()]) if flat else ()


def entropies(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each member, (K,), from (K, B, classes) and labels (B,) or probabilities
    (B, classes)."""
    repeated = targets.repeat(len(logits), *[1] * (targets.dim() - 1))
    losses = F.cross_entropy(
        logits.flatten(0, 1), repeated, label_smoothing=smoothing, reduction="none"
    )
    return losses.view(len(logits), -1).mean(1)
