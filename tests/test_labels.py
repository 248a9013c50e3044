"""The checkpoint's own head for a new task: which of its labels stand for which class, from the
votes to the command line."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import eval as evaluation
import peft
import train
from peft import record as records
from peft.config import compose
from peft.labels import match_labels, votes

HERE = ["device=cpu", "workers=0"]


def test_label_matching_by_hand():
    table = torch.tensor(
        [
            [9.0, 5.0, 0.0, 1.0],  # wants 0, ahead by 4
            [8.0, 1.0, 0.0, 0.0],  # wants 0, ahead by 7: gets it
            [
                0.0,
                6.0,
                2.0,
                2.0,
            ],  # wants 1, alone: gets it in the first round, before class 0 asks for it
        ]
    )
    assert match_labels(table) == [3, 0, 1]  # 1 is taken when class 0 moves on; 3 is its next
    assert match_labels(torch.tensor([[3.0, 3.0], [3.0, 3.0]])) == [0, 1]
    assert match_labels(torch.tensor([[2.0]])) == [0]
    with pytest.raises(ValueError, match="2 classes cannot be matched to 1 labels"):
        match_labels(torch.zeros(2, 1))


def test_votes_count_predictions():
    class Brightest(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)[:, :4]

    batches = [
        (torch.eye(4).view(4, 4, 1, 1), torch.tensor([0, 1, 1, 0])),
        (torch.eye(4)[:1].view(1, 4, 1, 1), torch.tensor([0])),
    ]
    assert votes(Brightest(), batches, 2).tolist() == [[2, 0, 0, 1], [0, 1, 1, 0]]


@pytest.fixture
def asked(tmp_path):
    """A run that keeps the head of 12 labels of a checkpoint file, frozen."""
    torch.manual_seed(5)
    net = peft.create("tiny_vit", num_classes=12, **{"backbone.model.depth": 2})
    nn.init.normal_(net.head.weight)
    file = tmp_path / "labelled.safetensors"
    save_file({name: t.contiguous() for name, t in net.state_dict().items()}, file)
    told = [
        *("backbone=tiny_vit", "backbone.model.depth=2", "dataset=fake", "image_size=32", *HERE),
        *(f"weights={file}", "backbone.head={classes:12,keep:auto}", "method=superlora"),
        *("method.rank=4", "method.trainable=[]", "backbone.pretrained=true", "optim.steps=3"),
        *("optim.batch_size=16", f"runs_dir={tmp_path}/runs"),
    ]
    return net.eval(), file, told


def test_keep_auto_from_the_command_line(asked, tmp_path, capsys):
    net, file, told = asked
    cfg = compose("train", told)
    loader = evaluation.loader_of(cfg, "train800val200", torch.device("cpu"), train=False)
    with torch.no_grad():  # 12 labels of the whole head, counted for each of the 4 classes
        pairs = [(net(images).argmax(1), labels) for images, labels in loader.epoch()]
    table = torch.zeros(4, 12)
    for answers, labels in pairs:
        for answer, label in zip(answers.tolist(), labels.tolist()):
            table[label, answer] += 1
    rows = match_labels(table)

    top1 = train.run(cfg)
    (folder,) = tmp_path.glob("runs/fake/fake/*")
    record = records.read(folder / "record.json")
    assert record["provenance"]["head_rows"] == rows and len(set(rows)) == 4
    assert record["config"]["backbone"]["head"] == {"classes": 12, "keep": "auto"}
    assert record["head_params"] == 0 and record["tuned_params"] > 0
    assert record["variant"] == "rank=4,trainable=[]"
    assert not any(name.startswith("head") for name in load_file(folder / "adapter.safetensors"))

    train.run(compose("train", told))
    assert "already done" in capsys.readouterr().out
    again = evaluation.run(compose("eval", [f"run={folder}", f"weights={file}", *HERE]))
    assert again == top1 and "reproduced" in capsys.readouterr().out

    _, restored = evaluation.restore(folder, compose("eval", [f"weights={file}", *HERE]))
    model = evaluation.model_of(restored, torch.device("cpu"))
    assert torch.equal(model.head.weight, net.head.weight[rows]), "the file's rows, in class order"
    assert not model.head.weight.requires_grad


def test_the_rows_follow_from_the_images_that_train(asked, monkeypatch):
    """A grid run votes with train800, never with the images it is scored on."""
    _, _, told = asked
    monkeypatch.setattr(evaluation, "_rows", {})
    seen, read = [], evaluation.loader_of
    monkeypatch.setattr(
        evaluation,
        "loader_of",
        lambda cfg, split, *a, **k: seen.append(split) or read(cfg, split, *a, **k),
    )
    for phase in ("grid", "final", "final"):
        evaluation.label_rows(compose("train", [*told, f"phase={phase}"]), torch.device("cpu"))
    assert seen == ["train800", "train800val200"], "and once a process"


def test_identity_tells_auto_from_a_list_and_needs_no_image(asked):
    _, _, told = asked
    keys = {
        records.key_of(records.portable(peft.config.plain(compose("train", [*told, *more]))))
        for more in ([], ["backbone.head.keep=[0,1,2,3]"], ["backbone.head.keep=[1,0,2,3]"])
    }
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["backbone.head.keep=[0,1,2]"],
            r"head.keep=\[0, 1, 2\] must name 4 different rows of 0..11",
        ),
        (["backbone.head.keep=own"], r"head.keep=own must name 4 .*takes auto"),
        (["dataset.num_classes=13"], r"13 classes cannot be matched to 12 labels"),
    ],
)
def test_bad_rows_are_named(asked, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        train.run(compose("train", [*asked[2], *more]))
    (failure,) = tmp_path.glob("runs/fake/fake/*/failure.json")
    assert json.loads(failure.read_text())["status"] == "failed"


def test_auto_needs_a_head_of_the_checkpoint(asked):
    with pytest.raises(ValueError, match=r"backbone.head.keep"):
        compose("train", ["backbone=vit_b16_in21k", "backbone.head.keep=auto"])
