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
            except (httpx.TransportError, CoordinationError) as error:
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
        if response.status_code == 401:
            raise ConfigError("secret-file does not hold the secret of this cluster")
        if response.status_code == 503:
            raise CoordinationError(_detail(response))
        if response.is_error:
            raise RequestRefusedError(_detail(response))
        return response.json()


def _detail(response: httpx.Response) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        return str(response.json()["detail"])
    return f"answered {response.status_code}"
