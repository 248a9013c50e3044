"""The low-rank methods against implementations that know nothing of this package: Hugging Face's
peft in a process of its own, and literal ones of the papers' equations. All in float64, to 1e-9.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import fact, svdiff
from safetensors.torch import load_file, save_file
from torch import nn

from peft.dora import DoRA
from peft.fact import FacT
from peft.loha import LoHa
from peft.lokr import LoKr
from peft.lora import LoRA
from peft.svdiff import SVDiff
from peft.vera import VeRA

HERE = Path(__file__).parent
close = {"atol": 1e-9, "rtol": 1e-9}


def stir(tuner: nn.Module) -> nn.Module:
    """Float64, and every tensor of the tuner's own away from its zeros."""
    tuner.double()
    with torch.no_grad():
        for name, parameter in tuner.named_parameters():
            if not name.startswith("base."):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return tuner


def convolution(**kwargs) -> nn.Conv2d:
    return nn.Conv2d(6, 8, 3, bias=False, **kwargs)


def cases() -> dict[str, dict]:
    """Per case: our tuner, the library's configuration, and our parameters by the library's names,
    each with the view of it that has the library's shape. `rows` are those of our layer that the
    library's layer is, where ours is fused and its is not.
    """
    torch.manual_seed(0)
    found = {}

    def case(name, tuner, names, config, arguments, rows=slice(None), **spec):
        found[name] = {
            "tuner": tuner,
            "parameters": {
                key.replace("*", "default"): given if isinstance(given, tuple) else (given, whole)
                for key, given in names.items()
            },
            "rows": rows,
            "spec": {"config": config, "arguments": arguments, **spec},
        }

    def whole(tensor):
        return tensor

    def part(i):
        return lambda tensor: tensor[i]

    linear, conv = nn.Linear(10, 12), convolution(stride=2, padding=1)
    layers = [
        ("linear", linear, {}),
        ("convolution", conv, {"convolution": {"stride": 2, "padding": 1}}),
    ]
    low = {"r": 4, "lora_alpha": 6}
    for name, base, spec in layers:
        kernel, ones = base.weight.shape[1:], (1,) * (base.weight.dim() - 2)

        def a(down, kernel=kernel):
            return down.view(-1, *kernel)

        def b(up, ones=ones):
            return up.view(*up.shape[-2:], *ones)

        def m(magnitude, ones=ones):
            return magnitude.view(1, -1, *ones) if ones else magnitude

        tuner = stir(LoRA(base, rank=4, alpha=6))
        names = {"lora_A.*.weight": (tuner.down, a), "lora_B.*.weight": (tuner.up, b)}
        case(f"lora, {name}", tuner, names, "LoraConfig", low, **spec)

        tuner = stir(DoRA(base, rank=4, alpha=6))
        names = {"lora_A.*.weight": (tuner.down, a), "lora_B.*.weight": (tuner.up, b)}
        names["lora_magnitude_vector.*.weight"] = (tuner.magnitude, m)
        case(f"dora, {name}", tuner, names, "LoraConfig", low | {"use_dora": True}, **spec)

        tuner = stir(LoHa(base, rank=3, alpha=6))
        names = {"hada_w1_a.*": tuner.up1, "hada_w1_b.*": tuner.down1}
        names |= {"hada_w2_a.*": tuner.up2, "hada_w2_b.*": tuner.down2}
        case(f"loha, {name}", tuner, names, "LoHaConfig", {"r": 3, "alpha": 6}, **spec)

    tuner = stir(LoRA(nn.Linear(12, 36), rank=4, alpha=6, parts=(0, 2)))
    for i, (name, rows) in enumerate({"q": slice(0, 12), "v": slice(24, 36)}.items()):
        names = {"lora_A.*.weight": (tuner.down, part(i)), "lora_B.*.weight": (tuner.up, part(i))}
        case(f"lora of {name}", tuner, names, "LoraConfig", low, rows)

    for name, base, factor, rank, spec in [
        ("low rank", nn.Linear(10, 36), 2, 3, {}),
        ("square split", nn.Linear(24, 40), -1, 3, {}),
        ("dense", nn.Linear(24, 36), -1, 6, {}),
        ("convolution", nn.Conv2d(12, 48, 3), 4, 2, {"convolution": {}}),
    ]:
        alpha = rank if name == "dense" else 6
        tuner = stir(LoKr(base, rank=rank, alpha=alpha, factor=factor))
        assert (tuner.right is not None) == (name == "dense")
        names = {"lokr_w1.*": tuner.left}
        if name == "dense":
            names["lokr_w2.*"] = tuner.right
        else:
            names |= {"lokr_w2_a.*": tuner.up, "lokr_w2_b.*": tuner.down}
        lokr = {"r": rank, "alpha": alpha, "decompose_factor": factor}
        case(f"lokr, {name}", tuner, names, "LoKrConfig", lokr, **spec)

    # Their projections are drawn from the same seed by the same rule: nothing frozen is passed on.
    vera = {"r": 20, "projection_prng_key": 5}
    pair = {"narrow": nn.Linear(10, 12), "wide": nn.Linear(16, 24)}
    tuner = stir(VeRA.over(pair, rank=20, seed=5)["narrow"])
    names = {"vera_lambda_b.*": (tuner.b, part(0)), "vera_lambda_d.*": (tuner.d, part(0))}
    case("vera", tuner, names, "VeraConfig", vera, wider=[16, 24])
    tuner = stir(VeRA.over({"qkv": nn.Linear(12, 36)}, rank=20, seed=5, parts=(0, 2))["qkv"])
    for i, (name, rows) in enumerate({"q": slice(0, 12), "v": slice(24, 36)}.items()):
        names = {"vera_lambda_b.*": (tuner.b, part(i)), "vera_lambda_d.*": (tuner.d, part(i))}
        case(f"vera of {name}", tuner, names, "VeraConfig", vera, rows)
    return found


def test_hugging_face_agrees(tmp_path):
    """Outputs, merged weights and gradients of sum(y^2), one process for all cases."""
    tensors, specs, found = {}, {}, cases()
    for name, case in found.items():
        base, rows = case["tuner"].base, case["rows"]
        conv = isinstance(base, nn.Conv2d)
        size = (2, base.in_channels, 9, 9) if conv else (2, 5, base.in_features)
        tensors[f"{name}/x"] = case["x"] = torch.randn(size, dtype=torch.double)
        tensors[f"{name}/weight"] = base.weight[rows]
        if base.bias is not None:
            tensors[f"{name}/bias"] = base.bias[rows]
        for key, (parameter, view) in case["parameters"].items():
            tensors[f"{name}/parameter/{key}"] = view(parameter)
        specs[name] = case["spec"]
    given, got = str(tmp_path / "given.safetensors"), str(tmp_path / "got.safetensors")
    contents = {key: t.detach().clone().contiguous() for key, t in tensors.items()}
    save_file(contents, given, metadata={"cases": json.dumps(specs)})
    command = [sys.executable, "-I", str(HERE / "reference" / "hf_peft.py"), given, got]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    if process.returncode == 77:
        pytest.skip(process.stderr.strip().splitlines()[-1])
    assert process.returncode == 0, process.stderr
    theirs = load_file(got)

    for name, case in found.items():
        tuner, rows = case["tuner"], case["rows"]
        tuner.zero_grad()
        y = tuner(case["x"])
        y = y[:, rows] if y.dim() == 4 else y[..., rows]
        y.square().sum().backward()
        pairs = {"y": y, "merged": tuner.merge().weight[rows]}
        for key, (parameter, view) in case["parameters"].items():
            pairs[f"grad/{key}"] = view(parameter.grad)
        for key, ours in pairs.items():
            expected = theirs[f"{name}/{key}"]
            assert expected.any(), f"{name}: {key} is zero, nothing is compared"
            gap = ((ours - expected).abs().max() / expected.abs().max()).item()
            assert gap < 1e-9, f"{name}: {key} differs by {gap:.1e}"


def test_unnamed_rows_of_a_fused_layer_stay():
    for tuner in (
        stir(LoRA(nn.Linear(12, 36), rank=4, parts=(0, 2))),
        stir(VeRA.over({"qkv": nn.Linear(12, 36)}, rank=20, parts=(0, 2))["qkv"]),
    ):
        assert torch.equal(tuner.weight[12:24], tuner.base.weight[12:24])
        assert (tuner.weight != tuner.base.weight)[:12].all()


def test_veras_projections_come_from_the_seed_alone():
    """No checkpoint holds them, so a second model must draw the same."""
    first, second, other = (
        VeRA.over({"fc": nn.Linear(6, 8)}, rank=5, seed=seed)["fc"] for seed in (3, 3, 4)
    )
    assert torch.equal(first.down, second.down)
    assert torch.equal(first.up, second.up)
    assert not torch.equal(first.up, other.up)
    assert not {"down", "up"} & set(first.state_dict())


def transformer(width: int, layers: int) -> dict[str, nn.Linear]:
    """The linear layers of a ViT in network order, in float64."""
    shapes = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}
    return {
        f"{layer}.{name}": nn.Linear(into * width, out * width).double()
        for layer in range(layers)
        for name, (into, out) in shapes.items()
    }


def increments(tuners: dict) -> dict[str, np.ndarray]:
    return {
        path: (tuner.eval().weight - tuner.base.weight).detach().numpy()
        for path, tuner in tuners.items()
    }


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_is_one_decomposed_tensor(form):
    torch.manual_seed(0)
    tuners = FacT.over(transformer(6, 2), form=form, rank=3, scale=0.7)
    for tuner in tuners.values():
        stir(tuner).requires_grad_(False)  # shared tensors are stirred more than once
    assert len({id(tensor) for tuner in tuners.values() for tensor in (tuner.down, tuner.up)}) == 2
    first = next(iter(tuners.values()))
    u, v = first.down.T.numpy(), first.up.numpy()
    if form == "tt":
        sigma = np.concatenate([tuner.core.numpy() for tuner in tuners.values()])
        assert sigma.shape == (24, 3, 3)
        expected = fact.tensor_train(sigma, u, v, 0.7)
    else:
        p = np.concatenate([tuner.mix.numpy() for tuner in tuners.values()])
        assert p.shape == (24, 3)
        assert all(tuner.core is first.core for tuner in tuners.values())
        expected = fact.tucker(first.core.numpy(), p, u, v, 0.7)
    found = increments(tuners)
    for layer, sites in enumerate(fact.layers(expected)):
        for site, increment in sites.items():
            np.testing.assert_allclose(found[f"{layer}.{site}"], increment, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", ["tt", "tk"])
def test_fact_by_hand(form):
    """d = 2, r = 1, one layer, U = (1, 2), V = (3, 4), and slice i scaled by i = 1 .. 12."""
    tuners = FacT.over(transformer(2, 1), form=form, rank=1)
    start = 1
    with torch.no_grad():
        for tuner in tuners.values():
            tuner.double()
            tuner.down.copy_(torch.tensor([[1.0, 2.0]]))
            tuner.up.copy_(torch.tensor([[3.0], [4.0]]))
            slices = tuner.grid[0] * tuner.grid[1]
            numbers = torch.arange(start, start + slices, dtype=torch.double)
            if form == "tt":
                tuner.core.copy_(numbers[:, None, None])
            else:
                tuner.core.fill_(2)
                tuner.mix.copy_(numbers[:, None] / 2)
            start += slices
    expected = {
        "0.qkv": [[3, 6], [4, 8], [6, 12], [8, 16], [9, 18], [12, 24]],
        "0.proj": [[12, 24], [16, 32]],
        "0.fc1": [[15, 30], [20, 40], [18, 36], [24, 48], [21, 42], [28, 56], [24, 48], [32, 64]],
        "0.fc2": [[27, 54, 30, 60, 33, 66, 36, 72], [36, 72, 40, 80, 44, 88, 48, 96]],
    }
    for path, increment in increments(tuners).items():
        np.testing.assert_allclose(increment, expected[path], atol=1e-9)


def test_fact_shares_within_a_width():
    """A hierarchical backbone has one U, V (and C) per stage."""
    stages = {width: transformer(width, 1) for width in (4, 8)}
    bases = {f"{width}.{path}": base for width in stages for path, base in stages[width].items()}
    tuners = FacT.over(bases, form="tk", rank=2)
    assert list(tuners) == list(bases)
    assert len({id(tuner.core) for tuner in tuners.values()}) == 2
    assert tuners["4.0.qkv"].up is tuners["4.0.fc2"].up is not tuners["8.0.fc2"].up


@pytest.mark.parametrize("base", [nn.Linear(7, 5), nn.Linear(5, 7), nn.Conv2d(3, 6, 3)])
def test_svdiff_shifts_singular_values(base):
    tuner = stir(SVDiff(base.double()))
    expected = svdiff.shifted(base.weight.detach().numpy(), tuner.delta.detach().numpy())
    np.testing.assert_allclose(tuner.weight.detach().numpy(), expected, atol=1e-9, rtol=1e-9)


def test_svdiff_by_hand():
    """Singular values 2 and 1 become 2.5, and max(0, 1 - 3) = 0."""
    base = nn.Linear(2, 2).double()
    base.weight.data = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).double()
    tuner = SVDiff(base)
    assert torch.equal(tuner.weight, base.weight)
    tuner.delta.data = torch.tensor([0.5, -3.0]).double()
    np.testing.assert_allclose(tuner.weight.detach().numpy(), [[0, 2.5], [0, 0]], atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(nn.Linear(10, 12), rank=11), "rank=11 .* 1..10, .* 12 x 10"),
        (lambda: LoRA(nn.Linear(10, 32), parts=(0, 2)), "32 rows do not divide into 3 parts"),
        (lambda: LoRA(nn.Conv2d(8, 8, 3, groups=8), dropout=0.1), "dropout=0.1 .* Conv2d"),
        (lambda: DoRA(nn.Linear(10, 12), rank=11), "rank=11 .* 1..10, .* 12 x 10"),
        (lambda: DoRA(nn.Conv2d(8, 8, 3), dropout=0.1), "dropout=0.1 .* Conv2d"),
        (lambda: LoHa(nn.Linear(10, 12), rank=0), "rank=0 .* 1..10, .* 12 x 10"),
        (lambda: LoKr(nn.Linear(4, 96), rank=5), r"rank=5 .* 1..4, .* \(96, 4\)"),
        (lambda: LoKr(nn.Linear(10, 12), factor=0), "factor=0 .* -1"),
        (lambda: VeRA.over({"c": nn.Conv2d(3, 8, 3)}), r"VeRA at c: .* Conv2d .* \(8, 3, 3, 3\)"),
        (lambda: FacT.over({"p": nn.Linear(4, 6)}, "tt", 2), r"FacT at p: .* \(6, 4\) .* rank=2"),
        (lambda: FacT.over({"p": nn.Linear(4, 8)}, "tk", 5), r"FacT at p: .* \(8, 4\) .* rank=5"),
        (lambda: FacT.over({"p": nn.Linear(4, 8)}, "cp", 2), "not 'cp'"),
        (lambda: SVDiff(LoRA(nn.Linear(10, 12))), "LoRA keeps changing this one"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_numbers(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_dora_with_dropout_keeps_the_plain_base_term():
    """Training output: W x + b + (m / n - 1) W z + (m / n) s B A z for the dropped input z."""
    torch.manual_seed(0)
    tuner = stir(DoRA(nn.Linear(6, 5), rank=2, alpha=4, dropout=0.5))
    x = torch.randn(3, 6).double()
    torch.manual_seed(1)
    y = tuner.train()(x)
    torch.manual_seed(1)
    z = nn.functional.dropout(x, 0.5)
    assert not torch.equal(x, z)
    w, b, delta = tuner.base.weight, tuner.base.bias, 2.0 * tuner.up @ tuner.down
    ratio = tuner.magnitude / (w + delta).pow(2).sum(1).sqrt()
    expected = x @ w.T + b + (ratio - 1) * (z @ w.T) + ratio * (z @ delta.T)
    torch.testing.assert_close(y, expected, **close)
