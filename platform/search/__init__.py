"""Search then refine: many cheap rollouts, scored; the best of each image refined."""
