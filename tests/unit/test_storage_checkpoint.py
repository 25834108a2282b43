"""Checkpoints come back bit for bit, or not at all."""

import hashlib
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import PART_BYTES, Checkpoint, load, model_digest, references, save
from flwr_ha.storage.digests import BlobCorruptError, BlobMissingError
from flwr_ha.storage.export import export

LARGE = np.arange(PART_BYTES // 4, dtype=np.float32)


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "store")


def checkpoint(arrays=None, **changes):
    return Checkpoint(**{"run_id": "17", "server_round": 3, "num_rounds": 8, "arrays": arrays or {}, **changes})


def assert_same(left, right):
    assert list(left) == list(right)
    for name, array in left.items():
        other = right[name]
        assert (array.dtype, array.shape, array.tobytes()) == (other.dtype, other.shape, other.tobytes()), name


SCALARS = st.one_of(
    hnp.scalar_dtypes(),
    hnp.unicode_string_dtypes(max_len=5),
    hnp.byte_string_dtypes(max_len=5),
    hnp.complex_number_dtypes(),
    hnp.floating_dtypes(endianness=">"),
)
DTYPES = st.one_of(SCALARS, hnp.array_dtypes(SCALARS, max_size=3, allow_subarrays=True))
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)


@st.composite
def any_array(draw):
    """Draw any dtype and shape, 0-d and empty ones too, contiguous or not."""
    dtype, shape = draw(DTYPES), draw(SHAPES)
    count = math.prod(shape) * dtype.itemsize
    data = draw(st.randoms(use_true_random=False)).randbytes(count)
    if dtype.kind == "U":  # any bytes are not Unicode
        return np.full(shape, "aé𝄞"[: dtype.itemsize // 4], dtype)
    array = np.ndarray(shape, dtype, data) if count else np.zeros(shape, dtype)
    return draw(
        st.sampled_from(
            [
                array,
                np.asfortranarray(array) if array.ndim else array,
                array[..., ::-1][..., ::2] if array.ndim else array,
                array.T,
            ]
        )
    )


@settings(max_examples=60, deadline=None)
@given(arrays=st.dictionaries(NAMES, any_array(), max_size=3))
def test_every_array_comes_back_bit_for_bit(tmp_path_factory, arrays):
    """Names, order, dtypes, shapes, bytes; whatever the layout in memory was."""
    store = BlobStore(tmp_path_factory.mktemp("store"))
    saved = save(checkpoint(arrays, strategy_arrays=arrays), store)
    loaded = load(saved.digest, store)
    assert_same(loaded.arrays, arrays)
    assert_same(loaded.strategy_arrays, arrays)
    assert saved.model_digest == model_digest(arrays) == model_digest(loaded.arrays)
    assert all(array.flags.writeable and array.flags.aligned for array in loaded.arrays.values())
    with safe_open(store.path(saved.digest), "np") as file:
        assert sorted(file.keys()) == sorted(f"{g}/{n}" for g in ("arrays", "strategy_arrays") for n in arrays)


@pytest.mark.parametrize(
    "dtype", ["<f4", ">f4", "<c16", "<U7", "|b1", "<M8[ns]", "<f2", "|S3", [("a", "<f4", (2,)), ("b", ">i2")]]
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_large_arrays_of_every_dtype_come_back_from_parts(store, dtype, order):
    """What is stored in a blob of its own is as exact as what is stored inline."""
    dtype = np.dtype(dtype)
    rows = 2 * PART_BYTES // dtype.itemsize // 2
    array = np.zeros((rows, 2), dtype, order)
    if dtype.kind in "fcbM":
        array[:] = (np.arange(rows * 2) % 1000).reshape(rows, 2)
    saved = save(checkpoint({"large": array}), store)
    assert len(saved.parts) == 1
    loaded = load(saved.digest, store)
    assert_same(loaded.arrays, {"large": array})
    loaded.arrays["large"][:1] = loaded.arrays["large"][1:2]


def test_small_file_is_readable_with_the_safetensors_library(store):
    """The main blob is a valid file of a known format: nobody needs flwr_ha to look into it."""
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "b": np.float16(3.5).reshape(()),
        "c": np.zeros((0, 4), bool),
    }
    saved = save(checkpoint(arrays), store)
    assert_same(
        {f"arrays/{k}": v for k, v in arrays.items()}, dict(sorted(load_file(store.path(saved.digest)).items()))
    )
    with safe_open(store.path(saved.digest), "np") as file:
        assert json.loads(file.metadata()["flwr_ha"])["server_round"] == 3


def test_digests_of_equal_checkpoints_are_equal(tmp_path):
    """Two replicas, two runs, one result: the names can be compared; and they never change."""
    arrays = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "large": LARGE}
    one = save(checkpoint(arrays, state={"lr": 0.1}), BlobStore(tmp_path / "one"))
    two = save(
        checkpoint({k: np.asfortranarray(v) for k, v in arrays.items()}, state={"lr": 0.1}), BlobStore(tmp_path / "two")
    )
    assert one == two
    assert one.digest == "sha256:099a428afd7c99a5db5599548affd42eede67524d00a887a4bd70778ceba4042"
    assert one.model_digest == "sha256:755b40a365fb71cb7562e786b7f1dec2808c30c9b3558ddc3c980d22943ab3fe"


def test_model_digest_follows_its_definition():
    """Length-prefixed JSON of name, dtype, shape and digest of the bytes, one array after the other."""
    arrays = {"é": np.arange(6, dtype="<i2").reshape(2, 3), "b": np.array(1.5)}
    sha = hashlib.sha256()
    for name, dtype, shape, data in [
        ("\\u00e9", "<i2", "[2,3]", bytes([0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0])),
        ("b", "<f8", "[]", np.array(1.5).tobytes()),
    ]:
        line = f'["{name}","{dtype}",{shape},"sha256:{hashlib.sha256(data).hexdigest()}"]'.encode()
        sha.update(len(line).to_bytes(8, "little") + line)
    assert model_digest(arrays) == f"sha256:{sha.hexdigest()}"


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.zeros(4, "f4")},
        {"a": np.zeros(4, "i4")},
        {"a": np.zeros((2, 2), "f4")},
        {"a": np.full(4, -0.0, "f4")},
        {"a": np.zeros(2, "f4"), "b": np.zeros(2, "f4")},
    ],
)
def test_model_digest_sees_every_difference(other):
    """Name, dtype, shape, bytes, and how they are divided."""
    assert model_digest(other) != model_digest({"a": np.zeros(4, "f4")})


def test_model_digest_sees_the_order():
    """Strategies hand arrays over by position as well."""
    assert model_digest({"a": LARGE, "b": LARGE}) != model_digest({"b": LARGE, "a": LARGE})


def test_model_digest_does_not_depend_on_the_round(store):
    """Two runs can be compared although their ids, rounds and states differ."""
    one = save(checkpoint({"w": LARGE}), store)
    two = save(
        checkpoint({"w": LARGE}, run_id="18", server_round=4, state={"x": 1}, strategy_arrays={"m": LARGE}), store
    )
    assert one.model_digest == two.model_digest
    assert one.digest != two.digest


floats = st.floats(allow_nan=True, allow_infinity=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=40, deadline=None)
@given(state=st.dictionaries(st.text(), json_values, max_size=4))
def test_state_and_history_come_back_exactly(tmp_path_factory, state):
    """Every float to its last bit, NaN and infinity, any text, and the order of the keys."""
    store = BlobStore(tmp_path_factory.mktemp("store"))
    loaded = load(save(checkpoint(state=state, history={"rounds": state}), store).digest, store)
    assert repr(loaded.state) == repr(state)
    assert repr(loaded.history) == repr({"rounds": state})
    assert (loaded.run_id, loaded.server_round, loaded.num_rounds) == ("17", 3, 8)


def test_unchanged_array_is_neither_stored_nor_named_anew(store):
    """A frozen layer costs nothing from round to round; a changed one is a new part."""
    first = save(checkpoint({"frozen": LARGE, "head": LARGE + 1}), store)
    part = store.path(first.parts[0])
    before = part.stat()
    second = save(checkpoint({"frozen": LARGE, "head": LARGE + 2}, server_round=4), store)
    assert second.parts[0] == first.parts[0]
    assert second.parts[1] != first.parts[1]
    assert (part.stat().st_ino, part.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert len(store.digests()) == 5


def test_parts_and_sizes_are_counted_once(store):
    """Two equal arrays are one part."""
    saved = save(
        checkpoint({"a": LARGE, "b": LARGE.copy(), "c": LARGE.reshape(2, -1)}, strategy_arrays={"a": LARGE}), store
    )
    assert len(saved.parts) == 1
    assert saved.size_bytes == sum(store.size(digest) for digest in store.digests())
    assert references(saved.digest, store) == saved.parts
    assert load(saved.digest, store).arrays["c"].shape == (2, LARGE.size // 2)


def test_arrays_just_below_the_limit_stay_inline(store):
    """256 KiB is the first size with a blob of its own."""
    assert save(checkpoint({"a": np.zeros(PART_BYTES - 1, np.uint8)}), store).parts == ()
    assert len(save(checkpoint({"a": np.zeros(PART_BYTES, np.uint8)}), store).parts) == 1


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"arrays": {"x": np.array([object()])}}, "'arrays/x'.*object"),
        ({"arrays": {"x": np.array([(1, None)], [("a", "i4"), ("b", "O")])}}, "'arrays/x'"),
        ({"arrays": {"x": np.array(["a"], np.dtypes.StringDType())}}, "'arrays/x'"),
        ({"arrays": {"\ud800": np.zeros(1)}}, "cannot name an array"),
        ({"state": {"x": object()}}, "not JSON serializable"),
        ({"state": {1: "a", "1": "b"}}, "a key comes twice"),
        ({"history": {"x": {1, 2}}}, "state or history"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_named(store, bad, match):
    """Nothing is silently changed or pickled."""
    with pytest.raises(CheckpointError, match=match):
        save(checkpoint(**bad), store)


def rewritten(store, digest, change):
    """Store a main blob with a changed header, consistent in itself, and return its digest."""
    data = store.read(digest)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["flwr_ha"])
    change(header, inner)
    header["__metadata__"]["flwr_ha"] = json.dumps(inner)
    text = json.dumps(header).encode()
    return store.put(len(text).to_bytes(8, "little") + text + data[8 + length :])


def test_newer_format_is_refused_with_a_hint(store):
    """A rollback of the software must say what is wrong, not that the file is corrupt."""
    digest = save(checkpoint(), store).digest
    newer = rewritten(store, digest, lambda header, inner: inner.update(format=2, order={"other": 1}))
    with pytest.raises(CheckpointError, match=r"newer flwr_ha \(format 2, this one reads up to 1\)") as caught:
        load(newer, store)
    assert not isinstance(caught.value, CheckpointCorruptError)


def _swap_offsets(header, inner):
    header["arrays/a"]["data_offsets"] = [0, 8]
    header["arrays/b"]["data_offsets"] = [4, 12]


@pytest.mark.parametrize(
    "change",
    [
        lambda h, i: h["arrays/a"].update(shape=[-2, -1]),
        lambda h, i: h["arrays/a"].update(shape=[2.0]),
        lambda h, i: h["arrays/a"].update(shape=[True, 2]),
        lambda h, i: h["arrays/a"].update(shape=[2**70]),
        lambda h, i: h["arrays/a"].update(shape=[1] * 65),
        lambda h, i: h["arrays/a"].update(shape="2"),
        lambda h, i: h["arrays/a"].update(dtype="F128"),
        lambda h, i: h["arrays/a"].update(dtype=7),
        lambda h, i: h["arrays/a"].update(data_offsets=[0]),
        lambda h, i: h["arrays/a"].update(data_offsets=[8, 0]),
        lambda h, i: h["arrays/a"].pop("dtype"),
        _swap_offsets,
        lambda h, i: h["arrays/b"].update(data_offsets=[12, 20]),
        lambda h, i: h.update({"__metadata__": {"flwr_ha": "", "other": 1}}),
        lambda h, i: i.update(format="1"),
        lambda h, i: i.update(format=0),
        lambda h, i: i.pop("state"),
        lambda h, i: i.update(state=[]),
        lambda h, i: i.update(server_round="3"),
        lambda h, i: i.update(order=["arrays/a"]),
        lambda h, i: i.update(order=["arrays/a", "arrays/a", "arrays/b", "arrays/large", "arrays/raw"]),
        lambda h, i: i.update(order=["a", "b"]),
        lambda h, i: i.update(order=[["arrays/a"]]),
        lambda h, i: i["parts"][0].update(digest="sha256:../../etc/passwd"),
        lambda h, i: i["parts"][0].update(digest=7),
        lambda h, i: i["parts"][0].update(digest=""),
        lambda h, i: i["parts"][0].update(shape=[2**40]),
        lambda h, i: i["parts"][0].update(shape=[-1]),
        lambda h, i: i["parts"][0].update(dtype="|O", shape=[LARGE.nbytes // 8]),
        lambda h, i: i["parts"][0].update(dtype="nonsense"),
        lambda h, i: i["parts"][0].update(dtype=[["a", "|O"]]),
        lambda h, i: i["parts"][0].update(dtype=[1, 2, 3]),
        lambda h, i: i["parts"][0].update(dtype={"a": 1}),
        lambda h, i: i["parts"][0].update(dtype=None),
        lambda h, i: i["parts"][0].update(name="arrays/a"),
        lambda h, i: i["parts"].append(i["parts"][0]),
        lambda h, i: i["raw"][0].update(shape=[3]),
        lambda h, i: i["raw"][0].update(name="arrays/none"),
    ],
)
def test_hostile_header_is_refused(store, change):
    """A blob with the right digest may still be made by an enemy: no crash, no memory, no other file."""
    arrays = {"a": np.zeros(1, "f8"), "b": np.zeros(1, "f8"), "raw": np.zeros(2, "c8"), "large": LARGE}
    good = save(checkpoint(arrays), store).digest
    assert_same(load(rewritten(store, good, lambda header, inner: None), store).arrays, arrays)
    digest = rewritten(store, good, change)
    with pytest.raises(CheckpointCorruptError):
        load(digest, store)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}trailing",
        (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
        (30).to_bytes(8, "little") + b'{"a":{},"a":{}}'.ljust(30),
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        b"PK\x03\x04" + os.urandom(100),
    ],
)
def test_blob_that_is_no_checkpoint_is_refused(store, data):
    """Any bytes may lie under a digest."""
    digest = store.put(data)
    with pytest.raises(CheckpointCorruptError, match=digest):
        load(digest, store)
    with pytest.raises(CheckpointCorruptError):
        references(digest, store)


@pytest.mark.parametrize("which", ["main", "part"])
@pytest.mark.parametrize("damage", ["flip-first", "flip-middle", "flip-last", "truncate", "remove"])
def test_damage_anywhere_is_noticed_and_named(store, which, damage):
    """Load names the blob to be fetched; with a good copy of it the checkpoint loads again."""
    saved = save(checkpoint({"a": np.arange(100), "large": LARGE}), store)
    digest = saved.digest if which == "main" else saved.parts[0]
    path = store.path(digest)
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        position = {"flip-first": 0, "flip-middle": len(data) // 2, "flip-last": len(data) - 1}[damage]
        path.write_bytes(data[:position] + bytes([data[position] ^ 128]) + data[position + 1 :])

    fresh = BlobStore(store.root)
    with pytest.raises(CheckpointCorruptError) as caught:
        load(saved.digest, fresh)
    kind = BlobMissingError if damage == "remove" else (BlobCorruptError, CheckpointCorruptError)
    assert isinstance(caught.value, kind)
    if damage != "truncate":
        assert caught.value.digest == digest
    fresh.delete(digest)
    fresh.put(data)
    assert_same(load(saved.digest, fresh).arrays, {"a": np.arange(100), "large": LARGE})


def test_export_is_a_plain_safetensors_file(store, tmp_path):
    """Any other program reads the model under its own names, in its order of bytes."""
    arrays = {
        "conv.weight": LARGE.reshape(4, -1),
        "bias": np.arange(3, dtype=">f4"),
        "scale": np.float64(2).reshape(()),
        "z": np.array([1 + 2j]),
        "empty": np.zeros((0, 2), np.int8),
    }
    saved = save(checkpoint(arrays, strategy_arrays={"momentum": LARGE}), store)
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"older")
    export(saved.digest, store, out)
    exported = load_file(out)
    assert sorted(exported) == sorted(arrays)
    assert_same({"w": exported["conv.weight"]}, {"w": arrays["conv.weight"]})
    assert exported["bias"].dtype == "<f4"
    assert np.array_equal(exported["bias"], arrays["bias"])
    assert exported["z"].tobytes() == arrays["z"].tobytes()
    with safe_open(out, "np") as file:
        assert file.metadata()["server_round"] == "3"
        assert json.loads(file.metadata()["flwr_ha.raw"]) == {"z": {"dtype": "<c16", "shape": [1]}}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "store"]
    save_file(exported, tmp_path / "again.safetensors")


def test_export_refuses_the_reserved_name(store, tmp_path):
    """The library cannot have a tensor of that name; the checkpoint itself can."""
    saved = save(checkpoint({"__metadata__": np.zeros(3)}), store)
    assert load(saved.digest, store).arrays["__metadata__"].shape == (3,)
    with pytest.raises(CheckpointError, match="__metadata__"):
        export(saved.digest, store, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere"):
        export(save(checkpoint(), store).digest, store, tmp_path / "nowhere" / "out")


def test_agent_reads_references_without_numpy(store):
    """The replica process stays light."""
    saved = save(checkpoint({"large": LARGE}), store)
    code = (
        "import sys; from pathlib import Path\n"
        "from flwr_ha.storage import blobserver, checkpoint, replication\n"
        "print(checkpoint.references(sys.argv[2], checkpoint.BlobStore(Path(sys.argv[1])))[0])\n"
        "assert 'numpy' not in sys.modules and 'flwr' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(store.root), saved.digest]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == saved.parts[0]


def test_checkpoint_that_nobody_could_read_is_not_written(store, monkeypatch):
    """A strategy may keep gigabytes of plain values; the round must not count, or the run could never go on."""
    monkeypatch.setattr("flwr_ha.storage.tensorfile.MAX_HEADER_BYTES", 2000)
    assert load(save(checkpoint(state={"losses": [0.5] * 10}), store).digest, store).state == {"losses": [0.5] * 10}
    before = store.digests()
    with pytest.raises(CheckpointError, match="let the strategy keep what is big in arrays"):
        save(checkpoint(state={"losses": [0.5] * 1000}), store)
    assert store.digests() == before
