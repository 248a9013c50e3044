"""Backbones: how one is built, where its weights come from, and what its sites are called.

A backbone is a timm (or any) model that knows the names of its sites: `model.sites` maps a site
(`qkv`, `fc1`, `norm`, `block`, `head` ...) to a regular expression over module paths. Everything
else here reads that one mapping.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from peft.weights import load_weights

Layers = int | Sequence[int] | None


def build_backbone(
    model: Callable[..., nn.Module],
    sites: Mapping[str, str],
    *,
    num_classes: int,
    pretrained: bool = False,
    weights: str | Path | None = None,
    original: str | None = None,
    unused: str | None = None,
    fresh: str | None = None,
    image_size: int | None = None,
    patch: int = 1,
    smallest: int = 1,
    accepts: Mapping[str, str] = MappingProxyType({"drop_path": "drop_path_rate"}),
    drop_path: float = 0.0,
    layer_dropout: float = 0.0,
    head_init: str = "zero",
    fixed: Sequence[str] = (),
    head: Mapping | None = None,
    **kwargs,
) -> nn.Module:
    """A backbone with a fresh head of `num_classes`, and `model.sites`.

    `model` is a factory such as a partial of `timm.create_model`; `kwargs` go to it, and so do
    `image_size` and `drop_path` under the argument names that `accepts` gives them. With
    `pretrained` the weights come from `weights` (a file in its original format; for it, `original`,
    `unused` and `fresh` see `load_weights`) or, when that is null, from where the factory finds
    them.
    `fixed` names parameters that pre-training never trained (MoCo-v3's sin-cos position
    embedding): they become buffers. The head starts as `start_head` says, or with `head` {classes,
    keep} as the checkpoint's own head of `classes` rows, cut down to the rows `keep`, one a class.
    Raises ValueError for an image size or rate that does not fit, or another model's weights file.
    """
    if image_size is not None and (image_size < smallest or image_size % patch):
        below = max(image_size // patch, -(-smallest // patch)) * patch
        takes = f"multiples of {patch}" if patch > 1 else f"{smallest} or more"
        takes += f" from {smallest} on" if patch > 1 and smallest > patch else ""
        raise ValueError(
            f"image_size={image_size} does not fit this backbone, which takes {takes}; "
            f"the nearest are {below} and {below + patch}"
        )
    if drop_path and "drop_path" not in accepts:
        raise ValueError(f"drop_path={drop_path}: this backbone has no residual branches to drop")
    rows = head["keep"] if head and head.get("keep") is not None else None
    if rows is not None and not (
        isinstance(rows, Sequence)
        and len(rows) == len(set(rows)) == num_classes
        and set(rows) <= set(range(head["classes"]))
    ):
        raise ValueError(
            f"head.keep={rows} must name {num_classes} different rows of 0..{head['classes'] - 1}, "
            "one a class; python train.py also takes auto and finds them by labels.match_labels"
        )

    # Always told: the factories' own drop path is 0.1 for Swin and 0.5 for torchvision's ConvNeXt.
    asked = {"drop_path": drop_path, "image_size": image_size}
    kwargs |= {accepts[key]: value for key, value in asked.items() if key in accepts}
    if pretrained and weights is None:
        kwargs["pretrained"] = True
    net = model(num_classes=num_classes if rows is None else head["classes"], **kwargs)
    net.sites = dict(sites)
    if pretrained and weights is not None:
        kept = rows is not None
        names = {"unused": unused, "fresh": fresh, "original": original}
        load_weights(net, Path(weights), head_path(net), kept, **names)
    for name in fixed:
        owner, _, leaf = name.rpartition(".")
        tensor = net.get_parameter(name).detach()
        delattr(net.get_submodule(owner), leaf)
        net.get_submodule(owner).register_buffer(leaf, tensor)
    classifier = net.get_submodule(head_path(net))
    if rows is not None:
        classifier.out_features = num_classes
        classifier.weight = nn.Parameter(classifier.weight.detach()[rows])
        classifier.bias = nn.Parameter(classifier.bias.detach()[rows])
    elif isinstance(classifier, nn.Linear):
        start_head(classifier, head_init)
    if layer_dropout:
        blocks = list(resolve(net, ["block"]))
        # RLRR's released "drop path": elementwise, from 0 to the rate over the depth
        for path, drop in resolve(net, ["drop"]).items():
            depth = next(i for i, block in enumerate(blocks) if path.startswith(block + "."))
            drop.p = layer_dropout * depth / max(1, len(blocks) - 1)
    return net


def start_head(classifier: nn.Linear, init: str) -> None:
    """Fills a fresh classifier as released code does. "zero": RLRR and ARC on ViT; at the start no
    class is preferred, whatever the features. "linear", what torch does: FacT, Convpass,
    RepAdapter. "normal_002": NOAH, SSF, and RLRR and ARC on Swin. "kaiming_out": VPT, N(0, 2 /
    classes), the fewer classes the wider. (VPT's bias of -4.595 for every class is left out: a
    softmax does not see it.)"""
    if init == "linear":
        return classifier.reset_parameters()
    starts = {
        "zero": nn.init.zeros_,
        "normal_002": partial(nn.init.trunc_normal_, std=0.02),
        "kaiming_out": partial(nn.init.kaiming_normal_, mode="fan_out"),
    }
    if init not in starts:
        raise ValueError(f"head_init={init}: there is {', '.join(starts)}, linear")
    starts[init](classifier.weight)
    nn.init.zeros_(classifier.bias)


def resolve(model: nn.Module, sites: Sequence[str], layers: Layers = None) -> dict[str, nn.Module]:
    """The modules of some sites, by path, in network order.

    `layers` keeps those inside some blocks: k the first k, -k the last k, a list those indices;
    modules outside all blocks stay only without it. Raises ValueError for an unknown site or one
    that matches nothing, naming the closest.
    """
    known: dict[str, str] = model.sites
    if not sites:
        raise ValueError(f"sites=[] names no site; there is: {', '.join(sorted(known))}")
    modules = {
        path: m for path, m in model.named_modules() if path and not isinstance(m, nn.Identity)
    }
    found: set[str] = set()
    for site in sites:
        if site not in known:
            near = difflib.get_close_matches(site, known, n=3) or sorted(known)
            raise ValueError(
                f"{type(model).__name__} has no site {site!r}; did you mean {', '.join(near)}? It "
                f"has: {', '.join(sorted(known))}"
            )
        matched = {path for path in modules if re.fullmatch(known[site], path)}
        if not matched:
            near = difflib.get_close_matches(
                known[site].replace("\\", "").replace("d+", "0"), modules, n=3, cutoff=0.3
            )
            raise ValueError(
                f"no module of {type(model).__name__} matches site {site!r} ({known[site]}); "
                f"closest: {', '.join(near) or 'none'}"
            )
        found |= matched
    if layers is not None:
        blocks = list(resolve(model, ["block"]))
        kept = _indices(layers, len(blocks))
        inside = tuple(f"{blocks[i]}." for i in kept)
        found = {path for path in found if f"{path}.".startswith(inside)}
        if not found:
            raise ValueError(
                f"layers={layers} leaves nothing of the sites {', '.join(sites)} in {len(blocks)} "
                "blocks"
            )
    return {path: modules[path] for path in modules if path in found}


def check_opens(block: nn.Module) -> None:
    """Raises ValueError unless `attend` and `feed` know how to run the halves of this block."""
    if not isinstance(block, (Block, SwinTransformerBlock)):
        raise ValueError(
            f"{type(block).__module__}.{type(block).__name__} cannot be opened between its "
            "attention and its MLP; known: timm's vision_transformer.Block and "
            "SwinTransformerBlock, as the innermost placement on that block"
        )


def attend(block: nn.Module, x: Tensor) -> Tensor:
    """What the first half of a pre-norm block adds to the residual stream x: (B, N, d), in Swin (B,
    H, W, d)."""
    if isinstance(block, SwinTransformerBlock):
        return block.drop_path1(block._attn(block.norm1(x)))
    return block.drop_path1(block.ls1(block.attn(block.norm1(x))))


def feed(block: nn.Module, x: Tensor) -> Tensor:
    """What the second half adds."""
    y = block.mlp(block.norm2(x))
    return block.drop_path2(y if isinstance(block, SwinTransformerBlock) else block.ls2(y))


def _indices(layers: int | Sequence[int], depth: int) -> list[int]:
    wanted = list(range(depth))[:layers] if isinstance(layers, int) and layers > 0 else layers
    wanted = list(range(depth))[layers:] if isinstance(layers, int) and layers < 0 else wanted
    wanted = list(wanted) if not isinstance(wanted, int) else []
    if (
        not wanted
        or not all(0 <= i < depth for i in wanted)
        or (isinstance(layers, int) and abs(layers) > depth)
    ):
        raise ValueError(
            f"layers={layers} does not fit {depth} blocks: give k (first k), -k (last k) or a "
            "list of indices from 0"
        )
    return wanted


def parameters_of(model: nn.Module, trainable: Sequence[str | Mapping]) -> dict[str, nn.Parameter]:
    """The parameters of the untouched backbone that a method trains, by name. See `core.attach` for
    the forms of `trainable`."""
    parameters = dict(model.named_parameters())
    selected: dict[str, nn.Parameter] = {}
    for entry in trainable:
        if isinstance(entry, Mapping):
            inside = resolve(model, entry["sites"], entry.get("layers"))
        elif entry in model.sites:
            inside = resolve(model, [entry])
        else:
            matched = {name: p for name, p in parameters.items() if re.fullmatch(entry, name)}
            if not matched:
                near = difflib.get_close_matches(
                    entry, [*model.sites, *parameters], n=3, cutoff=0.3
                )
                raise ValueError(
                    f"trainable {entry!r} is neither a site nor matches a parameter of "
                    f"{type(model).__name__}; closest: {', '.join(near)}"
                )
            selected |= matched
            continue
        prefixes = tuple(f"{path}." for path in inside)
        selected |= {name: p for name, p in parameters.items() if name.startswith(prefixes)}
    return selected


def head_path(model: nn.Module) -> str:
    """The path of the classifier."""
    return model.sites["head"].replace("\\", "")
