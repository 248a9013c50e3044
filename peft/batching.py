"""What vmap alone does slowly, not at all, or in another precision, for the packs of pack.py."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

TAKEN_APART = {F.linear, F.conv1d, F.conv2d, torch.einsum}


class Batching(TorchFunctionMode):
    """What vmap alone would do slowly or not at all. Some functions have no batching rule, and vmap
    would run them member by member: here the members become part of their batch. Others it takes
    apart before autocast sees them, so that a bias in fp32 makes the whole result fp32, or does not
    fit its convolution: their arguments are cast here, as autocast does outside of vmap. A batch
    norm with weights of the members' own forgets the precision of its input likewise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        given = kwargs or {}
        kind = next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")
        if func in TAKEN_APART and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            args = tuple(a.to(dtype) if isinstance(a, Tensor) else a for a in args)
            given = {k: a.to(dtype) if isinstance(a, Tensor) else a for k, a in given.items()}
        if func is F.batch_norm:
            return func(*args, **given).to(args[0].dtype)
        if func is Tensor.unflatten:  # torch 2.11 cannot compile the method
            return torch.unflatten(*args, **given)
        if func is F.adaptive_avg_pool2d and len(args) == 2 and args[0].dim() == 4:
            return _pool(*args)
        attends = func is F.scaled_dot_product_attention and len(args) == 3
        if attends and not (given.get("dropout_p") or given.get("enable_gqa")):
            mask = given.get("attn_mask")
            if mask is not None:
                query = args[0]
                mask = mask[(None,) * (query.dim() - mask.dim())]
                mask = mask.expand(len(query), *mask.shape[1:])
            return _attention(*args, mask, given.get("is_causal", False), given.get("scale"))
        return func(*args, **given)


# torch.compile takes these two as they are: it cannot look into what _Fold is given.
@torch.compiler.allow_in_graph
def _pool(x: Tensor, size: Sequence[int]) -> Tensor:
    return _Fold.apply(lambda x: F.adaptive_avg_pool2d(x, size), x)


@torch.compiler.allow_in_graph
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)

    return _Fold.apply(attend, q, k, v, *([] if mask is None else [mask]))


class _Fold(torch.autograd.Function):
    """A function of tensors whose first dimension is the batch, with a batching rule. Outside vmap
    it has no gradient: that is for what comes before the first tuner, the same for all members."""

    @staticmethod
    def forward(call: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return call(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info, dims, call: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, int]:
        def fold(x: Tensor, dim: int | None) -> Tensor:  # (K, B, ...) -> (K B, ...)
            x = x[None] if dim is None else x.movedim(dim, 0)
            return x.expand(info.batch_size, *x.shape[1:]).flatten(0, 1)

        folded = [fold(x, dim) for x, dim in zip(tensors, dims[1:], strict=True)]
        return call(*folded).unflatten(0, (info.batch_size, -1)), 0
