"""What images are read from: folders, archives, arrays and tables."""
