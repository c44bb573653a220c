"""lm-eval looks for a task's functions beside its YAML file."""

from autoq.bundled.harness_tasks import choices, texts

__all__ = ["choices", "texts"]
