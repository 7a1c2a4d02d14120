"""Instruction data from documents: chunks, key points, question and answer pairs or dialogues, and the checks on them."""
