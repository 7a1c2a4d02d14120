"""Rows to rows on Ray: read, extract, clean, detect language, filter, deduplicate, synthesise, pack."""
