"""What a search leaves behind: videos, a table of candidates, and a page made from the table alone."""
