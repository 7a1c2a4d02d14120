"""Filters: measure and decide, a named reason for each rejected row."""
