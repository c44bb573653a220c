"""lm-eval's own command line, with the model `autoq` in it.

    python -m autoq.lm_eval run --model autoq --model_args pretrained=CHECKPOINT --tasks ...

lm-eval 0.4 reads no entry points and has no option that names a module: its own command knows the
models in its registry, and looks a model up before it loads any task by name. `--include_path`
does not help, because what a task file names is not imported for it. So something has to tell it
first: this module; in programs `import autoq.lm_eval` before
`lm_eval.simple_evaluate(model="autoq", ...)`. For lm-eval's own command a bundled task does it that is
named by its file (`--tasks PATH/autoq_choices.yaml,...`), because the functions of files are imported
while the command line is read; without one `lm_eval --model autoq` ends with "Unknown model 'autoq'".
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
