"""What is generated, one file an area: valid and invalid inputs, mixed."""
