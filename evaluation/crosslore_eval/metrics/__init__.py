"""One module per metric; each says which official script or library its numbers agree with."""
