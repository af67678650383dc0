"""What merges of large models need: weights that stay in their files until they are used, layers
that are not solved twice, and costs that are told before."""
