"""Calibrate a model by each of NVIDIA ModelOpt's algorithms, and measure time, memory and loss.

Runs in ModelOpt's own environment, so it imports nothing of autoq.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from calibration_cases import Case, Measurer, Rows, parse_arguments, peak_bytes
from divergence import logits_of, token_batches
from run_modelopt import silence

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that its export takes together; those that read one tensor."""


def main() -> None:
    """Run every case that the peer has."""
    arguments = parse_arguments(__doc__)
    torch.set_num_threads(1)
    import modelopt
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt_cpu_shim import install

    install()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    batches = token_batches(arguments.tokens, arguments.batch)

    def feed(quantised: Any) -> None:
        with torch.no_grad():
            for ids in batches:
                quantised(input_ids=ids, use_cache=False)

    versions = {
        library.__name__: library.__version__ for library in (modelopt, torch, transformers)
    }
    rows = Rows(arguments.out, versions)

    def prepared(case: Case, count: int = 1) -> Callable[[], Any]:
        configuration = _configuration(case, getattr(mtq, str(case.peer_config)))
        copies = [copy.deepcopy(model) for _ in range(count)]

        def quantise() -> Any:
            with silence():
                return mtq.quantize(copies.pop(), configuration, forward_loop=feed)

        return quantise

    cases = [case for case in rows.missing(arguments.only) if case.peer_config is not None]
    peaks = [peak_bytes(partial(prepared, case)) for case in cases]
    measurer = Measurer(model, arguments)
    for case, peak in zip(cases, peaks, strict=True):
        seconds, quantised = measurer.seconds(prepared(case, measurer.repetitions))
        _give_inputs(case, quantised)
        quality = measurer.quality(quantised, logits_of(quantised))
        if "awq" in str(case.peer_algorithm):
            with silence():
                _share_as_exported(quantised)
            quality["exported"] = measurer.quality(quantised, logits_of(quantised))
        rows.add(case, {"cpu_seconds": seconds, "peak_bytes": peak, **quality})


def _configuration(case: Case, preset: dict[str, Any]) -> dict[str, Any]:
    """The preset with the case's algorithm."""
    configuration = copy.deepcopy(preset)
    algorithm = case.peer_algorithm
    configuration["algorithm"] = dict(algorithm) if isinstance(algorithm, dict) else algorithm
    return configuration


def _share_as_exported(quantised: Any) -> None:
    """What the peer's export does to layers that read one tensor: one scale of the inputs, the mean.

    Its own function, which its export calls for the same layers; norms take the scales over after it.
    """
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    for module in list(quantised.modules()):
        for names in FUSED:
            if all(hasattr(module, name) for name in names):
                preprocess_linear_fusion([getattr(module, name) for name in names])


def _give_inputs(case: Case, quantised: Any) -> None:
    """Quantise inputs as the case says; SmoothQuant itself calibrates under static scales only."""
    for _, module in quantised.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if case.peer_inputs and quantizer is not None and quantizer.is_enabled:
            quantizer.reset_amax()
            quantizer.set_from_attribute_config(dict(case.peer_inputs))


if __name__ == "__main__":
    main()
