"""Files of models on this machine: the store, fetching, packs, KV that was kept."""
