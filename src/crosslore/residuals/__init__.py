"""What is done about the part of the gradient that the projection leaves out."""
