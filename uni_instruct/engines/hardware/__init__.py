"""What this machine has: devices, processors, and how threads use them."""
