"""What keeps hostile input in its bounds: files beside a model, sizes, paths, URLs."""
