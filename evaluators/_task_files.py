"""Where evaluation tasks are defined, found without reading all of lm-eval's 14,000 files."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from autoq.bundled import tasks_path
from autoq.errors import InputError

_SUFFIXES = (".yaml", ".yml")
_NAMES = re.compile(rb"^(?:task|group|tag):[ \t]*[\"']?([\w./+-]+)", re.MULTILINE)
_LISTED = re.compile(rb"^(?:tag|group):[ \t]*\r?\n((?:[ \t]*-[^\n]*\n?)+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class TaskFile:
    """The file that defines a task, a group or a tag."""

    task: str  # its name: of the task or group in the file, or of a tag
    path: Path
    dataset: str | None  # on the hub, or the kind of a local file
    by_path: bool  # the user named the file

    def configuration(self) -> dict[str, Any]:
        """What the file says, with what it includes; functions as text.

        Raises:
            InputError: it cannot be read.
        """
        return _configuration(self.path, resolve=False)

    @property
    def is_group(self) -> bool:
        """Whether the file defines a group of tasks."""
        return _is_group(self.configuration())

    def is_main_name(self, configuration: Mapping[str, Any]) -> bool:
        """Whether the name is that of the file's task or group, and not one of its tags."""
        return self.task in (configuration.get("task"), configuration.get("group"))

    def load(self) -> Any:
        """Tasks and groups as lm-eval's manager gives them; reads or fetches their data.

        Raises:
            InputError: the file is a group's, and breaks a rule for these.
        """
        from lm_eval.tasks import TaskManager

        if self.by_path and self.is_group:
            from autoq.evaluators._task_groups import load_group

            return load_group(self)
        if self.by_path or self.path.parent == tasks_path():
            return TaskManager(include_defaults=False).load([_with_local_data(self.path)])
        folder = self.path.relative_to(_harness_tasks()).parts[0]
        try:
            near = TaskManager(include_path=_harness_tasks() / folder, include_defaults=False)
            return near.load([self.task])
        except KeyError:  # a group whose members lie elsewhere: all files have to be read
            return TaskManager().load([self.task])


def require_harness() -> None:
    """Refuse to run tasks without lm-eval.

    Raises:
        InputError: says what to install.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "evaluation tasks need lm-eval, which is not installed; install autoq with its extra "
            "`eval` (pip install 'autoq[eval]')"
        )


def find_task(name: str) -> TaskFile | None:
    """The file that defines a task, or None.

    Args:
        name: of a bundled task or one of lm-eval's, or the path of a YAML file.
    Raises:
        InputError: the name is that of a YAML file that does not exist or defines no task.
    """
    if name.endswith(_SUFFIXES):
        return _task_file(Path(name).expanduser())
    bundled = tasks_path() / f"{name}.yaml"
    if re.fullmatch(r"\w+", name) and bundled.is_file():
        return TaskFile(name, bundled, None, by_path=False)
    return _harness_task(name)


@cache
def _harness_task(name: str) -> TaskFile | None:
    root = _harness_tasks()
    for path in [*root.rglob(f"{name}.yaml")] if re.fullmatch(r"[\w.+-]+", name) else []:
        if name in _names_in(path):
            return TaskFile(name, path, _dataset_of(path), by_path=False)
    found = _all_names().get(name)
    return None if found is None else TaskFile(name, found, _dataset_of(found), by_path=False)


@cache
def _all_names() -> dict[str, Path]:
    """Task, group or tag -> a file that defines it, for all of lm-eval's."""
    found: dict[str, Path] = {}
    for path in sorted(_harness_tasks().rglob("*.yaml")):
        for name in _names_in(path):
            found.setdefault(name, path)
    return found


def similar_tasks(name: str) -> list[str]:
    """Names of lm-eval's tasks that look like this one."""
    import difflib

    return difflib.get_close_matches(name, _all_names(), cutoff=0.7)


def _names_in(path: Path) -> Iterator[str]:
    text = path.read_bytes()
    for match in _NAMES.finditer(text):
        yield match[1].decode()
    for match in _LISTED.finditer(text):
        for line in match[1].decode(errors="replace").splitlines():
            yield line.strip().lstrip("-").strip().strip("\"'")


def _harness_tasks() -> Path:
    import lm_eval

    return Path(lm_eval.__file__).parent / "tasks"


def _task_file(path: Path) -> TaskFile:
    if not path.is_file():
        raise InputError(f"the task file {path} does not exist; check the path")
    configuration = _configuration(path, resolve=False)
    name = configuration.get("group" if _is_group(configuration) else "task")
    if not isinstance(name, str):
        raise InputError(
            f"{path} must define an evaluation task of lm-eval, with a field 'task', or a group of "
            "tasks, with a name in 'group' and a list in 'task'; see lm-eval's guide to new tasks"
        )
    return TaskFile(name, path, configuration.get("dataset_path"), by_path=True)


def _is_group(configuration: Mapping[str, Any]) -> bool:
    """Whether a file defines a group: a name, and a list of tasks."""
    return "group" in configuration and not isinstance(configuration.get("task"), str)


def names_in(path: Path) -> set[str]:
    """Tasks, groups and tags that a YAML file defines, without reading it in full."""
    return set(_names_in(path))


def _dataset_of(path: Path) -> str | None:
    found = _configuration(path, resolve=False)
    parts = [str(part) for part in (found.get("dataset_path"), found.get("dataset_name")) if part]
    return ":".join(parts) or None


def _configuration(path: Path, *, resolve: bool) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        found = load_yaml(path, resolve_func=resolve)
    except Exception as error:  # of YAML, or of the functions that it names
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the task file {path} cannot be read: {reason}; mend it") from error
    return found if isinstance(found, dict) else {}


def _with_local_data(path: Path) -> dict[str, Any]:
    """The task's settings, with the data files that lie beside it named in full."""
    found = _configuration(path, resolve=True)
    options = found.get("dataset_kwargs")
    if isinstance(options, dict) and "data_files" in options:
        files = _beside(path.resolve().parent, options["data_files"])
        found = {**found, "dataset_kwargs": {**options, "data_files": files}}
    return found


def _beside(folder: Path, files: Any) -> Any:
    if isinstance(files, dict):
        return {name: _beside(folder, value) for name, value in files.items()}
    if isinstance(files, list):
        return [_beside(folder, value) for value in files]
    return str(folder / files) if (folder / str(files)).exists() else files
