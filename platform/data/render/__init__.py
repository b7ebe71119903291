"""Renderers of camera-posed clips: ViZDoom for volume and variety, MuJoCo for float depth and any camera."""
