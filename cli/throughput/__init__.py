"""`shoal profile` and `shoal plan`: what machines can do, and what models would do on them."""
