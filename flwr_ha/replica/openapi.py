"""The description of the REST API for programs: ``GET /openapi.json``."""

from __future__ import annotations

from typing import Any

from flwr_ha.model import ReplicaState, Role, RunState

Json = dict[str, Any]

_WHOLE: Json = {"type": "integer", "minimum": 0}
_TEXT: Json = {"type": "string"}
_DIGEST: Json = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
_RUN_ID: Json = {"type": "string", "pattern": "^[0-9]{1,20}$"}
_SECRET: list[Json] = [{"secret": []}]


def openapi(version: str) -> Json:
    """Return the OpenAPI 3.1 document.

    Parameters
    ----------
    version : str
        Of flwr_ha.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "flwr_ha replica",
            "version": version,
            "description": (
                "REST of one replica. Reading is open; changing, and the blobs that replicas exchange, need the "
                "shared secret of the cluster. Every error is a JSON object with `detail` (or `reason`), a sentence."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            **_states(),
            **_information(),
            **_pages(),
            **_operations(),
            "/blobs": _pushes(),
            "/blobs/{digest}": _blobs(),
        },
        "components": {
            "securitySchemes": {"secret": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(),
        },
    }


def _object(properties: Json) -> Json:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _ref(name: str) -> Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _list(of: Json) -> Json:
    return {"type": "array", "items": of}


def _json(description: str, schema: Json) -> Json:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _problem(description: str) -> Json:
    return _json(description, _ref("Problem"))


def _query(name: str, description: str) -> Json:
    schema = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
    return {"name": name, "in": "query", "required": False, "description": description, "schema": schema}


def _get(summary: str, responses: Json, parameters: tuple[Json, ...] = ()) -> Json:
    return {"get": {"summary": summary, "parameters": list(parameters), "responses": responses}}


def _states() -> Json:
    def verdict(summary: str, *parameters: Json) -> Json:
        responses = {"200": _json("Yes", _ref("Verdict")), "503": _json("No, and why", _ref("Verdict"))}
        if parameters:
            responses["400"] = _problem("A parameter is not a whole number")
        return _get(summary, responses, parameters)

    lag = _query("lag", "503 also where more committed rounds than this are missing here")
    return {
        "/leader": verdict("Whether this replica leads; for load balancers"),
        "/primary": verdict("The same as /leader"),
        "/replica": verdict("Whether this replica is a running standby", lag),
        "/health": verdict("Whether it is alive and ready"),
        "/liveness": verdict("Whether the process works; restart it where not"),
        "/readiness": verdict("Whether this replica leads or could lead"),
    }


def _information() -> Json:
    after = _query("after", "Number of the last event that is known already")
    metrics = {
        "200": {"description": "Prometheus text", "content": {"text/plain": {"schema": _TEXT}}},
        "501": _problem("prometheus-client is not installed here"),
        "503": _problem("The disk did not answer in time"),
    }
    return {
        "/cluster": _get(
            "The cluster, its replicas, and its runs, oldest first; the same from every replica",
            {"200": _json("As it was last read from the coordinator", _ref("Cluster"))},
        ),
        "/history": _get("Leadership changes, newest last", {"200": _json("Changes", _list(_ref("LeadershipChange")))}),
        "/events": _get(
            "The event log of this replica, oldest first",
            {"200": _json("The newest 2000 at most", _list(_ref("Event"))), "400": _problem("`after` is wrong")},
            (after,),
        ),
        "/runs/{run_id}/commits": {
            "parameters": [{"name": "run_id", "in": "path", "required": True, "schema": _RUN_ID}],
            **_get(
                "The committed rounds of a run, oldest first",
                {
                    "200": _json("The newest 1000 at most", _list(_ref("Commit"))),
                    "404": _problem("No round of it is committed"),
                    "503": _problem("This replica has just started and still reads them"),
                },
            ),
        },
        "/metrics": _get("Metrics of this replica", metrics),
        "/openapi.json": _get("This document", {"200": _json("OpenAPI 3.1", {"type": "object"})}),
    }


def _pages() -> Json:
    page = {"200": {"description": "HTML", "content": {"text/html": {"schema": _TEXT}}}}
    return {"/": _get("The dashboard", page), "/docs": _get("This document for people", page)}


def _operations() -> Json:
    def post(summary: str, done: str, schema: Json) -> Json:
        responses = {
            done: _json("Written to the coordinator; /cluster shows the effect", {"type": "object"}),
            "400": _problem("The body is not the JSON object that is wanted"),
            "401": _problem("The secret is missing or wrong"),
            "409": _problem("Not possible now, and why"),
            "413": _problem("The body is larger than 64 KiB"),
            "503": _problem("The coordinator did not answer within 2 s: it may still have been done, see /cluster"),
        }
        body = {"required": False, "content": {"application/json": {"schema": schema}}}
        return {"post": {"summary": summary, "security": _SECRET, "requestBody": body, "responses": responses}}

    candidate = {"type": ["integer", "null"], "minimum": 0, "description": "Id of the standby that shall lead"}
    return {
        "/switchover": post(
            "Hand the leadership over after the round that is running",
            "202",
            {"type": "object", "properties": {"candidate": candidate}},
        ),
        "/pause": post("Forbid automatic failover", "200", {"type": "object"}),
        "/resume": post("Allow automatic failover again", "200", {"type": "object"}),
    }


def _blobs() -> Json:
    binary: Json = {"application/octet-stream": {"schema": {}}}
    refused = {
        "400": _problem("Not a digest"),
        "401": _problem("The secret is missing or wrong"),
    }
    empty = {"description": "The secret is missing or wrong, or this is not a digest; no body"}

    ranged = {"name": "Range", "in": "header", "schema": {"type": "string", "pattern": "^bytes=[0-9]{1,18}-$"}}
    return {
        "parameters": [{"name": "digest", "in": "path", "required": True, "schema": _DIGEST}],
        "head": {
            "summary": "Whether a verified copy is here",
            "security": _SECRET,
            "responses": {
                "200": {"description": "It is; Content-Length is its size"},
                "404": {"description": "It is not, or not in full"},
                "400": empty,
                "401": empty,
            },
        },
        "get": {
            "summary": "The bytes, all or from an offset on",
            "security": _SECRET,
            "parameters": [ranged],
            "responses": {
                "200": {"description": "All bytes", "content": binary},
                "206": {"description": "The bytes from the offset on", "content": binary},
                "404": _problem("There is no good copy here"),
                "416": _problem("There is nothing behind that byte"),
                **refused,
            },
        },
    }


def _pushes() -> Json:
    return {
        "get": {
            "summary": "With `Upgrade: flwr-ha-blobs`, push blobs in that protocol (flwr_ha/storage/frames.py)",
            "security": _SECRET,
            "responses": {
                "101": {"description": "The connection is another protocol's from now on"},
                "401": _problem("The secret is missing or wrong"),
                "426": _problem("No upgrade was asked for, or too many connections are open"),
            },
        }
    }


def _schemas() -> Json:
    replica = {
        "id": _WHOLE,
        "role": {"enum": [role.value for role in Role]},
        "state": {"enum": [state.value for state in ReplicaState]},
        "address": _TEXT,
        "api": _TEXT,
        "lag_rounds": {"type": ["integer", "null"]},
    }
    checkpoint = {
        "server_round": _WHOLE,
        "term": _WHOLE,
        "digest": _DIGEST,
        "model_digest": _TEXT,
        "bytes": _WHOLE,
        "copies": _list(_WHOLE),
        "committed_at": _TEXT,
    }
    values = {"anyOf": [{"type": "number"}, _list({"type": "number"})]}
    metrics = {"type": "object", "additionalProperties": values}
    run = {
        "run_id": _RUN_ID,
        "app": _TEXT,
        "state": {"enum": [state.value for state in RunState]},
        "reason": _TEXT,
        "server_round": _WHOLE,
        "num_rounds": _WHOLE,
        "nodes_online": _WHOLE,
        "min_nodes": _WHOLE,
        "checkpoint": {"anyOf": [_ref("Checkpoint"), {"type": "null"}]},
        "metrics": {
            "type": "object",
            "description": "By round",
            "additionalProperties": metrics,
        },
    }
    cluster = {
        "cluster": _TEXT,
        "term": _WHOLE,
        "leader": {"type": ["integer", "null"]},
        "paused": {"type": "boolean"},
        "replicas": _list(_ref("Replica")),
        "runs": _list(_ref("Run")),
    }
    event = {"number": _WHOLE, "at": _TEXT, "replica": _WHOLE, "kind": _TEXT, "message": _TEXT}
    return {
        "Problem": _object({"detail": _TEXT}),
        "Verdict": _object({"status": _TEXT, "reason": _TEXT}),
        "Replica": _object(replica),
        "Checkpoint": _object(checkpoint),
        "Commit": _object({"run_id": _RUN_ID, "app": _TEXT, "num_rounds": _WHOLE, **checkpoint, "metrics": metrics}),
        "Run": _object(run),
        "Cluster": _object(cluster),
        "LeadershipChange": _object({"term": _WHOLE, "leader": _WHOLE, "at": _TEXT, "reason": _TEXT}),
        "Event": _object(event),
    }
