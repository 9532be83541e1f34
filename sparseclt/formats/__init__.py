"""CLTs in the formats of other tools, read and written exactly."""
