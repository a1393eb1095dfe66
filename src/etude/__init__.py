"""Étude: an experiment repository for language models."""

__version__ = "0.6.0"
