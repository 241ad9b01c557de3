"""A run that watches itself: heartbeats and hangs, stragglers, replay, replicas that differ."""
