"""Calibrate a model by each of NVIDIA ModelOpt's algorithms, and measure time, memory and loss.

Runs in ModelOpt's own environment, so it imports nothing of autoq.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from calibration_cases import Case, Measurer, Rows, parse_arguments
from divergence import logits_of, token_batches
from run_modelopt import silence


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
    measurer = Measurer(model, arguments)

    def feed(quantised: Any) -> None:
        with torch.no_grad():
            for ids in batches:
                quantised(input_ids=ids, use_cache=False)

    versions = {
        library.__name__: library.__version__ for library in (modelopt, torch, transformers)
    }
    rows = Rows(arguments.out, versions)
    for case in rows.missing(arguments.only):
        if case.peer_config is None:
            continue
        configuration = _configuration(case, getattr(mtq, case.peer_config))
        copies = [copy.deepcopy(model) for _ in range(measurer.repetitions)]

        def quantise(configuration: Any = configuration, copies: list[Any] = copies) -> Any:
            with silence():
                return mtq.quantize(copies.pop(), configuration, forward_loop=feed)

        cost, quantised = measurer.seconds_and_memory(quantise)
        _give_inputs(case, quantised)
        rows.add(case, cost | measurer.quality(quantised, logits_of(quantised)))


def _configuration(case: Case, preset: dict[str, Any]) -> dict[str, Any]:
    """The preset with the case's algorithm."""
    configuration = copy.deepcopy(preset)
    algorithm = case.peer_algorithm
    configuration["algorithm"] = dict(algorithm) if isinstance(algorithm, dict) else algorithm
    return configuration


def _give_inputs(case: Case, quantised: Any) -> None:
    """Quantise inputs as the case says; SmoothQuant itself calibrates under static scales only."""
    for _, module in quantised.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if case.peer_inputs and quantizer is not None and quantizer.is_enabled:
            quantizer.reset_amax()
            quantizer.set_from_attribute_config(dict(case.peer_inputs))


if __name__ == "__main__":
    main()
