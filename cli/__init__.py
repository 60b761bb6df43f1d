"""The command line: parse, call, print. Everything else is the daemon's."""
