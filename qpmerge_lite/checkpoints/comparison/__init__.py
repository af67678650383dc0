"""What checkpoints have that others have not, part by part."""
