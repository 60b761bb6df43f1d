"""Machines that run one model together: here, how weights come to those that have no files of it."""
