"""A model in memory as lm-eval sees models. Imports lm-eval: import it inside functions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import StoppingCriteriaList

from autoq.errors import InputError
from autoq.evaluators._harness_model_parts import Stops, positions, positive, score
from autoq.evaluators.fidelity import check_finite
from autoq.models.forward import forward_logits, is_causal

Item = TypeVar("Item")
Result = TypeVar("Result")

AUTO = "auto"
DEFAULT_NEW_TOKENS = 256
_AUTO_BYTES = 1 << 28
"""Of logits in one batch whose size is automatic; if even that is too much, batches are halved."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not typed
    """Log-likelihoods and continuations of a causal model and its tokenizer.

    Texts are tokenised and cut as lm-eval's own Hugging Face model does it, so that figures compare.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int | str = AUTO,
        max_length: int | None = None,
        show_progress: bool = True,
    ) -> None:
        """
        Args:
            model: causal, in eval mode; simulated, packed or as it was made.
            tokenizer: the transformers tokenizer.
            batch_size: sequences at once; "auto" takes as many as fit in a bound on memory, and
                fewer where they do not fit.
            max_length: tokens that the model sees at once; None is what it was made for.
        Raises:
            InputError: the model does not predict next tokens, there is no tokenizer, or a number
                is not positive.
        """
        super().__init__()
        if not is_causal(model):
            raise InputError(
                "evaluation tasks need a model that predicts the next token, and "
                f"{type(model).__name__} does not; leave the tasks out"
            )
        if tokenizer is None:
            raise InputError(
                "evaluation tasks need the model's tokenizer, and its folder has none; copy "
                "tokenizer.json there, or leave the tasks out"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length = positive("max_length", max_length or positions(model))
        self._rows = (
            None if str(batch_size).startswith(AUTO) else positive("batch_size", batch_size)
        )
        self._auto_bytes = _AUTO_BYTES
        self._show_progress = show_progress
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token; lm-eval asks for it."""
        found = self.tokenizer.eos_token_id
        return int(self.tokenizer.pad_token_id or 0) if found is None else int(found)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """Part of the name under which lm-eval caches requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; with the tokenizer's own special tokens unless the text brings them."""
        if add_special_tokens is None:
            prefix = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not string.startswith(prefix)
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, as the tokenizer's template writes it."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # Log-likelihoods

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, whether it is the greedy one) of continuations of texts."""
        quiet = disable_tqdm or not self._show_progress
        found: list[tuple[float, bool]] = super().loglikelihood(list(requests), disable_tqdm=quiet)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of whole texts, in windows that do not overlap, in nats."""
        windows: list[tuple[list[int], list[int]]] = []
        counts: list[int] = []
        for request in requests:
            own = list(
                map(
                    make_disjoint_window,
                    get_rolling_token_windows(
                        token_list=self.tok_encode(request.args[0]),
                        prefix_token=self.prefix_token_id,
                        max_seq_len=self.max_length,
                        context_len=1,
                    ),
                )
            )
            windows.extend(own)
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens([("", *w) for w in windows], disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of every request.

        Requests with the same input, such as choices of one token after one question, share a row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            whole = (*context, *continuation)[-(self.max_length + 1) : -1]
            rows.setdefault(whole, []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        longest_first = sorted(rows, key=lambda row: (-len(row), row))
        with self._bar(len(requests), disable_tqdm, "log-likelihoods") as bar:
            for row, log_probabilities in self._batched(longest_first, self._log_probabilities):
                for index in rows[row]:
                    _, context, continuation = requests[index]
                    found[index] = score(log_probabilities, continuation)
                    key = requests[index][0]
                    if key:
                        self.cache_hook.add_partial("loglikelihood", key, found[index])
                bar.update(len(rows[row]))
        return found

    def _log_probabilities(self, rows: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """float32 [tokens, vocabulary] of every row, in nats."""
        longest = max(map(len, rows))
        # Padding stands on the right, where causal attention keeps it out of what counts.
        padded = [[*row, *[self.eot_token_id] * (longest - len(row))] for row in rows]
        logits = forward_logits(self.model, torch.tensor(padded, device=self._device))
        check_finite(logits, "measured")
        return [logits[index, : len(row)].float().log_softmax(-1) for index, row in enumerate(rows)]

    # Continuations

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of texts, each up to the first of its stop strings."""
        found: list[str] = [""] * len(requests)
        # Only requests that are decoded the same way share a batch.
        alike: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        with self._bar(len(requests), disable_tqdm, "continuations") as bar:
            for indices in alike.values():
                for index, text in self._continuations(requests, indices):
                    found[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    bar.update(1)
        return found

    def _continuations(
        self, requests: Sequence[Any], indices: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Of some requests with the same options, longest prompts first."""
        options = requests[indices[0]].args[1]
        prompts = {index: self.tok_encode(requests[index].args[0]) for index in indices}

        def tokens(index: int) -> int:
            return len(prompts[index])

        def run(batch: Sequence[int]) -> list[str]:
            return self._generate([prompts[index] for index in batch], options)

        yield from self._batched(sorted(indices, key=tokens, reverse=True), run, tokens)

    def _generate(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        eos = self.tokenizer.decode([self.eot_token_id])
        stops = handle_stop_sequences(settings.pop("until", None), eos=eos)
        new_tokens = settings.pop("max_gen_toks")
        if settings.get("temperature") == 0.0:
            settings.pop("temperature")
            settings["do_sample"] = False
        room = self.max_length - new_tokens
        if room < 1:
            raise InputError(
                f"a task generates up to {new_tokens} tokens, and the model sees only "
                f"{self.max_length} at once; set max_gen_toks in the task to fewer"
            )
        prompts = [prompt[-room:] for prompt in prompts]
        longest = max(map(len, prompts))
        pad = (
            self.eot_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        # Padding stands on the left and is masked: what is generated follows the last token.
        ids = torch.tensor(
            [[*[pad] * (longest - len(p)), *p] for p in prompts], device=self._device
        )
        mask = torch.tensor(
            [[*[0] * (longest - len(p)), *[1] * len(p)] for p in prompts], device=self._device
        )
        model: Any = self.model
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            pad_token_id=pad,
            stopping_criteria=StoppingCriteriaList([Stops(self.tokenizer, stops, longest)]),
            **settings,
        )
        texts = [
            self.tokenizer.decode(row, skip_special_tokens=True) for row in output[:, longest:]
        ]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    # Batches

    def _bar(self, total: int, disable: bool, description: str) -> Any:
        return tqdm(total=total, disable=disable or not self._show_progress, desc=description)

    def _batched(
        self,
        items: Sequence[Item],
        run: Callable[[Sequence[Item]], Sequence[Result]],
        width: Callable[[Any], int] = len,
    ) -> Iterator[tuple[Item, Result]]:
        """Every item with its result; batches are halved where the memory does not suffice."""
        done = 0
        while done < len(items):
            batch = items[done : done + self._batch_size(width(items[done]))]
            try:
                with torch.no_grad():
                    results = run(batch)
            except torch.OutOfMemoryError:
                if self._rows is not None or len(batch) == 1:
                    raise
                self._auto_bytes //= 2
                continue
            yield from zip(batch, results, strict=True)
            done += len(batch)

    def _batch_size(self, tokens: int) -> int:
        if self._rows is not None:
            return self._rows
        config: Any = getattr(self.model, "config", None)
        vocabulary = int(getattr(config, "vocab_size", 0) or len(self.tokenizer))
        return max(1, self._auto_bytes // (max(tokens, 1) * vocabulary * 4))
