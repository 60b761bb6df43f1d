"""Sockets, clients and bounds: frames in, requests to the node, replies out."""
