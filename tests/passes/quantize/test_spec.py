"""Options that do not hold are refused, with what to do."""

import pytest

from graphopt.errors import QuantizeError
from graphopt.passes.quantize import ActivationSpec, QuantizationSpec, WeightSpec


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ActivationSpec(bits=9), "activations can be quantized to 2 to 8 bits, not 9"),
        (lambda: WeightSpec(bits=1), "weights can be quantized to 2 to 8 bits, not 1"),
        (lambda: WeightSpec(observer="kl"), "weight observer 'kl' is none of minmax, mse"),
        (
            lambda: QuantizationSpec(shared=(*QuantizationSpec().shared, "add")),
            "operator 'add' cannot share its input's parameters; only avg_pool2d, "
            "adaptive_avg_pool2d, mean may be added to those that only move elements",
        ),
        (
            lambda: QuantizationSpec(shared=()),
            "operator 'max_pool2d' only moves elements and must stay in `shared`; "
            "take it out of `ops` to keep it in float",
        ),
    ],
)
def test_invalid_specs(make, message):
    with pytest.raises(QuantizeError) as error:
        make()
    assert str(error.value) == message


def test_an_operator_without_integer_form_is_named():
    with pytest.raises(QuantizeError) as error:
        QuantizationSpec(ops=("softmax",))
    start = "operator 'softmax' has no integer form; choose from conv1d, "
    assert str(error.value).startswith(start)


def test_ranges_of_the_integers():
    assert (ActivationSpec(bits=4).qmin, ActivationSpec(bits=4).qmax) == (0, 15)
    assert (WeightSpec().qmin, WeightSpec().qmax) == (-127, 127)
