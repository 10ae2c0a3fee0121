"""Image sources: folders, archives, arrays and tables."""
