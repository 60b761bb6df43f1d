"""K and V of texts: pages in memory, the prefix cache over them, pages on disk."""
