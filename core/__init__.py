"""The engine core: decides which tokens run next. No model, no tensors, no text."""
