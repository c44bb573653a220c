"""Reading a model folder: checked first, then loaded offline, from safetensors only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from autoq.errors import AutoqError, ModelError
from autoq.models.families import belongs_to_another_head
from autoq.models.folder import check_model_folder, read_config, shard_paths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "tekken.json",
)

_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")


def load_model(
    path: Path | str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the model of a folder, in eval mode, with nothing fetched and nothing printed.

    Args:
        path: a folder with config.json and safetensors weights.
        dtype: "auto" keeps the folder's; or a torch dtype or its name.
        device: where the model goes.
        trust_remote_code: run the model code that lies in the folder.
    Raises:
        ModelError: the folder is missing, incomplete, damaged, in another format, quantised
            already, of an unknown architecture, or its weights do not fit the architecture.
    """
    folder = Path(path)
    config = check_model_folder(folder)
    model_class = _model_class(folder, config, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                str(folder),
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                # The other implementations hide the experts' products from whoever watches them.
                experts_implementation="eager",
                output_loading_info=True,
                # So that they come back in the report, by name, and are refused below.
                ignore_mismatched_sizes=True,
            )
    except AutoqError:
        raise
    except Exception as error:  # transformers raises many kinds for one thing: it cannot load this
        raise ModelError(
            f"{folder} cannot be loaded as {_label(config)}: {_line(error)}"
        ) from error
    _check_report(folder, report)
    loaded: nn.Module = model.to(device).eval()
    return loaded


def unloaded_model(path: Path | str, *, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder without its weights: every tensor has a shape and no values.

    Args:
        path: a folder with config.json and safetensors weights.
        trust_remote_code: run the model code that lies in the folder.
    Raises:
        ModelError: as `load_model`, as far as it shows without reading weights.
    """
    folder = Path(path)
    config = check_model_folder(folder)
    model_class = _model_class(folder, config, trust_remote_code=trust_remote_code)
    try:
        with quiet_transformers(), torch.device("meta"):
            settings = _settings(folder, trust_remote_code=trust_remote_code)
            make = getattr(model_class, "from_config", None) or model_class._from_config
            options = {"trust_remote_code": True} if trust_remote_code else {}
            model: nn.Module = make(settings, **options)
    except AutoqError:
        raise
    except Exception as error:  # as in load_model
        raise ModelError(f"{folder} cannot be built as {_label(config)}: {_line(error)}") from error
    return model.eval()


def _settings(folder: Path, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=trust_remote_code
    )


def use_eager_experts(model: nn.Module) -> None:
    """Make a model in memory compute its experts one by one, so that each product can be seen."""
    choose = getattr(model, "set_experts_implementation", None)
    if choose is not None:
        choose("eager")


def load_tokenizer(path: Path | str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder, offline.

    Raises:
        ModelError: the folder has no tokenizer, or it cannot be read.
    """
    from transformers import AutoTokenizer

    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"a tokenizer is read from a model folder, and {folder} is none")
    if not has_tokenizer(folder):
        raise ModelError(
            f"text needs the model's tokenizer, and {folder} has none (no tokenizer.json); "
            "copy it there, or give token ids as .npy or .pt"
        )
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=trust_remote_code
            )
    except Exception as error:  # as in load_model
        raise ModelError(f"the tokenizer in {folder} cannot be read: {_line(error)}") from error


def has_tokenizer(path: Path | str) -> bool:
    """Whether a model folder holds a tokenizer's vocabulary, readable or not."""
    folder = Path(path)
    named = any((folder / name).is_file() for name in _TOKENIZER_FILES)
    return named or any(folder.glob("*.tiktoken"))


def load_tokenizer_if_any(
    path: Path | str, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """As `load_tokenizer`, and None for a folder without one: metrics of tokens need none.

    Raises:
        ModelError: the folder has one that cannot be read.
    """
    if not has_tokenizer(path):
        return None
    return load_tokenizer(path, trust_remote_code=trust_remote_code)


def model_fingerprint(path: Path | str) -> str:
    """SHA-256 over config.json and the safetensors files: their names, sizes and content.

    Raises:
        ModelError: as `load_model` for folders that are missing, incomplete or damaged.
    """
    folder = Path(path)
    read_config(folder)
    digest = hashlib.sha256()
    for file in [folder / "config.json", *shard_paths(folder)]:
        digest.update(f"{file.name}|{file.stat().st_size}|".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep progress bars and loading reports off while the context holds.

    Those of transformers, and of what it calls, as compressed-tensors, which heeds no setting.
    """
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions are not annotated
    verbosity, shows_progress = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with _without_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if shows_progress:
            logging.enable_progress_bar()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Every bar of tqdm is made as a silent one."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    bar: Any = tqdm  # it has no annotations
    make = bar.__init__

    def make_silent(self: Any, *args: Any, **settings: Any) -> None:
        make(self, *args, **{**settings, "disable": True})

    bar.__init__ = make_silent
    try:
        yield
    finally:
        bar.__init__ = make


def _model_class(folder: Path, config: Mapping[str, Any], *, trust_remote_code: bool) -> Any:
    import transformers

    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if trust_remote_code and config.get("auto_map"):
        return _auto_class(config)
    if name is None:
        return _class_by_model_type(folder, config)
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    remedy = (
        "its code lies in the folder: read it, then pass trust_remote_code"
        if config.get("auto_map")
        else f"transformers {transformers.__version__} has no such model class"
    )
    raise ModelError(f"architecture {name!r} of {folder / 'config.json'} is not known: {remedy}")


def _auto_class(config: Mapping[str, Any]) -> Any:
    import transformers

    offered = [name for name in _AUTO_CLASSES if name in config["auto_map"]]
    return getattr(transformers, offered[0] if offered else "AutoModel")


def _class_by_model_type(folder: Path, config: Mapping[str, Any]) -> Any:
    import transformers

    model_type = str(config.get("model_type"))
    if model_type in transformers.CONFIG_MAPPING:
        settings_class = transformers.CONFIG_MAPPING[model_type]
        for name in _AUTO_CLASSES:
            auto_class = getattr(transformers, name)
            if settings_class in auto_class._model_mapping:
                return auto_class
    raise ModelError(
        f"{folder / 'config.json'} must name the model in `architectures`, and from its model_type "
        f"{model_type!r} no language model follows; add for example "
        '"architectures": ["LlamaForCausalLM"]'
    )


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    for kind, consequence in (
        ("missing_keys", "lacks weights that its architecture needs"),
        ("unexpected_keys", "has weights that its architecture does not know"),
        ("mismatched_keys", "has weights of another shape than config.json says"),
    ):
        names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report[kind])
        names = [name for name in names if not belongs_to_another_head(name)]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(
                f"{folder} {consequence}: {names[0]}{more}; config.json and weights must belong "
                "together, so fetch the model again"
            )


def _label(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type")])[0])


def _line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
