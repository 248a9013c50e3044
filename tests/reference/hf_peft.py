"""Hugging Face's peft on single layers, in a process of its own: `python -I hf_peft.py IN OUT`.

Isolated, because this repository's package of the same name would shadow it; exit status 77 where
it cannot be imported. IN is a safetensors file whose metadata holds `cases` (JSON, case -> config,
arguments, and optionally the convolution's settings and the shape of a second, wider layer). Its
tensors are CASE/weight, CASE/bias (optional), CASE/x, and CASE/parameter/NAME by the library's own
names below the layer. OUT receives CASE/y, the merged weight CASE/merged, and CASE/grad/NAME, the
gradient of sum(y^2). All in float64.
"""

import json
import sys

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

try:
    import peft
except ImportError as error:
    print(f"Hugging Face's peft cannot be imported: {error}", file=sys.stderr)
    sys.exit(77)

source, target = sys.argv[1:]
with safe_open(source, "pt") as file:
    cases = json.loads(file.metadata()["cases"])
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
out = {}
for case, spec in cases.items():
    weight, bias = tensors[f"{case}/weight"], tensors.get(f"{case}/bias")
    (rows, columns), biased = weight.shape[:2], bias is not None
    if weight.dim() == 4:
        shape = weight.shape[2:]
        layer = nn.Conv2d(columns, rows, shape, bias=biased, **spec["convolution"])
    else:
        layer = nn.Linear(columns, rows, bias=biased)
    model = nn.ModuleDict({"layer": layer})
    if "wider" in spec:
        model["wider"] = nn.Linear(*spec["wider"])
    model.double()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if biased:
            layer.bias.copy_(bias)
    config = getattr(peft, spec["config"])(target_modules=list(model), **spec["arguments"])
    wrapped = peft.get_peft_model(model, config).double().base_model.model["layer"]
    mark = f"{case}/parameter/"
    given = {name.removeprefix(mark): t for name, t in tensors.items() if name.startswith(mark)}
    own = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert own.keys() == given.keys(), f"{case}: trains {sorted(own)}, given {sorted(given)}"
    with torch.no_grad():
        for name, p in own.items():
            assert p.shape == given[name].shape, f"{case}: {name} is {p.shape}"
            p.copy_(given[name])
    y = wrapped(tensors[f"{case}/x"])
    y.square().sum().backward()
    out[f"{case}/y"] = y.detach()
    out |= {f"{case}/grad/{name}": p.grad for name, p in own.items()}
    wrapped.merge()
    out[f"{case}/merged"] = wrapped.get_base_layer().weight.detach().clone()
save_file({name: t.contiguous() for name, t in out.items()}, target)
