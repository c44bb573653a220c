"""What `autoq.kernels.benchmark` measures, beside what, and how time is taken."""
