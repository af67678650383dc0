"""How well models do on labelled inputs, or how well they predict texts."""
