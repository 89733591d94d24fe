"""What each address takes and gives."""
