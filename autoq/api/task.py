"""A model and its data, ready to be calibrated, scored and measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from autoq.api.config import ScoringConfig
from autoq.data import Split, TokenData, load_token_sequences
from autoq.data.sources import HELD_OUT_SHARE
from autoq.errors import InputError
from autoq.models.folder import storage_dtype
from autoq.models.forward import (
    forward_layers,
    forward_logits,
    is_causal,
    output_kind,
    refuse_other_inputs,
    text_config,
)
from autoq.models.loading import (
    has_tokenizer,
    load_model,
    load_tokenizer,
    model_fingerprint,
    use_eager_experts,
)
from autoq.models.weights import fingerprint_of_module
from autoq.search._batch_loss import LabelSource
from autoq.search.estimators import ESTIMATORS
from autoq.search.objectives import (
    fisher_noise_loss,
    next_token_loss,
    own_distribution_loss,
    own_output_loss,
)
from autoq.search.sensitivity import BatchLoss

if TYPE_CHECKING:
    from autoq.api.streamed.streaming import Streaming

ID_SUFFIXES = (".npy", ".pt")
"""Files of token ids, which need no tokenizer."""

_DRAW_STRIDE = 0x5DEECE66D
"""Between the seeds of two draws of labels: far more than a search has batches."""

PROBE_TOKENS = 16
"""Length of the small input on which input-scale folding is tried out."""


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory and where it came from."""

    model: nn.Module
    path: Path | None  # None: given as an object
    fingerprint: str
    storage_dtype: torch.dtype  # of the weights on disk
    trust_remote_code: bool = False
    stream: Streaming | None = None  # the model is on the meta device, and its weights come so

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the model's folder; None for a model that has no folder.

        Raises:
            ModelError: the folder has none.
        """
        if self.path is None:
            return None
        return load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)

    @property
    def tokenizer_if_any(self) -> Any:
        """The same, and None for a folder without one: most metrics need none.

        Raises:
            ModelError: the folder has one that cannot be read.
        """
        return None if self.path is None or not has_tokenizer(self.path) else self.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the weights are, or come to."""
        return next(self.model.parameters()).device if self.stream is None else self.stream.device

    @property
    def vocabulary_size(self) -> int:
        """Token ids are below this."""
        embeddings: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])

    @property
    def longest_sequence(self) -> int | None:
        """Positions that the model has, or None if it does not say."""
        return longest_sequence(self.model)


def longest_sequence(model: nn.Module) -> int | None:
    """Positions that a model has, or None if it does not say."""
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions - _positions_not_used(model)
    return None


def _positions_not_used(model: nn.Module) -> int:
    """RoBERTa and its relatives count positions from behind the padding token's number."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and path.endswith(".position_embeddings"):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise InputError(f"this machine has no device {name!r}; use auto or cpu") from None
    return device


def load(config: ScoringConfig, model: str | Path | nn.Module) -> LoadedModel:
    """Load a model folder, or take a model that is in memory already."""
    if isinstance(model, nn.Module):
        use_eager_experts(model)
        dtype = next(model.parameters()).dtype
        return LoadedModel(model.eval(), None, fingerprint_of_module(model), dtype)
    path = Path(model)
    device = resolve_device(config.device)
    dtype_name = config.dtype
    if dtype_name == "auto" and device.type == "cpu":
        dtype_name = "float32"  # CPUs without bfloat16 units emulate it, slowly
    loaded = load_model(
        path, dtype=dtype_name, device=str(device), trust_remote_code=config.trust_remote_code
    )
    stored: torch.dtype = getattr(torch, storage_dtype(path))
    return LoadedModel(loaded, path, model_fingerprint(path), stored, config.trust_remote_code)


def load_data(
    loaded: LoadedModel,
    source: str | None,
    *,
    sequences: int,
    sequence_length: int,
    split: Split,
    seed: int,
    held_out_share: float = HELD_OUT_SHARE,
) -> TokenData:
    """Token sequences for the model; shorter ones if the model has fewer positions.

    Args:
        held_out_share: share of a file that is kept for measuring and never calibrated on.
    """
    refuse_other_inputs(loaded.model)
    longest = loaded.longest_sequence
    return load_token_sequences(
        source,
        tokenizer=None if source and Path(source).suffix in ID_SUFFIXES else loaded.tokenizer,
        sequence_length=min(sequence_length, longest) if longest else sequence_length,
        sequences=sequences,
        split=split,
        seed=seed,
        vocab_size=loaded.vocabulary_size,
        held_out_share=held_out_share,
    )


@dataclass(frozen=True, slots=True)
class ScoringTask:
    """How to run a model on calibration batches, and what loss to score with."""

    batches: Sequence[Any]
    run: Callable[[Any], Any]  # one batch -> output; the result is ignored
    run_layers: Callable[[Any], Any]  # the same; see `forward_layers`
    run_small: Callable[[], Tensor]  # some small input -> output
    loss: Callable[[int], BatchLoss]  # number of a batch -> summed loss, with its graph


def scoring_task(loaded: LoadedModel, data: TokenData, config: ScoringConfig) -> ScoringTask:
    """Score on the data with the loss that the configured estimator wants.

    Raises:
        InputError: the estimator wants labels, and the model predicts no tokens.
    """
    if ESTIMATORS[config.estimator].labels != "data":
        return own_distribution_task(loaded, data, config)
    if output_kind(loaded.model) != "logits":
        raise InputError(
            f"estimator {config.estimator} needs a model that predicts tokens, and "
            f"{type(loaded.model).__name__} gives hidden states; leave --estimator out"
        )
    task = own_distribution_task(loaded, data, config)
    return replace(task, loss=partial(_next_token_batch, loaded.model, task.batches))


def own_distribution_task(
    loaded: LoadedModel, data: TokenData, config: ScoringConfig
) -> ScoringTask:
    """Score against the model's own output distribution: no labels needed."""
    batches = token_batches(data, config.batch_size, loaded.device)
    wanted = ESTIMATORS[config.estimator].labels
    labels: LabelSource = "noise" if wanted == "noise" else "model"
    return ScoringTask(
        batches=batches,
        run=partial(forward_logits, loaded.model),
        run_layers=partial(forward_layers, loaded.model),
        run_small=partial(forward_logits, loaded.model, batches[0][:1, :PROBE_TOKENS]),
        loss=partial(_own_distribution_batch, loaded.model, batches, config.seed, labels),
    )


def token_batches(data: TokenData, batch_size: int, device: torch.device) -> list[Tensor]:
    """int64 [sequences, tokens] each, on the device."""
    return list(torch.split(torch.from_numpy(data.ids).to(device), batch_size))


def _own_distribution_batch(
    model: nn.Module,
    batches: Sequence[Tensor],
    seed: int,
    labels: LabelSource,
    index: int,
) -> BatchLoss:
    ids = batches[index]
    return sampled_loss(model, forward_logits(model, ids), seed * 1_000_003 + index, labels)


def sampled_loss(
    model: nn.Module, output: Tensor, seed: int, labels: LabelSource = "model"
) -> BatchLoss:
    """The loss of an output against the model's own distribution.

    Args:
        output: [sequences, tokens, vocabulary or features].
        seed: of the first draw of labels or noise; further ones are made from it.
        labels: "model" or "noise"; outputs without a vocabulary know noise only.
    """
    loss: Callable[[Tensor, torch.Generator], Tensor] = own_output_loss
    if output_kind(model) == "logits":
        loss = fisher_noise_loss if labels == "noise" else own_distribution_loss
    device = output.device if loss is fisher_noise_loss else torch.device("cpu")

    def total(draw: int) -> Tensor:
        generator = torch.Generator(device=device)
        return loss(output, generator.manual_seed(seed + draw * _DRAW_STRIDE))

    sequences, tokens = output.shape[:2]
    return BatchLoss(total(0), sequences, tokens, output=output, redraw=total)


def _next_token_batch(model: nn.Module, batches: Sequence[Tensor], index: int) -> BatchLoss:
    ids = batches[index]
    output, shift = forward_logits(model, ids), is_causal(model)
    tokens = ids.shape[1] - 1 if shift else ids.shape[1]
    return BatchLoss(next_token_loss(output, ids, shift=shift), ids.shape[0], tokens, output)


def output_bytes(model: nn.Module, ids: Tensor) -> int:
    """What the model's output for `ids` takes in float32, in bytes."""
    return ids.numel() * output_width(model) * 4


def output_width(model: nn.Module) -> int:
    """How many values a model gives for a token."""
    config = text_config(model)
    return int(getattr(config, "vocab_size", 0) or getattr(config, "hidden_size", 1))


def output_properties(model: nn.Module) -> dict[str, bool]:
    """What `measure_fidelity` must know about the model's output."""
    return {"has_vocabulary": output_kind(model) == "logits", "causal": is_causal(model)}
