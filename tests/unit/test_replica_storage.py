"""Which storage a replica is put together with."""

from pathlib import Path

from flwr_ha.replica.main import _make_storage
from flwr_ha.replica.metrics import NoMeter
from flwr_ha.settings import Endpoint, ReplicaSettings, Settings
from flwr_ha.storage.blobs import BlobStore


def _settings(folder: Path, storage: str) -> Settings:
    replicas = tuple(
        ReplicaSettings(id=i, address=Endpoint("127.0.0.1", 8000), api=Endpoint("127.0.0.1", 8010 + i))
        for i in range(3)
    )
    return Settings(cluster="c", coordinator=f"embedded:{folder}", data_dir=folder, replicas=replicas, storage=storage)


def test_a_shared_folder_takes_the_copies(tmp_path: Path) -> None:
    """`storage = "file://…"`: what one replica protects there, another one gets back."""
    settings = _settings(tmp_path, f"file://{tmp_path / 'shared'}")
    mine, others = BlobStore(tmp_path / "mine"), BlobStore(tmp_path / "others")
    digest = mine.put(b"a checkpoint")

    with _make_storage(settings, 0, mine, "s", NoMeter(), "identity") as storage:
        storage.protect([digest], needed=0, timeout_s=10.0)
    with _make_storage(settings, 1, others, "s", NoMeter(), "identity") as storage:
        storage.fetch([digest], timeout_s=10.0)

    assert others.read(digest) == b"a checkpoint"
    assert list((tmp_path / "shared" / "c" / "identity" / "blobs").iterdir()) != []
