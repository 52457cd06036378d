"""One model over several devices: `plan.py` says how each parameter splits, the other files apply it from outside."""
