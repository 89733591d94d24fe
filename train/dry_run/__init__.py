"""`train --dry-run`: what a recipe would train, as text, and what that would cost."""
