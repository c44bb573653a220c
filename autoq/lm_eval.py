"""lm-eval's own command line, with the model `autoq` in it.

    python -m autoq.lm_eval run --model autoq --model_args pretrained=CHECKPOINT --tasks ...

lm-eval 0.4 looks for models of other packages nowhere, so something has to import them first: this
module, or in programs `import autoq.lm_eval` before `lm_eval.simple_evaluate(model="autoq", ...)`.
"""

from __future__ import annotations

import sys

from autoq.evaluators.tasks import require_harness

_INPUT = 2  # exit code: something given cannot be used

MODEL = "autoq.api.harness_model:AutoqModel"


def register() -> None:
    """Tell lm-eval of the model; what it needs is imported when it is first asked for.

    Raises:
        InputError: lm-eval is not installed.
    """
    require_harness()
    import lm_eval.models  # noqa: F401  (its own models first: it reads them into an empty list only)
    from lm_eval.api.registry import model_registry

    if "autoq" not in model_registry:
        model_registry.register("autoq", target=MODEL)


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
