"""Safetensors written as a stream and read by mapping: neither takes memory for the whole file.

The header is padded so that tensors begin at a multiple of 64 bytes of the file; tensors follow each other without
gaps, as the format asks. Other readers of safetensors read these files.

A file is written beside its place and then put there whole: who has the old one mapped keeps it as it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import mmap
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from pareto_core.errors import DataError

ALIGNMENT = 64
_HEADER_LIMIT = 100_000_000
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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written: its dtype and shape are known, its values are made when their turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A name beside ``path``; the file written there takes the place of ``path`` at the end, unless the body fails.

    A file that is truncated while it is mapped ends the process that reads it: none is written where it lies.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Pending]) -> tuple[int, str]:
    """Write the tensors in the order given; return the file's bytes and sha256.

    The file is whole or not there; tensors may come from a mapping of the one that it replaces.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise DataError(f"{path}: {name} has dtype {tensor.dtype}, which the format does not hold")
        span = [offset, offset + tensor.bytes]
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    digest = hashlib.sha256()
    with staged(path) as part, part.open("xb") as file:
        for chunk in _chunks(text, tensors.values()):
            digest.update(chunk)
            file.write(chunk)
    return 8 + len(text) + offset, digest.hexdigest()


def _chunks(text: bytes, tensors: Iterable[Pending]) -> Iterable[Any]:
    yield len(text).to_bytes(8, "little")
    yield text
    for tensor in tensors:
        values = tensor.make().detach().contiguous()
        assert values.dtype == tensor.dtype
        assert tuple(values.shape) == tensor.shape
        if values.numel():
            yield memoryview(values.view(-1).view(torch.uint8).numpy())


def map_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the file as views of a private mapping of it: a page is read when it is first touched.

    Raises :class:`DataError` with the file's name where it is truncated or its header does not fit.
    """
    try:
        with path.open("rb") as file:
            return map_open(path, file)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def map_open(path: Path, file: BinaryIO) -> dict[str, torch.Tensor]:
    """:func:`map_tensors` of the open ``file``; ``path`` is what errors call it."""
    size = file.seek(0, 2)
    if size < 8:
        raise DataError(f"{path} has {size} bytes: truncated")
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    length = int.from_bytes(mapping[:8], "little")
    if length > min(size - 8, _HEADER_LIMIT):
        raise DataError(f"{path}: a header of {length} bytes in a file of {size}: truncated or damaged")
    try:
        header = json.loads(mapping[8 : 8 + length])
        header.pop("__metadata__", None)
        entries = {str(name): _entry(path, name, item) for name, item in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: the header is damaged ({error})") from error
    _check_spans(path, entries, size - 8 - length)
    return {name: _view(mapping, 8 + length, *entry) for name, entry in entries.items()}


Entry = tuple[torch.dtype, tuple[int, ...], int, int]


def _entry(path: Path, name: str, item: Mapping[str, Any]) -> Entry:
    if item["dtype"] not in _DTYPES:
        raise DataError(f"{path}: {name} has dtype {item['dtype']!r}; known: {', '.join(_DTYPES)}")
    dtype = _DTYPES[item["dtype"]]
    shape, (first, last) = tuple(item["shape"]), item["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise DataError(f"{path}: {name} has a shape or offsets that are not whole numbers")
    if last - first != math.prod(shape) * dtype.itemsize:
        raise DataError(f"{path}: {name} of shape {list(shape)} does not fit its {last - first} bytes")
    return dtype, shape, first, last


def _check_spans(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    end = 0
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if first != end:
            raise DataError(f"{path}: {name} begins at byte {first}, expected {end}: damaged")
        end = last
    if end != size:
        raise DataError(f"{path} holds {size} bytes of tensors, its header describes {end}: truncated or damaged")


def _view(mapping: mmap.mmap, start: int, dtype: torch.dtype, shape: tuple[int, ...], first: int, last: int) -> Any:
    if first == last:
        return torch.empty(shape, dtype=dtype)
    aligned = (start + first) % dtype.itemsize == 0
    if not aligned:  # allowed by the format, not by torch
        raw = torch.frombuffer(bytearray(mapping[start + first : start + last]), dtype=torch.uint8)
        return raw.view(dtype).view(shape)
    count = (last - first) // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start + first).view(shape)
