"""The sub-commands of training: `train`, `doctor`, `lab`, `average`."""
