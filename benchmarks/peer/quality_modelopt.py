"""Search a model with ModelOpt for several budgets, and measure each of its own final models.

Runs in ModelOpt's own environment. Every budget is solved from one scoring pass as shipped, as
shipped with the scores that larger batches give (32 sequences, and the largest, which its example
script takes by itself), and with scores large enough for the solver's absolute tolerances. The models that result are quantised and calibrated as ModelOpt does it; their
KL divergence from the original is written sequence by sequence.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from divergence import Reference, logits_of, token_batches
from run_modelopt import CONFIGS, plan_record, search_arguments, silence

LARGE_BATCH = 32
LARGEST_BATCH = 512
"""Sequences. ModelOpt 0.47's `examples/hf_ptq/hf_ptq.py` takes the largest batch that fits into the
GPU's memory (`--batch_size 0`, its default; `get_max_batch_size` ends at 512), which on models this
small is all sequences at once."""
LARGE_LOSS = 1e4


def score_factors(batch: int, sequences: int) -> dict[str, float]:
    """Solver -> what the scores of batches of `batch` sequences are multiplied by.

    A score is a sum of squared gradients of a batch's mean loss: batches eight times as large make
    it 64 times smaller. A loss multiplied by 1e4 makes it 1e8 times larger.
    """
    return {
        "as_shipped": 1.0,
        "large_batches": (batch / LARGE_BATCH) ** 2,
        "largest_batches": (batch / min(LARGEST_BATCH, sequences)) ** 2,
        "rescaled": LARGE_LOSS**2,
    }


def main() -> None:
    """Search once, solve for all budgets, measure what differs."""
    arguments = _arguments()
    import torch

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    import modelopt
    import modelopt.torch.quantization as mtq
    import transformers
    from modelopt.torch.quantization.algorithms import QuantRecipe

    if "nvfp4" in arguments.formats:
        from modelopt_cpu_shim import install

        install()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
    ).eval()
    forward = logits_of(model)
    reference = Reference(forward, token_batches(arguments.held_out, arguments.batch))
    # The search ends by multiplying input scales into the weights, after which no other plan can be
    # put in place. Left out, the weight quantisers multiply by them at every call: same numbers.
    QuantRecipe.fold_pqs_to_weights = staticmethod(lambda model: None)
    started = time.perf_counter()
    batches = torch.cat(token_batches(arguments.tokens, arguments.batch))
    with silence():
        _, state = mtq.auto_quantize(model, **search_arguments(arguments, batches, mtq))
    seconds = time.perf_counter() - started
    factors = score_factors(arguments.batch, len(batches))
    plans = list(_measured_plans(arguments, model, state, reference, factors))
    versions = {
        library.__name__: library.__version__ for library in (modelopt, torch, transformers)
    }
    arguments.out.write_text(
        json.dumps(
            {
                "versions": versions,
                "search_seconds": seconds,
                "plans": plans,
                "scores": _scores(state),
            },
            indent=1,
        )
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy of token ids to search on")
    parser.add_argument("--held-out", type=Path, required=True, help=".npy of ids to measure on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--formats", type=lambda text: text.split(","), required=True)
    parser.add_argument("--bits", type=lambda text: [float(b) for b in text.split(",")])
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--nvfp4-config", help="instead of NVFP4_DEFAULT_CFG, for example NVFP4_AWQ_LITE_CFG"
    )
    arguments = parser.parse_args()
    if arguments.nvfp4_config:
        CONFIGS["nvfp4"] = arguments.nvfp4_config
    arguments.loss_scale = 1.0
    return arguments


def _measured_plans(
    arguments: argparse.Namespace,
    model: Any,
    state: dict[str, Any],
    reference: Reference,
    factors: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """Every budget's plan by either solver, with the divergence of its model."""
    known: dict[str, list[float]] = {}
    for solver, bits, recipe in _recipes(arguments, state, factors):
        record = plan_record(state, bits, recipe, solve_seconds=None)
        key = json.dumps(record["formats"], sort_keys=True)
        if key not in known:
            _put_in_place(model, recipe)
            known[key] = reference.divergences(logits_of(model))
        yield {**record, "solver": solver, "kl_per_sequence": known[key]}


def _recipes(
    arguments: argparse.Namespace, state: dict[str, Any], factors: dict[str, float]
) -> Iterator[tuple[str, float, dict[str, Any]]]:
    from modelopt.torch.quantization.algorithms import _resolve_best_recipe

    for solver, factor in factors.items():
        stats = {
            name: {**entry, "scores": [score * factor for score in entry["scores"]]}
            for name, entry in state["candidate_stats"].items()
        }
        for bits in arguments.bits:
            with silence():
                recipe = _resolve_best_recipe(
                    {**state, "candidate_stats": stats}, {"effective_bits": bits}
                )
            yield solver, bits, recipe


def _put_in_place(model: Any, recipe: dict[str, Any]) -> None:
    """Give every searched group its format, with the calibration of the search."""
    from modelopt.torch.opt.utils import get_hparam

    for name, choice in recipe.items():
        get_hparam(model, name).active = choice


def _scores(state: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Group -> format -> score, for whoever wants to know why plans differ."""
    return {
        name: {
            str(fmt): float(score)
            for fmt, score in zip(entry["formats"], entry["scores"], strict=True)
        }
        for name, entry in state["candidate_stats"].items()
    }


if __name__ == "__main__":
    main()
