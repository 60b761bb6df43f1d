"""Where weights and KV live: block stores, budget, KV pool."""
