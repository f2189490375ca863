"""The contract: every type that crosses a process border, and the pipes that carry them."""
