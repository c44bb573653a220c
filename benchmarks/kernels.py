"""How fast the kernels are, beside a copy, torch's own products and naive code, in one run.

    python benchmarks/kernels.py [--device cuda|cpu] [--json FILE] [--operation PREFIX]

The same as `autoq kernels bench`; what is measured is said in `autoq.kernels.benchmark`.
"""

from __future__ import annotations

import typer

from autoq.cli._kernels_bench import bench

if __name__ == "__main__":
    typer.run(bench)
