"""The idea: a method is sites x tuner x optional merge.

A *tuner* is one `nn.Module` standing in for one frozen module `base` of the backbone, put there by
module replacement: no hooks, no in-place state, no mode-dependent weights, so that `deepcopy`,
`torch.compile`, `vmap` and DDP keep working and `print(model)` shows what happened. Two kinds
suffice. A `WeightTuner` is a pure function (W, b) -> (W', b'); its forward pass, its merge, and
direct reads of `.weight` by the owner of a layer all follow from that one function. Any other
`Tuner` wraps a module as it likes.

`attach` places tuners, freezes, and says what else trains; `merge` folds tuners back;
`adapter_state` is what a checkpoint holds.
"""

import copy
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.backbone import Still, head_path, parameters_of, resolve


class Tuner(nn.Module):
    """Stands in for one frozen module `base`."""

    exact_at_init = True  # attaching leaves the function of the network unchanged

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base

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

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)

    def merge(self) -> nn.Module:
        """The plain module that computes the same. Raises TypeError where there is none."""
        raise TypeError(f"{type(self).__name__} cannot be folded into {type(self.base).__name__}")

    def penalty(self) -> Tensor | float:
        """A regulariser, added to the loss."""
        return 0.0


class WeightTuner(Tuner):
    """A pure function of the weight and bias of a linear, convolution or norm layer."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        if not isinstance(getattr(base, "weight", None), Tensor):
            raise ValueError(f"{type(base).__name__} has no weight to adapt")

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    # Owners such as timm's SwinV2 and BEiT read `qkv.weight` instead of calling `qkv`: they must
    # see W', not W.
    @property
    def weight(self) -> Tensor:
        return self.adapted(self.base.weight, self.base.bias)[0]

    @property
    def bias(self) -> Tensor | None:
        return self.adapted(self.base.weight, self.base.bias)[1]

    def forward(self, x: Tensor) -> Tensor:
        return run(self.base, x, *self.adapted(self.base.weight, self.base.bias))

    def merge(self) -> nn.Module:
        return with_weights(self.base, *self.adapted(self.base.weight, self.base.bias))


def innermost(base: nn.Module) -> nn.Module:
    """The layer of the backbone below any stack of tuners on one site."""
    while isinstance(base, (Tuner, Still)):
        base = base.base
    return base


def run(base: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`base(x)` with other weights. Frozen batch norms use their running statistics in either
    mode."""
    base = innermost(base)
    if isinstance(base, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(base, nn.Conv2d) and type(base).forward is nn.Conv2d.forward:
        return base._conv_forward(x, weight, bias)
    if isinstance(base, nn.LayerNorm):
        if channel_dim(base) == 1:  # timm's LayerNorm2d: NCHW in and out
            return F.layer_norm(
                x.permute(0, 2, 3, 1), base.normalized_shape, weight, bias, base.eps
            ).permute(0, 3, 1, 2)
        return F.layer_norm(x, base.normalized_shape, weight, bias, base.eps)
    if isinstance(base, nn.BatchNorm2d) and type(base).forward is nn.BatchNorm2d.forward:
        return F.batch_norm(
            x, base.running_mean, base.running_var, weight, bias, False, 0.0, base.eps
        )
    if isinstance(base, nn.GroupNorm) and type(base).forward is nn.GroupNorm.forward:
        return F.group_norm(x, base.num_groups, weight, bias, base.eps)
    known = "Linear, Conv2d, LayerNorm, BatchNorm2d, GroupNorm"
    raise TypeError(
        f"no way is known to run {type(base).__name__} with other weights; known: {known}"
    )


def channel_dim(base: nn.Module) -> int:
    """The dimension of the output that holds the channels of `base`: 1 for NCHW layers, else the
    last."""
    base = innermost(base)
    nchw = isinstance(base, (nn.Conv2d, nn.BatchNorm2d, nn.GroupNorm)) or (
        isinstance(base, nn.LayerNorm) and "2d" in type(base).__name__
    )
    return 1 if nchw else -1


def width(base: nn.Module) -> int:
    """The channels of what a sub-layer or block of a transformer puts out: those of its last linear
    layer."""
    linears = [module for module in innermost(base).modules() if isinstance(module, nn.Linear)]
    if not linears:
        kind = type(innermost(base)).__name__
        raise ValueError(
            f"{kind} holds no linear layer: only attentions, MLPs and blocks have a width"
        )
    return linears[-1].out_features


def with_weights(base: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of `base` with other weights; a layer that had no bias gains one where the method
    shifts it."""
    plain = copy.copy(base)
    plain._parameters = dict(base._parameters)
    plain.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    plain.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
    return plain


def add(bias: Tensor | None, shift: Tensor) -> Tensor:
    """`bias + shift` where a layer may have no bias."""
    return shift if bias is None else bias + shift


def attach(
    model: nn.Module,
    placements: Iterable[Mapping] = (),
    trainable: Sequence[str | Mapping] = ("head",),
) -> nn.Module:
    """Puts tuners on sites and freezes everything but them and `trainable`; changes `model` and
    returns it.

    Each placement is a mapping with `sites` (site names of the backbone), `tuner` (a callable such
    as `LoRA.over` that takes
    {path: base} and returns {path: tuner}) and optionally `layers` (see `backbone.resolve`).
    `trainable` names sites, regular expressions over parameter names, or mappings {sites, layers}.
    All of it is resolved, checked and built before the model is touched, so an error leaves the
    model whole. Raises ValueError for a site that matches nothing or a method that trains nothing.
    """
    if tuners(model):
        raise ValueError(
            "this model already carries tuners: merge(model) first, or build the backbone afresh"
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
        made = make({path: standing.get(path, base) for path, base in bases.items()})
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
    """The sum of all tuners' regularisers."""
    return sum(tuner.penalty() for tuner in tuners(model).values())


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """A copy of `model` as the plain backbone with its own keys. Raises TypeError naming the tuner
    that cannot be folded in."""
    model = copy.deepcopy(model)
    wrapped = [path for path, m in model.named_modules() if isinstance(m, (Tuner, Still))]
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        # inner before outer
        for path in sorted(wrapped, key=lambda path: path.count("."), reverse=True):
            try:
                plain = model.get_submodule(path).merge()
            except TypeError as error:
                raise TypeError(f"{path}: {error}") from error
            model.set_submodule(path, plain)
    return model.requires_grad_(False)


def _clean(model: nn.Module, name: str) -> str:
    """The name of a tensor with the `.base` of tuners dropped: stable however deep tuners are
    stacked."""
    kept, module = [], model
    for part in name.split("."):
        if not (part == "base" and isinstance(module, (Tuner, Still))):
            kept.append(part)
        module = getattr(module, part)
    return ".".join(kept)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The trainable tensors and the buffers that training changes, by clean name."""
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = head_path(model)
    for path, module in model.named_modules():
        own = any(p.requires_grad for p in module.parameters(recurse=False))
        if own or isinstance(module, Tuner) or path == head or path.startswith(head + "."):
            found |= {
                f"{path}.{n}": b
                for n, b in module.named_buffers(recurse=False)
                if n not in module._non_persistent_buffers_set
            }
    return {_clean(model, name): tensor for name, tensor in found.items()}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """What training changed: the trainable tensors, head included, and changed buffers; named by
    site path and own name."""
    return {name: tensor.detach() for name, tensor in _trained(model).items()}


@torch.no_grad()
def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies an `adapter_state` into a model with the same method. Raises ValueError that lists
    every mismatch; then nothing was copied."""
    own = adapter_state(model)
    wrong = [f"missing {name} {tuple(own[name].shape)}" for name in own if name not in state]
    wrong += [f"unexpected {name} {tuple(state[name].shape)}" for name in state if name not in own]
    wrong += [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the "
        "model"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    if wrong:
        raise ValueError(
            f"the adapter does not fit the model in {len(wrong)} places (another method, "
            "backbone, number of classes or "
            "hyper-parameters?):\n  " + "\n  ".join(wrong)
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
    return model


def count(model: nn.Module) -> dict[str, int]:
    """Numbers of parameters: `tuned` trainable outside the head, `head` trainable in it, `backbone`
    the pre-trained ones. A shared tensor counts once."""
    head = {id(p) for p in model.get_submodule(head_path(model)).parameters()}
    added = {id(p) for tuner in tuners(model).values() for p in own_parameters(tuner).values()}
    parameters = list(model.parameters())
    return {
        "tuned": sum(p.numel() for p in parameters if p.requires_grad and id(p) not in head),
        "head": sum(p.numel() for p in parameters if p.requires_grad and id(p) in head),
        "backbone": sum(p.numel() for p in parameters if id(p) not in head and id(p) not in added),
    }


def digest(model: nn.Module) -> str:
    """sha256 of the pre-trained tensors, head and tuners left out: names what was loaded, whatever
    the file format."""
    added = {id(p) for tuner in tuners(model).values() for p in own_parameters(tuner).values()}
    head, sha = head_path(model) + ".", hashlib.sha256()
    tensors = {
        _clean(model, name): t
        for name, t in model.state_dict(keep_vars=True).items()
        if id(t) not in added
    }
    for name in sorted(name for name in tensors if not name.startswith(head)):
        sha.update(name.encode())
        sha.update(
            tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        )
    return sha.hexdigest()
