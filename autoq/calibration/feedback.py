"""Error feedback of the layers of a group, from the second moments of their inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoq.calibration.gptq import ErrorFeedback
from autoq.calibration.moments import SecondMoment
from autoq.formats import FeedbackOptions
from autoq.models import SlotName


class FeedbackOfSlots:
    """Error feedback by slot and input scale; that of unscaled inputs is made once."""

    def __init__(
        self, moments: Mapping[SlotName, SecondMoment], owners: Mapping[SlotName, SlotName]
    ) -> None:
        self._moments, self._owners = moments, owners
        self._unscaled: dict[tuple[SlotName, FeedbackOptions], ErrorFeedback] = {}

    def of(
        self, first: SlotName, scale: Tensor | None, options: FeedbackOptions
    ) -> ErrorFeedback | None:
        """That of a sharing set's first slot; None where no input came."""
        owner = self._owners[first]
        if owner not in self._moments:
            return None
        if scale is not None:
            mean = self._moments[owner].mean()
            return ErrorFeedback.of(mean * torch.outer(scale, scale).to(mean.device), options)
        key = (owner, options)
        if key not in self._unscaled:
            self._unscaled[key] = ErrorFeedback.of(self._moments[owner].mean(), options)
        return self._unscaled[key]
