"""Text: analysis shared by operators, HTML extraction, repair, language, PII."""
