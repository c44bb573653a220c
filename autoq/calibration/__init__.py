"""One pass over calibration data that gives every layer its scales in every format."""

from autoq.calibration.calibrate import calibrate
from autoq.calibration.plain import plain_entries, without_unfolded_scales

__all__ = ["calibrate", "plain_entries", "without_unfolded_scales"]
