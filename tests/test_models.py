"""Models by name, and programs saved and read back."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphopt.errors import CaptureError, InputError
from graphopt.frontend import capture
from graphopt.models import (
    InputSpec,
    example_inputs,
    factory,
    load_model,
    read_program,
    save_program,
)
from graphopt.passes import Quantize
from graphopt.program import LayerChange, Record

_numbers = itertools.count()
_SPECS = (InputSpec((1, 4)),)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x))


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, of a name not yet imported."""
    monkeypatch.chdir(tmp_path)
    name = f"module_of_test_{next(_numbers)}"
    (tmp_path / f"{name}.py").write_text(
        "from tests.test_models import Net\nclass Space:\n    net = Net\nconstant = 3\n"
    )
    return name


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", InputSpec((1, 3, 224, 224))),
        ("1X128:int64", InputSpec((1, 128), torch.int64)),
        ("7", InputSpec((7,))),
    ],
)
def test_input_spec(text: str, spec: InputSpec) -> None:
    assert InputSpec.parse(text) == spec


@pytest.mark.parametrize("text", ["", "x", "1x0", "1x-2", "1x3:float99", "1x3:nn", "1,3"])
def test_input_spec_that_is_none(text: str) -> None:
    with pytest.raises(InputError) as caught:
        InputSpec.parse(text)
    assert str(caught.value) == (
        f"input shape {text!r} must look like 1x3x224x224 or, with a dtype, 1x128:int64"
    )


def test_example_inputs_are_the_same_at_every_call() -> None:
    specs = [InputSpec((2, 3)), InputSpec((4,), torch.int64)]
    first, second = example_inputs(specs), example_inputs(specs)
    assert torch.equal(first[0], second[0])
    assert first[0].std() > 0
    assert torch.equal(first[1], torch.ones(4, dtype=torch.int64))


def test_factory_in_the_current_folder(module_name: str) -> None:
    assert factory(f"{module_name}:Net") is Net
    assert factory(f"{module_name}:Space.net") is Net


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("json", "'json' must look like package.module:factory"),
        ("json:", "'json:' must look like package.module:factory"),
        ("json:absent", "'json:absent': json has no 'absent'"),
        ("{module}:constant", "'{module}:constant' is no function or class, but int"),
        ("no_such_module:x", "'no_such_module:x': no module named 'no_such_module' in {cwd} or installed"),
    ],
)  # fmt: skip
def test_factory_that_is_none(module_name: str, reference: str, message: str) -> None:
    reference = reference.format(module=module_name)
    with pytest.raises(InputError) as caught:
        factory(reference)
    assert str(caught.value) == message.format(module=module_name, cwd=Path.cwd())


def test_model_is_in_eval_mode(module_name: str) -> None:
    model = load_model(f"{module_name}:Net")
    assert isinstance(model, Net)
    assert not model.training


def test_weights_fill_the_model(module_name: str, tmp_path: Path) -> None:
    state = {"fc.weight": torch.full((2, 4), 0.5), "fc.bias": torch.tensor([1.0, -2.0])}
    save_file(state, tmp_path / "w.safetensors")
    model = load_model(f"{module_name}:Net", weights="w.safetensors")
    assert isinstance(model, Net)
    assert torch.equal(model.fc.bias, state["fc.bias"])


def test_weights_that_do_not_fit(module_name: str, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.zeros(3, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(InputError, match=r"^w\.safetensors does not fit the model of .*fc\.bias"):
        load_model(f"{module_name}:Net", weights="w.safetensors")


def test_weights_that_are_damaged(module_name: str, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(InputError, match=r"^w\.safetensors is no valid safetensors file: "):
        load_model(f"{module_name}:Net", weights="w.safetensors")


def test_weights_alone_are_no_model() -> None:
    with pytest.raises(InputError, match=r"name the model as package\.module:factory"):
        load_model("w.safetensors")


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickle_is_not_opened_without_trust(tmp_path: Path) -> None:
    path, mark = tmp_path / "model.pt", tmp_path / "mark"
    torch.save(Bomb(mark), path)
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    assert str(caught.value) == (
        f"{path} can run code when it is read; add --trust (trust=True) if you know where it comes from"
    )
    assert not mark.exists()
    with pytest.raises(InputError, match=r"gives NoneType, not a torch\.nn\.Module"):
        load_model(str(path), trust=True)
    assert mark.exists()


def test_pickled_module_with_trust(tmp_path: Path) -> None:
    model = Net()
    torch.save(model, tmp_path / "model.pt")
    loaded = load_model(str(tmp_path / "model.pt"), trust=True)
    assert isinstance(loaded, Net)
    assert torch.equal(loaded.fc.weight, model.fc.weight)


def test_pickled_weights_need_trust(module_name: str, tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="can run code"):
        load_model(f"{module_name}:Net", weights="w.pth")
    assert isinstance(load_model(f"{module_name}:Net", weights="w.pth", trust=True), Net)


def test_program_survives_the_file(tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    record = Record(
        "a-pass", {"bits": 8}, "lossy", 3, (("relu", "why"),), (10, 8), (7, 6), 0.5, 1.25, ("n",),
        (LayerChange("linear", "fc", (8, 6), (8, 6), 0.25, "rank 1"),),
    )  # fmt: skip
    program = capture(Net().eval(), (x,), dynamic_batch=(1, 8)).with_record(record)
    save_program(program, tmp_path / "p.pt2")
    again = read_program(str(tmp_path / "p.pt2"), trust=True)
    assert again.history == program.history
    assert again.dynamic_batch == (1, 8)
    wide = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(wide), program(wide))
    assert [p.name for p in tmp_path.iterdir()] == ["p.pt2"]


@pytest.mark.parametrize("per_channel", [True, False])
def test_quantized_program_of_an_open_batch_survives_the_file(
    tmp_path: Path, per_channel: bool
) -> None:
    program = capture(Net().eval(), (torch.ones(2, 4),), dynamic_batch=(1, 8))
    data = [torch.randn(2, 4, generator=torch.Generator().manual_seed(0))]
    quantized = Quantize(calibration=data, per_channel=per_channel)(program)
    save_program(quantized, tmp_path / "p.pt2")
    again = read_program(str(tmp_path / "p.pt2"), trust=True)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again(x), quantized(x))
    assert again.dynamic_batch == (1, 8)


def test_file_of_plain_torch_is_read(tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    torch.export.save(torch.export.export(Net().eval(), (x,)), tmp_path / "p.pt2")
    program = read_program(str(tmp_path / "p.pt2"), trust=True)
    assert program.dynamic_batch is None
    assert program(x).shape == (2, 2)


def test_saved_program_brings_its_own_shapes(tmp_path: Path) -> None:
    path = str(tmp_path / "p.pt2")
    save_program(capture(Net().eval(), (torch.ones(2, 4),)), path)
    with pytest.raises(InputError, match="leave out --input-shape and --dynamic-batch"):
        read_program(path, _SPECS, trust=True)
    with pytest.raises(InputError, match="holds its own weights"):
        read_program(path, weights="w.safetensors", trust=True)


def test_module_needs_shapes(module_name: str) -> None:
    with pytest.raises(InputError, match="needs the shape of each input"):
        read_program(f"{module_name}:Net")
    assert read_program(f"{module_name}:Net", _SPECS)(torch.ones(1, 4)).shape == (1, 2)


def test_interrupt_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(Net().eval(), (torch.ones(2, 4),))

    def half(_exported: object, file, **_options: object) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.export, "save", half)
    with pytest.raises(KeyboardInterrupt):
        save_program(program, tmp_path / "p.pt2")
    assert list(tmp_path.iterdir()) == []


def test_export_that_fails_is_a_capture_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = capture(Net().eval(), (torch.ones(2, 4),))

    def fail(*_arguments: object, **_options: object) -> None:
        raise RuntimeError("first line\nsecond")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(CaptureError) as caught:
        save_program(program, tmp_path / "p.pt2")
    assert (
        str(caught.value) == f"the program cannot be exported to {tmp_path / 'p.pt2'}: first line"
    )
    assert list(tmp_path.iterdir()) == []
