"""Between the tensors of files and those of the model that transformers makes of them."""
