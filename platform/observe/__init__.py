"""What a person sees of a run: errors in one line, progress, measured figures, and a quiet Ray cluster to run on."""
