"""Writing searched models as checkpoints that engines load, and reading them back."""

from autoq.export._folder import check_destination, sibling_folder
from autoq.export._kv_cache import ExportedCache, cache_refusal
from autoq.export._layouts import first_container, is_held
from autoq.export._types import (
    CheckpointContents,
    ExportedFile,
    ExportResult,
    QuantizedModule,
    VerificationReport,
)
from autoq.export._warnings import warnings_for
from autoq.export.block_calibration import BlockCalibration, StoredCalibration
from autoq.export.evaluation import (
    LOGITS_BOUND,
    load_checkpoint_for_evaluation,
    simulated_checkpoint,
    transformers_logits,
    verify_logits,
)
from autoq.export.export import export_checkpoint, refuse_inexpressible, write_checkpoint
from autoq.export.folder_weights import FolderWeights
from autoq.export.packed_model import load_packed
from autoq.export.reader import QuantizedCheckpoint, read_quantized
from autoq.export.rules import refusals
from autoq.export.sizes import stored_sizes
from autoq.export.streaming import SourceMatrices, StreamedPlan, WeightOnlyCalibration
from autoq.export.verify import verify_checkpoint, verify_written

__all__ = [
    "LOGITS_BOUND",
    "BlockCalibration",
    "CheckpointContents",
    "ExportResult",
    "ExportedCache",
    "ExportedFile",
    "FolderWeights",
    "QuantizedCheckpoint",
    "QuantizedModule",
    "SourceMatrices",
    "StoredCalibration",
    "StreamedPlan",
    "VerificationReport",
    "WeightOnlyCalibration",
    "cache_refusal",
    "check_destination",
    "export_checkpoint",
    "first_container",
    "is_held",
    "load_checkpoint_for_evaluation",
    "load_packed",
    "read_quantized",
    "refusals",
    "refuse_inexpressible",
    "sibling_folder",
    "simulated_checkpoint",
    "stored_sizes",
    "transformers_logits",
    "verify_checkpoint",
    "verify_logits",
    "verify_written",
    "warnings_for",
    "write_checkpoint",
]
