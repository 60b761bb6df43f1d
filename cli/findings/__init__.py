"""What `shoal doctor` finds."""
