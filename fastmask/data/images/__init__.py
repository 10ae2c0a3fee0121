"""Image decoding, and the dataset of images decoded at each visit."""
