"""The saved guard: what is written, what is refused, and what survives a crash (rows 23 to 36 of the input table)."""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from rm_ood import artifact
from rm_ood.artifact import CONFIG_FILE, GUARD_FILE, check_schema, read_guard, write_guard
from rm_ood.errors import FormatError, InputError, IntegrityError, SaveError

TENSORS = {
    "channel.0.whitening": torch.tensor([[1.5, 0.0], [-2.25, 3.0]]),
    "calibration.part_a": torch.tensor([True, False, True]),
}
CONFIG = {"alpha": 0.01, "channels": ["final"], "note": "grün"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a saved guard."""
    write_guard(tmp_path / "guard", TENSORS, CONFIG)
    return tmp_path / "guard"


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def put(folder: Path, data: bytes) -> Path:
    """Replace the authority's bytes, without a copy beside it."""
    folder.mkdir(exist_ok=True)
    (folder / GUARD_FILE).write_bytes(data)
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    return folder


def forge(
    header: dict[str, Any], data: bytes = b"", *, envelope: dict[str, Any] | None = None, text: str | None = None
) -> bytes:
    """A guard file with any header, and a digest that holds: the format, written out a second time."""
    names = {k: v for k, v in header.items() if k != "__metadata__"}
    inside = {"config": {}, "format_version": 1, "rm_ood_version": "1.2.3", **(envelope or {})}
    state = hashlib.sha256(json.dumps(inside, sort_keys=True, separators=(",", ":")).encode())
    for name, entry in sorted(names.items()):
        begin, end = entry["data_offsets"]
        state.update(f"\n{name} {entry['dtype']} {entry['shape']}\n".encode() + data[begin:end])
    inside = {"digest": state.hexdigest(), **inside}
    text = json.dumps(inside, sort_keys=True, separators=(",", ":")) if text is None else text
    return raw({"__metadata__": {"rm_ood": text}, **header}, data)


def raw(header: Any, data: bytes = b"") -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def entry(dtype: str = "F32", shape: tuple[int, ...] = (1,), begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


# Round trip


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(3, 4).t(),
        torch.randn(6, 4)[::2],
        torch.randn(5).half(),
        torch.randn(5).bfloat16(),
        torch.tensor([-(2**63), 2**63 - 1]),
        torch.arange(3, dtype=torch.int32),
        torch.arange(3, dtype=torch.int16),
        torch.tensor([-128, 127], dtype=torch.int8),
        torch.arange(256).to(torch.uint8),
        torch.tensor([True, False]),
        torch.tensor(3.5),
        torch.empty(0, 3),
        torch.tensor([float("inf"), -0.0, 1e-45]),
        torch.nn.Parameter(torch.ones(2)),
    ],
    ids=lambda t: f"{t.dtype}{tuple(t.shape)}",
)
def test_every_tensor_comes_back_as_it_was(tmp_path: Path, tensor: torch.Tensor) -> None:
    write_guard(tmp_path, {"x": tensor, "shared": tensor}, {})
    tensors, config = read_guard(tmp_path)
    assert config == {}
    for name in ("x", "shared"):
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name], tensor.detach())
        assert not tensors[name].requires_grad
        # Memory of its own: writing to what was loaded warns of nothing and touches no file.
        tensors[name].zero_()


def test_settings_come_back_as_json(folder: Path) -> None:
    assert read_guard(folder)[1] == CONFIG
    write_guard(folder, TENSORS, {"t": (1, 2), "n": None, "deep": {"x": [1.0, -0.0]}}, overwrite=True)
    assert read_guard(folder)[1] == {"t": [1, 2], "n": None, "deep": {"x": [1.0, -0.0]}}


def test_the_folder_holds_two_files_and_the_copy_is_readable(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == [GUARD_FILE, CONFIG_FILE]
    copy = json.loads((folder / CONFIG_FILE).read_text())
    assert copy["config"] == CONFIG
    assert copy["format_version"] == 1
    assert len(copy["digest"]) == 64
    assert (folder / CONFIG_FILE).read_text().count("\n") > 5


def test_bytes_are_deterministic(tmp_path: Path) -> None:
    write_guard(tmp_path / "a", TENSORS, CONFIG)
    write_guard(tmp_path / "b" / "c", dict(reversed(TENSORS.items())), dict(reversed(CONFIG.items())))
    for name in (GUARD_FILE, CONFIG_FILE):
        written = (tmp_path / "a" / name).read_bytes()
        assert written == (tmp_path / "b" / "c" / name).read_bytes()
        assert str(tmp_path).encode() not in written


def test_the_file_is_the_documented_format(folder: Path) -> None:
    """`forge` below writes the format from its description alone; both must agree to the byte."""
    tensors = safetensors.torch.load_file(folder / GUARD_FILE)
    assert same(tensors, TENSORS)
    data = b"".join(TENSORS[name].numpy().tobytes() for name in ("channel.0.whitening", "calibration.part_a"))
    header = {
        "channel.0.whitening": entry("F32", (2, 2), 0, 16),
        "calibration.part_a": entry("BOOL", (3,), 16, 19),
    }
    forged = forge(header, data, envelope={"config": CONFIG, "rm_ood_version": artifact.package_version()})
    length = int.from_bytes(forged[:8], "little")
    text = json.loads(forged[8 : 8 + length])["__metadata__"]["rm_ood"]
    with safetensors.safe_open(folder / GUARD_FILE, "pt") as file:
        assert file.metadata() == {"rm_ood": text}
    assert same(read_guard(put(folder, forged))[0], TENSORS)


# Written by format version 1; must load for ever.
GOLDEN = (
    "iAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJybV9vb2QiOiJ7XCJjb25maWdcIjp7XCJhbHBoYVwiOjAuMDEsXCJjaGFubmVsc1wiOltcImZp"
    "bmFsXCJdLFwibm90ZVwiOlwiZ3JcXHUwMGZjblwifSxcImRpZ2VzdFwiOlwiOGM5MzdiYTY3ZjFmYzhkMDQyNjZiNGQyZDhhNTk0NDQyMTNi"
    "YjMwNWZiNGJkMWQ5ODA0MmE5NmFmMGY4NDllMFwiLFwiZm9ybWF0X3ZlcnNpb25cIjoxLFwicm1fb29kX3ZlcnNpb25cIjpcIjAuMS4wXCJ9"
    "In0sImNoYW5uZWwuMC53aGl0ZW5pbmciOnsiZHR5cGUiOiJGMzIiLCJzaGFwZSI6WzIsMl0sImRhdGFfb2Zmc2V0cyI6WzAsMTZdfSwiY2Fs"
    "aWJyYXRpb24ucGFydF9hIjp7ImR0eXBlIjoiQk9PTCIsInNoYXBlIjpbM10sImRhdGFfb2Zmc2V0cyI6WzE2LDE5XX19ICAgICAgIAAAwD8A"
    "AAAAAAAQwAAAQEABAAE="
)


def test_row36_a_guard_of_format_1_loads(tmp_path: Path) -> None:
    tensors, config = read_guard(put(tmp_path, base64.b64decode(GOLDEN)))
    assert same(tensors, TENSORS)
    assert config == CONFIG


def test_version_of_a_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert artifact.package_version() == "0.0.0+source"
    monkeypatch.setattr(metadata, "version", lambda name: "7.8.9")
    assert artifact.package_version() == "7.8.9"


# Overwriting


def test_a_different_guard_is_not_replaced_unasked(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = {**TENSORS, "channel.0.whitening": torch.zeros(2, 2)}
    for tensors, config in ((other, CONFIG), (TENSORS, {**CONFIG, "alpha": 0.02}), ({}, CONFIG)):
        with pytest.raises(SaveError, match="holds a different guard: pass overwrite=True"):
            write_guard(folder, tensors, config)
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    write_guard(folder, other, CONFIG, overwrite=True)
    assert same(read_guard(folder)[0], other)


def test_an_identical_guard_is_left_as_it_is(folder: Path) -> None:
    before = {p.name: p.stat().st_ino for p in folder.iterdir()}
    write_guard(folder, TENSORS, CONFIG)
    write_guard(folder, TENSORS, CONFIG, overwrite=True)
    assert {p.name: p.stat().st_ino for p in folder.iterdir()} == before


def test_an_identical_guard_of_another_version_counts_as_identical(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (folder / GUARD_FILE).read_bytes()
    monkeypatch.setattr(artifact, "package_version", lambda: "99.0")
    write_guard(folder, TENSORS, CONFIG)
    assert (folder / GUARD_FILE).read_bytes() == before


def test_saving_an_identical_guard_restores_its_copy(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    write_guard(folder, TENSORS, CONFIG)
    assert (folder / CONFIG_FILE).exists()
    assert read_guard(folder)[1] == CONFIG


@pytest.mark.parametrize("damage", [b"", b"{}", b"not json"])
def test_a_damaged_guard_is_replaced_only_when_asked(folder: Path, damage: bytes) -> None:
    (folder / CONFIG_FILE).write_bytes(damage)
    with pytest.raises(SaveError, match="different guard"):
        write_guard(folder, TENSORS, CONFIG)
    write_guard(folder, TENSORS, CONFIG, overwrite=True)
    assert read_guard(folder)[1] == CONFIG
    (folder / GUARD_FILE).write_bytes(damage)
    with pytest.raises(SaveError, match="different guard"):
        write_guard(folder, TENSORS, CONFIG)
    write_guard(folder, TENSORS, CONFIG, overwrite=True)
    assert read_guard(folder)[1] == CONFIG


def test_the_folder_of_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for overwrite in (False, True):
        with pytest.raises(SaveError, match="is the folder of a model"):
            write_guard(tmp_path, TENSORS, CONFIG, overwrite=overwrite)
    assert (tmp_path / "config.json").read_text() == '{"model_type": "llama"}'
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "config.json").write_text('{"something": "else"}')
    write_guard(tmp_path, TENSORS, CONFIG)
    assert (tmp_path / "config.json").read_text() == '{"something": "else"}'


# What cannot be saved


@pytest.mark.parametrize(
    "name", ["", "../x", "a..b", "/etc/x", "a\0b", "a/b", ".x", "-x", "é", "a b", "x" * 129, "a\n"]
)
def test_row32_unsafe_names_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="tensor name"):
        write_guard(tmp_path, {name: torch.ones(1)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1, dtype=torch.complex64),
        torch.ones(2).to_sparse(),
        torch.ones(1, device="meta"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_tensors_without_a_plain_form_are_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    with pytest.raises(InputError, match=r"tensor x: .* cannot be saved"):
        write_guard(tmp_path, {"x": tensor}, {})


@pytest.mark.parametrize(
    "config",
    [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": {1, 2}}, {"x": 10**30}, {"x": "\ud800"}],
    ids=["nan", "inf", "object", "set", "large integer", "lone surrogate"],
)
def test_settings_that_are_not_plain_json_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="not plain JSON"):
        write_guard(tmp_path, {}, config)
    circular: dict[str, Any] = {}
    circular["self"] = circular
    with pytest.raises(InputError, match="not plain JSON"):
        write_guard(tmp_path, {}, circular)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_TENSORS", 1, "2 tensors, at most 1"),
        ("MAX_JSON", 50, "bytes of readable settings, at most 50"),
        ("MAX_HEADER", 50, "bytes of header, at most 50"),
        ("MAX_FILE", 50, "bytes, at most 50"),
    ],
)
def test_what_would_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(artifact, limit, value)
    with pytest.raises(InputError, match=f"guard too large to save: .*{message}"):
        write_guard(tmp_path / "new", TENSORS, CONFIG)
    assert not (tmp_path / "new").exists()


def test_settings_have_a_limit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"524\d\d\d bytes"):
        write_guard(tmp_path, {}, {"x": "y" * 2**19})
    with pytest.raises(InputError, match="bytes of settings, at most 524288"):
        write_guard(tmp_path, {}, {"x": "y" * (2**19 - 20)})


# Missing, empty, wrong kind


def test_row23_missing_file_is_named(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        (tmp_path / "something.txt").touch()
        with pytest.raises(FileNotFoundError) as error:
            read_guard(folder)
        assert error.value.filename == str(folder / GUARD_FILE)
        assert GUARD_FILE in str(error.value)


def test_row24_empty_folder_file_for_folder_and_folder_for_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"is empty; expected {GUARD_FILE}"):
        read_guard(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(FormatError, match="is a file; expected the folder of a saved guard"):
        read_guard(tmp_path / "file")
    with pytest.raises(SaveError, match="guard not saved") as error:
        write_guard(tmp_path / "file", TENSORS, CONFIG)
    assert isinstance(error.value.__cause__, FileExistsError)
    (tmp_path / "guard" / GUARD_FILE).mkdir(parents=True)
    with pytest.raises(FormatError, match="is not a regular file"):
        read_guard(tmp_path / "guard")
    with pytest.raises(SaveError):
        write_guard(tmp_path / "guard", TENSORS, CONFIG)
    with pytest.raises(SaveError):
        write_guard(tmp_path / "guard", TENSORS, CONFIG, overwrite=True)
    assert [p.name for p in (tmp_path / "guard").iterdir()] == [GUARD_FILE]


def test_row24_a_pipe_does_not_hang(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / GUARD_FILE)
    with pytest.raises(FormatError, match="not a regular file"):
        read_guard(tmp_path / "pipe")
    (folder / CONFIG_FILE).unlink()
    os.mkfifo(folder / CONFIG_FILE)
    with pytest.raises(FormatError, match=f"{CONFIG_FILE} is not a regular file: delete it"):
        read_guard(folder)


def test_reading_through_symbolic_links_works(folder: Path, tmp_path: Path) -> None:
    """The Hub's cache is made of them."""
    (tmp_path / "snapshot").mkdir()
    for name in (GUARD_FILE, CONFIG_FILE):
        (tmp_path / "snapshot" / name).symlink_to(folder / name)
    assert read_guard(tmp_path / "snapshot")[1] == CONFIG


def test_a_file_that_cannot_be_read_is_a_format_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(artifact, "_read", refuse)
    with pytest.raises(FormatError, match="cannot be read: Permission denied"):
        read_guard(folder)


# Cut and changed


def test_row25_truncated_at_any_byte(folder: Path) -> None:
    data = (folder / GUARD_FILE).read_bytes()
    for size in range(len(data)):
        put(folder, data[:size])
        with pytest.raises(IntegrityError):
            read_guard(folder)
    assert read_guard(put(folder, data))[1] == CONFIG
    with pytest.raises(IntegrityError, match="bytes of tensors"):
        read_guard(put(folder, data + b"\0"))


def test_row26_any_bit_flipped(tmp_path: Path) -> None:
    folder = tmp_path / "guard"
    write_guard(folder, {"x": torch.tensor([1.5]), "y": torch.tensor([True])}, {"a": "é"})
    data = (folder / GUARD_FILE).read_bytes()
    (folder / CONFIG_FILE).unlink()
    accepted = []
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        (folder / GUARD_FILE).write_bytes(changed)
        try:
            read_guard(folder)
        except IntegrityError:
            continue
        accepted.append(bit)
    assert accepted == []


@given(st.integers(0, 2**30), st.integers(0, 40), st.binary(max_size=40), st.sampled_from([GUARD_FILE, CONFIG_FILE]))
def test_row26_any_splice_is_refused_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, at: int, cut: int, filling: bytes, name: str
) -> None:
    folder = tmp_path_factory.mktemp("splice")
    write_guard(folder, TENSORS, CONFIG)
    data = (folder / name).read_bytes()
    at %= len(data) + 1
    (folder / name).write_bytes(data[:at] + filling + data[at + cut :])
    try:
        tensors, config = read_guard(folder)
    except FormatError:
        return
    # White space in the readable copy is no change.
    assert same(tensors, TENSORS)
    assert config == CONFIG


def test_row26_the_same_settings_written_another_way_are_refused(folder: Path) -> None:
    header = {"x": entry()}
    good = forge(header, b"1234", envelope={"config": {"a": "\xe9", "b": 1}})
    assert read_guard(put(folder, good))[1] == {"a": "é", "b": 1}
    for old, new in ((b"u00e9", b"u00E9"), (b'\\"b\\":1', b'\\"b\\":1 ')):
        changed = good[8:].replace(old, new)
        assert changed != good[8:]
        with pytest.raises(IntegrityError, match="the digest does not match"):
            read_guard(put(folder, (len(changed) - 4).to_bytes(8, "little") + changed))


# Limits


@contextlib.contextmanager
def quick(seconds: float = 0.1) -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100 * 2**20, 2**20 + 1])
def test_row27_header_length(tmp_path: Path, length: int) -> None:
    put(tmp_path, b"")
    with (tmp_path / GUARD_FILE).open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"')
        file.truncate(101 * 2**20)
    with quick(), pytest.raises(IntegrityError, match=f"header of {length} bytes"):
        read_guard(tmp_path)


def test_row27_many_tensors(tmp_path: Path) -> None:
    header = {f"t{i}": entry(shape=(0,), end=0) for i in range(513)}
    with quick(), pytest.raises(FormatError, match="513 tensors, at most 512"):
        read_guard(put(tmp_path, forge(header)))
    header.popitem()
    assert len(read_guard(put(tmp_path, forge(header)))[0]) == 512
    one = json.dumps({"t": entry(shape=(0,), end=0)})[1:-1].encode()
    put(tmp_path, raw(b"{" + one + (b"," + one) * 299_999 + b"}"))
    with quick(), pytest.raises(IntegrityError, match="header of"):
        read_guard(tmp_path)


def test_row27_a_file_too_large_to_be_a_guard(folder: Path) -> None:
    with (folder / GUARD_FILE).open("ab") as file:
        file.truncate(artifact.MAX_FILE + 1)
    with quick(), pytest.raises(FormatError, match="8589934593 bytes, at most 8589934592 are read"):
        read_guard(folder)


def test_row27_a_shape_of_thousands_of_sizes(tmp_path: Path) -> None:
    """Their product would be a number of megabytes, and take minutes."""
    put(tmp_path, raw({"__metadata__": {"rm_ood": ""}, "x": entry(shape=(2**40,) * 60_000)}))
    with quick(1.0), pytest.raises(IntegrityError, match="impossible shape"):
        read_guard(tmp_path)


# Headers


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"x": entry("F4")}, b"1234", "'x' has an unknown dtype"),
        ({"x": entry("F64")}, b"1234", r"'x' of shape \[1\] does not fill its place"),
        ({"x": entry(shape=(2,))}, b"1234", r"'x' of shape \[2\] does not fill its place"),
        ({"x": entry(shape=(0, 2**60), end=0)}, b"", "'x' has an impossible shape"),
        ({"x": entry(shape=(-1, -1))}, b"1234", "'x' has an impossible shape"),
        ({"x": {**entry(), "shape": [True]}}, b"1234", "'x' has an impossible shape"),
        ({"x": {**entry(), "shape": 1}}, b"1234", "'x' has an impossible shape"),
        ({"x": {**entry(), "data_offsets": [0, 4, 4]}}, b"1234", "'x' has an impossible shape or place"),
        ({"x": {**entry(), "data_offsets": [0, 4.0]}}, b"1234", "'x' has an impossible shape or place"),
        ({"x": {**entry(), "more": 1}}, b"1234", "'x' is not described as safetensors does"),
        ({"x": [1, 2]}, b"1234", "'x' is not described as safetensors does"),
        ({"x": {**entry(), "dtype": ["F32"]}}, b"1234", "'x' has an unknown dtype"),
        ({"x": entry(), "y": entry()}, b"1234", "tensor y does not start where the one before it ends"),
        ({"x": entry(begin=4, end=8)}, b"12345678", "tensor x does not start"),
        ({"x": entry()}, b"12345678", "8 bytes of tensors, 4 announced"),
        ({"x": entry()}, b"12", "2 bytes of tensors, 4 announced"),
    ],
)
def test_row28_headers_that_lie_about_tensors(
    tmp_path: Path, header: dict[str, Any], data: bytes, message: str
) -> None:
    put(tmp_path, raw({"__metadata__": {"rm_ood": "{}"}, **header}, data))
    with quick(), pytest.raises(FormatError, match=message):
        read_guard(tmp_path)


def test_row28_doubled_tensor(tmp_path: Path) -> None:
    one = json.dumps(entry())
    put(tmp_path, raw(f'{{"__metadata__":{{"rm_ood":""}},"x":{one},"x":{one}}}'.encode(), b"1234"))
    with pytest.raises(FormatError, match="key 'x' appears twice"):
        read_guard(tmp_path)


def test_row28_schema_names_every_problem() -> None:
    tensors = {"a": torch.ones(2), "b": torch.ones(2, 2), "c": torch.ones(3), "odd": torch.ones(1)}
    expected = {
        "a": (torch.float32, (2,)),
        "b": (torch.float32, (2, 3)),
        "c": (torch.float64, (3,)),
        "d": (torch.float32, (1,)),
    }
    with pytest.raises(FormatError) as error:
        check_schema(tensors, expected)
    for part in (
        "d is missing",
        "odd is unknown",
        "b: expected torch.float32 (2, 3), got torch.float32 (2, 2)",
        "c: expected torch.float64 (3,), got torch.float32 (3,)",
    ):
        assert part in str(error.value)
    assert "a" not in str(error.value).replace("saved guard", "").split("; ")
    check_schema({"a": tensors["a"]}, {"a": (torch.float32, (2,))})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_row31_values_that_are_not_finite(value: float) -> None:
    tensors = {"x": torch.tensor([1.0, value])}
    expected = {"x": (torch.float32, (2,))}
    with pytest.raises(FormatError, match="x holds NaN or infinity"):
        check_schema(tensors, expected)
    if value != value:
        with pytest.raises(FormatError, match="x holds NaN or infinity"):
            check_schema(tensors, expected, allow_inf=("x",))
    else:
        check_schema(tensors, expected, allow_inf=("x",))


def test_row31_n_in_the_settings_unlike_the_tensor(tmp_path: Path) -> None:
    """A valid file, a digest that holds, and contents that do not fit together."""
    write_guard(tmp_path, {"calibration.scores": torch.ones(3, 2)}, {"n": 4})
    tensors, config = read_guard(tmp_path)
    with pytest.raises(FormatError, match=r"calibration.scores: expected torch.float32 \(4, 2\)"):
        check_schema(tensors, {"calibration.scores": (torch.float32, (config["n"], 2))})


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a\0b", "a..b", ""])
def test_row32_unsafe_names_are_not_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / "guard", forge({name: entry()}, b"1234"))
    with pytest.raises(FormatError, match="is not one that rm_ood writes"):
        read_guard(tmp_path / "guard")
    assert [p.name for p in tmp_path.rglob("*")] == ["guard", GUARD_FILE]


# Other files under the guard's name


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x", "y" * 100)


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": [1] * 99}, protocol=4)), "is a pickle: it is not opened"),
    "pickle2": (lambda p: p.write_bytes(pickle.dumps({"a": [1] * 99}, protocol=2)), "is a pickle"),
    "old torch": (
        lambda p: torch.save({"a": torch.ones(9)}, p, _use_new_zipfile_serialization=False),
        "is a pickle",
    ),
    "torch": (lambda p: torch.save({"a": torch.ones(9)}, p), r"is a zip archive \(torch.save writes these\)"),
    "zip": (_zip, "is a zip archive"),
    "git lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "is a Git LFS pointer, not the file itself: run git lfs pull",
    ),
    "html": (lambda p: p.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"), "is an HTML page"),
    "html2": (lambda p: p.write_text("<html><head></head></html>"), "is an HTML page"),
    "text": (lambda p: p.write_text("just a text of some length"), "header of"),
    "json": (lambda p: p.write_text('{"config": 1}'), "header of"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_row29_foreign_files_are_called_by_their_name(tmp_path: Path, kind: str) -> None:
    write, message = FOREIGN[kind]
    write(tmp_path / GUARD_FILE)
    with quick(), pytest.raises(FormatError, match=message):
        read_guard(tmp_path)


def test_row29_another_safetensors_file(tmp_path: Path) -> None:
    for noted in (None, {"format": "pt"}, {"rm_ood": "{}", "format": "pt"}):
        safetensors.torch.save_file({"w": torch.ones(3)}, tmp_path / GUARD_FILE, noted)
        with pytest.raises(FormatError, match="holds no guard: it is another safetensors file"):
            read_guard(tmp_path)
    for header in ([1], {"__metadata__": {"rm_ood": 3}}, {"__metadata__": 3}, 7):
        with pytest.raises(FormatError, match="holds no guard"):
            read_guard(put(tmp_path, raw(header)))


def test_a_file_that_safetensors_alone_refuses(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (KeyError("F4"), safetensors.SafetensorError("no"), ValueError("no"), RuntimeError("no")):

        def refuse(data: bytes, kind: Exception = kind) -> None:
            raise kind

        monkeypatch.setattr(safetensors.torch, "load", refuse)
        with pytest.raises(IntegrityError, match=f"safetensors refuses it .{type(kind).__name__}"):
            read_guard(folder)


# Settings inside the authority


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"config":NaN}', "NaN is not JSON"),
        ('{"a":1,"a":1}', "key 'a' appears twice"),
        ("[" * 5000, "RecursionError"),
        ('{"a":' + "1" * 5000 + "}", "an integer of 5000 digits"),
        ("\ufeff{}", "BOM"),
        ('"\\ud800"', "surrogates"),
        ("x" * (2**19 + 1), "524289 bytes of JSON, at most 524288"),
        ("[]", "lack one of"),
        ("{}", "lack one of"),
        ('{"config":{},"digest":"","format_version":true,"rm_ood_version":""}', "lack one of"),
        ('{"config":[],"digest":"","format_version":1,"rm_ood_version":""}', "lack one of"),
        ('{"config":{},"digest":"","format_version":1,"rm_ood_version":""}', "digest does not match"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_row30_settings_that_are_not_strict_json(tmp_path: Path, text: str, message: str) -> None:
    with quick(0.5), pytest.raises(FormatError, match=message):
        read_guard(put(tmp_path, forge({}, text=text)))


def test_row30_a_header_that_is_not_strict_json(tmp_path: Path) -> None:
    for header in (b"[" * 100_000, b'{"a": NaN}', b'{"\xff": 1}', b"{" + b" " * 99):
        with quick(0.5), pytest.raises(FormatError, match=r"header of .* not strict JSON"):
            read_guard(put(tmp_path, raw(header)))


@pytest.mark.parametrize(("version", "written"), [(2, "9.9"), (10**9, "9.9"), (0, "0.0.1"), (-1, "0.0.1")])
def test_row36_other_formats_are_refused_with_versions(tmp_path: Path, version: int, written: str) -> None:
    data = forge({"x": entry()}, b"1234", envelope={"format_version": version, "rm_ood_version": written, "new": 1})
    with pytest.raises(FormatError) as error:
        read_guard(put(tmp_path, data))
    assert f"was written by rm_ood {written} (format {version}), this version reads up to 1: upgrade rm_ood" in str(
        error.value
    )
    assert not isinstance(error.value, IntegrityError)


# The readable copy


def test_a_missing_copy_is_rebuilt(folder: Path) -> None:
    before = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).unlink()
    read_guard(folder)
    assert (folder / CONFIG_FILE).read_bytes() == before
    assert len(list(folder.iterdir())) == 2


def test_a_missing_copy_is_not_rebuilt_while_somebody_saves(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    read_guard(folder)
    os.close(handle)
    assert [p.name for p in folder.iterdir()] == [GUARD_FILE]


def test_a_missing_copy_is_not_rebuilt_beside_a_newer_guard(folder: Path) -> None:
    (folder / CONFIG_FILE).unlink()
    envelope, _, identity = artifact._read(folder / GUARD_FILE)
    write_guard(folder, TENSORS, {"new": 1}, overwrite=True)
    (folder / CONFIG_FILE).unlink()
    artifact._rebuild_copy(folder, envelope, identity)
    assert not (folder / CONFIG_FILE).exists()


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda c: c["config"].update(alpha=0.5), ["config.alpha"]),
        (lambda c: c["config"].update(alpha="0.01"), ["config.alpha"]),
        (lambda c: c["config"].pop("note"), ["config.note"]),
        (lambda c: c["config"].update(extra={"a": 1}), ["config.extra"]),
        (lambda c: c["config"]["channels"].append("x"), ["config.channels"]),
        (lambda c: c.update(format_version=True, digest="0"), ["digest", "format_version"]),
        (lambda c: c.update(config=3), ["config"]),
    ],
)
def test_an_edited_copy_is_an_error_that_names_the_fields(
    folder: Path, edit: Callable[[dict[str, Any]], object], named: list[str]
) -> None:
    copy = json.loads((folder / CONFIG_FILE).read_text())
    edit(copy)
    (folder / CONFIG_FILE).write_text(json.dumps(copy))
    with pytest.raises(FormatError, match=f"{CONFIG_FILE} differs from {GUARD_FILE} in {', '.join(named)}\\."):
        read_guard(folder)


def test_a_copy_of_another_kind(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("[1]")
    with pytest.raises(FormatError, match=r"differs from .* in everything"):
        read_guard(folder)
    for text in ("", "{", '{"a": NaN}'):
        (folder / CONFIG_FILE).write_text(text)
        with pytest.raises(FormatError, match=f"{CONFIG_FILE}: not strict JSON .* Delete this copy, it is rebuilt"):
            read_guard(folder)


def test_row30_a_copy_of_one_gigabyte(folder: Path) -> None:
    os.truncate(folder / CONFIG_FILE, 2**30)
    with quick(), pytest.raises(FormatError, match="1048577 bytes of JSON, at most 1048576"):
        read_guard(folder)


def test_a_copy_that_differs_only_during_a_save_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [["config.alpha"], []]
    monkeypatch.setattr(artifact, "_copy_differences", lambda *_: answers.pop(0))
    assert read_guard(folder)[1] == CONFIG
    assert answers == []


# Failing saves


@contextlib.contextmanager
def unprivileged(folder: Path) -> Iterator[Path]:
    """Run as a user whom modes bind, seeing only `folder`, by a relative path: parents may be closed to that user."""
    here = Path.cwd()
    folder.chmod(0o755)
    os.chdir(folder)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield Path("guard")
    finally:
        if root:
            os.seteuid(0)
        os.chdir(here)


def intact(folder: Path) -> bool:
    return read_guard(folder)[1] == CONFIG and sorted(p.name for p in folder.iterdir()) == [GUARD_FILE, CONFIG_FILE]


def test_row33_read_only_folder(folder: Path) -> None:
    folder.chmod(0o555)
    with (
        unprivileged(folder.parent) as guard,
        pytest.raises(SaveError, match="guard not saved to guard: Permission denied") as error,
    ):
        write_guard(guard, TENSORS, {}, overwrite=True)
    assert isinstance(error.value.__cause__, PermissionError)
    assert intact(folder)
    (folder / CONFIG_FILE).unlink()
    with unprivileged(folder.parent) as guard:
        assert read_guard(guard)[1] == CONFIG
    assert [p.name for p in folder.iterdir()] == [GUARD_FILE]
    folder.chmod(0o755)


def test_row33_file_size_limit(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(SaveError, match="File too large") as error:
            write_guard(folder, {"x": torch.ones(100_000)}, {}, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(error.value.__cause__, OSError)
    assert intact(folder)


@pytest.mark.parametrize("failing", [1, 2])
def test_row33_no_space(folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    calls = []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="No space left on device"):
        write_guard(folder, TENSORS, {}, overwrite=True)
    assert len(calls) == failing
    assert intact(folder)


@pytest.mark.parametrize("name", [GUARD_FILE, CONFIG_FILE])
@pytest.mark.parametrize("dangling", [True, False])
def test_row33_symbolic_link_as_target(tmp_path: Path, name: str, dangling: bool) -> None:
    target = tmp_path / "elsewhere"
    if not dangling:
        target.write_bytes(b"precious")
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / name).symlink_to(target)
    for overwrite in (False, True):
        with pytest.raises(SaveError, match="is a symbolic link"):
            write_guard(tmp_path / "guard", TENSORS, CONFIG, overwrite=overwrite)
    assert target.exists() is not dangling
    assert dangling or target.read_bytes() == b"precious"
    assert [p.name for p in (tmp_path / "guard").iterdir()] == [name]


def test_row33_an_error_without_a_message(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise TimeoutError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(SaveError, match=r"TimeoutError. What was there before still loads"):
            write_guard(folder, TENSORS, {}, overwrite=True)
    assert intact(folder)


def test_ctrl_c_during_a_save_leaves_no_temporary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_guard(folder, TENSORS, {}, overwrite=True)
    assert intact(folder)


def test_row35_a_save_that_never_ends_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "LOCK_WAIT_S", 0.05)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(SaveError, match="another process has been saving here"):
        write_guard(folder, TENSORS, {}, overwrite=True)
    os.close(handle)
    assert intact(folder)


# Kill and compete. One interpreter forks the victims: starting Python and torch for each would take minutes.

_PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from rm_ood.artifact import read_guard, write_guard
folder = Path(sys.argv[1])

def save(which, size=20_000):
    write_guard(folder, {"x": torch.full((size,), float(which))}, {"which": which}, overwrite=True)

def check():
    tensors, config = read_guard(folder)
    x = tensors["x"]
    assert torch.equal(x, torch.full_like(x, float(config["which"]))), "mixed"
    return config["which"]

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    return child
"""


def forking(script: str, folder: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(artifact.__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_row34_kill_between_any_two_steps_of_a_save(tmp_path: Path) -> None:
    """Every call that changes the folder is a step; the save is killed before each of them in turn."""
    script = """
save(0)
def killed_at(step):
    left = [step]
    def stepped(call):
        def wrapper(*args, **options):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return call(*args, **options)
        return wrapper
    os.replace, os.fsync, os.unlink = stepped(os.replace), stepped(os.fsync), stepped(os.unlink)
    Path.unlink, Path.open = stepped(Path.unlink), stepped(Path.open)
    save(1)

outcome, stale = [], 0
for step in range(100):
    _, status = os.waitpid(forked(lambda: killed_at(step)), 0)
    outcome.append(check())
    stale += any(p.name.endswith(".tmp") for p in folder.iterdir())
    save(0)
    assert check() == 0
    assert len(list(folder.iterdir())) == 2, "stale files"
    if os.waitstatus_to_exitcode(status) == 0:
        break
print(json.dumps({"outcome": outcome, "stale": stale}))
"""
    found = forking(script, tmp_path / "guard")
    outcome = found["outcome"]
    # The old guard up to one step, the new one from there on, and both were seen.
    assert outcome == sorted(outcome)
    assert set(outcome) == {0, 1}
    assert len(outcome) >= 10
    assert found["stale"] >= 4


def test_row34_kill_at_any_time(tmp_path: Path) -> None:
    script = """
import random
random.seed(0)
save(0)
def for_ever(written):
    which = 0
    while True:
        which += 1
        save(which, 200_000)
        os.write(written, b".")

last, stale = [], 0
for kill in range(10):
    done, written = os.pipe()
    child = forked(lambda: for_ever(written))
    # Counted in saves, not in seconds: a child may wait long for a core.
    for _ in range(kill % 4):
        os.read(done, 1)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(done)
    os.close(written)
    last.append(check())
save(0)
print(json.dumps({"last": last, "files": sorted(p.name for p in folder.iterdir())}))
"""
    found = forking(script, tmp_path / "guard")
    assert len(found["last"]) == 10
    assert max(found["last"]) > 1
    assert found["files"] == [GUARD_FILE, CONFIG_FILE]


def test_row35_two_processes_save_at_once(tmp_path: Path) -> None:
    script = """
save(1)
def saver(which):
    for _ in range(40):
        save(which)

children = [forked(lambda: saver(1)), forked(lambda: saver(2))]
seen, codes = {1: 0, 2: 0}, []
while len(codes) < 2:
    seen[check()] += 1
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        codes.append(os.waitstatus_to_exitcode(status))
print(json.dumps({"seen": seen, "codes": codes, "last": check(), "files": sorted(p.name for p in folder.iterdir())}))
"""
    found = forking(script, tmp_path / "guard")
    assert found["codes"] == [0, 0]
    assert min(found["seen"].values()) > 0
    assert found["last"] in (1, 2)
    assert found["files"] == [GUARD_FILE, CONFIG_FILE]
