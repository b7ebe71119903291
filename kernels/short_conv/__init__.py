"""Short depthwise convolution over time."""
