"""Étude: an experiment repository for language models."""

__version__ = "0.4.0"
