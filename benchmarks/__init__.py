"""The suite: tasks, models, metrics, stages and tables."""
