"""Register bundles with transformers' Auto classes, without importing transformers.

Importing transformers takes seconds, so `import pal` does not do it. Instead, an import hook watches two of its
modules and registers `PalConfig` and `PalProcessor` as soon as these have been imported. The model class needs most of
transformers; it is registered when the first `PalConfig` is made, since no model is loaded without one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _add_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from pal.hf.config import PalConfig

    AutoConfig.register(PalConfig.model_type, PalConfig, exist_ok=True)


def _add_processor() -> None:
    from transformers.models.auto.processing_auto import AutoProcessor

    from pal.hf.config import PalConfig
    from pal.hf.processor import PalProcessor

    AutoProcessor.register(PalConfig, PalProcessor, exist_ok=True)


_AFTER: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _add_config,
    "transformers.models.auto.processing_auto": _add_processor,
}


def register_on_import() -> None:
    """Register with the modules of transformers that are imported already; with the others once they are."""
    for name, register in _AFTER.items():
        if name in sys.modules:
            register()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Import hook: lets the other finders find a watched module, and replaces its loader by a `_CallbackLoader`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _AFTER:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Finder) else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _CallbackLoader(spec.loader, _AFTER[fullname])
                return spec
        return None


class _CallbackLoader(Loader):
    """Loader that runs another loader, then a function."""

    def __init__(self, loader: Loader, after: Callable[[], None]) -> None:
        self.loader = loader
        self.after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # the module should look as if it had been loaded without the hook
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.after()
