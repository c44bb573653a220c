"""The model `autoq` of lm-eval: checkpoints, originals and studies' plans. Imports lm-eval.

python -m autoq.lm_eval run --model autoq --model_args pretrained=CHECKPOINT --tasks ...
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lm_eval.api.registry import register_model

from autoq.api.evaluating.tasks import folder_subject, is_model_folder, opened_plan, plan_subject
from autoq.api.opening import DEFAULT_STORE
from autoq.errors import InputError
from autoq.evaluators.harness_model import AUTO, HarnessModel
from autoq.evaluators.protocol import Subject

NAME = "autoq"


@register_model(NAME)
class AutoqModel(HarnessModel):
    """A packed checkpoint, an unquantised model, or a plan of a study, simulated."""

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        study: str | None = None,
        store: str = DEFAULT_STORE,
        bits: float | str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str | None = AUTO,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        **unknown: Any,
    ) -> None:
        """
        Args:
            pretrained: a checkpoint's folder, or an original's.
            study: a study's name, instead of `pretrained`.
            store: URL of the store that holds the study.
            bits: which plan of the study, in effective bits per weight; None is its last.
            device: auto (also None), cpu, cuda or cuda:N. A study runs where it was searched.
            dtype: auto, float32, bfloat16 or float16; not for studies.
            batch_size: sequences at once, or auto.
            max_length: tokens that the model sees at once.
            trust_remote_code: run Python code that the model's folder brings.
        Raises:
            InputError: not exactly one of `pretrained` and `study`, or an unknown argument.
        """
        unused = sorted(set(unknown) - {"max_batch_size"})  # lm-eval always passes that one
        if unused:
            raise InputError(
                f"the model autoq has no argument {', '.join(unused)}; it takes pretrained, or "
                "study with store and bits, and device, dtype, batch_size, max_length and "
                "trust_remote_code"
            )
        if (pretrained is None) == (study is None):
            raise InputError(
                "the model autoq needs either pretrained=FOLDER or study=NAME among its arguments"
            )
        self._opened = ExitStack()  # what is simulated stays so as long as this model lives
        if pretrained is not None:
            subject = _folder(pretrained, _place(device), dtype, trust_remote_code)
        else:
            opened, plan = opened_plan(
                str(study),
                store,
                effective_bits=None if bits is None else float(bits),
                trust_remote_code=trust_remote_code,
            )
            subject = self._opened.enter_context(plan_subject(opened, plan))
        super().__init__(
            subject.model, subject.tokenizer, batch_size=batch_size or AUTO, max_length=max_length
        )


def _place(device: str | None) -> str:
    """lm-eval's command line says cuda:0 where the user said nothing, also without a GPU."""
    import torch

    if device is None or (device == "cuda:0" and not torch.cuda.is_available()):
        return "auto"
    return device


def _folder(path: str, device: str, dtype: str, trust_remote_code: bool) -> Subject:
    if not is_model_folder(path):
        raise InputError(
            f"{path} holds no config.json; give pretrained= the folder of a checkpoint or a model"
        )
    return folder_subject(path, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
