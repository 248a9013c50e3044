"""VPT beside its references, on ViT and Swin."""

import numpy as np
import pytest
import torch
from conftest import tiny
from reference import prompt
from test_reference_adapters import D, array, close, moved, values, vit_block
from timm.models.swin_transformer import SwinTransformerBlock, SwinTransformerStage
from torch import nn

import peft
from peft.prompt import Prompts, SwinPrompts


def weights_of(block: nn.Module) -> dict[str, np.ndarray]:
    return {name: array(tensor) for name, tensor in block.named_parameters()}


def test_vpt_shallow():
    blocks = nn.Sequential(vit_block(), vit_block())
    tuner, x = moved(Prompts(blocks, num_prompts=3)), values(2, 1 + 4, D)
    weights = [weights_of(block) for block in tuner.base]
    eps = blocks[0].norm1.eps
    close(
        tuner(x),
        np.stack(
            [prompt.shallow(each, array(tuner.prompts), weights, 2, eps) for each in array(x)]
        ),
    )


def test_vpt_deep():
    tuners, x = [moved(Prompts(vit_block(), num_prompts=p)) for p in (3, 2)], values(2, 1 + 4, D)
    own, weights = [array(t.prompts) for t in tuners], [weights_of(t.base) for t in tuners]
    eps = tuners[0].base.norm1.eps
    close(
        tuners[1](tuners[0](x)),
        np.stack([prompt.deep(each, own, weights, 2, eps) for each in array(x)]),
    )


def test_vpt_by_hand():
    # Norms with eps = 0 send (2, 0) to (1, -1) and the prompt (0, 2) to (-1, 1). q = k = 0, so the
    # attention is the mean of the values, here the normed tokens: class (1, -1), prompt (-1, 1),
    # patch (1, -1): (1/3, -1/3) on top. The MLP is zero.
    zero = np.zeros
    w = {
        f"norm{i}.{name}": value
        for i in (1, 2)
        for name, value in (("weight", np.ones(2)), ("bias", zero(2)))
    }
    w |= {
        "attn.qkv.weight": np.concatenate([zero((4, 2)), np.eye(2)]),
        "attn.qkv.bias": zero(6),
        "attn.proj.weight": np.eye(2),
        "attn.proj.bias": zero(2),
    }
    w |= {
        "mlp.fc1.weight": zero((1, 2)),
        "mlp.fc1.bias": zero(1),
        "mlp.fc2.weight": zero((2, 1)),
        "mlp.fc2.bias": zero(2),
    }
    out = prompt.shallow(np.array([[2.0, 0], [2, 0]]), np.array([[0.0, 2]]), [w], 1, 0.0)
    np.testing.assert_allclose(out, [[7 / 3, -1 / 3]] * 2, atol=1e-12)


@pytest.mark.parametrize("shift", [0, 1])
def test_vpt_in_a_swin_block(shift):
    block = moved(SwinTransformerBlock(D, (4, 4), num_heads=2, window_size=2, shift_size=shift))
    tuner, x = moved(SwinPrompts(block, num_prompts=3)), values(2, 4, 4, D)
    args = (
        array(tuner.prompts),
        weights_of(block),
        2,
        block.norm1.eps,
        2,
        shift,
        array(block.attn.relative_position_bias_table),
    )
    close(tuner(x), np.stack([prompt.swin_block(each, *args)[0] for each in array(x)]))


def test_swins_prompts_start_alike_in_every_stage():
    """sqrt(6 / (3 * 4 * 4 + d)), d the embedding's width, whatever the stage's."""
    model = tiny("tiny_swin", "vpt_deep", num_prompts=50)
    tuners = peft.tuners(model)
    first = next(iter(tuners.values())).prompts.shape[1]
    bound = (6 / (48 + first)) ** 0.5
    widths = {t.prompts.shape[1] for t in tuners.values()}
    assert len(widths) > 1
    for tuner in tuners.values():
        assert 0.98 * bound < tuner.prompts.abs().max() <= bound


def test_vpt_shallow_through_swins_stages():
    """Two stages with a patch merging between: the prompts live on, one set per image."""
    first = SwinTransformerStage(D, D, (4, 4), 2, downsample=False, num_heads=2, window_size=2)
    second = SwinTransformerStage(D, 2 * D, (4, 4), 1, downsample=True, num_heads=2, window_size=2)
    tuner, x = moved(SwinPrompts(nn.Sequential(first, second), num_prompts=3)), values(2, 4, 4, D)
    merge, expected = second.downsample, []
    for image in x:
        state, prompts = array(image), array(tuner.prompts)
        for stage in (first, second):
            if stage is second:
                state = array(merge(torch.from_numpy(state)[None])[0])
                prompts = prompt.swin_merge(
                    prompts,
                    array(merge.norm.weight),
                    array(merge.norm.bias),
                    array(merge.reduction.weight),
                    merge.norm.eps,
                )
            for block in stage.blocks:
                table = array(block.attn.relative_position_bias_table)
                state, prompts = prompt.swin_block(
                    state,
                    prompts,
                    weights_of(block),
                    2,
                    block.norm1.eps,
                    block.window_size[0],
                    block.shift_size[0],
                    table,
                )
        expected.append(state)
    close(tuner(x), np.stack(expected))
    torch.testing.assert_close(tuner(x)[:1], tuner(x[:1]))  # images of a batch do not meet
