"""Étude: an experiment repository for language models."""

__version__ = "0.5.0"
