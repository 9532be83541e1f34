"""Lets the trainer be imported on a bare image, for `gpu.py`: with torch, triton and numpy only.

A step of the trainer reads and writes no files and checks no configuration, so the packages that do are stood in for
where they are not installed: pydantic by plain dataclasses, others by names that do nothing. Import this before
anything of sparseclt.
"""

import dataclasses
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

PACKAGES = {
    "pydantic": ("pydantic.dataclasses", "pydantic_core"),
    "safetensors": ("safetensors.torch",),
    "huggingface_hub": ("huggingface_hub.utils", "huggingface_hub.errors"),
    "tqdm": ("tqdm.auto",),
}


class _Nothing(Exception):
    """Stands for any class or function."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        pass

    def __init_subclass__(cls, **keywords: Any) -> None:
        pass


class _Module(ModuleType):
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _dataclass if name == "dataclass" else _Nothing


def _dataclass(cls: type, *, frozen: bool, config: Any) -> type:
    return dataclasses.dataclass(frozen=frozen)(cls)


absent = [name for name in PACKAGES if find_spec(name) is None]
for package in absent:
    for module in (package, *PACKAGES[package]):
        sys.modules[module] = _Module(module)
