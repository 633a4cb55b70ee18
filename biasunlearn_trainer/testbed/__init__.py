"""The planted-bias testbed: small worlds in which the truth is known."""
