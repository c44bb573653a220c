"""Helpers for tests of autoq and of packages that extend it."""
