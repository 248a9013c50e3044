"""What a checkpoint holds of a model, how many numbers that is, and from which weights it came."""

import hashlib
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft.backbone import head_path
from peft.core import Tuner, own_parameters, tuners
from peft.layers import Stand


def _clean(model: nn.Module, name: str) -> str:
    """The name of a tensor with the `.base` of tuners dropped: stable however deep tuners are
    stacked."""
    kept, module = [], model
    for part in name.split("."):
        if not (part == "base" and isinstance(module, Stand)):
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


def check_reached(model: nn.Module, size: int, exempt: Iterable[str] = ()) -> None:
    """Raises ValueError naming the trainable tensors that no gradient reaches: they would stay as
    they are, and count as tuned.

    Asked of tensors moved a little, since a factor that starts at zero blocks its partner's first
    gradient by design, with two images of noise of `size` pixels, in eval mode. `exempt` are
    patterns of names that a method declares. The model and torch's random numbers stay unchanged.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return
    noise, like = torch.Generator().manual_seed(0), next(iter(trained.values()))

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(like)

    moved = {n: (p + 0.02 * draw(*p.shape)).detach().requires_grad_() for n, p in trained.items()}
    training = model.training
    with torch.enable_grad():
        logits = functional_call(model.eval(), moved, (draw(2, 3, size, size),))
        grads = torch.autograd.grad(logits.square().sum(), moved.values(), allow_unused=True)
    model.train(training)
    silent = [
        _clean(model, name)
        for name, grad in zip(moved, grads)
        if (grad is None or not grad.any()) and not any(re.fullmatch(e, name) for e in exempt)
    ]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise ValueError(
            f"no gradient reaches {len(silent)} of {len(trained)} trainable tensors: {shown}. This "
            f"{type(model).__name__} does not read them; place the method on other sites"
        )


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
    added = {
        id(t)
        for tuner in tuners(model).values()
        for name, t in [*tuner.named_parameters(), *tuner.named_buffers()]
        if not name.startswith("base.")
    }
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
