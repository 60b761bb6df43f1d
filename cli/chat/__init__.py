"""`shoal chat`: a conversation in the terminal."""
