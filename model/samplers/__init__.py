"""Samplers as pure functions of a velocity function and a schedule."""
