"""Where weights and KV live: packs, the window, the KV pool, and the budget for them."""
