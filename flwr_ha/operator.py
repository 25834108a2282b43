"""Ask a cluster, as operators and tools do: any replica that answers will do."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx

from flwr_ha.config import load_secret
from flwr_ha.errors import ConfigError, CoordinationError, HaError
from flwr_ha.settings import ReplicaSettings, Settings
from flwr_ha.tls import explain, peer_context

TIMEOUT_S = 3.0


class RequestRefusedError(HaError):
    """The cluster understood the request and refused it; the message says why."""


class StrangerError(CoordinationError):
    """Something else listens at a replica's address: ask another replica."""

    def __init__(self, replica: ReplicaSettings) -> None:
        super().__init__(f"what answers at {replica.api} is no replica of flwr_ha")


class Operator:
    """Call the REST API of a cluster.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._tls = peer_context(settings.tls)

    def get(self, path: str) -> Any:
        """Return the JSON answer of the first replica that answers; CoordinationError where none does."""
        return self._ask("GET", path, None, {})

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Ask for a change.

        Raises
        ------
        RequestRefusedError
            It is not possible now: the message says why.
        CoordinationError
            No replica answers: is the cluster up?
        ConfigError
            The shared secret is missing or wrong.
        """
        secret = load_secret(self._settings)
        return self._ask("POST", path, body, {"Authorization": f"Bearer {secret}"})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]) -> Any:
        failures: list[str] = []
        for replica in self._settings.replicas:
            try:
                return self._ask_one(replica, method, path, body, headers)
            except StrangerError as error:
                failures.append(str(error))
            except (httpx.RequestError, CoordinationError) as error:
                failures.append(f"replica {replica.id} at {replica.api}: {explain(error)}")
        raise CoordinationError(
            f"no replica of cluster {self._settings.cluster!r} answers, start one or name the settings of a running "
            f"cluster with --config: {'; '.join(failures)}"
        )

    def _ask_one(
        self, replica: ReplicaSettings, method: str, path: str, body: dict[str, Any] | None, headers: dict[str, str]
    ) -> Any:
        url = f"{'https' if self._tls else 'http'}://{replica.api}{path}"
        with httpx.Client(verify=self._tls or True, timeout=TIMEOUT_S, trust_env=False) as client:
            response = client.request(method, url, json=body, headers=headers)
        answer = _json(response)
        if response.is_error:
            detail = answer.get("detail") if isinstance(answer, dict) else None
            # Each error of a replica has a sentence; reading is open, and it knows all paths that are asked for here.
            is_closed = response.status_code == 401 and method == "GET"
            if not isinstance(detail, str) or detail == "Not Found" or is_closed:
                raise StrangerError(replica)
            raise _refusal(response.status_code, detail)
        if not _is_answer(path, answer):
            raise StrangerError(replica)
        return answer


def _json(response: httpx.Response) -> Any:
    """Return the body as JSON, None where it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        return response.json()
    return None


def _refusal(status: int, detail: str) -> HaError:
    if status == 401:
        return ConfigError("secret-file does not hold the secret of this cluster")
    return CoordinationError(detail) if status == 503 else RequestRefusedError(detail)


def _is_answer(path: str, answer: object) -> bool:
    """Whether a replica answers so; only as much is looked at as tells its answers from those of other programs."""
    match path.strip("/").split("/"):
        case ["cluster"]:
            return _has(answer, "cluster", "term", "leader", "paused", "replicas", "runs")
        case ["history"]:
            return isinstance(answer, list) and all(_has(change, "term", "leader") for change in answer)
        case ["runs", _, "commits"]:
            return isinstance(answer, list) and all(_has(commit, "server_round", "digest") for commit in answer)
        case _:
            return isinstance(answer, dict)


def _has(value: object, *keys: str) -> bool:
    return isinstance(value, dict) and all(key in value for key in keys)
