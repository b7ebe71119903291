"""Training: a stage from the table, run by Ray Train and DeepSpeed, that continues when its command is run again."""
