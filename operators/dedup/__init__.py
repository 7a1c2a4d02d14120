"""Deduplication: exact and MinHash-LSH, without moving text."""
