"""Searches over settings with Optuna, behind hydra/sweeper=optuna. optuna is imported in the functions that use it."""
