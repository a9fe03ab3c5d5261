"""Look inside Llama 4: which expert takes each token, and how sure the router is.

Names and modules resolve when they are first used, so ``import probe`` loads neither torch nor plotly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probe.attention_recording import AttentionSpec
    from probe.corpus import read_corpus
    from probe.dispatch import set_expert_dispatch
    from probe.hooks import Recorder, RoutingSpec, record
    from probe.models import LoadedModel, load
    from probe.report import write_report
    from probe.schema import ProbeError, SchemaError
    from probe.store import open, save
    from probe.widgets import explore

__version__ = "0.1.0"

__all__ = [
    "AttentionSpec",
    "LoadedModel",
    "ProbeError",
    "Recorder",
    "RoutingSpec",
    "SchemaError",
    "__version__",
    "explore",
    "load",
    "open",
    "read_corpus",
    "record",
    "save",
    "set_expert_dispatch",
    "write_report",
]

_HOMES = {
    "AttentionSpec": "attention_recording",
    "LoadedModel": "models",
    "ProbeError": "schema",
    "Recorder": "hooks",
    "RoutingSpec": "hooks",
    "SchemaError": "schema",
    "explore": "widgets",
    "load": "models",
    "open": "store",
    "read_corpus": "corpus",
    "record": "hooks",
    "save": "store",
    "set_expert_dispatch": "dispatch",
    "write_report": "report",
}
"""The module that each public name lives in."""

if not TYPE_CHECKING:  # a type checker reads the imports above, and should complain about any other name

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            value = getattr(import_module(f"probe.{_HOMES[name]}"), name)
            globals()[name] = value
            return value
        try:
            return import_module(f"probe.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"probe.{name}":
                raise
            raise AttributeError(f"module 'probe' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    from pkgutil import iter_modules

    modules = (module.name for module in iter_modules(__path__) if not module.name.startswith("_"))
    return sorted({*globals(), *__all__, *modules})
