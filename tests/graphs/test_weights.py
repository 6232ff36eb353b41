from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from v4export import presets
from v4export.checkpoint.audit import Audit, Weight, audit
from v4export.checkpoint.formats import dequantize_blocks, dequantize_fp4, quantize_blocks, quantize_fp4
from v4export.checkpoint.index import Checkpoint
from v4export.checkpoint.synth import synth
from v4export.checkpoint.tensor import DTYPES, StoredTensor, read_header
from v4export.errors import BadInput, NotSupported
from v4export.graphs import shards
from v4export.graphs import weights as module
from v4export.graphs.shards import Placed, numpy_dtype
from v4export.graphs.weights import Placement, place
from v4export.precision import PRECISIONS
from v4export.verify.rounded import as_the_graph_holds, is_converted

SPELLING = {dtype: spelling for spelling, dtype in DTYPES.items()}


def placed_bytes(out: Path, placed: Placed) -> bytes:
    """What a runtime would read."""
    with open(out / placed.location, "rb") as file:
        file.seek(placed.offset)
        return file.read(placed.nbytes)


def placed_values(out: Path, placed: Placed) -> np.ndarray:
    if placed.dtype == "float4_e2m1fn":
        packed = np.frombuffer(placed_bytes(out, placed), np.uint8)
        halves = np.stack([packed & 15, packed >> 4], axis=1).view(numpy_dtype(placed.dtype))
        return halves.astype(np.float32).reshape(placed.shape)
    return np.frombuffer(placed_bytes(out, placed), numpy_dtype(placed.dtype)).reshape(placed.shape)


def save(file: Path, arrays: dict[str, np.ndarray]) -> dict[str, StoredTensor]:
    """A safetensors file and its tensors."""
    entries, at = {}, 0
    for name, array in arrays.items():
        offsets = [at, at + array.nbytes]
        entries[name] = {"dtype": SPELLING[array.dtype], "shape": list(array.shape), "data_offsets": offsets}
        at += array.nbytes
    header = json.dumps(entries).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return read_header(file)[1]


def one_weight(
    folder: Path, array: np.ndarray, role: str = "linear", scale: np.ndarray | None = None, block=(128, 128)
) -> Weight:
    arrays = {"w": array} | ({} if scale is None else {"w_scale_inv": scale})
    folder.mkdir(exist_ok=True)
    tensors = save(folder / "shard.safetensors", arrays)
    shape = (array.shape[0], 2 * array.shape[1]) if block == (1, 32) else array.shape
    return Weight("w", shape, role, tensors["w"], tensors.get("w_scale_inv"), block)


@pytest.fixture(scope="module")
def fp8_checkpoint(tmp_path_factory) -> Path:
    return synth(presets.load("tiny-v3.1"), tmp_path_factory.mktemp("hub") / "tiny-v3.1")


def audited(folder: Path) -> Audit:
    return audit(Checkpoint.open(folder), scan_values=False)


def check_pointed(account: Audit, placement: Placement, out: Path, exempt=frozenset()) -> None:
    """Every weight's bytes are the checkpoint's own, at the checkpoint's own place in the file."""
    for name, weight in account.weights.items():
        if name in exempt:
            continue
        found = placement.tensors[name]
        assert placed_bytes(out, found) == weight.data.read().tobytes(), name
        assert (found.offset, found.nbytes, found.shape) == (weight.data.offset, weight.data.nbytes, weight.shape)
        assert SPELLING[numpy_dtype(found.dtype)] == weight.data.dtype


@pytest.mark.parametrize("copy", [False, True], ids=["link", "copy"])
def test_right_bytes_are_pointed_at(tiny_checkpoint, tmp_path, copy):
    account = audited(tiny_checkpoint)
    placement = place(account.weights.values(), PRECISIONS["bf16"], tmp_path, copy=copy)
    check_pointed(account, placement, tmp_path)
    assert placement.written_bytes == 0 and placement.linked == ("model.safetensors",)
    assert placement.pointed_bytes == sum(w.data.nbytes for w in account.weights.values())
    assert [f.name for f in (tmp_path / "weights").iterdir()] == ["model.safetensors"]
    ours, theirs = tmp_path / "weights" / "model.safetensors", tiny_checkpoint / "model.safetensors"
    assert ours.read_bytes() == theirs.read_bytes() and not ours.is_symlink()
    if copy:
        assert not ours.samefile(theirs)
    elif ours.stat().st_dev == theirs.stat().st_dev:
        assert ours.samefile(theirs)


def test_a_copy_where_the_file_system_cannot_link(tiny_checkpoint, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(module.os, "link", refuse)
    account = audited(tiny_checkpoint)
    check_pointed(account, place(account.weights.values(), PRECISIONS["bf16"], tmp_path), tmp_path)


def test_symbolic_links_are_followed(tiny_checkpoint, tmp_path):
    """The Hub's cache is a folder of symbolic links; onnxruntime follows none."""
    hub, blobs = tmp_path / "model" / "snapshots" / "main", tmp_path / "model" / "blobs"
    hub.mkdir(parents=True)
    shutil.copytree(tiny_checkpoint, blobs)
    for file in blobs.iterdir():
        (hub / file.name).symlink_to(file)
    placement = place(audited(hub).weights.values(), PRECISIONS["bf16"], tmp_path / "out")
    assert placement.written_bytes == 0
    assert not any(f.is_symlink() for f in (tmp_path / "out" / "weights").iterdir())


def test_fp8_passes_bit_for_bit(fp8_checkpoint, tmp_path):
    account = audited(fp8_checkpoint)
    placement = place(account.weights.values(), PRECISIONS["fp8"], tmp_path)
    assert placement.written_bytes == 0
    check_pointed(account, placement, tmp_path)
    scaled = [w for w in account.weights.values() if w.scale]
    assert scaled
    for weight in scaled:
        assert placed_bytes(tmp_path, placement.tensors[weight.name + "_scale_inv"]) == weight.scale.read().tobytes()


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_fp8_is_dequantised(fp8_checkpoint, tmp_path, precision):
    account = audited(fp8_checkpoint)
    placement = place(account.weights.values(), PRECISIONS[precision], tmp_path)
    for name, weight in account.weights.items():
        dtype = PRECISIONS[precision].format_of(name, weight.role).dtype
        found = placement.tensors[name]
        assert found.dtype == dtype
        np.testing.assert_array_equal(placed_values(tmp_path, found), weight.decode().astype(numpy_dtype(dtype)), name)
    assert not any(name.endswith("_scale_inv") for name in placement.tensors)


def test_wider_type_is_written_once(tiny_checkpoint, tmp_path):
    account, done = audited(tiny_checkpoint), []
    placement = place(account.weights.values(), PRECISIONS["fp32"], tmp_path, advance=done.append)
    for name, weight in account.weights.items():
        assert placement.tensors[name].dtype == "float32"
        np.testing.assert_array_equal(placed_values(tmp_path, placement.tensors[name]), weight.decode(), name)
    biases = sum(w.data.nbytes for w in account.weights.values() if w.role == "router_bias")
    total = sum(4 * w.data.nbytes // w.data.numpy().itemsize for w in account.weights.values())
    assert placement.pointed_bytes == biases > 0, "stored in float32 already"
    assert placement.written_bytes == sum(done) == total - biases
    written = {name: t for name, t in read_header(tmp_path / "weights" / "converted-00001.safetensors")[1].items()}
    assert {name: (t.offset, t.shape) for name, t in written.items()} == {
        name: (t.offset, t.shape) for name, t in placement.tensors.items() if "converted" in t.location
    }


def test_quantised_as_the_format_says(tiny_checkpoint, tmp_path):
    account = audited(tiny_checkpoint)
    placement = place(account.weights.values(), PRECISIONS["fp8"], tmp_path)
    narrow = [w for w in account.weights.values() if w.role in ("linear", "expert")]
    for weight in narrow:
        w8, scale = quantize_blocks(weight.decode())
        assert placed_bytes(tmp_path, placement.tensors[weight.name]) == w8.tobytes()
        assert placed_bytes(tmp_path, placement.tensors[weight.name + "_scale_inv"]) == scale.tobytes()
    check_pointed(account, placement, tmp_path, exempt={w.name for w in narrow})


def test_windows_do_not_show(tmp_path):
    """A matrix of more rows than are converted at a time, its last block ragged."""
    array = np.random.default_rng(0).normal(size=(2 * module._WINDOW_ROWS + 70, 130)).astype(np.float32)
    placement = place([one_weight(tmp_path, array)], PRECISIONS["fp8"], tmp_path / "out")
    w8, scale = quantize_blocks(array)
    assert placed_bytes(tmp_path / "out", placement.tensors["w"]) == w8.tobytes()
    assert placed_bytes(tmp_path / "out", placement.tensors["w_scale_inv"]) == scale.tobytes()
    (tmp_path / "two").mkdir()
    back = place([one_weight(tmp_path / "two", w8, scale=scale)], PRECISIONS["fp32"], tmp_path / "back")
    wanted = dequantize_blocks(w8, scale, (128, 128))
    np.testing.assert_array_equal(placed_values(tmp_path / "back", back.tensors["w"]), wanted)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e8m0fnu])
def test_narrow_multipliers_are_widened(tmp_path, dtype):
    """The matrix is still pointed at; only its multipliers are written."""
    w8 = (np.random.default_rng(0).normal(size=(130, 140)) * 100).astype(ml_dtypes.float8_e4m3fn)
    scale = np.array([[0.5, 2], [4, 0.25]]).astype(dtype)
    weight = one_weight(tmp_path, w8, scale=scale)
    placement = place([weight], PRECISIONS["fp8"], tmp_path / "out")
    assert placement.tensors["w"].offset == weight.data.offset and placement.written_bytes == 16
    found = placed_values(tmp_path / "out", placement.tensors["w_scale_inv"])
    assert found.dtype == np.float32 and found.tolist() == [[0.5, 2], [4, 0.25]]


def test_overflow_is_an_error_that_names_the_tensor(tmp_path):
    array = np.array([[1.0, -70000.0]], np.float32)
    with pytest.raises(BadInput, match=r"w does not fit float16\n.*70000"):
        place([one_weight(tmp_path, array)], PRECISIONS["fp16"], tmp_path / "out")
    fits = place([one_weight(tmp_path, array)], PRECISIONS["bf16"], tmp_path / "fits")
    assert placed_values(tmp_path / "fits", fits.tensors["w"]).tolist() == array.astype(ml_dtypes.bfloat16).tolist()


def test_rounding_is_to_nearest_even(tmp_path):
    array = np.array([[1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16]], np.float32)
    placement = place([one_weight(tmp_path, array)], PRECISIONS["bf16"], tmp_path / "out")
    assert placed_values(tmp_path / "out", placement.tensors["w"]).astype(float).tolist() == [
        [1.0, 1 + 2**-6, 1 + 2**-7]
    ]


def test_router_bias_stays_wide(tmp_path):
    array = np.array([0.1, -0.2], np.float32)
    for precision in PRECISIONS:
        out = tmp_path / precision
        placement = place([one_weight(tmp_path, array, "router_bias")], PRECISIONS[precision], out)
        assert placement.written_bytes == 0 and placed_values(out, placement.tensors["w"]).tolist() == array.tolist()


def test_fused_experts_are_pointed_at_as_slices(tiny_checkpoint, tmp_path):
    fused = synth(presets.load("tiny-v3"), tmp_path / "fused", fused=True)
    separate, account = audited(tiny_checkpoint), audited(fused)
    placement = place(account.weights.values(), PRECISIONS["bf16"], tmp_path / "out")
    assert placement.written_bytes == 0
    offsets = set()
    for name, weight in separate.weights.items():
        assert placed_bytes(tmp_path / "out", placement.tensors[name]) == weight.data.read().tobytes(), name
        offsets.add(placement.tensors[name].offset)
    assert len(offsets) == len(separate.weights)


def test_shards(tiny_checkpoint, tmp_path, monkeypatch):
    """No converted file is larger than the limit unless a single tensor is."""
    account = audited(tiny_checkpoint)
    monkeypatch.setattr(shards, "_SHARD_BYTES", 300_000)
    placement = place(account.weights.values(), PRECISIONS["fp32"], tmp_path)
    files = sorted((tmp_path / "weights").glob("converted-*"))
    assert len(files) > 2
    for file in files:
        tensors = read_header(file)[1]
        assert sum(t.nbytes for t in tensors.values()) <= 300_000 or len(tensors) == 1
    for name, weight in account.weights.items():
        np.testing.assert_array_equal(placed_values(tmp_path, placement.tensors[name]), weight.decode(), name)


def test_two_source_shards_keep_their_names(tmp_path):
    hub = synth(presets.load("tiny-v3"), tmp_path / "hub", shard_bytes=400_000)
    account = audited(hub)
    placement = place(account.weights.values(), PRECISIONS["bf16"], tmp_path / "out")
    assert len(placement.linked) > 1
    check_pointed(account, placement, tmp_path / "out")


E8M0 = ml_dtypes.float8_e8m0fnu


@pytest.fixture
def fp4(tmp_path) -> Weight:
    """An expert of more rows than are converted at a time, with every multiplier that float32 has room for."""
    rng = np.random.default_rng(0)
    rows = 2 * module._WINDOW_ROWS + 70
    packed = rng.integers(-128, 128, (rows, 48), np.int8)
    scale = rng.integers(0, 250, (rows, 3), np.uint8)
    scale[:250, 0] = np.arange(250)
    return one_weight(tmp_path / "fp4", packed, "expert", scale.view(E8M0), (1, 32))


def held(out: Path, placement: Placement) -> np.ndarray:
    """What a graph computes from placed FP4 numbers and their multipliers."""
    scale = placed_values(out, placement.tensors["w_scale_inv"])
    scale = scale.view(ml_dtypes.float8_e8m0fnu) if scale.dtype == np.uint8 else scale
    scale = scale.astype(np.float32)
    return placed_values(out, placement.tensors["w"]) * np.repeat(scale, 32, axis=1)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_packed_fp4_is_pointed_at(fp4, tmp_path, dtype):
    weight = one_weight(tmp_path / "other", fp4.data.read().view(dtype), "expert", fp4.scale.read(), (1, 32))
    placement = place([weight], PRECISIONS["mxfp4"], tmp_path / "out")
    placed, scale = placement.tensors["w"], placement.tensors["w_scale_inv"]
    assert (placed.offset, placed.nbytes) == (weight.data.offset, weight.data.nbytes)
    assert (placed.dtype, placed.shape) == ("float4_e2m1fn", (weight.shape[0], 96))
    assert placed.nbytes == weight.shape[0] * 96 // 2
    assert placed_bytes(tmp_path / "out", placed) == weight.data.read().tobytes()
    assert (scale.dtype, scale.shape, scale.offset) == ("uint8", (weight.shape[0], 3), weight.scale.offset)
    assert placement.written_bytes == 0
    np.testing.assert_array_equal(held(tmp_path / "out", placement), weight.decode())
    assert not is_converted(weight, PRECISIONS["mxfp4"])
    np.testing.assert_array_equal(as_the_graph_holds(weight, PRECISIONS["mxfp4"]), weight.decode())


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float8_e4m3fn"])
def test_converted_to_fp4(tmp_path, stored):
    array = np.random.default_rng(0).normal(size=(module._WINDOW_ROWS + 70, 96)).astype(np.float32)
    scale = None
    if stored == "float8_e4m3fn":
        array, scale = quantize_blocks(array)
    weight = one_weight(tmp_path, array.astype(np.dtype(getattr(ml_dtypes, stored, stored))), "expert", scale)
    placement = place([weight], PRECISIONS["mxfp4"], tmp_path / "out")
    wanted = dequantize_fp4(*quantize_fp4(weight.decode()))
    np.testing.assert_array_equal(held(tmp_path / "out", placement), wanted)
    assert is_converted(weight, PRECISIONS["mxfp4"])
    np.testing.assert_array_equal(as_the_graph_holds(weight, PRECISIONS["mxfp4"]), wanted)
    placed = placement.tensors["w"]
    assert (placed.dtype, placed.shape, placed.nbytes) == ("float4_e2m1fn", weight.shape, weight.shape[0] * 48)
    written = read_header(tmp_path / "out" / placed.location)[1]
    assert (written["w"].dtype, written["w"].shape) == ("U8", (weight.shape[0], 48))
    assert placement.written_bytes == sum(t.nbytes for t in written.values())


def test_fp4_needs_whole_blocks(tmp_path):
    with pytest.raises(NotSupported, match=r"w cannot be stored as mxfp4\n.*40 columns"):
        place([one_weight(tmp_path, np.ones((4, 40), np.float32), "expert")], PRECISIONS["mxfp4"], tmp_path / "out")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_fp4_in_another_precision(fp4, tmp_path, precision):
    """Dequantised a window at a time; as FP8 blocks it is quantised anew."""
    found = PRECISIONS[precision]
    placement = place([fp4], found, tmp_path / "out")
    values = placed_values(tmp_path / "out", placement.tensors["w"])
    if precision == "fp8":
        w8, scale = quantize_blocks(fp4.decode())
        assert placed_bytes(tmp_path / "out", placement.tensors["w"]) == w8.tobytes()
        assert placed_bytes(tmp_path / "out", placement.tensors["w_scale_inv"]) == scale.tobytes()
        values = dequantize_blocks(w8, scale, (128, 128))
    else:
        # Every FP4 product is a float32, and but for the least a bfloat16.
        np.testing.assert_array_equal(values.astype(np.float32), fp4.decode())
    np.testing.assert_array_equal(as_the_graph_holds(fp4, found), values.astype(np.float32))


def test_fp4_keeps_other_roles_as_fp8_does(tmp_path):
    array = np.random.default_rng(0).normal(size=(130, 160)).astype(np.float32)
    w8, scale = quantize_blocks(array, power_of_two=True)
    weight = one_weight(tmp_path / "fp8", w8, "linear", scale.astype(E8M0))
    placement = place([weight], PRECISIONS["mxfp4"], tmp_path / "out")
    assert placement.tensors["w"].offset == weight.data.offset
    assert placement.tensors["w_scale_inv"].dtype == "float32"
    for role, dtype in [("linear", "float8_e4m3fn"), ("projection", "bfloat16"), ("head", "bfloat16")]:
        assert PRECISIONS["mxfp4"].format_of("w", role).dtype == dtype


@pytest.mark.parametrize("role", ["hyper", "sink", "position_bias"])
def test_what_steers_stays_wide(tmp_path, role):
    array = np.array([0.1, -0.2], np.float32)
    for precision in PRECISIONS:
        weight = one_weight(tmp_path, array, role)
        placement = place([weight], PRECISIONS[precision], tmp_path / precision)
        assert placement.written_bytes == 0 and not is_converted(weight, PRECISIONS[precision])


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_hash_table(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 8, (module._WINDOW_ROWS + 5, 2)).astype(dtype)
    for precision in PRECISIONS:
        weight = one_weight(tmp_path, array, "hash_table")
        placement = place([weight], PRECISIONS[precision], tmp_path / precision)
        assert (placement.written_bytes == 0) == (dtype == np.int64)
        found = placed_values(tmp_path / precision, placement.tensors["w"])
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, array)
        assert not is_converted(weight, PRECISIONS[precision])
        np.testing.assert_array_equal(as_the_graph_holds(weight, PRECISIONS[precision]), array)


@pytest.mark.parametrize("fused", [False, True])
def test_v4_checkpoint_is_pointed_at(tmp_path, fused):
    account = audited(synth(presets.load("tiny-v4-fp4"), tmp_path / "hub", fused=fused))
    placement = place(account.weights.values(), PRECISIONS["mxfp4"], tmp_path / "out")
    for name, weight in account.weights.items():
        placed = placement.tensors[name]
        assert placed_bytes(tmp_path / "out", placed) == weight.data.read().tobytes(), name
        assert (placed.offset, placed.shape) == (weight.data.offset, weight.shape)
    # Multipliers alone are written, in float32, and only of matrices other than experts'.
    scales = [(w.scale.nbytes, w.packed) for w in account.weights.values() if w.scale]
    assert placement.written_bytes == sum(4 * size for size, packed in scales if not packed)
