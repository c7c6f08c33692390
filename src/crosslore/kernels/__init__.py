"""Small tensor routines in plain torch; faster twins of them belong here too."""
