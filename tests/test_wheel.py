"""The wheel and the sdist hold everything, and the wheel runs where there is no checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent.parent
_MODEL = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 4))
"""


def _build(kind: str, folder: Path) -> Path:
    """Call the build backend's own hook (PEP 517), without isolation: nothing is downloaded."""
    code = (
        "import sys; from setuptools import build_meta; "
        f"print(build_meta.build_{kind}(sys.argv[1]), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=_copy(folder / f"{kind}_source"),
        check=True,
        capture_output=True,
        text=True,
    )
    return folder / done.stderr.strip().splitlines()[-1]


def _copy(folder: Path) -> Path:
    """The files of the checkout that are not ignored, links as links; builds write into their source."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=_ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        source, target = _ROOT / name, folder / name
        if not source.exists():
            continue  # deleted and not yet committed
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("wheel", tmp_path_factory.mktemp("wheel"))


def _sources() -> set[str]:
    """The Python files of the package as ``graphopt/...``, behind the two links too."""
    folders = {"graphopt": "graphopt", "passes": "graphopt/passes", "backends": "graphopt/backends"}
    return {
        f"{inside}/{path.relative_to(_ROOT / folder).as_posix()}"
        for folder, inside in folders.items()
        for path in (_ROOT / folder).rglob("*.py")
    }


def test_wheel_holds_every_module_of_ours_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "graphopt/py.typed" in names
    held = {name for name in names if name.endswith(".py")}
    assert {name for name in held if not name.startswith("graphopt/")} == set()
    assert held == _sources()
    templates = (_ROOT / "graphopt" / "export" / "templates").iterdir()
    assert {f"graphopt/export/templates/{path.name}" for path in templates} <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_sdist_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    sdist = _build("sdist", tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    out = tmp_path / "out"
    out.mkdir()
    subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=source, check=True, capture_output=True
    )
    (again,) = out.iterdir()
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        modules = [name for name in first.namelist() if name.endswith(".py")]
        assert [name for name in second.namelist() if name.endswith(".py")] == modules
        assert all(first.read(name) == second.read(name) for name in modules)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are those of the test's environment."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    pip = (sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"))
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    # Appended after the wheel's own folder; the editable install is a .pth file there, and those do not nest.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def _run(installed: Path, folder: Path, program: str, *arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(installed / "bin" / program), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import graphopt.passes, graphopt.backends; print(graphopt.__file__, graphopt.passes.__file__)"
    for path in _run(installed, tmp_path, "python", "-c", code).split():
        assert installed in Path(path).parents


def test_passes_of_the_user_do_not_shadow_ours(installed: Path, tmp_path: Path) -> None:
    for name in ("passes", "backends"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('shadowed')\n")
    assert "fold-batch-norm" in _run(installed, tmp_path, "graphopt", "passes")


def test_compile_and_run_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "wheel_nets.py").write_text(_MODEL)
    code = (
        "import numpy as np, torch, wheel_nets\n"
        "x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "np.save('x.npy', x.numpy()); np.save('want.npy', wheel_nets.tiny()(x).detach().numpy())\n"
    )
    _run(installed, tmp_path, "python", "-c", code)
    shape = ("--input-shape", "1x3x8x8", "--threads", "1")
    _run(installed, tmp_path, "graphopt", "compile", "wheel_nets:tiny", *shape, "-o", "tiny.gopt")
    _run(installed, tmp_path, "graphopt", "run", "tiny.gopt", "--input", "x.npy", "-o", "y.npy")
    import numpy as np

    got, want = np.load(tmp_path / "y.npy"), np.load(tmp_path / "want.npy")
    # Sums of at most 512 float32 products in another order: 512 * 2^-24 relative to values of about 1.
    assert np.abs(got - want).max() <= 3e-5 * max(1.0, np.abs(want).max())
