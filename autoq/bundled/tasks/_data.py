"""lm-eval looks for a task's functions beside its YAML file, and imports nothing else of autoq.

So this is also where its own command line learns of the model: with one of these files among its
tasks, `lm_eval run --model autoq` works.
"""

from autoq.bundled.harness_tasks import choices, register_model, texts

__all__ = ["choices", "texts"]

register_model()
