"""FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer. Jie and Deng, AAAI 2023,
arXiv:2212.03145.

All d x d slices of the network (q, k, v, o, four of fc1, four of fc2 in each of L layers) form one
tensor, and its increment is factored:

    tt   dW_i^T = s U T_i V,                  U in R^{d x r}, V in R^{r x d}, T_i in R^{r x r}
    tk   dW_i^T = s U (sum_t P_it C_t) V,     C in R^{r x r x r}, P in R^{12 L x r}

W is torch's (out, in), so the paper's X W gives the transpose. U^T is `down` and V^T is `up`,
shared by all sites of one width (a hierarchical backbone has a pair per stage). `core` is a site's
own T, or the shared C of tk, whose P has its rows in `mix`. V starts at zero, so the network starts
unchanged; U and T as torch's linear layers, C and P Xavier-uniform, as released. Dropout acts on
the r channels before V. The released tk code reads the four slices of fc1 and fc2 through a reshape
that interleaves them; here each slice has its own row of P, as in the paper.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft.core import WeightTuner


class FacT(WeightTuner):
    def __init__(
        self,
        base: nn.Module,
        down: nn.Parameter,
        up: nn.Parameter,
        core: nn.Parameter,
        mix: nn.Parameter | None = None,
        scale: float = 1.0,
        dropout: float = 0.1,
    ):
        super().__init__(base)
        self.down, self.up, self.core, self.mix = down, up, core, mix
        out, into = base.weight.shape
        self.grid = (out // len(up), into // len(up))  # slices along outputs and inputs
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    @classmethod
    def over(
        cls, bases: Mapping[str, nn.Module], form: str, rank: int, **kwargs
    ) -> dict[str, "FacT"]:
        """Tuners that share U and V (and C). Raises ValueError for layers that are not linear,
        sides that are no multiples of each other, or a rank above the width."""
        if form not in ("tt", "tk"):
            raise ValueError(f"FacT has the forms tt (tensor train) and tk (Tucker), not {form!r}")
        widths: dict[int, dict[str, nn.Module]] = {}
        for path, base in bases.items():
            shape = tuple(getattr(base, "weight", torch.empty(0)).shape)
            width = min(shape)
            if len(shape) != 2 or max(shape) % width or not 1 <= rank <= width:
                raise ValueError(
                    f"FacT at {path}: a {type(base).__name__} of shape {shape} must be linear, "
                    f"divide into slices of its smaller side, and rank={rank} not exceed that"
                )
            widths.setdefault(width, {})[path] = base
        tuners = {}
        for width, sites in widths.items():
            down = nn.Parameter(torch.empty(rank, width))
            up = nn.Parameter(torch.zeros(width, rank))
            nn.init.kaiming_uniform_(down, a=5**0.5)
            sizes = [base.weight.numel() // width**2 for base in sites.values()]
            if form == "tk":
                shared = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, rank, rank)))
                rows = nn.init.xavier_uniform_(torch.empty(sum(sizes), rank)).split(sizes)
            for i, (path, base) in enumerate(sites.items()):
                if form == "tk":
                    core, mix = shared, nn.Parameter(rows[i].clone())
                else:
                    bound = (rank * base.weight.shape[1] / width) ** -0.5
                    core = nn.Parameter(torch.empty(sizes[i], rank, rank).uniform_(-bound, bound))
                    mix = None
                tuners[path] = cls(base, down, up, core, mix, **kwargs)
        return {path: tuners[path] for path in bases}

    def slices(self) -> Tensor:
        """T (outputs / d, inputs / d, r, r)."""
        tk = self.mix is not None
        core = torch.einsum("st,tab->sab", self.mix, self.core) if tk else self.core
        return core.unflatten(0, self.grid)

    def adapted(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta = torch.einsum("ob,pqab,ai->poqi", self.up, self.slices(), self.down)
        return weight + self.scale * delta.reshape(weight.shape), bias

    def forward(self, x: Tensor) -> Tensor:
        """Through r channels: U, the slices' cores, V."""
        narrow = F.linear(x.unflatten(-1, (self.grid[1], -1)), self.down)  # (..., q, r)
        narrow = self.dropout(torch.einsum("...qa,pqab->...pb", narrow, self.slices()))
        return self.base(x) + F.linear(self.scale * narrow, self.up).flatten(-2)
