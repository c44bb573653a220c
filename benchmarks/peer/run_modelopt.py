"""Search a model with NVIDIA ModelOpt's AutoQuantize, and write what it chose and what it took.

Runs in ModelOpt's own environment, so it imports nothing of autoq. The result is one JSON file:
seconds by stage, resident memory, and for every budget the format of each module.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from memory import import_ahead, leave_triton_out, peak_rss_bytes

CONFIGS = {
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "fp8": "FP8_DEFAULT_CFG",
    "w4a8_awq": "W4A8_AWQ_BETA_CFG",
}
"""autoq's format -> ModelOpt's configuration."""


def main() -> None:
    """Search once; solve for the other budgets from the same scores."""
    arguments = _arguments()
    process_start = time.perf_counter()
    leave_triton_out()
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    import modelopt
    import modelopt.torch.quantization as mtq
    import numpy as np
    import transformers

    if "nvfp4" in arguments.formats:
        from modelopt_cpu_shim import install

        install()
    import_ahead(arguments.model, "pulp")
    imports_rss = peak_rss_bytes()
    ids = torch.from_numpy(np.load(arguments.tokens).astype(np.int64))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    ).eval()
    stages = StageSeconds()
    stages.watch_modelopt()
    search_start, cpu_start = time.perf_counter(), time.process_time()
    with silence():
        _, state = mtq.auto_quantize(model, **search_arguments(arguments, ids, mtq))
    search_seconds = time.perf_counter() - search_start
    cpu_seconds = time.process_time() - cpu_start
    _write(
        arguments.out,
        {
            "versions": {
                "modelopt": modelopt.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "stage_seconds": stages.seconds,
            "search_seconds": search_seconds,
            "search_cpu_seconds": cpu_seconds,
            "process_seconds": time.perf_counter() - process_start,
            "imports_rss_bytes": imports_rss,
            "peak_rss_bytes": peak_rss_bytes(),
            "plans": _plans(state, arguments.bits),
        },
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", required=True, help=".npy of token ids [sequences, tokens]")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", type=lambda text: text.split(","), required=True)
    parser.add_argument("--bits", type=lambda text: [float(b) for b in text.split(",")])
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--loss-scale",
        type=float,
        default=1.0,
        help="multiplies the loss: 1 as shipped; 1e4 lifts the scores above the solver's tolerances",
    )
    return parser.parse_args()


def search_arguments(arguments: argparse.Namespace, ids: Any, mtq: Any) -> dict[str, Any]:
    """What `auto_quantize` is called with.

    Args:
        ids: token ids [sequences, tokens].
        mtq: the module modelopt.torch.quantization.
    """
    batches = list(ids.split(arguments.batch))
    return {
        "constraints": {
            "effective_bits": arguments.bits[0],
            "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
        },
        "quantization_formats": [CONFIGS[name] for name in arguments.formats],
        "data_loader": batches,
        "forward_step": lambda model, batch: model(input_ids=batch, labels=batch, use_cache=False),
        "loss_func": lambda output, batch: output.loss * arguments.loss_scale,
        "disabled_layers": ["*lm_head*"],
        "num_calib_steps": len(batches),
        "num_score_steps": len(batches),
        "method": "gradient",
        "verbose": False,
    }


class StageSeconds:
    """Seconds by stage, measured round ModelOpt's own functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch_modelopt(self) -> None:
        """Time calibration, scoring and solving from now on."""
        from modelopt.torch.quantization import algorithms, model_quant

        searcher = algorithms.AutoQuantizeGradientSearcher
        self._watch(model_quant, "calibrate", "calibration")
        self._watch(searcher, "estimate_sensitivity_scores", "scoring")
        self._watch(searcher, "run_search_with_stats", "solving")

    def _watch(self, owner: Any, name: str, stage: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                spent = time.perf_counter() - start
                self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

        setattr(owner, name, timed)


def _plans(state: dict[str, Any], budgets: list[float]) -> list[dict[str, Any]]:
    """The plan of every budget: the first as searched, the others from the same scores."""
    from modelopt.torch.quantization import algorithms

    plans = [plan_record(state, budgets[0], state["best"]["recipe"], solve_seconds=None)]
    for bits in budgets[1:]:
        start = time.perf_counter()
        with silence():
            recipe = algorithms._resolve_best_recipe(state, {"effective_bits": bits})
        plans.append(plan_record(state, bits, recipe, solve_seconds=time.perf_counter() - start))
    return plans


def plan_record(
    state: dict[str, Any], bits: float, recipe: dict[str, Any], solve_seconds: float | None
) -> dict[str, Any]:
    """One plan as plain data, with the bits that the peer counts."""
    names = {config: name for name, config in CONFIGS.items()} | {"NONE": "none"}
    formats: dict[str, str] = {}
    cost = 0.0
    for group, choice in recipe.items():
        candidate = state["candidate_stats"][group]
        cost += candidate["costs"][candidate["formats"].index(choice)]
        chosen = names[str(choice).partition("(")[0]]
        formats |= dict.fromkeys(candidate["module_names"], chosen)
    return {
        "budget_bits": bits,
        "peer_effective_bits": cost / state["cost_denominator"] * 16,
        "solve_seconds": solve_seconds,
        "formats": formats,
    }


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing is printed in here, and nothing is warned of."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def _write(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
