"""Beside a torch for the CPU, torchvision's wheel (built for CUDA) cannot load its operators, and its import fails.

With it fails every vision model and every processor of transformers, which only want torchvision's pixel transforms:
plain torch code. So the operators that torchvision expects are declared before its first import where they cannot be
loaded. A declared operator has no kernel: whoever calls one (none of our families does) gets torch's own error.
"""

from __future__ import annotations

import logging
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

logger = logging.getLogger(__name__)

# Those that torchvision looks up while it is imported.
OPERATORS = ("nms", "qnms", "roi_align", "ps_roi_align", "roi_pool", "ps_roi_pool", "deform_conv2d")


def declare_missing_operators(folder: Path) -> bool:
    """Declare torchvision's operators unless its own library loads.

    Args:
        folder: torchvision's package folder.

    Returns:
        Whether they had to be declared.
    """
    import torch

    try:
        for library in folder.glob("_C.*"):
            torch.ops.load_library(str(library))
            return False
        reason = "it has none"
    except OSError as err:
        reason = str(err)
    logger.info("torchvision's operators cannot be loaded here (%s); its transforms work without them.", reason)
    declarations = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            declarations.define(f"{name}(Tensor input) -> Tensor")
    _KEPT.append(declarations)
    return True


_KEPT: list = []  # a declaration lives as long as its library object


class _BeforeTorchvision(MetaPathFinder):
    """Runs `declare_missing_operators` when torchvision is really imported; asking whether it is there does nothing."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            folder, execute = Path(spec.origin).parent, spec.loader.exec_module

            def declare_and_execute(module: ModuleType) -> None:
                declare_missing_operators(folder)
                execute(module)

            spec.loader.exec_module = declare_and_execute
        return spec


def watch_import() -> None:
    """See to it that torchvision can be imported from now on, once per process and without importing anything."""
    if not any(isinstance(finder, _BeforeTorchvision) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
