import pytest
import torch

from fasthessian.study import weights
from fasthessian.study.networks import Network, Run

RUN = Run(Network(8), 0, 0.1)


def test_weights_and_buffers_come_back_in_the_default_format(tmp_path):
    path = tmp_path / "w.safetensors"
    model = RUN.network.make(3, 2).to(memory_format=torch.channels_last)
    model(torch.randn(4, 3, 8, 8))  # changes the statistics of batch normalisation
    weights.save(path, model, run=RUN, epoch=7)
    other = RUN.network.make(3, 2)
    weights.load(path, other)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    tensors, about = weights.read(path)
    assert about == {"run": RUN.name, "epoch": 7}
    assert all(tensor.is_contiguous() for tensor in tensors.values())


def test_the_same_weights_make_the_same_file(tmp_path):
    model = RUN.network.make(3, 2)
    texts = []
    for _ in range(2):
        weights.save(tmp_path / "w.safetensors", model, run=RUN, epoch=0)
        texts.append((tmp_path / "w.safetensors").read_bytes())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("network", "classes", "words"),
    [
        (Network(8, "no-bn"), 3, "it has stage1.0.bn1.bias"),
        (Network(14), 3, "it lacks stage1.1.bn1.bias"),
        (Network(8), 4, r"head.weight is \(3, 8\), not \(4, 8\)"),
    ],
)
def test_weights_of_another_network_are_refused_and_the_model_is_as_before(
    tmp_path, network, classes, words
):
    path = tmp_path / "w.safetensors"
    weights.save(path, RUN.network.make(3, 2), run=RUN, epoch=0)
    model = network.make(classes, 2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=words) as info:
        weights.load(path, model)
    assert "\n" not in str(info.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_damaged_or_missing_file_is_refused_in_one_line(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError):
        weights.load(path, RUN.network.make(3, 2))
    weights.save(path, RUN.network.make(3, 2), run=RUN, epoch=0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged") as info:
        weights.load(path, RUN.network.make(3, 2))
    assert "\n" not in str(info.value)
