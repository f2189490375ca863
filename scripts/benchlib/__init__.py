"""What the benchmarks share: engines behind one interface, and the way results are told."""
