"""What a run's Trainer is given: strategies, loggers, progress, callbacks."""
