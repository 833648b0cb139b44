"""The saved guard: a folder with one authority, `ood_guard.safetensors`, and a readable copy of its settings.

The metadata of the authority holds the settings as JSON and a SHA-256 digest over settings and tensors, so that one
`os.replace` commits a save, and a changed or cut file never loads. The digest rule is the same in every format version.
Nothing is unpickled, tensor names are never used as paths, and sizes are bounded before anything is parsed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from rm_ood.atomic import locked_folder, refuse_other_than_file, remove_temporaries, sync_folder, write_temporary
from rm_ood.errors import FormatError, InputError, IntegrityError, SaveError
from rm_ood.strict_json import canonical_json, parse_json

GUARD_FILE = "ood_guard.safetensors"
CONFIG_FILE = "ood_guard_config.json"
FORMAT_VERSION = 1
MAX_FILE = 8 * 2**30
MAX_HEADER = 2**20
MAX_METADATA = 2**19
MAX_TENSORS = 512
MAX_JSON = 2**20
MAX_SIZE = 2**40
MAX_DIMENSIONS = 8
LOCK_WAIT_S = 60.0

_KEY = "rm_ood"
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CHANGED = "it was cut or changed after it was written. Copy the guard again from where it was saved"


def write_guard(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, overwrite: bool = False
) -> None:
    """Save a guard atomically: after a crash at any point the folder holds the old guard or the new one.

    The bytes depend on the arguments and the versions of `rm_ood` and safetensors alone. An identical guard that is
    already there is left as it is.

    Args:
        folder: made if missing; its own folder, not the reward model's.
        tensors: name -> tensor; copied to CPU.
        config: JSON-able settings.
        overwrite: replace a different guard.

    Raises:
        SaveError: the folder cannot be written (chained OSError), holds a different guard or a model, or the target is
            a symbolic link. Whatever was there before still loads.
        InputError: names, dtypes or settings that cannot be saved.
    """
    blob, envelope = _sealed(tensors, config)
    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
        with locked_folder(target, LOCK_WAIT_S) as locked:
            if locked is False:
                raise SaveError(f"{target}: another process has been saving here for {LOCK_WAIT_S:.0f} s")
            _save(target, blob, envelope, overwrite)
    except SaveError:
        raise
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise SaveError(f"guard not saved to {target}: {why}. What was there before still loads") from error


def read_guard(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load and verify a guard: (tensors on CPU, settings).

    Raises:
        FileNotFoundError: no guard file; the message names the file wanted.
        IntegrityError: the file was cut or changed.
        FormatError: it is something else, was written in a newer format, or the readable copy was edited.
    """
    target = Path(folder)
    try:
        return _read_guard(target)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FormatError(f"{target} cannot be read: {error.strerror or type(error).__name__}") from error


def guard_digest(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    """SHA-256 over settings and tensors, as hexadecimal digits: the digest that a save of them by this version holds."""
    own = {name: _savable(name, tensor) for name, tensor in sorted(tensors.items())}
    return str(_envelope(config, own)["digest"])


def _read_guard(target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = _find(target)
    envelope, tensors, identity = _read(path)
    differing = _copy_differences(target, envelope)
    if differing:
        # A save in another process may have been between its two files: look again while nobody saves.
        with locked_folder(target, LOCK_WAIT_S):
            envelope, tensors, identity = _read(path)
            differing = _copy_differences(target, envelope)
    if differing:
        raise FormatError(
            f"{target / CONFIG_FILE} differs from {GUARD_FILE} in {', '.join(differing[:10])}. Settings are read from "
            f"{GUARD_FILE} only: delete the edited copy, and set other values through the constructor"
        )
    if differing is None:
        _rebuild_copy(target, envelope, identity)
    return tensors, envelope["config"]


def check_schema(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    *,
    allow_inf: Collection[str] = (),
) -> None:
    """Require exactly the expected tensors, and finite values.

    Args:
        tensors: what was loaded.
        expected: name -> (dtype, shape).
        allow_inf: names in which +inf and -inf are legal; NaN never is.

    Raises:
        FormatError: names every missing, unknown, misshapen or non-finite tensor.
    """
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in expected]
    for name, (dtype, shape) in expected.items():
        if name not in tensors:
            continue
        tensor = tensors[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            problems.append(f"{name}: expected {dtype} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        elif bool(torch.isnan(tensor).any()) or (name not in allow_inf and bool(torch.isinf(tensor).any())):
            problems.append(f"{name} holds NaN or infinity")
    if problems:
        raise FormatError(f"saved guard: {'; '.join(problems)}")


def seal(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> bytes:
    """The bytes of an authority file, for a file of another kind or the wire: no pickle, and a digest over all of it.

    Raises:
        InputError: names, dtypes or settings that cannot be saved.
    """
    return _sealed(tensors, config)[0]


def unseal(data: bytes, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `seal` was given: (tensors on CPU, settings).

    Args:
        what: where the bytes come from, for errors.
    Raises:
        IntegrityError: they were cut or changed. FormatError: something else, or a newer format.
    """
    start, size = data[:64], len(data)
    length = _header_length(what, start, size)
    envelope, tensors = _parse(what, start[:8], data[8 : 8 + length], data[8 + length :])
    return tensors, envelope["config"]


def _sealed(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    own = {name: _savable(name, tensor) for name, tensor in sorted(tensors.items())}
    envelope = _envelope(config, own)
    text = canonical_json(envelope)
    blob = safetensors.torch.save(own, {_KEY: text})
    sizes = {
        "tensors": (len(own), MAX_TENSORS),
        "bytes of settings": (len(text), MAX_METADATA),
        "bytes of readable settings": (len(_readable(envelope)), MAX_JSON),
        "bytes of header": (int.from_bytes(blob[:8], "little"), MAX_HEADER),
        "bytes": (len(blob), MAX_FILE),
    }
    for what, (size, limit) in sizes.items():
        if size > limit:
            raise InputError(f"guard too large to save: {size} {what}, at most {limit}")
    return blob, envelope


def _digest(envelope: Mapping[str, Any], parts: Mapping[str, tuple[str, list[int], memoryview]]) -> str:
    state = hashlib.sha256(canonical_json({k: v for k, v in envelope.items() if k != "digest"}).encode())
    for name, (dtype, shape, data) in sorted(parts.items()):
        state.update(f"\n{name} {dtype} {shape}\n".encode())
        state.update(data)
    return state.hexdigest()


def _parts(tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, list[int], memoryview]]:
    return {name: (_DTYPE_NAMES[t.dtype], list(t.shape), _bytes(t)) for name, t in tensors.items()}


def _bytes(tensor: Tensor) -> memoryview:
    raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def _savable(name: str, tensor: Tensor) -> Tensor:
    if not _NAME.fullmatch(name):
        raise InputError(f"tensor name {name!r}: use letters, digits, '_', '-' and single dots, at most 128")
    if tensor.dtype not in _DTYPE_NAMES or tensor.layout != torch.strided or tensor.is_meta:
        raise InputError(f"tensor {name}: {tensor.dtype} ({tensor.layout}, {tensor.device}) cannot be saved")
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _envelope(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        plain = parse_json(canonical_json(config).encode(), "settings", MAX_METADATA)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"settings of the guard are not plain JSON: {error}") from error
    envelope = {"format_version": FORMAT_VERSION, "rm_ood_version": package_version(), "config": plain}
    return {**envelope, "digest": _digest(envelope, _parts(tensors))}


def package_version() -> str:
    """The installed version of `rm_ood`."""
    try:
        return metadata.version("rm_ood")
    except metadata.PackageNotFoundError:
        return "0.0.0+source"


def _readable(envelope: Mapping[str, Any]) -> bytes:
    return (json.dumps(envelope, sort_keys=True, indent=2) + "\n").encode()


def _save(folder: Path, blob: bytes, envelope: Mapping[str, Any], overwrite: bool) -> None:
    _refuse_target(folder)
    for name in (GUARD_FILE, CONFIG_FILE):
        remove_temporaries(folder, name)
    if (folder / GUARD_FILE).exists():
        same = _holds(folder, envelope)
        if not (same or overwrite):
            raise SaveError(f"{folder} holds a different guard: pass overwrite=True, or choose another folder")
        if same and (folder / CONFIG_FILE).exists():
            return
    with contextlib.ExitStack() as cleanup:
        guard = write_temporary(folder, GUARD_FILE, blob, cleanup)
        copy = write_temporary(folder, CONFIG_FILE, _readable(envelope), cleanup)
        # Both are on the disk before anything is touched, and there is no copy while the authority changes: a kill in
        # between leaves a guard without its copy, never one beside the copy of another.
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        sync_folder(folder)
        os.replace(guard, folder / GUARD_FILE)
        sync_folder(folder)
        os.replace(copy, folder / CONFIG_FILE)
        sync_folder(folder)


def _refuse_target(folder: Path) -> None:
    for name in (GUARD_FILE, CONFIG_FILE):
        refuse_other_than_file(folder / name)
    model = folder / "config.json"
    if model.is_file():
        with model.open("rb") as file:
            if b'"model_type"' in file.read(MAX_JSON):
                raise SaveError(f"{folder} is the folder of a model (config.json): a guard needs a folder of its own")


def _holds(folder: Path, envelope: Mapping[str, Any]) -> bool:
    """Whether the folder holds this guard, with a copy that agrees, whatever version wrote it."""
    try:
        found, tensors, _ = _read(folder / GUARD_FILE)
        differing = _copy_differences(folder, found)
    except FormatError:
        return False
    as_now = {**envelope, "config": found["config"]}
    return not differing and _digest(as_now, _parts(tensors)) == envelope["digest"]


def _is_regular(path: Path) -> bool | None:
    """None where nothing is there. Asked once: a save may come between two questions."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _find(folder: Path) -> Path:
    path = folder / GUARD_FILE
    if folder.exists() and not folder.is_dir():
        raise FormatError(f"{folder} is a file; expected the folder of a saved guard, which holds {GUARD_FILE}")
    regular = _is_regular(path)
    if regular:
        return path
    if regular is False:
        raise FormatError(f"{path} is not a regular file")
    if folder.is_dir() and not any(folder.iterdir()):
        raise FormatError(f"{folder} is empty; expected {GUARD_FILE} in it")
    raise FileNotFoundError(errno.ENOENT, "no saved guard here, wanted", str(path))


_Identity = tuple[int, int, int]


def _identity(status: os.stat_result) -> _Identity:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], _Identity]:
    """The verified authority: envelope, tensors, and which file it was."""
    with path.open("rb") as file:
        status = os.fstat(file.fileno())
        if status.st_size > MAX_FILE:
            raise FormatError(f"{path}: {status.st_size} bytes, at most {MAX_FILE} are read")
        start = file.read(64)
        length = _header_length(path, start, status.st_size)
        file.seek(8)
        header, data = file.read(length), file.read(status.st_size)
    return *_parse(path, start[:8], header, data), _identity(status)


def _header_length(path: Path | str, start: bytes, size: int) -> int:
    length = int.from_bytes(start[:8], "little")
    # A flipped bit in the length of a guard must not pass for a foreign file: its header still starts with {.
    if length > MAX_HEADER and start[8:9] != b"{":
        _refuse_foreign(path, start)
    if len(start) < 8 or length > min(MAX_HEADER, size - 8):
        raise IntegrityError(f"{path}: header of {length} bytes in a file of {size}; {_CHANGED}")
    return length


def _parse(path: Path | str, start: bytes, header: bytes, data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    entries, text = _parse_header(path, header, len(data))
    slices = {name: (dtype, shape, memoryview(data)[i:j]) for name, (dtype, shape, i, j) in entries.items()}
    envelope = _verify(path, text, slices)
    try:
        tensors = safetensors.torch.load(start + header + data)
    except (safetensors.SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"{path}: safetensors refuses it ({type(error).__name__}: {error}); {_CHANGED}") from error
    return envelope, tensors


def _refuse_foreign(path: Path | str, start: bytes) -> None:
    text = start.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise FormatError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull")
    if text.startswith((b"<!doctype html", b"<html")):
        raise FormatError(f"{path} is an HTML page: the download went to a web page instead of the file")
    if start.startswith(b"PK"):
        raise FormatError(
            f"{path} is a zip archive (torch.save writes these): it is not opened, a guard is safetensors"
        )
    if start[:1] == b"\x80" and start[1] <= 5:
        raise FormatError(f"{path} is a pickle: it is not opened, since a pickle can run code; a guard is safetensors")


def _parse_header(
    path: Path | str, header: bytes, data_size: int
) -> tuple[dict[str, tuple[str, list[int], int, int]], str]:
    try:
        found = parse_json(header, f"header of {path}", MAX_HEADER)
    except FormatError as error:
        raise IntegrityError(f"{error}; {_CHANGED}") from error
    noted = found.pop("__metadata__", None) if isinstance(found, dict) else None
    if not isinstance(noted, dict) or list(noted) != [_KEY] or not isinstance(noted[_KEY], str):
        raise IntegrityError(f"{path} holds no guard: it is another safetensors file, or {_CHANGED}")
    if len(found) > MAX_TENSORS:
        raise FormatError(f"{path}: {len(found)} tensors, at most {MAX_TENSORS} are read")
    entries = {name: _parse_entry(path, name, entry) for name, entry in found.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != position:
            raise IntegrityError(f"{path}: tensor {name} does not start where the one before it ends; {_CHANGED}")
        position = end
    if position != data_size:
        raise IntegrityError(f"{path}: {data_size} bytes of tensors, {position} announced; {_CHANGED}")
    return entries, noted[_KEY]


def _parse_entry(path: Path | str, name: str, entry: Any) -> tuple[str, list[int], int, int]:
    shown = repr(name[:128])
    if not _NAME.fullmatch(name):
        raise IntegrityError(f"{path}: tensor name {shown} is not one that rm_ood writes; {_CHANGED}")
    if not isinstance(entry, dict) or sorted(entry) != ["data_offsets", "dtype", "shape"]:
        raise IntegrityError(f"{path}: tensor {shown} is not described as safetensors does; {_CHANGED}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise IntegrityError(f"{path}: tensor {shown} has an unknown dtype; {_CHANGED}")
    # The length first: the product of thousands of sizes would be a number of megabytes.
    if not _all_sizes(shape) or len(shape) > MAX_DIMENSIONS or not _all_sizes(offsets) or len(offsets) != 2:
        raise IntegrityError(f"{path}: tensor {shown} has an impossible shape or place; {_CHANGED}")
    if math.prod(shape) * _DTYPES[dtype].itemsize != offsets[1] - offsets[0]:
        raise IntegrityError(f"{path}: tensor {shown} of shape {shape} does not fill its place; {_CHANGED}")
    return dtype, shape, offsets[0], offsets[1]


def _all_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v <= MAX_SIZE for v in values)


def _verify(path: Path | str, text: str, slices: Mapping[str, tuple[str, list[int], memoryview]]) -> dict[str, Any]:
    try:
        envelope = parse_json(text.encode(), f"settings in {path}", MAX_METADATA)
    except FormatError as error:
        raise IntegrityError(f"{error}; {_CHANGED}") from error
    types = {"format_version": int, "rm_ood_version": str, "digest": str, "config": dict}
    if not isinstance(envelope, dict) or any(type(envelope.get(key)) is not kind for key, kind in types.items()):
        raise IntegrityError(f"{path}: the settings lack one of {', '.join(types)}; {_CHANGED}")
    # The digest is over values: the text has to be the one way of writing them, or a flipped bit could hide in it.
    if canonical_json(envelope) != text or _digest(envelope, slices) != envelope["digest"]:
        raise IntegrityError(f"{path}: the digest does not match the contents; {_CHANGED}")
    if not 1 <= envelope["format_version"] <= FORMAT_VERSION:
        raise FormatError(
            f"{path} was written by rm_ood {envelope['rm_ood_version']} (format {envelope['format_version']}), "
            f"this version reads up to {FORMAT_VERSION}: upgrade rm_ood"
        )
    return envelope


def _copy_differences(folder: Path, envelope: Mapping[str, Any]) -> list[str] | None:
    """Fields in which the readable copy differs from the authority; None when there is no copy."""
    path = folder / CONFIG_FILE
    if _is_regular(path) is False:
        raise FormatError(f"{path} is not a regular file: delete it, it is rebuilt from {GUARD_FILE}")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON + 1)
    except FileNotFoundError:
        # Not there, or just removed by a save in another process.
        return None
    try:
        return list(_differences(parse_json(data, str(path), MAX_JSON), envelope, ""))
    except FormatError as error:
        raise FormatError(f"{error}. Delete this copy, it is rebuilt from {GUARD_FILE}") from error


def _differences(copy: Any, authority: Any, at: str) -> Iterator[str]:
    if isinstance(copy, dict) and isinstance(authority, dict):
        for key in sorted(copy.keys() | authority.keys()):
            below = f"{at}.{key}" if at else key
            if key not in copy or key not in authority:
                yield below
            else:
                yield from _differences(copy[key], authority[key], below)
    elif canonical_json(copy) != canonical_json(authority):
        yield at or "everything"


def _rebuild_copy(folder: Path, envelope: Mapping[str, Any], identity: _Identity) -> None:
    # Only while nobody saves, and only beside the very file that was read: a copy of an older guard would be an error.
    with contextlib.suppress(OSError), locked_folder(folder, 0.0) as locked, contextlib.ExitStack() as cleanup:
        path = folder / CONFIG_FILE
        if locked and not path.exists() and _identity((folder / GUARD_FILE).stat()) == identity:
            os.replace(write_temporary(folder, CONFIG_FILE, _readable(envelope), cleanup), path)
