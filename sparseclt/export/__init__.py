"""A CLT in the formats of other tools."""
