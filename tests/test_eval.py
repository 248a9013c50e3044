"""A finished run's number again: reproduced, merged, exported, told apart by class."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from test_train import config, folder

import eval as evaluation
import peft
import train
from peft.config import compose


def test_eval_reproduces_merges_and_exports(tmp_path, capsys):
    top1 = train.run(config(tmp_path))
    here = [f"data_root={tmp_path}/data", "device=cpu", "workers=0"]
    again = evaluation.run(
        compose(
            "eval",
            [f"run={folder(tmp_path)}", "merged=true", f"export={tmp_path}/m.safetensors", *here],
        )
    )
    said = capsys.readouterr().out
    assert again == top1 and "reproduced" in said
    exported = load_file(tmp_path / "m.safetensors")
    bare = timm.create_model("test_vit", depth=6, mlp_ratio=4, dynamic_img_size=True, num_classes=4)
    bare.load_state_dict(exported)  # strict: exactly timm's keys
    x = torch.randn(4, 3, 32, 32)
    _, cfg = evaluation.restore(folder(tmp_path), compose("eval", here))
    model = evaluation.model_of(cfg, torch.device("cpu"))
    peft.load_adapter_state(model, load_file(folder(tmp_path) / "adapter.safetensors"))
    torch.testing.assert_close(bare.eval()(x), model.eval()(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"no run finished.*beside it"):
        evaluation.run(compose("eval", [f"run={folder(tmp_path)}x", *here]))


def test_eval_fails_where_the_number_does_not_hold(tmp_path):
    train.run(config(tmp_path))
    here = [f"run={folder(tmp_path)}", f"data_root={tmp_path}/data", "device=cpu", "workers=0"]
    for said in ("export=/proc/m.safetensors", "confusion=/proc/c.csv"):
        with pytest.raises(OSError, match=r"/proc/.* cannot be written there"):
            evaluation.run(compose("eval", [*here, said]))
    with pytest.raises(ValueError, match=r"export=m.pth should end in .safetensors"):
        evaluation.run(compose("eval", [*here, "export=m.pth"]))
    adapter = folder(tmp_path) / "adapter.safetensors"
    save_file({k: torch.full_like(v, v.numel()) for k, v in load_file(adapter).items()}, adapter)
    with pytest.raises(ArithmeticError, match=r"does not hold: .* where the record, of cpu, says"):
        evaluation.run(compose("eval", here))


def test_eval_tells_the_classes_apart(tmp_path, capsys):
    top1 = train.run(config(tmp_path, "method=full"))
    path = tmp_path / "new" / "confusion.csv"
    choice = ["per_class=true", f"confusion={path}", f"data_root={tmp_path}/data"]
    machine = [f"run={folder(tmp_path)}", "device=cpu", "workers=0"]
    evaluation.run(compose("eval", [*machine, *choice]))
    rows = [line.split(",") for line in path.read_text().split()]
    assert rows[0] == ["label", "0", "1", "2", "3"] and [r[0] for r in rows[1:]] == list("0123")
    table = torch.tensor([[int(x) for x in row[1:]] for row in rows[1:]])
    assert table.sum() == 32 and 100 * table.trace() / 32 == top1
    assert (table.sum(1) == 8).all(), "the fake classes have 8 test images each"
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("class  images"))
    for c in range(4):
        assert lines[start + 1 + c].split()[:3] == [str(c), "8", f"{100 * table[c, c] / 8:.2f}"]
    assert lines[start + 5] == f"mean over the classes {top1:.2f} %"
