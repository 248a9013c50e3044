"""The idea: a method is sites x tuner x optional merge.

A *tuner* is one `nn.Module` standing in for one frozen module `base` of the backbone, put there by
module replacement: no hooks, no in-place state, no mode-dependent weights, so that `deepcopy`,
`torch.compile`, `vmap` and DDP keep working and `print(model)` shows what happened. Two kinds
suffice. A `WeightTuner` is a pure function (W, b) -> (W', b'); its forward pass, its merge, and
direct reads of `.weight` by the owner of a layer all follow from that one function. Any other
`Tuner` wraps a module as it likes.

`attach` places tuners, freezes, and says what else trains; `merge` folds tuners back. What a
checkpoint holds of the result is in state.py, what a layer is to a method in layers.py.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from peft.backbone import head_path, parameters_of, resolve
from peft.layers import Stand, Still, innermost, run, with_weights


class Tuner(Stand):
    """Stands in for one frozen module `base`, with parameters of its own."""

    exact_at_init = True  # attaching leaves the function of the network unchanged
    alone = ""  # why several processes cannot share a step of it

    @classmethod
    def over(cls, bases: Mapping[str, nn.Module], **hparams) -> dict[str, "Tuner"]:
        """The tuners of one placement, by path, in network order. Methods that share tensors across
        sites override this and register the same `nn.Parameter` in each tuner."""
        tuners = {}
        for path, base in bases.items():
            try:
                tuners[path] = cls(base, **hparams)
            except ValueError as error:
                raise ValueError(f"{cls.__name__} at {path}: {error}") from error
        return tuners

    def penalty(self) -> Tensor | float:
        """A regulariser, added to the loss."""
        return 0.0


class WeightTuner(Tuner):
    """A pure function of the weight and bias of a linear, convolution or norm layer."""

    takes_norms = False  # most methods are for matrices and kernels

    def __init__(self, base: nn.Module):
        super().__init__(base)
        weight = getattr(base, "weight", None)
        if not isinstance(weight, Tensor) or (weight.dim() < 2 and not self.takes_norms):
            kind = type(innermost(base)).__name__
            raise ValueError(f"a {kind} has no matrix or kernel to adapt; place it on other sites")

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    # Owners such as timm's SwinV2 and BEiT read `qkv.weight` instead of calling `qkv`: they must
    # see W', not W.
    @property
    def weight(self) -> Tensor:
        drops = [m for n, m in self.named_children() if n != "base" and isinstance(m, nn.Dropout)]
        if self.training and any(drop.p for drop in drops):
            raise RuntimeError(
                f"the layer above a {type(self).__name__} reads its weight instead of calling it: "
                "dropout has no effect there, give method.dropout=0"
            )
        return self.adapted(self.base.weight, self.base.bias)[0]

    @property
    def bias(self) -> Tensor | None:
        return self.adapted(self.base.weight, self.base.bias)[1]

    def forward(self, x: Tensor) -> Tensor:
        return run(self.base, x, *self.adapted(self.base.weight, self.base.bias))

    def merge(self) -> nn.Module:
        return with_weights(self.base, *self.adapted(self.base.weight, self.base.bias))


def attach(
    model: nn.Module,
    placements: Iterable[Mapping] = (),
    trainable: Sequence[str | Mapping] = ("head",),
) -> nn.Module:
    """Puts tuners on sites and freezes everything but them and `trainable`; changes `model` and
    returns it.

    Each placement is a mapping with `sites` (site names of the backbone), `tuner` (a callable such
    as `LoRA.over` that takes {path: base} and returns {path: tuner}) and optionally `layers` (see
    `backbone.resolve`).
    `trainable` names sites, regular expressions over parameter names, or mappings {sites, layers}.
    All of it is resolved, checked and built before the model is touched, so an error leaves the
    model whole. Raises ValueError for a site that matches nothing or a method that trains nothing.
    """
    if tuners(model):
        raise ValueError(
            "this model already carries tuners: merge(model) first, or build the backbone afresh"
        )
    if "head" not in getattr(model, "sites", {}):
        raise ValueError(
            f"this {type(model).__name__} does not say where its sites are: set model.sites, "
            r"regular expressions over paths, as in {'head': 'fc', 'conv': r'layer\d\..*conv\d'}, "
            "the classifier among them; peft.create brings them along"
        )
    selected = parameters_of(model, trainable)
    # what will stand at each path; a second placement on a site wraps the first
    standing: dict[str, nn.Module] = {}
    for placement in placements:
        unknown = set(placement) - {"sites", "tuner", "layers"}
        if unknown:
            raise ValueError(
                "a placement has the keys sites, tuner and layers, not "
                f"{', '.join(sorted(unknown))}"
            )
        bases = resolve(model, placement["sites"], placement.get("layers"))
        make: Callable = placement["tuner"]
        if isinstance(kind := getattr(make, "func", make), type):
            name = kind.__name__
            raise ValueError(f"the tuner of a placement takes all of its sites: {name}.over")
        try:
            made = make({path: standing.get(path, base) for path, base in bases.items()})
        except TypeError as error:  # rank=2.5, rank=many
            given = ", ".join(f"{k}={v}" for k, v in getattr(make, "keywords", {}).items())
            raise TypeError(f"{', '.join(placement['sites'])} with {given}: {error}") from error
        for path, tuner in made.items():
            names = set(own_parameters(tuner))
            if path in standing and names & set(own_parameters(standing[path])):
                alike = ", ".join(sorted(names))
                raise ValueError(f"two tuners on {path} name their tensors alike: {alike}")
            standing[path] = tuner
    if not selected and not any(own_parameters(tuner) for tuner in standing.values()):
        raise ValueError(
            f"nothing would train: {len(standing)} tuners and trainable={list(trainable)} hold no "
            "parameter"
        )

    trains, head = {id(parameter) for parameter in selected.values()}, head_path(model) + "."
    for path, module in model.named_modules():
        frozen = not any(id(p) in trains for p in module.parameters(recurse=False))
        norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if norm and frozen and path not in standing and not path.startswith(head):
            standing[path] = Still(module)
    model.requires_grad_(False)
    for parameter in selected.values():
        parameter.requires_grad_(True)
    # deepest first: an outer tuner hides inner paths
    for path in sorted(standing, key=lambda path: path.count("."), reverse=True):
        model.set_submodule(path, standing[path])
    return model


def own_parameters(tuner: Tuner) -> dict[str, nn.Parameter]:
    """The parameters a tuner adds, by its own names."""
    return {name: p for name, p in tuner.named_parameters() if not name.startswith("base.")}


def tuners(model: nn.Module) -> dict[str, Tuner]:
    """Every tuner by its path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Tuner)}


def penalty(model: nn.Module) -> Tensor | float:
    """The sum of all tuners' regularisers; never in half precision, where the distance of a product
    from the identity would drown."""
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        return sum(tuner.penalty() for tuner in tuners(model).values())


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` as the plain backbone with its own keys. Raises TypeError naming the tuner
    that cannot be folded in."""
    model = copy.deepcopy(model)
    wrapped = [path for path, m in model.named_modules() if isinstance(m, Stand)]
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        # inner before outer
        for path in sorted(wrapped, key=lambda path: path.count("."), reverse=True):
            try:
                plain = model.get_submodule(path).merge()
            except TypeError as error:
                raise TypeError(f"{path}: {error}") from error
            model.set_submodule(path, plain)
    return model.requires_grad_(False)
