"""From a trained network to images: decoding, classes by name, files of images, the Python API."""
