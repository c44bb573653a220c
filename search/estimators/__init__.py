"""Ways to tell how much the loss grows when a decision group is quantised, by name.

All share one interface (`Estimator`): batch by batch they give what every sequence says of every
group in every format. They differ in what is differentiated, in which correlations they keep, and
in what they cost; docs/method.md compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from autoq.formats import FormatName
from autoq.layers.quantize import Container
from autoq.models import ModelMap
from autoq.registry import Registry
from autoq.search._projections import Calibrations
from autoq.search.estimator_names import DEFAULT_ESTIMATOR
from autoq.search.estimators._base import Estimator
from autoq.search.estimators.diagonal import Diagonal
from autoq.search.estimators.factored import Factored
from autoq.search.estimators.fisher_projection import FisherProjection
from autoq.search.estimators.forward_only import ForwardOnly
from autoq.search.estimators.quantized_point import QuantizedPoint
from autoq.search.estimators.sequence_projection import SequenceProjection
from autoq.search.estimators.token_projection import TokenProjection

__all__ = [
    "DEFAULT_ESTIMATOR",
    "ESTIMATORS",
    "Diagonal",
    "Estimator",
    "Factored",
    "FisherProjection",
    "ForwardOnly",
    "QuantizedPoint",
    "SequenceProjection",
    "TokenProjection",
    "make_estimator",
]

ESTIMATORS: Registry[type[Estimator]] = Registry("estimator")
"""Name -> class; the name is stored with the results."""

for _estimator in (
    TokenProjection,
    FisherProjection,
    SequenceProjection,
    Diagonal,
    Factored,
    QuantizedPoint,
    ForwardOnly,
):
    ESTIMATORS.register(_estimator.name, _estimator)


def make_estimator(
    name: str,
    model: nn.Module,
    model_map: ModelMap,
    formats: Sequence[FormatName],
    calibration: Calibrations,
    *,
    container: Container,
    scale_dtype: torch.dtype,
    **options: Any,
) -> Estimator:
    """The estimator called `name`, ready to score.

    Args:
        options: `row_fraction`, `dtype`, `seed` and `draws`, as for `SensitivityScorer`; an
            estimator refuses the values that mean nothing to it.
    Raises:
        UnknownNameError: no estimator has that name.
        InputError: an option is out of range for this estimator.
    """
    return ESTIMATORS[name](
        model,
        model_map,
        formats,
        calibration,
        container=container,
        scale_dtype=scale_dtype,
        **options,
    )
