"""The folders that the service may touch, and what a path from the network means in them.

Such a path is `NAME/inside/it`: NAME stands for one of the folders that the server was started with.
It is resolved with all links followed, and has to end up in that folder, or in another of the same
use. So has every link inside a model: a cache whose snapshots link to its blobs works if the root
holds both.

Paths are resolved when a request comes in, and again by the process that opens them. What remains:
whoever may write into a root can change a link, or put a file there that is hard-linked to
another, between that moment and the opening. Roots are to be written by those only whom the operator
trusts; clients write nothing but checkpoints below the root of exports.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoq.bundled import model_path
from autoq.errors import DataError, ExportError, InputError, ModelError
from autoq.service.guard._root_content import check_content, check_data
from autoq.service.guard._root_models import find_models
from autoq.wire import ModelEntry

BUNDLED = "bundled"
MAXIMUM_LENGTH = 1000  # characters; the same as in `autoq.wire`
_MAXIMUM_PART = 255  # bytes, of most file systems
_SHOWN = 80  # characters of a refused path in a message

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Of characters that do not show, or that change how those beside them show."""


@dataclass(frozen=True, slots=True)
class Root:
    """A folder that the service may use: absolute, and without links."""

    name: str
    folder: Path


class Roots:
    """Folders of models, of calibration data, and for checkpoints.

    `models` and `data` are read, `exports` is written; the bundled model is always there.
    """

    def __init__(
        self,
        *,
        models: Sequence[Path | str] = (),
        data: Sequence[Path | str] = (),
        exports: Path | str | None = None,
    ) -> None:
        """
        Args:
            models: folders below which models lie; a folder may itself be a model.
            data: folders below which calibration data lie.
            exports: folder that checkpoints are written below.
        Raises:
            InputError: one of them is no folder, or checkpoints could be written over models or
                data.
        """
        taken: dict[Path, Root] = {}
        self._models = tuple(_root(folder, "--models", taken) for folder in models)
        self._data = tuple(_root(folder, "--data", taken) for folder in data)
        self._exports = () if exports is None else (_root(exports, "--exports", taken),)
        for root in self._exports:
            _refuse_over_others(root.folder, (*self._models, *self._data))

    def model(self, path: str) -> Path:
        """The folder of a model.

        Raises:
            ModelError: the path leads out of the roots of models or to nothing, or what is there
                is no folder or links out of them.
        """
        if path == BUNDLED:
            return model_path()
        found = _existing(path, self._models, "models", ModelError)
        check_content(found, _bounds(self._models), path, ModelError)
        return found

    def check_study(self, model: str, data: str | None) -> None:
        """Refuse work on a study whose model or data lie where the service may not read.

        Whoever searched it on the command line may; a client of the service has it read again, and
        its weights written to where exports go.

        Args:
            model: the study's model folder, as the store has it.
            data: its calibration data, likewise.
        Raises:
            ModelError: the model is in no root of models, or links out of them.
            DataError: the data are in no root of data.
        """
        real = _inside(model, self._models)
        if real is None and _without_links(model) != model_path():
            raise ModelError(
                f"the service works on models below its folders only, and the study's model, "
                f"{_last_part(model)!r}, lies elsewhere; start it with --models for that folder, or "
                "use the command line"
            )
        if real is not None:
            check_content(real, _bounds(self._models), self.public(real), ModelError)
        if data is None or data == BUNDLED:
            return
        found = _inside(data, self._data)
        if found is None:
            raise DataError(
                f"the service reads data below its folders only, and the study's, "
                f"{_last_part(data)!r}, are not there; start it with --data for their folder, or use "
                "the command line"
            )
        check_data(found, _bounds(self._data), self.public(found))

    def data(self, path: str | None) -> Path | None:
        """A file or folder of calibration data; None stands for the bundled text.

        Names of datasets on the hub are refused: the service fetches nothing.

        Raises:
            DataError: as `model`; or it is of a kind that is not read through the service.
        """
        if path is None or path == BUNDLED:
            return None
        found = _existing(path, self._data, "data", DataError)
        check_data(found, _bounds(self._data), path)
        return found

    def new_export(self, path: str) -> Path:
        """Where a checkpoint is to be written; folders on the way there may be missing.

        Raises:
            ExportError: there is no root for them, or the path leads out of it or is the root.
        """
        if not self._exports:
            raise ExportError(
                "checkpoints are written only where the server allows it, and it allows it "
                "nowhere; start it with --exports FOLDER"
            )
        found = _resolved(path, self._exports, "exports", ExportError)
        if found == self._exports[0].folder:
            raise ExportError(
                f"a checkpoint is a folder inside {self._exports[0].name}, got {_shown(path)}; "
                "add a name"
            )
        return found

    def checkpoint(self, path: str) -> Path:
        """The folder of a checkpoint, below the root of exports or one of models.

        Raises:
            ModelError: as `model`.
        """
        if path == BUNDLED:
            return model_path()
        roots = (*self._exports, *self._models)
        found = _existing(path, roots, "models or exports", ModelError)
        check_content(found, _bounds(roots), path, ModelError)
        return found

    def models(self) -> tuple[ModelEntry, ...]:
        """Models that can be searched, the bundled one first, then by path.

        Folders with a config.json and safetensors files, unquantised, at a bounded depth; a folder
        in one is not looked into.
        """
        found: list[ModelEntry] = []
        for root in self._models:
            found += find_models(root.name, root.folder, _bounds(self._models))
        unique = {entry.path: entry for entry in found}
        return (
            *find_models(BUNDLED, model_path(), (model_path(),)),
            *(unique[path] for path in sorted(unique)),
        )

    def public(self, path: str | Path) -> str:
        """How a path of the server's is shown to clients.

        `NAME/inside/it` where it lies in a root, "bundled" for the bundled model; of anything else
        its last part only, and so of text that is no path.
        """
        text = str(path)
        if not os.path.isabs(text):
            return _last_part(text)
        real = _without_links(text)
        if real is None:
            return _last_part(text)
        if real == model_path():
            return BUNDLED
        holding = [root for root in self._all() if real.is_relative_to(root.folder)]
        if not holding:
            return _last_part(text)
        nearest = max(holding, key=lambda root: len(root.folder.parts))
        return _sayable("/".join((nearest.name, *real.relative_to(nearest.folder).parts)))

    def names(self) -> Mapping[str, tuple[str, ...]]:
        """Use ("models", "data", "exports") -> names of its roots."""
        uses = {"models": self._models, "data": self._data, "exports": self._exports}
        return {use: tuple(root.name for root in roots) for use, roots in uses.items()}

    def to_json(self) -> dict[str, Any]:
        """For another process on this machine; it holds the folders' real paths."""
        return {
            "models": [str(root.folder) for root in self._models],
            "data": [str(root.folder) for root in self._data],
            "exports": str(self._exports[0].folder) if self._exports else None,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Roots:
        """What `to_json` gave, with the same names.

        Raises:
            InputError: as the constructor.
        """
        return cls(models=content["models"], data=content["data"], exports=content["exports"])

    def _all(self) -> tuple[Root, ...]:
        return (*self._models, *self._data, *self._exports)


def _bounds(roots: Sequence[Root]) -> tuple[Path, ...]:
    return tuple(root.folder for root in roots)


def _root(folder: Path | str, option: str, taken: dict[Path, Root]) -> Root:
    """The root of a folder, under a name that no other folder has; the same folder, the same root."""
    real = Path(os.path.realpath(os.path.expanduser(folder)))
    if not real.is_dir():
        raise InputError(f"{option} takes folders, and {str(folder)!r} is none; make it first")
    if real not in taken:
        taken[real] = Root(_free_name(real.name, {root.name for root in taken.values()}), real)
    return taken[real]


def _free_name(name: str, taken: set[str]) -> str:
    plain = re.sub(r"[^\w.+=@-]", "_", name).lstrip(".-") or "root"
    candidates = (plain, *(f"{plain}-{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in candidates if name not in taken and name != BUNDLED)


def _refuse_over_others(exports: Path, others: Sequence[Root]) -> None:
    for other in others:
        if other.folder.is_relative_to(exports):
            raise InputError(
                f"--exports must be a folder without models and data, and {str(exports)!r} is or "
                f"holds {str(other.folder)!r}, which exports could be written over; give another"
            )


def _inside(path: str, roots: Sequence[Root]) -> Path | None:
    """What a path of this machine leads to, if that is there and in one of the roots."""
    real = _without_links(path)
    if real is None or not os.path.isabs(path) or not os.path.exists(real):
        return None
    return real if any(real.is_relative_to(bound) for bound in _bounds(roots)) else None


def _without_links(path: str) -> Path | None:
    """Where a path of this machine leads to; None of what can be no path."""
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError):
        return None


def _existing(path: str, roots: Sequence[Root], use: str, refusal: type[InputError]) -> Path:
    found = _resolved(path, roots, use, refusal)
    if not os.path.exists(found):  # false, too, where the system forbids to look
        raise refusal(f"a path must lead to something, and {_shown(path)} does not; check it")
    return found


def _resolved(path: str, roots: Sequence[Root], use: str, refusal: type[InputError]) -> Path:
    """Where a path leads to, all links followed: inside a root of this use."""
    name, *inside = _parts(path, refusal)
    root = next((root for root in roots if root.name == name), None)
    if root is None:
        known = ", ".join(root.name for root in roots) or "none, so the server must be given one"
        raise refusal(
            f"a path begins with the name of a folder of {use} that the server may use ({known}), "
            f"got {_shown(path)}; choose one of these"
        )
    try:
        found = Path(os.path.realpath(root.folder.joinpath(*inside)))
    except (OSError, ValueError) as error:
        raise refusal(f"a path must name a file or folder, and {_shown(path)} cannot") from error
    if not any(found.is_relative_to(bound) for bound in _bounds(roots)):
        raise refusal(
            f"a path must stay in the folders of {use} that the server may use, links followed, and "
            f"{_shown(path)} leads out of them; put it there, or give the server that folder too"
        )
    return found


_RULES: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("is no longer than 1000 characters", lambda path: len(path) > MAXIMUM_LENGTH),
    ("has only characters that show", lambda path: any(map(_does_not_show, path))),
    ("has / between its parts, not \\", lambda path: "\\" in path),
    ("begins with the name of a folder, not with /", lambda path: path.startswith("/")),
    ("has no empty part", lambda path: not all(path.split("/"))),
    (
        "has no part that begins with . or -",
        lambda path: any(part[:1] in ".-" for part in path.split("/")),
    ),
    (
        "has no part of more than 255 bytes",
        lambda path: any(len(part.encode()) > _MAXIMUM_PART for part in path.split("/")),
    ),
)
"""What a path is; and whether one breaks the rule, if it keeps those before."""


def _parts(path: str, refusal: type[InputError]) -> list[str]:
    for rule, is_broken in _RULES:
        if is_broken(path):
            raise refusal(f"a path {rule}, got {_shown(path)}; write NAME/inside/it")
    return path.split("/")


def _does_not_show(character: str) -> bool:
    return unicodedata.category(character) in _HIDDEN_CATEGORIES


def _shown(path: str) -> str:
    """A path as messages quote it: cut, and with escapes for what does not show."""
    return repr(path if len(path) <= _SHOWN else f"{path[:_SHOWN]}...")


def _last_part(text: str) -> str:
    return _sayable(re.split(r"[/\\]", text.rstrip("/\\"))[-1])


def _sayable(text: str) -> str:
    """The text without what no reply can hold: names of files may be no UTF-8."""
    return text.encode("utf-8", "replace").decode()
