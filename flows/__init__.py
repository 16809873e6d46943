"""What people run: the flow, its command line, the parts for a flow of your own, and the form of NeMo Curator."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flows.home import provide_home

if TYPE_CHECKING:
    from flows.compose import finish, only_writer, plan_dataset
    from flows.dataset import ImageTextPairDataset, get_client

provide_home()

__all__ = ["ImageTextPairDataset", "finish", "get_client", "only_writer", "plan_dataset"]
MODULES = {"finish": "compose", "only_writer": "compose", "plan_dataset": "compose"}


def __getattr__(name: str) -> Any:
    """Import Prefect only when it is asked for."""
    if name in __all__:
        return getattr(importlib.import_module(f"flows.{MODULES.get(name, 'dataset')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
