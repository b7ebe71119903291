"""One clip on several devices."""
