"""The stage-1 network: frame-wise GDN blocks with softmax attention in every fourth, and a camera branch in each."""
