"""Compact gradients: linear layers whose backward hands over R instead of the weight's gradient G."""
