"""hydra/launcher=isolated. Hydra imports every module here whenever a script starts: what is heavy is imported in functions."""
