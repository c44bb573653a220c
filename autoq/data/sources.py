"""From any source of data to token sequences of one length."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from autoq.data.files import (
    ID_SUFFIXES,
    TEXT_SUFFIXES,
    is_saved_dataset,
    read_documents,
    read_saved_dataset,
    read_token_rows,
    stream_dataset,
)
from autoq.data.splitting import Split, part, spread_part
from autoq.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = "bundled"
"""Name of the text that comes with autoq."""

HELD_OUT_SHARE = 0.25
"""The last part of a finite source, which calibration never sees."""

_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """Token sequences, and where they are from."""

    ids: NDArray[np.int64]  # [sequences, tokens]
    description: str  # one line for people
    sha256: str  # over shape and ids


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    tokenizer: PreTrainedTokenizerBase | None
    sequence_length: int
    sequences: int
    split: Split
    seed: int
    held_out_share: float

    @property
    def tokens(self) -> int:
        return self.sequences * self.sequence_length


def token_data(ids: NDArray[np.int64], description: str) -> TokenData:
    """Token sequences [sequences, tokens] that are there already.

    Args:
        description: one line for people.
    """
    return TokenData(ids, description, _sha256(ids))


def load_token_sequences(
    source: str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    sequence_length: int,
    sequences: int,
    vocab_size: int,
    split: Split = "calibration",
    seed: int = 0,
    held_out_share: float = HELD_OUT_SHARE,
) -> TokenData:
    """Token sequences of one length; equal arguments give equal ids.

    Text is tokenised as the model's tokenizer does it, special tokens included; every document
    ends with the end-of-text token, and their stream is cut into sequences. Rows of ids are cut
    one by one. Files, arrays and saved datasets are parted at a fixed place: calibration takes from
    their front, held-out data from their last `held_out_share`, whatever amounts are asked for.
    Named datasets and folders of data files are streamed, so that no more is read than needed:
    held out is every document in which another `held_out_share` of one is complete (with a share
    of 1/4 every fourth). The bundled text has endless documents for either.

    Args:
        source: None or "bundled"; a .txt, .jsonl or .parquet file of text; a .npy or .pt file of
            ids, [sequences, tokens] or one stream [tokens]; a folder that `save_to_disk` wrote; or
            a `datasets` dataset as "name", "name:split" or "name:configuration:split", where the
            name may be a folder of data files.
        tokenizer: the model's; needed for text.
        sequence_length: tokens in a sequence.
        sequences: how many to return.
        vocab_size: ids must be below.
        split: "calibration" or "held_out".
        seed: chooses the documents of the bundled text; other sources ignore it.
        held_out_share: 0 leaves all of a finite source to calibration, 1 holds all of it out.
    Returns:
        ids int64 [sequences, sequence_length], a description, and the ids' SHA-256.
    Raises:
        DataError: the source cannot be read, is too short, or has ids outside the vocabulary.
    """
    request = _Request(
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        sequences=sequences,
        split=split,
        seed=seed,
        held_out_share=held_out_share,
    )
    _check_request(request)
    ids, description = _read(source, request)
    _check_ids(ids, vocab_size, description)
    return token_data(ids, description)


def _check_request(request: _Request) -> None:
    if request.split not in get_args(Split):
        raise DataError(f"split must be 'calibration' or 'held_out', got {request.split!r}")
    for name in ("sequence_length", "sequences"):
        if getattr(request, name) < 1:
            raise DataError(f"{name} must be at least 1, got {getattr(request, name)}")
    if not 0.0 <= request.held_out_share <= 1.0:
        raise DataError(f"held_out_share must be in [0, 1], got {request.held_out_share:g}")


def _read(source: str | Path | None, request: _Request) -> tuple[NDArray[np.int64], str]:
    if source is None or source == BUNDLED:
        return _bundled(request)
    path = Path(source).expanduser()
    if _is_streamed(str(source), path):
        return _streamed(str(source), request)
    description = _description(str(source), request)
    if path.is_file() and path.suffix in ID_SUFFIXES:
        return _cut_rows(read_token_rows(path), request, description), description
    documents = read_documents(path) if path.is_file() else read_saved_dataset(path)
    chosen = part(documents, request.split, request.held_out_share)
    return _tokenise(chosen, request, description), description


def _is_streamed(source: str, path: Path) -> bool:
    """Whether the source is a dataset by name; refuses files that are none.

    Raises:
        DataError: it looks like a file, and there is none or of another kind.
    """
    known = ", ".join(TEXT_SUFFIXES + ID_SUFFIXES)
    if path.is_file():
        if path.suffix not in TEXT_SUFFIXES + ID_SUFFIXES:
            raise DataError(f"a data file must be one of {known}, got {source}; rename or convert")
        return False
    folder = Path(source.partition(":")[0]).expanduser()
    looks_like_file = path.suffix in TEXT_SUFFIXES + ID_SUFFIXES or source.startswith((".", "/"))
    if looks_like_file and not folder.is_dir():
        raise DataError(f"the data file {source} does not exist; check the path")
    return not (path.is_dir() and is_saved_dataset(path))


def _streamed(source: str, request: _Request) -> tuple[NDArray[np.int64], str]:
    held_out = request.split == "held_out"
    share = request.held_out_share if held_out else 1.0 - request.held_out_share
    description = (
        f"{source} ({share:.0%} of its documents, {'held out' if held_out else 'calibration'})"
    )
    documents = spread_part(stream_dataset(source), request.split, request.held_out_share)
    return _tokenise(documents, request, description), description


def _description(source: str, request: _Request) -> str:
    if request.split == "calibration":
        return f"{source} (first {1.0 - request.held_out_share:.0%}, calibration)"
    return f"{source} (last {request.held_out_share:.0%}, held out)"


def _bundled(request: _Request) -> tuple[NDArray[np.int64], str]:
    from autoq.bundled.language import documents

    description = f"bundled text ({request.split}, seed {request.seed})"
    return _tokenise(documents(request.seed, request.split), request, description), description


def _tokenise(documents: Iterable[str], request: _Request, description: str) -> NDArray[np.int64]:
    """Tokenise as many documents as needed; held-out ones of finite sources come last first."""
    pieces: list[list[int]] = []
    count = 0
    for piece in _token_lists(documents, request.tokenizer):
        pieces.append(piece)
        count += len(piece)
        if count >= request.tokens:
            break
    if count < request.tokens:
        raise DataError(_too_little(request, description, count))
    stream = np.fromiter(itertools.chain.from_iterable(pieces), dtype=np.int64, count=count)
    return stream[: request.tokens].reshape(request.sequences, request.sequence_length)


def _token_lists(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[list[int]]:
    if tokenizer is None:
        raise DataError("text needs the model's tokenizer, and there is none; give token ids")
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    waiting = (document for document in documents if document.strip())
    while chunk := list(itertools.islice(waiting, _DOCUMENTS_AT_ONCE)):
        # verbose: no warning that documents are longer than the model's context; they get cut.
        encoded: Sequence[list[int]] = tokenizer(chunk, verbose=False)["input_ids"]
        for ids in encoded:
            yield ids if end is None or ids[-1:] == [end] else [*ids, int(end)]


def _cut_rows(
    rows: NDArray[np.integer[Any]], request: _Request, description: str
) -> NDArray[np.int64]:
    length = request.sequence_length
    sequences: list[NDArray[Any]] = []
    tokens = 0
    for row in part(rows, request.split, request.held_out_share):
        tokens += len(row)
        whole = min(len(row) // length, request.sequences - len(sequences))
        sequences.extend(row[: whole * length].reshape(whole, length))
        if len(sequences) == request.sequences:
            return np.stack(sequences).astype(np.int64)
    raise DataError(_too_little(request, description, tokens, whole_sequences=len(sequences)))


def _too_little(
    request: _Request, description: str, available: int, whole_sequences: int | None = None
) -> str:
    if available < request.sequence_length:
        return (
            f"a sequence needs {request.sequence_length} tokens, and {description} has only "
            f"{available}; give more data or a shorter sequence length"
        )
    rows = "" if whole_sequences is None else f" in rows that give {whole_sequences} sequences"
    return (
        f"{request.sequences} sequences of {request.sequence_length} tokens need {request.tokens} "
        f"tokens, and {description} has {available}{rows}; give more data, or ask for fewer or "
        "shorter sequences"
    )


def _check_ids(ids: NDArray[np.int64], vocab_size: int, description: str) -> None:
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"token ids must be from 0 to {vocab_size - 1}, and {description} has "
            f"{lowest if lowest < 0 else highest}; use the tokenizer of this model"
        )


def _sha256(ids: NDArray[np.int64]) -> str:
    digest = hashlib.sha256(f"{ids.shape}".encode())
    digest.update(np.ascontiguousarray(ids, dtype="<i8").data)
    return digest.hexdigest()
