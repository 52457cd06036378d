"""Tasks of our own: what the YAML files in `tasks/own` name as functions. Data are made from a seed or read from files.

Nothing here runs a model; all of it is found and scored through lm-eval like every other task.
"""
