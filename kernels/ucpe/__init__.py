"""UCPE: attention features expressed in the coordinates of each token's camera ray."""
