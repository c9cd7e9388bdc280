"""``program.train()`` and ``program.eval()``: flags rewritten, statistics updated, and the same learning as eager."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt as go
from graphopt.errors import CompileError
from graphopt.modes import is_training
from graphopt.program import Program
from tests.models import example, randomize
from tests.passes.helpers import Calls, captured, operators

X = example(4, 3, 6, 6)


class Net(nn.Module):
    """Convolutions, batch norms, dropouts of three kinds, and an in-place activation, which capture has to undo."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.second, self.instance = (
            nn.Conv2d(8, 8, 1),
            nn.InstanceNorm2d(8, track_running_stats=True),
        )
        self.drop, self.channels, self.last = (
            nn.Dropout(0.3),
            nn.Dropout2d(0.2),
            nn.AlphaDropout(0.1),
        )
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)), inplace=True)
        y = self.channels(self.instance(self.second(self.drop(y))))
        result: Tensor = self.fc(self.last(y.mean((2, 3))))
        return result


def seeded(module: Callable[[Tensor], Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return module(X)


def test_switching_gives_what_eager_gives_in_both_modes() -> None:
    model = randomize(Net())
    program = go.capture(copy.deepcopy(model), (X,))
    assert not program.training
    assert not is_training(program.graph)
    for mode in (True, False, True, True, False):
        assert program.train(mode) is program
        assert program.training is is_training(program.graph) is mode
        model.train(mode)
        assert torch.equal(seeded(program), seeded(model))


def test_a_model_captured_in_training_mode_evaluates() -> None:
    model = randomize(Net()).train()
    program = go.capture(copy.deepcopy(model), (X,))
    assert program.training
    assert torch.equal(seeded(program), seeded(model))
    assert torch.equal(program.eval()(X), model.eval()(X))


def test_running_statistics_move_in_training_only() -> None:
    model = randomize(Net())
    program = go.capture(copy.deepcopy(model), (X,))
    before = program.graph_module.get_buffer("norm.running_var").clone()
    program(X)
    assert torch.equal(program.graph_module.get_buffer("norm.running_var"), before)
    seeded(program.train())
    seeded(model.train())
    for name in ("norm.running_mean", "norm.running_var", "instance.running_mean"):
        assert torch.equal(program.graph_module.get_buffer(name), model.get_buffer(name))


def test_the_module_switches_itself_as_loops_of_others_do() -> None:
    module = go.capture(randomize(Net()), (X,)).graph_module
    assert not torch.equal(seeded(module.train(), 0), seeded(module, 1))
    assert torch.equal(seeded(module.eval(), 0), seeded(module, 1))
    assert torch.equal(seeded(copy.deepcopy(module).train()), seeded(module.train()))


def test_a_program_made_by_a_pass_keeps_its_mode_and_is_switched_alone() -> None:
    program = go.capture(randomize(Net()), (X,)).train()
    cleaned = go.passes.RemoveDeadCode()(program)
    assert cleaned.training
    cleaned.eval()
    assert program.training
    assert is_training(program.graph)
    assert go.passes.RemoveIdentities()(cleaned).graph_module.training is False


def test_a_switched_program_is_still_well_formed() -> None:
    program = go.capture(randomize(Net()), (X,))
    code = program.graph_module.code
    assert operators(program.train().eval()).count("dropout") == 3
    assert program.graph_module.code == code
    assert "dropout" not in operators(go.passes.RemoveIdentities()(program))


def test_attention_keeps_its_rate_where_it_was_captured_with_one() -> None:
    attention = nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True).train()
    tokens = example(2, 5, 8)
    program = captured(
        lambda x, layer: layer(x, x, x, need_weights=False)[0], tokens, layer=attention
    )
    attention.train()
    trained = go.capture(
        Calls(lambda x, layer: layer(x, x, x, need_weights=False)[0], layer=attention).train(),
        (tokens,),
    )
    assert not is_training(
        program.train().graph
    )  # captured in evaluation: the rate is not in the graph
    assert is_training(trained.graph)
    with torch.no_grad():
        assert torch.equal(trained.eval()(tokens), program(tokens))
        torch.manual_seed(0)
        random = trained.train()(tokens)
        torch.manual_seed(0)
        assert torch.equal(random, attention(tokens, tokens, tokens, need_weights=False)[0])


def test_recurrent_layers_switch() -> None:
    lstm = nn.LSTM(4, 6, num_layers=2, dropout=0.5, batch_first=True)
    program = captured(lambda x, layer: layer(x)[0], example(2, 5, 4), layer=lstm).train()
    lstm.train()
    torch.manual_seed(3)
    want = lstm(example(2, 5, 4))[0]
    torch.manual_seed(3)
    assert torch.equal(program(example(2, 5, 4)), want)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3)]
)
def test_a_norm_without_statistics_is_the_same_in_both_modes(norm: nn.Module) -> None:
    program = go.capture(norm.eval(), (X,))
    assert not program.training
    assert torch.equal(program.train()(X), norm(X))
    assert torch.equal(program.eval()(X), norm(X))


def test_batch_norm_and_dropout_survive_writes_to_slices() -> None:
    def function(x: Tensor, norm: nn.Module, drop: nn.Module) -> Tensor:
        y: Tensor = x * 1
        y[:, 0].zero_()
        return drop(norm(y))  # type: ignore[no-any-return]

    for training in (False, True):
        parts = {"norm": randomize(nn.BatchNorm2d(3)), "drop": nn.Dropout(0.5)}
        model = Calls(function, **parts).train(training)
        program = go.capture(copy.deepcopy(model), (X,))
        assert operators(program)[-2:] == ["batch_norm", "dropout"]
        for mode in (not training, training):
            assert torch.equal(seeded(program.train(mode)), seeded(model.train(mode)))
        assert set(dict(program.graph_module.named_buffers())) == {
            "norm.running_mean",
            "norm.running_var",
        }
        held = program.graph_module.get_buffer("norm.running_mean")
        assert torch.equal(held, model.get_buffer("norm.running_mean"))


def test_a_copy_has_tensors_of_its_own_and_keeps_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.b(self.a(x))
            return result

    program = go.capture(Tied(), (example(2, 4),))
    own: Program = program.copy()
    (parameter,) = own.graph_module.parameters()
    (original,) = program.graph_module.parameters()
    assert parameter is not original
    with torch.no_grad():
        parameter.zero_()
        assert not own(example(2, 4)).any()
        assert program(example(2, 4)).any()


def test_compile_refuses_training_mode() -> None:
    program = go.capture(randomize(Net()), (X,)).train()
    message = "the program is in training mode; call program.eval() before compile"
    with pytest.raises(CompileError, match=f"^{re.escape(message)}$"):
        go.compile(program)
