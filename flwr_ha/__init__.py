"""A highly available Flower: training goes on through the death of its server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flwr_ha.serverapp.strategy import HighlyAvailable as HighlyAvailable

__version__ = "0.1.0"
__all__ = ["HighlyAvailable", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the strategy when it is first asked for: the agent must not load numpy and Flower for it."""
    if name == "HighlyAvailable":
        from flwr_ha.serverapp.strategy import HighlyAvailable

        return HighlyAvailable
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
