"""How good a video is: does it follow its camera, stay sharp, keep its colours; which true rendering is it."""
