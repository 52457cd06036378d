"""Training: one loop (`loop.py`); a stage is "build data and a loss function, then the loop"."""
