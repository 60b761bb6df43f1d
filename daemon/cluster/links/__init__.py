"""The links between a head and its workers: measured when somebody asks, and what the figures mean."""
