"""Choosing among the kept rows of stages: the best by score, a sample, a mixture by weights. No text is copied."""
