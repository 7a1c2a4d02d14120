"""Curating conversations for fine-tuning: what is set aside and why, each idea an operator of a `curate` stage."""
