"""Scaling: settings that transfer over widths, and laws of the loss over sizes. python -m etude.scaling --help"""
