"""What a layer is called, which layers a pass takes, and which weights it may rewrite."""

import pytest
import torch
from torch import nn

import graphopt as go
from graphopt.edit import Edit
from graphopt.passes import layer
from tests.passes.helpers import captured
from tests.passes.quantize.nets import capture, conv, data


def program():
    return capture(lambda m, x: m.head(m.stem(x)), 1, 3, 8, 8, stem=conv(3, 8), head=conv(8, 4))


def layers(net):
    return [node for node in net.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("taken", "exclude", "expected"),
    [
        (("*",), (), ["stem", "head"]),
        (("conv2d",), (), ["stem", "head"]),
        (("conv2d_1",), (), ["head"]),
        (("he*",), (), ["head"]),
        (("*",), ("stem",), ["head"]),
        (("linear",), (), []),
        ((), (), []),
    ],
)
def test_chosen_layers(taken, exclude, expected):
    found = [n for n in layers(program()) if layer.chosen(n, taken, exclude)]
    assert [layer.paths(node)[-1] for node in found] == expected


def test_a_layer_is_described_by_node_and_module():
    assert layer.describe(layers(program())[1]) == "node 'conv2d_1' (layer 'head')"


def weight(net, name="conv2d"):
    node = next(n for n in net.graph.nodes if n.name == name)
    return layer.constant_weight(Edit(net, "p"), node)


def test_a_plain_weight_is_returned_without_gradient():
    net = program()
    tensor = weight(net)
    assert tensor.shape == (8, 3, 3, 3)
    assert not tensor.requires_grad


def test_a_shared_weight_has_a_reason():
    block = conv(3, 3)
    net = capture(lambda m, x: m.a(m.a(x)), 1, 3, 8, 8, a=block)
    assert weight(net) == "its weight a.weight is shared by 2 layers"


def test_a_fake_quantized_weight_has_a_reason():
    net = program()
    net = go.passes.InsertFakeQuant(calibration=data(net))(net)
    reason = "its weight is fake-quantized; run this pass before quantization"
    assert weight(net) == reason


def test_a_masked_weight_has_a_reason():
    def body(x, w, w_mask):
        return torch.conv2d(x, w * w_mask)

    x = torch.randn(1, 3, 8, 8)
    parameter = nn.Parameter(torch.randn(4, 3, 3, 3))
    net = captured(body, x, w=parameter, w_mask=torch.ones(4, 3, 3, 3))
    assert weight(net) == "its weight is masked by pruning"


def test_a_computed_weight_has_a_reason():
    def body(x, w):
        return torch.conv2d(x, w.relu())

    x = torch.randn(1, 3, 8, 8)
    net = captured(body, x, w=nn.Parameter(torch.randn(4, 3, 3, 3)))
    assert weight(net) == "its weight is computed"
