"""CrossLore inside other tools."""
