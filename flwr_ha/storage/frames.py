"""The bytes of the protocol in which one replica pushes blobs to another, after HTTP has upgraded to it.

The sender asks ``GET /blobs`` with ``Upgrade: flwr-ha-blobs`` and its secret. After status 101 it sends frames:

* a piece: a head, and bytes of one blob from an offset on. Nothing answers it.
* a question: a head, and names and sizes of blobs. The receiver makes blobs of those that it has in full, durable ones,
  and answers with what it still lacks, as JSON behind its length.

A receiver that refuses pieces altogether says so at once, with an answer for which nobody has asked.
All whole numbers are unsigned and big-endian. Heads, names and answers carry their CRC-32: a bit that flips on the way
must not make a copy count that is not there. The bytes of blobs have their SHA-256.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Self

from flwr_ha.storage.digests import PREFIX

PATH = "/blobs"
PROTOCOL = "flwr-ha-blobs"
ACCEPTED = f"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {PROTOCOL}\r\n\r\n".encode()
MAX_NAMES = 100_000
MAX_ANSWER_BYTES = 16 << 20
_HEAD = struct.Struct(">B32sQQI")
_NAME = struct.Struct(">32sQ")
_LENGTH = struct.Struct(">I")
_CRC_BYTES = 4
HEAD_BYTES, LENGTH_BYTES = _HEAD.size + _CRC_BYTES, _LENGTH.size
_NO_DIGEST = PREFIX + "0" * 64


class Kind(IntEnum):
    """Say what follows the head of a frame."""

    PIECE = 1
    QUESTION = 2


@dataclass(frozen=True, slots=True)
class Head:
    """Begin a frame.

    Attributes
    ----------
    kind : Kind
        What follows.
    digest : str
        Of a piece: the blob.
    offset, total : int
        Of a piece: its first byte, and the bytes of the whole blob.
    count : int
        Bytes of the piece, or number of names in the question.
    """

    kind: Kind
    digest: str
    offset: int
    total: int
    count: int

    def to_bytes(self) -> bytes:
        """Return the head as it is sent."""
        return _sealed(_HEAD.pack(self.kind, _raw(self.digest), self.offset, self.total, self.count))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read a head; ValueError where it is none."""
        kind, raw, offset, total, count = _HEAD.unpack(_opened(data))
        head = cls(Kind(kind), PREFIX + raw.hex(), offset, total, count)
        if head.kind is Kind.PIECE and offset + count > total:
            raise ValueError("a piece reaches beyond the end of its blob")
        if head.kind is Kind.QUESTION and count > MAX_NAMES:
            raise ValueError("too many blobs are asked for at once")
        return head


def question(sizes: Mapping[str, int]) -> bytes:
    """Return the frame that asks what is lacking of blobs of these sizes, in bytes."""
    head = Head(Kind.QUESTION, _NO_DIGEST, 0, 0, len(sizes)).to_bytes()
    return head + _sealed(b"".join(_NAME.pack(_raw(digest), size) for digest, size in sizes.items()))


def names_bytes(count: int) -> int:
    """Return how many bytes the names of a question take."""
    return count * _NAME.size + _CRC_BYTES


def names(data: bytes) -> dict[str, int]:
    """Return the names of a question, and the sizes; ValueError where they have changed on the way."""
    return {PREFIX + raw.hex(): size for raw, size in _NAME.iter_unpack(_opened(data))}


@dataclass(frozen=True, slots=True)
class Answer:
    """Tell the sender what to do next.

    Attributes
    ----------
    lacking : Mapping of str to int
        Blobs that are not there in full, and how many bytes of each are.
    spoiled : Mapping of str to str
        Those of them of which other bytes than they must have arrived, and were dropped; what was wrong.
    refusal : str
        Why the receiver takes nothing at all; empty: it does.
    is_passing : bool
        Whether the reason of the refusal may pass by itself: try again soon.
    """

    lacking: Mapping[str, int] = field(default_factory=dict)
    spoiled: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""
    is_passing: bool = False

    def to_bytes(self) -> bytes:
        """Return the answer as it is sent."""
        body = json.dumps(
            {
                "lacking": self.lacking,
                "spoiled": self.spoiled,
                "refusal": self.refusal,
                "is_passing": self.is_passing,
            }
        ).encode()
        return _LENGTH.pack(len(body) + _CRC_BYTES) + _sealed(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read what follows the length of an answer; ValueError where it is none."""
        match json.loads(_opened(data)):
            case {
                "lacking": dict(lacking),
                "spoiled": dict(spoiled),
                "refusal": str(refusal),
                "is_passing": bool(is_passing),
            } if all(type(each) is int for each in lacking.values()):
                return cls(lacking, spoiled, refusal, is_passing)
        raise ValueError("this is no answer about blobs")


def answer_bytes(data: bytes) -> int:
    """Return how long the answer is whose length these are; ValueError where it is too long."""
    (length,) = _LENGTH.unpack(data)
    if length > MAX_ANSWER_BYTES:
        raise ValueError("the answer is too long")
    return int(length)


def _sealed(data: bytes) -> bytes:
    return data + zlib.crc32(data).to_bytes(_CRC_BYTES, "big")


def _opened(data: bytes) -> bytes:
    content = data[:-_CRC_BYTES]
    if _sealed(content) != data:
        raise ValueError("what arrives is not what was sent")
    return content


def _raw(digest: str) -> bytes:
    return bytes.fromhex(digest.removeprefix(PREFIX))
