"""What every callback shares: phases on a Trainer's clock, saved state, loggers, monitors."""
