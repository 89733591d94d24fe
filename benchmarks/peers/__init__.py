"""What `benchmarks/serving.py` compares with: the same engine behind other servers, as their documentation writes it."""
