"""A command that several processes carry out, as torchrun starts them."""
