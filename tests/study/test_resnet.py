import pytest
import torch

from fasthessian.study.resnet import resnet


def count(model):
    return sum(p.numel() for p in model.parameters()), len(list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "parameters", "tensors"),
    [
        ({}, 272_474, 65),
        ({"batch_norm": False}, 270_906, 23),
        ({"residual": False}, 269_722, 59),
        ({"depth": 32}, 466_906, 101),
        ({"depth": 38}, 564_122, 119),
        ({"depth": 56}, 855_770, 173),
        ({"num_classes": 100}, 272_474 + 90 * 65, 65),
    ],
)
def test_sizes_are_those_of_pyhessian(options, parameters, tensors):
    assert count(resnet(**options)) == (parameters, tensors)


def test_a_part_left_out_of_a_stage_changes_that_stage_alone():
    full = dict(resnet().named_parameters())
    without_bn = dict(resnet(no_bn_stages=(2,)).named_parameters())
    gone = set(full) - set(without_bn)
    assert gone and all(name.startswith("stage2.") and "stem" not in name for name in gone)
    assert sum(full[name].numel() for name in gone) == 6 * 2 * 32 + 2 * 32
    without_res = dict(resnet(no_res_stages=[3]).named_parameters())
    gone = set(full) - set(without_res)
    assert sorted(gone) == [f"stage3.0.shortcut.{x}" for x in ("0.weight", "1.bias", "1.weight")]
    # stage 1 has no parameters in its shortcuts, but its function changes
    torch.manual_seed(0)
    a, b = resnet(8), resnet(8, no_res_stages=(1,))
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert not torch.allclose(a.eval()(x), b.eval()(x))


def test_all_stages_together_are_the_whole_except_the_stem():
    assert count(resnet(no_res_stages=(1, 2, 3))) == count(resnet(residual=False))
    stem_norm = 2 * 16
    assert count(resnet(no_bn_stages=(1, 2, 3)))[0] == 270_906 + stem_norm


def test_shapes_and_receptive_stages():
    model = resnet(8, num_classes=7, width=4)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    x = model.stage2(model.stage1(torch.randn(2, 4, 32, 32)))
    assert x.shape == (2, 8, 16, 16)
    assert model.stage3(x).shape == (2, 16, 8, 8)


def test_shortcut_is_added_before_the_last_activation():
    block = resnet(8).stage1[0].eval()
    x = torch.randn(2, 16, 5, 5)
    y = block.bn2(block.conv2(torch.relu(block.bn1(block.conv1(x)))))
    assert torch.equal(block(x), torch.relu(y + x))


def test_the_seed_decides_the_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(resnet(8))
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": 21}, "depth=21 is not 6 m"),
        ({"depth": 2}, "depth=2"),
        ({"depth": 20.0}, "depth=20.0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"width": -1}, "width=-1"),
        ({"no_bn_stages": (4,)}, r"no_bn_stages=\(4,\)"),
        ({"no_res_stages": 1}, "no_res_stages=1"),
        ({"no_bn_stages": "12"}, "no_bn_stages='12'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as info:
        resnet(**options)
    assert "\n" not in str(info.value)
