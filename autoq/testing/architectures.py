"""Every family of models beside every format and container: run for real, and written as a table.

Each family is a tiny random model that goes the whole way: discovery, search, export, read-back.
What came of it is a cell of the table in docs/support.md, which nobody writes by hand:

    python -m autoq.testing.architectures --write docs/support.md
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoq.export._layouts import LAYOUTS, WITHOUT_LAYOUT
from autoq.formats import ENGINES, FORMATS, NONE, FormatName
from autoq.layers import Container
from autoq.testing._family_runs import Cell, Reach, quantised_formats, run_family


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One row of the support table."""

    name: str  # in FAMILY_SETTINGS
    title: str  # models that people know
    note: str = ""  # what is particular about it


FAMILIES: tuple[Family, ...] = (
    Family(name="llama", title="Llama 2, Vicuna"),
    Family(name="llama3", title="Llama 3, 3.1, 3.2 (text), 3.3"),
    Family(
        name="llama4",
        title="Llama 4 (text)",
        note="experts stay unquantised: one batched product over transposed matrices",
    ),
    Family(
        name="llama4_vision",
        title="Llama 4 Scout, Maverick",
        note="experts and the vision part stay unquantised",
    ),
    Family(name="mistral", title="Mistral, Ministral, Mathstral"),
    Family(
        name="mistral3", title="Mistral Small 3.1, 3.2", note="the vision part stays unquantised"
    ),
    Family(name="mixtral", title="Mixtral"),
    Family(name="qwen2", title="Qwen 2, Qwen 2.5, QwQ"),
    Family(name="qwen3", title="Qwen 3"),
    Family(name="qwen2_moe", title="Qwen 1.5 MoE, Qwen 2 MoE"),
    Family(name="qwen3_moe", title="Qwen 3 MoE"),
    Family(name="qwen2_vl", title="Qwen 2-VL", note="the vision part stays unquantised"),
    Family(name="qwen2_5_vl", title="Qwen 2.5-VL", note="the vision part stays unquantised"),
    Family(name="phi", title="Phi-1.5, Phi-2"),
    Family(name="phi3", title="Phi-3, Phi-3.5"),
    Family(name="phi4", title="Phi-4, Phi-4-mini"),
    Family(name="phimoe", title="Phi-3.5-MoE"),
    Family(name="gemma", title="Gemma 1"),
    Family(name="gemma2", title="Gemma 2"),
    Family(name="gemma3", title="Gemma 3 (text)"),
    Family(
        name="gemma3_vision",
        title="Gemma 3 (text and pictures)",
        note="the vision part stays unquantised",
    ),
    Family(
        name="deepseek_v3",
        title="DeepSeek-V3, DeepSeek-R1",
        note="`kv_b_proj` stays unquantised: engines multiply it into other matrices",
    ),
    Family(
        name="gpt_oss",
        title="GPT-OSS",
        note="experts stay unquantised: stored transposed, gate and up interleaved",
    ),
    Family(name="nemotron", title="Nemotron, Minitron"),
    Family(
        name="nemotron_nas",
        title="Nemotron Super and Ultra (NAS), Llama-Nemotron",
        note="layers of different shapes, from code in the model's folder (`--trust-remote-code`)",
    ),
    Family(name="exaone4", title="EXAONE 4"),
    Family(name="glm4", title="GLM-4"),
    Family(name="falcon", title="Falcon"),
    Family(name="starcoder2", title="StarCoder2"),
    Family(name="gpt2", title="GPT-2"),
    Family(name="gptj", title="GPT-J"),
    Family(name="gpt_neox", title="GPT-NeoX, Pythia"),
    Family(name="opt", title="OPT"),
    Family(name="bloom", title="BLOOM"),
    Family(name="mpt", title="MPT"),
    Family(name="stablelm", title="StableLM"),
    Family(
        name="mamba",
        title="Mamba",
        note="`dt_proj` and the convolution stay unquantised",
    ),
    Family(name="bert", title="BERT"),
    Family(name="roberta", title="RoBERTa"),
    Family(name="t5", title="T5"),
    Family(name="flan_t5", title="Flan-T5, T5 1.1"),
    Family(name="bart", title="BART"),
    Family(
        name="whisper",
        title="Whisper",
        note="takes sounds: `autoq.auto_quantize` with a `forward_step`, no `autoq search`",
    ),
    Family(name="llava", title="LLaVA 1.5", note="the vision part stays unquantised"),
    Family(name="llava_next", title="LLaVA-NeXT", note="the vision part stays unquantised"),
    Family(
        name="mllama",
        title="Llama 3.2 Vision (Mllama)",
        note="the vision part and layers with cross-attention stay unquantised: text never "
        "reaches them",
    ),
)

UNBUILDABLE = (
    "Qwen 1 exists as remote code only, which is not copied here: `--trust-remote-code` runs it, and "
    "nothing was checked."
)

_INTRODUCTION = """# Which models, formats and containers go together

Written by `make support-table`, from what came of taking a tiny random model of every family through
discovery, search, export and read-back; `tests/architectures` runs it again and compares. *yes*: every
group of layers can be stored so, and a checkpoint with the format was read back bit for bit (from
compressed-tensors, transformers' logits are the simulation's, too). *3 of 8*: those groups can, and the
others are named below. *no*: none can. Output heads and routers stay unquantised unless included.

What engines then do with a checkpoint is another table: `autoq targets` ({engines}).
"""


def document(cells: Mapping[str, Sequence[Cell]]) -> str:
    """The whole page.

    Args:
        cells: family's name -> what came of it; of all families.
    """
    engines = ", ".join(engine.title for engine in ENGINES.values())
    parts = [_INTRODUCTION.replace("{engines}", engines)]
    for container in Container:
        parts.append(f"## {container.value}\n")
        parts.append(
            "\n".join([*_head(container), *(row(f, container, cells[f.name]) for f in FAMILIES)])
        )
        absent = [
            fmt.name
            for fmt in FORMATS.values()
            if fmt.name != NONE and (container, fmt.name) not in LAYOUTS
        ]
        parts += [f"\nNot {fmt}: {WITHOUT_LAYOUT[container, fmt]}." for fmt in absent]
        parts.append("")
    parts.append("## What stays unquantised, and what is refused\n")
    parts += [remark for family in FAMILIES for remark in remarks(family, cells[family.name])]
    parts.append(f"\n{UNBUILDABLE}\n")
    return "\n".join(parts)


def columns(container: Container) -> list[FormatName]:
    """The formats that a container has a place for."""
    return [fmt for fmt in quantised_formats() if (container, fmt) in LAYOUTS]


def _head(container: Container) -> Iterator[str]:
    formats = columns(container)
    yield f"| Models | {' | '.join(formats)} |"
    yield f"|---|{'---|' * len(formats)}"


def row(family: Family, container: Container, cells: Sequence[Cell]) -> str:
    """A family's line in the table of a container."""
    found = {cell.format: cell for cell in cells if cell.container is container}
    words = [_word(found[fmt]) for fmt in columns(container)]
    return f"| {family.title} | {' | '.join(words)} |"


def _word(cell: Cell) -> str:
    if cell.reach is Reach.SOME:
        return f"{cell.groups} of {cell.all_groups}"
    return "yes" if cell.reach is Reach.ALL else "no"


def remarks(family: Family, cells: Sequence[Cell]) -> list[str]:
    """What is to be said of a family: its note, and each reason why a cell is not "yes"."""
    lines = [f"- {family.title}: {family.note}."] if family.note else []
    reasons: dict[tuple[Container, str], list[FormatName]] = {}
    for cell in cells:
        if cell.reason and cell.format in columns(cell.container):
            reason = _without_format(cell.reason, cell.format)
            reasons.setdefault((cell.container, reason), []).append(cell.format)
    for (container, reason), formats in reasons.items():
        all_of_them = formats == columns(container)
        which = "every format" if all_of_them else ", ".join(formats)
        lines.append(f"- {family.title}, {container.value}, {which}: {reason}.")
    return lines


def _without_format(reason: str, fmt: FormatName) -> str:
    """So that one reason for many formats is told once."""
    return re.sub(rf" as {re.escape(fmt)}\b", "", reason).replace(f" be {fmt}:", " be so:")


def run_all(names: Sequence[str] | None = None) -> dict[str, list[Cell]]:
    """What came of each family, by name; of all of them unless some are named."""
    found: dict[str, list[Cell]] = {}
    for family in FAMILIES:
        if names and family.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[family.name] = run_family(family.name, Path(folder))
    return found


def main() -> None:
    """Run every family, and write the page."""
    parser = argparse.ArgumentParser(description="Write the table of families and formats.")
    parser.add_argument("--write", type=Path, required=True, help="the page, docs/support.md")
    arguments = parser.parse_args()
    arguments.write.write_text(document(run_all()), encoding="utf-8")
    print(f"{arguments.write}: {len(FAMILIES)} families")


if __name__ == "__main__":
    main()
