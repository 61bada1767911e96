"""The content of ``result.json``: typed records, written as JSON and read back strictly."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fasthessian.__about__ import __version__
from fasthessian.app.analysis import Analysis
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.errors import InputError
from fasthessian.operators.checks import Check
from fasthessian.results.fields import WORDS, Field, fields_of, json_types, parse, scalar
from fasthessian.results.record import Record, empty_axes
from fasthessian.results.records import BlockSpectra, Density, Eigenpairs, Estimate, Landscape

FORMAT = "fasthessian result 1"
PARTS: dict[str, type[Record]] = {
    "top": Eigenpairs,
    "bottom": Eigenpairs,
    "trace": Estimate,
    "density": Density,
    "landscape": Landscape,
    "blocks": BlockSpectra,
    "check": Check,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """A problem, what was asked for, the numbers, and the machine that computed them."""

    name: str  # of the problem
    info: Mapping[str, Any]  # plain JSON: what the problem is and how it was trained
    options: AnalysisOptions
    analysis: Analysis
    environment: Mapping[str, Any]
    timing: Mapping[str, float]  # seconds by stage

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON types; each part has the fields of its record.

        The same seed gives the same content, except for ``timing``. Eigenvectors are left out:
        they are as long as the model.
        """
        found = self.analysis
        problem = {"name": self.name, "parameters": found.parameters, "tensors": found.tensors}
        parts = {name: getattr(found, name) for name in PARTS}
        return {
            "format": FORMAT,
            "problem": problem | json_types(self.info),
            "settings": json_types(self.options),
            "loss": json_types(found.loss),
            "gradient_norm": json_types(found.gradient_norm),
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "matvecs": found.matvecs,
            "notes": list(found.notes),
            "environment": json_types(self.environment),
            "timing": {name: round(seconds, 3) for name, seconds in self.timing.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Result:
        """The result whose ``to_json`` gave ``content``; what is missing has its default.

        Raises:
            ValueError: a part is damaged; the message names it.
        """
        problem, settings, environment, timing = (
            _object(name, content) for name in ("problem", "settings", "environment", "timing")
        )
        name = _scalar("name", str, problem, "")
        numbers: dict[str, Any] = {
            "parameters": _scalar("parameters", int, problem, 0),
            "tensors": _scalar("tensors", int, problem, 0),
            "engine": _scalar("engine", str, environment, ""),
            "kernels": _scalar("kernels", str, environment, ""),
            "loss": _scalar("loss", float, content, None),
            "gradient_norm": _scalar("gradient_norm", float, content, None),
            "matvecs": _scalar("matvecs", int, content, 0),
        }
        notes = fields_of(Analysis)["notes"]
        numbers["notes"] = scalar("notes", notes, content.get("notes", []), {}, null=False)
        about = set(problem) - {"name", "parameters", "tensors"}
        seconds = {key: _scalar(key, float, timing, None) for key in timing}
        parts: dict[str, Any] = {**dict.fromkeys(PARTS), **records(content)}
        return cls(
            name=name,
            info={key: problem[key] for key in problem if key in about},
            options=_options(settings),
            analysis=Analysis(**numbers, **parts, seconds=seconds),
            environment=environment,
            timing=seconds,
        )


def result_of(
    problem: Problem, options: AnalysisOptions, analysis: Analysis, timing: Mapping[str, float]
) -> Result:
    """The result of a run that ends now on this machine."""
    environment = {
        "fasthessian": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "kernels": analysis.kernels,
        # the rest of the words names the memory that was free, which differs between runs
        "engine": analysis.engine.partition(":")[0],
    }
    return Result(problem.name, problem.info, options, analysis, environment, timing)


def encode(result: Result) -> bytes:
    """The result as the bytes of ``result.json``."""
    return (json.dumps(result.to_json(), indent=1, allow_nan=False) + "\n").encode()


def read(path: str | os.PathLike[str]) -> Result:
    """Read ``result.json`` back.

    Raises:
        ValueError: the file is not a result, or a part is damaged; one line.
        OSError: the file cannot be read.
    """
    if Path(path).is_dir():
        raise InputError(f"{path} is a folder; give {Path(path) / 'result.json'}")
    try:
        content = parse(Path(path).read_bytes().decode(), finite=True)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    form = content.get("format") if isinstance(content, dict) else None
    if form != FORMAT:
        why = f"found {form!r:.60}"
        if isinstance(form, str) and re.fullmatch(r"fasthessian result \d+", form):
            why = f"a newer version wrote {form!r}, update fasthessian"
        raise InputError(
            f"{path} is not a result of this version; expected format {FORMAT!r}, {why}"
        )
    try:
        return Result.from_json(content)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def records(content: Mapping[str, Any]) -> dict[str, Any]:
    """The records in the content of ``result.json`` by name, without eigenvectors.

    Raises:
        ValueError: a part lacks a field, or holds what the field does not accept.
    """
    found: dict[str, Any] = {}
    for name, kind in PARTS.items():
        if content.get(name) is None:
            continue
        try:
            record = kind.from_json(content[name])
            if empty := empty_axes(record):
                raise InputError(f"it is empty: {', '.join(empty)} = 0")
        except ValueError as error:
            raise InputError(f"the part {name!r} of the result is damaged ({error})") from error
        found[name] = record
    return found


def _options(settings: Mapping[str, Any]) -> AnalysisOptions:
    """The options from their settings; later options than the file's have their defaults."""
    hints = typing.get_type_hints(AnalysisOptions)
    known = {name: value for name, value in settings.items() if name in hints}
    for name, value in known.items():
        kinds = typing.get_args(hints[name]) or (hints[name],)
        if type(value) not in kinds and not (type(value) is int and float in kinds):
            words = " or ".join(WORDS.get(kind, "null") for kind in kinds)
            raise InputError(f"settings: {name} must be {words}, got {value!r:.60}")
    return AnalysisOptions(**known)


def _object(name: str, content: Mapping[str, Any]) -> Mapping[str, Any]:
    found = content.get(name, {})
    if not isinstance(found, Mapping):
        raise InputError(f"{name} must be an object of JSON, got a {type(found).__name__}")
    return found


def _scalar(name: str, kind: type, content: Mapping[str, Any], missing: Any) -> Any:
    """A number or text that may be missing; null stands for a number that is not finite."""
    return scalar(name, Field(kind, (), (), ()), content.get(name, missing), {}, null=True)
