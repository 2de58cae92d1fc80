"""The study: every arm and seed from the same base on the same games."""
