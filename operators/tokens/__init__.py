"""Tokens: training a tokenizer, packing documents into sequences."""
