"""A Python client of the service."""
