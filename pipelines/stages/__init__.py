"""Stages: what a recipe may name, each a typed configuration with a `run`."""
