"""The running node: engine, scheduler, sessions, API, configuration."""
