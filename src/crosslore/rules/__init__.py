"""Update rules, for compact and for full tensors alike."""
