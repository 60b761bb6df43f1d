"""How it is computed fast: one function set, several homes."""
