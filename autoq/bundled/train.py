"""Train the bundled model: `python -m autoq.bundled.train --out DIR --minutes 40 --threads 1`."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autoq.bundled.language import multiple_choice_questions
from autoq.bundled.scoring import (
    SEQUENCE_LENGTH,
    choice_accuracy,
    held_out_sequences,
    packed_sequences,
    perplexity,
)
from autoq.bundled.tokenizer import VOCABULARY_SIZE, train_tokenizer

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HELD_OUT_SEED = 0
HELD_OUT_TOKENS = 65_536
QUESTION_COUNT = 400

_QUICK_HELD_OUT_TOKENS = 8192
_WARMUP_SHARE = 0.03
_FINAL_RATE_SHARE = 0.02
_CHECKPOINT = "checkpoint"


@dataclass
class Progress:
    """How far a training run has come; stored with every checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


def new_model() -> LlamaForCausalLM:
    """Build the untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=SEQUENCE_LENGTH,  # beyond it the model was never trained
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def learning_rate(share: float, peak: float) -> float:
    """The learning rate after a share of the time: a linear warm-up, then half a cosine."""
    if share < _WARMUP_SHARE:
        return peak * (share + 0.001) / _WARMUP_SHARE
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return peak * (_FINAL_RATE_SHARE + (1 - _FINAL_RATE_SHARE) * cosine)


def batches(tokenizer: PreTrainedTokenizerFast, seed: int, batch: int) -> Iterator[torch.Tensor]:
    """Yield batches of packed training sequences without end."""
    import torch

    rows = packed_sequences(tokenizer, seed, "train")
    while True:
        yield torch.tensor(list(itertools.islice(rows, batch)))


class Trainer:
    """Runs training steps until the time is used up."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        tokenizer: PreTrainedTokenizerFast,
        build: Callable[[], PreTrainedModel] = new_model,
    ) -> None:
        import torch

        self.arguments = arguments
        self.tokenizer = tokenizer
        torch.manual_seed(arguments.seed)
        self.model: Any = build()
        self.compiled = torch.compile(self.model) if arguments.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self._parameter_groups(), lr=arguments.rate, betas=(0.9, 0.98), fused=True
        )
        self.progress = Progress()
        self.quick_rows = held_out_sequences(tokenizer, HELD_OUT_SEED, _QUICK_HELD_OUT_TOKENS)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        parameters = list(self.model.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]

    def run(self) -> None:
        """Train, log and save checkpoints until the time is used up."""
        # A resumed run reads fresh documents: its data seed depends on the steps done before.
        data_seed = self.arguments.seed + self.progress.steps
        data = batches(self.tokenizer, data_seed, self.arguments.batch)
        limit = self.arguments.minutes * 60
        last, logged, saved = time.monotonic(), 0.0, self.progress.seconds
        while self.progress.seconds < limit:
            loss = self.step(next(data), self.progress.seconds / limit)
            now = time.monotonic()
            self.progress.seconds += now - last
            last = now
            if self.progress.seconds - logged > self.arguments.log_seconds:
                logged = self.progress.seconds
                self.log(loss)
            if self.progress.seconds - saved > self.arguments.checkpoint_seconds:
                saved = self.progress.seconds
                self.save_checkpoint()
        self.log(loss)

    def step(self, rows: torch.Tensor, share: float) -> torch.Tensor:
        """Learn from a batch of rows after a share of the run; the loss before it."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(share, self.arguments.rate)
        loss = self.loss(rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.progress.steps += 1
        self.progress.tokens += rows.numel()
        return loss.detach()

    def loss(self, rows: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the next tokens, in nats per token."""
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.compiled(input_ids=rows, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), rows[:, 1:].flatten()
        )

    def log(self, loss: torch.Tensor) -> None:
        """Print how far the run is, and the perplexity of some held-out tokens."""
        import torch

        with torch.autocast("cpu", dtype=torch.bfloat16):
            held_out = perplexity(self.model, self.quick_rows)
        done = self.progress
        print(
            f"{done.seconds:7.0f} s  step {done.steps:6d}  {done.tokens / 1e6:6.2f} M tokens  "
            f"{done.tokens / done.seconds:6.0f} tokens/s  loss {loss.item():.4f}  "
            f"held-out perplexity {held_out:.4f}",
            flush=True,
        )

    def save_checkpoint(self) -> None:
        """Write weights, optimizer moments and progress so that `--resume` can continue."""
        from safetensors.torch import save_file

        folder = _checkpoint_folder(self.arguments.out)
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        save_file(tensors, folder / "new.safetensors", metadata=_as_text(self.progress))
        os.replace(folder / "new.safetensors", folder / "state.safetensors")

    def load_checkpoint(self) -> None:
        """Continue from the last checkpoint."""
        from safetensors import safe_open

        weights: dict[str, torch.Tensor] = {}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        path = _checkpoint_folder(self.arguments.out) / "state.safetensors"
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is not a mapping
                owner, name = key.split(".", 1)
                if owner == "model":
                    weights[name] = file.get_tensor(key)
                else:
                    index, moment = name.split(".")
                    moments.setdefault(int(index), {})[moment] = file.get_tensor(key)
            self.progress = Progress(**json.loads(file.metadata()["progress"]))
        self.model.load_state_dict(weights)
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({**state, "state": moments})


def _checkpoint_folder(out: pathlib.Path) -> pathlib.Path:
    folder = out / _CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _as_text(progress: Progress) -> dict[str, str]:
    return {"progress": json.dumps(vars(progress))}


def save_result(trainer: Trainer) -> dict[str, Any]:
    """Write the model in bfloat16 with its tokenizer, measure what was written, and record it."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    out: pathlib.Path = trainer.arguments.out
    model: Any = trainer.model
    model.to(torch.bfloat16)
    generation: Any = GenerationConfig
    model.generation_config = generation(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(out)
    trainer.tokenizer.save_pretrained(out)
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    record = _record(trainer, saved)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _record(trainer: Trainer, saved: Any) -> dict[str, Any]:
    import torch
    import transformers

    rows = held_out_sequences(trainer.tokenizer, HELD_OUT_SEED, HELD_OUT_TOKENS)
    questions = multiple_choice_questions(HELD_OUT_SEED, QUESTION_COUNT)
    arguments = {k: v for k, v in vars(trainer.arguments).items() if k != "out"}
    return {
        "seed": trainer.arguments.seed,
        "steps": trainer.progress.steps,
        "tokens_seen": trainer.progress.tokens,
        "parameters": sum(p.numel() for p in saved.parameters()),
        "held_out": {
            "seed": HELD_OUT_SEED,
            "tokens": rows.numel(),
            "sequence_length": SEQUENCE_LENGTH,
            "compute_dtype": "float32",
            "perplexity": perplexity(saved, rows),
        },
        "multiple_choice": {
            "seed": HELD_OUT_SEED,
            "questions": QUESTION_COUNT,
            "accuracy": choice_accuracy(saved, trainer.tokenizer, questions),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "arguments": arguments,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the bundled model.")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8, help="sequences in one step")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--log-seconds", type=float, default=60.0)
    parser.add_argument("--checkpoint-seconds", type=float, default=300.0)
    parser.add_argument("--compile", action="store_true", help="compile the training step")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in out")
    return parser.parse_args()


def main() -> None:
    """Train and save the bundled model."""
    import torch

    arguments = _arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments, train_tokenizer(arguments.seed))
    if arguments.resume:
        trainer.load_checkpoint()
    trainer.run()
    trainer.save_checkpoint()
    print(json.dumps(save_result(trainer), indent=2))


if __name__ == "__main__":
    main()
