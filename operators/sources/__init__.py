"""Readers: files to work units to Arrow batches of documents."""
