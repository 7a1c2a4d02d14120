"""Writers: from the rows of finished stages to files of one size, for other tools and for later stages."""
