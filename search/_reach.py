"""Which products the model ran, and which of them backward reached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autoq.errors import ModelError
from autoq.models import ModelMap, SlotKind, SlotName
from autoq.search._batch_loss import NoGradientError, check_not_constant


class GradientReach:
    """Follows one batch forward and back, and names the layer at which gradients end."""

    def __init__(self, model_map: ModelMap) -> None:
        self._slots = model_map.slots
        self._ran: dict[SlotName, int] = {}  # how often, in the order of the forward
        self._goes_back = False
        self._reached: set[SlotName] = set()
        self._has_gradient = False
        self._own_failure: Exception | None = None

    def begin(self) -> None:
        """Another batch begins."""
        self._ran.clear()

    def ran(self, name: SlotName, rows: int) -> None:
        """The model runs a slot's product; an expert's may have no token."""
        if rows and not self._goes_back:  # where blocks are computed again
            self._ran[name] = self._ran.get(name, 0) + 1

    def ran_once(self, name: SlotName) -> bool:
        """Whether this batch's forward ran the slot's product once."""
        return self._ran.get(name) == 1

    @contextmanager
    def observing(self, name: SlotName, output_gradient: Tensor) -> Iterator[None]:
        """Backward is at a slot, and what is done with its gradient may fail."""
        self._has_gradient = self._has_gradient or bool(output_gradient.any())
        try:
            yield
        except Exception as error:
            self._own_failure = error
            raise
        self._reached.add(name)

    def backward(self, total: Tensor, *, keep_graph: bool) -> None:
        """Run backward, and see that it reaches every layer that the model ran.

        Raises:
            NoGradientError: it does not.
            ModelError: a layer is not run at all, or all gradients are zero.
        """
        self._reached.clear()
        self.check_graph(total)
        with self.going_back():
            total.backward(retain_graph=keep_graph)  # type: ignore[no-untyped-call]
        self.check()

    def check_graph(self, total: Tensor) -> None:
        """Refuse a loss that is no function of what the layers computed.

        Raises:
            NoGradientError: it is none.
        """
        if not total.requires_grad:
            raise NoGradientError(self._last_unreached(), "the loss has no graph")

    @contextmanager
    def going_back(self) -> Iterator[None]:
        """Backward runs, through the whole model or a part of it, which may be computed again.

        Raises:
            NoGradientError: the model has a part that cannot go back.
        """
        self._own_failure = None
        self._goes_back = True
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if self._own_failure is not None:  # no fault of the model
                raise
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoGradientError(self._last_unreached(), f"backward says: {cause}") from error
        finally:
            self._goes_back = False

    def check(self) -> None:
        """See that backward reached every layer that the model ran, once all of it is done.

        Raises:
            NoGradientError, ModelError: as `backward`.
        """
        if self._ran.keys() - self._reached:
            raise NoGradientError(self._last_unreached())
        for slot in self._slots.values():
            # An expert that no token was routed to has no gradient, rightly.
            if slot.name not in self._reached and slot.kind is not SlotKind.EXPERT:
                raise ModelError(
                    f"{slot.name} takes no part in the loss, so its sensitivity is unknown; "
                    f"exclude it with --exclude '{slot.name}'"
                )
        check_not_constant(self._has_gradient)

    def _last_unreached(self) -> SlotName:
        """Of the layers without a gradient the one that the model ran last: there it stops."""
        names = [name for name in self._ran if name not in self._reached]
        return names[-1] if names else next(iter(self._slots))
