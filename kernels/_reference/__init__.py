"""What each format means: slow, obvious torch, the truth that every other body is tested against."""
