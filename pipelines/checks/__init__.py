"""The linter: reads a recipe, and what its stages have made so far, against the known causes of bad models."""
