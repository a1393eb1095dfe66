"""hydra/sweeper=optuna, as Hydra finds it. Hydra imports every module here whenever a script starts: the rest is in
etude.tuning."""
