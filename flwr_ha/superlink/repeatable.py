"""Let a SuperNode repeat its registration and activation, whose answer a failover may have swallowed.

Flower answers the repetition with an error that ends the SuperNode. Both requests are signed with the node's key, so
a repetition comes from the node itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    RegisterNodeFleetRequest,
    RegisterNodeFleetResponse,
)
from flwr.supercore.error import ApiErrorCode, FlowerError

# A SuperNode repeats a request after at most 30 s (its timeout) and 20 s (its longest pause).
_REPEATED_WITHIN = timedelta(seconds=60)


def make_repeatable() -> None:
    """Replace Flower's handlers by ones that accept a repeated request; called before the app is made."""
    handlers: Any = importlib.import_module("flwr.superlink.servicer.fleet.fleet_handlers")
    handlers.register_node = _register(handlers.register_node)
    handlers.activate_node = _activate(handlers.activate_node)


def _register(plain: Callable[..., RegisterNodeFleetResponse]) -> Callable[..., RegisterNodeFleetResponse]:
    def register_node(
        request: RegisterNodeFleetRequest, state: Any, enable_supernode_auth: bool
    ) -> RegisterNodeFleetResponse:
        try:
            return plain(request=request, state=state, enable_supernode_auth=enable_supernode_auth)
        except FlowerError as error:
            node_id = state.get_node_id_by_public_key(request.public_key)
            if error.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE or node_id is None:
                raise
            return RegisterNodeFleetResponse(node_id=node_id)

    return register_node


def _activate(plain: Callable[..., ActivateNodeResponse]) -> Callable[..., ActivateNodeResponse]:
    def activate_node(request: ActivateNodeRequest, state: Any) -> ActivateNodeResponse:
        try:
            return plain(request=request, state=state)
        except FlowerError as error:
            node_id = state.get_node_id_by_public_key(request.public_key)
            if error.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED or node_id is None:
                raise
            # Flower refuses a second SuperNode with the key of one that is online; so do we, but for the moments
            # after an activation, when it is the same one again.
            if not _was_just_activated(state.get_node_info(node_ids=[node_id])[0]):
                raise
            state.acknowledge_node_heartbeat(node_id, request.heartbeat_interval)
            return ActivateNodeResponse(node_id=node_id)

    return activate_node


def _was_just_activated(node: Any) -> bool:
    if node.status != "online" or not node.last_activated_at:
        return False
    return datetime.now(UTC) - datetime.fromisoformat(node.last_activated_at) < _REPEATED_WITHIN
