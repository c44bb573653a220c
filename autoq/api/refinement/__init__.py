"""Plans improved by trials that are measured on the quantised model."""
