"""One pass over calibration data that gives every layer its scales in every format."""

from autoq.calibration.calibrate import calibrate
from autoq.calibration.plain import without_unfolded_scales

__all__ = ["calibrate", "without_unfolded_scales"]
