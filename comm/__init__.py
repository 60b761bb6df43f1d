"""Bytes between processes: messages, wire, sockets, keys."""
