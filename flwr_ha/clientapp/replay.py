"""Answer a repeated request from disk: finished client work is not done again."""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, Message, RecordDict

from flwr_ha.clientapp.replaystore import ReplayStore
from flwr_ha.model import REPLAYED

if TYPE_CHECKING:
    from flwr.clientapp.typing import ClientAppCallable

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that a SuperNode shows it

_KINDS = ("train", "evaluate")  # a query may ask for something that changes


def replay_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Answer from the cache what was answered before, else keep the answer.

    The same request is one with the same run, node, message type, group (`HighlyAvailable` puts
    the round there) and content. What the ClientApp changed in ``context.state`` is part of the
    answer: it is put back as well, so a client with a state goes on as if it had trained now.
    Errors are not kept. A reply from the cache carries a ConfigRecord more, by which `HighlyAvailable`
    counts it; it takes it off. The cache lies in the folder ``FLWR_HA_REPLAY_DIR``, by default below the
    user's cache folder; a disk that refuses costs the replay, never the reply.

    Put it first: ``mods=[replay_mod, numpy_client_mod]``.
    """
    if message.metadata.message_type.partition(".")[0] not in _KINDS or not message.has_content():
        return call_next(message, context)
    key, store = request_key(message), _store(message.metadata.dst_node_id)
    if (entry := store.get(key)) is not None:
        content, state = entry
        logger.info("%s: answered from the cache, nothing is computed again", _title(message))
        _replace(context.state, state)
        content[REPLAYED] = ConfigRecord({"is-replayed": True})
        return Message(content, reply_to=message)
    reply = call_next(message, context)
    if reply.has_content():
        store.put(key, reply.content, context.state)
    return reply


def request_key(message: Message) -> str:
    """Return the name of a request: the same for each message that asks the same; 64 hexadecimal digits."""
    metadata = message.metadata
    parts = (str(metadata.run_id), metadata.message_type, metadata.group_id, message.content.object_id)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _store(node_id: int) -> ReplayStore:
    from flwr_ha.config import replay_dir_from_environment

    return ReplayStore(replay_dir_from_environment() / str(node_id))


def _replace(state: RecordDict, kept: RecordDict) -> None:
    """Put the state back in place: the ClientApp process sends this very object to its SuperNode."""
    state.clear()
    state.update(kept)


def _title(message: Message) -> str:
    group = message.metadata.group_id
    return f"{message.metadata.message_type} of round {group}" if group else message.metadata.message_type
