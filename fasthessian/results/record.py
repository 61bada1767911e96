"""The base of all result records: immutable fields, saved as one ``.npz`` file or as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.results import npz
from fasthessian.results.fields import (
    OMITTED,
    fields_of,
    fits,
    json_types,
    numbers,
    obey,
    parse,
    scalar,
)

R = TypeVar("R", bound="Record")


def write_whole(path: str | os.PathLike[str], payload: bytes, *, overwrite: bool = False) -> None:
    """Write ``payload`` to ``path`` completely or not at all (temporary file, then rename).

    Raises:
        FileExistsError: ``path`` exists and ``overwrite`` is False.
        OSError: the folder is missing or cannot be written.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"folder {target.parent} does not exist; make it first")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass overwrite=True or choose another path")
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def defaults(kind: type[Record]) -> dict[str, Any]:
    """The fields that a file of an earlier version may lack, with their default values."""
    fields = dataclasses.fields(kind)
    return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """Base of the results: immutable fields that are saved to a file or converted to JSON."""

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON types: tensors as lists, null for a number that is not finite.

        Fields that are declared ``OMITTED``, such as eigenvectors, are left out.
        """
        return cast("dict[str, Any]", json_types(self))

    @classmethod
    def from_json(cls: type[R], given: Any) -> R:
        """The record whose fields ``to_json`` gave, on the CPU; null is read as NaN.

        An omitted tensor becomes an empty one. Unknown names are ignored.

        Raises:
            ValueError: a field is missing, or holds what the class does not accept.
        """
        if not isinstance(given, Mapping):
            raise InputError(f"expected an object of JSON, got a {type(given).__name__}")
        standard = defaults(cls)
        values: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for name, field in fields_of(cls).items():
            if OMITTED in field.rules:
                values[name] = torch.empty((0,) * len(field.axes), device="cpu")
            elif name not in given and name in standard:
                values[name] = standard[name]
            elif name not in given:
                raise InputError(f"{name} is missing")
            elif field.kind is Tensor:
                array = numbers(name, given[name])
                fits(name, field, array.dtype, array.shape, sizes)
                obey(name, field, array)
                values[name] = torch.from_numpy(array)
            elif issubclass(field.kind, Record):
                try:
                    values[name] = field.kind.from_json(given[name])
                except ValueError as error:
                    raise InputError(f"{name}: {error}") from error
            else:
                values[name] = scalar(name, field, given[name], sizes, null=True)
        return cls(**values)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the record to ``path`` as NumPy ``.npz``, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.
        """
        arrays: dict[str, np.ndarray[Any, Any]] = {}
        header = json.dumps(self._packed("", arrays))
        buffer = io.BytesIO()
        arrays["__record__"] = np.array(header)
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # its keywords are not all arrays
        write_whole(path, buffer.getvalue(), overwrite=overwrite)

    def _packed(self, prefix: str, arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
        """Name and scalars; tensors are added to ``arrays``, a nested record's under its name."""
        scalars: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                arrays[prefix + field.name] = value.detach().cpu().numpy()
            elif isinstance(value, Record):
                scalars[field.name] = value._packed(f"{prefix}{field.name}.", arrays)
            else:
                scalars[field.name] = value
        return {"record": type(self).__name__, "scalars": scalars}

    @classmethod
    def load(cls: type[R], path: str | os.PathLike[str]) -> R:
        """Read a record of this class back, on the CPU.

        Names, types, shapes and sizes are compared with the annotations of the fields before any
        array is read.

        Raises:
            ValueError: the file is not a record, is cut short or is a record of another class, or
                a field holds what the class does not accept.
        """
        name = cls.__name__
        try:
            with open(path, "rb") as stream:
                archive = npz.Archive(stream)
                header = parse(archive.text())
                found = header.get("record") if isinstance(header, dict) else None
                if found not in [kind.__name__ for kind in Record.__subclasses__()]:
                    raise InputError(f"it holds no record that is known here, but {found!r:.60}")
                record = None
                if found == name:
                    cls._scalars("", header)
                    if odd := set(archive.infos) - {npz.TEXT, *cls._members()}:
                        raise InputError(f"another version's fields: {', '.join(sorted(odd))}")
                    record = cls._unpacked("", header, archive)
        except FileNotFoundError:
            raise
        except Exception as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path} is not a saved {name} ({words})") from error
        if record is None:
            raise InputError(f"{path} holds a {found}, not a {name}; use {found}.load")
        return record

    @classmethod
    def _members(cls, prefix: str = "") -> Iterator[str]:
        """Names of the arrays in a file; those of a nested record begin with its name."""
        for name, field in fields_of(cls).items():
            if field.kind is Tensor:
                yield prefix + name
            elif issubclass(field.kind, Record):
                yield from field.kind._members(f"{prefix}{name}.")

    @classmethod
    def _scalars(cls, prefix: str, header: Any) -> dict[str, Any]:
        """The scalars of a record; raises unless it and its nested records are of their classes."""
        known = header if isinstance(header, dict) else {}
        found, given = known.get("record"), known.get("scalars")
        if found != cls.__name__ or not isinstance(given, dict):
            other = isinstance(found, str) and found != cls.__name__
            kind = f"a {found:.40}" if other else f"{header!r:.40}"
            raise InputError(f"{prefix.rstrip('.')} is {kind}, not a {cls.__name__}")
        for name, field in fields_of(cls).items():
            if isinstance(field.kind, type) and issubclass(field.kind, Record) and name in given:
                field.kind._scalars(f"{prefix}{name}.", given[name])
        return given

    @classmethod
    def _unpacked(cls: type[R], prefix: str, header: Any, archive: npz.Archive) -> R:
        """The record whose arrays have names that begin with ``prefix``."""
        given = cls._scalars(prefix, header)
        values, arrays, sizes = defaults(cls), [], dict[str, int]()
        for name, field in fields_of(cls).items():
            where = prefix + name
            if field.kind is Tensor and where in archive.infos:
                fits(where, field, *archive.header(where), sizes)
                arrays.append(name)
            elif field.kind is not Tensor and name in given:
                values[name] = (
                    field.kind._unpacked(f"{where}.", given.pop(name), archive)
                    if issubclass(field.kind, Record)
                    else scalar(where, field, given.pop(name), sizes, null=False)
                )
        if odd := set(fields_of(cls)) - {*values, *arrays} | set(given):
            raise InputError(f"another version's fields: {', '.join(sorted(odd))}")
        for name in arrays:
            array = archive.read(prefix + name)
            obey(prefix + name, fields_of(cls)[name], array)
            values[name] = torch.from_numpy(array)
        return cls(**values)


def empty_axes(record: Record) -> list[str]:
    """Names of the axes of length 0, except those that may have that length."""
    fields = fields_of(type(record))
    axes = {axis for field in fields.values() for axis in field.axes}
    found: dict[str, int] = {}
    for name, field in fields.items():
        if field.kind is Tensor and OMITTED not in field.rules:
            names = (axis.rstrip("?") for axis in field.axes)
            found |= zip(names, getattr(record, name).shape, strict=False)
    return [axis for axis, size in found.items() if size == 0 and f"{axis}?" not in axes]
