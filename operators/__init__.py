"""Rows to rows on Ray Data: read, extract, clean, detect language, filter, deduplicate, synthesise, pack."""
