"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., ICLR 2024, arXiv:2310.11454.

    h = W x + Lambda_b B Lambda_d A x,   A in R^{r x in}, B in R^{out x r}                 (eq. 2)

A and B are frozen Kaiming-uniform noise from a seed, one pair for the whole network, cut to the
first rows and columns where a layer is smaller; only the diagonals `b` (zero at the start) and `d`
(0.1) of each layer train. The pair is drawn as Hugging Face's peft draws it and is not part of a
checkpoint. In a fused qkv layer `parts` names the row blocks that get vectors of their own: q and v
are [0, 2].
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner


class VeRA(WeightTuner):
    def __init__(
        self, base: nn.Module, down: Tensor, up: Tensor, initial: float, parts: tuple, of: int
    ):
        super().__init__(base)
        out, into = base.weight.shape
        self.d = nn.Parameter(torch.full((len(parts), len(down)), initial))
        self.b = nn.Parameter(torch.zeros(len(parts), out // of))
        rows = F.one_hot(torch.tensor(parts), of).float()  # (parts, of)
        for name, frozen in {"down": down[:, :into], "up": up[: out // of], "rows": rows}.items():
            self.register_buffer(name, frozen, persistent=False)

    @classmethod
    def over(
        cls,
        bases: Mapping[str, nn.Module],
        rank: int = 256,
        initial: float = 0.1,
        seed: int = 0,
        parts: tuple[int, ...] | None = None,
        of: int = 3,
    ) -> dict[str, "VeRA"]:
        """Tuners that share A and B. The rank may exceed a layer's width: the projections are
        noise, not factors that train. Raises ValueError for anything but linear layers."""
        parts, of = ((0,), 1) if parts is None else (tuple(parts), of)
        if rank < 1:
            raise ValueError(f"VeRA: rank={rank} must be at least 1")
        for path, base in bases.items():
            shape = tuple(getattr(base, "weight", torch.empty(0)).shape)
            if len(shape) != 2 or shape[0] % of:
                raise ValueError(
                    f"VeRA at {path}: it is for linear layers whose rows divide into {of} parts, "
                    f"not for a {type(base).__name__} with a weight of shape {shape}"
                )
        shapes = [base.weight.shape for base in bases.values()]
        device = next(iter(bases.values())).weight.device
        draw = torch.Generator(device="cpu").manual_seed(seed)
        down = torch.empty(rank, max(into for _, into in shapes), device="cpu")
        up = torch.empty(max(out // of for out, _ in shapes), rank, device="cpu")
        for noise in (down, up):
            nn.init.kaiming_uniform_(noise, generator=draw)
        pair = down.to(device), up.to(device)
        return {path: cls(base, *pair, initial, parts, of) for path, base in bases.items()}

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        blocks = self.b[:, :, None] * ((self.up * self.d[:, None]) @ self.down)  # (p, out / of, in)
        return weight + torch.einsum("poi,pn->noi", blocks, self.rows).reshape(weight.shape), bias

    def forward(self, x: Tensor) -> Tensor:
        """Through the r noise channels, without forming the increment."""
        noise = F.linear(x, self.down).unsqueeze(-2)  # (..., 1, r)
        blocks = F.linear(noise * self.d, self.up) * self.b  # (..., parts, out / of)
        return self.base(x) + torch.einsum("...po,pn->...no", blocks, self.rows).flatten(-2)
