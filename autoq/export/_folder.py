"""A folder that appears complete or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import psutil  # type: ignore[import-untyped]
from safetensors import SafetensorError

from autoq.errors import ExportError
from autoq.export._types import ExportedFile

_CHUNK_BYTES = 1 << 20

# What a checkpoint needs beside weights and configuration. Code and weights never match.
_COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.bpe.model",
    "spiece.model",
    "sentencepiece.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)


@contextmanager
def written_folder(destination: Path, *, overwrite: bool) -> Iterator[Path]:
    """A new sibling folder that takes the destination's name when the context ends well.

    When it does not, the sibling is removed and whatever was at the destination is untouched.

    Raises:
        ExportError: something is at the destination and `overwrite` is off, or what is there is no
            checkpoint; or the file system refuses (full, read-only, no permission).
    """
    destination = destination.absolute()
    check_destination(destination, overwrite=overwrite)
    with sibling_folder(destination) as sibling:
        yield sibling
        _give_all_the_same_mode(sibling)
        _flush(sibling)
        _put_in_place(sibling, destination)


@contextmanager
def sibling_folder(destination: Path) -> Iterator[Path]:
    """A new folder beside the destination, on its disk, that is removed when the context ends.

    Raises:
        ExportError: the file system refuses (full, read-only, no permission).
    """
    destination = destination.absolute()
    unique = f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    sibling = destination.with_name(f".{destination.name}.{unique}.partial")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_behind(destination)
        sibling.mkdir()
        yield sibling
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"cannot write {destination}: {_reason(error)}; "
            "free space there, or choose a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(sibling, ignore_errors=True)


def _remove_left_behind(destination: Path) -> None:
    """Remove what exports to this destination left when they were killed on this host."""
    for left in _left_behind(destination, "partial"):
        shutil.rmtree(left, ignore_errors=True)
    if destination.exists():
        for left in _left_behind(destination, "former"):
            shutil.rmtree(left, ignore_errors=True)


def _put_former_back(destination: Path) -> None:
    """Undo the first of two renames, if an export was killed on this host before the second."""
    former = sorted(_left_behind(destination, "former"), key=lambda left: left.stat().st_mtime)
    if former and not os.path.lexists(destination):
        former[-1].rename(destination)


def _left_behind(destination: Path, ending: str) -> Iterator[Path]:
    """Folders of exports to this destination whose processes are dead."""
    prefix = f".{destination.name}.{socket.gethostname()}."
    for left in destination.parent.glob(f"{glob.escape(prefix)}*.{ending}"):
        pid = left.name.removeprefix(prefix).split(".")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            yield left


def check_destination(
    destination: Path, source: Path | str | None = None, *, overwrite: bool
) -> None:
    """Refuse a destination that is in use or cannot be written, before any work.

    What an export that was killed at the last moment had moved out of its way is put back first.

    Args:
        source: the model's folder, which must not be replaced.
    Raises:
        ExportError: it exists and `overwrite` is off, does not look like a checkpoint, holds the
            model, or lies where no folder can be made.
    """
    _refuse_unwritable(destination)
    _put_former_back(destination.absolute())
    if not os.path.lexists(destination):
        return
    if not overwrite:
        raise ExportError(
            f"the output folder must be new, and {destination} exists; "
            "choose another or pass --overwrite"
        )
    if not destination.is_dir() or destination.is_symlink():
        raise ExportError(f"--overwrite replaces a folder, and {destination} is none; move it away")
    if any(destination.iterdir()) and not (destination / "config.json").is_file():
        raise ExportError(
            f"--overwrite replaces a checkpoint, and {destination} has no config.json; "
            "choose another folder, or empty this one yourself"
        )
    model_folder, target = Path(source).resolve() if source else None, destination.resolve()
    if model_folder and (target == model_folder or target in model_folder.parents):
        raise ExportError(
            f"the output must not replace the model it is made from, and {destination} holds "
            f"{source}; choose another folder"
        )


def _refuse_unwritable(destination: Path) -> None:
    """Its parent, or the first folder above that exists, must be one that can be written."""
    above = next(path for path in destination.absolute().parents if os.path.lexists(path))
    if not (above.is_dir() and os.access(above, os.W_OK | os.X_OK)):
        raise ExportError(
            f"the output folder must lie where you may write, and {above} is no folder or cannot "
            f"be written; choose another than {destination}"
        )


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer, generation and chat template files of a model folder."""
    for pattern in _COMPANIONS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                target = folder / file.relative_to(source)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)


def exported_files(
    folder: Path, known: Mapping[str, str] = MappingProxyType({})
) -> tuple[ExportedFile, ...]:
    """Sizes and hashes of everything in the folder, sorted by path.

    Args:
        known: hashes of files that were read for that before, by name.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        ExportedFile(
            path=path.relative_to(folder).as_posix(),
            size_bytes=path.stat().st_size,
            sha256=known.get(path.relative_to(folder).as_posix()) or file_sha256(path),
        )
        for path in files
    )


def _put_in_place(sibling: Path, destination: Path) -> None:
    if not destination.exists():
        sibling.rename(destination)
    else:
        former = sibling.with_suffix(".former")
        destination.rename(former)
        try:
            sibling.rename(destination)
        except OSError:
            former.rename(destination)
            raise
        shutil.rmtree(former, ignore_errors=True)
    _flush_directory(destination.parent)


def _give_all_the_same_mode(folder: Path) -> None:
    """What config.json got from the user's umask; safetensors makes files for their owner alone."""
    mode = stat.S_IMODE((folder / "config.json").stat().st_mode)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The hash of what is in a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
