"""Train a small mixture-of-experts model for the benchmarks, on the bundled model's language.

    python benchmarks/train_mixture.py --out MODEL_DIR

Same tokenizer, data and optimiser as the bundled model; the architecture is Qwen3-MoE with eight
experts a layer, of which a token takes two. A run is a fixed number of steps from a fixed seed, so
that the same versions on the same machine write the same weights: ten minutes on one core, and a
held-out perplexity of 5.48 (the bundled model: 4.87).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from typing import TYPE_CHECKING, Any

from autoq.bundled.scoring import SEQUENCE_LENGTH
from autoq.bundled.tokenizer import VOCABULARY_SIZE, train_tokenizer
from autoq.bundled.train import Trainer, batches, save_result

if TYPE_CHECKING:
    import torch
    from transformers import Qwen3MoeForCausalLM

BALANCE_WEIGHT = 0.01
"""Of the loss that keeps all experts in use (Switch Transformers, Fedus et al. 2021)."""


def new_mixture() -> Qwen3MoeForCausalLM:
    """Build the untrained model; every linear's inputs are a multiple of 128, as INT4 wants."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    configuration: Any = Qwen3MoeConfig
    config = configuration(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        router_aux_loss_coef=BALANCE_WEIGHT,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


class MixtureTrainer(Trainer):
    """Trains for a number of steps, with the loss that keeps all experts in use."""

    def run(self) -> None:
        """Train and log until all steps are done; time decides nothing."""
        arguments = self.arguments
        data = batches(self.tokenizer, arguments.seed, arguments.batch)
        started = time.monotonic()
        while self.progress.steps < arguments.steps:
            loss = self.step(next(data), self.progress.steps / arguments.steps)
            self.progress.seconds = time.monotonic() - started
            if self.progress.steps % arguments.log_steps == 0:
                self.log(loss)

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the next tokens plus the weighted balance of the experts."""
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = self.compiled(input_ids=rows, use_cache=False, output_router_logits=True)
        entropy: torch.Tensor = torch.nn.functional.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten()
        )
        balance: torch.Tensor = output.aux_loss
        return entropy + BALANCE_WEIGHT * balance


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sequences in one step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--log-steps", type=int, default=100)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


def main() -> None:
    """Train and save the model, its tokenizer and training.json."""
    import torch

    arguments = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = MixtureTrainer(arguments, train_tokenizer(arguments.seed), new_mixture)
    trainer.run()
    print(json.dumps(save_result(trainer), indent=2))


if __name__ == "__main__":
    main()
