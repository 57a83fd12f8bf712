"""Safetensors: what is read and written, against files made by hand; and files that lie."""

import json
import os

import hypothesis
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from paged.models import open_safetensors, write_safetensors

# The format's names, and the dtype of each. Written here once more: the reader's own table is what is tested.
DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu, "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def _file(folder, header, data=b"", name="model.safetensors"):
    """A file as the format's page describes it. The header may be text, to be wrong in any way."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_is_read_bit_for_bit_also_unaligned(tmp_path, name):
    dtype = np.dtype(DTYPES[name])
    raw = (np.arange(6 * dtype.itemsize) * 37 % 2 if name == "BOOL" else np.arange(6 * dtype.itemsize) * 37).astype(
        "u1"
    )
    header = {
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": name, "shape": [2, 3], "data_offsets": [1, 1 + raw.size]},
    }
    tensor = open_safetensors(_file(tmp_path, header, b"\7" + raw.tobytes()))["x"]
    assert (tensor.shape, tensor.dtype, tensor.nbytes) == ((2, 3), dtype, raw.size)
    assert tensor.read().dtype == dtype and tensor.read().tobytes() == raw.tobytes()
    assert tensor.read((slice(1, 2), slice(0, 2))).tobytes() == raw.tobytes()[3 * dtype.itemsize : 5 * dtype.itemsize]


def test_floats_of_four_bits_lie_two_to_a_byte(tmp_path):
    header = {"x": {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}}
    tensor = open_safetensors(_file(tmp_path, header, bytes([0x21, 0x43, 0xA9, 0x7F])))["x"]
    expected = [[0.5, 1, 1.5, 2], [-0.5, -1, -6, 6]]
    assert tensor.dtype == ml_dtypes.float4_e2m1fn
    assert tensor.read().astype(np.float32).tolist() == expected
    assert tensor.read((slice(1, 2), slice(1, 3))).astype(np.float32).tolist() == [[-1, -6]]


def test_a_written_file_is_the_format_and_comes_back(tmp_path):
    arrays = {name: np.arange(6).astype(dtype).reshape(3, 2) for name, dtype in DTYPES.items()}
    arrays |= {"of.jax": jnp.ones((2, 2), jnp.bfloat16), "scalar": np.float32(3), "empty": np.zeros((0, 4), "f4")}
    arrays["strided"] = np.arange(12.0).reshape(3, 4).T
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays)
    weights = open_safetensors(path)
    assert weights.keys() == arrays.keys() and weights.metadata == {"format": "pt"}
    for name, array in arrays.items():
        back = weights[name].read()
        assert back.dtype == array.dtype and back.tobytes() == np.asarray(array).tobytes(), name
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 64 == 0 and header["strided"]["shape"] == [4, 3]
    begin, end = header["strided"]["data_offsets"]
    assert raw[start + begin : start + end] == np.ascontiguousarray(arrays["strided"]).tobytes()
    assert all(place["data_offsets"][0] % np.dtype(DTYPES[place["dtype"]]).itemsize == 0
               for name, place in header.items() if name != "__metadata__")  # fmt: skip


def test_a_file_that_is_read_from_may_be_replaced_and_a_failure_leaves_it(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones(3)})
    held = open_safetensors(path)["x"].read()
    write_safetensors(path, {"x": 2 * held})
    assert held.tolist() == [1, 1, 1] and open_safetensors(path)["x"].read().tolist() == [2, 2, 2]

    class Breaks:
        shape, dtype = (1,), np.dtype("f4")

        def __array__(self, *args, **kwargs):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        write_safetensors(path, {"x": Breaks()})
    assert open_safetensors(path)["x"].read().tolist() == [2, 2, 2] and os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(TypeError, match=r"tensors\['x'\] must be an array of one of .*; got list"):
        write_safetensors(path, {"x": [1.0]})


def test_a_tensor_is_read_only_and_says_how_to_be_asked(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"x": np.ones((3, 2), np.float32)})
    tensor = open_safetensors(tmp_path)["x"]  # the only file of its kind in the folder
    assert "load" not in repr(tensor) and not tensor.read().flags.writeable
    with pytest.raises(TypeError, match="index of x must be a tuple of slices"):
        tensor.read(0)
    with pytest.raises(ValueError, match="index of x has 3 slices"):
        tensor.read((slice(None),) * 3)


def _shards(folder, places):
    for file in set(places.values()):
        write_safetensors(folder / file, {name: np.full(2, i) for i, name in enumerate(places) if places[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards_are_one_checkpoint(tmp_path):
    _shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    write_safetensors(tmp_path / "of_another.safetensors", {"z": np.ones(1)})
    weights = open_safetensors(tmp_path)
    assert {name: tensor.read()[0] for name, tensor in weights.items()} == {"a": 0, "b": 1, "c": 2}
    assert weights["b"].file.name == "2.safetensors" and weights.nbytes == 48


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": "1.safetensors"}, r"1.safetensors: tensor 'x' of the index is not in it"),
        ({"a": "2.safetensors"}, r"1.safetensors: holds tensor 'a', and the index says that it is in 2.safetensors"),
        ({"a": "../1.safetensors"}, r"names the file '../1.safetensors', which is not one of its own folder"),
        ({"a": "/1.safetensors"}, r"names the file '/1.safetensors', which is not one of its own folder"),
        ({"a": 7}, r"weight_map must say the file of every tensor"),
    ],
    ids=["missing", "elsewhere", "up", "root", "number"],
)
def test_an_index_that_disagrees_with_its_files_is_refused(tmp_path, change, message):
    places = {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}
    _shards(tmp_path, places)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places | change}))
    with pytest.raises(ValueError, match=message):
        open_safetensors(tmp_path)


def test_what_is_not_there_is_said(tmp_path):
    _shards(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    (tmp_path / "2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 2.safetensors, which is not there"):
        open_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        open_safetensors(tmp_path / "nowhere")
    other = tmp_path / "other"
    other.mkdir()
    (other / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin needs pickle, which runs code"):
        open_safetensors(other)
    for name in ("a", "b"):
        write_safetensors(other / f"{name}.safetensors", {"x": np.ones(1)})
    with pytest.raises(ValueError, match=r"holds a.safetensors, b.safetensors and no model.safetensors.index.json"):
        open_safetensors(other)


def _changed(**changes):
    return {"x": F32 | changes}


HOSTILE = {
    "past the end": (_changed(data_offsets=[0, 1 << 40], shape=[1 << 38]), r"tensor 'x' has data_offsets \[0, 10"),
    "negative begin": (_changed(data_offsets=[-8, 0]), r"tensor 'x' has data_offsets \[-8, 0\]"),
    "backwards": (_changed(data_offsets=[8, 0]), r"tensor 'x' has data_offsets \[8, 0\]"),
    "three offsets": (_changed(data_offsets=[0, 4, 8]), r"tensor 'x' has data_offsets"),
    "offset is a float": (_changed(data_offsets=[0.0, 8.0]), r"tensor 'x' has data_offsets"),
    "size overflows": (_changed(shape=[1 << 62, 1 << 62, 4]), r"tensor 'x' has shape .* that an array can have"),
    "size wraps to 8": (_changed(shape=[(1 << 62) + 2]), r"tensor 'x' has shape .* that an array can have"),
    "empty and huge": (_changed(shape=[0, 1 << 40, 1 << 40], data_offsets=[0, 0]), r"tensor 'x' has shape"),
    "a little too large": (_changed(shape=[1 << 58]), r"tensor 'x' of dtype F32 and shape .* needs"),
    "too few bytes": (_changed(shape=[3]), r"tensor 'x' of dtype F32 and shape \[3\] needs 12.0 bytes"),
    "negative extent": (_changed(shape=[-1, -2]), r"tensor 'x' has shape \[-1, -2\]"),
    "extent is a bool": (_changed(shape=[True, 2]), r"tensor 'x' has shape \[True, 2\]"),
    "many dimensions": (_changed(shape=[1] * 1000), r"tensor 'x' has shape"),
    "unknown dtype": (_changed(dtype="F128"), r"tensor 'x' has dtype 'F128'; known are"),
    "dtype is a list": (_changed(dtype=["F32"]), r"tensor 'x' has dtype"),
    "dtype lacks": ({"x": {"shape": [2], "data_offsets": [0, 8]}}, r"tensor 'x' must be described by dtype"),
    "half a byte": (_changed(dtype="F4", shape=[4, 1], data_offsets=[0, 2]), r"tensor 'x' of dtype F4 .* needs"),
    "entry is a number": ({"x": 3}, r"tensor 'x' must be described by"),
    "overlap": ({"x": F32, "y": F32}, r"tensor 'y' begins at byte 0 and overlaps 'x'"),
    "gap": (
        {"x": F32 | {"shape": [1], "data_offsets": [0, 4]}, "y": F32 | {"shape": [0], "data_offsets": [8, 8]}},
        r"tensor 'y' begins at byte 8 and leaves a gap after 'x'",
    ),
    "hidden beginning": (_changed(shape=[1], data_offsets=[4, 8]), r"tensors fill bytes 4 to 8"),
    "hidden end": (_changed(shape=[1], data_offsets=[0, 4]), r"fill bytes 0 to 4, and the file has bytes 0 to 8"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "x": F32}, r"__metadata__ must map names to text"),
    "no object": ([], r"its JSON must be an object"),
    "a name twice": (b'{"x": 1, "x": 2}', r"the name 'x' stands twice"),
    "not JSON": (b"{", r"its JSON cannot be read"),
    "not UTF-8": (b'{"\xff": 1}', r"its JSON cannot be read"),
    "deep": (b"[" * 100_000, r"its JSON cannot be read"),
    "digits": (b'{"x": ' + b"9" * 10_000 + b"}", r"its JSON cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_lies_is_refused_by_name(tmp_path, name):
    header, message = HOSTILE[name]
    path = _file(tmp_path, header, bytes(8))
    with pytest.raises(ValueError, match=message) as error:
        open_safetensors(tmp_path)
    assert str(path) in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("raw", [b"", b"1234567", b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}", b"\3" + bytes(9)])
def test_a_file_that_is_cut_off_or_claims_a_long_header_is_refused(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        open_safetensors(path)


def test_a_header_of_a_gigabyte_is_refused_unread(tmp_path):
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:  # a sparse file: it has the size, and takes no room
        file.write((10**9).to_bytes(8, "little"))
        file.truncate(2 * 10**9)
    with pytest.raises(ValueError, match="says that its header has 1000000000 bytes"):
        open_safetensors(path)


def test_every_file_that_is_cut_short_is_refused(tmp_path):
    whole = tmp_path / "a.safetensors"
    write_safetensors(whole, {"x": np.ones(3), "y": np.ones(2, np.int8)})
    raw = whole.read_bytes()
    for length in range(len(raw)):
        whole.write_bytes(raw[:length])
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            open_safetensors(whole)


@hypothesis.given(st.data())
def test_any_change_of_a_header_is_read_or_refused_by_name(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    write_safetensors(path, {"x": np.ones(3), "y": np.ones((2, 5), np.int8)})
    raw = bytearray(path.read_bytes())
    end = raw.index(b"}}")
    for _ in range(data.draw(st.integers(1, 3))):
        new = data.draw(
            st.sampled_from([b"-", b"9", b"[", b"0,", b'"', b"999999999999999999"]) | st.binary(min_size=1, max_size=2)
        )
        place = data.draw(st.integers(0, end))
        raw[place : place + len(new)] = new
    path.unlink()  # what is mapped stays as it is
    path.write_bytes(raw)
    try:
        weights = open_safetensors(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(tensor.read().shape == tensor.shape for tensor in weights.values())
