"""Quality: classifiers trained from named good and bad documents, and their scores."""
