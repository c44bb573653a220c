"""Search a model with autoq, and write what it chose and what it took.

With --peer-plans it then solves for the bits that each of the peer's assignments really takes, and
measures both assignments on held-out tokens under one quantiser: autoq's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory import import_ahead, leave_triton_out, peak_rss_bytes

if TYPE_CHECKING:
    from autoq.api import Study

ROUNDING = 1e-9
"""Added to a budget in bits per weight, so that it admits the assignment it came from."""

SEED = 0
"""Of the data's choice; `compare_peer` draws the peer's tokens with it, too."""


def main() -> None:
    """Search once; solve for the other budgets from the same scores."""
    arguments = _arguments()
    process_start = time.perf_counter()
    leave_triton_out()
    import torch

    torch.set_num_threads(arguments.threads)
    import transformers

    from autoq.api import search

    import_ahead(arguments.model, "alembic.command", "scipy.optimize")
    imports_rss = peak_rss_bytes()
    with tempfile.TemporaryDirectory() as folder:
        search_start, cpu_start = time.perf_counter(), time.process_time()
        study = search(
            arguments.model,
            effective_bits=arguments.bits[0],
            formats=arguments.formats,
            calibration_data=arguments.calibration_data,
            calibration_sequences=arguments.sequences,
            sequence_length=arguments.sequence_length,
            batch_size=arguments.batch,
            dtype=arguments.dtype,
            seed=SEED,
            store=f"sqlite:///{folder}/autoq.db",
            measure=False,
        )
        search_seconds = time.perf_counter() - search_start
        cpu_seconds = time.process_time() - cpu_start
        peak_rss = peak_rss_bytes()
        result = {
            "versions": {
                "autoq": study.record.versions["autoq"],
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "stage_seconds": _stage_seconds(study, arguments.bits),
            "search_seconds": search_seconds,
            "search_cpu_seconds": cpu_seconds,
            "process_seconds": time.perf_counter() - process_start,
            "imports_rss_bytes": imports_rss,
            "peak_rss_bytes": peak_rss,
        }
        if arguments.peer_plans:
            result["comparison"] = _compare(study, arguments)
    arguments.out.write_text(json.dumps(result, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--calibration-data", help="file of token ids; the bundled text if left out"
    )
    parser.add_argument("--held-out", type=Path, help=".npy of token ids [sequences, tokens]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", type=lambda text: text.split(","), required=True)
    parser.add_argument("--bits", type=lambda text: [float(b) for b in text.split(",")])
    parser.add_argument("--sequences", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True, help="tokens")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer-plans", type=Path, nargs="*", default=[])
    return parser.parse_args()


def _stage_seconds(study: Study, budgets: list[float]) -> dict[str, float]:
    seconds = study.summary()["timings_s"]
    start = time.perf_counter()
    study.solve(budgets[-1])
    return {
        "calibration": seconds["calibration"],
        "scoring": seconds["sensitivity"],
        "solving": time.perf_counter() - start,
    }


def _compare(study: Study, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Bits and measured loss of each of the peer's plans, and of autoq's plan at those bits."""
    batches = _held_out_batches(arguments.held_out, arguments.batch)
    rows = []
    for path in arguments.peer_plans:
        for plan in json.loads(path.read_text())["plans"]:
            peer_formats = {name: plan["formats"][name] for name in study.model_map.slots}
            peer_bits = effective_bits_of(study, peer_formats)
            own = study.solve(peer_bits + ROUNDING)
            own_formats = {
                slot: own.assignment[group] for slot, group in study.model_map.group_of().items()
            }
            rows.append(
                {
                    "label": path.stem,
                    "budget_bits": plan["budget_bits"],
                    "peer": {
                        "effective_bits": peer_bits,
                        "counted_bits": plan["peer_effective_bits"],
                        **_measure(study, peer_formats, batches),
                    },
                    "autoq": {
                        "effective_bits": own.effective_bits,
                        "counted_bits": own.peer_effective_bits,
                        **_measure(study, own_formats, batches),
                    },
                }
            )
    return rows


def effective_bits_of(study: Study, slot_formats: Mapping[Any, str]) -> float:
    """Bits per weight over the searched layers, block scales included."""
    from autoq.formats import FORMATS

    slots = study.model_map.slots
    bits = sum(
        FORMATS[fmt].storage_bits(slots[name].out_features, slots[name].in_features).effective_bits
        for name, fmt in slot_formats.items()
    )
    return bits / sum(slot.weights for slot in slots.values())


def _held_out_batches(path: Path, batch: int) -> Any:
    import numpy as np
    import torch

    return list(torch.from_numpy(np.load(path).astype(np.int64)).split(batch))


def _measure(study: Study, slot_formats: Mapping[Any, Any], batches: Any) -> dict[str, Any]:
    import torch

    from autoq.api.task import output_properties
    from autoq.evaluators import measure_fidelity
    from autoq.layers.simulate import SimulatedModel

    model = study.loaded().model
    simulated = SimulatedModel(
        model,
        study.model_map.slots,
        slot_formats,
        study.calibration,
        container=study.config.container,
        scale_dtype=study.storage_dtype,
    )
    try:
        with torch.no_grad():
            fidelity = measure_fidelity(_pairs(simulated, batches), **output_properties(model))
    finally:
        simulated.restore()
    divergence = fidelity.kl_divergence
    return {
        "kl_divergence": divergence.value,
        "kl_interval": [divergence.low, divergence.high],
        "perplexity": fidelity.perplexity,
        "reference_perplexity": fidelity.reference_perplexity,
    }


def _pairs(simulated: Any, batches: Any) -> Any:
    """(ids, original output, quantised output) of every batch, from one model in memory."""
    from autoq.api.task import output_bytes
    from autoq.evaluators.fidelity import paired_outputs
    from autoq.models import forward_logits

    def reference(part: Any) -> list[Any]:
        with simulated.paused():
            return [forward_logits(simulated.model, ids) for ids in part]

    return paired_outputs(
        batches,
        reference,
        partial(forward_logits, simulated.model),
        bytes_per_batch=output_bytes(simulated.model, batches[0]),
    )


if __name__ == "__main__":
    main()
