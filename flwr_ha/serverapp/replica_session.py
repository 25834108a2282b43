"""The session with the replica that runs this ServerApp: HTTP on loopback."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, FencedError
from flwr_ha.failpoints import reach
from flwr_ha.model import Head, Metrics, RunState, RunStatus
from flwr_ha.settings import SessionSettings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import BlobCorruptError

if TYPE_CHECKING:
    from flwr_ha.storage.checkpoint import Checkpoint

logger = logging.getLogger("flwr.ha")  # below Flower's logger, so that `flwr log` shows it

_RETRY_S = (0.1, 2.0)  # first and longest pause between two tries
_COMMIT_TIMEOUT_S = 600.0  # a big checkpoint takes its time to reach the standbys
_NOTE_TIMEOUT_S = 2.0  # status and events must not hold up the training
_NOTE_INTERVAL_S = 0.3
_OFFER_BYTES = 4 << 20  # copying less takes no longer than telling of it
_LOG_INTERVAL_S = 30.0


class ReplicaSession:
    """Keep a run's rounds with the replica that leads.

    A call that the replica does not answer, or answers with 503 or another server error, is tried
    again without limit: this process dies with its replica, so as long as it lives somebody may
    answer. 401 and 409 mean that a newer term exists.

    Parameters
    ----------
    settings : SessionSettings
        Address and token.
    run_id : str
        Flower's run id, unsigned decimal.
    app : str
        ``publisher/name``.
    sleep : callable
        Waits for that many seconds; a seam for tests.
    transport : httpx.BaseTransport, optional
        Carries the requests; a seam for tests.
    """

    is_once_per_run = True

    def __init__(
        self,
        settings: SessionSettings,
        *,
        run_id: str,
        app: str,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.run_id = run_id
        self._app = app
        self._sleep = sleep
        self._client = httpx.Client(
            base_url=settings.url,
            headers={"Authorization": f"Bearer {settings.token}"},
            timeout=httpx.Timeout(_COMMIT_TIMEOUT_S, connect=5.0),
            transport=transport,
            trust_env=False,  # a proxy has no business on loopback
        )
        self._store: BlobStore | None = None
        self._last: RunStatus | None = None
        self._last_s = 0.0

    @property
    def scratch_folder(self) -> Path:
        """Folder beside the replica's blobs, on the same disk."""
        return self._blobs().root

    def head(self) -> Head | None:
        """Return the committed head; remember where the replica keeps blobs."""
        answer = self._call("GET", f"/session/runs/{self.run_id}", doing="reading the committed head")
        self._store = BlobStore(Path(answer["blobs"]))
        logger.info("replica %s leads in term %s", answer["replica"], answer["term"])
        return Head.from_json(answer["head"]) if answer["head"] else None

    def load(self, head: Head) -> Checkpoint:
        """Return the checkpoint; bad blobs are fetched from a peer, each of them once."""
        from flwr_ha.storage.checkpoint import load

        repaired: set[str] = set()
        while True:
            try:
                return load(head.position.digest, self._blobs())
            except BlobCorruptError as error:
                if error.digest in repaired:
                    raise self._lost(head, str(error)) from error
                self._repair(head, error)
                repaired.add(error.digest)
            except CheckpointCorruptError as error:
                raise self._lost(head, str(error)) from error

    def _repair(self, head: Head, error: BlobCorruptError) -> None:
        logger.warning("%s: a copy is fetched from another replica", error)
        try:
            self._call("POST", f"/session/blobs/{error.digest}/repair", doing="fetching a good copy")
        except CheckpointError as refusal:
            raise self._lost(head, str(refusal)) from error

    def _lost(self, head: Head, reason: str) -> CheckpointError:
        answer = self._call("GET", f"/session/runs/{self.run_id}", doing="looking for an older checkpoint")
        previous = answer.get("previous")
        kept = (
            f"the previous kept checkpoint is round {previous['server_round']}, {previous['digest']}"
            if previous
            else "`flwr-ha checkpoint list` shows the checkpoints that are kept"
        )
        return CheckpointError(f"round {head.position.server_round} has no good copy: {reason}; {kept}")

    def commit(self, checkpoint: Checkpoint, metrics: Metrics) -> Head:
        """Write the blobs next to the replica's own, and have them replicated meanwhile and committed then."""
        pauses = _Pauses(self._sleep)
        while True:
            try:
                return self._commit(checkpoint, metrics)
            except CheckpointCorruptError as error:  # a bad disk; the round is still in memory
                logger.warning("%s: the checkpoint is written again", error)
            pauses.wait()

    def _commit(self, checkpoint: Checkpoint, metrics: Metrics) -> Head:
        from flwr_ha.storage.checkpoint import save

        reach("session.before-save")
        offers = _Offers(self._blobs(), lambda digests: self._note("offer", {"digests": digests}))
        saved = self._persist(lambda: save(checkpoint, self._blobs(), on_part=offers.add), checkpoint)
        body = {
            "server_round": checkpoint.server_round,
            "num_rounds": checkpoint.num_rounds,
            "digest": saved.digest,
            "parts": list(saved.parts),
            "model_digest": saved.model_digest,
            "bytes": saved.size_bytes,
            "app": self._app,
            "metrics": dict(metrics),
        }
        reach("session.after-save")
        path = f"/session/runs/{self.run_id}/commit"
        answer = self._call("POST", path, body, doing=f"committing round {checkpoint.server_round}")
        reach("session.after-commit")
        return Head.from_json(answer)

    def _persist(self, write: Callable[[], Any], checkpoint: Checkpoint) -> Any:
        """Write until it succeeds: a full disk can be emptied, and the round is still in memory."""
        pauses = _Pauses(self._sleep)
        while True:
            try:
                return write()
            except CheckpointError as error:
                if not _is_of_the_disk(error):
                    raise
                reason = f"the checkpoint of round {checkpoint.server_round} cannot be written: {error}"
                if pauses.is_log_due():
                    logger.error("%s; trying again", reason)
                self._waiting(reason)
                pauses.wait()

    def report(self, status: RunStatus) -> None:
        """Show the status, at most a few times a second."""
        now_s = time.monotonic()
        is_soon = self._last is not None and now_s < self._last_s + _NOTE_INTERVAL_S
        if status == self._last or (is_soon and self._last is not None and status.state == self._last.state):
            return
        self._last, self._last_s = status, now_s
        self._note("status", status.to_json())

    def record(self, kind: str, message: str, **fields: Any) -> None:
        """Add an entry to the replica's event log."""
        self._note("events", {"kind": kind, "message": message, **fields})

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _blobs(self) -> BlobStore:
        while self._store is None:
            self.head()
        return self._store

    def _waiting(self, reason: str) -> None:
        last = self._last or RunStatus(run_id=self.run_id, app=self._app, state=RunState.WAITING)
        self.report(
            RunStatus(
                run_id=last.run_id,
                app=last.app,
                state=RunState.WAITING,
                reason=reason,
                num_rounds=last.num_rounds,
                nodes_online=last.nodes_online,
                min_nodes=last.min_nodes,
            )
        )

    def _note(self, what: str, body: dict[str, Any]) -> None:
        try:
            path = f"/session/runs/{self.run_id}/{what}"
            response = self._client.post(path, json=body, timeout=_NOTE_TIMEOUT_S)
        except httpx.TransportError as error:
            logger.debug("%s was not shown: %r", what, error)
            return
        _raise_if_fenced(response)

    def _call(self, method: str, path: str, body: Any = None, *, doing: str) -> Any:
        pauses = _Pauses(self._sleep)
        while True:
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                reason = f"the replica does not answer ({error!r})"
            else:
                _raise_if_fenced(response)
                if response.is_success:
                    return response.json() if response.content else None
                reason = _detail(response)
                if response.status_code < 500:
                    kind = CheckpointCorruptError if _kind(response) == "corrupt" else CheckpointError
                    raise kind(f"{doing}: {reason}")
                self._waiting(f"{doing}: {reason}")
            if pauses.is_log_due():
                logger.warning("%s: %s; trying again", doing, reason)
            pauses.wait()


class _Offers:
    """Tell the replica of parts, so that copies of them are on their way while others are written; from any thread."""

    def __init__(self, store: BlobStore, tell: Callable[[list[str]], None]) -> None:
        self._store = store
        self._tell = tell
        self._lock = threading.Lock()
        self._waiting: list[str] = []
        self._waiting_bytes = 0

    def add(self, digest: str) -> None:
        with self._lock:
            self._waiting.append(digest)
            self._waiting_bytes += self._store.size_to_send(digest)
            if self._waiting_bytes < _OFFER_BYTES:
                return
            told, self._waiting, self._waiting_bytes = self._waiting, [], 0
        self._tell(told)


class _Pauses:
    """Wait ever longer between tries, and say when a log line is due."""

    def __init__(self, sleep: Callable[[float], None]) -> None:
        self._sleep = sleep
        self._pause_s, self._longest_s = _RETRY_S
        self._next_log_s = 0.0

    def wait(self) -> None:
        self._sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, self._longest_s)

    def is_log_due(self) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_log_s:
            return False
        self._next_log_s = now_s + _LOG_INTERVAL_S
        return True


def _raise_if_fenced(response: httpx.Response) -> None:
    if response.status_code in (401, 409):
        raise FencedError(_detail(response))


def _kind(response: httpx.Response) -> str:
    try:
        return str(response.json().get("kind", ""))
    except (ValueError, AttributeError):
        return ""


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def _is_of_the_disk(error: BaseException | None) -> bool:
    """Whether the system refused a file: that may pass, what cannot be written at all stays so."""
    return error is not None and (isinstance(error, OSError) or _is_of_the_disk(error.__cause__))
