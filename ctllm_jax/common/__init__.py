"""What both packages need, in the standard library alone (gs:// paths load etils when first used)."""
