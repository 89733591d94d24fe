"""What a recipe would do, in words, and what it would cost."""
