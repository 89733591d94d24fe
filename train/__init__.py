"""Recipe -> teacher -> one-step generator."""
