"""Small worlds whose facts, exposures and mechanism are known exactly, and the papers' statements checked in them."""
