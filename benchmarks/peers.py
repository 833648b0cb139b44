"""pytorch-ood's detectors, without what it pulls in for its data sets."""

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
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.append(_Placeholder())
    return importlib.import_module("pytorch_ood.detector")


class _Placeholder(MetaPathFinder, Loader):
    """Lets `import torchvision...` pass; whatever is taken from it does nothing."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> Any:
        return MagicMock(name=spec.name)

    def exec_module(self, module: Any) -> None:
        pass
