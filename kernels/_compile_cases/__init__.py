"""What `autoq kernels check` and the tests compile: every launch, on meta tensors, per target."""
