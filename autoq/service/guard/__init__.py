"""Who may do what: callers, rates, bodies, and the folders that paths cannot leave."""
