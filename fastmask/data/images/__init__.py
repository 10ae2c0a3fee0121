"""From the bytes of images to pixels, and the dataset of images that are decoded as they are read."""
