"""What a few-step network is distilled from."""
