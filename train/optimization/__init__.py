"""What both stages use in every step: optimizers, processes and devices, precision, averages of weights."""
