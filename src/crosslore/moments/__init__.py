"""What happens to the old moments when the basis changes."""
