"""Work in processes of its own: runners, and what they run."""
