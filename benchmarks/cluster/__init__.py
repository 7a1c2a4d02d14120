"""Measurements of the room cluster/ and of what schedules on it."""
