"""One pass over calibration data that gives every layer its scales in every format."""

from autoq.calibration.calibrate import calibrate

__all__ = ["calibrate"]
