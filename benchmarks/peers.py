"""Other libraries' detectors, without what they pull in for other things."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any
from unittest.mock import MagicMock


def pytorch_ood() -> Any:
    """The module `pytorch_ood.detector`; its detectors do not use torchvision, so `--no-deps` is enough here."""
    _leave_out("torchvision")
    return importlib.import_module("pytorch_ood.detector")


def oodeel_mahalanobis() -> Any:
    """An unfitted `oodeel.methods.Mahalanobis` that computes by PyTorch; it uses faiss nowhere."""
    _leave_out("faiss")
    detector = importlib.import_module("oodeel.methods").Mahalanobis()
    detector.op = importlib.import_module("oodeel.utils").TorchOperator()
    return detector


def _leave_out(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        sys.meta_path.append(_Placeholder(package))


class _Placeholder(MetaPathFinder, Loader):
    """Lets `import PACKAGE...` pass; whatever is taken from it does nothing."""

    def __init__(self, package: str) -> None:
        self._package = package

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == self._package else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        pass
