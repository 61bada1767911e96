"""The generations of a checkpoint in its folder: written whole or not at all, and read back.

A save writes a file of tensors per rank, ``state-00012-0of4.safetensors``, and then rank 0 writes
``index-00012.json``. That file makes the generation complete: it holds the call, the numbers of the
states, and where each tensor lies. Tensors that never change are in a file ``frozen-...`` of the
first generation that has them. The newest two generations are kept. If a run is killed during a
save, the generation before it is whole.
"""

from __future__ import annotations

import contextlib
import functools
import re
import uuid
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fasthessian.__about__ import __version__
from fasthessian.checkpoints import index, shards
from fasthessian.checkpoints.index import Json
from fasthessian.checkpoints.shards import DTYPES, TYPES, Piece, Source
from fasthessian.checkpoints.state import State
from fasthessian.checkpoints.states import Part
from fasthessian.distributed.ranks import Ranks
from fasthessian.distributed.slices import Slice
from fasthessian.errors import InputError

FORMAT = 1
INDEXES = "index-*.json"
FILES = re.compile(
    r"(?:index|state|frozen)-(\d{5,})(?:-\d+of\d+)?\.(?:json|safetensors)(?:\.part)?"
)
Held = tuple[Tensor, tuple[int, int]]  # a tensor, and the columns of it that this rank holds


class Folder:
    """The folder of a checkpoint.

    Args:
        path: the folder.
        ranks: that write and read it together.
    """

    def __init__(self, path: Path, ranks: Ranks) -> None:
        self.path, self.ranks = path, ranks
        self._id = uuid.uuid4().hex  # of the run; rank 0's counts
        self._index: Json | None = None  # of the newest whole generation
        self._new = False  # whether ``claim`` made the folder
        self._generation = max(self._numbers("*"), default=0)

    def claim(self) -> None:
        """Make the folder, and see that files can be written, before a run begins.

        Raises:
            FileExistsError: it holds a checkpoint.
            OSError: it cannot be made or written.
        """
        if self._numbers(INDEXES):
            raise FileExistsError(self.path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"folder {self.path.parent} does not exist; make it first")
        self._new = not self.path.exists()
        if not self._new and not self.path.is_dir():
            raise NotADirectoryError(f"checkpoint must be a folder, but {self.path} is a file")
        self.path.mkdir(exist_ok=True)
        trial = self.path / f"state-00000-{self.ranks.rank}of{self.ranks.size}.safetensors.part"
        trial.write_bytes(b"\0")
        trial.unlink()

    def abandon(self) -> None:
        """Remove the folder if ``claim`` made it and nothing was saved."""
        if self._new:
            with contextlib.suppress(OSError):  # it is not empty, or another rank was faster
                self.path.rmdir()

    def write(
        self,
        body: Json,
        states: Mapping[tuple[str, str], State],
        part: Slice | None = None,
    ) -> None:
        """Write a generation, and remove those before the last one.

        Args:
            body: what the index holds besides the states: numbers, text, lists and dictionaries.
            states: by the names of their run and of the state.
            part: of each row, that this rank holds; None if every rank holds whole rows.
        """
        ranks = self.ranks
        each = ranks.objects([self._id, self._generation])
        self._id, self._generation = each[0][0], 1 + max(number for _, number in each)
        runs, files = self._planned(states, part)
        mine: list[Any] = []
        for file, own in files.items():
            sums = ranks.together(functools.partial(self._written, file, own))
            mine += [[key, file, key, *held, sums[key]] for key, (_, held) in own.items()]
        for key, *piece in (piece for each_rank in ranks.objects(mine) for piece in each_rank):
            run, name, tensor_name = key.rsplit("/", 2)  # only the first may hold a slash
            place = runs[run][name]["tensors"][tensor_name]
            place["pieces"].append(piece)
            if place["split"]:
                place["shape"][-1] = max(place["shape"][-1], piece[3])
        before, self._index = self._index, {
            **body,
            "format": FORMAT,
            "version": __version__,
            "id": self._id,
            "generation": self._generation,
            "runs": runs,
        }  # fmt: skip
        ranks.together(lambda: self._commit([self._index, before]) if ranks.rank == 0 else None)

    def _planned(
        self, states: Mapping[tuple[str, str], State], own: Slice | None
    ) -> tuple[Json, dict[str, dict[str, Held]]]:
        """The states as the index has them, and what this rank writes into each of two files.

        What never changes is written once, into a file of its own.
        """
        rank, size = self.ranks.rank, self.ranks.size
        files: dict[str, dict[str, Held]] = {
            f"{kind}-{self._generation:05}-{rank}of{size}.safetensors": {}
            for kind in ("state", "frozen")
        }
        changing, frozen = files.values()
        known, runs = self._frozen(), Json()
        for (run, name), state in states.items():
            places: Json = {}
            for split, tensors in ((False, state.tensors()), (True, state.split())):
                for tensor_name, tensor in tensors.items():
                    key = f"{run}/{name}/{tensor_name}"
                    if key in known:
                        places[tensor_name] = known[key]
                        continue
                    places[tensor_name] = {
                        "dtype": DTYPES[tensor.dtype],
                        "shape": [*tensor.shape[:-1], 0] if split else list(tensor.shape),
                        "split": split,
                        "pieces": [],
                    }
                    if split and own is not None:  # without padding
                        held = own.first, own.first + own.held
                        (frozen if state.FROZEN else changing)[key] = tensor[:, : own.held], held
                    elif rank == 0:
                        held = (0, tensor.shape[-1]) if split else (0, 0)
                        (frozen if state.FROZEN else changing)[key] = tensor, held
            part = {"numbers": state.numbers(), "frozen": state.FROZEN, "tensors": places}
            runs.setdefault(run, {})[name] = part
        return runs, files

    def _written(self, file: str, own: Mapping[str, Held]) -> dict[str, int]:
        """Write a file, if it holds anything; the sums of its tensors."""
        tensors = {key: tensor for key, (tensor, _) in own.items()}
        return shards.write(self.path / file, tensors, self._id) if tensors else {}

    def read(self) -> Json:
        """The index of the newest generation that is whole.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no whole generation, or one of another format; the message has one
                line.

        Warns:
            UserWarning: a newer generation is damaged.
        """
        self.ranks.together(self._exists)
        problems: list[str] = []
        numbers = self.ranks.objects(sorted(self._numbers(INDEXES), reverse=True))[0]
        for number in numbers:
            problem = ""
            try:
                self._index = self._checked(f"index-{number:05}.json")
            except (InputError, OSError) as error:
                problem = " ".join(str(error).split())
            found = [word for word in self.ranks.objects(problem) if word]
            if not found:
                break
            problems.append(found[0])
            self._index = None
        if not numbers:
            raise InputError(
                f"{self.path} holds no checkpoint, because no save was completed; call the "
                f"algorithm again"
            )
        if self._index is None:
            raise InputError(
                f"{self.path} holds no checkpoint that is whole ({problems[0]}); delete the folder "
                f"and call the algorithm again"
            )
        if self._index["format"] != FORMAT:
            raise InputError(
                f"{self.path} has the format {self._index['format']} of fasthessian "
                f"{self._index['version']}, and format {FORMAT} is read here; resume it there"
            )
        self._id = self._index["id"]
        if problems:
            warnings.warn(
                f"the newest checkpoint in {self.path} is damaged ({problems[0]}); the one before "
                f"it is used",
                stacklevel=4,
            )
        return self._index

    def newest(self) -> Json:
        """The newest index, whose tensors are not checked.

        Raises:
            ValueError: it is damaged.
        """
        return index.read(self.path / f"index-{max(self._numbers(INDEXES)):05}.json")

    def parts(self, run: str, own: Slice | None = None) -> dict[str, Part]:
        """The states of a run as they were saved; ``own`` is what this rank holds of each row."""
        assert self._index is not None
        found = {}
        for name, part in self._index["runs"].get(run, {}).items():
            found[name] = Part(
                part["numbers"],
                {key: self._source(place, own) for key, place in part["tensors"].items()},
            )
        return found

    def _exists(self) -> None:
        if not self.path.is_dir():
            raise FileNotFoundError(f"{self.path} is not the folder of a checkpoint")

    def _source(self, place: Json, own: Slice | None) -> Source:
        pieces = [Piece(*piece) for piece in place["pieces"]]
        dtype, shape, columns, width = TYPES[place["dtype"]], place["shape"], None, 0
        if place["split"]:
            columns = 0, shape[-1]
            if own is not None:
                columns, width = (own.first, own.first + own.held), own.width
        return Source(self.path, dtype, shape, pieces, columns, width)

    def _numbers(self, pattern: str) -> set[int]:
        """The numbers of the generations that have a file of this pattern."""
        matches = (FILES.fullmatch(path.name) for path in self.path.glob(pattern))
        return {int(match[1]) for match in matches if match}

    def _checked(self, name: str) -> Json:
        """An index whose own sum and whose tensors' sums are right.

        Raises:
            ValueError: it is damaged, or a file that it names is.
        """
        found = index.read(self.path / name)
        if found["format"] == FORMAT:
            # each rank checks its share of the files
            pieces = [Piece(*piece) for piece in index.pieces(found)]
            files = sorted({piece.file for piece in pieces})[self.ranks.rank :: self.ranks.size]
            shards.verify(self.path, [p for p in pieces if p.file in files], found["id"])
        return found

    def _frozen(self) -> Json:
        """Where the tensors lie, by key, that never change and are written already."""
        found = {}
        for run, parts in (self._index or {"runs": {}})["runs"].items():
            for name, part in parts.items():
                if part["frozen"]:
                    for key, place in part["tensors"].items():
                        found[f"{run}/{name}/{key}"] = place
        return found

    def _commit(self, indexes: Sequence[Json | None]) -> None:
        """Write the first index, and remove the files that none of them names."""
        index.write(self.path / f"index-{self._generation:05}.json", indexes[0])
        self._remove_others(indexes)

    def _remove_others(self, indexes: Sequence[Json | None]) -> None:
        """Remove the files of all generations up to this one, except those of ``indexes``."""
        known = [each for each in indexes if each is not None]
        kept = {piece[0] for each in known for piece in index.pieces(each)}
        kept |= {f"index-{each['generation']:05}.json" for each in known}
        paths = sorted(self.path.glob("*"))  # indexes first: a killed removal leaves none alone
        for path in paths:
            match = FILES.fullmatch(path.name)
            if match and int(match[1]) <= self._generation and path.name not in kept:
                path.unlink(missing_ok=True)
