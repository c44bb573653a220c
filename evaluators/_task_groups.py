"""Groups of tasks in a YAML file of the user's, beside the tasks' files or naming lm-eval's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoq.errors import InputError
from autoq.evaluators._task_files import TaskFile, find_task, names_in, similar_tasks

_FIELDS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata")


def load_group(file: TaskFile, *, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A group with its members, as lm-eval's manager gives it.

    Members are names: of tasks and groups in other files of the folder, of tasks that come with
    autoq or lm-eval; or paths of YAML files from the folder. Settings for members stand in the
    members' own files.

    Args:
        above: files of the groups that hold this one.
    Returns:
        "tasks", "groups" and "group_map", as `lm_eval.tasks.TaskManager.load`.
    Raises:
        InputError: the group breaks a rule, holds itself, or a member is unknown.
    """
    from lm_eval.api.group import Group

    found = file.configuration()
    _check(file.path, found)
    group = Group.from_config({key: found[key] for key in _FIELDS if key in found})
    loaded: dict[str, dict[str, Any]] = {
        "tasks": {},
        "groups": {group.name: group},
        "group_map": {},
    }
    for member in found["task"]:
        part = _load_member(file, member, (*above, file.path.resolve()))
        twice = sorted(part["tasks"].keys() & loaded["tasks"].keys())
        if twice:
            raise InputError(
                f"{file.path} must hold every task once, and {member!r} brings {twice[0]} again; "
                "leave one out"
            )
        for item in _direct(part):
            group.add(item)
        for kind in ("tasks", "groups", "group_map"):
            loaded[kind].update(part.get(kind, {}))
    loaded["group_map"][group.name] = group.child_names
    return loaded


def _check(path: Path, found: Mapping[str, Any]) -> None:
    members = found.get("task")
    if not isinstance(members, list) or not members:
        raise InputError(f"the group {path} must list its tasks in 'task', got {members!r}")
    for member in members:
        if not isinstance(member, str):
            raise InputError(
                f"a group file must list its tasks by name or path, and {path} has {member!r}; "
                "give the task a file of its own, with its settings"
            )
    foreign = sorted(set(found) - set(_FIELDS))
    if foreign:
        raise InputError(
            f"a group file may hold {', '.join(_FIELDS)}, and {path} has {foreign[0]!r}; move the "
            "tasks' settings into their own files"
        )


def _load_member(file: TaskFile, member: str, above: tuple[Path, ...]) -> dict[str, Any]:
    found = _member(file.path, member)
    if found.path.resolve() in above:
        raise InputError(f"the group {file.path} holds itself by way of {member!r}; leave that out")
    if found.by_path and found.is_group:
        return load_group(found, above=above)
    loaded: dict[str, Any] = found.load()
    return loaded


def _member(group: Path, member: str) -> TaskFile:
    folder = group.resolve().parent
    if member.endswith((".yaml", ".yml")):
        found = find_task(str(folder / member))
        assert found is not None  # a path is found or refused
        return found
    for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        if path != group.resolve() and member in names_in(path):
            found = find_task(str(path))
            if found is not None and found.task == member:
                return found
    found = find_task(member)
    if found is None:
        close = ", ".join(similar_tasks(member))
        hint = f" (did you mean {close}?)" if close else ""
        raise InputError(
            f"the group {group} lists {member!r}, which is no task{hint}; put its YAML file into "
            f"{folder}, or name another"
        )
    return found


def _direct(part: Mapping[str, Any]) -> list[Any]:
    """What a member brings itself: its group, or its tasks."""
    groups = part.get("groups") or {}
    held = {name for group in groups.values() for name in group.child_names}
    tops = [group for name, group in groups.items() if name not in held]
    return tops or list(part["tasks"].values())
