"""Tools around models: the sandbox in which the code that they write runs. Needs no torch and no engine."""
