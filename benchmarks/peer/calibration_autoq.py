"""Calibrate a model by each of autoq's algorithms, and measure time, memory and loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from calibration_cases import Case, Measurer, Rows, parse_arguments, peak_bytes
from divergence import token_batches


def main() -> None:
    """Run every case."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    import transformers

    import autoq
    from autoq.formats import FORMATS
    from autoq.layers.simulate import SimulatedModel
    from autoq.models import discover, forward_logits

    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    batches = token_batches(arguments.tokens, arguments.batch)
    model_map = discover(model)
    versions = {library.__name__: library.__version__ for library in (autoq, torch, transformers)}
    rows = Rows(arguments.out, versions)
    cases = [case for case in rows.missing(arguments.only) if case.fmt in FORMATS]
    works = [partial(_calibrated, model, model_map, case, batches) for case in cases]
    peaks = [peak_bytes(partial(_same, work)) for work in works]
    measurer = Measurer(model, arguments)
    for case, work, peak in zip(cases, works, peaks, strict=True):
        seconds, table = measurer.seconds(work)
        simulated = SimulatedModel(
            model,
            model_map.slots,
            dict.fromkeys(model_map.slots, case.fmt),
            table,
            container=case.container,
            scale_dtype=torch.float32,
        )
        try:
            quality = measurer.quality(model, partial(forward_logits, model))
        finally:
            simulated.restore()
        rows.add(case, {"cpu_seconds": seconds, "peak_bytes": peak, **quality})


def _same(work: Callable[[], Any]) -> Callable[[], Any]:
    return work


def _calibrated(model: torch.nn.Module, model_map: Any, case: Case, batches: list[Any]) -> Any:
    from autoq.calibration import calibrate
    from autoq.formats import Container, parse_calibration
    from autoq.models import forward_logits

    return calibrate(
        model,
        model_map,
        [case.fmt],
        batches,
        partial(forward_logits, model),
        run_small=lambda: forward_logits(model, batches[0][:1]),
        container=Container(case.container),
        scale_dtype=torch.float32,
        method=parse_calibration(case.calibration),
    )


if __name__ == "__main__":
    main()
