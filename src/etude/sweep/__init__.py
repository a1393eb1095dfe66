"""Sweeps whose jobs are processes of their own: where a sweep lies, its jobs, what is shown of them (docs/sweeps.md)."""
