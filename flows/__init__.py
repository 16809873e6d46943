"""What people run: the flow, its command line, and the form that users of NeMo Curator know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flows.home import provide_home

if TYPE_CHECKING:
    from flows.dataset import ImageTextPairDataset, get_client

provide_home()

__all__ = ["ImageTextPairDataset", "get_client"]


def __getattr__(name: str) -> Any:
    """Import Prefect only when it is asked for."""
    if name in __all__:
        import flows.dataset

        return getattr(flows.dataset, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
