"""Text of evaluation benchmarks in a corpus: found by shared n-grams, dropped, cut or marked."""
