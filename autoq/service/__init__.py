"""The HTTP service: searches run by others, and a page to look at them."""
