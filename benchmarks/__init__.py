"""What the README's figures come from: `python -m benchmarks.<name>`, from a checkout."""
