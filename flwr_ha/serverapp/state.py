"""Capture what a strategy remembers between rounds, and give it back exactly.

Captured are the attributes that hold plain values, arrays, records, random generators, wrapped
strategies and objects with ``state_dict()`` / ``load_state_dict()``. A strategy's own pair of
these two methods wins: JSON values and arrays in, the same out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray

from flwr_ha.errors import CheckpointCorruptError, ConfigError
from flwr_ha.serverapp.nodes import names
from flwr_ha.serverapp.statecodec import Decoder, Encoder


@dataclass(frozen=True, slots=True)
class Memory:
    """Name what a training remembers between rounds besides the model.

    Attributes
    ----------
    strategy : Strategy
        Any, with those that it wraps.
    train_config, evaluate_config : ConfigRecord
        Sent to the nodes; strategies change them, as for a learning rate that decays.
    """

    strategy: Strategy
    train_config: ConfigRecord
    evaluate_config: ConfigRecord


@dataclass(frozen=True, slots=True)
class State:
    """Hold what a training remembered at one moment.

    Attributes
    ----------
    plain : mapping
        JSON object.
    arrays : mapping of str to ndarray
        The arrays that ``plain`` refers to, any dtype and shape.
    """

    plain: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def capture(memory: Memory, *, is_copied: bool) -> State:
    """Return what a training remembers.

    Parameters
    ----------
    memory : Memory
        What to look at.
    is_copied : bool
        Copy arrays that the strategy could change in place; False: they are written out at once.

    Raises
    ------
    ConfigError
        The strategy's own ``state_dict()`` holds something that cannot be kept: change it.
    """
    arrays: dict[str, NDArray[Any]] = {}
    encoder = Encoder(arrays, is_copied)
    plain = {
        "made_by": names(memory.strategy),
        "strategy": encoder.strategy(memory.strategy, "strategy."),
        "train_config": encoder.value(memory.train_config, "train_config"),
        "evaluate_config": encoder.value(memory.evaluate_config, "evaluate_config"),
    }
    return State(plain, arrays)


def restore(memory: Memory, state: State, *, is_exact: bool = False) -> None:
    """Give back what `capture` found.

    Parameters
    ----------
    memory : Memory
        The same objects, or ones built the same way; they are changed in place. Arrays become
        fresh, writable copies.
    state : State
        Stays as it is, and can be given back again.
    is_exact : bool
        Also remove attributes that the strategy did not have then: to undo an attempt.

    Raises
    ------
    ConfigError
        The state was captured from another kind of strategy: the app has changed.
    CheckpointCorruptError
        The state does not fit together: take another copy.
    """
    if (present := names(memory.strategy)) != (made_by := state.plain.get("made_by")):
        raise ConfigError(f"the checkpoint was made with the strategy {made_by}, not with {present}")
    decoder = Decoder(state.arrays, is_exact)
    try:
        decoder.into(memory.strategy, state.plain["strategy"])
        for name in ("train_config", "evaluate_config"):
            kept, config = decoder.value(state.plain[name]), getattr(memory, name)
            config.clear()
            config.update(kept)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointCorruptError(f"the state of {made_by} does not fit: {error!r}") from error
