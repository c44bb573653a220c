"""A study's trials in the Optuna dashboard."""
