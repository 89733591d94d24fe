"""What every step goes through: optimizers, processes, averages of weights."""
