"""Methods that merge singular vectors and eigenvectors of matrices, side by side and made
orthonormal: from weights alone in ``triplets``, by what experts read in ``essential``."""
