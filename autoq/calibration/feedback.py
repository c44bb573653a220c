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

    def moment(self, first: SlotName, scale: Tensor | None) -> Tensor | None:
        """Mean of x xᵀ of a sharing set's inputs, times the scale; None where no input came."""
        moment = self._moments.get(self._owners[first])
        if moment is None:
            return None
        mean = moment.mean()
        return mean if scale is None else mean * torch.outer(scale, scale).to(mean.device)

    def of(
        self, first: SlotName, scale: Tensor | None, options: FeedbackOptions
    ) -> ErrorFeedback | None:
        """That of a sharing set's first slot; None where no input came."""
        key = (self._owners[first], options)
        if scale is None and key in self._unscaled:
            return self._unscaled[key]
        moment = self.moment(first, scale)
        if moment is None:
            return None
        feedback = ErrorFeedback.of(moment, options)
        if scale is None:
            self._unscaled[key] = feedback
        return feedback
