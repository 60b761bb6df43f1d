"""How machines reach each other: addresses, the local network, the best of several ways, and what may be in the way."""
