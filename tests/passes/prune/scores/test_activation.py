"""``E|a|`` and the share of non-zeros, behind the activation function."""

import pytest
import torch
from torch import nn

from graphopt.errors import CalibrationError, PassError
from graphopt.passes.prune import Activation, Filter
from tests.passes.prune.support import capture, scores_of, seeded, small_cnn

X = [torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]


def expected(kept):
    """``kept(a)`` averaged over samples and positions, from the eager network."""
    model = small_cnn().eval()
    with torch.no_grad():
        first = torch.cat([model[:3](x) for x in X])
        second = torch.cat([model[:6](x) for x in X])
        last = torch.cat([model(x) for x in X])
    found = [kept(a).float().transpose(0, 1).flatten(1).mean(1) for a in (first, second)]
    return [*found, kept(last).float().mean(0)]


@pytest.mark.parametrize(
    ("statistic", "kept"), [("mean-abs", torch.abs), ("apoz", lambda a: a != 0)]
)
def test_filters(statistic, kept):
    program = capture(small_cnn(), 2, 3, 8, 8)
    scores = scores_of(Activation(statistic), program, Filter(), calibration=X)
    for score, value in zip(scores, expected(kept), strict=True):
        torch.testing.assert_close(score.flatten(), value, rtol=1e-4, atol=1e-6)


def test_labelled_data_will_do():
    program = capture(small_cnn(), 2, 3, 8, 8)
    first = scores_of(Activation(), program, Filter(), calibration=X)
    data = [(x, torch.zeros(2)) for x in X]
    second = scores_of(Activation(), program, Filter(), data=data)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_layer_run_twice_is_averaged():
    layer = seeded(lambda: nn.Linear(4, 4))

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    program = capture(Twice(), 3, 4)
    (x,) = program.example_inputs
    (scores,) = scores_of(Activation(), program, Filter(), calibration=[x])
    with torch.no_grad():
        middle = torch.relu(layer(x))
        value = torch.cat([middle, layer(middle).abs()]).mean(0)
    torch.testing.assert_close(scores.flatten(), value)


def test_without_data():
    program = capture(small_cnn(), 2, 3, 8, 8)
    with pytest.raises(CalibrationError) as caught:
        scores_of(Activation(), program)
    assert str(caught.value) == (
        "prune needs calibration data: pass calibration=batches, an iterable of input batches"
    )


def test_options_are_checked():
    with pytest.raises(PassError) as caught:
        Activation("max")  # type: ignore[arg-type]  # the mistake
    assert str(caught.value) == "score activation: statistic must be mean-abs or apoz, not 'max'"
