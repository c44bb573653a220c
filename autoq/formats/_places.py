"""Engines and hardware by name, and what a record of support says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from autoq.formats._container import Container
from autoq.formats._format import FormatName
from autoq.registry import Registry


class Verdict(StrEnum):
    """How a format runs on a target."""

    NATIVE = "native"
    """Codes and scales go into the matrix units, inputs quantised: what the search measures."""
    WEIGHT_ONLY = "weight-only"
    """Loads, and saves memory; the weights are widened, and inputs are not quantised."""
    EMULATED = "emulated"
    """Computes the format's numbers in the model's own dtype: right, and no faster."""
    NO = "no"
    """Does not load, or loads wrong."""

    @property
    def runs(self) -> bool:
        """Whether a checkpoint with the format loads and computes what it should."""
        return self is not Verdict.NO


@dataclass(frozen=True, slots=True)
class Engine:
    """Software that loads checkpoints, in the version that was looked at."""

    name: str
    title: str  # with the version


@dataclass(frozen=True, slots=True)
class Hardware:
    """What an engine runs on."""

    name: str
    title: str
    capability: int | None  # 90 for compute capability 9.0; None for a CPU

    @property
    def generation(self) -> str:
        """The compute capability as people write it, or "cpu"."""
        return (
            "cpu" if self.capability is None else f"{self.capability // 10}.{self.capability % 10}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """How one engine runs one format, read from one container, on some compute capabilities."""

    engine: str
    container: Container
    format: FormatName
    capabilities: tuple[int | None, ...]  # 90 for compute capability 9.0; None for CPUs
    verdict: Verdict
    reason: str
    source: str  # what the statement rests on, in words
    out_features_multiple: int = 1  # rows that a weight must be divisible by, beyond the format's
    counts_fused_rows: bool = False  # the multiple is of all rows of a matrix that engines fuse
    runs_experts: bool = True  # a mixture's experts, too, and not plain linears alone
    alone: tuple[Verdict, str] | None = None  # and why, in a checkpoint of this one format
    mixed: tuple[Verdict, str] | None = None  # and why, in a checkpoint of several formats

    def within(self, *, is_mixed: bool) -> tuple[Verdict, str]:
        """How it runs in a checkpoint, and why; `verdict` is what holds for either kind."""
        return (self.mixed if is_mixed else self.alone) or (self.verdict, self.reason)

    def misfit(self, out_features: int, *, is_expert: bool) -> str | None:
        """Why the engine does not take a matrix in this format that it runs; None if it does."""
        if is_expert and not self.runs_experts:
            return (
                f"runs no experts of {self.format} from {self.container} checkpoints: it stops "
                "while it builds or loads them"
            )
        if out_features % self.out_features_multiple:
            return (
                f"needs out_features divisible by {self.out_features_multiple} for {self.format}, "
                f"got {out_features}"
            )
        return None


ENGINES: Registry[Engine] = Registry("engine")
HARDWARE: Registry[Hardware] = Registry("hardware")
"""GPUs by product name and by generation (sm_90), and "cpu"."""

for _engine in (
    Engine("vllm", "vLLM 0.33"),
    Engine("sglang", "SGLang 0.5.23"),
    Engine("tensorrt-llm", "TensorRT-LLM 1.2, PyTorch backend"),
    Engine("transformers", "transformers 5.23 with compressed-tensors 0.20"),
):
    ENGINES.register(_engine.name, _engine)

for _hardware in (
    Hardware("t4", "NVIDIA T4", 75),
    Hardware("a100", "NVIDIA A100", 80),
    Hardware("a10", "NVIDIA A10", 86),
    Hardware("rtx3090", "NVIDIA GeForce RTX 3090", 86),
    Hardware("l4", "NVIDIA L4", 89),
    Hardware("l40s", "NVIDIA L40S", 89),
    Hardware("rtx4090", "NVIDIA GeForce RTX 4090", 89),
    Hardware("h100", "NVIDIA H100", 90),
    Hardware("h200", "NVIDIA H200", 90),
    Hardware("gh200", "NVIDIA GH200", 90),
    Hardware("b200", "NVIDIA B200", 100),
    Hardware("gb200", "NVIDIA GB200", 100),
    Hardware("b300", "NVIDIA B300", 103),
    Hardware("gb300", "NVIDIA GB300", 103),
    Hardware("rtx5090", "NVIDIA GeForce RTX 5090", 120),
    Hardware("rtx-pro-6000", "NVIDIA RTX PRO 6000 Blackwell", 120),
    *(
        Hardware(f"sm_{capability}", f"any GPU of compute capability {capability / 10}", capability)
        for capability in (75, 80, 86, 89, 90, 100, 103, 120)
    ),
    Hardware("cpu", "a CPU", None),
):
    HARDWARE.register(_hardware.name, _hardware)
