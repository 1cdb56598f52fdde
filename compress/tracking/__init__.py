"""The record of what was done: report, MLflow, Pareto front, pictures."""
