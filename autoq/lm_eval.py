"""lm-eval's own command line, with the model `autoq` in it.

    python -m autoq.lm_eval run --model autoq --model_args pretrained=CHECKPOINT --tasks ...

lm-eval 0.4 does not look for models of other packages, so something has to tell it first: this
module; in programs `import autoq.lm_eval` before `lm_eval.simple_evaluate(model="autoq", ...)`; and
for lm-eval's own command a bundled task, named by its file, among the tasks.
"""

from __future__ import annotations

import sys

from autoq.bundled.harness_tasks import register_model
from autoq.evaluators.tasks import require_harness

_INPUT = 2  # exit code: something given cannot be used


def register() -> None:
    """Tell lm-eval of the model.

    Raises:
        InputError: lm-eval is not installed.
    """
    require_harness()
    register_model()


def main() -> None:
    """Run lm-eval's command line; refusals of autoq are one line and exit code 2."""
    from autoq.errors import AutoqError

    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except AutoqError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(_INPUT)


if __name__ == "__main__":
    main()
else:
    register()
