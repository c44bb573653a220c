"""The web process: the application, its routes, its events, and the page."""
