"""Synthesis: engines, prompts, Self-Instruct, Evol-Instruct, novelty, preferences."""
