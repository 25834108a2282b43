"""Put one replica together, and run it until it is asked to stop."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from starlette.applications import Starlette

from flwr_ha import failpoints
from flwr_ha.config import failpoint_from_environment, load_secret, load_zookeeper_password
from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.protocol import Store
from flwr_ha.errors import ConfigError
from flwr_ha.replica.agent import Agent, Life, MakeLife
from flwr_ha.replica.api import create_api
from flwr_ha.replica.apiserver import ApiServer, bind
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.replica.clusterview import running_replicas
from flwr_ha.replica.dashboard import page_routes
from flwr_ha.replica.duties import Tools
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.headers import BrowserHeaders, api_origins
from flwr_ha.replica.holdings import Holdings, Storage
from flwr_ha.replica.machine import Timing
from flwr_ha.replica.messages import StopAsked
from flwr_ha.replica.metrics import Meter, make_meter
from flwr_ha.replica.replica import Replica
from flwr_ha.replica.restarts import growing_pause_s
from flwr_ha.replica.scrub import Scrubber
from flwr_ha.replica.sessionapi import session_routes
from flwr_ha.replica.sharedstore import SharedStoreCollector
from flwr_ha.settings import Endpoint, SessionSettings, Settings, TlsSettings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.objectstore import ObjectStorage
from flwr_ha.storage.replication import Peer, Replicator
from flwr_ha.superlink import events, linkstate
from flwr_ha.superlink.process import SuperLinkProcess
from flwr_ha.superlink.settings import SuperLinkSettings, TlsFiles
from flwr_ha.tls import check_server_files, peer_context

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 15.0
PORT_PATIENCE_S = 3.0
PULSES_PER_LEASE = 6
LOOK_AGAIN_S = 0.2
ACT_AGAIN_S, LONGEST_ACT_PAUSE_S = 1.0, 60.0


def run_replica(settings: Settings, replica_id: int, *, when_leading: Callable[[Life], bool] | None = None) -> None:
    """Run a replica until SIGTERM or SIGINT, which hand the leadership over.

    Parameters
    ----------
    settings : Settings
        Of the cluster.
    replica_id : int
        Which of its replicas this process is.
    when_leading : callable, optional
        Called in a thread of its own each time this replica has begun to serve, once a majority of replicas runs
        and could keep what it does; False: call it again later.

    Raises
    ------
    ConfigError
        A setting, a file or a port is not as it must be; the sentence names it.
    CoordinationError
        The coordinator cannot be reached.
    """
    failpoints.arm(failpoint_from_environment())
    own = settings.replica(replica_id)
    linkstate.check_flower()
    check_server_files(settings.tls)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_locked_folder(settings, replica_id))
        secret = load_secret(settings)
        server = stack.enter_context(ApiServer(own.api, tls=settings.tls))
        blobs = BlobStore(folder / "store")
        meter = make_meter()
        event_log = EventLog(folder / "events.jsonl", replica_id=replica_id, on_event=meter.on_event)
        store = make_store(settings)
        stack.callback(store.close)
        wake = threading.Event()
        store.start(wake.set, timeout_s=CONNECT_TIMEOUT_S)
        coordinator = Coordinator(store, replica_id=replica_id, instance=secrets.token_hex(8))
        identity = "" if settings.storage == "replicas" else coordinator.identity()
        storage = stack.enter_context(_make_storage(settings, replica_id, blobs, secret, meter, identity))
        tools = Tools(
            replica_id=replica_id,
            needed_copies=settings.majority - 1 if settings.storage == "replicas" else 0,
            store=blobs,
            storage=storage,
            holdings=Holdings(blobs, storage, coordinator, keep_checkpoints=settings.keep_checkpoints),
            coordinator=coordinator,
            events=event_log,
            meter=meter,
        )
        # ServerApps come over a listener of their own: on loopback, without TLS, not to be seen from the network.
        session_server = stack.enter_context(ApiServer(Endpoint("127.0.0.1", 0), tls=TlsSettings()))
        make_life = _life_maker(settings, folder, f"http://127.0.0.1:{session_server.port}")
        agent = Agent(own, tools, make_life, proven_until=store.proven_until, timing=Timing())
        replica = Replica(settings, agent, tools, wake=wake, pulse_s=store.lease_s / PULSES_PER_LEASE)
        if when_leading is not None:
            agent.when_leading = partial(act_when_safe, when_leading, agent, replica, tools.needed_copies)
        coordinator.join(replica.record(), wait_timeout_s=store.session_timeout_s + 2.0)
        _check_public_address(own.address, coordinator)
        routes, upgrades = blob_api(blobs, secret=secret, max_bytes=settings.max_blob_bytes)
        api = create_api(replica, secret=secret, routes=[*routes, *page_routes()])
        server.start(BrowserHeaders(api, api_origins(settings)), upgrades=upgrades)
        session_server.start(Starlette(routes=session_routes(replica)))
        stack.enter_context(_signals(agent))
        stack.enter_context(replica)
        stack.enter_context(Scrubber(blobs, storage, event_log))
        if isinstance(storage, ObjectStorage):
            collector = SharedStoreCollector(
                storage,
                tools.holdings,
                identity=identity,
                read_identity=coordinator.identity,
                is_leader=replica.is_leader,
                events=event_log,
            )
            stack.enter_context(collector)
        event_log.add("start", f"replica {replica_id} of cluster {settings.cluster} starts, API on {own.api}")
        agent.run()


def act_when_safe(act: Callable[[Life], bool], agent: Agent, replica: Replica, needed_copies: int, life: Life) -> None:
    """Do what is to be done in this leadership when it can be made safe, and again until it has succeeded."""
    failures, is_told = 0, False
    while agent.life is life:
        running = len(running_replicas(replica.pulse.sight.view))
        if running <= needed_copies:
            if not is_told:
                log.info("nothing is submitted yet: %d of %d needed replicas run", running, needed_copies + 1)
                is_told = True
            time.sleep(LOOK_AGAIN_S)
        elif act(life):
            return
        else:
            time.sleep(growing_pause_s(failures, first_s=ACT_AGAIN_S, factor=2.0, longest_s=LONGEST_ACT_PAUSE_S))
            failures += 1


@contextlib.contextmanager
def _locked_folder(settings: Settings, replica_id: int) -> Iterator[Path]:
    """Own the replica's folder: two processes with one id would overwrite each other."""
    folder = settings.replica_dir(replica_id)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"data-dir: {str(folder)!r} cannot be used: {error.strerror}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise ConfigError(f"--id {replica_id}: replica {replica_id} is already running in {str(folder)!r}") from None
    finally:
        os.close(handle)


def make_store(settings: Settings) -> Store:
    """Return the store that the coordinator setting names; it is not started."""
    if settings.is_embedded:
        from flwr_ha.coordination.embedded import EmbeddedStore

        return EmbeddedStore(settings.coordinator_folder, session_timeout_s=settings.session_timeout_s)
    from flwr_ha.coordination.zookeeper import ZooKeeperStore

    return ZooKeeperStore(
        settings.zookeeper_hosts,
        f"/flwr-ha/{settings.cluster}",
        session_timeout_s=settings.session_timeout_s,
        security=settings.zookeeper,
        password=load_zookeeper_password(settings),
    )


@contextlib.contextmanager
def _make_storage(
    settings: Settings, replica_id: int, blobs: BlobStore, secret: str, meter: Meter, identity: str
) -> Iterator[Storage]:
    if settings.storage != "replicas":
        with ObjectStorage(settings.shared_url(identity), blobs) as objects:
            yield objects
        return
    peers = [Peer(replica.id, str(replica.api)) for replica in settings.replicas if replica.id != replica_id]
    with Replicator(blobs, peers, secret=secret, tls=peer_context(settings.tls)) as replicator:
        replicator.on_push = meter.on_push
        yield replicator


def _life_maker(settings: Settings, folder: Path, session_url: str) -> MakeLife:
    """Return what makes one life of the SuperLink after the other; databases of earlier ones are removed."""
    tls = settings.tls
    files = TlsFiles(cert=tls.cert, key=tls.key) if tls.cert is not None and tls.key is not None else None

    def make(on_event: Callable[[events.Event], None]) -> Life:
        token = secrets.token_urlsafe(32)
        lives = folder / "superlink"
        shutil.rmtree(lives, ignore_errors=True)
        database = lives / secrets.token_hex(8) / "state.db"
        superlink = SuperLinkProcess(
            SuperLinkSettings(
                database=database,
                log_file=folder / "superlink.log",
                app_env=SessionSettings(session_url, token).to_environment(),
                tls=files,
                has_supernode_auth=settings.enable_supernode_auth,
            ),
            on_event=on_event,
        )
        return Life(superlink=superlink, database=database, token=token)

    return make


def _check_public_address(address: Endpoint, coordinator: Coordinator) -> None:
    """Refuse to start where a foreign process holds the public port; a leader of this cluster may."""
    deadline_s = time.monotonic() + PORT_PATIENCE_S
    while coordinator.leader() is None:
        try:
            bind(address, setting="address").close()
            return
        except ConfigError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def _signals(agent: Agent) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into an orderly stop."""

    def stop(number: int, _: object) -> None:
        agent.post(StopAsked(f"{signal.Signals(number).name} was received"))

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
