"""What this processor multiplies at most, from registers alone."""
