"""Ask nodes and collect their replies over all attempts of one phase of a round."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import no_object_id_recompute

from flwr_ha.errors import ConfigError
from flwr_ha.model import REPLAYED, RunState
from flwr_ha.serverapp.context import RunContext
from flwr_ha.serverapp.nodes import Kind, online, weight_key
from flwr_ha.serverapp.rounds import (
    Back,
    Continue,
    Done,
    Event,
    Gone,
    Phase,
    Rejected,
    Rules,
    Short,
    Tick,
    Valid,
    begin,
    step,
)
from flwr_ha.serverapp.spill import GROUP_BYTES, Spill, is_spillable
from flwr_ha.serverapp.validation import Expectation, expect, why_rejected

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

_POLL_S = (0.1, 0.25)  # first and longest pause between two polls for replies
_POLL_S_PER_MESSAGE = 0.0005  # each message under way makes a poll slower: the pauses grow with them
_NODES_INTERVAL_S = 1.0

Key = tuple[int, str]  # node id and content hash: what a reply answers
Order = tuple[list[str], str]  # by which replies are sorted


class Gathering:
    """Collect the replies of one phase.

    What a node has answered is kept over the attempts, under its id and the hash of what it was
    asked, and a node that still works on the same content is not asked again.

    Parameters
    ----------
    run : RunContext
        Grid, session, rules.
    kind : str
        ``train`` or ``evaluate``.
    server_round : int
        Counts from 1.
    """

    def __init__(self, run: RunContext, kind: Kind, server_round: int) -> None:
        self._run = run
        self._kind = kind
        self._server_round = server_round
        self._state = RunState.TRAINING if kind == "train" else RunState.EVALUATING
        self._kept: dict[Key, Message] = {}
        self._orders: dict[Key, Order] = {}
        self._spill: Spill | None = None  # once the replies are too big to wait in memory
        self._group = 0  # replies that are pulled at once; 0: all
        self._asked: dict[str, Key] = {}  # message id to what it asks, of all messages that may be answered
        self._working: dict[Key, str] = {}  # when the node registered that works on it
        self._rejections: Counter[Key] = Counter()
        self._messages: dict[Key, Message] = {}
        self._expectations: dict[str, Expectation] = {}
        self._nodes_online = 0

    def attempt(self, messages: Sequence[Message], nodes: Mapping[int, str]) -> tuple[Done | Short, list[Message]]:
        """Ask, and wait until the phase is done or can only end short.

        Parameters
        ----------
        messages : sequence of Message
            One for each node that the strategy has sampled.
        nodes : mapping of int to str
            Nodes that are online, and when they registered.

        Returns
        -------
        decision : Done or Short
            With the reason.
        replies : list of Message
            The valid ones, in an order that depends on their content only.

        Raises
        ------
        ConfigError
            The strategy asks fewer nodes than ``min_nodes``, or one node twice.
        FencedError
            A newer term exists: end at once.
        """
        self._identify(messages)
        phase = begin(self._rules(len(self._messages)), [node for node, _ in self._messages], now_s=self._now_s())
        for node, _ in self._messages.keys() & self._kept.keys():
            phase, _ = step(phase, Valid(node), now_s=self._now_s())
        self._push([key for key in self._messages if key not in self._kept and key not in self._working], nodes)
        self._nodes_online = len(nodes)
        next_look_s, pause_s = self._now_s() + _NODES_INTERVAL_S, _POLL_S[0]
        while True:
            events = self._pull()
            longest_s = max(_POLL_S[1], _POLL_S_PER_MESSAGE * len(self._asked))
            pause_s = _POLL_S[0] if events else min(1.25 * pause_s, longest_s)
            for event in [*events, Tick()]:
                phase, decision = step(phase, event, now_s=self._now_s())
            if self._now_s() >= next_look_s:
                for event in self._look(phase):
                    phase, decision = step(phase, event, now_s=self._now_s())
                next_look_s = self._now_s() + _NODES_INTERVAL_S
            self._run.report(self._state, decision.reason, nodes_online=self._nodes_online)
            if not isinstance(decision, Continue):
                if self._now_s() >= phase.deadline_s:
                    self._working.clear()  # an answer may be lost: whoever has not given one is asked again
                return decision, self._ordered()
            self._run.clock.wait(pause_s)

    def forget(self) -> None:
        """Drop all replies: aggregation may have changed them."""
        self._kept.clear()
        if self._spill is not None:
            self._spill.forget()

    def _now_s(self) -> float:
        return self._run.clock.now_s()

    def _rules(self, asked: int) -> Rules:
        if self._kind == "train":
            return self._run.rules
        # A strategy may evaluate on a few nodes only; all of these must answer, up to the threshold.
        wanted = self._run.rules.min_replies
        least = min(self._run.rules.min_nodes, asked)
        return replace(self._run.rules, min_nodes=least, min_replies=None if wanted is None else max(wanted, least))

    def _identify(self, messages: Sequence[Message]) -> None:
        """Remember what is asked in this attempt; equal contents are hashed once."""
        self._messages = {}
        contents: dict[int, str] = {}
        key = weight_key(self._run.strategy)
        with no_object_id_recompute():
            for message in messages:
                content = message.content
                if id(content) not in contents:
                    contents[id(content)] = content.object_id
                content_id = contents[id(content)]
                if content_id not in self._expectations:
                    is_same = self._kind == "train" and self._run.rules.same_arrays
                    self._expectations[content_id] = expect(content, same_arrays=is_same, weight_key=key)
                self._messages[(message.metadata.dst_node_id, content_id)] = message
        self._choose_place()
        if len({node for node, _ in self._messages}) < len(messages):
            raise ConfigError("the strategy asks one node twice in one phase: HighlyAvailable counts nodes")

    def _choose_place(self) -> None:
        """Let the replies wait on disk, and pull them one by one, where they may be too big for memory."""
        if self._kind != "train" or self._spill is not None or not is_spillable(self._run.strategy):
            return
        records = (message.content.array_records.values() for message in self._messages.values())
        sizes = [sum(record.count_bytes() for record in each) for each in records]
        if sum(sizes) > self._run.in_memory_bytes:
            self._spill = Spill(self._run.session.scratch_folder)
            self._group = max(1, GROUP_BYTES // max(sizes))

    def _push(self, keys: Sequence[Key], nodes: Mapping[int, str]) -> None:
        fresh = [self._fresh(key) for key in keys]
        if not fresh:
            return
        ids = list(self._run.grid.push_messages(fresh))
        if len(ids) != len(fresh):  # a grid may leave out what it could not push
            pushed = set(ids)
            ids = [m.metadata.message_id if m.metadata.message_id in pushed else None for m in fresh]  # type: ignore[misc]
        for key, message_id in zip(keys, ids, strict=True):
            if message_id:
                self._asked[message_id] = key
                self._working[key] = nodes.get(key[0], "")

    def _fresh(self, key: Key) -> Message:
        """Return a message that was not sent before, with a group id that tells a client's cache what to answer.

        The same content in another round, or after a reply that was rejected, is to be computed anew.
        """
        message = self._messages[key]
        group = message.metadata.group_id or str(self._server_round)
        if self._rejections[key]:
            group = f"{group}.{self._rejections[key]}"
        kind = message.metadata.message_type
        return Message(message.content, key[0], kind, ttl=message.metadata.ttl, group_id=group)

    def _pull(self) -> list[Event]:
        ids = list(self._asked)
        size = self._group or max(1, len(ids))
        groups = [ids[start : start + size] for start in range(0, len(ids), size)]
        events = [self._received(reply) for group in groups for reply in self._run.grid.pull_messages(group)]
        return [event for event in events if event is not None]

    def _received(self, reply: Message) -> Event | None:
        key = self._asked.pop(reply.metadata.reply_to_message_id, None)
        if key is None or key in self._kept:
            return None
        is_replayed = reply.has_content() and reply.content.pop(REPLAYED, None) is not None
        reason = why_rejected(reply, self._expectations[key[1]], node=key[0])
        if reason is not None and key in self._asked.values():
            return None  # it was asked again since then
        self._working.pop(key, None)
        is_current = key in self._messages
        if reason is None:
            self._keep(key, reply)
            if is_replayed:
                self._record("reply-replayed", "the node had the answer in its cache", key[0])
            return Valid(key[0]) if is_current else None
        if reply.has_error() and reply.error.code == ErrorCode.NODE_UNAVAILABLE:
            return Gone(key[0]) if is_current else None
        self._rejections[key] += reply.has_content()  # a client's cache does not hold errors
        logger.warning("round %d: the reply to %s was rejected: %s", self._server_round, self._kind, reason)
        self._record("reply-rejected", reason, key[0])
        return Rejected(key[0], reason) if is_current else None

    def _record(self, kind: str, message: str, node: int) -> None:
        fields = {"server_round": self._server_round, "node": str(node), "phase": self._kind}
        self._run.session.record(kind, message, **fields)

    def _keep(self, key: Key, reply: Message) -> None:
        with no_object_id_recompute():
            self._orders[key] = _order(reply)
            if self._spill is not None:
                self._spill.keep(reply)
        self._kept[key] = reply

    def _look(self, phase: Phase) -> list[Event]:
        """Find out which nodes went, came back or were restarted, and ask again those whose work is lost."""
        nodes = online(self._run.grid)
        self._nodes_online = len(nodes)
        events: list[Event] = []
        lost: list[Key] = []
        for key in self._messages:
            node = key[0]
            if key in self._kept or node in phase.rejected:
                continue
            if node not in nodes:
                self._working.pop(key, None)
                events.append(Gone(node))
            elif self._working.get(key) != nodes[node]:
                lost.append(key)
                events.append(Back(node))
        self._push(lost, nodes)
        return events

    def _ordered(self) -> list[Message]:
        """Return the valid replies sorted by content: sums of floats depend on the order.

        The arrays decide first, since metrics may hold times; node ids and arrival never do.
        """
        keys = [key for key in self._messages if key in self._kept]
        return [self._kept[key] for key in sorted(keys, key=lambda key: self._orders[key])]


def _order(reply: Message) -> Order:
    return [record.object_id for record in reply.content.array_records.values()], reply.content.object_id
