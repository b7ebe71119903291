"""Camera-posed clips: what one is, where they are kept, and the renderers that make them."""
