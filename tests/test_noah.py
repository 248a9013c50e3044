"""NOAH: a sub-network of the supernet is the network of those sizes; what training and the search
draw; the three steps at the command line."""

import json
import random

import pytest
import torch
from conftest import jitter, tiny

import peft
import train
from peft import record as records
from peft.config import compose
from peft.noah import KINDS, Adapter, LoRA, Prompts, stays
from peft.supernet import Space, Supernet, evolve, expanded
from scripts import noah

TWO = {"backbone.model.depth": 2}
NET = {"prompts": [5, 0], "rank": [1, 10], "hidden": [0, 5]}


def supernet(**values) -> tuple[torch.nn.Module, Supernet]:
    model = jitter(tiny("tiny_vit", "noah_supernet", **TWO, **values)).eval()
    (around,) = [m for m in model.modules() if isinstance(m, Supernet)]
    return model, around


def test_a_sub_network_is_the_network_of_its_sizes(images):
    model, around = supernet()
    largest = model(images)
    around.choose(NET)
    small = tiny("tiny_vit", "noah", **TWO, **NET).eval()
    own, whole = peft.adapter_state(small), peft.adapter_state(model)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(whole[name][tuple(slice(side) for side in tensor.shape)])
    torch.testing.assert_close(small(images), model(images), atol=1e-5, rtol=1e-5)
    assert (model(images) - largest).abs().max() > 1e-3
    assert not any("blocks.1.prompts" in name or "blocks.0.mlp" in name for name in own)
    assert peft.count(small)["tuned"] == noah.size_of(NET, 64)
    around.choose(None)
    assert torch.equal(model(images), largest)


def test_by_hand():
    """LoRA: 2 + B A x = 2 + 3 * (1 * 2) = 8 of rank 1, 8 + 5 * (2 * 2) = 28 of rank 2. Adapter:
    h = 2, code = quickgelu(0 * 2 + 1) = sigmoid(1.702), y = 2 + 3 sigmoid(1.702) + 1."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data = torch.ones(1, 1)
    wide = torch.nn.Linear(2, 2, bias=False)
    wide.weight.data = torch.eye(2)
    lora = LoRA(wide, 2, 16, 0.0, "normal_002")
    lora.down.data, lora.up.data = (
        torch.tensor([[1.0, 0], [2, 0]]),
        torch.tensor([[3.0, 5], [0, 0]]),
    )
    x = torch.tensor([[2.0, 0.0]])
    assert lora(x).tolist() == [[28.0, 0.0]]
    lora.size = 1
    assert lora(x).tolist() == [[8.0, 0.0]]
    adapter = Adapter(linear, 1, 16, 0.0, "normal_002")
    for tensor, value in zip(
        (adapter.down, adapter.down_bias, adapter.up, adapter.up_bias), (0, 1, 3, 1)
    ):
        tensor.data.fill_(value)
    expected = 3 + 3 * torch.sigmoid(torch.tensor(1.702)).item()
    assert adapter(torch.full((1, 1), 2.0)).item() == pytest.approx(expected)
    adapter.size = 0
    assert adapter(torch.full((1, 1), 2.0)).item() == 2.0


def test_the_last_prompts_stay_to_the_end(images):
    """As released: a block with prompts takes the place of those before it, one without leaves
    them. Prompts in the first of three blocks are seen by the two others, those in the first two
    are not seen by each other."""
    seen = []

    def lengths(sizes: list[int]) -> list[int]:
        model = tiny(
            "tiny_vit", "noah", prompts=sizes, rank=0, hidden=0, **{"backbone.model.depth": 3}
        )
        seen.clear()
        for block in (m for m in model.modules() if type(m).__name__ == "Block"):
            block.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
        model.eval()(images)
        return [length - seen[0] + sizes[0] for length in seen]

    assert lengths([5, 0, 0]) == [5, 5, 5]
    assert lengths([5, 1, 0]) == [5, 1, 1]
    assert lengths([5, 2, 3]) == [5, 2, 3]
    assert stays([5, 0, 2, 1]) == [True, False, False, False]


def test_prompts_start_and_drop_as_released():
    """Xavier's bound for (1, p, d): sqrt(6 / (p d + d)); each image drops entries of its own."""
    block = Prompts(torch.nn.Linear(64, 64), 10, 16, 0.5, "normal_002")
    bound = (6 / (10 * 64 + 64)) ** 0.5
    assert 0.95 * bound < block.prompts.abs().max() <= bound
    seen = []
    block.base.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][:, -10:]))
    block(torch.zeros(2, 3, 64))
    kept = seen[0] != 0
    assert (kept[0] != kept[1]).any() and 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(seen[0][kept], (2 * block.prompts).expand(2, -1, -1)[kept])
    vpts = Prompts(torch.nn.Linear(64, 64), 10, 16, 0.5, "zero_up").prompts.abs().max()
    assert 0.95 < vpts / (6 / (3 * 16**2 + 64)) ** 0.5 <= 1


def test_training_draws_a_network_a_step_and_reaches_every_tensor(images):
    model, around = supernet()
    model.train()
    torch.manual_seed(0)
    sizes = set()
    for _ in range(40):
        model(images).square().sum().backward()
        sizes.add(str([[part.size for part in parts] for parts in around.parts().values()]))
    assert len(sizes) > 20
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    torch.manual_seed(0)
    model(images)
    drawn = [[part.size for part in parts] for parts in around.parts().values()]
    torch.manual_seed(0)
    model(images)  # the draw follows from torch's stream, which a checkpoint keeps
    assert drawn == [[part.size for part in parts] for parts in around.parts().values()]
    model.eval()
    assert all(part.size == 10 for parts in around.parts().values() for part in parts)


def test_the_space():
    space, dice = Space([1, 5, 10], [3, 6, 9, 12], 12), random.Random(0)
    nets = [expanded(space.draw(dice)) for _ in range(300)]
    for kind in KINDS:
        depths = {sum(size > 0 for size in net[kind]) for net in nets}
        assert depths == {3, 6, 9, 12}
        assert {size for net in nets for size in net[kind]} == {0, 1, 5, 10}
        assert all(0 not in net[kind][: sum(s > 0 for s in net[kind])] for net in nets)
    one, other = space.draw(dice), space.draw(dice)
    child = space.crossed(one, other, dice)
    assert all(c in pair for k in KINDS for c, *pair in zip(child[k], one[k], other[k]))
    assert space.mutated(one, dice, 0.0, 0.0) == one


def test_evolution_finds_what_scores_best():
    """The score wants rank 10 everywhere and nothing else; a random search of the same size does
    worse, the same seed finds the same, and the limit is kept."""
    space = Space([1, 5, 10], [1, 2, 3, 4], 4)
    settings = {"generations": 12, "population": 30, "parents": 6}
    settings |= {"mutations": 12, "crossovers": 12}

    def score(net):
        return sum(net["rank"]) - 0.5 * sum(net["prompts"] + net["hidden"])

    def params(net):
        return noah.size_of(net, 8)

    net, best = evolve(space, score, params, **settings)
    assert net["rank"] == [10] * 4 and best == 39.0  # one prompt and one hidden unit remain
    assert evolve(space, score, params, **settings) == (net, best)
    alone = settings | {"mutations": 0, "crossovers": 0}
    assert evolve(space, score, params, **alone)[1] < best
    small, _ = evolve(space, score, params, limit=700, **settings)
    assert params(small) <= 700 < params(net)
    with pytest.raises(ValueError, match="no sub-network drawn has at most 10 parameters"):
        evolve(space, score, params, limit=10, **settings)
    tied, _ = evolve(space, lambda net: 1.0, params, **settings)
    assert params(tied) < params(net), "equal scores go to the smaller network"


def test_supernet_search_and_retrain(tmp_path, capsys):
    told = [
        *("backbone=tiny_vit", "backbone.model.depth=2", "dataset=fake", "image_size=32"),
        *("device=cpu", "workers=0", "optim.batch_size=16", "optim.epochs=1"),
        f"runs_dir={tmp_path}",
    ]
    train.run(compose("train", [*told, "method=noah_supernet", "phase=grid"]))
    (run,) = tmp_path.glob("fake/fake/noah_supernet-*")
    few = ["--generations", "2", "--population", "4", "--mutations", "1", "--crossovers", "1"]
    here = [str(run), *few, "--parents", "2", "--device", "cpu", "--workers", "0"]
    noah.main(here)
    said = capsys.readouterr().out
    found = json.loads((run / "subnet.json").read_text())
    assert len(found["trace"]) == 2 and found["trace"][0] <= found["trace"][1] == found["top1_val"]
    noah.main(here)
    assert "generation" not in capsys.readouterr().out, "the same search is found done"

    line = said.strip().splitlines()[-1]
    assert line.startswith("python train.py backbone=tiny_vit dataset=fake method=noah ")
    train.run(compose("train", [*told, *line.split(" ")[2:]]))
    (final,) = tmp_path.glob("fake/fake/noah-*")
    record = records.read(final / "record.json")
    assert record["tuned_params"] == found["params"]
    assert record["selected_from"] == [records.read(run / "record.json")["key"]]
    with pytest.raises(ValueError, match=r"final run of noah: .*noah_supernet with phase=grid"):
        noah.main([str(final), *here[1:]])


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("noah", {"rank": [1, 2, 3]}, r"rank=\[1, 2, 3\] must be a number, or one .* 2 blocks"),
        ("noah", {"rank": 65}, r"LoRA at blocks.0.attn.qkv: rank=65 must be at most 64"),
        ("noah", {"hidden": 65}, r"Adapter at blocks.0.mlp: hidden=65 must be at most 64"),
        ("noah", {"init": "zero"}, r"init='zero': there is normal_002, zero_up"),
        ("noah_supernet", {"choices": [0]}, r"choices=\[0\] must be sizes of 1 or more"),
    ],
)
def test_bad_sizes_are_named(method, values, message):
    with pytest.raises(ValueError, match=message):
        peft.create("tiny_vit", method, **TWO, **values)


def test_choices_above_what_the_supernet_has():
    _, around = supernet(rank=5)
    with pytest.raises(ValueError, match=r"10 of choices=\[1, 5, 10\] is above rank=5"):
        around.choose({kind: [10, 10] for kind in KINDS})
